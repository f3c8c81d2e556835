"""The two configurations: what is computed, and where.

`RunConfig` holds everything that affects the bytes of the result and goes into the run's
fingerprint; `ClusterConfig` holds what does not, so a run may be finished on another cluster.
Both refuse keys that they do not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from lestd_kernels.errors import LestdError
from lestd_kernels.methods import ACTIVATION, METHODS, MethodArgs
from orchestrator.config.files import Strict, load_yaml, validated
from orchestrator.config.layers import check_layers, parse_layers

Fraction = Annotated[float, Field(gt=0, lt=1)]
Layers = Annotated[str, AfterValidator(check_layers)]


class RunConfig(Strict):
    """What to compute. Every field decides the bytes of the result."""

    keep: Fraction | None = Field(
        None, description="stored bytes / dense bytes of the weights in scope, between 0 and 1"
    )
    keep_model: Fraction | None = Field(
        None, description="the same for the whole model, instead of keep"
    )
    scope: Literal["attention", "ffn", "experts", "all"] = Field(
        "attention", description="which weights are compressed"
    )
    include: Layers | None = Field(None, description='only these layers, like "0-3,7"')
    exclude: Layers | None = Field(None, description="all layers but these")
    layer_keep: dict[Layers, Fraction] = Field(
        default_factory=dict, description='a keep of their own for some layers: {"0-1": 0.8}'
    )
    allocation: Literal["uniform", "global"] = Field(
        "uniform",
        description="uniform: every layer the same keep; global: where bytes lower the error most",
    )
    method: str = Field("lestd", description=" | ".join(METHODS))
    type_mode: Literal["identity", "learned"] = Field(
        "identity", description="identity: every projection its own core; learned: U3 mixes Q K V O"
    )
    stage2: Literal["one-shot", "prune-refit"] = Field(
        "one-shot", description="how the core is thinned out; both agree to rounding"
    )
    pattern: Literal["unstructured", "2:4"] = Field(
        "unstructured", description="2:4: of each four core elements two, for sparse tensor cores"
    )
    alpha: Fraction = Field(0.1, description="prune-refit: share of survivors pruned per step")
    rank_step: int = Field(8, ge=1, description="grid of the rank search")
    max_flops: float | None = Field(
        None, gt=0, description="multiply-adds per token relative to dense, at most"
    )
    hooi_tol: float = Field(
        MethodArgs.hooi_tol, gt=0, description="stop HOOI when the fit changes by less (relative)"
    )
    hooi_max_iter: int = Field(MethodArgs.hooi_max_iter, ge=1, description="HOOI sweeps at most")
    metric: Literal["weight", "norm", "activation"] | None = Field(
        None,
        description="norm of the error: Frobenius, scaled by the preceding norm, or of the "
        "calibration text's activations; default: activation where there is such a text",
    )
    value_bits: Literal[16, 8, 4, 3, 2] = Field(
        16, description="bits of a core value; below 16 in groups of 64 with a scale"
    )
    factor_bits: Literal[16, 8, 4] = Field(16, description="bits of an element of a factor")
    keep_outliers: float = Field(
        0.0, ge=0, lt=1, description="share of the weights kept exactly, the outliers"
    )
    td_moe_mode: Literal["preserve", "compress"] = Field(
        "preserve", description="method td_moe: a core per expert, or mixtures of fewer cores"
    )
    whitening: Literal["none", "input", "output", "both"] = Field(
        "input", description="method td_moe in the metric activation: the sides that are whitened"
    )
    calibrate_on: str | None = Field(
        None, description="UTF-8 text whose activations make the metric"
    )
    samples: int = Field(128, ge=1, description="windows of that text, from its beginning")
    sample_tokens: int = Field(256, ge=1, description="tokens of such a window")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where workers compute")
    threads: int = Field(
        1, ge=1, description="CPU threads of a worker (reduction order, so the last bit, is theirs)"
    )

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
        if self.used_metric == ACTIVATION and self.calibrate_on is None:
            raise ValueError(
                f"method {self.method!r} in the metric 'activation' needs a text; give it with "
                "calibrate_on (--calibrate-on TEXT)"
            )
        return self

    @property
    def used_metric(self) -> str:
        """The metric, where none is named the one that text and method make sense of."""
        if self.metric is not None:
            return self.metric
        known = METHODS[self.method].metrics
        calibrated = self.calibrate_on is not None and ACTIVATION in known
        return ACTIVATION if calibrated else known[0]

    @model_validator(mode="after")
    def _one_target(self) -> RunConfig:
        if (self.keep is None) == (self.keep_model is None):
            raise ValueError("give exactly one of keep and keep_model, a number between 0 and 1")
        return self

    def method_args(self) -> MethodArgs:
        """The arguments of the decomposition method."""
        return MethodArgs(
            type_mode=self.type_mode,
            stage2=self.stage2,
            pattern=self.pattern,
            alpha=self.alpha,
            rank_step=self.rank_step,
            max_flops=self.max_flops,
            hooi_tol=self.hooi_tol,
            hooi_max_iter=self.hooi_max_iter,
            metric=self.used_metric,
            value_bits=self.value_bits,
            factor_bits=self.factor_bits,
            keep_outliers=self.keep_outliers,
            td_moe_mode=self.td_moe_mode,
            whitening=self.whitening,
        )

    def select_layers(self, layers: Iterable[int]) -> list[int]:
        """The layers in scope, ascending.

        Raises:
            LestdError: a named layer does not exist, or none is left.
        """
        present = set(layers)
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
                raise LestdError(
                    f"{where} names layer {missing[0]}, but the model has layers "
                    f"{min(present)} to {max(present)}; correct the list"
                )
        if not chosen:
            raise LestdError("include and exclude leave no layer to compress; widen them")
        return sorted(chosen)

    def keep_of(self, layer: int, keep: float) -> float:
        """The keep of one layer: its own from `layer_keep`, or `keep`."""
        own = (value for key, value in self.layer_keep.items() if layer in parse_layers(key))
        return next(own, keep)

    def layers_with_own_keep(self) -> frozenset[int]:
        """The layers that `layer_keep` names; allocation leaves their budgets alone."""
        return frozenset[int]().union(*map(parse_layers, self.layer_keep))


class RunFile(RunConfig):
    """The contents of ``run.yaml``: a RunConfig and the model it is for."""

    model: str | None = Field(None, description="local directory or Hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")


def run_options(
    model: str | None, config: Path | None, options: dict[str, Any]
) -> tuple[str, str | None, RunConfig]:
    """Model, revision and configuration from a run file and the options; options win.

    Raises:
        LestdError: no model is named, or a value is not valid.
    """
    values = {} if config is None else load_yaml(config)
    given = {key: value for key, value in options.items() if value is not None}
    if "keep" in given or "keep_model" in given:
        values = {k: v for k, v in values.items() if k not in ("keep", "keep_model")}
    values |= given | ({} if model is None else {"model": model})
    run_file = validated(RunFile, values, str(config or "options"))
    if run_file.model is None:
        raise LestdError("no model given; name a directory or a Hub id, or set model in --config")
    plain = run_file.model_dump(exclude={"model", "revision"})
    return run_file.model, run_file.revision, RunConfig.model_validate(plain)


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
