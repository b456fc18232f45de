"""The paper's claims in miniature, on the tiny model.

    python -m extras.evidence noise      # the gradient's noise, 20 minutes on two cores
    python -m extras.evidence runs       # learning curves, an hour on two cores
    python -m extras.evidence report     # tables and pictures of both

The first two write assets/evidence.json, the last evidence.md, evidence.png and learning.png.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers.training_utils import EMAModel

import rewards
import vgrpo
from extras import evidence_charts

ROOT = Path(__file__).parents[1]
ASSETS, RUNS = ROOT / "assets", ROOT / "runs" / "evidence"
ITERATIONS = 100
EVALS = ("eval/shapes", "eval/shapes-strict")

# The paper's estimator at the scale of the tiny model; every other run says what it changes.
PAPER = ("--prompts-per-iteration 6 --group-size 24 --share both --no-antithetic --n-mc 4 "
         "--lr 3e-4 --solver euler --steps 10 --soft-clip 3 --updates 1")
EIGHT = PAPER + " --prompts-per-iteration 8 --group-size 18"
FOUR = EIGHT + " --updates 4 --soft-clip 0"
CURVES = {  # name -> flags, seeds
    "paper": (PAPER, 5),
    "tiny recipe": ("", 5),
    "share: none": (PAPER + " --share none", 3),
    "share: timestep": (PAPER + " --share timestep", 3),
    "share: matched": (PAPER + " --share matched", 3),
    "no strata": (PAPER + " --no-stratified", 3),
    "weight: x": (PAPER + " --weight x", 3),
    "weight: v": (PAPER + " --weight v", 3),
    "weight: eps": (PAPER + " --weight eps", 3),
    "naive": (PAPER + " --share none --no-stratified --weight v", 3),
    "antithetic": (PAPER + " --antithetic", 3),
    "N_MC 2": (PAPER + " --n-mc 2", 3),
    "N_MC 8": (PAPER + " --n-mc 8", 3),
    "DPM-Solver++, 10 steps": (PAPER + " --solver dpm++", 3),
    "DPM-Solver++, 6 steps": (PAPER + " --solver dpm++ --steps 6", 3),
    "no soft clip": (PAPER + " --soft-clip 0", 3),
    "8 x 18": (EIGHT, 3),
    "8 x 18, 4 updates, no control": (FOUR, 3),
    "8 x 18, 4 updates, clip .01": (FOUR + " --clip 0.01", 3),
    "8 x 18, 4 updates, KL .3": (FOUR + " --kl 0.3", 3),
}
PANELS = (
    ("paper", "tiny recipe", "share: matched"),
    ("paper", "share: none", "no strata", "weight: v", "naive"),
    ("paper", "weight: x", "weight: v", "weight: eps"),
    ("paper", "N_MC 2", "N_MC 8", "antithetic"),
    ("8 x 18", "8 x 18, 4 updates, no control", "8 x 18, 4 updates, clip .01",
     "8 x 18, 4 updates, KL .3"),
    ("paper", "DPM-Solver++, 10 steps", "DPM-Solver++, 6 steps"),
)

# Rollouts are the tiny recipe's. Flags of the estimators stand in vgrpo.py's words.
ESTIMATOR = "--share both --stratified --no-antithetic --weight adaptive --n-mc 4"
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
    "paper, N_MC 2": ESTIMATOR + " --n-mc 2",
    "paper, N_MC 8": ESTIMATOR + " --n-mc 8",
    "matched, antithetic, N_MC 2": ESTIMATOR + " --share matched --antithetic --n-mc 2",
    "matched, antithetic, N_MC 8": ESTIMATOR + " --share matched --antithetic --n-mc 8",
}


def keep(key, value):
    path = ASSETS / "evidence.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data[key] = value
    path.write_text(json.dumps(data, indent=0))


# ---- noise: how much does a gradient differ from the mean of many, on the same images?


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
        self.cfg = vgrpo.parse_config([*flags, "--grad-norm", "0"])
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
        estimator = ("share", "stratified", "antithetic", "weight", "n_mc")
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


def gradient_noise(rollout, draws=40):
    """-> {estimator: its three numbers} on the images of one rollout"""
    torch.set_num_threads(1)
    noise, result = Noise(rollout), {}
    for name, flags in ESTIMATORS.items():
        result[name] = noise.measure(flags, draws)
        print(rollout, name, *(f"{value:.3f}" for value in result[name]), flush=True)
    return result


# ---- runs: what does it mean for learning?


def one_run(name, flags, seed):
    """Train, unless it has been done.  -> the run's evaluations and its cost"""
    folder = f"{name}-{seed}"
    for sign, other in ((" ", "_"), (",", ""), (":", ""), ("+", "")):
        folder = folder.replace(sign, other)
    out = RUNS / folder
    if not (out / "checkpoints" / f"{ITERATIONS:06d}").exists():
        shutil.rmtree(out, ignore_errors=True)             # what was cut off begins anew
        command = [sys.executable, ROOT / "vgrpo.py", "--out", out, "--seed", str(seed),
                   "--save-every", "1000", "--iterations", str(ITERATIONS), *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if process.returncode:
            raise RuntimeError(f"{folder}: {process.stderr}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "reward" in line]
    evals = [[line["iteration"], *(line[name] for name in EVALS)] for line in lines
             if "eval" in line]
    one = trained[0]                                      # per image; a backward is two forwards
    cost = one["nfe_rollout"] + one["nfe_old"] + 3 * one["nfe_train"]
    parts = ("seconds_rollout", "seconds_reward", "seconds_update")
    seconds = sum(line[part] for line in trained for part in parts)
    print(name, seed, evals[-1], flush=True)
    return dict(name=name, seed=seed, cost=cost, evals=evals, seconds=seconds)


# ---- report


def noise_table(rollouts):
    lines = ["| estimator | gradient noise / signal, three rollouts | their mean | cv of L_hat "
             "| cv within a group |", "|---|---|---|---|---|"]
    for name in ESTIMATORS:
        if name not in rollouts[0]:                       # measured before it was added
            continue
        noise, cv, group_cv = zip(*(rollout[name] for rollout in rollouts))
        each = " ".join(f"{value:.2f}" for value in noise)
        lines.append(f"| {name} | {each} | **{statistics.mean(noise):.2f}** "
                     f"| {statistics.mean(cv):.3f} | {statistics.mean(group_cv):.3f} |")
    return lines


def costs(runs, levels=(0.90, 0.95, 0.99)):
    """Network evaluations per image until the mean evaluation reaches each level, None if never;
    linear between evaluations.
    """
    mean = [(evals[0][0], statistics.mean(value for _, value, _ in evals))
            for evals in zip(*(run["evals"] for run in runs))]
    reached = []
    for level in levels:
        steps = [k0 + (k - k0) * (level - v0) / (v - v0)
                 for (k0, v0), (k, v) in zip(mean, mean[1:]) if v0 < level <= v]
        reached.append(steps[0] * runs[0]["cost"] if steps else None)
    return reached


def runs_table(curves):
    lines = ["| run, seeds | cost per image and iteration | evaluation after 20, 60, 100 "
             "iterations | lowest, highest at the end | strict | cost to reach .90, .95, .99, "
             "paper = 1 |", "|---|---|---|---|---|---|"]
    paper = costs(curves["paper"])
    for name, runs in curves.items():
        at = {k: [value for run in runs for iteration, value, _ in run["evals"] if iteration == k]
              for k in (20, 60, 100)}
        means = " ".join(f"{statistics.mean(values):.3f}" for values in at.values())
        strict = statistics.mean(run["evals"][-1][2] for run in runs)
        shares = " ".join(f"{cost / base:.2f}" if cost and base else "never"
                          for cost, base in zip(costs(runs), paper))
        lines.append(f"| {name}, {len(runs)} | {runs[0]['cost']:.0f} | {means} "
                     f"| {min(at[100]):.3f} {max(at[100]):.3f} | {strict:.3f} | {shares} |")
    return lines


def report():
    data, curves = json.loads((ASSETS / "evidence.json").read_text()), {}
    for run in data["runs"]:
        curves.setdefault(run["name"], []).append(run)
    text = "\n".join([*noise_table(data["noise"]), "", *runs_table(curves)])
    (ASSETS / "evidence.md").write_text(text + "\n")
    print(text)
    panels = [{name: curves[name] for name in names} for names in PANELS]
    evidence_charts.draw_panels(panels, ASSETS / "evidence.png")
    samples = sorted((RUNS / "tiny_recipe-0" / "samples").glob("*.png"))
    if samples:
        evidence_charts.draw_learning(samples, curves["tiny recipe"], ASSETS / "learning.png")


def main():
    what = sys.argv[1:]
    if what == ["noise"]:
        with ProcessPoolExecutor(2) as pool:
            keep("noise", list(pool.map(gradient_noise, (1, 2, 3))))
    elif what == ["runs"]:
        jobs = [(name, flags, seed) for name, (flags, seeds) in CURVES.items()
                for seed in range(seeds)]
        with ThreadPoolExecutor(2) as pool:
            keep("runs", list(pool.map(one_run, *zip(*jobs))))
    elif what == ["report"]:
        report()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
