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
from curvlinops_diffusion.influence.split_half import SplitHalfScores, can_be_halved
from curvlinops_diffusion.influence.stored_scores import StoredScores, write_index, write_shards
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
            How sure they are.
        """
        return self._in_shards() if in_shards(self.options, self.several) else self._whole()

    def _whole(self) -> dict[str, Any]:
        """Every process has all scores, and the first one writes them."""
        options, block = self.options, self.options.query_block
        method = Method(options.method)

        def run(passes: PassOptions) -> tuple[Tensor, SplitHalfScores | None, Tensor]:
            operators = self._operators()
            values_Q = self._values(operators[0], passes)
            found = scores_of(
                [method], *operators, ridge=options.ridge, query_block=block, passes=passes
            )
            return (*found[method], values_Q)

        scores_QN, halves, values_Q = self._from_checkpoint(run)
        sure = {"values": plain_numbers(values_Q)}
        both = None
        if halves is not None:
            both = (halves.first, halves.second)
            sure |= Agreement.of_halves(*both).as_header()
        if is_first():
            told = {**sure, **self.told}
            write_scores(self.options.output, scores_QN, self.names, self.identity, both, **told)
        return sure

    def _in_shards(self) -> dict[str, Any]:
        """Each process writes what it has seen, and the first one a file that names them all."""
        halves = can_be_halved(self.train) and can_be_halved(self.query)
        output, block = self.options.output, self.options.query_block

        def run(passes: PassOptions) -> tuple[list[dict[str, Any]], Tensor]:
            operators = self._operators()
            values_Q = self._values(operators[0], passes)
            options: dict[str, Any] = {"query_block": block, "halves": halves, "passes": passes}
            return write_shards(output, *operators, self.identity, **options), values_Q

        shards, values_Q = self._from_checkpoint(run)
        sure = {"values": plain_numbers(values_Q)}
        if not is_first():
            return sure
        shape = [self.query.num_data, self.train.num_data]
        header = {**self.names, "identity": self.identity, "shape": shape, **self.told}
        stored = StoredScores(output, {**header, "shards": shards})
        if halves:
            own = Agreement.of_halves(stored.named("first"), stored.named("second"))
            sure |= own.as_header()
        write_index(output, {**header, **sure}, shards)
        return sure

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
