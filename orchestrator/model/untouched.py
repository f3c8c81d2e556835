"""Tensors that are copied unchanged from a remote source.

They are most of a model, and fetching them may take hours. A shard of them grows in the run
directory, and a progress file beside it says how much of it is whole: it is written after each
tensor, when the tensor is on disk, so that an assembly that was killed fetches none of them twice.
A finished shard is linked into the model where both are on one disk: from then on it is not written
to, but replaced.

    untouched/dense-00001-of-00004.safetensors
    untouched/dense-00001-of-00004.safetensors.json
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from workers.checkpoint.headers import build_header, layout_key
from workers.checkpoint.tensors import copy_tensor
from workers.contracts import TensorRef
from workers.storage.building import make_own_directory
from workers.storage.files import explain_os_errors
from workers.storage.json_files import write_json
from workers.storage.untrusted_files import parse_json, read_regular

UNTOUCHED_DIR = "untouched"


def fetch_shard(refs: Sequence[TensorRef], directory: Path, name: str) -> Path:
    """Fetch tensors into a shard; go on after the last one that an earlier call has finished.

    Args:
        refs: the tensors, in shards that lie elsewhere.
        directory: where unfinished shards are kept; made if need be.
        name: of the shard.

    Returns:
        Path of the finished shard: the same bytes as
        `workers.checkpoint.tensors.write_safetensors_stream` writes.

    Raises:
        LestdError: a source shard has changed or cannot be read.
        OutOfSpaceError: no space left.
    """
    make_own_directory(directory)
    path, progress = directory / name, directory / f"{name}.json"
    ordered = sorted(refs, key=layout_key)
    header = build_header(ordered)
    content = hashlib.sha256(header)
    for ref in ordered:
        content.update(repr((ref.shard, ref.version, ref.byte_range)).encode())
    size = len(header) + sum(ref.stored_bytes for ref in ordered)
    done = _bytes_done(path, progress, content.hexdigest(), size)
    if done == 0:
        progress.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    with explain_os_errors(path), path.open("r+b" if done else "xb") as file:
        file.truncate(done)
        file.seek(done)
        position = len(header)
        if done == 0:
            file.write(header)
        for ref in ordered:
            position += ref.stored_bytes
            if position <= done:
                continue
            copy_tensor(ref, file)
            file.flush()
            os.fsync(file.fileno())
            record = {"content": content.hexdigest(), "bytes": position}
            write_json(progress, record)
    return path


def _bytes_done(path: Path, progress: Path, content: str, size: int) -> int:
    """How many bytes of the shard may stay: 0 where they are of other tensors, or unknown."""
    try:
        record = parse_json(read_regular(progress))
        done, found = int(record["bytes"]), path.lstat()
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    if record["content"] != content or found.st_size < done or not stat.S_ISREG(found.st_mode):
        return 0
    finished = done == found.st_size == size
    return done if finished or found.st_nlink == 1 else 0
