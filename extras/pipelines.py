"""What differs between diffusers' pipelines: schedulers, keywords, the form of arguments."""
import re

import diffusers
import torch
from torch.utils.checkpoint import checkpoint

from rewards import UsageError


class FlowDPMSolver(diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ on the grid 1, 1 - 1/n ... 1/n, or the pipeline's, shifted by `self.euler`."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, **shift):
        if sigmas is None:
            sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        self.euler.set_timesteps(sigmas=sigmas, device=device, **shift)
        super().set_timesteps(len(sigmas), device)        # forgets the steps of the last call
        self.sigmas, self.timesteps = self.euler.sigmas.cpu(), self.euler.timesteps


def make_scheduler(scheduler, solver):
    """The pipeline's scheduler, as Euler or as DPM-Solver++."""
    config = dict(scheduler.config)
    name = type(scheduler).__name__
    if "FlowMatch" not in name and config.get("prediction_type") != "flow_prediction":
        raise UsageError(f"--model: its scheduler {name} is not one of flow matching")
    config["shift"] = config.get("shift") or config.get("flow_shift") or 1.0
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    if solver == "euler":
        return euler
    dpm = FlowDPMSolver(use_flow_sigmas=True, prediction_type="flow_prediction",
                        use_dynamic_shifting=euler.config.use_dynamic_shifting)
    dpm.register_to_config(**{**config, **dpm.config})    # pipelines read the bounds of their shift
    dpm.euler = euler
    return dpm


def size_options(accepted, cfg):
    """Of a call that accepts these keywords.  -> that for the number of images or videos, and those
    for their size with their values
    """
    size = {}
    if cfg.resolution:
        width, _, height = cfg.resolution.partition("x")
        size |= {"width": int(width), "height": int(height or width)}
    if cfg.frames:
        name = next((name for name in accepted if re.fullmatch("(num_)?frames", name)), None)
        if not name:
            raise UsageError("--frames: this --model makes pictures")
        size[name] = cfg.frames
    return next((name for name in accepted if name.endswith("s_per_prompt")), None), size


def image_axes(three, two):
    """Where images lie in arguments, by their values in a call of three images and in one of two:
    [3, 77, 64] and [2, 77, 64] have them along axis 0; [64, 3] both times has none (None): all
    images share it; lists of 3 and of 2 are a "list" of them; dicts and other lists give a tree.
    """
    if torch.is_tensor(two):
        lengths = list(zip(three.shape, two.shape))
        return lengths.index((3, 2)) if (3, 2) in lengths else None
    if isinstance(two, dict):
        return {name: image_axes(three[name], value) for name, value in two.items()}
    if isinstance(two, list) and (len(three), len(two)) == (3, 2):
        return "list"
    if isinstance(two, list):
        return [image_axes(*pair) for pair in zip(three, two)]
    return None


def first_row(value, axes):
    """What was told of the first image."""
    return each(value, axes, lambda part, axis: part.narrow(axis, 0, 1).clone(),
                lambda part: part[:1])


def repeat_row(value, axes, rows):
    """The same told of several images: in copies, since a broadcast is rounded in another order."""
    return each(value, axes, lambda part, axis: part.repeat_interleave(rows, axis),
                lambda part: part * rows)


def each(value, axes, of_tensor, of_list):
    if axes == "list":
        return of_list(value)
    if isinstance(axes, dict):
        return {name: each(value[name], axes[name], of_tensor, of_list) for name in value}
    if isinstance(axes, list):
        return [each(part, axis, of_tensor, of_list) for part, axis in zip(value, axes)]
    return value if axes is None else of_tensor(value, axes)


def network_input(z, heard):
    """z [B, ...] in the form in which the network was given one image: that may lie in a list, have
    an axis more, or further channels, which are conditions too."""
    row, channels = heard[0], z.shape[1]
    if row.numel() > z[0].numel():
        z = torch.cat([z, row[channels:].expand(len(z), *row[channels:].shape)], 1)
    z = z.to(row.dtype).reshape(len(z), *row.shape)
    return list(z) if isinstance(heard, list) else z


def guidance_options(pipe, accepted, scale):
    """The pipeline's keywords for a guidance scale; true_cfg_scale where it takes two calls."""
    for name in ("guider", "ocr_guider"):                 # some keep it in parts of their own
        if getattr(pipe, name, None):
            guider = getattr(pipe, name).new(guidance_scale=scale, enabled=scale > 1)
            setattr(pipe, name, guider)
    if "true_cfg_scale" in accepted and not pipe.transformer.config.get("guidance_embeds"):
        return {"true_cfg_scale": scale, "negative_prompt": " " if scale > 1 else None}
    return {"guidance_scale": scale} if "guidance_scale" in accepted else {}


def recomputed(forward):
    """A block's forward, whose activations are computed again in the backward pass.
    A function of its own, not a partial: torch.compile would skip a partial and all below it.
    """
    def recomputed_forward(*args, **kwargs):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed_forward


def network_time(t, grid, times):
    """What the network is told for t: as heard at the sampler's steps, elsewhere on the line
    through two of them, in the dtype in which it was told. (z_t has the exact t.)
    t [B], grid [n], times [n, ...] -> [B, ...]
    """
    after = torch.searchsorted(-grid, -t).clamp(1, len(grid) - 1)
    before = after - 1                                    # of a t within the grid
    weight = (grid[before] - t) / (grid[before] - grid[after])
    weight = weight.reshape(-1, *[1] * (times.ndim - 1))
    return torch.lerp(times[before].float(), times[after].float(), weight).to(times.dtype)
