"""Influence: what a measured value would be without a training example, or a group of them.

The queries' preconditioned gradients are kept, and the training gradients streamed past consumers,
each of which makes something of them: all scores, the extreme ones, those of halves of the draws or
of layers, sums over groups, or the influence of each example on itself.

Legend: Q queries, N training examples, K groups, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import SplitHalfScores
from curvlinops_diffusion.influence.consumers import (
    AllRows,
    GroupSums,
    SelfInfluence,
    TopInfluences,
    TopScores,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.score_files import HALVED
from curvlinops_diffusion.influence.streaming import (
    curvature_settings,
    gradient_columns,
    query_blocks,
    scored_blocks,
    stream_gradients,
)
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.digests import digest_of
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.processes import Processes


def influence_scores(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: PyTorchLinearOperator,
    *,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Predicted changes of the queries' measured values when training examples are left out.

    With rows ``∇m_q`` of ``J_query`` and ``∇ℓ_n`` of ``J_train``::

        τ(q, n) = m_q(θ₋ₙ) − m_q(θ) ≈ 1/N · ∇m_q(θ)ᵀ G_inv ∇ℓ_n(θ)

    For a loss, positive means helpful: without the example the loss rises. The same as the
    operator ``(1 / N) * (J_query @ G_inv @ J_train.adjoint())`` applied to the identity, which is
    the better form for groups of examples.

    Source: Mlodozeniec et al., 2025, Section 2.1 and Equation 3.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``; any self-adjoint operator.
        J_train: Gradients of the training losses, ``[N, P]``.
        query_block: Queries whose preconditioned gradients are held at once, ``[P, query_block]``.
            The training gradients are computed anew for each block, in the batches of their data.
        passes: Checkpoints, processes and progress, for an :class:`ExampleGradientLinearOperator`.

    Returns:
        The scores, shape ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: If the operators act on different parameters or devices.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> scores = influence_scores(J_query, EK.inverse(damping=1e-8), J_train)
        >>> scores.shape  # [Q, N]
        torch.Size([2, 10])
    """
    N = J_train.shape[0]
    if not isinstance(J_train, ExampleGradientLinearOperator):
        check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
        processes = Processes.of(passes.distributed)
        blocks = query_blocks(J_query, query_block)
        return torch.cat(
            [(J_train @ (G_inv @ gradient_columns(J_query, b, processes))).T / N for b in blocks]
        )
    loop = scored_blocks(
        J_query, G_inv, J_train, lambda: AllRows(N), query_block=query_block, passes=passes
    )
    return torch.cat([found.sums["scores"].T for _, found in loop])


