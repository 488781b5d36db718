"""Mutated files: the loaders say what is wrong, and execute nothing."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import curvlinops_diffusion
from curvlinops_diffusion import (
    Compression,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    GradientStore,
    PassOptions,
    StoredScores,
    load_operator,
)
from curvlinops_diffusion.influence.score_files import write_scores
from tests.cases import plain_regression, seeded

MUTATIONS = 300


@pytest.fixture(scope="module")
def regression():
    from torch import nn

    return plain_regression(seeded(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)), (3,))


def mutated(raw, generator):
    """Bytes changed, cut, doubled, or moved; more often in the header than elsewhere."""
    raw = bytearray(raw)
    for _ in range(generator.choice([1, 1, 2, 8])):
        kind = generator.randrange(5)
        limit = min(len(raw), 4000) if generator.random() < 0.7 else len(raw)
        at = generator.randrange(max(1, limit))
        if kind == 0:
            raw[at] = generator.randrange(256)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = raw[at : at + generator.randrange(1, 50)]
        elif kind == 3:
            del raw[at : at + generator.randrange(1, 50)]
        else:
            raw[at:at] = bytes(generator.randrange(256) for _ in range(8))
        if not raw:
            raw = bytearray(b"\0")
    return bytes(raw)


def operator_file(folder, regression):
    path = folder / "operator.safetensors"
    DiffusionEKFACLinearOperator(regression).save(path)
    return path, lambda: load_operator(path, regression.objective.model)


def checkpoint_file(folder, regression):
    passes = PassOptions(folder / "checkpoint")
    DiffusionEKFACLinearOperator(regression, passes=passes)
    path = folder / "checkpoint" / "kronecker_factors.0.safetensors"
    return path, lambda: DiffusionEKFACLinearOperator(regression, passes=passes)


def scores_file(folder, regression):
    path = folder / "scores.safetensors"
    header = {"train": ["a", "b"], "queries": ["c"], "identity": {"x": 1}}
    write_scores(path, {"scores": torch.tensor([[1.0, 2.0]])}, header)
    return path, lambda: StoredScores.open(path).whole()


def gradients_file(folder, regression):
    EK = DiffusionEKFACLinearOperator(regression)
    J = ExampleGradientLinearOperator(regression)
    GradientStore.create(folder / "store", J, EK, 1e-3, Compression("float32"))
    path = folder / "store" / "rows.0000000.safetensors"
    return path, lambda: GradientStore.open(folder / "store").scores(J, EK)


@pytest.mark.parametrize("kind", [operator_file, checkpoint_file, scores_file, gradients_file])
def test_mutated_files(tmp_path, regression, kind):
    """A ValueError, or a file that can still be read: nothing else may come out."""
    path, load = kind(tmp_path, regression)
    raw, generator = path.read_bytes(), random.Random(3)
    messages = []
    for _ in range(MUTATIONS // (3 if kind is checkpoint_file else 1)):
        path.write_bytes(mutated(raw, generator))
        try:
            load()
        except ValueError as error:
            messages.append(str(error))
    path.write_bytes(raw)
    load()
    assert len(messages) > MUTATIONS // 10
    assert all(len(message) > 20 for message in messages)


def test_nothing_is_unpickled(tmp_path, regression):
    """Files that are pickles under our names: refused, and what they would run does not run."""

    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    for kind in (operator_file, scores_file, gradients_file):
        (tmp_path / kind.__name__).mkdir()
        path, load = kind(tmp_path / kind.__name__, regression)
        torch.save(Harmful(), path)
        with pytest.raises(ValueError, match=r"file|scores"):
            load()
        with open(path, "wb") as file:
            np.save(file, np.array([Harmful()], dtype=object), allow_pickle=True)
        (tmp_path / "harm").unlink(missing_ok=True)  # writing the pickle does not run it
        with pytest.raises(ValueError, match=r"file|scores"):
            load()
        assert not (tmp_path / "harm").exists()


def test_the_package_has_no_unsafe_loading():
    """No call of what executes what it reads."""
    names = r"torch\.load|pickle\.load|yaml\.load|allow_pickle=True|(?<!\.)\b(eval|exec)\("
    unsafe = re.compile(names)
    sources = list(Path(curvlinops_diffusion.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    assert [path for path in sources if unsafe.search(path.read_text())] == []
