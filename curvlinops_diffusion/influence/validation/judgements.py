"""Judges scores by networks that were trained anew: linear data-modelling score, removals.

Legend: M parts, S seeds, Q queries, N training examples, K resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor, nn

from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.influence.agreement import (
    rank_correlations,
    rank_correlations_without_each,
    ranks_beyond_rounding,
)
from curvlinops_diffusion.influence.gradients import ExampleGradientLinearOperator
from curvlinops_diffusion.influence.validation.plans import Removal
from curvlinops_diffusion.runtime.checks import check_count

_UPPER = 0.975  # of a two-sided interval of 95 %


def values_of_networks(
    query: NoisedRegression,
    networks: Iterable[nn.Module | Mapping[str, Tensor]],
    *,
    measurement: Any = "loss",
) -> Tensor:
    """Measure the queries under each of several networks, on the same draws.

    The draws are those of ``query``: fixed by its seed, so that values of different networks differ
    by their weights alone. The network of ``query`` is given each one's weights in turn, and its
    own back at the end.

    Args:
        query: The queries, with objective and draws.
        networks: Networks of the same architecture, or their state dicts; one is used at a time, so
            that a generator may load them one by one.
        measurement: As that of :class:`~curvlinops_diffusion.ExampleGradientLinearOperator`.

    Returns:
        The values, ``[M, Q]``.

    Raises:
        ValueError: If a network is of another architecture, or there is none.

    Examples:
        >>> values = values_of_networks(query, [unet, unet.state_dict()])
        >>> values.shape, bool((values[0] == values[1]).all())
        (torch.Size([2, 2]), True)
    """
    J = ExampleGradientLinearOperator(query, measurement=measurement)
    model, found = query.objective.model, []
    own = {name: value.clone() for name, value in model.state_dict().items()}
    for network in networks:
        state = network.state_dict() if isinstance(network, nn.Module) else network
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                "Networks must have the queries' architecture, got one that differs in "
                f"{', '.join(wrong[:5])}{', …' if len(wrong) > 5 else ''}."
            )
        try:
            model.load_state_dict(state)
            found.append(J.values())
        finally:
            model.load_state_dict(own)
    if not found:
        raise ValueError("`networks` is empty. Pass at least one.")
    return torch.stack(found)


@dataclass(frozen=True, eq=False)
class CrossedMean:
    """The mean of a table ``[M, Q]``, float64, under other rows and other columns.

    An entry is a constant, plus an effect of its row, of its column, and of itself, all independent
    of each other. With the mean squares ``S_M`` of rows' means, ``S_Q`` of columns' and ``S_MQ`` of
    what is left, each divided by the number of what is averaged, the variance of the mean is::

        S_M + S_Q − min(S_MQ, max(S_M, S_Q))

    since the noise of single entries is a part of either. Drawing rows and columns together counts
    it three times (Owen, 2007). One column speaks of other rows alone; of none the mean is NaN.
    """

    table_MQ: Tensor

    @cached_property
    def _effects(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, and how far means of rows ``[M]`` and of columns ``[Q]`` are from it."""
        mean = self.table_MQ.mean()
        return mean, self.table_MQ.mean(1) - mean, self.table_MQ.mean(0) - mean

    def resampled(self, count: int, seed: int) -> Tensor:
        """Resample rows and columns ``K`` times, and spread their means by the mean's variance.

        Few rows or columns leave the variance itself uncertain: the spread is wider by as much as
        the quantiles of Student's distribution are than those of the normal one, with the degrees
        of freedom of Satterthwaite, 1946, or those of the smaller side if these are more.
        """
        mean, *effects = self._effects
        total_K = torch.zeros(count, dtype=mean.dtype)
        for which, effect in enumerate(effects):
            generator = torch.Generator().manual_seed(2 * seed + which)
            chosen = torch.randint(max(len(effect), 1), (count, len(effect)), generator=generator)
            total_K += effect[chosen].mean(1)
        drawn = sum(float(effect.square().mean()) / max(len(effect), 1) for effect in effects)
        if not drawn > 0:  # all entries are the same, or there are none
            return mean.expand(count).clone()
        (M, Q), (rows_M, columns_Q) = self.table_MQ.shape, effects
        rest_MQ = self.table_MQ - mean - rows_M.unsqueeze(1) - columns_Q
        squares = [
            (float(z.square().sum()) / (max(freedom, 1) * count), freedom)
            for z, freedom, count in (
                (rows_M, M - 1, M),
                (columns_Q, Q - 1, Q),
                (rest_MQ, (M - 1) * (Q - 1), M * Q),
            )
        ]
        of_rows, of_columns, of_cells = (square for square, _ in squares)
        variance = of_rows + of_columns - min(of_cells, max(of_rows, of_columns))
        freedom = variance**2 / sum(square**2 / max(free, 1) for square, free in squares)
        freedom = max(freedom, min(free for _, free in squares if free > 0))
        wider = float(stdtrit(freedom, _UPPER) / ndtri(_UPPER))
        return mean + wider * (variance / drawn) ** 0.5 * total_K

    def interval(self, count: int, seed: int, estimate: float) -> tuple[float, float]:
        """An interval of 95 %; extended to the estimate, the mean with its bias, if it ends before.

        Of as many standard deviations of the resamples as hold 95 % of a normal distribution.
        """
        mean, *_ = self._effects
        half = float(ndtri(_UPPER)) * float(self.resampled(count, seed).std(correction=0))
        return min(float(mean) - half, estimate), max(float(mean) + half, estimate)


