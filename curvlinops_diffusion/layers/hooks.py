"""Hooks: what the layers of a network see in a forward pass, and in the backward passes of it.

Legend: B batch, D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.runtime.modes import modules_of
from curvlinops_diffusion.runtime.precision import without_autocast
from curvlinops_diffusion.runtime.processes import lost_processes_named

# what every module has beside its own attributes
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Exclude all parameters from automatic differentiation within the context.

    So are other tensors with gradients that modules hold as plain attributes. Nor do hooks run that
    users gave parameters (to mask or clip gradients in training, say): what they return is no
    derivative.
    """
    modules = modules_of(model)
    params = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    before = [(p, p.requires_grad) for p in params.values()]
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p, _ in before if p._backward_hooks]
    others = [
        (vars(module), key, value)
        for module in modules
        for key in vars(module).keys() - _OF_ANY_MODULE
        if isinstance(value := vars(module)[key], Tensor)
        and value.requires_grad
        # but for second names of parameters, and views of them
        and id(value if value._base is None else value._base) not in params
    ]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for running, _ in hooks:
            running.clear()
        for attributes, key, value in others:
            attributes[key] = value.detach()
        yield
    finally:
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)
        for running, own in hooks:
            running.update(own)
        for attributes, key, value in others:
            attributes[key] = value


@dataclass
class Tap:
    """A record of what the layers of a network saw in its latest forward pass.

    Attributes:
        on_input: Called with (layer, input) in the forward pass.
        on_gradient: Called with (layer, call number, gradient, number of calls) in the backward
            pass, or ``None``.
        sources: Outputs at which the graph begins: a backward pass need go no further.
        calls: How often each layer was called, by name.
        on_unreadable: Called with (layer, shape of the input) where the first axis is not that of
            the batch and a gradient arrives; ``None`` for an error.
        batch_size: The leading axis that every layer must have.
    """

    on_input: Callable[[Layer, Tensor], None]
    on_gradient: Callable[[Layer, int, Tensor, int], None] | None
    on_unreadable: Callable[[Layer, torch.Size], None] | None = None
    sources: list[Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    batch_size: int = 0
    _latest: tuple[Tensor, int, Tensor] | None = None
    _watching: bool = False
    _recomputing: bool = False

    def backward(self, prediction_BD: Tensor, v_BD: Tensor, retain_graph: bool = False) -> None:
        """Pull ``v`` back to every layer's output, where ``on_gradient`` sees it."""
        if not self.sources or not prediction_BD.requires_grad:
            return
        self._recomputing = True
        try:
            with lost_processes_named():
                torch.autograd.grad(
                    prediction_BD, self.sources, v_BD, retain_graph=retain_graph, allow_unused=True
                )
        finally:
            self._recomputing = False

    @contextmanager
    def watching(self, batch_size: int) -> Iterator[None]:
        """See the forward pass within the context; what runs outside of one is not seen."""
        self.forget()
        self.batch_size, self._watching = batch_size, True
        try:
            yield
        finally:
            self._watching = False

    def forget(self) -> None:
        """Let go of the latest forward pass."""
        self.sources, self.calls, self._latest = [], {}, None

    def observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the input, and have the output report its gradient."""
        if self._recomputing:
            # a checkpoint runs its part of the network again for the values that it did not keep
            return None if output.requires_grad else _start_of_graph(output)[1]
        # gradients are off in a part of the network that no derivative goes through
        if not self._watching or not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if layer.kind.has_batch_axis(module, x) and len(x) % self.batch_size == 0:
            call = self.calls.get(layer.name, 0)
            self.calls[layer.name] = call + 1
            # what is computed from the input is not part of the network
            with without_autocast(x.device.type):
                self.on_input(layer, self._shown(x))
            report = partial(self._report, layer, call)
        elif self.on_gradient is None:
            self._refuse(layer, x.shape)
        else:
            # no matter if no gradient arrives: decomposed adapters (DoRA) call their layers on an
            # identity matrix for a norm that is detached
            report = partial(self._refuse, layer, x.shape)
        if self.on_gradient is None:
            return None
        replaced = None
        if not output.requires_grad:
            output, replaced = _start_of_graph(output)
            self.sources.append(output)
        output.register_hook(report)
        return replaced

    def _shown(self, x: Tensor) -> Tensor:
        """The input without its graph: one tensor for layers that are given one, unless it changes.

        So they can share what is computed from it.
        """
        if self._latest is None or x is not self._latest[0] or x._version != self._latest[1]:
            self._latest = (x, x._version, x.detach())
        return self._latest[2]

    def _refuse(self, layer: Layer, shape: torch.Size, g: Tensor | None = None) -> None:
        """Tell of an input whose first axis is not that of the batch."""
        if self.on_unreadable is not None:
            self.on_unreadable(layer, shape)
            return
        raise ValueError(
            f"Layer '{layer.name}' was given an input of shape {tuple(shape)} for a batch of "
            f"{self.batch_size}. The first axis must be the batch (or the batch times frames), "
            "or examples cannot be told apart; leave the layer's parameters out of params."
        )

    def _report(self, layer: Layer, call: int, g: Tensor) -> None:
        assert self.on_gradient is not None
        self.on_gradient(layer, call, g.detach(), self.calls[layer.name])


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
