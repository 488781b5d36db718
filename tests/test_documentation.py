"""What the documentation and the README say of results: their tables, numbers and claims."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.lds import remove
from tests.test_benchmarks import RESULTS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))  # which is no package

import quoted_numbers  # noqa: E402
import readme  # noqa: E402
import refusals  # noqa: E402
import tables  # noqa: E402
from quoted_numbers import result_of  # noqa: E402

# ---------------------------------------------------------------------------------------------
# What is generated
# ---------------------------------------------------------------------------------------------


def test_numbers_in_sentences():
    """Those that pages name are there, and no others."""
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.rst"))
    named = {" ".join(name.split()) for name in re.findall(r"\|([^|`\\]+)\|", pages)}
    in_readme = set(re.findall(r"\{(.*?)\}", "".join(readme.PARAGRAPHS)))
    assert named
    assert in_readme
    assert named | in_readme == quoted_numbers.numbers().keys()


def test_the_readme_is_up_to_date():
    assert readme.readme() == readme.README.read_text(), "run `python docs/readme.py`"
    columns = 2 * len(list(tables.RESULTS.glob("lds_*_cpu.json")))
    intervals = re.findall(r"\d \[-?0\.\d\d, 0\.\d\d\]", readme.README.read_text())
    assert len(intervals) == columns * len(readme.METHODS)


def test_tables_of_the_documentation_hold_the_results(tmp_path):
    """Every result is in a table that the documentation includes, with its numbers."""
    tables.write_tables(tmp_path)
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.rst"))
    further = [f"exact_ggn_{part}" for part in ("whole", "cosines", "cosines_by_kind", "spectra")]
    parts = ("minus_recipe", "minus_ekfac", "scans")
    further += [f"lds_digits_{part}" for part in parts]
    further += [
        f"lds_{problem}_{part}" for problem in ("fashion", "photographs") for part in parts[:2]
    ]  # without scans
    for name in (*RESULTS, *further, "exact_ggn_bands", "removed_digits"):
        assert (tmp_path / f"{name}.rst").exists()
        assert f".. include:: _tables/{name}.rst" in pages
    for name in RESULTS:
        cells = (tmp_path / f"{name}.rst").read_text()
        result = result_of(name)
        numbers = [f"{value:.2f}" for value in result.get("training_passes", {}).values()]
        numbers += [f"{value:,}" for value in result.get("peak_mebibytes", {}).values()]
        for row in next((value for value in result.values() if isinstance(value, list)), []):
            numbers += [str(value) for value in row.values()]
        assert numbers
        assert all(f"- {number}\n" in cells for number in numbers)


@pytest.mark.parametrize("problem", ["digits", "fashion", "photographs"])
def test_the_documentation_shows_every_method(tmp_path, problem):
    """With the number and interval of each cell, and the ceilings."""
    tables.write_tables(tmp_path)
    name = f"lds_{problem}"
    assert f".. include:: _tables/{name}.rst" in (ROOT / "docs" / "evidence.rst").read_text()
    lines = (tmp_path / f"{name}.rst").read_text().split("   * - ")[1:]
    head, *rows = ([cell.strip() for cell in line.split("\n     - ")] for line in lines)
    table = {row[0].removesuffix(" (best)"): dict(zip(head, row, strict=True)) for row in rows}
    result = result_of(name)
    for row in result["methods"]:
        if row["method"].startswith(tables.SCANS) or row["method"] in tables.GONE:
            continue
        shown = row.get("default", row["best"])
        interval = f"[{shown['low']:.2f}, {shown['high']:.2f}]"
        error = shown["error_over_queries"]
        cell = table[row["method"]][row["cell"].replace("_", " ")]
        assert cell == f"{shown['lds']:.2f} ± {error:.2f} {interval}"
    for cell, ceiling in result["ceilings"].items():
        assert table["*a perfect predictor*"][cell.replace("_", " ")] == f"{ceiling:.2f}"


# ---------------------------------------------------------------------------------------------
# What is claimed
# ---------------------------------------------------------------------------------------------


def test_what_the_documentation_says_of_the_results():
    """Numbers in the text of the README and the documentation, against the files."""
    passes = result_of("factor_pass_unet")["training_passes"]
    assert passes["K-FAC factors"] < 1.7
    assert passes["curvlinops K-FAC factors"] / passes["K-FAC factors"] > 3
    forms = {row["form"]: row for row in result_of("stored_gradients")["forms"]}
    assert forms["nf4"]["error_of_scores"] < 0.011
    assert forms["float32"]["bytes_for_each_example"] > 7 * forms["nf4"]["bytes_for_each_example"]
    samples = {row["positions"]: row for row in result_of("positions")["positions"]}
    assert 1 < samples["256"]["error_B"] / samples["all"]["error_B"] < 1.015
    assert 1.25 < samples["64"]["error_B"] / samples["all"]["error_B"] < 1.33
    for row in samples.values():  # no gain for a given error
        assert (
            row["squared_error_B_times_seconds"]
            > 0.99 * samples["all"]["squared_error_B_times_seconds"]
        )
    best: dict[float, dict[str, float]] = {}
    for row in result_of("refinement")["preconditioners"]:
        best.setdefault(row["damping"], {})[row["preconditioner"]] = row["error_after_60"]
    for errors in best.values():
        assert errors["EK-FAC, 100 times the damping"] <= min(errors.values())
    cost = {
        tuple(row[key] for key in ("timesteps", "draws", "probe_type", "mc_samples")): row[
            "squared_error_B_times_seconds"
        ]
        for row in result_of("draws")["settings"]
    }
    for count in (1, 4):
        one, two = (cost["stratified", count, "rademacher", number] for number in (1, 2))
        assert two < one
    assert cost["stratified", 1, "rademacher", 1] < cost["stratified", 1, "gaussian", 1]
    assert cost["uniform", 1, "rademacher", 1] >= cost["uniform", 1, "gaussian", 1]
    memory = result_of("peak_memory")["beyond_a_training_pass"]
    assert memory["curvlinops K-FAC factors"] / memory["K-FAC factors"] > 4


def test_what_the_documentation_says_of_precision():
    rows = {row["of"]: row for row in result_of("precision")["precisions"]}
    draws, in_low = rows["other draws"], rows["products in bfloat16"]
    for side in ("error_A", "error_B"):
        assert 1000 * rows["products in TF32"][side] < draws[side]
        assert 100 * in_low[side] < draws[side]
        autocast = rows["the network under autocast to bfloat16"][side]
        assert 10 * in_low[side] < autocast < draws[side] / 5


def test_what_the_documentation_says_of_the_exact_ggn():
    result = result_of("exact_ggn")
    whole = result["whole"]
    assert whole["between blocks, left out"] > 0.9
    reduce, K = (whole[f"{name}, within blocks"] for name in ("K-FAC, reduce", "K-FAC"))
    assert 0.4 < reduce / K < 0.6
    largest = {name: round(values["1"], 1) for name, values in result["spectra"].items()}
    of_blocks = largest.pop("exact blocks")
    assert largest.pop("exact") > 5 * of_blocks
    assert [name for name, value in largest.items() if value != of_blocks] == ["K-FAC, reduce"]
    shares = result["share_of_eigenvalues_above_1_and_10_percent_of_the_largest"]
    dense, lanczos = shares["dense"], shares["Lanczos"]
    assert 8 < lanczos[0] / dense[0] < 12
    assert 0.9 < lanczos[1] / dense[1] < 1.2
    default = result["cosines"][0]
    assert default["damping"] == 1e-8
    order = sorted(
        (name for name in default if "FAC" in name), key=default.__getitem__, reverse=True
    )
    assert order[0] == "EK-FAC, Shampoo's factors"
    assert order[-1] == "K-FAC, reduce"
    assert abs(default["K-FAC, reduce"]) < 0.01
    blocks = {row["blocks"]: row for row in result["cosines_by_kind"] if row["damping"] == 1e-8}
    for kind in ("convolutions", "attention"):
        for name in ("K-FAC", "EK-FAC", "EK-FAC, Shampoo's factors"):
            assert blocks[kind][name] > default[name]
    traces = [row["exact"] for row in result["bands"]]
    assert traces == sorted(traces, reverse=True)
    assert all(row["K-FAC"] > row["exact"] for row in result["bands"])
    assert all(row["EK-FAC"] == pytest.approx(row["exact"], rel=1e-5) for row in result["bands"])


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
        for same in ("EK-FAC, linear and convolutions only", f"{RECIPE}, 250 draws"):
            assert abs(digits[same, cell]["lds"] - own["lds"]) < 0.01
            assert undecided(minus_ekfac(digits, same, cell))
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
        gain = digits["EK-FAC, late checkpoints", cell]["lds"] - digits["EK-FAC", cell]["lds"]
        assert 0.02 < gain < 0.045
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
        assert minus_ekfac(digits, "powers of EK-FAC", cell)["low"] > 0
        assert digits["powers of EK-FAC", cell]["setting"] == "1.25"
        low = minus_ekfac(digits, "D-TRAK", cell)["high"] < 0
        assert low == (cell != "simplified_elbo, generated")
    refined = digits["conjugate gradients from EK-FAC", "loss, generated"]
    assert refined["setting"] == "2"
    assert refined["minus_ekfac"]["low"] > 0
    iterations = scan("digits", "conjugate gradients from EK-FAC", "loss, generated")
    assert iterations["1"] == pytest.approx(digits["EK-FAC", "loss, generated"]["lds"], abs=1e-4)
    assert iterations["8"] < iterations["1"]
    assert abs(digits["sampled GGN", cells[0]]["minus_reference"]["difference"]) < 0.01
    assert digits["sampled GGN", cells[1]]["minus_reference"]["high"] < 0


def test_what_the_documentation_says_of_regression():
    """On the prediction it is ahead of EK-FAC, as a regression; on the loss it is not."""
    digits, cells = shown("digits")
    for cell in cells[:2]:
        assert minus_ekfac(digits, "K-FAC, regression on the prediction", cell)["low"] > 0
    ridges = scan("digits", "K-FAC, regression on the prediction", cells[0])
    assert ridges["1e-08"] > ridges["ridge 30.0"] + 0.1
    ridges = scan("digits", "K-FAC, regression on the loss", cells[0])
    assert abs(ridges["1e-08"] - ridges["ridge 30.0"]) < 0.01
    for cell in cells:
        assert undecided(minus_ekfac(digits, "K-FAC, regression on the loss", cell))
        both = digits["K-FAC, regression on loss and prediction", cell]["lds"]
        assert both > digits["K-FAC, regression on the prediction", cell]["lds"]
        assert both > digits["K-FAC, regression on the loss", cell]["lds"]


def test_what_the_documentation_says_of_the_default():
    """Ahead of every method that differentiates the network, of the published ones' best apart."""
    digits, cells = shown("digits")
    pixels = "kernel regression on pixels"
    nearest = ("nearest in pixels", "Gaussian kernel of pixels", pixels, f"{pixels}, squared")
    for cell in cells[:2]:
        default = digits[quoted_numbers.DEFAULT, cell]
        for (method, place), entry in digits.items():
            if place == cell and method not in (*nearest, quoted_numbers.DEFAULT):
                assert entry["lds"] < default["lds"], method
        for method in (*PUBLISHED, RECIPE, f"{RECIPE}, 250 draws"):
            if (method, cell) in digits:
                assert digits[method, cell]["high"] < default["low"]
        squared = digits[f"{pixels}, squared", cell]
        assert squared["setting"] == "1e-08"
        assert squared["lds"] > digits[pixels, cell]["lds"]
        best = max(entry["lds"] for (_, place), entry in digits.items() if place == cell)
        assert squared["lds"] > best - 0.005
    assert (
        digits[f"{pixels}, squared", cells[0]]["lds"]
        > digits[quoted_numbers.DEFAULT, cells[0]]["lds"]
    )


