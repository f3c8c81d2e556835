"""What a run does, in a tracker of experiments: mlflow, Weights & Biases, or trackio.

Each is an extra of its own, and finds its server by its own variables (``MLFLOW_TRACKING_URI``,
``WANDB_MODE``, ``TRACKIO_DIR``, ...). A run of ours is a run there, of the project ``lestd``. The
manifest remains the record: a tracker that fails is told of once, and then left alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, Protocol

from lestd_kernels.errors import LestdError, first_line
from orchestrator.console import logs
from workers.contracts import Result

PROJECT = "lestd"
SERVICES = ("mlflow", "wandb", "trackio")


class _Tracker(Protocol):
    """A run that is open in a tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures."""

    def end(self, problem: str | None) -> None:
        """Close the run; `problem` is why it failed."""


class _Mlflow:
    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow: Any = import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params(config)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def end(self, problem: str | None) -> None:
        if problem is not None:
            self._mlflow.set_tag("problem", problem)
        self._mlflow.end_run("FINISHED" if problem is None else "FAILED")


class _Wandb:
    """Weights & Biases, or trackio, which has the same functions but no status of a run."""

    def __init__(self, library: str, name: str, config: Mapping[str, Any]) -> None:
        self._library, self._name = import_module(library), library
        self._last = 0
        self._library.init(project=PROJECT, name=name, config=dict(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._last = max(self._last, step)
        self._library.log(dict(figures), step=step)

    def end(self, problem: str | None) -> None:
        if problem is not None:
            self._library.log({"failed": 1, "problem": problem}, step=self._last)
        failed = {"exit_code": 1} if problem is not None and self._name == "wandb" else {}
        self._library.finish(**failed)


def _open(service: str, name: str, config: Mapping[str, Any]) -> _Tracker:
    if service not in SERVICES:
        raise LestdError(f"track: expected one of {', '.join(SERVICES)}, got {service!r}")
    try:
        with redirect_stdout(sys.stderr):
            return _Mlflow(name, config) if service == "mlflow" else _Wandb(service, name, config)
    except ImportError as error:
        raise LestdError(
            f"--track {service} needs {service}, which is not installed; pip install "
            f'"lestd[{service}]"'
        ) from error
    except Exception as error:
        raise LestdError(
            f"--track {service}: no run could be opened there ({first_line(error)}); correct its "
            "settings, or leave --track out"
        ) from error


class Tracked:
    """A run that may be tracked.

    Attributes:
        problem: why it failed; None as long as it has not.
    """

    def __init__(self, service: str | None, name: str, config: Mapping[str, Any]) -> None:
        self.problem: str | None = None
        self._service = service
        self._steps = 0
        given = {key: value for key, value in config.items() if value is not None}
        self._tracker = None if service is None else _open(service, name, given)

    def on_progress(self, result: Result | object, done: int, planned: int) -> None:
        """Record a block that is finished, see `orchestrator.compression.pipeline.OnProgress`."""
        if isinstance(result, Result):
            figures = {
                "layer": result.layer,
                "dense_bytes": result.dense_bytes,
                "stored_bytes": result.stored_bytes,
                "relative_error": result.relative_error,
                "expected_loss": result.expected_loss,
                "seconds": sum(result.seconds.values()),
                "peak_memory_bytes": result.peak_memory_bytes,
            }
            self.log_of(result.scope, figures | {"done": done, "planned": planned})

    def log_of(self, what: str, figures: Mapping[str, Any]) -> None:
        """Record what are figures among some values: finite numbers; each call is a step.

        Args:
            what: whose they are; before their names, without what mlflow's names cannot have.
            figures: by name.
        """
        group = re.sub(r"[^\w. -]+", "/", what).strip("/")
        numbers = {
            f"{group}/{key}": float(value)
            for key, value in figures.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._steps += 1
        self._tell(lambda tracker: tracker.log(numbers, self._steps))

    def end(self) -> None:
        """Close the run."""
        self._tell(lambda tracker: tracker.end(self.problem))

    def _tell(self, what: Callable[[_Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # Results alone go to standard output.
                what(self._tracker)
        except Exception as error:  # Whatever it is, hours of work are worth more.
            self._tracker = None
            logs.log(
                "message", f"--track {self._service} failed, and is left out: {first_line(error)}"
            )


@contextmanager
def tracked(service: str | None, name: str, config: Mapping[str, Any]) -> Iterator[Tracked]:
    """Track a run while the context lasts; one that ends by an exception has failed.

    Args:
        service: ``"mlflow"``, ``"wandb"`` or ``"trackio"``; None for nowhere.
        name: of the run.
        config: its settings; plain values, None is left out.

    Raises:
        LestdError: the service is not installed, or opens no run.
    """
    run = Tracked(service, name, config)
    try:
        yield run
    except BaseException as error:
        run.problem = f"{type(error).__name__}: {first_line(error)}"
        raise
    finally:
        run.end()
