"""Running second moments ``Σ a aᵀ`` of a layer's inputs, whatever form these come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.sums import Running


def second_moment(z_NgSI: Tensor) -> Tensor:
    """``Σ_n Σ_s z zᵀ``: ``[N, S, I] -> [I, I]``, and group by group if there are groups."""
    z = z_NgSI.movedim(0, -3).flatten(-3, -2)
    return z.mT @ z


class Moment(Running, Protocol):
    """A running weighted sum of second moments."""

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight · Σ_n Σ_s a_s a_sᵀ`` of the layer's input ``x``."""

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""


class PlainMoment:
    """A moment that is kept as it is."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def total(self) -> Tensor:
        """The sum."""
        assert self._total is not None
        return self._total

    def tensors(self) -> dict[str, Tensor]:
        """The sum by name."""
        return {} if self._total is None else {"total": self._total}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a sum."""
        self._total = tensors.get("total")


class ProductMoment(PlainMoment, ABC):
    """A moment to which products are added."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``Σ_n Σ_s a_s a_sᵀ``; may be kept by others, and is not changed."""

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight`` times the product."""
        product = self.product(x)
        if self._total is None:
            self._total = product * weight
        else:
            self._total.add_(product, alpha=weight)


class RowMoment(ProductMoment):
    """The second moment of inputs whose last axis is what the weight multiplies.

    Successive moments of one and the same input share their product: the projections to queries,
    keys and values of an attention layer read the same tokens.

    Args:
        latest: The input most recently seen by moments that share it.
    """

    def __init__(self, latest: LatestProduct):
        super().__init__()
        self._latest = latest

    def product(self, x: Tensor) -> Tensor:
        """``Σ x xᵀ`` over all but the last axis of ``x``."""
        return self._latest.of(x)


class LatestProduct:
    """``xᵀ x`` of the latest input, computed once while the same input comes again."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self._product = torch.empty(0)

    def of(self, x: Tensor) -> Tensor:
        """``Σ x xᵀ`` over all but the last axis."""
        if not self._is_latest(x):
            rows = x.reshape(-1, x.shape[-1])
            # holding on to the input keeps its memory from being given to another
            self._x, self._version, self._product = x, x._version, rows.T @ rows
        return self._product

    def forget(self) -> None:
        """Let go of the latest input."""
        self._x = None

    def _is_latest(self, x: Tensor) -> bool:
        return (
            self._x is not None
            and x.data_ptr() == self._x.data_ptr()
            and x.shape == self._x.shape
            and x.stride() == self._x.stride()
            and x._version == self._version
        )
