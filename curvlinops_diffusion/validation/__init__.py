"""Validation of scores: by retraining, and by checks without."""

from curvlinops_diffusion.influence.validation.checks import Check
from curvlinops_diffusion.influence.validation.judgements import (
    LinearDatamodellingScore,
    RemovalEffect,
    linear_datamodelling_score,
    removal_effects,
    values_of_networks,
)
from curvlinops_diffusion.influence.validation.plans import RetrainingPlan
from curvlinops_diffusion.validation.checking import CheckResult, check

__all__ = [
    "Check",
    "CheckResult",
    "LinearDatamodellingScore",
    "RemovalEffect",
    "RetrainingPlan",
    "check",
    "linear_datamodelling_score",
    "removal_effects",
    "values_of_networks",
]
