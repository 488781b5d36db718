"""Layers of a model, and the blocks of the curvature that their parameters form.

Legend: N examples, g an optional axis of groups, S positions, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from curvlinops_diffusion.layers.kind import ExactKind, LayerKind, SharingKind, added, extend, fold
from curvlinops_diffusion.layers.moments import summed_dtype
from curvlinops_diffusion.linalg.placement import Arrangement


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

    @property
    def sharing(self) -> SharingKind:
        """The kind of a layer that multiplies its weight onto every position of its input."""
        assert isinstance(self.kind, SharingKind)
        return self.kind

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
        gradients = {}
        if self.weight is not None:
            g_NgOI = self.sharing.weight_gradients(self.module, x, g, N)
            shape = getattr(self.module, kind.weight_name).shape
            arrangement = Arrangement(tuple(g_NgOI.shape[1:]), self.sharing.transposed)
            (weight,) = arrangement.scatter(g_NgOI.movedim(0, -1), [shape])
            gradients[self.weight] = weight.movedim(-1, 0)
        if self.bias is not None:
            gradients[self.bias] = self.bias_gradients(g, N)
        return gradients

    def bias_gradients(self, g: Tensor, N: int) -> Tensor:
        """The bias' gradients for each example, ``[N, bias entries]``."""
        gradients = self.sharing.bias_gradients(self.module, g)
        return gradients if len(gradients) == N else gradients.unflatten(0, (N, -1)).sum(1)

    def gradients(self, g: Tensor, N: int) -> Tensor:
        """The gradient in the module's output as ``[N, *g, S, O]``."""
        return fold(self.sharing.gradients(self.module, g), N)

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
            return (Part(self, self.params),)
        weight = (Part(self, (self.weight,)),) if self.weight else ()
        if self.bias is None or exact_bias or not kind.joint:
            return weight
        return (*weight, Part(self, (self.bias,)))


@dataclass(frozen=True)
class Part:
    """Parameters of a layer that form one block ``[*g, O, I]`` of Kronecker form.

    Attributes:
        layer: The layer.
        params: The names of its weight, of its bias (``I = 1``), or of both (the bias as last
            column).
    """

    layer: Layer
    params: tuple[str, ...]

    @property
    def kind(self) -> SharingKind:
        """The kind of the layer."""
        return self.layer.sharing

    @property
    def key(self) -> str:
        """A name that is unique within the model, also of its input factor; a bias has none."""
        return self.layer.key("joint" if self.joint else "bias" if self.is_bias else "weight")

    @property
    def output_key(self) -> str:
        """The key of its output factor, which all blocks of a layer share."""
        return self.layer.name

    @property
    def is_bias(self) -> bool:
        """True if there is no input: all are one."""
        return self.params == (self.layer.bias,)

    @property
    def joint(self) -> bool:
        """True if inputs are extended by a one, for the bias."""
        return len(self.params) > 1

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*g, O, I)``: output entries, and inputs that each of them has a coefficient for."""
        *groups, O, I = self.kind.matrix_shape(self.layer.module)
        return (*groups, O, 1 if self.is_bias else I + self.joint)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of its input factor, ``(*g, I, I)``, or ``(I,)`` for a diagonal one."""
        *groups, _, I = self.shape
        return (I,) if self.kind.one_hot else (*groups, I, I)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of its output factor, ``(*g, O, O)``."""
        return (*self.shape[:-1], self.shape[-2])

    def positions(self, x: Tensor, N: int) -> int:
        """The number ``S`` of positions of an example."""
        return len(x) // N * self.kind.positions(self.layer.module, x)

    def input_sum(self, x: Tensor, N: int) -> Tensor:
        """``Σ_s a_s`` of each example, shape ``[N, *g, I]``; not for a bias."""
        total = self.kind.input_sum(self.layer.module, x).unflatten(0, (N, -1)).sum(1)
        return pad(total, (0, 1), value=float(self.positions(x, N))) if self.joint else total

    def input_row(self, x: Tensor, index: Tensor | None) -> Tensor:
        """``Σ_n Σ_s [a_s, 1]`` over positions, all or those of ``index``, shape ``[*g, I]``."""
        x = x.to(summed_dtype(x))
        if index is None:
            return self.input_sum(x, len(x)).sum(0)
        return extend(self.kind.sampled_inputs(self.layer.module, x, index)).sum((0, -2))

    def weight_gradients(self, xs: Sequence[Tensor], gs: Sequence[Tensor], N: int) -> Tensor:
        """Gradients of the examples, summed over calls, ``[N, *g, O, I]``; not for a bias."""
        calls = zip(xs, gs, strict=True)
        total = added(self.kind.weight_gradients(self.layer.module, x, g, N) for x, g in calls)
        return torch.cat([total, self._summed(gs, N)], -1) if self.joint else total

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
            return self.kind.squares(self.layer.module, xs, gs, sums, U_A, U_B, self.joint)
        total = self._summed(gs, sums)
        rotated = total.mT if U_B is None else total.mT @ U_B
        return rotated.square().sum(0).mT
