"""Names of files that a checkpoint, a model or a manifest states: they stay in its directory."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

MANIFEST_DIR = "manifest"
"""Of a run and of a model: the directory of its tables."""
TEMPORARY = ".tmp-"
"""How names begin of files that are being written, or whose writer was killed."""


def is_inside(name: object) -> bool:
    """Whether this is the plain relative path of a file in a directory, which does not climb.

    One with line ends or other characters that do not print is not: messages show it.
    """
    if not isinstance(name, str) or not name.isprintable():
        return False
    path = PurePosixPath(name)
    plain = str(path) == name and name != "."
    return plain and not path.is_absolute() and ".." not in path.parts


def leads_out(path: Path, directory: Path) -> bool:
    """Whether a file in a directory is a link out of it; in the cache of the Hub all are, to it."""
    # Unlike resolve(), no error of a link to itself, which whoever opens the file will meet.
    found, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    snapshots = root.parent
    cached = snapshots.name == "snapshots" and found.parent == snapshots.parent / "blobs"
    return not cached and not found.is_relative_to(root)
