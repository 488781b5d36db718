"""Products of what layers see, summed in float32 where they come in lower precision.

On a GPU its tensor cores do so by themselves: the factors of a product are in 16 bits, as the
network left them, and its sums are not rounded to these.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Kinds of devices that have tensor cores.
TENSOR_CORES = {"cuda"}
_LOW = (torch.bfloat16, torch.float16)
_SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.bmm.overloads()  # in this version of PyTorch


def on_tensor_cores(z: Tensor) -> bool:
    """Whether products of a tensor are computed where large ones cost far less than others."""
    return z.device.type in TENSOR_CORES


def stays_low(z: Tensor) -> bool:
    """Whether products of a tensor are summed in more bits than it has itself."""
    return z.is_cuda and z.dtype in _LOW and _SUMS_IN_FLOAT32


def summed_dtype(z: Tensor) -> torch.dtype:
    """The precision of sums of products of a tensor."""
    return torch.float32 if z.dtype in _LOW else z.dtype


def summable(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of which products are summed in a precision; tokens as they are."""
    if not z.is_floating_point() or (stays_low(z) and dtype == torch.float32):
        return z
    return z.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, weight: float) -> None:
    """Add ``weight a b``, of two batches of matrices."""
    if stays_low(a):
        total.add_(product(a, b), alpha=weight)
    else:
        total.baddbmm_(a, b, alpha=weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, of two matrices or of two batches of matrices."""
    return _summed_in_float32(a, b) if stays_low(a) else a @ b


def _summed_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b, out_dtype=torch.float32)
