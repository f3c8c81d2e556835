"""Compressed models through the real from_pretrained, save_pretrained, generate and accelerate."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import (
    FAMILIES,
    MHA_FAMILIES,
    VOCABULARY,
    attention_groups,
    random_tucker,
    save_tiny,
    write_compressed,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import lestd_kernels
from lestd_kernels import LestdError
from lestd_kernels.codecs import CODECS
from lestd_kernels.linear import CompressedLinear, Factor

CASES = [(family, "identity") for family in FAMILIES] + [(f, "learned") for f in MHA_FAMILIES]


@dataclass
class Pair:
    """A compressed directory, and the dense model with its reconstruction put back."""

    directory: Path
    dense: PreTrainedModel


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Pairs by family, type mode and codec; each is made once."""
    made: dict[tuple[str, str, str], Pair] = {}

    def make(family: str, mode: str = "identity", codec: str = "bitmask") -> Pair:
        key = (family, mode, codec)
        if key not in made:
            root = tmp_path_factory.mktemp("-".join(key))
            dense = AutoModelForCausalLM.from_pretrained(save_tiny(family, root / "dense"))
            groups = {
                path: random_tucker(layout, mode, codec, seed)
                for seed, (path, layout) in enumerate(attention_groups(family).items())
            }
            state = dense.state_dict()
            if dense.config.tie_word_embeddings:
                del state["lm_head.weight"]
            write_compressed(state, dense.config, groups, root / "small")
            with torch.no_grad():
                for path, group in groups.items():
                    for name, weight in group.to_dense().items():
                        dense.get_submodule(f"{path}.{name}").weight.copy_(weight)
            made[key] = Pair(root / "small", dense)
        return made[key]

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


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("family", "mode"), CASES)
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
@pytest.mark.parametrize(("family", "mode"), [("llama-gqa", "identity"), ("gpt_neox", "learned")])
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


def test_disk_offload_with_buffers_offloaded_too(pair, tmp_path):
    case = pair("llama", "identity", "csr")
    model = load(
        case.directory, device_map={"": "disk"}, offload_folder=tmp_path, offload_buffers=True
    )
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, load(case.directory)(tokens()).logits)


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


def products_with_U1(model: PreTrainedModel, path: str) -> list[torch.Tensor]:
    """Inputs that the U1 of one block is applied to, in one forward of the whole model."""
    inputs: list[torch.Tensor] = []
    factor = model.get_submodule(path)
    factor.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    model(tokens())
    return inputs


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("family", FAMILIES)
def test_U1_is_applied_once_for_q_k_v_and_once_at_the_end(pair, family, context):
    model = load(pair(family).directory)
    path = next(iter(attention_groups(family)))
    with context():
        inputs = products_with_U1(model, f"{path}.lestd_u1")
    d, R1 = model.get_submodule(f"{path}.lestd_u1").weight.shape
    assert [x.shape[-1] for x in inputs] == [d, R1]


def test_no_dense_weight_is_rebuilt(pair):
    """No operation of a forward makes a tensor as large as a projection's weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    model = load(pair("llama").directory)
    attention = model.model.layers[0].self_attn
    core = 17 * 4 * 7
    with torch.no_grad(), Sizes() as sizes:
        attention.o_proj(attention.q_proj(torch.ones(2, 48)))
    assert sizes.largest < 48 * 48
    assert sizes.largest >= core


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


WITHOUT_IMPORT = """
import sys
from transformers import AutoModelForCausalLM
options = {"device_map": {"": "disk"}, "offload_folder": sys.argv[2]} if len(sys.argv) > 2 else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
assert not any(name.startswith("lestd") for name in sys.modules)
import torch
model(torch.ones(1, 3, dtype=torch.long))
print("LOADED")
"""


@pytest.mark.parametrize(
    ("family", "mode", "codec"),
    [
        ("llama", "identity", "bitmask"),
        ("opt", "learned", "dense"),
        ("gpt_neox", "identity", "csr"),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_transformers_alone_fails_loudly(pair, tmp_path, family, mode, codec, offload):
    arguments = [pair(family, mode, codec).directory] + [tmp_path] * offload
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "LOADED" not in run.stdout
    assert "Error" in run.stderr


def edited(directory: Path, target: Path, change) -> Path:
    """A copy of a compressed directory whose quantization_config went through `change`."""
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


def group_change(**values):
    return lambda config: config["groups"][0].update(values)


BAD_CONFIGS = {
    "format_version 9": lambda config: config.update(format_version=9),
    "kind 'tensor_train'": group_change(kind="tensor_train"),
    "value_type 'int4'": group_change(value_type="int4"),
    "codec 'zip'": lambda c: c["groups"][0]["modules"]["k_proj"].update(codec="zip"),
    "model.layers.7.self_attn": group_change(path="model.layers.7.self_attn"),
    "found NoneType": lambda c: c["groups"][0]["modules"].update(extra_proj={}),
    "found SiLU": lambda c: c["groups"][0].update(path="model.layers.0.mlp", modules={"act_fn": 1}),
    "(36, 48)": lambda c: c["groups"][0]["modules"]["v_proj"].update(slices=3),
    "has no 'ranks'": lambda c: c["groups"][1].pop("ranks"),
    "disagree about the shape": lambda c: (
        c["groups"][1].update(factors=c["groups"][0]["factors"])
        or c["groups"][1]["ranks"].update(R1=9)
    ),
}


@pytest.mark.parametrize("found", BAD_CONFIGS)
def test_bad_configuration_is_refused_in_one_sentence(pair, tmp_path, found):
    directory = edited(pair("llama").directory, tmp_path / "bad", BAD_CONFIGS[found])
    with pytest.raises(LestdError) as caught:
        load(directory)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_refused_and_named(pair, tmp_path):
    directory = edited(pair("llama").directory, tmp_path / "bad", lambda config: None)
    name = "model.layers.1.self_attn.lestd_u2.weight"
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LestdError, match=name):
        load(directory)


def test_two_layers_can_share_one_factor(pair, tmp_path):
    """Factors are named by path, so a group may use another group's U1."""
    case = pair("llama")
    config = json.loads((case.directory / "config.json").read_text())["quantization_config"]
    own = config["groups"][0]["factors"]["U1"]
    other = config["groups"][1]["factors"]["U1"]
    directory = edited(
        case.directory,
        tmp_path / "shared",
        lambda config: config["groups"][1]["factors"].update(U1=own),
    )
    shared = load(directory)
    separate = load(case.directory)
    with torch.no_grad():
        separate.get_submodule(other).weight.copy_(separate.get_submodule(own).weight)
    assert f"{other}.weight" not in shared.state_dict()
    assert torch.equal(shared(tokens()).logits, separate(tokens()).logits)
