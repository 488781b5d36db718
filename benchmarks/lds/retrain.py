"""Retrain on random halves of the training digits, and measure the queries: two core-hours.

One file for each network in a work folder, so that a run that was killed goes on. Writes
``benchmarks/lds/retrained.safetensors``: the network trained on all digits, its samples, the
halves, and the measurements of the retrained networks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.lds import digits
from benchmarks.measure import machine
from curvlinops_diffusion._files import FileKind

NETWORKS = FileKind("retrained", "retrained networks", "Run benchmarks.lds.retrain again.")
RESULT = Path(__file__).parent / "retrained.safetensors"


def base(work: Path) -> dict[str, Tensor]:
    """The network trained on all digits, and its samples."""
    path = work / "base.safetensors"
    if not path.exists():
        network = digits.trained(digits.data()[0], digits.STEPS, seed=100)
        weights = {f"weights/{k}": v.contiguous() for k, v in network.state_dict().items()}
        NETWORKS.write(path, {**weights, "generated": digits.generated(network)}, {})
    return load_file(path)


def retrain(job: tuple[Path, int, int]) -> float:
    """Train a network on a half, and measure it; nothing if that was done before."""
    work, half, seed = job
    path = work / f"half{half:03}_seed{seed}.safetensors"
    if path.exists():
        return 0.0
    start = time.perf_counter()
    torch.set_num_threads(1)
    train, held_out = digits.data()
    queries = torch.cat([held_out, load_file(work / "base.safetensors")["generated"]])
    some = train[digits.halves()[half]]
    network = digits.trained(some, digits.STEPS // 2, seed=1000 * (seed + 1) + half)
    values = digits.measured(network, queries).contiguous()
    NETWORKS.write(path, {"values": values}, {})
    return time.perf_counter() - start


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    base(options.work)
    jobs = [(options.work, half, s) for s in range(digits.SEEDS) for half in range(digits.HALVES)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, seconds in enumerate(pool.imap(retrain, jobs), start=1):
            print(f"{done}/{len(jobs)} networks, the latest took {seconds:.0f} s", flush=True)
    values = torch.stack(
        [
            torch.stack(
                [
                    load_file(options.work / f"half{half:03}_seed{seed}.safetensors")["values"]
                    for seed in range(digits.SEEDS)
                ]
            )
            for half in range(digits.HALVES)
        ]
    )
    header = {"machine": machine(), "seconds": round(time.perf_counter() - start)}
    header |= {"steps": digits.STEPS, "measurements": digits.MEASUREMENTS}
    tensors = {**base(options.work), "values": values, "halves": digits.halves()}
    NETWORKS.write(RESULT, tensors, header)
    print(f"Wrote {RESULT}: values {tuple(values.shape)}")


if __name__ == "__main__":
    main()
