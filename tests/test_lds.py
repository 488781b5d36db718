"""The linear data-modelling score against SciPy, and on data where the answer is known."""

import json
import multiprocessing.dummy
import shutil
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

from benchmarks.lds import evaluate, remove, retrain, score
from benchmarks.lds.evaluate import AT_LATE_CHECKPOINTS, kept
from benchmarks.lds.methods import BANDS, METHODS, TIMESTEPS, Setting, _within
from benchmarks.lds.problems import PROBLEMS
from benchmarks.lds.remove import jobs, relative_change
from curvlinops_diffusion.influence.measurements.losses import loss

ROOT = Path(__file__).parent.parent


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_spearman_is_scipys():
    x, y = random(3, 20), random(3, 20, seed=1)
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert torch.allclose(score.lds(x, y), torch.tensor(expected).double())


def test_resampled_spearman_is_scipys():
    """Of halves and queries drawn with replacement, so that there are ties."""
    x, y = random(3, 20), random(3, 20, seed=1)
    resampled = score.Resampled.of(20, 3, 5)
    expected = []
    for halves, queries in zip(resampled.times_KH, resampled.times_KQ, strict=True):
        assert halves.sum() == 20
        assert queries.sum() == 3
        chosen = torch.arange(20).repeat_interleave(halves.long())
        by_query = [
            scipy.stats.spearmanr(x[q, chosen], y[q, chosen]).statistic
            for q in torch.arange(3).repeat_interleave(queries.long())
        ]
        expected.append(sum(by_query) / 3)
    assert torch.allclose(resampled.means(x, y), torch.tensor(expected).double())


def test_an_additive_world_is_predicted():
    """Measurements that are sums over what is left out, plus noise: one without, less with it."""
    effects, halves = random(5, 40), PROBLEMS["digits"].halves()[:, :40]
    exact = score.predicted(effects, halves)
    resampled = score.Resampled.of(64, 5, 200)
    assert resampled.summary(exact, exact)["lds"] == 1
    assert resampled.summary(-exact, exact)["lds"] == -1
    noisy = exact + 0.5 * exact.std() * random(*exact.shape, seed=3)
    found = resampled.summary(exact, noisy)
    assert 0.7 < found["lds"] < 0.95
    assert found["low"] < found["lds"] < found["high"]
    worse = exact + exact.std() * random(*exact.shape, seed=4)
    assert resampled.difference(exact, exact, noisy) == {"difference": 0, "low": 0, "high": 0}
    better = resampled.difference(exact, worse, noisy)
    assert 0 < better["low"] < better["difference"] < better["high"]


def test_ceiling():
    """Two noisy seeds: the exact prediction reaches about the ceiling."""
    exact = random(200, 64)
    seeds = torch.stack([exact + random(200, 64, seed=s) for s in (1, 2)])
    reached = float(score.lds(exact, seeds.mean(0)).mean())
    assert abs(score.ceiling(seeds) - reached) < 0.02


# ---------------------------------------------------------------------------------------------
# The programs, on the tiny problem
# ---------------------------------------------------------------------------------------------


class Here:
    """A pool of one process, which is this one: starting another takes the longest."""

    def __init__(self, kind):
        assert kind == "spawn"

    def Pool(self, processes):  # as multiprocessing calls it
        return multiprocessing.dummy.Pool(1)


def run(program, *arguments):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [program.__name__, "--problem", "tiny", *map(str, arguments)])
        patched.setattr("multiprocessing.get_context", Here)
        program.main()


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """A folder with the retrained networks, in which each test may leave further results."""
    folder = tmp_path_factory.mktemp("lds")
    run(retrain, "--work", folder, "--output", folder)
    return folder


def test_retraining_goes_on(retrained, tmp_path):
    """As if killed before the last network: the same values, of which only that one is new."""
    shutil.copytree(retrained / "tiny", tmp_path / "tiny")
    last = tmp_path / "tiny" / "half003_seed1.safetensors"
    last.unlink()
    others = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    run(retrain, "--work", tmp_path, "--output", tmp_path)
    assert last.exists()
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())
    again, values = (load_file(f / "tiny.safetensors")["values"] for f in (tmp_path, retrained))
    assert values.shape == (4, 2, 2, 4)
    assert torch.equal(again, values)


