"""Examples of several shapes: batches of one shape each, results in the order of the data."""

import warnings

import curvlinops
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from curvlinops_diffusion import (
    Attributor,
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    DiffusionGGNLinearOperator,
    DiffusionKFACLinearOperator,
    ExampleGradientLinearOperator,
    KernelOptions,
    NoisedRegression,
    PassOptions,
    influence_scores,
    kernel_regression_scores,
    regression_scores,
)
from curvlinops_diffusion.diffusion.batch import CleanBatch
from curvlinops_diffusion.loading.sizes import resized
from tests.cases import StoppedError, noise_levels, seeded, small_unet, stopped
from tests.comparisons import assert_close
from tests.diffusion.test_pipelines import PROMPTS, dit, flux, fresh, stable_diffusion_xl
from tests.loading.test_sizes import folder_of
from tests.reference import (
    ekfac_block,
    flat_gradient,
    params_of,
    shared_gradients,
    shared_inputs,
    to_dense,
)
from tests.runtime.test_processes import processes

SHAPES = [(4, 8), (8, 4), (4, 8), (8, 8), (8, 4), (8, 4)]


class Shaped(Dataset):
    """Images of several shapes, perhaps with labels."""

    def __init__(self, labels=False):
        generator = torch.Generator().manual_seed(1)
        self.shapes = SHAPES
        self.images = [torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
        self.read, self.labels = [], labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, n):
        self.read.append(n)
        return {"x0": self.images[n]} | self.condition(n)

    def condition(self, n):
        return {"class_labels": torch.tensor(n % 3)} if self.labels else {}


def network():
    return seeded(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1))


def problem(model=None, batch_size=2, num_draws=2, **options):
    objective = DenoisingObjective(network() if model is None else model, noise_levels())
    data = options.pop("data", None) or Shaped()
    return NoisedRegression(objective, data, num_draws, batch_size=batch_size, **options)


def one_by_one(regression, data):
    """Every example and draw in the order of the data, as batches of one, without batches."""
    for n in range(len(data)):
        condition = {key: z[None] for key, z in data.condition(n).items()}
        clean = CleanBatch([n], data.images[n][None], condition)
        for batch in regression.noised_batches(clean):
            yield n, batch, regression.objective.predict(batch)


def dense(regression, data):
    """The GGN and the gradients of the losses, one prediction's entry after the other."""
    params = params_of(regression.objective.model)
    P, N, R = sum(p.numel() for p in params), len(data), regression.num_draws
    G, J = torch.zeros(P, P, dtype=torch.float64), torch.zeros(N, P, dtype=torch.float64)
    for n, batch, prediction in one_by_one(regression, data):
        D = prediction.shape[1]  # an example's loss is the mean of its own entries
        jacobian = torch.stack([flat_gradient(entry, params) for entry in prediction[0]])
        G += 2 * jacobian.T @ jacobian / D / (N * R)
        J[n] += 2 / D * (prediction[0] - batch.target_BD[0]).detach() @ jacobian / R
    return G, J


def layer_terms(regression, data, module):
    """A layer's inputs ``[S, I]`` and, for each entry, gradients ``[S, O]`` of its outputs."""
    for _, batch, _ in one_by_one(regression, data):
        seen = []

        def keep(module, args, out, seen=seen):
            seen.append((args[0], out))

        hook = module.register_forward_hook(keep)
        prediction = regression.objective.predict(batch)
        hook.remove()
        ((x, out),), D = seen, prediction.shape[1]
        for entry in prediction[0]:
            (g,) = torch.autograd.grad((2 / D) ** 0.5 * entry, out, retain_graph=True)
            yield shared_inputs(module, x.detach())[0], shared_gradients(module, g)[0], D


def test_batches_are_of_one_shape_and_examples_keep_their_numbers():
    data = Shaped()
    regression = problem(data=data)
    batches = [(list(b.indices), tuple(b.x0.shape[2:])) for b in regression.clean_batches()]
    assert batches == [([3], (8, 8)), ([0, 2], (4, 8)), ([1, 4], (8, 4)), ([5], (8, 4))]
    assert (regression.num_data, regression.num_batches) == (6, 4)
    data.read.clear()
    assert [number for number, _ in regression.numbered_batches(lambda n: n == 2)] == [2]
    assert data.read == [1, 4]


def test_the_order_of_the_data_is_part_of_its_identity():
    """Of the same images in the same batches, numbered otherwise, nothing is found again."""
    first, second, order = Shaped(), Shaped(), [0, 2, 1, 3, 4, 5]
    second.images, second.shapes = ([z[n] for n in order] for z in (first.images, SHAPES))
    kept = [problem(data=data).data_identity() for data in (first, second, first)]
    assert kept[0] == kept[2]
    assert kept[0]["digest"] != kept[1]["digest"]
    assert kept[0]["batch_size"] == [1, 2, 2, 1]


