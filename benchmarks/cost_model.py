"""What would fit and score cost on networks of three sizes, on one GPU to a thousand? Computed.

Counted layer by layer on networks without weights, and by the library's own plan of them; nothing
here is measured. EK-FAC with one draw
of 50,000 images for the factors and 32,768 samples for the eigenvalues; scores of 64 queries with
16 draws of each image. The machine is assumed: 400 TFLOP/s for the network's own products (40 % of
a current accelerator's dense bfloat16), 50 TFLOP/s for products of factors in float32, 1 TFLOP/s
for eigendecompositions, 80 GB of memory, 50 GB/s between machines and 25 GB/s to the host.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.measure import arguments, report
from benchmarks.problems import cifar_unet
from curvlinops_diffusion.curvature.division import divided_units, needed_memory, num_groups
from curvlinops_diffusion.curvature.options import KFACOptions
from curvlinops_diffusion.curvature.plan import BlockPlan
from curvlinops_diffusion.layers import cover, covered_parameters
from curvlinops_diffusion.layers.kind import SharingKind

IMAGES, SECOND, QUERIES, DRAWS = 50_000, 32_768, 64, 16
NETWORK, FACTORS, EIGH = 400e12, 50e12, 1e12
MEMORY, WITHIN, BETWEEN, HOST = 80e9, 300e9, 50e9, 25e9
GPUS = (1, 8, 64, 1000)
#: Of a GPU's memory, for factors and what is made of them; the rest is the network's in bfloat16
#: and a training pass'.
LEFT = 60e9
SHARDS = 8


@dataclass(frozen=True)
class Matrix:
    """A layer's weight as a matrix, and the positions of one sample.

    Attributes:
        seen: Entries of one sample's input and output.
    """

    O: int
    I: int
    S: int
    seen: int


def cifar() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The CIFAR network of the paper."""
    return cifar_unet(quick=False), (torch.empty(1, 3, 32, 32), torch.zeros(1)), {}


def sdxl() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Stable Diffusion XL's denoiser at 1024×1024 pixels."""
    network = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    text = torch.empty(1, 77, 2048)
    inputs = (torch.empty(1, 4, 128, 128), torch.zeros(1), text)
    return network, inputs, {"added_cond_kwargs": added}


