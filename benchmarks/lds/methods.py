"""Attribution methods: from gradients of training images and queries to scores.

Each is a generator of (setting, scores), the scores of each measurement ``[M, Q, N]``; positive is
helpful. A setting is a damping, or a number that takes its place.

Legend: P parameters, N training images, Q queries, M measurements, k projected entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.lds.problems import MEASURED_SEED, MEASUREMENTS, Problem
from benchmarks.problems import spread
from curvlinops_diffusion import (
    CGRefinedInverseLinearOperator,
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    RandomProjection,
)
from curvlinops_diffusion.baselines import JourneyRegression
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.influence.kernel_regression import averaged_scores, ridge_solution
from curvlinops_diffusion.influence.measurements.base import Measurement
from curvlinops_diffusion.influence.measurements.evaluation import measurement_of
from curvlinops_diffusion.influence.measurements.losses import SignedPrediction
from curvlinops_diffusion.influence.regression import RIDGE, WEIGHTS
from curvlinops_diffusion.influence.validation.baselines import ProbedPrediction
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator

DAMPINGS = tuple(10.0**e for e in range(-8, 1))
# in units of the mean eigenvalue of the kernel of TRAK, D-TRAK and the like
KERNEL_DAMPINGS = tuple(10.0**e for e in range(-6, 3))
PIXEL_BANDWIDTHS = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
PIXEL_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RIDGES = (1.0, 0.1, 0.3, 3.0, 5.0, 10.0, 30.0)
PROJECTIONS = 2
PROJECTION_DRAWS = 32
CURVATURE_DRAWS = 16
BATCH = 128
TIMESTEPS = 1000
BANDS = 4
ITERATIONS = (1, 2, 4, 8)
REFINED_DRAWS = 2
SIGN_COUNTS = (1, 2, 4)
METRIC_POWERS = (0.5, 0.75, 1.25)

Scores = Iterator[tuple[float | str, Tensor]]


@dataclass(frozen=True)
class Setting:
    """A trained network, with what all methods need of it.

    Attributes:
        problem: The problem.
        weights: The network's.
        generated: Samples of the network that was trained to the end.
        draws: Draws of each training image for its gradient.
    """

    problem: Problem
    weights: Mapping[str, Tensor]
    generated: Tensor
    draws: int = 64

    @cached_property
    def objective(self) -> DenoisingObjective:
        """The denoising objective of the network."""
        return DenoisingObjective(self.problem.loaded(self.weights), DDPMScheduler())

    @cached_property
    def train_x0(self) -> Tensor:
        """The training images."""
        return self.problem.data()[0]

    @cached_property
    def query_x0(self) -> Tensor:
        """Held-out images, then generated ones."""
        return torch.cat([self.problem.data()[1], self.generated])

    def train(self, draws: int | None = None, **options: Any) -> NoisedRegression:
        """The training images with draws; by default stratified."""
        draws = self.draws if draws is None else draws
        return NoisedRegression(self.objective, self.train_x0, draws, batch_size=BATCH, **options)

    def rows(
        self,
        measurement: str | Measurement = "loss",
        draws: int | None = None,
        names: list[str] | None = None,
        **options: Any,
    ) -> Tensor:
        """Gradients of the training images, ``[N, P]``; by default in antithetic pairs."""
        options = options or {"antithetic": True}
        regression = self.train(draws, **options)
        return ExampleGradientLinearOperator(regression, names, measurement=measurement).rows()

    @cached_property
    def train_NP(self) -> Tensor:
        """Gradients of the training images' losses."""
        return self.rows()

    def query_rows(self, measurement: str | Measurement, names: list[str] | None = None) -> Tensor:
        """Gradients of the queries on the draws that retrained networks are measured on."""
        regression = self.query_regression()
        return ExampleGradientLinearOperator(regression, names, measurement=measurement).rows()

    def query_regression(self) -> NoisedRegression:
        """The queries on the draws that retrained networks are measured on."""
        draws = self.problem.measured_draws
        return NoisedRegression(
            self.objective, self.query_x0, draws, MEASURED_SEED, batch_size=BATCH
        )

    @cached_property
    def squared_norm_NP(self) -> Tensor:
        """Gradients of the training images' squared predictions, for D-TRAK."""
        return self.rows("squared_norm")

    @cached_property
    def squared_norm_MQP(self) -> Tensor:
        """And of the queries', the same for all measurements."""
        return self.query_rows("squared_norm").expand(len(MEASUREMENTS), -1, -1)

    @cached_property
    def whitening(self) -> PyTorchLinearOperator:
        """``(F + λ)^-1/2`` of K-FAC at the default damping."""
        return self.curvature(ekfac=False).power(-0.5, DAMPINGS[0])

    def kernel_of(self, query_MQP: Tensor, train_NP: Tensor) -> Kernel:
        """Inner products of gradients in the metric of K-FAC's inverse."""
        train_PN = self.whitening @ train_NP.T
        cross_MQN = torch.stack([(self.whitening @ q_QP.T).T @ train_PN for q_QP in query_MQP])
        return Kernel(cross_MQN, train_PN.T @ train_PN)

    def kernels(self, name: str) -> Kernel:
        """A kernel, computed once."""
        if name not in self._kernels:
            self._kernels[name] = KERNELS[name](self)
        return self._kernels[name]

    @cached_property
    def _kernels(self) -> dict[str, Kernel]:
        return {}

    @cached_property
    def query_MQP(self) -> Tensor:
        """Gradients of every measurement."""
        return torch.stack([self.query_rows(m) for m in MEASUREMENTS])

    def curvature(
        self, ekfac: bool = True, names: list[str] | None = None, **options: Any
    ) -> DiffusionKFACLinearOperator:
        """K-FAC or EK-FAC of the training images."""
        kind = DiffusionEKFACLinearOperator if ekfac else DiffusionKFACLinearOperator
        draws = options.pop("draws", CURVATURE_DRAWS)
        timesteps = options.pop("timesteps", "stratified")
        return kind(self.train(draws, timesteps=timesteps), names, **options)

    def linear_and_convolutions(self) -> list[str]:
        """The parameters that the paper's code covers."""
        return [
            f"{name}.{key}"
            for name, module in self.objective.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            for key, _ in module.named_parameters(recurse=False)
        ]


