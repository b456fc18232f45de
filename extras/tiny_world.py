"""The tiny world: coloured shapes, 32 x 32, how they are drawn, and the reward that reads them.

    python -m extras.tiny_world        # makes assets/tiny-sd3, in 40 s on two cores

That model is the one `python vgrpo.py` trains: a real StableDiffusion3Pipeline of 0.5 M parameters.
A prompt reads "a red circle on the left": a colour, a shape and a side. The model draws well and
half obeys, because each word of a caption was redrawn with probability `wrong` in pretraining.

A label holds three indices into WORDS: colour, shape, side. N counts images, prompts or labels.
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

FOLDER = Path(__file__).parent.parent / "assets" / "tiny-sd3"
COLORS = {"red": (.9, .15, .15), "green": (.15, .75, .2), "blue": (.2, .3, .95),
          "yellow": (.95, .85, .15)}
WORDS = (tuple(COLORS), ("circle", "bar", "triangle"), ("left", "right"))
PROMPTS = ["a {} {} on the {}".format(*words) for words in itertools.product(*WORDS)]
PALETTE = torch.tensor(list(COLORS.values()))
BACKGROUND = 0.05
SIZES = torch.tensor([len(words) for words in WORDS])

def shape_masks(x, y, area):
    """Soft masks [N, 3, 32, 32] of a circle, a bar and a triangle around x, y, of this area [N]."""
    grid = torch.arange(32, device=x.device) + 0.5
    dx = grid - x[:, None, None]
    dy = grid[:, None] - y[:, None, None]
    side = area.sqrt()[:, None, None]
    # Each is the distance to the shape's edge in pixels, positive inside.
    circle = side / math.sqrt(math.pi) - (dx.square() + dy.square()).sqrt()
    bar = torch.minimum(0.35 * side - dx.abs(), side / 1.4 - dy.abs())      # twice as high as wide
    height = 3 ** 0.25 * side                       # equilateral: area = height^2 / sqrt(3)
    slope = (2 / 3 * height + dy) / 2 - dx.abs() * math.sqrt(3) / 2
    triangle = torch.minimum(height / 3 - dy, slope)
    return (torch.stack([circle, bar, triangle], 1) + 0.5).clamp(0, 1)

def label_of(prompt):
    """The indices of the prompt's colour, shape and side."""
    words = prompt.split()
    label = []
    for kind in WORDS:
        found = [index for index, word in enumerate(kind) if word in words]
        if not found:
            raise ValueError(f"prompt {prompt!r} has no word of each of {WORDS}")
        label.append(found[0])
    return label

def read_labels(images):
    """The label [N, 3] seen in each image, and which parts of it are clear enough to count."""
    images = F.interpolate(images.float(), (32, 32), mode="area")
    mask = ((images - BACKGROUND).abs().amax(1) > 0.3).float()      # [N, 32, 32]
    area = mask.sum((1, 2)).clamp(min=1)
    grid = torch.arange(32, device=images.device) + 0.5
    x = (mask.sum(1) * grid).sum(1) / area                          # the centre of the mask
    y = (mask.sum(2) * grid).sum(1) / area

    mask = mask[:, None]
    mean_color = (images * mask).sum((2, 3)) / area[:, None]
    distances = (mean_color[:, None] - PALETTE.to(images.device)).norm(dim=-1)
    distance, color = distances.min(1)

    ideal = shape_masks(x, y, area)
    common = torch.minimum(ideal, mask).sum((2, 3))
    union = torch.maximum(ideal, mask).sum((2, 3))
    overlap, shape = (common / union).max(1)

    sized = (area >= 30) & (area <= 300)            # neither a speck nor the whole picture
    clear = torch.stack([sized & (distance < 0.4), sized & (overlap > 0.6), sized], 1)
    return torch.stack([color, shape, x > 16], 1), clear

def right(images, prompts):
    """[N, 3] booleans: are colour, shape and side those of the prompt?"""
    asked = torch.tensor([label_of(prompt) for prompt in prompts])
    seen, clear = read_labels(images)
    return clear.cpu() & (seen.cpu() == asked)

