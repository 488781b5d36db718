"""What do smaller forms of stored gradients cost in scores and ranks?

EK-FAC scores of 512 digits on 16 queries at the default damping; errors against float32.
"""

from __future__ import annotations

import tempfile
import time
import warnings

from torch import Tensor

from benchmarks.accuracy import DigitsProblem
from benchmarks.measure import arguments, report
from curvlinops_diffusion import (
    Compression,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    NoisedRegression,
)
from curvlinops_diffusion.influence.agreement import rank_correlations

DAMPING = 1e-8


def forms(P: int, N: int) -> list[Compression]:
    """The compared forms."""
    plain = [Compression(precision) for precision in ("float32", "bfloat16", "int8", "nf4")]
    svd = [Compression("bfloat16", "svd", size, N) for size in (N // 2, N // 4, N // 16)]
    random = [Compression("bfloat16", "random", size) for size in (P // 4, P // 16, P // 64)]
    return [*plain, *svd, *random, Compression("int8", "svd", N // 4, N)]


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    problem = DigitsProblem.of(options)
    N, Q, draws = (16, 2, 2) if options.quick else (512, 16, 8)
    EK = DiffusionEKFACLinearOperator(problem.regression(draws, 0))
    train = NoisedRegression(problem.objective, problem.all_x0[:N], draws, 1, batch_size=64)
    J_train = ExampleGradientLinearOperator(train)
    query = NoisedRegression(problem.objective, problem.all_x0[-Q:], 8 * draws, 2, batch_size=Q)
    J_query = ExampleGradientLinearOperator(query)
    truth, table = None, []
    for compression in forms(EK.shape[0], N):
        with tempfile.TemporaryDirectory() as folder:
            store = GradientStore.create(folder, J_train, EK, DAMPING, compression)
            start = time.perf_counter()
            for _ in store.rows():
                pass
            seconds = time.perf_counter() - start
            scores = store.scores(J_query, EK).double()
            size = store.bytes_per_example
        truth = scores if truth is None else truth
        table.append(
            {
                "form": _name(compression),
                "bytes_for_each_example": round(size),
                "error_of_scores": round(float((scores - truth).norm() / truth.norm()), 4),
                "rank_correlation": round(float(rank_correlations(scores, truth).mean()), 4),
                "top_10_found": _shared(_top(scores), _top(truth)),
                "milliseconds_to_read_1000": round(1e6 * seconds / N, 1),
            }
        )
    found = {"parameters": EK.shape[0], "forms": table}
    report(options, "stored_gradients", __doc__, found)


def _name(compression: Compression) -> str:
    settings = compression.as_dict()
    kept = f", {settings['projection']} {settings['size']:,}" if settings["size"] else ""
    return settings["precision"] + kept


def _top(scores_QN: Tensor) -> Tensor:
    """The examples with the ten largest scores, ``[Q, 10]``."""
    return scores_QN.topk(min(10, scores_QN.shape[1]), 1).indices


def _shared(found: Tensor, truth: Tensor) -> float:
    """The share of the true ones that were found."""
    pairs = zip(found.tolist(), truth.tolist(), strict=True)
    return round(sum(len({*a} & {*b}) for a, b in pairs) / truth.numel(), 3)


if __name__ == "__main__":
    main()
