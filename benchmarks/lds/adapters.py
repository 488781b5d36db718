"""Problems on which adapters are retrained: LoRAs of a tiny text-to-image latent diffusion.

``styles`` teaches it four styles by captioned pictures whose phase, place and colours are random;
``dreambooth`` one thing, by a few pictures that have one caption. :data:`PROBLEMS` has these beside
those of ``benchmarks.lds.problems``.

Legend: N training images, Q queries, M measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from benchmarks.lds import problems
from benchmarks.lds.problems import SECOND_SEED, TINY, Data, Problem
from benchmarks.lds.text_to_image import (
    STYLES,
    TextToImage,
    all_captions,
    loss_of,
    minimized,
    noised,
    pictures,
    pipeline,
    things,
)
from curvlinops_diffusion.runtime.digests import digest_of

#: Layers that have an adapter: those of attention, as in diffusers' scripts, and convolutions.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")


@dataclass(frozen=True)
class AdapterProblem(Problem):
    """Captioned images, a frozen network, and how its adapter is trained.

    Attributes:
        captions: Of all images.
        rank: Of the adapter.
        rate: The learning rate, which falls to zero.
        width: The pipeline's.
    """

    captions: Callable[[], Sequence[str]] = tuple
    rank: int = 4
    rate: float = 1e-2
    width: int = 32

    @property
    def pipeline(self) -> TextToImage:
        """The pipeline, without an adapter."""
        return pipeline(self.width)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Describe what retrained adapters depend on, as plain values."""
        own = {"steps": self.steps, "rank": self.rank, "rate": self.rate}
        depends = digest_of(self.pipeline.unet.state_dict(), *super().data(), TARGETS)
        return {**super().description, **own, "data": depends}

    @cached_property
    def params(self) -> list[str]:
        """The names of the adapter's parameters."""
        return list(self.kept(self.make_network()))

    def words(self) -> tuple[list[str], list[str]]:
        """The captions of the training images and of all queries, of which the last are asked for.

        Kinds of captions are asked for in turn.
        """
        captions = self.captions()
        chosen = [captions[n] for n in self.order()]
        asked = sorted(set(captions))
        train, held_out = chosen[: self.num_train], chosen[self.num_train :]
        return train, held_out + [asked[q % len(asked)] for q in range(self.num_queries)]

    def data(self) -> tuple[Data, Data]:
        """Latents of training images and of held-out ones, with the states of their captions."""
        train, held_out = (self.pipeline.autoencoder.encode(images) for images in super().data())
        words, asked = self.words()
        return self._captioned(train, words), self._captioned(held_out, asked[: len(held_out)])

    def queries(self, generated: Tensor) -> Data:
        """Held-out latents, then generated ones."""
        held_out = self.pipeline.autoencoder.encode(super().data()[1])
        return self._captioned(torch.cat([held_out, generated]), self.words()[1])

    def _captioned(self, latents: Tensor, captions: list[str]) -> dict[str, Tensor]:
        return {"x0": latents, "encoder_hidden_states": self.pipeline.embedded(captions)}

    def pixels(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """The training images, and held-out ones before generated ones."""
        train, held_out = super().data()
        return train, torch.cat([held_out, self.pipeline.autoencoder.decode(generated)])

    @property
    def scheduler(self) -> DDPMScheduler:
        """The pipeline's noise levels."""
        return self.pipeline.scheduler

    def _batches(self, data: Data, steps: int) -> Iterator[tuple[Tensor, ...]]:
        own = data["x0"], data["encoder_hidden_states"]
        return noised(self.pipeline, *own, self.batch, steps)

    def trained(
        self,
        x0: Data,
        steps: int,
        seed: int,
        keep: Callable[[int, UNet2DConditionModel], None] | None = None,
    ) -> UNet2DConditionModel:
        """The network with an adapter trained on some images; options as of a whole network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.make_network()
            trained = [weight for weight in network.parameters() if weight.requires_grad]
            batches = minimized(trained, self.rate, self._batches(x0, steps), steps)
            for step, batch in enumerate(batches):
                if keep is not None:
                    keep(step, network)
                loss_of(network, batch).backward()
        return network.eval()

    def kept(self, network: UNet2DConditionModel) -> dict[str, Tensor]:
        """The adapter's weights."""
        return {k: z.detach() for k, z in network.named_parameters() if z.requires_grad}

    def loaded(self, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
        """The network with given weights of the adapter."""
        network = self.make_network()
        found = network.load_state_dict({k: z.float() for k, z in weights.items()}, strict=False)
        assert not found.unexpected_keys
        assert not weights.keys() & set(found.missing_keys)
        return network.eval()

    def generated(self, network: UNet2DConditionModel) -> Tensor:
        """Latents sampled with the adapter."""
        states = self.pipeline.embedded(self.words()[1][-self.num_queries :])
        return replace(self.pipeline, unet=network).sampled(states, seed=2)

    def beside(self, first: UNet2DConditionModel, generated: Tensor) -> dict[str, Tensor]:
        """A second training on all images; measurements of the base and of both, ``[3, M, Q]``."""
        second = self.trained(self.data()[0], self.steps, SECOND_SEED)
        queries = self.queries(generated)
        untrained = self.make_network().eval()
        found = [self.measured(network, queries) for network in (untrained, first, second)]
        weights = {f"second/{name}": z for name, z in self.kept(second).items()}
        return {**weights, "base_first_second": torch.stack(found)}


def _with_adapter(width: int, rank: int) -> UNet2DConditionModel:
    """The pipeline's UNet with an adapter that does nothing yet."""
    network = deepcopy(pipeline(width).unet)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    return network


_styles = AdapterProblem(
    "styles",
    lambda: pictures(all_captions(STYLES, 152), seed=3),
    lambda: _with_adapter(32, 4),
    num_train=120,
    steps=400,
    batch=32,
    num_halves=48,
    num_queries=32,
    captions=lambda: all_captions(STYLES, 152),
)
PROBLEMS: dict[str, Problem] = {
    **problems.PROBLEMS,
    **{
        problem.name: problem
        for problem in (
            _styles,
            replace(
                _styles,
                name="dreambooth",
                images=lambda: things(48, seed=4),
                captions=lambda: 48 * ["a sks thing"],
                num_train=16,
                steps=160,
                num_halves=32,
            ),
            replace(
                _styles,
                name="tiny-adapter",
                make_network=lambda: _with_adapter(8, 2),
                rank=2,
                width=8,
                **TINY,
            ),
        )
    },
}
