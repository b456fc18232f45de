"""Tests, each against an independent computation.  pytest; pytest -m "not slow" for the edit loop."""
import base64
import contextlib
import http.server
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import fields, replace
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

os.environ["HF_HUB_OFFLINE"] = "1"                # read when the hub's library is imported

import rewards  # noqa: E402
import vgrpo  # noqa: E402

sys.path.append(str(Path(__file__).parent / "assets"))
import fullsize  # noqa: E402
import tiny  # noqa: E402
from prompts import geneval as geneval_prompts  # noqa: E402
from prompts import ocr as ocr_prompts  # noqa: E402

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"
HERE = Path(__file__).parent
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TIMES = ("seconds_rollout", "seconds_reward", "seconds_update", "samples_per_second", "peak_memory_gb")
SMALL = ["--iterations", "2", "--prompts-per-iteration", "4", "--group-size", "3", "--steps", "3",
         "--n-mc", "2", "--save-every", "1", "--eval-reward", "", "--reward", f"{__file__}:redness"]


def redness(images, prompts, metadata):
    """The reward of the runs below: it varies on any picture, in steps that rounding errors do not cross."""
    return (100 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))).round()


def gen(*key):
    return vgrpo.generator("test", *key)


def load(*flags):
    cfg = vgrpo.parse_config(list(flags))
    return cfg, *vgrpo.load_policy(cfg, torch.device("cpu"))


def run(out, *flags):
    """An in-process run -> its metrics lines, without times."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    vgrpo.main([*SMALL, "--out", str(out), *flags])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return metrics(out)


def metrics(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def close(a, b, relative):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for key in one:
            of_rewards = key.startswith(("reward", "eval"))
            within = dict(rel=min(relative, 1e-5) if of_rewards else relative, abs=1e-6)
            assert one[key] == pytest.approx(other[key], **within), (one["iteration"], key)


# ---- the paper's equations


def test_add_noise_goes_from_data_to_noise():
    o, eps = torch.randn(5, 1, 4, 2, 2, generator=gen(0)), torch.randn(5, 3, 4, 2, 2, generator=gen(1))
    t = torch.tensor([0.0, 0.25, 1.0]).expand(5, 3)
    z = vgrpo.add_noise(o, t, eps)
    assert torch.equal(z[:, 0], o[:, 0]) and torch.equal(z[:, 2], eps[:, 2])
    assert torch.allclose(z[:, 1], 0.75 * o[:, 0] + 0.25 * eps[:, 1])


@pytest.mark.parametrize("n, M", [(40, 4), (16, 4), (10, 4), (10, 3), (4, 8)])
def test_strata_one_timestep_in_each_and_every_grid_point_equally_often(n, M):
    sigmas = torch.linspace(1, 1 / n, n)
    A = torch.zeros(1)
    draws = torch.stack([vgrpo.draw_pairs(gen(i), sigmas, A, M, (1,))[0][0] for i in range(4000)])
    index = torch.round(n * (1 - draws)).long()
    for j in range(M):
        assert index[:, j].min() == j * n // M and index[:, j].max() == math.ceil((j + 1) * n / M) - 1
    share = torch.bincount(index.flatten(), minlength=n) / index.numel()
    assert (share - 1 / n).abs().max() < 5 * math.sqrt(1 / n / index.numel())


def test_without_strata_two_timesteps_may_fall_in_one():
    grid, A = torch.linspace(1, .1, 10), torch.zeros(1)
    t = torch.stack([vgrpo.draw_pairs(gen(i), grid, A, 2, (1,), stratified=False)[0][0] for i in range(100)])
    assert ((t[:, 0] > .5) == (t[:, 1] > .5)).any()


@pytest.mark.parametrize("M", [4, 5])
@pytest.mark.parametrize("share", ["both", "timestep", "noise", "none", "matched"])
def test_antithetic_noise_cancels_and_keeps_the_strata(share, M):
    grid = torch.linspace(1, .05, 20)
    t, eps = vgrpo.draw_pairs(gen(1), grid, torch.zeros(3), M, (4, 2), share, antithetic=True)
    plain_t, plain = vgrpo.draw_pairs(gen(1), grid, torch.zeros(3), M, (4, 2), share, antithetic=False)
    even = M - M % 2
    assert torch.equal(eps[:, :even].sum(1), torch.zeros(3, 4, 2)) and eps[:, 0].abs().min() > 0
    assert torch.equal(t, plain_t) and torch.equal(eps[:, even:], plain[:, even:])
    assert plain[:, :even].sum(1).abs().min() > 0


@pytest.mark.parametrize("share, same_t, same_eps", [("both", 1, 1), ("timestep", 1, 0), ("noise", 0, 1),
                                                     ("none", 0, 0)])
def test_sharing(share, same_t, same_eps):
    t, eps = vgrpo.draw_pairs(gen(2), torch.linspace(1, .01, 100), torch.zeros(6), 4, (3, 2), share)
    assert t.shape == (6, 4) and eps.shape == (6, 4, 3, 2)
    assert bool((t == t[:1]).all()) == bool(same_t) and bool((eps == eps[:1]).all()) == bool(same_eps)


def test_matched_sharing_pairs_the_best_with_the_worst():
    for A, partners in (([.3, -1, 2, .5, -2, 0], [5, 3, 4, 1, 2, 0]), ([1, -1, 0, 2, -2], [1, 0, 2, 4, 3])):
        grid, A = torch.linspace(1, .001, 1000), torch.tensor(A)
        t, eps = vgrpo.draw_pairs(gen(2), grid, A, 4, (3, 2), "matched")
        for i, j in enumerate(partners):
            assert torch.equal(t[i], t[j]) and torch.equal(eps[i], eps[j])
            others = [k for k in range(len(A)) if k not in (i, j)]
            assert (t[others] != t[i]).any(1).all() and (eps[others] != eps[i]).flatten(1).any(1).all()


@pytest.mark.parametrize("weight", ["adaptive", "x", "v", "eps"])
def test_surrogate_against_a_plain_loop(weight):
    B, M, shape = 3, 4, (2, 3, 3)
    o, v = torch.randn(B, *shape, generator=gen(0)), torch.randn(B, M, *shape, generator=gen(1))
    t, eps = vgrpo.draw_pairs(gen(2), torch.linspace(1, .1, 10), torch.zeros(B), M, shape, "none")
    L, x = vgrpo.surrogate(v, o, vgrpo.add_noise(o[:, None], t, eps), t, weight)
    for b in range(B):
        total = 0.0
        for j in range(M):
            s, e, clean = t[b, j].double(), eps[b, j].double(), o[b].double()
            z = (1 - s) * clean + s * e
            x_hat = z - s * v[b, j].double()
            assert torch.allclose(x[b, j].double(), x_hat, atol=1e-6)
            error = {"v": v[b, j].double() - (e - clean), "eps": (z - (1 - s) * x_hat) / s - e}
            error = error.get(weight, x_hat - clean)
            total += (error ** 2).mean() / (error.abs().mean() if weight == "adaptive" else 1)
        assert L[b].item() == pytest.approx((total / M).item(), rel=1e-5)


def test_no_gradient_through_the_adaptive_weight():
    o, v = torch.randn(2, 5, generator=gen(0)), torch.randn(2, 3, 5, generator=gen(1), requires_grad=True)
    t, eps = vgrpo.draw_pairs(gen(2), torch.linspace(1, .1, 10), torch.zeros(2), 3, (5,))
    vgrpo.surrogate(v, o, vgrpo.add_noise(o[:, None], t, eps), t)[0].sum().backward()
    s = t[..., None]
    x = (1 - s) * o[:, None] + s * eps - s * v.detach()
    constant = (x - o[:, None]).abs().mean(-1, keepdim=True)
    assert torch.allclose(v.grad, 2 * (x - o[:, None]) * -s / 5 / constant / 3, atol=1e-6)


@pytest.mark.parametrize("weight", ["adaptive", "x", "v", "eps"])
def test_the_true_velocity_recovers_the_data(weight):
    o = torch.randn(2, 4, 2, 2, generator=gen(0))
    t, eps = vgrpo.draw_pairs(gen(2), torch.linspace(1, .1, 10), torch.zeros(2), 4, (4, 2, 2), "none")
    L, x = vgrpo.surrogate(eps - o[:, None], o, vgrpo.add_noise(o[:, None], t, eps), t, weight)
    assert torch.allclose(x, o[:, None].expand_as(x), atol=1e-6) and L.max() < 1e-5


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("share", ["both", "timestep", "noise", "none", "matched"])
def test_estimator_is_unbiased_in_every_mode(share, antithetic, stratified):
    """For the network v = a z the expectation over the grid and the noise has a closed form."""
    a, G, M, d, grid = 0.3, 2, 3, 6, torch.linspace(1, .1, 10)
    o = torch.randn(G, d, generator=gen(0))
    exact = ((a * (1 - grid) + 1) ** 2 * o.square().mean(1, keepdim=True) + (a * grid - 1) ** 2).mean(1)
    draws = []
    for i in range(1000):
        key, A = gen(share, antithetic, i), torch.arange(G)
        t, eps = vgrpo.draw_pairs(key, grid, A, M, (d,), share, stratified, antithetic)
        z = vgrpo.add_noise(o[:, None], t, eps)
        draws.append(vgrpo.surrogate(a * z, o, z, t, "v")[0])
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / math.sqrt(len(draws))).all()


def test_advantages():
    R = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.1, 0.1, 0.1, 0.1], [1.0, math.nan, 3.0, 2.0]])
    A = vgrpo.group_advantages(R)
    one = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert torch.allclose(A[0], (one - 3) / one.std(correction=0), atol=1e-5)
    assert torch.equal(A[1], torch.zeros(4))
    expected = torch.tensor([-1.0, 1.0, 0.0]) * math.sqrt(1.5)
    assert A[2, 1] == 0 and torch.allclose(A[2, [0, 2, 3]], expected, atol=1e-5)
    assert torch.equal(vgrpo.group_advantages(torch.full((1, 3), math.nan)), torch.zeros(1, 3))


def test_combining_rewards():
    w = torch.tensor([3.0, 1.0]).double()
    R = torch.stack([torch.randn(2, 5, generator=gen(0)), 100 * torch.randn(2, 5, generator=gen(1))]).double()
    by_group = vgrpo.combine_rewards(R, w)
    assert torch.allclose(by_group, .75 * vgrpo.group_advantages(R[0]) + .25 * vgrpo.group_advantages(R[1]))
    by_sum = vgrpo.combine_rewards(R, w, "sum")
    assert torch.allclose(by_sum, vgrpo.group_advantages(3 * R[0] + R[1]), atol=1e-5)
    scaled = vgrpo.combine_rewards(R * torch.tensor([7.0, .01])[:, None, None], w)
    assert torch.allclose(scaled, by_group, atol=1e-4)
    w0 = torch.tensor([1.0, 0.0]).double()             # weight 0 only reports
    R0 = torch.stack([R[0], torch.full_like(R[1], math.nan)])
    for rule in ("advantage", "sum"):
        assert torch.equal(vgrpo.combine_rewards(R0, w0, rule), vgrpo.group_advantages(R[0]))
    R[1, 0, 2] = math.nan                          # a reward that failed for an image says nothing about it
    assert vgrpo.combine_rewards(R, w)[0, 2] == pytest.approx(.75 * by_group_of(R[0])[0, 2].item())
    assert vgrpo.combine_rewards(R, w, "sum")[0, 2] == 0


def by_group_of(R):
    return vgrpo.group_advantages(R)


def test_soft_clip():
    A = torch.linspace(-50, 50, 101)
    soft = vgrpo.soft_clip(A, 3.0)
    assert soft.abs().max() <= 3 and torch.allclose(soft, 3 * torch.tanh(A / 3))
    assert torch.equal(soft, -soft.flip(0))
    assert vgrpo.soft_clip(torch.tensor(.01), 3.0).item() == pytest.approx(.01, rel=1e-4)
    assert torch.equal(vgrpo.soft_clip(A, 0.0), A)


@pytest.mark.parametrize("A, ratio, flows", [(1, 1.05, False), (1, 0.95, True), (1, 1.005, True),
                                             (-1, 0.95, False), (-1, 1.05, True), (-1, 0.995, True)])
def test_clip_stops_the_gradient_only_beyond_the_range(A, ratio, flows):
    L = torch.tensor([-math.log(ratio)], requires_grad=True)
    x = torch.zeros(1, 2, 3)
    loss, rho, _ = vgrpo.vgrpo_loss(L, torch.zeros(1), x, x, torch.tensor([float(A)]), clip=0.01)
    loss.sum().backward()
    assert rho.item() == pytest.approx(ratio)
    assert L.grad.item() == pytest.approx(A * ratio if flows else 0.0)
    assert loss.item() == pytest.approx(-min(ratio * A, min(max(ratio, .99), 1.01) * A))


def test_kl_is_zero_with_zero_gradient_at_theta_old():
    x = torch.randn(2, 3, 4, generator=gen(0), requires_grad=True)
    L = torch.zeros(2)
    loss, _, kl = vgrpo.vgrpo_loss(L, L, x, x.detach(), torch.zeros(2), kl=0.3)
    loss.sum().backward()
    assert torch.equal(kl, torch.zeros(2)) and torch.equal(x.grad, torch.zeros_like(x))
    loss, _, kl = vgrpo.vgrpo_loss(L, L, x, x.detach() + 2, torch.zeros(2), kl=0.3)
    assert torch.allclose(kl, torch.full((2,), 4.0)) and torch.allclose(loss, 0.3 * kl)


def test_on_policy_loss_is_odd_in_the_advantage():
    L, A = torch.rand(6, generator=gen(0)), torch.randn(6, generator=gen(1))
    x = torch.zeros(6, 2, 3)
    up, ratio, _ = vgrpo.vgrpo_loss(L, L, x, x, A, clip=.01)
    down, _, _ = vgrpo.vgrpo_loss(L, L, x, x, -A, clip=.01)
    assert torch.equal(up, -down) and torch.equal(ratio, torch.ones(6))


# ---- families of diffusers: what encode_prompt returns is drawn, the rest is theirs, small


def said(*shape, by="prompt", axis=0):
    """Embeddings that depend on the prompt, or on `by` alone; images lie along `axis`."""
    def rows(prompts, n):
        keys = prompts if by == "prompt" else [by] * len(prompts)
        drawn = torch.stack([torch.randn(shape, generator=gen(key, *shape)) for key in keys], axis)
        return drawn.repeat_interleave(n, axis)
    return rows


def padded(prompts, n):
    """A mask of five tokens, the last of which is padding."""
    return (torch.arange(5) < 4).expand(len(prompts) * n, -1)


def ids(prompts, n):
    """Positions of the text, which all images share."""
    return torch.zeros(5, 3)


def fake_text(pipe, *parts):
    """Stands in for encode_prompt, and shakes the weights: a new network hardly hears its conditions."""
    def encode_prompt(prompt=None, *args, num_images_per_prompt=1, **kwargs):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        given = [part(prompts, num_images_per_prompt) for part in parts]
        return tuple(x.to(pipe.vae.dtype) if x.is_floating_point() else x for x in given)
    if parts:
        pipe.encode_prompt = encode_prompt
    with torch.no_grad():
        for name, p in pipe.transformer.eval().named_parameters():
            p.add_(torch.randn(p.shape, generator=gen(name)) * .1)
    return pipe


def small_vae():
    from diffusers import AutoencoderKL
    return AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.1,
                         scaling_factor=0.5)


def flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler
    return FlowMatchEulerDiscreteScheduler(**options)


def small_sd3():
    torch.manual_seed(0)
    return fake_text(tiny.blank())


def small_flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    scheduler = flow(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, small_vae(), None, None, None, None, transformer)
    return fake_text(pipe, said(5, 32), said(32), ids)


def small_sd35():
    """The dual attention and normed queries of SD3.5-medium."""
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    pipe = tiny.blank()
    pipe.transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,))
    return fake_text(pipe)


def small_qwen():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    return fake_text(QwenImagePipeline(scheduler, vae, None, None, transformer), said(5, 16), padded)


def small_lumina2():
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64), cap_feat_dim=16)
    return fake_text(Lumina2Pipeline(transformer, flow(shift=6.0), small_vae(), None, None),
                     said(5, 16), padded, said(5, 16, by="negative"), padded)


def small_sana():
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=16)
    blocks = dict(encoder_block_types="ResBlock", decoder_block_types="ResBlock")
    for side in ("encoder", "decoder"):
        blocks |= {f"{side}_block_out_channels": (8, 8), f"{side}_qkv_multiscales": ((), ()),
                   f"{side}_layers_per_block": (1, 1)}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
                        upsample_block_type="interpolate", scaling_factor=0.41, **blocks)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction",
                                            flow_shift=3.0)
    pipe = SanaPipeline(None, None, vae, transformer, scheduler)
    pipe.image_processor.classify_height_width_bin = lambda h, w, ratios: (h, w)       # they begin at 512
    return fake_text(pipe,
                     said(5, 8), padded, said(5, 8, by="negative"), padded)


def small_auraflow():
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=1024)
    return fake_text(AuraFlowPipeline(None, None, small_vae(), transformer, flow(shift=1.73)),
                     said(5, 16), padded, said(5, 16, by="negative"), padded)


def small_flux2():
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4))
    vae = AutoencoderKLFlux2(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
                             block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    scheduler = flow(use_dynamic_shifting=True)
    return fake_text(Flux2Pipeline(scheduler, vae, None, None, transformer), said(5, 16),
                     lambda prompts, n: torch.arange(20).view(5, 4).expand(len(prompts) * n, 5, 4))


def small_chroma():
    from diffusers import ChromaPipeline, ChromaTransformer2DModel
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1)
    return fake_text(ChromaPipeline(flow(), small_vae(), None, None, transformer),
                     said(5, 32), ids, padded, said(5, 32, by="negative"), ids, padded)


def small_hidream():
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=8, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=(0, 1))
    pipe = HiDreamImagePipeline(flow(shift=3.0), small_vae(), *[None] * 8, transformer)
    pipe.default_sample_size = 32
    llama = [said(2, 5, 16, by=by, axis=1) for by in ("prompt", "negative")]
    return fake_text(pipe, said(5, 32), said(5, 32, by="negative"), *llama, said(8), said(8, by="negative"))


def small_cogview4():
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, sample_size=16, rope_axes_dim=(16, 16))
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, base_image_seq_len=64,
                     time_shift_type="linear")
    return fake_text(CogView4Pipeline(None, None, small_vae(), transformer, scheduler),
                     said(5, 16), said(5, 16, by="negative"))


def small_zimage():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32])
    def words(by):
        return lambda prompts, n: list(said(5, 16, by=by)(prompts, 1))
    return fake_text(ZImagePipeline(flow(shift=3.0), small_vae(), None, None, transformer), words("prompt"),
                     words("negative"))


# The sigma of the time that each network is told, and its output's sign, read in the pipelines' code.
# CogView4 tells the time before the shift, which is 1.75 at 256 tokens.
RULES = {
    small_sd3: (lambda tau: tau / 1000, 1), small_sd35: (lambda tau: tau / 1000, 1),
    small_flux: (lambda tau: tau, 1), small_flux2: (lambda tau: tau, 1), small_chroma: (lambda tau: tau, 1),
    small_qwen: (lambda tau: tau, 1), small_auraflow: (lambda tau: tau, 1),
    small_sana: (lambda tau: tau / 1000, 1), small_hidream: (lambda tau: tau / 1000, -1),
    small_lumina2: (lambda tau: 1 - tau, -1), small_cogview4: (lambda tau: 1.75 / (.75 + 1000 / tau), 1),
}
FAMILIES = pytest.mark.parametrize("family", RULES, ids=lambda family: family.__name__[6:])


SMALL_RUN = ["--resolution", "32", "--steps", "3", "--n-mc", "2", "--group-size", "3", "--dtype", "fp32",
             "--prompts-per-iteration", "2", "--micro-batch", "0", "--prompts", "shapes"]


def small_policy(monkeypatch, family, *flags):
    """load_policy, given the small pipeline of a family instead of a folder."""
    from diffusers import DiffusionPipeline
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name: {})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda _, dtype: family().to(dtype))
    cfg = vgrpo.parse_config([*SMALL_RUN, "--model", "a/small", *flags])
    return cfg, *vgrpo.load_policy(cfg, torch.device("cpu"))


def listen(policy, prompts, generators):
    """What the network was given and answered at each step, in the first of the step's calls."""
    used, scheduler, step = [[]], policy.pipe.scheduler, policy.pipe.scheduler.step

    def hear(module, args, kwargs, output):
        used[-1].append(((*args, kwargs.get("hidden_states"))[0], output[0]))

    def next_step(*args, **kwargs):
        used.append([])
        return step(*args, **kwargs)
    hook = policy.transformer.register_forward_hook(hear, with_kwargs=True)
    scheduler.step = next_step
    policy.generate(prompts, generators)
    hook.remove()
    scheduler.step = step
    return [calls[0] for calls in used[:-1]]


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("width", [32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", ["euler", "dpm++"])
@FAMILIES
def test_every_family_velocity_is_what_the_pipeline_used(family, solver, width, guidance):
    cfg = SimpleNamespace(solver=solver, steps=3, guidance=guidance, resolution=0)
    policy = vgrpo.Policy(family(), cfg, torch.device("cpu"), height=32, width=width)
    used = listen(policy, ["a red circle"], [gen(i) for i in range(2)])
    sigmas, conditions = policy.sigmas(), policy.conditions()
    assert len(used) == len(sigmas) == 3 and (sigmas[:-1] > sigmas[1:]).all() and sigmas[-1] > 0
    with torch.no_grad():
        for sigma, (z, output) in zip(sigmas, used):
            v, scale = policy.velocity(z, sigma.expand(len(z)), conditions), output.abs().max()
            assert (v - RULES[family][1] * output)[-2:].abs().max() < 1e-6 * scale
        earlier = policy.velocity(z, sigmas[:1].expand(len(z)), conditions)
        policy.generate(["a blue square"], [gen(0)])
        other = policy.velocity(z, sigma.expand(len(z)), policy.conditions())
    assert policy.latents.shape[1:] == z.shape[1:]
    assert min((earlier - v).abs().max(), (other - v).abs().max()) > 1e-3 * scale      # both are heard


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
@FAMILIES
def test_every_family_the_true_velocity_recovers_the_data(monkeypatch, family, solver):
    """A network that returns (z - o) / sigma, of the sigma that the time means: the sampler ends in o, and
    x_theta is o, whatever the family's time, sign and shapes."""
    sigma_of, sign = RULES[family]

    def true_pipe():
        pipe = family()
        signature = inspect.signature(pipe.transformer.forward)

        @wraps(pipe.transformer.forward)
        def forward(*args, **kwargs):
            told = signature.bind(*args, **kwargs).arguments
            z, tau = told["hidden_states"], told.get("timestep", told.get("timesteps"))
            sigma = sigma_of(tau.double()).view(-1, *[1] * (z.ndim - 1))
            return ((sign * (z - torch.randn(z.shape[1:], generator=gen("o"))) / sigma).float(),)
        pipe.transformer.forward = forward
        return pipe
    cfg, policy, _ = small_policy(monkeypatch, true_pipe, "--solver", solver)
    groups = vgrpo.collect(policy, {0: {"prompt": "a red circle"}}, 3, cfg, 0)
    latents, t = groups[0].latents, policy.sigmas().expand(3, 3)
    o = torch.randn(latents.shape[1:], generator=gen("o"))
    eps = torch.randn(3, *latents.shape, generator=gen("eps"))
    assert (latents - o).abs().max() < 1e-5
    z = vgrpo.add_noise(o, t, eps)
    v = policy.velocity(z.flatten(0, 1), t.flatten(), groups[0].conditions).view_as(z)
    L, x = vgrpo.surrogate(v, latents, z, t)
    assert (v - (eps - o)).abs().max() < 1e-3 and (x - o).abs().max() < 1e-5 and L.abs().max() < 1e-5


@pytest.mark.parametrize("rank", ["0", "2"])
@FAMILIES
def test_every_family_trains_what_is_trainable_and_nothing_else(monkeypatch, family, rank):
    flags = ["--lora-rank", rank, "--guidance", "4", "--lr", "1e-2", "--updates", "2", "--kl", "0.1"]
    cfg, policy, trainable = small_policy(monkeypatch, family, *flags)
    parts = {f"{part}.{name}": p for part, module in policy.pipe.components.items()
             if isinstance(module, torch.nn.Module) for name, p in module.state_dict(keep_vars=True).items()}
    before = {name: p.detach().clone() for name, p in parts.items()}

    def scorer(images, prompts, metadata):
        return {"bright": images.mean((1, 2, 3))}
    scorer.weights = {"bright": 1.0}
    params = list(trainable.values())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=0)
    items = {i: {"prompt": prompt} for i, prompt in enumerate(("a red circle", "a blue square"))}
    ema = SimpleNamespace(step=lambda params: None)
    line = vgrpo.improve(policy, params, optimizer, ema, scorer, items, cfg, 1)
    assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["kl"] > 0
    moved = {name for name, p in parts.items() if not torch.equal(p, before[name])}
    assert moved <= {f"transformer.{name}" for name in trainable}
    assert len(moved) >= len(trainable) / 2 and all(".lora_" in name for name in moved if rank == "2")


@pytest.mark.parametrize("rank", ["0", "2"])
@FAMILIES
def test_every_family_bf16_velocity_is_what_the_pipeline_used(monkeypatch, family, rank):
    """To the bit: the pipeline rounds the time it tells its network, and the policy tells it the same."""
    _, exact, _ = small_policy(monkeypatch, family, "--lora-rank", "0")
    _, policy, trainable = small_policy(monkeypatch, family, "--lora-rank", rank, "--dtype", "bf16")
    assert policy.pipe.vae.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainable.values())
    used = listen(policy, ["a red circle on the left"], [gen(i) for i in range(2)])
    exact.generate(["a red circle on the left"], [gen(i) for i in range(2)])
    with torch.no_grad():
        velocities = [policy.velocity(z, sigma.expand(2), policy.conditions())
                      for sigma, (z, _) in zip(policy.sigmas(), used)]
        reference = exact.velocity(used[0][0], torch.ones(2), exact.conditions())
    assert all(torch.equal(v, policy.sign * output.float()) for v, (_, output) in zip(velocities, used))
    assert (velocities[0] - reference).norm() < 2e-2 * reference.norm()


