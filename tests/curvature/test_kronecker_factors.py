"""Averages over draws: batch sizes, convergence, scale, parametrisations, precision."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PredictionType,
)
from curvlinops_diffusion.curvature.kronecker_factors import eigenvalue_moments, kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.draws import ProbeType, make_draws
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.linalg.factors import eigendecomposition
from tests.cases import images, noise_levels, plain_regression, seeded, small_unet, unet_regression
from tests.comparisons import assert_close, relative_error
from tests.reference import to_dense

pytestmark = pytest.mark.filterwarnings("ignore:.*in no supported layer")


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_batch_size_does_not_matter(approx):
    unet = small_unet()
    operators = [
        [
            operator(unet_regression(unet, count=6, num_draws=1, batch_size=b), kfac_approx=approx)
            for operator in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator)
        ]
        for b in (1, 4, 6)
    ]
    V = torch.randn(operators[0][0].shape[1], 4, dtype=torch.float64)
    for others in operators[1:]:
        assert_close(others[0] @ V, operators[0][0] @ V, 1e-10)
        # eigenvectors of equal eigenvalues are arbitrary, so EK-FAC's product may differ there
        assert_close(others[1].trace(), operators[0][1].trace(), 1e-10)
        for one, other in zip(operators[0][1].blocks, others[1].blocks, strict=True):
            if one.name == "conv_in.weight":  # full-rank factors: the basis is unique
                X = torch.randn(*one.block.shape, 3, dtype=torch.float64)
                assert_close(other.block.multiply(X), one.block.multiply(X), 1e-10)


def _deviation(samples, truth):
    """The mean's distance from the truth in standard errors, and one of these relative."""
    samples = torch.stack(samples)
    standard_error = samples.std() / len(samples) ** 0.5
    return float((samples.mean() - truth) / standard_error), float(standard_error / truth)


PROBES = ("rademacher", "gaussian")


