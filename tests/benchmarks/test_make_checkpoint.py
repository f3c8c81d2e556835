"""benchmarks/make_checkpoint.py: the same bytes, a checkpoint that loads, weights as promised."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.cli import digest_tree, lestd
from support.paths import ROOT
from transformers import AutoModelForCausalLM

sys.path.append(str(ROOT / "benchmarks"))
import make_checkpoint as maker
from make_checkpoint import make_checkpoint, make_config, make_tensor

from lestd_kernels.errors import LestdError
from orchestrator.source.checkpoint import load_config
from workers.checkpoint.tensors import ShardIndex, read_tensor

SMALL = {"num_attention_heads": 4, "vocab_size": 96, "hidden_size": 64}
CHANGES = {
    "tiny": {},
    "llama-1b": SMALL | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 112},
    "llama-13b": SMALL | {"num_key_value_heads": 4, "intermediate_size": 112},
    "llama-70b": SMALL | {"num_key_value_heads": 2, "intermediate_size": 112},
    "opt-30b": SMALL | {"word_embed_proj_dim": 64, "ffn_dim": 112, "max_position_embeddings": 64},
    "qwen3-30b-a3b": SMALL
    | {
        "num_key_value_heads": 1,
        "head_dim": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    },
}
"""What makes each shape small; the families' other settings stay."""

PARAMETERS = {  # In 1e9, of the models on the Hub; without what is tied.
    "llama-1b": 1.236,
    "llama-13b": 13.016,
    "llama-70b": 68.977,
    "opt-30b": 29.975,
    "qwen3-30b-a3b": 30.532,
}


