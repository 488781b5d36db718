"""Curvature of diffusion models as linear operators, and the influence scores that follow.

A plugin to ``curvlinops``, after Mlodozeniec et al., *Influence Functions for Scalable Data
Attribution in Diffusion Models*, ICLR 2025 (arXiv:2410.13850).
"""

from curvlinops_diffusion.compression import Compression
from curvlinops_diffusion.consumers import GradientConsumer, TopInfluences
from curvlinops_diffusion.encoding import LatentEncoder
from curvlinops_diffusion.functions import Example, ExampleDraws, ExampleFunction
from curvlinops_diffusion.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence import (
    group_and_self_influence,
    influence_scores,
    stream_gradients,
    top_influences,
)
from curvlinops_diffusion.layers import LAYER_KINDS, ExactKind, SharingKind
from curvlinops_diffusion.measurements import ELBO, SimplifiedELBO, WeightedLoss
from curvlinops_diffusion.noise import (
    CosmapWeighting,
    EDMWeighting,
    InverseVarianceWeighting,
    MinSNRWeighting,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.nystrom import NystromInverseLinearOperator
from curvlinops_diffusion.objective import DenoisingObjective
from curvlinops_diffusion.operators.base import BlockDiagonalLinearOperator
from curvlinops_diffusion.operators.ekfac import DiffusionEKFACLinearOperator
from curvlinops_diffusion.operators.ggn import DiffusionGGNLinearOperator
from curvlinops_diffusion.operators.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.operators.load import load_operator
from curvlinops_diffusion.passes import PassOptions
from curvlinops_diffusion.probability_flow import LogLikelihood
from curvlinops_diffusion.refine import (
    CGRefinedInverseLinearOperator,
    NeumannRefinedInverseLinearOperator,
    RefinedInverseLinearOperator,
)
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.store import GradientStore
from curvlinops_diffusion.trajectories import TrajectoryRegression, record_trajectories
from curvlinops_diffusion.woodbury import WoodburyInverseLinearOperator

__all__ = [
    "ELBO",
    "LAYER_KINDS",
    "BlockDiagonalLinearOperator",
    "CGRefinedInverseLinearOperator",
    "Compression",
    "CosmapWeighting",
    "DenoisingObjective",
    "DiffusionEKFACLinearOperator",
    "DiffusionGGNLinearOperator",
    "DiffusionKFACLinearOperator",
    "EDMWeighting",
    "ExactKind",
    "Example",
    "ExampleDraws",
    "ExampleFunction",
    "ExampleGradientLinearOperator",
    "GradientConsumer",
    "GradientStore",
    "InverseVarianceWeighting",
    "LatentEncoder",
    "LogLikelihood",
    "MinSNRWeighting",
    "NeumannRefinedInverseLinearOperator",
    "NoiseProcess",
    "NoisedRegression",
    "NystromInverseLinearOperator",
    "PassOptions",
    "PredictionType",
    "RefinedInverseLinearOperator",
    "SharingKind",
    "SimplifiedELBO",
    "TopInfluences",
    "TrajectoryRegression",
    "WeightedLoss",
    "WoodburyInverseLinearOperator",
    "group_and_self_influence",
    "influence_scores",
    "load_operator",
    "record_trajectories",
    "stream_gradients",
    "top_influences",
]
