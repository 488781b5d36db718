"""Curvature of diffusion models as linear operators, and the influence scores that follow.

A plugin to ``curvlinops``, after Mlodozeniec et al., *Influence Functions for Scalable Data
Attribution in Diffusion Models*, ICLR 2025 (arXiv:2410.13850).
"""

from curvlinops_diffusion.curvature.ekfac import DiffusionEKFACLinearOperator
from curvlinops_diffusion.curvature.ggn import DiffusionGGNLinearOperator
from curvlinops_diffusion.curvature.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.curvature.load import load_operator
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.diffusion.latents import Encoded, LatentEncoder
from curvlinops_diffusion.diffusion.noise import NoiseProcess, PredictionType
from curvlinops_diffusion.diffusion.objective import DenoisingObjective
from curvlinops_diffusion.diffusion.random_numbers import ProbeType
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.diffusion.timesteps import (
    ListedTimesteps,
    LogitNormalTimesteps,
    StratifiedTimesteps,
    UniformTimesteps,
)
from curvlinops_diffusion.diffusion.weightings import (
    CosmapWeighting,
    EDMWeighting,
    InverseVarianceWeighting,
    MinSNRWeighting,
    ProcessWeighting,
)
from curvlinops_diffusion.influence.compression import Compression
from curvlinops_diffusion.influence.consumers import GradientConsumer, TopInfluences
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.measurements.base import (
    Example,
    ExampleDraws,
    ExampleFunction,
    ObjectiveMeasurement,
)
from curvlinops_diffusion.influence.measurements.bounds import ELBO, SimplifiedELBO
from curvlinops_diffusion.influence.measurements.likelihood import LogLikelihood
from curvlinops_diffusion.influence.measurements.losses import WeightedLoss, loss, squared_norm
from curvlinops_diffusion.influence.measurements.trajectories import (
    TrajectoryRegression,
    record_trajectories,
)
from curvlinops_diffusion.influence.scores import (
    group_and_self_influence,
    influence_scores,
    stream_gradients,
    top_influences,
)
from curvlinops_diffusion.influence.store import GradientStore
from curvlinops_diffusion.layers import LAYER_KINDS, ExactKind, SharingKind
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.solvers.conjugate_gradients import CGRefinedInverseLinearOperator
from curvlinops_diffusion.linalg.solvers.iterative import RefinedInverseLinearOperator, Refinement
from curvlinops_diffusion.linalg.solvers.neumann import NeumannRefinedInverseLinearOperator
from curvlinops_diffusion.linalg.solvers.nystrom import NystromInverseLinearOperator
from curvlinops_diffusion.linalg.solvers.woodbury import WoodburyInverseLinearOperator
from curvlinops_diffusion.runtime.passes import PassOptions

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
    "Encoded",
    "ExactKind",
    "Example",
    "ExampleDraws",
    "ExampleFunction",
    "ExampleGradientLinearOperator",
    "GradientConsumer",
    "GradientStore",
    "InverseVarianceWeighting",
    "LatentEncoder",
    "ListedTimesteps",
    "LogLikelihood",
    "LogitNormalTimesteps",
    "MinSNRWeighting",
    "NeumannRefinedInverseLinearOperator",
    "NoiseProcess",
    "NoisedBatch",
    "NoisedRegression",
    "NystromInverseLinearOperator",
    "ObjectiveMeasurement",
    "PassOptions",
    "PredictionType",
    "ProbeType",
    "ProcessWeighting",
    "RefinedInverseLinearOperator",
    "Refinement",
    "SharingKind",
    "SimplifiedELBO",
    "StratifiedTimesteps",
    "TopInfluences",
    "TrajectoryRegression",
    "UniformTimesteps",
    "WeightedLoss",
    "WoodburyInverseLinearOperator",
    "group_and_self_influence",
    "influence_scores",
    "load_operator",
    "loss",
    "record_trajectories",
    "squared_norm",
    "stream_gradients",
    "top_influences",
]
