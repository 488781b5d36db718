"""Networks whose parameters are divided among processes by ``fully_shard`` (FSDP2).

Each process holds a part of every parameter; a module's are gathered when it runs, and let go of
afterwards. So all processes must run the network equally often, forward and backward, or they wait
for each other for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist


def _sharded_modules(model: nn.Module) -> Iterator[nn.Module]:
    if not dist.is_available() or not dist.is_initialized():
        return  # nothing can be divided, and the import takes a while
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)  # from torch 2.6 on
    if kind is not None:
        yield from (module for module in model.modules() if isinstance(module, kind))


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a network's parameters are divided among processes by ``fully_shard``."""
    return any(True for _ in _sharded_modules(model))


def divide(model: nn.Module, device: torch.device) -> None:
    """Divide a network among all processes by ``fully_shard``: its blocks apart, then the rest.

    Blocks are the entries of its lists of modules, and other parts of it that are no smaller.

    Args:
        model: The network, whole on every process; its parameters are replaced.
        device: Where it is computed with.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child]
    least = min((_entries(block) for block in blocks), default=0)
    others = [child for child in model.children() if not isinstance(child, nn.ModuleList)]
    for block in [*blocks, *(child for child in others if _entries(child) >= max(1, least))]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _entries(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def let_go(model: nn.Module) -> None:
    """Divide what was gathered: after a forward pass the outermost module's parameters are whole.

    They are gathered again when a backward pass needs them.
    """
    for module in _sharded_modules(model):
        module.reshard()  # type: ignore[operator]


def is_divided(tensor: Tensor) -> bool:
    """Tell whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered by all processes together; as it is if it is not divided."""
    if not is_divided(tensor):
        return tensor
    every: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return every


def nonzero(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of tensors with an entry that is not zero; the device is waited for once."""
    found = [gathered(z.norm()) != 0 if is_divided(z) else z.any() for z in tensors.values()]
    told = torch.stack([some.to(found[0].device) for some in found]).tolist() if found else []
    return {name for name, some in zip(tensors, told, strict=True) if some}


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of what all processes have, as a training step takes it of gradients."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def device_of(parameter: Tensor) -> torch.device:
    """Where a parameter is computed with; offloaded ones are on the CPU until then."""
    if not is_divided(parameter):
        return parameter.device
    kind = parameter.device_mesh.device_type  # type: ignore[attr-defined]
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def check_whole_parameters(model: nn.Module, what: str, instead: str) -> None:
    """Check that what needs whole parameters at once is not asked of a divided network.

    Raises:
        ValueError: If it is.
    """
    if is_sharded(model):
        raise ValueError(
            f"{what} needs every parameter at once, and the network's are divided among processes "
            f"(fully_shard). {instead}"
        )