def evaluated(folder, output, *more):
    """The methods of the result, and when their predictions were made."""
    where = ("--work", folder, "--output", output, "--retrained", folder)
    run(evaluate, *where, "--draws", 2, "--resamples", 3, *more)
    result = json.loads((output / "lds_tiny_cpu.json").read_text())
    assert result["retrained"]["problem"] == PROBLEMS["tiny"].description
    files = (folder / "tiny" / "evaluated-2").iterdir()
    return {r["method"] for r in result["methods"]}, {f: f.stat().st_mtime_ns for f in files}


def test_evaluation_and_removal(retrained, tmp_path):
    """Of a few methods; what was computed before is not again."""
    some = "EK-FAC", "TRAK", "kernel regression on pixels"
    names, made = evaluated(retrained, tmp_path, "--methods", *some)
    assert names == set(some)
    assert len(made) == 3
    assert evaluated(retrained, tmp_path, "--methods", *some) == (names, made)
    where = ("--work", retrained, "--output", tmp_path, "--retrained", retrained)
    run(remove, *where, "--evaluated", tmp_path, "--queries", 1, "--methods", "EK-FAC")
    removals = json.loads((tmp_path / "removed_tiny_cpu.json").read_text())["removals"]
    assert [row["method"] for row in removals] == ["random", "EK-FAC"]
    assert removals[0]["change_of_loss"] != removals[1]["change_of_loss"]


@pytest.mark.slow
def test_every_method(retrained, tmp_path):
    names, made = evaluated(retrained, tmp_path)
    assert names == {*METHODS, *(f"{name}, late checkpoints" for name in AT_LATE_CHECKPOINTS)}
    assert len(made) == len(names)
    assert evaluated(retrained, tmp_path) == (names, made)


def test_rows_of_other_methods_are_kept(tmp_path):
    """Those of the same settings; with others, or other references, the file is refused."""
    path = tmp_path / "result.json"

    def rows(**scores):
        return [
            {"method": m.replace("_", "-"), "cell": "", "lds": {"": s}} for m, s in scores.items()
        ]

    new = rows(b=3, c=4, EK_FAC=5)
    assert kept(path, {"draws": 2}, new) == new
    path.write_text(json.dumps({"draws": 2, "methods": rows(a=1, b=2, EK_FAC=5)}))
    assert [row["lds"][""] for row in kept(path, {"draws": 2}, new)] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match="other draws"):
        kept(path, {"draws": 3}, new)
    with pytest.raises(ValueError, match="EK-FAC has other scores"):
        kept(path, {"draws": 2}, rows(EK_FAC=6))


def test_relative_change():
    """Of known means; the error is that of a difference of means."""
    without, full = 1.1 + 0.1 * random(1000, 2), 1 + 0.1 * random(1000, 2, seed=1)
    change, error = relative_change(without, full)
    assert abs(change - 0.1) < 4 * error
    assert abs(error - 0.1 * (2 / 2 / 1000) ** 0.5) < 0.1 * error
    # what moves all queries alike is averaged over seeds alone
    shared = 0.1 * random(1000, 1, seed=2)
    _, error = relative_change((1.1 + shared).expand(-1, 2), torch.ones(1000, 2))
    assert abs(error - 0.1 / 1000**0.5) < 0.1 * error


def test_removed_images():
    """Those that come first in the order of their query; random ones differ among seeds."""
    orders = {"EK-FAC": torch.stack([torch.arange(1000), torch.arange(1000).flip(0)])}
    found = jobs(PROBLEMS["digits"], Path("work"), orders, [1])
    chosen = [job.removed for job in found if job.method == "EK-FAC"]
    assert {len(removed) for removed in chosen} == {10, 50, 100}
    assert all(removed == tuple(range(999, 999 - len(removed), -1)) for removed in chosen)
    controls = {job.removed for job in found if job.method == "random"}
    assert len(controls) == 15
    assert len({job.path for job in found}) == len(found) == 5 + 15 + 15


