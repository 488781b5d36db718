"""Layers in weight-sharing form: ``[N, S, I]`` in, ``[N, S, O]`` out, gradient ``Σ_s b_s a_sᵀ``.

Below this file nothing asks whether a layer was a convolution. A layer type is an entry of
:data:`LAYER_KINDS`.

Legend: N batch, S weight-sharing positions (pixels, tokens; 1 for none), I inputs, O outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from curvlinops_diffusion.moments import LatestProduct, Moment, RowMoment
from curvlinops_diffusion.parameters import Parameters, select_parameters
from curvlinops_diffusion.patches import (
    PatchMoment,
    num_patches,
    patch_gradients,
    patch_sum,
    patches,
)


class LayerKind(ABC):
    """How a type of layer reads as a linear map with weight sharing."""

    def unsupported(self, module: nn.Module) -> str:
        """Why this module cannot be read that way; empty if it can."""
        return ""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module's input as ``[N, S, I]``, ``I`` ordered like ``weight.flatten(1)``."""

    @abstractmethod
    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """The gradient in the module's output as ``[N, S, O]``."""

    @abstractmethod
    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor:
        """The gradient in the module's output with its ``O`` channels rotated, ``g U``."""

    # What follows can be had from inputs and gradients, but more cheaply without the former.

    def weight_gradients(self, module: nn.Module, x: Tensor, g: Tensor, group: int) -> Tensor:
        """Gradients ``Σ_s b_s a_sᵀ`` summed over groups of successive examples.

        Args:
            module: The module.
            x: Its input.
            g: The gradient in its output.
            group: Examples in a group.

        Returns:
            The sums, shape ``[N / group, O, I]``.
        """
        a_NSI, b_NSO = self.inputs(module, x), self.gradients(module, g)
        a, b = (z.reshape(len(z) // group, -1, z.shape[2]) for z in (a_NSI, b_NSO))
        return b.mT @ a

    def positions(self, module: nn.Module, x: Tensor) -> int:
        """The number ``S`` of positions."""
        return self.inputs(module, x).shape[1]

    def input_sum(self, module: nn.Module, x: Tensor) -> Tensor:
        """``Σ_s a_s`` of each example, shape ``[N, I]``."""
        return self.inputs(module, x).sum(1)

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        """A new running ``Σ_n Σ_s a_s a_sᵀ`` of the module's inputs."""
        return RowMoment(latest)


class _LinearKind(LayerKind):
    def unsupported(self, module: nn.Module) -> str:
        inside_attention = isinstance(module, NonDynamicallyQuantizableLinear)
        return "nn.MultiheadAttention reads its weight without calling it" * inside_attention

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, x.shape[-1])

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        return g.reshape(len(g), -1, g.shape[-1])

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor:
        return g @ U


class _Conv2dKind(LayerKind):
    def unsupported(self, module: nn.Module) -> str:
        assert isinstance(module, nn.Conv2d)
        return "grouped convolution" * (module.groups > 1)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        return patches(module, x)

    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        return g.flatten(2).transpose(1, 2)

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor:
        return (U.T @ g.flatten(2)).view(g.shape)

    def weight_gradients(self, module: nn.Module, x: Tensor, g: Tensor, group: int) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        return patch_gradients(module, x, g, group)

    def positions(self, module: nn.Module, x: Tensor) -> int:
        assert isinstance(module, nn.Conv2d)
        return num_patches(module, x)

    def input_sum(self, module: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        return patch_sum(module, x)

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        assert isinstance(module, nn.Conv2d)
        return PatchMoment(module)


LAYER_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _LinearKind(),
    nn.Conv2d: _Conv2dKind(),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer in weight-sharing form, with those of its parameters that were selected.

    Attributes:
        name: The module's name within the model.
        module: The module.
        kind: How it reads as a linear map.
        weight: The weight's name, or ``None`` if it was not selected.
        bias: The bias' name, or ``None``.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    weight: str | None
    bias: str | None

    def inputs(self, x: Tensor) -> Tensor:
        """The module's input as ``[N, S, I]``."""
        return self.kind.inputs(self.module, x)

    def gradients(self, g: Tensor) -> Tensor:
        """The gradient in the module's output as ``[N, S, O]``."""
        return self.kind.gradients(self.module, g)

    def rotated(self, g: Tensor, U: Tensor) -> Tensor:
        """The gradient in the module's output with its ``O`` channels rotated, ``g U``."""
        return self.kind.rotated(self.module, g, U)

    def parts(self, separate: bool) -> tuple[Part, ...]:
        """The blocks of the curvature that belong to this layer.

        Args:
            separate: Whether weight and bias are blocks of their own.
        """
        if self.weight and self.bias and not separate:
            return (Part(self, PartKind.JOINT, (self.weight, self.bias)),)
        weight = (Part(self, PartKind.WEIGHT, (self.weight,)),) if self.weight else ()
        bias = (Part(self, PartKind.BIAS, (self.bias,)),) if self.bias else ()
        return weight + bias


class PartKind(str, Enum):
    """Which of a layer's parameters form a block."""

    WEIGHT = "weight"
    BIAS = "bias"
    JOINT = "joint"


@dataclass(frozen=True)
class Part:
    """Parameters of a layer that form one block ``[O, I]`` of the curvature.

    Attributes:
        layer: The layer.
        kind: Weight, bias (``I = 1``), or both (the bias as last column).
        params: The parameters' names.
    """

    layer: Layer
    kind: PartKind
    params: tuple[str, ...]

    @property
    def key(self) -> str:
        """A name that is unique within the model."""
        return f"{self.layer.name}.{self.kind.value}" if self.layer.name else self.kind.value

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``: output entries, and inputs that each of them has a coefficient for."""
        own = dict(self.layer.module.named_parameters(recurse=False))
        O = len(own["weight"])
        if self.kind is PartKind.BIAS:
            return O, 1
        return O, own["weight"].numel() // O + (self.kind is PartKind.JOINT)

    def new_zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Zeros on the layer's device."""
        return next(self.layer.module.parameters()).new_zeros(shape, dtype=dtype).detach()

    def inputs(self, x: Tensor) -> Tensor | None:
        """What multiplies these parameters, ``[N, S, I]``; ``None`` for a bias (all ones)."""
        if self.kind is PartKind.BIAS:
            return None
        a_NSI = self.layer.inputs(x)
        return a_NSI if self.kind is PartKind.WEIGHT else pad(a_NSI, (0, 1), value=1.0)

    def gradients(self, x: Tensor, g: Tensor, group: int = 1) -> Tensor:
        """The parameters' gradients, summed over groups of successive examples.

        Args:
            x: The layer's input.
            g: The gradient in its output.
            group: Examples in a group.

        Returns:
            The sums, shape ``[N / group, O, I]``.
        """
        pieces = []
        if self.kind is not PartKind.BIAS:
            pieces.append(self.layer.kind.weight_gradients(self.layer.module, x, g, group))
        if self.kind is not PartKind.WEIGHT:
            bias_NO = self.layer.gradients(g).sum(1)
            pieces.append(bias_NO.unflatten(0, (-1, group)).sum(1).unsqueeze(2))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)

    def positions(self, x: Tensor) -> int:
        """The number ``S`` of positions."""
        return self.layer.kind.positions(self.layer.module, x)

    def input_sum(self, x: Tensor) -> Tensor:
        """``Σ_s a_s`` of each example, shape ``[N, I]``; not for a bias."""
        total_NI = self.layer.kind.input_sum(self.layer.module, x)
        extended = self.kind is PartKind.JOINT
        return pad(total_NI, (0, 1), value=float(self.positions(x))) if extended else total_NI

    def input_moment(self, latest: LatestProduct) -> Moment:
        """A new running ``Σ_n Σ_s a_s a_sᵀ``; not for a bias."""
        inner = self.layer.kind.input_moment(self.layer.module, latest)
        return _ExtendedMoment(self, inner) if self.kind is PartKind.JOINT else inner


class _ExtendedMoment:
    """The second moment of inputs that are extended by a one, from that of the inputs."""

    def __init__(self, part: Part, inner: Moment):
        self._part = part
        self._inner = inner
        self._extended: Tensor | None = None  # the last row: Σ [a, 1]

    def add(self, x: Tensor, weight: float) -> None:
        self._inner.add(x, weight)
        new = self._part.input_sum(x).sum(0) * weight
        self._extended = new if self._extended is None else self._extended + new

    def total(self) -> Tensor:
        assert self._extended is not None
        total = pad(self._inner.total(), (0, 1, 0, 1))
        total[-1], total[:, -1] = self._extended, self._extended
        return total


def part_inputs(part: Part, xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The inputs of a part over all calls of its layer, positions side by side: ``[N, S, I]``."""
    if part.kind is PartKind.BIAS:
        return None
    return torch.cat([a for a in (part.inputs(x.to(dtype)) for x in xs) if a is not None], 1)


@dataclass(frozen=True)
class Coverage:
    """Which parameters lie in supported layers.

    Attributes:
        params: The supported parameters by name, in the order they were selected.
        layers: The layers that hold them, in the model's order.
        left_out: The other parameters, each with the reason.
    """

    params: dict[str, nn.Parameter]
    layers: tuple[Layer, ...]
    left_out: dict[str, str]


def cover(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> Coverage:
    """Find the supported layers that hold the selected parameters.

    Args:
        model: The model.
        selected: Parameters by name.

    Returns:
        The layers, and the parameters in none.
    """
    holders = _holders(model)
    name_of = {id(p): name for name, p in selected.items()}
    layers, left_out = [], {}
    for module_name, module in model.named_modules():
        own = {
            key: name_of[id(p)]
            for key, p in module.named_parameters(recurse=False)
            if id(p) in name_of
        }
        if not own:
            continue
        kind, reason = _kind_of(module, own, holders)
        if kind is None:
            left_out.update(dict.fromkeys(own.values(), reason))
        else:
            layers.append(Layer(module_name, module, kind, own.get("weight"), own.get("bias")))
    params = {name: p for name, p in selected.items() if name not in left_out}
    return Coverage(params, tuple(layers), left_out)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            holders.setdefault(id(p), []).append(name)
    return holders


def _kind_of(
    module: nn.Module, own: dict[str, str], holders: dict[int, list[str]]
) -> tuple[LayerKind | None, str]:
    kind = next((kind for cls, kind in LAYER_KINDS.items() if isinstance(module, cls)), None)
    if kind is None or not own.keys() <= {"weight", "bias"}:
        return None, f"{type(module).__name__} is no supported layer"
    reason = kind.unsupported(module)
    if reason:
        return None, reason
    for p in module.parameters(recurse=False):
        if len(holders[id(p)]) > 1:
            return None, f"shared by the modules {holders[id(p)]}"
    return kind, ""


def supported_layers(model: nn.Module, params: Parameters) -> Coverage:
    """Find the layers of a user's choice of parameters.

    Args:
        model: The model.
        params: ``None`` for every supported parameter (what is left out is listed in a warning),
            or the parameters, all of which must be supported.

    Raises:
        ValueError: If an explicitly chosen parameter, or every parameter, is in no supported
            layer.
    """
    coverage = cover(model, select_parameters(model, params))
    accepted = " and ".join(cls.__name__ for cls in LAYER_KINDS)
    if coverage.left_out and params is not None:
        name, reason = next(iter(coverage.left_out.items()))
        raise ValueError(
            f"{len(coverage.left_out)} of the parameters passed are in no supported layer, the "
            f"first being '{name}' ({reason}). Supported: {accepted}. Leave them out of params, or "
            "pass params=None for all that are supported."
        )
    if not coverage.params:
        raise ValueError(f"No parameter is held by a supported layer. Supported: {accepted}.")
    if coverage.left_out:
        _warn_left_out(model, coverage, accepted)
    return coverage


def _warn_left_out(model: nn.Module, coverage: Coverage, accepted: str) -> None:
    own = dict(model.named_parameters())
    entries = sum(own[name].numel() for name in coverage.left_out)
    total = sum(p.numel() for p in own.values())
    by_reason: dict[str, list[str]] = {}
    for name, reason in coverage.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())
    warn(
        f"{len(coverage.left_out)} parameters with {entries:,} of {total:,} entries "
        f"({entries / total:.2%}) are in no supported layer ({accepted}) and left out. {listed}.",
        stacklevel=4,
    )
