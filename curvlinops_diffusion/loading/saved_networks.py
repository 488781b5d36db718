"""Saved networks and adapters on disk, checked by names and headers alone, without PyTorch.

Each check raises a ValueError that says what is missing or damaged, and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PIPELINE, _MODEL, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
# what tokenizers keep their words in
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
# parts that are no networks, by words in the names of their classes: by which files they are known
_OTHERS = {
    "ByT5Tokenizer": ("tokenizer_config.json",),  # whose words are bytes
    "Tokenizer": _VOCABULARIES,
    "Scheduler": (_SCHEDULER,),
    "Processor": ("*processor_config.json",),
    "FeatureExtractor": ("preprocessor_config.json",),
}
# the weights that diffusers and transformers read, of which a variant may be in the name
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANT = re.compile(rf"(?:{'|'.join(_STEMS)})\.(\w+)(?:-\d+-of-\d+)?\.safetensors")
# of the names of an adapter's tensors
_OF_ADAPTER = re.compile(r"\blora_(?:up|down|A|B)\b|\.(?:lokr|hada)_w\d")
_LONGEST_HEADER = 100_000_000

PEFT_WEIGHTS, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
_PEFT, _DIFFUSERS_WEIGHTS = "adapter_config.json", "pytorch_lora_weights.safetensors"
ACCEPTED_ADAPTERS = (
    "Pass a .safetensors file of diffusers' save_lora_weights or of kohya's scripts, or a folder "
    "of one of these or of PEFT's save_pretrained"
)


def parts_of(folder: Path) -> dict[str, tuple[str, str] | None]:
    """Read the library and class of each part of a pipeline; ``None`` if saved without it."""
    found: dict[str, tuple[str, str] | None] = {}
    for name, kind in _described(folder, _PIPELINE, "--pipeline").items():
        # other values are numbers or flags that the pipeline was made with
        if isinstance(kind, list) and len(kind) == 2 and not name.startswith("_"):
            if kind[0] is None:
                found[name] = None
            elif isinstance(kind[0], str) and isinstance(kind[1], str):
                found[name] = (kind[0], kind[1])
    return found


def part_folder(folder: Path, name: str) -> Path:
    """The folder that diffusers reads a part from: the pipeline's, where it has none of its own."""
    return folder / name if (folder / name).is_dir() else folder


def configs_of(pipeline: Path, given: Path | None) -> Path:
    """The folder that says what a pipeline is made of.

    That of ``save_pretrained`` itself; of a single file the one that is given, or that lies beside
    it: of its name without the suffix, or its own. Nothing is looked for on the Hub.
    """
    if pipeline.is_dir():
        if given is not None:
            raise ValueError(
                f"--pipeline-config is of a single file, got the folder '{pipeline}' as --pipeline,"
                " which says itself what it is made of. Leave it out."
            )
        return pipeline
    if given is not None:
        return given
    beside = (pipeline.with_suffix(""), pipeline.parent)
    for folder in beside:
        if (folder / _PIPELINE).is_file():
            return folder
    raise ValueError(
        f"'{pipeline}' is a single file, which does not say what networks it is of, and diffusers "
        f"would ask the Hub: pass --pipeline-config with the folder of a pipeline of the same kind "
        f"({_PIPELINE} and the configs of its parts; weights are not needed), or put it beside the "
        f"file as '{beside[0]}'."
    )


def _check_single_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(
            f"'{path}' is no .safetensors file, and no other is opened: a .ckpt is a pickle, which "
            "may hold a program. Save it as .safetensors, or by save_pretrained as a folder."
        )
    if any(_OF_ADAPTER.search(name) for name in check_whole(path)):
        raise ValueError(
            f"'{path}' is an adapter. Pass it by --lora, and what it was trained on as --pipeline."
        )


