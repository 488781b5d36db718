"""Random projections of gradients, seeded, and never held as a matrix.

Legend: B gradients, P coordinates, k coordinates kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import check_count


@dataclass(frozen=True)
class RandomProjection:
    r"""A sparse random projection, under which inner products are preserved on average.

    Each coordinate goes to one of ``k`` sums, with a random sign (a count sketch)::

        z_j = Σ_{i: h(i) = j} s_i x_i,      E ⟨z, z'⟩ = ⟨x, x'⟩
        Var ⟨z, z'⟩ = (‖x‖² ‖x'‖² + ⟨x, x'⟩² − 2 Σ_i x_i² x'_i²) / k

    which is the variance of a projection by ``k`` dense vectors of signs, for a ``k``-th of the
    work and two vectors of ``P`` numbers in place of a matrix.

    Source: Charikar, Chen & Farach-Colton, 2002; Weinberger et al., 2009 (the variance).

    Attributes:
        size: ``k``.
        seed: The seed of sums and signs.

    Examples:
        >>> rows = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
        >>> projected = RandomProjection(size=2_000)(rows)
        >>> projected.shape
        torch.Size([2, 2000])
        >>> bool((projected.norm(dim=1) / rows.norm(dim=1) - 1).abs().max() < 0.1)
        True
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the size.

        Raises:
            ValueError: If it is no number of at least one.
        """
        check_count("size", self.size)

    def __call__(self, rows_BP: Tensor) -> Tensor:
        """Project, ``[B, P] -> [B, k]``."""
        P = rows_BP.shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        sums_P = torch.randint(self.size, (P,), generator=generator)
        signs_P = 2 * torch.randint(2, (P,), generator=generator) - 1
        sums_P, signs_P = sums_P.to(rows_BP.device), signs_P.to(rows_BP)
        result_Bk = rows_BP.new_zeros(len(rows_BP), self.size)
        return result_Bk.index_add_(1, sums_P, rows_BP * signs_P)
