"""The mini world: pictures, 40 x 40, of one to three coloured shapes, and sentences about them.

The sentences are of GenEval's six tasks, with its metadata. A composition is what a sentence asks
for, however it is worded; a model that trains never hears of those that are held out.
"""
import math
import random
from itertools import permutations, product

import torch

SIDE, GROUND = 40, 0.05                      # pixels; grey of the ground
COLORS = {"red": (.9, .15, .15), "green": (.15, .75, .2), "blue": (.15, .3, .95),
          "yellow": (.95, .85, .15), "white": (.95, .95, .95)}
SHAPES = ("circle", "triangle", "bar", "cross", "ring")
PLURALS = dict(zip(("circles", "triangles", "bars", "crosses", "rings"), SHAPES))
COUNTS = {"two": 2, "three": 3}
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TURNED = dict(zip(("and", *SIDES), ("and", "right of", "left of", "below", "above")))
KINDS = {"COLOR": COLORS, "SHAPE": SHAPES, "SHAPES": PLURALS, "COUNT": COUNTS, "SIDE": SIDES}
FORMS = {
    "single_object": ("a SHAPE",),
    "two_object": ("a SHAPE and a SHAPE",),
    "counting": ("COUNT SHAPES", "COUNT COLOR SHAPES"),
    "colors": ("a COLOR SHAPE",),
    "position": ("a SHAPE SIDE a SHAPE",),
    "color_attr": ("a COLOR SHAPE and a COLOR SHAPE",)}
HELD_OUT = dict(zip(FORMS, (1, 4, 11, 6, 10, 16)))       # compositions; of each, one sentence
PALETTE = torch.tensor(list(COLORS.values()))

def sentences(tag):
    """All of a task, each a tuple of words."""
    forms = [[KINDS.get(word, (word,)) for word in form.split()] for form in FORMS[tag]]
    return [words for form in forms for words in product(*form) if is_plain(words)]

def is_plain(words):
    """No shape and no colour is named twice."""
    return len(set(words)) == len(words) - (words.count("a") == 2)

def composition(words):
    """One wording of two: "a bar left of a ring", not "a ring right of a bar"."""
    middle = len(words) // 2
    if words[middle] not in TURNED:
        return words
    return min(words, (*words[middle + 1:], TURNED[words[middle]], *words[:middle]))

def split():
    """-> {task: sentences to evaluate on}, {task: sentences to train on}"""
    rng, held_out, others = random.Random(0), {}, {}
    for tag, count in HELD_OUT.items():
        every = sentences(tag)
        rng.shuffle(every)
        hidden = list(dict.fromkeys(map(composition, every)))[:count]
        held_out[tag] = hidden
        others[tag] = [words for words in every if composition(words) not in hidden]
    return held_out, others

def items(sentences_of):
    """{task: sentences} -> the lines of a file of prompts, at most 130 of a task"""
    return [{"prompt": " ".join(words), **metadata(tag, words)}
            for tag, some in sentences_of.items() for words in some[:130]]

def metadata(tag, words):
    """GenEval's: what the picture must show."""
    include, want = [], {"count": 1}
    for word in words:
        if word in COLORS:
            want["color"] = word
        if word in COUNTS:
            want["count"] = COUNTS[word]
        shape = PLURALS.get(word, word)
        if shape in SHAPES:
            include.append({"class": shape, **want})
            want = {"count": 1}
    if tag == "position":                    # the first is placed by the second
        include = [include[1], {**include[0], "position": [words[2], 0]}]
    data = {"tag": tag, "include": include}
    if tag == "counting":
        data["exclude"] = [{"class": shape, "count": include[0]["count"] + 1}]
    return data

def shape_masks(x, y, area):
    """Soft masks [K, 5, 40, 40] of all SHAPES around x, y, of this area [K]."""
    grid = torch.arange(SIDE) + 0.5
    side = area.sqrt()[:, None, None]
    dx, dy = grid - x[:, None, None], grid[:, None] - y[:, None, None]
    wide, high, far = dx.abs(), dy.abs(), torch.hypot(dx, dy)

    def box(half_width, half_height):
        return torch.minimum(half_width * side - wide, half_height * side - high)
    tall = 3 ** 0.25 * side                  # equilateral: area = height^2 / sqrt(3)
    slope = (2 / 3 * tall + dy) / 2 - wide * math.sqrt(3) / 2
    radius = side / math.sqrt(0.75 * math.pi)
    inside = [                               # how far a pixel lies inside of the outline
        side / math.sqrt(math.pi) - far,
        torch.minimum(tall / 3 - dy, slope),
        box(0.35, 1 / 1.4),                               # upright, twice as high as wide
        torch.maximum(box(0.67, 0.22), box(0.22, 0.67)),  # of five squares
        torch.minimum(radius - far, far - radius / 2)]
    return (torch.stack(inside, 1) + 0.5).clamp(0, 1)

def render(pictures, count, shape, color, places):
    """Images [count, 3, 40, 40] of K shapes at places [K, 3] (x, y, area), each in its picture."""
    masks = shape_masks(*places.unbind(1))[torch.arange(len(shape)), shape]
    light = masks[:, None] * (PALETTE[color] - GROUND)[:, :, None, None]
    return torch.full((count, 3, SIDE, SIDE), GROUND).index_add(0, pictures, light).clamp(max=1)

def nearest_color(images, masks):
    """-> the palette's index for the mean colour of each mask [K], and how far off that is"""
    masks = masks[:, None].float()
    rgb = (images * masks).sum((2, 3)) / masks.sum((2, 3))
    far, color = (rgb[:, None] - PALETTE).norm(dim=2).min(1)
    return color, far

def draw(wanted, rng):
    """Images of a list of metadata; what is not asked for varies."""
    shapes = []
    for picture, data in enumerate(wanted):
        wants = [want for want in data["include"] for _ in range(want["count"])]
        for want, spot in zip(wants, draw_spots(wants, rng)):
            color = want.get("color") or rng.choice(list(COLORS))
            shapes.append([picture, SHAPES.index(want["class"]), list(COLORS).index(color),
                           *spot, rng.uniform(95, 115)])
    table = torch.tensor(shapes)
    pictures, shape, color = table[:, :3].long().unbind(1)
    return render(pictures, len(wanted), shape, color, table[:, 3:])

def draw_spots(wants, rng):
    """A quarter (x, y) for each, and the last on the side that is asked for."""
    side, _ = wants[-1].get("position", (None, 0))
    while True:
        spots = [[rng.choice((11, 29)) + rng.uniform(-0.5, 0.5) for _ in "xy"] for _ in wants]
        gap = min((math.dist(a, b) for a, b in permutations(spots, 2)), default=SIDE)
        x, y = (b - a for a, b in zip(spots[0], spots[-1]))
        along = sum(a * b for a, b in zip(SIDES[side], (x, y))) if side else SIDE
        if gap > 14 and along > 0.86 * gap:
            return spots