def traces(seed, reduction="mean"):
    """Of EK-FAC and of K-FAC's last layer: by type of loss vectors, and exact."""
    regression = plain_regression(
        seeded(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
        (8,),
        count=4,
        num_draws=4,
        seed=seed,
        batch_size=4,
        timesteps=[2, 5, 6, 8],
        objective={"reduction": reduction},
    )
    options = {probe: {"probe_type": probe, "mc_samples": 40} for probe in PROBES}
    options["exact"] = {"fisher_type": "type-2"}
    last = ["layers.2.weight"]
    return {
        name: (
            DiffusionEKFACLinearOperator(regression, **own).trace(),
            DiffusionKFACLinearOperator(regression, last, **own).trace(),
        )
        for name, own in options.items()
    }


def test_the_monte_carlo_ggn_has_the_right_scale():
    """The trace of the Monte-Carlo K-FAC and EK-FAC is unbiased; 5 % would be seen.

    The noise is that of each seed's exact GGN, so that only loss vectors are random.
    """
    found = [traces(seed) for seed in range(16)]
    for probe, number in itertools.product(PROBES, (0, 1)):
        samples = [of_seed[probe][number] / of_seed["exact"][number] for of_seed in found]
        # the last layer's b is the loss vector: for Rademacher entries |b|² is not even random
        if probe == "rademacher" and number == 1:
            assert all(abs(s - 1) < 1e-6 for s in samples)
            continue
        deviation, relative = _deviation(samples, 1.0)
        assert abs(deviation) < 4
        assert relative < 0.05 / 8  # so that a scale wrong by 5 % would be 8 standard errors off
        assert abs(_deviation([1.05 * s for s in samples], 1.0)[0]) > 4


def test_sums_are_as_many_times_means_as_there_are_outputs():
    """With the same loss vectors, so that the scale of sums is right if that of means is."""
    means, sums = traces(seed=0), traces(seed=0, reduction="sum")
    for name, pair in means.items():
        for mean, total in zip(pair, sums[name], strict=True):
            assert_close(total, 8 * mean, 1e-10)


class Reparametrised(nn.Module):
    """The same network, predicting ``x0`` or ``v`` from its prediction of ``eps``."""

    def __init__(self, eps_model, process, prediction_type):
        super().__init__()
        self.eps_model, self.process, self.kind = eps_model, process, prediction_type

    def forward(self, x_t, t):
        alpha, sigma = (s[t].unsqueeze(1) for s in (self.process.alphas_T, self.process.sigmas_T))
        eps = self.eps_model(x_t, t)
        x0 = (x_t - sigma * eps) / alpha
        return {
            PredictionType.EPSILON: eps,
            PredictionType.SAMPLE: x0,
            PredictionType.V: alpha * eps - sigma * x0,
        }[self.kind]


def test_parametrisations_with_matched_weights_have_one_ggn():
    """``x0 = (x_t − σ eps)/α`` and ``v = α eps − σ x0 = (eps − σ x_t)/α``.

    Errors are ``σ/α`` and ``1/α`` times those of ``eps``, so weights ``(α/σ)²`` and ``α²`` give the
    same loss: the same GGN, EK-FAC and, for the loss itself, the same values.
    """
    inner = seeded(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    results = []
    for kind in (PredictionType.EPSILON, PredictionType.SAMPLE, PredictionType.V):
        process = noise_levels(kind)
        weighting = {
            PredictionType.EPSILON: None,
            PredictionType.SAMPLE: process.snr_T,
            PredictionType.V: process.alphas_T.square(),
        }[kind]
        regression = plain_regression(
            Reparametrised(inner, process, kind),
            (3,),
            process=process,
            objective={"weighting": weighting},
        )
        G = to_dense(DiffusionGGNLinearOperator(regression))
        EK = to_dense(DiffusionEKFACLinearOperator(regression, fisher_type="type-2"))
        E = to_dense(DiffusionKFACLinearOperator(regression, fisher_type="empirical"))
        results.append((G, EK, E))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert_close(other, one, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.float16, 0.005)]
)
def test_lower_precision(dtype, tolerance):
    """Models of lower precision have float32 factors that agree with float64's.

    The float64 twin has the lower precision's weights and sees the same draws, so what is left is
    rounding in the network.
    """
    low = seeded(
        nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1), dtype=dtype
    )
    high = seeded(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    high.load_state_dict({k: v.double() for k, v in low.state_dict().items()})
    x0 = images(4, size=6, dtype=torch.float32)
    pairs = []
    for model in (low, high):
        regression = NoisedRegression(DenoisingObjective(model, noise_levels()), x0, 4)
        K = DiffusionKFACLinearOperator(regression)
        V = torch.randn(K.shape[1], 3, generator=torch.Generator().manual_seed(0))
        G = DiffusionGGNLinearOperator(regression)
        EK = DiffusionEKFACLinearOperator(regression)
        pairs.append((K, EK, K @ V.to(K.dtype), G @ V.to(G.dtype), EK.trace()))
    K, EK = pairs[0][:2]
    assert K.dtype == EK.dtype == torch.float32
    assert all(t.dtype == torch.float32 for p in K.blocks for t in p.block.tensors().values())
    assert all(t.dtype == torch.float32 for p in EK.blocks for t in p.block.tensors().values())
    for result, truth in zip(pairs[0][2:], pairs[1][2:], strict=True):
        assert result.dtype == torch.float32
        assert_close(result, truth, tolerance)


def test_autocast():
    """The network's passes are in bfloat16; what is made of them is not."""
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)
    model = seeded(*layers, dtype=torch.float32)
    x0 = images(4, size=6, dtype=torch.float32)
    full, low = (
        NoisedRegression(DenoisingObjective(model, noise_levels(), autocast=precision), x0, 4)
        for precision in (None, torch.bfloat16)
    )
    v = torch.randn(77, generator=torch.Generator().manual_seed(0))
    for kind in (DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator):
        truth, result = kind(full), kind(low)
        assert result.dtype == torch.float32
        assert 1e-5 < relative_error(result @ v, truth @ v) < 0.02
    assert 1e-5 < relative_error(*(DiffusionGGNLinearOperator(r) @ v for r in (low, full))) < 0.02
    rows = [ExampleGradientLinearOperator(r).rows() for r in (low, full)]
    assert 1e-5 < relative_error(*rows) < 0.02

    # the first layer's inputs are the same in both, so are their float32 moments
    K, K_low = DiffusionKFACLinearOperator(full), DiffusionKFACLinearOperator(low)
    factors = [operator.blocks[0].block.input_factor for operator in (K_low, K)]
    assert_close(*factors, 1e-6)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"torch.autocast is on for 'cpu'.*pass autocast=torch"),
    ):
        DiffusionKFACLinearOperator(full)
    with pytest.raises(ValueError, match=r"`autocast` must be torch.bfloat16, .* got 'bf16'"):
        DenoisingObjective(model, noise_levels(), autocast="bf16")


