"""The tiny world: coloured shapes, 32 x 32, how they are drawn, and the reward that reads them.

`python assets/tiny.py` makes assets/tiny-sd3, the model that `python vgrpo.py` trains, in 40 s on two cores:
a real StableDiffusion3Pipeline of 0.5 M parameters. It draws well and half obeys, because it was pretrained
on captions in which each word is redrawn with probability `wrong`.
"""
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

FOLDER = Path(__file__).parent / "tiny-sd3"
COLORS = {"red": (.9, .15, .15), "green": (.15, .75, .2), "blue": (.2, .3, .95), "yellow": (.95, .85, .15)}
WORDS = (tuple(COLORS), ("circle", "bar", "triangle"), ("left", "right"))
PROMPTS = ["a {} {} on the {}".format(*words) for words in itertools.product(*WORDS)]
PALETTE, BACKGROUND = torch.tensor(list(COLORS.values())), 0.05
SIZES = torch.tensor([len(words) for words in WORDS])


def shape_masks(x, y, area):
    """Soft masks [N, 3, 32, 32] of a circle, a bar and a triangle around x, y, of this area [N]."""
    grid = torch.arange(32, device=x.device) + 0.5
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    side = area.sqrt()[:, None, None]
    circle = side / math.sqrt(math.pi) - (dx.square() + dy.square()).sqrt()
    bar = torch.minimum(0.35 * side - dx.abs(), side / 1.4 - dy.abs())      # upright, twice as high as wide
    height = 3 ** 0.25 * side                              # equilateral: area = height^2 / sqrt(3)
    triangle = torch.minimum(height / 3 - dy, (2 / 3 * height + dy) / 2 - dx.abs() * math.sqrt(3) / 2)
    return (torch.stack([circle, bar, triangle], 1) + 0.5).clamp(0, 1)


def right(images, prompts):
    """[N, 3] booleans: are colour, shape and side those of the prompt?"""
    for prompt in prompts:
        if not all(set(kind) & set(prompt.split()) for kind in WORDS):
            raise ValueError(f"prompt {prompt!r} has no word of each of {WORDS}")
    asked = [[[word in prompt.split() for word in kind].index(True) for kind in WORDS] for prompt in prompts]
    images = F.interpolate(images.float(), (32, 32), mode="area")
    mask = ((images - BACKGROUND).abs().amax(1) > 0.3).float()      # [N, 32, 32]
    area, grid = mask.sum((1, 2)).clamp(min=1), torch.arange(32, device=images.device) + 0.5
    x, y = (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area
    mask, ideal = mask[:, None], shape_masks(x, y, area)
    rgb = (images * mask).sum((2, 3)) / area[:, None]
    far, color = (rgb[:, None] - PALETTE.to(images.device)).norm(dim=-1).min(1)
    iou, shape = (torch.minimum(ideal, mask).sum((2, 3)) / torch.maximum(ideal, mask).sum((2, 3))).max(1)
    one = (area >= 30) & (area <= 300)                              # neither a speck nor the whole picture
    told = torch.stack([one & (far < 0.4), one & (iou > 0.6), one], 1).cpu()
    return told & (torch.stack([color, shape, x > 16], 1).cpu() == torch.tensor(asked))


def shapes(images, prompts, metadata):
    """The share of colour, shape and side that is the prompt's."""
    return right(images, prompts).float().mean(1)


def shapes_strict(images, prompts, metadata):
    """1 where all three are, else 0."""
    return right(images, prompts).all(1).float()


def draw_labels(n, gen):
    return (torch.rand(n, 3, generator=gen) * SIZES).long()


def draw_shapes(labels, gen):
    """Images [N, 3, 32, 32] in [0, 1] of labels [N, 3] (colour, shape, side); place and size vary."""
    color, shape, side = labels.unbind(1)
    u = torch.rand(3, len(labels), generator=gen)
    masks = shape_masks(7 + 16 * side + 2 * u[0], 13 + 6 * u[1], 90 + 50 * u[2])
    mask = masks[torch.arange(len(labels)), shape][:, None]
    return BACKGROUND + mask * (PALETTE[color][:, :, None, None] - BACKGROUND)


def blank():
    """The pipeline with random weights: a 3-block MMDiT, 8 x 8 x 4 latents, 8 text tokens (words), no T5."""
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=8)
    tokenizer.add_tokens(sorted(set(" ".join(PROMPTS).split())))
    config = CLIPTextConfig(                          # drawn wide: at the usual scale all prompts look alike
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        initializer_factor=1.5)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16), latent_channels=4,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=8)
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1], tokenizer,
        text_encoder_3=None, tokenizer_3=None)


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
    pretrain().to(torch.float16).save_pretrained(FOLDER)            # half the bytes; loaded in fp32
    (FOLDER / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