@FAMILIES
def test_every_family_exports_a_lora_that_diffusers_loads(monkeypatch, tmp_path, family):
    pytest.importorskip("peft")
    flags = ["--lora-rank", "4", "--lora-alpha", "12", "--guidance", "4"]
    cfg, policy, trainable = small_policy(monkeypatch, family, *flags)
    policy.generate(["a red circle"], [gen(0)])
    before = policy.latents
    shift_lora(trainable)
    policy.generate(["a red circle"], [gen(0)])
    vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    pipe = family()
    pipe.load_lora_weights(tmp_path)
    fresh = vgrpo.Policy(pipe, cfg, torch.device("cpu"))
    fresh.generate(["a red circle"], [gen(0)])
    assert (fresh.latents - policy.latents).abs().max() < 1e-5 < 1e-3 < (policy.latents - before).abs().max()


@pytest.mark.parametrize("rank, autocast", [("0", True), ("2", False)])
def test_half_precision_computes_as_diffusers_does_unless_all_weights_train(rank, autocast):
    """A LoRA's frozen layers run as they are; weights in fp32 are rounded by autocast."""
    _, policy, trainable = load("--lora-rank", rank, "--dtype", "bf16", "--steps", "2")
    told = []
    policy.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: told.append(torch.is_autocast_enabled("cpu")))
    policy.generate(["a red bar on the left"], [gen(0)])
    assert told == [autocast] * 2 and {p.dtype for p in trainable.values()} == {torch.float32}
    frozen = {p.dtype for p in policy.transformer.parameters() if not p.requires_grad}
    assert frozen == ({torch.bfloat16} if rank == "2" else set())


@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_sharded_network_trains_in_fp32_and_is_saved_under_its_own_name(tmp_path, rank):
    from torch.distributed.tensor import DTensor
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        cfg, policy, trainable = load("--lora-rank", rank, "--dtype", "bf16", "--shard")
        assert all(p.dtype == torch.float32 and isinstance(p, DTensor) == (rank == "0")
                   for p in trainable.values())
        vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    finally:
        torch.distributed.destroy_process_group()
    if rank == "0":
        config = json.loads((tmp_path / "transformer/config.json").read_text())
        assert config["_class_name"] == "SD3Transformer2DModel"


def test_a_folder_of_another_family_is_loaded_and_trained(tmp_path):
    """Lumina2 with its Gemma2, saved and given as --model."""
    from diffusers import Lumina2Pipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast
    vocab = dict.fromkeys(["<pad>", "<unk>", *"a red blue circle square on the left right".split()])
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    bare = small_lumina2()
    encoder = Gemma2Model(Gemma2Config(
        vocab_size=len(vocab), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, initializer_range=0.5))
    pipe = Lumina2Pipeline(bare.transformer, bare.scheduler, bare.vae, encoder.eval(), tokenizer)
    pipe.save_pretrained(tmp_path / "lumina2")
    flags = [*SMALL_RUN, "--model", str(tmp_path / "lumina2"), "--lora-rank", "2", "--solver", "euler"]
    policy, _ = vgrpo.load_policy(vgrpo.parse_config(flags), torch.device("cpu"))
    policy.generate(["a red circle on the left"], [gen(0)])
    direct = pipe(prompt="a red circle on the left", num_inference_steps=3, guidance_scale=0, height=32,
                  width=32, generator=[gen(0)], output_type="latent")[0]
    assert (policy.latents - direct).abs().max() < 1e-5
    lines = run(tmp_path / "run", *flags, "--iterations", "1")
    assert lines[1]["grad_norm"] > 0
    assert (tmp_path / "run/checkpoints/000001/pytorch_lora_weights.safetensors").exists()


def test_a_network_of_another_kind_is_refused(monkeypatch):
    with pytest.raises(vgrpo.UsageError, match="ZImageTransformer2DModel"):
        small_policy(monkeypatch, small_zimage)


def test_ranks_average_weights_that_got_no_gradient(monkeypatch):
    """Qwen's last block computes text that nothing reads: its weights have no gradient to average."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        test_every_family_trains_what_is_trainable_and_nothing_else(monkeypatch, small_qwen, "2")
    finally:
        torch.distributed.destroy_process_group()


# ---- the policy


@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_rollout_is_an_ode_solver_of_that_velocity(solver):
    """Euler and second-order DPM-Solver++ for flows, written out, give the latents the pipeline gave."""
    _, policy, _ = load("--solver", solver, "--steps", "6")
    policy.generate(["a red circle on the left"], [gen(0)])
    c, o, sigmas = policy.conditions(), policy.latents, [*policy.sigmas().double().tolist(), 0.0]
    z = torch.randn(1, 4, 8, 8, generator=gen(0)).double()
    x_before = h_before = None
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        with torch.no_grad():
            v = policy.velocity(z.float(), torch.tensor([now]), c).double()
        x = z - now * v
        if solver == "euler":
            z = z + (then - now) * v
            continue
        level = [math.log((1 - s) / s) if 0 < s < 1 else math.copysign(math.inf, .5 - s) for s in (now, then)]
        h, D = level[1] - level[0], x
        if x_before is not None and then > 0:
            D = x + (x - x_before) * h / h_before / 2
        z = (then / now * z - (1 - then) * math.expm1(-h) * D) if then else x
        x_before, h_before = x, h
    assert (z - o).abs().max() < 1e-5


def test_an_image_depends_on_its_own_noise_only():
    _, policy, _ = load("--steps", "4")
    alone = policy.generate(["a red circle on the left"], [gen(1)])
    latents = policy.latents
    policy.generate(["a red circle on the left"], [gen(0), gen(1), gen(2)])
    assert torch.allclose(policy.latents[1:2], latents, atol=1e-5)
    assert alone.dtype == torch.uint8 and not torch.allclose(policy.latents[0], policy.latents[1])


def test_a_prompt_is_encoded_once(monkeypatch):
    _, policy, _ = load("--steps", "2")
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        policy.generate(["a blue bar on the right"], [gen(i) for i in range(4)])
    assert len(calls) == 1


def test_embeddings_of_large_models_are_forgotten():
    """Prompts come again in the tiny world; of a large model's embeddings a quarter of a GB is kept."""
    for rows, calls in ((1, 24), (2 ** 20, 48)):
        made = []
        pipe = SimpleNamespace(encode_prompt=lambda prompt, rows=rows: made.append(prompt) or (
            torch.zeros(1).expand(40, rows), None))                    # 160 MB that take no memory
        vgrpo.remember_prompts(pipe, [], torch.device("cpu"))
        for prompt in [*range(24)] * 2:
            for _ in range(3):
                pipe.encode_prompt(prompt)
        assert len(made) == calls


def test_offloaded_text_encoders_come_for_a_new_prompt_only():
    """They come as a copy, which goes when it has done its work: what stayed at home is as it was."""
    _, policy, _ = load("--steps", "2", "--offload")
    encoders, moves = (policy.pipe.text_encoder, policy.pipe.text_encoder_2), []
    home = [(p, p.data_ptr()) for encoder in encoders for p in encoder.parameters()]
    for encoder in encoders:
        def come(to, encoder=encoder):
            moves.append(to(torch.zeros(1)).device)
            for p in encoder.parameters():
                p.data = p.data.clone()
        encoder._apply = come
    for prompt in ("a blue bar on the right", "a blue bar on the right", "a red bar on the left"):
        policy.generate([prompt], [gen(0)])
    assert list(map(str, moves)) == ["cpu"] * 4
    assert all(p.data_ptr() == place for p, place in home)


def test_compile_compiles_each_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    load("--compile")
    assert compiled == ["JointTransformerBlock"] * 3


def test_a_pipeline_that_is_no_flow_is_refused():
    from diffusers import DDIMScheduler
    pipe = small_sd3()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(vgrpo.UsageError, match="flow matching"):
        cfg = SimpleNamespace(solver="euler", steps=2, guidance=0, resolution=0)
        vgrpo.Policy(pipe, cfg, torch.device("cpu"))


# ---- LoRA and weight files


def test_lora_changes_nothing_at_its_start_and_leaves_attn2_alone():
    z, t = torch.randn(2, 4, 8, 8, generator=gen(0)), torch.tensor([.3, .8])
    outputs = []
    for rank in ("0", "4"):
        _, policy, trainable = load("--lora-rank", rank, "--steps", "2")
        policy.generate(["a red circle on the left"], [gen(0)])
        outputs.append(policy.velocity(z, t, policy.conditions()).detach())
    assert torch.equal(*outputs)
    assert all(re.search(r"blocks\.\d\.attn\..*lora_[AB]$", name) and p.dtype == torch.float32
               for name, p in trainable.items())
    frozen = {name for name, p in policy.transformer.named_parameters() if not p.requires_grad}
    assert len(trainable) == 2 * (3 * 8 - 1) and not frozen & trainable.keys()


def shift_lora(trainable):
    with torch.no_grad():
        for name, p in trainable.items():
            p.add_(torch.randn(p.shape, generator=gen(name)) * .1)


@pytest.mark.parametrize("alpha", ["4", "12"])
def test_an_exported_lora_gives_diffusers_the_same_images(tmp_path, alpha):
    pytest.importorskip("peft")
    from diffusers import StableDiffusion3Pipeline
    flags = ["--lora-rank", "4", "--lora-alpha", alpha, "--steps", "4", "--solver", "euler"]
    cfg, policy, trainable = load(*flags)
    before = policy.generate(["a red circle on the left"], [gen(0)])
    shift_lora(trainable)
    after = policy.generate(["a red circle on the left"], [gen(0)])
    latents = policy.latents
    vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        vgrpo.MODELS["tiny"], text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    fresh = pipe(prompt="a red circle on the left", num_inference_steps=4, guidance_scale=0,
                 max_sequence_length=0, generator=[gen(0)], output_type="latent")[0]
    assert (fresh - latents).abs().max() < 1e-5
    assert not torch.equal(before, after)


