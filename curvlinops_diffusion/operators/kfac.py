"""K-FAC of a diffusion model, averaged over examples, timesteps and noise."""

from __future__ import annotations

from typing import Any, ClassVar

from curvlinops_diffusion.blocks import KroneckerBlock, PlacedBlock
from curvlinops_diffusion.draws import ProbeType
from curvlinops_diffusion.fisher import FisherType, KFACApprox, KFACOptions
from curvlinops_diffusion.layers import Coverage, supported_layers
from curvlinops_diffusion.operators.base import BlockDiagonalLinearOperator
from curvlinops_diffusion.parameters import Parameters, ParameterSpace
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.statistics import kronecker_factors
from curvlinops_diffusion.storage import fingerprint, versions


class DiffusionKFACLinearOperator(BlockDiagonalLinearOperator):
    r"""K-FAC of the GGN of a diffusion model's objective.

    Block-diagonal over layers. For a layer with inputs ``a_s`` and pulled-back loss vectors
    ``b_s`` at its weight-sharing positions ``s = 1..S`` (pixels, tokens), the block of its weight
    ``[O, I]`` (row-major) is ``B ⊗ A`` with::

        expand:  A = E[1/S Σ_s a_s a_sᵀ]                  B = E[Σ_s b_s b_sᵀ]
        reduce:  A = E[(1/S Σ_s a_s)(1/S Σ_s a_s)ᵀ]       B = E[(Σ_s b_s)(Σ_s b_s)ᵀ]

    the expectations being over examples, timesteps, noise and loss vectors. The factors are
    computed on construction, in one pass over the data, and not when the model changes later.

    Source: Mlodozeniec et al., 2025, Section 2.3 (diffusion); Eschenhagen et al., 2023, Section 3
    (weight sharing); Martens & Grosse, 2015.

    Args:
        regression: Objective, data and draws.
        params: ``None`` for every parameter of a supported layer (``Linear``, ``Conv2d``), the
            others being listed in a warning; or a list of the model's parameters (or their
            names), or a dict from names to parameters, all of which must be supported.
        fisher_type: ``'mc'`` (GGN of the model by random loss vectors), ``'type-2'`` (the same
            exactly, one backward pass for each output entry), ``'empirical'`` (GGN of the loss),
            ``'forward-only'`` (``B = I``; K-FAC only).
        mc_samples: Loss vectors for each draw, with ``fisher_type='mc'``.
        kfac_approx: ``'expand'`` or ``'reduce'``.
        separate_weight_and_bias: Whether weight and bias are blocks of their own (the bias' block
            is ``B``), or one block whose inputs are extended by a one.
        probe_type: Distribution of the random loss vectors, ``'rademacher'`` or ``'gaussian'``.
        eigenvalue_draws: EK-FAC only. Draws of each example in the second pass. Default: those of
            the regression, or with ``fisher_type='mc'`` as few as make 32,768 in all; more change
            the eigenvalues by about 2 %.
        gradient_group: EK-FAC with ``fisher_type='mc'`` only. Sum the gradients of so many
            successive examples before rotating and squaring them: unbiased, since the loss vectors
            of different examples are independent with mean zero, and cheaper for wide layers, but
            of more variance. Beyond 1, results depend on the batch size (within their Monte-Carlo
            error) unless it is a multiple of the group.
        progressbar: Whether to show progress.

    Attributes:
        blocks: The blocks.
        param_names: Names of the parameters covered, in order.
        info: Options, draws, coverage (``left_out``: what is not covered, and why).

    Raises:
        ValueError: If an option is unknown, a parameter is not supported, or a factor is not
            finite (named by its layer).
    """

    KIND: ClassVar[str] = "kfac"

    def __init__(
        self,
        regression: NoisedRegression,
        params: Parameters = None,
        *,
        fisher_type: str | FisherType = FisherType.MC,
        mc_samples: int = 1,
        kfac_approx: str | KFACApprox = KFACApprox.EXPAND,
        separate_weight_and_bias: bool = True,
        probe_type: str | ProbeType = ProbeType.RADEMACHER,
        eigenvalue_draws: int | None = None,
        gradient_group: int = 1,
        progressbar: bool = False,
    ):
        options = KFACOptions.parse(
            fisher_type,
            mc_samples,
            kfac_approx,
            separate_weight_and_bias,
            probe_type,
            eigenvalue_draws,
            gradient_group,
        )
        model = regression.objective.model
        coverage = supported_layers(model, params)
        blocks = self._fit(regression, coverage, options, progressbar)
        info: dict[str, Any] = {
            "options": options.as_dict(),
            "regression": regression.description,
            "left_out": coverage.left_out,
            "fingerprint": fingerprint(model),
            "versions": versions(),
        }
        super().__init__(ParameterSpace.of(coverage.params), blocks, info)

    @staticmethod
    def _fit(
        regression: NoisedRegression, coverage: Coverage, options: KFACOptions, progressbar: bool
    ) -> list[PlacedBlock]:
        """Compute the blocks."""
        factors = kronecker_factors(regression, coverage.layers, options, progressbar)
        return [
            PlacedBlock(
                part.key,
                part.params,
                KroneckerBlock(factors.outputs[layer.name], factors.inputs.get(part.key)),
            )
            for layer in coverage.layers
            for part in layer.parts(options.separate_weight_and_bias)
        ]
