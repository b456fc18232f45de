"""V-GRPO: online reinforcement learning of text-to-image models, in one file (arXiv 2604.23380).

Generate a group of images per prompt with any ODE sampler, score them, and follow GRPO's clipped objective.
In place of the intractable log-likelihood stands an ELBO: minus the denoising loss of the final image, a mean
over a few timestep-noise pairs. Shared pairs, stratified timesteps and a self-normalised weight make it
stable. A ratio clip, a KL to theta_old or a soft clip of the advantages bounds the step.

    python vgrpo.py                                              # the tiny model, on a laptop, minutes
    torchrun --nproc_per_node=8 vgrpo.py --model sd3.5-medium    # the paper's stage 1

Symbols: P prompts per iteration, G images per group, M = N_MC timestep-noise pairs per image, K rewards, B
rows; [...] a latent's own axes, d numbers in all; o a final latent, c its conditions; t = 0 is data, t = 1
noise; z_t = (1 - t) o + t eps, v = eps - o, and the network's v_theta gives x_theta = z_t - t v_theta.

Where this file departs from the paper:
 1. Antithetic noise is on by default: neighbouring strata take eps and -eps. --no-antithetic is the paper's.
    --share matched (see draw_pairs) is ours too, and the paper's recipes do not use it.
 2. Where M does not divide the sampler's grid, a point between two strata belongs to both in proportion.
 3. A floor of 1e-5 in the weight's denominator. A group's std divides by G, not G - 1, and 1e-6 is added to
    it. Equal or missing rewards: A = 0. Several rewards: the mean of their advantages, so a std below 1.
 4. An iteration's first step is at theta_old itself, where L_hat(theta_old) is sg(L_hat(theta)) exactly: its
    theta_old pass is dropped. With --updates U each step takes its own P/U whole groups.
 5. Eq. 14 prints a sum of squares over d; here it is a mean, as in the paper's code. Eq. 16's KL is a mean
    too, by our choice: if the paper sums, its beta is d times stronger.
 6. The pairs' t are of the sampler's own grid, so --solver and --steps change the estimator too (dpm++ with
    40 steps and SD3.5's shift: no t below .07). Guidance in two passes is sampled with, not trained.
"""
import argparse
import hashlib
import inspect
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

# ---------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    model: str = "tiny"                # tiny, sd3.5-medium, sd3.5-large, flux.1-dev, a hub id or a folder
    recipe: str = ""                   # tiny, sd3.5-s1 ... sd3.5-s5, flux (default: the model's)
    reward: str = "shapes"             # name[@weights][=weight],... or my_file.py:function (see rewards.py)
    eval_reward: str = ""              # rewards of the evaluation (default: --reward)
    prompts: str = "shapes"            # FILE.txt, FILE.jsonl, or a built-in set: shapes, hpdv2, geneval, ocr
    lora: str = ""                     # start from these LoRA weights (an earlier stage's checkpoint)
    iterations: int = 150              # rollout-and-update rounds
    prompts_per_iteration: int = 48    # P, over all ranks
    group_size: int = 24               # G, images per prompt
    updates: int = 1                   # gradient steps per iteration, each on P / updates whole groups
    steps: int = 40                    # sampler steps
    solver: str = "dpm++"              # euler or dpm++ (DPM-Solver++, 2nd order)
    guidance: float = 0.0              # classifier-free scale, 0 = off; or the embedded scale, told as it is
    resolution: int = 0                # image side in pixels, 0 = the pipeline's own
    n_mc: int = 4                      # M, timestep-noise pairs per image
    share: str = "both"                # of a group's pairs: both, timestep, noise, none; matched: in twos
    stratified: bool = True            # one timestep from each of M strata of the sampler's grid
    antithetic: bool = True            # neighbouring strata take eps and -eps
    weight: str = "adaptive"           # of the denoising loss: adaptive (Eq. 14), x, v, eps
    clip: float = 0.0                  # ratio clip range e, 0 = off
    kl: float = 0.0                    # beta of the simple KL to theta_old (Eq. 16), 0 = off
    soft_clip: float = 3.0             # eta of the advantage soft clip (Eq. 17), 0 = off
    combine: str = "advantage"         # "advantage": weighted mean of advantages; "sum": of raw rewards
    lr: float = 3e-4                   # AdamW's learning rate
    weight_decay: float = 1e-4         # AdamW's weight decay
    grad_norm: float = 1.0             # clip of the gradient's norm, 0 = off
    lora_rank: int = 32                # rank of the LoRA, 0 = train all weights
    lora_alpha: float = 64.0           # LoRA strength: B A x * alpha / rank
    ema: float = 0.9                   # decay of the evaluated average of the weights, 0 = off
    micro_batch: int = 0               # images per network call of an update (M rows each), 0 = a group
    dtype: str = "fp32"                # of the frozen parts and of the network's arithmetic: fp32 or bf16
    checkpointing: bool = False        # recompute activations in the backward pass
    compile: bool = False              # torch.compile of the transformer's blocks
    shard: bool = False                # FSDP2: a rank holds its part of the transformer's weights
    offload: bool = False              # text encoders and rewards wait on the CPU while they are not used
    seed: int = 0                      # of everything that is drawn
    out: str = ""                      # run folder (default: runs/MODEL-TIME)
    resume: str = ""                   # run folder to continue; --resume without a value: --out's
    eval_every: int = 10               # iterations between evaluations
    save_every: int = 10               # iterations between checkpoints

LEAST = dict(iterations=1, prompts_per_iteration=1, group_size=2, updates=1, steps=1, n_mc=1, eval_every=1,
             save_every=1, lora_alpha=1e-3)
