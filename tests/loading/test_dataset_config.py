"""kohya's ``dataset.toml``: what training saw of it, and what of it cannot be expressed."""

import json

import numpy as np
import pytest
from PIL import Image

from curvlinops_diffusion import Attributor
from curvlinops_diffusion.cli.decided import completed
from curvlinops_diffusion.loading.dataset_config import (
    DatasetConfig,
    is_config,
    names_of,
    weights_of,
)
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from tests.diffusion import test_pipelines as pipelines

FORM = Form(3, None, None)
SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'hoge'\n"
OTHER = SUBSET.replace("hoge", "fuga")
UNLIKE = f"[general]\ncaption_tag_dropout_rate = 0.1\n{SUBSET}shuffle_caption = true\n{OTHER}"


def write_images(folder, count, captions=(), end=".caption", size=(8, 8)):
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(folder.name))
    for n in range(count):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    for n, text in enumerate(captions):
        (folder / f"{n}{end}").write_bytes(text.encode())


def config(folder, text):
    (folder / "dataset.toml").write_text(text)
    return DatasetConfig(folder / "dataset.toml")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "hoge", 3, ["\ufeffa girl, red, hat\r\nanother line\r\n", "blue"])
    write_images(tmp_path / "fuga", 2)
    write_images(tmp_path / "reg", 4, ["x"] * 4)
    return tmp_path


# after the example of their documentation
EXAMPLE = """
[general]
shuffle_caption = true
keep_tokens = 1
flip_aug = true

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  caption_prefix = "best,"
  caption_suffix = ", sharp"

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  shuffle_caption = false
"""


def test_tables_within_tables(folder):
    """The inner of several options holds, for each image of its subset."""
    found = config(folder, EXAMPLE)
    assert found.settings == {"resolution": 512, "augment": "flip", "shuffle_captions": True}
    images, notes = found.images()
    seen = [(i.file.parent.name, i.file.stem, i.prompt, i.kept, i.times) for i in images]
    assert seen == [
        ("hoge", "0", "a girl, red, hat", (2, 0), 3),
        ("hoge", "1", "blue", (2, 0), 3),
        ("hoge", "2", "hoge girl", (2, 0), 3),
        ("fuga", "0", "best, fuga boy , sharp", (3, 0), 1),
        ("fuga", "1", "best, fuga boy , sharp", (3, 0), 1),
        # as many as the others, 11: each once, then one more of each in turn
        *[("reg", f"{n}", "x", None, times) for n, times in enumerate((3, 3, 3, 2))],
    ]
    assert [i.regularises for i in images] == [False] * 5 + [True] * 4
    assert names_of(images)[::4] == ["hoge/0.png", "fuga/1.png", "reg/3.png"]
    times = [3, 3, 3, 1, 1, 3, 3, 3, 2]
    assert weights_of(images) == pytest.approx([9 * t / sum(times) for t in times])
    assert notes[0] == "3 × 3 image(s) of 'hoge'"
    assert notes[1] == "1 without a caption (2.png, …), with 'hoge girl' as prompt"


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [(1, [2, 2, 2, 1]), (3, [3, 3, 3, 0]), (7, [7, 0, 0, 0]), (2, [2, 2, 2, 2])],
)
def test_regularisation_images_are_as_many_as_the_others(folder, repeats, expected):
    """Of 7: as often as repeated until they are reached, then one more of each in turn."""
    write_images(folder / "seven", 7)
    prior = f"[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\nnum_repeats = {repeats}\n"
    images, notes = config(folder, SUBSET.replace("hoge", "seven") + prior).images()
    times = {i.file.stem: i.times for i in images if i.regularises}
    assert [times.get(f"{n}", 0) for n in range(4)] == expected
    unseen = expected.count(0)
    told = [f"{unseen} regularisation image(s) that training did not reach"] * (unseen > 0)
    assert [note for note in notes if "reach" in note] == told


KEPT, SEPARATOR = "a, b ||| c,d, e ||| f,, g", "keep_tokens_separator = '|||'"


