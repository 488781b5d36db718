"""Training gradients stream past consumers, for one block of queries after the other.

Legend: Q queries, N training examples, B a batch of them, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.influence.consumers import GradientConsumer, Scored
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
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

C = TypeVar("C", bound=GradientConsumer)


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
    run_pass(
        name,
        streams[0].regression,
        CompositeSums(consumers),
        step,
        passes,
        {**of_gradients(streams[0]), **(settings or {})},
        prepare,
        begin=begin,
        summed=summed,
        streams=len(streams),
    )


def scored_blocks(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    consumer: Callable[[], C],
    *,
    halves: bool = False,
    layers: Sequence[Sequence[slice]] = (),
    name: str = "Scores",
    settings: Mapping[str, Any] | None = None,
    query_block: int,
    passes: PassOptions,
    summed: bool = True,
    wanted: Callable[[range], bool] = lambda queries: True,
) -> Iterator[tuple[range, C]]:
    """Score the training examples for one block of queries after the other.

    Yields the queries of each block that is ``wanted``, and what ``consumer`` made to take its
    scores (see :class:`~.consumers.Scored`, which ``layers`` go to), after a pass over the training
    gradients. With ``halves`` either half of the draws is scored, too; unless ``summed``, each
    process has the result of its own examples. ``settings`` is what results depend on besides
    gradients and curvature. What was written down of a block is deleted when the next is asked for.
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    kinds, streams = [J_query], [J_train]
    if halves:
        assert isinstance(J_query, ExampleGradientLinearOperator)
        kinds, streams = list(halves_of(J_query)), halves_of(J_train)
    processes = Processes.of(passes.distributed)
    blocks = [queries for queries in query_blocks(J_query, query_block) if wanted(queries)]
    of_all: dict[str, Any] = {}
    if blocks and passes.checkpoint is not None:  # once: weights and data are hashed
        of_all = {
            **{  # and those of halves, by number
                f"query{n or ''}": J.regression.identity({"measurement": name_of(J.measurement)})
                for n, J in enumerate(kinds)
                if isinstance(J, ExampleGradientLinearOperator)
            },
            "curvature": curvature_settings(G_inv),
            **(settings or {}),
        }
    for queries in blocks:
        described = {"queries": [queries.start, queries.stop], **of_all} if of_all else {}
        columns = [_columns(J, G_inv, queries, passes, described) for J in kinds]
        made = consumer()
        scored = Scored(made, [make for _, make in columns], J_train.shape[0], layers)
        stream_gradients(
            streams,
            {"scores": scored},
            name=f"{name} from query {queries.start}",
            settings=described,
            passes=passes,
            summed=summed,
        )
        yield queries, made
        for written, _ in columns:
            if written:
                forget(passes.checkpoint, written, processes)


def halves_of(J: ExampleGradientLinearOperator) -> list[ExampleGradientLinearOperator]:
    """Gradients from either half of the draws, which must be a multiple of two."""
    return [J.on(J.regression.divided(number, 2)) for number in range(2)]


def query_blocks(J_query: PyTorchLinearOperator, query_block: int) -> Iterator[range]:
    """Yield the queries whose gradients are held at once."""
    check_count("query_block", query_block)
    for start in range(0, J_query.shape[0], query_block):
        yield range(start, min(start + query_block, J_query.shape[0]))


def of_gradients(J: ExampleGradientLinearOperator) -> dict[str, Any]:
    """Describe what gradients are of besides the regression, as plain values."""
    return {"params": common_list(J.param_names), "measurement": name_of(J.measurement)}


def curvature_settings(G_inv: PyTorchLinearOperator) -> Any:
    """Describe how an operator was made; if that is not known, by its product with a vector."""
    if hasattr(G_inv, "info"):
        return G_inv.info
    vector_P = torch.randn(G_inv.shape[1], generator=torch.Generator().manual_seed(0))
    product_P: Tensor = G_inv @ vector_P.to(G_inv.device, G_inv.dtype)
    return {"kind": type(G_inv).__name__, "product": digest_of(product_P)}


def _columns(
    J: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    queries: range,
    passes: PassOptions,
    settings: Mapping[str, Any],
) -> tuple[str, Callable[[], Tensor]]:
    """Name and maker of queries' preconditioned gradients, ``[P, Q]``.

    With checkpoints they are written down: inverse-vector products may have taken long.
    """

    def compute() -> dict[str, Tensor]:
        return {"columns": G_inv @ gradient_columns(J, queries, Processes.of(passes.distributed))}

    if passes.checkpoint is None or not isinstance(J, ExampleGradientLinearOperator):
        return "", lambda: compute()["columns"]
    regression, settings = J.regression, {**settings, **of_gradients(J)}
    name = f"Queries {digest_of([settings, regression.description])[:16]}"
    draws = len(queries) * regression.num_draws
    return name, lambda: computed_once(name, regression, compute, passes, settings, draws)[
        "columns"
    ]


def gradient_columns(
    J_query: PyTorchLinearOperator, queries: range, processes: Processes
) -> Tensor:
    """The queries' gradients as columns, ``[P, len(queries)]``; each process computes its part."""
    like: dict[str, Any] = {"dtype": J_query.dtype, "device": J_query.device}
    if isinstance(J_query, ExampleGradientLinearOperator):
        if processes.count == 1:  # nothing beside the gradients
            return J_query.rows(queries).T
        rows_QP = torch.zeros(len(queries), J_query.shape[1], **like)
        own = slice(processes.rank, None, processes.count)
        if J_query.regression.in_step:  # all processes run the network equally often
            for clean in J_query.regression.clean_batches():
                _fill_own_rows(rows_QP, queries, J_query, clean, processes)
        elif queries[own]:
            rows_QP[own] = J_query.rows(queries[own])
        return processes.all_reduce({"rows": rows_QP}, J_query.device)["rows"].T
    one_hot = torch.zeros(J_query.shape[0], len(queries), **like)
    one_hot[list(queries), range(len(queries))] = 1
    columns: Tensor = J_query.adjoint() @ one_hot
    return columns


def batch_columns(
    J: ExampleGradientLinearOperator, clean: CleanBatch, processes: Processes
) -> Tensor:
    """Gradients of a batch as columns, ``[P, B]``: every process computes a part, and has all."""
    if processes.count == 1:
        return J.rows_of(clean).T
    rows_BP = torch.zeros(len(clean.indices), J.shape[1], dtype=J.dtype, device=J.device)
    _fill_own_rows(rows_BP, clean.indices, J, clean, processes)
    return processes.all_reduce({"rows": rows_BP}, J.device)["rows"].T


def _fill_own_rows(
    rows: Tensor,
    examples: Sequence[int],
    J: ExampleGradientLinearOperator,
    clean: CleanBatch,
    processes: Processes,
) -> None:
    """Fill in this process' part of a batch's gradients, where rows are of these examples.

    All processes run the network equally often: what cannot be divided all compute, and the first
    keeps.
    """
    positions = [p for p, n in enumerate(clean.indices) if n in examples]
    own, rest = in_equal_parts(positions, processes)
    for some, kept in ((own, True), (rest, processes.rank == 0)):
        if some:
            part = clean.select(some)
            found_BP = J.rows_of(part)
            if kept:
                rows[[examples.index(n) for n in part.indices]] = found_BP
