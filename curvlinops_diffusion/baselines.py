"""Published attribution methods to compare with."""

from curvlinops_diffusion.influence.features import feature_regression_scores
from curvlinops_diffusion.influence.validation.baselines import (
    JourneyRegression,
    d_trak_scores,
    das_scores,
    trak_scores,
)

__all__ = [
    "JourneyRegression",
    "d_trak_scores",
    "das_scores",
    "feature_regression_scores",
    "trak_scores",
]
