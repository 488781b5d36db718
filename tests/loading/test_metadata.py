"""Captions and labels beside images: as other systems write them, or refused by file and line."""

import json
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cli.cases import write_images

FORM, PROMPT = Form(1, (8, 8), None), Condition("prompt")
NAMES = ["in/image0.png", "in/image1.png"]
CAPTIONS = ["a café", "a hat"]


def lines(names=NAMES, texts=CAPTIONS, end="\n"):
    """One object for each image, as a text editor shows it."""
    each = (
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
        for name, text in zip(names, texts, strict=True)
    )
    return "".join(line + end for line in each)


def table(names=NAMES, texts=CAPTIONS, between=",", end="\n"):
    rows = [("file_name", "text"), *((n, f'"{t}"') for n, t in zip(names, texts, strict=True))]
    return "".join(between.join(row) + end for row in rows)


def prompts(folder, files, condition=PROMPT):
    """The prompts of two images in a subfolder, beside files of these bytes."""
    write_images(folder / "in", 2, 0)
    for name, written in files.items():
        raw = written if isinstance(written, bytes) else written.encode()
        (folder / name).write_bytes(raw)
    images = open_images(folder, FORM, condition)
    return [images[n]["prompt"] for n in range(2)]


SEPARATED = ["a\u2028mat", "a\x85dog\u2029"]
READ = {
    "as it should be": {"metadata.jsonl": lines()},
    "CR LF": {"metadata.jsonl": lines(end="\r\n")},
    "byte order mark": {"metadata.jsonl": b"\xef\xbb\xbf" + lines().encode()},
    "blank lines and spaces": {"metadata.jsonl": f"\n  {lines(end='  ' + chr(10) * 2)}\t\n"},
    "backslashes": {"metadata.jsonl": lines([name.replace("/", "\\") for name in NAMES])},
    "dots": {"metadata.jsonl": lines(["./in/image0.png", "in/../in//image1.png"])},
    "backslashes and dots": {"metadata.jsonl": lines([".\\in\\image0.png", "in\\image1.png"])},
    "capitals": {"metadata.jsonl": lines(["In/Image0.PNG", "IN/image1.Png"])},
    "in their folder": {"in/metadata.jsonl": lines(["image0.png", "image1.png"])},
    "from their folder": {"in/metadata.jsonl": lines(["image0.png", "../in/image1.png"])},
    "in two folders": {
        "metadata.jsonl": lines(NAMES[:1], CAPTIONS[:1]),
        "in/metadata.jsonl": lines(["image1.png"], CAPTIONS[1:]),
    },
    "a table": {"metadata.csv": table()},
    "a table from Windows": {"metadata.csv": b"\xef\xbb\xbf" + table(end="\r\n").encode()},
    "a table in their folder": {"in/metadata.csv": table(["image0.png", "image1.png"])},
    "hidden ones beside": {"metadata.jsonl": lines(), "in/._metadata.jsonl": b"\0\5\x16\7"},
}


@pytest.mark.parametrize("kind", READ)
def test_as_other_systems_write_it(tmp_path, kind):
    assert prompts(tmp_path, READ[kind]) == CAPTIONS


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_separators_within_captions(tmp_path, name):
    """A line ends at a line feed: others come from web pages, and belong to the caption."""
    written = lines(texts=SEPARATED) if name.endswith("jsonl") else table(texts=SEPARATED)
    assert prompts(tmp_path, {name: written}) == SEPARATED
    several = "two\nlines, and a comma"
    if name.endswith("csv"):
        (tmp_path / name).write_text(table(texts=[several, "x"]))
        assert open_images(tmp_path, FORM, PROMPT)[0]["prompt"] == several


