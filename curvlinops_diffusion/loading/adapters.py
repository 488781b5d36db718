"""Adapters: from the files that training wrote into the network, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlinops_diffusion.loading.adapter_files import (
    ADDITIONS,
    AdapterFile,
    Tensors,
    converted,
    of_other_kinds,
    read_adapter,
    read_weights,
    unplaced_message,
)
from curvlinops_diffusion.loading.adapter_names import Names
from curvlinops_diffusion.loading.saved_networks import (
    ACCEPTED_ADAPTERS,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    adapter_file,
    peft_folders,
)
from curvlinops_diffusion.loading.weights import listed
from curvlinops_diffusion.runtime.adapters import adapter_of
from curvlinops_diffusion.runtime.checks import quoted
from curvlinops_diffusion.runtime.files import named_path

# the side of a layer that each matrix has the size of: its dimension there, and the layer's names
_SIDES = {
    "A": (1, "wide", ("in_features", "in_channels")),
    "B": (0, "wide at its output", ("out_features", "out_channels")),
}

# weights by part of the pipeline and PEFT's name
_Stored = Mapping[str, Tensors]


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
        trained |= _load(peft, name, path, parts, pipeline, trained)
    names_of = {
        part: [n for n, p in module.named_parameters() if id(p) in trained]
        for part, module in parts.items()
    }
    for part, module in parts.items():
        _activate(peft, module, list(found), part)
        unused = [n for n in names_of[part] if ".original_module." in n]
        if unused:
            raise _replaced(list(found), unused)
    return names_of


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by their names there, the denoiser first."""
    found = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return dict(sorted(found.items(), key=lambda item: item[0] not in ("unet", "transformer")))


def names_in(
    model: nn.Module, parts: Mapping[str, nn.Module], trained: Mapping[str, Sequence[str]]
) -> list[str]:
    """Name parameters of parts of a pipeline in the network that holds some of these parts."""
    chosen = {id(parts[part].get_parameter(n)) for part, names in trained.items() for n in names}
    return [name for name, p in model.named_parameters() if id(p) in chosen]


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
        found[name] = path
    return found


def _activate(peft: Any, module: nn.Module, names: Sequence[str], part: str) -> None:
    """Make adapters active in a network; of a module that was trained as a whole, its only copy."""
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


def _load(
    peft: Any,
    name: str,
    path: Path,
    parts: Mapping[str, nn.Module],
    pipeline: Any,
    trained: Set[int],
) -> set[int]:
    """Load an adapter of any form; ``trained`` and the result are ids of parameters."""
    if folders := peft_folders(path, list(parts)):
        own = set[int]()
        for part, folder in folders.items():
            own |= _load_peft(peft, name, folder, part, parts[part])
        if again := own & trained:
            names_of = (
                n for part in parts.values() for n, p in part.named_parameters() if id(p) in again
            )
            raise _replaced([str(path)], list(names_of))
        return own
    loader: Any = next(iter(parts.values())) if pipeline is None else pipeline
    if not hasattr(loader, "load_lora_adapter" if pipeline is None else "load_lora_weights"):
        raise ValueError(
            f"Adapters of a {type(loader).__name__} are read from a folder of PEFT's "
            f"save_pretrained, and '{path}' is none."
        )
    names = Names(parts, loader)
    file = read_adapter(adapter_file(path), path, names.has_no_loader)
    loaded = _load_file(peft, name, file, names) if file.weights else set()
    added = _add_to_weights(file, names)
    return loaded | added | (_load_factors(name, file, names) if file.factors else set())


def _load_peft(peft: Any, name: str, folder: Path, part: str, module: nn.Module) -> set[int]:
    """Load an adapter in PEFT's own form, into any network."""
    stored, _ = read_weights(folder / PEFT_WEIGHTS)
    tensors = {key.removeprefix(PEFT_PREFIX): z for key, z in stored.items()}
    with _explained(folder, lambda: _differences({part: tensors}, {part: module})):
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        peft.inject_adapter_in_model(config, module, adapter_name=name)
        peft.set_peft_model_state_dict(module, tensors, adapter_name=name)
    return _settled(peft, name, folder, part, module, tensors)


