"""Objectives read off pipelines, tiny and random, saved and loaded by ``diffusers`` itself."""

import json

import pytest
import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    LDMPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from benchmarks.models import tiny_conditional_unet, tiny_dit, tiny_flux, tiny_sd3, tiny_unet
from curvlinops_diffusion import (
    DenoisingObjective,
    DiffusionEKFACLinearOperator,
    ExampleGradientLinearOperator,
    LatentEncoder,
    NoisedRegression,
    PredictionType,
    influence_scores,
)
from curvlinops_diffusion.diffusion.pipelines import by_interface, pipeline_parts
from curvlinops_diffusion.diffusion.prompted import Training
from curvlinops_diffusion.diffusion.training_arguments import training_arguments
from tests.cases import images, plain_regression, seeded
from tests.comparisons import assert_close
from tests.reference import example_gradients, params_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = ["a cat", "two dogs", "a dog"]

# ---------------------------------------------------------------------------------------------
# Tiny pipelines
# ---------------------------------------------------------------------------------------------


def clip_tokenizer(folder):
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )


def t5_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "two", "cat", "dog", "dogs"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=8,
    )


def clip(projection=False, size=8):
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=size,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config)


def t5():
    config = transformers.T5Config(
        vocab_size=8,
        d_model=6,
        d_kv=3,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def vae(latent_channels=2, blocks=2, **options):
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=8,
        **options,
    )


def unet(channels, size=4):
    return tiny_unet(
        sample_size=size, in_channels=channels, out_channels=channels, num_class_embeds=None
    )


def ddpm(folder):
    return DDPMPipeline(unet(3, size=8), DDPMScheduler(prediction_type="v_prediction"))


def ddim(folder):
    return DDIMPipeline(unet(3, size=8), DDIMScheduler())


def ldm(folder):
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        latent_channels=2,
        num_vq_embeddings=5,
        norm_num_groups=2,
        scaling_factor=0.3,
    )
    return LDMPipeline(vq, unet(2), DDIMScheduler())


def dit(folder):
    return DiTPipeline(tiny_dit(), vae(), DDIMScheduler())


def stable_diffusion(folder):
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        unet=tiny_conditional_unet(cross_attention_dim=8),
        scheduler=PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_unet(**options):
    return tiny_conditional_unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=20,
        **options,
    )


def stable_diffusion_xl(folder):
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        unet=xl_unet(),
        scheduler=EulerDiscreteScheduler(),
    )


def stable_diffusion_3(folder):
    transformer = tiny_sd3(joint_attention_dim=16, pooled_projection_dim=16)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flux(folder):
    return FluxPipeline(
        transformer=tiny_flux(pooled_projection_dim=8),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(folder),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart(folder):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=4,
        patch_size=2,
        caption_channels=6,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        t5_tokenizer(), t5(), vae(), transformer, DPMSolverMultistepScheduler()
    )


def gemma():
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            pad_token_id=0,
        )
    )


def sana(folder):
    """Latents of a deterministic autoencoder, times scaled, flow matching."""
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=4,
        timestep_scale=0.5,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(t5_tokenizer(), gemma(), autoencoder, transformer, scheduler)


def qwen_image(folder):
    """Latents of an autoencoder of videos, packed; the positions of tokens as a list."""
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.0, -0.1],
        latents_std=[1.5, 1.0, 0.8, 1.2],
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = ("vision_start", "vision_end", "vision", "image", "video")
    config = transformers.Qwen2_5_VLConfig(
        text_config={**sizes, **text, "rope_scaling": rope, "rope_theta": 1e6, "vocab_size": 8},
        vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16},
        **{f"{name}_token_id": 7 for name in special},
    )
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder,
        transformers.Qwen2_5_VLForConditionalGeneration(config),
        t5_tokenizer(),
        transformer,
    )


def qwen3(layers):
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=8,
            hidden_size=4,
            intermediate_size=4,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=4,
        )
    )


def chat_tokenizer():
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "dog {{ messages[0]['content'] }}"
    return tokenizer


def flux_2(folder):
    """Latents standardised by the statistics of a batch norm, and packed."""
    transformer = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=12,
        timestep_guidance_channels=4,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(4, 4),
        latent_channels=2,
        norm_num_groups=2,
    )
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(), autoencoder, qwen3(28), chat_tokenizer(), transformer
    )


def z_image(folder):
    """Lists of images and embeddings, times that fall with the noise, and a negated answer."""
    transformer = ZImageTransformer2DModel(
        in_channels=2,
        dim=8,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=4,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 64, 64],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.1, scaling_factor=0.4),
        qwen3(2),
        chat_tokenizer(),
        transformer,
    )


def lumina_2(folder):
    """A negated answer, and times that fall with the noise."""
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=2,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=8,
    )
    return Lumina2Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(),
        vae(blocks=4, shift_factor=0.1, scaling_factor=0.4),
        gemma(),
        t5_tokenizer(),
    )


def sd_parts(folder, **unet_options):
    """Parts of Stable Diffusion 1, and nothing that checks what it paints."""
    parts = stable_diffusion(folder).components
    parts["unet"] = tiny_conditional_unet(cross_attention_dim=8, **unet_options)
    return {k: v for k, v in parts.items() if k != "image_encoder"}


def xl_parts(folder, **unet_options):
    parts = stable_diffusion_xl(folder).components
    parts["unet"] = xl_unet(**unet_options)
    return {k: v for k, v in parts.items() if k not in {"image_encoder", "feature_extractor"}}


def controlnet(unet):
    """With random weights where training starts from zero."""
    found = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4))
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return found


