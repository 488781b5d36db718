"""A subset of Fashion-MNIST (Xiao et al., 2017), at 16×16.

``fashion_mnist.safetensors`` beside this file holds the first 1,100 training images, margins of two
pixels added and 2×2 pixels averaged. ``python -m benchmarks.lds.fashion`` writes it anew from
Debian's package ``dataset-fashion-mnist``.

Copyright 2017 Zalando SE, under the MIT licence:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from curvlinops_diffusion.runtime.files import FileKind

PACKAGED = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
KEPT = Path(__file__).parent / "fashion_mnist.safetensors"
IMAGES = FileKind("images", "images", "Run benchmarks.lds.fashion again.", None)
NUM_IMAGES = 1100


def fashion() -> Tensor:
    """The images in ``[-1, 1]``, ``[1100, 1, 16, 16]``."""
    return IMAGES.read(KEPT)[1]["images"].float() / 127.5 - 1


def main() -> None:
    """Write the subset."""
    with gzip.open(PACKAGED) as file:
        header, size = file.read(16), 28 * 28  # magic number, counts
        raw = bytearray(file.read(NUM_IMAGES * size))
    assert header[:4] == bytes([0, 0, 8, 3]), "not a file of unsigned bytes in three dimensions"
    images = torch.frombuffer(raw, dtype=torch.uint8).reshape(NUM_IMAGES, 1, 28, 28).float()
    small = avg_pool2d(pad(images, (2, 2, 2, 2)), 2).round().to(torch.uint8)
    IMAGES.write(KEPT, {"images": small}, {"source": "Fashion-MNIST, Zalando SE, MIT licence"})


if __name__ == "__main__":
    main()
