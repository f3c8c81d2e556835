"""`lestd export`: the dense checkpoint equals the compressed model, or there is none."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import digest_tree, lestd, run_lestd
from support.exports import compress_example, narrow_pair
from support.families import (
    CONFIGS,
    FAMILIES,
    MHA_FAMILIES,
    VOCABULARY,
    attention_groups,
    edited,
    random_tucker,
    save_pair,
    save_tiny,
    write_compressed,
)
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from lestd_kernels.modules.shared_tucker_linear import CompressedLinear
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.tensorize import GroupLayout
from workers.checkpoint.tensors import INDEX_FILE, ShardIndex, read_tensor

CASES = [(family, "identity") for family in FAMILIES] + [(f, "learned") for f in MHA_FAMILIES]
PACKED = {"lestd_u1", "lestd_u2", "lestd_core", "mask", "columns", "row_pointers"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Compressed directory and its export in float32, by family, type mode and codec."""

    @functools.cache
    def make(family: str, mode: str = "identity", codec: str = "bitmask") -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(f"{family}-{mode}-{codec}")
        directory, _ = save_pair(family, mode, codec, root)
        assert lestd("export", directory, "--dense", root / "out").code == 0
        return directory, root / "out"

    return make


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, tiny_llama) -> Path:
    """The example, compressed by the command line: with manifest, tokenizer and model card."""
    return compress_example(tiny_llama, tmp_path_factory.mktemp("example") / "small")