@pytest.mark.parametrize(
    ("options", "caption", "prompt", "kept"),
    [
        ("", "a,b", "a,b", (0, 0)),
        ("keep_tokens = 2", "a,b", "a,b", (2, 0)),  # what their command says of shuffling is open
        ("shuffle_caption = false", "a,b", "a,b", None),
        ("shuffle_caption = true\nkeep_tokens = 1", "a,b", "a,b", (1, 0)),
        ("caption_tag_dropout_rate = 0.1", "a,b", "a,b", (0, 0)),
        (f"shuffle_caption = true\n{SEPARATOR}", KEPT, "a, b, c, d, e, f, g", (2, 2)),
        (f"shuffle_caption = true\n{SEPARATOR}\nkeep_tokens = 1", "a", "a", (1, 0)),
        (SEPARATOR, KEPT, KEPT, (0, 0)),
        ("secondary_separator = ';'\ncaption_separator = '.'", "a;b", "a.b", (0, 0)),
        ("caption_prefix = 'p'\ncaption_suffix = 's'", "a", "p a s", (0, 0)),
    ],
)
def test_captions(tmp_path, options, caption, prompt, kept):
    write_images(tmp_path / "data", 1, [caption], ".txt")
    text = f"[general]\ncaption_extension = 'txt'\n{options}\n[[datasets]]\n[[datasets.subsets]]\n"
    (image,), _ = config(tmp_path, f"{text}image_dir = 'data'").images()
    assert (image.prompt, image.kept) == (prompt, kept)


def test_which_files_are_images_and_captions(tmp_path):
    """Directly in the folder, whatever that is called; captions end as the command says."""
    write_images(tmp_path / "5_cat", 1, ["c"], ".caption")
    write_images(tmp_path / "5_cat" / "inner", 1)
    (tmp_path / "5_cat" / "a_1_2_3_4.webp").write_bytes(b"")
    (tmp_path / "5_cat" / "a.txt").write_text("of a face")
    (tmp_path / "5_cat" / "b.gif").write_bytes(b"")
    found = config(tmp_path, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '5_cat'")
    assert [(i.file.name, i.prompt, i.times) for i in found.images()[0]] == [
        ("0.png", "c", 1),
        ("a_1_2_3_4.webp", "", 1),
    ]
    assert [i.prompt for i in found.images(".txt")[0]] == ["", "of a face"]


@pytest.mark.parametrize("lines", [False, True])
def test_metadata_of_fine_tuning(tmp_path, lines):
    write_images(tmp_path / "data", 3)
    entries = {"0.png": {"caption": "a cat", "tags": "red, big"}, "1": {"tags": "x"}, "2.png": {}}
    if lines:
        told = [{"image_path": key, **value} for key, value in entries.items()]
        text = "\n".join(map(json.dumps, told))
    else:
        text = json.dumps(entries)
    name = f"meta.json{'l' * lines}"
    (tmp_path / name).write_text(text)
    subset = {"image_dir": "data", "metadata_file": name, "num_repeats": 2}
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [{"subsets": [subset]}]}))
    images, _ = DatasetConfig(tmp_path / "data.json").images()
    assert [(i.file.name, i.prompt) for i in images] == [
        ("0.png", "a cat,red, big"),
        ("1.png", "x"),
        ("2.png", ""),
    ]
    assert weights_of(images) is None


def test_the_same_folder_again(folder):
    """In one data set it is read once; in another again, with a name of its own."""
    one = "[[datasets]]\n" + 2 * "[[datasets.subsets]]\nimage_dir = 'fuga'\n"
    images, _ = config(
        folder, one + one.replace("[[datasets]]", "[[datasets]]\nbatch_size = 2")
    ).images()
    assert names_of(images) == ["0.png", "1.png", "0.png (2)", "1.png (2)"]
    assert weights_of(images) == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])


