"""Natural gradient against Adam
==============================

A damped inverse of K-FAC, times a gradient, is a natural-gradient step. Here it trains a denoiser
for two hundred steps next to Adam, the curvature being refreshed now and then from a few images.
"""

# %%
# The same network, weights, batches, timesteps and noise for both. The last images are held out:
# some to choose the learning rates by, others for the comparison.

import copy
import math
import time
import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet
from torch.nn.functional import mse_loss

from curvlinops_diffusion import DenoisingObjective, DiffusionKFACLinearOperator, NoisedRegression

warnings.simplefilter("ignore")
torch.set_num_threads(1)  # so that processor time is work, not waiting for another thread
torch.manual_seed(0)
images, _ = digits()
held_out = {"choose": images[1500:1648], "test": images[1648:]}
start, scheduler = make_unet(), DDPMScheduler()
batch_size = 128


def loss_of(unet, step):
    """The loss of a step's batch."""
    generator = torch.Generator().manual_seed(step)
    clean = images[torch.randint(1500, (batch_size,), generator=generator)]
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (batch_size,), generator=generator)
    return mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise)


@torch.no_grad()
def held_out_loss(unet, split):
    """The loss of held-out images, on fixed draws."""
    generator = torch.Generator().manual_seed(10**6)
    clean = held_out[split].repeat(4, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (len(clean),), generator=generator)
    loss = mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise).item()
    return loss if math.isfinite(loss) else math.inf


class Run:
    """Held-out losses of a network in training, and the processor's seconds for its steps alone."""

    def __init__(self):
        self.steps, self.seconds = [], [0.0]
        self.losses = {split: [] for split in held_out}

    def measure(self, unet, step, began):
        """Every twentieth step; returns when the next steps begin."""
        self.seconds.append(self.seconds[-1] + time.process_time() - began)
        self.steps.append(step + 1)
        for split, losses in self.losses.items():
            losses.append(held_out_loss(unet, split))
        return time.process_time()

    @property
    def diverged(self):
        """Whether there is no use in going on."""
        return math.inf in self.losses["choose"]


# %%
# Adam, its learning rate falling to zero.


def train_by_adam(rate, steps=200):
    """A run of Adam."""
    unet, run, began = copy.deepcopy(start), Run(), time.process_time()
    optimizer = torch.optim.Adam(unet.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(unet, step).backward()
        optimizer.step()
        if step % 20 == 19:
            began = run.measure(unet, step, began)
    return run


# %%
# Natural gradient: K-FAC of 128 images with two draws each, anew every 20 steps (the first time
# after 2), and momentum. ``inverse`` damps exactly, in the eigenbasis.


def train_by_natural_gradient(rate, steps=200, damping=0.03, momentum=0.9):
    """A run of natural gradient."""
    unet, run, began = copy.deepcopy(start), Run(), time.process_time()
    params = list(unet.parameters())
    velocities = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        if run.diverged:
            break
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
            began = run.measure(unet, step, began)
    return run


# %%
# Three learning rates each, the best by held-out images. Nothing else is chosen here: Adam has
# PyTorch's defaults, natural gradient a damping and a momentum found beforehand.

rates = {train_by_adam: (2e-3, 5e-3, 1e-2), train_by_natural_gradient: (0.02, 0.05, 0.1)}
best = {}
for method, tried in rates.items():
    runs = {rate: method(rate) for rate in tried}
    for rate, run in runs.items():
        print(f"{method.__name__}({rate:g}): {run.losses['choose'][-1]:.4f}")
    chosen = min(runs, key=lambda rate: runs[rate].losses["choose"][-1])
    best[method] = chosen, runs[chosen]
(adam_rate, adam), (natural_rate, natural) = best.values()

# %%
# A step of natural gradient costs more. So that counting steps does not favour it: Adam once more,
# with as many steps as it takes in the same time.

more_steps = int(200 * natural.seconds[-1] / adam.seconds[-1]) // 20 * 20
results = {
    f"Adam, {adam_rate:g}": adam,
    f"Adam, {adam_rate:g}, as long": train_by_adam(adam_rate, more_steps),
    f"natural gradient, {natural_rate:g}": natural,
}
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for name, run in results.items():
    losses = run.losses["test"]
    for axis, along in zip(axes, (run.steps, run.seconds[1:]), strict=True):
        axis.semilogy(along, losses, label=name)
    print(f"{name}: {losses[-1]:.4f} after {run.steps[-1]} steps, {run.seconds[-1]:.0f} s")
axes[0].set(xlabel="step", ylabel="loss of held-out digits")
axes[1].set(xlabel="seconds of processor time")
axes[0].legend()
figure.tight_layout()

# %%
# Step for step natural gradient is clearly ahead of the best Adam. In the same time it is not: with
# as many steps as natural gradient's time allows, Adam comes out about even. (That depends on the
# machine and is not checked.) Too large a rate makes natural gradient diverge, not far above its
# best one.

assert natural.losses["test"][-1] < 0.97 * adam.losses["test"][-1], "ahead for equal steps"
