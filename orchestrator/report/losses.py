"""The loss that a model is expected to have: where its bytes went, and what measuring it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.manifest.schemas import DIVERGENCE_TASK, Row
from orchestrator.planning.allocation import lower_hull

MODEL = "model"


def hulls(groups: Sequence[Row], curves: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Of each block with an expected loss the hull that bytes were divided by, and what it got.

    Args:
        groups: rows of `groups`, one per block.
        curves: rows of `curves`, by block; none where every block has the same keep.

    Returns:
        Keys ``layer``, ``block``, ``point`` (``"hull"`` or ``"stored"``), ``bytes`` and
        ``expected_loss``, nats per token.
    """
    found = []
    for group in groups:
        if group["expected_loss"] is None:
            continue
        of = {"layer": group["layer"], "block": group["block"]}
        points = sorted(
            (row["byte_budget"], row["predicted_squared_error"] / 2)
            for row in curves.get(group["block"], ())
            if row["byte_budget"] is not None and row["predicted_squared_error"] is not None
        )
        found += [
            of | {"point": "hull", "bytes": size, "expected_loss": float(loss)}
            for size, loss in (lower_hull(points) if points else ())
        ]
        stored = {"bytes": group["stored_bytes"], "expected_loss": group["expected_loss"]}
        found.append(of | {"point": "stored"} | stored)
    return found


def divergences(evaluations: Sequence[Row], groups: Sequence[Row]) -> tuple[list[Row], Row | None]:
    """Expected loss beside measured divergence, of the latest measurement.

    Args:
        evaluations: rows of `evaluations`, oldest first.
        groups: rows of `groups`, one per block.

    Returns:
        For each block that was measured alone, and last for the model: ``block``,
        ``expected_loss``, ``measured``, ``stderr``; and the row of the correlation, None where
        there is none.
    """
    rows = [row for row in evaluations if row["task"] == DIVERGENCE_TASK]
    rows = [row for row in rows if row["evaluation_id"] == rows[-1]["evaluation_id"]]
    expected = {row["block"]: row["expected_loss"] for row in groups}
    if None not in expected.values():
        expected[MODEL] = sum(expected.values())
    found = [
        {
            "block": row["answer_filter"],
            "expected_loss": expected.get(row["answer_filter"]),
            "measured": row["value"],
            "stderr": row["stderr"],
        }
        for row in rows
        if row["metric"] == "kl"
    ]
    places = {block: place for place, block in enumerate(expected)}
    found.sort(key=lambda row: places.get(row["block"], -1))
    return found, next((row for row in rows if row["metric"] == "correlation"), None)
