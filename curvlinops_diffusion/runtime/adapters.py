"""Adapters of PEFT: names of their parameters, and whether they take part.

PEFT puts the name that an adapter has in a program into the names of its parameters
(``to_q.lora_A.default.weight``), and a file of its weights does not hold it: an adapter that was
called ``default`` in training may be called ``default_0`` when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from curvlinops_diffusion.runtime.modes import modules_of
from curvlinops_diffusion.runtime.sharded_networks import nonzero

# a part of an adapted layer, as PEFT calls it, followed by the adapter's name
_ADAPTER = re.compile(
    r"(?<=\.)(?P<part>lora_(?:A|B|mid|embedding_A|embedding_B|magnitude_vector)|lora_bias|"
    r"hada_\w+|lokr_\w+|ia3_l|oft_\w+|vera_lambda_\w+|modules_to_save)\.(?P<adapter>[^.]+)(?=\.|$)"
)
# what a factor is multiplied by, which is zero before training
_OTHER_FACTOR = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


def adapter_of(name: str) -> str | None:
    """Return the adapter that a parameter belongs to; ``None`` for none."""
    found = _ADAPTER.search(name)
    return found["adapter"] if found else None


def common_names(names: Iterable[str]) -> dict[str, str]:
    """Name each parameter as if the adapter were called ``default``, if there is only one.

    Args:
        names: All names of a model's parameters, or of a file's.
    """
    names = list(names)
    if len({adapter_of(name) for name in names} - {None}) != 1:
        return {name: name for name in names}
    return {name: _ADAPTER.sub(r"\g<part>.default", name) for name in names}


def common_list(names: Iterable[str]) -> list[str]:
    """Return the :func:`common_names` alone, in order."""
    return list(common_names(names).values())


def adapter_states(model: nn.Module) -> tuple[Any, ...]:
    """Tell which adapters of a model take part, and how much, as plain values to compare."""
    return tuple(
        (m.disable_adapters, tuple(_merged(m)), tuple(_active(m)), tuple(_scales(m).items()))
        for m in _adapted(model)
    )


def adapted_modules(model: nn.Module) -> list[Any]:
    """Return the modules with adapters at work that are not fused into the weights."""
    return [m for m in _adapted(model) if not (m.disable_adapters or _merged(m))]


def _adapted(model: nn.Module) -> list[Any]:
    modules = modules_of(model)
    types = set(filter(_is_adapted, {type(module) for module in modules}))  # each looked at once
    return [module for module in modules if type(module) in types]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Disable a model's adapters within the context.

    Those that are fused into the weights stay: PEFT would take them out for good.
    """
    active = adapted_modules(model)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for module in active:
            module.enable_adapters(False)
        yield
    finally:
        for module in active:
            module.enable_adapters(True)
        for name, parameter in model.named_parameters():  # which PEFT sets as well
            parameter.requires_grad_(trained[name])


def without_part(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Find parameters of adapters that have no part in the output: why, and what to call."""
    modules = dict(model.named_modules())
    reasons: dict[str, str] = {}
    others: dict[str, tuple[str, str, Tensor]] = {}
    for name in names:
        found = _ADAPTER.search(name)
        module = modules.get(name[: found.start() - 1]) if found else None
        if found and module is not None and _is_adapted(type(module)):
            adapter = found["adapter"]
            reason = _why_not(module, adapter)
            if reason:
                reasons[name] = reason
            elif found["part"] in _OTHER_FACTOR:
                factor = _OTHER_FACTOR[found["part"]]
                weight = getattr(module, factor)[adapter]
                others[name] = (factor, adapter, getattr(weight, "weight", weight))
    have = nonzero({name: weight for name, (*_, weight) in others.items()})
    for name, (factor, adapter, _) in others.items():
        if name not in have:
            reasons[name] = (
                f"{factor} of adapter '{adapter}' is zero, as before training: load the trained "
                "adapter if there is one"
            )
    return reasons


def _is_adapted(cls: type[nn.Module]) -> bool:
    """Tell whether modules are PEFT's; a network of diffusers has methods of these names."""
    own = (getattr(cls, name, None) for name in ("active_adapters", "disable_adapters"))
    return all(isinstance(one, property) for one in own)


def _merged(module: nn.Module) -> list[str]:
    return list(getattr(module, "merged_adapters", ()))


def _active(module: nn.Module) -> list[str]:
    active: Any = getattr(module, "active_adapters", ())
    return [active] if isinstance(active, str) else list(active)


def _scales(module: nn.Module) -> dict[str, float]:
    scales = getattr(module, "scaling", {})
    numbers = scales.items() if isinstance(scales, dict) else ()
    return {name: float(scale) for name, scale in numbers}


def _why_not(module: nn.Module, adapter: str) -> str:
    """Say why an adapter takes no part in the output of one of its modules; empty if it does."""
    if module.disable_adapters:
        return (
            "the adapters are disabled: call enable_lora() of the pipeline, or enable_adapters() "
            "of the network (enable_adapter_layers() of a PeftModel)"
        )
    merged = _merged(module)
    if merged:
        names = ", ".join(f"'{name}'" for name in merged)
        are = f"adapter {names} is" if len(merged) == 1 else f"adapters {names} are"
        return (
            f"{are} fused into the weights: call unfuse_lora() of the pipeline "
            "(unmerge_adapter() of a PeftModel)"
        )
    if adapter not in _active(module):
        return (
            f"adapter '{adapter}' is not active: call set_adapters('{adapter}') of the pipeline or "
            f"the network (set_adapter('{adapter}') of a PeftModel)"
        )
    if _scales(module).get(adapter) == 0:
        return (
            f"adapter '{adapter}' has the scale 0: call set_adapters('{adapter}', 1.0), or pass "
            "the scale of training"
        )
    return ""
