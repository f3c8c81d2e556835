"""The tables of the manifest: their columns, with types, units and meaning.

docs/manifest.md has the same as tables, and every Parquet file carries it in the metadata of its
fields. A new column goes to the end of its table and may be null in the rows of files that were
written before it; a column is never renamed and never changes its type or unit. What readers
cannot do without is `required`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from workers.contracts import OUTSIDE
from workers.storage.untrusted_files import parse_json

Row = dict[str, Any]
"""A row of a table as plain values, by the columns' names."""
MANIFEST_FORMAT = 1
"""For people, in the metadata of each file; nothing depends on it."""
STAGES = ("read", "stage1", "rank_search", "stage2", "error", "write")
"""Stages whose seconds have a column of their own in `groups`."""
COMPUTING_STAGES = STAGES[1:-1]
"""Those inside the decomposition."""

_TEXT, _INT, _LONG, _REAL = pa.string(), pa.int32(), pa.int64(), pa.float64()
_TIME = pa.timestamp("us", tz="UTC")
_TEXTS, _REALS = pa.list_(pa.string()), pa.list_(pa.float32())


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def format_slices(text: str) -> int | None:
    """Number of slices of a group, by its `format`; None if that is not one."""
    try:
        counts = [module["slices"] for module in parse_json(text)["modules"].values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return sum(counts) if all(type(count) is int and count >= 0 for count in counts) else None


def _is_format(text: str) -> bool:
    return format_slices(text) is not None


# Names become parts of file names.
_is_file_name = re.compile(r"(?!\.{1,2}$)[^/\0]+").fullmatch
_is_module_path = re.compile(r"[\w.]*").fullmatch


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its name.
        type: its Arrow type.
        meaning: what it says.
        unit: ``"bytes"``, ``"seconds"``, ``"nats"``, ...; empty for names, counts and ratios.
        required: a file where it is absent or null is not of lestd.
        check: whether a text can be of lestd; None: any can. Whole numbers are at least `least`.
        least: the least whole number that can be.
    """

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    required: bool = False
    check: Callable[[str], object] | None = None
    least: int = 0


@dataclass(frozen=True)
class TableSpec:
    """A table of the manifest.

    Attributes:
        name: of its folder and its file.
        meaning: what a row is.
        columns: in order.
        key: columns that say which rows replace which: rows of a part file replace those rows of
            the compacted file that have the same key.
        order: columns that the rows are sorted by when they are read.
    """

    name: str
    meaning: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    order: tuple[str, ...]

    @cached_property
    def schema(self) -> pa.Schema:
        """The table's Arrow schema, with meaning and unit of each field in its metadata."""
        return pa.schema(
            [
                pa.field(
                    column.name,
                    column.type,
                    metadata={"meaning": column.meaning}
                    | ({"unit": column.unit} if column.unit else {}),
                )
                for column in self.columns
            ],
            metadata={"lestd_manifest_format": str(MANIFEST_FORMAT), "lestd_table": self.name},
        )


_LAYER = f"index of the decoder layer; {OUTSIDE} of what stands outside of them"
_TASK = (
    Column("task_id", _TEXT, "hash of all that decides the result", "", True, _is_file_name),
    Column("layer", _INT, _LAYER, required=True, least=OUTSIDE),
    Column(
        "block", _TEXT, "module path of the block in the loaded model", "", True, _is_module_path
    ),
)
_SOURCE = (
    Column("tensors", _TEXTS, "names of the source tensors"),
    Column("method", _TEXT, "name of the method", required=True),
    Column("pattern", _TEXT, "where core elements may be kept: unstructured or 2:4"),
)
_SECONDS = (
    Column("seconds_read", _REAL, "reading and unfolding the weights", "seconds", True),
    Column("seconds_stage1", _REAL, "Stage I: HOSVD and HOOI", "seconds", True),
    Column("seconds_rank_search", _REAL, "choosing the ranks", "seconds", True),
    Column("seconds_stage2", _REAL, "Stage II: pruning, refit, encoding", "seconds", True),
    Column("seconds_error", _REAL, "the error of the tensors as stored", "seconds", True),
    Column("seconds_write", _REAL, "writing the payload", "seconds", True),
)
_WORK = (
    Column("started_at", _TIME, "when the last attempt began to read", "UTC"),
    Column("peak_memory_bytes", _LONG, "peak memory of the worker during the task", "bytes", True),
    Column("device", _TEXT, "the GPU, or the machine and its vector instructions"),
    Column("worker", _TEXT, "host:pid of the worker"),
    Column("node", _TEXT, "host name of the worker"),
    Column("attempt", _INT, "the attempt that succeeded; 1 is the first"),
)

GROUPS = TableSpec(
    "groups",
    "one row per finished group: the commit",
    (
        *_TASK,
        *_SOURCE,
        Column("R1", _INT, "rank of mode 1, the model's width; null where there is none"),
        Column("R2", _INT, "rank of mode 2, the head dimension"),
        Column("R3", _INT, "rank of mode 3, the projections; null where none is learned"),
        Column("nnz", _LONG, "stored non-zeros of the cores"),
        Column("density", _REAL, "nnz / elements of the cores", required=True),
        Column("codec", _TEXT, "codecs of the cores, joined by +"),
        Column("dense_bytes", _LONG, "the source weights", "bytes", required=True, least=1),
        Column("byte_budget", _LONG, "upper bound of the bytes of size", "bytes", required=True),
        Column("stored_bytes", _LONG, "factors, core values and indices", "bytes", required=True),
        Column("relative_error", _REAL, "||W - W_hat|| / ||W||, of the tensors as stored"),
        Column("squared_norm", _REAL, "||W||^2", "weights^2", required=True),
        Column("squared_error", _REAL, "||W - W_hat||^2", "weights^2"),
        Column("squared_energy_stage1", _REAL, "||G||^2 of the full core", "weights^2"),
        Column("squared_energy_stage2", _REAL, "||G||^2 of the stored core", "weights^2"),
        Column("threshold", _REAL, "smallest stored |g|", "weights"),
        Column("hooi_iterations", _INT, "HOOI sweeps after the HOSVD"),
        *_SECONDS,
        *_WORK,
        Column("payload", _TEXT, "file name of the payload", "", True, _is_file_name),
        Column("payload_bytes", _LONG, "size of that file", "bytes", required=True),
        Column("sha256", _TEXT, "of the payload file", required=True),
        Column("source_sha256", _TEXT, "of the bytes of the source tensors, in order"),
        Column("format", _TEXT, "JSON: how to load the payload", "", True, _is_format),
        Column("versions", _TEXT, "JSON: versions of lestd and torch", check=_is_object),
        Column(
            "singular_values_1",
            _REALS,
            "singular values of the mode-1 unfolding, descending",
            "weights",
        ),
        Column(
            "singular_values_2",
            _REALS,
            "singular values of the mode-2 unfolding, descending",
            "weights",
        ),
        Column(
            "scope",
            _TEXT,
            "what the block is: attention, ffn, experts or linear",
            check=_is_module_path,
        ),
        Column("metric", _TEXT, "norm of the error: weight, norm, activation or loss"),
        Column(
            "value_bits",
            _INT,
            "bits of a core value, the fewest of a block's; 16 stands for the value dtype; null "
            "where coding is entropy",
        ),
        Column("factor_bits", _INT, "bits of an element of a factor; likewise"),
        Column("metric_squared_norm", _REAL, "||S W||^2, S the metric's root", "metric^2"),
        Column("metric_squared_error", _REAL, "||S (W - W_hat)||^2", "metric^2"),
        Column(
            "most_expected_squared_error",
            _REAL,
            "a metric_squared_error above this is more than ranks and bits explain; null: unknown",
            "metric^2",
        ),
        Column(
            "expected_loss",
            _REAL,
            "expected loss of the block's error: half its square in the metric loss; null in "
            "others",
            "nats/token",
        ),
        Column("chosen", _TEXT, "method auto: the method and its bits of a value"),
        Column("runner_up", _TEXT, "method auto: the next best at these bytes, of those tried"),
        Column("runner_up_loss", _REAL, "expected loss of the runner-up", "nats/token"),
        Column("memory_bytes", _LONG, "what stored_bytes become once they are loaded", "bytes"),
        Column("bits_per_weight", _REAL, "8 stored_bytes / weights", "bits"),
        Column("coding", _TEXT, "of values: fixed (as many bits for each) or entropy"),
        Column(
            "size",
            _TEXT,
            "what byte_budget counts: disk (stored_bytes, also where it is null) or memory "
            "(memory_bytes)",
        ),
    ),
    key=("task_id",),
    order=("layer", "block"),
)

SLICES = TableSpec(
    "slices",
    "one row per slice: one head, or one expert, of one projection of a finished group",
    (
        *_TASK,
        Column("projection", _TEXT, "q, k, v, o, gate, up, down or linear", required=True),
        Column(
            "head", _INT, "index of the head (a key or value head where heads share them) or expert"
        ),
        Column("nnz", _LONG, "stored non-zeros of the slice"),
        Column("density", _REAL, "nnz / elements of the core slice"),
        Column("core_bytes", _REAL, "share of its core's bytes, by nnz", "bytes"),
        Column("relative_error", _REAL, "||W_s - W_hat_s|| / ||W_s||"),
        Column("squared_norm", _REAL, "||W_s||^2", "weights^2"),
        Column("squared_energy", _REAL, "||M_s||^2 of the stored core slice", "weights^2"),
    ),
    key=("task_id",),
    order=("layer", "block"),
)

CURVES = TableSpec(
    "curves",
    "global allocation: one row per group and byte budget of its curve",
    (
        *_TASK,
        *_SOURCE,
        Column("byte_budget", _LONG, "the point's budget", "bytes", required=True),
        Column("R1", _INT, "rank of mode 1 that the search chose"),
        Column("R2", _INT, "rank of mode 2 that the search chose"),
        Column("R3", _INT, "rank of mode 3 that the search chose"),
        Column("predicted_squared_error", _REAL, "||S (W - W_hat)||^2 to expect", "metric^2", True),
        Column("squared_norm", _REAL, "||W||^2 in the run's metric", "metric^2", required=True),
        Column("dense_bytes", _LONG, "the source weights", "bytes", required=True, least=1),
        Column("uniform_byte_budget", _LONG, "its budget under uniform allocation", "bytes", True),
        Column(
            "uniform_squared_error", _REAL, "||S (W - W_hat)||^2 there, measured", "metric^2", True
        ),
        *_SECONDS,
        *_WORK,
        Column("source_sha256", _TEXT, "of the bytes of the source tensors, in order"),
        Column("versions", _TEXT, "JSON: versions of lestd and torch", check=_is_object),
    ),
    key=("task_id",),
    order=("layer", "block", "byte_budget"),
)

EVENTS = TableSpec(
    "events",
    "one row per start, retry and failure of a task",
    (
        Column("time", _TIME, "when the driver learned of it", "UTC"),
        Column("task_id", _TEXT, "the task", required=True),
        Column("kind", _TEXT, "started, retried or failed", required=True),
        Column("attempt", _INT, "the attempt that started or ended; 1 is the first"),
        Column("error_type", _TEXT, "why it ended: NodeLost, WorkerDied, TimedOut, ..."),
        Column("message", _TEXT, "the reason as a sentence"),
        Column("traceback", _TEXT, "how it ended, for people to read"),
        Column("layer", _INT, _LAYER, least=OUTSIDE),
        Column("block", _TEXT, "module path of the block"),
        Column("worker", _TEXT, "host:pid of the worker that had it, where known"),
        Column("node", _TEXT, "host name of that worker, where known"),
    ),
    key=("time", "task_id", "kind"),
    order=("time",),
)

RUNS = TableSpec(
    "runs",
    "one row per call of `lestd compress` that worked on this run",
    (
        Column("invocation", _TEXT, "start time and process: names the call", required=True),
        Column("run_id", _TEXT, "hash of the fingerprint: the same for all calls of a run"),
        Column("state", _TEXT, "running, complete, failed, interrupted or killed"),
        Column("started_at", _TIME, "when the call began", "UTC"),
        Column("ended_at", _TIME, "when it ended; null while running, and when killed", "UTC"),
        Column("driver", _TEXT, "host:pid of the driver"),
        Column("model", _TEXT, "the source, as it was named"),
        Column("revision", _TEXT, "its commit on the Hub"),
        Column("family", _TEXT, "the source's architecture"),
        Column("method", _TEXT, "name of the method"),
        Column("pattern", _TEXT, "where core elements may be kept"),
        Column("scope", _TEXT, "which weights are compressed"),
        Column("allocation", _TEXT, "uniform or global"),
        Column("keep", _REAL, "byte budget / dense bytes of the weights in scope"),
        Column("config", _TEXT, "JSON: the whole configuration", check=_is_object),
        Column("device", _TEXT, "device class: cpu or cuda"),
        Column("executor", _TEXT, "serial or ray"),
        Column("tasks", _INT, "groups to be encoded"),
        Column("finished_before", _INT, "of these, finished by earlier calls"),
        Column("finished", _INT, "of these, finished when the call ended"),
        Column("failed", _INT, "tasks that failed for good"),
        Column("retried", _INT, "attempts that the same call retried"),
        Column("dense_bytes", _LONG, "the weights in scope, dense", "bytes"),
        Column("byte_budget", _LONG, "byte budget of the weights in scope", "bytes"),
        Column("stored_bytes", _LONG, "the weights in scope, as stored", "bytes"),
        Column("model_bytes", _LONG, "all weights, dense", "bytes"),
        Column("untouched_bytes", _LONG, "weights out of scope", "bytes"),
        Column("planned_worker_memory_bytes", _LONG, "a worker's memory, at most", "bytes"),
        Column("planned_disk_bytes", _LONG, "disk of the run directory, at most", "bytes"),
        Column("planned_seconds", _REAL, "decomposition, if --time was given", "seconds"),
        Column("seconds", _REAL, "wall time of the call", "seconds"),
        Column("seconds_assemble", _REAL, "of these, assembling the model", "seconds"),
        Column("versions", _TEXT, "JSON: versions of the software", check=_is_object),
    ),
    key=("invocation",),
    order=("started_at", "invocation"),
)

EVALUATIONS = TableSpec(
    "evaluations",
    "one row per metric of an evaluation, of the compressed model or of one it was compared with",
    (
        Column("evaluation_id", _TEXT, "hash of the model and all settings", required=True),
        Column("time", _TIME, "when it was finished", "UTC"),
        Column("model", _TEXT, "the model, as it was named"),
        Column("model_id", _TEXT, "hash of its config and weights"),
        Column("compressed", pa.bool_(), "whether lestd compressed it"),
        Column("model_bytes", _LONG, "its safetensors files, headers included", "bytes"),
        Column("dense_bytes", _LONG, "its weights in scope, dense; null if not lestd's", "bytes"),
        Column("stored_bytes", _LONG, "its weights in scope, as stored; null likewise", "bytes"),
        Column("task", _TEXT, "name of the task", required=True),
        Column("task_version", _TEXT, "the task's own version"),
        Column("metric", _TEXT, "name of the metric", required=True),
        Column(
            "answer_filter",
            _TEXT,
            "lm-eval's filter of the answers, none where there is none; of a divergence the block "
            "that alone is compressed, or model",
        ),
        Column("value", _REAL, "the figure", required=True),
        Column("stderr", _REAL, "its standard error; null where there is none"),
        Column("higher_is_better", pa.bool_(), "which way is better"),
        Column("samples", _LONG, "documents or windows evaluated"),
        Column("tokens", _LONG, "predicted tokens, where perplexity is measured"),
        Column("fewshot", _INT, "examples shown before each question"),
        Column("settings", _TEXT, "JSON: all other settings", check=_is_object),
        Column("dtype", _TEXT, "compute dtype"),
        Column("device", _TEXT, "cpu or cuda"),
        Column("workers", _INT, "size of the pool"),
        Column("seconds", _REAL, "wall time of the task on this pool", "seconds"),
        Column("versions", _TEXT, "JSON: versions of the software", check=_is_object),
    ),
    key=("evaluation_id", "task", "metric", "answer_filter"),
    order=("time", "task", "metric", "answer_filter"),
)

DIVERGENCE_TASK = "divergence"
"""Task of the rows that hold a compressed model against the dense one, block by block."""

TABLES = {table.name: table for table in (RUNS, GROUPS, SLICES, CURVES, EVENTS, EVALUATIONS)}
"""All tables, by name."""
