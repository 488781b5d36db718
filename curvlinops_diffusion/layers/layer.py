"""Layers of a model, and the blocks of the curvature that their parameters form.

Legend: N examples, g an optional axis of groups, S positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from curvlinops_diffusion.layers.kind import ExactKind, LayerKind, SharingKind, added, extend, fold
from curvlinops_diffusion.layers.moments import ExtendedMoment, LatestProduct, Moment, second_moment
from curvlinops_diffusion.linalg.placement import Arrangement
from curvlinops_diffusion.runtime.sharded_networks import device_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with those of its parameters that were selected.

    Attributes:
        name: The module's name within the model.
        module: The module.
        kind: What is known of its type.
        weight: The weight's name, or ``None`` if it was not selected.
        bias: The bias' name, or ``None``.
    """

    name: str
    module: nn.Module
    kind: LayerKind
    weight: str | None
    bias: str | None

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the selected parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def key(self, suffix: str) -> str:
        """A name for a block that is unique within the model."""
        return f"{self.name}.{suffix}" if self.name else suffix

    def example_gradients(
        self, xs: Sequence[Tensor], gs: Sequence[Tensor], N: int
    ) -> dict[str, Tensor]:
        """Gradients ``[N, *shape]`` of the selected parameters by name, summed over calls."""
        result: dict[str, Tensor] = {}
        for x, g in zip(xs, gs, strict=True):
            for name, gradient in self._of_call(x, g, N).items():
                result[name] = result[name] + gradient if name in result else gradient
        return result

    def _of_call(self, x: Tensor, g: Tensor, N: int) -> dict[str, Tensor]:
        kind = self.kind
        if isinstance(kind, ExactKind):
            found = kind.gradients(self.module, x, g, N)
            named = {self.weight: kind.weight_name, self.bias: kind.bias_name}
            return {name: found[own] for name, own in named.items() if name is not None}
        assert isinstance(kind, SharingKind)
        gradients = {}
        if self.weight is not None:
            g_NgOI = kind.weight_gradients(self.module, x, g, N)
            shape = getattr(self.module, kind.weight_name).shape
            arrangement = Arrangement(tuple(g_NgOI.shape[1:]), kind.transposed)
            (weight,) = arrangement.scatter(g_NgOI.movedim(0, -1), [shape])
            gradients[self.weight] = weight.movedim(-1, 0)
        if self.bias is not None:
            gradients[self.bias] = self.bias_gradients(g, N)
        return gradients

    def bias_gradients(self, g: Tensor, N: int) -> Tensor:
        """The bias' gradients for each example, ``[N, bias entries]``."""
        assert isinstance(self.kind, SharingKind)
        gradients = self.kind.bias_gradients(self.module, g)
        return gradients if len(gradients) == N else gradients.unflatten(0, (N, -1)).sum(1)

    def gradients(self, g: Tensor, N: int) -> Tensor:
        """The gradient in the module's output as ``[N, *g, S, O]``."""
        return fold(self.position_gradients(g), N)

    def position_gradients(self, g: Tensor) -> Tensor:
        """The gradient entry by entry of the first axis, where an example may have several."""
        assert isinstance(self.kind, SharingKind)
        return self.kind.gradients(self.module, g)

    def parts(self, separate: bool, exact_bias: bool) -> tuple[Part, ...]:
        """The blocks of Kronecker form.

        Args:
            separate: Whether weight and bias are blocks of their own.
            exact_bias: Whether the block of a bias of its own is exact, and thus none of these.
        """
        kind = self.kind
        if not isinstance(kind, SharingKind):
            return ()
        if self.weight and self.bias and not separate and kind.joint:
            return (Part(self, PartKind.JOINT, (self.weight, self.bias)),)
        weight = (Part(self, PartKind.WEIGHT, (self.weight,)),) if self.weight else ()
        if self.bias is None or exact_bias or not kind.joint:
            return weight
        return (*weight, Part(self, PartKind.BIAS, (self.bias,)))


class PartKind(str, Enum):
    """The parameters of a layer that form a block."""

    WEIGHT = "weight"
    BIAS = "bias"
    JOINT = "joint"


