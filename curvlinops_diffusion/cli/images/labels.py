"""Labels and prompts: what the network takes besides images, and whether they are that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOW = {
    "class_labels": (
        "label",
        "Put each class into a folder of its own, or give a 'label' for each image in "
        "metadata.jsonl or the data set, or 'labels' in the .npz file",
    ),
    "prompt": (
        "prompt",
        "Give a 'text' for each image in metadata.jsonl or the data set, or one by --prompt",
    ),
}


@dataclass(frozen=True)
class Condition:
    """The condition that the network takes besides the image.

    Attributes:
        key: ``'class_labels'``, ``'prompt'``, or ``None`` for nothing.
        count: How many labels it knows; ``None`` for any.
        prompt: The prompt of images that have none of their own; ``None`` for an error.
        sizes: Whether the network is told each image's original size, and what was cut out of it.
    """

    key: str | None = None
    count: int | None = None
    prompt: str | None = None
    sizes: bool = False

    def of(
        self, path: Path, names: Sequence[str], conditions: dict[str, list[Any]]
    ) -> dict[str, list[Any]]:
        """Select those of the images' conditions that the network takes.

        Raises:
            ValueError: If an image has none, or one that the network does not know.
        """
        if self.key is None:
            return {}
        values = conditions.get(self.key, [None] * len(names))
        if self.key == "prompt":
            values = [self.prompt if value is None else value for value in values]
        for name, value in zip(names, values, strict=True):
            self._check(path, name, value)
        return {self.key: values}

    def _check(self, path: Path, name: str, value: Any) -> None:
        what, how = _HOW[self.key or ""]
        if value is None:
            raise ValueError(
                f"The image '{name}' of '{path}' has no {what}, which the network takes. {how}."
            )
        if self.key == "prompt":
            if not isinstance(value, str):
                raise ValueError(
                    f"The prompt of image '{name}' of '{path}' is {value!r}, which is no text. "
                    f"{how}."
                )
            return
        top = "" if self.count is None else f" to {self.count - 1}"
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 0 or (self.count is not None and value >= self.count):
            raise ValueError(
                f"The label of image '{name}' of '{path}' is {value!r}, and the network knows the "
                f"whole numbers from 0{top}. Number the classes as in training."
            )


@dataclass(frozen=True)
class Classes:
    """Classes that have names.

    Attributes:
        order: The names in the order in which they are numbered.
        names: The class of each image; ``None`` for none.
    """

    order: list[str]
    names: list[str | None]

    def labels(self) -> list[int | None]:
        """The number of each image's class."""
        numbers = {name: number for number, name in enumerate(self.order)}
        return [None if name is None else numbers[name] for name in self.names]

    def numbered_as(self, training: Classes, images: Sequence[str]) -> Classes:
        """The same images, their classes numbered as those of the training data.

        Raises:
            ValueError: If a class is unknown there.
        """
        for image, name in zip(images, self.names, strict=True):
            if name is not None and name not in training.order:
                known = ", ".join(training.order[:8]) + (", …" if len(training.order) > 8 else "")
                raise ValueError(
                    f"The class '{name}' of the query '{image}' is none of those of the training "
                    f"data ({known}). Name it as there, or leave it out."
                )
        return Classes(training.order, self.names)


def of_metadata(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Prompts and labels of a folder's images by its ``metadata.jsonl``; ``None`` where one lacks.

    Raises:
        ValueError: If the file is not understood, or lacks an image.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rows = {line["file_name"]: line for line in lines}
        keys = {"text": "prompt", "label": "class_labels"}
        return {
            ours: [rows[name].get(theirs) for name in names]
            for theirs, ours in keys.items()
            if any(theirs in row for row in lines)
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is not understood ({type(error).__name__}: {error}). Each line must "
            'be like {"file_name": "a.png", "text": "a cat"}, with a line for each image.'
        ) from error
