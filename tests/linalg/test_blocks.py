"""Inverses, powers and invariants of K-FAC and EK-FAC, against dense matrices and upstream."""

import pytest
import torch
from torch import nn

from benchmarks.upstream import upstream_inverse, upstream_operator
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    NoisedRegression,
    influence_scores,
)
from curvlinops_diffusion.linalg.block_diagonal import BlockDiagonalLinearOperator
from curvlinops_diffusion.linalg.blocks import DenseBlock, EigenBlock, KroneckerBlock
from curvlinops_diffusion.linalg.parameters import ParameterSpace
from curvlinops_diffusion.linalg.placement import PlacedBlock
from curvlinops_diffusion.runtime.processes import ALONE, Processes
from tests.cases import noise_levels, plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import to_dense

DAMPING = 1e-3


@pytest.fixture(scope="module")
def regression():
    model = seeded(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 12), nn.Unflatten(1, (1, 3, 4))
    )
    return plain_regression(model, (1, 3, 4), count=20, num_draws=2, batch_size=20)


@pytest.fixture(
    scope="module",
    params=[
        (DiffusionKFACLinearOperator, True),
        (DiffusionKFACLinearOperator, False),
        (DiffusionEKFACLinearOperator, True),
        (DiffusionEKFACLinearOperator, False),
    ],
    ids=["kfac-separate", "kfac-joint", "ekfac-separate", "ekfac-joint"],
)
def operator(request, regression):
    kind, separate = request.param
    return kind(regression, fisher_type="empirical", separate_weight_and_bias=separate)


def test_powers(operator):
    dense = to_dense(operator)
    identity = torch.eye(len(dense), dtype=torch.float64)
    inverse = operator.inverse(damping=DAMPING)
    assert_close(inverse @ (dense + DAMPING * identity), identity, 1e-10)
    assert_close(to_dense(inverse), torch.linalg.inv(dense + DAMPING * identity), 1e-9)
    assert_close(to_dense(operator.power(1.0)), dense, 1e-11)
    assert_close(to_dense(operator.power(0.0)), identity, 1e-12)
    assert_close(to_dense(operator.power(2)), dense @ dense, 1e-11)
    root = to_dense(operator.power(-0.5, DAMPING))
    assert_close(root @ root, to_dense(inverse), 1e-10)
    assert_close(operator.power(0.5) @ (operator.power(0.5) @ dense), dense @ dense, 1e-10)


def test_invariants(operator):
    dense = to_dense(operator)
    assert_close(dense, dense.T, 1e-13)
    assert operator.adjoint() is operator
    assert_close(operator.trace(), dense.trace(), 1e-12)
    eigenvalues = torch.linalg.eigvalsh(dense).flip(0)
    assert eigenvalues.min() > -1e-12 * dense.norm()
    assert_close(operator.eigenvalues(), eigenvalues, 1e-10)
    assert_close(operator.frobenius_norm(), dense.norm(), 1e-12)
    damped = operator.power(1.0, DAMPING)
    identity = torch.eye(len(dense), dtype=torch.float64)
    truth = torch.linalg.slogdet(dense + DAMPING * identity).logabsdet
    assert_close(damped.logdet(), truth, 1e-10)
    # a small power keeps the determinant within the range of floating point
    assert_close(operator.power(0.01, DAMPING).det().log(), 0.01 * truth, 1e-10)


