"""Models by short name, and recipes: flags that go together.

Config's defaults are the paper's first stage; a recipe goes over them, what a model needs goes over
the recipe, and a flag goes over all. assets/recipes.md tells where each value comes from.
"""
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
MODELS = {
    "tiny": str(ASSETS / "tiny-sd3"),                     # from tiny_world.py
    "mini": str(ASSETS / "mini-sd3"),                     # from mini_geneval.py
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    # Untried at full size:
    "flux.2-klein": "black-forest-labs/FLUX.2-klein-4B",
    "z-image": "Tongyi-MAI/Z-Image",
    "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
    "qwen-image": "Qwen/Qwen-Image",
    "wan2.1": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
GET_MODEL = (f"give {', '.join(MODELS)}, or a pipeline's hub id or folder; for a gated one accept "
             "its licence on the hub, then `hf auth login`")
# Arguments of a pipeline's call: these have no T5, for which it would add 256 empty tokens.
OPTIONS = {name: {"max_sequence_length": 0} for name in ("tiny", "mini")}

LARGE = {"resolution": "512", "dtype": "bf16", "checkpointing": True, "micro_batch": 6}
PREFERENCE = {**LARGE, "reward": "hpsv2,pickscore,clipscore", "prompts": "pickscore"}
SKILL = {**LARGE, "updates": 2, "n_mc": 10, "soft_clip": 0.0}
GENEVAL = {**SKILL, "reward": "geneval", "prompts": "geneval", "iterations": 100, "clip": 3e-2}
TINY = {
    "iterations": 40, "prompts_per_iteration": 12, "group_size": 12, "updates": 4, "steps": 6,
    "n_mc": 2, "share": "matched", "clip": 1e-2, "soft_clip": 0.0, "lora_rank": 0, "lr": 4e-4,
    "eval_reward": "shapes,shapes-strict=0"}
RECIPES = {
    "tiny": TINY,
    "mini": {
        **TINY, "lr": 2e-4, "prompts": "mini", "reward": "objects",
        "eval_reward": "objects,objects-strict=0,as-drawn=0"},
    # The paper's five stages of SD3.5-medium.
    "sd3.5-s1": PREFERENCE,
    "sd3.5-s2": GENEVAL,
    "sd3.5-s3": PREFERENCE,
    "sd3.5-s4": {**GENEVAL, "iterations": 25},
    "sd3.5-s5": {**SKILL, "reward": "ocr", "prompts": "ocr", "iterations": 15, "kl": 0.3},
    # Ours, cheapest in miniature, unproven at scale: 17 network evaluations an image, not 48.
    "sd3.5-fast": {
        **PREFERENCE, "prompts_per_iteration": 64, "group_size": 18, "updates": 4, "steps": 10,
        "share": "matched", "clip": 1e-2, "soft_clip": 0.0},
    "flux": {
        **PREFERENCE, "reward": "hpsv2,pickscore,imagereward", "iterations": 300, "updates": 4,
        "steps": 16, "prompts_per_iteration": 32, "group_size": 12, "guidance": 3.5,
        "resolution": "720", "clip": 1e-2, "lr": 1e-5, "lora_rank": 0, "ema": 0.0,
        "micro_batch": 3, "shard": True, "offload": True, "save_every": 25},
}
VIDEO = {"guidance": 5.0, "group_size": 12, "micro_batch": 1, "offload": True}
NEEDS = {                                                 # as their pages say, but for fewer frames
    "flux.2-klein": {"steps": 4, "solver": "euler", "resolution": "1024"},
    "z-image": {"guidance": 4.0, "resolution": "1024"},
    "z-image-turbo": {"steps": 9, "solver": "euler", "resolution": "1024"},
    "qwen-image": {"guidance": 4.0, "resolution": "1024", "micro_batch": 1},
    "wan2.1": {**VIDEO, "resolution": "832x480", "frames": 33},
    "wan2.2-5b": {**VIDEO, "resolution": "1280x704", "frames": 33},
}


def recipe_of(model):
    """The recipe of a model that is given without one."""
    if model in RECIPES:
        return model
    name = Path(model).name.lower()
    return "flux" if "flux" in name and "flux.2" not in name else "sd3.5-s1"
