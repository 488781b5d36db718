"""Adapters: from the files that training wrote into the network, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from curvlinops_diffusion.loading.adapter_loading import load_adapter, replaced_message
from curvlinops_diffusion.loading.adapter_paths import ACCEPTED
from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.adapters import common_names
from curvlinops_diffusion.runtime.files import named_path


def load_adapters(
    given: Sequence[str], parts: Mapping[str, nn.Module], pipeline: Any
) -> dict[str, list[str]]:
    """Load adapters into the parts of a pipeline, and make all of them active.

    Args:
        given: Files or folders, each perhaps as ``name=path``.
        parts: The networks, the denoiser first, by their names in the pipeline.
        pipeline: The pipeline; ``None`` for a denoiser alone.

    Returns:
        The names of all parameters that the files hold, by part: matrices and magnitudes, and
        modules, biases and weights that were trained as a whole.

    Raises:
        ValueError: If a file is missing or of no known form, weights in it find no place, a place
            is left without weights, or two adapters replace the same weights.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora needs peft: pip install peft.") from error
    found = _named(given)
    trained: set[int] = set()  # an adapter may rename the parameters of those before it
    for name, path in found.items():
        for part, names in load_adapter(peft, name, path, parts, pipeline, trained).items():
            trained |= {id(parts[part].get_parameter(n)) for n in names}
    names_of = {
        part: [n for n, p in module.named_parameters() if id(p) in trained]
        for part, module in parts.items()
    }
    for part, module in parts.items():
        _activate(peft, module, list(found), part)
        unused = [n for n in names_of[part] if ".original_module." in n]
        if unused:
            raise ValueError(replaced_message(list(found), unused))
    return names_of


def names_in(
    model: nn.Module, parts: Mapping[str, nn.Module], trained: Mapping[str, Sequence[str]]
) -> list[str]:
    """Find parameters of parts of a pipeline in the network that holds one or more of them.

    Args:
        model: The network: a part, or what several parts were put into.
        parts: The parts by their names.
        trained: Names of parameters, by part.

    Returns:
        Their names in the network, in its order.
    """
    places = {id(module): name for name, module in model.named_modules()}
    chosen = {
        ".".join(filter(None, (places[id(parts[part])], name)))
        for part, names in trained.items()
        if id(parts[part]) in places
        for name in names
    }
    return [name for name, _ in model.named_parameters() if name in chosen]


def matching_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of a network's parameters that match one of some patterns, in order.

    Args:
        model: The network.
        patterns: Shell patterns; the name of an adapter in a parameter's name may be left
            ``default``.

    Raises:
        ValueError: If a pattern matches none.
    """
    common = common_names(name for name, _ in model.named_parameters())
    chosen = set()
    for pattern in patterns:
        found = {
            name
            for name, plain in common.items()
            if fnmatchcase(name, pattern) or fnmatchcase(plain, pattern)
        }
        if not found:
            raise ValueError(
                f"--params {pattern!r} matches no parameter of the {type(model).__name__}, which "
                f"are called like {listed(common)}. Pass names, or patterns such as '*attn*'."
            )
        chosen |= found
    return [name for name in common if name in chosen]


def _named(given: Sequence[str]) -> dict[str, Path]:
    """The adapters' paths by name: the given one, or ``default``, or those of the files."""
    found: dict[str, Path] = {}
    for text in given:
        named, path = named_path(text)
        name = named or ("default" if len(given) == 1 else path.stem.replace(".", "_"))
        if not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"--lora {text} would name an adapter '{name}'. Pass name={path}, with a name of "
                "letters, digits and underscores."
            )
        if name in found:
            raise ValueError(
                f"Two adapters are called '{name}': '{found[name]}' and '{path}'. Pass each as "
                "name=path."
            )
        if not path.exists():
            raise ValueError(f"The adapter '{path}' does not exist. {ACCEPTED}.")
        found[name] = path
    return found


def _activate(peft: Any, module: nn.Module, names: Sequence[str], part: str) -> None:
    """Make adapters active in a network; of a module that was trained as a whole, its only copy.

    Raises:
        ValueError: If there are several copies of one.
    """
    for key, layer in module.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.set_adapter(list(names))
        elif isinstance(layer, peft.utils.other.AuxiliaryTrainingWrapper):
            own = [name for name in names if name in layer._adapters]
            if len(own) > 1:
                raise ValueError(
                    f"The adapters {listed(own)} each hold a trained copy of '{part}.{key}', of "
                    "which only one can be used. Pass one of them alone."
                )
            layer.set_adapter(own)
