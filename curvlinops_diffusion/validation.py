"""Validation of scores by retraining."""

from curvlinops_diffusion.influence.validation.judgements import (
    LinearDatamodellingScore,
    RemovalEffect,
    linear_datamodelling_score,
    removal_effects,
)
from curvlinops_diffusion.influence.validation.measured import values_of_networks
from curvlinops_diffusion.influence.validation.plans import RetrainingPlan

__all__ = [
    "LinearDatamodellingScore",
    "RemovalEffect",
    "RetrainingPlan",
    "linear_datamodelling_score",
    "removal_effects",
    "values_of_networks",
]
