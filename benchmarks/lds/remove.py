"""Does the model get worse at a query when the images most helpful to it are removed?

The 1, 5 and 10 % of the training images that a method finds most helpful to a generated query are
left out, and networks are trained on the rest with five seeds each, for half of the steps, as the
networks of ``benchmarks.lds.retrain``. Random images removed are the control. One file for each
network in a work folder, so that a run that was killed goes on.

Legend: N training images, Q queries.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.evaluate import PREDICTED, key_of, numbers_of, setting_of
from benchmarks.lds.methods import METHODS, Setting
from benchmarks.lds.problems import Problem
from benchmarks.lds.retrain import FOLDER, NETWORKS, is_kept
from benchmarks.measure import RESULTS, arguments, report
from curvlinops_diffusion.runtime.digests import digest_of

SEEDS = 5
SHARES = (0.01, 0.05, 0.1)
# those with a damping of their own take the best by the linear data-modelling score of this cell
CELL = "loss, generated"
COMPARED = (
    "EK-FAC",
    "K-FAC, regression on loss and prediction",
    "TRAK",
    "kernel regression on pixels",
    "D-TRAK",
)


@dataclass(frozen=True)
class Job:
    """A network to be trained on what is left.

    Attributes:
        method: What chose the images; "none" and "random" for the controls.
        query: The query that they were chosen for, -1 for the controls.
        removed: Their indices.
    """

    problem: str
    work: Path
    method: str
    query: int
    seed: int
    removed: tuple[int, ...]

    @property
    def path(self) -> Path:
        """Where the measurements are kept: a name for each set of images that are left out."""
        label = f"{self.method.lower().replace(' ', '-')}_query{self.query}"
        removed = f"{len(self.removed)}-{digest_of(sorted(self.removed))}"
        return self.work / f"{label}_{removed}_seed{self.seed}.safetensors"


def losses(job: Job) -> Tensor:
    """Train, and measure the loss of each generated query, ``[Q]``; or read what was measured."""
    problem = PROBLEMS[job.problem]
    header, tensors = NETWORKS.read(job.work / "generated.safetensors")
    generated, of = tensors["generated"], header["of"]
    if not is_kept(NETWORKS, job.path, of=of):
        start = time.perf_counter()
        torch.set_num_threads(1)
        train = problem.data()[0]
        left = torch.ones(len(train), dtype=torch.bool)
        left[list(job.removed)] = False
        network = problem.trained(train[left], problem.steps // 2, 5000 + job.seed)
        # behind the held-out ones, so that their draws are those of the scores
        queries = torch.cat([problem.data()[1], generated])
        values_Q = problem.measured(network, queries)[0, -len(generated) :].contiguous()
        seconds = round(time.perf_counter() - start, 1)
        NETWORKS.write(job.path, {"values": values_Q}, {"seconds": seconds, "of": of})
    return NETWORKS.read(job.path)[1]["values"].double()


def most_helpful(setting: Setting, method: str, damping: str, work: Path) -> Tensor:
    """The training images by influence on each generated query's loss, ``[Q, N]``."""
    path = work / f"order_{method.lower().replace(' ', '-')}.safetensors"
    networks = digest_of(setting.weights, setting.generated)
    of = digest_of(networks, *numbers_of(setting.problem), METHODS[method], damping)
    if not is_kept(PREDICTED, path, of=of):
        by_setting = {key_of(key): scores[0] for key, scores in METHODS[method](setting)}
        own = by_setting[damping][-setting.problem.num_queries :]
        PREDICTED.write(path, {"order": own.argsort(descending=True)}, {"of": of})
    return PREDICTED.read(path)[1]["order"]


def damping_of(method: str, results: Path) -> str:
    """The default where the method has one, otherwise the best by its prediction of retraining."""
    for row in json.loads(results.read_text())["methods"]:
        if row["method"] == method and row["cell"] == CELL:
            return str(row["setting"])
    raise ValueError(f"{results} has no {method}. Evaluate it by benchmarks.lds.evaluate.")


