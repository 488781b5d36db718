"""How sure scores are: those of two halves of the draws, from the same gradients.

Legend: Q queries, N training examples, B a batch of them, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.consumers import PairwiseScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.ranks import mean_ranks
from curvlinops_diffusion.influence.scorers import HALVED, halved_products
from curvlinops_diffusion.influence.scores import scored_blocks
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions


@dataclass(frozen=True)
class SplitHalfScores:
    r"""Scores, and those of either half of the draws of queries and training examples.

    With gradients ``g = (g₁ + g₂)/2`` of the two halves of the draws, on both sides::

        τ = 1/N q̄ᵀ G_inv ḡ        τ₁ = 1/N q₁ᵀ G_inv g₁        τ₂ = 1/N q₂ᵀ G_inv g₂

    The halves share no noise. Their agreement is that of two runs with half the draws and other
    seeds; the scores of all draws are surer than either.

    Attributes:
        scores: ``τ``, shape ``[Q, N]``.
        first: ``τ₁``, likewise.
        second: ``τ₂``, likewise.
    """

    scores: Tensor
    first: Tensor
    second: Tensor

    def rank_correlation(self) -> Tensor:
        """Spearman's correlation of the halves' scores over training examples, ``[Q]``."""
        return rank_correlation(self.first, self.second)

    def top_shared(self, k: int = 10) -> Tensor:
        """The share of each half's ``k`` largest scores that the other half has too, ``[Q]``."""
        return top_shared(self.first, self.second, k)

    def standard_error(self) -> Tensor:
        """The standard error of a query's scores, root mean square over its examples, ``[Q]``.

        Half the difference of the halves: the error of their mean, which is not below that of
        ``τ``.
        """
        return standard_error(self.first, self.second)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of corresponding rows, ``[Q]``; undefined (NaN) for constant ones.

    Ties share their mean rank.
    """
    a, b = (r - r.mean(1, keepdim=True) for r in map(mean_ranks, (first, second)))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def top_shared(first: Tensor, second: Tensor, k: int) -> Tensor:
    """The share of the ``k`` largest entries of corresponding rows that both have, ``[Q]``."""
    k = min(k, first.shape[1])
    chosen = [
        torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k).indices, True)
        for z in (first, second)
    ]
    return (chosen[0] & chosen[1]).sum(1) / k


def standard_error(first: Tensor, second: Tensor) -> Tensor:
    """Half the root mean square difference of corresponding rows, ``[Q]``."""
    return (first - second).square().mean(1).sqrt() / 2


def split_half_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> SplitHalfScores:
    """The scores of :func:`~curvlinops_diffusion.influence_scores`, and how sure they are.

    At the same number of passes; twice the memory for gradients of queries and batches.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``; any self-adjoint operator.
        J_train: Gradients of the training losses, ``[N, P]``.
        query_block: Queries whose preconditioned gradients are held at once.
        passes: Checkpoints, processes and progress.

    Raises:
        ValueError: If the operators act on different parameters or devices, or the draws of one
            side cannot be halved.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> found = split_half_scores(J_query, EK.inverse(damping=1e-3), J_train)
        >>> found.scores.shape, found.rank_correlation().shape
        (torch.Size([2, 10]), torch.Size([2]))
    """
    N = J_train.shape[0]
    loop = scored_blocks(
        *(halves_of(J_query), G_inv, halves_of(J_train), halved_products(N)),
        lambda make: PairwiseScores(make, N),
        query_block=query_block,
        passes=passes,
    )
    parts = [consumer.scores for _, consumer in loop]
    return SplitHalfScores(*(torch.cat([part[name] for part in parts]) for name in HALVED))


def can_be_halved(regression: NoisedRegression) -> bool:
    """Whether the draws are an even number of pairs, or of lists of timesteps."""
    draws = regression.draws
    return draws.num_draws % (2 * draws.rounded_up(1)) == 0


def halves_of(J: ExampleGradientLinearOperator) -> list[ExampleGradientLinearOperator]:
    """The gradients from either half of the draws.

    Raises:
        ValueError: If the draws cannot be halved.
    """
    return [J.on(J.regression.divided(number, 2)) for number in range(2)]
