"""The command line, on a pipeline saved by ``save_pretrained`` and PNG files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from curvlinops_diffusion import (
    Attributor,
    DenoisingObjective,
    NoisedRegression,
    StoredScores,
    load_operator,
)
from curvlinops_diffusion.cli import attribute, cost
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.linalg.operator_files import read_header
from curvlinops_diffusion.weightings import MinSNRWeighting
from tests.cli.cases import COUNT, arguments, network, outcomes, process, write_images


def read(path):
    stored = StoredScores.open(path)
    return stored.whole(), stored.header


def test_it_says_what_it_wrote(folder, tmp_path, capsys):
    """In lines and in the log; behind a link the file is written, and the link stays."""
    output, log = tmp_path / "ö v1.2 'e'.safetensors", tmp_path / "log.jsonl"
    (tmp_path / "disk").mkdir()
    output.symlink_to(tmp_path / "disk" / "e.safetensors")
    words = ["--output", output, "--log", log, "--batch-size", "auto"]
    assert run(arguments(folder, "fit", *words)) == 0
    told = capsys.readouterr()
    assert told.err == (
        f"Read 7 images from {folder / 'train'}\nWrote {output}: 4,877 parameters in 121 blocks\n"
    )
    assert told.out == ""
    assert output.is_symlink()
    info = read_header(tmp_path / "disk" / "e.safetensors")["info"]
    assert (info["images"], info["data"]["batch_size"]) == ("7 images", 7)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    passes = ["pass started", "pass finished"]
    named = ["start", "batch size", *passes, *passes, "fitted", "end"]
    assert [event["event"] for event in events] == named
    assert events[1]["examples"] == 1024
    assert events[3]["pass"] == "Kronecker factors"
    assert events[3]["examples"] == events[3]["of"] == COUNT
    assert events[-2]["parameters"] == 4877
    assert all("time" in event for event in events)


def test_scores_are_those_of_the_library(fitted):
    pipeline = DDPMPipeline.from_pretrained(fitted / "pipeline")
    options = {"batch_size": 3, "progressbar": False}
    own = Attributor.load(
        fitted / "ekfac.safetensors", pipeline, fitted / "train", **options
    ).score(fitted / "queries", method="influence", num_draws=3, query_draws=4, damping=1e-3)
    scores, header = read(fitted / "scores.safetensors")
    assert torch.equal(scores, own.scores)
    assert header["train"] == [f"image{n}.png" for n in range(COUNT)]
    assert header["queries"] == ["image0.png", "image1.png"]
    assert {key: header["identity"][key] for key in own.header["identity"]} == own.header[
        "identity"
    ]


def test_several_methods(fitted, tmp_path, capsys):
    """Out of one pass: the first orders, and page and table have a number of each."""
    draws = ["--num-draws", 4, "--query-draws", 4, "--method", "regression", "influence"]
    output = tmp_path / "r.safetensors"
    assert run(arguments(fitted, "score", "--dry-run", "--output", output, *draws)) == 0
    # loss and prediction, each of all draws and of halves: 7 images and 2 queries by 4 draws; and
    # at least 64 single draws
    assert f"samples forward and backward   {2 * 9 * 4 + 7 * 10}" in capsys.readouterr().out
    # of influence alone, with 16 draws and then 32 at most, those of the two queries each time
    more = ["--num-draws", "auto", "--max-draws", 40, "--query-draws", 4, "--output", output]
    assert run(arguments(fitted, "score", "--dry-run", *more)) == 0
    assert f"backward   {7 * 48 + 2 * 2 * 4}" in capsys.readouterr().out
    log = ["--log", tmp_path / "log"]
    assert run(arguments(fitted, "score", "--output", output, *draws, *log)) == 0
    assert re.search(
        r"by regression and influence. \d\S* of the top 3 in both halves of the draws "
        r"\(1.3 by chance\)",
        capsys.readouterr().err,
    )
    scores, header = read(output)
    assert header["methods"] == ["regression", "influence"]
    assert all(value > 0 for value in header["values"] + header["standard_error"])
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (logged,) = [e for e in events if e["event"] == "scored"]
    assert logged["top_shared"] == header["top_shared"]
    page = tmp_path / "page.html"
    assert run(["report", "--scores", str(output), "--output", str(page)]) == 0
    text = page.read_text()
    assert "The first number under a training image (regression), by which they are ord" in text
    assert "The second number under a training image (influence) is the predicted change" in text
    best = int(scores[0].argmax())
    by_influence = load_file(output)["influence"][0, best] / header["values"][0]
    told = json.loads(re.findall(r'id="data">(.+)</script>', text)[0])
    assert told["scores"][0]["images"][0] == best
    (first, *_), (second, *_) = told["scores"][0]["numbers"]
    assert first == pytest.approx(float(scores[0, best]), rel=0.01)
    scale = {" %": 100, " ppm": 1e6}[told["units"][1]]
    assert second == pytest.approx(scale * float(by_influence), rel=0.01)


def test_what_a_method_needs_is_missed_before_the_fit(folder, tmp_path, capsys):
    words = ["--pipeline", folder / "pipeline", "--data", folder / "train", "--quiet"]
    words += ["--queries", folder / "queries", "--output", tmp_path / "result"]
    for more, told in (
        (["--method", "latents"], "--method 'latents' needs a pipeline with an autoencoder"),
        (["--method", "pixels", "--num-draws", "auto"], "--num-draws auto needs a first method"),
    ):
        assert run(["attribute", *map(str, words), *more]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "result").exists()


def test_held_out_images(fitted, tmp_path, capsys):
    """Are opened and counted before the fit, and belong to the run."""
    words = ["--pipeline", fitted / "pipeline", "--data", fitted / "train", "--num-draws", 4]
    words += ["--queries", fitted / "queries", "--output", tmp_path / "result", "--quiet"]
    words += ["--params", "conv_out.*", "--fit-draws", 1]
    write_images(tmp_path / "unseen", 3, seed=5)
    shutil.copytree(tmp_path / "unseen", tmp_path / "seen")
    shutil.copy(fitted / "train" / "image0.png", tmp_path / "seen" / "other.png")

    def attributed(*more):
        code = run(["attribute", *map(str, [*words, *more])])
        return code, capsys.readouterr()

    for folder, more, told in (
        ("unseen", ["--method", "influence"], "--held-out gives the scores of 'regression' their"),
        ("seen", [], "got 1 that are training images, 'other.png' first"),
        (fitted / "train", [], "holds the training images. Pass images like them"),
    ):
        code, said = attributed("--held-out", tmp_path / folder, *more)
        assert code == 2
        assert told in said.err
    assert not (tmp_path / "result").exists()
    held_out = ["--held-out", tmp_path / "unseen"]
    (_, with_gap), (_, without) = (attributed(*more, "--dry-run") for more in (held_out, []))
    counts = [
        [int(n) for n in re.findall(r"backward +(\d+)", said.out)] for said in (with_gap, without)
    ]
    assert [a - b for a, b in zip(*counts, strict=True)] == [0, 32 * 10, 32 * 10]
    code, said = attributed(*held_out)
    assert code == 0
    scores = tmp_path / "result" / "scores.safetensors"
    header = read(scores)[1]
    assert header["methods"] == ["regression"]
    assert header["gap"]["num_held_out"] == 3
    code, said = attributed()
    assert code == 2
    assert "exists, and was made with others: query.held_out" in said.err
    again = ["--config", tmp_path / "result" / "run.yaml", "--output", tmp_path / "result"]
    assert run(["attribute", *map(str, again)]) == 0
    assert f"'{scores}' was made with the same options" in capsys.readouterr().err
    assert run(["inspect", str(scores)]) == 0
    assert "from 3 held-out images" in capsys.readouterr().out


def test_images_alone_cost_no_pass(folder, tmp_path, capsys):
    """Nor a curvature."""
    words = ["--pipeline", folder / "pipeline", "--data", folder / "train", "--method", "pixels"]
    words += ["--queries", folder / "queries", "--output", tmp_path / "result", "--quiet"]
    assert run(["attribute", *map(str, words), "--dry-run"]) == 0
    assert "samples forward and backward   0\n" in capsys.readouterr().out
    scores = tmp_path / "result" / "scores.safetensors"
    for _ in range(2):
        assert run(["attribute", *map(str, words)]) == 0
        told = capsys.readouterr().err
    assert f"'{scores}' was made with the same" in told
    assert not list((tmp_path / "result").glob("operator*"))
    assert run(["inspect", str(scores)]) == 0
    told = capsys.readouterr().out
    assert "pixels look at the images alone: no draws could make them surer" in told


def test_inspect(fitted, capsys):
    """Ten lines that name what it is of; all as JSON; of an operator without PyTorch."""
    assert run(["inspect", str(fitted / "scores.safetensors")]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["scores"].startswith("influence, of 7 training images on 2 queries, from ")
    assert lines["queries"] == str(fitted / "queries")
    assert lines["measured"] == "loss, damping 0.001"
    assert lines["draws"] == "3 for each training image, 4 for each query"
    assert run(["inspect", str(fitted / "scores.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"]["query"]["damping"] == 0.001
    ((code, told, _, heavy),), _ = outcomes([["inspect", fitted / "ekfac.safetensors"]])
    assert (code, heavy) == (0, set())  # a header is JSON
    lines = dict(line.split(None, 1) for line in told.splitlines())
    assert lines["operator"].startswith("EK-FAC of 4,877 parameters in ")
    assert lines["data"] == f"{fitted / 'train'} (7 images)"
    assert lines["draws"] == "3 for each image"
    assert run(["inspect", str(fitted / "ekfac.safetensors"), "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert "conv_in.weight" in {row["name"] for row in header["blocks"]}


def test_finished_work_is_not_done_again(fitted, capsys):
    """And what a run that was killed at its very end has left is removed."""
    for command, name in (("fit", "ekfac"), ("score", "scores")):
        before = (fitted / f"{name}.safetensors").stat().st_mtime_ns
        left = fitted / f"{name}.safetensors.checkpoint"
        left.mkdir()
        assert run(arguments(fitted, command)) == 0
        assert "was made with the same options; nothing to do" in capsys.readouterr().err
        assert (fitted / f"{name}.safetensors").stat().st_mtime_ns == before
        assert not left.exists()


def test_another_noise_schedule_is_refused(fitted, tmp_path, capsys):
    """By score, whose gradients would be of another loss; and by fit, before "nothing to do"."""
    DDPMScheduler(num_train_timesteps=100, beta_end=0.01).save_pretrained(tmp_path / "scheduler")
    network = ["--model", str(fitted / "pipeline" / "unet")]
    network += ["--scheduler", str(tmp_path / "scheduler")]
    assert run([*arguments(fitted, "score"), *network]) == 2
    told = capsys.readouterr().err
    assert "ekfac.safetensors' was fitted with another objective: process (" in told
    words = arguments(fitted, "fit", *network)
    del words[1:3]
    assert run(words) == 2
    assert "exists, and was made with others: regression.process (" in capsys.readouterr().err
    assert run(arguments(fitted, "fit", "--autocast", "bfloat16")) == 2
    assert "regression.autocast (None there, " in capsys.readouterr().err


def test_files_of_something_else_are_refused(fitted, tmp_path, capsys):
    before = (fitted / "ekfac.safetensors").read_bytes()
    assert run(arguments(fitted, "fit", "--num-draws", "5")) == 2
    told = capsys.readouterr().err
    assert "regression.num_draws (3 there, 5 here). Pass --overwrite, or another --output" in told
    assert run(arguments(fitted, "score", "--damping", "1e-5")) == 2
    assert "query.damping (0.001 there, 1e-05 here)" in capsys.readouterr().err
    write_images(tmp_path / "other", 3, seed=2)
    assert run(arguments(fitted, "score", "--data", tmp_path / "other")) == 2
    told = capsys.readouterr().err
    assert "was fitted to other images than those given. Pass the same, fit anew" in told
    assert run(arguments(fitted, "score", "--queries", fitted / "train")) == 2
    assert f"--queries '{fitted / 'train'}' holds the training images" in capsys.readouterr().err
    assert (fitted / "ekfac.safetensors").read_bytes() == before
    shutil.copy(fitted / "ekfac.safetensors", tmp_path / "e.safetensors")
    output = ["--output", tmp_path / "e.safetensors", "--curvature", "kfac"]
    assert run(arguments(fitted, "fit", *output)) == 2
    assert run(arguments(fitted, "fit", *output, "--overwrite")) == 0
    assert (tmp_path / "e.safetensors").read_bytes() != before


def test_dry_run(fitted, capsys):
    """Counts, and runs no network; with --time it does."""
    ran = []
    hook = register_module_forward_hook(lambda *called: ran.append(called[0]))
    for command, passes in (("fit", 7 * (3 + 3)), ("score", 7 * 3 + 2 * 4)):
        assert run(arguments(fitted, command, "--dry-run", "--overwrite")) == 0
        told = capsys.readouterr().out
        assert re.search(rf"samples forward and backward +{passes}\n", told)
        for word in ("file", "memory beyond", "Counted from images", "--time runs a batch"):
            assert word in told
        assert "time  " not in told
    # two network calls for each of 20 steps
    assert run(arguments(fitted, "score", "--dry-run", "--measurement", "log_likelihood")) == 0
    assert f"samples forward and backward   {21 + 8 * 40}" in capsys.readouterr().out
    assert not ran
    for command in ("fit", "score"):
        assert run(arguments(fitted, command, "--time", "--overwrite")) == 0
        told = capsys.readouterr().out
        assert re.search(r"time +about \S+ s\n\nCounted, and the time estimated", told)
    assert ran
    hook.remove()


def test_what_is_done_once_is_counted_once(fitted):
    """Trying the network out takes longer than a batch here; with every batch it would be hours."""

    calls = []

    def run(some):
        calls.append(some.num_samples)
        time.sleep(0.3 + 0.002 * some.num_samples)

    objective = network(fitted / "pipeline").objective
    regression = NoisedRegression(objective, torch.zeros(10, 1, 8, 8), 1)
    each, once = cost._measured(regression.with_draws, run)
    assert calls == [10, 20, 40]
    assert 0.0015 <= each < 0.01
    assert 0.2 < once < 0.4


def test_the_cost_of_many_processes(monkeypatch):
    """Checkpoints on disk, and that each process has the memory."""
    told = cost.Cost(10, 2048, 4096, 1024, 5.0).text()
    assert re.search("checkpoints, until it is done +4 KiB", told)
    assert "processes" not in told
    monkeypatch.setenv("WORLD_SIZE", "3")
    told = cost.Cost(10, 2048, 4096, 1024, 5.0).text()
    assert re.search("processes, of such memory +3", told)


def test_a_model_and_its_scheduler(fitted, tmp_path):
    """Without a pipeline: the same operator."""
    network = ["--model", fitted / "pipeline" / "unet"]
    network += ["--scheduler", fitted / "pipeline" / "scheduler"]
    words = arguments(fitted, "fit", "--output", tmp_path / "e.safetensors", *network)
    del words[1:3]
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


@pytest.mark.slow  # a minute and a half; the library's parts are tested in runtime and curvature
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
    assert_same_to_readers(scores, alone)


def test_a_network_cannot_be_divided_alone(fitted, tmp_path, capsys):
    output = tmp_path / "e.safetensors"
    assert run(arguments(fitted, "fit", "--output", output, "--shard-network")) == 2
    assert "--shard-network needs several processes, got one" in capsys.readouterr().err


def assert_same_to_readers(in_files, in_one):
    """All that reads scores makes the same of them, but for rounding."""
    found = StoredScores.open(in_files)
    header, (expected, beside) = found.header, read(in_one)
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
    assert header.keys() == beside.keys()
    pages = []
    for path in (in_files, in_one):
        page = path.with_suffix(".html")
        assert run(["report", "--scores", str(path), "--output", str(page)]) == 0
        pages.append(re.findall(r"image\d\.png", page.read_text()))
        assert run(["inspect", str(path)]) == 0
    assert pages[0] == pages[1]


RECIPE = {
    **{"weighting": "min-snr", "snr_gamma": 2.0, "reduction": "sum", "timesteps": "uniform"},
    **{"noise_offset": 0.1, "input_perturbation": 0.2},
}


def test_the_loss_of_training(folder, tmp_path, capsys):
    """Options of training reach objective and draws; ``score`` takes those of ``fit``."""
    output, scores = tmp_path / "recipe.safetensors", tmp_path / "scores.safetensors"
    recipe = [word for key, value in RECIPE.items() for word in (f"--{key}", value)]
    assert run(arguments(folder, "fit", "--output", output, *recipe)) == 0
    described = read_header(output)["info"]["regression"]
    pipeline = DDPMPipeline.from_pretrained(folder / "pipeline")
    expected = DenoisingObjective(
        pipeline.unet, pipeline.scheduler, MinSNRWeighting(2.0), "sum"
    ).description
    assert {key: described[key] for key in expected} == expected
    assert described["noise_offset"] == 0.1
    assert described["input_perturbation"] == 0.2
    assert "Uniform" in described["timesteps"]
    capsys.readouterr()
    score = arguments(folder, "score", "--operator", output, "--output", scores)
    assert run(score) == 0
    taken, *_ = capsys.readouterr().err.splitlines()
    for word in ("--weighting min-snr", "--snr-gamma 2.0", "--noise-offset 0.1", "--pipeline /"):
        assert word in taken
    assert read(scores)[1]["run"].items() >= RECIPE.items()


def test_attribute(folder, tmp_path, capsys, monkeypatch):
    """Its options make the same again; another run is refused, and the folder stays as it was."""
    words = ["--pipeline", folder / "pipeline", "--data", folder / "train", "--quiet"]
    words += ["--queries", folder / "queries", "--fit-draws", 2, "--num-draws", 2]
    words += ["--method", "influence", "--damping", 1e-3]
    words += ["--output", tmp_path / "result", "--group-by"]
    assert run(["attribute", *map(str, words), "artist"]) == 2
    assert "by folder, or a list of a name for each, got 'artist'" in capsys.readouterr().err
    assert not (tmp_path / "result").exists()
    assert run(["attribute", *map(str, words), "folder"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    names = {"operator.safetensors", "scores.safetensors", "scores.csv", "report.html", "run.yaml"}
    names |= {"groups.csv"}
    assert {path.name for path in before} == names
    scores, header = read(tmp_path / "result" / "scores.safetensors")
    table = (tmp_path / "result" / "scores.csv").read_text().splitlines()
    best = header["train"][int(scores[0].argmax())]
    assert table[1].startswith(f"image0.png,{best},{float(scores[0].max())!r},")
    assert table[1].endswith(f",1,helps,,,influence,,{folder / 'train' / best}")
    group = (tmp_path / "result" / "groups.csv").read_text().splitlines()[1].split(",")
    assert group[:2] == ["image0.png", str(folder / "train")]
    assert float(group[2]) == pytest.approx(float(scores[0].sum()), rel=1e-5)
    config = ["--config", str(tmp_path / "result" / "run.yaml"), "--quiet"]
    for other in (["--fit-draws", "3"], ["--queries", folder / "train"]):
        again = [*config, "--output", tmp_path / "result", *other]
        assert run(["attribute", *map(str, again)]) == 2
        assert before == {path: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    assert "holds the training images" in capsys.readouterr().err
    assert run(["attribute", *config, "--output", str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "scores.csv").read_text().splitlines()
    assert again == table
    (tmp_path / "again" / "scores.csv").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(attribute, "_ROWS", 13)
        assert run(["attribute", *config, "--output", str(tmp_path / "again")]) == 0
    assert "for a table of all 14, report --scores" in capsys.readouterr().err
    assert not (tmp_path / "again" / "scores.csv").exists()


def test_how_the_data_lie_is_kept_with_the_scores(folder, tmp_path, capsys):
    """A split and broken images; later commands are told nothing of it again."""
    shutil.copytree(folder / "train", tmp_path / "data" / "train")
    shutil.copytree(folder / "queries", tmp_path / "data" / "test")
    (tmp_path / "data" / "train" / "image3.png").write_bytes(b"")
    words = ["attribute", "--pipeline", folder / "pipeline", "--data", tmp_path / "data"]
    words += ["--queries", tmp_path / "data" / "test", "--output", tmp_path / "result"]
    words += ["--params", "conv_out.*", "--fit-draws", 1, "--num-draws", 1, "--split", "train"]
    assert run([*map(str, words), "--quiet"]) == 2
    told = "train/image3.png' cannot be read ("
    assert told in (error := capsys.readouterr().err)
    assert "--skip-unreadable leaves out" in error
    assert run([*map(str, words), "--quiet", "--skip-unreadable"]) == 0
    assert "Read 6 images; 1 image left out, unreadable: 'train/" in capsys.readouterr().err
    scores = tmp_path / "result" / "scores.safetensors"
    _, header = read(scores)
    assert header["train"] == [f"train/image{n}.png" for n in range(7) if n != 3]
    of_scores = ["--scores", str(scores), "--output"]
    assert run(["report", *of_scores, str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").stat().st_size > 1000
    assert run(["validate", "plan", *of_scores, str(tmp_path / "plan"), "--num-parts", "2"]) == 0
    assert "2 parts of 6 images" in capsys.readouterr().err