@pytest.mark.parametrize("problem", ["digits", "photographs"])
def test_the_documentation_shows_every_method(monkeypatch, tmp_path, problem):
    """With the number and interval of each cell, and the ceilings."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    tables.write_tables(tmp_path)
    name = f"lds_{problem}"
    assert f".. include:: _tables/{name}.rst" in (ROOT / "docs" / "evidence.rst").read_text()
    lines = (tmp_path / f"{name}.rst").read_text().split("   * - ")[1:]
    head, *rows = ([cell.strip() for cell in line.split("\n     - ")] for line in lines)
    table = {row[0].removesuffix(" (best)"): dict(zip(head, row, strict=True)) for row in rows}
    result = result_of(name)
    for row in result["methods"]:
        if row["method"].startswith(tables.SCANS):
            continue
        shown = row.get("default", row["best"])
        interval = f"[{shown['low']:.2f}, {shown['high']:.2f}]"
        error = shown["error_over_queries"]
        cell = table[row["method"]][row["cell"].replace("_", " ")]
        assert cell == f"{shown['lds']:.2f} ± {error:.2f} {interval}"
    for cell, ceiling in result["ceilings"].items():
        assert table["*a perfect predictor*"][cell.replace("_", " ")] == f"{ceiling:.2f}"


def result_of(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())


def shown(problem):
    result = result_of(f"lds_{problem}")
    own = {(r["method"], r["cell"]): r.get("default", r["best"]) for r in result["methods"]}
    return own, list(result["ceilings"])


def scan(problem, method, cell):
    """The score at each setting."""
    rows = result_of(f"lds_{problem}")["methods"]
    (found,) = (r["lds"] for r in rows if (r["method"], r["cell"]) == (method, cell))
    return found


def minus_ekfac(found, method, cell):
    """The difference to EK-FAC, with its interval."""
    return found[method, cell]["minus_ekfac"]


def undecided(difference):
    return difference["low"] <= 0 <= difference["high"]


RECIPE = "EK-FAC, the paper's recipe"
PUBLISHED = ("no curvature", "TRAK", "D-TRAK", "DAS", "Journey-TRAK")


def test_what_the_documentation_says_of_the_digits():
    """EK-FAC at the default damping against each published baseline's best, for the loss."""
    digits, cells = shown("digits")
    for cell in cells:
        own = digits["EK-FAC", cell]
        for baseline in PUBLISHED:
            if (baseline, cell) in digits:
                other = digits[baseline, cell]
                for ours in (own, digits[f"{RECIPE}, 250 draws", cell]):
                    assert other["lds"] < ours["lds"]
                    assert other["high"] < ours["low"] or not cell.startswith("loss")
        for curvature in ("EK-FAC", "K-FAC"):
            shampoo = minus_ekfac(digits, f"{curvature}, Shampoo's factors", cell)
            assert shampoo["low"] > 0
            assert 0.015 < shampoo["difference"] < 0.035
        assert digits["kernel regression on pixels", cell]["lds"] > own["lds"]
        assert undecided(minus_ekfac(digits, "K-FAC", cell))
        nearest = "nearest Kronecker product"
        assert minus_ekfac(digits, f"EK-FAC, {nearest}", cell)["low"] > 0
        assert minus_ekfac(digits, f"K-FAC, {nearest}", cell)["difference"] < 0
        for same in ("EK-FAC, linear and convolutions only", f"{RECIPE}, 250 draws"):
            assert abs(digits[same, cell]["lds"] - own["lds"]) < 0.01
            assert undecided(minus_ekfac(digits, same, cell))
        for curvature in ("EK-FAC", "K-FAC", "EK-FAC, Shampoo's factors"):
            low_rank = digits[f"{curvature} + low rank", cell]["lds"]
            gain = low_rank - digits[curvature, cell]["lds"]
            assert round(gain, 2) in ([0.02] if cell.startswith("loss") else [0.0, 0.01])
        sampled = digits["K-FAC + sampled GGN", cell]["lds"]
        assert round(sampled - digits["K-FAC", cell]["lds"], 2) == 0.01
        assert minus_ekfac(digits, "EK-FAC, reduce", cell)["high"] < 0
        loss_ggn = minus_ekfac(digits, "EK-FAC, GGN of the loss", cell)
        assert (loss_ggn["high"] < 0) == cell.startswith("loss")
        dampings = scan("digits", "EK-FAC, GGN of the loss", cell)
        assert max(dampings, key=dampings.__getitem__) == "1e-08"
    for cell in cells[:2]:
        best = digits["K-FAC, regression on loss and prediction", cell]
        assert best["low"] > digits[RECIPE, cell]["high"]
        assert best["low"] > digits[f"{RECIPE}, 250 draws", cell]["high"]
    for cell in cells:
        for curvature in ("EK-FAC", "K-FAC + low rank"):
            gain = digits[f"{curvature}, late checkpoints", cell]["lds"]
            assert 0.02 < gain - digits[curvature, cell]["lds"] < 0.045
        for method, most in (
            ("K-FAC, regression on loss and prediction", 0.007),
            ("D-TRAK", 0.003),
        ):
            gain = digits[f"{method}, late checkpoints", cell]["lds"] - digits[method, cell]["lds"]
            assert gain < most
        assert digits["bands of levels, EK-FAC", cell]["lds"] < digits["EK-FAC", cell]["lds"]
    for cell in cells[:2]:
        lost = {
            setting: digits["EK-FAC", cell]["lds"] - value
            for setting, value in scan("digits", "bands of levels, EK-FAC", cell).items()
        }
        assert 0.06 < lost["queries"] < 0.11
        assert 0.02 < lost["both"] - lost["queries"] < 0.04
        assert 0.25 < lost["curvature"] < 0.35
        assert digits["EK-FAC", cell]["lds"] - lost["curvature, summed"] < 0.06
        for low_rank in ("EK-FAC + low rank", "K-FAC + low rank", "powers of EK-FAC"):
            assert minus_ekfac(digits, low_rank, cell)["low"] > 0
        assert digits["powers of EK-FAC", cell]["setting"] == "1.25"
        low = minus_ekfac(digits, "D-TRAK", cell)["high"] < 0
        assert low == (cell != "simplified_elbo, generated")
    reduce = [digits[f"{kind}, reduce", cells[0]]["lds"] for kind in ("EK-FAC", "K-FAC")]
    assert [round(value, 2) for value in reduce] == [0.44, 0.23]
    refined = digits["conjugate gradients from EK-FAC", "loss, generated"]
    assert refined["setting"] == "2"
    assert refined["minus_ekfac"]["low"] > 0
    assert round(refined["minus_ekfac"]["difference"], 2) == 0.06
    iterations = scan("digits", "conjugate gradients from EK-FAC", "loss, generated")
    assert iterations["1"] == pytest.approx(digits["EK-FAC", "loss, generated"]["lds"], abs=1e-4)
    assert iterations["8"] < iterations["1"]
    assert abs(digits["sampled GGN", cells[0]]["minus_reference"]["difference"]) < 0.01
    assert digits["sampled GGN", cells[1]]["minus_reference"]["high"] < 0


