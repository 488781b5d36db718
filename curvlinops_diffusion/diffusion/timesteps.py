"""Schemes that choose the levels of an example's draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.random_numbers import _generator, _Stream

_GOLDEN = (sqrt(5) - 1) / 2


@dataclass(frozen=True)
class StratifiedTimesteps:
    r"""Uniform timesteps, stratified over the draws of an example and over examples.

    Draw ``r`` of ``R`` lies in the ``r``-th of ``R`` equal parts of the schedule, at the position
    ``frac(n φ + U)`` within it, with the golden ratio ``φ`` and a uniform ``U`` shared by all
    examples. Every draw is marginally uniform within its part, so averages over the draws are
    unbiased; the positions of successive examples are a low-discrepancy sequence.
    """

    def unit_interval(self, seed: int, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        """Points in ``[0, 1)``, shape ``[B]``."""
        offset = _generator(seed, _Stream.TIMESTEP).random()
        return (r + (n_B * _GOLDEN + offset) % 1.0) / num_draws


@dataclass(frozen=True)
class UniformTimesteps:
    """Independent uniform timesteps, as in training."""

    def unit_interval(self, seed: int, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        """Points in ``[0, 1)``, shape ``[B]``."""
        return np.array([_generator(seed, _Stream.TIMESTEP, int(n), r).random() for n in n_B])


@dataclass(frozen=True)
class LogitNormalTimesteps:
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

    def unit_interval(self, seed: int, n_B: np.ndarray, r: int, num_draws: int) -> np.ndarray:
        """Points in ``[0, 1)``, shape ``[B]``."""
        scheme = StratifiedTimesteps() if self.stratified else UniformTimesteps()
        quantile = torch.from_numpy(scheme.unit_interval(seed, n_B, r, num_draws))
        normal = torch.special.ndtri(quantile.clamp(min=torch.finfo(torch.float64).tiny))
        return torch.sigmoid(self.mean + self.std * normal).numpy()


@dataclass(frozen=True)
class ListedTimesteps:
    """The same levels for every example: draw ``r`` takes the ``r``-th of a list, cyclically.

    Attributes:
        levels: Noise levels, ``0 .. T-1`` in order of rising noise.
    """

    levels: tuple[int, ...]


TimestepScheme = StratifiedTimesteps | UniformTimesteps | LogitNormalTimesteps | ListedTimesteps
_NAMED_SCHEMES: dict[str, Callable[[int], TimestepScheme]] = {
    "stratified": lambda num_levels: StratifiedTimesteps(),
    "uniform": lambda num_levels: UniformTimesteps(),
    "logit-normal": lambda num_levels: LogitNormalTimesteps(),
    "all": lambda num_levels: ListedTimesteps(tuple(range(num_levels))),
}


def timestep_scheme(timesteps: Any, num_levels: int) -> TimestepScheme:
    """Return the scheme that a user's ``timesteps`` argument names.

    Args:
        timesteps: ``'stratified'``, ``'uniform'``, ``'logit-normal'``, ``'all'`` (every level
            once), a sequence of levels, or a scheme.
        num_levels: The number of noise levels.

    Raises:
        ValueError: If it is none of these, or a listed level does not exist.
    """
    accepted = f"{', '.join(map(repr, _NAMED_SCHEMES))}, a sequence of levels, or a scheme"
    if isinstance(timesteps, str):
        if timesteps not in _NAMED_SCHEMES:
            raise ValueError(f"timesteps={timesteps!r} is unknown. Pass one of: {accepted}.")
        return _NAMED_SCHEMES[timesteps](num_levels)
    if isinstance(timesteps, Sequence | Tensor | np.ndarray | range):
        timesteps = ListedTimesteps(tuple(int(level) for level in timesteps))
    if not isinstance(timesteps, TimestepScheme):
        raise ValueError(
            f"timesteps arrived as {type(timesteps).__name__}. Pass one of: {accepted}."
        )
    if isinstance(timesteps, ListedTimesteps):
        wrong = [level for level in timesteps.levels if not 0 <= level < num_levels]
        if wrong or not timesteps.levels:
            raise ValueError(
                f"timesteps lists {len(timesteps.levels)} levels, of which {wrong[:8]} do not "
                f"exist. List at least one level, from 0 to {num_levels - 1}."
            )
    return timesteps
