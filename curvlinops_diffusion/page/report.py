"""Scores as a self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.measurements.registry import (
    MEASUREMENTS,
    Better,
    sentence_of,
)
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.page.figures import histogram, operator_summary
from curvlinops_diffusion.page.gallery import Gallery
from curvlinops_diffusion.page.rankings import (
    Row,
    Sizes,
    common_images,
    meaning,
    rows_of,
)
from curvlinops_diffusion.page.thumbnails import QUERY_SIZE, TRAINING_SIZE, Thumbnails
from curvlinops_diffusion.runtime.files import write_bytes

TEMPLATE = Path(__file__).parent / "page.html.j2"


def write_report(
    path: str | PathLike[str],
    by_method: Mapping[str, Tensor | StoredScores],
    header: Mapping[str, Any],
    train: Gallery,
    queries: Gallery,
    *,
    top: int = 8,
    operator: str | PathLike[str] | None = None,
) -> int:
    """Write the page with the training images that helped and hindered each query most.

    Args:
        path: Where to.
        by_method: The scores of each method; the first orders, and each has its number.
        header: Their header, as a file of scores holds it.
        train: The training images.
        queries: The queries.
        top: Training images in each row of a query.
        operator: An operator's file, whose spectrum and blocks are shown.

    Returns:
        The size of the page in bytes.

    Raises:
        ValueError: If an image is not the one that was scored, or the page cannot be written.
    """
    identity = header["identity"]
    measured = identity.get("query", {}).get("measurement", "")
    measurement = MEASUREMENTS.get(measured)
    better = Better.LOWER if measurement is None else measurement.better
    first, *_ = by_method.values()
    rows = [rows_of(scores_N, top, better) for scores_N in first]
    shown = _Shown(train, queries, header, by_method)
    shown.load(rows)
    agreement = Agreement.of_header(header)
    text = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE.read_text())
        .render(
            meanings=[
                meaning(measurement, sizes, len(train.names), method, place, len(by_method))
                for place, (method, sizes) in enumerate(shown.sizes.items())
            ],
            measured=sentence_of(measured),
            reliability="" if agreement is None else agreement.summary(),
            common=[shown.training(n) | {"count": count} for n, count in common_images(rows)],
            queries=[shown.query(q, rows[q]) for q in range(len(rows))],
            thumbnails=shown.thumbnails.rules(),
            quantity="value" if measurement is None else measurement.quantity,
            histogram=histogram(first),
            operator=None if operator is None else operator_summary(Path(operator)),
            settings=json.dumps(identity, indent=2),
            scores=Path(path).stem,
        )
    ).encode()
    write_bytes(Path(path), text)
    return len(text)


class _Shown:
    """The images of a page, checked as they are shown to be those that were scored."""

    def __init__(
        self,
        train: Gallery,
        queries: Gallery,
        header: Mapping[str, Any],
        by_method: Mapping[str, Tensor | StoredScores],
    ):
        self._galleries = {"train": train, "queries": queries}
        self._header = header
        self._agreement = Agreement.of_header(header)
        self._scores = by_method
        self.sizes = {
            method: Sizes.of(scores_QN, header, method, place == 0)
            for place, (method, scores_QN) in enumerate(by_method.items())
        }
        self.thumbnails = Thumbnails()

    def load(self, rows: list[list[Row]]) -> None:
        """Load every image that is shown, each once."""
        shown = {n for of_query in rows for row in of_query for n in row.indices}
        wanted = {"train": (shown, TRAINING_SIZE), "queries": (set(range(len(rows))), QUERY_SIZE)}
        for kind, (numbers, size) in wanted.items():
            gallery, digests = self._galleries[kind], self._header.get("digests", {}).get(kind)
            for n, x in gallery.images(numbers):
                if digests is not None and digests[n] != gallery.digest(n):
                    option = "data" if kind == "train" else "queries"
                    raise ValueError(
                        f"The image '{gallery.names[n]}' of the {option} (or its label or prompt) "
                        "is not the one that was scored. Pass the images that were."
                    )
                self.thumbnails.add(f"{kind}{n}", x, size)

    def _image(self, kind: str, n: int) -> dict[str, Any]:
        gallery = self._galleries[kind]
        return {"class": f"{kind}{n}", "name": gallery.names[n], "caption": gallery.caption(n)}

    def training(self, n: int) -> dict[str, Any]:
        """A training image."""
        return self._image("train", n)

    def query(self, q: int, rows: list[Row]) -> dict[str, Any]:
        """A query with its training images."""
        first, *_ = self.sizes.values()
        scores = [(self.sizes[method], own[q]) for method, own in self._scores.items()]
        values = self._header.get("values")
        return self._image("queries", q) | {
            "value": None if values is None or values[q] is None else f"{values[q]:.4g}",
            "error": first.error_text(q),
            "reliability": "" if self._agreement is None else self._agreement.of_query(q),
            "rows": [
                {
                    "title": row.title,
                    "kind": row.kind,
                    "images": [
                        self.training(n)
                        | {"scores": [sizes.text(q, own_N[n]) for sizes, own_N in scores]}
                        for n in row.indices
                    ],
                }
                for row in rows
            ],
        }
