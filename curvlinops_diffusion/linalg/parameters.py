"""Select the parameters that an operator acts on, and put them in order."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn

from curvlinops_diffusion.runtime.adapters import adapter_of
from curvlinops_diffusion.runtime.sharded_networks import device_of


@dataclass(frozen=True)
class ParameterSpace:
    """The space ``R^P`` of a choice of parameters, of which operators see names and shapes only.

    Attributes:
        shapes: The parameters' shapes by name, in order.
        dtype: Precision of vectors: the model's, but at least float32.
        device: Where vectors live.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> ParameterSpace:
        """The space of the given parameters.

        Raises:
            ValueError: If they live on several devices.
        """
        devices = {device_of(p) for p in params.values()}
        if len(devices) > 1:
            raise ValueError(
                f"The parameters live on {sorted(map(str, devices))}. Move the model to one device."
            )
        dtype = torch.float32
        for p in params.values():
            dtype = torch.promote_types(dtype, p.dtype)
        return cls({name: tuple(p.shape) for name, p in params.items()}, dtype, devices.pop())

    @property
    def sizes(self) -> list[int]:
        """The entries of each parameter, in order."""
        return [torch.Size(shape).numel() for shape in self.shapes.values()]


Parameters = Sequence[Tensor] | Sequence[str] | Mapping[str, Tensor] | None


def select_parameters(model: nn.Module, params: Parameters) -> dict[str, nn.Parameter]:
    """Resolve a user's choice of parameters to the model's own, by name.

    Args:
        model: The model.
        params: ``None`` for every floating-point parameter (whether or not it requires gradients),
            a sequence of the model's parameters or of their names, or a mapping from names to
            parameters. Names may be those of what wraps the model (``torch.compile``, data
            parallelism, PEFT, an average of weights), or those within the module that it wraps.

    Returns:
        The parameters by name, in the order given.

    Raises:
        ValueError: If nothing is selected, an entry is not a parameter of the model, is no
            floating-point tensor, or is given twice.
    """
    own = dict(model.named_parameters())
    if params is None:
        complex_ones = [name for name, p in own.items() if p.is_complex()]
        if complex_ones:
            warn(
                f"{len(complex_ones)} complex parameters are left out, the first being "
                f"'{complex_ones[0]}': derivatives are taken in real ones.",
                stacklevel=3,
            )
        return _with_entries({name: p for name, p in own.items() if p.is_floating_point()})
    if isinstance(params, str | Tensor | nn.Module) or not isinstance(params, Sequence | Mapping):
        raise ValueError(
            "`params` must be None for all that is supported, a list of the model's parameters or "
            f"of their names, or a dict from names to parameters, got {type(params).__name__}."
        )
    given = _names_of_mapping if isinstance(params, Mapping) else _names_of_sequence
    names = given(own, {id(p): name for name, p in own.items()}, params)
    if not names:
        raise ValueError("params is empty. Pass at least one parameter, or None for all.")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"params lists {twice} more than once. Pass each parameter once.")
    for name in names:
        if not own[name].is_floating_point():
            raise ValueError(f"Parameter '{name}' is {own[name].dtype}; leave it out of params.")
    return _with_entries({name: own[name] for name in names})


def _with_entries(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    if all(p.numel() == 0 for p in params.values()):
        shapes = {name: tuple(p.shape) for name, p in list(params.items())[:4]}
        raise ValueError(
            f"The parameters have no entries ({shapes}): their layers are of size zero. Pass at "
            "least one that has some."
        )
    return params


def _names_of_mapping(
    own: dict[str, nn.Parameter], name_of: dict[int, str], params: Any
) -> list[str]:
    for name, value in params.items():
        if id(value) not in name_of:
            _own_names(own, [name])
        if name_of.get(id(value)) != name and (id(value) not in name_of or name in own):
            raise ValueError(
                f"params['{name}'] is not the model's own parameter. Pass "
                "dict(model.named_parameters()) or a part of it."
            )
    return [name_of[id(value)] for value in params.values()]


def _names_of_sequence(
    own: dict[str, nn.Parameter], name_of: dict[int, str], params: Any
) -> list[str]:
    called = _own_names(own, [p for p in params if isinstance(p, str)])
    for position, p in enumerate(params):
        if not isinstance(p, str) and id(p) not in name_of:
            shape = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(
                f"params[{position}] ({shape}) is not a parameter of the model. Pass entries of "
                "model.parameters()."
            )
    return [called[p] if isinstance(p, str) else name_of[id(p)] for p in params]


# what wrappers put into the names of parameters: torch.compile, data parallelism, FSDP, activation
# checkpoints, Lightning
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"_forward_module|base_model\.model)\."
)


def _own_names(own: Collection[str], names: Sequence[str]) -> dict[str, str]:
    """The model's names of parameters that may be called as a wrapper does.

    Wrappers' parts of names make no difference, if no two parameters differ by them alone. All
    names may also be those within a module that the model wraps.

    Raises:
        ValueError: If a name is none of the model's, or may be that of several parameters.
    """
    if all(name in own for name in names):
        return {name: name for name in names}
    by_bare: dict[str, list[str]] = {}
    for name in own:
        by_bare.setdefault(_WRAPPERS.sub("", name), []).append(name)
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    fitting = [p for p in _wrapped(by_bare) if all(p + b in by_bare for b in bare.values())]
    if "" in fitting:
        fitting = [""]
    if not fitting:
        unknown = next(name for name in names if name not in own)
        if adapter_of(unknown) is not None and not any(map(adapter_of, own)):
            raise ValueError(
                f"params names '{unknown}', and the model has no adapter: it was unloaded, or "
                "merged and unloaded (unload_lora_weights, merge_and_unload), or belongs to "
                "another model (a text encoder, say). Load it into this model, without merging it."
            )
        alike = [name for name in own if name.endswith(f".{unknown}")] or [next(iter(own))]
        raise ValueError(
            f"params names '{unknown}', which the model does not have. Its parameters are called "
            f"like {alike[:4]}; see model.named_parameters()."
        )
    found = {name: [o for p in fitting for o in by_bare[p + b]] for name, b in bare.items()}
    for name, several in found.items():
        if len(several) > 1:
            raise ValueError(
                f"params names '{name}', which may be any of {several[:4]} of the model. Pass "
                "one of these; see model.named_parameters()."
            )
    return {name: several[0] for name, several in found.items()}


def _wrapped(names: Collection[str]) -> list[str]:
    """List the prefixes of modules that hold all parameters but those of what wraps them."""
    prefixes, inner = [""], list(names)
    while len(heads := {name.partition(".")[0] for name in inner if "." in name}) == 1:
        inner = [name.partition(".")[2] for name in inner if "." in name]
        prefixes.append(f"{prefixes[-1]}{heads.pop()}.")
    return prefixes