def test_a_full_export_is_a_transformer_that_diffusers_loads(tmp_path):
    from diffusers import SD3Transformer2DModel
    cfg, policy, trainable = load("--lora-rank", "0")
    shift_lora(trainable)
    vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    fresh = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    for name, p in fresh.named_parameters():
        assert torch.equal(p, trainable[name])


def test_lora_flag_starts_from_an_earlier_stage(tmp_path):
    cfg, policy, trainable = load("--lora-rank", "4", "--lora-alpha", "12")
    shift_lora(trainable)
    vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    other, policy, again = load("--lora-rank", "4", "--lora-alpha", "6")
    vgrpo.load_weights(tmp_path, again, other, "--lora")
    for name in trainable:                     # the same product alpha / r * B A, whatever this run's alpha
        assert torch.allclose(again[name], trainable[name] * (2 if name.endswith("lora_B") else 1))
    with pytest.raises(vgrpo.UsageError, match="lora-rank"):
        vgrpo.load_weights(tmp_path, load("--lora-rank", "3")[2], other, "--lora")


# ---- the update


def rollout(policy, cfg, iteration=1):
    items = {i: item for i, item in enumerate(vgrpo.load_prompts(cfg)[0][:cfg.prompts_per_iteration])}
    return vgrpo.collect(policy, items, cfg.group_size, cfg, cfg.seed, "noise", iteration)


def gradients(policy, trainable, groups, A, cfg):
    class Recorder:
        def __init__(self):
            self.grads = []

        def step(self):
            self.grads.append([p.grad.clone() for p in trainable.values()])

        def zero_grad(self):
            for p in trainable.values():
                p.grad = None
    optimizer, ema = Recorder(), SimpleNamespace(step=lambda params: None)
    stats, _ = vgrpo.update(policy, list(trainable.values()), optimizer, ema, groups, A, cfg, 1)
    return optimizer.grads, stats


def test_the_first_step_without_an_old_pass_has_the_two_pass_gradient():
    cfg, policy, trainable = load(*SMALL, "--grad-norm", "0", "--clip", "0.01", "--kl", "0.3")
    groups = rollout(policy, cfg)
    A = torch.randn(4, 3, generator=gen(0))
    (shortcut,), stats = gradients(policy, trainable, groups, A, cfg)
    assert (stats["ratio"] == 1).all() and (stats["kl"] == 0).all()
    assert torch.allclose(stats["loss"], -A.double())
    total = 0.0
    for group in groups:
        with torch.no_grad():
            L_old, x_old = vgrpo.estimate(policy, group, slice(0, 3), A, cfg, 1)
        L, x = vgrpo.estimate(policy, group, slice(0, 3), A, cfg, 1)
        rho = torch.exp(L_old - L)
        bounded = torch.minimum(rho * A[group.index], rho.clamp(.99, 1.01) * A[group.index])
        total = total - bounded.mean() / 4 + .3 * (x - x_old).square().flatten(1).mean() / 4
    for mine, theirs in zip(shortcut, torch.autograd.grad(total, list(trainable.values()))):
        assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_policy_gradient_is_that_of_the_surrogate():
    """At theta_old the gradient is sum_i A_i grad L_hat_i: no exponential, no clip left in it."""
    cfg, policy, trainable = load(*SMALL, "--grad-norm", "0")
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    (grads,), _ = gradients(policy, trainable, groups, A, cfg)
    L = {g.index: vgrpo.estimate(policy, g, slice(0, 3), A, cfg, 1)[0] for g in groups}
    total = sum((L[g.index] * A[g.index]).sum() for g in groups) / 12
    for mine, theirs in zip(grads, torch.autograd.grad(total, list(trainable.values()))):
        assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("micro", ["1", "2"])
def test_gradients_do_not_depend_on_the_micro_batch(micro):
    A = torch.randn(4, 3, generator=gen(0))
    results = []
    for size in ("0", micro):
        cfg, policy, trainable = load(*SMALL, "--grad-norm", "0", "--micro-batch", size)
        results.append(gradients(policy, trainable, rollout(policy, cfg), A, cfg)[0][0])
    for one, other in zip(*results):
        assert torch.allclose(one, other, atol=1e-5 * one.abs().max().item() + 1e-7)


def test_later_steps_of_an_iteration_are_off_policy():
    """Two updates of whole groups: the second's ratio and KL are against theta_old, not themselves."""
    cfg, policy, trainable = load(*SMALL, "--updates", "2", "--kl", "0.1", "--clip", "0.01")
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    old = [vgrpo.estimate(policy, group, slice(0, 3), A, cfg, 1) for group in groups]
    ema = SimpleNamespace(step=lambda p: None)
    stats, _ = vgrpo.update(policy, list(trainable.values()), optimizer, ema, groups, A, cfg, 1)
    assert (stats["ratio"][:2] == 1).all() and (stats["kl"][:2] == 0).all()
    assert (stats["ratio"][2:] != 1).any() and (stats["kl"][2:] > 0).all()
    expected = torch.exp(torch.stack([L for L, _ in old[2:]]).detach() - stats["surrogate"][2:])
    assert torch.allclose(stats["ratio"][2:], expected.double(), atol=1e-5)


def test_guided_and_bf16_runs_step(tmp_path):
    lines = run(tmp_path / "a", "--guidance", "4", "--lora-rank", "2", "--iterations", "1")
    assert lines[1]["ratio_mean"] == 1 and lines[1]["grad_norm"] > 0
    lines = run(tmp_path / "b", "--dtype", "bf16", "--checkpointing", "--lora-rank", "2", "--iterations",
                "1")
    assert math.isfinite(lines[1]["grad_norm"]) and lines[1]["grad_norm"] > 0


# ---- a device that is not the CPU


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device: a CPU's numbers, which refuse to be mixed with the CPU's own."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, device="elsewhere:0")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_its_device(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """Tensors can be made on that device, and moved there and back."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_its_device(func, args, kwargs or {})


def on_its_device(func, args, kwargs):
    """Tensors of two devices meet only where a GPU lets them: in copies, as single numbers, as indices."""
    def there(x):
        return isinstance(x, Elsewhere)
    name, device = func.__name__.split(".")[0], kwargs.get("device")
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = any(map(there, tensors))
    guests = [x for x in tensors if away and x.ndim and not there(x)]
    if name.startswith("index"):
        guests = [x for x in guests if x is args[0]]
    assert not guests or name in ("copy_", "_to_copy"), f"{name}: tensors of two devices"
    args, kwargs = tree_map(lambda x: x.inner if there(x) else x, (args, kwargs)) if away else (args, kwargs)
    if device is not None:
        away = torch.device(device).type == "elsewhere"
        kwargs = {**kwargs, "device": "cpu" if away else device}
    out = func(*args, **kwargs)
    return tree_map(lambda x: Elsewhere(x) if away and isinstance(x, torch.Tensor) else x, out)


def two_iterations(device):
    cfg = vgrpo.parse_config("--prompts-per-iteration 4 --group-size 4 --steps 3 --updates 2 --micro-batch 2 "
                             "--lora-rank 4 --guidance 3 --kl 0.1 --clip 0.01 --offload".split())
    policy, trainable = vgrpo.load_policy(cfg, torch.device(device))
    scorer = rewards.Rewards("shapes", device)
    optimizer, ema, _ = vgrpo.restore(trainable, None, 0, cfg)
    items = dict(enumerate(vgrpo.load_prompts(cfg)[0][:4]))
    args = policy, [*trainable.values()], optimizer, ema, scorer, items, cfg
    lines = [vgrpo.improve(*args, iteration) for iteration in (1, 2)]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def go_elsewhere():
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
    _setup_privateuseone_for_python_backend("elsewhere")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Devices():
        print(json.dumps(two_iterations("elsewhere:0")))


@pytest.mark.slow
def test_a_run_on_another_device_mixes_no_tensors_and_gives_the_cpus_numbers():
    """What a GPU would refuse is refused here too. In a process of its own, which is given a new device."""
    code = "import test_vgrpo; test_vgrpo.go_elsewhere()"
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    lines = two_iterations("cpu")
    assert lines[1]["ratio_max"] != 1 and lines[1]["kl"] > 0
    close(json.loads(process.stdout.splitlines()[-1]), lines, 1e-4)


# ---- runs


def test_run_folder_and_metrics(tmp_path):
    out = tmp_path / "run"
    lines = run(out, "--updates", "2", "--eval-every", "1", "--lora-rank", "4")
    assert [line["iteration"] for line in lines] == [0, 1, 1, 2, 2]
    assert {"iteration", "eval", "eval/redness"} == lines[0].keys() and lines[1]["grad_norm"] > 0
    names = set(re.search(r"per iteration: `([^`]*)`", (HERE / "README.md").read_text())[1].split(", "))
    raw = json.loads((out / "metrics.jsonl").read_text().splitlines()[1])
    assert set(raw) == names - {"reward/<name>"} | {"reward/redness"}
    assert (raw["nfe_rollout"], raw["nfe_old"], raw["nfe_train"]) == (3, 1, 2)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    folder = out / "checkpoints" / "000002"
    names = {p.name for p in folder.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "ema", "exp_avg", "exp_avg_sq"}
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["lora_rank"] == 4 and torch.__version__.startswith(config["versions"]["torch"])


def test_trackers_are_told_what_the_file_is_told(tmp_path, monkeypatch):
    told, started, logged = [], [], []
    board = SimpleNamespace(SummaryWriter=lambda *args, **kwargs: SimpleNamespace(
        add_scalar=lambda *scalar: told.append(scalar)))
    wandb = SimpleNamespace(init=lambda **kwargs: started.append(kwargs["id"]) or SimpleNamespace(
        log=logged.append))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    for name in ("tensorboard", "wandb"):                          # a folder of that name is no package
        (tmp_path / "folders" / name).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "folders")
    find_spec = vgrpo.find_spec
    monkeypatch.setattr(vgrpo, "find_spec", lambda name: find_spec(name) if installed[name] is None else
                        SimpleNamespace(origin="file" if installed[name] else None))
    line = {"iteration": 3, "loss": .5}
    installed = dict(tensorboard=None, wandb=False)
    if find_spec("tensorboard").origin is None:
        vgrpo.start_log(tmp_path / "a", vgrpo.parse_config([]), 0)(line)
    installed = dict(tensorboard=True, wandb=True)
    vgrpo.start_log(tmp_path / "b", vgrpo.parse_config([]), 0)(line)
    assert told == [("iteration", 3, 3), ("loss", .5, 3)] and not started      # only where a project is named
    monkeypatch.setenv("WANDB_PROJECT", "p")
    installed = dict(tensorboard=False, wandb=True)
    for run in ("x/seed0", "y/seed0"):
        vgrpo.start_log(tmp_path / run, vgrpo.parse_config([]), 0)(line)
    assert len(set(started)) == 2 and logged == [line, line] and len(told) == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--lora-rank", "4", "--lora-alpha", "3", "--updates", "2",
                                         "--kl", "0.1")])
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, flags):
    whole = run(tmp_path / "a", "--iterations", "4", "--eval-every", "2", *flags)
    assert any(line["grad_norm"] > 0 for line in whole if "reward" in line)
    run(tmp_path / "b", "--iterations", "3", "--eval-every", "2", *flags)
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:  # a crash: lines beyond the last checkpoint,
        file.write('{"iteration": 4, "reward": 9}\n{"iterat')      # and half of one
    (tmp_path / "b" / "checkpoints" / "partial").mkdir()           # and a checkpoint half written
    vgrpo.main(["--resume", str(tmp_path / "b"), "--iterations", "4"])
    resumed = metrics(tmp_path / "b")
    assert [line for line in resumed if line["iteration"] != 3 or "reward" in line] == whole
    for name in ("", "ema", "exp_avg", "exp_avg_sq"):
        folders = (tmp_path / run / "checkpoints" / "000004" / name for run in "ab")
        a, b = (sorted(folder.rglob("*.safetensors")) for folder in folders)
        assert a and all(torch.equal(one[k], other[k]) for p, q in zip(a, b)
                         for one, other in [(load_file(p), load_file(q))] for k in one.keys() | other.keys())


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    whole = run(tmp_path / "a")
    assert run(tmp_path / "b", "--resume") == whole            # nothing there yet: a job may always say so
    shutil.rmtree(tmp_path / "b" / "checkpoints")                  # killed in its first iteration
    assert run(tmp_path / "b", "--resume") == whole


def test_a_run_is_not_overwritten(tmp_path, capsys):
    run(tmp_path / "a", "--iterations", "1")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'a'}: tiny with recipe tiny, 1 x CPU" and last == f"done: {tmp_path / 'a'}"
    before = metrics(tmp_path / "a")
    with pytest.raises(SystemExit) as end:
        vgrpo.main([*SMALL, "--out", str(tmp_path / "a")])
    assert end.value.code == 2 and "--resume" in capsys.readouterr().err and metrics(tmp_path / "a") == before


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    first, again, other = run(tmp_path / "a"), run(tmp_path / "b"), run(tmp_path / "c", "--seed", "1")
    assert first == again and first[1]["grad_norm"] != other[1]["grad_norm"]
    assert first[0] == other[0]                            # the evaluation's noise is the same in every run


def test_prompts_repeat_only_after_all_have_been_used():
    cfg = SimpleNamespace(prompts_per_iteration=4, seed=3)
    items = [{"prompt": str(i)} for i in range(10)]
    order = [vgrpo.pick(items, cfg, k, i)["prompt"] for k in range(1, 6) for i in range(4)]
    assert len(set(order[:10])) == 10 and len(set(order[10:])) == 10 and order[:10] != order[10:]


def test_layout_gives_an_update_the_same_groups_on_any_number_of_ranks():
    for ranks in (1, 2, 4):
        parts = [vgrpo.layout(16, 2, rank, ranks) for rank in range(ranks)]
        for update in range(2):
            size = 8 // ranks
            assert sorted(sum((part[update * size:(update + 1) * size] for part in parts), [])) \
                == list(range(8 * update, 8 * update + 8))
    with pytest.raises(vgrpo.UsageError, match="10: .* multiple of 4, such as 8 or 12"):
        vgrpo.layout(10, 2, 0, 2)


def command(*args, ranks=0, code=HERE / "vgrpo.py", **options):
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    env = {**os.environ, "OMP_NUM_THREADS": "1" if ranks else str(torch.get_num_threads())}
    words, pipe = [sys.executable, *start, str(code), *map(str, args)], subprocess.PIPE
    return subprocess.Popen(words, env=env, stdout=pipe, stderr=pipe, text=True, **options)


@contextlib.contextmanager
def hangups(action):
    """What this process, and those that it starts, do at SIGHUP, whether the tests run under nohup or not."""
    before = signal.signal(signal.SIGHUP, action)
    yield
    signal.signal(signal.SIGHUP, before)


def ranks_of(process, out, lines=3):
    """The process ids of torchrun's ranks, once the run has written some lines."""
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < lines:
        time.sleep(.1)
        assert process.poll() is None, process.stderr.read()
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("ranks, P, flags", [
    (2, 4, ["--lora-rank", "4", "--micro-batch", "1"]), (2, 4, ["--shard", "--updates", "1"]),
    (2, 4, ["--micro-batch", "2", "--share", "matched"]),
    (3, 6, ["--lora-rank", "4", "--shard", "--micro-batch", "2"]), (4, 8, ["--shard", "--micro-batch", "1"])])
def test_any_number_of_ranks_gives_the_numbers_of_one(tmp_path, ranks, P, flags):
    flags = ["--prompts-per-iteration", P, "--iterations", 3, "--updates", 2, "--eval-every", 2, *flags]
    flags = [*SMALL, *map(str, flags)]
    process = command(*flags, "--out", tmp_path / "many", ranks=ranks)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    one = run(tmp_path / "one", *flags, "--micro-batch", "0")
    assert max(line.get("grad_norm", 0) for line in one) > 0
    close(one, metrics(tmp_path / "many"), 1e-4)
    for name in ("many", "one"):                                   # and on other ranks again
        vgrpo.main(["--resume", str(tmp_path / name), "--iterations", "4", "--micro-batch", "0"])
    close(metrics(tmp_path / "one"), metrics(tmp_path / "many"), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_saves_and_exits(tmp_path, number):
    with hangups(signal.SIG_DFL):
        process = command(*SMALL, "--iterations", "10000", "--save-every", "10000", "--out", tmp_path / "run")
    ranks_of(process, tmp_path / "run")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    saved = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [max(line["iteration"] for line in metrics(tmp_path / "run"))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_saves_and_leaves_no_process(tmp_path, number):
    """SIGHUP is a closed terminal: torchrun passes it on under nohup too, which its ranks have inherited."""
    long = ["--iterations", "10000", "--save-every", "10000"]
    with hangups(signal.SIG_IGN):
        process = command(*SMALL, *long, "--out", tmp_path / "run", ranks=2)
    pids = ranks_of(process, tmp_path / "run")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 1 and len(pids) == 2 and all(map(gone, pids))     # 1 is torchrun's own
    saved = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [max(line["iteration"] for line in metrics(tmp_path / "run"))]


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, monkeypatch):
    improve = vgrpo.improve
    monkeypatch.setattr(vgrpo, "improve", lambda *a: os.kill(os.getpid(), signal.SIGHUP) or improve(*a))
    with hangups(signal.SIG_IGN):
        run(tmp_path)
    assert (tmp_path / "checkpoints" / "000002").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["RANK == '1'", "True"])
def test_what_fails_on_any_rank_while_it_loads_is_told_once(tmp_path, failing):
    reward = tmp_path / "hub.py"
    reward.write_text("import os\nRANK = os.environ['RANK']\nclass Reward:\n"
                      f"    def __init__(self, device):\n        if {failing}:\n"
                      "            raise OSError('429: too many requests')\n"
                      "    def __call__(self, images, prompts, metadata):\n"
                      "        return images[:, 0, 0, 0]\n")
    process = command(*SMALL, "--out", tmp_path / "run", "--reward", f"{reward}:Reward", ranks=2)
    _, errors = process.communicate(timeout=90)
    assert process.returncode and errors.count("429: too many requests") == 1, errors


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down_with_one_message(tmp_path):
    process = command(*SMALL, "--iterations", "10000", "--out", tmp_path / "run", ranks=2)
    pids = ranks_of(process, tmp_path / "run")
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    messages = [line for line in errors.splitlines() if line.startswith("vgrpo.py: error")]
    assert process.returncode and all(map(gone, pids))
    assert len(messages) == 1 and "lost another rank" in messages[0]


