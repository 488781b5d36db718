"""Check that what hooks see gives each parameter's true gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers import Layer, SharingKind
from curvlinops_diffusion.layers.hooks import frozen
from curvlinops_diffusion.layers.observation import WholeLayers, observed, one_vector
from curvlinops_diffusion.runtime.checks import check_finite


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
    # examples of different weight, so that they are told apart
    share_B = 1 / torch.arange(1.0, N + 1, dtype=dtype, device=objective.device)
    true = _true_gradients(objective, layers, batch, share_B)
    # a gradient that vanishes, as of what a later norm subtracts, arrives as rounding noise
    norms = [float(gradient.norm()) for gradient in true.values() if gradient is not None]
    noise = 10 * objective.rounding * max(norms, default=0.0)
    wrong = {name for name, gradient in true.items() if gradient is not None}

    def compare(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        for g in gs:
            check_finite(g, f"The gradient in the output of the layer of '{layer.params[0]}'")
        # or norms overflow
        largest = max(float(g.abs().max()) for g in gs) or 1.0
        terms = torch.cat([g.flatten() / largest for g in gs]).norm()
        for name, rows in layer.example_gradients(xs, gs, N).items():
            seen, gradient = torch.tensordot(share_B, rows, 1), true[name]
            truth = torch.zeros_like(seen) if gradient is None else gradient.to(dtype)
            difference = ((seen - truth) / largest).norm()
            # the terms of a gradient may cancel, so errors are measured against the terms
            allowed = objective.rounding**0.5 * terms * _input_norm(layer, name, xs, gs)
            if difference <= allowed or difference * largest <= noise:
                wrong.discard(name)
            else:
                wrong.add(name)

    whole = WholeLayers(compare, dtype)
    with observed(objective, layers, whole) as network:
        network.run(batch, one_vector(batch.loss_gradient))
    if wrong:
        raise ValueError(
            f"The gradient of '{min(wrong)}' ({len(wrong)} parameters in all) is not the one that "
            "its layer's inputs and outputs give: the parameter is also used outside its layer's "
            "call, the layer computes more than its type says, or its first axis does not hold "
            "one example after the other. Leave it out of params."
        )
    return whole.calls


def _true_gradients(
    objective: DenoisingObjective, layers: Sequence[Layer], batch: NoisedBatch, share_B: Tensor
) -> Mapping[str, Tensor | None]:
    """The gradients of a weighted sum of losses by automatic differentiation, by name."""
    own = dict(objective.model.named_parameters())
    names = [name for layer in layers for name in layer.params]
    with frozen(objective.model), torch.enable_grad():
        for name in names:
            own[name].requires_grad_(True)
        loss = (share_B * batch.loss(objective.predict(batch))).sum()
        gradients = torch.autograd.grad(loss, [own[n] for n in names], allow_unused=True)
    return dict(zip(names, gradients, strict=True))


def _input_norm(layer: Layer, name: str, xs: Sequence[Tensor], gs: Sequence[Tensor]) -> float:
    """The norm of what multiplies the gradients in a layer's outputs to give a parameter's."""
    if name == layer.weight and isinstance(layer.kind, SharingKind):
        return sum(float(layer.kind.input_norm(layer.module, x)) for x in xs)
    return float(sum(g.numel() for g in gs)) ** 0.5  # ones, or normalised inputs
