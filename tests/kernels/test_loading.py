"""What loading costs in memory: the packed form goes straight into the modules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import lestd
from support.families import save_pair
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lestd_kernels.storage.codecs import CODECS

HIDDEN, LAYERS = 1024, 6


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model compressed by `lestd compress`; 106 MB of float32, 101 in attention."""
    root = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=91,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "dense")
    settings = ("--keep", "0.5", "--executor", "serial", "--out", root / "packed")
    finished = lestd("compress", root / "dense", *settings)
    assert finished.code == 0, finished.err
    return root / "packed"


MEASURE = """
import gc, json, mmap, sys, threading
import torch, lestd_kernels
from transformers import AutoModelForCausalLM

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    [line] = [line for line in lines if line.startswith("Private_Dirty:")]
    return 1024 * int(line.split()[1])

def anonymous():  # cheaper to ask for, for the samples
    total, of_files = map(int, open("/proc/self/statm").read().split()[1:3])
    return mmap.PAGESIZE * (total - of_files)

def load():
    return AutoModelForCausalLM.from_pretrained(directory, **options)

def use(model):
    with torch.no_grad():
        model(torch.arange(2, 9)[None])

directory = sys.argv[1]
for options in json.loads(sys.argv[2]):
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    use(load())  # what libraries set up once, and keep, is not the model's
    gc.collect()
    before, low, high = private(), anonymous(), 0
    done = threading.Event()

    def watch():
        global high
        while not done.wait(0.0005):
            high = max(high, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    done.set()
    watcher.join()
    loaded = private()
    use(model)
    tensors = model.state_dict().values()
    print(json.dumps({
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "loaded": loaded - before,
        "peak": high - low,
        "used": private() - before,
    }))
    del model, tensors
"""

OPTIONS = {
    "as stored": {},
    "auto": {"device_map": "auto"},
    "converted": {"dtype": "bfloat16"},  # every tensor becomes a copy in private memory
    "disk": {"device_map": {"": "disk"}},
}


@pytest.fixture(scope="module")
def found(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Private memory, in bytes: loaded, at the peak, after a forward. Of one process for all."""
    offload = {"offload_folder": str(tmp_path_factory.mktemp("offload"))}
    options = [one | (offload if name == "disk" else {}) for name, one in OPTIONS.items()]
    command = [sys.executable, "-c", MEASURE, str(large), json.dumps(options)]
    # Every large block is a mapping of its own, so that what is freed is gone at once.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return dict(zip(OPTIONS, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", OPTIONS)
def test_private_memory_is_that_of_the_tensors(found, name):
    of = found[name]
    dense = LAYERS * 4 * HIDDEN * HIDDEN * (2 if "dtype" in OPTIONS[name] else 4)
    assert 0.4 * dense < of["bytes"] < 0.6 * dense, "the bounds below tell packed from dense"
    assert of["loaded"] <= 1.1 * of["bytes"]
    assert of["peak"] <= 1.1 * of["bytes"]
    assert of["used"] <= 1.1 * of["bytes"], "a forward left a dense copy behind"


class Sizes(TorchDispatchMode):
    """Element counts of the tensors made outside of the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.made.add(tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["identity", "learned"])
@pytest.mark.parametrize("codec", CODECS)
def test_only_tensors_of_stored_sizes_are_made(tmp_path, monkeypatch, codec, mode, dtype):
    """No dense core and no dense weight, not even for a moment that a sample could miss."""
    directory, dense = save_pair("llama", mode, codec, tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # in this thread, where the mode sees it
    with Sizes() as sizes:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    stored = set()
    for file in directory.glob("*.safetensors"):
        for tensor in load_file(file).values():
            stored |= {tensor.numel(), tensor.numel() * tensor.element_size()}  # read as bytes
            words = (tensor.numel() - 1) // 8  # of a mask, when its bits are counted
            stored |= {words, 8 * words, words + 1, 8 * words + 8}
    small = dense.config.hidden_size  # rotary frequencies and the like
    assert {size for size in sizes.made if size > small} <= stored
    assert model.model.layers[0].self_attn.q_proj.weight.numel() in sizes.made
    assert dense.model.layers[0].self_attn.q_proj.weight.numel() not in stored
