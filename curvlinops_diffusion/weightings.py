"""Weightings of the loss by noise level."""

from curvlinops_diffusion.diffusion.weightings import (
    CosmapWeighting,
    EDMWeighting,
    InverseVarianceWeighting,
    MinSNRWeighting,
    PreconditionedWeighting,
    ProcessWeighting,
)

__all__ = [
    "CosmapWeighting",
    "EDMWeighting",
    "InverseVarianceWeighting",
    "MinSNRWeighting",
    "PreconditionedWeighting",
    "ProcessWeighting",
]