def check_pipeline(pipeline: Path, variant: str | None, config: Path | None = None) -> None:
    """Check that a folder holds the parts of a pipeline, each with its weights or words.

    Loaded without its words, a tokenizer makes every prompt the same, in silence. Of a single file
    the words and configs are in another folder, see :func:`configs_of`.
    """
    single = pipeline.is_file()
    if single:
        _check_single_file(pipeline)
    folder = configs_of(pipeline, config)
    for name, kind in parts_of(folder).items():
        if kind is None:
            continue
        part = part_folder(folder, name)
        other = next((word for word in _OTHERS if word in kind[1]), "")
        known = any(any(part.glob(file)) for file in _OTHERS.get(other, (_MODEL,)))
        if part == folder and not known:
            raise ValueError(
                f"'{folder}' cannot be loaded: its {_PIPELINE} names a part '{name}', and there is "
                "no such folder. Copy the whole pipeline, or save it again by save_pretrained."
            )
        if other == "Tokenizer" and not known:
            raise ValueError(
                f"'{folder}' cannot be loaded: the tokenizer in '{part}' has no vocabulary "
                "(tokenizer.json, vocab.json or another). Copy the whole pipeline."
            )
        if not other and known and not single:
            _check_weights(folder, part, variant)


def check_model(folder: Path, variant: str | None) -> None:
    """Check that a folder holds a model of diffusers and its weights."""
    if (folder / _PIPELINE).is_file() and not (folder / _MODEL).is_file():
        raise ValueError(f"'{folder}' is a pipeline. Pass it as --pipeline, without --scheduler.")
    _described(folder, _MODEL, "--model")
    _check_weights(folder, folder, variant)


def check_scheduler(folder: Path) -> None:
    """Check that a folder holds a scheduler."""
    if not (folder / _SCHEDULER).is_file() and (folder / "scheduler" / _SCHEDULER).is_file():
        raise ValueError(f"'{folder}' is a pipeline. Pass --scheduler {folder / 'scheduler'}.")
    _described(folder, _SCHEDULER, "--scheduler")


def check_whole(path: Path) -> set[str]:
    """Check that a file has its whole length; return the names of its tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ValueError("it is a pointer of Git LFS: run git lfs pull")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"it has {size:,} bytes and no header")
            header = json.loads(file.read(length))
        names = header.keys() - {"__metadata__"}
        wanted = 8 + length + max((header[name]["data_offsets"][1] for name in names), default=0)
        if wanted != size:
            raise ValueError(f"it has {size:,} bytes, and {wanted:,} by its header")
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is not a whole safetensors file ({error}). Download or copy it again."
        ) from error
    return set(names)


def _described(folder: Path, name: str, option: str) -> dict[str, Any]:
    """Read a folder's JSON file, or raise ValueError."""
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is a file. Pass a folder that was written by save_pretrained as {option}; "
            "adapters are passed by --lora."
        )
    path = folder / name
    if not path.is_file():
        below = sorted(folder.glob(f"*/{name}")) + sorted(folder.glob(f"snapshots/*/{name}"))
        hint = f" Did you mean '{below[0].parent}'?" if below else ""
        if name == _PIPELINE and (folder / _MODEL).is_file():
            hint = f" '{folder}' is a network alone: pass it by --model."
        raise ValueError(
            f"'{folder}' holds no {name}. Pass a folder that was written by save_pretrained.{hint}"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it holds no names")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{folder}' cannot be loaded: '{name}' is not as save_pretrained writes it ({error})."
        ) from error
    return found


