"""How large are measured changes of a loss against those that scores predict?

The slope of the change of a loss from half to half on what ``regression_scores`` predict, one if
sizes are right, with the gap of the held-out queries to the training images. And intervals that are
to hold nine of ten measured changes, in units of a problem's predicted ones: do those that were
fitted to the other problems hold? What the regression predicts is that of
``benchmarks.lds.evaluate``, read from its work folder if it is there.

Legend: Q queries, H halves.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.calibration import KINDS, SHARE, covered, rounded, slope_of
from benchmarks.lds.evaluate import DEFAULT, dependencies, predictions, setting_of
from benchmarks.lds.methods import METHODS, Setting
from benchmarks.lds.problems import MEASURED_SEED
from benchmarks.lds.retrain import arguments_of_retrained
from benchmarks.measure import report
from curvlinops_diffusion import ExampleGradientLinearOperator, NoisedRegression
from curvlinops_diffusion.influence.gap import GeneralisationGap, generalisation_gap

METHOD = "K-FAC, regression"
# not textures_32, whose seeds agree by too little
COMPARED = ("digits", "fashion", "photographs", "textures", "styles", "dreambooth")
DRAWS = 32


def gap_of(setting: Setting) -> GeneralisationGap:
    """The gap of the held-out queries, on draws of one seed."""

    def losses(data: Any) -> ExampleGradientLinearOperator:
        regression = NoisedRegression(
            setting.objective, data, DRAWS, MEASURED_SEED, batch_size=128, antithetic=True
        )
        return ExampleGradientLinearOperator(regression, setting.params)

    return generalisation_gap(*map(losses, setting.problem.data()))


def main() -> None:
    """Run the program."""
    parser = arguments_of_retrained(__doc__)
    parser.add_argument("--problem", nargs="*", choices=PROBLEMS, default=COMPARED)
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    pairs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {kind: {} for kind in KINDS}
    for name in options.problem:
        problem = PROBLEMS[name]
        setting, (_, tensors) = setting_of(problem, options.retrained, options.draws)
        work = options.work / name / f"evaluated-{options.draws}"
        work.mkdir(parents=True, exist_ok=True)
        halves, run = tensors["halves"], METHODS[METHOD]
        of = dependencies(setting, halves, run)
        _, found = predictions(METHOD, lambda: run(setting), halves, work, of)  # noqa: B023
        gap = gap_of(setting)
        measured_QH = tensors["values"].double().mean(1)[:, 0].T
        Q = problem.num_queries
        for kind, own in zip(KINDS, (slice(0, Q), slice(Q, None)), strict=True):
            predicted_QH = gap.value * found[DEFAULT][0][own].double()
            slope, error = slope_of(predicted_QH, measured_QH[own], options.resamples)
            row = {"problem": name, "queries": kind, "slope": slope, "error": error}
            rows.append(rounded(row | {"gap": gap.value, "gap_error": gap.error}))
            both = predicted_QH, measured_QH[own]
            x, y = (z - z.mean(1, keepdim=True) for z in both)
            pairs[kind][name] = x / x.std(), y / x.std()
    coverage = [
        {"queries": kind, **rounded(row)} for kind, own in pairs.items() for row in covered(own)
    ]
    settings = {"draws": options.draws, "resamples": options.resamples, "share": SHARE}
    found = {"method": METHOD, "sizes": rows, "coverage": coverage}
    report(options, "sizes", __doc__, {**settings, **found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
