"""Gradients of single examples by one backward pass, and whether hooks see all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Coverage, Layer, SharingKind
from curvlinops_diffusion.layers.hooks import frozen
from curvlinops_diffusion.layers.mapped_gradients import mapped_gradients
from curvlinops_diffusion.layers.observation import WholeLayers, observed, one_vector
from curvlinops_diffusion.runtime.checks import check_finite


def example_gradients(
    coverage: Coverage,
    objective: DenoisingObjective,
    batch: NoisedBatch,
    loss_vector: Callable[[Tensor], Tensor],
    examples: int | None = None,
) -> dict[str, Tensor]:
    """Per-example gradients of the covered parameters on one noised batch.

    Parameters of known layers get theirs from what the layers see, the others by differentiating
    example by example.

    Args:
        coverage: The parameters, and the layers that hold them.
        objective: Supplies the model.
        batch: The noised batch.
        loss_vector: Maps the prediction ``[B, D]`` to the vectors ``[B, D]`` that are pulled back.
        examples: The number ``N`` of examples, each with equally many draws in a row, whose
            gradients are summed; default: ``B``.

    Returns:
        The gradients, of shape ``[N, *param.shape]``, by the parameter's name.
    """
    dtype, N = objective.working_dtype, examples or len(batch.indices)
    gradients: dict[str, Tensor] = {}
    mapped = {name: coverage.params[name] for name in coverage.others}

    class Gradients(WholeLayers):
        def pulled_back(self, batch: NoisedBatch, v_BD: Tensor) -> None:
            super().pulled_back(batch, v_BD)
            for name, gradient in mapped_gradients(objective, batch, v_BD, mapped).items():
                gradients[name] = gradient.unflatten(0, (N, -1)).sum(1)

    def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        gradients.update(layer.example_gradients(xs, gs, N))

    with observed(objective, coverage.layers, Gradients(consume, dtype)) as network:
        network.run(batch, one_vector(loss_vector))
    for name, p in coverage.params.items():
        if name not in gradients:  # no influence on the prediction
            gradients[name] = p.new_zeros(N, *p.shape, dtype=dtype).detach()
    return gradients


def check_observable(regression: NoisedRegression, layers: Sequence[Layer]) -> dict[str, int]:
    """Check, on two examples, that what hooks see gives each parameter's true gradient.

    Hooks miss a weight that is used outside its layer's call (as ``nn.MultiheadAttention`` does),
    an overridden ``forward``, or a first axis in which the examples do not lie one after the other;
    the curvature would then be silently wrong.

    Returns:
        How often each layer is called in a forward pass, by its name.

    Raises:
        ValueError: If a gradient differs from automatic differentiation's, or is not finite,
            naming the parameter.
    """
    if not layers:
        return {}
    objective = regression.objective
    clean = next(regression.clean_batches())
    batch = next(regression.noised_batches(clean.select(range(min(2, len(clean.indices))))))
    N, dtype = len(batch.indices), objective.working_dtype
    own = dict(objective.model.named_parameters())
    names = [name for layer in layers for name in layer.params]
    # examples of different weight, so that they are told apart
    share_B = 1 / torch.arange(1.0, N + 1, dtype=dtype, device=objective.device)
    with frozen(objective.model), torch.enable_grad():
        for name in names:
            own[name].requires_grad_(True)
        loss = (share_B * batch.loss(objective.predict(batch))).sum()
        gradients = torch.autograd.grad(loss, [own[n] for n in names], allow_unused=True)
    true = dict(zip(names, gradients, strict=True))

    tolerance = objective.rounding**0.5
    norms = [float(gradient.norm()) for gradient in true.values() if gradient is not None]
    # a gradient that vanishes, as of what a later norm subtracts, arrives as rounding noise
    noise = 10 * objective.rounding * max(norms, default=0.0)
    wrong = {name for name, gradient in true.items() if gradient is not None}

    def consume(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        for g in gs:
            check_finite(g, f"The gradient in the output of the layer of '{layer.params[0]}'")
        # or norms overflow
        largest = max(float(g.abs().max()) for g in gs) or 1.0
        terms = torch.cat([g.flatten() / largest for g in gs]).norm()
        for name, rows in layer.example_gradients(xs, gs, N).items():
            seen = torch.tensordot(share_B, rows, 1)
            gradient = true[name]
            truth = torch.zeros_like(seen) if gradient is None else gradient.to(dtype)
            difference = ((seen - truth) / largest).norm()
            # the terms of a gradient may cancel, so errors are measured against the terms
            allowed = tolerance * terms * _input_norm(layer, name, xs, gs)
            if difference <= allowed or difference * largest <= noise:
                wrong.discard(name)
            else:
                wrong.add(name)

    whole = WholeLayers(consume, dtype)
    with observed(objective, layers, whole) as network:
        network.run(batch, one_vector(batch.loss_gradient))
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"The gradient of '{name}' ({len(wrong)} parameters in all) is not the one that its "
            "layer's inputs and outputs give: the parameter is also used outside its layer's "
            "call, the layer computes more than its type says, or its first axis does not hold "
            "one example after the other. Leave it out of params."
        )
    return whole.calls


def _input_norm(layer: Layer, name: str, xs: Sequence[Tensor], gs: Sequence[Tensor]) -> float:
    """The norm of what multiplies the gradients in a layer's outputs to give a parameter's."""
    if name == layer.weight and isinstance(layer.kind, SharingKind):
        return sum(float(layer.kind.input_norm(layer.module, x)) for x in xs)
    return float(sum(g.numel() for g in gs)) ** 0.5  # ones, or normalised inputs
