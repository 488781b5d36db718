"""In which precision are products good enough? Rounding against the chance of the draws.

Factors of 256 digits, four draws each: what rounding changes in them, and how far apart those of
two seeds are; relative Frobenius errors, averaged over the layers. Products are rounded as a GPU's
tensor cores round them: the operands, here before they are multiplied, and not their sums, which
are in float32. TF32 keeps 10 bits behind the leading one, bfloat16 keeps 7.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import mean
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.accuracy import DigitsProblem, factor_errors
from benchmarks.measure import arguments, report
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.curvature import kronecker_factors as module
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan

DRAWS = 4
TF32_BITS = 10


def rounded_to_tf32(z: Tensor) -> Tensor:
    """Round float32 numbers to the nearest of 10 bits; of two as near, to the even one."""
    dropped = 23 - TF32_BITS
    bits = z.contiguous().view(torch.int32)
    last = (bits >> dropped) & 1
    return (((bits + (2 ** (dropped - 1) - 1) + last) >> dropped) << dropped).view(torch.float32)


def rounded_to_bfloat16(z: Tensor) -> Tensor:
    """Round float32 numbers to the nearest of 7 bits."""
    return z.bfloat16().float()


@contextmanager
def operands(rounded: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Round what products are made of."""

    def summable(z: Tensor, dtype: torch.dtype) -> Tensor:
        z = z.to(dtype) if z.is_floating_point() else z
        return z if rounded is None or not z.is_floating_point() else rounded(z)

    with patch.object(module, "summable", summable):
        yield


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)
    plan = BlockPlan.of(problem.coverage, KFACOptions())
    own = problem.objective
    in_bfloat16 = DenoisingObjective(own.model, own.process, autocast=torch.bfloat16)

    def factors(seed: int, objective: DenoisingObjective = own) -> KroneckerFactors:
        regression = NoisedRegression(objective, problem.x0, DRAWS, seed, batch_size=128)
        return kronecker_factors(regression, plan)

    ways = {
        "products in float32": (None, factors),
        "products in TF32": (rounded_to_tf32, factors),
        "products in bfloat16": (rounded_to_bfloat16, factors),
        "the network under autocast to bfloat16": (None, partial(factors, objective=in_bfloat16)),
    }
    errors: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.repeats):
        truth = factors(seed)
        for name, (rounded, run) in ways.items():
            with operands(rounded):
                errors.setdefault(name, []).append(factor_errors(run(seed), truth))
        errors.setdefault("other draws", []).append(factor_errors(factors(1000 + seed), truth))
    rows = [
        {"of": name} | {side: round(mean(one[side] for one in found), 5) for side in found[0]}
        for name, found in errors.items()
    ]
    settings = {"examples": len(problem.x0), "draws": DRAWS}
    report(options, "precision", __doc__, {**settings, "precisions": rows})


if __name__ == "__main__":
    main()
