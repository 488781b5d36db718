"""Does unlearning a query in many bounded steps predict retraining better than one step does?

The query's loss is raised in a copy of the network, and the score of a training image is how much
its own loss rises. Every method sees the same draws of the training images, before and after:

- *derivative*: influence with EK-FAC;
- *one finite step*, for the query and against it, along EK-FAC's direction (Wang et al., 2024);
- *EK-FAC steps*: several of these, each with the gradient where it starts;
- *Adam steps*: the training loss minus a part of the query's, each draw of which counts up to the
  loss of an untrained network, until the mean is near it (Serrà et al., 2026, MUCS, with all
  parameters and noise levels). Their score is the mean over draws of ``(b − a) / (b + a)`` for the
  loss ``a`` before and ``b`` after, *relative*.

One file for each query in a work folder, so that a run that was killed goes on.

Legend: N training images, Q queries, R draws, P parameters.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.lds.evaluate import PREDICTED, difference, judged, predicted, setting_of, summary
from benchmarks.lds.methods import DAMPINGS, Setting
from benchmarks.lds.problems import LEARNING_RATE, MEASURED_SEED, PROBLEMS
from benchmarks.lds.retrain import FOLDER, is_kept
from benchmarks.measure import arguments, report
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.diffusion.batch import NoisedBatch
from curvlinops_diffusion.linalg.upstream import PyTorchLinearOperator
from curvlinops_diffusion.runtime.digests import digest_of

DERIVATIVE = "derivative"
DRAWS = 8  # of each training image
STEP = 1e-2  # of EK-FAC, as a part of the parameters' norm
STEPS = (1, 4, 16)  # after which training losses are measured
MOST_STEPS = 256
# of Adam, as in the authors' code
RATE, PART, TOLERANCE, BATCH = LEARNING_RATE / 10, 0.2, 0.05, 32
WITHOUT_ZERO = 1e-3  # in the relative difference

Stage = tuple[str, nn.Module]


@dataclass(frozen=True)
class Draws:
    """Fixed draws of a problem's images, or of some, of which any network's losses are computed."""

    regression: NoisedRegression
    only: Sequence[int] | None = None

    @cached_property
    def batches(self) -> list[NoisedBatch]:
        """The noised images."""
        found: list[NoisedBatch] = []
        for clean in self.regression.clean_batches():
            places = [i for i, n in enumerate(clean.indices) if self.only is None or n in self.only]
            if places:
                found.extend(self.regression.noised_batches(clean.select(places)))
        return found

    @torch.no_grad()
    def losses(self, network: nn.Module) -> Tensor:
        """The loss of each image and draw, ``[N, R]``."""
        objective = DenoisingObjective(network, DDPMScheduler())
        found_NR = torch.zeros(self.regression.num_data, self.regression.num_draws)
        for batch in self.batches:
            losses_B = batch.loss(objective.predict(batch))
            found_NR[list(batch.indices), list(batch.draw_numbers)] = losses_B.float()
        return found_NR

    def capped(self, network: nn.Module, cap: float) -> Tensor:
        """The mean loss, each draw's up to a cap, with its graph."""
        objective = DenoisingObjective(network, DDPMScheduler())
        batch = NoisedBatch.joined(self.batches)
        return batch.loss(objective.predict(batch)).clamp(max=cap).mean()


def scores_between(before_NR: Tensor, after_NR: Tensor) -> dict[str, Tensor]:
    """The rise of the losses ``[N]``, and their relative difference draw by draw."""
    rise_NR = after_NR - before_NR
    relative_NR = rise_NR / (after_NR + before_NR + WITHOUT_ZERO)
    return {"": rise_NR.mean(1), ", relative": relative_NR.mean(1)}


# ---------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def move(network: nn.Module, step_P: Tensor) -> None:
    """Add a vector to the parameters."""
    params = list(network.parameters())
    for p, piece in zip(params, step_P.split([p.numel() for p in params]), strict=True):
        p += piece.reshape(p.shape)


def ekfac_steps(
    network: nn.Module, query: Draws, inverse: PyTorchLinearOperator, cap: float
) -> Iterator[Stage]:
    """Raise the query's loss along EK-FAC's direction, a fixed length at a time."""
    norm = torch.cat([p.detach().flatten() for p in network.parameters()]).norm()
    for step in range(1, max(STEPS) + 1):
        loss = query.capped(network, cap)
        if float(loss.detach()) < (1 - TOLERANCE) * cap:
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            direction_P = inverse @ torch.cat([g.flatten() for g in gradients])
            move(network, STEP * norm / direction_P.norm() * direction_P)
        if step in STEPS:
            yield f"EK-FAC steps, {step}", network


def adam_steps(
    problem: Any, network: nn.Module, x0: Tensor, train_x0: Tensor, cap: float
) -> Iterator[Stage]:
    """Raise the query's loss to a cap, and lower the training loss, each step with other draws."""
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)

    def losses_of(batch: Tensor) -> Tensor:
        noise = torch.randn_like(batch)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(batch),))
        found = network(scheduler.add_noise(batch, noise, t), t).sample
        return (found - noise).square().flatten(1).mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(MEASURED_SEED)
        for step in range(1, MOST_STEPS + 1):
            kept = train_x0[torch.randint(len(train_x0), (BATCH,))]
            unlearned = losses_of(x0.expand(BATCH, *x0.shape)).clamp(max=cap).mean()
            if float(unlearned.detach()) >= (1 - TOLERANCE) * cap:
                break
            optimizer.zero_grad()
            (losses_of(kept).mean() - PART * unlearned).backward()
            optimizer.step()
            if step in STEPS:
                yield f"Adam steps, {step}", network
    yield "Adam steps, to the end", network


