"""The linear data-modelling score against SciPy, and on data where the answer is known."""

import dataclasses
import json
import multiprocessing.dummy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import nn

from benchmarks.lds import (
    against_length,
    calibration,
    checks,
    draws,
    evaluate,
    lengths,
    remove,
    retrain,
    unlearning,
)
from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.evaluate import AVERAGED, RANKS, earlier
from benchmarks.lds.methods import METHODS, Setting, same_words
from benchmarks.lds.remove import jobs, relative_change
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.validation import linear_datamodelling_score

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_ranks_are_judged_as_their_scores():
    """What is kept of scores gives the library's score, its interval and the paired difference."""
    halves = PROBLEMS["digits"].halves()[:, :40]
    scores = {"other": random(5, 40), "EK-FAC": random(5, 40, seed=1)}
    measured = evaluate.predicted(scores["other"], halves).T + random(2, 64, 5, seed=2)
    rows = [{"method": name, "cell": "loss"} for name in scores]
    ranks = {
        f"{name}/loss": evaluate.doubled_ranks(evaluate.predicted(z, halves))
        for name, z in scores.items()
    }
    found, limits = evaluate.with_intervals(rows, ranks, {"loss": measured}, 50)
    one, other = (
        linear_datamodelling_score(z, ~halves, measured, bootstrap=50) for z in scores.values()
    )
    difference, interval = one.minus(other)
    for row, expected in zip(found, (one, other), strict=True):
        assert row["lds"] == pytest.approx(expected.mean, abs=1e-4)
        assert [row["low"], row["high"]] == pytest.approx(expected.interval, abs=1e-4)
    own = found[0]["minus_ekfac"]
    assert own["difference"] == pytest.approx(difference, abs=1e-4)
    assert [own["low"], own["high"]] == pytest.approx(interval, abs=1e-4)
    assert limits["ceilings"]["loss"] == pytest.approx(one.ceiling, abs=1e-4)


# ---------------------------------------------------------------------------------------------
# The programs, on the tiny problem
# ---------------------------------------------------------------------------------------------


class Here:
    """A pool of one process, which is this one: starting another takes the longest."""

    def __init__(self, kind):
        assert kind == "spawn"

    def Pool(self, processes):  # as multiprocessing calls it
        return multiprocessing.dummy.Pool(1)


def run(program, *arguments, problem="tiny"):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [program.__name__, "--problem", problem, *map(str, arguments)])
        patched.setattr("multiprocessing.get_context", Here)
        program.main()


@pytest.fixture(scope="module")
def retrained(tmp_path_factory):
    """A folder with the retrained networks, in which each test may leave further results."""
    folder = tmp_path_factory.mktemp("lds")
    run(retrain, "--work", folder, "--output", folder)
    return folder


