"""How much does the damping matter?
=================================

From networks retrained on random halves of the training images (``make lds``): how well each
method's scores predict the change of a query's loss, over its dampings.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import curvlinops_diffusion

folder = Path(curvlinops_diffusion.__file__).parents[1] / "benchmarks" / "results"
results = {
    path.name.removeprefix("lds_").removesuffix("_cpu.json"): json.loads(path.read_text())
    for path in sorted(folder.glob("lds_*_cpu.json"))
}
methods = {
    "EK-FAC": "C0",
    "EK-FAC, Shampoo's factors": "C4",
    "K-FAC": "C2",
    "TRAK": "C1",
    "D-TRAK": "C3",
}


def curves(problem, cell):
    """Scores over dampings, by method, of those methods that were measured."""
    return {
        entry["method"]: {float(damping): score for damping, score in entry["by_setting"].items()}
        for entry in results[problem]["methods"]
        if entry["cell"] == cell and entry["method"] in methods
    }


# %%
# Dampings of curvature are absolute. Those of TRAK and D-TRAK are in units of the mean eigenvalue
# of their kernel, and have no default: the benchmark takes the best of each. The dotted line is
# what a perfect predictor would reach.

cells = ("loss, held-out", "loss, generated")
figure, axes = plt.subplots(len(results), 2, figsize=(10, 4 * len(results)), squeeze=False)
for row, (problem, result) in zip(axes, results.items(), strict=True):
    for axis, cell in zip(row, cells, strict=True):
        for name, scores in curves(problem, cell).items():
            dashes = "--" if name.endswith("TRAK") else "-"
            points = zip(*sorted(scores.items()), strict=True)
            axis.semilogx(*points, dashes, color=methods[name], label=name)
        axis.axhline(result["ceilings"][cell], color="gray", linestyle=":")
        axis.set(title=f"{problem}: {cell}", xlabel="damping", ylabel="LDS")
axes[0, 0].legend(fontsize=8)
figure.tight_layout()

# %%
# Of the digits: K-FAC and EK-FAC hardly change below :math:`10^{-5}`, so that the default needs no
# search, and fall towards plain products of gradients beyond: :math:`10^{-8}` only keeps
# eigenvalues of zero from being divided by. TRAK and D-TRAK have an optimum, which must be searched
# for by retraining.

for cell in cells:
    measured = curves("digits", cell)
    for name in ("EK-FAC", "K-FAC"):
        scores = measured[name]
        assert abs(scores[1e-5] - scores[1e-8]) < 0.02, "small dampings are equivalent"
        assert scores[1e-8] > scores[1] + 0.1, "large ones are worse"
    for name in ("TRAK", "D-TRAK"):
        scores = measured[name]
        ends = scores[min(scores)], scores[max(scores)]
        assert max(scores.values()) > max(ends) + 0.05, "the best damping is in between"