def sd_inpainting(folder):
    parts = sd_parts(folder, in_channels=9, out_channels=4) | {"vae": vae(4)}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def xl_inpainting(folder):
    parts = xl_parts(folder, in_channels=9, out_channels=4) | {"vae": vae(4)}
    return StableDiffusionXLInpaintPipeline(**parts)


def sd_controlled(folder):
    parts = sd_parts(folder)
    return StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet(parts["unet"]), requires_safety_checker=False
    )


def xl_controlled(folder):
    parts = xl_parts(folder)
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))


UNCONDITIONAL = [ddpm, ddim, ldm]
BY_INTERFACE = [pixart, sana, qwen_image, flux_2, z_image, lumina_2]
INPAINTING = [sd_inpainting, xl_inpainting]
CONTROLLED = [sd_controlled, xl_controlled]
WITH_IMAGES = [*INPAINTING, *CONTROLLED]
PROMPTED = [
    *(stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux),
    *BY_INTERFACE,
    *WITH_IMAGES,
]
PIPELINES = [*UNCONDITIONAL, dit, *PROMPTED]


def made(make, tmp_path):
    """A pipeline, saved and loaded again."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make(folder)
    pipeline.save_pretrained(tmp_path / "pipeline")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if make is stable_diffusion_3 else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", **absent)
    loaded.set_progress_bar_config(disable=True)
    if make is qwen_image:  # its template is of more tokens than the tiny tokenizer knows
        loaded.prompt_template_encode, loaded.prompt_template_encode_start_idx = "{}", 0
    return loaded


def fresh(make, folder):
    """A pipeline, as it would be loaded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make(folder)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def data_for(make, size=None):
    size = size_of(make) if size is None else size
    x0 = images(3, channels=3, size=size, dtype=torch.float32).tanh()
    if make in UNCONDITIONAL:
        return x0
    if make in WITH_IMAGES:
        name, channels = ("mask_image", 1) if make in INPAINTING else ("conditioning_image", 3)
        beside = images(3, channels=channels, size=size, dtype=torch.float32).sigmoid()
        return [
            {"x0": x0[part], "prompt": PROMPTS[part], name: beside[part]}
            for part in (slice(2), slice(2, 3))
        ]
    second = torch.arange(3) if make is dit else PROMPTS
    return [(x0[:2], second[:2]), (x0[2:], second[2:])]


def size_of(make):
    """Pixels of an image."""
    return {sana: 32, qwen_image: 16, lumina_2: 16}.get(make, 8)


# ---------------------------------------------------------------------------------------------


def named(*makes):
    return pytest.mark.parametrize("make", makes, ids=lambda make: make.__name__)


@named(stable_diffusion, z_image)
def test_from_pipeline_to_scores(make, tmp_path):
    objective = DenoisingObjective.from_pipeline(fresh(make, tmp_path), condition_dropout=0.3)
    regression = NoisedRegression(objective, data_for(make), 2)
    EK = DiffusionEKFACLinearOperator(regression)
    assert list(EK.param_names) == [name for name, _ in objective.model.named_parameters()]
    J = ExampleGradientLinearOperator(regression)
    rows = example_gradients(regression, params_of(objective.model))
    assert_close(J.rows().double(), rows, 1e-4)
    inverse = EK.inverse(1e-3)
    scores = influence_scores(J, inverse, J)
    assert_close(scores, rows.float() @ (inverse @ rows.float().T) / 3, 1e-3)
    assert (scores.diag() > 0).all()


