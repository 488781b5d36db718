"""Find the layers that hold the selected parameters, and the parameters in none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvlinops_diffusion.layers.convolution import ConvolutionKind, TransposedConvolutionKind
from curvlinops_diffusion.layers.kind import LayerKind
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.simple_kinds import (
    BATCH_NORM,
    DIFFUSERS_RMS_NORM,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    EmbeddingKind,
    LinearKind,
)
from curvlinops_diffusion.linalg.parameters import Parameters, select_parameters

#: What is known of each type of layer. An entry of your own makes it known to every operator. A
#: type may be given by its full name, so that its library need not be imported.
LAYER_KINDS: dict[type[nn.Module] | str, LayerKind] = {
    nn.Linear: LinearKind(),
    nn.Conv1d: ConvolutionKind(),
    nn.Conv2d: ConvolutionKind(),
    nn.Conv3d: ConvolutionKind(),
    nn.ConvTranspose1d: TransposedConvolutionKind(),
    nn.ConvTranspose2d: TransposedConvolutionKind(),
    nn.ConvTranspose3d: TransposedConvolutionKind(),
    nn.Embedding: EmbeddingKind(),
    nn.GroupNorm: GROUP_NORM,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    "diffusers.models.normalization.RMSNorm": DIFFUSERS_RMS_NORM,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.BatchNorm3d: BATCH_NORM,
    nn.InstanceNorm1d: INSTANCE_NORM,
    nn.InstanceNorm2d: INSTANCE_NORM,
    nn.InstanceNorm3d: INSTANCE_NORM,
}


@dataclass(frozen=True)
class Coverage:
    """The treatment of each selected parameter.

    Attributes:
        params: The covered parameters by name, in the order they were selected.
        layers: The layers of known kinds that hold them, in the model's order.
        others: The reasons why parameters are in none of these, by name. Their gradients are
            found by automatic differentiation, example by example.
        rounding: Parameters whose gradient is rounding errors alone in a trial, so that their exact
            block is of the squares of these.
    """

    params: dict[str, nn.Parameter]
    layers: tuple[Layer, ...]
    others: dict[str, str]
    rounding: tuple[str, ...] = ()


def cover(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> Coverage:
    """Find the layers that hold the selected parameters.

    Args:
        model: The model.
        selected: Parameters by name.

    Returns:
        The layers, and the parameters in none; those without entries are in neither.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    name_of = {id(p): name for name, p in selected.items()}
    layers: list[Layer] = []
    others: dict[str, str] = {}
    for module_name, module in model.named_modules():
        own = {
            key: name_of[id(p)]
            for key, p in module.named_parameters(recurse=False)
            if id(p) in name_of and p.numel() > 0  # else there is nothing to differentiate
        }
        if not own:
            continue
        kind = next(filter(None, map(_kind_of_type, type(module).__mro__)), None)
        held = [holders[id(p)] for p in module.parameters(recurse=False)]
        if kind is None or not own.keys() <= {kind.weight_name, kind.bias_name}:
            reason = f"held by a {type(module).__name__}"
        else:
            shared = [f"shared by the modules {names}" for names in held if len(names) > 1]
            reason = kind.unsupported(module) or next(iter(shared), "")
        if kind is None or reason:
            others.update(dict.fromkeys(own.values(), reason))
        else:
            weight, bias = (own.get(name) for name in (kind.weight_name, kind.bias_name))
            layers.append(Layer(module_name, module, kind, weight, bias))
    return Coverage(dict(selected), tuple(layers), others)


def _kind_of_type(cls: type[Any]) -> LayerKind | None:
    """Look up what is known of a type itself, whatever it inherits from."""
    return LAYER_KINDS.get(cls) or LAYER_KINDS.get(f"{cls.__module__}.{cls.__qualname__}")


def covered_parameters(model: nn.Module, params: Parameters) -> Coverage:
    """Find how a user's choice of parameters is covered; ``None`` for every parameter.

    Raises:
        ValueError: If the choice is not of the model's parameters, or empty.
    """
    return cover(model, select_parameters(model, params))
