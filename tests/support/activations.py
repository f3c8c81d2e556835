"""What a calibration finds, by a plain float64 forward of the whole model with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from orchestrator.compression.calibration import Calibration
from orchestrator.config.run import RunConfig
from orchestrator.planning.calibration_costs import blocks_of
from orchestrator.planning.plan import make_plan
from orchestrator.source.checkpoint import Source, load_config, read_config_json
from orchestrator.source.texts import Samples
from support.families import VOCABULARY, save_tiny
from workers.calibration.contracts import CalibratedBlock
from workers.checkpoint.tensors import ShardIndex, read_tensor


def tiny_source(family: str, directory: Path) -> Source:
    save_tiny(family, directory)
    index = ShardIndex.from_directory(directory)
    config_json = read_config_json(directory)
    return Source(str(directory), None, directory, index, load_config(directory), config_json)


def some_samples(windows: int = 11, length: int = 13) -> Samples:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (windows, length), generator=generator).tolist()
    about = {"samples": windows, "sample_tokens": length}
    return Samples(tuple(map(tuple, ids)), about)


def all_blocks(
    source: Source, metric: str = "activation", gram_width: int | None = None
) -> list[CalibratedBlock]:
    """Attention and FFN or experts of every layer."""
    planned = make_plan(source, RunConfig(keep=0.6, scope="all", method="svd"))
    tasks = [one.task for one in planned.tasks]
    of_metric = (replace(t, method_args=t.method_args | {"metric": metric}) for t in tasks)
    return blocks_of(of_metric, gram_width)


# -- the oracle: one float64 forward of the whole model, with hooks -------------------------------


def expert_rows(
    experts: nn.Module, X: Tensor, index: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of each expert its number, inputs, hidden activations and outputs, by the definition."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    for e in range(len(gate_up)):
        rows = X[(index == e).any(dim=-1)]
        if hasattr(experts, "gate_up_proj_bias"):  # GPT-OSS: transposed, interleaved, clamped.
            both = rows @ gate_up[e] + experts.gate_up_proj_bias[e]
            gate = both[:, 0::2].clamp(max=experts.limit)
            up = both[:, 1::2].clamp(-experts.limit, experts.limit)
            hidden = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
            yield e, rows, hidden, hidden @ down[e]
        else:
            f = gate_up.shape[1] // 2
            hidden = nn.functional.silu(rows @ gate_up[e, :f].T) * (rows @ gate_up[e, f:].T)
            yield e, rows, hidden, hidden @ down[e].T


def oracle(
    source: Source, blocks: Sequence[CalibratedBlock], samples: Samples
) -> dict[str, Tensor]:
    """All that a calibration finds, in float64; rows of all windows, one behind the other."""
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.float64, experts_implementation="eager"
    )
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str, tensor: Tensor) -> None:
        rows.setdefault(name, []).append(tensor.reshape(-1, tensor.shape[-1]))

    def of_module(name: str, outputs: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            keep(name, args[0])
            if outputs:
                keep(f"{name}.out", output)

        return hook

    def of_experts(group: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for e, inputs, hidden, outputs in expert_rows(module, *args[:2]):
                keep(f"{group}.in_{e}", inputs)
                keep(f"{group}.hidden_{e}", hidden)
                keep(f"{group}.hidden_{e}.out", outputs)

        return hook

    for block in blocks:
        if block.path.endswith("experts"):
            model.get_submodule(block.path).register_forward_pre_hook(of_experts(block.path))
            continue
        # The last reader of each input, where calibration looks at the first.
        readers = {reads: module for module, reads in block.modules.items()}
        for reads, module in readers.items():
            hook = of_module(f"{block.path}.{reads}", reads == "hidden")
            model.get_submodule(f"{block.path}.{module}").register_forward_hook(hook)
    with torch.no_grad():
        for window in samples.token_ids:
            model(torch.tensor([window]), use_cache=False)
    found = {}
    for name, parts in rows.items():
        X = torch.cat(parts)
        if name.endswith(".out"):
            if len(X):
                found[name.removesuffix("out") + "out_max_abs"] = X.abs().amax(dim=0)
            continue
        zeros = X.new_zeros(X.shape[1])
        found[name] = X.T @ X
        found[f"{name}.mean_abs"] = X.abs().mean(dim=0) if len(X) else zeros
        found[f"{name}.max_abs"] = X.abs().amax(dim=0) if len(X) else zeros
        found[f"{name}.tokens"] = torch.tensor([len(X)])
    return found


def check(calibration: Calibration, expected: dict[str, Tensor]) -> None:
    assert calibration.refs.keys() == expected.keys()
    for name, ref in calibration.refs.items():
        found = read_tensor(ref)
        if name.endswith(".tokens"):
            assert torch.equal(found, expected[name]), name
            continue
        assert found.dtype == torch.float32
        assert found.shape == expected[name].shape
        error = (found - expected[name]).norm()
        assert error <= 1e-5 * expected[name].norm(), name
