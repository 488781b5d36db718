"""``validate``: a plan, measurements under retrained networks, and a judgement, by the program."""

import contextlib
import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from peft import inject_adapter_in_model

from curvlinops_diffusion import DenoisingObjective, ExampleGradientLinearOperator, NoisedRegression
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.cli.validate import networks_of, read_measured, verdict
from curvlinops_diffusion.influence.measurements.registry import MEASUREMENTS
from curvlinops_diffusion.influence.score_files import write_scores
from curvlinops_diffusion.influence.stored_scores import StoredScores
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.page.rankings import rows_of
from curvlinops_diffusion.validation import (
    RetrainingPlan,
    linear_datamodelling_score,
    removal_effects,
)
from tests.cases import stopped, tiny_unet
from tests.cli.cases import COUNT, arguments
from tests.loading.cases import lora, peft_folder, trained

PARTS, SEEDS = 4, 2
LIKELY = ["--measurement", "log_likelihood", "--query-draws", "1"]


def words(*given):
    return [str(word) for word in given]


def network(number):
    """As if it were retrained: other weights."""
    unet = tiny_unet(torch.float32, num_class_embeds=None)
    generator = torch.Generator().manual_seed(number)
    for p in unet.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return unet


@pytest.fixture(scope="module")
def planned(fitted, tmp_path_factory):
    """The problem of the other tests with a plan, and networks of two seeds."""
    folder = tmp_path_factory.mktemp("validate") / "f"
    shutil.copytree(fitted, folder)
    plan = ["--data", folder / "train", "--output", folder / "plan", "--num-parts", PARTS]
    assert run(words("validate", "plan", *plan)) == 0
    for part in range(PARTS):
        for seed in range(SEEDS):
            pipeline = DDPMPipeline(network(10 * part + seed), DDPMScheduler(100))
            pipeline.save_pretrained(folder / "retrained" / f"part_{part:03}_seed{seed}")
    return folder


def measuring(folder, output, *more):
    own = ["--plan", folder / "plan", "--retrained", folder / "retrained", "--output", output]
    own += ["--queries", folder / "queries", "--query-draws", 3, "--quiet"]
    return words("validate", "measure", *own, *more)


@pytest.fixture(scope="module")
def measured(planned):
    assert run(measuring(planned, planned / "measured.safetensors")) == 0
    return planned


def values_of(folder, unet, draws=3, seed=12345):
    objective = DenoisingObjective(unet.eval(), DDPMScheduler(100))
    x0 = torch.stack([item["x0"] for item in open_images(folder / "queries", Form(1, None, None))])
    return ExampleGradientLinearOperator(NoisedRegression(objective, x0, draws, seed)).values()


def test_a_plan(planned):
    plan = RetrainingPlan.open(planned / "plan")
    assert plan.left_out.shape == (PARTS, COUNT)
    lines = (planned / "plan" / "part_001.txt").read_text().splitlines()
    assert lines == [f"image{n}.png" for n in range(COUNT) if not plan.left_out[1, n]]
    again = words("validate", "plan", "--data", planned / "train", "--output", planned / "plan")
    assert run(again) == 2  # networks may have been trained by it


def test_measurements(measured):
    """Under each network, on the draws that are the same for all."""
    values, header = read_measured(measured / "measured.safetensors")
    assert values.shape == (SEEDS, PARTS, 2)
    assert header["queries"] == ["image0.png", "image1.png"]
    for seed, part in ((0, 0), (1, 3)):
        expected = values_of(measured, network(10 * part + seed))
        torch.testing.assert_close(values[seed, part], expected, rtol=1e-5, atol=0)
    assert not (measured / "measured.safetensors.checkpoint").exists()


