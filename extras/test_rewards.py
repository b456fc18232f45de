"""The rewards: what each of them computes, against an independent computation."""
import base64
import hashlib
import http.server
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Mask2FormerConfig, SwinConfig

import rewards
from extras import aesthetic, geneval, geneval_detector, hpsv2, imagereward, judge, ocr, tiny_world
from rewards import Rewards, RunError, UsageError

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"

# ---- small models for the rewards, in folders that mirror the hub: OWNER/NAME is in NAME

COLORS = "red orange yellow green blue purple pink brown black white".split()
WORDS = "a an cat dog photo of cube sphere the fish running person object".split() + COLORS
WORDS += [color + "-colored" for color in COLORS]
CUBES = ["a red cube", "a photo of the blue cat running", "a red cube", "dog"]

def pictures(n, height=224, width=224, seed=0):
    """n pictures of 8 bits: smooth noise, so that they differ."""
    small = torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    large = F.interpolate(small, (height, width), mode="bilinear")
    return (large * 255).round() / 255

def nothing(n):
    return [{}] * n

def pillow(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())

def save_tokenizer(folder, size=64):
    """Words -> ids 4...; start 1, end size - 1, as CLIP's largest id; unknown words share id 2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = {word: 4 + i for i, word in enumerate(WORDS)}
    vocab = {"[PAD]": 0, "[S]": 1, "[U]": 2, **words, "[E]": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[U]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[S]", 1), ("[E]", size - 1)]
    tokenizer.post_processor = processors.TemplateProcessing("[S] $A [E]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[U]", bos_token="[S]",
        eos_token="[E]", model_max_length=77)
    tokenizer.save_pretrained(folder)

def randomise(model, seed=0):
    """Wide weights, so that wrong activations and layouts show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fresh = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = fresh * (parameter.shape[0] / parameter.numel()) ** 0.5
        elif parameter.dim() == 1:
            parameter.data += 0.3 * fresh
    return model.eval()

def small_clip(act="quick_gelu", projection=32, seed=0):
    from transformers import CLIPConfig, CLIPModel
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 hidden_act=act, projection_dim=projection)
    text = tower | dict(vocab_size=64, eos_token_id=63, bos_token_id=1)
    vision = tower | dict(image_size=224, patch_size=56)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    torch.manual_seed(seed)
    return randomise(CLIPModel(config), seed)

@pytest.fixture(scope="session")
def clip_hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    small_clip(projection=768, seed=1).save_pretrained(root / "clip-vit-large-patch14")
    small_clip(act="gelu", seed=2).save_pretrained(root / "PickScore_v1")
    for name in ("clip-vit-large-patch14", "CLIP-ViT-H-14-laion2B-s32B-b79K"):
        save_tokenizer(root / name)
    head = randomise(aesthetic.linear_head(), 3).state_dict()
    (root / "ddpo-aesthetic-predictor").mkdir()
    torch.save({"layers." + name: value for name, value in head.items()},
               root / "ddpo-aesthetic-predictor" / "aesthetic-model.pth")
    return root

def standardised(images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (images - mean[:, None, None]) / std[:, None, None]

def cosines(model, folder, images, prompts):
    """One image and one prompt at a time, straight through the model."""
    from transformers import AutoTokenizer
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for image, prompt in zip(images, prompts):
        tokens = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=standardised(image[None]), **tokens)
        found.append((F.normalize(out.image_embeds) * F.normalize(out.text_embeds)).sum())
    return torch.stack(found)

# ---- rewards by name and the user's own

OWN = '''
from __future__ import annotations
import torch
from dataclasses import dataclass
from torch import nn

loads = []
loads.append("once")

@dataclass
class Pair:
    k: float

def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))
ocr = mean
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
def nan(images, prompts, metadata):
    return torch.tensor([float("nan") if "dog" in prompt else 1 for prompt in prompts])
def spoil(images, prompts, metadata):
    return images.mul_(0).sum((1, 2, 3))
def raises(images, prompts, metadata):
    raise KeyError("no such\\nkey")
def shape(images, prompts, metadata):
    return torch.zeros(len(images), 1)
def scalar(images, prompts, metadata):
    return torch.tensor(1.0)
def integer(images, prompts, metadata):
    return torch.zeros(len(images), dtype=torch.long)
def a_list(images, prompts, metadata):
    return [0.0] * len(images)
def inf(images, prompts, metadata):
    return 1 / torch.zeros(len(images))
def meta(images, prompts, metadata):
    return torch.zeros(len(images), device="meta")
def huge(images, prompts, metadata):
    return torch.full((len(images),), 1e300, dtype=torch.float64)
def double(images, prompts, metadata):
    return torch.full((len(images),), 0.1, dtype=torch.float64)

class Judge:
    built = []
    def __init__(self, *words):
        self.device = words[0]
        self.built.append(words)
    def check(self, prompt, data):
        return "" if "k" in data else "k"
    def __call__(self, images, prompts, metadata):
        assert images.device == self.device
        return torch.tensor([Pair(float(data["k"])).k for data in metadata])

class Visitor(nn.Module):
    """Its weights move to a device as far as these tests can see: they lie elsewhere in memory."""
    def __init__(self, device):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(9)), []
    def _apply(self, move):
        self.seen.append(str(move(torch.zeros(1)).device))
        self.weight.data = self.weight.data.clone()
        return self
    def forward(self, images, prompts, metadata):
        self.seen.append(f"works on {images.device}")
        if "fail" in prompts:
            raise KeyError("fail")
        return torch.zeros(len(images))

class TooLarge(nn.Module):
    def _apply(self, move):
        raise MemoryError
'''

@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"

def test_reward_the_users_own_functions_and_classes(own):
    """A function or a class of any file is a reward, of any weight; its scores are float32."""
    weights = {"spoil": 1.0, "red": 2.0, "Judge": 1.0, "nan": 0.5, "double": 1e-3, "ocr": 0.0}
    spec = "OWN:spoil,OWN:red=2, OWN:Judge,OWN:nan=0.5,OWN:double=1e-3,OWN:ocr=0"
    scorer = Rewards(spec.replace("OWN", str(own)))
    assert scorer.weights == weights and list(scorer.weights) == list(weights)
    images = pictures(3, 8, 8)
    metadata = [{"k": 1.0}, {"k": 2.0}, {"k": 3.0}]
    scores = scorer(images + 1e-4, ["a", "dog", "b"], metadata)
    red = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    torch.testing.assert_close(scores["red"], red)
    torch.testing.assert_close(scores["ocr"], images.mean((1, 2, 3)))  # not what "spoil" left
    assert scores["Judge"].tolist() == [1, 2, 3] and list(scores) == list(weights)
    assert scores["nan"].isnan().tolist() == [False, True, False]
    assert all(row.dtype == torch.float32 and row.device.type == "cpu" for row in scores.values())
    (torch.ones(3, requires_grad=True) * scores["red"]).sum().backward()   # not an inference tensor

def test_reward_a_file_is_imported_and_a_class_built_once(own, monkeypatch):
    """However many name them, and however: with its device, and with what stands behind an @."""
    Rewards(f"{own}:Judge,{own}:red")
    first, again = Rewards(f"{own}:Judge=2"), Rewards(f"{own}:Judge@there")
    monkeypatch.chdir(own.parent)
    assert Rewards("own.py:Judge").rewards["Judge"] is first.rewards["Judge"]
    assert rewards.import_own(own, "loads") == ["once"]
    assert rewards.import_own("own.py", "Judge").built == [(first.device,), (first.device, "there")]
    assert again.rewards["Judge"] is not first.rewards["Judge"]
    assert rewards.import_own(rewards.__file__, "build") is rewards.build
    assert rewards.import_own(hpsv2.__file__, "plain") is hpsv2.plain

def test_reward_images_of_8_bits_go_to_the_device_as_they_are(own, monkeypatch):
    """uint8 is divided by 255 there; floats are clipped and rounded to 8 bits."""
    wild = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    assert wild.min() < 0 and wild.max() > 1
    levels = np.round(wild.numpy().clip(0, 1).astype(np.float64) * 255)
    bytes_ = torch.tensor(levels.astype(np.uint8))
    want = bytes_.double().mean((1, 2, 3)) / 255
    scorer, moved, to = Rewards(f"{own}:mean"), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to",
                        lambda x, *at: moved.append((x.dtype, *at)) or to(x, *at))
    for images in (bytes_, wild):
        mean = scorer(images, [""] * 3, nothing(3))["mean"]
        assert (mean - want).abs().max() < 1e-6
    assert moved[0] == (torch.uint8, scorer.device)

