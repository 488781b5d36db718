"""How many draws of each training image until two seeds give the same scores?

EK-FAC scores of 128 digits on 16 queries, whose own gradients are those of many draws. Scores of
two independent seeds are correlated over the training images, query by query.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import DigitsProblem
from benchmarks.measure import arguments, report
from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

DAMPING = 1e-8
CORRELATIONS = (0.8, 0.9, 0.95)
SCHEMES: dict[str, dict[str, Any]] = {
    "stratified, antithetic": {"antithetic": True},
    "stratified": {},
    "uniform": {"timesteps": "uniform"},
}


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)
    images, queries = (8, 2) if options.quick else (128, 16)
    many = 4 if options.quick else 512
    numbers = (2, 4) if options.quick else (2, 4, 8, 16, 32, 64, 128, 256)
    EK = DiffusionEKFACLinearOperator(problem.regression(2 if options.quick else 16, 0))
    x_query = problem.x0[-queries:]
    query = NoisedRegression(problem.objective, x_query, many, 77, batch_size=queries)
    queries_PQ = EK.inverse(DAMPING) @ ExampleGradientLinearOperator(query).rows().T

    def scores(scheme: dict[str, Any], draws: int, seed: int) -> Tensor:
        regression = NoisedRegression(
            problem.objective, problem.x0[:images], draws, seed, batch_size=32, **scheme
        )
        batches = ExampleGradientLinearOperator(regression).row_batches()
        return torch.cat([rows_BP @ queries_PQ for _, rows_BP in batches]).T

    table = []
    for draws in numbers:
        row: dict[str, float] = {"draws": draws}
        for name, scheme in SCHEMES.items():
            first, second = (scores(scheme, draws, seed) for seed in (1, 2))
            pairs = zip(first, second, strict=True)
            correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
            row[f"correlation, {name}"] = round(float(np.mean(correlations)), 4)
        table.append(row)
        print(row, flush=True)
    needed = {name: {str(c): _needed(table, name, c) for c in CORRELATIONS} for name in SCHEMES}
    report(options, "score_draws", __doc__, {"draws": table, "needed": needed})


def _needed(table: list[dict[str, float]], name: str, correlation: float) -> float | None:
    """The number of draws, between those measured, by interpolation of its logarithm."""
    found = [row[f"correlation, {name}"] for row in table]
    if not found[0] < correlation <= found[-1]:
        return None
    logs = np.log([row["draws"] for row in table])
    return round(float(np.exp(np.interp(correlation, found, logs))), 1)


if __name__ == "__main__":
    main()
