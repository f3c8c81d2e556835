import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import groups
from support.groups import fused, gqa, mha, unfolding
from support.methods import BF16, FP16, FP32, budget_of, decompose
from support.paths import ROOT, TESTS

from lestd_kernels.errors import LestdError
from lestd_kernels.formats.shared_tucker import CORE_NAME
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.storage.codecs import CODECS
from lestd_kernels.tensorize import PROJECTIONS, fold_weights, unfold_weights

# Those of one shared basis; tests of the others stand by their kind.
SHARED = ("lestd", "tucker")
LAYOUTS = {
    "mha": mha(48, 12, 4),
    "odd": mha(37, 7, 3),
    "gqa": gqa(40, 16, 6, 2),
    "fused": fused(44, 11, 4),
    "narrow": mha(64, 4, 3),
}
KEEPS = (0.8, 0.6, 0.4, 0.2)


def saturated(stored):
    """Every element of every core is stored."""
    return stored.nnz == sum(core.rows * core.columns for core in stored.cores.values())


def rank_step_bytes(stored):
    """Bytes of one more R1 with dense cores."""
    rows = sum(core.columns for core in stored.cores.values())
    return (stored.layout.width + rows) * stored.U1.element_size()


@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(
    ("name", "type_mode"),
    [(name, "identity") for name in LAYOUTS]
    + [(name, "learned") for name in LAYOUTS if name != "gqa"],
)
def test_the_budget_is_used_and_every_figure_is_that_of_what_is_stored(
    name, keep, method, type_mode
):
    layout = LAYOUTS[name]
    W, budget = unfolding(layout), budget_of(layout, keep, BF16)
    done = decompose(method, layout, keep, type_mode=type_mode, rank_step=4)
    stored = done.decomposition

    assert stored.stored_bytes <= budget
    if method == "lestd":
        assert stored.stored_bytes > 0.995 * budget or saturated(stored)
    else:
        assert stored.stored_bytes > budget - rank_step_bytes(stored)
        assert saturated(stored)

    residual = (W - unfold_weights(stored.to_dense(), layout)).double()
    assert done.squared_error == pytest.approx(float(residual.square().sum()), rel=1e-5)
    assert done.squared_norm == pytest.approx(float(W.double().square().sum()), rel=1e-9)
    assert done.relative_error == pytest.approx((done.squared_error / done.squared_norm) ** 0.5)
    values = torch.cat([core.tensors["values"].double() for core in stored.cores.values()])
    assert done.squared_energy_stage2 == pytest.approx(float(values.square().sum()), rel=1e-9)
    assert done.squared_energy_stage2 <= done.squared_energy_stage1 * (1 + 1e-2)
    assert done.threshold == float(values[values != 0].abs().min())
    assert {"stage1", "rank_search", "stage2", "error"} == done.seconds.keys()

    bounds = METHODS[method].bounds(
        layout, budget, BF16, MethodArgs(type_mode=type_mode, rank_step=4)
    )
    assert stored.ranks["R1"] <= bounds.max_R1
    assert stored.ranks["R2"] <= bounds.max_R2
    assert stored.nnz <= bounds.max_nnz


@pytest.mark.parametrize("type_mode", ["identity", "learned"])
@pytest.mark.parametrize("name", ["odd", "fused"])
def test_slice_statistics_are_those_of_the_slices(name, type_mode):
    layout = LAYOUTS[name]
    W = unfolding(layout)
    done = decompose("lestd", layout, 0.4, type_mode=type_mode, rank_step=4)
    stored = done.decomposition
    p, R2 = layout.head_dim, stored.U2.shape[1]
    W_hat = stored.reconstruct().view(layout.width, -1, p)
    originals = W.view(layout.width, -1, p)
    M = torch.cat(list(stored.module_cores()), dim=1)
    M = M.view(M.shape[0], -1, R2)
    assert len(done.slices) == len(layout.slices)
    for s, stats in enumerate(done.slices):
        assert (stats.projection, stats.head) == layout.slices[s]
        norm = float(originals[:, s].double().square().sum())
        error = float((originals[:, s] - W_hat[:, s]).double().square().sum())
        assert stats.squared_norm == pytest.approx(norm, rel=1e-6)
        assert stats.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-4)
        assert stats.nnz == int(M[:, s].count_nonzero())
        assert stats.density == pytest.approx(stats.nnz / (M.shape[0] * R2))
        energy = float(M[:, s].double().square().sum())
        assert stats.squared_energy == pytest.approx(energy, rel=1e-6, abs=1e-12)
    core_bytes = sum(core.stored_bytes for core in stored.cores.values())
    assert sum(s.core_bytes for s in done.slices) == pytest.approx(core_bytes)
    assert sum(s.squared_norm for s in done.slices) == pytest.approx(done.squared_norm)
    if type_mode == "identity":
        assert sum(s.nnz for s in done.slices) == stored.nnz
        assert sum(s.squared_energy for s in done.slices) == pytest.approx(
            done.squared_energy_stage2
        )
    else:
        by_head = {s.head: s.core_bytes for s in done.slices}
        assert all(s.core_bytes == by_head[s.head] for s in done.slices)


