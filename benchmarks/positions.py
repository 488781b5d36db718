"""How many positions of a layer do Kronecker factors need? Error against time.

A UNet with attention is trained on patches of 32×32 pixels of scikit-learn's two photographs; its
factors, of 128 patches with four draws each, come from all positions of the layers (1,024 at most),
or from a random sample. Errors are relative Frobenius errors, averaged over the layers, against the
factors of many draws and all positions. Time is that of the processor.
"""

from __future__ import annotations

import time
import warnings
from statistics import mean, median

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.accuracy import factor_errors
from benchmarks.measure import arguments, report
from benchmarks.problems import separate_patches
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import covered_parameters

SIZE = 32
DRAWS = 4
MOST = (None, 256, 64, 16, 4)


def trained(x0: Tensor, steps: int) -> UNet2DModel:
    """A UNet trained on patches."""
    torch.manual_seed(0)
    network, scheduler = (
        UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        DDPMScheduler(),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        batch = x0[torch.randint(len(x0), (16,))]
        noise = torch.randn_like(batch)
        t = torch.randint(1000, (len(batch),))
        loss = mse_loss(network(scheduler.add_noise(batch, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    x0 = separate_patches(SIZE)
    network = trained(x0, 2 if options.quick else 600)
    objective = DenoisingObjective(network.to(options.device), DDPMScheduler())
    some = x0[: 4 if options.quick else 128]
    coverage = covered_parameters(network, None)

    def factors(draws: int, seed: int, probes: int, most: int | None) -> KroneckerFactors:
        regression = NoisedRegression(objective, some, draws, seed, batch_size=32)
        plan = BlockPlan.of(coverage, KFACOptions(mc_samples=probes, max_positions=most))
        return kronecker_factors(regression, plan)

    truth = factors(DRAWS if options.quick else 64, 1000, 2, None)
    found: dict[int | None, list[tuple[float, float, float]]] = {most: [] for most in MOST}
    for seed in range(1 + options.repeats):
        for most in MOST:
            start = time.process_time()
            estimate = factors(DRAWS, seed, 1, most)
            seconds = time.process_time() - start
            errors = factor_errors(estimate, truth)
            if seed > 0:  # the first round warms up
                found[most].append((seconds, *errors.values()))
    rows = []
    for most, measured in found.items():
        taken, A, B = zip(*measured, strict=True)
        seconds, error_A, error_B = median(taken), mean(A), mean(B)
        rows.append(
            {
                "positions": "all" if most is None else f"{most}",
                "seconds": round(seconds, 2),
                "error_A": round(error_A, 4),
                "error_B": round(error_B, 4),
                "squared_error_A_times_seconds": round(error_A**2 * seconds, 5),
                "squared_error_B_times_seconds": round(error_B**2 * seconds, 5),
            }
        )
    settings = {"examples": len(some), "draws": DRAWS, "pixels": SIZE**2}
    report(options, "positions", __doc__, {**settings, "positions": rows})


if __name__ == "__main__":
    main()
