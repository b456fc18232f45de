"""Make assets/tiny-sd3, the model that `python vgrpo.py` trains: 40 s on two cores.  python assets/tiny.py

A real StableDiffusion3Pipeline of 0.6 M parameters that draws coloured shapes, 32 x 32, and half obeys its prompt: it
was pretrained on captions in which each word is redrawn with probability `wrong`.
"""
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402

PROMPTS = ["a {} {} on the {}".format(*words) for words in itertools.product(*rewards.WORDS)]
SIZES = torch.tensor([len(words) for words in rewards.WORDS])


def draw_labels(n, gen):
    return (torch.rand(n, 3, generator=gen) * SIZES).long()


def draw_shapes(labels, gen):
    """Images [N, 3, 32, 32] in [0, 1] of labels [N, 3] (colour, shape, side); place and size vary."""
    color, shape, side = labels.unbind(1)
    u = torch.rand(3, len(labels), generator=gen)
    masks = rewards.shape_masks(7 + 16 * side + 2 * u[0], 13 + 6 * u[1], 90 + 50 * u[2])
    mask = masks[torch.arange(len(labels)), shape][:, None]
    return rewards.BACKGROUND + mask * (rewards.palette()[color][:, :, None, None] - rewards.BACKGROUND)


def blank():
    """The pipeline with random weights: a 3-block MMDiT, 8 x 8 x 4 latents, 8 text tokens of a word each, no T5."""
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=8)
    tokenizer.add_tokens(sorted(set(" ".join(PROMPTS).split())))
    config = CLIPTextConfig(                          # drawn wide: at the usual scale all prompts look alike
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, initializer_factor=1.5)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16), latent_channels=4,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=8)
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer,
                                    encoders[1], tokenizer, text_encoder_3=None, tokenizer_3=None)


def fit(module, loss_of, steps, lr, title):
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), title):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def pretrain(vae_steps=600, steps=1300, wrong=0.48):
    """The VAE on drawn shapes, then the transformer by flow matching on captions that are partly wrong."""
    pipe, gen = blank(), torch.Generator().manual_seed(0)

    def vae_loss():
        x = 2 * draw_shapes(draw_labels(16, gen), gen) - 1
        z = pipe.vae.encode(x).latents
        return F.mse_loss(pipe.vae.decode(z + 0.1 * torch.randn(z.shape, generator=gen)).sample, x)

    fit(pipe.vae, vae_loss, vae_steps, 4e-3, "VAE")
    labels = draw_labels(6144, gen)
    with torch.no_grad():
        latents = torch.cat([pipe.vae.encode(2 * x - 1).latents for x in draw_shapes(labels, gen).split(256)])
        text, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    pipe.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    latents = (latents - latents.mean()) / latents.std()

    def flow_loss():
        rows = torch.randint(len(labels), (64,), generator=gen)
        redrawn = torch.rand(64, 3, generator=gen) < wrong
        color, shape, side = torch.where(redrawn, draw_labels(64, gen), labels[rows]).unbind(1)
        caption = (color * SIZES[1] + shape) * SIZES[2] + side          # its place among the prompts
        o, t = latents[rows], torch.rand(64, generator=gen)
        eps, s = torch.randn(o.shape, generator=gen), t.view(-1, 1, 1, 1)
        v = pipe.transformer((1 - s) * o + s * eps, text[caption], pooled[caption], timestep=1000 * t).sample
        return F.mse_loss(v, eps - o)

    fit(pipe.transformer, flow_loss, steps, 3e-3, "transformer")
    return pipe


if __name__ == "__main__":
    torch.manual_seed(0)
    pretrain().to(torch.float16).save_pretrained(HERE / "tiny-sd3")      # half the bytes; loaded in fp32
