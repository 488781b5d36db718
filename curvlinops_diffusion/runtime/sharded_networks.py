"""Networks whose parameters are divided among processes by ``fully_shard`` (FSDP2).

Each process holds a part of every parameter; a module's are gathered when it runs, and sharded
again afterwards. So all processes must run the network equally often, forward and backward, or they
wait for each other for ever.
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
    return next(_sharded_modules(model), None) is not None


def divide(model: nn.Module, device: torch.device) -> None:
    """Shard a whole network over all processes by ``fully_shard``: its blocks apart, then the rest.

    Blocks are the entries of its lists of modules, and other parts of it that are no smaller.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child]
    least = max(1, min(map(_size, blocks), default=1))
    others = [c for c in model.children() if c not in lists and _size(c) >= least]
    for block in [*blocks, *others]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def reshard(model: nn.Module) -> None:
    """Shard what was gathered: after a forward pass the outermost module's parameters are whole.

    They are gathered again when a backward pass needs them.
    """
    for module in _sharded_modules(model):
        module.reshard()  # type: ignore[operator]


def is_divided(tensor: Tensor) -> bool:
    """Tell whether this process holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather all of a tensor, on all processes together; as it is if it is not divided."""
    if not is_divided(tensor):
        return tensor
    return tensor.full_tensor()  # type: ignore[attr-defined]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor; all of it if it is not divided."""
    local: Tensor = tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
    return local


def nonzero(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of tensors with an entry that is not zero; synchronises once."""
    found = [full_tensor(z.norm()) != 0 if is_divided(z) else z.any() for z in tensors.values()]
    if not found:
        return set()
    flags = torch.stack([some.to(found[0].device) for some in found]).tolist()
    return {name for name, some in zip(tensors, flags, strict=True) if some}


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average a tensor over processes, as a training step averages gradients."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def device_of(parameter: Tensor) -> torch.device:
    """Return the device that a parameter is computed with; offloaded ones are elsewhere."""
    if not is_divided(parameter):
        return parameter.device
    kind = parameter.device_mesh.device_type  # type: ignore[attr-defined]
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def check_whole_parameters(model: nn.Module, what: str, instead: str) -> None:
    """Refuse what needs all parameters at once for a network that is divided."""
    if is_sharded(model):
        raise ValueError(
            f"{what} needs every parameter at once, and the network's are divided among processes "
            f"(fully_shard). {instead}"
        )