def test_formats_of_vectors_agree(operator):
    generator = torch.Generator().manual_seed(0)
    shapes = list(operator.space.shapes.values())
    matrix = torch.randn(operator.shape[1], 5, generator=generator, dtype=torch.float64)
    result = operator @ matrix
    assert_close(torch.stack([operator @ column for column in matrix.T], 1), result, 1e-13)
    sizes = [s.numel() for s in map(torch.Size, shapes)]
    listed = [m.reshape(*s, 5) for m, s in zip(matrix.split(sizes), shapes, strict=True)]
    flat = torch.cat([r.reshape(-1, 5) for r in operator @ listed])
    assert_close(flat, result, 1e-15)
    vectors = [v[..., 0] for v in listed]
    assert_close(torch.cat([r.flatten() for r in operator @ vectors]), result[:, 0], 1e-13)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (DiffusionKFACLinearOperator, "KFACLinearOperator"),
        (DiffusionEKFACLinearOperator, "EKFACLinearOperator"),
    ],
)
def test_inverse_equals_curvlinops(regression, separate, ours, theirs):
    options = {"fisher_type": "type-2", "separate_weight_and_bias": separate}
    F = ours(regression, exact_bias=False, **options)
    upstream = upstream_operator(theirs, regression, check_deterministic=False, **options)
    truth = upstream_inverse(upstream, damping=1e-2, use_exact_damping=True)
    assert_close(to_dense(F.inverse(1e-2)), to_dense(truth), 1e-9)


def dense_by_blocks(operator, function):
    """A matrix that is made of each block's own by itself, from what the operator is as a whole."""
    dense = to_dense(operator)
    names = list(operator.space.shapes)
    sizes = [shape.numel() for shape in map(torch.Size, operator.space.shapes.values())]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    places = {n: torch.arange(a, a + k) for n, a, k in zip(names, starts, sizes, strict=False)}
    result = torch.zeros_like(dense)
    for placed in operator.blocks:
        own = torch.cat([places[name] for name in placed.params])
        cell = own.unsqueeze(1), own
        result[cell] = function(dense[cell])
    return result


@pytest.mark.parametrize(
    ("heuristic", "separate", "floor"),
    [
        (True, False, {}),
        (True, False, {"min_damping": 0.1}),
        (True, True, {}),
        (False, True, {"min_damping": 0.1}),
    ],
)
def test_dampings_of_factors_equal_curvlinops(regression, separate, heuristic, floor):
    """A separate bias is damped exactly in ours; upstream's heuristic splits its damping."""
    options = {"fisher_type": "type-2", "separate_weight_and_bias": separate}
    K = DiffusionKFACLinearOperator(regression, exact_bias=False, **options)
    theirs = upstream_operator(
        "KFACLinearOperator", regression, check_deterministic=False, **options
    )
    rule = {"use_heuristic_damping": True} if heuristic else {"use_exact_damping": False}
    upstream = upstream_inverse(
        theirs, damping=DAMPING, use_heuristic_damping=heuristic, **(floor if heuristic else {})
    )
    result, truth = to_dense(K.inverse(DAMPING, **rule, **floor)), to_dense(upstream)
    exact, start = to_dense(K.inverse(DAMPING)), 0
    for name, shape in K.space.shapes.items():
        piece = slice(start, start + torch.Size(shape).numel())
        start = piece.stop
        expected = exact if separate and heuristic and name.endswith("bias") else truth
        assert_close(result[piece, piece], expected[piece, piece], 1e-9)


def test_dampings_that_contradict_each_other(regression):
    K = DiffusionKFACLinearOperator(regression)
    for options in ({"relative": True}, {"rtol": 0.1}, {"use_exact_damping": True}):
        with pytest.raises(ValueError, match=r"damp the operator and not its factors, got"):
            K.inverse(DAMPING, use_heuristic_damping=True, **options)
    with pytest.raises(ValueError, match=r"`min_damping` must be .* got -1"):
        K.inverse(DAMPING, min_damping=-1.0)
    with pytest.raises(ValueError, match="has no Kronecker factors to damp apart"):
        DiffusionEKFACLinearOperator(regression).inverse(DAMPING, use_exact_damping=False)


