"""Influence scores: what a measured value would be without a training example."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion._checks import check_count
from curvlinops_diffusion._upstream import PyTorchLinearOperator
from curvlinops_diffusion.gradients import ExampleGradientLinearOperator


def influence_scores(
    J_query: PyTorchLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: PyTorchLinearOperator,
    *,
    query_block: int = 64,
    progressbar: bool = False,
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

    Returns:
        The scores, shape ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: If the operators act on different parameters or devices.
    """
    check_count("query_block", query_block)
    _check_same_space(J_query, G_inv, J_train)
    Q, N = J_query.shape[0], J_train.shape[0]
    scores_QN = torch.zeros(Q, N, dtype=J_train.dtype, device=J_train.device)
    blocks = range(0, Q, query_block)
    with tqdm(
        total=len(blocks) * N, desc="Influence", unit="examples", disable=not progressbar
    ) as bar:
        for start in blocks:
            queries = range(start, min(start + query_block, Q))
            preconditioned_PQ = G_inv @ _columns(J_query, queries)
            if isinstance(J_train, ExampleGradientLinearOperator):
                for indices, rows_BP in J_train.row_batches():
                    scores_QN[start : queries.stop, list(indices)] = (rows_BP @ preconditioned_PQ).T
                    bar.update(len(indices))
            else:
                scores_QN[start : queries.stop] = (J_train @ preconditioned_PQ).T
                bar.update(N)
    return scores_QN / N


def _columns(J_query: PyTorchLinearOperator, queries: range) -> Tensor:
    """The queries' gradients as columns, ``[P, len(queries)]``."""
    if isinstance(J_query, ExampleGradientLinearOperator):
        return J_query.rows(queries).T
    one_hot = torch.zeros(
        J_query.shape[0], len(queries), dtype=J_query.dtype, device=J_query.device
    )
    one_hot[list(queries), range(len(queries))] = 1
    columns: Tensor = J_query.adjoint() @ one_hot
    return columns


def _check_same_space(
    J_query: PyTorchLinearOperator, G_inv: PyTorchLinearOperator, J_train: PyTorchLinearOperator
) -> None:
    spaces = {
        "J_query": J_query._in_shape,
        "G_inv (in)": G_inv._in_shape,
        "G_inv (out)": G_inv._out_shape,
        "J_train": J_train._in_shape,
    }
    names = [getattr(op, "param_names", None) for op in (J_query, G_inv, J_train)]
    named = {n for n in names if n is not None}
    if len({tuple(map(tuple, s)) for s in spaces.values()}) > 1 or len(named) > 1:
        sizes = ", ".join(
            f"{name}: {len(s)} parameters, {sum(z.numel() for z in s):,} entries"
            for name, s in spaces.items()
        )
        raise ValueError(
            f"The operators act on different parameters ({sizes}). Pass the same params to each, "
            "for instance those of the curvature: ExampleGradientLinearOperator(regression, "
            "EK.param_names)."
        )
    devices = {str(op.device) for op in (J_query, G_inv, J_train)}
    if len(devices) > 1:
        raise ValueError(f"The operators live on {sorted(devices)}. Move them to one device.")
