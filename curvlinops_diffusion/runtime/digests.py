"""Digests of models, tensors and functions: alike in every process, run and version of Python."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from textwrap import dedent
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops_diffusion.runtime.adapters import common_names
from curvlinops_diffusion.runtime.sharded_networks import full_tensor, is_sharded

# Attributes that objects are known by, and the packages whose objects have others than settings
_LASTING: tuple[type, ...] = (
    *(str, bytes, int, float, complex, tuple, torch.dtype),
    *(Tensor, np.ndarray, nn.Module, FunctionType),
)
_LIBRARIES = {"accelerate", "diffusers", "numpy", "tokenizers", "torch", "transformers"}
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


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Compute digests of a model: of its tensors' names and shapes, their values, and its settings.

    The name of a single adapter makes no difference.

    Returns:
        Hexadecimal digests under ``'structure'``, ``'weights'`` and ``'settings'``.
    """
    state = {k: z for k, z in model.state_dict().items() if isinstance(z, Tensor)}
    common = common_names(state)
    names = sorted(state, key=common.__getitem__)
    structure = "".join(f"{common[name]}:{tuple(state[name].shape)};" for name in names)

    def digest(name: str) -> bytes:
        return sha256(raw_bytes(full_tensor(state[name]))).digest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        # all processes must gather tensors that are sharded in the same order
        weights = list(map(digest, names) if is_sharded(model) else pool.map(digest, names))
    return {
        "structure": sha256(structure.encode()).hexdigest(),
        "weights": sha256(b"".join(weights)).hexdigest(),
        "settings": digest_of(settings_of(model)),
    }


def change_marks(model: nn.Module) -> list[Any]:
    """List what differs if a model may have changed: settings, and its tensors' memory and version.

    What is written through ``tensor.data`` is not seen.
    """

    def mark(z: Tensor) -> tuple[Any, ...]:
        try:
            memory = z.data_ptr()
        except RuntimeError:  # of a tensor without memory
            memory = 0
        return memory, z.dtype, None if z.is_inference() else z._version

    return [[mark(z) for z in [*model.parameters(), *model.buffers()]], settings_of(model)]


def name_of(value: Any) -> str:
    """Name a function, measurement or weighting, with a digest of what identifies it.

    A plain string is its own name. Functions are known by their module and qualified name,
    defaults, enclosed values and text (a lambda also by its place), or by an attribute ``key`` in
    place of the text: bytecode would change with Python. Other objects are known by their type and
    those of their attributes that are plain values, tuples, tensors, networks or functions; lists
    and mappings are left out, since objects keep what they have seen in them. Those of libraries, a
    pipeline say, are known by their type alone.
    """
    return value if isinstance(value, str) else f"{_kind(value)}:{digest_of(value)}"


def _kind(value: Any) -> str:
    """Return the name of a function or class, of other objects that of the class."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


class Named:
    """A function's name as it was at first, however it counts its calls or keeps what it has seen.

    Weights do not change by being used: those of networks within are looked at each time.

    Attributes:
        first: Its name without their weights.
        networks: The networks within.
    """

    def __init__(self, value: Any):
        self.networks: list[nn.Module] = []
        self.first = f"{_kind(value)}:{_digest(_parts((value,), set(), self.networks))}"

    def __str__(self) -> str:
        """Return the name, :func:`name_of` if there is no network within."""
        weights = [digest_of(*self.networks)] if self.networks else []
        return ":".join([self.first, *weights])


def digest_of(*values: Any) -> str:
    """Compute a short digest of tensors, models, functions, dataclasses, and plain values."""
    return _digest(_parts(values, set()))


def tensor_parts(tensor: Tensor) -> tuple[bytes, memoryview]:
    """Return the bytes that identify a tensor: precision and shape, and its entries."""
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode(), raw_bytes(tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the entries of a tensor as they lie in memory, row by row; not copied if they do."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = sha256()
    for part in parts:
        # with its length, so that parts do not run into each other
        digest.update(f"{len(part)};".encode())
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(
    value: Any, seen: set[int], networks: list[nn.Module] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the bytes that identify a value; networks are put into a list in place of theirs."""
    if isinstance(value, Tensor | np.ndarray):
        yield from tensor_parts(torch.as_tensor(value))
    elif isinstance(value, nn.Module) and networks is not None:
        networks.append(value)
    elif isinstance(value, nn.Module):
        yield repr(fingerprint(value)).encode()
    elif value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype):
        yield repr(value).encode()
    else:
        yield _kind(value).encode()
        if id(value) not in seen:  # functions may enclose themselves
            for inner in _inside(value):
                yield from _parts(inner, seen | {id(value)}, networks)


