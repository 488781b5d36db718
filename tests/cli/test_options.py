"""Every default stands once, in the library; what an earlier command was given is taken."""

import inspect
import json
from functools import partial
from importlib import import_module

import pytest

from curvlinops_diffusion.cli.decided import as_yaml, completed
from curvlinops_diffusion.cli.options import commands, flag, options_of
from curvlinops_diffusion.cli.program import parser, run, understood
from curvlinops_diffusion.cli.signatures import REQUIRED
from curvlinops_diffusion.influence.score_files import SCORES
from curvlinops_diffusion.linalg.operator_files import OPERATOR
from tests.cli.cases import write_images

# functions of the program itself, of which the library has nothing
OF_PROGRAM = {"cli.running:process_group", "cli.validate:measured"}


def test_defaults_are_the_library_s():
    """As Python reads the signature; options of the program alone have none."""
    for command in commands().values():
        for name, option in command.options.items():
            assert option.help[0].isupper(), option.help
            assert "`" not in option.help
            if option.source is None:
                assert option.default in (None, REQUIRED) or option.default is False, name
                continue
            where, parameter = option.source
            assert where in OF_PROGRAM or not where.startswith("cli.")
            module, _, path = where.partition(":")
            found = import_module(f"curvlinops_diffusion.{module}")
            for part in path.split("."):
                found = getattr(found, part)
            default = inspect.signature(found).parameters[parameter].default
            default = getattr(default, "value", default)
            assert (option.default, type(option.default)) == (default, type(default)), name


def test_help_names_every_option(capsys):
    for name, command in commands().items():
        with pytest.raises(SystemExit):
            parser().parse_args([name, "--help"])
        told = capsys.readouterr().out
        assert all(flag(key) in told for key in command.options if key != "file"), name


@pytest.fixture
def there(tmp_path):
    """Files that tell of a run, without networks."""
    for name in ("train", "samples", "moved"):
        write_images(tmp_path / name, 2, seed=0)
    run = {"pipeline": str(tmp_path / "base"), "data": str(tmp_path / "train"), "seed": 5}
    run |= {"noise_offset": 0.1, "num_draws": 8, "resolution": 64, "device": "cpu"}
    run |= {"lora": [f"a={tmp_path / 'a.safetensors'}", str(tmp_path / "a.safetensors")]}
    for name in ("base", "a.safetensors"):
        (tmp_path / name).mkdir()
    header = {"kind": "ekfac", "parameters": [], "dtype": "", "blocks": [], "format_version": 4}
    OPERATOR.write(tmp_path / "e.safetensors", {}, header | {"info": {"run": run}})
    OPERATOR.write(tmp_path / "old.safetensors", {}, header | {"info": {}})
    scored = run | {"queries": str(tmp_path / "samples"), "measurement": "elbo"}
    scored |= {"operator": str(tmp_path / "gone.safetensors")}
    SCORES.write(tmp_path / "s.safetensors", {}, {"run": scored})
    return tmp_path


def score(there, **given):
    paths = {"operator": there / "e.safetensors", "output": there / "new.safetensors"}
    return completed("score", {**paths, "queries": there / "samples", **given})


def test_what_is_taken_from_an_operator(there, capsys):
    options = score(there)
    told = capsys.readouterr().err
    assert (options.pipeline, options.data) == (there / "base", there / "train")
    assert (options.noise_offset, options.resolution, options.seed) == (0.1, 64, 5)
    assert options.lora[0] == f"a={there / 'a.safetensors'}"
    assert options.num_draws == options_of("score").num_draws
    assert options.device is None
    anew = score(
        there, data=there / "moved", seed=6, model=there / "base", scheduler=there / "base"
    )
    assert (anew.data, anew.seed, anew.pipeline) == (there / "moved", 6, None)
    assert told.count("\n") == 1
    assert told.startswith(f"As '{there / 'e.safetensors'}' was made: --pipeline {there / 'base'} ")
    assert "--noise-offset 0.1" in told
    assert "num-draws" not in told


