"""Blocks of a curvature matrix: multiply, take powers, trace, determinant, norm.

A block acts on matrices ``[O, I]`` (a layer's weight, its bias as ``[O, 1]``, or both side by
side), with ``K`` of them at once in a trailing axis: ``[O, I, K]``. As a matrix it acts on their
row-major vectorisation, with Kronecker factors in the order (output, input).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from curvlinops_diffusion.factors import eigendecomposition


class Block(ABC):
    """A symmetric positive semi-definite matrix on ``[O, I]``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(O, I)``; the matrix has ``O I`` rows."""

    @abstractmethod
    def multiply(self, X_OIK: Tensor) -> Tensor:
        """Multiply onto ``K`` matrices at once: ``[O, I, K] -> [O, I, K]``."""

    @abstractmethod
    def eigen(self, name: str) -> EigenBlock:
        """The same block in its eigenbasis; ``name`` is for error messages."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""

    @abstractmethod
    def squared_frobenius_norm(self) -> Tensor:
        """The sum of the squared eigenvalues."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What determines the block, by the names of its constructor's arguments."""

    def factored_inverse(
        self, damping: float, heuristic: bool, min_damping: float, name: str
    ) -> Block:
        """Damp Kronecker factors rather than the block, then invert.

        Without Kronecker factors this is the exactly damped inverse.
        """
        return self.eigen(name).power(-1, damping, name)


@dataclass(frozen=True, eq=False)
class EigenBlock(Block):
    """``(U_B ⊗ U_A) diag(Λ) (U_B ⊗ U_A)ᵀ``.

    Attributes:
        output_basis: ``U_B``, shape ``[O, O]``.
        input_basis: ``U_A``, shape ``[I, I]``; ``None`` for the identity.
        eigenvalues: ``Λ``, shape ``[O, I]``.
    """

    output_basis: Tensor
    input_basis: Tensor | None
    eigenvalues: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        O, I = self.eigenvalues.shape
        return O, I

    def multiply(self, X_OIK: Tensor) -> Tensor:
        """Rotate into the basis, scale, rotate back."""
        X = _left_right(self.output_basis.T, X_OIK, self.input_basis)
        back = None if self.input_basis is None else self.input_basis.T
        return _left_right(self.output_basis, self.eigenvalues.unsqueeze(2) * X, back)

    def eigen(self, name: str) -> EigenBlock:
        """The block itself."""
        return self

    def power(self, exponent: float, damping: float, name: str) -> EigenBlock:
        """``(F + λ I)^p``.

        Raises:
            ValueError: If a negative power would divide by zero.
        """
        damped = self.eigenvalues + damping
        if exponent < 0 and not (damped > 0).all():
            raise ValueError(
                f"Block '{name}' has {int((damped <= 0).sum())} zero eigenvalues (of "
                f"{damped.numel()}) at damping={damping:g} in {damped.dtype}, so its power "
                f"{exponent:g} does not exist. Pass a larger damping."
            )
        return EigenBlock(self.output_basis, self.input_basis, damped.pow(exponent))

    def trace(self) -> Tensor:
        """``Σ Λ``."""
        return self.eigenvalues.sum()

    def logdet(self) -> Tensor:
        """``Σ log Λ``; minus infinity for a singular block."""
        return self.eigenvalues.log().sum()

    def squared_frobenius_norm(self) -> Tensor:
        """``Σ Λ²``."""
        return self.eigenvalues.square().sum()

    def tensors(self) -> dict[str, Tensor]:
        """Bases and eigenvalues."""
        tensors = {"output_basis": self.output_basis, "eigenvalues": self.eigenvalues}
        return tensors | ({} if self.input_basis is None else {"input_basis": self.input_basis})


