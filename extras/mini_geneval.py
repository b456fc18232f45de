"""GenEval in miniature: pixels are read in place of a detector, GenEval's own verdict judges.

    score       the mean over what is asked for: to train with
    strict      1 where all of it holds, else 0: to evaluate with
    as_drawn    how near it is to a drawing of what was read: shows shapes bent to please score
`python -m extras.mini_geneval` makes assets/mini-sd3, in ten minutes: a real
StableDiffusion3Pipeline of 1 M parameters. It knows more than it shows: its last captions had some
words redrawn, so it draws well and half obeys.
"""
import json
import random
from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from diffusers import (AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from extras import mini_world as world
from extras.geneval import verdict
from extras.mini_world import GROUND, PALETTE, SIDE
from extras.tiny_world import FOLDER as TINY, fit

FOLDER = TINY.with_name("mini-sd3")

def score(images, prompts, metadata):
    return judge(images, metadata, "score")

def strict(images, prompts, metadata):
    return judge(images, metadata, "strict")

def as_drawn(images, prompts, metadata):
    """1 for a drawing, 0 where nothing of what is there was read, NaN for bare ground."""
    images = as_read(images)
    pictures, _, shape, color, places, _ = read(images)
    drawing = world.render(pictures, len(images), shape, color, places)
    far = (images - drawing).abs().sum((1, 2, 3))
    most = ((images - GROUND).abs() + (drawing - GROUND).abs()).sum((1, 2, 3))
    return 1 - far / most

def judge(images, metadata, rule):
    images = as_read(images)
    rows = zip(images, find(images), metadata)
    return torch.tensor([verdict(found, data, partial(color_of, image), rule)
                         for image, found, data in rows])

def as_read(images):
    """Any size and device -> [N, 3, 40, 40] on the CPU"""
    return F.interpolate(images.cpu(), (SIDE, SIDE), mode="area")

def find(images):
    """What verdict() takes, of each image: {shape: [(fit, box [[x0, y0], [x1, y1]], mask)]}"""
    found = [{} for _ in images]
    pictures, masks, shape, _, _, fits = read(images)
    for k in fits.argsort(descending=True).tolist():      # best first
        low, high = masks[k].nonzero().flip(1).aminmax(dim=0)
        group = found[pictures[k]].setdefault(world.SHAPES[shape[k]], [])
        group.append((fits[k].item(), torch.stack([low, high + 1]), masks[k]))
    return found

def color_of(image, name, box, mask):
    color, far = world.nearest_color(image[None], mask[None])
    return list(world.COLORS)[color] if far < 0.4 else None

def components(images):
    """Connected parts of what is not ground.  -> the image of each [K], masks [K, 40, 40]"""
    filled = (images - GROUND).abs().amax(1, keepdim=True) > 0.3
    labels = torch.arange(1.0, filled.numel() + 1).view(filled.shape) * filled
    before = torch.zeros_like(labels)
    while not labels.equal(before):                       # its largest label floods each part
        before, labels = labels, F.max_pool2d(labels, 3, 1, 1) * filled
    names = labels[labels > 0].unique()
    pictures = ((names - 1) / SIDE**2).long()
    return pictures, labels[pictures, 0] == names[:, None, None]

def read(images):
    """-> K shapes: the image of each, mask, shape, colour, place (x, y, area), how well it fits"""
    pictures, masks = components(images)
    images = images[pictures]
    color, _ = world.nearest_color(images, masks)
    # How much of a pixel is covered: how far it is on the way from the ground to the colour.
    way = (PALETTE[color] - GROUND)[:, :, None, None]
    cover = ((images - GROUND) * way).sum(1) / way.square().sum(1)
    near = F.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0]        # the mask and its soft edge
    cover = cover.clamp(0, 1) * near
    area, grid = cover.sum((1, 2)), torch.arange(SIDE) + 0.5
    x, y = (cover.sum(1) * grid).sum(1) / area, (cover.sum(2) * grid).sum(1) / area
    ideal, cover = world.shape_masks(x, y, area), cover[:, None]
    common, either = torch.minimum(ideal, cover), torch.maximum(ideal, cover)
    fits, shape = (common.sum((2, 3)) / either.sum((2, 3))).max(1)
    keep = (fits > 0.7) & (area > 50)                     # half of what draw() makes, or more
    places = torch.stack([x, y, area], 1)
    return [part[keep] for part in (pictures, masks, shape, color, places, fits)]

