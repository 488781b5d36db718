"""Why gradients of the loss say little where they do: retraining against the training's length.

Networks are trained on random halves of 200 patches of photographs, and averages of their weights
kept after 40 to 1,280 passes over the images (Karras et al., 2024: over a window that grows with
the training, so that every length has its own end). At each length a half's losses are compared
with those of the network that was trained on all images for as many passes. A loss changes by a
part that is linear in the change of the prediction, and by its square,

    ‖ŷ_H - y‖² - ‖ŷ - y‖² = 2⟨ŷ - y, ŷ_H - ŷ⟩ + ‖ŷ_H - ŷ‖²,

and its gradient knows of the first only. Writes ``benchmarks/lds/lengths.safetensors``.

Legend: H halves, S seeds, Q queries, L lengths, M what is measured.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from benchmarks.lds.problems import MEASURED_SEED, PROBLEMS, SEEDS
from benchmarks.lds.retrain import FOLDER, NETWORKS, is_kept, result, run_all, weights_under
from benchmarks.measure import machine
from curvlinops_diffusion import DenoisingObjective, NoisedRegression

PROBLEM = PROBLEMS["lengths"]
FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the training
PARTS = ("loss", "linear", "squared")
EXPONENT = 7.94  # of the averages: a tenth of the training


def averages(x0: Tensor, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Averaged weights of one training at every length."""
    kept: list[dict[str, Tensor]] = []
    marks = [round(fraction * steps) for fraction in FRACTIONS]
    averaged: AveragedModel | None = None

    def average(old: Sequence[Tensor], new: Sequence[Tensor], number: Tensor | int) -> None:
        weight = 1 - (1 - 1 / (float(number) + 1)) ** (EXPONENT + 1)
        for mean, weights in zip(old, new, strict=True):
            mean.lerp_(weights, weight)

    def keep(step: int, network: UNet2DModel) -> None:
        nonlocal averaged
        if averaged is None:
            averaged = AveragedModel(network, multi_avg_fn=average)
        averaged.update_parameters(network)
        if step in marks:
            kept.append({k: v.clone() for k, v in averaged.module.state_dict().items()})

    network = PROBLEM.trained(x0, steps, seed, keep)
    keep(steps, network)
    return kept


def measured(weights: dict[str, Tensor], reference: dict[str, Tensor], queries: Tensor) -> Tensor:
    """The parts by which the queries' losses differ from a reference's, ``[M, Q]``.

    On draws that all networks share.
    """
    network, base = (PROBLEM.loaded(w) for w in (weights, reference))
    objective, before = (DenoisingObjective(n, DDPMScheduler()) for n in (network, base))
    regression = NoisedRegression(
        objective, queries, PROBLEM.measured_draws, MEASURED_SEED, batch_size=len(queries)
    )
    total_MQ = torch.zeros(len(PARTS), len(queries))
    (clean,) = regression.clean_batches()
    with torch.no_grad():
        for batch in regression.noised_batches(clean):
            before_BD = before.predict(batch)
            after_BD = objective.predict(batch)
            loss_Q = batch.loss(after_BD)
            squared_Q = replace(batch, target_BD=before_BD).loss(after_BD)
            linear_Q = loss_Q - batch.loss(before_BD) - squared_Q
            total_MQ += torch.stack([loss_Q, linear_Q, squared_Q])
    return total_MQ / PROBLEM.measured_draws


def at_lengths(averages: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights at every length under names of their own."""
    return {
        f"weights/{place}/{name}": weight.contiguous()
        for place, weights in enumerate(averages)
        for name, weight in weights.items()
    }


def weights_at(tensors: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    """The weights of one length."""
    return weights_under(f"weights/{place}/", tensors)


def base(work: Path) -> dict[str, Tensor]:
    """The network trained on all images, at every length."""
    path = work / "base.safetensors"
    if not is_kept(NETWORKS, path, problem=PROBLEM.description):
        kept = averages(PROBLEM.data()[0], PROBLEM.steps, 100)
        NETWORKS.write(path, at_lengths(kept), {"problem": PROBLEM.description})
    return load_file(path)


def retrain(job: tuple[Path, int, int]) -> float:
    """Train a network on a half, and measure it; nothing if that was done before."""
    work, half, seed = job
    path = work / f"half{half:03}_seed{seed}.safetensors"
    if is_kept(NETWORKS, path, problem=PROBLEM.description):
        return 0.0
    start = time.perf_counter()
    torch.set_num_threads(1)
    train, held_out = PROBLEM.data()
    some = train[PROBLEM.halves()[half]]
    kept = averages(some, PROBLEM.steps // 2, 1000 * (seed + 1) + half)
    tensors = base(work)
    references = [weights_at(tensors, place) for place in range(len(FRACTIONS))]
    pairs = zip(kept, references, strict=True)
    values_LMQ = torch.stack([measured(*pair, held_out) for pair in pairs])
    seconds = time.perf_counter() - start
    header = {"seconds": seconds, "problem": PROBLEM.description}
    NETWORKS.write(path, {"values": values_LMQ}, header)
    return seconds


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = options.work / PROBLEM.name
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tensors = base(work)
    halves = range(PROBLEM.num_halves)
    jobs = [(work, half, seed) for seed in range(SEEDS) for half in halves]
    run_all(retrain, jobs, options.processes)
    values = [
        load_file(work / f"half{half:03}_seed{seed}.safetensors")["values"]
        for _, half, seed in jobs
    ]
    values_SHLMQ = torch.stack(values).unflatten(0, (SEEDS, len(halves)))
    header = {
        "machine": machine(),
        "problem": PROBLEM.description,
        "steps": PROBLEM.steps,
        "batch": PROBLEM.batch,
        "fractions": FRACTIONS,
        "parts": PARTS,
        "measured_draws": PROBLEM.measured_draws,
    }
    path = result(PROBLEM, options.output)
    half_precision = {name: tensor.half() for name, tensor in tensors.items()}
    kept = {**half_precision, "values": values_SHLMQ, "halves": PROBLEM.halves()}
    NETWORKS.write(path, kept, header)
    print(f"Wrote {path}: values {tuple(values_SHLMQ.shape)}")


if __name__ == "__main__":
    main()
