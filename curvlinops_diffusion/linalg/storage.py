"""Operators on disk: one safetensors file with a described header, never half-written.

Nothing in a file is ever executed: tensors are raw numbers, the header is JSON text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.linalg.blocks import BLOCK_TYPES, Block, DenseBlock
from curvlinops_diffusion.linalg.operator_files import (
    FORMAT,
    FORMAT_VERSION,
    OPERATOR,
    WITHOUT_NULL,
    read_file,
)
from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.placement import PlacedBlock
from curvlinops_diffusion.runtime.adapters import adapter_of, common_names
from curvlinops_diffusion.runtime.digests import fingerprint
from curvlinops_diffusion.runtime.modes import unwrapped


def versions() -> dict[str, str]:
    """Versions of the libraries that determine an operator."""
    packages = ("curvlinops-for-pytorch", "diffusers", "numpy", "torch")
    return {package: version(package) for package in packages}


def save_blocks(
    path: str | PathLike[str],
    kind: str,
    space: ParameterSpace,
    blocks: Sequence[PlacedBlock],
    info: dict[str, Any],
) -> None:
    """Write a block-diagonal operator to a file.

    Args:
        path: Where to. Written under another name in the same folder, then renamed.
        kind: The operator's kind.
        space: Its parameter space.
        blocks: Its blocks.
        info: How it was made.

    Raises:
        ValueError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    stored: dict[tuple[int, torch.Size], str] = {}  # weight and bias share a basis: store it once
    listed = []
    for number, placed in enumerate(blocks):
        names = {}
        for role, tensor in placed.block.tensors().items():
            identity = (tensor.data_ptr(), tensor.shape)
            if identity not in stored:
                stored[identity] = f"{number}.{placed.name}.{role}"
                tensors[stored[identity]] = tensor
            names[role] = stored[identity]
        listed.append(
            {
                "name": placed.name,
                "params": placed.params,
                "type": _type_name(placed),
                "tensors": names,
                "transposed": placed.transposed,
            }
        )
    lists_zeros = any("null" in placed.block.tensors() for placed in blocks)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION if lists_zeros else WITHOUT_NULL,
        "kind": kind,
        "parameters": [[name, list(shape)] for name, shape in space.shapes.items()],
        "dtype": str(space.dtype).removeprefix("torch."),
        "blocks": listed,
        "info": info,
    }
    OPERATOR.write(Path(path), tensors, header)


def load_blocks(
    path: str | PathLike[str], model: nn.Module, device: torch.device | str | None = None
) -> tuple[str, ParameterSpace, list[PlacedBlock], dict[str, Any]]:
    """Read a block-diagonal operator of a model from a file.

    Args:
        path: The file.
        model: The model that the operator was made for.
        device: Where to put it; ``None`` for the model's device.

    Returns:
        The operator's kind, parameter space, blocks, and how it was made.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of a newer format, or was made
            for another model or other weights; the message says which.
    """
    path = Path(path)
    header, tensors = read_file(path)
    own = dict(model.named_parameters())
    try:
        if not all(name in own for name, _ in header["parameters"]):
            model = unwrapped(model)
            own = dict(model.named_parameters())
            header = _with_names_of(own, header)
        _check_model(path, header, model, own)
        shapes = {name: tuple(shape) for name, shape in header["parameters"]}
        device = own[next(iter(shapes))].device if device is None else torch.device(device)
        # copied, since products of tensors that are not aligned in memory round differently
        tensors = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        space = ParameterSpace(shapes, getattr(torch, header["dtype"]), device)
        blocks = [_block(entry, tensors) for entry in header["blocks"]]
        _check_blocks(space, blocks)
        return str(header["kind"]), space, blocks, dict(header["info"])
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
        raise OPERATOR.damaged(path, f"{type(error).__name__}: {error}") from error


