"""Which attribution method predicts retraining best? Linear data-modelling scores on digits.

From the retrained networks in ``benchmarks/lds/retrained.safetensors`` (made by
``benchmarks.lds.retrain``). Each method is shown at every damping of a grid. Baselines may take
their best one; ours is the default, 1e-8.

Legend: P parameters, N training digits, Q queries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.lds import digits, score
from benchmarks.lds.retrain import NETWORKS, RESULT
from benchmarks.measure import arguments, report
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

DAMPINGS = tuple(10.0**e for e in range(-8, 1))
# in units of the mean eigenvalue of the kernel
KERNEL_DAMPINGS = tuple(10.0**e for e in range(-6, 3))


class Problem:
    """Gradients of training digits and queries, in memory.

    Args:
        draws: Draws of each training digit.
        timesteps: How they are drawn.
        names: Parameters; ``None`` for all.
    """

    def __init__(self, draws: int, timesteps: str = "stratified", names: list[str] | None = None):
        _, tensors = NETWORKS.read(RESULT)
        weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
        network = digits.loaded(weights)
        self.objective = DenoisingObjective(network, DDPMScheduler())
        self.train_x0, held_out = digits.data()
        self.query_x0 = torch.cat([held_out, tensors["generated"]])
        self.names = names
        self.train = NoisedRegression(
            self.objective, self.train_x0, draws, 0, batch_size=128, timesteps=timesteps
        )

    def train_rows(self, measurement: str = "loss") -> Tensor:
        """Gradients of the training digits, ``[N, P]``."""
        J = ExampleGradientLinearOperator(self.train, self.names, measurement=measurement)
        return J.rows()

    def query_rows(self, measurement: str) -> Tensor:
        """Gradients of the queries, on the draws that retrained networks are measured on."""
        regression = NoisedRegression(
            self.objective,
            self.query_x0,
            digits.MEASURED_DRAWS,
            digits.MEASURED_SEED,
            batch_size=128,
        )
        return ExampleGradientLinearOperator(regression, self.names, measurement=measurement).rows()


def curved(
    curvature: DiffusionKFACLinearOperator, train_NP: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Preconditioned training gradients ``[P, N]`` at each damping."""
    for damping in DAMPINGS:
        yield f"{damping:.0e}", curvature.inverse(damping) @ train_NP.T


def kernel(train_NP: Tensor) -> Iterator[tuple[str, Tensor]]:
    """TRAK without projection, solved in the dual: ``Φᵀ (Φ Φᵀ + λ)⁻¹``, ``[P, N]``."""
    gram_NN = train_NP.double() @ train_NP.double().T
    mean = float(gram_NN.diagonal().mean())
    identity = torch.eye(len(gram_NN)).to(gram_NN)
    for damping in KERNEL_DAMPINGS:
        inverse_NN = torch.linalg.inv(gram_NN + damping * mean * identity)
        yield f"{damping:.0e} of the mean", train_NP.T @ inverse_NN.float()


def low_rank(
    curvature: DiffusionKFACLinearOperator, train_NP: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """The curvature plus ``1/N Σ ∇ℓ_n ∇ℓ_nᵀ``, inverted by Woodbury's formula."""
    N = len(train_NP)
    identity = torch.eye(N).double()
    for label, product_PN in curved(curvature, train_NP):
        inner_NN = (train_NP @ product_PN).double()
        inverse_NN = torch.linalg.inv(identity + (inner_NN + inner_NN.T) / (2 * N))
        yield label, product_PN @ inverse_NN.float()


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--draws", type=int, default=64)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    header, tensors = NETWORKS.read(RESULT)
    halves, values = tensors["halves"], tensors["values"]  # [H, N], [H, S, M, Q]
    table: list[dict[str, Any]] = []

    def note(
        method: str,
        weighted: Iterator[tuple[str, Tensor]],
        query_of: Callable[[str], Tensor],
    ) -> None:
        for label, product_PN in weighted:
            for m, measurement in enumerate(digits.MEASUREMENTS):
                predicted = score.predicted(query_of(measurement) @ product_PN, halves)
                measured = values[:, :, m].mean(1).T.double()
                for kind, own in (("held-out", slice(0, 64)), ("generated", slice(64, 128))):
                    found = score.summary(predicted[own], measured[own], 200)
                    row = {"method": method, "damping": label, "measurement": measurement}
                    rounded = {key: round(value, 4) for key, value in found.items()}
                    table.append(row | {"queries": kind} | rounded)
        print(method, "done", flush=True)

    problem = Problem(options.draws)
    train_NP = problem.train_rows()
    queries = {m: problem.query_rows(m) for m in digits.MEASUREMENTS}
    note("no curvature", iter([("", train_NP.T)]), queries.__getitem__)
    note("TRAK", kernel(train_NP), queries.__getitem__)
    squares_QP = problem.query_rows("squared_norm")
    note("D-TRAK", kernel(problem.train_rows("squared_norm")), lambda m: squares_QP)
    EK = DiffusionEKFACLinearOperator(problem.train)
    note("EK-FAC", curved(EK, train_NP), queries.__getitem__)
    note("EK-FAC + low rank", low_rank(EK, train_NP), queries.__getitem__)
    for approx in ("expand", "reduce"):
        K = DiffusionKFACLinearOperator(problem.train, kfac_approx=approx)
        note(f"K-FAC, {approx}", curved(K, train_NP), queries.__getitem__)
        if approx == "expand":
            note("K-FAC + low rank", low_rank(K, train_NP), queries.__getitem__)
    loss_ggn = DiffusionEKFACLinearOperator(problem.train, fisher_type="empirical")
    note("EK-FAC, GGN of the loss", curved(loss_ggn, train_NP), queries.__getitem__)
    paper = _papers_recipe(options.draws)
    note("EK-FAC, the paper's recipe", *paper)

    ceilings = {
        f"{measurement}, {kind}": round(
            score.ceiling(values[:, :, m].permute(1, 2, 0)[:, own].double()), 4
        )
        for m, measurement in enumerate(digits.MEASUREMENTS)
        for kind, own in (("held-out", slice(0, 64)), ("generated", slice(64, 128)))
    }
    result = {"retrained": header, "draws": options.draws, "ceilings": ceilings, "scores": table}
    report(options, "lds_digits", __doc__, result)


def _papers_recipe(draws: int) -> tuple[Iterator[tuple[str, Tensor]], Callable[[str], Tensor]]:
    """Uniform draws, and the parameters of linear layers and convolutions alone."""
    network = Problem(1).objective.model
    names = [
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for key, _ in module.named_parameters(recurse=False)
    ]
    problem = Problem(draws, "uniform", names)
    EK = DiffusionEKFACLinearOperator(problem.train, names, exact_bias=False)
    rows = {m: problem.query_rows(m) for m in digits.MEASUREMENTS}
    return curved(EK, problem.train_rows()), rows.__getitem__


if __name__ == "__main__":
    main()