def split_half_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> SplitHalfScores:
    """Scores of :func:`~curvlinops_diffusion.influence_scores`, and how sure they are.

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
    loop = scored_blocks(
        J_query,
        G_inv,
        J_train,
        lambda: AllRows(J_train.shape[0], HALVED),
        halves=True,
        query_block=query_block,
        passes=passes,
    )
    parts = [found.sums for _, found in loop]
    return SplitHalfScores(*(torch.cat([part[name].T for part in parts]) for name in HALVED))


def can_be_halved(regression: NoisedRegression) -> bool:
    """Tell if the draws are an even number of pairs, or of lists of timesteps."""
    draws = regression.draws
    return draws.num_draws % (2 * draws.rounded_up(1)) == 0


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
    names, start, places = J_train.param_names, 0, {}
    for name, size in zip(names, J_train.parameter_sizes, strict=True):
        places[name] = slice(start, start + size)
        start += size
    if layers is None:
        modules: dict[str, list[str]] = {}
        for name in names:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        layers = modules
    held = [name for layer in layers.values() for name in layer]
    if sorted(held) != sorted(names):
        wrong = sorted(set(held) ^ set(names)) or sorted({n for n in held if held.count(n) > 1})
        raise ValueError(
            f"`layers` must hold each of the {len(names)} parameters once, got others, or several "
            f"times: {wrong[:5]}. Name each in one of them, as in J_train.param_names."
        )
    loop = scored_blocks(
        J_query,
        G_inv,
        J_train,
        lambda: AllRows(J_train.shape[0], list(layers)),
        layers=[[places[name] for name in layer] for layer in layers.values()],
        name="Scores by layer",
        settings={"layers": {name: list(layer) for name, layer in layers.items()}},
        query_block=query_block,
        passes=passes,
    )
    parts = [found.sums for _, found in loop]
    return {name: torch.cat([part[name].T for part in parts]) for name in layers}


def top_influences(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    k: int = 10,
    *,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> TopInfluences:
    """The training examples with the extreme and the most neutral scores for each query.

    The scores are those of :func:`influence_scores`, of which only these are kept: memory does not
    grow with the number of training examples.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        k: How many of each.
        query_block: As in :func:`influence_scores`.
        passes: Checkpoints, processes and progress.

    Raises:
        ValueError: If the operators act on different parameters or devices.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> found = top_influences(J_query, EK.inverse(damping=1e-8), J_train, k=3)
        >>> scores = influence_scores(J_query, EK.inverse(damping=1e-8), J_train)
        >>> torch.equal(found.positive.indices, scores.topk(3).indices)
        True
    """
    processes, N = Processes.of(passes.distributed), J_train.shape[0]
    loop = scored_blocks(
        J_query,
        G_inv,
        J_train,
        lambda: TopScores(N, k, processes),
        name="Top scores",
        settings={"k": k},
        query_block=query_block,
        passes=passes,
    )
    return TopInfluences.of_blocks([found.result for _, found in loop])


def group_influence_scores(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    groups: Tensor,
    *,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Influence of groups of training examples on queries, in one pass.

    No pairwise scores are formed: the gradients of a group are added up first, so that the number
    of queries costs nothing in the pass::

        τ(q, S) = 1/N ∇m_qᵀ G_inv Σ_{n ∈ S} ∇ℓ_n

    Source: Koh et al., 2019, Equation 2.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        groups: The group of each example, integers ``[N]`` (negative for none); or how much of each
            example is in each group, ``[N, K]``.
        passes: Checkpoints, processes and progress.

    Returns:
        The influence of each group, ``[Q, K]``.

    Raises:
        ValueError: If ``groups`` has another shape, or the operators act on different parameters.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> groups = torch.arange(10) % 3
        >>> group_influence_scores(J_query, EK.inverse(damping=1e-8), J_train, groups).shape
        torch.Size([2, 3])
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    N = J_train.shape[0]
    if groups.shape == (N,) and not groups.is_floating_point():
        numbers = torch.arange(int(groups.max()) + 1, device=groups.device)
        groups = groups.unsqueeze(1) == numbers
    if groups.ndim != 2 or len(groups) != N:
        raise ValueError(
            f"`groups` must be the number of each example's group, integers [{N}], or memberships "
            f"[{N}, groups], got shape {tuple(groups.shape)} of {groups.dtype}."
        )
    groups_NK = groups.to(G_inv.device, G_inv.dtype)
    sums = GroupSums(groups_NK, J_train.shape[1])
    settings = {"curvature": curvature_settings(G_inv), "groups": digest_of(groups_NK)}
    stream_gradients(
        J_train, {"groups": sums}, name="Group influence", settings=settings, passes=passes
    )
    scores: Tensor = J_query @ (G_inv @ sums.sums["sums"].T) / N
    return scores


def self_influence_scores(
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    self_seed: int | None = None,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Influence of each training example on itself, in one pass.

    ::

        τ(n, n) = 1/N ∇ℓ_nᵀ G_inv ∇ℓ_n

    With the same draws on both sides it is too large on average, by what the gradients vary from
    draw to draw. ``self_seed`` takes other draws on one side, at the price of a second gradient:
    without bias for a given ``G_inv``.

    Source: Feldman & Zhang, 2020.

    Args:
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        self_seed: The seed of the second set of draws, another than that of ``J_train``; ``None``
            to use one set on both sides.
        passes: Checkpoints, processes and progress.

    Returns:
        The influence, ``[N]``.

    Raises:
        ValueError: If the operators act on different parameters, or ``self_seed`` is the seed of
            ``J_train``.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> self_influence_scores(EK.inverse(damping=1e-8), J_train, self_seed=1).shape
        torch.Size([10])
    """
    check_same_parameters({"J_train": J_train}, {"G_inv": G_inv})
    own, streams = SelfInfluence(G_inv, J_train.shape[0]), [J_train]
    settings = {"curvature": curvature_settings(G_inv)}
    if self_seed is not None:
        if self_seed == J_train.regression.draws.seed:
            raise ValueError(
                f"`self_seed` must be another seed than that of J_train's own draws, got "
                f"{self_seed}. Pass another, or None."
            )
        streams.append(J_train.on(J_train.regression.with_seed(self_seed)))
        settings |= {"self_seed": self_seed}
    stream_gradients(
        streams, {"self": own}, name="Self-influence", settings=settings, passes=passes
    )
    return own.sums["values"]