def test_compiled_training_is_one_network_s_after_the_other(monkeypatch):
    """Weights are loaded into a network that is compiled once; each training is its own."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    problem = PROBLEMS["tiny"]
    as_one = dataclasses.replace(problem, compiled=True)
    x0 = problem.data()[0]
    for seed in (1, 2):
        plain, other = (p.trained(x0, 3, seed).state_dict() for p in (problem, as_one))
        assert all(torch.equal(weight, other[name]) for name, weight in plain.items())
    assert len(compiled) == 1


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


def test_retraining_goes_on_from_its_result(retrained, tmp_path, monkeypatch):
    """As if the work folder were lost: what the file lacks is trained, with the same values."""
    path, whole = tmp_path / "tiny.safetensors", load_file(retrained / "tiny.safetensors")
    work = tmp_path / "first"
    shutil.copytree(retrained / "tiny", work / "tiny")
    for name in ("half001_seed0", "half003_seed1"):
        (work / "tiny" / f"{name}.safetensors").unlink()
    problem = PROBLEMS["tiny"]
    base = load_file(work / "tiny" / "base.safetensors")
    retrain.pack(problem, work / "tiny", path, base)
    assert retrain.networks_done(load_file(path)).sum() == 6
    with pytest.raises(ValueError, match="holds 6 of 8 retrained networks"):
        run(evaluate, "--work", work, "--output", tmp_path, "--retrained", tmp_path)
    trained = []
    monkeypatch.setattr(type(problem), "trained", _noting(type(problem).trained, trained))
    run(retrain, "--work", tmp_path / "second", "--output", tmp_path)
    assert len(trained) == 2
    again = load_file(path)
    assert again.keys() == whole.keys()
    assert [name for name, z in again.items() if not torch.equal(z, whole[name])] == []


def _noting(function, notes):
    def noted(*args, **kwargs):
        notes.append(args)
        return function(*args, **kwargs)

    return noted


def evaluated(folder, output, *more):
    """The methods of the result, and when their predictions were made."""
    where = ("--work", folder, "--output", output, "--retrained", folder)
    run(evaluate, *where, "--draws", 2, "--resamples", 3, *more)
    result = json.loads((output / "lds_tiny_cpu.json").read_text())
    assert result["retrained"]["problem"] == PROBLEMS["tiny"].description
    files = (folder / "tiny" / "evaluated-2").iterdir()
    return {r["method"] for r in result["methods"]}, {f: f.stat().st_mtime_ns for f in files}


def test_evaluation_and_removal(retrained, tmp_path):
    """Of a few methods; what was computed before is not again, and intervals are from ranks."""
    some = "EK-FAC", "TRAK", "kernel regression on pixels"
    names, made = evaluated(retrained, tmp_path, "--methods", *some)
    assert names == set(some)
    assert len(made) == 3
    path = tmp_path / "lds_tiny_cpu.json"
    rows = json.loads(path.read_text())["methods"]
    for again in (("--methods", *some), ("--again",)):
        assert evaluated(retrained, tmp_path, *again) == (names, made)
        assert json.loads(path.read_text())["methods"] == rows
    where = ("--work", retrained, "--output", tmp_path, "--retrained", retrained)
    run(remove, *where, "--evaluated", tmp_path, "--queries", 1, "--methods", "EK-FAC")
    removals = json.loads((tmp_path / "removed_tiny_cpu.json").read_text())["removals"]
    assert [row["method"] for row in removals] == ["random", "EK-FAC"]
    assert removals[0]["change_of_loss"] != removals[1]["change_of_loss"]


def test_slopes_and_intervals_of_changes():
    """Where the slope is known, the error too; and the interval holds nine of ten elsewhere."""
    queries_Q1 = random(40, 1, seed=4).exp()

    def changes(seed):
        x = queries_Q1 * random(40, 60, seed=seed) + 5
        return x, 0.05 * x + 0.1 * random(40, 60, seed=seed + 1) + queries_Q1

    slopes = torch.tensor([calibration.slope_of(*changes(2 * n), 200) for n in range(40)])
    assert slopes[:, 0].mean() == pytest.approx(0.05, rel=0.01)
    assert slopes[:, 1].mean() == pytest.approx(float(slopes[:, 0].std()), rel=0.35)
    x, y = changes(100)
    centred = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    assert calibration.slope_of(*centred, 20)[0] == calibration.slope_of(x, y, 20)[0]
    pairs = {str(n): tuple(z - z.mean(1, keepdim=True) for z in changes(n)) for n in (1, 3, 5)}
    for row in calibration.covered(pairs):
        assert row["coverage"] == pytest.approx(0.9, abs=0.02)
        assert row["half_width"] == pytest.approx(0.1645, rel=0.05)


@pytest.mark.slow
def test_calibration_from_kept_retrainings(retrained, tmp_path):
    """Groups are judged as the scores of their images are."""
    run(calibration, "--output", tmp_path, "--retrained", retrained, "--draws", 2)
    name = "calibration_cpu.json"
    results = [json.loads((f / name).read_text()) for f in (tmp_path, RESULTS)]
    for part in ("slopes", "crossed", "spread"):
        found, kept = ([row.keys() for row in result[part]] for result in results)
        assert found == kept[: len(found)]
    evaluated(retrained, tmp_path, "--methods", "EK-FAC")
    rows = json.loads((tmp_path / "lds_tiny_cpu.json").read_text())["methods"]
    expected = {row["cell"]: row["lds"] for row in rows}
    for row in results[0]["crossed"]:
        of, kind = row["scores_of"], row["queries"]
        if of in ("loss", "simplified_elbo"):
            assert row[of]["lds"] == expected[f"{of}, {kind}"]


def test_unlearning(retrained, tmp_path):
    """Short steps give what the derivative gives, and the caps hold."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {"STEP": 1e-4, "STEPS": (1, 2), "MOST_STEPS": 2, "DRAWS": 2}.items():
            patched.setattr(unlearning, name, value)
        where = ("--work", tmp_path, "--output", tmp_path, "--retrained", retrained)
        run(unlearning, *where, "--queries", 2)
    rows = json.loads((tmp_path / "unlearned_tiny_cpu.json").read_text())["unlearned"]
    assert len(rows) == 1 + 1 + 2 * 2 + 3 * 2
    found = {row["method"]: row["held-out"]["lds"] for row in rows}
    assert found["one finite step"] == found["derivative"]
    assert found["EK-FAC steps, 1"] == found["derivative"]


