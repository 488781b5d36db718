"""Which method predicts retraining, and why, against the length of the training.

From the networks of ``benchmarks.lds.lengths``. For each length: linear data-modelling scores of
the loss, and of the parts by which it differs from the loss of the network of all images, the one
that is linear in the change of the prediction and the one that is its square; and how the loss
goes along with these parts from half to half.

Legend: H halves, S seeds, Q queries, M what is measured, N training images.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from benchmarks.lds.evaluate import DEFAULT, judged, key_of, predicted, summary
from benchmarks.lds.lengths import FRACTIONS, PARTS, PROBLEM, measured, weights_at
from benchmarks.lds.methods import METHODS, Setting
from benchmarks.lds.retrain import NETWORKS, arguments_of_retrained, result
from benchmarks.measure import report

# those without a default have their best setting, chosen by the result
COMPARED = (
    "kernel regression on pixels",
    "kernel regression on pixels, squared",
    "TRAK",
    "D-TRAK",
    "EK-FAC",
    "K-FAC, regression on the loss",
    "K-FAC, regression on the prediction",
    "K-FAC, regression on the prediction, squared",
    "K-FAC, regression on loss and prediction",
    "K-FAC, regression",
)


def correlation(x_SHQ: Tensor, y_SHQ: Tensor) -> float:
    """Over halves, mean over queries and seeds."""
    x, y = (z - z.mean(1, keepdim=True) for z in (x_SHQ.double(), y_SHQ.double()))
    return float(((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean())


def main() -> None:
    """Run the program."""
    parser = arguments_of_retrained(__doc__)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    header, tensors = NETWORKS.read(result(PROBLEM, options.retrained))
    values_SHLMQ, halves = tensors["values"], tensors["halves"]
    train, held_out = PROBLEM.data()
    none = held_out[:0]
    rows: list[dict[str, Any]] = []
    for place, fraction in enumerate(FRACTIONS):
        weights = weights_at(tensors, place)
        parts = dict(zip(PARTS, values_SHLMQ[:, :, place].unbind(2), strict=True))
        setting = Setting(PROBLEM, weights, none, options.draws)
        row: dict[str, Any] = {
            "passes": round(fraction * PROBLEM.steps * PROBLEM.batch / PROBLEM.num_train),
            "training_loss": float(measured(weights, weights, train)[0].mean()),
            "held_out_loss": float(measured(weights, weights, held_out)[0].mean()),
            "held_out_loss_of_halves": float(parts["loss"].mean()),
            "correlation": {
                part: round(correlation(parts["loss"], parts[part]), 4) for part in PARTS[1:]
            },
            "agreement": {},
            "ceiling": {},
            "methods": {},
        }
        for name in COMPARED:
            by_setting = {
                key_of(key): predicted(scores_MQN[0], halves)
                for key, scores_MQN in METHODS[name](setting)
            }
            by_part: dict[str, Any] = {}
            for part, measured_SHQ in parts.items():
                each = {key: judged(z, measured_SHQ, 1).mean for key, z in by_setting.items()}
                key = DEFAULT if DEFAULT in each else max(each, key=each.__getitem__)
                found = judged(by_setting[key], measured_SHQ, options.resamples)
                by_part[part] = {"setting": key} | summary(found)
                row["agreement"][part] = _rounded(found.agreement)
                row["ceiling"][part] = _rounded(found.ceiling)
            row["methods"][name] = by_part
        rows.append({k: _rounded(v) if isinstance(v, float) else v for k, v in row.items()})
        print(row["passes"], {k: v["loss"]["lds"] for k, v in row["methods"].items()}, flush=True)
    settings = {"retrained": header, "draws": options.draws, "resamples": options.resamples}
    report(options, "training_length", __doc__, {**settings, "lengths": rows})


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main()
