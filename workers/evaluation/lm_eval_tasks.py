"""Tasks of lm-eval, found by name, with their requests built as lm-eval itself builds them.

A task that is asked for is loaded after the random generators are seeded as lm-eval seeds them, so
it is what `lm_eval.simple_evaluate` makes of that task alone, whatever else is evaluated. All its
requests are built at once and in order, because lm-eval draws the examples that are shown before
the questions one question after the other.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.models.huggingface
import numpy as np
import torch
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from lestd_kernels.errors import LestdError, first_line
from workers.evaluation.local_data import LOCAL_TASKS, TASK_FOLDERS

_SEED, _FEWSHOT_SEED = 0, 1234  # lm_eval.defaults, for all that it seeds
_ROLLING = "loglikelihood_rolling"


class _NoBar(tqdm):  # type: ignore[misc]
    """lm-eval's bars cannot all be turned off by an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


for _module in (lm_eval.api.task, lm_eval.models.huggingface):
    _module.tqdm = _NoBar
datasets.disable_progress_bars()


class _Cut(logging.Handler):
    """Counts what lm-eval warns of when it cuts an input that is too long."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "runcat" in record.getMessage()


@contextmanager
def hushed() -> Iterator[_Cut]:
    """Nothing of lm-eval's log on the terminal; inputs that it cuts are counted."""
    logger = logging.getLogger("lm_eval")
    handlers, propagate = logger.handlers, logger.propagate
    counter = _Cut()
    logger.handlers, logger.propagate = [counter], False
    try:
        yield counter
    finally:
        logger.handlers, logger.propagate = handlers, propagate


@dataclass(frozen=True)
class TaskSource:
    """Where tasks come from, and how they are asked.

    Attributes:
        data: directory of local data, see `workers.evaluation.local_data`; None for the Hub's.
        include_path: directory of more task files.
        fewshot: examples before a question; None for what each task says.
        limit: only so many first documents of each task.
    """

    data: str | None = None
    include_path: str | None = None
    fewshot: int | None = None
    limit: int | None = None


class BuiltTask:
    """A task with its requests.

    Attributes:
        task: lm-eval's task.
        requests: its requests, by document.
        sha256: of the requests, their documents and the task's configuration.
    """

    def __init__(self, task: Any, limit: int | None) -> None:
        self.task = task
        with hushed():
            task.build_all_requests(limit=limit)
        by_document = defaultdict(list)
        for request in task.instances:
            by_document[request.doc_id].append(request)
        self.requests = [by_document[number] for number in sorted(by_document)]
        self.sha256 = self._digest()

    def _digest(self) -> str:
        config = self.task.dump_config()
        for key in ("custom_dataset", "dataset_path", "dataset_kwargs", "metadata"):
            config.pop(key, None)  # Where documents lie decides nothing: they are here.
        digest = hashlib.sha256(_json(config))
        for requests in self.requests:
            for request in requests:
                digest.update(_json([request.request_type, request.args, request.idx]))
            digest.update(_json(requests[0].doc))
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.task.task_name)

    @property
    def fewshot(self) -> int:
        """Examples that are shown before each question."""
        return int(self.task.get_config("num_fewshot") or 0)

    @property
    def kind(self) -> str:
        """lm-eval's output type: ``"multiple_choice"``, ``"generate_until"``, ..."""
        return str(self.task.OUTPUT_TYPE)


