"""Conditional and latent pipelines
=================================

A DiT pipeline denoises the latents of an autoencoder, given a class.
``DenoisingObjective.from_pipeline`` reads all of that off the pipeline: images go in, are encoded,
and are shown to the network with their class, dropped now and then as in training for guidance.
"""

# %%
# A small pipeline, trained for a few seconds on scikit-learn's digits. (Its autoencoder is left as
# it is initialised: a random, nearly linear code. Real ones are trained.) Latents are scaled, so
# that those of different images are a standard deviation of one apart.

import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from influence_digits import digits
from torch.nn.functional import mse_loss

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    influence_scores,
)

warnings.simplefilter("ignore")
torch.manual_seed(0)
images, classes = digits()
vae = AutoencoderKL(
    in_channels=1,
    out_channels=1,
    latent_channels=4,
    block_out_channels=(8,),
    norm_num_groups=4,
    layers_per_block=1,
    sample_size=8,
)
with torch.no_grad():
    means = vae.eval().encode(images).latent_dist.mean
vae.register_to_config(scaling_factor=1 / (means - means.mean(0)).std().item())
transformer = DiTTransformer2DModel(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    num_embeds_ada_norm=10,
    norm_num_groups=4,
)
pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())

# %%
# An encoder gives each image a distribution of latents. By default each draw takes another latent
# from it, as most training does. This network is trained on the means, since a random encoder's
# distributions are far wider than its means are apart; so curvature and gradients must be taken
# there as well: ``sample_latents=False``.

objective = DenoisingObjective.from_pipeline(pipeline, condition_dropout=0.1, sample_latents=False)

# %%
# Training as usual, the class dropped now and then (class 10 stands for none).

optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
latents = means * vae.config.scaling_factor
for _ in range(250):
    chosen = torch.randint(1600, (128,))
    t = torch.randint(1000, (128,))
    noise = torch.randn(latents[chosen].shape)
    label = classes[chosen].where(torch.rand(128) > 0.1, torch.tensor(10))
    noised = pipeline.scheduler.add_noise(latents[chosen], noise, t)
    loss = mse_loss(transformer(noised, t, label).sample, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
transformer.eval()
print(f"loss {loss.item():.3f}")

# %%
# Data are pairs of images and classes, here those of 400 of the training images. Operators and
# scores are what they always are. To see what
# the class does and what the image does, each query is asked a second time under a wrong class.

train_data = {"x0": images[:400], "class_labels": classes[:400]}
query_images, own_class = images[1600:1616], classes[1600:1616]
wrong_class = (own_class + 5) % 10
queries = {
    "x0": query_images.repeat(2, 1, 1, 1),
    "class_labels": torch.cat([own_class, wrong_class]),
}
EK = DiffusionEKFACLinearOperator(NoisedRegression(objective, train_data, 4, batch_size=128))
print(f"{EK.shape[0]:,} parameters in {len(EK.blocks)} blocks")
J_train = ExampleGradientLinearOperator(
    NoisedRegression(objective, train_data, 16, batch_size=64, antithetic=True)
)
J_query = ExampleGradientLinearOperator(
    NoisedRegression(objective, queries, 64, seed=1, antithetic=True)
)
scores, under_wrong_class = influence_scores(J_query, EK.inverse(1e-8), J_train).split(16)

# %%
# What helps an image is of the class that it is shown with: under a wrong class the most helpful
# images are of that one, and hardly any is of the image's own.

top = scores.topk(8).indices


def share(scores, of):
    """The part of the most helpful images that are of a query's class."""
    return (classes[:400][scores.topk(8).indices] == of.unsqueeze(1)).float().mean().item()


print(f"most helpful images of the query's class: {share(scores, own_class):.0%} (by chance 10%)")
print(f"under a wrong class, of the image's: {share(under_wrong_class, own_class):.0%}")
print(f"under a wrong class, of the given one: {share(under_wrong_class, wrong_class):.0%}")

# %%
# The class is not all: within it, the most helpful images look more like the query than the others.

distances = torch.cdist(query_images.flatten(1), images[:400].flatten(1))
nearer = []
for q, label in enumerate(own_class):
    of_class = (classes[:400] == label).nonzero().flatten()
    helpful = of_class[scores[q, of_class].topk(8).indices]
    nearer.append((distances[q, helpful].unsqueeze(1) < distances[q, of_class]).float().mean())
nearer = torch.stack(nearer).mean().item()
print(f"the most helpful 8 of its class are nearer to it than {nearer:.0%} of it (by chance 50%)")
figure, axes = plt.subplots(5, 9, figsize=(8, 4.8))
for row, image, best in zip(axes, query_images, top, strict=False):
    for axis, shown in zip(row, [image, *images[best]], strict=True):
        axis.imshow(shown[0], cmap="gray_r", vmin=-1, vmax=1)
        axis.axis("off")
axes[0, 0].set_title("query", fontsize=9)
axes[0, 4].set_title("most helpful training images", fontsize=9)

assert share(scores, own_class) > 0.5, "most of them should be of the query's class"
assert share(under_wrong_class, wrong_class) > 0.5, "which is the class that the network was given"
assert nearer > 0.6, "and look like it, which the class alone cannot bring about"
