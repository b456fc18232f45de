"""A small random pipeline of every family: what the tests train in place of billions of weights.

    pipe = FAMILIES["flux"]()

Classes, samplers and calls are diffusers' own; only the sizes are small. Most text encoders are
left out: a stand-in for `encode_prompt` draws embeddings that depend on the prompt. The weights
are the same in every process. A picture is 32 x 32; FRAMES says how many a video needs.
"""
import hashlib
import inspect
from functools import wraps
from unittest.mock import MagicMock, patch

import diffusers
import torch
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen

from extras import tiny_world

# ---- what all of them share


def gen(*key):
    """A generator that depends on its key alone."""
    digest = hashlib.blake2b(repr(("test", *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def said(*shape, by="prompt", axis=0):
    """Embeddings that depend on the prompt, or on `by` alone; images lie along `axis`."""
    def rows(prompts, copies):
        keys = prompts if by == "prompt" else [by] * len(prompts)
        drawn = [torch.randn(shape, generator=gen(key, *shape)) for key in keys]
        return torch.stack(drawn, axis).repeat_interleave(copies, axis)
    return rows


WORDS, NEGATIVE = said(5, 16), said(5, 16, by="negative")


def padded(prompts, copies):
    """A mask of five tokens, the last of which is padding."""
    mask = torch.arange(5) < 4
    return mask.expand(len(prompts) * copies, -1)


def no_pictures(prompts, copies):
    """A mask that finds no picture among the five tokens."""
    return torch.zeros(len(prompts) * copies, 5, dtype=torch.bool)


def places(prompts, copies):
    """Positions of the text, which all images share."""
    return torch.zeros(5, 3)


def places_each(prompts, copies):
    """The same, said for each image."""
    return torch.zeros(len(prompts) * copies, 5, 3)


def places_of_four(prompts, copies):
    """Positions of the text as FLUX.2 counts them: four numbers a token, for each image."""
    return torch.arange(20).view(5, 4).expand(len(prompts) * copies, 5, 4)


def listed(by="prompt"):
    """Embeddings as a list with one tensor a prompt, as Z-Image takes them."""
    rows = said(5, 16, by=by)
    return lambda prompts, copies: list(rows(prompts, 1))


def listed_copies(prompts, copies):
    """Embeddings as a list with one tensor an image, as ERNIE takes them."""
    return list(WORDS(prompts, copies))


def layers(by="prompt"):
    """Embeddings as a list with one tensor for each of two blocks, as FIBO takes them."""
    rows = said(5, 16, by=by)
    return lambda prompts, copies: [rows(prompts, copies), -rows(prompts, copies)]


def lengths(prompts, copies):
    """Where each text begins and ends when all are laid in one row."""
    return 5 * torch.arange(len(prompts) * copies + 1, dtype=torch.int32)


def shaken(pipe):
    """Moves every weight a little: a new network hardly hears its conditions."""
    with torch.no_grad():
        for name, weight in pipe.transformer.eval().named_parameters():
            weight.add_(torch.randn(weight.shape, generator=gen(name)) * 0.1)
    return pipe


def with_text(pipe, *parts):
    """Gives the pipeline an encode_prompt that returns these parts, and shakes its weights."""
    signature = inspect.signature(pipe.encode_prompt)

    def in_its_dtype(x):
        if isinstance(x, list):
            return [in_its_dtype(row) for row in x]
        return x.to(pipe.transformer.dtype) if x.is_floating_point() else x

    def encode_prompt(*args, **kwargs):
        told = signature.bind(*args, **kwargs).arguments
        prompt = told.get("prompt") or [""] * told.get("batch_size", 1)
        prompts = prompt if isinstance(prompt, list) else [prompt]
        copies = told.get("num_images_per_prompt", told.get("num_videos_per_prompt", 1))
        given = [in_its_dtype(part(prompts, copies)) for part in parts]
        return given if len(given) > 1 else given[0]

    pipe.encode_prompt = encode_prompt
    return shaken(pipe)


FLUX_SIZES = dict(
    num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)


def euler(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def picture_vae(channels=4, **options):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=channels, norm_num_groups=4, shift_factor=0.1,
        scaling_factor=0.5, **options)


def seeded(build):
    """The same weights at each call, whatever was drawn before."""
    @wraps(build)
    def family():
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return build()
    return family


# ---- pictures


@seeded
def sd3():
    return shaken(tiny_world.blank())


@seeded
def sd35():
    """The dual attention and normed queries of SD3.5-medium."""
    pipe = tiny_world.blank()
    pipe.transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16,
        qk_norm="rms_norm", dual_attention_layers=(0,))
    return shaken(pipe)


@seeded
def flux():
    transformer = diffusers.FluxTransformer2DModel(
        **FLUX_SIZES, in_channels=16, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    scheduler = euler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(scheduler, picture_vae(), None, None, None, None, transformer)
    return with_text(pipe, said(5, 32), said(32), places)


def flux2_vae():
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4)


def flux2_parts():
    transformer = diffusers.Flux2Transformer2DModel(
        **FLUX_SIZES, in_channels=16, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4))
    return euler(use_dynamic_shifting=True), flux2_vae(), None, None, transformer


@seeded
def flux2():
    return with_text(diffusers.Flux2Pipeline(*flux2_parts()), WORDS, places_of_four)


@seeded
def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        **FLUX_SIZES, in_channels=16, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    pipe = diffusers.ChromaPipeline(euler(), picture_vae(), None, None, transformer)
    negative = said(5, 32, by="negative")
    return with_text(pipe, said(5, 32), places, padded, negative, places, padded)


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


@seeded
def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    scheduler = euler(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = diffusers.QwenImagePipeline(scheduler, qwen_vae(), None, None, transformer)
    return with_text(pipe, WORDS, padded)


@seeded
def auraflow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16,
        caption_projection_dim=32, pos_embed_max_size=1024)
    pipe = diffusers.AuraFlowPipeline(None, None, picture_vae(), transformer, euler(shift=1.73))
    return with_text(pipe, WORDS, padded, NEGATIVE, padded)


def sana_vae():
    blocks = dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock")
    for side in ("encoder", "decoder"):
        blocks[f"{side}_block_out_channels"] = (8, 8)
        blocks[f"{side}_qkv_multiscales"] = ((), ())
        blocks[f"{side}_layers_per_block"] = (1, 1)
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41, **blocks)


