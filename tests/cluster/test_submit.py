"""Runs as Ray jobs: submitted with Ray's own command, and by ``lestd --address``."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus
from support.cli import PATIENCE, Finished, digest_tree, lestd, run_lestd, start_lestd
from support.hub import serve_hub
from support.paths import ROOT

from orchestrator.config.cluster import ClusterConfig
from orchestrator.execution.ray.jobs import PACKAGES, exit_code, job_command, jobs_address
from orchestrator.run.directory import RunDirectory

TOKEN = "0123456789abcdef" * 2
SCRIPTS = sysconfig.get_path("scripts")
SERIAL = ("--executor", "serial")


@dataclass(frozen=True)
class Head:
    """The head of a cluster that asks for a token."""

    jobs: str
    client: str
    environment: dict[str, str]

    def ray(self, *words: object) -> Finished:
        """Ray's own command."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *map(str, words)]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def submit(self, *words: object) -> Finished:
        """``ray job submit`` from the root of the repository."""
        return self.ray("job", "submit", "--address", self.jobs, "--working-dir", ".", "--", *words)

    def lestd(self, *words: object, **variables: str) -> Finished:
        """``lestd ... --address`` of this head."""
        environment = self.environment | variables
        return run_lestd(*words, "--address", self.jobs, env=environment, cwd=ROOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Another version of the packages is installed on the nodes: one that cannot even be imported.
    installed = tmp_path_factory.mktemp("installed")
    for package in PACKAGES:
        (installed / package.__name__).mkdir()
        text = "raise ImportError('what the node has installed')\n"
        (installed / package.__name__ / "__init__.py").write_text(text)
    here = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "HF_HUB_OFFLINE")}
    here |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    there = here | {
        "PATH": os.pathsep.join([SCRIPTS, here["PATH"]]),
        "PYTHONPATH": str(installed),
        "HF_HOME": str(installed / "hub"),
    }
    gcs, jobs, client, agent = (free_port() for _ in range(4))
    ports = f"--port={gcs} --dashboard-port={jobs} --ray-client-server-port={client} "
    ports += f"--dashboard-agent-listen-port={agent} --min-worker-port=0 --max-worker-port=0"
    options = "--num-cpus=2 --object-store-memory=80000000 --dashboard-host=127.0.0.1 --block"
    # Sockets need a shorter path than tmp_path.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head"]
        command += [*ports.split(), *options.split(), f"--temp-dir={folder}"]
        with (installed / "log").open("wb") as log:
            process = subprocess.Popen(command, env=there, stdout=log, stderr=log)
        try:
            while not (accepts(jobs) and accepts(client)):
                assert process.poll() is None, (installed / "log").read_text()
                time.sleep(0.2)
            yield Head(f"http://127.0.0.1:{jobs}", f"ray://127.0.0.1:{client}", here)
        finally:
            process.terminate()  # It ends its own processes, and no others.
            process.wait()


@pytest.fixture(scope="module")
def serial_run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("serial") / "out"
    assert lestd("compress", tiny_llama, "--keep", 0.4, "--out", out, *SERIAL).code == 0
    return digest_tree(out)


