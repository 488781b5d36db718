"""Influence: what a measured value would be without a training example, or a group of them.

The queries' preconditioned gradients are kept, and the training gradients streamed past consumers,
each of which makes something of them: all scores, the extreme ones, sums over groups, or the
influence of each example on itself.

Legend: Q queries, N training examples, B a batch of them, K groups, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.data import CleanBatch
from curvlinops_diffusion.influence.consumers import (
    GradientConsumer,
    GroupSums,
    PairwiseScores,
    ScoringConsumer,
    SelfInfluence,
    TopInfluences,
    TopScores,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scorers import MakeScorer, Scorer, inner_products
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.adapters import common_list
from curvlinops_diffusion.runtime.checkpoints import forget
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.digests import digest_of, name_of
from curvlinops_diffusion.runtime.division import in_equal_parts
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once, run_pass
from curvlinops_diffusion.runtime.processes import Processes
from curvlinops_diffusion.runtime.sums import CompositeSums


def stream_gradients(
    J_train: ExampleGradientLinearOperator | Sequence[ExampleGradientLinearOperator],
    consumers: Mapping[str, GradientConsumer],
    *,
    name: str = "Influence",
    settings: Mapping[str, Any] | None = None,
    passes: PassOptions = PLAIN,
    summed: bool = True,
) -> None:
    """Stream the training gradients past consumers, in one pass.

    Args:
        J_train: Gradients of the training losses; or several of the same examples, of other draws
            say, which stream side by side.
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

    def prepare(clean: CleanBatch) -> tuple[Sequence[int], list[Tensor]]:
        return clean.indices, [J.rows_of(clean) for J in streams]

    def step(gradients: tuple[Sequence[int], list[Tensor]]) -> None:
        indices, rows = gradients
        for consumer in consumers.values():
            consumer.add(indices, *rows)

    streams = [J_train] if isinstance(J_train, ExampleGradientLinearOperator) else list(J_train)
    first = streams[0]
    own = {"params": common_list(first.param_names), "measurement": name_of(first.measurement)}
    running = CompositeSums(consumers)
    settings = {**own, **(settings or {})}
    run_pass(
        *(name, first.regression, running, step, passes, settings, prepare),
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
    passes = replace(passes, progressbar=progressbar or passes.progressbar)
    N = J_train.shape[0]
    if not isinstance(J_train, ExampleGradientLinearOperator):
        check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
        processes = Processes.of(passes.distributed)
        blocks = query_blocks(J_query, query_block)
        return torch.cat(
            [(J_train @ (G_inv @ gradient_columns(J_query, b, processes))).T / N for b in blocks]
        )
    loop = scored_blocks(
        *(J_query, G_inv, J_train, inner_products(N)),
        lambda make: PairwiseScores(make, N),
        query_block=query_block,
        passes=passes,
    )
    return torch.cat([consumer.scores_QN for _, consumer in loop])


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
        *(J_query, G_inv, J_train, inner_products(N)),
        lambda make: TopScores(make, N, k, processes),
        name="Top scores",
        settings={"k": k},
        query_block=query_block,
        passes=passes,
    )
    return TopInfluences.of_blocks([consumer.result for _, consumer in loop])


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
    groups_NK = _memberships(groups, N).to(G_inv.device, G_inv.dtype)
    sums = GroupSums(groups_NK, J_train.shape[1])
    settings = {"curvature": curvature_settings(G_inv), "groups": digest_of(groups_NK)}
    stream_gradients(
        J_train, {"groups": sums}, name="Group influence", settings=settings, passes=passes
    )
    scores: Tensor = J_query @ (G_inv @ sums.sums_KP.T) / N
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
        streams.append(_of_other_draws(J_train, self_seed))
        settings |= {"self_seed": self_seed}
    stream_gradients(
        streams, {"self": own}, name="Self-influence", settings=settings, passes=passes
    )
    return own.values_N


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


C = TypeVar("C", bound=ScoringConsumer)


