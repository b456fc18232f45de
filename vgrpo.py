"""V-GRPO: online reinforcement learning of text-to-image models, in one file (arXiv 2604.23380).

The method. Generate a group of G images of a prompt c with any ODE sampler and score them. The
advantage A of an image says how many standard deviations its reward lies above its group's mean.
GRPO raises the likelihood of images with A > 0 and lowers that of the others, but a denoising model
has no tractable likelihood. V-GRPO puts the model's own training loss in its place: noise the final
image o with M pairs of a timestep t and a noise eps, let the network denoise it, and take the mean
error, L_hat. The importance ratio is rho = exp(L_hat(theta_old) - L_hat(theta)), the objective
GRPO's clipped one. Three things keep L_hat quiet: pairs that a group shares, one timestep from each
of M strata, errors relative to their own size. Three bound the step: a clip of rho, a KL to
theta_old, a soft clip of A.

    prompt -- pipeline, any ODE solver --> o -- VAE --> image -- rewards --> R --> A
                                           |                                       |
              t, eps -------------------> z_t -- network --> x_theta --> L_hat --> rho A --> step

    python vgrpo.py                                              # the tiny model, minutes, no GPU
    torchrun --nproc_per_node=8 vgrpo.py --model sd3.5-medium    # the paper's stage 1

Symbols. t = 0 is data, t = 1 noise: z_t = (1 - t) o + t eps. The network predicts the velocity
v = eps - o, so x_theta = z_t - t v_theta is its guess of o. P prompts per iteration, G images per
group, M = N_MC pairs per image, K rewards, B rows of a batch; [...] a latent's own axes.

Where this file departs from the paper:
 1. Antithetic noise is on: neighbouring strata take eps and -eps (--no-antithetic: the paper's).
    --share matched is ours too; of the recipes, tiny, mini and sd3.5-fast do.
 2. Where M does not divide the sampler's steps, a step between two strata belongs to both in part.
 3. The adaptive weight's denominator has a floor of 1e-5. A group's std divides by G, not G - 1.
    A group of equal rewards and an image without a score get A = 0. Several rewards: A is the
    weighted mean of their advantages, so its std is below 1.
 4. The first gradient step of an iteration is at theta_old, where L_hat(theta_old) is sg(L_hat):
    it needs no pass of its own. With --updates U each step takes P/U whole groups.
 5. Eq. 14 prints a sum of squares over the latent; here it is a mean, as in the paper's code.
    Eq. 16 prints a squared norm, a sum over a latent's d numbers; here it is a mean, so --kl .3 is
    a printed beta of .3 / d. Which of the two the paper's code has is unknown.
 6. Guidance in two passes takes part in sampling only: the prompt's own pass is what trains.
As in the paper, t is a step of the sampler's grid: L_hat's target is a mean over the steps, not an
integral over t, and --solver and --steps change it.
"""
import hashlib
import inspect
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from extras.command_line import explain, failure, quiet_libraries, read_flags, watch_signals
from extras.pipelines import (first_row, guidance_options, image_axes, make_scheduler,
                              network_input, network_time, recomputed, repeat_row, size_options)
from extras.prompts import load_prompts
from extras.recipes import GET_MODEL, MODELS, OPTIONS
from extras.run_folder import metrics_of, save_grid, start_log
from extras.weights import add_lora, load_lora, write_weights
from rewards import Rewards, RunError, UsageError, one_line, visiting

@dataclass(frozen=True)
class Config:
    """Every flag. The defaults are the paper's stage 1; recipes (extras/recipes.py) go over them"""
    model: str = "tiny"              # a short name (see MODELS), a hub id, or a pipeline's folder
    recipe: str = ""                 # tiny, mini, sd3.5-s1 ... -s5, -fast, flux (default: by model)
    reward: str = "shapes"           # NAME[@FOLDER][=NUMBER],... or FILE.py:NAME (see rewards.py)
    eval_reward: str = ""            # rewards of the evaluation (default: --reward)
    prompts: str = "shapes"          # FILE.txt, .jsonl, or shapes, mini, pickscore, geneval, ocr
    eval_prompts: str = ""           # prompts of the evaluation (default: what --prompts holds out)
    lora: str = ""                   # start from these LoRA weights (an earlier stage's checkpoint)
    iterations: int = 150            # rollout-and-update rounds
    prompts_per_iteration: int = 48  # P, over all ranks
    group_size: int = 24             # G, images per prompt
    updates: int = 1                 # gradient steps per iteration, each on P / updates groups
    steps: int = 40                  # sampler steps
    solver: str = "dpm++"            # euler or dpm++ (DPM-Solver++, second order)
    guidance: float = 0.0            # scale, embedded or of two passes (see README), 0 = off
    resolution: str = ""             # SIDE or WIDTHxHEIGHT in pixels (default: the pipeline's)
    frames: int = 0                  # of a video, 0 = the pipeline's own number
    n_mc: int = 4                    # M, timestep-noise pairs per image
    share: str = "both"              # pairs of a group: both, timestep, noise, none, batch, matched
    stratified: bool = True          # one timestep from each of M strata of the sampler's grid
    antithetic: bool = True          # neighbouring strata take eps and -eps
    weight: str = "adaptive"         # adaptive (Eq. 14), or plain squared errors of x, v, eps
    clip: float = 0.0                # e, range of the ratio clip, 0 = off
    kl: float = 0.0                  # beta of the simple KL to theta_old (Eq. 16), 0 = off
    soft_clip: float = 3.0           # eta of the soft clip of advantages (Eq. 17), 0 = off
    lr: float = 3e-4                 # AdamW's learning rate
    weight_decay: float = 1e-4       # AdamW's weight decay
    grad_norm: float = 1.0           # clip of the gradient's norm, 0 = off
    lora_rank: int = 32              # rank of the LoRA, 0 = train all weights
    lora_alpha: float = 64.0         # the LoRA adds alpha / rank * B A x
    ema: float = 0.9                 # decay of the averaged weights that are evaluated, 0 = off
    micro_batch: int = 0             # images (of M rows) per network call of an update, 0 = a group
    dtype: str = "fp32"              # of frozen weights and the network's arithmetic: fp32 or bf16
    checkpointing: bool = False      # recompute activations in the backward pass
    compile: bool = False            # torch.compile of the transformer's blocks
    shard: bool = False              # FSDP2: a rank holds its part of the transformer's weights
    offload: bool = False            # text encoders and rewards wait on the CPU between uses
    seed: int = 0                    # of everything that is drawn
    out: str = ""                    # run folder (default: runs/MODEL-TIME)
    resume: str = ""                 # run folder to continue; without a value: that of --out
    eval_every: int = 10             # iterations between evaluations
    save_every: int = 10             # iterations between checkpoints

