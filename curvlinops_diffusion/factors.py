"""Statistics to Kronecker factors, eigenbases and eigenvalues: pure functions of tensors.

Legend: N batch, S weight-sharing positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion._checks import check_finite

# Gradients are rotated for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**23


def second_moment(z: Tensor) -> Tensor:
    """``Σ z zᵀ`` over all but the last axis: ``[..., I] -> [I, I]``."""
    z = z.flatten(0, -2)
    return z.T @ z


def rotated_squares(g_NOI: Tensor, U_A: Tensor | None, U_B: Tensor | None) -> Tensor:
    """Second moments of gradients in an eigenbasis, ``Σ_n (U_Bᵀ g_n U_A)²``.

    Source: George et al., 2018, *Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis*, Section 3.1.

    Args:
        g_NOI: Gradients.
        U_A: Eigenvectors of the input factor, ``[I, I]``; ``None`` for the identity.
        U_B: Eigenvectors of the output factor, ``[O, O]``; ``None`` for the identity.

    Returns:
        The sum of squares, shape ``[O, I]``.
    """
    _, O, I = g_NOI.shape
    total = g_NOI.new_zeros(O, I)
    for g in g_NOI.split(max(1, _MAX_ENTRIES // (O * I))):
        g = g if U_A is None else g @ U_A
        g = g if U_B is None else U_B.T @ g
        total += g.square().sum(0)
    return total


def rotated_squares_of_inputs(a_NSI: Tensor, b_NSO: Tensor, U_A: Tensor, U_B: Tensor) -> Tensor:
    """The same for gradients ``Σ_s b_s a_sᵀ``, whose inputs and outputs are rotated apart.

    Cheaper than :func:`rotated_squares` for few positions, see
    :func:`rotation_of_inputs_is_cheaper`.
    """
    _, O, I = len(b_NSO), b_NSO.shape[2], a_NSI.shape[2]
    total = b_NSO.new_zeros(O, I)
    chunk = max(1, _MAX_ENTRIES // (max(O, a_NSI.shape[1]) * I))
    for a, b in zip(a_NSI.split(chunk), b_NSO.split(chunk), strict=True):
        total += ((b @ U_B).mT @ (a @ U_A)).square_().sum(0)
    return total


def rotation_of_inputs_is_cheaper(positions: int, O: int, I: int) -> bool:
    """Whether to rotate ``positions`` inputs and outputs rather than their gradient, by count."""
    return positions * (O * O + I * I) < O * I * (O + I)


@dataclass(frozen=True)
class Eigendecomposition:
    """``M = U diag(λ) Uᵀ`` with ascending ``λ ≥ 0``.

    Attributes:
        values: Eigenvalues ``λ``.
        vectors: Eigenvectors, in the columns of ``U``.
    """

    values: Tensor
    vectors: Tensor


def eigendecomposition(matrix: Tensor, what: str) -> Eigendecomposition:
    """Decompose a positive semi-definite factor, in float64.

    Args:
        matrix: The factor.
        what: What it is a factor of, for the error message.

    Returns:
        The decomposition in the factor's precision, negative rounding noise clamped to zero.

    Raises:
        ValueError: If the factor has entries that are not finite.
    """
    check_finite(matrix, what)
    values, vectors = torch.linalg.eigh(matrix.double())
    # one layout of memory, so that products are the same to the last bit after saving and loading
    return Eigendecomposition(values.clamp(min=0).to(matrix), vectors.to(matrix).contiguous())


def eigendecompositions(matrices: Mapping[str, Tensor], what: str) -> dict[str, Eigendecomposition]:
    """Decompose several factors, by name; arguments and errors as for a single one."""
    return {key: eigendecomposition(M, f"{what} of '{key}'") for key, M in matrices.items()}
