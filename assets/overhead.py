"""What an iteration costs beside its bare transformer calls, and how its cost grows.  python assets/overhead.py"""
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards  # noqa: E402
import vgrpo  # noqa: E402


def measure(repeats, *flags):
    """-> medians over interleaved repeats: seconds of an iteration, of its bare calls, and of their ratio"""
    from diffusers.training_utils import EMAModel
    cfg = vgrpo.parse_config(list(flags))
    policy, trainable = vgrpo.load_policy(cfg, torch.device("cpu"))
    params, scorer = list(trainable.values()), rewards.Rewards(cfg.reward)
    optimizer, ema = torch.optim.AdamW(params, lr=1e-6), EMAModel(params, decay=cfg.ema)
    prompts, _ = vgrpo.load_prompts(cfg)
    heard = []
    hook = policy.transformer.register_forward_hook(lambda m, args, kwargs, out: heard.append(kwargs), with_kwargs=True)
    items = {i: prompts[i] for i in range(cfg.prompts_per_iteration)}
    vgrpo.improve(policy, params, optimizer, ema, scorer, items, cfg, 1)
    hook.remove()
    calls = [(kwargs, len(kwargs["hidden_states"]) > cfg.group_size) for kwargs in heard]
    assert len(calls) == cfg.prompts_per_iteration * (cfg.steps + 1)

    def bare():
        for kwargs, trains in calls:
            with torch.set_grad_enabled(trains):
                output = policy.transformer(**kwargs)[0]
            if trains:
                output.sum().backward()
        optimizer.zero_grad()

    rows = []
    for i in range(repeats):
        clock = [time.perf_counter()]
        vgrpo.improve(policy, params, optimizer, ema, scorer, items, cfg, i + 2)
        clock.append(time.perf_counter())
        bare()
        clock.append(time.perf_counter())
        rows.append((clock[1] - clock[0], clock[2] - clock[1], (clock[1] - clock[0]) / (clock[2] - clock[1])))
    return SimpleNamespace(**dict(zip(("iteration", "bare", "ratio"), map(statistics.median, zip(*rows)))))


if __name__ == "__main__":
    base = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
    print(f"iteration {base.iteration:.3f} s, its bare calls {base.bare:.3f} s, ratio {base.ratio:.3f}")
    paper = "--prompts-per-iteration 6 --group-size 24 --steps 10 --n-mc 4 --solver euler --share both".split()
    for flags in (paper, ["--steps", "12"], ["--n-mc", "4"], ["--group-size", "24"]):
        twice = measure(7, *flags)
        print(f"{' '.join(flags)}: iteration {twice.iteration:.3f} s, ratio {twice.ratio:.3f}")
