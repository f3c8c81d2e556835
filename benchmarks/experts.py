"""Layers of full size with 128 experts each: compressed, loaded, run, and exported again.

    python benchmarks/experts.py --work DIR                   four layers of Qwen3-30B-A3B's shape
    python benchmarks/experts.py --work DIR --layers 1 --text TEXT --keep 0.2032 -- --method auto

Makes the checkpoint (benchmarks/make_checkpoint.py) with the tokenizer of examples/, compresses all
of its layers by `lestd compress --scope all`, by default with `lestd` in 4 bits, on a local Ray
with one worker. Then each in a process of its own: the compressed model is loaded and computes a
few tokens, `lestd export --dense` writes it as a checkpoint, and that one computes the same tokens.
Prints a table in Markdown: seconds of wall time, largest resident sets beside what the plan
promised, and how far the two models' logits are apart. What `--work DIR` holds of the checkpoint
and of its calibration is used again. Four layers take 25 GiB of disk and, with a text, 20 more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from run import MAKE_CHECKPOINT, compress, peak_bytes, show

from orchestrator.manifest.manifest import default_run_dir

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-llama-wikitext2" / "model"
GIB = 2**30
FEW_BITS = ["--method", "lestd", "--value-bits", "4", "--factor-bits", "4"]

RUN = """
import json, sys, time
import torch, lestd_kernels
from transformers import AutoModelForCausalLM

start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
loaded = time.perf_counter()
with torch.inference_mode():
    logits = model(torch.arange(16)[None]).logits.float()
done = time.perf_counter()
torch.save(logits, sys.argv[2])
print(json.dumps({"load": loaded - start, "forward": done - loaded}))
"""


def watched(*arguments: object) -> tuple[str, float, int]:
    """Run a program of Python; its output, seconds of wall time and largest resident set."""
    command = [sys.executable, *map(str, arguments)]
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, text=True)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.02)
        if process.returncode:
            sys.exit(f"error: {' '.join(command[:6])} ended with {process.returncode}")
        said.seek(0)
        return said.read(), time.perf_counter() - began, peak


def logits_of(model: Path, out: Path) -> tuple[dict[str, float], int, Any]:
    """Load a model and compute; seconds, largest resident set, logits (1, tokens, vocabulary)."""
    said, _, peak = watched("-c", RUN, model, out)
    return json.loads(said), peak, torch.load(out, weights_only=True)


def stored_bytes(directory: Path) -> int:
    """Of a model's files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def main() -> None:
    """Make what is not there yet, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for all files")
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="of make_checkpoint.py")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--keep", default="0.27", help="(default: %(default)s)")
    parser.add_argument("--text", type=Path, help="for methods and metrics that need one")
    parser.add_argument("--samples", default="16", help="of the text (default: %(default)s)")
    parser.add_argument("--threads", default="2", help="of the worker (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="of lestd compress, after --")
    options = parser.parse_args()
    work = options.work.absolute()
    model, out = work / f"{options.shape}-{options.layers}", work / "out"
    if not model.exists():
        shape = ["--shape", options.shape, "--layers", str(options.layers)]
        command = [sys.executable, str(MAKE_CHECKPOINT), *shape, "--out", str(model)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, model)
    settings = ["--scope", "all", "--keep", options.keep, "--threads", options.threads]
    settings += options.options or FEW_BITS
    if options.text is not None:
        settings += ["--calibrate-on", str(options.text), "--samples", options.samples]
        settings += ["--calibration", str(work / f"calibration-{options.layers}")]
    for before in (out, default_run_dir(out), dense := work / "dense"):
        shutil.rmtree(before, ignore_errors=True)
    run = compress(model, out, settings, 1)
    plan = json.loads((default_run_dir(out) / "plan.json").read_text())["total"]
    seconds, peak, logits = logits_of(out, work / "logits.pt")
    _, exporting, exported_peak = watched(
        "-m", "orchestrator", "export", out, "--dense", dense, "--dtype", "float32"
    )
    _, _, expected = logits_of(dense, work / "expected.pt")
    apart = float((logits - expected).norm() / expected.norm())

    show(f"{model.name}, {' '.join(options.options or FEW_BITS)}", "measured", "planned")
    show("---", "---:", "---:")
    show("the checkpoint, GiB", f"{stored_bytes(model) / GIB:.2f}", "")
    planned = plan["keep_of_model"] * plan["model_bytes"]
    show("the compressed model, GiB", f"{stored_bytes(out) / GIB:.2f}", f"{planned / GIB:.2f}")
    worker, promised = run.worker_bytes / GIB, run.predicted_bytes / GIB
    show("memory of the worker, GiB", f"{worker:.2f}", f"{promised:.2f} at most")
    show("memory of the driver, GiB", f"{run.driver_bytes / GIB:.2f}", "")
    show("the tasks, s", f"{run.tasks_seconds:.0f}", "")
    show("the command, s", f"{run.command_seconds:.0f}", "")
    show("loading, s", f"{seconds['load']:.1f}", "")
    show("16 tokens after it, s", f"{seconds['forward']:.1f}", "")
    show("memory of loading and computing, GiB", f"{peak / GIB:.2f}", "")
    show("export, s", f"{exporting:.0f}", "")
    show("memory of the export, GiB", f"{exported_peak / GIB:.2f}", "")
    show("logits of the export from those of the model, relative", f"{apart:.1e}", "")


if __name__ == "__main__":
    main()
