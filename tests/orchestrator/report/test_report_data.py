"""What a report gathers of a manifest: sums, states, times, figures before and after."""

import json
import math
from pathlib import Path

import pytest
from support.manifests import at, call, evaluation, event, group, group_name, run_of, slices

from orchestrator.report.data import gather
from orchestrator.report.state import ended_calls
from orchestrator.report.timeline import timeline


def test_the_summary_adds_up_what_the_rows_say(tmp_path: Path) -> None:
    data = gather(str(run_of(tmp_path / "run")))
    rows = [group(layer, 32, 8, 2) for layer in range(6)]
    summary = data.summary
    assert (summary["finished"], summary["tasks"], summary["state"]) == (6, 6, "complete")
    assert summary["stored_bytes"] == sum(row["stored_bytes"] for row in rows)
    assert summary["model_stored_bytes"] == 48 * 2**20 + summary["stored_bytes"]
    error = sum(row["relative_error"] ** 2 * row["squared_norm"] for row in rows)
    expected = math.sqrt(error / sum(row["squared_norm"] for row in rows))
    assert summary["relative_error"] == pytest.approx(expected)
    assert (summary["workers"], summary["nodes"]) == (2, ["node-0", "node-1"])
    planned = {row["what"]: (row["planned"], row["actual"]) for row in data.planned}
    assert planned["memory of a worker, at most"] == (4 * 2**30, 3 * 2**30)
    assert planned["decomposing, all workers"] == (900.0, sum(29 + n % 5 for n in range(6)))
    [q, k, *_] = data.projections
    heads = [row for layer in range(6) for row in slices(layer, 4, 2) if row["projection"] == "q"]
    assert (q["projection"], q["slices"], k["slices"]) == ("q", 24, 12)
    assert q["core_bytes"] == pytest.approx(sum(row["core_bytes"] for row in heads))
    error = sum(2 * row["relative_error"] ** 2 for row in heads)
    assert q["relative_error"] == pytest.approx(math.sqrt(error / 48))


def test_a_call_that_works_now_was_not_killed() -> None:
    calls = [call(0, "running", 6), call(1, "running", 6)]
    assert [one["state"] for one in ended_calls(calls, locked=True)] == ["killed", "running"]
    assert [one["state"] for one in ended_calls(calls, locked=False)] == ["killed", "killed"]


def test_all_planned_layers_are_known(tmp_path: Path) -> None:
    runs = [call(0, "failed", 6)]
    run = run_of(tmp_path / "run", 6, 2, runs=runs)
    assert [row["layer"] for row in gather(str(run)).missing] == [2, 3, 4, 5]
    planned = [{"layer": n, "block": group_name(n)} for n in (0, 1, 7, 9)]
    (run / "plan.json").write_text(json.dumps({"layers": planned}))
    assert gather(str(run)).missing == planned[2:]


def test_a_group_that_was_encoded_twice_counts_once(tmp_path: Path) -> None:
    again = group(2, 32, 8, 2, task_id="again", started_at=at(500), stored_bytes=7)
    groups = [*(group(layer, 32, 8, 2) for layer in range(6)), again]
    data = gather(str(run_of(tmp_path / "run", groups=groups)))
    assert [row["layer"] for row in data.layers] == list(range(6))
    assert data.layers[2]["stored_bytes"] == 7
    assert not [row for row in data.heads if row["layer"] == 2]  # Those are of the other encoding.
    assert len(data.timeline) == 7


def test_a_worker_computes_one_task_at_a_time(tmp_path: Path) -> None:
    """Three tasks that are read at once are computed one after the other."""
    groups = [group(n, 32, 8, 1, started_at=at(2.0 * n)) for n in range(3)]
    rows = timeline(groups, [])
    seconds = [
        {name: (row[name] - at(0)).total_seconds() for name in row if "_at" in name} for row in rows
    ]
    # 2 s of reading; 29, 30 and 31 s of computing; 3 s of writing.
    assert [one["read_at"] for one in seconds] == [0, 2, 4]
    assert [one["computed_at"] for one in seconds] == [2, 31, 61]
    assert [one["written_at"] for one in seconds] == [31, 61, 92]
    assert [one["ended_at"] for one in seconds] == [34, 64, 95]


def test_lost_attempts_have_their_start_their_end_and_their_reason(tmp_path: Path) -> None:
    events = [
        event(3, "started", 5, worker="node-1:7"),
        event(31, "retried", 5, error_type="WorkerDied", message="the worker died"),
        event(33, "started", 5, attempt=2),
        event(90, "failed", 9, error_type="NodeLost", message="gave up", attempt=3),
    ]
    data = gather(str(run_of(tmp_path / "run", events=events)))
    one, other = data.lost
    assert (one["started_at"], one["time"], one["worker"]) == (at(3), at(31), "node-1:7")
    assert (one["layer"], one["error_type"]) == (5, "WorkerDied")
    assert (other["started_at"], other["kind"], other["worker"]) == (None, "failed", None)
    assert (data.summary["retried"], data.summary["failed"]) == (1, 1)


def test_the_latest_evaluation_of_each_side_is_compared(tmp_path: Path) -> None:
    rows = [
        evaluation(False, "ppl", 50.0, time=at(1), evaluation_id="old"),
        evaluation(False, "ppl", 40.0, time=at(2)),
        evaluation(True, "ppl", 44.0, time=at(3)),
        evaluation(True, "ppl", 60.0, time=at(4), settings='{"window": 9}', evaluation_id="other"),
    ]
    found = gather(str(run_of(tmp_path / "run", evaluations=rows))).evaluations
    assert [(row["before"], row["after"]) for row in found] == [(40.0, 44.0), (None, 60.0)]
    assert found[0]["change"] == pytest.approx(0.1)