def scored_blocks(
    J_query: PyTorchLinearOperator | Sequence[ExampleGradientLinearOperator],
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator | Sequence[ExampleGradientLinearOperator],
    scorer: MakeScorer,
    consumer: Callable[[Callable[[], Scorer]], C],
    *,
    name: str = "Scores",
    settings: Mapping[str, Any] | None = None,
    query_block: int,
    passes: PassOptions,
    summed: bool = True,
    wanted: Callable[[range], bool] = lambda queries: True,
) -> Iterator[tuple[range, C]]:
    """Score the training examples for one block of queries after the other.

    The training gradients stream past once for each block.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``; or several kinds of the same queries,
            of which a block holds all.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``; or several streams of them.
        scorer: Makes a scorer of the queries' preconditioned gradients.
        consumer: Makes what reduces scores.
        name: The name of the passes.
        settings: What results depend on besides gradients and curvature, for checkpoints.
        query_block: Queries whose preconditioned gradients are held at once.
        passes: Checkpoints, processes and progress.
        summed: Whether every process has the result of all examples in the end, or its own.
        wanted: Whether a block is to be scored.

    Yields:
        The queries of a block, and its consumer. What was written down of a block is deleted when
        the next one is asked for.

    Raises:
        ValueError: If the operators act on different parameters or devices.
    """
    kinds = [J_query] if isinstance(J_query, PyTorchLinearOperator) else list(J_query)
    streams = [J_train] if isinstance(J_train, PyTorchLinearOperator) else list(J_train)
    check_same_parameters({"J_query": kinds[0], "J_train": streams[0]}, {"G_inv": G_inv})
    for queries in query_blocks(kinds[0], query_block):
        if not wanted(queries):
            continue
        of_block = [score_settings(J, G_inv, queries, passes) for J in kinds]
        told = {**of_block[0], **(settings or {})}
        if len(kinds) > 1 and of_block[0]:
            told["kinds"] = [own.get("query") for own in of_block]
        with ExitStack() as stack:
            columns = [
                stack.enter_context(preconditioned_columns(J, G_inv, queries, passes, told))
                for J in kinds
            ]
            made = consumer(lambda columns=columns: scorer([make() for make in columns]))  # type: ignore[misc]
            stream_gradients(
                streams,
                {"scores": made},
                name=f"{name} from query {queries.start}",
                settings=told,
                passes=passes,
                summed=summed,
            )
            yield queries, made


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
    processes = Processes.of(passes.distributed)

    def make() -> dict[str, Tensor]:
        return {"columns": G_inv @ gradient_columns(J_query, queries, processes)}

    if passes.checkpoint is None or not isinstance(J_query, ExampleGradientLinearOperator):
        yield lambda: make()["columns"]
        return
    regression, own = J_query.regression, {"measurement": name_of(J_query.measurement)}
    settings = {**settings, **own, "params": common_list(J_query.param_names)}
    name = f"Queries {digest_of([settings, regression.description])[:16]}"
    yield lambda: computed_once(name, regression, make, passes, settings)["columns"]
    forget(passes.checkpoint, name, processes)


def gradient_columns(
    J_query: PyTorchLinearOperator, queries: range, processes: Processes
) -> Tensor:
    """The queries' gradients as columns, ``[P, len(queries)]``; each process computes its share."""
    if isinstance(J_query, ExampleGradientLinearOperator):
        if processes.count == 1:  # nothing beside the gradients
            return J_query.rows(queries).T
        rows_QP = torch.zeros(
            len(queries), J_query.shape[1], dtype=J_query.dtype, device=J_query.device
        )
        if J_query.regression.in_step:
            _fill_in_step(rows_QP, J_query, queries, processes)
        elif queries[processes.rank :: processes.count]:
            rows_QP[processes.rank :: processes.count] = J_query.rows(
                queries[processes.rank :: processes.count]
            )
        return processes.all_reduce({"rows": rows_QP}, J_query.device)["rows"].T
    one_hot = torch.zeros(
        J_query.shape[0], len(queries), dtype=J_query.dtype, device=J_query.device
    )
    one_hot[list(queries), range(len(queries))] = 1
    columns: Tensor = J_query.adjoint() @ one_hot
    return columns


def _fill_in_step(
    rows_QP: Tensor, J_query: ExampleGradientLinearOperator, queries: range, processes: Processes
) -> None:
    """Fill the rows of this process' queries; all processes run the network equally often."""
    for clean in J_query.regression.clean_batches():
        positions = [p for p, n in enumerate(clean.indices) if n in queries]
        for indices, found_BP in _own_rows(J_query, clean, positions, processes):
            rows_QP[[n - queries.start for n in indices]] = found_BP


def _own_rows(
    J: ExampleGradientLinearOperator, clean: CleanBatch, positions: list[int], processes: Processes
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield this process' part of a batch' gradients, with the examples' indices.

    All processes run the network equally often: what cannot be divided all compute, and the first
    keeps.
    """
    own, rest = in_equal_parts(positions, processes)
    for some, kept in ((own, True), (rest, processes.rank == 0)):
        if some:
            part = clean.select(some)
            found_BP = J.rows_of(part)
            if kept:
                yield part.indices, found_BP


def batch_columns(
    J: ExampleGradientLinearOperator, clean: CleanBatch, processes: Processes
) -> Tensor:
    """A batch' gradients as columns, ``[P, B]``: every process computes a part, and has all."""
    if processes.count == 1:
        return J.rows_of(clean).T
    rows_BP = torch.zeros(len(clean.indices), J.shape[1], dtype=J.dtype, device=J.device)
    first = clean.indices[0]
    for indices, found_BP in _own_rows(J, clean, list(range(len(clean.indices))), processes):
        rows_BP[[n - first for n in indices]] = found_BP
    return processes.all_reduce({"rows": rows_BP}, J.device)["rows"].T
