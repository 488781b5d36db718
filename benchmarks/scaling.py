"""How does the price of a factor pass grow with the batch, the network's width, and image size?

Ours and curvlinops', as multiples of a training pass over the same 32 images. The eigenbases are
random matrices, on whose entries the time does not depend.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from benchmarks.factor_pass import our_passes, reference_passes, upstream_passes
from benchmarks.measure import arguments, in_training_passes, report
from benchmarks.problems import regression_of, unet

BASE = {"batch_size": 32, "width": 64, "image_size": 16}
VARIED: dict[str, tuple[int, ...]] = {
    "batch_size": (1, 8),
    "width": (32, 96),
    "image_size": (8, 32),
}
COMPARED = ("K-FAC factors", "EK-FAC eigenvalues", "curvlinops K-FAC factors")


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    settings = [BASE] + [BASE | {name: v} for name, values in VARIED.items() for v in values]
    table: list[dict[str, Any]] = []
    for setting in settings[:2] if options.quick else settings:
        torch.manual_seed(0)
        size = 8 if options.quick else setting["image_size"]
        network = unet(options.quick, size, setting["width"])
        num_data = 4 if options.quick else 32
        regression = regression_of(network, options.device, num_data, setting["batch_size"])
        passes = (
            reference_passes(regression)
            | our_passes(regression, decomposed=False)
            | upstream_passes(regression, decomposed=False)
        )
        passes = {name: passes[name] for name in ("training pass", *COMPARED)}
        result = in_training_passes(passes, options)
        ratios = {name: result["training_passes"][name] for name in COMPARED}
        table.append(setting | {"training pass": result["seconds"]["training pass"]} | ratios)
    report(options, "scaling", __doc__, {"examples": 32, "settings": table})


if __name__ == "__main__":
    main()