def test_reward_models_wait_at_home_and_visit_the_device(own):
    """With offload they wait on the CPU and come to work; their weights there are not touched."""
    pixels = pictures(2, 8, 8)
    for offload, home in ((True, "cpu"), (False, "meta")):
        scorer = Rewards(f"{own}:Visitor", device="meta", offload=offload)
        visitor = scorer.rewards["Visitor"]
        assert visitor.seen == [home]
        at_home = visitor.weight.data_ptr()
        scorer(pixels, ["", ""], nothing(2))
        assert visitor.seen == [home, "meta", "works on meta"]
        assert visitor.weight.data_ptr() == at_home
        with pytest.raises(RunError, match="Visitor.*KeyError: 'fail'"):
            scorer(pixels, ["fail", ""], nothing(2))
        assert visitor.weight.data_ptr() == at_home
        visitor.seen.clear()
    too_large = rewards.import_own(own, "TooLarge")()
    with pytest.raises(MemoryError), rewards.visiting([print, visitor, too_large], "meta"):
        pass
    assert visitor.seen == ["meta"] and visitor.weight.data_ptr() == at_home

@pytest.mark.parametrize("name, message", [
    ("raises", r"KeyError: 'no such\\nkey'"), ("shape", r"\[3, 1\]"), ("integer", "int64"),
    ("scalar", "zero-dimensional"), ("a_list", "list"), ("inf", "inf"), ("huge", "float64"),
    ("meta", "meta")])
def test_reward_one_that_fails_is_named_with_its_prompts(own, name, message):
    """In one line, and with its cause, whose traceback is the user's."""
    scorer = Rewards(f"incompressibility,{own}:{name}")
    with pytest.raises(RunError, match=message) as error:
        scorer(pictures(3, 8, 8), ["a red cube", "dog", "dog"], nothing(3))
    text = str(error.value)
    assert f"reward {name} on ['a red cube', 'dog']: " in text and "\n" not in text
    assert error.value.__cause__.__traceback__

@pytest.mark.parametrize("spec, message", [
    ("pickscor", "pickscor: write NAME=NUMBER.*pickscore, clipscore"), ("", "NUMBER"),
    ("compressibility,", "NUMBER"), ("compressibility=abc", "=abc:.*float"),
    ("compressibility=-1", "=-1:.*0 or more"), ("compressibility=nan", "NUMBER"),
    ("compressibility=inf", "NUMBER"), ("compressibility=", "=:.*float"),
    ("compressibility=1=2", "NUMBER"), ("compressibility,compressibility=2", "each once"),
    ("compressibility=0,OWN:red=0", "weights are 0"), ("OWN:red,OWN:red", "red.*each once"),
    ("pickscore@nowhere", "No such file.*nowhere'; try `hf auth login`"),
    ("nowhere.py:fn", "No such file.*nowhere.py"), ("OWN:none", "own.py:none: Attrib.*'none'"),
    ("BAD:fn", "invalid syntax"), ("hpsv2@EMPTY", "hpsv2@/"), ("pickscore@EMPTY", "pickscore@/"),
    ("clipscore", "hf auth login.*NAME@FOLDER"), ("hpsv2", "hf auth login.*NAME@FOLDER"),
    ("geneval", "HF_HUB_OFFLINE.*put mask2former_swin-s.*-c9d0c4f2.pth into .* it is at https:")])
def test_reward_bad_specs_end_in_one_line(own, spec, message):
    """It names the flag that the user wrote, and the mend."""
    (own.parent / "bad.py").write_text("def fn(:")
    (own.parent / "empty").mkdir()
    for short, file in (("OWN", "own.py"), ("BAD", "bad.py"), ("EMPTY", "empty")):
        spec = spec.replace(short, str(own.parent / file))
    for flag in ("--reward", "--eval-reward"):
        with pytest.raises(UsageError, match=message) as error:
            Rewards(spec, flag=flag)
        assert str(error.value).startswith(flag + " ") and "\n" not in str(error.value)

def test_reward_check_names_the_first_prompt_that_cannot_be_judged(own):
    """By the reward's own words, where it has any."""
    scorer = Rewards(f"compressibility,{own}:Judge", flag="--eval-reward")
    scorer.check(["one", "two"], [{"k": 1}, {"k": 2}])
    with pytest.raises(UsageError, match="^--eval-reward Judge: prompt 'two' has no k$"):
        scorer.check(["one", "two", "three"], [{"k": 1}, {}, {}])

@pytest.mark.parametrize("size", [1, 3, 64])
def test_reward_scores_do_not_depend_on_the_chunk(clip_hub, size):
    spec = "pickscore@HUB,clipscore@HUB,aesthetic@HUB,incompressibility"
    scorer = Rewards(spec.replace("HUB", str(clip_hub)))
    images, prompts = pictures(7, 240, 300), (CUBES * 2)[:7]
    whole, parts = (scorer(images, prompts, nothing(7), chunk) for chunk in (32, size))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-6)

# ---- the CLIP family

def by_pillow(image, size, corner, pad=False):
    """Resized by another library and cut, or put on black; standardised afterwards."""
    square, resized = Image.new("RGB", (224, 224)), pillow(image).resize(size, Image.BICUBIC)
    square.paste(resized, corner if pad else (-corner[0], -corner[1]))
    return standardised(torch.tensor(np.asarray(square)).permute(2, 0, 1) / 255)

def rough(height, width):
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return ((0.3 + 0.4 * image) * 255).round() / 255            # nothing overshoots 0 or 1

@pytest.mark.parametrize("height, width, size, left, top, rounded", [
    (224, 224, (224, 224), 0, 0, (0, 0)), (512, 512, (224, 224), 0, 0, (0, 0)),
    (300, 451, (336, 224), 56, 0, (56, 0)), (96, 128, (298, 224), 37, 0, (37, 0)),
    (455, 448, (224, 227), 0, 1, (0, 2)), (448, 458, (229, 224), 2, 0, (2, 0))])
def test_reward_clip_pixels_are_pillows(height, width, size, left, top, rounded):
    """The shorter side to 224 and the middle of the longer one: half a pixel is cut off for CLIP,
    and rounded to even for ImageReward and GenEval."""
    image = rough(height, width)
    for middle, corner in ((int, (left, top)), (round, rounded)):
        got, want = rewards.clip_pixels(image[None], middle)[0], by_pillow(image, size, corner)
        assert got.shape == (3, 224, 224) and (got - want).abs().mean() * 0.27 * 255 < 0.3
    smooth = pictures(1, 455, 448)
    assert torch.equal(rewards.clip_pixels(smooth), rewards.clip_pixels(smooth, int))
    zero, one = (standardised(torch.full((3, 1, 1), value)) for value in (0.0, 1.0))
    levels = (rewards.clip_pixels(image[None]) - zero) / (one - zero) * 255
    assert (levels - levels.round()).abs().max() < 1e-3         # of 8 bits

@pytest.mark.parametrize("height, width, size, corner", [
    (224, 224, (224, 224), (0, 0)), (300, 451, (224, 149), (0, 37)),
    (451, 300, (149, 224), (37, 0)), (96, 129, (224, 167), (0, 28))])
def test_reward_hps_pixels_are_pillows(height, width, size, corner):
    """The longer side to 224, on black before the mean is taken off: the padding is not zero."""
    image = rough(height, width)
    got, want = hpsv2.hps_pixels(image[None])[0], by_pillow(image, size, corner, pad=True)
    assert (got - want).abs().mean() * 0.27 * 255 < 0.3
    empty = torch.ones(224, 224, dtype=torch.bool)
    empty[corner[1]:corner[1] + size[1], corner[0]:corner[0] + size[0]] = False
    assert torch.equal(got[:, empty], want[:, empty])

def test_reward_clip_scores_are_cosines(clip_hub):
    """pickscore scales them by exp(scale) / 26; aesthetic is a head on the image's feature."""
    scorer = Rewards(f"pickscore@{clip_hub},clipscore@{clip_hub}=2,aesthetic@{clip_hub}=0")
    assert scorer.weights == {"pickscore": 1.0, "clipscore": 2.0, "aesthetic": 0.0}
    images = pictures(4)
    scores = scorer(images, CUBES, nothing(4))
    pick, clip = small_clip(act="gelu", seed=2), small_clip(projection=768, seed=1)
    want = cosines(pick, clip_hub / "CLIP-ViT-H-14-laion2B-s32B-b79K", images, CUBES)
    want = want * pick.logit_scale.exp() / 26
    torch.testing.assert_close(scores["pickscore"], want.detach(), atol=1e-5, rtol=0)
    want = cosines(clip, clip_hub / "clip-vit-large-patch14", images, CUBES)
    torch.testing.assert_close(scores["clipscore"], want, atol=1e-5, rtol=0)
    state = torch.load(clip_hub / "ddpo-aesthetic-predictor" / "aesthetic-model.pth")
    with torch.no_grad():
        feature = F.normalize(clip.get_image_features(standardised(images)).pooler_output)
    for i in (0, 2, 4, 6, 7):
        feature = feature @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(scores["aesthetic"], feature[:, 0], atol=1e-4, rtol=0)
    assert all(row.std() > 1e-3 for row in scores.values())

