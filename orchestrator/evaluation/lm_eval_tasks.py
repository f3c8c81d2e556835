"""Evaluating a model by tasks of lm-eval, with a pool of workers.

A piece is a fixed range of a task's documents, whatever the pool. Every finished piece is
committed to the evaluation's directory, so a kill costs the pieces in flight. A task whose pieces
are all there is merged: values of the documents in their order go through lm-eval's own
aggregation, which gives the figures and standard errors of `lm_eval.simple_evaluate`, for any
number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lm_eval

from lestd_kernels.errors import LestdError
from orchestrator.config.options import Evaluation
from orchestrator.evaluation.lm_eval_samples import sample_lines
from orchestrator.evaluation.lm_eval_scores import (
    RawMetrics,
    TaskScores,
    aggregate,
    figure_rows,
    figures_of,
)
from orchestrator.evaluation.model import DTYPES, EvaluationModel, resolve_dtype, worker_spec
from orchestrator.evaluation.pieces import EvaluationDirectory, run_pieces
from orchestrator.evaluation.records import ModelFacts, evaluation_id, evaluation_versions
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from workers.contracts import Failure
from workers.evaluation.contracts import LmEvalRequest, LmEvalResult
from workers.evaluation.lm_eval import LmEvalWorker
from workers.evaluation.lm_eval_tasks import BuiltTask, TaskSource, load_tasks
from workers.storage.files import AnyPath

# Documents of a piece, with a batch size of 1, by lm-eval's output type: some seconds of work for a
# small model on a CPU, or for a large one on a GPU.
_DOCUMENTS = {"loglikelihood_rolling": 1, "generate_until": 4}
_DOCUMENTS_OF_CHOICE = 16
# Of lm_eval and what it imports, beside what every worker has.
_LM_EVAL_BYTES = 300 * 2**20


@dataclass(frozen=True)
class LmEvalSettings:
    """Settings that decide how models are evaluated.

    Attributes:
        tasks: names of tasks, groups or tags of lm-eval.
        source: where they come from, and how they are asked.
        batch_size: requests that a model answers at once.
        dtype: one of `DTYPES`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of a worker.
        gpus: GPUs of a CUDA worker, which divide the model's layers.
    """

    tasks: tuple[str, ...]
    source: TaskSource = field(default_factory=TaskSource)
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    gpus: int = 1


@dataclass(frozen=True)
class Examination:
    """The tasks that models are evaluated by, with their requests.

    Attributes:
        settings: what was asked for.
        tasks: task -> the name by which it is found, and the task.
        groups: lm-eval's groups.
    """

    settings: LmEvalSettings
    tasks: dict[str, tuple[str, BuiltTask]]
    groups: dict[str, Any]


def open_examination(settings: LmEvalSettings) -> Examination:
    """Load the tasks and build their requests.

    Raises:
        LestdError: a setting is impossible, or a task cannot be loaded.
    """
    for name, value in (
        ("batch-size", settings.batch_size),
        ("limit", settings.source.limit),
        ("threads", settings.threads),
        ("gpus", settings.gpus),
    ):
        if value is not None and value < 1:
            raise LestdError(f"{name} must be at least 1, got {value}")
    if settings.source.fewshot is not None and settings.source.fewshot < 0:
        raise LestdError(f"fewshot must be at least 0, got {settings.source.fewshot}")
    if settings.dtype not in DTYPES:
        raise LestdError(f"dtype must be one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    if not settings.tasks:
        raise LestdError("--tasks names no task; give one or several, separated by commas")
    tasks: dict[str, tuple[str, BuiltTask]] = {}
    groups: dict[str, Any] = {}
    for name in dict.fromkeys(settings.tasks):
        loaded = load_tasks(name, settings.source)
        groups |= loaded["groups"]
        for task_name, task in loaded["tasks"].items():
            if task_name in tasks:
                raise LestdError(
                    f"task {task_name} is in {tasks[task_name][0]} and in {name} of --tasks; leave "
                    "one of them out"
                )
            tasks[task_name] = (name, BuiltTask(task, settings.source.limit))
    return Examination(settings, tasks, groups)


def run_tasks(
    model: EvaluationModel,
    facts: ModelFacts,
    examination: Examination,
    executor: Executor,
    run_dir: AnyPath,
    *,
    record: Callable[[Sequence[dict[str, Any]]], None],
    log_samples: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_event: Listener | None = None,
) -> list[TaskScores]:
    """Evaluate a model by all tasks; continue where an earlier call with the same settings stopped.

    Args:
        model: the model.
        facts: what identifies it.
        examination: the tasks.
        executor: who runs the workers.
        run_dir: where finished pieces are kept, in a directory per evaluation.
        record: called with the rows of `evaluations` when a task is whole.
        log_samples: write requests and responses of whole tasks as JSON lines.
        progress: called with ``(documents done, documents in all)``.
        on_event: told of every start and retry of a piece.

    Raises:
        LestdError: a piece failed; or the directory cannot be written.
    """
    settings = examination.settings
    if settings.device == "auto":
        settings = replace(settings, device="cuda" if executor.has_cuda() else "cpu")
    dtype = resolve_dtype(model.directory, settings.dtype, settings.device)
    settings = replace(settings, dtype=dtype)
    sittings = [
        _Sitting(facts, name, built, settings, run_dir)
        for name, built in examination.tasks.values()
    ]
    scores: dict[str, TaskScores] = {}

    def finish() -> None:
        """Merge the tasks that are whole by now."""
        for sitting in sittings:
            if sitting.store.complete and sitting.built.name not in scores:
                score, rows = sitting.merge()
                record(rows)
                if log_samples:
                    sitting.log_samples()
                scores[score.task] = score

    stores = [sitting.store for sitting in sittings]
    outcomes = run_pieces(stores, executor, _worker_spec(model, settings), progress, on_event)
    finish()
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise LestdError(
                f"{model.directory} could not be evaluated: {outcome.message}; finished work "
                f"is kept in {run_dir}"
            )
        finish()
    ordered = [scores[sitting.built.name] for sitting in sittings]
    for score, rows in _score_groups(facts, examination, dtype, sittings, ordered):
        record(rows)
        ordered.append(score)
    return ordered


def _worker_spec(model: EvaluationModel, settings: LmEvalSettings) -> WorkerSpec:
    # Logits and their log-softmax are held at once.
    logits = 8 * settings.batch_size * model.window_length * model.vocabulary
    asked = {k: v for k, v in vars(settings).items() if k != "tasks"}
    return worker_spec(LmEvalWorker, model, _LM_EVAL_BYTES + logits, **asked)


def pieces_of(name: str, built: BuiltTask, batch_size: int) -> Iterator[LmEvalRequest]:
    """The pieces of a task: the same for any pool."""
    step = _DOCUMENTS.get(built.kind, _DOCUMENTS_OF_CHOICE)
    step = max(step, batch_size)
    for first in range(0, len(built.requests), step):
        stop = min(first + step, len(built.requests))
        label = f"{built.name} {first}-{stop - 1}"
        yield LmEvalRequest(label, name, built.name, (first, stop), built.sha256)


class _Sitting:
    """One task, one model."""

    def __init__(
        self,
        facts: ModelFacts,
        name: str,
        built: BuiltTask,
        settings: LmEvalSettings,
        run_dir: AnyPath,
    ) -> None:
        self.built = built
        self._facts = facts
        self._deciding = _deciding(built, facts, settings)
        self.evaluation_id = evaluation_id(facts, self._deciding)
        self.store = EvaluationDirectory(
            run_dir / self.evaluation_id,
            {"model": facts.model, "model_id": facts.model_id, **self._deciding},
            list(pieces_of(name, built, settings.batch_size)),
            _parse,
        )

    def raw(self) -> RawMetrics:
        """The documents' values, in the order of the documents."""
        raw: RawMetrics = {}
        for result in self.store.ordered():
            for name, metrics in result.metrics.items():
                for metric, values in metrics.items():
                    raw.setdefault((metric, name), []).extend(values)
        return raw

    def merge(self) -> tuple[TaskScores, list[dict[str, Any]]]:
        """The task's figures, and their rows of `evaluations`."""
        raw = self.raw()
        found = aggregate({self.built.name: (self.built.task, raw)}, {})
        score = TaskScores(
            self.evaluation_id,
            self._facts.model,
            self.built.name,
            str(found["versions"][self.built.name]),
            self.built.fewshot,
            len(self.built.requests),
            figures_of(found, self.built.name),
            raw,
            sum(result.cut for result in self.store.ordered()),
        )
        workers = {result.worker for result in self.store.ordered()}
        seconds = sum(result.seconds for result in self.store.ordered()) / len(workers)
        pool = {"workers": len(workers), "seconds": seconds}
        return score, figure_rows(self._facts, score, self._deciding | pool)

    def log_samples(self) -> None:
        self.store.write_samples(sample_lines(self.built, self.store.ordered()))


