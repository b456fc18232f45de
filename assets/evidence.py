"""The README's evidence: the paper's claims in miniature, on the tiny model.

    python assets/evidence.py noise      # the gradient's noise -> evidence.json, 20 minutes on 2 cores
    python assets/evidence.py runs       # the learning curves -> evidence.json, an hour on 2 cores
    python assets/evidence.py report     # evidence.json -> evidence.md and the pictures (needs matplotlib)
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "evidence"
# The paper's estimator and control at the scale of the tiny model; every other row changes what it says.
PAPER = ("--prompts-per-iteration 6 --group-size 24 --share both --no-antithetic --n-mc 4 --lr 3e-4 "
         "--solver euler --steps 10 --soft-clip 3 --updates 1")
EIGHT = "--prompts-per-iteration 8 --group-size 18 "
CURVES = {  # name -> flags, seeds
    "paper": ("", 5),
    "tiny recipe": (None, 5),
    "share: none": ("--share none", 3),
    "share: timestep": ("--share timestep", 3),
    "share: matched": ("--share matched", 3),
    "no strata": ("--no-stratified", 3),
    "weight: x": ("--weight x", 3),
    "weight: v": ("--weight v", 3),
    "weight: eps": ("--weight eps", 3),
    "naive": ("--share none --no-stratified --weight v", 3),
    "antithetic": ("--antithetic", 3),
    "N_MC 2": ("--n-mc 2", 3),
    "N_MC 8": ("--n-mc 8", 3),
    "DPM-Solver++, 10 steps": ("--solver dpm++", 3),
    "DPM-Solver++, 6 steps": ("--solver dpm++ --steps 6", 3),
    "no soft clip": ("--soft-clip 0", 3),
    "8 x 18": (EIGHT, 3),
    "8 x 18, 4 updates, no control": (EIGHT + "--updates 4 --soft-clip 0", 3),
    "8 x 18, 4 updates, clip .01": (EIGHT + "--updates 4 --soft-clip 0 --clip 0.01", 3),
    "8 x 18, 4 updates, KL .3": (EIGHT + "--updates 4 --soft-clip 0 --kl 0.3", 3),
}
ESTIMATORS = {  # name -> share, stratified, antithetic, weight, N_MC
    "naive": ("none", False, False, "v", 4),
    "naive + shared": ("both", False, False, "v", 4),
    "naive + strata": ("none", True, False, "v", 4),
    "naive + weight": ("none", False, False, "adaptive", 4),
    "paper - shared": ("none", True, False, "adaptive", 4),
    "paper - strata": ("both", False, False, "adaptive", 4),
    "paper - weight": ("both", True, False, "v", 4),
    "paper": ("both", True, False, "adaptive", 4),
    "paper, antithetic": ("both", True, True, "adaptive", 4),
    "share timestep": ("timestep", True, False, "adaptive", 4),
    "share timestep, antithetic": ("timestep", True, True, "adaptive", 4),
    "share noise": ("noise", True, False, "adaptive", 4),
    "share noise, antithetic": ("noise", True, True, "adaptive", 4),
    "share none, antithetic": ("none", True, True, "adaptive", 4),
    "matched": ("matched", True, False, "adaptive", 4),
    "matched, antithetic": ("matched", True, True, "adaptive", 4),
    "paper, N_MC 2": ("both", True, False, "adaptive", 2),
    "paper, N_MC 8": ("both", True, False, "adaptive", 8),
    "matched, antithetic, N_MC 2": ("matched", True, True, "adaptive", 2),
    "matched, antithetic, N_MC 8": ("matched", True, True, "adaptive", 8),
}


def keep(key, value):
    path = HERE / "evidence.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data[key] = value
    path.write_text(json.dumps(data, indent=0))


def gradient_noise(rollout, draws=40):
    """-> {estimator: (trace of the gradient's variance / its squared mean, cv of L_hat, within a group)}"""
    sys.path.insert(0, str(HERE.parent))
    import torch

    import rewards
    import vgrpo
    torch.set_num_threads(1)
    base = vgrpo.parse_config([])
    policy, trainable = vgrpo.load_policy(base, torch.device("cpu"))
    params = list(trainable.values())
    prompts, _ = vgrpo.load_prompts(base)
    P, G = base.prompts_per_iteration, base.group_size
    items = {i: vgrpo.pick(prompts, base, rollout, i) for i in range(P)}
    groups = vgrpo.collect(policy, items, G, base, "evidence", rollout)
    table = vgrpo.score(rewards.Rewards("shapes"), groups, P, policy.device)
    A = vgrpo.soft_clip(vgrpo.combine_rewards(table, torch.ones(1, dtype=torch.float64)), 3.0)
    result = {}
    for name, (share, stratified, antithetic, weight, M) in ESTIMATORS.items():
        flags = ["--share", share, "--weight", weight, "--n-mc", str(M)]
        switches = (("stratified", stratified), ("antithetic", antithetic))
        flags += [f"--{'' if on else 'no-'}{what}" for what, on in switches]
        mean, square, spread = 0.0, 0.0, []
        for draw in range(draws):
            cfg, L = vgrpo.parse_config(flags + ["--seed", str(1000 * rollout + draw)]), []
            for group in groups:
                L.append(vgrpo.estimate(policy, group, slice(0, G), A, cfg, draw)[0])
                (L[-1] * A[group.index] / (P * G)).sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in params]).double()
            mean, square = mean + gradient / draws, square + gradient.square() / draws
            for p in params:
                p.grad = None
            L = torch.stack(L).detach()
            spread.append(((L.std() / L.mean()).item(), (L.std(1) / L.mean(1)).mean().item()))
        variance = ((square - mean.square()).sum() * draws / (draws - 1)).item()
        signal = mean.square().sum().item() - variance / draws             # unbiased
        result[name] = (variance / signal, *(statistics.mean(column) for column in zip(*spread)))
        print(rollout, name, *(f"{value:.3f}" for value in result[name]), flush=True)
    return result


