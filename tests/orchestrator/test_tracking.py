"""`--track`: settings, blocks, evaluations and failures, as trackers themselves tell of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.cli import PATIENCE, lestd, run_lestd

KEEP = ("--keep", 0.5, "--executor", "serial", "--include", "0-1")

READ = {
    "mlflow": """
import json, mlflow
client, found = mlflow.MlflowClient(), []
[experiment] = client.search_experiments(filter_string="name = 'lestd'")
for run in client.search_runs([experiment.experiment_id]):
    names = run.data.metrics
    history = {n: [m.value for m in client.get_metric_history(run.info.run_id, n)] for n in names}
    found.append({"name": run.info.run_name, "failed": run.info.status == "FAILED",
                  "method": run.data.params.get("method"), "figures": history,
                  "problem": run.data.tags.get("problem")})
print(json.dumps(found))
""",
    "trackio": """
import json
from trackio.sqlite_storage import SQLiteStorage as storage
found = []
for name in storage.get_runs("lestd"):
    name = name if isinstance(name, str) else name["name"]
    rows, history = storage.get_logs("lestd", name), {}
    for row in rows:
        for key, value in row.items():
            history.setdefault(key, []).append(value)
    found.append({"name": name, "failed": history.get("failed") == [1],
                  "method": (storage.get_run_config("lestd", name) or {}).get("method"),
                  "figures": history, "problem": history.get("problem", [None])[0]})
print(json.dumps(found))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("service", READ)
def test_what_a_tracker_knows_afterwards(
    service: str, tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    pytest.importorskip(service)
    places = {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # Else it wants a database.
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    environment = os.environ | places
    track = ("--track", service)
    run = run_lestd(
        "compress", tiny_llama, "--out", tmp_path / "small", *KEEP, *track, env=environment
    )
    assert run.code == 0, run.err
    text = ("--text", wikitext, "--window", 64, "--max-windows", 1, "--executor", "serial")
    run = run_lestd("evaluate", tmp_path / "small", *text, *track, "--json", env=environment)
    assert run.code == 0, run.err
    perplexity = json.loads(run.out)["models"][0]["token_perplexity"]

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in tiny_llama.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"].fill_(float("nan"))
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    run = run_lestd("compress", damaged, "--out", tmp_path / "bad", *KEEP, *track, env=environment)
    assert run.code == 1, run.err

    read = subprocess.run(
        [sys.executable, "-c", READ[service]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert read.returncode == 0, read.stderr
    runs = {one["name"]: one for one in json.loads(read.stdout.splitlines()[-1])}
    assert runs.keys() == {"small", "small evaluated", "bad"}
    assert [one["failed"] for _, one in sorted(runs.items())] == [True, False, False]
    assert runs["small"]["method"] == "lestd"
    small = runs["small"]["figures"]
    assert sorted(small["attention/layer"]) == [0, 1]
    assert all(0 < error < 1 for error in small["attention/relative_error"])
    [found] = runs["small evaluated"]["figures"]["small/token_perplexity"]
    assert found == pytest.approx(perplexity)
    assert len(runs["bad"]["figures"]["attention/layer"]) == 1
    assert "1 tasks failed" in runs["bad"]["problem"]


def test_a_tracker_that_is_not_there_is_named_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = lestd("compress", tiny_llama, "--out", tmp_path / "out", *KEEP, "--track", "wandb")
    assert run.code == 2
    assert 'pip install "lestd[wandb]"' in " ".join(run.err.split())
    assert not (tmp_path / "out.run").exists()


def test_a_tracker_that_fails_costs_no_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server went away")

    broken = types.ModuleType("trackio")
    vars(broken).update(init=lambda **_: None, log=fail, finish=fail)
    monkeypatch.setitem(sys.modules, "trackio", broken)
    run = lestd("compress", tiny_llama, "--out", tmp_path / "out", *KEEP, "--track", "trackio")
    assert run.code == 0, run.err
    said = " ".join(run.err.split())
    assert said.count("--track trackio failed, and is left out: the server went away") == 1
