"""The linear data-modelling score of predictions that are kept, by the library's own.

Legend: H halves, S seeds, Q queries, N training examples, K resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvlinops_diffusion.validation import LinearDatamodellingScore, linear_datamodelling_score

INTERVALS = "other halves and queries, the noise of cells counted once"


def predicted(scores_QN: Tensor, halves_HN: Tensor) -> Tensor:
    """What the scores say of networks trained on halves: the sum over what was left out, [Q, H]."""
    return scores_QN.double() @ (~halves_HN).double().T


def judged(predicted_QH: Tensor, measured_SHQ: Tensor, resamples: int) -> LinearDatamodellingScore:
    """The score of predictions: those of a plan whose parts leave out one thing each, a half."""
    one_each_HH = torch.eye(predicted_QH.shape[1], dtype=torch.bool)
    return linear_datamodelling_score(predicted_QH, one_each_HH, measured_SHQ, bootstrap=resamples)


def summary(found: LinearDatamodellingScore) -> dict[str, float]:
    """The mean over queries, its standard error over them, and its interval."""
    values_Q = found.per_query
    error = float(values_Q.std() / len(values_Q) ** 0.5)
    return {
        "lds": round(found.mean, 4),
        "error_over_queries": round(error, 4),
        **_rounded(found.interval),
    }


def difference(
    found: LinearDatamodellingScore, reference: LinearDatamodellingScore
) -> dict[str, Any]:
    """How much better than a reference, over the same halves and queries."""
    value, interval = found.minus(reference)
    return {"difference": round(value, 4), **_rounded(interval)}


def _rounded(interval: tuple[float, float]) -> dict[str, float]:
    low, high = interval
    return {"low": round(low, 4), "high": round(high, 4)}
