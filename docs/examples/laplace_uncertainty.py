"""Laplace: how sure is a denoiser of each pixel?
===============================================

The Laplace approximation takes the weights of a trained network as ``N(θ, (M G + τ I)⁻¹)``.
Samples of it are powers of an operator: ``(K + τ/M I)^(-1/2)`` turns white noise into them. They
disagree, pixel by pixel, where the data leave open what the weights should predict.
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
# How much the data weigh against the prior. ``K`` is that of a squared error, averaged over ``D``
# pixels. The likelihood of ``N`` images, with Gaussian errors of variance ``s²``, is
# ``M = N D / (2 s²)`` times as curved. The prior's precision ``τ`` is the one of most evidence, at
# which ``τ ‖θ‖²`` is the number of weights that the data determine (MacKay, 1992). All that takes
# are the eigenvalues of ``K``.

with torch.no_grad():
    noise, t = torch.randn(train_images.shape), torch.randint(1000, (len(train_images),))
    prediction = unet(scheduler.add_noise(train_images, noise, t), t).sample
    variance = (prediction - noise).square().mean().item()
M = len(train_images) * noise[0].numel() / (2 * variance)
eigenvalues = K.eigenvalues().double().clamp(min=0)
squared_norm = sum(p.detach().square().sum().item() for p in unet.parameters())
precision = 1.0
for _ in range(30):
    determined = (eigenvalues / (eigenvalues + precision / M)).sum().item()
    precision = determined / squared_norm
damping = precision / M
above = int((eigenvalues > damping).sum())
print(f"prior precision {precision:.0f}, damping {damping:.1e}")
print(
    f"{above:,} of {len(eigenvalues):,} eigenvalues above it, {determined:,.0f} weights determined"
)

# %%
# Samples of the weights, and white noise of the same lengths to compare with: what the
# samples would be if the curvature were the same in all directions.

count = 64
deviations = K.power(-0.5, damping=damping) @ torch.randn(K.shape[0], count) / M**0.5
white = torch.randn(deviations.shape)
white *= deviations.norm(dim=0) / white.norm(dim=0)

# %%
# What the network makes of held-out digits with noise, and how much that varies over the samples to
# first order, ``J (θ' − θ)``, which forward-mode differentiation gives.

t = 250
clean = test_images[:32]
alpha = scheduler.alphas_cumprod[t]
x_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn(clean.shape)
params = {name: p.detach() for name, p in unet.named_parameters()}
shapes = [p.shape for p in params.values()]


def denoised(params):
    """The network's guess of the clean images."""
    prediction = functional_call(unet, params, (x_t, torch.full((len(x_t),), t))).sample
    return (x_t - (1 - alpha).sqrt() * prediction) / alpha.sqrt()


def changes(deviations):
    """Each column as changes of the parameters by name."""
    for deviation in deviations.T:
        pieces = deviation.split([shape.numel() for shape in shapes])
        yield {
            name: piece.reshape(shape)
            for name, piece, shape in zip(params, pieces, shapes, strict=True)
        }


@torch.no_grad()
def to_first_order(deviations):
    """Standard deviation of each pixel, of the network linearised in its weights."""
    with sdpa_kernel(SDPBackend.MATH):  # the attention that has forward-mode derivatives
        moved = [jvp(denoised, (params,), (change,))[1] for change in changes(deviations)]
    return torch.stack(moved).std(0)


@torch.no_grad()
def in_the_network(deviations):
    """The same with the samples put into the network."""
    moved = [
        denoised({k: p + change[k] for k, p in params.items()}) for change in changes(deviations)
    ]
    return torch.stack(moved).std(0)


def correlation(x, y):
    """Of two images' pixels."""
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


uncertainty, of_white_noise = to_first_order(deviations), to_first_order(white)
with torch.no_grad():
    guess = denoised(params)
error = (guess - clean).abs()
print(
    f"uncertainty {uncertainty.mean():.2f}, with white noise {of_white_noise.mean():.2f}", end=", "
)
print(f"correlation of their pixels {correlation(uncertainty, of_white_noise):.2f}")
print(f"mean error {error.mean():.2f}, its correlation with the uncertainty", end=" ")
print(f"{correlation(uncertainty, error):.2f}")
sampled = {size: in_the_network(size * deviations) / size for size in (1, 0.1)}
for size, std in sampled.items():
    print(f"samples of {size} times their length put into the network: {std.mean():.2f}", end=", ")
    print(f"correlation {correlation(std, uncertainty):.2f}")

# %%
# Curvature holds back the directions that matter to what the network predicts: white noise of the
# same length would make it several times as unsure, and often at other pixels.
#
# The linearised network is the one to ask (Immer et al., 2021). Samples put into the network itself
# agree with it at a tenth of their length; at their whole length they leave the region where the
# network is linear.
#
# The uncertainty says where the weights matter, which has little to do with where the network errs:
# the error is mostly that of noise which no network could know.

figure, axes = plt.subplots(5, 10, figsize=(10, 5.2))
rows = {
    "clean": clean,
    "denoised": guess,
    "error": error,
    "uncertainty": uncertainty,
    "of white noise": of_white_noise,
}
for row, (name, shown) in zip(axes, rows.items(), strict=True):
    signed = name in ("clean", "denoised")
    for axis, image in zip(row, shown, strict=False):
        axis.imshow(
            image[0],
            cmap="gray_r" if signed else "magma",
            vmin=-1 if signed else shown.quantile(0.02),
            vmax=1 if signed else shown.quantile(0.98),
        )
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
figure.tight_layout()

assert above > 10_000, "the data should determine many weights"
assert of_white_noise.mean() > 3 * uncertainty.mean(), "K is far from a multiple of the identity"
assert correlation(sampled[0.1], uncertainty) > 0.8
assert abs(sampled[0.1].mean() / uncertainty.mean() - 1) < 0.2
