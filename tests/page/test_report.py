"""The report, as a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.measurements.registry import Better
from curvlinops_diffusion.influence.score_files import write_scores
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.page.rankings import Sizes, common_images, rows_of
from curvlinops_diffusion.page.report import thumbnail
from tests.cli.cases import arguments as program_arguments
from tests.cli.cases import write_images, write_problem

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TRAIN, QUERIES, TOP = 7, 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scored by the program, with halves; the training images have classes in their folders."""
    folder = write_problem(tmp_path_factory.mktemp("report"))
    for path in sorted((folder / "train").iterdir()):
        own = folder / "train" / ("even" if int(path.stem[-1]) % 2 == 0 else "odd")
        own.mkdir(exist_ok=True)
        path.rename(own / path.name)
    assert run(program_arguments(folder, "fit")) == 0
    assert run(program_arguments(folder, "score", "--num-draws", "4")) == 0
    return folder


def arguments(folder, output, *more):
    words = ["report", "--scores", folder / "scores.safetensors", "--data", folder / "train"]
    words += ["--queries", folder / "queries", "--output", output, "--top", TOP]
    return [str(word) for word in [*words, "--operator", folder / "ekfac.safetensors", *more]]


@pytest.fixture(scope="module")
def page(folder):
    output = folder / "report.html"
    assert run(arguments(folder, output)) == 0
    return output


def sections_of(text):
    return text.split('<section class="query"')[1:]


def rows_shown(section):
    """Titles, and under each the names and numbers of its images."""
    found = {}
    for part in section.split("<h3>")[1:]:
        names = re.findall(r'<span class="name">([^<]+)', part)
        numbers = re.findall(r"<b>([^<]+)</b>", part)
        found[part.split("</h3>")[0]] = list(zip(names, numbers, strict=True))
    return found


def test_it_names_the_right_images(folder, page):
    """Each row has its own sign alone; numbers are shares of the query's value."""
    scores = StoredScores.open(folder / "scores.safetensors")
    header = scores.header
    sections = sections_of(page.read_text())
    assert len(sections) == QUERIES
    for section, row, query, value in zip(
        sections, scores, header["queries"], header["values"], strict=True
    ):
        assert f">{query}</h2>" in section
        assert f"loss: {value:.4g}" in section
        shown = rows_shown(section)
        names = np.array(header["train"])
        for title, sign in (("helps", 1), ("hinders", -1)):
            order = (sign * row).argsort(descending=True)[:TOP]
            expected = [names[n] for n in order if sign * row[n] > 0]
            assert [name for name, _ in shown[title]] == expected
            for n, (_, number) in zip(order, shown[title], strict=False):
                amount, unit = number.replace("\u2212", "-").split()
                factor = {"%": 100, "ppm": 1e6}[unit]
                assert float(amount) == pytest.approx(factor * float(row[n]) / value, rel=0.06)
        assert (
            "of the top 3 in both halves of the draws (1.3 by chance), rank correlation" in section
        )
        assert re.search(r"numbers ± [\d.]+ (%|ppm)", section)


def test_classes_are_under_the_images(page):
    (section, *_) = sections_of(page.read_text())
    found = re.findall(r'<span class="name">(even|odd)/[^<]+</span><i>(\w+)</i>', section)
    assert found
    assert all(folder == caption for folder, caption in found)


def test_groups_by_the_program(folder, tmp_path, capsys):
    """On the page and as a table, which are no page's business; others are refused by name."""
    groups = tmp_path / "groups.csv"
    for output in (tmp_path / "r.html", groups, tmp_path / "s.parquet"):
        more = ["--group-by", "class"] if output.suffix != ".parquet" else []
        assert run(arguments(folder, output, *more)) == 0
    scores = StoredScores.open(folder / "scores.safetensors").whole()
    table = pd.read_csv(groups).set_index(["query", "group"])
    sections = sections_of((tmp_path / "r.html").read_text())
    for q, (query, section) in enumerate(zip(("image0.png", "image1.png"), sections, strict=True)):
        for name, own in (("even", slice(0, 4)), ("odd", slice(4, 7))):
            row = table.loc[query, name]
            assert row["sum"] == pytest.approx(float(scores[q, own].sum()), rel=1e-5)
            assert f"<td>{name}</td><td>{row['count']}</td>" in section
    assert len(pd.read_parquet(tmp_path / "s.parquet")) == scores.numel()
    assert run(arguments(folder, tmp_path / "x.html", "--group-by", "artist")) == 2
    assert "Groups of training images are by class, folder, or a list" in capsys.readouterr().err