def test_names_in_full_or_composed_otherwise(tmp_path):
    """Absolute names, and an é of two characters, as macOS stores it, for one of one."""
    write_images(tmp_path / "in", 1, 0)
    (tmp_path / "in" / "image0.png").rename(tmp_path / "in" / normalize("NFD", "café.png"))
    for name in ("in/café.png", str(tmp_path / "in" / normalize("NFD", "café.png"))):
        (tmp_path / "metadata.jsonl").write_text(lines([name], ["x"]))
        assert open_images(tmp_path, FORM, PROMPT)[0]["prompt"] == "x"
    (tmp_path / "metadata.jsonl").write_text(lines(["D:\\data\\in\\café.png"], ["x"]))
    with pytest.raises(ValueError, match=r"names, as it stands there, 'D:\\data\\in\\café.png'"):
        open_images(tmp_path, FORM, PROMPT)


def test_names_that_differ_in_capitals_alone_are_two(tmp_path):
    write_images(tmp_path / "in", 2, 0)
    (tmp_path / "in" / "image1.png").rename(tmp_path / "in" / "IMAGE0.png")
    (tmp_path / "metadata.jsonl").write_text(lines(["in/IMAGE0.png", "in/image0.png"]))
    images = open_images(tmp_path, FORM, PROMPT)
    assert [images[n]["prompt"] for n in range(2)] == CAPTIONS
    (tmp_path / "metadata.jsonl").write_text(lines(["in/IMAGE0.png", "in/Image0.png"]))
    with pytest.raises(ValueError, match=r"'in/image0.png' of .* has no line"):
        open_images(tmp_path, FORM, PROMPT)


