"""What a start of the program takes: below a CPU-second, unless a network is loaded."""

import subprocess
import sys
from importlib.metadata import version

import torch

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.score_files import write_scores
from tests.cli.cases import outcomes, write_images

STARTS = [
    ([], 0),
    (["fit", "--help"], 0),
    (["validate-measure", "--help"], 0),
    (["--version"], 0),
    (["fit", "--bogus"], 2),
    (["score", "--data", "d", "--damping", "nan"], 2),
    (["inspect", "none.safetensors"], 2),
]


def test_help_and_refusals_do_without_pytorch():
    found, seconds = outcomes([words for words, _ in STARTS])
    for (words, code), (own, out, error, heavy) in zip(STARTS, found, strict=True):
        assert own == code, words
        if words == ["--version"]:
            assert out == f"curvlinops-diffusion {version('curvlinops-diffusion')}\n"
        else:
            assert (error if code else out).startswith("error: " if code else "usage: curvlinops-")
        assert not heavy, words
    assert seconds < 2  # of all of them


def test_without_the_extra(tmp_path, capsys, monkeypatch):
    """One line that says what to install, of the program and of a page."""
    script = "import sys; sys.modules['jsonargparse'] = None; sys.argv[1:] = ['fit', '--help']\n"
    script += "from curvlinops_diffusion.__main__ import main; sys.exit(main())"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    told = "needs {}: pip install 'curvlinops-diffusion[cli]'.\n"
    assert finished.returncode == 2
    assert finished.stderr == "error: the command line " + told.format("jsonargparse")
    write_images(tmp_path / "images", 1, seed=0)
    names = {"train": ["image0.png"], "queries": ["image0.png"], "identity": {}}
    write_scores(tmp_path / "s.safetensors", {"scores": torch.zeros(1, 1)}, names)
    words = ["report", "--scores", tmp_path / "s.safetensors", "--output", tmp_path / "o.html"]
    words += ["--data", tmp_path / "images", "--queries", tmp_path / "images"]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in ("report", "templates"):
        monkeypatch.delitem(sys.modules, f"curvlinops_diffusion.page.{name}", raising=False)
    assert run([str(word) for word in words]) == 2
    assert capsys.readouterr().err == "error: A page " + told.format("jinja2")


def test_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", "curvlinops_diffusion", "inspect", "image.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: 'image.png' is neither an operator's file")
