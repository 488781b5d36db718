"""Labels and prompts: which of them the network takes besides images, and whether it knows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curvlinops_diffusion.loading.metadata import lacking

_HOW = {
    "class_labels": (
        "label",
        "Put each class into a folder of its own (without metadata files), or give a 'label' for "
        "each image in metadata.jsonl or the data set, or 'labels' in the .npz file",
    ),
    "prompt": (
        "prompt",
        "Give a 'text' for each image in metadata.jsonl or the data set, or a file of its name "
        "and .txt or .caption (or another --caption-extension), or one prompt by --prompt",
    ),
}
_SIZES = ("original_size", "crops_coords_top_left", "target_size")

Conditions = dict[str, list[Any]]


@dataclass(frozen=True)
class Condition:
    """The condition that the network takes besides the image.

    Attributes:
        key: ``'class_labels'``, ``'prompt'``, or ``None`` for nothing.
        count: How many labels it knows; ``None`` for any.
        prompt: The prompt of images that have none of their own; ``None`` for an error.
        sizes: Whether the network takes each image's original size, and what was cut out of it.
        images: The images that it takes beside each image, masks say, and their channels.
    """

    key: str | None = None
    count: int | None = None
    prompt: str | None = None
    sizes: bool = False
    images: dict[str, int] = field(default_factory=dict)

    def of(
        self, path: Path, names: Sequence[str], conditions: Conditions, unread: Sequence[str] = ()
    ) -> Conditions:
        """Select those of the images' conditions that the network takes.

        ``unread`` are columns that stand beside these and are not read, for messages.

        Raises:
            ValueError: If an image has none, or one that the network does not know.
        """
        if self.key is None:
            return {}
        values = conditions.get(self.key, [None] * len(names))
        if self.key == "prompt":
            values = [self.prompt if value is None else value for value in values]
        if without := [name for name, value in zip(names, values, strict=True) if value is None]:
            what, how = _HOW[self.key]
            others = f" Not read: {', '.join(unread)}." if unread else ""
            if self.key == "prompt" and any(" " not in column for column in unread):
                others += " --caption-column NAME reads the prompts from another column."
            start = lacking(without, len(names), path, what)
            raise ValueError(f"{start}, which the network takes. {how}.{others}")
        for name, value in zip(names, values, strict=True):
            self._check(f"image '{name}' of '{path}'", value)
        noted = {key: conditions[key] for key in _SIZES if self.sizes and key in conditions}
        for key, sizes in noted.items():
            for name, size in zip(names, sizes, strict=True):
                pair = isinstance(size, list | tuple) and len(size) == 2
                if not pair or not all(type(side) is int for side in size):
                    raise ValueError(
                        f"The '{key}' of image '{name}' of '{path}' is {size!r}. Give two whole "
                        "numbers for each image, height or top first, or leave the column out."
                    )
        return {self.key: values, **noted}

    def images_of(self, path: Path, names: Sequence[str], conditions: Conditions) -> Conditions:
        """Select the images that the network takes beside each image, or raise ValueError."""
        for entry in self.images:
            for name, value in zip(names, conditions.get(entry, [None] * len(names)), strict=True):
                if value is None:
                    raise ValueError(
                        f"The image '{name}' of '{path}' has no '{entry}', which the network "
                        f"takes. Name its file as '{entry}_file_name' in the metadata.jsonl of its "
                        "folder, or have a column of images in the data set."
                    )
        return {entry: conditions[entry] for entry in self.images}

    def _check(self, image: str, value: Any) -> None:
        if self.key == "prompt":
            if not isinstance(value, str):
                raise ValueError(
                    f"The prompt of {image} is {value!r}, which is no text. {_HOW['prompt'][1]}."
                )
            return
        top = "" if self.count is None else f" to {self.count - 1}"
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 0 or (self.count is not None and value >= self.count):
            raise ValueError(
                f"The label of {image} is {value!r}, and the network knows the whole numbers from "
                f"0{top}. Number the classes as in training."
            )


@dataclass(frozen=True)
class Classes:
    """Classes that have names.

    Attributes:
        order: The names in the order in which they are numbered.
        names: The class of each image; ``None`` for none.
        doubt: Why the numbers may not be those of training, with a remedy, but for its full stop;
            nothing if they are.
    """

    order: list[str]
    names: list[str | None]
    doubt: str = ""

    def check_sure(self) -> None:
        """Check that the classes of training images are numbered as training did."""
        if self.doubt:
            raise ValueError(f"{self.doubt}, or give a 'label' for each image in metadata.jsonl.")

    def labels(self) -> list[int | None]:
        """The number of each image's class."""
        numbers = {name: number for number, name in enumerate(self.order)}
        return [None if name is None else numbers[name] for name in self.names]

    def numbered_as(self, training: Classes, images: Sequence[str]) -> Classes:
        """Number the classes as those of the training data.

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