def sana_transformer(**options):
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, **options)


def sana_scheduler():
    return diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)


def as_asked(height, width, ratios):
    """In place of rounding to the sizes of a table, which begin at 256."""
    return height, width


def any_size(pipe):
    pipe.image_processor.classify_height_width_bin = as_asked
    return pipe


@seeded
def sana():
    transformer = sana_transformer(sample_size=16)
    pipe = diffusers.SanaPipeline(None, None, sana_vae(), transformer, sana_scheduler())
    negative = said(5, 8, by="negative")
    return with_text(any_size(pipe), said(5, 8), padded, negative, padded)


@seeded
def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=8,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1))
    no_text = [None] * 8
    pipe = diffusers.HiDreamImagePipeline(euler(shift=3.0), picture_vae(), *no_text, transformer)
    pipe.default_sample_size = 32
    both = ("prompt", "negative")
    t5 = [said(5, 32, by=by) for by in both]
    llama = [said(2, 5, 16, by=by, axis=1) for by in both]
    return with_text(pipe, *t5, *llama, *[said(8, by=by) for by in both])


@seeded
def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64), cap_feat_dim=16)
    pipe = diffusers.Lumina2Pipeline(transformer, euler(shift=6.0), picture_vae(), None, None)
    return with_text(pipe, WORDS, padded, NEGATIVE, padded)


@seeded
def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, sample_size=16,
        rope_axes_dim=(16, 16))
    scheduler = euler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=64,
        time_shift_type="linear")
    pipe = diffusers.CogView4Pipeline(None, None, picture_vae(), transformer, scheduler)
    return with_text(pipe, WORDS, NEGATIVE)


@seeded
def zimage():
    """Z-Image and Z-Image-Turbo."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    pipe = diffusers.ZImagePipeline(euler(shift=3.0), picture_vae(), None, None, transformer)
    return with_text(pipe, listed(), listed(by="negative"))


@seeded
def flux2_klein():
    return with_text(diffusers.Flux2KleinPipeline(*flux2_parts()), WORDS, places_of_four)


def kandinsky_transformer():
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16,
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6))


@seeded
def kandinsky5():
    pipe = diffusers.Kandinsky5T2IPipeline(
        kandinsky_transformer(), picture_vae(), None, None, None, None, euler(shift=3.0))
    pipe.vae_scale_factor_spatial = 1
    pipe.resolutions = [(32, 32)]                       # it rounds to those of its list
    return with_text(pipe, WORDS, said(8), lengths)


@seeded
def hunyuan_image():
    """Guided by a component of its own, not by an argument."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8,
        rope_axes_dim=(4, 4))
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 4,
        layers_per_block=1, spatial_compression_ratio=8, sample_size=32, scaling_factor=0.5)
    guiders = [diffusers.AdaptiveProjectedMixGuidance() for _ in range(2)]
    pipe = diffusers.HunyuanImagePipeline(
        euler(shift=5.0), vae, None, None, None, None, transformer, *guiders)
    return with_text(pipe, WORDS, padded, said(5, 8), padded)


