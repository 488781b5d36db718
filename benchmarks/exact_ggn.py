"""How near are K-FAC and EK-FAC to the exact GGN of a trained UNet? What does each assumption cost?

A UNet with attention of a few thousand parameters, trained on scikit-learn's digits; 64 of them,
eight draws each, all in float64 and with every loss vector (type-2), so that only the
approximations differ.

- Relative Frobenius errors by kind of block, against the exact block.
- The whole matrix: leaving out what is between blocks, and then replacing the blocks, apart.
- Cosines of damped inverse-vector products with the exact ones, mean over 32 gradients.
- Spectra: dense, by Lanczos' method, and the approximations'.
- The trace by band of noise levels.

Legend: P parameters, M rows (images, draws and outputs).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from curvlinops import lanczos_approximate_spectrum
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, mse_loss

from benchmarks.measure import arguments, report
from benchmarks.problems import example
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

DAMPINGS = tuple(10.0**e for e in range(-8, 2))
BANDS = 4
APPROXIMATIONS: dict[str, Any] = {
    "K-FAC": (DiffusionKFACLinearOperator, {}),
    "K-FAC, reduce": (DiffusionKFACLinearOperator, {"kfac_approx": "reduce"}),
    "K-FAC, Shampoo's factors": (DiffusionKFACLinearOperator, {"kfac_approx": "shampoo"}),
    "K-FAC, nearest": (DiffusionKFACLinearOperator, {"kfac_approx": "rank-one"}),
    "EK-FAC": (DiffusionEKFACLinearOperator, {}),
    "EK-FAC, reduce": (DiffusionEKFACLinearOperator, {"kfac_approx": "reduce"}),
    "EK-FAC, Shampoo's factors": (DiffusionEKFACLinearOperator, {"kfac_approx": "shampoo"}),
    "EK-FAC, nearest": (DiffusionEKFACLinearOperator, {"kfac_approx": "rank-one"}),
}


def trained_network(steps: int, width: int) -> tuple[UNet2DModel, Tensor]:
    """A small UNet, and the digits."""
    x0, _ = example("influence_digits").digits()
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(width, width),
        layers_per_block=1,
        norm_num_groups=1,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        clean = x0[torch.randint(len(x0), (128,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (128,))
        loss = mse_loss(network(scheduler.add_noise(clean, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.double().eval(), x0.double()


def ggn_rows(regression: NoisedRegression) -> tuple[Tensor, Tensor]:
    """``R`` with ``G = Rᵀ R``, ``[M, P]``, and the noise level of each row."""
    network = regression.objective.model
    params = {name: p.detach() for name, p in network.named_parameters()}

    def prediction(params: Any, x: Tensor, t: Tensor) -> Tensor:
        return functional_call(network, params, (x[None], t[None])).sample.flatten()  # type: ignore

    jacobians = vmap(jacrev(prediction), (None, 0, 0), chunk_size=16)
    rows, levels = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in regression.batches():
            found = jacobians(params, batch.x_t, batch.timestep_B)
            flat_BDP = torch.cat([J.flatten(2) for J in found.values()], 2)
            scale_B = (2 * batch.weight_B / regression.num_samples).sqrt()
            rows.append((scale_B[:, None, None] * flat_BDP).flatten(0, 1))
            levels.append(batch.level_B.repeat_interleave(flat_BDP.shape[1]))
    return torch.cat(rows), torch.cat(levels)


def kind_of(name: str) -> str:
    """What a block belongs to."""
    if name.endswith("bias"):
        return "biases"
    if "norm" in name:
        return "norms"
    if "time_emb" in name:
        return "time embedding"
    return "attention" if "attentions" in name else "convolutions"


def dense(operator: Any, P: int) -> Tensor:
    """The matrix of an operator."""
    columns = [operator @ part for part in torch.eye(P).double().split(1024, 1)]
    return torch.cat(columns, 1)


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    network, x0 = trained_network(2, 2) if options.quick else trained_network(1000, 4)
    objective = DenoisingObjective(network, DDPMScheduler())
    images, draws = (2, 4) if options.quick else (64, 8)
    regression = NoisedRegression(objective, x0[:images], draws, batch_size=64)
    R_MP, level_M = ggn_rows(regression)
    G = R_MP.T @ R_MP
    P = len(G)
    operators = {
        name: kind(regression, fisher_type="type-2", **more)
        for name, (kind, more) in APPROXIMATIONS.items()
    }
    EK = operators["EK-FAC"]
    index, start = {}, 0
    for name, p in network.named_parameters():
        index[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    blocks = {
        placed.name: torch.cat([index[name] for name in placed.params]) for placed in EK.blocks
    }
    by_blocks = torch.zeros_like(G)
    for own in blocks.values():
        by_blocks[own.unsqueeze(1), own] = G[own.unsqueeze(1), own]
    matrices = {name: dense(operator, P) for name, operator in operators.items()}

    by_kind = []
    for kind in sorted({kind_of(name) for name in blocks}):
        chosen = [own for name, own in blocks.items() if kind_of(name) == kind]
        norm = sum(float(by_blocks[o.unsqueeze(1), o].square().sum()) for o in chosen) ** 0.5
        row: dict[str, Any] = {"blocks": kind, "number": len(chosen)}
        row["share_of_trace"] = round(
            sum(float(G.diagonal()[o].sum()) for o in chosen) / float(G.trace()), 4
        )
        for name, F in matrices.items():
            square = sum(float((F - by_blocks)[o.unsqueeze(1), o].square().sum()) for o in chosen)
            row[name] = round(square**0.5 / norm, 4)
        by_kind.append(row)
    size = G.norm()
    whole = {"between blocks, left out": (G - by_blocks).norm() / size}
    for name, F in matrices.items():
        whole[f"{name}, within blocks"] = (F - by_blocks).norm() / size
        whole[f"{name}, in all"] = (F - G).norm() / size

    chosen_rows = 2 if options.quick else 32
    right_PK = (
        ExampleGradientLinearOperator(
            NoisedRegression(objective, x0[-chosen_rows:], 4 if options.quick else 64, 1)
        )
        .rows()
        .T
    )
    exact = torch.linalg.eigh(G)
    of_blocks = {name: torch.linalg.eigh(G[o.unsqueeze(1), o]) for name, o in blocks.items()}
    cosines = []
    for damping in DAMPINGS:
        truth = _solved(exact, damping, right_PK)
        found = {"no curvature": right_PK, "exact blocks": torch.empty_like(right_PK)}
        for name, own in blocks.items():
            found["exact blocks"][own] = _solved(of_blocks[name], damping, right_PK[own])
        found |= {name: F.inverse(damping) @ right_PK for name, F in operators.items()}
        similar = {name: cosine_similarity(x, truth, 0).mean() for name, x in found.items()}
        cosines.append(
            {"damping": damping} | {name: round(float(c), 4) for name, c in similar.items()}
        )

    quantiles = torch.tensor([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]).double()
    labels = [f"{q:g}" for q in quantiles.tolist()]
    spectra = {"exact": exact.eigenvalues}
    spectra["exact blocks"] = torch.cat([found.eigenvalues for found in of_blocks.values()])
    spectra |= {name: operator.eigenvalues() for name, operator in operators.items()}
    largest = float(exact.eigenvalues[-1])
    grid, density = lanczos_approximate_spectrum(
        DiffusionGGNLinearOperator(regression, chunk_size=8),
        4 if options.quick else 64,
        num_points=512,
        boundaries=(0.0, largest),
    )
    share = [float((exact.eigenvalues > x * largest).double().mean()) for x in (0.01, 0.1)]
    total = density.sum()
    lanczos = [float(density[grid > x * largest].sum() / total) for x in (0.01, 0.1)]

    T = objective.process.num_levels
    squares_M = R_MP.square().sum(1)
    bands = []
    for band in range(BANDS):
        levels = range(band * T // BANDS, (band + 1) * T // BANDS)
        inside = (level_M >= levels.start) & (level_M < levels.stop)
        bands.append(
            {
                "levels": f"{levels.start} to {levels.stop - 1}",
                "trace": round(float(squares_M[inside].sum() / inside.double().mean()), 3),
            }
        )
    report(
        options,
        "exact_ggn",
        __doc__,
        {
            "by_kind": by_kind,
            "parameters": P,
            "whole": {name: round(float(value), 4) for name, value in whole.items()},
            "cosines": cosines,
            "spectra": {
                name: dict(zip(labels, values.quantile(quantiles).tolist(), strict=True))
                for name, values in spectra.items()
            },
            "share_of_eigenvalues_above_1_and_10_percent_of_the_largest": {
                "dense": share,
                "Lanczos": lanczos,
            },
            "bands": bands,
        },
    )


def _solved(decomposition: Any, damping: float, right: Tensor) -> Tensor:
    values, vectors = decomposition
    scale = 1 / (values.clamp(min=0) + damping)
    result: Tensor = vectors @ (scale.unsqueeze(1) * (vectors.T @ right))
    return result


if __name__ == "__main__":
    main()
