"""The methods of ``score``: influence and kernel regression."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from curvlinops_diffusion.cli.options import ScoreOptions
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.regression import regression_scores
from curvlinops_diffusion.influence.scores import influence_scores
from curvlinops_diffusion.influence.split_half import (
    SplitHalfScores,
    can_be_halved,
    split_half_scores,
)
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.passes import PassOptions


def scores_of(
    options: ScoreOptions,
    J_query: ExampleGradientLinearOperator,
    inverse: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    passes: PassOptions,
) -> tuple[Tensor, SplitHalfScores | None]:
    """The scores ``[Q, N]``, and with them those of halves of the draws, where there are halves."""
    block = options.query_block
    halved = can_be_halved(J_train.regression) and can_be_halved(J_query.regression)
    if options.method == "regression":
        return _regression(options.ridge, J_query, inverse, J_train, passes, halved)
    if halved:
        halves = split_half_scores(J_query, inverse, J_train, query_block=block, passes=passes)
        return halves.scores, halves
    scores = influence_scores(J_query, inverse, J_train, query_block=block, passes=passes)
    return scores, None


def in_shards(options: ScoreOptions, several: bool) -> bool:
    """Whether each process writes the scores of the training images that it has seen.

    Kernel regression solves a system of all of them.
    """
    return several and options.sharded and options.method == "influence"


def _regression(
    ridge: float,
    J_query: ExampleGradientLinearOperator,
    inverse: PyTorchLinearOperator,
    J_train: ExampleGradientLinearOperator,
    passes: PassOptions,
    halved: bool,
) -> tuple[Tensor, SplitHalfScores | None]:
    def of(half: int | None) -> Tensor:
        own, operators = passes, [J_query, J_train]
        if half is not None:
            operators = [J.on(J.regression.divided(half, 2)) for J in operators]
            if passes.checkpoint is not None:  # whose passes have the same names
                own = replace(passes, checkpoint=Path(passes.checkpoint) / f"half{half}")
        query, train = operators
        return regression_scores(query, inverse, train, ridge=ridge, passes=own)

    scores = of(None)
    return scores, SplitHalfScores(scores, of(0), of(1)) if halved else None
