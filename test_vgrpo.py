"""The method and the program, sentence by sentence: a test proves what its docstring says,
against an independent computation.  pytest; pytest -m "not slow" for the edit loop."""
import contextlib
import http.server
import inspect
import json
import math
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"                # read when the hub's library is imported
os.environ["OMP_NUM_THREADS"] = "1"               # for the processes that tests start
torch.set_num_threads(1)                          # small networks gain nothing from a second

import diffusers  # noqa: E402
import transformers as tf  # noqa: E402

import rewards  # noqa: E402
import vgrpo  # noqa: E402
from extras import command_line, pipelines, prompt_sets, prompts, recipes  # noqa: E402
from extras import run_folder  # noqa: E402
from extras import small_pipelines, tiny_world  # noqa: E402

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"
HERE = Path(__file__).parent
CPU = torch.device("cpu")
TIMES = ("seconds_rollout", "seconds_reward", "seconds_update", "samples_per_second",
         "peak_memory_gb")
SMALL = ["--iterations", "2", "--prompts-per-iteration", "4", "--group-size", "3", "--steps", "3",
         "--n-mc", "2", "--save-every", "1", "--eval-reward", "", "--reward", f"{__file__}:redness"]

def redness(images, prompts, metadata):
    """The reward of small runs: it varies on any picture, in steps that rounding does not cross."""
    return (100 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))).round()

def rng(*key):
    return vgrpo.generator("test", *key)

def normal(*shape, key=0):
    return torch.randn(shape, generator=rng(key))

def load(*flags):
    """-> cfg, policy, {name: trainable parameter}"""
    cfg = vgrpo.parse_config(list(flags))
    return cfg, *vgrpo.load_policy(cfg, CPU)

def run(out, *flags):
    """A small run in this process -> its lines of metrics, without times."""
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    stops = {number: signal.getsignal(number) for number in numbers}
    try:
        vgrpo.main([*SMALL, "--out", str(out), *flags])
    finally:
        for number, handler in stops.items():
            signal.signal(number, handler)
    return metrics(out)

def metrics(out):
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

def assert_same_run(one, other, relative=1e-4):
    """Equal lines of metrics: rewards to 1e-5, the rest to `relative`."""
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for name in a:
            bound = min(relative, 1e-5) if name.startswith(("reward", "eval")) else relative
            assert a[name] == pytest.approx(b[name], rel=bound, abs=1e-6), (a["iteration"], name)

# ---- the paper

GRID = torch.linspace(1, 0.1, 10)

def drawn(share="none", M=4, A=(0.0,) * 6, **flags):
    """The pairs of a group whose images have these advantages."""
    A = torch.tensor(A)
    return vgrpo.group_pairs(rng(0), GRID, M, (3, 2), A, share, **flags)

@pytest.mark.parametrize("M", [3, 4, 20])
def test_strata(M):
    """Each of M strata gives one timestep, all steps of the grid come equally often, the noise is
    standard normal."""
    draws = [vgrpo.draw_pairs(rng(i), GRID, M, (5,)) for i in range(1000)]
    t = torch.stack([t for t, _ in draws])
    noise = torch.stack([eps for _, eps in draws])
    steps = torch.round(10 * (1 - t)).long()              # t's places in the grid: 0 ... 9
    for j in range(M):
        first = j * 10 // M
        last = math.ceil((j + 1) * 10 / M) - 1
        stratum = steps[:, j]
        assert stratum.min() == first
        assert stratum.max() == last
    count = steps.numel()
    often = torch.bincount(steps.flatten()) / count
    farthest = (often - 0.1).abs().max()
    assert farthest < 5 * math.sqrt(0.1 / count)
    assert noise.mean().abs() < 0.05
    assert (noise.std() - 1).abs() < 0.05

@pytest.mark.parametrize("stratified", [True, False])
def test_strata_are_independent(stratified):
    """Two strata are drawn apart; without strata any two steps may come."""
    distances = set()
    for i in range(1000):
        t, _ = vgrpo.draw_pairs(rng(i), GRID, 2, (1,), stratified)
        first, second = t.tolist()
        distances.add(round(10 * (first - second)))
    possible = range(1, 10) if stratified else range(-9, 10)
    assert distances == set(possible)

@pytest.mark.parametrize("M", [4, 5])
def test_antithetic_noise(M):
    """Neighbours have opposite noise; the timesteps and an odd last pair stay as they are."""
    t, eps = drawn("none", M)
    plain_t, plain = drawn("none", M, antithetic=False)
    left = eps[:, 0:4:2]
    right = eps[:, 1:4:2]
    assert torch.equal(right, -left)
    assert torch.equal(eps[:, 0::2], plain[:, 0::2])
    assert torch.equal(t, plain_t)
    assert not torch.equal(plain[:, 1], -plain[:, 0])

@pytest.mark.parametrize("share, sets_of_t, sets_of_eps", [
    ("both", 1, 1),
    ("batch", 1, 1),
    ("timestep", 1, 6),
    ("noise", 6, 1),
    ("none", 6, 6),
])
def test_sharing(share, sets_of_t, sets_of_eps):
    """A group shares what --share says; its first image has the paper's pairs."""
    t, eps = drawn(share, stratified=False)
    assert t.shape == (6, 4)
    assert eps.shape == (6, 4, 3, 2)
    assert len(t.unique(dim=0)) == sets_of_t
    assert len(eps.unique(dim=0)) == sets_of_eps
    paper_t, paper_eps = vgrpo.draw_pairs(rng(0), GRID, 4, (3, 2), stratified=False)
    assert torch.equal(t[0], paper_t)
    assert torch.equal(eps[0], paper_eps)

@pytest.mark.parametrize("A, partners", [
    ([0.3, -1, 2, 0.5, -2, 0], [5, 3, 4, 1, 2, 0]),
    ([1.0, -1, 0, 2, -2], [1, 0, 2, 4, 3]),
])
def test_matched_sharing(A, partners):
    """The best image has the pairs of the worst, the second best those of the second worst."""
    t, eps = drawn("matched", 8, A)
    assert torch.equal(t, t[partners])
    assert torch.equal(eps, eps[partners])
    couples = (len(A) + 1) // 2
    assert len(t.unique(dim=0)) == couples
    assert len(eps.unique(dim=0)) == couples

@pytest.mark.parametrize("weight", ["adaptive", "x", "v", "eps"])
def test_surrogate(weight):
    """Equation 14 and its gradient are those of a plain loop over z_t = (1 - t) o + t eps, in which
    the adaptive weight's denominator is a number: no gradient goes through it."""
    o = normal(1, 3, 2)
    v = normal(1, 4, 3, 2, key=1).requires_grad_()
    t, eps = drawn(A=[0.0])
    z = vgrpo.add_noise(o[:, None], t, eps)
    L, x = vgrpo.surrogate(v, o, z, t, weight)

    total = 0.0
    image = o[0]
    for s, v_j, eps_j, x_j in zip(t[0], v[0], eps[0], x[0], strict=True):
        z_j = (1 - s) * image + s * eps_j
        x_hat = z_j - s * v_j
        eps_hat = z_j + (1 - s) * v_j
        if weight == "v":
            error = v_j - (eps_j - image)
        elif weight == "eps":
            error = eps_hat - eps_j
        else:
            error = x_hat - image
        size = error.abs().mean().item() if weight == "adaptive" else 1
        total = total + error.square().mean() / size / 4
        assert torch.allclose(x_j, x_hat, atol=1e-6)

    assert L.item() == pytest.approx(total.item(), rel=1e-5)
    mine, = torch.autograd.grad(L, v)
    theirs, = torch.autograd.grad(total, v)
    assert torch.allclose(mine, theirs, atol=1e-6)

def test_a_perfect_prediction():
    """Its loss is 0 and has no gradient: the adaptive weight's denominator is at least 1e-5."""
    o = torch.zeros(1, 3)
    z = torch.zeros(1, 1, 3)
    t = torch.ones(1, 1)
    v = z.clone().requires_grad_()
    L, _ = vgrpo.surrogate(v, o, z, t)
    L.backward()
    assert L == 0
    assert not v.grad.any()
    nearly, _ = vgrpo.surrogate(z + 1e-6, o, z, t)
    assert nearly.item() == pytest.approx(1e-12 / 1e-5)

def test_advantages():
    """They count standard deviations from the group's mean; an image without a score gets 0."""
    scores = torch.tensor([
        [1.0, 2.0, 3.0, 6.0],                             # mean 3, variance 3.5
        [1.0, math.nan, 3.0, 2.0],                        # mean 2, variance 2 / 3
    ])
    from_mean = torch.tensor([
        [-2.0, -1.0, 0.0, 3.0],
        [-1.0, 0.0, 1.0, 0.0],
    ])
    A = vgrpo.group_advantages(scores)
    assert torch.allclose(A[0], from_mean[0] / math.sqrt(3.5))
    assert torch.allclose(A[1], from_mean[1] * math.sqrt(1.5))
    unscored = torch.full((2, 3), math.nan)
    assert not vgrpo.group_advantages(unscored).any()

@pytest.mark.parametrize("scale", [1e6, 1.0, 1e-6, -1.0])
def test_equal_rewards(scale):
    """A scorer's rounding, relative to its scores, is no opinion; a thousandth is one."""
    rounding = 0.8 + 1e-7 * torch.arange(1, 52, 10).double()        # .8000001 ... .8000051
    A = vgrpo.group_advantages(scale * rounding)
    assert not A.any()
    assert A.dtype == torch.float32
    thousandth = torch.tensor([1.0, 1.001]).double()
    A = vgrpo.group_advantages(scale * thousandth)
    lower_first, _ = A.sort()
    assert torch.allclose(lower_first, torch.tensor([-1.0, 1.0]))
    assert not vgrpo.group_advantages(torch.zeros(6)).any()

def test_several_rewards():
    """They are averaged by weight; one of weight 0 has no say, even if it says NaN."""
    R = normal(3, 2, 5)
    R[2] = math.nan
    weights = torch.tensor([3.0, 1.0, 0.0])
    mean = vgrpo.weighted_mean(R, weights)
    assert torch.allclose(mean, 0.75 * R[0] + 0.25 * R[1])

def test_soft_clip():
    """It is eta tanh(A / eta); eta = 0 leaves A as it is."""
    A = torch.linspace(-50, 50, 101)
    soft = [3 * math.tanh(a / 3) for a in A.tolist()]
    soft = torch.tensor(soft)
    assert torch.allclose(vgrpo.soft_clip(A, 3.0), soft)
    assert torch.equal(vgrpo.soft_clip(A, 0.0), A)

@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.95, 0.995, 1.0, 1.005, 1.05])
def test_clipped_objective(A, ratio):
    """The clip stops the gradient only where the ratio has gone the way that A asks for."""
    L_old = torch.tensor([0.7])
    L = torch.tensor([0.7 - math.log(ratio)], requires_grad=True)
    advantage = torch.tensor([A])
    loss, rho = vgrpo.clipped_objective(L, L_old, advantage, 0.01)
    loss.sum().backward()

    if A > 0:
        beyond = ratio > 1.01
        bounded = min(ratio, 1.01)
    else:
        beyond = ratio < 0.99
        bounded = max(ratio, 0.99)
    slope = 0 if beyond else ratio * A
    assert rho.item() == pytest.approx(ratio)
    assert loss.item() == pytest.approx(-bounded * A)
    assert L.grad.item() == pytest.approx(slope)
    free, _ = vgrpo.clipped_objective(L, L_old, advantage)
    assert free.item() == pytest.approx(-ratio * A)

