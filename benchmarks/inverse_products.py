"""How long does a product with EK-FAC's damped inverse take, against curvlinops' own?

One that is applied again, and from the fitted operator on: the inverse's construction and one
product. A training pass is a forward and a full backward pass over 32 images.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.factor_pass import reference_passes
from benchmarks.measure import arguments, report_passes
from benchmarks.problems import random_regression
from benchmarks.upstream import first_product, their_parameters, upstream_inverse, upstream_operator
from curvlinops_diffusion import DiffusionEKFACLinearOperator, DiffusionKFACLinearOperator

DAMPING = 1e-3


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    regression = random_regression("unet", options.quick, options.device, num_data=32)
    params = their_parameters(regression)
    theirs = upstream_operator(
        "EKFACLinearOperator",
        regression,
        params,
        fisher_type="mc",
        num_data=regression.num_samples,
        check_deterministic=False,
    )
    K = DiffusionKFACLinearOperator(regression, params)
    EK = DiffusionEKFACLinearOperator(regression, params)
    vector = torch.randn(EK.shape[1], 1, device=options.device)
    first_product(theirs)  # computes its factors

    def their_inverse() -> Any:
        return upstream_inverse(theirs, damping=DAMPING, use_exact_damping=True)

    passes = {
        "training pass": reference_passes(regression)["training pass"],
        "ours, inverse of EK-FAC and a product": lambda: EK.inverse(DAMPING) @ vector,
        "curvlinops, inverse of EK-FAC and a product": lambda: their_inverse() @ vector,
        "ours, inverse of K-FAC and a product": lambda: K.inverse(DAMPING) @ vector,
    }
    ours_kept, theirs_kept = EK.inverse(DAMPING), their_inverse()
    for columns in (1, 8, 64):
        X = torch.randn(EK.shape[1], columns, device=options.device)
        passes[f"ours, {columns} columns"] = lambda X=X: ours_kept @ X
        passes[f"curvlinops, {columns} columns"] = lambda X=X: theirs_kept @ X
    report_passes(options, "inverse_products", __doc__, passes, EK.shape[0], regression.num_samples)


if __name__ == "__main__":
    main()
