"""Decomposing one layer: LeSTD against tensorly, and against the matrix products it cannot avoid.

    python benchmarks/one_layer.py                 prints the table of docs/decomposition.md
    python benchmarks/one_layer.py --widths 1536   one width only
    python benchmarks/one_layer.py --device cuda   on a GPU; tensorly stays on the CPU

A layer is Q, K, V and O of an attention block of some width (heads of 128), with weights as
benchmarks/make_checkpoint.py makes them. Three things are timed in turn in one run:

    lestd      Stage I and II at the given keep: the method as a worker runs it, from the unfolding
               in memory to the encoded cores and the error of every head
    tensorly   `partial_tucker` of the same tensor (d, p, S) at the ranks that LeSTD chose, and a
               threshold that keeps as many core elements; it does not choose ranks, encode or
               measure. Left out beyond --tensorly-width, where it takes hours
    floor      the Gram matrix of mode 1 and the projection of the tensor onto U1, once each

Errors are relative to the norm of the layer, before values are rounded to 16 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import tensorly
import torch
from make_checkpoint import make_config, make_tensor
from tensorly.decomposition import partial_tucker
from torch import Tensor

from lestd_kernels.linalg.stage1 import project_rows
from lestd_kernels.methods import METHODS, MethodArgs
from lestd_kernels.methods.common.base import Decomposed
from lestd_kernels.tensorize import GroupLayout, ModuleLayout, unfold_weights

HEAD_DIM = 128
STAGES = ("stage1", "rank_search", "stage2", "error")


def make_layer(width: int, seed: int = 0) -> tuple[GroupLayout, Tensor]:
    """An attention block: its layout, and its unfolding ``(d, S p)`` in float32."""
    heads = width // HEAD_DIM
    config = make_config("opt-30b", 1, hidden_size=width, num_attention_heads=heads)
    modules = tuple(
        ModuleLayout(name, "output" if t == "o" else "input", tuple((t, i) for i in range(heads)))
        for t, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True)
    )
    layout = GroupLayout(config.hidden_size, HEAD_DIM, modules)
    with ThreadPoolExecutor(1) as pool:
        weights = {
            m.name: make_tensor(
                f"model.decoder.layers.0.self_attn.{m.name}.weight",
                layout.weight_shape(m),
                torch.bfloat16,
                seed,
                pool,
            )
            for m in modules
        }
    return layout, unfold_weights(weights, layout)


def seconds(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def run_floor(unfolding: Tensor) -> Tensor:
    """The two products that no method of this kind can do without."""
    gram = unfolding @ unfolding.T
    return project_rows(unfolding, gram)


def run_tensorly(unfolding: Tensor, layout: GroupLayout, done: Decomposed) -> float:
    """Relative error of tensorly's decomposition, thresholded to the same number of non-zeros."""
    W = unfolding.cpu().view(layout.width, -1, HEAD_DIM)
    R1, R2 = done.decomposition.U1.shape[1], done.decomposition.U2.shape[1]
    (core, factors), _ = partial_tucker(W, rank=[R1, R2], modes=[0, 2])
    threshold = core.abs().flatten().kthvalue(core.numel() - done.decomposition.nnz).values
    core = core * (core.abs() > threshold)
    W_hat = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 2])
    return float(torch.linalg.vector_norm(W - W_hat) / torch.linalg.vector_norm(W))


def measure(width: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    layout, made = make_layer(width)
    budget = int(options.keep * layout.elements * 2)

    def lestd() -> Decomposed:
        args = MethodArgs()
        return METHODS["lestd"].decompose(unfolding, layout, budget, torch.bfloat16, args)

    times: dict[str, list[float]] = {"lestd": [], "floor": []}
    for _ in range(options.repeats):
        unfolding = made.clone().to(options.device)  # what decomposing it overwrites
        times["floor"].append(seconds(partial(run_floor, unfolding), options.device)[0])
        took, done = seconds(lestd, options.device)
        times["lestd"].append(took)
    ours, floor = (statistics.median(times[name]) for name in ("lestd", "floor"))
    stored = done.decomposition
    density = stored.nnz / sum(core.rows * core.columns for core in stored.cores.values())
    row = [f"{width}", f"{stored.ranks['R1']} x {stored.ranks['R2']}", f"{density:.2f}"]
    row += [f"{done.seconds[stage]:.2f}" for stage in STAGES]
    row += [f"{ours:.2f}", f"{floor:.2f}", f"{ours / floor:.2f}", f"{done.relative_error:.4f}"]
    if width > options.tensorly_width:
        return [*row, "", "", ""]
    took, error = seconds(lambda: run_tensorly(made, layout, done), "cpu")
    return [*row, f"{took:.1f}", f"{took / ours:.0f}", f"{error:.4f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[1536, 4096, 7168])
    parser.add_argument("--tensorly-width", type=int, default=4096, help="the largest for tensorly")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--repeats", type=int, default=3, help="of lestd and the floor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    tensorly.set_backend("pytorch")

    print(f"keep {options.keep}, {options.threads} threads, torch {torch.__version__}\n")
    names = ("d", "ranks", "density", *STAGES, "lestd, s", "floor, s", "x floor", "error")
    names += ("tensorly, s", "tensorly x lestd", "its error")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for width in options.widths:
        print(f"| {' | '.join(measure(width, options))} |", flush=True)


if __name__ == "__main__":
    main()