@pytest.mark.slow
def test_adapters(tmp_path):
    """Kept are the adapter's weights alone, and scores are of these."""
    problem, folder = PROBLEMS["tiny-adapter"], ("--work", tmp_path, "--output", tmp_path)
    run(retrain, *folder, problem=problem.name)
    setting, (_, tensors) = evaluate.setting_of(problem, tmp_path, 2)
    second = retrain.weights_under("second/", tensors)
    queries = problem.queries(tensors["generated"])
    networks = problem.pipeline.unet, problem.loaded(setting.weights), problem.loaded(second)
    measured = torch.stack([problem.measured(network, queries) for network in networks])
    assert torch.allclose(measured, tensors["base_first_second"], rtol=1e-5)
    sizes = [z.numel() for z in setting.weights.values()]
    assert setting.J_train.shape == (12, sum(sizes))
    assert sum(sizes) < sum(z.numel() for z in problem.pipeline.unet.parameters()) / 4
    wanted = ["EK-FAC", "same words", "kernel regression on latents, squared"]
    options = ("--retrained", tmp_path, "--draws", 2, "--resamples", 3, "--methods", *wanted)
    run(evaluate, *folder, *options, problem=problem.name)
    rows = json.loads((tmp_path / "lds_tiny-adapter_cpu.json").read_text())["methods"]
    assert {row["method"] for row in rows} == set(wanted)


def test_words_in_common():
    train, asked = PROBLEMS["tiny-adapter"].words()
    ((_, scores_MQN),) = same_words(Setting(PROBLEMS["tiny-adapter"], {}, torch.zeros(0)))
    for q, own in enumerate(asked):
        shared = [sum(word in caption.split() for word in own.split()) for caption in train]
        assert scores_MQN[0, q].tolist() == shared


@pytest.mark.slow
def test_draws_against_retraining(retrained, tmp_path):
    run(draws, "--output", tmp_path, "--retrained", retrained, "--device", "cpu")
    name = "retraining_draws_cpu.json"
    results = [json.loads((f / name).read_text()) for f in (tmp_path, RESULTS)]
    assert results[0].keys() == results[1].keys()
    rows, kept = (result["scores"] for result in results)
    assert [row.keys() for row in rows] == [kept[0].keys()] * len(rows)
    assert {row["scheme"] for row in rows} == {row["scheme"] for row in kept}


def test_checks_against_retraining(retrained, tmp_path):
    """Scores that are kept are judged again without a gradient."""
    given = ["--retrained", retrained, "--work", tmp_path, "--output", tmp_path, "--device", "cpu"]
    run(checks, *given)
    first = json.loads((tmp_path / "checks_cpu.json").read_text())
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(checks, "probed")
        run(checks, *given)
    assert json.loads((tmp_path / "checks_cpu.json").read_text())["rows"] == first["rows"]
    own, mixed, pixels = first["rows"]
    assert mixed["halves"] != ""
    assert pixels["shuffled weights"] == 1
    assert {"itself", "recompressed", "LDS, held-out"} <= own.keys()


@pytest.mark.slow
def test_every_method(retrained, tmp_path):
    names, made = evaluated(retrained, tmp_path)
    assert names == {*METHODS, *(f"{name}, late checkpoints" for name in AVERAGED)}
    assert len(made) == len(names)
    assert evaluated(retrained, tmp_path) == (names, made)