BUCKETED = "resolution = 512\nenable_bucket = true"
BUCKETS = {"resolution": 512, "buckets": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("resolution = [64, 64]", {"resolution": 64}),
        (BUCKETED, BUCKETS),
        (f"{BUCKETED}\nbucket_reso_steps = 32", BUCKETS | {"bucket_step": 32}),
        (f"{BUCKETED}\nmin_bucket_reso = 128", BUCKETS | {"bucket_min": 128}),
        ("resolution = 512\nenable_bucket = false", {"resolution": 512, "buckets": "square"}),
        ("resize_interpolation = 'cubic'", {"interpolation": "bicubic"}),
        (f"{BUCKETED}\nrandom_crop = true", BUCKETS | {"random_crop": True}),
        ("caption_dropout_rate = 0.1", {"condition_dropout": 0.1}),
        ("caption_tag_dropout_rate = 0.1\nflip_aug = false", {"tag_dropout": 0.1}),
        ("color_aug = false\nvalidation_split = 0", {}),
    ],
)
def test_options_that_it_decides(tmp_path, options, expected):
    text = f"[general]\n{options}\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'"
    assert config(tmp_path, text).settings == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [", "is not understood"),
        ("", r"must hold \[\[datasets\]\] .* got \[\]"),
        ("[[datasets]]\nresolution = 512", "has no .*subsets"),
        (SUBSET + "[other]", r"got \['datasets', 'other'\]"),
        (SUBSET + "repeats = 2", "has the option 'repeats', .* Is num_repeats meant"),
        (
            SUBSET + "resolution = 2",
            r"subsets\]\] 1 of \[\[datasets\]\] 1 .* the option 'resolution'",
        ),
        (SUBSET + "num_repeats = 'two'", "num_repeats must be int, got 'two'"),
        (SUBSET + "num_repeats = true", "num_repeats must be int, got True"),
        ("[general]\nbatch_size = 0\n" + SUBSET, r"\[general\] .* batch_size must be at least 1"),
        (UNLIKE, "has shuffle_caption True in .* and None"),
        (SUBSET + "color_aug = true", "has color_aug, which changes colours"),
        (SUBSET + "enable_wildcard = true", "has enable_wildcard, which chooses"),
        ("[general]\nresolution = [512, 768]\n" + SUBSET, r"resolution \[512, 768\], and"),
        ("[general]\nenable_bucket = false\nrandom_crop = true\n" + SUBSET, "random_crop without"),
        ("[general]\nresize_interpolation = 'box'\n" + SUBSET, "'box', and `interpolation` may be"),
        (SUBSET + "flip_aug = true\n" + OTHER, "flip_aug True in .* and None"),
        (SUBSET.replace("hoge", "gone"), "'gone', the image_dir of .* does not exist here"),
        (SUBSET.replace("image_dir = 'hoge'", "num_repeats = 1"), "has no image_dir"),
        (SUBSET + "num_repeats = 0", "names no images: none of 'hoge', which is repeated 0"),
        (SUBSET + "shuffle_caption = true\ncaption_separator = '.'", r"by caption_separator '\.'"),
        (SUBSET + "shuffle_caption = true\nsecondary_separator = 'red'", "by secondary_separator"),
    ],
)
def test_what_is_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        config(folder, text).images()


