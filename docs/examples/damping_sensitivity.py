"""How much does the damping matter?
=================================

From networks retrained on random halves of the training images (``make lds``): how well each
method's scores predict the change of a query's loss, over its dampings.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

import curvlinops_diffusion

results = Path(curvlinops_diffusion.__file__).parents[1] / "benchmarks" / "results"
methods = {
    "EK-FAC": "C0",
    "EK-FAC, Shampoo's factors": "C4",
    "K-FAC": "C2",
    "sampled GGN": "C5",
    "TRAK": "C1",
    "D-TRAK": "C3",
}

# %%
# Dampings of curvature are absolute. Those of TRAK and D-TRAK are in units of the mean eigenvalue
# of their kernel, and have no default: the benchmark takes the best of each.

problems = [path.stem for path in sorted(results.glob("lds_*_cpu.json"))]
figure, axes = plt.subplots(len(problems), 2, figsize=(10, 4 * len(problems)), squeeze=False)
for row, problem in zip(axes, problems, strict=True):
    result = json.loads((results / f"{problem}.json").read_text())
    for axis, cell in zip(row, ("loss, held-out", "loss, generated"), strict=True):
        for entry in result["methods"]:
            if entry["cell"] == cell and entry["method"] in methods:
                name = entry["method"]
                points = sorted((float(damping), score) for damping, score in entry["lds"].items())
                dashes = "--" if name.endswith("TRAK") else "-"
                axis.semilogx(*zip(*points, strict=True), dashes, color=methods[name], label=name)
        axis.axhline(result["ceilings"][cell], color="gray", linestyle=":")
        axis.set(title=f"{problem.split('_')[1]}: {cell}", xlabel="damping", ylabel="LDS")
axes[0, 0].legend(fontsize=8)
figure.tight_layout()

# %%
# K-FAC and EK-FAC hardly change below :math:`10^{-5}`, so that the default needs no search, and
# fall towards plain products of gradients beyond: :math:`10^{-8}` only keeps eigenvalues of zero
# from being divided by. TRAK and D-TRAK have an optimum, which must be searched for by retraining.

for problem in problems:
    for entry in json.loads((results / f"{problem}.json").read_text())["methods"]:
        if entry["method"] in ("EK-FAC", "K-FAC") and entry["cell"].startswith("loss"):
            scores = entry["lds"]
            assert abs(scores["1e-05"] - scores["1e-08"]) < 0.02, "small dampings are equivalent"
            assert scores["1e-08"] > scores["1e+00"] + 0.1, "large ones are worse"
