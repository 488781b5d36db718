"""Running second moments ``Σ a aᵀ`` of a layer's inputs, whatever form these come in."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Moment(Protocol):
    """A running weighted sum of second moments."""

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight · Σ_n Σ_s a_s a_sᵀ`` of the layer's input ``x``."""

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""


class RowMoment:
    """The second moment of inputs whose last axis is what the weight multiplies.

    Successive moments of one and the same input share their product: the projections to queries,
    keys and values of an attention layer read the same tokens.

    Args:
        latest: The input most recently seen by moments that share it.
    """

    def __init__(self, latest: LatestProduct):
        self._latest = latest
        self._total: Tensor | None = None

    def add(self, x: Tensor, weight: float) -> None:
        """Add ``weight · Σ x xᵀ`` over all but the last axis of ``x``."""
        product = self._latest.of(x)
        if self._total is None:
            self._total = product * weight
        else:
            self._total.add_(product, alpha=weight)

    def total(self) -> Tensor:
        """The sum, shape ``[I, I]``."""
        assert self._total is not None
        return self._total


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
