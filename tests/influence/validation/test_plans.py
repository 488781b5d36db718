"""Plans: what they leave out, and their files."""

import numpy as np
import pytest
import torch

from curvlinops_diffusion.influence.validation.plans import HEADER
from curvlinops_diffusion.validation import RetrainingPlan


def test_random_subsets():
    plan = RetrainingPlan.random_subsets(10, 50, fraction=0.3, seed=1)
    assert ((~plan.left_out).sum(1) == 3).all()
    assert plan.parts[0] == "part_000"
    assert len({tuple(row.tolist()) for row in plan.left_out}) > 30
    # the first ones are the same however many there are
    more = RetrainingPlan.random_subsets(10, 60, fraction=0.3, seed=1)
    assert torch.equal(more.left_out[:50], plan.left_out)
    other = RetrainingPlan.random_subsets(10, 50, fraction=0.3, seed=2)
    assert not torch.equal(other.left_out, plan.left_out)
    # each example is in about its share of them
    often = (~RetrainingPlan.random_subsets(10, 4000, fraction=0.3).left_out).double().mean(0)
    assert ((often - 0.3).abs() < 0.03).all()


def test_leaving_out_groups():
    plan = RetrainingPlan.leave_one_group_out([0, 2, 0, -1, 2])
    assert plan.parts == ("without_0", "without_2")
    assert plan.left_out.tolist() == [
        [True, False, True, False, False],
        [False, True, False, False, True],
    ]
    named = RetrainingPlan.leave_one_group_out(torch.tensor([1, 0]), ["cats", "dogs/wolves"])
    assert named.parts == ("without_cats", "without_dogs_wolves")


@pytest.mark.parametrize("names", [None, [f"{n}.png" for n in range(6)]])
def test_files(tmp_path, names):
    """A line for each example that is trained on; and all of it in one file, opened again."""
    plan = RetrainingPlan.random_subsets(6, 4)
    plan.save(tmp_path / "a" / "plan", names)
    for part, out in zip(plan.parts, plan.left_out, strict=True):
        lines = (tmp_path / "a" / "plan" / f"{part}.txt").read_text().splitlines()
        assert lines == [str(n) if names is None else names[n] for n in range(6) if not out[n]]
    again = RetrainingPlan.open(tmp_path / "a" / "plan")
    assert torch.equal(again.left_out, plan.left_out)
    assert (again.parts, again.kind) == (plan.parts, "subsets")
    assert again.info == {"fraction": 0.5, "seed": 0, "names": names}
    path = tmp_path / "a" / "plan" / HEADER
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"RetrainingPlan.save"):
        RetrainingPlan.open(tmp_path / "a" / "plan")


def test_errors():
    plans, two = RetrainingPlan, torch.zeros(2, 3)
    for make, message in (
        (lambda: plans.random_subsets(10, 4, fraction=0.01), "keep some of 10 examples"),
        (lambda: plans.random_subsets(10, 0), "`num_parts` must be a whole number of at least 1"),
        (lambda: plans.leave_one_group_out([0, 0]), "leave out all examples"),
        (lambda: plans.leave_one_group_out([0.5]), "number of each example's group"),
        (lambda: plans(two, ("a", "b"), "x"), "must be booleans"),
        (lambda: plans(two.bool(), ("a", "a"), "x"), "got 1 names"),
        (lambda: plans.random_subsets(4, 2).save("/tmp/x", ["a"]), "each of 4 training"),
        (lambda: plans.removals(two, [1], method="all"), "is the controls' name"),
        (lambda: plans.removals(two, [1], method="Random"), "is the controls' name"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_groups_whose_names_are_no_files_of_their_own(tmp_path):
    """Slashes, letters of either case, and endings as networks' seeds have."""
    names = ["a/b", "a_b", "Cat", "cat", "x_seed1", "x", "..", "a\\b"]
    plan = RetrainingPlan.leave_one_group_out(list(range(len(names))), names)
    assert plan.parts[:4] == (
        "without_a_b",
        "without_a_b_group1",
        "without_Cat",
        "without_cat_group3",
    )
    assert plan.parts[4:6] == ("without_x_seed1_group4", "without_x")
    plan.save(tmp_path)
    files = {path.name for path in tmp_path.glob("*.txt")}
    assert {name.casefold() for name in files} == {f"{part}.txt".casefold() for part in plan.parts}
    assert len(files) == len(names)
    assert RetrainingPlan.open(tmp_path).parts == plan.parts
    with pytest.raises(ValueError, match="group up to number 2, got 2"):
        RetrainingPlan.leave_one_group_out([0, 2], ["a", "b"])


def test_names_that_would_share_files(tmp_path):
    for parts, message in (
        (("a/b", "c"), "cannot be files' names"),
        (("..", "c"), "cannot be files' names"),
        (("a_seed0", "a"), "cannot be files' names"),
        (("A", "a"), "are one file where names have no case"),
    ):
        with pytest.raises(ValueError, match=message):
            RetrainingPlan(torch.eye(2, 3).bool(), parts, "groups").save(tmp_path / "plan")
        assert not (tmp_path / "plan").exists()


def test_scores_without_a_place_in_an_order():
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    scores[1, 5], scores[2, 0] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"got 2 entries that are not, the first of query 1 and"):
        RetrainingPlan.removals(scores, [2])
    with pytest.raises(ValueError, match=r"must be \[queries, examples\]"):
        RetrainingPlan.removals(scores[0], [2])


def test_numbers_of_numpy(tmp_path):
    """Plans of NumPy's integers are those of plain ones, in memory and in a file."""
    scores = torch.eye(2, 4)
    one = RetrainingPlan.removals(scores, [1, 3], num_controls=2, seed=5)
    sizes, count = np.array([1, 3], dtype=np.uint8), np.uint8(2)
    other = RetrainingPlan.removals(scores, sizes, num_controls=count, seed=np.uint8(5))
    other.save(tmp_path)
    for found in (other, RetrainingPlan.open(tmp_path)):
        assert torch.equal(found.left_out, one.left_out)
        assert found.parts == one.parts
        assert found.info | {"names": None} == one.info | {"names": None}


def test_sizes_that_are_none():
    for sizes in ([], [0], [4], [1, 1], [1, np.int64(1)], [True], [2.0], ["1"]):
        with pytest.raises(ValueError, match=r"whole numbers from 1 to 3, each once"):
            RetrainingPlan.removals(torch.eye(2, 4), sizes)
