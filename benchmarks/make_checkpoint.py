"""A checkpoint of a known model's shape with made-up weights, for runs that need its size.

    python benchmarks/make_checkpoint.py --shape llama-1b --out DIR

Writes config.json, generation_config.json and safetensors shards as the Hub holds them; there is
no tokenizer. Tensors are made and written one after the other: memory holds one of them, and a
few blocks of 2 MiB for each thread. The same options give the same bytes, whatever the threads are.

Every matrix is ``W = diag(c) N diag(a) Q diag(r)``, or its transpose where it writes the residual
stream: N has normal entries, a falls as a power law with its index, and Q is orthogonal: signs,
permutations and Hadamard blocks, so that a product with it costs next to nothing. Q and r belong to
the block, so that the projections of one attention block, and all of its heads, share a subspace.
The log-normal scales c and r of the channels make the entries heavy-tailed. A few matrices of the
first layers have super weights.

References: "The Super Weight in Large Language Models" (arXiv 2411.07191); power-law spectra of
trained weights: Martin and Mahoney (JMLR 2021).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from shapes import SHAPES, make_config, tensor_shapes
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from lestd_kernels.errors import LestdError
from orchestrator.console import output
from orchestrator.console.progress_bar import Meter
from orchestrator.source.checkpoint import CONFIG_FILE
from workers.checkpoint.headers import DTYPE_NAMES, TensorSpec, build_header, layout_key
from workers.checkpoint.tensors import INDEX_FILE
from workers.storage.building import building_directory, is_free
from workers.storage.files import atomic_write, fsync_directory, make_directory
from workers.storage.json_files import write_json

DTYPES = ("bfloat16", "float16", "float32")
SHARD_BYTES = 5 * 10**9

DECAY = (0.1, 0.3)
"""Range of the exponents of the spectra, one for each matrix."""
CHANNEL_SPREAD, NORM_SPREAD, BIAS_STD = 0.4, 0.25, 0.02
"""Standard deviations: of the logarithm of a channel's scale and of a norm's, and of a bias."""
GAIN = 0.7
"""Root mean square of a matrix's entries, times the square root of its number of inputs."""
SUPER_WEIGHTS, SUPER_SCALE = 3, 50.0
"""How many a matrix has that has any, and their size over the root mean square of the others."""

_BLOCK_ELEMENTS = 2**19
_HADAMARD = 64
_MARGIN_BYTES = 2**20
_WRITES_STREAM = re.compile(r"\.(o_proj|out_proj|down_proj|fc2)\.weight$")
_HAS_SUPER_WEIGHTS = re.compile(
    r"layers\.[0-3]\.(self_attn\.(o_proj|out_proj)|mlp\.(experts\.0\.)?down_proj|fc2)\.weight$"
)


