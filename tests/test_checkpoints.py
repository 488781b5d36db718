"""Attribution averaged over checkpoints of one training: the mean of each alone."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline

from curvlinops_diffusion import Attribution, Attributor, StoredScores
from curvlinops_diffusion import attributor as attributor_module
from curvlinops_diffusion.checkpoints import averaged
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence import more_draws
from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.methods import scores_of
from tests.cli.cases import write_problem
from tests.comparisons import assert_close

DRAWS = {"num_draws": 4, "damping": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, a later checkpoint of it, training images and queries."""
    folder = write_problem(tmp_path_factory.mktemp("checkpoints"))
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.1)
    pipeline.save_pretrained(folder / "later")
    return folder


def loaded(folder, name):
    return DDPMPipeline.from_pretrained(folder / name)


def both(folder):
    return [loaded(folder, "pipeline"), loaded(folder, "later")]


@pytest.fixture(scope="module")
def alone(folder):
    """The results of each checkpoint alone, by both methods."""
    return [
        Attributor.from_pipeline(pipeline, folder / "train")
        .fit(num_draws=2)
        .score(folder / "queries", method=["influence", "regression"], **DRAWS)
        for pipeline in both(folder)
    ]


@pytest.fixture(scope="module")
def attributor(folder):
    return Attributor.from_pipeline(both(folder), folder / "train").fit(num_draws=2)


@pytest.fixture(scope="module")
def result(folder, attributor):
    return attributor.score(folder / "queries", method=["influence", "regression"], **DRAWS)


def test_scores_are_the_mean_of_each_alone(alone, result):
    for method, scores in result.by_method.items():
        assert torch.equal(scores, sum(one.by_method[method] for one in alone) / 2)
        for half in ("first", "second"):
            mean = sum(getattr(one.halves[method], half) for one in alone) / 2
            assert torch.equal(getattr(result.halves[method], half), mean)
    assert not torch.equal(alone[0].scores, alone[1].scores)


def test_agreement_and_values_are_of_the_mean(alone, result):
    assert result.header["values"] == pytest.approx(
        [sum(each) / 2 for each in zip(*(one.header["values"] for one in alone), strict=True)]
    )
    assert len(result.header["checkpoints"]) == 2
    halves = result.halves["influence"]
    expected = halves.rank_correlation().tolist()
    assert list(result.agreement.rank_correlation) == pytest.approx(expected)


def test_saved_loaded_one_at_a_time(folder, attributor, result, tmp_path):
    """From functions that load the pipelines: each is loaded where it is needed."""
    attributor.save(tmp_path / "curvature")
    sources = [partial(loaded, folder, name) for name in ("pipeline", "later")]
    found = Attributor.load(tmp_path / "curvature", sources, folder / "train")
    scores = found.score(folder / "queries", method="influence", **DRAWS).scores
    assert_close(scores, result.scores, 1e-5)  # of influence alone, in blocks of queries
    result.report(tmp_path / "page.html")
    assert "image0.png" in (tmp_path / "page.html").read_text()


