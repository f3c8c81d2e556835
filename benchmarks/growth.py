"""The driver's part of a run alone, for more and more tasks: time and memory of each task.

    python benchmarks/growth.py --tasks 100 1000 10000     prints the tables of docs/scale.md

Makes a model of as many layers as there shall be tasks, of which only the headers and the first
layer are true (the shards are sparse files), and compresses it through lestd's own code with
workers that return at once: each writes a copy of the first layer's payload under the names of its
own layer, without fsync. What is left is the driver's: it reads headers, plans, hands out, commits,
compacts, checks and assembles by hard links. After it come `lestd status`, `query`, and the same
`compress` again, which checks every payload and finds nothing to do. `--ray N` hands out to N
actors of a local cluster instead of 64 threads of the driver's own process.

    tasks/s       committed per second, from the first that is handed out to the last that is
                  committed: wall time, so it is that of the machine with all else that it does
    the phases    CPU time in ms per task, the driver's own and that of the threads that are its
                  workers. plan: headers and plan, twice, as the command does. begin: fingerprint,
                  lock, run.json, plan.json. tasks: as above, and within its first and last tenth,
                  where what grows during a run shows. check: compaction, and the finished tasks by
                  manifest and payloads. Commands are processes, their start included
    memory        resident set in MiB after the plan, after the first tenth of the tasks, after the
                  last one, and the largest of the whole run; of commands the largest
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from orchestrator.compression.pipeline import compress_model
from orchestrator.compression.progress import CompressionProgress
from orchestrator.config.run import RunConfig
from orchestrator.execution.executor import Executor, Listener, WorkerSpec
from orchestrator.execution.ray.executor import RayExecutor
from orchestrator.execution.serial import SerialExecutor
from orchestrator.manifest.manifest import default_run_dir
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import CONFIG_FILE, resolve_source
from workers.checkpoint.headers import LENGTH_BYTES, TensorSpec, build_header, layout_key
from workers.checkpoint.tensors import INDEX_FILE
from workers.contracts import Result, Task
from workers.decompose import STATIONS, DecomposeWorker, payload_name
from workers.host.devices import peak_memory_bytes
from workers.storage.json_files import write_json

HIDDEN, HEADS, LAYERS_OF_A_SHARD = 64, 4, 1000
KEEP = 0.5
MIB = 2**20
# A command, and its largest resident set in KiB into a file: ru_maxrss begins at what the process
# that started this one had.
_COMMAND = """
import sys
from orchestrator.__main__ import main
peak = sys.argv.pop(1)
try:
    main()
finally:
    lines = open("/proc/self/status").readlines()
    open(peak, "w").write(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def shapes_of_layer(layer: int) -> Iterator[TensorSpec]:
    """The tensors of one layer of a Llama, four matrices of attention to compress among them."""
    prefix = f"model.layers.{layer}"
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield TensorSpec(f"{prefix}.self_attn.{name}.weight", "BF16", (HIDDEN, HIDDEN))
    for name, shape in (("gate_proj", (1, HIDDEN)), ("up_proj", (1, HIDDEN))):
        yield TensorSpec(f"{prefix}.mlp.{name}.weight", "BF16", shape)
    yield TensorSpec(f"{prefix}.mlp.down_proj.weight", "BF16", (HIDDEN, 1))
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}.{name}.weight", "BF16", (HIDDEN,))


def make_headers(directory: Path, layers: int) -> None:
    """Write a checkpoint whose weights are holes, but for those of the first layer."""
    directory.mkdir()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    write_json(directory / CONFIG_FILE, config.to_diff_dict())
    outside = [
        TensorSpec("model.embed_tokens.weight", "BF16", (64, HIDDEN)),
        TensorSpec("lm_head.weight", "BF16", (64, HIDDEN)),
        TensorSpec("model.norm.weight", "BF16", (HIDDEN,)),
    ]
    weight_map: dict[str, str] = {}
    for start in range(0, layers, LAYERS_OF_A_SHARD):
        of_shard = range(start, min(start + LAYERS_OF_A_SHARD, layers))
        specs = [spec for layer in of_shard for spec in shapes_of_layer(layer)]
        specs = sorted(specs + ([] if start else outside), key=layout_key)
        name = f"model-{start:06d}.safetensors"
        with (directory / name).open("wb") as file:
            file.write(build_header(specs))
            begin = file.tell()
            file.truncate(begin + sum(spec.stored_bytes for spec in specs))
            values = torch.Generator().manual_seed(0)
            for spec in specs:
                if spec.name.startswith("model.layers.0."):
                    noise = torch.randn(spec.shape, generator=values).bfloat16()
                    file.write(noise.view(torch.uint8).numpy().tobytes())
                else:
                    file.seek(spec.stored_bytes, os.SEEK_CUR)
        weight_map |= dict.fromkeys((spec.name for spec in specs), name)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


