"""Methods of attribution by name, several of them out of one pass over the training gradients.

Legend: Q queries, N training examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal

from torch import Tensor

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import SplitHalfScores
from curvlinops_diffusion.influence.features import (
    Embedding,
    check_encodes,
    embeddings_of,
    feature_regression_scores,
    latents_of,
    pixels_of,
)
from curvlinops_diffusion.influence.gap import GeneralisationGap
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.kernels import SOLVED
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better
from curvlinops_diffusion.influence.regression import influence_and_regression_scores
from curvlinops_diffusion.influence.scores import (
    can_be_halved,
    influence_scores,
    split_half_scores,
)
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.checks import check_option
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions


class Method(str, Enum):
    """A method of attribution.

    Attributes:
        INFLUENCE: ``'influence'``, predicted changes of what is measured
            (:func:`~curvlinops_diffusion.influence_scores`).
        REGRESSION: ``'regression'``, predicted changes as training anew shows them
            (:func:`~curvlinops_diffusion.regression_scores`): with held-out images in the loss'
            unit, without them an order.
        PIXELS: ``'pixels'``, to compare with: a regression on the images alone
            (:func:`~curvlinops_diffusion.baselines.feature_regression_scores`).
        LATENTS: ``'latents'``, the same on the autoencoder's latents.
        EMBEDDING: ``'embedding'``, the same on what a function makes of the images.
    """

    INFLUENCE = "influence"
    REGRESSION = "regression"
    PIXELS = "pixels"
    LATENTS = "latents"
    EMBEDDING = "embedding"

    def has_unit(self, header: Mapping[str, Any]) -> bool:
        """Whether scores are predicted changes of what is measured, not an order alone.

        Args:
            header: The header of the scores.
        """
        gap = GeneralisationGap.of_header(header)
        of_gap = self is Method.REGRESSION and gap is not None and gap.is_told
        return of_gap or self is Method.INFLUENCE

    @property
    def takes_draws(self) -> bool:
        """Whether it looks at gradients, averaged over draws, and not at the images alone."""
        return self in (Method.INFLUENCE, Method.REGRESSION)

    def scores_of_images(
        self, query: NoisedRegression, train: NoisedRegression, embedding: Embedding | None
    ) -> Tensor:
        """Scores ``[Q, N]`` of a method that looks at the images alone."""
        if self is Method.EMBEDDING:
            assert embedding is not None
            features = [embeddings_of(images, embedding) for images in (query, train)]
        else:
            of = pixels_of if self is Method.PIXELS else latents_of
            train_features = of(train)
            features = [of(query, train_features.shape[1:]), train_features]
        return feature_regression_scores(*(z.flatten(1) for z in features))


# parts of the training gradients up to which the regression is the default
_PARTS = 4


def scores_of(
    methods: Sequence[Method],
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
    gap: float = 1.0,
    query_block: int,
    passes: PassOptions = PLAIN,
    embedding: Embedding | None = None,
) -> dict[Method, tuple[Tensor, SplitHalfScores | None]]:
    """Scores ``[Q, N]`` by method; with those of halves of the draws, where there are halves.

    Args:
        methods: The methods.
        J_query: Gradients of the measured values, ``[Q, P]``.
        G_inv: Inverse curvature, ``[P, P]``.
        J_train: Gradients of the training losses, ``[N, P]``.
        ridge: That of the regression.
        gap: The generalisation gap, by which its scores are multiplied.
        query_block: Queries whose gradients are held at once, for influence alone.
        passes: Checkpoints, processes and progress.
        embedding: The function of ``'embedding'``.
    """
    found: dict[Method, tuple[Tensor, SplitHalfScores | None]] = {}
    images = J_query.regression, J_train.regression
    for method in methods:
        if not method.takes_draws:
            found[method] = method.scores_of_images(*images, embedding), None
    if rest := [method for method in methods if method.takes_draws]:
        operators = rest, J_query, G_inv, J_train
        options: dict[str, Any] = {"ridge": ridge, "gap": gap, "query_block": query_block}
        found |= _of_gradients(*operators, **options, passes=passes)
    return {method: found[method] for method in methods}


def _of_gradients(
    methods: Sequence[Method],
    J_query: ExampleGradientLinearOperator,
    G_inv: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    *,
    ridge: float,
    gap: float,
    query_block: int,
    passes: PassOptions,
) -> dict[Method, tuple[Tensor, SplitHalfScores | None]]:
    """Scores of methods that compare gradients."""
    halved = can_be_halved(J_train.regression) and can_be_halved(J_query.regression)
    if Method.REGRESSION not in methods:
        if halved:
            halves = split_half_scores(
                J_query, G_inv, J_train, query_block=query_block, passes=passes
            )
            return {Method.INFLUENCE: (halves.scores, halves)}
        scores = influence_scores(J_query, G_inv, J_train, query_block=query_block, passes=passes)
        return {Method.INFLUENCE: (scores, None)}

    influence, regression = influence_and_regression_scores(
        J_query, G_inv, J_train, ridge=ridge, halved=halved, passes=passes
    )
    by_method = influence, [gap * z for z in regression]
    return {
        method: (own[0], SplitHalfScores(*own) if halved else None)
        for method, own in zip((Method.INFLUENCE, Method.REGRESSION), by_method, strict=True)
        if method in methods
    }


def default_method(measurement: str, J_train: ExampleGradientLinearOperator) -> Method:
    """The method where none is named: the regression, where it can be had at a small cost.

    It compares the training images' gradients with each other: where these do not fit into memory
    they are computed several times, for one part after the other. It is the default of up to 20,000
    training images whose gradients take 4 GiB at most: of each of two functions six passes then, of
    what fits into a quarter of that one.

    Args:
        measurement: What is measured, of which lower must be better.
        J_train: Gradients of the training losses.
    """
    N, P = J_train.shape
    entry = MEASUREMENTS.get(measurement)
    parts = 2 * N * P * J_train.dtype.itemsize / SOLVED.gradient_bytes
    is_loss = entry is not None and entry.better is Better.LOWER
    small = SOLVED.largest_gram >= N and parts <= _PARTS
    return Method.REGRESSION if is_loss and small else Method.INFLUENCE


def methods_named(
    method: str | Iterable[str] | None,
    measurement: str,
    num_draws: int | Literal["auto"],
    J_train: ExampleGradientLinearOperator | None = None,
) -> list[Method]:
    """The methods of some names, once each, checked before anything is computed.

    Args:
        method: One or more names, of which the first orders; ``None`` for the default.
        measurement: What is measured.
        num_draws: Draws of timestep and noise, ``"auto"`` to take them until the first images are
            told.
        J_train: Gradients of the training images, if they are open.

    Raises:
        ValueError: If there is no method of a name, or one is not for what is measured or drawn, or
            not for these images.
    """
    if method is None:
        return [] if J_train is None else [default_method(measurement, J_train)]
    names = [method] if isinstance(method, str) else list(method)
    methods = [check_option("method", name, Method) for name in dict.fromkeys(names)]
    entry = MEASUREMENTS.get(measurement) if isinstance(measurement, str) else None
    if Method.REGRESSION in methods and (entry is None or entry.better is not Better.LOWER):
        good = [name for name, one in MEASUREMENTS.items() if one.better is Better.LOWER]
        raise ValueError(
            f"`method` 'regression' adds the square of how the prediction would change, which no "
            f"loss gains by, got `measurement` {measurement!r}. Pass one of {', '.join(good)}, of "
            "which lower is better, or method='influence'."
        )
    alike = [each for each in methods if not each.takes_draws]
    if alike and entry is not None and entry.better is Better.HIGHER:
        raise ValueError(
            f"`method` '{alike[0].value}' has no negative scores, which all would be of images "
            f"that hinder, got `measurement` {measurement!r}, of which higher is better. Leave it "
            "out."
        )
    if num_draws == "auto" and not methods[0].takes_draws:
        raise ValueError(
            f"`num_draws='auto'` needs a first method whose order draws make surer, got "
            f"'{methods[0].value}', which looks at the images alone. Pass a number, or another "
            "method first."
        )
    if Method.LATENTS in methods and J_train is not None:
        check_encodes(J_train.regression)
    return methods
