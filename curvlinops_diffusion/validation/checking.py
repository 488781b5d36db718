"""Checks of an attributor without retraining: how far to trust it on one's own model.

Legend: Q training images that are asked about, N training images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvlinops_diffusion.attributor import Attributor
from curvlinops_diffusion.influence.agreement import SplitHalfScores
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.methods import Method, scores_of
from curvlinops_diffusion.influence.regression import RIDGE
from curvlinops_diffusion.influence.validation.checks import Check, Probes, checks_of
from curvlinops_diffusion.influence.validation.probes import chosen, copies_of, shuffled
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.page.gallery import Gallery, group_names
from curvlinops_diffusion.runtime.files import write_bytes

log = logging.getLogger(__name__)
#: Draws of each training image for the curvature of shuffled weights.
SHUFFLED_DRAWS = 2


@dataclass(frozen=True)
class CheckResult:
    """Results of the checks of an attributor.

    Attributes:
        checks: The checks, in order.
        settings: What was checked, as plain values.
    """

    checks: tuple[Check, ...]
    settings: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Tell if no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def summary(self) -> str:
        """Summarise all checks in a sentence."""
        judged = [check for check in self.checks if check.passed is not None]
        failed = [check.name for check in judged if not check.passed]
        if failed:
            return (
                f"{len(failed)} of {len(judged)} checks failed ({', '.join(failed)}): do not rely "
                "on these scores before that is cured."
            )
        return (
            f"All {len(judged)} checks passed. They find faults and prove nothing: whether scores "
            "predict what training without an image does, only training tells (validate plan)."
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ``None`` where a number is undefined."""
        rows = [
            {
                name: None if isinstance(z, float) and not isfinite(z) else z
                for name, z in (asdict(check) | {"verdict": check.verdict}).items()
            }
            for check in self.checks
        ]
        return {"summary": self.summary, **self.settings, "checks": rows}

    def save(self, path: str | PathLike[str]) -> None:
        """Write a page, or the numbers; never half-written.

        Args:
            path: Where to; ending in ``.html`` or ``.json``.

        Raises:
            ValueError: If the name ends in something else, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.as_dict(), indent=1)
        elif path.suffix == ".html":
            from curvlinops_diffusion.page.templates import rendered  # needs the extra cli

            text = rendered("checks", **self.as_dict())
        else:
            raise ValueError(f"`path` must end in .html or .json, got '{path}'.")
        write_bytes(path, text.encode())

    def __str__(self) -> str:
        """A line for each check, and the summary."""
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"{check.verdict:7} {check.name:{width}} {check.value:6.2f}  {check.sentence}"
            for check in self.checks
        ]
        return "\n".join([*lines, self.summary])


def check(
    attributor: Attributor,
    *,
    num_queries: int = 16,
    num_draws: int = 16,
    method: str = "influence",
    damping: float = 1e-8,
    relative: bool = False,
    rtol: float | None = None,
    ridge: float = RIDGE,
    group_by: str | Sequence[str] | None = None,
    shuffle_weights: bool = True,
    seed: int = 0,
) -> CheckResult:
    """Check how far to trust attribution, without retraining.

    Some training images are asked about themselves, as they are, mirrored and recompressed: each
    should find itself. Its scores should be those of the other half of the draws, and not those of
    a network whose weights were shuffled. How far the first of them share its class, folder or
    caption, and agree with methods that look at the images alone, informs. The thresholds lie
    between sound and unsound scores of networks that were retrained (*Evidence*); to pass is
    necessary, and not enough.

    Costs a pass over the training images at ``num_draws`` draws, as :meth:`Attributor.score`; with
    ``shuffle_weights`` another one, and three at two draws.

    Args:
        attributor: An attributor that was fitted or loaded.
        num_queries: Training images that are asked about.
        num_draws: Draws of timestep and noise for each image; multiples of 4 for the check of
            halves. Take as many as your scores have.
        method: As for :meth:`Attributor.score`, and so are the next four; by default influence,
            with which the thresholds were set.
        damping: Likewise.
        relative: Likewise.
        rtol: Likewise.
        ridge: Likewise.
        group_by: What groups of training images are: their ``'folder'`` or ``'class'``, a column of
            their metadata, or a name for each; ``None`` for class, folder and caption, of what
            there is.
        shuffle_weights: Whether to score with shuffled weights, too.
        seed: The seed of the choice of images, and of the order of weights.

    Raises:
        ValueError: If there is no curvature, or an option is of no accepted kind.

    Examples:
        >>> attributor = Attributor(objective, images).fit(num_draws=2)
        >>> found = validation.check(attributor, num_queries=4, num_draws=4, damping=1e-3)
        >>> [check.name for check in found.checks][:2]
        ['itself', 'mirrored']
    """
    if not isinstance(attributor, Attributor) or hasattr(attributor, "operators"):
        raise ValueError(
            "`attributor` must be the Attributor of one network, got "
            f"{type(attributor).__name__}. Check one of several checkpoints."
        )
    operator, train = attributor.operator, attributor.regression
    (own,) = attributor.methods(method, "loss", num_draws)
    of_fit = replace(attributor.passes, checkpoint=None)
    passes = replace(of_fit, sharded=False, max_memory=None)
    groups = _groups(attributor.images, group_by)
    numbers = chosen(train.num_data, num_queries, seed)
    kinds, queries = copies_of(train, numbers, num_draws)
    names = list(operator.param_names)
    J_train = attributor.gradients(num_draws=num_draws)
    J_query = ExampleGradientLinearOperator(queries, names)
    inversion: dict[str, Any] = {"damping": damping, "relative": relative}
    inversion |= {} if rtol is None else {"rtol": rtol}
    alone = [Method.PIXELS, *([Method.LATENTS] if train.encodes else [])]

    def scored(
        methods: list[Method], curvature: BlockDiagonalLinearOperator
    ) -> dict[Method, tuple[Tensor, SplitHalfScores | None]]:
        inverse = curvature.inverse(**inversion)
        ways: dict[str, Any] = {"ridge": ridge, "query_block": len(kinds) * num_queries}
        found = scores_of(methods, J_query, inverse, J_train, passes=passes, **ways)
        return {each: (scores.cpu(), halves) for each, (scores, halves) in found.items()}

    log.info("scores of %d images for %d", train.num_data, queries.num_data)
    found = scored(list(dict.fromkeys([own, *alone])), operator)
    scores, halves = found[own]
    Q = len(numbers)
    under_shuffled = None
    if shuffle_weights:
        log.info("the same with shuffled weights")
        other = copy(attributor)
        other.params, other.passes = names, of_fit
        with shuffled(attributor.objective.model, names, seed):
            other.fit("kfac", num_draws=SHUFFLED_DRAWS)
            under_shuffled = scored([own], other.operator)[own][0][:Q]
    if halves is not None:
        halves = SplitHalfScores(*(z[:Q].cpu() for z in vars(halves).values()))
    probes = Probes(
        numbers,
        dict(zip(kinds, scores.split(Q), strict=True)),
        halves,
        under_shuffled,
        {each.value: found[each][0][:Q] for each in alone},
        groups,
    )
    settings = {
        "training_images": train.num_data,
        "asked": [train.names[n] for n in numbers],
        "method": own.value,
        "num_draws": num_draws,
        **inversion,
    }
    return CheckResult(tuple(checks_of(probes)), settings)


def _groups(gallery: Gallery, by: str | Sequence[str] | None) -> dict[str, list[str]]:
    """Groups of training images by their kind, of kinds that differ for some images."""
    if by is not None:
        return {by if isinstance(by, str) else "group": group_names(gallery, by)}
    found: dict[str, list[str]] = {}
    for kind in ("class", "folder"):
        try:
            found[kind] = group_names(gallery, kind)
        except ValueError:  # there is nothing of that kind
            continue
    found["caption"] = [gallery.caption(n) for n in range(len(gallery.names))]
    kept: dict[tuple[int, ...], str] = {}
    for kind, names in found.items():
        order = list(dict.fromkeys(names))
        if 1 < len(order) < len(names):
            kept.setdefault(tuple(map(order.index, names)), kind)
    return {kind: found[kind] for kind in kept.values()}
