"""How much of each network is covered, and how near are K-FAC and EK-FAC to the exact GGN?

Tiny random networks, float64, every loss vector (type-2). Errors are relative Frobenius errors
against the exact block-diagonal GGN. Cosines are those of damped inverse-vector products with the
exact block-diagonal GGN's, and with the exact GGN's, for a gradient of the loss; the damping is a
tenth of the mean of the GGN's eigenvalues that are not zero for lack of draws.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity

from benchmarks.measure import arguments, report
from benchmarks.models import MODELS, problem
from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from curvlinops_diffusion.linalg.placement import PlacedBlock

DAMPING = 0.1  # of the exact GGN's trace over its rank


def ggn_rows(regression: NoisedRegression) -> dict[str, Tensor]:
    """``R`` with ``G = Rᵀ R``, in pieces ``[N R D, *shape]`` by parameter."""
    named = dict(regression.objective.model.requires_grad_(True).named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with sdpa_kernel(SDPBackend.MATH):
        for batch in regression.batches():
            prediction = regression.objective.predict(batch)
            for b, entries in enumerate(prediction):
                scale = (2 * batch.weight_B[b] / regression.num_samples).sqrt()
                for entry in entries:
                    gradients = torch.autograd.grad(
                        scale * entry, list(named.values()), retain_graph=True, allow_unused=True
                    )
                    for (name, p), g in zip(named.items(), gradients, strict=True):
                        rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(found).detach() for name, found in rows.items()}


def squared_error(placed: PlacedBlock, R: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``‖F − RᵀR‖²`` and ``‖RᵀR‖²`` of a block, without forming matrices of the block's size.

    ``‖F‖² − 2 tr(R F Rᵀ) + ‖R Rᵀ‖²``.
    """
    own = {name: R[name].movedim(0, -1) for name in placed.params}
    product = placed.multiply(own)
    flat = torch.cat([R[name].flatten(1) for name in placed.params], 1)
    inner = torch.stack([(own[name] * product[name]).sum() for name in placed.params]).sum()
    exact = (flat @ flat.T).square().sum()
    return placed.block.squared_frobenius_norm() - 2 * inner + exact, exact


def exact_inverse_product(R: Tensor, damping: float, v: Tensor) -> Tensor:
    """``(RᵀR + λI)⁻¹ v`` by the Woodbury identity."""
    small = R @ R.T + damping * torch.eye(len(R), dtype=R.dtype)
    return (v - R.T @ torch.linalg.solve(small, R @ v)) / damping


def block_inverse_product(
    blocks: Sequence[PlacedBlock],
    R: dict[str, Tensor],
    damping: float,
    v: Tensor,
    names: Sequence[str],
) -> Tensor:
    """The damped inverse of the exact GGN's blocks, for the parameters' flattened order."""
    pieces = dict(zip(names, v.split([R[name][0].numel() for name in names]), strict=True))
    for placed in blocks:
        own = torch.cat([R[name].flatten(1) for name in placed.params], 1)
        product = exact_inverse_product(
            own, damping, torch.cat([pieces[name] for name in placed.params])
        )
        sizes = [len(pieces[name]) for name in placed.params]
        pieces.update(zip(placed.params, product.split(sizes), strict=True))
    return torch.cat([pieces[name] for name in names])


def relative_error(blocks: Sequence[PlacedBlock], R: dict[str, Tensor]) -> float:
    """Over all blocks together."""
    errors, norms = zip(*(squared_error(placed, R) for placed in blocks), strict=True)
    return float((sum(errors) / sum(norms)).clamp(min=0).sqrt())


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    table = []
    for name in list(MODELS)[-1:] if options.quick else MODELS:
        regression = problem(name, num_draws=2 if options.quick else 4)
        model = regression.objective.model
        K = DiffusionKFACLinearOperator(regression, fisher_type="type-2")
        EK = DiffusionEKFACLinearOperator(regression, fisher_type="type-2")
        R = ggn_rows(regression)
        flat = torch.cat([R[name].flatten(1) for name in EK.param_names], 1)
        damping = DAMPING * float(flat.square().sum()) / len(flat)
        v = ExampleGradientLinearOperator(regression, EK.param_names).rows([0])[0]
        exact = exact_inverse_product(flat, damping, v)
        by_blocks = block_inverse_product(EK.blocks, R, damping, v, EK.param_names)
        approximations = {
            "KFAC": K.inverse(damping) @ v,
            "EKFAC": EK.inverse(damping) @ v,
            "no_curvature": v,
        }
        parameters = sum(p.numel() for p in model.parameters())
        kinds = Counter(placed.kind for placed in K.blocks)
        table.append(
            {
                "network": name,
                "parameters": parameters,
                "covered": f"{EK.shape[0] / parameters:.2%}",
                "blocks": ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
                "error_KFAC": round(relative_error(K.blocks, R), 3),
                "error_EKFAC": round(relative_error(EK.blocks, R), 3),
            }
            | {
                f"cosine_with_{against}_{label}": round(cosine_similarity(u, truth, 0).item(), 3)
                for against, truth in (("blocks", by_blocks), ("exact", exact))
                for label, u in approximations.items()
            }
        )
    report(options, "coverage", __doc__, {"relative_damping": DAMPING, "networks": table})


if __name__ == "__main__":
    main()
