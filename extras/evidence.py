"""The paper's claims in miniature: minutes to hours on two cores.

    python -m extras.evidence                 # the next four, where they are missing
    python -m extras.evidence rivals mini     # V-GRPO and its rivals at equal cost
    python -m extras.evidence parts mini      # what each part of V-GRPO gives
    python -m extras.evidence noise           # the gradient's noise (evidence_noise.py)
    python -m extras.evidence report          # tables and pictures of all
    python -m extras.evidence rivals tiny     # on the 24 prompts of the quick start

The data are in assets/runs.json and noise.json, tables in evidence.md, and pictures beside.
"""
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from extras import evidence_noise, evidence_runs

ASSETS = Path(__file__).parents[1] / "assets"
NOISE = ASSETS / "noise.json"
STUDIES = [("mini", "rivals"), ("mini", "parts"), ("tiny", "rivals")]


def measure_noise():
    with ProcessPoolExecutor(2) as pool:
        rollouts = list(pool.map(evidence_noise.gradient_noise, (1, 2, 3)))
    NOISE.write_text(json.dumps(rollouts, indent=0))


def write_report():
    tables = [evidence_noise.table(json.loads(NOISE.read_text()))]
    for study in STUDIES:
        lines = evidence_runs.table(*study)
        if lines:
            tables.append(lines)
            evidence_runs.figure(*study)
    text = "\n\n".join("\n".join(lines) for lines in tables)
    (ASSETS / "evidence.md").write_text(text + "\n")
    print(text)


def main():
    match sys.argv[1:]:
        case []:
            for study in STUDIES[:2]:
                evidence_runs.compare(*study)
            if not NOISE.exists():
                measure_noise()
            write_report()
        case ["noise"]:
            measure_noise()
        case ["report"]:
            write_report()
        case [what, world] if (world, what) in STUDIES:
            evidence_runs.compare(world, what)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
