"""Checks of an attributor: what is asked, with which network, and what is written."""

import html
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from curvlinops_diffusion import (
    Attributor,
    DenoisingObjective,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    influence_scores,
    validation,
)
from curvlinops_diffusion.influence.agreement import rank_correlations
from curvlinops_diffusion.influence.validation.probes import chosen, copies_of, shuffled
from tests.cases import images, tiny_unet

COUNT, ASKED, DRAWS, DAMPING = 12, 3, 4, 1e-2


@pytest.fixture(scope="module")
def attributor():
    unet = tiny_unet(torch.float32)
    objective = DenoisingObjective(unet, DDPMScheduler(num_train_timesteps=100))
    data = {"x0": images(COUNT, dtype=torch.float32), "class_labels": torch.arange(COUNT) % 3}
    return Attributor(objective, data, progressbar=False).fit(num_draws=2)


@pytest.fixture(scope="module")
def found(attributor):
    before = {k: v.clone() for k, v in attributor.objective.model.state_dict().items()}
    groups = [f"{n % 3}" for n in range(COUNT)]
    options = {"num_queries": ASKED, "num_draws": DRAWS, "damping": DAMPING, "group_by": groups}
    found = validation.check(attributor, **options)
    now = attributor.objective.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in now.items())
    return found


def test_numbers_are_of_the_library_s_scores(attributor, found):
    """By its functions one by one, with the weights shuffled by hand."""
    train, numbers = attributor.regression, chosen(COUNT, ASKED, 0)
    J_train = attributor.gradients(num_draws=DRAWS)
    _, queries = copies_of(train, numbers, DRAWS)
    J_query = ExampleGradientLinearOperator(queries)
    inverse = attributor.operator.inverse(damping=DAMPING)
    scores = influence_scores(J_query, inverse, J_train)
    unet = attributor.objective.model
    with shuffled(unet, [name for name, _ in unet.named_parameters()], 0):
        other = DiffusionKFACLinearOperator(train.with_draws(2)).inverse(damping=DAMPING)
        others = influence_scores(J_query, other, J_train)
    checks = {check.name: check for check in found.checks}
    own = scores[range(ASKED), numbers].unsqueeze(1)
    ranks = (scores[:ASKED] >= own).sum(1)
    assert checks["itself"].value == pytest.approx(float((1 / ranks).mean()))
    cut = [
        torch.stack(
            [torch.cat([row[:n], row[n + 1 :]]) for n, row in zip(numbers, z, strict=False)]
        )
        for z in (scores, others)
    ]
    expected = float(rank_correlations(*cut).mean())
    assert checks["shuffled weights"].value == pytest.approx(expected, abs=1e-3)
    assert list(checks)[-2:] == ["same group", "pixels alone"]


def test_what_is_written(found, tmp_path):
    found.save(tmp_path / "check.json")
    read = json.loads((tmp_path / "check.json").read_text())
    assert read["training_images"] == COUNT
    assert [row["value"] for row in read["checks"]] == [check.value for check in found.checks]
    undefined = replace(found, checks=(replace(found.checks[0], value=float("nan")),))
    undefined.save(tmp_path / "check.json")
    assert "NaN" not in (tmp_path / "check.json").read_text()
    found.save(tmp_path / "check.html")
    page = html.unescape((tmp_path / "check.html").read_text())
    assert all(check.sentence in page for check in found.checks)
    assert "<script" not in page
    with pytest.raises(ValueError, match=r"must end in \.html or \.json"):
        found.save(tmp_path / "check.txt")
    text = str(found)
    assert all(check.verdict in text for check in found.checks)


def test_summaries(found):
    checks = [replace(check, passed=True) for check in found.checks]
    assert "They find faults and prove nothing" in replace(found, checks=tuple(checks)).summary
    failed = replace(found, checks=(replace(checks[0], passed=False), *checks[1:]))
    assert f"1 of {len(checks)} checks failed (itself)" in failed.summary
    assert not failed.passed


def test_without_shuffled_weights_or_halves(attributor):
    """Two draws cannot be halved; nothing else is asked than is said."""
    found = validation.check(
        attributor, num_queries=2, num_draws=2, damping=DAMPING, shuffle_weights=False
    )
    assert [check.name for check in found.checks] == [
        *("itself", "mirrored", "recompressed", "pixels alone"),
    ]


def test_what_cannot_be_checked(attributor):
    with pytest.raises(ValueError, match="must be the Attributor of one network, got Tensor"):
        validation.check(torch.zeros(2))
    with pytest.raises(ValueError, match="`num_queries`"):
        validation.check(attributor, num_queries=0)
    with pytest.raises(ValueError, match="Groups must have a name for each"):
        validation.check(attributor, group_by=["a"])
