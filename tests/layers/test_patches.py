"""Second moments of patches, by correlations, against patches that are cut out one by one."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import Launches
from curvlinops_diffusion.layers import patch_moments, products
from curvlinops_diffusion.layers import patches as patches_module
from curvlinops_diffusion.layers import spectral_sums as spectral_module
from curvlinops_diffusion.layers.convolution import ConvolutionKind
from curvlinops_diffusion.layers.correlations import Geometry
from curvlinops_diffusion.layers.moments import LatestProduct, second_moment
from curvlinops_diffusion.layers.patch_moments import PatchMoment, PatchSums
from curvlinops_diffusion.layers.patches import (
    Convolution2d,
    _axes,
    _padded_explicitly,
    patch_gradients,
    patch_sum,
    patches,
)
from curvlinops_diffusion.layers.shifted_sums import ShiftedSums
from curvlinops_diffusion.layers.spectral_sums import SpectralSums
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
        if padding == "same" and stride != 1:
            continue
        if mode != "zeros" and padding == 0:
            continue
        module = nn.Conv2d(
            3,
            2,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=mode,
        ).double()
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
        try:
            module(x)
        except RuntimeError:  # the image is smaller than the kernel or the padding
            continue
        yield module, x


def exercised(module, x):
    """What of the code a geometry exercises, whatever its sizes.

    Zeros around the image are part of the geometry: of each axis count its phases, whether their
    images differ in length, and for its pairs of taps what their windows leave out at either end,
    and whether any pixel is seen by both; along rows also the parity of the period, which the
    transform's highest frequency depends on. Other paddings are applied beforehand: of these it
    matters only on which sides they differ.
    """
    conv = Convolution2d.of(module)
    if conv.padding_mode != "zeros":
        left, right, top, bottom = conv.padding
        return conv.padding_mode, left == right, top == bottom, left == top
    rows, columns = _axes(conv, x, conv.padding)
    return of_axis(rows), of_axis(columns), columns.period % 2


def of_axis(axis):
    taken = set()
    for k, l in product(range(len(axis.taps)), repeat=2):
        low, high = axis.overlap(axis.key(k, l))
        outside = axis.outside(k, l)
        taken.add((low == high, any(a == low for a, _ in outside), len(outside)))
    lengths = {axis.length(phase) for phase in axis.phases}
    return len(axis.phases), len(lengths), frozenset(taken)


def representatives(kernel):
    """The first geometry of each that exercise the same."""
    first = {}
    for module, x in geometries(kernel):
        first.setdefault(exercised(module, x), (module, x))
    return list(first.values())


def summed(kind, module, x):
    """The sums of one kind, whatever is cheaper."""
    padded, padding = _padded_explicitly(Convolution2d.of(module), x)
    sums = kind(Geometry(*_axes(Convolution2d.of(module), padded, padding)), padded)
    sums.add(padded, 1.0)
    return sums.total()


def by_patches(module, x):
    return summed(partial(PatchSums, Convolution2d.of(module)), module, x)


def spectral(module, x):
    return summed(SpectralSums, module, x)


def chosen(module, x):
    """What the library chooses by cost, in two unequal steps."""
    moment = PatchMoment(Convolution2d.of(module))
    moment.add(x[:1], 1.0)
    moment.add(x[1:], 1.0)
    return moment.total()


def assert_moments_equal_patches(module, x):
    a = shared_inputs(module, x)
    truth = a.flatten(0, 1).T @ a.flatten(0, 1)
    assert torch.equal(patches(Convolution2d.of(module), x), a)
    assert ConvolutionKind().positions(module, x) == a.shape[1]
    assert_close(patch_sum(Convolution2d.of(module), x), a.sum(1), 1e-12)
    assert_close(spectral(module, x), truth, 1e-12)
    assert_close(summed(ShiftedSums, module, x), truth, 1e-12)
    assert_close(by_patches(module, x), truth, 1e-12)
    assert_close(chosen(module, x), truth, 1e-12)


kernels = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"kernel {kernel}")


@kernels
def test_moments_equal_patches(kernel):
    found = representatives(kernel)
    assert len(found) >= 10
    for module, x in found:
        assert_moments_equal_patches(module, x)


@pytest.mark.parametrize("keep", [0, 1000], ids=["transformed at once", "kept"])
@pytest.mark.parametrize("kernel", [1, 3, (2, 4)], ids=lambda kernel: f"kernel {kernel}")
def test_products_of_spectra(kernel, keep, monkeypatch):
    """Kept until the end where they take little memory, else transformed back at once."""
    monkeypatch.setattr(spectral_module, "_MAX_PRODUCTS", keep)
    for module, x in representatives(kernel)[::4]:
        a = shared_inputs(module, x).flatten(0, 1)
        assert_close(spectral(module, x), a.T @ a, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1000], ids=["transformed at once", "kept"])
@kernels
def test_every_geometry(kernel, keep, monkeypatch):
    monkeypatch.setattr(spectral_module, "_MAX_PRODUCTS", keep)
    count = 0
    for module, x in geometries(kernel):
        assert_moments_equal_patches(module, x)
        count += 1
    assert count > 100


@pytest.mark.parametrize("small", [0, 2**17], ids=["by convolution", "by patches"])
@kernels
def test_gradients_equal_patches(kernel, small, monkeypatch):
    monkeypatch.setattr(patches_module, "_SMALL_GROUP", small)
    for module, x in representatives(kernel):
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
    for module, x in representatives(3)[::4]:
        for entries in (1, shared_inputs(module, x)[0].numel()):
            monkeypatch.setattr(patches_module, "_MAX_ENTRIES", entries)
            monkeypatch.setattr(patch_moments, "_MAX_ENTRIES", entries)
            assert_gradients_equal_patches(module, x)
            a = shared_inputs(module, x).flatten(0, 1)
            assert_close(by_patches(module, x), a.T @ a, 1e-12)


@pytest.mark.parametrize(("N", "C"), [(1, 1), (1, 4), (7, 1)])
def test_one_channel_and_a_batch_of_one(N, C):
    module = nn.Conv2d(C, 1, 3, padding=1).double()
    x = torch.randn(N, C, 6, 5).double()
    a = shared_inputs(module, x).flatten(0, 1)
    assert_close(spectral(module, x), a.T @ a, 1e-12)


def test_weights_and_image_sizes_may_vary():
    module = nn.Conv2d(2, 2, 3, padding=1, stride=2).double()
    moment, truth = PatchMoment(Convolution2d.of(module)), 0
    for size, weight in [((8, 8), 0.5), ((6, 9), 2.0), ((8, 8), 1.0)]:
        x = torch.randn(3, 2, *size).double()
        moment.add(x, weight)
        a = shared_inputs(module, x).flatten(0, 1)
        truth = truth + weight * a.T @ a
    assert_close(moment.total(), truth, 1e-12)


def test_memory_layouts_agree():
    module = nn.Conv2d(4, 2, 3, padding=1).double()
    x = torch.randn(3, 4, 8, 8).double()
    expected = chosen(module, x)
    assert_close(chosen(module, x.contiguous(memory_format=torch.channels_last)), expected, 1e-14)
    assert_close(chosen(module, x.mT.contiguous().mT), expected, 1e-14)


def test_float32_is_as_exact_as_patches():
    """The transform loses nothing against a product of patches in the same precision."""
    module = nn.Conv2d(64, 1, 3, padding=1)
    x = torch.randn(16, 64, 16, 16)
    a = shared_inputs(module, x.double()).flatten(0, 1)
    truth = a.T @ a
    error_of_patches = (by_patches(module, x).double() - truth).norm()
    assert (spectral(module, x).double() - truth).norm() < 3 * error_of_patches


@pytest.mark.parametrize(("kernel", "size", "spectral_wins"), [(3, 16, True), (1, 16, False)])
def test_the_cheaper_way_is_taken(kernel, size, spectral_wins):
    module = nn.Conv2d(2, 2, kernel, padding=kernel // 2)
    moment = PatchMoment(Convolution2d.of(module))
    moment.add(torch.randn(1, 2, size, size), 1.0)
    (sums,) = moment._sums.values()
    assert isinstance(sums, SpectralSums) == spectral_wins


def test_counted_multiplications():
    """A 3×3 convolution of stride 1 on 16×16 pixels: the figure of the module's description."""
    geometry = Geometry(*_axes(nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 16, 16), [1] * 4))
    assert 13.5 < geometry.patch_cost / SpectralSums.cost(geometry) < 14.5
    shifted = sum(pixels * results for pixels, results in ShiftedSums.products(geometry))
    assert 4.75 < geometry.patch_cost / shifted < 4.85


