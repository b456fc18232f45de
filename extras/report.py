"""A page to look at runs with: curves, samples, flags that differ, last values.

    python -m extras.report RUN [RUN ...]                # writes report.html
    python -m extras.report runs/* --out all.html

A RUN is a run folder. The page is one file that needs no network: report.html, the template beside
this file, with the runs' numbers and pictures written into it. svg_chart() draws a line chart that
stands still, for a README, and svg_figure() puts several of them into one picture.
"""
import argparse
import base64
import contextlib
import html
import io
import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

from PIL import Image

OWN = ("seed", "out", "resume")        # flags in which runs of one group may differ
HEAVY = 400_000                        # bytes from which a still picture is made smaller
MOST = 24                              # evaluations whose samples the page holds
# Curves 0 to 3 and 4 to 7 (dashed), paper, ink. Colour-blind eyes can tell four of a kind apart.
LIGHT = ("#667bcd #d56f60 #075a00 #761788 #8a7d08 #5b23ba #2fa2b0 #92224f", "#ffffff", "#222222")
DARK = ("#4473f8 #dc402a #a9f09a #ec89bc #f3d702 #8e9def #7ce9f8 #e56e7f", "#16181c", "#e6e6e6")

class DamagedRun(ValueError):
    """A folder that cannot be shown: one line that names it."""

# ---- what a run folder holds

def read_run(path):
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        flags = dict(config["flags"])
        about = {**config.get("versions", {}), "commit": config.get("commit", "")}
        text = (folder / "metrics.jsonl").read_text()
    except OSError as error:
        raise DamagedRun(f"{path}: not a run ({Path(error.filename).name}: {error.strerror})")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedRun(f"{path}: config.json or metrics.jsonl is damaged")
    lines = read_lines(path, text)
    trained = [line for line in lines if "eval" not in line]
    for line in trained:
        parts = [value for name, value in line.items() if name.startswith("seconds_")]
        line.setdefault("seconds", sum(parts))
        line.setdefault("nfe", cost_of(line))
    samples = {}
    for file in sorted((folder / "samples").glob("[0-9]" * 6 + ".*")):
        samples.setdefault(int(file.stem), []).append(file)
    return {"path": str(path), "flags": flags, "about": about, "samples": samples,
            "train": columns_of(trained, trained),
            "eval": columns_of([line for line in lines if "eval" in line], trained)}

