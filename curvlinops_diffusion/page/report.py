"""Scores as a self-contained page, in which each image is embedded once."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, features
from torch import Tensor

from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, Better, sentence_of
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.page.figures import histogram, operator_summary
from curvlinops_diffusion.page.gallery import Gallery
from curvlinops_diffusion.page.rankings import Row, Sizes, common_images, meaning, rows_of
from curvlinops_diffusion.runtime.files import write_bytes

TEMPLATE = Path(__file__).parent / "page.html.j2"
# pixels of the longer side at most; a training image is shown at half of its size
_SIZES = {"queries": 288, "train": 192}
# up to here an image is kept as it is, and enlarged with visible pixels
_PIXELATED = 64
_QUALITY = 80


def write_report(
    path: str | PathLike[str],
    by_method: Mapping[str, Tensor | StoredScores],
    header: Mapping[str, Any],
    train: Gallery,
    queries: Gallery,
    *,
    top: int = 8,
    groups: Sequence[Any] = (),
    operator: str | PathLike[str] | None = None,
) -> int:
    """Write the page with the training images that helped and hindered each query most.

    Args:
        path: Where to.
        by_method: The scores of each method; the first orders, and each has its number.
        header: Their header, as a file of scores holds it.
        train: The training images.
        queries: The queries.
        top: Training images in each row of a query, and groups of either sign.
        groups: The influence of groups on each query, those of the first method in front.
        operator: An operator's file, whose spectrum and blocks are shown.

    Returns:
        The size of the page in bytes.

    Raises:
        ValueError: If an image is not the one that was scored, or the page cannot be written.
    """
    identity, (first, *_) = header["identity"], by_method.values()
    measured = identity.get("query", {}).get("measurement", "")
    measurement = MEASUREMENTS.get(measured)
    better = Better.LOWER if measurement is None else measurement.better
    agreement = Agreement.of_header(header)
    rows = [rows_of(scores_N, top, better) for scores_N in first]
    values = header.get("values") or [None] * len(rows)
    galleries = {"train": train, "queries": queries}
    sizes = [
        Sizes.of(scores_QN, header, method, place == 0)
        for place, (method, scores_QN) in enumerate(by_method.items())
    ]

    def image(kind: str, n: int) -> dict[str, Any]:
        gallery = galleries[kind]
        return {"class": f"{kind}{n}", "name": gallery.names[n], "caption": gallery.caption(n)}

    count = len(groups) // (len(rows) * len(by_method))

    def groups_of(q: int) -> list[dict[str, Any]]:
        """The groups with the largest sums of either sign."""
        own = groups[q * count : (q + 1) * count]
        return [
            vars(each)
            | {key: sizes[0].text(q, getattr(each, key)) for key in ("sum", "mean")}
            | {"halves": {None: "", True: "agree", False: "do not agree"}[each.agreement]}
            for number, each in enumerate(own)
            if number < top or number >= count - top
        ]

    def query(q: int) -> dict[str, Any]:
        scores = [(size, own[q]) for size, own in zip(sizes, by_method.values(), strict=True)]
        return image("queries", q) | {
            "value": None if values[q] is None else f"{values[q]:.4g}",
            "error": sizes[0].error_text(q),
            "reliability": "" if agreement is None else agreement.of_query(q),
            "rows": [
                {
                    "title": row.title,
                    "kind": row.kind,
                    "images": [
                        image("train", n)
                        | {"scores": [size.text(q, scores_N[n]) for size, scores_N in scores]}
                        for n in row.indices
                    ],
                }
                for row in rows[q]
            ],
            "groups": groups_of(q),
            "left_out": max(0, count - 2 * top),
        }

    checkpoints = len(header.get("checkpoints", ()))
    averaged = (
        f"Scores and values are averages over {checkpoints} checkpoints of one training, the "
        "curvature shown is that of the last."
    )
    text = (
        jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(TEMPLATE.read_text())
        .render(
            meanings=[
                meaning(measurement, size, len(train.names), method, place, len(sizes))
                for place, (method, size) in enumerate(zip(by_method, sizes, strict=True))
            ]
            + ([averaged] if checkpoints else []),
            measured=sentence_of(measured),
            reliability="" if agreement is None else agreement.summary(),
            common=[image("train", n) | {"count": count} for n, count in common_images(rows)],
            queries=[query(q) for q in range(len(rows))],
            thumbnails=_thumbnails(galleries, rows, header.get("digests", {})),
            quantity="value" if measurement is None else measurement.quantity,
            histogram=histogram(first),
            operator=None if operator is None else operator_summary(Path(operator)),
            settings=json.dumps(identity, indent=2),
            scores=Path(path).stem,
        )
    ).encode(errors="backslashreplace")  # file names may be no text
    write_bytes(Path(path), text)
    return len(text)


def _thumbnails(
    galleries: Mapping[str, Gallery],
    rows: Sequence[Sequence[Row]],
    digests: Mapping[str, Sequence[str]],
) -> list[tuple[str, str]]:
    """Classes of elements and what they look like, of every image that is shown.

    An image is the background of every element of its class, so that its bytes are there once.
    """
    rules = []
    shown = {n for of_query in rows for row in of_query for n in row.indices}
    for kind, numbers in {"train": shown, "queries": set(range(len(rows)))}.items():
        gallery, own = galleries[kind], digests.get(kind)
        for n, x in gallery.images(numbers):
            if own is not None and own[n] != gallery.digest(n):
                option = "data" if kind == "train" else "queries"
                raise ValueError(
                    f"The image '{gallery.names[n]}' of the {option} (or its label or prompt) "
                    "is not the one that was scored. Pass the images that were."
                )
            rules.append((f"{kind}{n}", thumbnail(x, _SIZES[kind])))
    return rules


def thumbnail(x: Tensor, size: int) -> str:
    """A style that shows an image.

    Args:
        x: The image in [-1, 1], ``[C, H, W]``; of other channels than grey or RGB, the first that
            can be shown.
        size: Pixels of the longer side, at most.
    """
    x = x[: 3 if len(x) >= 3 else 1]
    bytes_HWC = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    image, buffer = Image.fromarray(bytes_HWC.squeeze(-1).numpy()), io.BytesIO()
    if max(image.size) <= _PIXELATED:
        kind, more = "png", ";image-rendering:pixelated"
        image.save(buffer, format=kind)
    else:
        kind, more = "webp" if features.check("webp") else "jpeg", ""
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.save(buffer, format=kind, quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"background-image:url(data:image/{kind};base64,{data}){more}"