@pytest.fixture(autouse=True)
def _threads():
    """The tool sets torch to one thread; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(monkeypatch, capsys):
    """The tool itself: exit code, standard output and standard error."""

    def main(*options: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, options)])
        code = 0
        try:
            maker.main()
        except SystemExit as end:
            code = 1
            print(end, file=sys.stderr)
        return code, *capsys.readouterr()

    return main


def matrix(name: str, rows: int, columns: int, dtype=torch.float32) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:
        return make_tensor(name, (rows, columns), dtype, 0, pool)


def test_same_options_same_bytes_by_any_threads(tmp_path, monkeypatch, run):
    """By the command, and here with other threads, of the tool's own and of torch."""
    code, out, err = run(
        "--shape", "tiny", "--layers", 1, "--threads", 1, "--out", tmp_path / "one"
    )
    assert (code, "make checkpoint: 100 %" in err) == (0, True)
    assert "no tokenizer" in out
    torch.set_num_threads(4)
    make_checkpoint(make_config("tiny", 1), tmp_path / "two", threads=3)
    assert digest_tree(tmp_path / "one") == digest_tree(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    make_checkpoint(make_config("tiny", 1), tmp_path / "other", seed=1)
    assert digest_tree(tmp_path / "one").keys() == digest_tree(tmp_path / "other").keys()
    assert digest_tree(tmp_path / "one") != digest_tree(tmp_path / "other")
    # Many blocks, and threads that overtake each other.
    monkeypatch.setattr(maker, "_BLOCK_ELEMENTS", 2000)
    make_checkpoint(make_config("tiny", 1), tmp_path / "a", threads=1)
    make_checkpoint(make_config("tiny", 1), tmp_path / "b", threads=5)
    assert digest_tree(tmp_path / "a") == digest_tree(tmp_path / "b")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", CHANGES)
def test_transformers_loads_every_tensor(tmp_path, shape, dtype):
    config = make_config(shape, 2, **CHANGES[shape])
    total = make_checkpoint(config, tmp_path / "made", dtype=dtype, shard_bytes=30_000)
    index = ShardIndex.from_directory(tmp_path / "made")
    assert index.stored_bytes == total
    assert len(index.shards) > 2
    for shard in index.shards:
        refs = [ref for ref in index.tensors.values() if ref.shard.endswith(shard)]
        assert len(refs) == 1 or sum(ref.stored_bytes for ref in refs) <= 30_000
    assert load_config(tmp_path / "made").model_type == config.model_type

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == getattr(torch, dtype)
    # What is saved again is what was made, name by name and bit by bit.
    model.save_pretrained(tmp_path / "saved")
    saved = ShardIndex.from_directory(tmp_path / "saved")
    assert saved.tensors.keys() == index.tensors.keys()
    for name, ref in index.tensors.items():
        assert torch.equal(read_tensor(ref), read_tensor(saved.tensors[name]))
    with torch.inference_mode():
        assert bool(model(torch.arange(40)[None]).logits.isfinite().all())


def test_no_two_tensors_are_alike(tmp_path):
    make_checkpoint(make_config("qwen3-30b-a3b", 2, **CHANGES["qwen3-30b-a3b"]), tmp_path / "made")
    index = ShardIndex.from_directory(tmp_path / "made")
    tensors = [read_tensor(ref) for ref in index.tensors.values()]
    assert len({tuple(t.flatten().tolist()) for t in tensors}) == len(tensors) > 40


@pytest.mark.parametrize("shape", PARAMETERS)
def test_shapes_are_those_of_the_models(shape):
    counts = [torch.Size(s).numel() for s in maker.tensor_shapes(make_config(shape)).values()]
    assert sum(counts) / 1e9 == pytest.approx(PARAMETERS[shape], abs=0.0006)


@pytest.mark.parametrize("shape", CHANGES)
def test_a_plan_and_a_compression_accept_it(tmp_path, shape):
    make_checkpoint(make_config(shape, 1, **CHANGES[shape]), tmp_path / "made")
    planned = lestd("plan", tmp_path / "made", "--keep", 0.6, "--json")
    assert planned.code == 0, planned.err
    assert len(json.loads(planned.out)["layers"]) == 1
    options = ("--keep", 0.6, "--executor", "serial", "--out", tmp_path / "small")
    done = lestd("compress", tmp_path / "made", *options)
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.inference_mode():
        assert bool(model(torch.arange(9)[None]).logits.isfinite().all())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("m.q_proj.weight", (640, 192)), ("m.o_proj.weight", (192, 640)), ("m.k.weight", (70, 45))],
)
def test_singular_values_decay(name, shape):
    values = torch.linalg.svdvals(matrix(name, *shape))
    plain = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    rank = len(values)
    for place in (rank // 20, rank // 4, rank // 2, rank - 1):
        assert 0.01 < values[place] / values[0] < 0.95 * plain[place] / plain[0]
    assert values[rank // 2] < 0.3 * values[0] < 0.5 * values[rank // 20]
    # The entries are as large as those of a model that was trained.
    rms = float(matrix(name, *shape).square().mean().sqrt())
    assert rms == pytest.approx(0.7 / shape[1] ** 0.5, rel=0.1)


def test_entries_are_heavy_tailed():
    W = matrix("m.q_proj.weight", 640, 192).double()
    kurtosis = float(W.pow(4).mean() / W.square().mean() ** 2)
    assert kurtosis > 4.5  # 3 for a normal distribution.


def test_a_block_shares_its_subspace_among_projections_and_heads():
    """Half the directions of Q hold most of K, V and O, but not of another block's K."""
    d, heads, p = 192, 8, 24
    q = matrix("a.0.q_proj.weight", heads * p, d)
    basis = torch.linalg.svd(q, full_matrices=False).Vh[: d // 4]

    def share(W: torch.Tensor) -> float:
        return float((W @ basis.T).square().sum() / W.square().sum())

    strange = share(matrix("a.1.k_proj.weight", heads * p, d))
    for name in ("k_proj", "v_proj", "o_proj"):
        W = matrix(f"a.0.{name}.weight", heads * p, d)
        W = W.T if name == "o_proj" else W
        assert share(W) > strange + 0.05
        for head in W.split(p):
            assert share(head) > strange


@pytest.mark.parametrize("shape", ["tiny", "opt-30b", "qwen3-30b-a3b"])
def test_the_first_layers_have_super_weights(tmp_path, shape):
    make_checkpoint(make_config(shape, 5, **CHANGES[shape]), tmp_path / "made")
    found = {}
    for name, ref in ShardIndex.from_directory(tmp_path / "made").tensors.items():
        W = read_tensor(ref).float().flatten()
        if len(ref.shape) == 2:
            found[name] = int((W.abs() > 25 * W.square().mean().sqrt()).sum())
    expected = [name for name in found if maker._HAS_SUPER_WEIGHTS.search(name)]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in expected} == {0, 1, 2, 3}
    assert len(expected) == 8  # The attention's output and the feed-forward block's.
    assert {name for name, count in found.items() if count} <= set(expected)
    assert sum(found[name] == 3 for name in expected) >= 6


@pytest.mark.parametrize("width", [1, 7, 48, 64, 96, 200])
def test_the_mixing_is_orthogonal(width):
    mix = maker._Mixing(width, torch.Generator().manual_seed(0))
    Q = mix(torch.eye(width))
    torch.testing.assert_close(Q @ Q.T, torch.eye(width))


@pytest.mark.slow
def test_memory_holds_one_tensor_at_a_time(tmp_path):
    """12 layers take no more than 2, and neither much more than the largest tensor."""
    code = """
import sys
from pathlib import Path
import torch
from make_checkpoint import make_checkpoint, make_config
from workers.host.devices import peak_memory_bytes, reset_peak_memory
wide = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048}
for layers in (0, 2, 12):
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory_bytes(torch.device("cpu"))
    config = make_config("tiny", layers, **wide) if layers else make_config("tiny")
    total = make_checkpoint(config, Path(sys.argv[1], str(layers)))
    print(peak_memory_bytes(torch.device("cpu")) - before, total)
"""
    benchmarks = Path(maker.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=benchmarks,
        # Every large block is a mapping of its own, so that what is freed is gone at once.
        env=os.environ | {"PYTHONPATH": str(benchmarks.parent), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, (few, _), (many, total) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert total > 120 * 2**20
    assert few > 4096 * 768 * 2  # The embedding.
    assert many < few + 4 * 2**20
    assert many < 4096 * 768 * 2 + 20 * 2**20  # What the work on blocks takes.


def test_a_name_that_is_taken_is_refused(tmp_path, run):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    code, out, err = run("--shape", "tiny", "--out", tmp_path / "made")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "already exists" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "file"]


def test_a_disk_with_too_little_room_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LestdError, match=r"has 1\.24 MiB free, but the checkpoint needs 351\.94 K"):
        make_checkpoint(make_config("tiny"), tmp_path / "deep" / "made")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(make_config("tiny"), tmp_path / "made", progress=interrupt)
    assert not list(tmp_path.iterdir())
    new = tmp_path / ".made.making" / "new"  # What a killed run leaves.
    new.mkdir(parents=True)
    (new.parent / ".lestd").touch()
    (new / "model-00001-of-00009.safetensors").touch()
    make_checkpoint(make_config("tiny"), tmp_path / "made")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
