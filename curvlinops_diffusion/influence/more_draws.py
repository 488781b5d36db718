"""Existing scores, kept or replaced, and draws doubled until their halves agree."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import MAX_DRAWS, Agreement
from curvlinops_diffusion.influence.methods import methods_named
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.runtime.checks import check_count
from curvlinops_diffusion.runtime.files import check_same
from curvlinops_diffusion.runtime.processes import Processes

# the number of draws that "auto" begins with
_FIRST_DRAWS = 16
#: Whether scores that are there are replaced.
Overwrite = bool | Literal["fewer draws"]
log = logging.getLogger(__name__)


def score_until_told(
    attributor: Any,
    output: str | PathLike[str] | None,
    overwrite: Overwrite,
    max_draws: int = MAX_DRAWS,
    query_draws: int | None = None,
    **told: Any,
) -> Any:
    """Double the draws until their halves agree on the most helpful images.

    ``attributor`` is an ``Attributor``, and the others are arguments of its ``score``. An output
    always holds the last scores that are whole, from which a run that was stopped goes on.
    """
    asked = {"method": None, "measurement": "loss", **told}
    methods_named(asked["method"], asked["measurement"], "auto")
    numbers = numbers_of_draws(attributor.regression, max_draws)
    unit = 4 * attributor.regression.draws.rounded_up(1)
    if query_draws is not None and query_draws % unit:
        raise ValueError(
            f"`query_draws` must be a multiple of {unit} to be halved, for "
            f"`num_draws='auto'`, got {query_draws}."
        )
    path = None if output is None else Path(output)
    start = 0
    if path is not None and path.exists() and overwrite is not True:
        header = SCORES.read_header(path)
        there = draws_of(header["identity"], "train")
        if there in numbers:  # of another number it is refused
            start, agreement = numbers.index(there), Agreement.of_header(header)
            if agreement and not agreement.is_settled and there < numbers[-1]:
                # what was begun with more draws is gone on from
                start, overwrite = start + 1, "fewer draws"
    for number in numbers[start:]:
        told |= {"num_draws": number, "query_draws": query_draws}
        found = attributor.score(output=path, overwrite=overwrite, **told)
        agreement, overwrite = found.agreement, "fewer draws"
        assert agreement is not None
        if Processes.of_all().rank == 0:
            log.info("%d draws: %s", number, agreement.summary())
            if attributor.passes.progressbar:
                tqdm.write(f"{number} draws: {agreement.summary()}", file=sys.stderr)
        if agreement.is_settled:
            break
    return found


def numbers_of_draws(regression: NoisedRegression, max_draws: int) -> list[int]:
    """The numbers of draws that ``num_draws="auto"`` tries, one after the other."""
    unit = 4 * regression.draws.rounded_up(1)
    found = [-(-_FIRST_DRAWS // unit) * unit]
    if check_count("max_draws", max_draws) < found[0]:
        raise ValueError(
            f"`max_draws` must be at least {found[0]}, the number of draws to begin with, got "
            f"{max_draws}."
        )
    while 2 * found[-1] <= max_draws:
        found.append(2 * found[-1])
    return found


def check_same_run(path: Path, there: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that an output that is there is what would be made."""
    check_same(
        there.get("identity", {}),
        identity,
        f"'{path}' exists, and was made with others",
        "Pass `overwrite=True`, or another `output`.",
    )


def is_same_run(path: Path, identity: Mapping[str, Any], overwrite: Overwrite) -> bool:
    """Tell whether a file holds the scores that would be made; ``False`` if it is to be replaced.

    Raises:
        ValueError: If it holds others, which are not to be replaced.
    """
    if not path.exists() or overwrite is True:
        return False
    there = SCORES.read_header(path).get("identity", {})
    fewer = bool(overwrite) and draws_of(there, "train") < draws_of(identity, "train")
    if fewer:
        there = json.loads(json.dumps(there))
        for side in ("train", "query"):
            there[side]["regression"]["num_draws"] = draws_of(identity, side)
    check_same_run(path, {"identity": there}, identity)
    return not fewer


def draws_of(identity: Mapping[str, Any], side: str) -> int:
    """The number of draws that scores were made of, of either side."""
    found: int = identity[side]["regression"]["num_draws"]
    return found