@dataclass(frozen=True, eq=False)
class LinearDatamodellingScore:
    """A linear data-modelling score.

    Attributes:
        per_query: The rank correlation of predicted and measured values over parts, float64
            ``[Q]``; NaN where one of them is the same for all parts.
        compared: Predicted and measured values, or numbers of the same order, ``[2, Q, M]``.
        bootstrap: The number ``K`` of resamples.
        seed: Their seed.
        agreement: The mean rank correlation between measurements of two seeds; ``None`` for one,
            NaN where it is undefined for all queries.
        ceiling: The score that a predictor of the expectation over seeds would have; likewise.
    """

    per_query: Tensor
    compared: Tensor
    bootstrap: int
    seed: int
    agreement: float | None = None
    ceiling: float | None = None

    @property
    def mean(self) -> float:
        """The mean over the queries for which the score is defined; NaN if there are none."""
        return float(self.per_query[self._defined].mean())

    @property
    def resampled(self) -> Tensor:
        """The mean in each resample of parts and queries, without the bias of few parts, ``[K]``.

        Its spread is the error of :attr:`mean` under other parts *and* other queries.
        """
        return self._crossed.resampled(self.bootstrap, self.seed)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score under very many parts and queries.

        From the spread of :attr:`resampled`, within −1 and 1; NaN where the mean is.
        """
        low, high = self._crossed.interval(self.bootstrap, self.seed, self.mean)
        return max(low, -1.0), min(high, 1.0)

    def minus(self, other: LinearDatamodellingScore) -> tuple[float, tuple[float, float]]:
        """The difference to another method's, and its 95 % interval.

        Over the queries for which both are defined. What parts and queries do to both methods
        alike cancels: intervals of two scores may overlap where that of the difference is above
        zero.

        Raises:
            ValueError: If it is of other queries, parts or resamples.
        """
        own, others = (
            f"{list(x.compared[1].shape)} with {x.bootstrap} resamples of seed {x.seed}"
            for x in (self, other)
        )
        if own != others:
            raise ValueError(
                "Scores are compared on the same measurements, [queries, parts], with the same "
                f"options, got {own} and {others}."
            )
        both = self._defined & other._defined
        difference = float(self.per_query[both].mean() - other.per_query[both].mean())
        crossed = CrossedMean((self._pseudovalues - other._pseudovalues)[:, both])
        return difference, crossed.interval(self.bootstrap, self.seed, difference)

    @property
    def _defined(self) -> Tensor:
        return self.per_query.isfinite()

    @property
    def _crossed(self) -> CrossedMean:
        return CrossedMean(self._pseudovalues[:, self._defined])

    @cached_property
    def _pseudovalues(self) -> Tensor:
        """``M ρ_q − (M − 1) ρ_q(without part m)`` of the jackknife, ``[M, Q]``; NaN as ``ρ_q``.

        Their means over parts are ``ρ_q`` without its bias of order ``1 / M``.
        """
        pairs = zip(*self.compared, strict=True)
        without_MQ = torch.stack([rank_correlations_without_each(*pair) for pair in pairs], 1)
        M = len(without_MQ)
        # where all parts but one are tied, these order nothing
        return M * self.per_query - (M - 1) * without_MQ.nan_to_num()


def linear_datamodelling_score(
    scores: Tensor,
    left_out: Tensor,
    measured: Tensor,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LinearDatamodellingScore:
    r"""Judge how well scores predict what training on parts of the data does to the queries.

    Networks are trained on parts of the data (:class:`RetrainingPlan`), and the queries measured
    under each (:func:`values_of_networks`). Scores predict the sum over what was left out, and the
    score is Spearman's correlation with what was measured, query by query::

        LDS_q = ρ( Σ_{n ∉ part} τ(q, n),  m_q(part) )

    Positive if scores are as in :func:`~curvlinops_diffusion.influence_scores`: for a loss, what is
    helpful raises it when left out. Ties share their mean rank; sums that differ by no more than
    rounding are ties. A query whose scores or values are the same for all parts has no score (NaN)
    and is left out of the mean.

    The interval speaks of other parts and other queries: with the jackknife's pseudo-values of
    parts ``m`` and queries ``q`` as a two-way table, the variance of their mean is that over parts
    plus that over queries minus that of single cells, which both contain. In simulations 0.93 to
    0.97 of intervals hold the truth (``tests``).

    With ``S`` seeds their mean is predicted. With the correlation ``r > 0`` between two seeds it
    has the reliability ``S r / (1 + (S - 1) r)``, whose root is the ceiling (Spearman, 1910; Brown,
    1910); seeds that do not agree have the ceiling zero.

    Source: Park et al., 2023; Efron & Stein, 1981 (jackknife); Owen, 2007 (crossed variances).

    Args:
        scores: Scores ``τ``, ``[Q, N]``.
        left_out: The training examples that each part leaves out, bool ``[M, N]``.
        measured: Measured values, ``[M, Q]``, or of several seeds, ``[S, M, Q]``.
        bootstrap: The number ``K`` of resamples for the interval.
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
    (Q, N), (M, _) = scores_QN.shape, left_out.shape
    fits = left_out.shape == (M, N) and measured_SMQ.ndim == 3 and measured_SMQ.shape[1:] == (M, Q)
    if not fits or left_out.dtype != torch.bool:
        raise ValueError(
            "Pass scores [queries, examples], booleans [parts, examples], and values "
            f"[parts, queries] or [seeds, parts, queries], got {list(scores.shape)}, "
            f"{list(left_out.shape)} ({left_out.dtype}) and {list(measured.shape)}."
        )
    if M < 3:
        raise ValueError(f"A correlation needs at least 3 parts, got {M}.")
    _check_finite("scores", scores_QN)
    _check_finite("measured", measured_SMQ)
    check_count("bootstrap", bootstrap)
    # a constant in all scores of a query is counted, not added up, so that parts of one size have
    # the same to the last bit; sums that differ by no more than their rounding error are one
    common_Q1 = (scores_QN.amin(1, keepdim=True) + scores_QN.amax(1, keepdim=True)) / 2
    rest_QN, left_out_NM = scores_QN - common_Q1, left_out.double().T
    sums_QM = rest_QN @ left_out_NM + common_Q1 * left_out_NM.sum(0)
    rounding_Q = torch.finfo(torch.float64).eps * N**0.5 * rest_QN.abs().sum(1)
    predicted_QM = ranks_beyond_rounding(sums_QM, rounding_Q)
    measured_QM = measured_SMQ.mean(0).T
    per_query = rank_correlations(predicted_QM, measured_QM)
    compared = torch.stack([predicted_QM, measured_QM])
    agreement = ceiling = None
    S = len(measured_SMQ)
    if S > 1:
        agreement = agreement_of_seeds(measured_SMQ)
        # at an agreement below zero the formula has its pole, and beyond it wrong signs
        reliability = 0.0 if agreement <= 0 else S * agreement / (1 + (S - 1) * agreement)
        ceiling = reliability**0.5
    return LinearDatamodellingScore(per_query, compared, bootstrap, seed, agreement, ceiling)


