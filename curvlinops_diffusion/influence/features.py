"""Attribution without the network: kernel regression on features of the images.

Legend: Q queries, N training images, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.kernel_regression import ridge_solution
from curvlinops_diffusion.influence.kernels import SOLVED
from curvlinops_diffusion.runtime.checks import check_positive
from curvlinops_diffusion.runtime.devices import to_device

#: The shape of one image, or of its latents.
Size = Sequence[int]
#: A function of images ``[B, C, H, W]`` in [-1, 1], whose rows are their features, ``[B, ...]``.
Embedding = Callable[[Tensor], Tensor]


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
    N = len(train_NF)
    pairs = distance_NN[tuple(torch.triu_indices(N, N, offset=1))]
    median = float(pairs.median()) if N > 1 else 0.0
    if not median > 0:
        raise ValueError("Half of the pairs of training images or more have the same features.")
    scale = 2 * (bandwidth * median) ** 2
    cross_QN, gram_NN = ((-(z**2) / scale).exp() for z in (distance_QN, distance_NN))
    scores_QN = ridge_solution(cross_QN, gram_NN, ridge)
    return scores_QN.square() if squared else scores_QN


def check_encodes(regression: NoisedRegression) -> None:
    """Check that there are latents.

    Raises:
        ValueError: If there is no autoencoder.
    """
    if not regression.encodes:
        raise ValueError(
            "`method` 'latents' needs a pipeline with an autoencoder, and this network is given "
            "pixels. Pass 'pixels'."
        )


def pixels_of(regression: NoisedRegression, like: Size | None = None) -> Tensor:
    """The pixels of a problem's images, ``[N, ...]``; all of the size of the first, or ``like``."""
    return _features(regression, lambda clean: clean.x0, like)


def latents_of(regression: NoisedRegression, like: Size | None = None) -> Tensor:
    """The means of a problem's latents, likewise.

    Raises:
        ValueError: If its pipeline has no autoencoder, or latents of several shapes are packed into
            tokens, of which none is in the place of another.
    """
    check_encodes(regression)
    return _features(regression, lambda clean: regression.objective.encode(clean).mean, like)


def embeddings_of(regression: NoisedRegression, embedding: Embedding) -> Tensor:
    """The embeddings of a problem's images, ``[N, F]``, which are given on its device.

    Raises:
        ValueError: If it is not a row for each image.
    """
    rows: dict[int, Tensor] = {}
    for clean in regression.clean_batches():
        with torch.no_grad():
            found = embedding(to_device(clean.x0, regression.device))
        found = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        shape = tuple(getattr(found, "shape", ()))
        if len(shape) < 2 or shape[0] != len(clean.x0):
            got = shape if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"`embedding` must give a row for each of {len(clean.x0)} images, got {got}."
            )
        rows |= zip(clean.indices, found.flatten(1).cpu().float(), strict=True)
    return torch.stack([rows[n] for n in range(regression.num_data)])


def _features(
    regression: NoisedRegression, of: Callable[[CleanBatch], Tensor], like: Size | None
) -> Tensor:
    rows: dict[int, Tensor] = {}  # batches of one shape each leave the order of the data
    shapes: set[torch.Size] = set()
    for clean in regression.clean_batches():
        x = of(clean).detach().cpu().float()
        shapes.add(clean.x0.shape[1:])
        like = x.shape[1:] if like is None else like
        if x.ndim != clean.x0.ndim and (len(shapes) > 1 or x.shape[1:] != like):
            raise ValueError(
                "`method` 'latents' needs images of one shape where latents are packed into "
                f"tokens, as here, got {sorted(map(tuple, shapes))}. Pass 'pixels'."
            )
        if x.ndim == 4 and x.shape[1:] != like:
            x = interpolate(x, like[-2:], mode="area")
        rows |= zip(clean.indices, x, strict=True)
    return torch.stack([rows[n] for n in range(regression.num_data)])
