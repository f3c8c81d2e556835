"""Identity of a checkpoint without reading it: samples of its data, sizes, times."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from workers.checkpoint.tensors import ShardIndex, open_shard, read_exactly
from workers.contracts import TensorRef
from workers.storage import ranges
from workers.storage.files import in_parallel

_SAMPLE_BYTES = 64 * 1024


def sample_digests(index: ShardIndex) -> dict[str, str]:
    """A cheap fingerprint of each shard: shard -> sha256 (hex), the same wherever it lies.

    Covers what the header says of each tensor, and the first and last 64 KiB of its data; a
    fingerprint that differs proves a change, one that agrees makes it unlikely.

    Raises:
        LestdError: a shard cannot be read.
    """
    by_shard: dict[str, list[TensorRef]] = {shard: [] for shard in index.shards}
    for ref in (part for one in index.tensors.values() for part in one.on_disk):
        by_shard[ref.shard.removeprefix(index.location + "/")].append(ref)
    digests = {}
    for shard, refs in by_shard.items():
        if ranges.is_url(index.location):
            digests[shard] = _digest_samples(refs, _fetch_samples(refs))
        else:
            with open_shard(f"{index.location}/{shard}") as file:
                digests[shard] = _digest_samples(refs, _read_samples(file, refs))
    return digests


def _sampled(ref: TensorRef) -> list[tuple[int, int]]:
    """First byte and end of the parts of a tensor that are sampled."""
    start, stop = ref.byte_range
    parts = sorted({start, max(start, stop - _SAMPLE_BYTES)})
    return [(at, min(at + _SAMPLE_BYTES, stop)) for at in parts]


def _digest_samples(refs: list[TensorRef], samples: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    following = iter(samples)
    for ref in refs:
        digest.update(repr((ref.name, ref.dtype, ref.shape, ref.byte_range[0])).encode())
        for _ in _sampled(ref):
            digest.update(next(following))
    return digest.hexdigest()


def _read_samples(file: io.FileIO, refs: list[TensorRef]) -> Iterator[memoryview]:
    for ref in refs:
        for start, stop in _sampled(ref):
            sample = memoryview(bytearray(stop - start))
            read_exactly(file, ref, start, sample)
            yield sample


def _fetch_samples(refs: list[TensorRef]) -> Iterator[memoryview]:
    """As `_read_samples`; where one tensor ends and the next begins, one request gets both."""
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(part for ref in refs for part in _sampled(ref)):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    begins = [start for start, _ in runs]
    buffers = [memoryview(bytearray(stop - start)) for start, stop in runs]
    if refs:
        ranges.read_ranges(refs[0].shard, refs[0].version, zip(begins, buffers, strict=True))
    for ref in refs:
        for start, stop in _sampled(ref):
            run = bisect_right(begins, start) - 1
            yield buffers[run][start - begins[run] : stop - begins[run]]


def shard_stats(index: ShardIndex) -> dict[str, list[int | str]]:
    """Cheap signs of a change, by shard: size in bytes, and time of change or ETag.

    Raises:
        LestdError: a shard cannot be looked up.
    """
    addresses = [f"{index.location}/{shard}" for shard in index.shards]
    found: list[list[int | str]]
    if ranges.is_url(index.location):
        found = [[*stat] for stat in in_parallel(ranges.stat, addresses)]
    else:
        stats = [Path(address).stat() for address in addresses]
        found = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    return dict(zip(index.shards, found, strict=True))
