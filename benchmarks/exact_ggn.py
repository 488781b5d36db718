"""How near are K-FAC and EK-FAC to the exact GGN of a trained UNet? What does each assumption cost?

A UNet with attention of a few thousand parameters, trained on scikit-learn's digits; 64 of them,
eight draws each, all in float64 and with every loss vector (type-2), so that only the
approximations differ.

- Relative Frobenius errors by kind of block, against the exact block.
- The whole matrix: leaving out what is between blocks, and then replacing the blocks, apart.
- Cosines of damped inverse-vector products with the exact ones, mean over 32 gradients.
- The largest eigenvalues of the exact matrix and of its blocks.

With a ``--seed`` other than 0, of another network, other digits and other noise.

Legend: P parameters, M rows (images, draws and outputs).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)

DAMPINGS = tuple(10.0**e for e in range(-8, 2))
APPROXIMATIONS: dict[str, Any] = {
    "K-FAC": (DiffusionKFACLinearOperator, {}),
    "K-FAC, reduce": (DiffusionKFACLinearOperator, {"kfac_approx": "reduce"}),
    "K-FAC, Shampoo's factors": (DiffusionKFACLinearOperator, {"kfac_approx": "shampoo"}),
    "EK-FAC": (DiffusionEKFACLinearOperator, {}),
    "EK-FAC, reduce": (DiffusionEKFACLinearOperator, {"kfac_approx": "reduce"}),
    "EK-FAC, Shampoo's factors": (DiffusionEKFACLinearOperator, {"kfac_approx": "shampoo"}),
}


Tensors = Mapping[str, Tensor]
Decomposition = tuple[Tensor, Tensor]


def trained_network(steps: int, width: int, seed: int) -> tuple[UNet2DModel, Tensor]:
    """A small UNet, and the digits in an order of the seed."""
    x0, _ = example("influence_digits").digits()
    torch.manual_seed(seed)
    if seed:
        x0 = x0[torch.randperm(len(x0))]
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


def ggn_rows(regression: NoisedRegression) -> Tensor:
    """``R`` with ``G = Rᵀ R``, ``[M, P]``."""
    network = regression.objective.model
    params = {name: p.detach() for name, p in network.named_parameters()}

    def prediction(params: Any, x: Tensor, t: Tensor) -> Tensor:
        return functional_call(network, params, (x[None], t[None])).sample.flatten()

    jacobians = vmap(jacrev(prediction), (None, 0, 0), chunk_size=16)
    rows = []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in regression.batches():
            found = jacobians(params, batch.x_t, batch.timestep_B)
            flat_BDP = torch.cat([J.flatten(2) for J in found.values()], 2)
            scale_B = (2 * batch.weight_B / regression.num_samples).sqrt()
            rows.append((scale_B[:, None, None] * flat_BDP).flatten(0, 1))
    return torch.cat(rows)


def kind_of(name: str) -> str:
    """The kind of layer that a block belongs to."""
    if name.endswith("bias"):
        return "biases"
    if "norm" in name:
        return "norms"
    if "time_emb" in name:
        return "time embedding"
    return "attention" if "attentions" in name else "convolutions"


def of_kinds(blocks: Tensors) -> dict[str, list[Tensor]]:
    """The indices of the blocks of each kind."""
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(blocks, key=kind_of):
        kinds.setdefault(kind_of(name), []).append(blocks[name])
    return kinds


def indices_of(network: UNet2DModel, operator: DiffusionKFACLinearOperator) -> dict[str, Tensor]:
    """Where the parameters of each block are."""
    index, start = {}, 0
    for name, p in network.named_parameters():
        index[name] = torch.arange(start, start + p.numel())
        start += p.numel()
    return {
        placed.name: torch.cat([index[name] for name in placed.params])
        for placed in operator.blocks
    }


def dense(operator: Any, P: int) -> Tensor:
    """The matrix of an operator."""
    columns = [operator @ part for part in torch.eye(P).double().split(1024, 1)]
    return torch.cat(columns, 1)


def errors_by_kind(G: Tensor, blocks: Tensors, matrices: Tensors) -> list[dict[str, Any]]:
    """Relative Frobenius errors of the blocks of each kind."""
    rows = []
    for kind, chosen in of_kinds(blocks).items():
        share = sum(float(G.diagonal()[o].sum()) for o in chosen) / float(G.trace())
        row: dict[str, Any] = {"blocks": kind, "number": len(chosen)}
        row["share_of_trace"] = round(share, 4)
        size = _norm_within(G, chosen)
        for name, F in matrices.items():
            row[name] = round(_norm_within(F - G, chosen) / size, 4)
        rows.append(row)
    return rows


def _norm_within(X: Tensor, blocks: Sequence[Tensor]) -> float:
    return sum(float(X[o.unsqueeze(1), o].square().sum()) for o in blocks) ** 0.5


def errors_of_the_whole(G: Tensor, blocks: Tensors, matrices: Tensors) -> dict[str, float]:
    """Relative Frobenius errors: of leaving out what is between blocks, and of the blocks."""
    by_blocks, size = torch.zeros_like(G), G.norm()
    for own in blocks.values():
        by_blocks[own.unsqueeze(1), own] = G[own.unsqueeze(1), own]
    whole = {"between blocks, left out": (G - by_blocks).norm() / size}
    for name, F in matrices.items():
        whole[f"{name}, within blocks"] = (F - by_blocks).norm() / size
        whole[f"{name}, in all"] = (F - G).norm() / size
    return {name: round(float(value), 4) for name, value in whole.items()}


def cosines(
    exact: Decomposition,
    of_blocks: Mapping[str, Decomposition],
    blocks: Tensors,
    operators: Mapping[str, DiffusionKFACLinearOperator],
    right_PK: Tensor,
) -> list[dict[str, Any]]:
    """Cosines of damped inverse-vector products with the exact ones, at several dampings."""
    rows = []
    for damping in DAMPINGS:
        blockwise = torch.empty_like(right_PK)
        for name, own in blocks.items():
            blockwise[own] = _solved(of_blocks[name], damping, right_PK[own])
        found = {"no curvature": right_PK, "exact blocks": blockwise}
        found |= {name: F.inverse(damping) @ right_PK for name, F in operators.items()}
        rows.append({"damping": damping} | _cosines(found, _solved(exact, damping, right_PK)))
    return rows


def _cosines(found: Tensors, truth_PK: Tensor) -> dict[str, float]:
    return {
        name: round(float(cosine_similarity(X_PK, truth_PK, 0).mean()), 4)
        for name, X_PK in found.items()
    }


def _solved(decomposition: Decomposition, damping: float, right: Tensor) -> Tensor:
    values, vectors = decomposition
    scale = 1 / (values.clamp(min=0) + damping)
    return vectors @ (scale.unsqueeze(1) * (vectors.T @ right))


def main() -> None:
    """Run the program."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the network, the digits and noise")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seed = options.seed
    steps, width, images, draws, gradients, query_draws = (
        (2, 2, 2, 1, 2, 4) if options.quick else (1000, 4, 64, 8, 32, 64)
    )
    network, x0 = trained_network(steps, width, seed)
    objective = DenoisingObjective(network, DDPMScheduler())
    regression = NoisedRegression(objective, x0[:images], draws, 2 * seed, batch_size=64)
    R_MP = ggn_rows(regression)
    G = R_MP.T @ R_MP
    P = len(G)
    operators = {
        name: kind(regression, fisher_type="type-2", **more)
        for name, (kind, more) in APPROXIMATIONS.items()
    }
    blocks = indices_of(network, operators["EK-FAC"])
    matrices = {name: dense(operator, P) for name, operator in operators.items()}
    others = NoisedRegression(objective, x0[-gradients:], query_draws, 2 * seed + 1)
    right_PK = ExampleGradientLinearOperator(others).rows().T
    exact = torch.linalg.eigh(G)
    of_blocks = {name: torch.linalg.eigh(G[o.unsqueeze(1), o]) for name, o in blocks.items()}
    report(
        options,
        f"exact_ggn_seed_{seed}" if seed else "exact_ggn",
        __doc__,
        {
            "seed": seed,
            "by_kind": errors_by_kind(G, blocks, matrices),
            "parameters": P,
            "whole": errors_of_the_whole(G, blocks, matrices),
            "cosines": cosines(exact, of_blocks, blocks, operators, right_PK),
            "largest_eigenvalues": {
                "exact": float(exact.eigenvalues[-1]),
                "exact blocks": max(float(own.eigenvalues[-1]) for own in of_blocks.values()),
            },
        },
    )


if __name__ == "__main__":
    main()
