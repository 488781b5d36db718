"""Which training digits made a diffusion model generate these samples?
====================================================================

Trains a small UNet with attention on 1,000 of scikit-learn's digits (real 8×8 scans), generates
samples, fits EK-FAC averaged over timesteps and noise, and shows for each sample the training
digits without which the model would explain it worst (most helpful) and best (most harmful).
Also compares EK-FAC and K-FAC with the exact GGN: traces, and inverse-vector products.

Run by ``make demo``; takes less than three minutes on two idle cores. Writes
``influence_digits.png`` and ``influence_digits.safetensors`` (scores and samples) to the folder
given by ``--output``. What this page shows was printed and drawn with ``--steps 700 --draws 16``,
about half of both.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from curvlinops import CGInverseLinearOperator, hutchinson_trace
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cosine_similarity, mse_loss

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
    load_operator,
    split_half_scores,
)

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt

DAMPING = 1e-8  # the paper's default for influence scores
SHOWN = 8
COUNT = 1000  # of 1,797 digits, so that all takes less than three minutes


def digits() -> tuple[Tensor, Tensor]:
    """The images in [-1, 1], shape ``[1797, 1, 8, 8]``, and their classes."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(bunch.target)


def make_unet() -> UNet2DModel:
    """A UNet with attention at its lower level, about 175,000 parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def train(unet: UNet2DModel, scheduler: DDPMScheduler, x0: Tensor, steps: int) -> float:
    """Train, the learning rate falling to zero; return the mean of the last losses."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    losses: list[float] = []
    for step_number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step_number / steps)
        batch = x0[torch.randint(len(x0), (128,))]
        noise = torch.randn_like(batch)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(batch),))
        loss = mse_loss(unet(scheduler.add_noise(batch, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-200:]) / len(losses[-200:])


@torch.no_grad()
def generate(unet: UNet2DModel, scheduler: DDPMScheduler, count: int) -> Tensor:
    """Sample by DDPM."""
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    x = torch.randn(count, 1, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a title, and the time that the step took."""
    print(title, flush=True)
    start = time.perf_counter()
    yield
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


def compare_with_exact(
    objective: DenoisingObjective, x0: Tensor, params: Sequence[str], right_side: Tensor
) -> dict[str, float]:
    """Cosine similarity of approximate with exact inverse-vector products, on a few digits.

    K-FAC, EK-FAC and the exact GGN are those of the same digits and draws, so that only the
    approximations differ. The damping is one at which conjugate gradients converge.
    """
    damping = 1e-1
    regression = NoisedRegression(objective, x0[:64], num_draws=2, batch_size=64)
    K = DiffusionKFACLinearOperator(regression, params, mc_samples=4)
    EK = DiffusionEKFACLinearOperator(regression, params, mc_samples=4)
    damped = DiffusionGGNLinearOperator(regression, params) + damping * EK.power(0.0)
    solution = CGInverseLinearOperator(damped, max_iter=150, tolerance=1e-3) @ right_side
    residual = (damped @ solution - right_side).norm() / right_side.norm()
    print(f"  relative residual of the exact solution by CG: {residual:.1e}")
    return {
        "EK-FAC": cosine_similarity(EK.inverse(damping) @ right_side, solution, 0).item(),
        "K-FAC": cosine_similarity(K.inverse(damping) @ right_side, solution, 0).item(),
        "no curvature": cosine_similarity(right_side, solution, 0).item(),
    }


def draw(path: Path, samples: Tensor, x0: Tensor, scores: Tensor) -> None:
    """Each sample, its most positive and its most negative digits."""
    figure, axes = plt.subplots(len(samples), 2 * SHOWN + 3, figsize=(13, 6.4))
    for axis in axes.flat:
        axis.axis("off")
    order = scores.argsort(1, descending=True)
    for row, sample, ranked, score in zip(axes, samples, order, scores, strict=True):
        row[0].imshow(sample[0], cmap="gray_r", vmin=-1, vmax=1)
        chosen = [*ranked[:SHOWN], *ranked[-SHOWN:].flip(0)]
        for axis, n in zip([*row[2 : SHOWN + 2], *row[SHOWN + 3 :]], chosen, strict=True):
            axis.imshow(x0[n, 0], cmap="gray_r", vmin=-1, vmax=1)
            axis.set_title(f"{score[n]:+.1e}", fontsize=5, pad=2)
    axes[0, 0].set_title("sample", fontsize=9)
    figure.text(0.31, 0.95, "most helpful training digits", ha="center", fontsize=10)
    figure.text(0.76, 0.95, "most harmful training digits", ha="center", fontsize=10)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--steps", type=int, default=900, help="training steps")
    parser.add_argument("--draws", type=int, default=32, help="draws of each training digit")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)

    x0, classes = (part[:COUNT] for part in digits())
    unet, scheduler = make_unet(), DDPMScheduler()
    num_params = sum(p.numel() for p in unet.parameters())
    with step(f"Training a UNet of {num_params:,} parameters on {len(x0):,} digits"):
        print(f"  loss {train(unet, scheduler, x0, arguments.steps):.4f}")
    unet.eval()
    with step(f"Generating {SHOWN} samples"):
        samples = generate(unet, scheduler, SHOWN)

    objective = DenoisingObjective(unet, scheduler)
    # of curvature, an average over digits too, fewer draws do
    few = max(4, arguments.draws // 4)
    regression = NoisedRegression(objective, x0, few, batch_size=256)
    # noise and negated noise in pairs: gradients vary less, curvature would vary more
    in_pairs = NoisedRegression(objective, x0, arguments.draws, batch_size=256, antithetic=True)
    queries = NoisedRegression(objective, samples, num_draws=64, seed=1, antithetic=True)
    with step("Fitting EK-FAC"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the coverage is printed instead
        EK = DiffusionEKFACLinearOperator(regression, progressbar=True)
    covered = EK.shape[0]
    print(f"  covers {covered:,} of {num_params:,} parameters ({covered / num_params:.2%})")
    EK.save(arguments.output / "ekfac.safetensors")
    EK = load_operator(arguments.output / "ekfac.safetensors", unet)

    with step("Scoring every training digit"):
        J_train = ExampleGradientLinearOperator(in_pairs, EK.param_names)
        J_query = ExampleGradientLinearOperator(queries, EK.param_names)
        halves = split_half_scores(
            J_query, EK.inverse(DAMPING), J_train, passes=PassOptions(progressbar=True)
        )
        scores, shared = halves.scores, halves.top_shared(SHOWN).mean().item()
    print(f"  two halves of the draws share {shared:.0%} of the {SHOWN} most helpful digits")

    with step("Comparing with the exact GGN"):
        G = DiffusionGGNLinearOperator(
            NoisedRegression(objective, x0, num_draws=1, batch_size=256), EK.param_names
        )
        exact_trace = hutchinson_trace(G, num_matvecs=4, distribution="rademacher")
        print(f"  trace: EK-FAC {EK.trace():.4g}, exact GGN {exact_trace:.4g} (estimated)")
        cosines = compare_with_exact(objective, x0, EK.param_names, J_query.rows([0])[0])
        for name, value in cosines.items():
            print(f"  cosine with the exact inverse-vector product, {name}: {value:.3f}")

    top = scores.topk(SHOWN).indices
    distances = torch.cdist(samples.flatten(1), x0.flatten(1))
    farther = (distances.unsqueeze(1) > distances.gather(1, top).unsqueeze(2)).float().mean().item()
    print(f"The most helpful digits are nearer to their sample than {farther:.0%} of all digits")
    # a sample's class is that of most of the digits that look like it
    sample_classes = classes[distances.topk(15, largest=False).indices].mode(1).values
    same_class = (classes[top] == sample_classes.unsqueeze(1)).float().mean().item()
    print(f"Most helpful digits of the sample's class: {same_class:.0%} (by chance 10%)")

    draw(arguments.output / "influence_digits.png", samples, x0, scores)
    save_file(
        {"scores": scores, "samples": samples}, arguments.output / "influence_digits.safetensors"
    )
    print(f"Wrote influence_digits.png and .safetensors to {arguments.output}/")

    assert scores.isfinite().all()
    assert farther > 0.9, "the most helpful digits should look like the sample"
    assert same_class > 0.25, "the most helpful digits should be of the sample's own class"
    assert cosines["EK-FAC"] > cosines["no curvature"], "curvature should help"
    assert abs(EK.trace() / exact_trace - 1) < 0.2, "EK-FAC has the trace of the exact GGN"


if __name__ == "__main__":
    main()
