"""Are predicted changes as large as measured ones, and which measurement predicts which?

From the kept retrainings, the mean of their seeds; nothing is retrained. Kept are two measurements
of each network and no weights, so that *measured* by bands of noise levels there is nothing: bands
are rows of *crossed* only, as that whose scores predict.

Legend: N training images, Q queries, H halves, S seeds, M what is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lds.evaluate import difference, judged, key_of, setting_of, summary
from benchmarks.lds.methods import KeptGradients, Setting
from benchmarks.lds.problems import MEASURED_SEED, MEASUREMENTS, PROBLEMS
from benchmarks.lds.retrain import arguments_of_retrained
from benchmarks.measure import report
from curvlinops_diffusion import NoisedRegression
from curvlinops_diffusion.influence.validation.judgements import CrossedMean

COMPARED = ("digits", "fashion", "photographs")
KINDS = ("held-out", "generated")
# EK-FAC or not, and the damping
CURVATURES = {
    "EK-FAC": (True, 1e-8),
    "EK-FAC, damping 1e-05": (True, 1e-5),
    "EK-FAC, damping 1e-03": (True, 1e-3),
    "K-FAC": (False, 1e-8),
}
CROSSED = "EK-FAC"
OTHERS = ("elbo", "squared_norm")
BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))
SHARE = 0.9  # of cases that an interval is to hold


# ---------------------------------------------------------------------------------------------
# Slopes and intervals of a change
# ---------------------------------------------------------------------------------------------


def slope_of(
    predicted_QH: Tensor, measured_QH: Tensor, resamples: int, within: bool = True
) -> tuple[float, float]:
    """Slope of measured on predicted changes by least squares, and its standard error.

    The error is that under other halves and queries: the slope is the mean of
    ``b + x (y − b x) / mean(x²)`` to first order.

    Args:
        predicted_QH: Predicted changes ``x``.
        measured_QH: Measured changes ``y``.
        resamples: For the error.
        within: Whether each query has an intercept of its own, in place of one for all.
    """
    over: Any = 1 if within else (0, 1)
    x, y = (z - z.mean(over, keepdim=True) for z in (predicted_QH, measured_QH))
    slope = (x * y).sum() / x.square().sum()
    terms = CrossedMean((slope + x * (y - slope * x) / x.square().mean()).T)
    return float(slope), float(terms.resampled(resamples, 0).std(correction=0))


@dataclass(frozen=True)
class Calibration:
    """An interval ``slope · predicted ± half_width`` that holds a share of measured changes."""

    slope: float
    half_width: float

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[Tensor, Tensor]], share: float = SHARE, sloped: bool = True
    ) -> Calibration:
        """Fit it to predicted and measured changes ``[Q, H]`` of some problems, of equal weight.

        Args:
            pairs: Predicted and measured, relative to what makes problems alike.
            share: Of the measured changes, in the mean over problems.
            sloped: Whether there is a slope, in place of zero.
        """
        products = [torch.stack([(x * y).mean(), x.square().mean()]) for x, y in pairs]
        xy, xx = torch.stack(products).sum(0)
        slope = float(xy / xx) if sloped else 0.0
        errors = torch.cat([(y - slope * x).abs().flatten() for x, y in pairs])
        weights = torch.cat([torch.full((x.numel(),), 1 / x.numel()) for x, _ in pairs])
        order = errors.argsort()
        holds = weights[order].cumsum(0) >= share * len(pairs) - 1e-6
        return cls(slope, float(errors[order][holds.nonzero()[0, 0]]))

    def coverage(self, predicted_QH: Tensor, measured_QH: Tensor) -> float:
        """The share of measured changes within the interval."""
        inside = (measured_QH - self.slope * predicted_QH).abs() <= self.half_width
        return float(inside.double().mean())


def covered(changes: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[dict[str, Any]]:
    """For each problem: does an interval hold that was fitted to the others?"""
    for name, own in changes.items():
        others = [pair for other, pair in changes.items() if other != name]
        if others:
            fitted, without = (Calibration.of(others, sloped=s) for s in (True, False))
            yield {
                "left_out": name,
                "slope": fitted.slope,
                "own_slope": Calibration.of([own]).slope,
                "half_width": fitted.half_width,
                "coverage": fitted.coverage(*own),
                "half_width_at_slope_0": without.half_width,
                "coverage_at_slope_0": without.coverage(*own),
            }


# ---------------------------------------------------------------------------------------------
# One problem
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What retraining did to a problem's queries.

    Attributes:
        values_SHMQ: Values under the retrained networks.
        full_MQ: Those under the network of all images.
    """

    values_SHMQ: Tensor
    full_MQ: Tensor

    def measured_SHQ(self, m: int, own: slice) -> Tensor:
        """Values of one measurement and kind of queries."""
        return self.values_SHMQ[:, :, m, own]

    def slopes(self, predicted_QH: Tensor, m: int, own: slice, resamples: int) -> dict[str, Any]:
        """Compare predicted and measured changes; relative ones are parts of the full value."""
        measured_QH = self.measured_SHQ(m, own).mean(0).T
        full_Q1 = self.full_MQ[m, own].unsqueeze(1)
        change_QH = measured_QH - full_Q1
        slope, error = slope_of(predicted_QH, measured_QH, resamples)
        from_full, its_error = slope_of(predicted_QH, change_QH, resamples, within=False)
        x, y = (z - z.mean(1, keepdim=True) for z in (predicted_QH, measured_QH))
        each_Q = (x * y).sum(1) / x.square().sum(1)
        return {
            "slope": slope,
            "error": error,
            "median_slope_of_queries": float(each_Q.median()),
            "queries_with_positive_slope": _share(each_Q > 0),
            "same_sign_about_the_mean": _share(x * y > 0),
            "predicted_improvements": _share(predicted_QH < 0),
            "measured_improvements": _share(change_QH < 0),
            "mean_predicted_change": float((predicted_QH / full_Q1).mean()),
            "mean_measured_change": float((change_QH / full_Q1).mean()),
            "slope_from_full": from_full,
            "its_error": its_error,
            "intercept_from_full": float(
                (change_QH - from_full * predicted_QH).mean() / full_Q1.mean()
            ),
        }

    def spread(self, m: int, own: slice) -> dict[str, Any]:
        """Standard deviations relative to the mean value: over queries, halves and seeds."""
        values_SHQ = self.measured_SHQ(m, own)
        mean_Q = values_SHQ.mean((0, 1))
        of_seeds = (values_SHQ.var(0).mean(0)).sqrt()
        of_halves = values_SHQ.mean(0).var(0) - of_seeds.square() / len(values_SHQ)
        parts = {
            "over_queries": mean_Q.std(),
            "over_halves": of_halves.clamp(min=0).mean().sqrt(),
            "over_seeds": of_seeds.square().mean().sqrt(),
        }
        return {name: float(value / mean_Q.mean()) for name, value in parts.items()} | {
            "mean": float(mean_Q.mean()),
            "full_network": float(self.full_MQ[m, own].mean()),
        }

    def relative(self, predicted_QH: Tensor, m: int, own: slice) -> tuple[Tensor, Tensor]:
        """Predicted and measured changes about their means, as parts of the full value."""
        full_Q1 = self.full_MQ[m, own].unsqueeze(1)
        pair = predicted_QH / full_Q1, self.measured_SHQ(m, own).mean(0).T / full_Q1
        x, y = (z - z.mean(1, keepdim=True) for z in pair)
        return x, y


