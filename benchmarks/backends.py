"""Speed of the backends: attention projections of Llama-2-13B's shape against nn.Linear.

    python benchmarks/backends.py                  prints the table of README.md, in Markdown
    python benchmarks/backends.py --device cuda    on a GPU, where calls are timed by its events

One row is Q, K, V and O of one layer (d 5120, 40 heads of 128) for some tokens, dense or
compressed. Candidates take turns; before each call caches are emptied, as the other layers of a
model do. A row says the median, its ratio to the dense layer, and the floor: the bytes that must
be read over the bandwidth of a large float32 matrix-vector product, or the multiply-adds over the
rate of a large matrix product in the same dtype, whichever takes longer; both are measured in turn
with the candidates.

Weights are random. R1 is the share of d that LeSTD's rank search takes at each keep on the model
in examples/, R2 is the head width, and the density is what then fits the bytes. Rows "cap" have
the R1 that `max_flops: 1.0` allows, where that is less. Rows "csr" have a core of density 0.05,
for which that codec is the smallest; rows "2:4" (on GPUs) have half of each four elements. On CPU,
"bitmask, avx2" and so on are the paths of the kernel that the CPU has, "chosen" takes the first.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from lestd_kernels import set_backend
from lestd_kernels.backends import bitmask
from lestd_kernels.modules.shared_tucker_linear import (
    CompressedLinear,
    CoreSpec,
    Factor,
    share_products,
)
from lestd_kernels.search.two_of_four import two_of_four
from lestd_kernels.storage.codecs import CODECS, TWO_OF_FOUR, UNSTRUCTURED

WIDTH, HEADS, HEAD_DIM = 5120, 40, 128
PROJECTIONS = ("q", "k", "v", "o")
R1_SHARE = {0.2: 0.30, 0.4: 0.55, 0.6: 0.77, 0.8: 0.95}
CSR_KEEP, CSR_DENSITY = 0.2, 0.05
READ_WIDTH, PRODUCT_TOKENS = 8192, 4096  # enough to keep every core busy
MANY_TOKENS, FEW_REPEATS = 512, 3
PACKED_BACKENDS = {
    "cpu": {"bitmask": "bitmask", "cap": "bitmask", "csr": "csr"},
    "cuda": {"bitmask": "triton", "cap": "triton", "2:4": "2:4"},
}
CACHE_BYTES = 600 * 2**20  # more than the largest last-level cache of a server CPU today


@dataclass(frozen=True)
class Shape:
    """Size of a compressed layer: one core density for all four projections."""

    keep: float
    kind: str
    R1: int
    density: float

    @property
    def codec(self) -> str:
        """How the cores are packed."""
        return "csr" if self.kind == "csr" else "bitmask"


def multiply_adds(R1: int) -> int:
    """Of the compressed layer for one token."""
    return 2 * WIDTH * R1 + 4 * HEADS * HEAD_DIM * (R1 + HEAD_DIM)


def shapes(keep: float, value_bytes: int, device: str) -> list[Shape]:
    """The layers to measure at one keep."""
    columns = HEADS * HEAD_DIM
    budget = keep * 4 * WIDTH * columns * value_bytes

    def largest_rank(density: float, index_bytes: float) -> int:
        per_rank = WIDTH * value_bytes + 4 * columns * (density * value_bytes + index_bytes)
        return min(int(budget / per_rank / 8) * 8, WIDTH)

    def bitmask(kind: str, R1: int) -> Shape:
        core = 4 * R1 * columns
        density = (budget - WIDTH * R1 * value_bytes - core / 8) / (core * value_bytes)
        return Shape(keep, kind, R1, min(density, 1.0))

    R1 = round(R1_SHARE[keep] * WIDTH / 8) * 8
    found = [bitmask("bitmask", R1)]
    cap = next(r for r in range(WIDTH, 0, -8) if multiply_adds(r) <= 4 * WIDTH * WIDTH)
    if cap < R1:
        found.append(bitmask("cap", cap))
    if keep == CSR_KEEP:
        found.append(Shape(keep, "csr", largest_rank(CSR_DENSITY, 2 * CSR_DENSITY), CSR_DENSITY))
    if device == "cuda":
        found.append(Shape(keep, "2:4", largest_rank(0.5, 1 / 8), 0.5))
    return found


class Projections(nn.Module):
    """Q, K, V and O of one layer, without the attention between them."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(linears)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of Q, K and V, through O."""
        q, k, v, o = (self.linears[p] for p in PROJECTIONS)
        out: Tensor = o(q(x) + k(x) + v(x))
        return out

    @property
    def data_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(t.nbytes for t in self.state_dict().values())


@dataclass(frozen=True)
class OnPath:
    """A layer by one path of the CPU's kernel."""

    layer: Projections
    path: str

    def __call__(self, x: Tensor) -> Tensor:
        """As the layer's own."""
        with mock.patch.object(bitmask, "path", return_value=self.path):
            out: Tensor = self.layer(x)
        return out

    @property
    def data_bytes(self) -> int:
        """As the layer's own."""
        return self.layer.data_bytes


def dense_layer(dtype: torch.dtype) -> Projections:
    """Four nn.Linear."""
    sizes = dict.fromkeys("qkv", (WIDTH, HEADS * HEAD_DIM)) | {"o": (HEADS * HEAD_DIM, WIDTH)}
    return Projections({p: nn.Linear(*s, bias=False, dtype=dtype) for p, s in sizes.items()})