def test_damping_in_units_of_each_blocks_mean_eigenvalue(operator):
    def inverse(block):
        identity = torch.eye(len(block)).double()
        return torch.linalg.inv(block + 0.1 * block.diagonal().mean() * identity)

    ours = operator.inverse(0.1, relative=True)
    assert_close(to_dense(ours), dense_by_blocks(operator, inverse), 1e-9)
    assert ours.info["relative"] is True
    root = to_dense(operator.power(-0.5, 0.1, relative=True))
    assert_close(root @ root, to_dense(ours), 1e-9)
    # five per cent more would be seen
    other = to_dense(operator.inverse(0.105, relative=True))
    assert (other - to_dense(ours)).norm() > 1e-3 * other.norm()


@pytest.mark.parametrize("rtol", [0.0, 0.2])
def test_truncated_pseudo_inverse(operator, rtol):
    """As ``torch.linalg.pinv`` of the whole matrix; with damping, of what is kept."""
    dense = to_dense(operator)
    eigenvalues, basis = torch.linalg.eigh(dense)
    kept = eigenvalues > max(rtol, 1e-14) * eigenvalues.max()
    assert rtol < 1e-2 or not kept.all()
    ours = operator.inverse(rtol=rtol)
    assert_close(to_dense(ours), torch.linalg.pinv(dense, rtol=max(rtol, 1e-14)), 1e-8)
    U = basis[:, kept]
    damped = (U / (eigenvalues[kept] + DAMPING)) @ U.T
    assert_close(to_dense(operator.inverse(DAMPING, rtol=rtol)), damped, 1e-8)
    assert int((ours.eigenvalues() > 0).sum()) == int(kept.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, r"rtol.*-1.0"),
        ({"damping": -1e-3}, r"`damping` must be a finite number of at least 0, got -0.001"),
        ({"damping": float("nan")}, r"damping.*nan"),
        ({"damping": "big"}, r"damping.*'big'"),
    ],
)
def test_bad_dampings(operator, options, message):
    with pytest.raises(ValueError, match=message):
        operator.inverse(**options)


KINDS = pytest.mark.parametrize("kind", [DiffusionKFACLinearOperator, DiffusionEKFACLinearOperator])