def test_all_methods_of_a_file_are_judged(measured):
    both, output = measured / "both.safetensors", measured / "both.json"
    assert (
        run(arguments(measured, "score", "--output", both, "--method", "influence", "pixels")) == 0
    )
    given = ["--plan", measured / "plan", "--measured", measured / "measured.safetensors"]
    assert run(words("validate", "judge", *given, "--scores", both, "--output", output)) == 0
    plan, (values, _) = (
        RetrainingPlan.open(measured / "plan"),
        read_measured(measured / "measured.safetensors"),
    )
    expected = {
        f"both, {method}": linear_datamodelling_score(own.whole(), plan.left_out, values).mean
        for method, own in StoredScores.open(both).by_method.items()
    }
    found = {one["method"]: one["lds"] for one in json.loads(output.read_text())["methods"]}
    assert found == pytest.approx(expected)
    assert list(found) == ["both, influence", "both, pixels"]


def test_a_judgement(measured, capsys):
    """The library's numbers, in lines, a file and a page."""
    scores = StoredScores.open(measured / "scores.safetensors").whole()
    shuffled = arguments(measured, "score", "--output", measured / "other.safetensors", "--seed", 5)
    assert run(shuffled) == 0
    common = ["--plan", measured / "plan", "--measured", measured / "measured.safetensors"]
    common += ["--scores", measured / "scores.safetensors"]
    common += [f"again={measured / 'other.safetensors'}"]
    capsys.readouterr()
    for name in ("judged.json", "judged.html"):
        assert run(words("validate", "judge", *common, "--output", measured / name)) == 0
    told = capsys.readouterr().err
    found = json.loads((measured / "judged.json").read_text())
    values, _ = read_measured(measured / "measured.safetensors")
    lds = linear_datamodelling_score(
        scores, RetrainingPlan.open(measured / "plan").left_out, values
    )
    first, second = found["methods"]
    assert first["method"] == "scores"
    assert first["lds"] == pytest.approx(lds.mean)
    assert first["interval"] == pytest.approx(lds.interval)
    assert found["ceiling"] == pytest.approx(lds.ceiling)
    assert second["minus_first"]["difference"] == pytest.approx(second["lds"] - first["lds"])
    assert (
        f"scores: LDS of the loss {lds.mean:.3f} [{lds.interval[0]:.3f}, {lds.interval[1]:.3f}]"
        in told
    )
    page = (measured / "judged.html").read_text()
    assert f"<td>scores</td><td>{lds.mean:.3f}</td>" in page
    assert "<script" not in page
    likely = measured / "likely.safetensors"
    assert run(arguments(measured, "score", "--output", likely, *LIKELY)) == 0
    one = ["--output", measured / "likely.json"]
    assert run(words("validate", "judge", *common[:4], "--scores", likely, *one)) == 0
    (judged,) = json.loads((measured / "likely.json").read_text())["methods"]
    plan = RetrainingPlan.open(measured / "plan")
    of_loss = linear_datamodelling_score(-StoredScores.open(likely).whole(), plan.left_out, values)
    assert judged["lds"] == pytest.approx(of_loss.mean)  # it falls where a loss rises
    assert run(words("validate", "judge", *common, "--output", measured / "judged.html")) == 2
    assert "exists. Pass --overwrite" in capsys.readouterr().err


def test_what_does_not_belong_together(measured, tmp_path, capsys):
    other = ["--data", measured / "train", "--output", tmp_path / "plan", "--seed", 3]
    assert run(words("validate", "plan", *other, "--num-parts", PARTS)) == 0
    judge = ["--measured", measured / "measured.safetensors", "--output", tmp_path / "o.json"]
    scores = ["--scores", measured / "scores.safetensors"]
    assert run(words("validate", "judge", "--plan", tmp_path / "plan", *judge, *scores)) == 2
    assert "was measured by another plan" in capsys.readouterr().err
    own = ["validate", "judge", "--plan", measured / "plan", *judge]
    assert run(words(*own)) == 2
    assert "Pass the scores to judge" in capsys.readouterr().err
    assert run(words(*own, *scores, measured / "scores.safetensors")) == 2
    assert "Two --scores are called 'scores'" in capsys.readouterr().err
    swapped = tmp_path / "queries"
    shutil.copytree(measured / "queries", swapped)
    (swapped / "image0.png").rename(swapped / "image9.png")
    changed = ["--queries", swapped, "--output", tmp_path / "s.safetensors"]
    assert run(arguments(measured, "score", *changed)) == 0
    assert run(words(*own, "--scores", tmp_path / "s.safetensors")) == 2
    assert "is of other queries than" in capsys.readouterr().err


