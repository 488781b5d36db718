"""Checks of scores without retraining: one number for each, and what it says.

Thresholds lie between what sound and unsound scores had in ``benchmarks/results/checks_cpu.json``,
of networks whose retraining is known: influence with linear data-modelling scores (LDS) of 0.30 to
0.55 on held-out pictures, and such with 0.23 or less (4 draws, a damping of 1e4, a network that was
not trained, images mixed up).

Legend: Q training images that are asked about, N training images, M = N - 1 of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan

import torch
from torch import Tensor

from curvlinops_diffusion.influence.agreement import TOP, SplitHalfScores, rank_correlations

#: The least mean reciprocal rank of images in their own scores, by what is asked about: sound ones
#: had 0.70 to 0.97 and 0.51 to 0.91, unsound ones at most 0.49 and 0.46.
FOUND = {"itself": 0.6, "recompressed": 0.5}
#: The least share of the first images that both halves of the draws have: of 16 draws or more of a
#: trained network 0.24 and more, whatever the damping, of 4 draws and without training 0.10.
SHARED = 0.2
#: The largest rank correlation with scores of a network whose weights were shuffled: of trained
#: networks at most 0.34, good or bad; of one that was not trained 0.69, of pixels alone 1.
UNLIKE = 0.5


@dataclass(frozen=True, eq=False)
class Probes:
    """Scores ``[Q, N]`` of the training images for some of them, of these numbers.

    ``scores`` are for these images, ``'itself'``, and for altered copies of them, by how they were
    altered; ``halves`` with either half of the draws, ``shuffled`` under a network whose weights
    were shuffled, ``features`` by methods that look at the images alone. ``groups`` has the group
    of each training image, by the kind of group. Positive is helpful.
    """

    numbers: Sequence[int]
    scores: Mapping[str, Tensor]
    halves: SplitHalfScores | None = None
    shuffled: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def own(self) -> Tensor:
        """Scores of the other training images for the images themselves, ``[Q, M]``."""
        return self.others(self.scores["itself"])

    def others(self, scores_QN: Tensor) -> Tensor:
        """Scores of all training images but the one that is asked about, ``[Q, M]``."""
        rest_QN = torch.ones(scores_QN.shape, dtype=torch.bool)
        rest_QN[range(len(self.numbers)), list(self.numbers)] = False
        return scores_QN[rest_QN].view(len(scores_QN), -1)

    def ranks(self, scores_QN: Tensor) -> Tensor:
        """Ranks of the images that are asked about, from 1, ``[Q]``; ties count against them."""
        own_Q1 = scores_QN[range(len(self.numbers)), list(self.numbers)].unsqueeze(1)
        return (scores_QN >= own_Q1).sum(1)

    @property
    def top(self) -> int:
        """The number of first images compared: ten, or a tenth of fewer than a hundred."""
        return max(1, min(TOP, len(next(iter(self.scores.values()))[0]) // 10))


@dataclass(frozen=True)
class Check:
    """A check, by one number.

    Attributes:
        name: What is checked.
        value: The number; NaN where it is undefined.
        chance: The number that scores at random would have.
        threshold: The bound between sound and unsound scores; ``None`` for a number that informs
            and tells neither.
        passed: Whether the number is on the right side of it; ``None`` without one.
        sentence: What was found, and what it says.
    """

    name: str
    value: float
    chance: float
    threshold: float | None
    passed: bool | None
    sentence: str

    @property
    def verdict(self) -> str:
        """``'passed'``, ``'failed'``, or ``'informs'`` where there is no threshold."""
        return {True: "passed", False: "failed", None: "informs"}[self.passed]


def checks_of(probes: Probes) -> list[Check]:
    """Make every check that the probes suffice for."""
    return [
        *(_copies(probes, kind) for kind in probes.scores),
        *([] if probes.halves is None else [_halves(probes, probes.halves)]),
        *([] if probes.shuffled is None else [_shuffled(probes, probes.shuffled)]),
        *(_groups(probes, kind) for kind in probes.groups),
        *(_features(probes, method) for method in probes.features),
    ]


def _copies(probes: Probes, kind: str) -> Check:
    """The mean reciprocal rank of an image in the scores for itself, or for a copy of it."""
    scores_QN = probes.scores[kind]
    ranks_Q, N = probes.ranks(scores_QN), scores_QN.shape[1]
    value = float((1 / ranks_Q.double()).mean())
    of = "itself" if kind == "itself" else f"a {kind} copy of it"
    said = (
        f"Asked about {of}, a training image comes first for {int((ranks_Q == 1).sum())} of "
        f"{len(ranks_Q)} images, and in the first tenth for "
        f"{int((ranks_Q <= max(1, N // 10)).sum())}; its median rank is "
        f"{float(ranks_Q.double().quantile(0.5)):g} of {N:,}."
    )
    chance = float((1 / torch.arange(1, N + 1, dtype=torch.float64)).sum() / N)
    if kind not in FOUND:  # a sound network of digits tells mirror images apart: 0.03
        said += (
            " Of a network that was trained on mirror images, too, it should be among the first."
        )
        return Check(kind, value, chance, None, None, said)
    passed = value >= FOUND[kind]
    if not passed:
        said += (
            " Too few: take more draws, less damping, and make sure that network, images and "
            "recipe are those of training."
        )
    return Check(kind, value, chance, FOUND[kind], passed, said)


def _halves(probes: Probes, halves: SplitHalfScores) -> Check:
    """The share of the first images that both halves of the draws have."""
    parts = map(probes.others, (halves.scores, halves.first, halves.second))
    value = _mean(SplitHalfScores(*parts).top_shared(probes.top))
    passed = value >= SHARED
    said = (
        f"Two halves of the draws share {value:.0%} of the first {probes.top}. That tells noise, "
        "and no error that both have: a damping that is too large makes them agree more."
    )
    if not passed:
        said += " Here the first images are noise: take more draws."
    return Check("halves", value, probes.top / probes.own.shape[1], SHARED, passed, said)


def _shuffled(probes: Probes, shuffled_QN: Tensor) -> Check:
    """The rank correlation with the scores of a network that has learned nothing."""
    value = _mean(rank_correlations(probes.own, probes.others(shuffled_QN)))
    passed = value <= UNLIKE  # not where it is undefined
    said = f"With the network's weights shuffled, the order of the images correlates by {value:.2f}"
    said += (
        ": the scores are of what this network has learned. How good they are this does not tell."
        if passed
        else ": the scores are hardly of what this network has learned, but of the images, or of "
        "any network of this form. Are its weights those that were trained?"
    )
    return Check("shuffled weights", value, 0.0, UNLIKE, passed, said)


def _groups(probes: Probes, kind: str) -> Check:
    """The mean precision among the first of images of the same group."""
    numbers = {name: number for number, name in enumerate(Counter(probes.groups[kind]))}
    groups_N = torch.tensor([numbers[name] for name in probes.groups[kind]])
    asked_Q1 = groups_N[list(probes.numbers)].unsqueeze(1)
    same_QM = probes.others(groups_N.expand(len(asked_Q1), -1)) == asked_Q1
    first_Qk = probes.own.topk(probes.top).indices
    known_Q = same_QM.any(1)  # of a group of its own nothing can be found
    value, chance = (
        _mean(z[known_Q].double().mean(1)) for z in (same_QM.gather(1, first_Qk), same_QM)
    )
    said = (
        f"Of the first {probes.top}, {value:.0%} are of the same {kind}, {chance:.0%} by chance. "
        "Images may help across groups, and pixels find groups, too."
    )
    return Check(f"same {kind}", value, chance, None, None, said)


def _features(probes: Probes, method: str) -> Check:
    """The rank correlation with a method that looks at the images alone."""
    pair = probes.own, probes.others(probes.features[method])
    value = _mean(rank_correlations(*pair))
    shared = _mean(SplitHalfScores(pair[0], *pair).top_shared(probes.top))
    said = (
        f"The order of the images correlates by {value:.2f} with that of {method} alone, and "
        f"{shared:.0%} of the first {probes.top} are the same: the rest is what the network adds. "
        "Whether it adds truth this does not tell."
    )
    return Check(f"{method} alone", value, 0.0, None, None, said)


def _mean(values: Tensor) -> float:
    """The mean of what is defined; NaN if nothing is."""
    known = values[values.isfinite()].double()
    return float(known.mean()) if len(known) else nan
