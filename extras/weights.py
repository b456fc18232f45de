"""What trains, as diffusers reads and writes it: a LoRA, or all of a transformer's weights.

The LoRA is made by hand, since diffusers' own needs peft. pipe.load_lora_weights loads its file.
"""
import json
import os
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rewards import UsageError, one_line

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
TARGETS = {     # the peers' choices; of SD3.5's two attentions, attn2 has none
    "SD3Transformer2DModel": ATTENTION,
    "FluxTransformer2DModel": ATTENTION + r"|ff(_context)?\.net\.(0\.proj|2)",
}
ANY_ATTENTION = r"att(n\d?|ention)\.\w+(\.0)?"
FILE = "pytorch_lora_weights.safetensors"


def add_lora(transformer, cfg, device, generator):
    """Linear layers become W x + alpha / r B A x, with A drawn and B = 0.
    A and B are fp32, and rounded to the layer's dtype for the product: the network computes what
    diffusers computes with the LoRA loaded.
    """
    pattern = TARGETS.get(type(transformer).__name__, ANY_ATTENTION)
    linears = {name: module for name, module in transformer.named_modules()
               if isinstance(module, nn.Linear)}
    targets = {name: module for name, module in linears.items()
               if re.fullmatch(rf"(.*\.)?({pattern})", name)}
    targets = targets or {name: module for name, module in linears.items()
                          if re.search(r"\.\d+\.", name)}        # all that lie in blocks
    if not targets:
        raise UsageError(f"--lora-rank: {type(transformer).__name__} has no blocks; use 0")
    rank, scale = cfg.lora_rank, cfg.lora_alpha / cfg.lora_rank

    def add_product(linear, args, output):
        A, B = linear.lora_A.to(output.dtype), linear.lora_B.to(output.dtype)
        low = scale * (args[0] @ A.T)                     # scaled where a row has r numbers
        return output + low @ B.T

    for name, linear in targets.items():
        A = torch.randn(rank, linear.in_features, generator=generator(cfg.seed, "lora", name))
        linear.lora_A = nn.Parameter((A / rank).to(device))
        linear.lora_B = nn.Parameter(linear.lora_A.new_zeros(linear.out_features, rank))
        linear.register_forward_hook(add_product)


def write_weights(folder, weights, transformer, cfg):
    """Write {name: tensor} as a LoRA's file or a transformer's folder, down to the disk."""
    if cfg.lora_rank:
        folder.mkdir(parents=True, exist_ok=True)
        path, metadata = folder / FILE, {"lora_adapter_metadata": json.dumps({
            "transformer.r": cfg.lora_rank,
            "transformer.lora_alpha": cfg.lora_alpha,     # without it diffusers would take r
            "transformer.target_modules": sorted({name.rpartition(".")[0] for name in weights}),
        })}
        weights = {f"transformer.{name}.weight": value for name, value in weights.items()}
    else:
        path, metadata = folder / "transformer" / "diffusion_pytorch_model.safetensors", {}
        transformer.save_config(path.parent)
    save_file(weights, path, {"format": "pt", **metadata})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@torch.no_grad()
def load_lora(path, trainable, cfg):
    """Fill {name: parameter} from a LoRA's file, or from the folder that it lies in."""
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    with one_line(UsageError, f"--lora {path} cannot be read"), safe_open(path, "pt") as file:
        adapter = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        stored = {name: file.get_tensor(name) for name in file.keys()}
    wanted = {f"transformer.{name}.weight": p for name, p in trainable.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if name not in stored or name not in wanted or stored[name].shape != wanted[name].shape:
            raise UsageError(f"--lora {path}: {name} does not fit; is it of another --model or "
                             "--lora-rank?")
    # A file that does not say its alpha has its rank as alpha.
    ratio = adapter.get("transformer.lora_alpha", cfg.lora_rank) / cfg.lora_alpha
    for name, p in wanted.items():
        p.copy_(stored[name] * ratio if "lora_B" in name else stored[name])
