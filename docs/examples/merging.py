"""Fisher-weighted merging of two fine-tuned models
=================================================

A model is tuned twice, to the digits 0 to 4 and to the digits 5 to 9. One network that does both,
without training it: the minimum of the two losses' second-order expansions about their own minima::

    θ = (F₁ + F₂ + 2λI)⁻¹ ((F₁ + λI) θ₁ + (F₂ + λI) θ₂)

(Matena & Raffel, 2022, with the diagonal of ``F``; here with EK-FAC, and by conjugate gradients,
since a sum of Kronecker products has no closed inverse.)
"""

# %%
# A UNet trained for a few seconds on all of scikit-learn's digits, and tuned to each half of them.

import copy
import warnings

import matplotlib.pyplot as plt
import torch
from curvlinops import CGInverseLinearOperator
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet, train
from torch.nn.functional import mse_loss
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curvlinops_diffusion import DenoisingObjective, DiffusionEKFACLinearOperator, NoisedRegression

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, classes = digits()
scheduler = DDPMScheduler()
base = make_unet()
train(base, scheduler, images, steps=150)
halves = {"0 to 4": images[classes < 5], "5 to 9": images[classes > 4]}
tuned = {}
for name, own in halves.items():
    tuned[name] = copy.deepcopy(base)
    train(tuned[name], scheduler, own, steps=150)


@torch.no_grad()
def loss(unet, clean):
    """The training loss on fixed draws."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (len(clean),), generator=generator)
    return mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise).item()


# %%
# The curvature of each tuned model, on what it was tuned to.

weights, curvature = {}, {}
for name, unet in tuned.items():
    regression = NoisedRegression(
        DenoisingObjective(unet.eval(), scheduler), halves[name], num_draws=2, batch_size=256
    )
    curvature[name] = DiffusionEKFACLinearOperator(regression)
    weights[name] = parameters_to_vector(unet.parameters()).detach()

# %%
# Merging, at several dampings: with a large one it is the plain mean.

(F1, F2), (theta1, theta2) = curvature.values(), weights.values()
identity = F1.power(0.0)


def merged(damping):
    """The weights that minimise the sum of both expansions."""
    damped = F1 + F2 + (2 * damping) * identity
    right = F1 @ theta1 + F2 @ theta2 + damping * (theta1 + theta2)
    start = (theta1 + theta2) / 2  # whose correction is small
    inverse = CGInverseLinearOperator(damped, max_iter=200, tolerance=1e-4)
    return start + inverse @ (right - damped @ start)


candidates = {"plain mean": (theta1 + theta2) / 2}
candidates |= {f"EK-FAC, λ = {damping:g}": merged(damping) for damping in (1e-1, 1e-2, 1e-3)}
losses = {
    f"tuned to {name}": [loss(unet, own) for own in halves.values()] for name, unet in tuned.items()
}
network = copy.deepcopy(base).eval()
for name, vector in candidates.items():
    vector_to_parameters(vector, network.parameters())
    losses[name] = [loss(network, own) for own in halves.values()]
for name, both in losses.items():
    print(f"{name:20} {both[0]:.4f} {both[1]:.4f}   mean {sum(both) / 2:.4f}")

# %%
# Weighted by curvature the merged model is better on both halves than the plain mean.

figure, axis = plt.subplots(figsize=(7, 4))
positions = torch.arange(len(losses))
for k, half in enumerate(halves):
    axis.bar(positions + 0.4 * k - 0.2, [both[k] for both in losses.values()], 0.4, label=half)
axis.set_xticks(positions, losses, rotation=20, ha="right", fontsize=8)
axis.set_ylabel("loss")
axis.legend(title="digits")
figure.tight_layout()

means = {name: sum(both) / 2 for name, both in losses.items()}
best = min(means[name] for name in candidates if "EK-FAC" in name)
assert best < means["plain mean"], "curvature should help"
assert best < min(means[f"tuned to {name}"] for name in halves), "and beat either tuned model"
