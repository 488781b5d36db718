"""How many draws of each training image does EK-FAC need, to predict retraining of the digits?

At the default damping, of uniform draws and of stratified ones in antithetic pairs. Draws are added
in parts, each of its own seed: 10, then 20 more, and so on.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.evaluate import judged, predicted, setting_of
from benchmarks.lds.methods import DAMPINGS, Setting
from benchmarks.lds.retrain import FOLDER
from benchmarks.measure import arguments, report
from curvlinops_diffusion import ExampleGradientLinearOperator

SCHEMES: dict[str, dict[str, Any]] = {
    "uniform": {"timesteps": "uniform"},
    "antithetic": {"antithetic": True},
}
KINDS = ("held-out", "generated")


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of its result")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    problem = PROBLEMS[options.problem]
    setting, (_, tensors) = setting_of(problem, options.retrained)
    rows = [row for scheme in SCHEMES for row in scores(setting, scheme, tensors)]
    report(options, "retraining_draws", __doc__, {"scores": rows})


def scores(setting: Setting, scheme: str, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Linear data-modelling scores of the loss at each number of draws."""
    inverse = setting.curvature().inverse(DAMPINGS[0])
    preconditioned_PQ = inverse @ setting.queries[0].rows().T
    total_NP, before, rows = torch.zeros(()), 0, []
    measured_SHQ = tensors["values"].double()[:, :, 0].transpose(0, 1)
    for seed, draws in enumerate(setting.problem.draws):
        train = setting.train(draws - before, seed=seed, **SCHEMES[scheme])
        total_NP = total_NP + (draws - before) * ExampleGradientLinearOperator(train).rows()
        before = draws
        predicted_QH = predicted((total_NP @ preconditioned_PQ).T, tensors["halves"])
        row: dict[str, Any] = {"draws": draws, "scheme": scheme}
        for kind, own in zip(KINDS, torch.arange(len(predicted_QH)).chunk(2), strict=True):
            found = judged(predicted_QH[own], measured_SHQ[..., own], 1)
            row[f"loss, {kind}"] = round(found.mean, 4)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
