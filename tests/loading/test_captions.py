"""Captions beside images, and the folders of kohya's ``sd-scripts``: as trainers read them."""

import shutil
from dataclasses import fields
from inspect import signature
from types import SimpleNamespace
from unicodedata import normalize

import pytest

from curvlinops_diffusion import Attributor
from curvlinops_diffusion.cli.network import load_network
from curvlinops_diffusion.cli.options import LAYOUT, options_of
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.layout import Layout
from curvlinops_diffusion.loading.network import Network
from curvlinops_diffusion.loading.preprocessing import Form
from tests.cli.cases import write_images
from tests.diffusion import test_pipelines as pipelines

FORM, PROMPT = Form(1, (8, 8), None), Condition("prompt")


def write(folder, files):
    """Text files beside images, in text or bytes."""
    for name, text in files.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def epoch(folder, extension=".caption"):
    """The images and captions of an epoch, by the documentation of kohya's ``sd-scripts``.

    The images directly in each folder called ``<number of repetitions>_<identifier> <class>``, so
    many times; the caption is the first line of the file of the image's name with the extension,
    and without such a file it is what follows the number.
    """
    found = []
    for inner in sorted(folder.iterdir()):
        number, prompt = inner.name.split("_", 1)
        for image in sorted(inner.glob("*.png")):
            file = image.with_suffix(extension)
            caption = file.read_text().splitlines()[0].strip() if file.is_file() else prompt
            found += [(f"{inner.name}/{image.name}", caption)] * int(number)
    return found


@pytest.fixture
def kohya(tmp_path):
    folder = tmp_path / "train"
    write_images(folder / "20_sls frog", 3, 0)
    write_images(folder / "10_cpc rabbit", 2, 1)
    write(folder / "20_sls frog", {"image0.txt": "sls frog, green\n", "image2.txt": " in a hat "})
    write(folder / "10_cpc rabbit", {"image1.txt": "cpc rabbit, two ears"})
    return folder


def test_folders_with_repeats(kohya):
    """Means over images with their weights are means over an epoch of the trainer."""
    images = open_images(kohya, FORM, PROMPT)
    expected = epoch(kohya, ".txt")
    assert images.names == list(dict.fromkeys(name for name, _ in expected))
    prompts = dict(expected)
    assert [item["prompt"] for item in images] == [prompts[name] for name in images.names]
    value = {name: n**2 + 1.0 for n, name in enumerate(images.names)}
    mean = sum(value[name] for name, _ in expected) / len(expected)
    weighted = [w * value[n] for w, n in zip(images.example_weights, images.names, strict=True)]
    assert sum(weighted) / len(images) == pytest.approx(mean, rel=1e-12)
    assert images.summary() == (
        "5 images, 5 prompts; 3 captions from files .txt; 2 images with the folder's name as "
        "prompt: "
        "'10_cpc rabbit/image0.png', '20_sls frog/image1.png'; repeated: 'cpc rabbit' 10 times, "
        "'sls frog' 20 times"
    )


def test_folders_of_equal_repeats(tmp_path):
    """Nothing is weighted; a network that takes no prompts takes them for what they are to it."""
    for name in ("10_a", "10_b"):
        write_images(tmp_path / name, 1, 0)
    assert open_images(tmp_path, FORM, PROMPT).example_weights is None
    images = open_images(tmp_path, FORM, Condition("class_labels", 2))
    assert [item["class_labels"] for item in images] == [0, 1]
    assert images.example_weights is None


