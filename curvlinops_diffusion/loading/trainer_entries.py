"""Entries that a trainer leaves, the options that they decide, and the pipeline they are for."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

# families of pipelines, by what trainers call them, the first that is found
_FAMILIES = {
    r"sdxl|stable.diffusion.xl": "StableDiffusionXL",
    r"sd3|stable.diffusion.3": "StableDiffusion3",
    r"sd[12_]|sd.v[12]|stable.diffusion.(v|1|2)|^sd$": "StableDiffusion",
    r"flux.?2": "Flux2",
    r"flux": "Flux",
    r"chroma": "Chroma",
    r"lumina.?2": "Lumina2",
    r"qwen": "QwenImage",
    r"z.?image": "ZImage",
    r"sana": "Sana",
    r"pixart": "PixArt",
}


def family_of(name: str) -> str | None:
    """The beginning of the class of a trainer's base in diffusers; ``None`` if it is not known."""
    found = (kind for pattern, kind in _FAMILIES.items() if re.search(pattern, name.lower()))
    return next(found, None)


@dataclass(frozen=True)
class Base:
    """The pipeline that is attributed, as far as trainers' entries depend on it.

    Attributes:
        kind: The name of its class.
        scheduler: The config of its scheduler, with the class as ``_class_name``.
        guided: Whether its network is shown a guidance scale.
        name: Where it was loaded from.
    """

    kind: str
    scheduler: Mapping[str, Any]
    guided: bool = False
    name: str = ""

    @property
    def flow(self) -> bool:
        """True if it is of flow matching."""
        return "FlowMatch" in str(self.scheduler.get("_class_name", ""))

    @property
    def family(self) -> str | None:
        """The beginning of the name of its class."""
        found = (kind for kind in _FAMILIES.values() if self.kind.startswith(kind))
        return next(found, None)

    @property
    def prediction_type(self) -> str:
        """The quantity that its network regresses, by its scheduler."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def shift(self) -> float:
        """The shift of its levels as training draws them: dynamic ones are of sampling alone."""
        dynamic = self.scheduler.get("use_dynamic_shifting", False)
        return 1.0 if dynamic else float(self.scheduler.get("shift", 1.0))


@dataclass(frozen=True)
class Setting:
    """The meaning of an entry of a trainer.

    Attributes:
        entry: Its name and value, as the trainer has them.
        option: The option that it decides; ``training_arguments.…`` for one of these.
        value: The option's value; ``None``, zero or false for that without the option.
        usual: The value without the option, by the base.
        refused: A change of the objective that no option expresses.
        note: A sentence for people.
        of_data: Whether a file that lists the images would say it as well.
    """

    entry: str
    option: str = ""
    value: Any = None
    usual: Any = None
    refused: str = ""
    note: str = ""
    of_data: bool = False


# values of entries that say of a choice that it is the plain one
_PLAIN = ("none", "l2", "mse", "balanced", "raw", ",")


@dataclass(frozen=True)
class Entries:
    """The entries of a trainer by name, which are read as plain values."""

    values: Mapping[str, Any]
    source: str = ""

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:
        """Read the value of an entry; of text, what it spells."""
        value = plain(self.values.get(name))
        return default if value is None else value

    def table(self, name: str) -> Entries:
        """Read the entries of a table among these; none where it is no table."""
        found = self.get(name)
        return Entries(found if isinstance(found, Mapping) else {}, self.source)

    def number(self, name: str, default: float = 0.0) -> float:
        """Read a number; ValueError if it is none."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(
                f"'{self.source}' holds {name}={self.values.get(name)!r}, which must be a finite "
                "number. Pass `recipe='none'`, and what training did by the options."
            )
        return float(value)

    def sets(
        self, name: str, option: str, value: Any, usual: Any = None, refused: str = ""
    ) -> Iterator[Setting]:
        """Decide an option by an entry that is there."""
        if name in self:
            yield Setting(self.shown(name), option, value, usual, refused)

    def decides(self, **options: str) -> Iterator[Setting]:
        """Decide options by numbers."""
        for name, option in options.items():
            yield from self.sets(name, option, self.number(name))

    def refuses(self, does: str, *names: str) -> Iterator[Setting]:
        """Refuse entries that no option expresses, where they say anything but the plain."""
        for name in names:
            if self.get(name) and self.get(name) not in _PLAIN:
                yield Setting(self.shown(name), refused=does)

    def notes(self, name: str, text: str) -> Iterator[Setting]:
        """Note an entry that people should know of."""
        if self.get(name):
            yield Setting(self.shown(name), note=text)

    def shown(self, name: str) -> str:
        """An entry as messages have it."""
        text = str(self.values.get(name))
        return f"{name}={text if len(text) <= 60 else text[:57] + '…'}"


def plain(value: Any) -> Any:
    """Read a text as JSON or Python; one that is neither, and any other value, as it is."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return value or None