@seeded
def krea2():
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2))
    pipe = diffusers.Krea2Pipeline(
        euler(use_dynamic_shifting=True), qwen_vae(), None, None, transformer, (0, 1, 2))
    return with_text(pipe, said(5, 3, 16), padded)


@seeded
def prx():
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=2, in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=1, axes_dim=[4, 4])
    pipe = diffusers.PRXPipeline(
        transformer, euler(shift=3.0), None, None, picture_vae(), default_sample_size=256)
    return with_text(any_size(pipe), WORDS, padded, NEGATIVE, padded)


@seeded
def lumina_next():
    """Its network also returns a variance, which the pipeline drops."""
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=16)
    torch.nn.init.normal_(transformer.pad_token)        # diffusers leaves it empty
    pipe = diffusers.LuminaPipeline(transformer, euler(shift=3.0), picture_vae(), None, None)
    return with_text(pipe, WORDS, padded, NEGATIVE, padded)


class OmniGenWords(processor_omnigen.OmniGenMultiModalProcessor):
    """OmniGen's own, but for the transform of pictures, which needs torchvision."""

    def __init__(self, text_tokenizer, max_image_size=1024):
        self.text_tokenizer, self.max_image_size = text_tokenizer, max_image_size
        self.collator = processor_omnigen.OmniGenCollator()


@seeded
def omnigen():
    """Reads the words themselves, and has no encode_prompt."""
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, num_layers=1, pad_token_id=2, vocab_size=64, pos_embed_max_size=16,
        time_step_dim=8, rope_scaling=dict(short_factor=[1] * 4, long_factor=[1] * 4))
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=4)
    scheduler = euler(invert_sigmas=True, num_train_timesteps=1)
    tokenizer = tiny_world.blank().tokenizer
    with patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", OmniGenWords, create=True):
        pipe = diffusers.OmniGenPipeline(transformer, scheduler, vae, tokenizer)
    return shaken(pipe)


@seeded
def bria():
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[0, 4, 4])
    pipe = diffusers.BriaPipeline(transformer, euler(shift=3.0), picture_vae(), None, None)
    return with_text(pipe, WORDS, NEGATIVE, places_each)


@seeded
def bria_fibo():
    """Each block hears a layer of the text encoder."""
    transformer = diffusers.BriaFiboTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, text_encoder_dim=16,
        axes_dims_rope=[0, 4, 4])
    pipe = diffusers.BriaFiboPipeline(
        transformer, euler(use_dynamic_shifting=True), wan_vae_16(8), None, None)
    return with_text(pipe, said(5, 32), said(5, 32, by="negative"), places_each, padded, padded,
                     layers(), layers(by="negative"))


@seeded
def bria_fibo2():
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2,
        max_num_gist_tokens=4, gist_step=1, axes_dims=(8, 4, 4), axes_lens=(64, 64, 64))
    pipe = diffusers.BriaFibo2Pipeline(
        transformer, euler(use_dynamic_shifting=True), flux2_vae(), None, None)
    return with_text(pipe, said(2, 5, 16), padded)


@seeded
def ernie_image():
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16,
        out_channels=16, text_in_dim=16, rope_axes_dim=(8, 4, 4))
    pipe = diffusers.ErnieImagePipeline(transformer, flux2_vae(), None, None, euler(shift=4.0))
    return with_text(pipe, listed_copies)


@seeded
def glm_image():
    """A language model first writes a rough picture in tokens; here they are drawn."""
    transformer = diffusers.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=64)
    vae = picture_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = euler(use_dynamic_shifting=True, time_shift_type="linear")
    pipe = diffusers.GlmImagePipeline(None, None, None, None, vae, transformer, scheduler)

    def generate_prior_tokens(prompt, height, width, **kwargs):
        tokens = height * width // 4
        prompts = [prompt] if isinstance(prompt, str) else prompt
        drawn = [torch.randint(64, (tokens,), generator=gen(words)) for words in prompts]
        return torch.stack(drawn), None, None

    pipe.generate_prior_tokens = generate_prior_tokens
    return with_text(pipe, WORDS, NEGATIVE)