# ---------------------------------------------------------------------------------------------
# Curvature
# ---------------------------------------------------------------------------------------------


def no_curvature(setting: Setting) -> Scores:
    """Products of gradients."""
    yield "", setting.query_MQP @ setting.train_NP.T


def curved(
    curvature: DiffusionKFACLinearOperator,
    query_MQP: Tensor,
    train_NP: Tensor,
    dampings: tuple[float, ...] = DAMPINGS,
    exponent: float = 1.0,
) -> Scores:
    """``∇m (F + λ)^-p ∇ℓ_n``."""
    M, Q, P = query_MQP.shape
    columns = query_MQP.reshape(M * Q, P).T
    for damping in dampings:
        product = curvature.power(-exponent, damping) @ columns
        yield damping, (product.T @ train_NP.T).reshape(M, Q, -1)


# ---------------------------------------------------------------------------------------------
# Kernel regression in the metric of K-FAC
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """Inner products of gradients in the metric of K-FAC's inverse.

    Attributes:
        cross_MQN: Of the queries' with the training images'.
        gram_NN: Of the training images' with each other.
    """

    cross_MQN: Tensor
    gram_NN: Tensor

    def regression(self, ridge: float) -> Tensor:
        """``cross (gram + λ)⁻¹``, the ridge in units of the gram matrix' mean diagonal entry."""
        cross = self.cross_MQN
        scores = ridge_solution(cross.reshape(-1, cross.shape[-1]), self.gram_NN, ridge)
        return scores.reshape(cross.shape)


def loss_kernel(setting: Setting) -> Kernel:
    """Of the gradients of the training loss and the measurements: influence, before the ridge."""
    return setting.kernel_of(setting.query_MQP, setting.train_NP)


