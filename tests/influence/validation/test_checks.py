"""Checks of scores without retraining: sound scores pass, and each check can fail."""

from dataclasses import replace

import pytest
import torch

from curvlinops_diffusion.influence.agreement import SplitHalfScores
from curvlinops_diffusion.influence.validation.checks import Probes, checks_of

Q, N, CLASSES = 12, 120, 4
NUMBERS = list(range(0, N, N // Q))
CLASS = [str(n % CLASSES) for n in range(N)]


def noise(number):
    return torch.randn(Q, N, generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def sound():
    """Scores with an image itself far ahead, then its class, then what the images have alike."""
    alike = torch.tensor([[float(CLASS[n] == CLASS[m]) for m in range(N)] for n in NUMBERS])
    own = torch.zeros(Q, N)
    own[range(Q), NUMBERS] = 20.0
    truth = own + 3 * alike + noise(0)
    halves = SplitHalfScores(truth, truth + noise(1) / 3, truth + noise(2) / 3)
    return Probes(
        NUMBERS,
        {"itself": truth, "mirrored": truth, "recompressed": truth},
        halves,
        noise(3),
        {"pixels": own + noise(0)},
        {"class": CLASS},
    )


def found(probes):
    return {check.name: check for check in checks_of(probes)}


def test_sound_scores_pass(sound):
    checks = found(sound)
    assert list(checks) == [
        *("itself", "mirrored", "recompressed", "halves"),
        *("shuffled weights", "same class", "pixels alone"),
    ]
    assert {check.verdict for check in checks.values()} == {"passed", "informs"}
    assert checks["itself"].value == 1
    assert "comes first for 12 of 12 images" in checks["itself"].sentence
    assert checks["same class"].value > 0.9
    assert checks["same class"].chance == pytest.approx((N / CLASSES - 1) / (N - 1))


def test_scrambled_scores_fail(sound):
    """Each training image has the scores of another."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    checks = found(replace(sound, scores={k: z[:, order] for k, z in sound.scores.items()}))
    for name in ("itself", "recompressed"):
        assert checks[name].passed is False
        assert checks[name].value < 5 * checks[name].chance
    assert checks["same class"].value < 2 * checks["same class"].chance


def test_halves_of_noise_fail(sound):
    checks = found(replace(sound, halves=SplitHalfScores(noise(0), noise(1), noise(2))))
    assert checks["halves"].passed is False
    assert checks["halves"].value < 3 * checks["halves"].chance


@pytest.mark.parametrize("others", ["the same", "constant"])
def test_scores_that_do_not_look_at_weights_fail(sound, others):
    own = sound.scores["itself"]
    shuffled = own * 2 if others == "the same" else torch.zeros(Q, N)
    assert found(replace(sound, shuffled=shuffled))["shuffled weights"].passed is False


def test_numbers_against_their_definitions():
    """By hand, of two images among four."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 3.0, 2.0]])
    probes = Probes(
        [1, 3],
        {"itself": scores},
        shuffled=scores.flip(1),
        groups={"class": ["a", "a", "b", "c"]},
    )
    checks = found(probes)
    assert checks["itself"].value == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert checks["itself"].chance == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    # of the others: (4, 2, 1) and (1, 2, 4); (1, 4, 3) and (2, 3, 4)
    assert checks["shuffled weights"].value == pytest.approx((-1 + 0.5) / 2)
    # the second's class has no other image
    assert (checks["same class"].value, checks["same class"].chance) == (1, pytest.approx(1 / 3))


def test_ties_count_against_an_image(sound):
    """So that constant scores find nothing."""
    checks = found(replace(sound, scores={"itself": torch.zeros(Q, N)}))
    assert checks["itself"].value == pytest.approx(1 / N)
