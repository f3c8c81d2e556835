"""The options of the methods, each written once: its type, its default, and what it does.

The arguments of a method, the command line, run.yaml and docs/options.md all derive from the fields
of `MethodOptions`. Nothing heavy is imported here: the command line shows its help from it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_args

Metric = Literal["weight", "norm", "activation", "loss"]
"""In which norm an error is made small: Frobenius, with inputs scaled by the preceding norm, with
the inputs of a calibration text, or with these and what outputs do to the model's predictions."""

METRICS: tuple[Metric, ...] = get_args(Metric)

Coding = Literal["fixed", "entropy"]
"""How values are stored: each in as many bits, or by their entropy."""

FIXED, ENTROPY = get_args(Coding)

Size = Literal["disk", "memory"]
"""Which bytes a budget counts: those that lie on disk, or those of the loaded weights."""

DISK, MEMORY = get_args(Size)


@dataclass(frozen=True)
class Option:
    """Description of an option for readers, and bounds beyond its type: ``Annotated[T, Option]``.

    Attributes:
        panel: heading that it stands under.
        help: what it does, in sentences.
        default: words for the default, where the value does not say it.
        gt: its values are above this.
        ge: its values are at least this.
        lt: its values are below this.
        first: it is among the few that people use first, and stands on top.
        file_only: it is a key of a configuration file, and no option of the command line.
        argument: it has no name on the command line, but a place.
        parse: reads what may also be given as text; raises ValueError.
    """

    panel: str
    help: str
    default: str | None = None
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    first: bool = False
    file_only: bool = False
    argument: bool = False
    parse: Callable[[str], Any] | None = None

    @property
    def bounds(self) -> str:
        """The bounds in words; empty where there are none."""
        return " and ".join(f"{word} {end}" for word, _, end in self._limits())

    def check(self, value: Any) -> None:
        """Refuse a number out of the bounds.

        Raises:
            ValueError: it is.
        """
        for word, holds, end in self._limits():
            if value is not None and not holds(value, end):
                raise ValueError(f"Input should be {word} {end}")

    def _limits(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        known = (
            ("greater than", operator.gt, self.gt),
            ("at least", operator.ge, self.ge),
            ("less than", operator.lt, self.lt),
        )
        return [(word, holds, end) for word, holds, end in known if end is not None]


HOW = partial(Option, "How")


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How a block is decomposed. Plain values; all of them decide the bytes of the result."""

    value_bits: Annotated[
        Literal[16, 8, 4, 3, 2],
        HOW(
            "Bits of a stored value. Below 16 in groups of 64 with a scale, which counts too.",
            default="16; rtn and gptq: the most that fit",
        ),
    ] = 16
    scale_groups: Annotated[
        Literal["outputs", "inputs"],
        HOW(
            "rtn and gptq: whether 64 outputs of an input share a scale, or 64 inputs of an "
            "output, which export --compressed-tensors can write."
        ),
    ] = "outputs"
    coding: Annotated[
        Coding,
        HOW(
            "Method lestd: fixed: a sparse core, every value in as many bits. entropy: basis and "
            "core as whole numbers on one step, coded by their entropy."
        ),
    ] = "fixed"
    factor_bits: Annotated[Literal[16, 8, 4], HOW("Bits per element of a factor.")] = 16
    size: Annotated[
        Size,
        HOW(
            "Whether keep counts bytes on disk, or those that the weights take in memory once they "
            "are loaded. Only values coded by their entropy take more there."
        ),
    ] = "disk"
    keep_outliers: Annotated[
        float, HOW("Share of the weights, the outliers, to keep exactly.", ge=0, lt=1)
    ] = 0.0
    type_mode: Annotated[
        Literal["identity", "learned"],
        HOW("identity: a core for each projection. learned: U3 mixes Q, K, V, O; no GQA."),
    ] = "identity"
    pattern: Annotated[
        Literal["unstructured", "2:4"],
        HOW("2:4: two of every four core elements, for sparse tensor cores."),
    ] = "unstructured"
    max_flops: Annotated[
        float | None,
        HOW("Upper limit of multiply-adds per token, relative to dense.", default="no cap", gt=0),
    ] = None
    td_moe_mode: Annotated[
        Literal["preserve", "compress"],
        HOW("Method td_moe: preserve (a core per expert) or compress (mixtures of fewer cores)."),
    ] = "preserve"
    whitening: Annotated[
        Literal["none", "input", "output", "both"],
        HOW("Method td_moe with --calibrate-on: the sides of the experts that are whitened."),
    ] = "input"
    stage2: Annotated[
        Literal["one-shot", "prune-refit"],
        HOW("How the core is sparsified. Both agree up to rounding.", file_only=True),
    ] = "one-shot"
    alpha: Annotated[
        float,
        HOW("prune-refit: share of the survivors pruned per step.", gt=0, lt=1, file_only=True),
    ] = 0.1
    rank_step: Annotated[
        int,
        HOW(
            "Grid of the rank search: R1 and R2 are multiples of it, or the full dimension.",
            ge=1,
            file_only=True,
        ),
    ] = 8
    hooi_tol: Annotated[
        float,
        HOW("HOOI stops when the fit changes by less than this, relatively.", gt=0, file_only=True),
    ] = 1e-6
    hooi_max_iter: Annotated[int, HOW("Maximum number of HOOI sweeps.", ge=1, file_only=True)] = 25
