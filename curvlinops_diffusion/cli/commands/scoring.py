"""Scores computed and written: in one file by the first process, or by each in one of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from curvlinops_diffusion.cli.checkpoints import checkpoint_of, going_on
from curvlinops_diffusion.cli.options import ScoreOptions
from curvlinops_diffusion.cli.processes import is_first
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import Agreement, plain_numbers
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.methods import Method, scores_of
from curvlinops_diffusion.influence.score_files import write_scores
from curvlinops_diffusion.influence.scores import can_be_halved
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once

T = TypeVar("T")


def in_shards(options: ScoreOptions, several: bool) -> bool:
    """Whether each process writes the scores of the training images that it has seen.

    Kernel regression solves a system of all of them.
    """
    return several and options.sharded and options.method == "influence"


@dataclass(frozen=True)
class Scoring:
    """What ``score`` computes, and what is written beside it.

    Attributes:
        options: Those of the command.
        train: The training images.
        query: The queries.
        operator: The curvature.
        several: Whether there are several processes.
        names: Names of the ``train`` images and the ``queries``.
        identity: What the scores are made from.
        told: What else is told of them, as plain values.
    """

    options: ScoreOptions
    train: NoisedRegression
    query: NoisedRegression
    operator: BlockDiagonalLinearOperator
    several: bool
    names: dict[str, list[str]]
    identity: dict[str, Any]
    told: dict[str, Any]

    def write(self) -> dict[str, Any]:
        """Compute the scores, from the checkpoint on if there is one, and write them.

        Returns:
            The header.
        """
        options = self.options
        halves = can_be_halved(self.train) and can_be_halved(self.query)
        method = Method(options.method)

        def run(passes: PassOptions) -> dict[str, Any]:
            operators, block = self._operators(), options.query_block
            header = {
                **self.names,
                "identity": self.identity,
                "methods": [method.value],
                "values": plain_numbers(self._values(operators[0], passes)),
                **self.told,
            }
            if in_shards(options, self.several):
                return StoredScores.create(
                    options.output,
                    *operators,
                    query_block=block,
                    halves=halves,
                    header=header,
                    passes=passes,
                ).header
            found = scores_of(
                [method], *operators, ridge=options.ridge, query_block=block, passes=passes
            )
            scores_QN, of_halves = found[method]
            tensors = {"scores": scores_QN}
            if of_halves is not None:
                tensors = vars(of_halves)
                header |= Agreement.of_halves(of_halves.first, of_halves.second).as_header()
            if is_first():
                write_scores(options.output, tensors, header)
            return header

        return self._from_checkpoint(run)

    def _operators(
        self,
    ) -> tuple[
        ExampleGradientLinearOperator, BlockDiagonalLinearOperator, ExampleGradientLinearOperator
    ]:
        """The queries' gradients, the inverse, and the training images' gradients."""
        names, measured = self.operator.param_names, self.options.measurement
        return (
            ExampleGradientLinearOperator(self.query, names, measurement=measured),
            self.operator.inverse(**inversion_of(self.options)),
            ExampleGradientLinearOperator(self.train, names),
        )

    def _values(self, J_query: ExampleGradientLinearOperator, passes: PassOptions) -> Tensor:
        """The queries' values ``[Q]``."""
        measured = {"measurement": self.options.measurement}
        return computed_once(
            "Values", self.query, lambda: {"values": J_query.values()}, passes, measured
        )["values"]

    def _from_checkpoint(self, run: Callable[[PassOptions], T]) -> T:
        """Run what goes on from a checkpoint, if there is one."""
        options = self.options
        checkpoint = checkpoint_of(options.output)
        passes = PassOptions(
            checkpoint,
            options.checkpoint_every,
            distributed=self.several,
            progressbar=not options.quiet,
        )
        return going_on(lambda: run(passes), checkpoint, options.overwrite)


def inversion_of(options: ScoreOptions) -> dict[str, Any]:
    """How the curvature is inverted."""
    more: dict[str, Any] = {"relative": True} if options.relative else {}
    more |= {} if options.rtol is None else {"rtol": options.rtol}
    return {"damping": options.damping, **more}
