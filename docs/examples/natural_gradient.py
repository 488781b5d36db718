"""Natural gradient against Adam
==============================

A damped inverse of K-FAC, times a gradient, is a natural-gradient step. Here it trains a denoiser
for two hundred steps next to Adam, the curvature being refreshed now and then from a few images.
"""

# %%
# The same network, weights, batches, timesteps and noise for both.

import copy
import time
import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet
from torch.nn.functional import mse_loss

from curvlinops_diffusion import DenoisingObjective, DiffusionKFACLinearOperator, NoisedRegression

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, _ = digits()
start, scheduler = make_unet(), DDPMScheduler()
steps, batch_size = 200, 128


def loss_of(unet, step):
    """The loss of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    clean = images[torch.randint(1500, (batch_size,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (batch_size,), generator=generator)
    return mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)


@torch.no_grad()
def held_out(unet):
    """The loss of held-out images, on fixed draws."""
    generator = torch.Generator().manual_seed(10**6)
    clean = images[1500:].repeat(2, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (len(clean),), generator=generator)
    return mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise).item()


# %%
# Adam, its learning rate falling to zero.


def train_by_adam(rate):
    """Losses of held-out images, and seconds."""
    unet, began, losses = copy.deepcopy(start), time.perf_counter(), []
    optimizer = torch.optim.Adam(unet.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(unet, step).backward()
        optimizer.step()
        if step % 20 == 19:
            losses.append(held_out(unet))
    return losses, time.perf_counter() - began


# %%
# Natural gradient: K-FAC of 128 images with two draws each, anew every 20 steps (the first time
# after 2), and momentum. ``inverse`` damps exactly, in the eigenbasis.


def train_by_natural_gradient(rate, damping, momentum=0.9):
    """The same for natural gradient."""
    unet, began, losses = copy.deepcopy(start), time.perf_counter(), []
    params = list(unet.parameters())
    velocities = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        if step % 20 == 0 or step == 2:
            objective = DenoisingObjective(unet.eval(), scheduler)
            chosen = images[torch.randperm(1500)[:128]]
            regression = NoisedRegression(objective, chosen, num_draws=2, seed=step, batch_size=128)
            inverse = DiffusionKFACLinearOperator(regression).inverse(damping)
            unet.train()
        gradient = torch.autograd.grad(loss_of(unet, step), params)
        natural = inverse @ list(gradient)  # in the parameters' own shapes
        with torch.no_grad():
            for p, velocity, direction in zip(params, velocities, natural, strict=True):
                velocity.mul_(momentum).add_(direction)
                p -= rate * (1 - step / steps) * velocity
        if step % 20 == 19:
            losses.append(held_out(unet))
    return losses, time.perf_counter() - began


results = {
    "Adam, 5e-3": train_by_adam(5e-3),
    "Adam, 1e-2": train_by_adam(1e-2),
    "natural gradient": train_by_natural_gradient(rate=0.02, damping=0.03),
}

# %%
# Fewer steps for the same loss, though each costs more.

figure, axis = plt.subplots(figsize=(6, 4))
for name, (losses, seconds) in results.items():
    axis.semilogy(range(20, steps + 1, 20), losses, label=f"{name} ({seconds:.0f} s)")
    print(f"{name}: {losses[-1]:.4f} after {seconds:.0f} s")
axis.set(xlabel="step", ylabel="loss of held-out digits")
axis.legend()

best_adam = min(losses[-1] for name, (losses, _) in results.items() if "Adam" in name)
assert results["natural gradient"][0][-1] < best_adam
