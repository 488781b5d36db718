"""Weights of an adapter against the network that they were loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from torch import Tensor, nn

from curvlinops_diffusion.loading.adapter_files import ADDITIONS, AdapterFile, Conversion
from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.adapters import adapter_of

# which part of a pipeline a name begins with; None is the denoiser
_PARTS = {
    "lora_unet_": None,
    "lora_transformer_": None,
    "diffusion_model.": None,
    "unet.": None,
    "transformer.": None,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}

Stored = dict[str, dict[str, Tensor]]


def by_part(
    conversion: Conversion, parts: Mapping[str, nn.Module], alone: bool
) -> tuple[Stored, dict[str, dict[str, float]]]:
    """Divide an adapter's weights among the parts of a pipeline, under PEFT's names.

    Args:
        conversion: The weights by diffusers' names, which begin with a part's.
        parts: The networks by their names, the denoiser first.
        alone: Whether there is no pipeline: all names are of the denoiser, and begin with no part.

    Returns:
        The weights and the factors of their products, by part and PEFT's name; also those of a
        part that is not there.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in conversion.tensors:
        part = next(iter(parts)) if alone else key.split(".")[0]
        inner = key if alone else key.removeprefix(f"{part}.")
        keys.setdefault(part, {})[inner] = key
    names = {part: _peft_names(found, part, parts.get(part)) for part, found in keys.items()}
    stored = {p: {n: conversion.tensors[k] for n, k in own.items()} for p, own in names.items()}
    found = conversion.scales
    scales = {p: {n: found[k] for n, k in own.items() if k in found} for p, own in names.items()}
    return stored, scales


def _peft_names(keys: dict[str, str], part: str, module: nn.Module | None) -> dict[str, str]:
    """PEFT's names of diffusers' keys, of all their kinds."""
    if any("lora_A" in key for key in keys):
        return keys
    if not part.startswith("text_encoder"):
        return dict(convert_unet_state_dict_to_peft(keys))
    for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        keys = convert_state_dict_to_peft(keys, original_type=kind)
    if not hasattr(module, "text_model"):  # as transformers had it before
        keys = {name.removeprefix("text_model."): key for name, key in keys.items()}
    return keys


