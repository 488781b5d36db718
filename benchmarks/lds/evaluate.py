"""Which attribution method predicts retraining best? Linear data-modelling scores.

From the retrained networks in ``benchmarks/lds/digits.safetensors`` (or ``photographs``), made by
``benchmarks.lds.retrain``. What each method predicts is kept in a work folder, so that a run that
was killed goes on.

Legend: N training images, Q queries, M measurements, H halves, S seeds.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lds import methods, score
from benchmarks.lds.methods import METHODS, Scores, Setting
from benchmarks.lds.problems import LATE, MEASUREMENTS, PROBLEMS, Problem
from benchmarks.lds.retrain import (
    FOLDER,
    NETWORKS,
    is_kept,
    networks_done,
    result,
    weights_under,
)
from benchmarks.measure import arguments, date, report, version_of
from curvlinops_diffusion.runtime.digests import digest_of
from curvlinops_diffusion.runtime.files import FileKind
from curvlinops_diffusion.validation import LinearDatamodellingScore

PREDICTED = FileKind("predicted", "predictions of a method", "Remove it.", None)
DEFAULT = "1e-08"
# differences to these are reported, with intervals of their own
REFERENCES = {"minus_reference": "EK-FAC, the paper's recipe", "minus_ekfac": "EK-FAC"}
AT_LATE_CHECKPOINTS = (
    "D-TRAK",
    "EK-FAC",
    "K-FAC, regression on loss and prediction",
)


def key_of(setting: float | str) -> str:
    """What a method's setting is called in results."""
    return f"{setting:.0e}" if isinstance(setting, float) else setting


