"""The experts of a layer, in the compressed domain; dense weights are never rebuilt.

Shapes: N tokens, k experts of each token, E experts, d model width, f hidden width of an expert,
r rank of a shared factor.

    y_n = sum over the experts e of token n of  w_ne act(x_n G_e, x_n U_e) D_e

Every expert has linear modules ``gate``, ``up`` and ``down`` of its own, or only ``up`` and
``down`` (act(x_n U_e) D_e), compressed as any other, and is called once with all of its tokens.
What the experts share is applied once per token instead of once per token and expert: a first
factor of all gates or ups, before the tokens are dealt out, and a last factor of all downs, after
the weighted sum over the experts.

Reference: TD-MoE (ICLR 2026) and the general form of a slice group, for experts that share U_in
and U_out; the routing is Transformers', as in `transformers.integrations.moe`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lestd_kernels.tensorize import GUARD_DTYPE, GUARD_SHAPE

_GATED = (("gate", "up", "down"), ("gating", "up", "down"))
_UNGATED = (("up", "down"),)
GUARD_NAME = "lestd_guard"
"""The guard's name in memory; on disk it has that of the parameter that it stands for."""
# Experts that Transformers deals their tokens out to before they are called.
_DEALT = ("Llama4TextExperts",)
# Experts whose class does not say so itself: whether their matrices are ``(in, out)``.
_TRANSPOSED = {"Llama4TextExperts": True, "Step3p7Experts": False}


def is_experts(module: Any) -> bool:
    """Whether a module holds all experts of a layer, stacked, as a `CompressedExperts` can."""
    usual = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    known = usual or type(module).__name__ in _TRANSPOSED
    return known and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def is_transposed(experts: Any) -> bool:
    """Whether the stacked matrices of experts are ``(in, out)``."""
    known = _TRANSPOSED.get(type(experts).__name__)
    return bool(experts.is_transposed) if known is None else known


def into_experts(experts: Any) -> str:
    """Name of the parameter that stacks what is before the activation: gates and ups, or ups."""
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def expert_modules(experts: Any) -> tuple[tuple[str, ...], ...]:
    """Names that the modules of each expert may have, the last that of its down projection.

    The second are for families whose routers are called ``gate``, of which Transformers takes any
    ``gate`` in a checkpoint for one.
    """
    return _GATED if getattr(experts, "has_gate", True) else _UNGATED


def compressed_experts(original: nn.Module, device: torch.device | str) -> CompressedExperts:
    """What stands in for experts; arguments as those of `CompressedExperts`."""
    dealt = type(original).__name__ in _DEALT
    return (DealtExperts if dealt else CompressedExperts)(original, device)


