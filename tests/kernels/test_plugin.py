"""Compressed models through the real from_pretrained, save_pretrained, generate and accelerate."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from support.families import (
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
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import lestd_kernels
from lestd_kernels.formats.shared_tucker import SharedTucker
from lestd_kernels.modules.shared_tucker_linear import CompressedLinear, Factor
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.storage.matrix import EncodedCore
from lestd_kernels.tensorize import PROJECTIONS, GroupLayout


class Pair(NamedTuple):
    directory: Path
    dense: PreTrainedModel


CASES = [(family, "identity") for family in FAMILIES] + [(f, "learned") for f in MHA_FAMILIES]
# Codecs know of no family: all of them, with a separate and a fused projection.
TWO_CASES = [("llama-gqa", "identity"), ("gpt_neox", "learned")]
CODEC_CASES = [(*case, "bitmask") for case in CASES if case not in TWO_CASES]
CODEC_CASES += [(*case, codec) for case in TWO_CASES for codec in CODECS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """``save_pair`` by family, type mode and codec; each pair is made once."""

    @functools.cache
    def make(family: str, mode: str = "identity", codec: str = "bitmask") -> Pair:
        return Pair(*save_pair(family, mode, codec, tmp_path_factory.mktemp(f"{family}-{mode}")))

    return make


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def load(directory: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize(("family", "mode", "codec"), CODEC_CASES)
def test_logits_equal_the_dense_model_with_the_reconstruction_put_back(pair, family, mode, codec):
    case = pair(family, mode, codec)
    model = load(case.directory)
    ids = tokens()
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    with torch.no_grad():
        for mask in (None, padding):
            expected = case.dense(ids, attention_mask=mask).logits
            found = model(ids, attention_mask=mask).logits
            real = slice(None) if mask is None else mask.bool()
            assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_generation_with_kv_cache_and_left_padding_equals_the_dense_model(pair, family, mode):
    case = pair(family, mode)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": -1}
    expected = case.dense.generate(ids, **options)
    found = load(case.directory).generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("family", "mode"), TWO_CASES)
def test_save_and_load_again_and_again_keeps_every_tensor(pair, tmp_path, family, mode, codec):
    case = pair(family, mode, codec)
    first = load(case.directory)
    first.save_pretrained(tmp_path / "once", max_shard_size="30KB")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    load(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert_same_tensors(stored(case.directory), stored(tmp_path / "once"))
    assert_same_tensors(stored(case.directory), stored(tmp_path / "twice"))
    assert torch.equal(first(tokens()).logits, load(tmp_path / "twice")(tokens()).logits)


@pytest.mark.parametrize("codec", CODECS)
def test_the_asked_dtype_reaches_values_and_leaves_indices_alone(pair, codec):
    case = pair("llama", "identity", codec)
    model = load(case.directory, dtype=torch.bfloat16)
    kept = stored(case.directory)
    for name, tensor in model.state_dict().items():
        if name in kept and not kept[name].is_floating_point():
            assert torch.equal(tensor, kept[name]), name
            assert tensor.dtype == kept[name].dtype, name
        else:
            assert tensor.dtype == torch.bfloat16, name
    with torch.no_grad():
        logits = model(tokens()).logits
    assert logits.dtype == torch.bfloat16
    expected = copy.deepcopy(case.dense).to(torch.bfloat16)(tokens()).logits
    assert_close(logits.float(), expected.float(), rtol=0.1, atol=0.1)


PLACES = {
    "auto": "auto",
    "all on disk": {"": "disk"},
    "some layers on disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["identity", "learned"])
@pytest.mark.parametrize("codec", CODECS)
def test_device_map_and_disk_offload(pair, tmp_path, codec, mode, place):
    case = pair("llama", mode, codec)
    model = load(case.directory, device_map=PLACES[place], offload_folder=tmp_path)
    with torch.no_grad():
        found = model(tokens()).logits
        assert torch.equal(found, load(case.directory)(tokens()).logits)
    if place == "auto":
        return
    U1 = model.model.layers[0].self_attn.lestd_u1.weight
    assert U1.is_meta, "the factor should be on disk between calls"


def test_disk_offload_with_indices_offloaded_too_runs_and_saves(pair, tmp_path):
    case = pair("llama", "identity", "csr")
    model = load(
        case.directory,
        device_map={"": "disk"},
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(case.directory)(tokens()).logits)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(stored(case.directory), stored(tmp_path / "saved"))


@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_deepcopy_has_factors_of_its_own(pair, mode):
    model = load(pair("llama", mode).directory)
    before = model(tokens()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, before)
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, Factor):
                module.weight.zero_()
    assert torch.equal(model(tokens()).logits, before)
    attention = twin.model.layers[0].self_attn
    assert not attention.q_proj(torch.ones(1, 48)).any(), "the copy still uses the old factors"


@pytest.mark.parametrize("mode", ["identity", "learned"])
def test_each_tensor_stands_once_in_the_state_dict(pair, mode):
    case = pair("llama", mode)
    assert load(case.directory).state_dict().keys() == stored(case.directory).keys()


def recognizable_slice(layout: GroupLayout, projection: str, head: int) -> torch.Tensor:
    """W_s (d x p) whose every element tells projection, head, row and column."""
    mark = 10 * (PROJECTIONS.index(projection) + 1) + head
    rows, columns = torch.arange(layout.width) / 100, torch.arange(layout.head_dim) / 2500
    return mark + rows[:, None] + columns


@pytest.mark.parametrize("family", FAMILIES)
def test_recognizable_heads_end_where_the_attention_code_looks_for_them(tmp_path, family):
    dense = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path / "dense"))
    groups = {}
    for path, layout in attention_groups(family).items():
        basis = random_tucker(layout, "identity", "dense", ranks=(layout.width, layout.head_dim))
        cores = {}
        for module in layout.modules:
            slices = [recognizable_slice(layout, *s) for s in module.slices]
            M = torch.cat([basis.U1.T @ W @ basis.U2 for W in slices], dim=1)
            cores[module.name] = EncodedCore.encode(M)
        groups[path] = SharedTucker(layout, basis.U1, basis.U2, cores)
    write_compressed(dense.state_dict(), dense.config, groups, tmp_path / "small")
    model = load(tmp_path / "small")
    for path, layout in attention_groups(family).items():
        d, p = layout.width, layout.head_dim
        for module in layout.modules:
            projection = model.get_submodule(f"{path}.{module.name}")
            bias = 0 if projection.bias is None else projection.bias
            with torch.no_grad():
                out = projection(torch.eye(projection.in_features)) - bias
            if module.basis_side == "output":  # rows of the input belong to heads
                found = {("o", i): out.view(-1, p, d)[i].T for i in range(len(module.slices))}
            elif family == "gpt_neox":  # the view in GPTNeoXAttention: heads, then q k v
                fused = out.view(d, -1, 3, p)
                found = {("qkv"[t], i): fused[:, i, t] for i in range(4) for t in range(3)}
            else:  # the view in the others: heads
                name = module.name[0]
                found = {(name, i): out.view(d, -1, p)[:, i] for i in range(len(module.slices))}
            assert found.keys() == set(module.slices)
            for key, W in found.items():
                assert_close(W, recognizable_slice(layout, *key), rtol=0, atol=2e-4)


def applications(factor: torch.nn.Module) -> list[torch.Tensor]:
    """Inputs that `factor` is applied to from now on."""
    inputs: list[torch.Tensor] = []
    factor.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize(
    ("family", "context"),
    [
        *((family, torch.inference_mode) for family in FAMILIES),
        ("llama", torch.no_grad),
        ("llama", torch.enable_grad),
    ],
)
def test_u1_is_applied_once_for_q_k_v_and_once_at_the_end(pair, family, context):
    model = load(pair(family).directory)
    path = next(iter(attention_groups(family)))
    inputs = applications(model.get_submodule(f"{path}.lestd_u1"))
    with context():
        model(tokens())
    d, R1 = model.get_submodule(f"{path}.lestd_u1").weight.shape
    assert [x.shape[-1] for x in inputs] == [d, R1]


def test_gradients_reach_inputs_factors_and_values(pair):
    case = pair("llama-gqa", "identity", "csr")
    model = load(case.directory).train()
    embeddings = {}
    for name, network in (("lestd", model), ("dense", case.dense)):
        inputs = network.get_input_embeddings()(tokens()).detach().requires_grad_()
        network(inputs_embeds=inputs).logits.square().mean().backward()
        embeddings[name] = inputs.grad
    assert_close(embeddings["lestd"], embeddings["dense"], rtol=1e-3, atol=1e-6)
    attention = model.model.layers[0].self_attn
    for tensor in (attention.lestd_u1.weight, attention.lestd_u2.weight, attention.o_proj.weight):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_loads_without_its_prefix_and_back(pair, tmp_path, family):
    case = pair(family)
    base = AutoModel.from_pretrained(case.directory)
    expected = case.dense.base_model(tokens()).last_hidden_state
    assert_close(base(tokens()).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base").base_model
    assert_same_tensors(base.state_dict(), again.state_dict())


def test_another_head_loads_too(pair):
    model = AutoModelForSequenceClassification.from_pretrained(pair("llama").directory)
    assert isinstance(model.model.layers[1].self_attn.v_proj, CompressedLinear)


def test_meta_device(pair):
    model = load(pair("llama").directory, device_map={"": "meta"})
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model(tokens().to("meta")).logits.shape == (2, 11, VOCABULARY)


def test_registering_twice_is_harmless(pair):
    lestd_kernels.transformers_plugin.register()
    importlib.reload(lestd_kernels)
    load(pair("llama").directory)


@pytest.mark.parametrize("offload", [{}, {"device_map": {"": "disk"}}])
def test_layers_can_share_a_factor_that_stands_above_them(pair, tmp_path, offload):
    """Factors are named by path, so groups of different layers may name the same one."""
    case = pair("llama")

    def share(config: dict) -> None:
        for group in config["groups"]:
            group["factors"]["U1"] = "model.lestd_u1"

    directory = edited(case.directory, tmp_path / "shared", share)
    tensors = stored(directory)
    own = [f"model.layers.{i}.self_attn.lestd_u1.weight" for i in range(2)]
    tensors["model.lestd_u1.weight"] = tensors.pop(own[0])
    del tensors[own[1]]
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    separate = load(case.directory)
    with torch.no_grad():
        separate.get_parameter(own[1]).copy_(separate.get_parameter(own[0]))
        expected = separate.model(tokens()).last_hidden_state
        for loader in (AutoModelForCausalLM, AutoModel):
            shared = loader.from_pretrained(directory, offload_folder=tmp_path, **offload)
            inputs = applications(shared.base_model.lestd_u1)
            assert torch.equal(shared.base_model(tokens()).last_hidden_state, expected)
            assert [x.shape[-1] for x in inputs] == [48, 17] * 2


@pytest.mark.parametrize(("family", "mode"), [("llama", "identity"), ("opt", "learned")])
@pytest.mark.parametrize(
    "copied",
    [
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(cloudpickle.dumps(model)),
        copy.deepcopy,
    ],
    ids=["pickle", "cloudpickle", "deepcopy"],
)
def test_a_loaded_model_can_be_handed_to_another_process(pair, family, mode, copied):
    """Its 16-bit column indices, too, for which plain pickle has no form."""
    model = AutoModelForCausalLM.from_pretrained(pair(family, mode, "csr").directory).eval()
    again = copied(model)
    assert {name: t.dtype for name, t in again.state_dict().items()} == {
        name: t.dtype for name, t in model.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
