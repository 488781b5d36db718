"""Captions, crops and mirror images that each draw sees, against an enumeration of all of them."""

import logging
from itertools import permutations, product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from curvlinops_diffusion import (
    Attributor,
    DenoisingObjective,
    ExampleGradientLinearOperator,
    LatentEncoder,
    NoisedRegression,
    NoiseProcess,
    PredictionType,
)
from curvlinops_diffusion.diffusion.versions import Captions
from tests.cases import noise_levels
from tests.comparisons import assert_close
from tests.diffusion import test_pipelines as pipelines

WIDE = 1 + 0.4 * torch.tensor([[[0.5, -1.0, 0.3, 0.8], [0.1, 0.9, -0.4, -0.7]]]).double()
CAPTION = "a, b, c, d"


def drawn_captions(caption, count=6000, **options):
    captions = Captions.of(
        **{"keep_tokens": 0, "dropout": 0.0, "shuffle": False} | options, count=1
    )
    draws = regression_of(1).draws
    return [captions.varied([caption], draws, [0], r)[0] for r in range(count)]


def assert_equally_often(found, expected):
    """Each of some outcomes with its probability, within 4.5 standard deviations."""
    assert set(found) <= set(expected)
    for outcome, p in expected.items():
        deviation = (len(found) * p * (1 - p)) ** 0.5
        assert abs(found.count(outcome) - len(found) * p) < 4.5 * deviation, outcome


def test_every_order_of_tags_is_equally_likely():
    orders = {", ".join(("a", *order)): 1 / 6 for order in permutations("bcd")}
    assert_equally_often(drawn_captions(" a ,b,  c,d", shuffle=True, keep_tokens=1), orders)
    both = {f"a, {one}, {two}, d": 1 / 2 for one, two in (("b", "c"), ("c", "b"))}
    assert_equally_often(drawn_captions(CAPTION, shuffle=True, keep_tokens=[(1, 1)]), both)
    assert set(drawn_captions("a,b", 9, shuffle=True, keep_tokens=5)) == {"a, b"}
    assert set(drawn_captions("b,a", 9, shuffle=True, keep_tokens=[None])) == {"b,a"}


def test_tags_are_left_out_independently():
    expected = {}
    for stays in product([False, True], repeat=3):
        tags = ["a", *(tag for tag, stay in zip("bcd", stays, strict=True) if stay)]
        expected[", ".join(tags)] = 0.25 ** (3 - sum(stays)) * 0.75 ** sum(stays)
    assert_equally_often(drawn_captions(CAPTION, dropout=0.25, keep_tokens=1), expected)
    shuffled = drawn_captions("a, b", shuffle=True, dropout=0.5)
    assert_equally_often(shuffled, {"": 0.25, "a": 0.25, "b": 0.25, "a, b": 0.125, "b, a": 0.125})


# ---------------------------------------------------------------------------------------------
# A network that sees image and caption, and everything that it may see of one example
# ---------------------------------------------------------------------------------------------


class Wide(Dataset):
    """Copies of one wide image, cut to 2×3 pixels."""

    def __init__(self, count, caption):
        self.count, self.caption = count, caption

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        return self.cropped(n, (0.0, 0.0), False)

    def cropped(self, n, place, mirrored):
        left = int(2 * place[1])
        x0 = WIDE[..., left : left + 3]
        return {"x0": x0, "prompt": self.caption, "mask": (x0[0] > 1).double() + 1}


def embedding(caption):
    """A vector that tells captions apart."""
    return torch.tensor([caption.index("c") / 9, len(caption) / 9]).double()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(W / 2)

    def forward(self, x, t, embeds):
        return (torch.cat([x.flatten(1), embeds], 1) @ self.weight.T).view_as(x)


ALL = {"augment": "flip", "random_crop": True, "shuffle_captions": True, "keep_tokens": 1}


# of little noise, and predicting the image: what differs are versions
ANGLES = torch.linspace(0.05, 0.3, 10, dtype=torch.float64)
LEVELS = NoiseProcess(ANGLES.cos(), ANGLES.sin(), torch.arange(10), PredictionType.SAMPLE)


