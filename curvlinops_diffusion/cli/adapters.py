"""Adapters: from the files that training wrote into the network, all of them or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from curvlinops_diffusion.cli.weights import listed
from curvlinops_diffusion.runtime.adapters import adapter_of, common_names
from curvlinops_diffusion.runtime.digests import digest_of

_PEFT = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_ACCEPTED = (
    "Pass a .safetensors file of diffusers' save_lora_weights or of kohya's scripts, or a folder "
    "of one of these or of PEFT's save_pretrained"
)


def load_adapters(given: Sequence[str], parts: Mapping[str, nn.Module], pipeline: Any) -> None:
    """Load adapters into the parts of a pipeline, and make all of them active.

    Args:
        given: Files or folders, each perhaps as ``name=path``.
        parts: The networks, the denoiser first, by their names in the pipeline.
        pipeline: The pipeline; ``None`` for a denoiser alone.

    Raises:
        ValueError: If a file is missing or of no known form, weights in it find no place, or a
            place is left without weights.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("--lora needs peft: pip install peft.") from error
    found = _named(given)
    for name, path in found.items():
        before = {part: set(_adapters(module)) for part, module in parts.items()}
        stored = _loaded(peft, name, path, parts, pipeline)
        new = [
            (f"{part}.{key}", p)
            for part, module in parts.items()
            for key, p in _adapters(module).items()
            if key not in before[part]
        ]
        _settle(path, new, stored)
    for module in parts.values():
        for layer in module.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.set_adapter(list(found))


def adapter_parameters(model: nn.Module) -> list[str]:
    """The names of a network's parameters that belong to adapters, in order."""
    return list(_adapters(model))


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


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if adapter_of(name) is not None}


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
            raise ValueError(f"Two adapters are called '{name}'. Pass each as name=path.")
        if not Path(path).exists():
            raise ValueError(f"The adapter '{path}' does not exist. {_ACCEPTED}.")
        found[name] = Path(path)
    return found


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Errors of the libraries, with the file that they are of."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"The adapter '{path}' cannot be loaded: {first}") from error


def _loaded(
    peft: Any, name: str, path: Path, parts: Mapping[str, nn.Module], pipeline: Any
) -> list[tuple[str, Tensor]]:
    """Load an adapter; return the weights that its files hold, by name."""
    denoiser = next(iter(parts))
    folders = {part: path / part for part in parts if (path / part / _PEFT).is_file()}
    if (path / _PEFT).is_file():
        folders = {denoiser: path}
    if folders:
        stored: list[tuple[str, Tensor]] = []
        for part, folder in folders.items():
            stored += _load_peft(peft, name, folder, parts[part])
        return stored
    file = _weights_file(path)
    loader: Any = parts[denoiser] if pipeline is None else pipeline
    if not hasattr(loader, "load_lora_adapter" if pipeline is None else "load_lora_weights"):
        raise ValueError(
            f"Adapters of a {type(loader).__name__} are read from a folder of PEFT's "
            f"save_pretrained, and '{path}' is none."
        )
    if pipeline is None:
        with _telling(path):
            tensors = load_file(file)
            loader.load_lora_adapter(tensors, prefix=None, adapter_name=name)
        return list(tensors.items())
    load = {"weight_name": file.name, "local_files_only": True, "use_safetensors": True}
    where = str(file.parent)
    config = getattr(getattr(pipeline, "unet", None), "config", None)
    own = {} if config is None else {"unet_config": config}
    with _telling(path):
        pipeline.load_lora_weights(where, adapter_name=name, **load)
        converted = pipeline.lora_state_dict(where, **load, **own)
    converted = converted[0] if isinstance(converted, tuple) else converted
    return [(key, z) for key, z in converted.items() if "alpha" not in key and z.ndim > 0]


def _load_peft(peft: Any, name: str, folder: Path, module: nn.Module) -> list[tuple[str, Tensor]]:
    """An adapter in PEFT's own form, into any network."""
    file = folder / _PEFT_WEIGHTS
    if not file.is_file():
        raise ValueError(f"'{folder}' holds {_PEFT} and no {_PEFT_WEIGHTS}. {_ACCEPTED}.")
    with _telling(folder):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        peft.inject_adapter_in_model(config, module, adapter_name=name)
        tensors = {key.removeprefix("base_model.model."): z for key, z in load_file(file).items()}
        peft.set_peft_model_state_dict(module, tensors, adapter_name=name)
    return list(tensors.items())


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


def _settle(
    path: Path, new: Sequence[tuple[str, nn.Parameter]], stored: Sequence[tuple[str, Tensor]]
) -> None:
    """Check that parameters and file hold the same, and give them its precision, at least float32.

    Loading gives adapters the precision of the network that they adapt, which may be lower. The
    files' names are of many conventions: weights are matched by what they are.

    Raises:
        ValueError: If weights of the file are in no parameter, or a parameter is not in the file.
    """
    waiting: dict[str, list[tuple[str, Tensor]]] = {}
    for dtype in {p.dtype for _, p in new}:
        for key, z in stored:
            waiting.setdefault(digest_of(z.to(dtype)), []).append((key, z))
    placed, lost = set(), []
    for name, p in new:
        candidates = [] if p.is_meta else waiting.get(digest_of(p), [])
        match = next((c for c in candidates if c[0] not in placed), None)
        if match is None:
            lost.append(name)
            continue
        placed.add(match[0])
        p.data = match[1].to(p.device, torch.promote_types(p.dtype, torch.float32)).clone()
    left = [key for key, _ in stored if key not in placed]
    if lost or left or not new:
        told = []
        if left or not new:
            keys = left or [key for key, _ in stored]
            told.append(
                f"{len(keys)} of its weights have no place in this network ({listed(keys)})"
            )
        if lost:
            told.append(f"{len(lost)} weights of the adapter are not in it ({listed(lost)})")
        raise ValueError(
            f"The adapter '{path}' is not of this network: {' and '.join(told)}. Pass the network "
            "that it was trained on."
        )
