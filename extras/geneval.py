"""GenEval: are the objects that a prompt asks for in the picture, in number, colour and place?

A detector finds objects of COCO's classes, CLIP names their colours, their boxes tell the places,
and verdict() compares all that with the metadata: {"tag", "include": [{"class", "count", "color",
"position": ["right of", 0]}], "exclude": [{"class", "count"}]}; what is not asked for is left out.
    geneval             the mean over what is asked for, in [0, 1]: the reward to train with
    geneval-strict      1 where all of it holds and there are exactly `count` objects, else 0
    geneval-accuracy    the official verdict: more objects are no error, unless "exclude" names them
"""
import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from extras.geneval_detector import FACEBOOK, load_detector
from rewards import ClipScore, build, clip_pixels, quantise, standardise

COCO = re.split(r",\s", """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat,
traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""")
CLIP_COLORS = "red orange yellow green blue purple pink brown black white".split()
SIDES = ("left of", "right of", "above", "below")


class GenEval(nn.Module):
    rule = "score"

    def __init__(self, device, source=""):
        super().__init__()
        self.detector = load_detector(source)
        self.clip = build(ClipScore, device, "" if source == FACEBOOK else source)

    def check(self, prompt, data):
        try:
            wants = [want["class"] in COCO and want["count"] > 0 for want in data["include"]]
        except (KeyError, TypeError):
            wants = []
        lack = 'GenEval metadata: give a FILE.jsonl with "include" of COCO classes'
        return "" if wants and all(wants) else lack

    def forward(self, images, prompts, metadata):
        return torch.tensor([self.judge(image, data) for image, data in zip(images, metadata)])

    def judge(self, image, data):
        found = find_objects(self.detector, image, data.get("tag"))
        return verdict(found, data, partial(object_color, self.clip, image), self.rule)


class Strict(GenEval):
    rule = "strict"


class Accuracy(GenEval):
    rule = "accuracy"


def resize(images, size):
    return F.interpolate(images, size, mode="bilinear")


def detector_pixels(image):
    """[3, H, W] -> [1, 3, h, w] with a border up to multiples of 32; h and w without the border"""
    sides = image.shape[1:]
    scale = min(1333 / max(sides), 800 / min(sides))
    height, width = (int(side * scale + 0.5) for side in sides)
    pixels = quantise(resize(image[None], (height, width)))     # mmdet 2 resizes in 8 bits
    pixels = F.pad(pixels, (0, -width % 32, 0, -height % 32), value=128 / 255)
    return standardise(pixels), (height, width)


def find_objects(detector, image, tag=None):
    """[3, H, W] -> {class: [(score, box [[x0, y0], [x1, y1]], mask [H, W])]}, best first"""
    threshold, found = 0.9 if tag == "counting" else 0.3, {}
    pixels, (height, width) = detector_pixels(image)
    out = detector(pixels, output_hidden_states=True)
    logits = detector.class_predictor(out.transformer_decoder_intermediate_states[-1][:, 0])
    probs = logits.softmax(-1)[:, :-1]                      # [100, 80]: "nothing" is left out
    probs, best = probs.flatten().topk(100)
    for prob, i in zip(probs[probs > threshold], best.tolist()):
        query, label = divmod(i, 80)
        logits = resize(out.masks_queries_logits[-1][:, [query]], pixels.shape[2:])
        logits = resize(logits[..., :height, :width], image.shape[1:])[0, 0]
        mask = logits > 0
        score = (prob * logits[mask].sigmoid().mean()).item()       # NaN for an empty mask
        if score > threshold:
            low, high = mask.nonzero().flip(1).aminmax(dim=0)       # of [K, 2]: x, y
            box = torch.stack([low, high + 1])
            found.setdefault(COCO[label], []).append((score, box, mask))
    return {name: sorted(group, key=lambda one: -one[0])[:16] for name, group in found.items()}


def object_color(clip, image, name, box, mask):
    """The colour by which CLIP knows an object, cut out on grey."""
    texts = []
    for color in CLIP_COLORS:
        forms = (f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}",
                 f"a photo of a {color} object")
        texts.append(F.normalize(sum(clip.text(form) for form in forms), dim=-1))
    (x0, y0), (x1, y1) = box.tolist()
    cut = torch.where(mask, image, 0x99 / 255)[None, :, y0:y1, x0:x1]
    feature = clip.encode_pixels(clip_pixels(cut, round))           # cut as torchvision does
    return CLIP_COLORS[(feature @ torch.stack(texts).T).argmax()]


def relations(a, b):
    """Where box a lies, seen from box b; a shift within a tenth of both sizes does not count."""
    shift = (a - b).double().mean(0)                        # of the centres: x, y
    slack = 0.1 * (a[1] - a[0] + b[1] - b[0])
    far = (shift.abs() - slack).clamp(min=0)
    x, y = shift.sign() * far / shift.norm().clamp(min=0.1)
    return {side for side, part in zip(SIDES, (-x, x, -y, y)) if part > 0.5}


def verdict(found, data, color_of, rule):
    """Objects {class: [(score, box, mask)]}, best first, and color_of(class, box, mask) against the
    metadata. -> by the rule "score" the mean of its parts, by "strict" and "accuracy" 0 or 1"""
    parts, groups = [], []
    for want in data["include"]:
        name, count = want["class"], want["count"]
        group = found.get(name, [])
        if rule == "accuracy":
            group = group[:count]                           # officially more are no error
        parts.append(max(0, 1 - abs(count - len(group)) / count))
        if len(group) != count:
            group = []                                      # no colour and no place is right then
        if "color" in want:
            colors = [color_of(name, box, mask) for _, box, mask in group]
            parts.append(colors.count(want["color"]) / count)
        if "position" in want:
            side, other = want["position"]
            holds = [side in relations(a[1], b[1]) for a in group for b in groups[other]]
            parts.append(any(holds) and all(holds))
        groups.append(group if parts[-1] == 1 else [])      # others are placed by what is right
    if rule == "score":
        return sum(parts) / len(parts)
    excluded = data.get("exclude", [])
    too_many = any(len(found.get(no["class"], [])) >= no["count"] for no in excluded)
    return float(min(parts) == 1 and not too_many)