@dataclass(frozen=True)
class Template:
    """What a real worker has made of the first layer: its result, its payload's header and data."""

    result: Result
    header: str
    data: bytes


def make_template(task: Task) -> Template:
    """Decompose a task."""
    with tempfile.TemporaryDirectory() as directory:
        result = DecomposeWorker(directory).run(task)
        assert isinstance(result, Result), result
        content = (Path(directory) / result.payload).read_bytes()
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    return Template(result, content[LENGTH_BYTES:end].decode(), content[end:])


class InstantWorker:
    """Has the result of every task at once: that of the first layer, under other names."""

    def __init__(self, payload_dir: str, template: Template) -> None:
        self._directory = Path(payload_dir)
        self._template = template
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, task: Task) -> Result:
        """Write the payload, and say so."""
        template = self._template
        old, new = template.result.block, task.block
        header = template.header.rstrip().replace(f'"{old}.', f'"{new}.').encode()
        header += b" " * (-len(header) % LENGTH_BYTES)
        content = len(header).to_bytes(LENGTH_BYTES, "little") + header + template.data
        sha256 = hashlib.sha256(content).hexdigest()
        payload = payload_name(task.task_id, sha256)
        (self._directory / payload).write_bytes(content)
        return replace(
            template.result,
            task_id=task.task_id,
            layer=task.layer,
            block=new,
            tensors=tuple(ref.name for ref in task.tensors.values()),
            payload=payload,
            sha256=sha256,
            payload_bytes=len(content),
            format=json.loads(json.dumps(template.result.format).replace(old, new)),
            started_at=time.time(),
            worker=self._name,
        )


def instantly(executor: type[Executor], template: Template, in_flight: int) -> type[Executor]:
    """An executor whose workers are instant ones, with so many items at a time."""

    class Instant(executor):  # type: ignore[misc, valid-type]
        def map(
            self, spec: WorkerSpec, items: Sequence[Any], on_event: Listener | None = None
        ) -> Iterator[Any]:
            kwargs = {"payload_dir": spec.kwargs["payload_dir"], "template": template}
            spec = replace(spec, cls=InstantWorker, kwargs=kwargs, memory_bytes=0)
            return super().map(replace(spec, in_flight=in_flight), items, on_event)

    return Instant


@dataclass(frozen=True)
class Drive:
    """What one compression took.

    Attributes:
        tasks_seconds: wall time of the tasks.
        cpu: seconds of CPU time by phase.
        memory: bytes of the resident set by moment.
    """

    tasks_seconds: float
    cpu: dict[str, float]
    memory: dict[str, int]


