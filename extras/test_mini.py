"""The mini world: drawings are read back, verdicts, held-out compositions."""
import json
import random
import warnings

import pytest
import torch
from torch.nn.functional import interpolate as resize

import vgrpo
from extras import mini_geneval as G
from extras import mini_world as W

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"
PICTURE = {"include": [
    {"class": "ring", "count": 1, "color": "red"},
    {"class": "bar", "count": 1, "color": "blue", "position": ["right of", 0]}]}

def shipped(name):
    lines = (G.FOLDER / f"prompts_{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

def test_drawings_are_read_back():
    held_out, others = W.split()
    every = W.items(others) + W.items(held_out)
    images = W.draw(every, random.Random(1))
    right = G.strict(images, [], every)
    assert images.ndim == 4
    assert right.mean() > 0.99
    assert (G.as_drawn(images, [], every) > 0.98).float().mean() > 0.99        # a few touch
    large = resize(images, scale_factor=3)
    assert right.equal(G.strict(large, [], every))

@pytest.mark.parametrize("color", W.COLORS)
@pytest.mark.parametrize("shape", W.SHAPES)
def test_a_shape_is_found_where_it_is(shape, color):
    """Its area is 80."""
    first, place = torch.tensor([0]), torch.tensor([[15.3, 22.6, 80]])
    which = first + W.SHAPES.index(shape)
    hue = first + list(W.COLORS).index(color)
    image = W.render(first, 1, which, hue, place)
    found, = G.find(image)
    (fit, box, mask), = found.pop(shape)
    assert not found
    assert fit > 0.95
    assert G.color_of(image[0], shape, box, mask) == color
    x, y = box.double().mean(0)
    assert 14 < x < 16 and 20 < y < 24
    (left, top), (right, bottom) = box
    assert mask[top:bottom, left:right].sum() == mask.sum()

@pytest.mark.parametrize("tag,text,score", [
    ("single_object", "a ring", 1),
    ("single_object", "a cross", 0),
    ("two_object", "a bar and a ring", 1),
    ("two_object", "a bar and a cross", 0.5),
    ("counting", "two rings", 0.5),
    ("counting", "three red rings", 1 / 6),
    ("colors", "a blue bar", 1),
    ("colors", "a red bar", 0.5),
    ("position", "a bar right-of a ring", 1),
    ("position", "a bar left-of a ring", 2 / 3),
    ("position", "a ring left-of a bar", 1),
    ("color_attr", "a red ring and a blue bar", 1),
    ("color_attr", "a blue ring and a red bar", 0.5),
])
def test_verdicts_on_a_red_ring_left_of_a_blue_bar(tag, text, score):
    image = W.draw([PICTURE], random.Random(0))
    data = W.metadata(tag, [word.replace("-", " ") for word in text.split()])
    assert G.score(image, [text], [data]).item() == pytest.approx(score)
    assert G.strict(image, [text], [data]).item() == (score == 1)

def test_three_of_a_kind_and_none():
    data = W.metadata("counting", ["three", "white", "crosses"])
    three = W.draw([data], random.Random(0))
    images = torch.cat([three, torch.full_like(three, W.GROUND)])
    assert G.strict(images, [], [data, data]).tolist() == [1, 0]

def test_as_drawn_tells_bent_shapes():
    image = W.draw([PICTURE], random.Random(0))
    wide = resize(image, (40, 52), mode="bilinear")[..., 6:46]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    images = torch.cat([image, wide, image + 0.1 * noise, noise])
    same, bent, noisy, nothing = G.as_drawn(images, [], [])
    assert same > 0.98 > 0.9 > bent > 0.8
    assert 0.5 < noisy < 0.7
    assert nothing < 0.1

def test_held_out_compositions_are_new_and_their_words_are_not():
    bar_left = W.composition(("a", "bar", "left of", "a", "ring"))
    assert bar_left == W.composition(("a", "ring", "right of", "a", "bar"))
    held_out, others = W.split()
    hidden = set(map(W.composition, sum(held_out.values(), [])))
    assert len(hidden) == 48 and not hidden & set(map(W.composition, sum(others.values(), [])))
    test, train = shipped("test"), shipped("train")
    assert test == W.items(held_out)
    assert train == W.items(others)
    words = " ".join(item["prompt"] for item in train).split()
    for item in test:
        assert set(item["prompt"].split()) <= set(words)

def test_the_shipped_model_is_what_the_command_makes():
    """Its parts are those of blank(), with other weights."""
    def plain(config):
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in config.items() if name[0] != "_"}
    pipe, blank = vgrpo.load_pipeline(vgrpo.parse_config(["--model", "mini"])), G.blank()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = (dict(getattr(p, name).named_parameters()) for p in (pipe, blank))
        assert {k: p.shape for k, p in mine.items()} == {k: p.shape for k, p in theirs.items()}
    for name in ("transformer", "scheduler"):
        assert plain(getattr(pipe, name).config) == plain(getattr(blank, name).config)
    for embedding in pipe.text_encoder.text_model.embeddings.children():
        assert embedding.weight.std() > 0.5              # order is told as loudly as words
    assert pipe.tokenizer.get_vocab() == blank.tokenizer.get_vocab()
    files = [path for path in G.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6

def test_its_vae_keeps_what_a_drawing_shows():
    """Every colour and shape: else no policy could please, however it is trained."""
    vae = vgrpo.load_pipeline(vgrpo.parse_config(["--model", "mini"])).vae
    asked = 4 * W.items(W.split()[0])
    images = W.draw(asked, random.Random(3))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(2 * images - 1).latents).sample / 2 + 0.5
    assert G.strict(decoded.clamp(0, 1), [], asked).mean() > 0.98

def test_misheard_sentences_are_others_that_may_be_trained_on():
    """A colour is heard as a colour, and one that is held out is not heard at all."""
    sentences, _ = G.draw_sentences(300, random.Random(4))
    assert G.mishear(sentences, 0, random.Random(5)) == sentences
    heard = G.mishear(sentences, 0.4, random.Random(5))
    assert 0.4 < sum(map(tuple.__ne__, sentences, heard)) / 300 < 0.6
    _, others = W.split()
    known = sum(others.values(), [])
    for said, one in zip(sentences, heard):
        assert one in known
        for word, other in zip(said, one):
            kinds = [kind for kind in W.KINDS.values() if word in kind]
            assert other == word or other in kinds[0]

@pytest.mark.slow
def test_it_half_obeys_and_its_run_has_the_names(tmp_path):
    """A guess at random would be right in one of a hundred."""
    vgrpo.main(["--model", "mini", "--out", str(tmp_path), "--iterations", "1", "--save-every", "9",
                "--prompts-per-iteration", "4", "--group-size", "2", "--n-mc", "1"])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    before, trained, _ = lines
    assert 0.25 < before["eval/objects-strict"] < 0.5
    assert 0.5 < before["eval/objects"] < 0.7
    assert 0.6 < before["eval/as-drawn"] < 0.9
    assert trained["reward"] == pytest.approx(trained["reward/objects"])
