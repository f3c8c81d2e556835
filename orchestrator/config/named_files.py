"""Files that come with lestd, each under a name; the first line, a comment, says what it is for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files

from lestd_kernels.errors import LestdError


@dataclass(frozen=True)
class NamedFile:
    """A text under a name.

    Attributes:
        name: how it is asked for.
        summary: one line that says what it is for.
        text: of the file.
    """

    name: str
    summary: str
    text: str


def named_files(package: str, ending: str) -> dict[str, NamedFile]:
    """All files with an ending in the folder ``named`` of a package, by name."""
    found = {}
    for file in files(package).joinpath("named").iterdir():
        name, _, own = file.name.rpartition(".")
        if own == ending:
            text = file.read_text(encoding="utf-8")
            found[name] = NamedFile(name, text.splitlines()[0].lstrip("#-").strip(), text)
    return dict(sorted(found.items()))


def one_of(known: dict[str, NamedFile], name: str, kind: str, listing: str) -> NamedFile:
    """The file of that name.

    Args:
        known: see `named_files`.
        name: what was asked for.
        kind: what the files are.
        listing: the command that shows all.

    Raises:
        LestdError: there is none.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise LestdError(f"there is no {kind} named {name!r}; {hint}{listing} shows all")
    return known[name]
