"""Memory and operations of an iteration, counted without a GPU: see fullsize.py.

The networks are made of tensors that have a shape but no contents. The pipeline, the sampler and
vgrpo.py are real: a network hears with what arguments it is called, and answers ones in the right
shape. Afterwards each kind of call is carried out on tensors without contents, forward and, in the
update, backward, while the bytes of all tensors alive and the operations are counted.
"""
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

import vgrpo
from extras.fullsize_models import build_pipeline
from rewards import UsageError

PROMPT = "a photograph of an astronaut who rides a horse"
CPU = torch.device("cpu")


class Alive(TorchDispatchMode):
    """Bytes of the tensors' storages that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.see(output)
        return output

    def see(self, tree):
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata                          # views have their base's
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def attention_on_a_cpu(query, key, value, *args, **kwargs):
    return sdpa_flop_count(query, key, value)


def attention_backward_on_a_cpu(grad, query, key, value, *args, **kwargs):
    return sdpa_backward_flop_count(grad, query, key, value)


def operation_counter():
    """Counts the operations of matrix products, convolutions and attentions carried out."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {attention: attention_on_a_cpu, backward: attention_backward_on_a_cpu}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def widen(part):
    """module.float() by parameters that are new."""
    for module in part.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.float(), p.requires_grad))


class Empty:
    """Networks without contents, which hear their calls."""

    def __init__(self):
        self.fake, self.alive = FakeTensorMode(allow_non_fake_inputs=True), Alive()
        self.heard = []           # [(network, function, its arguments)]
        self.answers = {}

    @contextmanager
    def tensors(self):
        """Tensors made inside have no contents, and are counted."""
        with self.fake, self.alive:
            yield

    def make(self, name, create):
        with self.tensors():
            part = create()
        # What torch does in place, it cannot do to tensors without contents.
        part.to = lambda *args, **kwargs: part
        part.float = partial(widen, part)
        return part

    def empty(self, tree):
        return tree_map_only(torch.Tensor, self.fake.from_tensor, tree)

    def listen(self, module, name="forward"):
        """From now on a method of a network notes its arguments and answers ones."""
        function = getattr(module, name)

        @wraps(function)
        def answer(*args, **kwargs):
            self.heard.append((module, function, (args, kwargs)))
            shapes = tree_map_only(torch.Tensor, lambda x: x.shape, (args, kwargs))
            key = f"{id(function)} {shapes}"
            if key not in self.answers:
                args, kwargs = self.empty((args, kwargs))
                with torch.no_grad(), self.fake:
                    self.answers[key] = function(*args, **kwargs)
            return tree_map_only(
                torch.Tensor, lambda x: torch.ones(x.shape, dtype=x.dtype), self.answers[key])

        setattr(module, name, answer)

    def hear(self, work):
        """-> [(network, function, arguments)] of the calls in work(), and what work() gives"""
        self.heard = []
        result = work()
        return self.heard, result

    def carry_out(self, calls, backward=False):
        """Carry out heard calls, and in an update the way back, on tensors without contents."""
        for _, function, arguments in calls:
            args, kwargs = self.empty(arguments)
            self.alive.see((args, kwargs))
            with torch.set_grad_enabled(backward), self.tensors():
                output = function(*args, **kwargs)
                if backward:
                    output[0].float().square().mean().backward()
            del args, kwargs, output

    def memory(self, calls, backward=False):
        """-> the most bytes alive during these calls"""
        self.alive.peak = self.alive.now
        self.carry_out(calls, backward)
        return self.alive.peak

    def operations(self, calls, backward=False):
        with operation_counter() as counter:              # it keeps tensors alive
            self.carry_out(calls, backward)
        return counter.get_total_flops()


def load_empty(cfg, text_layers=None):
    """-> vgrpo.py's policy with a pipeline without contents, the trainable weights, an Empty"""
    empty = Empty()
    pipe = build_pipeline(cfg, empty.make, text_layers)
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and part:
            empty.listen(part)
    empty.listen(pipe.vae, "decode")
    prepare = vgrpo.prepare_transformer

    def prepare_empty(transformer, cfg, device):
        with empty.tensors():
            prepare(transformer, cfg, device)
        empty.listen(transformer)

    with (patch.object(vgrpo, "load_pipeline", lambda cfg: pipe),
          patch.object(vgrpo, "prepare_transformer", prepare_empty)):
        policy, trainable = vgrpo.load_policy(cfg, CPU)
    return policy, trainable, empty


@dataclass(frozen=True)
class Count:
    weights: int              # bytes of the networks' weights, Adam's moments and the average's
    text: int                 # bytes of the text encoders, which are among them
    memory: dict              # {part of an iteration: bytes at its peak}
    operations: dict          # {part of an iteration: operations in a whole iteration}


def count(cfg, text_layers=None):
    """Count an iteration on one GPU that computes all of it."""
    if cfg.shard:
        raise UsageError("--count: counts one GPU; add --no-shard, and --lora-rank 32 if it is "
                         "to be a LoRA")
    # A compiled block has the operations of an eager one. What is away is subtracted below.
    short = replace(cfg, steps=2, compile=False, offload=False)
    policy, trainable, empty = load_empty(short, text_layers)
    encoders = [part for name, part in policy.pipe.components.items()
                if name.startswith("text_encoder") and part]
    text = sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    moments = (2 + bool(cfg.ema)) * sum(p.nbytes for p in trainable.values())
    weights = empty.alive.now + moments

    images = min(cfg.group_size, (cfg.micro_batch or cfg.group_size) * cfg.n_mc)
    noise = [vgrpo.generator("count", image) for image in range(images)]
    trained = cfg.micro_batch or cfg.group_size
    calls = hear_iteration(policy, empty, noise, trained * cfg.n_mc)
    memory, once = {}, {}
    for part, heard in calls.items():
        away = text if cfg.offload and part != "text encoding" else 0
        memory[part] = empty.memory(heard, part == "update") + moments - away
        once[part] = empty.operations(heard, part == "update")

    total = cfg.prompts_per_iteration * cfg.group_size
    forward = empty.operations(calls["update"]) if cfg.updates > 1 else 0
    operations = {
        "text encoding": once["text encoding"] * cfg.prompts_per_iteration,
        "rollout": once["rollout"] / 2 / images * cfg.steps * total,
        "VAE": once["VAE"] / images * total,
        "theta_old": forward / trained * total * (1 - 1 / cfg.updates),
        "update": once["update"] / trained * total,
    }
    return Count(weights, text, memory, operations)


def hear_iteration(policy, empty, noise, rows):
    """-> {part of an iteration: its calls}: two steps of a rollout, an update of so many rows"""
    networks = policy.transformer, policy.pipe.vae
    heard, (_, o, c) = empty.hear(lambda: policy.generate(PROMPT, noise))
    kinds = [network for network, _, _ in heard]
    decoded = kinds.index(policy.pipe.vae)                # calls after it only ask for c
    parts = {
        "text encoding": [call for call, kind in zip(heard, kinds) if kind not in networks],
        "rollout": [call for call, kind in zip(heard[:decoded], kinds) if kind in networks],
        "VAE": heard[decoded:decoded + 1],
    }
    z, t = o[:1].expand(rows, *o.shape[1:]), c.grid[-1:].expand(rows)
    parts["update"], _ = empty.hear(lambda: policy.velocity(z, t, c))
    return parts
