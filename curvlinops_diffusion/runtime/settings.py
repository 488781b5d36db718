"""Settings of a network that decide what it computes, and that its weights do not show."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

# Constants of torch's layers that the shapes of weights show already, or that evaluation ignores
_NOT_DECIDING = {
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size"),
    *("num_features", "num_embeddings", "embedding_dim", "p", "inplace", "track_running_stats"),
}
# Entries of a config that say where a network is from, or how it is trained or stored
_ORIGIN = {
    *("name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("model_type", "use_cache", "gradient_checkpointing", "sample_size", "return_dict"),
}


def settings_of(model: Any) -> dict[str, Any]:
    """Settings of all modules, as plain values: layers' constants, configs, adapters' states.

    Entries of a config that have their default value are left out, so that a later version of a
    library, which knows more of them, finds the same.

    Args:
        model: The network.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    adapted: str | None = None  # the last one that was passed; a module's parts come after it
    for name, module in model.named_modules():
        if adapted is not None and _is_part(name, adapted):
            continue  # its shapes, and the scale, say all, and its name has the adapter's in it
        if _adapters(module):
            adapted = name
        config = getattr(module, "config", None)
        own = {**_constants(module), **_adapters(module), **_tiles(module)}
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            own |= {"config": _config(module, config)}
        own = {key: value for key, value in own.items() if value not in ({}, None)}
        if own:
            found[name] = own
    return found


def _is_part(name: str, layer: str) -> bool:
    """Whether a module is one of those that adapters add to a layer."""
    inner = name.removeprefix(f"{layer}.")
    return inner != name and not inner.startswith("base_layer")


def _constants(module: nn.Module) -> dict[str, Any]:
    """The kind and the constants of a layer of torch's: two of them may have the same weights."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Module:
            names = {*getattr(cls, "__constants__", ()), "num_heads"} - _NOT_DECIDING
            values = {key: getattr(module, key, None) for key in sorted(names)}
            return {"kind": cls.__name__, **{k: _plain(v) for k, v in values.items()}}
    return {}


def _adapters(module: Any) -> dict[str, Any]:
    """The scales of an adapted layer of PEFT's, which of its adapters are used, and how."""
    scaling = getattr(module, "scaling", None)
    if not isinstance(scaling, Mapping) or not hasattr(module, "active_adapters"):
        return {}
    active = list(module.active_adapters)
    if len(scaling) == 1:  # by whatever name
        scaling, active = {"default": next(iter(scaling.values()))}, ["default"] * len(active)
    return {
        "scaling": {name: _plain(value) for name, value in sorted(scaling.items())},
        "active": sorted(active),
        "disabled": bool(getattr(module, "disable_adapters", False)),
        "merged": len(getattr(module, "merged_adapters", [])),
    }


def _tiles(module: nn.Module) -> dict[str, Any]:
    """The tiles that an autoencoder works in, if it does: where they meet, latents differ."""
    if not getattr(module, "use_tiling", False):
        return {}
    sizes = {k: v for k, v in vars(module).items() if k.startswith("tile_")}
    return {"tiles": _plain(dict(sorted(sizes.items())))}


def _config(module: nn.Module, config: Any) -> dict[str, Any]:
    """The entries of a config that differ from their defaults."""
    if hasattr(config, "to_diff_dict"):  # of transformers
        entries = config.to_diff_dict()
    elif isinstance(config, Mapping):  # of diffusers
        parameters = inspect.signature(type(module).__init__).parameters
        entries = {
            key: value
            for key, value in config.items()
            if key not in parameters or _plain(value) != _plain(parameters[key].default)
        }
    else:
        return {}
    return {
        key: _plain(value)
        for key, value in sorted(entries.items())
        if not (key.startswith("_") or key in _ORIGIN or "dropout" in key)
    }


def _plain(value: Any) -> Any:
    """A value as it is, or the name of its type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__