def test_reward_64_images_cost_one_image_pass_and_one_text_pass_per_prompt(clip_hub, monkeypatch):
    """In all rewards that share a CLIP, which is loaded once however many ask for it."""
    from transformers import CLIPModel
    seen, loads, load = Counter(), [], rewards.load
    image, text = CLIPModel.get_image_features, CLIPModel.get_text_features

    def see_images(model, pixels):
        seen.update({"images": len(pixels), "image passes": 1})
        return image(model, pixels)

    def see_text(model, input_ids, **rest):
        seen.update({"texts": len(input_ids)})
        return text(model, input_ids, **rest)
    monkeypatch.setattr(CLIPModel, "get_image_features", see_images)
    monkeypatch.setattr(CLIPModel, "get_text_features", see_text)
    monkeypatch.setattr(rewards, "load", lambda *args: loads.append(args[1]) or load(*args))
    rewards.build.cache_clear()
    scorer = Rewards(f"clipscore@{clip_hub},aesthetic@{clip_hub}")
    Rewards(f"aesthetic@{clip_hub},clipscore@{clip_hub}", flag="--eval-reward")
    assert loads == ["openai/clip-vit-large-patch14"]
    prompts = [text for text in ("a red cube", "a blue cat", "dog", "fish") for _ in range(16)]
    scorer(pictures(64, 32, 32), prompts, nothing(64))
    assert seen == {"images": 64, "image passes": 64 // 32, "texts": 4}
    scorer(pictures(64, 32, 32, seed=1), prompts, nothing(64))     # new pictures, not the old ones
    assert seen["images"] == 128 and seen["texts"] == 4

def test_reward_half_precision_moves_a_score_by_little(clip_hub, monkeypatch):
    """By less than 1e-2 of the scores' spread; the weights stay as they are."""
    images, prompts = pictures(8), CUBES * 2
    spec = f"pickscore@{clip_hub},clipscore@{clip_hub}"
    full = Rewards(spec)(images, prompts, nothing(8))
    rewards.build.cache_clear()                                         # the texts' features, too
    monkeypatch.setattr(rewards, "HALF", torch.autocast("cpu", torch.float16))
    scorer = Rewards(spec)
    half = scorer(images, prompts, nothing(8))
    for name, row in full.items():
        assert 0 < (row - half[name]).abs().max() < 1e-2 * row.std()
        assert {p.dtype for p in scorer.rewards[name].parameters()} == {torch.float32}
    rewards.build.cache_clear()

def test_reward_missing_weights_are_named(tmp_path):
    small_clip().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="is not openai.*it lacks visual_projection.weight"):
        Rewards(f"clipscore@{tmp_path}")

def test_reward_jpeg_is_the_size_of_the_file():
    images = torch.stack([pictures(1, 64, 64)[0], rough(64, 64)])
    scores = Rewards("incompressibility,compressibility")(images, ["", ""], nothing(2))
    for image, score in zip(images, scores["incompressibility"]):
        file = io.BytesIO()
        pillow(image).save(file, "JPEG", quality=95)
        assert abs(score.item() - len(file.getvalue()) / 1000) < 1e-6
    assert torch.equal(scores["compressibility"], -scores["incompressibility"])
    assert scores["incompressibility"][1] > 1.5 * scores["incompressibility"][0]

# ---- weights under other names: HPSv2.1 and ImageReward

OPEN_CLIP = {       # transformers' names -> open_clip's, of a tower "visual." or ""
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "post_layernorm": "ln_post",
    "encoder.layers.": "transformer.resblocks.", "self_attn": "attn", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
BLIP = {
    "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision_model.post_layernorm": "blip.visual_encoder.norm",
    "vision_model.encoder.layers": "blip.visual_encoder.blocks", "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj", "layer_norm": "norm", "itm_head": "mlp.layers",
    "text_encoder": "blip.text_encoder", "vision_proj.": "blip.vision_proj.",
    "text_proj.": "blip.text_proj."}

def rewritten(name, pairs):
    for new, old in pairs.items():
        name = name.replace(new, old)
    return name

def to_open_clip(state):
    """CLIPModel's weights as open_clip saves them: q, k and v in one, projections transposed."""
    old = {}
    for name, value in state.items():
        tower = "visual." if name.startswith("vision_model") else ""
        name = re.sub("^(vision|text)_model.", "", name)
        old[tower + rewritten(name, OPEN_CLIP)] = value
    old["visual.proj"] = old.pop("visual_projection.weight").T
    old["text_projection"] = old.pop("text_projection.weight").T
    for name in [name for name in old if ".q_proj." in name]:
        parts = [old.pop(name.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        old[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return old

@pytest.fixture
def hps_hub(tmp_path):
    """A small ViT-H-14 with everything in one folder -> (folder, the same model in transformers)"""
    from transformers import CLIPConfig, CLIPModel
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 hidden_act="gelu", projection_dim=1024)
    config = CLIPConfig(text_config=tower | dict(eos_token_id=49407), projection_dim=1024,
                        vision_config=tower | dict(patch_size=14))
    config.save_pretrained(tmp_path)
    model = randomise(CLIPModel(config))
    state = to_open_clip(model.state_dict())
    published = """visual.proj text_projection ln_final.weight visual.ln_pre.bias logit_scale
        transformer.resblocks.1.attn.in_proj_weight visual.positional_embedding visual.conv1.weight
        visual.transformer.resblocks.0.mlp.c_fc.bias positional_embedding token_embedding.weight
        visual.class_embedding visual.ln_post.weight transformer.resblocks.0.ln_2.bias"""
    assert set(published.split()) <= set(state)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    save_tokenizer(tmp_path, 49408)
    return tmp_path, model

@pytest.fixture
def blip_hub(tmp_path, monkeypatch):
    """A small ImageReward with everything in one folder -> (folder, the same in transformers)"""
    from transformers import BlipConfig, BlipForImageTextRetrieval
    small = dict(num_hidden_layers=2, intermediate_size=64)

    def config(vision_config, text_config):
        vision = vision_config | small | dict(hidden_size=32, num_attention_heads=2)
        text = text_config | small | dict(vocab_size=64)
        return BlipConfig(vision_config=vision, text_config=text)
    vision = dict(image_size=224, layer_norm_eps=1e-6)
    model = BlipForImageTextRetrieval(config(vision, {"num_attention_heads": 12}))
    model.itm_head = aesthetic.linear_head()
    randomise(model)
    state = {rewritten(name, BLIP): value for name, value in model.state_dict().items()}
    published = """cls_token pos_embed patch_embed.proj.weight norm.bias blocks.1.attn.qkv.weight
        blocks.0.attn.proj.weight blocks.0.norm2.weight blocks.1.mlp.fc1.bias"""
    assert {"blip.visual_encoder." + name for name in published.split()} <= set(state)
    assert {"mlp.layers.7.bias", "blip.vision_proj.weight",
            "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight"} <= set(state)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]    # one too many
    torch.save(state, tmp_path / "ImageReward.pt")
    save_tokenizer(tmp_path)
    monkeypatch.setattr(imagereward.hf, "BlipConfig", config)
    return tmp_path, model

def equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)

def test_reward_hps_is_the_cosine_of_the_published_clip(hps_hub):
    folder, model = hps_hub
    images = pictures(4)
    scorer = Rewards(f"hpsv2@{folder}")
    want = cosines(model, folder, images, CUBES)
    torch.testing.assert_close(scorer(images, CUBES, nothing(4))["hpsv2"], want, atol=1e-5, rtol=0)
    assert equal_weights(scorer.rewards["hpsv2"].model, model)
    for layer in model.vision_model.encoder.layers:
        layer.mlp.activation_fn = nn.SiLU()                     # a wrong activation would show
    assert (cosines(model, folder, images, CUBES) - want).abs().max() > 1e-4
    wide, square = pictures(2, 100, 224), torch.zeros(2, 3, 224, 224)
    square[:, :, 62:162] = wide
    rows = [scorer(images, CUBES[:2], nothing(2))["hpsv2"] for images in (wide, square)]
    torch.testing.assert_close(*rows)

def test_reward_hps_reads_plain_text(hps_hub, clip_hub):
    """As ftfy would have mended it; other CLIPs read what the user wrote."""
    for spec, prompt, want in (
            (f"hpsv2@{hps_hub[0]}", " a &amp;quot;ｒｅｄ&quot;　‘cube’ “x” ！",
             "a \"red\" 'cube' \"x\" !"),
            (f"clipscore@{clip_hub}", " “x” ", " “x” ")):
        (clip,), shown = Rewards(spec).rewards.values(), []
        tokenizer = clip.tokenizer
        clip.tokenizer = lambda text, **options: shown.append(text) or tokenizer(text, **options)
        clip.text(prompt)
        clip.tokenizer = tokenizer
        assert shown == [want]

def test_reward_imagereward_is_the_published_blip_and_head(blip_hub):
    folder, model = blip_hub
    images = pictures(4, 227, 224)      # 3 rows too many: torchvision cuts 2 and 1
    scorer = Rewards(f"imagereward@{folder}")
    scores = scorer(images, CUBES, nothing(4))["imagereward"]
    assert equal_weights(scorer.rewards["imagereward"].blip, model)
    for image, prompt, score in zip(images, CUBES, scores):
        ids = [1] + [4 + WORDS.index(word) for word in prompt.split()] + [63]
        with torch.no_grad():
            patches = model.vision_model(standardised(image[None, :, 2:226])).last_hidden_state
            state = model.text_encoder(torch.tensor([ids]), encoder_hidden_states=patches)[0][0, 0]
            for i in (0, 2, 4, 6, 7):
                state = state @ model.itm_head[i].weight.T + model.itm_head[i].bias
        assert abs((state.item() - 0.16717362830052426) / 1.0333394966054072 - score.item()) < 1e-4
    assert scores.std() > 1e-3

def test_reward_imagereward_has_the_published_size(monkeypatch):
    """Counted without memory: BLIP as the paper gives it."""
    monkeypatch.setattr(imagereward, "renamed", lambda *_: {})
    monkeypatch.setattr(imagereward, "fill", lambda *_: None)
    monkeypatch.setattr(imagereward.hf.AutoTokenizer, "from_pretrained", lambda place: None)
    with torch.device("meta"):
        blip = imagereward.ImageReward("cpu").blip
    parts = blip.vision_model, blip.text_encoder, blip.itm_head
    assert round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6) == 446
    text, vision = blip.text_encoder.config, blip.vision_model.config
    assert (text.vocab_size, text.num_attention_heads, text.num_hidden_layers) == (30524, 12, 12)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (224, 16, 16)
    assert (text.layer_norm_eps, vision.layer_norm_eps) == (1e-12, 1e-6)
    assert vision.num_hidden_layers == 24
    assert text.is_decoder and text.hidden_act == "gelu" == vision.hidden_act