def _load_file(peft: Any, name: str, file: AdapterFile, names: Names) -> set[int]:
    """Load the matrices of a single file, by diffusers' loader and with the file's own scales."""
    alone, parts, loader = names.alone, names.parts, names.loader
    with _explained(file.given, lambda: [], of_other_kinds(file.weights), loader):
        tensors, scales, unplaced = converted(file, names.converted)
        keys = names.by_part(tensors)
    if unplaced:
        raise ValueError(unplaced_message(file.given, unplaced, loader))
    stored = {part: {n: tensors[k] for n, k in own.items()} for part, own in keys.items()}
    if not stored.keys() <= parts.keys():
        raise _misfit(file.given, _differences(stored, parts))
    configured = file.configured and not (file.alphas or file.factors)
    with _explained(file.given, lambda: _differences(stored, parts)):
        source: Any = {
            n if alone else f"{part}.{n}": z for part, own in stored.items() for n, z in own.items()
        }
        options: dict[str, Any] = {"adapter_name": name, **({"prefix": None} if alone else {})}
        if configured:  # which is read with the file alone
            source = str(file.path.parent)
            options |= {"weight_name": file.path.name, "local_files_only": True}
            options |= {"use_safetensors": True}
        (loader.load_lora_adapter if alone else loader.load_lora_weights)(source, **options)
    result = set[int]()
    for part, own in stored.items():
        result |= _settled(peft, name, file.given, part, parts[part], own)
        for key, theirs in keys[part].items():
            if configured or theirs not in scales:
                continue
            layer: Any = parts[part].get_submodule(key.partition(".lora_")[0])
            if name in getattr(layer, "scaling", {}):
                layer.scaling[name] = scales[theirs]
                layer.lora_alpha[name] = scales[theirs] * layer.r[name]  # PEFT scales anew by it
    return result


def _settled(
    peft: Any, adapter: str, path: Path, part: str, module: nn.Module, stored: Tensors
) -> set[int]:
    """Check that network and file hold the same weights of an adapter; return their ids."""
    state = module.state_dict(keep_vars=True)
    names = {id(z): name for name, z in state.items()}
    # by the names that PEFT would save them under, which a file has
    placed = peft.get_peft_model_state_dict(
        module,
        state_dict=state,
        adapter_name=adapter,
        save_embedding_layers=any(key.endswith("base_layer.weight") for key in stored),
    )
    own = (adapter, None)  # in the names of whole modules and biases there may be none
    found, left = set[int](), []
    for key, z in stored.items():
        p = placed.get(key)
        same = p is not None and not p.is_meta and p.shape == z.shape
        if not (same and torch.equal(p.detach(), z.to(p.device, p.dtype))):
            left.append(key)
        elif isinstance(p, nn.Parameter):
            name = names[id(p)]
            found.add(id(p))
            # matrices have got the precision of the network, which may be lower than the file's;
            # whole modules and biases take part in its arithmetic
            whole = ".modules_to_save." in name or ".trainable_tokens_" in name
            if adapter_of(name) is not None and not whole:
                p.data = z.to(p.device, torch.promote_types(p.dtype, torch.float32)).clone()
    others = {key for key, p in placed.items() if adapter_of(names.get(id(p), "")) not in own}
    lost = [key for key in placed.keys() - others if key not in stored]
    if not left and not lost:
        return found
    reasons = _differences({part: stored}, {part: module})
    if left and not reasons:
        reasons.append(f"{len(left)} of its weights have no place in this network ({listed(left)})")
    if lost:
        reasons.append(f"{len(lost)} weights of the adapter are not in it ({listed(lost)})")
    raise _misfit(path, reasons)


def _add_to_weights(file: AdapterFile, names: Names) -> set[int]:
    """Add all differences of a file to weights and biases, or none; return the ids of these."""
    ends = {key: next(end for end in ADDITIONS if key.endswith(end)) for key in file.additions}
    stems = {key: key.removesuffix(end) for key, end in ends.items()}
    places = names.places({stems[key]: len(z) for key, z in file.additions.items() if z.ndim})
    found: list[tuple[nn.Parameter, Tensor]] = []
    unplaced = []
    for key, whole in file.additions.items():
        fits = bool(places.get(stems[key]))
        for place in places.get(stems[key], ()):
            z = whole if place.rows is None else whole[place.rows]
            layer = names.parts[place.part].get_submodule(place.layer)
            p = getattr(layer, ADDITIONS[ends[key]], None)
            if isinstance(p, nn.Parameter) and p.is_floating_point() and p.shape == z.shape:
                found.append((p, z))
            else:
                fits = False
        unplaced += [] if fits else [key]
    if unplaced:
        raise ValueError(unplaced_message(file.given, unplaced, names.loader))
    for p, z in found:
        wide = torch.promote_types(p.dtype, torch.float32)
        p.data = (p.data.to(wide) + z.to(p.device, wide)).to(p.dtype)
    return {id(p) for p, _ in found}