def compressed_layer(shape: Shape, dtype: torch.dtype) -> Projections:
    """The same four, compressed, with random weights."""
    columns = HEADS * HEAD_DIM
    U1, U2 = Factor(WIDTH, shape.R1, dtype), Factor(HEAD_DIM, HEAD_DIM, dtype)
    nn.init.normal_(U1.weight, std=WIDTH**-0.5)
    nn.init.normal_(U2.weight, std=HEAD_DIM**-0.5)
    linears: dict[str, nn.Module] = {}
    for projection in PROJECTIONS:
        M = torch.randn(shape.R1, columns)
        if shape.kind == "2:4":
            M *= two_of_four(M, 1 if projection == "o" else 0)
        else:
            M *= torch.rand(shape.R1, columns) < shape.density
        packed = CODECS[shape.codec].encode((M * shape.R1**-0.5).to(dtype))
        linear = CompressedLinear(
            WIDTH if projection != "o" else columns,
            columns if projection != "o" else WIDTH,
            "output" if projection == "o" else "input",
            HEADS,
            (U1, U2),
            CoreSpec(
                shape.codec,
                shape.R1,
                columns,
                packed["values"].numel(),
                TWO_OF_FOUR if shape.kind == "2:4" else UNSTRUCTURED,
            ),
            bias=False,
            dtype=dtype,
        )
        values = {"weight" if n == "values" else n: tensor for n, tensor in packed.items()}
        linear.load_state_dict(values)
        linears[projection] = linear
    layer = Projections(linears)
    layer.factors = nn.ModuleList([U1, U2])
    share_products(layer)
    return layer


def compressed_layers(
    shape: Shape, dtype: torch.dtype, device: str
) -> dict[str, Projections | OnPath]:
    """The same layer by each backend that has its codec, and with the choice left open."""
    layer = compressed_layer(shape, dtype).to(device)
    layers: dict[str, Projections | OnPath] = {"chosen": layer}
    packed = PACKED_BACKENDS[device].get(shape.kind)
    for name in filter(None, (packed, "dense_core", "eager")):
        forced = copy.deepcopy(layer)
        set_backend(forced, name)
        if name == "bitmask" and bitmask.is_available():
            for path in torch.ops.lestd.bitmask_paths():
                layers[f"bitmask, {path}"] = OnPath(forced, path)
        else:
            layers[name] = forced
    return layers


def seconds_of(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds that one call takes."""
    if x.device.type == "cuda":
        # Emptying the cache still runs meanwhile, which hides how long launching takes.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(x)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int
) -> dict[str, float]:
    """Median seconds of each call on x, all in turn, each with empty caches."""
    cache = torch.zeros(CACHE_BYTES // 4, device=x.device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            cache.add_(1)
            took = seconds_of(call, x)
            if turn:  # the first one compiles, and fills what is kept
                seconds[name].append(took)
    return {name: statistics.median(times) for name, times in seconds.items()}


def machine_calls(dtype: torch.dtype, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """A matrix-vector and a matrix product, whose speed sets the floors."""
    matrix = torch.randn(READ_WIDTH, READ_WIDTH, device=device)
    x, W = (torch.randn(n, WIDTH).to(device, dtype) for n in (PRODUCT_TOKENS, WIDTH))
    return {"read": lambda _: matrix @ matrix[0], "product": lambda _: x @ W.T}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=PACKED_BACKENDS, default="cpu")
    parser.add_argument(
        "--keeps", type=float, nargs="+", choices=R1_SHARE, default=sorted(R1_SHARE)
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=9, help="fewer for many tokens")
    parser.add_argument("--quick", action="store_true", help="keep 0.4 in bfloat16, 3 repeats")
    options = parser.parse_args()
    if options.quick:
        options.keeps, options.dtypes, options.repeats = [0.4], ["bfloat16"], 3
    torch.manual_seed(0)
    device = options.device

    machine = f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, medians of {options.repeats}, torch {torch.__version__}")
    for dtype in (getattr(torch, name) for name in options.dtypes):
        print(f"\n{dtype}\n")
        print("| keep | core | R1 | density | tokens | backend | ms | x dense | floor | x floor |")
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        dense, calibration = dense_layer(dtype).to(device), machine_calls(dtype, device)
        for shape in (
            shape for keep in options.keeps for shape in shapes(keep, dtype.itemsize, device)
        ):
            layers = {"dense": dense} | compressed_layers(shape, dtype, device)
            factor = WIDTH * shape.R1 * dtype.itemsize
            unpacked = 4 * shape.R1 * HEADS * HEAD_DIM * dtype.itemsize
            for tokens in options.tokens:
                x = torch.randn(tokens, WIDTH).to(device, dtype)
                with torch.no_grad():
                    repeats = FEW_REPEATS if tokens >= MANY_TOKENS else options.repeats
                    took = interleaved(calibration | layers, x, repeats)
                bandwidth = 4 * READ_WIDTH**2 / took["read"]
                rate = PRODUCT_TOKENS * WIDTH * WIDTH / took["product"]
                for name in layers:
                    seconds = took[name]
                    # U1 is read for Q, K and V, and again for O.
                    read, per_token = layers[name].data_bytes + factor, multiply_adds(shape.R1)
                    if name == "dense":
                        read, per_token = dense.data_bytes, 4 * WIDTH * WIDTH
                    elif name == "dense_core":
                        read = 2 * factor + unpacked
                    floor = max(read / bandwidth, tokens * per_token / rate)
                    cells = [
                        f"{shape.keep}",
                        shape.kind,
                        f"{shape.R1}",
                        f"{shape.density:.2f}",
                        f"{tokens}",
                    ]
                    cells += [name, f"{1e3 * seconds:.4g}", f"{seconds / took['dense']:.2f}"]
                    cells += [f"{floor / took['dense']:.2f}", f"{seconds / floor:.1f}"]
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
