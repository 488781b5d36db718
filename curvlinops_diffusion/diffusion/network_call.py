"""Calls of a network: its arguments, under which conditions, and what it may return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvlinops_diffusion.diffusion.batch import mapped
from curvlinops_diffusion.runtime.checks import plain_tensor
from curvlinops_diffusion.runtime.modes import (
    derivative_gradients,
    eager,
    replaced_parameters,
    special_tables,
    without_checkpoints,
    without_fast_path,
)
from curvlinops_diffusion.runtime.processes import lost_processes_named
from curvlinops_diffusion.runtime.sharded_networks import reshard

# names of an argument that is the time
_TIMES = {"t", "time", "times", "timestep", "timesteps", "sigma", "sigmas"}

#: Further keyword arguments of a network, or a function of (``x_t``, condition) that returns them.
ModelKwargs = Mapping[str, Any] | Callable[[Tensor, dict[str, Any]], Any]


class NetworkCall:
    """Calls a network as its derivatives need it.

    Attributes:
        model_kwargs: The further arguments, without graphs.
    """

    def __init__(self, model: nn.Module, model_kwargs: ModelKwargs, autocast: torch.dtype | None):
        self._model = model
        self.model_kwargs = _plain_arguments(model_kwargs)
        self._autocast = autocast
        self._tables = special_tables(model)
        self._signature = _Signature.of(model)

    def __call__(
        self,
        x_t: Tensor,
        timestep_B: Tensor,
        condition: dict[str, Any],
        params: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The prediction from noised examples ``[B, ...]``, times and condition, ``[B, D]``."""
        static = self.model_kwargs
        if callable(static):
            static = _plain_arguments(static(x_t, condition))
        args, named = self._signature.arguments(x_t, timestep_B)
        kwargs = {**condition, **static, **named}
        precision, on = self._autocast, self._autocast is not None
        # a cache of weights would outlive a change of parameters
        with (
            torch.autocast(x_t.device.type, precision, enabled=on, cache_enabled=False),
            eager(),
            without_fast_path(),
            derivative_gradients(self._tables),
        ):
            if params is None:
                with lost_processes_named():  # of a network that is divided among processes
                    output = self._model(*args, **kwargs)
                reshard(self._model)
            else:
                if isinstance(self._model, torch.jit.ScriptModule):
                    raise ValueError(
                        "The model is a TorchScript module, whose parameters cannot be replaced by "
                        "others, as these derivatives need. Pass the module that it was made from."
                    )
                with without_checkpoints(self._model):
                    values = replaced_parameters(self._model, params)
                    output = functional_call(self._model, values, args, kwargs, tie_weights=False)
        return _flattened(output, x_t.shape)


def _flattened(output: Any, shape: torch.Size) -> Tensor:
    """The prediction within what a network returned for an input of some shape, ``[B, D]``."""
    if not isinstance(output, Tensor):
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise ValueError(
            "The model must return a tensor, a tuple that starts with one, or an object with "
            f".sample, got {type(output).__name__}."
        )
    if output.ndim == len(shape) > 1 and output.shape[1] == 2 * shape[1]:
        output = output[:, : shape[1]]  # the rest is a learned variance
    if output.shape != shape:
        raise ValueError(
            f"The model must return the shape of its input, {tuple(shape)}, or twice its channels "
            f"if a variance is predicted, too, got {tuple(output.shape)}."
        )
    return output.flatten(1)


def _plain_arguments(given: Any) -> Any:
    """Arguments that are the same for all examples, without graphs; functions as they are."""
    if callable(given):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(
            "`model_kwargs` must be a dict of keyword arguments of the network, or a function of "
            f"(x_t, condition) that returns one, got {type(given).__name__}."
        )
    return mapped(
        lambda z: plain_tensor(z, "A tensor of model_kwargs") if isinstance(z, Tensor) else z, given
    )


@dataclass(frozen=True)
class _Signature:
    """Names and places of image and time among a network's arguments."""

    time_first: bool = False
    time_name: str | None = None  # by which it is passed, if not as the second argument
    image_name: str | None = None  # by which it is passed, if not by its place

    @classmethod
    def of(cls, model: nn.Module) -> _Signature:
        """Read it off the names of a network's arguments.

        What only hands arguments on to a single module within has the signature of that.
        """
        parameters = list(inspect.signature(model.forward).parameters.values())
        known = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        within = list(model.children())
        if not known and len(within) == 1:
            return cls.of(within[0])
        times = [n for n, p in enumerate(known) if p.name in _TIMES]
        images = [p for n, p in enumerate(known) if n not in times]
        by_place = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        only_named = bool(images) and images[0].kind is images[0].KEYWORD_ONLY and not by_place
        image_name = images[0].name if only_named else None
        if not times:
            return cls(image_name=image_name)
        place = next((n for n in times if known[n].name == "timestep" and 0 not in times), times[0])
        time = known[place]
        by_name = time.kind is time.KEYWORD_ONLY or place > 1 or time.name == "timestep"
        if place == 0 and time.kind is not time.KEYWORD_ONLY:
            return cls(time_first=True, image_name=image_name)
        return cls(time_name=time.name if by_name else None, image_name=image_name)

    def arguments(
        self, x_t: Tensor, timestep_B: Tensor
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional arguments, and those by name."""
        named = {} if self.image_name is None else {self.image_name: x_t}
        args = (x_t,) if self.image_name is None else ()
        if self.time_name is not None:
            return args, named | {self.time_name: timestep_B}
        return ((timestep_B, *args) if self.time_first else (*args, timestep_B)), named
