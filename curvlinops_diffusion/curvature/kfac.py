"""K-FAC and EK-FAC of a diffusion model, averaged over examples, timesteps and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion.curvature.division import fitted_blocks
from curvlinops_diffusion.curvature.kronecker_factors import (
    KroneckerFactors,
    eigenvalue_moments,
    fitted_factors,
)
from curvlinops_diffusion.curvature.options import KFACApprox, KFACOptions, with_kfac_options
from curvlinops_diffusion.curvature.plan import BlockPlan, prepare
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.blocks import Block, DenseBlock, EigenBlock, KroneckerBlock
from curvlinops_diffusion.linalg.factors import Eigendecomposition, alike, eigendecompositions
from curvlinops_diffusion.linalg.parameters import Parameters, ParameterSpace
from curvlinops_diffusion.runtime.digests import fingerprint
from curvlinops_diffusion.runtime.passes import PLAIN, PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import Processes, divided
from curvlinops_diffusion.runtime.sums import prefixed


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
        info: Options, draws, coverage (``others``: what
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
        plan = prepare(regression, params, KFACOptions(**options))
        weights = fingerprint(regression.objective.model)
        passes = replace(passes, progressbar=progressbar or passes.progressbar)
        blocks = fitted_blocks(regression, plan, passes, self._fit)
        info = {"kind": self.KIND, **plan.info(regression), "fingerprint": weights}
        super().__init__(ParameterSpace.of(plan.coverage.params), blocks, info, passes.holders)

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
                DenseBlock(B) if part.is_bias else KroneckerBlock(B, factors.inputs[part.key])
            )
        return blocks | {exact.key: exact.block(factors.exact[exact.key]) for exact in plan.exact}


class DiffusionEKFACLinearOperator(DiffusionKFACLinearOperator):
    r"""EK-FAC of the GGN of a diffusion model's objective.

    With K-FAC's factors ``A = U_A α U_Aᵀ`` and ``B = U_B β U_Bᵀ``, a layer's block is::

        (U_B ⊗ U_A) diag(Λ) (U_B ⊗ U_A)ᵀ,    Λ_ij = E[(U_Bᵀ g U_A)_ij²]

    where ``g = Σ_s b_s a_sᵀ`` is the gradient of one example, draw and loss vector. Among all
    matrices that are diagonal in this basis it is the nearest to the exact block in Frobenius norm,
    and its trace is the exact block's. Costs a second pass over the data, on the same draws (or on
    fewer, see ``eigenvalue_draws``). Blocks without Kronecker form are K-FAC's, exact already.

    Source: George et al., 2018, Section 3.1; Mlodozeniec et al., 2025, Section 2.3.

    Arguments, attributes and errors are those of
    :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`.

    Examples:
        >>> EK = DiffusionEKFACLinearOperator(train)
        >>> EK.eigenvalues().shape == (EK.shape[0],)
        True
        >>> v = EK.inverse(damping=1e-2) @ torch.ones(EK.shape[1])
        >>> torch.allclose(EK @ v + 1e-2 * v, torch.ones(EK.shape[1]), atol=1e-3)
        True
    """

    KIND: ClassVar[str] = "ekfac"

    @staticmethod
    def _fit(
        regression: NoisedRegression, plan: BlockPlan, passes: PassOptions
    ) -> dict[str, Block]:
        """Compute the blocks, by their key."""
        factors = fitted_factors(regression, plan, passes)
        input_bases, output_bases = _eigenbases(regression, factors, plan.options, passes)
        second = regression.with_draws(plan.options.num_eigenvalue_draws(regression))
        eigenvalues = eigenvalue_moments(second, plan, input_bases, output_bases, passes)
        blocks: dict[str, Block] = {}
        for part in plan.parts:
            U_A = None if part.is_bias else input_bases[part.key].vectors
            U_B = output_bases[part.output_key].vectors
            blocks[part.key] = EigenBlock.of_second_moments(eigenvalues[part.key], U_B, U_A)
        return blocks | {exact.key: exact.block(factors.exact[exact.key]) for exact in plan.exact}


def _eigenbases(
    regression: NoisedRegression,
    factors: KroneckerFactors,
    options: KFACOptions,
    passes: PassOptions,
) -> tuple[dict[str, Eigendecomposition], dict[str, Eigendecomposition]]:
    """Decompose input and output factors, which are given away, divided among the processes.

    They are written to the checkpoint, too: eigenvectors of close eigenvalues depend on rounding,
    and the second moments must all be taken in one basis.
    """
    sides = {"input": factors.inputs, "output": factors.outputs}
    keys = {side: list(own) for side, own in sides.items()}
    pieces = {name: M for side, own in sides.items() for name, M in prefixed(side, own).items()}
    for own in sides.values():
        own.clear()
    # means over positions, or other draws, may lack directions that gradients have; second moments
    # in a basis of rounding errors would have no meaning there
    other_draws = options.num_eigenvalue_draws(regression) != regression.num_draws
    settle_null = options.kfac_approx is KFACApprox.REDUCE or other_draws
    processes = Processes.of(passes.distributed)
    shown = passes.progressbar and processes.rank == 0

    def decomposed(factors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Decompose factors, which are taken out of these; small ones of one shape together."""
        results: dict[str, dict[str, Tensor]] = {}
        with tqdm(total=len(factors), desc="Eigenbases", unit="factors", disable=not shown) as bar:
            for names in alike({name: factor.shape for name, factor in factors.items()}):
                what = {name: "The {} factor of '{}'".format(*name.split("/", 1)) for name in names}
                found = eigendecompositions({what[n]: factors.pop(n) for n in names}, settle_null)
                for name, one in zip(names, found, strict=True):
                    results[name] = {k: z for k, z in vars(one).items() if z is not None}
                bar.update(len(names))
        return results

    def compute() -> dict[str, Tensor]:
        device = regression.device
        found = divided(processes, pieces, lambda M: M.numel() * M.shape[-1], decomposed, device)
        return {f"{name}/{role}": z for name, own in found.items() for role, z in own.items()}

    shapes = {name: list(M.shape) for name, M in pieces.items()}
    settings = {"options": options.as_dict(), "factors": shapes}
    tensors = computed_once("eigenbases", regression, compute, passes, settings)

    def of_side(side: str) -> dict[str, Eigendecomposition]:
        return {
            key: Eigendecomposition(
                tensors[f"{side}/{key}/values"], tensors.get(f"{side}/{key}/vectors")
            )
            for key in keys[side]
        }

    return of_side("input"), of_side("output")
