"""Runs at equal cost, on the same prompts, rewards and noise: V-GRPO, its rivals, and its parts.

    python -m extras.evidence rivals tiny      # coloured shapes, an hour on two cores
    python -m extras.evidence rivals mini      # GenEval in miniature, an hour and a quarter
    python -m extras.evidence parts mini       # the paper's method with one part changed

All rivals get the same courtesy. A row chooses its setting on a seed that is not reported: its
learning rate out of three and, at its best, also 1, 2 or 4 gradient steps an iteration, on 4
timesteps an image. Then it runs on seeds 0, 1, ... A part runs at the rate that the paper's method
chose. A run ends when it has cost BUDGET: network evaluations per image, a forward pass counts 1, a
backward pass 2. A finished run stays in assets/runs.json and is not repeated, so a command goes on
where it was stopped.
"""
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from extras import report
from extras.run_folder import write_whole

ROOT = Path(__file__).parents[1]
ASSETS, RUNS = ROOT / "assets", ROOT / "runs" / "evidence"
KEPT, LOCK = ASSETS / "runs.json", threading.Lock()
BUDGET = {"tiny": 1000, "mini": 600}       # the cost of a run
TRIAL = {"tiny": 400, "mini": 300}         # of one that tries a setting
TUNED_ON = 100                             # the seed that is not reported
RATES = {"tiny": ("3e-4", "6e-4", "1.2e-3"), "mini": ("1e-4", "2e-4", "4e-4")}
VALUES = {                                 # what a table calls what an evaluation measures
    "tiny": {"reward": "eval/shapes", "strict": "eval/shapes-strict"},
    "mini": {"reward": "eval/objects", "strict": "eval/objects-strict",
             "as drawn": "eval/as-drawn"}}
LEVEL = {"tiny": 0.9, "mini": 0.6}         # whose cost a table tells
SAME = "--solver euler --steps 10 --prompts-per-iteration 12 --group-size 12"
FOUR = "--n-mc 4 --updates 4"              # the clip is the recipe's: .01 on tiny, .03 on mini
PAPER = "--n-mc 4 --share both --no-antithetic"
ONE = PAPER + " --updates 1 --soft-clip 3"
OURS, ONE_UPDATE, BEST = "V-GRPO, ours", "V-GRPO, the paper's, 1 update", ", at its best"
RIVALS = {  # name: flags, the cost of an iteration, seeds
    OURS: (f"{FOUR} --share matched", 25, 5),
    "V-GRPO, the paper's estimator": (f"{FOUR} {PAPER}", 25, 5),
    ONE_UPDATE: (ONE, 22, 3),
    "DiffusionNFT": ("--method nft", 46, 5),
    "DiffusionNFT" + BEST: ("--method nft --timesteps 4", 26, 3),
    "MixGRPO": ("--method mixgrpo", 22, 5),
    "MixGRPO" + BEST: ("--method mixgrpo --timesteps 4", 22, 3),
    "Flow-GRPO": ("--method flow-grpo", 37, 3),
    "Flow-GRPO" + BEST: ("--method flow-grpo --timesteps 4", 22, 3),
    "AWM": ("--method awm", 40, 3),
    "AWM" + BEST: ("--method awm --timesteps 4", 30, 5),
    "EPG": ("--method epg", 55, 3),
    "EPG" + BEST: ("--method epg --timesteps 4", 30, 3),
    "RAM": ("--method ram", 30, 3),
    "RAM" + BEST: ("--method ram --timesteps 4", 30, 3),
}
PARTS = {   # the paper's with 1 update, but for what the name says
    "nothing shared": (f"{ONE} --share none", 22, 3),
    "timesteps shared": (f"{ONE} --share timestep", 22, 3),
    "matched": (f"{ONE} --share matched", 22, 3),
    "antithetic": (f"{ONE} --antithetic", 22, 3),
    "no strata": (f"{ONE} --no-stratified", 22, 3),
    "weight x": (f"{ONE} --weight x", 22, 3),
    "weight v": (f"{ONE} --weight v", 22, 3),
    "weight eps": (f"{ONE} --weight eps", 22, 3),
    "naive: none of these": (f"{ONE} --share none --no-stratified --weight v", 22, 3),
    "N_MC 2": (f"{ONE} --n-mc 2", 16, 3),
    "N_MC 8": (f"{ONE} --n-mc 8", 34, 3),
    "6 steps of DPM-Solver++": (f"{ONE} --solver dpm++ --steps 6", 18, 3),
    "no soft clip": (f"{ONE} --soft-clip 0", 22, 3),
    "4 updates, no control": (f"{FOUR} {PAPER} --clip 0", 25, 3),
    "4 updates, KL .3": (f"{FOUR} {PAPER} --clip 0 --kl 0.3", 25, 3),
}
ROWS = {**RIVALS, **PARTS}
FIGURES = {
    "rivals": ((OURS, ONE_UPDATE, "DiffusionNFT" + BEST, "AWM" + BEST, "DiffusionNFT", "AWM",
                "MixGRPO", "Flow-GRPO"),),
    "parts": ((ONE_UPDATE, "nothing shared", "matched", "no strata"),
              (ONE_UPDATE, "weight x", "weight v", "weight eps", "naive: none of these"),
              (ONE_UPDATE, "V-GRPO, the paper's estimator", "4 updates, no control",
               "4 updates, KL .3"))}

