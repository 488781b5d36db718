"""Data is the same each time, single examples are told from batches, wrong items at the border."""

from collections.abc import Sequence

import datasets
import numpy as np
import pandas
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data.datapipes.iter import IterableWrapper

from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    influence_scores,
)
from tests.cases import images, noise_levels, seeded
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of


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
@pytest.mark.parametrize(("varying", "loaded"), [("x0", True), ("class_labels", False)])
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


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: {"x0": x, "class_labels": y.tolist()},
        lambda x, y: {"x0": x, "class_labels": y.numpy()},
        lambda x, y: Again(lambda: zip(x, y.tolist(), strict=True)),
        lambda x, y: DataLoader(TensorDataset(x, y), None),
        # a label for each says that the first axis of ``x0`` is none of examples
        lambda x, y: [{"x0": a, "class_labels": b} for a, b in zip(x, y.tolist(), strict=True)],
        lambda x, y: [{"x0": a, "class_labels": b} for a, b in zip(x, y, strict=True)],
        lambda x, y: list(zip(x, y.tolist(), strict=True)),
        lambda x, y: MapStyle(x, y),
        lambda x, y: of_library(x, y),
    ],
)
def test_labels_in_every_form(form):
    x0, labels = images(4), torch.tensor([0, 1, 2, 0])
    found, expected = (
        regression_of(data, batch_size=3)
        for data in (form(x0, labels), {"x0": x0, "class_labels": labels})
    )
    assert found.num_data == 4
    for a, b in zip(found.batches(), expected.batches(), strict=True):
        assert_close(a.x_t, b.x_t, 1e-6)
        assert torch.equal(a.condition["class_labels"].long(), b.condition["class_labels"])


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


class MapStyle:
    """As many data sets are, without being one of torch."""

    def __init__(self, x0, labels):
        self.x0, self.labels = x0, labels

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, n):
        return {"x0": self.x0[n], "class_labels": self.labels[n]}


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
    """K-FAC's pass, beyond the two batches that the network is tried out on."""
    data = Varying(None)
    regression = regression_of(data, batch_size=3)
    data.calls = 0
    K = DiffusionKFACLinearOperator(regression)
    assert data.calls == 9 + 6
    assert K.info["data"] == regression_of(data, batch_size=3).data_identity()


# ---------------------------------------------------------------------------------------------
# Every form of data is counted by what comes, or refused
# ---------------------------------------------------------------------------------------------


def pictures(count):
    return images(count, channels=2, size=4)


class Items(Dataset):
    """Map-style; its length may be a lie."""

    def __init__(self, count, form=lambda x: x, length=None):
        self.x0, self.form = pictures(count), form
        self.length = count if length is None else length

    def __len__(self):
        return self.length

    def __getitem__(self, n):
        if n >= len(self.x0):
            raise IndexError(n)
        return self.form(self.x0[n])


class Stream(IterableDataset):
    """Single examples, or batches; each worker yields its share of them."""

    def __init__(self, count, size=None):
        self.things = pictures(count) if size is None else pictures(count).split(size)

    def __iter__(self):
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(self.things[number::count])


class StreamWithLength(Stream):
    def __len__(self):
        return 100


class Again:
    """A Python object that can be iterated over again and again."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


class Order(Sampler):
    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


class Shuffling(Sampler):
    """Batches of two, in an order that a seed chooses, or of its own each time."""

    shuffle = True

    def __init__(self, count, seed=None):
        self.count, self.seed = count, seed

    def __iter__(self):
        generator = torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        order = torch.randperm(self.count, generator=generator)
        return iter([batch.tolist() for batch in order.split(2)])


class ItemsInSequence(Items, Sequence):
    """Both of torch and of Python."""


class OfWorlds(Items):
    """Attributes of users' data sets mean anything."""

    world_size = num_processes = num_replicas = 4


class StreamOfWorlds(Stream):
    world_size = num_processes = num_replicas = 4


def every_second(items):
    """What puts items together may leave some out."""
    return torch.stack(items[::2])


def batches_of(data, size, **options):
    return BatchSampler(SequentialSampler(data), size, **{"drop_last": False, **options})


def of_library(x0, labels=None):
    """A data set of Hugging Face's library."""
    columns = {"x0": x0.tolist()} | ({} if labels is None else {"class_labels": labels.tolist()})
    return datasets.Dataset.from_dict(columns).with_format("torch", dtype=torch.float64)


