"""Saved operators, back as the objects they were."""

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from curvlinops_diffusion.curvature.division import where_they_fit
from curvlinops_diffusion.curvature.kfac import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
)
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.storage import load_blocks
from curvlinops_diffusion.runtime.files import check_same
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions
from curvlinops_diffusion.runtime.sharded_networks import device_of

# what of a regression's description curvature and gradients must share
_OBJECTIVE = [
    "prediction_type",
    "reduction",
    "num_levels",
    "process",
    "weighting",
    "encoder",
    "timesteps",
    "condition_dropout",
    "noise_offset",
    "input_perturbation",
    "augmentations",
    "training_arguments",
]

_KINDS: dict[str, type[BlockDiagonalLinearOperator]] = {
    cls.KIND: cls
    for cls in (
        BlockDiagonalLinearOperator,
        DiffusionKFACLinearOperator,
        DiffusionEKFACLinearOperator,
    )
}


def load_operator(
    path: str | PathLike[str],
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    passes: PassOptions = PLAIN,
) -> BlockDiagonalLinearOperator:
    """Load an operator that was written by its ``save``.

    Args:
        path: The file.
        model: The model that the operator was computed with.
        device: Where to put the operator; ``None`` for the model's device.
        passes: With ``distributed=True, sharded=True`` each process reads its share of the blocks
            only, from however many files they were written to. Beyond ``max_memory`` bytes the
            blocks stay in the host's memory, and are multiplied from there.

    Returns:
        K-FAC, EK-FAC, or an inverse or power of them.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of a newer format, or was made
            for another model or other weights; the message says which.

    Examples:
        >>> DiffusionKFACLinearOperator(train).save(f"{folder}/kfac.safetensors")
        >>> K = load_operator(f"{folder}/kfac.safetensors", unet)
        >>> type(K).__name__
        'DiffusionKFACLinearOperator'
    """
    processes = passes.holders
    there = device if passes.max_memory is None else "cpu"
    kind, space, blocks, info = processes.all_or_none(
        lambda: load_blocks(path, model, there, processes)
    )
    if passes.max_memory is not None:
        device = device_of(next(model.parameters())) if device is None else torch.device(device)
        space = replace(space, device=device)
        blocks = where_they_fit(blocks, passes.max_memory, device)
    if kind not in _KINDS:
        raise ValueError(f"'{path}' holds an operator of unknown kind {kind!r}.")
    return _KINDS[kind].of_blocks(space, blocks, info, processes)


def check_same_objective(
    path: str | PathLike[str], info: Mapping[str, Any], regression: NoisedRegression, advice: str
) -> None:
    """Check that a saved operator is of a regression's loss; draws and precision are free.

    Args:
        path: The operator's file.
        info: The operator's ``info``.
        regression: The regression.
        advice: What to do if it is not.

    Raises:
        ValueError: If it is of another loss, naming what differs.
    """
    # what of a recipe is not used is not described
    unused: dict[str, Any] = dict.fromkeys(("noise_offset", "input_perturbation"), 0.0)
    unused["training_arguments"] = {}
    here = {**unused, **json.loads(json.dumps(regression.description))}
    there = {**unused, **info.get("regression", {})}
    known = [key for key in _OBJECTIVE if key in there and key in here]
    check_same(
        {key: there[key] for key in known},
        {key: here[key] for key in known},
        f"'{path}' was fitted with another objective",
        advice,
    )


def is_of_same_images(info: Mapping[str, Any], regression: NoisedRegression) -> bool:
    """Tell whether a saved operator was fitted to a regression's data, as far as it says."""
    fitted = (info.get("data") or {}).get("digest")
    return fitted is None or bool(fitted == regression.data_identity()["digest"])
