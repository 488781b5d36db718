"""Images of every form, as data: folders, saved data sets, arrays; labels and prompts."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cli.cases import write_images

FORM = Form(1, (8, 8), None)
NAMED = {"file_name": "image0.png"}


def write_lines(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


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
    with pytest.raises(ValueError, match=r"have names \(b, c\), those of the training data num"):
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
    other = {"file_name": "image1.png", "text": "b", **entry}
    write_lines(tmp_path / "data", NAMED | {"label": 2}, other)
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path / "data", FORM, Condition("class_labels", 3))
    with pytest.raises(ValueError, match=r"'image0.png' of '.*' has no prompt"):
        open_images(tmp_path / "data", FORM, Condition("prompt"))
    images = open_images(tmp_path / "data", FORM, Condition("prompt", prompt="a photo"))
    assert [images[n]["prompt"] for n in range(2)] == ["a photo", "b"]
    assert set(open_images(tmp_path / "data", FORM, Condition())[0]) == {"x0"}


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
    with pytest.warns(UserWarning, match=r"more than 8 bits .* saw all above 255 as white"):
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
        image.putpixel((3, 3), (*image.getpixel((3, 3))[:-1], 4))
        with pytest.warns(UserWarning, match=r"transparent pixels have the colours that their"):
            assert torch.equal(FORM.tensor(image, "a"), FORM.tensor(opaque, "a"))


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
        with pytest.raises(ValueError, match=r"0.png' is in the mode L \(no conversion\). Save"):
            open_images(tmp_path / "data", form)[0]


def test_all_files_that_cannot_be_read_at_once(tmp_path):
    """Before anything is computed; left out if asked for, pixels that end too early as well."""
    folder = tmp_path / "data"
    write_images(folder, 6, 0, size=64)
    whole = (folder / "image0.png").read_bytes()
    # of the last the header is whole
    for n, raw in ((1, b""), (3, b"text"), (4, whole[:20]), (5, whole[: len(whole) // 2])):
        (folder / f"image{n}.png").write_bytes(raw)
    files = sorted(folder.iterdir())
    told = r"1.png' cannot be read \(.*3 more cannot be read: '.*3.png', '.*4.png', '.*5.png'. --s"
    for given in (folder, files):
        with pytest.raises(ValueError, match=told):
            open_images(given, Form(1, None, None))
    layout = Layout(skip_unreadable=True)
    for given in (folder, files):
        images = open_images(given, Form(1, None, None), layout=layout)
        assert images.names == ["image0.png", "image2.png"]
        expected = "2 images; 4 images left out, unreadable: 'image1.png', 'image3.png', 'image4.p"
        assert images.summary().startswith(expected)
        assert len(list(images)) == 2
    rows = [NAMED | {"text": "a", "file_name": f"image{n}.png"} for n in range(5)]
    write_lines(folder, *rows)
    images = open_images(folder, Form(1, None, None), Condition("prompt"), layout=layout)
    assert images.conditions["prompt"] == ["a", "a"]
    queries = open_images(folder, Form(1, None, None), Condition("prompt"), images, layout=layout)
    assert queries.names == images.names
    for n in (0, 2):
        (folder / f"image{n}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image0.png' cannot be read"):  # all of them
        open_images(folder, FORM, layout=layout)


def test_repeats_of_images_that_can_be_read(tmp_path):
    """The mean weight is one over the images that are left."""
    for name, count in (("1_a", 2), ("3_b", 2)):
        write_images(tmp_path / name, count, 0)
    (tmp_path / "1_a" / "image0.png").write_bytes(b"")
    layout = Layout(skip_unreadable=True)
    images = open_images(tmp_path, FORM, Condition("prompt"), layout=layout)
    assert images.example_weights == pytest.approx([3 / 7, 9 / 7, 9 / 7])


def test_images_that_are_cut_are_counted(tmp_path):
    """Of folders, files, data sets and images in memory, whatever their orientation."""
    (tmp_path / "data").mkdir()
    for n, size in enumerate([(8, 8), (8, 9), (12, 8)]):
        Image.new("L", size).save(tmp_path / "data" / f"{n}.png")
    files = sorted((tmp_path / "data").iterdir())
    save_pictures(tmp_path / "saved", {"image": [str(file) for file in files]}, "image")
    opened = [Image.open(file) for file in files]
    said = "2 of 3 images are not square, cut to a square from the middle (--buckets if training"
    for given in (tmp_path / "data", files, tmp_path / "saved", opened):
        assert said in open_images(given, Form(1, (8, 8), 8)).summary()
        assert "square" not in open_images(given, Form(1, None, None)).summary()
    for file in files[1:]:
        file.unlink()
    assert "square" not in open_images(tmp_path / "data", Form(1, (8, 8), 8)).summary()


def test_kinds_of_files_as_trainers_convert_them(tmp_path, monkeypatch):
    """CMYK, palettes, 16 bits in colours, moving pictures, and very large ones."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    cmyk, rgb = Image.fromarray(pixels, "CMYK"), Image.fromarray(pixels[..., :3])
    cmyk.save(tmp_path / "a.tif")
    cmyk.save(tmp_path / "b.jpg")
    rgb.convert("P").save(tmp_path / "c.bmp")
    rgb.save(tmp_path / "d.avif")
    rgb.save(tmp_path / "e.webp", save_all=True, append_images=[cmyk.convert("RGB")])
    rgb.save(tmp_path / "F.JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # below which Pillow warns, up to twice it
    images = open_images(tmp_path, Form(3, (8, 8), None))
    assert images.names == ["F.JPEG", "a.tif", "b.jpg", "c.bmp", "d.avif", "e.webp"]
    for n, name in enumerate(images.names):
        expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        found = ((images[n]["x0"] + 1) * 127.5).round().permute(1, 2, 0)
        assert np.array_equal(found, expected)


def refuses(*arguments):
    raise ValueError("no conversion")


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_arrays_and_channels(tmp_path, channels):
    """Files are grey or RGB, whatever they hold; arrays may have any number of channels."""
    form = Form(channels, (8, 8), None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    for name, array in (("bytes", pixels), ("floats", expected.numpy())):
        np.savez(tmp_path / f"{name}.npz", images=array, labels=np.array([3, 1, 2]))
        images = open_images(tmp_path / f"{name}.npz", form)
        assert torch.equal(images[2]["x0"], expected[2])
        assert images[0]["class_labels"] == 3
    if channels < 4:
        return
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels[0, ..., :4], "CMYK").save(tmp_path / "data" / "four.tif")
    for path in (tmp_path / "data", tmp_path / "data" / "four.tif"):
        with pytest.raises(ValueError, match=rf"takes {channels} channels, and .* Pass an .npz fi"):
            open_images(path, form)
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
    said = "2 images, 2 classes; --image-column takes images from another column"
    assert images.summary() == said.replace("; ", "; not read: depth, n; ")
    save_pictures(tmp_path / "only", {"img": two}, "img", decode=False)
    images = open_images(tmp_path / "only", FORM)
    assert torch.equal(images[1]["x0"], expected[1]["x0"])
    save_pictures(tmp_path / "unclear", {"before": one, "after": two}, "before", "after")
    with pytest.raises(ValueError, match=r"several columns of images: before, after. Pass --ima"):
        open_images(tmp_path / "unclear", FORM)
    save_pictures(tmp_path / "texts", {"image": two})
    with pytest.raises(ValueError, match=r"columns \['image'\], none of which .*--image-col"):
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
    with pytest.raises(ValueError, match=r"holds splits: train, test. Pass one, .* --split"):
        open_images(tmp_path / "splits", FORM)
    with pytest.raises(ValueError, match=r"'formatted\[1\]' is missing: there is nothing in its"):
        open_images(tmp_path / "formatted", FORM)
    images = open_images(tmp_path / "formatted", FORM, layout=Layout(skip_unreadable=True))
    assert images.names == ["formatted[0]", "formatted[2]"]
    expected = open_images(tmp_path / "data", FORM)
    assert torch.equal(images[1]["x0"], expected[2]["x0"])
    assert images.source_digests() == [expected.source_digests()[n] for n in (0, 2)]
    assert images.summary() == "2 images; 1 image left out, unreadable: 'formatted[1]'"
    (tmp_path / "formatted" / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"formatted' cannot be read as a data set \("):
        open_images(tmp_path / "formatted", FORM)


def test_columns_and_splits_that_are_asked_for(tmp_path):
    """Of saved data sets and those in memory; queries need not have the columns."""
    import datasets

    for n, name in enumerate(("one", "two")):
        write_images(tmp_path / name, 2, n)
    one, two = ([str(f) for f in sorted((tmp_path / n).iterdir())] for n in ("one", "two"))
    data = datasets.Dataset.from_dict({"before": one, "after": two, "said": ["a", "b"]})
    data = data.cast_column("before", datasets.Image())
    splits = datasets.DatasetDict({"train": data, "test": data.select([1])})
    splits.save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "only"))
    layout = Layout(image_column="after", caption_column="said", split="train")
    expected = open_images(tmp_path / "two", FORM)
    for given in (tmp_path / "splits", tmp_path / "only", splits):
        images = open_images(given, FORM, Condition("prompt"), layout=layout)
        assert images.conditions["prompt"] == ["a", "b"]
        assert torch.equal(images[1]["x0"], expected[1]["x0"])
        assert images.source_digests() == expected.source_digests()
        said = "not read: before; --image-column takes images from another column"
        assert images.summary().endswith(said)
    queries = open_images(tmp_path / "one", FORM, Condition("prompt"), images, prompts="q")
    assert queries.conditions["prompt"] == ["q", "q"]
    open_images(tmp_path / "only", FORM, Condition(), layout=Layout())  # the only split
    for wrong, told in (
        ({"split": "valid"}, r"holds splits: train, test, got 'valid'. Pass one"),
        ({"image_column": "c", "split": "test"}, "`image_column` .* 'c'. There are before, af"),
        ({"caption_column": "c", "split": "test"}, "`caption_column` .* 'c'. There are after, b"),
    ):
        with pytest.raises(ValueError, match=told):
            open_images(tmp_path / "splits", FORM, Condition("prompt"), layout=Layout(**wrong))
    for given in (data, data["before"], one, tmp_path / "one" / "image0.png"):
        with pytest.raises(ValueError, match=r"`split` .* got 'train': '.*' holds no splits"):
            open_images(given, FORM, layout=Layout(split="train"))
    with pytest.raises(ValueError, match=r"must be a Dataset, got IterableDataset"):
        open_images(data.to_iterable_dataset(), FORM)
    for given in (data["before"][:], tmp_path / "one", tmp_path / "one" / "image0.png"):
        with pytest.raises(ValueError, match=r"`image_column` .* left out, got 'after': .* no c"):
            open_images(given, FORM, layout=Layout(image_column="after"))


