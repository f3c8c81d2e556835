"""The manifest: what is committed is trusted, what is damaged is named and costs nothing else."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import SliceStats
from orchestrator.execution.executor import Event
from orchestrator.manifest.checks import payload_problem
from orchestrator.manifest.manifest import Manifest
from orchestrator.manifest.schemas import TABLES
from workers.contracts import Failure, Result, Task


def result(payloads: Path, task_id: str, layer: int) -> Result:
    content = f"payload of {task_id}".encode()
    sha256 = hashlib.sha256(content).hexdigest()
    payload = f"{task_id}-{sha256}.safetensors"
    (payloads / payload).write_bytes(content)
    slices = tuple(
        SliceStats(projection, head, 10 * head, 0.5, 12.5, 0.1, 4.0, 3.5)
        for projection in "qkvo"
        for head in (0, 1)
    )
    return Result(
        task_id=task_id,
        layer=layer,
        block=f"model.layers.{layer}.self_attn",
        tensors=("a.weight", "b.weight"),
        method="lestd",
        pattern="unstructured",
        payload=payload,
        sha256=sha256,
        payload_bytes=len(content),
        source_sha256="ab" * 32,
        format={"path": "p", "modules": {"qkv": {"slices": 6}, "o": {"slices": 2}}},
        ranks={"R1": 8, "R2": 4},
        nnz=123,
        density=0.25,
        codec="bitmask+csr",
        dense_bytes=1000,
        byte_budget=400,
        stored_bytes=399,
        relative_error=0.1,
        squared_norm=2.0,
        squared_error=0.02,
        squared_energy_stage1=1.99,
        squared_energy_stage2=1.98,
        threshold=0.01,
        hooi_iterations=3,
        seconds={"read": 0.1, "stage1": 0.2},
        started_at=1_700_000_000.25,
        peak_memory_bytes=5,
        device="cpu",
        worker="host:1",
        node="host",
        versions={"lestd": "0"},
        slices=slices,
        singular_values_1=(3.0, 2.0, 0.0),
        singular_values_2=(3.5, 0.5),
        scope="attention",
        metric="activation",
        value_bits=4,
        factor_bits=8,
        metric_squared_norm=8.0,
        metric_squared_error=0.02,
        expected_loss=0.01,
        chosen=None,
        runner_up=None,
        runner_up_loss=None,
        memory_bytes=399,
        bits_per_weight=6.4,
        size="disk",
        coding="fixed",
        most_expected_squared_error=0.03,
    )


@pytest.fixture
def payloads(tmp_path: Path) -> Path:
    directory = tmp_path / "payloads"
    directory.mkdir()
    return directory


def test_rows_hold_what_the_result_said(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    for layer in (2, 0, 1):
        manifest.commit(result(payloads, f"task{layer}", layer))
    groups = manifest.groups().to_pylist()
    assert [row["layer"] for row in groups] == [0, 1, 2]
    row = groups[0]
    assert (row["R1"], row["R2"], row["R3"], row["nnz"]) == (8, 4, None, 123)
    assert row["seconds_stage1"] == 0.2
    assert row["seconds_error"] == 0.0
    assert row["started_at"].timestamp() == 1_700_000_000.25
    assert (row["singular_values_1"], row["singular_values_2"]) == ([3.0, 2.0, 0.0], [3.5, 0.5])
    slices = manifest.slices().to_pylist()
    assert len(slices) == 24
    assert [(s["projection"], s["head"]) for s in slices[:3]] == [("q", 0), ("q", 1), ("k", 0)]


def test_only_a_row_with_its_payload_intact_is_completed(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    names = ["whole", "shorter", "altered", "gone", "foreign"]
    for layer, name in enumerate(names):
        manifest.commit(result(payloads, name, layer))
    rows = {row["task_id"]: row for row in manifest.groups().to_pylist()}
    path = {name: payloads / rows[name]["payload"] for name in names}
    path["shorter"].write_bytes(path["shorter"].read_bytes()[:-1])
    path["altered"].write_bytes(path["altered"].read_bytes()[:-1] + b"x")
    path["gone"].unlink()
    done = manifest.completed(["whole", "shorter", "altered", "gone", "never"], payloads)
    assert set(done) == {"whole"}
    for name, word in (("shorter", "bytes"), ("altered", "sha256"), ("gone", "missing")):
        problem = payload_problem(rows[name], payloads)
        assert problem is not None
        assert word in problem
        assert str(path[name]) in problem


def test_a_group_without_its_slice_rows_is_not_completed(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    for layer in range(3):
        manifest.commit(result(payloads, f"task{layer}", layer))
    slices = tmp_path / "manifest" / "slices"
    (slices / "task0.parquet").unlink()
    part = pq.read_table(slices / "task1.parquet", partitioning=None)
    pq.write_table(part.slice(0, 7), slices / "task1.parquet")
    assert set(manifest.completed(["task0", "task1", "task2"], payloads)) == {"task2"}


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_file_is_named_and_spoils_no_other(
    tmp_path: Path, payloads: Path, damage: str
) -> None:
    manifest = Manifest(tmp_path / "manifest")
    for layer in range(3):
        manifest.commit(result(payloads, f"task{layer}", layer))
    path = tmp_path / "manifest" / "groups" / "task1.parquet"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-20], "foreign": b"hello", "empty": b""}[damage])
    assert [row["task_id"] for row in manifest.groups().to_pylist()] == ["task0", "task2"]
    assert [one.path for one in manifest.damaged()] == [path]


TASK = Task("t", 3, "model.layers.3.self_attn", "", {}, None, "lestd", {}, 9, "bfloat16", 9)  # type: ignore[arg-type]


def test_events_are_kept_in_order(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    manifest.record_event(Event("started", "t", 1, worker="fe80::1:7"), TASK)
    manifest.record_event(Event("retried", "t", 1, "the worker died", worker="host:8"), TASK)
    manifest.record_failure(Failure("t", "infrastructure", "Died", "gave up", "trace", 2), TASK)
    events = manifest.events().to_pylist()
    assert [(e["layer"], e["block"]) for e in events] == [(3, "model.layers.3.self_attn")] * 3
    found = [(e["worker"], e["node"]) for e in events]
    assert found == [("fe80::1:7", "fe80::1"), ("host:8", "host"), (None, None)]
    assert [e["kind"] for e in events] == ["started", "retried", "failed"]
    assert events[2]["message"] == "gave up"
    assert events[2]["attempt"] == 2
    assert events[0]["time"] <= events[1]["time"] <= events[2]["time"]


def test_files_of_a_newer_schema_are_read(tmp_path: Path, payloads: Path) -> None:
    """A column that was added since is dropped, one that is not there yet is null."""
    manifest = Manifest(tmp_path / "manifest")
    manifest.commit(result(payloads, "task0", 0))
    path = tmp_path / "manifest" / "groups" / "task0.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.drop_columns(["attempt"]).append_column("new", [[1]]), path)
    row = manifest.groups().to_pylist()[0]
    assert row["attempt"] is None
    assert "new" not in row


def test_export_holds_the_rows_asked_for(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    for layer in (1, 0, 2):
        manifest.commit(result(payloads, f"task{layer}", layer))
    manifest.record_run({"invocation": "first", "state": "running"})
    manifest.record_run({"invocation": "second", "state": "running"})
    manifest.record_event(Event("started", "t", 1), TASK)
    model = tmp_path / "model" / "manifest"
    manifest.export(model, ["task0", "task1"], {"invocation": "second", "state": "complete"})
    exported = Manifest(tmp_path / "model")
    states = {row["invocation"]: row["state"] for row in exported.runs().to_pylist()}
    assert states == {"first": "running", "second": "complete"}
    assert exported.events() == manifest.events()
    assert set(manifest.runs()["state"].to_pylist()) == {"running"}
    assert exported.groups().equals(manifest.groups().slice(0, 2))
    assert [s["layer"] for s in exported.slices().to_pylist()] == [0] * 8 + [1] * 8
    assert sorted(path.name for path in model.iterdir()) == [
        "events.parquet",
        "groups.parquet",
        "runs.parquet",
        "slices.parquet",
    ]


@pytest.mark.parametrize("name", ["groups", "slices", "runs", "events"])
def test_tables_are_given_to_pandas_and_polars(tmp_path: Path, payloads: Path, name: str) -> None:
    manifest = Manifest(tmp_path / "manifest")
    manifest.commit(result(payloads, "task0", 0))
    manifest.record_run({"invocation": "first", "started_at": 1_700_000_000_000_000})
    manifest.record_event(Event("started", "t", 1), TASK)
    expected = manifest.table(name).to_pylist()
    frame = getattr(Manifest(tmp_path), name)("pandas")
    assert type(frame).__module__.startswith("pandas")
    assert [*frame.columns] == TABLES[name].schema.names
    assert len(frame) == len(expected)
    assert [*frame.iloc[:, 0]] == [row[frame.columns[0]] for row in expected]
    assert getattr(Manifest(tmp_path), name)("polars").to_dicts() == expected


def test_a_path_without_a_manifest_is_refused_with_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", str(tmp_path / "absent")):
        with pytest.raises(LestdError, match=f"^{path} (has no|does not exist).* neither .* run"):
            Manifest(path)
    (tmp_path / "out.run" / "manifest" / "groups").mkdir(parents=True)
    in_the_making = Manifest(tmp_path / "out")
    assert in_the_making.directory == tmp_path / "out.run" / "manifest"
    assert len(in_the_making.groups()) == 0


def test_results_that_share_files_are_rows_like_others(tmp_path: Path, payloads: Path) -> None:
    results = [result(payloads, f"task{layer:02d}", layer) for layer in range(12)]
    apart, together = Manifest(tmp_path / "a" / "manifest"), Manifest(tmp_path / "b" / "manifest")
    for one in results:
        apart.commit(one)
    together.commit(*results)
    assert len([*together.directory.glob("*/*.parquet")]) == 2
    assert together.groups().equals(apart.groups())
    assert together.slices().equals(apart.slices())
    # One that is done again beside them replaces its own rows only, also once all are compacted.
    together.commit(replace(results[3], attempt=2))
    expected = [2 if layer == 3 else 1 for layer in range(12)]
    for _ in range(2):
        assert together.groups()["attempt"].to_pylist() == expected
        assert together.slices().equals(apart.slices())
        assert len(together.completed([one.task_id for one in results], payloads)) == 12
        together.compact(lambda: None)


def test_events_wait_for_what_follows_at_once(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    manifest.record_event(Event("started", "t", 1, more=True), TASK)
    assert not manifest.events()
    manifest.commit(result(payloads, "task0", 0))
    assert len(manifest.events()) == 1
    for more in (True, True, False):
        manifest.record_event(Event("started", "t", 1, more=more), TASK)
    assert len(manifest.events()) == 4
    assert len([*(manifest.directory / "events").iterdir()]) == 2


def test_a_run_that_goes_on_finds_no_part_of_many_tasks(tmp_path: Path, payloads: Path) -> None:
    manifest = Manifest(tmp_path / "manifest")
    manifest.commit(result(payloads, "task0", 0))
    manifest.compact_found(lambda: None)
    assert [*manifest.directory.glob("*/*.parquet")]
    manifest.commit(*(result(payloads, f"task{layer}", layer) for layer in range(1, 9)))
    manifest.compact_found(lambda: None)
    assert not [*manifest.directory.glob("*/*.parquet")]
    assert len(manifest.groups()) == 9