class CompressedExperts(nn.Module):
    """Stands in for the experts module of a Transformers model (Mixtral, Nemotron-H, GPT-OSS).

    Submodule ``expert_<e>`` holds the linear modules of expert e, once they have been put there:
    `CompressedLinear` or `ChainLinear` without a bias. Biases are this module's, stacked as in the
    original; so is the way from gate and up to the input of down, and the norm behind down if any.

    Args:
        original: the module to stand in for; its weights are dropped, its biases taken over.
        device: where the guard is made.
    """

    down_proj_bias: nn.Parameter | None

    def __init__(self, original: nn.Module, device: torch.device | str | None = None) -> None:
        super().__init__()
        source: Any = original
        self.num_experts = int(source.num_experts)
        self._interleaved = not getattr(source, "is_concatenated", True)
        self._into = into_experts(source)
        self._roles = expert_modules(source)
        if getattr(source, "has_post_expert_norm", False):
            self.post_expert_norm = source.post_expert_norm
        for name in (self._into, "down_proj"):
            delattr(original, name)
            bias = original._parameters.pop(f"{name}_bias", None)
            self.register_parameter(f"{name}_bias", bias)
        # In a tuple, so that it is no submodule: it has no tensor left, but knows its activation.
        self._original = (source,)
        for expert in range(self.num_experts):
            self.add_module(f"expert_{expert}", nn.Module())
        guard = torch.empty(GUARD_SHAPE, dtype=GUARD_DTYPE, device=device)
        self.register_buffer(GUARD_NAME, guard)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs of the experts, weighted and summed.

        Args:
            hidden_states: ``(N, d)``.
            top_k_index: ``(N, k)``, the experts of each token.
            top_k_weights: ``(N, k)``, their weights.

        Returns:
            ``(N, d)`` in the dtype of `hidden_states`.
        """
        *into, downs = self._modules_by_role()
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        tokens = order // top_k_index.shape[-1]

        # Once per token, before the tokens are dealt out to their experts.
        share = [_share(role, "first_factor") for role in into]
        entered = [
            role[0].enter(hidden_states) if shares else hidden_states
            for role, shares in zip(into, share, strict=True)
        ]
        dealt = [entered[0][tokens].split(counts)]
        for inputs in entered[1:]:
            same = inputs is entered[0]
            dealt.append(dealt[0] if same else inputs[tokens].split(counts))

        norm = getattr(self, "post_expert_norm", None)
        downs_share = norm is None and _share(downs, "last_factor")
        outputs = []
        for expert, count in enumerate(counts):
            if count:
                projected = [
                    role[expert](given[expert], entered=shares)
                    for role, given, shares in zip(into, dealt, share, strict=True)
                ]
                hidden = self._activate(projected, expert)
                outputs.append(downs[expert](hidden, leaving=not downs_share))
        if not outputs:
            return torch.zeros_like(hidden_states)
        found = torch.cat(outputs)
        weighted = (found if norm is None else norm(found)) * top_k_weights.reshape(-1, 1)[order]
        # Summed in the order of the router's choices: the same on every device.
        weighted = weighted[torch.argsort(order)]
        total = weighted.reshape(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)
        # Once per token, after the sum over its experts.
        total = downs[0].leave(total) if downs_share else total
        if self.down_proj_bias is not None:
            shares = top_k_weights.new_zeros(len(total), self.num_experts)
            shares = shares.scatter(1, top_k_index, top_k_weights).to(total.dtype)
            total = total + shares @ self.down_proj_bias.to(total.dtype)
        out: Tensor = total.to(hidden_states.dtype)
        return out

    def _modules_by_role(self) -> list[list[Any]]:
        """The experts' gates if they have any, ups and downs."""
        experts: list[Any] = [self.get_submodule(f"expert_{e}") for e in range(self.num_experts)]
        roles = next(names for names in self._roles if hasattr(experts[0], names[0]))
        return [[getattr(expert, role) for expert in experts] for role in roles]

    def _activate(self, projected: list[Tensor], expert: int) -> Tensor:
        """Input of down ``(n, f)``, by the original's way, which reads gate and up joined."""
        if self._interleaved:
            joined = torch.stack(projected, dim=-1).flatten(-2)
        else:
            joined = torch.cat(projected, dim=-1)
        bias = getattr(self, f"{self._into}_bias")
        if bias is not None:
            joined = joined + bias[expert].to(joined.dtype)
        [original] = self._original
        act = original._apply_gate if len(projected) > 1 else original.act_fn
        return act(joined)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Number of experts, for ``print(model)``."""
        return f"num_experts={self.num_experts}"


class DealtExperts(CompressedExperts):
    """Stands in for the experts of Llama 4, each of which is given every token.

    A token is multiplied by what the router gives the expert, so it is zero for most of them, and
    zero is what comes out then: those rows are not computed.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Outputs of the experts.

        Args:
            hidden_states: ``(E N, d)``, those of an expert one behind the other.

        Returns:
            ``(E N, d)``.
        """
        gates, ups, downs = self._modules_by_role()
        [original] = self._original
        inputs = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
        outputs = torch.zeros_like(inputs)
        for expert, given in enumerate(inputs):
            rows = given.any(dim=-1).nonzero()[:, 0]
            if len(rows):
                x = given[rows]
                hidden = original.act_fn(gates[expert](x)) * ups[expert](x)
                outputs = outputs.index_put(
                    (torch.full_like(rows, expert), rows), downs[expert](hidden)
                )
        return outputs.reshape(-1, hidden_states.shape[-1])


def _share(projections: list[Any], side: str) -> bool:
    """Whether all have one factor in common on that side."""
    # A module that adapters wrap has none.
    factors = [getattr(one, side, None) for one in projections]
    return factors[0] is not None and all(factor is factors[0] for factor in factors)
