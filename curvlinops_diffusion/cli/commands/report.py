"""``report``: scores as a self-contained page."""

from __future__ import annotations

from typing import Any

from curvlinops_diffusion.cli.events import event, say
from curvlinops_diffusion.cli.options import ReportOptions
from curvlinops_diffusion.influence.read_scores import read_scores
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.named_images import NamedImages
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.page.report import write_report
from curvlinops_diffusion.runtime.files import check_same


def report(options: ReportOptions) -> None:
    """Write the page.

    Raises:
        ValueError: If images, operator and scores do not belong together.
    """
    scores_QN, header = read_scores(options.scores)
    train, queries = _images(options, header)
    if options.operator is not None:
        _check_operator(options, header["identity"])
    size = write_report(
        options.output,
        scores_QN,
        header,
        train,
        queries,
        top=options.top,
        operator=options.operator,
    )
    event("reported", file=str(options.output), bytes=size)
    say(f"Wrote {options.output} ({size / 1e6:.1f} MB)")


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