def test_images_of_the_same_names(measured, tmp_path, capsys):
    """A plan, what was measured by it and scores are of images, whatever these are called."""
    train = tmp_path / "train"
    shutil.copytree(measured / "train", train)
    shutil.copy(train / "image1.png", train / "image0.png")
    other = ["--data", train, "--output", tmp_path / "plan", "--num-parts", PARTS]
    assert run(words("validate", "plan", *other)) == 0
    judge = ["--measured", measured / "measured.safetensors", "--output", tmp_path / "o.json"]
    scores = ["--scores", measured / "scores.safetensors"]
    assert run(words("validate", "judge", "--plan", tmp_path / "plan", *judge, *scores)) == 2
    assert "was measured by another plan" in capsys.readouterr().err
    scored = ["--data", train, "--other-data", "--output", tmp_path / "s.safetensors"]
    assert run(arguments(measured, "score", *scored)) == 0
    scores = ["--scores", tmp_path / "s.safetensors"]
    assert run(words("validate", "judge", "--plan", measured / "plan", *judge, *scores)) == 2
    assert "of the same names as the plan's, but other images" in capsys.readouterr().err
    removals = ["--kind", "removals", "--remove", 1, "--output", tmp_path / "r", *scores]
    assert run(words("validate", "plan", "--data", measured / "train", *removals)) == 2
    assert "is of other training images than" in capsys.readouterr().err
    assert run(words("validate", "plan", "--data", train, *removals)) == 0


def test_networks_that_are_missing(planned, tmp_path, capsys):
    shutil.copytree(planned / "retrained", tmp_path / "retrained")
    shutil.rmtree(tmp_path / "retrained" / "part_002_seed1")
    output = tmp_path / "m.safetensors"
    where = ["--retrained", tmp_path / "retrained"]
    assert run(measuring(planned, output, *where)) == 2
    told = capsys.readouterr().err
    assert "has no network for 1 of 8 parts and seeds: part_002 (seed 1)" in told
    assert run(measuring(planned, output, "--dry-run")) == 0
    assert "8 networks, 6 samples forward under each" in capsys.readouterr().out


def test_parts_that_end_as_seeds_do(tmp_path):
    """A network of the part's own name is that part's."""
    for name in ("without_x_seed1", "a_seed0", "a_seed12"):
        (tmp_path / name).mkdir()
    found = networks_of(tmp_path, ("without_x_seed1",))
    assert found == {(0, "without_x_seed1"): tmp_path / "without_x_seed1"}
    assert sorted(networks_of(tmp_path, ("a",))) == [(0, "a"), (12, "a")]


def test_it_goes_on(planned, tmp_path):
    """Networks that were measured are not measured again."""
    output = tmp_path / "m.safetensors"
    with stopped(ExampleGradientLinearOperator, "values", at=4) as calls:
        assert run(measuring(planned, output)) == 2
        assert run(measuring(planned, output)) == 0
    assert len(calls) == SEEDS * PARTS + 1
    found, _ = read_measured(output)
    expected, _ = read_measured(planned / "measured.safetensors")
    assert torch.equal(found, expected)


