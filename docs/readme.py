"""Writes the README's table of retraining and its legend, between their markers."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from quoted_numbers import numbers
from tables import METHODS, PROBLEM_NAMES, RESULTS, lds_cells

README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- by docs/readme.py -->\n", "<!-- end -->\n")
PARAGRAPHS = (
    """
    In brackets are 95 % intervals. Rows with *(best)* have their settings chosen by the result; the
    others have their defaults. *Two seeds* is the correlation of two trainings on the same half,
    which bounds what *a perfect predictor* can reach. And directly: without the 100 of 1,000 digits
    that EK-FAC finds most helpful to a sample, the loss of a network trained anew rises by
    {removed, EK-FAC} % on it; without 100 at random it stays.
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
    """Linear data-modelling scores of the loss."""
    labels: list[object] = []
    columns: list[list[object]] = []
    for name, problem in PROBLEM_NAMES.items():
        path = RESULTS / f"lds_{name}_cpu.json"
        head, *rows = lds_cells(json.loads(path.read_text()), METHODS)
        labels = ["", *(row[0] for row in rows)]
        for column, cell in enumerate(head):
            if str(cell).startswith("loss, "):
                title = f"{problem}, {str(cell).removeprefix('loss, ')}"
                columns.append([title, *(row[column] for row in rows)])
    head, *rows = zip(labels, *columns, strict=True)
    rule = ["---"] * len(head)
    lines = [f"| {' | '.join(str(entry) for entry in row)} |" for row in (head, rule, *rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    README.write_text(readme())
