"""What this CPU computes in."""

from __future__ import annotations

from functools import cache

import torch


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether matrix products of bfloat16 or float16 go through float32 on this CPU.

    They do where it has no instructions for them (AVX-512 BF16 or FP16, AMX, those of ARM), and
    cost some times as much as in float32. oneDNN, which multiplies them, is asked, with the
    limit that ``ONEDNN_MAX_CPU_ISA`` sets it; ``ATEN_CPU_CAPABILITY`` changes nothing about them.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    # Names private to PyTorch. A build without them, or without oneDNN, has no fast products.
    try:
        if dtype == torch.float16:
            return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
        # Of AVX-512 without the instructions for bfloat16 oneDNN says too that it can.
        cpu = torch.cpu
        without = cpu._is_avx512_supported() and not cpu._is_avx512_bf16_supported()
        return without or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return True