def resident_bytes() -> int:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drive(model: Path, out: Path, workers: int, ray_actors: int) -> Drive:
    """Compress with instant workers, and look at clocks and memory meanwhile."""
    cpu, memory = {"start": time.process_time()}, {"start": resident_bytes()}
    source = resolve_source(str(model))
    config = RunConfig(keep=KEEP, metric="weight", device="cpu")
    plan = make_plan(source, config)
    cpu["plan"], memory["plan"] = time.process_time(), resident_bytes()
    count = len(plan.tasks)
    template = make_template(plan.tasks[0].task)
    del plan
    if ray_actors:
        chosen: type[Executor] = instantly(RayExecutor, template, STATIONS)
        executor = chosen(workers=ray_actors)  # type: ignore[call-arg]
    else:
        executor = instantly(SerialExecutor, template, workers)()
    tenth = -(-count // 10)
    moments = {tenth: "first tenth", count - tenth: "nine tenths", count: "tasks"}
    cpu["template"] = time.process_time()
    wall: dict[str, float] = {}

    def on_start(name: str, tasks: Sequence[Any], done: set[str]) -> None:
        wall[name], cpu[name] = time.perf_counter(), time.process_time()
        shown.on_start(name, tasks, done)

    def on_progress(outcome: Any, done: int, planned: int) -> None:
        shown.on_progress(outcome, done, planned)
        assert isinstance(outcome, Result), outcome
        if done in moments:
            name = moments[done]
            wall[name], cpu[name] = time.perf_counter(), time.process_time()
            memory[name] = resident_bytes()

    with CompressionProgress(out.name) as shown:
        outcome = compress_model(
            source,
            config,
            executor,
            out,
            default_run_dir(out),
            on_start=on_start,
            on_event=shown.on_event,
            on_progress=on_progress,
        )
        shown.ended(outcome)
    cpu["end"] = time.process_time()
    assert outcome.complete
    if isinstance(executor, RayExecutor):
        executor.close()
    memory["peak"] = peak_memory_bytes(torch.device("cpu"))
    phases = {
        "plan": 2 * (cpu["plan"] - cpu["start"]),
        "begin": cpu["compress"] - cpu["template"] - (cpu["plan"] - cpu["start"]),
        "tasks": cpu["tasks"] - cpu["compress"],
        "first tenth": cpu["first tenth"] - cpu["compress"],
        "last tenth": cpu["tasks"] - cpu["nine tenths"],
        "check": cpu["assemble"] - cpu["tasks"],
        "assemble": cpu["end"] - cpu["assemble"],
    }
    return Drive(wall["tasks"] - wall["compress"], phases, memory)


def command(*arguments: object) -> tuple[float, int]:
    """CPU seconds and largest resident set of a command of lestd."""
    with tempfile.NamedTemporaryFile("r", prefix="lestd-peak-") as peak:
        child = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, peak.name, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        assert status == 0, arguments
        return usage.ru_utime + usage.ru_stime, int(peak.read()) * 1024


def measure(count: int, options: argparse.Namespace) -> Drive:
    """A run of so many tasks, and the commands after it."""
    with tempfile.TemporaryDirectory(prefix="lestd-growth-", dir=options.work) as directory:
        work = Path(directory)
        model, out = work / "model", work / "out"
        make_headers(model, count)
        this = [sys.executable, __file__, "--drive", str(work)]
        this += ["--workers", str(options.workers), "--ray", str(options.ray)]
        this += ["--no-fsync"] if options.no_fsync else []
        with (work / "log").open("wb") as log:
            run = subprocess.run(this, stdout=subprocess.PIPE, stderr=log, text=True)
        if run.returncode:
            sys.exit((work / "log").read_text()[-3000:])
        found = Drive(**json.loads(run.stdout.splitlines()[-1]))
        print(count, asdict(found), file=sys.stderr, flush=True)
        same = ("compress", model, "--keep", KEEP, "--metric", "weight", "--device", "cpu")
        for name, arguments in {
            "status": ("status", out, "--json"),
            "query": ("query", out, "--name", "worst-layers"),
            "again": (*same, "--executor", "serial", "--out", out),
        }.items():
            found.cpu[name], found.memory[name] = command(*arguments)
    return found


def main() -> None:
    """Measure each number of tasks in processes of its own, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 1000], help="(100 1000)")
    parser.add_argument("--workers", type=int, default=64, help="threads (default: %(default)s)")
    parser.add_argument("--ray", type=int, default=0, metavar="N", help="N actors of Ray instead")
    parser.add_argument("--no-fsync", action="store_true", help="without waiting for the disk")
    parser.add_argument("--work", type=Path, help="(default: a directory that is deleted)")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        if options.no_fsync:
            os.fsync = lambda descriptor: None  # type: ignore[assignment]
        model, out = options.drive / "model", options.drive / "out"
        print(json.dumps(asdict(drive(model, out, options.workers, options.ray))))
        return
    rows = {}
    for count in options.tasks:
        rows[count] = measure(count, options)
    names = list(next(iter(rows.values())).cpu)
    print(f"| tasks | tasks/s | {' | '.join(names)} |\n|{'---:|' * (len(names) + 2)}")
    for count, found in rows.items():
        shown = [found.cpu[name] * 1000 / count for name in names]
        # What takes a tenth of the tasks.
        shown = [10 * ms if "tenth" in name else ms for name, ms in zip(names, shown, strict=True)]
        cells = [f"{count:,}", f"{count / found.tasks_seconds:.0f}", *(f"{ms:.2f}" for ms in shown)]
        print(f"| {' | '.join(cells)} |")
    names = [name for name in next(iter(rows.values())).memory if name != "nine tenths"]
    print(f"\n| tasks | {' | '.join(names)} |\n|{'---:|' * (len(names) + 1)}")
    for count, found in rows.items():
        cells = [f"{count:,}", *(f"{found.memory[name] / MIB:.0f}" for name in names)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
