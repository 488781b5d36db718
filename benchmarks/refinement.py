"""Which preconditioner brings conjugate gradients to the exact damped inverse soonest?

The exact GGN of few draws of digits (64 digits, two draws each), one query's gradient, relative
errors against a converged solution. EK-FAC is that of all digits.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from benchmarks.accuracy import DigitsProblem
from benchmarks.measure import arguments, report
from curvlinops_diffusion import (
    CGRefinedInverseLinearOperator,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)
    images, draws, iterations = 64, 2, (20, 60)
    if options.quick:
        images, draws, iterations = 4, 1, (1, 2)
    x0 = problem.all_x0
    train = NoisedRegression(problem.objective, x0[:images], draws, batch_size=128)
    G = DiffusionGGNLinearOperator(train, chunk_size=16)
    every = NoisedRegression(
        problem.objective, x0[: 8 if options.quick else None], 4, batch_size=128
    )
    EK = DiffusionEKFACLinearOperator(every)
    query = NoisedRegression(problem.objective, x0[-1:], 256, 1)
    b = ExampleGradientLinearOperator(query).rows()[0]

    def solution(damping: float, M: object, most: int, tolerance: float) -> Tensor:
        solver = CGRefinedInverseLinearOperator(G, damping, M, max_iter=most, tolerance=tolerance)
        found: Tensor = solver @ b
        return found

    table = []
    for damping in DAMPINGS:
        more = EK.inverse(100 * damping)
        truth = solution(damping, more, 4 if options.quick else 4000, 1e-5)
        preconditioners = {
            "none": None,
            "EK-FAC": EK.inverse(damping),
            "EK-FAC, 100 times the damping": more,
        }
        for name, M in preconditioners.items():
            row: dict[str, object] = {"damping": damping, "preconditioner": name}
            for most in iterations:
                x = solution(damping, M, most, 0.0)
                error = float((x - truth).norm() / truth.norm())
                row[f"error_after_{most}"] = round(error, 4)
            table.append(row)
        start = EK.inverse(damping) @ b
        error = float((start - truth).norm() / truth.norm())
        row = {"damping": damping, "preconditioner": "EK-FAC's inverse alone"}
        table.append(row | {f"error_after_{most}": round(error, 4) for most in iterations})
    result = {"images": images, "draws": draws, "preconditioners": table}
    report(options, "refinement", __doc__, result)


if __name__ == "__main__":
    main()
