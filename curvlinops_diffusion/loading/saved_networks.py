"""Folders of ``save_pretrained`` and files of weights, checked by names and headers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_VARIANT = re.compile(r"[^.]+\.([A-Za-z_]\w*)(-\d+-of-\d+)?\.safetensors")
_PIPELINE, _MODEL, _SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
# what tokenizers keep their words in
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_LONGEST_HEADER = 100_000_000


def parts_of(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    """The library and class of each part that a pipeline's index names.

    Raises:
        ValueError: If the folder is no pipeline.
    """
    return {
        name: (kind[0], kind[1])
        for name, kind in _described(folder, _PIPELINE, "--pipeline").items()
        if isinstance(kind, list) and len(kind) == 2 and not name.startswith("_")
    }


def check_pipeline(folder: Path, variant: str | None) -> None:
    """Check that a folder holds the parts of a pipeline, each with its weights or words.

    Loaded without its words, a tokenizer makes every prompt the same, in silence.

    Raises:
        ValueError: If it is none, or a part is missing or damaged.
    """
    for name, (_, cls) in parts_of(folder).items():
        if cls is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise ValueError(
                f"'{folder}' cannot be loaded: its {_PIPELINE} names a part '{name}', and there is "
                "no such folder. Copy the whole pipeline, or save it again by save_pretrained."
            )
        of_words = "Tokenizer" in cls and "ByT5" not in cls  # whose words are bytes
        if of_words and not any(any(part.glob(pattern)) for pattern in _VOCABULARIES):
            raise ValueError(
                f"'{folder}' cannot be loaded: the tokenizer in '{part}' has no vocabulary "
                "(tokenizer.json, vocab.json or another). Copy the whole pipeline."
            )
        if (part / _MODEL).is_file():
            _check_weights(folder, part, variant)


def check_model(folder: Path, variant: str | None) -> None:
    """Check that a folder holds a model of diffusers and its weights.

    Raises:
        ValueError: If it does not.
    """
    if (folder / _PIPELINE).is_file():
        raise ValueError(f"'{folder}' is a pipeline. Pass it as --pipeline, without --scheduler.")
    _described(folder, _MODEL, "--model")
    _check_weights(folder, folder, variant)


def check_scheduler(folder: Path) -> None:
    """Check that a folder holds a scheduler.

    Raises:
        ValueError: If it does not.
    """
    if not (folder / _SCHEDULER).is_file() and (folder / "scheduler" / _SCHEDULER).is_file():
        raise ValueError(f"'{folder}' is a pipeline. Pass --scheduler {folder / 'scheduler'}.")
    _described(folder, _SCHEDULER, "--scheduler")


def check_adapter(path: Path) -> None:
    """Check that a path is a whole file of weights, or a folder with one.

    Raises:
        ValueError: If it is not.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
        if not files:
            raise ValueError(
                f"'{path}' holds no .safetensors file. Pass the file or folder of an adapter as "
                "--lora."
            )
    elif path.suffix != ".safetensors":
        raise ValueError(f"The adapter '{path}' is no .safetensors file. Pass one as --lora.")
    else:
        files = [path]
    for file in files:
        check_whole(file)


def check_whole(path: Path) -> None:
    """Check that a safetensors file has the length that its header gives it.

    Raises:
        ValueError: If it has not, as after an interrupted download.
    """
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
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        if 8 + length + max(ends, default=0) != size:
            wanted = 8 + length + max(ends, default=0)
            raise ValueError(f"it has {size:,} bytes, and its header tells of {wanted:,}")
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is not a whole safetensors file ({error}). Download or copy it again."
        ) from error


def _described(folder: Path, name: str, option: str) -> dict[str, Any]:
    """What a folder's JSON file says.

    Raises:
        ValueError: If there is none, or it is no JSON.
    """
    if not folder.is_dir():
        raise ValueError(
            f"'{folder}' is a file. Pass a folder that was written by save_pretrained as {option}: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one of a "
            "single file, and adapters are passed by --lora."
        )
    path = folder / name
    if not path.is_file():
        below = sorted(folder.glob(f"*/{name}")) + sorted(folder.glob(f"snapshots/*/{name}"))
        hint = f" Did you mean '{below[0].parent}'?" if below else ""
        if name == _PIPELINE and (folder / _MODEL).is_file():
            hint = f" '{folder}' is a network alone: pass it by --model."
        raise ValueError(
            f"'{folder}' holds no {name}. Pass a folder on this machine that was written by "
            f"save_pretrained; nothing is downloaded.{hint}"
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


def _check_weights(whole: Path, folder: Path, variant: str | None) -> None:
    """Check the files of a network that would be read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [f.name for f in sorted(folder.iterdir()) if f.suffix in (".bin", ".pt", ".pth")]
        held = f" but '{others[0]}', which is a pickle, and none is opened" if others else ""
        raise ValueError(
            f"'{whole}' cannot be loaded: '{folder}' holds no weights{held}. Save it again by "
            "save_pretrained(…, safe_serialization=True)."
        )
    variants = {file: match[1] for file in files if (match := _VARIANT.fullmatch(file.name))}
    plain = [file for file in files if file not in variants]
    if variant is None and not plain:
        there = sorted(set(variants.values()))
        raise ValueError(
            f"'{whole}' cannot be loaded: the weights of '{folder}' are of variant "
            f"{' and '.join(there)}. Pass --variant {there[0]}."
        )
    read = plain if variant is None else [f for f in files if variants.get(f) == variant]
    for index in sorted(folder.glob("*.safetensors.index.json")):
        read += _shards(whole, folder, index) if variant is None else []
    for file in dict.fromkeys(read):
        try:
            check_whole(file)
        except ValueError as error:
            raise ValueError(f"'{whole}' cannot be loaded: {error}") from error


def _shards(whole: Path, folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # loading says what is wrong
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"'{whole}' cannot be loaded: {len(missing)} of the files that '{index.name}' names "
            f"are missing, '{missing[0]}' first. Download or copy them again."
        )
    return [folder / name for name in names]
