"""The two configurations: what is computed, and where.

`RunConfig` holds everything that affects the bytes of the result and goes into the run's
fingerprint; `ClusterConfig` holds what does not, so a run may be finished on another cluster.
Both refuse keys that they do not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, field_validator, model_validator

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import ACTIVATION, CALIBRATED, LOSS, METHODS, WEIGHT, MethodArgs
from lestd_kernels.options import MethodOptions
from orchestrator.config.files import Strict, load_yaml, option_name, typed, validated
from orchestrator.config.layers import check_layers, parse_layers
from orchestrator.config.options import (
    WHAT,
    Allocation,
    ArchitectureFile,
    CalibrationText,
    Checkpoint,
    Host,
    MethodChoice,
    Target,
    Weights,
)
from orchestrator.config.recipes import options_of
from workers.contracts import OUTSIDE

TARGETS = ("keep", "keep_model", "target_loss")
"""What a run is to reach; one of them."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Layers = Annotated[str, AfterValidator(check_layers)]


class RunConfig(
    Strict,
    Host,
    CalibrationText,
    MethodOptions,
    MethodChoice,
    Allocation,
    Weights,
    Target,  # pydantic takes the fields of the last class first.
    frozen=True,
):
    """Configuration of a run. Every field decides the bytes of the result."""

    layer_keep: Annotated[
        dict[Layers, Fraction],
        WHAT('A keep of their own for some layers: `{"0-1": 0.8}`.', file_only=True),
    ] = Field(default_factory=dict)

    @field_validator("include", "exclude")
    @classmethod
    def _list_of_layers(cls, value: str | None) -> str | None:
        return value if value is None else check_layers(value)

    @field_validator("targets", "ignore")
    @classmethod
    def _regular_expression(cls, value: str | None) -> str | None:
        try:
            _any_matches(value or "", [""])
        except ValueError as error:
            raise ValueError(
                f"expected a regular expression of RE2, found {value!r} ({error})"
            ) from error
        return value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"expected one of {', '.join(METHODS)}")
        return value

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted_pattern(cls, value: object) -> object:
        # YAML 1.1 counts in sixties where a number has a colon.
        if value == 2 * 60 + 4:
            raise ValueError('in YAML, 2:4 without quotes is a number; write pattern: "2:4"')
        return value

    @field_validator("layer_keep")
    @classmethod
    def _one_keep_per_layer(cls, value: dict[str, float]) -> dict[str, float]:
        # Which of two would win is not to be left to their order, which the fingerprint ignores.
        named: dict[int, str] = {}
        for key in value:
            for layer in sorted(parse_layers(key)):
                if layer in named:
                    raise ValueError(
                        f"{named[layer]!r} and {key!r} both name layer {layer}; name it in one"
                    )
                named[layer] = key
        return value

    @model_validator(mode="after")
    def _known_metric(self) -> RunConfig:
        known = METHODS[self.method].metrics
        if self.metric is not None and self.metric not in known:
            raise ValueError(
                f"method {self.method!r} works in the metric {' or '.join(known)}, "
                f"not in {self.metric!r}; change one of the two"
            )
        if self.used_metric in CALIBRATED and self.calibrate_on is None:
            raise ValueError(
                f"method {self.method!r} in the metric {self.used_metric!r} needs a text; give it "
                "with calibrate_on (--calibrate-on TEXT)"
            )
        return self

    @property
    def used_metric(self) -> str:
        """The metric, where none is named the one that text and method make sense of."""
        if self.metric is not None:
            return self.metric
        known = METHODS[self.method].metrics
        if self.target_loss is not None and LOSS in known:
            return LOSS
        if self.calibrate_on is not None and ACTIVATION in known:
            return ACTIVATION
        plain = MethodArgs()
        only = METHODS[self.method].weight_options
        given = any(getattr(self, option) != getattr(plain, option) for option in only)
        return WEIGHT if given else known[0]

    @property
    def used_allocation(self) -> str:
        """The allocation; nats are the same currency in every layer, other errors are not."""
        return self.allocation or ("global" if self.used_metric == LOSS else "uniform")

    @model_validator(mode="after")
    def _one_target(self) -> RunConfig:
        if sum(getattr(self, name) is not None for name in TARGETS) != 1:
            raise ValueError(
                "give exactly one of keep, keep_model and target_loss; keeps lie between 0 and 1"
            )
        if self.target_loss is None:
            return self
        if self.used_metric != LOSS:
            raise ValueError(
                f"target_loss is counted in the metric 'loss', found {self.used_metric!r} of "
                f"method {self.method!r}; change the metric or the method, or give keep"
            )
        if self.used_allocation != "global" or self.layer_keep:
            raise ValueError(
                "target_loss divides the bytes over the layers itself; leave out allocation and "
                "layer_keep, or give keep"
            )
        return self

    def method_args(self) -> MethodArgs:
        """The arguments of the decomposition method."""
        options = {field.name: getattr(self, field.name) for field in fields(MethodOptions)}
        return MethodArgs(metric=self.used_metric, **options)

    def select_layers(self, layers: Iterable[int]) -> list[int]:
        """The layers in scope, ascending.

        Raises:
            LestdError: a named layer does not exist, or none is left.
        """
        present = set(layers) - {OUTSIDE}
        chosen = set(present)
        named: dict[str, frozenset[int]] = {}
        if self.include is not None:
            named["include"] = parse_layers(self.include)
            chosen &= named["include"]
        if self.exclude is not None:
            named["exclude"] = parse_layers(self.exclude)
            chosen -= named["exclude"]
        named |= {f"layer_keep {key!r}": parse_layers(key) for key in self.layer_keep}
        for where, wanted in named.items():
            if missing := sorted(wanted - present):
                there = f"layers {min(present)} to {max(present)}" if present else "none in scope"
                raise LestdError(
                    f"{where} names layer {missing[0]}, but the model has {there}; correct the list"
                )
        if present and not chosen:
            raise LestdError("include and exclude leave no layer to compress; widen them")
        return sorted(chosen)

    def names(self, block: str, modules: Iterable[str]) -> bool:
        """Whether `targets` and `ignore` leave a block in scope.

        Args:
            block: its path in the model.
            modules: paths of its matrices.
        """
        paths = [block, *modules]

        if self.targets is not None and not _any_matches(self.targets, paths):
            return False
        return self.ignore is None or not _any_matches(self.ignore, paths)

    def keep_of(self, layer: int, keep: float) -> float:
        """The keep of one layer: its own from `layer_keep`, or `keep`."""
        own = (value for key, value in self.layer_keep.items() if layer in parse_layers(key))
        return next(own, keep)

    def layers_with_own_keep(self) -> frozenset[int]:
        """The layers that `layer_keep` names; allocation leaves their budgets alone."""
        return frozenset[int]().union(*map(parse_layers, self.layer_keep))