def test_draws_until_told(folder, attributor, tmp_path, monkeypatch):
    """At every checkpoint as many."""
    monkeypatch.setattr(more_draws, "_FIRST_DRAWS", 4)
    told = {"method": "influence", "damping": 1e-3, "output": tmp_path / "s.safetensors"}
    found = attributor.score(folder / "queries", num_draws="auto", max_draws=4, **told)
    expected = attributor.score(folder / "queries", num_draws=4, method="influence", damping=1e-3)
    assert torch.equal(found.scores, expected.scores)
    again = attributor.score(folder / "queries", num_draws="auto", max_draws=4, **told)
    assert torch.equal(again.scores, expected.scores)
    # stopped at the second checkpoint with twice as many, which goes on there
    monkeypatch.setattr(Agreement, "is_settled", False)
    computed = []

    def stopped(*operators, **options):
        computed.append(None)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return scores_of(*operators, **options)

    monkeypatch.setattr(attributor_module, "scores_of", stopped)
    told |= {"num_draws": "auto", "max_draws": 8}
    with pytest.raises(KeyboardInterrupt):
        attributor.score(folder / "queries", **told)
    found = attributor.score(folder / "queries", **told)
    assert len(computed) == 3
    monkeypatch.undo()
    expected = attributor.score(folder / "queries", num_draws=8, method="influence", damping=1e-3)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(StoredScores.open(told["output"]).whole(), expected.scores)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_in_the_program(folder, result, tmp_path):
    """The curvatures stand in a folder, the scores of each beside the average."""
    words = ["--pipeline", folder / "later", "--checkpoints", folder / "pipeline"]
    words += ["--data", folder / "train", "--queries", folder / "queries", "--quiet"]
    words += ["--fit-draws", 2, "--num-draws", 4, "--damping", 1e-3, "--output", tmp_path]
    words += ["--method", "influence", "regression"]
    assert run(["attribute", *map(str, words)]) == 0
    images = (folder / "train", folder / "queries")
    found = Attribution.load(tmp_path / "scores.safetensors", *images)
    first = found.halves["regression"].first
    assert_close(first, result.halves["regression"].first, 1e-6)
    for method, scores in result.by_method.items():
        assert_close(found.by_method[method].whole(), scores, 1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("operators", "scores.checkpoint0.safetensors", "scores.checkpoint1.safetensors"),
        *("scores.safetensors", "scores.csv", "report.html", "run.yaml"),
    }
    first = StoredScores.open(tmp_path / "scores.checkpoint0.safetensors").header["run"]
    assert first["pipeline"] == str(folder / "pipeline")
    assert first["operator"] == str(tmp_path / "operators" / "checkpoint0.safetensors")
    assert "averages over 2 checkpoints" in (tmp_path / "report.html").read_text()


def program(folder, output, *more):
    words = ["--pipeline", folder / "later", "--data", folder / "train", "--queries"]
    words += [folder / "queries", "--quiet", "--output", output, "--curvature", "kfac"]
    words += ["--fit-draws", 1, "--num-draws", 2, *more]
    return run(["attribute", *map(str, words)])


def test_averages_and_scores_of_one_are_not_mixed_up(folder, attributor, tmp_path, capsys):
    """The identity of averages was that of the last: its scores were taken to be there already."""
    scores = tmp_path / "scores.safetensors"
    attributor.score(folder / "queries", num_draws=2).save(scores)
    written = scores.read_bytes()
    assert program(folder, tmp_path) == 2
    assert "of 2 checkpoints of the network, got 1. Pass --overwrite" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was made with others: checkpoints"):
        attributor._kept[1].score(folder / "queries", num_draws=2, output=scores)
    last = Attributor.from_pipeline(loaded(folder, "later"), folder / "train").fit(num_draws=2)
    (tmp_path / "one").mkdir()
    last.score(folder / "queries", num_draws=2, output=tmp_path / "one" / scores.name)
    assert program(folder, tmp_path / "one", "--checkpoints", folder / "pipeline") == 2
    assert "of 1 checkpoint of the network, got 2" in capsys.readouterr().err
    assert scores.read_bytes() == written
    assert [path.name for path in (tmp_path / "one").iterdir()] == [scores.name]


def test_what_is_there_is_said_to_be(folder, tmp_path, capsys):
    """Of the curvatures, a file for each checkpoint, as well as of the scores."""
    words = ("--checkpoints", folder / "pipeline", "--params", "conv_out.*")
    assert program(folder, tmp_path, *words) == 0
    capsys.readouterr()
    assert program(folder, tmp_path, *words) == 0
    told = capsys.readouterr().err
    for name in ("operators", "scores.safetensors"):
        assert f"'{tmp_path / name}' was made with the same options; nothing to do" in told
    assert f"Wrote {tmp_path / 'operators'}" not in told


def test_a_checkpoint_that_is_not_there_is_named_before_any_is_fitted(folder, tmp_path, capsys):
    names = folder / "pipeline", folder / "none"
    assert program(folder, tmp_path / "out", "--checkpoints", *names) == 2
    assert f"'{names[1]}' does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outputs_are_of_all(folder, attributor, tmp_path):
    """Not of one checkpoint after the other in the same file."""
    fitted = Attributor.from_pipeline(both(folder), folder / "train")
    fitted.fit("kfac", num_draws=1, output=tmp_path / "curvature")
    found = Attributor.load(tmp_path / "curvature", both(folder), folder / "train")
    assert len(found.operators) == 2
    output, images = tmp_path / "scores.safetensors", (folder / "train", folder / "queries")
    result = attributor.score(folder / "queries", num_draws=2, output=output)
    assert torch.equal(Attribution.load(output, *images).scores, result.scores)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores.*")}
    assert len(times) == 3
    again = attributor.score(folder / "queries", num_draws=2, output=output)
    assert torch.equal(again.scores, result.scores)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("scores.*")} == times
    with pytest.raises(ValueError, match="was made with others"):
        attributor.score(folder / "queries", num_draws=4, output=output)
    assert attributor.images.names == result.train.names
    assert len(attributor.opened(folder / "queries")) == 2


