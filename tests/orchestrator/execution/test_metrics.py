"""Metrics, as Prometheus sees them: scraped from a real Ray, and shown by the dashboard."""

import importlib
import json
import re
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.cli import PATIENCE, lestd, start_lestd
from support.paths import ROOT

from orchestrator.execution.ray.metrics import METRICS
from orchestrator.manifest.schemas import STAGES

DASHBOARD = ROOT / "cluster_configs" / "grafana" / "lestd.json"
# Ray's own metrics that the dashboard shows; those of GPUs come from nodes that have one.
RAYS_OWN = {"ray_actors", "ray_node_cpu_utilization", "ray_node_mem_total", "ray_node_mem_used"}
RAYS_OWN_OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}
SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")

Samples = dict[str, list[tuple[dict[str, str], float]]]


def scrape(port: int) -> Samples:
    """Samples by name, each with its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    samples: Samples = defaultdict(list)
    for match in filter(None, map(SAMPLE.match, text.splitlines())):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        samples[match[1]].append((labels, float(match[3])))
    return samples


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head of our own, whose agent reports every second."""
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 2,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
        "_system_config": {"metrics_report_interval_ms": 1000},
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_what_prometheus_scrapes_is_what_the_manifest_says(
    cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scraped"
    driver = start_lestd(
        *("compress", tiny_llama, "--keep", 0.5, "--allocation", "global", "--out", out),
        *("--address", cluster.address, "--workers", 1),
    )

    def total(samples: Samples, name: str, **labels: str) -> float:
        wanted = labels | {"run": "scraped"}
        return sum(
            value for found, value in samples[f"ray_{name}"] if wanted.items() <= found.items()
        )

    # Counters stay, and what was counted last must get out when the driver ends; gauges lapse.
    gauges = defaultdict(set)
    deadline = time.monotonic() + PATIENCE
    while True:
        samples = scrape(cluster.head_node.metrics_export_port)
        for name, (kind, _) in METRICS.items():
            if kind == "Gauge":
                gauges[name] |= {value for labels, value in samples[f"ray_{name}"]}
        done = total(samples, "lestd_tasks_done_total")
        if (done == 8 and driver.poll() is not None) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    _, err = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, err
    groups = pq.read_table(out / "manifest" / "groups.parquet").to_pylist()

    assert done == 8
    for name in ("curves", "compress"):
        assert total(samples, "lestd_tasks_done_total", **{"pass": name}) == 4
        dense = sum(row["dense_bytes"] for row in groups)
        assert total(samples, "lestd_read_bytes_total", **{"pass": name}) == dense
    payloads = sum(row["payload_bytes"] for row in groups)
    assert total(samples, "lestd_written_bytes_total") == payloads
    for stage in STAGES:
        of = {"pass": "compress", "stage": stage}
        seconds = [row[f"seconds_{stage}"] for row in groups]
        assert total(samples, "lestd_stage_seconds_total", **of) == pytest.approx(sum(seconds))
        assert total(samples, "lestd_stage_duration_seconds_count", **of) == 4
        short = sum(value <= 0.03 for value in seconds)
        assert total(samples, "lestd_stage_duration_seconds_bucket", le="0.03", **of) == short
    assert total(samples, "lestd_tasks_failed_total") == 0
    assert gauges["lestd_tasks_planned"] == {4}
    assert 4 in gauges["lestd_tasks_finished"]
    assert {0} <= gauges["lestd_tasks_in_flight"] <= {0, 1, 2, 3}
    assert {0} <= gauges["lestd_tasks_waiting"] <= {0, 1, 2, 3, 4}
    assert samples.keys() >= RAYS_OWN


def test_the_dashboard_shows_what_there_is() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 8
    exported = set()
    for name, (kind, _) in METRICS.items():
        exported |= {f"ray_{name}{end}" for end in (("_bucket",) if kind == "Histogram" else ("",))}
    named = set(re.findall(r"ray_\w+", json.dumps(variables["run"])))
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names
            assert target["expr"].count("(") == target["expr"].count(")")
            named |= names
    # All that lestd exports, and of Ray's own what the other test finds.
    assert named == exported | RAYS_OWN | RAYS_OWN_OF_GPUS
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {f"ray_{name}" for name in METRICS_GAUGES} >= RAYS_OWN_OF_GPUS


def test_a_serial_run_does_without_ray(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ray", "ray.util", "ray.util.metrics"):
        monkeypatch.setitem(sys.modules, name, None)  # Importing it is an error now.
    with pytest.raises(ImportError):
        importlib.import_module("ray.util.metrics")
    options = ("--keep", 0.5, "--executor", "serial")
    run = lestd("compress", tiny_llama, "--out", tmp_path / "out", *options)
    assert run.code == 0, run.err