def flux() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A transformer of 12 billion parameters (Flux) at 1024×1024 pixels."""
    network = FluxTransformer2DModel(guidance_embeds=True)
    inputs = {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.zeros(1),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
        "guidance": torch.zeros(1),
    }
    return network, (), inputs


Build = Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]

NETWORKS: dict[str, Build] = {
    "CIFAR UNet": cifar,
    "SDXL": sdxl,
    "12-billion transformer": flux,
}


def matrices(
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]],
) -> list[Matrix]:
    """The weights of a network as matrices, with the positions that a forward pass sees."""
    found: list[Matrix] = []
    with torch.device("meta"), torch.no_grad():
        network, args, kwargs = build()
        layers = cover(network, dict(network.named_parameters())).layers
        for layer in layers:
            kind = layer.kind
            if layer.weight is None or not isinstance(kind, SharingKind) or kind.one_hot:
                continue

            def note(module: Any, args: Any, output: Any, kind: SharingKind = kind) -> None:
                *_, O, I = kind.matrix_shape(module)
                seen = args[0].numel() + output.numel()
                found.append(Matrix(O, I, kind.positions(module, args[0]), seen))

            layer.module.register_forward_hook(note)
        network(*args, **kwargs)
    return found


def rows(name: str, layers: list[Matrix]) -> list[dict[str, Any]]:
    """A row for each number of GPUs."""
    P = sum(m.O * m.I for m in layers)
    forward = sum(2 * m.S * m.O * m.I for m in layers)
    factor_bytes = 4 * sum(m.O**2 + m.I**2 for m in layers)
    moments = sum(m.S * (m.O**2 + m.I**2) for m in layers)  # symmetric: half of 2 S n²
    rotations = sum(min(2 * m.O * m.I * (m.O + m.I), 2 * m.S * (m.O**2 + m.I**2)) for m in layers)
    decompositions = sum(9 * (m.O**3 + m.I**3) for m in layers)
    largest = max(9 * max(m.O, m.I) ** 3 for m in layers)
    result = []
    for count in GPUS:
        first = IMAGES * (2 * forward / NETWORK + moments / FACTORS) / count
        eigen = max(decompositions / count, largest) / EIGH
        second = SECOND * (3 * forward / NETWORK + rotations / FACTORS) / count
        # a ring: each byte is sent about twice
        network_seconds = 2 * (2 * factor_bytes + 4 * P) / BETWEEN if count > 1 else 0.0
        per_gpu = (2 * factor_bytes + 8 * P) / count + 2 * P  # sharded by layer; weights in bf16
        offloaded = max(0.0, per_gpu - MEMORY)
        moved = 2 * offloaded / HOST
        scores = IMAGES * (DRAWS * 3 * forward / NETWORK + 2 * QUERIES * P / FACTORS) / count
        result.append(
            {
                "network": name,
                "GPUs": count,
                "parameters": f"{P / 1e6:,.0f} M",
                "factors": f"{factor_bytes / 1e9:,.1f} GB",
                "memory for each GPU": f"{per_gpu / 1e9:,.1f} GB",
                "to the host": f"{offloaded / 1e9:,.0f} GB",
                "factor pass": _hours(first),
                "eigendecompositions": _hours(eigen),
                "eigenvalue pass": _hours(second),
                "between machines": _hours(network_seconds + moved),
                "64 queries": _hours(scores),
                "query gradients": f"{4 * QUERIES * P / count / 1e9:,.1f} GB",
            }
        )
    return result


def to_device(name: str, layers: list[Matrix]) -> dict[str, Any]:
    """The cost of dividing a pass' images where factors are divided by layer.

    Either what layers see, or each batch's sums, would go to the process that has the layer. It is
    worth it if that takes less than the network's own passes, which each process does for itself
    otherwise.
    """
    passes = sum(2 * 2 * m.S * m.O * m.I for m in layers) / NETWORK
    seen = 2 * sum(m.seen for m in layers)  # in bfloat16
    sums = 4 * sum(m.O**2 + m.I**2 for m in layers)
    return {
        "network": name,
        "its own passes, a sample": f"{passes * 1e3:,.2g} ms",
        "what layers see, a sample": f"{seen / 1e6:,.0f} MB",
        **{f"at {b / 1e9:.0f} GB/s": f"{seen / b * 1e3:,.2g} ms" for b in (WITHIN, BETWEEN)},
        "sums, a batch": f"{sums / 1e9:,.1f} GB",
        f"at {WITHIN / 1e9:.0f} GB/s, a sample of 32": f"{sums / WITHIN / 32 * 1e3:,.2g} ms",
    }


def counted(
    name: str, build: Build, rank: int | None = None, **kfac_options: Any
) -> dict[str, Any]:
    """Count bytes, groups and shards of a network of full size, by the library's own plan.

    Args:
        name: What the row is called.
        build: Makes the network.
        rank: Of adapters on its attention, which alone are covered; ``None`` for all parameters.
        kfac_options: How the blocks are approximated.
    """
    with torch.device("meta"):
        network = build()[0]
    params: list[str] | None = None
    if rank is not None:
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        with torch.device("meta"):
            inject_adapter_in_model(config, network)
        params = [name for name, _ in network.named_parameters() if "lora_" in name]
    plan = BlockPlan.of(covered_parameters(network, params), KFACOptions(**kfac_options))
    shards = divided_units(plan, SHARDS)
    kept = [4 * sum(unit.entries + unit.parameters for unit in units) for units in shards]
    # a layer is more than an even share from so many shards on
    floor = sum(kept) // (4 * max(unit.entries + unit.parameters for unit in plan.units)) + 1
    return {
        "network": name,
        "parameters": f"{sum(unit.parameters for unit in plan.units) / 1e6:,.0f} M",
        "blocks": f"{len(plan.parts) + len(plan.exact):,}",
        "factors": f"{4 * plan.num_entries / 1e9:,.1f} GB",
        "a fit, beside network and training pass": f"{needed_memory(plan.units, 4) / 1e9:,.1f} GB",
        "groups of layers on one GPU": num_groups(plan, int(LEFT), 4),
        "an eighth of what is kept": f"{sum(kept) / SHARDS / 1e9:,.1f} GB",
        "the largest of eight shards": f"{max(kept) / 1e9:,.1f} GB",
        "while it decomposes": f"{max(needed_memory(u, 4) for u in shards) / 1e9:,.1f} GB",
        "a layer is the largest shard from": f"{floor} shards on",
    }


def _hours(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:,.3g} h"


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    warnings.simplefilter("ignore")
    names = ["CIFAR UNet"] if options.quick else list(NETWORKS)
    layers = {name: matrices(NETWORKS[name]) for name in names}
    table = [row for name in names for row in rows(name, layers[name])]
    plans = [counted(name, NETWORKS[name]) for name in names]
    if not options.quick:
        factored = {"exact_bias": False}
        plans += [
            counted(f"{name}, exact_bias=False", NETWORKS[name], **factored) for name in names
        ]
        plans.append(counted("12-billion transformer, adapters of rank 16", flux, rank=16))
    sending = [to_device(name, layers[name]) for name in names]
    results = {"computed": table, "counted": plans, "sent": sending}
    report(options, "cost_model", __doc__, results)


if __name__ == "__main__":
    main()