def test_shapes_must_be_of_all_items():
    data = Shaped()
    data.shapes = SHAPES[:3]
    with pytest.raises(ValueError, match="`shapes` must have one for each of its 6 items, got 3"):
        problem(data=data)
    data.shapes = [(4, 4)] * 6  # not what they are
    with pytest.raises(ValueError, match="cannot be put into a batch"):
        problem(data=data)


def test_exact_products_gradients_and_scores_against_a_dense_twin(tmp_path):
    data = Shaped()
    regression = problem(data=data)
    G, J = dense(regression, data)
    assert_close(to_dense(DiffusionGGNLinearOperator(regression)), G, 1e-10)
    gradients = ExampleGradientLinearOperator(regression)
    assert_close(gradients.rows(), J, 1e-10)
    assert_close(gradients.rows([4, 0, 3]), J[[4, 0, 3]], 1e-10)
    V = torch.randn(len(G), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(gradients @ V, J @ V, 1e-10)
    assert_close(gradients.adjoint() @ V[:6], J.T @ V[:6], 1e-10)
    upstream = curvlinops.GGNLinearOperator(
        regression.model_func,
        regression.loss_func,
        params_of(regression.objective.model),
        regression,
        batch_size_fn=regression.batch_size_fn,
    )
    assert_close(upstream @ V, G @ V, 1e-6)
    # scores, out of passes that are interrupted and go on
    inverse = DiffusionKFACLinearOperator(regression).inverse(damping=1e-2)
    expected = J @ to_dense(inverse) @ J.T / 6
    passes = PassOptions(tmp_path, checkpoint_every=0)
    with stopped(ExampleGradientLinearOperator, "rows_of", 6), pytest.raises(StoppedError):
        influence_scores(gradients, inverse, gradients, passes=passes)
    assert_close(influence_scores(gradients, inverse, gradients, passes=passes), expected, 1e-8)
    alone = ExampleGradientLinearOperator(problem(data=data, batch_size=1))
    assert_close(
        regression_scores(gradients, inverse, gradients),
        regression_scores(alone, inverse, alone),
        1e-8,
    )


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_kronecker_factors_against_a_dense_twin(approx):
    """Each example's inputs are averaged over its own positions; so is each example's loss."""
    data = Shaped()
    model, settings = network(), {"fisher_type": "type-2", "separate_weight_and_bias": True}
    regression = problem(model, data=data)
    kfac = DiffusionKFACLinearOperator(regression, kfac_approx=approx, **settings)
    ekfac = DiffusionEKFACLinearOperator(regression, kfac_approx=approx, **settings)
    blocks = {placed.name: placed.block for placed in kfac.blocks}
    corrected = {placed.name: placed.block for placed in ekfac.blocks}
    for name in ("layers.0", "layers.2"):
        module, A, B, F = model.get_submodule(name), 0.0, 0.0, 0.0
        for a, b, D in layer_terms(regression, data, module):
            if approx == "expand":
                A, B = A + a.T @ a / len(a) / D, B + b.T @ b
            else:
                A = A + torch.outer(a.mean(0), a.mean(0)) / D
                B = B + torch.outer(b.sum(0), b.sum(0))
            g = (b.T @ a).flatten()
            F = F + torch.outer(g, g)
        A, B, F = (z / regression.num_samples for z in (A, B, F))
        found = dense_of(blocks[f"{name}.weight"])
        assert_close(found, torch.kron(B, A), 1e-10)
        if name == "layers.0":  # of full rank, so that its eigenvectors are unique
            assert_close(dense_of(corrected[f"{name}.weight"]), ekfac_block(A, B, F), 1e-8)


def test_kfac_of_a_linear_network_is_exact():
    """As on one shape: the mean over an image's entries weights its positions as ``A`` does."""
    model, data = seeded(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)), Shaped()
    regression = problem(model, data=data)
    G, _ = dense(regression, data)
    kfac = DiffusionKFACLinearOperator(regression, fisher_type="type-2")
    first, second = (dense_of(placed.block) for placed in kfac.blocks)
    assert_close(first, G[:2, :2], 1e-10)
    assert_close(second, G[2:, 2:], 1e-10)


def dense_of(block):
    O, I = block.shape
    X = torch.eye(O * I, dtype=torch.float64).reshape(O, I, O * I)
    return block.multiply(X).reshape(O * I, O * I)


