"""Which training images a page shows for a query, and what it says of them.

Legend: Q queries, N training images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.influence.agreement import NOT_TOLD
from curvlinops_diffusion.influence.measurements.registry import Better, NamedMeasurement
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.stored_scores import StoredScores

# a training image is common if it is among the first of so many queries, and of so large a share
_COMMON_QUERIES = 3
_COMMON_SHARE = 0.5
# shares of a query's value are in per cent from here on, else in millionths
_PER_CENT = 5e-4


@dataclass(frozen=True)
class Row:
    """Training images that do the same to a query.

    Attributes:
        title: What they do.
        kind: ``'helps'``, ``'hinders'``, ``'plain'`` where no sign is good, or ``'untold'`` of
            those that are not told from zero.
        indices: The images, the strongest first.
    """

    title: str
    kind: str
    indices: list[int]


def titles_of(better: Better, method: str) -> tuple[str, str]:
    """Titles of the first and of the second row of a query."""
    if not Method(method).takes_draws:
        return "alike", "unlike"
    return ("helps", "hinders") if better.helpful_sign else ("lowers it", "raises it")


def rows_of(
    scores_N: Tensor,
    top: int,
    better: Better,
    error: float | None = None,
    method: str = Method.INFLUENCE,
) -> list[Row]:
    """The images with the strongest scores of either sign; each row has only its own.

    Args:
        scores_N: The scores.
        top: The images of a row at most.
        better: Which values of what was measured are good.
        error: The scores' standard error, if it is known. Those within twice of it are in a row of
            their own, the last, if there are any among the strongest.
        method: The method; of those that look at the images alone there is one row.
    """
    least = NOT_TOLD * (error or 0.0)
    untold: list[int] = []

    def strongest(sign: int) -> list[int]:
        found = (sign * scores_N).topk(min(top, len(scores_N)))
        own = [int(n) for n, z in zip(found.indices, found.values, strict=True) if z > 0]
        untold.extend(n for n in own if abs(float(scores_N[n])) <= least)
        return [n for n in own if abs(float(scores_N[n])) > least]

    titles, takes_draws = titles_of(better, method), Method(method).takes_draws
    sign = better.helpful_sign if takes_draws else 0
    kinds = titles if sign else ("plain", "plain")
    found = [
        Row(title, kind, strongest(own))
        for title, kind, own in zip(titles, kinds, (sign or 1, -sign or -1), strict=True)
    ]
    if not takes_draws:
        del found[1]  # never negative
    if untold:
        untold.sort(key=lambda n: -abs(float(scores_N[n])))
        found.append(Row("not told from zero", "untold", untold[:top]))
    return found


def common_images(rows: list[list[Row]]) -> tuple[list[tuple[int, int]], int]:
    """Training images in the first row of many queries, each with the number of queries.

    Returns:
        The images, the most common first, and the least number of queries that is many.
    """
    counts = Counter(n for of_query in rows for n in (of_query[0].indices if of_query else ()))
    least = max(_COMMON_QUERIES, ceil(_COMMON_SHARE * len(rows)))
    return [(n, count) for n, count in counts.most_common() if count >= least], least


@dataclass(frozen=True)
class Sizes:
    """Scores as people read them: as shares of the queries' values, where these are known.

    Attributes:
        scale_Q: What a score is divided by.
        unit: What follows the number.
        errors_Q: Standard errors in the same unit; ``None`` where they are not known.
    """

    scale_Q: Tensor
    unit: str
    errors_Q: Tensor | None

    @classmethod
    def of(
        cls,
        scores_QN: Tensor | StoredScores,
        header: Mapping[str, Any],
        method: str = Method.INFLUENCE,
        is_first: bool = True,
    ) -> Sizes:
        """Choose the unit of a method's scores; errors are known of the first method's alone."""
        errors = header.get("standard_error") if is_first else None
        errors_Q = None if errors is None else torch.tensor(errors, dtype=torch.float64)
        values = header.get("values") if Method(method).has_unit(header) else None
        if values is None or not all(values):  # nothing to be a share of
            return cls(torch.ones(len(scores_QN), dtype=torch.float64), "", errors_Q)
        values_Q = torch.tensor(values, dtype=torch.float64).abs()
        largest_Q = torch.stack([scores_N.abs().max() for scores_N in scores_QN])
        largest = (largest_Q / values_Q).median()
        factor, unit = (100, " %") if largest >= _PER_CENT else (1e6, " ppm")
        scale_Q = values_Q / factor
        return cls(scale_Q, unit, None if errors_Q is None else errors_Q / scale_Q)

    def text(self, q: int, score: Tensor | float) -> str:
        """A score as text."""
        return f"{_rounded(float(score) / float(self.scale_Q[q]))}{self.unit}"

    def error(self, q: int) -> float | None:
        """The uncertainty of a query's scores; ``None`` where it is not known."""
        return None if self.errors_Q is None else float(self.errors_Q[q])

    def error_text(self, q: int) -> str:
        """The uncertainty of a query's scores; nothing where it is not known."""
        error = self.error(q)
        return "" if error is None else f"± {_rounded(error).lstrip('+')}{self.unit}"


def _rounded(value: float) -> str:
    """Write two significant digits, signed, without an exponent where that is readable."""
    text = f"{value:+.2g}"
    if "e" in text and 1e-4 <= abs(value) < 1e6:
        text = f"{float(text):+.0f}" if abs(value) >= 1 else f"{float(text):+.6f}".rstrip("0")
    return text.replace("-", "−")


def meaning(
    measurement: NamedMeasurement | None,
    sizes: Sizes,
    num_train: int,
    method: str,
    place: int = 0,
    count: int = 1,
) -> str:
    """Say what a method's score means, in a sentence; and which of several it is."""
    what = "measured value" if measurement is None else measurement.quantity
    which, order = "The number", ""
    if count > 1:
        which = f"The {('first', 'second', 'third', 'fourth', 'fifth')[place]} number"
        order = f" ({method}), by which they are ordered," if place == 0 else f" ({method})"
    start = f"{which} under a training image{order} is"
    share = f", as a share of that {what}" if sizes.unit else ""
    ppm = " (ppm: millionths)" if "ppm" in sizes.unit else ""
    if method == Method.REGRESSION and sizes.unit:
        return (
            f"{start} the change of the query's {what}{share}{ppm}, that a kernel regression "
            f"predicts for a training without that image, one of {num_train:,}; its size is that "
            "of the held-out images' loss above the training images'."
        )
    if method == Method.REGRESSION:
        return (
            f"{start} its part in a kernel regression of the query's {what}, and of the variance "
            f"of the prediction, on {num_train:,} images: only the order of these numbers means "
            "something, not their size, which takes held-out images (a hundred or more) to tell."
        )
    if not Method(method).takes_draws:
        return (
            f"{start} the square of its weight in a kernel regression on the {method} of the "
            f"{num_train:,} images alone, to compare with: it does not know the network, and only "
            "the order of these numbers means something, not their size."
        )
    return (
        f"{start} the predicted change of the query's {what}{share}{ppm}, had the model been "
        f"trained without that image, one of {num_train:,}. Networks that were trained anew "
        "changed 5 to 60 times less: compare these sizes, do not read them."
    )