# ---- runs


def settings(world, name):
    """What a row chooses from: flags."""
    updates = ("--updates 1 ", "--updates 2 ", "--updates 4 ") if name.endswith(BEST) else ("",)
    return [f"{some}--lr {rate}" for some in updates for rate in RATES[world]]


def run(world, name, setting, seed):
    """-> its evaluations: lists of iteration, cost, seconds and VALUES"""
    flags, cost, _ = ROWS[name]
    iterations = round((TRIAL if seed == TUNED_ON else BUDGET)[world] / cost)
    out = RUNS / re.sub(r"\W+", "-", f"{world} {name} {setting} {seed}")
    shutil.rmtree(out, ignore_errors=True)               # what was cut off begins anew
    program = ["-m", "extras.rivals"] if "--method" in flags else ["vgrpo.py"]
    command = [sys.executable, *program, *SAME.split(), *flags.split(), *setting.split(),
               "--model", world, "--seed", str(seed), "--out", out, "--iterations", str(iterations),
               "--eval-every", str(math.ceil(125 / cost)), "--save-every", "10000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if process.returncode:
        raise RuntimeError(f"{out}: {process.stderr}")
    evaluations = report.read_run(out)["eval"]
    values = {short: evaluations["y"][long] for short, long in VALUES[world].items()}
    return {**evaluations["x"], **values}


def all_runs(jobs):
    """Two at a time, but for those that have been run.  jobs [(world, name, setting, seed)]"""
    def once(job):
        result = {**dict(zip(("world", "name", "setting", "seed"), job)), **run(*job)}
        with LOCK:
            lines = ",\n".join(map(json.dumps, [*load(), result]))
            write_whole(KEPT, f"[\n{lines}\n]\n")
        print(*job, f"{result['reward'][-1]:.3f}", flush=True)
    kept = load()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(once, [job for job in jobs if not find(kept, *job)]))


def load():
    return json.loads(KEPT.read_text()) if KEPT.exists() else []


def find(runs, *job):
    return [one for one in runs
            if (one["world"], one["name"], one["setting"], one["seed"]) == job]


def best_setting(runs, world, name):
    """Whose last two evaluations are highest; None while one is missing."""
    tried = [find(runs, world, name, setting, TUNED_ON) for setting in settings(world, name)]
    if not all(tried):
        return None
    return max(sum(tried, []), key=lambda one: sum(one["reward"][-2:]))["setting"]


def choose(world, names):
    """-> {name: its best setting}, after the trials that are missing"""
    all_runs([(world, name, setting, TUNED_ON) for name in names
              for setting in settings(world, name)])
    return {name: best_setting(load(), world, name) for name in names}


def run_on_seeds(world, setting_of):
    """The rows of {name: setting}, a seed of all of them before the next."""
    most = max(ROWS[name][2] for name in setting_of)
    all_runs([(world, name, setting, seed) for seed in range(most)
              for name, setting in setting_of.items() if seed < ROWS[name][2]])


def compare(world, what):
    """what: rivals or parts"""
    if what == "rivals":
        run_on_seeds(world, choose(world, RIVALS))
    else:
        paper = choose(world, [ONE_UPDATE])
        run_on_seeds(world, {**paper, **dict.fromkeys(PARTS, paper[ONE_UPDATE])})


# ---- tables and figures


