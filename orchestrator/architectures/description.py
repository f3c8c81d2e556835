"""Schema of an architecture file; the package's docstring explains the fields."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lestd_kernels.tensorize import BasisSide

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Stored(_Described):
    """Location of an expert's weight; fields as in the package's docstring."""

    tensor: str
    part: tuple[int, int] = (0, 1)
    transposed: bool = False
    concatenated: bool = False

    @field_validator("part")
    @classmethod
    def _is_one_of(cls, part: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= part[0] < part[1]:
            raise ValueError("must be [k, n], the k-th of n, counted from 0")
        return part

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds the weights of all experts along its first axis."""
        return "{expert}" not in self.tensor


class Module(_Described):
    """One linear module of a block."""

    name: str
    projections: tuple[Projection, ...] = Field(min_length=1)
    basis_side: BasisSide


class Block(_Described):
    """One block of a decoder layer that becomes a slice group."""

    path: str
    norm: str
    modules: tuple[Module, ...] = Field(min_length=1)


class FeedForward(Block):
    """The dense MLP of a layer."""

    hidden_width: str


class ExpertModule(Module):
    """One linear module of every expert."""

    stored: Stored


class Experts(FeedForward):
    """The experts of a layer."""

    stored_path: str | None = None
    count: str
    guard: str
    modules: tuple[ExpertModule, ...] = Field(min_length=1)


class Description(_Described):
    """One model family."""

    family: str
    layer_path: str
    base_model_prefix: str
    attention: Block
    ffn: FeedForward | None = None
    experts: Experts | None = None

    @field_validator("layer_path")
    @classmethod
    def _has_one_layer(cls, path: str) -> str:
        if path.count("{layer}") != 1:
            raise ValueError("must contain {layer} exactly once")
        return path
