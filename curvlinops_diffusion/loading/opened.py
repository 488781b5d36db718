"""Image files, opened as training scripts open them, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

# the tag of a TIFF file's image that says what it is; bits of a smaller copy and of a mask
_SUBFILE, _NO_PAGE = 254, 1 | 4
#: A file, or what loads an image from elsewhere.
Source = Path | Callable[[], Any]


@contextmanager
def opened(source: Source, name: str) -> Iterator[Image.Image]:
    """An image whose pixels are loaded.

    Args:
        source: Its file, or what returns it.
        name: Its name, where it has no file.

    Raises:
        ValueError: If there is none, it cannot be read, or it has several pages.
    """
    what = source if isinstance(source, Path) else name
    try:
        image = Image.open(source) if isinstance(source, Path) else source()
        pages = _pages(image)
        if image is not None and pages == 1:
            image.load()
    except FileNotFoundError as error:
        raise ValueError(
            f"The image '{what}' has vanished. Put it back, and start again to go on."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The image '{what}' is too large for Pillow, and for training scripts that open it by "
            f"Pillow ({error}). Save it smaller, as training saw it."
        ) from error
    except Exception as error:  # of a damaged file, which may be any
        raise ValueError(
            f"The image '{what}' cannot be read ({error or type(error).__name__}). Repair it, or "
            "remove it and start anew."
        ) from error
    if image is None:
        raise ValueError(f"The image '{what}' is missing: there is nothing in its column.")
    with image:
        if pages > 1:
            raise ValueError(
                f"The image '{what}' has {pages} pages, and training scripts read the first alone. "
                "Save that one as a file of its own, or each of them if they are all images."
            )
        yield image


def _pages(image: Any) -> int:
    """Count the pages of a TIFF file; of an animation, the first frame is what everybody reads."""
    if getattr(image, "format", None) != "TIFF":
        return 1
    pages = 1
    for n in range(1, image.n_frames):
        image.seek(n)
        pages += not image.tag_v2.get(_SUBFILE, 0) & _NO_PAGE
    image.seek(0)
    return pages
