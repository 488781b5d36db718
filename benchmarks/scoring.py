"""What do scores cost for each image and draw, as multiples of a training pass over the same?

Eight queries, 500 samples (images times draws). The paper's loop is written plainly: one image at a
time, 125 random draws a pass, two passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import arguments, in_training_passes, report
from benchmarks.problems import random_regression
from curvlinops_diffusion import DenoisingObjective, ExampleGradientLinearOperator, NoisedRegression

QUERIES = 8


def training_pass(regression: NoisedRegression) -> None:
    """Forward and backward with all weight gradients, in batches of the data."""
    params = list(regression.objective.model.parameters())
    for batch in regression.batches():
        loss = batch.loss(regression.objective.predict(batch)).mean()
        torch.autograd.grad(loss, params)


def our_scores(regression: NoisedRegression, queries_PQ: Tensor) -> list[Tensor]:
    """Rows of gradients, times the queries'."""
    J = ExampleGradientLinearOperator(regression)
    return [rows_BP @ queries_PQ for _, rows_BP in J.row_batches()]


def papers_loop(
    objective: DenoisingObjective, images: Tensor, queries_PQ: Tensor, draws: int
) -> list[Tensor]:
    """One image at a time, its draws in two passes, then a product with the queries."""
    model: nn.Module = objective.model
    params, process = list(model.parameters()), objective.process
    scores = []
    for x0 in images:
        total: list[Tensor] = []
        for count in (draws // 2, draws - draws // 2):
            x = x0.expand(count, *x0.shape)
            eps = torch.randn_like(x)
            level = torch.randint(process.num_levels, (count,))
            output = model(process.noised(x, eps, level), level.to(x.device)).sample
            gradients = torch.autograd.grad((output - eps).square().mean(), params)
            total = (
                [a + b for a, b in zip(total, gradients, strict=True)] if total else [*gradients]
            )
        scores.append(torch.cat([g.flatten() for g in total]) / 2 @ queries_PQ)
    return scores


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--kronfluence", action="store_true", help="its pairwise scores, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    samples, batch = (8, 4) if options.quick else (500, 32)
    objective = random_regression("unet", options.quick, options.device).objective
    config = objective.model.config
    size = (config.in_channels, config.sample_size, config.sample_size)
    torch.manual_seed(0)
    x0 = torch.randn(samples, *size)
    P = sum(p.numel() for p in objective.model.parameters())
    queries_PQ = torch.randn(P, QUERIES, device=objective.device)

    def problem(draws: int) -> NoisedRegression:
        return NoisedRegression(objective, x0[: samples // draws], draws, batch_size=batch)

    many = 2 if options.quick else 25
    papers = 4 if options.quick else 250
    passes: dict[str, Callable[[], object]] = {
        "training pass": lambda: training_pass(problem(1)),
        f"{samples // many} images, {many} draws": lambda: our_scores(problem(many), queries_PQ),
        f"{samples} images, 1 draw": lambda: our_scores(problem(1), queries_PQ),
        f"the paper's loop: {samples // papers} images, {papers} draws": lambda: papers_loop(
            objective, x0[: samples // papers].to(objective.device), queries_PQ, papers
        ),
    }
    if options.kronfluence:
        from benchmarks.kronfluence_passes import kronfluence_scores

        passes[f"kronfluence's pairwise scores: {samples} images, 1 draw"] = kronfluence_scores(
            problem(1), NoisedRegression(objective, x0[:QUERIES], 1), batch
        )
    result = in_training_passes(passes, options)
    report(options, "scoring", __doc__, {"parameters": P, "samples": samples} | result)


if __name__ == "__main__":
    main()