@named(*(make for make in PIPELINES if make not in (ddim, sd_inpainting, xl_controlled)))
def test_what_the_network_sees_is_what_the_pipeline_shows_it(make, tmp_path, monkeypatch):
    """The pipeline's own sampling, one step, against our arguments for a prediction."""
    pipeline = made(make, tmp_path)
    # a prompt of no tokens has no embedding, without Qwen-Image's template
    dropout = 0.0 if make in (*UNCONDITIONAL, qwen_image) else 1e-9
    objective = DenoisingObjective.from_pipeline(
        pipeline, sample_latents=False, condition_dropout=dropout
    )
    data = data_for(make)
    data = data[:2] if make in UNCONDITIONAL else data
    batch = next(NoisedRegression(objective, data, 1).batches())
    # what a dropped one is replaced by: an embedding of another prompt
    null = {k: z for k, z in objective.null_condition.items() if isinstance(z, torch.Tensor)}
    given = {name: batch.condition[name][0] for name in null}
    assert all(value.shape == given[name].shape for name, value in null.items())
    assert not null or any(not torch.equal(value, given[name]) for name, value in null.items())
    seen = []
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    assert model in {objective.model, *objective.model.children()}
    model = getattr(pipeline, "controlnet", model)  # whose answers the UNet is given
    original = type(model).forward

    def forward(self, *args, **kwargs):
        seen.append((args, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forward)
    objective.predict(batch)
    options = {"num_inference_steps": 1, "output_type": "np"}
    if make in UNCONDITIONAL:
        pipeline(batch_size=2, **options)
    elif make is dit:
        pipeline([0, 1], guidance_scale=1.0, **options)
    else:
        if make in (pixart, sana):
            options["use_resolution_binning"] = False
        taken = _arguments(type(pipeline).__call__)
        told = objective.training_arguments
        options |= {name: value for name, value in told.items() if name in taken}
        size = size_of(make)
        if make in INPAINTING:  # whose latents are drawn there
            monkeypatch.setattr(
                DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
            )
            options |= {"image": data[0]["x0"], "mask_image": data[0]["mask_image"]}
            options["strength"] = 1.0
        elif make in CONTROLLED:
            options["image"] = data[0]["conditioning_image"]
        options.setdefault("guidance_scale", 0.0 if make is z_image else 1.0)
        pipeline(prompt=PROMPTS[:2], height=size, width=size, **options)
    ours, theirs = seen[0], seen[-1]
    named = [
        {**dict(zip(_arguments(original), args, strict=False)), **kwargs}
        for args, kwargs in (ours, theirs)
    ]
    ours, theirs = ({k: v for k, v in n.items() if _tensors(v)} for n in named)
    assert ours.keys() >= theirs.keys() - {"timestep", "encoder_attention_mask"}
    for key in theirs.keys() & ours.keys():
        if key == "x":
            assert [z.shape for z in ours[key]] == [z.shape for z in theirs[key]]
        elif key in {"sample", "hidden_states"}:
            assert ours[key].shape == theirs[key].shape
        elif key not in {"timestep", "t"}:
            _assert_equal(ours[key], theirs[key], key)
    if make in INPAINTING:  # beside the noised latents
        assert_close(ours["sample"][:, 4:], theirs["sample"][:, 4:], 1e-6)
    if make is flux:  # told between zero and one
        assert 0 < float(ours["timestep"].max()) <= 1
        assert 0 < float(theirs["timestep"].max()) <= 1


def test_the_interface_tells_what_was_written_by_hand(tmp_path):
    """A pipeline that has an entry of its own, taken apart by looking at what it does."""
    pipeline = fresh(stable_diffusion, tmp_path)
    by_hand = pipeline_parts(pipeline, False)
    seen = by_interface(pipeline, Training(training_arguments(pipeline, None, False)))
    assert seen.model is by_hand.model
    assert_close(seen.process.timesteps_T.double(), by_hand.process.timesteps_T.double(), 1e-6)
    x0, prompts = data_for(stable_diffusion)[0]
    ours, theirs = (parts.encode(x0, {"prompt": list(prompts)}) for parts in (seen, by_hand))
    assert torch.equal(ours.mean, theirs.mean)
    x_t = ours.mean
    told = [
        {**e.condition, **(p.model_kwargs(x_t, e.condition) if p.model_kwargs else {})}
        for e, p in ((ours, seen), (theirs, by_hand))
    ]
    for key, value in told[1].items():
        _assert_equal(told[0][key], value, key)
    null = [parts.null_condition() for parts in (seen, by_hand)]
    assert null[0].keys() == null[1].keys()


@named(*BY_INTERFACE, flux, stable_diffusion_3)
def test_pipelines_in_low_precision(make, tmp_path):
    """Taken apart all the same: latents are arranged as ever, and no time is rounded."""
    pipeline = fresh(make, tmp_path)
    times_T = pipeline_parts(pipeline, False).process.timesteps_T
    objective = DenoisingObjective.from_pipeline(pipeline.to(torch.bfloat16))
    assert objective.dtype == torch.bfloat16
    assert torch.equal(objective.process.timesteps_T.cpu(), times_T)
    batch = next(NoisedRegression(objective, data_for(make), 1).batches())
    assert objective.predict(batch).isfinite().all()


@named(stable_diffusion, stable_diffusion_xl)
def test_text_encoders_that_were_trained_too(make, tmp_path):
    """The same predictions, from tokens on; gradients of the encoders, against autograd."""
    pipeline = fresh(make, tmp_path)
    data = data_for(make)
    own, joint = (
        DenoisingObjective.from_pipeline(
            pipeline, condition_dropout=0.3, sample_latents=False, text_encoders=trained
        )
        for trained in (False, True)
    )
    regressions = [NoisedRegression(objective, data, 2) for objective in (own, joint)]
    for ours, theirs in zip(*(r.batches() for r in regressions), strict=True):
        assert_close(joint.predict(theirs).double(), own.predict(ours).double(), 1e-5)
    names = [n for n, _ in joint.model.named_parameters() if "layers.0.mlp" in n or "conv_out" in n]
    assert {name.split(".")[0] for name in names} == {
        "unet",
        *(name for name in pipeline.components if name.startswith("text_encoder")),
    }
    J = ExampleGradientLinearOperator(regressions[1], names)
    rows = example_gradients(regressions[1], params_of(joint.model, names))
    assert_close(J.rows().double(), rows, 1e-3)


@named(sd_inpainting, xl_controlled)
def test_images_beside_the_images(make, tmp_path):
    """They are needed, of the images' size and in their range; another one, another loss."""
    objective = DenoisingObjective.from_pipeline(fresh(make, tmp_path), sample_latents=False)
    first = data_for(make)[0]
    name = next(iter(objective.model.images))

    def losses(**changed):
        batch = next(NoisedRegression(objective, [first | changed], 1).batches())
        return batch.loss(objective.predict(batch))

    other = first[name].flip(0)
    assert not torch.allclose(losses(), losses(**{name: other}), rtol=1e-2)
    for value, message in (
        (2 * (first[name] > 0.5).float() - 1, "got numbers from -1 to 1"),
        (torch.zeros(2, 4, 8, 8), r"got shape \(2, 4, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' must hold numbers in .*{message}"):
            losses(**{name: value})
    with pytest.raises(ValueError, match=f"'{name}' must hold numbers in .*got none"):
        J_of(objective, [(first["x0"], first["prompt"])]).rows()
    # mirrored with the image, if training did
    flipped = NoisedRegression(
        objective, [first], 4, augment="flip", augmented_conditions=[name], seed=1
    )
    mirrored = first | {key: first[key].flip(-1) for key in ("x0", name)}
    plain = [NoisedRegression(objective, [d], 4, seed=1) for d in (first, mirrored)]
    for batch, *both in zip(flipped.batches(), *(r.batches() for r in plain), strict=True):
        found, *known = (b.loss(objective.predict(b)) for b in (batch, *both))
        nearest = torch.stack([(found - k).abs() for k in known]).min(0).values
        assert (nearest < 1e-5 * found).all()


def test_pipelines_for_painting_whose_unet_sees_no_mask(tmp_path):
    pipeline = StableDiffusionInpaintPipeline(**sd_parts(tmp_path), requires_safety_checker=False)
    objective = DenoisingObjective.from_pipeline(pipeline)
    assert objective.model is pipeline.unet


def J_of(objective, data):
    return ExampleGradientLinearOperator(NoisedRegression(objective, data, 1))


def test_pipelines_that_do_something_else_are_refused(tmp_path):
    """With the reason; and nothing of what was put in its place to look at it stays."""
    pipeline = fresh(pixart, tmp_path)

    class Scaled(PixArtSigmaPipeline):
        def prepare_latents(self, *args, **kwargs):
            return 2 * super().prepare_latents(*args, **kwargs)

    scaled = Scaled(**pipeline.components)
    with pytest.raises(
        ValueError, match=r"off a Scaled: latents are scaled or arranged in another way"
    ):
        DenoisingObjective.from_pipeline(scaled)
    assert scaled.scheduler is pipeline.scheduler
    assert scaled.scheduler.num_inference_steps is None  # it has not sampled
    for part, name in ((scaled.transformer, "forward"), (scaled.vae, "decode")):
        assert name not in vars(part)


def _arguments(forward):
    import inspect

    return list(inspect.signature(forward).parameters)[1:]


def _tensors(value):
    return isinstance(value, torch.Tensor | list) or (isinstance(value, dict) and len(value) > 0)


def _assert_equal(ours, theirs, key):
    if theirs is None:
        assert ours is None
        return
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for inner in theirs:
            _assert_equal(ours[inner], theirs[inner], f"{key}.{inner}")
        return
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for n, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _assert_equal(one, other, f"{key}[{n}]")
        return
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs
        return
    torch.testing.assert_close(ours, theirs.to(ours.dtype), msg=lambda m: f"{key}: {m}")


@named(ldm, dit, stable_diffusion_3)
def test_latents_decode_to_the_images(make, tmp_path):
    """Scaled and shifted as the pipeline undoes it before decoding."""
    pipeline = fresh(make, tmp_path)
    objective = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    regression = NoisedRegression(objective, data_for(make), 1)
    clean = next(regression.clean_batches())
    encoded = objective.encode(clean)
    assert encoded.std is None
    autoencoder = pipeline.vqvae if make is ldm else pipeline.vae
    with torch.no_grad():
        output = autoencoder.encode(clean.x0)
    plain = output.latents if make is ldm else output.latent_dist.mean
    shift = {stable_diffusion_3: 0.1}.get(make, 0.0)
    scale = {stable_diffusion_3: 1.5, ldm: 0.3}.get(make, 0.18215)
    assert_close(encoded.mean, (plain - shift) * scale, 1e-6)


def test_latents_are_drawn(tmp_path):
    """With the autoencoder's mean and deviation, over many draws at the lowest noise."""
    autoencoder = vae()
    objective = DenoisingObjective(unet(2), DDPMScheduler(), encode=LatentEncoder(autoencoder))
    x0, sigma = images(1, channels=3, dtype=torch.float32), objective.process.sigmas_T[0].float()
    batches = NoisedRegression(objective, x0, 400, timesteps=[0]).batches()
    z = torch.stack([b.x_t[0] - sigma * b.target_BD[0].reshape(b.x_t[0].shape) for b in batches])
    with torch.no_grad():
        latent = autoencoder.encode(x0).latent_dist
    scale = 0.18215
    error = (z.mean(0) - latent.mean[0] * scale) / (latent.std[0] * scale / 400**0.5)
    assert error.square().mean().sqrt() < 1.5
    assert_close(z.std(0).mean(), latent.std[0].mean() * scale, 0.05)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_condition_dropout_is_drawn_like_noise():
    """With its probability, as a function of (seed, example, draw)."""
    network = seeded(torch.nn.Linear(3, 3), dtype=torch.float32)
    regression = plain_regression(network, (3,), dtype=torch.float32)
    objective = DenoisingObjective(
        network,
        regression.objective.process,
        condition_dropout=0.25,
        null_condition={"class_labels": 9, "added": {"text": torch.full((2,), 7.0)}},
    )
    N = 40
    data = {
        "x0": torch.randn(N, 3),
        "class_labels": torch.arange(N) % 3,
        "added": {"text": torch.randn(N, 2), "kept": torch.randn(N)},
    }
    dropped = {}
    for batch_size in (7, N):
        found = torch.zeros(N, 30, dtype=torch.bool)
        for batch in NoisedRegression(objective, data, 30, batch_size=batch_size).batches():
            labels, added = batch.condition["class_labels"], batch.condition["added"]
            indices = torch.tensor(list(batch.indices))
            mask = labels == 9
            assert torch.equal(labels[~mask], data["class_labels"][indices][~mask])
            assert (added["text"][mask] == 7).all()
            assert torch.equal(added["text"][~mask], data["added"]["text"][indices][~mask])
            assert torch.equal(added["kept"], data["added"]["kept"][indices])
            found[indices, batch.common_draw] = mask
        dropped[batch_size] = found
    assert torch.equal(dropped[7], dropped[N])
    deviation = (found.float().mean() - 0.25) / (0.25 * 0.75 / found.numel()) ** 0.5
    assert abs(deviation) < 4


def test_the_cache_of_latents(tmp_path, monkeypatch):
    """The same with and without; a second pass encodes nothing; other images are other files."""
    pipeline = fresh(flux, tmp_path)
    plain = DenoisingObjective.from_pipeline(pipeline)
    cached = DenoisingObjective.from_pipeline(pipeline, latent_cache=tmp_path / "cache")
    data = data_for(flux)

    def everything(objective):
        batches = list(NoisedRegression(objective, data, 2).batches())
        return [objective.predict(b).detach() for b in batches]

    first = everything(cached)
    for result, expected in zip(first, everything(plain), strict=True):
        assert_close(result, expected, 1e-5)  # tensors from files have another memory layout
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    monkeypatch.setattr(type(pipeline.vae), "encode", None)
    second, third = everything(cached), everything(cached)
    for results in zip(first, second, third, strict=True):
        assert_close(results[1], results[0], 1e-5)
        assert torch.equal(results[1], results[2])
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*Delete it"):
        everything(cached)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: DenoisingObjective.from_pipeline(3), r"one of \['DDIMPipeline'.*, got int"),
        (
            lambda p: DenoisingObjective.from_pipeline(p, condition_dropout=0.1),
            "`condition_dropout` must be 0 for a pipeline without a condition",
        ),
        (
            lambda p: DenoisingObjective(p.unet, p.scheduler, condition_dropout=0.1),
            r"`condition_dropout` must .* got 0.1 with null_condition=None",
        ),
        (
            lambda p: DenoisingObjective.from_pipeline(p, text_encoders=True),
            r"`text_encoders` can be .* got a DDPMPipeline",
        ),
        (lambda p: LatentEncoder(p.scheduler), "autoencoder must be an .* got DDPMScheduler"),
        (
            lambda p: list(
                NoisedRegression(
                    DenoisingObjective(
                        p.unet, p.scheduler, condition_dropout=0.5, null_condition={"label": 1}
                    ),
                    torch.zeros(2, 3, 8, 8),
                ).batches()
            ),
            r"must be those of the condition, \[\], got 'label'",
        ),
    ],
)
def test_errors(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(ddpm(tmp_path))


def test_prompts_beside_the_images(tmp_path):
    labelled = [(x, prompt) for x, prompt in zip(torch.zeros(3, 1, 2, 2), PROMPTS, strict=True)]
    loader = torch.utils.data.DataLoader(labelled, batch_size=2)
    regression = plain_regression(seeded(torch.nn.Linear(2, 2)), (2,))
    clean = list(NoisedRegression(regression.objective, loader).clean_batches())
    assert [p for c in clean for p in c.condition["prompt"]] == PROMPTS
    assert clean[0].select([1]).condition["prompt"] == PROMPTS[1:2]
    objective = DenoisingObjective.from_pipeline(fresh(stable_diffusion, tmp_path))
    x0 = images(3, channels=3, dtype=torch.float32)
    for beside in ({}, {"prompt": PROMPTS, "promt_2": torch.arange(3)}):
        with pytest.raises(ValueError, match=r"takes 'prompt' .*Pass pairs \(images, prompts\)"):
            next(NoisedRegression(objective, [{"x0": x0, **beside}], 1).batches())


def test_the_prediction_type_is_the_schedulers(tmp_path):
    objective = DenoisingObjective.from_pipeline(ddpm(tmp_path))
    assert objective.process.prediction_type is PredictionType.V


# ---------------------------------------------------------------------------------------------
# What stands beside the images
# ---------------------------------------------------------------------------------------------

SIZES = torch.tensor([[640.0, 512.0], [300.0, 400.0]])
CROPS = torch.tensor([[0.0, 64.0], [10.0, 0.0]])


def told(objective, **beside):
    data = {"x0": images(2, 3, 8, torch.float32), "prompt": PROMPTS[:2], **beside}
    batch = next(NoisedRegression(objective, [data], 1).batches())
    return batch.condition["added_cond_kwargs"]["time_ids"]


def test_sizes_and_crops_of_stable_diffusion_xl(tmp_path):
    """What training told the network of each image is what it is told."""
    objective = DenoisingObjective.from_pipeline(fresh(stable_diffusion_xl, tmp_path))
    plain = torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]]).expand(2, 6)
    assert torch.equal(told(objective), plain)
    whole = torch.cat([SIZES, CROPS, plain[:, 4:]], 1)
    assert torch.equal(told(objective, original_size=SIZES, crops_coords_top_left=CROPS), whole)
    assert torch.equal(told(objective, original_size=SIZES)[:, 2:], plain[:, 2:])
    assert torch.equal(told(objective, target_size=SIZES)[:, 4:], SIZES)
    assert torch.equal(told(objective, time_ids=whole), whole)
    for beside, message in (
        (
            {"time_ids": whole, "original_size": SIZES},
            r"or \['original_size'\], got both",
        ),
        (
            {"original_size": torch.ones(2, 3)},
            r"'original_size' must .* \(2, 2\), got \(2, 3",
        ),
        ({"added_cond_kwargs": {"time_ids": whole}}, r"takes 'prompt', 'original_size'"),
    ):
        with pytest.raises(ValueError, match=message):
            told(objective, **beside)


