"""Arguments of training in the program: parsed, printed, logged, stored and compared."""

import json
from types import SimpleNamespace

import pytest

from curvlinops_diffusion.cli.options import FitOptions
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.cli.training_arguments import arguments_text, parse_arguments
from curvlinops_diffusion.diffusion.training_arguments import training_arguments
from curvlinops_diffusion.diffusion.weightings import PreconditionedWeighting
from curvlinops_diffusion.linalg.operator_files import read_header
from tests.diffusion.test_pipelines import flux, made
from tests.loading.cases import images_with_prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def test_values():
    texts = ["max_sequence_length=77", "guidance_scale=3.5", "system_prompt=a = b", "x=null"]
    values = {"max_sequence_length": 77, "guidance_scale": 3.5, "system_prompt": "a = b", "x": None}
    assert parse_arguments([*texts, "text-encoder-out-layers=[1, 2]"]) == values | {
        "text_encoder_out_layers": [1, 2]
    }
    assert parse_arguments(None) == {}
    assert arguments_text({"a": 1, "b": None}) == "Training gave the network a=1 b=null"
    for wrong in (["guidance_scale"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match="Pass each as name=value, once"):
            parse_arguments(wrong)


@pytest.mark.parametrize("guided", [False, True])
def test_a_call_without_numbers(guided):
    """Its arguments are taken and left to the pipeline; guidance that is embedded is needed."""

    class Unknown:
        transformer = SimpleNamespace(config={"guidance_embeds": guided})

        def __call__(self, prompt=None, max_sequence_length=None, guidance_scale=None):
            raise AssertionError

    length = {"max_sequence_length": 9}
    if guided:
        with pytest.raises(ValueError, match=r"--training-arguments guidance_scale=…, or"):
            training_arguments(Unknown(), length)
        length["guidance_scale"] = 3.5
    else:
        assert training_arguments(Unknown()) == {}
    assert training_arguments(Unknown(), length) == length


def test_the_weights_of_stable_diffusion_3(tmp_path):
    options = FitOptions(data=tmp_path, output=tmp_path, weighting="preconditioned")
    assert isinstance(options.objective_options()["weighting"], PreconditionedWeighting)


def test_fit_and_score(tmp_path, capsys):
    """``score`` refuses other arguments than those of the operator."""
    made(flux, tmp_path)
    images_with_prompts(tmp_path / "train")
    common = ["--pipeline", tmp_path / "pipeline", "--data", tmp_path / "train", "--quiet"]
    common += ["--num-draws", 2]
    output, log = tmp_path / "k.safetensors", tmp_path / "log"
    fit = ["fit", *common, "--output", output, "--params", "*norm_out*", "--curvature", "kfac"]
    given = ["--training-arguments", "max_sequence_length=16", "guidance_scale=2.0"]
    assert run([str(word) for word in [*fit, *given, "--log", log]]) == 0
    line = "Training gave the network max_sequence_length=16 guidance_scale=2.0"
    assert line in capsys.readouterr().err
    arguments = {"max_sequence_length": 16, "guidance_scale": 2.0}
    assert read_header(output)["info"]["regression"]["training_arguments"] == arguments
    events = [json.loads(text) for text in log.read_text().splitlines()]
    (found,) = (e for e in events if e["event"] == "training arguments")
    assert found.items() >= arguments.items()

    score = ["score", *common, "--operator", output, "--queries", tmp_path / "train"]
    score += ["--query-draws", 2, "--output", tmp_path / "s.safetensors"]
    assert run([str(word) for word in score]) == 2
    refused = capsys.readouterr().err
    assert "max_sequence_length=512 guidance_scale=3.5" in refused
    assert "another objective" in refused
    assert "training_arguments" in refused
    assert run([str(word) for word in [*score, *given]]) == 0