def regression_of(count, num_draws=4, caption="a, b, c", **options):
    def embed(x0, condition):
        texts = torch.stack([embedding(text) for text in condition["prompt"]])
        return {"embeds": texts + 0 * x0.flatten(1)[:, :1]}

    objective = DenoisingObjective(Network(), LEVELS, encode=LatentEncoder(embed=embed))
    options = {"loss_mask": "mask", "augmented_conditions": []} | options
    return NoisedRegression(objective, Wide(count, caption), num_draws, **options)


def version(left, mirrored, caption):
    """Image, mask and embedding of one version, by hand."""
    x0 = WIDE[..., left : left + 3]
    x0 = x0.flip(-1) if mirrored else x0
    return x0.flatten(), (x0 > 1).double().flatten() + 1, embedding(caption)


def expected_gradient(versions):
    """``E[2/D M (W z − x0) zᵀ]`` over levels, noise and the versions, ``z = (α x0 + σ ε, e)``."""
    W = Network().weight.detach()
    total = torch.zeros_like(W)
    for alpha, sigma in zip(LEVELS.alphas_T, LEVELS.sigmas_T, strict=True):
        for x0, mask, e in versions:
            mean = torch.cat([alpha * x0, e])
            second = torch.outer(mean, mean)
            second[:6, :6] += sigma**2 * torch.eye(6)
            total += 2 / 6 * mask[:, None] * (W @ second - torch.outer(x0, mean))
    return total.flatten() / len(versions) / len(ANGLES)


@pytest.mark.parametrize("antithetic", [False, True])
def test_gradients_are_averages_over_all_versions(antithetic):
    """Of eight versions that all are equally likely; a scale wrong by 5 % would be seen."""
    versions = list(product((0, 1), (False, True), ("a, b, c", "a, c, b")))
    truth = expected_gradient([version(*each) for each in versions])
    plain = expected_gradient([version(0, False, "a, b, c")])
    regression = regression_of(800, antithetic=antithetic, batch_size=500, **ALL)
    rows = ExampleGradientLinearOperator(regression).rows()
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - truth).abs() < 4.5 * error).all()
    assert not ((rows.mean(0) - plain).abs() < 4.5 * error).all()
    scale = rows @ truth / truth.square().sum()
    uncertainty = 4 * scale.std() / len(rows) ** 0.5
    assert abs(scale.mean() - 1) < uncertainty < 0.025


def seen(regression):
    """What the network sees and by which mask, by example and draw."""
    draws, process = regression.draws, regression.objective.process
    found = {}
    for batch in regression.batches():
        r = batch.common_draw
        eps = draws.noise(batch.indices, r, (1, 2, 3)).double()
        for b, n in enumerate(batch.indices):
            t = batch.level_B[b]
            x0 = (batch.x_t[b] - process.sigmas_T[t] * eps[b]) / process.alphas_T[t]
            found[n, r] = x0.flatten(), batch.mask_BD[b], batch.condition["embeds"][b]
    return found


@pytest.mark.parametrize("left_out", [None, "augment", "random_crop", "shuffle_captions"])
def test_each_draw_sees_its_version(left_out):
    """Whatever the batches, image, mask and caption are those that the draw says."""
    options = {key: value for key, value in ALL.items() if key != left_out}
    regression = regression_of(5, 6, batch_size=2, **options)
    draws, found = regression.draws, seen(regression)
    told = set()
    for (n, r), values in found.items():
        (place,), (random,) = draws.places([n], r), draws.captions([n], r)
        tags = ["b", "c"]
        left = int(2 * place[1]) if "random_crop" in options else 0
        mirrored = "augment" in options and bool(draws.versions([n], r, 2)[0])
        if "shuffle_captions" in options:
            tags = [tags[i] for i in random.permutation(2)]
        which = left, mirrored, ", ".join(["a", *tags])
        told.add(which)
        for value, truth in zip(values, version(*which), strict=True):
            assert_close(value, truth, 1e-12)
    assert len(told) == (8 if left_out is None else 4)
    whole = seen(regression_of(5, 6, batch_size=5, **options))
    assert all(
        torch.equal(a, b) for key in found for a, b in zip(found[key], whole[key], strict=True)
    )
    # the two of a pair see one version
    pairs = seen(regression_of(5, 6, antithetic=True, **options))
    for n, r in product(range(5), (0, 2, 4)):
        for a, b in zip(pairs[n, r], pairs[n, r + 1], strict=True):
            assert_close(a, b, 1e-12)


