"""Small images inside a page, each embedded once however often it is shown."""

from __future__ import annotations

import base64
import io

from PIL import Image, features
from torch import Tensor

#: Pixels of the longer side of a query, at most.
QUERY_SIZE = 288
#: That of a training image, which is shown at half of this size.
TRAINING_SIZE = 192
# up to here an image is kept as it is, and enlarged with visible pixels
_PIXELATED = 64
_QUALITY = 80


class Thumbnails:
    """The images of a page, as rules of its style sheet.

    An image is the background of every element of its class, so that its bytes are there once.
    """

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def add(self, name: str, x: Tensor, size: int) -> None:
        """Add an image in [-1, 1], ``[C, H, W]``, at most so many pixels long.

        Args:
            name: The class of the elements that show it.
            x: The image; of other channels than grey or RGB, the first that can be shown.
            size: Pixels.
        """
        x = x[: 3 if len(x) >= 3 else 1]
        bytes_HWC = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        image = Image.fromarray(bytes_HWC.squeeze(-1).numpy())
        pixelated = max(image.size) <= _PIXELATED
        if not pixelated:
            image.thumbnail((size, size), Image.Resampling.LANCZOS)
        rule = f"background-image:url({_data_url(image, lossless=pixelated)})"
        if pixelated:
            rule += ";image-rendering:pixelated"
        self._rules[name] = rule

    def rules(self) -> list[tuple[str, str]]:
        """Names of classes and what their elements look like."""
        return list(self._rules.items())


def _data_url(image: Image.Image, lossless: bool) -> str:
    buffer = io.BytesIO()
    kind = "png"
    if not lossless:
        kind = "webp" if features.check("webp") else "jpeg"
    options = {} if lossless else {"quality": _QUALITY}
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
