"""Pipelines of full size from their config files alone: no weights are read.

A pipeline's folder, or its page on the hub, says in model_index.json which classes it is made of,
and in a config.json for each of them how large they are. For the short names of vgrpo.py these
files are kept below, for when the hub cannot be reached or a licence has not been accepted.
"""
import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
import transformers as hf

import vgrpo
from rewards import UsageError, one_line

# ---- what the files of the short names say; a value that a class has by itself is left out

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "projection_dim": 768, "vocab_size": 49408}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
          "num_attention_heads": 20, "projection_dim": 1280, "vocab_size": 49408,
          "hidden_act": "gelu"}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
          "feed_forward_proj": "gated-gelu", "vocab_size": 32128}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
       "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
MMDIT = {"sample_size": 128, "in_channels": 16, "joint_attention_dim": 4096,
         "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}
SD3 = {
    "model_index.json": {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
    "scheduler/scheduler_config.json": {"shift": 3.0},
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": CLIP_G,
    "text_encoder_3/config.json": T5_XXL,
    "vae/config.json": {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609},
}
MEDIUM = {**MMDIT, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
          "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
LARGE = {**MMDIT, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192}
FLUX = {
    "model_index.json": {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"]},
    "scheduler/scheduler_config.json": {"shift": 3.0, "use_dynamic_shifting": True},
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": T5_XXL,
    "vae/config.json": {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "transformer/config.json": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38,
                                "num_attention_heads": 24, "attention_head_dim": 128,
                                "joint_attention_dim": 4096, "pooled_projection_dim": 768,
                                "guidance_embeds": True},
}
KEPT = {
    "sd3.5-medium": {**SD3, "transformer/config.json": MEDIUM},
    "sd3.5-large": {**SD3, "transformer/config.json": LARGE},
    "flux.1-dev": FLUX,
}


@contextmanager
def config_files(model):
    """Where the config files of --model lie: its folder, its hub id, or a folder of kept ones."""
    name = vgrpo.MODELS.get(model, model)
    if model not in KEPT or can_be_read(name):
        yield name
        return
    with TemporaryDirectory() as folder:
        for path, values in KEPT[model].items():
            file = Path(folder, path)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(values))
        yield folder


def can_be_read(name):
    """Is the hub there, and does it give us the transformer's sizes? A gated page does not."""
    try:
        diffusers.AutoModel.load_config(name, subfolder="transformer")
    except OSError:
        return False
    return True


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_pipeline(cfg, make, text_layers=None):
    """The pipeline of --model in full size. make(name, create) makes a network where it is wanted:
    it calls create() and returns what that gives. Text encoders get at most `text_layers` layers.
    """
    with config_files(cfg.model) as folder, one_line(UsageError, f"--model {cfg.model}"):
        index = diffusers.DiffusionPipeline.load_config(folder)
        parts = {name: build_part(folder, name, value, cfg, make, text_layers)
                 for name, value in index.items() if isinstance(value, (list, tuple))}
        options = {name: value for name, value in index.items()
                   if name not in parts and not name.startswith("_")}
        return getattr(diffusers, index["_class_name"])(**parts, **options)


def build_part(folder, name, value, cfg, make, text_layers):
    """One part of a pipeline, from its line in model_index.json: [library, class]"""
    library, kind = value
    if kind is None:
        return None
    dtype = vgrpo.DTYPES[cfg.dtype]
    kind = getattr({"diffusers": diffusers, "transformers": hf}[library], kind)
    if issubclass(kind, diffusers.ModelMixin):
        config = kind.load_config(folder, subfolder=name)
        create = lambda: kind.from_config(config)  # noqa: E731
    elif issubclass(kind, hf.PreTrainedModel):
        config = kind.config_class.from_pretrained(folder, subfolder=name)
        text = config.get_text_config()
        config.dtype = text.dtype = dtype                 # not that of the files
        if text_layers:
            text.num_hidden_layers = min(text.num_hidden_layers, text_layers)
        create = lambda: kind(config)  # noqa: E731
    elif issubclass(kind, hf.PreTrainedTokenizerBase):
        return load_tokenizer(folder, name, kind)
    else:                                                 # a scheduler, a processor of pictures
        return kind.from_pretrained(folder, subfolder=name)
    with default_dtype(dtype):
        return make(name, create).eval()


def load_tokenizer(folder, name, kind):
    """Without its files, the tiny model's: what counts is the length that a text is padded to."""
    try:
        hf.utils.cached_file(folder, "tokenizer_config.json", subfolder=name)
        return kind.from_pretrained(folder, subfolder=name)
    except OSError:
        return hf.CLIPTokenizer.from_pretrained(
            vgrpo.MODELS["tiny"], subfolder="tokenizer", model_max_length=77)
