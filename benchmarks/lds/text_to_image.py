"""A tiny text-to-image latent diffusion: a linear autoencoder, a CLIP text encoder and a UNet.

Its UNet knows shapes in plain colours; adapters of ``benchmarks.lds.adapters`` teach it more.
``text_to_image.safetensors`` beside this file holds its weights. ``python -m
benchmarks.lds.text_to_image`` trains them anew, in two minutes.

Legend: N images, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, mse_loss, unfold
from transformers import CLIPTextConfig, CLIPTextModel

from curvlinops_diffusion.runtime.files import FileKind

T = TypeVar("T")
KEPT = Path(__file__).parent / "text_to_image.safetensors"
WEIGHTS = FileKind("pipeline", "a pipeline's weights", "Run benchmarks.lds.text_to_image.", None)

SIZE = 16
PERIOD = 6  # of textures, in pixels
PATCH, CHANNELS = 4, 16  # of latents
SHAPES = ("disc", "square", "cross")
PARTS = ("autoencoder", "text_encoder", "unet")
STEPS = 2500
STYLES = ("striped", "dotted", "checked", "ringed")
WORDS = ("<start>", "<end>", "plain", *STYLES, *SHAPES, "a", "thing", "sks")


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def picture(
    style: str, shape: str, generator: torch.Generator, colours: Tensor | None = None
) -> Tensor:
    """A shape somewhere, in two colours on a ground, ``[3, 16, 16]``, in ``[-1, 1]``.

    Place, size and colours are random, and the phase and the direction of the texture.

    Args:
        style: Of :data:`STYLES`.
        shape: Of :data:`SHAPES`.
        generator: Of what is random.
        colours: The shape's two colours, ``[2, 3]``, or random ones.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    dx, dy = (z - uniform(6, 9) for z in (x, y))
    r = uniform(5.5, 7)
    inside = {
        "disc": dx.square() + dy.square() < r**2,
        "square": torch.maximum(dx.abs(), dy.abs()) < 0.9 * r,
        "cross": (torch.minimum(dx.abs(), dy.abs()) < 0.4 * r)
        & (torch.maximum(dx.abs(), dy.abs()) < r),
    }[shape]
    angle = uniform(0, math.pi)
    first, second = (uniform(0, 2 * math.pi) for _ in range(2))
    wave = 2 * math.pi / PERIOD
    u = wave * (math.cos(angle) * dx + math.sin(angle) * dy) + first
    v = wave * (math.cos(angle) * dy - math.sin(angle) * dx) + second
    texture = {
        "plain": torch.full((SIZE, SIZE), 9.0),
        "striped": u.sin(),
        "dotted": u.sin() + v.sin() - 0.6,
        "checked": 2 * u.sin() * v.sin(),
        "ringed": (wave * (dx.square() + dy.square()).sqrt() + first).sin(),
    }[style]
    ground, one, other = torch.rand(3, 3, 1, 1, generator=generator) * 2 - 1
    if colours is not None:
        one, other = colours[:, :, None, None]
    mixed = (1 + (2 * texture).tanh()) / 2
    return torch.where(inside, one * mixed + other * (1 - mixed), ground)


@lru_cache
def pictures(captions: tuple[str, ...], seed: int) -> Tensor:
    """Pictures of captions such as ``'striped disc'``, ``[N, 3, 16, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    words = (caption.split() for caption in captions)
    return torch.stack([picture(style, shape, generator) for style, shape in words])


@lru_cache
def things(count: int, seed: int) -> Tensor:
    """Pictures of one thing in many places, ``[N, 3, 16, 16]``."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[0.9, -0.7, 0.1], [-0.8, 0.8, 0.5]])
    return torch.stack([picture("ringed", "cross", generator, colours) for _ in range(count)])


def all_captions(styles: Sequence[str], count: int) -> tuple[str, ...]:
    """Captions of every style and shape in turn."""
    S = len(styles)
    return tuple(f"{styles[n % S]} {SHAPES[n // S % len(SHAPES)]}" for n in range(count))


# ---------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------


