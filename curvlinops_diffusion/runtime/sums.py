"""Running sums: what a pass accumulates, as named tensors to write, add up and restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor


class Running(Protocol):
    """Sums over the batches so far."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name; a name is missing while nothing was added to it."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a state returned by :meth:`tensors`."""


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put ``prefix/`` before the names."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names start with ``prefix/``, by the rest of the names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): z for n, z in tensors.items() if n.startswith(start)}


class Sums:
    """Running sums of tensors by name; zero for what was never added to."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, key: str, value: Tensor) -> None:
        """Add to a sum; the value may be kept, and must not be changed later."""
        if key in self._sums:
            self._sums[key] += value
        else:
            self._sums[key] = value

    def pop_all(self) -> list[tuple[str, Tensor]]:
        """Return the sums, which start anew."""
        sums, self._sums = self._sums, {}
        return list(sums.items())

    def take_mean(self, key: str, count: int, otherwise: Callable[[], Tensor]) -> Tensor:
        """Return the sum over ``count``, or ``otherwise`` where nothing was added.

        The sum is given away, so that it is never held beside the mean.
        """
        return self._sums.pop(key).div_(count) if key in self._sums else otherwise()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return dict(self._sums)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from sums by name."""
        self._sums = dict(tensors)


class CompositeSums:
    """Several running sums, by name, as one."""

    def __init__(self, parts: Mapping[str, Running]):
        self._parts = parts

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums of all parts."""
        each = [prefixed(name, part.tensors()) for name, part in self._parts.items()]
        return {name: z for tensors in each for name, z in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from sums of all parts."""
        for name, part in self._parts.items():
            part.restore(within(name, tensors))
