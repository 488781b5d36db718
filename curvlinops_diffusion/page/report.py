"""Scores as a self-contained page, in which each image is embedded once.

Legend: Q queries, N training images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from markupsafe import Markup
from torch import Tensor

from curvlinops_diffusion.influence.agreement import NOT_TOLD, Agreement
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS, sentence_of
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.influence.score_files import better_of
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.page.figures import histogram, operator_summary
from curvlinops_diffusion.page.gallery import Gallery
from curvlinops_diffusion.page.pictures import features_of, is_twin, thumbnail, twins, uncropped
from curvlinops_diffusion.page.rankings import Sizes, common_images, meaning, rows_of, titles_of
from curvlinops_diffusion.page.templates import rendered
from curvlinops_diffusion.runtime.files import write_bytes

_HERE = Path(__file__).parent
# pixels of the longer side at most, of queries, of images among the first of one, and of all others
_QUERY, _FIRST, _OTHER = 288, 192, 80
# the page holds so many scores, else the first and last of each query; and so many pictures more
_SCORES, _EACH, _OTHERS = 200_000, 100, 1000


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
    path, first = Path(path), next(iter(by_method.values()))
    ordering, better = Method(next(iter(by_method))), better_of(header)
    measured = header["identity"].get("query", {}).get("measurement", "")
    measurement, agreement = MEASUREMENTS.get(measured), Agreement.of_header(header)
    Q, N = len(first), len(train.names)
    noise = [agreement is not None and agreement.is_noise(q) for q in range(Q)]
    sizes = [
        Sizes.of(scores_QN, header, method, place == 0)
        for place, (method, scores_QN) in enumerate(by_method.items())
    ]
    of_methods = list(zip(sizes, by_method.values(), strict=True))
    errors, values = (header.get(name) or [None] * Q for name in ("standard_error", "values"))
    rows = [
        [] if noise[q] else rows_of(scores_N, top, better, errors[q], ordering)
        for q, scores_N in enumerate(first)
    ]
    orders = _orders(first, better.helpful_sign or 1)
    listed = sorted({n for order in orders for n in order})
    place_of = {n: place for place, n in enumerate(listed)}
    pictures = _Pictures(path.absolute().parent, header.get("digests", {}))
    pictures.add("queries", queries, range(Q), range(Q), _QUERY)
    in_rows = {n for of_query in rows for row in of_query for n in row.indices}
    pictures.add("train", train, in_rows, listed, _FIRST)

    def image(n: int, *notes: str) -> dict[str, Any]:
        found = {"class": f"train{n}", "name": train.names[n], "caption": train.caption(n)}
        return found | {"place": place_of[n], "notes": notes}

    def is_like(q: int, n: int) -> bool:
        """Whether a training image is nearly a query, or has its caption."""
        caption = queries.caption(q)
        return (caption != "" and caption == train.caption(n)) or is_twin(
            pictures.features["queries"][q], pictures.features["train"][n]
        )

    count = len(groups) // (Q * len(by_method))

    def query(q: int) -> dict[str, Any]:
        own = groups[q * count : (q + 1) * count]  # those with the largest sums of either sign
        shown = [*own[:top], *own[max(top, count - top) :]]
        return {
            "class": f"queries{q}",
            "name": queries.names[q],
            "caption": queries.caption(q),
            "value": None if values[q] is None else f"{values[q]:.4g}",
            "error": sizes[0].error_text(q),
            "reliability": "" if agreement is None else agreement.of_query(q),
            "verdict": "" if agreement is None else agreement.verdict(q),
            "noise": noise[q],
            "rows": [
                {
                    "title": row.title,
                    "kind": row.kind,
                    "like": row.kind == "hinders" and any(is_like(q, n) for n in row.indices),
                    "images": [
                        image(n, *(size.text(q, scores[q][n]) for size, scores in of_methods))
                        for n in row.indices
                    ],
                }
                for row in rows[q]
            ],
            "groups": [
                vars(each)
                | {key: sizes[0].text(q, getattr(each, key)) for key in ("sum", "mean")}
                | {"halves": {None: "", True: "agree", False: "do not agree"}[each.agreement]}
                for each in shown
            ],
            "left_out": count - len(shown),
        }

    meanings = [
        meaning(measurement, size, N, method, place, len(sizes))
        for place, (method, size) in enumerate(zip(by_method, sizes, strict=True))
    ]
    if checkpoints := len(header.get("checkpoints", ())):
        meanings.append(
            f"Scores and values are averages over {checkpoints} checkpoints of one training, the "
            "curvature shown is that of the last."
        )
    common, many = common_images(rows)
    data = {
        "N": N,
        "listed": len(listed),
        "sign": better.helpful_sign if ordering.takes_draws else 0,
        "notTold": NOT_TOLD,
        "methods": list(by_method),
        "units": [size.unit for size in sizes],
        "train": pictures.entries("train", train, listed),
        "queries": pictures.entries("queries", queries, range(Q)),
        "scores": [
            {
                "images": [place_of[n] for n in order],
                "numbers": [
                    [float(f"{z:.3g}") for z in (scores[q][order] / size.scale_Q[q]).tolist()]
                    for size, scores in of_methods
                ],
                "error": sizes[0].error(q),
                "noise": noise[q],
                "agreement": agreement and agreement.rank_correlation[q],
            }
            for q, order in enumerate(orders)
        ],
    }
    script = json.dumps(data, separators=(",", ":"))  # which no text in it can end
    script = script.replace("<", "\\u003c").replace("&", "\\u0026")
    text = rendered(
        "page",
        style=Markup((_HERE / "page.css").read_text()),
        script=Markup((_HERE / "page.js").read_text()),
        meanings=meanings,
        measured=sentence_of(measured) if ordering.takes_draws else "",
        sums=ordering.has_unit(header),
        agreement=agreement,
        num_noise=sum(noise),
        not_told=NOT_TOLD,
        common=[image(n, f"{among} of {Q}") for n, among in common],
        many=many,
        top=top,
        kinds=titles_of(better, ordering),
        queries=[query(q) for q in range(Q)],
        pictures=pictures.rules,
        quantity="value" if measurement is None else measurement.quantity,
        histogram=histogram(first, sizes[0]),
        operator=None if operator is None else operator_summary(Path(operator)),
        summary=_settings(header, Q, N),
        settings=json.dumps(header["identity"], indent=2),
        scores=path.stem,
        data=Markup(script),
    )
    contents = text.encode(errors="backslashreplace")  # file names may be no text
    write_bytes(path, contents)
    return len(contents)


def _orders(scores: Tensor | StoredScores, sign: int) -> list[list[int]]:
    """The images that the page lists for each query, the most helpful first: all where it can."""
    found = []
    whole = len(scores) * scores.shape[1] <= _SCORES
    for scores_N in scores:
        if whole or len(scores_N) <= 2 * _EACH:
            found.append((sign * scores_N).argsort(descending=True, stable=True).tolist())
            continue
        ends = [(own * scores_N).topk(_EACH).indices.tolist() for own in (sign, -sign)]
        found.append([*ends[0], *reversed(ends[1])])
    return found


def _settings(header: Mapping[str, Any], num_queries: int, num_train: int) -> list[list[str]]:
    """List the settings of scores as pairs of a term and its text; unknown ones have no line."""

    def text(name: str) -> str:
        value = header.get("run", {}).get(name) or ""
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    train, query, operator = (
        header["identity"].get(side, {}) for side in ("train", "query", "operator")
    )
    draws = [
        f"{side['regression']['num_draws']} of each {what}"
        for side, what in ((train, "training image"), (query, "query"))
        if "regression" in side
    ]
    fitted = operator.get("regression", {}).get("num_draws")
    resolution = header.get("form", {}).get("resolution")
    versions = operator.get("versions", {})
    found = {
        "Scores": f"{num_queries:,} queries × {num_train:,} training images",
        "Method": " and ".join(header.get("methods", ())),
        "Measured": query.get("measurement", ""),
        "Draws of noise": ", ".join(draws),
        "Curvature": operator.get("kind", "") + (f", {fitted} draws of each image" * bool(fitted)),
        "Damping": f"{query['damping']:g}" if "damping" in query else "",
        "Network": text("pipeline") or text("model"),
        "Adapter": text("lora"),
        "Training images": text("data") + (f", at {resolution} pixels" if resolution else ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [[term, text] for term, text in found.items() if text]


class _Pictures:
    """Pictures of a page: classes of elements with what they look like, files, and twins.

    An image is the background of every element of its class, so that its bytes are there once.

    Attributes:
        rules: The classes and their styles.
        features: What pictures are compared by, by kind and number.
    """

    def __init__(self, folder: Path, digests: Mapping[str, Sequence[str]]):
        self.rules: list[tuple[str, str]] = []
        self.features: dict[str, dict[int, Tensor]] = {}
        self._folder, self._digests = folder, digests

    def add(
        self, kind: str, gallery: Gallery, first: Any, listed: Sequence[int], size: int
    ) -> None:
        """Add those that are shown at once, and small ones of others that are listed."""
        own, paths = self._digests.get(kind), getattr(gallery, "paths", None)
        found = self.features.setdefault(kind, {})
        others = [n for n in listed if n not in first][:_OTHERS]
        for n, x in gallery.images({*first, *others}):
            if own is not None and own[n] != gallery.digest(n):
                option = "data" if kind == "train" else "queries"
                raise ValueError(
                    f"The image '{gallery.names[n]}' of the {option} (or its label or prompt) "
                    "is not the one that was scored. Pass the images that were."
                )
            found[n] = features_of(x)
            self.rules.append((f"{kind}{n}", thumbnail(x, size if n in first else _OTHER)))
            if paths is not None and n in first:
                whole = uncropped(paths[n], x, size)
                if whole is not None:
                    self.rules.append((f"{kind}{n}-whole", whole))

    def entries(self, kind: str, gallery: Gallery, listed: Sequence[int]) -> list[list[Any]]:
        """Class, name, caption, file and twins (as places among these) of the listed images."""
        paths = getattr(gallery, "paths", None)
        seen = [n for n in listed if n in self.features[kind]]
        place_of = {n: place for place, n in enumerate(listed)}
        alike = twins(torch.stack([self.features[kind][n] for n in seen])) if seen else []
        twins_of = {
            n: [place_of[seen[other]] for other in others]
            for n, others in zip(seen, alike, strict=True)
        }
        return [
            [
                f"{kind}{n}",
                gallery.names[n],
                gallery.caption(n),
                None if paths is None else self._address(paths[n]),
                twins_of.get(n, []),
            ]
            for n in listed
        ]

    def _address(self, file: Path) -> str:
        """A file's address from the page, so that both can be moved together."""
        try:
            return quote(os.fsencode(Path(os.path.relpath(file, self._folder)).as_posix()))
        except ValueError:  # on another drive
            return file.as_uri()
