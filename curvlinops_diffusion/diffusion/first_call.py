"""The first call of a network, which names what it cannot be called with."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.batch import CleanBatch, NoisedBatch, leaves
from curvlinops_diffusion.diffusion.objective import DenoisingObjective

_LONGEST = 400


def run_once(objective: DenoisingObjective, x0: Tensor, condition: dict[str, Any]) -> None:
    """Run encoder and network on clean examples, in eval mode, and forget what comes.

    Raises:
        Exception: Any, if they do not run on these.
    """
    model = objective.model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # running statistics stay
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            clean = CleanBatch(range(len(x0)), x0, condition)
            encoded = objective.encode(clean)
            x0, level_B = encoded.mean, torch.zeros(len(encoded.mean), dtype=torch.long)
            eps = torch.zeros_like(x0)
            objective.predict(
                objective.noise(x0, encoded.condition, level_B, eps, clean.indices, 0)
            )
    finally:
        for module, training in modes:
            module.training = training


class NetworkCallError(ValueError, RuntimeError):
    """An error of a network at its first call: of the data's form, or in its own code."""


def first_prediction(objective: DenoisingObjective, batch: NoisedBatch) -> Tensor:
    """The network's prediction, with an error that says what it was called with.

    Raises:
        NetworkCallError: If the network, or a function of it, does not take what it is given.
    """
    try:
        return objective.predict(batch)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except (TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        model = objective.model
        forward = inspect.signature(model.forward)
        given = {"x_t": batch.x_t, "timestep": batch.timestep_B, **dict(leaves(batch.condition))}
        told = " ".join(str(error).split())[:_LONGEST]
        raise NetworkCallError(
            f"The network cannot be called with the data ({type(error).__name__}: {told}). It is "
            f"{type(model).__name__}.forward{forward}, and was given "
            f"{', '.join(f'{name} {_form(value)}' for name, value in given.items())}. Name the "
            "data's entries as its arguments, in the form that it takes; pass model_kwargs= for "
            f"what is the same for all examples, or encode=.{_meant(batch, forward)}"
        ) from error


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype}".replace("torch.", "")
    return f"of type {type(value).__name__}"


def _meant(batch: NoisedBatch, forward: inspect.Signature) -> str:
    """A guess at the argument that an entry of another name is."""
    known = forward.parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return ""
    for name in batch.condition:
        close = difflib.get_close_matches(name, known, 1) if name not in known else []
        if close:
            return f" Did you mean '{close[0]}' by '{name}'?"
    return ""
