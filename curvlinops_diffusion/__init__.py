"""Curvature of diffusion models as linear operators, and the influence scores that follow.

A plugin to ``curvlinops``, after Mlodozeniec et al., *Influence Functions for Scalable Data
Attribution in Diffusion Models*, ICLR 2025 (arXiv:2410.13850).

A name is imported when it is first asked for, so that the program starts without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what follows below, as type checkers read it
    from curvlinops_diffusion.attribution import Attribution
    from curvlinops_diffusion.attributor import Attributor
    from curvlinops_diffusion.curvature.ekfac import DiffusionEKFACLinearOperator
    from curvlinops_diffusion.curvature.ggn import DiffusionGGNLinearOperator
    from curvlinops_diffusion.curvature.kfac import DiffusionKFACLinearOperator
    from curvlinops_diffusion.curvature.load import load_operator
    from curvlinops_diffusion.diffusion.batch import NoisedBatch
    from curvlinops_diffusion.diffusion.draws import ProbeType
    from curvlinops_diffusion.diffusion.latents import Encoded, LatentEncoder
    from curvlinops_diffusion.diffusion.noise import NoiseProcess, PredictionType
    from curvlinops_diffusion.diffusion.objective import DenoisingObjective
    from curvlinops_diffusion.diffusion.regression import NoisedRegression
    from curvlinops_diffusion.diffusion.timesteps import (
        ListedTimesteps,
        LogitNormalTimesteps,
        StratifiedTimesteps,
        TimestepsWithin,
        UniformTimesteps,
    )
    from curvlinops_diffusion.diffusion.weightings import (
        CosmapWeighting,
        EDMWeighting,
        InverseVarianceWeighting,
        MinSNRWeighting,
        PreconditionedWeighting,
        ProcessWeighting,
    )
    from curvlinops_diffusion.influence.compression import Compression
    from curvlinops_diffusion.influence.consumers import GradientConsumer, TopInfluences
    from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
    from curvlinops_diffusion.influence.kernel_regression import (
        averaged_scores,
        kernel_regression_scores,
    )
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
    from curvlinops_diffusion.influence.parts import (
        influence_scores_by_layer,
    )
    from curvlinops_diffusion.influence.projection import RandomProjection
    from curvlinops_diffusion.influence.regression import regression_scores
    from curvlinops_diffusion.influence.scores import (
        group_influence_scores,
        influence_scores,
        self_influence_scores,
        stream_gradients,
        top_influences,
    )
    from curvlinops_diffusion.influence.split_half import SplitHalfScores, split_half_scores
    from curvlinops_diffusion.influence.store import GradientStore
    from curvlinops_diffusion.influence.stored_scores import StoredScores
    from curvlinops_diffusion.influence.validation.baselines import (
        JourneyRegression,
        d_trak_scores,
        das_scores,
        trak_scores,
    )
    from curvlinops_diffusion.influence.validation.judgements import (
        LinearDatamodellingScore,
        RemovalEffect,
        linear_datamodelling_score,
        removal_effects,
    )
    from curvlinops_diffusion.influence.validation.measured import values_of_networks
    from curvlinops_diffusion.influence.validation.plans import RetrainingPlan
    from curvlinops_diffusion.layers import LAYER_KINDS, ExactKind, SharingKind
    from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
    from curvlinops_diffusion.linalg.solvers.conjugate_gradients import (
        CGRefinedInverseLinearOperator,
    )
    from curvlinops_diffusion.linalg.solvers.iterative import (
        RefinedInverseLinearOperator,
        Refinement,
    )
    from curvlinops_diffusion.runtime.passes import PassOptions

__all__ = [
    "ELBO",
    "LAYER_KINDS",
    "Attribution",
    "Attributor",
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
    "JourneyRegression",
    "LatentEncoder",
    "LinearDatamodellingScore",
    "ListedTimesteps",
    "LogLikelihood",
    "LogitNormalTimesteps",
    "MinSNRWeighting",
    "NoiseProcess",
    "NoisedBatch",
    "NoisedRegression",
    "ObjectiveMeasurement",
    "PassOptions",
    "PreconditionedWeighting",
    "PredictionType",
    "ProbeType",
    "ProcessWeighting",
    "RandomProjection",
    "RefinedInverseLinearOperator",
    "Refinement",
    "RemovalEffect",
    "RetrainingPlan",
    "SharingKind",
    "SignedPrediction",
    "SimplifiedELBO",
    "SplitHalfScores",
    "StoredScores",
    "StratifiedTimesteps",
    "TimestepsWithin",
    "TopInfluences",
    "TrajectoryRegression",
    "UniformTimesteps",
    "WeightedLoss",
    "averaged_scores",
    "d_trak_scores",
    "das_scores",
    "group_influence_scores",
    "influence_scores",
    "influence_scores_by_layer",
    "kernel_regression_scores",
    "linear_datamodelling_score",
    "load_operator",
    "loss",
    "record_trajectories",
    "regression_scores",
    "removal_effects",
    "self_influence_scores",
    "split_half_scores",
    "squared_norm",
    "stream_gradients",
    "top_influences",
    "trak_scores",
    "values_of_networks",
]

# where each name is; tests/test_imports.py compares the three lists
_MODULES = {
    "ELBO": "influence.measurements.bounds",
    "LAYER_KINDS": "layers",
    "Attribution": "attribution",
    "Attributor": "attributor",
    "BlockDiagonalLinearOperator": "linalg.block_diagonal",
    "CGRefinedInverseLinearOperator": "linalg.solvers.conjugate_gradients",
    "Compression": "influence.compression",
    "CosmapWeighting": "diffusion.weightings",
    "DenoisingObjective": "diffusion.objective",
    "DiffusionEKFACLinearOperator": "curvature.ekfac",
    "DiffusionGGNLinearOperator": "curvature.ggn",
    "DiffusionKFACLinearOperator": "curvature.kfac",
    "EDMWeighting": "diffusion.weightings",
    "Encoded": "diffusion.latents",
    "ExactKind": "layers",
    "Example": "influence.measurements.base",
    "ExampleDraws": "influence.measurements.base",
    "ExampleFunction": "influence.measurements.base",
    "ExampleGradientLinearOperator": "influence.gradients",
    "GradientConsumer": "influence.consumers",
    "GradientStore": "influence.store",
    "InverseVarianceWeighting": "diffusion.weightings",
    "JourneyRegression": "influence.validation.baselines",
    "LatentEncoder": "diffusion.latents",
    "LinearDatamodellingScore": "influence.validation.judgements",
    "ListedTimesteps": "diffusion.timesteps",
    "LogLikelihood": "influence.measurements.likelihood",
    "LogitNormalTimesteps": "diffusion.timesteps",
    "MinSNRWeighting": "diffusion.weightings",
    "NoiseProcess": "diffusion.noise",
    "NoisedBatch": "diffusion.batch",
    "NoisedRegression": "diffusion.regression",
    "ObjectiveMeasurement": "influence.measurements.base",
    "PassOptions": "runtime.passes",
    "PreconditionedWeighting": "diffusion.weightings",
    "PredictionType": "diffusion.noise",
    "ProbeType": "diffusion.draws",
    "ProcessWeighting": "diffusion.weightings",
    "RandomProjection": "influence.projection",
    "RefinedInverseLinearOperator": "linalg.solvers.iterative",
    "Refinement": "linalg.solvers.iterative",
    "RemovalEffect": "influence.validation.judgements",
    "RetrainingPlan": "influence.validation.plans",
    "SharingKind": "layers",
    "SignedPrediction": "influence.measurements.losses",
    "SimplifiedELBO": "influence.measurements.bounds",
    "SplitHalfScores": "influence.split_half",
    "StoredScores": "influence.stored_scores",
    "StratifiedTimesteps": "diffusion.timesteps",
    "TimestepsWithin": "diffusion.timesteps",
    "TopInfluences": "influence.consumers",
    "TrajectoryRegression": "influence.measurements.trajectories",
    "UniformTimesteps": "diffusion.timesteps",
    "WeightedLoss": "influence.measurements.losses",
    "averaged_scores": "influence.kernel_regression",
    "d_trak_scores": "influence.validation.baselines",
    "das_scores": "influence.validation.baselines",
    "group_influence_scores": "influence.scores",
    "influence_scores": "influence.scores",
    "influence_scores_by_layer": "influence.parts",
    "kernel_regression_scores": "influence.kernel_regression",
    "linear_datamodelling_score": "influence.validation.judgements",
    "load_operator": "curvature.load",
    "loss": "influence.measurements.losses",
    "record_trajectories": "influence.measurements.trajectories",
    "regression_scores": "influence.regression",
    "removal_effects": "influence.validation.judgements",
    "self_influence_scores": "influence.scores",
    "split_half_scores": "influence.split_half",
    "squared_norm": "influence.measurements.losses",
    "stream_gradients": "influence.scores",
    "top_influences": "influence.scores",
    "trak_scores": "influence.validation.baselines",
    "values_of_networks": "influence.validation.measured",
}


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    """Public names, too, that have not been imported yet."""
    return sorted({*globals(), *__all__})