def test_files_that_are_none(folder):
    (folder / "hoge" / "2.caption").write_bytes(b"")
    with pytest.raises(ValueError, match=r"caption '.*2.caption' is empty"):
        config(folder, SUBSET).images()
    (folder / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold \[\[datasets"):
        DatasetConfig(folder / "a.json")
    with pytest.raises(ValueError, match="No such file"):
        DatasetConfig(folder / "b.toml")
    assert not is_config(folder / "hoge")
    assert not is_config(["a.toml"])


# ---------------------------------------------------------------------------------------------
# From the file to what the network sees
# ---------------------------------------------------------------------------------------------

RUN = """
[general]
shuffle_caption = true
caption_dropout_rate = 0.25
[[datasets]]
resolution = 8
flip_aug = true
[[datasets.subsets]]
image_dir = 'hoge'
num_repeats = 3
keep_tokens = 1
[[datasets.subsets]]
image_dir = 'reg'
is_reg = true
"""


def test_an_attributor_is_that_of_the_same_options_by_hand(folder, tmp_path):
    config(folder, RUN)
    pipeline = pipelines.stable_diffusion(tmp_path)
    found = Attributor.from_pipeline(
        pipeline, folder / "dataset.toml", prior_loss_weight=0.5, noise_offset=0.1
    )
    files = [folder / "hoge" / f"{n}.png" for n in range(3)]
    files += [folder / "reg" / f"{n}.png" for n in range(4)]
    times = [3, 3, 3, *(0.5 * t for t in (3, 2, 2, 2))]
    by_hand = Attributor.from_pipeline(
        *(pipeline, files),
        prompts=["a girl, red, hat", "blue", "", *["x"] * 4],
        **{"resolution": 8, "augment": "flip", "condition_dropout": 0.25, "noise_offset": 0.1},
        **{"shuffle_captions": True, "keep_tokens": [(1, 0)] * 3 + [(0, 0)] * 4},
        example_weights=[7 * t / 18 for t in times],
    )
    one, two = found.regression, by_hand.regression
    assert one.description == two.description
    assert one.data_identity() == two.data_identity()
    assert found.images.names[0] == "hoge/0.png"
    assert "3 × 3 image(s) of 'hoge'" in found.images.summary()
    assert f"`resolution=8`, by '{folder / 'dataset.toml'}'" in found.settings
    given = Attributor.from_pipeline(pipeline, folder / "dataset.toml", shuffle_captions=False)
    assert [line for line in given.settings if "against" in line] == [
        f"`shuffle_captions=False` is given, against True by '{folder / 'dataset.toml'}'"
    ]
    assert "shuffle_captions" not in given.regression.description
    assert given.regression.description["condition_dropout"] == 0.25


def test_the_program_takes_what_it_decides(folder, capsys):
    config(folder, RUN)
    data = folder / "dataset.toml"
    given = {"data": data, "output": folder / "o.safetensors", "pipeline": folder, "resolution": 16}
    options = completed("fit", given)
    assert (options.resolution, options.augment, options.shuffle_captions) == (16, "flip", True)
    assert options.condition_dropout == 0.25
    told = capsys.readouterr().err
    assert "dataset.toml' says: --augment flip --condition-dropout 0.25 --shuffle-captions" in told
    assert "--resolution 16 is given, against 8 by" in told
    # a plan shows nothing to a network
    completed("validate-plan", {"data": data, "output": folder / "plan"})
    assert capsys.readouterr().err == ""


def test_networks_without_prompts_take_its_images(folder):
    config(folder, SUBSET)
    images = open_images(folder / "dataset.toml", FORM, Condition())
    assert set(images[0]) == {"x0"}
    named = open_images(folder / "dataset.toml", FORM, Condition("prompt"))
    assert [named[n]["prompt"] for n in range(3)] == ["a girl, red, hat", "blue", ""]


def test_buckets_that_it_decides(folder, tmp_path):
    write_images(folder / "wide", 2, ["a, b", "c"], size=(16, 40))
    said = "resolution = 32\nenable_bucket = {}\nmin_bucket_reso = 16\nbucket_reso_steps = 16\n"
    subset = SUBSET.replace("hoge", "wide")
    for buckets, options in (
        ("true", {"bucket_step": 16, "bucket_min": 16}),
        ("false", {"buckets": "square"}),
    ):
        config(folder, f"[general]\n{said.format(buckets)}{subset}")
        pipeline = pipelines.stable_diffusion(tmp_path)
        found = Attributor.from_pipeline(pipeline, folder / "dataset.toml")
        options = {"resolution": 32, "buckets": True, "prompts": ["a, b", "c"], **options}
        files = [folder / "wide" / f"{n}.png" for n in range(2)]
        by_hand = Attributor.from_pipeline(pipeline, files, **options)
        assert found.regression.data_identity() == by_hand.regression.data_identity()
        shape = found.images[0]["x0"].shape
        assert shape == ((3, 16, 48) if buckets == "true" else (3, 32, 32))
    given = Attributor.from_pipeline(pipeline, folder / "dataset.toml", resolution=16)
    assert given.images[0]["x0"].shape == (3, 16, 16)  # by hand, of the one bucket as well
