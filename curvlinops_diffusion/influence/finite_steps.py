"""Scores without gradients of training examples: what a finite step for the query does to them.

Legend: Q queries, N training examples, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.scores import (
    preconditioned_columns,
    query_blocks,
    score_settings,
)
from curvlinops_diffusion.linalg.operator import check_same_parameters
from curvlinops_diffusion.linalg.parameters import select_parameters
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import Share
from curvlinops_diffusion.runtime.sharded_networks import check_whole_parameters


def forward_only_scores(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    step: float = 1e-2,
    query_block: int = 64,
    passes: PassOptions = PLAIN,
) -> Tensor:
    r"""Influence by finite differences: training losses after a step for the query, and against it.

    With ``u = G_inv ∇m_q`` and the length ``s = step · ‖θ‖ / ‖u‖``::

        s(q, n) = 1/N · [ℓ_n(θ + s u) − ℓ_n(θ − s u)] / (2 s)  →  1/N · ∇m_qᵀ G_inv ∇ℓ_n

    No gradient of a training example is ever computed: two forward passes over the training data
    for each query, at the same draws, in place of one pass forward and backward for all queries. So
    for few queries, large data, or networks whose examples' gradients do not fit; and a finite step
    sees what the first derivative does not. The unit is that of
    :func:`~curvlinops_diffusion.influence_scores`, the difference of second order in ``step``, the
    rounding error that of a loss over ``s``: float32 wants a step not far below the default.

    Source: Wang et al., 2024 (attribution by unlearning the query), with both signs of the step.

    Args:
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: The training losses; only their values are computed.
        step: The length of the step, as a part of the parameters' norm.
        query_block: Queries whose preconditioned gradients are held at once.
        passes: Checkpoints (after each query) and processes (each takes some queries).

    Returns:
        The scores, ``[Q, N]``.

    Raises:
        ValueError: If the operators act on different parameters or devices, the step is not
            positive, or parameters are less precise than float32.

    Examples:
        >>> EK_inv = DiffusionEKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> found = forward_only_scores(J_query, EK_inv, J_train)
        >>> plain = influence_scores(J_query, EK_inv, J_train)
        >>> bool((found - plain).norm() < 0.1 * plain.norm())
        True
    """
    check_same_parameters({"J_query": J_query, "J_train": J_train}, {"G_inv": G_inv})
    check_positive("step", step)
    share, regression = Share.of(passes.distributed), J_train.regression
    model = regression.objective.model
    check_whole_parameters(model, "A step of the parameters", "Take influence_scores instead.")
    params = select_parameters(model, J_train.param_names)
    coarse = sorted({str(p.dtype) for p in params.values() if p.dtype.itemsize < 4})
    if coarse:
        raise ValueError(
            f"The network's parameters are {', '.join(coarse)}, which would round the step away. "
            "Load it in float32."
        )
    scores_QN = torch.zeros(
        J_query.shape[0], J_train.shape[0], dtype=J_train.dtype, device=J_train.device
    )
    # every process computes its own: what one has, another need not wait for
    own = PassOptions(passes.checkpoint, passes.checkpoint_every)
    for queries in query_blocks(J_query, query_block):
        settings = {**score_settings(J_query, G_inv, queries, passes), "step": step}
        with preconditioned_columns(J_query, G_inv, queries, passes, settings) as columns:
            steps_PQ = columns()
            for place, q in enumerate(queries):
                if not share.takes(q):
                    continue
                scores_QN[q] = computed_once(
                    f"Training losses after a step for query {q}",
                    regression,
                    partial(_scores_of, J_train, params, steps_PQ[:, place], step),
                    own,
                    {**settings, "query": q},
                )["scores"]
    return share.summed({"scores": scores_QN}, J_train.device)["scores"]


def _scores_of(
    J_train: ExampleGradientLinearOperator,
    params: Mapping[str, nn.Parameter],
    step_P: Tensor,
    length: float,
) -> dict[str, Tensor]:
    """The scores of one query, ``[N]``."""
    norm = torch.stack([p.detach().float().norm() for p in params.values()]).norm()
    scale = length * float(norm) / max(float(step_P.norm()), torch.finfo(step_P.dtype).tiny)
    values = []
    for sign in (1.0, -1.0):
        with _moved(params, sign * scale * step_P):
            values.append(J_train.values())
    return {"scores": (values[0] - values[1]) / (2 * scale * J_train.shape[0])}


@contextmanager
def _moved(params: Mapping[str, nn.Parameter], step_P: Tensor) -> Iterator[None]:
    """Add a vector to parameters for a while."""
    before = {name: p.detach().clone() for name, p in params.items()}
    pieces = step_P.split([p.numel() for p in params.values()])
    try:
        with torch.no_grad():
            for p, piece in zip(params.values(), pieces, strict=True):
                p.add_(piece.reshape(p.shape).to(p.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(before[name])
