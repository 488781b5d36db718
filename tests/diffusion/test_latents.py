"""Kept latents and embeddings are found again only for what they were made of, all of it."""

from functools import partial

import pytest
import torch
import transformers
from torch import nn

from curvlinops_diffusion import DenoisingObjective, Encoded, LatentEncoder, NoisedRegression
from curvlinops_diffusion.diffusion import latents
from curvlinops_diffusion.runtime.digests import fingerprint
from tests.cases import images, noise_levels
from tests.diffusion.test_pipelines import flux, pixart, stable_diffusion, vae

X0 = images(2, channels=3, dtype=torch.float32)


def autoencoder(**options):
    torch.manual_seed(0)
    return vae(**options).eval()


def scaled(factor, x0, condition):
    return {"embeds": factor * x0.flatten(1)}


class Scaled:
    """An object that embeds; what it has seen is no part of what it computes."""

    def __init__(self, factor):
        self.factor, self.seen = factor, []

    def __call__(self, x0, condition):
        self.seen.append(len(x0))
        return scaled(self.factor, x0, condition)


def tiled():
    found = autoencoder()
    found.enable_tiling()
    found.tile_sample_min_size = found.tile_latent_min_size = 4
    return found


DIFFERENT = {
    "scaling": [partial(autoencoder, scaling_factor=s) for s in (0.1, 0.2)],
    "shift": [partial(autoencoder, shift_factor=s) for s in (0.1, 0.2)],
    "activation": [partial(autoencoder, act_fn=name) for name in ("silu", "gelu")],
    "tiles": [autoencoder, tiled],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_autoencoders_of_the_same_weights(tmp_path, kind):
    plain = [LatentEncoder(make()) for make in DIFFERENT[kind]]
    cached = [LatentEncoder(make(), cache=tmp_path) for make in DIFFERENT[kind]]
    for one, other in zip(plain, cached, strict=True):
        expected = one(X0, {})
        for _ in range(2):
            assert torch.equal(other(X0, {}).mean, expected.mean)
    assert len(list(tmp_path.iterdir())) == 2
    assert plain[0].description != plain[1].description


FUNCTIONS = {
    "lambdas": [{"embed": lambda x0, c: {"e": x0 + 1}}, {"embed": lambda x0, c: {"e": x0 + 2}}],
    "arguments": [{"embed": partial(scaled, 1)}, {"embed": partial(scaled, 2)}],
    "attributes": [{"embed": Scaled(1)}, {"embed": Scaled(2)}],
    "packing": [{"pack": lambda z: z.flatten(1)}, {"pack": lambda z: z.flatten(2)}],
    "settings": [{"settings": {"length": 77}}, {"settings": {"length": 256}}],
    "sampling": [{"sample": True}, {"sample": False}],
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_and_settings(tmp_path, kind):
    for options in FUNCTIONS[kind]:
        expected = LatentEncoder(autoencoder(), **options)(X0, {})
        for _ in range(2):
            found = LatentEncoder(autoencoder(), cache=tmp_path, **options)(X0, {})
            assert torch.equal(found.mean, expected.mean)
            assert (found.std is None) == (expected.std is None)
            assert all(torch.equal(z, found.condition[k]) for k, z in expected.condition.items())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("how", ["in place", "other memory", "config"])
def test_an_encoder_that_changes(tmp_path, how):
    """What is encoded afterwards is not kept as if it were of before."""
    model = autoencoder(scaling_factor=0.1)
    encoder = LatentEncoder(model, cache=tmp_path)
    before = encoder(X0, {}).mean
    with torch.no_grad():
        if how == "in place":
            model.quant_conv.weight.mul_(2)
        elif how == "other memory":
            model.quant_conv.weight.data = 2 * model.quant_conv.weight.data
        else:
            model.register_to_config(scaling_factor=0.3)
    after = LatentEncoder(model)(X0, {}).mean
    assert not torch.equal(before, after)
    assert torch.equal(encoder(X0, {}).mean, after)
    assert torch.equal(
        LatentEncoder(autoencoder(scaling_factor=0.1), cache=tmp_path)(X0, {}).mean, before
    )


def heads(pipeline):
    """The same text encoder with its attention in other heads."""
    torch.manual_seed(1)
    pipeline.text_encoder.config.num_attention_heads = 4
    other = type(pipeline.text_encoder)(pipeline.text_encoder.config)
    other.load_state_dict(pipeline.text_encoder.state_dict())
    pipeline.text_encoder = other.eval()


def swapped(pipeline):
    """A tokenizer of as many words, in another order."""
    own = pipeline.tokenizer.get_vocab()
    own["a</w>"], own["b</w>"] = own["b</w>"], own["a</w>"]
    pipeline.tokenizer = transformers.CLIPTokenizer(vocab=own, merges=[], model_max_length=8)


@pytest.mark.parametrize("change", [heads, swapped])
def test_prompts_in_a_pipeline(tmp_path, change):
    """Other heads of the text encoder, or another vocabulary, are other embeddings."""
    condition = {"prompt": ["a", "b"]}
    for changed in (False, True):
        torch.manual_seed(0)
        pipeline = stable_diffusion(tmp_path)
        if changed:
            change(pipeline)
        expected, found = (
            DenoisingObjective.from_pipeline(pipeline, latent_cache=cache)._encode(X0, condition)
            for cache in (None, tmp_path / "cache")
        )
        key = "encoder_hidden_states"
        assert torch.equal(found.condition[key], expected.condition[key])
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("make", [stable_diffusion, flux, pixart])
def test_the_denoiser_is_no_part_of_it(tmp_path, make):
    """Latents of one pipeline are those of another whose denoiser alone was trained on."""
    for scale in (1, 2):
        torch.manual_seed(0)
        pipeline = make(tmp_path)
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        with torch.no_grad():
            next(denoiser.parameters()).mul_(scale)
        objective = DenoisingObjective.from_pipeline(pipeline, latent_cache=tmp_path / "cache")
        objective._encode(X0, {"prompt": ["a", "b"]})
    assert len(list((tmp_path / "cache").iterdir())) == 1


class Counting(Scaled):
    """Counts its calls, too."""

    calls = 0

    def __call__(self, x0, condition):
        self.calls += 1
        return super().__call__(x0, condition)


def test_an_embedding_that_counts_its_calls(tmp_path):
    embed = Counting(2.0)
    encoder = LatentEncoder(embed=embed, cache=tmp_path)
    before = encoder.description
    for _ in range(3):
        assert torch.equal(encoder(X0, {}).condition["embeds"], 2 * X0.flatten(1))
    assert LatentEncoder(embed=Counting(2.0), cache=tmp_path).description == before
    assert encoder.description == before
    assert embed.calls == 1


def test_checkpoints_of_functions_that_count(tmp_path):
    """Of an ``encode`` and an augmentation: what is looked at after calls is as before them."""
    calls = []

    class Encode(Counting):
        def __call__(self, x0, condition):
            return Encoded(x0, None, super().__call__(x0, condition) and {})

    def mirrored(x0):
        calls.append(1)
        return x0.flip(-1)

    def described():
        model = nn.Conv2d(3, 3, 1)
        model.forward = lambda x, t: nn.Conv2d.forward(model, x)
        objective = DenoisingObjective(model, noise_levels(), encode=Encode(1.0))
        return NoisedRegression(objective, X0, 1, augment=[mirrored])

    regression = described()
    before = regression.description
    for clean in regression.clean_batches():
        list(regression.noised_batches(clean))
    assert calls
    assert regression.description == before


@pytest.mark.parametrize("how", ["moved", "activation", "kind", "module", "enclosed"])
def test_encoders_are_looked_at_again_if_touched(tmp_path, monkeypatch, how):
    """A move computes nothing anew; other settings and modules, and what `embed` encloses, do."""
    network = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1))
    counted = []

    def embed(x0, condition):
        counted.append(1)
        return {"embeds": network(x0[:, :, 0, 0])}

    monkeypatch.setattr(latents, "fingerprint", lambda m: counted.append("read") or fingerprint(m))
    encoders = [] if how == "enclosed" else [network]
    encoder = LatentEncoder(embed=embed, encoders=encoders, cache=tmp_path)
    encoder(X0, {})
    del counted[:]
    if how in ("moved", "enclosed"):
        network[0].weight.data = (1 if how == "moved" else 2) * network[0].weight.data
    elif how == "activation":
        network[1].negative_slope = 0.5
    elif how == "kind":
        network[1] = nn.SiLU()
    else:
        network[0] = nn.Linear(3, 3)
    found = encoder(X0, {}).condition["embeds"]
    assert counted == (["read"] if how == "moved" else ["read", 1])
    assert torch.equal(found, network(X0[:, :, 0, 0]))
