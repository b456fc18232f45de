"""OCR: does the picture show the text that its prompt has in "straight double quotes"?

PP-OCRv5 in two networks: a detector's map of text -> boxes -> a reader's characters -> a distance.
"""
import math
import re
from functools import cmp_to_key

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from extras.hpsv2 import plain
from rewards import load, place, standardise

DETECTOR = "PaddlePaddle/PP-OCRv5_server_det_safetensors"
READER = "PaddlePaddle/PP-OCRv5_server_rec_safetensors"
QUOTED = re.compile('"([^"]*[^" ][^"]*)"')


class OCR(nn.Module):
    """1 - (edits between what is read and what is asked for) / length"""
    def __init__(self, device, folder=""):
        super().__init__()
        self.detector = load(hf.AutoModelForObjectDetection, DETECTOR, folder)
        self.reader = load(hf.AutoModelForTextRecognition, READER, folder)
        options, _ = hf.ImageProcessingMixin.get_image_processor_dict(place(READER, folder))
        self.characters = options["character_list"]

    def check(self, prompt, data):
        return "" if QUOTED.search(prompt) else "text in straight double quotes"

    def forward(self, images, prompts, metadata):
        scores = []
        for image, prompt in zip(images, prompts):
            text = read_text(self.detector, self.reader, self.characters, image)
            scores.append(ocr_score(text, QUOTED.search(prompt)[1]))
        return torch.tensor(scores)


def resize(images, size):
    return F.interpolate(images, size, mode="bilinear")


def components(mask):
    """[H, W] bool -> [H, W] labels: 0 outside, and one number for each 8-connected region"""
    before = mask.double()
    labels = mask.flatten().cumsum(0).view(mask.shape).double() * mask      # first a number a pixel
    while not torch.equal(labels, before):
        before = labels
        labels = F.max_pool2d(labels[None], 3, 1, 1)[0] * mask              # the largest around,
        labels = labels[mask][labels.long() - 1] * mask                     # then that one's label
    return labels


def reading_order(a, b):
    """From the top; boxes that begin within 10 pixels of height are of one line, left to right."""
    (top, left, _, _), (other_top, other_left, _, _) = a, b
    if abs(top - other_top) < 10:
        return left - other_left
    return top - other_top


def text_boxes(probs, size):
    """A map of text [h, w] -> boxes [top, left, bottom, right] along the axes of a picture of size
    (H, W), in the order of reading"""
    labels, boxes = components(probs > 0.3), []
    size = torch.tensor(size)
    scale = size / torch.tensor(probs.shape)
    for label in labels[labels > 0].unique():
        inside = labels == label
        low, high = inside.nonzero().cpu().double().aminmax(dim=0)  # of [K, 2]: y, x
        sides = high - low
        if sides.min() >= 3 and probs[inside].mean() >= 0.6:
            grow = 1.5 * sides.prod() / (2 * sides.sum())           # the map is of the lines' cores
            box = torch.stack([low - grow, high + grow]) * scale
            box = box.round().long().clamp(min=0).minimum(size)
            boxes.append(box.flatten().tolist())
    return sorted(sorted(boxes), key=cmp_to_key(reading_order))


def read_line(reader, characters, strip):
    """[1, 3, 48, W] in [0, 1] -> its text; nothing where the reader is in doubt"""
    pixels = F.pad(strip * 2 - 1, (0, max(0, 320 - strip.shape[3])))
    best, index = reader(pixels).last_hidden_state[0].max(-1)       # [T]
    before = F.pad(index[:-1], (1, 0))
    new = (index != 0) & (index != before)                          # no blank, no repeat
    sure = best[new].mean() >= 0.5                                  # NaN where there is nothing
    return "".join(characters[i] for i in index[new].tolist()) if sure else ""


def read_text(detector, reader, characters, image):
    """[3, H, W] -> its lines, joined without a sign between them"""
    sides = image.shape[1:]
    ratio = min(1, 960 / max(sides))
    size = [max(32, round(int(side * ratio) / 32) * 32) for side in sides]
    pixels = standardise(resize(image[None], size).flip(1))         # B, G, R
    probs = detector(pixels).last_hidden_state[0, 0]
    lines = []
    for top, left, bottom, right in text_boxes(probs, sides):
        width = min(3200, math.ceil(48 * (right - left) / (bottom - top)))
        strip = resize(image[None, :, top:bottom, left:right], (48, width))
        lines.append(read_line(reader, characters, strip))
    return "".join(lines)


def ocr_score(read, target):
    """1 - Levenshtein distance / length, without spaces, case and width; 1 if the target is within
    what was read"""
    read, target = (plain(text).replace(" ", "").lower() for text in (read, target))
    if target in read:
        return 1.0
    row = range(len(target) + 1)
    for i, a in enumerate(read, 1):
        above, row = row, [i]
        for j, b in enumerate(target, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return 1 - min(row[-1], len(target)) / len(target)
