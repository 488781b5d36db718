"""Influence: what a measured value would be without a training example, or a group of them.

The queries' preconditioned gradients are kept, and the training gradients streamed past consumers,
each of which makes something of them: all scores, the extreme ones, sums over groups, or the
influence of each example on itself.

Legend: Q queries, N training examples, B a batch of them, K groups, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.influence.consumers import (
    GradientConsumer,
    GroupSums,
    PairwiseScores,
    SelfInfluence,
    TopInfluences,
    TopScores,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scorers import InnerProducts
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checkpoints import forget
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.division import in_equal_parts
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once, run_pass
from curvlinops_diffusion.runtime.processes import Share
from curvlinops_diffusion.runtime.sums import Together


def stream_gradients(
    J_train: ExampleGradientLinearOperator,
    consumers: Mapping[str, GradientConsumer],
    *,
    name: str = "Influence",
    settings: Mapping[str, Any] | None = None,
    passes: PassOptions = PLAIN,
    summed: bool = True,
) -> None:
    """Stream the training gradients past consumers, in one pass.

    Args:
        J_train: Gradients of the training losses.
        consumers: What is made of them, by name.
        name: The name of the pass, for progress and checkpoints.
        settings: What the consumers' results depend on besides the training gradients, as plain
            values, for checkpoints.
        passes: Checkpoints, processes and progress.
        summed: Whether every process has the result of all examples in the end, or that of its own.

    Raises:
        ValueError: If a gradient is not finite (naming parameter and examples), or a checkpoint
            is of something else.
    """

    def begin() -> None:
        for consumer in consumers.values():
            consumer.begin()

    def prepare(clean: CleanBatch) -> tuple[Sequence[int], Tensor]:
        for consumer in consumers.values():
            consumer.prepare(clean)
        return clean.indices, J_train.rows_of(clean)

    def step(gradients: tuple[Sequence[int], Tensor]) -> None:
        for consumer in consumers.values():
            consumer.add(*gradients)

    own = {"params": common_list(J_train.param_names), "measurement": name_of(J_train.measurement)}
    running = Together(consumers)
    settings = {**own, **(settings or {})}
    run_pass(
        *(name, J_train.regression, running, step, passes, settings, prepare),
        begin=begin,
        summed=summed,
    )


def influence_scores(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: PyTorchLinearOperator,
    *,
    query_block: int = 64,
    progressbar: bool = False,
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
        progressbar: Whether to show progress.
        passes: Checkpoints and processes, for an :class:`ExampleGradientLinearOperator`.

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
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    passes = replace(passes, progressbar=progressbar or passes.progressbar)
    N, parts = J_train.shape[0], []
    for queries in query_blocks(J_query, query_block):
        settings = score_settings(J_query, G_inv, queries, passes)
        with preconditioned_columns(J_query, G_inv, queries, passes, settings) as columns:
            if isinstance(J_train, ExampleGradientLinearOperator):
                consumer = PairwiseScores(InnerProducts(columns, N), N)
                stream_gradients(
                    J_train,
                    {"scores": consumer},
                    name=f"Scores from query {queries.start}",
                    settings=settings,
                    passes=passes,
                )
                parts.append(consumer.scores_QN)
            else:
                parts.append((J_train @ columns()).T / N)
    return torch.cat(parts)


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
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    share, N, parts = Share.of(passes.distributed), J_train.shape[0], []
    for queries in query_blocks(J_query, query_block):
        settings = {**score_settings(J_query, G_inv, queries, passes), "k": k}
        with preconditioned_columns(J_query, G_inv, queries, passes, settings) as columns:
            consumer = TopScores(InnerProducts(columns, N), N, k, share)
            stream_gradients(
                J_train,
                {"top": consumer},
                name=f"Top scores from query {queries.start}",
                settings=settings,
                passes=passes,
            )
        parts.append(consumer.result)
    return TopInfluences.of_blocks(parts)


def group_and_self_influence(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    groups: Tensor,
    *,
    self_seed: int | None = None,
    passes: PassOptions = PLAIN,
) -> tuple[Tensor, Tensor]:
    r"""Influence of groups on queries, and of each example on itself, in one pass.

    No pairwise scores are formed: the gradients of a group are added up first, so that the number
    of queries costs nothing in the pass::

        τ(q, S) = 1/N ∇m_qᵀ G_inv Σ_{n ∈ S} ∇ℓ_n        τ(n, n) = 1/N ∇ℓ_nᵀ G_inv ∇ℓ_n

    With the same draws on both sides, the influence of an example on itself is too large on
    average, by what the gradients vary from draw to draw. ``self_seed`` takes other draws on one
    side, at the price of a second gradient: without bias for a given ``G_inv``.

    Source: Koh et al., 2019, Equation 2 (groups); Feldman & Zhang, 2020 (self-influence).

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        groups: The group of each example, integers ``[N]`` (negative for none); or how much of each
            example is in each group, ``[N, K]``.
        self_seed: The seed of the second set of draws for the influence of examples on themselves,
            another than that of ``J_train``; ``None`` to use one set on both sides.
        passes: Checkpoints, processes and progress.

    Returns:
        Influence of the groups, ``[Q, K]``; of the examples on themselves, ``[N]``.

    Raises:
        ValueError: If ``groups`` has another shape, the operators act on different parameters, or
            ``self_seed`` is the seed of ``J_train``.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> J_train = ExampleGradientLinearOperator(train, EK.param_names)
        >>> J_query = ExampleGradientLinearOperator(query, EK.param_names)
        >>> groups = torch.arange(10) % 3
        >>> of_groups, of_themselves = group_and_self_influence(
        ...     J_query, EK.inverse(damping=1e-8), J_train, groups
        ... )
        >>> of_groups.shape, of_themselves.shape
        (torch.Size([2, 3]), torch.Size([10]))
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    N = J_train.shape[0]
    groups_NK = _memberships(groups, N).to(G_inv.device, G_inv.dtype)
    J_again = None if self_seed is None else _of_other_draws(J_train, self_seed)
    sums, own = GroupSums(groups_NK, J_train.shape[1]), SelfInfluence(G_inv, N, J_again)
    settings = {"curvature": curvature_settings(G_inv), "groups": digest_of(groups_NK)}
    settings |= {} if self_seed is None else {"self_seed": self_seed}
    stream_gradients(
        J_train,
        {"groups": sums, "self": own},
        name="Group and self-influence",
        settings=settings,
        passes=passes,
    )
    preconditioned_PK = G_inv @ sums.sums_KP.T
    return J_query @ preconditioned_PK / N, own.values_N


