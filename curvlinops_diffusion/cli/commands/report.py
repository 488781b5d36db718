"""``report``: scores as a self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from curvlinops_diffusion import page
from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.options import ReportOptions
from curvlinops_diffusion.cli.score_files import agreement, read_scores
from curvlinops_diffusion.influence.measurements.registry import (
    MEASUREMENTS,
    Better,
    sentence_of,
)
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import NamedImages, open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.page.figures import histogram, operator_summary
from curvlinops_diffusion.page.rankings import (
    Row,
    Sizes,
    common_images,
    is_regression,
    meaning,
    rows_of,
)
from curvlinops_diffusion.page.thumbnails import QUERY_SIZE, TRAINING_SIZE, Thumbnails
from curvlinops_diffusion.runtime.files import check_same, write_bytes

TEMPLATE = Path(page.__file__).parent / "page.html.j2"


def report(options: ReportOptions) -> None:
    """Write the page.

    Raises:
        ValueError: If images, operator and scores do not belong together.
    """
    scores_QN, header = read_scores(options.scores)
    train, queries = _images(options, header)
    identity = header["identity"]
    if options.operator is not None:
        _check_operator(options, identity)
    measured = identity.get("query", {}).get("measurement", "")
    measurement = MEASUREMENTS.get(measured)
    better = Better.LOWER if measurement is None else measurement.better
    rows = [rows_of(scores_N, options.top, better) for scores_N in scores_QN]
    shown = _Shown(train, queries, header, Sizes.of(scores_QN, header))
    text = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE.read_text())
        .render(
            meaning=meaning(measurement, shown.sizes, len(train), is_regression(header)),
            measured=sentence_of(measured),
            reliability=_reliability(header),
            common=[shown.training(n) | {"count": count} for n, count in common_images(rows)],
            queries=[shown.query(q, scores_QN[q], rows[q]) for q in range(len(rows))],
            thumbnails=shown.thumbnails.rules(),
            quantity="value" if measurement is None else measurement.quantity,
            histogram=histogram(scores_QN),
            operator=None if options.operator is None else operator_summary(options.operator),
            settings=json.dumps(identity, indent=2),
            scores=options.scores.name,
        )
    )
    write_bytes(options.output, text.encode())
    event("reported", file=str(options.output), bytes=len(text.encode()))
    say(f"Wrote {options.output} ({len(text.encode()) / 1e6:.1f} MB)")


class _Shown:
    """The images of a page, checked as they are shown to be those that were scored."""

    def __init__(
        self, train: NamedImages, queries: NamedImages, header: dict[str, Any], sizes: Sizes
    ):
        self._images = {"train": train, "queries": queries}
        self._header = header
        self.sizes = sizes
        self.thumbnails = Thumbnails()

    def _image(self, kind: str, n: int, size: int) -> dict[str, Any]:
        images, name = self._images[kind], f"{kind}{n}"
        if name not in self.thumbnails:
            x = images[n]["x0"]
            digests = self._header.get("digests", {}).get(kind)  # older files have none
            if digests is not None and digests[n] != images.digests[n]:
                option = "--data" if kind == "train" else "--queries"
                raise ValueError(
                    f"The image '{images.names[n]}' of {option} (or its label or prompt) is not "
                    f"the one that was scored. Pass what score was given."
                )
            self.thumbnails.add(name, x, size)
        return {
            "class": name,
            "name": images.names[n],
            "caption": images.caption(n),
        }

    def training(self, n: int) -> dict[str, Any]:
        """A training image."""
        return self._image("train", n, TRAINING_SIZE)

    def query(self, q: int, scores_N: Tensor, rows: list[Row]) -> dict[str, Any]:
        """A query with its training images."""
        values = self._header.get("values")
        return self._image("queries", q, QUERY_SIZE) | {
            "value": None if values is None or values[q] is None else f"{values[q]:.4g}",
            "error": self.sizes.error_text(q),
            "reliability": _reliability(self._header, q),
            "rows": [
                {
                    "title": row.title,
                    "kind": row.kind,
                    "images": [
                        self.training(n) | {"score": self.sizes.text(q, scores_N[n])}
                        for n in row.indices
                    ],
                }
                for row in rows
            ],
        }


def _images(options: ReportOptions, header: dict[str, Any]) -> tuple[NamedImages, NamedImages]:
    """Training images and queries in the form in which they were scored.

    Raises:
        ValueError: If they have other names.
    """
    seen = header.get("form", {"channels": None, "resolution": options.resolution})
    resolution = seen["resolution"] if options.resolution is None else options.resolution
    form = Form(seen["channels"], None, resolution)
    taken = header.get("condition")
    condition = None if taken is None else Condition(**taken)
    train = open_images(options.data, form, condition)
    queries = open_images(options.queries, form, condition, train)
    for images, names, what in (
        (train, header["train"], "data"),
        (queries, header["queries"], "queries"),
    ):
        if images.names != names:
            raise ValueError(
                f"--{what} holds {len(images.names)} images that are not the {len(names)} that "
                f"'{options.scores}' is of. Pass what score was given."
            )
    return train, queries


def _check_operator(options: ReportOptions, identity: dict[str, Any]) -> None:
    """Check that an operator is the one that the scores were made with.

    Raises:
        ValueError: If it is another.
    """
    assert options.operator is not None
    check_same(
        identity.get("operator", {}),
        read_header(options.operator)["info"],
        f"'{options.operator}' is not the operator of '{options.scores}'",
        "Pass the one that score was given.",
    )


def _reliability(header: dict[str, Any], q: int | None = None) -> str:
    """How far two halves of the draws agree, for a query or in the median over all."""
    found = agreement(header, q)
    if found is None:
        return ""
    shared, correlation = found
    told = "" if correlation is None else f", rank correlation {correlation:.2f}"
    return f"{shared:.3g} of the top {header['top']} in both halves of the draws{told}"
