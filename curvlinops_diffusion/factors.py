"""Statistics to Kronecker factors, eigenbases and eigenvalues: pure functions of tensors.

Legend: N batch, g groups of a layer (an axis that only grouped layers have), S weight-sharing
positions, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion._checks import check_finite

# Gradients are rotated for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**23


def second_moment(z_NgSI: Tensor) -> Tensor:
    """``Σ_n Σ_s z zᵀ``: ``[N, S, I] -> [I, I]``, and group by group if there are groups."""
    z = z_NgSI.movedim(0, -3).flatten(-3, -2)
    return z.mT @ z


def rotated_squares(g_NgOI: Tensor, U_A: Tensor | None, U_B: Tensor | None) -> Tensor:
    """Second moments of gradients in an eigenbasis, ``Σ_n (U_Bᵀ g_n U_A)²``.

    Source: George et al., 2018, *Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis*, Section 3.1.

    Args:
        g_NgOI: Gradients.
        U_A: Eigenvectors of the input factor, ``[*g, I, I]``; ``None`` for the identity.
        U_B: Eigenvectors of the output factor, ``[*g, O, O]``; ``None`` for the identity.

    Returns:
        The sum of squares, shape ``[*g, O, I]``.
    """
    total = torch.zeros_like(g_NgOI[0])
    for g in g_NgOI.split(max(1, _MAX_ENTRIES // total.numel())):
        g = g if U_A is None else g @ U_A
        g = g if U_B is None else U_B.mT @ g
        total += g.square().sum(0)
    return total


def rotated_squares_of_inputs(a_NgSI: Tensor, b_NgSO: Tensor, U_A: Tensor, U_B: Tensor) -> Tensor:
    """The same for gradients ``Σ_s b_s a_sᵀ``, whose inputs and outputs are rotated apart.

    Cheaper than :func:`rotated_squares` for few positions, see
    :func:`rotation_of_inputs_is_cheaper`.
    """
    groups, (S, I), O = a_NgSI.shape[1:-2], a_NgSI.shape[-2:], b_NgSO.shape[-1]
    total = b_NgSO.new_zeros(*groups, O, I)
    chunk = max(1, _MAX_ENTRIES // (max(O, S) * I * groups.numel()))
    for a, b in zip(a_NgSI.split(chunk), b_NgSO.split(chunk), strict=True):
        total += ((b @ U_B).mT @ (a @ U_A)).square_().sum(0)
    return total


def rotation_of_inputs_is_cheaper(positions: int, O: int, I: int) -> bool:
    """Whether to rotate ``positions`` inputs and outputs rather than their gradient, by count."""
    return positions * (O * O + I * I) < O * I * (O + I)


def contracted_inputs(g_NgOI: Tensor, A: Tensor) -> Tensor:
    """``Σ_n g A gᵀ``, ``[*g, O, O]``; ``A`` is ``[*g, I, I]``, or the diagonal ``[I]`` of one."""
    product = g_NgOI * A if A.ndim == 1 else g_NgOI @ A
    product, g = (z.movedim(0, -1).flatten(-2) for z in (product, g_NgOI))  # [*g, O, I N]
    return product @ g.mT


def contracted_outputs(g_NgOI: Tensor, B: Tensor, diagonal: bool = False) -> Tensor:
    """``Σ_n gᵀ B g``, ``[*g, I, I]``, or its diagonal ``[I]``; ``B`` is ``[*g, O, O]``."""
    product = B @ g_NgOI
    if diagonal:
        return (product * g_NgOI).sum((0, -2))
    product, g = (z.movedim(0, -2).flatten(-3, -2) for z in (product, g_NgOI))  # [*g, O N, I]
    return g.mT @ product


def identity_like(factor: Tensor) -> Tensor:
    """The identity, for each group; of a diagonal factor ``[I]``, its diagonal."""
    if factor.ndim == 1:
        return torch.ones_like(factor)
    return torch.eye(factor.shape[-1]).to(factor).expand_as(factor)


def trace(factor: Tensor) -> Tensor:
    """The trace of a factor, for each group."""
    return factor.sum() if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def squared_norm(factor: Tensor) -> Tensor:
    """The squared Frobenius norm of a factor, for each group."""
    return factor.square().sum() if factor.ndim == 1 else factor.square().sum((-2, -1))


@dataclass(frozen=True)
class Eigendecomposition:
    """``M = U diag(λ) Uᵀ`` with ``λ ≥ 0``.

    Attributes:
        values: Eigenvalues ``λ``; ascending, unless ``U`` is the identity.
        vectors: Eigenvectors, in the columns of ``U``; ``None`` for the identity.
    """

    values: Tensor
    vectors: Tensor | None

    def is_null(self) -> Tensor:
        """Which eigenvalues are zero up to rounding: ``λ ≤ n ε λ_max``; exactly, if ``U = I``.

        What a rank-deficient factor has in place of a zero depends on the machine.
        """
        if self.vectors is None:
            return self.values <= 0
        relative = self.values.shape[-1] * torch.finfo(self.values.dtype).eps
        return self.values <= relative * self.values.amax(-1, keepdim=True)


def eigendecomposition(matrix: Tensor, what: str) -> Eigendecomposition:
    """Decompose a positive semi-definite factor, in float64.

    Args:
        matrix: The factor: ``[I, I]``, one for each group ``[G, I, I]``, or the diagonal ``[I]``
            of a diagonal one.
        what: What it is a factor of, for the error message.

    Returns:
        The decomposition in the factor's precision, negative rounding noise clamped to zero.

    Raises:
        ValueError: If the factor has entries that are not finite.
    """
    check_finite(matrix, what)
    if matrix.ndim == 1:
        return Eigendecomposition(matrix.clamp(min=0), None)
    values, vectors = torch.linalg.eigh(matrix.double())
    # one layout of memory, so that products are the same to the last bit after saving and loading
    return Eigendecomposition(values.clamp(min=0).to(matrix), vectors.to(matrix).contiguous())
