"""Do checks without retraining tell sound scores from unsound ones?

On problems whose networks were retrained: scores of EK-FAC as they are and degraded (few draws, a
large damping, a network that was not trained, images that are mixed up), and of pixels alone. For
each its linear data-modelling score of the loss, and what ``validation.check`` would have found:
the thresholds of ``curvlinops_diffusion.influence.validation.checks`` are read off here. Sixteen
training images are asked about. Scores are kept in a work folder, so that they can be judged anew.

Legend: N training images, Q training images that are asked about.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from benchmarks.lds.evaluate import judged, predicted, setting_of
from benchmarks.lds.methods import BATCH, DAMPINGS, KeptGradients, Setting
from benchmarks.lds.problems import MEASURED_SEED, PROBLEMS, Problem, classes_of_digits
from benchmarks.lds.retrain import FOLDER
from benchmarks.measure import arguments, report
from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    NoisedRegression,
    SplitHalfScores,
    influence_scores,
)
from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.influence.agreement import rank_correlations
from curvlinops_diffusion.influence.features import feature_regression_scores
from curvlinops_diffusion.influence.validation.checks import Probes, checks_of
from curvlinops_diffusion.influence.validation.probes import (
    COPIES,
    Altered,
    chosen,
    copies_of,
    shuffled,
)
from curvlinops_diffusion.runtime.files import FileKind

PROBED = FileKind("probed", "scores that are checked", "Remove it.")
ASKED = 16
FIT_DRAWS = 8
SHUFFLED_DRAWS = 2
UNTRAINED_SEED = 5
DEGRADED = (1e-8, 1e-2, 1e4)
# draws of images and queries, with dampings; fewer of larger problems
TRAINED: dict[str, dict[int, tuple[float, ...]]] = {
    "photographs": {16: DEGRADED, 4: DAMPINGS[:1], 64: DAMPINGS[:1]},
    "digits": {16: DEGRADED},
    "fashion": {8: DEGRADED},
    "tiny": {4: DAMPINGS[:1]},
}
UNTRAINED_DRAWS = {"photographs": 16}
KINDS = ("held-out", "generated")


class HalvedGradients(KeptGradients):
    """Kept gradients of both halves of the draws, whose mean is that of all."""

    @cached_property
    def halves(self) -> tuple[KeptGradients, KeptGradients]:
        """Those of either half."""
        one, two = (
            KeptGradients(self.regression.divided(number, 2), self.param_names)
            for number in range(2)
        )
        return one, two

    def rows_of(self, clean: CleanBatch) -> Tensor:
        """Gradients of a batch."""
        one, two = (half.rows_of(clean) for half in self.halves)
        return (one + two) / 2


def of_pixels_in_patches(alter: Altered) -> Altered:
    """What alters images, of images whose patches are channels."""

    def altered(clean: CleanBatch) -> CleanBatch:
        whole = alter(replace(clean, x0=pixel_shuffle(clean.x0, 2)))
        return replace(whole, x0=pixel_unshuffle(whole.x0, 2))

    return altered


def probed(
    setting: Setting, draws: int, dampings: tuple[float, ...], of: str
) -> Iterator[tuple[str, Probes, Tensor]]:
    """What is said of the scores, what they are checked by, and those for the measured queries.

    Args:
        setting: The network.
        draws: Draws of images and queries.
        dampings: The dampings.
        of: What the network is called.
    """
    problem = setting.problem
    copies = COPIES
    if problem.name == "fashion":
        copies = {name: of_pixels_in_patches(alter) for name, alter in COPIES.items()}
    numbers = chosen(problem.num_train, ASKED, 0)
    Q = len(numbers)
    train = setting.train(draws, antithetic=True)
    kinds, asked = copies_of(train, numbers, draws, copies)
    measured = NoisedRegression(
        setting.objective,
        setting.query_data,
        draws,
        MEASURED_SEED,
        batch_size=BATCH,
        antithetic=True,
    )
    curvature = DiffusionEKFACLinearOperator(setting.train(FIT_DRAWS))
    names = curvature.param_names
    J_train, J_asked, J_query = (HalvedGradients(each, names) for each in (train, asked, measured))
    x0 = torch.cat([clean.x0 for clean in asked.clean_batches()])[:Q]
    pixels = feature_regression_scores(x0.flatten(1), setting.train_data.flatten(1)).float()
    with shuffled(setting.objective.model, names, 0):
        other = DiffusionKFACLinearOperator(setting.train(SHUFFLED_DRAWS))
        others = [KeptGradients(each, names) for each in (asked, train)]
        for J in others:
            next(J.row_batches())
    groups = {"class": classes_of_digits()} if problem.name == "digits" else {}
    for damping in dampings:
        inverse = curvature.inverse(damping)
        whole = influence_scores(J_asked, inverse, J_train)
        halves = [
            influence_scores(one, inverse, two)[:Q]
            for one, two in zip(J_asked.halves, J_train.halves, strict=True)
        ]
        found = Probes(
            numbers,
            dict(zip(kinds, whole.split(Q), strict=True)),
            SplitHalfScores(whole[:Q], *halves),
            influence_scores(others[0], other.inverse(damping), others[1])[:Q],
            {"pixels": pixels},
            groups,
        )
        yield _said(of, draws, damping), found, influence_scores(J_query, inverse, J_train)


def _said(of: str, draws: int, damping: float) -> str:
    return f"{of}, {draws} draws, damping {damping:.0e}"


def kept(problem: Problem, folder: Path, work: Path) -> Iterator[tuple[str, Probes, Tensor]]:
    """The same for every network, number of draws and damping; kept in the work folder."""
    setting, _ = setting_of(problem, folder)
    with torch.random.fork_rng():
        torch.manual_seed(UNTRAINED_SEED)
        untrained = problem.make_network().state_dict()
    runs = [("trained", setting.weights, *run) for run in TRAINED[problem.name].items()]
    if problem.name in UNTRAINED_DRAWS:
        runs.append(("untrained", untrained, UNTRAINED_DRAWS[problem.name], DAMPINGS[:1]))
    for of, weights, draws, dampings in runs:
        path = work / f"{problem.name}-{of}-{draws}.safetensors"
        if not path.exists():
            own = Setting(problem, weights, setting.generated)
            written: dict[str, Tensor] = {}
            for said, found, scores in probed(own, draws, dampings, of):
                written |= {f"{said}/{k}": z.contiguous() for k, z in as_tensors(found).items()}
                written[f"{said}/measured"] = scores
            PROBED.write(path, written, {"numbers": list(found.numbers)})
            print(path.name, "done", flush=True)
        header, tensors = PROBED.read(path)
        groups = {"class": classes_of_digits()} if problem.name == "digits" else {}
        for damping in dampings:
            said = _said(of, draws, damping)
            mine = {k.split("/", 1)[1]: z for k, z in tensors.items() if k.startswith(f"{said}/")}
            yield said, of_tensors(header["numbers"], mine, groups), mine["measured"]


def as_tensors(found: Probes) -> dict[str, Tensor]:
    """Probes by name."""
    assert found.halves is not None
    assert found.shuffled is not None
    return {
        **{f"scores/{kind}": z for kind, z in found.scores.items()},
        **{f"halves/{name}": z for name, z in vars(found.halves).items()},
        "shuffled": found.shuffled,
        "pixels": found.features["pixels"],
    }


def of_tensors(numbers: list[int], z: Mapping[str, Tensor], groups: Any) -> Probes:
    """Probes of what :func:`as_tensors` made."""
    return Probes(
        numbers,
        {kind: z[f"scores/{kind}"] for kind in ("itself", *COPIES)},
        SplitHalfScores(*(z[f"halves/{name}"] for name in ("scores", "first", "second"))),
        z["shuffled"],
        {"pixels": z["pixels"]},
        groups,
    )


def variants(problem: Problem, folder: Path, work: Path) -> Iterator[tuple[str, Probes, Tensor]]:
    """Scores as they are, and what needs no more gradients: mixed up, and of pixels alone."""
    for place, (said, found, scores) in enumerate(kept(problem, folder, work)):
        yield said, found, scores
        if place:  # but of the first
            continue
        N = scores.shape[1]
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        assert found.halves is not None
        assert found.shuffled is not None
        mixed = replace(
            found,
            scores={kind: z[:, order] for kind, z in found.scores.items()},
            halves=SplitHalfScores(*(z[:, order] for z in vars(found.halves).values())),
            shuffled=found.shuffled[:, order],
        )
        yield f"{said}, mixed up", mixed, scores[:, order]
        train, queries = problem.data()[0], setting_of(problem, folder)[0].query_data
        own = found.features["pixels"]
        alone = replace(found, scores={"itself": own}, halves=None, shuffled=own)
        of_queries = feature_regression_scores(queries.flatten(1), train.flatten(1))
        yield "pixels alone", alone, of_queries


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    known = list(TRAINED)
    parser.add_argument("--problem", nargs="*", choices=known, default=["photographs", "digits"])
    parser.add_argument("--work", type=Path, default=Path("lds-work/checks"), help="work folder")
    parser.add_argument("--retrained", type=Path, default=FOLDER, help="folder of its result")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.problem:
        problem = PROBLEMS[name]
        _, (_, tensors) = setting_of(problem, options.retrained)
        values = tensors["values"].double()[:, :, 0].transpose(0, 1)
        for said, found, scores in variants(problem, options.retrained, options.work):
            predicted_QH = predicted(scores, tensors["halves"])
            row: dict[str, Any] = {"problem": name, "scores": said}
            for kind, own in zip(KINDS, torch.arange(len(scores)).chunk(2), strict=True):
                row[f"LDS, {kind}"] = round(judged(predicted_QH[own], values[..., own], 1).mean, 3)
            row |= {check.name: round(check.value, 3) for check in checks_of(found)}
            rows.append(row)
            print(row, flush=True)
    names = dict.fromkeys(key for row in rows for key in row)
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    settings = {"asked": ASKED, "fit_draws": FIT_DRAWS, "shuffled_draws": SHUFFLED_DRAWS}
    report(options, "checks", __doc__, {**settings, "rows": rows, "tells": tells(rows)})


def tells(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rank correlation of each check with the score of held-out pictures, over all rows."""
    found = {}
    for name in list(rows[0])[4:]:
        pairs = [(row[f"LDS, {KINDS[0]}"], row[name]) for row in rows if row[name] != ""]
        one, other = torch.tensor(pairs).double().T
        found[name] = round(float(rank_correlations(one[None], other[None])), 3)
    return found


if __name__ == "__main__":
    main()
