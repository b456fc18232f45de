"""V-GRPO's rivals on the same model, rewards, prompts and seeds, to be laid beside it.

    python -m extras.rivals --method nft                                # as published
    python -m extras.rivals --method awm --updates 4 --timesteps 4      # more steps, fewer pairs

A method is one function: its paper's iteration in the place of V-GRPO's. All else is vgrpo.py's,
with its flags: model, groups and their noise, AdamW, averaged weights, evaluation, run folder (but
for checkpoints). PUBLISHED is what a method sets unless a flag says otherwise. metrics.jsonl has
`nfe`, network evaluations per image and iteration, forward 1 and backward 2, as they were counted.

Symbols are vgrpo.py's, and: T timesteps of an image train; n gradient steps were taken; base is
what training began with; theta_old follows theta slowly, and v_old is its v.

Where this differs from the authors' code:
 1. A gradient step takes whole groups (MixGRPO: a slice of each group), never shuffled images.
    Flow-GRPO drops groups without advantage, not single images. An image without score has none.
 2. All are evaluated with --ema's averaged weights. Optional KLs are off unless PUBLISHED has them.
 3. The SDE steps on --solver's grid, --solver itself makes all other images.
 4. MixGRPO's window moves every twelfth of a run (25 of 300 iterations) until two steps are left.
 5. RAM is Eq. 17, with v_old in the residual as in its code. The reward's factor 1 / --kl-base, T,
    the density of t and theta_old's decay are those of another implementation.
"""
import contextlib
import io
import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
from tqdm import tqdm

import vgrpo
from extras.command_line import explain, make_parser, quiet_libraries
from rewards import UsageError

NOISE_LEVEL = 0.7            # a, of the SDE
NFT_BETA = 1.0               # how far v+ and v- lie from v_old, in units of v - v_old
PUBLISHED = {"flow-grpo": "--updates 2 --clip 1e-4",
             "mixgrpo": "--updates 4 --clip 1e-4 --timesteps 4",
             "nft": "--updates 1",
             "awm": "--updates 1 --timesteps 6 --kl-base 1e-3",
             "epg": "--updates 1 --kl-base 1e-4 --grad-norm 5",
             "ram": "--updates 1 --timesteps 4 --kl-base 1e-2"}

@dataclass(frozen=True)
class Options:
    method: str = "nft"      # whose iteration
    timesteps: int = 0       # T, how many of an image train, 0 = all of the sampler's but one
    kl_base: float = 0.0     # weight of the KL to base, in v, 0 = off; not in the GRPOs

@dataclass(frozen=True)
class Config(vgrpo.Config, Options):
    """vgrpo.py's flags and those above."""

# ------------------------------------------------------------------------------------- the methods

def flow_grpo(rival, items):
    """Flow-GRPO (arXiv 2505.05470). Noise in the sampler's steps gives each of them a likelihood:
    PPO on T of them, never the last, with the image's advantage for all."""
    cfg, size = rival.cfg, rival.cfg.micro_batch or rival.cfg.group_size
    advantages = global_advantages(rival.rollout(items, noisy=range(cfg.steps), size=size))
    groups = [group for group in rival.groups if advantages[group.index].any()]
    for update in range(cfg.updates):
        rival.ppo_step(groups[update::cfg.updates], vgrpo.slices(cfg.group_size, size),
                       torch.arange(cfg.steps - 1), advantages)

def mixgrpo(rival, items):
    """MixGRPO (arXiv 2507.21802). Noise and training in a window of T steps only, which moves from
    much noise to little as training goes on. A gradient step takes a slice of every group."""
    cfg, size = rival.cfg, math.ceil(rival.cfg.group_size / rival.cfg.updates)
    moves, last = (rival.iteration - 1) * 12 // cfg.iterations, cfg.steps - 2 - cfg.timesteps
    window = torch.arange(cfg.timesteps) + min(moves, last)
    rival.rollout(items, noisy=window.tolist(), size=size)
    advantages = vgrpo.group_advantages(rival.rewards)    # by the group's std, reward by reward
    advantages = vgrpo.weighted_mean(advantages, rival.weights).float().clamp(-5, 5)
    for rows in vgrpo.slices(cfg.group_size, size):
        rival.ppo_step(rival.groups, [rows], window, advantages)

def diffusion_nft(rival, items):
    """DiffusionNFT (arXiv 2509.16117). r says how probably an image is a good one. Good images draw
    v to their side of v_old, bad ones push it to the other."""
    r = (global_advantages(rival.rollout(items, rival.old)) / 10 + 0.5).clamp(0, 1)

    def loss(x, r):
        away = NFT_BETA * (x.v - x.v_old)
        plus, minus = x_losses(x.v_old + away, x), x_losses(x.v_old - away, x)
        return 5 * (r * plus + (1 - r) * minus) / NFT_BETA
    rival.update(r, loss, draw_steps)
    rival.follow(0.001, 0.5)

