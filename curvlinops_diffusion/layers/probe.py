"""Checks on a few examples of what derivatives assume of a network.

That its output is a function of each example alone (:mod:`~curvlinops_diffusion.layers.trial`);
that gradients are finite; that the hooks of a layer see the gradients of its parameters, which they
do if each is used in the layer's calls alone, the calls compute what the layer's type says, and the
first axis of what they see holds one example after the other; that the prediction depends on the
parameters, which may be those of an adapter that is fused, disabled, not active or of scale zero,
or of a layer that is not used.

Findings are kept with the problem, by what they depend on, and shared by its copies of other draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch
from curvlinops_diffusion.diffusion.checks import check_modes
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.layers.coverage import Coverage
from curvlinops_diffusion.layers.kind import SharingKind
from curvlinops_diffusion.layers.layer import Layer
from curvlinops_diffusion.layers.observation import (
    WholeLayers,
    frozen,
    observed,
    one_vector,
)
from curvlinops_diffusion.layers.trial import FEW, Trial, check_trial
from curvlinops_diffusion.runtime.adapters import adapter_states, without_part
from curvlinops_diffusion.runtime.checks import check_finite_count
from curvlinops_diffusion.runtime.digests import change_marks
from curvlinops_diffusion.runtime.modes import recomputation_named
from curvlinops_diffusion.runtime.precision import products_are_rounded, settled
from curvlinops_diffusion.runtime.processes import Processes, lost_processes_named
from curvlinops_diffusion.runtime.sharded_networks import (
    full_tensor,
    is_sharded,
    local_tensor,
    mean_over_processes,
    nonzero,
)

# The relative rounding error of the operands of products in TF32
_TF32 = 2.0**-10
# Gradients of at most so many rounding errors of the largest one may be rounding errors
_SMALL = 1000
# names of parameters in a message
_SHOWN = 4


def once(regression: NoisedRegression, key: tuple[Hashable, ...], look: Callable[[], Any]) -> Any:
    """Look once for each key, and return what was found."""
    if key not in regression.findings:
        regression.findings[key] = look()
    return regression.findings[key]


def trial_of(regression: NoisedRegression) -> Trial:
    """The examples that the network is tried out on; the latest are kept.

    Until the draws change, of which parts have one trial, or the network is moved to another device
    or precision.
    """
    whole = regression.undivided
    now = repr(whole.draws), regression.objective.device, regression.objective.dtype
    before, found = regression.findings.get(("trial",), (None, None))
    if before != now:
        found = Trial.of(whole)
        regression.findings["trial",] = now, found
    trial: Trial = found
    return trial


def check_network(regression: NoisedRegression) -> None:
    """Check, once in each mode of its modules, that the network is a function of single examples.

    Raises:
        ValueError: As :func:`~curvlinops_diffusion.layers.trial.check_trial`, or if tensors that
            are made now cannot be differentiated.
    """
    check_modes()
    if ("network", _modes(regression)) not in regression.findings:
        _check_network_now(regression)


def _check_network_now(regression: NoisedRegression) -> None:
    check_trial(regression.objective, trial_of(regression))
    regression.findings["network", _modes(regression)] = _weights(regression)


def _modes(regression: NoisedRegression) -> tuple[bool, ...]:
    return tuple(module.training for module in regression.objective.model.modules())


def state_of(regression: NoisedRegression, layers: Sequence[Layer]) -> tuple[Hashable, ...]:
    """The state that findings depend on: layers, draws, modes, adapters and, last, weights."""
    # users may register kinds meanwhile
    kinds = [(layer.name, layer.kind) for layer in layers]
    adapters = adapter_states(regression.objective.model)
    return (
        *kinds,
        repr(regression.draws.whole),
        _modes(regression),
        adapters,
        _weights(regression),
    )


def _weights(regression: NoisedRegression) -> int:
    """A number that differs if weights or settings do; alike on processes that share a network."""

    def sum_of(z: Tensor) -> Tensor:
        z = torch.view_as_real(z) if z.is_complex() else z
        z = z.view(torch.uint8) if z.dtype.itemsize == 1 else z  # not all of these have sums
        return z.sum(dtype=torch.float32 if z.device.type == "mps" else torch.float64)

    model = regression.objective.model
    # by sums as well: optimisers and averages of weights write through .data, too
    sums: dict[torch.device, list[Tensor]] = {}
    for z in (*model.parameters(), *model.buffers()):
        own = local_tensor(z.detach())
        sums.setdefault(own.device, []).append(sum_of(own))
    read = [torch.stack(several).tolist() for several in sums.values()]  # one wait for each device
    if is_sharded(model):  # of which each process has other parts
        return hash(tuple(Processes.of_all().all_gather(repr(read))))
    return hash(repr((change_marks(model), read)))


def probed(regression: NoisedRegression, coverage: Coverage) -> Coverage:
    """Try out what hooks see of each layer, and whether the parameters have an effect.

    Once for each choice of parameters, kinds of layers, and the network's weights, modes and
    adapters.

    Args:
        regression: Objective, data and draws.
        coverage: The parameters, and the layers that hold them.

    Returns:
        The same coverage, but for layers of which hooks see something else than the gradients of
        automatic differentiation: their parameters are in none. Parameters whose gradient is
        rounding errors alone are listed.

    Raises:
        ValueError: As :func:`check_network` and :func:`check_effect`, or if a gradient is not
            finite.
    """
    layers, state = coverage.layers, state_of(regression, coverage.layers)
    names = [name for name, p in coverage.params.items() if p.numel() > 0]

    def look() -> _Gradients:
        if regression.findings.get(("network", _modes(regression))) != state[-1]:
            _check_network_now(regression)
        return _compared(regression.objective, layers, trial_of(regression).few, names)

    found: _Gradients = once(regression, ("gradients", *coverage.params, *state), look)
    coverage, reasons = replace(coverage, rounding=found.rounding), found.reasons
    if reasons:
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
        coverage = replace(coverage, layers=kept, others=in_order)
    check_effect(regression, coverage.params, lambda: found.zero)
    return coverage


class Retrial:
    """Tries a network out again in the course of a pass: at the batches 3, 7, 15, … it is shown.

    What couples examples, or is random, may do so for some of the data only, and what hooks see may
    depend on the example. The price falls with the length of the pass. Where images have several
    shapes, it does so at the first batch of two other ones, too.

    Args:
        regression: Objective, data and draws.
        layers: The layers whose gradients are read by hooks.
    """

    def __init__(self, regression: NoisedRegression, layers: Sequence[Layer] = ()):
        self._regression = regression
        self._layers = layers
        self._shown = 0
        self._shapes: set[torch.Size] = set()

    def __call__(self, clean: CleanBatch) -> None:
        """Show it a batch.

        Raises:
            ValueError: As :func:`~curvlinops_diffusion.layers.trial.check_trial`, or if hooks do
                not see a gradient, or see one that is not finite.
        """
        number, self._shown = self._shown, self._shown + 1
        other = 0 < len(self._shapes) < 3 and clean.x0.shape[1:] not in self._shapes
        self._shapes.add(clean.x0.shape[1:])
        if (number < 3 or number & (number + 1)) and not other:
            return
        objective, trial = self._regression.objective, Trial.of(self._regression, [clean], FEW)
        check_trial(objective, trial)
        reasons = _compared(objective, self._layers, trial.few).reasons if self._layers else {}
        if reasons:
            name = min(reasons)
            raise ValueError(
                f"At example {self._regression.name_of(trial.low.indices[0])} of the data, hooks "
                f"do not see the gradient of '{name}' ({len(reasons)} parameters in all), as they "
                f"did on the first examples: {reasons[name]}. What the network does there depends "
                "on the example; leave these parameters out of params."
            )


#: Maps a prediction ``[B, D]`` to a number.
Value = Callable[[Tensor], Tensor]


def _shares(batch: NoisedBatch, dtype: torch.dtype) -> Tensor:
    """Weights ``[B]`` of examples, all different, so that these are told apart."""
    return 1 / torch.arange(1.0, len(batch.indices) + 1, dtype=dtype, device=batch.x_t.device)


def _weighted_loss(batch: NoisedBatch) -> Value:
    def value(prediction_BD: Tensor) -> Tensor:
        losses_B = batch.loss(prediction_BD)
        return (_shares(batch, losses_B.dtype) * losses_B).sum()

    return value


def _random_sum(prediction_BD: Tensor) -> Tensor:
    """A random linear function of the prediction, always the same."""
    generator = torch.Generator().manual_seed(0)
    v_BD = torch.randn(prediction_BD.shape, generator=generator)
    return (v_BD.to(prediction_BD) * prediction_BD).sum()


def _true_gradients(
    objective: DenoisingObjective, names: Iterable[str], batch: NoisedBatch, value: Value
) -> dict[str, Tensor | None]:
    """The gradients of a value of the prediction by name; ``None`` where it does not depend."""
    own = dict(objective.model.named_parameters())
    params = {name: own[name] for name in names}
    with frozen(objective.model), recomputation_named(), torch.enable_grad():
        for p in params.values():
            p.requires_grad_(True)
        result = value(objective.predict(batch))
        if not result.requires_grad:  # of none of them
            return dict.fromkeys(params)
        if is_sharded(objective.model):
            return _accumulated_gradients(result, params)
        gradients = torch.autograd.grad(result, list(params.values()), allow_unused=True)
    return dict(zip(params, gradients, strict=True))


def _accumulated_gradients(
    value: Tensor, params: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """Gradients as a training step forms them; those that were there before are put back."""
    # of a network that is divided among processes, these get a part of the processes' mean each,
    # which is the gradient if all have the same value
    before = {name: p.grad for name, p in params.items()}
    try:
        for p in params.values():
            p.grad = None
        with lost_processes_named():
            value.backward()
        return {name: p.grad for name, p in params.items()}
    finally:
        for name, p in params.items():
            p.grad = before[name]


def zeros_of(gradients: Mapping[str, Tensor | None]) -> list[str]:
    """The names of gradients that are zero; they are looked at together."""
    have = nonzero({name: g for name, g in gradients.items() if g is not None})
    return [name for name in gradients if name not in have]


def _norms(tensors: Mapping[str, Tensor | None]) -> dict[str, float]:
    """The norms of those tensors that there are, which are read together."""
    found = {name: full_tensor(z.norm()) for name, z in tensors.items() if z is not None}
    norms = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, norms, strict=True))


@dataclass(frozen=True)
class _Gradients:
    """Findings of a comparison of gradients."""

    reasons: dict[str, str]  # why hooks do not see the gradients of these parameters
    zero: tuple[str, ...] = ()  # whose gradient of the loss is zero
    # biases of which it is a sum of terms that are not, and any of which it is another at nearly
    # the same inputs
    rounding: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """True if there is something that rounding may have made."""
        return bool(self.reasons)


def _compared(
    objective: DenoisingObjective,
    layers: Sequence[Layer],
    batch: NoisedBatch,
    names: Sequence[str] = (),
) -> _Gradients:
    """Compare gradients that hooks see with true ones; find those of ``names`` that vanish."""
    seen_by_hooks = [name for layer in layers for name in layer.params]

    def look() -> _Gradients:
        own = dict.fromkeys([*names, *seen_by_hooks])
        true = _true_gradients(objective, own, batch, _weighted_loss(batch))
        found = _Comparison(objective, batch, {name: true[name] for name in seen_by_hooks})
        if layers:
            with observed(objective, layers, found) as network:
                network.run(batch, one_vector(batch.loss_gradient))
        reasons = found.reasons(layers)
        if not names:
            return _Gradients(reasons)
        noise = _noise(objective, batch, true)
        rounding = tuple(name for name in own if name in noise or name in found.cancelled)
        return _Gradients(reasons, tuple(zeros_of(true)), rounding)

    return settled(look, objective.device)


class _Comparison(WholeLayers):
    """Finds parameters of which hooks see other gradients, and biases of which all terms cancel."""

    def __init__(
        self,
        objective: DenoisingObjective,
        batch: NoisedBatch,
        gradients: Mapping[str, Tensor | None],
    ):
        super().__init__(objective.working_dtype)
        self._objective = objective
        self._true = gradients
        self._shares_B = _shares(batch, objective.working_dtype)
        norms = _norms(gradients)
        # a gradient that vanishes, as of what a later norm subtracts, arrives as rounding noise
        self._noise = 10 * objective.rounding * max(norms.values(), default=0.0)
        self._wrong = set(norms)  # until they are seen
        self._shapes: dict[str, str] = {}
        # read together at the end: a GPU would be waited for at each layer
        self._not_finite: list[tuple[str, Tensor, int]] = []
        self._compared: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self.cancelled: set[str] = set()

    def unreadable(self, layer: Layer, shape: torch.Size, batch_size: int) -> None:
        """Remember the reason."""
        self._shapes[layer.name] = (
            f"its layer was given an input of shape {tuple(shape)} for a batch of {batch_size}, "
            "whose first axis does not hold the examples"
        )

    def whole(self, layer: Layer, xs: list[Tensor], gs: list[Tensor], N: int) -> None:
        """Compare the gradients of a layer's parameters."""
        objective, sharded = self._objective, is_sharded(self._objective.model)
        for g in gs:
            what = f"The gradient in the output of the layer of '{layer.params[0]}'"
            self._not_finite.append((what, (~g.isfinite()).sum(), g.numel()))
        largest = torch.stack([g.abs().max() for g in gs]).max()
        largest = torch.where(largest == 0, 1, largest)  # or norms overflow
        terms = torch.cat([g.flatten() / largest for g in gs]).norm()
        for name, rows in layer.example_gradients(xs, gs, N).items():
            seen, gradient = torch.tensordot(self._shares_B, rows, 1), self._true[name]
            truth = torch.zeros_like(seen) if gradient is None else full_tensor(gradient).to(seen)
            # the terms of a gradient may cancel, so errors are measured against the terms
            allowed = objective.rounding**0.5 * terms * _input_norm(layer, name, xs, gs)
            unit = largest
            if sharded:  # others have other examples, and the true gradient is of all
                seen, unit = mean_over_processes(seen), torch.ones_like(largest)
                allowed = mean_over_processes(allowed * largest)
            numbers = [((seen - truth) / unit).norm(), allowed, unit, (truth / unit).norm(), terms]
            self._compared[name] = torch.stack(numbers)
            if name == layer.bias and isinstance(layer.kind, SharingKind) and not sharded:
                self._counts[name] = sum(g.numel() for g in gs) / truth.numel()

    def reasons(self, layers: Sequence[Layer]) -> dict[str, str]:
        """The parameters of layers whose gradients hooks do not see, with reasons."""
        counted = torch.stack([count for _, count, _ in self._not_finite] or [torch.zeros(())])
        for (what, _, size), count in zip(self._not_finite, counted.tolist(), strict=False):
            check_finite_count(what, int(count), size)
        compared = torch.stack(list(self._compared.values())).tolist() if self._compared else []
        for name, (error, most, scale, size, terms) in zip(self._compared, compared, strict=True):
            if error <= most or error * scale <= self._noise:
                self._wrong.discard(name)
            count = self._counts.get(name)
            if count and 0 < size <= _rounding_of_sum(self._objective, count) * terms:
                self.cancelled.add(name)
        rounding = self._objective.autocast or self._objective.working_dtype
        reason = (
            "its layer's inputs and outputs do not give its gradient (it is used outside the "
            "layer's call, the layer computes more than its type says, or the first axis does not "
            f"hold one example after the other); they differ by more than {rounding} rounds"
        )
        return {
            name: self._shapes.get(layer.name, reason)
            for layer in layers
            for name in layer.params
            if layer.name in self._shapes or self._wrong & set(layer.params)
        }


