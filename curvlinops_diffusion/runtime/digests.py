"""Digests of models, tensors and functions: the same in every process and run, for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from threading import Lock
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from curvlinops_diffusion.runtime.adapters import common_names
from curvlinops_diffusion.runtime.ahead import beside
from curvlinops_diffusion.runtime.settings import settings_of
from curvlinops_diffusion.runtime.sharded_networks import gathered, is_sharded
from curvlinops_diffusion.runtime.unchanged import marks

# The latest digests of networks, and by what it is told that these have not changed
_latest: WeakKeyDictionary[nn.Module, tuple[list[Any], dict[str, str]]] = WeakKeyDictionary()
# Attributes that objects are known by, and the packages whose objects have others than settings
_LASTING: tuple[type, ...] = (
    *(str, bytes, int, float, complex, tuple, torch.dtype),
    *(Tensor, np.ndarray, nn.Module, FunctionType),
)
_LIBRARIES = {"accelerate", "diffusers", "numpy", "tokenizers", "torch", "transformers"}
# so that what a thread reads already is waited for, and not read a second time
_reading = Lock()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digests of a model: of its tensors' names and shapes, of their values, and of its settings.

    The name of a single adapter makes no difference. The weights are read once, until they change.

    Args:
        model: The model.

    Returns:
        Hexadecimal digests under ``'structure'``, ``'weights'`` and ``'settings'``.
    """
    return {**_read_once(model, _tensors(model)), **_settings(model)}


def fingerprint_beside(model: nn.Module, device: torch.device) -> Callable[[], dict[str, str]]:
    """Start to read a model's digests beside other work, which changes nothing in it.

    Weights take a second for every gigabyte, which is a training pass of a large network.

    Returns:
        Waits for what :func:`fingerprint` returns.
    """
    # the tensors are looked up now, since a pass may put others in their place for a while
    tensors, settings = _tensors(model), _settings(model)

    def read() -> dict[str, str]:
        return {**_read_once(model, tensors), **settings}

    # what is gathered from all processes must be so in order
    return read if is_sharded(model) else beside(read, device)


def _settings(model: nn.Module) -> dict[str, str]:
    """A digest of what decides besides the weights: layers' constants, configs, adapters' scale."""
    return {"settings": digest_of(settings_of(model))}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: z for k, z in model.state_dict().items() if isinstance(z, Tensor)}


def _read_once(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """A model's digests, from its tensors by name if these are not as they were."""
    if is_sharded(model):  # all processes must gather alike
        return _digests(state)
    with _reading:
        now = marks(state)
        before, found = _latest.get(model, (None, {}))
        if now != before:
            found = _digests(state)
            _latest[model] = now, found
        return dict(found)


def _digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Those of a model's tensors by name."""
    structure, weights = sha256(), sha256()
    common = common_names(state)
    for key in sorted(state, key=common.__getitem__):
        name, tensor = common[key], state[key]
        structure.update(f"{name}:{tuple(tensor.shape)};".encode())
        weights.update(raw_bytes(gathered(tensor)))
    return {"structure": structure.hexdigest(), "weights": weights.hexdigest()}


def name_of(value: Any) -> str:
    """Name a function, measurement or weighting, with a digest of what it is made of.

    Two functions of one name but other code, defaults or enclosed values have other digests. A
    plain string is its own name. Other objects are known by their type and those of their
    attributes that are plain values, tuples, tensors, networks or functions; lists and mappings are
    left out, since objects keep what they have seen in them. Those of libraries, a pipeline say,
    are known by their type alone.
    """
    if isinstance(value, str):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name}:{digest_of(value)}"


class Named:
    """Name a function as it was at first, however it counts its calls or keeps what it has seen.

    Weights do not change by being used: those of networks within are looked at each time.

    Args:
        value: The function, or an object that is called.

    Attributes:
        first: Its name without their weights.
        networks: The networks within.
    """

    def __init__(self, value: Any):
        self.networks: list[nn.Module] = []
        name = getattr(value, "__qualname__", type(value).__qualname__)
        self.first = f"{name}:{_digest(_parts((value,), set(), self.networks))}"

    def __str__(self) -> str:
        """The name, :func:`name_of` if there is no network within."""
        weights = [digest_of(*self.networks)] if self.networks else []
        return ":".join([self.first, *weights])


def digest_of(*values: Any) -> str:
    """A short digest of values: tensors, models, functions, dataclasses, and plain ones."""
    return _digest(_parts(values, set()))


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
    """The bytes that a value is known by.

    Args:
        value: The value.
        seen: Identities of the functions on the way to it, which may enclose themselves.
        networks: Where networks are put, whose bytes are left out then.
    """
    if isinstance(value, Tensor | np.ndarray):
        yield from tensor_parts(torch.as_tensor(value))
    elif isinstance(value, nn.Module) and networks is not None:
        networks.append(value)
    elif isinstance(value, nn.Module):
        yield repr(fingerprint(value)).encode()
    elif value is None or isinstance(value, str | bytes | int | float | complex | torch.dtype):
        yield repr(value).encode()
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__).encode()
        if id(value) not in seen:
            for inner in _inside(value):
                yield from _parts(inner, seen | {id(value)}, networks)


def _inside(value: Any) -> list[Any]:
    """List what a function, a dataclass or a collection is made of; nothing for anything else."""
    match value:
        case FunctionType():
            enclosed = [_contents(cell) for cell in value.__closure__ or ()]
            return [value.__code__, value.__defaults__, value.__kwdefaults__, *enclosed]
        case CodeType():
            return [value.co_code, value.co_names, value.co_consts]
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


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def tensor_parts(tensor: Tensor) -> tuple[bytes, memoryview]:
    """What a tensor is known by: precision and shape, and its entries."""
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode(), raw_bytes(tensor)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The entries of a tensor as they lie in memory, row by row; not copied if they do so."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
