"""The options of K-FAC and EK-FAC: which curvature, and how its blocks are approximated."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch

from curvlinops_diffusion.diffusion.draws import ProbeType
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.checks import check_count, check_option

# More draws in all than this change EK-FAC's eigenvalues by some 2 % (docs/performance.rst)
ENOUGH_EIGENVALUE_DRAWS = 2**15


class FisherType(str, Enum):
    """The curvature matrix that is approximated, and the way its expectation over ``v`` is taken.

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
    """The way the Kronecker factors are found, weight sharing above all.

    Attributes:
        EXPAND: ``'expand'``, positions count as independent examples (Eschenhagen et al., 2023,
            Section 3).
        REDUCE: ``'reduce'``, positions are averaged (inputs) and summed (gradients) first.
        SHAMPOO: ``'shampoo'``, second moments of the gradients' rows and columns (Gupta et al.,
            2018; the scale is that of Morwani et al., 2024).
    """

    EXPAND = "expand"
    REDUCE = "reduce"
    SHAMPOO = "shampoo"

    @property
    def from_gradients(self) -> bool:
        """Whether the gradients of single examples must be formed."""
        return self is KFACApprox.SHAMPOO


@dataclass(frozen=True)
class KFACOptions:
    """The options that K-FAC and EK-FAC share, checked.

    Operators, program and cost estimate hand this object on; what each option means is said once,
    by :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`. Enumerations may be given by
    their values.

    Raises:
        ValueError: If an option is unknown, or two contradict each other.
    """

    fisher_type: FisherType = FisherType.MC
    mc_samples: int = 1
    kfac_approx: KFACApprox = KFACApprox.EXPAND
    separate_weight_and_bias: bool = True
    probe_type: ProbeType = ProbeType.RADEMACHER
    eigenvalue_draws: int | None = None
    exact_bias: bool = True
    max_dense: int = 1024
    max_positions: int | None = None
    matmul_precision: Literal["highest", "high"] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        for name, kind in _ENUMERATIONS.items():
            object.__setattr__(self, name, check_option(name, getattr(self, name), kind))
        for name in ("separate_weight_and_bias", "exact_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} arrived. Pass True or False.")
        check_count("mc_samples", self.mc_samples)
        if self.eigenvalue_draws is not None:
            check_count("eigenvalue_draws", self.eigenvalue_draws)
        if self.max_dense != 0:
            check_count("max_dense", self.max_dense)
        if self.max_positions is not None:
            check_count("max_positions", self.max_positions)
            self._check_expanded()
        if self.matmul_precision not in (None, "highest", "high"):
            raise ValueError(
                f"matmul_precision={self.matmul_precision!r} arrived. Pass 'highest', 'high', or "
                "None for the device's default."
            )
        self._check_draws()
        self._check_gradients()

    def _check_draws(self) -> None:
        """Check what needs random loss vectors."""
        if self.fisher_type is FisherType.MC:
            return
        if self.mc_samples != 1:
            raise ValueError(
                f"mc_samples={self.mc_samples} arrived with "
                f"fisher_type={self.fisher_type.value!r}. Only 'mc' draws loss vectors; pass "
                "mc_samples=1."
            )

    def _check_expanded(self) -> None:
        """Check what samples positions."""
        if self.kfac_approx is not KFACApprox.EXPAND:
            raise ValueError(
                f"max_positions={self.max_positions} arrived with "
                f"kfac_approx={self.kfac_approx.value!r}, which sums over positions before it "
                "multiplies. Leave it out, or pass 'expand'."
            )

    def _check_gradients(self) -> None:
        """Check what factors from gradients need."""
        if not self.kfac_approx.from_gradients:
            return
        approx = f"kfac_approx={self.kfac_approx.value!r}"
        if self.fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError(
                f"{approx} arrived with fisher_type='forward-only'. It needs gradients: pass 'mc', "
                "'type-2' or 'empirical', or 'expand' or 'reduce'."
            )
        if not self.exact_bias:
            raise ValueError(
                f"exact_bias=False arrived with {approx}, whose B has a scale only together with "
                "its A, so that it is no block of a bias. Leave exact_bias=True."
            )

    @property
    def has_gradients(self) -> bool:
        """Whether there are backward passes."""
        return self.fisher_type is not FisherType.FORWARD_ONLY

    def rounds_products(self, device: torch.device) -> bool:
        """Whether products of float32 numbers are rounded to TF32 on a device."""
        return device.type == "cuda" and self.matmul_precision != "highest"

    def num_eigenvalue_draws(self, regression: NoisedRegression) -> int:
        """Choose how many draws of each example EK-FAC's eigenvalues are averaged over."""
        if self.eigenvalue_draws is not None:
            return self.eigenvalue_draws
        if self.fisher_type is not FisherType.MC:
            return regression.num_draws
        enough = -(-ENOUGH_EIGENVALUE_DRAWS // regression.num_data)
        return min(regression.num_draws, regression.draws.rounded_up(enough))

    def as_dict(self) -> dict[str, Any]:
        """The options as plain values, for the header of a saved operator."""
        return {key: getattr(value, "value", value) for key, value in vars(self).items()}


_ENUMERATIONS: dict[str, type[Enum]] = {
    "fisher_type": FisherType,
    "kfac_approx": KFACApprox,
    "probe_type": ProbeType,
}