def test_simple_kl():
    """It is a mean square, and at theta_old it is 0 with no gradient."""
    x = normal(1, 3, 4).requires_grad_()
    kl = vgrpo.simple_kl(x, x.detach())
    kl.backward()
    assert kl == 0
    assert not x.grad.any()
    other = normal(1, 3, 4, key=1)
    mean = (x - other).square().mean()
    assert vgrpo.simple_kl(x, other).item() == pytest.approx(mean.item())

# ---- the rollout

PROMPT, OTHER = "a red circle on the left", "a blue bar on the right"
# Each is refused in one line; the last for its VAE, which diffusers slices wrongly.
UNSERVED = ["omnigen", "lumina_next", "qwen_image21", "mochi", "easyanimate"]
# diffusers loads no LoRA into these.
NO_LORA = ["hunyuan_image", "prx", "bria", "glm_image", "longcat_image", "nucleus_image",
           "ovis_image", "hunyuan_video15", "motif_video"]
GUIDANCE = {"prx": "0"}               # diffusers can guide only one image of it at a time
SERVED = [name for name in small_pipelines.FAMILIES if name not in UNSERVED]

def mostly_slow(names):
    """Two kinds of network for the edit loop, the others when there is time."""
    cases = []
    for name in names:
        marks = [] if name in ("sd3", "lumina2") else pytest.mark.slow
        cases.append(pytest.param(name, marks=marks))
    return cases

EVERY_FAMILY = pytest.mark.parametrize("name", mostly_slow(SERVED))

def small(name="sd3", *flags, pipe=None):
    """-> cfg, policy, {name: parameter}: a family's small pipeline, as load_policy makes it"""
    pipe = pipe or small_pipelines.FAMILIES[name]()
    frames = small_pipelines.FRAMES.get(name)
    video = ["--frames", str(frames)] if frames else []
    cfg = vgrpo.parse_config([*SMALL, "--model", "a/small", "--recipe", "tiny", "--ema", "0",
                              "--resolution", "32", *video, *flags])
    dtype = vgrpo.DTYPES[cfg.dtype]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgrpo, "load_pipeline", lambda cfg: pipe.to(dtype))
        policy, trainable = vgrpo.load_policy(cfg, CPU)
    return cfg, policy, trainable

def noise(n=2):
    return [rng("noise", i) for i in range(n)]

def items(*indices):
    return {i: {"prompt": tiny_world.PROMPTS[5 * i]} for i in indices}

def scored_by(score, **weights):
    def scorer(images, prompts, metadata):
        assert prompts == [item["prompt"] for item in metadata]
        return score(images, prompts)

    scorer.weights = weights
    return scorer

def how_red(images, prompts):
    red = images.select(-3, 0).float()                    # of pictures or videos
    return {"red": red.flatten(1).mean(1)}

def test_collect():
    """An image is made by its own noise, of its index and its group's, whatever the calls' size."""
    cfg, policy, _ = small("sd3", "--micro-batch", "1")
    generate = policy.generate
    sizes = []

    def counted(prompt, rngs):
        sizes.append(len(rngs))
        return generate(prompt, rngs)

    policy.generate = counted
    groups = vgrpo.collect(policy, items(4, 1), 3, cfg, "key")
    assert sizes == [2, 1, 2, 1]                          # as many rows as in a call of an update
    assert {group.index: group.item for group in groups} == items(4, 1)
    for index, group in zip((4, 1), groups):
        rngs = [vgrpo.generator("key", index, image) for image in range(3)]
        images, latents, _ = generate(group.item["prompt"], rngs)
        distance = (group.images.int() - images).abs()
        assert torch.allclose(group.latents, latents, atol=1e-5)
        assert distance.max() <= 1

def test_score():
    """A score lies where its reward, its group's index and its image's place say: [K, P, G]."""
    pixels = torch.arange(6).view(2, 3, 1, 1, 1)
    groups = [
        vgrpo.Group(1, {"prompt": "1"}, pixels[0], None, None),
        vgrpo.Group(0, {"prompt": "0"}, pixels[1], None, None),
    ]

    def score(images, prompts):
        numbers = [float(word) for word in prompts]
        return {"a": images.flatten(), "b": torch.tensor(numbers)}

    table = vgrpo.score(scored_by(score, a=1.0, b=1.0), groups)
    assert table.dtype == torch.float64
    assert table.tolist() == [
        [[3, 4, 5], [0, 1, 2]],
        [[0, 0, 0], [1, 1, 1]],
    ]

def test_a_reward_that_scores_nothing():
    """It ends the run, unless its weight is 0; a reward may leave out some images."""
    images = torch.zeros(2, 3, 2, 2)
    groups = [vgrpo.Group(0, {"prompt": "a"}, images, None, None)]

    def score(images, prompts):
        some = torch.tensor([1.0, math.nan])
        return {"some": some, "dead": torch.full((2,), math.nan)}

    table = vgrpo.score(scored_by(score, some=1.0, dead=0.0), groups)
    assert table.isnan().sum() == 3
    with pytest.raises(rewards.RunError, match="dead.*could not score any image"):
        vgrpo.score(scored_by(score, some=1.0, dead=0.1), groups)

# ---- the update

class Descent(torch.optim.SGD):
    """Gradient descent that keeps where each step stood and what gradient it was given."""
    def __init__(self, trainable, lr):
        super().__init__(trainable.values(), lr=lr)
        self.thetas = []
        self.gradients = []

    def step(self):
        params = self.param_groups[0]["params"]
        self.thetas.append([p.detach().clone() for p in params])
        self.gradients.append([p.grad.clone() for p in params])
        super().step()

def training(*flags, name="sd3", lr=0.0):
    """A rollout of four groups, which a rank may hold in any order, and what an update takes."""
    cfg, policy, trainable = small(name, "--grad-norm", "0", *flags)
    run = SimpleNamespace(cfg=cfg, policy=policy)
    run.params = list(trainable.values())
    run.A = normal(4, 3)
    run.groups = vgrpo.collect(policy, items(2, 0, 3, 1), 3, cfg, "training")
    run.pairs = {}
    for group in run.groups:
        index = group.index
        grid = group.conditions.grid
        shape = group.latents.shape[1:]
        run.pairs[index] = vgrpo.group_pairs(
            rng("pairs", index), grid, cfg.n_mc, shape, run.A[index], "none")
    run.descent = Descent(trainable, lr)
    no_ema = SimpleNamespace(step=lambda params: None)
    run.learner = vgrpo.Learner(policy, trainable, run.descent, no_ema)
    run.update = lambda: vgrpo.update(run.learner, run.groups, run.A, run.pairs, cfg)
    return run

def estimate(run, group, rows=slice(0, 3)):
    pairs = run.pairs[group.index]
    return vgrpo.estimate(run.policy, group, rows, pairs, run.cfg)

def assert_same_gradients(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        largest = b.abs().max().item()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * largest + 1e-8)

@torch.no_grad()
def test_estimate():
    """L_hat is the mean error of an image's own pairs, each by itself through the network."""
    run = training("--weight", "x")
    group = run.groups[1]
    L, x = estimate(run, group, slice(1, 3))
    t, eps = run.pairs[group.index]
    o = group.latents[2]                                  # row 1 of the rows that were asked for
    losses = []
    for j in range(2):
        s = t[2, j]
        z = (1 - s) * o + s * eps[2, j]
        v = run.policy.velocity(z[None], s[None], group.conditions)
        x_hat = z - s * v[0]
        error = x_hat - o
        losses.append(error.square().mean().item())
        assert torch.allclose(x[1, j], x_hat, atol=1e-5)
    mean = sum(losses) / 2
    assert L[1].item() == pytest.approx(mean, rel=1e-4)

@pytest.mark.parametrize("beta", ["0", pytest.param("0.3", marks=pytest.mark.slow)])
def test_old_estimates(beta):
    """Theta_old's estimates hold no graph, and its x only where the KL asks for it."""
    run = training("--kl", beta)
    parts = [(group, slice(1, 3)) for group in run.groups]
    old = vgrpo.old_estimates(run.policy, parts, run.pairs, run.cfg)
    assert len(old) == 4
    for L, x in old.values():
        assert not L.requires_grad
        assert (x is None) == (beta == "0")

def expected_statistics(run, group, old):
    """What a step says of a group: the paper's formulas at the present theta, against the old."""
    L, x = estimate(run, group)
    L_old, x_old = old[group.index]
    A = run.A[group.index]
    clipped, ratio = vgrpo.clipped_objective(L, L_old, A, 1e-3)
    kl = vgrpo.simple_kl(x, x_old)
    beta = run.cfg.kl
    said = kl if beta else torch.zeros_like(kl)           # no KL is computed that has no weight
    return {"loss": clipped + beta * kl, "ratio": ratio, "surrogate": L, "kl": said}

@pytest.mark.parametrize("updates, micro, beta", [
    ("2", "2", "0.3"),
    pytest.param("1", "1", "0.3", marks=pytest.mark.slow),
    pytest.param("4", "0", "0", marks=pytest.mark.slow),
])
def test_each_step_of_an_update(updates, micro, beta):
    """Its gradient is that of the clipped objective and the KL, against theta_old, at its own
    theta: a mean over the images of its own groups, whatever the size of the network's calls."""
    run = training("--updates", updates, "--micro-batch", micro, "--kl", beta, "--clip", "1e-3",
                   lr=0.05)
    steps = int(updates)
    groups_per_step = 4 // steps
    with torch.no_grad():
        old = {group.index: estimate(run, group) for group in run.groups}
    stats = run.update()
    thetas = run.descent.thetas
    gradients = run.descent.gradients
    assert len(gradients) == steps

    for step in range(steps):
        for p, value in zip(run.params, thetas[step]):
            p.data = value
        first = step * groups_per_step
        losses = []
        for group in run.groups[first:first + groups_per_step]:
            expected = expected_statistics(run, group, old)
            losses.append(expected["loss"])
            for key, value in expected.items():
                told = stats[key][group.index].float()
                assert torch.allclose(told, value, 1e-4, 1e-6), key
            moved = (stats["ratio"][group.index] - 1).abs().max()
            assert moved == 0 if step == 0 else moved > 1e-3          # L_old = sg(L) at first
        total = torch.stack(losses).mean()
        theirs = torch.autograd.grad(total, run.params)
        assert_same_gradients(gradients[step], theirs)

    norms = [torch.nn.utils.get_total_norm(gradient) for gradient in gradients]
    mean = sum(norms).item() / steps
    assert stats["grad_norm"] == pytest.approx(mean, rel=1e-4)
    assert stats["lr"] == 0.05

def test_nothing_waits_within_a_step(monkeypatch):
    """A step asks the device for one number, its norm; statistics leave it after the last step."""
    run = training("--updates", "2", "--micro-batch", "1", "--kl", "0.1")
    events = []
    for name in ("backward", "cpu", "item", "tolist", "numpy", "__bool__", "__float__"):
        def told(self, *args, name=name, original=getattr(torch.Tensor, name), **kwargs):
            caller = sys._getframe(1)
            if caller.f_globals["__name__"] == "vgrpo":
                events.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, told)
    run.update()
    step = ["backward"] * 6 + ["item"]
    assert events == step + step + ["cpu"] * 4

def test_gradient_step():
    """It clips the norm, tells the one before the clip, and the averaged weights follow."""
    cfg, policy, trainable = small("sd3", "--grad-norm", "0.5", "--ema", "0.7")
    learner = vgrpo.start_learner(policy, trainable, cfg)
    learner = replace(learner, optimizer=Descent(trainable, 1.0))
    params = list(trainable.values())
    norm = math.sqrt(sum(p.numel() for p in params))      # of a gradient of ones
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        told = vgrpo.gradient_step(learner, cfg)
        assert told == pytest.approx(norm, rel=1e-5)
    first, second = learner.optimizer.thetas
    averages = learner.ema.shadow_params
    for a, b, p, average in zip(first, second, params, averages):
        followed = (2 * b + 9 * p) / 11
        assert p.grad is None
        assert torch.allclose(b, a - 0.5 / norm, atol=1e-6)
        assert torch.allclose(average, followed, atol=1e-7)

