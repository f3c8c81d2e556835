"""Questions and answers of a task, in the form of lm-eval's own sample logs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from workers.evaluation.contracts import LmEvalResult
from workers.evaluation.lm_eval_tasks import BuiltTask


def sample_lines(built: BuiltTask, results: Sequence[LmEvalResult]) -> bytes:
    """JSON lines, an object per document and filter, with the fields of lm-eval's own.

    Args:
        built: the task.
        results: its pieces, in the order of their documents.
    """
    return "".join(
        json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n"
        for sample in _samples(built, results)
    ).encode()


def _samples(built: BuiltTask, results: Sequence[LmEvalResult]) -> Iterator[dict[str, Any]]:
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
