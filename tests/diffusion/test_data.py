"""Data is the same each time, single examples are told from batches, wrong items at the border."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
)
from tests.cases import images, noise_levels, seeded


class Labelled(nn.Module):
    """A network that sees labels, or words."""

    def __init__(self):
        super().__init__()
        self.layer, self.labels = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(5, 1)

    def forward(self, x, t, class_labels):
        return self.layer(x) + self.labels(class_labels)[:, :, None, None]


def regression_of(data, **options):
    return NoisedRegression(
        DenoisingObjective(Labelled().double(), noise_levels()), data, 2, **options
    )


class Varying(Dataset):
    """Images with labels, of which one varies from pass to pass."""

    def __init__(self, varying):
        self.varying, self.calls = varying, 0

    def __len__(self):
        return 9

    def __getitem__(self, n):
        self.calls += 1
        late = n == 7
        x0 = images(9)[n] + (self.calls if late and self.varying == "x0" else 0)
        label = (n + self.calls) % 5 if late and self.varying == "class_labels" else n % 5
        return {"x0": x0, "class_labels": torch.tensor(label)}


CONSUMERS = {
    "EK-FAC": DiffusionEKFACLinearOperator,
    "GGN": lambda r: DiffusionGGNLinearOperator(r) @ torch.eye(15).double()[:, :1] * 2,
    "rows": lambda r: [ExampleGradientLinearOperator(r).rows() for _ in range(2)],
    "identity": lambda r: (r.data_identity(), list(r.batches())),
    "curvlinops": lambda r: (list(r), list(r)),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("varying", ["x0", "class_labels"])
@pytest.mark.parametrize("loaded", [True, False])
def test_data_that_vary_in_the_middle(consumer, varying, loaded):
    """Of whatever entry and batch, in the second pass that sees it."""
    data = DataLoader(Varying(varying), batch_size=2) if loaded else Varying(varying)
    regression = regression_of(data, batch_size=2)
    if consumer == "GGN":
        CONSUMERS[consumer](regression)  # a pass
    with pytest.raises(ValueError, match=f"examples from 6 on is not what .*'{varying}' varied"):
        CONSUMERS[consumer](regression)


def test_data_that_stay_the_same():
    regression = regression_of(Varying(None), batch_size=2)
    for consume in CONSUMERS.values():
        consume(regression)


LISTS = {
    "dicts with numbers": [{"x0": x, "class_labels": n % 5} for n, x in enumerate(images(4))],
    "dicts with tensors": [
        {"x0": x, "class_labels": torch.tensor(n % 5)} for n, x in enumerate(images(4))
    ],
    "pairs": [(x, n % 5) for n, x in enumerate(images(4))],
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_examples(form):
    """A label for each says that the first axis of ``x0`` is none of examples."""
    found, expected = (
        regression_of(data, batch_size=3)
        for data in (LISTS[form], {"x0": images(4), "class_labels": torch.arange(4) % 5})
    )
    assert found.num_data == 4
    for a, b in zip(found.batches(), expected.batches(), strict=True):
        assert torch.equal(a.x_t, b.x_t)
        assert torch.equal(a.condition["class_labels"], b.condition["class_labels"])


def test_lists_of_batches_with_values_for_all():
    """A plain value that is no label says nothing of the first axis."""

    class Strength(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = seeded(nn.Conv2d(1, 1, 3, padding=1))

        def forward(self, x, t, strength, fast):
            return strength * self.layer(x, t)

    batches = [{"x0": images(3), "strength": torch.tensor(0.5), "fast": True}] * 2
    regression = NoisedRegression(DenoisingObjective(Strength(), noise_levels()), batches, 2)
    assert regression.num_data == 6
    DiffusionKFACLinearOperator(regression)


class OfImages(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, n):
        return {"image": Image.fromarray(np.zeros((4, 4), dtype=np.uint8)), "label": n}


class Streamed(IterableDataset):
    def __iter__(self):
        return iter([OfImages()[n] for n in range(3)])


class OfSizes(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, n):
        return torch.zeros(1, 4 + n, 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (OfImages(), "they hold 'image' as Image, 'label' as int .* Each batch"),
        (Streamed(), "they hold 'image' as Image, 'label' as int"),
        (OfSizes(), r"they hold 'item' as a tensor of shape \(1, 4, 4\) \(stack expects each"),
    ],
)
def test_items_that_make_no_batch(data, message):
    with pytest.raises(ValueError, match=message):
        list(regression_of(data).batches())


@pytest.mark.parametrize("loaded", [True, False])
def test_data_are_identified_as_they_pass_by(loaded):
    """By what a pass of its own would find, once; not by a pass over a part of them."""
    data = Varying(None)
    of = DataLoader(data, batch_size=2) if loaded else data
    expected = regression_of(of, batch_size=2).data_identity()
    regression = regression_of(of, batch_size=2)
    list(regression.numbered_batches(lambda number: number % 2 == 0))
    list(regression.numbered_batches(lambda number: number < 4))
    next(iter(regression.clean_batches()))
    assert not regression._data_identity
    list(regression.clean_batches())
    data.calls = 0
    assert regression.data_identity() == expected
    assert data.calls == 0
    assert regression.with_draws(2).data_identity() == expected


def test_a_fit_reads_data_once():
    """K-FAC's pass, beyond the two batches, read twice, that the network is tried out on."""
    data = Varying(None)
    regression = regression_of(data, batch_size=3)
    data.calls = 0
    K = DiffusionKFACLinearOperator(regression)
    assert data.calls == 9 + 2 * 6
    assert K.info["data"] == regression_of(data, batch_size=3).data_identity()
