"""Prompts that programs which generate images write into their files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

# what A1111's programs write after the prompt
_AFTER = re.compile(r"\n(?:Negative prompt:|Steps: \d)")
# networks that are loaded by name in the prompt, and are no words of it
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)
_WEIGHT = re.compile(r"(?<!\\)[(\[{]([^()\[\]{}]*?)(?::\s*[\d.]+)?(?<!\\)[)\]}]")


def embedded_prompt(file: Path) -> str | None:
    """The prompt in an image file, of A1111's and ComfyUI's programs, InvokeAI and SwarmUI.

    Weights of words, ``(word:1.2)``, and networks that the prompt names, ``<lora:name:1>``, are
    left out: the words alone are what a network is trained with. A damaged file has none.
    """
    try:
        with Image.open(file) as image:
            image.load()  # of PNG, text may lie behind the pixels
            entries = dict(getattr(image, "text", None) or image.info)
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # of a damaged file, which may be any
        return None
    if isinstance(comment, bytes):
        comment = _decoded(comment)
    text = _in_entries({**entries, **({"parameters": comment} if comment else {})})
    return (plain_words(text) or None) if isinstance(text, str) else None


def plain_words(prompt: str) -> str:
    """A prompt without weights and names of networks, in one line."""
    prompt = _NETWORK.sub("", prompt)
    before = None
    while prompt != before:  # from the inner brackets outwards
        before, prompt = prompt, _WEIGHT.sub(r"\1", prompt)
    prompt = re.sub(r"\\([()\[\]{}])", r"\1", prompt)
    prompt = re.sub(r"\s+", " ", prompt)
    return re.sub(r"(?: ?, ?)+", ", ", prompt).strip(" ,")


def _in_entries(entries: Mapping[str, Any]) -> Any:
    parameters = entries.get("parameters")
    if isinstance(parameters, str):
        own = _table(parameters)
        if own is None:
            return _AFTER.split(f"{parameters}\n", 1)[0]
        return (_table(own.get("sui_image_params")) or {}).get("prompt")  # SwarmUI
    if (invoke := _table(entries.get("invokeai_metadata"))) is not None:
        return invoke.get("positive_prompt")
    return _in_graph(_table(entries.get("prompt")) or {})


def _in_graph(graph: Mapping[str, Any]) -> str | None:
    """The text that leads to the positive input of ComfyUI's sampler; ``None`` if it is not one."""
    given = [_inputs(node).get("positive") for node in graph.values()]
    found = {_leading_to(graph, each, 16) for each in given} - {None}
    return found.pop() if len(found) == 1 else None


def _leading_to(graph: Mapping[str, Any], value: Any, depth: int) -> str | None:
    """The text that a value is or comes from, by links ``[node, output]``."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 2 or depth == 0:
        return None
    inputs = _inputs(graph.get(str(value[0]), {}))
    names = ("text", "text_g", "string", "value", "positive", "conditioning", "conditioning_1")
    given = (inputs[name] for name in names if name in inputs)
    return next(filter(None, (_leading_to(graph, each, depth - 1) for each in given)), None)


def _inputs(node: Any) -> Mapping[str, Any]:
    return _table((_table(node) or {}).get("inputs")) or {}


def _table(value: Any) -> Mapping[str, Any] | None:
    """A table, or the JSON text of one; ``None`` for anything else."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return found if isinstance(found, Mapping) else None


def _decoded(comment: bytes) -> str | None:
    """The text of an EXIF comment, whose first eight bytes say how it is written."""
    kind, rest = comment[:8].rstrip(b"\0"), comment[8:]
    if kind == b"UNICODE":  # by A1111's programs with the first byte high, whatever EXIF says
        return rest.decode("utf-16-be" if rest[:1] == b"\0" else "utf-16-le", "replace")
    return rest.decode("utf-8", "replace") if kind in (b"ASCII", b"") else None