def test_models_and_adapters(planned, tmp_path):
    """Networks as models with the scheduler of all, and as adapters of a pipeline."""
    plan = RetrainingPlan.random_subsets(COUNT, 3)
    plan.save(tmp_path / "plan")
    DDPMScheduler(100).save_pretrained(tmp_path / "scheduler")
    expected = []
    for part in range(3):
        network(part).save_pretrained(tmp_path / "models" / f"part_{part:03}")
        unet = DDPMPipeline.from_pretrained(planned / "pipeline").unet
        inject_adapter_in_model(lora(), unet)
        trained(unet, part)
        peft_folder(unet, tmp_path / "adapters" / f"part_{part:03}")
        expected.append([values_of(planned, network(part)), values_of(planned, unet)])
    for kind, own in (
        ("models", ["--scheduler", tmp_path / "scheduler"]),
        ("adapters", ["--pipeline", planned / "pipeline"]),
    ):
        output = tmp_path / f"{kind}.safetensors"
        where = ["--plan", tmp_path / "plan", "--retrained", tmp_path / kind]
        assert run(measuring(planned, output, *where, *own)) == 0
        values, _ = read_measured(output)
        truth = torch.stack([pair[kind == "adapters"] for pair in expected])
        torch.testing.assert_close(values[0], truth, rtol=1e-4, atol=0)


def test_the_next_command_is_printed_as_it_is_run(measured, tmp_path, capsys):
    plan = ["--scores", measured / "scores.safetensors", "--output", tmp_path / "plan"]
    assert run(words("validate", "plan", *plan, "--num-parts", 3)) == 0
    for part in range(3):
        pipeline = DDPMPipeline(network(part), DDPMScheduler(100))
        pipeline.save_pretrained(tmp_path / "retrained" / f"part_{part:03}")
    for step in ("measure", "judge"):
        (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("Then: ")]
        _, name, *rest = line.removeprefix("Then: ").split()
        assert rest[0] == step
        with contextlib.chdir(tmp_path):
            assert run([name, *rest, *(["--query-draws", "1"] if step == "measure" else [])]) == 0
    assert (tmp_path / "judged.html").exists()


@pytest.mark.parametrize(
    ("lds", "interval", "ceiling", "expected"),
    [
        (0.4, (0.3, 0.5), 0.8, "Predicts retraining better than chance, 50% of what"),
        (0.4, (0.3, 0.5), None, "Predicts retraining better than chance."),
        (-0.4, (-0.5, -0.3), 0.8, "Predicts the opposite of what retraining does"),
        (0.1, (-0.1, 0.3), 0.8, "if it is 0.10, about 48 more parts would show it."),
        (0.0, (-0.1, 0.1), 0.8, "Not told from chance."),
        (float("nan"), (float("nan"), float("nan")), None, "Undefined"),
    ],
)
def test_verdicts(lds, interval, ceiling, expected):
    """Sixteen parts of half-width 0.2: for half of that it takes four times as many."""
    assert expected in verdict(lds, interval, ceiling, 16)


def test_removals(measured, tmp_path, capsys):
    """Planned by scores, and judged by what the loss did."""
    plan = ["--data", measured / "train", "--output", tmp_path / "plan", "--kind", "removals"]
    more = ["--scores", measured / "scores.safetensors", "--remove", 1, 3]
    assert run(words("validate", "plan", *plan)) == 2
    assert "--kind removals needs --scores FILE and --remove N" in capsys.readouterr().err
    assert run(words("validate", "plan", *plan, *more)) == 0
    parts = RetrainingPlan.open(tmp_path / "plan").parts
    for number, part in enumerate(parts):
        network(number).save_pretrained(tmp_path / "models" / part)
    DDPMScheduler(100).save_pretrained(tmp_path / "scheduler")
    output = tmp_path / "m.safetensors"
    where = ["--plan", tmp_path / "plan", "--retrained", tmp_path / "models"]
    where += ["--scheduler", tmp_path / "scheduler"]
    assert run(measuring(measured, output, *where)) == 0
    judge = ["--plan", tmp_path / "plan", "--measured", output]
    for name in ("o.html", "o.json"):
        assert run(words("validate", "judge", *judge, "--output", tmp_path / name)) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["removals"]
    effects = removal_effects(parts, read_measured(output)[0], "scores")
    assert [row["removed"] for row in rows] == [1, 3]
    assert rows[1]["change"] == pytest.approx(effects[3].change)
    assert f"{100 * effects[1].change:+.1f} %" in (tmp_path / "o.html").read_text()


