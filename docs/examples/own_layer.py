"""A layer type of your own
=========================

A network with a layer that this library does not know is covered all the same: its parameters get
an exact block, dense if they are few and diagonal if they are many. What is needed for a Kronecker
product is to say what the layer does: which inputs its weight multiplies, at how many positions.
"""

# %%
# A layer that multiplies a low-dimensional weight onto *differences* of neighbouring pixels.

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.layers import LAYER_KINDS, SharingKind


class Differences(nn.Module):
    """Maps the differences of each pixel to its right and lower neighbour, ``[N, C, H, W]``."""

    def __init__(self, channels, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, 2 * channels) / (2 * channels) ** 0.5)

    def neighbours(self, x):
        """Differences, ``[N, 2C, H, W]``."""
        return torch.cat([x - x.roll(1, -1), x - x.roll(1, -2)], 1)

    def forward(self, x):
        """The features of each pixel, ``[N, F, H, W]``."""
        return torch.einsum("fc,nchw->nfhw", self.weight, self.neighbours(x))


# %%
# A kind of layer with weight sharing names two things: the inputs ``[N, S, I]`` that the weight
# multiplies, and the gradient in the output as ``[N, S, O]``. Here the positions ``S`` are pixels.


class DifferencesKind(SharingKind):
    """How :class:`Differences` shares its weight over pixels."""

    joint = False  # there is no bias

    def inputs(self, module, x):
        """The differences at every pixel."""
        return module.neighbours(x).flatten(2).mT

    def gradients(self, module, g):
        """The gradient of every pixel's features."""
        return g.flatten(2).mT


# %%
# Registered, it is treated as every other layer. Without, its 48 entries would be a dense block.


class Network(nn.Module):
    """A tiny denoiser that takes no notice of the time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Differences(3, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, t):
        """The noise."""
        return self.layers(x)


torch.manual_seed(0)
objective = DenoisingObjective(Network(), DDPMScheduler())
regression = NoisedRegression(objective, torch.rand(32, 3, 8, 8) * 2 - 1, num_draws=8)
name = ["layers.0.weight"]
unknown = DiffusionEKFACLinearOperator(regression, name, mc_samples=16)
LAYER_KINDS[Differences] = DifferencesKind()
known = DiffusionEKFACLinearOperator(regression, name, mc_samples=16)
print(unknown)
print(known)

# %%
# Against the exact GGN of these weights, column by column.

identity = torch.eye(known.shape[0])
exact = DiffusionGGNLinearOperator(regression, name) @ identity
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
titles = ("exact GGN", "unknown layer: dense block", "known layer: EK-FAC")
matrices = (exact, unknown @ identity, known @ identity)
for axis, title, matrix in zip(axes, titles, matrices, strict=True):
    axis.imshow(matrix, cmap="RdBu", vmin=-exact.abs().max(), vmax=exact.abs().max())
    error = ((matrix - exact).norm() / exact.norm()).item()
    axis.set_title(f"{title}\n(error {error:.2f})", fontsize=9)
    axis.axis("off")

assert [block.kind for block in unknown.blocks] == ["dense"]
assert [block.kind for block in known.blocks] == ["eigenbasis"]
assert abs(known.trace() / exact.trace() - 1) < 0.1, "EK-FAC has the trace of the exact GGN"
assert (known @ identity - exact).norm() < 0.6 * exact.norm()
