"""Pictures of a page: thumbnails, files uncropped, and which are nearly the same.

Legend: M images that are compared, F entries of what they are compared by.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

# up to here, and to half of the size, an image is kept as it is, and enlarged with visible pixels
_PIXELATED = 64
_QUALITY = 80
# images are compared by so many cells a side, and are nearly the same from this correlation on
_CELLS = 16
_ALIKE = 0.98
# a crop changes the sides' ratio by more than rounding does
_CROPPED = 0.02


def thumbnail(x: Tensor, size: int) -> str:
    """A style that shows an image.

    Args:
        x: The image in [-1, 1], ``[C, H, W]``; of other channels than grey or RGB, the first that
            can be shown.
        size: Pixels of the longer side, at most.
    """
    x = x[: 3 if len(x) >= 3 else 1]
    bytes_HWC = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return _style(Image.fromarray(bytes_HWC.squeeze(-1).numpy()), size)


def uncropped(path: Path, x: Tensor, size: int) -> str | None:
    """A style that shows a whole file; ``None`` if the image is not cut out of it, or it is gone.

    Args:
        path: The file.
        x: The image as the network saw it, ``[C, H, W]``.
        size: Pixels of the longer side, at most.
    """
    try:
        with Image.open(path) as image:
            whole = ImageOps.exif_transpose(image)
            ratio = whole.width / whole.height * x.shape[1] / x.shape[2]
            if abs(ratio - 1) <= _CROPPED:
                return None
            whole.draft("RGB", (size, size))
            return _style(whole.convert("RGB"), size)
    except (OSError, ValueError):  # moved since, or in a mode that only the network's form reads
        return None


def _style(image: Image.Image, size: int) -> str:
    buffer = io.BytesIO()
    if max(image.size) <= min(_PIXELATED, size // 2):
        kind, more = "png", ";image-rendering:pixelated"
        image.save(buffer, format=kind)
    else:
        kind, more = "webp" if features.check("webp") else "jpeg", ""
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        image.save(buffer, format=kind, quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"background-image:url(data:image/{kind};base64,{data}){more}"


def features_of(x: Tensor) -> Tensor:
    """What an image is compared by: cells of its grey, centred, of length one, ``[F]``."""
    cells = adaptive_avg_pool2d(x.detach().float().mean(0, keepdim=True), _CELLS).flatten()
    return normalize(cells - cells.mean(), dim=0)


def twins(features_MF: Tensor) -> list[list[int]]:
    """The images that are nearly the same as each of some images, itself left out."""
    found = []
    for m, own_F in enumerate(features_MF):
        alike = (features_MF @ own_F >= _ALIKE).nonzero().flatten().tolist()
        found.append([other for other in alike if other != m])
    return found


def is_twin(one_F: Tensor, other_F: Tensor) -> bool:
    """Whether two images are nearly the same."""
    return float(torch.dot(one_F, other_F)) >= _ALIKE