# ---------------------------------------------------------------------------------------------
# A query
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unlearning:
    """What all queries share.

    Attributes:
        setting: The trained network.
        train: Draws of the training images.
        inverse: EK-FAC's.
        cap: The mean loss of an untrained network.
    """

    setting: Setting
    train: Draws
    inverse: PyTorchLinearOperator
    cap: float

    @cached_property
    def before_NR(self) -> Tensor:
        """The training losses of the trained network."""
        return self.train.losses(self._network())

    def _network(self) -> nn.Module:
        return self.setting.problem.loaded(self.setting.weights)

    def scores(self, q: int) -> dict[str, Tensor]:
        """The scores of a query ``[N]``, with the seconds of each method under ``seconds/…``."""
        setting, start = self.setting, time.perf_counter()
        x0 = setting.query_data[q]
        query = Draws(setting.queries[0].regression, [q])
        network = self._network()
        norm = torch.cat([p.detach().flatten() for p in network.parameters()]).norm()
        loss = query.capped(network, torch.inf)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        direction_P = self.inverse @ torch.cat([g.flatten() for g in gradients])
        direction_P *= STEP * norm / direction_P.norm()
        sides = []
        for sign in (1, -1):
            moved = deepcopy(network)
            move(moved, sign * direction_P)
            sides.append(self.train.losses(moved))
        found = {"one finite step": (sides[0] - sides[1]).mean(1) / 2}
        found["seconds/one finite step"] = torch.tensor(time.perf_counter() - start)
        for stages in (
            ekfac_steps(deepcopy(network), query, self.inverse, self.cap),
            adam_steps(setting.problem, network, x0, setting.train_data, self.cap),
        ):
            spent, start = 0.0, time.perf_counter()
            for label, unlearned in stages:
                spent += time.perf_counter() - start
                start = time.perf_counter()
                after = scores_between(self.before_NR, self.train.losses(unlearned))
                found |= {f"{label}{kind}": scores for kind, scores in after.items()}
                own = spent + time.perf_counter() - start
                found[f"seconds/{label}"] = torch.tensor(own)
                with torch.no_grad():
                    found[f"loss/{label}"] = query.capped(unlearned, torch.inf)
                start = time.perf_counter()
        return found


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of its result")
    parser.add_argument("--queries", type=int, default=16, help="of each kind")
    parser.add_argument("--resamples", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    problem = PROBLEMS[options.problem]
    work = options.work / problem.name / "unlearned"
    work.mkdir(parents=True, exist_ok=True)
    setting, (_, tensors) = setting_of(problem, options.retrained, DRAWS)
    train = Draws(setting.train(antithetic=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cap = float(train.losses(problem.make_network().eval()).mean())
    inverse = setting.curvature().inverse(DAMPINGS[0])
    unlearning = Unlearning(setting, train, inverse, cap)
    Q = problem.num_queries
    wanted = [*range(options.queries), *range(Q, Q + options.queries)]
    numbers = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, int | float)}
    of = digest_of(setting.weights, setting.generated, {**numbers, "STEPS": STEPS})
    by_query = []
    for q in wanted:
        path = work / f"query{q:03}.safetensors"
        if not is_kept(PREDICTED, path, of=of):
            PREDICTED.write(path, unlearning.scores(q), {"of": of})
        by_query.append(PREDICTED.read(path)[1])
        print(f"query {q} done, {len(by_query)} of {len(wanted)}", flush=True)
    J_query = setting.queries[0].rows(wanted)
    # whole gradients of the same draws
    derivative_QN = (setting.J_train.rows() @ (inverse @ J_query.T)).T
    rows = list(compared(by_query, derivative_QN, tensors, wanted, options.resamples))
    result = {"draws": DRAWS, "cap": round(cap, 4), "queries": options.queries, "unlearned": rows}
    report(options, f"unlearned_{problem.name}", __doc__, result)


def compared(
    by_query: Sequence[dict[str, Tensor]],
    derivative_QN: Tensor,
    tensors: dict[str, Tensor],
    wanted: Sequence[int],
    resamples: int,
) -> Iterator[dict[str, Any]]:
    """Linear data-modelling scores of the loss, and differences to the derivative's."""
    half = len(wanted) // 2
    halves, measured_SHQ = tensors["halves"], tensors["values"].double()[:, :, 0].transpose(0, 1)
    methods = [name for name in by_query[0] if "/" not in name]
    scores = {DERIVATIVE: derivative_QN}
    for name in methods:
        if all(name in found for found in by_query):
            scores[name] = torch.stack([found[name] for found in by_query])
    reference: dict[str, Any] = {}
    for name, scores_QN in scores.items():
        row: dict[str, Any] = {"method": name}
        for kind, own in (("held-out", slice(0, half)), ("generated", slice(half, None))):
            measured = measured_SHQ[..., list(wanted)[own]]
            found = judged(predicted(scores_QN[own], halves), measured, resamples)
            reference.setdefault(kind, found)
            row[kind] = summary(found)
            if name != DERIVATIVE:
                row[kind]["minus_derivative"] = difference(found, reference[kind])
        for value in ("seconds", "loss"):
            key = f"{value}/{name.removesuffix(', relative')}"
            if key in by_query[0]:
                row[value] = round(float(torch.stack([f[key] for f in by_query]).mean()), 4)
        yield row


if __name__ == "__main__":
    main()