def blank():
    """The pipeline with random weights: a 3-block MMDiT, 10 x 10 x 6 latents, 9 text tokens."""
    tokenizer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [], model_max_length=9)
    every = " ".join(item["prompt"] for some in world.split() for item in world.items(some))
    tokenizer.add_tokens(sorted(set(every.split())))
    config = CLIPTextConfig(                          # drawn wide: else all prompts look alike
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=9, bos_token_id=0,
        eos_token_id=1, initializer_factor=1.5)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), latent_channels=6)
    transformer = SD3Transformer2DModel(
        sample_size=10, patch_size=2, in_channels=6, out_channels=6, num_layers=3,
        attention_head_dim=32, num_attention_heads=3, joint_attention_dim=64,
        caption_projection_dim=96, pooled_projection_dim=64, pos_embed_max_size=5)
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    for encoder in encoders:                          # else random layers drown words and order
        for embedding in encoder.text_model.embeddings.children():
            embedding.weight.data *= 20
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoders[0], tokenizer,
        encoders[1], tokenizer, text_encoder_3=None, tokenizer_3=None)

def draw_sentences(n, rng):
    """n sentences that may be trained on, each task as often, and images [n, 3, 40, 40] of them"""
    sentences, wanted = [], []
    _, others = world.split()
    for _ in range(n):
        tag = rng.choice(list(others))
        words = rng.choice(others[tag])
        sentences.append(words)
        wanted.append(world.metadata(tag, words))
    images = [world.draw(wanted[i:i + 256], rng) for i in range(0, n, 256)]
    return sentences, torch.cat(images)

def mishear(sentences, wrong, rng):
    """Each colour, shape, number and side is another with probability `wrong`; the sentence remains
    one that may be trained on."""
    alike = {word: list(kind) for kind in world.KINDS.values() for word in kind}
    known = {words for some in world.split()[1].values() for words in some}

    def heard(words):
        return tuple(rng.choice(alike.get(word, [word])) if rng.random() < wrong else word
                     for word in words)
    return [next(filter(known.__contains__, map(heard, repeat(words)))) for words in sentences]

def fit_vae(vae, images, gen, steps):
    def loss():
        x = 2 * images[torch.randint(len(images), (12,), generator=gen)] - 1
        z = vae.encode(x).latents
        y = vae.decode(z + 0.05 * torch.randn(z.shape, generator=gen)).sample
        shapes = (x - (2 * GROUND - 1)).abs().amax(1, keepdim=True) > 0.3
        return ((1 + 2 * shapes) * (y - x).square()).mean() + 0.1 * F.l1_loss(y, x)
    fit(vae, loss, steps, 4e-3, "VAE")
    z = vae.encode(2 * images[:1000] - 1).latents
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())

def fit_transformer(pipe, sentences, images, gen, steps, lr):
    captions = [" ".join(words) for words in sentences]
    known = sorted(set(captions))
    place = torch.tensor([known.index(caption) for caption in captions])
    with torch.no_grad():
        o = torch.cat([pipe.vae.encode(2 * x - 1).latents for x in images.split(256)])
        text, _, pooled, _ = pipe.encode_prompt(
            known, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    o = (o - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    def loss():
        rows = torch.randint(len(o), (32,), generator=gen)
        x, caption = o[rows], place[rows]
        t = torch.rand(32, 1, 1, 1, generator=gen)
        t = 3 * t / (1 + 2 * t)                           # shifted as the sampler's grid is
        eps = torch.randn(x.shape, generator=gen)
        v = pipe.transformer((1 - t) * x + t * eps, text[caption], pooled[caption],
                             timestep=1000 * t.flatten()).sample
        return F.mse_loss(v, eps - x)                     # flow matching
    fit(pipe.transformer, loss, steps, lr, "transformer")

def pretrain(vae_steps=1200, steps=8000, last=1000, wrong=0.2):
    pipe, rng, gen = blank(), random.Random(0), torch.Generator().manual_seed(0)
    sentences, images = draw_sentences(16384, rng)
    fit_vae(pipe.vae, images, gen, vae_steps)
    fit_transformer(pipe, sentences, images, gen, steps, 2e-3)
    fit_transformer(pipe, mishear(sentences, wrong, rng), images, gen, last, 5e-4)
    return pipe

if __name__ == "__main__":
    torch.manual_seed(2)                      # its VAE keeps .995 of what is drawn
    pretrain().to(torch.float16).save_pretrained(FOLDER)            # half the bytes; loaded in fp32
    for name, some in zip(("test", "train"), world.split()):
        lines = "\n".join(map(json.dumps, world.items(some)))
        (FOLDER / f"prompts_{name}.jsonl").write_text(lines + "\n")