def test_files_tell_versions_apart():
    plain = regression_of(2)
    assert not plain.description.keys() & {"random_crop", "shuffle_captions", "tag_dropout"}
    other = [
        {"random_crop": True},
        {"shuffle_captions": True},
        {"shuffle_captions": True, "keep_tokens": 1},
        {"shuffle_captions": True, "keep_tokens": [1, 2]},
        {"tag_dropout": 0.1},
    ]
    described = [repr(regression_of(2, **options).description) for options in ({}, *other)]
    assert len(set(described)) == len(described)
    assert regression_of(2, keep_tokens=1).description == plain.description  # of no effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_captions": True, "keep_tokens": -1}, "at least 0 .* got -1"),
        ({"shuffle_captions": True, "keep_tokens": [1]}, "each of the 2 examples, got 1"),
        ({"tag_dropout": 1.5}, "`tag_dropout` must be a probability, got 1.5"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        regression_of(2, **options)


def test_data_that_has_no_captions_or_other_parts():
    objective = DenoisingObjective(nn.Conv2d(1, 1, 1).double(), noise_levels())
    x0 = WIDE[None]
    with pytest.raises(ValueError, match="another part out of, got Tensor"):
        NoisedRegression(objective, x0, random_crop=True)
    with pytest.raises(ValueError, match=r"beside the images as 'prompt', got \[\]. Leave"):
        next(NoisedRegression(objective, x0, shuffle_captions=True).batches())


# ---------------------------------------------------------------------------------------------
# Pipelines and files
# ---------------------------------------------------------------------------------------------

TAGS = ["a cat, a dog, two", "two, a dog", "a dog"]
SHAPES = [(8, 13), (17, 8), (8, 8)]  # of images, whose shorter side is 8 already


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "train"
    path.mkdir()
    generator = np.random.default_rng(0)
    for n, (shape, text) in enumerate(zip(SHAPES, TAGS, strict=True)):
        pixels = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{n}.png")
        (path / f"{n}.txt").write_text(text)
    return path


def pixels(folder, n):
    image = np.asarray(Image.open(folder / f"{n}.png"), dtype=np.float32)
    return torch.from_numpy(image / 127.5 - 1).movedim(-1, 0)


def parts_seen(pipeline, regression, folder, shapes, parts):
    """Check latents and corners of each draw's part; yields batch, row and corner."""
    draws, process = regression.draws, regression.objective.process
    for batch in regression.batches():
        r = batch.common_draw
        for b, n in enumerate(batch.indices):
            (place,), (height, width), (down, across) = draws.places([n], r), shapes[n], parts[n]
            top = int(place[0] * (height - down + 1))
            left = int(place[1] * (width - across + 1))
            x0 = pixels(folder, n)[:, top : top + down, left : left + across]
            if draws.versions([n], r, 2)[0]:
                x0, left = x0.flip(-1), width - across - left
            told = batch.condition["added_cond_kwargs"]["time_ids"][b].tolist()
            assert told == [height, width, top, left, down, across]
            latent = pipeline.vae.encode(x0[None]).latent_dist
            eta = draws.latent_noise([n], r, latent.mean.shape[1:])
            z = (latent.mean + latent.std * eta) * pipeline.vae.config.scaling_factor
            t, eps = batch.level_B[b], draws.noise([n], r, z.shape[1:])
            x_t = (process.alphas_T[t] * z + process.sigmas_T[t] * eps)[0].float()
            assert_close(batch.x_t[b], x_t, 1e-4)
            yield batch, b, (n, top, left)


@torch.no_grad()
def test_stable_diffusion_xl_sees_what_training_did(folder, tmp_path):
    """Latents of the part, its corner of the image as it was mirrored, and the caption's order."""
    pipeline = pipelines.stable_diffusion_xl(tmp_path)
    options = {"augment": "flip", "random_crop": True, "shuffle_captions": True, "keep_tokens": 1}
    attributor = Attributor.from_pipeline(pipeline, folder, resolution=8, batch_size=2, **options)
    regression, corners = attributor.regression.with_draws(6), set()
    for batch, b, corner in parts_seen(pipeline, regression, folder, SHAPES, [(8, 8)] * 3):
        corners.add(corner)
        (random,) = regression.draws.captions([corner[0]], batch.common_draw)
        first, *tags = TAGS[corner[0]].split(", ")
        prompt = ", ".join([first, *(tags[i] for i in random.permutation(len(tags)))])
        states, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert_close(batch.condition["encoder_hidden_states"][b], states[0], 1e-5)
        added = batch.condition["added_cond_kwargs"]
        assert_close(added["text_embeds"][b], pooled[0], 1e-5)
    assert len(corners) > 5
    # a query is what it is
    asked = attributor.gradients(folder / "0.png", num_draws=2, prompts=TAGS[0]).regression
    assert not asked.description.keys() & {"random_crop", "shuffle_captions"}
    assert [name.partition(":")[0] for name in asked.description["augmentations"]] == ["unchanged"]


def test_what_draws_have_in_common_is_encoded_once(folder, tmp_path, monkeypatch, caplog):
    """Images once for all captions; texts once for each pair of draws; nothing drawn is kept."""
    pipeline = pipelines.stable_diffusion(tmp_path)
    counted = {"images": 0, "texts": 0, "warnings": 0}
    logger = logging.getLogger("diffusers")
    handler = logging.Handler()
    handler.emit = lambda record: counted.update(warnings=counted["warnings"] + 1)
    monkeypatch.setattr(logger, "handlers", [handler])
    caplog.set_level(logging.WARNING, "diffusers")  # of which the program has turned it off

    def counting(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(pipeline.vae, "encode", counting("images", pipeline.vae.encode))
    monkeypatch.setattr(pipeline, "encode_prompt", counting("texts", pipeline.encode_prompt))
    attributor = Attributor.from_pipeline(
        *(pipeline, folder),
        **{"resolution": 8, "shuffle_captions": True, "latent_cache": tmp_path / "cache"},
    )
    regression = attributor.regression.with_draws(16, antithetic=True)
    for _ in range(2):
        assert len(list(regression.batches())) == 16
        assert len(list((tmp_path / "cache").iterdir())) == 1
    assert counted["images"] == 1
    assert counted["warnings"] == 1  # of captions that are too long, as they are
    assert 4 < counted["texts"] <= 1 + 2 * 8  # as captions are, and those of pairs in two passes


def test_crops_of_whole_images_are_refused(folder, tmp_path):
    pipeline = pipelines.stable_diffusion(tmp_path)
    with pytest.raises(ValueError, match="`random_crop` must come with a `resolution` or"):
        Attributor.from_pipeline(pipeline, folder, random_crop=True)
    both = [
        Attributor.from_pipeline(pipeline, folder, resolution=8, random_crop=True).regression
        for _ in range(2)
    ]
    before = both[0].data_identity()
    image = Image.open(folder / "0.png")
    image.putpixel((12, 0), (0, 0, 0))  # outside of the middle
    image.save(folder / "0.png")
    plain = both[0]._data_identity
    assert before["digest"] != plain["digest"]
    assert both[1].data_identity()["digest"] != before["digest"]
    assert both[1]._data_identity == plain


@torch.no_grad()
def test_crops_within_buckets(folder, tmp_path):
    """Of images of two buckets, which need not be resized; the parts of each of its own shape."""
    generator = np.random.default_rng(1)
    shapes, parts = [(16, 18), (18, 24), (17, 16)], [(16, 16), (16, 24), (16, 16)]
    for n, shape in enumerate(shapes):
        pixel = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixel).save(folder / f"{n}.png")
    pipeline = pipelines.stable_diffusion_xl(tmp_path)
    options = {"buckets": [(16, 16), (16, 24)], "random_crop": True, "augment": "flip"}
    attributor = Attributor.from_pipeline(pipeline, folder, shuffle_captions=True, **options)
    regression = attributor.regression.with_draws(6)
    found = parts_seen(pipeline, regression, folder, shapes, parts)
    assert len({corner for _, _, corner in found}) > 6
