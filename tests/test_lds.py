"""The linear data-modelling score against SciPy, and on data where the answer is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import scipy.stats
import torch
from safetensors.torch import load

from benchmarks.lds import score
from benchmarks.lds.methods import METHODS
from benchmarks.lds.problems import PROBLEMS

ROOT = Path(__file__).parent.parent


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_spearman_is_scipys():
    x, y = random(3, 20), random(3, 20, seed=1)
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert torch.allclose(score.lds(x, y), torch.tensor(expected).double())
    tied = torch.randint(4, (3, 20), generator=torch.Generator().manual_seed(2)).double()
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(tied, y, strict=True)]
    assert torch.allclose(score._spearman_with_ties(tied, y), torch.tensor(expected).double())


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


def run(program, *arguments, **options):
    command = [sys.executable, "-m", f"benchmarks.lds.{program}", "--problem", "tiny", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )
    assert result.returncode == 0, result.stderr


def test_the_programs_run_and_go_on(tmp_path):
    """A tiny problem retrained, all methods evaluated; what was computed before is not again."""
    folder = str(tmp_path)
    run("retrain", "--work", folder, "--output", folder, "--processes", "2")
    written = tmp_path / "tiny.safetensors"
    before = written.read_bytes()
    (tmp_path / "tiny" / "half003_seed1.safetensors").unlink()  # as if killed before the last one
    written.unlink()
    run("retrain", "--work", folder, "--output", folder, "--processes", "1")
    values = [load(contents)["values"] for contents in (before, written.read_bytes())]
    assert torch.equal(*values)
    assert values[0].shape == (4, 2, 2, 4)
    arguments = ["--work", folder, "--output", folder, "--retrained", folder, "--draws", "2"]
    run("evaluate", *arguments, "--resamples", "3")
    result = json.loads((tmp_path / "lds_tiny_cpu.json").read_text())
    names = {row["method"] for row in result["methods"]}
    assert names == {*METHODS, "EK-FAC, late checkpoints"}
    kept = sorted((tmp_path / "tiny" / "evaluated-2").iterdir())
    assert len(kept) == len(names)
    times = [path.stat().st_mtime_ns for path in kept]
    run("evaluate", *arguments, "--resamples", "3")
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_halves():
    halves = PROBLEMS["digits"].halves()
    assert halves.shape == (64, 1000)
    assert (halves.sum(1) == 500).all()
    assert len({tuple(mask.tolist()) for mask in halves}) == 64
