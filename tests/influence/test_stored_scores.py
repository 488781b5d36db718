"""Scores in files of several processes: as one tensor's, written once, read a query at a time."""

import warnings

import pytest
import torch

from curvlinops_diffusion import (
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    PassOptions,
    StoredScores,
    influence_scores,
    split_half_scores,
    top_influences,
)
from curvlinops_diffusion.influence.score_files import SHARD
from tests.cases import small_unet, unet_regression
from tests.comparisons import assert_close
from tests.runtime.test_processes import processes

COUNT, BLOCK = 9, 4
LAYERS = ["conv_in.weight", "conv_out.weight"]


def operators():
    """Nine queries and training examples, which come in batches of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train = unet_regression(small_unet(), count=COUNT, num_draws=4, antithetic=True)
        inverse = DiffusionKFACLinearOperator(train, LAYERS).inverse(1e-3)
    J_train = ExampleGradientLinearOperator(train, LAYERS)
    return J_train.on(train.with_seed(1)), inverse, J_train


@pytest.fixture(scope="module")
def problem():
    return operators()


@pytest.fixture(scope="module")
def expected(problem):
    return split_half_scores(*problem)


def create(path, problem, **options):
    return StoredScores.create(path, *problem, query_block=BLOCK, **options)


def same(stored, expected):
    assert stored.shape == expected.scores.shape
    for name, scores_QN in (("first", expected.first), ("second", expected.second)):
        assert_close(stored.named(name).whole(), scores_QN, 1e-10)
    assert_close(stored.whole(), expected.scores, 1e-10)


def test_as_a_tensor(tmp_path, problem, expected):
    path = tmp_path / "scores.safetensors"
    for stored in (create(path, problem, halves=True), StoredScores.open(path)):
        same(stored, expected)
        assert len(stored) == COUNT
        assert_close(stored[5], expected.scores[5], 1e-10)
        assert torch.equal(stored[-1], stored[COUNT - 1])
        assert torch.equal(stored.rows(range(3, 6)), torch.stack(list(stored)[3:6]))
        with pytest.raises(IndexError, match="9 arrived"):
            stored[COUNT]
        found, top = stored.top(2), top_influences(*problem, k=2)
        for order in ("positive", "negative", "neutral"):
            assert torch.equal(getattr(found, order).indices, getattr(top, order).indices)


def test_without_halves(tmp_path, problem):
    stored = create(tmp_path / "scores.safetensors", problem)
    assert_close(stored.whole(), influence_scores(*problem), 1e-10)


def made(rank, path, fail_at=None, checkpoint=None):
    """Each process' own; how many batches of gradients it has computed."""
    problem = operators()
    rows_of = type(problem[2]).rows_of
    calls = []

    def counted(J, clean):
        calls.append(len(clean.indices))
        if len(calls) == fail_at:
            raise ValueError("stopped here")
        return rows_of(J, clean)

    type(problem[2]).rows_of = counted
    try:
        options = PassOptions(checkpoint, checkpoint_every=0, distributed=True)
        create(path, problem, halves=True, passes=options)
    finally:
        type(problem[2]).rows_of = rows_of
    return sum(calls)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_processes(tmp_path, expected, count):
    path = tmp_path / "scores.safetensors"
    seen = processes(count, tmp_path / "run", made, path)
    stored = StoredScores.open(path)
    same(stored, expected)
    blocks = -(-COUNT // BLOCK)
    assert sum(seen) == 2 * blocks * COUNT + 2 * COUNT  # of training examples and queries, halves
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + blocks * count
    held = [entry["examples"] for entry in stored.header["shards"]]
    assert max(held) - min(held) <= 1  # nine examples in five batches


@pytest.mark.parametrize(("first", "second"), [(2, 2), (3, 2), (2, 3), (1, 2), (2, 1)])
def test_stopped_and_gone_on_with_others(tmp_path, expected, first, second):
    path, checkpoint = tmp_path / "scores.safetensors", tmp_path / "checkpoint"
    # in the second block of queries, after some of its training examples
    fail_at = 2 * -(-BLOCK // 2) // first + 2 * -(-5 // first) + 5
    assert any(
        "stopped" in str(said)
        for said in processes(first, tmp_path / "first", made, path, fail_at, checkpoint)
    )
    assert not path.exists()
    kept = {file.name for file in tmp_path.glob("scores.*.safetensors")}
    assert len(kept) == first  # the first block is whole
    seen = processes(second, tmp_path / "second", made, path, None, checkpoint)
    assert sum(seen) < 2 * 2 * COUNT + 2 * COUNT
    same(StoredScores.open(path), expected)
    stored = StoredScores.open(path)
    named = {entry["file"] for entry in stored.header["shards"]}
    assert kept < named == {file.name for file in tmp_path.glob("scores.?*.safetensors")}
    assert not list(checkpoint.glob("*"))


def test_an_older_one_is_replaced_with_its_files(tmp_path, problem):
    path = tmp_path / "scores.safetensors"
    create(path, problem)
    before = set(tmp_path.glob("scores.*.safetensors"))
    J_query, inverse, J_train = problem
    create(path, (J_query.on(J_query.regression.with_seed(2)), inverse, J_train))
    after = set(tmp_path.glob("scores.*.safetensors"))
    assert len(after) == len(before) == 3
    assert not after & before
    StoredScores.open(path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "of others"])
def test_damaged(tmp_path, problem, damage):
    path = tmp_path / "scores.safetensors"
    create(path, problem)
    shard = sorted(tmp_path.glob("scores.*.safetensors"))[1]
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(content[:-8])
    elif damage == "changed":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        header, tensors = SHARD.read(shard)
        tensors["index"][0] = tensors["index"][1]
        SHARD.write(shard, tensors, header)
    expected = {
        "missing": "There is no file",
        "truncated": "not a whole safetensors file",
        "changed": "its numbers are not those that were written",
        "of others": "files of other examples than 9",
    }
    with pytest.raises(ValueError, match=expected[damage]):
        StoredScores.open(path)


def apart(rank, folder):
    (folder / str(rank)).mkdir()
    return made(rank, folder / str(rank) / "scores.safetensors")


def test_processes_that_see_other_folders(tmp_path):
    told = processes(2, tmp_path / "run", apart, tmp_path)
    assert "which another process has written. Pass a folder that all processes see." in told[0]
    assert "which another process has written. Pass a folder that all processes see." in told[1]
