"""The work of an actor on an audit: read one block, say what it is like, keep no weight.

Shapes: see lestd_kernels.audit.diagnostics. A worker holds one block at a time, and of the bases of
other layers one file: those of a reference layer are ``layer`` (d, d / 4), the leading left
singular vectors of its whole unfolding, and ``unit_0`` ... (d, R), those of a few of its units.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lestd_kernels.audit.diagnostics import (
    MOST_UNITS,
    Explained,
    Unit,
    effective_rank,
    entries,
    evenly,
    explained_energy,
    left_subspace,
    rank_at,
    rank_choices,
    sampled_experts,
    unit_gram,
    units,
)
from lestd_kernels.audit.prediction import predict
from lestd_kernels.audit.rotation import Rotated, rotate
from lestd_kernels.errors import LestdError
from lestd_kernels.linalg.stage1 import FLOAT64_ORDER, squared_sum
from lestd_kernels.methods.common.base import BUFFERS_BYTES
from lestd_kernels.tensorize import GroupLayout, unfold_weights
from workers.checkpoint.checks import check_finite
from workers.checkpoint.tensors import read_header, read_tensor, write_safetensors
from workers.contracts import Failure, TensorRef
from workers.host.devices import (
    peak_memory_bytes,
    require_exact_products,
    reset_peak_memory,
    return_freed_memory,
)
from workers.host.failures import failure_of
from workers.storage.files import as_path, atomic_write, is_file, not_shared

REFERENCE_UNITS = 4
"""Units of a reference layer whose bases are kept."""

_SPECTRUM_POINTS = 64
# Beyond, the eigenproblem of the hidden width takes longer than all else.
_MOST_COLUMNS = 4096
_CHUNK_ELEMENTS = 1 << 24
_DIGITS = 6


@dataclass(frozen=True)
class AuditTask:
    """One block of one layer, to be looked at.

    Attributes:
        task_id: names the piece in failure reports: the block's path, and for its second reading
            what that is for.
        place: number of the task among those of the audit.
        layer: index of the decoder layer.
        block: path of the block in the loaded model.
        scope: what kind of block it is: ``"attention"``, ``"ffn"`` or ``"experts"``.
        tensors: module name -> its weight.
        layout: how the weights divide into slices.
        value_dtype: torch name of the checkpoint's dtype.
        keeps: stored bytes / dense bytes to predict errors at.
        whole: whether the block itself is asked about; else only what `references` explain of it.
        references: reference layers with the path or URL of their bases.
        bases: path or URL where this block's own bases go; empty for none.
    """

    task_id: str
    place: int
    layer: int
    block: str
    scope: str
    tensors: dict[str, TensorRef]
    layout: GroupLayout
    value_dtype: str
    keeps: tuple[float, ...]
    whole: bool
    references: tuple[tuple[int, str], ...] = ()
    bases: str = ""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the block's weights in the checkpoint."""
        return sum(ref.stored_bytes for ref in self.tensors.values())

    @property
    def span(self) -> tuple[int, int]:
        """Name of the piece on disk."""
        return self.place, self.place + 1


@dataclass(frozen=True)
class AuditResult:
    """Findings; plain values that JSON can hold.

    Attributes:
        task_id: the task's.
        place: the task's.
        layer: the task's.
        block: the task's.
        scope: the task's.
        findings: see `AuditWorker`; None where the task did not ask.
        across: one row for each basis of each reference layer: ``reference``, ``kind`` (``"layer"``
            or ``"unit"``), ``rank``, ``energy`` explained of this block, ``baseline``.
        seconds: time it took.
        peak_memory_bytes: of the worker's process meanwhile, or of the GPU.
        worker: who did it, ``host:pid``.
    """

    task_id: str
    place: int
    layer: int
    block: str
    scope: str
    findings: dict[str, Any] | None
    across: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int
    worker: str

    @property
    def span(self) -> tuple[int, int]:
        """Name of the piece on disk."""
        return self.place, self.place + 1


def memory_bytes(task: AuditTask) -> int:
    """Upper bound of what a task needs beside the worker itself.

    The block in at most 32 bits; its float32 unfolding and rotation, or copies of its parts;
    positions, magnitudes, and a residual; an eigenproblem of the width.
    """
    layout = sampled_experts(task.layout)
    square = max(task.layout.width, min(task.layout.head_dim, _MOST_COLUMNS)) ** 2
    return 22 * layout.elements + 48 * square + BUFFERS_BYTES