def curves(world):
    """-> {name: {seed: its run}}, of the setting that ended highest where several were run"""
    found = {}
    for one in load():
        if one["world"] == world and one["seed"] != TUNED_ON:
            found.setdefault(one["name"], {}).setdefault(one["setting"], {})[one["seed"]] = one
    return {name: max(found[name].values(), key=end_of) for name in ROWS if name in found}


def end_of(seeds):
    return statistics.mean(one["reward"][-1] for one in seeds.values())


def mean_of(runs):
    """The mean over seeds of each list."""
    names = [name for name, values in runs[0].items() if isinstance(values, list)]
    return {name: [statistics.mean(values) for values in zip(*(one[name] for one in runs))]
            for name in names}


def when(curve, level, axis):
    """The cost (seconds, as drawn) at which the reward first reaches the level, None if never;
    linear between evaluations."""
    points = list(zip(curve["reward"], curve[axis]))
    if points[0][0] >= level:
        return points[0][1]
    for (low, before), (high, after) in zip(points, points[1:]):
        if low < level <= high:
            return before + (after - before) * (level - low) / (high - low)


def share(reference, other, axis):
    """What the reference needs to come where the other ends, over what the other spent; inf: it
    never comes there"""
    needed = when(reference, other["reward"][-1], axis)
    return math.inf if needed is None else needed / other[axis][-1]


def number(value, form, missing=""):
    return missing if value is None or value == math.inf else f"{value:{form}}"


def table(world, what):
    """Rows of rivals or parts, the reference first."""
    found, reference = curves(world), OURS if what == "rivals" else ONE_UPDATE
    every = RIVALS if what == "rivals" else (ONE_UPDATE, *PARTS)
    names = [name for name in every if name in found]
    if reference not in found or len(names) < 2:
        return []
    lines = [f"| {world}: method | seeds | setting | cost of an iteration | cost to {LEVEL[world]} "
             f"| reward at the end | all right | as drawn | {reference} comes there for: cost "
             "| seconds | as drawn there |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        cells = [name, *cells_of(found[name])]
        if name != reference:
            cells += comparison(found[reference], found[name])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def cells_of(seeds):
    runs = list(seeds.values())
    mean, ends = mean_of(runs), [one["reward"][-1] for one in runs]
    return [len(runs), runs[0]["setting"].replace("--", ""),
            f"{mean['cost'][-1] / mean['iteration'][-1]:.0f}",
            number(when(mean, LEVEL[runs[0]["world"]], "cost"), ".0f", "never"),
            f"{mean['reward'][-1]:.3f} ({min(ends):.3f} to {max(ends):.3f})",
            f"{mean['strict'][-1]:.3f}", number(mean.get("as drawn", [None])[-1], ".3f")]


def comparison(reference, seeds):
    """On the seeds that both have: the share of cost (lowest to highest), of seconds; as drawn"""
    pairs = [(reference[seed], one) for seed, one in seeds.items() if seed in reference]
    ours, theirs = (mean_of(runs) for runs in zip(*pairs))
    cost, seconds = (share(ours, theirs, axis) for axis in ("cost", "seconds"))
    each = [share(*pair, "cost") for pair in pairs]
    low, high = (number(end(each), ".2f", "not") for end in (min, max))
    drawn = when(ours, theirs["reward"][-1], "as drawn") if "as drawn" in theirs else None
    return [f"**{number(cost, '.2f', 'not')}** ({low} to {high})", number(seconds, ".2f"),
            number(drawn, ".3f")]


def figure(world, what):
    """assets/WHAT-WORLD.svg over cost, mean and range over seeds: of rivals, each of VALUES; of
    parts, the reward in panels"""
    found, charts = curves(world), []
    for value in VALUES[world] if what == "rivals" else ("reward",):
        for names in FIGURES[what]:
            series = [band_of(name, found[name], value) for name in names if name in found]
            charts.append(report.svg_chart(series, "network evaluations per image", value,
                                           f"{world}: {value}", size=(620, 460)))
    (ASSETS / f"{what}-{world}.svg").write_text(report.svg_figure(charts, columns=len(charts)))


def band_of(name, seeds, value):
    runs = list(seeds.values())
    columns = list(zip(*(one[value] for one in runs)))
    return report.band(f"{name} ({len(runs)})", mean_of(runs)["cost"], columns)
