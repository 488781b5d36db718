"""What the documentation and the README say of results: their tables, numbers and orders."""

import re
import sys
from pathlib import Path

import pytest

from tests.test_benchmarks import RESULTS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))  # which is no package

import quoted_numbers  # noqa: E402
import readme  # noqa: E402
import refusals  # noqa: E402
import tables  # noqa: E402
from quoted_numbers import result_of  # noqa: E402

LDS = [f"lds_{problem}" for problem in tables.PROBLEM_NAMES]

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
    pairs = re.findall(r"\| -?0\.\d\d / -?0\.\d\d(?= \|)", readme.README.read_text())
    # latents of those alone that have an autoencoder
    assert len(pairs) == len(LDS) * (len(tables.METHODS) + 2) + 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    tables.write_tables(folder)
    return {path.stem: path.read_text() for path in folder.iterdir()}


def test_every_table_is_in_a_page(written):
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.rst"))
    assert set(re.findall(r"include:: _tables/(\w+)\.rst", pages)) == written.keys()


@pytest.mark.parametrize("name", RESULTS)
def test_tables_hold_the_results(written, name):
    result = result_of(name)
    numbers = [f"{value:.2f}" for value in result.get("training_passes", {}).values()]
    numbers += [f"{value:,}" for value in result.get("peak_mebibytes", {}).values()]
    for row in next((value for value in result.values() if isinstance(value, list)), []):
        numbers += [str(value) for value in row.values()]
    assert numbers
    assert all(f"- {number}\n" in written[name] for number in numbers)


@pytest.mark.parametrize("name", LDS)
def test_tables_show_every_method(written, name):
    """With the number and interval of each cell, and the ceilings."""
    result = result_of(name)
    for part, key in (("", "lds"), ("_minus_ekfac", "difference")):
        lines = written[f"{name}{part}"].split("   * - ")[1:]
        head, *rows = ([cell.strip() for cell in line.split("\n     - ")] for line in lines)
        table = {row[0].removesuffix(" (best)"): dict(zip(head, row, strict=True)) for row in rows}
        for row in result["methods"]:
            if part and row["method"] == "EK-FAC":
                continue
            own, sign = (row["minus_ekfac"], "+") if part else (row, "")
            cell = table[row["method"]][row["cell"].replace("_", " ")]
            low, high = (f"{own[end]:{sign}.2f}" for end in ("low", "high"))
            assert cell == f"{own[key]:{sign}.2f} [{low}, {high}]"
        for cell, ceiling in ({} if part else result["ceilings"]).items():
            assert table["*a perfect predictor*"][cell.replace("_", " ")] == f"{ceiling:.2f}"


# ---------------------------------------------------------------------------------------------
# What is claimed
# ---------------------------------------------------------------------------------------------

EVERYWHERE = tuple(tables.PROBLEM_NAMES)
FROM_NOTHING = ("digits", "fashion", "photographs")
RECIPE = "EK-FAC, the paper's recipe"
REGRESSION, PIXELS, LATENTS = tables.REGRESSION, tables.PIXELS, tables.LATENTS
BOTH = quoted_numbers.KINDS
REDUCE = ("EK-FAC, reduce", "K-FAC, reduce")
# of the loss, by the intervals of differences to EK-FAC
BEHIND = [
    *((p, m, "held-out") for p in FROM_NOTHING for m in ("no curvature", "TRAK", "D-TRAK")),
    *(("digits", m, "generated") for m in ("TRAK", "D-TRAK", "Journey-TRAK")),
    *(("digits", m, kind) for m in (*REDUCE, "EK-FAC, GGN of the loss") for kind in BOTH),
    *(("photographs", m, kind) for m in REDUCE for kind in BOTH),
    *(("styles", m, "held-out") for m in REDUCE),
    *((p, "TRAK", "generated") for p in FROM_NOTHING),
    *(("styles", m, kind) for m in ("TRAK", "D-TRAK", "DAS", PIXELS, LATENTS) for kind in BOTH),
]
LEVEL = [
    *((p, "D-TRAK", "generated") for p in ("fashion", "photographs")),
    *(("styles", REGRESSION, kind) for kind in BOTH),
    *(("photographs", m, kind) for m in ("DAS", "EK-FAC, GGN of the loss") for kind in BOTH),
    *(("textures", "DAS", kind) for kind in BOTH),
    *(("styles", "EK-FAC, Shampoo's factors", kind) for kind in BOTH),
    ("textures", REGRESSION, "held-out"),
]
AHEAD = [
    *((p, m, kind) for p in FROM_NOTHING for m in (REGRESSION, PIXELS) for kind in BOTH),
    *(("dreambooth", m, kind) for m in (REGRESSION, LATENTS) for kind in BOTH),
    ("textures", REGRESSION, "generated"),
    *((p, "DAS", kind) for p in ("digits", "fashion") for kind in BOTH),
    *((p, "EK-FAC, Shampoo's factors", k) for p in ("digits", "photographs") for k in BOTH),
    *((p, "EK-FAC, GGN of the loss", "held-out") for p in ("styles", "dreambooth")),
    *(("dreambooth", m, "generated") for m in ("D-TRAK", "DAS")),
]


