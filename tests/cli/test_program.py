"""The command line, on a pipeline saved by ``save_pretrained`` and PNG files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from curvlinops_diffusion import (
    DenoisingObjective,
    ExampleGradientLinearOperator,
    NoisedRegression,
    StoredScores,
    influence_scores,
    load_operator,
    regression_scores,
)
from curvlinops_diffusion.cli.commands import cost
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import FitOptions, ScoreOptions
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.read_scores import read_scores
from curvlinops_diffusion.influence.regression import RIDGE
from curvlinops_diffusion.influence.split_half import rank_correlation
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cli.cases import COUNT, arguments, process, write_images
from tests.cli.test_start import start
from tests.comparisons import assert_close


def test_it_says_what_it_wrote(folder, tmp_path, capsys):
    output = tmp_path / "e.safetensors"
    assert run(arguments(folder, "fit", "--output", output)) == 0
    told = capsys.readouterr()
    assert told.err == (
        f"Read 7 images from {folder / 'train'}\nWrote {output}: 4,877 parameters in 121 blocks\n"
    )
    assert read_header(output)["info"]["images"] == "7 images"
    assert told.out == ""


def test_scores_are_those_of_the_library(fitted):
    pipeline = DDPMPipeline.from_pretrained(fitted / "pipeline")
    objective = DenoisingObjective(pipeline.unet.eval(), pipeline.scheduler)

    def regression(name, draws, seed):
        files = sorted((fitted / name).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(f)) for f in files])
        x0 = torch.from_numpy(pixels).float().unsqueeze(1) / 127.5 - 1
        pairs = draws % 2 == 0
        return NoisedRegression(objective, x0, draws, seed, batch_size=3, antithetic=pairs)

    EK = load_operator(fitted / "ekfac.safetensors", pipeline.unet)
    J_train = ExampleGradientLinearOperator(regression("train", 3, 0))
    J_query = ExampleGradientLinearOperator(regression("queries", 4, 1))
    expected = influence_scores(J_query, EK.inverse(1e-3), J_train)
    scores, header = read_scores(fitted / "scores.safetensors")
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert header["train"] == [f"image{n}.png" for n in range(COUNT)]
    assert header["queries"] == ["image0.png", "image1.png"]


def test_kernel_regression(fitted, tmp_path, capsys):
    """``--method regression`` is the library's, of loss and prediction; in halves, on a page."""
    draws = ["--num-draws", 4, "--query-draws", 4, "--method", "regression", "--ridge", 0.5]
    output = tmp_path / "r.safetensors"
    assert run(arguments(fitted, "score", "--dry-run", "--output", output, *draws)) == 0
    # loss and prediction, each of all draws and of halves: 7 images and 2 queries by 4 draws
    assert f"samples forward and backward   {4 * 9 * 4}" in capsys.readouterr().out
    assert run(arguments(fitted, "score", "--output", output, *draws)) == 0
    assert "in both halves of the draws" in capsys.readouterr().err
    scores, header = read_scores(output)
    network = load_network(FitOptions(pipeline=fitted / "pipeline", data=fitted, output=fitted))
    train, query = (
        NoisedRegression(
            network.objective,
            open_images(fitted / name, network.form(None), network.condition),
            4,
            seed,
            batch_size=3,
            antithetic=True,
        )
        for name, seed in (("train", 0), ("queries", 1))
    )
    inverse = load_operator(fitted / "ekfac.safetensors", network.objective.model).inverse(1e-3)

    def library(*regressions):
        query, train = map(ExampleGradientLinearOperator, regressions)
        return regression_scores(query, inverse, train, ridge=0.5)

    assert_close(scores, library(query, train), 1e-4)
    halves = load_file(output)
    assert_close(halves["second_half"], library(query.divided(1, 2), train.divided(1, 2)), 1e-4)
    assert header["identity"]["query"]["method"] == "regression"
    page = tmp_path / "page.html"
    words = ["report", "--scores", output, "--data", fitted / "train"]
    assert run([*map(str, words), "--queries", str(fitted / "queries"), "--output", str(page)]) == 0
    text = page.read_text()
    assert "weight, of 7 images&#39;, in a kernel regression of the query&#39;s loss" in text
    assert ScoreOptions.ridge == RIDGE
    assert "predicted change" not in text
    unlike = [*draws, "--measurement", "log_likelihood", "--output", tmp_path / "x.safetensors"]
    assert run(arguments(fitted, "score", *unlike)) == 2
    assert "--method regression does not go with --measurement log_lik" in capsys.readouterr().err
    assert run(arguments(fitted, "score", "--ridge", 0)) == 2
    assert "--ridge is 0.0. Pass a finite number above 0" in capsys.readouterr().err