class LinearAutoencoder(nn.Module):
    """Patches of 4×4 pixels by their principal components, in units of their spread."""

    def __init__(self) -> None:
        super().__init__()
        self.components = nn.Buffer(torch.zeros(CHANNELS, 3, PATCH, PATCH))
        self.spread = nn.Buffer(torch.ones(CHANNELS, 1, 1))

    def fit(self, images: Tensor) -> None:
        """The components of some images."""
        patches = unfold(images, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
        _, values, vectors = torch.linalg.svd(patches, full_matrices=False)
        self.components.copy_(vectors[:CHANNELS].view_as(self.components))
        self.spread.copy_((values[:CHANNELS] / len(patches) ** 0.5)[:, None, None])

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images, ``[N, 16, 4, 4]``."""
        return conv2d(images, self.components, stride=PATCH) / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents."""
        decoded = conv_transpose2d(latents * self.spread, self.components, stride=PATCH)
        return decoded.clamp(-1, 1)


@dataclass(frozen=True)
class TextToImage:
    """The parts of a pipeline."""

    autoencoder: LinearAutoencoder
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler

    def embedded(self, captions: Sequence[str]) -> Tensor:
        """The text encoder's states of captions of equally many words, ``[N, L, 32]``."""
        words = [["<start>", *caption.split(), "<end>"] for caption in captions]
        tokens = torch.tensor([[WORDS.index(word) for word in own] for own in words])
        with torch.no_grad():
            states: Tensor = self.text_encoder(tokens).last_hidden_state
            return states

    def sampled(self, states: Tensor, seed: int, steps: int = 50) -> Tensor:
        """Latents that are sampled by DDIM, one for each embedded caption."""
        # latents are in units of their spread
        scheduler = DDIMScheduler.from_config(
            self.scheduler.config, clip_sample=True, clip_sample_range=3.0
        )
        scheduler.set_timesteps(steps)
        size = self.unet.config.sample_size
        x = torch.randn(
            len(states), CHANNELS, size, size, generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(self.unet(x, t, states).sample, t, x).prev_sample
        return x


def untrained(width: int = 32) -> TextToImage:
    """A pipeline of random weights."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        norm_num_groups=width // 4,
        attention_head_dim=2,  # the number of heads
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    # Stable Diffusion's noise levels
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    return TextToImage(LinearAutoencoder(), text_encoder.eval(), unet, scheduler)


def noised(
    pipeline: TextToImage, x0: Tensor, states: Tensor, batch: int, steps: int
) -> Iterator[tuple[Tensor, ...]]:
    """Random batches: noised latents, timesteps, states of captions, and the noise."""
    for _ in range(steps):
        n = torch.randint(len(x0), (batch,))
        t = torch.randint(pipeline.scheduler.config.num_train_timesteps, (batch,))
        noise = torch.randn_like(x0[n])
        yield pipeline.scheduler.add_noise(x0[n], noise, t), t, states[n], noise


def minimized(
    parameters: Sequence[Tensor], rate: float, batches: Iterable[T], steps: int
) -> Iterator[T]:
    """Yield batches, and take a step of AdamW after each, at a rate that falls to zero."""
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        yield batch
        optimizer.step()


def loss_of(unet: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
    """The mean squared error of the predicted noise."""
    *inputs, noise = batch
    return mse_loss(unet(*inputs).sample, noise)


def trained(seed: int = 0) -> TextToImage:
    """A pipeline whose autoencoder knows all styles, and whose UNet knows plain shapes alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = untrained()
        everything = pictures(all_captions(("plain", *STYLES), 2000), seed=1)
        pipeline.autoencoder.fit(everything)
        captions = all_captions(("plain",), 2000)
        x0 = pipeline.autoencoder.encode(pictures(captions, seed=2))
        parameters = list(pipeline.unet.parameters())
        batches = noised(pipeline, x0, pipeline.embedded(captions), 32, STEPS)
        for batch in minimized(parameters, 3e-3, batches, STEPS):
            loss_of(pipeline.unet, batch).backward()
    return pipeline


@lru_cache
def pipeline(width: int = 32) -> TextToImage:
    """The pipeline that is kept; of another width one of random weights, for tests."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = untrained(width)
    if width == 32:
        _, tensors = WEIGHTS.read(KEPT)
        for part in PARTS:
            own = {
                k.removeprefix(f"{part}/"): z.float()
                for k, z in tensors.items()
                if k.startswith(f"{part}/")
            }
            getattr(made, part).load_state_dict(own)
    else:
        made.autoencoder.fit(pictures(all_captions(STYLES, 20), seed=1))
    for part in PARTS:
        getattr(made, part).eval().requires_grad_(False)
    return made


def main() -> None:
    """Train the pipeline, and write its weights in half precision."""
    torch.set_num_threads(1)
    made = trained()
    tensors = {
        f"{part}/{name}": z.half().contiguous()
        for part in PARTS
        for name, z in getattr(made, part).state_dict().items()
        if z.is_floating_point()
    }
    WEIGHTS.write(KEPT, tensors, {})


if __name__ == "__main__":
    main()
