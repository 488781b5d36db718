"""The README's example runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    """For each noisy copy of a training image five different ones, the original first."""
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(example, README, "exec"), {})
    printed = capsys.readouterr().out
    rows = [re.findall(r"\d+", row) for row in re.findall(r"\[([\d, ]+)\]", printed)]
    assert len(rows) == 3
    for original, row in enumerate(rows):
        assert len({*row}) == len(row) == 5
        assert int(row[0]) == original
        assert all(0 <= int(image) < 50 for image in row)
    (shown,) = blocks("text")
    assert without_numbers(printed) == without_numbers(shown)


def test_the_picture_s_command_is_the_example_s():
    example = README.parent / "docs" / "examples" / "lora_styles.py"
    told = re.sub(r'"\s+"', "", example.read_text())
    *_, command = blocks("console")[0].splitlines()
    assert f'"{command.removeprefix("$ ")}"' in told


def without_numbers(text):
    """What is printed on every machine."""
    return re.sub(r"\d+", "#", "".join(text.split()))


def test_the_commands_exist():
    (commands,) = blocks("sh")
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", commands, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("name", re.findall(r"`(\w+)`", README.read_text()))
def test_names_exist(name):
    """Names in the README are those of the library, of curvlinops, of torch or its launcher."""
    import curvlinops
    from torch import nn

    import curvlinops_diffusion

    known = {"curvlinops", "diffusers", "save_pretrained", "torchrun", "result", "attribute"}
    known |= {"fit", "score", "report"}
    assert name in known or any(
        hasattr(library, name)
        for library in (
            curvlinops_diffusion,
            curvlinops_diffusion.baselines,
            curvlinops_diffusion.measurements,
            curvlinops_diffusion.validation,
            curvlinops,
            nn,
        )
    )


def test_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text())
    assert pictures
    assert all((README.parent / path).exists() for path in pictures)