def _load_factors(name: str, file: AdapterFile, names: Names) -> set[int]:
    """Wrap all layers that a file has other factors of than pairs, or none; return their ids."""
    from curvlinops_diffusion.loading.factored_layers import FactoredLayer, of_rows, outputs_of

    outputs = {stem: outputs_of(factors) for stem, factors in file.factors.items()}
    places = names.places(outputs)
    missing = [stem for stem in outputs if not places.get(stem)]
    if missing:
        keys = [f"{stem}.{factor}" for stem in missing for factor in file.factors[stem]]
        raise ValueError(unplaced_message(file.given, keys, names.loader))
    wrapped: dict[tuple[str, str], nn.Module] = {}
    for stem, factors in file.factors.items():
        for at in places[stem]:
            inner = names.parts[at.part].get_submodule(at.layer)
            try:
                own = factors if at.rows is None else of_rows(factors, at.rows, outputs[stem])
                made = FactoredLayer(inner, name, own, file.alphas.get(stem))
                wrapped[at.part, at.layer] = made
            except ValueError as error:
                raise _misfit(file.given, [f"'{stem}' {error}"]) from error
    for (part, layer), new in wrapped.items():
        names.parts[part].set_submodule(layer, new)
    return {
        id(p)
        for new in wrapped.values()
        for key, p in new.named_parameters()
        if not key.startswith("base_layer.")
    }


@contextmanager
def _explained(
    path: Path, reasons: Callable[[], Sequence[str]], others: Sequence[str] = (), loader: Any = None
) -> Iterator[None]:
    """Explain a library's error by the difference of adapter and network, else quote it."""
    try:
        yield
    except Exception as error:
        if others:  # weights of kinds that the loader may not know
            raise ValueError(unplaced_message(path, others, loader)) from error
        if found := reasons():
            raise _misfit(path, found) from error
        raise ValueError(
            f"The adapter '{path}' cannot be loaded: {quoted(error).rstrip('.')}. "
            f"{ACCEPTED_ADAPTERS}."
        ) from error


def _misfit(path: Path, reasons: Sequence[str]) -> ValueError:
    return ValueError(
        f"The adapter '{path}' is not of this network: {'; '.join(reasons)}. Pass the network that "
        "it was trained on."
    )


def _replaced(adapters: Sequence[str], names: Sequence[str]) -> ValueError:
    return ValueError(
        f"Two adapters change the same weights of the network, {listed(names)}, and one replaces "
        f"what the other added ({listed(adapters)}). Pass one of them alone."
    )


def _differences(stored: _Stored, parts: Mapping[str, nn.Module]) -> list[str]:
    """Say in phrases how the layers of an adapter differ from those of the networks, if they do."""
    phrases, unknown, absent = [], [], set()
    other: dict[str, str] = {}
    strange = [part for part in stored if part not in parts]
    if strange:
        count = sum(len(stored[part]) for part in strange)
        phrases.append(
            f"the names of {count} of its weights begin with {listed(strange)}, and the networks "
            f"are called {', '.join(repr(part) for part in parts)}"
        )
    for part in [part for part in stored if part in parts]:
        modules = dict(parts[part].named_modules())
        for key, z in stored[part].items():
            name, found, matrix = key.partition(".lora_")
            if matrix.startswith(("down", "up")):
                unknown.append(key)
            elif found and name not in modules:
                absent.add(name)
            elif matrix[:1] in _SIDES:
                dim, wide, sides = _SIDES[matrix[0]]
                layer: Any = getattr(modules[name], "base_layer", modules[name])
                here = next((getattr(layer, side) for side in sides if hasattr(layer, side)), None)
                if here is not None and z.ndim > dim and z.shape[dim] != here:
                    sizes = f"{z.shape[dim]} {wide} in the file and {here} in the network"
                    other.setdefault(name, f"'{name}' is {sizes}")
    if other:
        more = f", and {len(other) - 1} more layers are of other sizes" if len(other) > 1 else ""
        phrases.append(next(iter(other.values())) + more)
    if unknown:
        phrases.append(f"{len(unknown)} of its names are of no form known here ({listed(unknown)})")
    if absent:
        phrases.append(f"{len(absent)} of its layers are not in the network ({listed(absent)})")
    return phrases
