"""Which training images a page shows for a query, and what it says of them.

Legend: Q queries, N training images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        kind: ``'helps'``, ``'hinders'``, or ``'plain'`` where no sign is good.
        indices: The images, the strongest first.
    """

    title: str
    kind: str
    indices: list[int]


def rows_of(scores_N: Tensor, top: int, better: Better) -> list[Row]:
    """The images with the strongest scores of either sign; each row has only its own."""

    def strongest(sign: int) -> list[int]:
        found = (sign * scores_N).topk(min(top, len(scores_N)))
        return [int(n) for n, value in zip(found.indices, found.values, strict=True) if value > 0]

    sign = better.helpful_sign
    if sign == 0:
        rows = ("lowers it", "plain", 1), ("raises it", "plain", -1)
    else:
        rows = ("helps", "helps", sign), ("hinders", "hinders", -sign)
    return [Row(title, kind, strongest(own)) for title, kind, own in rows]


def common_images(rows: list[list[Row]]) -> list[tuple[int, int]]:
    """Training images in the first row of many queries, each with the number of queries."""
    counts = Counter(n for of_query in rows for n in of_query[0].indices)
    least = max(_COMMON_QUERIES, _COMMON_SHARE * len(rows))
    return [(n, count) for n, count in counts.most_common() if count >= least]


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
        values = None if method == Method.REGRESSION else header.get("values")
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

    def error_text(self, q: int) -> str:
        """The uncertainty of a query's scores; nothing where it is not known."""
        if self.errors_Q is None:
            return ""
        return f"± {_rounded(float(self.errors_Q[q])).lstrip('+')}{self.unit}"


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
        which = f"The {('first', 'second', 'third')[place]} number"
        order = f" ({method}), by which they are ordered," if place == 0 else f" ({method})"
    start = f"{which} under a training image{order} is"
    if method == Method.REGRESSION:
        return (
            f"{start} the mean of its weight, of {num_train:,} images', in a kernel regression of "
            f"the query's {what}, and of the square of that in one of the prediction, in units of "
            "their spread. Larger ones predict a larger effect of training without the image; how "
            f"much the {what} would change they do not say."
        )
    share = f", as a share of that {what}" if sizes.unit else ""
    ppm = " (ppm: millionths)" if "ppm" in sizes.unit else ""
    return (
        f"{start} the predicted change of the query's {what}{share}{ppm}, had the model been "
        f"trained without that image, one of {num_train:,}."
    )
