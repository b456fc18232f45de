"""Draw learning.png from runs: python assets/learning.py runs/A runs/B ...   (needs matplotlib)

The runs' evaluations are kept in learning.json beside it; the pictures are those of the first run.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

here = Path(__file__).parent
runs = [Path(name) for name in sys.argv[1:]]
data = {}
for run in runs:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data[json.loads((run / "config.json").read_text())["flags"]["seed"]] = [line for line in lines if "eval" in line]
(here / "learning.json").write_text(json.dumps(data, indent=1))
pictures = sorted((runs[0] / "samples").glob("*.png"))
figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1, 1))
for axis, path, title in ((axes[0], pictures[0], "before"), (axes[1], pictures[-1], f"after {int(pictures[-1].stem)}")):
    axis.imshow(plt.imread(path))
    axis.set_title(title)
    axis.axis("off")
for seed, lines in data.items():
    axes[2].plot([line["iteration"] for line in lines], [line["eval/shapes"] for line in lines], label=f"seed {seed}")
axes[2].set(xlabel="iteration", title="held-out evaluation: share of colour, shape, side right", ylim=(0.4, 1))
axes[2].grid(alpha=.3)
axes[2].legend()
figure.tight_layout()
figure.savefig(here / "learning.png", dpi=80)
