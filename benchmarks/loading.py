"""Loading: seconds and private memory per stored byte, compressed against dense.

    python benchmarks/loading.py               prints the table in Markdown
    python benchmarks/loading.py --method watersic --against rtn --keep 0.2
                                               against another compressed form instead of dense

Makes a Llama of random weights whose bytes are nearly all in attention, by default four blocks of
the size of Llama-2-7B's, compresses it with the command `lestd`, and loads both in turn, each time
in a process of its own, with the files in the page cache; seconds are those of the CPU, on which
other processes have no claim. "load" is `from_pretrained`, which maps the files and so takes the
same time for many bytes as for few; "load and read" reads every byte once besides, "load, first
tokens" computes eight tokens after it, for which few-bit values are unpacked, and "load, converted"
asks for another dtype, so that every byte is read and copied. Memory is private memory (files that
are mapped do not count) over the bytes of the tensors. Linux only. Takes some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

MEASURE = """
import gc, json, sys, time
import torch, lestd_kernels
from transformers import AutoModelForCausalLM

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    [line] = [line for line in lines if line.startswith("Private_Dirty:")]
    return 1024 * int(line.split()[1])

def load(dtype):
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype)

load("auto")
gc.collect()
figures = {}
for name, dtype in (("as stored", "auto"), ("converted", torch.float32)):
    before, start = private(), time.process_time()
    model = load(dtype)
    loaded = time.process_time() - start
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    figures[f"private memory, {name}"] = (private() - before) / size
    if dtype == "auto":
        for tensor in tensors:
            tensor.clone()
        figures["bytes"], figures["load"] = size, loaded
        figures["load and read"] = time.process_time() - start
        start = time.process_time()
        with torch.inference_mode():
            model(torch.arange(8)[None])
        figures["load, first tokens"] = loaded + time.process_time() - start
    else:
        figures["load, converted"] = loaded
    del model, tensors
    gc.collect()
print(json.dumps(figures))
"""


def measure(directory: Path) -> dict[str, float]:
    """Figures of one process that loads `directory`; see `MEASURE`."""
    # Every large block is a mapping of its own, so that what is freed is gone at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(directory)]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return dict(json.loads(run.stdout))


def main() -> None:
    """Make both models, load them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--keep", default="0.6", help="(default: %(default)s)")
    parser.add_argument("--method", default="lestd", help="(default: %(default)s)")
    parser.add_argument("--against", help="another method; the dense model where there is none")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch, "dense")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=options.hidden,
            intermediate_size=64,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 128,
            num_key_value_heads=options.hidden // 128,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(dense)
        del model
        reference = options.against or "dense"
        directories = {"dense": dense}
        for method in filter(None, (options.against, options.method)):
            directories[method] = Path(scratch, method)
            settings = ("--method", method, "--keep", options.keep, "--executor", "serial")
            command = [sys.executable, "-m", "orchestrator", "compress", dense, *settings]
            command += ["--out", directories[method]]
            subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)

        figures: dict[str, defaultdict[str, list[float]]] = {
            name: defaultdict(list) for name in (reference, options.method)
        }
        for _ in range(options.rounds):
            for name, directory in ((name, directories[name]) for name in figures):
                for figure, value in measure(directory).items():
                    figures[name][figure].append(value)
    medians = {n: {k: median(v) for k, v in values.items()} for n, values in figures.items()}

    print(f"| median of rounds | {reference} | {options.method} | ratio | ratio per byte |")
    print(f"|{' --- |' * 5}")
    in_bytes = medians[options.method]["bytes"] / medians[reference]["bytes"]
    for figure, value in medians[reference].items():
        other = medians[options.method][figure]
        if figure == "bytes":
            cells = (f"{value:,.0f}", f"{other:,.0f}", f"{in_bytes:.3f}", "")
        elif figure.startswith("private"):
            cells = (f"{value:.3f} of the bytes", f"{other:.3f} of the bytes", "", "")
        else:
            ratio = other / value
            cells = (f"{value:.3f} s", f"{other:.3f} s", f"{ratio:.2f}", f"{ratio / in_bytes:.2f}")
        print(f"| {' | '.join((figure, *cells))} |")


if __name__ == "__main__":
    main()