def _any_matches(pattern: str, texts: Sequence[str]) -> bool:
    """Whether a regular expression matches in any text.

    By RE2, whose time is linear in the text: a run.yaml may come from anybody, and with Python's
    own expressions one of ten characters never ends.

    Raises:
        ValueError: it is none.
    """
    found = pc.match_substring_regex(pa.array(texts, pa.string()), pattern)
    return bool(pc.any(found).as_py())


class RunFile(RunConfig, ArchitectureFile, Checkpoint, frozen=True):
    """The contents of ``run.yaml``: a RunConfig and the model it is for."""


class ModelChoice(NamedTuple):
    """The model of a run: arguments of `orchestrator.source.checkpoint.resolve_source`."""

    model: str
    revision: str | None
    architecture: Path | None


def run_options(
    given: Mapping[str, Any], variant: Mapping[str, Any] | None = None
) -> tuple[ModelChoice, RunConfig]:
    """Model and configuration from a recipe, a run file and the options; the later ones win.

    Args:
        given: what was given on the command line, by name; `config` is the file.
        variant: fields that --methods names for one of its methods; they win over both.

    Raises:
        LestdError: no model is named, or a value is not valid.
    """
    file, here, variant = given.get("config"), typed(RunFile, given), variant or {}
    named = given.get("recipe")
    values: dict[str, Any] = {} if named is None else options_of(named)
    for later in ({} if file is None else load_yaml(file), here, variant):
        if any(name in later for name in TARGETS):
            values = {k: v for k, v in values.items() if k not in TARGETS}
        values |= later
    names = {key: option_name(key) for key in here} | {key: f"--methods: {key}" for key in variant}
    run_file = validated(RunFile, values, str(file or "options"), names)
    if run_file.model is None:
        raise LestdError("no model given; name a directory or a Hub id, or set model in --config")
    chosen = ModelChoice(run_file.model, run_file.revision, run_file.architecture)
    plain = run_file.model_dump(exclude=set(ModelChoice._fields))
    return chosen, RunConfig.model_validate(plain)


def scope_keep(config: RunConfig, scope_bytes: int, model_bytes: int) -> float:
    """The keep of the weights in scope, from `keep` or from `keep_model`.

    Args:
        config: the run's configuration.
        scope_bytes: dense bytes of the weights in scope.
        model_bytes: dense bytes of all tensors of the checkpoint.

    Raises:
        LestdError: the whole-model target leaves nothing for the weights in scope, or needs none
            of them compressed.
    """
    if config.keep is not None:
        return config.keep
    assert config.keep_model is not None
    untouched = model_bytes - scope_bytes
    keep = (config.keep_model * model_bytes - untouched) / scope_bytes
    if not 0 < keep < 1 or not math.isfinite(keep):
        raise LestdError(
            f"keep_model {config.keep_model} cannot be reached: the weights out of scope alone are "
            f"{untouched / model_bytes:.3f} of the model; choose a value above that and below 1"
        )
    return keep
