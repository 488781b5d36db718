"""Operators on a space of parameters."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.upstream import LinearOperator, PyTorchLinearOperator, input_shapes


class ParameterSpaceOperator(LinearOperator):
    """A self-adjoint operator on a parameter space."""

    def __init__(self, space: ParameterSpace):
        self.space = space
        shapes = list(space.shapes.values())
        super().__init__(shapes, shapes, like=space)


class FlatLinearOperator(LinearOperator):
    """A self-adjoint operator on the space of another, given by what it does to flat columns.

    Args:
        other: The other operator.
    """

    def __init__(self, other: PyTorchLinearOperator):
        self._other = other
        super().__init__(input_shapes(other), input_shapes(other), like=other)

    @property
    def param_names(self) -> tuple[str, ...] | None:
        """Names of the parameters, where the other operator knows them."""
        return getattr(self._other, "param_names", None)

    @abstractmethod
    def multiply(self, X_PK: Tensor) -> Tensor:
        """Multiply onto flat columns, ``[P, K] -> [P, K]``."""

    def multiply_tensors(self, X: list[Tensor]) -> list[Tensor]:
        """Multiply onto matrices in tensor list format ``[*shape, K]``."""
        shapes = [x.shape for x in X]
        X_PK = torch.cat([x.reshape(-1, x.shape[-1]) for x in X]).to(self.dtype)
        pieces = self.multiply(X_PK).split([shape[:-1].numel() for shape in shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