def _generator(seed: int, *what: object) -> Generator:
    """Random numbers that belong to `what`."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _scales(count: int, spread: float, generator: Generator) -> Tensor:
    """Log-normal scales (count), their root mean square 1."""
    scales = torch.exp(spread * torch.randn(count, generator=generator))
    return scales / scales.square().mean().sqrt()


class _Mixing:
    """A random orthogonal matrix Q (width, width), applied to rows in about width x 200 steps."""

    def __init__(self, width: int, generator: Generator) -> None:
        self._orders = [torch.randperm(width, generator=generator) for _ in range(2)]
        self._signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1
        side, block = 1, torch.ones(1, 1)
        while side < _HADAMARD and width % (2 * side) == 0:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
            side *= 2
        self._block = block / side**0.5

    def __call__(self, x: Tensor) -> Tensor:
        """``x Q`` for x (n, width); x is overwritten."""
        side = len(self._block)
        x *= self._signs
        for order in self._orders:
            x = (x.index_select(1, order).reshape(-1, side) @ self._block).reshape(x.shape)
        return x


def make_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, pool: ThreadPoolExecutor
) -> Tensor:
    """One tensor of the checkpoint.

    Args:
        name: its name, which its random numbers belong to.
        shape: of a vector or a matrix.
        dtype: of the result; the arithmetic is in float32.
        seed: of the checkpoint.
        pool: its threads make blocks of rows; torch must be set to one thread.
    """
    generator = _generator(seed, name)
    if len(shape) == 1:
        noise = torch.randn(shape, generator=generator)
        return (BIAS_STD * noise if name.endswith(".bias") else (NORM_SPREAD * noise).exp()).to(
            dtype
        )
    out = torch.empty(shape, dtype=dtype)
    rms = GAIN / shape[1] ** 0.5
    transposed = _WRITES_STREAM.search(name) is not None
    count, width = reversed(shape) if transposed else shape
    # What the matrices of a block share belongs to the name of the block.
    shared = _generator(seed, name.rsplit(".", 2)[0], width)
    mix, stream = _Mixing(width, shared), _scales(width, CHANNEL_SPREAD, shared) * rms
    exponent = DECAY[0] + (DECAY[1] - DECAY[0]) * float(torch.rand((), generator=generator))
    spectrum = torch.arange(1, width + 1) ** -exponent
    spectrum /= spectrum.square().mean().sqrt()
    channels = _scales(count, CHANNEL_SPREAD, generator)
    rows = max(1, _BLOCK_ELEMENTS // width)

    def fill(start: int) -> None:
        stop = min(start + rows, count)
        block = torch.randn(stop - start, width, generator=_generator(seed, name, start))
        block = mix(block.mul_(spectrum)).mul_(stream)
        block = block.mul_(channels[start:stop, None]).to(dtype)
        if transposed:  # Copied in the order of memory, which is several times as fast.
            out[:, start:stop] = block.T.contiguous()
        else:
            out[start:stop] = block

    list(pool.map(fill, range(0, count, rows)))
    if _HAS_SUPER_WEIGHTS.search(name):
        places = torch.randint(out.numel(), (SUPER_WEIGHTS,), generator=generator)
        signs = torch.randint(2, (SUPER_WEIGHTS,), generator=generator) * 2.0 - 1
        out.view(-1)[places] = (signs * SUPER_SCALE * rms).to(dtype)
    return out


def checkpoint_shards(
    config: PretrainedConfig, dtype: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, list[TensorSpec]]:
    """Shard -> its tensors in the order of the file, each with at most so many bytes of data.

    A tensor that is larger has a shard of its own.
    """
    kind = DTYPE_NAMES[getattr(torch, dtype)]
    shards: list[list[TensorSpec]] = [[]]
    for name, shape in tensor_shapes(config).items():
        spec = TensorSpec(name, kind, shape)
        if shards[-1] and sum(s.stored_bytes for s in (*shards[-1], spec)) > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": sorted(shard, key=layout_key)
        for number, shard in enumerate(shards, 1)
    }


def weights_index(shards: Mapping[str, list[TensorSpec]]) -> dict[str, Any]:
    """Contents of the file that says which shard a tensor is in."""
    names = {spec.name: shard for shard, specs in shards.items() for spec in specs}
    total = sum(spec.stored_bytes for specs in shards.values() for spec in specs)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}


def _require_free(out: Path, needed: int) -> None:
    if not is_free(out):
        raise LestdError(f"{out} already exists; choose a new name for --out, or remove it")
    disk = next(p for p in out.parents if p.exists())
    free = shutil.disk_usage(disk).free
    if free < needed + _MARGIN_BYTES:
        raise LestdError(
            f"the disk of {disk} has {output.size(free)} free, but the checkpoint needs "
            f"{output.size(needed)} there; free some, or use fewer --layers or another --out"
        )


def make_checkpoint(
    config: PretrainedConfig,
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a checkpoint with made-up weights; `out` is complete, or absent.

    Args:
        config: of the model; `make_config` has those of `SHAPES`.
        out: the new directory; must not exist, or be empty.
        dtype: one of `DTYPES`.
        seed: of all random numbers.
        shard_bytes: data bytes of a shard, at most.
        threads: that make blocks of one tensor; torch is set to one thread for this process.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
        Bytes of data of all tensors.

    Raises:
        LestdError: `out` is taken, or its disk has too little room.
    """
    out = out.absolute()
    kind: torch.dtype = getattr(torch, dtype)
    shards = checkpoint_shards(config, dtype, shard_bytes)
    index = weights_index(shards)
    done, total = 0, index["metadata"]["total_size"]
    _require_free(out, total)
    make_directory(out.parent)
    busy = f"another process makes {out}; wait for it to end, or choose another --out"
    torch.set_num_threads(1)  # The last bit of a product depends on it.

    def write_shard(file: BinaryIO, shard: list[TensorSpec], pool: ThreadPoolExecutor) -> None:
        nonlocal done
        file.write(build_header(shard))
        for spec in shard:
            tensor = make_tensor(spec.name, spec.shape, kind, seed, pool)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            done += spec.stored_bytes
            if progress is not None:
                progress(done, total)

    with building_directory(out, "making", busy) as building:
        with ThreadPoolExecutor(threads) as pool:
            for name, specs in shards.items():
                atomic_write(
                    building.new / name,
                    lambda file, specs=specs: write_shard(file, specs, pool),
                )
        write_json(building.new / INDEX_FILE, index)
        for name, content in config_files(config, dtype).items():
            write_json(building.new / name, content)
        fsync_directory(building.new)
        building.finish()
    return total


def config_files(config: PretrainedConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """The configs of the model and of its generation, by their names."""
    architecture = AutoModelForCausalLM._model_mapping[type(config)].__name__
    named: Mapping[str, Any] = {"architectures": [architecture], "dtype": dtype}
    generation = GenerationConfig.from_model_config(config)
    return {
        CONFIG_FILE: config.to_diff_dict() | named,
        "generation_config.json": generation.to_diff_dict(),
    }


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide a made model's bytes."""
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="(default: as many as the model has)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def main() -> None:
    """Write the checkpoint that the options ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="(default: 5 GB)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="do not change a byte (default: all)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args()
    if min(options.threads, 1 if options.layers is None else options.layers) < 1:
        parser.error("--layers and --threads must be at least 1")
    try:
        with Meter("make checkpoint", "bytes") as meter:
            total = make_checkpoint(
                make_config(options.shape, options.layers),
                options.out,
                dtype=options.dtype,
                seed=options.seed,
                shard_bytes=options.shard_bytes,
                threads=options.threads,
                progress=meter.update,
            )
    except LestdError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was left behind")
    output.out.print(
        f"{options.out}: {output.size(total)} of made-up weights, and no tokenizer: plan, compress "
        "and bench take it, evaluate does not",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