def norm_kernel(setting: Setting) -> Kernel:
    """Of the gradients of the squared prediction, D-TRAK's function."""
    return setting.kernel_of(setting.squared_norm_MQP, setting.squared_norm_NP)


def prediction_kernel(setting: Setting) -> Kernel:
    """Of the Jacobians of the prediction, averaged over draws, along a few random signs.

    ``Σ_v ⟨Jᵀ v, Jᵀ v⟩``: the neural tangent kernel of the mean prediction.
    """
    kernels = []
    for seed in range(PROJECTIONS):
        query_QP = setting.query_rows(SignedPrediction(seed))
        rows = setting.rows(SignedPrediction(seed), PROJECTION_DRAWS)
        kernels.append(setting.kernel_of(query_QP.expand(len(MEASUREMENTS), -1, -1), rows))
    return Kernel(sum(k.cross_MQN for k in kernels), sum(k.gram_NN for k in kernels))


def sign_kernel(setting: Setting) -> Kernel:
    """The same along one random sign, of all draws, as ``regression_scores`` has it."""
    query_QP = setting.query_rows(SignedPrediction())
    rows = setting.rows(SignedPrediction())
    return setting.kernel_of(query_QP.expand(len(MEASUREMENTS), -1, -1), rows)


def regression_on(
    *names: str,
    squared: str | None = None,
    default: float = 1.0,
    weights: tuple[float, ...] | None = None,
) -> Callable[[Setting], Scores]:
    """Kernel regression on one or several functions, whose scores are averaged.

    Query by query in units of their standard deviation. The default ridge is a multiple of the mean
    influence of a training image on itself, and K-FAC's damping is the default one: its setting is
    called by the latter, as for all methods with a default.

    Args:
        names: Kernels.
        squared: Another one, whose weights are squared.
        default: The ridge that was chosen on the digits.
        weights: Of the scores in the average.
    """

    def run(setting: Setting) -> Scores:
        for ridge in RIDGES:
            scores = [setting.kernels(name).regression(ridge) for name in names]
            if squared is not None:
                scores.append(setting.kernels(squared).regression(ridge).square())
            total_MQN = torch.stack(
                [averaged_scores(z, weights) for z in zip(*scores, strict=True)]
            )
            yield (1e-8 if ridge == default else f"ridge {ridge}"), total_MQN

    return run


KERNELS: dict[str, Callable[[Setting], Kernel]] = {
    "loss": loss_kernel,
    "squared norm": norm_kernel,
    "prediction": prediction_kernel,
    "sign": sign_kernel,
}


def regression_scan(setting: Setting) -> Scores:
    """Regression on loss and prediction: other numbers of signs, other powers of the metric.

    Of the training loss; the same scores for all measurements.
    """
    curvature = setting.curvature(ekfac=False)
    query_QP, train_NP = setting.query_rows("loss"), setting.train_NP
    seeds = range(max(SIGN_COUNTS))
    signs = [
        (setting.query_rows(SignedPrediction(seed)), setting.rows(SignedPrediction(seed), 32))
        for seed in seeds
    ]

    def kernel_of(query_QP: Tensor, train_NP: Tensor, exponent: float) -> Kernel:
        root = curvature.power(-exponent / 2, DAMPINGS[0])
        train_PN = root @ train_NP.T
        return Kernel(((root @ query_QP.T).T @ train_PN)[None], train_PN.T @ train_PN)

    def scored(of_loss: Kernel, of_signs: Sequence[Kernel]) -> Tensor:
        total = Kernel(sum(k.cross_MQN for k in of_signs), sum(k.gram_NN for k in of_signs))
        both = [kernel.regression(1.0)[0] for kernel in (of_loss, total)]
        return _for_all_measurements(averaged_scores(both))

    of_loss = kernel_of(query_QP, train_NP, 1.0)
    of_signs = [kernel_of(*rows, 1.0) for rows in signs]
    for count in SIGN_COUNTS:
        yield f"{count} sign{'s' * (count > 1)}", scored(of_loss, of_signs[:count])
    for exponent in METRIC_POWERS:
        kernels = (kernel_of(query_QP, train_NP, exponent), kernel_of(*signs[0], exponent))
        yield f"power {exponent}, 1 sign", scored(kernels[0], kernels[1:])