def awm(rival, items):
    """AWM (arXiv 2509.25050). Policy gradient with the pretraining loss in the likelihood's place,
    as V-GRPO, but with a ratio per pair, always 1 in value. Two KLs bound the step."""
    advantages = global_advantages(rival.rollout(items)) / 5

    def loss(x, advantage):
        error = mean((x.v - (x.eps - x.o[:, None])).square())
        log_p = -((error + 1e-10) ** 0.25 - 1e-10 ** 0.25) * x.t / 0.25
        ratio = torch.exp(log_p - log_p.detach())
        rival.note("ratio_mean", ratio)
        return -ratio * advantage + mean((x.v - x.v_old).square())

    def strata(rng, G, T, grid):                          # of the sampler's steps but the two ends
        u = (torch.arange(T) + torch.rand(G, T, generator=rng)) / T
        return grid[1:-1][(u * (len(grid) - 2)).long().clamp(max=len(grid) - 3)]
    rival.update(advantages, loss, strata)
    rival.follow(0.001, 0.3)

def epg(rival, items):
    """EPG (arXiv 2602.04663). Policy gradient with a pair's loss, V-GRPO's, in the likelihood's
    place; no clip, no std. The ratio corrects for theta_old's rollout and has no gradient."""
    rewards = rival.rollout(items, rival.old)
    advantages = 0.1 * (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num().float()

    def loss(x, advantage):
        elbo, elbo_old = -x_losses(x.v, x), -x_losses(x.v_old, x)
        ratio = torch.exp(elbo.detach() - elbo_old)
        rival.note("ratio_mean", ratio)
        return -ratio * advantage * elbo
    rival.update(advantages, loss, draw_steps)
    rival.follow(0.001, 0.5)

def ram(rival, items):
    """RAM (arXiv 2605.10759). Regression on a velocity that the reward corrects:
    |v - v_base - f A (eps - o - v_old)|^2 / f, where f = 1 / --kl-base. Multiplied out, that is the
    KL to base, the product below and what has no gradient."""
    advantages = global_advantages(rival.rollout(items, rival.old))

    def loss(x, advantage):
        return -2 * advantage * mean(x.v * (x.eps - x.o[:, None] - x.v_old))

    def mostly_noise(rng, G, T, grid):
        return torch.rand(G, T, generator=rng).sqrt()     # t in [0, 1], its density grows as t
    rival.update(advantages, loss, mostly_noise)
    rival.follow(0.01, 0.9)

METHODS = {"flow-grpo": flow_grpo, "mixgrpo": mixgrpo, "nft": diffusion_nft, "awm": awm, "epg": epg,
           "ram": ram}

# ----------------------------------------------------------------------------------- the equations

def global_advantages(rewards):
    """(R - the group's mean) / the std of all, within -5 and 5.  rewards [P, G] -> [P, G]"""
    std = (rewards - rewards.nanmean()).square().nanmean().sqrt()
    advantages = (rewards - rewards.nanmean(1, keepdim=True)) / (std + 1e-4)
    nothing = vgrpo.group_advantages(rewards) == 0        # of equal rewards, or without a score
    return advantages.masked_fill(nothing, 0).clamp(-5, 5).float()

def sde_step(z, v, grid, j):
    """A step of the SDE whose marginals are the ODE's: z_{j+1} is Gaussian.
    z [B, ...] at t = grid[j], its velocity v, grid falling from 1 to 0 -> mean [B, ...], std"""
    t, dt = grid[j], grid[j + 1] - grid[j]
    g2 = NOISE_LEVEL ** 2 * t / (1 - (grid[1] if t == 1 else t))
    mean = z * (1 + g2 / (2 * t) * dt) + v * (1 + g2 * (1 - t) / (2 * t)) * dt
    return mean, (-g2 * dt).sqrt()

def log_prob(z, mean, std):
    """log N(z; mean, std^2), a mean over the latent.  [B, ...] -> [B]"""
    density = -((z - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)

def x_losses(v, x):
    """V-GRPO's Eq. 14 of each pair.  v [B, T, ...] -> [B, T]"""
    pairs = zip(v.split(1, 1), x.z.split(1, 1), x.t.split(1, 1))
    return torch.stack([vgrpo.surrogate(v, x.o, z, t)[0] for v, z, t in pairs], 1)

def mean(values):
    """Over the latent.  [B, T, ...] -> [B, T]"""
    return values.flatten(2).mean(2)

def draw_steps(rng, G, T, grid):
    """T different ones for each image.  grid [steps] -> [G, T]"""
    return grid[torch.rand(G, len(grid), generator=rng).argsort(1)[:, :T]]

# ----------------------------------------------------------------------- rollouts, gradient steps

class Rival:
    """What a method works with. Other weights are a list, in the order of the parameters."""

    def __init__(self, run, cfg):
        self.cfg, self.learner, self.scorer = cfg, run.learner, run.scorer
        self.policy, self.params = run.learner.policy, list(run.learner.trainable.values())
        self.base, self.old = ([p.detach().clone() for p in self.params] for _ in range(2))
        self.weights = torch.tensor(list(run.scorer.weights.values())).double()
        self.costs = []
        self.policy.transformer.register_forward_hook(self.count)

    def count(self, network, args, output):
        self.costs.append(len(output[0]))
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: self.costs.append(2 * len(gradient)))

    def iterate(self, items, iteration):
        """-> the iteration's metrics, named as vgrpo.py's"""
        self.iteration, self.stats, self.costs = iteration, {}, []
        start = time.perf_counter()
        METHODS[self.cfg.method](self, items)
        self.stats["seconds"] = [time.perf_counter() - start]
        self.stats["nfe"] = [sum(self.costs) / self.rewards[0].numel()]
        self.stats["ratio_max"] = [max(self.stats.get("ratio_mean", [1.0]))]
        self.note("reward", vgrpo.weighted_mean(self.rewards, self.weights))
        for name, rewards in zip(self.scorer.weights, self.rewards):
            self.note(f"reward/{name}", rewards)
        return {name: torch.tensor(v).nanmean().item() for name, v in self.stats.items()}

    def note(self, name, values):
        self.stats.setdefault(name, []).extend(values.flatten().tolist())

    def rollout(self, items, weights=None, noisy=(), size=0):
        """Draw groups, in calls of `size` images, with theta or other weights.  -> rewards [P, G]
        With noise in some steps a group's latents are its paths [G, steps, ...]."""
        cfg = replace(self.cfg, micro_batch=size or self.cfg.micro_batch, n_mc=1)
        self.noisy, self.log_p = noisy, []
        policy = SimpleNamespace(generate=self.noisy_call) if noisy else self.policy
        with self.other_weights(weights):
            self.groups = vgrpo.collect(
                policy, items, cfg.group_size, cfg, cfg.seed, "noise", self.iteration)
        self.rewards = vgrpo.score(self.scorer, self.groups)          # [K, P, G]
        return vgrpo.weighted_mean(self.rewards, self.weights)

    def noisy_call(self, prompt, rngs):
        """A call of the pipeline, which decodes as ever, with the SDE in the steps .noisy."""
        scheduler, path, log_p = self.policy.pipe.scheduler, [], []
        def step(velocity, t, sample, **options):
            z, v, grid, j = sample.float(), velocity.float(), scheduler.sigmas.cpu(), len(path)
            z_next, (mean, std) = z + (grid[j + 1] - grid[j]) * v, sde_step(z, v, grid, j)
            if j in self.noisy:
                noise = torch.stack([torch.randn(z.shape[1:], generator=rng) for rng in rngs])
                z_next = mean + std * noise.to(z)
            z_next = z_next.to(sample.dtype)              # what the pipeline goes on with
            path.append(z)
            log_p.append(log_prob(z_next.float(), mean, std))
            return (z_next,)
        scheduler.step = step                             # generate() leaves the class's own behind
        images, _, conditions = self.policy.generate(prompt, rngs)
        self.log_p += torch.stack(log_p, 1)               # an image's [steps]
        return images, torch.stack(path, 1), conditions

    def ppo_step(self, groups, parts, steps, advantages):
        """A gradient step on T of these steps of the groups' paths, with a ratio for each."""
        T, log_p_old = self.cfg.timesteps, torch.stack(self.log_p).view(*advantages.shape, -1)
        count = len(groups) * T * sum(rows.stop - rows.start for rows in parts)
        for group, rows in itertools.product(groups, parts):
            path, grid = group.latents[rows].unbind(1), group.conditions.grid
            A = advantages[group.index, rows].to(path[0].device)
            rng = vgrpo.generator(self.cfg.seed, "steps", self.iteration, group.index)
            for j in draw_steps(rng, 1, T, steps)[0].tolist():
                v = self.policy.velocity(path[j], grid[j].expand(len(A)), group.conditions)
                log_p = log_prob(path[j + 1], *sde_step(path[j], v, grid, j))
                loss, ratio = vgrpo.clipped_objective(
                    -log_p, -log_p_old[group.index, rows, j], A, self.cfg.clip)
                self.note("ratio_mean", ratio)
                self.note("loss", loss)
                (loss.sum() / count).backward()
        if groups:
            self.note("grad_norm", torch.tensor(vgrpo.gradient_step(self.learner, self.cfg)))

    def update(self, values, loss_of, draw):
        """Gradient steps on T pairs of each image.
        values [P, G], loss_of(x, values [B, 1]) -> [B, T], draw(rng, G, T, grid) -> t [G, T]"""
        cfg, G, T = self.cfg, self.cfg.group_size, self.cfg.timesteps
        for update in range(cfg.updates):
            groups = self.groups[update::cfg.updates]
            for group in groups:
                rng = vgrpo.generator(cfg.seed, "pairs", self.iteration, group.index)
                o, c = group.latents, group.conditions
                t = draw(rng, G, T, c.grid).to(o.device)
                eps = torch.randn(G, T, *o.shape[1:], generator=rng).to(o.device)
                for rows in vgrpo.slices(G, cfg.micro_batch or G):
                    x = SimpleNamespace(o=o[rows], t=t[rows], eps=eps[rows])
                    x.z = vgrpo.add_noise(x.o[:, None], x.t, x.eps)
                    x.v_old = self.velocity(x, c, self.old)
                    x.v_base = self.velocity(x, c, self.base) if cfg.kl_base else 0
                    x.v = self.velocity(x, c)
                    loss = loss_of(x, values[group.index, rows, None].to(o.device))
                    loss = loss + cfg.kl_base * mean((x.v - x.v_base).square())
                    self.note("loss", loss)
                    (loss.mean(1).sum() / (len(groups) * G)).backward()
            self.note("grad_norm", torch.tensor(vgrpo.gradient_step(self.learner, cfg)))

    def velocity(self, x, c, weights=None):
        with self.other_weights(weights):
            return self.policy.velocity(x.z.flatten(0, 1), x.t.flatten(), c).view_as(x.z)

    def follow(self, rate, most):
        """theta_old <- decay theta_old + (1 - decay) theta, where decay = min(rate n, most)"""
        decay = min(rate * self.learner.ema.optimization_step, most)
        for old, p in zip(self.old, self.params):
            old.lerp_(p.data, 1 - decay)

    @contextlib.contextmanager
    def other_weights(self, weights):
        """Other weights in the network's place, without a gradient, if there are any."""
        own = [p.data for p in self.params]
        for p, value in zip(self.params, weights or []):
            p.data = value
        with torch.set_grad_enabled(torch.is_grad_enabled() and not weights):
            yield
        for p, value in zip(self.params, own):
            p.data = value

def parse_config(argv):
    parser = make_parser(Options, __doc__, {"method": tuple(METHODS)})
    method = vars(parser.parse_known_args(argv)[0]).get("method", Options.method)
    own, rest = parser.parse_known_args([*PUBLISHED[method].split(), *argv])
    cfg = Config(**asdict(vgrpo.parse_config(rest)), **vars(own))
    cfg = replace(cfg, timesteps=cfg.timesteps or cfg.steps - 1)
    most = {"flow-grpo": cfg.steps - 1, "mixgrpo": cfg.steps - 2}.get(method)
    if most and (cfg.timesteps > most or cfg.guidance):
        raise UsageError(f"--timesteps, --guidance: {method} trains at most {most}, unguided")
    return cfg

def main(argv=None):
    try:
        cfg, device = parse_config(sys.argv[1:] if argv is None else argv), vgrpo.start_ranks()
        if cfg.resume or vgrpo.rank_and_ranks()[1] > 1:
            raise UsageError("--resume, torchrun: rivals run in one process, from the start")
        quiet_libraries(main=True)
        with contextlib.redirect_stdout(io.StringIO()):   # it would tell V-GRPO's cost
            run = vgrpo.prepare(cfg, device)
        vgrpo.say(f"{run.out}: {cfg.method}")
        train(run, cfg)
    except Exception as error:
        sys.exit(explain(error))

def train(run, cfg):
    rival = Rival(run, cfg)
    vgrpo.evaluate(run, cfg, 0)
    for iteration in tqdm(range(1, cfg.iterations + 1)):
        items = {i: vgrpo.pick_item(run.train_items, cfg, iteration, i) for i in run.indices}
        run.log({"iteration": iteration, **rival.iterate(items, iteration)})
        if iteration % cfg.eval_every == 0 or iteration == cfg.iterations:
            vgrpo.evaluate(run, cfg, iteration)

if __name__ == "__main__":
    main()