DEADLY = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import vgrpo
name, last, calls = sys.argv[2], int(sys.argv[3]), []
real = getattr(vgrpo, name)
def deadly(*args, **kwargs):
    calls.append(name)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(vgrpo, name, deadly)
vgrpo.main(sys.argv[4:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, last, iteration", [
    ("collect", 5, 2), ("estimate", 10, 2), ("save_file", 11, 2), ("save_grid", 2, 1)])
def test_killed_at_any_moment_a_run_resumes_to_the_same_numbers(tmp_path, name, last, iteration):
    """In the third rollout, the third update, while the third checkpoint is written, in an evaluation."""
    flags = ["--iterations", "4", "--eval-every", "2"]
    whole = run(tmp_path / "a", *flags)
    (tmp_path / "deadly.py").write_text(DEADLY)
    process = command(HERE, name, last, *SMALL, *flags, "--out", tmp_path / "b", code=tmp_path / "deadly.py")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    complete = sorted((tmp_path / "b" / "checkpoints").glob("[0-9]*"))
    assert int(complete[-1].name) == iteration
    assert run(tmp_path / "b", *flags, "--resume") == whole


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """Files may not grow beyond 1 MB: less than the weights take."""
    import resource
    whole = run(tmp_path / "a")
    run(tmp_path / "b", "--iterations", "1")
    process = command("--resume", tmp_path / "b", "--iterations", "2", preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (2**20, 2**20)))
    _, errors = process.communicate(timeout=60)
    messages = [line for line in errors.splitlines() if "error" in line]
    assert process.returncode == 1 and len(messages) == 1 and "too large" in messages[0], errors
    assert [folder.name for folder in (tmp_path / "b" / "checkpoints").glob("[0-9]*")] == ["000001"]
    assert run(tmp_path / "b", "--resume")[-1] == whole[-1]


def test_more_ranks_than_gpus_and_a_disk_that_is_not_shared(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(vgrpo.UsageError, match="--nproc_per_node 2: there are 1 GPUs"):
            vgrpo.start_ranks()
    monkeypatch.setattr(vgrpo, "sum_over_ranks", lambda tensor, device: tensor + 1)    # others have done more
    with pytest.raises(SystemExit) as end:
        vgrpo.main([*SMALL, "--out", str(tmp_path / "a")])
    assert end.value.code == 2 and "disk" in capsys.readouterr().err


# ---- what a round of mutations found untested


NO_EMA = SimpleNamespace(step=lambda params: None)


def test_strata_are_drawn_apart_and_neighbours_are_antithetic():
    t, eps = vgrpo.draw_pairs(gen(0), torch.linspace(1, .1, 10), torch.zeros(200), 5, (3,), "none")
    assert len((t[:, 0] - t[:, 1]).round(decimals=3).unique()) == 3
    assert torch.equal(eps[:, 1:4:2], -eps[:, 0:4:2]) and not torch.equal(eps[:, 2], -eps[:, 1])


def test_a_perfect_prediction_has_loss_0_and_no_gradient():
    v = torch.zeros(1, 2, 3, requires_grad=True)
    o, z, t = torch.zeros(1, 3), torch.zeros(1, 2, 3), torch.full((1, 2), .5)
    L, _ = vgrpo.surrogate(v, o, z, t)
    L.sum().backward()
    assert L.item() == 0 and torch.equal(v.grad, torch.zeros_like(v))
    for size, expected in ((2e-4, 1e-4), (2e-6, 1e-7)):            # x is off by half of it; the floor is 1e-5
        L, _ = vgrpo.surrogate(v.detach() + size, o, z, t)
        assert L.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", ["0.1", "0"])
def test_kl_of_a_later_step_is_the_distance_from_theta_old(beta):
    cfg, policy, trainable = load(*SMALL, "--updates", "2", "--kl", beta)
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)

    def x_theta():
        with torch.no_grad():
            return torch.stack([vgrpo.estimate(policy, g, slice(0, 3), A, cfg, 1)[1] for g in groups[2:]])
    old = x_theta()
    once = SimpleNamespace(step=lambda params: optimizer.param_groups[0].update(lr=0))     # theta stays there
    stats, _ = vgrpo.update(policy, [*trainable.values()], optimizer, once, groups, A, cfg, 1)
    expected = (x_theta() - old).square().flatten(2).mean(-1).double()
    assert expected.min() > 0 and torch.allclose(stats["kl"][2:], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("beta", ["0.3", "0"])
def test_later_steps_follow_the_clipped_objective_and_the_kl(beta):
    """Each of four steps, against the formula in the ratio and the KL that it reports, also without --kl."""
    cfg, policy, trainable = load(*SMALL, "--updates", "4", "--kl", beta, "--clip", "1e-4")
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    stats, _ = vgrpo.update(policy, [*trainable.values()], optimizer, NO_EMA, groups, A, cfg, 1)
    rho, A = stats["ratio"], A.double()
    assert (rho[0] == 1).all() and (rho[1:] != 1).all() and (stats["kl"][1:] > 0).all()
    bounded = torch.minimum(rho * A, rho.clamp(1 - 1e-4, 1 + 1e-4) * A)
    assert (bounded != rho * A).any()
    assert torch.allclose(stats["loss"], cfg.kl * stats["kl"] - bounded, atol=1e-6)
    assert {(rho[1:] > 1.0001).any().item(), (rho[1:] < .9999).any().item()} == {True}  # either bound is met


def test_a_gradient_step_is_a_mean_over_the_images_of_its_own_groups():
    cfg, policy, trainable = load(*SMALL, "--updates", "2", "--grad-norm", "0")
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    steps, _ = gradients(policy, trainable, groups, A, cfg)
    for batch, grads in zip((groups[:2], groups[2:]), steps):
        losses = [vgrpo.estimate(policy, g, slice(0, 3), A, cfg, 1)[0] * A[g.index] for g in batch]
        total = torch.cat(losses).mean()
        for mine, theirs in zip(grads, torch.autograd.grad(total, list(trainable.values()))):
            assert torch.allclose(mine, theirs, atol=1e-6, rtol=1e-4)


def test_ranks_average_their_gradients(monkeypatch):
    """As if two ranks' gradients summed to three of this one's."""
    cfg, policy, trainable = load(*SMALL, "--grad-norm", "0")
    groups, A = rollout(policy, cfg), torch.randn(4, 3, generator=gen(0))
    (alone,), _ = gradients(policy, trainable, groups, A, cfg)
    monkeypatch.setattr(vgrpo, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 2, all_reduce=lambda tensor: tensor.mul_(3)))
    (both,), _ = gradients(policy, trainable, groups, A, cfg)
    assert all(torch.allclose(1.5 * one, two, atol=1e-7) for one, two in zip(alone, both))


def test_the_gradient_is_clipped():
    cfg, policy, trainable = load(*SMALL, "--grad-norm", "0.01")
    (grads,), _ = gradients(policy, trainable, rollout(policy, cfg), torch.randn(4, 3, generator=gen(0)), cfg)
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(.01, rel=1e-3)


def test_pairs_are_of_the_seed_the_iteration_the_group_and_the_flags():
    cfg, policy, _ = load(*SMALL, "--share", "both")
    group, A = rollout(policy, cfg)[1], torch.randn(4, 3, generator=gen(0))

    def L(iteration=1, index=1, A=A, **flags):
        one, flags = replace(group, index=index), replace(cfg, **flags)
        with torch.no_grad():
            return tuple(vgrpo.estimate(policy, one, slice(0, 3), A, flags, iteration)[0].tolist())
    changes = [{}, dict(iteration=2), dict(index=2), dict(seed=1), dict(share="none"), dict(share="matched"),
               dict(stratified=False), dict(antithetic=False), dict(weight="x")]
    assert len({L(**change) for change in changes}) == len(changes)
    other = [torch.where(torch.arange(4)[:, None] == row, A.roll(1, 1), A) for row in (0, 1)]
    assert L(A=other[0], share="matched") == L(share="matched") != L(A=other[1], share="matched")


def test_every_image_of_a_run_has_noise_of_its_own(tmp_path, monkeypatch):
    keys, generator = Counter(), vgrpo.generator
    monkeypatch.setattr(vgrpo, "generator", lambda *key: keys.update([key]) or generator(*key))
    run(tmp_path / "run", "--seed", "5")
    noise = {key: count for key, count in keys.items() if "noise" in key}
    assert noise == {(5, "noise", k, index, i): 1 for k in (1, 2) for index in range(4) for i in range(3)}


def test_scores_lie_where_their_group_belongs():
    images = torch.arange(6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 2, 2).to(torch.uint8)
    groups = [vgrpo.Group(index, {"prompt": str(index)}, pixels, None, {})
              for index, pixels in zip((2, 0), images)]

    def scorer(pixels, prompts, items):
        assert prompts == [item["prompt"] for item in items] == ["2"] * 3 + ["0"] * 3
        return {"bright": pixels.mean((1, 2, 3))}
    scorer.weights = {"bright": 1.0}
    table = vgrpo.score(scorer, groups, 3, torch.device("cpu")) * 255
    assert torch.allclose(table, torch.tensor([[[3, 4, 5], [0, 0, 0], [0, 1, 2]]]).double(), atol=1e-4)


def test_another_seed_takes_the_prompts_in_another_order():
    items = list(range(100))
    orders = [[vgrpo.pick(items, SimpleNamespace(prompts_per_iteration=8, seed=seed), 1, i) for i in range(8)]
              for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_an_iteration_clips_combines_and_reports(monkeypatch):
    """improve() between its parts: what update() is given, and the metrics made of what it returns."""
    adam = SimpleNamespace(param_groups=[{"lr": 0.7}])
    cfg, policy, _ = load(*SMALL, "--clip", "0.1", "--soft-clip", "0.5", "--combine", "sum")
    table = torch.randn(2, 4, 3, generator=gen(1)).double() * torch.tensor([1.0, 9.0])[:, None, None]
    A = vgrpo.soft_clip(vgrpo.group_advantages(table.sum(0)), .5)
    ratio = torch.tensor([1.2, .8, 1.0]).double().expand(4, 3)

    L = torch.rand(4, 3, generator=gen(2)).double()

    def update(policy, params, optimizer, ema, groups, advantages, cfg, iteration):
        assert torch.allclose(advantages, A, atol=1e-5)
        return dict(loss=ratio, kl=ratio, surrogate=L, ratio=ratio), 1.0
    monkeypatch.setattr(vgrpo, "update", update)
    monkeypatch.setattr(vgrpo, "collect", lambda *args: [])
    monkeypatch.setattr(vgrpo, "score", lambda *args: table)
    line = vgrpo.improve(policy, [], adam, None, SimpleNamespace(weights=dict(a=1.0, b=1.0)), {}, cfg, 1)
    assert line["lr"] == 0.7
    stopped = (A[:, 0] > 0).sum() + (A[:, 1] < 0).sum()
    assert line["clip_fraction"] == pytest.approx(stopped.item() / 12) and line["reward/b"] == table[1].mean()
    assert line["reward_std"] == pytest.approx((table.mean(0).var(1, correction=0).mean().sqrt()).item())
    assert line["surrogate_group_cv"] == pytest.approx(np.mean([row.std() / row.mean() for row in L]).item())
    table[:, 1], table[:, 3, 0] = 7.0, math.nan        # a group of equal rewards; an image without a score
    A[1], A[2:] = 0, vgrpo.soft_clip(vgrpo.group_advantages(table.sum(0)), .5)[2:]
    line = vgrpo.improve(policy, [], adam, None, SimpleNamespace(weights=dict(a=1.0, b=1.0)), {}, cfg, 1)
    assert line["zero_std_groups"] == 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_grid_of_dpm_is_shifted_and_even(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler
    scheduler = vgrpo.make_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift), "dpm++")
    scheduler.set_timesteps(4)
    expected = [shift * s / (1 + (shift - 1) * s) for s in (1, .75, .5, .25)] + [0]
    assert torch.allclose(scheduler.sigmas, torch.tensor(expected))


def test_adamw_and_the_ema_are_given_their_flags():
    cfg, _, trainable = load(*SMALL, "--weight-decay", "0.25", "--lr", "0.5", "--ema", "0.7")
    optimizer, ema, _ = vgrpo.restore(trainable, None, 0, cfg)
    assert (optimizer.defaults["weight_decay"], optimizer.defaults["lr"], ema.decay) == (.25, .5, .7)


def test_a_checkpoint_holds_the_weights_and_in_ema_their_average(tmp_path):
    run(tmp_path, "--lora-rank", "4", "--ema", "0.9")
    w1, w2, ema = (load_file(tmp_path / "checkpoints" / name / "pytorch_lora_weights.safetensors")
                   for name in ("000001", "000002", "000002/ema"))
    assert all(torch.allclose(ema[k], (2 * w1[k] + 9 * w2[k]) / 11, atol=1e-7) for k in ema)
    assert any((w1[k] - w2[k]).abs().max() > 1e-5 for k in w1)


def test_a_checkpoint_appears_whole_and_two_stay(tmp_path, monkeypatch, capsys):
    folder, save_file, calls = tmp_path / "checkpoints", vgrpo.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) > 14:                                        # in the fourth checkpoint
            raise OSError("disk full")
        save_file(*args)
    monkeypatch.setattr(vgrpo, "save_file", full)
    with pytest.raises(SystemExit):
        run(tmp_path, "--iterations", "5", "--lora-rank", "2")
    assert sorted(path.name for path in folder.glob("0*")) == ["000002", "000003"]
    monkeypatch.undo()
    (folder / "partial" / "stray").write_text("")
    run(tmp_path, "--iterations", "4", "--resume", "--lora-rank", "2")
    assert not list(folder.rglob("stray")) and not (folder / "partial").exists()


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_the_iteration_saves_and_exits(tmp_path, monkeypatch, number):
    improve, handler = vgrpo.improve, signal.getsignal(number)
    monkeypatch.setattr(vgrpo, "improve", lambda *args: os.kill(os.getpid(), number) or improve(*args))
    with hangups(lambda *_: None), pytest.raises(SystemExit) as end:
        run(tmp_path, "--iterations", "9", "--save-every", "9")
    signal.signal(number, handler)
    assert end.value.code == 128 + number and (tmp_path / "checkpoints" / "000001").is_dir()


def test_evaluation_sees_the_average_and_training_does_not(tmp_path, monkeypatch):
    seen, evaluate = [], vgrpo.evaluate
    monkeypatch.setattr(vgrpo, "evaluate", lambda policy, *args: seen.append({
        k: p.detach().clone() for k, p in policy.transformer.named_parameters() if p.requires_grad})
        or evaluate(policy, *args))
    run(tmp_path, "--lora-rank", "4")
    for k, value in load_file(tmp_path / "checkpoints/000002/ema/pytorch_lora_weights.safetensors").items():
        assert torch.equal(seen[-1][k.removeprefix("transformer.").removesuffix(".weight")], value)


def test_adapters_start_small():
    _, _, trainable = load("--lora-rank", "16")
    A = torch.cat([p.flatten() for name, p in trainable.items() if name.endswith("lora_A")])
    assert A.std().item() == pytest.approx(1 / 16, rel=.05)


def test_a_lora_of_unsaid_alpha_has_its_rank_as_alpha(tmp_path):
    from safetensors.torch import save_file
    cfg, _, trainable = load("--lora-rank", "4", "--lora-alpha", "12")
    path = tmp_path / "a.safetensors"
    save_file({f"transformer.{k}.weight": torch.ones_like(p) for k, p in trainable.items()}, path)
    vgrpo.load_weights(path, trainable, cfg, "--lora")
    for name, p in trainable.items():
        assert torch.allclose(p, torch.tensor(1 / 3 if name.endswith("lora_B") else 1.0))


def test_a_full_export_holds_every_tensor(tmp_path):
    cfg, policy, trainable = load("--lora-rank", "0")
    vgrpo.save_weights(tmp_path, trainable, policy.transformer, cfg)
    stored = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == policy.transformer.state_dict().keys()


def test_an_evaluation_weighs_its_rewards(monkeypatch):
    """Two prompts on three ranks: the third group is there for the ranks' sake and in no mean."""
    table = torch.stack([torch.tensor([[1., 3.], [5., math.nan], [100., 100.]]), torch.full((3, 2), 8.)])
    monkeypatch.setattr(vgrpo, "collect", lambda *args: [])
    monkeypatch.setattr(vgrpo, "score", lambda scorer, groups, P, device: table.double()[:, :P])
    scorer = SimpleNamespace(weights=dict(a=3.0, b=1.0, c=0.0))
    table = torch.cat([table, table[1:]])
    metrics, _, kept = vgrpo.evaluate(SimpleNamespace(device="cpu"), scorer, [{}, {}], None, 0, 3)
    assert kept.shape == (3, 2, 2) and metrics["eval/a"] == 3 and metrics["eval/b"] == 8
    assert metrics["eval"] == pytest.approx((2.75 + 4.25 + 5.75) / 3)


def test_the_last_iteration_is_evaluated_and_saved(tmp_path):
    lines = run(tmp_path, "--save-every", "9", "--eval-every", "9")
    assert (tmp_path / "checkpoints" / "000002").is_dir() and {"iteration", "eval"} <= lines[-1].keys()


# ---- config and bad input


