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
    """Of every module, by the name of its B, the gradients of its outputs ``(T, m)``, float64.

    Scaled so that the products of their squares and those of the inputs have the sum of the squares
    of the windows' gradients by the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float64, experts_implementation="eager"
    )
    outputs: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str, inputs: Tensor, output: Tensor) -> Tensor:
        output.retain_grad()
        X = inputs.detach().reshape(-1, inputs.shape[-1])
        outputs.setdefault(f"{name}.output", []).append((X, output))
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
                    gate = keep(f"{group}.expert_{e}.gate", rows, both[:, 0::2])
                    up = keep(f"{group}.expert_{e}.up", rows, both[:, 1::2])
                    clamped = gate.clamp(max=module.limit)
                    hidden = clamped * torch.sigmoid(module.alpha * clamped)
                    hidden = hidden * (up.clamp(-module.limit, module.limit) + 1)
                    made = hidden @ module.down_proj[e] + module.down_proj_bias[e]
                else:
                    gate = keep(
                        f"{group}.expert_{e}.gate", rows, rows @ module.gate_up_proj[e, :f].T
                    )
                    up = keep(f"{group}.expert_{e}.up", rows, rows @ module.gate_up_proj[e, f:].T)
                    hidden = silu(gate) * up
                    made = hidden @ module.down_proj[e].T
                made = keep(f"{group}.expert_{e}.down", hidden, made)
                total = total.index_add(0, token, made * weights[token, rank, None])
            return total

        model.get_submodule(group).register_forward_hook(hook)

    def linear(group: str, module: str) -> None:
        model.get_submodule(f"{group}.{module}").register_forward_hook(
            lambda _, args, output: keep(f"{group}.{module}", args[0], output)
        )

    for block in blocks:
        if block.path.endswith("experts"):
            experts(block.path)
            continue
        for module in block.modules:
            linear(block.path, module)
    rows: dict[str, list[Tensor]] = {}
    read: dict[str, list[Tensor]] = {}
    exact: dict[str, float] = {}
    for number, window in enumerate(samples.token_ids):
        logits = model(torch.tensor([window]), use_cache=False).logits[0]
        labels = sampled_labels(logits.detach(), number)
        cross_entropy(logits, labels, reduction="sum").backward()
        for name, made in outputs.items():
            for X, one in made:
                grad = torch.zeros_like(one) if one.grad is None else one.grad
                G = grad.reshape(-1, one.shape[-1])
                rows.setdefault(name, []).append(G)
                read.setdefault(name, []).append(X)
                exact[name] = exact.get(name, 0.0) + float((X.T @ G).square().sum())
        outputs.clear()
    found = {}
    for name, parts in rows.items():
        G, X = torch.cat(parts), torch.cat(read[name])
        product = float(G.square().sum() * X.square().sum())
        found[name] = G * (exact[name] * len(X) / product) ** 0.5 if product else G
    return found


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
