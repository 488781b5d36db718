"""Attribution averaged over several checkpoints of one training.

Legend: C checkpoints, Q queries, N training images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial, reduce
from os import PathLike
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from curvlinops_diffusion.attribution import Attribution
from curvlinops_diffusion.attributor import Attributor
from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from curvlinops_diffusion.influence.gap import GeneralisationGap
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.more_draws import Overwrite, is_same_run, score_until_told
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.runtime.files import check_file_name, make_folder
from curvlinops_diffusion.runtime.processes import Processes

log = logging.getLogger(__name__)


class CheckpointAttributor(Attributor):
    r"""Attribution averaged over ``C`` checkpoints of one training.

    .. math::

        \bar\tau(q, n) = \frac1C \sum_c \tau_c(q, n),

    each :math:`\tau_c` with the curvature and the gradients at its own weights. Every checkpoint is
    fitted and scored alone, one after the other: ``C`` times the time of one, and the memory of two
    if the pipelines are given as functions that load them, for the last is kept. Late checkpoints
    are meant, of a network that has learned most of what it will.

    Made by :meth:`Attributor.from_pipeline` of several pipelines. :attr:`operator`,
    :attr:`regression` and :meth:`gradients` are those of the last checkpoint.

    Source: the average over checkpoints is that of TracIn (Pruthi et al., 2020), of influence in
    place of inner products.

    Args:
        pipelines: The pipelines (or ``Network``), or functions of no arguments that return one, in
            the order of training.
        images: The training images.
        checkpoint: A folder from which long work goes on, checkpoint by checkpoint.
        options: As :meth:`Attributor.from_pipeline`.

    Attributes:
        operators: The curvature of each checkpoint.
        runs: What decided the run at each checkpoint, for the headers of its files.

    Raises:
        ValueError: If there are fewer than two, or one is not what
            :meth:`Attributor.from_pipeline` takes.
    """

    def __init__(
        self,
        pipelines: Sequence[Any],
        images: Any,
        *,
        checkpoint: str | PathLike[str] | None = None,
        **options: Any,
    ):
        if len(pipelines) < 2:
            raise ValueError(
                f"`pipeline` must be one pipeline or at least two checkpoints of one training, got "
                f"a list of {len(pipelines)}."
            )
        self._sources = list(pipelines)
        self._make: Callable[..., Attributor] = partial(
            Attributor.from_pipeline, images=images, **options
        )
        self._folder = None if checkpoint is None else Path(checkpoint)
        # those that are in memory anyway are read once
        self._kept: dict[int, Attributor] = {}
        last = len(self._sources) - 1
        self._kept[last] = self._member(last)
        # what is not of all checkpoints is that of the last
        vars(self).update(vars(self._kept[last]))
        self.operators: list[BlockDiagonalLinearOperator] = []
        self.runs: list[dict[str, Any]] = [{} for _ in self._sources]

    def _member(self, c: int) -> Attributor:
        """The attributor of one checkpoint."""
        if c in self._kept:
            return self._kept[c]
        source = self._sources[c]
        loads = isinstance(source, FunctionType | MethodType | partial)
        folder = None if self._folder is None else self._folder / str(c)
        member = self._make(source() if loads else source, checkpoint=folder)
        if not loads:
            self._kept[c] = member
        return member

    def _members(self) -> Iterator[tuple[int, Attributor]]:
        for c in range(len(self._sources)):
            log.info("checkpoint %d of %d", c + 1, len(self._sources))
            member = self._member(c)
            member.run = self.runs[c]
            yield c, member

    def _take(self, operators: list[BlockDiagonalLinearOperator]) -> Self:
        self.operators, self._operator = operators, operators[-1]
        return self

    @property
    def operator(self) -> BlockDiagonalLinearOperator:
        """The curvature at the last checkpoint.

        Raises:
            ValueError: If it was neither fitted nor loaded.
        """
        return super().operator

    @operator.setter
    def operator(self, operator: BlockDiagonalLinearOperator) -> None:
        raise AttributeError("Every checkpoint has an operator of its own, see `operators`.")

    def fit(
        self,
        curvature: Literal["ekfac", "kfac"] = "ekfac",
        *,
        num_draws: int = 8,
        output: str | PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Fit the curvature at each checkpoint, as :meth:`Attributor.fit`.

        Args:
            curvature: As for :meth:`Attributor.fit`, and so is ``num_draws``.
            num_draws: Likewise.
            output: A folder for the curvatures, as :meth:`save` writes it.
            options: As for :meth:`Attributor.fit`.

        Raises:
            ValueError: If two checkpoints have the same weights, or as :meth:`Attributor.fit`.
        """
        if output is not None:
            make_folder(Path(output))
        log.info("%d checkpoints: as many times the work of one", len(self._sources))
        operators: list[BlockDiagonalLinearOperator] = []
        seen: list[dict[str, Any]] = []
        for c, member in self._members():
            identity = member.regression.identity({})
            if identity in seen:
                raise ValueError(
                    f"Checkpoints {seen.index(identity) + 1} and {c + 1} have the same weights. "
                    "Pass different checkpoints of one training."
                )
            seen.append(identity)
            file = None if output is None else Path(output) / _file(c)
            told = {**options, "num_draws": num_draws, "output": file}
            operators.append(member.fit(curvature, **told).operator)
        if output is not None:
            self._forget_more(Path(output))
        return self._take(operators)

    def save(self, path: str | PathLike[str]) -> None:
        """Save the curvature of each checkpoint to a folder, see :meth:`load`.

        Raises:
            ValueError: If there is none, or a file cannot be written.
        """
        folder, operators = Path(path), [*self.operators[:-1], self.operator]
        make_folder(folder)
        for c, operator in enumerate(operators):
            operator.save(folder / _file(c))
        self._forget_more(folder)

    def _forget_more(self, folder: Path) -> None:
        """Delete what a training of more checkpoints has left in a folder that is written anew."""
        if Processes.of_all().rank == 0:
            own = {_file(c) for c in range(len(self._sources))}
            for file in folder.glob(_file("*")):
                if file.name not in own:
                    file.unlink()

    def with_saved(self, path: str | PathLike[str], *, other_data: bool = False) -> Self:
        """Take the curvatures of a folder that :meth:`save` wrote.

        Args:
            path: The folder.
            other_data: Whether they may have been fitted to other images.

        Raises:
            ValueError: As :meth:`Attributor.load`, or if the folder is of another number of
                checkpoints.
        """
        folder = Path(path)
        saved = len(list(folder.glob(_file("*"))))
        if saved != len(self._sources):
            raise ValueError(
                f"'{path}' has the curvature of {saved} checkpoints, got {len(self._sources)} "
                "pipelines. Pass those that it was fitted to, in the same order."
            )
        return self._take(
            [
                member.with_saved(folder / _file(c), other_data=other_data).operator
                for c, member in self._members()
            ]
        )

    def score(
        self,
        queries: Any,
        *,
        output: str | PathLike[str] | None = None,
        overwrite: Overwrite = False,
        **options: Any,
    ) -> Attribution:
        """Score at each checkpoint, and average, as :meth:`Attributor.score`.

        Args:
            queries: As for :meth:`Attributor.score`.
            output: A file for the averages; those of each checkpoint are written beside it, and
                read if they are there already.
            overwrite: As for :meth:`Attributor.score`.
            options: As for :meth:`Attributor.score`.

        Raises:
            ValueError: If the output is of other scores, or as :meth:`Attributor.score`.
        """
        if options.get("num_draws") == "auto":
            own = {k: v for k, v in options.items() if k != "num_draws"}
            return score_until_told(
                self, queries=queries, output=output, overwrite=overwrite, **own
            )
        path = None if output is None else Path(output)
        if path is not None:
            check_file_name(path, ".safetensors")
            if path.exists() and overwrite is not True:
                check_num_checkpoints(path, len(self._sources))
        results = []
        for c, member in self._members():
            if self.operators:  # else a member says that it has none, if it needs one
                member.operator = self.operators[c]
            file = None if path is None else path.with_name(f"{path.stem}.{_file(c)}")
            results.append(member.score(queries, output=file, overwrite=overwrite, **options))
        found, processes = averaged(results), Processes.of_all()
        if path is not None and not is_same_run(path, found.header["identity"], overwrite):
            processes.all_or_none(lambda: found.save(path) if processes.rank == 0 else None)
        return found