ONE = '{"file_name": "in/image0.png", "text": "a"}\n'
NONE = ONE.replace("file_name", "image")
REFUSED = {
    "two captions": ({"metadata.jsonl": lines() + ONE}, "'in/image0.png' stands in line 1 .* 3 of"),
    "two names of one": ({"metadata.jsonl": ONE + ONE.replace("/", "\\\\")}, "stands in line 1 of"),
    "two files": (
        {"metadata.jsonl": lines(), "metadata.csv": table()},
        r"'in/image0.png' stands in line 2 of '.*metadata.csv' and in line 1 of '.*jsonl'",
    ),
    "Windows-1252": ({"metadata.jsonl": lines().encode("cp1252")}, "line 1 has the byte 0xe9"),
    "UTF-16": ({"metadata.jsonl": lines().encode("utf-16")}, "is in UTF-16 or UTF-32. Save it as"),
    "UTF-16 without mark": ({"metadata.csv": table().encode("utf-16-le")}, "is in UTF-16 or"),
    "a key twice": (
        {"metadata.jsonl": ONE + '{"file_name": "in/image1.png", "text": "a", "text": "b"}'},
        r"in line 2: 'text' stands in it twice",
    ),
    "a comma too many": ({"metadata.jsonl": ONE.strip() + ","}, "not understood in line 1: Extra"),
    "an array": ({"metadata.jsonl": f"[{ONE.strip()}]"}, "in line 1: it is a list"),
    "cut off": ({"metadata.jsonl": lines()[:-8]}, "not understood in line 2: Unterminated"),
    "another column": (
        {"metadata.jsonl": NONE},
        r"Not read: metadata.jsonl, without 'file_name'\.",
    ),
    "one line of another column": (
        {"metadata.jsonl": ONE + NONE},
        r"in line 2: it has no image's name as 'file_name', but \['image', 'text'\]",
    ),
    "a number for a name": ({"metadata.jsonl": '{"file_name": 3}'}, "but 'file_name': 3"),
    "semicolons": ({"metadata.csv": table(between=";")}, r"are \['file_name;text'\], separated by"),
    "a cell too many": ({"metadata.csv": table(texts=["a", 'b","c'])}, "line 3: 3 cells for 2 col"),
    "quotes not closed": ({"metadata.csv": table() + 'in/x.png,"a'}, "not understood in line 4"),
    "Parquet": ({"in/metadata.parquet": b"PAR1 file_name"}, r"cannot be read as Parquet \("),
    "a list of captions": (
        {"metadata.jsonl": lines(texts=[["a", "b"], "c"])},
        r"prompt of image 'in/image0.png' of .* is \['a', 'b'\], which is no text",
    ),
    "a number for a caption": ({"metadata.jsonl": lines(texts=["a", 7])}, "is 7, which is no text"),
    "none": ({"metadata.jsonl": lines(texts=["a", None])}, "'in/image1.png' .* has no prompt"),
    "an empty cell": ({"metadata.csv": table(texts=["a", ""])}, "'in/image1.png' .* has no prompt"),
    "an empty file": (
        {"metadata.jsonl": "\n"},
        r"The 2 images of .* have no line in the metadata \('in/image0.png', 'in/image1.png'\), an",
    ),
    "another column of captions": (
        {"metadata.jsonl": lines().replace('"text"', '"caption"')},
        r"have no prompt .* Not read: caption\. --caption-column NAME",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_file_and_line(tmp_path, kind):
    files, told = REFUSED[kind]
    with pytest.raises(ValueError, match=told):
        prompts(tmp_path, files)


def as_imagefolder(folder, monkeypatch):
    """Prompts and pixels as diffusers' scripts have them: by imagefolder, of all files below."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder.parent / "cache"))
    files = {"train": str(folder / "**")}
    return datasets.load_dataset("imagefolder", data_files=files)["train"]


def rows_of(kind, rows, folder):
    """Write the rows of a metadata file."""
    import pandas

    table = pandas.DataFrame(rows)
    if kind == "jsonl":
        table.to_json(folder / "metadata.jsonl", orient="records", lines=True, force_ascii=False)
    elif kind == "csv":
        table.to_csv(folder / "metadata.csv", index=False)
    else:
        table.to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("name", ["file_name", "image_file_name"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_as_imagefolder_of_datasets_reads_it(tmp_path, monkeypatch, kind, name):
    """Nested folders with a metadata file each, in three forms; columns of any name."""
    found = {}
    for n, inner in enumerate(("a", "b/in")):
        write_images(tmp_path / "data" / inner, 2, n)
        rows = [{name: f"image{k}.png", "said": f"{inner} é, {k}", "id": k} for k in range(2)]
        rows_of(kind, rows, tmp_path / "data" / inner)
    for row in as_imagefolder(tmp_path / "data", monkeypatch):
        found[row["image"].tobytes()] = row["said"]
    layout = Layout(caption_column="said")
    images = open_images(tmp_path / "data", FORM, PROMPT, layout=layout)
    pixels = [((item["x0"] + 1) * 127.5).round().byte().numpy().tobytes() for item in images]
    assert dict(zip(pixels, images.conditions["prompt"], strict=True)) == found
    assert images.unread == ["id"]
    layout = Layout(caption_column="file_name")  # of the files, whatever the metadata say
    by_name = open_images(tmp_path / "data", FORM, PROMPT, layout=layout)
    assert by_name.conditions["prompt"] == ["image0", "image1"] * 2
    for column, told in (("say", "There are .*id.*, said: pass"), (None, "no prompt .* --ca")):
        layout = Layout(caption_column=column)
        with pytest.raises(ValueError, match=told):
            open_images(tmp_path / "data", FORM, PROMPT, layout=layout)


def test_a_column_that_names_the_images(tmp_path):
    """Of several, the one that is asked for; queries need not have it."""
    write_images(tmp_path / "in", 2, 0)
    row = {"before_file_name": "image0.png", "after": "image1.png", "text": "a"}
    rows_of("csv", [row], tmp_path / "in")
    layout = Layout(image_column="before")
    with pytest.raises(ValueError, match=r"'image1.png' of .* has no line in the metadata. .*0.p"):
        open_images(tmp_path / "in", FORM, PROMPT, layout=layout)
    (tmp_path / "in" / "image0.png").unlink()
    layout = Layout(image_column="after")
    images = open_images(tmp_path / "in", FORM, PROMPT, layout=layout)
    assert (images.names, images.conditions["prompt"]) == (["image1.png"], ["a"])
    write_images(tmp_path / "queries", 1, 1)
    rows_of("jsonl", [{"file_name": "image0.png", "text": "q"}], tmp_path / "queries")
    queries = open_images(tmp_path / "queries", FORM, PROMPT, images, layout=layout)
    assert queries.conditions["prompt"] == ["q"]


def test_a_split_of_a_folder(tmp_path, monkeypatch):
    """The folder of a split, by any of its names, with metadata in it or around it."""
    for n, name in enumerate(("training", "val")):
        for label in ("a", "b"):
            write_images(tmp_path / "data" / name / label, 2, n)
    data = tmp_path / "data"
    layout = Layout(split="train")
    expected = as_imagefolder(data / "training", monkeypatch)
    images = open_images(data, FORM, Condition("class_labels", 2), layout=layout)
    assert [item["class_labels"] for item in images] == expected["label"]
    assert images.classes.order == expected.features["label"].names
    for split in ("validation", "val", "dev"):
        images = open_images(data, FORM, Condition(), layout=Layout(split=split))
        assert images.names == [f"val/{x}/image{n}.png" for x in "ab" for n in range(2)]
    with pytest.raises(ValueError, match=r"folder of '.*', got 'test'. There are training, val"):
        open_images(data, FORM, Condition(), layout=Layout(split="test"))
    names = [file.relative_to(data) for file in data.rglob("*.png")]
    rows_of("jsonl", [{"file_name": str(n), "text": n.parts[0]} for n in names], data)
    images = open_images(data, FORM, PROMPT, layout=layout)
    assert images.conditions["prompt"] == ["training"] * 4


def test_what_is_not_read_is_said(tmp_path):
    """Columns without a meaning here, and lines whose image is gone."""
    written = lines([*NAMES, "in/gone.png"], ["a", "b", "c"]).replace("text", "caption")
    condition = Condition("prompt", prompt="x")
    assert prompts(tmp_path, {"metadata.jsonl": written}, condition) == ["x"] * 2
    assert open_images(tmp_path, FORM).summary() == (
        "2 images; not read: caption; 1 line of metadata without an image: 'in/gone.png'; "
        "--caption-column takes prompts from another column"
    )


def labels(folder, count=3):
    images = open_images(folder, FORM, Condition("class_labels", count))
    return [images[n]["class_labels"] for n in range(len(images))]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_labels_within_a_folder(tmp_path, name):
    """They are those of the file, and not the number of the folder that it lies in."""
    write_images(tmp_path / "train", 2, 0)
    rows = [("image0.png", 2), ("image1.png", 0)]
    written = "file_name,label\n" + "".join(f"{n},{k}\n" for n, k in rows)
    if name.endswith("jsonl"):
        written = "".join(json.dumps({"file_name": n, "label": k}) + "\n" for n, k in rows)
    (tmp_path / "train" / name).write_text(written)
    assert labels(tmp_path) == [2, 0]
    (tmp_path / "train" / name).write_text(written.replace("label", "kind"))
    with pytest.raises(ValueError, match=r"have no label .* Not read: kind\."):
        labels(tmp_path)


def test_folders_that_may_be_no_classes(tmp_path):
    """A class without images, one folder around all, and parts of a data set."""
    for name in ("10", "9"):
        write_images(tmp_path / "data" / "train" / name, 1, 0)
    assert labels(tmp_path / "data" / "train") == [0, 1]  # in the order of torchvision's
    with pytest.raises(ValueError, match=r"folder 'train', and each .* Pass '.*/train'.*, or give"):
        labels(tmp_path / "data")
    assert labels(tmp_path / "data", count=1) == [0, 0]
    rows = [{"file_name": f"train/{n}/image0.png", "label": 2} for n in (9, 10)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels(tmp_path / "data") == [2, 2]
    (tmp_path / "data" / "train" / ".hidden").mkdir()
    (tmp_path / "data" / "train" / "8").mkdir()
    with pytest.raises(ValueError, match=r"The folder '8' of .* holds no images"):
        labels(tmp_path / "data" / "train")
    assert len(open_images(tmp_path / "data" / "train", FORM, Condition())) == 2


def test_parts_of_a_data_set_are_refused_as_classes_alone(tmp_path):
    for name in ("train", "Test"):
        write_images(tmp_path / name, 1, 0)
    with pytest.raises(ValueError, match=r"parts of a data set: Test, train. Pass --split train"):
        labels(tmp_path)
    said = "2 images; of all parts of a data set: Test, train (--split takes one)"
    assert open_images(tmp_path, FORM, Condition()).summary() == said
    rows = [{"file_name": f"{n}/image0.png", "text": n, "label": 2} for n in ("train", "Test")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels(tmp_path) == [2, 2]
    assert open_images(tmp_path, FORM, PROMPT).conditions["prompt"] == ["Test", "train"]


OTHERS = {
    "metadata.csv": b'image_id;dx\n1;a "quote\n2;\xe9',
    "metadata.jsonl": b'{"url": 1}\nnot JSON',
    "metadata.parquet": b"PAR1",
}


@pytest.mark.parametrize("name", OTHERS)
def test_tables_of_other_programs(tmp_path, name):
    """They name no images: classes are those of folders, which is what training could take."""
    for folder in ("a", "b"):
        write_images(tmp_path / folder, 1, 0)
    (tmp_path / name).write_bytes(OTHERS[name])
    assert labels(tmp_path) == [0, 1]
    images = open_images(tmp_path, FORM, Condition())
    said = f"left out ({name}); not read: {name}, without 'file_name'"
    assert images.summary().endswith(said)
    with pytest.raises(ValueError, match=rf"have no prompt .* Not read: {name}, without 'file_n"):
        open_images(tmp_path, FORM, PROMPT)


def test_a_caption_of_a_removed_image_is_not_of_another(tmp_path):
    """Names that differ in case are found where no line names the image itself, which is said."""
    folder = tmp_path / "in"
    write_images(folder, 1, 0)
    both = lines(["IMAGE0.png", "image0.png"], ["removed", "kept"])
    for written in (both, "\n".join(reversed(both.splitlines()))):
        (folder / "metadata.jsonl").write_text(written)
        images = open_images(folder, FORM, PROMPT)
        assert images[0]["prompt"] == "kept"
        assert images.summary().endswith("1 line of metadata without an image: 'IMAGE0.png'")
    (folder / "metadata.jsonl").write_text(lines(["IMAGE0.png"], ["a"]))
    images = open_images(folder, FORM, PROMPT)
    assert images[0]["prompt"] == "a"
    assert images.summary().endswith("; 1 line of metadata by a name alike: 'image0.png'")
    (folder / "metadata.jsonl").write_text(lines(["IMAGE0.png", "Image0.png"], ["a", "b"]))
    with pytest.raises(ValueError, match=r"'image0.png' stands in line 1 of .* and in line 2 of"):
        open_images(folder, FORM, PROMPT)


def test_an_image_that_is_shown_beside_another(tmp_path):
    """It stays one of the images if it has a line of its own; backslashes name it, too."""
    write_images(tmp_path / "in", 3, 0)
    rows = [
        {"file_name": "image0.png", "text": "a", "conditioning_image_file_name": ".\\image1.png"},
        {"file_name": "image1.png", "text": "b", "conditioning_image_file_name": "image2.png"},
    ]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = open_images(tmp_path, FORM, Condition("prompt", images={"conditioning_image": 1}))
    assert images.names == NAMES
    pixels = np.asarray(Image.open(tmp_path / "in" / "image1.png"))
    assert np.array_equal((images[0]["conditioning_image"][0] * 255).round(), pixels)
    # by a name alike, it is not beside itself
    rows[0]["conditioning_image_file_name"] = "IMAGE0.png"
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"IMAGE0.png' has vanished"):
        open_images(tmp_path, FORM, Condition("prompt", images={"conditioning_image": 1}))[0]