def test_config_help_and_recipes():
    words = [sys.executable, HERE / "vgrpo.py", "--help"]
    text = subprocess.run(words, capture_output=True, text=True).stdout
    source = (HERE / "vgrpo.py").read_text()
    for field in fields(vgrpo.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.name == "recipe" or re.search(rf"cfg\.{field.name}\b", source)
    cfg = vgrpo.parse_config(["--model", "sd3.5-medium", "--lr", "1e-5"])
    assert (cfg.recipe, cfg.lr, cfg.steps, cfg.group_size) == ("sd3.5-s1", 1e-5, 40, 24)
    assert cfg.prompts_per_iteration == 48
    assert vgrpo.parse_config(["--model", "flux.1-dev"]).guidance == 3.5
    assert vgrpo.parse_config(["--model", "sd3.5-medium", "--recipe", "sd3.5-s5"]).kl == 0.3
    assert vgrpo.parse_config(["--model", "sd3.5-medium", "--recipe", "sd3.5-s2"]).reward == "geneval"
    assert all(vgrpo.Config(**recipe).antithetic for recipe in vgrpo.RECIPES.values())


def test_the_recipes_have_the_papers_values():
    sd35 = dict(group_size=24, prompts_per_iteration=48, steps=40, lora_rank=32, lora_alpha=64.0, lr=3e-4,
                guidance=0.0, resolution=512, share="both", stratified=True, weight="adaptive")
    one = dict(sd35, updates=1, n_mc=4, clip=0.0, kl=0.0, soft_clip=3.0, iterations=150)
    two = dict(sd35, updates=2, n_mc=10, clip=3e-2, kl=0.0, soft_clip=0.0, iterations=100)
    expected = {
        "sd3.5-s1": one, "sd3.5-s2": two, "sd3.5-s3": one, "sd3.5-s4": dict(two, iterations=25),
        "sd3.5-s5": dict(two, clip=0.0, kl=0.3, iterations=15),
        "flux": dict(updates=4, steps=16, n_mc=4, clip=1e-2, kl=0.0, soft_clip=3.0, guidance=3.5, lr=1e-5,
                     group_size=12, prompts_per_iteration=32, lora_rank=0, resolution=720, iterations=300)}
    for name, values in expected.items():
        cfg = vgrpo.parse_config(["--model", "sd3.5-medium", "--recipe", name])
        assert {key: getattr(cfg, key) for key in values} == values


def test_booleans():
    assert vgrpo.parse_config([]).antithetic and vgrpo.parse_config(["--antithetic"]).antithetic
    assert not vgrpo.parse_config(["--no-antithetic"]).antithetic and not vgrpo.parse_config([]).checkpointing


BAD = [(["--model", "nobody/nothing", "--recipe", "tiny"], "--model nobody/nothing"),
       (["--reward", "beauty"], "beauty"), (["--solver", "heun"], "--solver"),
       (["--recipe", "x"], "--recipe"),
       (["--prompts", "MISSING.txt"], "MISSING.txt"),
       (["--prompts", "EMPTY.txt"], "empty"), (["--prompts", "BINARY.txt"], "BINARY.txt"),
       (["--prompts", "BAD.jsonl"], "line 2"), (["--prompts-per-iteration", "5", "--updates", "2"], "4 or 6"),
       (["--group-size", "1"], "--group-size"), (["--lr", "-1"], "--lr"), (["--clip", "nan"], "--clip"),
       (["--model", "tinny"], "OWNER/NAME"), (["--resolution", "100"], "--resolution 100"),
       (["--resolution", "512"], "--resolution 512"), (["--steps", "many"], "--steps"),
       (["--lora-rank", "4", "--lora-alpha", "0"], "--lora-alpha"),
       (["--iteration", "3"], "--iteration"), (["--resume"], "--resume"),
       (["--resume", "runs/typo"], "runs/typo"), (["--lora", "x"], "--lora-rank"),
       (["--lora", "MISSING", "--lora-rank", "4"], "MISSING")]


@pytest.mark.parametrize("flags, names", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, flags, names):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY.txt").write_text("\n\n")
    Path("BINARY.txt").write_bytes(bytes(range(256)))
    Path("BAD.jsonl").write_text('{"prompt": "a red circle on the left"}\n{"promt": "x"}\n')
    with pytest.raises(SystemExit) as end:
        vgrpo.main(flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]   # bars
    assert end.value.code == 2 and len(errors) == 1 and names in errors[0], errors


def test_a_damaged_or_other_run_is_refused_and_copies_are_left_alone(tmp_path, capsys):
    run(tmp_path / "a", "--iterations", "1")
    folder, config = tmp_path / "a" / "checkpoints", tmp_path / "a" / "config.json"
    shutil.copytree(folder / "000001", folder / "000001-best")
    vgrpo.main(["--resume", str(tmp_path / "a"), "--iterations", "3"])
    assert sorted(path.name for path in folder.iterdir()) == ["000001-best", "000002", "000003"]
    for text in (config.read_text()[:50], '{"flags": {"unknown": 1}}', config.read_text()):
        config.write_text(text)
        with pytest.raises(SystemExit) as end:
            vgrpo.main(["--resume", str(tmp_path / "a"), "--recipe", "sd3.5-s5"])
        assert end.value.code == 2 and capsys.readouterr().err.count("error: --re") == 1


def test_a_reward_that_scores_nothing_ends_the_run(tmp_path, capsys):
    code = "def dead(images, prompts, metadata):\n    return images[:, 0, 0, 0] * float('nan')\n"
    (tmp_path / "own.py").write_text(code)
    with pytest.raises(SystemExit) as end:
        vgrpo.main([*SMALL, "--reward", f"{tmp_path / 'own.py'}:dead", "--out", str(tmp_path / "run")])
    assert end.value.code == 1 and "dead could not score any" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_model_that_lacks_a_weight_is_refused(tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(vgrpo.MODELS["tiny"], folder)
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    lost = next(name for name in sorted(weights) if "attn" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    for _ in range(2):                                             # the second load is looked at too
        with pytest.raises(rewards.UsageError, match="--model.*newly initialized"):
            load("--model", str(folder), "--recipe", "tiny")


def test_a_lora_with_more_layers_is_refused(tmp_path):
    cfg, policy, trainable = load("--lora-rank", "2")
    vgrpo.save_weights(tmp_path, {**trainable, "more.lora_A": torch.zeros(2)}, policy.transformer, cfg)
    with pytest.raises(rewards.UsageError, match="--lora.*transformer.more.lora_A.weight"):
        vgrpo.load_weights(tmp_path, trainable, cfg, "--lora")


@pytest.mark.parametrize("flags", [("--updates", "2"), ("--lora-alpha", "3"), ("--lora-rank", "4"),
                                   ("--lora", "x"), ("--out", "elsewhere"), ("--recipe", "sd3.5-s5")])
def test_what_a_checkpoint_keeps_cannot_be_changed_on_resume(tmp_path, flags):
    cfg = vgrpo.parse_config(["--out", str(tmp_path), "--lora-rank", "2"])
    (tmp_path / "config.json").write_text(json.dumps({"flags": vgrpo.asdict(cfg)}))
    assert vgrpo.parse_config(["--resume", str(tmp_path), "--lr", "1", "--lora-rank", "2"]).lr == 1
    with pytest.raises(rewards.UsageError, match=f"^{flags[0]}: .*--lora$"):
        vgrpo.parse_config(["--resume", str(tmp_path), *flags])


def test_a_finished_run_can_be_evaluated_anew(tmp_path):
    before = run(tmp_path, "--iterations", "1")
    after = run(tmp_path, "--resume", "--iterations", "1", "--eval-reward", "shapes,shapes-strict=0")
    assert after[:-1] == before and {*after[-1]} == {"iteration", "eval", "eval/shapes", "eval/shapes-strict"}


def test_a_run_killed_before_its_first_checkpoint_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "--iterations", "1")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert "holds a run" in capsys.readouterr().err


def test_evaluation_is_by_the_users_own_reward():
    assert vgrpo.parse_config([]).eval_reward == "shapes,shapes-strict=0"
    for flags in (["--reward", "incompressibility"], ["--prompts", "mine.txt"]):
        assert vgrpo.parse_config(flags).eval_reward == ""


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    run(tmp_path / "a", "--lora-rank", "4", "--iterations", "1")
    with pytest.raises(SystemExit) as end:
        vgrpo.main(["--resume", str(tmp_path / "a"), "--lora-rank", "2"])
    assert end.value.code == 2 and "--lora-rank" in capsys.readouterr().err


def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path, monkeypatch, capsys):
    surrogate = vgrpo.surrogate
    monkeypatch.setattr(vgrpo, "surrogate", lambda *a: tuple(out * math.nan for out in surrogate(*a)))
    with pytest.raises(SystemExit) as end:
        vgrpo.main([*SMALL, "--out", str(tmp_path / "run")])
    assert end.value.code == 1 and "gradient" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/0*"))


def test_prompt_files(tmp_path):
    (tmp_path / "a.txt").write_text("  one \n\ntwo\none\n")             # an item twice counts once
    assert vgrpo.read_prompts(str(tmp_path / "a.txt")) == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "tag": "x"}\n\n')
    assert vgrpo.read_prompts(str(tmp_path / "a.jsonl")) == [{"prompt": "one", "tag": "x"}]
    (tmp_path / "b.txt").write_text("\n".join(f"prompt {i}" for i in range(200)))
    train, held_out = vgrpo.load_prompts(SimpleNamespace(prompts=str(tmp_path / "b.txt")))
    assert len(train) == 180 and len(held_out) == 20
    assert not {str(i) for i in train} & {str(i) for i in held_out}


def test_built_in_prompts(tmp_path, monkeypatch):
    for name, key in (("geneval", "include"), ("ocr", "prompt")):
        train, held_out = vgrpo.load_prompts(SimpleNamespace(prompts=name))
        assert len(train) == 4000 - 48 and len(held_out) == 48 and all(key in item for item in train)
    import huggingface_hub

    def download(repo, file, repo_type):
        assert (repo, repo_type) == ("zhwang/HPDv2", "dataset")
        (tmp_path / Path(file).name).write_text(json.dumps(["a cat", f"{file} one", f"{file} two"]))
        return tmp_path / Path(file).name
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    prompts = [item["prompt"] for item in vgrpo.read_prompts("hpdv2")]
    assert len(prompts) == 9 and prompts[:2] == ["a cat", "benchmark/anime.json one"]


def test_the_readme_points_at_the_lines_and_tests_there_are():
    readme = (HERE / "README.md").read_text()
    source, tests = (HERE / "vgrpo.py").read_text().splitlines(), (HERE / "test_vgrpo.py").read_text()
    anchors = re.findall(r"\[`(\w+)`\]\(vgrpo\.py#L(\d+)\)", readme)
    assert len(anchors) >= 15
    lines = {name: next(n for n, line in enumerate(source, 1) if re.match(rf" *(def|class) {name}\b", line))
             for name, _ in anchors}
    assert {name: int(line) for name, line in anchors} == lines        # the right side is what to write there
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in tests or name == "test_vgrpo", name
    for flag in re.findall(r"`(--[a-z-]+)", readme):
        field = flag[2:].removeprefix("no-").replace("-", "_")
        assert field in vgrpo.Config.__dataclass_fields__ or flag in ("--help", "--metadata", "--count"), flag


# ---- the full-size networks, without contents


def test_bytes_alive_are_counted():
    """A linear layer of n x n: weights, then input and output, then gradients, in units of n x n numbers."""
    n, counts = 512, []
    with FakeTensorMode(), fullsize.Alive() as alive:
        layer = torch.nn.Linear(n, n, bias=False)
        counts.append(alive.now)
        x = torch.randn(n, n)
        y = layer(x)
        view = y[:1]
        counts.append(alive.now)
        del y
        counts.append(alive.now)                                       # the view keeps it
        view.sum().backward()
        del view, x
        counts.append(alive.now)
    assert [round(count / (4 * n * n), 1) for count in counts] == [1, 3, 3, 2] and alive.peak > 3 * 4 * n * n


@pytest.mark.parametrize("model, size", [("sd3.5-medium", 2243171520), ("sd3.5-large", 8056627520),
                                         ("flux.1-dev", 11901408320)])
def test_the_full_size_networks_have_their_numbers(model, size):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    pipe = fullsize.build(vgrpo.parse_config(["--model", model]), fake, fake, fake, 99)
    parts = [sum(p.numel() for p in part.parameters()) for name, part in pipe.components.items()
             if name == "transformer" or name.startswith("text_encoder")]
    text = [123060480] if model == "flux.1-dev" else [123650304, 694659840]
    assert sorted(parts) == sorted([*text, 4762310656, size])


@pytest.mark.slow
def test_a_count_follows_its_flags(capsys):
    """An update needs less with fewer rows; all but the encoding, less what the encoders weigh when away."""
    told = []
    for flags in (["--micro-batch", "2"], ["--micro-batch", "1", "--offload"]):
        fullsize.count(vgrpo.parse_config(["--model", "sd3.5-medium", *flags]), 2)
        out = capsys.readouterr().out
        told.append({name: float(gb) for name, gb in re.findall(r"^(\w+): ([\d.]+) GB", out, re.M)})
    text = float(re.search(r"([\d.]+) of them text", out)[1])
    two, one = told
    assert two["encode"] == one["encode"] and two["decode"] - one["decode"] == pytest.approx(text, abs=0.11)
    assert two["update"] - one["update"] > text + 0.5 and one["rollout"] > 2 * 2243171520 / 2 ** 30


# ---- the tiny pipeline learns


def test_drawn_shapes_are_read_back():
    labels = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2))
    images = tiny.draw_shapes(labels.repeat(20, 1), gen(0))
    prompts = tiny.PROMPTS * 20
    images = (images * 255).round() / 255
    assert tiny.shapes(images, prompts, None).mean() >= .97
    assert tiny.shapes_strict(images, prompts, None).mean() >= .97
    assert tiny.shapes(images.roll(1, 0), prompts, None).mean() < .9
    assert tiny.shapes(torch.rand(8, 3, 32, 32, generator=gen(1)), prompts[:8], None).mean() < .4
    assert (Path(vgrpo.MODELS["tiny"]) / "prompts.txt").read_text().splitlines() == tiny.PROMPTS


def test_the_tiny_pipeline_can_be_made_again():
    pipe = tiny.pretrain(vae_steps=2, steps=2)
    made = vgrpo.load_policy(vgrpo.parse_config([]), torch.device("cpu"))[0].pipe
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        new, old = (getattr(p, name).state_dict() for p in (pipe, made))
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    assert pipe.tokenizer(tiny.PROMPTS).input_ids == made.tokenizer(tiny.PROMPTS).input_ids


@pytest.mark.slow
def test_a_short_run_learns(tmp_path):
    """25 iterations from the pretrained tiny model: the held-out evaluation rises by at least 0.1."""
    vgrpo.main(["--iterations", "25", "--eval-every", "25", "--out", str(tmp_path / "run")])
    first, last = (line["eval/shapes"] for line in metrics(tmp_path / "run") if "eval" in line)
    assert .5 < first < .8 and last > first + .1


# ---- the rewards


R = rewards

REWARD_COLORS = "red orange yellow green blue purple pink brown black white".split()
REWARD_WORDS = "a an cat dog photo of cube sphere the fish running person object".split() + REWARD_COLORS
REWARD_WORDS += [colour + "-colored" for colour in REWARD_COLORS]

def reward_noise(n, height=224, width=224, seed=0):
    """n pictures of 8 bits: smooth noise, so that they differ."""
    small = torch.rand(n, 3, 9, 7, generator=torch.Generator().manual_seed(seed))
    return R.quantise(F.interpolate(small, (height, width), mode="bilinear"))

def save_small_tokenizer(folder, size=64, pad="[PAD]"):
    """Words -> ids 4...; start 1, end size - 1, as CLIP's largest id; unknown words share id 2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = {word: 4 + i for i, word in enumerate(REWARD_WORDS)}
    vocab = {pad: 0, "[S]": 1, "[U]": 2, **words, "[E]": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[U]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[S]", 1), ("[E]", size - 1)]
    tokenizer.post_processor = processors.TemplateProcessing("[S] $A [E]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token="[U]", bos_token="[S]",
                            eos_token="[E]", model_max_length=77).save_pretrained(folder)

def randomise_weights(model, seed=0, scale=0.3):
    """Wide weights, so that wrong activations and layouts show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fresh = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = fresh * (parameter.shape[0] / parameter.numel()) ** 0.5
        elif parameter.dim() == 1:
            parameter.data += scale * fresh
    return model.eval()

def small_clip(act="quick_gelu", projection=32, seed=0):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(seed)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 hidden_act=act, projection_dim=projection)
    config = CLIPConfig(text_config=tower | dict(vocab_size=64, eos_token_id=63, bos_token_id=1),
                        vision_config=tower | dict(image_size=224, patch_size=56), projection_dim=projection)
    return randomise_weights(CLIPModel(config), seed)

@pytest.fixture(scope="session")
def reward_hub(tmp_path_factory):
    """One folder that mirrors the hub: OWNER/NAME lies in NAME."""
    root = tmp_path_factory.mktemp("weights")
    small_clip(projection=768, seed=1).save_pretrained(root / "clip-vit-large-patch14")
    small_clip(act="gelu", seed=2).save_pretrained(root / "PickScore_v1")
    for name in ("clip-vit-large-patch14", "CLIP-ViT-H-14-laion2B-s32B-b79K", "bert-base-uncased"):
        save_small_tokenizer(root / name)
    torch.manual_seed(0)
    head = randomise_weights(R.linear_head(), 3)
    (root / "ddpo-aesthetic-predictor").mkdir()
    torch.save({"layers." + key: value for key, value in head.state_dict().items()},
               root / "ddpo-aesthetic-predictor" / "aesthetic-model.pth")
    return root

def standardised_pixels(images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (images - mean[:, None, None]) / std[:, None, None]

def direct_cosine(model, folder, images, prompts):
    """One image and one prompt at a time, straight through the model."""
    from transformers import AutoTokenizer
    tokenizer, cosines = AutoTokenizer.from_pretrained(folder), []
    for image, prompt in zip(images, prompts):
        tokens = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=standardised_pixels(image[None]), **tokens)
        cosines.append((F.normalize(out.image_embeds) * F.normalize(out.text_embeds)).sum())
    return torch.stack(cosines)

REWARD_PROMPTS = ["a red cube", "a photo of the blue cat running", "a red cube", "dog"]

