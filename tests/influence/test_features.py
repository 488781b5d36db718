"""Attribution by features alone, against loops, and as a method beside those of the network."""

import json
import re
from itertools import combinations
from math import dist, exp
from statistics import median_low

import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn.functional import interpolate

from curvlinops_diffusion import Attributor, DenoisingObjective, ExampleGradientLinearOperator
from curvlinops_diffusion.baselines import feature_regression_scores
from curvlinops_diffusion.influence.features import pixels_of
from curvlinops_diffusion.influence.methods import Method, scores_of
from curvlinops_diffusion.page.rankings import Sizes, meaning
from tests.cases import images, tiny_unet
from tests.diffusion.test_shapes import Shaped, problem

N, Q, F = 7, 2, 5


def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(Q, F, generator=generator), torch.randn(N, F, generator=generator)


@pytest.mark.parametrize("squared", [False, True])
def test_as_loops(squared):
    query, train = features()
    rows, asked = train.double().tolist(), query.double().tolist()
    scale = 2 * (0.7 * median_low([dist(a, b) for a, b in combinations(rows, 2)])) ** 2
    gram = torch.tensor([[exp(-(dist(a, b) ** 2) / scale) for b in rows] for a in rows])
    cross = torch.tensor([[exp(-(dist(a, b) ** 2) / scale) for b in rows] for a in asked])
    expected = cross.double() @ torch.linalg.inv(gram.double() + 0.3 * torch.eye(N).double())
    found = feature_regression_scores(query, train, bandwidth=0.7, ridge=0.3, squared=squared)
    torch.testing.assert_close(found, expected**2 if squared else expected, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def x():
    return images(N, dtype=torch.float32)


@pytest.fixture(scope="module")
def attributor(x):
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    objective = DenoisingObjective(unet, DDPMScheduler(100))
    return Attributor(objective, x, progressbar=False).fit("kfac", num_draws=1)


def test_a_method_beside_those_of_the_network(x, attributor, tmp_path):
    """It needs no draws, so that no halves of them tell how sure it is."""
    result = attributor.score(x[:Q] / 2, method=["influence", "pixels"], num_draws=4)
    alone = attributor.score(x[:Q] / 2, method="influence", num_draws=4)
    assert torch.equal(result.by_method["influence"], alone.scores)
    assert result.agreement == alone.agreement
    expected = feature_regression_scores((x[:Q] / 2).flatten(1), x.flatten(1))
    assert torch.equal(result.by_method["pixels"], expected)
    assert result.halves["pixels"] is None
    table = result.to_pandas()
    shares = table.groupby("method")["share"].count()
    assert dict(shares) == {"influence": Q * N, "pixels": 0}  # which are shares of nothing
    result.report(tmp_path / "page.html")
    assert (
        "a kernel regression on the pixels of the 7 images" in (tmp_path / "page.html").read_text()
    )
    only = attributor.score(x[:Q] / 2, method="pixels", num_draws=4)
    assert torch.equal(only.scores, expected)
    assert only.agreement is None
    with pytest.raises(ValueError, match="needs a pipeline with an autoencoder"):
        attributor.score(x[:Q], method="latents", num_draws=2)


def test_images_of_several_shapes_keep_their_places():
    """Though batches are of one shape each, of which the largest comes first."""
    data, query = Shaped(), Shaped()
    query.images, query.shapes = query.images[1:3], query.shapes[1:3]
    regressions = problem(data=data), problem(data=query)
    train, asked = pixels_of(regressions[0]), pixels_of(regressions[1], (1, 8, 8))
    assert train.shape == (6, 1, 8, 8)
    for found, of in ((train, data), (asked, query)):
        expected = [interpolate(z[None].float(), (8, 8), mode="area")[0] for z in of.images]
        assert torch.equal(found, torch.stack(expected))
    J_train, J_query = map(ExampleGradientLinearOperator, regressions)
    found = scores_of([Method.PIXELS], J_query, None, J_train, ridge=1.0, query_block=1)
    scores, _ = found[Method.PIXELS]
    assert scores.argmax(1).tolist() == [1, 2]


def test_each_of_all_methods_has_a_sentence():
    sizes = Sizes.of(torch.ones(Q, N), {"values": [2.0] * Q}, "latents")
    assert sizes.text(0, 0.5) == "+0.5"
    texts = [meaning(None, sizes, N, method, k, 5) for k, method in enumerate(Method)]
    assert [text.split()[1] for text in texts] == ["first", "second", "third", "fourth", "fifth"]
    assert ["predicted change" in text for text in texts] == [True, *[False] * 4]


def test_an_embedding(tmp_path):
    """By a function, which the file of the scores is known by."""
    x = images(N, dtype=torch.float32)
    objective = DenoisingObjective(
        tiny_unet(torch.float32, num_class_embeds=None), DDPMScheduler(100)
    )
    attributor = Attributor(objective, x, progressbar=False, batch_size=3)

    def corners(x_BCHW):
        return x_BCHW[..., :2, :2]

    file = tmp_path / "scores.safetensors"
    options = {"method": "embedding", "num_draws": 1, "output": file}
    found = attributor.score(x[:Q] / 2, embedding=corners, **options).scores
    own, of_queries = (z[..., :2, :2].flatten(1) for z in (x, x[:Q] / 2))
    assert torch.equal(found, feature_regression_scores(of_queries, own))
    as_array = attributor.score(
        x[:Q] / 2, method="embedding", embedding=lambda z: corners(z).numpy()
    ).scores
    assert torch.equal(as_array, found)
    with pytest.raises(ValueError, match=r"made with others: query\.embedding"):
        attributor.score(x[:Q] / 2, embedding=lambda z: z, **options)
    with pytest.raises(ValueError, match=r"a row for each of 2 images, got \(1, 64\)"):
        attributor.score(x[:Q], method="embedding", embedding=lambda z: z[:1].flatten(1))
    for method, given, match in (("embedding", None, "without an"), ("pixels", corners, "with an")):
        with pytest.raises(ValueError, match=match):
            attributor.score(x[:Q], method=method, embedding=given)


def test_an_order_without_a_unit(x, attributor, tmp_path):
    """Neither shares of a loss nor helpful signs; nothing that draws could make surer."""
    result = attributor.score(x[:Q] / 2, method=["pixels", "influence"], num_draws=4)
    table = result.to_pandas()
    own, other = table[table.method == "pixels"], table[table.method == "influence"]
    assert own.share.isna().all()
    assert other.share.notna().all()
    assert set(own.effect) == {"alike"}
    assert set(other.effect) <= {"helps", "hinders"}
    assert str(result).endswith("They look at the images alone: no draws could make them surer.")
    result.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    told = json.loads(re.findall(r'id="data">(.+)</script>', page)[0])
    assert (told["units"][0], told["sign"]) == ("", 0)
    assert "<h3>alike</h3>" in page
    assert "<h3>helps" not in page
    assert "No training image does" not in page
    assert "(pixels), by which they are ordered, is the square of its weight in a kernel" in page
    for options, match in (
        ({"num_draws": "auto"}, "needs a first method whose order draws make surer, got 'pixels'"),
        (
            {"measurement": "log_likelihood"},
            "'pixels' has no negative scores, which all would be of",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            attributor.score(x[:Q] / 2, method="pixels", **options)


def test_refused():
    query, train = features()
    with pytest.raises(ValueError, match=r"\[Q, F\] and \[N, F\], got \(2, 4\) and \(7, 5\)"):
        feature_regression_scores(query[:, :4], train)
    with pytest.raises(ValueError, match="Half of the pairs of training images or more have"):
        feature_regression_scores(query, torch.ones(N, F))
    with pytest.raises(ValueError, match="`ridge` must be positive"):
        feature_regression_scores(query, train, ridge=0)
