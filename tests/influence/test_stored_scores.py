"""Scores in files: every kind by every reader, of several processes, read a query at a time."""

import warnings

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from curvlinops_diffusion import (
    Attribution,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    PassOptions,
    StoredScores,
    split_half_scores,
    top_influences,
)
from curvlinops_diffusion.cli.program import run
from curvlinops_diffusion.influence.agreement import Agreement
from curvlinops_diffusion.influence.score_files import HALVED, INDEX, SCORES, write_scores
from tests.cases import small_unet, unet_regression
from tests.comparisons import assert_close
from tests.runtime.test_processes import processes

Q, N = 3, 5
HEADER = {
    "train": [f"{n}.png" for n in range(N)],
    "queries": [f"{q}.png" for q in range(Q)],
    "identity": {"train": {}, "query": {"measurement": "loss"}, "operator": {}},
}
SHARDED = {
    queries: [(f"s.token.{queries.start}.{rank}of2.safetensors", own) for rank, own in enumerate(n)]
    for queries, n in ((range(2), ([4, 0], [1, 3, 2])), (range(2, Q), ([0, 1, 2, 3, 4], [])))
}
METHODS = {"influence": "scores", "regression": "regression"}
NAMES = {
    "scores": HALVED[:1],
    "methods": (*HALVED, "regression", "regression/first", "regression/second"),
}


@pytest.fixture(scope="module")
def numbers():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(Q, N, generator=generator) for name in NAMES["methods"]}


@pytest.fixture(params=[("whole", "scores"), ("whole", "methods"), ("sharded", "methods")])
def file(request, numbers, tmp_path):
    """A file of each kind, and what it holds."""
    kind, names = request.param
    path, held = tmp_path / "s.safetensors", {name: numbers[name] for name in NAMES[names]}
    header = HEADER | {"methods": [m for m, name in METHODS.items() if name in held]}
    if kind == "whole":
        write_scores(path, held, header)
        assert load_file(path).keys() == {*held, INDEX}
        return path, held
    entries = []
    for queries, shards in SHARDED.items():
        for name, columns in shards:
            entry = {"file": name, "queries": [queries.start, queries.stop]}
            entries.append(entry | {"examples": len(columns)})
            tensors = {key: z[queries.start : queries.stop, columns] for key, z in held.items()}
            tensors = tensors | {INDEX: torch.tensor(columns)} if columns else {}
            SCORES.write(tmp_path / name, tensors, entries[-1])
    write_scores(path, {}, header, entries)
    return path, held


class Images:
    """A gallery of grey images."""

    def __init__(self, kind):
        self.names = HEADER[kind]

    def caption(self, n):
        return f"caption {n}"

    def images(self, numbers):
        return ((n, torch.full((1, 2, 2), n / N)) for n in numbers)

    def digest(self, n):
        return None


def test_every_kind_by_every_reader(file, capsys):
    path, held = file
    stored = StoredScores.open(path)
    assert stored.shape == (Q, N)
    assert stored.names == sorted(held)
    assert {key: stored.header[key] for key in HEADER} == HEADER
    for name, expected in held.items():
        for own in (stored.named(name), StoredScores.open(path, check=False).named(name)):
            assert torch.equal(own.whole(), expected)
            assert torch.equal(torch.stack(list(own)), expected)
            assert torch.equal(own.rows(range(1, 3)), expected[1:])
            assert torch.equal(own[-1], expected[-1])
            assert torch.equal(own.top(2).positive.scores, expected.topk(2).values)
    assert torch.equal(stored.whole(), held["scores"])
    with pytest.raises(ValueError, match=r"must be one of .*'scores'.*, got 'third'"):
        stored.named("third")
    with pytest.raises(IndexError, match="Queries are 0 to 2, got 3"):
        stored[Q]
    stored.export(path.with_suffix(".csv"))
    stored.export(path.with_suffix(".parquet"))
    table = pd.read_parquet(path.with_suffix(".parquet"))
    known = table.dropna(axis=1)  # an empty column of CSV has no type
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")).dropna(axis=1), known)
    for method, best in table[(table["query"] == "1.png") & (table["rank"] == 1)][
        ["method", "image"]
    ].itertuples(index=False):
        assert best == f"{int(held[METHODS[method]][1].argmax())}.png"
    loaded = Attribution.load(path, Images("train"), Images("queries"))
    assert torch.equal(loaded.scores, held["scores"])
    assert [len(rows) for rows in loaded.top(2)] == [2] * Q
    assert len(loaded.to_pandas()) == len(table) == len(loaded.by_method) * Q * N
    for method, scores_QN in loaded.by_method.items():
        assert torch.equal(scores_QN.whole(), held[METHODS[method]])
    loaded.report(path.with_suffix(".html"))
    text = path.with_suffix(".html").read_text()
    assert all(f'queries{q}" src=' in text for q in range(Q))
    assert ("The second number" in text) == (len(loaded.by_method) == 2)
    assert run(["inspect", str(path)]) == 0
    methods = " and ".join(loaded.by_method)
    assert f"{methods}, of 5 training images on 3 queries" in capsys.readouterr().out


