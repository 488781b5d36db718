"""Quantities of a query that influence is of: the loss, bounds of the likelihood, trajectories."""

from curvlinops_diffusion.influence.measurements.base import (
    Example,
    ExampleDraws,
    ExampleFunction,
    ObjectiveMeasurement,
)
from curvlinops_diffusion.influence.measurements.bounds import ELBO, SimplifiedELBO
from curvlinops_diffusion.influence.measurements.likelihood import LogLikelihood
from curvlinops_diffusion.influence.measurements.losses import (
    SignedPrediction,
    WeightedLoss,
    loss,
    squared_norm,
)
from curvlinops_diffusion.influence.measurements.trajectories import (
    TrajectoryRegression,
    record_trajectories,
)

__all__ = [
    "ELBO",
    "Example",
    "ExampleDraws",
    "ExampleFunction",
    "LogLikelihood",
    "ObjectiveMeasurement",
    "SignedPrediction",
    "SimplifiedELBO",
    "TrajectoryRegression",
    "WeightedLoss",
    "loss",
    "record_trajectories",
    "squared_norm",
]
