"""What an iteration of the tiny model costs beside its network, and how that cost grows.

    python -m extras.overhead               # the medians of 25 rounds, minutes on a CPU
    python -m extras.overhead --rounds 5

For each setting three things are timed, in turn, since the speed of a machine drifts:
iteration: one of vgrpo.py's, whole.
bare calls: the transformer's calls of that iteration, on the same inputs, forward and, in the
    update, backward; nothing else.
loop: the iteration with a transformer and a VAE that answer at once. What is left is vgrpo.py's
    own work, the pipeline's, the sampler's, the reward's and the optimiser's.
"""
import argparse
import statistics
import time
from unittest.mock import patch

import torch

import rewards
import vgrpo

SETTINGS = {
    "the tiny recipe": "",
    "the paper's estimator": "--prompts-per-iteration 6 --group-size 24 --steps 10 --n-mc 4 "
                             "--solver euler --share both --updates 1",
    "--steps 12": "--steps 12",
    "--n-mc 4": "--n-mc 4",
    "--group-size 24": "--group-size 24",
}


class Setting:
    """An iteration with these flags, to be carried out again and again."""

    def __init__(self, *flags):
        self.cfg = vgrpo.parse_config([*flags, "--lr", "1e-6"])    # the network stays as it is
        device = torch.device("cpu")
        policy, trainable = vgrpo.load_policy(self.cfg, device)
        self.learner = vgrpo.start_learner(policy, trainable, self.cfg)
        self.scorer = rewards.Rewards(self.cfg.reward, device)
        prompts, _ = vgrpo.load_prompts(self.cfg, vgrpo.generator("held out"))
        indices = vgrpo.layout(self.cfg.prompts_per_iteration, self.cfg.updates)
        self.items = {i: vgrpo.pick_item(prompts, self.cfg, 1, i) for i in indices}
        images, _, _ = policy.generate("a", [vgrpo.generator("a picture's size")])
        self.picture = images.shape[1:]
        self.transformer, self.vae = policy.transformer, policy.pipe.vae
        self.calls = self.hear_calls(self.iteration)

    def hear_calls(self, work):
        """-> [(arguments, is it of the update?)] of the transformer's calls in work()"""
        calls = []

        def hear(network, args, kwargs):
            calls.append((kwargs, torch.is_grad_enabled()))

        with self.transformer.register_forward_pre_hook(hear, with_kwargs=True):
            work()
        return calls

    def iteration(self):
        vgrpo.run_iteration(self.learner, self.scorer, self.items, self.cfg, 1)

    def bare_calls(self):
        for arguments, trains in self.calls:
            with torch.set_grad_enabled(trains):
                output = self.transformer(**arguments)[0]
            if trains:
                output.sum().backward()
        self.learner.optimizer.zero_grad()

    def loop(self):
        params = list(self.learner.trainable.values())
        for p in params:                                  # the optimiser has all of them to step
            p.grad = torch.zeros_like(p)

        def velocity(hidden_states, **arguments):
            if torch.is_grad_enabled():                   # then something has to be trained
                hidden_states = hidden_states + 0 * params[0].sum()
            return (hidden_states,)

        def decode(latents, **options):
            return (latents.new_zeros(len(latents), *self.picture),)

        with (patch.object(self.transformer, "forward", velocity),
              patch.object(self.vae, "decode", decode)):
            self.iteration()

    def seconds(self):
        """-> of an iteration, of its bare calls, of its loop"""
        times = []
        for work in (self.iteration, self.bare_calls, self.loop):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return times


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="measurements of each setting [25]")
    rounds = parser.parse_args().rounds
    settings = {name: Setting(*flags.split()) for name, flags in SETTINGS.items()}
    times = {name: [] for name in settings}
    for _ in range(rounds):
        for name, setting in settings.items():
            times[name].append(setting.seconds())
    print("| setting | iteration, s | bare calls, s | their ratio | loop, s | loop / bare calls |")
    print("|---|---|---|---|---|---|")
    for name, rows in times.items():
        iteration, bare, loop = (statistics.median(column) for column in zip(*rows))
        ratio = statistics.median(row[0] / row[1] for row in rows)
        print(f"| {name} | {iteration:.3f} | {bare:.3f} | {ratio:.3f} | {loop:.3f} "
              f"| {loop / bare:.3f} |")


if __name__ == "__main__":
    main()
