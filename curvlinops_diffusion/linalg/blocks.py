"""Blocks of a curvature matrix: multiply, take powers, trace, determinant, norm.

A block acts on matrices ``[O, I]``, with ``K`` of them at once in a trailing axis: ``[O, I, K]``.
As a matrix it acts on their row-major vectorisation, with Kronecker factors in the order (output,
input). A grouped layer's block is one such matrix for each group: ``[G, O, I, K]``.

Legend: g an optional leading axis of groups, O outputs, I inputs, K columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.factors import eigendecomposition, trace


class Block(ABC):
    """A symmetric positive semi-definite matrix on ``[*g, O, I]``."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The block's name in tables."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, I)``; the matrix has as many rows as that has entries."""

    @abstractmethod
    def multiply(self, X_gOIK: Tensor) -> Tensor:
        """Multiply onto ``K`` matrices at once: ``[*g, O, I, K] -> [*g, O, I, K]``."""

    @abstractmethod
    def eigen(self, name: str) -> EigenBlock:
        """The same block in its eigenbasis; ``name`` is for error messages."""

    @abstractmethod
    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""

    @abstractmethod
    def squared_frobenius_norm(self) -> Tensor:
        """The sum of the squared eigenvalues."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that determine the block, by the names of its constructor's arguments."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def factored_inverse(
        self, damping: float, heuristic: bool, min_damping: float, name: str
    ) -> Block:
        """Damp Kronecker factors rather than the block, then invert; exactly if there are none."""
        return self.eigen(name).power(-1, damping, name)


