"""Fisher-weighted merging of two fine-tuned models
=================================================

A model is tuned twice, to the digits 0 to 4 and to the digits 5 to 9. One network that does both,
without training it: the minimum of the two losses' second-order expansions about their own minima::

    θ = (F₁ + F₂ + 2λI)⁻¹ ((F₁ + λI) θ₁ + (F₂ + λI) θ₂)

(Matena & Raffel, 2022, with the diagonal of ``F``; here with EK-FAC, and by conjugate gradients,
since a sum of Kronecker products has no closed inverse.)
"""

# %%
# A UNet trained for a few seconds on two thirds of scikit-learn's digits, and tuned to each half of
# the classes. The other images are for choosing the damping, and for the comparison.

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
halves = {"0 to 4": classes < 5, "5 to 9": classes > 4}
number = torch.arange(len(images))
splits = {
    "train": number < 1197,
    "choose": (number >= 1197) & (number < 1497),
    "test": number >= 1497,
}
base = make_unet()
train(base, scheduler, images[splits["train"]], steps=150)
tuned = {}
for name, half in halves.items():
    tuned[name] = copy.deepcopy(base)
    train(tuned[name], scheduler, images[splits["train"] & half], steps=150)


@torch.no_grad()
def losses_of(unet, split):
    """The training loss on each half of a split, on four fixed draws of each image."""
    return [loss(unet.eval(), images[splits[split] & half]) for half in halves.values()]


@torch.no_grad()
def loss(unet, clean):
    """Over fixed draws."""
    generator = torch.Generator().manual_seed(1)
    clean = clean.repeat(4, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(1000, (len(clean),), generator=generator)
    return mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise).item()


# %%
# The curvature of each tuned model, on what it was tuned to.

weights, curvature = {}, {}
for name, unet in tuned.items():
    own = images[splits["train"] & halves[name]]
    objective = DenoisingObjective(unet.eval(), scheduler)
    regression = NoisedRegression(objective, own, num_draws=2, batch_size=256)
    curvature[name] = DiffusionEKFACLinearOperator(regression)
    weights[name] = parameters_to_vector(unet.parameters()).detach()

# %%
# Merging, at several dampings: with a large one it is the plain mean. One is chosen by images which
# nothing was trained on, and compared on others again.

(F1, F2), (theta1, theta2) = curvature.values(), weights.values()
identity = F1.power(0.0)


def merged(damping):
    """The weights that minimise the sum of both expansions."""
    damped = F1 + F2 + (2 * damping) * identity
    right = F1 @ theta1 + F2 @ theta2 + damping * (theta1 + theta2)
    start = (theta1 + theta2) / 2  # whose correction is small
    inverse = CGInverseLinearOperator(damped, max_iter=200, tolerance=1e-4)
    return start + inverse @ (right - damped @ start)


def with_weights(vector):
    """A network of these weights."""
    network = copy.deepcopy(base)
    vector_to_parameters(vector, network.parameters())
    return network


merged_networks = {d: with_weights(merged(d)) for d in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)}
chosen_by = {d: sum(losses_of(network, "choose")) / 2 for d, network in merged_networks.items()}
for damping, value in chosen_by.items():
    print(f"λ = {damping:<6g} mean loss of the images to choose by {value:.4f}")
best = min(chosen_by, key=chosen_by.get)

# %%
# The smaller the damping the better, down to 1e-4; from there on it changes nothing. On the test
# images, the network that is merged by curvature is better on both halves than the
# plain mean, and better on average than either tuned model.

networks = {f"tuned to {name}": unet for name, unet in tuned.items()}
networks["plain mean"] = with_weights((theta1 + theta2) / 2)
networks[f"EK-FAC, λ = {best:g}"] = merged_networks[best]
losses = {name: losses_of(network, "test") for name, network in networks.items()}
for name, both in losses.items():
    print(f"{name:20} {both[0]:.4f} {both[1]:.4f}   mean {sum(both) / 2:.4f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.semilogx(list(chosen_by), list(chosen_by.values()), "o-", label="merged by EK-FAC")
left.axhline(sum(losses_of(networks["plain mean"], "choose")) / 2, color="gray", label="plain mean")
left.set(xlabel="λ", ylabel="mean loss of the images to choose by")
left.legend()
positions = torch.arange(len(losses))
for k, half in enumerate(halves):
    heights = [both[k] for both in losses.values()]
    right.bar(positions + 0.4 * k - 0.2, heights, 0.4, label=half)
right.set_xticks(positions, losses, rotation=15, ha="right", fontsize=8)
right.set(ylabel="loss of test images", ylim=(0.9 * min(map(min, losses.values())), None))
right.legend(title="digits")
figure.tight_layout()

*of_tuned, plain, by_curvature = losses.values()
for of_mean, of_merged in zip(plain, by_curvature, strict=True):
    assert of_merged < of_mean, "curvature should help on both halves"
assert sum(by_curvature) < min(map(sum, of_tuned)), "and beat either tuned model on average"
assert abs(chosen_by[1e-5] - chosen_by[1e-4]) < 5e-4, "smaller dampings change nothing more"
