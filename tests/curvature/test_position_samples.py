"""Factors from a sample of the positions: as a plain loop, unbiased, whatever the batches."""

import pytest
import torch
from torch import nn

from curvlinops_diffusion import DiffusionEKFACLinearOperator, DiffusionKFACLinearOperator
from curvlinops_diffusion.curvature.kronecker_factors import kronecker_factors
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.passes import CheckedLossVectors
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.draws import make_draws
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.layers.observation import WholeLayers, observed
from tests.cases import plain_regression, seeded, small_unet, unet_regression
from tests.comparisons import assert_close, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*in no supported layer")

MOST = 5


class Frames(nn.Module):
    """Every example is three frames, one after the other in the batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Twice(nn.Module):
    """Calls a layer on two images of different size."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + self.layer(x[..., ::2, :]).repeat_interleave(2, -2)


class Resized(nn.Module):
    """Its output has its input's size again."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return nn.functional.interpolate(self.layer(x), size=x.shape[2:])


LAYERS = {
    "tokens": (nn.Linear(3, 3), (7, 3)),
    "convolution": (nn.Conv2d(2, 2, 3, padding=1), (2, 4, 6)),
    "strided": (
        Resized(nn.Conv2d(2, 2, (2, 3), (1, 2), (3, 1), (1, 2), bias=False)),
        (2, 6, 7),
    ),
    "groups": (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 3, 4)),
    "three dimensions": (nn.Conv3d(1, 1, 3, padding=1), (1, 2, 3, 4)),
    "transposed": (nn.ConvTranspose2d(2, 2, 3, padding=1), (2, 4, 4)),
    "frames": (Frames(nn.Conv2d(2, 2, 3, padding=1)), (3, 2, 4, 4)),
    "twice": (Twice(nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 4)),
    "few positions": (nn.Linear(3, 3), (5, 3)),
}


def problem(layer, shape, **options):
    model = seeded(layer)
    # loss and gradients that depend on where one looks
    model.layers.append(nn.Tanh())
    return plain_regression(model, shape, count=3, num_draws=2, batch_size=2, **options)


def factors(regression, **options):
    plan = BlockPlan.of(
        covered_parameters(regression.objective.model, None), KFACOptions(**options)
    )
    return kronecker_factors(regression, plan), plan


def looped(regression, plan):
    """``A`` and ``B`` of the only layer, position by position."""
    (layer,) = plan.coverage.layers
    kind, module = layer.kind, layer.module
    A, B, seen = 0.0, 0.0, []
    vectors = CheckedLossVectors(regression, plan.options)

    class Seen(WholeLayers):
        def whole(self, layer, xs, gs, N):
            seen.extend([xs, gs])

    with observed(regression.objective, plan.coverage.layers, Seen(torch.float64)) as network:
        for batch in regression.batches():
            seen.clear()
            network.run(batch, vectors)
            xs, gs = seen
            N = len(batch.indices)
            calls = [kind.inputs(module, x) for x in xs], [kind.gradients(module, g) for g in gs]
            rows = [[z.unflatten(0, (N, -1)) for z in of] for of in calls]
            S = sum(a.shape[1] * a.shape[-2] for a in rows[0])
            totals = [0.0, 0.0]
            for side, share in enumerate((1 / S, 1.0)):
                for z in rows[side]:  # [N, M, *g, S, I]
                    own = z.shape[-2]
                    for position, n in enumerate(batch.indices):
                        chosen = torch.arange(own)
                        if own > MOST:
                            (chosen,) = regression.draws.positions(
                                [n], batch.common_draw, MOST, own
                            )
                        v = z[position][..., chosen, :]  # [M, *g, m, I]
                        outer = (v.unsqueeze(-1) * v.unsqueeze(-2)).sum(-3).sum(0)
                        totals[side] = totals[side] + share * own / len(chosen) * outer
            A, B = A + totals[0], B + totals[1]
    return A / regression.num_samples, B / regression.num_samples


@pytest.mark.parametrize("name", LAYERS)
def test_as_a_plain_loop(name):
    regression = problem(*LAYERS[name])
    found, plan = factors(regression, max_positions=MOST)
    A, B = looped(regression, plan)
    (part,) = (part for part in plan.parts if not part.is_bias)
    assert_close(found.inputs[part.key], A, 1e-12)
    assert_close(found.outputs[part.output_key], B, 1e-12)
    whole, _ = factors(regression)
    differs = relative_error(whole.inputs[part.key], A) > 1e-3
    assert differs == (name != "few positions")


def test_weight_and_bias_together():
    """The last row of ``A`` is the mean over the same positions, its corner one."""
    regression = problem(*LAYERS["convolution"])
    found, plan = factors(regression, max_positions=MOST)
    joint, joint_plan = factors(regression, max_positions=MOST, separate_weight_and_bias=False)
    (A,) = found.inputs.values()
    (A_joint,) = joint.inputs.values()
    assert_close(A_joint[:-1, :-1], A, 1e-12)
    assert_close(A_joint[-1, -1], torch.ones((), dtype=torch.float64), 1e-12)
    assert joint_plan.parts[0].shape[-1] == plan.parts[0].shape[-1] + 1


def test_every_position_is_drawn_equally_often():
    """On average ``m/S`` times, also where ``m`` does not divide ``S``."""
    draws = make_draws("stratified", 1, 0, 10)
    index = draws.positions(range(40_000), 0, 4, 7)
    assert index.shape == (40_000, 4)
    counts = torch.bincount(index.flatten(), minlength=7) / 40_000
    assert (counts - 4 / 7).abs().max() < 0.01  # five standard errors
    assert (index.diff(dim=1) >= 0).all()
    assert torch.equal(draws.positions([7, 3], 0, 4, 7), index[[7, 3]])
    other = draws.positions(range(100), 1, 4, 7)
    assert not torch.equal(other, index[:100])


def test_the_scale_is_right():
    """On the same draws, averaged over many: 5 % would be seen."""
    model = seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))
    regression = plain_regression(model, (1, 6, 6), count=50, num_draws=80, batch_size=50)
    sampled, plan = factors(regression, max_positions=3)
    whole, _ = factors(regression)
    for kind in ("inputs", "outputs"):
        for key, truth in getattr(whole, kind).items():
            assert relative_error(getattr(sampled, kind)[key], truth) < 0.04, key
    assert len(plan.coverage.layers) == 2


def test_batches_and_as_many_positions_as_there_are():
    unet = small_unet()
    options = {"max_positions": 6, "separate_weight_and_bias": False}
    one, other = (
        DiffusionKFACLinearOperator(
            unet_regression(unet, count=5, batch_size=b, antithetic=True), **options
        )
        for b in (2, 5)
    )
    v = torch.linspace(-1, 1, one.shape[0], dtype=torch.float64)
    assert_close(one @ v, other @ v, 1e-10)
    regression = unet_regression(unet)
    whole = DiffusionKFACLinearOperator(regression) @ v
    assert torch.equal(DiffusionKFACLinearOperator(regression, max_positions=64) @ v, whole)
    assert relative_error(one @ v, whole) > 1e-3


def test_exact_parts_stay_exact():
    """Eigenvalues, biases and norms are those of all positions."""
    regression = unet_regression(small_unet())
    whole = DiffusionEKFACLinearOperator(regression)
    sampled = DiffusionEKFACLinearOperator(regression, max_positions=6)
    assert_close(sampled.trace(), whole.trace(), 1e-10)
    exact = [(a, b) for a, b in zip(whole.blocks, sampled.blocks, strict=True) if a.kind == "dense"]
    assert len(exact) > 10
    for a, b in exact:
        assert_close(b.block.trace(), a.block.trace(), 1e-12)
    assert sampled.info["options"]["max_positions"] == 6


def test_refused():
    with pytest.raises(ValueError, match="max_positions"):
        KFACOptions(max_positions=0)
    with pytest.raises(ValueError, match="sums over positions before it multiplies"):
        KFACOptions(max_positions=64, kfac_approx="reduce")
