"""Operators on disk: one safetensors file with a described header, never half-written.

Nothing in a file is ever executed: tensors are raw numbers, the header is JSON text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from math import prod
from os import PathLike
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.linalg.blocks import BLOCK_TYPES, Block
from curvlinops_diffusion.linalg.operator_files import (
    FORMAT,
    OPERATOR,
    damaged_if_malformed,
    read_file,
    read_header,
)
from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.placement import PlacedBlock, in_order
from curvlinops_diffusion.runtime.adapters import adapter_of, common_names
from curvlinops_diffusion.runtime.digests import fingerprint
from curvlinops_diffusion.runtime.modes import unwrapped
from curvlinops_diffusion.runtime.processes import ALONE, Processes
from curvlinops_diffusion.runtime.sharded_networks import device_of

_TYPE_NAMES: dict[type[Block], str] = {cls: name for name, cls in BLOCK_TYPES.items()}


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
    processes: Processes = ALONE,
) -> None:
    """Write a block-diagonal operator to a file, or one for each process and one that names them.

    Raises:
        ValueError: If the file cannot be written.
    """
    path = Path(path)
    header, tensors = _described(kind, space, blocks, info)
    if processes.count == 1:
        OPERATOR.write(path, tensors, header)
        return
    # names of their own, so that an older operator stays whole until the last one is written
    token = processes.all_gather(token_hex(4))[0]
    name = f"{path.stem}.{token}.{processes.rank}of{processes.count}{path.suffix}"
    processes.all_or_none(lambda: OPERATOR.write(path.with_name(name), tensors, header))
    listed = processes.all_gather(header["blocks"])
    shards = processes.all_gather(name)

    def write_names() -> None:
        if processes.rank > 0:
            return
        old = _shards_of(path)
        every = [entry | {"shard": n} for n, own in enumerate(listed) for entry in own]
        order = {name: place for place, name in enumerate(space.shapes)}
        every.sort(key=lambda entry: min(order[name] for name in entry["params"]))
        whole = header | {"blocks": every, "shards": shards}
        OPERATOR.write(path, {}, whole)
        for other in old:
            other.unlink(missing_ok=True)

    processes.all_or_none(write_names)


def _shards_of(path: Path) -> list[Path]:
    """The files that an operator's file names, beside it; none if it is none that can be read."""
    try:
        names = OPERATOR.read_header(path).get("shards", [])
        return [path.with_name(Path(name).name) for name in names]
    except (AttributeError, TypeError, ValueError):  # none, damaged, of another version
        return []


