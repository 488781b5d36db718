"""Draws are data: ``(seed, n, r) -> timestep, noise, loss vectors``.

Draw number ``r`` of example ``n`` is a pure function of ``(seed, n, r)``: it does not depend on
the batch size, the device, the number of workers, or any global random state, which is left
untouched. So a second pass sees the same noise, work can be split or resumed with the same result,
and two methods can be compared on common random numbers.

The functions are Philox counters (Salmon et al., 2011), whose key is ``(seed, stream)`` and whose
counter is ``(n, r, k)``; no state is carried from one draw to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvlinops_diffusion.diffusion.timesteps import (
    ListedTimesteps,
    StratifiedTimesteps,
    TimestepScheme,
    UniformTimesteps,
    timestep_scheme,
)
from curvlinops_diffusion.runtime.checks import check_count

_DEFAULT_NUM_DRAWS = 8


class ProbeType(str, Enum):
    """Distribution of the entries of a loss vector; both have mean zero and variance one.

    Attributes:
        RADEMACHER: ``'rademacher'``, ±1 with equal probability (less variance).
        GAUSSIAN: ``'gaussian'``, standard normal.
    """

    RADEMACHER = "rademacher"
    GAUSSIAN = "gaussian"


class _Stream(IntEnum):
    """Independent sequences of random numbers under one seed."""

    TIMESTEP = 0
    NOISE = 1
    PROBE = 2
    LATENT = 3
    CONDITION = 4
    AUGMENTATION = 5
    FUNCTION = 6
    OFFSET = 7
    PERTURBATION = 8
    POSITIONS = 9
    CAPTION = 11
    PLACE = 12


def _unit_probe(generator: np.random.Generator, size: int, probe_type: ProbeType) -> Tensor:
    """``size`` entries of mean zero and variance one, float32."""
    if probe_type is ProbeType.GAUSSIAN:
        return torch.from_numpy(generator.standard_normal(size, dtype=np.float32))
    bits = np.unpackbits(np.frombuffer(generator.bytes((size + 7) // 8), np.uint8), count=size)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


@dataclass(frozen=True)
class Draws:
    """The draws of a data set: levels, noise and loss vectors as functions of ``(n, r)``.

    Attributes:
        seed: The seed, ``0 <= seed < 2**64``.
        num_draws: The number ``R`` of draws for each example.
        num_levels: The number ``T`` of noise levels.
        timesteps: How levels are drawn.
        antithetic: Whether draws come in pairs ``(2p, 2p + 1)`` that differ in the sign of the
            noise alone. Each is distributed as before, so averages stay unbiased.
        part: ``(k, K)`` for the ``k``-th of ``K`` parts of ``K · num_draws`` draws: every ``K``-th
            pair or list of levels, so that a part is spread like the whole.
    """

    seed: int
    num_draws: int
    num_levels: int
    timesteps: TimestepScheme
    antithetic: bool = False
    part: tuple[int, int] = (0, 1)

    def divided(self, number: int, count: int) -> Draws:
        """One of ``count`` parts with equally many draws, of which these are the whole."""
        multiple = count * self.rounded_up(1)
        if self.num_draws % multiple or self.part != (0, 1):
            raise ValueError(
                f"`num_draws` must be a multiple of {multiple} to be divided into {count} parts, "
                f"got {self.num_draws}."
            )
        return replace(self, num_draws=self.num_draws // count, part=(number, count))

    @property
    def whole(self) -> Draws:
        """The draws of which these are a part."""
        return replace(self, num_draws=self.num_draws * self.part[1], part=(0, 1))

    def rounded_up(self, num_draws: int) -> int:
        """The least number of draws, not below this one, of whole pairs and lists of levels."""
        listed = len(self.timesteps.levels) if isinstance(self.timesteps, ListedTimesteps) else 1
        multiple = listed * self._copies
        return -(-num_draws // multiple) * multiple

    @property
    def uniform_levels(self) -> bool:
        """True if every noise level is drawn equally often on average."""
        if isinstance(self.timesteps, ListedTimesteps):
            counts = np.bincount(self.timesteps.levels, minlength=self.num_levels)
            return bool((counts == counts[0]).all())
        return isinstance(self.timesteps, StratifiedTimesteps | UniformTimesteps)

    @property
    def _copies(self) -> int:
        return 2 if self.antithetic else 1

    def _of_whole(self, r: int) -> int:
        """The number of a draw among those of the whole."""
        number, count = self.part
        block, within = divmod(r, self.rounded_up(1))
        return (block * count + number) * self.rounded_up(1) + within

    def _sampled(self, r: int) -> int:
        """The number of what both draws of a pair share."""
        return self._of_whole(r) // self._copies

    def _generator(
        self, stream: _Stream, n: int = 0, number: int = 0, k: int = 0
    ) -> np.random.Generator:
        """Random numbers at a key and counter, whose lowest word counts them."""
        philox = np.random.Philox(key=[self.seed, stream], counter=[0, k, number, n])
        return np.random.Generator(philox)

    def levels(self, n_B: Sequence[int], r: int) -> Tensor:
        """Noise level of draw ``r`` of the examples ``n_B``, shape ``[B]``, int64."""
        sampled = self._sampled(r)
        if isinstance(self.timesteps, ListedTimesteps):
            listed = self.timesteps.levels
            return torch.full((len(n_B),), listed[sampled % len(listed)], dtype=torch.int64)

        def uniform(n: int, number: int) -> float:
            return self._generator(_Stream.TIMESTEP, n, number).random()

        different = self.num_draws * self.part[1] // self._copies
        levels_B = self.timesteps.levels(
            uniform, np.asarray(n_B), sampled, different, self.num_levels
        )
        return torch.from_numpy(levels_B)

    def noise(self, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """Noise of draw ``r`` of the examples ``n_B``, shape ``[B, *shape]``.

        Always float32, so that models of every precision see the same noise.
        """
        return self._signed(_Stream.NOISE, n_B, r, shape)

    def noise_offset(self, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """One number for each channel of draw ``r``, ``[B, C, 1, …]``, signed as :meth:`noise`."""
        of_channels = (shape[0], *[1] * (len(shape) - 1))
        return self._signed(_Stream.OFFSET, n_B, r, of_channels)

    def perturbation(self, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """Noise of draw ``r`` that the input alone sees, ``[B, *shape]``, signed likewise."""
        return self._signed(_Stream.PERTURBATION, n_B, r, shape)

    def latent_noise(self, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """Draw what samples the latents of draw ``r``, ``[B, *shape]``; as :meth:`noise`."""
        return self._normal(_Stream.LATENT, n_B, self._sampled(r), shape)

    def dropped(self, n_B: Sequence[int], r: int, probability: float) -> Tensor:
        """Draw whether the condition of draw ``r`` is dropped, shape ``[B]``."""
        return torch.tensor(self._uniform(_Stream.CONDITION, n_B, r)) < probability

    def versions(self, n_B: Sequence[int], r: int, count: int) -> Tensor:
        """Draw which of ``count`` augmented versions each example is seen in, shape ``[B]``."""
        if count == 1:
            return torch.zeros(len(n_B), dtype=torch.int64)
        uniform = torch.tensor(self._uniform(_Stream.AUGMENTATION, n_B, r), dtype=torch.float64)
        return (uniform * count).long().clamp(max=count - 1)

    def places(self, n_B: Sequence[int], r: int) -> list[tuple[float, float]]:
        """Draw where the crop of each example lies, down and across, uniform in [0, 1)."""
        pairs = [self._generator(_Stream.PLACE, n, self._sampled(r)).random(2) for n in n_B]
        return [(float(down), float(across)) for down, across in pairs]

    def captions(self, n_B: Sequence[int], r: int) -> list[np.random.Generator]:
        """Random numbers by which each example's caption is varied."""
        return [self._generator(_Stream.CAPTION, n, self._sampled(r)) for n in n_B]

    def normal(self, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """Normal numbers for a user's function of the draws, ``[B, *shape]``; as :meth:`noise`."""
        return self._normal(_Stream.FUNCTION, n_B, self._of_whole(r), shape)

    def positions(self, n_B: Sequence[int], r: int, count: int, size: int) -> Tensor:
        """Draw ``count`` of ``size`` positions of each example, one of each of equal stretches.

        ``floor((j + u_j) size / count)`` for uniform ``u_j``: the expected number of times that a
        position is drawn is ``count / size``, for every one of them.

        Returns:
            Their numbers, rising, shape ``[B, count]``.
        """
        number = self._of_whole(r)
        uniform = [self._generator(_Stream.POSITIONS, n, number).random(count) for n in n_B]
        places = (np.stack(uniform) + np.arange(count)) * (size / count)
        return torch.from_numpy(places.astype(np.int64)).clamp_(max=size - 1)

    def probe(self, n_B: Sequence[int], r: int, k: int, size: int, probe_type: ProbeType) -> Tensor:
        """Loss vector ``k`` of draw ``r``: ``E[u uᵀ] = I``, shape ``[B, size]``."""
        of = [self._generator(_Stream.PROBE, n, self._of_whole(r), k) for n in n_B]
        return torch.stack([_unit_probe(generator, size, probe_type) for generator in of])

    def _uniform(self, stream: _Stream, n_B: Sequence[int], r: int) -> list[float]:
        """Numbers that both draws of a pair share."""
        return [self._generator(stream, n, self._sampled(r)).random() for n in n_B]

    def _signed(self, stream: _Stream, n_B: Sequence[int], r: int, shape: Sequence[int]) -> Tensor:
        """Normal numbers that both draws of a pair share but for the sign."""
        drawn = self._normal(stream, n_B, self._sampled(r), shape)
        return -drawn if self.antithetic and r % 2 else drawn

    def _normal(
        self, stream: _Stream, n_B: Sequence[int], number: int, shape: Sequence[int]
    ) -> Tensor:
        size = tuple(shape)
        # by NumPy alone, in whose functions other threads go on
        generators = [self._generator(stream, n, number) for n in n_B]
        return torch.from_numpy(
            np.stack([each.standard_normal(size, dtype=np.float32) for each in generators])
        )


def make_draws(
    timesteps: Any, num_draws: int | None, seed: int, num_levels: int, antithetic: bool = False
) -> Draws:
    """Check a user's choice of draws."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**64 - 1, got {seed!r}.")
    scheme = timestep_scheme(timesteps, num_levels)
    draws = Draws(seed, 1, num_levels, scheme, bool(antithetic))
    multiple = draws.rounded_up(1)
    if num_draws is None:
        listed = isinstance(scheme, ListedTimesteps)
        num_draws = multiple if listed else draws.rounded_up(_DEFAULT_NUM_DRAWS)
    if check_count("num_draws", num_draws) % multiple != 0:
        listed_levels = multiple // (2 if antithetic else 1)
        what = [f"{listed_levels} listed levels"] if listed_levels > 1 else []
        what += ["antithetic pairs"] if antithetic else []
        raise ValueError(
            f"`num_draws` must be a multiple of {multiple} with {' and '.join(what)}, got "
            f"{num_draws}."
        )
    return replace(draws, num_draws=num_draws)