@dataclass(frozen=True, eq=False)
class KroneckerBlock(Block):
    """``B ⊗ A``.

    Attributes:
        output_factor: ``B``, shape ``[O, O]``.
        input_factor: ``A``, shape ``[I, I]``; ``None`` for one input that is one (a bias).
    """

    output_factor: Tensor
    input_factor: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return len(self.output_factor), 1 if self.input_factor is None else len(self.input_factor)

    def multiply(self, X_OIK: Tensor) -> Tensor:
        """``B X A`` for each of the ``K`` matrices."""
        return _left_right(self.output_factor, X_OIK, self.input_factor)

    def eigen(self, name: str) -> EigenBlock:
        """``B = U_B β U_Bᵀ``, ``A = U_A α U_Aᵀ``, ``Λ = β αᵀ``."""
        B = eigendecomposition(self.output_factor, f"The output factor of '{name}'")
        if self.input_factor is None:
            return EigenBlock(B.vectors, None, B.values.unsqueeze(1))
        A = eigendecomposition(self.input_factor, f"The input factor of '{name}'")
        return EigenBlock(B.vectors, A.vectors, torch.outer(B.values, A.values))

    def factored_inverse(
        self, damping: float, heuristic: bool, min_damping: float, name: str
    ) -> Block:
        """``(B + λ_B I)⁻¹ ⊗ (A + λ_A I)⁻¹``.

        ``λ_A = λ_B = λ``, or with ``heuristic`` and the ratio ``π²`` of the factors' mean
        eigenvalues, ``λ_A = π √λ`` and ``λ_B = √λ / π``, so that ``λ_A λ_B = λ`` (Martens &
        Grosse, 2015, Section 6.3), neither below ``min_damping``.
        """
        if self.input_factor is None:
            return super().factored_inverse(damping, heuristic, min_damping, name)
        damping_A = damping_B = damping
        mean_A = float(self.input_factor.trace()) / len(self.input_factor)
        mean_B = float(self.output_factor.trace()) / len(self.output_factor)
        if heuristic and mean_A > 0 and mean_B > 0:
            pi = sqrt(mean_A / mean_B)
            damping_A = max(sqrt(damping) * pi, min_damping)
            damping_B = max(sqrt(damping) / pi, min_damping)
        return KroneckerBlock(
            _damped_inverse(self.output_factor, damping_B, f"The output factor of '{name}'"),
            _damped_inverse(self.input_factor, damping_A, f"The input factor of '{name}'"),
        )

    def trace(self) -> Tensor:
        """``tr(B) tr(A)``."""
        trace = self.output_factor.trace()
        return trace if self.input_factor is None else trace * self.input_factor.trace()

    def squared_frobenius_norm(self) -> Tensor:
        """``‖B‖² ‖A‖²``."""
        norm = self.output_factor.square().sum()
        return norm if self.input_factor is None else norm * self.input_factor.square().sum()

    def tensors(self) -> dict[str, Tensor]:
        """The factors."""
        tensors = {"output_factor": self.output_factor}
        return tensors | ({} if self.input_factor is None else {"input_factor": self.input_factor})


@dataclass(frozen=True, eq=False)
class PlacedBlock:
    """A block, and the parameters that it acts on.

    Attributes:
        name: A name for messages and files.
        params: Names of the parameters; reshaped to ``[O, ...]`` and laid side by side they form
            the matrix ``[O, I]`` that the block acts on.
        block: The block.
    """

    name: str
    params: tuple[str, ...]
    block: Block


BLOCK_TYPES: dict[str, type[EigenBlock] | type[KroneckerBlock]] = {
    "eigen": EigenBlock,
    "kronecker": KroneckerBlock,
}


def _left_right(left: Tensor, X_OIK: Tensor, right: Tensor | None) -> Tensor:
    """``left @ X @ right`` for each of the ``K`` matrices ``[O, I]``."""
    O, I, K = X_OIK.shape
    X = (left @ X_OIK.reshape(O, I * K)).reshape(O, I, K)
    return X if right is None else right.T @ X


def _damped_inverse(factor: Tensor, damping: float, what: str) -> Tensor:
    decomposition = eigendecomposition(factor, what)
    damped = decomposition.values + damping
    if not (damped > 0).all():
        raise ValueError(f"{what} is singular at damping={damping:g}. Pass a larger damping.")
    return (decomposition.vectors / damped) @ decomposition.vectors.T
