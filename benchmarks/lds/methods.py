"""Attribution methods: from a trained network to scores, by the library's functions.

Each is a generator of (setting, scores), the scores of each measurement ``[M, Q, N]``; positive is
helpful. A setting is a damping, or a number that takes its place.

Legend: N training images, Q queries, M measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lds.adapters import AdapterProblem
from benchmarks.lds.problems import MEASURED_SEED, MEASUREMENTS, Data, Problem
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    influence_scores,
    kernel_regression_scores,
    regression_scores,
)
from curvlinops_diffusion.baselines import (
    JourneyRegression,
    d_trak_scores,
    das_scores,
    trak_scores,
)
from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.influence.features import feature_regression_scores
from curvlinops_diffusion.influence.measurements.losses import SignedPrediction
from curvlinops_diffusion.influence.regression import RIDGE
from curvlinops_diffusion.linalg.operator import IdentityLinearOperator
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator

DAMPINGS = tuple(10.0**e for e in range(-8, 1))
RELATIVE_DAMPINGS = (0.001, 0.01, 0.1, 1.0)
# of TRAK, D-TRAK and the like
KERNEL_RIDGES = tuple(10.0**e for e in range(-6, 3))
PIXEL_BANDWIDTHS = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75, 1.0)
WIDER_BANDWIDTHS = (*PIXEL_BANDWIDTHS, 1.5, 2.0)
PIXEL_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RIDGES = (1.0, 0.1, 0.3, 3.0, 5.0, 10.0, 30.0)
SIGNS = 2
DRAWS_A_SIGN = 32
CURVATURE_DRAWS = 16
BATCH = 128
TIMESTEPS = 1000

Scores = Iterator[tuple[float | str, Tensor]]


class KeptGradients(ExampleGradientLinearOperator):
    """Gradients that are computed once, for functions that stream them anew for each damping."""

    @cached_property
    def _kept(self) -> tuple[Tensor, dict[Any, KeptGradients]]:
        batches = self.regression.clean_batches()
        return torch.cat([super(KeptGradients, self).rows_of(clean) for clean in batches]), {}

    def rows_of(self, clean: CleanBatch) -> Tensor:
        """Gradients of a batch."""
        return self._kept[0][list(clean.indices)]

    def measuring(self, measurement: Any) -> KeptGradients:
        """The gradients of something else, kept as well."""
        others = self._kept[1]
        if measurement not in others:
            others[measurement] = KeptGradients(
                self.regression, self.param_names, measurement=measurement
            )
        return others[measurement]


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
        return self.problem.objective(self.weights)

    @cached_property
    def params(self) -> list[str] | None:
        """The names of the parameters that were trained, ``None`` for all."""
        return self.problem.params

    @cached_property
    def train_data(self) -> Data:
        """The training images."""
        return self.problem.data()[0]

    @cached_property
    def query_data(self) -> Data:
        """Held-out images, then generated ones."""
        return self.problem.queries(self.generated)

    def train(self, draws: int | None = None, **options: Any) -> NoisedRegression:
        """The training images with draws; by default stratified."""
        draws = self.draws if draws is None else draws
        return NoisedRegression(self.objective, self.train_data, draws, batch_size=BATCH, **options)

    @cached_property
    def J_train(self) -> KeptGradients:
        """Gradients of the training losses, of draws in antithetic pairs."""
        return KeptGradients(self.train(antithetic=True), self.params)

    def J_queries(self, names: list[str] | None = None) -> list[KeptGradients]:
        """Gradients of every measurement, of the draws that retrained networks are measured on."""
        draws = self.problem.measured_draws
        query = NoisedRegression(
            self.objective, self.query_data, draws, MEASURED_SEED, batch_size=BATCH
        )
        return [KeptGradients(query, names, measurement=m) for m in MEASUREMENTS]

    @cached_property
    def queries(self) -> list[KeptGradients]:
        """Gradients of every measurement in all parameters."""
        return self.J_queries(self.params)

    def scored(self, scores: Callable[[KeptGradients], Tensor]) -> Tensor:
        """The scores of every measurement, ``[M, Q, N]``."""
        return torch.stack([scores(J_query) for J_query in self.queries])

    @cached_property
    def K_inv(self) -> PyTorchLinearOperator:
        """K-FAC's inverse at the default damping."""
        return self.curvature(ekfac=False).inverse(DAMPINGS[0])

    @cached_property
    def signed(self) -> list[KeptGradients]:
        """The prediction of the training images along random signs, with fewer draws of each."""
        train = self.train(DRAWS_A_SIGN, antithetic=True)
        signs = map(SignedPrediction, range(SIGNS))
        return [KeptGradients(train, self.params, measurement=sign) for sign in signs]

    def curvature(
        self, ekfac: bool = True, names: list[str] | None = None, **options: Any
    ) -> DiffusionKFACLinearOperator:
        """K-FAC or EK-FAC of the training images."""
        kind = DiffusionEKFACLinearOperator if ekfac else DiffusionKFACLinearOperator
        timesteps = options.pop("timesteps", "stratified")
        train = self.train(CURVATURE_DRAWS, timesteps=timesteps)
        return kind(train, self.params if names is None else names, **options)


