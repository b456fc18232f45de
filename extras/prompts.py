"""Prompts to train on and to evaluate on, from a file or from a built-in set (prompt_sets.py).

A file has a prompt per line, or, as .jsonl, an object per line: "prompt" and any metadata.
"""
import json
from pathlib import Path

import torch

from extras import prompt_sets
from rewards import UsageError, one_line

ASSETS = Path(__file__).parents[1] / "assets"
OURS = {                       # files of what trains, of what evaluates
    "shapes": ("tiny-sd3/prompts.txt",),
    "mini": ("mini-sd3/prompts_train.jsonl", "mini-sd3/prompts_test.jsonl")}
MOST = 48                      # prompts of an evaluation


def load_prompts(cfg, rng):
    """-> items to train on, items to evaluate on; an item is {"prompt": text, ...metadata}"""
    train, test = read(cfg.prompts, "--prompts")
    if not train:
        raise UsageError(f"--prompts {cfg.prompts}: only evaluates; give it to --eval-prompts")
    if cfg.eval_prompts:
        every, test = read(cfg.eval_prompts, "--eval-prompts")
        test = test or every                              # all of a file
    items = test or train
    order = [items[i] for i in torch.randperm(len(items), generator=rng).tolist()]
    if test:
        return train, order[:MOST]
    held_out = min(len(train) // 10, MOST)
    if held_out < 8:                                      # too few to set some apart
        return train, train[:MOST]
    return order[held_out:], order[:held_out]


def read(name, flag):
    """-> items to train on, items of a set's own test list (none of a file)"""
    if name in prompt_sets.NAMES:
        with one_line(UsageError, f"{flag} {name}"):
            return prompt_sets.load(name)
    files = [ASSETS / file for file in OURS.get(name, ())] or [Path(name)]
    lists = [read_file(file, f"{flag} {name}") for file in files]
    return lists[0], lists[1] if len(lists) == 2 else []


def read_file(path, where):
    names = ", ".join((*OURS, *prompt_sets.NAMES))
    with one_line(UsageError, where, f"; give FILE.txt or FILE.jsonl in UTF-8, or one of {names}"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    items = {}
    for number, line in enumerate(lines, 1):
        item = {"prompt": line}
        with one_line(UsageError, f'{where}, line {number}: no object with a string "prompt"'):
            if line.strip() and path.suffix == ".jsonl":
                item = json.loads(line)
            item["prompt"] = item["prompt"].strip()
        if item["prompt"]:
            items[json.dumps(item)] = item                # each once
    if not items:
        raise UsageError(f"{where}: is empty; write a prompt per line")
    return list(items.values())
