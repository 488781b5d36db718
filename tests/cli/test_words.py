"""How options are written: in files of many forms, and in many spellings on the command line."""

import json
from pathlib import Path

import pytest

from curvlinops_diffusion.cli import program
from curvlinops_diffusion.cli.options import commands, options_of
from curvlinops_diffusion.cli.program import run


def understood(*words):
    """The options that differ from their defaults."""
    given = [str(word) for word in words]
    needed = [f"--{name}=x.safetensors" for name in ("data", "output") if name not in str(given)]
    _, found = program.understood(["fit", *given, *needed])
    options_of("fit", **found)  # which checks numbers
    known = commands()["fit"].options
    return {
        name: value
        for name, value in found.items()
        if value != known[name].default and name not in ("data", "output")
    }


def of_file(folder, text, *words):
    path = folder / "options of ü.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return understood("--config", path, *words)


JSON = {"seed": 3, "lora": ["a"], "quiet": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora: lora", {"lora": ["lora"]}),
        ("lora:\n- a\n- s=b/c.safetensors\n- 42", {"lora": ["a", "s=b/c.safetensors", "42"]}),
        ("prompt: 42", {"prompt": "42"}),
        ("prompt: yes", {"prompt": "yes"}),
        ("prompt: 'null'", {"prompt": "null"}),
        ("prompt: ''", {"prompt": ""}),
        ("prompt: null", {}),
        ("prompt: |-\n  two\n  lines", {"prompt": "two\nlines"}),
        ("seed: 010", {"seed": 10}),
        ("noise_offset: 1e-8", {"noise_offset": 1e-8}),
        ("quiet: yes\noverwrite: 'on'\nsharded: no", {"quiet": True, "overwrite": True}),
        ("dry_run: TRUE\ndebug: 1", {"dry_run": True, "debug": True}),
        ("lora: null\nmax_memory:\noverwrite:\nseed: ~", {}),
        ("", {}),
        ("\ufeffseed: 1\r\nquiet: true\r\n", {"seed": 1, "quiet": True}),
        ("seed: 1".encode("utf-16"), {"seed": 1}),
        ('{\n\t"seed": 3, "lora": "a", "quiet": true, "prompt": null}', JSON),
        ("log: C:\\Users\\x", {"log": Path("C:\\Users\\x")}),
        ("log: ~/a b/ü.log", {"log": Path.home() / "a b" / "ü.log"}),
        (
            "log: $PLACE/log\nlora: s=${PLACE}/l/",
            {"log": Path("/here/log"), "lora": ["s=/here/l/"]},
        ),
        ("params: ['-x', b, --seed]", {"params": ["-x", "b", "--seed"]}),
        ("seed: &b 3\nnum_draws: *b", {"seed": 3, "num_draws": 3}),
    ],
)
def test_a_file_of_options(tmp_path, monkeypatch, text, expected):
    """What is written is what a flag with the same letters would give."""
    monkeypatch.setenv("PLACE", "/here")
    assert of_file(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: &b 3", "has an option 'base', which is unknown. --help"),
        ("num_draw: 3", "has an option 'num_draw', which is unknown. Did you mean 'num_draws'?"),
        ("fit:\n  seed: 3", "'fit' in "),
        ("lora: [[a]]", "'lora' in "),
        ("lora: [a, null]", "has an empty entry. Leave it out"),
        ("num-draws: 1\nnum_draws: 2", "has the option 'num_draws' twice"),
        ("seed: [1, 2]", "'seed' in "),
        ("\tseed: 1", "indented by spaces, not by tabs"),
        ("params: *attn*", "patterns that begin with * stand in quotes"),
        ('data: "C:\\Users\\x"', "paths with backslashes stand in single quotes"),
        ("a: [1\nb: :", "cannot be parsed: line 2, "),
        ("- a", "holds no options. A file of options has a line"),
        ("prompt: é".encode("latin-1"), "is not text in UTF-8 (byte 8)"),
        ("config: other.yaml", "Files of options do not name others"),
        ("quiet: maybe", "--quiet is 'maybe'. Pass true or false"),
        ("seed: 1.5", "--seed: Expected int. Got value: 1.5"),
        ("log: $NOWHERE/x", "the variable $NOWHERE is not set"),
        ("batch_size: most", "Expected int or expected one of ['auto']. Got value: most"),
    ],
)
def test_a_file_of_options_that_is_not_understood(tmp_path, capsys, text, told):
    path = tmp_path / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    log = tmp_path / "log"
    words = ["fit", f"--config={path}", "--data=d", "--output=o.safetensors", f"--log={log}"]
    assert run(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line
    assert [json.loads(entry)["event"] for entry in log.read_text().splitlines()][-1] == "error"


def test_flags_and_later_files_go_first(tmp_path):
    """Wherever the flags stand; lists are replaced, not added to."""
    (tmp_path / "a.yaml").write_text("seed: 1\nnum_draws: 2\nlora: [a, b]\nquiet: true")
    (tmp_path / "b.yaml").write_text("num_draws: 3\nlora: c")
    files = ["--config", tmp_path / "a.yaml", f"--config={tmp_path / 'b.yaml'}"]
    assert understood(*files) == {"seed": 1, "num_draws": 3, "lora": ["c"], "quiet": True}
    for words in (["--seed", 5, *files, "--no-quiet"], [*files, "--no-quiet", "--seed=5"]):
        assert understood(*words) == {"seed": 5, "num_draws": 3, "lora": ["c"]}
    assert understood(*files, "--lora", "d")["lora"] == ["d"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-dr=3"], {"num_draws": 3}),
        (["--quiet", "true", "--dry-run=yes", "--sharded=False"], {"quiet": True, "dry_run": True}),
        (["--seed", "-3"], {"seed": -3}),
        (["--seed", "3\r"], {"seed": 3}),
        (["--prompt", "-a"], {"prompt": "-a"}),
        (["--prompt", "null"], {"prompt": "null"}),
        (["--prompt="], {"prompt": ""}),
        (["--latent-cache=null", "--resolution", "null", "--max-positions", "null"], {}),
        (["--params=-x"], {"params": ["-x"]}),
        (["--lora", "s=~/x", "y"], {"lora": [f"s={Path.home() / 'x'}", "y"]}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
    ],
)
def test_spellings(words, expected):
    assert understood(*words) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora", "a", "--lora", "b"], "--lora is given twice. Pass all of its values after one"),
        (["\u2014data", "x"], "begins with a dash where two hyphens are meant: --data"),
        (
            ["--noise-offset", "-1e-3"],
            "--noise-offset must be a finite number of at least 0, got -0.001",
        ),
        (["--data", ""], "--data is empty"),
        (["--data", "a.png", "b.png"], "--data is given 'a.png' and 'b.png', and takes one value"),
        (["--config"], "--config needs the name of a YAML file"),
        (["--config", "/"], "--config: '/' cannot be read: Is a directory"),
        (["--params"], "--params"),
        (["--numdraws", "3"], "Did you mean --num-draws?"),
    ],
)
def test_spellings_that_are_not_understood(words, told):
    with pytest.raises(ValueError, match=r"\S") as error:
        understood(*words)
    assert told in str(error.value)


def test_paths_that_hold_dollars_and_equals_signs(tmp_path, monkeypatch):
    """What exists is what is meant, and variables are of letters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", "/here/r=4")
    (tmp_path / "$PLACE").mkdir()
    assert understood("--log", "$PLACE") == {"log": Path("$PLACE")}
    assert understood("--log", "$PLACE/x") == {"log": Path("/here/r=4/x")}
    for given, expected in (
        ("$PLACE/a", "/here/r=4/a"),
        ("s=$PLACE/a", "s=/here/r=4/a"),
        ("~/r=4/a", f"{Path.home()}/r=4/a"),
    ):
        assert understood("--lora", given) == {"lora": [expected]}