def one_run(job):
    name, flags, seed = job
    out = RUNS / f"{name}-{seed}".replace(" ", "_").replace(",", "").replace(":", "").replace("+", "")
    last = out / "checkpoints" / "000100"
    command = [sys.executable, HERE.parent / "vgrpo.py", "--out", out, "--seed", str(seed)]
    command += ["--save-every", "1000"]
    if not last.exists():
        shutil.rmtree(out, ignore_errors=True)             # what was cut off begins anew
        command += [] if flags is None else f"{PAPER} {flags}".split()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run = next(line for line in lines if "reward" in line)
    cost = run["nfe_rollout"] + run["nfe_old"] + 3 * run["nfe_train"]      # per image; a backward is two
    names = "iteration", "eval/shapes", "eval/shapes-strict"
    evals = [tuple(line[name] for name in names) for line in lines if "eval" in line]
    print(name, seed, evals[-1], flush=True)
    parts = "seconds_rollout", "seconds_reward", "seconds_update"
    seconds = sum(line[part] for line in lines if "reward" in line for part in parts)
    return dict(name=name, seed=seed, cost=cost, evals=evals, seconds=seconds)


def report():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    data = json.loads((HERE / "evidence.json").read_text())
    text = ["| estimator | gradient noise / signal, three rollouts | their mean | cv of L_hat "
            "| cv within a group |", "|---|---|---|---|---|"]
    for name in ESTIMATORS:
        rows = [rollout[name] for rollout in data["noise"]]
        noise, cv, group_cv = ([row[i] for row in rows] for i in range(3))
        text.append(f"| {name} | {' '.join(f'{x:.2f}' for x in noise)} | **{statistics.mean(noise):.2f}** | "
                    f"{statistics.mean(cv):.3f} | {statistics.mean(group_cv):.3f} |")
    curves = {}
    for run in data["runs"]:
        curves.setdefault(run["name"], []).append(run)
    text += ["", "| run, seeds | cost per image and iteration | evaluation after 20, 60, 100 iterations "
             "| lowest, highest at the end | strict | cost to reach .90, .95, .99, paper = 1 |",
             "|---|---|---|---|---|---|"]

    def costs(runs):
        """Network evaluations per image until the mean evaluation reaches each level, in between linearly."""
        mean = [(evals[0][0], statistics.mean(value for _, value, _ in evals))
                for evals in zip(*(run["evals"] for run in runs))]
        for level in (.90, .95, .99):
            steps = [k0 + (k - k0) * (level - v0) / (v - v0)
                     for (k0, v0), (k, v) in zip(mean, mean[1:]) if v0 < level <= v]
            yield steps[0] * runs[0]["cost"] if steps else None

    paper = list(costs(curves["paper"]))
    for name, runs in curves.items():
        evals = [one for run in runs for one in run["evals"]]
        at = {k: [value for iteration, value, _ in evals if iteration == k] for k in (20, 60, 100)}
        shares = ["never" if cost is None else f"{cost / base:.2f}" for cost, base in zip(costs(runs), paper)]
        text.append(f"| {name}, {len(runs)} | {runs[0]['cost']:.0f} | "
                    f"{' '.join(f'{statistics.mean(at[k]):.3f}' for k in at)} | "
                    f"{min(at[100]):.3f} {max(at[100]):.3f} | "
                    f"{statistics.mean(run['evals'][-1][2] for run in runs):.3f} | {' '.join(shares)} |")
    (HERE / "evidence.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))

    panels = [["paper", "tiny recipe", "share: matched"],
              ["paper", "share: none", "no strata", "weight: v", "naive"],
              ["paper", "weight: x", "weight: v", "weight: eps"], ["paper", "N_MC 2", "N_MC 8", "antithetic"],
              ["8 x 18", *(name for name in curves if "4 updates" in name)],
              ["paper", *(name for name in curves if "steps" in name)]]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), sharey=True)
    for axis, names in zip(axes.flat, panels):
        for name in names:
            x = [k * curves[name][0]["cost"] for k, *_ in curves[name][0]["evals"]]
            values = list(zip(*([value for _, value, _ in run["evals"]] for run in curves[name])))
            axis.plot(x, [statistics.mean(v) for v in values], label=name)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=.15)
        axis.set(xlabel="network evaluations per image, forward 1, backward 2", ylim=(.5, 1))
        axis.legend(loc="lower right", fontsize=8)
        axis.grid(alpha=.3)
    figure.tight_layout()
    figure.savefig(HERE / "evidence.png", dpi=70)

    samples = sorted((RUNS / "tiny_recipe-0" / "samples").glob("*.png"))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6))
    titles = "before", "after 100 iterations"
    for axis, path, title in zip(axes, (samples[0], samples[-1]), titles):
        axis.imshow(plt.imread(path))
        axis.set_title(title)
        axis.axis("off")
    for run in curves["tiny recipe"]:
        iterations, values, _ = zip(*run["evals"])
        axes[2].plot(iterations, values, label=f"seed {run['seed']}")
    axes[2].set(xlabel="iteration", ylim=(.5, 1), title="evaluation: share of colour, shape, side right")
    axes[2].grid(alpha=.3)
    axes[2].legend()
    figure.tight_layout()
    figure.savefig(HERE / "learning.png", dpi=80)


if __name__ == "__main__":
    if sys.argv[1:] == ["noise"]:
        with ProcessPoolExecutor(2) as pool:
            keep("noise", list(pool.map(gradient_noise, (1, 2, 3))))
    elif sys.argv[1:] == ["runs"]:
        jobs = [(name, flags, seed) for name, (flags, seeds) in CURVES.items() for seed in range(seeds)]
        with ThreadPoolExecutor(2) as pool:
            keep("runs", list(pool.map(one_run, jobs)))
    elif sys.argv[1:] == ["report"]:
        report()
    else:
        sys.exit(__doc__)
