"""Statistics to Kronecker factors, eigenbases and eigenvalues: pure functions of tensors.

Legend: N batch, S weight-sharing positions, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion._checks import check_finite

# Per-example gradients are formed for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**26


def second_moment(z: Tensor) -> Tensor:
    """``Σ z zᵀ`` over all but the last axis: ``[..., I] -> [I, I]``."""
    z = z.flatten(0, -2)
    return z.T @ z


def per_example_gradients(a_NSI: Tensor | None, b_NSO: Tensor) -> Tensor:
    """The layer's gradients ``Σ_s b_s a_sᵀ`` of every example, shape ``[N, O, I]``.

    Args:
        a_NSI: Layer inputs; ``None`` for a bias, whose input is one (``I = 1``).
        b_NSO: Gradients in the layer's output.
    """
    if a_NSI is None:
        return b_NSO.sum(1).unsqueeze(2)
    return b_NSO.mT @ a_NSI


def eigenvalue_moment(
    a_NSI: Tensor | None, b_NSO: Tensor, U_A: Tensor | None, U_B: Tensor
) -> Tensor:
    """Second moments of the gradients in an eigenbasis, ``Σ_n (U_Bᵀ g_n U_A)²``.

    Source: George et al., 2018, *Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis*, Section 3.1.

    Args:
        a_NSI: Layer inputs; ``None`` for a bias.
        b_NSO: Gradients in the layer's output.
        U_A: Eigenvectors of the input factor, ``[I, I]``; ``None`` for the identity.
        U_B: Eigenvectors of the output factor, ``[O, O]``.

    Returns:
        The sum of squares over the examples, shape ``[O, I]``.
    """
    N, S, O = b_NSO.shape
    I = 1 if a_NSI is None else a_NSI.shape[2]
    if U_A is None or a_NSI is None:
        U_A = None
    chunk = max(1, _MAX_ENTRIES // (O * I))
    rotate_first = S * (O * O + I * I) < O * I * (O + I)
    total = b_NSO.new_zeros(O, I)
    for start in range(0, N, chunk):
        a = None if a_NSI is None else a_NSI[start : start + chunk]
        b = b_NSO[start : start + chunk]
        if rotate_first:
            a = a if a is None or U_A is None else a @ U_A
            g = per_example_gradients(a, b @ U_B)
        else:
            g = U_B.T @ per_example_gradients(a, b)
            g = g if U_A is None else g @ U_A
        total += g.square().sum(0)
    return total


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