def weights_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that a network is read from: of a variant, or without one where it has none.

    Names and their order are those by which libraries look.
    """
    for own in ("",) if variant is None else (f".{variant}", ""):
        for stem in _STEMS:
            single = folder / f"{stem}{own}.safetensors"
            ends = (f"{own}.index.json", f".index{own}.json")
            indices = [folder / f"{stem}.safetensors{end}" for end in ends]
            index = next((file for file in indices if file.is_file()), None)
            # transformers prefers a single file, diffusers an index
            if single.is_file() and (index is None or stem == "model"):
                return [single]
            if index is not None:
                return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{index}' is no index of weights ({error}). Download or copy it again."
        ) from error
    missing = [name for name in names if not index.with_name(name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the files that '{index.name}' names are missing, '{missing[0]}' "
            "first. Download or copy them again."
        )
    return [index.with_name(name) for name in names]


def _check_weights(whole: Path, folder: Path, variant: str | None) -> None:
    """Check the files of a network that would be read."""
    try:
        read = weights_files(folder, variant)
        for file in read:
            check_whole(file)
    except ValueError as error:
        raise ValueError(f"'{whole}' cannot be loaded: {error}") from error
    if read:
        return
    names = sorted(file.name for file in folder.iterdir())
    there = sorted({match[1] for name in names if (match := _VARIANT.fullmatch(name))})
    if there:
        raise ValueError(
            f"'{whole}' cannot be loaded: the weights of '{folder}' are of variant "
            f"{' and '.join(there)}. Pass --variant {there[0]}."
        )
    others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    held = f" but '{others[0]}', which is a pickle, and none is opened" if others else ""
    raise ValueError(
        f"'{whole}' cannot be loaded: '{folder}' holds no weights{held}. Save it again by "
        "save_pretrained(…, safe_serialization=True)."
    )


def check_adapter(path: Path, parts: Sequence[str]) -> None:
    """Check that the files of an adapter that would be read are there and whole.

    ``parts`` are the names of the pipeline's parts, as below.
    """
    folders = peft_folders(path, parts).values()
    for file in [folder / PEFT_WEIGHTS for folder in folders] or [adapter_file(path)]:
        check_whole(file)


def weights_in(folder: Path) -> Path | None:
    """The file of an adapter of PEFT's or diffusers' form that a folder itself holds, if any."""
    peft = (folder / _PEFT).is_file() and (folder / PEFT_WEIGHTS).is_file()
    file = folder / (PEFT_WEIGHTS if peft else _DIFFUSERS_WEIGHTS)
    return file if file.is_file() else None


def peft_folders(path: Path, parts: Sequence[str]) -> dict[str, Path]:
    """The folders that PEFT's ``save_pretrained`` wrote, by part; none if it wrote none.

    ``path`` is the folder of the first part's adapter, or one with a folder for each part.
    """
    if path.name == PEFT_WEIGHTS and path.is_file():  # the scales stand beside it
        path = path.parent
    found = {part: path / part for part in parts if (path / part / _PEFT).is_file()}
    if (path / _PEFT).is_file():
        found = {parts[0]: path}
    for folder in found.values():
        if not (folder / PEFT_WEIGHTS).is_file():
            raise ValueError(
                f"'{folder}' holds {_PEFT} and no {PEFT_WEIGHTS}. {ACCEPTED_ADAPTERS}."
            )
    return found


def adapter_file(path: Path) -> Path:
    """The single file of an adapter that a path names."""
    file = path if path.is_file() else path / PEFT_WEIGHTS
    # other programs call files the same
    pefts = file.name == PEFT_WEIGHTS and file.is_file()
    if pefts and any(name.startswith(PEFT_PREFIX) for name in check_whole(file)):
        raise ValueError(
            f"The adapter '{path}' is PEFT's without its {_PEFT}, which holds the scale. Pass the "
            "folder that save_pretrained wrote."
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"The adapter '{path}' is no .safetensors file. {ACCEPTED_ADAPTERS}.")
        return path
    if (path / _DIFFUSERS_WEIGHTS).is_file():
        return path / _DIFFUSERS_WEIGHTS
    files = [f for f in sorted(path.glob("*.safetensors")) if f.name[0] != "."]
    if len(files) == 1:
        return files[0]
    some = ", ".join(f"'{f.name}'" for f in files[:3]) + ", …" * (len(files) > 3)
    there = f"{len(files)} .safetensors files ({some})" if files else "none"
    raise ValueError(
        f"'{path}' should hold the weights of one adapter, and holds {there}. {ACCEPTED_ADAPTERS}."
    )