@KINDS
def test_singular_operators_are_not_inverted_without_damping(kind):
    model = seeded(nn.Linear(3, 3))
    regression = plain_regression(model, (3,), count=1, num_draws=1)  # rank one
    operator = kind(regression, fisher_type="empirical")
    assert operator.logdet() == -torch.inf
    with pytest.raises(ValueError, match=r"zero eigenvalues.*Pass a larger damping"):
        operator.inverse(damping=0.0)
    assert torch.isfinite(to_dense(operator.inverse(damping=1e-8))).all()
    truncated = torch.linalg.pinv(to_dense(operator), rtol=1e-10)
    assert_close(to_dense(operator.inverse(rtol=1e-10)), truncated, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_is_a_matter_of_rank(dtype):
    """Whatever rounding leaves of a zero on a machine: here it is put there on purpose."""
    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor([3.0, 1.0, 0.1, 0.01, eps, 0.0], dtype=torch.float64)
    deficient = ((U * values) @ U.T).to(dtype)
    regular = torch.eye(6, dtype=dtype) * 2
    squares = torch.outer(values, values).to(dtype)
    for block, zeros in (
        (KroneckerBlock(deficient, regular), 12),
        (KroneckerBlock(regular, deficient), 12),
        (DenseBlock(deficient), 2),
        (EigenBlock.of_second_moments(squares.square(), U.to(dtype), U.to(dtype)), 20),
    ):
        eigen = block.eigen("w")
        assert eigen.logdet() == -torch.inf
        for exponent in (-1.0, -0.5):
            with pytest.raises(ValueError, match=rf"'w' has {zeros} zero eigenvalues"):
                eigen.power(exponent, 0.0, "w")
        assert torch.isfinite(eigen.power(-1.0, 1e-8, "w").eigenvalues).all()
        assert torch.isfinite(eigen.power(0.5, 0.0, "w").eigenvalues).all()
        # also after a power that rounds its zeros to something larger
        root = eigen.power(0.25, 0.0, "w")
        assert root.logdet() == -torch.inf
        with pytest.raises(ValueError, match=rf"'w' has {zeros} zero eigenvalues"):
            root.power(-1.0, 0.0, "w")
    # what is small but of full rank is inverted
    small = KroneckerBlock(regular * 1e-12, torch.diag(values[:4]).to(dtype)).eigen("w")
    assert torch.isfinite(small.logdet())
    assert torch.isfinite(small.power(-1.0, 0.0, "w").eigenvalues).all()
    # without a basis nothing is rounded
    diagonal = EigenBlock(torch.tensor([[1.0, 1e-30]], dtype=dtype))
    assert torch.isfinite(diagonal.power(-1.0, 0.0, "w").eigenvalues).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_second_moments_are_a_matter_of_directions(dtype):
    """A single entry may be the product of small ones, which are each above rounding."""
    U = torch.eye(6, dtype=dtype)
    eps = torch.finfo(dtype).eps
    regular = torch.tensor([eps ** (0.24 * i) for i in range(6)], dtype=dtype)
    moments = torch.outer(regular, regular)
    assert moments.min() < eps**2
    assert torch.equal(EigenBlock.of_second_moments(moments, U, U).eigenvalues, moments)
    rounded = torch.cat([regular[:5], regular.new_tensor([eps**2])])
    moments = torch.outer(rounded, regular)
    assert (EigenBlock.of_second_moments(moments, U, U).eigenvalues > 0).sum() == 30
    assert torch.equal(EigenBlock.of_second_moments(moments, None, U).eigenvalues, moments)


class DeadDirection(nn.Module):
    """A network whose inputs lack a direction that is none of the axes."""

    def __init__(self, model, n, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rotation = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.to(dtype)
        self.kept = torch.ones(n, dtype=dtype)
        self.kept[-1] = 0
        self.model = model

    def forward(self, x, t):
        return self.model(((x @ self.rotation) * self.kept) @ self.rotation.T, t)


@pytest.mark.parametrize(
    ("dtype", "n", "approx"),
    [
        (torch.float32, 32, "expand"),
        (torch.float32, 3, "reduce"),
        (torch.float64, 3, "expand"),
    ],
)
def test_the_rank_of_ekfac(dtype, n, approx):
    """Of full rank, with fewer examples than parameters, and with a direction without inputs."""

    def fitted(model, shape, count):
        regression = plain_regression(model, shape, count=count, num_draws=1, batch_size=64)
        return DiffusionEKFACLinearOperator(
            regression, fisher_type="empirical", kfac_approx=approx, exact_bias=False
        )

    model = seeded(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n), dtype=dtype)
    assert fitted(model, (n,), 6 * n).logdet().isfinite()
    assert fitted(model, (n,), 1).logdet() == -torch.inf
    dead = fitted(DeadDirection(model, n, dtype), (5, n), 3 * n)
    zeros = [int((placed.block.eigenvalues == 0).sum()) for placed in dead.blocks]
    assert zeros == [n, 0, 0, 0]


@KINDS
def test_what_was_damped_is_regular(kind):
    """However far its eigenvalues are apart, and however often it is inverted."""
    model = seeded(nn.Linear(16, 16), dtype=torch.float32)
    operator = kind(plain_regression(model, (16,), count=2, num_draws=2), fisher_type="empirical")
    assert operator.logdet() == -torch.inf
    inverse = operator.inverse(1e-12)
    damped = operator.power(1.0, 1e-12)
    assert_close(inverse.logdet(), -damped.logdet(), 1e-5)
    for regular in (inverse, damped):
        twice = regular.inverse(0.0).inverse(0.0)
        assert_close(twice.eigenvalues(), regular.eigenvalues(), 1e-5)


@KINDS
def test_what_is_not_finite_is_named(kind):
    model = seeded(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 3))
    regression = plain_regression(model, (3,))
    model.layers[2].weight.data[0, 0] = 1e110  # gradients are finite, their squares are not
    with pytest.raises(ValueError, match=r"The output factor of 'layers.0.*NaN or infinite"):
        kind(regression, fisher_type="empirical").inverse(1.0)
    model.layers[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the layer of 'layers.2.*NaN or infinite.*weights"):
        kind(plain_regression(model, (3,)))


# ---------------------------------------------------------------------------------------------
# Blocks of rounding errors
# ---------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Keys with a bias, which softmax makes nothing of, and one that a norm subtracts."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.norm = nn.Conv1d(3, 2, 3, padding=1), nn.InstanceNorm1d(2, affine=True)
        self.unused = nn.Linear(4, 4)

    def forward(self, x, t):
        scores = self.q(x) @ self.k(x).mT
        h = x + scores.softmax(-1) @ self.v(x)
        return h + self.norm(self.conv(h)).sum(1, keepdim=True)


NULL = ("k.bias", "conv.bias", "unused.weight", "unused.bias")


def attention(dtype, **objective):
    torch.manual_seed(0)
    model = Attention().to(dtype).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return plain_regression(
        model, (3, 4), count=6, num_draws=2, batch_size=4, dtype=dtype, objective=objective
    )


@pytest.mark.filterwarnings("ignore:.*have no effect on the prediction")
@pytest.mark.parametrize(
    ("dtype", "objective", "subset"),
    [  # of which the largest eigenvalue differs
        (torch.float64, {}, ("",)),
        (torch.float32, {}, ("k", "q")),
        (torch.float32, {"autocast": torch.bfloat16}, ("conv",)),
    ],
)
@KINDS
def test_blocks_of_rounding_are_left_out(kind, dtype, objective, subset):
    """The twin is without the parameters; an absolute damping keeps them, as its formula says."""
    regression = attention(dtype, **objective)
    model = regression.objective.model
    names = [n for n, _ in model.named_parameters() if n.startswith(subset)]
    alive = [n for n in names if n not in NULL]
    F, twin = kind(regression, names), kind(regression, alive)
    keep = torch.cat(
        [torch.full((p.numel(),), n not in NULL) for n, p in model.named_parameters() if n in names]
    )
    for exponent in (-1.0, -0.5, 0.5):
        found = to_dense(F.power(exponent, 0.1, relative=True))
        assert (found[~keep] == 0).all()
        right = to_dense(twin.power(exponent, 0.1, relative=True))
        # products of other numbers of blocks round differently on some processors
        assert_close(found[keep][:, keep], right, 1e-12 if dtype == torch.float64 else 1e-4)
    dense, identity = to_dense(F), torch.eye(len(keep), dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert_close(to_dense(F.inverse(0.1)), torch.linalg.inv(dense + 0.1 * identity), tolerance)
    assert F.logdet() == -torch.inf
    with pytest.raises(ValueError, match=r"zero eigenvalues.*rtol= for a pseudo-inverse"):
        F.inverse(0.0)


def of_identities(sizes, dtype=torch.float64, processes=ALONE, **info):
    """Multiples of ``[2, 2]`` identities, a block each."""
    blocks = [
        PlacedBlock(name, (name,), DenseBlock(scale * torch.eye(2, dtype=dtype)))
        for name, scale in sizes.items()
    ]
    space = ParameterSpace(dict.fromkeys(sizes, (2,)), dtype, torch.device("cpu"))
    return BlockDiagonalLinearOperator(space, blocks, info, processes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_blocks_are_kept(dtype):
    """Whatever their size: only zeros are left out, and what a trial has listed."""
    alive = {"large": 1.0, "small": 1e-2 * torch.finfo(dtype).eps ** 2}
    F = of_identities(alive | {"zero": 0.0, "listed": 0.5}, dtype, rounding=["listed"])
    found = to_dense(F.inverse(0.1, relative=True)).diagonal()
    right = [*(1 / (1.1 * size) for size in alive.values()), 0, 0]
    assert_close(found, torch.tensor(right, dtype=dtype).repeat_interleave(2), 1e-6)
    assert F.logdet() == -torch.inf
    regular = of_identities(alive, dtype)
    assert regular.logdet().isfinite()
    back = regular.inverse(0.0).inverse(0.1, relative=True)  # the first is the small one there
    assert (to_dense(back).diagonal() > 0).all()


def test_rtol_is_of_the_largest_eigenvalue_of_all_processes():
    class OneOfTwo(Processes):
        def all_gather(self, value):
            return [value, {bool: False, float: 1.0}.get(type(value), [])]

    alone = of_identities({"w": 1e-8})
    assert_close(to_dense(alone.inverse(rtol=1e-6)), 1e8 * torch.eye(2).double(), 1e-12)
    beside = of_identities({"w": 1e-8}, processes=OneOfTwo(0, 1))
    assert to_dense(beside.inverse(rtol=1e-6)).norm() == 0


def test_a_relative_damping_of_zeros():
    F = of_identities({"w": 0.0}, torch.float32)
    with pytest.raises(ValueError, match=r"Every block is zero.*an absolute damping"):
        F.inverse(0.1, relative=True)
    with pytest.raises(ValueError, match="does not round to zero"):
        F.inverse(1e-60)
    assert_close(to_dense(F.inverse(0.1)), 10 * torch.eye(2), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "objective"),
    [(torch.float64, {}), (torch.float32, {"autocast": torch.bfloat16})],
)
@KINDS
def test_weights_whose_gradients_are_rounding(kind, dtype, objective):
    """An embedding is added to each channel, whose mean a norm subtracts: its terms vanish too."""

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first = nn.Linear(2, 4), nn.Conv1d(2, 4, 3, padding=1)
            self.norm, self.last = nn.GroupNorm(4, 4), nn.Conv1d(4, 2, 3, padding=1)

        def forward(self, x):
            h = self.first(x) + self.embed(x.mean(2)).unsqueeze(2)
            return self.last(torch.tanh(self.norm(h)))

    model = seeded(Embedded(), dtype=dtype)
    regression = plain_regression(
        model, (2, 8), count=6, num_draws=2, batch_size=4, dtype=dtype, objective=objective
    )
    null = {f"layers.0.{name}" for name in ("embed.weight", "embed.bias", "first.bias")}
    assert set(kind(regression).info["rounding"]) == null
    coarse = kind(regression, exact_bias=False)  # the bias of first has the factor of its weight
    assert set(coarse.info["rounding"]) == null - {"layers.0.first.bias"}
    names = [n for n, _ in model.named_parameters() if n not in null]
    twin = to_dense(kind(regression, names).inverse(0.1, relative=True))
    whole = to_dense(kind(regression).inverse(0.1, relative=True))
    keep = torch.cat([torch.full((p.numel(),), n not in null) for n, p in model.named_parameters()])
    assert torch.equal(whole[keep][:, keep], twin)
    assert not whole[~keep].any()


@KINDS
def test_a_branch_that_training_has_hardly_begun(kind):
    """A residual branch of scale 1e-6 is real: its scores in float32 are those of float64."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 2, 3, padding=1)
            self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = self.first(x)
            return self.last(h + 1e-6 * self.outer(torch.tanh(self.inner(h))))

    found = []
    for dtype in (torch.float32, torch.float64):
        model = seeded(Branch()).to(torch.float32).to(dtype)
        x0 = torch.randn(6, 2, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        objective = DenoisingObjective(model, noise_levels())
        regression = NoisedRegression(objective, x0, 2, batch_size=4)
        F, J = kind(regression, fisher_type="empirical"), ExampleGradientLinearOperator(regression)
        assert "rounding" not in F.info
        found.append(influence_scores(J, F.inverse(0.1, relative=True), J).double())
    assert_close(*found, 1e-4)
