"""The exact damped inverse by preconditioned conjugate gradients.

Legend: P parameters, K columns.

``CGInverseLinearOperator`` of ``curvlinops`` takes a preconditioner too, but stops by the *mean*
residual of all columns, never before eleven products (each as costly as three training passes),
takes a direction of curvature below ``eps`` (1e-10, absolute) for null and stands still there, and
keeps no residuals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.solvers.iterative import RefinedInverseLinearOperator, Refinement


class CGRefinedInverseLinearOperator(RefinedInverseLinearOperator):
    r"""``(G + λ I)⁻¹`` by preconditioned conjugate gradients.

    The error in the norm of ``G + λ I`` falls monotonically, by a factor of at least
    ``(√κ − 1) / (√κ + 1)`` an iteration with the condition number ``κ`` of ``M (G + λ I)``, ``M``
    being the preconditioner; faster where its eigenvalues form clusters. ``docs/attribution.rst``
    has at which damping which preconditioner pays.

    The residual is carried along, and where rounding may have made up a tenth of it, computed anew
    by a product more: what is reported is that of the solution. Iteration ends where the precision
    allows no smaller one.

    Source: Hestenes & Stiefel, 1952; Saad, 2003, Algorithm 9.1; van der Vorst & Ye, 2000 (residuals
    anew).

    Arguments, attributes and errors are those of :class:`RefinedInverseLinearOperator`; the
    preconditioner must be positive definite: take one of an absolute damping, since inverses with
    ``rtol`` or a relative damping are zero on null blocks.

    Examples:
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> G, EK = DiffusionGGNLinearOperator(train), DiffusionEKFACLinearOperator(train)
        >>> inverse = CGRefinedInverseLinearOperator(G, 1e-2, EK.inverse(1e-2), max_iter=5)
        >>> x = inverse @ J_query.rows()[0]
        >>> residuals = inverse.refinement.residuals
        >>> bool(residuals[-1] < residuals[0])
        True
    """

    def _solve(self, B_PK: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        """Conjugate gradients; a column that is done stays as it is."""
        self.refinement = Refinement()
        X_PK, R_PK = torch.zeros_like(B_PK), B_PK.clone()
        if self._finished(R_PK, B_PK):
            return X_PK
        Z_PK = self._preconditioned(R_PK)
        D_PK, rz_K = Z_PK, (R_PK * Z_PK).sum(0)
        eps = torch.finfo(B_PK.dtype).eps
        drift_K = torch.zeros_like(rz_K)  # of the residual by rounding, at most about this
        reached_K = torch.full_like(rz_K, float("inf"))  # the latest one computed anew
        for _ in range(self.max_iter):
            going_K = ~self.refinement.converged & (rz_K > 0)
            product_PK = self._damped(D_PK)
            step_K = _ratio(rz_K, (D_PK * product_PK).sum(0), going_K)
            X_PK = X_PK + step_K * D_PK
            R_PK = R_PK - step_K * product_PK
            drift_K = drift_K + eps * (step_K * product_PK).norm(dim=0)
            stuck = False
            if (10 * drift_K > R_PK.norm(dim=0)).any():
                R_PK, drift_K = B_PK - self._damped(X_PK), eps * B_PK.norm(dim=0)
                before_K, reached_K = reached_K, R_PK.norm(dim=0)
                stuck = bool((2 * reached_K >= before_K).all())
            finished = self._finished(R_PK, B_PK)
            tell(X_PK)
            if finished or stuck:
                break
            Z_PK = self._preconditioned(R_PK)
            previous_K, rz_K = rz_K, (R_PK * Z_PK).sum(0)
            D_PK = Z_PK + _ratio(rz_K, previous_K, going_K) * D_PK
        return X_PK


def _ratio(numerator_K: Tensor, denominator_K: Tensor, where_K: Tensor) -> Tensor:
    safe_K = torch.where(where_K, denominator_K, torch.ones_like(denominator_K))
    return torch.where(where_K, numerator_K / safe_K, torch.zeros_like(numerator_K))
