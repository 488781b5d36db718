"""What a start of the program takes: below a CPU-second, unless a network is loaded."""

import resource
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.score_files import write_scores
from tests.cli.cases import write_images

# a stand-in for the installed script that tells afterwards what it has imported
SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({missing}))
from curvlinops_diffusion.__main__ import main
sys.argv[1:] = {words}
try:
    code = main()
except SystemExit as end:
    code = end.code
print("imported", *sys.modules)
sys.exit(code)
"""


def start(*words, missing=()):
    """The process, its CPU-seconds, and the modules that it imported."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = SCRIPT.format(words=list(map(str, words)), missing=list(missing))
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    *_, imported = finished.stdout.splitlines()
    return finished, seconds, set(imported.split())


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["fit", "--help"], 0),
        (["validate-measure", "--help"], 0),
        ([], 0),
        (["fit", "--bogus"], 2),
        (["score", "--data", "d", "--damping", "nan"], 2),
        (["inspect", "none.safetensors"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_refusals_do_without_pytorch(words, code):
    finished, seconds, imported = start(*words)
    assert finished.returncode == code, finished.stderr
    assert (finished.stdout if code == 0 else finished.stderr).startswith(
        "usage: curvlinops-diffusion" if code == 0 else "error: "
    )
    assert not imported & {"curvlinops", "diffusers", "matplotlib", "scipy", "torch"}
    assert seconds < 1


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["fit", "--help"], "jsonargparse"),
        (["fit", "--help"], "docstring_parser"),
        (["fit", "--help"], "yaml"),
        (["report"], "matplotlib"),
        (["report"], "jinja2"),
    ],
)
def test_without_the_extra(words, missing, tmp_path):
    """One line that says what to install."""
    told = f"the command line needs {missing}"
    if words == ["report"]:
        write_images(tmp_path / "images", 1, seed=0)
        names = {"train": ["image0.png"], "queries": ["image0.png"], "identity": {}}
        write_scores(tmp_path / "s.safetensors", {"scores": torch.zeros(1, 1)}, names)
        words = [*words, "--scores", tmp_path / "s.safetensors", "--data", tmp_path / "images"]
        words += ["--queries", tmp_path / "images", "--output", tmp_path / "o.html"]
        told = f"A page needs {missing}"
    finished, _, _ = start(*words, missing=[missing])
    assert finished.returncode == 2
    assert finished.stderr == f"error: {told}: pip install 'curvlinops-diffusion[cli]'.\n"


def test_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", "curvlinops_diffusion", "inspect", "image.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: 'image.png' is neither an operator's file")


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        run(["--version"])
    assert left.value.code == 0
    told = capsys.readouterr().out.strip()
    assert told == f"curvlinops-diffusion {version('curvlinops-diffusion')}"
