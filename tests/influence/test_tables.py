"""Tables of scores and groups, against rows made one by one."""

import csv
import math

import pandas as pd
import pytest
import torch

from curvlinops_diffusion import Attribution, StoredScores
from curvlinops_diffusion.influence import tables
from curvlinops_diffusion.influence.agreement import Agreement, SplitHalfScores
from curvlinops_diffusion.influence.score_files import INDEX, SCORES, write_scores
from curvlinops_diffusion.influence.tables import table_blocks, write_table

QUERIES = ["a.png", 'b, "quoted".png', "c\udcff.png"]
TRAIN = ["30_cat/0.png", "30_cat/1.png", "10_dog/0.png", "10_dog/中.png", "top.png"]
ARTISTS = ["Ann", None, "Bob", "Ann", ""]
VALUES = [0.5, -2.0, None]
METHODS = ("influence", "regression")


def header(measurement="loss"):
    identity = {"train": {}, "query": {"measurement": measurement}, "operator": {}}
    names = {"train": TRAIN, "queries": QUERIES, "methods": list(METHODS)}
    return {**names, "identity": identity, "values": VALUES}


@pytest.fixture(scope="module")
def numbers():
    """Scores and halves of each method; a score is zero, and two are alike."""
    generator = torch.Generator().manual_seed(0)
    found = {m: torch.randn(3, len(QUERIES), len(TRAIN), generator=generator) for m in METHODS}
    for z in found.values():
        z[0, 0, 0] = 0
        z[0, 1, 2] = z[0, 1, 3]
    return found


class Images:
    """A gallery with what a folder of images has."""

    def __init__(self, names, columns=None):
        self.names, self.columns = names, columns
        self.paths = [f"/data/{name}" for name in names]

    def caption(self, n):
        return f"caption\n{n}"

    def images(self, numbers):
        return ((n, torch.full((1, 2, 2), n / 9)) for n in numbers)

    def digest(self, n):
        return None


IMAGES = Images(TRAIN, {"artist": ARTISTS}), Images(QUERIES)


def in_memory(numbers, folder, measurement="loss"):
    halves = {method: SplitHalfScores(*z) for method, z in numbers.items()}
    scores = {method: z[0] for method, z in numbers.items()}
    return Attribution(scores, halves, header(measurement), *IMAGES)


def in_a_file(numbers, folder):
    in_memory(numbers, folder).save(folder / "s.safetensors")
    return Attribution.load(folder / "s.safetensors", *IMAGES)


def in_shards(numbers, folder):
    """Two blocks of queries, of which one has two files."""
    named = {"scores": 0, "first": 1, "second": 2}
    tensors = {name: numbers["influence"][k] for name, k in named.items()}
    beside = {"regression", *(f"regression/{half}" for half in ("first", "second"))}
    for name in beside:
        tensors[name] = numbers["regression"][named.get(name.partition("/")[2], 0)]
    entries = []
    for (start, stop), columns in (((0, 1), [4, 0, 2]), ((0, 1), [1, 3]), ((1, 3), range(5))):
        file = f"s.token.{len(entries)}.safetensors"
        entries.append({"file": file, "queries": [start, stop], "examples": len(columns)})
        own = {name: z[start:stop, list(columns)] for name, z in tensors.items()}
        SCORES.write(folder / file, own | {INDEX: torch.tensor(list(columns))}, entries[-1])
    write_scores(folder / "s.safetensors", {}, header(), entries)
    return Attribution.load(folder / "s.safetensors", *IMAGES)


def expected_rows(numbers, groups=None, measurement="loss"):
    """Row by row: the first method first, then queries in order, then the most helpful."""
    members = {}
    for n, group in enumerate(TRAIN if groups is None else groups):
        members.setdefault(group, []).append(n)
    words = {"loss": ("helps", "hinders"), "log_likelihood": ("hinders", "helps")}
    plus, minus = words.get(measurement, ("lowers it", "raises it"))
    for method in METHODS:
        for q, query in enumerate(QUERIES):
            rows = []
            for name, own in members.items():
                z, *halves = (sum(float(part[q, n]) for n in own) for part in numbers[method])
                share = None
                if VALUES[q] is not None and method != "regression":
                    share = z / abs(VALUES[q])
                same = all(math.copysign(z != 0, z) == math.copysign(h != 0, h) for h in halves)
                row = {"query": query.replace("\udcff", r"\udcff")}
                row |= {"image": name, "score": z, "group": name, "sum": z, "count": len(own)}
                row |= {"mean": z / len(own), "share": share, "agreement": same, "method": method}
                one, other = (half[q : q + 1] for half in numbers[method][1:])
                uncertain = 2 * math.sqrt(float(((one - other) ** 2).mean())) / 2
                noise = Agreement.of_halves(one, other)
                row |= {"told": "yes" if abs(z) > uncertain else "no"}
                row |= {"told": "noise"} if noise.is_noise(0) else {}
                row |= {"effect": plus if z > 0 else minus if z < 0 else ""}
                row |= {"caption": f"caption\n{own[0]}", "path": f"/data/{name}"}
                rows.append(row)
            sign = -1 if measurement == "log_likelihood" else 1
            rows.sort(key=lambda row: -sign * row["score"])
            for rank, row in enumerate(rows, 1):
                yield row | {"rank": rank}