MODELS = {
    "tiny": str(Path(__file__).with_name("assets") / "tiny-sd3"),      # made by assets/tiny.py
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
}
# Config's defaults are the paper's first stage; these override them. The README tells each value's source.
LARGE = dict(resolution=512, dtype="bf16", checkpointing=True, micro_batch=6)
PREFERENCE = dict(LARGE, reward="hpsv2,pickscore,clipscore", prompts="hpdv2")
SKILL = dict(LARGE, updates=2, n_mc=10, soft_clip=0.0)
GENEVAL = dict(SKILL, reward="geneval", prompts="geneval", iterations=100, clip=3e-2)
RECIPES = {
    "tiny": dict(iterations=100, prompts_per_iteration=12, group_size=12, steps=6, n_mc=2, share="matched",
                 lora_rank=0, lr=4e-4, eval_reward="shapes,shapes-strict=0"),
    "sd3.5-s1": PREFERENCE,
    "sd3.5-s2": GENEVAL,
    "sd3.5-s3": PREFERENCE,
    "sd3.5-s4": dict(GENEVAL, iterations=25),
    "sd3.5-s5": dict(SKILL, reward="ocr", prompts="ocr", iterations=15, kl=0.3),
    "flux": dict(PREFERENCE, reward="hpsv2,pickscore,imagereward", iterations=300, updates=4, steps=16,
                 prompts_per_iteration=32, group_size=12, guidance=3.5, resolution=720, clip=1e-2, lr=1e-5,
                 lora_rank=0, ema=0.0, micro_batch=3, shard=True, offload=True, save_every=25),
}
CHOICES = dict(solver=("euler", "dpm++"), share=("both", "timestep", "noise", "none", "matched"),
               weight=("adaptive", "x", "v", "eps"), combine=("advantage", "sum"), recipe=tuple(RECIPES),
               dtype=("fp32", "bf16"))

