"""K-FAC of a diffusion model, averaged over examples, timesteps and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from curvlinops_diffusion.curvature.division import fitted_blocks
from curvlinops_diffusion.curvature.gradient_moments import fitted_factors
from curvlinops_diffusion.curvature.options import KFACOptions, with_kfac_options
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.curvature.prepared import prepare
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, KroneckerBlock
from curvlinops_diffusion.linalg.parameters import Parameters
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
        progressbar: Whether to show progress.
        passes: Checkpoints of the passes over the data, and processes that share them.
        options: Whose curvature, and how it is approximated (``fisher_type``, ``kfac_approx``, …):
            see :class:`~curvlinops_diffusion.curvature.options.KFACOptions`.

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

    @with_kfac_options
    def __init__(
        self,
        regression: NoisedRegression,
        params: Parameters = None,
        *,
        progressbar: bool = False,
        passes: PassOptions = PLAIN,
        **options: Any,
    ):
        prepared = prepare(regression, params, KFACOptions(**options))
        passes = replace(passes, progressbar=progressbar or passes.progressbar)
        blocks = fitted_blocks(regression, prepared.plan, passes, self._fit)
        info = {"kind": self.KIND, **prepared.info(regression)}
        super().__init__(prepared.space, blocks, info, passes.holders)

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
        return blocks | {exact.key: exact.block(factors.exact[exact.key]) for exact in plan.exact}