@dataclass(frozen=True)
class Part:
    """Parameters of a layer that form one block ``[*g, O, I]`` of Kronecker form.

    Attributes:
        layer: The layer.
        part_kind: Weight, bias (``I = 1``), or both (the bias as last column).
        params: The parameters' names.
    """

    layer: Layer
    part_kind: PartKind
    params: tuple[str, ...]

    @property
    def kind(self) -> SharingKind:
        """The kind of the layer."""
        assert isinstance(self.layer.kind, SharingKind)
        return self.layer.kind

    @property
    def key(self) -> str:
        """A name that is unique within the model."""
        return self.layer.key(self.part_kind.value)

    @property
    def input_key(self) -> str:
        """The key of its input factor; a bias has none."""
        assert not self.is_bias
        return self.key

    @property
    def output_key(self) -> str:
        """The key of its output factor, which all blocks of a layer share."""
        return self.layer.name

    @property
    def is_bias(self) -> bool:
        """Whether there is no input: all are one."""
        return self.part_kind is PartKind.BIAS

    @property
    def _extended(self) -> bool:
        return self.part_kind is PartKind.JOINT

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, I)``: output entries, and inputs that each of them has a coefficient for."""
        *groups, O, I = self.kind.matrix_shape(self.layer.module)
        return (*groups, O, 1 if self.is_bias else I + self._extended)

    def new_zeros(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Zeros on the layer's device."""
        device = device_of(next(self.layer.module.parameters()))
        return torch.zeros(shape, dtype=dtype, device=device)

    def positions(self, x: Tensor, N: int) -> int:
        """The number ``S`` of positions of an example."""
        return len(x) // N * self.kind.positions(self.layer.module, x)

    def input_sum(self, x: Tensor, N: int) -> Tensor:
        """``Σ_s a_s`` of each example, shape ``[N, *g, I]``; not for a bias."""
        total = self.kind.input_sum(self.layer.module, x).unflatten(0, (N, -1)).sum(1)
        return pad(total, (0, 1), value=float(self.positions(x, N))) if self._extended else total

    def sampled_input_moment(self, x: Tensor, index: Tensor, latest: LatestProduct) -> Tensor:
        """``Σ_n Σ_s a_s a_sᵀ`` over the positions ``index`` ``[len(x), m]``; not for a bias."""
        module = self.layer.module
        if not self._extended:
            return self.kind.sampled_input_moment(module, x, index, latest)
        return second_moment(extend(self.kind.sampled_inputs(module, x, index)))

    def input_moment(self, latest: LatestProduct) -> Moment:
        """A new running ``Σ_n Σ_s a_s a_sᵀ``; not for a bias."""
        inner = self.kind.input_moment(self.layer.module, latest)
        if not self._extended:
            return inner
        return ExtendedMoment(inner, lambda x: self.input_sum(x, len(x)).sum(0))

    def weight_gradients(self, xs: Sequence[Tensor], gs: Sequence[Tensor], N: int) -> Tensor:
        """Gradients of the examples, summed over calls, ``[N, *g, O, I]``; not for a bias."""
        calls = zip(xs, gs, strict=True)
        total = added(self.kind.weight_gradients(self.layer.module, x, g, N) for x, g in calls)
        return torch.cat([total, self._summed(gs, N)], -1) if self._extended else total

    def _summed(self, gs: Sequence[Tensor], N: int) -> Tensor:
        """Gradients of the outputs, summed over positions and calls, ``[N, *g, O, 1]``."""
        return added(self.layer.gradients(g, N).sum(-2) for g in gs).unsqueeze(-1)

    def squares(
        self,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        sums: int,
        U_A: Tensor | None,
        U_B: Tensor | None,
    ) -> Tensor:
        """Sum over ``sums`` examples of their squared and rotated gradients."""
        if not self.is_bias:
            module, extended = self.layer.module, self._extended
            return self.kind.squares(module, xs, gs, sums, U_A, U_B, extended)
        total = self._summed(gs, sums)
        rotated = total.mT if U_B is None else total.mT @ U_B
        return rotated.square().sum(0).mT