@pytest.mark.parametrize("change, message", [
    ("missing", "Missing key.*{}"), ("unexpected", "Unexpected key.*extra"),
    ("shape", "size mismatch for {}")])
@pytest.mark.parametrize("file, old, new", [
    ("HPS_v2.1_compressed.pt", "visual.conv1.weight",
     "vision_model.embeddings.patch_embedding.weight"),
    ("ImageReward.pt", "blip.visual_encoder.blocks.1.attn.qkv.weight",
     "vision_model.encoder.layers.1.self_attn.qkv.weight")])
def test_reward_a_wrong_weight_is_named(request, file, old, new, change, message):
    folder, _ = request.getfixturevalue("hps_hub" if file.startswith("HPS") else "blip_hub")
    whole = torch.load(folder / file)
    state = whole.get("state_dict", whole)
    if change == "missing":
        del state[old]
    else:
        state[old if change == "shape" else old.replace("weight", "extra")] = torch.zeros(3, 3)
    torch.save(whole, folder / file)
    spec = ("hpsv2@" if file.startswith("HPS") else "imagereward@") + str(folder)
    with pytest.raises(UsageError, match=f"--reward {spec}: .*" + message.format(new)) as error:
        Rewards(spec)
    assert "\n" not in str(error.value)

# ---- the miniature world's rewards, and the command line

def test_reward_shapes():
    """Drawn shapes are read back, at any size; a wrong word costs a third, and all of "strict"."""
    scorer, right, strict = Rewards("shapes,shapes-strict"), [], []
    labels = torch.cartesian_prod(*(torch.arange(len(kind)) for kind in tiny_world.WORDS))
    for seed in range(10):
        images = tiny_world.draw_shapes(labels, torch.Generator().manual_seed(seed))
        scores = scorer(images, tiny_world.PROMPTS, nothing(24))
        right, strict = right + scores["shapes"].tolist(), strict + scores["shapes-strict"].tolist()
    assert np.mean(right) >= 0.97 and np.mean(strict) >= 0.97 and set(strict) <= {0.0, 1.0}
    large = F.interpolate(images, (256, 256))
    for name, value in scorer(large, tiny_world.PROMPTS, nothing(24)).items():
        assert torch.equal(value, scores[name])
    assert tiny_world.PROMPTS[0] == "a red circle on the left"
    for wrong, kinds in (("a blue circle on the left", 2), ("a blue bar on the left", 1),
                         ("a blue bar on the right", 0)):
        scores = scorer(images[:1], [wrong], nothing(1))
        assert abs(scores["shapes"].item() - kinds / 3) < 1e-6
        assert scores["shapes-strict"].item() == 0
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for empty in (0 * noise, 0 * noise + tiny_world.BACKGROUND, noise):
        for value in scorer(empty, tiny_world.PROMPTS[:4], nothing(4)).values():
            assert value.tolist() == [0] * 4
    for bad in ("a dog", "a red circle", "a bar on the left", "reddish circle on the left", ""):
        with pytest.raises(RunError, match="reward shapes.*has no word of each.*triangle"):
            scorer(images[:2], [tiny_world.PROMPTS[0], bad], nothing(2))

def test_reward_command_line(own, tmp_path, monkeypatch, capsys):
    """A line for each picture; errors are a line, below the traceback where a reward raised."""
    paths = [str(tmp_path / name) for name in ("0.png", "1.png")]
    for path, picture in zip(paths, pictures(2, 8, 12)):
        pillow(picture).save(path)
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rewards.py", *words])
        try:
            code = rewards.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code or 0, out.splitlines(), err.splitlines()
    words = ("--prompt", "x", "--metadata", '{"k": 7}', *paths)
    code, lines, _ = run("--reward", f"incompressibility,{own}:Judge", *words)
    scorer = Rewards("incompressibility")
    sizes = scorer(pictures(2, 8, 12), ["", ""], nothing(2))["incompressibility"]
    assert code == 0 and lines == [
        f"{path} incompressibility {size:.4f} Judge 7.0000" for path, size in zip(paths, sizes)]
    code, lines, errors = run("--reward", "nothing", paths[0])
    assert code == 2 and not lines and len(errors) == 1 and "nothing" in errors[0]
    code, _, errors = run("--reward", f"{own}:Judge", paths[0])
    assert code == 2 and errors == ["--reward Judge: prompt '' has no k"]
    code, _, errors = run("--reward", f"{own}:raises", paths[0])
    assert code == 1 and "Traceback" in errors[0] and "in raises" in "".join(errors)
    assert errors[-1].startswith("reward raises on ['']: KeyError")
    assert run("--reward", "incompressibility", str(tmp_path / "none.png"))[0] == 2

@pytest.mark.slow
def test_reward_command_line_is_one_module_with_the_rewards_in_extras(tmp_path):
    """An error that a file in extras/ raises is known to rewards.py when that is the program."""
    command = [sys.executable, rewards.__file__, "--reward", "unified@http://127.0.0.1:9", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no judge" in done.stderr
    assert "UsageError" not in done.stderr

# ---- a judge behind a server

ANSWERS = {     # what the judge says to the prompt "CASE word", and the score in it
    "well": ("Nice. Final Score: 4", 0.8),
    "markdown": ("## Review\n**Final Score:** **3.5**/5", 0.7),
    "twice": ("On the scale Final Score: 1 to 5 ... final score: 2\n", 0.4),
    "lines": ("Final Score:\n\n4.5 out of 5", 0.9),
    "ten": ("Final Score: 10", None), "zero": ("Final Score: 0", None),
    # these are asked three times
    "once": ("Final Score: 3", 0.6), "late": ("Final Score: 5", None),
    "none": ("I like it, 5 of 5", None), "error": ("", None), "garbled": ("", None),
    "hangup": ("", None), "odd": ("", None)}
AT_ONCE = ("well", "markdown", "twice", "lines", "ten", "zero")

@pytest.fixture
def serve():
    """serve(Handler) -> the address of a server"""
    servers = []

    def start(handler):
        handler.log_message = lambda *_: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

def judging(seen, tries):
    class Judging(http.server.BaseHTTPRequestHandler):
        def reply(self, body, status=200):
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass                                            # the client did not wait

        def do_GET(self):
            self.reply(b'{"data": [{"id": "a-judge"}]}' if self.path == "/v1/models" else b"")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.requestline.split()[1], body))    # as sent: self.path mends a "//"
            word = re.search(r"CASE (\w+)", body["messages"][0]["content"][1]["text"])[1]
            tries[word] += 1
            if word == "late":
                time.sleep(0.5)
            if word == "error" or (word == "once" and tries[word] < 3):
                self.reply(b"overloaded", 503)
            elif word == "hangup":
                self.connection.close()
            elif word in ("garbled", "odd"):
                self.reply(b"{not json" if word == "garbled" else b'{"choices": []}')
            else:
                message = {"message": {"content": ANSWERS[word][0]}}
                self.reply(json.dumps({"choices": [message]}).encode())
    return Judging

