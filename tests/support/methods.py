"""Any method on a made group."""

import torch

from lestd_kernels.methods import METHODS, MethodArgs
from support.groups import unfolding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def budget_of(layout, keep, dtype):
    return int(keep * layout.elements * dtype.itemsize)


def decompose(method, layout, keep, dtype=BF16, W=None, **args):
    W = unfolding(layout) if W is None else W.clone()  # a method uses its unfolding up
    budget = budget_of(layout, keep, dtype)
    return METHODS[method].decompose(W, layout, budget, dtype, MethodArgs(**args))
