"""The rewards of V-GRPO's recipes, on transformers alone: python rewards.py --reward hpsv2 --prompt cat a.png

A reward is fn(images [N, 3, H, W] in [0, 1], prompts, metadata) -> float [N], NaN where there is no score.
In `--reward pickscore=1,hpsv2@DIR=0.5,mine.py:fn=2` DIR stands for the hub: OWNER/NAME is DIR/NAME, else DIR.
"""
import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import math
import re
import runpy
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cmp_to_key, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from torch import nn
from transformers.initialization import no_init_weights

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

@contextlib.contextmanager
def visiting(parts, device):
    """Frozen modules come to the device to work. What is on the CPU stays there: nothing is copied back."""
    modules = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    home = [(p, p.data) for p in modules.parameters()]
    modules.to(device)
    yield
    for p, data in home:
        p.data = data

resize = partial(F.interpolate, mode="bilinear")
HALF = torch.autocast("cuda", torch.float16, enabled=torch.cuda.is_available())

def quantise(images):
    return (images.detach().float().clamp(0, 1) * 255).round() / 255            # as a user would save them

def standardise(images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)

def jpeg(image):
    file, pixels = io.BytesIO(), (image * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.cpu().numpy()).save(file, "JPEG", quality=95)
    return file.getvalue()

def place(repo, folder):
    """Where transformers finds OWNER/NAME: on the hub, or in a folder."""
    inside = Path(folder or "", Path(repo).name)
    return (inside if inside.is_dir() else Path(folder).resolve(strict=True)) if folder else repo

