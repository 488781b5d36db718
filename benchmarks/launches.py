"""How many kernels would a GPU be told of? Counted on a CPU, for small networks of three kinds.

What a second batch adds, of each pass, and that as a multiple of a training pass' (forward and full
backward over a batch that lies there). A small network waits for the host, so that this ratio is
that of times then. Views and other operations without a kernel are not counted; what is fixed is
counted apart: trying the network out, zeros to add to.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.gpu import CASES, DRAWS, Case, passes_of
from benchmarks.measure import Launches, arguments, report
from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.layers import products

EXAMPLES = 4
COUNTED = {"UNet 2.8 M": "UNet", "DiT": "DiT", "UNet 860 M, LoRA, bf16": "UNet, LoRA, bfloat16"}


def launches_of(case: Case, batches: int) -> dict[str, int]:
    """Of each pass over so many batches."""
    first = case.regression(argparse.Namespace(device="cpu", quick=True))
    clean = next(first.clean_batches())
    count = batches * EXAMPLES

    def repeated(z: Any) -> Any:
        return z[:1].expand(count, *z.shape[1:]).contiguous() if isinstance(z, Tensor) else z

    data = {"x0": repeated(clean.x0)} | {k: repeated(z) for k, z in clean.condition.items()}
    regression = NoisedRegression(first.objective, data, 1, batch_size=EXAMPLES)
    found = {}
    for name, run in passes_of(replace(case, peers=False), regression):
        with Launches() as launches:
            run()
        found[name] = launches.count
    return found


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with patch.object(products, "TENSOR_CORES", {"cpu"}):  # as on a GPU
        for case in CASES:
            if case.name not in COUNTED or (options.quick and rows):
                continue
            one, two = (launches_of(case, batches) for batches in (1, 2))
            unit = two["training pass"] - one["training pass"]
            for name in one:
                more = two[name] - one[name]
                draws = DRAWS if name.startswith("gradient rows") else 1
                rows.append(
                    {
                        "network": COUNTED[case.name],
                        "pass": name,
                        "launches": more,
                        "training_passes_a_draw": round(more / unit / draws, 2),
                        "fixed": one[name] - more,
                    }
                )
    report(options, "launches", __doc__, {"launches": rows})


if __name__ == "__main__":
    main()