BESIDE = {
    "kohya's": {"image0.caption": "a cat", "image1.caption": "a hat"},
    "others'": {"image0.txt": "a cat\n", "image1.txt": "  a hat  \n\n"},
    "from Windows": {"image0.txt": b"\xef\xbb\xbfa cat\r\n", "image1.txt": b"a hat\r\n"},
    "of several lines": {"image0.txt": "a cat\na dog", "image1.txt": "a hat"},
    "of an extension": {"image0.tags": "a cat", "image1.tags": "a hat", "image0.txt": "no"},
    "beside others": {"image0.caption": "a cat", "image1.caption": "a hat", "notes.txt": "no"},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_captions_beside_images(tmp_path, kind):
    write_images(tmp_path / "a", 2, 0)
    write(tmp_path / "a", BESIDE[kind])
    ends = [".tags", "tags"] if "image0.tags" in BESIDE[kind] else [None]
    for end in ends:
        images = open_images(tmp_path, FORM, PROMPT, layout=Layout(caption_extension=end))
        assert [item["prompt"] for item in images] == ["a cat", "a hat"]
    said = images.summary()
    assert ("the first line of 1 longer caption: 'a/image0.txt' (--" in said) == ("lines" in kind)
    assert ("1 other files left out (a/notes.txt)" in said) == ("others" in kind.split())
    unread = "not read: files .txt (--caption-extension .txt)"
    assert (unread in said) == ("extension" in kind)


def of_ai_toolkit(folder, word, default):
    """Captions by the documentation of ai-toolkit.

    Images of all subfolders but ``_controls``; the caption is the whole text of the file of the
    image's name and ``.txt``, or else the default; the trigger word replaces ``[trigger]``, and
    stands in front of captions that do not have it.
    """
    found = {}
    for image in sorted(folder.rglob("*.png")):
        if image.parent.name != "_controls":
            file = image.with_suffix(".txt")
            caption = file.read_text() if file.is_file() else default
            caption = caption.replace("[trigger]", word)
            name = image.relative_to(folder).as_posix()
            found[name] = caption if word in caption else f"{word} {caption}"
    return found


def test_folders_of_ai_toolkit(tmp_path):
    for name in ("in", "in/_controls"):
        write_images(tmp_path / name, 4, 0)
    texts = ["a [trigger] in a hat\r\n\r\nat night\r\n", "a cat", "sls himself"]
    write(tmp_path / "in", {f"image{n}.txt": text for n, text in enumerate(texts)})
    layout = Layout(caption_lines="all", trigger_word="sls")
    images = open_images(tmp_path, FORM, Condition("prompt", prompt="[trigger]!"), layout=layout)
    assert dict(zip(images.names, images.conditions["prompt"], strict=True)) == of_ai_toolkit(
        tmp_path, "sls", "[trigger]!"
    )
    controls = tmp_path / "in/_controls"
    queries = open_images(controls, FORM, PROMPT, images, prompts="b", layout=layout)
    assert queries.conditions["prompt"] == ["sls b"] * 4
    told = r"'in/image0.png' .* is 'a \[trigger\] in a hat', where .*\(2 are .*--tr"
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path, FORM, Condition("prompt", prompt="[trigger]!"))
    plain = Layout(trigger_word="")
    images = open_images(tmp_path, FORM, Condition("prompt", prompt="x"), layout=plain)
    assert images.conditions["prompt"][0] == "a  in a hat"
    with pytest.raises(ValueError, match="`caption_lines` must be 'first' or 'all', got 'last'"):
        Layout(caption_lines="last")


def test_folders_of_one_trainer(tmp_path):
    """Masks are no images; captions are in files, or the files' names."""
    folder = tmp_path / "in"
    write_images(folder, 2, 0)
    for name in ("image0-masklabel.png", "image1-condlabel.png"):
        shutil.copy(folder / "image0.png", folder / name)
    write(folder, {"image0.txt": "a cat", "image1.txt": "a hat"})
    images = open_images(folder, FORM, PROMPT)
    assert images.names == ["image0.png", "image1.png"]
    assert images.conditions["prompt"] == ["a cat", "a hat"]
    said = "2 masks of OneTrainer's, not used: 'image0-masklabel.png', 'image1-condlabel.png'"
    assert said in images.summary()
    by_name = Layout(caption_column="file_name")
    images = open_images(folder, FORM, PROMPT, layout=by_name)
    assert images.conditions["prompt"] == ["image0", "image1"]
    assert "not read: files .txt (--caption-extension .txt)" in images.summary()
    queries = folder.rename(tmp_path / "queries")  # whose names are no captions
    found = open_images(queries, FORM, PROMPT, images, layout=by_name)
    assert found.conditions["prompt"] == ["a cat", "a hat"]
    for file in queries.glob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match=r"The 2 images of .* have no prompt"):
        open_images(queries, FORM, PROMPT, images, layout=by_name)
    with pytest.raises(ValueError, match=r"`caption_column` .* left out, got 'a': .* has no col"):
        open_images(queries, FORM, PROMPT, layout=Layout(caption_column="a"))