def test_what_more_checkpoints_have_left_is_deleted(attributor, tmp_path):
    for c in range(4):
        (tmp_path / f"checkpoint{c}.safetensors").write_bytes(b"of an earlier training")
    attributor.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint0.safetensors", "checkpoint1.safetensors"}


def test_halves_of_scores_in_shards(alone):
    """They are read from the shards, whose results hold none."""

    class Shards(StoredScores):
        def __init__(self, result, name="scores"):
            self.result, self.name = result, name

        names = ("first", "scores", "second")
        by_method = ("influence",)

        def named(self, name):
            return Shards(self.result, name)

        def whole(self):
            half = self.result.halves["influence"]
            return self.result.scores if self.name == "scores" else getattr(half, self.name)

    in_shards = [
        replace(one, by_method={"influence": Shards(one)}, halves={"influence": None})
        for one in alone
    ]
    found, expected = averaged(in_shards), averaged(alone)
    for half in ("first", "second"):
        of_one = getattr(found.halves["influence"], half)
        assert torch.equal(of_one, getattr(expected.halves["influence"], half))
    assert found.agreement == expected.agreement


def test_dry_run_adds_up(folder, tmp_path, capsys):
    """Curvature, scores, and the sum of both at all checkpoints; nothing is written."""
    words = ("--checkpoints", folder / "pipeline", "--dry-run")
    assert program(folder, tmp_path / "out", *words) == 0
    text = capsys.readouterr().out
    counts = [int(n.replace(",", "")) for n in re.findall(r"forward and backward +([\d,]+)", text)]
    curvature, scores, both = counts
    assert both == 2 * (curvature + scores)
    assert "The scores of each of 2 checkpoints" in text
    assert not (tmp_path / "out").exists()


def test_goes_on_at_the_checkpoint_where_it_stopped(folder, monkeypatch, tmp_path):
    options = {"checkpoint": tmp_path, "progressbar": False}
    fit, fitted = Attributor.fit, []

    def stopping(self, *args, **kwargs):
        if len(fitted) == 1:
            raise KeyboardInterrupt
        fitted.append(self)
        return fit(self, *args, **kwargs)

    attributor = Attributor.from_pipeline(both(folder), folder / "train", **options)
    with monkeypatch.context() as patched:
        patched.setattr(Attributor, "fit", stopping)
        with pytest.raises(KeyboardInterrupt):
            attributor.fit(num_draws=2)
    written = sorted((tmp_path / "0" / "fit").iterdir())
    times = [path.stat().st_mtime_ns for path in written]
    attributor.fit(num_draws=2)
    assert written
    assert [path.stat().st_mtime_ns for path in written] == times
    assert (tmp_path / "1" / "fit").exists()


def test_refused(folder, attributor, tmp_path):
    same = [loaded(folder, "later"), loaded(folder, "later")]
    with pytest.raises(ValueError, match="Checkpoints 1 and 2 have the same weights"):
        Attributor.from_pipeline(same, folder / "train").fit(num_draws=1)
    with pytest.raises(ValueError, match="at least two checkpoints of one training, got a list of"):
        Attributor.from_pipeline(same[:1], folder / "train")
    with pytest.raises(ValueError, match=r"Call fit\(\) first"):
        Attributor.from_pipeline(both(folder), folder / "train").score(folder / "queries")
    attributor.save(tmp_path)
    with pytest.raises(ValueError, match="has the curvature of 2 checkpoints, got 3 pipelines"):
        Attributor.load(tmp_path, [*same, *same[:1]], folder / "train")
    with pytest.raises(ValueError, match="other weights of this model"):
        Attributor.load(tmp_path, same, folder / "train")
    with pytest.raises(AttributeError, match="an operator of its own"):
        attributor.operator = attributor.operators[0]
