"""What an iteration costs beside its networks, and how its cost grows.  python assets/overhead.py"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rewards  # noqa: E402
import vgrpo  # noqa: E402


def prepare(*flags):
    """-> a function that measures the seconds of three things, one after the other.
    iteration: improve(), whole. bare: its transformer calls on the same inputs, forward and backward, and no
    more. loop: improve() with a transformer and a VAE that answer at once: the loop, the sampler, the reward.
    """
    from diffusers.training_utils import EMAModel
    cfg = vgrpo.parse_config(list(flags))
    policy, trainable = vgrpo.load_policy(cfg, torch.device("cpu"))
    params, scorer = list(trainable.values()), rewards.Rewards(cfg.reward)
    optimizer, ema = torch.optim.AdamW(params, lr=1e-6), EMAModel(params, decay=cfg.ema)
    items = dict(enumerate(vgrpo.load_prompts(cfg)[0][:cfg.prompts_per_iteration]))
    transformer, vae, heard = policy.transformer, policy.pipe.vae, []

    def iteration():
        vgrpo.improve(policy, params, optimizer, ema, scorer, items, cfg, 1)

    def hear(module, args, kwargs, output):
        heard.append(kwargs)

    with transformer.register_forward_hook(hear, with_kwargs=True):
        iteration()
    calls = [(kwargs, len(kwargs["hidden_states"]) > cfg.group_size) for kwargs in heard]
    assert len(calls) == cfg.prompts_per_iteration * (cfg.steps + 1)

    def bare():
        for kwargs, trains in calls:
            with torch.set_grad_enabled(trains):
                output = transformer(**kwargs)[0]
            if trains:
                output.sum().backward()
        optimizer.zero_grad()

    def at_once(hidden_states, **kwargs):
        return (hidden_states + 0 * params[0].sum() if torch.is_grad_enabled() else hidden_states,)

    def loop():
        forward, decode, pixels = transformer.forward, vae.decode, torch.zeros(cfg.group_size, 3, 32, 32)
        transformer.forward, vae.decode = at_once, lambda z, **kwargs: (pixels,)
        for p in params:                                   # the optimiser has all of them to step
            p.grad = torch.zeros_like(p)
        iteration()
        transformer.forward, vae.decode = forward, decode

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return lambda: [seconds(work) for work in (iteration, bare, loop)]


if __name__ == "__main__":
    paper = "--prompts-per-iteration 6 --group-size 24 --steps 10 --n-mc 4 --solver euler --share both"
    settings = ("", paper, "--steps 12", "--n-mc 4", "--group-size 24")
    measures, rows = [prepare(*flags.split()) for flags in settings], {flags: [] for flags in settings}
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 25):         # in turn: a machine's speed drifts
        for flags, measure in zip(settings, measures):
            rows[flags].append(measure())
    for flags, times in rows.items():
        whole, bare_calls, own = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(row[0] / row[1] for row in times)
        print(f"{flags or 'tiny recipe'}: iteration {whole:.3f} s, its bare transformer calls "
              f"{bare_calls:.3f} s, ratio {ratio:.3f}; without transformer and VAE {own:.3f} s, which is "
              f"{own / bare_calls:.3f} of the bare calls")
