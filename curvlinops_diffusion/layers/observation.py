"""The one loop of "hook, freeze, predict, pull back", and its order.

Everything that reads a network layer by layer is an :class:`Observer`; :func:`observed` attaches
it, and what it yields runs a batch, each time in this order::

    start(batch)
      input(layer, x)                     forward, for every call of every layer
    predicted(batch, prediction)
      gradient(layer, call, g, calls)     backward, for every loss vector
      pulled_back(batch, v)               after each
    finish()

Backward passes stop at the outputs of the layers: parameters are frozen meanwhile, so no weight
gradient is formed.

Legend: N (or B) batch, D entries of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.runtime.adapters import adapter_of
from curvlinops_diffusion.runtime.modes import modules_of, recomputation_named
from curvlinops_diffusion.runtime.precision import without_autocast
from curvlinops_diffusion.runtime.processes import lost_processes_named

#: Maps a batch and its prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back, each
#: with whether more will follow.
Vectors = Callable[[NoisedBatch, Tensor], Iterator[tuple[Tensor, bool]]]
# what every module has beside its own attributes
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def one_vector(loss_vector: Callable[[Tensor], Tensor]) -> Vectors:
    """A single vector, from the prediction."""
    return lambda batch, prediction_BD: iter([(loss_vector(prediction_BD), False)])


class Observer:
    """Sees what happens in a batch; every method may be left out."""

    def start(self, batch: NoisedBatch) -> None:
        """A batch begins."""

    def input(self, layer: Layer, x: Tensor) -> None:
        """A layer was called with ``x``."""

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        """The forward pass is over."""

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """The gradient in the output of one of ``calls`` calls of a layer is there."""

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over; the network may be run here, unobserved."""

    def unreadable(self, layer: Layer, shape: torch.Size, batch_size: int) -> None:
        """A layer was given an input whose first axis is not that of the batch."""
        raise ValueError(
            f"Layer '{layer.name}' was given an input of shape {tuple(shape)} for a batch of "
            f"{batch_size}. The first axis must be the batch (or the batch times frames), "
            "or examples cannot be told apart; leave the layer's parameters out of params."
        )

    def finish(self) -> None:
        """The batch is over, or has failed: let go of it."""


