"""GenEval's detector: mmdet's Mask2Former with a Swin-S, under transformers' names.

It is downloaded once, into the hub's cache folder. Without a network put its file there by hand, or
into a folder: geneval@DIR. Facebook's weights of the same network, which give other numbers, are
taken by geneval@facebook/mask2former-swin-small-coco-instance, and from a folder
DIR/mask2former-swin-small-coco-instance if DIR has no file of mmdet's.
"""
import hashlib
import os
import shutil
import urllib.request
from functools import cache
from pathlib import Path

import transformers as hf
from huggingface_hub import constants
from torch import nn

from rewards import UsageError, blank, fill, load, renamed

FACEBOOK = "facebook/mask2former-swin-small-coco-instance"
MMDET = "https://download.openmmlab.com/mmdetection/{0}/mask2former/{1}/{1}_20220504_001756-{2}.pth"
ADDRESSES = [       # the same weights twice; a name ends with the first digits of the file's sha256
    MMDET.format("v3.0", "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco", "c9d0c4f2"),
    MMDET.format("v2.0", "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco", "743b7d99")]
RENAMES = {     # mmdet's names -> transformers', one rule after the other; an empty name is dropped
    r".*relative_position_index$": "",
    # mmdet 2's -> mmdet 3's
    r"(pixel_decoder.*)attentions\.0": r"\1self_attn",
    r"attentions\.0": "cross_attn",
    r"attentions\.1": "self_attn",
    r"ffns\.0": "ffn",
    # the parts
    r"^backbone\.": "pixel_level_module.encoder.",
    r"^panoptic_head\.pixel_decoder\.": "pixel_level_module.decoder.",
    r"^panoptic_head\.cls_embed\.": "class_predictor.",
    r"^panoptic_head\.(transformer_)?": "transformer_module.",
    r"ffn\.layers\.0\.0": "fc1",
    r"ffn\.layers\.1": "fc2",
    # Swin
    r"encoder\.patch_embed\.norm": "encoder.swin.embeddings.norm",
    r"encoder\.patch_embed\.": "encoder.swin.embeddings.patch_embeddings.",
    r"encoder\.stages\.": "encoder.swin.encoder.layers.",
    r"encoder\.norm(\d)": lambda norm: f"encoder.hidden_states_norms.stage{int(norm[1]) + 1}",
    r"(blocks\.\d+)\.norm1": r"\1.layernorm_before",
    r"(blocks\.\d+)\.norm2": r"\1.layernorm_after",
    r"(blocks\.\d+)\.fc": r"\1.mlp.fc",
    r"attn\.w_msa\.qkv\.": "attention.in_proj_",
    r"attn\.w_msa\.proj": "attention.o_proj",
    r"attn\.w_msa\.": "attention.relative_position_bias.",
    # the pixel decoder
    r"input_convs": "input_projections",
    r"lateral_convs\.0": "adapter_1",
    r"output_convs\.0": "layer_1",
    r"\.conv\.": ".0.",
    r"\.gn\.": ".1.",
    r"mask_feature": "mask_projection",
    r"level_encoding\.weight": "level_embed",
    r"(decoder\.encoder.*)norms\.0": r"\1self_attn_layer_norm",
    r"(decoder\.encoder.*)norms\.1": r"\1final_layer_norm",
    # the transformer
    r"query_embed": "queries_embedder",
    r"query_feat": "queries_features",
    r"mask_embed\.(\d)": lambda n: f"decoder.mask_predictor.mask_embedder.{int(n[1]) // 2}.0",
    r"attn\.attn": "attn",
    r"norms\.0": "cross_attn_layer_norm",
    r"norms\.1": "self_attn_layer_norm",
    r"norms\.2": "final_layer_norm",
    r"post_norm": "layernorm"}


class Detector(hf.Mask2FormerModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which needs scipy."""
    def __init__(self, config):
        super().__init__(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.pixel_level_module.encoder.swin.layernorm = nn.Identity()      # unused, and in no file


@cache
def load_detector(source):
    """mmdet's weights; facebook's where they are asked for, or are what the folder has."""
    folder = Path(source)
    if source == FACEBOOK:
        return load(Detector, FACEBOOK, "")
    of_mmdet = list(folder.glob("mask2former*.pth"))
    if source and not of_mmdet and (folder / FACEBOOK.split("/")[1]).is_dir():
        return load(Detector, FACEBOOK, source)
    path = official_file(source)
    state = renamed(path.parent, path.name, RENAMES)
    for name, value in state.items():
        if ".downsample." in name:
            state[name] = patches_in_order(value)
    return fill(blank(Detector, hf.Mask2FormerConfig(num_labels=80)), state)


def patches_in_order(weight):
    """The last axis goes over 2 x 2 pixels: by channel, row, column -> by column, row, channel."""
    return weight.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def official_file(folder):
    """In the folder, if one is given; else in the hub's cache, where it is downloaded to."""
    home = Path(folder or constants.HF_HUB_CACHE)
    for address in ADDRESSES:
        path = home / address.rpartition("/")[2]
        if path.is_file():
            return whole(path)
    why = "there is no detector"
    for address in [] if folder else ADDRESSES:
        try:
            return download(address, home)
        except (OSError, UsageError) as error:
            why = f"{type(error).__name__}: {error}"
    name = ADDRESSES[0].rpartition("/")[2]
    raise UsageError(f"{why}; put {name} into {home}; it is at {ADDRESSES[0]}")


def download(address, home):
    """It gets its name when it is whole: a cut-off file is never taken for one."""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    name = address.rpartition("/")[2]
    part = home / f"{os.getpid()}-{name}"
    home.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(address, timeout=60) as reply, open(part, "wb") as file:
            shutil.copyfileobj(reply, file)
        return whole(part).replace(home / name)
    finally:
        part.unlink(missing_ok=True)


def whole(path):
    """The path, if the file's sha256 begins as its name ends."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    begin = path.stem[-8:]
    if digest.hexdigest()[:8] != begin:
        raise UsageError(f"{path} is cut off or changed: its sha256 does not begin with {begin}")
    return path
