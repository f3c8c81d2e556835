"""The README.md of a compressed model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from orchestrator.markdown import template
from orchestrator.plan import Plan
from orchestrator.source import Source
from workers.files import AnyPath, list_files

CARD_FILE = "README.md"


def model_card(
    source: Source, plan: Plan, rows: Sequence[dict[str, Any]], directory: AnyPath
) -> str:
    """The model's README.md: source, method, sizes, and how to load it."""
    return template("model_card.md.jinja").render(
        # A path of this machine is nobody else's business; a Hub id is a name.
        name=source.model if source.revision else source.directory.name,
        source=source,
        plan=plan,
        rows=rows,
        method=rows[0]["method"],
        pattern=rows[0]["pattern"],
        metric=rows[0]["metric"],
        value_bits=rows[0]["value_bits"],
        factor_bits=rows[0]["factor_bits"],
        scopes=sorted({row["scope"] for row in rows}),
        metadata=card_metadata(source.directory),
        stored_bytes=sum(row["stored_bytes"] for row in rows),
        file_bytes=sum(
            size for name, size in list_files(directory).items() if name.endswith(".safetensors")
        ),
    )


def card_metadata(directory: Path) -> dict[str, Any]:
    """Licence and language from the source's model card, if it has one; they bind ours too."""
    card = directory / CARD_FILE
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    block = REGEX_YAML_BLOCK.search(text)  # What the Hub takes for its front matter.
    if block is None:
        return {}
    try:
        metadata = yaml.safe_load(block.group(2))
    except yaml.YAMLError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    kept = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
    return {key: metadata[key] for key in kept if key in metadata}