# ------------------------------------------------------------------------------------- the paper
# Functions of tensors alone: fp32, whatever the network computes in; rewards are averaged in fp64.

def add_noise(o, t, eps):
    """z_t = (1 - t) o + t eps.  o [B, 1, ...], t [B, M], eps [B, M, ...] -> z [B, M, ...]"""
    t = t.reshape(*t.shape, *[1] * (eps.ndim - t.ndim))
    return (1 - t) * o + t * eps

def draw_pairs(rng, grid, M, shape, stratified=True, antithetic=True):
    """A set of M pairs; the paper's has antithetic=False. group_pairs() shares it out.
    grid [n], the timesteps of the sampler, all > 0 -> t [M] of them, eps [M, *shape]"""
    u = torch.rand(M, generator=rng)
    if stratified:
        u = (torch.arange(M) + u) / M                     # one u in each stratum [j/M, (j+1)/M)
    t = grid[(u * len(grid)).long().clamp(max=len(grid) - 1)]
    eps = torch.randn(M, *shape, generator=rng)
    if antithetic:
        eps[1::2] = -eps[0:M - M % 2:2]                   # an odd last pair keeps its own noise
    return t, eps

def group_pairs(rng, grid, M, shape, advantages, share="both", stratified=True, antithetic=True):
    """The pairs of each image of a group.  advantages [G] -> t [G, M], eps [G, M, *shape]
    "both": one set per group, as the paper says; "batch": one for all groups, as its code does (the
    caller gives each group the same rng); "timestep", "noise": only those are shared; "none".
    "matched", ours: the best image shares with the worst, the second best with the second worst.
    Their A have opposite signs, so what the two have in common cancels in the gradient, as in a
    whole group that shares, and the noise of the pairs averages over G / 2 sets in place of one."""
    G = len(advantages)
    sets = 1 if share in ("both", "batch") else G
    draws = [draw_pairs(rng, grid, M, shape, stratified, antithetic) for _ in range(sets)]
    t, eps = torch.stack([t for t, _ in draws]), torch.stack([eps for _, eps in draws])
    if share in ("both", "batch", "timestep"):
        t = t[:1].expand(G, -1)
    if share in ("both", "batch", "noise"):
        eps = eps[:1].expand(G, *eps.shape[1:])
    if share == "matched":
        place = advantages.argsort(stable=True).argsort()             # 0 is the worst image's
        which = torch.minimum(place, G - 1 - place)                   # by place: 0 1 2 2 1 0
        t, eps = t[which], eps[which]
    return t, eps

def surrogate(v, o, z, t, weight="adaptive"):
    """L_hat = 1/M sum_j l(t_j, eps_j), which stands for -log pi(o | c). Eq. 14 ("adaptive"):
    l = mean (x_theta - o)^2 / sg(mean |x_theta - o|), means over the latent's numbers.
    v_theta(z_t, t, c) and z [B, M, ...], o [B, ...], t [B, M] -> L_hat [B], x_theta [B, M, ...]"""
    t = t.reshape(*t.shape, *[1] * (z.ndim - 2))
    x = z - t * v
    error = x - o[:, None]                                # of the x-prediction
    if weight == "v":
        error = error / t                                 # = (eps - o) - v_theta
    if weight == "eps":
        error = error * (1 - t) / t                       # = eps - eps_theta
    error = error.flatten(2)
    loss = error.square().mean(2)                         # [B, M], a mean over the latent
    if weight == "adaptive":
        # detach: the paper's sg. The size is held in the gradient, but new at the next theta: where
        # errors grow by 1 %, the gradient predicts 2 % for L, and L grows by 1 %. So rho moves half
        # as far as predicted, and --clip e allows what looks like 2 e.
        size = error.detach().abs().mean(2)
        loss = loss / size.clamp(min=1e-5)
    return loss.mean(1), x

