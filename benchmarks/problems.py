"""The problems on which is measured."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from curvlinops_diffusion import DenoisingObjective, NoisedRegression

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def unet(quick: bool, size: int = 16, width: int = 64) -> UNet2DModel:
    """With attention at its lower level; 2.8 million parameters at the default width."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 8) if quick else (width, 2 * width),
        norm_num_groups=4 if quick else 32,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def cifar_unet(quick: bool) -> UNet2DModel:
    """The CIFAR network of Mlodozeniec et al. (2025), with 36 million parameters."""
    return UNet2DModel(
        sample_size=8 if quick else 32,
        block_out_channels=(4, 8, 8, 8) if quick else (128, 256, 256, 256),
        norm_num_groups=4 if quick else 32,
        layers_per_block=2,
        attention_head_dim=None if not quick else 4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def dit(quick: bool) -> DiTTransformer2DModel:
    """A small class-conditional DiT (Peebles & Xie, 2023) on 4 channels of 16×16."""
    return DiTTransformer2DModel(
        sample_size=4 if quick else 16,
        in_channels=4,
        num_layers=1 if quick else 4,
        num_attention_heads=2 if quick else 4,
        attention_head_dim=4 if quick else 48,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


NETWORKS: dict[str, Callable[[bool], nn.Module]] = {"unet": unet, "cifar": cifar_unet, "dit": dit}


def regression_of(
    network: nn.Module, device: str, num_data: int, batch_size: int
) -> NoisedRegression:
    """A denoising problem with random weights and images, one draw each.

    Args:
        network: A network of this file.
        device: Where it is put.
        num_data: The number of images.
        batch_size: How many the network sees at once.
    """
    network = network.eval().to(device)
    config: Any = network.config
    x0 = torch.randn(num_data, config.in_channels, config.sample_size, config.sample_size)
    labelled = isinstance(network, DiTTransformer2DModel)
    data = {"x0": x0, "class_labels": torch.arange(num_data) % 10} if labelled else x0
    objective = DenoisingObjective(network, DDPMScheduler())
    return NoisedRegression(objective, data, num_draws=1, batch_size=batch_size)


def random_regression(
    name: str, quick: bool, device: str, num_data: int = 128, batch_size: int = 32
) -> NoisedRegression:
    """The denoising problem of a named network; a quick one is small, and has few images."""
    torch.manual_seed(0)
    sizes = (8, 4) if quick else (num_data, batch_size)
    return regression_of(NETWORKS[name](quick), device, *sizes)


def trained_on_digits(steps: int) -> tuple[UNet2DModel, DDPMScheduler, Tensor]:
    """The demo's UNet of about 175,000 parameters, trained on scikit-learn's digits.

    Args:
        steps: Training steps; 1,500 take about a minute on two cores.

    Returns:
        The network, its scheduler, and the digits in [-1, 1], shape ``[1797, 1, 8, 8]``.
    """
    demo = example("influence_digits")
    torch.manual_seed(0)
    network, scheduler, (x0, _) = demo.make_unet(), DDPMScheduler(), demo.digits()
    demo.train(network, scheduler, x0, steps)
    return network.eval(), scheduler, x0


def photographs() -> list[Tensor]:
    """Scikit-learn's two, in ``[-1, 1]``, ``[3, 427, 640]``."""
    images = load_sample_images().images
    return [torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1 for image in images]


def patches(image: Tensor, size: int, stride: int) -> Tensor:
    """Squares cut out of an image, row by row, ``[·, C, size, size]``."""
    rows = image.unfold(1, size, stride).unfold(2, size, stride)
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def separate_patches(size: int) -> Tensor:
    """Patches of both photographs, without overlap, ``[·, 3, size, size]``."""
    return torch.cat([patches(photograph, size, size) for photograph in photographs()])


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
