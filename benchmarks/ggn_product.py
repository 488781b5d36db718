"""How long does an exact GGN product take, against curvlinops' own, for one column and for many?

A training pass is a forward and a full backward pass over the same data.
"""

from __future__ import annotations

import warnings

import torch

from benchmarks.factor_pass import reference_passes
from benchmarks.measure import arguments, report_passes
from benchmarks.problems import random_regression
from benchmarks.upstream import upstream_operator
from curvlinops_diffusion import DiffusionGGNLinearOperator


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    regression = random_regression("unet", options.quick, options.device, num_data=32)
    ours = DiffusionGGNLinearOperator(regression)
    theirs = upstream_operator(
        "GGNLinearOperator", regression, num_data=regression.num_samples, check_deterministic=False
    )
    passes = {"training pass": reference_passes(regression)["training pass"]}
    for columns in (1, 8):
        X = torch.randn(ours.shape[1], columns, device=options.device)
        passes[f"ours, {columns} columns"] = lambda X=X: ours @ X
        passes[f"curvlinops, {columns} columns"] = lambda X=X: theirs @ X
    report_passes(options, "ggn_product", __doc__, passes, ours.shape[0], regression.num_samples)


if __name__ == "__main__":
    main()
