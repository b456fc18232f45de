"""The rewards of V-GRPO's recipes, on transformers alone.

    python rewards.py --reward pickscore --prompt "a red cube" a.png b.png

A reward is fn(images [N, 3, H, W] in [0, 1], prompts, metadata) -> float [N]; NaN: this image has no score.
In `--reward pickscore=1,hpsv2@FOLDER=0.5,my_rewards.py:fn=2` a FOLDER stands for the hub: OWNER/NAME is read
from FOLDER/NAME, else FOLDER.
"""
import argparse
import contextlib
import functools
import html
import io
import itertools
import json
import math
import random
import re
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

class UsageError(ValueError):
    """Something the user gave cannot be used: one line that names it and the mend."""

class RunError(RuntimeError):
    """A run that started failed: one line."""

@contextlib.contextmanager
def one_line(kind, where, mend=""):
    """Whatever goes wrong inside becomes one line; `mend` is for missing files and networks."""
    try:
        yield
    except Exception as error:
        what = "" if isinstance(error, UsageError) else type(error).__name__ + ": "
        mend = mend if isinstance(error, OSError) else ""
        raise kind(f"{where}: {what}{' '.join(str(error).split())}{mend}") from error

def quantise(images):
    """The 8-bit picture that a user would save."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255

def standardise(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)

def jpeg(image):
    from PIL import Image
    file, pixels = io.BytesIO(), (image * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.cpu().numpy()).save(file, "JPEG", quality=95)
    return file.getvalue()

def fetch(repo, folder, file=""):
    """OWNER/NAME, or a file of it, on the hub or in a folder."""
    if folder:
        inside = Path(folder, Path(repo).name)
        return str((inside if inside.is_dir() else Path(folder).resolve(strict=True)) / file)
    from huggingface_hub import hf_hub_download
    return hf_hub_download(repo, file) if file else repo

def load(kind, repo, folder):
    """A model or a tokenizer of transformers."""
    import transformers
    kind, place = getattr(transformers, kind) if isinstance(kind, str) else kind, fetch(repo, folder)
    if kind is transformers.AutoTokenizer:
        return kind.from_pretrained(place)
    model, report = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:                                      # transformers only warns
        raise UsageError(f"{place} is not {repo}: it lacks {min(report['missing_keys'])}")
    return model

RENAMES = {     # open_clip's and BLIP's names -> transformers', rule after rule; an empty name is dropped
    r"^blip\.(vision|text)_proj\..*|.*position_ids$": "", r"^blip\.text_encoder": "text",
    r"^blip\.visual_encoder": "vision", r"^mlp\.layers": "head", r"^layers\.": "", r"c_fc": "fc1",
    r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.", r"^(?=transformer|token_|positional|ln_final)": "text_model.",
    r"(transformer\.res)?blocks": "encoder.layers", r"(class|token)_embedding": r"embeddings.\1_embedding",
    r"cls_token": "embeddings.class_embedding", r"conv1|patch_embed\.proj": "embeddings.patch_embedding",
    r"positional_embedding$": "embeddings.position_embedding.weight", r"\.attn\.": ".self_attn.",
    r"pos_embed$": "embeddings.position_embedding", r"attn\.proj": "attn.projection", r"c_proj": "fc2",
    r"^vision\.norm": "vision.post_layernorm", r"ln_post": "post_layernorm", r"ln_pre": "pre_layrnorm",
    r"ln_final": "final_layer_norm", r"\.(ln_|norm)(\d)": r".layer_norm\2"}

def load_renamed(model, repo, file, folder):
    """Weights published under other names; a missing or unexpected one is an error that names it."""
    state, renamed = torch.load(fetch(repo, folder, file), map_location="cpu", weights_only=True), {}
    for name, value in state.get("state_dict", state).items():
        for rule in RENAMES.items():
            name = re.sub(*rule, name)
        if "in_proj_" in name:                                      # q, k and v in one
            renamed.update(zip([name.replace("in_proj_", f"{x}_proj.") for x in "qkv"], value.chunk(3)))
        elif name:
            renamed[name] = value.T if name.endswith("_projection.weight") else value
    model.load_state_dict(renamed)
    return model.eval()

def clip_pixels(images, pad=False):
    """Bicubic to [N, 3, 224, 224]: CLIP cuts the longer side, in 8 bits; HPSv2 pads the shorter one."""
    sides = images.shape[-2:]
    height, width = (round(224 * side / max(sides)) if pad else 224 * side // min(sides) for side in sides)
    images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = int((224 - height) / 2), int((224 - width) / 2)     # negative: cut
    images = F.pad(images if pad else quantise(images), (left, 224 - width - left, top, 224 - height - top))
    return standardise(images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

HALF = torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available())
# HPSv2.1 is open_clip's ViT-H-14, whose activation is not CLIP's quick_gelu; its texts go through ftfy
VIT_H = dict(num_attention_heads=16, hidden_act="gelu", projection_dim=1024)
HPS_VISION = VIT_H | dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14)
HPS_TEXT = VIT_H | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, eos_token_id=49407)
PLAIN = ({code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
         | dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"'))

class Clip(nn.Module):
    """cos(text, image) of a CLIP; features are computed once per batch and once per prompt."""

    def __init__(self, repo, folder):
        super().__init__()
        self.hps, laion = repo == "xswu/HPSv2", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        self.tokenizer = load("AutoTokenizer", repo if repo.startswith("openai/") else laion, folder)
        if self.hps:
            from transformers import CLIPConfig, CLIPModel
            config = CLIPConfig(text_config=HPS_TEXT, vision_config=HPS_VISION, projection_dim=1024)
            self.model = load_renamed(CLIPModel(config), repo, "HPS_v2.1_compressed.pt", folder)
        else:
            self.model = load("CLIPModel", repo, folder)
        self.seen = WeakTensorKeyDictionary()                       # forgets the features with the images
        self.text = functools.lru_cache(10_000)(self.encode_text)

    def encode_text(self, text):
        text = html.unescape(html.unescape(text)).translate(PLAIN).strip() if self.hps else text
        tokens = self.tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        with HALF:
            feature = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output[0]
        return F.normalize(feature.float(), dim=-1)

    def images(self, images):
        if images not in self.seen:
            with HALF:
                features = self.model.get_image_features(clip_pixels(images, pad=self.hps)).pooler_output
            self.seen[images] = F.normalize(features.float(), dim=-1)
        return self.seen[images]

    def forward(self, images, prompts, metadata):
        return (self.images(images) * torch.stack([self.text(prompt) for prompt in prompts])).sum(-1)

def linear_head():
    """No activations, as published; the dropouts only keep the published numbering 0 2 4 6 7."""
    return nn.Sequential(nn.Linear(768, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
                         nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1))

BLIP_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   image_size=224, layer_norm_eps=1e-6)
BLIP_TEXT = dict(encoder_hidden_size=1024, num_attention_heads=12, is_decoder=True)

class ImageReward(nn.Module):
    """BLIP's text encoder reads the prompt while it looks at the image; a linear head on its first token."""

    def __init__(self, folder):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        super().__init__()
        self.vision, self.head = BlipVisionModel(BlipVisionConfig(**BLIP_VISION)), linear_head()
        self.text = BlipTextModel(BlipTextConfig(**BLIP_TEXT), add_pooling_layer=False)
        self.tokenizer = load("AutoTokenizer", "google-bert/bert-base-uncased", folder)
        load_renamed(self, "THUDM/ImageReward", "ImageReward.pt", folder)

    def forward(self, images, prompts, metadata):
        tokens = self.tokenizer(prompts, padding="max_length", max_length=35, truncation=True)
        ids, mask = (torch.tensor(tokens[key]).to(images.device) for key in ("input_ids", "attention_mask"))
        with HALF:
            patches = self.vision(clip_pixels(images)).last_hidden_state
            states = self.text(ids, mask, encoder_hidden_states=patches).last_hidden_state
        return (self.head(states[:, 0].float()).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072

# OCR: a map of text -> boxes -> lines -> the distance to what was asked for
def components(mask):
    """[H, W] bool -> [H, W] labels: 0 outside, and one number for each 8-connected region."""
    before, labels = mask.double(), mask.flatten().cumsum(0).view(mask.shape).double() * mask
    while not torch.equal(labels, before):          # the largest label around, then the label of that pixel
        before, labels = labels, F.max_pool2d(labels[None], 3, 1, 1)[0] * mask
        labels = labels[mask][labels.long() - 1] * mask
    return labels

def text_boxes(probs, size):
    """A map of text [h, w] -> boxes (top, left, bottom, right) in a picture of size (H, W), as one reads."""
    labels, boxes, size = components(probs > 0.3), [], torch.tensor(size)
    for label in labels[labels > 0].unique():
        points = (labels == label).nonzero().cpu().double()         # [K, 2]: y, x
        low, high = points.amin(0), points.amax(0)
        sides = high - low
        if sides.min() >= 3 and probs[labels == label].mean() >= 0.6:
            grow = 1.5 * sides.prod() / (2 * sides.sum())           # area / perimeter: the map is of cores
            corners = torch.stack([low - grow, high + grow]) * (size / torch.tensor(probs.shape))
            boxes.append(corners.round().long().clamp(min=0).minimum(size).flatten().tolist())
    line = functools.cmp_to_key(lambda a, b: a[1] - b[1] if abs(a[0] - b[0]) < 10 else a[0] - b[0])
    return sorted(sorted(boxes), key=line)

QUOTED = re.compile('"([^"]*[^" ][^"]*)"')

def ocr_score(read, target):
    """1 - Levenshtein distance / length, without spaces and case; 1 if the target is within what was read."""
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    row = list(range(len(target) + 1))
    for i, a in enumerate(read, 1):
        above, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1.0 if target in read else 1 - min(row[-1], len(target)) / len(target)

class Ocr(nn.Module):
    """PP-OCRv5 reads each image; the distance of that to the prompt's text between straight double quotes."""

    def __init__(self, folder):
        super().__init__()
        rec = "PaddlePaddle/PP-OCRv5_server_rec_safetensors"
        self.find = load("AutoModelForObjectDetection", rec.replace("rec", "det"), folder)
        self.read = load("AutoModelForTextRecognition", rec, folder)
        config = Path(fetch(rec, folder, "preprocessor_config.json")).read_text("utf-8")
        self.characters = json.loads(config)["character_list"]

    def text(self, image):
        """[3, H, W] -> its lines, joined without separator."""
        ratio, strips, text = min(1, 960 / max(image.shape[1:])), [], ""
        size = [max(32, round(int(side * ratio) / 32) * 32) for side in image.shape[1:]]
        pixels = standardise(F.interpolate(image[None], size, mode="bilinear").flip(1))             # B, G, R
        for y0, x0, y1, x1 in text_boxes(self.find(pixels).last_hidden_state[0, 0], image.shape[1:]):
            width = min(3200, math.ceil(48 * (x1 - x0) / (y1 - y0)))
            strips.append(F.interpolate(image[None, :, y0:y1, x0:x1], (48, width), mode="bilinear") * 2 - 1)
        widest = max([320] + [strip.shape[-1] for strip in strips])
        strips = [F.pad(strip, (0, widest - strip.shape[-1])) for strip in strips]
        for line in self.read(torch.cat(strips)).last_hidden_state if strips else []:   # [T, characters]
            best, index = line.max(-1)
            new = (index != 0) & (index != F.pad(index[:-1], (1, 0)))                   # no blank, no repeat
            if best[new].mean() >= 0.5:
                text += "".join(self.characters[i] for i in index[new].tolist())
        return text

    def forward(self, images, prompts, metadata):
        return torch.tensor([ocr_score(self.text(image), QUOTED.search(prompt)[1])
                             for image, prompt in zip(images, prompts)])

def ocr_prompts(n, seed):
    """n distinct prompts that ask for a text in straight double quotes."""
    scenes = "a sign that says, a chalkboard that reads, a cake with the words, a T-shirt with, a cup with"
    first = "Fresh Open Happy Quiet Golden Lucky Silver Daily Wild Secret Little Brave".split()
    second = "Bread Garden Morning Harbor Coffee Market Planet Forest Street Winter Music Letters".split()
    third = ["", " Today", " Club", " No. 7", " and Friends", " Since 1987", " Sale", " Forever"]
    texts = itertools.product(scenes.split(", "), first, second, third)
    return [{"prompt": f'{s} "{a} {b}{c}"'} for s, a, b, c in random.Random(seed).sample(list(texts), n)]

# shapes: the tiny model's reward reads color, shape and side off the pixels of a 32 x 32 picture
COLORS = {"red": (.9, .15, .15), "green": (.15, .75, .2), "blue": (.2, .3, .95), "yellow": (.95, .85, .15)}
WORDS = (tuple(COLORS), ("circle", "square", "triangle"), ("left", "right"))
BACKGROUND = 0.05

def palette(device=None):
    return torch.tensor(list(COLORS.values()), device=device)

def shape_masks(x, y, area, size=32):
    """Soft masks [N, 3, size, size] of a circle, a square and a triangle around x, y, of this area [N]."""
    grid = torch.arange(size, device=x.device) + 0.5
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    side = area.sqrt()[:, None, None]
    height = 3 ** 0.25 * side                                       # equilateral: area = height^2 / sqrt(3)
    circle = side / math.sqrt(math.pi) - (dx.square() + dy.square()).sqrt()
    square = side / 2 - torch.maximum(dx.abs(), dy.abs())
    triangle = torch.minimum(height / 3 - dy, (2 / 3 * height + dy) / 2 - dx.abs() * math.sqrt(3) / 2)
    return (torch.stack(torch.broadcast_tensors(circle, square, triangle), 1) + 0.5).clamp(0, 1)

def read_shapes(images):
    """[N, 3, H, W] -> [N, 3]: color, shape and side as indices into WORDS, -1 where none can be told."""
    images = F.interpolate(images.float(), (32, 32), mode="area")
    mask = ((images - BACKGROUND).abs().amax(1) > 0.3).float()      # [N, 32, 32]
    area = mask.sum((1, 2)).clamp(min=1)
    grid = torch.arange(32, device=images.device) + 0.5
    x, y = (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area
    rgb = (images * mask[:, None]).sum((2, 3)) / area[:, None]
    far, color = (rgb[:, None] - palette(images.device)).norm(dim=-1).min(1)
    ideal, mask = shape_masks(x, y, area), mask[:, None]
    iou, shape = (torch.minimum(ideal, mask).sum((2, 3)) / torch.maximum(ideal, mask).sum((2, 3))).max(1)
    one = (area >= 30) & (area <= 300)                              # neither a speck nor the whole picture
    seen = torch.stack([one & (far < 0.4), one & (iou > 0.6), one], 1)
    return torch.where(seen, torch.stack([color, shape, (x > 16).long()], 1), -1)

def shapes_right(images, prompts):
    """[N, 3] booleans: is the prompt's word of each kind what the picture shows?"""
    asked = [[[word in prompt.split() for word in kind].index(True) for kind in WORDS] for prompt in prompts]
    return read_shapes(images).cpu() == torch.tensor(asked)

def shapes(images, prompts, metadata):
    """The share of color, shape and side that is right."""
    return shapes_right(images, prompts).float().mean(1)

def shapes_strict(images, prompts, metadata):
    """1 where all three are right."""
    return shapes_right(images, prompts).all(1).float()

def own_reward(path):
    """FILE.py:NAME"""
    file, _, name = path.rpartition(":")
    reward = runpy.run_path(file).get(name) if Path(file).is_file() else None
    if not callable(reward):
        raise UsageError(f"there is no file {file} with a function or class {name!r}")
    return reward

CLIP = functools.partial(Clip, "openai/clip-vit-large-patch14")
REWARDS = {     # name -> a function of models and a batch; what loads these models from the hub or a folder
    "pickscore": (lambda clip, *batch: clip.model.logit_scale.exp() * clip(*batch) / 26,
                  functools.partial(Clip, "yuvalkirstain/PickScore_v1")),
    "clipscore": (nn.Module.__call__, CLIP),
    "hpsv2": (nn.Module.__call__, functools.partial(Clip, "xswu/HPSv2")),
    "aesthetic": (lambda clip, head, images, *_: head(clip.images(images)).squeeze(-1), CLIP, lambda folder: (
        load_renamed(linear_head(), "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", folder))),
    "imagereward": (nn.Module.__call__, ImageReward),
    "ocr": (nn.Module.__call__, Ocr),
    "incompressibility": (lambda images, *_: torch.tensor([len(jpeg(image)) / 1000 for image in images]),),
    "compressibility": (lambda images, *_: torch.tensor([-len(jpeg(image)) / 1000 for image in images]),),
    "shapes": (shapes,),
    "shapes-strict": (shapes_strict,),
    "FILE.py:NAME": (lambda reward, images, *rest: reward(images.clone(), *rest), own_reward)}
NEEDS = {       # what a prompt, or its metadata, must have
    "ocr": ("text in straight double quotes", lambda prompt, data: QUOTED.search(prompt)),
    "shapes": (f"word of each of {WORDS}",
               lambda prompt, data: all(set(kind) & set(prompt.split()) for kind in WORDS))}

class Rewards:
    """`--reward`: (images [N, 3, H, W], prompts, metadata) -> {name: float32 [N] on the CPU}."""
    chunk = 32

    def __init__(self, spec, device="cpu", offload=False, share=None):
        self.device, self.home = torch.device(device), torch.device("cpu" if offload else device)
        self.weights, self.rewards, self.models = {}, {}, share.models if share else {}
        for loading, item in itertools.product((False, True), spec.split(",")):        # read all, then load
            with one_line(UsageError, f"--reward {item}", "; try `hf auth login`, or NAME@FOLDER"):
                what, weight = (item.strip().rsplit("=", 1) + ["1"])[:2]
                name, _, source = what.partition("@")
                key = name
                if ".py:" in what:
                    key, name, source = "FILE.py:NAME", what.rpartition(":")[2], what
                if loading:
                    self.load(name, key, source)
                elif key not in REWARDS or name in self.weights or not 0 <= float(weight) < math.inf:
                    raise UsageError(f"write NAME=NUMBER, each once, 0 or more; NAME: {', '.join(REWARDS)}")
                self.weights[name] = float(weight)
        if not any(self.weights.values()):
            raise UsageError(f"--reward {spec}: all weights are 0")

    def load(self, name, key, source):
        """Each model once, however many rewards use it."""
        reward, *loaders = REWARDS[key]
        for loader in loaders:
            if (loader, source) not in self.models:
                model = loader(source)
                self.models[loader, source] = model(self.device) if isinstance(model, type) else model
        models = [self.models[loader, source] for loader in loaders]
        modules = nn.ModuleList(model for model in models if isinstance(model, nn.Module))
        self.rewards[name] = functools.partial(reward, *models), modules, NEEDS.get(key.split("-")[0])

    def check(self, prompts, metadata):
        """At start-up: name the first prompt that a reward cannot judge."""
        for name, (_, _, need) in self.rewards.items():
            for prompt, data in zip(prompts, metadata):
                if need and not need[1](prompt, data):
                    raise UsageError(f"--reward {name}: prompt {prompt!r} has no {need[0]}")

    def __call__(self, images, prompts, metadata):
        starts, scores, images = range(0, len(images), self.chunk), {}, quantise(images).to(self.device)
        chunks = [[part[i:i + self.chunk] for part in (images, prompts, metadata)] for i in starts]
        for name, (reward, modules, _) in self.rewards.items():
            modules.to(self.device)
            scores[name] = torch.cat([self.score(name, reward, *chunk) for chunk in chunks])
            modules.to(self.home)
        return scores

    def score(self, name, reward, images, prompts, metadata):
        with torch.inference_mode(), one_line(RunError, f"reward {name} on {list(dict.fromkeys(prompts))}"):
            scores = reward(images, prompts, metadata)
            got = f"{scores.dtype} {list(scores.shape)}" if torch.is_tensor(scores) else type(scores).__name__
            if "float" not in got or scores.shape != (len(images),) or scores.isinf().any():
                raise TypeError(f"it returned {got}, not {len(images)} finite floats or NaN")
            return scores.float().cpu()

def main():
    import numpy as np
    from PIL import Image
    parser = argparse.ArgumentParser(description="Score images: one line for each.")
    parser.add_argument("--reward", required=True, help="NAME[@FOLDER] or FILE.py:NAME; several with commas")
    parser.add_argument("--prompt", default="", help="what the images were to show")
    parser.add_argument("--metadata", default={}, type=json.loads, help="of the prompt, as JSON")
    parser.add_argument("images", nargs="+", help="picture files")
    args = parser.parse_args()
    try:
        rewards = Rewards(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        rewards.check([args.prompt], [args.metadata])
        for path in args.images:
            image = torch.tensor(np.asarray(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255
            scores = rewards(image, [args.prompt], [args.metadata])
            print(path, *(f"{name} {score.item():.4f}" for name, score in scores.items()))
    except (UsageError, RunError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)

if __name__ == "__main__":
    main()
