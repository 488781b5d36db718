"""What hooks can observe of a network, tried out on a few examples.

A layer's hooks give its parameters' gradients if each is used in the layer's calls alone, the calls
compute what the layer's type says, and the first axis of what they see holds one example after the
other. Whether that is so is looked at rather than assumed; a layer of which it is not so has its
gradients found by automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from warnings import warn

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.diffusion.trial import Retrial, Trial
from curvlinops_diffusion.layers.coverage import Coverage
from curvlinops_diffusion.layers.effect import zeros_of
from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import (
    Observer,
    WholeLayers,
    observed,
    one_vector,
)
from curvlinops_diffusion.layers.true_gradients import example_shares, loss_value, true_gradients
from curvlinops_diffusion.runtime.checks import check_finite_count
from curvlinops_diffusion.runtime.precision import products_are_rounded, settled
from curvlinops_diffusion.runtime.sharded_networks import (
    full_tensor,
    is_sharded,
    mean_over_processes,
)

# The relative rounding error of the operands of products in TF32
_TF32 = 2.0**-10
# Gradients of at most so many rounding errors of the largest one may be rounding errors
_SMALL = 1000


def observable(
    objective: DenoisingObjective, trial: Trial, coverage: Coverage, gradients: bool = True
) -> Coverage:
    """Try out, on a few examples at two levels, what hooks see of each layer.

    Args:
        objective: Supplies the network.
        trial: The examples; the network was tried out on them.
        coverage: The parameters, and the layers that hold them.
        gradients: Whether other gradients than those that hooks see are of use.

    Returns:
        The same coverage, but for layers of which hooks see something else than the gradients of
        automatic differentiation: their parameters are in none. Parameters whose gradient is zero
        are ``suspects``, those of which it is rounding errors ``rounding``.

    Raises:
        ValueError: If a gradient is not finite; or, without ``gradients``, if there is such a
            layer.
    """
    layers = coverage.layers
    found = _Vanishing()
    names = [name for name, p in coverage.params.items() if p.numel() > 0]
    reasons = _unobservable(objective, layers, trial.few, names, found)
    coverage = replace(coverage, suspects=tuple(found.zero), rounding=tuple(found.rounding))
    if not reasons:
        return coverage
    if not gradients:
        name = min(reasons)
        raise ValueError(
            f"Hooks do not see the inputs of '{name}' ({len(reasons)} parameters in all): "
            f"{reasons[name]}. Leave it out of params, or pass another fisher_type than "
            "'forward-only', which computes no gradients."
        )
    entries = sum(coverage.params[name].numel() for name in reasons)
    some = "; ".join(f"'{name}': {reason}" for name, reason in list(reasons.items())[:3])
    warn(
        f"The gradients of {len(reasons)} parameters with {entries:,} entries are found by "
        f"automatic differentiation, example by example, which takes longer ({some}).",
        stacklevel=4,
    )
    kept = tuple(layer for layer in layers if not set(layer.params) & reasons.keys())
    others = coverage.others | reasons
    in_order = {name: others[name] for name in coverage.params if name in others}
    return replace(coverage, layers=kept, others=in_order)


@dataclass
class _Vanishing:
    """Parameters whose gradient vanishes in a trial.

    Attributes:
        zero: Those of which it is zero.
        rounding: Those of which it is rounding errors: biases of which it is a sum of terms that
            are not, and any of which it is another at nearly the same inputs.
    """

    zero: list[str] = field(default_factory=list)
    rounding: list[str] = field(default_factory=list)


class ObservedRetrial(Retrial):
    """Also tries out again whether hooks see the gradients of automatic differentiation.

    Args:
        regression: Objective, data and draws.
        layers: The layers whose gradients are read by hooks.
    """

    def __init__(self, regression: NoisedRegression, layers: Sequence[Layer]):
        super().__init__(regression)
        self._layers = layers

    def _check(self, trial: Trial) -> None:
        super()._check(trial)
        if not self._layers:
            return
        reasons = _unobservable(self._regression.objective, self._layers, trial.few)
        if reasons:
            name = min(reasons)
            raise ValueError(
                f"At example {self._regression.name_of(trial.low.indices[0])} of the data, hooks "
                f"do not see the gradient of '{name}' ({len(reasons)} parameters in all), as they "
                f"did on the first examples: {reasons[name]}. What the network does there depends "
                "on the example; leave these parameters out of params."
            )


def _unobservable(
    objective: DenoisingObjective,
    layers: Sequence[Layer],
    batch: NoisedBatch,
    names: Sequence[str] = (),
    vanishing: _Vanishing | None = None,
) -> dict[str, str]:
    """Find the parameters whose gradients hooks do not see.

    Args:
        objective: Supplies the network.
        layers: The layers with hooks.
        batch: What is predicted from.
        names: Parameters whose gradients are looked at beside those of the layers.
        vanishing: Is filled with the names of parameters whose gradient vanishes.

    Returns:
        Names with reasons.
    """
    own = dict.fromkeys([*names, *(name for layer in layers for name in layer.params)])

    def check() -> dict[str, str]:
        true = true_gradients(objective, list(own), batch, loss_value(batch))
        found = _Vanishing()
        reasons = _seen_otherwise(objective, layers, batch, true, found)
        if vanishing is not None:
            vanishing.zero = zeros_of(true)
            noise = _noise(objective, batch, true)
            vanishing.rounding = [n for n in own if n in noise or n in found.rounding]
        return reasons

    return settled(check, objective.device)


def _seen_otherwise(
    objective: DenoisingObjective,
    layers: Sequence[Layer],
    batch: NoisedBatch,
    gradients: Mapping[str, Tensor | None],
    vanishing: _Vanishing,
) -> dict[str, str]:
    """Compare with true gradients what hooks see, in the precision that products have now."""
    if not layers:
        return {}
    N, dtype = len(batch.indices), objective.working_dtype
    sharded = is_sharded(objective.model)
    share_B = example_shares(batch, dtype)
    true = {name: gradients[name] for layer in layers for name in layer.params}
    shapes: dict[str, str] = {}
    # of all layers, read together at the end: a GPU would be waited for at each
    not_finite: list[tuple[Layer, int, Tensor]] = []
    compared: dict[str, Tensor] = {}
    sizes: dict[str, Tensor] = {}
    counts: dict[str, float] = {}

    def compare(layer: Layer, xs: list[Tensor], gs: list[Tensor]) -> None:
        not_finite.extend((layer, g.numel(), (~g.isfinite()).sum()) for g in gs)
        largest = torch.stack([g.abs().max() for g in gs]).max()
        largest = scale = torch.where(largest == 0, 1, largest)  # or norms overflow
        terms = torch.cat([g.flatten() / largest for g in gs]).norm()
        for name, rows in layer.example_gradients(xs, gs, N).items():
            seen, gradient = torch.tensordot(share_B, rows, 1), true[name]
            truth = torch.zeros_like(seen) if gradient is None else full_tensor(gradient).to(dtype)
            # the terms of a gradient may cancel, so errors are measured against the terms
            allowed = objective.rounding**0.5 * terms * _input_norm(layer, name, xs, gs)
            if sharded:  # others have other examples, and the true gradient is of all
                seen, largest = mean_over_processes(seen), torch.ones_like(scale)
                allowed = mean_over_processes(allowed * scale)
            difference = ((seen - truth) / largest).norm()
            compared[name] = torch.stack([difference, allowed, largest])
            if name == layer.bias and isinstance(layer.kind, SharingKind) and not sharded:
                sizes[name] = torch.stack([(truth / largest).norm(), terms])
                counts[name] = sum(g.numel() for g in gs) / len(truth.flatten())

    def unreadable(layer: Layer, shape: torch.Size) -> None:
        shapes[layer.name] = (
            f"its layer was given an input of shape {tuple(shape)} for a batch of {N}, whose "
            "first axis does not hold the examples"
        )

    whole = WholeLayers(compare, dtype)
    with observed(objective, layers, whole, unreadable=unreadable) as network:
        network.run(batch, one_vector(batch.loss_gradient))
    _check_all_finite(not_finite)
    wrong = _beyond_rounding(compared, true, objective.rounding)
    rounded = torch.stack(list(sizes.values())).tolist() if sizes else []
    vanishing.rounding = [
        name
        for name, (gradient, terms) in zip(sizes, rounded, strict=True)
        if 0 < gradient <= _rounding_of_sum(objective, counts[name]) * terms
    ]
    reason = (
        "its layer's inputs and outputs do not give its gradient (it is used outside the layer's "
        "call, the layer computes more than its type says, or the first axis does not hold one "
        f"example after the other); they differ by more than {objective.autocast or dtype} rounds"
    )
    return {
        name: shapes.get(layer.name, reason)
        for layer in layers
        for name in layer.params
        if layer.name in shapes or wrong & set(layer.params)
    }


def _rounding_of_sum(objective: DenoisingObjective, count: float) -> float:
    """The most that rounding leaves of a sum that vanishes, in units of the norm of its terms.

    Terms are rounded one by one in the network's arithmetic. Those that a norm has made have lost a
    mean, whose rounding is common to all of them and in the precision of sums.

    Args:
        objective: Supplies the network.
        count: The number of terms.
    """
    return 4 * _rounding(objective) + 16 * torch.finfo(objective.working_dtype).eps * count**0.5


def _rounding(objective: DenoisingObjective) -> float:
    """The relative rounding error of the network's arithmetic, with that of its products."""
    rounded = products_are_rounded(objective.device) and objective.dtype == torch.float32
    return max(objective.rounding, _TF32 if rounded else 0.0)


