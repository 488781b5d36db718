"""The trained network: a pipeline, or a model and its scheduler, from folders on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.logging import disable_progress_bar

from curvlinops_diffusion.cli.images import Form
from curvlinops_diffusion.cli.options import ModelOptions
from curvlinops_diffusion.objective import DenoisingObjective


@dataclass(frozen=True)
class Network:
    """An objective, and how it takes images.

    Attributes:
        objective: The objective.
        channels: Colour channels of the images; ``None`` where an autoencoder decides.
        size: Height and width of the images; ``None`` for any.
        conditioned: Whether labels or prompts are taken.
    """

    objective: DenoisingObjective
    channels: int | None
    size: tuple[int, int] | None
    conditioned: bool

    def form(self, resolution: int | None) -> Form:
        """The form in which images are loaded."""
        return Form(self.channels, self.size, resolution)


disable_progress_bar()  # of loading; the passes have their own


def load_network(options: ModelOptions) -> Network:
    """Load what the options name; weights only from safetensors files.

    Raises:
        ValueError: If they name no network, or it cannot be loaded.
    """
    given = [options.pipeline is not None, options.model is not None]
    if sum(given) != 1 or (options.model is None) != (options.scheduler is None):
        raise ValueError(
            "Pass --pipeline FOLDER, or --model FOLDER and --scheduler FOLDER, as written by "
            "save_pretrained."
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not to be had here: {error}.") from error
    dtype = getattr(torch, options.dtype)
    autocast = None if options.autocast is None else getattr(torch, options.autocast)
    if options.pipeline is not None:
        pipeline = _loaded(diffusers.DiffusionPipeline, options.pipeline, "model_index.json", dtype)
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        objective = DenoisingObjective.from_pipeline(
            pipeline, latent_cache=options.latent_cache, autocast=autocast
        )
        autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    else:
        assert options.model is not None
        assert options.scheduler is not None
        model = _loaded(diffusers.AutoModel, options.model, "config.json", dtype)
        objective = DenoisingObjective(
            model.to(device).eval(), _scheduler(options.scheduler), autocast=autocast
        )
        autoencoder = None
    config: Any = getattr(objective.model, "config", {})
    conditioned = autoencoder is not None or config.get("num_class_embeds") is not None
    if autoencoder is not None:
        return Network(objective, None, None, conditioned)
    size = config.get("sample_size")
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return Network(
        objective, config.get("in_channels"), None if size is None else sides, conditioned
    )


def _loaded(cls: Any, folder: Path, index: str, dtype: torch.dtype) -> Any:
    if not (folder / index).is_file():
        raise ValueError(
            f"'{folder}' holds no {index}. Pass a folder on this machine that was written by "
            "save_pretrained; nothing is downloaded."
        )
    try:
        return cls.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, torch_dtype=dtype
        )
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError, KeyError) as error:
        raise ValueError(f"'{folder}' cannot be loaded: {str(error).splitlines()[0]}") from error


def _scheduler(folder: Path) -> Any:
    path = folder / "scheduler_config.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
        return getattr(diffusers, name).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{folder}' holds no scheduler of diffusers ({type(error).__name__}: {error}). Pass a "
            "folder with scheduler_config.json."
        ) from error
