"""A LoRA fine-tune attributed
============================

A model that knows the digits 0 to 4 is fine-tuned by low-rank adapters to the digits 5 to 9. Which
of the new images made the tuned model what it is? Curvature and gradients of the adapters alone
answer: an eighth of the parameters in place of all.
"""

# %%
# A UNet trained for a few seconds on half of the digits, then adapters on its attention and on the
# convolutions of its residual blocks trained on the other half.

import warnings

import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler
from influence_digits import digits, make_unet, train
from peft import LoraConfig, inject_adapter_in_model

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
old, new = images[classes < 5], images[classes > 4]
new_classes = classes[classes > 4]
# the last 5 of each class are the queries, on which nothing is trained or fitted
held_out = torch.cat([(new_classes == c).nonzero().flatten()[-5:] for c in range(5, 10)])
kept = torch.ones(len(new), dtype=torch.bool)
kept[held_out] = False
tuning, tuning_classes = new[kept], new_classes[kept]
queries, query_classes = new[held_out], new_classes[held_out]

unet, scheduler = make_unet(), DDPMScheduler()
train(unet, scheduler, old, steps=200)
targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), unet)
adapters = [name for name, p in unet.named_parameters() if p.requires_grad]
train(unet, scheduler, tuning, steps=150)
objective = DenoisingObjective(unet.eval(), scheduler)

# %%
# EK-FAC of the adapters alone: pass their names.

EK = DiffusionEKFACLinearOperator(NoisedRegression(objective, tuning, 4, batch_size=256), adapters)
print(f"{EK.shape[0]:,} of {sum(p.numel() for p in unet.parameters()):,} parameters")

# %%
# Scores of the images that it was tuned to, each predicting the loss of held-out ones of every new
# class.

J_train = ExampleGradientLinearOperator(
    NoisedRegression(objective, tuning, 16, batch_size=128, antithetic=True), adapters
)
J_query = ExampleGradientLinearOperator(
    NoisedRegression(objective, queries, 64, seed=1, antithetic=True), adapters
)
scores = influence_scores(J_query, EK.inverse(1e-8), J_train)

# %%
# The most helpful images are mostly of the query's own class.

top = scores.topk(10).indices
same = (tuning_classes[top] == query_classes.unsqueeze(1)).float().mean().item()
print(f"most helpful images of the query's class: {same:.0%} (by chance 20%)")
figure, axes = plt.subplots(5, 11, figsize=(10, 4.6))
for row, q in zip(axes, range(0, 25, 5), strict=True):
    shown = [queries[q], *tuning[top[q]]]
    for axis, image in zip(row, shown, strict=True):
        axis.imshow(image[0], cmap="gray_r", vmin=-1, vmax=1)
        axis.axis("off")
axes[0, 0].set_title("query", fontsize=9)
axes[0, 5].set_title("most helpful images of the fine-tuning set", fontsize=9)

assert set(EK.param_names) == set(adapters), "curvature of the adapters alone"
assert same > 0.6, "three times chance"