def test_ranks_average_their_gradients(monkeypatch):
    """All weights take part, so that every rank asks for the same sums: of Qwen's last block some
    get no gradient. Here as if two ranks' gradients summed to three of this one's."""
    run = training("--lora-rank", "2", name="qwen_image")
    sums = []

    def all_reduce(grad):
        sums.append(grad.shape)
        grad.mul_(3)

    ranks = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        get_rank=lambda: 0,
        all_gather_object=lambda values, value: None,
        all_reduce=all_reduce)
    for distributed in (vgrpo.dist, ranks):
        monkeypatch.setattr(vgrpo, "dist", distributed)
        L, _ = estimate(run, run.groups[0])
        L.sum().backward()
        vgrpo.gradient_step(run.learner, run.cfg)
    alone, both = run.descent.gradients
    assert sums == [p.shape for p in run.params]
    assert not all(grad.any() for grad in alone)
    assert_same_gradients(both, [1.5 * grad for grad in alone])

def test_a_gradient_that_is_no_number():
    """The run ends before the step."""
    run = training("--updates", "1")
    run.A[1, 2] = math.inf
    with pytest.raises(rewards.RunError, match="gradient's norm is .*--lr"):
        run.update()
    assert not run.descent.thetas

# ---- one iteration

def heard(monkeypatch, name):
    """-> the arguments of each call of this function of vgrpo, which works as before"""
    function = getattr(vgrpo, name)
    calls = []

    def hear(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(vgrpo, name, hear)
    return calls

def test_run_iteration(monkeypatch):
    """Algorithm 1: generate with noise keyed by seed, iteration, group and image; average the
    rewards' advantages by weight; clip them softly; draw the pairs once a group, keyed by seed,
    iteration and group; update."""
    run = training("--seed", "7", "--soft-clip", "0.8", "--share", "both", "--micro-batch", "1",
                   "--updates", "2")

    def score(images, prompts):
        scores = how_red(images, prompts)
        scores["blue"] = images[:, 2].float().mean((1, 2))
        return scores

    draw = vgrpo.draw_pairs
    draws = heard(monkeypatch, "draw_pairs")
    updates = heard(monkeypatch, "update")
    scorer = scored_by(score, red=3.0, blue=1.0)
    metrics = vgrpo.run_iteration(run.learner, scorer, items(0, 1), run.cfg, 5)
    mean = 0.75 * metrics["reward/red"] + 0.25 * metrics["reward/blue"]
    assert metrics["reward"] == pytest.approx(mean)
    assert len(draws) == 2
    assert len(updates) == 1

    _, groups, advantages, pairs, _ = updates[0]
    for index, group in enumerate(groups):
        rngs = [vgrpo.generator(7, "noise", 5, index, image) for image in range(3)]
        _, o, c = run.policy.generate(group.item["prompt"], rngs)
        assert torch.allclose(group.latents, o, atol=1e-5)

        red, _, blue = group.images.double().mean((2, 3)).unbind(1)
        A_red = vgrpo.group_advantages(red)
        A_blue = vgrpo.group_advantages(blue)
        A = 0.75 * A_red + 0.25 * A_blue
        soft = 0.8 * torch.tanh(A / 0.8)
        assert torch.allclose(advantages[index], soft, atol=1e-4)

        key = vgrpo.generator(7, "pairs", 5, index)
        t, eps = draw(key, c.grid, 2, o.shape[1:])
        group_t, group_eps = pairs[index]
        assert torch.equal(group_t, t.expand(3, -1))
        assert torch.equal(group_eps, eps.expand(3, *eps.shape))

@pytest.mark.parametrize("share, seeds", [
    ("batch", 1),
    pytest.param("matched", 4, marks=pytest.mark.slow),
])
def test_pairs_follow_the_flags(monkeypatch, share, seeds):
    """Each group has random numbers of its own; with --share batch all have those of one."""
    run = training("--share", share, "--no-stratified")
    scorer = scored_by(how_red, red=1.0)
    calls = heard(monkeypatch, "group_pairs")
    vgrpo.run_iteration(run.learner, scorer, items(0, 1, 2, 3), run.cfg, 1)
    drawn_from = set()
    advantages = set()
    for generator, _, _, _, A, *flags in calls:
        drawn_from.add(generator.initial_seed())
        advantages.add(tuple(A.tolist()))
        assert flags == [share, False, True]
    assert len(drawn_from) == seeds
    assert len(advantages) == 4

def test_metrics():
    """They are numpy's; a group of advantages 0 is counted."""
    cfg = vgrpo.parse_config([*SMALL, "--clip", "0.1", "--updates", "2"])
    R = normal(2, 4, 3).double()
    A = normal(4, 3, key=1)
    A[1] = 0
    L = torch.rand(4, 3).double()
    ratio = torch.tensor([1.2, 0.8, 1.0]).double().expand(4, 3)
    stats = {"loss": 2 * ratio, "kl": 3 * ratio, "surrogate": L, "ratio": ratio,
             "grad_norm": 4, "lr": 0.7}
    mine = vgrpo.metrics_of(cfg, "ab", R, R.mean(0), A, stats, [0, 1, 3, 6])

    total = R.mean(0).numpy()
    losses = L.numpy()
    group_cv = losses.std(1, ddof=1) / losses.mean(1)
    stopped = (A[:, 0] > 0).sum() + (A[:, 1] < 0).sum()   # at 1.2 upwards, at 0.8 downwards
    theirs = {
        "reward": total.mean(),
        "reward_std": math.sqrt(total.var(1).mean()),
        "reward/a": R[0].mean().item(),
        "reward/b": R[1].mean().item(),
        "zero_std_groups": 1,
        "clip_fraction": stopped.item() / 12,
        "loss": 2, "kl": 3, "ratio_mean": 1, "ratio_max": 1.2, "grad_norm": 4, "lr": 0.7,
        "surrogate": losses.mean(),
        "surrogate_cv": losses.std(ddof=1) / losses.mean(),
        "surrogate_group_cv": group_cv.mean(),
        "nfe_rollout": 3, "nfe_old": 1, "nfe_train": 2,
        "seconds_rollout": 1, "seconds_reward": 2, "seconds_update": 3, "samples_per_second": 2,
    }
    assert mine.pop("peak_memory_gb") >= 0
    assert mine == pytest.approx(theirs)

# ---- the policy

def generated(policy, prompt=PROMPT):
    """-> conditions, and of each of the rollout's three steps: what the network answered in its
    calls, what the scheduler was given, z_t, the grid"""
    scheduler = type(policy.pipe.scheduler)
    step = scheduler.step
    steps = []
    answers = []

    def hear_network(network, args, output):
        rows = output[0]
        answers.append(torch.stack(rows) if isinstance(rows, list) else rows)

    def hear_scheduler(self, velocity, t, z, *args, **kwargs):
        given, grid = velocity, self.sigmas[:-1]
        if self.config.get("invert_sigmas"):              # Mochi's t runs the other way
            given, grid = -given, 1 - grid
        steps.append((answers[:], given, z.clone(), grid))
        answers.clear()
        return step(self, velocity, t, z, *args, **kwargs)

    hook = policy.transformer.register_forward_hook(hear_network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "step", hear_scheduler)
        _, _, conditions = policy.generate(prompt, noise())
    hook.remove()
    return conditions, steps[:3]

def own_pass(answers, other_answers):
    """(call, rows) of the prompt's own pass: that which another prompt changes in a first step."""
    changes = {}
    for call, (answer, other) in enumerate(zip(answers, other_answers)):
        for start in range(0, len(answer), 2):
            rows = slice(start, start + 2)
            change = (answer[rows] - other[rows]).abs().max().item()
            changes[change] = call, rows
    *others, largest = sorted(changes)
    assert largest > 1e-4
    assert others in ([], [0.0])
    return changes[largest]

@torch.no_grad()
@pytest.mark.parametrize("guidance, solver", [("0", "euler"), ("4", "dpm++")])
@EVERY_FAMILY
def test_velocity(name, guidance, solver, size="32"):
    """It is what the pipeline used at every step, of any family: what its scheduler was given or,
    of guidance in two passes, what its network answered in the prompt's own (up to the sign)."""
    guidance = GUIDANCE.get(name, guidance)
    _, policy, _ = small(name, "--solver", solver, "--guidance", guidance, "--resolution", size)
    c, steps = generated(policy)
    _, others = generated(policy, OTHER)
    call, rows = own_pass(steps[0][0], others[0][0])
    for t, (answers, given, z, grid) in zip(c.grid, steps, strict=True):
        v = policy.velocity(z, t.expand(2), c)
        largest = v.abs().max()
        assert torch.equal(c.grid, grid)
        assert v.dtype == torch.float32
        if len(answers) == 1 and len(answers[0]) == 2:
            assert (v - given).abs().max() < 1e-6 * largest
        else:                                             # a batch of four may round otherwise
            assert guidance == "4"
            answer = answers[call][rows].view_as(v)
            from_same = (v - answer).abs().max()
            from_negative = (v + answer).abs().max()
            assert min(from_same, from_negative) < 3e-6 * largest

@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "qwen_image"])
def test_another_size(name):
    """--resolution is the side of the images, and velocity is the pipeline's there too."""
    _, policy, _ = small(name, "--resolution", "64")
    images, _, _ = policy.generate(PROMPT, noise())
    assert images.shape == (2, 3, 64, 64)
    test_velocity(name, "0", "euler", size="64")

