"""Options as keywords. Made from the options themselves by `make reference`."""

from __future__ import annotations

import os
from typing import Literal, TypedDict


class RunOptions(TypedDict, total=False):
    """Options of `lestd`."""

    revision: str | None
    architecture: str | os.PathLike[str] | None
    keep: float | None
    keep_model: float | None
    target_loss: float | str | None
    scope: Literal["attention", "ffn", "experts", "linear", "all"]
    include: str | None
    exclude: str | None
    targets: str | None
    ignore: str | None
    allocation: Literal["uniform", "global"] | None
    method: str
    metric: Literal["weight", "norm", "activation", "loss"] | None
    value_bits: Literal[16, 8, 4, 3, 2]
    scale_groups: Literal["outputs", "inputs"]
    coding: Literal["fixed", "entropy"]
    factor_bits: Literal[16, 8, 4]
    size: Literal["disk", "memory"]
    keep_outliers: float
    type_mode: Literal["identity", "learned"]
    pattern: Literal["unstructured", "2:4"]
    max_flops: float | None
    td_moe_mode: Literal["preserve", "compress"]
    whitening: Literal["none", "input", "output", "both"]
    stage2: Literal["one-shot", "prune-refit"]
    alpha: float
    rank_step: int
    hooi_tol: float
    hooi_max_iter: int
    calibrate_on: str | None
    samples: int
    sample_tokens: int
    gram_width: int | None
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    layer_keep: dict[str, float]
    executor: Literal["ray", "serial"]
    workers: int | None
    address: str | None
    max_attempts: int
    task_timeout: float | None
    autoscaling: bool
    recipe: str | None
    config: str | os.PathLike[str] | None
    cluster: str | os.PathLike[str] | None
    track: Literal["mlflow", "wandb", "trackio"] | None


class EvaluateOptions(TypedDict, total=False):
    """Options of `lestd`."""

    dtype: str
    window: int | None
    max_windows: int | None
    text: str | os.PathLike[str] | None
    tasks: str | None
    data: str | os.PathLike[str] | None
    include_path: str | os.PathLike[str] | None
    limit: int | None
    fewshot: int | None
    batch_size: int
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    executor: Literal["ray", "serial"]
    workers: int | None
    address: str | None
    max_attempts: int
    task_timeout: float | None
    autoscaling: bool
    cluster: str | os.PathLike[str] | None
    track: Literal["mlflow", "wandb", "trackio"] | None
