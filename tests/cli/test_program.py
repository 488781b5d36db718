"""The command line, on a pipeline saved by ``save_pretrained`` and PNG files."""

import json
import re
import resource
import shutil
import subprocess
import sys

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
    influence_scores,
    load_operator,
)
from curvlinops_diffusion.cli.commands import cost
from curvlinops_diffusion.cli.images.images import open_images
from curvlinops_diffusion.cli.images.labels import Condition
from curvlinops_diffusion.cli.images.preprocessing import Form
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import FitOptions
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.cli.score_files import read_scores
from curvlinops_diffusion.runtime.files import FileKind
from tests.cases import tiny_unet
from tests.diffusion import test_pipelines as pipelines

COUNT = 7


def write_images(folder, count, seed, size=8, suffix=".png"):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for n in range(count):
        pixels = generator.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{n}{suffix}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, training images and queries."""
    folder = tmp_path_factory.mktemp("cli")
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "pipeline")
    write_images(folder / "train", COUNT, seed=0)
    write_images(folder / "queries", 2, seed=1)
    return folder


def arguments(folder, command, *more):
    common = ["--pipeline", folder / "pipeline", "--data", folder / "train", "--batch-size", 3]
    own = {
        "fit": ["--output", folder / "ekfac.safetensors", "--num-draws", 3],
        "score": [
            *("--operator", folder / "ekfac.safetensors", "--queries", folder / "queries"),
            *("--output", folder / "scores.safetensors", "--num-draws", 3, "--query-draws", 4),
            *("--damping", 1e-3),
        ],
    }[command]
    return [str(word) for word in [command, *common, *own, "--quiet", *more]]


def program(*words, cwd=None):
    """Run the real program."""
    command = [sys.executable, "-m", "curvlinops_diffusion", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def fitted(folder):
    finished = program(*arguments(folder, "fit"))
    assert finished.returncode == 0, finished.stderr
    assert "4,877 parameters in" in finished.stderr
    assert "gemm_4bit" not in finished.stderr  # of bitsandbytes, which is not used
    finished = program(*arguments(folder, "score"))
    assert finished.returncode == 0, finished.stderr
    assert not list(folder.glob("*.checkpoint"))
    return folder


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


def test_inspect(fitted):
    finished = program("inspect", fitted / "ekfac.safetensors")
    assert finished.returncode == 0
    assert "ekfac with 4,877 parameters in" in finished.stdout
    assert "conv_in.weight" in finished.stdout
    assert '"num_draws": 3' in finished.stdout
    finished = program("inspect", fitted / "scores.safetensors")
    assert "influence scores of 7 training images on 2 queries" in finished.stdout
    assert '"damping": 0.001' in finished.stdout


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


def test_options_from_a_file(fitted, tmp_path):
    """A YAML file with the fields' names; flags after it go first."""
    config = tmp_path / "options.yaml"
    lines = [f"pipeline: {fitted / 'pipeline'}", f"data: {fitted / 'train'}", "num_draws: 2"]
    config.write_text("\n".join([*lines, "batch_size: 3", "quiet: true", "seed: 5"]))
    output = tmp_path / "e.safetensors"
    words = ["fit", "--config", config, "--output", output, "--seed", 6]
    assert run([str(word) for word in words]) == 0
    finished = program("inspect", output)
    assert '"num_draws": 2' in finished.stdout
    assert '"seed": 6' in finished.stdout


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


# ---------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------


def test_killed_and_started_again(fitted, tmp_path):
    """SIGKILL to the real program; what it wrote down is used, and the file is the same."""
    output = tmp_path / "e.safetensors"
    words = arguments(fitted, "fit", "--output", output, "--checkpoint-every", "0")
    process = subprocess.Popen([sys.executable, "-m", "curvlinops_diffusion", *words])
    checkpoint = tmp_path / "e.safetensors.checkpoint"
    while not list(checkpoint.glob("*.safetensors")) and process.poll() is None:
        pass
    process.kill()
    process.wait()
    assert not output.exists()
    assert list(checkpoint.glob("*.safetensors"))
    assert program(*words).returncode == 0
    whole = load_file(fitted / "ekfac.safetensors")
    for name, tensor in load_file(output).items():
        assert torch.equal(tensor, whole[name]), name


