"""The form in which a network takes images: files opened, resized, pixels to [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from warnings import warn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as transforms

from curvlinops_diffusion.loading import sizes
from curvlinops_diffusion.loading.sizes import Interpolation, Placement, Size
from curvlinops_diffusion.runtime.checks import check_count

#: An image as a network takes it, ``[C, H, W]``, and its size before resizing.
Loaded = tuple[Tensor, Size]
#: Where a crop lies between the first and the last place that there is, from 0 to 1, down and
#: across; ``None`` for the middle.
Place = tuple[float, float] | None
#: A file, or a function that loads an image from elsewhere.
Source = Path | Callable[[], Any]
#: Options of :class:`Form` that users choose: how images are resized and cropped.
SIZING = (
    "resolution",
    "buckets",
    "bucket_step",
    "bucket_min",
    "bucket_max",
    "bucket_no_upscale",
    "interpolation",
)
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
_TRANSPARENT = (
    "transparent pixels have the colours that their files hold behind them, as kohya's scripts, "
    "diffusers', OneTrainer and ai-toolkit read them (image.convert('RGB')). If yours were shown "
    "on a background, save them on it, without alpha"
)
_GREY = ("1", "L", "LA", "La", "I")
# the tag of a TIFF file's image that says what it is; bits of a smaller copy and of a mask
_SUBFILE, _NO_PAGE = 254, 1 | 4


@dataclass(frozen=True)
class Form:
    """The form in which the network takes images.

    Attributes:
        channels: Channels; ``None`` for those of the image.
        size: Height and width; ``None`` for any. Of no matter where there are buckets.
        resolution: What to resize to; ``None`` for no resizing.
        multiple: What height and width must be multiples of.
        buckets: The sizes of aspect buckets; True for those of kohya's scripts, ``'square'`` for
            the one that these have without, ``'auto'`` for those that ``diffusers``' scripts make,
            ``'onetrainer'`` or ``'ai-toolkit'`` for theirs, False for none.
        bucket_step: What their sides are multiples of, where nothing else says it.
        bucket_min: Their shortest side.
        bucket_max: Their longest side.
        bucket_no_upscale: Whether no image is enlarged for them.
        interpolation: How images are resized; ``None`` for the trainer's own default.
        made_for: The side of the images that the network was made for, which takes others too;
            ``None`` where that is not known.

    Raises:
        ValueError: If options are of no accepted kind, or do not fit together.
    """

    channels: int | None
    size: Size | None
    resolution: int | None
    multiple: int = 1
    buckets: bool | str | Sequence[Size] = False
    bucket_step: int = 64
    bucket_min: int = 256
    bucket_max: int = 1024
    bucket_no_upscale: bool = False
    interpolation: Interpolation | None = None
    made_for: int | None = None

    def __post_init__(self) -> None:
        """Check the options, and read buckets that are written as a text."""
        object.__setattr__(self, "buckets", sizes.bucket_list(self.buckets))
        if self.interpolation not in (None, *get_args(Interpolation)):
            raise ValueError(
                f"`interpolation` must be one of {', '.join(get_args(Interpolation))}, got "
                f"{self.interpolation!r}."
            )
        for name in ("resolution", "bucket_step", "bucket_min", "bucket_max"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.buckets is True or isinstance(self.buckets, str):
            self._check_made_buckets()
        elif self.buckets:
            m = self.multiple
            if misfits := [f"{h}×{w}" for h, w in self._listed if h % m or w % m]:
                raise ValueError(
                    f"`buckets` must have heights and widths that are multiples of {self.multiple}"
                    f", which the network takes, got {', '.join(misfits[:4])}."
                )

    def _check_made_buckets(self) -> None:
        if self.resolution is None:
            raise ValueError("`buckets` needs the `resolution` that training had, got none.")
        if self.buckets in ("auto", "square"):
            return
        if self.bucket_step % self.multiple:
            raise ValueError(
                f"`bucket_step` must be a multiple of {self.multiple}, which the network takes, "
                f"got {self.bucket_step}."
            )
        if self.buckets is not True:
            return
        least, most = self._limits
        if not least:
            raise ValueError(
                f"`bucket_min` must be at least `bucket_step`, got {self.bucket_min} and "
                f"{self.bucket_step}. Pass those of training."
            )
        if not least <= self.resolution <= most:
            raise ValueError(
                f"`resolution` must be from {least} to {most}, the shortest and longest side of a "
                f"bucket, got {self.resolution}. Pass training's `bucket_min` and `bucket_max`."
            )

    @property
    def _is_kohyas(self) -> bool:
        """True if images are resized, and their sizes told, as by kohya's scripts."""
        return self.buckets is True or self.buckets == "square"

    @property
    def _limits(self) -> Size:
        """The shortest and longest side of a bucket, in whole steps."""
        step = self.bucket_step
        return self.bucket_min // step * step, -(-self.bucket_max // step) * step

    @property
    def _listed(self) -> tuple[Size, ...]:
        assert isinstance(self.buckets, tuple)
        return self.buckets

    @property
    def told(self) -> dict[str, Any]:
        """The options as plain values, :class:`Form`'s arguments: channels, and what is chosen."""
        plain = Form(None, None, None)
        chosen = {k: getattr(self, k) for k in SIZING if getattr(self, k) != getattr(plain, k)}
        return {"channels": self.channels, "resolution": None} | chosen

    def proposal(self, otherwise: int | None = None) -> str:
        """Say which ``resolution`` to pass: that which the network was made for, or another."""
        if self.made_for is None:
            return f"Pass --resolution {otherwise or 'N'} to resize."
        return (
            f"This network was made for images of {self.made_for} pixels: pass --resolution "
            f"{self.made_for}, or what training had, to resize."
        )

    def check_channels(self, entry: str = "") -> None:
        """Check that image files can have the network's channels, of an ``entry`` beside or not.

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

    def load(
        self, source: Source, name: str, place: Place = None, of: Size | None = None
    ) -> Loaded:
        """Load an image from its file or elsewhere; errors name the file, or else the name."""
        with _opened(source, name) as image:
            return self.tensor(image, name, place, of), self.size_of(image)

    def size_in(self, source: Source, name: str) -> Size:
        """The size of an image as :meth:`load` tells it, without reading pixels."""
        with _opened(source, name, pixels=False) as image:
            return self.size_of(image)

    def size_of(self, image: Image.Image) -> Size:
        """Height and width of an image as it is read, turned or not."""
        return (image.height, image.width) if self._is_kohyas else upright_size(image)

    def tensor(
        self, image: Image.Image, name: str, place: Place = None, of: Size | None = None
    ) -> Tensor:
        """The image in [-1, 1], shape ``[C, H, W]``, turned as its EXIF orientation says.

        With kohya's buckets it is not turned: his scripts do not. ``of`` is the size of the image
        that it lies beside, with which it is resized and cropped.

        Raises:
            ValueError: If it has another size than the network's, or pixels of unknown range.
        """
        self.check_channels()
        if not self._is_kohyas:
            if _orientation(image) in range(2, 9):
                warn(_TURNED, stacklevel=2)
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            warn(_DEEP, stacklevel=2)
            deep = _deep(image, name).repeat(self.channels or 1, 1, 1)
            return self.sized(deep, name, place, of)
        if image.has_transparency_data:
            darkest, _ = image.convert("RGBA").getchannel("A").getextrema()
            if darkest != 255:
                warn(_TRANSPARENT, stacklevel=2)
        grey = self.channels == 1 or (self.channels is None and image.mode in _GREY)
        try:
            flat = image.convert("L" if grey else "RGB")
        except ValueError as error:
            raise ValueError(
                f"The image '{name}' is in the mode {image.mode} ({error}). Save it as RGB."
            ) from error
        box = self._box(name, of or (flat.height, flat.width), place)
        if box is not None:  # as images, before they are numbers, as training scripts do
            whole, (top, left), (height, width) = box
            flat = sizes.resized(flat, whole, self._how, self._is_kohyas)
            flat = flat.crop((left, top, left + width, top + height))
        return self._checked(transforms.normalize(transforms.to_tensor(flat), [0.5], [0.5]), name)

    def placed(self, name: str, size: Size) -> Placement:
        """The size that an image is resized to, and that of the part that is kept.

        Raises:
            ValueError: If there is no bucket for it.
        """
        if self._is_kohyas:
            assert self.resolution is not None, "which is checked"
            if self.buckets == "square":
                return sizes.area_bucket(size, [(self.resolution, self.resolution)])
            if self.bucket_no_upscale:
                return sizes.shrunk_bucket(name, size, self.resolution, self.bucket_step)
            buckets = sizes.area_buckets(self.resolution, self.bucket_step, *self._limits)
            return sizes.area_bucket(size, buckets)
        if self.buckets and not isinstance(self.buckets, str):
            return sizes.nearest_bucket(size, self._listed)
        if self.resolution is None:
            return size, size
        if self.buckets == "onetrainer":
            return sizes.onetrainer_bucket(size, self.resolution, self.bucket_step)
        if self.buckets == "ai-toolkit":
            return sizes.toolkit_bucket(size, self.resolution, self.bucket_step)
        if self.buckets:
            return sizes.made_bucket(size, self.resolution)
        whole = tuple(self.resolution * side // min(size) for side in size)
        return (whole[0], whole[1]), (self.resolution, self.resolution)

    @property
    def _how(self) -> Interpolation | None:
        """The interpolation that is chosen, of ai-toolkit bicubic."""
        return self.interpolation or ("bicubic" if self.buckets == "ai-toolkit" else None)

    def told_size(self, size: Size) -> Size:
        """The original size of an image as the network is told it; ai-toolkit tells its bucket."""
        return self.placed("", size)[1] if self.buckets == "ai-toolkit" else size

    def corner_of(self, height: int, width: int, place: Place = None) -> tuple[int, int]:
        """Compute the top and left offsets of the crop, as the network takes them.

        Kohya's scripts tell something else than where they cut, ai-toolkit nothing.
        """
        whole, part = self.placed("", (height, width))
        if self._is_kohyas:
            return sizes.told_corner((height, width), part)
        if self.buckets == "ai-toolkit":
            return 0, 0
        return self._corner(whole, part, place)

    def _corner(self, whole: Size, part: Size, place: Place) -> tuple[int, int]:
        rest = [a - b for a, b in zip(whole, part, strict=True)]
        if place is None:  # torchvision rounds half a pixel to even numbers
            down = self._is_kohyas or self.buckets in ("onetrainer", "ai-toolkit")
            top, left = (more // 2 if down else round(more / 2) for more in rest)
        else:  # as torch.randint chooses among all that there are
            top, left = (min(int(z * (m + 1)), m) for z, m in zip(place, rest, strict=True))
        return top, left

    def _box(self, name: str, size: Size, place: Place) -> tuple[Size, Size, Size] | None:
        """The size to resize to, and corner and size of the part; ``None`` for neither."""
        if self.resolution is None and not self.buckets:
            return None
        whole, part = self.placed(name, size)
        return whole, self._corner(whole, part, place), part

    def sized(self, x: Tensor, name: str, place: Place = None, of: Size | None = None) -> Tensor:
        """Resize an image ``[C, H, W]`` where asked for, and check its size."""
        box = self._box(name, of or (x.shape[1], x.shape[2]), place)
        if box is not None:
            whole, corner, part = box
            planes = map(Image.fromarray, x.float().cpu().numpy())
            found = [sizes.resized(plane, whole, self._how, self._is_kohyas) for plane in planes]
            resized = torch.from_numpy(np.stack(list(map(np.asarray, found)))).to(x)
            x = transforms.crop(resized, *corner, *part).clamp(-1, 1)
        return self._checked(x, name)

    def _checked(self, x: Tensor, name: str) -> Tensor:
        height, width = x.shape[1:]
        if self.size is not None and not self.buckets and (height, width) != self.size:
            raise ValueError(
                f"The image '{name}' is {height}×{width} pixels, the network was trained "
                f"on {self.size[0]}×{self.size[1]}. Pass --resolution {self.size[0]} to resize."
            )
        if height % self.multiple or width % self.multiple:
            nearest = max(min(height, width) // self.multiple, 1) * self.multiple
            raise ValueError(
                f"The image '{name}' is {height}×{width} pixels, and the network takes multiples "
                f"of {self.multiple}. {self.proposal(nearest)}"
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
def _opened(source: Source, name: str, pixels: bool = True) -> Iterator[Image.Image]:
    """Open an image and load its pixels; refuse what cannot be read, or has several pages."""
    what = source if isinstance(source, Path) else name
    try:
        image = Image.open(source) if isinstance(source, Path) else source()
        pages = _pages(image)
        if image is not None and pages == 1 and pixels:
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