def test_reward_clip_scores_equal_a_direct_computation(reward_hub):
    images, metadata = reward_noise(4), [{}] * 4
    rewards = R.Rewards(f"pickscore@{reward_hub},clipscore@{reward_hub}=2,aesthetic@{reward_hub}=0")
    scores = rewards(images, REWARD_PROMPTS, metadata)
    assert rewards.weights == {"pickscore": 1.0, "clipscore": 2.0, "aesthetic": 0.0} == dict(rewards.weights)
    assert list(scores) == ["pickscore", "clipscore", "aesthetic"]
    pick, clip = small_clip(act="gelu", seed=2), small_clip(projection=768, seed=1)
    cosine = direct_cosine(pick, reward_hub / "CLIP-ViT-H-14-laion2B-s32B-b79K", images, REWARD_PROMPTS)
    torch.testing.assert_close(scores["pickscore"], cosine * pick.logit_scale.exp() / 26, atol=1e-5, rtol=0)
    cosine = direct_cosine(clip, reward_hub / "clip-vit-large-patch14", images, REWARD_PROMPTS)
    torch.testing.assert_close(scores["clipscore"], cosine, atol=1e-5, rtol=0)
    state = torch.load(reward_hub / "ddpo-aesthetic-predictor" / "aesthetic-model.pth")
    with torch.no_grad():
        feature = F.normalize(clip.get_image_features(pixel_values=standardised_pixels(images)).pooler_output)
    for i in (0, 2, 4, 6, 7):
        feature = feature @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(scores["aesthetic"], feature[:, 0], atol=1e-4, rtol=0)
    for value in scores.values():
        assert value.dtype == torch.float32 and value.device.type == "cpu" and value.std() > 1e-3
        (torch.ones(4, requires_grad=True) * value).sum().backward()   # not an inference tensor

def test_reward_64_images_cost_one_image_pass_and_one_text_pass_per_prompt(reward_hub, monkeypatch):
    from transformers import CLIPModel
    seen, loads = Counter(), Counter()
    image, text, load = CLIPModel.get_image_features, CLIPModel.get_text_features, R.load
    def count(name, call):
        def counted(self, *args, **inputs):
            seen[name] += len(args[0] if args else inputs["input_ids"])
            seen[name + " passes"] += 1
            return call(self, *args, **inputs)
        return counted
    monkeypatch.setattr(CLIPModel, "get_image_features", count("image", image))
    monkeypatch.setattr(CLIPModel, "get_text_features", count("text", text))
    monkeypatch.setattr(R, "load", lambda kind, *at: loads.update([kind.__name__, at[0]]) or load(kind, *at))
    rewards = R.Rewards(f"clipscore@{reward_hub},aesthetic@{reward_hub}")
    R.Rewards(f"aesthetic@{reward_hub},clipscore@{reward_hub}", share=rewards)     # --eval-reward
    prompts = [p for p in ("a red cube", "a blue cat", "dog", "the fish") for _ in range(16)]
    rewards(reward_noise(64, 32, 32), prompts, [{}] * 64)
    assert seen == {"image": 64, "image passes": 64 // 32, "text": 4, "text passes": 4}
    assert loads == {"CLIPModel": 1, "openai/clip-vit-large-patch14": 1}
    rewards(reward_noise(64, 32, 32, seed=1), prompts, [{}] * 64)      # new pictures, not the old ones
    assert seen["image"] == 128 and seen["text"] == 4

@pytest.mark.parametrize("size", [1, 3, 64])
def test_reward_scores_do_not_depend_on_the_chunk(reward_hub, size):
    images, prompts = reward_noise(7, 240, 300), (REWARD_PROMPTS * 2)[:7]
    spec = f"pickscore@{reward_hub},clipscore@{reward_hub},aesthetic@{reward_hub},incompressibility"
    rewards = R.Rewards(spec)
    whole, parts = (rewards(images, prompts, [{}] * 7, chunk) for chunk in (32, size))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-5, rtol=1e-6)

@pytest.mark.parametrize("height, width", [(224, 224), (300, 451), (451, 300), (96, 128), (512, 512)])
def test_reward_clip_pixels_against_pil(height, width):
    rough = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    image = R.quantise(0.3 + 0.4 * rough)       # nothing overshoots 0 or 1
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    scale = 224 / min(height, width)
    picture = picture.resize((int(width * scale + 1e-9), int(height * scale + 1e-9)), Image.BICUBIC)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    crop = np.asarray(picture.crop((left, top, left + 224, top + 224))).astype(np.float32) / 255
    want = standardised_pixels(torch.from_numpy(crop).permute(2, 0, 1))
    got = R.clip_pixels(image)[0]
    assert got.shape == (3, 224, 224) and (got - want).abs().mean() * 0.27 * 255 < 0.3

@pytest.mark.parametrize("height, width", [(224, 224), (300, 451), (451, 300), (96, 129)])
def test_reward_hps_pixels_against_pil(height, width):
    """Longest side to 224 on a black square, then the mean and the deviation: the padding is not zero."""
    rough = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    image = R.quantise(0.3 + 0.4 * rough)       # nothing overshoots 0 or 1
    picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    size = round(width * 224 / max(height, width)), round(height * 224 / max(height, width))
    square = Image.new("RGB", (224, 224))
    left, top = (224 - size[0]) // 2, (224 - size[1]) // 2
    square.paste(picture.resize(size, Image.BICUBIC), (left, top))
    want = standardised_pixels(torch.from_numpy(np.asarray(square).astype(np.float32) / 255).permute(2, 0, 1))
    got = R.clip_pixels(image, pad=True)[0]
    assert (got - want).abs().mean() * 0.27 * 255 < 0.3
    empty = torch.ones(224, 224, dtype=torch.bool)
    empty[top:top + size[1], left:left + size[0]] = False
    assert torch.equal(got[:, empty], want[:, empty])

# ---- HPSv2.1 and ImageReward: the published names and layouts
SMALL_VIT_H = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)

def to_open_clip(state):
    """CLIPModel's weights the way open_clip saves them."""
    old = {}
    for key, value in state.items():
        tower, key = ("visual.", key.removeprefix("vision_model.")) if key.startswith("vision") else ("", key)
        key = key.removeprefix("text_model.")
        key = key.replace("encoder.layers.", tower + "transformer.resblocks.")
        for new, name in (("layer_norm", "ln_"), ("self_attn", "attn"), ("mlp.fc1", "mlp.c_fc"),
                          ("mlp.fc2", "mlp.c_proj"), ("pre_layrnorm", "visual.ln_pre"),
                          ("embeddings.class_embedding", "visual.class_embedding"),
                          ("post_layernorm", "visual.ln_post"),
                          ("embeddings.patch_embedding", "visual.conv1"),
                          ("embeddings.position_embedding.weight", tower + "positional_embedding"),
                          ("embeddings.token_embedding", "token_embedding"), ("final_ln_", "ln_final")):
            key = key.replace(new, name)
        key = key.replace("final_layer_norm", "ln_final").replace("final_ln_", "ln_final")
        turned = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
        old[turned.get(key, key)] = value.T if key in turned else value
    for key in [key for key in old if ".q_proj." in key]:
        parts = [old.pop(key.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        old[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return old

@pytest.fixture
def hps_weights(tmp_path):
    """A small ViT-H-14 with everything in one folder -> (folder, the same model in transformers)."""
    from transformers import CLIPConfig, CLIPModel
    tower = SMALL_VIT_H | dict(hidden_act="gelu", projection_dim=1024)
    config = CLIPConfig(text_config=tower | dict(eos_token_id=49407), projection_dim=1024,
                        vision_config=tower | dict(patch_size=14))
    config.save_pretrained(tmp_path)
    model = randomise_weights(CLIPModel(config))
    state = to_open_clip(model.state_dict())
    assert {"visual.proj", "text_projection", "ln_final.weight", "visual.ln_pre.bias", "logit_scale",
            "transformer.resblocks.1.attn.in_proj_weight", "visual.transformer.resblocks.0.mlp.c_fc.bias",
            "visual.positional_embedding", "positional_embedding", "token_embedding.weight"} <= set(state)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    save_small_tokenizer(tmp_path, 49408)
    return tmp_path, model

def test_reward_hps_equals_a_direct_computation(hps_weights):
    folder, model = hps_weights
    images = reward_noise(4)
    scores = R.Rewards(f"hpsv2@{folder}")(images, REWARD_PROMPTS, [{}] * 4)["hpsv2"]
    want = direct_cosine(model, folder, images, REWARD_PROMPTS)
    torch.testing.assert_close(scores, want, atol=1e-5, rtol=0)
    model.config.vision_config.hidden_act = "quick_gelu"        # what a wrong activation would give
    for layer in model.vision_model.encoder.layers:
        layer.mlp.activation_fn = torch.nn.SiLU()
    assert (direct_cosine(model, folder, images, REWARD_PROMPTS) - want).abs().max() > 1e-4
    wide = reward_noise(2, 100, 224)
    square = torch.zeros(2, 3, 224, 224)
    square[:, :, 62:162] = wide
    torch.testing.assert_close(R.Rewards(f"hpsv2@{folder}")(wide, REWARD_PROMPTS[:2], [{}] * 2)["hpsv2"],
                               R.Rewards(f"hpsv2@{folder}")(square, REWARD_PROMPTS[:2], [{}] * 2)["hpsv2"])

@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_reward_a_wrong_key_is_named(hps_weights, change):
    state = torch.load(hps_weights[0] / "HPS_v2.1_compressed.pt")
    if change == "missing":
        del state["state_dict"]["visual.ln_pre.weight"]
    elif change == "unexpected":
        state["state_dict"]["visual.extra.weight"] = torch.zeros(1)
    else:
        state["state_dict"]["visual.conv1.weight"] = torch.zeros(32, 3, 7, 7)
    torch.save(state, hps_weights[0] / "HPS_v2.1_compressed.pt")
    name = {"missing": "pre_layrnorm.weight", "unexpected": "extra.weight", "shape": "patch_embedding"}
    with pytest.raises(R.UsageError, match=f"--reward hpsv2.*{name[change]}") as error:
        R.Rewards(f"hpsv2@{hps_weights[0]}")
    assert "\n" not in str(error.value)

def test_reward_open_clip_mapping_inverts(hps_weights):
    state = torch.load(hps_weights[0] / "HPS_v2.1_compressed.pt")["state_dict"]
    assert state["visual.proj"].shape == (32, 1024) == state["text_projection"].shape
    back = R.Clip("xswu/HPSv2", hps_weights[0]).model.state_dict()
    assert set(back) == set(hps_weights[1].state_dict())
    assert all(torch.equal(back[key], value) for key, value in hps_weights[1].state_dict().items())

def test_reward_hps_text(hps_weights):
    """The tokenizer is shown plain text; other CLIPs' are shown what the user wrote."""
    shown, clip = [], R.Clip("xswu/HPSv2", hps_weights[0])
    tokenizer = clip.tokenizer
    clip.tokenizer = lambda text, **options: shown.append(text) or tokenizer(text, **options)
    clip.text(" a &amp;quot;ｒｅｄ&quot;　‘cube’ “x” ！")
    clip.hps = False
    clip.text(" “x” ")
    assert shown == ["a \"red\" 'cube' \"x\" !", " “x” "]

def to_blip(model):
    """A BLIP of transformers the way ImageReward.pt saves it, with the tensor that it has too many."""
    old = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    for key, value in model.state_dict().items():
        if key.startswith("vision_model"):
            for new, name in (("embeddings.class_embedding", "cls_token"), ("encoder.layers", "blocks"),
                              ("embeddings.position_embedding", "pos_embed"), ("post_layernorm", "norm"),
                              ("embeddings.patch_embedding", "patch_embed.proj"), ("layer_norm", "norm"),
                              ("self_attn.projection", "attn.proj"), ("self_attn", "attn")):
                key = key.replace(new, name)
        key = key.replace("vision_model", "visual_encoder")
        old[key.replace("itm_head", "mlp.layers") if "itm_head" in key else "blip." + key] = value
    return old

@pytest.fixture
def blip_weights(tmp_path, monkeypatch):
    """A small ImageReward with everything in one folder -> (folder, the same model in transformers)."""
    from transformers import BlipConfig
    sizes = dict(num_hidden_layers=2, intermediate_size=64)
    monkeypatch.setattr(R.hf, "BlipConfig", lambda vision_config, text_config: BlipConfig(
        vision_config=vision_config | sizes | dict(hidden_size=32, num_attention_heads=2),
        text_config=text_config | sizes | dict(vocab_size=64)))
    save_small_tokenizer(tmp_path)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(R, "load_renamed", lambda model, *_: model)
        patch.setattr(R, "blank", lambda kind, config: kind(config))
        model = randomise_weights(R.load_imagereward(tmp_path))
    torch.save(to_blip(model), tmp_path / "ImageReward.pt")
    return tmp_path, model

def test_reward_imagereward_equals_a_direct_computation(blip_weights):
    folder, model = blip_weights
    images = reward_noise(4)
    scores = R.Rewards(f"imagereward@{folder}")(images, REWARD_PROMPTS, [{}] * 4)["imagereward"]
    for image, prompt, score in zip(images, REWARD_PROMPTS, scores):
        ids = [1] + [4 + REWARD_WORDS.index(word) for word in prompt.split()] + [63]
        with torch.no_grad():
            seen = model.vision_model(standardised_pixels(image[None])).last_hidden_state
            state = model.text_encoder(torch.tensor([ids]), encoder_hidden_states=seen)[0][0, 0]
            for i in (0, 2, 4, 6, 7):
                state = state @ model.itm_head[i].weight.T + model.itm_head[i].bias
        assert abs((state.item() - 0.16717362830052426) / 1.0333394966054072 - score.item()) < 1e-4
    assert scores.std() > 1e-3

def test_reward_blip_mapping_inverts(blip_weights):
    folder, model = blip_weights
    state = torch.load(folder / "ImageReward.pt")
    assert {"blip.visual_encoder.cls_token", "blip.visual_encoder.patch_embed.proj.weight",
            "mlp.layers.7.bias", "blip.visual_encoder.pos_embed", "blip.visual_encoder.norm.bias",
            "blip.vision_proj.weight",
            "blip.visual_encoder.blocks.1.attn.qkv.weight", "blip.visual_encoder.blocks.0.attn.proj.weight",
            "blip.visual_encoder.blocks.0.norm2.weight", "blip.visual_encoder.blocks.1.mlp.fc1.bias",
            "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight"} <= set(state)
    back = R.load_imagereward(folder).state_dict()
    assert set(back) == set(model.state_dict())
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    name = "blip.visual_encoder.blocks.1.attn.qkv.weight"
    for change in ({name: None}, {"blip.visual_encoder.extra": torch.zeros(1)}, {name: torch.zeros(3, 3)}):
        broken = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(broken, folder / "ImageReward.pt")
        with pytest.raises(R.UsageError, match="vision_model.(encoder.layers.1.self_attn.qkv.weight|extra)"):
            R.Rewards(f"imagereward@{folder}")

def test_reward_the_published_size(monkeypatch):
    """Counted without memory: ImageReward's BLIP as the paper gives it."""
    monkeypatch.setattr(R, "load_renamed", lambda model, *_: model)
    monkeypatch.setattr(R.hf.AutoTokenizer, "from_pretrained", lambda place: None)
    with torch.device("meta"):
        blip = R.load_imagereward(None)
    parts = blip.vision_model, blip.text_encoder, blip.itm_head
    assert round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6) == 446
    text, vision = blip.text_encoder.config, blip.vision_model.config
    assert (text.vocab_size, text.num_attention_heads, text.layer_norm_eps) == (30524, 12, 1e-12)
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads) == (224, 16, 16)
    assert vision.layer_norm_eps == 1e-6 and text.num_hidden_layers == 12 and vision.num_hidden_layers == 24
    assert text.is_decoder and text.hidden_act == "gelu" == vision.hidden_act

# ---- GenEval
def found_box(x, y, size=20):
    return (0.9, torch.tensor([[x, y], [x + size, y + size]]), None)

def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}

def verdicts(found, include, exclude=(), colours=None):
    """(score, strict, accuracy) of hand-made objects; colours: {class: [colour of each object]}."""
    data = {"include": include, "exclude": list(exclude)}
    def colour_of(name, box, mask):
        place = next(i for i, one in enumerate(found[name]) if one[1] is box)
        return colours[name][place]
    rules = ("score", "strict", "accuracy")
    return tuple(round(float(R.verdict(found, data, colour_of, rule)), 4) for rule in rules)

def test_reward_verdict_single_and_two_objects():
    assert verdicts({"dog": [found_box(0, 0)]}, [wanted("dog")]) == (1, 1, 1)
    assert verdicts({}, [wanted("dog")]) == (0, 0, 0)
    assert verdicts({"dog": [found_box(0, 0), found_box(9, 9)]}, [wanted("dog")]) == (0, 0, 1)  # too many
    assert verdicts({"dog": [found_box(0, 0)] * 5}, [wanted("dog")]) == (0, 0, 1)             # not below 0
    both = [wanted("dog"), wanted("cat")]
    assert verdicts({"dog": [found_box(0, 0)], "cat": [found_box(9, 9)]}, both) == (1, 1, 1)
    assert verdicts({"cat": [found_box(9, 9)], "cow": [found_box(0, 0)]}, both) == (0.5, 0, 0)

def test_reward_verdict_counting():
    include, exclude = [wanted("dog", 3)], [wanted("dog", 4)]
    for n, want in ((0, (0, 0, 0)), (2, (0.6667, 0, 0)), (3, (1, 1, 1)), (4, (0.6667, 0, 0)), (7, (0, 0, 0))):
        assert verdicts({"dog": [found_box(0, 0)] * n}, include, exclude) == want
    assert verdicts({"dog": [found_box(0, 0)] * 4}, include) == (0.6667, 0, 1)  # "accuracy" needs exclude