def assert_same_rows(found, expected):
    found = list(found)
    assert len(found) == len(expected)
    for own, row in zip(found, expected, strict=True):
        for name, value in own.items():
            if isinstance(row[name], float):
                assert float(value) == pytest.approx(row[name], rel=1e-6, abs=1e-12), name
            elif row[name] is None:
                assert value is None or value == "" or math.isnan(value), name
            else:
                assert str(value) == str(row[name]), (name, row)


COLUMNS = ["query", "image", "score", "share", "rank", "effect", "agreement", "told", "method"]


@pytest.mark.parametrize(("make", "block"), [(in_memory, 1000), (in_a_file, 1000), (in_shards, 1)])
def test_rows_of_images(make, block, numbers, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", block)
    monkeypatch.setattr(tables, "_LINES", 2)
    result, expected = make(numbers, tmp_path), list(expected_rows(numbers))
    table = result.to_pandas()
    assert list(table) == [*COLUMNS, "caption", "path"]
    assert_same_rows(table.to_dict("records"), expected)
    result.save(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        assert_same_rows(csv.DictReader(file), expected)
    result.save(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    if make is not in_memory:
        StoredScores.open(tmp_path / "s.safetensors").export(tmp_path / "e.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "e.parquet"), table[COLUMNS])


GROUPS = {
    "folder": ["30_cat", "30_cat", "10_dog", "10_dog", "."],
    "artist": ["Ann", "(none)", "Bob", "Ann", "(none)"],
}


@pytest.mark.parametrize(("make", "by"), [(in_memory, "folder"), (in_shards, "artist")])
def test_rows_of_groups(make, by, numbers, tmp_path):
    result, expected = make(numbers, tmp_path), list(expected_rows(numbers, GROUPS[by]))
    found = result.groups(by)
    assert_same_rows(list(map(vars, found)), expected)
    assert found == result.groups(GROUPS[by])
    result.save(tmp_path / "g.csv", group_by=by)
    with (tmp_path / "g.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(vars(found[0]))
    assert_same_rows(rows, expected)
    result.report(tmp_path / "page.html", group_by=by)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h3>groups</h3>") == len(QUERIES)
    for section, query in zip(page.split('<section class="query"')[1:], range(3), strict=True):
        shown = [row for row in found if row.method == "influence"][query * 3 : query * 3 + 3]
        places = [section.index(f"<td>{row.group}</td><td>{row.count}</td>") for row in shown]
        assert places == sorted(places)
        assert section.count("<td>agree</td>") == sum(row.agreement for row in shown)


@pytest.mark.parametrize("measurement", ["log_likelihood", "squared_norm"])
def test_what_is_good_of_other_measurements(measurement, numbers, tmp_path):
    result = in_memory(numbers, tmp_path, measurement)
    expected = list(expected_rows(numbers, measurement=measurement))
    assert_same_rows(result.to_pandas().to_dict("records"), expected)


def test_many_groups_on_a_page(numbers, tmp_path):
    in_memory(numbers, tmp_path).report(tmp_path / "p.html", group_by=list("abcde"), top=1)
    assert (tmp_path / "p.html").read_text().count("3 others lie between") == len(QUERIES)


def test_without_halves_and_values(numbers, tmp_path):
    scores = {"influence": numbers["influence"][0]}
    plain = {**header(), "values": None, "methods": ["influence"]}
    result = Attribution(scores, {"influence": None}, plain, *IMAGES)
    result.save(tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table[["share", "agreement", "told"]].isna().all(axis=None)
    assert {row.agreement for row in result.groups("folder")} == {None}


def test_a_query_at_a_time(numbers, monkeypatch):
    """Scores are read when their rows are asked for, and no others are held."""
    monkeypatch.setattr(tables, "_ROWS", len(TRAIN))
    read = []

    class Stored:
        def rows(self, queries):
            read.extend(queries)
            return numbers["influence"][0][list(queries)]

        def __len__(self):
            return len(QUERIES)

    blocks = table_blocks({"influence": Stored()}, header())
    for count in range(1, len(QUERIES) + 1):
        assert len(next(blocks)["score"]) == len(TRAIN)
        assert read == list(range(count))


def test_whole_or_not_at_all(numbers, tmp_path):
    for name in ("t.csv", "t.parquet"):
        in_memory(numbers, tmp_path).save(tmp_path / name)
        before = (tmp_path / name).read_bytes()

        def failing():
            yield from table_blocks({"influence": numbers["influence"][0]}, header())
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_table(tmp_path / name, failing())
        assert (tmp_path / name).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"t.csv", "t.parquet"}


def test_refused(numbers, tmp_path):
    result = in_memory(numbers, tmp_path)
    for name in ("x.npy", "x", "x.xlsx"):
        with pytest.raises(ValueError, match=rf"must end in .csv or .parquet.*got '.*{name}'"):
            result.save(tmp_path / name)
    with pytest.raises(ValueError, match=r"`group_by` must be left out .* ends in .csv or .parq"):
        result.save(tmp_path / "x.safetensors", group_by="folder")
    with pytest.raises(ValueError, match=r"by artist, folder, or a list .*, got 'author'"):
        result.groups("author")
    with pytest.raises(ValueError, match=r"each of the 5 training images, got 2"):
        result.groups(["a", "b"])
    with pytest.raises(ValueError, match=r"'.*missing' does not exist. Create it first"):
        result.save(tmp_path / "missing" / "x.csv")
    assert not list(tmp_path.iterdir())
