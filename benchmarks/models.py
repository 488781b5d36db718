"""Tiny random networks of every kind that people use, each with a problem that it can train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
)
from torch import Tensor, nn

from curvlinops_diffusion import DenoisingObjective, NoisedRegression, NoiseProcess
from curvlinops_diffusion.weightings import CosmapWeighting, EDMWeighting

NUM_DATA = 2


class PreconditionedDenoiser(nn.Module):
    """EDM's ``c_skip x + c_out F(c_in x, c_noise)`` around a small convolutional network."""

    def __init__(self, sigma_data: float = 0.5):
        super().__init__()
        self.sigma_data = sigma_data
        self.embed = nn.Linear(1, 4)
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.down, self.up = nn.Conv2d(4, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise."""
        s, d = sigma.to(x).reshape(-1, 1, 1, 1), self.sigma_data
        c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
        z = self.first(x / (s**2 + d**2).sqrt())
        z = z + self.embed(sigma.to(x).log().unsqueeze(1) / 4)[..., None, None]
        z = torch.nn.functional.silu(self.depthwise(self.norm(z)))
        z = torch.nn.functional.silu(self.up(self.down(z)))
        denoised: Tensor = c_skip * x + c_out * self.last(z)
        return denoised


def _ddpm() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=100)


def _flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)


def _noise(*shape: int) -> Tensor:
    return torch.randn(NUM_DATA, *shape)


def tiny_unet(**options: Any) -> UNet2DModel:
    """With attention, up- and downsampling, and a class condition."""
    settings: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "num_class_embeds": 3,
    }
    return UNet2DModel(**(settings | options))


def tiny_conditional_unet(**options: Any) -> UNet2DConditionModel:
    """With cross attention."""
    settings: dict[str, Any] = {
        "sample_size": 4,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "cross_attention_dim": 4,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(settings | options))


def tiny_dit() -> DiTTransformer2DModel:
    """With three classes, and a learned variance."""
    return DiTTransformer2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        norm_num_groups=2,
        num_embeds_ada_norm=3,
    )


def tiny_sd3(**options: Any) -> SD3Transformer2DModel:
    """The transformer of Stable Diffusion 3."""
    settings: dict[str, Any] = {
        "sample_size": 4,
        "patch_size": 2,
        "in_channels": 2,
        "out_channels": 2,
        "num_layers": 1,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "joint_attention_dim": 6,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 5,
        "pos_embed_max_size": 4,
    }
    return SD3Transformer2DModel(**(settings | options))


def tiny_flux(pooled_projection_dim: int = 5) -> FluxTransformer2DModel:
    """With guidance distilled in."""
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=6,
        pooled_projection_dim=pooled_projection_dim,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


Problem = tuple[nn.Module, Any, dict[str, Any], dict[str, Any]]  # network, noise, data, objective


def _class_conditional(**options: Any) -> Problem:
    data = {"x0": _noise(1, 4, 4), "class_labels": torch.arange(NUM_DATA)}
    return tiny_unet(**options), _ddpm(), data, {}


def _text_conditional() -> Problem:
    data = {"x0": _noise(2, 4, 4), "encoder_hidden_states": _noise(3, 4)}
    dropout = {"condition_dropout": 0.3, "null_condition": {"encoder_hidden_states": 0.0}}
    return tiny_conditional_unet(), _ddpm(), data, dropout


def _sdxl() -> Problem:
    unet = tiny_conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=16,
        use_linear_projection=True,
    )
    added = {"text_embeds": _noise(4), "time_ids": torch.tensor([[4.0, 4, 0, 0, 4, 4]] * NUM_DATA)}
    data = {
        "x0": _noise(2, 4, 4),
        "encoder_hidden_states": _noise(3, 4),
        "added_cond_kwargs": added,
    }
    return unet, _ddpm(), data, {}


def _dit() -> Problem:
    data = {"x0": _noise(2, 4, 4), "class_labels": torch.arange(NUM_DATA)}
    dropout = {"condition_dropout": 0.1, "null_condition": {"class_labels": 3}}
    return tiny_dit(), _ddpm(), data, dropout


def _pixart() -> Problem:
    network = PixArtTransformer2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        norm_num_groups=2,
        cross_attention_dim=8,
        caption_channels=5,
    )
    return network, _ddpm(), {"x0": _noise(2, 4, 4), "encoder_hidden_states": _noise(3, 5)}, {}


def _sd3() -> Problem:
    network = tiny_sd3(num_layers=2, qk_norm="rms_norm")
    data = {
        "x0": _noise(2, 4, 4),
        "encoder_hidden_states": _noise(3, 6),
        "pooled_projections": _noise(5),
    }
    return network, _flow(), data, {"weighting": CosmapWeighting()}


def _flux() -> Problem:
    data = {
        "x0": _noise(4, 8),
        "encoder_hidden_states": _noise(3, 6),
        "pooled_projections": _noise(5),
        "guidance": torch.ones(NUM_DATA),
    }
    ids = {"img_ids": torch.randn(4, 3).round(), "txt_ids": torch.zeros(3, 3)}
    return tiny_flux(), _flow(), data, {"model_kwargs": ids}


def _unet1d() -> Problem:
    network = UNet1DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        extra_in_channels=64,
        time_embedding_type="fourier",
        block_out_channels=(32, 32),  # attention heads have 32 channels
        norm_num_groups=2,
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )
    return network, _ddpm(), {"x0": _noise(2, 16)}, {}


def _unet3d() -> Problem:
    network = UNet3DConditionModel(
        sample_size=2,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return network, _ddpm(), {"x0": _noise(1, 3, 2, 2), "encoder_hidden_states": _noise(3, 4)}, {}


def _edm() -> Problem:
    data = {"x0": 0.5 * _noise(1, 4, 4)}
    return PreconditionedDenoiser(), NoiseProcess.edm(), data, {"weighting": EDMWeighting()}


MODELS: dict[str, Callable[[], Problem]] = {
    "UNet2DModel, class-conditional": _class_conditional,
    "UNet2DModel, scale and shift": lambda: _class_conditional(
        resnet_time_scale_shift="scale_shift"
    ),
    "UNet2DConditionModel": _text_conditional,
    "UNet2DConditionModel, SDXL": _sdxl,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "UNet1DModel": _unet1d,
    "UNet3DConditionModel": _unet3d,
    "EDM-preconditioned network": _edm,
}


def problem(name: str, dtype: torch.dtype = torch.float64, num_draws: int = 2) -> NoisedRegression:
    """A denoising problem on two examples.

    Args:
        name: A key of :data:`MODELS`.
        dtype: The network's precision.
        num_draws: Draws for each example.
    """
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network, noise, data, options = MODELS[name]()
        network = network.to(dtype).eval()
        # initialised at zero, many parameters would have no influence
        for p in network.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    timesteps = "logit-normal" if isinstance(noise, FlowMatchEulerDiscreteScheduler) else "uniform"
    return NoisedRegression(
        DenoisingObjective(network, noise, **options),
        data,
        num_draws,
        timesteps=timesteps,
        batch_size=NUM_DATA,
    )
