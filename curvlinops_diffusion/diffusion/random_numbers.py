"""Random numbers as functions of seed, example and draw."""

from __future__ import annotations

from enum import Enum, IntEnum

import numpy as np


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
    SIGNS = 10


def _generator(
    seed: int, stream: _Stream, n: int = 0, r: int = 0, k: int = 0
) -> np.random.Generator:
    """The random numbers at a key and counter; the counter's lowest word counts the numbers."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, k, r, n]))


def _unit_probe(generator: np.random.Generator, size: int, probe_type: ProbeType) -> np.ndarray:
    """``size`` entries of mean zero and variance one, float32."""
    if probe_type is ProbeType.GAUSSIAN:
        return generator.standard_normal(size, dtype=np.float32)
    bits = np.unpackbits(np.frombuffer(generator.bytes((size + 7) // 8), np.uint8), count=size)
    return bits.astype(np.float32) * 2 - 1