def test_what_the_documentation_says_of_fashion_mnist():
    """Where nothing was chosen: the default is ahead of what differentiates the network, apart."""
    fashion, cells = shown("fashion")
    digits, _ = shown("digits")
    pixels = "kernel regression on pixels"
    nearest = ("nearest in pixels", "Gaussian kernel of pixels", pixels, f"{pixels}, squared")
    for cell, behind, behind_on_digits in zip(cells[:2], (0.16, 0.21), (0.11, 0.14), strict=True):
        default = fashion[quoted_numbers.DEFAULT, cell]
        for (method, place), entry in fashion.items():
            if place == cell and method not in (*nearest, quoted_numbers.DEFAULT):
                assert entry["lds"] < default["lds"], method
        for method in (*PUBLISHED, RECIPE, "EK-FAC"):
            if (method, cell) in fashion:
                assert fashion[method, cell]["high"] < default["low"], method
        assert abs(fashion[f"{pixels}, squared", cell]["lds"] - default["lds"]) < 0.009
        for found, expected in ((fashion, behind), (digits, behind_on_digits)):
            gain = found[quoted_numbers.DEFAULT, cell]["lds"] - found["EK-FAC", cell]["lds"]
            assert round(gain, 2) == expected
    for method in ("TRAK", "D-TRAK", "DAS", "no curvature"):
        assert minus_ekfac(fashion, method, cells[0])["high"] < 0
    assert minus_ekfac(fashion, "TRAK", cells[1])["high"] < 0
    for method in ("D-TRAK", "DAS"):
        assert undecided(minus_ekfac(fashion, method, cells[1]))