def jobs(
    problem: Problem, work: Path, orders: dict[str, Tensor], queries: Sequence[int]
) -> list[Job]:
    """Controls first, then query by query."""
    N = problem.num_train
    sizes = sorted({max(round(share * N), 1) for share in SHARES})
    generator = torch.Generator().manual_seed(3)
    shuffled = [torch.randperm(N, generator=generator).tolist() for _ in range(SEEDS)]
    found = [Job(problem.name, work, "none", -1, seed, ()) for seed in range(SEEDS)]
    found += [
        Job(problem.name, work, "random", -1, seed, tuple(shuffled[seed][:size]))
        for size, seed in itertools.product(sizes, range(SEEDS))
    ]
    found += [
        Job(problem.name, work, method, query, seed, tuple(orders[method][query, :size].tolist()))
        for query, size, method, seed in itertools.product(queries, sizes, orders, range(SEEDS))
    ]
    return found


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of retrain's result")
    parser.add_argument("--evaluated", type=Path, default=RESULTS, help="folder of evaluate's")
    parser.add_argument("--queries", type=int, default=2, help="generated queries")
    parser.add_argument("--methods", nargs="*", default=COMPARED, choices=METHODS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    problem = PROBLEMS[options.problem]
    work = options.work / problem.name / "removed"
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    setting, _ = setting_of(problem, options.retrained)
    generated = {"generated": setting.generated}
    of = digest_of(problem.description, setting.generated)  # what every network depends on
    NETWORKS.write(work / "generated.safetensors", generated, {"of": of})
    evaluated = options.evaluated / f"lds_{problem.name}_cpu.json"
    dampings = {method: damping_of(method, evaluated) for method in options.methods}
    orders = {
        method: most_helpful(setting, method, damping, work) for method, damping in dampings.items()
    }
    queries = range(options.queries)
    todo = jobs(problem, work, orders, queries)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        measured = []
        for job, values in zip(todo, pool.imap(losses, todo), strict=True):
            measured.append(values)
            print(f"{len(measured)}/{len(todo)}: {job.path.stem}", flush=True)
    found = dict(
        zip(((j.method, j.query, len(j.removed), j.seed) for j in todo), measured, strict=True)
    )
    sizes = sorted({len(job.removed) for job in todo} - {0})
    rows = []
    for method, size in itertools.product(("random", *orders), sizes):
        without_SQ = torch.tensor(
            [
                [found[method, -1 if method == "random" else q, size, s][q] for q in queries]
                for s in range(SEEDS)
            ]
        )
        full_SQ = torch.stack([found["none", -1, 0, s][list(queries)] for s in range(SEEDS)])
        change, error = relative_change(without_SQ, full_SQ)
        row: dict[str, Any] = {"method": method, "damping": dampings.get(method, "")}
        row["removed"] = size
        row["change_of_loss"], row["its_error"] = round(change, 4), round(error, 4)
        each = [relative_change(without_SQ[:, [q]], full_SQ[:, [q]]) for q in range(len(queries))]
        row["by_query"] = [f"{change:.3f} ± {error:.3f}" for change, error in each]
        rows.append(row)
    seconds = sum(NETWORKS.read_header(job.path)["seconds"] for job in todo)
    result = {"seeds": SEEDS, "core_seconds": round(seconds), "removals": rows}
    report(options, f"removed_{problem.name}", __doc__, result)


def relative_change(without_SQ: Tensor, full_SQ: Tensor) -> tuple[float, float]:
    """The change of losses relative to those of all images, mean over queries, and its error.

    Networks of the same seed start from the same weights, and "none" and "random" serve all
    queries: the standard error is that of the mean over seeds, of the mean over queries.
    """
    change_S = (without_SQ / full_SQ.mean(0) - full_SQ / full_SQ.mean(0)).mean(1)
    return float(change_S.mean()), float(change_S.std() / len(change_S) ** 0.5)


if __name__ == "__main__":
    main()
