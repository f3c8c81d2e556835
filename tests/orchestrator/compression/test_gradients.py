"""Gradients of a model's outputs against autograd on the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.activations import all_blocks, check, oracle, some_samples, tiny_source
from support.families import FAMILIES
from support.gradients import check_gradients, gradient_rows
from transformers import AutoModelForCausalLM

from lestd_kernels.linalg.metric import Metric, diagonal_of
from orchestrator.compression.calibration import calibrate
from orchestrator.execution.serial import SerialExecutor
from orchestrator.planning import calibration_costs
from workers.calibration import gradients
from workers.calibration.gradients import SumOfWindows
from workers.checkpoint.tensors import read_tensor


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(
    family: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:
        monkeypatch.setattr(calibration_costs, "_WHOLE_WIDTH", 0)
    source = tiny_source(family, tmp_path / "model")
    blocks, samples = all_blocks(source, "loss"), some_samples()
    found = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration")
    gradients = {name: ref for name, ref in found.refs.items() if name.endswith(".output")}
    rows = gradient_rows(source, blocks, samples)
    assert gradients.keys() == rows.keys()
    for name, ref in gradients.items():
        check_gradients(read_tensor(ref), rows[name], 11 * 13, name)
    rest = {name: ref for name, ref in found.refs.items() if name not in gradients}
    check(found.__class__(found.directory, found.digest, rest), oracle(source, blocks, samples))
    assert not (tmp_path / "calibration" / "pieces").exists()


def test_noise_costs_what_is_expected_of_it(tmp_path: Path) -> None:
    """Against the divergence of the whole model's predictions, in float64."""
    source, samples = tiny_source("llama", tmp_path / "model"), some_samples(200, 8)
    blocks = all_blocks(source, "loss")
    refs = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration").refs
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float64)
    tokens, ratios = torch.tensor(samples.token_ids), []

    @torch.no_grad()
    def predictions() -> torch.Tensor:
        return model(tokens, use_cache=False).logits.log_softmax(dim=-1)

    dense = predictions()
    for block in blocks:
        for module, reads in block.modules.items():
            name = f"{block.path}.{reads}"
            A = read_tensor(refs[name]) / read_tensor(refs[f"{name}.tokens"])
            B = read_tensor(refs[f"{block.path}.{module}.output"])
            weight = model.get_parameter(f"{block.path}.{module}.weight")
            W, expected, measured = weight.detach().clone(), 0.0, 0.0
            for seed in range(4):
                generator = torch.Generator().manual_seed(seed)
                D = 1e-2 * W.std() * torch.randn(W.shape, generator=generator, dtype=W.dtype)
                expected += Metric(A, B).squares(D.T.float()) / 2
                weight.data = W + D
                measured += float((dense.exp() * (dense - predictions())).sum(dim=-1).mean())
            weight.data = W
            ratios.append(measured / expected)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.05)
    # K-FAC takes tokens for independent: those that V moves are not.
    assert min(ratios) > 0.7
    assert max(ratios) < 2


def test_the_heaviest_window_of_each_piece_counts_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as the next one here, so that it is so in every piece and module."""
    monkeypatch.setattr(gradients, "_MOST_WEIGHT", 1.0)
    source = tiny_source("llama-gqa", tmp_path / "model")
    blocks, samples = all_blocks(source, "loss"), some_samples(8 * 5)
    refs = calibrate(source, blocks, samples, SerialExecutor(), tmp_path / "calibration").refs
    for name, rows in gradient_rows(source, blocks, samples).items():
        G = rows.view(8, 5, 13, -1)
        weights = G.square().sum(dim=(2, 3))
        following, heaviest = weights.sort().values[:, -2:].T
        shares = torch.where(weights == heaviest[:, None], (following / heaviest)[:, None], 1.0)
        scaled = (G * shares.sqrt()[:, :, None, None]).flatten(0, 2)
        check_gradients(read_tensor(refs[name]), scaled, 8 * 5 * 13, name)


def sum_of(windows: list[torch.Tensor]) -> torch.Tensor:
    squares = SumOfWindows()
    for one in windows:
        squares.window["q"] = one.clone()
        squares.end_window()
        assert not squares.window
    total = squares.total()["q"]
    assert not squares.total()
    return total


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("shape", [(6,), (6, 6), (2, 3, 3)])
def test_no_window_outweighs_the_others(shape: tuple[int, ...], place: int) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    roots = [torch.rand(shape, generator=generator) for _ in range(5)]
    alike = [R.square() if R.dim() == 1 else R @ R.mT for R in roots]
    weights = [float(diagonal_of(B).sum()) for B in alike]
    assert max(weights) < 2 * min(weights)
    torch.testing.assert_close(sum_of(alike), torch.stack(alike).sum(dim=0))

    given = [B * (1000 if one == place else 1) for one, B in enumerate(alike)]
    others = [one for one in range(5) if one != place]
    most = 2 * max(weights[one] for one in others)
    expected = sum(alike[one] for one in others) + alike[place] * most / weights[place]
    torch.testing.assert_close(sum_of(given), expected)
    # Of three nobody can tell which is the odd one, and zeros are no measure.
    few = [given[place], *(alike[one] for one in others[:2])]
    torch.testing.assert_close(sum_of(few), torch.stack(few).sum(dim=0))
    lonely = [B * (one == place) for one, B in enumerate(alike)]
    torch.testing.assert_close(sum_of(lonely), alike[place])