def test_what_the_documentation_says_of_the_training_length():
    rows = result_of("training_length")["lengths"]
    (middle,) = (row for row in rows if row["passes"] == 320)

    def of(row, part):
        return {method: parts[part] for method, parts in row["methods"].items()}

    for row in rows[1:]:
        linear, squared = (of(row, part) for part in ("linear", "squared"))
        assert linear["EK-FAC"]["low"] > 0
        assert linear["EK-FAC"]["lds"] > max(e["lds"] for e in linear.values()) - 0.02
        assert squared["EK-FAC"]["low"] < 0
        assert squared["EK-FAC"]["lds"] < 0
    most = max(rows, key=lambda row: of(row, "linear")["EK-FAC"]["lds"])
    assert most is middle
    for row in rows[:-1]:
        assert row["training_loss"] > row["held_out_loss"]
        assert max(e["lds"] for e in of(row, "squared").values()) < 0.13
    last = rows[-1]
    assert last["training_loss"] < last["held_out_loss"]
    knowing = ("kernel regression on pixels", "D-TRAK", "K-FAC, regression on the prediction")
    squared = of(last, "squared")
    for method in (*knowing, *(f"{knowing[i]}, squared" for i in (0, 2))):
        assert squared[method]["lds"] == pytest.approx(0.25, abs=0.015)
        assert squared[method]["low"] > 0
    for row in rows[1:4]:
        assert row["correlation"]["squared"] > row["correlation"]["linear"]