def test_reward_verdict_colours():
    dogs = {"dog": [found_box(0, 0), found_box(50, 0)]}
    include = [wanted("dog", 2, color="red")]
    assert verdicts(dogs, include, colours={"dog": ["red", "red"]}) == (1, 1, 1)
    assert verdicts(dogs, include, colours={"dog": ["red", "blue"]}) == (0.75, 0, 0)
    assert verdicts(dogs, include, colours={"dog": ["blue", "blue"]}) == (0.5, 0, 0)
    three = {"dog": dogs["dog"] + [found_box(90, 0)]}
    assert verdicts(three, include, colours={"dog": ["red", "red", "blue"]}) == (0.25, 0, 1)   # (1/2 + 0) / 2
    assert verdicts({"dog": dogs["dog"][:1]}, include, colours={"dog": ["red"]}) == (0.25, 0, 0)
    pair = [wanted("dog", color="red"), wanted("cat", color="blue")]        # color_attr
    found = {"dog": [found_box(0, 0)], "cat": [found_box(50, 0)]}
    assert verdicts(found, pair, colours={"dog": ["red"], "cat": ["blue"]}) == (1, 1, 1)
    assert verdicts(found, pair, colours={"dog": ["blue"], "cat": ["red"]}) == (0.5, 0, 0)     # swapped

def test_reward_verdict_positions():
    include = [wanted("cat"), wanted("dog", position=["right of", 0])]
    for x, y, want in ((200, 100, (1, 1, 1)), (0, 100, (0.6667, 0, 0)), (100, 200, (0.6667, 0, 0)),
                       (103, 100, (0.6667, 0, 0))):        # left; below; a shift of 3 < (20 + 20) / 10
        assert verdicts({"cat": [found_box(100, 100)], "dog": [found_box(x, y)]}, include) == want
    assert verdicts({"dog": [found_box(200, 100)]}, include) == (0.3333, 0, 0)       # nothing to be right of
    assert verdicts({"cat": [found_box(100, 100)]}, include) == (0.3333, 0, 0)
    two = {"cat": [found_box(100, 100)], "dog": [found_box(200, 100), found_box(0, 0)]}
    assert verdicts(two, include) == (0.3333, 0, 1)       # "accuracy" looks at the best dog only
    dogs = [wanted("cat"), wanted("dog", 2, position=["right of", 0])]      # each of them must be there
    assert verdicts(two, dogs) == (0.6667, 0, 0)
    red = [wanted("cat", color="red"), wanted("dog", position=["right of", 0])]
    right = {"cat": [found_box(100, 100)], "dog": [found_box(200, 100)]}
    assert verdicts(right, red, colours={"cat": ["blue"]}) == (0.5, 0, 0)       # (1 + 0 + 1 + 0) / 4

def test_reward_relations():
    for a, b, sides in (((0, 0), (100, 0), {"left of"}), ((100, 0), (0, 0), {"right of"}),
                        ((0, 0), (0, 100), {"above"}), ((100, 100), (0, 0), {"right of", "below"}),
                        ((100, 49), (0, 0), {"right of"}),        # below by (49 - 4) / 111 < .5
                        ((3, 3), (0, 0), set()), ((0, 0), (0, 0), set())):
        assert R.relations(found_box(*a)[1], found_box(*b)[1]) == sides
    assert R.relations(found_box(0, 0, 10)[1], found_box(10, 0, 60)[1]) == {"left of"}   # 35 > 70 / 10
    assert R.relations(found_box(30, 30, 10)[1], found_box(0, 0, 80)[1]) == set()        # 5 < 90 / 10

def fake_detector(classes, masks, sizes):
    """What find_objects uses of a Mask2Former, with these answers."""
    def net(pixels, output_hidden_states):
        sizes.append(tuple(pixels.shape))
        return SimpleNamespace(masks_queries_logits=[None, masks],
                               transformer_decoder_intermediate_states=[None, classes.transpose(0, 1)])
    net.class_predictor = lambda queries: queries
    return net

def test_reward_find_objects():
    """Masks of known place and strength, at a quarter of an input of 800 x 1072, padded to 800 x 1088."""
    image = reward_noise(1, 300, 402)[0]
    masks, classes = torch.full((1, 5, 200, 272), -4.0), torch.full((1, 5, 81), -9.0)
    classes[..., 80] = 3.0
    def put(query, label, probability, rows, columns, logit):
        classes[0, query] = math.log((1 - probability) / 80)
        classes[0, query, label] = math.log(probability)
        masks[0, query, slice(*rows), slice(*columns)] = logit
    put(0, 16, 0.95, (50, 100), (40, 80), 4.0)        # dog, 0.95 * sigmoid(4)
    put(1, 16, 0.97, (0, 30), (0, 30), 4.0)
    put(2, 16, 0.40, (0, 30), (0, 30), 0.5)           # 0.4 * sigmoid(.5) < 0.3
    put(3, 64, 0.50, (100, 200), (200, 272), 4.0)     # the right end of the mask is padding
    put(4, 0, 0.99, (0, 0), (0, 0), 4.0)              # an empty mask
    sizes = []
    net = fake_detector(classes, masks, sizes)
    found = R.find_objects(net, image)
    assert sizes == [(1, 3, 800, 1088)] and set(found) == {"dog", "computer mouse"}
    (first, first_box, _), (second, second_box, mask) = found["dog"]
    sigmoid = 1 / (1 + math.exp(-4))
    assert 0.97 * 0.9 < first < 0.97 * sigmoid and 0.95 * 0.9 < second < 0.95 * sigmoid and first > second
    want = np.array([40, 50, 80, 100]) * 4 * 300 / 800
    assert np.abs(second_box.flatten().numpy() - want).max() <= 1
    assert np.abs(first_box.flatten().numpy() - [0, 0, 45, 45]).max() <= 1
    assert found["computer mouse"][0][1][1, 0] == 402 and mask.shape == (300, 402)
    x0, y0, x1, y1 = second_box.flatten()
    assert mask[y0:y1, x0:x1].sum() == mask.sum() and mask[y0].any() and mask[:, x1 - 1].any()
    strict = R.find_objects(net, image, "counting")      # the mask's factor decides
    assert [one[0] for one in strict.get("dog", [])] == [score for score in (first, second) if score > 0.9]
    assert second < 0.94
    R.find_objects(net, reward_noise(1, 203, 260)[0], "counting")     # 800 x 1024.63 -> 1025 -> 1056
    assert sizes[-1] == (1, 3, 800, 1056)
    many = torch.full((1, 40, 81), -9.0)
    many[..., 3] = 9.0
    full = fake_detector(many, torch.full((1, 40, 200, 200), 5.0), [])
    full = R.find_objects(full, reward_noise(1)[0])
    assert {name: len(group) for name, group in full.items()} == {"motorcycle": 16}

@pytest.fixture(scope="session")
def geneval_folder(tmp_path_factory):
    """A small Mask2Former, saved as the published one, that sees a person in each of 4 queries; a CLIP."""
    from safetensors.torch import save_file
    from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig
    root = tmp_path_factory.mktemp("geneval")
    swin = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_labels=80,
                               num_attention_heads=2, dim_feedforward=32, num_queries=4)
    torch.manual_seed(0)
    state = {"model." + key: value.clone() for key, value in Mask2FormerModel(config).state_dict().items()}
    state |= {"class_predictor.weight": torch.randn(81, 32) * 0.3, "class_predictor.bias": torch.zeros(81),
              "criterion.empty_weight": torch.ones(81)}
    state["class_predictor.bias"][0] = 9.0
    folder = root / "mask2former-swin-small-coco-instance"
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    small_clip(projection=32, seed=5).save_pretrained(root / "clip-vit-large-patch14")
    save_small_tokenizer(root / "clip-vit-large-patch14")
    return root

def test_reward_geneval_runs_end_to_end(geneval_folder, monkeypatch):
    images, data = reward_noise(2, 64, 96), {"tag": "colors", "include": [wanted("person", 1, color="red")]}
    names = ("geneval", "geneval-strict", "geneval-accuracy")
    rewards = R.Rewards(",".join(f"{name}@{geneval_folder}" for name in names))
    seen, original = [], R.find_objects
    monkeypatch.setattr(R, "find_objects", lambda *args: seen.append(original(*args)) or seen[-1])
    rewards.check(["a red person"] * 2, [data] * 2)
    scores = rewards(images, ["a red person"] * 2, [data] * 2)
    assert len({model for reward in rewards.rewards.values() for model in reward.args[1:]}) == 2
    assert tuple(scores) == names and all(0 <= score <= 1 for score in scores["geneval"].tolist())
    n = [len(found.get("person", [])) for found in seen]
    assert n[:2] == n[2:4] == n[4:] and max(n) > 0, "the small detector should see someone"
    net = rewards.rewards["geneval"].args[1]
    whole = original(net, images[1])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole["person"], seen[1]["person"], strict=True))
    assert net.class_predictor.bias[0] == 9 and net.class_predictor.weight.shape == (81, 32)
    out = net(torch.rand(2, 3, 64, 64), output_hidden_states=True)
    assert out.transformer_decoder_intermediate_states[-1].shape == (4, 2, 32)
    assert out.masks_queries_logits[-1].shape == (2, 4, 16, 16)

def test_reward_object_colours(geneval_folder):
    """Straight from the model: each object cut out on grey, three sentences for each colour."""
    from transformers import AutoTokenizer
    run = R.Rewards(f"clipscore@{geneval_folder}")
    (shared,) = run.rewards["clipscore"].args
    tokenizer, answers = AutoTokenizer.from_pretrained(geneval_folder / "clip-vit-large-patch14"), []
    def text(sentences):
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        return F.normalize(shared.model.get_text_features(**tokens).pooler_output).mean(0)
    def picture(cut):
        return F.normalize(shared.model.get_image_features(pixel_values=R.clip_pixels(cut)).pooler_output)[0]
    with torch.no_grad():
        texts = torch.stack([text([f"a photo of a {colour} person", f"a photo of a {colour}-colored person",
                                   f"a photo of a {colour} object"]) for colour in REWARD_COLORS])
    for image in torch.rand(16, 3, 64, 96, generator=torch.Generator().manual_seed(0)):
        mask = torch.zeros(64, 96, dtype=torch.bool)
        mask[10:50, 20:50] = True
        mask[10:20, 20:30] = False
        cut = torch.where(mask, image, torch.tensor(0x99 / 255))[None, :, 10:50, 20:50]
        with torch.no_grad():
            feature = picture(cut)
        answers.append(REWARD_COLORS[(F.normalize(texts, dim=-1) @ feature).argmax()])
        box = torch.tensor([[20, 10], [50, 50]])
        assert R.object_color(shared, image, "person", box, mask) == answers[-1]
    assert len(set(answers)) > 1

def test_reward_geneval_prompts():
    drawn = geneval_prompts(600, 7)
    assert drawn == geneval_prompts(600, 7) != geneval_prompts(600, 8)
    assert drawn[:100] == geneval_prompts(100, 7) and len({data["prompt"] for data in drawn}) == 600
    tags = Counter(data["tag"] for data in drawn[:60])
    assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert min(tags.values()) >= 8
    parts = [part for data in drawn for part in data["include"]]
    assert {part["count"] for part in parts} == {1, 2, 3, 4}
    assert {part.get("color") for part in parts} == {None, *REWARD_COLORS}
    sides = {part["position"][0] for part in parts if "position" in part}
    assert sides == {"left of", "right of", "above", "below"}
    for data in drawn:
        assert R.NEEDS[R.geneval][1](data["prompt"], data)
        for part in data["include"]:
            assert part["class"] in data["prompt"] and part.get("color", "") in data["prompt"]
        if data["tag"] == "counting":
            (part,), (other,) = data["include"], data["exclude"]
            assert 2 <= part["count"] <= 4 and other == wanted(part["class"], part["count"] + 1)
            number, plural = ("two", "three", "four")[part["count"] - 2], part["class"] + "s"
            odd = {"sheep": "sheep", "skis": "skis", "scissors": "scissors", "bus": "buses",
                   "bench": "benches", "wine glass": "wine glasses", "couch": "couches",
                   "sandwich": "sandwiches", "toothbrush": "toothbrushes"}
            assert data["prompt"] == f"a photo of {number} {odd.get(part['class'], plural)}"
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", data["prompt"])
        if data["tag"] == "position":
            other, part = data["include"]
            side = part["position"][0]
            assert re.search(f"{part['class']} {side} an? {other['class']}$", data["prompt"])
            assert part["position"][1] == 0
    assert len(R.COCO) == len(set(R.COCO)) == 80 and R.CLIP_COLORS == REWARD_COLORS
    assert R.COCO[64:67] == ["computer mouse", "tv remote", "computer keyboard"]

# ---- OCR
def flooded(mask):
    """Connected components by brute force: the sets of pixels."""
    left, regions = {tuple(pixel) for pixel in mask.nonzero().tolist()}, set()
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.add(frozenset(region))
    return regions

@pytest.mark.parametrize("density", [0.1, 0.35, 0.6, 1.0, 0.0])
def test_reward_components_against_brute_force(density):
    mask = torch.rand(40, 57, generator=torch.Generator().manual_seed(1)) < density
    if density == 0.35:     # a spiral, and two that touch at a corner
        mask[:] = False
        mask[2:38:4, 2:50] = True
        mask[2:38, 50] = True
        mask[0, 56] = mask[1, 55] = True
    labels = R.components(mask)
    regions = {frozenset(map(tuple, (labels == label).nonzero().tolist()))
               for label in labels[labels > 0].unique()}
    assert regions == flooded(mask) and torch.equal(labels > 0, mask)

def test_reward_text_boxes():
    probs = torch.zeros(96, 160)
    probs[10:21, 100:141] = 0.9        # to the right, 4 pixels higher: after scaling by 2, 8 < 10
    probs[14:25, 20:61] = 0.9
    probs[60:71, 20:61] = 0.9          # the second line
    probs[80:91, 20:61] = 0.55         # too faint
    probs[80:82, 80:140] = 0.9         # too thin
    probs[14:21, 61:100] = 0.25        # below the threshold: does not join them
    boxes = R.text_boxes(probs, (192, 320))
    grow = 40 * 10 * 1.5 / (2 * (40 + 10))
    def grown(left, top):
        return tuple(round(2 * edge) for edge in (top - grow, left - grow, top + 10 + grow, left + 40 + grow))
    assert list(map(tuple, boxes)) == [grown(20, 14), grown(100, 10), grown(20, 60)]
    probs[:] = 0.9
    assert R.text_boxes(probs, (192, 320)) == [[0, 0, 192, 320]] and R.text_boxes(probs * 0, (192, 320)) == []

def ocr_lines(image, probs, lines, seen):
    """Ocr.text with a detector and a reader that answer this; `seen` gets what they were shown."""
    def find(pixels):
        seen.append(pixels)
        return SimpleNamespace(last_hidden_state=probs)
    def read(pixels):
        seen.append(pixels)
        return SimpleNamespace(last_hidden_state=lines)
    return R.read_text(find, read, ["blank", "a", "b", "c", " "], image)

def test_reward_ctc():
    def steps(text, high=0.9):
        """'-' is a blank."""
        probs = torch.full((1, len(text), 5), (1 - high) / 4)
        for i, letter in enumerate(text):
            probs[0, i, "-abc ".index(letter)] = high
        return ocr_lines(torch.zeros(3, 64, 64), torch.ones(1, 1, 64, 64), probs, [])
    assert steps("aab--bcc") == "abbc" and steps("a-a") == "aa" and steps("a b") == "a b"
    assert steps("----") == ""
    assert steps("abc", 0.45) == "" and steps("a") == "a" and steps("aba") == "aba"

def brute_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(brute_distance(a[1:], b) + 1, brute_distance(a, b[1:]) + 1,
               brute_distance(a[1:], b[1:]) + (a[0] != b[0]))

def test_reward_ocr_score():
    assert R.ocr_score("xxOPEN late", "open L") == 1
    assert R.ocr_score("", "ab") == 0 and R.ocr_score("a", "ab") == 0.5
    assert R.ocr_score("completely different and long", "ab") == 0
    for read, target in (("kitten", "sitting"), ("opne", "open"), ("Fres Bre", "Fresh Br"), ("abc", "cab")):
        squeezed = read.replace(" ", "").lower(), target.replace(" ", "").lower()
        assert abs(R.ocr_score(read, target) - (1 - brute_distance(*squeezed) / len(squeezed[1]))) < 1e-9

def test_reward_ocr_targets():
    assert R.QUOTED.search('a sign "Fresh Bread" and "More"')[1] == "Fresh Bread"
    for prompt in ("a sign", 'a "', 'a ""', 'a " "', "a “curly” sign"):
        assert not R.QUOTED.search(prompt)
    prompts = ocr_prompts(2000, 3)
    assert prompts == ocr_prompts(2000, 3) != ocr_prompts(2000, 4)
    assert len({data["prompt"] for data in prompts}) == 2000
    assert all(R.QUOTED.search(data["prompt"]) and data["prompt"].count('"') == 2 for data in prompts)

