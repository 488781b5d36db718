"""Second moments of gradients in an eigenbasis.

Legend: N batch, g groups of a layer (an axis that only grouped layers have), S weight-sharing
positions, I inputs, O outputs.
"""

from __future__ import annotations

from torch import Tensor

# Gradients are rotated for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**23


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
    total: Tensor | None = None
    for g in g_NgOI.split(max(1, _MAX_ENTRIES // g_NgOI[0].numel())):
        g = g if U_A is None else g @ U_A
        g = g if U_B is None else U_B.mT @ g
        total = _added(g.square().sum(0), total)
    assert total is not None
    return total


def rotated_squares_of_inputs(a_NgSI: Tensor, b_NgSO: Tensor, U_A: Tensor, U_B: Tensor) -> Tensor:
    """The same for gradients ``Σ_s b_s a_sᵀ``, whose inputs and outputs are rotated apart.

    Cheaper than :func:`rotated_squares` for few positions, see
    :func:`rotation_of_inputs_is_cheaper`.
    """
    groups, (S, I), O = a_NgSI.shape[1:-2], a_NgSI.shape[-2:], b_NgSO.shape[-1]
    total: Tensor | None = None
    chunk = max(1, _MAX_ENTRIES // (max(O, S) * I * groups.numel()))
    for a, b in zip(a_NgSI.split(chunk), b_NgSO.split(chunk), strict=True):
        total = _added(((b @ U_B).mT @ (a @ U_A)).square_().sum(0), total)
    assert total is not None
    return total


def _added(part: Tensor, total: Tensor | None) -> Tensor:
    """Without zeros to begin with, of which a GPU would have to be told."""
    return part if total is None else total.add_(part)


def rotation_of_inputs_is_cheaper(positions: int, O: int, I: int) -> bool:
    """Decide by count whether to rotate inputs and outputs rather than their gradient."""
    return positions * (O * O + I * I) < O * I * (O + I)