@seeded
def longcat_image():
    """A language model rewrites the prompt; here it stays as it is."""
    transformer = diffusers.LongCatImageTransformer2DModel(
        **FLUX_SIZES, in_channels=64, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8])
    scheduler = euler(use_dynamic_shifting=True)
    pipe = diffusers.LongCatImagePipeline(
        scheduler, picture_vae(16), None, None, None, transformer)
    pipe.rewire_prompt = lambda prompt, device: prompt
    return with_text(pipe, WORDS, places)


@seeded
def nucleus_image():
    """A mixture of experts, each of which chooses its tokens."""
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), mlp_ratio=6.0, num_experts=2,
        moe_intermediate_dim=16, dense_moe_strategy="leave_first_block_dense",
        capacity_factors=[2.0, 2.0])
    for name, weight in transformer.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(weight, std=0.1)      # diffusers leaves them empty
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer, euler(use_dynamic_shifting=True), qwen_vae(), None, None)
    return with_text(pipe, WORDS, padded)


@seeded
def ovis_image():
    transformer = diffusers.OvisImageTransformer2DModel(
        **FLUX_SIZES, in_channels=16, out_channels=16, joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8))
    scheduler = euler(use_dynamic_shifting=True)
    pipe = diffusers.OvisImagePipeline(scheduler, picture_vae(), None, None, transformer)
    return with_text(pipe, WORDS, NEGATIVE, places, places)


@seeded
def qwen_image21():
    """Keeps what its blocks made of the text at the first step and reads it at the others."""
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=16, axes_dims_rope=(8, 4, 4))
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler, processor = euler(use_dynamic_shifting=True), MagicMock()  # asked for its template
    pipe = diffusers.QwenImage21Pipeline(scheduler, vae, None, processor, transformer)
    return with_text(pipe, WORDS, padded, no_pictures)


# ---- video


def wan_vae(channels, **options):
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels, **options)


def wan_vae_16(channels):
    """That of Wan 2.2, which makes 16 pixels of one place."""
    return wan_vae(channels, is_residual=True, patch_size=2, in_channels=12, out_channels=12,
                   scale_factor_spatial=16)


def unipc():
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_parts(kind, channels=4):
    transformer = kind(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels,
        out_channels=channels, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32)
    return dict(tokenizer=None, text_encoder=None, vae=wan_vae(channels), scheduler=unipc(),
                transformer=transformer)


@seeded
def wan21():
    parts = wan_parts(diffusers.WanTransformer3DModel)
    return with_text(diffusers.WanPipeline(**parts), WORDS, NEGATIVE)


@seeded
def wan22_5b():
    """Tells its network a time for each token."""
    parts = wan_parts(diffusers.WanTransformer3DModel, channels=8)
    parts["vae"] = wan_vae_16(8)
    pipe = diffusers.WanPipeline(**parts, expand_timesteps=True)
    return with_text(pipe, WORDS, NEGATIVE)


@seeded
def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, patch_size=1, block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False))
    scheduler = euler(use_dynamic_shifting=True, base_image_seq_len=1024, max_shift=2.05,
                      base_shift=0.95, shift_terminal=0.1)
    pipe = diffusers.LTXPipeline(scheduler, vae, None, None, transformer)
    return with_text(pipe, WORDS, padded, NEGATIVE, padded)


def hunyuan_vae():
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False)


@seeded
def kandinsky5_video():
    vae, transformer = hunyuan_vae(), kandinsky_transformer()
    pipe = diffusers.Kandinsky5T2VPipeline(
        transformer, vae, None, None, None, None, euler(shift=5.0))
    return with_text(pipe, WORDS, said(8), lengths)


@seeded
def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4))
    scheduler = euler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(
        None, None, transformer, hunyuan_vae(), scheduler, None, None)
    return with_text(pipe, WORDS, said(8), padded)


@seeded
def hunyuan_video15():
    """Its network reads more channels than it writes: the latent, an empty picture and a mask."""
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8,
        image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=32, task_type="t2v")
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False,
        upsample_match_channel=False)
    pipe = diffusers.HunyuanVideo15Pipeline(
        None, None, transformer, vae, euler(shift=5.0), None, None,
        diffusers.ClassifierFreeGuidance(guidance_scale=6.0))
    return with_text(pipe, WORDS, padded, said(5, 8), padded)


