"""How large is the page of scores, and how long does it take to write?

1,000 training images and 20 queries of several sizes, cut at random from two photographs; scores
are random, as nothing of the page's size depends on them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.measure import arguments, report
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.score_files import write_scores

SIZES = (32, 64, 256, 512)


def write_photographs(folder: Path, count: int, size: int, seed: int) -> list[str]:
    """Cuts of at least half a photograph's height, brought to one size."""
    folder.mkdir()
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    generator, names = np.random.default_rng(seed), []
    for n in range(count):
        photograph = photographs[n % len(photographs)]
        side = int(generator.integers(photograph.height // 2, photograph.height))
        left = int(generator.integers(photograph.width - side))
        top = int(generator.integers(photograph.height - side))
        cut = photograph.crop((left, top, left + side, top + side)).resize((size, size))
        names.append(f"{n:04}.png")
        cut.save(folder / names[-1], compress_level=1)
    return names


def measured(folder: Path, size: int, images: int, queries: int) -> dict[str, float]:
    """Bytes and seconds of the page."""
    names = {
        "train": write_photographs(folder / "train", images, size, 0),
        "queries": write_photographs(folder / "queries", queries, size, 1),
    }
    generator = torch.Generator().manual_seed(0)
    scores_QN = torch.randn(queries, images, generator=generator)
    header = {**names, "identity": {"query": {"measurement": "loss"}}}
    write_scores(folder / "scores.safetensors", {"scores": scores_QN}, header)
    page = folder / "report.html"
    words = ["report", "--scores", folder / "scores.safetensors", "--data", folder / "train"]
    words += ["--queries", folder / "queries", "--output", page]
    start = time.perf_counter()
    assert run([str(word) for word in words]) == 0
    return {
        "pixels": size,
        "megabytes": round(page.stat().st_size / 1e6, 2),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Run the program."""
    options = arguments(__doc__).parse_args()
    images, queries = (20, 3) if options.quick else (1000, 20)
    rows = []
    for size in SIZES[:1] if options.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(Path(folder), size, images, queries))
    results = {"images": images, "queries": queries, "top": 8, "pages": rows}
    report(options, "report_page", __doc__, results)


if __name__ == "__main__":
    main()
