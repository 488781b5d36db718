"""A plan's parts as folders: what is read of each is what was read of these images in the whole."""

import json

import numpy as np
import pytest
from PIL import Image

from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.loading.images import open_images
from curvlinops_diffusion.loading.labels import Condition
from curvlinops_diffusion.loading.preprocessing import Form
from curvlinops_diffusion.validation import RetrainingPlan

FORM = Form(3, None, None)


def write_images(folder, count):
    folder.mkdir(parents=True)
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


def kohya(folder):
    for name, count in (("3_cat", 3), ("1_dog", 4)):
        write_images(folder / name, count)
        for n in range(count - 1):  # one has the folder's name
            (folder / name / f"{n}.txt").write_text(f"a {name}, number {n}")


def table(folder):
    write_images(folder, 6)
    rows = [f"{n}.png,text of {n}" for n in range(6)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))


def nested(folder):
    for inner in ("a", "b"):
        write_images(folder / inner, 3)
        lines = [json.dumps({"file_name": f"{n}.png", "text": f"ü {inner}{n}"}) for n in range(3)]
        (folder / inner / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("make", [kohya, table, nested])
def test_what_is_read_of_a_part(tmp_path, make):
    make(tmp_path / "train")
    words = ["--data", tmp_path / "train", "--output", tmp_path / "plan", "--num-parts", 3]
    assert run(["validate", "plan", *map(str, words), "--folders"]) == 0
    whole = open_images(tmp_path / "train", FORM, Condition("prompt"))
    plan = RetrainingPlan.open(tmp_path / "plan")
    for part, left_out in zip(plan.parts, plan.left_out.tolist(), strict=True):
        own = open_images(tmp_path / "plan" / part, FORM, Condition("prompt"))
        kept = [n for n, out in enumerate(left_out) if not out]
        assert own.names == [whole.names[n] for n in kept]
        assert own.conditions["prompt"] == [whole.conditions["prompt"][n] for n in kept]
        assert own.source_digests() == [whole.source_digests()[n] for n in kept]
        if whole.example_weights is not None and own.example_weights is not None:
            weights = [whole.example_weights[n] for n in kept]
            mean = sum(weights) / len(weights)
            assert own.example_weights == pytest.approx([w / mean for w in weights])


def test_of_no_folder(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    words = ["--data", tmp_path / "x.npz", "--output", tmp_path / "plan", "--folders"]
    assert run(["validate", "plan", *map(str, words)]) == 2
    assert "--folders are written of folders of images alone" in capsys.readouterr().err
    assert not (tmp_path / "plan").exists()
