"""Curvature plus the outer products of some gradients, inverted by Woodbury's formula.

Legend: P parameters, N gradients, K columns.
"""

from __future__ import annotations

from typing import Protocol
from warnings import warn

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.operator import FlatLinearOperator, check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_non_negative

_ACCURACY = 1e-2


class GradientRows(Protocol):
    """Gradients of examples, such as an operator of per-example gradients holds."""

    def rows(self) -> Tensor:
        """The gradients, ``[N, P]``."""


class WoodburyInverseLinearOperator(FlatLinearOperator):
    r"""``(F + λ I + c Jᵀ J)⁻¹`` from ``(F + λ I)⁻¹`` and the gradients ``J`` of ``N`` examples.

    ::

        (F + λ I + c Jᵀ J)⁻¹ = M − M Jᵀ (I / c + J M Jᵀ)⁻¹ J M,    M = (F + λ I)⁻¹

    K-FAC and EK-FAC average over the examples before anything else: of what a single training
    example alone does to the curvature, little is left. ``1/N Jᵀ J``, with rows ``∇ℓ_n`` averaged
    over the draws of example ``n``, puts back the direction that matters for the example's own
    influence. For ``c → ∞`` scores become those of kernel regression in the metric of ``M``, as
    TRAK's are in that of the identity.

    Holds ``M Jᵀ``, ``[P, N]``, and solves a system of ``N`` unknowns in float64. Scores alone need
    less: with ``c = 1/N`` they are ``S (I + S_train)⁻¹``, of the scores ``S`` by ``M`` and those of
    the training examples on each other. They are more accurate as well: the formula's two terms
    nearly cancel where ``c ∇ℓ_nᵀ M ∇ℓ_n`` is large, and what the operator leaves of a score is
    wrong by that number times the precision of its vectors (a warning tells).

    Source: Woodbury, 1950; TRAK: Park et al., 2023, Section 3.

    Args:
        inverse: ``M``, a damped inverse.
        gradients: ``J``: an operator of per-example gradients, or their rows ``[N, P]``.
        weight: ``c ≥ 0``; ``None`` for ``1/N``.

    Raises:
        ValueError: If the weight is negative, or the shapes do not fit.

    Examples:
        >>> K = DiffusionKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, K.param_names)
        >>> inverse = WoodburyInverseLinearOperator(K.inverse(damping=1e-3), J_train)
        >>> J_query = ExampleGradientLinearOperator(query, K.param_names)
        >>> influence_scores(J_query, inverse, J_train).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        inverse: PyTorchLinearOperator,
        gradients: GradientRows | Tensor,
        weight: float | None = None,
    ):
        if isinstance(gradients, PyTorchLinearOperator):
            check_same_parameters({"the gradients": gradients}, {"the inverse": inverse})
        rows_NP = gradients if isinstance(gradients, Tensor) else gradients.rows()
        if rows_NP.ndim != 2 or rows_NP.shape[1] != inverse.shape[1]:
            raise ValueError(
                f"Gradients of shape {tuple(rows_NP.shape)} arrived with an inverse of shape "
                f"{tuple(inverse.shape)}. Pass gradients [N, {inverse.shape[1]}] of the same "
                "parameters."
            )
        N = len(rows_NP)
        self.weight = 1 / N if weight is None else check_non_negative("weight", weight)
        self._inverse = inverse
        self._rows_NP = rows_NP.to(inverse.device, inverse.dtype)
        self._product_PN = inverse @ self._rows_NP.T
        inner = (self._rows_NP @ self._product_PN).double()
        inner = self.weight * (inner + inner.T) / 2
        _warn_of_cancellation(float(inner.diagonal().max()), inverse.dtype)
        inner.diagonal().add_(1)
        self._root = torch.linalg.cholesky(inner)
        super().__init__(inverse)

    def multiply(self, X_PK: Tensor) -> Tensor:
        """Correct ``M X`` in the span of ``M Jᵀ``, ``[P, K] -> [P, K]``."""
        X_PK = self._inverse @ X_PK
        right_NK = self.weight * (self._rows_NP @ X_PK).double()
        solution_NK = torch.cholesky_solve(right_NK, self._root)
        return X_PK - self._product_PN @ solution_NK.to(X_PK)


def _warn_of_cancellation(largest: float, dtype: torch.dtype) -> None:
    """Say so where the two terms of the formula cancel to less than a hundredth's accuracy."""
    if largest * torch.finfo(dtype).eps > _ACCURACY:
        warn(
            f"The largest influence of an example on itself is {largest:.1e}: products in {dtype} "
            "lose that many times its precision to cancellation. Use float64, a larger damping, or "
            "scores alone: S @ inv(I + S_train).",
            stacklevel=3,
        )
