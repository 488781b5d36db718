"""Iterative refinement: the exact damped inverse, from products with the exact matrix.

Legend: P parameters, K columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

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


class RefinedInverseLinearOperator(FlatLinearOperator):
    """``(G + λ I)⁻¹`` by iteration, from an approximation of it.

    A product runs the iteration on all columns at once, each with its own coefficients. It stops
    when every column's relative residual is at most the tolerance, or after ``max_iter``
    iterations; :attr:`refinement` tells what happened in the latest product.

    Args:
        G: The curvature, usually a :class:`~curvlinops_diffusion.DiffusionGGNLinearOperator`.
        damping: ``λ ≥ 0``.
        preconditioner: An approximation of ``(G + λ I)⁻¹``, usually
            ``EK.inverse(damping)``; ``None`` for the identity.
        max_iter: Iterations at most.
        tolerance: The relative residual to reach.
        progressbar: Whether to show the residual as it falls.
        callback: Called with the solution ``[P, K]`` after each iteration, as SciPy's solvers do.

    Attributes:
        refinement: What happened in the latest product.
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

            def tell(X_PK: Tensor) -> None:
                if self._callback is not None:
                    self._callback(X_PK)
                bar.set_postfix_str(f"{float(self.refinement.residuals[-1].max()):.2e}")
                bar.update()

            return self._solve(X_PK, tell)

    @abstractmethod
    def _solve(self, B_PK: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        """Iterate."""

    def _damped(self, X_PK: Tensor) -> Tensor:
        product: Tensor = self.G @ X_PK
        return product + self.damping * X_PK

    def _preconditioned(self, R_PK: Tensor) -> Tensor:
        return R_PK if self.preconditioner is None else self.preconditioner @ R_PK

    def _finished(self, R_PK: Tensor, B_PK: Tensor) -> bool:
        """Note the residual; whether all columns are done."""
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