def test_latents_of_channels_with_means_of_their_own(tmp_path):
    """As of SDXL-like and video autoencoders: ``(z − mean_c) scale / std_c``."""
    x0 = images(2, 3, 8, torch.float32)
    mean, std = [0.5, -1.0], [2.0, 0.25]
    plain = vae(scaling_factor=1.0)
    scaled = vae(scaling_factor=3.0, latents_mean=mean, latents_std=std)
    scaled.load_state_dict(plain.state_dict())
    raw, found = (LatentEncoder(v)(x0, {}) for v in (plain, scaled))
    shift = torch.tensor(mean).reshape(1, 2, 1, 1)
    scale = 3.0 / torch.tensor(std).reshape(1, 2, 1, 1)
    assert_close(found.mean, (raw.mean - shift) * scale, 1e-6)
    assert_close(found.std, raw.std * scale, 1e-6)
    # the cache is of one transform
    cached = LatentEncoder(plain, cache=tmp_path / "cache")(x0, {})
    other = LatentEncoder(scaled, cache=tmp_path / "cache")(x0, {})
    assert torch.equal(cached.mean, raw.mean)
    assert torch.equal(other.mean, found.mean)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    twice = vae(shift_factor=0.1, latents_mean=mean)
    with pytest.raises(ValueError, match=r"has shift_factor=0.1 and latents_mean. Keep the one"):
        LatentEncoder(twice)(x0, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 5}, "takes 5 channels, and latents have 2: it was trained on more"),
        ({"time_cond_proj_dim": 4}, "an embedding of the guidance scale"),
    ],
)
def test_networks_that_take_more_than_their_pipeline_says(options, message, tmp_path):
    pipeline = stable_diffusion(tmp_path)
    pipeline.unet = tiny_conditional_unet(cross_attention_dim=8, **options)
    with pytest.raises(ValueError, match=message):
        DenoisingObjective.from_pipeline(pipeline)


