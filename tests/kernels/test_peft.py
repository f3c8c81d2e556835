"""LoRA adapters of peft on compressed projections, through peft's own functions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.families import VOCABULARY, save_pair
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from lestd_kernels.errors import LestdError
from lestd_kernels.modules.shared_tucker_linear import CompressedLinear
from lestd_kernels.peft_plugin import CompressedLoraLinear, register

ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_neox": ["query_key_value", "dense"],
}
MODES = ["identity", "learned"]

pytestmark = pytest.mark.filterwarnings("error::UserWarning:peft")


class Pair(NamedTuple):
    directory: Path
    dense: PreTrainedModel


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Compressed directory and dense twin by (family, mode)."""
    register()
    return {
        (family, mode): Pair(*save_pair(family, mode, "bitmask", tmp_path_factory.mktemp(family)))
        for family in ATTENTION
        for mode in MODES
    }


def load(pair: Pair, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pair.directory, **options)


def lora(family: str = "llama", **options: object) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 12, "target_modules": ATTENTION[family]}
    return LoraConfig(**settings | {"task_type": "CAUSAL_LM"} | options)


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(7))


def train(model: torch.nn.Module, steps: int = 8) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def randomize(model: torch.nn.Module) -> None:
    """Give the adapters, which begin as zero, something to say."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ATTENTION)
def test_training_lowers_the_loss_and_changes_the_adapter_alone(pairs, family, mode):
    base = load(pairs[family, mode])
    expected = base(tokens()).logits
    model = get_peft_model(base, lora(family))
    adapted = [m for m in model.modules() if isinstance(m, CompressedLoraLinear)]
    assert len(adapted) == base.config.num_hidden_layers * len(ATTENTION[family])
    assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)  # B begins as zero
    before = copy.deepcopy(model.state_dict())
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
    with model.disable_adapter():
        assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ATTENTION)
def test_the_adapter_does_what_it_does_on_the_dense_model(pairs, tmp_path, family, mode):
    pair = pairs[family, mode]
    model = get_peft_model(load(pair), lora(family))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.stat().st_size > 100_000]
    twin = PeftModel.from_pretrained(copy.deepcopy(pair.dense), tmp_path)
    with torch.no_grad():
        expected = twin(tokens()).logits
        assert not torch.allclose(expected, pair.dense(tokens()).logits, atol=0.1)
        assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        # What the refusal to merge advises: merge into the dense model.
        merged = twin.merge_and_unload()
        assert_close(merged(tokens()).logits, expected, rtol=1e-3, atol=1e-3)


def test_saved_adapters_load_by_every_door(pairs, tmp_path):
    pair = pairs["llama", "identity"]
    model = get_peft_model(load(pair), lora())
    train(model, steps=3)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        again = PeftModel.from_pretrained(load(pair), tmp_path)
        assert torch.equal(again(tokens()).logits, expected)
        plain = load(pair)
        plain.load_adapter(tmp_path)
        assert torch.equal(plain(tokens()).logits, expected)
        plain.disable_adapters()
        assert torch.equal(plain(tokens()).logits, load(pair)(tokens()).logits)


def test_gradient_checkpointing_gives_the_same_gradients(pairs):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(load(pairs["llama", "identity"]), lora()).train()
        randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_adapters_switch_and_generate(pairs):
    model = get_peft_model(load(pairs["llama", "identity"]), lora())
    model.add_adapter("second", lora(r=5))
    randomize(model)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model.generate(tokens(), **settings)
        ids = tokens()
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(outputs[name], ids)
    assert not torch.equal(outputs["default"], outputs["second"])


def test_u1_is_still_applied_once_for_q_k_v(pairs):
    model = get_peft_model(load(pairs["llama", "identity"]), lora())
    inputs = []
    factor = model.get_base_model().model.layers[0].self_attn.lestd_u1
    factor.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    model(tokens())
    assert [x.shape[-1] for x in inputs] == [48, 17]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_below_a_float32_adapter(pairs, dtype):
    model = get_peft_model(load(pairs["llama", "identity"], dtype=dtype), lora())
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert model(tokens()).logits.dtype == dtype


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # peft's own way
def test_disk_offload_below_an_adapter(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # peft offloads the base model once more, below this directory
    pair = pairs["llama", "identity"]
    model = get_peft_model(load(pair), lora())
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    base = load(pair, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    offloaded = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map={"": "disk"}, offload_dir=str(tmp_path / "offload")
    )
    with torch.no_grad():
        assert torch.equal(offloaded(tokens()).logits, model(tokens()).logits)


def test_merging_is_refused_in_one_sentence_and_unloading_works(pairs):
    base = load(pairs["llama", "identity"])
    expected = base(tokens()).logits
    model = get_peft_model(base, lora())
    randomize(model)
    adapted = model(tokens()).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(LestdError, match=r"cannot be merged .*export DIR --dense OUT"):
            merge()
        assert torch.equal(model(tokens()).logits, adapted)
    restored = model.unload()
    assert isinstance(restored.model.layers[0].self_attn.q_proj, CompressedLinear)
    assert_close(restored(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_every_way_to_start_that_needs_no_weight(pairs, start):
    base = load(pairs["llama", "identity"])
    expected = base(tokens()).logits
    model = get_peft_model(base, lora(r=4, init_lora_weights=start))
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_A" in name)
    same = torch.allclose(model(tokens()).logits, expected, atol=1e-5)
    assert same == (start is not False)  # then B A = 0, and the model begins as it was


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
    ],
)
def test_what_needs_the_dense_weight_is_refused(pairs, options, named):
    model, config = load(pairs["llama", "identity"]), lora(**options)
    with pytest.raises(LestdError, match=named):
        get_peft_model(model, config)