def load_tasks(name: str, source: TaskSource) -> dict[str, Any]:
    """The tasks of a name: one, or those of a group or tag.

    Returns:
        ``tasks``, lm-eval's tasks by name, and ``groups``, its groups by name.

    Raises:
        LestdError: there is no such task, its data cannot be had, or it is of a kind that is not
            supported.
    """
    random.seed(_SEED)
    np.random.seed(_FEWSHOT_SEED)
    torch.manual_seed(_FEWSHOT_SEED)
    with hushed():
        manager = _manager(name, source.include_path)
        spec: Any = name
        if source.data is not None and name in LOCAL_TASKS:
            spec = _on_local_data(name, source)
        try:
            loaded = manager.load(spec)
        except LestdError:
            raise
        except Exception as error:
            # Task files fail wherever lm-eval first uses them, in many ways; so do downloads.
            raise LestdError(_why_not(name, source, error)) from error
    for task in loaded["tasks"].values():
        _refuse_unsupported(task)
        with hushed():
            _set_fewshot(task, source, spec is not name)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    groups = {} if spec is not name else dict(loaded.get("groups", {}))
    return {"tasks": dict(loaded["tasks"]), "groups": groups}


def _manager(name: str, include_path: str | None) -> TaskManager:
    folder = Path(lm_eval.tasks.__file__).parent
    paths: list[str | Path] = [folder / each for each in TASK_FOLDERS]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise LestdError(f"{include_path} is not a directory; check --include-path")
        paths.append(include_path)
    manager = TaskManager(include_path=paths, include_defaults=False)
    # Groups and tags may have members anywhere.
    if name in manager.all_subtasks:
        return manager
    manager = TaskManager(include_path=include_path)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise LestdError(
            f"lm-eval has no task {name}{meant or '; give a task file of it by --include-path'}"
        )
    return manager


def _on_local_data(name: str, source: TaskSource) -> dict[str, Any]:
    """lm-eval's own task with the documents of a local file."""
    assert source.data is not None
    local = LOCAL_TASKS[name]
    rows = local.rows(Path(source.data))
    splits = {split: datasets.Dataset.from_list(found) for split, found in rows.items()}
    # A split that is named must be there.
    splits.setdefault("train", datasets.Dataset.from_list([]))
    changes = {
        "task": name,
        "custom_dataset": lambda **_: datasets.DatasetDict(splits),
        "dataset_kwargs": None,
        "training_split": "train" if "train" in rows else None,
    }
    if local.split != "validation":
        changes["validation_split"] = None
    # The overrides of a group's members are how lm-eval changes a task that it knows.
    return {"group": "local", "task": [changes]}


def _why_not(name: str, source: TaskSource, error: Exception) -> str:
    advice = "check the connection and HF_HUB_OFFLINE, or give "
    if name in LOCAL_TASKS and source.data is None:
        advice += "local files by --data DIR"
    else:
        advice += "a task file with local data by --include-path DIR"
    return f"task {name} cannot be loaded ({type(error).__name__}: {first_line(error)}); {advice}"


def _refuse_unsupported(task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise LestdError(
            f"task {task.task_name} runs code that the model writes, which lestd does not; choose "
            "another task"
        )
    if getattr(task, "MULTIMODAL", False):
        raise LestdError(
            f"task {task.task_name} shows images or sounds, and lestd evaluates language models; "
            "choose another task"
        )


def _set_fewshot(task: Any, source: TaskSource, is_local: bool) -> None:
    """As `simple_evaluate` does: a task that says 0 itself keeps 0."""
    own = task.get_config("num_fewshot")
    count = own or 0
    if task.OUTPUT_TYPE == _ROLLING:
        count = 0  # There is no question that examples could stand before.
    elif source.fewshot is not None and own != 0:
        count = source.fewshot
    if count and is_local and not len(task.dataset["train"]):
        file = Path(source.data or "") / LOCAL_TASKS[task.task_name].file
        raise LestdError(
            f"{task.task_name} shows {count} examples before each question, and there is no "
            f"{file.with_name('train.jsonl')} to take them from; add it, or ask with --fewshot 0"
        )
    task.set_config(key="num_fewshot", value=count)


def _json(value: Any) -> bytes:
    def plain(other: Any) -> str:
        return str(getattr(other, "__qualname__", type(other).__qualname__))

    return json.dumps(value, sort_keys=True, default=plain).encode()
