"""How many kernels would a GPU be told of, and how long does telling take? Seen on a CPU.

For small networks of three kinds: what a second batch adds, of each pass, and that as a multiple of
a training pass' (forward and full backward over a batch that lies there). A small network waits for
the host, so that this ratio is that of times then. Views and other operations without a kernel are
not counted; what is fixed is counted apart: trying the network out, zeros to add to.

Telling takes about as long as a pass over batches of a single tiny image does on a CPU, whose
kernels have next to nothing to do.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.gpu import CASES, DRAWS, Case, passes_of
from benchmarks.measure import Launches, alternating, arguments, report
from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.layers import moments

EXAMPLES = 4
UNTRIED = (16, 31)  # batches between which the network is not tried out again
COUNTED = {"UNet 2.8 M": "UNet", "DiT": "DiT", "UNet 860 M, LoRA, bf16": "UNet, LoRA, bfloat16"}


def repeated(case: Case, batches: int, examples: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The passes over so many batches of so many examples."""
    first = case.regression(argparse.Namespace(device="cpu", quick=True))
    clean = next(first.clean_batches())
    count = batches * examples

    def rows(z: Any) -> Any:
        return z[:1].expand(count, *z.shape[1:]).contiguous() if isinstance(z, Tensor) else z

    data = {"x0": rows(clean.x0)} | {k: rows(z) for k, z in clean.condition.items()}
    regression = NoisedRegression(first.objective, data, 1, batch_size=examples)
    return passes_of(replace(case, peers=False), regression)


def launches_of(case: Case, batches: int) -> dict[str, int]:
    """Of each pass over so many batches."""
    found = {}
    for name, run in repeated(case, batches, EXAMPLES):
        with Launches() as launches:
            run()
        found[name] = launches.count
    return found


def telling(case: Case, rounds: int) -> dict[str, float]:
    """Seconds that each pass takes for a batch of a single example more."""
    few, many = UNTRIED
    passes = {number: dict(repeated(case, number, 1)) for number in UNTRIED}
    seconds = alternating(
        {f"{name} {number}": passes[number][name] for name in passes[few] for number in UNTRIED},
        rounds,
    )
    return {
        name: (seconds[f"{name} {many}"] - seconds[f"{name} {few}"]) / (many - few)
        for name in passes[few]
    }


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with patch.object(moments, "TENSOR_CORES", {"cpu"}):  # as on a GPU
        for case in CASES:
            if case.name not in COUNTED or (options.quick and rows):
                continue
            one, two = (launches_of(case, batches) for batches in (1, 2))
            host = telling(case, 1 if options.quick else options.repeats)
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
                        "host_training_passes_a_draw": round(
                            host[name] / host["training pass"] / draws, 2
                        ),
                    }
                )
    report(options, "launches", __doc__, {"launches": rows})


if __name__ == "__main__":
    main()
