"""EK-FAC of a diffusion model: K-FAC's eigenbasis with the exact second moments in it."""

from __future__ import annotations

from typing import ClassVar

from curvlinops_diffusion.blocks import EigenBlock
from curvlinops_diffusion.factors import eigendecompositions
from curvlinops_diffusion.fisher import FisherType, KFACOptions
from curvlinops_diffusion.layers import Coverage
from curvlinops_diffusion.operators.kfac import DiffusionKFACLinearOperator, exact_part
from curvlinops_diffusion.placement import PlacedBlock
from curvlinops_diffusion.regression import NoisedRegression
from curvlinops_diffusion.statistics import eigenvalue_moments, kronecker_factors


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
    """

    KIND: ClassVar[str] = "ekfac"

    @staticmethod
    def _fit(
        regression: NoisedRegression, coverage: Coverage, options: KFACOptions, progressbar: bool
    ) -> list[PlacedBlock]:
        """Compute the blocks."""
        if options.fisher_type is FisherType.FORWARD_ONLY:
            raise ValueError(
                "fisher_type='forward-only' arrived. EK-FAC needs gradients: pass 'mc', 'type-2' "
                "or 'empirical', or use DiffusionKFACLinearOperator."
            )
        factors = kronecker_factors(regression, coverage, options, progressbar)
        input_bases = eigendecompositions(factors.inputs, "The input factor")
        output_bases = eigendecompositions(factors.outputs, "The output factor")
        second = regression.with_draws(options.num_eigenvalue_draws(regression))
        eigenvalues = eigenvalue_moments(
            second, coverage, input_bases, output_bases, options, progressbar
        )
        blocks = []
        for layer in coverage.layers:
            for part in layer.parts(options.separate_weight_and_bias, options.exact_bias):
                U_A = None if part.is_bias else input_bases[part.key].vectors
                block = EigenBlock(eigenvalues[part.key], output_bases[layer.name].vectors, U_A)
                blocks.append(PlacedBlock(part.key, part.params, block, part.kind.transposed))
        return blocks + exact_part(coverage, options, factors)
