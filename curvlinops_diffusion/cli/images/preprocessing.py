"""The form in which a network takes images: pixels to numbers in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as transforms

_GREY = ("1", "L", "LA", "La", "I")


@dataclass(frozen=True)
class Form:
    """The form in which the network takes images.

    Attributes:
        channels: Colour channels, 1 or 3; ``None`` for those of the image.
        size: Height and width; ``None`` for any.
        resolution: What to resize to; ``None`` for no resizing.
        multiple: What height and width must be multiples of.
    """

    channels: int | None
    size: tuple[int, int] | None
    resolution: int | None
    multiple: int = 1

    def tensor(self, image: Image.Image, name: str) -> Tensor:
        """The image in [-1, 1], shape ``[C, H, W]``, turned as its EXIF orientation says.

        Raises:
            ValueError: If it has another size than the network's, is transparent somewhere, or has
                pixels of unknown range.
        """
        image = ImageOps.exif_transpose(image)  # as training scripts and viewers do
        if image.mode == "F" or image.mode.startswith("I"):
            return self.sized(_deep(image, name).repeat(self.channels or 1, 1, 1), name)
        _check_opaque(image, name)
        grey = self.channels == 1 or (self.channels is None and image.mode in _GREY)
        x = transforms.pil_to_tensor(image.convert("L" if grey else "RGB")).float() / 127.5 - 1
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
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by a quarter, mirrored or not
    return (width, height) if turned else (height, width)


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