def predictions(
    name: str, scores: Scores, halves: Tensor, work: Path, of: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a method predicts of each half, ``[M, Q, H]`` by setting; and when, in which seconds.

    Kept in the work folder, with a digest ``of`` what it is a prediction from: the networks, the
    numbers of the problem and of the methods, and the method's own function. Of the functions that
    it calls the digest says nothing: remove the work folder when they have changed.
    """
    path = work / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.safetensors"
    if not is_kept(PREDICTED, path, of=of):
        start = time.perf_counter()
        found = {
            key_of(setting): torch.stack(
                [score.predicted(one_QN, halves) for one_QN in scores_MQN]
            ).contiguous()
            for setting, scores_MQN in scores
        }
        seconds = round(time.perf_counter() - start, 1)
        made = {"seconds": seconds, "date": date(), "torch": version_of("torch")}
        PREDICTED.write(path, found, {**made, "of": of})
        print(name, "done", flush=True)
    return PREDICTED.read(path)


def numbers_of(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """What predictions depend on: the problem's numbers, and the constants of the methods."""
    return (
        {key: value for key, value in vars(problem).items() if isinstance(value, int | tuple)},
        {key: value for key, value in vars(methods).items() if key.isupper() and key != "METHODS"},
    )


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


def late_settings(last: Setting, tensors: dict[str, Tensor]) -> list[Setting]:
    """Checkpoints before the end of training, and the end."""
    settings = []
    for fraction in LATE:
        weights = weights_under(f"late/{fraction}/", tensors)
        settings.append(Setting(last.problem, weights, last.generated, last.draws))
    return [*settings, last]


def averaged(run: Callable[[Setting], Scores], settings: Sequence[Setting]) -> Scores:
    """Scores averaged over checkpoints."""
    totals: dict[float | str, Tensor] = {}
    for setting in settings:
        for damping, scores in run(setting):
            totals[damping] = totals.get(damping, torch.zeros_like(scores)) + scores
    yield from ((damping, total / len(settings)) for damping, total in totals.items())


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--problem", choices=PROBLEMS, default="digits")
    parser.add_argument("--work", type=Path, default=Path("lds-work"), help="work folder")
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of its result")
    parser.add_argument("--draws", type=int, default=64, help="draws of each training image")
    parser.add_argument(
        "--methods", nargs="*", help="only these; the others of an earlier result are kept"
    )
    parser.add_argument("--resamples", type=int, default=500)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    problem = PROBLEMS[options.problem]
    work = options.work / problem.name / f"evaluated-{options.draws}"
    work.mkdir(parents=True, exist_ok=True)
    setting, (header, tensors) = setting_of(problem, options.retrained, options.draws)
    halves, values = tensors["halves"], tensors["values"].double()  # [H, N], [H, S, M, Q]
    networks = digest_of(setting.weights, setting.generated, halves)
    numbers = numbers_of(problem)
    runs = {name: (run(setting), run) for name, run in METHODS.items()}
    late = late_settings(setting, tensors)
    for name in AT_LATE_CHECKPOINTS:
        run = METHODS[name]
        runs[f"{name}, late checkpoints"] = averaged(run, late), run
    table: dict[str, Any] = {}
    for name, (scores, run) in runs.items():
        if options.methods and name not in options.methods:
            continue
        of = digest_of(networks, *numbers, run)
        made, found = predictions(name, scores, halves, work, of)
        table[name] = {**made, "predicted": found}
    Q = problem.num_queries
    cells = {
        f"{measurement}, {kind}": (m, own)
        for m, measurement in enumerate(MEASUREMENTS)
        for kind, own in (("held-out", slice(0, Q)), ("generated", slice(Q, None)))
    }
    measured = {
        cell: values[:, :, m, own].transpose(0, 1) for cell, (m, own) in cells.items()
    }  # [S, H, Q]

    def judged(
        entry: dict[str, Any], key: str, cell: str, resamples: int = options.resamples
    ) -> LinearDatamodellingScore:
        m, own = cells[cell]
        return score.judged(entry["predicted"][key][m, own], measured[cell], resamples)

    references = {
        key: {cell: judged(table[name], DEFAULT, cell) for cell in cells}
        for key, name in REFERENCES.items()
        if name in table
    }
    agreements: dict[str, Any] = {}
    ceilings: dict[str, Any] = {}
    rows = []
    for name, entry in table.items():
        for cell, (m, own) in cells.items():
            if next(iter(entry["predicted"].values()))[m, own].isnan().any():
                continue  # a method for other queries
            by_setting = {key: judged(entry, key, cell, 1).mean for key in entry["predicted"]}
            best = max(by_setting, key=by_setting.__getitem__)
            row: dict[str, Any] = {"method": name, "cell": cell}
            row |= {key: entry[key] for key in ("seconds", "date", "torch")}
            row["lds"] = {key: round(value, 4) for key, value in by_setting.items()}
            chosen = {"best": best} | ({"default": DEFAULT} if DEFAULT in by_setting else {})
            for which, key in chosen.items():
                found = judged(entry, key, cell)
                row[which] = {"setting": key} | score.summary(found)
                for label, reference in references.items():
                    row[which][label] = score.difference(found, reference[cell])
                agreements[cell] = None if found.agreement is None else round(found.agreement, 4)
                ceilings[cell] = None if found.ceiling is None else round(found.ceiling, 4)
            rows.append(row)
    settings = {
        "retrained": header,
        "draws": options.draws,
        "resamples": options.resamples,
        # of rows with others, from before, nothing is kept
        "intervals": score.INTERVALS,
        "reference": REFERENCES["minus_reference"],
        "agreement_of_seeds": agreements,
        "ceilings": ceilings,
    }
    name = f"lds_{problem.name}"
    if options.methods:
        rows = kept(options.output / f"{name}_{options.device}.json", settings, rows)
    order = {name: place for place, name in enumerate(runs)}
    rows.sort(
        key=lambda row: order.get(row["method"], len(order))
    )  # methods that are no more come last
    report(options, name, __doc__, {**settings, "methods": rows})


def kept(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier result with the same settings, those of the same methods replaced.

    Raises:
        ValueError: If the settings are others, or a method that differences are to has changed.
    """
    if not path.exists():
        return rows
    earlier = json.loads(path.read_text())
    differing = sorted(key for key, value in settings.items() if earlier.get(key) != value)
    if differing:
        raise ValueError(
            f"{path} has other {', '.join(differing)}. Evaluate all methods, or give --output "
            "another folder."
        )
    before = {(row["method"], row["cell"]): row["lds"] for row in earlier["methods"]}
    for row in rows:
        place = row["method"], row["cell"]
        if row["method"] not in REFERENCES.values() or place not in before:
            continue
        # sums in another order change the rank of a half or two, and with it the last digits
        if any(abs(value - row["lds"][key]) > 1e-3 for key, value in before[place].items()):
            raise ValueError(
                f"{row['method']} has other scores in {path}, which its differences are to. "
                "Evaluate all methods, or give --output another folder."
            )
    names = {row["method"] for row in rows}
    return [row for row in earlier["methods"] if row["method"] not in names] + rows


if __name__ == "__main__":
    main()
