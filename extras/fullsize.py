"""Does a model fit my GPU, and how fast does it train? In minutes, and without a download.

    python -m extras.fullsize --model sd3.5-medium                # the recipe, on one prompt a rank
    python -m extras.fullsize --model sd3.5-medium --sweep        # which flags are fastest here?
    python -m extras.fullsize --model sd3.5-medium --offload --micro-batch 1 --cap 24
    python -m extras.fullsize --model sd3.5-medium --count        # without a GPU: count memory

The networks have their full size and random weights; the reward is the mean brightness. All flags
of vgrpo.py are taken. --model may be any pipeline's folder or hub id: only its config files are
read, and for the short names not even they are needed.

The measured iteration is vgrpo.py's, whole; after one that is not counted, the medians of
--iterations. Operations are those carried out, recomputed ones too; their rate is compared with the
card's own in a large bf16 matrix product. --count adds up the bytes of all tensors that are alive
at once in each part of an iteration. What the allocator loses, what kernels need and what the
rewards weigh comes on top.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from unittest.mock import patch

import diffusers
import torch
import torch.distributed as dist
import transformers

import vgrpo
from extras.fullsize_count import PROMPT, count
from extras.fullsize_models import build_pipeline

from rewards import Rewards, UsageError

GB = 2 ** 30


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


# ---- measuring


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, repeats, device):
    """The median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matrix_rate(device):
    """Operations per second of a large matrix product in bf16."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, 20, device)


def load(cfg, device, text_layers):
    """vgrpo.py's policy and trainable weights, with a pipeline of random weights."""
    def make(name, create):
        with device:                                      # a GPU draws weights much faster
            part = create()
        waits = cfg.offload and name.startswith("text_encoder")
        sharded = vgrpo.is_sharded(cfg) and name == "transformer"
        return part.to("cpu") if waits or sharded else part

    torch.manual_seed(0)
    pipe = build_pipeline(cfg, make, text_layers)
    with patch.object(vgrpo, "load_pipeline", lambda cfg: pipe):
        return vgrpo.load_policy(cfg, device)


def measure(cfg, device, cap=0, text_layers=None):
    """Run iterations of vgrpo.py's.  -> {what: number}; seconds and rates are medians"""
    limit_memory(cap, device)
    rate = matrix_rate(device)
    policy, trainable = load(cfg, device, text_layers)
    learner = vgrpo.start_learner(policy, trainable, cfg)
    scorer = Rewards(cfg.reward, device)
    indices = vgrpo.layout(cfg.prompts_per_iteration, cfg.updates)
    items = {index: {"prompt": PROMPT} for index in indices}
    calls = {}                    # {(rows, is it of the update?): [arguments, how often]}

    def hear(network, args, kwargs):
        kind = len(kwargs["hidden_states"]), torch.is_grad_enabled()
        calls.setdefault(kind, [kwargs, 0])[1] += 1

    def iteration():
        return vgrpo.run_iteration(learner, scorer, items, cfg, 1)

    with policy.transformer.register_forward_pre_hook(hear, with_kwargs=True):
        iteration()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    lines = [iteration() for _ in range(cfg.iterations)]
    names = ("seconds_rollout", "seconds_update", "samples_per_second", "peak_memory_gb")
    result = {name: statistics.median(line[name] for line in lines) for name in names}
    images = cfg.prompts_per_iteration * cfg.group_size
    alone = seconds_alone(learner, calls, cfg.iterations, device)
    return {**result, "seconds": images / result["samples_per_second"], "seconds_of_calls": alone,
            "matrix_rate": rate, "trained": sum(p.numel() for p in trainable.values())}


def limit_memory(cap, device):
    if cap and device.type != "cuda":
        raise UsageError("--cap: there is no GPU here")
    if cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap * GB / total)


def seconds_alone(learner, calls, repeats, device):
    """What the network's calls of an iteration take by themselves, with the way back in updates."""
    def call(arguments, trains):
        with torch.set_grad_enabled(trains):
            output = learner.policy.transformer(**arguments)[0]
        if trains:
            output.backward(output.detach())
            learner.optimizer.zero_grad()

    total = 0
    for (_, trains), (arguments, times) in calls.items():
        total += times * seconds(partial(call, arguments, trains), repeats, device)
    return total


@cache
def operations(cfg, text_layers=None):
    """Of all networks in an iteration, on all ranks."""
    return sum(count(replace(cfg, shard=False), text_layers).operations.values())


def share_of_rate(result, cfg, text_layers=None):
    """The operations of an iteration per second, by those of the product on all cards."""
    work = operations(replace(cfg, compile=False, offload=False, micro_batch=1), text_layers)
    return work / result["seconds"] / result["matrix_rate"] / vgrpo.rank_and_ranks()[1]


def tell_measured(cfg, result, device, text_layers):
    ranks, card = vgrpo.rank_and_ranks()[1], f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        card = torch.cuda.get_device_name()
    share = share_of_rate(result, cfg, text_layers)
    print(f"{ranks} x {card}: {result['matrix_rate'] / 1e12:.2f} T operations/s in a bf16 product")
    print(f"{cfg.model} in {cfg.dtype}: {result['trained'] / 1e6:.1f} M numbers train")
    print(f"an iteration of {cfg.prompts_per_iteration} x {cfg.group_size} images: "
          f"{result['seconds']:.2f} s, of which rollout {result['seconds_rollout']:.2f} s and "
          f"update {result['seconds_update']:.2f} s; its network calls alone "
          f"{result['seconds_of_calls']:.2f} s")
    print(f"{result['samples_per_second']:.3f} images/s at {share:.0%} of the product's rate; "
          f"peak memory {result['peak_memory_gb']:.1f} GB a rank")


