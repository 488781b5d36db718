"""Probes of attribution that need no retraining: copies of training images, shuffled weights.

Legend: Q training images that are asked about, N training images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import CleanBatch, joined_rows, leaves, merged_rows
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.diffusion.versions import Augmentations, flipped
from curvlinops_diffusion.runtime.checks import check_count

Altered = Callable[[CleanBatch], CleanBatch]
#: The quality that images are recompressed with, the default of many programs.
JPEG_QUALITY = 75


def mirrored(clean: CleanBatch) -> CleanBatch:
    """Mirror images left to right, with masks and images among their conditions."""
    entries = leaves(clean.condition)
    images = frozenset(name for name, z in entries if isinstance(z, Tensor) and z.ndim == 4)
    (found,) = Augmentations((flipped,), images).versions(clean)
    return found


def recompressed(clean: CleanBatch) -> CleanBatch:
    """Write images as JPEG and read them again."""
    return replace(clean, x0=torch.stack([_as_jpeg(x) for x in clean.x0]))


def _as_jpeg(x_CHW: Tensor) -> Tensor:
    from PIL import Image  # of the extra cli
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    buffer = io.BytesIO()
    pixels = ((x_CHW.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    to_pil_image(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return (pil_to_tensor(Image.open(buffer)).to(x_CHW) / 127.5) - 1


#: How images are altered, by the names of what becomes of them.
COPIES: Mapping[str, Altered] = {"mirrored": mirrored, "recompressed": recompressed}


def copies_of(
    regression: NoisedRegression,
    numbers: Sequence[int],
    num_draws: int,
    copies: Mapping[str, Altered] = COPIES,
) -> tuple[list[str], NoisedRegression]:
    """Some training images and altered copies of them, as queries of another seed.

    Returns ``'itself'`` and the names of the copies; and all images, first the training images as
    they are and then each kind of copies, ``[C Q]``. Nothing else than images is altered, and JPEG
    knows one channel or three.
    """
    own: dict[int, CleanBatch] = {}
    for clean in regression.clean_batches():
        places = [place for place, n in enumerate(clean.indices) if n in set(numbers)]
        own |= {clean.indices[place]: clean.select([place]) for place in places}
    asked = [own[n] for n in numbers]
    shapes = {clean.x0.shape[1:] for clean in asked}
    kinds: dict[str, Altered] = {"itself": lambda clean: clean}
    if all(len(shape) == 3 for shape in shapes):
        coloured = all(shape[0] in (1, 3) for shape in shapes)
        kinds |= {k: f for k, f in copies.items() if coloured or f is not recompressed}
    recipe = regression.recipe

    def as_data(clean: CleanBatch) -> dict[str, Any]:
        mask = {} if clean.mask is None else {str(recipe.loss_mask): clean.mask}
        return {"x0": clean.x0, **clean.condition, **mask}

    every = [as_data(alter(clean)) for alter in kinds.values() for clean in asked]
    pairs = regression.with_seed(regression.draws.seed + 1)
    return list(kinds), NoisedRegression(
        regression.objective,
        merged_rows(joined_rows, *every)
        if len(shapes) == 1
        else every,  # aspect buckets: one shape each
        draws=pairs.with_draws(num_draws, antithetic=num_draws % 2 == 0).draws,
        noise_offset=recipe.noise_offset,
        input_perturbation=recipe.input_perturbation,
        loss_mask=recipe.loss_mask,
        batch_size=regression.batch_size or len(asked),
    )


def chosen(num_data: int, count: int, seed: int) -> list[int]:
    """The numbers of some training images, in a random order."""
    check_count("num_queries", count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_data, generator=generator)[:count].tolist()


@contextmanager
def shuffled(model: nn.Module, names: Sequence[str], seed: int) -> Iterator[None]:
    """Shuffle the entries of each of some parameters, as long as the context is open.

    Their sizes stay what training has made them, and what it has learned is gone.
    """
    params, generator = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
    own = {name: params[name].detach().clone() for name in names}
    try:
        with torch.no_grad():
            for name, value in own.items():
                order = torch.randperm(value.numel(), generator=generator).to(value.device)
                params[name].copy_(value.flatten()[order].view_as(value))
        yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                params[name].copy_(value)
