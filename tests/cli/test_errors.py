"""Whatever goes wrong is told in a line, and leaves nothing half-written."""

import json
import resource
import shutil

import pytest

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.runtime.files import FileKind
from tests.cli.cases import arguments, write_images


def test_where_an_error_arose_is_shown_if_asked_for(folder, capsys):
    nowhere = folder / "nowhere"
    assert run(arguments(folder, "fit", "--data", nowhere)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: '{nowhere}' does not exist. Pass a folder of images")
    assert run(arguments(folder, "fit", "--data", nowhere, "--debug")) == 2
    traceback = capsys.readouterr().err
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.endswith(f"{line}\n")
    assert "in check_paths" in traceback


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--bogus", "3"], "unrecognized arguments: --bogus 3. 'curvlinops-diffusion fit"),
        (["fit", "--data", "x", "--curvature", "hessian"], "--curvature: Expected "),
        (["fit"], "the following arguments are required: --data, --output. "),
        (["train"], "invalid choice: 'train' (choose from "),
        (
            ["fit", "--data=d", "--output=o.safetensors", "--resolution=0"],
            "--resolution must be a whole number",
        ),
        (["inspect", "train/0.png"], "'train/0.png' is neither an operator's file, .safetensors"),
    ],
)
def test_usage_errors_are_one_line(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
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


def large_image(folder, tmp_path):
    write_images(tmp_path / "large", 2, 0, size=9)
    return ["--data", tmp_path / "large"]


ERRORS = {
    broken_pipeline: "broken' cannot be loaded",
    large_image: "image0.png' is 9×9 pixels, the network was trained on 8×8. Pass --resolution 8",
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


@pytest.fixture
def files_of_limited_size():
    """The operating system refuses to write more than 20,000 bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_of_limited_size(folder, tmp_path, capsys, files_of_limited_size):
    """Told in a line, nothing half-written."""
    words = arguments(folder, "fit", "--output", tmp_path / "e.safetensors")
    assert run([*words, "--checkpoint-every", "0"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "warning: The checkpoint was not written, and the pass goes on" in told
    assert "error: " in told
    assert "could not be written" in told
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


def test_an_output_that_is_an_input_is_refused(fitted, tmp_path, capsys):
    """Also with ``--overwrite``, and by another name: what was read is not destroyed."""
    operator, linked = tmp_path / "e.safetensors", tmp_path / "linked.safetensors"
    shutil.copy(fitted / "ekfac.safetensors", operator)
    before = operator.read_bytes()
    linked.symlink_to(operator)
    for output in (operator, linked):
        more = ["--operator", operator, "--output", output, "--overwrite"]
        assert run(arguments(fitted, "score", *more)) == 2
        assert f"--output {output} is what --operator reads. Pass" in capsys.readouterr().err
    assert operator.read_bytes() == before
