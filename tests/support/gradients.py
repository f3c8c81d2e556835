"""B of every module, by a float64 forward and backward of the whole model at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM

from orchestrator.source.checkpoint import Source
from orchestrator.source.texts import Samples
from workers.calibration.contracts import CalibratedBlock
from workers.calibration.gradients import sampled_labels


def gradient_rows(
    source: Source, blocks: Sequence[CalibratedBlock], samples: Samples
) -> dict[str, Tensor]:
    """The gradient of every module's outputs ``(T, m)``, by the names of their B; float64."""
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float64, experts_implementation="eager"
    )
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, output: Tensor) -> Tensor:
        output.retain_grad()
        outputs.setdefault(f"{name}.output", []).append(output)
        return output

    def experts(group: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
            X, chosen, weights = args
            total = torch.zeros_like(X)
            for e in range(len(module.gate_up_proj)):
                token, rank = torch.where(chosen == e)
                rows = X[token]
                f = module.down_proj.shape[1 if hasattr(module, "down_proj_bias") else 2]
                if hasattr(module, "down_proj_bias"):  # GPT-OSS: transposed, interleaved, clamped.
                    both = rows @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
                    gate = keep(f"{group}.expert_{e}.gate", both[:, 0::2])
                    up = keep(f"{group}.expert_{e}.up", both[:, 1::2])
                    clamped = gate.clamp(max=module.limit)
                    hidden = clamped * torch.sigmoid(module.alpha * clamped)
                    hidden = hidden * (up.clamp(-module.limit, module.limit) + 1)
                    made = hidden @ module.down_proj[e] + module.down_proj_bias[e]
                else:
                    gate = keep(f"{group}.expert_{e}.gate", rows @ module.gate_up_proj[e, :f].T)
                    up = keep(f"{group}.expert_{e}.up", rows @ module.gate_up_proj[e, f:].T)
                    made = (silu(gate) * up) @ module.down_proj[e].T
                made = keep(f"{group}.expert_{e}.down", made)
                total = total.index_add(0, token, made * weights[token, rank, None])
            return total

        model.get_submodule(group).register_forward_hook(hook)

    def linear(group: str, module: str) -> None:
        model.get_submodule(f"{group}.{module}").register_forward_hook(
            lambda _, args, output: keep(f"{group}.{module}", output)
        )

    for block in blocks:
        if block.path.endswith("experts"):
            experts(block.path)
            continue
        for module in block.modules:
            linear(block.path, module)
    rows: dict[str, list[Tensor]] = {}
    for number, window in enumerate(samples.token_ids):
        logits = model(torch.tensor([window]), use_cache=False).logits[0]
        labels = sampled_labels(logits.detach(), number)
        cross_entropy(logits, labels, reduction="sum").backward()
        for name, made in outputs.items():
            for one in made:
                grad = torch.zeros_like(one) if one.grad is None else one.grad
                rows.setdefault(name, []).append(grad.reshape(-1, one.shape[-1]))
        outputs.clear()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def check_gradients(found: Tensor, G: Tensor, tokens: int, name: str) -> None:
    """That B is ``G^T G / tokens``, of it the blocks, or the diagonal, that it has room for."""
    expected = G.T @ G / tokens
    if found.dim() == 1:
        expected = expected.diagonal()
    elif found.dim() == 3:
        width = found.shape[1]
        starts = range(0, len(expected), width)
        expected = torch.stack([expected[i : i + width, i : i + width] for i in starts])
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm(), name
