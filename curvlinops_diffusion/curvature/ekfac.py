"""EK-FAC of a diffusion model: K-FAC's eigenbasis with the exact second moments in it."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor
from tqdm import tqdm

from curvlinops_diffusion.curvature.gradient_moments import eigenvalue_moments, fitted_factors
from curvlinops_diffusion.curvature.kfac import DiffusionKFACLinearOperator
from curvlinops_diffusion.curvature.kronecker_factors import KroneckerFactors
from curvlinops_diffusion.curvature.options import KFACApprox, KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.diffusion.regression import NoisedRegression
from curvlinops_diffusion.linalg.blocks import Block, EigenBlock
from curvlinops_diffusion.linalg.factors import Eigendecomposition, alike, eigendecompositions
from curvlinops_diffusion.runtime.passes import PassOptions, computed_once
from curvlinops_diffusion.runtime.processes import Processes, divided
from curvlinops_diffusion.runtime.sums import within


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
    :class:`~curvlinops_diffusion.DiffusionKFACLinearOperator`, except that
    ``fisher_type='forward-only'`` does not exist: it has no gradients.

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
        if not plan.options.has_gradients:
            raise ValueError(
                "`fisher_type` must be 'mc', 'type-2' or 'empirical' for EK-FAC, which needs "
                "gradients, got 'forward-only'. Or use DiffusionKFACLinearOperator."
            )
        factors = fitted_factors(regression, plan, passes)
        input_bases, output_bases = _eigenbases(regression, factors, plan.options, passes)
        second = regression.with_draws(plan.options.num_eigenvalue_draws(regression))
        eigenvalues = eigenvalue_moments(second, plan, input_bases, output_bases, passes)
        blocks: dict[str, Block] = {}
        for part in plan.parts:
            U_A = None if part.is_bias else input_bases[part.input_key].vectors
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
    named = [(side, key) for side, own in sides.items() for key in own]
    pieces = {f"{side}/{key}": sides[side].pop(key) for side, key in named}
    device = regression.objective.device

    # means over positions, or other draws, may lack directions that gradients have; second moments
    # in a basis of rounding errors would have no meaning there
    other_draws = options.num_eigenvalue_draws(regression) != regression.num_draws
    lacking = options.kfac_approx is KFACApprox.REDUCE or other_draws
    shown = passes.progressbar and Processes.of(passes.distributed).rank == 0
    decomposed = partial(_decomposed, lacking, shown)

    def compute() -> dict[str, Tensor]:
        processes = Processes.of(passes.distributed)
        found = divided(processes, pieces, lambda M: M.numel() * M.shape[-1], decomposed, device)
        return {f"{key}/{role}": z for key, own in found.items() for role, z in own.items()}

    settings = {
        "options": options.as_dict(),
        "factors": {key: list(M.shape) for key, M in pieces.items()},
    }
    tensors = computed_once("eigenbases", regression, compute, passes, settings)
    bases: dict[str, dict[str, Eigendecomposition]] = {"input": {}, "output": {}}
    for side, key in named:
        own = within(f"{side}/{key}", tensors)
        bases[side][key] = Eigendecomposition(own["values"], own.get("vectors"))
    return bases["input"], bases["output"]


def _decomposed(
    settle_null: bool, shown: bool, factors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Decompose factors, which are taken out of ``factors``; small ones of one shape together."""
    results: dict[str, dict[str, Tensor]] = {}
    bar = tqdm(total=len(factors), desc="Eigenbases", unit="factors", disable=not shown)
    for keys in alike({key: factor.shape for key, factor in factors.items()}):
        named = {key: "The {} factor of '{}'".format(*key.split("/", 1)) for key in keys}
        found = eigendecompositions({named[k]: factors.pop(k) for k in keys}, settle_null)
        for key, one in zip(keys, found, strict=True):
            results[key] = {k: z for k, z in vars(one).items() if z is not None}
        bar.update(len(keys))
    bar.close()
    return results
