"""HPSv2.1: cos(text, image) of a ViT-H/14 published under open_clip's names."""
import html

import torch.nn.functional as F
import transformers as hf

from rewards import (CLIP_MEAN, CLIP_STD, LAION, ClipScore, blank, fill, place, renamed,
                     standardise)

RENAMES = {     # open_clip's names -> transformers', one rule after the other
    # the two towers
    r"^visual\.proj$": "visual_projection.weight",
    r"^visual\.": "vision_model.",
    r"^text_projection$": "text_projection.weight",
    r"^(?=transformer|token_|positional|ln_final)": "text_model.",
    # before and behind their blocks
    r"(class|token)_embedding": r"embeddings.\1_embedding",
    r"positional_embedding$": "embeddings.position_embedding.weight",
    r"conv1": "embeddings.patch_embedding",
    r"ln_pre": "pre_layrnorm",
    r"ln_post": "post_layernorm",
    r"ln_final": "final_layer_norm",
    # in their blocks
    r"transformer\.resblocks": "encoder.layers",
    r"\.attn\.": ".self_attn.",
    r"ln_(\d)": r"layer_norm\1",
    r"c_fc": "fc1",
    r"c_proj": "fc2"}

PLAIN = {0x3000: " "} | {0xFEE0 + code: code for code in range(0x21, 0x7F)}
PLAIN |= dict.fromkeys(range(0x2018, 0x201C), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')


def plain(text):
    """Full-width signs and curly quotes become ASCII's."""
    return text.translate(PLAIN)


def hps_pixels(images):
    """-> [N, 3, 224, 224]: the longer side to 224, black beside the shorter one."""
    height, width = (round(224 * side / max(images.shape[-2:])) for side in images.shape[-2:])
    images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
    top, left = (224 - height) // 2, (224 - width) // 2
    images = F.pad(images, (left, 224 - width - left, top, 224 - height - top))
    return standardise(images, CLIP_MEAN, CLIP_STD)


class HPSv2(ClipScore):
    repo, texts = "xswu/HPSv2", LAION

    def load_model(self, folder):
        state = renamed(place(self.repo, folder), "HPS_v2.1_compressed.pt", RENAMES)
        for name in ("visual_projection.weight", "text_projection.weight"):
            state[name] = state[name].T.contiguous()        # open_clip multiplies from the left
        model = blank(hf.CLIPModel, hf.CLIPConfig.from_pretrained(place(LAION, folder)))
        return fill(model, state)

    def encode_text(self, text):
        """As ftfy would have mended it."""
        return super().encode_text(plain(html.unescape(html.unescape(text))).strip())

    def images(self, images):
        return self.encode_pixels(hps_pixels(images))
