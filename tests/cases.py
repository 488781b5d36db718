"""Small problems that the tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from benchmarks import models
from curvlinops_diffusion import DenoisingObjective, NoisedRegression, NoiseProcess, PredictionType
from curvlinops_diffusion.linalg.operator import FlatLinearOperator
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator


def images(
    count: int, channels: int = 1, size: int = 8, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Random clean images ``[count, channels, size, size]``, always the same."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, channels, size, size, generator=generator, dtype=dtype)


def tiny_unet(dtype: torch.dtype = torch.float64, **config: Any) -> UNet2DModel:
    """A UNet with attention, GroupNorm, up- and downsampling and a class condition.

    With 4,925 parameters.

    Same weights each time; the global random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        unet = models.tiny_unet(**({"sample_size": 8} | config)).to(dtype)
        # initialised at zero, GroupNorm's bias and others would hide terms of the curvature
        for p in unet.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return unet


def small_unet() -> UNet2DModel:
    """Of one resolution: what several processes, or many runs, each pass data through."""
    return tiny_unet(
        block_out_channels=(4,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def unet_regression(
    unet: nn.Module | None = None,
    count: int = 3,
    num_draws: int | None = 2,
    scheduler: Any = None,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 2,
    seed: int = 0,
    objective: dict[str, Any] | None = None,
    **options: Any,
) -> NoisedRegression:
    """A class-conditional denoising problem on random images for :func:`tiny_unet`."""
    unet = tiny_unet(dtype) if unet is None else unet
    scheduler = DDPMScheduler(num_train_timesteps=100) if scheduler is None else scheduler
    return NoisedRegression(
        DenoisingObjective(unet, scheduler, **(objective or {})),
        {"x0": images(count, dtype=dtype), "class_labels": torch.arange(count) % 3},
        num_draws,
        seed,
        batch_size=batch_size,
        **options,
    )


class TimeBlind(nn.Module):
    """A network of layers that ignores the timestep; its output has its input's shape."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t: Tensor, t: Tensor, **condition: Any) -> Tensor:
        out: Tensor = self.layers(x_t)
        return out


def seeded(*layers: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 3) -> TimeBlind:
    """A :class:`TimeBlind` network with weights that are the same each time."""
    model = TimeBlind(*layers).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def noise_levels(
    prediction_type: PredictionType = PredictionType.EPSILON, num_levels: int = 10
) -> NoiseProcess:
    """A variance-preserving noise process with few levels."""
    angle = torch.linspace(0.1, 1.4, num_levels, dtype=torch.float64)
    return NoiseProcess(angle.cos(), angle.sin(), torch.arange(num_levels), prediction_type)


def two_convolutions() -> nn.Module:
    """One channel to one, and a non-linearity between: of 39 parameters."""
    return seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))


def plain_regression(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 5,
    num_draws: int | None = 3,
    process: NoiseProcess | None = None,
    objective: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> NoisedRegression:
    """A denoising problem on random data of any shape ``[count, *shape]``."""
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randn(count, *shape, generator=generator, dtype=dtype)
    process = noise_levels() if process is None else process
    return NoisedRegression(
        DenoisingObjective(model, process, **(objective or {})), x0, num_draws, **options
    )


class OfMatrix(FlatLinearOperator):
    """A matrix as an operator: what a solver does with products does not depend on their price."""

    def __init__(self, like: PyTorchLinearOperator, matrix: Tensor):
        super().__init__(like)
        self.matrix = matrix

    def multiply(self, X_PK: Tensor) -> Tensor:
        return self.matrix @ X_PK


class StoppedError(Exception):
    """As if somebody had stopped the program."""


@contextmanager
def stopped(cls: type, method: str, at: int, every: bool = False) -> Iterator[list[int]]:
    """Let a method fail once at its call of that number, or at every so many; yields the calls."""
    original, calls = getattr(cls, method), []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at or (every and len(calls) % at == 0):
            raise StoppedError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, method, failing)
        yield calls
