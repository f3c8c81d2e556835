"""Which slice groups of a model a run compresses, and what its method and metric ask of them."""

from __future__ import annotations

from collections.abc import Sequence

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import METHODS, NORM
from orchestrator.architectures import LINEAR, SliceGroup
from orchestrator.config.run import RunConfig


def named_groups(groups: list[SliceGroup], config: RunConfig) -> list[SliceGroup]:
    """The groups that `targets` and `ignore` leave in scope.

    Args:
        groups: of a model.
        config: the run's.

    Raises:
        LestdError: there is none; says what there was.
    """
    found = [
        group
        for group in groups
        if config.names(group.block, (f"{group.block}.{m.name}" for m in group.layout.modules))
    ]
    if not found:
        seen = ", ".join(dict.fromkeys(group.block for group in groups[:3]))
        raise LestdError(
            f"targets {config.targets!r} and ignore {config.ignore!r} leave nothing of scope "
            f"{config.scope} to compress, whose blocks are called {seen} and so on; correct them"
        )
    return found


def of_method(groups: list[SliceGroup], config: RunConfig) -> list[SliceGroup]:
    """The groups that the method can store: of one matrix those only that share nothing.

    Raises:
        LestdError: the method can store none of them.
    """
    if METHODS[config.method].per_matrix:
        return groups
    shared = [group for group in groups if group.scope != LINEAR]
    if not shared:
        able = ", ".join(name for name, method in METHODS.items() if method.per_matrix)
        raise LestdError(
            f"scope {config.scope} has matrices that are groups of their own, and method "
            f"{config.method!r} needs several that share a basis; choose one of {able}"
        )
    return shared


def require_norms(groups: Sequence[SliceGroup]) -> None:
    """Refuse the metric of the norm where a block's input is not known to be scaled by one.

    Raises:
        LestdError: names the first such block.
    """
    for group in groups:
        if group.scope != LINEAR and not group.norms:
            raise LestdError(
                f"metric {NORM!r} scales the error by the norm before a block, and no norm is "
                f"known whose weight multiplies the input of {group.block}: it has none, or one "
                "that acts as 1 + weight; choose another metric"
            )