def loss_rows(problem):
    rows = result_of(f"lds_{problem}")["methods"]
    return {(r["method"], kind): r for r in rows for kind in BOTH if r["cell"] == f"loss, {kind}"}


def test_what_is_said_of_methods():
    rows = {problem: loss_rows(problem) for problem in EVERYWHERE}
    for places, holds in (
        (BEHIND, lambda d: d["high"] < 0),
        (LEVEL, lambda d: d["low"] < 0 < d["high"]),
        (AHEAD, lambda d: d["low"] > 0),
    ):
        for problem, method, kind in places:
            assert holds(rows[problem][method, kind]["minus_ekfac"]), (problem, method, kind)
    for problem in EVERYWHERE:
        for kind in BOTH:
            scores = {method: row["lds"] for (method, k), row in rows[problem].items() if k == kind}
            others = ("pixels", "latents", "words", "checkpoints", "training")
            network = {m: z for m, z in scores.items() if not any(word in m for word in others)}
            assert max(network.values()) - scores[REGRESSION] < 0.06
            assert max(scores["TRAK"], scores["D-TRAK"]) < scores[REGRESSION]
            on_textures = (problem, kind) == ("textures", "held-out")
            assert (scores["DAS"] < scores[REGRESSION]) != on_textures
            assert abs(scores["K-FAC"] - scores["EK-FAC"]) < 0.035
            assert abs(scores["K-FAC, regression on the loss"] - scores["EK-FAC"]) < 0.035
    for problem in FROM_NOTHING:
        for kind in BOTH:
            scores = {method: row["lds"] for (method, k), row in rows[problem].items() if k == kind}
            assert abs(scores[PIXELS] - scores[REGRESSION]) < 0.04
            assert scores[RECIPE] < scores["EK-FAC"]
            for method in ("K-FAC", "EK-FAC"):
                by_damping = rows[problem][method, kind]["by_setting"]
                small = [value for key, value in by_damping.items() if float(key) < 1.5e-5]
                assert max(small) - min(small) < 0.02
                assert by_damping["1e+00"] < by_damping["1e-08"] - 0.05


def test_what_is_said_of_draws():
    """64 in antithetic pairs are about as good as 250 uniform ones."""
    uniform = {
        row["draws"]: row
        for row in result_of("retraining_draws")["scores"]
        if row["scheme"] == "uniform"
    }
    for kind in BOTH:
        own = loss_rows("digits")["EK-FAC", kind]["lds"]
        assert abs(own - uniform[250][f"loss, {kind}"]) < 0.01


def test_what_is_said_of_the_training_length():
    rows = result_of("training_length")["lengths"]
    for row in rows:
        of = {part: row["methods"]["EK-FAC"][part] for part in ("linear", "squared")}
        assert of["squared"]["low"] < 0
        assert (of["linear"]["low"] > 0) == (row["passes"] >= 80)
        more = row["correlation"]["squared"] > row["correlation"]["linear"]
        assert more or not 80 <= row["passes"] <= 320
        memorised = row["training_loss"] < row["held_out_loss"]
        assert memorised == (row["passes"] == 1280)


def test_what_is_said_of_removal():
    """By the errors of the changes' differences, taken as independent."""
    found = {
        (row["method"], row["removed"]): (row["change_of_loss"], row["its_error"])
        for row in result_of("removed_digits")["removals"]
    }

    def errors_apart(method, number):
        (a, a_error), (b, b_error) = found[method, number], found["EK-FAC", number]
        return (a - b) / (a_error**2 + b_error**2) ** 0.5

    assert abs(found["random", 100][0]) < found["random", 100][1]
    assert errors_apart("TRAK", 100) < -5
    assert abs(errors_apart("D-TRAK", 100)) < 1.9
    assert all(abs(errors_apart(method, 10)) < 2.5 for method in ("TRAK", "D-TRAK"))


def test_what_is_said_of_performance():
    passes = result_of("factor_pass_unet")["training_passes"]
    assert passes["curvlinops K-FAC factors"] / passes["K-FAC factors"] > 3
    forms = {row["form"]: row for row in result_of("stored_gradients")["forms"]}
    assert forms["nf4"]["error_of_scores"] < 0.011
    assert forms["float32"]["bytes_for_each_example"] > 7 * forms["nf4"]["bytes_for_each_example"]
    samples = {row["positions"]: row for row in result_of("positions")["positions"]}
    for row in samples.values():  # no gain for a given error
        least = 0.99 * samples["all"]["squared_error_B_times_seconds"]
        assert row["squared_error_B_times_seconds"] > least
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
    assert cost["stratified", 1, "rademacher", 1] < cost["stratified", 1, "gaussian", 1]
    rows = {row["of"]: row for row in result_of("precision")["precisions"]}
    in_low = rows["products in bfloat16"]
    for side in ("error_A", "error_B"):
        assert 1000 * rows["products in TF32"][side] < rows["other draws"][side]
        assert 10 * in_low[side] < rows["the network under autocast to bfloat16"][side]


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