def test_files_of_parquet_and_web_dataset(tmp_path, monkeypatch):
    """By datasets, with the splits of their names; WebDataset's captions are its .txt."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_images(tmp_path / "in", 3, 0)
    files = sorted((tmp_path / "in").iterdir())
    expected = open_images(tmp_path / "in", FORM)
    data = datasets.Dataset.from_dict({"image": list(map(str, files)), "text": list("abc")})
    data = data.cast_column("image", datasets.Image())
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name in ("train", "test"):
        data.to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as tar:
        for file, text in zip(files, "abc", strict=True):
            file.with_suffix(".txt").write_text(text)
            tar.add(file, file.name)
            tar.add(file.with_suffix(".txt"), f"{file.stem}.txt")
    one = tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"
    for path in (tmp_path / "hub", one, tmp_path / "shards", tmp_path / "shards" / "a.tar"):
        layout = Layout(split="train" if path.name == "hub" else None)
        images = open_images(path, FORM, Condition("prompt"), layout=layout)
        assert images.conditions["prompt"] == ["a", "b", "c"]
        assert torch.equal(images[2]["x0"], expected[2]["x0"])
        assert images.source_digests() == expected.source_digests()
        assert images.unread == []
    with pytest.raises(ValueError, match=r"holds splits: train, test. Pass one"):
        open_images(tmp_path / "hub", FORM)
    (tmp_path / "shards" / "a.tar").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a.tar' cannot be read as a data set \("):
        open_images(tmp_path / "shards" / "a.tar", FORM)


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
            patch.setattr(small, "source_digest", None)
            assert small.source_digests() == [first, second]
    other = open_images(tmp_path / "other", FORM).source_digests()
    assert not set(other) & set(open_images(tmp_path / "data", FORM).source_digests())


def test_images_of_several_sizes(tmp_path):
    write_images(tmp_path / "data", 1, 0)
    write_images(tmp_path / "data" / "large", 1, 0, size=12)
    images = open_images(tmp_path / "data", Form(3, None, None))
    assert images[0]["x0"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"'large/image0.png' has shape \(3, 12, 12\), and 'im"):
        images[1]
    with pytest.raises(ValueError, match=r"12×12 pixels, and the network takes multiples of 8. "):
        open_images(tmp_path / "data", Form(3, None, None, 8))[1]["x0"]
    # what the network was made for is proposed
    images = open_images(tmp_path / "data", Form(3, None, None, 4, made_for=8))
    told = "1 of 2 images of another size than 8×8, which the network was made for (--resolution 8)"
    assert told in images.summary()
    images[0]
    with pytest.raises(ValueError, match=r"for images of 8 pixels: pass --resolution 8, or what"):
        images[1]
    assert "made for" not in open_images(tmp_path / "data", Form(3, None, 8, made_for=8)).summary()


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
    expected = "a/inner/image0.png a/inner/image1.png b/image0.jfif c/image0.png"
    assert images.names == expected.split()
    assert [images[n]["class_labels"] for n in range(4)] == [0, 0, 1, 2]
    assert images.summary() == (
        "4 images, 3 classes (0 = 'a', 1 = 'b', 2 = 'c'); 5 other files left out "
        "(.ipynb_checkpoints/image0.png, @eaDir/image0.png, b/._image0.png, …)"
    )
