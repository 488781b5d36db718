"""The one loop of "tap, freeze, predict, pull back", and its order.

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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.layers.hooks import Tap, frozen, tapped
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.runtime.modes import recomputation_named

#: Maps a batch and its prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back, each
#: with whether more will follow.
Vectors = Callable[[NoisedBatch, Tensor], Iterator[tuple[Tensor, bool]]]


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
        """The gradient in the output of one of ``calls`` calls of a layer arrived."""

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over; the network may be run here, unobserved."""

    def finish(self) -> None:
        """The batch is over, or has failed: let go of it."""


class Observers(Observer):
    """Several observers as one, each told in turn."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers = observers

    def start(self, batch: NoisedBatch) -> None:
        """A batch begins."""
        for observer in self._observers:
            observer.start(batch)

    def input(self, layer: Layer, x: Tensor) -> None:
        """A layer was called."""
        for observer in self._observers:
            observer.input(layer, x)

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        """The forward pass is over."""
        for observer in self._observers:
            observer.predicted(batch, prediction_BD)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """A gradient arrived."""
        for observer in self._observers:
            observer.gradient(layer, call, g, calls)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over."""
        for observer in self._observers:
            observer.pulled_back(batch, v_BD)

    def finish(self) -> None:
        """The batch is over."""
        for observer in self._observers:
            observer.finish()


class WithinEach(Observer):
    """An observer that is told within a context, such as one of another precision."""

    def __init__(self, observer: Observer, context: Callable[[], AbstractContextManager[None]]):
        self._observer = observer
        self._context = context

    def start(self, batch: NoisedBatch) -> None:
        """A batch begins."""
        with self._context():
            self._observer.start(batch)

    def input(self, layer: Layer, x: Tensor) -> None:
        """A layer was called."""
        with self._context():
            self._observer.input(layer, x)

    def predicted(self, batch: NoisedBatch, prediction_BD: Tensor) -> None:
        """The forward pass is over."""
        with self._context():
            self._observer.predicted(batch, prediction_BD)

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """A gradient arrived."""
        with self._context():
            self._observer.gradient(layer, call, g, calls)

    def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
        """A backward pass is over."""
        with self._context():
            self._observer.pulled_back(batch, v_BD)

    def finish(self) -> None:
        """The batch is over."""
        with self._context():
            self._observer.finish()


@dataclass(frozen=True)
class ObservedPass:
    """Runs batches through a network whose layers are observed.

    Attributes:
        objective: Supplies the network.
        observer: Sees what the layers see.
        tap: Is attached to the layers.
    """

    objective: DenoisingObjective
    observer: Observer
    tap: Tap

    def run(self, batch: NoisedBatch, vectors: Vectors) -> None:
        """Run a batch forward, and pull each of its vectors back."""
        try:
            self.observer.start(batch)
            # also without a backward pass: what the network does under no_grad is told by it
            with torch.enable_grad(), self.tap.watching(len(batch.indices)):
                prediction_BD = self.objective.predict(batch)
            self.observer.predicted(batch, prediction_BD)
            for v_BD, more in vectors(batch, prediction_BD.detach()):
                self.tap.backward(prediction_BD, v_BD, retain_graph=more)
                self.observer.pulled_back(batch, v_BD)
        finally:
            # The graph's hooks refer to the tap and the tap to the graph: let go of it, so that
            # memory is freed at once rather than when Python looks for such cycles.
            self.tap.forget()
            self.observer.finish()


@contextmanager
def observed(
    objective: DenoisingObjective,
    layers: Sequence[Layer],
    observer: Observer,
    backward: bool = True,
    unreadable: Callable[[Layer, torch.Size], None] | None = None,
) -> Iterator[ObservedPass]:
    """Attach an observer to layers; hooks are removed on leaving, also after an exception.

    Args:
        objective: Supplies the network.
        layers: The layers to observe.
        observer: Sees what they see.
        backward: Whether there are backward passes.
        unreadable: Called with a layer and the shape of an input whose first axis is not that of
            the batch, in place of an error.
    """
    tap = Tap(observer.input, observer.gradient if backward else None, unreadable)
    with tapped(layers, tap), frozen(objective.model), recomputation_named():
        yield ObservedPass(objective, observer, tap)


class WholeLayers(Observer):
    """Brings together what all calls of a layer saw in one backward pass.

    A layer may be called several times in a forward pass; its gradient is the sum over the calls,
    so their positions are laid side by side. A layer is handed on as soon as its last gradient has
    arrived, so that nothing outlives its layer.

    Args:
        consume: Called with (layer, inputs, gradients), each a list over the calls, in precision
            ``dtype``.
        dtype: The working precision; tokens stay as they are.
    """

    def __init__(
        self, consume: Callable[[Layer, list[Tensor], list[Tensor]], None], dtype: torch.dtype
    ):
        self._consume = consume
        self._dtype = dtype
        self._layers: dict[str, Layer] = {}
        self._inputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, dict[int, Tensor]] = {}

    def input(self, layer: Layer, x: Tensor) -> None:
        """Remember the input."""
        self._inputs.setdefault(layer.name, []).append(x)
        self._layers[layer.name] = layer

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Hand the layer on if this was the last."""
        arrived = self._gradients.setdefault(layer.name, {})
        arrived[call] = g
        if len(arrived) == calls:
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
        arrived = self._gradients.pop(layer.name)
        inputs, order = self._inputs[layer.name], sorted(arrived)
        xs, gs = [inputs[call] for call in order], [arrived[call] for call in order]
        self._consume(layer, in_precision(xs, self._dtype), in_precision(gs, self._dtype))


def in_precision(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Floating-point tensors in a precision; tokens as they are."""
    return [z.to(dtype) if z.is_floating_point() else z for z in tensors]
