"""Runs a whole command as a job on a Ray cluster, and follows its log from here.

The driver runs on the cluster's head node, beside the workers: neither this terminal nor the
network between has to last as long as the run. A ``ray://`` address is used to find the jobs API
only; a driver behind it would end with its connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

import yaml

import lestd_kernels
import orchestrator
import workers
from lestd_kernels.errors import LestdError, first_line
from orchestrator.config.cluster import ClusterConfig
from orchestrator.console import logs
from orchestrator.source.location import store_url
from orchestrator.source.texts import read_calibration
from workers.storage.untrusted_files import read_regular

PACKAGES = (orchestrator, workers, lestd_kernels)
"""Packages that every node of the job runs, whatever is installed there."""

FORWARDED = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
)
"""Variables of this environment that a job is given. Those that name files mean nothing there."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_DEFAULT_PORTS = {"ray": 10001, "http": 80, "https": 443}
_CONNECT_SECONDS = 10
_RETRY_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_FAILURES = {1, 2, 130}


def jobs_address(cluster: ClusterConfig) -> str | None:
    """Where the whole command is to run as a job; None: it runs in this process."""
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    elsewhere = address.startswith(("http://", "https://", "ray://"))
    return address if elsewhere and cluster.executor == "ray" else None


def run_as_job(
    address: str, command: str, options: Mapping[str, Any], cluster: ClusterConfig
) -> int:
    """Submit a command, show its log until it ends, and tell its exit code.

    Args:
        address: ``http(s)://HOST:PORT`` of the dashboard, or ``ray://HOST:PORT``.
        command: name of the command.
        options: values of its parameters by name; `model` is the positional one.
        cluster: where to compute, from the cluster file and the options.

    Returns:
        The driver's exit code; 1 if the driver was lost; 130 if the job was stopped, or if
        Ctrl-C ends the following, which leaves the job running.

    Raises:
        LestdError: the cluster does not answer, refuses, or is lost.
    """
    if options.get("json"):
        raise LestdError(
            f"--json cannot be used with --address {address}, because the log of a job mixes "
            "results with progress; leave it out"
        )
    with _explained(address), tempfile.TemporaryDirectory() as folder:
        url = _find_jobs_api(address)
        client = _connect(url)
        entrypoint = job_command(command, options, cluster, Path(folder))
        forwarded = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
        runtime_env: dict[str, Any] = {
            "py_modules": [str(Path(str(package.__file__)).parent) for package in PACKAGES],
            "env_vars": forwarded,
        }
        if any(Path(folder).iterdir()):
            runtime_env["working_dir"] = folder
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env)
    given = f", given {', '.join(forwarded)} of this environment" if forwarded else ""
    _say(f"job {job} on {url}{given}")
    try:
        return exit_code(_follow(client, url, job), job)
    except KeyboardInterrupt:
        _say(
            f"job {job} runs on; to follow it: ray job logs --address {url} --follow {job}; "
            f"to stop it: ray job stop --address {url} {job}"
        )
        return 130


def job_command(
    command: str, options: Mapping[str, Any], cluster: ClusterConfig, folder: Path
) -> list[str]:
    """The words of the same command for the head node.

    A job starts in a directory of its own, so paths become absolute; `folder` receives the files
    that the command reads, and is to be that directory.
    """
    given = {name: value for name, value in options.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not False}
    given.pop("address", None)
    if "config" in given:
        (folder / "run.yaml").write_bytes(read_regular(Path(given["config"])))
        given["config"] = "run.yaml"
    if "architecture" in given:
        (folder / "architecture.json").write_bytes(read_regular(Path(given["architecture"])))
        given["architecture"] = "architecture.json"
    if "calibrate_on" in given:
        (folder / "calibration.txt").write_bytes(read_calibration(given["calibrate_on"]))
        given["calibrate_on"] = "calibration.txt"
    if "cluster" in given:
        # Without the address: there, it would submit the command once more.
        settings = cluster.model_dump(exclude={"address"}, exclude_none=True)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        given["cluster"] = "cluster.yaml"
    model = str(given.pop("model"))
    store_url(model, given.get("revision"))  # Refuses a password: the cluster shows the command.
    words = ["python", "-m", "orchestrator", command]
    words.append(os.path.abspath(model) if Path(model).exists() else model)  # noqa: PTH100
    for name, value in given.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(_word(value))
    return words