def test_other_files_are_refused(file, numbers, tmp_path, capsys):
    path, _ = file
    for shard in tmp_path.glob("s.token.*"):
        with pytest.raises(ValueError, match=r"is a shard of scores. Pass the file that names it"):
            StoredScores.open(shard)
        assert run(["inspect", str(shard)]) == 2
        assert "is a shard of scores" in capsys.readouterr().err
    for wrong in ({"queries": HEADER["queries"][:2]}, {"train": HEADER["train"][1:]}):
        write_scores(path, {"scores": numbers["scores"]}, HEADER | wrong)
        with pytest.raises(ValueError, match="is damaged"):
            StoredScores.open(path)
    assert not list(tmp_path.glob("s.token.*"))  # of the scores that were replaced
    SCORES.write(path, {}, [])
    with pytest.raises(ValueError, match="is damaged"):
        StoredScores.open(path)


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
    """All scores, and what the header says of them."""
    assert stored.shape == expected.scores.shape
    for name, scores_QN in vars(expected).items():
        assert_close(stored.named(name).whole(), scores_QN, 1e-10)
    found = torch.tensor(Agreement.of_header(stored.header).standard_error)
    assert_close(found.double(), expected.standard_error(), 1e-5)


def test_as_computed(tmp_path, problem, expected):
    path = tmp_path / "scores.safetensors"
    for stored in (create(path, problem, halves=True), StoredScores.open(path)):
        same(stored, expected)
        assert stored.header["train"] == [str(n) for n in range(COUNT)]
    found, top = stored.top(2), top_influences(*problem, k=2)
    for order in ("positive", "negative", "neutral"):
        assert torch.equal(getattr(found, order).indices, getattr(top, order).indices)


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


def test_several_processes(tmp_path, expected):
    path = tmp_path / "scores.safetensors"
    seen = processes(3, tmp_path / "run", made, path)
    stored = StoredScores.open(path)
    same(stored, expected)
    blocks = -(-COUNT // BLOCK)
    assert sum(seen) == 2 * blocks * COUNT + 2 * COUNT  # of training examples and queries, halves
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + blocks * 3
    held = [entry["examples"] for entry in stored.header["shards"]]
    assert max(held) - min(held) <= 1  # nine examples in five batches


@pytest.mark.parametrize(("first", "second"), [(3, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
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


def test_an_older_one_is_replaced_with_its_files(tmp_path, problem, expected):
    path = tmp_path / "scores.safetensors"
    stored = create(path, problem)
    assert_close(stored.whole(), expected.scores, 1e-10)
    assert stored.names == ["scores"]
    before = set(tmp_path.glob("scores.*.safetensors"))
    J_query, inverse, J_train = problem
    create(path, (J_query.on(J_query.regression.with_seed(2)), inverse, J_train))
    after = set(tmp_path.glob("scores.*.safetensors"))
    assert len(after) == len(before) == 3
    assert not after & before
    StoredScores.open(path)


def test_damaged(tmp_path, problem):
    path = tmp_path / "scores.safetensors"
    create(path, problem)
    shard = sorted(tmp_path.glob("scores.*.safetensors"))[1]
    content, (header, tensors) = shard.read_bytes(), SCORES.read(shard)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # of the bytes to come
    tensors[INDEX][0] = tensors[INDEX][1]
    for damage, message in (
        (lambda: shard.write_bytes(content[:-8]), "not a whole safetensors file"),
        (
            lambda: shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
            "its numbers are not those that were written",
        ),
        (lambda: SCORES.write(shard, tensors, header), "shards of other examples than 9"),
        (shard.unlink, "There is no file"),
    ):
        damage()
        with pytest.raises(ValueError, match=message):
            StoredScores.open(path)


def apart(rank, folder):
    (folder / str(rank)).mkdir()
    return made(rank, folder / str(rank) / "scores.safetensors")


def test_processes_that_see_other_folders(tmp_path):
    told = processes(2, tmp_path / "run", apart, tmp_path)
    assert all("which another process has written. Pass a folder that" in said for said in told)