# ---------------------------------------------------------------------------------------------
# Kernels of gradients
# ---------------------------------------------------------------------------------------------


def kernel(query_MQP: Tensor, train_NP: Tensor) -> Scores:
    """TRAK without projection, solved in the dual: ``∇m Φᵀ (Φ Φᵀ + λ)⁻¹``.

    Park et al., 2023; for generative losses and with the squared norm as function D-TRAK (Zheng et
    al., 2024).
    """
    yield from dual(query_MQP @ train_NP.T, train_NP @ train_NP.T)


def dual(cross: Tensor, gram_NN: Tensor) -> Scores:
    """``cross (gram + λ)⁻¹``, the damping in units of the gram matrix' mean diagonal entry."""
    for damping in KERNEL_DAMPINGS:
        yield damping, Kernel(cross, gram_NN).regression(damping)


def projected_kernel(query_MQP: Tensor, train_NP: Tensor, k: int) -> Scores:
    """TRAK as published, of gradients in a random projection; again in the dual."""
    projection = RandomProjection(k)
    query_MQk = torch.stack([projection(query_QP) for query_QP in query_MQP])
    yield from kernel(query_MQk.double(), projection(train_NP).double())


def attribution_score(setting: Setting) -> Scores:
    """``das_scores`` (after Lin et al., 2025), at several dampings."""
    draws = setting.query_regression().draws
    probes = [ProbedPrediction(draws, number) for number in range(setting.problem.probes)]
    cross_VQN = torch.stack([setting.query_rows(probe) @ setting.train_NP.T for probe in probes])
    for damping, scores_VQN in dual(cross_VQN, setting.train_NP @ setting.train_NP.T):
        squares_QN = scores_VQN.square().mean(0)
        yield damping, _for_all_measurements(squares_QN)