def shapes(images, prompts, metadata):
    """The share of colour, shape and side that is the prompt's."""
    return right(images, prompts).float().mean(1)

def shapes_strict(images, prompts, metadata):
    """1 where all three are, else 0."""
    return right(images, prompts).all(1).float()

def draw_labels(n, gen):
    """Labels [n, 3], every colour, shape and side equally likely."""
    return (torch.rand(n, 3, generator=gen) * SIZES).long()

def draw_shapes(labels, gen):
    """Images [N, 3, 32, 32] in [0, 1] of labels [N, 3]; place and size vary."""
    color, shape, side = labels.unbind(1)
    across, down, size = torch.rand(3, len(labels), generator=gen)
    masks = shape_masks(7 + 16 * side + 2 * across, 13 + 6 * down, 90 + 50 * size)
    mask = masks[torch.arange(len(labels)), shape][:, None]
    return BACKGROUND + mask * (PALETTE[color][:, :, None, None] - BACKGROUND)

def blank():
    """The pipeline with random weights: a 3-block MMDiT, 4 x 8 x 8 latents, 8 tokens (words)."""
    tokenizer = CLIPTokenizer(
        vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=8)
    tokenizer.add_tokens(sorted(set(" ".join(PROMPTS).split())))    # one token a word
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8,
        bos_token_id=0, eos_token_id=1,
        initializer_factor=1.5)                     # at the usual scale all prompts look alike
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=4)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=8)
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer,
        encoders[1], tokenizer, text_encoder_3=None, tokenizer_3=None)

def fit(module, loss_of, steps, lr, title):
    """Take AdamW steps on loss_of(), which draws its own batch."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), title):
        optimizer.zero_grad()
        loss_of().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()

def fit_vae(vae, steps, gen):
    """Teach the VAE to draw a shape again from its noised latent."""
    def loss():
        images = 2 * draw_shapes(draw_labels(16, gen), gen) - 1
        latents = vae.encode(images).latents
        noised = latents + 0.1 * torch.randn(latents.shape, generator=gen)
        return F.mse_loss(vae.decode(noised).sample, images)

    fit(vae, loss, steps, 4e-3, "VAE")

@torch.no_grad()
def encode_shapes(vae, labels, gen):
    """Latents of mean 0 and std 1 of drawn shapes; the VAE's config takes the shift and scale."""
    batches = draw_shapes(labels, gen).split(256)
    latents = torch.cat([vae.encode(2 * images - 1).latents for images in batches])
    mean, std = latents.mean(), latents.std()
    vae.register_to_config(shift_factor=mean.item(), scaling_factor=1 / std.item())
    return (latents - mean) / std

def pretrain(vae_steps=600, steps=1300, wrong=0.48):
    """The VAE on drawn shapes, then the transformer by flow matching on partly wrong captions."""
    pipe = blank()
    gen = torch.Generator().manual_seed(0)
    fit_vae(pipe.vae, vae_steps, gen)
    labels = draw_labels(6144, gen)
    latents = encode_shapes(pipe.vae, labels, gen)
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=0)

    def flow_loss():
        rows = torch.randint(len(labels), (64,), generator=gen)
        redrawn = torch.rand(64, 3, generator=gen) < wrong
        captions = torch.where(redrawn, draw_labels(64, gen), labels[rows])
        color, shape, side = captions.unbind(1)
        prompt = (color * SIZES[1] + shape) * SIZES[2] + side       # its place in PROMPTS
        o = latents[rows]
        t = torch.rand(64, generator=gen)
        eps = torch.randn(o.shape, generator=gen)
        s = t.view(-1, 1, 1, 1)
        z = (1 - s) * o + s * eps
        v = pipe.transformer(z, text[prompt], pooled[prompt], timestep=1000 * t).sample
        return F.mse_loss(v, eps - o)

    fit(pipe.transformer, flow_loss, steps, 3e-3, "transformer")
    return pipe

if __name__ == "__main__":
    torch.manual_seed(0)
    pretrain().to(torch.float16).save_pretrained(FOLDER)        # half the bytes; loaded in fp32
    (FOLDER / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