# by the number of examples: the data, and which of the pictures come
FORMS = {
    "tensor": lambda n: (pictures(n), range(n)),
    "dict": lambda n: ({"x0": pictures(n)}, range(n)),
    "tuple of batches": lambda n: (pictures(n).split(2), range(n)),
    "list of dicts": lambda n: ([{"x0": x} for x in pictures(n).split(2)], range(n)),
    "list of images": lambda n: (list(pictures(n)), range(n)),
    "list of dicts of one": lambda n: ([{"x0": x} for x in pictures(n)], range(n)),
    "data set": lambda n: (Items(n), range(n)),
    "data set of tensors": lambda n: (TensorDataset(pictures(n)), range(n)),
    "data set that says less": lambda n: (Items(n + 2, length=n), range(n)),
    "subset": lambda n: (Subset(Items(n), [n - 1, 0]), [n - 1, 0]),
    "data set of the library": lambda n: (of_library(pictures(n)), range(n)),
    "data set that is a sequence": lambda n: (ItemsInSequence(n), range(n)),
    "loader": lambda n: (DataLoader(Items(n), 3), range(n)),
    "loader with a sampler": lambda n: (
        DataLoader(Items(n), 3, sampler=Order([n - 1, 0, 0, 0])),
        [n - 1, 0, 0, 0],
    ),
    "loader with nothing to drop": lambda n: (DataLoader(Items(n), n, drop_last=True), range(n)),
    "loader with some batches": lambda n: (
        DataLoader(Items(n), batch_sampler=batches_of(range(n // 2 + 1), 2)),
        range(n // 2 + 1),
    ),
    "loader with batches of its own": lambda n: (
        DataLoader(Items(n), batch_sampler=[[0], [n - 1, 0, n - 1]]),
        [0, n - 1, 0, n - 1],
    ),
    "loader of one process": lambda n: (
        # shuffled by a fixed seed
        DataLoader(Items(n), 3, sampler=DistributedSampler(Items(n), 1, 0)),
        list(DistributedSampler(range(n), 1, 0)),
    ),
    "loader with batches in a fixed order": lambda n: (
        DataLoader(Items(n), batch_sampler=Shuffling(n, 0)),
        [i for batch in Shuffling(n, 0) for i in batch],
    ),
    "data set of many worlds": lambda n: (DataLoader(OfWorlds(n), 3), range(n)),
    "stream of many worlds": lambda n: (StreamOfWorlds(n), range(n)),
    "loader without batches": lambda n: (DataLoader(Items(n), None), range(n)),
    "loader with a worker": lambda n: (
        DataLoader(Items(n), 1, num_workers=1, persistent_workers=True),
        range(n),
    ),
    "stream": lambda n: (Stream(n), range(n)),
    "stream with a length": lambda n: (StreamWithLength(n), range(n)),
    "stream of batches": lambda n: (Stream(n, 3), range(n)),
    "streams in a row": lambda n: (ChainDataset([Stream(n)] * 2), [*range(n), *range(n)]),
    "loader of a stream": lambda n: (DataLoader(Stream(n), 3), range(n)),
    "loader of a stream with a length": lambda n: (DataLoader(StreamWithLength(n), 3), range(n)),
    "loader of a stream of batches": lambda n: (DataLoader(Stream(n, 3), None), range(n)),
    "object": lambda n: (Again(lambda: pictures(n).split(2)), range(n)),
    "object of dicts": lambda n: (Again(lambda: ({"x0": x} for x in pictures(n))), range(n)),
}


def streamed_by_library(count):
    columns = {"x0": pictures(count).tolist()}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset()


def counted(data):
    model = seeded(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))
    return NoisedRegression(DenoisingObjective(model, noise_levels()), data, 2, batch_size=3)


def everything(regression):
    """All noised inputs and targets, by example and draw."""
    return {
        (n, batch.common_draw): torch.cat([batch.x_t[b].flatten(), batch.target_BD[b]])
        for batch in regression.batches()
        for b, n in enumerate(batch.indices)
    }


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_data_are_counted_by_what_comes(form, count):
    """In each iteration; and nothing of it is changed."""
    data, coming = FORMS[form](count)
    regression, plain = counted(data), counted(pictures(count)[list(coming)])
    assert regression.num_data == len(coming)
    expected = everything(plain)
    assert len(expected) == regression.num_samples
    for _ in range(2):
        found = everything(regression)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    if form in ("tensor", "dict"):
        assert torch.equal(data if form == "tensor" else data["x0"], pictures(count))


@pytest.mark.parametrize("form", ["loader with batches of its own", "stream of batches"])
def test_counts_reach_the_scores(form):
    """Rows, K-FAC's mean and the columns of scores are of one data set."""
    data, coming = FORMS[form](7)
    regression, plain = counted(data), counted(pictures(7)[list(coming)])
    truth = example_gradients(plain, params_of(plain.objective.model))
    J = ExampleGradientLinearOperator(regression)
    assert_close(J.rows(), truth, 1e-12)
    K, same = (DiffusionKFACLinearOperator(r, fisher_type="type-2") for r in (regression, plain))
    assert_close(K.trace(), same.trace(), 1e-12)
    J_query, inverse = ExampleGradientLinearOperator(counted(pictures(2))), same.inverse(0.1)
    scores = J_query.rows() @ (inverse @ truth.T) / len(coming)
    assert_close(influence_scores(J_query, inverse, J), scores, 1e-10)


class Sharing:
    """Its iterations share their place."""

    def __init__(self):
        self.place = iter(pictures(7).split(2))

    def __iter__(self):
        return self.place


class Shrinking:
    """Each iteration yields less than the one before."""

    def __init__(self):
        self.left = 12

    def __iter__(self):
        self.left -= 1
        return iter(pictures(self.left).split(5))


def with_entry(value):
    x0 = pictures(5)
    x0[3, 0, 0, 0] = value
    return x0


class RandomCaptions(Items):
    """The same images, each time with another of their captions."""

    calls = 0

    def __getitem__(self, n):
        self.calls += 1
        return {"x0": self.x0[n], "class_labels": torch.tensor(self.calls % 7)}


REFUSED = {
    "stream that drops": (
        lambda: DataLoader(Stream(7), 3, drop_last=True),
        "last examples of a stream",
    ),
    "batches that drop": (
        lambda: DataLoader(Items(7), batch_sampler=batches_of(Items(7), 3, drop_last=True)),
        "would leave out 1 of 7 examples. Pass drop_last=False",
    ),
    "sampler that drops": (
        lambda: DataLoader(Items(7), 3, sampler=Order(range(5)), drop_last=True),
        "would leave out 2 of 5",
    ),
    "shuffling": (
        lambda: DataLoader(Items(7), shuffle=True),
        "RandomSampler chooses or shuffles .*pass shuffle=False",
    ),
    "subset in random order": (
        lambda: DataLoader(Items(7), 3, sampler=SubsetRandomSampler(range(7))),
        "SubsetRandomSampler chooses or shuffles",
    ),
    "weighted": (
        lambda: DataLoader(Items(7), 3, sampler=WeightedRandomSampler([1.0] * 7, 7)),
        "WeightedRandomSampler chooses or shuffles",
    ),
    "random batches": (
        lambda: DataLoader(
            Items(7), batch_sampler=BatchSampler(RandomSampler(Items(7)), 3, drop_last=False)
        ),
        "shuffles",
    ),
    "a process' part": (
        lambda: DataLoader(Items(7), 3, sampler=DistributedSampler(Items(7), 2, 0, shuffle=False)),
        "Each process gets a part .*of 2",
    ),
    "a process' part of a stream": (
        lambda: DataLoader(IterableDatasetShard(Stream(7), 3, num_processes=2), 3),
        "Each process gets a part .*of 2",
    ),
    "a process' part of the library's": (
        lambda: split_dataset_by_node(streamed_by_library(7), 0, 2),
        "Each process gets a part .*of 2",
    ),
    "batches in another order each time": (
        lambda: DataLoader(Items(64), batch_sampler=Shuffling(64)),
        "Shuffling yields another order in each iteration",
    ),
    "loader that leaves out": (
        lambda: DataLoader(Items(7), 3, collate_fn=every_second),
        "5 examples came .* and 7 are known",
    ),
    "length above": (lambda: Items(7, length=9), "An item of the data .* cannot be read"),
    "loader with a length above": (
        lambda: DataLoader(Items(7, length=9), 3),
        "An item of the data .* cannot be read",
    ),
    "augmenting": (
        lambda: Items(7, lambda x: x + torch.rand(1)),
        "'x0' varied. .*random augmentation",
    ),
    "random captions": (
        lambda: RandomCaptions(4),
        r"different batches: 'class_labels' varied. .*of captions\) off",
    ),
    "one that shrinks": (Shrinking, "began with different batches|examples came"),
    "iterator that is shared": (Sharing, "must not share their place"),
    "data pipe": (lambda: IterableWrapper(list(pictures(7))), "one iteration at a time"),
    "generator": (lambda: (x for x in pictures(7)), "can be iterated only once"),
    "table": (lambda: pandas.DataFrame({"x0": [1.0, 2.0]}), "item 0 cannot be read"),
    "array": (lambda: pictures(4).numpy(), r"got ndarray \(pass torch.from_numpy"),
    "number": (lambda: 3, "The data must be a tensor .*, got int"),
    "no length": (type("Odd", (Dataset,), {}), "neither a length nor an iterator"),
    "no examples": (lambda: pictures(0), r"must not be empty.*got \(0, 2, 4, 4\)"),
    "no batches": (lambda: [], "The data is empty. Pass a tensor of clean examples"),
    "empty dataset": (lambda: TensorDataset(pictures(0)), "The data is empty"),
    "empty batch": (lambda: [pictures(2), pictures(0)], r"must not be empty.*got \(0, 2, 4, 4\)"),
    "missing batch": (lambda: Again(lambda: [pictures(2), None]), "got NoneType"),
    "no axes": (lambda: torch.zeros(4).double(), r"of shape \[batch, .*got \(4,\)"),
    "integers": (lambda: pictures(4).byte(), r"floating-point numbers, got torch.uint8"),
    "NaN": (lambda: with_entry(torch.nan), r"1 example\(s\) hold NaN.*at index \[3\] of the data"),
    "infinity in a batch": (lambda: list(with_entry(torch.inf).split(2)), r"at index \[3\]"),
    "no x0": (lambda: {"images": pictures(3)}, r"got keys \['images'\].*dict with key 'x0'"),
    "not tensors": (lambda: [["a", "b"]], "got list of length 2. Each batch"),
    "labelled": (
        lambda: TensorDataset(pictures(3), torch.arange(3.0)),
        r"list of length 2.*pair of these and integer labels or prompts, or a dict with key 'x0'",
    ),
    "x0 no tensor": (lambda: {"x0": [1.0, 2.0]}, r"floating-point tensor of shape .*got list"),
    "plain lists": (lambda: of_library(pictures(3)).with_format(None), "list.*with_format"),
    "short condition": (
        lambda: {"x0": pictures(3), "class_labels": torch.arange(2)},
        r"condition\['class_labels'\].* shape \(2,\)",
    ),
    "nested condition": (
        lambda: {"x0": pictures(3), "added": {"ids": torch.zeros(4, 2)}},
        r"condition\['added'\]\['ids'\].* shape \(4, 2\)",
    ),
    "images of PIL": (OfImages, "they hold 'image' as Image, 'label' as int .* Each batch"),
    "images of PIL in a stream": (Streamed, "they hold 'image' as Image, 'label' as int"),
    "images of several sizes": (
        OfSizes,
        r"they hold 'item' as a tensor of shape \(1, 4, 4\) \(stack expects each",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_data_that_cannot_be_counted_on(form):
    make, message = REFUSED[form]

    def iterate():
        regression = counted(make())
        return [list(regression.clean_batches()) for _ in range(2)]

    with pytest.raises(ValueError, match=message):
        iterate()


class Reshaping(nn.Module):
    """A network whose layers see other axes than the data has."""

    def __init__(self, layer, seen):
        super().__init__()
        self.layer, self.seen = layer, seen

    def forward(self, x, t):
        return self.layer(self.seen(x)).reshape(x.shape)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


# layer, how it sees the data, all examples, how they are passed
RESHAPED = {
    "images as sequences": (nn.Conv1d(3, 3, 1), lambda x: x.flatten(2), random(5, 3, 8, 8), "set"),
    "videos as images": (
        nn.Conv2d(2, 2, 1),
        lambda x: x.transpose(1, 2).flatten(0, 1),
        random(5, 2, 4, 3, 3),
        "set",
    ),
    "tokens as images": (
        nn.Conv2d(4, 4, 1),
        lambda x: x.mT.unflatten(2, (4, 4)),
        random(8, 16, 4),
        "batches",
    ),
    "single sequences": (nn.Linear(15, 15), lambda x: x.flatten(1), random(5, 5, 3), "list"),
    "batches of one": (nn.Conv2d(1, 1, 1), lambda x: x, random(4, 1, 3, 3), "batches of one"),
    "images of one channel": (nn.Conv2d(1, 1, 1), lambda x: x, random(4, 1, 3, 3), "list"),
    "running statistics": (
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)),
        lambda x: x,
        random(4, 2, 3, 3),
        "list",
    ),
}
PASSED = {
    "set": lambda x0: Subset(x0, range(len(x0))),
    "list": list,
    "batches": lambda x0: x0.split(4),
    "batches of one": lambda x0: x0.split(1),
}


@pytest.mark.parametrize("case", RESHAPED)
def test_batches_are_told_from_single_examples_by_what_the_network_takes(case):
    """Not by its layers, which may see other axes; items of a Dataset are never guessed at."""
    layer, seen, x0, form = RESHAPED[case]
    model = Reshaping(layer.double(), seen).train()
    objective = DenoisingObjective(model, noise_levels())
    state, random_state = (
        {k: z.clone() for k, z in model.state_dict().items()},
        torch.get_rng_state(),
    )
    found, plain = (NoisedRegression(objective, data, 2) for data in (PASSED[form](x0), x0))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(z, state[k]) for k, z in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert found.num_data == len(x0)
    model.eval()
    one, other = everything(found), everything(plain)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_loss_mask_is_not_shown_to_the_network():
    items = [{"x0": x, "mask": torch.ones(3, 3)} for x in random(4, 2, 3, 3)]
    model = Reshaping(nn.Conv2d(2, 2, 1).double(), lambda x: x)
    objective = DenoisingObjective(model, noise_levels())
    assert NoisedRegression(objective, items, 2, loss_mask="mask").num_data == 4
