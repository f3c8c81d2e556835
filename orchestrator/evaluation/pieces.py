"""The finished pieces of an evaluation, in its directory.

MODEL.eval/<evaluation_id>/
    evaluation.json       what is evaluated, for people
    pieces/0-16.json      what the windows or documents 0 to 15 scored; appears whole or not at all
    samples.jsonl         of tasks with --log-samples, when all pieces are there
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic, Protocol, TypeVar

from lestd_kernels.errors import LestdError
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.execution.resume import resume
from workers.contracts import Failure
from workers.storage.building import make_own_directory
from workers.storage.files import AnyPath, atomic_write, is_file, list_names, read_files
from workers.storage.json_files import json_bytes, write_json
from workers.storage.untrusted_files import parse_json


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
    """An evaluation: its pieces, and what is kept of those that are finished.

    Args:
        path: its directory, in the evaluations' run directory; it is made.
        about: what is evaluated, for people.
        pieces: what it consists of, in order.
        parse: makes a result of the fields that were committed; what is raised for fields that
            are absent or of other types is a `ValueError`, `TypeError` or `KeyError`.

    Attributes:
        results: of the finished pieces, by task_id; one that is damaged is not finished.

    Raises:
        LestdError: the directory cannot be written.
    """

    def __init__(
        self,
        path: AnyPath,
        about: Mapping[str, Any],
        pieces: Sequence[Piece],
        parse: Callable[[dict[str, Any]], ResultType],
    ) -> None:
        self.path = path
        self.pieces = pieces
        self._files = path / "pieces"
        try:
            make_own_directory(self.path)
            make_own_directory(self._files)
            if not is_file(self.path / "evaluation.json"):
                write_json(self.path / "evaluation.json", dict(about))
        except OSError as error:
            raise LestdError(
                f"{self.path} cannot be written ({error.strerror}); finished pieces are kept "
                "there, choose another place by --run-dir (sweep, compare and recover: --out)"
            ) from error
        self.results = self._read(parse)

    def _read(self, parse: Callable[[dict[str, Any]], ResultType]) -> dict[str, ResultType]:
        present = set(list_names(self._files))
        asked = [piece for piece in self.pieces if self._file(piece).name in present]
        contents = read_files([self._file(piece) for piece in asked])
        found = {}
        for piece, content in zip(asked, contents, strict=True):
            if isinstance(content, OSError):
                continue
            try:
                result = parse(parse_json(content))
            except (ValueError, TypeError, KeyError):
                continue
            if (result.task_id, result.span) == (piece.task_id, piece.span):
                found[piece.task_id] = result
        return found

    def _file(self, piece: Piece) -> AnyPath:
        first, stop = piece.span
        return self._files / f"{first}-{stop}.json"

    @property
    def complete(self) -> bool:
        """Whether all pieces are finished."""
        return len(self.results) == len(self.pieces)

    def ordered(self) -> list[ResultType]:
        """The results, in the order of the pieces, as far as they are there."""
        return [self.results[p.task_id] for p in self.pieces if p.task_id in self.results]

    def commit(self, result: ResultType) -> None:
        """Keep a finished piece; it is on disk when this returns."""
        content = json_bytes(asdict(result))
        atomic_write(self._file(result), lambda file: file.write(content))
        self.results[result.task_id] = result

    def write_samples(self, content: bytes) -> None:
        """Write what was asked and answered, JSON lines."""
        atomic_write(self.path / "samples.jsonl", lambda file: file.write(content))


def run_pieces(
    directories: Sequence[EvaluationDirectory[ResultType]],
    executor: Executor,
    spec: WorkerSpec,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
    pieces: Sequence[Piece] | None = None,
) -> Iterator[ResultType | Failure]:
    """Run what is not finished of `pieces`, or of all; see `resume`.

    `progress` is called, at once and after each piece, with the number of windows or documents that
    are done, and that of all.
    """
    owners = {piece.task_id: one for one in directories for piece in one.pieces}
    known = [piece for one in directories for piece in one.pieces]
    finished = {task_id for one in directories for task_id in one.results}
    total = sum(map(_size, known))
    done = sum(_size(piece) for piece in known if piece.task_id in finished)

    def tell(*_: Any) -> None:
        if progress is not None:
            progress(done, total)

    def commit(results: Sequence[ResultType]) -> None:
        nonlocal done
        for result in results:
            owners[result.task_id].commit(result)
            done += _size(result)

    tell()
    todo = known if pieces is None else pieces
    return resume(executor, spec, todo, finished, commit, on_event, tell)


def _size(piece: Piece) -> int:
    first, stop = piece.span
    return stop - first