@torch.no_grad()
@pytest.mark.parametrize("rank", ["2", "0"])
@pytest.mark.parametrize("name", mostly_slow(["sd3", "qwen_image", "sana", "glm_image"]))
def test_half_precision(name, rank):
    """Velocity is the pipeline's to the bit: a LoRA's frozen layers compute in bf16 as they are,
    weights that train are fp32, and rounded by autocast."""
    _, policy, trainable = small(name, "--dtype", "bf16", "--lora-rank", rank)
    trained = {p.dtype for p in trainable.values()}
    frozen = {p.dtype for p in policy.transformer.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == ({torch.bfloat16} if rank == "2" else set())
    c, steps = generated(policy)
    for t, (answers, given, z, _) in zip(c.grid, steps):
        v = policy.velocity(z, t.expand(2), c)
        assert answers[0].dtype == torch.bfloat16
        assert v.dtype == torch.float32
        assert torch.equal(v, given.float())

@torch.no_grad()
@pytest.mark.parametrize("name, solver, sign, t_of", [
    ("sd3", "dpm++", 1, lambda tau: tau / 1000),
    ("flux", "euler", 1, lambda tau: tau),
    ("lumina2", "dpm++", -1, lambda tau: 1 - tau),
])
def test_a_network_that_knows_o(name, solver, sign, t_of):
    """It answers (z - o) / t: the rollout ends in o, and x_theta is o at every step."""
    pipe = small_pipelines.FAMILIES[name]()
    signature = inspect.signature(pipe.transformer.forward)

    def forward(*args, **kwargs):
        told = signature.bind(*args, **kwargs).arguments
        z = told["hidden_states"]
        truth = normal(*z.shape[1:])
        t = t_of(told["timestep"]).view(-1, *[1] * truth.ndim)
        return (sign * (z - truth) / t,)

    forward.__signature__ = signature
    pipe.transformer.forward = forward
    _, policy, _ = small(name, "--solver", solver, pipe=pipe)
    _, o, c = policy.generate(PROMPT, noise(3))
    truth = normal(*o.shape[1:]).expand_as(o)
    eps = normal(*o.shape, key=1)
    t = c.grid[:, None]                                   # one step for each of three images
    z = vgrpo.add_noise(o[:, None], t, eps[:, None])
    v = policy.velocity(z[:, 0], c.grid, c)
    _, x = vgrpo.surrogate(v[:, None], o, z, t)
    assert torch.allclose(o, truth, atol=1e-5)
    assert torch.allclose(x[:, 0], truth, atol=1e-5)

@torch.no_grad()
def test_images():
    """They are the VAE's of the latents, in 256 steps."""
    _, policy, _ = small("sd3")
    images, o, _ = policy.generate(PROMPT, noise())
    vae = policy.pipe.vae
    unscaled = o / vae.config.scaling_factor + vae.config.shift_factor
    picture = vae.decode(unscaled)[0]
    picture = (picture / 2 + 0.5).clamp(0, 1) * 255
    picture = picture.round().to(torch.uint8)
    assert images.dtype == torch.uint8
    assert torch.equal(images, picture)

@pytest.mark.parametrize("solver", ["euler", "dpm++"])
def test_the_grid_is_the_pipelines_own(solver):
    """LTX shifts it by the size of the video, within bounds of its own."""
    own = small_pipelines.ltx()
    own(PROMPT, num_inference_steps=3, height=32, width=32, num_frames=9, output_type="latent")
    _, policy, _ = small("ltx", "--solver", solver)
    _, _, conditions = policy.generate(PROMPT, noise())
    assert torch.allclose(conditions.grid, own.scheduler.sigmas[:-1], atol=1e-6)

def test_make_scheduler():
    """DPM-Solver++ is of second order, on an even grid that is shifted by what the config says."""
    dpm = vgrpo.make_scheduler(small_pipelines.euler(shift=3.0), "dpm++")
    dpm.set_timesteps(4)
    assert torch.allclose(dpm.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert dpm.config.solver_order == 2
    assert dpm.config.algorithm_type == "dpmsolver++"
    flux = vgrpo.make_scheduler(small_pipelines.euler(use_dynamic_shifting=True), "dpm++")
    assert flux.config.use_dynamic_shifting               # some pipelines ask before they shift
    sana = vgrpo.make_scheduler(small_pipelines.sana_scheduler(), "euler")
    sana.set_timesteps(sigmas=[1.0, 0.5])                 # its shift is called flow_shift
    assert torch.allclose(sana.sigmas, torch.tensor([1, 0.75, 0]))
    with pytest.raises(rewards.UsageError, match="flow matching"):
        vgrpo.make_scheduler(vgrpo.diffusers.DDIMScheduler(), "euler")

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_time(dtype):
    """For each image, or each of its tokens, it is what was heard at t; between two steps, and
    beyond the last, it is on the line through both."""
    grid = torch.tensor([1.0, 0.8, 0.5, 0.1])
    told = torch.tensor([[0, 1], [4, 1], [6, 1], [16, 1]], dtype=dtype)
    assert torch.equal(vgrpo.network_time(grid, grid, told), told)
    of_images = told[:, 0]
    assert torch.equal(vgrpo.network_time(grid, grid, of_images), of_images)
    t = torch.tensor([0.9, 0.65, 0.2, 0.05])
    line = torch.tensor([[2, 1], [5, 1], [13.5, 1], [17.25, 1]], dtype=dtype)
    torch.testing.assert_close(vgrpo.network_time(t, grid, told), line)

def test_listen():
    """The pipeline is afterwards as it was, also when the call fails."""
    pipe = small_pipelines.flux()
    with pytest.raises(ZeroDivisionError), vgrpo.listen(pipe, ["hidden_states"], "timestep"):
        1 / 0
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks

@pytest.mark.parametrize("name", small_pipelines.REFUSED)
def test_no_rectified_flow(name):
    """It is refused in one line that names the flag."""
    with pytest.raises(rewards.UsageError, match="^--model[^\n]*$"):
        small(name, pipe=small_pipelines.REFUSED[name]())

@pytest.mark.parametrize("name, guidance, told", [
    ("qwen_image", "4", True), ("lumina2", "4", True), ("lumina2", "0", False),
    ("flux", "4", False)])
def test_guidance_in_two_passes(capsys, name, guidance, told):
    """It samples one policy and trains another, which is told; embedded guidance does not."""
    small(name, "--guidance", guidance)
    output = capsys.readouterr().out
    assert ("--guidance 4.0: it guides the rollout" in output) == told

@pytest.mark.parametrize("rank", ["0", "2"])
@EVERY_FAMILY
def test_what_an_iteration_moves(name, rank):
    """All of the transformer's weights, or its LoRA's; nothing else."""
    cfg, policy, trainable = small(
        name, "--lora-rank", rank, "--guidance", GUIDANCE.get(name, "4"), "--updates", "2",
        "--micro-batch", "2", "--kl", "0.1", "--lr", "0.01", "--weight-decay", "0")
    before = {key: p.clone() for key, p in policy.transformer.state_dict().items()}
    learner = vgrpo.start_learner(policy, trainable, cfg)
    scorer = scored_by(how_red, red=1.0)
    metrics = vgrpo.run_iteration(learner, scorer, items(0, 1), cfg, 1)
    assert math.isfinite(metrics["loss"])
    assert metrics["kl"] > 0
    after = policy.transformer.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved <= trainable.keys()
    assert len(moved) >= len(trainable) / 2
    assert not any(p.requires_grad for p in policy.pipe.vae.parameters())
    if rank == "2":
        assert all("lora_" in key for key in trainable)

# ---- LoRA and weights

@torch.no_grad()
def shift(trainable):
    for key, p in trainable.items():
        noise = torch.randn(p.shape, generator=rng(key))
        p.add_(noise * 0.1)

@torch.no_grad()
def test_add_lora():
    """W x becomes W x + alpha / r B A x in the attention, but in SD3.5's attn2; A begins small and
    of its own seed and name, B is 0."""
    cfg, policy, trainable = small("sd35", "--lora-rank", "8", "--lora-alpha", "12")
    linear = policy.transformer.transformer_blocks[0].attn.to_q
    x = normal(2, 5, 32)
    plain = F.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), plain)
    linear.lora_B.copy_(normal(32, 8))
    product = linear.lora_B @ linear.lora_A
    wanted = plain + 12 / 8 * x @ product.T
    assert torch.allclose(linear(x), wanted, atol=1e-5)
    assert len(trainable) == 2 * (8 + 7)                  # the last block has no to_add_out
    assert not any("attn2" in key for key in trainable)
    _, _, other = small("sd35", "--lora-rank", "8", "--seed", "1")
    both = [*trainable.items(), *other.items()]
    As = torch.stack([p for key, p in both if "_A" in key])
    assert As.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert len(As.unique(dim=0)) == 30

def test_a_network_without_attention():
    """The mend is all weights."""
    cfg = vgrpo.parse_config(["--lora-rank", "2"])
    with pytest.raises(rewards.UsageError, match="--lora-rank: Linear"):
        vgrpo.add_lora(torch.nn.Linear(2, 2), cfg, CPU, vgrpo.generator)

@pytest.mark.slow
def test_load_lora(tmp_path):
    """--lora takes a file or its folder and keeps the product alpha / r B A, whatever --lora-alpha;
    a file that does not say its alpha has its rank as alpha; one that does not fit is refused."""
    flags = ["sd3", "--lora-rank", "4", "--lora-alpha"]
    cfg, policy, trainable = small(*flags, "12")
    shift(trainable)
    vgrpo.export_weights(tmp_path, trainable, policy.transformer, cfg)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    unsaid = tmp_path / "unsaid.safetensors"
    weights = load_file(file)
    assert weights.keys() == {f"transformer.{key}.weight" for key in trainable}
    save_file(weights, unsaid)
    for path, alpha, factor in ((tmp_path, "6", 2), (file, "12", 1), (unsaid, "12", 1 / 3)):
        other, policy, again = small(*flags, alpha, "--lora", str(path))
        vgrpo.start_learner(policy, again, other)
        for key, p in again.items():
            wanted = trainable[key] * factor if "lora_B" in key else trainable[key]
            assert torch.allclose(p, wanted)
    other, _, again = small("sd3", "--lora-rank", "3")
    for path, words in ((tmp_path, "does not fit.*--lora-rank"), (HERE / "no", "cannot be read")):
        with pytest.raises(rewards.UsageError, match=f"--lora {path}.*{words}"):
            vgrpo.load_lora(path, again, other)

def test_a_full_export(tmp_path):
    """It is a transformer that diffusers loads, with every tensor."""
    cfg, policy, trainable = small("sd3", "--lora-rank", "0")
    shift(trainable)
    vgrpo.export_weights(tmp_path, trainable, policy.transformer, cfg)
    folder = tmp_path / "transformer"
    fresh = type(policy.transformer).from_pretrained(folder).state_dict()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == fresh.keys()
    assert all(torch.equal(fresh[key], p) for key, p in trainable.items())

@pytest.mark.parametrize("name", mostly_slow([name for name in SERVED if name not in NO_LORA]))
def test_an_exported_lora_in_diffusers(tmp_path, name):
    """load_lora_weights gives the latents that training saw."""
    pytest.importorskip("peft")
    cfg, policy, trainable = small(name, "--lora-rank", "4", "--lora-alpha", "8")
    _, before, _ = policy.generate(PROMPT, noise())
    shift(trainable)
    _, after, _ = policy.generate(PROMPT, noise())
    vgrpo.export_weights(tmp_path, trainable, policy.transformer, cfg)
    pipe = small_pipelines.FAMILIES[name]()
    if name == "prx" or not hasattr(pipe, "load_lora_weights"):
        pytest.skip("diffusers loads no LoRA into it")
    pipe.load_lora_weights(tmp_path)
    _, policy, _ = small(name, "--lora-rank", "0", pipe=pipe)
    _, loaded, _ = policy.generate(PROMPT, noise())
    scale = after.abs().max()
    assert (loaded - after).abs().max() < 1e-4 * scale
    assert (after - before).abs().max() > 1e-2 * scale

# ---- a run and its folder

dist = vgrpo.dist
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WHOLE = ["--iterations", "4", "--updates", "2", "--kl", ".1", "--clip", ".01", "--eval-every", "2"]
LORA = ["--lora-rank", "4", "--lora-alpha", "3"]
METRICS = """iteration reward reward_std reward/redness zero_std_groups loss ratio_mean ratio_max
    clip_fraction kl surrogate surrogate_cv surrogate_group_cv grad_norm lr nfe_rollout nfe_old
    nfe_train seconds_rollout seconds_reward seconds_update samples_per_second peak_memory_gb"""

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    run(out, *WHOLE)
    return out

@pytest.fixture
def unevaluated(monkeypatch):
    """Evaluations take most of a small run's time."""
    monkeypatch.setattr(vgrpo, "evaluate", lambda *args: None)

@contextlib.contextmanager
def ending(capsys, code, *words, traceback=False):
    """What is done inside exits with this code and one line of error that has these words."""
    with pytest.raises(SystemExit) as end:
        yield
    before, _, line = capsys.readouterr().err.partition("vgrpo.py: error: ")
    assert end.value.code == code and line.count("\n") == 1, before + line
    assert ("Traceback" in before) == traceback and "usage" not in before, before
    assert all(word in line for word in words), line