class Observers(Observer):
    """Several observers as one, called in turn.

    Args:
        observers: The observers.
        context: The context that they are called in, such as another precision.
    """

    def __init__(
        self,
        observers: Sequence[Observer],
        context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        def call(event: str, *args: Any) -> None:
            with context():
                for observer in observers:
                    getattr(observer, event)(*args)

        for event in ("start", "input", "predicted", "gradient", "pulled_back", "finish"):
            setattr(self, event, partial(call, event))


@contextmanager
def observed(
    objective: DenoisingObjective,
    layers: Sequence[Layer],
    observer: Observer,
) -> Iterator[ObservedPass]:
    """Attach an observer to layers; hooks are removed on leaving, also after an exception.

    Args:
        objective: Supplies the network.
        layers: The layers to observe.
        observer: Sees what they see.
    """
    network = ObservedPass(objective, observer)
    handles = []
    try:
        for layer in layers:
            hook = partial(network.on_call, layer)
            handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        with frozen(objective.model), recomputation_named():
            yield network
    finally:
        for handle in handles:
            handle.remove()


class ObservedPass:
    """Runs batches through a network whose layers are observed; made by :func:`observed`."""

    def __init__(self, objective: DenoisingObjective, observer: Observer):
        self._objective = objective
        self._observer = observer
        self._sources: list[Tensor] = []  # where the graph begins: backward passes go no further
        self._calls: dict[str, int] = {}
        self._latest: tuple[Tensor, int, Tensor] | None = None
        self._aside: Tensor | None = None  # what the latest layer made of an identity matrix
        self._batch_size = 0  # of the batch that is run forward, or zero
        self._recomputing = False

    def run(self, batch: NoisedBatch, vectors: Vectors) -> None:
        """Run a batch forward, and pull each of its vectors back."""
        try:
            self._observer.start(batch)
            self._batch_size = len(batch.indices)
            # or what the network does under no_grad could not be distinguished
            with torch.enable_grad():
                prediction_BD = self._objective.predict(batch)
            self._batch_size = 0
            self._observer.predicted(batch, prediction_BD)
            for v_BD, more in vectors(batch, prediction_BD.detach()):
                if self._sources and prediction_BD.requires_grad:
                    self._pull_back(prediction_BD, v_BD, more)
                self._observer.pulled_back(batch, v_BD)
        finally:
            # The graph's hooks refer to this object and it to the graph: let go of it, so that
            # memory is freed at once rather than when Python looks for such cycles.
            self._sources, self._calls, self._latest, self._batch_size = [], {}, None, 0
            self._aside = None
            self._observer.finish()

    def _pull_back(self, prediction_BD: Tensor, v_BD: Tensor, more: bool) -> None:
        self._recomputing = True
        try:
            with lost_processes_named():
                torch.autograd.grad(
                    prediction_BD, self._sources, v_BD, retain_graph=more, allow_unused=True
                )
        finally:
            self._recomputing = False

    def on_call(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the input, and have the output report its gradient."""
        if self._recomputing:
            # a checkpoint runs its part of the network again for the values that it did not keep
            return None if output.requires_grad else _start_of_graph(output)[1]
        # gradients are off in a part of the network that no derivative goes through
        if not self._batch_size or not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        # decomposed adapters (DoRA) call both of their layers for the norm of a product, whatever
        # the batch; a gradient that goes through it is missed, which the probe finds
        if x is self._aside or (adapter_of(layer.name) is not None and _is_identity(x)):
            self._aside = output
            return None
        observer, shape, batch_size = self._observer, x.shape, self._batch_size
        if layer.kind.has_batch_axis(module, x) and len(x) % batch_size == 0:
            call = self._calls.get(layer.name, 0)
            self._calls[layer.name] = call + 1
            # what is computed from the input is not part of the network
            with without_autocast(x.device.type):
                observer.input(layer, self._shown(x))

            def report(g: Tensor) -> None:
                observer.gradient(layer, call, g.detach(), self._calls[layer.name])

        else:  # no matter if no gradient comes

            def report(g: Tensor) -> None:
                observer.unreadable(layer, shape, batch_size)

        replaced = None
        if not output.requires_grad:
            output, replaced = _start_of_graph(output)
            self._sources.append(output)
        output.register_hook(report)
        return replaced

    def _shown(self, x: Tensor) -> Tensor:
        """The input without its graph: one tensor for layers that are given one, unless it changes.

        So they can share what is computed from it.
        """
        if self._latest is None or x is not self._latest[0] or x._version != self._latest[1]:
            self._latest = (x, x._version, x.detach())
        return self._latest[2]


def _is_identity(x: Tensor) -> bool:
    square = x.ndim == 2 and len(x) == x.shape[1] and not x.requires_grad
    return square and torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))


def _start_of_graph(output: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the output's values, and a copy that goes on: leaves must not be changed."""
    leaf = output.detach().requires_grad_()
    return leaf, leaf.clone()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Exclude all parameters from automatic differentiation within the context.

    So are other tensors with gradients that modules hold as plain attributes. Nor do hooks run that
    users gave parameters (to mask or clip gradients in training, say): what they return is no
    derivative.
    """
    modules = modules_of(model)
    params = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    with ExitStack() as stack:
        for p in params.values():
            stack.callback(p.requires_grad_, p.requires_grad)
            p.requires_grad_(False)
            if p._backward_hooks:
                stack.callback(p._backward_hooks.update, dict(p._backward_hooks))
                p._backward_hooks.clear()
        for attributes in map(vars, modules):
            for key in attributes.keys() - _OF_ANY_MODULE:
                value = attributes[key]
                if not isinstance(value, Tensor) or not value.requires_grad:
                    continue
                # but for second names of parameters, and views of them
                if id(value if value._base is None else value._base) not in params:
                    stack.callback(attributes.__setitem__, key, value)
                    attributes[key] = value.detach()
        yield


class WholeLayers(Observer):
    """Brings together what all calls of a layer saw in one backward pass.

    A layer may be called several times in a forward pass; its gradient is the sum over the calls,
    so their positions are laid side by side. A layer is handed on as soon as its last gradient is
    there, so that nothing outlives its layer.

    Args:
        dtype: The working precision; tokens stay as they are.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._N = 0
        self._layers: dict[str, Layer] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, dict[int, Tensor]] = {}

    def whole(self, layer: Layer, xs: list[Tensor], gs: list[Tensor], N: int) -> None:
        """All inputs and gradients of a layer are there, call by call, of so many examples."""

    def start(self, batch: NoisedBatch) -> None:
        """Count the examples."""
        self._N = len(batch.indices)

    def input(self, layer: Layer, x: Tensor) -> None:
        """Remember the input."""
        self._inputs.setdefault(layer.name, []).append(x)
        self._layers[layer.name] = layer

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Hand the layer on if this was the last."""
        own = self._gradients.setdefault(layer.name, {})
        own[call] = g
        if len(own) == calls:
            self._hand_on(layer)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """Hand on layers of which some call does not influence the prediction."""
        for name in list(self._gradients):
            self._hand_on(self._layers[name])

    def finish(self) -> None:
        """Forget the batch."""
        self._inputs.clear()
        self._gradients.clear()

    def _hand_on(self, layer: Layer) -> None:
        inputs, own = self._inputs[layer.name], self._gradients.pop(layer.name)
        calls = sorted(own)
        xs, gs = ([in_precision(of[c], self._dtype) for c in calls] for of in (inputs, own))
        self.whole(layer, xs, gs, self._N)


def in_precision(z: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point tensor in a precision; tokens as they are."""
    return z.to(dtype) if z.is_floating_point() else z
