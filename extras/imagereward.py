"""ImageReward: BLIP's text encoder reads the prompt while it looks at the image, and a linear head
scores its first token."""
import torch
import transformers as hf
from torch import nn

from extras.aesthetic import linear_head
from rewards import HALF, blank, clip_pixels, fill, place, renamed

RENAMES = {     # BLIP's names -> transformers', one rule after the other; an empty name is dropped
    # the parts: a BLIP and the head; transformers counts positions itself
    r".*position_ids$": "",
    r"^blip\.visual_encoder": "vision_model",
    r"^blip\.": "",
    r"^mlp\.layers": "itm_head",
    # before and behind the blocks of the vision tower
    r"cls_token": "embeddings.class_embedding",
    r"pos_embed$": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"model\.norm": "model.post_layernorm",
    # in its blocks
    r"model\.blocks": "model.encoder.layers",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.attn\.": ".self_attn.",
    r"\.norm(\d)": r".layer_norm\1"}


class ImageReward(nn.Module):
    def __init__(self, device, folder=""):
        super().__init__()
        vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                      num_attention_heads=16, image_size=224, layer_norm_eps=1e-6)
        config = hf.BlipConfig(vision_config=vision, text_config={"num_attention_heads": 12})
        self.blip = blank(hf.BlipForImageTextRetrieval, config)
        self.blip.itm_head = linear_head()
        fill(self.blip, renamed(place("THUDM/ImageReward", folder), "ImageReward.pt", RENAMES))
        bert = place("google-bert/bert-base-uncased", folder)
        self.tokenizer = hf.AutoTokenizer.from_pretrained(bert)

    def forward(self, images, prompts, metadata):
        tokens = self.tokenizer(prompts, padding="max_length", max_length=35, truncation=True)
        ids, mask = (torch.tensor(tokens[key]).to(images.device)
                     for key in ("input_ids", "attention_mask"))
        with HALF:
            patches = self.blip.vision_model(clip_pixels(images, round)).last_hidden_state
            states = self.blip.text_encoder(ids, mask, encoder_hidden_states=patches)
        scores = self.blip.itm_head(states.last_hidden_state[:, 0].float()).squeeze(-1)
        return (scores - 0.16717362830052426) / 1.0333394966054072      # mean and std, as published
