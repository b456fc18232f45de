"""Rewards score images.  python rewards.py --reward pickscore --prompt "a cat" one.png two.png

A reward is fn(images [N, 3, H, W] in [0, 1], prompts, metadata) -> float [N], NaN for "no score":
a function of a Python file, or a class whose instances are called so. A class is built once, with
the device and, if an @ follows its name, the text behind it. Its check(prompt, metadata), if it has
one, says what a prompt lacks before anything runs. --reward takes, with commas between them:
    pickscore, pickscore=0.5    a name of REWARDS, of weight 1 or another (0: reported only)
    hpsv2@DIR                   files from a folder: the hub's OWNER/NAME is DIR/NAME, else DIR
    mine.py:fn=2                your own, found and called as those of REWARDS are
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import re
import sys
import traceback
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import nn
from transformers.initialization import no_init_weights

HERE = Path(__file__).resolve().parent
THIS, EXTRAS = HERE / "rewards.py", HERE / "extras"
TINY, MINI = EXTRAS / "tiny_world.py", EXTRAS / "mini_geneval.py"
REWARDS = {
    "pickscore": (THIS, "PickScore"),
    "clipscore": (THIS, "ClipScore"),
    "hpsv2": (EXTRAS / "hpsv2.py", "HPSv2"),
    "aesthetic": (EXTRAS / "aesthetic.py", "Aesthetic"),
    "imagereward": (EXTRAS / "imagereward.py", "ImageReward"),
    "geneval": (EXTRAS / "geneval.py", "GenEval"),
    "geneval-strict": (EXTRAS / "geneval.py", "Strict"),
    "geneval-accuracy": (EXTRAS / "geneval.py", "Accuracy"),
    "ocr": (EXTRAS / "ocr.py", "OCR"),
    "unified": (EXTRAS / "judge.py", "Judge"),
    "incompressibility": (THIS, "incompressibility"),
    "compressibility": (THIS, "compressibility"),
    "objects": (MINI, "score"), "objects-strict": (MINI, "strict"), "as-drawn": (MINI, "as_drawn"),
    "shapes": (TINY, "shapes"), "shapes-strict": (TINY, "shapes_strict")}

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
        mend = mend if isinstance(error, (OSError, UnicodeError)) else ""
        raise kind(f"{where}: {what}{' '.join(str(error).split())}{mend}") from error

@cache
def import_file(path):
    """A Python file as a module, once per process, however it is asked for."""
    if path.parent in (HERE, EXTRAS):
        return importlib.import_module(("extras." if path.parent == EXTRAS else "") + path.stem)
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module                     # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module

def import_own(file, name):
    """What FILE.py:NAME stands for."""
    return getattr(import_file(Path(file).resolve(strict=True)), name)

@cache
def build(kind, device, source):
    """An instance of a class, the same one for all who ask: no model is loaded twice."""
    return kind(device, source) if source else kind(device)

@contextlib.contextmanager
def visiting(parts, device):
    """Frozen modules come to the device to work; they stay at home too, so none is copied back."""
    modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    home = [(p, p.data) for p in modules.parameters()]
    try:
        modules.to(device)
        yield
    finally:
        for p, data in home:
            p.data = data

class Rewards:
    """(images [N, 3, H, W] or videos [N, F, 3, H, W], float or uint8; prompts; metadata)
    -> {name: float32 [N] on the CPU}"""
    def __init__(self, spec, device="cpu", offload=False, flag="--reward"):
        self.device, self.flag = torch.device(device), flag
        self.home = torch.device("cpu") if offload else self.device
        self.weights, self.rewards, self.own = {}, {}, {}
        for item in spec.split(","):
            with one_line(UsageError, f"{flag} {item}", "; try `hf auth login`, or NAME@FOLDER"):
                self.add(item.strip())
        if not any(self.weights.values()):
            raise UsageError(f"{flag} {spec}: all weights are 0")

    def add(self, item):
        """NAME or FILE.py:NAME, perhaps @SOURCE, perhaps =WEIGHT"""
        what, weight = item.rsplit("=", 1) if "=" in item else (item, 1)
        file, own, name = what.rpartition(".py:")
        name, _, source = name.partition("@")
        known, new = own or name in REWARDS, name not in self.weights
        if not (known and new and 0 <= float(weight) < math.inf):
            raise UsageError("write NAME=NUMBER, each once, 0 or more; NAME: FILE.py:fn, "
                             + ", ".join(REWARDS))
        reward = import_own(file + ".py", name) if own else import_own(*REWARDS[name])
        if isinstance(reward, type):
            reward = build(reward, self.device, source)
        if isinstance(reward, nn.Module):
            reward.to(self.home)
        self.rewards[name], self.own[name], self.weights[name] = reward, own, float(weight)

    def check(self, prompts, metadata):
        """At start-up: name the first prompt that a reward cannot judge."""
        for name, reward in self.rewards.items():
            check = getattr(reward, "check", lambda prompt, data: "")
            for prompt, data in zip(prompts, metadata):
                if lack := check(prompt, data):
                    raise UsageError(f"{self.flag} {name}: prompt {prompt!r} has no {lack}")

    def __call__(self, images, prompts, metadata, chunk=32):
        images = images.to(self.device)                 # first: a device divides in no time
        images = images / 255 if images.dtype == torch.uint8 else quantise(images)
        whole = split((images, prompts, metadata), chunk)
        if images.ndim == 4:
            return {name: self.score(name, whole, prompts) for name in self.rewards}
        frames, scores = images.shape[1], {}            # a video: [N, F, 3, H, W]
        texts = [[text for text in each for _ in range(frames)] for each in (prompts, metadata)]
        single = split((images.flatten(0, 1), *texts), chunk)
        for name, reward in self.rewards.items():
            if getattr(reward, "videos", False):        # it wants them whole
                scores[name] = self.score(name, whole, prompts)
            else:                                       # the mean of the frames that have a score
                rows = self.score(name, single, texts[0])
                scores[name] = rows.view(-1, frames).nanmean(1)
        return scores

    def score(self, name, chunks, prompts):
        reward, rows = self.rewards[name], []
        where = f"reward {name} on {list(dict.fromkeys(prompts))[:3]}"
        with visiting([reward], self.device), one_line(RunError, where), torch.inference_mode():
            for images, *texts in chunks:
                images = images.clone() if self.own[name] else images   # a user's may write to them
                rows.append(reward(images, *texts))
            row, N = torch.cat(rows).cpu(), len(prompts)
            if not row.is_floating_point() or row.shape != (N,) or row.float().isinf().any():
                raise TypeError(f"{row.dtype} {list(row.shape)}: not {N} floats or NaN")
        return row.float().clone()                      # no tensor of the inference mode any more

def split(batch, size):
    """(images, prompts, metadata) in pieces of so many images"""
    starts = range(0, len(batch[0]), size)
    return [[part[start:start + size] for part in batch] for start in starts]

def quantise(images):
    """As a user would save them, in 8 bits."""
    return (images.detach().float().clamp(0, 1) * 255).round() / 255

def standardise(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    mean, std = (images.new_tensor(channels).view(3, 1, 1) for channels in (mean, std))
    return (images - mean) / std

def clip_pixels(images, middle=int):
    """-> [N, 3, 224, 224]: the shorter side to 224, in 8 bits, then the middle of the longer one.
    Half a pixel is cut off as transformers does (int) or rounded to even as torchvision (round)."""
    height, width = (224 * side // min(images.shape[-2:]) for side in images.shape[-2:])
    images = quantise(F.interpolate(images, (height, width), mode="bicubic", antialias=True))
    top, left = middle((height - 224) / 2), middle((width - 224) / 2)
    return standardise(images[..., top:top + 224, left:left + 224], CLIP_MEAN, CLIP_STD)

def jpeg(image):
    file, pixels = io.BytesIO(), (image * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.cpu().numpy()).save(file, "JPEG", quality=95)
    return file.getvalue()

def incompressibility(images, prompts, metadata):
    return torch.tensor([len(jpeg(image)) / 1000 for image in images])

def compressibility(images, prompts, metadata):
    return -incompressibility(images, prompts, metadata)

LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"         # PickScore and HPSv2.1 started from it
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available())

class ClipScore(nn.Module):
    """cos(text, image) of a CLIP; features are computed once per batch and once per prompt."""
    repo = texts = "openai/clip-vit-large-patch14"

    def __init__(self, device, folder=""):
        super().__init__()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(place(self.texts, folder))
        self.model = self.load_model(folder)
        self.seen = torch.utils.weak.WeakTensorKeyDictionary()      # forgotten with the images
        self.text = lru_cache(10_000)(self.encode_text)

    def load_model(self, folder):
        return load(hf.CLIPModel, self.repo, folder)

    def encode_text(self, text):
        tokens = self.tokenizer(text, truncation=True, max_length=77, return_tensors="pt")
        with HALF:
            features = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return F.normalize(features[0].float(), dim=-1)

    def encode_pixels(self, pixels):
        with HALF:
            features = self.model.get_image_features(pixels).pooler_output
        return F.normalize(features.float(), dim=-1)

    def images(self, images):
        if images not in self.seen:
            self.seen[images] = self.encode_pixels(clip_pixels(images))
        return self.seen[images]

    def forward(self, images, prompts, metadata):
        texts = torch.stack([self.text(prompt) for prompt in prompts])
        return (self.images(images) * texts).sum(-1)

class PickScore(ClipScore):
    """exp(scale) cos(text, image) / 26"""
    repo, texts = "yuvalkirstain/PickScore_v1", LAION

    def forward(self, images, prompts, metadata):
        return self.model.logit_scale.exp() * super().forward(images, prompts, metadata) / 26

# ---- weights, from the hub or a folder, under transformers' names or others

def place(repo, folder):
    """Where transformers finds OWNER/NAME."""
    inside = Path(folder, Path(repo).name)
    if folder:
        return inside if inside.is_dir() else Path(folder).resolve(strict=True)
    return repo

def load(kind, repo, folder):
    where = place(repo, folder)
    model, report = kind.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:                          # transformers only warns
        raise UsageError(f"{where} is not {repo}: it lacks {min(report['missing_keys'])}")
    return model

@no_init_weights()
def blank(kind, config):
    return kind(config)                                 # half a minute, were a ViT-H drawn first

def renamed(where, file, rules):
    """A file's {name: weight} under other names, rule after rule; an empty name is dropped."""
    state, new = torch.load(hf.utils.cached_file(where, file), map_location="cpu"), {}
    for name, value in state.get("state_dict", state).items():
        for rule in rules.items():
            name = re.sub(*rule, name)
        if "in_proj_" in name and "cross_attn" not in name:         # q, k and v in one
            names = [name.replace("in_proj_", f"{letter}_proj.") for letter in "qkv"]
            new.update(zip(names, value.chunk(3)))
        elif name:
            new[name] = value
    return new

def fill(model, state):
    """A missing or unexpected weight is an error that names it; fp32 weights are not copied."""
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()

def main():
    parser = argparse.ArgumentParser(description="Score images: one line for each.")
    parser.add_argument("--reward", required=True, help="NAME[@FOLDER] or FILE.py:NAME, ...")
    parser.add_argument("--prompt", default="", help="what the images were to show")
    parser.add_argument("--metadata", default={}, type=json.loads, help="GenEval's, as JSON")
    parser.add_argument("images", nargs="+", help="picture files")
    args = parser.parse_args()
    try:
        rewards = Rewards(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        rewards.check([args.prompt], [args.metadata])
        for path in args.images:
            image = torch.tensor(np.asarray(Image.open(path).convert("RGB"))).permute(2, 0, 1)
            scores = rewards(image[None], [args.prompt], [args.metadata])
            print(path, *(f"{name} {score.item():.4f}" for name, score in scores.items()))
    except (UsageError, RunError, OSError) as error:
        if isinstance(error, RunError):
            traceback.print_exception(error.__cause__)
        parser.exit(1 if isinstance(error, RunError) else 2, f"{error}\n")

if __name__ == "__main__":
    from rewards import main                            # this file, as extras/ know it
    main()