def load(directory: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def stored(directory: Path) -> dict[str, Tensor]:
    index = ShardIndex.from_directory(directory)
    return {name: read_tensor(ref) for name, ref in index.tensors.items()}


def same_bytes(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def has_compressed_modules(model: PreTrainedModel) -> bool:
    return any(isinstance(module, CompressedLinear) for module in model.modules())


def prompts(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) >= torch.tensor([0, 3, 6])[:rows, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same_logits(directory: Path, out: Path, auto: Any = AutoModelForCausalLM) -> None:
    small, dense = (auto.from_pretrained(d, dtype=torch.float32) for d in (directory, out))
    assert has_compressed_modules(small)
    assert not has_compressed_modules(dense)
    inputs = prompts()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, expected = (model(**inputs)[0][real] for model in (dense, small))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.05


# What is written.


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_logits_equal_the_compressed_models(exported, family, mode):
    assert_same_logits(*exported(family, mode))


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(exported, codec):
    assert_same_logits(*exported("llama-gqa", "identity", codec))


GENERATIONS = {
    "one prompt": (1, {}),
    "left padding": (3, {}),
    "beam search": (3, {"num_beams": 3}),
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_generate_gives_the_same_tokens(exported, family, mode, how):
    rows, options = GENERATIONS[how]
    options = options | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": VOCABULARY}
    small, dense = (load(directory) for directory in exported(family, mode))
    found = small.generate(**prompts(rows), **options)
    assert torch.equal(found, dense.generate(**prompts(rows), **options))
    assert found.shape == (rows, 17)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_it_is_the_source_checkpoint_but_for_the_weights_in_scope(exported, family, mode):
    directory, out = exported(family, mode)
    source, small, dense = (stored(d) for d in (directory.parent / "dense", directory, out))
    # `save_pretrained` gives GPT-NeoX's head its older name.
    source = {name.replace("embed_out", "lm_head"): tensor for name, tensor in source.items()}
    in_scope = {
        f"{path}.{module.name}.weight"
        for path, layout in attention_groups(family).items()
        for module in layout.modules
    }
    assert in_scope <= source.keys()
    assert dense.keys() == source.keys()
    for name, tensor in dense.items():
        if name in in_scope:
            assert (tensor.dtype, tensor.shape) == (source[name].dtype, source[name].shape)
        else:
            assert same_bytes(tensor, small[name])
            assert same_bytes(tensor, source[name])
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["weight_map"].keys() == dense.keys()
    size = sum(tensor.numel() * tensor.element_size() for tensor in dense.values())
    assert index["metadata"]["total_size"] == size
    assert not PACKED & {part for name in dense for part in name.split(".")}


@pytest.mark.parametrize("mode", ["identity", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_have_the_stored_dtype_rounded_once(tmp_path, dtype, mode):
    directory = narrow_pair(tmp_path, dtype, mode)
    run = lestd("export", directory, "--dense", tmp_path / "auto", "--json")
    assert json.loads(run.out)["dtypes"] == [str(dtype).removeprefix("torch.")]
    wide = lestd("export", directory, "--dense", tmp_path / "wide", "--dtype", "float32", "--json")
    assert json.loads(wide.out)["exported_bytes"] == 2 * json.loads(run.out)["exported_bytes"]
    narrow_tensors, wide_tensors = stored(tmp_path / "auto"), stored(tmp_path / "wide")
    changed = 0
    for name, tensor in wide_tensors.items():
        if tensor.dtype == torch.float32:
            changed += 1
            assert same_bytes(narrow_tensors[name], tensor.to(dtype))
        else:
            assert same_bytes(narrow_tensors[name], tensor)
    assert changed == 2 * 4
    assert load(tmp_path / "auto").dtype == dtype
    # An ordinary load of the float32 export rounds nothing.
    model = load(tmp_path / "wide")
    assert model.dtype == torch.float32
    assert all(same_bytes(t.float(), model.state_dict()[n]) for n, t in wide_tensors.items())
    assert_same_logits(directory, tmp_path / "wide")


def test_a_factor_that_groups_share_is_found_by_reference(tmp_path):
    state = load(save_tiny("llama", tmp_path / "dense")).state_dict()
    layouts = attention_groups("llama")
    first, second = (random_tucker(layout, "identity", "csr", 5) for layout in layouts.values())
    assert torch.equal(first.U1, second.U1)
    groups = dict(zip(layouts, (first, second), strict=True))
    directory = write_compressed(state, CONFIGS["llama"], groups, tmp_path / "all", shards=1)
    paths = list(layouts)

    def share(config: dict[str, Any]) -> None:
        config["groups"][1]["factors"] = config["groups"][0]["factors"]

    shared = edited(directory, tmp_path / "shared", share)
    tensors = load_file(shared / "part-0.safetensors")
    for factor in ("lestd_u1", "lestd_u2"):
        del tensors[f"{paths[1]}.{factor}.weight"]
    save_file(tensors, shared / "part-0.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "part-0.safetensors")
    (shared / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    outs = [tmp_path / "dense-all", tmp_path / "dense-shared"]
    runs = [
        lestd("export", model, "--dense", out, "--json")
        for model, out in zip((directory, shared), outs, strict=True)
    ]
    whole, once = (json.loads(run.out) for run in runs)
    assert whole["stored_bytes"] - once["stored_bytes"] == 4 * (48 * 17 + 12 * 7)
    left, right = (stored(out) for out in outs)
    assert left.keys() == right.keys()
    assert all(same_bytes(tensor, right[name]) for name, tensor in left.items())
    assert_same_logits(shared, outs[1])


@pytest.mark.parametrize("family", ["llama", "opt", "gptj", "gpt_neox"])
@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_a_model_saved_without_its_head_has_other_names(exported, tmp_path, family, mode):
    directory, out = exported(family, mode)
    AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "base")
    assert not stored(tmp_path / "base").keys() & stored(directory).keys()
    run = lestd("export", tmp_path / "base", "--dense", tmp_path / "out")
    assert run.code == 0, run.err
    assert_same_logits(tmp_path / "base", tmp_path / "out", AutoModel)
    whole = AutoModel.from_pretrained(out).state_dict()
    found = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(same_bytes(tensor, found[name]) for name, tensor in whole.items())
    # And the other way: the base model's entries, the whole model's tensors.
    config = json.loads((directory / "config.json").read_text())
    entries = json.dumps(config["quantization_config"]["groups"])
    prefix = attention_prefix(family)
    shorter = json.loads(entries.replace(f'"{prefix}.', '"'))
    renamed = edited(directory, tmp_path / "renamed", lambda q: q.update(groups=shorter))
    assert lestd("export", renamed, "--dense", tmp_path / "again").code == 0
    assert digest_tree(tmp_path / "again").items() >= shards_of(out).items()


def attention_prefix(family: str) -> str:
    return next(iter(attention_groups(family))).partition(".")[0]


def shards_of(directory: Path) -> dict[str, str]:
    return {n: d for n, d in digest_tree(directory).items() if n.endswith(".safetensors")}


def test_the_files_of_an_export(compressed, tiny_llama, tmp_path):
    run = lestd("export", compressed, "--dense", tmp_path / "out", "--json")
    figures = json.loads(run.out)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)}
    side = {"README.md", "config.json", "generation_config.json"}
    assert files == shards | side | {"tokenizer.json", "tokenizer_config.json", INDEX_FILE}
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (compressed / name).read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((tiny_llama / "config.json").read_text())
    assert figures.keys() == {
        "model", "out", "dtypes", "groups", "tensors", "shards", "stored_bytes", "exported_bytes",
        "untouched_bytes", "seconds",
    }  # fmt: skip
    source = ShardIndex.from_directory(tiny_llama)
    assert figures["exported_bytes"] + figures["untouched_bytes"] == source.stored_bytes
    assert figures["tensors"] == len(source.tensors)
    assert (figures["groups"], figures["shards"]) == (4, 5)
    status = json.loads(lestd("status", compressed, "--json").out)
    assert figures["stored_bytes"] == sum(one["stored_bytes"] for one in status["layers"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    assert 'license: "cc-by-sa-4.0"' in card
    assert "**not smaller**" in card
    assert "bfloat16" in card
    assert str(tmp_path) not in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_exports_are_the_same_bytes(compressed, tmp_path):
    for name in ("one", "two"):
        assert lestd("export", compressed, "--dense", tmp_path / name).code == 0
    assert digest_tree(tmp_path / "one") == digest_tree(tmp_path / "two")


def test_the_command_as_a_user_calls_it(compressed, tmp_path):
    """In a process of its own, into deep/out and an empty directory; piped progress is plain."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "deep" / "out", tmp_path / "empty"):
        run = run_lestd("export", compressed, "--dense", out)
        assert run.code == 0, run.err
        assert "4 groups" in run.out
        assert "38 tensors in 5 shards" in run.out
        assert run.err.splitlines()[0] == "export: 0 %"
        assert run.err.splitlines()[-1] == "export: 100 %"
    assert digest_tree(tmp_path / "deep" / "out") == digest_tree(tmp_path / "empty")


MEASURE = """
import sys
from pathlib import Path
from orchestrator.model.export import export_dense

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

warm, large, out = map(Path, sys.argv[1:])
export_dense(warm, out / "warm")
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
export_dense(large, out / "large")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_bounded_by_one_group(compressed, tmp_path):
    modules = next(iter(attention_groups("llama").values())).modules
    wide = GroupLayout(768, 192, modules)
    groups = {
        f"model.layers.{i}.self_attn": random_tucker(wide, "identity", "bitmask", i, (300, 100))
        for i in range(16)
    }
    embedding = {"model.embed_tokens.weight": torch.zeros(50_000, 768)}
    large = write_compressed(embedding, CONFIGS["llama"], groups, tmp_path / "large")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, compressed, large, tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    one_group = 4 * wide.elements
    written = sum(f.stat().st_size for f in (tmp_path / "out" / "large").glob("*.safetensors"))
    assert written > 30 * one_group
    # The unfolding beside its blocks, then beside the weights: three groups; and the copy buffer.
    assert int(run.stdout) < 4 * one_group + 16 * 2**20
