"""Results made by hand, of pictures of two artists, for pages."""

import numpy as np
import torch
from PIL import Image

from curvlinops_diffusion.attribution import Attribution
from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.preprocessing import Form

NUM_TRAIN, NUM_QUERIES, RESOLUTION = 30, 4, 72
TWINS, LIKE_THE_QUERY = (3, 8), 5


def write_pictures(folder, count, seed):
    """Smooth pictures with captions, wider than high; name ``n`` holds picture ``n``."""
    generator = np.random.default_rng(seed)
    for n in range(count):
        own = folder / ("anna" if n % 2 else "berta")
        own.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        file = own / f"long_name_{n:02}.png"
        picture.resize((120, 80), Image.Resampling.BICUBIC).save(file)
        file.with_suffix(".txt").write_text(f"{('tree', 'house')[n % 3 == 0]} {seed}.{n}")


def made(folder):
    """Scores of which the last query's are noise, and some of the others' not told from zero."""
    for name, count, seed in (("train", NUM_TRAIN, 0), ("queries", NUM_QUERIES, 1)):
        write_pictures(folder / name, count, seed)
    images = {n: next(folder.glob(f"train/*/long_name_{n:02}.png")) for n in range(NUM_TRAIN)}
    images[TWINS[1]].write_bytes(images[TWINS[0]].read_bytes())
    query = next(folder.glob("queries/*/long_name_00.png"))
    images[LIKE_THE_QUERY].write_bytes(query.read_bytes())
    train, queries = (
        open_images(folder / name, Form(3, None, RESOLUTION)) for name in ("train", "queries")
    )
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_QUERIES, NUM_TRAIN)
    truth = torch.randn(shape, generator=generator) ** 3
    truth[-1] = 0
    like = queries.names.index("berta/long_name_00.png")
    truth[like, train.names.index(f"anna/long_name_{LIKE_THE_QUERY:02}.png")] = -9
    first, second = (truth + 0.4 * torch.randn(shape, generator=generator) for _ in range(2))
    halves = SplitHalfScores((first + second) / 2, first, second)
    identity = {
        "query": {"measurement": "loss", "damping": 1e-8, "regression": {"num_draws": 8}},
        "train": {"regression": {"num_draws": 4}},
        "operator": {"kind": "ekfac", "regression": {"num_draws": 2}, "versions": {"torch": "9"}},
    }
    header = {
        "train": train.names,
        "queries": queries.names,
        "identity": identity,
        "methods": ["influence"],
        "values": [100.0] * NUM_QUERIES,
        "run": {"pipeline": "base", "lora": ["adapter"], "data": str(folder / "train")},
        "form": {"channels": 3, "resolution": RESOLUTION},
        **Agreement.of_halves(first, second).as_header(),
    }
    shown = {"influence": halves.scores}, {"influence": halves}
    return Attribution(*shown, header, train, queries)