def test_reward_unified_reads_the_judges_score(serve, monkeypatch):
    """A fifth of what follows "Final Score:", NaN without an answer in three tries."""
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    seen, tries, send = [], Counter(), judge.urllib.request.urlopen
    url = serve(judging(seen, tries))
    monkeypatch.setattr(judge.urllib.request, "urlopen",
                        lambda request, timeout: send(request, timeout=timeout / 200))
    scorer, images = Rewards(f"unified@{url}/=0.5"), pictures(len(ANSWERS), 32, 48)
    assert scorer.weights == {"unified": 0.5}
    scores = scorer(images, [f"CASE {word}" for word in ANSWERS], nothing(len(ANSWERS)))["unified"]
    got = [None if score.isnan() else round(score.item(), 4) for score in scores]
    assert got == [score for _, score in ANSWERS.values()]
    assert tries == {word: 1 if word in AT_ONCE else 3 for word in ANSWERS}
    path, body = next((path, body) for path, body in seen if "CASE well" in str(body))
    (message,), (picture, text) = body["messages"], body["messages"][0]["content"]
    assert path == "/v1/chat/completions"
    assert body["model"] == "a-judge" and body["temperature"] == 0
    assert message["role"] == "user" and text["type"] == "text" and "Final Score:" in text["text"]
    head, data = picture["image_url"]["url"].split(",")
    assert picture["type"] == "image_url" and head == "data:image/jpeg;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert np.abs(decoded - (images[0] * 255).round().permute(1, 2, 0).numpy()).mean() < 8

@pytest.mark.parametrize("spec", ["unified@http://127.0.0.1:9", "unified"])
def test_reward_an_unreachable_judge_is_named_at_start_up(spec):
    with pytest.raises(UsageError, match="--reward unified.*no judge at.*vllm serve") as error:
        Rewards(spec)
    assert "\n" not in str(error.value)

# ---- GenEval's verdicts

def box_at(x, y, size=20):
    return (0.9, torch.tensor([[x, y], [x + size, y + size]]), None)

def want(name, count=1, **more):
    return {"class": name, "count": count, **more}

def verdicts(found, include, exclude=(), colors=None):
    """(score, strict, accuracy) of hand-made objects; colors: {class: [colour of each object]}"""
    def color_of(name, box, mask):
        return colors[name][[one[1] is box for one in found[name]].index(True)]
    data = {"include": include, "exclude": list(exclude)}
    return tuple(round(float(geneval.verdict(found, data, color_of, rule)), 4)
                 for rule in ("score", "strict", "accuracy"))

DOGS = [box_at(0, 0), box_at(50, 0), box_at(90, 0)]

def test_reward_verdict_counts():
    """The score falls with the distance from the number asked for; "accuracy" lets more pass."""
    for n, scores in ((0, (0, 0, 0)), (1, (1, 1, 1)), (2, (0, 0, 1)), (3, (0, 0, 1))):
        assert verdicts({"dog": DOGS[:n]}, [want("dog")]) == scores
    both = [want("dog"), want("cat")]
    assert verdicts({"dog": DOGS[:1], "cat": DOGS[1:2]}, both) == (1, 1, 1)
    assert verdicts({"cat": DOGS[1:2], "cow": DOGS[:1]}, both) == (0.5, 0, 0)
    for n, scores in ((2, (0.6667, 0, 0)), (3, (1, 1, 1)), (4, (0.6667, 0, 0)), (7, (0, 0, 0))):
        assert verdicts({"dog": DOGS[:1] * n}, [want("dog", 3)], [want("dog", 4)]) == scores
    assert verdicts({"dog": DOGS[:1] * 4}, [want("dog", 3)]) == (0.6667, 0, 1)

@pytest.mark.parametrize("colors, scores", [
    (["red", "red"], (1, 1, 1)), (["red", "blue"], (0.75, 0, 0)), (["blue", "blue"], (0.5, 0, 0)),
    (["red", "red", "blue"], (0.25, 0, 1)), (["red"], (0.25, 0, 0))])       # (1/2 + 0) / 2
def test_reward_verdict_colours(colors, scores):
    """A colour counts where the number is right; "accuracy" looks at the best ones."""
    include = [want("dog", 2, color="red")]
    assert verdicts({"dog": DOGS[:len(colors)]}, include, colors={"dog": colors}) == scores
    pair = [want("dog", color="red"), want("cat", color="blue")]
    found = {"dog": DOGS[:1], "cat": DOGS[1:2]}
    assert verdicts(found, pair, colors={"dog": ["red"], "cat": ["blue"]}) == (1, 1, 1)
    assert verdicts(found, pair, colors={"dog": ["blue"], "cat": ["red"]}) == (0.5, 0, 0)

def test_reward_verdict_positions():
    """A place counts for all objects of the right number, seen from what is itself right."""
    include = [want("cat"), want("dog", position=["right of", 0])]
    cat, right, left = [box_at(100, 100)], box_at(200, 100), box_at(0, 0)
    assert verdicts({"cat": cat, "dog": [right]}, include) == (1, 1, 1)
    for x, y in ((0, 100), (100, 200), (103, 100)):     # left; below; a shift of 3 < (20 + 20) / 10
        assert verdicts({"cat": cat, "dog": [box_at(x, y)]}, include) == (0.6667, 0, 0)
    assert verdicts({"dog": [right]}, include) == verdicts({"cat": cat}, include) == (0.3333, 0, 0)
    assert verdicts({"cat": cat, "dog": [right, left]}, include) == (0.3333, 0, 1)  # the best's
    two = [want("cat"), want("dog", 2, position=["right of", 0])]
    assert verdicts({"cat": cat, "dog": [right, left]}, two) == (0.6667, 0, 0)
    red = [want("cat", color="red"), include[1]]
    found = {"cat": cat, "dog": [right]}
    assert verdicts(found, red, colors={"cat": ["blue"]}) == (0.5, 0, 0)    # (1 + 0 + 1 + 0) / 4

@pytest.mark.parametrize("a, b, sides", [
    ((0, 0), (100, 0), {"left of"}), ((100, 0), (0, 0), {"right of"}),
    ((0, 0), (0, 100), {"above"}), ((100, 100), (0, 0), {"right of", "below"}),
    ((3, 3), (0, 0), set()), ((0, 0), (0, 0), set()),
    ((100, 49), (0, 0), {"right of"}),                      # below by (49 - 4) / 111 < .5
    ((0, 0, 10), (10, 0, 60), {"left of"}),                 # 35 > 70 / 10
    ((30, 30, 10), (0, 0, 80), set())])                     # 5 < 90 / 10
def test_reward_relations_of_boxes(a, b, sides):
    assert geneval.relations(box_at(*a)[1], box_at(*b)[1]) == sides

# ---- GenEval's detector

def fake_detector(classes, masks, shown):
    """What find_objects uses of a Mask2Former, with these answers"""
    def net(pixels, output_hidden_states):
        shown.append(pixels)
        states = [None, classes.transpose(0, 1)]
        return SimpleNamespace(masks_queries_logits=[None, masks],
                               transformer_decoder_intermediate_states=states)
    net.class_predictor = lambda queries: queries
    return net

def test_reward_objects_are_found_as_mmdet_finds_them():
    """Masks of known place and strength, at a quarter of an input of 800 x 1072 in 800 x 1088."""
    masks, classes = torch.full((1, 5, 200, 272), -4.0), torch.full((1, 5, 81), -9.0)
    classes[..., 80] = 3.0
    for query, (label, probability, rows, columns, logit) in enumerate((
            (16, 0.95, (50, 100), (40, 80), 4.0),           # dog, 0.95 * sigmoid(4)
            (16, 0.97, (0, 30), (0, 30), 4.0),
            (16, 0.40, (0, 30), (0, 30), 0.5),              # 0.4 * sigmoid(.5) < 0.3
            (64, 0.50, (100, 200), (200, 272), 4.0),        # the right end of the mask is padding
            (0, 0.99, (0, 0), (0, 0), 4.0))):               # an empty mask
        classes[0, query] = math.log((1 - probability) / 80)
        classes[0, query, label] = math.log(probability)
        masks[0, query, slice(*rows), slice(*columns)] = logit
    image, shown = pictures(1, 300, 402)[0], []
    net = fake_detector(classes, masks, shown)
    found = geneval.find_objects(net, image)
    assert set(found) == {"dog", "computer mouse"}
    (first, first_box, _), (second, second_box, mask) = found["dog"]    # best first
    sigmoid = 1 / (1 + math.exp(-4))
    assert 0.97 * 0.9 < first < 0.97 * sigmoid and 0.95 * 0.9 < second < 0.95 * sigmoid
    edges = np.array([40, 50, 80, 100]) * 4 * 300 / 800
    assert np.abs(second_box.flatten().numpy() - edges).max() <= 1
    assert np.abs(first_box.flatten().numpy() - [0, 0, 45, 45]).max() <= 1
    assert found["computer mouse"][0][1][1, 0] == 402 and mask.shape == (300, 402)
    x0, y0, x1, y1 = second_box.flatten()
    assert mask[y0:y1, x0:x1].sum() == mask.sum() and mask[y0].any() and mask[:, x1 - 1].any()
    strict = geneval.find_objects(net, image, "counting")   # above 0.9: the mask's factor decides
    assert set(strict) == {"dog"}
    assert [one[0] for one in strict["dog"]] == [score for score in (first, second) if score > 0.9]
    assert second < 0.94
    many = torch.full((1, 40, 81), -9.0)
    many[..., 3] = 9.0
    full = fake_detector(many, torch.full((1, 40, 200, 200), 5.0), shown)
    full = geneval.find_objects(full, pictures(1)[0])
    assert {name: len(group) for name, group in full.items()} == {"motorcycle": 16}