def test_several_processes(fitted, tmp_path):
    """By torchrun; batches of three of seven images, which three processes do not divide."""
    output = tmp_path / "e.safetensors"
    words = arguments(fitted, "fit", "--output", output)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    finished = subprocess.run(
        [*launch, "-m", "curvlinops_diffusion", *words], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("Wrote ") == 1
    unet = DDPMPipeline.from_pretrained(fitted / "pipeline").unet.eval()
    v = torch.randn(4877, generator=torch.Generator().manual_seed(0))
    one, three = (load_operator(path, unet) for path in (fitted / "ekfac.safetensors", output))
    torch.testing.assert_close(
        three @ v, one @ v, rtol=1e-3, atol=1e-4 * float((one @ v).abs().max())
    )


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def test_errors_are_one_line(folder):
    finished = program(*arguments(folder, "fit", "--data", folder / "nowhere"))
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: '{folder / 'nowhere'}' does not exist. Pass a folder of images")
    finished = program(*arguments(folder, "fit", "--data", folder / "nowhere", "--debug"))
    assert "Traceback" in finished.stderr
    assert finished.returncode == 2


def test_flags_that_are_wrong(folder):
    finished = program("fit", "--data", "x", "--curvature", "hessian")
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--bogus", "3"], "unrecognized arguments: --bogus 3. 'curvlinops-diffusion fit"),
        (["fit", "--num-draws", "few"], "--num-draws: Expected int. Got value: few"),
        (["fit", "--config", "nowhere.yaml"], "--config: File does not exist: "),
        (["fit", "--config", "bad.yaml"], "Problems parsing config: "),
        (["score", "--damping", "nan"], "--damping: Expected float. Got value: nan"),
        (["fit"], "the following arguments are required: --data, --output. "),
        (["train"], "invalid choice: 'train' (choose from "),
        (["report", "--scores=s", "--data=d", "--queries=q", "--output=o.html", "--top=-3"], ""),
        (["fit", "--data=d", "--output=o.safetensors", "--resolution=0"], "--resolution is 0."),
        (["fit", "--data=d", "--output=o.safetensors", "--checkpoint-every=.nan"], "is nan."),
        (["inspect", "train/0.png"], "'train/0.png' is neither an operator's file, .safetensors"),
        (["inspect", "none.safetensors"], "'none.safetensors'. Make it by curvlinops-diffusion"),
    ],
)
def test_usage_errors_are_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("a: [1\nb: :")
    assert run([*words, "--log", "log"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert captured.out == ""
    start, error = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert start["event"] == "start"
    assert error["event"] == "error"
    assert line == f"error: {error['message']}"


def broken_pipeline(folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "broken")
    (weights,) = (tmp_path / "broken").rglob("*.safetensors")
    weights.write_bytes(b"nothing")
    return ["--pipeline", tmp_path / "broken"]


def corrupt_image(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "corrupt")
    path = tmp_path / "corrupt" / "image4.png"
    path.write_bytes(path.read_bytes()[:40])
    return ["--data", tmp_path / "corrupt"]


def large_image(folder, tmp_path):
    write_images(tmp_path / "large", 2, 0, size=9)
    return ["--data", tmp_path / "large"]


def no_images(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    return ["--data", tmp_path / "empty"]


def folder_as_output(folder, tmp_path):
    (tmp_path / "d.safetensors").mkdir()
    return ["--output", tmp_path / "d.safetensors"]


def pickled_array(folder, tmp_path):
    np.savez(tmp_path / "p.npz", images=np.array([{"a": 1}], dtype=object))
    return ["--data", tmp_path / "p.npz"]


def pickled_weights(folder, tmp_path):
    shutil.copytree(folder / "pipeline", tmp_path / "pickled")
    (weights,) = (tmp_path / "pickled").rglob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return ["--pipeline", tmp_path / "pickled"]


ERRORS = {
    broken_pipeline: "broken' cannot be loaded",
    corrupt_image: "image4.png' cannot be read (",
    large_image: "image0.png' is 9×9 pixels, the network was trained on 8×8. Pass --resolution 8",
    no_images: "empty' holds no images. Pass a folder",
    folder_as_output: "d.safetensors is a folder. Pass the name of a file.",
    pickled_array: "p.npz' cannot be read (Object arrays cannot be loaded when allow_pickle=False",
    pickled_weights: "pickled' cannot be loaded",
    lambda f, t: ["--pipeline", f / "train"]: "holds no model_index.json. Pass a folder",
    lambda f, t: ["--model", f / "pipeline" / "unet"]: "Pass --pipeline FOLDER, or --model",
    lambda f, t: ["--output", t / "no" / "e.safetensors"]: "of --output does not exist",
    lambda f, t: ["--output", t / "e.pt"]: "must end in .safetensors",
    lambda f, t: ["--log", t / "no" / "log"]: "cannot be written",
    lambda f, t: ["--device", "cuda:77"]: "--device cuda:77 is not to be had here",
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(folder, tmp_path, capsys, case):
    output = ["--output", tmp_path / "e.safetensors"]
    more = [str(word) for word in case(folder, tmp_path)]
    assert run(arguments(folder, "fit", *output, *more)) == 2
    told = capsys.readouterr().err
    assert ERRORS[case] in told
    assert "Traceback" not in told
    assert not (tmp_path / "e.safetensors").exists()


def test_files_of_limited_size(folder, tmp_path):
    """The operating system refuses to write more: told in a line, nothing half-written."""
    words = arguments(folder, "fit", "--output", tmp_path / "e.safetensors")
    limited = subprocess.run(
        [sys.executable, "-m", "curvlinops_diffusion", *words, "--checkpoint-every", "0"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert limited.returncode == 2
    assert "Traceback" not in limited.stderr
    assert "warning: The checkpoint was not written, and the pass goes on" in limited.stderr
    assert "error: " in limited.stderr
    assert "could not be written" in limited.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_that_cannot_be_written(folder, tmp_path, capsys, monkeypatch):
    """A full disk: what was computed is kept, and used when there is space again."""
    from curvlinops_diffusion.linalg import storage

    class Full(FileKind):
        def write(self, *args):
            raise ValueError("'e' could not be written: No space left on device.")

    output = tmp_path / "e.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(storage, "OPERATOR", Full("", "", ""))
        assert run(arguments(folder, "fit", "--output", output)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(list((tmp_path / "e.safetensors.checkpoint").glob("*"))) == 3
    shutil.copytree(tmp_path / "e.safetensors.checkpoint", tmp_path / "o.safetensors.checkpoint")
    assert run(arguments(folder, "fit", "--output", output)) == 0
    assert output.exists()
    # a checkpoint of something else is in the way, unless it may be overwritten
    other = arguments(folder, "fit", "--output", tmp_path / "o.safetensors", "--num-draws", "2")
    assert run(other) == 2
    assert "is of something else: regression.num_draws (3 there, 2 here)" in capsys.readouterr().err
    assert run([*other, "--overwrite"]) == 0
    assert not (tmp_path / "o.safetensors.checkpoint").exists()


def test_scores_that_are_damaged(fitted, tmp_path, capsys):
    path = tmp_path / "s.safetensors"
    path.write_bytes((fitted / "scores.safetensors").read_bytes()[:300])
    assert run(["inspect", str(path)]) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "none.npy")]) == 2
    assert "There is no file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Forms of data
# ---------------------------------------------------------------------------------------------

FORM = Form(1, (8, 8), None)


def test_classes_from_folders(tmp_path):
    write_images(tmp_path / "data" / "cats", 2, 0)
    write_images(tmp_path / "data" / "dogs", 1, 1)
    images = open_images(tmp_path / "data", FORM)
    assert images.names == ["cats/image0.png", "cats/image1.png", "dogs/image0.png"]
    assert [images[n]["class_labels"] for n in range(3)] == [0, 0, 1]
    assert "class_labels" not in open_images(tmp_path / "data", FORM, Condition())[0]


def classes(folder, *names):
    for name in names:
        write_images(folder / name, 1, 0)
    return folder


def test_classes_of_queries_are_numbered_as_in_training(tmp_path):
    train = open_images(classes(tmp_path / "train", "a", "b", "c"), FORM)

    def labels(name, *names):
        path = classes(tmp_path / name, *names)
        queries = open_images(path, FORM, Condition("class_labels", 3), train)
        return [queries[n]["class_labels"] for n in range(len(queries))]

    assert labels("queries", "b", "c") == [1, 2]
    assert labels("one", "c") == [2]
    with pytest.raises(ValueError, match=r"The class 'd' of the query 'd/image0.png' is none of"):
        labels("unknown", "a", "d")
    only = open_images(classes(tmp_path / "only", "a"), FORM)
    assert only[0]["class_labels"] == 0
    np.savez(tmp_path / "n.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, 0]))
    with pytest.raises(
        ValueError, match=r"have names \(b, c\), those of the training data numbers"
    ):
        open_images(tmp_path / "queries", FORM, None, open_images(tmp_path / "n.npz", FORM))


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, "image1.png' of '.*' has no label, which the network takes. Put each class into"),
        ({"label": "cat"}, "The label of image 'image1.png' of '.*' is 'cat', and the network"),
        ({"label": 3}, "is 3, and the network knows the whole numbers from 0 to 2. Number"),
        ({"label": -1}, "is -1, and the network"),
        ({"label": 1.0}, "is 1.0, and the network"),
    ],
)
def test_labels_that_the_network_does_not_know(tmp_path, entry, told):
    write_images(tmp_path / "data", 2, 0)
    lines = [{"file_name": "image0.png", "label": 2}, {"file_name": "image1.png", **entry}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path / "data", FORM, Condition("class_labels", 3))
    with pytest.raises(ValueError, match=r"image0.png' of '.*' has no prompt, which"):
        open_images(tmp_path / "data", FORM, Condition("prompt"))
    assert set(open_images(tmp_path / "data", FORM, Condition())[0]) == {"x0"}


def test_prompts_from_metadata(tmp_path):
    write_images(tmp_path / "data", 2, 0)
    lines = [{"file_name": "image1.png", "text": "b"}, {"file_name": "image0.png", "text": "a"}]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = open_images(tmp_path / "data", FORM)
    assert [images[n]["prompt"] for n in range(2)] == ["a", "b"]
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(ValueError, match=r"metadata.jsonl' is not understood \(KeyError: 'image0"):
        open_images(tmp_path / "data", FORM)


def test_saved_data_sets(tmp_path):
    import datasets

    write_images(tmp_path / "data", 3, 0)
    files = sorted(str(path) for path in (tmp_path / "data").glob("*.png"))
    saved = datasets.Dataset.from_dict({"image": files, "label": [2, 0, 1]})
    saved.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    images = open_images(tmp_path / "saved", FORM)
    expected = open_images(tmp_path / "data", FORM)
    assert len(images) == 3
    for n in range(3):
        assert torch.equal(images.image(n), expected.image(n))
    assert images[0]["class_labels"] == 2


def test_arrays(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=np.array([3, 1, 2, 0]))
    images = open_images(tmp_path / "bytes.npz", Form(3, (8, 8), None))
    assert torch.equal(images.image(1), torch.from_numpy(pixels[1]).permute(2, 0, 1) / 127.5 - 1)
    assert images[0]["class_labels"] == 3
    floats = generator.random((4, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "floats.npz", images=floats)
    images = open_images(tmp_path / "floats.npz", FORM)
    assert torch.equal(images.image(2), torch.from_numpy(floats[2]))


BYTES, FLOATS = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": FLOATS + 1.01}, r"'a.npz\[0\]' has pixels from 1.01 to 1.01. Floating point"),
        ({"images": FLOATS + np.nan}, "has pixels from nan to nan"),
        ({"images": BYTES, "labels": np.arange(3)}, r"shape \(3,\) beside 2 images"),
        ({"images": BYTES, "labels": np.ones(2)}, "'labels' of .* is of float64"),
        ({"images": BYTES.transpose(0, 3, 1, 2)}, r"Save images.transpose\(0, 2, 3, 1\): bytes"),
        ({"images": FLOATS.transpose(0, 2, 3, 1)}, r"Save images.transpose\(0, 3, 1, 2\): bytes"),
        ({"images": BYTES.astype(np.int64)}, "'images' of .* is of int64. It must hold"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "4 channels, and 1 or 3 can be taken"),
        ({"pictures": BYTES}, r"holds \{'pictures': \(2, 8, 8, 3\)\}. It must hold 'images'"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, arrays, told):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path / "a.npz", Form(3, (8, 8), None))


def test_sixteen_bits_and_transparency(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    x = Form(3, (8, 8), None).tensor(Image.fromarray(ramp), "ramp")
    torch.testing.assert_close(x[2], torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1)
    assert torch.equal(x[:1], FORM.tensor(Image.fromarray(ramp.astype(np.int32)), "ramp"))
    for values in (ramp.astype(np.int32) - 1, ramp.astype(np.float32)):
        with pytest.raises(ValueError, match=r"The image 'ramp' has pixels from"):
            FORM.tensor(Image.fromarray(values), "ramp")
    opaque = Image.fromarray((ramp >> 8).astype(np.uint8))
    for mode in ("LA", "RGBA"):
        image = opaque.convert(mode)
        assert torch.equal(FORM.tensor(image, "a"), FORM.tensor(opaque, "a"))
        image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 254))
        with pytest.raises(ValueError, match=r"The image 'a' has transparent pixels, and what"):
            FORM.tensor(image, "a")


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path / "data", 1, 0)
    write_images(tmp_path / "data" / "large", 1, 0, size=12)
    images = open_images(tmp_path / "data", Form(3, None, None))
    assert images[0]["x0"].shape == (3, 8, 8)
    with pytest.raises(
        ValueError, match=r"'large/image0.png' has shape \(3, 12, 12\), and 'image0"
    ):
        images[1]
    with pytest.raises(ValueError, match=r"12×12 pixels, and the network takes multiples of 8. "):
        open_images(tmp_path / "data", Form(3, None, None, 8)).image(1)


