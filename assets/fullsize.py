"""Does a model fit, and how fast does it train? Before anything is downloaded: full size, random weights.

    python assets/fullsize.py --model sd3.5-medium                  # on a GPU: the recipe, one prompt a rank
    python assets/fullsize.py --model sd3.5-medium --offload --micro-batch 1 --cap 24
    python assets/fullsize.py --model flux.1-dev --lora-rank 32 --no-shard --lr 3e-4 --cap 80
    python assets/fullsize.py --model sd3.5-medium --count          # memory, counted without a GPU
    python assets/fullsize.py --model sd3.5-medium --resolution 64 --group-size 3 --steps 2 --n-mc 2 \
        --micro-batch 1 --iterations 1 --text-layers 1              # on a CPU, in 8 GB

Takes vgrpo.py's flags. An iteration is vgrpo.improve(), whole, but for its reward, the mean brightness; after
one that is not counted, the medians of --iterations. The calls are the transformer's on the same inputs,
forward and, in the update, backward, and no more. --count runs each kind of call on tensors without contents
and adds up the bytes of all that is alive at once; what the allocator loses and kernels need comes on top.
"""
import argparse
import contextlib
import statistics
import sys
import time
import weakref
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import vgrpo  # noqa: E402, I001: first, since it quiets the libraries
import diffusers  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