def _parse(fields: dict[str, Any]) -> LmEvalResult:
    """A piece as it was committed.

    Raises:
        ValueError, TypeError or KeyError: it is another.
    """
    result = LmEvalResult(**fields | {"documents": tuple(fields["documents"])})
    if len(result.responses) != result.documents[1] - result.documents[0]:
        raise ValueError(result.task_id)
    return result


def _deciding(built: BuiltTask, facts: ModelFacts, settings: LmEvalSettings) -> dict[str, Any]:
    """Columns of `evaluations` that, with the model, decide the figures."""
    more = {
        "requests_sha256": built.sha256,
        "tokenizer_sha256": facts.tokenizer_sha256,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
    }
    return {
        "task": built.name,
        "task_version": str(built.task.VERSION),
        "fewshot": built.fewshot,
        "settings": json.dumps(more, sort_keys=True),
        "dtype": settings.dtype,
        "device": settings.device,
        "versions": json.dumps(evaluation_versions(lm_eval=lm_eval.__version__), sort_keys=True),
    }


def _score_groups(
    facts: ModelFacts,
    examination: Examination,
    dtype: str,
    sittings: Sequence[_Sitting],
    scores: Sequence[TaskScores],
) -> Iterator[tuple[TaskScores, list[dict[str, Any]]]]:
    """The figures that lm-eval makes of groups of tasks."""
    if not examination.groups:
        return
    tasks = {one.built.name: (one.built.task, one.raw()) for one in sittings}
    found = aggregate(tasks, examination.groups)
    for name, group in examination.groups.items():
        if not (figures := figures_of(found, name) if name in found["results"] else ()):
            continue
        members = {task.task_name for task in group.get_all_tasks()}
        parts = [score for score in scores if score.task in members]
        settings = {"evaluations": [one.evaluation_id for one in parts]}
        deciding = {"task": name, "settings": json.dumps(settings)}
        score = TaskScores(
            evaluation_id(facts, deciding),
            facts.model,
            name,
            str(found["versions"].get(name, "")),
            None,
            sum(one.documents for one in parts),
            figures,
            {},
            0,
        )
        columns = {
            "dtype": dtype,
            "task_version": score.version,
            "versions": json.dumps(evaluation_versions(lm_eval=lm_eval.__version__)),
        }
        yield score, figure_rows(facts, score, deciding | columns)


def examine(asked: Evaluation, common: dict[str, Any]) -> Examination:
    """The tasks that are asked for; `common` are settings that options do not decide alone.

    Raises:
        LestdError: see `open_examination`.
    """
    names = tuple(filter(None, (name.strip() for name in (asked.tasks or "").split(","))))
    local, included = (
        None if path is None else str(path.absolute()) for path in (asked.data, asked.include_path)
    )
    source = TaskSource(local, included, asked.fewshot, asked.limit)
    return open_examination(LmEvalSettings(names, source, asked.batch_size, **common))
