"""Which attribution method predicts retraining best? Linear data-modelling scores.

From the retrained networks in ``benchmarks/lds/digits.safetensors`` (or another problem's), made by
``benchmarks.lds.retrain``. What each method predicts is kept in a work folder, so that a run that
was killed goes on; and the ranks of what the tables show beside the result, so that ``--again``
computes its intervals anew in a minute.

Legend: N training images, Q queries, M measurements, H halves, S seeds.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.lds import methods
from benchmarks.lds.adapters import PROBLEMS
from benchmarks.lds.methods import METHODS, Scores, Setting, methods_for
from benchmarks.lds.problems import LATE, MEASUREMENTS, Problem
from benchmarks.lds.retrain import (
    NETWORKS,
    arguments_of_retrained,
    is_kept,
    networks_done,
    result,
    weights_under,
)
from benchmarks.measure import date, report, version_of
from curvlinops_diffusion.runtime.digests import digest_of
from curvlinops_diffusion.runtime.files import FileKind
from curvlinops_diffusion.validation import LinearDatamodellingScore, linear_datamodelling_score

PREDICTED = FileKind("predicted", "predictions of a method", "Remove it.")
# kept for longer than the package's format
RANKS = FileKind("ranks", "ranks of predictions", "Evaluate all methods.", None)
DEFAULT = "1e-08"
# differences to it are reported, with intervals of their own
REFERENCE = "EK-FAC"
AVERAGED = ("EK-FAC",)

# ---------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------


def key_of(setting: float | str) -> str:
    """The name of a method's setting in results."""
    return f"{setting:.0e}" if isinstance(setting, float) else setting


def predicted(scores_QN: Tensor, halves_HN: Tensor) -> Tensor:
    """Predict networks trained on halves: sums of scores over what was left out, ``[Q, H]``."""
    return scores_QN.double() @ (~halves_HN).double().T