def test_groups(tmp_path, fitted):
    """Folders are classes, each of which is left out once."""
    for n, name in enumerate(("cats", "dogs", "dogs")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(fitted / "train" / f"image{n}.png", tmp_path / "data" / name)
    plan = ["--data", tmp_path / "data", "--output", tmp_path / "plan", "--kind", "groups"]
    assert run(words("validate", "plan", *plan)) == 0
    assert (tmp_path / "plan" / "without_dogs.txt").read_text() == "cats/image0.png\n"
    plan[1] = fitted / "train"
    assert run(words("validate", "plan", *plan, "--overwrite")) == 2


@pytest.mark.parametrize(
    ("name", "measurement", "chosen"),
    [
        ("scores", "loss", [0, 1]),
        ("scores", "log_likelihood", [COUNT - 2, COUNT - 1]),  # which falls without them
        ("scores", "squared_norm", None),
        ("scores", "mine:0123", None),
        ("Random", "loss", None),
    ],
)
def test_removals_are_of_helpful_images(fitted, tmp_path, capsys, name, measurement, chosen):
    """As the report has it; refused where neither sign means helpful."""
    scores = torch.linspace(1, -1, COUNT).unsqueeze(0)
    names = {"train": [f"image{n}.png" for n in range(COUNT)], "queries": ["q.png"]}
    path = tmp_path / f"{name}.safetensors"
    header = {**names, "identity": {"query": {"measurement": measurement}}}
    write_scores(path, {"scores": scores}, header)
    plan = ["--data", fitted / "train", "--output", tmp_path / "plan", "--kind", "removals"]
    code = run(words("validate", "plan", *plan, "--scores", path, "--remove", 2))
    if chosen is None:
        assert code == 2
        told = capsys.readouterr().err
        wanted = "Rename the file" if name == "Random" else "neither sign means helpful"
        assert wanted in told
        return
    assert code == 0
    found = RetrainingPlan.open(tmp_path / "plan")
    left_out = found.left_out[found.parts.index("scores_0_2")].nonzero().flatten().tolist()
    assert left_out == chosen
    better = MEASUREMENTS[measurement].better
    assert sorted(rows_of(scores[0], 2, better)[0].indices) == chosen


def test_a_judgement_of_constant_scores(measured, tmp_path, capsys):
    """Undefined, said so, and no invalid JSON; the other query's score stays."""
    stored = StoredScores.open(measured / "scores.safetensors")
    common = ["--plan", measured / "plan", "--measured", measured / "measured.safetensors"]
    for name, constant in (("one", [1]), ("both", [0, 1])):
        changed, header = stored.whole(), stored.header
        changed[constant] = 0.1
        write_scores(tmp_path / f"{name}.safetensors", {"scores": changed}, header)
    files = [tmp_path / "both.safetensors", tmp_path / "one.safetensors"]
    for output in ("o.json", "o.html"):
        given = [*common, "--scores", *files, "--output", tmp_path / output]
        assert run(words("validate", "judge", *given)) == 0
    told = capsys.readouterr().err
    assert "both: LDS of the loss undefined [undefined, undefined]; undefined for 2" in told
    assert "Undefined: scores or measurements of all parts are alike." in told
    assert "undefined for 1 of 2 queries, left out" in told
    text = (tmp_path / "o.json").read_text()
    assert "NaN" not in text
    both, one = json.loads(text)["methods"]
    assert (both["lds"], both["interval"]) == (None, [None, None])
    assert one["lds"] == one["per_query"][0]
    assert one["minus_first"]["difference"] is None