def test_what_the_documentation_says_of_regression():
    """On the prediction it is ahead of EK-FAC, as a regression; on the loss it is not."""
    digits, cells = shown("digits")
    gains = [minus_ekfac(digits, "K-FAC, regression on the prediction", cell) for cell in cells[:2]]
    rounded = [[round(gain[key], 2) for key in ("difference", "low", "high")] for gain in gains]
    assert rounded == [[0.04, 0.01, 0.09], [0.08, 0.04, 0.13]]
    ridges = scan("digits", "K-FAC, regression on the prediction", cells[0])
    assert (round(ridges["1e-08"], 2), round(ridges["ridge 30.0"], 2)) == (0.58, 0.45)
    ridges = scan("digits", "K-FAC, regression on the loss", cells[0])
    assert (round(ridges["1e-08"], 2), round(ridges["ridge 30.0"], 2)) == (0.55, 0.55)
    for cell in cells:
        assert undecided(minus_ekfac(digits, "K-FAC, regression on the loss", cell))
        both = digits["K-FAC, regression on loss and prediction", cell]["lds"]
        assert both > digits["K-FAC, regression on the prediction", cell]["lds"]
        assert both > digits["K-FAC, regression on the loss", cell]["lds"]


def test_what_the_documentation_says_of_draws():
    """64 in antithetic pairs (the rows without a number) among numbers of uniform ones."""
    digits, cells = shown("digits")
    for cell, (fewer, more) in zip(cells[:2], ((250, 500), (100, 250)), strict=True):
        uniform = scan("digits", "draws, uniform", cell)
        assert uniform[f"{fewer}"] <= digits["EK-FAC", cell]["lds"] <= uniform[f"{more}"]


