"""Loss vectors: ``v`` whose second moment is the curvature of the loss in the output."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from curvlinops_diffusion.diffusion.random_numbers import ProbeType
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.checks import check_count, check_option

# More draws in all than this change EK-FAC's eigenvalues by some 2 % (docs/performance.rst)
ENOUGH_EIGENVALUE_DRAWS = 2**15


class FisherType(str, Enum):
    """Which curvature matrix is approximated, and how its expectation over ``v`` is taken.

    Attributes:
        MC: ``'mc'``, GGN of the model; ``mc_samples`` random loss vectors for each draw.
        TYPE2: ``'type-2'``, GGN of the model, exactly: one backward pass for each output entry.
        EMPIRICAL: ``'empirical'``, GGN of the loss (empirical Fisher): ``v = ∂ℓ_t/∂f``.
        FORWARD_ONLY: ``'forward-only'``, output factors are the identity (FOOF, Benzing, 2022).
    """

    MC = "mc"
    TYPE2 = "type-2"
    EMPIRICAL = "empirical"
    FORWARD_ONLY = "forward-only"


class KFACApprox(str, Enum):
    """How the Kronecker factors are found, weight sharing above all.

    Attributes:
        EXPAND: ``'expand'``, positions count as independent examples (Eschenhagen et al., 2023,
            Section 3).
        REDUCE: ``'reduce'``, positions are averaged (inputs) and summed (gradients) first.
        SHAMPOO: ``'shampoo'``, second moments of the gradients' rows and columns (Gupta et al.,
            2018; the scale is that of Morwani et al., 2024).
        RANK_ONE: ``'rank-one'``, the Kronecker product that is nearest to the exact block in
            Frobenius norm (Van Loan & Pitsianis, 1993), by three steps of the power method.
    """

    EXPAND = "expand"
    REDUCE = "reduce"
    SHAMPOO = "shampoo"
    RANK_ONE = "rank-one"

    @property
    def from_gradients(self) -> bool:
        """Whether the gradients of single examples must be formed."""
        return self in (KFACApprox.SHAMPOO, KFACApprox.RANK_ONE)


@dataclass(frozen=True)
class KFACOptions:
    """The options that K-FAC and EK-FAC share.

    Attributes:
        fisher_type: Which curvature, see :class:`FisherType`.
        mc_samples: Loss vectors for each draw, with ``fisher_type='mc'``.
        kfac_approx: ``'expand'``, ``'reduce'``, ``'shampoo'`` or ``'rank-one'``, see
            :class:`KFACApprox`.
        separate_weight_and_bias: Whether weight and bias are blocks of their own, or one.
        probe_type: Distribution of the random loss vectors, ``'rademacher'`` or ``'gaussian'``.
        eigenvalue_draws: Draws of each example for EK-FAC's eigenvalues; ``None`` to choose.
        gradient_group: Successive examples whose gradients EK-FAC sums before it squares them.
        exact_bias: Whether the block of a bias of its own is exact, rather than ``B``.
        max_dense: Entries up to which an exact block of a norm, or of parameters in no known
            layer, is kept whole; of larger ones the diagonal.
    """

    fisher_type: FisherType
    mc_samples: int
    kfac_approx: KFACApprox
    separate_weight_and_bias: bool
    probe_type: ProbeType
    eigenvalue_draws: int | None = None
    gradient_group: int = 1
    exact_bias: bool = True
    max_dense: int = 1024

    @classmethod
    def parse(
        cls,
        fisher_type: str | FisherType,
        mc_samples: int,
        kfac_approx: str | KFACApprox,
        separate_weight_and_bias: bool,
        probe_type: str | ProbeType,
        eigenvalue_draws: int | None = None,
        gradient_group: int = 1,
        exact_bias: bool = True,
        max_dense: int = 1024,
    ) -> KFACOptions:
        """Check the options that a user passed.

        Raises:
            ValueError: If an option is unknown, or ``mc_samples`` or ``gradient_group`` is given
                for a Fisher type that draws nothing.
        """
        fisher_type = check_option("fisher_type", fisher_type, FisherType)
        check_count("mc_samples", mc_samples)
        if mc_samples != 1 and fisher_type is not FisherType.MC:
            raise ValueError(
                f"mc_samples={mc_samples} arrived with fisher_type={fisher_type.value!r}. Only "
                "'mc' draws loss vectors; pass mc_samples=1."
            )
        kfac_approx = check_option("kfac_approx", kfac_approx, KFACApprox)
        if kfac_approx.from_gradients and fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError(
                f"kfac_approx={kfac_approx.value!r} arrived with fisher_type='forward-only'. It "
                "needs gradients: pass 'mc', 'type-2' or 'empirical', or 'expand' or 'reduce'."
            )
        if eigenvalue_draws is not None:
            check_count("eigenvalue_draws", eigenvalue_draws)
        check_count("gradient_group", gradient_group)
        if gradient_group > 1 and fisher_type is not FisherType.MC:
            raise ValueError(
                f"gradient_group={gradient_group} arrived with fisher_type={fisher_type.value!r}. "
                "Only the gradients of 'mc' are independent with mean zero, so that squares of "
                "their sums are unbiased; pass gradient_group=1."
            )
        for name, flag in (
            ("separate_weight_and_bias", separate_weight_and_bias),
            ("exact_bias", exact_bias),
        ):
            if not isinstance(flag, bool):
                raise ValueError(f"{name}={flag!r} arrived. Pass True or False.")
        if not exact_bias and kfac_approx.from_gradients:
            raise ValueError(
                f"exact_bias=False arrived with kfac_approx={kfac_approx.value!r}, whose B has a "
                "scale only together with its A, so that it is no block of a bias. Leave "
                "exact_bias=True."
            )
        if max_dense != 0:
            check_count("max_dense", max_dense)
        return cls(
            fisher_type,
            mc_samples,
            kfac_approx,
            separate_weight_and_bias,
            check_option("probe_type", probe_type, ProbeType),
            eigenvalue_draws,
            gradient_group,
            exact_bias,
            max_dense,
        )

    def num_eigenvalue_draws(self, regression: NoisedRegression) -> int:
        """How many draws of each example EK-FAC's eigenvalues are averaged over."""
        if self.eigenvalue_draws is not None:
            return self.eigenvalue_draws
        if self.fisher_type is not FisherType.MC:
            return regression.num_draws
        enough = -(-ENOUGH_EIGENVALUE_DRAWS // regression.num_data)
        return min(regression.num_draws, regression.draws.rounded_up(enough))

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for the header of a saved operator."""
        return {key: getattr(value, "value", value) for key, value in vars(self).items()}