def test_autoencoders_that_overflow():
    with pytest.raises(ValueError, match="in float16, and its config says force_upcast"):
        LatentEncoder(vae(force_upcast=True).half())
    LatentEncoder(vae(force_upcast=True))
    LatentEncoder(vae(force_upcast=False).half())


@named(stable_diffusion, flux)
def test_masks_of_pixels(make, tmp_path):
    """A latent's weight is the average over its pixels, in whatever form the network takes it."""
    pipeline = fresh(make, tmp_path)
    objective = DenoisingObjective.from_pipeline(pipeline)
    mask = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    x0, prompts = data_for(make, 16)[0]
    data = [{"x0": x0, "prompt": prompts, "seen": mask}]
    regression = NoisedRegression(objective, data, 2, loss_mask="seen")
    latents = objective.encode(next(regression.clean_batches())).mean
    averaged = torch.nn.functional.avg_pool2d(mask.unsqueeze(1), pipeline.vae_scale_factor)
    if make is not stable_diffusion:  # tokens of 2×2 latents, channel by channel
        h = averaged.shape[-1] // 2
        tokens = averaged.reshape(2, 1, h, 2, h, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, h * h, 4)
        expected = tokens.repeat(1, 1, latents.shape[-1] // 4)
    else:
        expected = averaged.expand_as(latents)
    for batch in regression.batches():
        assert_close(batch.mask_BD, expected.flatten(1), 1e-6)
    ExampleGradientLinearOperator(regression).values()
    of_colours = [{"x0": x0, "prompt": prompts, "seen": mask.unsqueeze(1).repeat(1, 3, 1, 1)}]
    with pytest.raises(ValueError, match=r"loss mask must have the shape .*, got \(3, "):
        next(NoisedRegression(objective, of_colours, 1, loss_mask="seen").batches())


# ---------------------------------------------------------------------------------------------
# Training scripts
# ---------------------------------------------------------------------------------------------


def sd3_with_t5(folder):
    pipeline = stable_diffusion_3(folder)
    config = t5().config
    config.d_model = pipeline.transformer.config.joint_attention_dim
    pipeline.register_modules(
        text_encoder_3=transformers.T5EncoderModel(config).eval(), tokenizer_3=t5_tokenizer()
    )
    return pipeline


def shifted_lumina_2(folder):
    pipeline = lumina_2(folder)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))
    return pipeline