@pytest.mark.parametrize("keep", [0.6, 0.2])
@pytest.mark.parametrize("method", SHARED)
def test_unquantized_the_residual_is_the_energy_not_kept(method, keep):
    done = decompose(method, LAYOUTS["mha"], keep, FP32)
    expected = done.squared_norm - done.squared_energy_stage2
    assert done.squared_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("method", SHARED)
def test_other_value_types(method, dtype):
    layout = LAYOUTS["gqa"]
    done = decompose(method, layout, 0.5, dtype)
    tensors = done.decomposition.named_tensors("x")
    assert all(t.dtype == dtype for name, t in tensors.items() if name.endswith(".weight"))
    assert done.decomposition.stored_bytes <= budget_of(layout, 0.5, dtype)
    assert done.relative_error == pytest.approx(
        decompose(method, layout, 0.5).relative_error, abs=0.05
    )


@pytest.mark.parametrize("type_mode", ["identity", "learned"])
def test_prune_refit_agrees_with_one_shot(type_mode):
    one, pruned = (
        decompose("lestd", LAYOUTS["mha"], 0.4, stage2=stage2, type_mode=type_mode)
        for stage2 in ("one-shot", "prune-refit")
    )
    assert pruned.relative_error == pytest.approx(one.relative_error, rel=1e-4)
    a, b = (
        torch.cat([c.decode().flatten() != 0 for c in d.decomposition.cores.values()])
        for d in (one, pruned)
    )
    assert float((a != b).float().mean()) < 2e-3
    assert pruned.decomposition.stored_bytes <= budget_of(LAYOUTS["mha"], 0.4, BF16)


@pytest.mark.parametrize("name", ["mha", "odd"])
def test_a_sparse_core_beats_a_dense_one(name):
    layout = LAYOUTS[name]
    for keep in KEEPS:
        errors = [decompose(m, layout, keep, rank_step=4).relative_error for m in SHARED]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("type_mode", ["identity", "learned"])
@pytest.mark.parametrize("method", SHARED)
def test_the_same_input_gives_the_same_bytes(method, type_mode):
    runs = [
        decompose(method, LAYOUTS["fused"], 0.4, type_mode=type_mode).decomposition.named_tensors(
            ""
        )
        for _ in range(2)
    ]
    assert runs[0].keys() == runs[1].keys()
    for name, tensor in runs[0].items():
        assert torch.equal(tensor.view(torch.uint8), runs[1][name].view(torch.uint8))


def test_learned_types_do_not_depend_on_how_modules_are_fused():
    separate, together = mha(44, 11, 4), fused(44, 11, 4)
    W = unfolding(separate)
    weights = fold_weights(W, separate)
    per_head = {t: weights[f"{t}_proj"].view(4, 11, 44) for t in "qkv"}
    qkv = torch.stack([per_head[t] for t in "qkv"], dim=1).reshape(-1, 44)
    W_fused = unfold_weights({"qkv": qkv, "dense": weights["o_proj"]}, together)
    a = decompose("lestd", separate, 0.4, W=W, type_mode="learned", rank_step=4)
    b = decompose("lestd", together, 0.4, W=W_fused, type_mode="learned", rank_step=4)
    assert a.decomposition.ranks == b.decomposition.ranks
    # Norms are summed in another order, so the last bit may differ.
    for name, core in a.decomposition.cores.items():
        torch.testing.assert_close(core.decode(), b.decomposition.cores[name].decode())
    assert a.relative_error == pytest.approx(b.relative_error, rel=1e-4)


def test_learned_types_pay_where_projections_are_alike():
    """All four projections of a head are multiples of one matrix: R3 = 1 holds them all."""
    layout = LAYOUTS["mha"]
    shared = unfolding(layout).view(48, 4, 4, 12)[:, :1]
    W = (shared * torch.tensor([1.0, -0.5, 2.0, 0.3])[None, :, None, None]).reshape(48, -1)
    learned = decompose("lestd", layout, 0.2, W=W, type_mode="learned")
    assert learned.decomposition.ranks["R3"] == 1
    assert learned.relative_error < 0.8 * decompose("lestd", layout, 0.2, W=W).relative_error
    assert set(learned.decomposition.cores) == {CORE_NAME}