def test_it_needs_nothing_else(page):
    """No address outside the page, and no script; each picture is in it once."""
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"]+)', text)
    assert all(address.startswith("#") for address in addresses)
    pictures = re.findall(r"url\(([^#)]+)\)", text)  # with # are parts of drawings
    assert len(set(pictures)) == len(pictures) <= TRAIN + QUERIES
    assert all(picture.startswith("data:image/") for picture in pictures)
    assert "<script" not in text


def browser(*words):
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, check=True, timeout=120
    ).stdout


WIDTHS = pytest.mark.parametrize("width", [1300, 390])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@WIDTHS
def test_in_a_browser(page, tmp_path, width):
    """Every picture has a size and an image, nothing is wider than the screen, on a phone too."""
    script = """<script>
    const frame = document.querySelector("iframe");
    frame.onload = () => {
      const page = frame.contentDocument;
      const pictures = [...page.querySelectorAll(".picture")];
      const style = p => frame.contentWindow.getComputedStyle(p).backgroundImage;
      const blank = pictures.filter(p => p.offsetWidth < 40 || !style(p).startsWith("url(")).length;
      const wide = page.documentElement.scrollWidth > frame.clientWidth;
      const unnamed = pictures.filter(p => !p.ariaLabel).length;
      document.title = `${pictures.length} pictures, ${blank} blank, ${unnamed} unnamed, ${wide}`;
    };
    frame.srcdoc = PAGE;
    </script>"""
    # within a frame, as a window cannot be as narrow as a phone
    text = json.dumps(page.read_text().replace("content-visibility: auto;", ""))
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe style="border:0;width:{width}px;height:2000px"></iframe>'
        + script.replace("PAGE", text.replace("</", "<\\/"))
    )
    dom = browser("--window-size=1400,2100", "--virtual-time-budget=5000", "--dump-dom", probe)
    shown = sum(len(rows) for s in sections_of(page.read_text()) for rows in rows_shown(s).values())
    assert f"<title>{shown + QUERIES} pictures, 0 blank, 0 unnamed, false</title>" in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(page, tmp_path, dark):
    picture = tmp_path / "page.png"
    more = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    browser("--window-size=1300,1500", f"--screenshot={picture}", *more, page.as_uri())
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert (np.median(pixels) < 60) == dark
    assert (np.abs(pixels.astype(int) - np.median(pixels)) > 60).mean() > 0.02  # something is drawn


def test_signs():
    """Helpful is helpful for every measurement; a row has no image of the other sign."""
    scores = torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0])
    helps, hinders = rows_of(scores, 4, Better.LOWER)
    assert (helps.title, helps.indices) == ("helps", [0, 3, 4])
    assert (hinders.title, hinders.indices) == ("hinders", [1])
    helps, hinders = rows_of(scores, 2, Better.HIGHER)
    assert (helps.title, helps.indices) == ("helps", [1])
    assert (hinders.title, hinders.indices) == ("hinders", [0, 3])
    rows = rows_of(scores, 2, Better.NEITHER)
    assert [row.title for row in rows] == ["lowers it", "raises it"]
    assert {row.kind for row in rows} == {"plain"}


def test_images_on_top_of_many_queries():
    scores = torch.eye(6)[:, :6] + 0.1
    scores[:4, 5] = 0.9
    rows = [rows_of(row, 2, Better.LOWER) for row in scores]
    assert common_images(rows)[0] == (5, 5)
    assert all(count >= 3 for _, count in common_images(rows))
    assert common_images(rows[:2]) == []


def test_numbers_as_people_read_them():
    scores = torch.tensor([[2e-4, -1e-4], [1e-3, 2e-3]])
    sizes = Sizes.of(scores, {"values": [0.1, 0.5], "standard_error": [1e-5, 1e-4]})
    assert sizes.text(0, scores[0, 0]) == "+0.2 %"
    assert sizes.text(0, scores[0, 1]) == "\u22120.1 %"
    assert sizes.error_text(1) == "± 0.02 %"
    small = Sizes.of(scores / 1e3, {"values": [0.1, 0.5], "standard_error": None})
    assert small.text(0, scores[0, 0] / 1e3) == "+2 ppm"
    assert small.error_text(0) == ""
    assert Sizes.of(scores, {}).text(1, scores[1, 1]) == "+0.002"


