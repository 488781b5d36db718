"""Plans: what they leave out, and their files."""

import pytest
import torch

from curvlinops_diffusion import RetrainingPlan
from curvlinops_diffusion.influence.validation.plans import HEADER


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetrainingPlan.random_subsets(10, 4, fraction=0.01), "of 10 examples is 0"),
        (lambda: RetrainingPlan.random_subsets(10, 0), "num_parts=0 arrived"),
        (lambda: RetrainingPlan.leave_one_group_out([0, 0]), "leave out all examples"),
        (lambda: RetrainingPlan.leave_one_group_out([0.5]), "Pass the number of each example's"),
        (lambda: RetrainingPlan(torch.zeros(2, 3), ("a", "b"), "x"), "Pass booleans"),
        (lambda: RetrainingPlan(torch.zeros(2, 3).bool(), ("a", "a"), "x"), "1 names arrived"),
        (lambda: RetrainingPlan.random_subsets(4, 2).save("/tmp/x", ["a"]), "1 names arrived"),
        (
            lambda: RetrainingPlan.removals(torch.randn(2, 4), [1], method="all"),
            "is what controls are called",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
