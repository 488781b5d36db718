"""User-facing checks: every message says what arrived, what is accepted, and what to do."""

from enum import Enum
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor

E = TypeVar("E", bound=Enum)


def check_option(name: str, value: Any, options: type[E]) -> E:
    """Return the member of ``options`` that ``value`` names.

    Raises:
        ValueError: If ``value`` names none.
    """
    try:
        return options(value)
    except ValueError:
        accepted = ", ".join(repr(option.value) for option in options)
        raise ValueError(f"{name}={value!r} is unknown. Pass one of: {accepted}.") from None


def check_count(name: str, value: Any) -> int:
    """Return ``value`` if it is a whole number of at least one.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} arrived. Pass a whole number of at least 1.")
    return value


def check_non_negative(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and at least zero.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} arrived. Pass a finite number of at least 0.")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and above zero.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} arrived. Pass a finite number above 0.")
    return float(value)


def check_finite(tensor: Tensor, what: str) -> None:
    """Check that a computed quantity is finite.

    Raises:
        ValueError: If it is not; ``what`` says which quantity and layer.
    """
    if not torch.isfinite(tensor).all():
        check_finite_count(what, int((~torch.isfinite(tensor)).sum()), tensor.numel())


def check_finite_count(what: str, count: int, entries: int) -> None:
    """Check that of a computed quantity's entries none were found that are not finite.

    Raises:
        ValueError: If some were; ``what`` says which quantity and layer.
    """
    if count == 0:
        return
    raise ValueError(
        f"{what} has {count} entries that are NaN or infinite (of {entries}). Check the model's "
        "weights and the data; if the model runs in float16 or bfloat16, try float32."
    )
