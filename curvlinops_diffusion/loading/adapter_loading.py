"""The forms of adapters: a single file by diffusers' loader, and PEFT's own folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from curvlinops_diffusion.loading.adapter_files import (
    AdapterFile,
    converted,
    of_other_kinds,
    read_adapter,
    read_weights,
    unpaired,
    unplaced_message,
)
from curvlinops_diffusion.loading.adapter_paths import (
    ACCEPTED,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    peft_folders,
    weights_file,
)
from curvlinops_diffusion.loading.adapter_placement import (
    Stored,
    add_to_weights,
    by_part,
    differences,
    set_scales,
    settle,
)
from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.checks import quoted


def load_adapter(
    peft: Any,
    name: str,
    path: Path,
    parts: Mapping[str, nn.Module],
    pipeline: Any,
    trained: Set[int],
) -> dict[str, list[str]]:
    """Load an adapter into the parts of a pipeline.

    Args:
        peft: The library.
        name: The adapter's name.
        path: Its file or folder.
        parts: The networks, the denoiser first, by their names in the pipeline.
        pipeline: The pipeline; ``None`` for a denoiser alone.
        trained: Ids of the parameters that other adapters hold.

    Returns:
        The names of the parameters that its files hold, by part.

    Raises:
        ValueError: If it is of no known form, weights in it find no place, a place is left without
            weights, or it replaces weights that another one holds.
    """
    folders = peft_folders(path, list(parts))
    if folders:
        return {
            part: _load_peft(peft, name, folder, part, parts[part], trained)
            for part, folder in folders.items()
        }
    denoiser = next(iter(parts))
    loader: Any = parts[denoiser] if pipeline is None else pipeline
    if not hasattr(loader, "load_lora_adapter" if pipeline is None else "load_lora_weights"):
        raise ValueError(
            f"Adapters of a {type(loader).__name__} are read from a folder of PEFT's "
            f"save_pretrained, and '{path}' is none."
        )
    file = read_adapter(weights_file(path), path)
    loaded = _load_file(peft, name, file, parts, loader) if file.weights else {}
    added, unplaced = add_to_weights(file, parts)
    if unplaced:
        raise ValueError(unplaced_message(file.given, unplaced, loader))
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
            raise ValueError(unplaced_message(file.given, others, loader)) from error
        lost = unpaired(file.weights)
        if lost:
            raise _misfit(file.given, [f"the file lacks {listed(lost)}"]) from error
        raise _unreadable(file.given, error) from error
    if conversion.unplaced:
        raise ValueError(unplaced_message(file.given, conversion.unplaced, loader))
    if not stored.keys() <= parts.keys():
        raise _misfit(file.given, differences(stored, parts))
    configured = file.configured and not file.alphas
    with _telling(file.given, stored, parts):
        source: Any = {
            key if alone else f"{part}.{key}": z
            for part, tensors in stored.items()
            for key, z in tensors.items()
        }
        load: dict[str, Any] = {"adapter_name": name, **({"prefix": None} if alone else {})}
        if configured:  # which is read with the file alone
            source = str(file.path.parent)
            load |= {"weight_name": file.path.name, "local_files_only": True}
            load |= {"use_safetensors": True}
        (loader.load_lora_adapter if alone else loader.load_lora_weights)(source, **load)
    result = {}
    for part, tensors in stored.items():
        result[part] = _settled(peft, name, file.given, part, parts[part], tensors)
        if not configured:
            set_scales(parts[part], name, scales[part])
    return result


def _load_peft(
    peft: Any, name: str, folder: Path, part: str, module: nn.Module, trained: Set[int]
) -> list[str]:
    """An adapter in PEFT's own form, into any network."""
    stored, _ = read_weights(folder / PEFT_WEIGHTS)
    tensors = {key.removeprefix(PEFT_PREFIX): z for key, z in stored.items()}
    with _telling(folder, {part: tensors}, {part: module}):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        peft.inject_adapter_in_model(config, module, adapter_name=name)
        peft.set_peft_model_state_dict(module, tensors, adapter_name=name)
    names = _settled(peft, name, folder, part, module, tensors)
    again = [n for n in names if id(module.get_parameter(n)) in trained]
    if again:
        raise ValueError(replaced_message([str(folder)], again))
    return names


def replaced_message(adapters: Sequence[str], names: Sequence[str]) -> str:
    """Say that an adapter replaces weights that another one has changed."""
    return (
        f"Two adapters change the same weights of the network, {listed(names)}, and one replaces "
        f"what the other added ({listed(adapters)}). Pass one of them alone."
    )


@contextmanager
def _telling(path: Path, stored: Stored, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Say how adapter and network differ where a library fails; else quote its error."""
    try:
        yield
    except Exception as error:
        reasons = differences(stored, parts)
        raise (_misfit(path, reasons) if reasons else _unreadable(path, error)) from error


def _misfit(path: Path, reasons: Sequence[str]) -> ValueError:
    return ValueError(
        f"The adapter '{path}' cannot be loaded: {'; '.join(reasons)}. Pass the network that it "
        "was trained on."
    )


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The adapter '{path}' cannot be loaded: {quoted(error).rstrip('.')}. {ACCEPTED}."
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
