"""The form in which a network takes images: files opened, pixels to numbers in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as transforms

#: An image as a network takes it, ``[C, H, W]``, and its height and width before resizing.
Loaded = tuple[Tensor, tuple[int, int]]
#: Where a crop lies, down and across, from 0 to 1 of all places that there are; ``None`` for the
#: middle.
Place = tuple[float, float] | None
#: A file, or a function that loads an image from elsewhere.
Source = Path | Callable[[], Any]
#: The numbers of channels that image files are read with: grey, and RGB.
FILE_CHANNELS = (1, 3)
# where training scripts differ; warned of once, whatever image it is
_TURNED = (
    "images are turned as their EXIF orientation says, as diffusers' training scripts and viewers "
    "turn them. Trainers that do not (kohya's sd-scripts) saw them as they are stored: save them "
    "without the tag if that was yours"
)
_DEEP = (
    "grey images of more than 8 bits are read from 0 to 65535. Training scripts that call "
    "image.convert('RGB') saw all above 255 as white: if yours did, save them as it made them"
)
_GREY = ("1", "L", "LA", "La", "I")
# the tag of a TIFF file's image that says what it is; bits of a smaller copy and of a mask
_SUBFILE, _NO_PAGE = 254, 1 | 4


@dataclass(frozen=True)
class Form:
    """The form in which the network takes images.

    Attributes:
        channels: Channels; ``None`` for those of the image.
        size: Height and width; ``None`` for any.
        resolution: What to resize to; ``None`` for no resizing.
        multiple: What height and width must be multiples of.
    """

    channels: int | None
    size: tuple[int, int] | None
    resolution: int | None
    multiple: int = 1

    def check_channels(self, entry: str = "") -> None:
        """Check that image files can have the network's channels.

        Args:
            entry: The entry of an item that the channels are of; nothing for the image itself.

        Raises:
            ValueError: If they are neither grey nor RGB.
        """
        if self.channels in (None, *FILE_CHANNELS):
            return
        what = f"The network takes {self.channels} channels{entry and ' as ' + repr(entry)}"
        how = (
            "Compute the scores in Python"
            if entry
            else f"Pass an .npz file with 'images' of {self.channels} channels: bytes "
            "[N, height, width, channels], or floating point in [-1, 1], "
            "[N, channels, height, width]"
        )
        raise ValueError(f"{what}, and image files are read as grey (1) or RGB (3). {how}.")

    def load(self, source: Source, name: str, place: Place = None) -> Loaded:
        """Load an image from its file or elsewhere; errors name the file, or else the name."""
        with _opened(source, name) as image:
            return self.tensor(image, name, place), upright_size(image)

    def tensor(self, image: Image.Image, name: str, place: Place = None) -> Tensor:
        """The image in [-1, 1], shape ``[C, H, W]``, turned as its EXIF orientation says.

        Raises:
            ValueError: If it has another size than the network's, is transparent somewhere, or has
                pixels of unknown range.
        """
        self.check_channels()
        if _orientation(image) in range(2, 9):
            warn(_TURNED, stacklevel=2)
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            warn(_DEEP, stacklevel=2)
            deep = _deep(image, name).repeat(self.channels or 1, 1, 1)
            return self.sized(deep, name, place)
        if image.has_transparency_data:
            darkest, _ = image.convert("RGBA").getchannel("A").getextrema()
            if darkest != 255:
                raise ValueError(
                    f"The image '{name}' has transparent pixels, and what was behind them in "
                    "training is not known. Save it without alpha, on that background."
                )
        grey = self.channels == 1 or (self.channels is None and image.mode in _GREY)
        try:
            flat = image.convert("L" if grey else "RGB")
        except ValueError as error:
            raise ValueError(
                f"The image '{name}' is in the mode {image.mode} ({error}). Save it as RGB."
            ) from error
        x = transforms.pil_to_tensor(flat).float() / 127.5 - 1
        return self.sized(x, name, place)

    def corner_of(self, height: int, width: int, place: Place = None) -> tuple[int, int]:
        """Top and left of what is cut out of an image of this size, after it was resized."""
        if self.resolution is None:
            return 0, 0
        shorter = min(height, width)
        rest = [self.resolution * side // shorter - self.resolution for side in (height, width)]
        if place is None:
            top, left = (round(more / 2) for more in rest)
        else:  # as torch.randint chooses among all that there are
            top, left = (int(z * (more + 1)) for z, more in zip(place, rest, strict=True))
        return top, left

    def sized(self, x: Tensor, name: str, place: Place = None) -> Tensor:
        """Resize an image where asked for, and check its size."""
        if self.resolution is not None:
            top, left = self.corner_of(x.shape[1], x.shape[2], place)
            x = transforms.resize(x, [self.resolution], antialias=True)
            x = transforms.crop(x, top, left, self.resolution, self.resolution).clamp(-1, 1)
        height, width = x.shape[1:]
        if self.size is not None and (height, width) != self.size:
            raise ValueError(
                f"The image '{name}' is {height}×{width} pixels, the network was trained "
                f"on {self.size[0]}×{self.size[1]}. Pass --resolution {self.size[0]} to resize."
            )
        if height % self.multiple or width % self.multiple:
            nearest = max(min(height, width) // self.multiple, 1) * self.multiple
            raise ValueError(
                f"The image '{name}' is {height}×{width} pixels, and the network takes multiples "
                f"of {self.multiple}. Pass --resolution {nearest} to resize."
            )
        return x


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image as its EXIF orientation turns it, without reading pixels."""
    width, height = image.size
    turned = _orientation(image) > 4  # by a quarter, mirrored or not
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) else 1


def _deep(image: Image.Image, name: str) -> Tensor:
    """Grey in 16 bits, ``[1, H, W]``; Pillow's own conversion to 8 would cut it off at 255."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" or low < 0 or high > 65535:
        raise ValueError(
            f"The image '{name}' has pixels from {low:g} to {high:g} (mode {image.mode}), of which "
            "black and white are not known. Save it with 8 or 16 bits a channel."
        )
    return torch.from_numpy(values.astype(np.float32) / 32767.5 - 1).unsqueeze(0)


@contextmanager
def _opened(source: Source, name: str) -> Iterator[Image.Image]:
    """Open an image and load its pixels; refuse what cannot be read, or has several pages."""
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
