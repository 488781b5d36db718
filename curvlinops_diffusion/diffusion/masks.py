"""Masks of pixels: weights of an example's entries in the loss (masked training)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def loss_mask(name: str, condition: Mapping[str, Any], x0: Tensor) -> Tensor:
    """The mask among the entries of a batch, with as many axes as the examples.

    Args:
        name: The entry's name.
        condition: The entries beside the examples.
        x0: The examples, ``[B, ...]``.

    Returns:
        Weights ``[B, ...]``, float32 at least; ``[B, H, W]`` has become ``[B, 1, H, W]``.

    Raises:
        ValueError: If there is no such entry, or it is no tensor of finite weights of at least
            zero.
    """
    if name not in condition:
        raise ValueError(
            f"loss_mask='{name}' arrived, and the entries of a batch beside x0 are "
            f"{sorted(condition)}. Name the entry that holds the weights of pixels."
        )
    mask = condition[name]
    if not isinstance(mask, Tensor) or mask.is_complex() or not x0.ndim - 1 <= mask.ndim <= x0.ndim:
        arrived = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"The loss mask '{name}' arrived as {arrived} beside examples of shape "
            f"{tuple(x0.shape)}. Pass weights [B, height, width] or [B, channels or 1, height, "
            "width]."
        )
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    if not (mask.isfinite() & (mask >= 0)).all():
        raise ValueError(
            f"The loss mask '{name}' has entries from {float(mask.min()):g} to "
            f"{float(mask.max()):g}. Weights must be finite and at least 0."
        )
    return mask.unsqueeze(1) if mask.ndim < x0.ndim else mask


def entry_weights(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask as weights of the entries that the network predicts, ``[B, *shape]``.

    Where these are latents of another height and width, weights are averages over the pixels of
    each (``area``, as by the training scripts that have masks).

    Raises:
        ValueError: If it cannot be brought to that shape.
    """
    if len(shape) == 3 and mask.ndim == 4 and mask.shape[2:] != tuple(shape[1:]):
        mask = interpolate(mask, tuple(shape[1:]), mode="area")
    try:
        return mask.expand(len(mask), *shape)
    except RuntimeError as error:
        raise ValueError(
            f"The loss mask has shape {tuple(mask.shape[1:])}, and what the network predicts "
            f"{tuple(shape)}. Pass weights of that shape."
        ) from error