def _inside(value: Any) -> list[Any]:
    """List what identifies a function, a dataclass, a collection or an object beside its name."""
    match value:
        case FunctionType():
            place = _place(value.__code__) if value.__name__ == "<lambda>" else None
            enclosed = [_contents(cell) for cell in value.__closure__ or ()]
            key = getattr(value, "key", None)
            named = [value.__module__, key, place, None if key else _source(value)]
            return [*named, value.__defaults__, value.__kwdefaults__, *enclosed]
        case MethodType():
            return [value.__func__, value.__self__]
        case partial():
            return [value.func, value.args, value.keywords]
        case Mapping():
            return [(key, value[key]) for key in sorted(value, key=str)]
        case Sequence():
            return list(value)
        case Set():
            return sorted(value, key=repr)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, type) or type(value).__module__.partition(".")[0] in _LIBRARIES:
        return []
    own = getattr(value, "__dict__", {})
    return [(name, own[name]) for name in sorted(own) if isinstance(own[name], _LASTING)]


def _source(function: FunctionType) -> str | None:
    """Return the text of a user's function, alike in every version of Python, if it is kept."""
    if (function.__module__ or "").partition(".")[0] in {*_LIBRARIES, "curvlinops_diffusion"}:
        return None  # the name stands for all
    try:
        return dedent(inspect.getsource(function))
    except (OSError, TypeError, IndentationError):
        return None


def _place(code: CodeType) -> tuple[int, int, int]:
    """Say where a lambda, which has no name, stands in its file: its first line, and its end."""
    ends = [(end, column) for _, end, _, column in code.co_positions() if end and column]
    return code.co_firstlineno, *max(ends, default=(0, 0))


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def settings_of(model: Any) -> dict[str, Any]:
    """List settings of all modules, as plain values: layers' constants, configs, adapters' states.

    Entries of a config that have their default value are left out, so that a later version of a
    library, which knows more of them, finds the same.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    adapted: str | None = None  # the last one that was passed; a module's parts come after it
    for name, module in model.named_modules():
        inner = name if adapted is None else name.removeprefix(f"{adapted}.")
        if inner != name and not inner.startswith("base_layer"):
            continue  # of the adapter: its shapes, and the scale, say all
        if _adapters(module):
            adapted = name
        config = getattr(module, "config", None)
        own = {**_constants(module), **_adapters(module), **_tiles(module)}
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            own["config"] = _config(module, config)
        if own := {key: value for key, value in own.items() if value not in ({}, None)}:
            found[name] = own
    return found


def _constants(module: nn.Module) -> dict[str, Any]:
    """List kind and constants of a layer of torch's, which its weights do not show."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules.") and cls is not nn.Module:
            names = {*getattr(cls, "__constants__", ()), "num_heads"} - _NOT_DECIDING
            values = {key: getattr(module, key, None) for key in sorted(names)}
            return {"kind": cls.__name__, **{k: _plain(v) for k, v in values.items()}}
    return {}


def _adapters(module: Any) -> dict[str, Any]:
    """List the scales of an adapted layer of PEFT's, and which of its adapters are used."""
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
    """List the sizes of an autoencoder's tiles, at whose borders latents differ."""
    if not getattr(module, "use_tiling", False):
        return {}
    sizes = {k: v for k, v in vars(module).items() if k.startswith("tile_")}
    return {"tiles": _plain(dict(sorted(sizes.items())))}


def _config(module: nn.Module, config: Any) -> dict[str, Any]:
    """List the entries of a config that differ from their defaults."""
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
    """Return a plain value as it is, and of others the name of the type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__
