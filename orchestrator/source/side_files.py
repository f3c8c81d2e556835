"""Files that belong to a model beside its weights: config, tokenizer, licence, chat templates.

Those in subfolders too, but not what is another model's, a run's or a tool's. The Python files that
`auto_map` names are copied as texts, so that whoever trusts the source can load its copy likewise;
lestd itself runs none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from workers.storage.files import AnyPath, copy_file, list_tree, make_directory, require_content
from workers.storage.names import MANIFEST_DIR, is_inside
from workers.storage.untrusted_files import parse_json, read_regular

_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm"}
_PREFIXES = ("LICENSE", "NOTICE", "README")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack"}
# Beside a model in a folder of the source, ours.
_OF_RUNS = (".run", ".eval", ".recover", ".converting")
# Of trainers, Python and disks: what lies in there was never part of a model.
_OF_TOOLS = {"wandb", "runs", "logs", "venv", "env", "node_modules", "__pycache__", "lost+found"}


def is_side_file(name: str) -> bool:
    """Whether a file, by its path in the model, belongs to it beside its weights.

    Nothing that is run or unpickled, and no index of weights, is one.
    """
    path = PurePosixPath(name)
    if not is_inside(name) or name.endswith(".index.json"):
        return False
    if not all(is_side_folder(str(folder)) for folder in path.parents if folder.name):
        return False
    return path.suffix in _SUFFIXES or path.name.startswith(_PREFIXES)


def is_side_folder(name: str) -> bool:
    """Whether a folder, by its path in the model, may hold files of it: none of a tool or a run."""
    folder = PurePosixPath(name).name
    if not folder or folder.startswith(".") or folder in _OF_TOOLS:
        return False
    return not folder.endswith(_OF_RUNS) and name != MANIFEST_DIR


def side_files(names: Iterable[str]) -> set[str]:
    """Those of a model's files, by their paths, that belong to it beside its weights.

    Of a folder that holds weights or a configuration, which make it another model, none.
    """
    names = set(names)
    others = {_top(name) for name in names if "/" in name and _is_of_a_model(PurePosixPath(name))}
    return {name for name in names if is_side_file(name) and _top(name) not in others}


def fetch_side_files(names: set[str], fetch: Callable[[set[str]], Path]) -> Path:
    """Fetch the side files of a model elsewhere, and the code that they name.

    Args:
        names: paths of all files of the model.
        fetch: fetches some of them, and returns the local directory that they are in then.
    """
    fetched: set[str] = set()
    wanted = side_files(names)
    while True:
        directory = fetch(wanted - fetched)
        fetched = wanted
        wanted = fetched | (_named_code(directory) & names)
        if wanted == fetched:
            return directory


def find_side_files(directory: Path) -> set[str]:
    """Paths of a local model's side files, and of the code that they name.

    Raises:
        LestdError: one is a git-LFS pointer.
    """

    def is_read(folder: str) -> bool:
        return is_side_folder(folder) and os.access(directory / folder, os.R_OK | os.X_OK)

    found = side_files(list_tree(directory, is_read))
    found |= {name for name in _named_code(directory) if (directory / name).is_file()}
    require_content(directory, found)
    return found


def _is_of_a_model(path: PurePosixPath) -> bool:
    return path.suffix in _WEIGHTS or path.name == "config.json"


def _top(name: str) -> str:
    return name.partition("/")[0]


def _named_code(directory: Path) -> set[str]:
    """Python files that `auto_map` names, and what those that are there import from beside them.

    It names them as ``module.Class``; ``REPOSITORY--module.Class`` stays where it is.
    """
    modules: set[str] = set()
    for path in directory.glob("*config.json"):
        try:
            references: list[Any] = [*parse_json(read_regular(path))["auto_map"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        for reference in references:  # Of a tokenizer two: slow and fast.
            for one in reference if isinstance(reference, list) else [reference]:
                if isinstance(one, str) and "--" not in one:
                    modules.add(one.rpartition(".")[0])
    code: set[str] = set()
    while new := {file for module in modules if is_inside(file := f"{module}.py")} - code:
        code |= new
        modules = {module for file in new for module in _imports(directory / file)}
    return code


def _imports(path: Path) -> list[str]:
    try:
        read_regular(path)
        return get_relative_imports(path)
    except (OSError, ValueError):  # Absent, or no text: Transformers could not load it either.
        return []


def copy_side_files(
    source_dir: Path, target_dir: AnyPath, but: Container[str] = frozenset()
) -> None:
    """Copy the files that belong to a model beside its weights, see `find_side_files`, but some.

    Raises:
        LestdError: one is a git-LFS pointer.
        OutOfSpaceError: no space left.
    """
    for name in sorted(find_side_files(source_dir)):
        if name not in but:
            make_directory((target_dir / name).parent)
            copy_file(source_dir / name, target_dir / name)
