"""Tests of the studies: full size, overhead, evidence."""
import shutil
import warnings
from dataclasses import replace

import pytest
import torch

import rewards
import vgrpo
from extras import evidence_noise, evidence_runs, fullsize_count, fullsize_models
from extras import overhead, tiny_world

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)     # "slow"
SMALL = ["--iterations", "2", "--group-size", "3", "--steps", "3", "--n-mc", "2",
         "--eval-reward", "", "--reward", "incompressibility"]

def test_bytes_alive_are_counted():
    """A linear layer of n x n: its weights, input and output, gradients, in n x n numbers."""
    empty = fullsize_count.Empty()
    n, alive = 512, empty.alive
    unit = 4 * n * n
    with empty.tensors():
        layer = torch.nn.Linear(n, n, bias=False)
        assert alive.now == unit
        x = torch.randn(n, n)
        y = layer(x)
        view = y[:1]
        del y
        assert alive.now == 3 * unit                       # the view keeps it
        view.sum().backward()
        del view, x
    assert round(alive.now / unit, 1) == 2
    assert alive.peak > 3 * unit

@pytest.mark.slow
@pytest.mark.parametrize("model, transformer, text", [
    ("sd3.5-medium", 2243171520, 694659840),
    ("sd3.5-large", 8056627520, 694659840),
    ("flux.1-dev", 11901408320, 4762310656)])
def test_the_full_size_networks_have_their_numbers(model, transformer, text):
    cfg = vgrpo.parse_config(["--model", model])
    pipe = fullsize_models.build_pipeline(cfg, fullsize_count.Empty().make)
    for part, size in ((pipe.transformer, transformer), (pipe.text_encoder_2, text)):
        assert sum(p.numel() for p in part.parameters()) == size

@pytest.mark.slow
def test_operations_are_counted_from_config_files_alone(tmp_path):
    """They are those that an iteration of the real networks carries out."""
    tiny = vgrpo.MODELS["tiny"]
    weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(tiny, tmp_path / "tiny", ignore=weights)
    flags = [*SMALL, "--recipe", "tiny", "--prompts-per-iteration", "2", "--group-size", "2",
             "--micro-batch", "1", "--updates", "2", "--checkpointing", "--lora-rank", "2"]
    cfg = vgrpo.parse_config([*flags, "--model", tiny])
    policy, trainable = vgrpo.load_policy(cfg, torch.device("cpu"))
    learner = vgrpo.start_learner(policy, trainable, cfg)
    scorer = rewards.Rewards(cfg.reward)
    items = {0: {"prompt": "blue"}, 1: {"prompt": "red"}}
    with fullsize_count.operation_counter() as counter:
        vgrpo.run_iteration(learner, scorer, items, cfg, 1)
    counted = fullsize_count.count(replace(cfg, model=str(folder)))
    total = sum(counted.operations.values())
    assert total == pytest.approx(counter.get_total_flops(), rel=1e-6)

@pytest.mark.slow
def test_a_count_of_memory_follows_its_flags(monkeypatch):
    """An update needs less with fewer rows; text encoders that are away weigh nothing."""
    files = fullsize_models.KEPT["sd3.5-medium"]
    shallow = {**fullsize_models.LARGE, "num_layers": 2}
    monkeypatch.setitem(files, "transformer/config.json", shallow)
    model = ["--model", "sd3.5-medium", "--group-size", "2"]
    cfg = vgrpo.parse_config([*model, "--micro-batch", "2"])
    two = fullsize_count.count(cfg, text_layers=2)
    cfg = vgrpo.parse_config([*model, "--micro-batch", "1", "--offload"])
    one = fullsize_count.count(cfg, text_layers=2)
    less = {part: two.memory[part] - one.memory[part] for part in two.memory}
    assert less["text encoding"] == 0
    assert less["VAE"] == two.text
    assert less["update"] > two.text + 2 ** 29

def test_the_overhead_is_measured_against_the_loops_own_calls():
    """So are the calls of the loop whose network answers at once."""
    setting = overhead.Setting("--prompts-per-iteration", "2", "--group-size", "4", "--steps", "3",
                               "--micro-batch", "2", "--updates", "1")
    for work in (setting.iteration, setting.bare_calls, setting.loop):
        calls = setting.hear_calls(work)
        rows = {len(told["hidden_states"]) for told, _ in calls}
        assert rows == {4}                                 # 4 images, or 2 with 2 pairs each
        assert [trains for _, trains in calls] == 6 * [False] + 4 * [True]

def test_the_noise_is_that_of_the_loops_gradient():
    """Of -rho A, the mean over all images, at rho = 1: A times the gradient of L_hat."""
    flags = "--prompts-per-iteration 2 --group-size 4 --steps 3"
    noise = evidence_noise.Noise(1, *flags.split())
    cfg = replace(noise.cfg, share="both", n_mc=3)
    learner = noise.learner
    gradient, _ = noise.gradient(cfg, 5)
    for group in noise.groups:
        prompts = 4 * [group.item["prompt"]]
        R = tiny_world.shapes(group.images / 255, prompts, None)
        A = 3 * torch.tanh(vgrpo.group_advantages(R) / 3)
        rng = vgrpo.generator(cfg.seed, "pairs", 5, group.index)
        pairs = vgrpo.group_pairs(rng, group.conditions.grid, 3, (4, 8, 8), A)
        L, _ = vgrpo.estimate(learner.policy, group, slice(0, 4), pairs, cfg)
        (L * A / 8).sum().backward()
    grads = [p.grad.flatten() for p in learner.trainable.values()]
    expected = torch.cat(grads).double()
    assert (gradient - expected).norm() < 1e-4 * expected.norm()