def predictions(
    name: str, scores: Callable[[], Scores], halves: Tensor, work: Path, of: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A method's predictions of each half, ``[M, Q, H]`` by setting; with date and seconds.

    Kept in the work folder, with a digest ``of`` what they depend on: the networks, the numbers of
    the problem and of the methods, and the method's own function. It knows nothing of the functions
    that this one calls: remove the work folder when they have changed.
    """
    path = work / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.safetensors"
    if not is_kept(PREDICTED, path, of=of):
        start = time.perf_counter()
        found = {
            key_of(setting): torch.stack([predicted(one_QN, halves) for one_QN in scores_MQN])
            for setting, scores_MQN in scores()
        }
        seconds = round(time.perf_counter() - start, 1)
        made = {"seconds": seconds, "date": date(), "torch": version_of("torch")}
        PREDICTED.write(path, found, {**made, "of": of})
        print(name, "done", flush=True)
    return PREDICTED.read(path)


def numbers_of(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers that predictions depend on: of the problem, and constants of the methods."""
    return (
        {key: value for key, value in vars(problem).items() if isinstance(value, int | tuple)},
        {
            key: value
            for key, value in vars(methods).items()
            if key.isupper() and key not in ("METHODS", "OF_ADAPTERS", "OF_PIXELS")
        },
    )


def dependencies(setting: Setting, halves: Tensor, run: Any) -> str:
    """A digest of what a method's predictions depend on."""
    networks = digest_of(setting.weights, setting.generated, halves)
    return digest_of(networks, *numbers_of(setting.problem), run)


def setting_of(
    problem: Problem, folder: Path, draws: int = 64
) -> tuple[Setting, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The network trained on all images, and the header and tensors of the retrained ones."""
    path = result(problem, folder)
    header, tensors = NETWORKS.read(path)
    # files that were kept before the problem's description was say nothing of it
    if header.get("problem", problem.description) != problem.description:
        raise ValueError(
            f"{path} holds networks of another problem than {problem.name} is now. Retrain them by "
            "benchmarks.lds.retrain, or give --retrained another folder."
        )
    done_HS = networks_done(tensors)
    if not done_HS.all():
        raise ValueError(
            f"{path} holds {int(done_HS.sum())} of {done_HS.numel()} retrained networks. Go on by "
            f"`python -m benchmarks.lds.retrain --problem {problem.name}`."
        )
    weights = weights_under("weights/", tensors)
    return Setting(problem, weights, tensors["generated"], draws), (header, tensors)


def averaged(run: Callable[[Setting], Scores], settings: Sequence[Setting]) -> Scores:
    """Scores averaged over networks."""
    totals: dict[float | str, Tensor] = {}
    for setting in settings:
        for damping, scores in run(setting):
            totals[damping] = totals.get(damping, torch.zeros_like(scores)) + scores
    yield from ((damping, total / len(settings)) for damping, total in totals.items())


def other_networks(first: Setting, tensors: Mapping[str, Tensor]) -> dict[str, list[Setting]]:
    """Networks over which scores are averaged: late checkpoints, and a second training if any."""

    def setting(prefix: str) -> Setting:
        return replace(first, weights=weights_under(prefix, tensors))

    found = {"late checkpoints": [*(setting(f"late/{fraction}/") for fraction in LATE), first]}
    second = setting("second/")
    if second.weights:
        found |= {"second training": [second], "two trainings": [first, second]}
    return found


# ---------------------------------------------------------------------------------------------
# Judgements
# ---------------------------------------------------------------------------------------------


def judged(predicted_QH: Tensor, measured_SHQ: Tensor, resamples: int) -> LinearDatamodellingScore:
    """The score of predictions: those of a plan whose parts leave out one thing each, a half."""
    one_each_HH = torch.eye(predicted_QH.shape[1], dtype=torch.bool)
    return linear_datamodelling_score(predicted_QH, one_each_HH, measured_SHQ, bootstrap=resamples)


def summary(found: LinearDatamodellingScore) -> dict[str, float]:
    """The mean over queries, and its interval."""
    return {"lds": round(found.mean, 4), **_rounded(found.interval)}


def difference(
    found: LinearDatamodellingScore, reference: LinearDatamodellingScore
) -> dict[str, float]:
    """How much better than a reference, over the same halves and queries."""
    value, interval = found.minus(reference)
    return {"difference": round(value, 4), **_rounded(interval)}


def _rounded(interval: tuple[float, float]) -> dict[str, float]:
    low, high = interval
    return {"low": round(low, 4), "high": round(high, 4)}


def doubled_ranks(predicted_QH: Tensor) -> Tensor:
    """Twice the mean ranks of up to 64 predictions from zero, which are whole numbers."""
    return torch.from_numpy(2 * rankdata(predicted_QH.numpy(), axis=1) - 2).to(torch.int8)


def with_intervals(
    rows: Sequence[dict[str, Any]],
    ranks: dict[str, Tensor],
    measured: dict[str, Tensor],
    resamples: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with score, interval and difference to the reference; agreements and ceilings.

    Args:
        rows: A method and a cell each.
        ranks: Those of the predictions, ``[Q, H]``, by ``method/cell``.
        measured: Of each cell, ``[S, H, Q]``.
        resamples: For the intervals.
    """
    scores = {
        key: judged(z.double(), measured[key.split("/")[1]], resamples) for key, z in ranks.items()
    }
    found: list[dict[str, Any]] = []
    limits: dict[str, Any] = {"agreement_of_seeds": {}, "ceilings": {}}
    for row in rows:
        cell = row["cell"]
        own, reference = scores[f"{row['method']}/{cell}"], scores.get(f"{REFERENCE}/{cell}")
        against = {} if reference is None else {"minus_ekfac": difference(own, reference)}
        found.append({**row, **summary(own), **against})
        for name, value in (("agreement_of_seeds", own.agreement), ("ceilings", own.ceiling)):
            limits[name][cell] = None if value is None else round(value, 4)
    return found, limits


def nearest_images(setting: Setting) -> dict[str, float]:
    """How near queries are to the nearest training image in pixels, the median of each kind.

    In units of the median distance of two training images.
    """
    train_NF, query_QF = (z.flatten(1).double() for z in setting.problem.pixels(setting.generated))
    between = torch.pdist(train_NF).median()
    nearest_Q = torch.cdist(query_QF, train_NF).amin(1) / between
    halves = nearest_Q.split(setting.problem.num_queries)
    kinds = zip(("held-out", "generated"), halves, strict=True)
    return {kind: round(float(own.median()), 3) for kind, own in kinds}


def main() -> None:
    """Run the program."""
    parser = arguments_of_retrained(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument(
        "--methods", nargs="*", help="only these; the others of an earlier result are kept"
    )
    parser.add_argument(
        "--again", action="store_true", help="none: intervals anew, of an earlier result"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    problem = PROBLEMS[options.problem]
    work = options.work / problem.name / f"evaluated-{options.draws}"
    work.mkdir(parents=True, exist_ok=True)
    setting, (header, tensors) = setting_of(problem, options.retrained, options.draws)
    halves, values = tensors["halves"], tensors["values"].double()  # [H, N], [H, S, M, Q]
    Q = problem.num_queries
    cells = {
        f"{measurement}, {kind}": (m, own)
        for m, measurement in enumerate(MEASUREMENTS)
        for kind, own in (("held-out", slice(0, Q)), ("generated", slice(Q, None)))
    }
    measured = {cell: values[:, :, m, own].transpose(0, 1) for cell, (m, own) in cells.items()}
    runs = {name: (partial(run, setting), run) for name, run in methods_for(problem).items()}
    for name, (label, settings) in itertools.product(
        AVERAGED, other_networks(setting, tensors).items()
    ):
        runs[f"{name}, {label}"] = partial(averaged, METHODS[name], settings), METHODS[name]
    wanted = [] if options.again else options.methods or list(runs)
    rows: list[dict[str, Any]] = []
    ranks: dict[str, Tensor] = {}
    for name in wanted:
        scores, run = runs[name]
        of = dependencies(setting, halves, run)
        made, found = predictions(name, scores, halves, work, of)
        for cell, (m, own) in cells.items():
            by_setting = {key: z[m, own] for key, z in found.items()}
            if next(iter(by_setting.values())).isnan().any():
                continue  # a method for other queries
            each = {key: judged(z, measured[cell], 1).mean for key, z in by_setting.items()}
            default = DEFAULT in each
            shown = DEFAULT if default else max(each, key=each.__getitem__)
            row: dict[str, Any] = {"method": name, "cell": cell}
            row |= {key: made[key] for key in ("seconds", "date", "torch")}
            row["by_setting"] = {key: round(value, 4) for key, value in each.items()}
            row |= {"setting": shown, "chosen_by_result": not default and len(each) > 1}
            rows.append(row)
            ranks[f"{name}/{cell}"] = doubled_ranks(by_setting[shown])
    settings = {"retrained": header, "draws": options.draws}
    name = f"lds_{problem.name}"
    beside = options.output / f"{name}_ranks.safetensors"
    if options.methods or options.again:
        kept = earlier(options.output / f"{name}_{options.device}.json", beside, settings, wanted)
        rows, ranks = kept[0] + rows, kept[1] | ranks
    order = {name: place for place, name in enumerate(runs)}
    rows.sort(key=lambda row: order.get(row["method"], len(order)))  # those that are no more last
    rows, limits = with_intervals(rows, ranks, measured, options.resamples)
    settings |= {"resamples": options.resamples, **limits}
    settings |= {"nearest_training_image": nearest_images(setting)}
    options.output.mkdir(parents=True, exist_ok=True)
    RANKS.write(beside, ranks, settings["retrained"])
    report(options, name, __doc__, {**settings, "methods": rows})


def earlier(
    path: Path, beside: Path, settings: dict[str, Any], but: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The rows and ranks of an earlier result with the same settings, but for some methods.

    Raises:
        ValueError: If the settings are others.
    """
    if not path.exists():
        return [], {}
    found = json.loads(path.read_text())
    differing = sorted(key for key, value in settings.items() if found.get(key) != value)
    if differing:
        raise ValueError(
            f"{path} has other {', '.join(differing)}. Evaluate all methods, or give --output "
            "another folder."
        )
    rows = [row for row in found["methods"] if row["method"] not in but]
    ranks = RANKS.read(beside)[1]
    return rows, {key: z for key, z in ranks.items() if key.split("/")[0] not in but}


if __name__ == "__main__":
    main()
