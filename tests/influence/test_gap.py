"""The generalisation gap: against losses by hand, with a base network's as a control variate."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from curvlinops_diffusion import (
    Attributor,
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
    PassOptions,
)
from curvlinops_diffusion.checkpoints import averaged
from curvlinops_diffusion.influence.gap import generalisation_gap
from curvlinops_diffusion.influence.methods import Method
from curvlinops_diffusion.runtime.adapters import without_adapters
from tests.cases import StoppedError, images, plain_regression, stopped, two_convolutions
from tests.comparisons import assert_close


@pytest.fixture(scope="module")
def train():
    return plain_regression(two_convolutions(), (1, 4, 4), count=6, batch_size=4)


def test_equals_the_difference_of_mean_losses(train):
    x0 = images(5, size=4) * 3
    held_out = NoisedRegression(train.objective, x0, train.num_draws, seed=3)
    J, other = (ExampleGradientLinearOperator(r) for r in (train, held_out))
    gap = generalisation_gap(J, other)
    one, two = J.values(), other.values()
    assert gap.value == pytest.approx(float(two.mean() - one.mean()))
    assert gap.error == pytest.approx(float((two.var() / 5 + one.var() / 6) ** 0.5))
    assert gap.is_told == (gap.value > 2 * gap.error)
    with pytest.raises(ValueError, match="at least two images"):
        generalisation_gap(J, J.on(NoisedRegression(train.objective, x0[:1], 2)))


def adapted():
    """A network with a LoRA, and the adapter's parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    model = two_convolutions()
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), model)
    return model, [p for name, p in model.named_parameters() if "lora" in name]


def test_the_base_network_says_how_hard_images_are():
    """Of an adapter that scales the loss of every image alike, no spread is left."""
    model, trained = adapted()
    flags = [p.requires_grad for p in model.parameters()]
    objective = DenoisingObjective(model, plain_regression(model, (1, 4, 4)).objective.process)

    def gradients(count, seed):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.rand(count, 1, 1, 1, generator=generator).double() * 4
        x0 = torch.randn(count, 1, 4, 4, generator=generator).double() * scale
        return ExampleGradientLinearOperator(NoisedRegression(objective, x0, 8, seed=seed))

    J, other = gradients(8, 0), gradients(7, 1)
    gap = generalisation_gap(J, other)
    raw = other.values().mean() - J.values().mean()
    # an adapter of zero is the base network: nothing is left of difficulty, and no gap
    assert abs(gap.value) < 1e-12 < abs(float(raw))
    assert [p.requires_grad for p in model.parameters()] == flags
    with torch.no_grad():
        for p in trained:
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert generalisation_gap(J, other).error < 0.5 * float(
        (J.values().var() / 8 + other.values().var() / 7) ** 0.5
    )


def test_a_fused_adapter_is_of_the_base_network():
    """PEFT would take it out of the weights, and not put it back."""
    model, trained = adapted()
    for p in trained:
        p.data.fill_(0.5)
    layer = next(module for module in model.modules() if hasattr(module, "merge"))
    layer.merge()
    before = layer.base_layer.weight.clone()
    with without_adapters(model) as there_are:
        assert not there_are
        layer(images(1, size=4))
    assert torch.equal(layer.base_layer.weight, before)


def test_losses_are_gone_on_with(train, tmp_path):
    """From the batch at which a pass was stopped."""
    J = ExampleGradientLinearOperator(train)
    other = ExampleGradientLinearOperator(train.with_seed(5))
    expected = generalisation_gap(J, other)
    passes = PassOptions(tmp_path, 0.0)
    with stopped(type(J), "values_of", at=3), suppress(StoppedError):
        generalisation_gap(J, other, passes)
    with stopped(type(J), "values_of", at=100) as seen:
        assert generalisation_gap(J, other, passes) == expected
    assert len(seen) == 2


def test_regression_takes_the_gap_for_its_unit(train, tmp_path):
    """Scores of an attributor are multiplied by it; where it is not told they keep their order."""
    data = images(6, size=4)
    attributor = Attributor(train.objective, data).fit("kfac", num_draws=2)
    queries = data[:2] / 2
    options = {"num_draws": 4, "damping": 1e-3, "method": ["regression", "influence"]}
    plain = attributor.score(queries, **options)
    far = images(40, size=4)[10:] * 100
    found = attributor.score(queries, held_out=far, **options)
    gap = found.header["gap"]
    assert gap["num_held_out"] == 30
    assert gap["value"] > 2 * gap["error"]
    assert_close(found.scores, gap["value"] * plain.scores, 1e-12)
    one, two = (r.halves["regression"].first for r in (found, plain))
    assert_close(one, gap["value"] * two, 1e-12)
    assert_close(found.by_method["influence"], plain.by_method["influence"], 1e-12)
    assert "gap" not in plain.header
    output = tmp_path / "untold.safetensors"
    for _ in range(2):  # and of the file
        with pytest.warns(UserWarning, match="not told from zero"):
            untold = attributor.score(queries, held_out=data[:3] * 0.9, output=output, **options)
        assert torch.equal(torch.as_tensor(untold.scores), plain.scores)
        assert not Method.REGRESSION.has_unit(untold.header)
        assert Method.REGRESSION.has_unit(found.header)
    with pytest.raises(ValueError, match=r"query.held_out"):
        attributor.score(queries, output=output, **options)
    # averages over checkpoints are in the unit of the gap if all are
    both = averaged([found, found])
    assert_close(both.scores, found.scores, 1e-12)
    assert both.header["gap"] == gap
    mixed = averaged([found, replace(plain, header=untold.header)])
    assert_close(mixed.scores, plain.scores, 1e-12)
    assert not Method.REGRESSION.has_unit(mixed.header)
    with pytest.raises(ValueError, match="Add 'regression'"):
        attributor.score(queries, held_out=far, method="influence", num_draws=4)