def of_t5(pipeline, part, length):
    """Embeddings of prompts, cut or padded to so many tokens."""
    tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = tokenizer(PROMPTS[:2], return_tensors="pt", **options).input_ids
    return getattr(pipeline, part)(ids)[0]


def of_gemma(pipeline, length, start=""):
    """Embeddings and mask of Sana's and Lumina 2's scripts."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    prompts = [start + prompt for prompt in PROMPTS[:2]]
    tokens = pipeline.tokenizer(prompts, return_tensors="pt", **options)
    output = pipeline.text_encoder(**tokens, output_hidden_states=True)
    return output, tokens.attention_mask


def step_of(make, pipeline, z, eps, s, t):
    """A script's step at sigma ``s`` and time ``t``: arguments, and the answer that is right."""
    x_t, right = (1 - s) * z + s * eps, eps - z
    if make is sd3_with_t5:
        text = of_t5(pipeline, "text_encoder_3", 77)
        return {"hidden_states": x_t, "timestep": t, "encoder_hidden_states": text}, right
    if make is flux:
        text = of_t5(pipeline, "text_encoder_2", 512)
        packed = FluxPipeline._pack_latents(x_t, *x_t.shape)
        right = FluxPipeline._pack_latents(right, *x_t.shape)
        seen = {"hidden_states": packed, "timestep": t / 1000, "encoder_hidden_states": text}
        return seen | {"guidance": torch.full((2,), 3.5)}, right
    if make is sana:
        output, mask = of_gemma(pipeline, 300)
        seen = {"hidden_states": x_t, "timestep": t, "encoder_attention_mask": mask}
        return seen | {"encoder_hidden_states": output[0]}, right
    output, mask = of_gemma(pipeline, 256, pipeline.system_prompt + " <Prompt Start> ")
    seen = {"hidden_states": (1 - s) * eps + s * z, "timestep": t / 1000}
    seen |= {"encoder_hidden_states": output.hidden_states[-2], "encoder_attention_mask": mask}
    return seen, z - eps