def _noise(
    objective: DenoisingObjective, batch: NoisedBatch, gradients: Mapping[str, Tensor | None]
) -> set[str]:
    """The parameters whose gradient is another one where inputs differ by as much as rounding does.

    Small gradients may be those of a branch that training has hardly begun, which hardly change, or
    rounding errors, as of an embedding that is added to a channel before a norm subtracts its mean.
    """
    own = {name: g for name, g in gradients.items() if g is not None}
    norms = _norms(own)
    small = _SMALL * _rounding(objective) * max(norms.values(), default=0.0)
    looked_at = [name for name, norm in norms.items() if 0 < norm <= small]
    if not looked_at:
        return set()
    steps = torch.rand(batch.x_t.shape, generator=torch.Generator().manual_seed(0))
    nearly = replace(batch, x_t=batch.x_t * (1 + 4 * _rounding(objective) * steps.to(batch.x_t)))
    again = true_gradients(objective, looked_at, nearly, loss_value(nearly))
    changes = {name: own[name] - g for name, g in again.items() if g is not None}
    return {name for name, change in _norms(changes).items() if change > norms[name] / 2}


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norms of tensors, which are read together."""
    found = [full_tensor(z.norm()) for z in tensors.values()]
    return dict(zip(tensors, torch.stack(found).tolist() if found else [], strict=True))


def _check_all_finite(found: Sequence[tuple[Layer, int, Tensor]]) -> None:
    """Check gradients in layers' outputs: of each its layer, its entries, and how many are not.

    Raises:
        ValueError: If some are not finite.
    """
    counts = torch.stack([count for *_, count in found]).tolist() if found else []
    for (layer, entries, _), count in zip(found, counts, strict=True):
        what = f"The gradient in the output of the layer of '{layer.params[0]}'"
        check_finite_count(what, count, entries)


def _beyond_rounding(
    compared: Mapping[str, Tensor], true: Mapping[str, Tensor | None], rounding: float
) -> set[str]:
    """The parameters whose gradients differ from the true ones by more than rounding.

    Args:
        compared: By how much they differ and may, and the scale of both, by name.
        true: The true ones; ``None`` for those that have none.
        rounding: The relative rounding error.
    """
    own = {name: gradient for name, gradient in true.items() if gradient is not None}
    # a gradient that vanishes, as of what a later norm subtracts, arrives as rounding noise
    noise = 10 * rounding * max(_norms(own).values(), default=0.0)
    wrong = set(own)
    rows = torch.stack(list(compared.values())).tolist() if compared else []
    for name, (difference, allowed, largest) in zip(compared, rows, strict=True):
        if difference <= allowed or difference * largest <= noise:
            wrong.discard(name)
        else:
            wrong.add(name)
    return wrong


def _input_norm(
    layer: Layer, name: str, xs: Sequence[Tensor], gs: Sequence[Tensor]
) -> Tensor | float:
    """The norm of what multiplies the gradients in a layer's outputs to give a parameter's."""
    if name == layer.weight and isinstance(layer.kind, SharingKind):
        return torch.stack([layer.kind.input_norm(layer.module, x) for x in xs]).sum()
    return float(sum(g.numel() for g in gs)) ** 0.5  # ones, or normalised inputs


# ---------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """The calls of a layer in one forward pass.

    Attributes:
        count: How many there are; calls under ``torch.no_grad()`` do not count.
        differentiated: The numbers of those that the prediction depends on.
    """

    count: int
    differentiated: tuple[int, ...]


class CallCounter(Observer):
    """Counts the calls of each layer, and the gradients that arrive in a backward pass."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._arrived: dict[str, set[int]] = {}

    def start(self, batch: NoisedBatch) -> None:
        """Begin anew."""
        self._counts, self._arrived = {}, {}

    def input(self, layer: Layer, x: Tensor) -> None:
        """Count a call."""
        self._counts[layer.name] = self._counts.get(layer.name, 0) + 1

    def gradient(self, layer: Layer, call: int, g: Tensor, calls: int) -> None:
        """Note that the prediction depends on a call."""
        self._arrived.setdefault(layer.name, set()).add(call)

    def of(self, name: str) -> Calls:
        """The calls of a layer, once a backward pass is over."""
        return Calls(self._counts.get(name, 0), tuple(sorted(self._arrived.get(name, ()))))


def call_patterns(regression: NoisedRegression, layers: Sequence[Layer]) -> dict[str, Calls]:
    """The calls of each layer, where these are the same at a low and at a high noise level.

    Args:
        regression: Objective, data and draws.
        layers: The layers.

    Returns:
        The calls by the layer's name; a layer whose calls vary is missing.
    """
    trial, counter = Trial.of(regression), CallCounter()
    patterns: list[dict[str, Calls]] = []
    with observed(regression.objective, layers, counter) as network:
        for batch in (trial.low, trial.high):
            network.run(batch, one_vector(batch.loss_gradient))
            patterns.append({layer.name: counter.of(layer.name) for layer in layers})
    low, high = patterns
    return {name: calls for name, calls in low.items() if high[name] == calls}