@pytest.mark.parametrize("method", SHARED)
def test_learned_types_need_equal_heads(method):
    layout, args = LAYOUTS["gqa"], MethodArgs(type_mode="learned")
    budget = budget_of(layout, 0.5, BF16)
    message = "q 6, k 2, v 2, o 6; use type_mode 'identity'"
    with pytest.raises(LestdError, match=message):
        METHODS[method].bounds(layout, budget, BF16, args)
    with pytest.raises(LestdError, match=message):
        METHODS[method].decompose(unfolding(layout), layout, budget, BF16, args)


@pytest.mark.parametrize("type_mode", ["identity", "learned"])
@pytest.mark.parametrize("method", SHARED)
def test_the_smallest_budget_works_and_a_byte_less_is_refused(method, type_mode):
    layout, args = LAYOUTS["mha"], MethodArgs(type_mode=type_mode)
    with pytest.raises(LestdError) as refused:
        METHODS[method].bounds(layout, 1, BF16, args)
    least = int(re.search(r"take ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    stored = METHODS[method].decompose(unfolding(layout), layout, least, BF16, args).decomposition
    assert stored.stored_bytes <= least
    assert stored.nnz > 0
    assert METHODS[method].bounds(layout, least, BF16, args).max_nnz >= 1
    for call in (
        lambda: METHODS[method].bounds(layout, least - 1, BF16, args),
        lambda: METHODS[method].decompose(unfolding(layout), layout, least - 1, BF16, args),
    ):
        with pytest.raises(LestdError, match="smallest ranks"):
            call()


@pytest.mark.parametrize("method", SHARED)
def test_arithmetic_can_be_limited(method):
    layout = LAYOUTS["narrow"]

    def ratio(done):
        R1, R2 = done.decomposition.ranks["R1"], done.decomposition.ranks["R2"]
        flops = 2 * 64 * R1 + 12 * (R1 * R2 + R2 * 4)
        return flops / layout.dense_flops_per_token

    free = decompose(method, layout, 0.8, rank_step=4)
    limited = decompose(method, layout, 0.8, rank_step=4, max_flops=0.5)
    assert ratio(free) > 0.5 >= ratio(limited)
    assert limited.relative_error > free.relative_error
    with pytest.raises(LestdError, match=r"max_flops is 0\.001"):
        decompose(method, layout, 0.8, max_flops=0.001)


def test_a_value_beyond_float16_is_refused():
    W = unfolding(LAYOUTS["mha"]) * 300_000
    with pytest.raises(LestdError, match=r"core of q_proj.*float16 \(at most 6\.55e\+04\)"):
        decompose("lestd", LAYOUTS["mha"], 0.5, FP16, W=W)
    assert decompose("lestd", LAYOUTS["mha"], 0.5, BF16, W=W).relative_error < 1
    W *= 3e38 / float(W.abs().max())
    with pytest.raises(LestdError, match=r"bfloat16 \(at most 3\.39e\+38\).*check the checkpoint"):
        decompose("lestd", LAYOUTS["mha"], 0.5, BF16, W=W)


def test_values_that_round_to_zero_are_never_stored():
    """float16 ends at 6e-8: small weights leave most of a core at zero."""
    layout = LAYOUTS["mha"]
    W = unfolding(layout) * 1e-7
    done = decompose("lestd", layout, 0.8, FP16, W=W)
    for core in done.decomposition.cores.values():
        if core.codec != "dense":
            assert bool((core.tensors["values"] != 0).all())
    assert 0 < done.decomposition.nnz < layout.elements / 4
    assert done.threshold >= torch.finfo(FP16).smallest_normal * 2**-10


@pytest.mark.parametrize("method", SHARED)
def test_zero_weights_have_no_error(method):
    layout = LAYOUTS["gqa"]
    done = decompose(method, layout, 0.5, W=torch.zeros(layout.width, 16 * len(layout.slices)))
    assert done.relative_error == done.squared_error == done.threshold == 0
    assert done.decomposition.nnz == 0
    assert all(s.relative_error == 0 for s in done.slices)
    assert bool((done.decomposition.reconstruct() == 0).all())


@pytest.mark.parametrize("keep", KEEPS)
def test_trained_attention_weights(tiny_llama, keep):
    """The errors of METHOD.md section 8 in kind: lestd < tucker, both within its ranges."""
    layout = mha(256, 32, 8)
    with safe_open(tiny_llama / "model.safetensors", "pt") as file:
        prefix = "model.layers.2.self_attn"
        weights = {m.name: file.get_tensor(f"{prefix}.{m.name}.weight") for m in layout.modules}
    W = unfold_weights(weights, layout)
    lestd, tucker = (decompose(m, layout, keep, W=W) for m in SHARED)
    expected = {0.8: 0.193, 0.6: 0.307, 0.4: 0.435, 0.2: 0.595}[keep]
    assert lestd.relative_error == pytest.approx(expected, abs=0.003)
    assert lestd.relative_error < 0.92 * tucker.relative_error
    assert lestd.decomposition.stored_bytes > 0.999 * budget_of(layout, keep, BF16)
    assert {core.codec for core in lestd.decomposition.cores.values()} == {"bitmask"}


def test_every_codec_is_reached():
    used = set()
    for keep in (0.8, 0.1):
        for method in SHARED:
            cores = decompose(method, LAYOUTS["mha"], keep).decomposition.cores
            used |= {core.codec for core in cores.values()}
    # A value projection far larger than the others leaves those nearly empty.
    W = unfolding(LAYOUTS["mha"]).view(48, 4, -1) * torch.tensor([0.02, 0.01, 1, 0.01])[:, None]
    cores = decompose("lestd", LAYOUTS["mha"], 0.2, W=W.reshape(48, -1)).decomposition.cores
    used |= {core.codec for core in cores.values()}
    assert used == set(CODECS)


SLOW = pytest.mark.slow
MEASURE = """
import sys, torch
from pathlib import Path
from support import groups
from lestd_kernels.methods import METHODS, MethodArgs
from workers.host.devices import return_freed_memory

torch.set_num_threads(1)
return_freed_memory()

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

layout, args = groups.{layout}(*{sizes}), MethodArgs(**{args})
W = torch.randn(layout.width, layout.elements // layout.width)
metrics = groups.grams(layout) if args.metric == "loss" else {{}}
budget = int({keep} * W.numel() * 2)
torch.linalg.eigh(torch.eye(8).double())
W[:8] @ W[:8].T
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
curve = [budget // 2] if metrics else []
METHODS["{method}"].decompose(W, layout, budget, torch.bfloat16, args, curve, metrics)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("method", "layout", "sizes", "keep", "args"),
    [
        ("lestd", "mha", (1024, 128, 16), 0.8, {}),
        ("lestd", "fused", (1024, 128, 16), 0.8, {"type_mode": "learned"}),
        ("tucker", "mha", (1024, 128, 16), 0.8, {}),
        ("lestd", "experts", (512, 192, 24), 0.2, {"metric": "loss"}),
        *(
            pytest.param(one, "experts", (512, 192, 24), 0.2, {"metric": "loss"}, marks=SLOW)
            for one in ("watersic", "auto")
        ),
    ],
)
def test_the_predicted_memory_bounds_the_measured(method, layout, sizes, keep, args):
    code = MEASURE.format(method=method, layout=layout, sizes=sizes, keep=keep, args=args)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    group = getattr(groups, layout)(*sizes)
    budget = budget_of(group, keep, BF16)
    bounds = METHODS[method].bounds(group, budget, BF16, MethodArgs(**args))
    assert measured <= bounds.workspace_bytes <= 3 * measured


@pytest.mark.gpu
@pytest.mark.parametrize("type_mode", ["identity", "learned"])
@pytest.mark.parametrize("method", SHARED)
def test_cuda_agrees_with_the_cpu_and_with_itself(method, type_mode):
    layout = LAYOUTS["mha"]
    W = unfolding(layout)
    cpu = decompose(method, layout, 0.4, W=W, type_mode=type_mode)
    runs = [decompose(method, layout, 0.4, W=W.cuda(), type_mode=type_mode) for _ in range(2)]
    assert runs[0].relative_error == pytest.approx(cpu.relative_error, rel=1e-3)
    assert runs[0].decomposition.stored_bytes <= budget_of(layout, 0.4, BF16)
    first, second = (run.decomposition.named_tensors("") for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_arguments_are_plain_values():
    args = MethodArgs(alpha=0.2, max_flops=0.5)
    assert MethodArgs(**json.loads(json.dumps(vars(args)))) == args
    assert replace(args, alpha=0.1, max_flops=None) == MethodArgs()
    assert all(name == method.name for name, method in METHODS.items())
    assert len(PROJECTIONS) == 4


@pytest.mark.parametrize("method", ["tt", "magnitude", "wanda", "sparsegpt", "rtn", "gptq"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("type_mode", "learned"),
        ("stage2", "prune-refit"),
        ("pattern", "2:4"),
        ("max_flops", 1.0),
    ],
)
def test_what_is_of_sparse_cores_is_refused_by_methods_without(method, option, value):
    layout = LAYOUTS["mha"]
    args = MethodArgs(**{option: value})
    with pytest.raises(LestdError, match=f"method '{method}' .*support.*{value}.*; change one"):
        METHODS[method].bounds(layout, budget_of(layout, 0.6, BF16), BF16, args)