@pytest.mark.parametrize("height, width, size, padded", [
    (300, 402, (800, 1072), (800, 1088)), (203, 260, (800, 1025), (800, 1056)),     # 1024.63
    (200, 800, (333, 1333), (352, 1344))])
def test_reward_the_detector_sees_8_bits_with_a_grey_border(height, width, size, padded):
    """Enlarged without antialias, rounded to 8 bits, on grey 128, and only then standardised."""
    image = rough(height, width)
    grey = torch.full((3, *padded), 128 / 255)
    large = F.interpolate(image[None], size, mode="bilinear")[0]
    grey[:, :size[0], :size[1]] = (large * 255).round() / 255
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    pixels, inner = geneval.detector_pixels(image)
    assert inner == size and pixels.shape == (1, 3, *padded)
    expected = (grey * 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(pixels[0], expected, atol=1e-5, rtol=0)

PARTS = {       # of transformers' names: mmdet 3's prefix, and how its names go on there
    "pixel_level_module.encoder.": ("backbone.", {
        "swin.embeddings.patch_embeddings": "patch_embed", "swin.embeddings": "patch_embed",
        "swin.encoder.layers": "stages", "attention.relative_position_bias.": "attn.w_msa.",
        "attention.o_proj": "attn.w_msa.proj", "attention.": "attn.w_msa.",
        "layernorm_before": "norm1", "layernorm_after": "norm2",
        "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
        **{f"hidden_states_norms.stage{i + 1}": f"norm{i}" for i in range(4)}}),
    "pixel_level_module.decoder.": ("panoptic_head.pixel_decoder.", {
        "mask_projection": "mask_feature", "level_embed": "level_encoding.weight",
        "adapter_1.0": "lateral_convs.0.conv", "adapter_1.1": "lateral_convs.0.gn",
        "layer_1.0": "output_convs.0.conv", "layer_1.1": "output_convs.0.gn",
        **{f"input_projections.{i}.0": f"input_convs.{i}.conv" for i in range(3)},
        **{f"input_projections.{i}.1": f"input_convs.{i}.gn" for i in range(3)},
        "self_attn_layer_norm": "norms.0", "final_layer_norm": "norms.1",
        "fc1": "ffn.layers.0.0", "fc2": "ffn.layers.1"}),
    "transformer_module.": ("panoptic_head.", {
        "decoder.mask_predictor.mask_embedder.0.0": "mask_embed.0",
        "decoder.mask_predictor.mask_embedder.1.0": "mask_embed.2",
        "decoder.mask_predictor.mask_embedder.2.0": "mask_embed.4",
        "queries_embedder": "query_embed", "queries_features": "query_feat",
        "decoder.layernorm": "transformer_decoder.post_norm",
        "decoder.layers": "transformer_decoder.layers", "cross_attn_layer_norm": "norms.0",
        "self_attn_layer_norm": "norms.1", "final_layer_norm": "norms.2",
        "self_attn.": "self_attn.attn.", "cross_attn.": "cross_attn.attn.",
        "fc1": "ffn.layers.0.0", "fc2": "ffn.layers.1"}),
    "class_predictor": ("panoptic_head.cls_embed", {})}
BACKBONE = """
    patch_embed.projection.weight patch_embed.norm.bias norm3.weight
    stages.1.blocks.1.attn.w_msa.qkv.bias stages.0.blocks.0.attn.w_msa.proj.weight
    stages.3.blocks.0.attn.w_msa.relative_position_bias_table stages.2.downsample.norm.bias
    stages.0.blocks.0.norm1.weight stages.0.blocks.0.ffn.layers.0.0.weight
    stages.0.blocks.0.ffn.layers.1.bias stages.0.downsample.reduction.weight""".split()
HEAD = """
    pixel_decoder.input_convs.2.conv.bias pixel_decoder.input_convs.0.gn.weight
    pixel_decoder.encoder.layers.1.self_attn.sampling_offsets.weight
    pixel_decoder.encoder.layers.0.norms.1.bias pixel_decoder.level_encoding.weight
    pixel_decoder.encoder.layers.0.ffn.layers.1.weight cls_embed.weight
    pixel_decoder.lateral_convs.0.conv.weight pixel_decoder.mask_feature.bias
    pixel_decoder.output_convs.0.gn.bias query_embed.weight query_feat.weight level_embed.weight
    mask_embed.4.bias transformer_decoder.layers.1.cross_attn.attn.in_proj_weight
    transformer_decoder.layers.0.self_attn.attn.in_proj_bias
    transformer_decoder.layers.0.self_attn.attn.out_proj.weight
    transformer_decoder.layers.0.norms.2.weight transformer_decoder.post_norm.bias
    transformer_decoder.layers.1.ffn.layers.0.0.bias""".split()

def by_channel(weight):
    """Patches merged in transformers' order column, row, channel -> mmdet's channel, row, column"""
    C = weight.shape[-1] // 4
    order = [(column * 2 + row) * C + c for c in range(C) for row in (0, 1) for column in (0, 1)]
    return weight[..., order]

def to_mmdet(state, version):
    """A detector's weights the way mmdet 3 or 2 saves them."""
    old = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(49, 49)}
    for name, value in state.items():
        prefix = next(prefix for prefix in PARTS if name.startswith(prefix))
        begin, pairs = PARTS[prefix]
        name = begin + rewritten(name.removeprefix(prefix), pairs)
        old[name] = by_channel(value) if ".downsample." in name else value
    for name in [name for name in old if ".q_proj." in name]:
        parts = [old.pop(name.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        joint = "qkv." if "w_msa" in name else "in_proj_"
        old[name.replace("q_proj.", joint)] = torch.cat(parts)
    assert {"backbone." + name for name in BACKBONE} <= set(old)        # some, as mmdet 3 has them
    assert {"panoptic_head." + name for name in HEAD} <= set(old)
    if version == 3:
        return old
    rules = {r"(pixel_decoder.encoder.layers.\d\.)self_attn": r"\1attentions.0", "ffn": "ffns.0",
             "cross_attn.attn": "attentions.0.attn", "self_attn.attn": "attentions.1.attn"}
    older = {}
    for name, value in old.items():
        for new, before in rules.items() if name.startswith("panoptic_head") else ():
            name = re.sub(new, before, name)
        older[name] = value
    return older

def small_detector_config(**options):
    swin = SwinConfig(embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_labels=80,
        encoder_feedforward_dim=32, encoder_layers=2, decoder_layers=3, num_attention_heads=2,
        dim_feedforward=32, num_queries=4)

@pytest.fixture
def detector(monkeypatch):
    """A small one, in which mmdet's file is to be loaded; it sees a person in each of 4 queries"""
    model = randomise(geneval_detector.Detector(small_detector_config()))
    model.class_predictor.bias.data[0] = 9.0
    monkeypatch.setattr(geneval_detector.hf, "Mask2FormerConfig", small_detector_config)
    geneval_detector.load_detector.cache_clear()
    rewards.build.cache_clear()
    return model

def save_mmdet(folder, state, monkeypatch):
    """mmdet's file, in the format in which mmdet publishes, under a name that tells its sha256"""
    torch.save({"meta": {"CLASSES": ("person",)}, "state_dict": state}, folder / "new.pth",
               _use_new_zipfile_serialization=False)
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()
    path = (folder / "new.pth").rename(folder / f"mask2former_small-{digest[:8]}.pth")
    monkeypatch.setattr(geneval_detector, "ADDRESSES", ["http://127.0.0.1:9/none-00000000.pth",
                                                       f"http://127.0.0.1:9/{path.name}"])
    return path

@pytest.mark.parametrize("version", [3, 2])
def test_reward_the_official_detector_is_mmdets(detector, tmp_path, monkeypatch, version):
    """By mmdet 3's and mmdet 2's names: the same weights, and so the same features."""
    save_mmdet(tmp_path, to_mmdet(detector.state_dict(), version), monkeypatch)
    loaded = geneval_detector.load_detector(str(tmp_path))
    assert equal_weights(loaded, detector) and not loaded.training
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (model(pixels, output_hidden_states=True) for model in (loaded, detector))
    assert torch.equal(one.masks_queries_logits[-1], other.masks_queries_logits[-1])
    states = [out.transformer_decoder_intermediate_states[-1] for out in (one, other)]
    assert torch.equal(*states) and states[0].shape == (4, 1, 32) and states[0].std() > 0.1

def test_reward_merged_patches_are_put_in_transformers_order():
    """mmdet's goes by channel, row, column; transformers' by column, row, channel."""
    from transformers.models.swin.modeling_swin import SwinPatchMerging
    merging, x, out = randomise(SwinPatchMerging(3)), torch.randn(4, 6, 3), []
    for value in merging.state_dict().values():
        assert torch.equal(geneval_detector.patches_in_order(by_channel(value)), value)
    weights = {name: by_channel(value) for name, value in merging.state_dict().items()}
    for row, column in ((0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)):
        pixels = [x[row + i, column + j, c] for c in range(3) for i in (0, 1) for j in (0, 1)]
        scale, shift = weights["norm.weight"], weights["norm.bias"]
        patch = F.layer_norm(torch.stack(pixels), (12,), scale, shift)
        out.append(weights["reduction.weight"] @ patch)
    with torch.no_grad():
        merged = merging(x.view(1, 24, 3), (4, 6))[0]
    torch.testing.assert_close(merged, torch.stack(out))

@pytest.mark.parametrize("change, message", [
    ("missing", "Missing key.*transformer_module.queries_embedder.weight"),
    ("extra", "Unexpected key.*extra"), ("damaged", "is cut off or changed: its sha256"),
    ("none", "there is no detector; put none-00000000.pth into .*it is at http:")])
def test_reward_a_wrong_detector_file_is_named(detector, tmp_path, monkeypatch, change, message):
    state = to_mmdet(detector.state_dict(), 3)
    if change == "missing":
        del state["panoptic_head.query_embed.weight"]
    elif change == "extra":
        state["panoptic_head.extra"] = torch.zeros(1)
    path = save_mmdet(tmp_path, state, monkeypatch)
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "none":
        path.unlink()
    with pytest.raises(UsageError, match=f"--reward geneval@{tmp_path}: .*{message}") as error:
        Rewards(f"geneval@{tmp_path}")
    assert "\n" not in str(error.value)

@pytest.mark.parametrize("first, second", [
    ("well", "well"), ("cut", "well"), ("none", "well"), ("cut", "none")])
def test_reward_the_detector_is_downloaded_once(tmp_path, monkeypatch, serve, first, second):
    """Into the hub's cache, from the other address if one fails; a cut-off file leaves no trace."""
    content, asked, constants = b"weights" * 9, [], geneval_detector.constants

    class Files(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            how = first if "first" in self.path else second
            self.send_response(404 if how == "none" else 200)
            self.end_headers()
            self.wfile.write(content[:-1] if how == "cut" else content)
    digest = hashlib.sha256(content).hexdigest()[:8]
    names = [f"first-{digest}.pth", f"second-{digest}.pth"]
    url, home = serve(Files), tmp_path / "hub"
    monkeypatch.setattr(geneval_detector, "ADDRESSES", [f"{url}/{name}" for name in names])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if second == "none":
        with pytest.raises(UsageError, match=f"404.*put {names[0]} into {home}; it is at {url}"):
            geneval_detector.official_file("")
        assert list(home.iterdir()) == []
        return
    path = geneval_detector.official_file("")
    assert path.read_bytes() == content and list(home.iterdir()) == [path]
    assert path == home / names[first != "well"]
    assert geneval_detector.official_file("") == path and len(asked) == 1 + (first != "well")

@pytest.fixture
def geneval_hub(clip_hub, detector, tmp_path):
    """Facebook's detector under the names of its file, which has no swin.layernorm; a CLIP"""
    published = {
        "swin.encoder.": "encoder.", "swin.embeddings": "embeddings",
        "attention.q_proj": "attention.self.query", "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value", "attention.o_proj": "attention.output.dense",
        "attention.relative_position_bias.": "attention.self.",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    state = {}
    for name, value in detector.state_dict().items():
        if name.startswith("pixel_level_module.encoder."):
            name = rewritten(name, published)
        state[name if "class_predictor" in name else "model." + name] = value.clone()
    assert not any("swin" in name for name in state)
    state["criterion.empty_weight"] = torch.ones(81)
    folder = tmp_path / "mask2former-swin-small-coco-instance"
    detector.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (tmp_path / "clip-vit-large-patch14").symlink_to(clip_hub / "clip-vit-large-patch14")
    return tmp_path

def test_reward_geneval_runs_end_to_end(geneval_hub, detector, monkeypatch):
    """Three rewards, one detector, one CLIP; mmdet's file is taken before facebook's."""
    images, seen = pictures(1, 64, 96), []
    find = geneval.find_objects
    data = {"tag": "colors", "include": [want("person", 1, color="red")]}
    monkeypatch.setattr(geneval, "find_objects", lambda *args: seen.append(find(*args)) or seen[-1])
    names = ("geneval", "geneval-strict", "geneval-accuracy")
    scorer = Rewards(",".join(f"{name}@{geneval_hub}" for name in names))
    scorer.check(["a red person"], [data])
    scores = scorer(images, ["a red person"], [data])
    assert len({(id(one.detector), id(one.clip)) for one in scorer.rewards.values()}) == 1
    assert tuple(scores) == names and len(seen) == 3 and 0 <= scores["geneval"] <= 1
    people = seen[0]["person"]
    assert equal_weights(scorer.rewards["geneval"].detector, detector)
    assert people and len(people) == len(seen[2]["person"])
    clip = scorer.rewards["geneval"].clip
    color_of = partial(geneval.object_color, clip, images[0])
    for name, rule in zip(names, ("score", "strict", "accuracy")):
        with torch.no_grad():
            verdict = geneval.verdict(seen[0], data, color_of, rule)
        assert scores[name].item() == pytest.approx(verdict)
    save_mmdet(geneval_hub, to_mmdet(detector.state_dict(), 3), monkeypatch)
    geneval_detector.load_detector.cache_clear()
    kinds, load = [], geneval_detector.load
    monkeypatch.setattr(geneval_detector, "load", lambda *at: kinds.append(at[1:]) or load(*at))
    assert equal_weights(geneval_detector.load_detector(str(geneval_hub)), detector) and not kinds
    with pytest.raises(OSError):            # no network here
        geneval_detector.load_detector(geneval_detector.FACEBOOK)
    assert kinds == [(geneval_detector.FACEBOOK, "")]
    assert [reward.rule for reward in scorer.rewards.values()] == ["score", "strict", "accuracy"]
    places = []
    monkeypatch.setattr(geneval, "load_detector", places.append)
    monkeypatch.setattr(geneval, "build", lambda kind, device, source: places.append(source))
    geneval.GenEval("cpu", geneval_detector.FACEBOOK)       # CLIP comes from the hub as well
    assert places == [geneval_detector.FACEBOOK, ""]

@pytest.mark.parametrize("bad", [
    {}, [], {"include": []}, {"include": 3}, {"include": [want("unicorn")]},
    {"include": [{"class": "dog"}]}, {"include": [want("dog"), want("dog", 0)]}])
def test_reward_geneval_wants_metadata_of_coco_classes(bad):
    check = geneval.GenEval.check
    assert not check(None, "", {"include": [want("dog"), want("tv remote", 2)]})
    assert "include" in check(None, "", bad) and "FILE.jsonl" in check(None, "", bad)
    assert len(geneval.COCO) == len(set(geneval.COCO)) == 80 and geneval.CLIP_COLORS == COLORS
    assert geneval.COCO[64:67] == ["computer mouse", "tv remote", "computer keyboard"]

def test_reward_object_colours(tmp_path):
    """Straight from the model: each object cut out on grey, three sentences for each colour, the
    middle rounded to even."""
    small_clip(seed=5).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    clip, answers, texts = rewards.ClipScore("cpu", tmp_path), [], []
    sentences, asked, text = set(), set(), clip.text
    clip.text = lambda sentence: asked.add(sentence) or text(sentence)
    for color in COLORS:
        forms = [f"a photo of a {color} person", f"a photo of a {color}-colored person",
                 f"a photo of a {color} object"]
        sentences.update(forms)
        tokens = clip.tokenizer(forms, padding=True, return_tensors="pt")
        features = clip.model.get_text_features(**tokens).pooler_output
        texts.append(F.normalize(F.normalize(features).mean(0), dim=-1))
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[:, 20:85] = True                   # 64 x 65 -> 224 x 227: 1.5 columns too many
    mask[10:20, 20:30] = False
    for image in torch.rand(16, 3, 64, 96, generator=torch.Generator().manual_seed(0)):
        cut = torch.where(mask, image, torch.tensor(0x99 / 255))[None, :, :, 20:85]
        with torch.no_grad():
            feature = clip.model.get_image_features(rewards.clip_pixels(cut, round)).pooler_output
            answers.append(COLORS[(torch.stack(texts) @ feature[0]).argmax()])
            box = torch.tensor([[20, 0], [85, 64]])
            assert geneval.object_color(clip, image, "person", box, mask) == answers[-1]
    assert len(set(answers)) > 1 and asked == sentences

# ---- OCR

def flooded(mask):
    """Connected components by brute force: the sets of pixels"""
    left, regions = {tuple(pixel) for pixel in mask.nonzero().tolist()}, set()
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            near &= left
            left -= near
            edge += near
        regions.add(frozenset(region))
    return regions

@pytest.mark.parametrize("density", [0.1, 0.35, 0.6, 1.0, 0.0])
def test_reward_components_against_brute_force(density):
    mask = torch.rand(40, 57, generator=torch.Generator().manual_seed(1)) < density
    if density == 0.35:                     # a spiral, and two that touch at a corner
        mask[:] = False
        mask[2:38:4, 2:50] = mask[2:38, 50] = True
        mask[0, 56] = mask[1, 55] = True
    labels = ocr.components(mask)
    regions = {frozenset(map(tuple, (labels == label).nonzero().tolist()))
               for label in labels[labels > 0].unique()}
    assert regions == flooded(mask) and torch.equal(labels > 0, mask)

def test_reward_text_boxes_grow_and_are_read_in_order():
    probs = torch.zeros(96, 160)
    probs[10:21, 100:141] = 0.9             # to the right, 4 pixels higher: scaled by 2, 8 < 10
    probs[14:25, 20:61] = 0.9
    probs[60:71, 20:61] = 0.9               # the second line
    probs[80:91, 20:61] = 0.55              # too faint
    probs[80:82, 80:140] = 0.9              # too thin
    probs[14:21, 61:100] = 0.25             # below the threshold: does not join them
    grow = 40 * 10 * 1.5 / (2 * (40 + 10))
    edges = np.array([-grow, -grow, 10 + grow, 40 + grow])
    grown = [list(np.round(2 * (edges + [top, left, top, left]))) for top, left in (
        (14, 20), (10, 100), (60, 20))]
    assert ocr.text_boxes(probs, (192, 320)) == grown
    assert ocr.text_boxes(probs * 0 + 0.9, (192, 320)) == [[0, 0, 192, 320]]
    assert ocr.text_boxes(probs * 0, (192, 320)) == []

def read_from(image, probs, lines, shown):
    """read_text with a detector and a reader that answer this; `shown` gets what they saw."""
    def answer(with_):
        return lambda pixels: shown.append(pixels) or SimpleNamespace(last_hidden_state=with_)
    return ocr.read_text(answer(probs), answer(lines), ["blank", "a", "b", "c", " "], image)

@pytest.mark.parametrize("steps, high, text", [
    ("aab--bcc", 0.9, "abbc"), ("a-a", 0.9, "aa"), ("a b", 0.9, "a b"), ("----", 0.9, ""),
    ("abc", 0.45, ""), ("a", 0.9, "a"), ("aba", 0.9, "aba")])
def test_reward_a_line_is_read_without_blanks_and_repeats(steps, high, text):
    probs = torch.full((1, len(steps), 5), (1 - high) / 4)
    for i, letter in enumerate(steps):      # "-" is the blank
        probs[0, i, "-abc ".index(letter)] = high
    shown = []
    assert read_from(torch.zeros(3, 64, 64), torch.ones(1, 1, 64, 64), probs, shown) == text
    assert shown[0].shape == (1, 3, 64, 64)         # a small picture is not enlarged

def test_reward_ocr_pixels():
    """What the two networks are shown, for a picture with one line of text and then a short one."""
    image = torch.rand(3, 200, 1200, generator=torch.Generator().manual_seed(0))
    probs, lines, shown = torch.zeros(1, 1, 160, 960), torch.zeros(1, 4, 5), []
    probs[0, 0, 40:61, 80:401] = 0.95
    lines[0, [0, 1, 2, 3], [1, 1, 0, 2]] = 1.0
    assert read_from(image, probs, lines, shown) == "ab"
    small = F.interpolate(image[None], (160, 960), mode="bilinear")[0]
    for i, mean, std in ((2, 0.485, 0.229), (1, 0.456, 0.224), (0, 0.406, 0.225)):      # B first
        torch.testing.assert_close(shown[0][0, 2 - i], (small[i] - mean) / std)
    grow = 1.5 * 320 * 20 / (2 * 340)
    left, top = round(1.25 * (80 - grow)), round(1.25 * (40 - grow))
    right, bottom = round(1.25 * (400 + grow)), round(1.25 * (60 + grow))
    width = math.ceil(48 * (right - left) / (bottom - top))
    strip = F.interpolate(image[None, :, top:bottom, left:right], (48, width), mode="bilinear")
    torch.testing.assert_close(shown[1], (strip - 0.5) / 0.5)
    shown.clear()
    assert read_from(image, probs * 0, None, shown) == "" and len(shown) == 1
    probs[:] = 0
    probs[0, 0, 40:61, 80:121] = 0.95       # 48 high, its width padded to 320 on the right
    read_from(image, probs, lines, shown)
    assert shown[2].shape == (1, 3, 48, 320)
    assert shown[2][..., 200:].eq(0).all() and shown[2][..., 0].any()
    probs = torch.zeros(1, 1, 32, 960)
    probs[0, 0, 10:20, 10:950] = 0.95       # so long that its width is limited
    shown.clear()
    read_from(torch.zeros(3, 40, 4000), probs, lines, shown)
    assert shown[1].shape == (1, 3, 48, 3200)

def distance(a, b):
    """Levenshtein's, by its definition"""
    if not a or not b:
        return len(a) + len(b)
    changed = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, changed)

@pytest.mark.parametrize("read, target, score", [
    ("xxOPEN late", "open L", 1), ("", "ab", 0), ("a", "ab", 0.5), ("all different", "bc", 0),
    ("ＯＰＥＮ！", "open!", 1), ("open!", "ＯＰＥＮ！", 1), ("“a”", '"b"', 2 / 3)] + [
    (a, b, 1 - distance(a, b) / len(b)) for a, b in (
        ("kitten", "sitting"), ("opne", "open"), ("fresbre", "freshbr"), ("abc", "cab"))])
def test_reward_ocr_score_is_a_distance(read, target, score):
    """Per sign of the target, without spaces, case and width; 1 if the target is in what is read"""
    assert abs(ocr.ocr_score(read, target) - score) < 1e-9

def test_reward_ocr_wants_quoted_text():
    assert ocr.QUOTED.search('a sign "Fresh Bread" and "More"')[1] == "Fresh Bread"
    for prompt in ("a sign", 'a "', 'a ""', 'a " "', "a “curly” sign"):
        assert ocr.OCR.check(None, prompt, {}) == "text in straight double quotes"
    assert ocr.OCR.check(None, 'a "b"', {}) == ""

@pytest.fixture(scope="session")
def ocr_hub(tmp_path_factory):
    """PP-OCRv5's two models, small and random"""
    import transformers as hf
    root = tmp_path_factory.mktemp("ocr")
    small = dict(
        stem_channels=[3, 4, 8], stage_in_channels=[8] * 4, stage_mid_channels=[4] * 4,
        stage_out_channels=[8] * 4, stage_num_blocks=[1] * 4, stage_numb_of_layers=[1] * 4,
        hidden_sizes=[8] * 4, out_features=["stage1", "stage2", "stage3", "stage4"])
    blocks = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for way, up, along in (("vertical_long_to_small_conv", 1, 0), ("symmetric_conv_long", 1, 1),
                           ("horizontal_small_to_long_conv", 0, 1)):
        for ratio, k in (("longratio", 7), ("midratio", 5), ("shortratio", 3)):
            kernel = [k if up else 1, k if along else 1]
            blocks[f"{way}_{ratio}"] = [kernel, [1, 1], [kernel[0] // 2, kernel[1] // 2]]
    torch.manual_seed(0)
    det = hf.PPOCRV5ServerDetForObjectDetection(hf.PPOCRV5ServerDetConfig(
        backbone_config=hf.HGNetV2Config(**small), neck_out_channels=16, reduce_factor=2,
        kernel_list=[3, 2, 2], scale_factor_list=[1, 2, 4, 8], intraclass_block_number=4,
        intraclass_block_config=blocks))
    rec = hf.HGNetV2Config(**small, stem_strides=[2, 1, 1, 1, 1], stage_downsample=[True] * 4,
                        stage_downsample_strides=[[2, 1], [1, 2], [2, 1], [2, 1]])
    rec = hf.PPOCRV5ServerRecForTextRecognition(hf.PPOCRV5ServerRecConfig(
        backbone_config=rec, hidden_size=16, num_attention_heads=2, head_out_channels=6))
    det.save_pretrained(root / "PP-OCRv5_server_det_safetensors")
    rec.save_pretrained(root / "PP-OCRv5_server_rec_safetensors")
    (root / "PP-OCRv5_server_rec_safetensors" / "preprocessor_config.json").write_text(
        json.dumps({"character_list": ["blank", *"abcd", " "]}))
    return root

def test_reward_ocr_runs_end_to_end(ocr_hub, monkeypatch):
    scorer = Rewards(f"ocr@{ocr_hub}")
    reward, images = scorer.rewards["ocr"], pictures(3, 96, 200)
    assert reward.detector(images[..., :192]).last_hidden_state.shape == (3, 1, 96, 192)
    assert reward.reader(torch.zeros(1, 3, 48, 320)).last_hidden_state.shape == (1, 40, 6)
    assert reward.characters == ["blank", *"abcd", " "]
    prompts = ['a sign "abcd"'] * 3
    assert all(0 <= score <= 1 for score in scorer(images, prompts, nothing(3))["ocr"].tolist())
    monkeypatch.setattr(ocr, "read_text", lambda *models_and_image: "abc")
    assert scorer(images, prompts, nothing(3))["ocr"].tolist() == [0.75] * 3
    with pytest.raises(UsageError, match="--reward ocr: prompt 'no text' has no text in straight"):
        scorer.check(['a "b"', "no text"], nothing(2))
