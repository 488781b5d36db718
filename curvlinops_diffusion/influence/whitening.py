"""Gradients in the coordinates in which influence is an inner product.

Legend: B gradients, P parameters, g groups, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.operator import check_whole
from curvlinops_diffusion.linalg.placement import Arrangement


class Whitening:
    r"""``z = (Λ + λ)^{-1/2} Uᵀ g``, with the eigenbasis of a K-FAC or EK-FAC operator.

    Inner products of whitened gradients are those with the damped inverse between them::

        z_q · z_n = ∇m_qᵀ (U Λ Uᵀ + λ)⁻¹ ∇ℓ_n

    Coordinates are ordered block by block.

    Args:
        curvature: The operator.
        damping: ``λ ≥ 0``.
        relative: Whether it is in units of each block's mean eigenvalue.

    Raises:
        ValueError: If the damping is negative, or zero where an eigenvalue is; or blocks are shared
            among processes.
    """

    def __init__(
        self, curvature: BlockDiagonalLinearOperator, damping: float, relative: bool = False
    ):
        check_whole(curvature, "Whitening")
        root = curvature.power(-0.5, damping, relative=relative)
        self._space = curvature.space
        self._placed = []
        for placed, rooted in zip(curvature.blocks, root.blocks, strict=True):
            block, scale = placed.block.eigen(placed.name), rooted.block.eigen(placed.name)
            self._placed.append((placed, block, scale.eigenvalues))

    def __call__(self, rows_BP: Tensor) -> Tensor:
        """Whiten gradients, ``[B, P] -> [B, P]``."""
        shapes = self._space.shapes
        pieces = rows_BP.split(self._space.sizes, 1)
        named = {
            name: piece.T.reshape(*shape, -1)
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }
        coordinates = []
        for placed, block, scale in self._placed:
            arrangement = Arrangement(block.shape, placed.transposed)
            X_gOIB = arrangement.gather([named[name] for name in placed.params])
            there = placed.with_block(block).on(rows_BP.device).block.eigen(placed.name)
            z_gOIB = there.coordinates(X_gOIB) * scale.to(rows_BP.device).unsqueeze(-1)
            coordinates.append(z_gOIB.flatten(0, -2).T)
        return torch.cat(coordinates, 1)