def straight(slope):
    """A run whose reward rises by slope / 100 with each unit of cost, two of them a second."""
    costs = [0, 40, 80, 120]
    reward = [0.5 + slope * cost / 100 for cost in costs]
    return {"iteration": [0, 2, 4, 6], "cost": costs, "seconds": [cost / 2 for cost in costs],
            "reward": reward, "strict": reward, "as drawn": [1 - value for value in reward]}

def test_rivals_are_compared_at_what_they_reach(tmp_path, monkeypatch):
    """Trials choose two settings of a row; the seeds show which of them counts. Ours rises three
    times as fast as the rival on average."""
    E, ran = evidence_runs, []
    rival = "NFT" + E.BEST
    monkeypatch.setattr(E, "KEPT", tmp_path / "runs.json")
    rows = {E.OURS: ("", 20, 2), rival: ("--method nft", 20, 2)}
    monkeypatch.setattr(E, "RIVALS", rows)
    monkeypatch.setattr(E, "ROWS", rows)
    trial = {(E.OURS, "--lr 1e-4"): 0.2, (E.OURS, "--lr 2e-4"): 0.1,
             (rival, "--updates 2 --lr 1e-4"): 0.2, (rival, "--updates 4 --lr 4e-4"): 0.1}
    on_seeds = {(E.OURS, "--lr 1e-4"): (0.1, 0.1), (E.OURS, "--lr 2e-4"): (0.2, 0.4),
                (rival, "--updates 2 --lr 1e-4"): (0.1, 0.1),
                (rival, "--updates 4 --lr 4e-4"): (0.0, 0.1)}

    def run(world, name, setting, seed):
        ran.append((name, setting, seed))
        if seed == E.TUNED_ON:
            return straight(trial.get((name, setting), 0))
        return straight(on_seeds[name, setting][seed])
    monkeypatch.setattr(E, "run", run)
    E.compare("mini", "rivals")
    tried = [(name, setting, E.TUNED_ON) for name in rows for setting in E.settings("mini", name)]
    assert sorted(ran) == sorted(tried + [(*row, seed) for row in on_seeds for seed in (0, 1)])
    E.compare("mini", "rivals")                                 # goes on where it was stopped
    assert len(ran) == 3 + 9 + 4 * 2
    on_seeds[E.OURS, "--lr 4e-4"] = (0.9,)
    E.all_runs([("mini", E.OURS, "--lr 4e-4", 0)])              # on a single seed: does not count
    ours, nft = E.table("mini", "rivals")[2:]
    assert "| 2 | lr 2e-4 | 20 | 33 | 0.860 (0.740 to 0.980) | 0.860 | 0.140 |" in ours
    assert "| updates 2 lr 1e-4 | 20 | 100 | " in nft
    assert "0.620 (0.620 to 0.620)" in nft
    assert nft.endswith("| **0.33** (0.25 to 0.50) | 0.33 | 0.380 |")

def test_parts_run_at_the_middle_rate(tmp_path, monkeypatch):
    """Beside them the paper's method at that rate, though it ended higher at another."""
    E = evidence_runs
    monkeypatch.setattr(E, "KEPT", tmp_path / "runs.json")
    monkeypatch.setattr(E, "ASSETS", tmp_path)
    monkeypatch.setattr(E, "run", lambda world, name, setting, seed: straight(len(setting) / 100))
    E.compare("mini", "parts")
    rows = (E.ONE_UPDATE, E.ESTIMATOR, *E.PARTS)
    assert {(one["name"], one["setting"], one["seed"]) for one in E.load()} == {
        (name, "--lr 2e-4", seed) for name in rows for seed in range(E.ROWS[name][2])}
    before = E.table("mini", "parts")
    assert len(before) == 2 + len(rows)
    E.all_runs([("mini", E.ONE_UPDATE, "--lr 1.234e-4", seed) for seed in range(5)])
    assert E.table("mini", "parts") == before
    assert E.table("mini", "rivals") == []
    E.figure("mini", "parts")
    assert "nothing shared (3)" in (tmp_path / "parts-mini.svg").read_text()

def test_a_level_is_reached_between_evaluations():
    curve = straight(0.5)                      # .5, .7, .9, 1.1
    for level, cost in ((0.5, 0), (0.4, 0), (0.6, 20), (0.9, 80), (1.2, None)):
        assert evidence_runs.when(curve, level, "cost") == (cost and pytest.approx(cost))
    for value, drawn in ((0.8, 0.2), (1.0, 0.0)):
        assert evidence_runs.when(curve, value, "as drawn") == pytest.approx(drawn)
