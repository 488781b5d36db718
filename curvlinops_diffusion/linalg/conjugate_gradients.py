"""The exact damped inverse by preconditioned conjugate gradients.

Legend: P parameters, K columns.

``CGInverseLinearOperator`` of ``curvlinops`` takes a preconditioner too, but stops by the *mean*
residual of all columns, never before eleven products (each as costly as three training passes),
takes a direction of curvature below ``eps`` (1e-10, absolute) for null and stands still there, and
keeps no residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion.linalg.operator import FlatLinearOperator, check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count, check_non_negative


@dataclass
class Refinement:
    """A record of how a solution was approached.

    Attributes:
        residuals: ``‖b − (G + λ) x‖ / ‖b‖`` of each column, at the start and after each iteration.
        converged: Whether each column reached the tolerance.
    """

    residuals: list[Tensor] = field(default_factory=list)
    converged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @property
    def num_iterations(self) -> int:
        """Iterations, each with one product with ``G``."""
        return max(0, len(self.residuals) - 1)


class CGRefinedInverseLinearOperator(FlatLinearOperator):
    r"""``(G + λ I)⁻¹`` by preconditioned conjugate gradients.

    A product runs the iteration on all columns at once, each with its own coefficients. It stops
    when every column's relative residual is at most the tolerance, or after ``max_iter``
    iterations.

    The error in the norm of ``G + λ I`` falls monotonically, by a factor of at least
    ``(√κ − 1) / (√κ + 1)`` an iteration with the condition number ``κ`` of ``M (G + λ I)``, ``M``
    being the preconditioner; faster where its eigenvalues form clusters. ``docs/attribution.rst``
    has at which damping which preconditioner pays.

    The residual is carried along, and where rounding may have made up a tenth of it, computed anew
    by a product more: what is reported is that of the solution. Iteration ends where the precision
    allows no smaller one.

    Source: Hestenes & Stiefel, 1952; Saad, 2003, Algorithm 9.1; van der Vorst & Ye, 2000 (residuals
    anew).

    Args:
        G: The curvature, usually a :class:`~curvlinops_diffusion.DiffusionGGNLinearOperator`.
        damping: ``λ ≥ 0``.
        preconditioner: An approximation of ``(G + λ I)⁻¹``, usually ``EK.inverse(damping)``;
            ``None`` for the identity. It must be positive definite: take one of an absolute
            damping, since inverses with ``rtol`` or a relative damping are zero on null blocks.
        max_iter: Iterations at most.
        tolerance: The relative residual to reach.
        progressbar: Whether to show the residual as it falls.
        callback: Called with the solution ``[P, K]`` after each iteration, as SciPy's solvers do.

    Attributes:
        refinement: The record of the latest product.

    Raises:
        ValueError: If an option is out of range, the operators act on different parameters, or, in
            a product, the residual grows beyond what is finite.

    Examples:
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> G, EK = DiffusionGGNLinearOperator(train), DiffusionEKFACLinearOperator(train)
        >>> inverse = CGRefinedInverseLinearOperator(G, 1e-2, EK.inverse(1e-2), max_iter=5)
        >>> x = inverse @ J_query.rows()[0]
        >>> residuals = inverse.refinement.residuals
        >>> bool(residuals[-1] < residuals[0])
        True
    """

    def __init__(
        self,
        G: PyTorchLinearOperator,
        damping: float,
        preconditioner: PyTorchLinearOperator | None = None,
        *,
        max_iter: int = 100,
        tolerance: float = 1e-3,
        progressbar: bool = False,
        callback: Callable[[Tensor], object] | None = None,
    ):
        self.G = G
        self.damping = check_non_negative("damping", damping)
        self.preconditioner = preconditioner
        self.max_iter = check_count("max_iter", max_iter)
        self.tolerance = check_non_negative("tolerance", tolerance)
        self.refinement = Refinement()
        self._progressbar = progressbar
        self._callback = callback
        if preconditioner is not None:
            check_same_parameters({"the preconditioner": preconditioner}, {"G": G})
        super().__init__(G)

    def multiply(self, X_PK: Tensor) -> Tensor:
        """Solve for every column, ``[P, K] -> [P, K]``."""
        with tqdm(total=self.max_iter, desc="Residual", disable=not self._progressbar) as bar:
            return self._solve(X_PK, bar)

    def _solve(self, B_PK: Tensor, bar: Any) -> Tensor:
        """Iterate; a column that is done stays as it is."""
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
            if self._callback is not None:
                self._callback(X_PK)
            bar.set_postfix_str(f"{float(self.refinement.residuals[-1].max()):.2e}")
            bar.update()
            if finished or stuck:
                break
            Z_PK = self._preconditioned(R_PK)
            previous_K, rz_K = rz_K, (R_PK * Z_PK).sum(0)
            D_PK = Z_PK + _ratio(rz_K, previous_K, going_K) * D_PK
        return X_PK

    def _damped(self, X_PK: Tensor) -> Tensor:
        product: Tensor = self.G @ X_PK
        return product + self.damping * X_PK

    def _preconditioned(self, R_PK: Tensor) -> Tensor:
        return R_PK if self.preconditioner is None else self.preconditioner @ R_PK

    def _finished(self, R_PK: Tensor, B_PK: Tensor) -> bool:
        """Note the residual, and tell whether all columns are done."""
        norms_K = B_PK.norm(dim=0)
        residual_K = R_PK.norm(dim=0) / norms_K.where(norms_K > 0, torch.ones_like(norms_K))
        if not residual_K.isfinite().all():
            raise ValueError(
                "The refinement does not converge: its residual is no longer finite after "
                f"{self.refinement.num_iterations} iterations. Pass a larger damping."
            )
        self.refinement.residuals.append(residual_K.detach())
        self.refinement.converged = residual_K <= self.tolerance
        return bool(self.refinement.converged.all())


def _ratio(numerator_K: Tensor, denominator_K: Tensor, where_K: Tensor) -> Tensor:
    safe_K = torch.where(where_K, denominator_K, torch.ones_like(denominator_K))
    return torch.where(where_K, numerator_K / safe_K, torch.zeros_like(numerator_K))
