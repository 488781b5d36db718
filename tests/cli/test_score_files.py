"""Every kind of score file, by every reader: the same numbers, or an error that says what it is."""

import pytest
import torch

from curvlinops_diffusion import StoredScores
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.consumers import OwnScores
from curvlinops_diffusion.influence.read_scores import read_scores, whole
from curvlinops_diffusion.influence.score_files import HALVES, SCORES, SHARD, write_scores
from curvlinops_diffusion.influence.stored_scores import write_index

Q, N = 3, 5
NAMES = {"train": [f"{n}.png" for n in range(N)], "queries": [f"{q}.png" for q in range(Q)]}
IDENTITY = {"train": {}, "query": {"measurement": "loss"}, "operator": {}}
KINDS = (
    "whole",
    "whole, halves",
    "npy",
    "sharded",
    "sharded, halves",
    "library",
    "library, halves",
)


@pytest.fixture(scope="module")
def numbers():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(Q, N, generator=generator) for name in ("scores", *HALVES)}


@pytest.fixture(params=KINDS)
def file(request, numbers, tmp_path):
    """A file of each kind, as program and library write it; and whether it has halves."""
    kind, _, halves = request.param.partition(", ")
    path = tmp_path / ("s.npy" if kind == "npy" else "s.safetensors")
    first, second = (numbers[name] for name in HALVES)
    if kind in ("whole", "npy"):
        both = (first, second) if halves or kind == "npy" else None
        write_scores(path, numbers["scores"], NAMES, IDENTITY, both)
    else:
        named = NAMES if kind == "sharded" else {}
        write_index(
            path, {**named, "identity": IDENTITY, "shape": [Q, N]}, shards(path, numbers, halves)
        )
    return kind, bool(halves), path


def shards(path, numbers, halves):
    """Files of two processes, for each of two blocks of queries."""
    found = []
    for start, stop in ((0, 2), (2, Q)):
        for rank, columns in enumerate(([4, 0], [1, 3, 2])):
            name = f"{path.stem}.token.{start}to{stop}.{rank}of2.safetensors"
            tensors = {
                key: z[start:stop, columns]
                for key, z in numbers.items()
                if halves or key == "scores"
            }
            tensors[OwnScores.INDEX] = torch.tensor(columns)
            SHARD.write(path.with_name(name), tensors, {"examples": len(columns)})
            found.append({"file": name, "queries": [start, stop], "examples": len(columns)})
    return found


def test_by_the_library(file, numbers):
    _, halves, path = file
    stored = StoredScores.open(path)
    assert stored.shape == (Q, N)
    assert torch.equal(stored.whole(), numbers["scores"])
    assert torch.equal(torch.stack(list(stored)), numbers["scores"])
    assert torch.equal(stored.rows(range(1, 3)), numbers["scores"][1:])
    assert torch.equal(stored.top(2).positive.scores, numbers["scores"].topk(2).values)
    if halves:
        for name, own in zip(("first", "second"), HALVES, strict=True):
            assert torch.equal(stored.named(name).whole(), numbers[own])
        return
    with pytest.raises(ValueError, match="has no scores of halves of the draws"):
        stored.named("first")
    with pytest.raises(ValueError, match="pass 'first' or 'second'"):
        stored.named("third")


def test_by_the_program(file, numbers, capsys):
    kind, _, path = file
    if kind == "library":
        with pytest.raises(ValueError, match="has no names of images: it was written by StoredSc"):
            read_scores(path)
        assert run(["inspect", str(path)]) == 2
        assert "damaged" not in capsys.readouterr().err
        return
    scores, header = read_scores(path)
    assert torch.equal(whole(scores), numbers["scores"])
    assert {key: header[key] for key in NAMES} == NAMES
    if kind == "npy":
        return
    assert run(["inspect", str(path)]) == 0
    assert "influence scores of 5 training images on 3 queries" in capsys.readouterr().out


def test_files_of_other_scores(numbers, tmp_path):
    """Names and numbers that do not fit; an array that was replaced."""
    path = tmp_path / "s.safetensors"
    header = {**NAMES, "queries": NAMES["queries"][:2], "identity": IDENTITY}
    SCORES.write(path, {"scores": numbers["scores"]}, header)
    array = tmp_path / "s.npy"
    write_scores(array, numbers["scores"], NAMES, IDENTITY)
    write_scores(tmp_path / "t.npy", numbers["first_half"], NAMES, IDENTITY)
    (tmp_path / "t.npy").rename(array)
    for reader in (StoredScores.open, read_scores):
        with pytest.raises(ValueError, match="is damaged"):
            reader(path)
        with pytest.raises(ValueError, match="is not the index of"):
            reader(array)
