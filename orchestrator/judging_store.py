"""An evaluation's directory: its finished pieces, and its samples.

MODEL.eval/<evaluation_id>/
    evaluation.json       what is evaluated, for people
    pieces/0-16.json      what the documents 0 to 15 scored; appears whole or not at all
    samples.jsonl         with --log-samples, when all pieces are there
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from lestd_kernels.errors import LestdError
from orchestrator.manifest import json_bytes, write_json
from workers.contracts import JudgeRequest, JudgeResult
from workers.files import AnyPath, atomic_write, is_file, list_names, make_directory, read_files
from workers.judge_tasks import BuiltTask


class EvaluationDirectory:
    """What is kept of one evaluation.

    Args:
        path: its directory, in the evaluations' run directory.
    """

    def __init__(self, path: AnyPath) -> None:
        self._path = path
        self._pieces = path / "pieces"

    def begin(self, about: dict[str, Any]) -> None:
        """Make the directory.

        Raises:
            LestdError: it cannot be written.
        """
        try:
            make_directory(self._pieces)
            if not is_file(self._path / "evaluation.json"):
                write_json(self._path / "evaluation.json", about)
        except OSError as error:
            raise LestdError(
                f"{self._path} cannot be written ({error.strerror}); finished pieces are kept "
                "there, choose another place by --run-dir"
            ) from error

    def commit(self, result: JudgeResult) -> None:
        """Keep a finished piece; it is on disk when this returns."""
        content = json_bytes(asdict(result))
        atomic_write(self._piece(result.documents), lambda file: file.write(content))

    def _piece(self, documents: Sequence[int]) -> AnyPath:
        return self._pieces / f"{documents[0]}-{documents[1]}.json"

    def read(self, pieces: Sequence[JudgeRequest]) -> dict[str, JudgeResult]:
        """The pieces that are finished, by task_id; one that is damaged is not."""
        present = set(list_names(self._pieces))
        asked = [piece for piece in pieces if self._piece(piece.documents).name in present]
        contents = read_files([self._piece(piece.documents) for piece in asked])
        found = {}
        for piece, content in zip(asked, contents, strict=True):
            result = None if isinstance(content, OSError) else _parse(content, piece)
            if result is not None:
                found[piece.task_id] = result
        return found

    def write_samples(self, built: BuiltTask, results: Sequence[JudgeResult]) -> None:
        """Write what was asked and answered, a JSON object per document and filter."""
        lines = "".join(
            json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n"
            for sample in _samples(built, results)
        ).encode()
        atomic_write(self._path / "samples.jsonl", lambda file: file.write(lines))


def _parse(content: bytes, piece: JudgeRequest) -> JudgeResult | None:
    """A piece as it was committed; None if it is damaged or another."""
    try:
        fields = json.loads(content)
        result = JudgeResult(**fields | {"documents": tuple(fields["documents"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    same = (result.task_id, result.documents) == (piece.task_id, piece.documents)
    whole = len(result.responses) == piece.documents[1] - piece.documents[0]
    return result if same and whole else None


def _samples(built: BuiltTask, results: Sequence[JudgeResult]) -> Iterator[dict[str, Any]]:
    """Samples with the fields of lm-eval's own."""
    for result in results:
        for name, metrics in sorted(result.metrics.items()):
            for position, number in enumerate(range(*result.documents)):
                requests = built.requests[number]
                doc = requests[0].doc
                target = built.task.doc_to_target(doc)
                text = json.dumps(
                    doc, indent=2, default=handle_non_serializable, ensure_ascii=False
                )
                # A document may have no value of a metric; then it cannot be said which has.
                known = {
                    metric: values[position]
                    for metric, values in metrics.items()
                    if len(values) == len(result.responses)
                }
                yield {
                    "doc_id": number,
                    "doc": doc,
                    "target": target,
                    "arguments": [request.args for request in requests],
                    "resps": result.responses[position],
                    "filtered_resps": result.filtered[name][position],
                    "filter": name,
                    "metrics": list(known),
                    "doc_hash": hash_string(text),
                    "prompt_hash": hash_string(requests[0].arguments[0]),
                    "target_hash": hash_string(str(target)),
                    **known,
                }
