"""The report, as a browser shows it."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from curvlinops_diffusion import DiffusionEKFACLinearOperator
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.cli.score_files import read_scores, write_scores
from tests.cases import tiny_unet, unet_regression
from tests.cli.cases import write_images

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TRAIN, QUERIES = 12, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_images(folder / "train", TRAIN, seed=0)
    write_images(folder / "queries", QUERIES, seed=1)
    scores = torch.randn(QUERIES, TRAIN, generator=torch.Generator().manual_seed(0))
    names = {
        "train": sorted(path.name for path in (folder / "train").iterdir()),
        "queries": sorted(path.name for path in (folder / "queries").iterdir()),
    }
    write_scores(folder / "scores.safetensors", scores, names, {"query": {"damping": 1e-8}})
    DiffusionEKFACLinearOperator(unet_regression(tiny_unet(), count=3)).save(
        folder / "ekfac.safetensors"
    )
    return folder


def arguments(folder, output, *more):
    words = ["report", "--scores", folder / "scores.safetensors", "--data", folder / "train"]
    words += ["--queries", folder / "queries", "--output", output, "--top", 4]
    return [str(word) for word in [*words, "--operator", folder / "ekfac.safetensors", *more]]


@pytest.fixture(scope="module")
def page(folder):
    output = folder / "report.html"
    assert run(arguments(folder, output)) == 0
    return output


def test_it_names_the_right_images(folder, page):
    scores, header = read_scores(folder / "scores.safetensors")
    text = page.read_text()
    sections = text.split('<section class="query">')[1:]
    assert len(sections) == QUERIES
    for section, row, query in zip(sections, scores, header["queries"], strict=True):
        shown = re.findall(r'alt="([^"]+)"', section)
        names = np.array(header["train"])
        expected = [
            *names[row.argsort(descending=True)[:4]],
            *names[row.argsort()[:4]],
            *names[row.abs().argsort()[:4]],
        ]
        assert shown == [query, *expected]
        assert f"{row.max():+.2e}" in section


def test_it_needs_nothing_else(page):
    """No address outside the page, and no script."""
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"#]+)', text)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "<script" not in text


def browser(*words):
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
def test_in_a_browser(page, tmp_path):
    """Every picture is decoded, nothing overflows, and something is drawn."""
    probe = tmp_path / "probe.html"
    script = """<script>
    const images = [...document.images];
    const broken = images.filter(i => !i.complete || i.naturalWidth == 0).length;
    const wide = document.documentElement.scrollWidth > window.innerWidth;
    document.title = `${images.length} images, ${broken} broken, wide ${wide}`;
    </script></body>"""
    probe.write_text(page.read_text().replace("</body>", script))
    dom = browser("--window-size=1300,2400", "--dump-dom", f"file://{probe}")
    count = QUERIES * (1 + 3 * 4)
    assert f"<title>{count} images, 0 broken, wide false</title>" in dom

    picture = tmp_path / "page.png"
    browser("--window-size=1300,2400", f"--screenshot={picture}", f"file://{page}")
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (2400, 1300)
    dark = (pixels < 128).mean(1)  # rows of pixels
    assert (dark > 0.01).mean() > 0.2


def test_errors(folder, page, tmp_path, capsys):
    before = page.read_bytes()
    assert run(arguments(folder, page)) == 2
    assert "exists. Pass --overwrite" in capsys.readouterr().err
    assert page.read_bytes() == before
    assert run(arguments(folder, tmp_path / "r.html", "--data", folder / "queries")) == 2
    assert "holds 3 images that are not the 12 that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measurement", "told"),
    [("elbo", "so positive means helpful"), ("log_likelihood", "so here negative means helpful")],
)
def test_it_says_what_the_sign_means(folder, tmp_path, measurement, told):
    scores, header = read_scores(folder / "scores.safetensors")
    names = {key: header[key] for key in ("train", "queries")}
    identity = {"query": {"measurement": measurement}}
    write_scores(tmp_path / "s.safetensors", scores, names, identity)
    words = arguments(folder, tmp_path / "r.html", "--scores", tmp_path / "s.safetensors")
    assert run(words) == 0
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert f"left out of {TRAIN}. Measured: {measurement}, " in text
    assert told in text


def test_names_are_escaped(tmp_path):
    write_images(tmp_path / "train", 1, seed=0)
    (tmp_path / "train" / "image0.png").rename(tmp_path / "train" / "<b>&.png")
    scores, names = torch.zeros(1, 1), ["<b>&.png"]
    path = tmp_path / "scores.safetensors"
    write_scores(path, scores, {"train": names, "queries": names}, {})
    words = ["report", "--scores", path, "--data", tmp_path / "train"]
    words += ["--queries", tmp_path / "train", "--output", tmp_path / "r.html"]
    assert run([str(word) for word in words]) == 0
    assert "<b>" not in (tmp_path / "r.html").read_text()
