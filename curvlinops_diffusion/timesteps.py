"""Distributions of the timesteps that training draws."""

from curvlinops_diffusion.diffusion.timesteps import (
    ListedTimesteps,
    LogitNormalTimesteps,
    StratifiedTimesteps,
    TimestepsWithin,
    UniformTimesteps,
)

__all__ = [
    "ListedTimesteps",
    "LogitNormalTimesteps",
    "StratifiedTimesteps",
    "TimestepsWithin",
    "UniformTimesteps",
]