@named(sd3_with_t5, flux, sana, shifted_lumina_2)
def test_a_step_of_the_training_script(make, tmp_path, monkeypatch):
    """Noised input, time, condition and target, in the script's formulas."""
    pipeline = fresh(make, tmp_path)
    objective = DenoisingObjective.from_pipeline(pipeline, sample_latents=False)
    size = size_of(lumina_2 if make is shifted_lumina_2 else make)
    x0 = images(2, channels=3, size=size, dtype=torch.float32).tanh()
    level = 700
    regression = NoisedRegression(objective, [(x0, PROMPTS[:2])], 1, timesteps=[level])
    batch = next(regression.batches())
    with torch.no_grad():
        output = pipeline.vae.encode(x0)
        z = output.latent if make is sana else output.latent_dist.mean
        z = (
            z - (pipeline.vae.config.get("shift_factor") or 0)
        ) * pipeline.vae.config.scaling_factor
        eps = regression.draws.noise([0, 1], 0, z.shape[1:])
        if make is flux:
            flat = regression.draws.noise([0, 1], 0, batch.x_t.shape[1:])
            eps = FluxPipeline._unpack_latents(flat, size, size, pipeline.vae_scale_factor)
        # scripts count from noise to data, and Lumina 2's share of data is the share of noise
        scheduler, T = pipeline.scheduler, objective.process.num_levels
        index = level if make is shifted_lumina_2 else T - 1 - level
        s, t = scheduler.sigmas[index], scheduler.timesteps[index].expand(2)
        expected, right = step_of(make, pipeline, z, eps, s, t)
    seen = {}

    def forward(self, *args, **kwargs):
        seen.update(dict(zip(_arguments(original), args, strict=False)), **kwargs)
        answers.append(original(self, *args, **kwargs))
        return answers[-1]

    answers, original = [], type(pipeline.transformer).forward
    monkeypatch.setattr(type(pipeline.transformer), "forward", forward)
    prediction = objective.predict(batch)
    for name, value in expected.items():
        found = seen[name]
        if make is sd3_with_t5 and name == "encoder_hidden_states":  # CLIP's come first
            assert found.shape[1] == 8 + 77
            found = found[:, 8:]
        _assert_equal(found, value, name)
    sign = -1 if make is shifted_lumina_2 else 1  # its network answers in the other direction
    assert_close(sign * batch.target_BD, right.flatten(1), 1e-5)
    assert_close(sign * prediction, answers[0][0].flatten(1), 1e-6)


def test_levels_of_lumina_2(tmp_path):
    """Shares of noise are those of data in the scheduler, unless training did not mirror them."""
    pipeline = shifted_lumina_2(tmp_path)
    share_T = 1 - pipeline.scheduler.sigmas.double()
    script, plain = (
        DenoisingObjective.from_pipeline(pipeline, training_arguments=arguments).process
        for arguments in (None, {"mirrored_levels": False})
    )
    assert_close(script.sigmas_T, share_T, 1e-7)
    assert_close(plain.sigmas_T, 1 - share_T.flip(0), 1e-7)
    for process in (script, plain):  # the network is told the share of data
        assert_close(process.timesteps_T.double(), process.alphas_T, 1e-6)


def test_latents_of_the_scripts(tmp_path):
    """Means where the script takes them."""
    for make, drawn in ((flux_2, False), (z_image, False), (pixart, True)):
        (tmp_path / make.__name__).mkdir()
        objective = DenoisingObjective.from_pipeline(make(tmp_path / make.__name__))
        clean = next(NoisedRegression(objective, data_for(make), 1).clean_batches())
        assert (objective.encode(clean).std is not None) == drawn
        assert objective.training_arguments.get("sample_latents", True) == drawn


@pytest.mark.parametrize(("make", "cached"), [(flux, False), (flux_2, True)])
def test_offset_noise_of_packed_latents(make, cached, tmp_path):
    """One number for each channel of the latents: for all tokens, and all four pixels of them."""
    pipeline = fresh(make, tmp_path)
    cache = tmp_path / "cache" if cached else None
    size = 2 * size_of(make)
    data = [(images(2, 3, size, torch.float32).tanh(), PROMPTS[:2])]
    plain, offset = (
        NoisedRegression(
            DenoisingObjective.from_pipeline(pipeline, latent_cache=cache), data, 2, noise_offset=o
        )
        for o in (0.0, 0.5)
    )
    for before, after in zip(plain.batches(), offset.batches(), strict=True):
        B, tokens, entries = after.x_t.shape
        C = entries // 4
        o = offset.draws.noise_offset(after.indices, after.common_draw, (C, 1, 1))
        expected = 0.5 * o.reshape(B, 1, C, 1).expand(B, tokens, C, 4).reshape(B, -1)
        assert_close(after.target_BD - before.target_BD, expected, 1e-5)
        sigma = plain.objective.process.sigmas_T[after.level_B].float()[:, None]
        assert_close((after.x_t - before.x_t).flatten(1), sigma * expected, 1e-4)


