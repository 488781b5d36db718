"""The border to ``curvlinops``: the one file that touches names outside its public interface.

Its next major version rearranges its insides; moving to it must cost this file. Everything else
subclasses :class:`LinearOperator`, and asks for shapes by :func:`input_shapes` and
:func:`output_shapes`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    # a library of curvlinops' scripts functions when it is imported
    warnings.simplefilter("ignore", FutureWarning)
    from curvlinops._torch_base import PyTorchLinearOperator

__all__ = ["LinearOperator", "PyTorchLinearOperator", "input_shapes", "output_shapes"]


class LinearOperator(PyTorchLinearOperator, ABC):
    """An operator in the formats of ``curvlinops``: a flat vector, a matrix, a list of tensors.

    Args:
        input_shapes: Shapes of the tensors that it acts on.
        output_shapes: Shapes of the tensors that it returns.
        like: Has the precision and the device of the vectors that the operator acts on.
        self_adjoint: Whether the operator is its own transpose.
    """

    def __init__(
        self,
        input_shapes: Sequence[Sequence[int]],
        output_shapes: Sequence[Sequence[int]],
        like: Any,
        self_adjoint: bool = True,
    ):
        self._like = like
        self.SELF_ADJOINT = self_adjoint
        super().__init__(list(input_shapes), list(output_shapes))

    def __repr__(self) -> str:
        """Kind, size, precision and device."""
        rows, columns = self.shape
        precision = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__} [{rows:,} × {columns:,}], {precision} on {self.device}"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the vectors that the operator acts on."""
        dtype: torch.dtype = self._like.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the vectors that the operator acts on."""
        device: torch.device = self._like.device
        return device

    @abstractmethod
    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto ``K`` vectors, each a list of tensors: ``[*shape, K] -> [*shape, K]``."""

    def transposed(self) -> PyTorchLinearOperator:
        """The transpose; to be given by operators that are not their own."""
        return self

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.multiply_tensors(X)

    def _adjoint(self) -> PyTorchLinearOperator:
        return self.transposed()


def input_shapes(operator: PyTorchLinearOperator) -> list[torch.Size]:
    """Shapes of the tensors that an operator acts on."""
    return list(operator._in_shape)


def output_shapes(operator: PyTorchLinearOperator) -> list[torch.Size]:
    """Shapes of the tensors that an operator returns."""
    return list(operator._out_shape)