def read_lines(path, text):
    """The lines of metrics.jsonl. A kill may have cut the last one: it has no line break."""
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            values = json.loads(line)
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            lines.append({**numbers, "iteration": int(values["iteration"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedRun(f"{path}: line {number} of metrics.jsonl is damaged")
    if not lines:
        raise DamagedRun(f"{path}: metrics.jsonl has no line yet")
    return lines

def cost_of(line):
    """An iteration's network evaluations per image: a forward pass counts 1, a backward pass 2."""
    parts = ("nfe_rollout", "nfe_old", "nfe_train")
    rollout, old, train = (line.get(part, math.nan) for part in parts)
    return rollout + old + 3 * train

def columns_of(lines, trained):
    """-> {"x": {"iteration", "cost", "seconds"}, "y": {metric}}, a list for each name.
    Cost and seconds are sums over the iterations so far; evaluations add nothing to them.
    """
    so_far, cost, seconds = {0: (0, 0)}, 0, 0
    for line in trained:
        cost += line["nfe"]
        seconds += line["seconds"]
        so_far[line["iteration"]] = cost, seconds
    unknown = math.nan, math.nan
    points = [(line["iteration"], *so_far.get(line["iteration"], unknown)) for line in lines]
    axes = enumerate(("iteration", "cost", "seconds"))
    names = dict.fromkeys(name for line in lines for name in line if name != "iteration")
    return {"x": {axis: [digits(point[i]) for point in points] for i, axis in axes},
            "y": {name: [digits(line.get(name, math.nan)) for line in lines] for name in names}}

def digits(value):
    """Seven of them; None, which is JSON's null, for what is not a number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None

# ---- several runs on a page

def short_names(paths):
    """The paths without the folders that all begin with."""
    paths = [Path(path).resolve() for path in paths]
    start = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(start)) for path in paths]

def groups_of(runs):
    """Runs of the same flags but --seed.  -> [{"label", "runs": their places in the list}]"""
    groups = {}
    for place, run in enumerate(runs):
        same = {name: value for name, value in run["flags"].items() if name not in OWN}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(place)
    members = [[runs[place]["name"] for place in places] for places in groups.values()]
    labels = [group_label(names) for names in members]
    if len(set(labels)) < len(labels):
        labels = [", ".join(names) for names in members]
    return [{"label": label, "runs": places} for label, places in zip(labels, groups.values())]

def group_label(names):
    """What the names begin with, without a number or a dash at its end."""
    if len(names) == 1:
        return names[0]
    start = re.sub(r"[-_./ ]+$|[-_./ ]*\d+$", "", os.path.commonprefix(names))
    return f"{start or names[0]} ({len(names)} seeds)"

def picture(path):
    """A file as a data: address; a heavy still one as JPEG."""
    kind, content = path.suffix[1:], path.read_bytes()
    if kind == "png" and len(content) > HEAVY:
        with contextlib.suppress(OSError):                # of a picture that a kill cut off
            smaller = io.BytesIO()
            Image.open(path).convert("RGB").save(smaller, "jpeg", quality=88)
            kind, content = "jpeg", smaller.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"

def spread(values, most):
    """At most so many of the values, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]

def page(runs, problems=()):
    names = short_names([run["path"] for run in runs])
    runs = [{**run, "name": name} for run, name in zip(runs, names)]
    evaluations = spread(sorted({i for run in runs for i in run["samples"]}), MOST)
    for run in runs:
        run["samples"] = {i: [picture(file) for file in files]
                          for i, files in run["samples"].items()
                          if i in evaluations or i == max(run["samples"])}
    tables = [{**run["flags"], **run["about"]} for run in runs]
    flags = {name: [table.get(name) for table in tables] for table in tables for name in table}
    differing = [name for name, values in flags.items() if name not in ("out", "resume")
                 and any(value != values[0] for value in values)]
    data = {"runs": runs, "groups": groups_of(runs), "flags": flags, "differing": differing,
            "problems": list(problems)}
    # A browser must not take what a run wrote for the end of the script.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text()
    return template.replace("COLOURS_AS_CSS", colours()).replace("RUNS_AS_JSON", text)

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", default="report.html", help="the page's file [report.html]")
    args = parser.parse_args(argv)
    runs, problems = [], []
    for path in args.runs:
        try:
            runs.append(read_run(path))
        except DamagedRun as error:
            problems.append(str(error))
            print(error, file=sys.stderr)
    if not runs:
        sys.exit(2)
    try:
        Path(args.out).write_text(page(runs, problems))
    except OSError as error:
        sys.exit(f"--out {args.out}: {error.strerror}")
    print(f"{args.out}: {len(runs)} of {len(args.runs)} runs")

# ---- charts that stand still

def colours():
    """CSS of the classes c0 to c7, paper and ink: light or dark as the reader's screen is."""
    rules = []
    for curves, *others in (LIGHT, DARK):
        names = ("c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "paper", "ink")
        pairs = zip(names, curves.split() + others)
        rules.append(" ".join(f".{name} {{ color: {colour} }}" for name, colour in pairs))
    return f"{rules[0]}\n@media (prefers-color-scheme: dark) {{ {rules[1]} }}"

def svg_chart(series, xlabel, ylabel, title="", size=(560, 340), xlim=None, ylim=None):
    """A line chart as SVG.
    series [(label, xs, ys, lows, highs)]: a line each, and a band unless lows and highs are None
    """
    width, height = size
    left, right, bottom, legend = 60, width - 20, height - 46, 46 if title else 22
    top = legend + 18 * len(series)
    every_x = [x for _, xs, *_ in series for x in xs]
    every_y = [y for _, _, *columns in series for column in columns if column for y in column]
    across, x_marks = axis(xlim or (min(every_x), max(every_x)), left, right)
    down, y_marks = axis(ylim or (min(every_y), max(every_y)), bottom, top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" stroke-width="2">',
        f"<style>{colours()}</style>",
        '<rect class="paper" width="100%" height="100%" fill="currentColor"/>',
        words(left, 24, title, "start"), words((left + right) / 2, height - 8, xlabel),
        f'<g transform="translate(14 {(top + bottom) / 2}) rotate(-90)">{words(0, 0, ylabel)}</g>']
    for y in y_marks:
        parts += [words(left - 8, down(y) + 4, f"{y:.6g}", "end"),
                  f'<path class="ink" d="M{left} {down(y):.1f}H{right}" stroke="currentColor" '
                  'stroke-width="1" opacity=".15"/>']
    parts += [words(across(x), bottom + 18, f"{x:.6g}") for x in x_marks]
    for i, (label, xs, ys, lows, highs) in enumerate(series):
        y = legend + 18 * i
        line = points(map(across, xs), map(down, ys))
        dash = ' stroke-dasharray="6 3"' if i % 8 > 3 else ""
        parts += [f'<g class="c{i % 8}" fill="none" stroke="currentColor"{dash}>',
                  f'<path d="M{left} {y - 4}h20"/>', f'<polyline points="{line}"/>']
        if lows is not None:
            band = points(map(across, [*xs, *xs[::-1]]), map(down, [*lows, *highs[::-1]]))
            parts.append(f'<polygon points="{band}" fill="currentColor" stroke="none" '
                         'opacity=".2"/>')
        parts += ["</g>", words(left + 28, y, label, "start")]
    return "\n".join([*parts, "</svg>"])

def band(label, xs, columns):
    """For svg_chart: the mean of several values at each x, from the lowest to the highest."""
    return label, xs, *(list(map(f, columns)) for f in (statistics.mean, min, max))

def points(xs, ys):
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))

def words(x, y, text, anchor="middle"):
    return (f'<text class="ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" stroke="none" '
            f'fill="currentColor">{html.escape(text)}</text>')

def axis(limits, start, end):
    """-> a function from values to places between start and end, and round values to mark"""
    low, high = limits
    high = high if high > low else low + 1
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * i for i in (1, 2, 5, 10) if power * i * 5.01 >= high - low)
    first, final = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)

    def place(value):                                     # one beyond the limits lies on the edge
        share = (value - low) / (high - low)
        return start + (end - start) * min(max(share, 0), 1)

    return place, [i * step for i in range(first, final + 1)]

def svg_figure(charts, columns=2):
    """Charts of one size, row by row, as one SVG."""
    width, height = map(int, re.search(r'width="(\d+)" height="(\d+)"', charts[0]).groups())
    wide, high = columns * width, math.ceil(len(charts) / columns) * height
    placed = [f'<svg x="{i % columns * width}" y="{i // columns * height}" ' + chart[len("<svg "):]
              for i, chart in enumerate(charts)]
    size = f'width="{wide}" height="{high}" viewBox="0 0 {wide} {high}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *placed, "</svg>"])

if __name__ == "__main__":
    main()