@pytest.fixture(scope="session")
def ocr_folder(tmp_path_factory):
    """PP-OCRv5's two models, small and random."""
    from transformers import (HGNetV2Config, PPOCRV5ServerDetConfig, PPOCRV5ServerDetForObjectDetection,
                              PPOCRV5ServerRecConfig, PPOCRV5ServerRecForTextRecognition)
    root = tmp_path_factory.mktemp("ocr")
    small = dict(stem_channels=[3, 4, 8], stage_in_channels=[8, 8, 8, 8], stage_mid_channels=[4, 4, 4, 4],
                 stage_out_channels=[8, 8, 8, 8], stage_num_blocks=[1, 1, 1, 1],
                 stage_numb_of_layers=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8],
                 out_features=["stage1", "stage2", "stage3", "stage4"])
    torch.manual_seed(0)
    blocks = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]} | {
        f"{way}_{ratio}": [list(k), [1, 1], [k[0] // 2, k[1] // 2]]
        for way, turn in (("vertical_long_to_small_conv", (1, 0)), ("horizontal_small_to_long_conv", (0, 1)),
                          ("symmetric_conv_long", (1, 1)))
        for ratio, size in (("longratio", 7), ("midratio", 5), ("shortratio", 3))
        for k in [tuple(size if axis else 1 for axis in turn)]}
    det = PPOCRV5ServerDetConfig(
        backbone_config=HGNetV2Config(**small), neck_out_channels=16, reduce_factor=2, kernel_list=[3, 2, 2],
        intraclass_block_number=4, intraclass_block_config=blocks, scale_factor_list=[1, 2, 4, 8])
    det = PPOCRV5ServerDetForObjectDetection(det)
    rec = HGNetV2Config(**small, stem_strides=[2, 1, 1, 1, 1], stage_downsample=[True, True, True, True],
                        stage_downsample_strides=[[2, 1], [1, 2], [2, 1], [2, 1]])
    rec = PPOCRV5ServerRecForTextRecognition(PPOCRV5ServerRecConfig(
        backbone_config=rec, hidden_size=16, num_attention_heads=2, head_out_channels=6))
    for model, name in ((det, "PP-OCRv5_server_det_safetensors"), (rec, "PP-OCRv5_server_rec_safetensors")):
        model.save_pretrained(root / name)
    (root / "PP-OCRv5_server_rec_safetensors" / "preprocessor_config.json").write_text(
        json.dumps({"character_list": ["blank", *"abcd", " "]}))
    return root

def test_reward_ocr_runs_end_to_end(ocr_folder):
    rewards = R.Rewards(f"ocr@{ocr_folder}")
    find, read, characters = rewards.rewards["ocr"].args
    images, prompts = reward_noise(3, 96, 200), ['a sign "abcd"'] * 3
    assert find(images[..., :192]).last_hidden_state.shape == (3, 1, 96, 192)
    assert read(torch.zeros(1, 3, 48, 320)).last_hidden_state.shape == (1, 40, 6)
    assert characters == ["blank", *"abcd", " "]
    scores = rewards(images, prompts, [{}] * 3)["ocr"]
    assert all(0 <= score <= 1 for score in scores.tolist())
    with pytest.raises(R.UsageError, match="--reward ocr: prompt 'no text'.*double quotes"):
        rewards.check(['a "b"', "no text"], [{}, {}])

def test_reward_ocr_pixels():
    """What the two networks are shown, for a picture with one line of text."""
    image = torch.rand(3, 200, 1200, generator=torch.Generator().manual_seed(0))
    probs, lines, shown = torch.zeros(1, 1, 160, 960), torch.zeros(1, 4, 5), []
    probs[0, 0, 40:61, 80:401] = 0.95
    lines[0, [0, 1, 2, 3], [1, 1, 0, 2]] = 1.0
    assert ocr_lines(image, probs, lines, shown) == "ab"
    small = F.interpolate(image[None], (160, 960), mode="bilinear")[0]
    for channel, mean, std in ((2, 0.485, 0.229), (1, 0.456, 0.224), (0, 0.406, 0.225)):     # B first
        torch.testing.assert_close(shown[0][0, 2 - channel], (small[channel] - mean) / std)
    grow = 1.5 * 320 * 20 / (2 * 340)
    left, top, right, bottom = (round(edge * 1.25) for edge in (80 - grow, 40 - grow, 400 + grow, 60 + grow))
    width = math.ceil(48 * (right - left) / (bottom - top))
    strip = F.interpolate(image[None, :, top:bottom, left:right], (48, width), mode="bilinear")
    torch.testing.assert_close(shown[1], (strip - 0.5) / 0.5)
    shown.clear()
    assert ocr_lines(image, probs * 0, None, shown) == "" and len(shown) == 1
    probs[:] = 0
    probs[0, 0, 40:61, 80:121] = 0.95       # a short line: 48 high, its width padded to 320 on the right
    ocr_lines(image, probs, lines, shown)
    assert shown[2].shape == (1, 3, 48, 320) and shown[2][..., 200:].eq(0).all() and shown[2][..., 0].any()

# ---- UnifiedReward
@pytest.fixture
def judge_server(monkeypatch):
    """A server that answers by the caption; yields (its address, the requests it saw)."""
    seen, fails = [], Counter()
    answers = {"well": "Nice. Final Score: 4", "markdown": "## Review\n**Final Score:** **3.5**/5",
               "ten": "Final Score: 10", "none": "I like it, 5 of 5",
               "twice": "On the scale Final Score: 1 to 5 ... final score: 2\n",
               "late": "Final Score: 5", "once": "Final Score: 3", "lines": "Final Score:\n\n4.5 out of 5"}
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass
        def reply(self, body, status=200):
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass        # the client did not wait
        def do_GET(self):
            self.reply(b'{"data": [{"id": "a-judge"}]}' if self.path == "/v1/models" else b"")
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.requestline.split()[1], body))        # as sent: self.path mends a "//"
            word = re.search(r"CASE (\w+)", body["messages"][0]["content"][1]["text"])[1]
            fails[word] += 1
            if word == "late":
                time.sleep(1.5)
            if word == "error" or (word == "once" and fails[word] < 3):
                return self.reply(b"overloaded", 503)
            if word == "garbled":
                return self.reply(b"{not json")
            if word == "hangup":
                return self.connection.close()
            if word == "short":
                self.send_response(200)
                self.send_header("Content-Length", "99")
                self.end_headers()
                self.wfile.write(b"{")
                return self.connection.close()
            if word == "odd":
                return self.reply(b'{"choices": []}')
            return self.reply(json.dumps({"choices": [{"message": {"content": answers[word]}}]}).encode())
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    send = R.urllib.request.urlopen
    monkeypatch.setattr(R.urllib.request, "urlopen",  # 0.8 s for 60
                        lambda request, timeout: send(request, timeout=timeout / 75))
    yield f"http://127.0.0.1:{server.server_port}", seen, fails
    server.shutdown()
    server.server_close()

def test_reward_unified(judge_server):
    url, seen, tries = judge_server
    want = {"well": 0.8, "markdown": 0.7, "ten": None, "none": None, "twice": 0.4, "late": None, "once": 0.6,
            "lines": 0.9, "error": None, "garbled": None, "hangup": None, "odd": None, "short": None}
    images, rewards = reward_noise(len(want), 32, 48), R.Rewards(f"unified@{url}/")
    scores = rewards(images, [f"CASE {word}" for word in want], [{}] * len(want))["unified"]
    got = [None if score.isnan() else round(score.item(), 4) for score in scores]
    assert dict(zip(want, got)) == want
    once = ("well", "markdown", "ten", "twice", "lines")
    assert tries == {word: 1 if word in once else 3 for word in want}
    path, body = next((path, body) for path, body in seen if "CASE well" in str(body))
    (message,), (picture, text) = body["messages"], body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and body["model"] == "a-judge" and body["temperature"] == 0
    assert message["role"] == "user" and text["type"] == "text" and "Final Score:" in text["text"]
    head, data = picture["image_url"]["url"].split(",")
    assert picture["type"] == "image_url" and head == "data:image/jpeg;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert decoded.shape == (32, 48, 3)
    assert np.abs(decoded - (images[0] * 255).round().permute(1, 2, 0).numpy()).mean() < 8
    assert rewards.weights == {"unified": 1} and R.Rewards(f"unified@{url}=0.5").weights == {"unified": 0.5}

def test_reward_an_unreachable_judge_is_named_at_start_up():
    for spec in ("unified@http://127.0.0.1:9", "unified"):
        with pytest.raises(R.UsageError, match="--reward unified.*vllm serve") as error:
            R.Rewards(spec)
        assert "\n" not in str(error.value)

# ---- JPEG, the user's own, errors
def test_reward_jpeg():
    rough = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.stack([reward_noise(1, 64, 64)[0], rough])
    scores = R.Rewards("incompressibility,compressibility")(images, ["", ""], [{}, {}])
    for image, score in zip(images, scores["incompressibility"]):
        file = io.BytesIO()
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        assert abs(score.item() - len(file.getvalue()) / 1000) < 1e-6
    assert torch.equal(scores["compressibility"], -scores["incompressibility"])
    assert scores["incompressibility"][1] > 2 * scores["incompressibility"][0]

OWN_REWARDS = '''
import torch
from dataclasses import dataclass
def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))
def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
def nan(images, prompts, metadata):
    return torch.tensor([float("nan") if "dog" in prompt else 1 for prompt in prompts])
def spoil(images, prompts, metadata):
    return images.mul_(0).sum((1, 2, 3))
def raises(images, prompts, metadata):
    raise KeyError("no such\\nkey")
def shape(images, prompts, metadata):
    return torch.zeros(len(images), 1)
def scalar(images, prompts, metadata):
    return torch.tensor(1.0)
def integer(images, prompts, metadata):
    return torch.zeros(len(images), dtype=torch.long)
def a_list(images, prompts, metadata):
    return [0.0] * len(images)
def inf(images, prompts, metadata):
    return 1 / torch.zeros(len(images))
def meta(images, prompts, metadata):
    return torch.zeros(len(images), device="meta")
def huge(images, prompts, metadata):
    return torch.full((len(images),), 1e300, dtype=torch.float64)
def double(images, prompts, metadata):
    return torch.full((len(images),), 0.1, dtype=torch.float64)
class Judge:
    def __init__(self, device):
        self.device = device
    def __call__(self, images, prompts, metadata):
        assert images.device == self.device
        return torch.tensor([float(data["k"]) for data in metadata])
number = 3
'''

@pytest.fixture
def own_rewards(tmp_path):
    (tmp_path / "own.py").write_text(OWN_REWARDS)
    return tmp_path / "own.py"

def test_reward_the_users_own(own_rewards):
    images = reward_noise(3, 8, 8)
    own = own_rewards
    rewards = R.Rewards(f"{own}:spoil,{own}:red=2, {own}:Judge,{own}:nan=0.5,{own}:double=1e-3")
    assert rewards.weights == {"spoil": 1.0, "red": 2.0, "Judge": 1.0, "nan": 0.5, "double": 1e-3}
    assert list(rewards.weights) == ["spoil", "red", "Judge", "nan", "double"]
    scores = rewards(images + 1e-4, ["a", "dog", "b"], [{"k": 1}, {"k": 2}, {"k": 3}])
    torch.testing.assert_close(scores["red"], images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)))
    assert scores["Judge"].tolist() == [1, 2, 3] and scores["nan"].isnan().tolist() == [False, True, False]
    assert scores["double"].dtype == torch.float32
    off = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    want = np.round(off.numpy().clip(0, 1).astype(np.float64) * 255).mean((1, 2, 3)) / 255
    mean = R.Rewards(f"{own}:mean")(off, [""] * 3, [{}] * 3)["mean"]
    assert np.abs(mean.numpy() - want).max() < 1e-6
    assert off.max() > 1

@pytest.mark.parametrize("name, message", [
    ("raises", "KeyError: 'no such"), ("shape", r"\[3, 1\]"), ("scalar", "zero-dimensional"),
    ("integer", "int64"), ("a_list", "list"), ("inf", "inf"), ("huge", "float64"),
    ("meta", "meta")])
def test_reward_a_reward_that_fails_is_named(own_rewards, name, message):
    with pytest.raises(R.RunError, match=message) as error:
        rewards = R.Rewards(f"incompressibility,{own_rewards}:{name}")
        rewards(reward_noise(3, 8, 8), ["a red cube", "dog", "dog"], [{}] * 3)
    text = str(error.value)
    assert name in text and "['a red cube', 'dog']:" in text and "\n" not in text
    assert error.value.__cause__ is not None

@pytest.mark.parametrize("spec, message", [
    ("pickscor", "pickscor:.*NUMBER.*pickscore, clipscore"), ("", "NUMBER"), ("compressibility,", "NUMBER"),
    ("compressibility=abc", "=abc:.*number|float"), ("compressibility=-1", "=-1:.*0 or more"),
    ("compressibility=nan", "NUMBER"), ("compressibility=", "=:.*float"), ("compressibility=1.2.3", "1.2.3"),
    ("compressibility,compressibility=2", "each once"), ("compressibility=0", "weights are 0"),
    ("pickscore@nowhere", "No such file.*nowhere"), ("nowhere.py:fn", "No such file.*nowhere.py"),
    ("OWN:none", "own.py:none: KeyError: 'none'"),
    ("OWN:red,OWN:red", "red.*each once"), ("BAD:fn", "invalid syntax"), ("hpsv2@EMPTY", "hpsv2@/"),
    ("pickscore@EMPTY", "pickscore@/"), ("clipscore", "hf auth login.*NAME@FOLDER"),
    ("hpsv2", "hf auth login.*NAME@FOLDER")])
def test_reward_bad_specs_end_in_one_line(own_rewards, monkeypatch, spec, message):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)      # as without a network
    (own_rewards.parent / "bad.py").write_text("def fn(:")
    (own_rewards.parent / "empty").mkdir()
    for short, file in (("OWN", "own.py"), ("BAD", "bad.py"), ("EMPTY", "empty")):
        spec = spec.replace(short, str(own_rewards.parent / file))
    with pytest.raises(R.UsageError, match=message) as error:
        R.Rewards(spec)
    assert str(error.value).startswith("--reward") and "\n" not in str(error.value)

def test_reward_missing_weights_are_named(reward_hub, tmp_path):
    small_clip().save_pretrained(tmp_path)
    save_small_tokenizer(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(R.UsageError, match="clipscore.*visual_projection.weight"):
        R.Rewards(f"clipscore@{tmp_path}")

def test_reward_check_names_the_first_unfit_prompt(ocr_folder, geneval_folder):
    rewards = R.Rewards(f"geneval-accuracy@{geneval_folder},incompressibility")
    good = geneval_prompts(3, 0)
    rewards.check([data["prompt"] for data in good], good)
    for bad in ({}, {"include": []}, {"include": [wanted("unicorn")]}, {"include": [{"class": "dog"}]}):
        with pytest.raises(R.UsageError, match="geneval-accuracy: prompt 'second'.*include"):
            rewards.check(["first", "second"], [good[0], bad])

def test_reward_offload_and_half(reward_hub, monkeypatch):
    """Models wait on the CPU; half precision moves a score by less than 1e-2 of the scores' spread."""
    images, prompts = reward_noise(8), REWARD_PROMPTS * 2
    spec = f"pickscore@{reward_hub},clipscore@{reward_hub}"
    full = R.Rewards(spec)(images, prompts, [{}] * 8)
    rewards = R.Rewards(spec, offload=True)
    with monkeypatch.context() as patch:
        patch.setattr(R, "HALF", torch.autocast("cpu", torch.float16))
        half = rewards(images, prompts, [{}] * 8)
    clips = [reward.args[0] for reward in rewards.rewards.values()]
    assert {p.dtype for clip in clips for p in clip.parameters()} == {torch.float32}
    for name in full:
        assert 0 < (full[name] - half[name]).abs().max() < 1e-2 * full[name].std()
    moves = []
    for i, clip in enumerate(clips):
        def move(to, i=i, clip=clip):
            moves.append((i, str(to(torch.zeros(1)).device)))
            for p in clip.parameters():
                p.data = p.data.clone()                                # what a device would get
        monkeypatch.setattr(clip, "_apply", move)
    def score(clip, images, prompts, metadata):
        moves.append(str(images.device))
        return torch.zeros(8)
    for offload, home in ((True, "cpu"), (False, "meta")):
        rewards = R.Rewards(spec, device="meta", offload=offload, share=rewards)
        assert [reward.args[0] for reward in rewards.rewards.values()] == clips
        assert moves == [(0, home), (1, home)]
        moves.clear()
        at_home = [[p.data_ptr() for p in clip.parameters()] for clip in clips]
        rewards.rewards = {name: partial(score, *reward.args) for name, reward in rewards.rewards.items()}
        rewards(images, prompts, [{}] * 8)
        assert moves == [(0, "meta"), "meta", (1, "meta"), "meta"]
        assert at_home == [[p.data_ptr() for p in clip.parameters()] for clip in clips]
        moves.clear()

def test_reward_shapes():
    rewards, right, strict = R.Rewards("shapes,shapes-strict"), [], []
    for seed in range(10):
        labels = torch.cartesian_prod(*(torch.arange(len(kind)) for kind in tiny.WORDS))
        images, prompts = tiny.draw_shapes(labels, gen(seed)), tiny.PROMPTS
        scores = rewards(images, prompts, [{}] * 24)
        right, strict = right + scores["shapes"].tolist(), strict + scores["shapes-strict"].tolist()
    assert np.mean(right) >= 0.97 and np.mean(strict) >= 0.97 and set(strict) <= {0.0, 1.0}
    large = F.interpolate(images, (256, 256))
    for name, value in rewards(large, prompts, [{}] * 24).items():
        assert torch.equal(value, scores[name])
    words = prompts[0].split()      # a red circle on the left
    for wrong, kinds in (("a blue circle on the left", 2), ("a blue bar on the left", 1),
                         ("a blue bar on the right", 0)):
        scores = rewards(images[:1], [wrong], [{}])
        assert abs(scores["shapes"].item() - kinds / 3) < 1e-6 and scores["shapes-strict"].item() == 0
    assert words == "a red circle on the left".split()
    prompts = prompts[:4]
    rough = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for nothing in (torch.zeros(4, 3, 32, 32), torch.full((4, 3, 32, 32), tiny.BACKGROUND), rough):
        for value in rewards(nothing, prompts, [{}] * 4).values():
            assert value.tolist() == [0] * 4
    for bad in ("a dog", "a red circle", "a bar on the left", "reddish circle on the left", ""):
        with pytest.raises(R.RunError, match="reward shapes.*has no word of each.*triangle"):
            rewards(images[:2], prompts[:1] + [bad], [{}] * 2)

@pytest.mark.slow
def test_reward_command_line(own_rewards, tmp_path):
    for i, picture in enumerate(reward_noise(2, 8, 12)):
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    def run(*words):
        command = [sys.executable, R.__file__, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()
    pictures = [tmp_path / "0.png", tmp_path / "1.png"]
    spec = f"incompressibility,{own_rewards}:Judge"
    code, lines, _ = run("--reward", spec, "--prompt", "x", "--metadata", '{"k": 7}', *pictures)
    sizes = R.Rewards("incompressibility")(reward_noise(2, 8, 12), ["", ""], [{}, {}])["incompressibility"]
    assert code == 0 and len(lines) == 2
    for line, path, size in zip(lines, pictures, sizes):
        assert line == f"{path} incompressibility {size:.4f} Judge 7.0000"
    code, lines, errors = run("--reward", "nothing", pictures[0])
    assert code == 2 and not lines and len(errors) == 1 and "nothing" in errors[0]
    assert run("--reward", f"{own_rewards}:raises", pictures[0])[0] == 1
    assert run("--reward", "incompressibility", tmp_path / "none.png")[0] == 2