# ---------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "channels", "size", "kind"),
    [
        (3, 256, 16, ShiftedSums),
        (3, 128, 32, PatchSums),
        (3, 64, 16, PatchSums),
        (3, 320, 64, ShiftedSums),
        (3, 1280, 8, ShiftedSums),
        (1, 1280, 64, PatchSums),
    ],
)
def test_the_faster_way_on_a_gpu(monkeypatch, kernel, channels, size, kind):
    """As measured in single precision for 256 and 128 channels; else it is counted."""
    monkeypatch.setattr(products, "TENSOR_CORES", {"cpu"})
    moment = PatchMoment(Convolution2d.of(nn.Conv2d(1, 1, kernel, padding=kernel // 2)))
    with FakeTensorMode():
        moment.add(torch.empty(1, channels, size, size), 1.0)
    (sums,) = moment._sums.values()
    assert type(sums) is kind


@pytest.mark.parametrize("by_shifts", [True, False])
def test_sums_on_a_gpu(monkeypatch, by_shifts):
    monkeypatch.setattr(products, "TENSOR_CORES", {"cpu"})
    monkeypatch.setattr(patch_moments, "_shifts_are_faster", lambda *args: by_shifts)
    module = nn.Conv2d(2, 2, 3, padding=1).double()
    moment = PatchMoment(Convolution2d.of(module))
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    for part in x.split(2):
        moment.add(part, 0.5)
    a = shared_inputs(module, x).flatten(0, 1)
    assert_close(moment.total(), 0.5 * a.T @ a, 1e-12)
    again = PatchMoment(Convolution2d.of(module))
    again.restore(moment.tensors())
    assert torch.equal(again.total(), moment.total())


@pytest.mark.parametrize("first", [True, False])
def test_sums_of_another_kind_of_device_are_refused(monkeypatch, first):
    """And are not mistaken for none."""
    module = nn.Conv2d(2, 2, 3, padding=1)
    moments = []
    for on_gpu in (first, not first):
        monkeypatch.setattr(products, "TENSOR_CORES", {"cpu"} if on_gpu else set())
        moments.append(PatchMoment(Convolution2d.of(module)))
        if not moments[1:]:
            moments[0].add(torch.randn(1, 2, 16, 16), 1.0)
    with pytest.raises(ValueError, match="computed otherwise on 'cpu'"):
        moments[1].restore(moments[0].tensors())


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_low_precision_are_float32(kernel):
    """On a GPU that need not be there: types and sizes alone."""
    conv = Convolution2d.of(nn.Conv2d(4, 4, kernel, padding=kernel // 2))
    with FakeTensorMode():
        x = torch.empty(2, 4, 16, 16, dtype=torch.bfloat16, device="cuda")
        moment = PatchMoment(conv)
        moment.add(x, 1.0)
        moment.add(x, 1.0)
        total = moment.total()
        products = second_moment(x.flatten(2)), LatestProduct().of(x.flatten(2))
    assert total.shape == (4 * kernel**2, 4 * kernel**2)
    assert all(z.dtype == torch.float32 and z.is_cuda for z in (total, *products))


def test_launches(monkeypatch):
    """Of a 3×3 convolution and batch: each takes as long as a small product does."""
    module = nn.Conv2d(2, 2, 3, padding=1)
    found = {}
    for on_gpu, channels in ((False, 2), (True, 2), (True, 256)):
        monkeypatch.setattr(products, "TENSOR_CORES", {"cpu"} if on_gpu else set())
        x = torch.randn(2, channels, 16, 16)
        moment = PatchMoment(Convolution2d.of(module))
        moment.add(x, 1.0)
        with Launches() as launches:
            moment.add(x, 1.0)
        found[on_gpu, channels] = launches.count
    assert found == {(False, 2): 22, (True, 2): 4, (True, 256): 22}
    g = torch.randn(2, 2, 16, 16)
    with Launches() as launches:
        patch_gradients(Convolution2d.of(module), x, g, 2)
    assert launches.count == 3
