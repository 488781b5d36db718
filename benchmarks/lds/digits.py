"""The problem: a UNet of 175,000 parameters, trained on 1,000 of scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from benchmarks.problems import example
from curvlinops_diffusion import DenoisingObjective, ExampleGradientLinearOperator, NoisedRegression

TRAIN, HELD_OUT, GENERATED = 1000, 64, 64
STEPS = 1500  # on the whole; halves are trained for half as many
HALVES, SEEDS = 64, 2
MEASUREMENTS = ("loss", "simplified_elbo")
MEASURED_DRAWS = 64
MEASURED_SEED = 12345

_demo = example("influence_digits")


def data() -> tuple[Tensor, Tensor]:
    """Training digits ``[1000, 1, 8, 8]`` and held-out ones, ``[64, 1, 8, 8]``."""
    x0, _ = _demo.digits()
    order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(0))
    chosen = x0[order[: TRAIN + HELD_OUT]]
    return chosen[:TRAIN], chosen[TRAIN:]


def halves() -> Tensor:
    """Random halves of the training digits, ``[64, 1000]``."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(HALVES, TRAIN, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(TRAIN, generator=generator)[: TRAIN // 2]] = True
    return masks


def trained(x0: Tensor, steps: int, seed: int) -> UNet2DModel:
    """A network trained on some digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network: UNet2DModel = _demo.make_unet()
        _demo.train(network, DDPMScheduler(), x0, steps)
    return network.eval()


def generated(network: UNet2DModel) -> Tensor:
    """Samples of a network, ``[64, 1, 8, 8]``."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        samples: Tensor = _demo.generate(network, DDPMScheduler(), GENERATED)
    return samples.clamp(-1, 1)


def loaded(weights: Mapping[str, Tensor]) -> UNet2DModel:
    """A network with given weights."""
    network: UNet2DModel = _demo.make_unet()
    network.load_state_dict(dict(weights))
    return network.eval()


def measured(network: UNet2DModel, queries: Tensor) -> Tensor:
    """Each measurement of each query, on draws that are the same for all networks, ``[M, Q]``."""
    objective = DenoisingObjective(network, DDPMScheduler())
    regression = NoisedRegression(
        objective, queries, MEASURED_DRAWS, MEASURED_SEED, batch_size=len(queries)
    )
    return torch.stack(
        [ExampleGradientLinearOperator(regression, measurement=m).values() for m in MEASUREMENTS]
    )
