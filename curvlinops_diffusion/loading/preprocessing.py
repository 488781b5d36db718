"""The form in which a network takes images: pixels to numbers in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from warnings import warn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as transforms

#: An image as a network takes it, ``[C, H, W]``, and its height and width before resizing.
Loaded = tuple[Tensor, tuple[int, int]]
#: The numbers of channels that image files are read with: grey, and RGB.
FILE_CHANNELS = (1, 3)
# Where training scripts differ; said once, whatever image it is
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
            entry: What of an item the channels are of; nothing for the image itself.

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

    def tensor(self, image: Image.Image, name: str) -> Tensor:
        """The image in [-1, 1], shape ``[C, H, W]``, turned as its EXIF orientation says.

        Raises:
            ValueError: If it has another size than the network's, is transparent somewhere, or has
                pixels of unknown range.
        """
        self.check_channels()
        if _is_turned(image):
            warn(_TURNED, stacklevel=2)
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            warn(_DEEP, stacklevel=2)
            return self.sized(_deep(image, name).repeat(self.channels or 1, 1, 1), name)
        _check_opaque(image, name)
        grey = self.channels == 1 or (self.channels is None and image.mode in _GREY)
        try:
            flat = image.convert("L" if grey else "RGB")
        except ValueError as error:
            raise ValueError(
                f"The image '{name}' is in the mode {image.mode} ({error}). Save it as RGB."
            ) from error
        x = transforms.pil_to_tensor(flat).float() / 127.5 - 1
        return self.sized(x, name)

    def corner_of(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of what is cut out of an image of this size, after it was resized."""
        if self.resolution is None:
            return 0, 0
        shorter = min(height, width)
        sides = (self.resolution * side // shorter for side in (height, width))
        top, left = (round((side - self.resolution) / 2) for side in sides)
        return top, left

    def sized(self, x: Tensor, name: str) -> Tensor:
        """Resized where asked for, and checked."""
        if self.resolution is not None:
            x = transforms.resize(x, [self.resolution], antialias=True)
            x = transforms.center_crop(x, [self.resolution]).clamp(-1, 1)
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


def _is_turned(image: Image.Image) -> bool:
    return _orientation(image) in range(2, 9)


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


def _check_opaque(image: Image.Image, name: str) -> None:
    """Refuse transparency: what was behind it in training is not known."""
    if image.has_transparency_data:
        darkest, _ = image.convert("RGBA").getchannel("A").getextrema()
        if darkest != 255:
            raise ValueError(
                f"The image '{name}' has transparent pixels, and what was behind them in training "
                "is not known. Save it without alpha, on that background."
            )