def parse_config(argv=None):
    """Config from the command line: a flag per field, its help the comment beside the field."""
    def fail(message):
        raise UsageError(message)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser("vgrpo.py", description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail                                            # one line, not the whole usage
    for field in fields(Config):
        kind = dict(type=field.type, choices=CHOICES.get(field.name))
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif field.name == "resume":
            kind = dict(nargs="?", const="")
        parser.add_argument("--" + field.name.replace("_", "-"), **kind,
                            help=f"{comments[field.name]} [{field.default}]".replace("%", "%%"))
    flags = vars(parser.parse_args(argv))
    if "resume" in flags:                                          # that run's flags, under those given now
        out = flags["resume"] or flags.get("out") or fail("--resume: name the folder of a run")
        before, config = {}, Path(out) / "config.json"
        if flags["resume"] or config.exists():                     # --out X --resume also starts X
            with one_line(UsageError, f"--resume {out}: holds no run, or one of another version"):
                before = asdict(Config(**json.loads(config.read_text())["flags"])) | {"out": out}
        for name in ("out", "recipe", "updates", "lora", "lora_rank", "lora_alpha"):    # its checkpoint's
            if name in flags and flags[name] != before.get(name, flags[name]):
                fail(f"--{name.replace('_', '-')}: {out} keeps {before[name]}; a next stage starts by --lora")
        flags = {**before, **flags, "resume": out, "out": out}
    model = flags.get("model", Config.model)
    family = "flux" if "flux" in Path(model).name.lower() else "tiny" if model == "tiny" else "sd3.5-s1"
    recipe = flags.get("recipe", family)
    if {"reward", "prompts"} & {*flags}:                           # then what tiny's evaluates may not fit
        flags.setdefault("eval_reward", "")
    cfg = Config(**{**RECIPES[recipe], **flags, "recipe": recipe})
    for name, value in asdict(cfg).items():
        least = LEAST.get(name, 0)
        if not isinstance(value, (str, bool)) and not least <= value < math.inf:
            fail(f"--{name.replace('_', '-')} {value}: must be a number of at least {least}")
    if not (cfg.model in MODELS or "/" in cfg.model or Path(cfg.model).is_dir()):
        fail(f"--model {cfg.model}: give {', '.join(MODELS)}, a hub id OWNER/NAME, or a pipeline's folder")
    if cfg.lora and not cfg.resume and not (cfg.lora_rank and Path(cfg.lora).exists()):
        fail(f"--lora {cfg.lora}: must be an earlier stage's weights, and --lora-rank their rank")
    return cfg

MAIN = os.environ.get("RANK", "0") == "0"                          # this process prints and writes
os.environ.update({"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
                   "TQDM_DISABLE": "" if MAIN else "1"} | dict(os.environ))
if __name__ == "__main__" and sys.argv[1:] in (["-h"], ["--help"]):    # help need not wait for torch
    parse_config()

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from rewards import Rewards, RunError, UsageError, load_own, one_line, visiting

# -------------------------------------------------------------------------------------------------- the paper

def add_noise(o, t, eps):
    """z_t = (1 - t) o + t eps.  o and eps [..., *latent], t [...] -> z like eps; broadcasts"""
    t = t.reshape(*t.shape, *[1] * (eps.ndim - t.ndim))
    return (1 - t) * o + t * eps

def draw_pairs(gen, sigmas, advantages, M, shape, share="both", stratified=True, antithetic=True):
    """Timestep-noise pairs of one group: t [G, M] of the sampler's grid sigmas [n], eps [G, M, *shape].
    `times` and `noises` number an image's draws: images of the same number share them. "matched" needs the
    advantages [G]: the best image shares with the worst, the second best with the second worst. What the two
    have in common cancels, as when a whole group shares, and the noise averages over G / 2 draws, not one.
    """
    G = len(advantages)
    place = advantages.argsort(stable=True).argsort()
    one, own, matched = torch.zeros_like(place), torch.arange(G), torch.minimum(place, G - 1 - place)
    times, noises = {"both": (one, one), "timestep": (one, own), "noise": (own, one), "none": (own, own),
                     "matched": (matched, matched)}[share]
    u = torch.rand(G, M, generator=gen)[times]
    if stratified:
        u = (torch.arange(M) + u) / M                              # one u in each [j/M, (j+1)/M)
    t = sigmas[(u * len(sigmas)).long().clamp(max=len(sigmas) - 1)]
    eps = torch.randn(noises.max() + 1, M, *shape, generator=gen)
    if antithetic:
        eps[:, 1::2] = -eps[:, :M - M % 2:2]                       # an odd last pair keeps its own noise
    return t, eps[noises]

def surrogate(v, o, z, t, weight="adaptive"):
    """L_hat = 1/M sum_j l(t_j, eps_j), which stands for the negative ELBO of o (Eq. 14 with "adaptive").
    The network predicts v; the weight says whose squared error counts: x's ("adaptive": over its own size),
    v's, which is x's / t, or eps's, which is x's (1 - t) / t. v is the velocity at z = z_t.
    v, z [B, M, ...], o [B, ...], t [B, M], all fp32 -> L_hat [B], x_theta [B, M, ...]
    """
    s = t.reshape(*t.shape, *[1] * (z.ndim - 2))                   # t [B, M, 1, ...]
    x = z - s * v                                                  # x_theta
    scale = {"v": 1 / s, "eps": (1 - s) / s}.get(weight, 1)        # of x's error, up to its sign
    error = ((x - o[:, None]) * scale).flatten(2)
    loss = error.square().mean(-1)                                 # [B, M], a mean over the d numbers
    if weight == "adaptive":
        loss = loss / error.detach().abs().mean(-1).clamp(min=1e-5)         # detach: the paper's sg
    return loss.mean(-1), x

def group_advantages(rewards):
    """A_i = (R_i - mean) / std within each group.  rewards [..., G] -> [..., G]
    A NaN (an image that could not be scored) is in no mean and gets 0; so does a group of equal rewards."""
    rewards = rewards.double()
    mean = rewards.nanmean(-1, keepdim=True)
    std = (rewards - mean).square().nanmean(-1, keepdim=True).sqrt()
    return torch.where(std > 1e-6, (rewards - mean) / (std + 1e-6), 0.0).nan_to_num(0.0).float()

def weighted(rewards, weights):
    """The mean [P, G] of rewards [K, P, G] under weights [K]; those of weight 0 are only reported."""
    share = weights.double() / weights.sum()
    return torch.einsum("k,kpg->pg", share[weights > 0], rewards[weights > 0].double())

def combine_rewards(rewards, weights, rule="advantage"):
    """Advantages [P, G]: the weighted mean of the rewards' group advantages, or, by the rule "sum", the group
    advantages of the rewards' weighted mean."""
    if rule == "sum":
        return group_advantages(weighted(rewards, weights))
    return weighted(group_advantages(rewards), weights).float()

def soft_clip(advantages, eta):
    """Eq. 17: A_soft = eta tanh(A / eta); eta = 0 leaves A as it is."""
    return eta * torch.tanh(advantages / eta) if eta else advantages

def vgrpo_loss(L, L_old, x, x_old, advantages, clip=0.0, kl=0.0):
    """The clipped objective, to be minimised: -min(rho A, clip(rho, 1-e, 1+e) A) + beta KL (Eq. 16).
    L, L_old: surrogates of theta and theta_old [B], x, x_old [B, M, ...], A [B] -> loss, rho, KL [B] each
    """
    ratio = torch.exp(L_old - L)                                   # the mean over pairs came before the exp
    bounded = ratio.clamp(1 - clip, 1 + clip) if clip else ratio
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    divergence = (x - x_old).square().flatten(1).mean(-1)
    return kl * divergence - objective, ratio, divergence

# ----------------------------------------------------------------------------------- ranks and random numbers

def start_ranks():
    """Join torchrun's process group, if there is one. -> rank, number of ranks, this rank's device"""
    device, here = torch.device("cpu"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if here > torch.cuda.device_count():
            raise UsageError(f"--nproc_per_node {here}: there are {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True               # of what is left in fp32
    if "RANK" in os.environ and not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=3), device_id=bound)
    return (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)

def layout(P, updates, rank, ranks):
    """A rank's groups, update by update: an update has the same groups on any number of ranks. -> indices"""
    step = updates * ranks
    if P % step:
        near = " or ".join(str(n) for n in (P // step * step, P // step * step + step) if n)
        raise UsageError(f"--prompts-per-iteration {P}: does not fit {ranks} ranks x {updates} --updates; "
                         f"use a multiple of {step}, such as {near}")
    return [u * P // updates + rank * P // step + i for u in range(updates) for i in range(P // step)]

def generator(*key):
    """All randomness: a CPU generator that depends on its key alone, never on rank or on what came before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

def sum_over_ranks(tensor, device):
    """A table in which each rank has filled its own rows of zeros becomes the gathered table, in order."""
    if dist.is_initialized():
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor.cpu()

def shard(transformer, blocks, dtype):
    """FSDP2: a block's weights are gathered while it is computed. A LoRA stays whole, in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")      # of views: nothing works in place on them
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    lora = {p for name, p in transformer.named_parameters() if "lora_" in name}
    for module in (*blocks, transformer):
        # resharded always: by default the root keeps what it gathered, and would not see the EMA's weights
        fully_shard(module, reshard_after_forward=True, mp_policy=policy, ignored_params=lora)
    type(transformer).__name__ = type(transformer).__name__.removeprefix("FSDP")       # config.json names it

def whole(tensor):
    """A sharded tensor, gathered: every rank must ask for it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

# ------------------------------------------------------------------------------------------------- the policy

class Policy:
    """A diffusers flow-matching pipeline as pi_theta.
    It samples by the pipeline's own call, and hooks hear what the network is given, so no model family needs
    code of its own. The network's velocity for the prompt is trained: guidance only where it is embedded.
    """

    def __init__(self, pipe, cfg, device, **options):
        self.pipe, self.transformer, self.device = pipe, pipe.transformer, device
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = make_scheduler(pipe.scheduler, cfg.solver)
        self.scheduler_step, pipe.scheduler.step = pipe.scheduler.step, self.hear_scheduler
        self.names = list(inspect.signature(self.transformer.forward).parameters)
        self.time = next((name for name in self.names if name.startswith("timestep")), None)
        if not {"hidden_states", self.time} <= {*self.names}:
            raise UsageError(f"--model: {type(self.transformer).__name__} has no hidden_states and timestep")
        side = dict(height=cfg.resolution, width=cfg.resolution) if cfg.resolution else {}
        self.options = dict(options, num_inference_steps=cfg.steps, output_type="pt", **side)
        with one_line(UsageError, f"--model: {type(pipe).__name__} at --resolution {cfg.resolution}"):
            self.learn()
        self.options.update(self.guide(cfg.guidance))

    def guide(self, scale):
        """Embedded and batch-doubled guidance are guidance_scale; two-call pipelines say true_cfg_scale."""
        accepted = inspect.signature(self.pipe.__call__).parameters
        if "true_cfg_scale" in accepted and not self.transformer.config.get("guidance_embeds"):
            return dict(true_cfg_scale=scale, negative_prompt=" " if scale > 1 else None)
        return dict(guidance_scale=scale) if "guidance_scale" in accepted else {}

    def hear_network(self, module, args, kwargs, output):
        self.told, self.output = {**dict(zip(self.names, args)), **kwargs}, output[0]  # the last call's
        self.first = self.first or self.told

    def hear_scheduler(self, model_output, *args, **kwargs):
        result = self.scheduler_step(model_output, *args, **kwargs)
        self.model_output, self.latents = model_output, result[0]
        self.times.append(self.told[self.time][:1])                # one a step, however many calls
        return result

    @torch.no_grad()
    def generate(self, prompts, generators, **options):
        """One call of the pipeline, every image with noise of its own.
        -> images [B, 3, H, W] uint8 on the CPU; .latents [B, ...], .first and .times are heard"""
        self.first, self.times = None, []
        with self.transformer.register_forward_hook(self.hear_network, with_kwargs=True):
            images = self.pipe(prompt=prompts, num_images_per_prompt=len(generators) // len(prompts),
                               generator=generators, **{**self.options, **options})[0]
        return (images.float() * 255).round().to(torch.uint8).cpu()

    def learn(self):
        """Two short calls without guidance, of 3 and of 2 images: the axis of an argument whose length went
        from 3 to 2 is its axis of images. The scheduler is given sign * output: read off, and checked."""
        quiet = dict(self.guide(1.0), num_inference_steps=2, output_type="latent")
        self.generate(["a"], [generator("listen", i) for i in range(3)], **quiet)
        three = self.first
        self.generate(["a"], [generator("listen", i) for i in range(2)], **quiet)
        pairs = {name: list(zip(three[name].shape, value.shape)) for name, value in self.first.items()
                 if torch.is_tensor(value)}
        self.axis = {name: pair.index((3, 2)) for name, pair in pairs.items() if (3, 2) in pair}
        self.dtype = self.told["hidden_states"].dtype
        self.sign = 1.0 if (self.output * self.model_output).sum() > 0 else -1.0
        with torch.no_grad():
            v = self.velocity(self.told["hidden_states"], self.sigmas()[1:].expand(2), self.conditions())
        if not (v - self.model_output).norm() <= 1e-2 * self.model_output.norm():
            raise UsageError(f"--model: {type(self.pipe).__name__} does not step along its network's output")

    def sigmas(self):                                              # the sampler's grid [steps], without its 0
        return self.pipe.scheduler.sigmas[:-1].float().cpu()

    def conditions(self):
        """What the network was told, with one row of what it was told per image: a group shares its prompt.
        A guided pipeline ends its doubled batch, or begins its two calls, with the prompted half."""
        return {name: value.narrow(self.axis[name], -1, 1).clone() if name in self.axis else value
                for name, value in self.first.items() if name != "hidden_states"}

    def velocity(self, z, t, conditions):
        """v_theta(z_t, t, c) in fp32.  z [B, ...], t [B] of the grid; conditions of one row -> [B, ...]"""
        rows = {name: conditions[name].repeat_interleave(len(z), axis)      # copies, as the pipeline's: a
                for name, axis in self.axis.items() if name in conditions}  # broadcast rounds otherwise
        step = (t[:, None] - self.sigmas().to(t.device)).abs().argmin(1)
        rows[self.time] = torch.cat(self.times)[step.to(self.device)]       # as heard: bf16 rounds it
        z = z.to(self.device, self.dtype)
        return self.sign * self.transformer(hidden_states=z, **{**conditions, **rows})[0].float()

def make_scheduler(scheduler, solver):
    """euler: the pipeline's own grid. dpm++: 1, 1 - 1/n .. 1/n, shifted, unless the pipeline gives sigmas."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    config = dict(scheduler.config)
    if "FlowMatch" not in type(scheduler).__name__ and config.get("prediction_type") != "flow_prediction":
        raise UsageError(f"--model: its scheduler {type(scheduler).__name__} is not one of flow matching")
    shift = config.get("shift") or config.get("flow_shift") or 1.0
    euler = FlowMatchEulerDiscreteScheduler.from_config({**config, "shift": shift})
    if solver == "euler":
        return euler
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler = DPMSolverMultistepScheduler(**flow, use_dynamic_shifting=euler.config.use_dynamic_shifting)
    scheduler.register_to_config(**{**config, **scheduler.config})         # pipelines read mu's bounds

    def set_timesteps(n=None, device=None, sigmas=None, **kwargs):
        sigmas = [1 - i / n for i in range(n)] if sigmas is None else sigmas
        euler.set_timesteps(sigmas=sigmas, device=device, **kwargs)
        DPMSolverMultistepScheduler.set_timesteps(scheduler, len(sigmas), device)
        scheduler.sigmas, scheduler.timesteps = euler.sigmas.cpu(), euler.timesteps

    scheduler.set_timesteps = set_timesteps
    return scheduler

def load_policy(cfg, device):
    """The pipeline of --model, frozen but for what is trained. -> Policy, trainable {name: parameter}"""
    from diffusers import DiffusionPipeline
    name = MODELS.get(cfg.model, cfg.model)
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    said = []
    for library in ("diffusers.models", "transformers"):           # they only warn of weights a file lacks
        logging.getLogger(library + ".modeling_utils").setLevel(logging.WARNING)
        logging.getLogger(library + ".modeling_utils").filters = [lambda log: said.append(log.getMessage())]
    with one_line(UsageError, f"--model {cfg.model}",
                  f"; give {', '.join(MODELS)}, or a pipeline's hub id or folder; for a gated one accept its "
                  "licence on the hub, then `hf auth login`"):
        index = DiffusionPipeline.load_config(name)
        absent = {part: None for part, kind in index.items() if isinstance(kind, list) and kind[0] is None}
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **absent)
        transformer = pipe.transformer
        if "newly initialized" in str(said):
            raise UsageError(" ".join(said)[:400])
    # diffusers looks for the device anew in each call, and may look at a part that waits on the CPU
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"_execution_device": device})
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    encoders = [part for name, part in modules.items() if name.startswith("text_encoder") and cfg.offload]
    sharded = [transformer] if cfg.shard and dist.is_initialized() else []
    for part in modules.values():
        part.requires_grad_(False).eval()
        if part not in encoders + sharded:
            part.to(device)
    if cfg.model != "tiny" and hasattr(pipe.vae, "enable_slicing"):        # tiny ones are faster together
        pipe.vae.enable_slicing()
    if cfg.lora_rank:
        add_lora(transformer, cfg, device)
    else:
        transformer.requires_grad_(True)
    if cfg.checkpointing:
        transformer.enable_gradient_checkpointing()
    blocks = [block for part in transformer.children() if isinstance(part, nn.ModuleList) for block in part]
    if cfg.compile:
        for block in blocks:
            block.compile(recompile_limit=64)          # kinds of block, shapes, with and without gradient
    if sharded:
        shard(transformer, blocks, dtype)
    if not cfg.lora_rank:
        transformer.float()                                        # a rank holds fp32 of its own part only
        if dtype != torch.float32:                                 # autocast around the network only
            transformer.forward = torch.autocast(device.type, dtype)(transformer.forward)
    remember_prompts(pipe, encoders, device)
    no_t5 = {"max_sequence_length": 0} if cfg.model == "tiny" else {}       # it has no T5: no zeros for it
    trainable = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    return Policy(pipe, cfg, device, **no_t5), trainable

def remember_prompts(pipe, offloaded, device):
    """pipe.encode_prompt remembers: a group's chunks repeat its prompt. Offloaded encoders come to encode."""
    encode, known = pipe.encode_prompt, {}

    def encode_prompt(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            if sum(x.nbytes for kept in known.values() for x in kept if torch.is_tensor(x)) > 2 ** 28:
                known.clear()
            with visiting(offloaded, device):
                known[key] = encode(*args, **kwargs)
        return known[key]

    pipe.encode_prompt = encode_prompt

# -------------------------------------------------------------------------------------- LoRA and weight files

ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
LORA_TARGETS = {"SD3Transformer2DModel": ATTENTION,
                "FluxTransformer2DModel": ATTENTION + r"|ff(_context)?\.net\.(0\.proj|2)"}

def add_lora(transformer, cfg, device):
    """Linear layers become y + (alpha / r) B A x: the peers' targets, so not SD3.5's attn2. A and B = 0 are
    fp32, and rounded to the layer's dtype for the product: the network computes as diffusers' does."""
    known = LORA_TARGETS.get(type(transformer).__name__, r"att(n\d?|ention)\.\w+(\.0)?")         # else all
    targets = {name: module for name, module in transformer.named_modules()
               if isinstance(module, nn.Linear) and re.fullmatch(rf"(.*\.)?({known})", name)}
    if not targets:
        raise UsageError(f"--lora-rank: {type(transformer).__name__} has no attention known; use 0")

    def adapt(linear, args, output):
        A, B = linear.lora_A.to(output.dtype), linear.lora_B.to(output.dtype)
        return output + cfg.lora_alpha / cfg.lora_rank * (args[0] @ A.T @ B.T)

    for name, linear in targets.items():
        A = torch.randn(cfg.lora_rank, linear.in_features, generator=generator(cfg.seed, "lora", name))
        linear.lora_A = nn.Parameter((A / cfg.lora_rank).to(device))
        linear.lora_B = nn.Parameter(linear.lora_A.new_zeros(linear.out_features, cfg.lora_rank))
        linear.register_forward_hook(adapt)

def save_weights(folder, weights, transformer, cfg):
    """Write {name: tensor} as diffusers reads it: a LoRA file with its alpha, or a transformer's folder."""
    gathered = ((name, whole(value.detach())) for name, value in weights.items())
    weights = {name: value.cpu().contiguous() for name, value in gathered if MAIN}     # all gather, one keeps
    if not MAIN:
        return
    if cfg.lora_rank:
        folder.mkdir(parents=True, exist_ok=True)
        adapter = {"transformer.r": cfg.lora_rank, "transformer.lora_alpha": cfg.lora_alpha,  # else alpha = r
                   "transformer.target_modules": sorted({name.rpartition(".")[0] for name in weights})}
        save_file({f"transformer.{name}.weight": value for name, value in weights.items()},
                  folder / "pytorch_lora_weights.safetensors",
                  {"format": "pt", "lora_adapter_metadata": json.dumps(adapter)})
    else:
        transformer.save_config(folder / "transformer")
        save_file({**transformer.state_dict(), **weights},         # the state for its buffers
                  folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})

@torch.no_grad()
def load_weights(path, weights, cfg, flag):
    """Fill {name: tensor} from what save_weights wrote; path is the file or the folder it was written to."""
    if path.is_dir():
        path /= ("pytorch_lora_weights.safetensors" if cfg.lora_rank
                 else "transformer/diffusion_pytorch_model.safetensors")
    with one_line(UsageError, f"{flag} {path} cannot be read, name another (--resume: delete this one)"):
        stored = safe_open(path, "pt")                             # a tensor is read when it is asked for
    names, metadata = set(stored.keys()), stored.metadata() or {}
    adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha = adapter.get("transformer.lora_alpha", cfg.lora_rank)
    if cfg.lora_rank and (strays := names - {f"transformer.{name}.weight" for name in weights}):
        raise UsageError(f"{flag} {path}: has {min(strays)}, which this --model does not train")
    for name, value in weights.items():
        key = f"transformer.{name}.weight" if cfg.lora_rank else name
        found = stored.get_tensor(key) if key in names else torch.empty(0)
        if found.shape != value.shape:
            raise UsageError(f"{flag} {path}: has no {name} of shape {list(value.shape)}; it is of another "
                             "--model or --lora-rank")
        if name.endswith("lora_B"):
            found *= alpha / cfg.lora_alpha
        if isinstance(value, DTensor):
            found = distribute_tensor(found.to(value.device), value.device_mesh, value.placements)
        value.copy_(found)

# ---------------------------------------------------------------------------------------------------- prompts

def load_prompts(cfg):
    """-> items to train on, items to evaluate on; an item is a dict of "prompt" and its metadata."""
    items = read_prompts(cfg.prompts)
    held_out = min(len(items) // 10, 48)
    if held_out < 8:                                               # too few to set some apart: noise is
        return items, items[:48]
    order = torch.randperm(len(items), generator=generator("held out")).tolist()
    return [items[i] for i in order[held_out:]], [items[i] for i in order[:held_out]]

def read_prompts(name):
    """A prompt per line; in a .jsonl an object per line, "prompt" and any metadata; hpdv2 is fetched."""
    from huggingface_hub import hf_hub_download
    with one_line(UsageError, f"--prompts {name}",
                  "; give FILE.txt or FILE.jsonl in UTF-8, or shapes, geneval, ocr, hpdv2 (from the hub)"):
        if name in ("geneval", "ocr"):                             # with the metadata that their rewards want
            return load_own(Path(MODELS["tiny"]).with_name("prompts.py"), name)(4000, seed=0)
        if name == "hpdv2":                                        # the benchmark prompts of HPDv2
            files = [hf_hub_download("zhwang/HPDv2", f"benchmark/{style}.json", repo_type="dataset")
                     for style in ("anime", "concept-art", "paintings", "photo")]
            prompts = [prompt for file in files for prompt in json.loads(Path(file).read_text())]
            return [{"prompt": prompt} for prompt in dict.fromkeys(prompts)]
        path = Path(MODELS["tiny"], "prompts.txt") if name == "shapes" else Path(name)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    items = []
    for number, line in enumerate(lines, 1):
        with one_line(UsageError, f'--prompts {name}, line {number}: no object with a string "prompt"'):
            item = json.loads(line) if line.strip() and ".json" in path.suffix else {"prompt": line}
            item["prompt"] = item["prompt"].strip()
        items.append(item)
    if not any(item["prompt"] for item in items):
        raise UsageError(f"--prompts {name}: is empty; write a prompt per line")
    return [*{json.dumps(item): item for item in items if item["prompt"]}.values()]     # each once

def pick(items, cfg, iteration, index):
    """The item of group `index`: every one is used once before any comes again."""
    epoch, place = divmod((iteration - 1) * cfg.prompts_per_iteration + index, len(items))
    return items[torch.randperm(len(items), generator=generator(cfg.seed, "order", epoch))[place]]

# ------------------------------------------------------------------------------------------------ the rollout

@dataclass(frozen=True)
class Group:
    index: int                 # among the groups of all ranks: the key of its randomness
    item: dict                 # prompt and metadata
    images: torch.Tensor       # [G, 3, H, W] uint8, on the CPU
    latents: torch.Tensor      # o [G, ...] fp32
    conditions: dict           # c, one row

def chunks(n, cfg, rows=1):
    """Slices of n images, a network call each; M rows an image in an update, one in a rollout: rows = M."""
    size = (cfg.micro_batch or cfg.group_size) * rows
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]

def collect(policy, items, G, cfg, *key):
    """Generate a group for each of {index: item}, every image from noise of its own. -> list of Group"""
    groups = []
    for index, item in tqdm(items.items(), "images", delay=10, leave=False):
        images, latents = [], []
        for part in chunks(G, cfg, cfg.n_mc):
            noise = [generator(*key, index, i) for i in range(G)[part]]
            images.append(policy.generate([item["prompt"]], noise))
            latents.append(policy.latents.float())
        groups.append(Group(index, item, torch.cat(images), torch.cat(latents), policy.conditions()))
    return groups

def score(scorer, groups, P, device):
    """-> rewards [K, P, G] fp64 of the groups of all ranks; NaN where an image could not be scored"""
    items = [group.item for group in groups for _ in group.images]
    pixels = torch.cat([group.images for group in groups]) / 255
    scores = torch.stack([*scorer(pixels, [item["prompt"] for item in items], items).values()]).double()
    table = torch.zeros(len(scores), P, len(items) // len(groups), dtype=torch.float64)
    table[:, [group.index for group in groups]] = scores.view(len(scores), len(groups), -1)
    table = sum_over_ranks(table, device)
    if table.isnan().flatten(1).all(1).any():
        raise RunError(f"--reward: one of {', '.join(scorer.weights)} could not score any image")
    return table

def evaluate(policy, scorer, items, cfg, rank, ranks):
    """Score held-out noise, the same in every run. -> metrics; this rank's groups; rewards [K, P, G]"""
    P, G = math.ceil(len(items) / ranks) * ranks, max(1, 192 // len(items))
    mine = {index: items[index % len(items)] for index in range(rank, P, ranks)}
    groups = collect(policy, mine, G, cfg, "evaluation")
    table = score(scorer, groups, P, policy.device)[:, :len(items)]
    metrics = {f"eval/{name}": row.nanmean().item() for name, row in zip(scorer.weights, table)}
    metrics["eval"] = weighted(table, torch.tensor([*scorer.weights.values()])).nanmean().item()
    return metrics, groups, table

# ------------------------------------------------------------------------------------------------- the update

def estimate(policy, group, rows, advantages, cfg, iteration):
    """L_hat [B], x_theta [B, M, ...] of some of a group's images; the pairs are drawn anew from their key."""
    o = group.latents[rows]
    key = generator(cfg.seed, "pairs", iteration, group.index)
    t, eps = draw_pairs(key, policy.sigmas(), advantages[group.index], cfg.n_mc, o.shape[1:], cfg.share,
                        cfg.stratified, cfg.antithetic)
    t, eps = t[rows].to(o.device), eps[rows].to(o.device)
    z = add_noise(o[:, None], t, eps)
    v = policy.velocity(z.flatten(0, 1), t.flatten(), group.conditions)
    return surrogate(v.view_as(z), o, z, t, cfg.weight)

def update(policy, params, optimizer, ema, groups, advantages, cfg, iteration):
    """A gradient step on each batch of whole groups. -> tables [P, G] of all images, mean gradient norm"""
    parts, size = chunks(cfg.group_size, cfg), len(groups) // cfg.updates
    stats = torch.zeros(4, *advantages.shape, dtype=torch.float64)
    old, norms = {}, []
    with torch.no_grad():                                          # theta_old: before the first step
        for group, rows in [(group, rows) for group in groups[size:] for rows in parts]:
            old[group.index, rows.start] = estimate(policy, group, rows, advantages, cfg, iteration)
    for first in range(0, len(groups), size):
        batch = [(group, rows) for group in groups[first:first + size] for rows in parts]
        for group, rows in tqdm(batch, "update", delay=10, leave=False):
            L, x = estimate(policy, group, rows, advantages, cfg, iteration)
            # In the first batch theta is theta_old: sg(L) is exact, the KL is 0 and so is its gradient.
            L_old, x_old = old.get((group.index, rows.start), (L.detach(), x.detach()))
            A = advantages[group.index, rows].to(L.device)
            loss, ratio, kl = vgrpo_loss(L, L_old, x, x_old, A, cfg.clip, cfg.kl)
            (loss.sum() / (size * cfg.group_size)).backward()
            stats[:, group.index, rows] = torch.stack([loss, ratio, kl, L]).detach().cpu().double()
        for p in params:
            if dist.is_initialized() and not isinstance(p, DTensor):            # FSDP2 has averaged its own
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # as in Qwen's last block
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        norms.append(whole(nn.utils.clip_grad_norm_(params, cfg.grad_norm or math.inf)).item())
        if not math.isfinite(norms[-1]):
            raise RunError(f"iteration {iteration}: the gradient's norm is {norms[-1]}, stopped before the "
                           "step; try a lower --lr, a smaller --clip or --dtype fp32")
        optimizer.step()
        optimizer.zero_grad()
        ema.step(params)
    stats = sum_over_ranks(stats, policy.device)
    return dict(zip(("loss", "ratio", "kl", "surrogate"), stats)), sum(norms) / len(norms)

# ------------------------------------------------------------------------------------ logging and checkpoints

def start_log(out, cfg, iteration):
    """Write config.json and cut metrics.jsonl to `iteration`, each by a rename. -> log(dict)"""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tqdm.write(f"{out}: {cfg.model} with recipe {cfg.recipe}, {os.environ.get('WORLD_SIZE', 1)} x {card}")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    versions = {name: sys.modules[name].__version__ for name in ("torch", "diffusers", "transformers")}
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
    config = json.dumps(dict(flags=asdict(cfg), versions=versions, commit=commit), indent=2)
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() and iteration else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
    for name, text in (("config.json", config), ("metrics.jsonl", "".join(kept))):
        (out / "partial").write_text(text)
        (out / "partial").rename(out / name)
    trackers = []                                                  # a folder of that name has no origin
    wandb, tensorboard = (getattr(find_spec(name), "origin", None) for name in ("wandb", "tensorboard"))
    if wandb and os.environ.get("WANDB_PROJECT"):                  # it asks for a login: only where wanted
        import wandb
        key = str(out.resolve()).replace("/", "-")[-64:]
        trackers.append(wandb.init(dir=out, name=out.name, id=key, resume="allow", config=asdict(cfg)).log)
    if tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out, purge_step=iteration + 1)
        trackers.append(lambda line: [board.add_scalar(*item, line["iteration"]) for item in line.items()])

    def log(values):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")
        for tell in trackers:
            tell(values)

    return log

def save_grid(path, groups, table):
    """A labelled contact sheet: the first image of each group, then the second, 24 in all, six in a row."""
    from PIL import Image, ImageDraw
    tiles = [(group, i) for i in range(len(groups[0].images)) for group in groups][:24]
    side = min(max(groups[0].images.shape[-1], 144), 256)
    sheet = Image.new("RGB", (6 * (side + 8), math.ceil(len(tiles) / 6) * (side + 24)), "white")
    for n, (group, i) in enumerate(tiles):
        x, y = n % 6 * (side + 8) + 4, n // 6 * (side + 24) + 4
        picture = Image.fromarray(group.images[i].permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((side, side), Image.BOX), (x, y))
        label = f"{table[0, group.index, i]:.2f} {group.item['prompt']}"
        ImageDraw.Draw(sheet).text((x, y + side + 2), label[:side // 6], fill="black")
    sheet.save(path)

def save_checkpoint(out, iteration, state, transformer, cfg):
    """checkpoints/000010: written under another name, flushed, renamed; the last two stay."""
    final = out / "checkpoints" / f"{iteration:06d}"
    partial = final.with_name("partial")
    if MAIN:
        shutil.rmtree(partial, ignore_errors=True)                 # of a run that was killed
    for name, weights in state.items():
        save_weights(partial / name, weights, transformer, cfg)
    if MAIN:
        for path in partial.rglob("*.safetensors"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.rename(final)
        for folder in sorted(final.parent.glob("[0-9]" * 6))[:-2]:
            shutil.rmtree(folder)

# --------------------------------------------------------------------------------------------------- the loop

def restore(trainable, folder, done, cfg):
    """-> optimizer, EMA, and state {folder: {name: tensor}}, a checkpoint's, as after `done` iterations."""
    from diffusers.training_utils import EMAModel
    if cfg.lora and not folder:
        load_weights(Path(cfg.lora), trainable, cfg, "--lora")
    averaged = trainable if cfg.ema else {}
    ema = EMAModel(averaged.values(), decay=cfg.ema)               # at step s > 1: min(ema, s / (9 + s))
    ema.optimization_step = done * cfg.updates
    optimizer = torch.optim.AdamW(trainable.values(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    shadow = {"ema": dict(zip(averaged, ema.shadow_params))} if cfg.ema else {}
    state = {"": trainable, **shadow, "exp_avg": {}, "exp_avg_sq": {}}
    for name, p in trainable.items():
        optimizer.state[p]["step"] = torch.tensor(float(ema.optimization_step))
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[p][key] = state[key][name] = torch.zeros_like(p)
    if folder:
        for name, weights in state.items():
            load_weights(folder / name, weights, cfg, "--resume")
    return optimizer, ema, state

def improve(policy, params, optimizer, ema, scorer, items, cfg, iteration):
    """One iteration of Algorithm 1 on {index: item}, this rank's share. -> its line of metrics.jsonl"""
    clock = [time.perf_counter()]
    groups = collect(policy, items, cfg.group_size, cfg, cfg.seed, "noise", iteration)
    clock.append(time.perf_counter())
    table = score(scorer, groups, cfg.prompts_per_iteration, policy.device)
    weights = torch.tensor([*scorer.weights.values()])
    advantages = soft_clip(combine_rewards(table, weights, cfg.combine), cfg.soft_clip)
    clock.append(time.perf_counter())
    stats, norm = update(policy, params, optimizer, ema, groups, advantages, cfg, iteration)
    clock.append(time.perf_counter())

    total = weighted(table, weights)
    L, ratio = stats["surrogate"], stats["ratio"]
    beyond = (ratio - 1) * advantages.sign() > (cfg.clip or math.inf)
    memory = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "iteration": iteration, "reward": total.nanmean().item(),
        "reward_std": (total - total.nanmean(1, keepdim=True)).square().nanmean().sqrt().item(),
        **{f"reward/{name}": row.nanmean().item() for name, row in zip(scorer.weights, table)},
        "zero_std_groups": int((advantages == 0).all(1).sum()), "loss": stats["loss"].mean().item(),
        "ratio_mean": ratio.mean().item(), "ratio_max": ratio.max().item(),
        "clip_fraction": beyond.double().mean().item(), "kl": stats["kl"].mean().item(),
        "surrogate": L.mean().item(), "surrogate_cv": (L.std() / L.mean()).item(),
        "surrogate_group_cv": (L.std(1) / L.mean(1)).mean().item(), "grad_norm": norm,
        "lr": optimizer.param_groups[0]["lr"],
        "nfe_rollout": cfg.steps, "nfe_old": cfg.n_mc - cfg.n_mc / cfg.updates, "nfe_train": cfg.n_mc,
        **{f"seconds_{part}": b - a for part, a, b in zip(("rollout", "reward", "update"), clock, clock[1:])},
        "samples_per_second": ratio.numel() / (clock[-1] - clock[0]), "peak_memory_gb": memory / 2**30,
    }

def train(cfg):
    rank, ranks, device = start_ranks()
    indices = layout(cfg.prompts_per_iteration, cfg.updates, rank, ranks)
    out = Path(cfg.out or f"runs/{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folders = sorted((out / "checkpoints").glob("[0-9]" * 6))
    if (out / "config.json").exists() and not cfg.resume:
        raise UsageError(f"--out {out}: holds a run; continue it with --resume, or name another")
    done = int(folders[-1].name) if folders else 0
    if sum_over_ranks(torch.tensor([done]), device).item() != done * ranks:
        raise UsageError(f"--out {out}: must be on a disk that all machines share")
    train_items, eval_items = load_prompts(cfg)
    scorer = Rewards(cfg.reward, device, cfg.offload)
    eval_scorer = Rewards(cfg.eval_reward or cfg.reward, device, cfg.offload, share=scorer)
    for judge, items in ((scorer, train_items), (eval_scorer, eval_items)):
        judge.check([item["prompt"] for item in items], items)
    policy, trainable = load_policy(cfg, device)
    params = list(trainable.values())
    optimizer, ema, state = restore(trainable, folders[-1] if folders else None, done, cfg)
    log = start_log(out, cfg, done) if MAIN else lambda values: None
    caught, note = [], b"\nfinishing the iteration under way, then saving\n" if MAIN else b""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # nohup's SIGHUP is ignored, not torchrun's
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN or dist.is_initialized():
            signal.signal(number, lambda number, frame: caught.append(number) or os.write(2, note))

    def look(iteration):
        averaged = params if cfg.ema else []
        ema.store(averaged)
        ema.copy_to(averaged)
        metrics, groups, table = evaluate(policy, eval_scorer, eval_items, cfg, rank, ranks)
        ema.restore(averaged)
        log({"iteration": iteration, **metrics})
        if MAIN:
            save_grid(out / "samples" / f"{iteration:06d}.png", groups, table)
            tqdm.write(f"iteration {iteration}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))

    if done in (0, cfg.iterations):                                # a finished run can be evaluated anew
        look(done)
    bar = tqdm(range(done + 1, cfg.iterations + 1), initial=done, total=cfg.iterations)
    for iteration in bar:
        items = {index: pick(train_items, cfg, iteration, index) for index in indices}
        metrics = improve(policy, params, optimizer, ema, scorer, items, cfg, iteration)
        log(metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        stop = sum_over_ranks(torch.tensor([len(caught)]), device).item()
        last = iteration == cfg.iterations
        if iteration % cfg.eval_every == 0 or last:
            look(iteration)
        if iteration % cfg.save_every == 0 or last or stop:
            save_checkpoint(out, iteration, state, policy.transformer, cfg)
        if stop:
            return 128 + (caught or [signal.SIGTERM])[0]
    if MAIN:
        print(f"done: {out}")

def main(argv=None):
    known = (UsageError, RunError, OSError, SafetensorError, torch.OutOfMemoryError)
    try:
        code = train(parse_config(argv))
        if dist.is_initialized():
            dist.barrier()                                         # leave together: gloo may abort one alone
            dist.destroy_process_group()
    except Exception as error:
        lost = dist.is_initialized() and re.search("gloo|nccl", str(error), re.I)
        if not lost and not isinstance(error, known):
            raise                                                  # a fault of this file: its whole traceback
        if lost:
            error = (f"rank {dist.get_rank()} lost another rank, whose message tells why; go on with "
                     f"--resume ({' '.join(str(error).split())[:300]})")
        if isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)          # mostly the first rank says the same, and torchrun ends this one meanwhile
        print(f"\nvgrpo.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    if code:
        sys.exit(code)

if __name__ == "__main__":
    main()