def test_how_sure_scores_are(fitted, tmp_path, capsys):
    """Two halves of the draws in file, log and what is said; the queries' own values as well."""
    draws = ["--num-draws", 8, "--query-draws", 4, "--log", tmp_path / "log"]
    for name in ("s.safetensors", "s.npy"):
        assert run(arguments(fitted, "score", "--output", tmp_path / name, *draws)) == 0
        told = capsys.readouterr().err
        assert re.search(
            r"How sure: \d\S* of the top 3 in both halves of the draws \(1.3 by chance\)", told
        )
        scores, header = read_scores(tmp_path / name)
        assert len(header["rank_correlation"]) == len(header["top_shared"]) == 2
        assert all(-1 <= r <= 1 for r in header["rank_correlation"])
        assert all(value > 0 for value in header["values"] + header["standard_error"])
    halves = load_file(tmp_path / "s.safetensors")
    first, second = halves["first_half"], halves["second_half"]
    assert_close(rank_correlation(first, second), torch.tensor(header["rank_correlation"]), 1e-6)
    assert_close((first + second) / 2, scores, 0.5)  # but for products of different halves
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (logged,) = [e for e in events if e["event"] == "scored" and e["file"].endswith("npy")]
    assert logged["top_shared"] == header["top_shared"]
    assert run(arguments(fitted, "score", "--output", tmp_path / "o.npy")) == 0  # three draws
    assert "How sure they are is not known: pass multiples of 4" in capsys.readouterr().err


def test_npy_with_an_index(fitted, tmp_path):
    assert run(arguments(fitted, "score", "--output", tmp_path / "s.npy")) == 0
    expected = load_file(fitted / "scores.safetensors")["scores"]
    assert np.array_equal(np.load(tmp_path / "s.npy"), expected.numpy())
    index = json.loads((tmp_path / "s.index.json").read_text())
    assert index["queries"] == ["image0.png", "image1.png"]
    # killed between the two files: the index is of other scores than those that are there
    np.save(tmp_path / "s.npy", np.zeros_like(expected.numpy()))
    with pytest.raises(ValueError, match=r"s.index.json' is not the index of '.*s.npy'"):
        read_scores(tmp_path / "s.npy")
    assert run(arguments(fitted, "score", "--output", tmp_path / "s.npy")) == 0
    assert np.array_equal(np.load(tmp_path / "s.npy"), expected.numpy())
    changed = (tmp_path / "s.index.json").read_text().replace('"image0', '"image9', 1)
    (tmp_path / "s.index.json").write_text(changed)
    with pytest.raises(ValueError, match=r"header of '.*s.index.json' is damaged \(it is not what"):
        read_scores(tmp_path / "s.npy")