def _described(
    kind: str, space: ParameterSpace, blocks: Sequence[PlacedBlock], info: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file."""
    tensors: dict[str, Tensor] = {}
    stored: dict[tuple[int, torch.Size], str] = {}  # weight and bias share a basis: store it once
    listed = []
    for number, placed in enumerate(blocks):
        names = {}
        for role, tensor in placed.block.tensors().items():
            name = stored.setdefault(
                (tensor.data_ptr(), tensor.shape), f"{number}.{placed.name}.{role}"
            )
            tensors.setdefault(name, tensor)
            names[role] = name
        listed.append(
            {
                "name": placed.name,
                "params": list(placed.params),
                "type": _TYPE_NAMES[type(placed.block)],
                "tensors": names,
                "transposed": placed.transposed,
            }
        )
    header = {
        "format": FORMAT,
        "kind": kind,
        "parameters": [[name, list(shape)] for name, shape in space.shapes.items()],
        "dtype": str(space.dtype).removeprefix("torch."),
        "blocks": listed,
        "info": info,
    }
    return header, tensors


def load_blocks(
    path: str | PathLike[str],
    model: nn.Module,
    device: torch.device | str | None = None,
    processes: Processes = ALONE,
) -> tuple[str, ParameterSpace, list[PlacedBlock], dict[str, Any]]:
    """Read an operator's kind, parameter space, blocks, and how it was made, from a file.

    Of several processes each reads some blocks, as many bytes as the others. ``device=None`` stands
    for the model's.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of another format, or was made
            for another model or other weights; the message says which.
    """
    path = Path(path)
    header, sources = _sources(path, processes)
    own = dict(model.named_parameters())
    with damaged_if_malformed(path):
        if not all(name in own for name, _ in header["parameters"]):
            model = unwrapped(model)
            own = dict(model.named_parameters())
            header = _with_names_of(own, header)
        _check_model(path, header, model, own)
        shapes = {name: tuple(shape) for name, shape in header["parameters"]}
        first = own[next(iter(shapes))]
        device = device_of(first) if device is None else torch.device(device)
        space = ParameterSpace(shapes, getattr(torch, header["dtype"]), device)
        blocks = []
        for file, chosen in sources.items():
            entries = [header["blocks"][number] for number in chosen]
            wanted = {name for entry in entries for name in entry["tensors"].values()}
            _, tensors = read_file(file, wanted)
            # copied, since products of tensors that are not aligned in memory round differently
            moved = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
            blocks += [_block(entry, moved) for entry in entries]
        blocks = in_order(blocks, shapes)
        _check_blocks(space, blocks, header)
        return str(header["kind"]), space, blocks, dict(header["info"])


def read_blocks(path: str | PathLike[str]) -> tuple[dict[str, Any], list[PlacedBlock]]:
    """Read an operator's header and blocks, without the model.

    Raises:
        ValueError: If the file is missing, truncated, foreign or of another format.
    """
    path = Path(path)
    header, sources = _sources(path, ALONE)
    with damaged_if_malformed(path):
        blocks: dict[int, PlacedBlock] = {}
        for file, numbers in sources.items():
            _, tensors = read_file(file)
            blocks |= {n: _block(header["blocks"][n], tensors) for n in numbers}
        return header, [blocks[n] for n in range(len(header["blocks"]))]


def _sources(path: Path, processes: Processes) -> tuple[dict[str, Any], dict[Path, list[int]]]:
    """The header, and the places in its list of the blocks that this process reads, by file."""
    header = read_header(path)
    with damaged_if_malformed(path):
        sizes = {name: prod(shape) for name, shape in header["parameters"]}
        files = [path.with_name(Path(name).name) for name in header.get("shards", [path.name])]
        together: dict[tuple[int, str], list[int]] = {}  # blocks that share tensors
        for number, entry in enumerate(header["blocks"]):
            shard = entry.get("shard", 0)
            keys = [(shard, name) for name in entry["tensors"].values()]
            known = next((together[key] for key in keys if key in together), [])
            known.append(number)
            together |= dict.fromkeys(keys, known)
        groups = list({id(numbers): numbers for numbers in together.values()}.values())
        # a block's bytes go with its parameters' entries
        costs = [
            float(sum(sizes[p] for n in numbers for p in header["blocks"][n]["params"]))
            for numbers in groups
        ]
        sources: dict[Path, list[int]] = {}
        for numbers, owner in zip(groups, processes.owners(costs), strict=True):
            if owner == processes.rank:
                shard = header["blocks"][numbers[0]].get("shard", 0)
                sources.setdefault(files[shard], []).extend(numbers)
    return header, sources


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


def _check_blocks(
    space: ParameterSpace, blocks: Sequence[PlacedBlock], header: Mapping[str, Any]
) -> None:
    """Check that blocks and parameters fit together."""
    held = sorted(name for entry in header["blocks"] for name in entry["params"])
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
    block: Block = BLOCK_TYPES[entry["type"]](**own)
    return PlacedBlock(entry["name"], tuple(entry["params"]), block, entry["transposed"])


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
    if there is None:
        return
    if there["structure"] != here["structure"]:
        raise ValueError(
            f"'{path}' was made for another model: names or shapes of its other parameters and "
            "buffers differ. Pass the model that the operator was computed with."
        )
    if there.get("settings", here["settings"]) != here["settings"]:
        raise ValueError(
            f"'{path}' was made with other settings of this model: its config, constants of its "
            "layers, or the scale of its adapters and which of them are active. Load it, and its "
            "adapters, as when the operator was computed."
        )
    if there["weights"] != here["weights"]:
        raise ValueError(
            f"'{path}' was made with other weights of this model (or in another precision). Load "
            "the weights that the operator was computed with."
        )
