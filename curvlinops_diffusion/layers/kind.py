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
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor, nn

from curvlinops_diffusion.layers.moments import LatestProduct, second_moment
from curvlinops_diffusion.layers.patch_moments import PatchMoment

# Gradients are rotated for so many entries at a time, to bound the memory
_MAX_ENTRIES = 2**23


class LayerKind:
    """The properties that all kinds of layers have.

    Attributes:
        weight_name: The name of the parameter that multiplies the input.
        bias_name: The name of the parameter that is added.
    """

    weight_name = "weight"
    bias_name = "bias"

    def unsupported(self, module: nn.Module) -> str:
        """Say why this module cannot be read that way; empty if it can."""
        return ""

    def has_batch_axis(self, module: nn.Module, x: Tensor) -> bool:
        """Tell whether the first axis of this input distinguishes examples."""
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

    def sampled_inputs(self, module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """The inputs at the positions ``index``, ``[N, m]``, of each entry: ``[N, *g, m, I]``."""
        return at_positions(self.inputs(module, x), index)

    def input_moment(
        self, module: nn.Module, x: Tensor, index: Tensor | None, latest: LatestProduct
    ) -> Tensor:
        """``Σ_n Σ_s a_s a_sᵀ``, ``[*g, I, I]``, or its diagonal ``[I]`` if inputs are one-hot.

        Args:
            module: The module.
            x: Its input.
            index: The positions that are summed over, ``[N, m]``; ``None`` for all.
            latest: Shares products among layers whose inputs are rows of one tensor.
        """
        a = self.inputs(module, x) if index is None else self.sampled_inputs(module, x, index)
        return second_moment(a)

    def patch_moment(self, module: nn.Module) -> PatchMoment | None:
        """A new running sum of the moments of all positions, where there is a faster one."""
        return None

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
        """Second moments of the weight's gradients in an eigenbasis, ``Σ_n (U_Bᵀ g_n U_A)²``.

        Inputs and outputs are rotated apart, or their gradient is, whichever is cheaper by count.

        Source: George et al., 2018, *Fast Approximate Natural Gradient Descent in a
        Kronecker-factored Eigenbasis*, Section 3.1.

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
        S = sum(len(x) // sums * self.positions(module, x) for x in xs)
        if S * (O * O + I * I) < O * I * (O + I) and U_A is not None and U_B is not None:
            a = _side_by_side([fold(self.inputs(module, x), sums) for x in xs])
            b = _side_by_side([fold(self.gradients(module, g), sums) for g in gs])
            return reduce(Tensor.add_, _squares_of(extend(a) if extended else a, b, U_A, U_B))
        if S < I and U_B is not None:  # outputs are fewer than the gradient's columns
            rotated = [self.rotated(module, g, U_B) for g in gs]
            if all(g is not None for g in rotated):
                gs, U_B = [g for g in rotated if g is not None], None

        def gradient(x: Tensor, g: Tensor) -> Tensor:
            weight = self.weight_gradients(module, x, g, sums)
            if not extended:
                return weight
            bias = fold(self.gradients(module, g), sums).sum(-2)
            return torch.cat([weight, bias.unsqueeze(-1)], -1)

        return reduce(Tensor.add_, _squares(added(map(gradient, xs, gs)), U_A, U_B))


def _squares(g_NgOI: Tensor, U_A: Tensor | None, U_B: Tensor | None) -> Iterator[Tensor]:
    """Sums of the squares of gradients, rotated some at a time."""
    for g in g_NgOI.split(max(1, _MAX_ENTRIES // g_NgOI[0].numel())):
        g = g if U_A is None else g @ U_A
        g = g if U_B is None else U_B.mT @ g
        yield g.square().sum(0)


def _squares_of(a_NgSI: Tensor, b_NgSO: Tensor, U_A: Tensor, U_B: Tensor) -> Iterator[Tensor]:
    """Sums of the squares of gradients whose inputs and outputs are rotated, some at a time."""
    groups, (S, I), O = a_NgSI.shape[1:-2], a_NgSI.shape[-2:], b_NgSO.shape[-1]
    chunk = max(1, _MAX_ENTRIES // (max(O, S) * I * groups.numel()))
    for a, b in zip(a_NgSI.split(chunk), b_NgSO.split(chunk), strict=True):
        yield ((b @ U_B).mT @ (a @ U_A)).square_().sum(0)


def added(terms: Iterable[Tensor]) -> Tensor:
    """The sum of terms; not added to zeros, which would be a kernel launch more."""
    return reduce(torch.add, terms)


def fold(z_NgSI: Tensor, sums: int) -> Tensor:
    """Lay the positions of successive entries side by side: ``[sums M, *g, S, I]`` to ``sums``."""
    if len(z_NgSI) == sums:
        return z_NgSI
    return z_NgSI.unflatten(0, (sums, -1)).movedim(1, -3).flatten(-3, -2)


def _side_by_side(calls_NgSI: Sequence[Tensor]) -> Tensor:
    return calls_NgSI[0] if len(calls_NgSI) == 1 else torch.cat(list(calls_NgSI), -2)


def at_positions(z_NgSI: Tensor, index: Tensor) -> Tensor:
    """Pick some positions ``[N, m]`` of each entry of the first axis: ``[N, *g, m, I]``."""
    index = index.view(len(index), *[1] * (z_NgSI.ndim - 3), -1, 1)
    return z_NgSI.gather(-2, index.expand(*z_NgSI.shape[:-2], -1, z_NgSI.shape[-1]))


def extend(a_NgSI: Tensor) -> Tensor:
    """Inputs extended by a one."""
    return nn.functional.pad(a_NgSI, (0, 1), value=1.0)
