"""Conditional and latent pipelines
=================================

A DiT pipeline denoises the latents of an autoencoder, given a class.
``DenoisingObjective.from_pipeline`` reads all of that off the pipeline: images go in, and are
encoded, drawn from the encoder's distribution, and shown to the network with their class, dropped
now and then as in training for guidance.
"""

# %%
# A small pipeline, trained for a few seconds on scikit-learn's digits. (Its autoencoder is left as
# it is initialised: a random, nearly linear code. Real ones are trained.)

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
    scaling_factor=1.0,
)
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
pipeline = DiTPipeline(transformer=transformer, vae=vae.eval(), scheduler=DDIMScheduler())
objective = DenoisingObjective.from_pipeline(pipeline, condition_dropout=0.1)

# %%
# Training as usual, the class dropped now and then (class 10 stands for none).

optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
with torch.no_grad():
    latents = vae.encode(images).latent_dist.mean
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
# Data are pairs of images and classes. Operators and scores are what they always are.

train_data = {"x0": images[:400], "class_labels": classes[:400]}
queries = {"x0": images[1600:1616], "class_labels": classes[1600:1616]}
EK = DiffusionEKFACLinearOperator(NoisedRegression(objective, train_data, 4, batch_size=128))
print(f"{EK.shape[0]:,} parameters in {len(EK.blocks)} blocks")
J_train = ExampleGradientLinearOperator(
    NoisedRegression(objective, train_data, 16, batch_size=64, antithetic=True)
)
J_query = ExampleGradientLinearOperator(
    NoisedRegression(objective, queries, 64, seed=1, antithetic=True)
)
scores = influence_scores(J_query, EK.inverse(1e-8), J_train)

# %%
# What helps an image of a class is mostly of that class: the class is a condition.

top = scores.topk(8).indices
same = (classes[:400][top] == queries["class_labels"].unsqueeze(1)).float().mean().item()
print(f"most helpful images of the query's class: {same:.0%} (by chance 10%)")
figure, axes = plt.subplots(5, 9, figsize=(8, 4.8))
for row, image, best in zip(axes, queries["x0"], top, strict=False):
    for axis, shown in zip(row, [image, *images[best]], strict=True):
        axis.imshow(shown[0], cmap="gray_r", vmin=-1, vmax=1)
        axis.axis("off")
axes[0, 0].set_title("query", fontsize=9)
axes[0, 4].set_title("most helpful training images", fontsize=9)

assert same > 0.5, "most of them should be of the query's class"