def _word(value: Any) -> str:
    if isinstance(value, Path) and "://" not in str(value):
        return os.path.abspath(value)  # noqa: PTH100
    return str(value)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what Ray raises about a cluster into one sentence that says what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise LestdError(
            f"the Ray cluster at {address} refuses this user ({first_line(error)}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the token that the cluster was started with"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise LestdError(
            f"the Ray cluster at {address} accepts no jobs ({first_line(error)}); check that it "
            "runs and that this is the address of its dashboard, most often http://HEAD:8265; from "
            "outside: ssh -L 8265:localhost:8265 HEAD, then --address http://localhost:8265"
        ) from error


def _find_jobs_api(address: str) -> str:
    """The address of the dashboard, by which jobs are submitted.

    A cluster that answers at ``ray://`` knows the port of its dashboard; its host is the one by
    which the cluster was reached, which a node's own address need not be.
    """
    parts = urlsplit(address)
    if parts.scheme == "ray" or not getproxies():
        _require_answer(parts)
    if parts.scheme != "ray":
        return address.rstrip("/")
    import ray

    try:
        # Ray warns of what it raises.
        with warnings.catch_warnings(action="ignore"), ray.init(address, **_QUIET) as context:
            dashboard = context.dashboard_url
    except ConnectionError as error:
        raise RuntimeError(
            "no Ray Client server that knows the token of this environment"
        ) from error
    if not dashboard:
        raise RuntimeError("it runs without a dashboard")
    found = parts._replace(
        scheme="http", netloc=_host(parts) + f":{urlsplit('//' + dashboard).port}"
    )
    _require_answer(found)
    return found.geturl()


def _host(parts: SplitResult) -> str:
    return parts.netloc.removesuffix(f":{parts.port}")


def _require_answer(parts: SplitResult) -> None:
    """Ray would try for minutes; whoever does not answer this will not answer Ray."""
    host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme]
    socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()


def _connect(url: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    # It reports on uploads and sockets, line by line.
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    # RAY_ADDRESS would win over the argument, this wins over both.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    return JobSubmissionClient(url)


def _follow(client: Any, url: str, job: str) -> Any:
    """Show the log of a job as it grows; return its details when it has ended.

    Raises:
        LestdError: the cluster has not answered for a minute.
    """
    shown = 0

    async def show() -> None:
        # A connection that was cut begins with the first line again.
        nonlocal shown
        position = 0
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text[max(shown - position, 0) :])
            sys.stdout.flush()
            position += len(text)
            shown = max(shown, position)

    while True:
        try:
            asyncio.run(show())
            cut = False
        except BrokenPipeError:  # Whoever read our output has seen enough.
            raise
        except Exception:
            cut = True
        details = _details(client, url, job)
        if details.status.is_terminal():
            if cut:
                with suppress(OSError, RuntimeError):
                    sys.stdout.write(client.get_job_logs(job)[shown:])
            return details
        time.sleep(_RETRY_SECONDS)


def _details(client: Any, url: str, job: str) -> Any:
    """How a job is, from a cluster that may need a while to answer."""
    asked = time.monotonic()
    while True:
        try:
            return client.get_job_info(job)
        except (OSError, RuntimeError, ValueError) as error:
            if time.monotonic() - asked > _PATIENCE_SECONDS:
                raise LestdError(
                    f"the Ray cluster at {url} has not answered for {_PATIENCE_SECONDS:.0f} s; job "
                    f"{job} may still run there; if the cluster is lost, run the same command with "
                    "the address of another: finished tasks are kept in the run directory"
                ) from error
        time.sleep(_RETRY_SECONDS)


def exit_code(details: Any, job: str) -> int:
    """The exit code of this command, from how the job ended."""
    from ray.job_submission import JobStatus

    code = details.driver_exit_code
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        _say(f"job {job} was stopped; run the same command again to continue")
        return 130
    if code in _FAILURES:
        return int(code)
    if code is None:
        why = first_line(RuntimeError(details.message or "no reason given"))
        _say(f"job {job} failed: {why}; run the same command again to continue")
    elif code == 127:
        _say(
            f"job {job} failed: the head node has no command python; start Ray there in the "
            "environment that has the dependencies of lestd"
        )
    else:
        _say(
            f"job {job} failed: its driver ended with code {code}, most often because it was "
            "killed; run the same command again to continue"
        )
    return 1


def _say(message: str) -> None:
    logs.log("message", message)
