"""How much dearer than a training pass is it to fit K-FAC and EK-FAC?

A training pass is a forward and a full backward pass over the same data; the floor is a forward
pass and a backward pass that stops at the layers' outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from benchmarks.kronfluence_passes import kronfluence_passes
from benchmarks.measure import arguments, report_passes
from benchmarks.problems import NETWORKS, random_regression
from benchmarks.upstream import upstream_passes
from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.curvature.kronecker_factors import eigenvalue_moments, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.layers.observation import Observer, observed, one_vector
from curvlinops_diffusion.linalg.factors import Eigendecomposition, eigendecomposition


def reference_passes(regression: NoisedRegression) -> dict[str, Callable[[], object]]:
    """The training pass and the floor."""
    objective = regression.objective
    layers = covered_parameters(objective.model, None).layers

    def training() -> None:
        for batch in regression.batches():
            batch.loss(objective.predict(batch)).sum().backward()
        objective.model.zero_grad()

    def floor() -> None:
        with observed(objective, layers, Observer()) as network:
            for batch in regression.batches():
                network.run(batch, one_vector(batch.loss_gradient))

    return {"training pass": training, "floor": floor}


def our_passes(
    regression: NoisedRegression, decomposed: bool = True
) -> dict[str, Callable[[], object]]:
    """Our two passes, and the eigendecompositions between them.

    Args:
        regression: The problem.
        decomposed: Whether factors are decomposed. Else the eigenbases are random matrices, on
            whose entries the time of the second pass does not depend.
    """
    coverage = covered_parameters(regression.objective.model, None)
    plan = BlockPlan.of(coverage, KFACOptions())
    factors = kronecker_factors(regression, plan)
    matrices = factors.inputs, factors.outputs
    bases: list[dict[str, Eigendecomposition]]
    if decomposed:
        bases = [{key: eigendecomposition(M, key) for key, M in own.items()} for own in matrices]
    else:
        bases = [
            {key: Eigendecomposition(M[..., 0], torch.randn_like(M)) for key, M in own.items()}
            for own in matrices
        ]

    passes: dict[str, Callable[[], object]] = {
        "K-FAC factors": lambda: kronecker_factors(regression, plan)
    }
    if decomposed:
        passes["eigendecompositions"] = lambda: [
            {key: eigendecomposition(M, key) for key, M in own.items()} for own in matrices
        ]
    return passes | {
        "EK-FAC eigenvalues": lambda: eigenvalue_moments(regression, plan, *bases),
    }


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--problem", choices=NETWORKS, default="unet", help="the network")
    parser.add_argument("--num-data", type=int, default=128, help="images")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch")
    parser.add_argument(
        "--not-decomposed", action="store_true", help="leave the eigendecompositions out"
    )
    parser.add_argument("--upstream", action="store_true", help="measure curvlinops as well")
    parser.add_argument("--kronfluence", action="store_true", help="and kronfluence, if installed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    regression = random_regression(
        options.problem, options.quick, options.device, options.num_data, options.batch_size
    )
    decomposed = not options.not_decomposed
    passes = reference_passes(regression) | our_passes(regression, decomposed)
    if options.upstream:
        passes |= upstream_passes(regression, decomposed)
    if options.kronfluence:
        passes |= kronfluence_passes(regression, 4 if options.quick else options.batch_size)
    parameters = sum(p.numel() for p in regression.objective.model.parameters())
    name = f"factor_pass_{options.problem}"
    report_passes(options, name, __doc__, passes, parameters, regression.num_samples)


if __name__ == "__main__":
    main()
