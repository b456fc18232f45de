"""How much does a gradient of each estimator differ from the mean of many, on the same images?

    python -m extras.evidence noise
"""
import statistics
from dataclasses import replace
from unittest.mock import patch

import torch
from diffusers.training_utils import EMAModel

import rewards
import vgrpo

# Rollouts are the tiny recipe's. Flags of the estimators stand in vgrpo.py's words.
ESTIMATOR = "--share both --stratified --no-antithetic --weight adaptive --n-mc 4 --updates 1"
NAIVE = ESTIMATOR + " --share none --no-stratified --weight v"
ESTIMATORS = {
    "naive": NAIVE,
    "naive + shared": NAIVE + " --share both",
    "naive + strata": NAIVE + " --stratified",
    "naive + weight": NAIVE + " --weight adaptive",
    "paper - shared": ESTIMATOR + " --share none",
    "paper - strata": ESTIMATOR + " --no-stratified",
    "paper - weight": ESTIMATOR + " --weight v",
    "paper": ESTIMATOR,
    "paper, antithetic": ESTIMATOR + " --antithetic",
    "share batch": ESTIMATOR + " --share batch",
    "share batch, antithetic": ESTIMATOR + " --share batch --antithetic",
    "share timestep": ESTIMATOR + " --share timestep",
    "share timestep, antithetic": ESTIMATOR + " --share timestep --antithetic",
    "share noise": ESTIMATOR + " --share noise",
    "share noise, antithetic": ESTIMATOR + " --share noise --antithetic",
    "share none, antithetic": ESTIMATOR + " --share none --antithetic",
    "matched": ESTIMATOR + " --share matched",
    "matched, antithetic": ESTIMATOR + " --share matched --antithetic",
    "paper, a step on half of the prompts": ESTIMATOR + " --updates 2",
    "paper, a step on a quarter": ESTIMATOR + " --updates 4",
    "share batch, a step on a quarter": ESTIMATOR + " --share batch --updates 4",
    "matched, antithetic, a step on a quarter":
        ESTIMATOR + " --share matched --antithetic --updates 4",
    "paper, N_MC 2": ESTIMATOR + " --n-mc 2",
    "paper, N_MC 8": ESTIMATOR + " --n-mc 8",
    "matched, antithetic, N_MC 2": ESTIMATOR + " --share matched --antithetic --n-mc 2",
    "matched, antithetic, N_MC 8": ESTIMATOR + " --share matched --antithetic --n-mc 8",
}


class Listener:
    """In the optimiser's place: it takes the gradient down, and no step."""

    def __init__(self, params):
        self.params, self.param_groups = params, [{"lr": 0.0}]

    def step(self):
        self.gradient = torch.cat([p.grad.flatten() for p in self.params]).double()

    def zero_grad(self):
        for p in self.params:
            p.grad = None


class Noise:
    """Gradients of vgrpo.py's iteration on images that are drawn once."""

    def __init__(self, rollout, *flags):
        one_step = "--updates 1 --clip 0 --soft-clip 3 --grad-norm 0"
        self.cfg = vgrpo.parse_config([*one_step.split(), *flags])
        policy, trainable = vgrpo.load_policy(self.cfg, torch.device("cpu"))
        params = list(trainable.values())
        self.learner = vgrpo.Learner(policy, trainable, Listener(params), EMAModel([]))
        prompts, _ = vgrpo.load_prompts(self.cfg, vgrpo.generator("held out"))
        indices = vgrpo.layout(self.cfg.prompts_per_iteration, self.cfg.updates)
        self.items = {i: vgrpo.pick_item(prompts, self.cfg, rollout, i) for i in indices}
        self.groups = vgrpo.collect(
            policy, self.items, self.cfg.group_size, self.cfg, "evidence", rollout)
        self.scorer = rewards.Rewards("shapes")

    def gradient(self, cfg, draw):
        """-> the gradient [n] of an iteration with these pairs, its metrics"""
        with patch.object(vgrpo, "collect", lambda *args: self.groups):
            metrics = vgrpo.run_iteration(self.learner, self.scorer, self.items, cfg, draw)
        return self.learner.optimizer.gradient, metrics

    def measure(self, flags, draws):
        """-> trace of the gradient's variance / its squared mean, cv of L_hat, within a group"""
        chosen = vgrpo.parse_config(flags.split())
        estimator = ("share", "stratified", "antithetic", "weight", "n_mc", "updates")
        cfg = replace(self.cfg, **{name: getattr(chosen, name) for name in estimator})
        mean, square, spread = 0.0, 0.0, []
        for draw in range(draws):
            gradient, metrics = self.gradient(cfg, draw)
            mean = mean + gradient / draws
            square = square + gradient.square() / draws
            spread.append((metrics["surrogate_cv"], metrics["surrogate_group_cv"]))
        variance = ((square - mean.square()).sum() * draws / (draws - 1)).item()
        signal = mean.square().sum().item() - variance / draws         # without bias
        return variance / signal, *(statistics.mean(column) for column in zip(*spread))


def gradient_noise(rollout, draws=20):
    """-> {estimator: its three numbers} on the images of one rollout"""
    torch.set_num_threads(1)
    noise, result = Noise(rollout), {}
    for name, flags in ESTIMATORS.items():
        result[name] = noise.measure(flags, draws)
        print(rollout, name, *(f"{value:.3f}" for value in result[name]), flush=True)
    return result


def table(rollouts):
    lines = ["| estimator | gradient noise / signal, three rollouts | their mean | cv of L_hat "
             "| cv within a group |", "|---|---|---|---|---|"]
    for name in ESTIMATORS:
        noise, cv, group_cv = zip(*(rollout[name] for rollout in rollouts))
        each = " ".join(f"{value:.2f}" for value in noise)
        lines.append(f"| {name} | {each} | **{statistics.mean(noise):.2f}** "
                     f"| {statistics.mean(cv):.3f} | {statistics.mean(group_cv):.3f} |")
    return lines
