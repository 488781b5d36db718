"""Arguments of training as they are written on the command line, and as they are reported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def parse_arguments(texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse ``name=value``, whose values are numbers, ``true``, ``null``, lists, or plain text.

    Raises:
        ValueError: If one has no name, or a name is repeated.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = str(text).partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or name in found:
            raise ValueError(
                f"--training-arguments got '{text}'. Pass each as name=value, once, for instance "
                "max_sequence_length=77 guidance_scale=3.5."
            )
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """A line for people, which can be passed to the program as it is."""
    pairs = (f"{name}={json.dumps(value)}" for name, value in arguments.items())
    return "Training gave the network " + " ".join(pairs)
