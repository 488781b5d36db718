"""The door: from images to scores in one call, equal to the operators below it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from curvlinops_diffusion import (
    Attributor,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    StoredScores,
    group_influence_scores,
    influence_scores,
    regression_scores,
)
from curvlinops_diffusion import attributor as attributor_module
from curvlinops_diffusion.attribution import Attribution
from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.methods import scores_of
from curvlinops_diffusion.linalg.operator_files import OPERATOR
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.network import Network
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cases import images, plain_regression, two_convolutions
from tests.cli.cases import write_problem
from tests.comparisons import assert_close

DRAWS = {"num_draws": 4, "damping": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, training images and queries."""
    return write_problem(tmp_path_factory.mktemp("door"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return DDPMPipeline.from_pretrained(folder / "pipeline")


@pytest.fixture(scope="module")
def attributor(folder, pipeline):
    return Attributor.from_pipeline(pipeline, folder / "train", progressbar=False).fit(num_draws=3)


@pytest.fixture(scope="module")
def result(folder, attributor):
    return attributor.score(folder / "queries", **DRAWS)


@pytest.fixture(scope="module")
def own():
    """A network of one's own, its operators by hand, and the attributor of the same."""
    objective = plain_regression(two_convolutions(), (1, 4, 4)).objective
    data, queries = images(6, size=4), images(2, size=4) / 2
    EK = DiffusionEKFACLinearOperator(NoisedRegression(objective, data, 2))
    options = {"num_draws": 4, "antithetic": True}
    J_train = ExampleGradientLinearOperator(NoisedRegression(objective, data, **options))
    J_query = ExampleGradientLinearOperator(NoisedRegression(objective, queries, seed=1, **options))
    return (J_query, EK.inverse(1e-3), J_train), Attributor(objective, data), queries


def test_equals_the_operators(own):
    operators, attributor, queries = own
    result = attributor.fit(num_draws=2).score(queries, method="influence", **DRAWS)
    assert_close(result.scores, influence_scores(*operators), 1e-12)
    default = attributor.score(queries, **DRAWS)
    assert_close(default.scores, regression_scores(*operators), 1e-10)
    assert result.scores.shape == (2, 6)
    assert attributor.operator.trace() > 0
    J = attributor.gradients(num_draws=4)
    assert torch.equal(J.rows(), operators[2].rows())


def test_groups_are_those_of_summed_gradients(own):
    """Of which no scores of single images are made."""
    operators, attributor, queries = own
    result = attributor.fit(num_draws=2).score(queries, method="influence", **DRAWS)
    numbers = [0, 1, 1, 0, 2, 1]
    expected_QK = group_influence_scores(*operators, torch.tensor(numbers))
    found = result.groups([f"group {k}" for k in numbers])
    for q, query in enumerate(result.queries.names):
        sums = {row.group: row.sum for row in found if row.query == query}
        ours_K = torch.tensor([sums[f"group {k}"] for k in range(3)], dtype=torch.float64)
        assert_close(ours_K, expected_QK[q].double(), 1e-10)


def test_several_methods_out_of_one_pass(own):
    operators, attributor, queries = own
    result = attributor.fit(num_draws=2).score(
        queries, method=["regression", "influence"], ridge=2.0, **DRAWS
    )
    assert list(result.by_method) == ["regression", "influence"]
    assert_close(result.scores, regression_scores(*operators, ridge=2.0), 1e-10)
    assert_close(result.by_method["influence"], influence_scores(*operators), 1e-10)
    halves = result.halves["influence"]
    assert_close(halves.scores, result.by_method["influence"], 1e-12)
    assert not torch.equal(halves.first, halves.second)


def test_draws_until_the_first_images_are_told(own, tmp_path, monkeypatch):
    """The first number of draws that is enough, at which it is the plain result; goes on later."""
    _, attributor, queries = own
    attributor.fit(num_draws=2)
    asked, path = {"damping": 1e-3}, tmp_path / "s.safetensors"
    plain = {n: attributor.score(queries, num_draws=n, **asked) for n in (16, 32, 64)}
    computed = []

    def counted(methods, J_query, G_inv, J_train, **options):
        computed.append((J_train.regression.draws.num_draws, J_query.regression.draws.num_draws))
        return scores_of(methods, J_query, G_inv, J_train, **options)

    monkeypatch.setattr(attributor_module, "scores_of", counted)
    for last in (32, 64):
        answers = iter([n == last for n in (16, 32, 128)])  # 128 are more than there may be
        monkeypatch.setattr(Agreement, "is_settled", property(lambda self: next(answers)))  # noqa: B023
        computed.clear()
        told = {"num_draws": "auto", "max_draws": 127, **asked}
        found = attributor.score(queries, **told)
        assert torch.equal(found.scores, plain[last].scores)
        assert computed == [(n, n) for n in (16, 32, 64) if n <= last]
    monkeypatch.setattr(Agreement, "is_settled", False)
    computed.clear()
    for max_draws in (16, 32, 32):  # stopped, and started again
        told |= {"max_draws": max_draws, "output": path}
        found = attributor.score(queries, query_draws=8, **told)
    assert computed == [(16, 8), (32, 8)]
    assert torch.equal(StoredScores.open(path).whole(), found.scores)
    told |= {"max_draws": 64}
    for other in ({"damping": 1.0}, {"damping": 1.0, "num_draws": 64, "overwrite": "fewer draws"}):
        with pytest.raises(ValueError, match=r"made with others: .*damping"):
            attributor.score(queries, **{"query_draws": 8, **told, **other})
    more = {"num_draws": 16, "overwrite": "fewer draws"}
    with pytest.raises(ValueError, match=r"made with others: .*num_draws"):
        attributor.score(queries, query_draws=8, output=path, **asked, **more)
    # what a run that is stopped in the middle has begun with more draws stays
    begun = path.with_name(f"{path.name}.checkpoint")
    begun.mkdir()
    (begun / "part").touch()

    def stopped(methods, J_query, G_inv, J_train, **options):
        assert J_train.regression.draws.num_draws == 64
        assert (begun / "part").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(attributor_module, "scores_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        attributor.score(queries, query_draws=8, **told)
    for wrong, message in (
        ({"max_draws": 15}, "`max_draws` must be at least 16, the number of draws to begin with"),
        ({"query_draws": 6}, "`query_draws` must be a multiple of 4 to be halved"),
        ({"num_draws": "all"}, "must be a number or 'auto', got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            attributor.score(queries, **{"num_draws": "auto", **wrong})


def opened(path):
    return [Image.open(file) for file in sorted(path.iterdir())]


def as_tensor(path):
    pixels = [np.asarray(image.convert("L")) for image in opened(path)]
    return torch.tensor(np.stack(pixels)).unsqueeze(1).float() / 127.5 - 1


@pytest.mark.parametrize(
    "form", [lambda path: str(path), lambda path: sorted(path.iterdir()), opened, as_tensor]
)
def test_images_in_whatever_form(folder, pipeline, result, form):
    own = Attributor.from_pipeline(pipeline, form(folder / "train")).fit(num_draws=3)
    found = own.score(form(folder / "queries"), **DRAWS)
    assert torch.equal(found.scores, result.scores)


def test_the_first_of_each_query(result):
    for scores_N, found in zip(result.scores, result.top(3), strict=True):
        assert [image.rank for image in found] == [1, 2, 3]
        order = scores_N.argsort(descending=True)[:3].tolist()
        assert [image.name for image in found] == [f"image{n}.png" for n in order]
        assert [image.score for image in found] == scores_N[order].tolist()


def test_of_a_log_likelihood_the_negative_help(own):
    _, attributor, queries = own
    found = attributor.fit(num_draws=2).score(
        queries, measurement="squared_norm", num_draws=2, damping=1e-3
    )
    assert found.agreement is None  # two draws in a pair cannot be halved
    found.header["identity"]["query"]["measurement"] = "log_likelihood"
    ((first, *_), _) = found.top(1)
    assert first.score == float(found.scores[0].min())


def test_table_file_and_page(folder, attributor, result, tmp_path):
    missing = tmp_path / "missing"
    table = result.to_pandas()
    assert len(table) == result.scores.numel()
    best = table[(table["query"] == "image1.png") & (table["rank"] == 1)]
    assert best.image.item() == result.top(1)[1][0].name
    result.save(tmp_path / "scores.safetensors")
    stored = StoredScores.open(tmp_path / "scores.safetensors")
    assert torch.equal(stored.whole(), result.scores)
    assert stored.header["train"] == [f"image{n}.png" for n in range(7)]
    for write, output in ((attributor.fit, "e.safetensors"), (attributor.score, "s.safetensors")):
        with pytest.raises(ValueError, match=r"The folder '.*missing' does not exist. Create it"):
            write(*[folder / "queries"] * (write == attributor.score), output=missing / output)
    with pytest.raises(ValueError, match=r"must end in .safetensors, got '.*x.npy'"):
        attributor.score(folder / "queries", output=tmp_path / "x.npy")
    assert not missing.exists()
    result.report(tmp_path / "report.html")
    assert "image0.png" in (tmp_path / "report.html").read_text()
    # agreement beside what chance would give, of k = 3 of 7
    assert f"({9 / 7:.2g} by chance)" in str(result)


def test_saved_and_loaded(folder, pipeline, attributor, result, tmp_path):
    attributor.save(tmp_path / "ekfac.safetensors")
    loaded = Attributor.load(tmp_path / "ekfac.safetensors", pipeline, folder / "train")
    assert torch.equal(loaded.score(folder / "queries", **DRAWS).scores, result.scores)
    with pytest.raises(ValueError, match="was fitted to other images than those given"):
        Attributor.load(tmp_path / "ekfac.safetensors", pipeline, folder / "queries")
    with pytest.raises(ValueError, match="was fitted with another objective: reduction"):
        Attributor.load(tmp_path / "ekfac.safetensors", pipeline, folder / "train", reduction="sum")


def test_an_adapter_alone(folder, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"]), pipeline.unet)
    for name, p in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    own = Attributor.from_pipeline(pipeline, folder / "train").fit(num_draws=2)
    assert all("lora_" in name for name in own.operator.param_names)
    own.save(tmp_path / "ekfac.safetensors")
    plain = DDPMPipeline.from_pretrained(folder / "pipeline")
    with pytest.raises(ValueError, match="Load the adapter that it is of into the model first"):
        Attributor.load(tmp_path / "ekfac.safetensors", plain, folder / "train")
    more = Attributor.from_pipeline(pipeline, folder / "train", params=["conv_in.*"])
    assert more.fit(num_draws=2).operator.param_names == ("conv_in.weight", "conv_in.bias")


def test_it_goes_on(folder, pipeline, result, tmp_path):
    """What is finished is not computed again."""
    own = Attributor.from_pipeline(pipeline, folder / "train", checkpoint=tmp_path)
    found = own.fit(num_draws=3).score(folder / "queries", **DRAWS)
    assert torch.equal(found.scores, result.scores)
    calls = []
    hook = pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = Attributor.from_pipeline(pipeline, folder / "train", checkpoint=tmp_path)
    again.fit(num_draws=3)
    hook.remove()
    assert len(calls) < 60  # trials alone; the fit has 2 passes of 21 samples


def test_outputs_are_kept(folder, pipeline, tmp_path):
    """A file that holds the same is read; one of something else is refused by what differs."""
    own = Attributor.from_pipeline(pipeline, folder / "train", progressbar=False)
    operator, scores = tmp_path / "ekfac.safetensors", tmp_path / "scores.safetensors"
    first = own.fit(num_draws=2, output=operator).score(folder / "queries", output=scores, **DRAWS)
    written = [path.stat().st_mtime_ns for path in (operator, scores)]
    again = Attributor.from_pipeline(pipeline, folder / "train", progressbar=False)
    again.fit(num_draws=2, output=operator)
    found = again.score(folder / "queries", output=scores, **DRAWS)
    assert torch.equal(found.scores, first.scores)
    assert str(found) == str(first)
    assert [path.stat().st_mtime_ns for path in (operator, scores)] == written
    assert not list(tmp_path.glob("*.checkpoint"))
    told = r"exists, and was made with others: regression.num_draws \(2 there, 3 here\). Pass `over"
    with pytest.raises(ValueError, match=told):
        again.fit(num_draws=3, output=operator)
    with pytest.raises(ValueError, match=r"query.damping \(0.001 there, 0.1 here\)"):
        again.score(folder / "queries", output=scores, num_draws=4, damping=0.1)
    loaded = Attribution.load(scores, folder / "train", folder / "queries")
    assert torch.equal(loaded.scores, first.scores)
    assert loaded.top(2) == first.top(2)
    with pytest.raises(ValueError, match=r"`queries` must be the 2 images that .* got 7 others"):
        Attribution.load(scores, folder / "train", folder / "train")


def test_files_of_another_network_or_version(folder, attributor, tmp_path):
    path = tmp_path / "ekfac.safetensors"
    attributor.save(path)
    other = DDPMPipeline.from_pretrained(folder / "pipeline")
    other.unet.conv_in.weight.data.mul_(2)
    with pytest.raises(ValueError, match="was made with other weights of this model"):
        Attributor.load(path, other, folder / "train")
    header, tensors = OPERATOR.read(path)
    replace(OPERATOR, version=99).write(path, tensors, header)
    told = "has the format version 99, and this curvlinops_diffusion reads 1"
    with pytest.raises(ValueError, match=told):
        Attributor.load(path, other, folder / "train")


def test_bad_input(folder, pipeline, attributor, own):
    with pytest.raises(ValueError, match=r"`num_draws` is no option .* of fit\(\) and score\(\)"):
        Attributor.from_pipeline(pipeline, folder / "train", num_draws=3)
    start = Attributor.from_pipeline(pipeline, folder / "train")
    with pytest.raises(ValueError, match=r"no curvature yet. Call fit\(\) first"):
        start.score(folder / "queries")
    with pytest.raises(ValueError, match="holds the training images"):
        attributor.score(folder / "train")
    with pytest.raises(ValueError, match="takes no condition, got `prompts`"):
        attributor.score(folder / "queries", prompts=["a", "b"])
    with pytest.raises(ValueError, match="takes no condition, got prompt='a cat'"):
        Attributor.from_pipeline(pipeline, folder / "train", prompts="a cat")
    with pytest.raises(ValueError, match="`prompts` must have one for each image, got 2 for 7 im"):
        open_images(folder / "train", Form(1, (8, 8), None), Condition("prompt"), prompts=["", ""])
    with pytest.raises(ValueError, match=r"`recipe` is of a pipeline, got 'a.toml' for a Network"):
        Attributor.from_pipeline(Network.of_pipeline(pipeline), folder / "train", recipe="a.toml")
    with pytest.raises(ValueError, match="`images` must hold images, got none"):
        attributor.score([])
    with pytest.raises(ValueError, match="is no file"):
        attributor.score(["nothing.png"])
    with pytest.raises(ValueError, match="holds a int"):
        attributor.score([1])
    with pytest.raises(ValueError, match="`curvature` must be one of"):
        attributor.fit("kfoc")
    with pytest.raises(ValueError, match="`method` 'regression' adds the square"):
        attributor.score(folder / "queries", method="regression", measurement="squared_norm")
    with pytest.raises(ValueError, match="`method` must be one of"):
        attributor.score(folder / "queries", method="unlearning")
    _, of_own, queries = own
    with pytest.raises(ValueError, match="`prompts` and `labels` are for an attributor of a pipel"):
        of_own.fit(num_draws=2).score(queries, labels=[0, 1])
