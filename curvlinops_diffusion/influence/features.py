"""Attribution without the network: kernel regression on features of the images.

Legend: Q queries, N training images, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.kernel_regression import SOLVED, ridge_solution
from curvlinops_diffusion.runtime.checks import check_positive


def feature_regression_scores(
    query_QF: Tensor,
    train_NF: Tensor,
    *,
    bandwidth: float = 1.0,
    ridge: float = 1.0,
    squared: bool = True,
) -> Tensor:
    r"""Weights of the training images in a kernel ridge regression on features.

    .. math::

        s(q, \cdot) = k(q, \cdot) (K + \rho I)^{-1}, \qquad
        k(x, y) = \exp\left(- \|\phi(x) - \phi(y)\|^2 / 2 (b\, m)^2\right),

    with the median distance :math:`m` of training images. Squared they say how much the
    uncertainty about a query would rise without an image, as in
    :func:`~curvlinops_diffusion.kernel_regression_scores`: never negative, and without a unit.
    They show what a method that looks at the network adds; on small images of few kinds that is
    little (*Evidence*).

    Args:
        query_QF: Features of the queries, of pixels, latents or any embedding, ``[Q, F]``.
        train_NF: Those of the training images, ``[N, F]``.
        bandwidth: ``b > 0``, in units of the median distance.
        ridge: ``ρ > 0``.
        squared: Whether weights are squared.

    Returns:
        The scores, ``[Q, N]``.

    Raises:
        ValueError: If shapes do not fit, an option is not positive, all training images are alike,
            or there are more than a kernel matrix is formed for.

    Examples:
        >>> scores = feature_regression_scores(images[:2].flatten(1), images.flatten(1))
        >>> scores.argmax(1)
        tensor([0, 1])
    """
    check_positive("bandwidth", bandwidth)
    check_positive("ridge", ridge)
    shapes = tuple(query_QF.shape), tuple(train_NF.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"Features must be [Q, F] and [N, F], got {shapes[0]} and {shapes[1]}.")
    if len(train_NF) > SOLVED.largest_gram:
        raise ValueError(
            f"A regression on features takes at most {SOLVED.largest_gram:,} training images, "
            f"whose kernel matrix it forms, got {len(train_NF):,}. Take a part of them."
        )
    # by inner products a small distance would be rounding
    train_NF, query_QF = (z.to("cpu", torch.float64) for z in (train_NF, query_QF))
    distance_NN = torch.cdist(train_NF, train_NF, compute_mode="donot_use_mm_for_euclid_dist")
    distance_QN = torch.cdist(query_QF, train_NF, compute_mode="donot_use_mm_for_euclid_dist")
    median = float(distance_NN.median())
    if not median > 0:
        raise ValueError("Half of the training images or more have the same features.")
    scale = 2 * (bandwidth * median) ** 2
    cross_QN, gram_NN = ((-(z**2) / scale).exp() for z in (distance_QN, distance_NN))
    scores_QN = ridge_solution(cross_QN, gram_NN, ridge)
    return scores_QN.square() if squared else scores_QN


def pixels_of(query: NoisedRegression, train: NoisedRegression) -> tuple[Tensor, Tensor]:
    """The pixels of queries and training images, ``[Q, F]`` and ``[N, F]``.

    Of several shapes all are resized to one of the training images'.
    """
    return _features(query, train, lambda regression, clean: clean.x0)


def latents_of(query: NoisedRegression, train: NoisedRegression) -> tuple[Tensor, Tensor]:
    """The means of their latents, likewise.

    Raises:
        ValueError: If the pipeline has no autoencoder.
    """
    if not train.encodes:
        raise ValueError(
            "`method` 'latents' needs a pipeline with an autoencoder, and this network is given "
            "pixels. Pass 'pixels'."
        )
    return _features(
        query, train, lambda regression, clean: regression.objective.encode(clean).mean
    )


def _features(
    query: NoisedRegression,
    train: NoisedRegression,
    of: Callable[[NoisedRegression, CleanBatch], Tensor],
) -> tuple[Tensor, Tensor]:
    shape: torch.Size | None = None
    found: list[Tensor] = []
    for regression in (train, query):
        rows: list[Tensor] = [torch.empty(0)] * regression.num_data
        for clean in regression.clean_batches():  # of one shape each, in no order then
            x = of(regression, clean).detach().cpu().float()
            shape = x.shape[1:] if shape is None else shape
            if x.shape[1:] != shape:
                x = interpolate(x, shape[-2:], mode="area")
            for n, row in zip(clean.indices, x.flatten(1), strict=True):
                rows[n] = row
        found.append(torch.stack(rows))
    return found[1], found[0]
