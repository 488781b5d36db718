"""Products of what layers see, and running second moments ``Σ a aᵀ`` of it.

Products of what is in lower precision are summed in float32. On a GPU its tensor cores do so by
themselves: the factors stay in 16 bits, as the network left them, and their sums are not rounded to
these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.sums import Sums

#: Kinds of devices that have tensor cores.
TENSOR_CORES = {"cuda"}
_LOW = (torch.bfloat16, torch.float16)
_SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.bmm.overloads()  # in this version of PyTorch


def on_tensor_cores(z: Tensor) -> bool:
    """Tell whether products are computed where large ones cost far less than others."""
    return z.device.type in TENSOR_CORES


def stays_low(z: Tensor) -> bool:
    """Tell whether products of a tensor are summed in more bits than it has itself."""
    return z.is_cuda and z.dtype in _LOW and _SUMS_IN_FLOAT32


def summed_dtype(z: Tensor) -> torch.dtype:
    """The precision of sums of products of a tensor."""
    return torch.float32 if z.dtype in _LOW else z.dtype


def summable(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of which products are summed in a precision; tokens as they are."""
    if not z.is_floating_point() or (stays_low(z) and dtype == torch.float32):
        return z
    return z.to(dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, of two matrices or of two batches of matrices."""
    if not stays_low(a):
        return a @ b
    return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor, weight: float) -> None:
    """Add ``weight a b``, of two matrices or of two batches of matrices."""
    if stays_low(a):
        total.add_(product(a, b), alpha=weight)
    elif a.ndim == 2:
        total.unsqueeze(0).baddbmm_(a.unsqueeze(0), b.unsqueeze(0), alpha=weight)
    else:
        total.baddbmm_(a, b, alpha=weight)


def second_moment(z_NgSI: Tensor) -> Tensor:
    """``Σ_n Σ_s z zᵀ``: ``[N, S, I] -> [I, I]``, and group by group if there are groups."""
    z = _in_rows(z_NgSI)
    return product(z.mT, z)


def _in_rows(z_NgSI: Tensor) -> Tensor:
    return z_NgSI.movedim(0, -3).flatten(-3, -2)


class MomentSums(Sums):
    """Running sums of second moments, added to in place: in one product where there is a sum."""

    def add_second_moment(self, key: str, z_NgSI: Tensor, weight: float = 1.0) -> None:
        """Add ``weight`` times the :func:`second_moment`."""
        if key in self._sums:
            z = _in_rows(z_NgSI)
            add_product(self._sums[key], z.mT, z, weight)
        else:
            self.add(key, second_moment(z_NgSI) * weight)

    def add_times(self, key: str, value: Tensor, weight: float) -> None:
        """Add ``weight`` times a value, which is neither kept nor changed."""
        if key in self._sums:
            self._sums[key].add_(value, alpha=weight)
        else:
            self.add(key, value * weight)


class LatestProduct:
    """``xᵀ x`` of the latest input, computed once while the same input comes again.

    The projections to queries, keys and values of an attention layer read the same tokens. Layers
    that were given one tensor are shown one (see :mod:`~curvlinops_diffusion.layers.observation`),
    so that the same input is the same object.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._product = torch.empty(0)

    def of(self, x: Tensor, chosen: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """``Σ x xᵀ`` over all but the last axis, of what is chosen of it, always the same."""
        if x is not self._x:
            rows = chosen(x).reshape(-1, x.shape[-1])
            self._x, self._product = x, product(rows.T, rows)
        return self._product

    def forget(self) -> None:
        """Let go of the latest input."""
        self._x, self._product = None, torch.empty(0)