def test_what_the_documentation_says_of_damping():
    """Scores of K-FAC and EK-FAC against those at the default."""
    for curvature in ("K-FAC", "EK-FAC"):
        for problem, largest, most in (("digits", 1e-5, 0.02), ("photographs", 1e-1, 0.04)):
            for cell in shown(problem)[1]:
                scores = scan(problem, curvature, cell)
                flat = [value for key, value in scores.items() if float(key) < 1.5 * largest]
                assert max(abs(value - scores["1e-08"]) for value in flat) < most


def test_what_the_documentation_says_of_the_photographs():
    photographs, cells = shown("photographs")
    for cell in cells:
        own = photographs["EK-FAC", cell]
        assert minus_ekfac(photographs, "D-TRAK", cell)["low"] > 0
        assert photographs["kernel regression on pixels", cell]["lds"] > own["lds"]
        assert abs(photographs[f"{RECIPE}, 250 draws", cell]["lds"] - own["lds"]) < 0.02
        behind = minus_ekfac(photographs, "K-FAC", cell)
        assert (behind["high"] < 0) == ("held-out" in cell)
        assert not behind["low"] > 0
        ours = photographs["K-FAC, regression on loss and prediction", cell]["lds"]
        norm = photographs["K-FAC, regression on the squared norm", cell]["lds"]
        assert ours < norm < photographs["D-TRAK", cell]["lds"]
        low_rank = minus_ekfac(photographs, "EK-FAC + low rank", cell)
        assert low_rank["low"] > 0
        assert round(low_rank["difference"], 2) in (0.01, 0.02)
        for same in ("EK-FAC, joint bias", "EK-FAC, linear and convolutions only"):
            assert undecided(minus_ekfac(photographs, same, cell))
        assert undecided(minus_ekfac(photographs, f"{RECIPE}, 250 draws", cell))
        assert undecided(minus_ekfac(photographs, "powers of EK-FAC", cell))
        late = minus_ekfac(photographs, "EK-FAC, late checkpoints", cell)
        assert 0.05 < late["difference"] < 0.1
        assert (late["low"] > 0) == cell.startswith("simplified")
        assert minus_ekfac(photographs, "sampled GGN", cell)["difference"] > 0.02
        assert minus_ekfac(photographs, "EK-FAC, GGN of the loss", cell)["difference"] > 0.02
        assert minus_ekfac(photographs, "bands of levels, EK-FAC", cell)["difference"] > 0
    for method, number in (
        ("sampled GGN", 3),
        ("EK-FAC, GGN of the loss", 3),
        ("bands of levels, EK-FAC", 1),
    ):
        above = [minus_ekfac(photographs, method, cell)["low"] > 0 for cell in cells]
        assert sum(above) == number
    assert photographs["EK-FAC", "loss, generated"]["low"] < 0
    for cell in cells:
        norm = scan("photographs", "K-FAC, regression on the squared norm", cell)
        best = max(norm, key=norm.__getitem__)
        assert best in ("ridge 10.0", "ridge 30.0")
        assert norm[best] >= photographs["D-TRAK", cell]["lds"]
        both = scan("photographs", "K-FAC, regression on loss and prediction", cell)
        assert max(both, key=both.__getitem__) == "ridge 10.0"
        both = scan("digits", "K-FAC, regression on loss and prediction", cell)
        assert max(both, key=both.__getitem__) in ("1e-08", "ridge 3.0")
    for problem, number in (("digits", 2), ("photographs", 3)):
        found, cells = shown(problem)
        differences = [minus_ekfac(found, "kernel regression on pixels", c) for c in cells]
        assert sum(difference["low"] > 0 for difference in differences) == number