def _of_other_draws(J: ExampleGradientLinearOperator, seed: int) -> ExampleGradientLinearOperator:
    if seed == J.regression.draws.seed:
        raise ValueError(
            f"self_seed={seed} is the seed of J_train's own draws. Pass another, or None."
        )
    return J.on(J.regression.with_seed(seed))


def _memberships(groups: Tensor, N: int) -> Tensor:
    if groups.shape == (N,) and not groups.is_floating_point():
        K = int(groups.max()) + 1
        return (groups.unsqueeze(1) == torch.arange(K, device=groups.device)).float()
    if groups.ndim != 2 or len(groups) != N:
        raise ValueError(
            f"groups arrived with shape {tuple(groups.shape)} and {groups.dtype}. Pass the number "
            f"of each example's group, integers [{N}], or memberships [{N}, groups]."
        )
    return groups


def query_blocks(J_query: PyTorchLinearOperator, query_block: int) -> Iterator[range]:
    """Yield the queries whose gradients are held at once."""
    check_count("query_block", query_block)
    for start in range(0, J_query.shape[0], query_block):
        yield range(start, min(start + query_block, J_query.shape[0]))


def score_settings(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    queries: range,
    passes: PassOptions,
) -> dict[str, Any]:
    """Describe what scores depend on besides the training gradients, for checkpoints."""
    if passes.checkpoint is None:
        return {}
    described: dict[str, Any] = {"queries": [queries.start, queries.stop]}
    if isinstance(J_query, ExampleGradientLinearOperator):
        measured = {"measurement": name_of(J_query.measurement)}
        described["query"] = J_query.regression.identity(measured)
    return {**described, "curvature": curvature_settings(G_inv)}


