"""The finished pieces of an evaluation, in its directory.

MODEL.eval/<evaluation_id>/
    evaluation.json       what is evaluated, for people
    pieces/0-16.json      what the windows or documents 0 to 15 scored; appears whole or not at all
    samples.jsonl         of tasks with --log-samples, when all pieces are there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, Protocol, TypeVar

from lestd_kernels.errors import LestdError
from workers.storage.building import make_own_directory
from workers.storage.files import AnyPath, atomic_write, is_file, list_names, read_files
from workers.storage.json_files import json_bytes, write_json
from workers.storage.regular import parse_json


class Piece(Protocol):
    """A request to a worker, or what came of it: a range of windows or documents."""

    @property
    def task_id(self) -> str:
        """Names the piece."""

    @property
    def span(self) -> tuple[int, int]:
        """Index of the first window or document, and of the one after the last."""


ResultType = TypeVar("ResultType", bound=Any)


class EvaluationDirectory(Generic[ResultType]):
    """What is kept of one evaluation.

    Args:
        path: its directory, in the evaluations' run directory.
        parse: makes a result of the fields that were committed; what is raised for fields that
            are absent or of other types is a `ValueError`, `TypeError` or `KeyError`.
    """

    def __init__(self, path: AnyPath, parse: Callable[[dict[str, Any]], ResultType]) -> None:
        self.path = path
        self._pieces = path / "pieces"
        self._parse = parse

    def begin(self, about: Mapping[str, Any]) -> None:
        """Make the directory.

        Raises:
            LestdError: it cannot be written.
        """
        try:
            make_own_directory(self.path)
            make_own_directory(self._pieces)
            if not is_file(self.path / "evaluation.json"):
                write_json(self.path / "evaluation.json", dict(about))
        except OSError as error:
            raise LestdError(
                f"{self.path} cannot be written ({error.strerror}); finished pieces are kept "
                "there, choose another place by --run-dir (sweep, compare and recover: --out)"
            ) from error

    def commit(self, result: ResultType) -> None:
        """Keep a finished piece; it is on disk when this returns."""
        content = json_bytes(asdict(result))
        atomic_write(self._piece(result), lambda file: file.write(content))

    def _piece(self, piece: Piece) -> AnyPath:
        first, stop = piece.span
        return self._pieces / f"{first}-{stop}.json"

    def read(self, pieces: Sequence[Piece]) -> dict[str, ResultType]:
        """The pieces that are finished, by task_id; one that is damaged is not."""
        present = set(list_names(self._pieces))
        asked = [piece for piece in pieces if self._piece(piece).name in present]
        contents = read_files([self._piece(piece) for piece in asked])
        found = {}
        for piece, content in zip(asked, contents, strict=True):
            if isinstance(content, OSError):
                continue
            try:
                result = self._parse(parse_json(content))
            except (ValueError, TypeError, KeyError):
                continue
            if (result.task_id, result.span) == (piece.task_id, piece.span):
                found[piece.task_id] = result
        return found

    def write_samples(self, content: bytes) -> None:
        """Write what was asked and answered, JSON lines."""
        atomic_write(self.path / "samples.jsonl", lambda file: file.write(content))
