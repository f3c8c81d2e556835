"""How long a plan's tasks will take here: small groups of the same kind, timed.

A group of width d takes about ``a d^3 + b d^2`` seconds where heads grow with the width: matrix
products and eigenproblems, and passes over the elements. Two small groups of synthetic weights,
decomposed as a worker would do it, tell a and b for each kind of group.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.base import CALIBRATED, LOSS
from lestd_kernels.tensorize import GroupLayout, ModuleLayout
from orchestrator.planning.calibration_costs import gradient_shape
from orchestrator.planning.plan import Plan, PlannedTask
from workers.contracts import Task

_WIDTHS = (512, 1024)
_SPECTRUM_DECAY = 0.2


def predict_seconds(plan: Plan, device: str, threads: int) -> dict[str, float]:
    """Time that a worker like this process will spend inside the decomposition of each task.

    Reading and writing are left out: they happen beside it. Where global allocation has yet to
    decide, both passes over a group count, the second as if its budget were the uniform one.

    Args:
        plan: what is to be done.
        device: class of the workers' device; auto for a GPU where there is one.
        threads: CPU threads of a worker.

    Returns:
        Path of the group -> seconds: task ids change with the budgets that global allocation finds.

    Raises:
        LestdError: the device is not here, or a budget is too small for the small groups.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise LestdError(
            "--time measures on this machine, which has no GPU, but the workers use one; "
            "call it where PyTorch sees the GPU, or use --device cpu"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        known: dict[tuple[object, ...], float] = {}
        predicted = {}
        with torch.inference_mode():
            for planned in plan.tasks:
                task = planned.task
                passes = (False,) if plan.decided or planned.curve is None else (True, False)
                how = (task.method, str(task.method_args), task.value_dtype, passes)
                kind = (task.layout, how, round(planned.keep, 3))
                if kind not in known:
                    known[kind] = sum(_seconds(planned, torch.device(device), p) for p in passes)
                predicted[task.block] = known[kind]
    finally:
        torch.set_num_threads(before)
    return predicted


def _seconds(planned: PlannedTask, device: torch.device, curve: bool) -> float:
    """Seconds of one pass over a group: the one for its curve, or the one that encodes it."""
    d = planned.task.layout.width
    if d <= _WIDTHS[-1]:
        return _measure(planned, d, device, curve)
    small, large = _WIDTHS
    first, second = (_measure(planned, width, device, curve) for width in _WIDTHS)
    # first = a small^3 + b small^2 and second likewise; noise must not make either negative.
    cubic = (second / large**2 - first / small**2) / (large - small)
    cubic = min(max(cubic, 0.0), second / large**3)
    square = second / large**2 - cubic * large
    return cubic * d**3 + square * d**2


def _measure(planned: PlannedTask, width: int, device: torch.device, curve: bool) -> float:
    """Seconds for a group of this width; the second call counts, when all is warm."""
    task, layout = planned.task, _scaled(planned.task.layout, width)
    dtype = getattr(torch, task.value_dtype)
    generator = torch.Generator().manual_seed(0)
    columns = len(layout.slices) * layout.head_dim
    W = torch.randn(width, columns, generator=generator)
    W *= torch.arange(1, width + 1)[:, None] ** -_SPECTRUM_DECAY
    dense_bytes = layout.elements * dtype.itemsize
    share = dense_bytes / task.dense_bytes
    budgets = planned.curve.curve_budgets if curve and planned.curve else ()
    metrics = _made_metrics(task, layout, generator)
    metrics = {name: metric.to(device) for name, metric in metrics.items()}
    took = 0.0
    for _ in range(2):
        unfolding = W.to(device, copy=True)
        start = time.perf_counter()
        METHODS[task.method].decompose(
            unfolding,
            layout,
            int(planned.keep * dense_bytes),
            dtype,
            MethodArgs(**task.method_args),
            [int(budget * share) for budget in budgets],
            metrics,
        )
        took = time.perf_counter() - start
    return took


def _made_metrics(
    task: Task, layout: GroupLayout, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Metrics as a calibration would find them, of the same forms, for the layout of a small group.

    Of inputs and gradients that are correlated and whose channels differ in size.
    """
    metric = task.method_args["metric"]
    if metric not in CALIBRATED:
        return {}

    def channels(width: int) -> torch.Tensor:
        X = torch.randn(width, width, generator=generator)
        return X * torch.arange(1, width + 1) ** -_SPECTRUM_DECAY

    shapes = {module.name: gradient_shape(task.layout, module) for module in task.layout.modules}
    made: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    for module in layout.modules:
        outputs, inputs = layout.weight_shape(module)
        if module.reads not in read:
            read[module.reads] = channels(inputs)
            grams[module.reads] = read[module.reads].T @ read[module.reads] / inputs
        X, G = read[module.reads], channels(outputs)
        made[module.name] = grams[module.reads]
        made |= {
            f"{module.name}.mean_abs": X.abs().mean(0),
            f"{module.name}.max_abs": X.abs().amax(0),
        }
        made[f"{module.name}.out_max_abs"] = G.abs().amax(0)
        if metric != LOSS:
            continue
        form = len(shapes[module.name])
        if form == 1:
            made[f"{module.name}.output"] = G.square().mean(0)
            continue
        parts = torch.split(G, layout.head_dim, 1) if form == 3 else (G,)
        blocks = torch.stack([part.T @ part / outputs for part in parts])
        made[f"{module.name}.output"] = blocks if form == 3 else blocks[0]
    return made


def _scaled(layout: GroupLayout, width: int) -> GroupLayout:
    """The layout at another width, with as many heads or experts of each projection for it."""
    heads: dict[str, int] = {}
    for projection, head in layout.slices:
        heads[projection] = max(heads.get(projection, 0), head + 1)
    kept = {p: max(1, round(count * width / layout.width)) for p, count in heads.items()}

    def fewer(module: ModuleLayout) -> ModuleLayout:
        return replace(module, slices=tuple((p, i) for p, i in module.slices if i < kept[p]))

    modules = (fewer(module) for module in layout.modules)
    return GroupLayout(width, layout.head_dim, tuple(m for m in modules if m.slices))