def curvature_settings(G_inv: PyTorchLinearOperator) -> Any:
    """Tell how an operator was made, or if it does not say so, what it makes of a fixed vector."""
    if hasattr(G_inv, "info"):
        return G_inv.info
    vector_P = torch.randn(G_inv.shape[1], generator=torch.Generator().manual_seed(0))
    product_P: Tensor = G_inv @ vector_P.to(G_inv.device, G_inv.dtype)
    return {"kind": type(G_inv).__name__, "product": digest_of(product_P)}


@contextmanager
def preconditioned_columns(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    queries: range,
    passes: PassOptions,
    settings: Mapping[str, Any],
) -> Iterator[Callable[[], Tensor]]:
    """Queries' preconditioned gradients, for as long as scores are computed from them.

    With checkpoints they are written down: inverse-vector products may have taken long. Deleted
    when what they are for is done.

    Args:
        J_query: The queries' gradients.
        G_inv: Inverse curvature.
        queries: Those whose gradients are made.
        passes: Checkpoints and processes.
        settings: Those of the scores, see :func:`score_settings`.

    Yields:
        Makes them, ``[P, len(queries)]``, or reads them; by all processes together.
    """
    share = Share.of(passes.distributed)

    def make() -> dict[str, Tensor]:
        return {"columns": G_inv @ gradient_columns(J_query, queries, share)}

    if passes.checkpoint is None or not isinstance(J_query, ExampleGradientLinearOperator):
        yield lambda: make()["columns"]
        return
    regression, own = J_query.regression, {"measurement": name_of(J_query.measurement)}
    settings = {**settings, **own, "params": common_list(J_query.param_names)}
    name = f"Queries {digest_of([settings, regression.description])[:16]}"
    yield lambda: computed_once(name, regression, make, passes, settings)["columns"]
    forget(passes.checkpoint, name, share)


def gradient_columns(J_query: PyTorchLinearOperator, queries: range, share: Share) -> Tensor:
    """The queries' gradients as columns, ``[P, len(queries)]``; each process computes its share."""
    if isinstance(J_query, ExampleGradientLinearOperator):
        if share.count == 1:  # nothing beside the gradients
            return J_query.rows(queries).T
        rows_QP = torch.zeros(
            len(queries), J_query.shape[1], dtype=J_query.dtype, device=J_query.device
        )
        if J_query.regression.in_step:
            _fill_in_step(rows_QP, J_query, queries, share)
        elif queries[share.rank :: share.count]:
            rows_QP[share.rank :: share.count] = J_query.rows(queries[share.rank :: share.count])
        return share.summed({"rows": rows_QP}, J_query.device)["rows"].T
    one_hot = torch.zeros(
        J_query.shape[0], len(queries), dtype=J_query.dtype, device=J_query.device
    )
    one_hot[list(queries), range(len(queries))] = 1
    columns: Tensor = J_query.adjoint() @ one_hot
    return columns


def _fill_in_step(
    rows_QP: Tensor, J_query: ExampleGradientLinearOperator, queries: range, share: Share
) -> None:
    """Fill the rows of this process' queries; all processes run the network equally often."""
    for clean in J_query.regression.clean_batches():
        positions = [p for p, n in enumerate(clean.indices) if n in queries]
        for indices, found_BP in _own_rows(J_query, clean, positions, share):
            rows_QP[[n - queries.start for n in indices]] = found_BP


def _own_rows(
    J: ExampleGradientLinearOperator, clean: CleanBatch, positions: list[int], share: Share
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield this process' part of a batch' gradients, with the examples' indices.

    All processes run the network equally often: what cannot be divided all compute, and the first
    keeps.
    """
    own, rest = in_equal_parts(positions, share)
    for some, kept in ((own, True), (rest, share.rank == 0)):
        if some:
            part = clean.select(some)
            found_BP = J.rows_of(part)
            if kept:
                yield part.indices, found_BP


def batch_columns(J: ExampleGradientLinearOperator, clean: CleanBatch, share: Share) -> Tensor:
    """A batch' gradients as columns, ``[P, B]``: every process computes a part, and has all."""
    if share.count == 1:
        return J.rows_of(clean).T
    rows_BP = torch.zeros(len(clean.indices), J.shape[1], dtype=J.dtype, device=J.device)
    first = clean.indices[0]
    for indices, found_BP in _own_rows(J, clean, list(range(len(clean.indices))), share):
        rows_BP[[n - first for n in indices]] = found_BP
    return share.summed({"rows": rows_BP}, J.device)["rows"].T
