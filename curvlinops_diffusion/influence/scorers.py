"""Scores of a batch of training gradients for the queries: inner products, whole or in parts.

A scorer is made of the queries' preconditioned gradients ``G_inv ∇m_q``, and maps the gradients of
a batch to scores by name; the main ones are called ``scores``.

Legend: Q queries, N training examples, B a batch of them, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from curvlinops_diffusion.influence.score_files import HALVES

#: Maps the gradients of a batch ``[B, P]``, one tensor for each stream, to scores ``[Q, B]``.
Scorer = Callable[..., dict[str, Tensor]]
#: Makes a scorer of the queries' preconditioned gradients, ``[P, Q]`` for each kind of them.
MakeScorer = Callable[[Sequence[Tensor]], Scorer]
#: The scores of all draws, and of either half of them.
HALVED = ("scores", *HALVES)


def inner_products(num_data: int) -> MakeScorer:
    """``τ(q, n) = 1/N (G_inv ∇m_q)ᵀ ∇ℓ_n``; queries of several kinds after each other.

    Args:
        num_data: ``N``.
    """

    def make(columns: Sequence[Tensor]) -> Scorer:
        columns_PQ = columns[0] if len(columns) == 1 else torch.cat(list(columns), 1)
        return lambda rows_BP: {"scores": _products(columns_PQ, rows_BP, num_data)}

    return make


def halved_products(num_data: int) -> MakeScorer:
    """Scores of all draws and of either half, from gradients of the halves.

    Args:
        num_data: ``N``.
    """

    def make(columns: Sequence[Tensor]) -> Scorer:
        of_queries = _with_mean(*columns)

        def scores(first_BP: Tensor, second_BP: Tensor) -> dict[str, Tensor]:
            return {
                name: _products(columns_PQ, rows_BP, num_data)
                for name, columns_PQ, rows_BP in zip(
                    HALVED, of_queries, _with_mean(first_BP, second_BP), strict=True
                )
            }

        return scores

    return make


def products_by_layer(num_data: int, places: Mapping[str, Sequence[slice]]) -> MakeScorer:
    """Inner products over each layer's parameters.

    Args:
        num_data: ``N``.
        places: Where each layer's parameters are.
    """

    def make(columns: Sequence[Tensor]) -> Scorer:
        (columns_PQ,) = columns

        def scores(rows_BP: Tensor) -> dict[str, Tensor]:
            return {
                layer: torch.stack(
                    [_products(columns_PQ[at], rows_BP[:, at], num_data) for at in own]
                ).sum(0)
                for layer, own in places.items()
            }

        return scores

    return make


def _products(columns_PQ: Tensor, rows_BP: Tensor, num_data: int) -> Tensor:
    return (rows_BP @ columns_PQ).T / num_data


def _with_mean(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (first + second) / 2, first, second