def _input_norm(
    layer: Layer, name: str, xs: Sequence[Tensor], gs: Sequence[Tensor]
) -> Tensor | float:
    """The norm of what multiplies the gradients in a layer's outputs to give a parameter's."""
    if name == layer.weight and isinstance(layer.kind, SharingKind):
        return torch.stack([layer.kind.input_norm(layer.module, x) for x in xs]).sum()
    return float(sum(g.numel() for g in gs)) ** 0.5  # ones, or normalised inputs


def _rounding(objective: DenoisingObjective) -> float:
    """The relative rounding error of the network's arithmetic, with that of its products."""
    rounded = products_are_rounded(objective.device) and objective.dtype == torch.float32
    return max(objective.rounding, _TF32 if rounded else 0.0)


def _rounding_of_sum(objective: DenoisingObjective, count: float) -> float:
    """The most that rounding leaves of a vanishing sum of ``count`` terms, over their norm."""
    # terms are rounded one by one in the network's arithmetic; those that a norm has made have lost
    # a mean, whose rounding is common to all of them and in the precision of sums
    return 4 * _rounding(objective) + 16 * torch.finfo(objective.working_dtype).eps * count**0.5


def _noise(
    objective: DenoisingObjective, batch: NoisedBatch, gradients: Mapping[str, Tensor | None]
) -> set[str]:
    """Parameters whose gradient is another one where inputs differ by as much as rounding does."""
    # small gradients may be those of a branch that training has hardly begun, which hardly change,
    # or rounding errors, as of an embedding that is added to a channel before a norm subtracts its
    # mean
    norms = _norms(gradients)
    small = _SMALL * _rounding(objective) * max(norms.values(), default=0.0)
    looked_at = [name for name, norm in norms.items() if 0 < norm <= small]
    if not looked_at:
        return set()
    steps = torch.rand(batch.x_t.shape, generator=torch.Generator().manual_seed(0))
    nearly = replace(batch, x_t=batch.x_t * (1 + 4 * _rounding(objective) * steps.to(batch.x_t)))
    again = _true_gradients(objective, looked_at, nearly, _weighted_loss(nearly))
    pairs = {name: (gradients[name], g) for name, g in again.items()}
    changes = {n: a - b for n, (a, b) in pairs.items() if a is not None and b is not None}
    return {name for name, change in _norms(changes).items() if change > norms[name] / 2}


