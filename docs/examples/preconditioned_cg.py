"""Conjugate gradients with a preconditioner from curvature
=========================================================

EK-FAC's inverse is an approximation; the exact damped inverse of the GGN can be had by conjugate
gradients, whose every iteration is a pass over the data. A preconditioner saves
iterations. This compares none, EK-FAC at the same damping, and at a hundred times as much
(:doc:`/attribution` says why the former helps little here, and can be worse than none).
"""

# %%
# A UNet trained for a few seconds, the exact GGN of few draws, EK-FAC of more.

import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet, train

from curvlinops_diffusion import (
    CGRefinedInverseLinearOperator,
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, _ = digits()
unet, scheduler = make_unet(), DDPMScheduler()
train(unet, scheduler, images, steps=200)
objective = DenoisingObjective(unet.eval(), scheduler)
few = NoisedRegression(objective, images[:32], num_draws=2, batch_size=64)
G = DiffusionGGNLinearOperator(few, chunk_size=16)
EK = DiffusionEKFACLinearOperator(NoisedRegression(objective, images[:512], 2, batch_size=256))
query = NoisedRegression(objective, images[-1:], num_draws=64, antithetic=True)
gradient = ExampleGradientLinearOperator(query).rows()[0]

# %%
# Forty iterations each, at a damping where the problem is hard.

damping = 1e-2
preconditioners = {
    "none": None,
    "EK-FAC": EK.inverse(damping),
    "EK-FAC, 100 times the damping": EK.inverse(100 * damping),
}
residuals = {}
for name, preconditioner in preconditioners.items():
    inverse = CGRefinedInverseLinearOperator(
        G, damping, preconditioner, max_iter=40, tolerance=1e-6
    )
    inverse @ gradient
    residuals[name] = torch.as_tensor(inverse.refinement.residuals).flatten()
    print(f"{name}: residual {residuals[name][-1]:.1e} after {len(residuals[name]) - 1} iterations")

# %%
# With more damping EK-FAC leaves the null space of the GGN nearly alone, and is ahead of both.

figure, axis = plt.subplots(figsize=(6, 4))
for name, history in residuals.items():
    axis.semilogy(history, label=name)
axis.set(xlabel="products with the GGN", ylabel="relative residual")
axis.legend()

last = {name: history[-1].item() for name, history in residuals.items()}
assert last["EK-FAC, 100 times the damping"] < min(last["none"], last["EK-FAC"])