def test_inspect(fitted, capsys):
    assert run(["inspect", str(fitted / "scores.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "influence scores of 7 training images on 2 queries" in told
    assert '"damping": 0.001' in told
    finished, seconds, imported = start("inspect", fitted / "ekfac.safetensors")
    assert finished.returncode == 0
    assert "ekfac with 4,877 parameters in" in finished.stdout
    assert "conv_in.weight" in finished.stdout
    assert '"num_draws": 3' in finished.stdout
    assert "torch" not in imported  # a header is JSON
    assert seconds < 1


def test_finished_work_is_not_done_again(fitted, capsys):
    before = (fitted / "ekfac.safetensors").stat().st_mtime_ns
    assert run(arguments(fitted, "fit")) == 0
    assert "was made with the same options; nothing to do" in capsys.readouterr().err
    assert run(arguments(fitted, "score")) == 0
    assert (fitted / "ekfac.safetensors").stat().st_mtime_ns == before


def test_what_a_killed_run_left_is_removed(fitted, capsys):
    for command, name in (("fit", "ekfac"), ("score", "scores")):
        left = fitted / f"{name}.safetensors.checkpoint"
        left.mkdir()
        assert run(arguments(fitted, command)) == 0
        assert "nothing to do" in capsys.readouterr().err
        assert not left.exists()


def test_another_noise_schedule_is_refused(fitted, tmp_path, capsys):
    """By score, whose gradients would be of another loss; and by fit, before "nothing to do"."""
    DDPMScheduler(num_train_timesteps=100, beta_end=0.01).save_pretrained(tmp_path / "scheduler")
    for command, told in (
        ("score", "ekfac.safetensors' was fitted with another objective: process ("),
        ("fit", "exists, and was made with others: regression.process ("),
    ):
        words = arguments(fitted, command)
        at = words.index("--pipeline")
        words[at : at + 2] = [
            *("--model", str(fitted / "pipeline" / "unet")),
            *("--scheduler", str(tmp_path / "scheduler")),
        ]
        assert run(words) == 2
        assert told in capsys.readouterr().err
    assert run(arguments(fitted, "fit", "--autocast", "bfloat16")) == 2
    assert "regression.autocast (None there, " in capsys.readouterr().err


def test_files_of_something_else_are_refused(fitted, tmp_path, capsys):
    before = (fitted / "ekfac.safetensors").read_bytes()
    assert run(arguments(fitted, "fit", "--num-draws", "5")) == 2
    assert "regression.num_draws (3 there, 5 here). Pass --overwrite" in capsys.readouterr().err
    assert run(arguments(fitted, "score", "--damping", "1e-5")) == 2
    assert "query.damping (0.001 there, 1e-05 here)" in capsys.readouterr().err
    write_images(tmp_path / "other", 3, seed=2)
    assert run(arguments(fitted, "score", "--data", tmp_path / "other")) == 2
    assert "was fitted to other images than those of --data" in capsys.readouterr().err
    assert (fitted / "ekfac.safetensors").read_bytes() == before


def test_overwrite(fitted, tmp_path):
    shutil.copy(fitted / "ekfac.safetensors", tmp_path / "e.safetensors")
    output = ["--output", tmp_path / "e.safetensors", "--curvature", "kfac"]
    assert run(arguments(fitted, "fit", *output)) == 2
    assert run(arguments(fitted, "fit", *output, "--overwrite")) == 0
    assert (tmp_path / "e.safetensors").read_bytes() != (fitted / "ekfac.safetensors").read_bytes()


def test_options_from_a_file(fitted, tmp_path, capsys):
    """A YAML file with the fields' names; flags after it go first."""
    config = tmp_path / "options.yaml"
    lines = [f"pipeline: {fitted / 'pipeline'}", f"data: {fitted / 'train'}", "num_draws: 2"]
    config.write_text("\n".join([*lines, "batch_size: 3", "quiet: true", "seed: 5"]))
    output = tmp_path / "e.safetensors"
    words = ["fit", "--config", config, "--output", output, "--seed", 6]
    assert run([str(word) for word in words]) == 0
    assert run(["inspect", str(output)]) == 0
    told = capsys.readouterr().out
    assert '"num_draws": 2' in told
    assert '"seed": 6' in told


def test_dry_run(fitted, capsys):
    for command in ("fit", "score"):
        assert run(arguments(fitted, command, "--dry-run", "--overwrite")) == 0
        told = capsys.readouterr().out
        for word in ("samples forward and backward", "file", "memory beyond", "time  "):
            assert word in told
    assert "samples forward and backward   29" in told  # 7 images × 3 draws and 2 queries × 4
    # two network calls for each of 20 steps
    assert run(arguments(fitted, "score", "--dry-run", "--measurement", "log_likelihood")) == 0
    assert f"samples forward and backward   {21 + 8 * 40}" in capsys.readouterr().out


def test_the_largest_batch(folder, tmp_path):
    """Is found for each command, and told in the log."""
    output, log = tmp_path / "e.safetensors", tmp_path / "log.jsonl"
    words = arguments(folder, "fit", "--output", output, "--batch-size", "auto", "--log", log)
    assert run(words) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "batch size"]
    assert told["examples"] == 1024
    assert read_header(output)["info"]["data"]["batch_size"] == 7
    assert run(arguments(folder, "fit", "--output", output, "--batch-size", "most")) == 2


def test_what_is_done_once_is_counted_once(fitted):
    """Trying the network out takes longer than a batch here; with every batch it would be hours."""

    def measured(fixed):
        calls = []

        def run(some):
            calls.append(some.num_samples)
            time.sleep(fixed + 0.002 * some.num_samples)

        return cost._measured(regression, run), calls

    network = load_network(FitOptions(pipeline=fitted / "pipeline", data=fitted, output=fitted))
    regression = NoisedRegression(network.objective, torch.zeros(10, 1, 8, 8), 1)
    found, calls = measured(fixed=0.3)
    assert calls == [10, 20, 40]
    assert 0.0015 <= found.seconds < 0.01
    assert 0.2 < found.once < 0.4


def test_the_cost_of_many_processes(monkeypatch):
    """Checkpoints on disk, and that each process has the memory."""
    told = cost.Cost(10, 2048, 4096, 1024, 5.0).text()
    assert re.search("checkpoints, until it is done +4 KiB", told)
    assert "processes" not in told
    monkeypatch.setenv("WORLD_SIZE", "3")
    told = cost.Cost(10, 2048, 4096, 1024, 5.0).text()
    assert re.search("processes, of such memory +3", told)


def test_the_log(fitted, tmp_path):
    log = tmp_path / "log.jsonl"
    assert run(arguments(fitted, "fit", "--output", tmp_path / "e.safetensors", "--log", log)) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    passes = ["pass started", "pass finished"]
    assert [e["event"] for e in events] == ["start", *passes, *passes, "fitted", "end"]
    assert events[2]["pass"] == "Kronecker factors"
    assert events[2]["examples"] == events[2]["of"] == COUNT
    assert events[-2]["parameters"] == 4877
    assert all("time" in e for e in events)


def test_a_model_and_its_scheduler(fitted, tmp_path):
    """Without a pipeline: the same operator."""
    words = arguments(fitted, "fit", "--output", tmp_path / "e.safetensors")
    at = words.index("--pipeline")
    words[at : at + 2] = [
        *("--model", str(fitted / "pipeline" / "unet")),
        *("--scheduler", str(fitted / "pipeline" / "scheduler")),
    ]
    assert run(words) == 0
    found = load_file(tmp_path / "e.safetensors")
    for name, tensor in load_file(fitted / "ekfac.safetensors").items():
        assert torch.equal(found[name], tensor), name


# ---------------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------------


def test_killed_and_started_again(fitted, tmp_path):
    """SIGKILL to the real program; what it wrote down is used, and the file is the same."""
    output, log = tmp_path / "e.safetensors", tmp_path / "log"
    words = arguments(fitted, "fit", "--output", output, "--checkpoint-every", "0")
    killed = process(*words)
    checkpoint = tmp_path / "e.safetensors.checkpoint"
    while not list(checkpoint.glob("*.safetensors")) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    _, told = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, told
    assert "gemm_4bit" not in told  # of bitsandbytes, which is not used
    assert not output.exists()
    assert list(checkpoint.glob("*.safetensors"))
    assert run([*words, "--log", str(log)]) == 0
    events = map(json.loads, log.read_text().splitlines())
    begun = next(event for event in events if event["event"] == "pass started")
    assert begun["examples"] > 0
    whole = load_file(fitted / "ekfac.safetensors")
    for name, tensor in load_file(output).items():
        assert torch.equal(tensor, whole[name]), name


def torchrun(*words):
    """What two processes say."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finished = subprocess.run(
        [*launch, "-m", "curvlinops_diffusion", *words], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def assert_same_operator(folder, path):
    unet = DDPMPipeline.from_pretrained(folder / "pipeline").unet.eval()
    v = torch.randn(4877, generator=torch.Generator().manual_seed(0))
    one, two = (load_operator(p, unet) for p in (folder / "ekfac.safetensors", path))
    least = 1e-4 * float((one @ v).abs().max())
    torch.testing.assert_close(two @ v, one @ v, rtol=1e-3, atol=least)


def test_several_processes(fitted, tmp_path):
    """By torchrun; three batches, which two processes do not divide."""
    output = tmp_path / "e.safetensors"
    said = torchrun(*arguments(fitted, "fit", "--output", output))
    assert said.count("Wrote ") == 1
    assert "4,877 parameters in 121 blocks" in said
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert_same_operator(fitted, output)


def test_several_processes_that_divide_everything(fitted, tmp_path):
    """Network, factors and scores."""
    operator, scores = tmp_path / "e.safetensors", tmp_path / "s.safetensors"
    options = ["--shard-network", "--sharded"]
    said = torchrun(*arguments(fitted, "fit", "--output", operator, *options))
    assert "4,877 parameters in 121 blocks" in said
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_same_operator(fitted, operator)
    words = ["--operator", operator, "--output", scores, "--num-draws", "4", *options]
    said = torchrun(*arguments(fitted, "score", *words))
    assert said.count("Wrote ") == said.count("in both halves of the draws") == 1
    assert len(list(tmp_path.glob("s.*.safetensors"))) == 2
    assert not list(tmp_path.glob("*.checkpoint"))
    alone = tmp_path / "alone.safetensors"
    assert run(arguments(fitted, "score", "--output", alone, "--num-draws", "4")) == 0
    assert_same_to_readers(fitted, scores, alone)


def test_a_network_cannot_be_divided_alone(fitted, tmp_path, capsys):
    output = tmp_path / "e.safetensors"
    assert run(arguments(fitted, "fit", "--output", output, "--shard-network")) == 2
    assert "--shard-network arrived in a process on its own" in capsys.readouterr().err


def assert_same_to_readers(folder, in_files, in_one):
    """All that reads scores makes the same of them, but for rounding."""
    (found, header), (expected, beside) = read_scores(in_files), read_scores(in_one)
    assert isinstance(found, StoredScores)
    least = 1e-4 * float(expected.abs().max())
    for own, other in ((found.whole(), expected), (found[1], expected[1])):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=least)
    torch.testing.assert_close(
        torch.tensor(header["standard_error"]),
        torch.tensor(beside["standard_error"]),
        rtol=1e-2,
        atol=least,
    )
    assert header["rank_correlation"] == pytest.approx(beside["rank_correlation"], abs=0.1)
    assert header.keys() - beside.keys() == {"shards", "shape"}
    torch.testing.assert_close(
        StoredScores.open(in_one).whole(),
        StoredScores.open(in_one, check=False).named("scores").whole(),
    )
    pages = []
    for path in (in_files, in_one):
        page = path.with_suffix(".html")
        words = ["--scores", path, "--data", folder / "train", "--queries", folder / "queries"]
        assert run([str(word) for word in ["report", *words, "--output", page]]) == 0
        pages.append(re.findall(r"image\d\.png", page.read_text()))
        assert run(["inspect", str(path)]) == 0
    assert pages[0] == pages[1]


RECIPE = [
    *("--weighting", "min-snr", "--snr-gamma", 2.0, "--reduction", "sum"),
    *("--timesteps", "uniform", "--noise-offset", 0.1, "--input-perturbation", 0.2),
]


def test_the_loss_of_training(folder, tmp_path, capsys):
    """Options of training reach objective and draws; ``score`` refuses others than ``fit``'s."""
    output, scores = tmp_path / "recipe.safetensors", tmp_path / "scores.safetensors"
    assert run(arguments(folder, "fit", "--output", output, *RECIPE)) == 0
    described = read_header(output)["info"]["regression"]
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    expected = DenoisingObjective(
        pipeline.unet, pipeline.scheduler, MinSNRWeighting(2.0), "sum"
    ).description
    assert {key: described[key] for key in expected} == expected
    assert described["noise_offset"] == 0.1
    assert described["input_perturbation"] == 0.2
    assert "Uniform" in described["timesteps"]
    score = arguments(folder, "score", "--operator", output, "--output", scores)
    assert run([*score, *map(str, RECIPE)]) == 0
    assert scores.exists()
    scores.unlink()
    capsys.readouterr()
    assert run(score) == 2
    told = capsys.readouterr().err
    assert "was fitted with another objective" in told
    for what in ("weighting", "reduction", "timesteps", "noise_offset", "input_perturbation"):
        assert what in told
    assert run([*score, *map(str, RECIPE), "--augment", "flip"]) == 2
    assert "another objective: augmentations (" in capsys.readouterr().err
    assert run([*score, *map(str, RECIPE), "--condition-dropout", "0.1"]) == 2
    assert "pipeline without a condition" in capsys.readouterr().err


def test_attribute(folder, tmp_path):
    """Its options make the same again; another run is refused, and the folder stays as it was."""
    words = ["--pipeline", folder / "pipeline", "--data", folder / "train", "--quiet"]
    words += ["--queries", folder / "queries", "--fit-draws", 2, "--num-draws", 2]
    words += ["--query-draws", 2, "--damping", 1e-3, "--output", tmp_path / "result"]
    assert run(["attribute", *map(str, words)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    names = {"operator.safetensors", "scores.safetensors", "scores.csv", "report.html", "run.yaml"}
    assert {path.name for path in before} == names
    scores, header = read_scores(tmp_path / "result" / "scores.safetensors")
    table = (tmp_path / "result" / "scores.csv").read_text().splitlines()
    best = header["train"][int(scores[0].argmax())]
    assert table[1] == f"image0.png,{best},{float(scores[0].max())!r},1"
    config = ["--config", str(tmp_path / "result" / "run.yaml"), "--quiet"]
    other = [*config, "--output", str(tmp_path / "result"), "--damping", "1e-2"]
    assert run(["attribute", *other]) == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    assert run(["attribute", *config, "--output", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "scores.csv").read_text().splitlines()
    assert again == table
