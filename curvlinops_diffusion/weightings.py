"""Weightings of the loss by noise level."""

from curvlinops_diffusion.diffusion.weightings import (
    CosmapWeighting,
    DebiasedWeighting,
    EDMWeighting,
    InverseVarianceWeighting,
    MinSNRWeighting,
    PreconditionedWeighting,
    ProcessWeighting,
)

__all__ = [
    "CosmapWeighting",
    "DebiasedWeighting",
    "EDMWeighting",
    "InverseVarianceWeighting",
    "MinSNRWeighting",
    "PreconditionedWeighting",
    "ProcessWeighting",
]