@seeded
def easyanimate():
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=1, sample_width=16, sample_height=16,
        patch_size=2)
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False)
    pipe = diffusers.EasyAnimatePipeline(vae, None, None, transformer, euler(shift=5.0))
    return with_text(pipe, WORDS, NEGATIVE, padded, padded)


@seeded
def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        text_embed_dim=16, time_embed_dim=8)
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5)
    scheduler = euler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(scheduler, vae, None, None, transformer)
    return with_text(pipe, WORDS, padded, NEGATIVE, padded)


@seeded
def motif_video():
    """Its network reads the latent, an empty picture and a mask, as HunyuanVideo-1.5's does."""
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, patch_size=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4))
    guider = diffusers.AdaptiveProjectedGuidance()
    pipe = diffusers.MotifVideoPipeline(
        euler(shift=7.0), wan_vae(4), None, None, transformer, guider)
    return with_text(pipe, WORDS, NEGATIVE, padded, padded)


@seeded
def sana_video():
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=8, rope_max_seq_len=32)
    pipe = diffusers.SanaVideoPipeline(None, None, wan_vae(4), transformer, sana_scheduler())
    pipe.video_processor.classify_height_width_bin = as_asked
    negative = said(5, 8, by="negative")
    return with_text(pipe, said(5, 8), padded, negative, padded)


@seeded
def skyreels_v2():
    parts = wan_parts(diffusers.SkyReelsV2Transformer3DModel)
    return with_text(diffusers.SkyReelsV2Pipeline(**parts), WORDS, NEGATIVE)


class PassesAll:
    """In place of the checker without which Cosmos does not run."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


def cosmos_parts(channels):
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
        concat_padding_mask=False)                      # True needs torchvision
    return None, None, transformer, wan_vae(4)


@seeded
def cosmos25():
    """Without a picture or video to begin from."""
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(*cosmos_parts(5), unipc(), PassesAll())
    return with_text(pipe, WORDS, NEGATIVE)


# ---- those that must be refused


@seeded
def sana_sprint():
    """Distilled: its time is an angle, and its output no velocity."""
    transformer = sana_transformer(
        sample_size=32, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    pipe = diffusers.SanaSprintPipeline(
        None, None, sana_vae(), transformer, diffusers.SCMScheduler())
    return with_text(any_size(pipe), said(5, 8), padded)


@seeded
def wan22_a14b():
    """Two networks, one for each part of the time."""
    parts = wan_parts(diffusers.WanTransformer3DModel)
    other = wan_parts(diffusers.WanTransformer3DModel)["transformer"]
    pipe = diffusers.WanPipeline(**parts, transformer_2=other, boundary_ratio=0.875)
    return with_text(pipe, WORDS, NEGATIVE)


@seeded
def prx_pixel():
    """Its network tells the picture, of which the pipeline makes a velocity."""
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=4, in_channels=3, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2,
        depth=1, axes_dim=[4, 4], bottleneck_size=8, resolution_embeds=True)
    pipe = diffusers.PRXPixelPipeline(transformer, euler(shift=3.0), None, None)
    return with_text(any_size(pipe), WORDS, padded, NEGATIVE, padded)


@seeded
def cosmos2():
    """Its network tells the picture too, and its noise begins at a sigma of 80."""
    pipe = diffusers.Cosmos2TextToImagePipeline(
        *cosmos_parts(4), euler(use_karras_sigmas=True), PassesAll())
    return with_text(pipe, WORDS, NEGATIVE)


FAMILIES = {build.__name__: build for build in (
    sd3, sd35, flux, flux2, chroma, qwen_image, auraflow, sana, hidream, lumina2, cogview4,
    zimage, wan21, wan22_5b, ltx, flux2_klein, kandinsky5, kandinsky5_video, hunyuan_video,
    hunyuan_video15, hunyuan_image, krea2, prx, omnigen, lumina_next, bria, bria_fibo, bria_fibo2,
    ernie_image, glm_image, longcat_image, nucleus_image, ovis_image, qwen_image21, easyanimate,
    mochi, motif_video, sana_video, skyreels_v2, cosmos25)}
REFUSED = {build.__name__: build for build in (sana_sprint, wan22_a14b, prx_pixel, cosmos2)}
FRAMES = dict(
    wan21=5, wan22_5b=5, wan22_a14b=5, ltx=9, kandinsky5_video=5, hunyuan_video=5,
    hunyuan_video15=3, easyanimate=5, mochi=7, motif_video=5, sana_video=5, skyreels_v2=5,
    cosmos25=5)
