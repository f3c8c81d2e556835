"""Evaluate documents of lm-eval's tasks with a model that was loaded once.

Requests, responses, filters and metrics are lm-eval's own code. With a batch size of 1 a response
depends on its request, the model, the device and the number of threads alone, so any division into
pieces gives what lm-eval gives in one process. In larger batches requests of a piece are padded to
the longest of their batch, which may change the last digits, but not with the number of workers.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from functools import cached_property
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from lestd_kernels.errors import LestdError
from workers.evaluation.contracts import LmEvalRequest, LmEvalResult
from workers.evaluation.lm_eval_tasks import BuiltTask, TaskSource, hushed, load_tasks
from workers.evaluation.worker import ModelWorker
from workers.host.loading import quiet_transformers


class LmEvalWorker(ModelWorker):
    """Evaluates documents with one model; a task is loaded when its first documents come.

    Args:
        model_dir: directory of a dense or a compressed model, with its tokenizer.
        source: where tasks come from.
        batch_size: requests that the model answers at once.
        common: see `ModelWorker`.
    """

    def __init__(
        self, model_dir: str, source: TaskSource, batch_size: int = 1, **common: Any
    ) -> None:
        super().__init__(model_dir, **common)
        self._source = source
        self._batch_size = batch_size
        self._loaded: dict[str, dict[str, Any]] = {}
        self._built: dict[tuple[str, str], BuiltTask] = {}

    @cached_property
    def _lm(self) -> HFLM:
        model = self._model
        tokenizer = AutoTokenizer.from_pretrained(
            self._model_dir, local_files_only=True, trust_remote_code=False
        )
        with hushed():
            return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self._batch_size)

    def _task(self, request: LmEvalRequest) -> BuiltTask:
        key = (request.name, request.task)
        if key not in self._built:
            if request.name not in self._loaded:
                self._loaded[request.name] = load_tasks(request.name, self._source)
            task = self._loaded[request.name]["tasks"][request.task]
            self._built[key] = BuiltTask(task, self._source.limit)
        built = self._built[key]
        if built.sha256 != request.sha256:
            raise LestdError(
                f"{self._name} makes other requests of task {request.task} than the driver; see "
                "that all machines have the same data and the same version of lm_eval"
            )
        return built

    def _score(self, request: LmEvalRequest) -> LmEvalResult:
        built, model = self._task(request), self._lm
        start = time.perf_counter()
        documents = built.requests[slice(*request.documents)]
        requests = [one for document in documents for one in document]
        self._require_known_tokens(requests)
        for one in requests:  # An earlier attempt may have answered some.
            one.resps, one.filtered_resps = [], {}
        with hushed() as cut, quiet_transformers():
            self._ask(model, requests)
            built.task._instances = requests
            built.task.apply_filters()
        metrics: dict[str, dict[str, list[Any]]] = {}
        filtered: dict[str, list[Any]] = {}
        for name in requests[0].filtered_resps:
            found: dict[str, list[Any]] = defaultdict(list)
            filtered[name] = []
            for document in documents:
                answers = [one.filtered_resps[name] for one in document]
                filtered[name].append(_plain(answers))
                values = built.task.process_results(document[0].doc, answers)
                for metric, value in values.items():
                    found[metric].append(_plain(value))
            metrics[name] = dict(found)
        return LmEvalResult(
            task_id=request.task_id,
            task=request.task,
            documents=request.documents,
            metrics=metrics,
            responses=[[_plain(one.resps) for one in document] for document in documents],
            filtered=filtered,
            cut=cut.count,
            seconds=time.perf_counter() - start,
            worker=self._name,
        )

    def _ask(self, model: HFLM, requests: list[Any]) -> None:
        by_type: dict[str, list[Any]] = defaultdict(list)
        for one in requests:
            by_type[one.request_type] += [one] * (one.repeats or 1)
        for kind, asked in by_type.items():
            responses = getattr(model, kind)(asked, disable_tqdm=True)
            for one, response in zip(asked, responses, strict=True):
                score = response[0] if isinstance(response, tuple) else response
                if isinstance(score, float) and math.isnan(score):
                    raise LestdError(
                        f"a log-likelihood of document {one.doc_id} of {one.task_name} is nan, "
                        f"computed in {model.model.dtype}; try --dtype float32, and if it stays "
                        "so the weights are broken"
                    )
                one.resps.append(response)

    def _require_known_tokens(self, requests: list[Any]) -> None:
        """Refuse token ids that the embedding lacks, which would be an index out of range."""
        model = self._lm
        texts = {text for one in requests for text in one.args if isinstance(text, str)}
        largest = max(max(model.tok_encode(text), default=0) for text in texts)
        known = model.model.get_input_embeddings().num_embeddings
        if largest >= known:
            raise LestdError(
                f"{self._model_dir}: the tokenizer gives token id {largest} but the model's "
                f"vocab_size is {known}; the tokenizer files belong to another model"
            )


def _plain(value: Any) -> Any:
    """A value that JSON can hold, and that aggregates as the value itself does."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