def test_a_unet_on_several_shapes_is_what_it_is_on_one():
    """With attention, norms and labels: batches of two against examples, and batches of one."""
    unet, data = small_unet(), Shaped(labels=True)
    pairs = [problem(unet, batch_size=b, data=data, num_draws=1) for b in (2, 1)]
    rows = ExampleGradientLinearOperator(pairs[0]).rows()
    params = params_of(unet)
    expected = torch.zeros_like(rows)
    for n, batch, prediction in one_by_one(pairs[0], data):
        expected[n] = flat_gradient((prediction - batch.target_BD).square().mean(), params)
    assert_close(rows, expected, 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operators = [DiffusionEKFACLinearOperator(each) for each in pairs]
    assert_close(operators[0].trace(), operators[1].trace(), 1e-9)


def scored(rank):
    """Scores, and those of a regression that is iterated, alone or by several processes."""
    passes = PassOptions(distributed=rank is not None, sharded=rank is not None)
    regression = problem(batch_size=3)
    inverse = DiffusionKFACLinearOperator(regression, passes=passes).inverse(damping=1e-2)
    J, options = ExampleGradientLinearOperator(regression), KernelOptions(3, 10_000, tolerance=1e-9)
    return {
        "scores": influence_scores(J, inverse, J, query_block=4, passes=passes),
        "iterated": kernel_regression_scores(J, inverse, J, options=options, passes=passes),
    }


def test_two_processes_as_one(tmp_path):
    expected = scored(None)
    for found in processes(2, tmp_path / "run", scored):
        for name, tensor in expected.items():
            assert_close(found[name], tensor, 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_with_kohyas_buckets(tmp_path):
    """Noised latents and condition of every image are those of a training step of its bucket."""
    pipeline = fresh(stable_diffusion_xl, tmp_path)
    sizes = [(10, 31), (20, 18), (31, 9), (9, 30)]
    folder = folder_of(tmp_path / "data", *sizes)
    (folder / "metadata.jsonl").write_text(
        "\n".join(f'{{"file_name": "i{n}.png", "text": "a dog"}}' for n in range(4))
    )
    sizing = {"resolution": 16, "buckets": True, "bucket_step": 8, "bucket_min": 8}
    attributor = Attributor.from_pipeline(
        *(pipeline, folder),
        **{**sizing, "bucket_max": 32, "latent_cache": tmp_path / "cache", "progressbar": False},
    )
    assert "3 buckets (2 of 8×24, 1 of 16×16, 1 of 32×8)" in attributor.images.summary()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    regression, found = attributor.regression, {}
    for batch in regression.batches():
        found |= {n: (batch, b) for b, n in enumerate(batch.indices)}
    # resized to cover the bucket (8 × 24, 16 × 16, …), with half of what is left over cut off
    resize_and_cut = [((8, 25), (0, 0)), ((18, 16), (1, 0)), ((32, 9), (0, 0)), ((8, 27), (0, 1))]
    corners = [(0, 0), (0, 0), (2, 0), (0, 0)]
    for n, (size, (whole, (top, left))) in enumerate(zip(sizes, resize_and_cut, strict=True)):
        batch, b = found[n]
        height, width = bucket = attributor.images.shapes[n]
        opened = Image.open(folder / f"i{n}.png")
        pixels = to_tensor(resized(opened, whole, None, True)) * 2 - 1
        pixels = pixels[:, top : top + height, left : left + width]
        latents = pipeline.vae.encode(pixels[None]).latent_dist
        eps = regression.draws.noise([n], 0, latents.mean.shape[1:])
        eta = regression.draws.latent_noise([n], 0, latents.mean.shape[1:])
        x0 = (latents.mean + latents.std * eta) * pipeline.vae.config.scaling_factor
        level = batch.timestep_B[b : b + 1].long()
        noised = scheduler.add_noise(x0, eps, level)
        assert_close(batch.x_t[b], noised[0].detach(), 1e-5)
        told = batch.condition["added_cond_kwargs"]["time_ids"][b]
        assert told.tolist() == [*size, *corners[n], *bucket]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # a file for each batch


@pytest.mark.filterwarnings("ignore")
def test_wide_and_high_images_of_equally_many_tokens(tmp_path):
    """Latents packed into tokens: of one shape, but each pixel has a place of its own."""

    class Prompted(Shaped):
        def condition(self, n):
            return {"prompt": PROMPTS[n % 3]}

    data = Prompted()
    data.shapes = [(8, 16), (16, 8), (8, 16), (16, 8)]
    data.images = [torch.rand(3, *shape) * 2 - 1 for shape in data.shapes]
    objective = DenoisingObjective.from_pipeline(fresh(flux, tmp_path))
    rows = [
        ExampleGradientLinearOperator(
            NoisedRegression(objective, data, 1, batch_size=size), ["x_embedder.weight"]
        ).rows()
        for size in (2, 1)
    ]
    assert_close(*rows, 1e-4)


@pytest.mark.filterwarnings("ignore")
def test_networks_of_one_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`buckets` must be left out: a DiTTransformer2DModel"):
        Attributor.from_pipeline(fresh(dit, tmp_path), torch.zeros(1, 3, 8, 8), buckets="8,8")


def test_networks_are_tried_out_on_another_shape():
    """What couples examples of one shape alone is found at its first batch, the third here."""

    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network()

        def forward(self, x_t, t, **condition):
            found = self.layer(x_t, t)
            return found + x_t.mean() if x_t.shape[2:] == (8, 4) else found

    data = Shaped()
    data.images, data.shapes = data.images[:5], SHAPES[:5]
    with pytest.raises(ValueError, match="depends on the rest of its batch"):
        DiffusionKFACLinearOperator(problem(Coupled(), data=data))
