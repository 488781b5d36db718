"""The public names of the package's root, which ``lazy_loader`` reads."""

from . import (
    baselines as baselines,
)
from . import (
    layers as layers,
)
from . import (
    measurements as measurements,
)
from . import (
    timesteps as timesteps,
)
from . import (
    validation as validation,
)
from . import (
    weightings as weightings,
)
from .attribution import Attribution as Attribution
from .attributor import Attributor as Attributor
from .curvature.ggn import DiffusionGGNLinearOperator as DiffusionGGNLinearOperator
from .curvature.kfac import DiffusionEKFACLinearOperator as DiffusionEKFACLinearOperator
from .curvature.kfac import DiffusionKFACLinearOperator as DiffusionKFACLinearOperator
from .curvature.load import load_operator as load_operator
from .diffusion.batch import NoisedBatch as NoisedBatch
from .diffusion.draws import ProbeType as ProbeType
from .diffusion.latents import Encoded as Encoded
from .diffusion.latents import LatentEncoder as LatentEncoder
from .diffusion.noise import NoiseProcess as NoiseProcess
from .diffusion.noise import PredictionType as PredictionType
from .diffusion.objective import DenoisingObjective as DenoisingObjective
from .diffusion.regression import NoisedRegression as NoisedRegression
from .influence.agreement import SplitHalfScores as SplitHalfScores
from .influence.compression import Compression as Compression
from .influence.compression import RandomProjection as RandomProjection
from .influence.consumers import (
    GradientConsumer as GradientConsumer,
)
from .influence.consumers import (
    TopInfluences as TopInfluences,
)
from .influence.gradients import ExampleGradientLinearOperator as ExampleGradientLinearOperator
from .influence.kernel_regression import (
    averaged_scores as averaged_scores,
)
from .influence.kernel_regression import (
    kernel_regression_scores as kernel_regression_scores,
)
from .influence.kernels import KernelOptions as KernelOptions
from .influence.regression import regression_scores as regression_scores
from .influence.scores import (
    group_influence_scores as group_influence_scores,
)
from .influence.scores import (
    influence_scores as influence_scores,
)
from .influence.scores import (
    influence_scores_by_layer as influence_scores_by_layer,
)
from .influence.scores import (
    self_influence_scores as self_influence_scores,
)
from .influence.scores import (
    split_half_scores as split_half_scores,
)
from .influence.scores import (
    top_influences as top_influences,
)
from .influence.store import GradientStore as GradientStore
from .influence.stored_scores import StoredScores as StoredScores
from .influence.streaming import stream_gradients as stream_gradients
from .linalg.block_diagonal import BlockDiagonalLinearOperator as BlockDiagonalLinearOperator
from .linalg.conjugate_gradients import (
    CGRefinedInverseLinearOperator as CGRefinedInverseLinearOperator,
)
from .runtime.passes import PassOptions as PassOptions