@dataclass(frozen=True, eq=False)
class EigenBlock(Block):
    """``(U_B ⊗ U_A) diag(Λ) (U_B ⊗ U_A)ᵀ``.

    Attributes:
        eigenvalues: ``Λ``, shape ``[*g, O, I]``.
        output_basis: ``U_B``, shape ``[*g, O, O]``; ``None`` for the identity.
        input_basis: ``U_A``, shape ``[*g, I, I]``; ``None`` for the identity.
        null: Which eigenvalues stand for a zero, where rounding has left something in its place;
            ``None`` if zeros are exact.
    """

    eigenvalues: Tensor
    output_basis: Tensor | None = None
    input_basis: Tensor | None = None
    null: Tensor | None = None

    @classmethod
    def of_second_moments(
        cls, moments: Tensor, output_basis: Tensor | None, input_basis: Tensor | None
    ) -> EigenBlock:
        """EK-FAC's block: second moments ``Λ_ij = E[(U_Bᵀ g U_A)_ij²]`` of coordinates.

        The coordinates of a direction in which no gradient has a component are left at the rounding
        of a product with the basis, at most ``√n ε ‖g‖``. A row or column of ``Λ`` whose sum is no
        more than that, ``n ε² Σ Λ``, is set to zero. (A single small entry is not: it may be the
        product of a small output and a small input, and is then as accurate as they are.)
        """
        relative = max(moments.shape[-2:]) * torch.finfo(moments.dtype).eps ** 2
        rounding = relative * moments.sum((-2, -1), keepdim=True)
        null = moments <= 0
        for basis, others in ((output_basis, -1), (input_basis, -2)):
            if basis is not None:  # without a basis nothing is rounded
                null = null | (moments.sum(others, keepdim=True) <= rounding)
        return cls(moments.masked_fill(null, 0), output_basis, input_basis)

    @property
    def kind(self) -> str:
        """``'eigenbasis'``; ``'diagonal'`` if both bases are the identity."""
        return "diagonal" if self.output_basis is self.input_basis is None else "eigenbasis"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, I)``."""
        return tuple(self.eigenvalues.shape)

    def multiply(self, X_gOIK: Tensor) -> Tensor:
        """Rotate into the basis, scale, rotate back."""
        U_B, U_A = self.output_basis, self.input_basis
        X = self.eigenvalues.unsqueeze(-1) * self.coordinates(X_gOIK)
        return _left_right(U_B, X, None if U_A is None else U_A.mT)

    def coordinates(self, X_gOIK: Tensor) -> Tensor:
        """Coordinates in the basis, ``U_Bᵀ X U_A``."""
        U_B = self.output_basis
        return _left_right(None if U_B is None else U_B.mT, X_gOIK, self.input_basis)

    def eigen(self, name: str) -> EigenBlock:
        """The block itself."""
        return self

    def is_null(self) -> Tensor:
        """Find the eigenvalues that are zero, perhaps up to rounding."""
        return self.eigenvalues <= 0 if self.null is None else self.null

    def largest(self) -> float:
        """The largest eigenvalue; zero for a block without entries."""
        return float(self.eigenvalues.max()) if self.eigenvalues.numel() else 0.0

    def all_null(self) -> EigenBlock:
        """The same block, every eigenvalue of which stands for a zero."""
        return replace(self, null=torch.ones_like(self.eigenvalues, dtype=torch.bool))

    def zero(self) -> EigenBlock:
        """The block of zeros in the same basis."""
        return replace(self, eigenvalues=torch.zeros_like(self.eigenvalues), null=None)

    def power(
        self, exponent: float, damping: float, name: str, floor: Tensor | None = None
    ) -> EigenBlock:
        """``(F + λ I)^p``; zero where eigenvalues are at most a floor, if there is one.

        Raises:
            ValueError: If a negative power would divide by zero.
        """
        damped = self.eigenvalues + damping
        if floor is not None:
            dropped = self.is_null() | (self.eigenvalues <= floor)
            kept = damped.where(~dropped, torch.ones_like(damped)).pow(exponent)
            return EigenBlock(
                kept.masked_fill(dropped, 0), self.output_basis, self.input_basis, dropped
            )
        singular = self.is_null() if damping == 0 else damped <= 0
        exists = bool(singular.any())
        if exponent < 0 and exists:
            remedy = (
                "Pass a larger damping, or rtol= for a pseudo-inverse, which is zero there."
                if damping == 0
                else f"Pass a damping that {damped.dtype} does not round to zero."
            )
            raise ValueError(
                f"Block '{name}' has {int(singular.sum())} zero eigenvalues (of "
                f"{damped.numel()}) at damping={damping:g} in {damped.dtype}, so its power "
                f"{exponent:g} does not exist. {remedy}"
            )
        null = singular if exponent > 0 and exists else None  # where it stays zero
        return EigenBlock(damped.pow(exponent), self.output_basis, self.input_basis, null)

    def trace(self) -> Tensor:
        """``Σ Λ``."""
        return self.eigenvalues.sum()

    def logdet(self) -> Tensor:
        """``Σ log Λ``; minus infinity for a singular block."""
        return self.eigenvalues.masked_fill(self.is_null(), 0).log().sum()

    def squared_frobenius_norm(self) -> Tensor:
        """``Σ Λ²``."""
        return self.eigenvalues.square().sum()


@dataclass(frozen=True, eq=False)
class KroneckerBlock(Block):
    """``B ⊗ A``, for each group.

    Attributes:
        output_factor: ``B``, shape ``[*g, O, O]``.
        input_factor: ``A``, shape ``[*g, I, I]``; or the diagonal ``[I]`` of a diagonal one.
    """

    kind = "Kronecker"

    output_factor: Tensor
    input_factor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, I)``."""
        return (*self.output_factor.shape[:-1], self.input_factor.shape[-1])

    def multiply(self, X_gOIK: Tensor) -> Tensor:
        """``B X A`` for each of the ``K`` matrices."""
        return _left_right(self.output_factor, X_gOIK, self.input_factor)

    def eigen(self, name: str) -> EigenBlock:
        """``B = U_B β U_Bᵀ``, ``A = U_A α U_Aᵀ``, ``Λ = β αᵀ``."""
        B = eigendecomposition(self.output_factor, f"The output factor of '{name}'")
        A = eigendecomposition(self.input_factor, f"The input factor of '{name}'")
        eigenvalues = B.values.unsqueeze(-1) * A.values.unsqueeze(-2)
        null = B.is_null().unsqueeze(-1) | A.is_null().unsqueeze(-2)
        return EigenBlock(eigenvalues, B.vectors, A.vectors, null)

    def factored_inverse(
        self, damping: float, heuristic: bool, min_damping: float, name: str
    ) -> Block:
        """``(B + λ_B I)⁻¹ ⊗ (A + λ_A I)⁻¹``.

        ``λ_A = λ_B = λ``, or with ``heuristic`` and the ratio ``π²`` of the factors' mean
        eigenvalues, ``λ_A = π √λ`` and ``λ_B = √λ / π``, so that ``λ_A λ_B = λ`` (Martens &
        Grosse, 2015, Section 6.3), neither below ``min_damping``.
        """
        A, B = self.input_factor, self.output_factor
        mean_A, mean_B = (trace(M) / M.shape[-1] for M in (A, B))
        damping_A = damping_B = torch.full_like(mean_B, damping)
        if heuristic:
            pi = (mean_A / mean_B).sqrt()
            usable = (mean_A > 0) & (mean_B > 0)
            damping_A = torch.where(usable, (damping**0.5 * pi).clamp(min=min_damping), damping_A)
            damping_B = torch.where(usable, (damping**0.5 / pi).clamp(min=min_damping), damping_B)
        return KroneckerBlock(
            _damped_inverse(B, damping_B, f"The output factor of '{name}'"),
            _damped_inverse(A, damping_A, f"The input factor of '{name}'"),
        )

    def trace(self) -> Tensor:
        """``tr(B) tr(A)``."""
        return (trace(self.output_factor) * trace(self.input_factor)).sum()

    def squared_frobenius_norm(self) -> Tensor:
        """``‖B‖² ‖A‖²``."""
        A, B = self.input_factor.square().sum(-1), self.output_factor.square().sum((-2, -1))
        return (B * (A if self.input_factor.ndim == 1 else A.sum(-1))).sum()


