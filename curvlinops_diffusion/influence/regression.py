"""Kernel regressions of the loss and of the prediction, squared: an order of training examples.

Legend: Q queries, N training examples, P parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernel_regression import kernels_and_scores
from curvlinops_diffusion.influence.measurements.losses import SignedPrediction
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator

#: Functions that are regressed: the loss, and the prediction along one sign. On the digits of
#: docs/evidence.rst two signs, and four, predicted retraining no better than one.
FUNCTIONS = 2
#: Settled on the digits, where 3 to 10 for the ridge and one to two for the weights are level; two
#: for what small photographs say as well.
RIDGE = 5.0
WEIGHTS = (1.0, 2.0)


def regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    r"""Order the training examples by what training without each would do to a query's loss.

    Training without some examples changes the query's prediction by ``δ``, and its loss by
    ``2⟨ŷ − y, δ⟩ + ‖δ‖²``. Kernel regression of the loss predicts the first term, the squares of a
    regression of the prediction ``f = ⟨s, ŷ⟩`` along random signs ``s`` the second::

        s(q, n) = z(w_ℓ(q, n)) + 2 z(w_f(q, n)²),     w = k(q, ·) (K + ρ κ I)⁻¹

    up to a factor, with ``z`` in units of a query's standard deviation over ``n``; ``k``, ``K`` and
    ``κ`` as in :func:`~curvlinops_diffusion.kernel_regression_scores`. Positive is helpful; the
    size has no unit, and how much the loss would change is not said.

    Source: ``docs/evidence.rst`` (the decomposition, and how it was settled); Park et al., 2023
    (regression on gradients).

    Args:
        J_query: Gradients of the queries' loss, or of something else of which lower is better.
        G_inv: Inverse curvature, ``[P, P]``: K-FAC's or EK-FAC's at a small damping.
        J_train: Gradients of the training loss.
        ridge: ``ρ > 0``.
        seed: Of the signs.
        options: ``largest_gram``, ``gradient_bytes``, ``max_iter``, ``tolerance`` and ``passes`` of
            :func:`~curvlinops_diffusion.kernel_regression_scores`.

    Returns:
        The scores, ``[Q, N]``, on the operators' device.

    Raises:
        ValueError: As :func:`~curvlinops_diffusion.kernel_regression_scores`.

    Examples:
        >>> K_inv = DiffusionKFACLinearOperator(train).inverse(damping=1e-3)
        >>> J_train = ExampleGradientLinearOperator(train)
        >>> J_query = ExampleGradientLinearOperator(query)
        >>> regression_scores(J_query, K_inv, J_train).shape  # [Q, N]
        torch.Size([2, 10])
    """
    return influence_and_regression_scores(
        J_query, G_inv, J_train, ridge=ridge, seed=seed, **options
    )[1]


def influence_and_regression_scores(
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Influence scores and those of :func:`regression_scores`, out of the same gradients.

    The kernel of queries and training examples is ``N`` times the influence.

    Arguments and errors are those of :func:`regression_scores`.

    Returns:
        The scores of :func:`~curvlinops_diffusion.influence_scores`, and the others, ``[Q, N]``.
    """
    signed = SignedPrediction(seed)
    functions = [[J, J.measuring(signed)] for J in (J_query, J_train)]
    settings: dict[str, Any] = {"squared": [False, True], "weights": WEIGHTS}
    kernel_QN, scores_QN = kernels_and_scores(
        functions[0], G_inv, functions[1], ridge=ridge, **settings, **options
    )
    return kernel_QN / J_train.shape[0], scores_QN
