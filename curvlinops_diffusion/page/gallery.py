"""Images that are shown: names, captions, and the images themselves when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from curvlinops_diffusion.diffusion.regression import NoisedRegression


class Gallery(Protocol):
    """Images with names."""

    @property
    def names(self) -> Sequence[str]:
        """A name for each image."""

    def caption(self, n: int) -> str:
        """The prompt or class of an image; nothing if it has none."""

    def images(self, numbers: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield some of the images in [-1, 1], ``[C, H, W]``, with their numbers."""

    def digest(self, n: int) -> str | None:
        """A digest of an image that was yielded; ``None`` where none is kept."""


class RegressionGallery:
    """The clean examples of a regression, whatever form its data has.

    Args:
        regression: Objective, data and draws.

    Attributes:
        names: The data's own names, else numbers.
    """

    def __init__(self, regression: NoisedRegression):
        self._regression = regression
        self.names: Sequence[str] = regression.names or [str(n) for n in range(regression.num_data)]

    def caption(self, n: int) -> str:
        """Nothing: conditions of such data are in no known form."""
        return ""

    def images(self, numbers: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield images in one pass over the data.

        Raises:
            ValueError: If the examples are no images.
        """
        for clean in self._regression.clean_batches():
            for n, x in zip(clean.indices, clean.x0, strict=True):
                if n in numbers:
                    if x.ndim != 3 or x.shape[0] not in (1, 3):
                        raise ValueError(
                            f"Examples must be images [1 or 3, height, width] to be shown, got "
                            f"shape {tuple(x.shape)}. Use the scores, or to_pandas()."
                        )
                    yield n, x.detach().float().cpu()

    def digest(self, n: int) -> str | None:
        """None is kept."""
        return None


#: The group of images that have no class, or nothing in a column.
NO_GROUP = "(none)"


def group_names(gallery: Gallery, by: str | Sequence[str]) -> list[str]:
    """The name of a group for each image of a gallery.

    Args:
        gallery: The images.
        by: ``'folder'``, ``'class'``, a column of the metadata, or the names themselves.

    Raises:
        ValueError: If the images have nothing of that name, or names are not one for each.
    """
    names = list(gallery.names)
    if not isinstance(by, str):
        given = by.tolist() if hasattr(by, "tolist") else list(by)
        if len(given) != len(names):
            raise ValueError(
                f"Groups must have a name for each of the {len(names)} training images, got "
                f"{len(given)}. Pass one for each, in their order."
            )
        return [_group(value) for value in given]
    known: dict[str, Sequence[Any]] = dict(getattr(gallery, "columns", None) or {})
    conditions: Mapping[str, Sequence[Any]] = getattr(gallery, "conditions", None) or {}
    classes = getattr(gallery, "classes", None)
    if classes is not None or "class_labels" in conditions:
        known["class"] = conditions["class_labels"] if classes is None else classes.names
    files = names if any("/" in name for name in names) else getattr(gallery, "paths", None)
    if files is not None:
        known["folder"] = [Path(file).parent for file in files]
    if by not in known:
        found = f"{', '.join(sorted(known))}, or" if known else "the images have none:"
        raise ValueError(
            f"Groups of training images are by {found} a list of a name for each, got '{by}'."
        )
    return [_group(value) for value in known[by]]


def _group(value: Any) -> str:
    return NO_GROUP if value in (None, "") else str(value)