# ---------------------------------------------------------------------------------------------
# Influence
# ---------------------------------------------------------------------------------------------


def no_curvature(setting: Setting) -> Scores:
    """Products of gradients."""
    J_train = setting.J_train
    identity = IdentityLinearOperator(J_train)
    yield "", setting.scored(lambda J_query: influence_scores(J_query, identity, J_train))


def influence(
    curvature: DiffusionKFACLinearOperator,
    queries: Sequence[KeptGradients],
    J_train: ExampleGradientLinearOperator,
    dampings: tuple[float, ...] = DAMPINGS,
) -> Scores:
    """Influence at several dampings."""
    for damping in dampings:
        inverse = curvature.inverse(damping)
        scores = [influence_scores(J_query, inverse, J_train) for J_query in queries]
        yield damping, torch.stack(scores)


def relative_damping(setting: Setting) -> Scores:
    """Influence by EK-FAC at dampings relative to each block's mean eigenvalue."""
    EK = setting.curvature()
    for damping in RELATIVE_DAMPINGS:
        inverse = EK.inverse(damping, relative=True)
        scores = setting.scored(lambda J, inv=inverse: influence_scores(J, inv, setting.J_train))
        yield f"relative {damping}", scores


def of_curvature(**options: Any) -> Callable[[Setting], Scores]:
    """Influence by some curvature, which is computed when the first scores are asked for."""

    def run(setting: Setting) -> Scores:
        yield from influence(setting.curvature(**options), setting.queries, setting.J_train)

    return run


def papers_recipe(setting: Setting) -> Scores:
    """Uniform draws, linear layers and convolutions, a bias' block approximated."""
    names = [
        f"{name}.{key}"
        for name, module in setting.objective.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for key, _ in module.named_parameters(recurse=False)
    ]
    if setting.params is not None:
        names = [name for name in names if name in setting.params]
    EK = setting.curvature(names=names, timesteps="uniform", exact_bias=False)
    J_train = KeptGradients(setting.train(timesteps="uniform"), names)
    yield from influence(EK, setting.J_queries(names), J_train)


# ---------------------------------------------------------------------------------------------
# Regression
# ---------------------------------------------------------------------------------------------


def regression_on(*kinds: str, default: float = 1.0, **options: Any) -> Callable[[Setting], Scores]:
    """Kernel regressions at several ridges, of which the default is called as K-FAC's damping.

    Args:
        kinds: The functions: ``'loss'``; ``'prediction'``, the kernels along a few random signs
            added up, which is the neural tangent kernel of the mean prediction; or ``'sign'``, the
            prediction along one sign, of all draws.
        default: The ridge that was chosen on the digits.
        options: Those of ``kernel_regression_scores``.
    """

    def run(setting: Setting) -> Scores:
        first, sign = setting.queries[0], setting.J_train.measuring(SignedPrediction())
        signed = {"prediction": setting.signed, "sign": [sign]}
        trains = [signed.get(kind, [setting.J_train]) for kind in kinds]

        def scores(J_query: KeptGradients, ridge: float) -> Tensor:
            queries = [
                [first.measuring(J.measurement) for J in signed[kind]]
                if kind in signed
                else [J_query]
                for kind in kinds
            ]
            return kernel_regression_scores(queries, setting.K_inv, trains, ridge=ridge, **options)

        yield from at_ridges(setting, scores, default)

    return run


def default_regression(setting: Setting) -> Scores:
    """``regression_scores``, of the loss and of the prediction's variance."""

    def scores(J_query: KeptGradients, ridge: float) -> Tensor:
        return regression_scores(J_query, setting.K_inv, setting.J_train, ridge=ridge)

    yield from at_ridges(setting, scores, RIDGE)


def at_ridges(
    setting: Setting, scores: Callable[[KeptGradients, float], Tensor], default: float
) -> Scores:
    """Scores at every ridge."""
    for ridge in RIDGES:
        found = setting.scored(lambda J_query, ridge=ridge: scores(J_query, ridge))
        yield 1e-8 if ridge == default else f"ridge {ridge}", found


# ---------------------------------------------------------------------------------------------
# Other methods
# ---------------------------------------------------------------------------------------------


def published(scores: Callable[..., Tensor]) -> Callable[[Setting], Scores]:
    """TRAK or D-TRAK at several ridges, without projection."""

    def run(setting: Setting) -> Scores:
        for ridge in KERNEL_RIDGES:
            yield ridge, setting.scored(partial(scores, J_train=setting.J_train, ridge=ridge))

    return run


def das(setting: Setting) -> Scores:
    """DAS, the same for all measurements."""
    J_query, *_ = setting.J_queries(setting.params)  # the mean's gradients go with it
    for ridge in KERNEL_RIDGES:
        scores_QN = das_scores(J_query, setting.J_train, ridge=ridge)
        yield ridge, _for_all_measurements(scores_QN)