def journey(setting: Setting, steps: int = 50) -> Scores:
    """Journey-TRAK (Georgiev et al., 2023) at ``steps`` levels, after ``JourneyRegression``.

    For generated queries alone: held-out ones have no journey.
    """
    T = TIMESTEPS
    levels = range(T // (2 * steps), T, T // steps)
    trajectories = setting.problem.trajectories(setting.objective.model)
    states = torch.stack([*(trajectories[T - 1 - t] for t in levels), setting.generated], dim=1)
    regression = JourneyRegression(setting.objective, states, levels)
    query_MQP = torch.full_like(setting.query_MQP, torch.nan)
    query_MQP[:, -len(states) :] = ExampleGradientLinearOperator(regression).rows()
    yield from kernel(query_MQP, setting.train_NP)


def nearest(setting: Setting) -> Scores:
    """Nearness in pixels."""
    distance_QN = torch.cdist(setting.query_x0.flatten(1), setting.train_x0.flatten(1))
    yield "", _for_all_measurements(-distance_QN)


def pixel_kernels(
    setting: Setting, bandwidths: Sequence[float] = PIXEL_BANDWIDTHS
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Gaussian kernels of the images: (bandwidth, with the queries, with each other).

    Bandwidths are in units of the median distance between training images.
    """
    train_ND, query_QD = setting.train_x0.flatten(1), setting.query_x0.flatten(1)
    distance_NN = torch.cdist(train_ND, train_ND).double()
    distance_QN = torch.cdist(query_QD, train_ND).double()
    for bandwidth in bandwidths:
        scale = 2 * (bandwidth * distance_NN.median()) ** 2
        cross_QN, gram_NN = ((-(d**2) / scale).exp() for d in (distance_QN, distance_NN))
        yield f"{bandwidth}", cross_QN, gram_NN


def pixel_kernel(setting: Setting) -> Scores:
    """Nearness in pixels under a Gaussian kernel; the setting is its bandwidth."""
    for bandwidth, cross_QN, _ in pixel_kernels(setting):
        yield bandwidth, _for_all_measurements(cross_QN)


def pixel_regression(setting: Setting) -> Scores:
    """Weights of kernel ridge regression on pixels; the setting is bandwidth and ridge."""
    for bandwidth, cross_QN, gram_NN in pixel_kernels(setting):
        for ridge in PIXEL_RIDGES:
            inverse = torch.linalg.inv(gram_NN + ridge * torch.eye(len(gram_NN)).double())
            yield f"{bandwidth}, {ridge}", _for_all_measurements(cross_QN @ inverse)


def pixel_regression_squared(setting: Setting) -> Scores:
    """The squares of such weights, with wider kernels; by default of the median distance."""
    for bandwidth, cross_QN, gram_NN in pixel_kernels(setting, (*PIXEL_BANDWIDTHS, 1.5, 2.0)):
        for ridge in PIXEL_RIDGES:
            scores_QN = ridge_solution(cross_QN, gram_NN, ridge).square()
            chosen = (float(bandwidth), ridge) == (1.0, 1.0)
            yield 1e-8 if chosen else f"{bandwidth}, {ridge}", _for_all_measurements(scores_QN)


def _for_all_measurements(scores_QN: Tensor) -> Tensor:
    return scores_QN.expand(len(MEASUREMENTS), *scores_QN.shape)


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


def of_curvature(**options: Any) -> Callable[[Setting], Scores]:
    """Influence by some curvature."""

    def run(setting: Setting) -> Scores:
        yield from curved(setting.curvature(**options), setting.query_MQP, setting.train_NP)

    return run


def linear_and_convolutions_only(setting: Setting) -> Scores:
    """Our draws, the paper's coverage."""
    names = setting.linear_and_convolutions()
    query_MQP = torch.stack([setting.query_rows(m, names) for m in MEASUREMENTS])
    yield from curved(setting.curvature(names=names), query_MQP, setting.rows(names=names))


def papers_recipe(
    setting: Setting, draws: int | None = None, curvature_draws: int = CURVATURE_DRAWS
) -> Scores:
    """Uniform draws, linear layers and convolutions, a bias' block approximated."""
    names = setting.linear_and_convolutions()
    query_MQP = torch.stack([setting.query_rows(m, names) for m in MEASUREMENTS])
    EK = setting.curvature(
        names=names, timesteps="uniform", draws=curvature_draws, exact_bias=False
    )
    rows = setting.rows(names=names, draws=draws, timesteps="uniform")
    yield from curved(EK, query_MQP, rows)


def powers(setting: Setting) -> Scores:
    """Powers of the inverse at the default damping; the setting is the power."""
    EK = setting.curvature()
    for exponent in (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5):
        for _, scores in curved(EK, setting.query_MQP, setting.train_NP, (1e-8,), exponent):
            yield f"{exponent}", scores


def refined(setting: Setting) -> Scores:
    """EK-FAC refined towards the exact GGN by conjugate gradients; the setting is the iterations.

    For the loss of generated queries alone, since a product for each of them costs a training pass
    over the images; with few draws, for the same reason.
    """
    G = DiffusionGGNLinearOperator(setting.train(REFINED_DRAWS))
    damping = DAMPINGS[0]
    iterates: list[Tensor] = []
    inverse = CGRefinedInverseLinearOperator(
        G,
        damping,
        setting.curvature().inverse(damping),
        max_iter=max(ITERATIONS),
        tolerance=0.0,
        callback=lambda X_PQ: iterates.append(X_PQ.T @ setting.train_NP.T),
    )
    Q = setting.problem.num_queries
    inverse @ setting.query_MQP[0, -Q:].T.contiguous()
    residuals = [float(residual_Q.median()) for residual_Q in inverse.refinement.residuals]
    print("median relative residuals:", *(f"{residual:.3f}" for residual in residuals), flush=True)
    for iterations in ITERATIONS:
        scores_MQN = setting.query_MQP.new_full(
            (len(MEASUREMENTS), 2 * Q, len(setting.train_x0)), torch.nan
        )
        scores_MQN[0, -Q:] = iterates[iterations - 1]
        yield f"{iterations}", scores_MQN


def bands_of_levels(setting: Setting) -> Scores:
    """EK-FAC with the noise levels in four bands; the setting says what is split by them.

    - queries: ``∇m_b (F + λ)⁻¹ ∇ℓ``;
    - both: ``∇m_b (F + λ)⁻¹ ∇ℓ_b``;
    - curvature: ``∇m_b (F_b + λ)⁻¹ ∇ℓ_b``, with a curvature of its own for each band.

    Each in units of its standard deviation, averaged over the bands, so that none outweighs the
    others (as Diffusion-ReTrac normalises each level; Xie et al., 2024); and curvature also as it
    is, the sum over the bands, "curvature, summed".
    """
    size, damping = TIMESTEPS // BANDS, DAMPINGS[0]
    shared = setting.curvature()
    totals: dict[str, Tensor] = {}
    for first in range(0, TIMESTEPS, size):
        band = range(first, first + size)
        query_MQP = torch.stack(
            [
                setting.query_rows(_within(band, measurement_of(name, setting.objective)))
                for name in MEASUREMENTS
            ]
        )
        # each level with a pair, as many draws in all as for the other methods
        levels = spread(band, setting.draws // (2 * BANDS))
        train_NP = setting.rows(draws=2 * len(levels), timesteps=levels, antithetic=True)
        listed = spread(band, CURVATURE_DRAWS)
        own = setting.curvature(timesteps=listed, draws=len(listed))
        for key, curvature, rows_NP in (
            ("curvature", own, train_NP),
            ("queries", shared, setting.train_NP),
            ("both", shared, train_NP),
        ):
            ((_, scores_MQN),) = curved(curvature, query_MQP, rows_NP, (damping,))
            if key == "curvature":
                summed = f"{key}, summed"
                totals[summed] = totals.get(summed, torch.zeros(())) + scores_MQN
            # a band without a draw of the query has zeros
            spread_MQ1 = scores_MQN.std(-1, keepdim=True)
            scores_MQN = scores_MQN / spread_MQ1.clamp(min=torch.finfo(spread_MQ1.dtype).tiny)
            totals[key] = totals.get(key, torch.zeros(())) + scores_MQN
    yield from totals.items()


def _within(band: range, measurement: Measurement) -> Measurement:
    """A measurement's part within a band of levels: the bands' parts sum to it."""

    def measured(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        values_B = measurement(batch, prediction_BD)
        inside_B = (batch.level_B >= band.start) & (batch.level_B < band.stop)
        return values_B * inside_B.to(values_B)

    return measured


def numbers_of_draws(**scheme: Any) -> Callable[[Setting], Scores]:
    """EK-FAC at the default damping, gradients of few to many draws; the setting is the number.

    Draws are added in parts, each of its own seed: 10, then 20 more, and so on.
    """

    def run(setting: Setting) -> Scores:
        EK = setting.curvature()
        total_NP, before = torch.zeros_like(setting.train_NP), 0
        for seed, draws in enumerate(setting.problem.draws):
            new = draws - before
            total_NP += new * setting.rows(draws=new, seed=seed, **scheme)
            before = draws
            for _, scores in curved(EK, setting.query_MQP, total_NP / draws, (1e-8,)):
                yield f"{draws}", scores

    return run


def sampled_ggn(setting: Setting, number: int = 4) -> Scores:
    """The exact GGN from 4 random loss vectors for each training image, by Woodbury's formula."""
    rows = sampled_rows(setting, number)
    gram = (rows @ rows.T).double() / len(rows)
    cross_MQK = (setting.query_MQP @ rows.T).double()
    cross_NK = (setting.train_NP @ rows.T).double()
    plain_MQN = (setting.query_MQP @ setting.train_NP.T).double()
    identity = torch.eye(len(gram)).double()
    for damping in DAMPINGS:
        inner = torch.linalg.inv(damping * identity + gram)
        yield damping, (plain_MQN - cross_MQK @ inner @ cross_NK.T / len(rows)) / damping


def sampled_rows(setting: Setting, number: int) -> Tensor:
    """Vectors whose second moment is the GGN: a draw and a random loss vector of each image."""
    return torch.cat(
        [_sampled(setting.train(1, seed=s, timesteps="uniform")) for s in range(number)]
    )


def _sampled(regression: NoisedRegression) -> Tensor:
    """Gradients of ``√(2 w r) vᵀ f``, whose second moment is the GGN."""
    probe = ProbedPrediction(regression.draws)

    def measured(batch: NoisedBatch, prediction_BD: Tensor) -> Tensor:
        return (2 * batch.weight_B).sqrt() * probe(batch, prediction_BD)

    return ExampleGradientLinearOperator(regression, measurement=measured).rows()


def d_trak(setting: Setting) -> Scores:
    """D-TRAK (Zheng et al., 2024): the prediction's squared norm in place of the loss."""
    yield from kernel(setting.squared_norm_MQP, setting.squared_norm_NP)


def d_trak_projected(setting: Setting) -> Scores:
    """D-TRAK as published."""
    yield from projected_kernel(
        setting.squared_norm_MQP, setting.squared_norm_NP, setting.problem.projected
    )


METHODS: dict[str, Callable[[Setting], Scores]] = {
    "no curvature": no_curvature,
    "nearest in pixels": nearest,
    "Gaussian kernel of pixels": pixel_kernel,
    "kernel regression on pixels": pixel_regression,
    "kernel regression on pixels, squared": pixel_regression_squared,
    "TRAK": lambda s: kernel(s.query_MQP, s.train_NP),
    "TRAK, projected": lambda s: projected_kernel(s.query_MQP, s.train_NP, s.problem.projected),
    "D-TRAK": d_trak,
    "D-TRAK, projected": d_trak_projected,
    "Journey-TRAK": journey,
    "DAS": attribution_score,
    "EK-FAC, the paper's recipe": papers_recipe,
    "EK-FAC, the paper's recipe, 250 draws": lambda s: papers_recipe(
        s, s.problem.papers_draws, s.problem.papers_draws // 2
    ),
    "EK-FAC, linear and convolutions only": linear_and_convolutions_only,
    "EK-FAC": of_curvature(),
    "EK-FAC, reduce": of_curvature(kfac_approx="reduce"),
    "EK-FAC, Shampoo's factors": of_curvature(kfac_approx="shampoo"),
    "EK-FAC, joint bias": of_curvature(separate_weight_and_bias=False),
    "EK-FAC, GGN of the loss": of_curvature(fisher_type="empirical"),
    "K-FAC": of_curvature(ekfac=False),
    "K-FAC, reduce": of_curvature(ekfac=False, kfac_approx="reduce"),
    "K-FAC, Shampoo's factors": of_curvature(ekfac=False, kfac_approx="shampoo"),
    "K-FAC, regression on the loss": regression_on("loss"),
    "K-FAC, regression on the squared norm": regression_on("squared norm"),
    "K-FAC, regression on the prediction": regression_on("prediction"),
    "K-FAC, regression on loss and squared norm": regression_on("loss", "squared norm"),
    "K-FAC, regression on loss and prediction": regression_on("loss", "prediction"),
    "K-FAC, regression on the prediction, squared": regression_on(squared="sign", default=RIDGE),
    "K-FAC, regression on loss and squared prediction": regression_on(
        "loss", squared="sign", default=RIDGE, weights=WEIGHTS
    ),
    "sampled GGN": sampled_ggn,
    "bands of levels, EK-FAC": bands_of_levels,
    "conjugate gradients from EK-FAC": refined,
    "powers of EK-FAC": powers,
    "settings of the regression": regression_scan,
    "draws, uniform": numbers_of_draws(timesteps="uniform"),
    "draws, antithetic": numbers_of_draws(antithetic=True),
}
