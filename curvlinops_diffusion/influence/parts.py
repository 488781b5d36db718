"""Influence in parts that add up: by layer.

Legend: Q queries, N training examples, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlinops_diffusion.influence.consumers import PairwiseScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scorers import products_by_layer
from curvlinops_diffusion.influence.scores import scored_blocks
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions


def influence_scores_by_layer(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    layers: Mapping[str, Sequence[str]] | None = None,
    *,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> dict[str, Tensor]:
    """Each layer's part of the influence scores, in one pass.

    With the coordinates ``P_l`` of a layer's parameters::

        τ_l(q, n) = 1/N · (G_inv ∇m_q)_lᵀ (∇ℓ_n)_l,      Σ_l τ_l = τ

    For a block-diagonal ``G_inv`` it is the influence through that layer alone.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        layers: The parameters of each part, by their names; ``None`` for one part for each module
            with parameters.
        query_block: As in :func:`~curvlinops_diffusion.influence_scores`.
        passes: Checkpoints, processes and progress.

    Returns:
        The scores of each part by its name, ``[Q, N]``.

    Raises:
        ValueError: If the operators act on different parameters or devices, or the parts do not
            hold each parameter once.

    Examples:
        >>> K_inv = DiffusionKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> parts = influence_scores_by_layer(J_query, K_inv, J_train)
        >>> total = influence_scores(J_query, K_inv, J_train)
        >>> bool((sum(parts.values()) - total).norm() < 1e-3 * total.norm())
        True
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    names = J_train.param_names
    if layers is None:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        layers = found
    held = [name for part in layers.values() for name in part]
    if sorted(held) != sorted(names):
        wrong = sorted(set(held) ^ set(names)) or sorted({n for n in held if held.count(n) > 1})
        raise ValueError(
            f"The layers do not hold each of the {len(names)} parameters once: {wrong[:5]}. Name "
            "each in one of them, as in J_train.param_names."
        )
    sizes = dict(zip(names, J_train.parameter_sizes, strict=True))
    places = _places(names, sizes, layers)
    N = J_train.shape[0]
    loop = scored_blocks(
        *(J_query, G_inv, J_train, products_by_layer(N, places)),
        lambda make: PairwiseScores(make, N),
        name="Scores by layer",
        settings={"layers": {layer: list(part) for layer, part in layers.items()}},
        query_block=query_block,
        passes=passes,
    )
    parts = [consumer.scores for _, consumer in loop]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


def _places(
    names: Sequence[str], sizes: Mapping[str, int], layers: Mapping[str, Sequence[str]]
) -> dict[str, list[slice]]:
    """Where the layers' parameters are in a flat vector."""
    starts, start = {}, 0
    for name in names:
        starts[name] = start
        start += sizes[name]
    return {
        layer: [slice(starts[name], starts[name] + sizes[name]) for name in part]
        for layer, part in layers.items()
    }
