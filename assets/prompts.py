"""The built-in prompts, `--prompts geneval` and `--prompts ocr`: n items, always the same for a seed."""
import itertools
import random
import re

from rewards import CLIP_COLORS, COCO, SIDES


def geneval(n, seed):
    """n distinct prompts with GenEval's metadata, its six tasks in turn."""
    rng, items = random.Random(seed), {}
    while len(items) < n:
        (a, b), (c, d) = rng.sample(COCO[1:], 2), rng.sample(CLIP_COLORS, 2)        # no colored person
        k, side = rng.randint(2, 4), rng.choice(SIDES)
        one, two = {"class": a, "count": 1}, {"class": b, "count": 1}
        many = re.sub("(?<=[sh])s$", "es", re.sub("(skis|scissors|sheep)s$", r"\1", a + "s"))
        for tag, text, include in (
                ("single_object", f"a {a}", [one]),
                ("two_object", f"a {a} and a {b}", [one, two]),
                ("counting", f"{['two', 'three', 'four'][k - 2]} {many}", [one | {"count": k}]),
                ("colors", f"a {c} {a}", [one | {"color": c}]),
                ("position", f"a {b} {side} a {a}", [one, two | {"position": [side, 0]}]),
                ("color_attr", f"a {c} {a} and a {d} {b}", [one | {"color": c}, two | {"color": d}])):
            text = re.sub(r"\ba (?=[aeiou])", "an ", "a photo of " + text)
            exclude = [one | {"count": k + 1}] if tag == "counting" else []
            items[text] = {"prompt": text, "tag": tag, "include": include, "exclude": exclude}
    return list(items.values())[:n]


def ocr(n, seed):
    """n distinct prompts that ask for a text in straight double quotes."""
    scenes = "a sign that says, a chalkboard that reads, a cake with the words, a T-shirt with, a cup with"
    words = "Fresh Open Happy Quiet Golden Lucky Silver Daily Bread Garden Harbor Coffee Market Music".split()
    texts = [some for k in (1, 2, 3) for some in itertools.permutations(words, k)]
    pairs = random.Random(seed).sample([*itertools.product(scenes.split(", "), texts)], n)
    return [{"prompt": f'{scene} "{" ".join(text)}"'} for scene, text in pairs]