def group_advantages(rewards):
    """A_i = (R_i - mean) / std within each group.  rewards [K, P, G] -> A [K, P, G]
    An image without a score (NaN) is in no mean and gets 0. So does a group of equal rewards: equal
    to five digits, since what differs beyond is the rounding of the network that scored them."""
    rewards = rewards.double()
    mean = rewards.nanmean(-1, keepdim=True)
    std = (rewards - mean).square().nanmean(-1, keepdim=True).sqrt()
    equal = std <= 1e-5 * rewards.abs().nan_to_num().amax(-1, keepdim=True)
    return torch.where(equal, 0.0, (rewards - mean) / std).nan_to_num().float()

def weighted_mean(values, weights):
    """[K, P, G] by weights [K] -> [P, G]. A reward of weight 0 has no part: it is only reported."""
    used = weights > 0
    shares = weights[used] / weights.sum()
    return (shares[:, None, None] * values[used]).sum(0)

def soft_clip(advantages, eta):
    """Eq. 17: A_soft = eta tanh(A / eta); eta = 0 leaves A as it is."""
    return eta * torch.tanh(advantages / eta) if eta else advantages

def clipped_objective(L, L_old, advantages, clip=0.0):
    """-min(rho A, clip(rho, 1 - e, 1 + e) A), to be minimised, where rho = exp(L_old - L).
    The mean over the pairs came before the exponential.  all [B] -> loss [B], rho [B]"""
    ratio = torch.exp(L_old - L)
    bounded = ratio.clamp(1 - clip, 1 + clip) if clip else ratio
    return -torch.minimum(ratio * advantages, bounded * advantages), ratio

def simple_kl(x, x_old):
    """Eq. 16 without beta: mean (x_theta - x_theta_old)^2, pairs and latent.  [B, M, ...] -> [B]"""
    return (x - x_old).square().flatten(2).mean(2).mean(1)

# ----------------------------------------------------------------------------------- the rollout

@dataclass(frozen=True)
class Group:
    """G images of one prompt, as theta_old drew them."""
    index: int                # among the groups of all ranks: the key of its randomness
    item: dict                # the prompt and its metadata
    images: torch.Tensor      # [G, 3, H, W] uint8, on the CPU
    latents: torch.Tensor     # o [G, ...]
    conditions: "Conditions"  # c

def slices(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]

def collect(policy, items, G, cfg, *key):
    """Generate a group for each of {index: item}, every image from noise of its own."""
    groups = []
    at_once = (cfg.micro_batch or cfg.group_size) * cfg.n_mc     # as many rows as an update's call
    for index, item in tqdm(items.items(), "images", delay=10, leave=False, disable=not is_main()):
        noise = [generator(*key, index, image) for image in range(G)]
        calls = [policy.generate(item["prompt"], noise[part]) for part in slices(G, at_once)]
        images, latents, conditions = zip(*calls)
        groups.append(Group(index, item, torch.cat(images), torch.cat(latents), conditions[0]))
    return groups

def score(scorer, groups):
    """-> rewards [K, P, G] fp64 of the groups of all ranks; NaN where an image has no score"""
    items = [group.item for group in groups for _ in group.images]
    images = torch.cat([group.images for group in groups])
    scores = scorer(images, [item["prompt"] for item in items], items)
    table = torch.stack(list(scores.values())).double().view(len(scores), len(groups), -1)
    rewards = gather_rows({group.index: table[:, i] for i, group in enumerate(groups)})
    rewards = rewards.transpose(0, 1)                     # was [P, K, G]
    for (name, weight), row in zip(scorer.weights.items(), rewards):
        if weight and row.isnan().all():
            raise RunError(f"--reward {name}: it could not score any image")
    return rewards

# ------------------------------------------------------------------------------------ the update

@dataclass(frozen=True)
class Learner:
    """What training changes."""
    policy: "Policy"
    trainable: dict           # {name: parameter}
    optimizer: torch.optim.Optimizer
    ema: EMAModel

def estimate(policy, group, images, pairs, cfg):
    """L_hat [B] and x_theta [B, M, ...] of a slice of a group's images, on their pairs."""
    o = group.latents[images]
    t, eps = (part[images].to(o.device) for part in pairs)
    z = add_noise(o[:, None], t, eps)
    v = policy.velocity(z.flatten(0, 1), t.flatten(), group.conditions)
    return surrogate(v.view_as(z), o, z, t, cfg.weight)

@torch.no_grad()
def old_estimates(policy, parts, pairs, cfg):
    """{(group's index, first image): (L_hat, x_theta)} of theta_old; x_theta only for the KL."""
    old = {}
    for group, images in parts:
        L, x = estimate(policy, group, images, pairs[group.index], cfg)
        old[group.index, images.start] = (L, x if cfg.kl else None)
    return old

