"""How well scores predict retraining: the linear data-modelling score, its error and ceiling.

Legend: M parts, S seeds, Q queries, N training examples, K resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlinops_diffusion.runtime.checks import check_count

# the quantiles of an interval
_INTERVAL = (0.025, 0.975)


@dataclass(frozen=True, eq=False)
class LinearDatamodellingScore:
    """A linear data-modelling score.

    Attributes:
        per_query: The rank correlation of predicted and measured values over parts, float64
            ``[Q]``; NaN where one of them is the same for all parts.
        resampled: The mean over queries in each resample of parts and queries, ``[K]``; NaN for
            one in which all parts are the same.
        agreement: The mean rank correlation between measurements of two seeds; ``None`` for one.
        ceiling: The score that a predictor of the expectation over seeds would have; ``None`` for
            one seed.
    """

    per_query: Tensor
    resampled: Tensor
    agreement: float | None = None
    ceiling: float | None = None

    @property
    def mean(self) -> float:
        """The mean over queries."""
        return float(self.per_query.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 2.5 and 97.5 % quantiles of the mean in the bootstrap over parts and queries."""
        return _interval(self.resampled)

    def minus(self, other: LinearDatamodellingScore) -> tuple[float, tuple[float, float]]:
        """How much better than another method's, and the interval of that, on the same resamples.

        Narrower than either's own: what parts and queries have in common is taken away.

        Raises:
            ValueError: If it is of other queries or resamples.
        """
        shapes = [(tuple(x.per_query.shape), tuple(x.resampled.shape)) for x in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Scores of {shapes[0][0]} and {shapes[1][0]} queries in {shapes[0][1]} and "
                f"{shapes[1][1]} resamples arrived. Judge both by the same measurements, options."
            )
        return self.mean - other.mean, _interval(self.resampled - other.resampled)