def settle(
    peft: Any, module: nn.Module, adapter: str, stored: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Check that network and file hold the same weights of an adapter, and find its parameters.

    Loading gives adapters the precision of the network that they adapt, which may be lower: the
    matrices get that of the file, at least float32. Whole modules and biases keep the network's,
    whose arithmetic they take part in.

    Args:
        peft: The library.
        module: The network.
        adapter: The name of the adapter in it.
        stored: The file's weights by PEFT's names.

    Returns:
        Names of the network's parameters that the file holds; names of the file's weights that are
        not in the network; names of the adapter's parameters that are not in the file.
    """
    state = module.state_dict(keep_vars=True)
    names = {id(z): name for name, z in state.items()}
    # by the names that PEFT would save them under, which a file has
    placed = peft.get_peft_model_state_dict(
        module,
        state_dict=state,
        adapter_name=adapter,
        save_embedding_layers=any(key.endswith("base_layer.weight") for key in stored),
    )
    found, left = [], []
    for key, z in stored.items():
        p = placed.get(key)
        same = p is not None and not p.is_meta and p.shape == z.shape
        if not (same and torch.equal(p.detach(), z.to(p.device, p.dtype))):
            left.append(key)
            continue
        name = names[id(p)]
        if isinstance(p, nn.Parameter):
            found.append(name)
            if adapter_of(name) is not None and not _takes_part(name):
                p.data = z.to(p.device, torch.promote_types(p.dtype, torch.float32)).clone()
    lost = [key for key in placed if key not in stored]
    return found, left, lost


def _takes_part(name: str) -> bool:
    """Whether a parameter stands in the place of one of the network's."""
    return ".modules_to_save." in name or ".trainable_tokens_" in name


def add_to_weights(
    file: AdapterFile, parts: Mapping[str, nn.Module]
) -> tuple[dict[str, list[str]], list[str]]:
    """Add a file's differences to the weights and biases of layers; all of them or none.

    Scripts name layers by their places in the network, with underscores for dots.

    Args:
        file: The file.
        parts: The networks, the denoiser first, by their names in the pipeline.

    Returns:
        The names of the parameters by part, and the file's names that fit none.
    """
    places: list[tuple[str, str, nn.Parameter, Tensor]] = []
    unplaced = []
    layers = {part: _by_flat_name(module) for part, module in parts.items()}
    for key, z in file.additions.items():
        end = next(end for end in ADDITIONS if key.endswith(end))
        part, flat = _part_of(key.removesuffix(end), next(iter(parts)))
        found = layers.get(part, {})
        layer = found.get(flat, found.get(flat.removeprefix("text_model_")))
        p = getattr(layer, ADDITIONS[end], None)
        if not isinstance(p, nn.Parameter) or not p.is_floating_point() or p.shape != z.shape:
            unplaced.append(key)
            continue
        names = {id(q): name for name, q in parts[part].named_parameters()}
        places.append((part, names[id(p)], p, z))
    added: dict[str, list[str]] = {}
    if not unplaced:
        for part, name, p, z in places:
            wide = torch.promote_types(p.dtype, torch.float32)
            p.data = (p.data.to(wide) + z.to(p.device, wide)).to(p.dtype)
            added.setdefault(part, []).append(name)
    return added, unplaced


def _by_flat_name(module: nn.Module) -> dict[str, nn.Module]:
    return {name.replace(".", "_"): layer for name, layer in module.named_modules()}


def _part_of(stem: str, denoiser: str) -> tuple[str, str]:
    """The part of the pipeline that a stem names, and its layer with underscores."""
    for prefix, part in _PARTS.items():
        if stem.startswith(prefix):
            return part or denoiser, stem.removeprefix(prefix).replace(".", "_")
    return denoiser, stem.replace(".", "_")


def set_scales(module: nn.Module, adapter: str, scales: Mapping[str, float]) -> None:
    """Set the factors of an adapter's products.

    Args:
        module: The network.
        adapter: The name of the adapter in it.
        scales: The factors by PEFT's names of the weights.
    """
    for key, scale in scales.items():
        layer: Any = module.get_submodule(key.partition(".lora_")[0])
        if adapter in getattr(layer, "scaling", {}):
            layer.scaling[adapter] = scale
            layer.lora_alpha[adapter] = scale * layer.r[adapter]  # PEFT scales anew by it


def differences(stored: Stored, parts: Mapping[str, nn.Module]) -> list[str]:
    """Say how the layers of an adapter differ from those of the networks.

    Args:
        stored: The weights by part and PEFT's name.
        parts: The networks by their names.

    Returns:
        Phrases; none if all layers are there and have the sizes of the adapter's.
    """
    phrases: list[str] = []
    absent: list[str] = []
    unknown: list[str] = []
    other: dict[str, str] = {}
    strange = [part for part in stored if part not in parts]
    if strange:
        count = sum(len(stored[part]) for part in strange)
        phrases.append(
            f"the names of {count} of its weights begin with {listed(strange)}, and the networks "
            f"are called {', '.join(repr(part) for part in parts)}"
        )
    for part, tensors in stored.items():
        if part not in parts:
            continue
        modules = dict(parts[part].named_modules())
        for key, z in tensors.items():
            name, found, matrix = key.partition(".lora_")
            if not found:
                continue
            if matrix.startswith(("down", "up")):
                unknown.append(key)
                continue
            layer: Any = modules.get(name)
            if layer is None:
                absent.append(name)
                continue
            layer = getattr(layer, "base_layer", layer)
            sides, dim = {
                "A": (("in_features", "in_channels"), 1),
                "B": (("out_features", "out_channels"), 0),
            }.get(matrix[:1], ((), 0))
            here = next((getattr(layer, side) for side in sides if hasattr(layer, side)), None)
            if here is not None and z.ndim > dim and z.shape[dim] != here:
                wide = "wide" if dim else "wide at its output"
                told = f"'{name}' is {z.shape[dim]} {wide} in the file and {here} in the network"
                other.setdefault(name, told)
    if other:
        first = next(iter(other.values()))
        more = f", and {len(other) - 1} more layers are of other sizes" if len(other) > 1 else ""
        phrases.append(first + more)
    if unknown:
        phrases.append(f"{len(unknown)} of its names are of no form known here ({listed(unknown)})")
    if absent:
        absent = sorted(set(absent))
        phrases.append(f"{len(absent)} of its layers are not in the network ({listed(absent)})")
    return phrases