def agreement_of_seeds(measured: Tensor) -> float:
    """The rank correlation over parts between two seeds of ``[S, M, Q]``, mean where defined."""
    pairs = combinations(measured.double().transpose(1, 2), 2)
    found = torch.cat([rank_correlations(one_QM, other_QM) for one_QM, other_QM in pairs])
    return float(found[found.isfinite()].mean())


@dataclass(frozen=True)
class RemovalEffect:
    """The change of queries' values without the images that were chosen for them.

    Attributes:
        change: The change relative to the size of the value under training on everything, mean over
            queries; its sign is that of the change.
        error: Its standard error over queries; ``None`` for a single one.
        control: The same change for random images; ``None`` if the plan has none.
    """

    change: float
    error: float | None
    control: float | None


def removal_effects(
    parts: tuple[str, ...], measured: Tensor, method: str = "scores"
) -> dict[int, RemovalEffect]:
    """Judge removals of each query's most helpful images, by how many were removed.

    A value of which lower is better should rise, one of which higher is better should fall.

    Source: Mlodozeniec et al., 2025 (retraining without top influences).

    Args:
        parts: The parts of :meth:`RetrainingPlan.removals`.
        measured: Measured values, ``[M, Q]``, or of several seeds, ``[S, M, Q]``, whose mean is
            taken.
        method: What the scores are called in the plan.

    Raises:
        ValueError: If the plan is no such plan, a value is not finite, or one under training on
            everything is zero.
    """
    values_MQ = (measured.mean(0) if measured.ndim == 3 else measured).cpu().double()
    _check_finite("measured", values_MQ)
    numbered = {part: m for m, part in enumerate(parts)}
    removals = [removal for part in parts if (removal := Removal.parsed(part)) is not None]
    own = [removal for removal in removals if removal.chosen_by == method]
    if Removal.NOTHING not in numbered or not own or method == Removal.CONTROL:
        raise ValueError(
            f"`parts` must be of RetrainingPlan.removals with method={method!r}, got "
            f"{list(parts[:4])} …."
        )
    base_Q = values_MQ[numbered[Removal.NOTHING]]
    if not (base_Q != 0).all():
        raise ValueError(
            "Values under the network of all examples must not be 0, as changes are relative to "
            f"them, got 0 for query {int((base_Q == 0).nonzero()[0])}."
        )
    effects = {}
    for size in sorted({removal.size for removal in own}):
        of_size = [removal for removal in own if removal.size == size]
        queries = [removal.number for removal in of_size]
        without_Q = torch.stack([values_MQ[numbered[r.part], r.number] for r in of_size])
        change_Q = (without_Q - base_Q[queries]) / base_Q[queries].abs()
        error = float(change_Q.std() / len(change_Q) ** 0.5) if len(change_Q) > 1 else None
        controls = (r for r in removals if (r.chosen_by, r.size) == (Removal.CONTROL, size))
        random = [numbered[removal.part] for removal in controls]
        change_of_random_Q = (values_MQ[random].mean(0) - base_Q) / base_Q.abs()
        control = float(change_of_random_Q.mean()) if random else None
        effects[size] = RemovalEffect(float(change_Q.mean()), error, control)
    return effects


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise ValueError(f"`{name}` must be finite, got {count} entries that are not.")
