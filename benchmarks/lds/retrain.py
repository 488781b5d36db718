"""Retrain on random halves of the training images, and measure the queries: core-hours.

One file for each network in a work folder, so that a run that was killed goes on. Writes
``benchmarks/lds/digits.safetensors`` (or ``photographs.safetensors``): the network trained on all
images and its late checkpoints, its samples, the halves, and the measurements of the retrained
networks; of those that are still to be trained NaN. Where the work folder is lost, a run goes on
from such a file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.problems import LATE, MEASUREMENTS, SEEDS, Problem, rows
from benchmarks.measure import arguments, machine
from curvlinops_diffusion.runtime.files import FileKind

# kept for longer than the package's format
NETWORKS = FileKind("retrained", "retrained networks", "Run benchmarks.lds.retrain again.", None)


FOLDER = Path(__file__).parent
# networks, after which the result is written
SAVED_EVERY = 8


def result(problem: Problem, folder: Path = FOLDER) -> Path:
    """The file of a problem's retrained networks."""
    return folder / f"{problem.name}.safetensors"


def arguments_of_retrained(description: str | None) -> argparse.ArgumentParser:
    """Options of programs that judge scores by retrained networks."""
    parser = arguments(description)
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of its result")
    parser.add_argument("--draws", type=int, default=64, help="draws of each training image")
    parser.add_argument("--resamples", type=int, default=500)
    return parser


def is_kept(kind: FileKind, path: Path, **expected: Any) -> bool:
    """Whether there is a file whose header says what is expected."""
    if not path.exists():
        return False
    header = kind.read_header(path)
    return all(header.get(key) == value for key, value in expected.items())


def weights_under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights, which are kept under names that begin with a prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def run_all(
    work: Callable[[Any], float],
    jobs: Sequence[Any],
    processes: int,
    now_and_then: Callable[[], None] = lambda: None,
) -> None:
    """Train networks in several processes, and say how far that is."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, seconds in enumerate(pool.imap(work, jobs), start=1):
            print(f"{done}/{len(jobs)} networks, the latest took {seconds:.0f} s", flush=True)
            if done % SAVED_EVERY == 0:
                now_and_then()


def base(problem: Problem, work: Path) -> dict[str, Tensor]:
    """The network trained on all images, its late checkpoints, a second one, and its samples.

    The late ones, and the second, of another seed, are kept in float16.
    """
    path = work / "base.safetensors"
    if not is_kept(NETWORKS, path, problem=problem.description):
        late: dict[str, Tensor] = {}

        def keep(step: int, network: UNet2DModel) -> None:
            for fraction in LATE:
                if step == round(fraction * problem.steps):
                    for name, weight in problem.kept(network).items():
                        late[f"late/{fraction}/{name}"] = weight.half().clone()

        network = problem.trained(problem.data()[0], problem.steps, 100, keep)
        weights = {f"weights/{k}": v.contiguous() for k, v in problem.kept(network).items()}
        samples = problem.generated(network)
        beside = problem.beside(network, samples)
        header = {"problem": problem.description}
        NETWORKS.write(path, {**weights, **late, "generated": samples, **beside}, header)
    return load_file(path)


def retrain(job: tuple[str, Path, int, int]) -> float:
    """Train a network on a half, and measure it; nothing if that was done before."""
    name, work, half, seed = job
    problem = PROBLEMS[name]
    path = work / f"half{half:03}_seed{seed}.safetensors"
    if is_kept(NETWORKS, path, problem=problem.description):
        return 0.0
    start = time.perf_counter()
    torch.set_num_threads(1)
    queries = problem.queries(load_file(work / "base.safetensors")["generated"])
    some = rows(problem.data()[0], problem.halves()[half])
    network = problem.trained(some, problem.steps // 2, 1000 * (seed + 1) + half)
    values = problem.measured(network, queries).contiguous()
    seconds = time.perf_counter() - start
    header = {"seconds": seconds, "problem": problem.description}
    NETWORKS.write(path, {"values": values}, header)
    return seconds


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    problem = PROBLEMS[options.problem]
    work = options.work / problem.name
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as the retrained ones; and the same result on every machine size
    path = result(problem, options.output)
    unpack(problem, work, path)
    tensors = base(problem, work)
    halves = range(problem.num_halves)
    # seeds of a half in turn, so that their agreement shows early
    jobs = [(problem.name, work, half, seed) for half in halves for seed in range(SEEDS)]
    run_all(retrain, jobs, options.processes, lambda: pack(problem, work, path, tensors))
    pack(problem, work, path, tensors)
    print(f"Wrote {path}")


def pack(problem: Problem, work: Path, path: Path, base: Mapping[str, Tensor]) -> None:
    """Write what there is as one file."""
    read = [
        [_read(problem, work, half, seed) for seed in range(SEEDS)]
        for half in range(problem.num_halves)
    ]
    values_HSMQ = torch.stack([torch.stack([values for values, _ in row]) for row in read])
    header = {
        "machine": machine(),
        "problem": problem.description,
        "core_seconds": round(sum(seconds for row in read for _, seconds in row)),
        "steps": problem.steps,
        "batch": problem.batch,
        "measurements": MEASUREMENTS,
        "measured_draws": problem.measured_draws,
    }
    NETWORKS.write(path, {**base, "values": values_HSMQ, "halves": problem.halves()}, header)


def unpack(problem: Problem, work: Path, path: Path) -> None:
    """Put what an unfinished file holds into a work folder that does not have it."""
    if not is_kept(NETWORKS, path, problem=problem.description):
        return
    header, tensors = NETWORKS.read(path)
    done_HS = networks_done(tensors)
    if done_HS.all():
        return
    base = {k: z for k, z in tensors.items() if k not in ("values", "halves")}
    described = {"problem": problem.description}
    # of each network only their sum is known
    each = float(header["core_seconds"]) / max(1, int(done_HS.sum()))
    found = {"base": (base, described)}
    for half, seed in done_HS.nonzero().tolist():
        values = {"values": tensors["values"][half, seed].contiguous()}
        found[f"half{half:03}_seed{seed}"] = values, {"seconds": each, **described}
    for name, (own, said) in found.items():
        if not (work / f"{name}.safetensors").exists():
            NETWORKS.write(work / f"{name}.safetensors", own, said)


def networks_done(tensors: Mapping[str, Tensor]) -> Tensor:
    """Which networks have been retrained, ``[H, S]``."""
    return tensors["values"].isfinite().flatten(2).all(2)


def _read(problem: Problem, work: Path, half: int, seed: int) -> tuple[Tensor, float]:
    path = work / f"half{half:03}_seed{seed}.safetensors"
    if not is_kept(NETWORKS, path, problem=problem.description):
        return torch.full((len(MEASUREMENTS), 2 * problem.num_queries), torch.nan), 0.0
    header, tensors = NETWORKS.read(path)
    seconds: Any = header["seconds"]
    return tensors["values"], float(seconds)


if __name__ == "__main__":
    main()
