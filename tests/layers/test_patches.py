"""Second moments of patches, by each of three ways, against patches that are cut out one by one."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import Launches
from curvlinops_diffusion.layers import convolution, moments, patch_moments
from curvlinops_diffusion.layers.convolution import (
    ConvolutionKind,
    patch_gradients,
    patch_sum,
    patches,
    patches_at,
)
from curvlinops_diffusion.layers.geometry import Convolution2d, Geometry
from curvlinops_diffusion.layers.moments import LatestProduct, second_moment
from curvlinops_diffusion.layers.patch_moments import (
    GatheredSums,
    PatchMoment,
    ShiftedSums,
    SpectralSums,
)
from tests.comparisons import assert_close
from tests.reference import shared_inputs

KERNELS = [1, 2, 3, 4, 5, (3, 1), (2, 4)]
STRIDES = [1, 2, 3, (2, 1)]
PADDINGS = [0, 1, 2, (2, 0), (0, 1), "same"]
DILATIONS = [1, 2, (1, 3)]
SIZES = [(5, 5), (4, 7), (8, 6), (1, 3), (2, 2), (12, 9)]


def geometries(kernel):
    """Every geometry in which the convolution has an output."""
    for stride, padding, dilation, size, mode in product(
        STRIDES, PADDINGS, DILATIONS, SIZES, ["zeros", "circular", "reflect"]
    ):
        if (padding == "same" and stride != 1) or (mode != "zeros" and padding == 0):
            continue
        module = nn.Conv2d(3, 2, kernel, stride, padding, dilation, padding_mode=mode).double()
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
        try:
            module(x)
        except RuntimeError:  # the image is smaller than the kernel or the padding
            continue
        yield module, x


def geometry_of(module, x):
    conv = Convolution2d.of(module)
    return Geometry.of(conv, *conv.padded(x))


def exercised(module, x):
    """What of the code a geometry exercises, whatever its sizes.

    Zeros around the image are part of the geometry: of each axis count its phases, whether their
    images differ in length, and for its pairs of taps what their windows leave out at either end,
    and whether any pixel is seen by both; along rows also the parity of the period, which the
    transform's highest frequency depends on. Other paddings are applied beforehand: of these it
    matters only on which sides they differ.
    """
    if module.padding_mode != "zeros":
        left, right, top, bottom = Convolution2d.of(module).padding
        return module.padding_mode, left == right, top == bottom, left == top
    geometry = geometry_of(module, x)
    return of_axis(geometry.rows), of_axis(geometry.columns), geometry.columns.period % 2


def of_axis(axis):
    taken = set()
    for k, l in product(range(len(axis.taps)), repeat=2):
        low, high = axis.overlap(axis.key(k, l))
        outside = axis.outside(k, l)
        taken.add((low == high, any(a == low for a, _ in outside), len(outside)))
    lengths = {axis.length(phase) for phase in axis.phases}
    return len(axis.phases), len(lengths), frozenset(taken)


@cache
def representatives():
    """The first geometry of each that exercise the same; every kernel is among the slow tests."""
    first = {}
    for kernel in (1, 3, (2, 4)):
        for module, x in geometries(kernel):
            first.setdefault(exercised(module, x), (module, x))
    assert len(first) >= 40
    return list(first.values())


def summed(kind, module, x):
    """The second moment by one way, whatever is cheaper."""
    conv = Convolution2d.of(module)
    padded, _ = conv.padded(x)
    sums = kind(conv, geometry_of(module, x), padded)
    sums.add(padded, 1.0)
    return sums.total()


def moment_of(module, *parts, weight=1.0):
    """What the library chooses by cost."""
    moment = PatchMoment(Convolution2d.of(module))
    for x in parts:
        moment.add(x, weight)
    return moment


def way_of(moment):
    (sums,) = moment._sums.values()
    return type(sums)


def dense(module, x):
    a = shared_inputs(module, x).flatten(0, 1)
    return a.T @ a


def assert_moments_equal_patches(module, x):
    conv, a = Convolution2d.of(module), shared_inputs(module, x)
    assert torch.equal(patches(conv, x), a)
    assert ConvolutionKind().positions(module, x) == a.shape[1]
    index = torch.tensor([[a.shape[1] - 1, 0], [0, a.shape[1] // 2]])
    assert torch.equal(patches_at(conv, x, index), a[torch.arange(2).unsqueeze(1), index])
    assert_close(patch_sum(conv, x), a.sum(1), 1e-12)
    truth = dense(module, x)
    for way in (SpectralSums, ShiftedSums, GatheredSums):
        assert_close(summed(way, module, x), truth, 1e-12)
    assert_close(moment_of(module, x[:1], x[1:]).total(), truth, 1e-12)


def test_moments_equal_patches():
    for module, x in representatives():
        assert_moments_equal_patches(module, x)


@pytest.mark.parametrize("keep", [0, 1000], ids=["transformed at once", "kept"])
def test_products_of_spectra(keep, monkeypatch):
    """Kept until the end where they take little memory, else transformed back at once."""
    monkeypatch.setattr(patch_moments, "_MAX_PRODUCTS", keep)
    for module, x in representatives()[::4]:
        assert_close(summed(SpectralSums, module, x), dense(module, x), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_geometry(kernel, monkeypatch):
    for keep in (0, 1000):
        monkeypatch.setattr(patch_moments, "_MAX_PRODUCTS", keep)
        for module, x in geometries(kernel):
            assert_moments_equal_patches(module, x)


@pytest.mark.parametrize("small", [0, 2**17], ids=["by convolution", "by patches"])
def test_gradients_equal_patches(small, monkeypatch):
    monkeypatch.setattr(convolution, "_SMALL_GROUP", small)
    for module, x in representatives()[::2]:
        assert_gradients_equal_patches(module, x)


def assert_gradients_equal_patches(module, x):
    """Of single examples, of pairs, and of all."""
    x = torch.cat([x, 2 - x])
    g = torch.randn_like(module(x))
    single = torch.stack(
        [b.flatten(1) @ a for a, b in zip(shared_inputs(module, x), g, strict=True)]
    )
    for sums in (4, 2, 1):
        expected = single.unflatten(0, (sums, -1)).sum(1)
        assert_close(patch_gradients(Convolution2d.of(module), x, g, sums), expected, 1e-12)


def test_patches_are_formed_a_part_at_a_time(monkeypatch):
    """With entries for one example, or for a part of one, as with room for all."""
    for module, x in representatives()[::8]:
        for entries in (1, shared_inputs(module, x)[0].numel()):
            for used_in in (convolution, patch_moments):
                monkeypatch.setattr(used_in, "MAX_ENTRIES", entries)
            assert_gradients_equal_patches(module, x)
            assert_close(summed(GatheredSums, module, x), dense(module, x), 1e-12)


def test_weights_image_sizes_and_memory_layouts_may_vary():
    module = nn.Conv2d(2, 2, 3, padding=1, stride=2).double()
    moment, truth = PatchMoment(Convolution2d.of(module)), 0
    for size, weight, layout in [
        ((8, 8), 0.5, torch.contiguous_format),
        ((6, 9), 2.0, torch.contiguous_format),
        ((8, 8), 1.0, torch.channels_last),
    ]:
        x = torch.randn(3, 2, *size).double().contiguous(memory_format=layout)
        moment.add(x, weight)
        truth = truth + weight * dense(module, x)
        moment.add(x.mT.contiguous().mT, weight)
        truth = truth + weight * dense(module, x)
    assert_close(moment.total(), truth, 1e-12)


def test_float32_is_as_exact_as_patches():
    """The transform loses nothing against a product of patches in the same precision."""
    module = nn.Conv2d(64, 1, 3, padding=1)
    x = torch.randn(16, 64, 16, 16)
    truth = dense(module, x.double())
    error_of_patches = (summed(GatheredSums, module, x).double() - truth).norm()
    assert (summed(SpectralSums, module, x).double() - truth).norm() < 3 * error_of_patches


# ---------------------------------------------------------------------------------------------
# Which way is taken
# ---------------------------------------------------------------------------------------------


def test_counted_multiplications():
    """A 3×3 convolution of stride 1 on 16×16 pixels: the figure of the description."""
    geometry = geometry_of(nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 16, 16))
    by_patches, spectral, shifted = (
        kind.cost(geometry, 1, gpu=False) for kind in (GatheredSums, SpectralSums, ShiftedSums)
    )
    assert 13.5 < by_patches / spectral < 14.5
    assert 4.75 < by_patches / shifted < 4.85


@pytest.mark.parametrize(
    ("device", "kernel", "channels", "size", "kind"),
    [
        ("cpu", 3, 2, 16, SpectralSums),
        ("cpu", 1, 2, 16, GatheredSums),
        # as measured in single precision on a GPU for 256 and 128 channels; else it is counted
        ("cuda", 3, 256, 16, ShiftedSums),
        ("cuda", 3, 128, 32, GatheredSums),
        ("cuda", 3, 64, 16, GatheredSums),
        ("cuda", 3, 320, 64, ShiftedSums),
        ("cuda", 3, 1280, 8, ShiftedSums),
        ("cuda", 1, 1280, 64, GatheredSums),
    ],
)
def test_the_fastest_way_is_taken(device, kernel, channels, size, kind):
    module = nn.Conv2d(1, 1, kernel, padding=kernel // 2)
    with FakeTensorMode():
        x = torch.empty(1, channels, size, size, device=device)
        assert way_of(moment_of(module, x)) is kind


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 256], ids=["patches", "shifts"])
def test_sums_on_a_gpu(monkeypatch, channels):
    """Written down and restored; on another kind of device refused, not mistaken for none."""
    monkeypatch.setattr(moments, "TENSOR_CORES", {"cpu"})
    module = nn.Conv2d(channels, 2, 3, padding=1).double()
    x = torch.randn(3, channels, 16, 16, dtype=torch.float64)
    moment = moment_of(module, *x.split(2), weight=0.5)
    assert way_of(moment) is (GatheredSums if channels == 2 else ShiftedSums)
    assert_close(moment.total(), 0.5 * dense(module, x), 1e-12)
    again = PatchMoment(Convolution2d.of(module))
    again.restore(moment.tensors())
    assert torch.equal(again.total(), moment.total())
    for there, here in (({"cpu"}, set()), (set(), {"cpu"})):
        monkeypatch.setattr(moments, "TENSOR_CORES", there)
        tensors = moment_of(module, x[:1]).tensors()
        monkeypatch.setattr(moments, "TENSOR_CORES", here)
        with pytest.raises(ValueError, match="computed otherwise on 'cpu'"):
            PatchMoment(Convolution2d.of(module)).restore(tensors)


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_low_precision_are_float32(kernel):
    """On a GPU that need not be there: types and sizes alone."""
    with FakeTensorMode():
        x = torch.empty(2, 4, 16, 16, dtype=torch.bfloat16, device="cuda")
        total = moment_of(nn.Conv2d(4, 4, kernel, padding=kernel // 2), x, x).total()
        products = second_moment(x.flatten(2)), LatestProduct().of(x.flatten(2))
    assert total.shape == (4 * kernel**2, 4 * kernel**2)
    assert all(z.dtype == torch.float32 and z.is_cuda for z in (total, *products))


def test_launches(monkeypatch):
    """Of a 3×3 convolution and batch: each takes as long as a small product does."""
    module = nn.Conv2d(2, 2, 3, padding=1)
    found = {}
    for on_gpu, channels in ((False, 2), (True, 2), (True, 256)):
        monkeypatch.setattr(moments, "TENSOR_CORES", {"cpu"} if on_gpu else set())
        x = torch.randn(2, channels, 16, 16)
        moment = moment_of(module, x)
        with Launches() as launches:
            moment.add(x, 1.0)
        found[on_gpu, channels] = launches.count
    assert found == {(False, 2): 22, (True, 2): 4, (True, 256): 22}
    g = torch.randn(2, 2, 16, 16)
    with Launches() as launches:
        patch_gradients(Convolution2d.of(module), x, g, 2)
    assert launches.count == 3