def test_a_recipe_by_another_path_is_the_same(there, monkeypatch):
    header = {"kind": "ekfac", "parameters": [], "dtype": "", "blocks": [], "format_version": 4}
    run = {"pipeline": str(there / "base"), "data": str(there / "train")}
    run |= {"recipe": str(there / "a.safetensors")}
    OPERATOR.write(there / "e.safetensors", {}, header | {"info": {"run": run}})
    monkeypatch.chdir(there)
    assert score(there, recipe="a.safetensors").recipe == "a.safetensors"
    with pytest.raises(ValueError, match="--recipe none contradicts"):
        score(there, recipe="none")


def test_draws_of_other_networks_are_a_number():
    """They have no scores to be told apart."""
    with pytest.raises(ValueError, match=r"--query-draws"):
        understood(["validate-measure", "--query-draws", "auto"])
    assert options_of("validate-measure").query_draws == options_of("score").num_draws


@pytest.mark.parametrize(
    ("command", "given", "told"),
    [
        ("score", {"noise_offset": 0.2}, "--noise-offset 0.2 contradicts '.*', which .* with 0.1"),
        ("score", {"prompt": "a cat"}, "--prompt a cat contradicts .* made with none. Leave"),
        ("score", {"operator": "old.safetensors"}, "--data is missing, and .*old.safetensors' do"),
        ("score", {"operator": "no.safetensors"}, "does not exist. Make it by .*diffusion fit"),
        ("report", {"scores": "e.safetensors"}, "of kind 'curvlinops_diffusion.operator'"),
        ("validate-plan", {}, "--data is missing, and there is no --scores. Pass --data FOLDER"),
        ("validate-measure", {}, "--queries is missing, and there is no --scores. Pass"),
    ],
)
def test_what_contradicts_or_is_missing_is_named(there, command, given, told):
    given = {k: there / v if "safetensors" in str(v) else v for k, v in given.items()}
    make = partial(score, there) if command == "score" else partial(completed, command)
    with pytest.raises(ValueError, match=told):
        make(**given) if command == "score" else make(given)


@pytest.mark.parametrize(
    ("name", "option"), [("base", "pipeline"), ("a.safetensors", "lora"), ("train", "data")]
)
def test_what_has_moved_is_asked_for(there, name, option):
    (there / name).rename(there / "elsewhere")
    told = (
        f"{name}' \\(--{option}\\), which '.*e.safetensors' was made with, is no more there. Pass"
    )
    with pytest.raises(ValueError, match=f"{told} --{option} "):
        score(there)
    given = there / "elsewhere"
    found = score(there, **{option: [str(given)] if option == "lora" else given})
    assert str(given) in str(getattr(found, option))


def test_what_is_taken_from_scores(there):
    report = completed("report", {"scores": there / "s.safetensors", "output": there / "o.html"})
    assert (report.data, report.queries) == (there / "train", there / "samples")
    assert report.operator is None  # it is no more there, and only adds to the page
    measure = completed("validate-measure", {"scores": there / "s.safetensors"})
    assert (measure.queries, measure.measurement) == (there / "samples", "elbo")
    assert (measure.pipeline, measure.noise_offset) == (there / "base", 0.1)
    assert measure.lora is None
    assert measure.seed == options_of("validate-measure").seed != 5


def test_a_run_as_a_file_of_options(there):
    """Is read as what it was written from, whatever characters it has."""
    given = {"data": there / "train", "queries": there / "samples", "pipeline": there / "base"}
    given |= {"params": ["*attn*", "-x"], "prompt": "null: 'é' #1", "method": ["regression"]}
    given |= {"relative": True, "rtol": 1e-7, "lora": [f"s={there / 'a.safetensors'}"]}
    options = options_of("attribute", **given, output=there / "result")
    (there / "run.yaml").write_text(as_yaml(options))
    words = ["attribute", "--config", str(there / "run.yaml"), "--output", str(there / "result")]
    name, found = understood(words)
    assert vars(options_of(name, **found)) == vars(options)


def test_what_was_taken_is_logged(there, capsys):
    """And refused before PyTorch is loaded where the network is none."""
    words = ["score", "--operator", there / "e.safetensors", "--queries", there / "samples"]
    words += ["--output", there / "n.safetensors", "--log", there / "log"]
    assert run([str(word) for word in words]) == 2
    assert "holds no model_index.json" in capsys.readouterr().err
    events = [json.loads(line) for line in (there / "log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "taken", "error"]
    assert events[1]["options"]["resolution"] == 64
