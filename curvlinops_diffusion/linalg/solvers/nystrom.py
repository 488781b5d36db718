"""The Nyström preconditioner: the leading eigenvectors of the exact matrix, from a sketch.

Legend: P parameters, r rank, K columns.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.operator import FlatLinearOperator, check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_count, check_non_negative


class NystromInverseLinearOperator(FlatLinearOperator):
    r"""``(Ĝ + λ I)⁻¹`` with a Nyström approximation ``Ĝ`` of rank ``r``, up to a factor.

    From a sketch ``Y = G Ω`` with ``r`` random columns ``Ω``, ``Ĝ = Y (Ωᵀ Y)⁻¹ Yᵀ = V diag(θ) Vᵀ``.
    As a preconditioner of ``G + λ I``, with everything outside ``V`` treated alike::

        M = V diag((θ_r + λ) / (θ + λ)) Vᵀ + (I − V Vᵀ)

    Where ``G`` is an average over few draws it has few eigenvalues above ``λ`` and a large null
    space, on which ``G + λ I`` is a multiple of the identity: this form keeps it one, where
    EK-FAC's eigenvalues, which are those of all draws, spread it out. Costs ``r`` products with
    ``G`` once, for all right-hand sides and any damping (:meth:`with_damping`).

    Source: Frangella, Tropp & Udell, 2023, *Randomized Nyström Preconditioning*, Algorithms 2.1
    and Equation 5.3.

    Args:
        G: The curvature.
        damping: ``λ > 0``.
        rank: ``r``.
        sketch_from: K-FAC or EK-FAC of the same matrix: columns are drawn from ``N(0, F²)``, which
            are nearer to the leading eigenvectors than those of ``N(0, I)``.
        seed: Seed of the columns.
        block: Columns multiplied at once.

    Examples:
        >>> G = DiffusionGGNLinearOperator(train)
        >>> sketched = NystromInverseLinearOperator(G, damping=1e-2, rank=4)
        >>> more = sketched.with_damping(1.0)  # without another product with G
        >>> exact = CGRefinedInverseLinearOperator(G, 1.0, more, tolerance=0.1)
        >>> x = exact @ torch.ones(G.shape[1])
        >>> exact.refinement.converged.tolist()
        [True]
    """

    def __init__(
        self,
        G: PyTorchLinearOperator,
        damping: float,
        rank: int = 100,
        *,
        sketch_from: BlockDiagonalLinearOperator | None = None,
        seed: int = 0,
        block: int = 32,
    ):
        check_count("rank", rank)
        if rank > G.shape[1]:
            raise ValueError(
                f"rank={rank} arrived for {G.shape[1]} parameters. Pass at most as many."
            )
        self.damping = check_non_negative("damping", damping)
        generator = torch.Generator().manual_seed(seed)
        sketch_Pr = torch.randn(G.shape[1], rank, generator=generator).to(G.device, G.dtype)
        if sketch_from is not None:
            check_same_parameters({}, {"G": G, "sketch_from": sketch_from})
            sketch_Pr = sketch_from @ sketch_Pr
        sketch_Pr = torch.linalg.qr(sketch_Pr).Q
        product_Pr = torch.cat([G @ part for part in sketch_Pr.split(block, 1)], 1)
        # a shift makes the small matrix safely positive definite, and is subtracted again
        shift = torch.finfo(G.dtype).eps * product_Pr.norm()
        product_Pr = product_Pr + shift * sketch_Pr
        inner = (sketch_Pr.T @ product_Pr).double()
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        values = values.clamp(min=float(values[-1]) * torch.finfo(G.dtype).eps)
        root = (vectors * values.rsqrt()).to(product_Pr)
        self.vectors, singular, _ = torch.linalg.svd(product_Pr @ root, full_matrices=False)
        self.values = (singular.square() - shift).clamp(min=0)
        super().__init__(G)

    def with_damping(self, damping: float) -> NystromInverseLinearOperator:
        """The same sketch with another damping, at no cost."""
        other = copy(self)
        other.damping = check_non_negative("damping", damping)
        return other

    def multiply(self, X_PK: Tensor) -> Tensor:
        """Scale along the leading eigenvectors, ``[P, K] -> [P, K]``."""
        scale_r = (self.values[-1] + self.damping) / (self.values + self.damping) - 1
        return X_PK + self.vectors @ (scale_r.unsqueeze(1) * (self.vectors.T @ X_PK))