def command(*words):
    """A process of Python, until it ends."""
    words = [sys.executable, *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}   # sums depend on it
    return subprocess.run(words, env=env, cwd=HERE, capture_output=True, text=True, timeout=300)

def stored(out, iteration):
    """{file: [hash of each tensor]} of a checkpoint's weights"""
    folder, hashes = Path(out, "checkpoints", f"{iteration:06d}"), {}
    for path in folder.rglob("*.safetensors"):
        weights = load_file(path).values()
        hashes[path.relative_to(folder)] = [hash(w.numpy().tobytes()) for w in weights]
    assert len(hashes) == 2
    return hashes

def checkpoints(out):
    return sorted(path.name for path in Path(out, "checkpoints").iterdir())

def test_a_run_writes_what_the_interface_names(whole):
    """config.json, all metrics, a picture for each evaluation, the last two checkpoints."""
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert [line.keys() for line in lines[:2]] == [
        {"iteration", "eval", "eval/redness"}, set(METRICS.split())]
    assert lines[1]["grad_norm"] > 0 and lines[1]["kl"] > 0 and lines[1]["ratio_max"] != 1
    assert [lines[1][f"nfe_{part}"] for part in ("rollout", "old", "train")] == [3, 1, 2]
    config = json.loads((whole / "config.json").read_text())
    assert config["flags"]["kl"] == 0.1 and config["flags"].keys() == asdict(vgrpo.Config()).keys()
    assert config["versions"].keys() == {"torch", "diffusers", "transformers"}
    files = {str(path.relative_to(whole)) for path in [*whole.glob("s*/*"), *whole.glob("c*/*/*")]}
    assert files == {f"samples/00000{i}.png" for i in (0, 2, 4)} | {
        f"checkpoints/00000{i}/{part}" for i in (3, 4) for part in ("transformer", "ema", "resume")}