def linear_datamodelling_score(
    scores: Tensor,
    left_out: Tensor,
    measured: Tensor,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LinearDatamodellingScore:
    r"""How well scores predict what training on parts of the data does to the queries.

    Networks are trained on parts of the data (:class:`RetrainingPlan`), and the queries measured
    under each (:func:`values_of_networks`). Scores predict the sum over what was left out, and the
    score is Spearman's correlation with what was measured, query by query::

        LDS_q = ρ( Σ_{n ∉ part} τ(q, n),  m_q(part) )

    Positive if scores are as in :func:`~curvlinops_diffusion.influence_scores`: for a loss, what is
    helpful raises it when left out. Ties share their mean rank. Parts *and* queries are drawn with
    replacement for the interval, the same for all methods that are judged with the same ``seed``.

    With ``S`` seeds their mean is predicted. With the correlation ``r`` between two seeds it has
    the reliability ``S r / (1 + (S - 1) r)``, whose root is the ceiling (Spearman, 1910; Brown,
    1910).

    Source: Park et al., 2023.

    Args:
        scores: Scores ``τ``, ``[Q, N]``.
        left_out: The training examples that each part leaves out, bool ``[M, N]``.
        measured: Measured values, ``[M, Q]``, or of several seeds, ``[S, M, Q]``.
        bootstrap: The number ``K`` of resamples.
        seed: Their seed.

    Raises:
        ValueError: If shapes do not fit together, or values are not finite.

    Examples:
        >>> plan = RetrainingPlan.random_subsets(num_data=10, num_parts=30)
        >>> truth = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
        >>> measured = plan.left_out.float() @ truth.T  # of networks that are linear in the data
        >>> lds = linear_datamodelling_score(truth, plan.left_out, measured)
        >>> round(lds.mean, 6)
        1.0
    """
    measured_SMQ = (measured if measured.ndim == 3 else measured.unsqueeze(0)).cpu().double()
    left_out, scores_QN = left_out.cpu(), scores.detach().cpu().double()
    _check_shapes(scores_QN, left_out, measured_SMQ, measured)
    check_count("bootstrap", bootstrap)
    predicted_QM = scores_QN @ left_out.double().T
    measured_QM = measured_SMQ.mean(0).T
    times_KM, times_KQ = (
        _resampled(number, bootstrap, 2 * seed + which)
        for which, number in enumerate(reversed(measured_QM.shape))
    )
    once_1M = torch.ones(1, measured_QM.shape[1], dtype=torch.float64)
    times_KM = torch.cat([once_1M, times_KM])
    pairs = zip(predicted_QM, measured_QM, strict=True)
    every_KQ = torch.stack([_rank_correlation(x_M, y_M, times_KM) for x_M, y_M in pairs], 1)
    per_query, every_KQ = every_KQ[0], every_KQ[1:]
    times_KQ = times_KQ * every_KQ.isfinite()  # few parts may be one part many times
    resampled_K = (times_KQ * every_KQ.nan_to_num()).sum(1) / times_KQ.sum(1)
    agreement = ceiling = None
    S = len(measured_SMQ)
    if S > 1:
        agreement = agreement_of_seeds(measured_SMQ)
        reliability = S * agreement / (1 + (S - 1) * agreement)
        ceiling = max(reliability, 0.0) ** 0.5
    return LinearDatamodellingScore(per_query, resampled_K, agreement, ceiling)


def agreement_of_seeds(measured: Tensor) -> float:
    """The rank correlation over parts between two seeds, mean over pairs of seeds and queries.

    Args:
        measured: Measured values of at least two seeds, ``[S, M, Q]``.
    """
    S, M, _ = measured.shape
    once_1M = torch.ones(1, M, dtype=torch.float64)
    found = [
        _rank_correlation(x_M, y_M, once_1M)
        for s in range(S)
        for t in range(s)
        for x_M, y_M in zip(measured[s].T.double(), measured[t].T.double(), strict=True)
    ]
    return float(torch.cat(found).mean())


@dataclass(frozen=True)
class RemovalEffect:
    """What removing images did to the value of the queries that they were chosen for.

    Attributes:
        change: The change relative to training on everything, mean over queries.
        error: Its standard error over queries.
        control: The same for random images.
    """

    change: float
    error: float
    control: float


def removal_effects(
    parts: tuple[str, ...], measured: Tensor, method: str = "scores"
) -> dict[int, RemovalEffect]:
    """What removing each query's most helpful images did to it, by how many were removed.

    Source: Mlodozeniec et al., 2025 (retraining without top influences).

    Args:
        parts: The parts of :meth:`RetrainingPlan.removals`.
        measured: Measured values, ``[M, Q]``, or of several seeds, ``[S, M, Q]``, whose mean is
            taken.
        method: What the scores are called in the plan.

    Raises:
        ValueError: If the plan is no such plan.
    """
    values_MQ = (measured.mean(0) if measured.ndim == 3 else measured).cpu().double()
    numbered = {part: m for m, part in enumerate(parts)}
    own = [words for part in parts if (words := part.rsplit("_", 2))[0] == method]
    if "all" not in numbered or not own:
        raise ValueError(
            f"Parts {list(parts[:4])} … arrived, which are no removals by '{method}'. Make the "
            "plan by RetrainingPlan.removals, and name its method."
        )
    base_Q = values_MQ[numbered["all"]]
    effects = {}
    for k in sorted({int(words[2]) for words in own}):
        queries = [int(words[1]) for words in own if words[2] == str(k)]
        without_Q = torch.stack([values_MQ[numbered[f"{method}_{q}_{k}"], q] for q in queries])
        random = [m for p, m in numbered.items() if p.startswith("random_") and p.endswith(f"_{k}")]
        change_Q = (without_Q - base_Q[queries]) / base_Q[queries].abs()
        control_Q = (values_MQ[random].mean(0) - base_Q) / base_Q.abs()
        error = float(change_Q.std() / len(change_Q) ** 0.5)
        effects[k] = RemovalEffect(float(change_Q.mean()), error, float(control_Q.mean()))
    return effects


def _check_shapes(
    scores_QN: Tensor, left_out: Tensor, measured_SMQ: Tensor, measured: Tensor
) -> None:
    """Check what is judged.

    Raises:
        ValueError: If shapes do not fit together, or values are not finite.
    """
    (Q, N), (M, _) = scores_QN.shape, left_out.shape
    fits = left_out.shape == (M, N) and measured_SMQ.ndim == 3 and measured_SMQ.shape[1:] == (M, Q)
    if not fits or left_out.dtype != torch.bool:
        raise ValueError(
            f"scores {tuple(scores_QN.shape)}, left_out {tuple(left_out.shape)} ({left_out.dtype}) "
            f"and measured {tuple(measured.shape)} arrived. Pass scores [queries, examples], "
            "booleans [parts, examples], and values [parts, queries] or [seeds, parts, queries]."
        )
    if M < 3:
        raise ValueError(f"{M} parts arrived, over which nothing correlates. Pass at least 3.")
    for name, values in (("scores", scores_QN), ("measured", measured_SMQ)):
        if not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            raise ValueError(f"{name} arrived with {count} entries that are not finite.")


def _resampled(number: int, resamples: int, seed: int) -> Tensor:
    """How often each of so many things is drawn, with replacement, ``[K, number]``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(number, (resamples, number), generator=generator)
    counts = torch.zeros(resamples, number, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _rank_correlation(x_M: Tensor, y_M: Tensor, times_KM: Tensor) -> Tensor:
    """Spearman's correlation in which each entry counts so many times, ``[K]``."""
    ranks = []
    for z_M in (x_M, y_M):
        values, value_M = z_M.unique(return_inverse=True)  # in order
        equal_KV = times_KM.new_zeros(len(times_KM), len(values)).index_add_(1, value_M, times_KM)
        rank_KM = (equal_KV.cumsum(1) - equal_KV / 2)[:, value_M]  # those below, and half of ties
        mean_K1 = (times_KM * rank_KM).sum(1, keepdim=True) / times_KM.sum(1, keepdim=True)
        ranks.append(rank_KM - mean_K1)
    a_KM, b_KM = ranks
    covariance, own, other = (
        (times_KM * z).sum(1) for z in (a_KM * b_KM, a_KM.square(), b_KM.square())
    )
    return covariance / (own * other).sqrt()


def _interval(values_K: Tensor) -> tuple[float, float]:
    low, high = values_K.nanquantile(torch.tensor(_INTERVAL, dtype=values_K.dtype)).tolist()
    return low, high
