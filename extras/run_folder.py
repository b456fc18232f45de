"""The run folder: config.json, metrics.jsonl, TensorBoard's file, pictures of the evaluations."""
import json
import math
import subprocess
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image, ImageDraw


def start_log(out, cfg, done):
    """Write config.json and cut metrics.jsonl to what a checkpoint after `done` iterations knows.
    -> log(dict), which adds a line
    """
    (out / "samples").mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    commit = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>/dev/null")
    config = {"flags": asdict(cfg), "versions": versions, "commit": commit}
    write_whole(out / "config.json", json.dumps(config, indent=2))
    path = out / "metrics.jsonl"
    old = path.read_text().splitlines(keepends=True) if path.exists() else []
    write_whole(path, "".join(line for line in old if is_kept(line, done)))
    board = None
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out, purge_step=done + 1)
    except ImportError:
        pass

    def log(values):
        with open(path, "a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items() if board else ():
            board.add_scalar(name, value, values["iteration"])

    return log


def is_kept(line, done):
    """A kill may have cut the last line; the evaluation after `done` iterations is made anew."""
    if not line.endswith("\n"):
        return False
    values = json.loads(line)
    return values["iteration"] < done or values["iteration"] == done and "eval" not in values


def write_whole(path, text):
    """Write a file whole or not at all."""
    partial = path.with_name("partial")
    partial.write_text(text)
    partial.rename(path)


def save_grid(path, groups, rewards):
    """A labelled contact sheet: the first image of each group, then the second; 24 in all. A video
    shows its first, middle and last frame; the sheet's first six move in a file beside it.
    """
    tiles = [(group, i) for i in range(len(groups[0].images)) for group in groups][:24]
    stills = [still(group.images[i]) for group, i in tiles]
    width = min(max(stills[0].width, 144), 256)
    height = round(width * stills[0].height / stills[0].width)
    rows = math.ceil(len(tiles) / 6)
    sheet = Image.new("RGB", (6 * (width + 8), rows * (height + 24)), "white")
    for tile, ((group, i), picture) in enumerate(zip(tiles, stills)):
        x, y = tile % 6 * (width + 8) + 4, tile // 6 * (height + 24) + 4
        sheet.paste(picture.resize((width, height), Image.BOX), (x, y))
        label = f"{rewards[0, group.index, i]:.2f} {group.item['prompt']}"
        ImageDraw.Draw(sheet).text((x, y + height + 2), label[:width // 6], fill="black")
    sheet.save(path)
    if groups[0].images.ndim == 5:
        save_animation(path.with_suffix(".webp"), [group.images[i] for group, i in tiles[:6]])


def still(image):
    """A picture of [3, H, W], or of three frames of [F, 3, H, W] side by side."""
    if image.ndim == 4:
        frames = len(image)
        image = torch.cat([image[i] for i in (0, frames // 2, frames - 1)], dim=2)
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def save_animation(path, videos):
    """Videos [F, 3, H, W] side by side, eight frames a second."""
    wide = torch.cat(videos, dim=3)
    first, *others = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in wide]
    first.save(path, save_all=True, append_images=others, duration=125, loop=0)


def metrics_of(cfg, names, rewards, total, advantages, stats, clock):
    """What an iteration was like, in numbers; the README has a glossary.
    rewards [K, P, G] and their weighted mean total [P, G], advantages and each of stats [P, G]
    """
    ratio, L = stats["ratio"], stats["surrogate"]
    clipped = (ratio - 1) * advantages.sign() > (cfg.clip or math.inf)
    rollout, reward, update = (end - start for start, end in zip(clock, clock[1:]))
    metrics = {
        "reward": total.nanmean(),
        "reward_std": (total - total.nanmean(1, keepdim=True)).square().nanmean().sqrt(),
        **{f"reward/{name}": row.nanmean() for name, row in zip(names, rewards)},
        "zero_std_groups": (advantages == 0).all(1).sum(),
        "loss": stats["loss"].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_fraction": clipped.double().mean(),
        "kl": stats["kl"].mean(),
        "surrogate": L.mean(),
        "surrogate_cv": L.std() / L.mean(),
        "surrogate_group_cv": (L.std(1) / L.mean(1)).mean(),
        "grad_norm": stats["grad_norm"],
        "lr": stats["lr"],
        "nfe_rollout": cfg.steps,
        "nfe_old": cfg.n_mc * (1 - 1 / cfg.updates),
        "nfe_train": cfg.n_mc,
        "seconds_rollout": rollout,
        "seconds_reward": reward,
        "seconds_update": update,
        "samples_per_second": ratio.numel() / (clock[-1] - clock[0]),
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30,       # a GPU's; 0 without one
    }
    return {name: value.item() if torch.is_tensor(value) else value
            for name, value in metrics.items()}