def _share(which: Tensor) -> float:
    return float(which.double().mean())


def queries_of(setting: Setting) -> dict[str, KeptGradients]:
    """Gradients of what scores are computed of: measurements, and the loss of bands of levels."""
    first = setting.queries[0]
    found: dict[Any, KeptGradients] = dict(zip(MEASUREMENTS, setting.queries, strict=True))
    found |= {m: first.measuring(m) for m in OTHERS}
    # together as many as of all levels
    draws = max(setting.problem.measured_draws // len(BANDS), 1)
    for low, end in BANDS:
        of_band = NoisedRegression(
            *(setting.objective, setting.query_data, draws, MEASURED_SEED),
            timesteps=f"stratified:{low}:{end}",
        )
        found[f"loss, levels {low} to {end - 1}"] = KeptGradients(of_band)
    return found


def predictions_of(setting: Setting, halves: Tensor) -> dict[str, dict[str, Tensor]]:
    """Predicted changes ``[Q, H]``, by curvature and by what the scores are of.

    Of groups, in place of images that are added up: one product for each half and curvature.
    """
    found: dict[str, dict[str, Tensor]] = {}
    left_out_NH = (~halves.T).float() / halves.shape[1]
    left_out_PH = setting.J_train.rows().T @ left_out_NH
    rows_QP = {of: J.rows() for of, J in queries_of(setting).items()}
    operators = {ekfac: setting.curvature(ekfac=ekfac) for ekfac in (True, False)}
    for label, (ekfac, damping) in CURVATURES.items():
        shifts_PH = operators[ekfac].inverse(damping) @ left_out_PH
        wanted = rows_QP if label == CROSSED else MEASUREMENTS
        found[label] = {of: (rows_QP[of] @ shifts_PH).double() for of in wanted}
        print(setting.problem.name, label, "done", flush=True)
    return found


def crossed(
    changes: Changes, by_scores: Mapping[str, Tensor], own: slice, resamples: int
) -> Iterator[dict[str, Any]]:
    """Linear data-modelling scores of each measurement's scores for each measured value.

    *minus_own* is the difference to the scores of what is measured.
    """
    scores = {
        (of, measured): judged(z[own], changes.measured_SHQ(m, own), resamples)
        for of, z in by_scores.items()
        for m, measured in enumerate(MEASUREMENTS)
    }
    for of in by_scores:
        row: dict[str, Any] = {"scores_of": of}
        for measured in MEASUREMENTS:
            found, reference = scores[of, measured], scores[measured, measured]
            row[measured] = summary(found)
            if of != measured:
                row[measured]["minus_own"] = difference(found, reference)
        yield row


def main() -> None:
    """Run the program."""
    parser = arguments_of_retrained(__doc__)
    parser.add_argument("--problem", nargs="*", choices=PROBLEMS, default=COMPARED)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"slopes": [], "crossed": [], "spread": []}
    pairs: dict[tuple[str, ...], dict[str, tuple[Tensor, Tensor]]] = {}
    for name in options.problem:
        problem = PROBLEMS[name]
        setting, (_, tensors) = setting_of(problem, options.retrained, options.draws)
        full_MQ = problem.measured(setting.objective.model, setting.query_data).double()
        changes = Changes(tensors["values"].double().movedim(1, 0), full_MQ)
        predictions = predictions_of(setting, tensors["halves"])
        Q = problem.num_queries
        for kind, own in zip(KINDS, (slice(0, Q), slice(Q, None)), strict=True):
            where = {"problem": name, "queries": kind}
            for row in crossed(changes, predictions[CROSSED], own, options.resamples):
                found["crossed"].append(where | row)
            for m, measured in enumerate(MEASUREMENTS):
                of = where | {"measured": measured}
                found["spread"].append(of | rounded(changes.spread(m, own)))
                for label, by_measurement in predictions.items():
                    z_QH = by_measurement[measured][own]
                    slopes = changes.slopes(z_QH, m, own, options.resamples)
                    found["slopes"].append(of | {"method": label} | rounded(slopes))
                    pair = changes.relative(z_QH, m, own)
                    pairs.setdefault((kind, measured, label), {})[name] = pair
        # after each problem, as one takes long
        found["coverage"] = [
            dict(zip(("queries", "measured", "method"), key, strict=True)) | rounded(row)
            for key, by_problem in pairs.items()
            for row in covered(by_problem)
        ]
        settings = {"draws": options.draws, "resamples": options.resamples, "share": SHARE}
        dampings = {label: key_of(damping) for label, (_, damping) in CURVATURES.items()}
        report(options, "calibration", __doc__, {**settings, "dampings": dampings, **found})


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers with four digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


if __name__ == "__main__":
    main()
