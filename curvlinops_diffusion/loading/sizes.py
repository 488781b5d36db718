"""Resizing and cropping as trainers do it: aspect buckets, and their libraries' arithmetic.

Sizes are ``(height, width)``, whatever the trainer writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from math import ceil, floor, sqrt
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

#: Height and width.
Size = tuple[int, int]
#: The size that an image is resized to, and that of the part that is kept.
Placement = tuple[Size, Size]
#: How pixels between pixels are computed.
Interpolation = Literal["bilinear", "bicubic", "lanczos"]


#: Buckets by a word, which need a resolution: the one of kohya's scripts without buckets, those
#: that diffusers' scripts make if none are listed, OneTrainer's, ai-toolkit's.
Named = Literal["square", "auto", "onetrainer", "ai-toolkit"]
# of diffusers' scripts, their width over height, and what their sides are multiples of
_ASPECTS = [a / b for a, b in ((1, 1), (4, 5), (2, 3), (3, 4), (9, 16), (1, 2))]
_MULTIPLE = 16


def bucket_list(given: Any) -> bool | Named | tuple[Size, ...]:
    """Check a user's ``buckets``, and read ``'h,w;h,w'`` as ``diffusers``' scripts do.

    Raises:
        ValueError: If they are neither True, False, a known word nor sizes.
    """
    if isinstance(given, bool):
        return given
    pairs: Any = given
    if isinstance(given, str):
        word = given.strip().lower()
        if word in ("true", "false"):
            return word == "true"
        if word in get_args(Named):
            return cast(Named, word)
        found = [re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text) for text in given.split(";")]
        pairs = [(0, 0) if match is None else tuple(map(int, match.groups())) for match in found]
    try:
        sizes = tuple((int(height), int(width)) for height, width in pairs)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes or min(min(size) for size in sizes) < 1:
        raise ValueError(
            "`buckets` must be True for those of kohya's scripts, "
            f"{', '.join(get_args(Named))}, or heights and widths, [(672, 1568), …] or "
            f"'672,1568;…', got {given!r}."
        )
    return sizes


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Placement:
    """Choose the bucket of an image as ``--aspect_ratio_buckets`` of ``diffusers``' scripts.

    The nearest by aspect ratio (of several, the last), which the resized image covers.
    """
    height, width = size
    distances = [abs(height * w - width * h) for h, w in buckets]
    nearest = max(n for n, distance in enumerate(distances) if distance == min(distances))
    scale = max(new / old for new, old in zip(buckets[nearest], size, strict=True))
    return (round(height * scale), round(width * scale)), buckets[nearest]


def made_bucket(size: Size, resolution: int) -> Placement:
    """Choose the bucket of an image as ``--use_aspect_ratio_buckets`` of ``diffusers``' scripts.

    Of the square's area, or the image's own if that is smaller, in eleven aspect ratios.
    """
    side = min(resolution, round((size[0] * size[1]) ** 0.5))
    return nearest_bucket(size, _made_buckets(side))


@cache
def _made_buckets(side: int) -> tuple[Size, ...]:
    aspects = [z for aspect in _ASPECTS for z in dict.fromkeys((aspect, 1 / aspect))]
    heights = [(side * side / aspect) ** 0.5 for aspect in aspects]
    exact = [(height, height * aspect) for height, aspect in zip(heights, aspects, strict=True)]
    rounded = [[max(1, round(z / _MULTIPLE)) * _MULTIPLE for z in sides] for sides in exact]
    return tuple(dict.fromkeys((height, width) for height, width in rounded))


def onetrainer_bucket(size: Size, resolution: int, step: int) -> Placement:
    """Choose the bucket of an image as OneTrainer: of nine shapes and the same on their side.

    The nearest by height over width, which the resized image covers.
    """
    (height, width), buckets = size, _onetrainer_buckets(resolution, step)
    aspect = height / width
    part = min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))
    if aspect > part[0] / part[1]:
        return (round(height * (part[1] / width)), part[1]), part
    return (part[0], round(width * (part[0] / height))), part


@cache
def _onetrainer_buckets(side: int, step: int) -> tuple[Size, ...]:
    shapes = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)
    sides = [(side / sqrt(shape), side * sqrt(shape)) for shape in shapes]
    sizes = [(round(h / step) * step, round(w / step) * step) for h, w in sides]
    found = dict.fromkeys([*sizes, *((w, h) for h, w in sizes)])
    return tuple(size for size in found if all(size))


def toolkit_bucket(size: Size, resolution: int, step: int) -> Placement:
    """Choose the bucket of an image as ai-toolkit.

    Of the image's shape and at most the square's area, sides down or up to whole steps: what is
    nearest to that area without being larger. The resized image covers it.
    """
    area = size[0] * size[1]
    wanted = min(area, resolution**2)
    down, across = ((side * (wanted / area) ** 0.5) / step for side in size)
    sides = [
        (h * step, w * step)
        for w in (floor(across), ceil(across))
        for h in (floor(down), ceil(down))
        if 0 < h * w * step**2 <= resolution**2
    ]
    least = (max(1, floor(down)) * step, max(1, floor(across)) * step)
    part = min(sides or [least], key=lambda each: abs(each[0] * each[1] - wanted))
    scale = max(new / old for new, old in zip(part, size, strict=True))
    return (ceil(size[0] * scale), ceil(size[1] * scale)), part


@cache
def area_buckets(resolution: int, step: int, least: int, most: int) -> tuple[Size, ...]:
    """The buckets of kohya's scripts: at most the square's area, in steps, narrowest first."""
    square = resolution // step * step
    found = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, resolution**2 // width // step * step)
        if height >= least:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found, key=lambda size: size[::-1]))


def area_bucket(size: Size, buckets: Sequence[Size]) -> Placement:
    """Choose the bucket of an image as kohya's scripts: its own size, or the nearest aspect ratio.

    The nearest by width over height (of several, the narrowest), which the resized image covers.
    """
    height, width = size
    aspect = width / height
    part = size
    if size not in buckets:
        part = min(buckets, key=lambda bucket: abs(bucket[1] / bucket[0] - aspect))
    wider = aspect > part[1] / part[0]
    scale = part[0] / height if wider else part[1] / width
    return (int(height * scale + 0.5), int(width * scale + 0.5)), part


def shrunk_bucket(name: str, size: Size, resolution: int, step: int) -> Placement:
    """Choose the bucket of an image as kohya's scripts with ``--bucket_no_upscale``.

    Images of more than the square's area are shrunk to it, so that one side is a multiple of the
    step; of what there is then, whole steps are kept.

    Raises:
        ValueError: If a side has not a step.
    """
    height, width = whole = size
    aspect = width / height
    if height * width > resolution**2:
        across = sqrt(resolution**2 * aspect)
        down = resolution**2 / across

        def stepped(length: float) -> int:
            return int(length + 0.5) // step * step

        by_width, by_height = stepped(across), stepped(down)
        other_height, other_width = stepped(by_width / aspect), stepped(by_height * aspect)
        if not (by_height and other_height):
            whole = 0, 0
        elif abs(by_width / other_height - aspect) < abs(other_width / by_height - aspect):
            whole = int(by_width / aspect + 0.5), by_width
        else:
            whole = by_height, int(by_height * aspect + 0.5)
    part = (whole[0] // step * step, whole[1] // step * step)
    if not all(part):
        raise ValueError(
            f"The image '{name}' has no bucket: it is {height}×{width} pixels, of which none in "
            f"steps of {step} is filled without enlarging it. Leave it out, or leave out "
            "`bucket_no_upscale`."
        )
    return whole, part


def told_corner(size: Size, part: Size) -> tuple[int, int]:
    """The corner that kohya's scripts tell Stable Diffusion XL, top and left.

    That of an image fitted into its bucket, whatever is cut out.
    """
    (height, width), (down, across) = size, part
    aspect = width / height
    if across / down > aspect:
        return 0, int((across - down * aspect) // 2)
    return int((down - across / aspect) // 2), 0


def resized(
    image: Image.Image, size: Size, interpolation: Interpolation | None, opencv: bool
) -> Image.Image:
    """Resize an image, of floating point as well.

    Args:
        image: The image.
        size: Its new size.
        interpolation: How; ``None`` for bilinear, with ``opencv`` for areas where it becomes
            smaller and Lanczos where it does not.
        opencv: Whether to do it as kohya's scripts, by OpenCV but for Lanczos, else by Pillow.
    """
    old, new = (image.height, image.width), size
    if old == new:
        return image
    how = interpolation or ("lanczos" if opencv else "bilinear")
    pixels: Any = None
    if opencv and interpolation is None and all(a >= b for a, b in zip(old, new, strict=True)):
        pixels = _means(_means(np.asarray(image), 1, new[1]), 0, new[0])
        if old == (2 * new[0], 2 * new[1]):  # of which OpenCV rounds halves up
            pixels = np.floor(pixels + 0.5) if image.mode != "F" else pixels
    elif opencv and how != "lanczos":
        x = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(1, *old, -1)
        x = interpolate(x.permute(0, 3, 1, 2), new, mode=how, align_corners=False)
        pixels = x[0].permute(1, 2, 0).squeeze(-1).numpy()
    if pixels is None:
        return image.resize(new[::-1], Image.Resampling[how.upper()])
    if image.mode == "F":
        return Image.fromarray(pixels.astype(np.float32))
    return Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))


def _means(pixels: Any, axis: int, count: int) -> Any:
    """Means over equal stretches of an axis, in which pixels count by the part that lies within."""
    length = pixels.shape[axis]
    first, within = np.divmod(np.arange(count + 1) * length, count)
    shape = [-1 if n == axis else 1 for n in range(pixels.ndim)]
    ends = pixels.take(first.clip(max=length - 1), axis) * (within / count).reshape(shape)
    sums = np.add.reduceat(pixels, first[:-1], axis, dtype=np.float64)
    return (sums + np.diff(ends, axis=axis)) * count / length
