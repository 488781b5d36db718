"""K-FAC of a diffusion model, averaged over examples, timesteps and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from curvlinops_diffusion.curvature.gradient_factors import fitted_factors
from curvlinops_diffusion.curvature.groups import fitted_in_groups
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors
from curvlinops_diffusion.curvature.options import FisherType, KFACApprox, KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.curvature.shards import sharded_blocks
from curvlinops_diffusion.diffusion.random_numbers import ProbeType
from curvlinops_diffusion.diffusion.regression import NoisedRegression, check_regression
from curvlinops_diffusion.diffusion.trial import checked_trial
from curvlinops_diffusion.layers import covered_parameters
from curvlinops_diffusion.layers.effect import check_effect
from curvlinops_diffusion.layers.observable import observable
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, KroneckerBlock
from curvlinops_diffusion.linalg.parameters import Parameters, ParameterSpace
from curvlinops_diffusion.linalg.placement import PlacedBlock
from curvlinops_diffusion.linalg.storage import versions
from curvlinops_diffusion.runtime.digests import fingerprint
from curvlinops_diffusion.runtime.files import check_space
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions


class DiffusionKFACLinearOperator(BlockDiagonalLinearOperator):
    r"""K-FAC of the GGN of a diffusion model's objective.

    Block-diagonal over layers. For a linear layer or a (transposed) convolution with inputs ``a_s``
    and pulled-back loss vectors ``b_s`` at its weight-sharing positions ``s = 1..S`` (pixels,
    tokens), the block of its weight ``[O, I]`` (row-major) is ``B ⊗ A`` with::

        expand:  A = E[1/S Σ_s a_s a_sᵀ]                  B = E[Σ_s b_s b_sᵀ]
        reduce:  A = E[(1/S Σ_s a_s)(1/S Σ_s a_s)ᵀ]       B = E[(Σ_s b_s)(Σ_s b_s)ᵀ]

    or from the gradients ``g = Σ_s b_s a_sᵀ`` of the weight::

        shampoo:  B = E[g gᵀ]    A = E[gᵀ g] / E‖g‖²

    the expectations being over examples, timesteps, noise and loss vectors; one pair for each group
    of a grouped convolution, and a diagonal ``A`` (token frequencies) for an embedding. The other
    blocks are exact, ``E[g gᵀ]`` with ``g`` the gradient of an example, draw and loss vector: those
    of biases, of the scale and shift of a norm, and of any parameter in no known layer (dense up to
    ``max_dense`` entries, their diagonal beyond). Everything is computed on construction, in one
    pass over the data (three for factors from gradients), and not when the model changes
    later.

    Source: Mlodozeniec et al., 2025, Section 2.3 (diffusion); Eschenhagen et al., 2023, Section 3
    (weight sharing); Martens & Grosse, 2015; Gupta et al., 2018, and Morwani et al., 2024
    (Shampoo).

    Args:
        regression: Objective, data and draws.
        params: ``None`` for every parameter of the model; or a list of the model's parameters (or
            their names), or a dict from names to parameters.
        fisher_type: ``'mc'`` (GGN of the model by random loss vectors), ``'type-2'`` (the same
            exactly, one backward pass for each output entry), ``'empirical'`` (GGN of the loss),
            ``'forward-only'`` (``B = I``; K-FAC only, and blocks of Kronecker form only: the
            others are listed in a warning).
        mc_samples: Loss vectors for each draw, with ``fisher_type='mc'``.
        kfac_approx: ``'expand'``, ``'reduce'`` or ``'shampoo'``.
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
        progressbar: Whether to show progress.
        passes: Checkpoints of the passes over the data, and processes that share them.

    Attributes:
        blocks: The blocks.
        param_names: Names of the parameters covered, in order.
        info: Options, draws, coverage (``left_out``: what is not covered, and why; ``others``: what
            has its gradients from automatic differentiation, and why; ``rounding``: parameters
            whose gradient is rounding errors alone, and their blocks with it).

    Raises:
        ValueError: If an option is unknown, a parameter is not supported, or a factor is not
            finite (named by its layer).

    Examples:
        >>> K = DiffusionKFACLinearOperator(train, kfac_approx="shampoo")
        >>> v = torch.ones(K.shape[1])
        >>> u = K.inverse(damping=1e-3) @ v
        >>> torch.allclose(K @ u + 1e-3 * u, v, atol=1e-3)
        True
        >>> root = K.power(-0.5, damping=1e-3)  # makes white noise samples of (K + λ I)⁻¹
        >>> torch.allclose(root @ (root @ v), u, rtol=1e-3, atol=1e-2)
        True
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
        exact_bias: bool = True,
        max_dense: int = 1024,
        max_positions: int | None = None,
        matmul_precision: Literal["highest", "high"] | None = None,
        progressbar: bool = False,
        passes: PassOptions = PLAIN,
    ):
        check_regression(regression)
        arguments: dict[str, Any] = {
            "fisher_type": fisher_type,
            "mc_samples": mc_samples,
            "kfac_approx": kfac_approx,
            "separate_weight_and_bias": separate_weight_and_bias,
            "probe_type": probe_type,
            "eigenvalue_draws": eigenvalue_draws,
            "exact_bias": exact_bias,
            "max_dense": max_dense,
            "max_positions": max_positions,
            "matmul_precision": matmul_precision,
        }
        options = KFACOptions(**arguments)  # which turns values into enumerations
        model = regression.objective.model
        coverage = covered_parameters(model, params, options.has_gradients)
        trial = checked_trial(regression)
        coverage = observable(regression.objective, trial, coverage, options.has_gradients)
        check_effect(regression, coverage.params, lambda: coverage.suspects)
        plan = BlockPlan.of(coverage, options)
        if passes.checkpoint is not None:
            # one is held while the next is written, and the operator's own file is as large
            size = 2 * plan.num_entries * regression.objective.working_dtype.itemsize
            folder = Path(passes.checkpoint)
            there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            check_space(folder, size - there, "Checkpoints of the factors")
        passes = replace(passes, progressbar=progressbar or passes.progressbar)

        def fit(plan: BlockPlan, passes: PassOptions) -> list[PlacedBlock]:
            return plan.place(self._fit(regression, plan, passes))

        def fit_within_memory(plan: BlockPlan, passes: PassOptions) -> list[PlacedBlock]:
            objective = regression.objective
            itemsize = objective.working_dtype.itemsize
            return fitted_in_groups(plan, passes, fit, itemsize, objective.device)

        if passes.sharded:
            blocks = sharded_blocks(regression, plan, passes, fit_within_memory)
        else:
            blocks = fit_within_memory(plan, passes)
        info: dict[str, Any] = {
            "kind": self.KIND,
            "options": options.as_dict(),
            "regression": regression.description,
            "data": regression.data_identity(),
            "left_out": coverage.left_out,
            "others": coverage.others,
            "fingerprint": fingerprint(model),
            "versions": versions(),
        }
        rounding = set(coverage.rounding)
        if not options.exact_bias:  # the block of a bias is then the factor of its weight
            mixed = [layer for layer in coverage.layers if not {*layer.params} <= rounding]
            rounding -= {name for layer in mixed for name in layer.params}
        if rounding:
            info["rounding"] = [name for name in coverage.params if name in rounding]
        super().__init__(ParameterSpace.of(coverage.params), blocks, info, passes.holders)

    @staticmethod
    def _fit(
        regression: NoisedRegression, plan: BlockPlan, passes: PassOptions
    ) -> dict[str, Block]:
        """Compute the blocks, by their key."""
        factors = fitted_factors(regression, plan, passes)
        blocks: dict[str, Block] = {}
        for part in plan.parts:
            B = factors.outputs[part.output_key]
            blocks[part.key] = (
                DenseBlock(B) if part.is_bias else KroneckerBlock(B, factors.inputs[part.input_key])
            )
        return blocks | exact_part(plan, factors)


def exact_part(plan: BlockPlan, factors: KroneckerFactors) -> dict[str, Block]:
    """The blocks without Kronecker form, by their key."""
    return {exact.key: exact.block(factors.exact[exact.key]) for exact in plan.exact}