def test_arguments_of_training(tmp_path):
    """Others are other conditions, are described, and not read from a cache of the defaults."""
    pipeline = sd3_with_t5(tmp_path)
    data = [(images(2, 3, 8, torch.float32), PROMPTS[:2])]

    def objective(**arguments):
        return DenoisingObjective.from_pipeline(
            pipeline, latent_cache=tmp_path / "cache", training_arguments=arguments
        )

    for given in ({}, {"max_sequence_length": 9}, {"max_sequence_length": 9, "clip_skip": 1}):
        own = objective(**given)
        told = {"max_sequence_length": 77} | given
        assert own.description["training_arguments"] == told
        states = next(NoisedRegression(own, data, 1).batches()).condition["encoder_hidden_states"]
        clip, *_ = pipeline.encode_prompt(
            PROMPTS[:2], None, None, do_classifier_free_guidance=False, **told
        )
        assert_close(states, clip, 1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert objective(clip_skip=1).description["encoder"] != objective().description["encoder"]
    for given, message in (
        ({"guidance_scale": 2.0}, r"depends, got \['guidance_scale'\]"),
        ({"max_sequence_length": 0}, "must be a whole number of at least 1, got 0"),
        ({"sample_latents": 3}, "`sample_latents` must be True or False, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(**given)
    with pytest.raises(ValueError, match="timestep_scale` must be a finite number, got 'x'"):
        DenoisingObjective.from_pipeline(sana(tmp_path), training_arguments={"timestep_scale": "x"})


@named(stable_diffusion, stable_diffusion_xl)
def test_layers_of_text_encoders_that_were_skipped(make, tmp_path):
    """Whether the encoders are part of the network or not."""
    pipeline = fresh(make, tmp_path)
    found = {}
    for skip in (None, 0, 1):
        given = {} if skip is None else {"clip_skip": skip}
        for trained in (False, True):
            objective = DenoisingObjective.from_pipeline(
                pipeline, sample_latents=False, text_encoders=trained, training_arguments=given
            )
            batch = next(NoisedRegression(objective, data_for(make), 1).batches())
            found[skip, trained] = objective.predict(batch).double()
            if not trained:
                states = batch.condition["encoder_hidden_states"]
        assert_close(found[skip, True], found[skip, False], 1e-5)
    assert_close(found[0, False], found[None, False], 1e-5)
    assert relative(found[1, False], found[None, False]) > 1e-3
    tokens = pipeline.tokenizer(
        PROMPTS[:2], padding="max_length", max_length=8, truncation=True, return_tensors="pt"
    )
    encoder = pipeline.text_encoder
    hidden = encoder(tokens.input_ids, output_hidden_states=True).hidden_states
    if make is stable_diffusion:
        norms = [m for name, m in encoder.named_modules() if name.endswith("final_layer_norm")]
        assert_close(states, norms[0](hidden[-2]), 1e-6)
        if not hasattr(encoder, "text_model"):  # as the pipeline looks for it
            object.__setattr__(encoder, "text_model", encoder)
    else:  # the last layer is never used
        assert_close(states[..., : hidden[-3].shape[-1]], hidden[-3], 1e-6)
    told = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    own, *_ = pipeline.encode_prompt(PROMPTS[:2], clip_skip=1, **told)
    assert_close(states, own, 1e-6)
    with pytest.raises(ValueError, match=r"`clip_skip` must leave one of .* 2 layers, got 2"):
        DenoisingObjective.from_pipeline(pipeline, training_arguments={"clip_skip": 2})


@named(stable_diffusion, stable_diffusion_xl)
def test_prompts_in_several_parts(make, tmp_path):
    """As the tokens and states of kohya's strategy_base.py and strategy_sdxl.py, row by row."""
    pipeline, texts = fresh(make, tmp_path), ["a cat", "twodogsa" * 2, "abcdefghijkl"]
    xl = make is stable_diffusion_xl
    if xl:  # whose second tokenizer pads with another token
        pipeline.tokenizer_2.pad_token = "q"
        assert pipeline.tokenizer_2.pad_token_id != pipeline.tokenizer_2.eos_token_id
    names = ["", "_2"] if xl else [""]
    found = []
    for trained in (False, True):
        objective = DenoisingObjective.from_pipeline(
            pipeline,
            sample_latents=False,
            text_encoders=trained,
            training_arguments={"max_token_length": 18, "clip_skip": 0 if xl else 1},
        )
        data = [(images(3, 3, 8, torch.float32), texts)]
        batch = next(NoisedRegression(objective, data, 1).batches())
        found.append(objective.predict(batch).double())
        if not trained:
            condition = batch.condition
    assert_close(found[1], found[0], 1e-5)
    columns = []
    for name in names:
        tokenizer = getattr(pipeline, f"tokenizer{name}")
        encoder = getattr(pipeline, f"text_encoder{name}")
        norms = [m for key, m in encoder.named_modules() if key.endswith("final_layer_norm")]
        eos, pad, rows = tokenizer.eos_token_id, tokenizer.pad_token_id, []
        for text in texts:
            ids = tokenizer(text, padding="max_length", max_length=20, truncation=True).input_ids
            chunks = []
            for start in (1, 7, 13):
                chunk = [ids[0], *ids[start : start + 6], ids[-1]]
                if chunk[-2] not in (eos, pad):
                    chunk[-1] = eos
                if chunk[1] == pad:
                    chunk[1] = eos
                chunks.append(chunk)
            output = encoder(torch.tensor(chunks), output_hidden_states=True)
            z = output.hidden_states[-2]
            z = z if xl else norms[0](z)
            rows.append(torch.cat([z[0, :1], z[0, 1:-1], z[1, 1:-1], z[2, 1:-1], z[2, -1:]]))
            if name == "_2":
                pooled = condition["added_cond_kwargs"]["text_embeds"][len(rows) - 1]
                assert_close(pooled, output.text_embeds[0], 1e-5)
        columns.append(torch.stack(rows))
    assert_close(condition["encoder_hidden_states"], torch.cat(columns, -1), 1e-5)
    with pytest.raises(ValueError, match="`max_token_length` must be a multiple of 6, got 20"):
        DenoisingObjective.from_pipeline(
            pipeline, condition_dropout=0.1, training_arguments={"max_token_length": 20}
        )