def check_effect(
    regression: NoisedRegression,
    params: Mapping[str, nn.Parameter],
    found: Callable[[], Collection[str]] | None = None,
) -> None:
    """Check, once for each choice of parameters and state of adapters, that they have an effect.

    Some without one are warned of: unused layers are common, and what is not used for the first
    examples may be for others. Where all seem to have none, the other examples are looked at, up to
    the first with a gradient.

    Args:
        regression: Objective, data and draws.
        params: The parameters by name.
        found: Gives those without a gradient of the loss where that is known; ``None`` to look.

    Raises:
        ValueError: If none of them has an effect on any prediction.
    """
    names = [name for name, p in params.items() if p.numel() > 0]
    objective, model = regression.objective, regression.objective.model

    def without(names: Iterable[str], batch: NoisedBatch, value: Value) -> list[str]:
        return zeros_of(_true_gradients(objective, names, batch, value))

    def look() -> None:
        check_adapters(regression, names)
        if found is None:
            few = trial_of(regression).few
            suspects = without(names, few, _weighted_loss(few))
        else:
            suspects = [name for name in found() if params[name].numel() > 0]
        if suspects:
            # a loss may be flat where the prediction is not: its weight or mask may be zero
            suspects = without(suspects, trial_of(regression).mixed, _random_sum)
        if len(suspects) == len(names) and all(
            len(without(names, batch, _random_sum)) == len(names) for batch in regression.batches()
        ):
            raise ValueError(_without_effect(names, {}))
        if suspects:
            some = [name for name in names if name in set(suspects)]
            entries, total = (sum(params[name].numel() for name in own) for own in (some, names))
            why = _each_once(without_part(model, some))
            warn(
                f"{len(some)} of {len(names)} parameters ({entries:,} of {total:,} entries) have "
                f"no effect on the prediction of the first examples{why and f' ({why})'}, on which "
                "their curvature and gradients are zero; other examples may use them. They are "
                f"{_listed(some)}.",
                stacklevel=7,
            )

    if names:
        once(regression, ("effect", *params, *adapter_states(model)), look)


def check_adapters(regression: NoisedRegression, names: Collection[str]) -> None:
    """Check, once for each state of adapters, that some parameter is of none or takes part.

    Raises:
        ValueError: If all are of adapters that take no part, with what to call.
    """
    model = regression.objective.model

    def look() -> None:
        reasons = without_part(model, names)
        if names and len(reasons) == len(names):
            raise ValueError(_without_effect(names, reasons))

    once(regression, ("adapters", *names, *adapter_states(model)), look)


def _without_effect(names: Collection[str], reasons: Mapping[str, str]) -> str:
    why = _each_once(reasons) or (
        "the network does not use them, detaches what they give, runs them under torch.no_grad(), "
        "or multiplies it by zero (a scale of adapters among its arguments, say, or a layer that "
        "was initialised at zero)"
    )
    return (
        f"None of the {len(names)} parameters has an effect on the prediction: {why}. Their "
        f"curvature, gradients and scores would be zero. They are {_listed(names)}."
    )


def _each_once(reasons: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(reasons.values()))


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