def test_what_the_documentation_says_of_removal():
    """By the errors of the changes' differences, taken as independent."""
    found = {
        (row["method"], row["removed"]): (row["change_of_loss"], row["its_error"])
        for row in result_of("removed_digits")["removals"]
    }
    assert {method for method, _ in found} == {"random", *remove.COMPARED}
    assert {number for _, number in found} == {10, 50, 100}

    def errors_apart(method, other, number):
        (a, a_error), (b, b_error) = found[method, number], found[other, number]
        return (a - b) / (a_error**2 + b_error**2) ** 0.5

    ours, pixels = "K-FAC, regression on loss and prediction", "kernel regression on pixels"
    assert round(found["EK-FAC", 100][0], 2) == 0.22
    assert 0.4 < found["TRAK", 100][0] / found["EK-FAC", 100][0] < 0.6
    assert abs(found["random", 100][0]) < found["random", 100][1]
    assert errors_apart("EK-FAC", "TRAK", 100) > 5
    ahead = {
        (method, number)
        for method in (ours, pixels, "D-TRAK")
        for number in (50, 100)
        if errors_apart(method, "EK-FAC", number) > 1.9
    }
    assert ahead == {(ours, 100), (pixels, 100), ("D-TRAK", 50)}
    assert all(errors_apart(method, "EK-FAC", number) < 2.5 for method, number in ahead)
    all_of_them = remove.COMPARED
    assert all(abs(errors_apart(a, b, 10)) < 2.5 for a in all_of_them for b in all_of_them)
    assert all(errors_apart(method, "random", 10) > 3 for method in all_of_them)


def test_what_the_readme_says():
    rows = result_of("removed_digits")["removals"]
    found = {row["method"]: row for row in rows if row["removed"] == 100}
    per_cent = {name: round(100 * row["change_of_loss"]) for name, row in found.items()}
    assert per_cent == {
        "random": 0,
        "EK-FAC": 22,
        "K-FAC, regression on loss and prediction": 25,
        "TRAK": 11,
        "kernel regression on pixels": 25,
        "D-TRAK": 23,
    }
    each = [float(text.split()[0]) for text in found["EK-FAC"]["by_query"]]
    assert [round(100 * change) for change in each] == [11, 34]
    digits, cells = shown("digits")
    recipe = [digits[f"{RECIPE}, 250 draws", cell]["lds"] for cell in cells[:2]]
    assert [round(value, 2) for value in recipe] == [0.53, 0.48]


@pytest.mark.parametrize("problem", ["digits", "photographs"])
def test_ahead_of_the_papers_recipe_everywhere(problem):
    found, cells = shown(problem)
    for cell in cells:
        best = found["K-FAC, regression on loss and prediction", cell]
        assert best["minus_reference"]["low"] > 0


def test_bands_of_levels_sum_to_the_whole():
    """Gradients of the queries' measurement within each band."""
    tiny = PROBLEMS["tiny"]
    network = tiny.make_network()
    setting = Setting(tiny, network.state_dict(), tiny.data()[1])
    size = TIMESTEPS // BANDS
    parts = [
        setting.query_rows(_within(range(first, first + size), loss))
        for first in range(0, TIMESTEPS, size)
    ]
    whole = setting.query_rows("loss")
    assert all(part.norm() > 0 for part in parts)
    assert torch.allclose(sum(parts), whole, atol=1e-5 * float(whole.abs().max()))


def test_halves():
    halves = PROBLEMS["digits"].halves()
    assert halves.shape == (64, 1000)
    assert (halves.sum(1) == 500).all()
    assert len({tuple(mask.tolist()) for mask in halves}) == 64