@pytest.mark.parametrize(
    ("make", "size", "multiple", "condition"),
    [
        (pipelines.ddpm, (8, 8), 2, Condition()),
        (pipelines.ldm, None, 4, Condition()),
        (pipelines.dit, (8, 8), 4, Condition("class_labels", 4)),
    ],
)
def test_what_networks_take(tmp_path, make, size, multiple, condition):
    """Grey images become three channels; sizes that would not fit are known beforehand."""
    make(tmp_path).save_pretrained(tmp_path / "p")
    network = load_network(FitOptions(pipeline=tmp_path / "p", data=tmp_path, output=tmp_path))
    assert network.form(None) == Form(3, size, None, multiple)
    assert network.condition == condition


def test_resizing(tmp_path):
    write_images(tmp_path / "data", 1, 0, size=20)
    images = open_images(tmp_path / "data", Form(3, (8, 8), 8))
    assert images.image(0).shape == (3, 8, 8)


def test_a_model_and_its_scheduler(folder, tmp_path):
    """Without a pipeline: the same operator."""
    words = arguments(folder, "fit", "--output", tmp_path / "e.safetensors")
    at = words.index("--pipeline")
    words[at : at + 2] = [
        *("--model", str(folder / "pipeline" / "unet")),
        *("--scheduler", str(folder / "pipeline" / "scheduler")),
    ]
    assert run(words) == 0
    assert run(arguments(folder, "fit", "--output", tmp_path / "p.safetensors")) == 0
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in "ep")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
