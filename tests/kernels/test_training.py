"""Training a compressed model with Transformers' own Trainer, and what its dtype may become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from support.families import VOCABULARY, save_pair
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair("llama", "identity", "bitmask", tmp_path_factory.mktemp("llama"))[0]


def trained(directory: Path, out: Path) -> tuple[PreTrainedModel, list[float]]:
    ids = torch.randint(3, VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(7))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    trainer.train()
    trainer.save_model(str(out))
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_trains_factors_and_values_and_leaves_their_places(
    directory: Path, tmp_path: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    model, losses = trained(directory, tmp_path / "trained")
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    for name, tensor in after.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, before[name]), name
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert any("lestd_u1" in name for name in moved)
    assert any("q_proj.weight" in name for name in moved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_other_dtypes_are_had_by_loading_and_by_to(directory: Path) -> None:
    ids = torch.arange(3, 14)[None]
    for dtype in (torch.float16, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        moved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(dtype)
        with torch.no_grad():
            found, expected = moved(ids).logits, loaded(ids).logits
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)  # Rotary angles differ.
    for cast in (loaded.half, loaded.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()


def test_adapters_that_are_not_lora_refuse_a_compressed_projection(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"(?s)Target module CompressedLinear.*is not supported"):
        get_peft_model(model, config)