def _with_names_of(own: Iterable[str], header: dict[str, Any]) -> dict[str, Any]:
    """A header whose parameters are called as the model's, if only an adapter's name differs."""
    here = {common: name for name, common in common_names(own).items()}
    there = common_names(name for name, _ in header["parameters"])
    renamed = {name: here.get(common, name) for name, common in there.items()}
    return header | {
        "parameters": [[renamed[name], shape] for name, shape in header["parameters"]],
        "blocks": [
            block | {"params": [renamed[name] for name in block["params"]]}
            for block in header["blocks"]
        ],
    }


def read_blocks(path: str | PathLike[str]) -> tuple[dict[str, Any], list[PlacedBlock]]:
    """Read what an operator's file says of itself, and its blocks, without the model.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of a newer format.
    """
    path = Path(path)
    header, tensors = read_file(path)
    try:
        return header, [_block(entry, tensors) for entry in header["blocks"]]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise OPERATOR.damaged(path, f"{type(error).__name__}: {error}") from error


def _check_blocks(space: ParameterSpace, blocks: Sequence[PlacedBlock]) -> None:
    """Check that blocks and parameters fit together."""
    held = sorted(name for placed in blocks for name in placed.params)
    if held != sorted(space.shapes) or not space.dtype.is_floating_point:
        raise TypeError("the blocks do not hold every parameter once")
    for placed in blocks:
        entries = sum(prod(space.shapes[name]) for name in placed.params)
        if entries != placed.num_entries or not _is_square(placed.block):
            raise TypeError(f"the block '{placed.name}' does not fit its parameters")


def _is_square(block: Block) -> bool:
    """Tell whether the tensors of a block have the shapes that its kind asks for."""
    *groups, O, I = block.shape
    expected = {
        "eigenvalues": [(*groups, O, I)],
        "null": [(*groups, O, I)],
        "output_basis": [(*groups, O, O)],
        "input_basis": [(*groups, I, I)],
        "output_factor": [(*groups, O, O)],
        "input_factor": [(*groups, I, I), (I,)],
        "matrix": [(*groups, O, O)],
    }
    return all(tuple(z.shape) in expected[name] for name, z in block.tensors().items())


def _block(entry: dict[str, Any], tensors: dict[str, Tensor]) -> PlacedBlock:
    own = {role: tensors[name] for role, name in entry["tensors"].items()}
    block: Block
    if entry["type"] == "kronecker" and "input_factor" not in own:  # a bias, in version 1
        block = DenseBlock(own["output_factor"])
    else:
        block = BLOCK_TYPES[entry["type"]](**own)
    transposed = entry.get("transposed", False)
    return PlacedBlock(entry["name"], tuple(entry["params"]), block, transposed)


def _type_name(placed: PlacedBlock) -> str:
    return next(name for name, cls in BLOCK_TYPES.items() if type(placed.block) is cls)


def _check_model(
    path: Path, header: dict[str, Any], model: nn.Module, own: dict[str, nn.Parameter]
) -> None:
    for name, shape in header["parameters"]:
        if name not in own:
            advice = "Pass the model that the operator was computed with."
            if adapter_of(name) is not None:
                advice = "Load the adapter that it is of into the model first (--lora)."
            raise ValueError(
                f"'{path}' was made for another model: this one has no parameter '{name}'. {advice}"
            )
        if list(own[name].shape) != shape:
            raise ValueError(
                f"'{path}' was made for another model: '{name}' has shape {shape} there and "
                f"{list(own[name].shape)} here. Pass the model that the operator was computed with."
            )
    there, here = header["info"].get("fingerprint"), fingerprint(model)
    if there is not None and there["structure"] != here["structure"]:
        raise ValueError(
            f"'{path}' was made for another model: names or shapes of its other parameters and "
            "buffers differ. Pass the model that the operator was computed with."
        )
    if there is not None and there["weights"] != here["weights"]:
        raise ValueError(
            f"'{path}' was made with other weights of this model (or in another precision). Load "
            "the weights that the operator was computed with."
        )