def load(kind, repo, folder):
    model, report = kind.from_pretrained(place(repo, folder), dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:                                      # transformers only warns
        raise UsageError(f"{place(repo, folder)} is not {repo}: it lacks {min(report['missing_keys'])}")
    return model

RENAMES = {     # open_clip's and BLIP's names -> transformers', rule after rule; an empty name is dropped
    r".*position_ids$": "", r"^blip\.visual_encoder": "vision_model", r"^blip\.": "", r"^layers\.": "",
    r"^mlp\.layers": "itm_head", r"^visual\.proj$": "visual_projection.weight", r"^visual\.": "vision_model.",
    r"^text_projection$": "text_projection.weight", r"attn\.proj": "attn.projection", r"c_proj": "fc2",
    r"^(?=transformer|token_|positional|ln_final)": "text_model.", r"\.attn\.": ".self_attn.", "c_fc": "fc1",
    r"(transformer\.res)?blocks": "encoder.layers", r"(class|token)_embedding": r"embeddings.\1_embedding",
    r"conv1|patch_embed\.proj": "embeddings.patch_embedding", r"cls_token": "embeddings.class_embedding",
    r"positional_embedding$": "embeddings.position_embedding.weight", r"ln_final": "final_layer_norm",
    r"pos_embed$": "embeddings.position_embedding", r"model\.(norm|ln_post)": "model.post_layernorm",
    r"ln_pre": "pre_layrnorm", r"\.(ln_|norm)(\d)": r".layer_norm\2"}

@no_init_weights()
def blank(kind, config):
    return kind(config)                                             # half a minute, were a ViT-H drawn first

def load_renamed(model, repo, file, folder):
    """Weights published under other names; a missing or unexpected one is an error that names it."""
    state, renamed = torch.load(hf.utils.cached_file(place(repo, folder), file), map_location="cpu"), {}
    for name, value in state.get("state_dict", state).items():
        for rule in RENAMES.items():
            name = re.sub(*rule, name)
        if "in_proj_" in name:                                      # q, k and v in one
            renamed.update(zip([name.replace("in_proj_", f"{x}_proj.") for x in "qkv"], value.chunk(3)))
        elif name:
            renamed[name] = value.T if name.endswith("_projection.weight") else value
    model.load_state_dict(renamed)
    return model.eval()

LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"                     # PickScore and HPSv2.1 started from it
PLAIN = {0x3000: " "} | dict(zip(range(0xFF01, 0xFF5F), range(0x21, 0x7F)))         # what ftfy would mend
PLAIN |= dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')

def clip_pixels(images, pad=False):
    """Bicubic to [N, 3, 224, 224]: CLIP cuts the longer side, in 8 bits; HPSv2 pads the shorter one."""
    sides = images.shape[-2:]
    height, width = (round(224 * side / max(sides)) if pad else 224 * side // min(sides) for side in sides)
    images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = int((224 - height) / 2), int((224 - width) / 2)     # negative: cut
    images = F.pad(images if pad else quantise(images), (left, 224 - width - left, top, 224 - height - top))
    return standardise(images, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

class Clip(nn.Module):
    """cos(text, image) of a CLIP; features are computed once per batch and once per prompt."""
    def __init__(self, repo, folder):
        super().__init__()
        texts = place(repo if repo.startswith("openai/") else LAION, folder)
        self.tokenizer, self.hps = hf.AutoTokenizer.from_pretrained(texts), repo == "xswu/HPSv2"
        self.model = load(hf.CLIPModel, repo, folder) if not self.hps else load_renamed(
            blank(hf.CLIPModel, hf.CLIPConfig.from_pretrained(texts)), repo, "HPS_v2.1_compressed.pt", folder)
        self.seen = torch.utils.weak.WeakTensorKeyDictionary()      # forgets the features with the images
        self.text = lru_cache(10_000)(self.encode_text)

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

def load_imagereward(folder):
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=224, layer_norm_eps=1e-6)
    config = hf.BlipConfig(vision_config=vision, text_config={"num_attention_heads": 12})
    blip, bert = blank(hf.BlipForImageTextRetrieval, config), place("google-bert/bert-base-uncased", folder)
    blip.itm_head, blip.tokenizer = linear_head(), hf.AutoTokenizer.from_pretrained(bert)
    return load_renamed(blip, "THUDM/ImageReward", "ImageReward.pt", folder)

def imagereward(blip, images, prompts, metadata):
    """BLIP's text encoder reads the prompt while it looks at the image; a linear head on its first token."""
    tokens = blip.tokenizer(prompts, padding="max_length", max_length=35, truncation=True)
    ids, mask = (torch.tensor(tokens[key]).to(images.device) for key in ("input_ids", "attention_mask"))
    with HALF:
        patches = blip.vision_model(clip_pixels(images)).last_hidden_state
        states = blip.text_encoder(ids, mask, encoder_hidden_states=patches).last_hidden_state
    return (blip.itm_head(states[:, 0].float()).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072

# GenEval: a detector's masks (official architecture, other weights) -> objects -> colors, places -> a verdict
COCO = re.split(r",\s", """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush""")
CLIP_COLORS = "red orange yellow green blue purple pink brown black white".split()
SIDES = ("left of", "right of", "above", "below")

class Detector(hf.Mask2FormerModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which needs scipy."""
    def __init__(self, config):
        super().__init__(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)

def find_objects(detector, image, tag=None):
    """[3, H, W] -> {class: [(score, box [[x0, y0], [x1, y1]], mask [H, W])]}, at most 16, best first."""
    size, threshold, found = image.shape[1:], 0.9 if tag == "counting" else 0.3, {}
    scale = min(1333 / max(size), 800 / min(size))
    height, width = (int(side * scale + 0.5) for side in size)
    pixels = F.pad(standardise(resize(image[None], (height, width))), (0, -width % 32, 0, -height % 32))
    out = detector(pixels, output_hidden_states=True)
    classes = detector.class_predictor(out.transformer_decoder_intermediate_states[-1][:, 0])
    probs, best = classes.softmax(-1)[:, :-1].flatten().topk(100)   # of 100 * 80: the last class is "nothing"
    for prob, i in zip(probs[probs > threshold], best.tolist()):
        mask = resize(out.masks_queries_logits[-1][:, [i // 80]], pixels.shape[2:])[..., :height, :width]
        mask = resize(mask, size)[0, 0]
        score = (prob * mask[mask > 0].sigmoid().mean()).item()     # NaN for an empty mask
        if score > threshold:
            low, high = (mask > 0).nonzero().flip(1).aminmax(dim=0)             # of [K, 2]: x, y
            found.setdefault(COCO[i % 80], []).append((score, torch.stack([low, high + 1]), mask > 0))
    return {name: sorted(group, key=lambda one: -one[0])[:16] for name, group in found.items()}

def object_color(clip, image, name, box, mask):
    """CLIP's zero-shot color of an object, cut out on grey."""
    forms = f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object"
    texts = torch.stack([sum(clip.text(form.format(color)) for form in forms) for color in CLIP_COLORS])
    (x0, y0), (x1, y1) = box.tolist()
    cut = torch.where(mask, image, 0x99 / 255)[None, :, y0:y1, x0:x1]
    return CLIP_COLORS[(clip.images(cut) @ F.normalize(texts, dim=-1).T).argmax()]

def relations(a, b):
    """Where box a lies, seen from box b; a shift within a tenth of both sizes does not count."""
    shift, slack = (a - b).double().mean(0), 0.1 * (a[1] - a[0] + b[1] - b[0])
    x, y = shift.sign() * (shift.abs() - slack).clamp(min=0) / shift.norm().clamp(min=0.1)
    return {side for side, part in zip(SIDES, (-x, x, -y, y)) if part > 0.5}

def verdict(found, data, color_of, rule):
    """Objects against GenEval's metadata -> "score": the mean of the parts; "strict", "accuracy": 0 or 1."""
    parts, groups = [], []
    for want in data["include"]:
        group, count = found.get(want["class"], []), want["count"]
        group = group[:count] if rule == "accuracy" else group      # officially more are no error
        parts.append(max(0, 1 - abs(count - len(group)) / count))
        group = group if len(group) == count else []                # a wrong number has no color and no place
        if "color" in want:
            parts.append(sum(color_of(want["class"], *one[1:]) == want["color"] for one in group) / count)
        if "position" in want:
            side, other = want["position"]
            holds = [side in relations(a[1], b[1]) for a in group for b in groups[other]]
            parts.append(any(holds) and all(holds))
        groups.append(group if parts[-1] == 1 else [])              # what others are placed by must be right
    too_many = any(len(found.get(no["class"], [])) >= no["count"] for no in data.get("exclude", []))
    return sum(parts) / len(parts) if rule == "score" else float(min(parts) == 1 and not too_many)

def geneval(rule, detector, clip, images, prompts, metadata):
    found = [find_objects(detector, image, data.get("tag")) for image, data in zip(images, metadata)]
    return torch.tensor([verdict(objects, data, partial(object_color, clip, image), rule)
                         for objects, data, image in zip(found, metadata, images)])

# OCR: a detector's map of text -> boxes -> characters -> a distance
QUOTED = re.compile('"([^"]*[^" ][^"]*)"')

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
        low, high = (labels == label).nonzero().cpu().double().aminmax(dim=0)       # of [K, 2]: y, x
        sides = high - low
        if sides.min() >= 3 and probs[labels == label].mean() >= 0.6:
            grow = 1.5 * sides.prod() / (2 * sides.sum())           # area / perimeter: the map is of cores
            corners = torch.stack([low - grow, high + grow]) * (size / torch.tensor(probs.shape))
            boxes.append(corners.round().long().clamp(min=0).minimum(size).flatten().tolist())
    line = cmp_to_key(lambda a, b: a[1] - b[1] if abs(a[0] - b[0]) < 10 else a[0] - b[0])
    return sorted(sorted(boxes), key=line)

def read_text(detector, reader, characters, image):
    """[3, H, W] -> its lines, joined without separator."""
    ratio, text = min(1, 960 / max(image.shape[1:])), ""
    size = [max(32, round(int(side * ratio) / 32) * 32) for side in image.shape[1:]]
    pixels = standardise(resize(image[None], size).flip(1))         # B, G, R
    for y0, x0, y1, x1 in text_boxes(detector(pixels).last_hidden_state[0, 0], image.shape[1:]):
        width = min(3200, math.ceil(48 * (x1 - x0) / (y1 - y0)))
        strip = resize(image[None, :, y0:y1, x0:x1], (48, width)) * 2 - 1
        best, index = reader(F.pad(strip, (0, max(0, 320 - width)))).last_hidden_state[0].max(-1)   # [T]
        new = (index != 0) & (index != F.pad(index[:-1], (1, 0)))   # no blank, no repeat
        if best[new].mean() >= 0.5:
            text += "".join(characters[i] for i in index[new].tolist())
    return text

def ocr_score(read, target):
    """1 - Levenshtein distance / length, without spaces and case; 1 if the target is within what was read."""
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    row = range(len(target) + 1)
    for i, a in enumerate(read, 1):
        above, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1.0 if target in read else 1 - min(row[-1], len(target)) / len(target)

def ocr(detector, reader, characters, images, prompts, metadata):
    texts = [read_text(detector, reader, characters, image) for image in images]
    return torch.tensor([ocr_score(text, QUOTED.search(prompt)[1]) for text, prompt in zip(texts, prompts)])

JUDGE = """This picture was generated from the caption "{}". Judge how well it matches and how good it looks.
Explain briefly, then end with one line "Final Score: X", with X from 1 (bad) to 5 (perfect)."""

def call(url, body=None):
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)

class Judge:
    """UnifiedReward, a vision-language model behind an OpenAI-compatible server."""
    def __init__(self, url):
        self.url, serve = f"{url}".rstrip("/") + "/v1/", "vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b"
        with one_line(UsageError, f"no judge at {url}; `{serve}`, then unified@http://localhost:8000"):
            self.model = call(self.url + "models")["data"][0]["id"]

    def ask(self, image, prompt):
        picture = "data:image/jpeg;base64," + base64.b64encode(jpeg(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}},
                   {"type": "text", "text": JUDGE.format(prompt)}]
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        for _ in range(3):
            with contextlib.suppress(Exception):                    # no answer, or none with a score
                text = call(self.url + "chat/completions", body)["choices"][0]["message"]["content"].lower()
                score = float(re.findall(r"final score[\s:*_`]*(\d+(?:\.\d+)?)", text)[-1])
                return score / 5 if 1 <= score <= 5 else math.nan   # a "10" is neither 1 nor 5
        return math.nan

    def __call__(self, images, prompts, metadata):
        with ThreadPoolExecutor(32) as pool:
            return torch.tensor([*pool.map(self.ask, images, prompts)])

def load_own(file, name, device=None):
    reward = runpy.run_path(str(file))[name]
    return reward(device) if isinstance(reward, type) else reward   # a class is built with the device

def own(reward, images, prompts, metadata):
    return reward(images.clone(), prompts, metadata)

TINY = str(Path(__file__).with_name("assets") / "tiny.py")
CLIP = partial(Clip, "openai/clip-vit-large-patch14")
DETECTOR = partial(load, Detector, "facebook/mask2former-swin-small-coco-instance")
FIND, READ = (f"PaddlePaddle/PP-OCRv5_server_{part}_safetensors" for part in ("det", "rec"))
REWARDS = {     # name -> a function of models and a batch; what loads these models from the hub or a folder
    "pickscore": (lambda clip, *batch: clip.model.logit_scale.exp() * clip(*batch) / 26,
                  partial(Clip, "yuvalkirstain/PickScore_v1")),
    "clipscore": (Clip.__call__, CLIP),
    "hpsv2": (Clip.__call__, partial(Clip, "xswu/HPSv2")),
    "aesthetic": (lambda clip, head, images, *_: head(clip.images(images)).squeeze(-1), CLIP, lambda folder: (
        load_renamed(linear_head(), "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", folder))),
    "imagereward": (imagereward, load_imagereward),
    "geneval": (partial(geneval, "score"), DETECTOR, CLIP),
    "geneval-strict": (partial(geneval, "strict"), DETECTOR, CLIP),
    "geneval-accuracy": (partial(geneval, "accuracy"), DETECTOR, CLIP),
    "ocr": (ocr, partial(load, hf.AutoModelForObjectDetection, FIND),
            partial(load, hf.AutoModelForTextRecognition, READ), lambda folder: (
            hf.ImageProcessingMixin.get_image_processor_dict(place(READ, folder))[0]["character_list"])),
    "unified": (Judge.__call__, Judge),
    "incompressibility": (lambda images, *_: torch.tensor([len(jpeg(image)) / 1000 for image in images]),),
    "compressibility": (lambda images, *_: torch.tensor([-len(jpeg(image)) / 1000 for image in images]),),
    "shapes": (own, partial(load_own, TINY, "shapes")),
    "shapes-strict": (own, partial(load_own, TINY, "shapes_strict")),
    "FILE.py:fn": (own, load_own)}
NEEDS = {       # what a prompt, or its metadata, must have
    ocr: ("text in straight double quotes", lambda text, _: QUOTED.search(text)),
    geneval: ('GenEval metadata: give a FILE.jsonl with "include" of COCO classes', lambda _, data: all(
        part.get("class") in COCO and part.get("count", 0) > 0 for part in data.get("include") or [{}]))}

class Rewards:
    """`--reward`: (images [N, 3, H, W], prompts, metadata) -> {name: float32 [N] on the CPU}."""
    def __init__(self, spec, device="cpu", offload=False, share=None):
        self.device, self.home = torch.device(device), torch.device("cpu" if offload else device)
        self.load = share.load if share else cache(lambda loader, *source: loader(*source))
        self.weights, self.rewards = {}, {}
        for item in spec.split(","):
            with one_line(UsageError, f"--reward {item}", "; try `hf auth login`, or NAME@FOLDER"):
                what, weight = (item.strip().rsplit("=", 1) + ["1"])[:2]
                file, _, name = what.rpartition(".py:")
                name, _, source = name.partition("@")
                key, source = ("FILE.py:fn", [file + ".py", name, self.device]) if file else (name, [source])
                if key not in REWARDS or name in self.weights or not 0 <= float(weight) < math.inf:
                    raise UsageError(f"write NAME=NUMBER, each once, 0 or more; NAME: {', '.join(REWARDS)}")
                reward, *loaders = REWARDS[key]
                models = [self.load(loader, *source) for loader in loaders]
                nn.ModuleList(model for model in models if isinstance(model, nn.Module)).to(self.home)
                self.rewards[name] = partial(reward, *models)
                self.weights[name] = float(weight)
        if not any(self.weights.values()):
            raise UsageError(f"--reward {spec}: all weights are 0")

    def check(self, prompts, metadata):
        """At start-up: name the first prompt that a reward cannot judge."""
        for (name, reward), (prompt, data) in itertools.product(self.rewards.items(), zip(prompts, metadata)):
            need, fits = NEEDS.get(reward.func, ("", lambda *_: True))
            with one_line(UsageError, f"--reward {name}: prompt {prompt!r} has no {need}"):
                assert fits(prompt, data)

    def __call__(self, images, prompts, metadata, chunk=32):
        batch, scores = (quantise(images).to(self.device), prompts, metadata), {}
        chunks = [[part[i:i + chunk] for part in batch] for i in range(0, len(images), chunk)]
        for name, reward in self.rewards.items():
            where = f"reward {name} on {[*dict.fromkeys(prompts)]}"
            with visiting(reward.args, self.device), one_line(RunError, where), torch.inference_mode():
                row = torch.cat([reward(*part) for part in chunks]).cpu()
                if not row.is_floating_point() or row.shape != (len(images),) or row.float().isinf().any():
                    raise TypeError(f"{row.dtype} {list(row.shape)}: not {len(images)} floats or NaN")
            scores[name] = row.float().clone()                      # no tensor of the inference mode any more
        return scores

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score images: one line for each.")
    parser.add_argument("--reward", required=True, help="NAME[@FOLDER] or FILE.py:NAME; several with commas")
    parser.add_argument("--prompt", default="", help="what the images were to show")
    parser.add_argument("--metadata", default={}, type=json.loads, help="GenEval's, as JSON")
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
        parser.exit(1 if isinstance(error, RunError) else 2, f"{error}\n")