def test_captions_and_images_that_have_no_other(tmp_path):
    """How many, the first three; hidden ones, and those of images that cannot be read, are none."""
    write_images(tmp_path / "a", 6, 0)
    texts = {f"{name}.txt": "x" for name in ("image1", "gone1", "gone2", "notes", "z", "._image1")}
    write(tmp_path / "a", texts)
    told = r"5 of the 6 images of .* no prompt \('a/image0.png', 'a/image2.png', 'a/im.*, …\)"
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path, FORM, PROMPT)
    (tmp_path / "a" / "image1.txt").rename(tmp_path / "a" / "image1")  # then none has one
    told = r"The 6 .* Not read: 4 files .txt without an image: 'a/gone1.txt', .*notes.txt', …\.$"
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path, FORM, PROMPT)
    (tmp_path / "a" / "image1").rename(tmp_path / "a" / "image1.txt")
    (tmp_path / "a" / "image1.png").write_bytes(b"")
    (tmp_path / "a" / "image0.txt").write_text("y")
    layout = Layout(skip_unreadable=True)
    images = open_images(tmp_path, FORM, Condition("prompt", prompt="p"), layout=layout)
    said = images.summary()
    assert "4 files .txt without an image: 'a/gone1.txt', 'a/gone2.txt', 'a/notes.txt', …" in said
    said_of_prompts = "'p' for 4 images without a prompt: 'a/image2.png', 'a/image3.png', 'a/image4"
    assert said_of_prompts in said
    assert images.conditions["prompt"] == ["y", "p", "p", "p", "p"]


@pytest.mark.parametrize("name", ["кот é", "猫 é", "Cafe\u0301", "a.b", "İ"])
def test_names_of_any_script(tmp_path, name):
    """Captions are found by names that are composed otherwise, or in another case."""
    write_images(tmp_path / "in", 1, 0)
    (tmp_path / "in" / "image0.png").rename(tmp_path / "in" / f"{name}.PNG")
    for form in ("NFC", "NFD"):
        file = tmp_path / "in" / f"{normalize(form, name)}.TXT"
        file.write_text("a cat")
        assert open_images(tmp_path, FORM, PROMPT)[0]["prompt"] == "a cat"
        file.unlink()
    # but not where the caption is another image's, or it is not clear which it is
    write_images(tmp_path / "two", 1, 0)
    write(tmp_path / "two", {"IMAGE0.txt": "no", "Image0.txt": "no"})
    with pytest.raises(ValueError, match=r"The 2 images of .* have no prompt"):
        open_images(tmp_path, FORM, PROMPT)


def test_every_option_is_handed_on(monkeypatch):
    """From the signature to what opens images, with the same defaults in both and the program."""
    seen = {}

    def of_network(*args, **options):
        seen.update(options)
        return SimpleNamespace(settings=[])

    monkeypatch.setattr(Network, "of_pipeline", lambda *args, **options: "network")
    monkeypatch.setattr(Attributor, "of_network", of_network)
    names = [field.name for field in fields(Layout) if field.name != "of_queries"]
    assert sorted(names) == sorted(LAYOUT.split())
    given = {name: f"{name}'s" for name in names}
    Attributor.from_pipeline(None, None, **given)
    assert given.items() <= seen.items()
    known = signature(Attributor.from_pipeline).parameters
    assert {name: known[name].default for name in names} == {
        name: getattr(Layout, name) for name in names
    }


def test_layouts_that_a_network_does_not_take(tmp_path):
    write_images(tmp_path / "a", 1, 0)
    for name in ("caption_extension", "caption_column", "trigger_word"):
        layout = Layout(**{name: "x"})
        with pytest.raises(ValueError, match=rf"takes labels, got {name}='x'. Leave it out"):
            open_images(tmp_path, FORM, Condition("class_labels", 1), layout=layout)


