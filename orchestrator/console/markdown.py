"""Markdown from templates: the cards of models, and the report that goes with them."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

# Between letters an underscore means nothing; elsewhere it may begin or end emphasis.
_MEANT_BY_MARKDOWN = re.compile(r"[\\|<`*\[\]]|(?<![^\W_])_|_(?![^\W_])")


def template(name: str) -> Template:
    """The template of that path in this package; it knows the filters `mib`, `figure`, `cell`."""
    environment = Environment(
        loader=PackageLoader("orchestrator", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"mib": mib, "figure": figure, "cell": cell}
    return environment.get_template(name)


def mib(size: float) -> str:
    """Bytes in MiB, which is what cards state sizes in."""
    return f"{size / 2**20:,.2f} MiB"


def figure(value: float | None) -> str:
    """A ratio, an error or a metric; nothing where it is not known."""
    return "" if value is None else f"{value:.4f}"


def cell(value: Any) -> str:
    """Text as a table's cell shows it: on one line, and no character of it means anything."""
    return _MEANT_BY_MARKDOWN.sub(lambda found: "\\" + found[0], " ".join(str(value).split()))
