"""The page as a file; how it is used is tested in a browser."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.measurements.registry import Better
from curvlinops_diffusion.influence.score_files import write_scores
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.page.pictures import thumbnail
from curvlinops_diffusion.page.rankings import Sizes, common_images, rows_of
from tests.cli.cases import arguments as program_arguments
from tests.cli.cases import write_images, write_problem
from tests.page.cases import NUM_QUERIES, made

TRAIN, TOP = 7, 3


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
        names = re.findall(r'<span class="name">(.+?)</span></span>', part)
        names = [re.sub(r"<[^>]+>", "", name) for name in names]
        numbers = re.findall(r"<b>([^<]+)</b>", part)
        found[part.split("</h3>")[0]] = list(zip(names, numbers, strict=True))
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


def test_it_names_the_right_images(result, tmp_path):
    """Each row has its own sign alone, and none within twice the error; of noise there is none."""
    result.report(tmp_path / "r.html", top=TOP)
    *sections, noise = sections_of((tmp_path / "r.html").read_text())
    assert len(sections) == NUM_QUERIES - 1
    names, agreement = result.train.names, result.agreement
    for q, section in enumerate(sections):
        row, error = result.scores[q], agreement.standard_error[q]
        shown = rows_shown(section)
        untold = []
        for title, sign in (("helps", 1), ("hinders", -1)):
            order = [int(n) for n in (sign * row).argsort(descending=True)[:TOP]]
            told = [n for n in order if sign * row[n] > 2 * error]
            untold += [n for n in order if 0 < sign * row[n] <= 2 * error]
            assert [name for name, _ in shown[title]] == [names[n] for n in told]
            for n, (_, number) in zip(told, shown[title], strict=True):
                amount, unit = number.replace("\u2212", "-").split()
                assert unit == "%"  # of a value of 100
                assert float(amount) == pytest.approx(float(row[n]), rel=0.06)
        assert {name for name, _ in shown.get("not told from zero", ())} == {
            names[n] for n in untold
        }
        shared = f"{agreement.shared[q]:.3g} of the top 10 in both halves of the draws (3.3 by"
        assert shared in section
        assert "numbers ± " in section
    assert rows_shown(noise) == {}
    assert "<strong>These scores are noise: take more draws.</strong>" in noise
    assert "The scores of 1 of 4 queries are noise" in str(result)


def test_settings_are_ten_lines(result, tmp_path):
    result.report(tmp_path / "r.html", top=TOP)
    text = (tmp_path / "r.html").read_text()
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th><td>([^<]+)</td>', text)
    assert len(rows) == 10
    assert dict(rows)["Draws of noise"] == "4 of each training image, 8 of each query"
    assert dict(rows)["Training images"].endswith("train, at 72 pixels")


def test_classes_are_under_the_images(folder, page):
    captions = re.findall(r'alt="(even|odd)/image\d.png: (\w+)"', page.read_text())
    assert all(folder == caption for folder, caption in captions)
    (data,) = re.findall(r'id="data">(.+)</script>', page.read_text())
    train = json.loads(data)["train"]
    assert [entry[2] for entry in train] == [entry[1].split("/")[0] for entry in train]
    assert train[0][3] == "train/even/image0.png"


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


def test_it_needs_nothing_else(result, tmp_path):
    """No address outside the page but of the files; each picture is in it once."""
    result.report(tmp_path / "r.html", top=TOP)
    text = (tmp_path / "r.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]+)', text)
    assert all(address.startswith(("#", "data:image/gif")) for address in addresses)
    known = "www.w3.org|purl.org|matplotlib.org|creativecommons"  # names of formats in drawings
    assert not re.search(rf"https?://(?!{known})", text)
    rules = re.findall(r"\.(\w+)(?:-whole)? {\s*background-image:url\(([^)]+)\)", text)
    assert len(set(rules)) == len(rules) > NUM_QUERIES
    pictures = [picture for _, picture in rules]
    assert all(picture.startswith("data:image/") for picture in pictures)


def test_signs():
    """Helpful is helpful for every measurement; a row has no image of the other sign."""
    scores = torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0])
    helps, hinders = rows_of(scores, 4, Better.LOWER)
    assert (helps.title, helps.indices) == ("helps", [0, 3, 4])
    assert (hinders.title, hinders.indices) == ("hinders", [1])
    helps, hinders = rows_of(scores, 2, Better.HIGHER)
    assert (helps.title, helps.indices) == ("helps", [1])
    assert (hinders.title, hinders.indices) == ("hinders", [0, 3])
    helps, hinders, untold = rows_of(scores, 4, Better.LOWER, error=0.5)
    assert (helps.indices, hinders.indices) == ([0, 3], [])
    assert (untold.kind, set(untold.indices)) == ("untold", {1, 4})
    rows = rows_of(scores, 2, Better.NEITHER)
    assert [row.title for row in rows] == ["lowers it", "raises it"]
    assert {row.kind for row in rows} == {"plain"}


def test_images_on_top_of_many_queries():
    scores = torch.eye(6)[:, :6] + 0.1
    scores[:4, 5] = 0.9
    rows = [rows_of(row, 2, Better.LOWER) for row in scores]
    found, least = common_images(rows)
    assert found[0] == (5, 5)
    assert (least, all(count >= 3 for _, count in found)) == (3, True)
    assert common_images(rows[:2]) == ([], 3)
    assert common_images([*rows, [], []]) == ([(5, 5)], 4)  # of two the scores are noise


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
    assert f"without that image, one of {TRAIN}. Networks that were trained anew" in text
    assert f"do not read them. Measured: {measurement}, " in text
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
