"""Images of every form, as data: folders, saved data sets, arrays; labels and prompts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cli.cases import write_images

FORM = Form(1, (8, 8), None)
NAMED = {"file_name": "image0.png"}


def write_lines(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_classes_from_folders(tmp_path):
    write_images(tmp_path / "data" / "cats", 2, 0)
    write_images(tmp_path / "data" / "dogs", 1, 1)
    images = open_images(tmp_path / "data", FORM)
    assert images.names == ["cats/image0.png", "cats/image1.png", "dogs/image0.png"]
    assert [images[n]["class_labels"] for n in range(3)] == [0, 0, 1]
    assert "class_labels" not in open_images(tmp_path / "data", FORM, Condition())[0]


def classes(folder, *names):
    for name in names:
        write_images(folder / name, 1, 0)
    return folder


def test_classes_of_queries_are_numbered_as_in_training(tmp_path):
    train = open_images(classes(tmp_path / "train", "a", "b", "c"), FORM)

    def labels(name, *names):
        path = classes(tmp_path / name, *names)
        queries = open_images(path, FORM, Condition("class_labels", 3), train)
        return [queries[n]["class_labels"] for n in range(len(queries))]

    assert labels("queries", "b", "c") == [1, 2]
    assert labels("one", "c") == [2]
    with pytest.raises(ValueError, match=r"The class 'd' of the query 'd/image0.png' is none of"):
        labels("unknown", "a", "d")
    only = open_images(classes(tmp_path / "only", "a"), FORM)
    assert only[0]["class_labels"] == 0
    np.savez(tmp_path / "n.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([1, 0]))
    with pytest.raises(
        ValueError, match=r"have names \(b, c\), those of the training data numbers"
    ):
        open_images(tmp_path / "queries", FORM, None, open_images(tmp_path / "n.npz", FORM))


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, "image1.png' of '.*' has no label, which the network takes. Put each class into"),
        ({"label": "cat"}, "The label of image 'image1.png' of '.*' is 'cat', and the network"),
        ({"label": 3}, "is 3, and the network knows the whole numbers from 0 to 2. Number"),
        ({"label": -1}, "is -1, and the network"),
        ({"label": 1.0}, "is 1.0, and the network"),
    ],
)
def test_labels_that_the_network_does_not_know(tmp_path, entry, told):
    write_images(tmp_path / "data", 2, 0)
    write_lines(tmp_path / "data", NAMED | {"label": 2}, {"file_name": "image1.png", **entry})
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path / "data", FORM, Condition("class_labels", 3))
    with pytest.raises(ValueError, match=r"image0.png' of '.*' has no prompt, which"):
        open_images(tmp_path / "data", FORM, Condition("prompt"))
    assert set(open_images(tmp_path / "data", FORM, Condition())[0]) == {"x0"}


def test_one_prompt_for_images_that_have_none(tmp_path):
    write_images(tmp_path / "data", 2, 0)
    images = open_images(tmp_path / "data", FORM, Condition("prompt", prompt="a photo"))
    assert [images[n]["prompt"] for n in range(2)] == ["a photo", "a photo"]
    write_lines(tmp_path / "data", {"file_name": "image1.png", "text": "b"}, NAMED)
    images = open_images(tmp_path / "data", FORM, Condition("prompt", prompt="a photo"))
    assert [images[n]["prompt"] for n in range(2)] == ["a photo", "b"]


def test_arrays(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", images=pixels, labels=np.array([3, 1, 2, 0]))
    images = open_images(tmp_path / "bytes.npz", Form(3, (8, 8), None))
    assert torch.equal(images[1]["x0"], torch.from_numpy(pixels[1]).permute(2, 0, 1) / 127.5 - 1)
    assert images[0]["class_labels"] == 3
    floats = generator.random((4, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "floats.npz", images=floats)
    images = open_images(tmp_path / "floats.npz", FORM)
    assert torch.equal(images[2]["x0"], torch.from_numpy(floats[2]))


BYTES, FLOATS = np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": FLOATS + 1.01}, r"'a.npz\[0\]' has pixels from 1.01 to 1.01. Floating point"),
        ({"images": FLOATS + np.nan}, "has pixels from nan to nan"),
        ({"images": BYTES, "labels": np.arange(3)}, r"shape \(3,\) beside 2 images"),
        ({"images": BYTES, "labels": np.ones(2)}, "'labels' of .* is of float64"),
        ({"images": BYTES.transpose(0, 3, 1, 2)}, r"Save images.transpose\(0, 2, 3, 1\): bytes"),
        ({"images": FLOATS.transpose(0, 2, 3, 1)}, r"Save images.transpose\(0, 3, 1, 2\): bytes"),
        ({"images": BYTES.astype(np.int64)}, "'images' of .* is of int64. It must hold"),
        ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "4 channels, and 1 or 3 can be taken"),
        ({"pictures": BYTES}, r"holds \{'pictures': \(2, 8, 8, 3\)\}. It must hold 'images'"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, arrays, told):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path / "a.npz", Form(3, (8, 8), None))


def test_sixteen_bits_and_transparency(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    x = Form(3, (8, 8), None).tensor(Image.fromarray(ramp), "ramp")
    torch.testing.assert_close(x[2], torch.from_numpy(ramp.astype(np.float32)) / 32767.5 - 1)
    assert torch.equal(x[:1], FORM.tensor(Image.fromarray(ramp.astype(np.int32)), "ramp"))
    for values in (ramp.astype(np.int32) - 1, ramp.astype(np.float32)):
        with pytest.raises(ValueError, match=r"The image 'ramp' has pixels from"):
            FORM.tensor(Image.fromarray(values), "ramp")
    opaque = Image.fromarray((ramp >> 8).astype(np.uint8))
    for mode in ("LA", "RGBA"):
        image = opaque.convert(mode)
        assert torch.equal(FORM.tensor(image, "a"), FORM.tensor(opaque, "a"))
        image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 254))
        with pytest.raises(ValueError, match=r"The image 'a' has transparent pixels, and what"):
            FORM.tensor(image, "a")


def test_where_training_scripts_differ_is_said(tmp_path):
    """Grey in 16 bits, which convert('RGB') makes white; turned photographs, which kohya leaves."""
    deep = Image.fromarray(np.full((8, 8), 4000, np.uint16))
    with pytest.warns(UserWarning, match=r"more than 8 bits .* saw all above 255 as white"):
        FORM.tensor(deep, "deep")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "turned.png", exif=exif)
    with pytest.warns(UserWarning, match=r"EXIF orientation .* saw them as they are stored"):
        open_images(tmp_path, FORM)[0]


def test_pages_and_frames(tmp_path):
    """Of a stack one page alone would be read; of an animation the first frame is what all read."""
    frames = [Image.fromarray(np.full((8, 8), 40 * n, np.uint8)) for n in range(3)]
    for name in ("a/stack.tif", "b/moving.gif", "b/moving.png", "c/single.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        several = {} if name.startswith("c") else {"save_all": True, "append_images": frames[1:]}
        frames[0].save(tmp_path / name, **several)
    with pytest.raises(ValueError, match=r"stack.tif' has 3 pages, and training scripts read the"):
        open_images(tmp_path / "a", FORM)[0]
    for name, count in (("b", 2), ("c", 1)):
        images = open_images(tmp_path / name, FORM)
        assert all((images[n]["x0"] == -1).all() for n in range(count))


@pytest.mark.parametrize("kind", [1, 4, 5])
def test_smaller_copies_and_masks_are_no_pages(tmp_path, kind):
    """Programs store a smaller copy, or a mask, behind the image of a TIFF file."""
    whole, small = (Image.fromarray(np.full((n, n), 9 * n, np.uint8)) for n in (8, 4))
    small.encoderinfo = {"tiffinfo": {254: kind}}
    whole.save(tmp_path / "a.tif", save_all=True, append_images=[small])
    with Image.open(tmp_path / "a.tif") as image:
        image.seek(1)
        assert (image.size, image.tag_v2[254]) == ((4, 4), kind)
    assert torch.equal(open_images(tmp_path, FORM)[0]["x0"], FORM.tensor(whole, "a"))


def test_every_image_is_decoded_once(tmp_path, monkeypatch):
    """Its size before resizing is known from when its pixels are read, of every form."""
    write_images(tmp_path / "data", 1, 0, size=12)
    file = tmp_path / "data" / "image0.png"
    save_pictures(tmp_path / "saved", {"image": [str(file)]}, "image")
    np.savez(tmp_path / "a.npz", images=np.asarray(Image.open(file))[None])
    count, load = [], PngImagePlugin.PngImageFile.load_end
    monkeypatch.setattr(
        PngImagePlugin.PngImageFile, "load_end", lambda self: (count.append(1), load(self))
    )
    items = []
    for name in ("data", "saved", "a.npz"):
        condition = Condition("prompt", prompt="x", sizes=True)
        items.append(open_images(tmp_path / name, Form(1, (8, 8), 8), condition)[0])
    assert len(count) == 2
    for item in items:
        assert item["original_size"].tolist() == [12, 12]
        assert torch.equal(item["x0"], items[0]["x0"])


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    """Whatever the library says of them, the file is named."""
    write_images(tmp_path / "data", 1, 0, size=64)
    path = tmp_path / "data" / "image0.png"
    whole, form = path.read_bytes(), Form(3, None, None)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ValueError, match=r"image0.png' is too large for Pillow.*Save it small"):
            open_images(tmp_path / "data", form)[0]
    middle = len(whole) // 2
    broken = [b"", b"text", whole[:middle], whole[:40], whole[:middle] + b"\0" * 9 + whole[middle:]]
    for raw in broken:
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"image0.png' cannot be read \(.+\). Repair it, or"):
            open_images(tmp_path / "data", form)[0]
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", refuses)
        with pytest.raises(
            ValueError, match=r"image0.png' is in the mode L \(no conversion\). Save"
        ):
            open_images(tmp_path / "data", form)[0]


def refuses(*arguments):
    raise ValueError("no conversion")


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_files_do_not_have(tmp_path, channels):
    """Refused, whatever the files hold, with the way out: an array of that many."""
    form = Form(channels, (8, 8), None)
    (tmp_path / "data").mkdir()
    bands = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(bands, "CMYK").save(tmp_path / "data" / "four.tif")
    for path in (tmp_path / "data", tmp_path / "data" / "four.tif"):
        with pytest.raises(ValueError, match=rf"takes {channels} channels, and .* Pass an .npz fi"):
            open_images(path, form)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    for name, array in (("bytes", pixels), ("floats", expected.numpy())):
        np.savez(tmp_path / f"{name}.npz", images=array)
        images = open_images(tmp_path / f"{name}.npz", form)
        assert torch.equal(images[2]["x0"], expected[2])
    np.savez(tmp_path / "rgb.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"3 channels, and {channels} can be taken"):
        open_images(tmp_path / "rgb.npz", form)


def save_pictures(folder, data, *columns, **options):
    """A data set of two rows whose columns of these names are pictures, saved to disk."""
    import datasets

    saved = datasets.Dataset.from_dict(data)
    for column in columns:
        saved = saved.cast_column(column, datasets.Image(**options))
    saved.save_to_disk(str(folder))


def test_columns_of_saved_data_sets(tmp_path):
    """The images are the column of that name, or the only one; which of several is not guessed."""
    write_images(tmp_path / "one", 2, 0)
    write_images(tmp_path / "two", 2, 1)
    one, two = ([str(f) for f in sorted((tmp_path / n).iterdir())] for n in ("one", "two"))
    expected = open_images(tmp_path / "two", FORM)
    columns = {"depth": one, "image": two, "n": [1, 2], "label": [2, 0]}
    save_pictures(tmp_path / "both", columns, "depth", "image")
    images = open_images(tmp_path / "both", FORM)
    assert torch.equal(images[1]["x0"], expected[1]["x0"])
    assert [images[n]["class_labels"] for n in range(2)] == [2, 0]
    assert images.summary() == "2 images, 2 classes; not read: depth, n"
    save_pictures(tmp_path / "only", {"img": two}, "img", decode=False)
    images = open_images(tmp_path / "only", FORM)
    assert torch.equal(images[1]["x0"], expected[1]["x0"])
    save_pictures(tmp_path / "unclear", {"before": one, "after": two}, "before", "after")
    with pytest.raises(ValueError, match=r"several columns of images: before, after. Rename the"):
        open_images(tmp_path / "unclear", FORM)
    save_pictures(tmp_path / "texts", {"image": two})
    with pytest.raises(ValueError, match=r"columns \['image'\], none of which .*cast_column"):
        open_images(tmp_path / "texts", FORM)


def test_saved_data_sets_in_other_states(tmp_path):
    """Several splits, another format, a picture that is missing, damaged or gone."""
    import datasets

    write_images(tmp_path / "data", 3, 0)
    files = [str(path) for path in sorted((tmp_path / "data").iterdir())]
    saved = datasets.Dataset.from_dict({"image": [files[0], None, files[2]]})
    saved = saved.cast_column("image", datasets.Image())
    saved.with_format("torch").save_to_disk(str(tmp_path / "formatted"))
    splits = datasets.DatasetDict({"train": saved, "test": saved})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"holds splits: train, test. Pass .* '.*/splits/train'"):
        open_images(tmp_path / "splits", FORM)
    images = open_images(tmp_path / "formatted", FORM)
    assert torch.equal(images[2]["x0"], open_images(tmp_path / "data", FORM)[2]["x0"])
    with pytest.raises(ValueError, match=r"'formatted\[1\]' is missing: there is nothing in its"):
        images[1]
    (tmp_path / "formatted" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"formatted' cannot be read as a data set \("):
        open_images(tmp_path / "formatted", FORM)


@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 8, 8), (8, 8, 1)])
def test_one_image_is_not_several_grey_ones(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"may be one image or several grey ones. Save one as"):
        open_images(tmp_path / "a.npz", Form(3, None, 8))


def test_what_of_arrays_is_not_read_is_said(tmp_path):
    """Other arrays, and that [0, 1] would be taken for the brighter half of [-1, 1]."""
    floats = np.random.default_rng(0).random((2, 1, 8, 8))
    np.savez(tmp_path / "a.npz", images=floats, prompts=np.array(["a", "b"]))
    said = open_images(tmp_path / "a.npz", FORM).summary()
    assert said.startswith("2 images; not read: prompts; no pixel is negative, and [-1, 1] is what")
    np.savez(tmp_path / "a.npz", images=2 * floats - 1)
    assert open_images(tmp_path / "a.npz", FORM).summary() == "2 images"
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"a.npz' cannot be read \("):
        open_images(tmp_path / "a.npz", FORM)


def test_images_are_known_by_what_is_stored(tmp_path, monkeypatch):
    """By their bytes, of every form; not by name, time or the form that a network takes."""
    write_images(tmp_path / "data", 2, 0)
    write_images(tmp_path / "other", 2, 1)
    files = [str(path) for path in sorted((tmp_path / "data").iterdir())]
    save_pictures(tmp_path / "saved", {"image": files}, "image")
    np.savez(tmp_path / "a.npz", images=np.arange(128, dtype=np.uint8).reshape(2, 8, 8))
    for name in ("data", "saved", "a.npz"):
        first, second = open_images(tmp_path / name, FORM).source_digests()
        assert first != second
        small = open_images(tmp_path / name, Form(3, None, 4))
        assert small.source_digests() == [first, second]
        with monkeypatch.context() as patch:  # they are kept
            patch.setattr(small, "_source_digest", None)
            assert small.source_digests() == [first, second]
    other = open_images(tmp_path / "other", FORM).source_digests()
    assert not set(other) & set(open_images(tmp_path / "data", FORM).source_digests())


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path / "data", 1, 0)
    write_images(tmp_path / "data" / "large", 1, 0, size=12)
    images = open_images(tmp_path / "data", Form(3, None, None))
    assert images[0]["x0"].shape == (3, 8, 8)
    with pytest.raises(
        ValueError, match=r"'large/image0.png' has shape \(3, 12, 12\), and 'image0"
    ):
        images[1]
    with pytest.raises(ValueError, match=r"12×12 pixels, and the network takes multiples of 8. "):
        open_images(tmp_path / "data", Form(3, None, None, 8))[1]["x0"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A photograph is read as viewers show it: of one picture, saved turned in eight ways."""
    upright = Image.fromarray(np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10)
    undo = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
    undo = [getattr(Image.Transpose, name) for name in undo.split()]
    stored = upright.transpose(undo[orientation - 2]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    images = open_images(tmp_path, Form(1, None, None))
    expected = torch.from_numpy(np.asarray(upright).astype(np.float32)) / 127.5 - 1
    assert torch.equal(images[0]["x0"][0], expected)


def test_what_is_hidden_nested_or_linked(tmp_path):
    """Hidden files shift no numbers, the first folder is the class, links are followed."""
    data = tmp_path / "data"
    write_images(data / "a" / "inner", 2, 0)
    write_images(data / "b", 1, 1, suffix=".jfif")
    write_images(tmp_path / "elsewhere", 1, 2)
    (data / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "c" / "around").symlink_to(data, target_is_directory=True)
    write_images(data / ".ipynb_checkpoints", 1, 3)
    for name in ("@eaDir", "b/@eaDir"):
        write_images(data / name, 1, 3)
    (data / "__MACOSX").mkdir()
    (data / "b" / "._image0.png").write_bytes(b"not an image")
    (data / "b" / "notes.txt").write_text("not an image")
    images = open_images(data, FORM, Condition("class_labels", 3))
    assert images.names == [
        "a/inner/image0.png",
        "a/inner/image1.png",
        "b/image0.jfif",
        "c/image0.png",
    ]
    assert [images[n]["class_labels"] for n in range(4)] == [0, 0, 1, 2]
    assert images.summary() == (
        "4 images, 3 classes (0 = 'a', 1 = 'b', 2 = 'c'); 5 other files left out "
        "(.ipynb_checkpoints/image0.png, @eaDir/image0.png, b/._image0.png, …)"
    )