def test_rows_of_other_methods_are_kept(tmp_path):
    """Those of the same settings; with others the file is refused."""
    path, beside = tmp_path / "result.json", tmp_path / "ranks.safetensors"
    assert earlier(path, beside, {"draws": 2}, ["b"]) == ([], {})
    rows = [{"method": name} for name in ("a", "b")]
    path.write_text(json.dumps({"draws": 2, "methods": rows}))
    RANKS.write(beside, {f"{row['method']}/loss": torch.zeros(1) for row in rows}, {})
    kept, ranks = earlier(path, beside, {"draws": 2}, ["b"])
    assert kept == rows[:1]
    assert list(ranks) == ["a/loss"]
    with pytest.raises(ValueError, match="other draws"):
        earlier(path, beside, {"draws": 3}, [])


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


def test_halves():
    halves = PROBLEMS["digits"].halves()
    assert halves.shape == (64, 1000)
    assert (halves.sum(1) == 500).all()
    assert len({tuple(mask.tolist()) for mask in halves}) == 64


# ---------------------------------------------------------------------------------------------
# Against the training's length
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """The tiny problem in place of the one whose length varies."""
    problem = dataclasses.replace(PROBLEMS["tiny"], steps=64, constant_rate=True)
    for module in (lengths, against_length):
        monkeypatch.setattr(module, "PROBLEM", problem)
    monkeypatch.setattr("multiprocessing.get_context", Here)
    return problem


def test_parts_of_a_loss(short):
    """The loss as it is measured elsewhere; its parts by predictions, written out."""
    train, held_out = short.data()
    networks = [short.trained(train, 3, seed) for seed in range(2)]
    after, before = networks
    parts_MQ = lengths.measured(after.state_dict(), before.state_dict(), held_out)
    loss_Q, before_Q = (short.measured(network, held_out)[0] for network in networks)
    assert torch.allclose(parts_MQ[0], loss_Q)
    objective = DenoisingObjective(before, DDPMScheduler())
    regression = NoisedRegression(objective, held_out, short.measured_draws, 12345)
    linear, squared = [], []
    for batch in regression.batches():
        y, old, new = (
            batch.target_BD,
            *(
                net(batch.x_t, batch.timestep_B).sample.detach().flatten(1)
                for net in (before, after)
            ),
        )
        linear.append(2 * ((old - y) * (new - old)).mean(1))
        squared.append((new - old).square().mean(1))
    assert torch.allclose(parts_MQ[1], torch.stack(linear).mean(0), atol=1e-6)
    assert torch.allclose(parts_MQ[2], torch.stack(squared).mean(0), atol=1e-6)
    assert torch.allclose(before_Q + parts_MQ[1] + parts_MQ[2], loss_Q, atol=1e-6)


def test_averages_are_of_a_tenth_of_the_training(short, monkeypatch):
    """Weights that grow by one each step: their average lags behind in proportion."""

    def trained(self, x0, steps, seed, keep):
        network = nn.Linear(1, 1)
        for step in range(steps + 1):
            for parameter in network.parameters():
                parameter.data.fill_(float(step))
            if step < steps:
                keep(step, network)
        return network

    monkeypatch.setattr(type(short), "trained", trained)
    kept = lengths.averages(torch.zeros(1), 3200, 0)
    assert len(kept) == len(lengths.FRACTIONS)
    for weights, fraction in zip(kept, lengths.FRACTIONS, strict=True):
        lag = 1 - float(next(iter(weights.values())).mean()) / (3200 * fraction)
        assert lag == pytest.approx(1 / (lengths.EXPONENT + 2), rel=0.15)


@pytest.mark.slow
def test_the_programs_against_the_length_run(short, tmp_path, monkeypatch):
    monkeypatch.setattr(against_length, "COMPARED", against_length.COMPARED[-1:])
    for module in (lengths, against_length):
        monkeypatch.setattr(module, "FRACTIONS", lengths.FRACTIONS[-2:])
    folder = ["--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lengths", "--work", str(tmp_path / "work"), *folder])
    lengths.main()
    options = ["--draws", "2", "--resamples", "3", "--retrained", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["against_length", *options, *folder])
    against_length.main()
    result = json.loads((tmp_path / "training_length_cpu.json").read_text())
    kept = json.loads((RESULTS / "training_length_cpu.json").read_text())
    assert result.keys() == kept.keys()
    assert [row.keys() for row in result["lengths"]] == [row.keys() for row in kept["lengths"][:2]]
