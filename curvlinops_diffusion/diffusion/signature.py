"""The signature of a network: how it takes image and time."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor, nn

# names of an argument that is the time
_TIMES = {"t", "time", "times", "timestep", "timesteps", "sigma", "sigmas"}


@dataclass(frozen=True)
class Signature:
    """How a network takes image and time.

    Attributes:
        time_first: Whether the time comes first.
        time_name: By which name it is passed, if not by its place as the second argument.
        image_name: By which name the image is passed, if not by its place.
    """

    time_first: bool = False
    time_name: str | None = None
    image_name: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """That of a network, by the names of its arguments.

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
