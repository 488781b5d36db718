"""Adapters: from the files that training wrote into the network, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvlinops_diffusion.cli.adapter_files import (
    AdapterFile,
    add_to_weights,
    converted,
    of_other_kinds,
    read_adapter,
    read_weights,
    unit_alphas,
    unplaced_message,
)
from curvlinops_diffusion.cli.adapter_placement import (
    Stored,
    by_part,
    differences,
    set_scales,
    settle,
)
from curvlinops_diffusion.cli.weights import listed
from curvlinops_diffusion.runtime.adapters import adapter_of, common_names
from curvlinops_diffusion.runtime.messages import quoted

_PEFT = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_ACCEPTED = (
    "Pass a .safetensors file of diffusers' save_lora_weights or of kohya's scripts, or a folder "
    "of one of these or of PEFT's save_pretrained"
)


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
    trained: dict[str, list[str]] = {part: [] for part in parts}
    for name, path in found.items():
        for part, names in _loaded(peft, name, path, parts, pipeline, trained).items():
            trained[part] += [n for n in names if n not in trained[part]]
    for part, module in parts.items():
        _activate(peft, module, list(found), part)
    return trained


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
        name, separator, path = text.partition("=")
        if not separator or Path(text).exists():
            path = text
            name = "default" if len(given) == 1 else Path(text).stem.replace(".", "_")
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
        if not Path(path).exists():
            raise ValueError(f"The adapter '{path}' does not exist. {_ACCEPTED}.")
        found[name] = Path(path)
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


def _loaded(
    peft: Any,
    name: str,
    path: Path,
    parts: Mapping[str, nn.Module],
    pipeline: Any,
    trained: Mapping[str, Sequence[str]],
) -> dict[str, list[str]]:
    """Load an adapter; return the names of the parameters that its files hold, by part."""
    denoiser = next(iter(parts))
    if path.name == _PEFT_WEIGHTS and path.is_file():  # the scales stand beside it
        path = path.parent
    folders = {part: path / part for part in parts if (path / part / _PEFT).is_file()}
    if (path / _PEFT).is_file():
        folders = {denoiser: path}
    if folders:
        return {
            part: _load_peft(peft, name, folder, part, parts[part], trained[part])
            for part, folder in folders.items()
        }
    loader: Any = parts[denoiser] if pipeline is None else pipeline
    if not hasattr(loader, "load_lora_adapter" if pipeline is None else "load_lora_weights"):
        raise ValueError(
            f"Adapters of a {type(loader).__name__} are read from a folder of PEFT's "
            f"save_pretrained, and '{path}' is none."
        )
    file = read_adapter(_weights_file(path))
    loaded = _load_file(peft, name, file, parts, loader) if file.weights else {}
    added, unplaced = add_to_weights(file, parts)
    if unplaced or not (file.weights or added):
        raise ValueError(unplaced_message(file.path, unplaced, loader))
    return {part: loaded.get(part, []) + added.get(part, []) for part in parts}


def _load_file(
    peft: Any, name: str, file: AdapterFile, parts: Mapping[str, nn.Module], loader: Any
) -> dict[str, list[str]]:
    """An adapter in a single file, by diffusers' loader and with the file's own scales."""
    alone = loader is next(iter(parts.values()))

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if alone:
            return {key: z for key, z in tensors.items() if not key.endswith(".alpha")}
        config = getattr(getattr(loader, "unet", None), "config", None)
        own = {} if config is None else {"unet_config": config}
        result = loader.lora_state_dict(tensors, **own)
        return dict(result[0] if isinstance(result, tuple) else result)

    others = of_other_kinds(file.weights)
    try:
        conversion = converted(file, convert)
        stored, scales = by_part(conversion, parts, alone)
    except Exception as error:
        if others:
            raise ValueError(unplaced_message(file.path, others, loader)) from error
        raise _unloadable(file.path, [quoted(error)]) from error
    if conversion.unplaced:
        raise ValueError(unplaced_message(file.path, conversion.unplaced, loader))
    if not stored.keys() <= parts.keys():
        raise _unloadable(file.path, differences(stored, parts))
    configured = file.configured and not file.alphas
    with _telling(file.path, stored, parts):
        source: Any = convert(file.weights) if alone else {**file.weights, **unit_alphas(file)}
        load: dict[str, Any] = {"adapter_name": name, **({"prefix": None} if alone else {})}
        if configured:  # which is read with the file alone
            source = str(file.path.parent)
            load |= {"weight_name": file.path.name, "local_files_only": True}
            load |= {"use_safetensors": True}
        (loader.load_lora_adapter if alone else loader.load_lora_weights)(source, **load)
    result = {}
    for part, tensors in stored.items():
        result[part] = _settled(peft, name, file.path, part, parts[part], tensors)
        if not configured:
            set_scales(parts[part], name, scales[part])
    return result


def _load_peft(
    peft: Any, name: str, folder: Path, part: str, module: nn.Module, taken: Sequence[str]
) -> list[str]:
    """An adapter in PEFT's own form, into any network."""
    file = folder / _PEFT_WEIGHTS
    if not file.is_file():
        raise ValueError(f"'{folder}' holds {_PEFT} and no {_PEFT_WEIGHTS}. {_ACCEPTED}.")
    stored, _ = read_weights(file)
    tensors = {key.removeprefix("base_model.model."): z for key, z in stored.items()}
    with _telling(folder, {part: tensors}, {part: module}):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        peft.inject_adapter_in_model(config, module, adapter_name=name)
        peft.set_peft_model_state_dict(module, tensors, adapter_name=name)
    names = _settled(peft, name, folder, part, module, tensors)
    again = [n for n in names if n in taken and adapter_of(n) is None]
    if again:
        raise ValueError(
            f"The adapter '{folder}' replaces weights of the network that another one has changed "
            f"({listed(again)}). Pass one of them alone."
        )
    return names


@contextmanager
def _telling(path: Path, stored: Stored, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Say how adapter and network differ where a library fails; else quote its error."""
    try:
        yield
    except Exception as error:
        raise _unloadable(path, differences(stored, parts) or [quoted(error)]) from error


def _unloadable(path: Path, reasons: Sequence[str]) -> ValueError:
    told = "; ".join(reasons).rstrip(".")
    return ValueError(
        f"The adapter '{path}' cannot be loaded: {told}. Pass the network that it was trained on."
    )


def _settled(
    peft: Any, name: str, path: Path, part: str, module: nn.Module, stored: Mapping[str, Tensor]
) -> list[str]:
    """The parameters that a file's weights are in, after the check that all of them are.

    Raises:
        ValueError: If weights of the file are in no parameter, or a parameter is not in the file.
    """
    names, left, lost = settle(peft, module, name, stored)
    if not left and not lost:
        return names
    told = differences({part: dict(stored)}, {part: module})
    if left and not told:
        told.append(f"{len(left)} of its weights have no place in this network ({listed(left)})")
    if lost:
        told.append(f"{len(lost)} weights of the adapter are not in it ({listed(lost)})")
    raise ValueError(
        f"The adapter '{path}' is not of this network: {' and '.join(told)}. Pass the network "
        "that it was trained on."
    )


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter '{path}' is no .safetensors file. {_ACCEPTED}.")
        return path
    if (path / _DIFFUSERS_WEIGHTS).is_file():
        return path / _DIFFUSERS_WEIGHTS
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    there = (
        f"{len(files)} .safetensors files ({listed(f.name for f in files)})" if files else "none"
    )
    raise ValueError(
        f"'{path}' should hold the weights of one adapter, and holds {there}. {_ACCEPTED}."
    )
