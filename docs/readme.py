"""Writes the README's table of retraining and its legend, between their markers."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from quoted_numbers import numbers
from tables import LATENTS, PROBLEM_NAMES, RESULTS
from tables import METHODS as IN_FIGURES

README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- by docs/readme.py -->\n", "<!-- end -->\n")
METHODS = (*IN_FIGURES, LATENTS)
PARAGRAPHS = (
    """
    Held-out / generated, with 95 % intervals of about ±0.05 (±0.1 on textures and adapters).
    TRAK, D-TRAK and DAS have their settings chosen by the result; the others have their defaults.
    *Two seeds* is the correlation of two trainings on the same half, which bounds what *a perfect
    predictor* can reach. And directly: without the 100 of 1,000 digits that EK-FAC finds most
    helpful to a sample, the loss of a network trained anew rises by {removed, EK-FAC} % on it;
    without 100 at random it stays.
    """,
)


def readme() -> str:
    """The README with this part."""
    text = README.read_text()
    start = text.index(MARKERS[0]) + len(MARKERS[0])
    end = text.index(MARKERS[1])
    filled = (" ".join(paragraph.split()).format_map(numbers()) for paragraph in PARAGRAPHS)
    parts = [_table(), *(textwrap.fill(paragraph, 118) for paragraph in filled)]
    return text[:start] + "\n\n".join(parts) + "\n" + text[end:]


def _table() -> str:
    """Linear data-modelling scores of the loss, held-out / generated."""
    columns: list[list[str]] = [["", *METHODS, "*two seeds*", "*a perfect predictor*"]]
    for name, problem in PROBLEM_NAMES.items():
        result = json.loads((RESULTS / f"lds_{name}_cpu.json").read_text())
        by_method: dict[str, dict[str, float]] = {
            "*two seeds*": result["agreement_of_seeds"],
            "*a perfect predictor*": result["ceilings"],
        }
        for row in result["methods"]:
            by_method.setdefault(row["method"], {})[row["cell"]] = row["lds"]
        cells = ("loss, held-out", "loss, generated")
        texts = (
            " / ".join(f"{by_method[method][cell]:.2f}" for cell in cells)
            if method in by_method
            else "–"
            for method in columns[0][1:]
        )
        columns.append([problem, *texts])
    head, *rows = zip(*columns, strict=True)
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


if __name__ == "__main__":
    README.write_text(readme())
