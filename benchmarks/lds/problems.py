"""Problems on which networks are retrained: digits, Fashion-MNIST, photographs and textures.

Legend: N training images, Q queries, M measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from skimage import data
from torch import Tensor
from torch.nn.functional import avg_pool2d, mse_loss, pixel_unshuffle
from torch.utils._pytree import tree_map

from benchmarks.lds.fashion import fashion
from benchmarks.problems import example, patches, photographs, separate_patches
from curvlinops_diffusion import DenoisingObjective, NoisedRegression
from curvlinops_diffusion.influence.measurements.base import measure, measurement_of
from curvlinops_diffusion.runtime.digests import digest_of

SEEDS = 2
MEASUREMENTS = ("loss", "simplified_elbo")
MEASURED_SEED = 12345
SECOND_SEED = 101
LATE = (0.7, 0.8, 0.9)  # of the training, at which its weights are kept as well
LEARNING_RATE = 2e-3

#: Images ``[N, ...]``, or a dictionary of them and of what the network is given with them.
Data = Any

_demo = example("influence_digits")
# to see that the programs run
TINY: dict[str, Any] = {
    **{"num_train": 12, "steps": 10, "batch": 4, "num_halves": 4, "num_queries": 2},
    **{"measured_draws": 2, "draws": (2, 4)},
}


@dataclass(frozen=True)
class Problem:
    """Images, a network, and how it is trained.

    Attributes:
        images: All images in ``[-1, 1]``, ``[·, C, H, W]``.
        make_network: Makes a network of random weights.
        num_train: The number ``N`` of training images.
        steps: Steps of the training on all of them; networks on halves are trained for half.
        batch: Images in a step.
        num_halves: Random halves on which networks are trained.
        num_queries: Held-out queries, and as many generated ones.
        measured_draws: Draws on which queries are measured.
        draws: Of training images, to see how many are needed.
        constant_rate: Whether the learning rate stays, instead of falling to zero.
        compiled: Whether steps of the training are compiled: half as many again in a second, after
            two minutes.
    """

    name: str
    images: Callable[[], Tensor]
    make_network: Callable[[], UNet2DModel]
    num_train: int
    steps: int
    batch: int
    num_halves: int = 64
    num_queries: int = 64
    measured_draws: int = 64
    draws: tuple[int, ...] = (10, 30, 100, 250, 500)
    constant_rate: bool = False
    compiled: bool = False

    @property
    def description(self) -> dict[str, Any]:
        """Describe what retrained networks depend on, as plain values."""
        keys = ("name", "num_train", "steps", "batch", "num_halves", "num_queries")
        own = {key: getattr(self, key) for key in (*keys, "measured_draws")}
        config = self.make_network().config
        network = {key: value for key, value in config.items() if not key.startswith("_")}
        return {**own, "network": digest_of(network)}

    @property
    def params(self) -> list[str] | None:
        """The names of the parameters that are trained, ``None`` for all."""
        return None

    def order(self) -> Tensor:
        """Which images are those of the training, and then the held-out ones."""
        order = torch.randperm(len(self.images()), generator=torch.Generator().manual_seed(0))
        return order[: self.num_train + self.num_queries]

    def data(self) -> tuple[Data, Data]:
        """Training images ``[N, C, H, W]`` and held-out ones, ``[Q, C, H, W]``."""
        chosen = self.images()[self.order()]
        return chosen[: self.num_train], chosen[self.num_train :]

    def queries(self, generated: Tensor) -> Data:
        """Held-out images, then generated ones."""
        return torch.cat([self.data()[1], generated])

    def pixels(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels of training images and of queries."""
        return self.data()[0], self.queries(generated)

    def halves(self) -> Tensor:
        """Random halves of the training images, ``[H, N]``."""
        generator = torch.Generator().manual_seed(1)
        masks = torch.zeros(self.num_halves, self.num_train, dtype=torch.bool)
        for mask in masks:
            mask[torch.randperm(self.num_train, generator=generator)[: self.num_train // 2]] = True
        return masks

    def trained(
        self,
        x0: Data,
        steps: int,
        seed: int,
        keep: Callable[[int, UNet2DModel], None] | None = None,
    ) -> UNet2DModel:
        """A network trained on some images.

        Args:
            x0: The images.
            steps: Steps of AdamW.
            seed: Of the weights, batches, timesteps and noise.
            keep: Called before each step with its number and the network.
        """
        scheduler = DDPMScheduler()
        template = _compiled(self.name) if self.compiled else None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.make_network()
            if template is not None:
                template.load_state_dict(network.state_dict())
                network = template
            optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
            for step in range(steps):
                if keep is not None:
                    keep(step, network)
                remaining = 1.0 if self.constant_rate else 1 - step / steps
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * remaining
                batch = x0[torch.randint(len(x0), (self.batch,))]
                noise = torch.randn_like(batch)
                t = torch.randint(scheduler.config.num_train_timesteps, (len(batch),))
                loss = mse_loss(network(scheduler.add_noise(batch, noise, t), t).sample, noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return self.loaded(network.state_dict())

    def kept(self, network: UNet2DModel) -> dict[str, Tensor]:
        """The weights that are kept."""
        return dict(network.state_dict())

    def loaded(self, weights: Mapping[str, Tensor]) -> UNet2DModel:
        """A network with given weights."""
        network = self.make_network()
        network.load_state_dict({name: weight.float() for name, weight in weights.items()})
        return network.eval()

    @property
    def scheduler(self) -> DDPMScheduler:
        """The noise levels of the training."""
        return DDPMScheduler()

    def objective(self, weights: Mapping[str, Tensor]) -> DenoisingObjective:
        """The denoising objective of a network with given weights."""
        return DenoisingObjective(self.loaded(weights), self.scheduler)

    def generated(self, network: UNet2DModel) -> Tensor:
        """Samples of the network."""
        return self.trajectories(network)[-1].contiguous()

    def beside(self, network: UNet2DModel, generated: Tensor) -> dict[str, Tensor]:
        """What is kept beside the network and its samples: a second training's weights, float16."""
        second = self.trained(self.data()[0], self.steps, SECOND_SEED).state_dict()
        return {f"second/{name}": z.half().contiguous() for name, z in second.items()}

    def trajectories(self, network: UNet2DModel) -> Tensor:
        """Sampling by DDPM: the noised images and then the image, ``[1001, Q, C, H, W]``."""
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        channels, size = network.config["in_channels"], network.config["sample_size"]
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            states = [torch.randn(self.num_queries, channels, size, size)]
            for t in scheduler.timesteps:
                prediction = network(states[-1], t).sample
                states.append(scheduler.step(prediction, t, states[-1]).prev_sample)
        states[-1] = states[-1].clamp(-1, 1)
        return torch.stack(states)

    def measured(self, network: UNet2DModel, queries: Data) -> Tensor:
        """Each measurement of each query, on draws that all networks share, ``[M, Q]``."""
        objective = DenoisingObjective(network, self.scheduler)
        Q = len(queries["x0"] if isinstance(queries, dict) else queries)
        regression = NoisedRegression(
            objective, queries, self.measured_draws, MEASURED_SEED, batch_size=Q
        )
        measured = [measurement_of(name, objective) for name in MEASUREMENTS]
        total_MQ = torch.zeros(len(measured), Q)
        (clean,) = regression.clean_batches()
        with torch.no_grad():
            # one prediction for all measurements
            for batch in regression.noised_batches(clean):
                prediction = objective.predict(batch)
                total_MQ += torch.stack([measure(m, batch, prediction) for m in measured])
        return total_MQ / self.measured_draws


def rows(data: Data, which: Tensor) -> Data:
    """Some of the examples, with what the network is given with them."""
    return tree_map(lambda z: z[which], data)


@lru_cache
def _compiled(name: str) -> UNet2DModel:
    """A compiled network, into which the weights of one after the other are loaded."""
    network = PROBLEMS[name].make_network()
    network.compile()
    return network


def classes_of_digits() -> list[str]:
    """The classes of the digits that are trained on."""
    images, classes = _demo.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [str(c) for c in classes[order[: PROBLEMS["digits"].num_train]].tolist()]


def _overlapping_patches() -> Tensor:
    """Patches of a part of the first photograph, at a quarter of its size, ``[468, 3, 8, 8]``.

    Neighbours have half of their pixels in common: of patches without overlap two trainings on a
    half do not agree.
    """
    part = avg_pool2d(photographs()[0], 4)[:, 28:104, 24:132]
    return patches(part, size=8, stride=4)


def _texture_patches(size: int, region: int, count: int) -> Tensor:
    """Patches at random places of brick, grass and gravel, ``[3 count, 1, size, size]``.

    Each texture at half of its size, with mean zero and a standard deviation of one half. The
    places are anywhere in a square of ``region`` pixels: patches show much in common, but seldom at
    the same pixels.
    """
    generator = torch.Generator().manual_seed(3)
    found = []
    for texture in (data.brick(), data.grass(), data.gravel()):
        small = avg_pool2d(torch.from_numpy(texture).float()[None], 2)[:, :region, :region]
        small = ((small - small.mean()) / (2 * small.std())).clamp(-1, 1)
        every = patches(small, size, 1)
        found.append(every[torch.randperm(len(every), generator=generator)[:count]])
    return torch.cat(found)


def _in_patches(images: Tensor, size: int = 2) -> Tensor:
    """Patches of 2×2 pixels (or more) as channels, as a network with such patches sees them.

    The loss stays the same, and a network of a given width costs a quarter.
    """
    return pixel_unshuffle(images, size)


def _unet(size: int, channels: int, widths: tuple[int, int]) -> UNet2DModel:
    """With attention at its lower level."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=widths[0] // 2,
        attention_head_dim=widths[0] // 2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


_digits = Problem("digits", lambda: _demo.digits()[0], _demo.make_unet, 1000, 1500, 128)
_textures = Problem(
    "textures",
    lambda: _in_patches(_texture_patches(16, 48, 40)),
    lambda: _unet(8, 4, (16, 32)),
    num_train=72,
    steps=1200,
    batch=16,
    num_halves=20,
    num_queries=48,
    compiled=True,
)
PROBLEMS = {
    problem.name: problem
    for problem in (
        _digits,
        Problem(
            "fashion",
            lambda: _in_patches(fashion()),
            lambda: _unet(8, 4, (16, 32)),
            num_train=1000,
            steps=4000,
            batch=64,
        ),
        Problem(
            "photographs",
            _overlapping_patches,
            lambda: _unet(8, 3, (16, 32)),
            num_train=400,
            steps=2000,
            batch=64,
            compiled=True,
        ),
        Problem(
            "lengths",
            lambda: _in_patches(separate_patches(16)),
            lambda: _unet(8, 12, (16, 32)),
            num_train=200,
            steps=4000,
            batch=64,
            num_halves=32,
            constant_rate=True,
        ),
        _textures,
        replace(
            _textures,
            name="textures_32",
            images=lambda: _in_patches(_texture_patches(32, 64, 40), 4),
            make_network=lambda: _unet(8, 16, (16, 32)),
            steps=3600,
        ),
        replace(_digits, name="tiny", make_network=lambda: _unet(8, 1, (2, 2)), **TINY),
    )
}
