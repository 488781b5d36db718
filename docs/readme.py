"""The README's part that the results of the benchmarks make: a table, and what it needs to be read.

``python docs/readme.py`` writes it, between its markers.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from quoted_numbers import numbers
from tables import RESULTS, lds_cells

README = Path(__file__).parent.parent / "README.md"
MARKERS = ("<!-- by docs/readme.py -->\n", "<!-- end -->\n")
# of the README; the documentation has all
METHODS = (
    "no curvature",
    "kernel regression on pixels",
    "D-TRAK",
    "TRAK",
    "EK-FAC, the paper's recipe",
    "EK-FAC",
    "EK-FAC, Shampoo's factors",
    "K-FAC + low rank",
    "K-FAC, regression on loss and prediction",
)
PARAGRAPHS = (
    """
    Gradients are means over 64 draws of timestep and noise (of the prediction over 32, along each
    of two random signs). *The paper's recipe* is EK-FAC of linear layers and convolutions with
    uniform draws; with the 250 draws of the paper's code it has {recipe, 250 draws, held-out} and
    {recipe, 250 draws, generated} on the digits. The other rows cover every parameter and take
    draws in antithetic pairs. Rows with *(best)* have the best damping, ridge or bandwidth of a
    grid, chosen for each column by the result; the others a damping of 1e-8. The regression on
    loss and prediction was chosen on the digits. *Two seeds* is the correlation of two trainings
    on the same half, which bounds what *a perfect predictor* can reach.
    """,
    """
    Removal: without the 100 of 1,000 digits that EK-FAC finds most helpful to a sample, the loss
    of a retrained model on that sample rises by {removed, EK-FAC} % (mean of two samples,
    {removed, EK-FAC, sample 1} % and {removed, EK-FAC, sample 2} %). It rises by
    {removed, D-TRAK} % with D-TRAK's choice, {removed, kernel regression on pixels} % with that of
    either kernel regression, {removed, TRAK} % with TRAK's, and not at all with 100 at random
    (`make lds-remove`).
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
    for path in sorted(RESULTS.glob("lds_*_cpu.json")):
        head, *rows = lds_cells(json.loads(path.read_text()), METHODS)
        labels = ["", *(row[0] for row in rows)]
        problem = path.stem.split("_")[1]
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