@pytest.mark.slow
def test_a_short_run_learns(tmp_path):
    """Six iterations from the tiny model as it is given: the held-out evaluation rises by 0.1."""
    flags = recipes.RECIPES["tiny"] | {"iterations": 6, "eval_every": 6, "reward": "shapes"}
    run(tmp_path, *[f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
    first, last = (line["eval/shapes"] for line in metrics(tmp_path) if "eval" in line)
    assert .5 < first < .8 and last > first + .1

# ---- the same numbers on any number of ranks, with any micro-batch, sharded or not

def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path, whole, unevaluated):
    """Another seed draws other images and other pairs."""
    again = run(tmp_path / "a", *WHOLE, "--iterations", "1")
    other = run(tmp_path / "b", *WHOLE, "--iterations", "1", "--seed", "1")
    assert again[0] == metrics(whole)[1]
    assert other[0]["reward"] != again[0]["reward"] and other[0]["loss"] != again[0]["loss"]

@pytest.mark.slow
def test_the_micro_batch_changes_no_numbers(tmp_path, whole, unevaluated):
    """Two images in a call and then one, of groups of three."""
    lines = [line for line in metrics(whole) if "eval" not in line]
    assert_same_run(run(tmp_path, *WHOLE, "--micro-batch", "2"), lines)

@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_has_the_same_groups_on_any_number_of_ranks(monkeypatch, ranks):
    """Of 16 groups the first step takes 0 to 7, the second 8 to 15; each rank has its part."""
    steps = [], []
    for rank in range(ranks):
        monkeypatch.setattr(vgrpo, "rank_and_ranks", lambda: (rank, ranks))
        groups = vgrpo.layout(16, 2)
        steps[0].extend(groups[:8 // ranks])
        steps[1].extend(groups[8 // ranks:])
    assert [sorted(step) for step in steps] == [[*range(8)], [*range(8, 16)]]

LOSSY = """
import os
from {module} import redness
calls = []
def lossy(images, prompts, metadata):
    if len(images) == 6:                              # a rank's groups of an iteration
        calls.append(1)
    if len(calls) == 4 and os.environ.get("RANK") == "1":
        os._exit(9)
    return redness(images, prompts, metadata)
"""

@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--micro-batch", "1"], ["--shard"]])
def test_two_ranks_give_the_numbers_of_one_which_goes_on_for_them(tmp_path, whole, layout):
    """A rank dies in the fourth iteration: one message. One rank resumes to the same numbers."""
    own, out = tmp_path / "own.py", tmp_path / "run"
    own.write_text(LOSSY.format(module=Path(__file__).stem))
    flags = [*WHOLE, "--reward", f"{own}:lossy"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = command(*ranks, HERE / "vgrpo.py", *SMALL, *flags, *layout, "--out", out)
    messages = re.findall("vgrpo.py: error.*", process.stderr)
    assert process.returncode == 1 and len(messages) == 1, process.stderr
    assert "rank 0 lost another rank" in messages[0] and "exitcode  : 9" in process.stderr
    assert checkpoints(out) == ["000002", "000003"]
    text = json.dumps(metrics(whole)).replace("redness", "lossy")
    assert_same_run(metrics(out), json.loads(text)[:-2])
    assert_same_run(run(out, *flags, "--resume", "--no-shard"), json.loads(text))

def save_flux(folder):
    """A whole FLUX pipeline, with a CLIP that knows tiny's words and a T5 that spells."""
    tiny, pipe = tiny_world.blank(), small_pipelines.flux()
    letters = [(letter, -1.0) for letter in ["<pad>", "</s>", "<unk>", *string.ascii_lowercase]]
    t5 = tf.T5EncoderModel(tf.T5Config(
        vocab_size=len(letters), d_model=32, d_kv=16, d_ff=32, num_heads=2, num_layers=1))
    diffusers.FluxPipeline(
        pipe.scheduler, pipe.vae, tf.CLIPTextModel(tiny.text_encoder.config),
        tiny.tokenizer, t5, tf.T5TokenizerFast(vocab=letters, extra_ids=0),
        pipe.transformer).save_pretrained(folder)

@pytest.mark.slow
@pytest.mark.parametrize("dtype, iterations, relative", [("fp32", 2, 1e-4), ("bf16", 1, 0.05)])
def test_flux_on_two_ranks_as_its_recipe_runs(tmp_path, dtype, iterations, relative, unevaluated):
    """All weights, sharded, encoders away, checkpointing: the numbers of one rank without these."""
    save_flux(tmp_path / "flux")
    flags = ["--model", str(tmp_path / "flux"), "--recipe", "flux", "--prompts", "shapes",
             "--resolution", "16", "--updates", "2", "--lr", "1e-4", "--dtype", dtype,
             "--iterations", str(iterations)]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = command(*ranks, HERE / "vgrpo.py", *SMALL, *flags, "--out", tmp_path / "two")
    assert process.returncode == 0, process.stderr
    two = [line for line in metrics(tmp_path / "two") if "eval" not in line]
    one = run(tmp_path / "one", *flags, "--no-shard", "--no-offload", "--no-checkpointing")
    assert_same_run(two, one, relative)
    assert len(checkpoints(tmp_path / "two")) == iterations

# ---- resume

@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, whole):
    """Bit for bit. What a crash left beyond the last checkpoint is cut, half a line too."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "checkpoints/000004").rename(out / "checkpoints/partial")
    (out / "checkpoints/partial/stray").touch()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 5, "reward": 9}\n{"iterat')
    assert run(out, *WHOLE, "--resume") == metrics(whole)
    assert stored(out, 4) == stored(whole, 4) and checkpoints(out) == ["000003", "000004"]
    assert not list(out.rglob("stray"))

@pytest.mark.slow
def test_a_resumed_lora_equals_one_that_never_stopped(tmp_path, unevaluated):
    """Bit for bit, and so does its average. A copy under another name stays."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, *LORA, "--iterations", "3")
    run(two, *LORA, "--iterations", "2")
    (two / "checkpoints/000001").rename(two / "checkpoints/000001-best")
    assert run(two, *LORA, "--resume", "--iterations", "3") == metrics(one)
    weights, averaged = stored(two, 3).values()
    assert stored(two, 3) == stored(one, 3) and weights != averaged
    assert checkpoints(two) == ["000001-best", "000002", "000003"]

def test_resume_starts_a_run_and_evaluates_a_finished_one_anew(tmp_path, monkeypatch):
    """A job may always say --out X --resume. The last iteration is saved and evaluated."""
    evaluated, prompt, out = [], tmp_path / "prompt.txt", tmp_path / "run"
    prompt.write_text("a red bar on the left")
    monkeypatch.setattr(vgrpo, "evaluate", lambda run, cfg, iteration: evaluated.append(
        (iteration, len(run.eval_items), len(run.train_items))))
    flags = ["--iterations", "1", "--save-every", "9", "--eval-every", "9", "--resume"]
    assert run(out, *flags, "--eval-prompts", str(prompt)) == run(out, *flags)
    assert evaluated == [(0, 1, 24), (1, 1, 24), (1, 1, 24)] and checkpoints(out) == ["000001"]

DEADLY = """
import os, signal, sys, vgrpo
save, calls = vgrpo.dcp.save, []
def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args, **kwargs)
vgrpo.dcp.save = deadly
vgrpo.main(sys.argv[1:])
"""

@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_resumes_to_the_same_numbers(tmp_path, whole):
    """The half-written third checkpoint is not taken for one."""
    process = command("-c", DEADLY, *SMALL, *WHOLE, "--out", tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoints(tmp_path) == ["000001", "000002", "partial"]
    assert run(tmp_path, *WHOLE, "--resume") == metrics(whole)

# ---- signals

@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_the_iteration_saves_and_exits(tmp_path, monkeypatch, capfd, number):
    """Before any evaluation; a second one would end the process at once."""
    iterate, evaluated, then = vgrpo.run_iteration, [], []

    def interrupted(*args):
        os.kill(os.getpid(), number)
        metrics = iterate(*args)
        then.append(signal.getsignal(number))
        return metrics
    monkeypatch.setattr(vgrpo, "run_iteration", interrupted)
    monkeypatch.setattr(vgrpo, "evaluate", lambda run, cfg, iteration: evaluated.append(iteration))
    monkeypatch.setattr(signal, "SIG_IGN", None)                  # the tests may run under nohup
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--iterations", "9", "--save-every", "9", "--eval-every", "1")
    assert end.value.code == 128 + number and then == [signal.SIG_DFL] and evaluated == [0]
    assert checkpoints(tmp_path) == ["000001"] and len(metrics(tmp_path)) == 1
    assert capfd.readouterr().err.count("once more ends at once") == 1

def test_compiled_blocks_are_compiled_when_they_are_recomputed_too():
    """Dynamo sees their frames; it would skip one whose forward were a partial of checkpoint."""
    torch._dynamo.reset()
    block = torch.nn.Linear(2, 2)
    block.forward = pipelines.recomputed(block.forward)
    block.compile(backend="eager")
    torch._dynamo.utils.counters.clear()
    block(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0

@pytest.mark.parametrize("launched, heard", [(False, STOPS[:2]), (True, STOPS)])
def test_under_nohup_a_hangup_stays_ignored(monkeypatch, launched, heard):
    """But by torchrun, which listens all the same and passes it on to its ranks."""
    before, caught = {signal.SIGHUP: signal.SIG_IGN}, []
    monkeypatch.setattr(dist, "is_initialized", lambda: launched)
    monkeypatch.setattr(signal, "getsignal", before.get)
    monkeypatch.setattr(signal, "signal", lambda number, action: caught.append(number))
    command_line.watch_signals()
    assert caught == [*heard]

def test_ctrl_c_while_loading_leaves_no_traceback(tmp_path, monkeypatch, capsys):
    """Exit code 130."""
    def press_ctrl_c(cfg):
        signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell may have it ignored
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(vgrpo, "load_pipeline", press_ctrl_c)
    with pytest.raises(SystemExit) as end:
        run(tmp_path)
    assert end.value.code == 130 and "Traceback" not in capsys.readouterr().err

# ---- errors end in one line

BAD = [
    ("--model nobody/nothing", "hub id or folder"), ("--model tinny", "tiny, mini, sd3.5"),
    ("--model .",), ("--recipe x", "sd3.5-s1"), ("--solver heun", "euler", "dpm++"),
    ("--reward beauty", "pickscore"), ("--reward shapes=0", "weights are 0"),
    ("--reward MISSING.py:fn",), ("--eval-reward beauty",), ("--lora MISSING --lora-rank 4",),
    ("--prompts MISSING.txt", "give FILE.txt"), ("--prompts EMPTY.txt", "empty"),
    ("--prompts BINARY.txt", "utf-8"), ("--prompts BAD.jsonl", "line 2", 'a string "prompt"'),
    ("--eval-prompts MISSING.txt",), ("--prompts-per-iteration 1 --updates 2", "such as 2"),
    ("--prompts-per-iteration 5 --updates 2", "such as 4 or 6"), ("--group-size 1", "at least 2"),
    ("--lr -1",), ("--lr inf",), ("--clip nan",), ("--lora-alpha 0",), ("--steps many",),
    ("--resolution big",), ("--iteration 3",), ("--resume", "name the folder"),
    ("--resume runs/typo", "holds no run"),
]

@pytest.mark.parametrize("flags, mends", [(flags, mends) for flags, *mends in BAD])
def test_bad_input_is_one_line_that_names_it(tmp_path, monkeypatch, capsys, flags, mends):
    """And the mend; exit code 2."""
    monkeypatch.chdir(tmp_path)
    Path("EMPTY.txt").write_text("\n \n")
    Path("BINARY.txt").write_bytes(bytes(range(256)))
    Path("BAD.jsonl").write_text('{"prompt": "a red circle on the left"}\n{"promt": "x"}\n')
    with ending(capsys, 2, *flags.split()[:2], *mends):
        vgrpo.main(flags.split())
    assert not Path("runs").exists()

def test_a_run_is_not_overwritten_and_goes_on_with_its_own_flags(tmp_path, capsys):
    """Even one without a checkpoint. New flags go over the old ones, but a LoRA keeps its size."""
    cfg = vgrpo.parse_config(["--lora-rank", "2", "--kl", "0.5"])
    (tmp_path / "config.json").write_text(json.dumps({"flags": asdict(cfg)}))
    with ending(capsys, 2, f"--out {tmp_path}: holds a run", "--resume"):
        vgrpo.main(["--out", str(tmp_path)])
    resume = ["--resume", str(tmp_path), "--lora-rank", "2"]
    resumed = vgrpo.parse_config([*resume, "--lr", "1"])
    assert (resumed.kl, resumed.lr, resumed.out) == (0.5, 1, str(tmp_path))
    with ending(capsys, 2, "--lora-alpha"):
        vgrpo.main([*resume, "--lora-alpha", "3"])
    (tmp_path / "config.json").write_text('{"flags": {"unknown": 1}}')
    with ending(capsys, 2, f"--resume {tmp_path}"):
        vgrpo.main(resume)

@pytest.mark.parametrize("body, word, traceback", [
    ("return 1 / 0", "ZeroDivisionError", True), ("return images[:1, 0, 0, 0]", "floats", True),
    ("return images[:, 0, 0, 0] * float('nan')", "could not score any image", False)])
def test_an_own_reward_that_fails_ends_the_run(
        tmp_path, unevaluated, capsys, body, word, traceback):
    """With its traceback where it raises, and one line; exit code 1."""
    own = tmp_path / "own.py"
    own.write_text(f"def broken(images, prompts, metadata):\n    {body}\n")
    with ending(capsys, 1, "broken", word, traceback=traceback):
        run(tmp_path / "run", "--reward", f"{own}:broken")

def test_a_gradient_that_is_no_number_ends_the_run(tmp_path, monkeypatch, capsys, unevaluated):
    """Nothing is saved."""
    monkeypatch.setattr(vgrpo, "simple_kl", lambda x, x_old: x.flatten(1).mean(1) * math.nan)
    with ending(capsys, 1, "gradient's norm is nan", "--lr"):
        run(tmp_path, "--kl", "1")
    assert not (tmp_path / "checkpoints").exists()

@pytest.mark.parametrize("size, word", [(2**20, "File too large"), (3 * 2**20, "checkpoint")])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
        tmp_path, whole, unevaluated, capsys, size, word):
    """Files may not grow beyond what the weights take, or what a resume needs takes."""
    import resource
    shutil.copytree(whole, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with ending(capsys, 1, word):
            run(tmp_path / "run", *WHOLE, "--resume", "--iterations", "5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {*checkpoints(tmp_path / "run")} - {"partial"} == {"000003", "000004"}
    assert stored(tmp_path / "run", 4) == stored(whole, 4)

def test_a_damaged_checkpoint_and_one_of_another_model_are_refused(tmp_path, whole, capsys):
    """A LoRA stands for another model: its weights have other names."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "config.json").unlink()
    with ending(capsys, 2, "--resume: ", "another --model"):
        run(out, "--resume", "--lora-rank", "2")
    file = next((out / "checkpoints/000004/resume").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-9999])
    with ending(capsys, 2, "--resume: "):
        run(out, "--resume")

@pytest.mark.parametrize("cards, shown, local, version, told", [
    (4, "0,1,2,3", 1, "13.0", "cuda:1 nccl"), (1, "3", 3, "13.0", "cuda:0 nccl"),
    (0, "", 1, "13.0", "cpu gloo"), (0, "0", 1, None, "cpu gloo"),
    (2, "0,1", 2, "13.0", "--nproc_per_node: this machine has 2 GPUs"),
    (0, "0", 0, "13.0", "the driver too old? CUDA_VISIBLE_DEVICES= trains on CPUs")])
def test_a_rank_takes_its_gpu(monkeypatch, cards, shown, local, version, told):
    """Or the one it is shown. More ranks than GPUs are refused, and a CUDA build that sees none."""
    joined = []
    monkeypatch.setattr(vgrpo, "dist", SimpleNamespace(
        is_initialized=lambda: False, init_process_group=lambda name, **_: joined.append(name)))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    try:
        result = f"{vgrpo.start_ranks()} {joined[0]}"
    except vgrpo.UsageError as error:
        result = str(error)
    assert told in result

# ---- flags and recipes

@dataclass
class Bare:
    uncommented: int = 0
    commented: int = 1  # 100 %

def test_help_has_a_line_for_every_flag_and_every_flag_is_read():
    """The comment beside its field. A field without one breaks nothing."""
    help_of = command_line.make_parser(vgrpo.Config, "").format_help
    text, config = "".join(help_of().split()), inspect.getsource(vgrpo.Config)
    files = [HERE / "vgrpo.py", *(HERE / "extras").glob("*.py")]
    source = "".join(path.read_text() for path in files)
    for field in fields(vgrpo.Config):
        assert re.search(rf"cfg\.{field.name}\b", source), field.name
        line = re.search(rf"^    {field.name}: .*?# (.+)$", config, re.M)[1] + f" [{field.default}]"
        assert "--" + field.name.replace("_", "-") in text and line.replace(" ", "") in text
    parser = command_line.make_parser(Bare, "", {})
    assert "100 % [1]" in parser.format_help()
    assert parser.parse_args(["--uncommented", "2"]).uncommented == 2

def test_flags_go_over_the_recipe_and_the_recipe_over_the_defaults():
    """The recipe is the model's, if none is named; its evaluation goes with its reward."""
    parse = vgrpo.parse_config
    cfg = parse(["--model", "sd3.5-medium", "--lr", "1e-5"])
    assert (cfg.recipe, cfg.lr, cfg.dtype, cfg.group_size) == ("sd3.5-s1", 1e-5, "bf16", 24)
    assert parse([]).recipe == "tiny" and parse(["--model", "flux.1-dev"]).recipe == "flux"
    needy = ["--model", "z-image-turbo"]                          # a model's needs lie in between
    assert (parse(needy).steps, parse([*needy, "--steps", "8"]).steps) == (9, 8)
    assert not parse(["--no-antithetic"]).antithetic and parse(["--shard"]).shard
    assert parse([]).eval_reward == "shapes,shapes-strict=0"
    for flags in (["--reward", "incompressibility"], ["--prompts", "mine.txt"]):
        assert parse(flags).eval_reward == ""

def test_the_recipes_have_the_papers_values():
    """Gradient steps are iterations times updates."""
    shared = dict(group_size=24, prompts_per_iteration=48, steps=40, lora_rank=32, lora_alpha=64.0,
                  lr=3e-4, guidance=0.0, share="both", stratified=True, weight="adaptive")
    first = dict(shared, updates=1, iterations=150, n_mc=4, clip=0.0, kl=0.0, soft_clip=3.0)
    second = dict(shared, updates=2, iterations=100, n_mc=10, clip=3e-2, kl=0.0, soft_clip=0.0)
    flux = dict(steps=16, updates=4, iterations=300, n_mc=4, clip=1e-2, kl=0.0, soft_clip=3.0,
                guidance=3.5, lr=1e-5, group_size=12, prompts_per_iteration=32, lora_rank=0)
    expected = {"sd3.5-s1": first, "sd3.5-s2": second, "sd3.5-s3": first, "flux": flux,
                "sd3.5-s4": dict(second, iterations=25),
                "sd3.5-s5": dict(second, iterations=15, clip=0.0, kl=0.3)}
    for name, values in expected.items():
        cfg = asdict(vgrpo.parse_config(["--model", "sd3.5-medium", "--recipe", name]))
        assert {key: cfg[key] for key in values} == values, name

# ---- prompts

def texts(**flags):
    """-> the prompts to train on, the prompts to evaluate on"""
    lists = prompts.load_prompts(vgrpo.Config(**flags), rng("held out"))
    return [[item["prompt"] for item in items] for items in lists]

def test_prompts_come_from_lines_of_text_or_json(tmp_path):
    """Each once, stripped; a byte order mark is no text, and metadata comes along."""
    text, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\ufeff  one \n\nt\u2028wo\none\n", encoding="utf-8")
    objects.write_text('{"prompt": " one", "tag": 1}\n\n{"prompt": "one", "tag": 2}')
    assert prompts.read_file(text, "") == [{"prompt": "one"}, {"prompt": "t\u2028wo"}]
    assert prompts.read_file(objects, "") == [{"prompt": "one", "tag": tag} for tag in (1, 2)]

@pytest.mark.parametrize("number, held_out", [(1000, 48), (80, 8), (79, 0)])
def test_a_tenth_of_a_file_is_held_out(tmp_path, number, held_out):
    """A drawn one, of at most 48 prompts; of few prompts none, and the first are evaluated."""
    lines = [f"prompt {i}" for i in range(number)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    train, test = texts(prompts=str(tmp_path / "a.txt"))
    assert len(train) == number - held_out and {*train, *test} == {*lines}
    assert len(test) == (held_out or 48) and (test == lines[:len(test)]) == (held_out == 0)

def test_evaluation_prompts_are_those_of_their_flag_or_of_the_set(tmp_path, monkeypatch, capsys):
    """All of a file, 48 drawn ones of a set; a set that only evaluates does not train."""
    sets = {"ocr": (["a"], [*map(str, range(99))]), "hpdv2": ([], ["b"])}
    items = {name: tuple([{"prompt": prompt} for prompt in part] for part in parts)
             for name, parts in sets.items()}
    monkeypatch.setattr(prompt_sets, "load", items.get)
    (tmp_path / "a.txt").write_text("one\ntwo")
    train, test = texts(prompts="ocr")
    assert train == ["a"] and len({*test}) == 48 and test != sorted(test, key=int)
    assert texts(prompts="ocr", eval_prompts="hpdv2") == [["a"], ["b"]]
    assert sorted(texts(prompts="ocr", eval_prompts=str(tmp_path / "a.txt"))[1]) == ["one", "two"]
    with ending(capsys, 2, "--prompts hpdv2", "--eval-prompts"):
        vgrpo.main(["--prompts", "hpdv2"])

def test_every_prompt_is_used_once_before_any_comes_again():
    """In an order of the seed's, over the borders of iterations."""
    items, orders = [*range(10)], []
    for seed in (3, 4):
        cfg = SimpleNamespace(prompts_per_iteration=4, seed=seed)
        order = [vgrpo.pick_item(items, cfg, k, i) for k in range(1, 6) for i in range(4)]
        orders += [order[:10], order[10:]]
    assert [sorted(order) for order in orders] == [items] * 4
    assert len({*map(tuple, [items, *orders])}) == 5

# ---- loading

def test_text_encoders_come_for_a_new_prompt_only_and_go_home(monkeypatch):
    """Also when encoding raises."""
    _, policy, _ = load("--steps", "2", "--offload")
    encoders, visits = [policy.pipe.text_encoder, policy.pipe.text_encoder_2], []
    home = {p: p.data_ptr() for encoder in encoders for p in encoder.parameters()}

    def come(encoder):
        visits.append(encoder)
        for p in encoder.parameters():
            p.data = p.data.clone()
    for encoder in encoders:
        monkeypatch.setattr(encoder, "_apply", lambda to, encoder=encoder: come(encoder))
    for words in ("a blue bar on the right", "a blue bar on the right", "a red bar on the left"):
        policy.generate(words, [rng(0)])
    assert visits == encoders * 2
    monkeypatch.setattr(encoders[0], "forward", None)
    with pytest.raises(TypeError):
        policy.generate("a red circle on the left", [rng(0)])
    assert len(visits) == 6 and all(p.data_ptr() == place for p, place in home.items())

# ---- more of the program

@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()

@pytest.mark.slow
def test_a_sharded_lora_gives_the_same_numbers(tmp_path, unevaluated, one_rank):
    """The group of processes is left at the end."""
    sharded = run(tmp_path / "a", *LORA, "--shard")
    assert not dist.is_initialized()
    assert_same_run(sharded, run(tmp_path / "b", *LORA))

def test_a_grid_shows_the_first_image_of_each_group_then_the_second(tmp_path):
    """24 tiles in rows of six."""
    groups = []
    for index in (2, 0, 1):
        grey = 20 * index + torch.arange(9).view(9, 1, 1, 1).expand(9, 3, 8, 8)
        groups.append(vgrpo.Group(index, {"prompt": "a"}, grey.byte(), None, None))
    run_folder.save_grid(tmp_path / "grid.png", groups, torch.zeros(1, 3, 9))
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (6 * 152, 4 * 168)
    for tile in range(24):
        x, y = tile % 6 * 152, tile // 6 * 168
        assert sheet.getpixel((x + 76, y + 76))[0] == 20 * (2, 0, 1)[tile % 3] + tile // 3

def test_tensorboard_is_told_what_the_file_is_told(tmp_path, monkeypatch):
    """Where it is installed; the run does without."""
    told, cfg = [], vgrpo.parse_config([])
    board = SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar))
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    for there in (module, None):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", there)
        run_folder.start_log(tmp_path, cfg, 9)({"iteration": 3, "loss": 0.5})
    assert told == [("iteration", 3, 3), ("loss", 0.5, 3)]
    assert metrics(tmp_path) == [{"iteration": 3, "loss": 0.5}] * 2

def test_an_evaluation_weighs_its_rewards_and_leaves_out_what_fills_up_the_ranks(monkeypatch):
    """Two prompts on three ranks: each rank generates one group, and the third is in no mean."""
    table = torch.tensor([[[1., 3], [5, math.nan], [99, 99]], [[8, 8], [8, 8], [99, 99]]])
    dealt, told = [], []
    learner = SimpleNamespace(policy=None, trainable={}, ema=vgrpo.EMAModel([]))
    run = SimpleNamespace(eval_items=["x", "y"], learner=learner, log=told.append, out=Path(),
                          eval_scorer=SimpleNamespace(weights={"a": 3.0, "b": 1.0}))
    monkeypatch.setattr(vgrpo, "collect", lambda policy, *call: dealt.append(call))
    monkeypatch.setattr(vgrpo, "score", lambda *args: table.double())
    monkeypatch.setattr(vgrpo, "save_grid", lambda *args: None)
    for rank in range(3):
        monkeypatch.setattr(vgrpo, "rank_and_ranks", lambda: (rank, 3))
        vgrpo.evaluate(run, vgrpo.Config(ema=0.0), 7)
    assert [items for items, *_ in dealt] == [{0: "x"}, {1: "y"}, {2: "x"}]
    assert dealt[0][1] == 96 and dealt[0][3:] == ("evaluation",)  # 192 images, whatever the seed
    assert told[0] == {"iteration": 7, "eval/a": 3, "eval/b": 8, "eval": (2.75 + 5.75) / 2}

def test_an_evaluation_sees_the_average_and_training_goes_on_without_it(monkeypatch):
    """Bit for bit, also after an evaluation that failed."""
    cfg, policy, trainable = load("--lora-rank", "2")
    learner = vgrpo.start_learner(policy, trainable, cfg)
    learner.ema.shadow_params = [torch.full_like(p, 3) for p in trainable.values()]
    before, seen = [p.detach().clone() for p in trainable.values()], []

    def failing(*args):
        seen.extend((p == 3).all().item() for p in trainable.values())
        raise OSError
    monkeypatch.setattr(vgrpo, "collect", failing)
    with pytest.raises(OSError):
        vgrpo.evaluate(SimpleNamespace(learner=learner, eval_items=[{}]), cfg, 0)
    assert all(seen) and all(map(torch.equal, trainable.values(), before))

@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_sharded_network_trains_in_fp32_and_keeps_its_name(one_rank, rank):
    """A LoRA is whole on each rank; all weights are shards. config.json gets the class's name."""
    _, policy, trainable = load("--lora-rank", rank, "--dtype", "bf16", "--shard")
    for p in trainable.values():
        assert p.dtype == torch.float32 and isinstance(p, vgrpo.DTensor) == (rank == "0")
    assert type(policy.transformer).__name__ == "SD3Transformer2DModel"

@pytest.mark.parametrize("rank, events", [("0", ["loads", "meets"]), ("1", ["meets", "loads"])])
def test_the_first_rank_of_a_machine_goes_first(monkeypatch, rank, events):
    """And does not keep the others waiting where it fails."""
    seen = []
    monkeypatch.setattr(vgrpo, "dist", SimpleNamespace(
        is_initialized=lambda: True, barrier=lambda: seen.append("meets")))
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(OSError), vgrpo.first_rank_first():
        seen.append("loads")
        raise OSError
    assert seen == events

def test_32_prompts_are_remembered():
    """With all that was asked for; the oldest is forgotten for the next."""
    asked = []
    encode = vgrpo.remember(lambda *args, **named: asked.append(args[0]) or len(asked), [], CPU)
    for prompt in [*range(32), 0, 31, 32, 31, 0]:
        encode(prompt)
    assert asked == [*range(33), 0]
    assert encode("a", b=1) == encode("a", b=1) != encode("a", b=2)

def test_only_what_trains_is_not_frozen(monkeypatch):
    """SD3's absent T5 is no fault; blocks are compiled, one by one."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part, **_: compiled.append(part))
    _, policy, trainable = load("--lora-rank", "2", "--compile")
    parts = [policy.pipe.vae, policy.pipe.text_encoder, policy.transformer]
    learned = {name for part in parts for name, p in part.named_parameters() if p.requires_grad}
    assert learned == trainable.keys() and not any(part.training for part in parts)
    assert policy.pipe.text_encoder_3 is None
    assert compiled == [*policy.transformer.transformer_blocks]

@pytest.mark.parametrize("rank, autocast", [("0", True), ("2", False)])
def test_half_precision_is_autocast_where_all_weights_train(rank, autocast):
    """Weights that train are fp32; a LoRA's frozen layers run in bf16 as they are."""
    _, policy, trainable = load("--lora-rank", rank, "--dtype", "bf16", "--steps", "2")
    told = []
    policy.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: told.append(torch.is_autocast_enabled("cpu")))
    policy.generate("a red bar on the left", [rng(0)])
    assert told == [autocast] * 2 and {p.dtype for p in trainable.values()} == {torch.float32}
    frozen = [p.dtype for p in policy.transformer.parameters() if not p.requires_grad]
    assert {*frozen} == ({torch.bfloat16} if rank == "2" else set())

def test_a_disk_that_is_not_shared_is_told(tmp_path, monkeypatch, capsys):
    """As if another machine saw a later checkpoint."""
    monkeypatch.setattr(vgrpo, "gather", lambda done: [done, 1])
    with ending(capsys, 2, f"--out {tmp_path}", "share"):
        run(tmp_path)

@pytest.mark.parametrize("rank, error, waits", [
    ("0", vgrpo.UsageError("two\nlines"), []), ("1", vgrpo.UsageError("two\nlines"), [3]),
    ("1", OSError("two\nlines"), [])])
def test_what_all_ranks_see_is_told_by_the_first(monkeypatch, capsys, rank, error, waits):
    """In one line. The others wait until torchrun ends them."""
    waited = []
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", rank)
    command_line.explain(error)
    assert waited == waits and capsys.readouterr().err == "\nvgrpo.py: error: two lines\n"

@pytest.mark.parametrize("ranks, present, told", [(2, False, 1), (2, True, 0), (1, False, 0)])
def test_what_many_ranks_need_without_accelerate_is_told(monkeypatch, capsys, ranks, present, told):
    """With it they share the pages of a file."""
    monkeypatch.setattr(vgrpo, "rank_and_ranks", lambda: (0, ranks))
    monkeypatch.setattr(diffusers.utils, "is_accelerate_available", lambda: present)
    vgrpo.load_pipeline(vgrpo.parse_config([]))
    assert capsys.readouterr().out.count("no accelerate: each rank") == told

class Elsewhere(torch.Tensor):
    """A tensor on a pretended device: a CPU's numbers, which refuse to be mixed with the CPU's."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(),
            dtype=numbers.dtype, device="elsewhere:0")

    def __init__(self, numbers):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_its_device(function, args, kwargs or {})

class Devices(torch.utils._python_dispatch.TorchDispatchMode):
    """Tensors can be made on that device, and moved there and back."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_its_device(function, args, kwargs or {})

CROSSED = {"there": 0, "back": 0}             # bytes between the CPU and that device

def on_its_device(function, args, kwargs):
    """Tensors of two devices meet where a GPU lets them: in copies, as one number, as indices."""
    tree_map, name = torch.utils._pytree.tree_map, function.__name__.split(".")[0]
    tensors = torch.utils._pytree.tree_leaves((args, kwargs))
    here = [x for x in tensors if torch.is_tensor(x) and not isinstance(x, Elsewhere)]
    away = any(isinstance(x, Elsewhere) for x in tensors)
    guests = [x for x in here if x.ndim and (x is args[0] or not name.startswith("index"))]
    assert not (away and guests) or name in ("copy_", "_to_copy"), f"{name}: tensors of two devices"
    first = args[0] if args else None
    source = args[1] if name == "copy_" else first        # copy_(target, source)
    args, kwargs = tree_map(lambda x: getattr(x, "numbers", x), (args, kwargs))
    if kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == "elsewhere"
        kwargs["device"] = "cpu"
    result = function(*args, **kwargs)
    to = {"copy_": isinstance(first, Elsewhere), "_to_copy": away, "_local_scalar_dense": False}
    if name in to and to[name] != isinstance(source, Elsewhere):
        CROSSED["there" if to[name] else "back"] += source.nbytes
    return tree_map(lambda x: Elsewhere(x) if away and torch.is_tensor(x) else x, result)

def two_iterations(device):
    """Their metrics, where all that may differ from device to device is in use."""
    cfg = vgrpo.parse_config([*SMALL, "--updates", "2", "--micro-batch", "2", "--lora-rank", "4",
                              "--guidance", "3", "--kl", "0.1", "--clip", "0.01", "--offload"])
    learner = vgrpo.start_learner(*vgrpo.load_policy(cfg, torch.device(device)), cfg)
    scorer = vgrpo.Rewards("shapes", device)
    items = dict(enumerate([{"prompt": prompt} for prompt in tiny_world.PROMPTS[:4]]))
    CROSSED.update(there=0, back=0)                       # the weights are there
    return [vgrpo.run_iteration(learner, scorer, items, cfg, iteration) for iteration in (1, 2)]

def go_elsewhere():
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Devices():
        print(json.dumps([two_iterations("elsewhere:0"), CROSSED]))

@pytest.mark.slow
def test_an_iteration_on_another_device_mixes_no_tensors_and_gives_the_cpus_numbers():
    """What a GPU would refuse is refused. A process of its own is given the new device."""
    module = Path(__file__).stem
    process = command("-c", f"import {module}; {module}.go_elsewhere()")
    assert process.returncode == 0, process.stderr
    (there, crossed), here = json.loads(process.stdout.splitlines()[-1]), two_iterations("cpu")
    for one, other in zip(there, here):
        for name in one.keys() - {*TIMES}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert here[1]["ratio_max"] != 1 and here[1]["kl"] > 0
    # Pictures come back as bytes and go there to be scored. Noise goes there: of 12 images, of 4
    # unguided calls, of 12 x 2 pairs, and again of half of these for theta_old's surrogate.
    pictures = 2 * 12 * 3 * 32 * 32
    noise = 2 * (12 + 4 + 24 + 12) * 4 * 4 * 8 * 8
    assert 0 <= crossed["back"] - pictures < 2000
    assert 0 <= crossed["there"] - pictures - noise < 4000

# ---- the built-in sets of prompts

class PromptServer(http.server.BaseHTTPRequestHandler):
    """Sends server.pages[path], after server.pause; server.claimed overstates a page's length."""
    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(self.server.pause)
        body = self.server.pages.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(len(body or b"") + self.server.claimed))
        self.end_headers()
        self.wfile.write(body or b"")

    log_message = print                            # which pytest shows when a test fails

@pytest.fixture
def prompt_server(tmp_path, monkeypatch):
    """A mirror on this machine, with hpdv2's files, and an empty cache folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PromptServer)
    server.asked, server.pause, server.claimed, server.kind = [], 0, 0, "text/plain"
    server.pages = {f"/{file}": json.dumps([f" {file}", "", "a cat"]).encode()
                    for file in prompt_sets.FILES if "hpdv2" in file}
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    monkeypatch.setenv("VGRPO_PROMPTS_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(prompt_sets, "FOLDER", tmp_path / "assets" / "vgrpo" / "prompts")
    yield server
    server.shutdown()
    server.server_close()

def refused(name):
    """load(name) must fail with a message of one line, which is returned."""
    with pytest.raises(rewards.UsageError, match=r"\A.*\Z") as error:
        prompt_sets.load(name)
    return str(error.value)

def test_built_in_sets_are_parsed(prompt_server, monkeypatch):
    """Train lists keep repeats, test prompts come once; stripped, in order, with their metadata."""
    line = '{"tag": "colors", "include": [{"class": "cup", "color": "red"}], "prompt": "%s"}\n'
    train = line % "a cup " + "\n" + line % "a cup" + line % "two\u2028cups"
    prompt_server.pages |= {"/geneval/train_metadata.jsonl": train.encode(),
                            "/geneval/test_metadata.jsonl": (line % "b" + line % "a").encode(),
                            "/ocr/train.txt": ' a "Hé"\n\n  \nc\u2028d\n'.encode(),
                            "/ocr/test.txt": b"two\none\ntwo"}
    monkeypatch.setattr(prompt_sets, "FILES", dict.fromkeys(prompt_sets.FILES))
    metadata = {"tag": "colors", "include": [{"class": "cup", "color": "red"}]}
    prompts = ["a cup", "a cup", "two\u2028cups"], ["b", "a"]
    assert prompt_sets.load("geneval") == tuple([metadata | {"prompt": prompt} for prompt in part]
                                                for part in prompts)
    assert prompt_sets.load("ocr") == ([{"prompt": 'a "Hé"'}, {"prompt": "c\u2028d"}],
                                       [{"prompt": "two"}, {"prompt": "one"}])
    assert prompt_sets.load("hpdv2")[0] == []
    prompts = [item["prompt"] for item in prompt_sets.load("hpdv2")[1]]
    assert prompts[:3] == ["hpdv2/anime.json", "a cat", "hpdv2/concept-art.json"]
    assert len(prompts) == 5 and len(prompt_server.asked) == 8      # none is asked for anew

@pytest.mark.parametrize("flaw, said", [
    ({"claimed": 1000}, "connection broke"), ({"kind": "text/html"}, "HTML page"),
    ({"pages": {"/hpdv2/anime.json": b'{"a": 1}'}}, "no list of prompts"), ({"pages": {}}, "404")])
def test_a_broken_download_leaves_nothing(prompt_server, flaw, said):
    """A page cut off, of HTML, of another kind or missing is told and neither kept nor recorded."""
    vars(prompt_server).update(flaw)
    assert said in refused("hpdv2")
    assert [*prompt_sets.FOLDER.rglob("*.*")] == []

def test_a_full_disk_leaves_nothing(prompt_server, monkeypatch):
    """A file that could not be written whole is not there at all."""
    monkeypatch.setattr(prompt_sets.Path, "replace", lambda *paths: os.rename("full", "disk"))
    assert "No such file" in refused("hpdv2")
    assert [*prompt_sets.FOLDER.rglob("*.*")] == []

def test_wrong_contents_are_refused(prompt_server, monkeypatch):
    """A file has the git id of the pinned commit, or else of the first download, or is refused."""
    kept = prompt_sets.FOLDER / "hpdv2" / "anime.json"
    prompt_sets.load("hpdv2")
    kept.write_bytes(b'["another"]')
    assert "recorded.json has" in refused("hpdv2")
    kept.unlink()
    prompt_server.pages = {"/hpdv2/anime.json": b'["another"]', "/ocr/test.txt": b"hello word\n"}
    assert "recorded.json has" in refused("hpdv2") and not kept.exists()
    known = "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"      # git's id of "hello world\n"
    monkeypatch.setattr(prompt_sets, "FILES", {"ocr/test.txt": known})
    assert "the pinned commit has 3b18e512" in refused("ocr")
    prompt_server.pages["/ocr/test.txt"] = b"hello world\n"
    assert prompt_sets.load("ocr") == ([], [{"prompt": "hello world"}])

@pytest.mark.slow
def test_several_processes_ask_once(prompt_server, tmp_path):
    """Three processes that want a file at the same time send one request."""
    prompt_server.pause = 1.5                        # the others start while the first one waits
    program = "from extras.prompt_sets import read; print(len(read('hpdv2/photo.json')))"
    env = os.environ | {"HF_ASSETS_CACHE": str(tmp_path / "assets")}
    ranks = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env,
                              cwd=os.path.dirname(rewards.__file__)) for _ in range(3)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == [b"2\n"] * 3
    assert prompt_server.asked == ["/hpdv2/photo.json"]

def test_without_a_network_one_line_says_where_to_put_the_file(prompt_server, monkeypatch):
    """It names the address and the place, offline at once; a file that was put there is used."""
    monkeypatch.delenv("VGRPO_PROMPTS_URL")
    monkeypatch.setattr(prompt_sets, "FLOW_GRPO", "http://127.0.0.1:9/")      # nobody listens there
    monkeypatch.setattr(prompt_sets, "FILES", {"ocr/test.txt": None})
    path = prompt_sets.FOLDER / "ocr" / "test.txt"
    for offline, said in (False, "refused"), (True, "HF_HUB_OFFLINE"):
        monkeypatch.setattr(prompt_sets.constants, "HF_HUB_OFFLINE", offline)
        assert said in refused("ocr")
        assert refused("ocr").endswith(f"save http://127.0.0.1:9/ocr/test.txt as {path}")
    path.write_text("a sign\n")
    assert prompt_sets.load("ocr") == ([], [{"prompt": "a sign"}])

# ---- videos

def test_scores_of_videos(tmp_path):
    """Frame by frame, those without a score left out, or whole for a reward that says so."""
    file = tmp_path / "own.py"
    file.write_text("""
def red(images, prompts, metadata):
    assert images.ndim == 4 and len(prompts) == len(metadata) == len(images)
    red = images[:, 0].mean((1, 2))
    return red.where(red > 0, float("nan"))

def length(videos, prompts, metadata):
    return videos.new_tensor([float(video.shape[0]) for video in videos])
length.videos = True
""")
    videos = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    videos[0, 0, 0], videos[0, 1, 0], videos[1, 2, 0] = 255, 51, 102
    scorer = rewards.Rewards(f"{file}:red,{file}:length")
    scores = scorer(videos, ["a", "b"], [{}, {}])
    assert scores["red"].tolist() == pytest.approx([0.6, 0.4])
    assert scores["length"].tolist() == [3, 3]

@pytest.mark.slow
def test_a_video_run(tmp_path, monkeypatch):
    """It trains on its frames' scores, and shows three of them on the sheet and all in a film."""
    monkeypatch.setattr(vgrpo, "load_pipeline", lambda cfg: small_pipelines.wan21())
    monkeypatch.setattr(vgrpo, "model_index", lambda cfg: {})
    lines = run(tmp_path / "run", "--model", "own/video", "--recipe", "tiny", "--frames", "5",
                "--resolution", "32x16", "--lora-rank", "2", "--iterations", "1",
                "--prompts", "shapes")
    assert lines[-1]["eval"] == lines[-1]["eval/redness"] and lines[1]["grad_norm"] > 0
    sheet = Image.open(tmp_path / "run" / "samples" / "000001.png")
    film = Image.open(tmp_path / "run" / "samples" / "000001.webp")
    assert film.n_frames == 5 and film.size == (6 * 32, 16)
    assert sheet.size[0] == 6 * (144 + 8)

def test_size_options():
    """Size and frames are told in the pipeline's own words."""
    cfg = vgrpo.Config(resolution="64x32", frames=5)
    count, size = pipelines.size_options(accepted("sana_video"), cfg)
    assert count == "num_videos_per_prompt" and size == {"width": 64, "height": 32, "frames": 5}
    square = vgrpo.Config(resolution="64")
    assert pipelines.size_options(accepted("sd3"), square)[1] == {"width": 64, "height": 64}
    with pytest.raises(rewards.UsageError, match="--frames.*makes pictures"):
        pipelines.size_options(accepted("sd3"), cfg)

def accepted(family):
    return inspect.signature(small_pipelines.FAMILIES[family]().__call__).parameters