@pytest.mark.ray
def test_the_same_command_runs_there(
    head: Head, tiny_llama: Path, serial_run: dict[str, str], tmp_path: Path
) -> None:
    """Paths of this directory, files that only this machine has, packages that the nodes lack."""
    (tmp_path / "my-run.yaml").write_text("keep: 0.4\nmodel: no/such-model\n")
    (tmp_path / "my-cluster.yaml").write_text(f"workers: 1\naddress: {head.jobs}\n")
    model = tmp_path / "model"
    model.symlink_to(tiny_llama)
    words = ("compress", "model", "--out", "out", "--config", "my-run.yaml")
    secret = head.environment | {"HF_TOKEN": "hf_secret", "RAY_ADDRESS": "http://127.0.0.1:1"}
    result = run_lestd(*words, "--cluster", "my-cluster.yaml", env=secret, cwd=tmp_path)
    assert result.code == 0, result.err + result.out
    assert digest_tree(tmp_path / "out") == serial_run | {
        "README.md": digest_tree(tmp_path / "out")["README.md"]  # It names the model's directory.
    }
    assert "given HF_TOKEN of this environment" in result.err
    assert "hf_secret" not in result.out + result.err
    lines = result.out.splitlines()
    assert sum(line.startswith("compress: ") and "relative error" in line for line in lines) == 4
    assert "\x1b" not in result.out
    assert "\r" not in result.out


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_command_submits_a_run(
    head: Head, tiny_llama: Path, serial_run: dict[str, str], tmp_path: Path
) -> None:
    words = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
    result = head.submit("lestd", *words, "--address", "auto")
    assert result.code == 0, result.err + result.out
    assert digest_tree(tmp_path / "out") == serial_run
    assert "[4/4]" in result.out
    again = head.submit("python", "-m", "orchestrator", *words)
    assert again.code == 0, again.err + again.out
    assert "4 of them already finished" in again.out


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_command_tells_of_a_failure(head: Head, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("compress", tiny_llama, "--keep", 4, "--out", tmp_path / "out")
    result = head.submit("python", "-m", "orchestrator", *words)
    assert result.code == 1
    assert "keep: Input should be less than 1, got 4.0" in result.out
    assert "failed with exit code 2" in result.out


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_driver_of_one_output_is_refused(
    head: Head, tiny_llama: Path, tmp_path: Path
) -> None:
    with RunDirectory(tmp_path / "out.run").locked():
        result = head.lestd("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
    assert result.code == 2
    assert f"another driver (process {os.getpid()}" in result.out
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_outlives_the_terminal_and_can_be_stopped(
    head: Head, many_layers: Path, tmp_path: Path
) -> None:
    words = ("compress", many_layers, "--keep", 0.4, "--out", tmp_path / "out", "--workers", 1)
    process = start_lestd(*words, "--address", head.jobs, env=head.environment)
    assert process.stdout is not None
    assert any("[3/64]" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    job = err.split()[1]
    assert f"to stop it: ray job stop --address {head.jobs} {job}" in err
    assert RunDirectory(tmp_path / "out.run").is_locked()  # It goes on.
    done = RunDirectory(tmp_path / "out.run").manifest.finished_tasks()

    assert head.ray("job", "stop", "--address", head.jobs, job).code == 0
    log = head.ray("job", "logs", "--address", head.jobs, job).out
    assert "tasks are done and kept" in log
    assert done <= RunDirectory(tmp_path / "out.run").manifest.finished_tasks() < 64
    resumed = head.lestd(*words)
    assert resumed.code == 0, resumed.err + resumed.out
    assert "tasks were already finished" in resumed.out


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_client_address_leads_to_the_jobs_api(
    head: Head, tiny_llama: Path, serial_run: dict[str, str], tmp_path: Path
) -> None:
    """The model comes from a Hub that only a variable of this environment names."""
    shutil.copytree(tiny_llama, tmp_path / "hub" / "org" / "tiny")
    words = ("compress", "org/tiny", "--keep", 0.4, "--out", tmp_path / "out")
    with serve_hub(tmp_path / "hub") as hub:
        here = head.environment | {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
        result = run_lestd(*words, "--address", head.client, env=here)
    assert result.code == 0, result.err + result.out
    assert f"on {head.jobs}" in result.err
    files = digest_tree(tmp_path / "out")
    weights = {name for name in serial_run if name.endswith(".safetensors")}
    assert weights
    assert {name: files[name] for name in weights} == {name: serial_run[name] for name in weights}


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_is_evaluated_there(
    head: Head, tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    words = ("evaluate", tiny_llama.relative_to(ROOT), "--text", wikitext.relative_to(ROOT))
    kept = ("--run-dir", tmp_path / "eval")
    result = head.lestd(*words, "--window", 64, "--max-windows", 4, *kept)
    assert result.code == 0, result.err + result.out
    options = ("--text", wikitext, "--window", 64, "--max-windows", 4, *kept, *SERIAL)
    here = lestd("evaluate", tiny_llama, *options)
    assert here.code == 0
    figures = here.out.splitlines()[-2].split("│")[-3:]
    assert any(line.split("│")[-3:] == figures for line in result.out.splitlines())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": TOKEN[::-1]}],
    ids=["no token", "wrong token"],
)
def test_a_cluster_that_refuses_says_what_it_wants(
    variables: dict[str, str], head: Head, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
    result = head.lestd(*words, **variables)
    assert result.code == 2
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in result.err
    assert TOKEN not in result.err


@pytest.mark.parametrize("scheme", ["http", "ray"])
def test_a_cluster_that_does_not_answer_is_said_so(
    scheme: str, tiny_llama: Path, tmp_path: Path
) -> None:
    address = f"{scheme}://127.0.0.1:{free_port()}"
    words = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
    result = lestd(*words, "--address", address)
    assert result.code == 2
    assert f"the Ray cluster at {address} accepts no jobs" in result.err
    assert "Connection refused" in result.err


def test_another_web_server_is_no_cluster(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # Set back afterwards.
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        words = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out")
        result = lestd(*words, "--address", address)
        server.shutdown()
    assert result.code == 2
    assert f"the Ray cluster at {address} accepts no jobs (Version check returned 404" in result.err


def test_results_that_a_log_would_mix_up_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    words = ("compress", tiny_llama, "--keep", 0.4, "--out", tmp_path / "out", "--json")
    result = lestd(*words, "--address", "http://127.0.0.1:1")
    assert result.code == 2
    assert "--json cannot be used with --address http://127.0.0.1:1" in result.err


def test_the_words_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "job").mkdir()
    Path("run.yml").write_text("keep: 0.5\nlayer_keep: {'0-1': 0.8}\n")
    cluster = ClusterConfig(workers=3, max_attempts=2, address="http://head:8265")
    options = {
        "out": Path("a b"),
        "model": "model",
        "keep": None,
        "config": Path("run.yml"),
        "cluster": Path("given.yaml"),
        "address": "http://head:8265",
        "max_windows": 7,
        "fresh": True,
        "json": False,
    }
    words = job_command("compress", options, cluster, tmp_path / "job")
    assert words == [
        *("python", "-m", "orchestrator", "compress", str(tmp_path / "model")),
        *("--out", str(tmp_path / "a b"), "--config", "run.yaml", "--cluster", "cluster.yaml"),
        *("--max-windows", "7", "--fresh"),
    ]
    assert (tmp_path / "job/run.yaml").read_text() == Path("run.yml").read_text()
    settings = yaml.safe_load((tmp_path / "job/cluster.yaml").read_text())
    assert ClusterConfig(**settings) == cluster.model_copy(update={"address": None})
    # What is not here may be there, or anywhere.
    for model in ("org/name", "s3://bucket/model"):
        words = job_command("evaluate", {"model": model}, cluster, tmp_path / "job")
        assert words == ["python", "-m", "orchestrator", "evaluate", model]


@pytest.mark.parametrize(
    ("address", "executor", "variable", "expected"),
    [
        ("http://head:8265", "ray", "", "http://head:8265"),
        ("https://head", "ray", "local", "https://head"),
        ("ray://head:10001", "ray", "", "ray://head:10001"),
        (None, "ray", "http://head:8265", "http://head:8265"),
        ("auto", "ray", "http://head:8265", None),
        ("head:6379", "ray", "", None),
        (None, "ray", "", None),
        ("http://head:8265", "serial", "", None),
    ],
)
def test_which_addresses_mean_a_job(
    address: str | None,
    executor: str,
    variable: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    config = ClusterConfig.model_validate({"address": address, "executor": executor})
    assert jobs_address(config) == expected


@pytest.mark.parametrize(
    ("status", "driver", "expected", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("SUCCEEDED", None, 0, ""),  # A cluster of a Ray that did not tell yet.
        ("FAILED", 1, 1, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 130, 130, ""),
        ("FAILED", 127, 1, "has no command python"),
        ("FAILED", 137, 1, "its driver ended with code 137, most often because it was killed"),
        ("FAILED", None, 1, "job j failed: The node is gone.; run the same command again"),
        ("STOPPED", None, 130, "job j was stopped; run the same command again to continue"),
    ],
)
def test_how_a_job_ended_is_the_exit_code(
    status: str, driver: int | None, expected: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    details = JobDetails(
        type="SUBMISSION",
        entrypoint="",
        status=JobStatus(status),
        message="The node is gone.\nIn detail: ...",
        driver_exit_code=driver,
    )
    assert exit_code(details, "j") == expected
    err = capsys.readouterr().err
    assert said in err if said else not err
