"""Schemes that choose the levels of an example's draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = (sqrt(5) - 1) / 2

#: A uniform number in ``[0, 1)`` for each example and draw.
Uniform = Callable[[int, int], float]


class _Distributed(ABC):
    """A scheme that draws levels from a distribution on ``[0, 1)``, from data to noise."""

    @abstractmethod
    def _points(self, uniform: Uniform, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        """Uniform points in ``[0, 1)``, shape ``[B]``."""

    def _quantile(self, points: np.ndarray) -> np.ndarray:
        """Points of the distribution for uniform ones."""
        return points

    def _cumulative(self, unit: float) -> float:
        """The probability of what lies below a point, whose inverse is :meth:`_quantile`."""
        return unit

    def levels(
        self,
        uniform: Uniform,
        n_B: np.ndarray,
        r: int,
        num_draws: int,
        num_levels: int,
        within: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Levels of draw ``r`` of ``num_draws``, shape ``[B]``, int64.

        Those of ``0 .. T-1``, or from the first of ``within`` to before the second.
        """
        lowest, end = within or (0, num_levels)
        below, up_to = (self._cumulative(level / num_levels) for level in (lowest, end))
        points = below + (up_to - below) * self._points(uniform, n_B, r, num_draws)
        levels = np.floor(self._quantile(points) * num_levels).astype(np.int64)
        return levels.clip(lowest, end - 1)  # a point may round to the end


@dataclass(frozen=True)
class StratifiedTimesteps(_Distributed):
    r"""Uniform timesteps, stratified over the draws of an example and over examples.

    Draw ``r`` of ``R`` lies in the ``r``-th of ``R`` equal parts of the schedule, at the position
    ``frac(n φ + U)`` within it, with the golden ratio ``φ`` and a uniform ``U`` shared by all
    examples. Every draw is marginally uniform within its part, so averages over the draws are
    unbiased; the positions of successive examples are a low-discrepancy sequence.
    """

    def _points(self, uniform: Uniform, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        return (r + (n_B * _GOLDEN + uniform(0, 0)) % 1.0) / num_draws


@dataclass(frozen=True)
class UniformTimesteps(_Distributed):
    """Independent uniform timesteps, as in training."""

    def _points(self, uniform: Uniform, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        return np.array([uniform(int(n), r) for n in n_B])


@dataclass(frozen=True)
class LogitNormalTimesteps(_Distributed):
    """Logit-normal timesteps: ``logit(u) ~ N(mean, std²)`` (Esser et al., 2024, Section 3.1).

    ``u`` runs from data to noise, as in the paper: a positive mean favours high noise.
    ``diffusers``' training scripts run it from noise to data, so their mean has the other sign.

    Attributes:
        mean: Mean of ``logit(u)``.
        std: Standard deviation of ``logit(u)``.
        stratified: Whether quantiles are stratified as in :class:`StratifiedTimesteps`.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = True

    def _points(self, uniform: Uniform, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        scheme = StratifiedTimesteps() if self.stratified else UniformTimesteps()
        return scheme._points(uniform, n_B, r, num_draws)

    def _quantile(self, points: np.ndarray) -> np.ndarray:
        quantiles = torch.from_numpy(points).clamp(min=torch.finfo(torch.float64).tiny)
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantiles)).numpy()

    def _cumulative(self, unit: float) -> float:
        logit = torch.logit(torch.tensor(unit, dtype=torch.float64))
        return float(torch.special.ndtr((logit - self.mean) / self.std))


@dataclass(frozen=True)
class TimestepsWithin:
    """Timesteps of another scheme within a range of noise levels: those of one expert.

    Where several networks share the noise levels (eDiff-I, Wan 2.2), each is a problem of its own:
    a draw reaches one of them, so the curvature of all has no entries between them.

    Source: Balaji et al., 2022, Section 4.

    Attributes:
        lowest: The lowest level, ``0 .. T-1`` in order of rising noise.
        end: The level behind the highest.
        scheme: How levels would be drawn from all.
    """

    lowest: int
    end: int
    scheme: StratifiedTimesteps | UniformTimesteps | LogitNormalTimesteps = field(
        default_factory=StratifiedTimesteps
    )

    def levels(
        self, uniform: Uniform, n_B: np.ndarray, r: int, num_draws: int, num_levels: int
    ) -> np.ndarray:
        """Levels of the range, shape ``[B]``, int64."""
        within = (self.lowest, self.end)
        return self.scheme.levels(uniform, n_B, r, num_draws, num_levels, within)


@dataclass(frozen=True)
class ListedTimesteps:
    """Listed levels, the same for every example: draw ``r`` takes the ``r``-th, cyclically.

    Attributes:
        levels: Noise levels, ``0 .. T-1`` in order of rising noise.
    """

    levels: tuple[int, ...]


TimestepScheme = (
    StratifiedTimesteps
    | UniformTimesteps
    | LogitNormalTimesteps
    | TimestepsWithin
    | ListedTimesteps
)
_NAMED_SCHEMES: dict[str, Callable[[int], TimestepScheme]] = {
    "stratified": lambda num_levels: StratifiedTimesteps(),
    "uniform": lambda num_levels: UniformTimesteps(),
    "logit-normal": lambda num_levels: LogitNormalTimesteps(),
    "all": lambda num_levels: ListedTimesteps(tuple(range(num_levels))),
}


def _named_scheme(text: str, num_levels: int) -> Any:
    """The scheme of a name, perhaps with two numbers; the text itself where it is of none."""
    name, *numbers = text.split(":")
    if name not in _NAMED_SCHEMES or len(numbers) not in (0, 2):
        return text
    scheme = _NAMED_SCHEMES[name](num_levels)
    if not numbers:
        return scheme
    try:
        if isinstance(scheme, LogitNormalTimesteps):
            mean, std = map(float, numbers)
            return LogitNormalTimesteps(mean, std) if std > 0 and isfinite(mean + std) else text
        if isinstance(scheme, StratifiedTimesteps | UniformTimesteps):
            return TimestepsWithin(int(numbers[0]), int(numbers[1]), scheme)
    except ValueError:
        pass
    return text


def timestep_scheme(timesteps: Any, num_levels: int) -> TimestepScheme:
    """Return the scheme that a user's ``timesteps`` names."""
    accepted = f"{', '.join(map(repr, _NAMED_SCHEMES))}, a sequence of levels, or a scheme"
    if isinstance(timesteps, str):
        timesteps = _named_scheme(timesteps, num_levels)
    if isinstance(timesteps, Sequence | Tensor | np.ndarray) and not isinstance(timesteps, str):
        timesteps = ListedTimesteps(tuple(int(level) for level in timesteps))
    if not isinstance(timesteps, TimestepScheme):
        raise ValueError(f"`timesteps` must be one of {accepted}, got {timesteps!r}.")
    if isinstance(timesteps, ListedTimesteps):
        wrong = [level for level in timesteps.levels if not 0 <= level < num_levels]
        if wrong or not timesteps.levels:
            raise ValueError(
                f"`timesteps` must list at least one level, from 0 to {num_levels - 1}, got "
                f"{len(timesteps.levels)} levels, of which {wrong[:8]} do not exist."
            )
    if isinstance(timesteps, TimestepsWithin):
        lowest, end = timesteps.lowest, timesteps.end
        if not 0 <= lowest < end <= num_levels:
            raise ValueError(
                f"`timesteps` must have 0 <= lowest < end <= {num_levels}, the number of noise "
                f"levels, got {timesteps}."
            )
    return timesteps
