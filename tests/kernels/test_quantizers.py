"""Pruning, rounding, and outliers as methods: bytes, errors, files, and loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import save_tiny
from support.groups import unfolding as random_unfolding
from support.low_rank import LAYOUTS, decompose, inputs, layout_of, metrics_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.chain import Chain
from lestd_kernels.linalg.metric import Metric
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.outliers import find_outliers
from lestd_kernels.storage.few_bits import values_bytes
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, fold_weights
from orchestrator.compression.pipeline import compress_model
from orchestrator.config.run import RunConfig
from orchestrator.execution.serial import SerialExecutor
from orchestrator.source.checkpoint import resolve_source

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRUNERS, ROUNDERS = ("magnitude", "wanda", "sparsegpt"), ("rtn", "gptq")
BOUND = ("lestd", "tucker", "svd", "tt", "per_head_tucker", *PRUNERS, *ROUNDERS)


@pytest.mark.parametrize(("bits", "dtype"), [(16, BF16), (8, FP16), (8, FP32), (4, BF16)])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("method", PRUNERS)
def test_pruning_uses_its_budget(method: str, bits: int, name: str, dtype: torch.dtype) -> None:
    layout = layout_of(name)
    done = decompose(method, layout, 0.3, dtype, value_bits=bits)
    stored = done.decomposition
    budget = int(0.3 * layout.elements * dtype.itemsize)
    sizes = [rows * columns for rows, columns in map(layout.weight_shape, layout.modules)]
    whole = sum(values_bytes(n, bits, dtype.itemsize) for n in sizes)
    if whole <= budget:
        budget = whole
        assert stored.codecs == ["dense"]
    assert 0.98 * budget <= stored.stored_bytes <= budget
    dense = stored.to_dense()
    residual = random_unfolding(layout)
    for key, W in fold_weights(residual, layout).items():
        dense[key] -= W
    squared = sum(float(W.double().square().sum()) for W in dense.values())
    assert squared == pytest.approx(done.squared_error, rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lestd", "svd_llm", "tt", *PRUNERS, *ROUNDERS])
def test_small_weights_are_as_good_in_float16_as_in_bfloat16(method: str, bits: int) -> None:
    layout = layout_of("gqa")
    metric = "norm" if method == "tt" else "activation"
    more = {"metric": metric} if metric in METHODS[method].metrics else {}
    args = MethodArgs(value_bits=bits, factor_bits=bits, **more)
    found = {BF16: 0.0, FP16: 0.0}
    for dtype in found:
        for seed in range(4):  # Of one, which way a feedback goes is luck.
            W = random_unfolding(layout, seed) * 2.0**-12
            budget = int(0.6 * layout.elements * 2)
            metrics = metrics_of(layout, args.metric)
            done = METHODS[method].decompose(W, layout, budget, dtype, args, (), metrics)
            found[dtype] += done.relative_error
    assert found[FP16] <= 1.02 * found[BF16]


@pytest.mark.parametrize("method", ["lestd", "svd_llm", "rtn", "gptq", "sparsegpt"])
def test_four_bits_are_better_than_three_beside_a_super_weight(method: str) -> None:
    """As in the feed-forward of a real model: one weight, 30 times the others, of a large input."""
    layout = layout_of("gqa")
    W, metrics = random_unfolding(layout), metrics_of(layout, "activation")
    module = layout.modules[0]
    column = layout.columns(module).start
    W[3, column] = 30 * W.square().mean().sqrt()
    gram = metrics[module.name]
    gram[3] *= 100
    gram[:, 3] *= 100
    errors = {}
    for bits in (3, 4):
        metric = "weight" if method == "rtn" else "activation"
        args = MethodArgs(metric=metric, value_bits=bits, factor_bits=4)
        done = METHODS[method].decompose(
            W.clone(), layout, layout.elements, BF16, args, (), metrics
        )
        errors[bits] = Metric(gram).squares(
            W[:, layout.columns(module)] - done.decomposition.to_dense()[module.name].T
        )
    assert errors[4] < errors[3]


def test_magnitude_and_wanda_keep_the_largest_scores() -> None:
    layout = layout_of("gqa")
    weights = fold_weights(random_unfolding(layout), layout)
    grams = metrics_of(layout, "activation")
    for method in ("magnitude", "wanda"):
        found = decompose(method, layout, 0.4, FP32).decomposition.to_dense()
        for name, W in weights.items():
            kept = found[name] != 0
            assert torch.equal(found[name][kept], W[kept])
            scores = W.abs()
            if method == "wanda":
                scores = scores * grams[name].diagonal().sqrt()
            assert float(scores[kept].min()) >= float(scores[~kept].max())


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("method", ROUNDERS)
def test_rounding_takes_the_most_bits_that_fit(method: str, name: str, dtype: torch.dtype) -> None:
    layout = layout_of(name)
    for keep, bits in ((0.9, 8), (0.35, 4), (0.25, 3), (0.16, 2)):
        done = decompose(method, layout, keep, dtype)
        sizes = [rows * columns for rows, columns in map(layout.weight_shape, layout.modules)]
        assert done.decomposition.stored_bytes == sum(values_bytes(n, bits, 2) for n in sizes)
        asked = decompose(method, layout, 0.95, dtype, value_bits=bits)
        assert asked.decomposition.stored_bytes == done.decomposition.stored_bytes
        assert asked.squared_error == done.squared_error


@pytest.mark.parametrize("bits", [4, 2])
def test_calibration_lowers_the_error_in_its_metric(bits: int) -> None:
    layout = layout_of("gqa")
    metrics = metrics_of(layout, "activation")
    errors = {}
    for method, keep in (("rtn", 0.9), ("gptq", 0.9), ("magnitude", 0.2), ("sparsegpt", 0.2)):
        args = MethodArgs(value_bits=bits)
        budget = int(keep * layout.elements * 2)
        done = METHODS[method].decompose(
            random_unfolding(layout), layout, budget, BF16, args, (), metrics
        )
        errors[method] = done.metric_squared_error
    assert errors["gptq"] < 0.7 * errors["rtn"]
    assert errors["sparsegpt"] < 0.7 * errors["magnitude"]


@pytest.mark.parametrize("method", [*PRUNERS, *ROUNDERS])
def test_what_is_too_small_is_refused_and_the_least_is_not(method: str) -> None:
    layout = layout_of("odd")
    args = MethodArgs(keep_outliers=0.01)
    for options in (MethodArgs(), args):
        least = METHODS[method].least_bytes(layout, BF16, options)
        metrics = metrics_of(layout, "activation")
        W = random_unfolding(layout)
        done = METHODS[method].decompose(W.clone(), layout, least, BF16, options, (), metrics)
        assert done.decomposition.stored_bytes <= least
        with pytest.raises(LestdError, match="raise keep"):
            METHODS[method].bounds(layout, least - 1, BF16, options)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("method", BOUND)
def test_outliers_are_exact_with_any_method(method: str, dtype: torch.dtype) -> None:
    layout, share, keep = layout_of("gqa"), 0.002, 0.6
    outliers = random_unfolding(layout)
    outliers.view(-1)[7 :: outliers.numel() // 8] += 50
    outliers = outliers.to(dtype).float()
    args = MethodArgs(metric=METHODS[method].metrics[0], keep_outliers=share, rank_step=4)
    budget = int(keep * layout.elements * dtype.itemsize)
    done = METHODS[method].decompose(
        outliers.clone(), layout, budget, dtype, args, (budget,), metrics_of(layout, args.metric)
    )
    stored = done.decomposition
    assert isinstance(stored, Chain)
    assert stored.stored_bytes <= budget
    assert stored.stored_bytes <= METHODS[method].bounds(layout, budget, dtype, args).max_bytes
    assert [point.byte_budget for point in done.curve] == [budget]
    squared = 0.0
    for name, W in fold_weights(outliers, layout).items():
        W_hat = stored.to_dense()[name]
        count = -(-W.numel() * 2 // 1000)
        largest = W.abs() > W.abs().flatten().topk(count + 1).values[-1]
        side = stored.modules[name].side
        assert side is not None
        assert side.nnz == count >= int(largest.sum()) > count - 3
        torch.testing.assert_close(
            W_hat[largest], W[largest], rtol=2 * torch.finfo(dtype).eps, atol=1e-5
        )
        squared += float((W - W_hat).double().square().sum())
    assert squared == pytest.approx(done.squared_error, rel=1e-4)
    plain = METHODS[method].decompose(
        outliers.clone(),
        layout,
        budget,
        dtype,
        MethodArgs(metric=args.metric, rank_step=4),
        (),
        metrics_of(layout, args.metric),
    )
    if method == "rtn":
        assert done.squared_error < 0.2 * plain.squared_error


def test_the_activation_rule_names_the_first() -> None:
    W, X = torch.randn(12, 9).clamp(-2, 2), inputs(12)
    W[4, 2] = 0.3
    X[7, 4] = 1e4
    W[1, 5] = 50.0
    outputs = torch.ones(9)
    outputs[2] = 3e3
    plain, found = (find_outliers(W, 1, *maxima) for maxima in ((), (X.abs().amax(dim=0), outputs)))
    assert plain.nonzero().tolist() == [[1, 5]]
    assert found.nonzero().tolist() == [[4, 2]]
    both = find_outliers(W, 2, X.abs().amax(dim=0), outputs)
    assert both.nonzero().tolist() == [[1, 5], [4, 2]]


def test_outliers_need_the_type_mode_identity() -> None:
    args = MethodArgs(type_mode="learned", keep_outliers=0.1)
    with pytest.raises(LestdError, match="type_mode"):
        METHODS["lestd"].bounds(LAYOUTS["mha"], 10_000, BF16, args)


def expected_logits(source: Path, out: Path, ids: Tensor) -> Tensor:
    """Logits of the dense model with the weights that the files hold."""
    dense = AutoModelForCausalLM.from_pretrained(source)
    tensors: dict[str, Tensor] = {}
    for shard in out.glob("*.safetensors"):
        tensors |= load_file(shard)
    entries = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
    with torch.no_grad():
        for entry in entries:
            chain = Chain.from_named_tensors(entry, tensors)
            for name, weight in chain.to_dense().items():
                dense.get_submodule(f"{entry['path']}.{name}").weight.copy_(weight)
        logits: Tensor = dense(ids).logits
    return logits


@pytest.mark.parametrize(
    ("family", "scope", "method", "keep", "options"),
    [
        ("llama-gqa", "attention", "magnitude", 0.5, {}),
        ("llama-gqa", "all", "rtn", 0.2, {}),
        ("gpt_neox", "all", "rtn", 0.3, {"keep_outliers": 0.01}),
        ("gpt_neox", "attention", "magnitude", 0.1, {"value_bits": 4}),
        ("opt", "ffn", "magnitude", 0.05, {"keep_outliers": 0.001}),
        ("gptj", "attention", "lestd", 0.5, {"keep_outliers": 0.01}),
    ],
)
def test_files_load_as_what_they_hold_and_a_run_resumes(
    family: str, scope: str, method: str, keep: float, options: dict[str, float], tmp_path: Path
) -> None:
    source = save_tiny(family, tmp_path / "dense")
    config = RunConfig(keep=keep, scope=scope, method=method, **options)
    out, arguments = tmp_path / "out", (resolve_source(str(source)), config, SerialExecutor())
    outcome = compress_model(*arguments, out, tmp_path / "run")
    assert outcome.complete
    sizes = [(p.task.dense_bytes, p.task.byte_budget) for p in outcome.plan.tasks]
    payloads = [load_file(path) for path in sorted(out.glob("lestd-*.safetensors"))]
    stored = sum(t.numel() * t.element_size() for one in payloads for t in one.values())
    assert stored <= sum(budget for _, budget in sizes)
    ids = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(found, expected_logits(source, out, ids), rtol=1e-4, atol=1e-4)
    assert compress_model(*arguments, out, tmp_path / "run").skipped == len(sizes)


@pytest.mark.parametrize("method", ["wanda", "gptq", "sparsegpt"])
def test_calibrated_files_load_as_what_they_hold(
    method: str, tiny_llama: Path, wikitext: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        keep=0.3,
        method=method,
        value_bits=4,
        calibrate_on=str(wikitext),
        samples=2,
        sample_tokens=32,
        include="1",
        keep_outliers=1e-4,
    )
    out = tmp_path / "out"
    arguments = (resolve_source(str(tiny_llama)), config, SerialExecutor(), out, tmp_path / "run")
    assert compress_model(*arguments).complete
    ids = torch.arange(24).view(2, 12) + 3
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=FP32)(ids).logits
        wanted = expected_logits(tiny_llama, out, ids).float()
    # Both compute in bfloat16 somewhere.
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.3)
    assert compress_model(*arguments).skipped == 1


@pytest.mark.parametrize("metric", ["activation", "loss"])
def test_inputs_of_an_output_share_a_scale_where_that_is_asked_for(metric: str) -> None:
    modules = tuple(ModuleLayout(name, "input", ((name, 0),), name) for name in ("q", "k"))
    layout = GroupLayout(128, 40, modules)
    grams = metrics_of(layout, "activation")
    if metric == "loss":
        generator = torch.Generator().manual_seed(5)
        for name in ("q", "k"):
            g = torch.randn(400, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
            grams[f"{name}.output"] = g.T @ g / len(g)
    errors = {}
    for method in ("rtn", "gptq"):
        args = MethodArgs(value_bits=4, scale_groups="inputs", metric=metric)
        done = METHODS[method].decompose(
            random_unfolding(layout), layout, 10**6, BF16, args, (), grams
        )
        errors[method] = done.metric_squared_error
        weights = fold_weights(random_unfolding(layout), layout)
        for name, W_hat in done.decomposition.to_dense().items():
            # (out, groups, 64): sixteen levels, one of them zero, and the largest weight is one.
            W, found = (one.view(40, 2, 64).double() for one in (weights[name], W_hat))
            outer = W.gather(2, W.abs().argmax(dim=2, keepdim=True))
            code = found / (outer / -8)
            assert (code - code.round()).abs().max() < 8 * 2**-7
            assert code.round().min() == -8
            assert code.round().max() == 7
    assert errors["gptq"] < 0.7 * errors["rtn"]
    with pytest.raises(LestdError, match="inputs are a multiple of 64"):
        METHODS["rtn"].least_bytes(layout_of("odd"), BF16, args)
    with pytest.raises(LestdError, match="supports only scale_groups 'outputs'"):
        METHODS["svd"].least_bytes(layout, BF16, args)