def journey(setting: Setting, steps: int = 50) -> Scores:
    """Journey-TRAK at so many levels, of generated queries alone: others have no journey."""
    levels = range(TIMESTEPS // (2 * steps), TIMESTEPS, TIMESTEPS // steps)
    trajectories = setting.problem.trajectories(setting.objective.model)
    states = torch.stack(
        [*(trajectories[TIMESTEPS - 1 - t] for t in levels), setting.generated], dim=1
    )
    J_query = KeptGradients(JourneyRegression(setting.objective, states, levels))
    for ridge in KERNEL_RIDGES:
        scores_QN = trak_scores(J_query, setting.J_train, ridge=ridge)
        without_QN = torch.full((setting.problem.num_queries, scores_QN.shape[1]), torch.nan)
        yield ridge, _for_all_measurements(torch.cat([without_QN, scores_QN]))


def on_features(
    features: tuple[Tensor, Tensor], squared: bool, bandwidths: Sequence[float]
) -> Scores:
    """Kernel regression on features of training images and queries, by bandwidth and ridge."""
    train, queries = (z.flatten(1) for z in features)
    for bandwidth in bandwidths:
        for ridge in PIXEL_RIDGES:
            scores_QN = feature_regression_scores(
                queries, train, bandwidth=bandwidth, ridge=ridge, squared=squared
            )
            chosen = squared and (bandwidth, ridge) == (1.0, 1.0)  # the defaults
            yield 1e-8 if chosen else f"{bandwidth}, {ridge}", _for_all_measurements(scores_QN)


def pixel_regression(setting: Setting) -> Scores:
    """The weights themselves."""
    return on_features(setting.problem.pixels(setting.generated), False, PIXEL_BANDWIDTHS)


def pixel_regression_squared(setting: Setting) -> Scores:
    """The squares of such weights, with wider kernels."""
    return on_features(setting.problem.pixels(setting.generated), True, WIDER_BANDWIDTHS)


def latent_regression_squared(setting: Setting) -> Scores:
    """The same on latents."""
    latents = setting.train_data["x0"], setting.query_data["x0"]
    return on_features(latents, True, WIDER_BANDWIDTHS)


def same_words(setting: Setting) -> Scores:
    """The number of words that two captions share."""
    problem: Any = setting.problem
    train, queries = ([set(c.split()) for c in captions] for captions in problem.words())
    shared = torch.tensor([[len(q & n) for n in train] for q in queries])
    yield "", _for_all_measurements(shared.float())


def _for_all_measurements(scores_QN: Tensor) -> Tensor:
    return scores_QN.expand(len(MEASUREMENTS), *scores_QN.shape)


METHODS: dict[str, Callable[[Setting], Scores]] = {
    "no curvature": no_curvature,
    "kernel regression on pixels": pixel_regression,
    "kernel regression on pixels, squared": pixel_regression_squared,
    "TRAK": published(trak_scores),
    "D-TRAK": published(d_trak_scores),
    "Journey-TRAK": journey,
    "DAS": das,
    "EK-FAC, the paper's recipe": papers_recipe,
    "EK-FAC": of_curvature(),
    "EK-FAC, reduce": of_curvature(kfac_approx="reduce"),
    "EK-FAC, Shampoo's factors": of_curvature(kfac_approx="shampoo"),
    "EK-FAC, GGN of the loss": of_curvature(fisher_type="empirical"),
    "EK-FAC, GGN of the loss, reduce": of_curvature(fisher_type="empirical", kfac_approx="reduce"),
    "K-FAC": of_curvature(ekfac=False),
    "K-FAC, reduce": of_curvature(ekfac=False, kfac_approx="reduce"),
    "K-FAC, GGN of the loss": of_curvature(ekfac=False, fisher_type="empirical"),
    "K-FAC, GGN of the loss, reduce": of_curvature(
        ekfac=False, fisher_type="empirical", kfac_approx="reduce"
    ),
    "K-FAC, regression on the loss": regression_on("loss"),
    "K-FAC, regression on the prediction": regression_on("prediction"),
    "K-FAC, regression on the prediction, squared": regression_on(
        "sign", squared=True, default=RIDGE
    ),
    "K-FAC, regression on loss and prediction": regression_on("loss", "prediction"),
    "K-FAC, regression": default_regression,
}
# what an adapter has beside them, and what it has not
OF_ADAPTERS: dict[str, Callable[[Setting], Scores]] = {
    "kernel regression on latents, squared": latent_regression_squared,
    "same words": same_words,
    "EK-FAC, relative damping": relative_damping,
}
OF_PIXELS = ("Journey-TRAK",)


def methods_for(problem: Problem) -> dict[str, Callable[[Setting], Scores]]:
    """The methods that apply to a problem."""
    if not isinstance(problem, AdapterProblem):
        return METHODS
    left_out = [*OF_PIXELS, *(["same words"] if len(set(problem.captions())) == 1 else [])]
    return {k: method for k, method in (METHODS | OF_ADAPTERS).items() if k not in left_out}