@pytest.mark.parametrize(("size", "kind"), [(16, "png"), (64, "png"), (512, "webp")])
def test_thumbnails(size, kind):
    """Small images as they are; large ones made smaller, and like themselves."""
    ramp = torch.linspace(-1, 1, size)
    x = torch.stack(
        [ramp.expand(size, size), ramp.unsqueeze(1).expand(size, size), -ramp.expand(size, size)]
    )
    rule = thumbnail(x, 192)
    assert ("pixelated" in rule) == (size <= 64)
    found = re.search(r"data:image/(\w+);base64,([^)]+)", rule)
    assert found[1] == kind
    image = Image.open(io.BytesIO(base64.b64decode(found[2])))
    assert image.size == (min(size, 192),) * 2
    again = np.asarray(image.convert("RGB")).astype(float) / 127.5 - 1
    expected = torch.nn.functional.interpolate(x[None], image.size, mode="area")[0]
    error = np.abs(again - expected.permute(1, 2, 0).numpy())
    assert error.mean() < (0.005 if kind == "png" else 0.03)


def test_thumbnails_of_any_channels():
    """Of images that are neither grey nor RGB, the first channels that can be shown."""
    for channels, shown in ((1, "L"), (2, "L"), (3, "RGB"), (5, "RGB")):
        rule = thumbnail(torch.linspace(-1, 1, channels * 4).reshape(channels, 2, 2), 8)
        data = re.search(r"base64,([\w+/=]+)", rule)[1]
        assert Image.open(io.BytesIO(base64.b64decode(data))).mode == shown


def test_others_are_refused(folder, page, tmp_path, capsys):
    before = page.read_bytes()
    assert run(arguments(folder, page)) == 2
    assert "exists. Pass --overwrite" in capsys.readouterr().err
    assert page.read_bytes() == before
    output = tmp_path / "r.html"
    assert run(arguments(folder, output, "--data", folder / "queries")) == 2
    assert "--data must be the 7 images that" in capsys.readouterr().err
    # other images of the same names
    shutil.copytree(folder / "train", tmp_path / "train")
    for path in (tmp_path / "train").rglob("*.png"):
        Image.new("L", (8, 8), 200).save(path)
    assert run(arguments(folder, output, "--data", tmp_path / "train")) == 2
    assert "is not the one that was scored. Pass the images that were" in capsys.readouterr().err
    # another operator of the same network
    own = ["--output", str(tmp_path / "e.safetensors"), "--num-draws", "2"]
    assert run(program_arguments(folder, "fit", *own)) == 0
    assert run(arguments(folder, output, "--operator", tmp_path / "e.safetensors")) == 2
    assert "e.safetensors' is not that of the scores: " in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("measurement", "told"),
    [("elbo", "so positive means helpful"), ("log_likelihood", "so here negative means helpful")],
)
def test_it_says_what_the_sign_means(folder, tmp_path, measurement, told):
    """Also for a file without values, halves and digests, as older programs wrote."""
    stored = StoredScores.open(folder / "scores.safetensors")
    header = {key: stored.header[key] for key in ("train", "queries")}
    header["identity"] = {"query": {"measurement": measurement}}
    write_scores(tmp_path / "s.safetensors", {"scores": stored.whole()}, header)
    words = ["report", "--scores", tmp_path / "s.safetensors", "--data", folder / "train"]
    words += ["--queries", folder / "queries", "--output", tmp_path / "r.html"]
    assert run([str(word) for word in words]) == 0
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert f"without that image, one of {TRAIN}. Measured: {measurement}, " in text
    assert told in text
    assert "both halves" not in text


def test_one_query_from_one_file(folder, tmp_path):
    query = folder / "queries" / "image1.png"
    scored = ["--queries", str(query), "--output", str(tmp_path / "s.safetensors")]
    assert run(program_arguments(folder, "score", *scored)) == 0
    words = ["--scores", tmp_path / "s.safetensors", "--queries", query]
    assert run(arguments(folder, tmp_path / "r.html", *words)) == 0
    assert len(sections_of((tmp_path / "r.html").read_text())) == 1
    assert StoredScores.open(tmp_path / "s.safetensors").shape == (1, TRAIN)


def test_names_are_escaped(tmp_path):
    write_images(tmp_path / "train", 1, seed=0)
    (tmp_path / "train" / "image0.png").rename(tmp_path / "train" / "<b>&.png")
    scores, names = torch.zeros(1, 1), ["<b>&.png"]
    path = tmp_path / "scores.safetensors"
    write_scores(path, {"scores": scores}, {"train": names, "queries": names, "identity": {}})
    words = ["report", "--scores", path, "--data", tmp_path / "train"]
    words += ["--queries", tmp_path / "train", "--output", tmp_path / "r.html"]
    assert run([str(word) for word in words]) == 0
    assert "<b>" not in (tmp_path / "r.html").read_text()
