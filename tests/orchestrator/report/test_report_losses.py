"""What a report says of the expected loss: where the bytes went, and whether it came true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.manifests import at, evaluation, group, group_name, run_of

from orchestrator.manifest.schemas import STAGES
from orchestrator.report.data import gather
from orchestrator.report.markdown import render


def curve(layer: int, *points: tuple[int, float]) -> list[dict[str, Any]]:
    known = {"task_id": f"c{layer}", "layer": layer, "block": group_name(layer)}
    known |= {"dense_bytes": 100, "uniform_byte_budget": 20, "uniform_squared_error": 0.2}
    known |= {"method": "svd_llm", "started_at": at(0), "attempt": 1, "squared_norm": 9.0}
    known |= {f"seconds_{stage}": 1.0 for stage in STAGES} | {"peak_memory_bytes": 2**30}
    return [known | {"byte_budget": b, "predicted_squared_error": e} for b, e in points]


def measured(block: str, value: float, **more: Any) -> dict[str, Any]:
    row = {"evaluation_id": "new", "task": "divergence", "answer_filter": block, "stderr": 0.01}
    return evaluation(True, "kl", value, **row) | more


def test_hulls_and_divergences_are_the_manifests(tmp_path: Path) -> None:
    groups = [group(n, 32, 8, 2, expected_loss=0.1 * (n + 1), stored_bytes=20) for n in range(2)]
    # The point at 20 bytes is above the line between its neighbours.
    curves = [*curve(0, (10, 4.0), (20, 3.9), (30, 1.0)), *curve(1, (10, 2.0), (30, 1.0))]
    old = measured(group_name(0), 9.0, evaluation_id="old")
    rows = [old, measured("model", 0.5), measured(group_name(1), 0.25)]
    rows.append(measured("model", 0.9, metric="correlation"))
    rows += [evaluation(c, "token_perplexity", 3.0) for c in (True, False)]
    run = run_of(tmp_path / "run", 2, 2, groups=groups, curves=curves, evaluations=rows)
    data = gather(str(run))
    of_first = [row for row in data.hulls if row["layer"] == 0]
    assert [(row["point"], row["bytes"], row["expected_loss"]) for row in of_first] == [
        ("hull", 10, 2.0),
        ("hull", 30, 0.5),
        ("stored", 20, 0.1),
    ]
    assert [(r["block"], r["expected_loss"], r["measured"]) for r in data.divergences] == [
        (group_name(1), 0.2, 0.25),
        ("model", pytest.approx(0.3), 0.5),
    ]
    assert data.correlation is not None
    assert [row["metric"] for row in data.evaluations] == ["token_perplexity"]
    told = render(data)
    assert f"| {group_name(1)} | 0.20000 | 0.25000 ± 0.01000 |" in told
    assert "logarithms: 0.900" in told


def test_a_run_without_expected_loss_has_neither(tmp_path: Path) -> None:
    data = gather(str(run_of(tmp_path / "run", curves=curve(0, (10, 4.0), (30, 1.0)))))
    assert (data.hulls, data.divergences, data.correlation) == ([], [], None)
