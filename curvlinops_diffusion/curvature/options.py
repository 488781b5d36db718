"""The options of K-FAC and EK-FAC: which curvature, and how its blocks are approximated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from inspect import Signature, signature
from typing import Any, Literal, TypeVar

import torch

from curvlinops_diffusion.diffusion.draws import ProbeType
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.runtime.checks import check_count, check_option

Constructor = TypeVar("Constructor", bound=Callable[..., None])
# More draws in all than this change EK-FAC's eigenvalues by some 2 % (docs/performance.rst)
ENOUGH_EIGENVALUE_DRAWS = 2**15


class FisherType(str, Enum):
    """The curvature matrix that is approximated, and how its expectation over ``v`` is taken."""

    MC = "mc"
    TYPE2 = "type-2"
    EMPIRICAL = "empirical"


class KFACApprox(str, Enum):
    """The way the Kronecker factors are found, weight sharing above all."""

    EXPAND = "expand"
    REDUCE = "reduce"
    SHAMPOO = "shampoo"


@dataclass(frozen=True)
class KFACOptions:
    """The options of K-FAC and EK-FAC.

    The constructors of both take them as keyword arguments, from here. Enumerations may be given by
    their values.

    Attributes:
        fisher_type: ``'mc'`` (GGN of the model by random loss vectors), ``'type-2'`` (the same
            exactly, one backward pass for each output entry) or ``'empirical'`` (GGN of the loss,
            ``v = ∂ℓ_t/∂f``).
        mc_samples: Loss vectors for each draw, with ``fisher_type='mc'``.
        kfac_approx: ``'expand'`` (positions count as independent examples; Eschenhagen et al.,
            2023, Section 3), ``'reduce'`` (positions are averaged for inputs, and summed for
            gradients, first) or ``'shampoo'`` (second moments of the gradients' rows and columns;
            Gupta et al., 2018, with the scale of Morwani et al., 2024).
        separate_weight_and_bias: Whether weight and bias are blocks of their own, or one block
            whose inputs are extended by a one.
        probe_type: Distribution of the random loss vectors, ``'rademacher'`` or ``'gaussian'``.
        eigenvalue_draws: EK-FAC only. Draws of each example in the second pass. Default: those of
            the regression, or with ``fisher_type='mc'`` as few as make 32,768 in all; more change
            the eigenvalues by about 2 %.
        exact_bias: Whether the block of a bias of its own is the exact ``E[(Σ_s b_s)(Σ_s b_s)ᵀ]``;
            ``False`` for ``curvlinops``' convention, the ``B`` of its weight.
        max_dense: Entries up to which a norm's block, or that of a parameter in no known layer,
            is dense.
        max_positions: With ``'expand'``: positions of each example and draw that ``A`` and ``B`` of
            a layer are computed from, at most; a random sample where there are more (a function of
            seed, example and draw), unbiased. ``None`` for all. Positions of one image are alike,
            so that 64 of 4,096 add little to the error that images and draws leave, and cost
            little (docs/performance.rst).
        matmul_precision: Of the products that factors and eigenvalues are made of, for networks in
            float32 on a GPU: ``'high'`` rounds their operands to TF32 (10 bits), and sums them in
            float32, as is the default there; ``'highest'`` does not. The rounding changes factors
            by less than a thousandth of what other draws do (docs/performance.rst).

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
        kinds: dict[str, type[Enum]]
        kinds = {"fisher_type": FisherType, "kfac_approx": KFACApprox, "probe_type": ProbeType}
        for name, kind in kinds.items():
            object.__setattr__(self, name, check_option(name, getattr(self, name), kind))
        for name in ("separate_weight_and_bias", "exact_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        unset = {"eigenvalue_draws": None, "max_positions": None, "max_dense": 0}
        for name in ("mc_samples", *unset):
            if name not in unset or getattr(self, name) != unset[name]:
                check_count(name, getattr(self, name))
        if self.matmul_precision not in (None, "highest", "high"):
            raise ValueError(
                "`matmul_precision` must be 'highest', 'high' or None for the device's default, "
                f"got {self.matmul_precision!r}."
            )
        if self.max_positions is not None and self.kfac_approx is not KFACApprox.EXPAND:
            raise ValueError(
                "`max_positions` needs `kfac_approx='expand'`, got "
                f"{self.kfac_approx.value!r}, which sums over positions before it multiplies."
            )
        if self.fisher_type is not FisherType.MC and self.mc_samples != 1:
            raise ValueError(
                f"`mc_samples` must be 1 for fisher_type={self.fisher_type.value!r}, got "
                f"{self.mc_samples}. Only 'mc' draws loss vectors."
            )
        if self.kfac_approx is KFACApprox.SHAMPOO and not self.exact_bias:
            raise ValueError(
                "`exact_bias` must be True for `kfac_approx='shampoo'`, got False: its B has a "
                "scale only together with its A, so that it is no block of a bias."
            )

    def rounds_products(self, device: torch.device) -> bool:
        """Tell whether products of float32 numbers are rounded to TF32 on a device."""
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


def with_kfac_options(init: Constructor) -> Constructor:
    """Show the options in the signature of a constructor that takes them as ``**options``."""
    own = [p for p in signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = signature(KFACOptions).parameters.values()
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
    init.__signature__ = Signature([*own, *named])  # type: ignore[attr-defined]
    return init