def test_what_the_documentation_says_of_the_settings_of_the_regression():
    """One sign is as good as more, and the whole inverse as metric better than its root."""
    _, cells = shown("digits")
    for cell in cells[:2]:
        found = scan("digits", "settings of the regression", cell)
        assert found["1 sign"] > max(found["2 signs"], found["4 signs"]) - 0.002
        assert found["1 sign"] > found["power 0.75, 1 sign"] > found["power 0.5, 1 sign"]
        assert found["power 1.25, 1 sign"] < found["1 sign"] + 0.005


def test_what_the_documentation_says_of_draws():
    """64 in antithetic pairs (the rows without a number) among numbers of uniform ones."""
    digits, cells = shown("digits")
    for cell, (fewer, more) in zip(cells[:2], ((250, 500), (100, 250)), strict=True):
        uniform = scan("digits", "draws, uniform", cell)
        assert uniform[f"{fewer}"] <= digits["EK-FAC", cell]["lds"] <= uniform[f"{more}"]


def test_what_the_documentation_says_of_damping():
    """Scores of K-FAC and EK-FAC against those at the default."""
    for curvature in ("K-FAC", "EK-FAC"):
        for problem in ("digits", "photographs"):
            for cell in shown(problem)[1]:
                scores = scan(problem, curvature, cell)
                flat = [value for key, value in scores.items() if float(key) < 1.5e-5]
                assert max(abs(value - scores["1e-08"]) for value in flat) < 0.02


