"""Runs at equal cost, on the same prompts, rewards and noise: V-GRPO, its rivals, and its parts.

    python -m extras.evidence rivals mini      # GenEval in miniature, two hours on two cores
    python -m extras.evidence parts mini       # one part changed at a time, half an hour
    python -m extras.evidence rivals tiny      # coloured shapes, an hour and a half

All rows get the same courtesy. Short trials on a seed that is not reported compare settings: three
learning rates and, where a rival is at its best, also 1, 2 or 4 gradient steps an iteration, on 4
timesteps per image. The best two of them run on seeds 0, 1, ..., and a table shows the one that
ends highest there. Parts are not tuned: all run at the middle rate. A run ends when it has cost
BUDGET: network evaluations per image, a forward pass counts 1, a backward pass 2.

A finished run stays in assets/runs.json and is not repeated, so a command goes on where it was
stopped. Who changes the flags of a row deletes its runs there. One command at a time.
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
FINALISTS = 2                              # settings of a row that run on the seeds
TUNED_ON = 100                             # the seed that is not reported
RATES = {"tiny": ("3e-4", "6e-4", "1.2e-3"), "mini": ("1e-4", "2e-4", "4e-4")}
VALUES = {                                 # what a table calls what an evaluation measures
    "tiny": {"reward": "eval/shapes", "strict": "eval/shapes-strict"},
    "mini": {"reward": "eval/objects", "strict": "eval/objects-strict",
             "as drawn": "eval/as-drawn"}}
LEVEL = {"tiny": 0.9, "mini": 0.6}         # whose cost a table tells
SAME = "--solver euler --steps 10 --prompts-per-iteration 12 --group-size 12"
DPM = "--solver dpm++ --steps 6"
FOUR = "--updates 4 --clip 0.01"
PAPER = "--n-mc 4 --share both --no-antithetic"
ONE = PAPER + " --updates 1 --soft-clip 3"
OURS, ESTIMATOR = "V-GRPO, our recipe", "V-GRPO, the paper's estimator"
ONE_UPDATE = "V-GRPO, the paper's, 1 update"
BEST, SAMPLED = ", at its best", ", sampled as ours"
RIVALS = {  # name: flags, the cost of an iteration, seeds
    OURS: (f"{FOUR} --n-mc 2 --share matched {DPM}", 13.5, 5),
    "V-GRPO, matched pairs": (f"{FOUR} --n-mc 4 --share matched", 25, 5),
    ESTIMATOR: (f"{FOUR} {PAPER}", 25, 5),
    ONE_UPDATE: (ONE, 22, 5),
    "DiffusionNFT": ("--method nft", 46, 5),
    "DiffusionNFT" + BEST: ("--method nft --timesteps 4", 26, 3),
    "DiffusionNFT" + SAMPLED: (f"--method nft --timesteps 2 --updates 4 {DPM}", 14, 3),
    "MixGRPO": ("--method mixgrpo", 22, 5),
    "MixGRPO" + BEST: ("--method mixgrpo --timesteps 4", 22, 3),
    "Flow-GRPO": ("--method flow-grpo", 37, 3),
    "Flow-GRPO" + BEST: ("--method flow-grpo --timesteps 4", 22, 3),
    "AWM": ("--method awm", 40, 3),
    "AWM" + BEST: ("--method awm --timesteps 4", 30, 5),
    "AWM" + SAMPLED: (f"--method awm --timesteps 2 --updates 4 {DPM}", 16, 3),
    "EPG": ("--method epg", 55, 3),
    "EPG" + BEST: ("--method epg --timesteps 4", 30, 5),
    "EPG" + SAMPLED: (f"--method epg --timesteps 2 --updates 4 {DPM}", 16, 3),
    "RAM": ("--method ram", 30, 3),
    "RAM" + BEST: ("--method ram --timesteps 4", 30, 3),
}
PARTS = {   # the paper's with 1 update, but for what the name says; 4 have no soft clip
    "nothing shared": (f"{ONE} --share none", 22, 3),
    "matched": (f"{ONE} --share matched", 22, 3),
    "antithetic": (f"{ONE} --antithetic", 22, 3),
    "no strata": (f"{ONE} --no-stratified", 22, 3),
    "weight x": (f"{ONE} --weight x", 22, 3),
    "weight v": (f"{ONE} --weight v", 22, 3),
    "weight eps": (f"{ONE} --weight eps", 22, 3),
    "naive: none of these": (f"{ONE} --share none --no-stratified --weight v", 22, 3),
    "N_MC 2": (f"{ONE} --n-mc 2", 16, 3),
    "6 steps of DPM-Solver++": (f"{ONE} {DPM}", 18, 3),
    "no soft clip": (f"{ONE} --soft-clip 0", 22, 3),
    "4 updates, no control": (f"{FOUR} {PAPER} --clip 0", 25, 3),
    "4 updates, KL .3": (f"{FOUR} {PAPER} --clip 0 --kl 0.3", 25, 3),
}
ROWS = {**RIVALS, **PARTS}
FIGURES = {
    "rivals": ((OURS, ESTIMATOR, ONE_UPDATE, "EPG" + BEST, "AWM" + BEST, "DiffusionNFT" + BEST,
                "DiffusionNFT", "MixGRPO"),),
    "parts": ((ONE_UPDATE, "nothing shared", "matched", "no strata"),
              (ONE_UPDATE, "weight x", "weight v", "weight eps", "naive: none of these"),
              (ONE_UPDATE, ESTIMATOR, "4 updates, no control", "4 updates, KL .3"))}

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


def try_settings(world, names):
    """-> {name: its settings for the seeds}, those whose last two evaluations were the highest"""
    all_runs([(world, name, setting, TUNED_ON) for name in names
              for setting in settings(world, name)])
    runs, best = load(), {}
    for name in names:
        tried = sum((find(runs, world, name, setting, TUNED_ON)
                     for setting in settings(world, name)), [])
        tried.sort(key=lambda one: sum(one["reward"][-2:]), reverse=True)
        best[name] = [one["setting"] for one in tried[:FINALISTS]]
    return best


def run_on_seeds(world, settings_of):
    """The rows of {name: settings}, a seed of all of them before the next."""
    most = max(ROWS[name][2] for name in settings_of)
    all_runs([(world, name, setting, seed) for seed in range(most)
              for name, settings in settings_of.items() for setting in settings
              if seed < ROWS[name][2]])


def compare(world, what):
    """what: rivals or parts"""
    if what == "rivals":
        run_on_seeds(world, try_settings(world, RIVALS))
    else:
        rows = (ONE_UPDATE, ESTIMATOR, *PARTS)
        run_on_seeds(world, dict.fromkeys(rows, [setting_of_parts(world)]))


def setting_of_parts(world):
    return f"--lr {RATES[world][1]}"


# ---- tables and figures


def curves(world, what):
    """-> {name: {seed: its run}}, of the setting that ends highest, among those with most seeds"""
    found = {}
    for one in load():
        if what == "parts" and one["setting"] != setting_of_parts(world):
            continue
        if one["world"] == world and one["seed"] != TUNED_ON:
            found.setdefault(one["name"], {}).setdefault(one["setting"], {})[one["seed"]] = one

    def rank(seeds):
        return len(seeds), statistics.mean(one["reward"][-1] for one in seeds.values())
    return {name: max(found[name].values(), key=rank) for name in ROWS if name in found}


def mean_of(runs):
    """The mean over seeds of each list."""
    names = [name for name, values in runs[0].items() if isinstance(values, list)]
    return {name: [statistics.mean(values)
                   for values in zip(*(one[name] for one in runs), strict=True)]
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
    """What the reference had spent where the other ends, over what the other has spent; inf: it
    never comes there"""
    needed = when(reference, other["reward"][-1], axis)
    return math.inf if needed is None else needed / other[axis][-1]


def number(value, form, missing=""):
    return missing if value is None or value == math.inf else f"{value:{form}}"


def table(world, what):
    """Rows of rivals or parts, the reference first."""
    found, reference = curves(world, what), OURS if what == "rivals" else ONE_UPDATE
    every = RIVALS if what == "rivals" else (ONE_UPDATE, ESTIMATOR, *PARTS)
    names = [name for name in every if name in found]
    if reference not in found or len(names) < 2:
        return []
    lines = [f"| {world}: method | seeds | setting | cost of an iteration | cost to {LEVEL[world]} "
             f"| reward at the end | strict | as drawn | share of its cost until {reference} is "
             "where it ends | of its seconds | as drawn there |", "|" + 11 * "---|"]
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
            f"{mean['cost'][-1] / mean['iteration'][-1]:.3g}",
            number(when(mean, LEVEL[runs[0]["world"]], "cost"), ".0f", "never"),
            f"{mean['reward'][-1]:.3f} ({min(ends):.3f} to {max(ends):.3f})",
            f"{mean['strict'][-1]:.3f}", number(mean.get("as drawn", [None])[-1], ".3f")]


def comparison(reference, seeds):
    """On the seeds that both have: the share of cost, of mean curves (lowest and highest of a
    seed); that of seconds; the reference's "as drawn" where the other ends"""
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
    found, charts = curves(world, what), []
    for value in VALUES[world] if what == "rivals" else ("reward",):
        for names in FIGURES[what]:
            series = [band_of(name, found[name], value) for name in names if name in found]
            charts.append(report.svg_chart(series, "network evaluations per image", value,
                                           f"{world}: {value}", size=(620, 460)))
    (ASSETS / f"{what}-{world}.svg").write_text(report.svg_figure(charts))


def band_of(name, seeds, value):
    runs = list(seeds.values())
    columns = list(zip(*(one[value] for one in runs)))
    return report.band(f"{name} ({len(runs)})", mean_of(runs)["cost"], columns)
