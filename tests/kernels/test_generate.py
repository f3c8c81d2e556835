"""generate() and compiled, half-precision and autocast forwards of compressed models.

Greedy generation with the default cache and left padding stands in test_plugin.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.families import VOCABULARY, save_pair
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

CASES = [
    ("llama-gqa", "identity", "bitmask"),
    ("gpt_neox", "learned", "bitmask"),
    ("opt", "identity", "csr"),
]
HALVES = [torch.bfloat16, torch.float16]


class Pair(NamedTuple):
    directory: Path
    dense: PreTrainedModel

    def load(self, **options: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.directory, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Compressed directory and the dense model with W-hat put back, by family and type mode."""
    return {case: Pair(*save_pair(*case, tmp_path_factory.mktemp(case[0]))) for case in CASES}


def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 2)):
        mask[row, : 9 - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


GENERATIONS = {
    "no cache": {"use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "beam search": {"num_beams": 3, "length_penalty": 0.5, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_batch_generates_the_tokens_of_the_dense_model(pairs, case, options):
    settings = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": -1} | options
    tokens = []
    for model in (pairs[case].dense, pairs[case].load()):
        torch.manual_seed(11)
        tokens.append(model.generate(**prompts(), **settings))
    expected, found = tokens
    assert found.shape == (3 * options.get("num_return_sequences", 1), 16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_each_prompt_of_a_padded_batch_generates_what_it_does_alone(pairs, case):
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}
    model, batch = pairs[case].load(), prompts()
    together = model.generate(**batch, **settings)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model.generate(batch["input_ids"][row, mask][None], **settings)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_half_precision_rounds_about_as_the_dense_model_does(pairs, case, dtype):
    model, dense = pairs[case].load(dtype=dtype), pairs[case].dense
    half, batch = copy.deepcopy(dense).to(dtype), prompts()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = dense(**batch).logits[real]
        found = model(**batch).logits[real]
        unit = error(half(**batch).logits[real], exact)
    assert found.dtype == dtype
    assert error(found, exact) < 3 * unit < 0.1

    # The cache holds half precision too: token by token gives what one long forward gives.
    settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": -1}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    run = model.generate(**batch, **settings)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        whole = model(run.sequences, attention_mask=mask).logits[:, -6:-1].float()
    assert error(torch.stack(run.logits, dim=1), whole) < 3 * unit


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, half) for half in HALVES] + [(torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_autocast_rounds_about_as_for_the_dense_model(pairs, case, stored, dtype):
    model, dense = pairs[case].load(dtype=stored), pairs[case].dense
    half, batch = copy.deepcopy(dense).to(stored), prompts()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = dense(**batch).logits[real]
        with torch.autocast("cpu", dtype=dtype):
            found, expected = model(**batch).logits[real], half(**batch).logits[real]
    assert found.dtype == expected.dtype == dtype
    assert error(found, exact) < 3 * error(expected, exact) < 0.1
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": -1}
    with torch.autocast("cpu", dtype=dtype):
        sequences = model.generate(**batch, **settings)
        with torch.no_grad():  # autocast reaches every step: the last token is the likeliest
            mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.int64)], dim=1)
            last = model(sequences[:, :-1], attention_mask=mask).logits[:, -1]
    chosen = last.gather(1, sequences[:, -1:])[:, 0]
    assert_close(chosen, last.amax(dim=1), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_gradients_under_autocast(pairs, case):
    model = pairs[case].load().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**prompts(), labels=prompts()["input_ids"]).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "case",
    [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids="-".join,
)
def test_the_forward_is_one_graph_and_generates_the_same(pairs, case):
    """Without inductor, which the next test uses: the graph is what this one is about."""
    model = pairs[case].load()
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": -1}
    settings |= {"cache_implementation": "static"}
    expected = model.generate(**prompts(), **settings)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(**prompts(), **settings), expected)


@pytest.mark.slow
def test_inductor_in_its_default_mode(pairs):
    model = pairs[CASES[0]].load()
    compiled = torch.compile(model, fullgraph=True)
    ids = prompts()["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
