"""Kinds of layers: what has to be known of a type.

A :class:`SharingKind` reads a layer as a linear map with weight sharing: ``[N, S, I]`` in,
``[N, S, O]`` out, gradient ``Σ_s b_s a_sᵀ``; its block is of Kronecker form. An :class:`ExactKind`
only says what the gradients of single examples are; its block is dense or diagonal, and exact.
Below this package nothing asks whether a layer was a convolution.

Legend: N examples (batch), g an optional axis of groups, S weight-sharing positions (pixels,
tokens; 1 for none), I inputs, O outputs. A layer may see several entries for each example along its
first axis (the frames of a video, folded into the batch, example by example); these are positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from curvlinops_diffusion.layers.moments import LatestProduct, Moment, SummedMoment, second_moment
from curvlinops_diffusion.layers.rotated_squares import (
    rotated_squares,
    rotated_squares_of_inputs,
    rotation_of_inputs_is_cheaper,
)


class LayerKind:
    """The properties that all kinds of layers have.

    Attributes:
        weight_name: The name of the parameter that multiplies the input.
        bias_name: The name of the parameter that is added.
    """

    weight_name = "weight"
    bias_name = "bias"

    def unsupported(self, module: nn.Module) -> str:
        """Why this module cannot be read that way; empty if it can."""
        return ""

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """Tell whether the first axis of this input is one that examples can be told apart by."""
        return x.ndim >= 2


class ExactKind(LayerKind, ABC):
    """A type of layer whose gradients of single examples have a closed form."""

    @abstractmethod
    def gradients(self, module: nn.Module, x: Tensor, g: Tensor, N: int) -> dict[str, Tensor]:
        """The parameters' gradients for each example.

        Args:
            module: The module.
            x: Its input.
            g: The gradient in its output.
            N: The number of examples.

        Returns:
            Gradients ``[N, *shape]`` by the parameter's name within the module.
        """


class SharingKind(LayerKind, ABC):
    """A type of layer that multiplies its weight onto every position of its input.

    Only :meth:`inputs` and :meth:`gradients` must be given; the rest can be had from these, and is
    there to be replaced by what is cheaper.

    Attributes:
        transposed: Whether the weight is ``[I, O, ...]`` rather than ``[O, I, ...]``.
        joint: Whether weight and bias can be one block: whether the bias is added to what the
            weight gives at every position.
        one_hot: Whether inputs are one-hot, so that ``A`` is diagonal and kept as ``[I]``.
    """

    transposed = False
    joint = True
    one_hot = False

    def groups(self, module: nn.Module) -> tuple[int, ...]:
        """``(G,)`` for a layer whose ``G`` groups of outputs see inputs of their own, or ``()``."""
        return ()

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """The module's input as ``[N, *g, S, I]``, ordered like the weight's entries."""

    @abstractmethod
    def gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """The gradient in the module's output as ``[N, *g, S, O]``."""

    def matrix_shape(self, module: nn.Module) -> tuple[int, ...]:
        """``(*g, O, I)``, the weight as a matrix."""
        weight = getattr(module, self.weight_name)
        groups = self.groups(module)
        rows, columns = len(weight) // prod(groups), weight.numel() // len(weight)
        return (*groups, columns, rows) if self.transposed else (*groups, rows, columns)

    def positions(self, module: nn.Module, x: Tensor) -> int:
        """The number ``S`` of positions of each entry of the first axis."""
        return self.inputs(module, x).shape[-2]

    def input_sum(self, module: nn.Module, x: Tensor) -> Tensor:
        """``Σ_s a_s``, shape ``[N, *g, I]``."""
        return self.inputs(module, x).sum(-2)

    def input_norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """The root of ``Σ_n Σ_s ‖a_s‖²``, which bounds rounding errors."""
        return self.inputs(module, x).norm()

    def input_moment(self, module: nn.Module, latest: LatestProduct) -> Moment:
        """A new running ``Σ_n Σ_s a_s a_sᵀ`` of the module's inputs.

        Args:
            module: The module.
            latest: Shares products among layers whose inputs are rows of one tensor.
        """
        return SummedMoment(lambda x: second_moment(self.inputs(module, x)))

    def sampled_inputs(self, module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """The inputs at some positions of each entry of the first axis.

        Args:
            module: The module.
            x: Its input.
            index: The positions, ``[N, m]``.

        Returns:
            ``[N, *g, m, I]``.
        """
        return at_positions(self.inputs(module, x), index)

    def sampled_input_moment(
        self, module: nn.Module, x: Tensor, index: Tensor, latest: LatestProduct
    ) -> Tensor:
        """``Σ_n Σ_s a_s a_sᵀ`` over some positions, see :meth:`sampled_inputs`."""
        return second_moment(self.sampled_inputs(module, x, index))

    def bias_gradients(self, module: nn.Module, g: Tensor) -> Tensor:
        """The bias' gradients, shape ``[N, bias entries]``."""
        return self.gradients(module, g).sum(-2).flatten(1)

    def weight_gradients(self, module: nn.Module, x: Tensor, g: Tensor, sums: int) -> Tensor:
        """Gradients ``Σ_s b_s a_sᵀ``, summed over equally many entries of the first axis.

        Args:
            module: The module.
            x: Its input.
            g: The gradient in its output.
            sums: The number of sums.

        Returns:
            The sums, shape ``[sums, *g, O, I]``.
        """
        a, b = (fold(z, sums) for z in (self.inputs(module, x), self.gradients(module, g)))
        return b.mT @ a

    def rotated(self, module: nn.Module, g: Tensor, U: Tensor) -> Tensor | None:
        """The gradient in the output with its ``O`` channels rotated, ``g U``, if that is cheap."""
        return None

    def squares(
        self,
        module: nn.Module,
        xs: Sequence[Tensor],
        gs: Sequence[Tensor],
        sums: int,
        U_A: Tensor | None,
        U_B: Tensor | None,
        extended: bool,
    ) -> Tensor:
        """Sum of the squares of the weight's gradients in an eigenbasis, the cheaper way by count.

        Args:
            module: The module.
            xs: Its inputs, call by call.
            gs: The gradients in its outputs.
            sums: The number of examples, whose entries are summed before they are squared.
            U_A: The input factor's eigenvectors; ``None`` for the identity.
            U_B: The output factor's.
            extended: Whether inputs are extended by a one, for the bias.

        Returns:
            The sum, shape ``[*g, O, I]``.
        """
        *_, O, I = self.matrix_shape(module)
        I += extended
        each = [len(x) // sums * self.positions(module, x) for x in xs]
        cheaper = rotation_of_inputs_is_cheaper(sum(each), O, I)
        if cheaper and U_A is not None and U_B is not None:
            a = _side_by_side([fold(self.inputs(module, x), sums) for x in xs])
            b = _side_by_side([fold(self.gradients(module, g), sums) for g in gs])
            return rotated_squares_of_inputs(extend(a) if extended else a, b, U_A, U_B)
        if sum(each) < I and U_B is not None:  # outputs are fewer than the gradient's columns
            rotated = [self.rotated(module, g, U_B) for g in gs]
            if all(g is not None for g in rotated):
                gs, U_B = [g for g in rotated if g is not None], None
        total: Tensor | None = None
        for x, g in zip(xs, gs, strict=True):
            gradient = self.weight_gradients(module, x, g, sums)
            if extended:
                ones = fold(self.gradients(module, g), sums).sum(-2).unsqueeze(-1)
                gradient = torch.cat([gradient, ones], -1)
            total = gradient if total is None else total + gradient
        assert total is not None
        return rotated_squares(total, U_A, U_B)


def fold(z_NgSI: Tensor, sums: int) -> Tensor:
    """Lay the positions of successive entries side by side: ``[sums M, *g, S, I]`` to ``sums``."""
    if len(z_NgSI) == sums:
        return z_NgSI
    return z_NgSI.unflatten(0, (sums, -1)).movedim(1, -3).flatten(-3, -2)


def _side_by_side(calls_NgSI: Sequence[Tensor]) -> Tensor:
    return calls_NgSI[0] if len(calls_NgSI) == 1 else torch.cat(list(calls_NgSI), -2)


def at_positions(z_NgSI: Tensor, index: Tensor) -> Tensor:
    """What is at some positions of each entry of the first axis: ``[N, *g, S, I]`` to ``m``."""
    index = index.view(len(index), *[1] * (z_NgSI.ndim - 3), -1, 1)
    return z_NgSI.gather(-2, index.expand(*z_NgSI.shape[:-2], -1, z_NgSI.shape[-1]))


def extend(a_NgSI: Tensor) -> Tensor:
    """Inputs extended by a one."""
    return nn.functional.pad(a_NgSI, (0, 1), value=1.0)
