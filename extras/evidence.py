"""The paper's claims in miniature: minutes to hours on two cores.

    python -m extras.evidence rivals tiny     # V-GRPO and its rivals at equal cost
    python -m extras.evidence rivals mini     # the same on GenEval in miniature
    python -m extras.evidence runs            # what each part of V-GRPO gives, on the tiny model
    python -m extras.evidence noise           # the gradient's noise (evidence_noise.py)
    python -m extras.evidence report          # tables and pictures of all

The data are in assets/rivals.json and evidence.json, tables in evidence.md, and pictures beside.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from extras import evidence_noise, evidence_rivals, report

ROOT = Path(__file__).parents[1]
ASSETS, RUNS = ROOT / "assets", ROOT / "runs" / "evidence"
WORLDS = "tiny", "mini"
ITERATIONS = 100
EVALS = ("eval/shapes", "eval/shapes-strict")

# The paper's estimator at the scale of the tiny model; every other run says what it changes.
PAPER = ("--prompts-per-iteration 6 --group-size 24 --share both --no-antithetic --n-mc 4 "
         "--lr 3e-4 --solver euler --steps 10 --soft-clip 3 --updates 1 --clip 0")
EIGHT = PAPER + " --prompts-per-iteration 8 --group-size 18"
FOUR = EIGHT + " --updates 4 --soft-clip 0"
CURVES = {  # name -> flags, seeds
    "paper": (PAPER, 5),
    "tiny recipe": ("", 5),
    "6 steps, N_MC 2, matched": ("--soft-clip 3 --updates 1 --clip 0", 5),
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
    ("paper", "6 steps, N_MC 2, matched", "share: matched"),
    ("paper", "share: none", "no strata", "weight: v", "naive"),
    ("paper", "weight: x", "weight: v", "weight: eps"),
    ("paper", "N_MC 2", "N_MC 8", "antithetic"),
    ("8 x 18", "8 x 18, 4 updates, no control", "8 x 18, 4 updates, clip .01",
     "8 x 18, 4 updates, KL .3"),
    ("paper", "DPM-Solver++, 10 steps", "DPM-Solver++, 6 steps"),
)

def keep(key, value):
    path = ASSETS / "evidence.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data[key] = value
    path.write_text(json.dumps(data, indent=0))


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


def write_report():
    data, curves = json.loads((ASSETS / "evidence.json").read_text()), {}
    for run in data["runs"]:
        curves.setdefault(run["name"], []).append(run)
    tables = [evidence_noise.table(data["noise"]), runs_table(curves),
              *map(evidence_rivals.table, WORLDS)]
    text = "\n\n".join("\n".join(lines) for lines in tables if lines)
    for world in WORLDS:
        evidence_rivals.figure(world)
    (ASSETS / "evidence.md").write_text(text + "\n")
    print(text)
    (ASSETS / "evidence.svg").write_text(
        report.svg_figure([panel(curves, names) for names in PANELS], columns=3))
    samples = sorted((RUNS / "tiny_recipe-0" / "samples").glob("*.png"))
    if samples:
        side_by_side(samples[0], samples[-1]).save(ASSETS / "learning.png")


def panel(curves, names):
    """The evaluation over what it cost, with a line for each name."""
    series = []
    for name in names:
        evals = [run["evals"] for run in curves[name]]
        xs = [iteration * curves[name][0]["cost"] for iteration, *_ in evals[0]]
        values = [[value for _, value, _ in each] for each in zip(*evals)]
        series.append(report.band(f"{name} ({len(evals)})", xs, values))
    return report.svg_chart(series, "network evaluations per image", "evaluation")


def side_by_side(*paths):
    """Pictures in a row."""
    pictures = [Image.open(path) for path in paths]
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width
    return sheet


def main():
    what = sys.argv[1:]
    if what == ["noise"]:
        with ProcessPoolExecutor(2) as pool:
            keep("noise", list(pool.map(evidence_noise.gradient_noise, (1, 2, 3))))
    elif what[:1] == ["rivals"] and what[1:] and what[1] in WORLDS:
        evidence_rivals.compare(what[1])
    elif what == ["runs"]:
        jobs = [(name, flags, seed) for name, (flags, seeds) in CURVES.items()
                for seed in range(seeds)]
        with ThreadPoolExecutor(2) as pool:
            keep("runs", list(pool.map(one_run, *zip(*jobs))))
    elif what == ["report"]:
        write_report()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
