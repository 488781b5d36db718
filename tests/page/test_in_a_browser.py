"""The page as people use it: clicks, words, keys, a phone, a dark room."""

import csv
import time
from math import isclose
from pathlib import Path

import numpy as np
import pytest

from curvlinops_diffusion.page import report
from tests.page.browser import PROGRAM, Browser
from tests.page.cases import LIKE_THE_QUERY, NUM_QUERIES, NUM_TRAIN, TWINS, made

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium (apt-get install chromium)")
FIGURES = "[...document.querySelectorAll('figure[data-place]')].filter(f => f.offsetParent)"
NAMES = f"{FIGURES}.map(f => f.querySelector('.name').textContent)"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return made(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    page = tmp_path_factory.mktemp("result") / "page.html"
    result.report(page, top=5)
    return page


@pytest.fixture(scope="module")
def window():
    window = Browser()
    yield window
    window.close()


@pytest.fixture
def browser(window, page):
    window.open(page)
    yield window
    assert window.errors == []
    assert all(address.startswith(("file:", "data:", "blob:")) for address in window.asked)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_picture_is_there(window, page, width, dark):
    """With its own pixels and a name, nothing wider than the screen, in the scheme's colours."""
    window.open(page, width=width, dark=dark)
    pictures = window.run(
        "Promise.all([...document.querySelectorAll('img.picture')].map(async image => {"
        "await image.decode(); return [image.naturalWidth, image.offsetWidth, image.alt] }))"
    )
    assert len(pictures) > 2 * NUM_QUERIES
    assert all(own == 72 and shown >= 40 and name for own, shown, name in pictures)
    for view in ("firsts", "all", 0):
        window.run(f"document.querySelector('#view').value = '{view}'")
        window.run("document.querySelector('#view').onchange()")
        assert window.run("document.documentElement.scrollWidth") <= width
    window.click("#listed .open")
    assert window.run("document.querySelector('dialog').scrollWidth") <= width
    window.key("Escape")
    pixels = np.asarray(window.picture().convert("L"))
    assert (np.median(pixels) < 60) == dark
    assert (np.abs(pixels.astype(int) - np.median(pixels)) > 60).mean() > 0.02


def test_search_and_signs(browser):
    """Words of file, caption and folder together; of either sign alone."""
    browser.click("#search")
    browser.type("train/anna tree")
    names = browser.run(NAMES)
    assert names
    numbers = [int(name[-6:-4]) for name in names if name.startswith("anna/")]
    assert len(numbers) == len(names)
    assert all(n % 3 for n in numbers)
    browser.run("document.querySelector('#search').value = ''")
    for box in (1, 2):
        browser.click("fieldset input", box)
    kinds = browser.run(f"{FIGURES}.map(f => f.closest('[data-kind]')?.dataset.kind)")
    assert kinds
    assert set(kinds) == {"helps"}


def test_all_images_of_a_query(browser, result, tmp_path):
    """By the score, then by strength; as CSV, which agrees with the library's scores."""
    browser.click(".every", 1)
    assert browser.run("document.activeElement.id") == "list-title"
    scores = dict(zip(result.train.names, result.scores[1].tolist(), strict=True))
    assert browser.run(NAMES) == sorted(scores, key=lambda name: -scores[name])
    browser.run("document.querySelector('#order').value = 'strongest'")
    browser.run("document.querySelector('#order').onchange()")
    strongest = sorted(scores, key=lambda name: -abs(scores[name]))
    assert browser.run(NAMES)[:5] == strongest[:5]
    faded = browser.run("document.querySelectorAll('#listed .untold').length")
    error = result.agreement.standard_error[1]
    assert faded == sum(abs(score) <= 2 * error for score in scores.values()) > 0
    browser.click("fieldset input", 2)  # without those
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.click("#csv")
    for _ in range(100):
        if files := list(tmp_path.glob("*.csv")):
            break
        time.sleep(0.05)
    with files[0].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == NUM_TRAIN - faded
    ranked = sorted(scores, key=lambda name: -scores[name])
    for line in lines:
        score = scores[line["image"]]
        assert isclose(float(line["influence (%)"]), score, rel_tol=0.01)
        assert line["effect"] == ("helps" if score > 0 else "hinders")
        assert ranked[int(line["rank"]) - 1] == line["image"]
        assert line["file"].endswith(line["image"])


def test_a_picture_by_itself(browser, result):
    """The crop beside the whole file, doubles, what it does to each query; by keys alone."""
    browser.click("#view")
    browser.key("Escape")
    browser.run("document.querySelector('#view').value = 'all'")
    browser.run("document.querySelector('#view').onchange()")
    one, other = (f"{('berta', 'anna')[n % 2]}/long_name_{n:02}.png" for n in TWINS)
    n = browser.run(NAMES).index(one)
    assert "has a double" in browser.run(f"{FIGURES}[{n}].textContent")
    browser.run(f"{FIGURES}[{n}].querySelector('button').focus()")
    browser.key("Enter")
    body = "document.querySelector('#viewer-body')"
    sides = browser.run(
        f"Promise.all([...{body}.querySelectorAll('img')].map(async image => {{"
        "await image.decode(); return [image.naturalWidth, image.naturalHeight] }))"
    )
    assert sides == [[72, 72], [120, 80]]
    assert other in browser.run(f"{body}.querySelector('p + p').textContent")
    assert browser.run("document.querySelector('#file').href").endswith(f"train/{one}")
    rows = browser.run(
        f"[...{body}.querySelectorAll('tbody tr')].map(r => r.innerText.split('\\t'))"
    )
    place = result.train.names.index(one)
    found = {query: (number, int(rank), effect) for query, number, rank, effect in rows}
    for q, query in enumerate(result.queries.names):
        number, rank, effect = found[query]
        score = float(result.scores[q, place])
        assert float(number.replace("−", "-").removesuffix(" %")) == pytest.approx(score, rel=0.06)
        assert rank == 1 + int((result.scores[q] > score).sum())
        told = abs(score) > 2 * result.agreement.standard_error[q]
        sign = "helps" if score > 0 else "hinders"
        expected = sign if told else "not told from zero"
        assert effect == ("noise" if q == NUM_QUERIES - 1 else expected)
    names = browser.run(NAMES)
    browser.key("ArrowRight")
    assert browser.run("document.querySelector('#viewer-title').textContent") == names[n + 1]
    browser.key("Escape")
    assert not browser.run("document.querySelector('dialog').open")
    assert browser.run("document.activeElement.closest('figure').innerText").count("long_name")


def test_it_says_why_a_like_image_hinders(browser, result):
    """And shows nothing in order where the scores are noise."""
    name = f"anna/long_name_{LIKE_THE_QUERY:02}.png"
    rows = browser.run(
        "[...document.querySelectorAll('[data-kind=hinders]')].map(row => row.textContent)"
    )
    assert len(rows) == NUM_QUERIES - 1
    like = result.queries.names.index("berta/long_name_00.png")
    assert name in rows[like]
    assert ["much like the query" in row for row in rows] == [q == like for q in range(len(rows))]
    last = browser.run("document.querySelector('.query:last-child').textContent")
    assert "These scores are noise: take more draws." in last
    assert "by chance" in last
    assert browser.run("document.querySelectorAll('.query:last-child li').length") == 0


def test_tab_reaches_what_can_be_done(browser):
    browser.run("document.querySelector('nav a').focus()")
    seen = []
    for _ in range(NUM_QUERIES + 9):
        browser.key("Tab")
        seen.append(browser.run("document.activeElement.id || document.activeElement.className"))
    wanted = ["view", "search", "order", "csv", "open", "every"]
    assert [name for name in dict.fromkeys(seen) if name in wanted] == wanted


def test_of_many_scores_the_ends(window, result, tmp_path, monkeypatch):
    """Each by its rank among all; and the files stand in where no thumbnails are kept."""
    for name, value in (("_SCORES", 10), ("_EACH", 6), ("_OTHERS", 1)):
        monkeypatch.setattr(report, name, value)
    folder = Path(result.header["run"]["data"]).parent
    result.report(folder / "ends.html", top=2)
    window.open(folder / "ends.html")
    window.click(".every", 0)
    order = result.scores[0].argsort(descending=True).tolist()
    expected = [result.train.names[n] for n in [*order[:6], *order[-6:]]]
    assert window.run(NAMES) == expected
    ranks = window.run(f"{FIGURES}.map(f => f.innerText.match(/rank (\\d+)/)[1])")
    assert list(map(int, ranks)) == [*range(1, 7), *range(NUM_TRAIN - 5, NUM_TRAIN + 1)]
    assert "; the page lists 12" in window.run("document.querySelector('#status').textContent")
    window.click("#listed .open", 11)
    row = "document.querySelector('#viewer-body tbody tr:last-child').textContent"
    assert str(NUM_TRAIN) in window.run(row)
    window.key("Escape")
    widths = window.run(
        "Promise.all([...document.querySelectorAll('#listed img')].map(async image => {"
        "await image.decode(); return image.naturalWidth }))"
    )
    assert set(widths) == {72, 120}  # thumbnails, and files
    assert window.errors == []
