"""The command line: flags from a dataclass, signals, and errors that end in one line."""
import argparse
import faulthandler
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import diffusers
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from extras.recipes import GET_MODEL, MODELS, NEEDS, RECIPES, recipe_of
from rewards import RunError, UsageError, one_line

CHOICES = {
    "recipe": tuple(RECIPES),
    "solver": ("euler", "dpm++"),
    "share": ("both", "timestep", "noise", "none", "batch", "matched"),
    "weight": ("adaptive", "x", "v", "eps"),
    "dtype": ("fp32", "bf16"),
}
LEAST = {"iterations": 1, "prompts_per_iteration": 1, "group_size": 2, "updates": 1, "steps": 2,
         "n_mc": 1, "lora_alpha": 1e-3, "eval_every": 1, "save_every": 1}
KNOWN_ERRORS = (UsageError, RunError, OSError, SafetensorError, CheckpointException)


def read_flags(Config, description, argv):
    """The flags given, over those of a resumed run, over the recipe's, over Config's defaults."""
    flags = vars(make_parser(Config, description).parse_args(argv))
    if "resume" in flags:
        flags = resumed_flags(Config, flags)
    model = flags.get("model", Config.model)
    flags.setdefault("recipe", recipe_of(model))
    if {"reward", "prompts"} & flags.keys():              # the recipe's evaluation may not fit them
        flags.setdefault("eval_reward", "")
    cfg = Config(**{**RECIPES[flags["recipe"]], **NEEDS.get(model, {}), **flags})
    check(cfg)
    return cfg


def make_parser(Config, description, choices=CHOICES):
    """A flag for each field of a dataclass; its help is the comment beside the field."""
    def fail(message):                                    # one line in place of the whole usage
        raise UsageError(message)

    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        "vgrpo.py", description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for field in fields(Config):
        kind = {"type": field.type, "choices": choices.get(field.name)}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.name == "resume":
            kind = {"nargs": "?", "const": ""}
        text = f"{comments.get(field.name, '')} [{field.default}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **kind)
    return parser


def resumed_flags(Config, flags):
    """The flags of the run that goes on, under those given now."""
    out = flags["resume"] or flags.get("out")
    if not out:
        raise UsageError("--resume: name the folder of a run")
    before, config = {}, Path(out) / "config.json"
    if flags["resume"] or config.exists():                # --out X --resume also starts X
        with one_line(UsageError, f"--resume {out}: holds no run, or one of another version"):
            before = asdict(Config(**json.loads(config.read_text())["flags"]))
    for name in ("lora_rank", "lora_alpha"):              # its weights were trained with these
        if before and flags.get(name, before[name]) != before[name]:
            raise UsageError(f"--{name.replace('_', '-')}: {out} was trained with {before[name]}")
    return {**before, **flags, "resume": out, "out": out}


def check(cfg):
    for name, value in asdict(cfg).items():
        least, flag = LEAST.get(name, 0), "--" + name.replace("_", "-")
        if not isinstance(value, str) and not least <= value < math.inf:
            raise UsageError(f"{flag} {value}: must be a number of at least {least}")
    if not re.fullmatch(r"(\d+(x\d+)?)?", cfg.resolution):
        raise UsageError(f"--resolution {cfg.resolution}: give a side in pixels, or WIDTHxHEIGHT")
    if not (cfg.model in MODELS or "/" in cfg.model or Path(cfg.model).is_dir()):
        raise UsageError(f"--model {cfg.model}: is unknown; {GET_MODEL}")


def quiet_libraries(main):
    """Only weights that a file lacks are worth a warning, and only the main rank shows progress."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        if not main:
            library.utils.logging.disable_progress_bar()
    for name in ("diffusers.models.modeling_utils", "transformers.modeling_utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # One process saves alone; nothing changes views of a sharded block in place.
    warnings.filterwarnings("ignore", "torch.distributed is disabled|.*FSDP2-wrapped module")


def watch_signals():
    """From now on a first signal only asks the loop to save and stop; a second one ends at once.
    -> the list of signals that came
    """
    # nohup has SIGHUP ignored. torchrun listens all the same and passes it on to its ranks.
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
               if signal.getsignal(number) != signal.SIG_IGN or dist.is_initialized()]
    caught = []

    def answer(how):
        for number in numbers:
            signal.signal(number, how)

    def catch(number, frame):
        caught.append(number)
        answer(lambda *_: None)        # a queue tells ranks and torchrun, which tells them again
        if not dist.is_initialized() or dist.get_rank() == 0:
            os.write(2, b"\na signal came: finishing the iteration, then saving; "
                        b"once more ends at once\n")
        time.sleep(1)
        answer(signal.SIG_DFL)         # of all: torchrun makes a SIGTERM of a second Ctrl-C

    answer(catch)
    faulthandler.register(signal.SIGUSR1, file=2)                # kill -USR1 tells where a rank is
    return caught


def failure(error):
    """What a CheckpointException is about: the first rank's error, or a disk's behind it."""
    reason, _ = next(iter(error.failures.values()))
    chain = [reason]
    while chain[-1].__context__:
        chain.append(chain[-1].__context__)
    return next((link for link in chain if isinstance(link, OSError)), reason)


def explain(error):
    """Print an error in one line, below its traceback where that helps.  -> the exit code"""
    text = " ".join(str(error).split())
    if isinstance(error, CheckpointException):            # its own text has many lines
        text = f"a checkpoint could not be written: {failure(error)}"
    if dist.is_initialized() and re.search("gloo|nccl", text, re.I):
        text = f"rank {dist.get_rank()} lost another rank, whose message tells why ({text[:300]})"
    elif not isinstance(error, KNOWN_ERRORS):             # a fault of the code
        traceback.print_exception(error)
    elif isinstance(error, RunError) and error.__cause__: # such as an own reward's
        traceback.print_exception(error.__cause__)
    if isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(3)       # the first rank says the same, and torchrun ends this one meanwhile
    print(f"\nvgrpo.py: error: {text}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
