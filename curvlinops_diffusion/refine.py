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

from curvlinops_diffusion._checks import check_count, check_non_negative
from curvlinops_diffusion._upstream import PyTorchLinearOperator
from curvlinops_diffusion.operators.base import FlatLinearOperator


@dataclass
class Refinement:
    """How a solution was approached.

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
        if preconditioner is not None and preconditioner._in_shape != G._in_shape:
            raise ValueError(
                f"The preconditioner acts on {preconditioner.shape[1]:,} entries and G on "
                f"{G.shape[1]:,}. Pass the same params to both."
            )
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
                f"{self.refinement.num_iterations} iterations. Pass a larger damping, or for the "
                "Neumann series a smaller step_size."
            )
        self.refinement.residuals.append(residual_K.detach())
        self.refinement.converged = residual_K <= self.tolerance
        return bool(self.refinement.converged.all())


class CGRefinedInverseLinearOperator(RefinedInverseLinearOperator):
    r"""``(G + λ I)⁻¹`` by preconditioned conjugate gradients.

    The error in the norm of ``G + λ I`` falls monotonically, by a factor of at least
    ``(√κ − 1) / (√κ + 1)`` an iteration with the condition number ``κ`` of ``M (G + λ I)``, ``M``
    being the preconditioner; faster where its eigenvalues form clusters. ``docs/attribution.rst``
    has at which damping which preconditioner pays.

    Source: Hestenes & Stiefel, 1952; Saad, 2003, Algorithm 9.1.

    Arguments, attributes and errors are those of :class:`RefinedInverseLinearOperator`; the
    preconditioner must be positive definite.

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
        for _ in range(self.max_iter):
            going_K = ~self.refinement.converged & (rz_K > 0)
            product_PK = self._damped(D_PK)
            step_K = _ratio(rz_K, (D_PK * product_PK).sum(0), going_K)
            X_PK = X_PK + step_K * D_PK
            R_PK = R_PK - step_K * product_PK
            tell_finished = self._finished(R_PK, B_PK)
            tell(X_PK)
            if tell_finished:
                break
            Z_PK = self._preconditioned(R_PK)
            previous_K, rz_K = rz_K, (R_PK * Z_PK).sum(0)
            D_PK = Z_PK + _ratio(rz_K, previous_K, going_K) * D_PK
        return X_PK


def _ratio(numerator_K: Tensor, denominator_K: Tensor, where_K: Tensor) -> Tensor:
    safe_K = torch.where(where_K, denominator_K, torch.ones_like(denominator_K))
    return torch.where(where_K, numerator_K / safe_K, torch.zeros_like(numerator_K))


class NeumannRefinedInverseLinearOperator(RefinedInverseLinearOperator):
    r"""``(G + λ I)⁻¹`` by a preconditioned Neumann series.

    With the preconditioner ``M`` and step ``η``::

        x ← x + η M (b − (G + λ I) x)

    which converges for ``η < 2 / λ_max(M (G + λ I))``. Each iteration may see another matrix, of
    other draws or examples (ASTRA's stochastic iteration): pass ``matrices``. Then ``residuals``
    are those on the iteration's matrix, and the mean of the second half of the iterates is
    returned, which averages the noise out.

    Source: Wang et al., 2025, *Better Training Data Attribution via Better Inverse Hessian-Vector
    Products* (ASTRA), Section 3; Lorraine et al., 2020.

    Args:
        G: As in :class:`RefinedInverseLinearOperator`.
        damping: ``λ ≥ 0``.
        preconditioner: As there.
        step_size: ``η``; ``None`` for the inverse of an estimate of ``λ_max`` by ten power
            iterations.
        matrices: Maps the number of an iteration to the operator to take in place of ``G``.
        max_iter: As there.
        tolerance: As there.
        progressbar: As there.
        callback: As there, with the iterates themselves even where their mean is returned.
    """

    def __init__(
        self,
        G: PyTorchLinearOperator,
        damping: float,
        preconditioner: PyTorchLinearOperator | None = None,
        *,
        step_size: float | None = None,
        matrices: Callable[[int], PyTorchLinearOperator] | None = None,
        max_iter: int = 100,
        tolerance: float = 1e-3,
        progressbar: bool = False,
        callback: Callable[[Tensor], object] | None = None,
    ):
        super().__init__(
            G,
            damping,
            preconditioner,
            max_iter=max_iter,
            tolerance=tolerance,
            progressbar=progressbar,
            callback=callback,
        )
        self._matrices = matrices
        self.step_size = self._safe_step() if step_size is None else step_size

    def _safe_step(self, iterations: int = 10) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape[1], 1, generator=generator).to(self.device, self.dtype)
        largest = 1.0
        for _ in range(iterations):
            product = self._preconditioned(self._damped(x))
            largest = float(product.norm() / x.norm())
            x = product / product.norm()
        return 1 / (1.05 * largest)  # power iterations come from below

    def _solve(self, B_PK: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        """The series, from the preconditioner's solution on."""
        self.refinement = Refinement()
        X_PK = torch.zeros_like(B_PK)
        mean_PK, averaged = torch.zeros_like(B_PK), 0
        for k in range(self.max_iter + 1):
            G = self.G if self._matrices is None else self._matrices(k)
            R_PK = B_PK - (G @ X_PK + self.damping * X_PK) if k > 0 else B_PK
            if self._finished(R_PK, B_PK) or k == self.max_iter:
                break
            X_PK = X_PK + self.step_size * self._preconditioned(R_PK)
            if 2 * k >= self.max_iter:
                averaged += 1
                mean_PK += (X_PK - mean_PK) / averaged
            tell(X_PK)
        return X_PK if self._matrices is None or averaged == 0 else mean_PK
