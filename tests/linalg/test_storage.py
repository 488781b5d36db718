"""Operators on disk: the same after as before, and never a wrong, foreign or half-written file."""

import json
import os
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from curvlinops_diffusion import (
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    load_operator,
)
from curvlinops_diffusion.linalg import storage as storage_module
from curvlinops_diffusion.linalg.operator_files import OPERATOR
from tests.cases import plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import to_dense


def make_model(dtype=torch.float64):
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)
    return seeded(*layers, dtype=dtype)


def regression_of(model, dtype=torch.float64, **options):
    return plain_regression(model, (1, 4, 4), seed=5, timesteps="uniform", dtype=dtype, **options)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def regression(model):
    return regression_of(model)


def singular_root(kind, regression):
    objective = regression.objective
    single = regression_of(objective.model, objective.working_dtype, count=1, num_draws=1)
    return kind(single, fisher_type="empirical").power(0.25)


F32, F64 = torch.float32, torch.float64
SAVED = {
    "kfac": DiffusionKFACLinearOperator,
    "kfac, joint": lambda r: DiffusionKFACLinearOperator(r, separate_weight_and_bias=False),
    "kfac, in part": lambda r: DiffusionKFACLinearOperator(r, ["layers.2.bias", "layers.0.weight"]),
    "ekfac": DiffusionEKFACLinearOperator,
    "inverse": lambda r: DiffusionEKFACLinearOperator(r).inverse(1e-3),
    "root": lambda r: DiffusionKFACLinearOperator(r).power(-0.5, 1e-3),
    "singular kfac": lambda r: singular_root(DiffusionKFACLinearOperator, r),
    "singular ekfac": lambda r: singular_root(DiffusionEKFACLinearOperator, r),
}


@pytest.mark.parametrize(("kind", "dtype"), [*zip(SAVED, 4 * [F64, F32], strict=True)])
def test_round_trip(kind, dtype, tmp_path):
    """To the last bit, with the type, the parameters' order, and all that can be asked of it."""
    model = make_model(dtype)
    operator = SAVED[kind](regression_of(model, dtype))
    path = str(tmp_path / "file")
    DiffusionKFACLinearOperator(regression_of(model, dtype)).save(path)  # is replaced
    operator.save(path)
    assert os.listdir(tmp_path) == ["file"]
    loaded = load_operator(path, model)
    assert type(loaded) is type(operator)
    assert loaded.param_names == operator.param_names
    assert loaded.dtype == operator.dtype == dtype
    assert torch.equal(to_dense(loaded), to_dense(operator))
    assert torch.equal(loaded.trace(), operator.trace())
    assert torch.equal(to_dense(loaded.inverse(0.1)), to_dense(operator.inverse(0.1)))
    assert json.loads(json.dumps(operator.info)) == loaded.info
    if kind == "ekfac":  # weight and bias share an eigenbasis, which is stored once
        assert sum(name.endswith("output_basis") for name in load_file(path)) == 2
    if kind.startswith(
        "singular"
    ):  # its zeros are small numbers, which a file must not make regular
        for singular in (operator, loaded):
            assert singular.logdet() == -torch.inf
            with pytest.raises(ValueError, match="zero eigenvalues"):
                singular.inverse(0.0)


def test_the_header_says_how_the_operator_was_made(model, regression, tmp_path):
    DiffusionEKFACLinearOperator(regression, fisher_type="empirical").save(tmp_path / "file")
    info = load_operator(tmp_path / "file", model).info
    assert info["options"]["fisher_type"] == "empirical"
    assert info["regression"]["seed"] == 5
    assert info["regression"]["num_draws"] == 3
    assert info["regression"]["timesteps"] == "UniformTimesteps()"
    assert info["versions"].keys() >= {"torch", "curvlinops-for-pytorch", "diffusers"}


# ---------------------------------------------------------------------------------------------
# Other models
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def path(regression, tmp_path):
    DiffusionKFACLinearOperator(regression).save(tmp_path / "file")
    return tmp_path / "file"


def changed_weight():
    model = make_model()
    model.layers[2].weight.data[0, 0, 0, 0] += 1e-12
    return model


def with_buffer():
    model = make_model()
    model.register_buffer("extra", torch.zeros(3))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seeded(nn.Conv2d(1, 2, 3), nn.Tanh()), "no parameter 'layers.2.weight'"),
        (
            lambda: seeded(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3)),
            r"'layers.0.weight' has shape \[2, 1, 3, 3\] there and \[3, 1, 3, 3\] here",
        ),
        (with_buffer, "another model: names or shapes of its other parameters and buffers differ"),
        (changed_weight, r"other weights of this model.*Load the weights"),
        (lambda: make_model(torch.float32), r"other weights.*or in another precision"),
    ],
    ids=["names", "shapes", "buffers", "weights", "precision"],
)
def test_loading_with_another_model(path, make, message):
    with pytest.raises(ValueError, match=message):
        load_operator(path, make())


