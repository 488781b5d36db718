"""Figures and tables of a page."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.linalg.operator_files import block_rows
from curvlinops_diffusion.linalg.storage import read_blocks
from curvlinops_diffusion.page.rankings import Sizes

matplotlib.use("Agg")  # draws to files, needs no screen

_BLUE = "#4a6fa5"
_BINS = 80
# beyond, more points change nothing that can be seen
_MAX_POINTS = 2000
# numbers as they are written elsewhere on the page, no powers in small print
_PLAIN = FuncFormatter(
    lambda z, _: f"{z:,.10g}" if z == 0 or 1e-4 <= abs(z) < 1e7 else f"{z:.0e}".replace("e-0", "e-")
)


def histogram(scores: Tensor | StoredScores, sizes: Sizes) -> str:
    """A histogram of the scores in units that people read, a query at a time."""

    def numbers() -> Iterator[np.ndarray]:
        for q, scores_N in enumerate(scores):
            yield scores_N.double().numpy() / float(sizes.scale_Q[q])

    least = min(float(own.min()) for own in numbers())
    most = max(float(own.max()) for own in numbers())
    edges = np.histogram_bin_edges([least, most], bins=_BINS)
    counts = sum(np.histogram(own, edges)[0] for own in numbers())
    figure, axis = plt.subplots(figsize=(7, 2.2))
    axis.stairs(counts, edges, fill=True, color=_BLUE)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.xaxis.set_major_formatter(_PLAIN)
    axis.set_xlabel(f"number under an image{sizes.unit and f' ({sizes.unit.strip()})'}")
    axis.set_ylabel("pairs")
    return _svg(figure)


def intervals(rows: list[tuple[str, float, float, float]], ceiling: float | None) -> str:
    """Scores of methods (name, value, low, high) with their intervals, the first on top."""
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.35 * len(rows)))
    for place, (_, value, low, high) in enumerate(rows):
        axis.plot([low, high], [place, place], color=_BLUE, linewidth=2)
        axis.plot([value], [place], "o", color=_BLUE)
    if ceiling is not None:
        axis.axvline(ceiling, color="black", linestyle=":", linewidth=1)
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("linear data-modelling score" + (", ceiling dotted" if ceiling else ""))
    return _svg(figure)


def operator_summary(path: Path) -> dict[str, Any]:
    """An operator's spectrum as a figure, and a row for each block."""
    header, blocks = read_blocks(path)
    rows, spectra = block_rows(header), []
    for row, placed in zip(rows, blocks, strict=True):
        values = placed.block.eigen(placed.name).eigenvalues.flatten()
        spectra.append(values)
        row |= {"trace": float(values.sum()), "largest": float(values.max())}
    total = sum(row["trace"] for row in rows) or 1.0
    values = torch.cat(spectra).sort(descending=True).values.clamp(min=1e-30)
    numbers = torch.logspace(0, torch.tensor(len(values)).log10(), _MAX_POINTS)
    numbers = numbers.long().clamp(1, len(values)).unique()
    figure, axis = plt.subplots(figsize=(7, 2.6))
    axis.loglog(numbers.numpy(), values[numbers - 1].double().numpy(), color=_BLUE)
    axis.set_ylim(bottom=max(float(values[0]) * 1e-14, 1e-30))
    axis.xaxis.set_major_formatter(_PLAIN)
    axis.yaxis.set_major_formatter(_PLAIN)
    axis.set_xlabel("number")
    axis.set_ylabel("eigenvalue")
    covered = sum(row["parameters"] for row in rows)
    for row in rows:
        row["share"] = f"{row['trace'] / total:.2%}"
        row["largest"] = f"{row['largest']:.2e}"
        row["parameters"] = f"{row['parameters']:,}"
    return {
        "kind": header["kind"],
        "rows": rows,
        "spectrum": _svg(figure),
        "covered": f"{covered:,}",
    }


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