def test_what_the_documentation_says_of_the_photograph():
    """Where nothing was chosen either: the default is ahead of everything, of published apart."""
    photograph, cells = shown("photographs")
    for cell in cells[:2]:
        default = photograph[quoted_numbers.DEFAULT, cell]
        for (method, place), entry in photograph.items():
            if place == cell and method != quoted_numbers.DEFAULT:
                assert entry["lds"] < default["lds"], method
        for method in (*PUBLISHED, RECIPE, "D-TRAK, late checkpoints"):
            if (method, cell) in photograph:
                assert photograph[method, cell]["high"] < default["low"], method
        squared = photograph["kernel regression on pixels, squared", cell]
        assert default["lds"] - squared["lds"] < 0.04
        both = photograph["K-FAC, regression on loss and prediction", cell]["lds"]
        assert abs(photograph["EK-FAC, late checkpoints", cell]["lds"] - both) < 0.015
    for cell in cells:
        kfac = minus_ekfac(photograph, "K-FAC", cell)
        assert kfac["high"] < 0
        assert kfac["difference"] > -0.03
        shampoo = minus_ekfac(photograph, "EK-FAC, Shampoo's factors", cell)
        assert shampoo["low"] > 0
        assert round(shampoo["difference"], 2) in (0.03, 0.04, 0.05, 0.06)
        assert 0 < minus_ekfac(photograph, "EK-FAC, GGN of the loss", cell)["difference"] < 0.021
        assert minus_ekfac(photograph, "sampled GGN", cell)["high"] < 0
        assert minus_ekfac(photograph, "EK-FAC, late checkpoints", cell)["low"] > 0
        both = "K-FAC, regression on loss and prediction"
        late = photograph[f"{both}, late checkpoints", cell]["lds"]
        assert round(late - photograph[both, cell]["lds"], 2) in (0.01, 0.02)
        late = photograph["D-TRAK, late checkpoints", cell]["lds"]
        assert late < photograph["D-TRAK", cell]["lds"] + 0.005
    for method in ("TRAK", "D-TRAK", "DAS", "no curvature"):
        assert minus_ekfac(photograph, method, cells[0])["high"] < 0
    for method in ("TRAK", "DAS", "Journey-TRAK", "no curvature"):
        assert minus_ekfac(photograph, method, cells[1])["high"] < 0
    assert undecided(minus_ekfac(photograph, "D-TRAK", cells[1]))
    for problem, number in (("digits", 2), ("fashion", 4), ("photographs", 2)):
        found, cells = shown(problem)
        differences = [minus_ekfac(found, "kernel regression on pixels", c) for c in cells]
        assert sum(difference["low"] > 0 for difference in differences) == number
    for cell in cells:
        both = scan("digits", "K-FAC, regression on loss and prediction", cell)
        assert max(both, key=both.__getitem__) in ("1e-08", "ridge 3.0")


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
    assert abs(found["random", 100][0]) < found["random", 100][1]
    # "that of either kernel regression"
    assert round(100 * found[ours, 100][0]) == round(100 * found[pixels, 100][0])
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


@pytest.mark.parametrize("problem", ["digits", "fashion", "photographs"])
def test_ahead_of_the_papers_recipe_everywhere(problem):
    found, cells = shown(problem)
    for cell in cells:
        best = found["K-FAC, regression on loss and prediction", cell]
        assert best["minus_reference"]["low"] > 0


def test_the_page_of_refusals_has_every_message():
    """Those that are written as text; what arrived is told by ``…``."""
    sources = "".join(path.read_text() for path in refusals.PACKAGE.rglob("*.py"))
    found = refusals.checks()
    messages = [message for check in found for message in (*check.refused, *check.warned)]
    assert len(messages) > 0.9 * sources.count("raise ValueError(")
    assert all(check.purpose for check in found)
    page = refusals.page()
    assert all(refusals.literal(message) in page for message in messages)
    assert "would leave out …. Pass drop_last=False." in page