# ---------------------------------------------------------------------------------------------
# Damaged and foreign files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.999])
def test_truncated(model, path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*truncated, damaged, or"):
        load_operator(path, model)


def foreign(path):
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})


def pickled(path):
    torch.save({"weight": torch.zeros(2)}, path)


def rewritten(change, kind=OPERATOR):
    """The file with a changed header."""

    def write(path):
        header, tensors = OPERATOR.read(path)
        kind.write(path, tensors, change(header))

    return write


def with_header(**changes):
    """The file with a header of other entries; those of ``None`` are lacking."""
    return rewritten(
        lambda h: {key: value for key, value in (h | changes).items() if value is not None}
    )


def other_tensors(header):
    header["blocks"][0]["tensors"]["output_factor"] = "nowhere"
    return header


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign, "is a safetensors file, but not of an operator"),
        (pickled, "not a whole safetensors file"),
        (rewritten(lambda h: [1]), r"header of .* is damaged \("),
        (rewritten(lambda h: h, replace(OPERATOR, version=99)), "has the format version 99, and"),
        (with_header(blocks=None), r"header of .* is damaged \(entries are missing\)"),
        (with_header(kind="hessian"), "unknown kind 'hessian'"),
        (rewritten(other_tensors), r"header of .* is damaged"),
        (with_header(shards=3), r"header of .* is damaged"),
        (with_header(shards=[]), r"header of .* is damaged"),
        (with_header(shards=["elsewhere"]), "There is no file '.*elsewhere'"),
    ],
    ids=[
        *("foreign", "pickle", "list", "newer", "lacking", "kind", "tensors"),
        *("shards no list", "no shards", "shard missing"),
    ],
)
def test_damaged(model, path, damage, message):
    damage(path)
    with pytest.raises(ValueError, match=message):
        load_operator(path, model)


def test_missing_files_and_folders(model, regression, tmp_path):
    operator = DiffusionKFACLinearOperator(regression)
    with pytest.raises(ValueError, match="There is no file"):
        load_operator(tmp_path / "nothing", model)
    with pytest.raises(ValueError, match=r"folder '.*nowhere' does not exist. Create it first"):
        operator.save(tmp_path / "nowhere" / "file")
    with pytest.raises(ValueError, match=r"is a folder. Pass the name of a file"):
        operator.save(tmp_path)


def test_a_failure_midway_keeps_the_older_file(model, regression, path, monkeypatch):
    """Whether the disk is full or the process is interrupted; and no litter stays behind."""
    before = path.read_bytes()
    operator = DiffusionEKFACLinearOperator(regression)

    def failing(error):
        def save(tensors, name, metadata):
            with open(name, "wb") as file:
                file.write(b"half")
            raise error

        return save

    monkeypatch.setattr("safetensors.torch.save_file", failing(OSError("No space left on device")))
    with pytest.raises(ValueError, match=r"could not be written: No space left.*is unchanged"):
        operator.save(path)
    monkeypatch.setattr("safetensors.torch.save_file", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        operator.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["file"]


def test_files_have_the_usual_permissions(regression, tmp_path):
    DiffusionKFACLinearOperator(regression).save(tmp_path / "file")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_wrapped_models(tmp_path):
    """Names are the model's own, and files open with both."""
    model, path = make_model(), tmp_path / "operator.safetensors"
    expected = DiffusionKFACLinearOperator(regression_of(model))
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        found = DiffusionKFACLinearOperator(regression_of(wrapped))
        assert found.param_names == expected.param_names
        found.save(path)
        for opened in (load_operator(path, model), load_operator(path, wrapped)):
            assert_close(to_dense(opened), to_dense(expected), 1e-14)


def test_a_flipped_bit_is_noticed(model, regression, tmp_path):
    """Of the numbers; of the header other checks notice it."""
    path = tmp_path / "operator.safetensors"
    operator = DiffusionEKFACLinearOperator(regression)
    operator.save(path)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    place = 8 + length + 77
    raw[place] ^= 0x10
    path.write_bytes(raw)
    for read in (lambda: load_operator(path, model), lambda: storage_module.read_blocks(path)):
        with pytest.raises(ValueError, match="its numbers are not those that were written"):
            read()