def update(learner, groups, advantages, pairs, cfg):
    """Gradient steps, each on a batch of whole groups.  advantages [P, G] of all ranks' groups,
    pairs {group's index: (t, eps)} of this rank's -> {name: [P, G] of all, or a number}"""
    parts = slices(cfg.group_size, cfg.micro_batch or cfg.group_size)
    batches = [[(group, images) for group in groups[batch] for images in parts]
               for batch in slices(len(groups), len(groups) // cfg.updates)]
    # The first batch meets theta_old itself, below; the others need its estimates.
    old = old_estimates(learner.policy, sum(batches[1:], []), pairs, cfg)
    stats, norms = {}, []
    for batch in batches:
        count = sum(images.stop - images.start for _, images in batch)
        for group, images in tqdm(batch, "update", delay=10, leave=False, disable=not is_main()):
            L, x = estimate(learner.policy, group, images, pairs[group.index], cfg)
            if batch is batches[0]:                       # theta is theta_old still: L_old = sg(L)
                L_old, x_old = L.detach(), x.detach()
            else:
                L_old, x_old = old[group.index, images.start]
            A = advantages[group.index, images].to(L.device)
            loss, ratio = clipped_objective(L, L_old, A, cfg.clip)
            kl = simple_kl(x, x_old) if cfg.kl else torch.zeros_like(L)
            loss = loss + cfg.kl * kl
            (loss.sum() / count).backward()               # of this rank; ranks are averaged
            stats.setdefault(group.index, []).append(torch.stack([loss, ratio, kl, L]).detach())
        norms.append(gradient_step(learner, cfg))
    rows = {index: torch.cat(values, 1).double().cpu() for index, values in stats.items()}
    table = gather_rows(rows)
    lr = learner.optimizer.param_groups[0]["lr"]
    return {**dict(zip(("loss", "ratio", "kl", "surrogate"), table.transpose(0, 1))),
            "grad_norm": sum(norms) / len(norms), "lr": lr}

def gradient_step(learner, cfg):
    """Average the gradients over the ranks, clip their norm, step.  -> the norm"""
    params = list(learner.trainable.values())
    for p in params:
        if p.grad is None:                                # some last blocks have unused weights
            p.grad = torch.zeros_like(p)
        if dist.is_initialized() and not isinstance(p, DTensor):      # FSDP2 has averaged its own
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    norm = whole(nn.utils.clip_grad_norm_(params, cfg.grad_norm or math.inf)).item()
    if not math.isfinite(norm):
        raise RunError(f"the gradient's norm is {norm}: stopped before the step; try a lower --lr, "
                       "a smaller --clip or --dtype fp32")
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    learner.ema.step(params)
    return norm

# --------------------------------------------------------------------- one iteration, and the loop

def run_iteration(learner, scorer, items, cfg, iteration):
    """Algorithm 1, for this rank's {group's index: item}.  -> the iteration's metrics"""
    clock = [time.perf_counter()]
    # 1. theta_old <- theta. Nothing is copied: its L_hat and x are computed before the first step.
    # 2. For each prompt, generate G outputs with theta_old, by an ODE solver.
    groups = collect(learner.policy, items, cfg.group_size, cfg, cfg.seed, "noise", iteration)
    clock.append(time.perf_counter())

    # 3. Score them; A_i = (R_i - mean) / std within the group; soft clip.
    rewards = score(scorer, groups)
    weights = torch.tensor(list(scorer.weights.values())).double()
    advantages = weighted_mean(group_advantages(rewards), weights).float()
    advantages = soft_clip(advantages, cfg.soft_clip)
    clock.append(time.perf_counter())

    # 4. Draw the timestep-noise pairs. (In the paper before the rewards; "matched" needs A.)
    pairs = {}
    for group in groups:
        of = "all groups" if cfg.share == "batch" else group.index
        pairs[group.index] = group_pairs(
            generator(cfg.seed, "pairs", iteration, of), group.conditions.grid, cfg.n_mc,
            group.latents.shape[1:], advantages[group.index],
            cfg.share, cfg.stratified, cfg.antithetic)

    # 5. Compute L_hat(theta_old). 6. Take the gradient steps.
    stats = update(learner, groups, advantages, pairs, cfg)
    clock.append(time.perf_counter())
    total = weighted_mean(rewards, weights)
    return metrics_of(cfg, scorer.weights, rewards, total, advantages, stats, clock)

@dataclass(frozen=True)
class Run:
    """What train() works with; prepare() loads it."""
    out: Path                 # the run folder
    done: int                 # iterations behind the start: 0, or the checkpoint's
    indices: list             # of this rank's groups, among those of all ranks
    train_items: list
    eval_items: list
    scorer: Rewards
    eval_scorer: Rewards
    learner: Learner
    log: object               # log(dict) writes a line of metrics

def train(run, cfg, caught):
    """The loop. A signal in `caught` ends it after the iteration under way.  -> whether one did"""
    if run.done == cfg.iterations or run.done % cfg.eval_every == 0:
        evaluate(run, cfg, run.done)
    bar = tqdm(range(run.done + 1, cfg.iterations + 1), initial=run.done, total=cfg.iterations,
               disable=not is_main())
    for iteration in bar:
        items = {i: pick_item(run.train_items, cfg, iteration, i) for i in run.indices}
        metrics = run_iteration(run.learner, run.scorer, items, cfg, iteration)
        run.log({"iteration": iteration, **metrics})
        bar.set_postfix(reward=f"{metrics['reward']:.3f}")
        last, stopped = iteration == cfg.iterations, any(gather(bool(caught)))
        if iteration % cfg.save_every == 0 or last or stopped:
            save_checkpoint(run.out, iteration, run.learner, cfg)
        if stopped:
            return True
        if iteration % cfg.eval_every == 0 or last:
            evaluate(run, cfg, iteration)
    return False

def pick_item(items, cfg, iteration, index):
    """The item of a group: every one is used once before any comes again."""
    epoch, place = divmod((iteration - 1) * cfg.prompts_per_iteration + index, len(items))
    order = torch.randperm(len(items), generator=generator(cfg.seed, "order", epoch))
    return items[order[place]]

def evaluate(run, cfg, iteration):
    """Score the held-out prompts with the averaged weights, on the same noise in every run."""
    items, (rank, ranks) = run.eval_items, rank_and_ranks()
    calls = math.ceil(len(items) / ranks) * ranks         # as many on each rank, as FSDP2 wants
    mine = {index: items[index % len(items)] for index in range(rank, calls, ranks)}
    with averaged_weights(run.learner, cfg):
        G = max(1, 192 // len(items))                     # about 192 images
        groups = collect(run.learner.policy, mine, G, cfg, "evaluation")
    rewards = score(run.eval_scorer, groups)[:, :len(items)]
    weights = torch.tensor(list(run.eval_scorer.weights.values())).double()
    metrics = {f"eval/{name}": row.nanmean().item()
               for name, row in zip(run.eval_scorer.weights, rewards)}
    metrics["eval"] = weighted_mean(rewards, weights).nanmean().item()
    run.log({"iteration": iteration, **metrics})
    say(f"iteration {iteration}: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
    if is_main():
        save_grid(run.out / "samples" / f"{iteration:06d}.png", groups, rewards)
    return rewards

# ------------------------------------------------------------------------------------ the policy
# A diffusers pipeline is pi_theta. A rollout is one call of it, diffusers' own; while it goes on,
# listen() learns from it all that training needs, so no model family has code of its own.
#
#     pipe(prompt) -> encode_prompt -> [ transformer -> scheduler.step ] x steps -> VAE -> images
#                                            |                |
#                             its arguments are c;     it is given z_t and the velocity,
#                             one of them is the time  and returns o in the last step

@dataclass(frozen=True)
class Conditions:
    """c: what the network is told for one image."""
    arguments: dict           # {name: value}, with one row of what has a row per image
    grid: torch.Tensor        # t of the sampler's steps [n], falling from 1, on the CPU
    times: torch.Tensor       # what the network is told in place of t, [n, ...]

@contextmanager
def listen(pipe, names, time_name):
    """Hear a call of the pipeline, whose network takes arguments of these names. This gives an
    object that holds, after the call,
    .calls: the network's arguments {name: value} in each of its calls of the first step,
    .times: the time it was told in each step, .grid: the sampler's t, .latents: the last;
    .told: the network's arguments in its last call,
    .sample and .velocity: z_t and what the scheduler was given for it in the last step."""
    heard, step = SimpleNamespace(calls=[], times=[]), pipe.scheduler.step

    def hear_network(network, args, kwargs, output):
        heard.told = {**dict(zip(names, args)), **kwargs}
        if not heard.times:
            heard.calls.append(heard.told)

    def hear_scheduler(velocity, t, sample, *args, **kwargs):
        heard.sample, heard.velocity = sample.clone(), velocity       # some write over z_t later
        heard.times.append(heard.told[time_name][:1])
        result = step(velocity, t, sample, *args, **kwargs)
        heard.latents = result[0]
        return result

    hook = pipe.transformer.register_forward_hook(hear_network, with_kwargs=True)
    pipe.scheduler.step = hear_scheduler
    try:
        yield heard
        heard.grid = pipe.scheduler.sigmas[:-1].float().cpu()
        if pipe.scheduler.config.get("invert_sigmas"):    # Mochi's t runs the other way
            heard.grid, heard.velocity = 1 - heard.grid, -heard.velocity
    finally:
        hook.remove()
        del pipe.scheduler.step                           # the class's is back

class Policy:
    """generate() samples with the pipeline; velocity() is its network for one prompt, to train.
    probe() finds .axes, where images lie in arguments, .sign, of the velocity, .unguided, the scale
    of one pass, .guidance, the rollout's, and .two_passes, whether that takes two."""

    def __init__(self, pipe, cfg, device, **options):
        self.pipe, self.transformer, self.device = pipe, pipe.transformer, device
        self.names = list(inspect.signature(self.transformer.forward).parameters)
        self.latent_name = self.names[0]
        self.time_name = next((name for name in self.names if re.match("timestep|t$", name)), None)
        self.accepted = inspect.signature(pipe.__call__).parameters
        self.count_name, size = size_options(self.accepted, cfg)
        self.options = {**options, **size}
        pipe.scheduler = make_scheduler(pipe.scheduler, cfg.solver)
        with one_line(UsageError, f"--model: {type(pipe).__name__} at --guidance {cfg.guidance}, "
                                  f"--resolution {cfg.resolution}, --frames {cfg.frames}"):
            self.probe(cfg.guidance)
        self.options |= {"num_inference_steps": cfg.steps, "output_type": "pt"}

    @torch.no_grad()
    def generate(self, prompt, generators):
        """Images of one prompt, each from its own generator's noise.
        -> images [B, 3, H, W] uint8 on the CPU, latents o [B, ...], conditions c"""
        images, heard = self.call(prompt, generators, self.guidance)
        told = heard.calls[0]
        if self.two_passes:                               # then c is what an unguided call is told
            told = self.call(prompt, generators[:1], self.unguided, **SHORT)[1].calls[0]
        images = (images.float() * 255).round().to(torch.uint8).cpu()
        return images, heard.latents.float(), self.conditions(told, heard)

    def call(self, prompt, generators, guidance, **options):
        with listen(self.pipe, self.names, self.time_name) as heard:
            guided = guidance_options(self.pipe, self.accepted, guidance)
            options = {**self.options, **guided, **options}
            if self.count_name:
                options[self.count_name] = len(generators)
            prompts = prompt if self.count_name else [prompt] * len(generators)
            return self.pipe(prompt=prompts, generator=generators, **options)[0], heard

    def conditions(self, told, heard):
        """c, as the network was told it: one row is enough, since the images share their prompt."""
        return Conditions(first_row(told, self.axes), heard.grid, torch.cat(heard.times))

    def velocity(self, z, t, c):
        """v_theta(z_t, t, c) in fp32.  z [N, ...], t [N] -> [N, ...]; N = B M in an update"""
        arguments = repeat_row(c.arguments, self.axes, len(z))
        arguments[self.time_name] = network_time(t.to(self.device), c.grid.to(self.device), c.times)
        heard = c.arguments[self.latent_name]
        arguments[self.latent_name] = network_input(z.to(self.device), heard)
        v = self.transformer(**arguments)[0]
        v = torch.stack(v) if isinstance(v, list) else v
        if v.numel() != z.numel():
            raise UsageError(f"its network answers {list(v.shape)} to latents {list(z.shape)}")
        return self.sign * v.float().reshape(z.shape)

    @torch.no_grad()
    def probe(self, guidance):
        """Learn from short calls how the pipeline talks to its network."""
        noise = [generator("probe", image) for image in range(3)]
        try:
            self.call("a", noise, 1.0, **SHORT)
        except (torch.OutOfMemoryError, dist.DistError):
            raise
        except RuntimeError:                              # some cannot repeat a prompt
            self.count_name = None
        for self.unguided in (1.0, 0.0):                  # 1 to most pipelines, 0 to some
            _, three = self.call("a", noise, self.unguided, **SHORT)
            if len(three.calls) == 1 and len(three.told[self.latent_name]) == 3:
                break
        else:
            raise UsageError("its network cannot be called for a prompt alone, without guidance")
        # Images lie along axes whose length follows their number, 3 in one call, 2 in another.
        _, two = self.call("a", noise[:2], self.unguided, **SHORT)
        self.axes = image_axes(three.told, two.told)
        # The scheduler is given the network's output, or its negative.
        self.sign, c = 1.0, self.conditions(two.calls[0], two)
        v = self.velocity(two.sample, two.grid[-1:].expand(2), c)
        self.sign = 1.0 if (v * two.velocity).sum() > 0 else -1.0
        distance = (self.sign * v - two.velocity).norm() / two.velocity.norm()
        if not (distance <= 1e-2 and two.grid[0] > two.grid[-1]):
            raise UsageError("it is no rectified flow: it does not step along its network's output "
                             "from t = 1 to 0")
        self.guidance = guidance or self.unguided
        _, heard = self.call("a", noise[:2], self.guidance, num_inference_steps=2, output_type="pt")
        self.two_passes = len(heard.calls) > 1 or len(heard.told[self.latent_name]) > 2
        if self.two_passes:
            say(f"--guidance {guidance}: it guides the rollout; the prompt's own pass is trained")

SHORT = {"num_inference_steps": 2, "output_type": "latent"}       # for a call that only listens

# ------------------------------------------------------------------------------------------ loading

def load_policy(cfg, device):
    """The pipeline of --model, frozen but for what trains.  -> Policy, {name: parameter} of that"""
    pipe = load_pipeline(cfg)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    networks = [name for name in parts if name.startswith(("transformer", "unet"))]
    if networks != ["transformer"] or "vae" not in parts:
        raise UsageError(f"--model {cfg.model}: must have a VAE and one transformer; it has "
                         + ", ".join(parts))
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    visitors = encoders if cfg.offload else []
    for part in parts.values():
        part.requires_grad_(False).eval()
        if part not in visitors and not (part is pipe.transformer and is_sharded(cfg)):
            part.to(device)
    if cfg.model not in OPTIONS and hasattr(pipe.vae, "enable_slicing"):
        pipe.vae.enable_slicing()                         # decode one by one; tiny ones go together
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "encode_prompt"):
        pipe.encode_prompt = remember(pipe.encode_prompt, visitors, device)
    prepare_transformer(pipe.transformer, cfg, device)
    trainable = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    return Policy(pipe, cfg, device, **OPTIONS.get(cfg.model, {})), trainable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

def model_index(cfg):
    """model_index.json. The network's config is asked for first: a gated model refuses it."""
    name = MODELS.get(cfg.model, cfg.model)
    with one_line(UsageError, f"--model {cfg.model}", f"; {GET_MODEL}"):
        diffusers.AutoModel.load_config(name, subfolder="transformer")
        return diffusers.DiffusionPipeline.load_config(name)

def load_pipeline(cfg):
    name = MODELS.get(cfg.model, cfg.model)
    # A part that a folder does not have, such as SD3's T5, has to be named.
    absent = {part: None for part, kind in model_index(cfg).items() if kind == [None, None]}
    with one_line(UsageError, f"--model {cfg.model}", f"; {GET_MODEL}"):
        if not Path(name).is_dir():
            with first_rank_first():
                diffusers.DiffusionPipeline.download(name)
        if rank_and_ranks()[1] > 1 and not diffusers.utils.is_accelerate_available():
            say("no accelerate: each rank reads the weights into host memory of its own")
        return diffusers.DiffusionPipeline.from_pretrained(
            name, dtype=DTYPES[cfg.dtype], **absent)

def prepare_transformer(transformer, cfg, device):
    """What trains, how it is computed, where it lies: no part of the method. The order matters."""
    # 1. The LoRA: sharding has to know its weights, to leave them whole.
    if cfg.lora_rank:
        add_lora(transformer, cfg, device, generator)
    else:
        transformer.requires_grad_(True)
    for part in transformer.children():
        part.train()              # HiDream's experts have no gradient in eval(); no answer changes
    # 2. The blocks. Checkpointing lies inside of compiling, and both lie inside of sharding, whose
    # gathering they leave out. diffusers' own checkpointing would drop Chroma's mask.
    lists = [part for part in transformer.children() if isinstance(part, nn.ModuleList)]
    blocks, dtype = [block for part in lists for block in part], DTYPES[cfg.dtype]
    for block in blocks:
        if cfg.checkpointing:
            block.forward = recomputed(block.forward)
        if cfg.compile:
            block.compile(recompile_limit=64)             # for kinds of block, shapes, grad or not
    if is_sharded(cfg):
        shard(transformer, blocks, dtype)
    # 3. Weights that train are fp32; after sharding, a rank converts its own part only. FSDP2 and a
    # LoRA's frozen layers compute in --dtype by themselves, else autocast has to.
    if not cfg.lora_rank:
        transformer.float()
        if cfg.dtype != "fp32" and not is_sharded(cfg):
            transformer.forward = torch.autocast(device.type, dtype)(transformer.forward)

def shard(transformer, blocks, dtype):
    """FSDP2: a block's weights are gathered while it is computed. A LoRA stays whole, in fp32."""
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    lora = {p for name, p in transformer.named_parameters() if "lora_" in name}
    name = type(transformer).__name__
    for module in (*blocks, transformer):
        # Resharded always: else the root keeps what it gathered, and misses the averaged weights.
        fully_shard(module, reshard_after_forward=True, mp_policy=policy, ignored_params=lora)
    type(transformer).__name__ = name                     # FSDP2 renames it; config.json names it

def remember(encode, visitors, device):
    """encode_prompt, remembering 32 prompts: a group's calls repeat theirs, and so do evaluations.
    Text encoders that wait on the CPU (visitors) come to the device for a new prompt."""
    known = {}

    def encode_prompt(*args, **kwargs):
        key = repr((args, sorted(kwargs.items())))
        if key not in known or "tensor(" in key:          # two tensors may look the same
            if len(known) == 32:
                del known[next(iter(known))]              # the oldest
            with visiting(visitors, device):
                known[key] = encode(*args, **kwargs)
        return known[key]

    return encode_prompt

# -------------------------------------------------------------------------------------- checkpoints
# checkpoints/000010 holds the weights as diffusers loads them, the averaged ones in ema/, and in
# resume/ what a run needs to go on, which all ranks write and read in parallel.

def start_learner(policy, trainable, cfg, folder=None):
    """AdamW and the averaged weights, new or as the checkpoint in the folder has them."""
    params = list(trainable.values())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    if cfg.lora and not folder:
        load_lora(cfg.lora, trainable, cfg)
    ema = EMAModel(params if cfg.ema else [], decay=cfg.ema)  # s steps: min(ema, s / (s + 9))
    learner = Learner(policy, trainable, optimizer, ema)
    if folder:
        try:
            dcp.load(resume_state(learner), checkpoint_id=folder / "resume")
        except CheckpointException as error:
            raise UsageError(f"--resume: {folder} cannot be loaded: {failure(error)}; is it of "
                             "another --model, --lora-rank or --ema?") from None
        ema.optimization_step = int(optimizer.state[params[0]]["step"])
    return learner

def resume_state(learner):
    """What a run needs to go on, by name; loading fills these tensors in place."""
    adam = get_optimizer_state_dict(learner.policy.transformer, learner.optimizer)
    return {"weights": learner.trainable, "adam": adam["state"],
            "averaged": dict(zip(learner.trainable, learner.ema.shadow_params))}

def save_checkpoint(out, iteration, learner, cfg):
    """Write under another name, then rename: what is there is whole. The last two stay."""
    final = out / "checkpoints" / f"{iteration:06d}"
    unfinished, state = final.with_name("partial"), resume_state(learner)
    if is_main():
        shutil.rmtree(unfinished, ignore_errors=True)     # of a run that was killed
    export_weights(unfinished, state["weights"], learner.policy.transformer, cfg)
    if cfg.ema:
        export_weights(unfinished / "ema", state["averaged"], learner.policy.transformer, cfg)
    dcp.save(state, checkpoint_id=unfinished / "resume")
    if is_main():
        unfinished.rename(final)
        for folder in sorted(final.parent.glob("[0-9]" * 6))[:-2]:
            shutil.rmtree(folder, ignore_errors=True)

def export_weights(folder, weights, transformer, cfg):
    """Write {name: tensor} as diffusers loads it: a LoRA's file, or a transformer's folder."""
    if not cfg.lora_rank:
        weights = {**transformer.state_dict(), **weights}          # its buffers too
    whole_weights = {}
    for name, value in weights.items():
        value = whole(value.detach())                     # all ranks take part, the first keeps it
        if is_main():
            whole_weights[name] = value.cpu().contiguous()
    if is_main():
        write_weights(folder, whole_weights, transformer, cfg)

@contextmanager
def averaged_weights(learner, cfg):
    """The averaged weights in the network's place, if there are any."""
    params = list(learner.trainable.values()) if cfg.ema else []
    learner.ema.store(params)
    learner.ema.copy_to(params)
    try:
        yield
    finally:
        learner.ema.restore(params)

# ------------------------------------------------------------------------- ranks and random numbers
# Whole groups are spread over the ranks. What is drawn does not depend on the rank, so the same
# flags give the same numbers on any number of them.

def start_ranks():
    """Join torchrun's process group, if there is one.  -> this rank's device"""
    launched, cards = "RANK" in os.environ, torch.cuda.device_count()
    local, device = int(os.environ.get("LOCAL_RANK", 0)), torch.device("cpu")
    if cards:
        if local >= cards > 1:
            raise UsageError(f"--nproc_per_node: this machine has {cards} GPUs")
        device = torch.device("cuda", local if cards > 1 else 0)   # the launcher may show one
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True      # for what is left in fp32
    elif launched and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise UsageError(f"torch for CUDA {torch.version.cuda} sees no GPU: is the driver too old? "
                         "CUDA_VISIBLE_DEVICES= trains on CPUs")
    if launched and not dist.is_initialized():
        backend, bound = ("nccl", device) if cards else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=3), device_id=bound)
    return device

def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def is_main():
    return rank_and_ranks()[0] == 0                       # the rank that prints and writes

def say(text):
    if is_main():
        tqdm.write(text)

@contextmanager
def first_rank_first():
    """The first rank of a machine downloads; the others wait, and find what it brought."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and first:
            dist.barrier()

def gather(value):
    """The values of all ranks, in a list."""
    values = [value] * rank_and_ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def is_sharded(cfg):
    return cfg.shard and dist.is_initialized()

def layout(P, updates):
    """The indices of this rank's groups, in the order of the gradient steps. A step has the same
    groups on any number of ranks."""
    rank, ranks = rank_and_ranks()
    unit, (share, rest) = updates * ranks, divmod(P, updates * ranks)
    if rest:
        fitting = " or ".join(str(n) for n in (P - rest, P - rest + unit) if n)
        raise UsageError(f"--prompts-per-iteration {P}: {ranks} rank(s) x {updates} --updates need "
                         f"a multiple of {unit}, such as {fitting}")
    return [step * P // updates + rank * share + i for step in range(updates) for i in range(share)]

def generator(*key):
    """All randomness: a generator that depends on its key alone, never on rank or history."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

def gather_rows(rows):
    """{group's index: tensor on the CPU} of all ranks -> their tensors, stacked by index"""
    table = {index: row for part in gather(rows) for index, row in part.items()}
    return torch.stack([table[index] for index in sorted(table)])

def whole(tensor):
    """A sharded tensor, gathered: every rank must ask for it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

# --------------------------------------------------------------------------------------------- main

def parse_config(argv=None):
    return read_flags(Config, __doc__, argv)

def prepare(cfg, device):
    """Load what train() works with: run folder, prompts, rewards, model, checkpoint."""
    rank, ranks = rank_and_ranks()
    indices = layout(cfg.prompts_per_iteration, cfg.updates)
    name = f"runs/{Path(cfg.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(gather(cfg.out or name)[0])                # clocks of ranks may differ
    if (out / "config.json").exists() and not cfg.resume:
        raise UsageError(f"--out {out}: holds a run; continue it with --resume, or name another")
    checkpoints = [None, *sorted((out / "checkpoints").glob("[0-9]" * 6))]
    done = int(checkpoints[-1].name) if checkpoints[-1] else 0
    if len(set(gather(done))) > 1:
        raise UsageError(f"--out {out}: must be on a disk that all machines share")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(f"{out}: {cfg.model} with recipe {cfg.recipe}, {ranks} x {card}")
    model_index(cfg)                                      # fails now if it is gated or missing
    say(f"loading prompts {cfg.prompts}, rewards {cfg.reward}")
    with first_rank_first():
        train_items, eval_items = load_prompts(cfg, generator("held out"))
        scorers = [Rewards(cfg.reward, device, cfg.offload),
                   Rewards(cfg.eval_reward or cfg.reward, device, cfg.offload, "--eval-reward")]
    for scorer, items in zip(scorers, (train_items, eval_items)):
        scorer.check([item["prompt"] for item in items], items)
    say(f"loading model {MODELS.get(cfg.model, cfg.model)}")
    policy, trainable = load_policy(cfg, device)
    learner = start_learner(policy, trainable, cfg, checkpoints[-1])
    evaluations = cfg.steps + cfg.n_mc * (2 - 1 / cfg.updates)
    copies = 6 if cfg.ema else 4              # for diffusers 1 or 2; weights, Adam's two, averaged
    disk = copies * sum(p.numel() for p in trainable.values()) * 4 / 2**30
    say(f"an iteration takes {cfg.prompts_per_iteration} x {cfg.group_size} images of "
        f"{evaluations:g} network evaluations, a checkpoint {disk:.2g} GB")
    log = start_log(out, cfg, done) if rank == 0 else lambda values: None
    return Run(out, done, indices, train_items, eval_items, *scorers, learner, log)

def main(argv=None):
    caught, stopped = [], False
    try:
        cfg = parse_config(argv)
        device = start_ranks()
        quiet_libraries(is_main())
        run = prepare(cfg, device)
        caught = watch_signals()
        stopped = train(run, cfg, caught)
        say(f"{'stopped' if stopped else 'done'}: {run.out}; to look at it: "
            f"python -m extras.report {run.out}")
        if dist.is_initialized():
            dist.barrier()                                # leave together: gloo may abort one alone
            dist.destroy_process_group()
    except KeyboardInterrupt:                             # while it loads
        sys.exit(130)
    except (Exception, CheckpointException) as error:
        sys.exit(explain(error))
    if stopped:
        sys.exit(128 + (caught or [signal.SIGTERM])[0])

if __name__ == "__main__":
    main()