@dataclass(frozen=True, eq=False)
class DenseBlock(Block):
    """A matrix without structure, for each group.

    Attributes:
        matrix: The matrix, shape ``[*g, O, O]``; it acts on ``[*g, O, 1]``.
    """

    kind = "dense"

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, 1)``."""
        return (*self.matrix.shape[:-1], 1)

    def multiply(self, X_gOIK: Tensor) -> Tensor:
        """``F X``."""
        return _left_right(self.matrix, X_gOIK, None)

    def eigen(self, name: str) -> EigenBlock:
        """``F = U Λ Uᵀ``."""
        decomposition = eigendecomposition(self.matrix, f"The block of '{name}'")
        values, null = decomposition.values, decomposition.is_null()
        return EigenBlock(values.unsqueeze(-1), decomposition.vectors, None, null.unsqueeze(-1))

    def trace(self) -> Tensor:
        """``tr(F)``."""
        return self.matrix.diagonal(dim1=-2, dim2=-1).sum()

    def squared_frobenius_norm(self) -> Tensor:
        """``‖F‖²``."""
        return self.matrix.square().sum()


BLOCK_TYPES: dict[str, type[EigenBlock] | type[KroneckerBlock] | type[DenseBlock]] = {
    "eigen": EigenBlock,
    "kronecker": KroneckerBlock,
    "dense": DenseBlock,
}


def _left_right(left: Tensor | None, X_gOIK: Tensor, right: Tensor | None) -> Tensor:
    """``left @ X @ right`` for each of the ``K`` matrices; ``None`` is the identity.

    Each side is one product for all columns: with the columns' axis last, the right one would be
    a product for every output, which reads the factor as often.
    """
    X_gOKI = X_gOIK.transpose(-1, -2)
    *_, O, K, I = X_gOKI.shape
    if left is not None:
        X_gOKI = (left @ X_gOKI.flatten(-2)).unflatten(-1, (K, I))
    if right is not None and right.ndim == 1:
        X_gOKI = X_gOKI * right
    elif right is not None:
        X_gOKI = (X_gOKI.flatten(-3, -2) @ right).unflatten(-2, (O, K))
    return X_gOKI.transpose(-1, -2)


def _damped_inverse(factor: Tensor, damping: Tensor, what: str) -> Tensor:
    decomposition = eigendecomposition(factor, what)
    damped = decomposition.values + damping.unsqueeze(-1)
    undamped = (damping == 0).unsqueeze(-1)
    if (torch.where(undamped, decomposition.is_null(), damped <= 0)).any():
        raise ValueError(
            f"{what} is singular at damping={float(damping.min()):g}. Pass a larger damping, or "
            "take the exact inverse with rtol= (a pseudo-inverse)."
        )
    U = decomposition.vectors
    return 1 / damped if U is None else (U / damped.unsqueeze(-2)) @ U.mT