# ---- trying flags


def sweep(flags, group_size):
    """Try flags, each in a process of its own; print a table and the fastest that fit."""
    table = {}                    # {flags: {what: number}, or why there is none}

    def fits(*variation):
        print(f"trying {' '.join(variation)} ...", end=" ", flush=True)
        table[variation] = result = run_alone([*flags, *variation])
        if isinstance(result, str):
            print(result, flush=True)
            return False
        print(f"{result['samples_per_second']:.3f} images/s", flush=True)
        return True

    for variation in ("--no-compile", "--compile"):
        fits(variation)
    best = fastest(table) or ("--no-compile",)
    for checkpointing in ("--checkpointing", "--no-checkpointing"):
        fitting = 0
        for size in sizes(group_size):                    # the largest two that fit
            fitting += fits(*best, checkpointing, "--micro-batch", str(size))
            if fitting == 2:
                break
    if not fastest(table):
        fits("--offload", "--checkpointing", "--micro-batch", "1")
    tell_table(table, flags)


def tell_table(table, flags):
    print("| flags | images/s | share of the card's bf16 matrix rate | memory, GB |")
    print("|---|---|---|---|")
    for variation, result in table.items():
        cells = f"{result} | | "
        if isinstance(result, dict):
            share = share_of_rate(result, read_flags([*flags, *variation])[0])
            cells = (f"{result['samples_per_second']:.3f} | {share:.0%} | "
                     f"{result['peak_memory_gb']:.1f}")
        print(f"| {' '.join(variation)} | {cells} |")
    best = fastest(table)
    print(f"fastest: {' '.join([*flags, *best])}" if best else "nothing fits this card")


def sizes(group_size):
    """Micro-batches that divide a group, the largest first."""
    return [size for size in range(group_size, 0, -1) if group_size % size == 0]


def fastest(table):
    """The flags of the most images/s, None if nothing fits."""
    fitting = [flags for flags, result in table.items() if isinstance(result, dict)]
    return max(fitting, key=lambda flags: table[flags]["samples_per_second"], default=None)


def run_alone(flags):
    """Measure in a new process, whose memory is empty.  -> {what: number}, or why not"""
    command = [sys.executable, "-m", "extras.fullsize", *flags, "--json"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if "out of memory" in process.stderr.lower():
        return "does not fit"
    lines = process.stderr.strip().splitlines() or [f"ended with {process.returncode}"]
    return lines[-1]


# ---- counting


def tell_count(cfg, args):
    result = count(cfg, args.text_layers)
    print(f"{cfg.model} in {cfg.dtype}: {result.weights / GB:.1f} GB of weights and moments, "
          f"{result.text / GB:.1f} of them text encoders")
    for part, size in result.memory.items():
        print(f"  {part}: {size / GB:.1f} GB")
    total = sum(result.operations.values())
    parts = ", ".join(f"{part} {number / total:.0%}" for part, number in result.operations.items())
    print(f"an iteration of {cfg.prompts_per_iteration} x {cfg.group_size} images: "
          f"{total / 1e15:.2f} P operations ({parts})")
    for share in args.share_of_rate:
        one = total / (share * args.rate * 1e12)
        print(f"arithmetic, no measurement: at {share:.0%} of {args.rate:.0f} T operations/s it "
              f"takes {one:.1f} s on one GPU, {one / 8:.1f} s on eight; rewards are not in it")


def read_flags(given, ranks=1):
    """-> vgrpo.py's flags as a Config, those of this script"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--sweep", action="store_true", help="try flags on this card")
    parser.add_argument("--count", action="store_true", help="count memory, without a GPU")
    parser.add_argument("--cap", type=float, default=0,
                        help="GB (2^30 bytes) of the GPU's memory that may be used")
    parser.add_argument("--rate", type=float, default=800,
                        help="T operations/s in bf16 that --count's arithmetic takes [800]")
    parser.add_argument("--share-of-rate", type=float, nargs="+", default=[0.45],
                        help="the shares of --rate that it takes as reached [0.45]")
    parser.add_argument("--text-layers", type=int,
                        help="depth of the text encoders, at most: for a machine of little memory")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    args, flags = parser.parse_known_args(given)
    if not args.count:            # a count is of the recipe's iteration, the rest of a short one
        flags = ["--reward", f"{__file__}:brightness", "--iterations", "3", "--updates", "1",
                 "--prompts-per-iteration", str(ranks), *flags]
    return vgrpo.parse_config(["--model", "sd3.5-medium", *flags]), args


def main():
    for library in (diffusers, transformers):             # they warn of what is made up here
        library.utils.logging.set_verbosity_error()
    if "--sweep" in sys.argv:
        flags = [flag for flag in sys.argv[1:] if flag != "--sweep"]
        cfg, _ = read_flags(flags)
        return sweep(flags, cfg.group_size)
    device = vgrpo.start_ranks()
    cfg, args = read_flags(sys.argv[1:], vgrpo.rank_and_ranks()[1])
    if args.count:
        return tell_count(cfg, args)
    result = measure(cfg, device, args.cap, args.text_layers)
    if args.json:
        vgrpo.say(json.dumps(result))
    elif vgrpo.is_main():
        tell_measured(cfg, result, device, args.text_layers)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"fullsize: error: {error}")
