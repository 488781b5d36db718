"""Laplace: how sure is a denoiser of each pixel?
===============================================

The Laplace approximation takes the weights of a trained network as ``N(θ, (N G + τ I)⁻¹)``.
Samples of it are powers of an operator: ``(K + τ/N I)^(-1/2)`` turns white noise into them. What
they disagree about, pixel by pixel, the network has not learnt.
"""

# %%
# A UNet with attention, trained for a few seconds on scikit-learn's digits, and its K-FAC.

import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet, train
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlinops_diffusion import DenoisingObjective, DiffusionKFACLinearOperator, NoisedRegression

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, _ = digits()
train_images, test_images = images[:1500], images[1500:]
unet, scheduler = make_unet(), DDPMScheduler()
train(unet, scheduler, train_images, steps=250)
objective = DenoisingObjective(unet.eval(), scheduler)
K = DiffusionKFACLinearOperator(
    NoisedRegression(objective, train_images, num_draws=2, batch_size=256)
)

# %%
# Twenty samples of the weights. The loss is an average over ``N`` images, so that the posterior's
# precision is ``N`` times the damped curvature.

N, prior_precision, count = len(train_images), 1e4, 20
root = K.power(-0.5, damping=prior_precision / N)
deviations = root @ torch.randn(K.shape[0], count) / N**0.5

# %%
# What the network makes of held-out digits with noise, and its standard deviation over the samples
# of the weights: once with the weights put into the network, once to first order, ``J (θ' − θ)``,
# which forward-mode differentiation gives.

t = 250
clean = test_images[:64]
alpha = scheduler.alphas_cumprod[t]
x_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(clean.shape)
params = {name: p.detach() for name, p in unet.named_parameters()}
shapes = [p.shape for p in params.values()]


def denoised(params):
    """The network's guess of the clean images."""
    prediction = functional_call(unet, params, (x_t, torch.full((len(x_t),), t))).sample
    return (x_t - (1 - alpha).sqrt() * prediction) / alpha.sqrt()


sampled, linear = [], []
with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
    for deviation in deviations.T:
        pieces = deviation.split([shape.numel() for shape in shapes])
        change = {
            name: piece.reshape(shape)
            for name, piece, shape in zip(params, pieces, shapes, strict=True)
        }
        guess, first_order = jvp(denoised, (params,), (change,))
        linear.append(first_order)
        sampled.append(denoised({name: p + change[name] for name, p in params.items()}))
uncertainty, to_first_order = torch.stack(sampled).std(0), torch.stack(linear).std(0)

# %%
# The two agree where the posterior is narrow enough for the network to be linear in its weights.
# They say where the weights matter, which is not where the network errs: the error is mostly that
# of noise which no network could know. Nor is it surer of digits than of their negatives; a
# denoiser's Laplace approximation is no detector of strange images.

error = (guess - clean).abs()
figure, axes = plt.subplots(5, 10, figsize=(10, 5.2))
rows = {
    "clean": clean,
    "denoised": guess,
    "error": error,
    "uncertainty": uncertainty,
    "to first order": to_first_order,
}
for row, (name, shown) in zip(axes, rows.items(), strict=True):
    signed = name in ("clean", "denoised")
    for axis, image in zip(row, shown, strict=False):
        axis.imshow(
            image[0],
            cmap="gray_r" if signed else "magma",
            vmin=-1 if signed else 0,
            vmax=1 if signed else shown.quantile(0.98),
        )
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
figure.tight_layout()


def correlation(x, y):
    """Of two images' pixels."""
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


print(f"mean uncertainty {uncertainty.mean():.3f}, mean error {error.mean():.3f}")
print(f"correlation with first order {correlation(uncertainty, to_first_order):.2f}")
print(f"correlation with the error {correlation(uncertainty, error):.2f}")
assert correlation(uncertainty, to_first_order) > 0.8
assert abs(uncertainty.mean() / to_first_order.mean() - 1) < 0.2
