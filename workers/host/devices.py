"""Device of a worker: its name, and the memory that was used."""

from __future__ import annotations

import ctypes
import platform
import resource
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3  # malloc.h


def device_name(device: torch.device) -> str:
    """Name of a device in the manifest: the GPU, or the CPU and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def gpu_memory_bytes() -> int:
    """Memory of this process' first GPU."""
    return torch.cuda.get_device_properties(0).total_memory


def release_device_memory(worker: object) -> None:
    """Give back what PyTorch keeps of the GPU's memory for later, in the process of a worker."""
    torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Have this process give memory of 1 MiB or more back as soon as it is freed (glibc).

    By default each thread keeps up to hundreds of MiB for blocks of less than 32 MiB, and a
    worker's memory grows for its first tasks. Costs up to a fifth of the time of small layers:
    pages are cleared anew.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def require_exact_products() -> None:
    """Turn TF32 off: its 10 bits of mantissa are too few for factors that are to be orthonormal."""
    torch.backends.cuda.matmul.allow_tf32 = False


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux: 5 resets the high-water mark of the resident set (man 5 proc, clear_refs). Elsewhere
    # the figure is the peak since the process began.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since `reset_peak_memory`: of the device, or on CPU the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def software_versions() -> dict[str, str]:
    """Versions of what decides a payload's bytes."""
    return {"lestd": version("lestd"), "torch": torch.__version__}