# ---------------------------------------------------------------------------------------------
# Cheaper second passes of EK-FAC
# ---------------------------------------------------------------------------------------------


def conv_regression(count, num_draws, seed=0, batch_size=8, **options):
    model = seeded(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 1, 3, padding=1))
    return plain_regression(
        model,
        (1, 4, 4),
        count=count,
        num_draws=num_draws,
        seed=seed,
        batch_size=batch_size,
        **options,
    )


def eigenvalues(operator):
    kronecker = [placed.block for placed in operator.blocks if placed.kind == "eigenbasis"]
    return torch.cat([block.eigenvalues.flatten() for block in kronecker])


def test_eigenvalues_equal_a_plain_loop():
    regression = conv_regression(11, 2, batch_size=3)
    EK = DiffusionEKFACLinearOperator(regression)
    layer = regression.objective.model.layers[2]
    truth = 0
    for batch in regression.batches():
        probe = regression.draws.probe(
            batch.indices, batch.common_draw, 0, 16, ProbeType.RADEMACHER
        )
        v = (2 * batch.weight_B).sqrt().unsqueeze(1) * probe
        prediction = regression.objective.predict(batch)
        for output in (prediction * v).sum(1):
            (g,) = torch.autograd.grad(output, layer.weight, retain_graph=True)
            bases = next(p.block for p in EK.blocks if p.name == "layers.2.weight")
            rotated = bases.output_basis.T @ g.flatten(1) @ bases.input_basis
            truth = truth + rotated**2 / regression.num_samples
    assert_close(bases.eigenvalues, truth, 1e-10)


def test_draws_of_the_second_pass():
    """By default all, as long as there are not very many; the factors see all in each case."""
    regression = conv_regression(6, 4)
    fewer = DiffusionEKFACLinearOperator(regression, eigenvalue_draws=2)
    assert_close(eigenvalues(fewer), eigenvalues_of_draws(regression, 2), 1e-12)
    default = DiffusionEKFACLinearOperator(regression)
    assert_close(eigenvalues(default), eigenvalues_of_draws(regression, 4), 1e-12)


def eigenvalues_of_draws(regression, num_draws):
    coverage = covered_parameters(regression.objective.model, None)
    plan = BlockPlan.of(coverage, KFACOptions())
    factors = kronecker_factors(regression, plan)
    bases = [
        {key: eigendecomposition(M, key) for key, M in matrices.items()}
        for matrices in (factors.inputs, factors.outputs)
    ]
    found = eigenvalue_moments(regression.with_draws(num_draws), plan, *bases)
    return torch.cat([found[key].flatten() for key in factors.inputs])


@pytest.mark.parametrize(
    ("num_data", "options", "expected"),
    [
        (100, {}, 8),
        (2**13, {}, 4),
        (2**20, {}, 1),
        (2**13, {"eigenvalue_draws": 7}, 7),
        (2**20, {"fisher_type": "type-2"}, 8),
    ],
)
def test_the_number_of_draws_of_the_second_pass(num_data, options, expected):
    regression = SimpleNamespace(
        num_data=num_data, num_draws=8, draws=make_draws("uniform", 8, 0, 10)
    )
    assert KFACOptions(**options).num_eigenvalue_draws(regression) == expected
    listed = SimpleNamespace(num_data=2**20, num_draws=9, draws=make_draws([1, 2, 3], 9, 0, 10))
    if not options:  # all listed levels alike
        assert KFACOptions(**options).num_eigenvalue_draws(listed) == 3


# ---------------------------------------------------------------------------------------------
# Long ones: `make test-slow`
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ekfac_of_a_unet_has_an_unbiased_trace():
    """On convolutions and attention, over images, timesteps, noise and loss vectors."""
    ratios = []
    for seed in range(60):
        regression = unet_regression(count=8, num_draws=2, seed=seed, batch_size=8)
        estimate = DiffusionEKFACLinearOperator(regression, mc_samples=16).trace()
        truth = DiffusionEKFACLinearOperator(regression, fisher_type="type-2").trace()
        ratios.append(estimate / truth)
    deviation, relative = _deviation(ratios, 1.0)
    assert abs(deviation) < 4
    assert relative < 0.05 / 8
