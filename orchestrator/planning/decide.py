"""From the curves of pass one to every group's byte budget, under global allocation.

With a size to reach the budgets lower the expected errors of all groups together; with a loss to
reach they are the fewest bytes that are expected to stay within it. What was predicted is held
against what was stored, and another plan follows where it did not come true. All of it follows from
rows of the manifest, so that a run that was killed decides the same again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import LOSS
from orchestrator.planning.allocation import (
    Curve,
    better_than_uniform,
    cheapest_within,
    predicted_error,
)
from orchestrator.planning.plan import Plan, with_budget

Rows = Sequence[Mapping[str, Any]]

# Plans of one target that are encoded at most.
_TRIES = 4


def decide(plan: Plan, curves: Mapping[str, Rows], tried: Sequence[Rows] = ()) -> Plan | None:
    """The next plan to carry out; None where the last one that was tried is to stay.

    Without a target that is the plan with the budgets of `better_than_uniform`, followed by the one
    with those of uniform allocation where the prediction failed; that one alone, where no budgets
    are predicted to be better.

    Args:
        plan: an undecided plan.
        curves: for each of its curve tasks the rows of the manifest, by budget.
        tried: group rows of the plans that were carried out before, all tasks of each.

    Raises:
        LestdError: no bytes reach the target.
    """
    if plan.target_loss is not None:
        return _within(plan, plan.target_loss, curves, tried)
    tasks = plan.curve_tasks
    rows = [curves[task.task_id] for task in tasks]
    in_nats = tasks[0].method_args["metric"] == LOSS
    norms = None if in_nats else [curve[0]["squared_norm"] for curve in rows]
    uniform = [task.byte_budget for task in tasks]
    better = better_than_uniform(list(map(_points, rows)), norms, uniform)
    plans = [budgets for budgets in (better, uniform) if budgets is not None]
    if len(tried) == len(plans) or (tried and no_worse_than_uniform(tried[-1], curves)):
        return None
    return _with_budgets(plan, plans[len(tried)])


def _points(rows: Rows) -> Curve:
    return [(row["byte_budget"], row["predicted_squared_error"]) for row in rows]


def _with_budgets(plan: Plan, budgets: Sequence[int]) -> Plan:
    """The plan with the byte budget of each group that has a curve decided."""
    of_block = {task.block: b for task, b in zip(plan.curve_tasks, budgets, strict=True)}
    tasks = tuple(
        replace(with_budget(p.task, of_block[p.task.block]), curve=p.curve) if p.curve else p
        for p in plan.tasks
    )
    return replace(plan, tasks=tasks, decided=True)


def _within(
    plan: Plan, target: float, curves: Mapping[str, Rows], tried: Sequence[Rows]
) -> Plan | None:
    """The plan of fewest bytes within a target, or within less where one before missed it."""
    limit = aim = 2 * Fraction(target)
    for rows in tried:
        measured = Fraction(math.fsum(row["metric_squared_error"] for row in rows))
        if measured <= limit or len(tried) == _TRIES:
            return None
        # Twice the way back: what the curves promised too much stays where nothing is changed.
        aim *= (limit / measured) ** 2
    points = [_points(curves[task.task_id]) for task in plan.curve_tasks]
    budgets = cheapest_within(points, aim)
    if budgets is None:
        least = sum(Fraction(min(error for _, error in curve)) for curve in points) / 2
        raise LestdError(
            f"an expected loss of {target:g} nats per token is out of reach: with all bytes it is "
            f"{float(least):.2g}; ask for more, or for more bits"
        )
    return _with_budgets(plan, budgets)


def predicted_losses(plan: Plan, curves: Mapping[str, Rows]) -> dict[str, float]:
    """By block the loss to expect of a decided plan's budgets, nats per token.

    Args:
        plan: decided, in the metric loss.
        curves: see `decide`.
    """
    budgets = {planned.task.block: planned.task.byte_budget for planned in plan.tasks}
    return {
        rows[0]["block"]: float(predicted_error(_points(rows), budgets[rows[0]["block"]]) / 2)
        for rows in curves.values()
    }


def no_worse_than_uniform(rows: Rows, curves: Mapping[str, Rows]) -> bool:
    """Whether relative and absolute squared errors sum up to at most what uniform budgets give.

    Both sides are measured from tensors as they are stored. In the metric loss the absolute ones
    are nats, and decide alone.

    Args:
        rows: group rows of all tasks.
        curves: see `decide`.
    """
    measured = {curve[0]["block"]: curve[0] for curve in curves.values()}
    pairs = [
        (
            row["metric_squared_error"],
            measured[row["block"]]["uniform_squared_error"],
            row["metric_squared_norm"],
        )
        for row in rows
        if row["block"] in measured
    ]

    def holds(weights: Sequence[float]) -> bool:
        found, uniform = (
            math.fsum(pair[side] * weight for pair, weight in zip(pairs, weights, strict=True))
            for side in (0, 1)
        )
        return found <= uniform

    if not holds([1.0] * len(pairs)):
        return False
    in_nats = any(row["metric"] == LOSS for row in rows)
    return in_nats or holds([1 / norm if norm else 0.0 for *_, norm in pairs])
