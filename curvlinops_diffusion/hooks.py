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

from curvlinops_diffusion._checks import check_finite
from curvlinops_diffusion.layers import Layer, Part, part_inputs
from curvlinops_diffusion.objective import DenoisingObjective, NoisedBatch
from curvlinops_diffusion.regression import NoisedRegression


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

    def backward(self, prediction_BD: Tensor, v_BD: Tensor, retain_graph: bool = False) -> None:
        """Pull ``v`` back to every layer's output, where ``on_gradient`` sees it."""
        if self.sources and prediction_BD.requires_grad:
            torch.autograd.grad(
                prediction_BD, self.sources, v_BD, retain_graph=retain_graph, allow_unused=True
            )

    def restart(self, batch_size: int) -> None:
        """Forget the latest forward pass."""
        self.sources, self.calls, self.batch_size = [], {}, batch_size

    def observe(
        self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Forward hook: report the input, and have the output report its gradient."""
        x = args[0] if args else kwargs["input"]
        if x.ndim < 2 or len(x) != self.batch_size:
            raise ValueError(
                f"Layer '{layer.name}' was given an input of shape {tuple(x.shape)} for a batch of "
                f"{self.batch_size}. The first axis must be the batch, or examples cannot be told "
                "apart; leave the layer's parameters out of params."
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
            # the graph begins here; a copy goes on, since a leaf must not be changed in place
            output = output.detach().requires_grad_()
            self.sources.append(output)
            replaced = output.clone()
        output.register_hook(partial(self._report, layer, call))
        return replaced

    def _report(self, layer: Layer, call: int, g: Tensor) -> None:
        assert self.on_gradient is not None
        self.on_gradient(layer, call, g.detach())


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


def _pull_back(
    layers: Sequence[Layer],
    objective: DenoisingObjective,
    batch: NoisedBatch,
    loss_vector: Callable[[Tensor], Tensor],
    consume: Callable[[Part, list[Tensor], list[Tensor]], None],
) -> dict[str, int]:
    """Hand (part, inputs, gradients), each a list over the layer's calls, to ``consume``.

    Returns:
        How often each layer was called, by its name.
    """
    dtype = objective.working_dtype

    def consume_layer(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        for part in layer.parts(separate=True):
            consume(part, [x.to(dtype) for x in xs], [g.to(dtype) for g in gs])

    recorder = CallRecorder(consume_layer)
    with tapped(layers, recorder.tap), frozen(objective.model), torch.enable_grad():
        recorder.start_forward(len(batch.indices))
        prediction_BD = objective.predict(batch)
        recorder.backward(prediction_BD, loss_vector(prediction_BD.detach()))
    return recorder.tap.calls


def layer_gradients(
    layers: Sequence[Layer],
    objective: DenoisingObjective,
    batch: NoisedBatch,
    loss_vector: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Per-example gradients of the parameters of layers on one noised batch.

    Args:
        layers: The layers.
        objective: Supplies the model.
        batch: The noised batch.
        loss_vector: Maps the prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back.

    Returns:
        The gradients, of shape ``[B, *param.shape]``, by the parameter's name.
    """
    own = dict(objective.model.named_parameters())
    B = len(batch.indices)
    gradients = {
        part.params[0]: part.new_zeros(objective.working_dtype, B, *own[part.params[0]].shape)
        for layer in layers
        for part in layer.parts(separate=True)
    }

    def consume(part: Part, xs: list[Tensor], gs: list[Tensor]) -> None:
        name = part.params[0]
        gradients[name] = gradient_of_calls(part, xs, gs).reshape(gradients[name].shape)

    _pull_back(layers, objective, batch, loss_vector, consume)
    return gradients


def gradient_of_calls(
    part: Part, xs: Sequence[Tensor], gs: Sequence[Tensor], group: int = 1
) -> Tensor:
    """The gradients of a part over all calls of its layer, ``[N / group, O, I]``."""
    first, *others = (part.gradients(x, g, group) for x, g in zip(xs, gs, strict=True))
    return sum(others, first)


def check_observable(regression: NoisedRegression, layers: Sequence[Layer]) -> dict[str, int]:
    """Check, on two examples, that what hooks see gives each parameter's true gradient.

    Hooks miss a weight that is used outside its layer's call (as ``nn.MultiheadAttention`` does),
    or an overridden ``forward``; the curvature would then be silently wrong.

    Returns:
        How often each layer is called in a forward pass, by its name.

    Raises:
        ValueError: If a gradient differs from automatic differentiation's, or is not finite,
            naming the parameter.
    """
    objective = regression.objective
    clean = next(regression.clean_batches())
    batch = next(regression.noised_batches(clean.select(range(min(2, len(clean.indices))))))
    own = dict(objective.model.named_parameters())
    names = [part.params[0] for layer in layers for part in layer.parts(separate=True)]
    with frozen(objective.model), torch.enable_grad():
        for name in names:
            own[name].requires_grad_(True)
        loss = batch.loss(objective.predict(batch)).sum()
        gradients = torch.autograd.grad(loss, [own[n] for n in names], allow_unused=True)
    true = dict(zip(names, gradients, strict=True))

    tolerance = objective.rounding**0.5
    norms = [float(gradient.norm()) for gradient in true.values() if gradient is not None]
    # a gradient that vanishes, as of what a later norm subtracts, arrives as rounding noise
    noise = 10 * objective.rounding * max(norms, default=0.0)
    wrong = {name for name, gradient in true.items() if gradient is not None}

    def consume(part: Part, xs: list[Tensor], gs: list[Tensor]) -> None:
        name = part.params[0]
        b_NSO = torch.cat([part.layer.gradients(g) for g in gs], 1)
        check_finite(b_NSO, f"The gradient in the output of the layer of '{name}'")
        largest = b_NSO.abs().max().clamp(min=torch.finfo(b_NSO.dtype).tiny)  # or norms overflow
        seen = gradient_of_calls(part, xs, gs).sum(0).reshape(own[name].shape)
        truth = true[name] if true[name] is not None else torch.zeros_like(seen)
        # the terms of a gradient may cancel, so errors are measured against the terms
        a_NSI = part_inputs(part, xs, objective.working_dtype)
        inputs = b_NSO.shape[1] ** 0.5 if a_NSI is None else a_NSI.norm()
        terms = (b_NSO / largest).norm() * inputs
        difference = ((seen - truth) / largest).norm()
        if difference <= tolerance * terms or difference * largest <= noise:
            wrong.discard(name)
        else:
            wrong.add(name)

    calls = _pull_back(layers, objective, batch, batch.loss_gradient, consume)
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"The gradient of '{name}' ({len(wrong)} parameters in all) is not the one that its "
            "layer's inputs and outputs give: the parameter is also used outside its layer's "
            "call, or the layer computes more than its type says. Leave it out of params."
        )
    return calls
