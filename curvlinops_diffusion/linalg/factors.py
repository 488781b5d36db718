"""Statistics to Kronecker factors, eigenbases and eigenvalues: pure functions of tensors.

Legend: N batch, g groups of a layer (an axis that only grouped layers have), S weight-sharing
positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import check_finite

# Factors of up to so many rows are decomposed together
_SMALL = 512


def trace(factor: Tensor) -> Tensor:
    """Compute the trace of a factor, for each group."""
    return factor.sum() if factor.ndim == 1 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


@dataclass(frozen=True)
class Eigendecomposition:
    """``M = U diag(λ) Uᵀ`` with ``λ ≥ 0``.

    Attributes:
        values: Eigenvalues ``λ``; ascending, unless ``U`` is the identity.
        vectors: Eigenvectors, in the columns of ``U``; ``None`` for the identity.
    """

    values: Tensor
    vectors: Tensor | None

    def is_null(self) -> Tensor:
        """Find eigenvalues that are zero up to rounding: ``λ ≤ n ε λ_max``; exactly, if ``U = I``.

        What a rank-deficient factor has in place of a zero depends on the machine.
        """
        if self.vectors is None:
            return self.values <= 0
        relative = self.values.shape[-1] * torch.finfo(self.values.dtype).eps
        return self.values <= relative * self.values.amax(-1, keepdim=True)


def eigendecomposition(matrix: Tensor, what: str, settle_null: bool = False) -> Eigendecomposition:
    """Decompose a positive semi-definite factor in float64; negative rounding noise becomes zero.

    Args:
        matrix: The factor: ``[I, I]``, one for each group ``[G, I, I]``, or the diagonal ``[I]``
            of a diagonal one.
        what: What it is a factor of, for the error message.
        settle_null: Whether the eigenvectors of zeros are made a function of the space that they
            span, where rounding would choose them.

    Raises:
        ValueError: If the factor has entries that are not finite.
    """
    check_finite(matrix, what)
    if matrix.ndim == 1:
        return Eigendecomposition(matrix.clamp(min=0), None)
    return Eigendecomposition(*_values_and_vectors(matrix, settle_null))


def _values_and_vectors(matrix: Tensor, settle_null: bool) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix.double())
    if settle_null:
        null = Eigendecomposition(values.clamp(min=0).to(matrix), vectors).is_null()
        vectors = _settled(vectors, null)
    # one layout of memory, so that products are the same to the last bit after saving and loading
    return values.clamp(min=0).to(matrix), vectors.to(matrix).contiguous()


def alike(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Group the names of matrices that are decomposed together: small ones of one shape.

    One after the other, hundreds of small ones (of adapters, say) would wait for their kernels'
    launches on a GPU. No more together than take the memory of the largest.
    """
    most = max((shape.numel() for shape in shapes.values()), default=0)
    groups: dict[torch.Size, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[0] <= _SMALL:
            groups.setdefault(shape, []).append(name)
        else:
            yield [name]
    for shape, names in groups.items():
        size = most // shape.numel()
        yield from (names[start : start + size] for start in range(0, len(names), size))


def eigendecompositions(
    matrices: Mapping[str, Tensor], settle_null: bool = False
) -> list[Eigendecomposition]:
    """Decompose factors of one shape together, by what they are factors of, for messages."""
    if len(matrices) == 1:
        return [eigendecomposition(M, what, settle_null) for what, M in matrices.items()]
    stacked = torch.stack(list(matrices.values()))
    if not stacked.isfinite().all():
        for what, M in matrices.items():
            check_finite(M, what)
    # each of its own memory, since one may be moved or let go of without the others
    return [
        Eigendecomposition(values.clone(), vectors.clone())
        for values, vectors in zip(*_values_and_vectors(stacked, settle_null), strict=True)
    ]


def _settled(vectors: Tensor, null: Tensor) -> Tensor:
    """Replace the eigenvectors of zeros by others that span the same space.

    With the columns ``N`` of the null space and any fixed ``D``, ``N V`` with ``Nᵀ D N = V δ Vᵀ``
    are the same but for signs, whatever basis ``N`` is, as long as the entries of ``δ`` differ.
    """
    if vectors.ndim == 3:
        return torch.stack([_settled(U, own) for U, own in zip(vectors, null, strict=True)])
    N = vectors[:, null]
    D = torch.linspace(1, 2, len(vectors)).to(vectors)
    settled = vectors.clone()
    settled[:, null] = N @ torch.linalg.eigh(N.mT @ (D.unsqueeze(1) * N)).eigenvectors
    return settled
