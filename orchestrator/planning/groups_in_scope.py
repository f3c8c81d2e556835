"""Which slice groups of a model a run compresses, and what its method and metric ask of them."""

from __future__ import annotations

from collections.abc import Sequence

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import CALIBRATED, METHODS, NORM
from orchestrator.architectures import LINEAR, LeftDense, SliceGroup, Structure
from orchestrator.config.run import RunConfig
from orchestrator.source.checkpoint import Source

_WITH_SINGLES = (LINEAR, "all")
_OF_LINEAR = " (what is outside of the decoder layers, such as lm_head, is of scope linear)"


def groups_in_scope(
    source: Source, config: RunConfig
) -> tuple[list[SliceGroup], tuple[LeftDense, ...]]:
    """The groups that a run compresses, and the modules that stay dense for a reason of their own.

    Modules outside of the decoder layers are among them where `targets` names them.

    Raises:
        LestdError: there is none; a weight is not what config.json or the modules say; the metric
            or the method has no answer for what is in scope.
    """
    architecture = source.architecture
    known = architecture if isinstance(architecture, Structure) else None
    dense = known.dense if known else ()
    singles = known is not None and any(block.kind == LINEAR for block in known.blocks)
    outside, unfit = _named_outside(source, config)
    alone = config.scope == LINEAR and not singles and bool(outside or unfit)
    groups = [] if alone else source.groups(config.scope)
    named = named_groups(groups + outside, config, unfit)
    groups = of_method(named, config)
    if config.metric == NORM:
        require_norms(groups)
    if left := [one for one in outside if one not in groups]:
        why = f"method {config.method!r} stores no matrix on its own"
        unfit += [LeftDense(layers=(), module=one.block, why=why) for one in left]
    elif outside and config.used_metric in CALIBRATED:
        raise LestdError(
            f"metric {config.used_metric!r} is found by walking through the decoder layers, and "
            f"{outside[0].block} stands outside of them; leave it out with --ignore, or choose a "
            "method and a metric (weight, norm) that need no calibration text"
        )
    return groups, (*dense, *unfit)


def _named_outside(source: Source, config: RunConfig) -> tuple[list[SliceGroup], list[LeftDense]]:
    """What `targets` names outside of the decoder layers, see `outside_groups`."""
    if config.targets is None or config.scope not in _WITH_SINGLES or config.include is not None:
        return [], []
    from orchestrator.architectures.outside import outside_groups  # It imports the modules.

    return outside_groups(source.config, source.index, lambda path: config.names(path, ()))


def named_groups(
    groups: list[SliceGroup], config: RunConfig, unfit: Sequence[LeftDense] = ()
) -> list[SliceGroup]:
    """The groups that `targets` and `ignore` leave in scope.

    Args:
        groups: of a model.
        config: the run's.
        unfit: what they name beside these, which stays dense.

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
        called = f", whose blocks are called {seen} and so on" if seen else ""
        what = f"targets {config.targets!r} and ignore {config.ignore!r}"
        why = "".join(f"; {one.module} stays dense: {one.why}" for one in unfit)
        raise LestdError(
            f"{what} leave nothing of scope {config.scope} to compress{called}{why}; correct them"
            + ("" if config.scope in _WITH_SINGLES else _OF_LINEAR)
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