def check_num_checkpoints(scores: Path, count: int) -> None:
    """Check, before anything is computed, that scores are averages over as many checkpoints.

    Raises:
        ValueError: If they are not.
    """
    there = len(SCORES.read_header(scores).get("checkpoints", [None]))
    if there != count:
        of = "1 checkpoint" if there == 1 else f"{there} checkpoints"
        raise ValueError(
            f"'{scores}' is of another run, of {of} of the network, got {count}. Pass "
            "--overwrite (overwrite=True), or another output."
        )


def _file(c: int | str) -> str:
    return f"checkpoint{c}.safetensors"


def averaged(results: Sequence[Attribution]) -> Attribution:
    """The mean of several results of the same queries and training images.

    Its header is that of the last; it lists the identities of all as ``"checkpoints"``, and their
    weights in its identity, so that it is not taken for that of the last alone. Scores of the
    regression keep the unit of the generalisation gap only if all checkpoints have one.
    """
    last = results[-1]
    gaps = [GeneralisationGap.of_header(result.header) for result in results]
    units = [gap.value if gap is not None and gap.is_told else None for gap in gaps]

    def mean(method: str, found: Sequence[Tensor | StoredScores]) -> Tensor:
        whole = [z.whole() if isinstance(z, StoredScores) else z for z in found]
        if method == Method.REGRESSION and None in units:  # of none
            whole = [z / (unit or 1.0) for z, unit in zip(whole, units, strict=True)]
        return reduce(torch.add, whole) / len(found)

    def halves_of(method: str) -> SplitHalfScores | None:
        pairs = [pair for result in results if (pair := result.pair_of(method)) is not None]
        if len(pairs) < len(results):
            return None
        first, second = zip(*pairs, strict=True)
        return SplitHalfScores(scores[method], mean(method, first), mean(method, second))

    scores = {m: mean(m, [result.by_method[m] for result in results]) for m in last.by_method}
    halves: Mapping[str, SplitHalfScores | None] = {m: halves_of(m) for m in scores}
    values = [result.header["values"] for result in results]
    identities = [result.header["identity"] for result in results]
    agreement = {"rank_correlation", "top", "top_shared", "standard_error", "same_first"}
    header = {
        **{key: value for key, value in last.header.items() if key not in agreement},
        "checkpoints": identities,
        "identity": {
            **last.header["identity"],
            "checkpoints": [each["train"]["model"]["weights"] for each in identities],
        },
        "values": [
            None if None in each else sum(each) / len(each) for each in zip(*values, strict=True)
        ],
    }
    found = [asdict(gap) for gap in gaps if gap is not None]
    if found:  # of the same images: errors do not average out
        least = min(found, key=lambda gap: gap["value"] - 2 * gap["error"])
        whole = {key: sum(gap[key] for gap in found) / len(found) for key in ("value", "error")}
        header["gap"] = {**least, **(whole if None not in units else {})}
    of_first = halves[next(iter(scores))]
    if of_first is not None:
        header |= Agreement.of_halves(of_first.first, of_first.second).as_header()
    return replace(last, by_method=scores, halves=halves, header=header)