PROMPT = "a photograph of an astronaut who rides a horse"


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def clip(kind, layers, width, **config):
    return kind(hf.CLIPTextConfig(
        vocab_size=49408, hidden_size=width, projection_dim=width, intermediate_size=4 * width,
        num_attention_heads=width // 64, num_hidden_layers=layers, **config))


def t5(layers):
    return hf.T5EncoderModel(hf.T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_heads=64,
                                         num_layers=layers, feed_forward_proj="gated-gelu"))


def build(cfg, device, encoders, network, text_layers):
    """The pipeline as its configuration on the hub says; weights are drawn in the context of their place."""
    torch.set_default_dtype(torch.bfloat16 if cfg.dtype == "bf16" else torch.float32)
    words = hf.CLIPTokenizer.from_pretrained(vgrpo.MODELS["tiny"], subfolder="tokenizer", model_max_length=77)
    with device:
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    if cfg.model == "flux.1-dev":
        with network:
            transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        with encoders:
            short, long = clip(hf.CLIPTextModel, min(12, text_layers), 768), t5(min(24, text_layers))
        torch.set_default_dtype(torch.float32)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return diffusers.FluxPipeline(scheduler, vae, short, words, long, words, transformer)
    layers, dual, places = {"sd3.5-medium": (24, range(13), 384), "sd3.5-large": (38, (), 192)}[cfg.model]
    with network:
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=128, in_channels=16, num_layers=layers, num_attention_heads=layers,
            caption_projection_dim=64 * layers, joint_attention_dim=4096, pooled_projection_dim=2048,
            pos_embed_max_size=places, qk_norm="rms_norm", dual_attention_layers=tuple(dual))
    with encoders:
        small = clip(hf.CLIPTextModelWithProjection, min(12, text_layers), 768)
        big = clip(hf.CLIPTextModelWithProjection, min(32, text_layers), 1280, hidden_act="gelu")
        long = t5(min(24, text_layers))
    torch.set_default_dtype(torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(
        transformer, scheduler, vae, small, words, big, words, long, words)


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
    """Operations per second of a large product in bf16."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, 20, device)


def counted(work):
    """Operations of the matrix products, convolutions and attentions that are carried out."""
    on_a_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
        work()
    return counter.get_total_flops()


def fingerprint(module):
    return [p.double().sum().item() for p in module.parameters() if not p.requires_grad]


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def inputs(model, rows, side, dtype):
    """What a transformer is told, by shape."""
    def given(*shape):
        return torch.rand(rows, *shape, dtype=dtype)
    if model == "flux.1-dev":
        return dict(hidden_states=given((side // 16) ** 2, 64), encoder_hidden_states=given(512, 4096),
                    pooled_projections=given(768), timestep=given(), guidance=given(),
                    img_ids=torch.zeros((side // 16) ** 2, 3), txt_ids=torch.zeros(512, 3))
    return dict(hidden_states=given(16, side // 8, side // 8), encoder_hidden_states=given(333, 4096),
                pooled_projections=given(2048), timestep=given())


def count(cfg, text_layers):
    """Print GB of each part of an iteration with a LoRA on one GPU."""
    if not cfg.lora_rank or cfg.shard:
        raise SystemExit("--count: a LoRA on one GPU, --lora-rank 32 --no-shard")
    fake, alive, cpu = FakeTensorMode(allow_non_fake_inputs=True), Alive(), torch.device("cpu")

    @contextlib.contextmanager
    def empty():
        with fake, alive:
            yield

    pipe = build(cfg, empty(), empty(), empty(), text_layers)
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    text = sum(p.nbytes for encoder in encoders for p in encoder.parameters())
    transformer, vae = pipe.transformer.requires_grad_(False), pipe.vae.requires_grad_(False)
    if cfg.checkpointing:
        transformer.enable_gradient_checkpointing()
    rows, dtype = (cfg.micro_batch or cfg.group_size) * cfg.n_mc, transformer.dtype
    told = partial(inputs, cfg.model, rows, cfg.resolution or 1024, dtype)
    latent = torch.Size([1, 16, (cfg.resolution or 1024) // 8, (cfg.resolution or 1024) // 8])

    def update():
        transformer(**told())[0].float().square().mean().backward()

    parts = {"encode": torch.no_grad()(lambda: encoders[-1](torch.zeros(1, 512, dtype=torch.long))),
             "rollout": torch.no_grad()(lambda: transformer(**told())),
             "decode": torch.no_grad()(lambda: vae.decode(torch.rand(latent, dtype=dtype))),
             "update": update}
    with empty():
        vgrpo.add_lora(transformer, cfg, cpu)
        moments = 3 * sum(p.nbytes for p in transformer.parameters() if p.requires_grad)     # Adam's and EMA
        print(f"{cfg.model} in {cfg.dtype}, {rows} rows a call: {(alive.now + moments) / 2 ** 30:.1f} GB of "
              f"weights and moments, {text / 2 ** 30:.1f} of them text encoders")
        for name, work in parts.items():
            alive.peak = alive.now
            work()
            away = text if cfg.offload and name != "encode" else 0
            print(f"{name}: {(alive.peak + moments - away) / 2 ** 30:.1f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--cap", type=float, default=0, help="GB (2^30) of the GPU's memory that may be used")
    parser.add_argument("--count", action="store_true", help="count the memory of a call of each kind")
    parser.add_argument("--text-layers", type=int, default=99, help="depth of the text encoders, at most")
    args, flags = parser.parse_known_args()
    rank, ranks, device = vgrpo.start_ranks()
    cfg = vgrpo.parse_config([
        "--model", "sd3.5-medium", "--reward", f"{__file__}:brightness", "--iterations", "3",
        "--updates", "1", "--prompts-per-iteration", str(ranks), *flags])
    if args.count:
        return count(cfg, args.text_layers)
    if args.cap and device.type != "cuda":
        raise SystemExit("--cap: there is no GPU here")
    if args.cap:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap * 2 ** 30 / total)
    rate, cpu = matrix_rate(device), torch.device("cpu")
    pipe = build(cfg, device, cpu if cfg.offload else device, cpu if cfg.shard else device,
                 args.text_layers)
    diffusers.DiffusionPipeline.load_config = lambda name: {}
    diffusers.DiffusionPipeline.from_pretrained = lambda name, **options: pipe
    policy, trainable = vgrpo.load_policy(cfg, device)
    optimizer, ema, _ = vgrpo.restore(trainable, None, 0, cfg)
    params, scorer = [*trainable.values()], vgrpo.Rewards(cfg.reward, device)
    items = {i: {"prompt": PROMPT} for i in vgrpo.layout(cfg.prompts_per_iteration, cfg.updates, rank, ranks)}
    frozen, calls = fingerprint(policy.transformer), {"rollout": {}, "update": {}}

    def hear(module, args, kwargs):                                # a call of each size, and their number
        known, rows = calls["update" if torch.is_grad_enabled() else "rollout"], len(kwargs["hidden_states"])
        known[rows] = kwargs, known.get(rows, (0, 0))[1] + 1

    def iteration():
        return vgrpo.improve(policy, params, optimizer, ema, scorer, items, cfg, 1)

    def call(part, kwargs):
        with torch.set_grad_enabled(part == "update"):
            output = policy.transformer(**kwargs)[0]
        if part == "update":
            output.backward(output)
            optimizer.zero_grad()

    with policy.transformer.register_forward_pre_hook(hear, with_kwargs=True):
        iteration()
    if fingerprint(policy.transformer) != frozen:
        raise SystemExit("frozen weights have changed")
    lines = [iteration() for _ in range(cfg.iterations)]
    size, trained = (sum(p.numel() for p in ps) for ps in (policy.transformer.parameters(), params))
    gpu = device.type == "cuda"
    card = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    report = [f"{cfg.model} in {cfg.dtype}: {size / 1e9:.3f} G numbers, of which {trained / 1e6:.1f} M train "
              f"in {len(params)} tensors",
              f"{card}: {rate / 1e12:.2f} T operations/s in a bf16 matrix product"]
    alone = {}
    for part, known in calls.items():
        spent, work, alone[part] = statistics.median(line[f"seconds_{part}"] for line in lines), 0, 0
        for rows, (kwargs, times) in known.items():
            one = seconds(partial(call, part, kwargs), cfg.iterations, device)
            operations = counted(partial(call, part, kwargs))
            work, alone[part] = work + times * operations, alone[part] + times * one
            report += [f"  {times} calls of {rows} rows: {operations / 1e12:.2f} T operations in {one:.3f} s"]
        report += [f"{part} {spent:.2f} s at {work / spent / rate:.2f} of the product's rate; its calls "
                   f"{alone[part]:.2f} s at {work / alone[part] / rate:.2f}"]
    whole = cfg.prompts_per_iteration * cfg.group_size / statistics.median(
        line["samples_per_second"] for line in lines)
    report += [f"iteration {whole:.2f} s, {whole / sum(alone.values()):.3f} of its calls; "
               f"{cfg.prompts_per_iteration * cfg.group_size / whole:.3f} images/s; peak memory "
               f"{lines[-1]['peak_memory_gb']:.1f} GB a rank"]
    if vgrpo.MAIN:
        print("\n".join(report))
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
