"""Check that the prediction depends on the parameters whose curvature or gradients are wanted.

Derivatives in parameters without effect are zero: those of an adapter that is fused, disabled, not
active or of scale zero, of a layer that is not used, or one whose output is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from warnings import warn

import torch
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.diffusion.trial import Trial
from curvlinops_diffusion.layers.true_gradients import Value, loss_value, true_gradients
from curvlinops_diffusion.runtime.adapters import adapter_states, without_part
from curvlinops_diffusion.runtime.sharded_networks import nonzero

# names of parameters in a message
_SHOWN = 4


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
        found: Gives those without a gradient in a trial that was made; ``None`` to make one here.

    Raises:
        ValueError: If none of them has an effect on any prediction.
    """
    model = regression.objective.model
    state = (*params, *adapter_states(model))
    if state in regression.effects:
        return
    names = [name for name, p in params.items() if p.numel() > 0]
    check_adapters(regression, names)
    if found is None:
        batch = Trial.of(regression).few
        suspects = zero_gradients(regression.objective, names, batch, loss_value(batch))
    else:
        suspects = [name for name in found() if params[name].numel() > 0]
    if suspects:
        # a loss may be flat where the prediction is not: its weight or mask may be zero
        batch = Trial.of(regression).mixed
        suspects = zero_gradients(regression.objective, suspects, batch, _random_value(batch))
    if names and len(suspects) == len(names) and not _any_effect(regression, names):
        raise ValueError(_without_effect(names, {}))
    if suspects:
        some = [name for name in names if name in set(suspects)]
        entries, total = (sum(params[name].numel() for name in own) for own in (some, names))
        why = _each_once(without_part(model, some))
        warn(
            f"{len(some)} of {len(names)} parameters ({entries:,} of {total:,} entries) have no "
            f"effect on the prediction of the first examples{why and f' ({why})'}, on which their "
            "curvature and gradients are zero; other examples may use them. They are "
            f"{_listed(some)}.",
            stacklevel=4,
        )
    regression.effects.add(state)


def check_adapters(regression: NoisedRegression, names: Collection[str]) -> None:
    """Check, once for each state of adapters, that some parameter is of none or takes part.

    Raises:
        ValueError: If all are of adapters that take no part, with what to call.
    """
    model = regression.objective.model
    state = ("adapters", *names, *adapter_states(model))
    if state in regression.effects:
        return
    reasons = without_part(model, names)
    if names and len(reasons) == len(names):
        raise ValueError(_without_effect(names, reasons))
    regression.effects.add(state)


def zero_gradients(
    objective: DenoisingObjective, names: Collection[str], batch: NoisedBatch, value: Value
) -> list[str]:
    """The parameters in which the gradient of a value is zero."""
    return zeros_of(true_gradients(objective, list(names), batch, value))


def zeros_of(gradients: Mapping[str, Tensor | None]) -> list[str]:
    """The names of gradients that are zero; they are looked at together."""
    have = nonzero({name: g for name, g in gradients.items() if g is not None})
    return [name for name in gradients if name not in have]


def _any_effect(regression: NoisedRegression, names: list[str]) -> bool:
    """Whether the prediction of any example depends on any of the parameters."""
    for batch in _batches(regression):
        found = zero_gradients(regression.objective, names, batch, _random_value(batch))
        if len(found) < len(names):
            return True
    return False


def _batches(regression: NoisedRegression) -> Iterator[NoisedBatch]:
    for clean in regression.clean_batches():
        yield from regression.noised_batches(clean)


def _random_value(batch: NoisedBatch) -> Value:
    """A random linear function of the prediction, always the same."""

    def value(prediction_BD: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        v_BD = torch.randn(prediction_BD.shape, generator=generator)
        return (v_BD.to(prediction_BD) * prediction_BD).sum()

    return value


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