def reference_bytes(layout: GroupLayout) -> int:
    """Bytes of the bases that are kept of one reference layer."""
    d = layout.width
    return 4 * d * (max(1, d // 4) + REFERENCE_UNITS * int(rank_choices(d, layout.head_dim)[-1]))


class AuditWorker:
    """Looks at blocks on one device, one at a time.

    ``AuditResult.findings`` has the keys ``unit`` (what kind), ``units`` (how many), ``compared``
    (names of those that are compared), ``width``, ``head_dim``, ``dense_bytes``, ``squared_norm``,
    ``explained``, ``spectra``, ``entries``, ``predictions``, ``operator_optimum`` (by keep) and
    ``optimum`` (the most that so many directions explain of the block: ``layer`` by rank, and of
    its units on average at one).

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads to compute with; they change the last bit.
    """

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        return_freed_memory()
        require_exact_products()
        self._device = torch.device(device)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, task: AuditTask) -> AuditResult | Failure:
        """Look at a block; never raises for a problem with its input."""
        try:
            with torch.inference_mode():
                return self._look(task)
        except Exception as error:
            return failure_of(task.task_id, task.block, error)

    def _look(self, task: AuditTask) -> AuditResult:
        start = time.perf_counter()
        reset_peak_memory(self._device)
        layout = sampled_experts(task.layout)
        wanted = {module.source for module in layout.modules}
        weights, told = {}, []
        for source, ref in task.tensors.items():
            if not task.whole and source not in wanted:
                continue
            weight = read_tensor(ref)
            check_finite(weight, ref)
            weight = weight.to(self._device)
            if task.whole:
                # Of a tensor that stacks several matrices, which one.
                name = ref.name + "".join(source.partition("[")[1:])
                told.append({"tensor": name} | asdict(entries(weight, name)))
            if source in wanted:
                weights[source] = weight
        unfolding = unfold_weights(weights, layout)
        weights.clear()
        across = [
            row
            for layer, path in task.references
            for row in _across(unfolding, layout, layer, path)
        ]
        findings = None
        if task.whole:
            findings = _block(unfolding, layout, task) | {"entries": told}
        return AuditResult(
            task_id=task.task_id,
            place=task.place,
            layer=task.layer,
            block=task.block,
            scope=task.scope,
            findings=findings,
            across=across,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak_memory_bytes(self._device),
            worker=self._name,
        )


def _block(unfolding: Tensor, layout: GroupLayout, task: AuditTask) -> dict[str, Any]:
    share = len(layout.slices) / len(task.layout.slices)
    members = units(layout)
    squared_norm = squared_sum(unfolding)
    chosen = [members[i] for i in evenly(len(members), MOST_UNITS)]
    explained = [
        _told(one, "width", chosen)
        for one in explained_energy(
            [unit.of(unfolding) for unit in chosen], rank_choices(layout.width, layout.head_dim)
        )
    ]
    if not members[0].name.startswith("block"):
        # The columns of a head's or an expert's slices, which U2 stands for.
        p = layout.head_dim
        turned = [_turned(unit.of(unfolding), p) for unit in chosen]
        explained += [
            _told(one, "columns", chosen) for one in explained_energy(turned, (max(1, p // 2),))
        ]
        del turned
    alike = [unit for unit in members if _width(unit) == _width(members[0])]
    units_squares = torch.linalg.eigvalsh(unit_gram(unfolding, alike)).clamp(min=0).flip(0)
    columns_squares = _columns_squares(unfolding, layout)
    # Scales the unfolding in place, by a power of two that relative figures do not know.
    group = rotate(unfolding, layout, getattr(torch, task.value_dtype), share)
    _write_bases(task, group, chosen)
    width_squares = group.squares.clamp(min=0) * group.scale**2
    modes = {1: width_squares, 2: columns_squares, 3: units_squares}
    predictions, optimum = predict(group, task.keeps)
    return {
        "unit": members[0].name.partition(" ")[0],
        "units": len(units(task.layout)),
        "compared": [unit.name for unit in chosen],
        "width": layout.width,
        "head_dim": layout.head_dim,
        "dense_bytes": task.dense_bytes,
        "squared_norm": squared_norm,
        "explained": explained,
        "spectra": [_spectrum(mode, s) for mode, s in modes.items() if s is not None],
        "predictions": [_rounded(asdict(one)) for one in predictions],
        "operator_optimum": _rounded(optimum),
        "optimum": _optimum(width_squares, layout.width, explained),
    }


def _columns_squares(unfolding: Tensor, layout: GroupLayout) -> Tensor | None:
    """Squared singular values of the mode-2 unfolding ``(p, S d)``; None for a very large p."""
    p = layout.head_dim
    if p > _MOST_COLUMNS:
        return None
    gram = unfolding.new_zeros(p, p)
    for part in torch.split(unfolding, max(1, _CHUNK_ELEMENTS // unfolding.shape[1])):
        flat = part.reshape(-1, p)
        gram += flat.T @ flat
    values: Tensor = torch.linalg.eigvalsh(gram.double() if p <= FLOAT64_ORDER else gram)
    return values.double().clamp(min=0).flip(0)


def _turned(matrix: Tensor, p: int) -> Tensor:
    """The columns of slices ``(d, k p)`` as rows: ``(p, k d)``."""
    return matrix.view(len(matrix), -1, p).permute(2, 0, 1).reshape(p, -1)


def _width(unit: Unit) -> int:
    return sum(stop - start for start, stop in unit.columns)


def _told(one: Explained, side: str, chosen: Sequence[Unit]) -> dict[str, Any]:
    return {
        "side": side,
        "choice": one.choice,
        "ranks": list(one.ranks),
        "energy": _rounded(one.energy.tolist()),
        **_rounded(one.pairs()),
    }


def _spectrum(mode: int, squares: Tensor) -> dict[str, Any]:
    values = squares.sqrt().tolist()
    places = sorted({*evenly(len(values), _SPECTRUM_POINTS), *range(min(8, len(values)))})
    return {
        "mode": mode,
        "size": len(values),
        "effective_rank": _rounded(effective_rank(squares)),
        "rank_90": rank_at(squares, 0.9),
        "rank_99": rank_at(squares, 0.99),
        "points": [[place + 1, _rounded(values[place])] for place in places],
    }


def _layer_ranks(width: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, width // 8), max(1, width // 4)}))


def _optimum(spectrum: Tensor, width: int, explained: list[dict[str, Any]]) -> dict[str, Any]:
    total = spectrum.clamp(min=0).sum()
    layer = {
        str(rank): _rounded(float(spectrum[:rank].sum() / total)) if total else None
        for rank in _layer_ranks(width)
    }
    [own] = [one for one in explained if one["side"] == "width"][-1:]
    return {"layer": layer, "unit": own["optimum"]}


def _write_bases(task: AuditTask, group: Rotated, chosen: Sequence[Unit]) -> None:
    if not task.bases:
        return
    rank = int(rank_choices(task.layout.width, task.layout.head_dim)[-1])
    tensors = {"layer": group.U1[:, : _layer_ranks(task.layout.width)[-1]]}
    for number, place in enumerate(evenly(len(chosen), REFERENCE_UNITS)):
        tensors[f"unit_{number}"] = left_subspace(chosen[place].of(group.unfolding))[1][:, :rank]
    atomic_write(as_path(task.bases), lambda file: write_safetensors(file, tensors))


def _across(unfolding: Tensor, layout: GroupLayout, layer: int, path: str) -> list[dict[str, Any]]:
    """Energy of a block in the bases of a reference layer, and of its units on average."""
    if not is_file(as_path(path)):
        raise LestdError(not_shared([socket.gethostname()], [path]))
    header = read_header(as_path(path))
    members = units(layout)
    chosen = [members[i] for i in evenly(len(members), MOST_UNITS)]
    known: dict[str, list[tuple[int, float]]] = {"layer": [], "unit": []}
    for name, ref in sorted(header.items()):
        U = read_tensor(ref).to(unfolding.device)
        kind = name.partition("_")[0]
        wanted = _layer_ranks(layout.width) if kind == "layer" else (U.shape[1],)
        parts = [unfolding] if kind == "layer" else [unit.of(unfolding) for unit in chosen]
        for rank in wanted:
            shares = [
                squared_sum(U[:, :rank].T @ part) / norm
                for part in parts
                if (norm := squared_sum(part)) > 0
            ]
            if shares:
                known[kind].append((rank, sum(shares) / len(shares)))
    rows = []
    for kind, found in known.items():
        for rank in sorted({rank for rank, _ in found}):
            energies = [energy for other, energy in found if other == rank]
            rows.append(
                {
                    "reference": layer,
                    "kind": kind,
                    "rank": rank,
                    "energy": _rounded(sum(energies) / len(energies)),
                    "baseline": _rounded(rank / layout.width),
                }
            )
    return rows


def _rounded(value: Any) -> Any:
    """Numbers with six significant digits, however deep they lie: what JSON keeps."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
