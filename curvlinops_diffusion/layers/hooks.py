"""Hooks: what the layers of a network see, and the gradients that follow from it.

Backward passes stop at the outputs of the layers: parameters are frozen meanwhile, so no weight
gradient is formed.

Legend: N (or B) batch, S weight-sharing positions, I inputs, O outputs, D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.layers import Layer


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Exclude all parameters from automatic differentiation within the context."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)


@dataclass
class Tap:
    """What the layers of a network saw in its latest forward pass.

    Attributes:
        on_input: Called with (layer, input) in the forward pass, or ``None``.
        on_gradient: Called with (layer, call number, gradient) in the backward pass, or ``None``.
        sources: Outputs at which the graph begins: a backward pass need go no further.
        calls: How often each layer was called, by name.
        batch_size: The leading axis that every layer must have.
    """

    on_input: Callable[[Layer, Tensor], None] | None
    on_gradient: Callable[[Layer, int, Tensor], None] | None
    sources: list[Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    batch_size: int = 0
    _recomputing: bool = False
    _paused: bool = False

    def backward(self, prediction_BD: Tensor, v_BD: Tensor, retain_graph: bool = False) -> None:
        """Pull ``v`` back to every layer's output, where ``on_gradient`` sees it."""
        if not self.sources or not prediction_BD.requires_grad:
            return
        self._recomputing = True
        try:
            torch.autograd.grad(
                prediction_BD, self.sources, v_BD, retain_graph=retain_graph, allow_unused=True
            )
        finally:
            self._recomputing = False

    def restart(self, batch_size: int) -> None:
        """Forget the latest forward pass."""
        self.sources, self.calls, self.batch_size = [], {}, batch_size

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing of the forward passes within the context."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the input, and have the output report its gradient."""
        if self._paused:
            return None
        if self._recomputing:
            # a checkpoint runs its part of the network again for the values that it did not keep
            return None if output.requires_grad else _start_of_graph(output)[1]
        x = args[0] if args else next(iter(kwargs.values()))
        if not layer.kind.has_batch_axis(module, x) or len(x) % self.batch_size:
            raise ValueError(
                f"Layer '{layer.name}' was given an input of shape {tuple(x.shape)} for a batch of "
                f"{self.batch_size}. The first axis must be the batch (or the batch times frames), "
                "or examples cannot be told apart; leave the layer's parameters out of params."
            )
        call = self.calls.get(layer.name, 0)
        self.calls[layer.name] = call + 1
        if self.on_input is not None:
            # what is computed from the input is not part of the network
            with torch.autocast(x.device.type, enabled=False):
                self.on_input(layer, x.detach())
        if self.on_gradient is None or not torch.is_grad_enabled():
            return None
        replaced = None
        if not output.requires_grad:
            output, replaced = _start_of_graph(output)
            self.sources.append(output)
        output.register_hook(partial(self._report, layer, call))
        return replaced

    def _report(self, layer: Layer, call: int, g: Tensor) -> None:
        assert self.on_gradient is not None
        self.on_gradient(layer, call, g.detach())


def _start_of_graph(output: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the output's values, and a copy that goes on: leaves must not be changed."""
    leaf = output.detach().requires_grad_()
    return leaf, leaf.clone()


@contextmanager
def tapped(layers: Sequence[Layer], tap: Tap) -> Iterator[Tap]:
    """Attach a tap to layers; hooks are removed on leaving, also after an exception."""
    handles = []
    try:
        for layer in layers:
            hook = partial(tap.observe, layer)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        yield tap
    finally:
        for handle in handles:
            handle.remove()


class CallRecorder:
    """Brings together what all calls of a layer saw in one backward pass.

    A layer may be called several times in a forward pass; its gradient is the sum over the calls,
    so their positions are laid side by side. A layer is handed on as soon as its last gradient has
    arrived, so that nothing outlives its layer.

    Args:
        tap_calls: How often each layer is called, see :attr:`Tap.calls`.
        consume: Called with (layer, inputs, gradients), each a list over the calls.
    """

    def __init__(self, consume: Callable[[Layer, list[Tensor], list[Tensor]], None]):
        self._consume = consume
        self.tap = Tap(self._input, self._gradient)
        self._inputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, dict[int, Tensor]] = {}
        self._layers: dict[str, Layer] = {}

    def start_forward(self, batch_size: int) -> None:
        """Forget the previous forward pass."""
        self.tap.restart(batch_size)
        self._inputs.clear()

    def forget(self) -> None:
        """Let go of what the latest pass saw.

        Recorder, tap and the graph's hooks refer to each other, so that tensors would otherwise
        live until Python looks for such circles, which it does not do for want of memory.
        """
        self.tap.restart(0)
        self._inputs.clear()
        self._gradients.clear()

    def backward(self, prediction_BD: Tensor, v_BD: Tensor, retain_graph: bool = False) -> None:
        """Run a backward pass and hand every layer on."""
        self.tap.backward(prediction_BD, v_BD, retain_graph)
        # layers of which some call does not influence the prediction
        for name in list(self._gradients):
            self._hand_on(self._layers[name])

    def _input(self, layer: Layer, x: Tensor) -> None:
        self._inputs.setdefault(layer.name, []).append(x)
        self._layers[layer.name] = layer

    def _gradient(self, layer: Layer, call: int, g: Tensor) -> None:
        arrived = self._gradients.setdefault(layer.name, {})
        arrived[call] = g
        if len(arrived) == self.tap.calls[layer.name]:
            self._hand_on(layer)

    def _hand_on(self, layer: Layer) -> None:
        arrived = self._gradients.pop(layer.name)
        inputs = self._inputs[layer.name]
        order = sorted(arrived)
        self._consume(layer, [inputs[call] for call in order], [arrived[call] for call in order])


def in_precision(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Floating-point tensors in a precision; tokens as they are."""
    return [z.to(dtype) if z.is_floating_point() else z for z in tensors]