def test_images_without_a_caption(tmp_path):
    """They take one prompt, an empty line is a caption, and a prompt of none is said."""
    write_images(tmp_path / "a", 2, 0)
    write(tmp_path / "a", {"image1.txt": "\n"})
    with pytest.raises(ValueError, match=r"'a/image0.png' .* has no prompt, .*\.txt or \.caption"):
        open_images(tmp_path, FORM, PROMPT)
    images = open_images(tmp_path, FORM, Condition("prompt", prompt="x"))
    assert [item["prompt"] for item in images] == ["x", ""]
    assert open_images(tmp_path, FORM, PROMPT, prompts="x").conditions == images.conditions
    write(tmp_path / "a", {"image0.txt": "a"})
    said = open_images(tmp_path, FORM, Condition("prompt", prompt="x")).summary()
    assert said == (
        "2 images, 2 prompts; 2 captions from files .txt; all have prompts of their own, and 'x' "
        "is of none of them"
    )
    with pytest.raises(ValueError, match=r"`prompts` must be left out .* got 'x' for 2 images"):
        open_images(tmp_path, FORM, PROMPT, prompts="x")


NAMED = '{"file_name": "a/image0.png"}\n{"file_name": "a/image1.png", "text": "b"}'
REFUSED = {
    "two kinds": (
        {"a/image0.txt": "a", "a/image1.caption": "b"},
        "two kinds, 'a/image1.caption' and 'a/image0.txt'. Pass --caption-extension",
    ),
    "an empty file": ({"a/image0.txt": ""}, "image0.txt' is empty. Write it"),
    "Windows-1252": ({"a/image1.txt": "é".encode("cp1252")}, "line 1 has the byte 0xe9"),
    "another extension": (
        {"a/image0.txt": "a", "a/image1.tags": "b"},
        r"prompt 'x' .* captions lie, 'a/image0.txt' first \(1 of them\).*--caption-extension .txt",
    ),
    "metadata": (
        {"a/image0.txt": "a", "metadata.jsonl": NAMED},
        "prompt 'x' .* captions lie, 'a/image0.txt' first",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_captions_that_are_refused(tmp_path, kind):
    files, told = REFUSED[kind]
    write_images(tmp_path / "a", 2, 0)
    write(tmp_path, files)
    end = "tags" if kind == "another extension" else None
    condition, layout = Condition("prompt", prompt="x"), Layout(caption_extension=end)
    with pytest.raises(ValueError, match=told):
        open_images(tmp_path, FORM, condition, layout=layout)


@pytest.mark.parametrize(
    "where", ["image.png", "other/image.png", "20_sls frog/in/image.png", "20_sls frog/a.gif"]
)
def test_images_that_kohya_does_not_train_on(kohya, where):
    (kohya / where).parent.mkdir(exist_ok=True)
    shutil.copy(kohya / "20_sls frog" / "image0.png", kohya / where)
    with pytest.raises(ValueError, match=rf"\('(10|20)_[a-z ]*'\), which .* and '{where}' is none"):
        open_images(kohya, FORM, PROMPT)


def test_folders_around_those_of_kohya(kohya):
    said = open_images(kohya.parent, FORM, Condition("prompt", prompt="x")).summary()
    assert f"no repeats of folders in 'train': pass '{kohya}' for these" in said


def test_by_the_library_and_the_program(kohya, tmp_path):
    """What a folder says is what prompts and weights given by hand say."""
    pipeline = pipelines.made(pipelines.stable_diffusion, tmp_path)
    for path in kohya.rglob("*.txt"):
        path.rename(path.with_suffix(".tags"))
    read = Attributor.from_pipeline(pipeline, kohya, caption_extension="tags").regression
    prompts = dict(epoch(kohya, ".tags"))
    weights = [5 / 8 if name.startswith("10") else 5 / 4 for name in prompts]
    given, files = {"prompts": list(prompts.values())}, [kohya / name for name in prompts]
    by_hand = Attributor.from_pipeline(pipeline, files, example_weights=weights, **given).regression
    network = load_network(options_of("fit", pipeline=tmp_path / "pipeline", quiet=True))
    by_program = Attributor.of_network(network, kohya, caption_extension="tags").regression
    for own in (read, by_program):
        assert own.description["example_weights"] == by_hand.description["example_weights"]
        assert own.data_identity() == by_hand.data_identity()
    alike = Attributor.from_pipeline(pipeline, files, **given).regression
    assert alike.description != by_hand.description
