"""Failures: the answer of a worker that has no result."""

from __future__ import annotations

import errno
import traceback
from typing import Literal

import torch

from lestd_kernels.errors import LestdError, first_line
from workers.contracts import Failure
from workers.storage.retries import TransientError


def failure_of(task_id: str, subject: str, error: Exception) -> Failure:
    """The `Failure` for what was raised by work on an item that messages call `subject`."""
    name = type(error).__name__
    if isinstance(error, TransientError):  # It has been tried for long.
        return Failure(task_id, "infrastructure", name, str(error))
    if isinstance(error, LestdError):
        return Failure(task_id, "application", name, str(error))
    if lacks_device_memory(error):
        # PyTorch goes on with advice for those who write programs.
        found = ". ".join(first_line(error).split(". ")[:2]).rstrip(".")
        message = (
            f"{subject}: the GPU has too little memory ({found}); use GPUs with more, or "
            "--device cpu (compress, sweep and compare: start over with --fresh)"
        )
        return Failure(task_id, "device_memory", name, message, traceback.format_exc())
    kind: Literal["application", "infrastructure"] = (
        "infrastructure" if _is_of_the_machine(error) else "application"
    )
    message = f"{subject}: {name}: {first_line(error)}"
    return Failure(task_id, kind, name, message, traceback.format_exc())


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether a GPU or a file system failed, rather than the work.

    After most CUDA errors nothing on the GPU works any more in this process; another may do.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.EIO, errno.ESTALE)
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def lacks_device_memory(error: BaseException) -> bool:
    """Whether an error means, in a library's own words, that GPU memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
