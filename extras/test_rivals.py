"""Tests of extras/rivals.py, each against an independent computation."""
import re
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.testing import assert_close

import vgrpo
from extras import rivals

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"

# Of 10 steps, passes without a gradient and three times those with one:
COSTS = {
    "flow-grpo": 37,                                      # 10 + 3 x 9
    "mixgrpo": 22,                                        # 10 + 3 x 4
    "nft": 46,                                            # 10 + 9 of theta_old + 3 x 9
    "awm": 40,                                            # 10 + 6 + 6 of base + 3 x 6
    "epg": 55,                                            # 10 + 9 + 9 + 3 x 9
    "ram": 30,                                            # 10 + 4 + 4 + 3 x 4
}

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))                         # no two pictures are equal

def flags(method, out):
    return f"""--method {method} --out {out} --reward {__file__}:brightness --solver euler
        --prompts-per-iteration 4 --group-size 8 --steps 10 --eval-every 99
        --iterations 12 --lr 1e-3""".split()

def gradient_of(method, v):
    """What a network said of 3 x 5 pairs, and the gradient of a method's loss of it (A, r = .9)."""
    torch.manual_seed(0)
    o, t, eps = torch.randn(3, 20), torch.rand(3, 5), torch.randn(3, 5, 20)
    z = vgrpo.add_noise(o[:, None], t, eps)
    x = SimpleNamespace(v=v, v_old=torch.zeros_like(v), o=o, t=t, eps=eps, z=z)
    rival = Mock()
    rival.rollout.return_value = torch.rand(2, 3)
    rivals.METHODS[method](rival, None)
    loss_of = rival.update.call_args.args[1]
    return x, torch.autograd.grad(loss_of(x, 0.9).sum(), v)[0]

@pytest.mark.parametrize("n, std", [(10, 0.480), (200, 0.501)])
def test_the_sde_keeps_a_gaussians_marginals(n, std):
    """Data N(.7, .5^2), whose velocity is known. Euler's ODE ends at .431 in 10 steps."""
    torch.manual_seed(0)
    grid = torch.linspace(1, 0, n + 1)
    z = torch.randn(300_000)
    for j, t in enumerate(grid[:-1]):
        s = 1 - t
        slope = (t - s / 4) / (s * s / 4 + t * t)
        v = slope * (z - 0.7 * s) - 0.7
        mean, noise = rivals.sde_step(z, v, grid, j)
        z = mean + noise * torch.randn_like(z)
    assert abs(z.mean() - 0.7) < 0.004
    assert abs(z.std() - std) < 0.004

def test_log_prob_is_torchs():
    z, mean, std = *torch.randn(2, 3, 20), torch.tensor(0.3)
    expected = torch.distributions.Normal(mean, std).log_prob(z)
    assert_close(rivals.log_prob(z, mean, std), expected.mean(1))

def test_nft_at_theta_old_has_a_gradient_without_beta(monkeypatch):
    v = torch.zeros(3, 5, 20, requires_grad=True)         # = v_old
    _, with_1 = gradient_of("nft", v)
    monkeypatch.setattr(rivals, "NFT_BETA", 0.1)
    _, with_tenth = gradient_of("nft", v)
    assert with_1.norm() > 0.1
    assert_close(with_1, with_tenth, rtol=1e-4, atol=1e-6)

def awm(v, o, eps, z, t):                                 # v_old = 0
    p = -4 * t * (v - (eps - o)).square().mean() ** 0.25
    return -0.9 * torch.exp(p - p.detach()) + v.square().mean()

def epg(v, o, eps, z, t):
    error, error_old = z - t * v - o, z - o
    loss = error.square().mean() / error.detach().abs().mean()
    loss_old = error_old.square().mean() / error_old.abs().mean()
    return 0.9 * torch.exp(loss_old - loss).detach() * loss

@pytest.mark.parametrize("loss_of_pair", [awm, epg])
def test_losses_are_those_of_a_loop(loss_of_pair):
    v = torch.randn(3, 5, 20, requires_grad=True)
    x, gradient = gradient_of(loss_of_pair.__name__, v)
    total = 0
    for i in range(3):
        for j in range(5):
            pair = x.o[i], x.eps[i, j], x.z[i, j], x.t[i, j]
            total = total + loss_of_pair(v[i, j], *pair)
    expected, = torch.autograd.grad(total, v)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize("method", COSTS)
def test_costs_and_first_ratios(tmp_path, method):
    cfg = rivals.parse_config(flags(method, tmp_path))
    run = vgrpo.prepare(cfg, torch.device("cpu"))
    rival = rivals.Rival(run, cfg)
    metrics = rival.iterate(dict(enumerate(run.train_items[:4])), 1)
    assert metrics["nfe"] == COSTS[method]
    ratios = rival.stats.get("ratio_mean", [1.0])
    first = ratios[:-(-len(ratios) // cfg.updates)]       # of the first gradient step
    assert set(first) == {1.0}

@pytest.mark.slow
@pytest.mark.parametrize("method", ["epg", "ram"])         # the quickest two of six
def test_it_learns(tmp_path, method):
    rivals.main(flags(method, tmp_path))
    log = (tmp_path / "metrics.jsonl").read_text()
    rewards = [float(number) for number in re.findall(r'"reward": ([^,]*)', log)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.01
