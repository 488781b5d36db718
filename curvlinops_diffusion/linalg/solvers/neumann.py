"""The exact damped inverse by a preconditioned Neumann series.

Legend: P parameters, K columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.solvers.iterative import RefinedInverseLinearOperator, Refinement
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator


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
