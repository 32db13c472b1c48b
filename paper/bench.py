"""Time, memory and FLOPs of training and sampling at CogVideoX-5B's real size, with random weights, against stock
diffusers and peft: nothing is downloaded.

    python -m paper.bench --json bench.json          # on one 80 GB GPU: everything below, measured
    python -m paper.bench --count True               # without a GPU: FLOPs, bytes moved and memory, counted
    python -m paper.bench --layers 1 --heads 4 --height 32 --width 48 --frames 9 --repeats 2     # anywhere: a try

The arms of an experiment take turns, one micro-batch each (forward, recomputation, backward): stock (LoRA in float32
under autocast, everything recomputed), stock once more (what differs there is noise), ours with all levers off, with
each alone, and with all. "hours" are those of the paper's 3,200 image steps or 800 video steps, without the loader, T5
and the VAE, as with --cache. MFU counts the FLOPs without recomputation, HFU those really done, both as a share of a
matrix product's speed in that run. Then the rest of a step, the VAE and a sample; --json is written after each part.
"""
import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.normalization import CogVideoXLayerNormZero
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import gradcos
import model
from common.args import command_line, knob, use_device
from common.base import attention_order, autocast, compute_dtype, tile_vae
from common.log import Moment
from common.media import clip_frames, latent_frames
from common.run import save_checkpoint, write
from common.setup import compile_blocks
from model import SubjectTransformer, add_lora, encode_moments, save_lora, v_loss


@dataclass(frozen=True)
class Config:
    layers: int = knob(42, "transformer blocks")
    heads: int = knob(48, "attention heads, of width 64")
    height: int = knob(480, "frame height in pixels")
    width: int = knob(720, "frame width in pixels")
    frames: int = knob(49, "frames of a clip")
    rank: int = knob(128, "LoRA rank")
    image_micro: int = knob(1, "image pairs per micro-batch")
    video_micro: int = knob(1, "clips per micro-batch")
    warmup: int = knob(4, "image micro-batches of each arm before the clock starts; of clips a quarter")
    repeats: int = knob(20, "image micro-batches of each arm that are timed; of clips a quarter")
    steps: int = knob(50, "denoising steps of the sample")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    count: bool = knob(False, "count FLOPs, bytes and memory at this size instead of measuring")
    json: str = knob("", "file to write everything to, for a program")


@dataclass(frozen=True)
class Arm:
    stock: bool = False
    image: str = "full"    # checkpointing
    video: str = "full"
    rounded: bool = False  # LoRA inputs in the compute dtype
    order: bool = False    # cuDNN's attention first
    compile: bool = False
    kept: float = 1.0      # share of the reference's tokens, the rest is dropped (not in stock)


ARMS = {"stock": Arm(stock=True), "stock again": Arm(stock=True), "no lever": Arm(),
        "checkpointing": Arm(image="none", video="attention"), "LoRA inputs": Arm(rounded=True),
        "attention order": Arm(order=True), "compile": Arm(compile=True),
        "all but compile": Arm(image="none", video="attention", rounded=True, order=True),
        "all": Arm(image="none", video="attention", rounded=True, order=True, compile=True)}
COUNTED = ["stock", "no lever", "checkpointing", "LoRA inputs", "all but compile"]  # the others change no count


# ---- the models ------------------------------------------------------------------------------------------------------

def shapes(cfg):
    """{task: (samples, latent frames)} of the two micro-batches."""
    return {"image": (cfg.image_micro, 1), "video": (cfg.video_micro, latent_frames(clip_frames(cfg.frames)))}


def transformer_5b(layers=42, heads=48, kind=SubjectTransformer):
    """CogVideoX-5B's transformer, or its first layers, on the meta device. The rest of its config is the default."""
    with torch.device("meta"):
        return kind(num_attention_heads=heads, num_layers=layers, use_rotary_positional_embeddings=True)


def scheduler_5b():
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing",
                                  rescale_betas_zero_snr=True, snr_shift_scale=1.0)


def build(cfg, device, dtype, random=True):
    """(ours, stock, LoRA parameters): CogVideoX-5B in our class, and in the stock one on the same weights."""
    ours = transformer_5b(cfg.layers, cfg.heads).to(dtype).to_empty(device=device)
    for parameter in ours.parameters() if random else []:
        torch.nn.init.normal_(parameter, std=0.02)
    parameters = add_lora(ours.train(), cfg.rank, cfg.rank / 2, dropout=0.1)
    stock = transformer_5b(cfg.layers, cfg.heads, CogVideoXTransformer3DModel).train()
    stock.add_adapter(ours.peft_config["default"])
    stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    stock.enable_gradient_checkpointing()

    def called_as_ours(noisy, text, timestep, reference, keep, first_frame, return_dict):
        """The reference is one frame more, and its output is thrown away."""
        rope = ours.rotary_tables(noisy.shape[1] + 1, *noisy.shape[-2:], noisy.device)
        frames = torch.cat([reference.to(noisy), noisy], dim=1)
        return (stock(frames, text, timestep, image_rotary_emb=rope, return_dict=False)[0][:, 1:],)
    return ours, called_as_ours, parameters


def use(arm, task, ours, stock):
    """Switch the levers of this arm on for this task and the others off; returns what to call as the transformer."""
    ours.checkpointing = arm.image if task == "image" else arm.video
    ours.__dict__.pop("run_block", None)
    if arm.compile:
        compile_blocks(ours)
    for module in ours.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = not arm.rounded
        elif isinstance(module, CogVideoXLayerNormZero):
            module._forward_hooks.clear()
            if arm.rounded:
                module.register_forward_hook(model._round_once)
    return stock if arm.stock else ours


def random_inputs(cfg, task, device, dtype):
    """What v_loss takes, but for the transformer and the scheduler."""
    samples, frames = shapes(cfg)[task]
    latents = torch.randn(samples, frames, 16, cfg.height // 8, cfg.width // 8, device=device)
    return dict(latents=latents, text=torch.randn(samples, 226, 4096, device=device, dtype=dtype),
                timestep=torch.randint(1000, (samples,), device=device), noise=torch.randn_like(latents),
                reference=torch.randn_like(latents[:, :1]))


def table(rows):
    """Print dicts that have the same keys as a table in Markdown; returns them."""
    for cells in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print("|", " | ".join(f"{cell:,.3f}" if isinstance(cell, float) else str(cell) for cell in cells), "|")
    print()
    return rows


def save(cfg, results):
    if cfg.json:
        write(Path(cfg.json), json.dumps(results, indent=1) + "\n")


# ---- counting --------------------------------------------------------------------------------------------------------

class Counter(TorchDispatchMode):
    """Counts FLOPs, bytes that operations read and write, and the bytes that are alive at the fullest moment."""

    def __init__(self):
        super().__init__()
        self.flops = self.moved = self.peak = 0
        self.storages = WeakIdKeyDictionary()  # those that were made under this counter and are alive: their bytes

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
                           for tree in ((args, kwargs), out))
        if op._overloadpacket in flop_registry:
            self.flops += flop_registry[op._overloadpacket](*args, **kwargs, out_val=out)
        read = {x.untyped_storage()._cdata for x in inputs}
        view = any(value.alias_info for value in op._schema.returns)  # of a tensor, or the tensor itself
        fresh = [x for x in outputs if not view and x.untyped_storage()._cdata not in read]
        if (fresh or op._schema.is_mutable) and "empty" not in op.name():  # else nothing moves
            self.moved += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in inputs + outputs)
        for x in fresh:
            self.storages[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.storages.values()))
        return out


@contextmanager
def as_on_a_gpu():
    """Let fake tensors on a CPU go the way of CUDA under autocast: norms in float32, fused dropout, FlashAttention."""
    norm, flash = F.layer_norm, torch.ops.aten._scaled_dot_product_flash_attention
    functions = dict(
        layer_norm=lambda x, shape, w, b, eps: norm(x.float(), shape, w.float(), b.float(), eps),
        dropout=lambda x, p, training, inplace: torch.native_dropout(x, p, True)[0] if training and p else x,
        scaled_dot_product_attention=lambda q, k, v, **_: flash(q.bfloat16(), k.bfloat16(), v.bfloat16())[0])
    # Checkpointing keeps the state of the random generator: that is no fake tensor.
    no_state = dict(get_rng_state=lambda: None, set_rng_state=lambda state: None)
    with patch.multiple(F, **functions), patch.multiple(torch, **no_state):
        yield


def count_layers(cfg, task, arm):
    """TFLOP, GB moved, and GB of activations at the fullest, of one micro-batch. Gradients exist already, as in DDP's
    buckets."""
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    ours, stock, parameters = build(cfg, cpu, bf16, random=False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    transformer, scheduler = use(arm, task, ours, stock), scheduler_5b()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
        inputs = random_inputs(cfg, task, cpu, bf16)
        if arm.kept < 1:
            inputs["keep"] = torch.arange(round(arm.kept * cfg.height * cfg.width / 256))
        with Counter() as counter:
            with torch.autocast("cpu", bf16):
                loss = v_loss(transformer, scheduler, **inputs).mean()
            loss.backward()
    return np.array([counter.flops / 1e3, counter.moved, counter.peak]) / 1e9


@lru_cache
def count(cfg, task, arm):
    """TFLOP and GB at the fullest of all layers, extrapolated from 1 and 2 blocks; GB moved in one block."""
    one, two = (count_layers(replace(cfg, layers=layers), task, arm) for layers in (1, 2))
    tflop, _, peak = (one + (cfg.layers - 1) * (two - one)).tolist()
    return {"tflop": tflop, "gb_moved_per_block": (two - one).tolist()[1], "gb_peak": peak}


# Flags of train.py for a GPU of so many GB; t5: T5 is on the GPU, too
FITS = [dict(gpu=80, image_micro=1, image="none", video_micro=1, video="attention", int8=False, rank=128, t5=True),
        dict(gpu=80, image_micro=8, image="attention", video_micro=2, video="attention", int8=False, rank=128, t5=True),
        dict(gpu=48, image_micro=4, image="attention", video_micro=1, video="full", int8=False, rank=128, t5=True),
        dict(gpu=24, image_micro=1, image="full", video_micro=1, video="full", int8=True, rank=64, t5=False)]


def count_memory(cfg):
    """GB of a rank of several: base, LoRA with gradients (in DDP's buckets) and AdamW, activations, T5 and the VAE."""
    rows = []
    for fit in FITS:
        whole = transformer_5b(cfg.layers, cfg.heads)
        base = sum(p.numel() for p in whole.parameters()) * (1 if fit["int8"] else 2) / 1e9
        lora = sum(p.numel() for p in add_lora(whole, fit["rank"], fit["rank"] / 2)) * 16 / 1e9
        size = replace(cfg, **{k: fit[k] for k in ("image_micro", "video_micro", "rank")})
        arm = Arm(image=fit["image"], video=fit["video"], rounded=True)
        step = {task: round(count(size, task, arm)["gb_peak"], 3) for task in shapes(cfg)}
        gb = base + lora + (9.9 if fit["t5"] else 0.4) + max(step.values())
        rows.append({**fit, "base": base, "lora": lora, "gb_of_a_step": step, "gb": gb})
    print("GB of a rank, T5-XXL and the VAE (9.9) with them; NOTES says what comes on top:")
    return table(rows)


def count_cost(cfg, p=0.2, steps=4000):
    """Eq. 3, and what the paper's 288 A100-hours (Table 1) say of the speed of its training: all is recomputed."""
    def tflop(task, kept=1.0):
        return count(cfg, task, Arm(kept=kept))["tflop"] / shapes(cfg)[task][0]
    image, video = tflop("image"), tflop("video")
    ratios = {"the paper: 13 latent frames, attention among video tokens only, 13^2": 169,
              f"counted per sample: {image:.1f} and {video:.1f} TFLOP": video / image,
              "counted per step: 256 pairs, 32 clips": 32 * video / (256 * image)}
    table([{"": name, "C_vid / C_img": ratio, "E[C] / C_img at p = 0.2 (Eq. 3)": 1 - p + p * ratio}
           for name, ratio in ratios.items()])
    fewer = (image + tflop("image", kept=0.0)) / 2, tflop("video", kept=0.5)  # A.2: both drops are 0.5
    for name, image, video in (("all tokens", image, video), ("what view drop and token drop leave", *fewer)):
        flop = steps * ((1 - p) * 256 * image + p * 32 * video) * 1e12
        hours = flop / 312e12 / 3600
        print(f"{steps} steps of {name}: {flop:.2e} FLOP = {hours:.0f} A100-hours at peak, so the paper's 288 mean "
              f"{hours / 288:.0%} of it")


# ---- measuring -------------------------------------------------------------------------------------------------------

def timed(work, device):
    """(seconds of one call, its peak memory in GB: 0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = Moment(device)
    work()
    return Moment(device).seconds_since(started), torch.cuda.max_memory_allocated() / 1e9


def summary(times):
    """Of [(seconds, GB), ...]: the median, the 10th and 90th percentile, and the peak."""
    low, median, high = np.percentile([seconds for seconds, _ in times], [10, 50, 90])
    return {"seconds": median, "p10": low, "p90": high, "peak_gb": max(gb for _, gb in times)}


def measure_steps(cfg, device, ours, stock):
    """{task: {arm: its times, memory, speed, and hours for the paper's steps}}: the arms take turns."""
    scheduler, results, side = scheduler_5b(), {}, 8192 if device.type == "cuda" else 1024
    pair = torch.randn(2, side, side, device=device, dtype=compute_dtype(device))
    product = summary([timed(partial(torch.matmul, *pair), device) for _ in range(20)][5:])["seconds"]
    ceiling = 2 * side**3 / 1e12 / product  # TFLOP/s of a large matrix product: what the device can do
    del pair  # else the arms' peak memory would hold them
    arms = {name: arm for name, arm in ARMS.items() if device.type == "cuda" or not arm.compile}  # minutes on a CPU

    def micro_batch(transformer, inputs):
        with autocast(device):
            loss = v_loss(transformer, scheduler, **inputs).mean()
        loss.backward()
    for task, part, samples in (("image", 1, 3200 * 256), ("video", 4, 800 * 32)):
        inputs = random_inputs(cfg, task, device, compute_dtype(device))
        times, turns = {name: [] for name in arms}, max(1, cfg.repeats // part)
        for _ in range(cfg.warmup // part + turns):
            for name, arm in arms.items():
                work = partial(micro_batch, use(arm, task, ours, stock), inputs)
                with attention_order(device) if arm.order else nullcontext():
                    times[name].append(timed(work, device))
        results[task] = {name: summary(times[name][-turns:]) for name in arms}
        useful = count(cfg, task, Arm(image="none", video="none"))["tflop"]  # without recomputation
        for name, row in results[task].items():
            done = count(cfg, task, replace(arms[name], compile=False))["tflop"]
            row["tflop_per_s"] = done / row["seconds"]
            row["mfu"], row["hfu"] = (tflop / row["seconds"] / ceiling for tflop in (useful, done))
            row["hours"] = samples / shapes(cfg)[task][0] * row["seconds"] / 3600
    return results


def rest_of_a_step(cfg, device, ours, parameters):
    """Yields (what, work, calls): clipping and AdamW, as in train.py; PCGrad, a checkpoint, gradcos."""
    optimizer, pcgrad, scheduler = torch.optim.AdamW(parameters, fused=True), gradcos.PCGrad(4), scheduler_5b()
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    use(ARMS["all but compile"], "video", ours, None)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def checkpoint():
        with TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), 1, lambda part: save_lora(ours, part), {"optimizer": optimizer})

    def losses_of(task):
        with autocast(device):
            yield v_loss(ours, scheduler, **random_inputs(cfg, task, device, compute_dtype(device))).sum()
    yield "optimiser step, fused", step, 3
    yield "PCGrad, two calls", lambda: [pcgrad(parameters, task) for task in ("image", "video")], 3
    yield "a checkpoint", checkpoint, 3
    yield "gradcos, a pair and a clip", lambda: gradcos.measure(losses_of, parameters), 3
    optimizer.zero_grad()


def sampling(cfg, device, ours):
    """Yields (what, work, calls): the VAE on pictures and a clip as train.py encodes them, and on latents of a clip.
    Then a video with guidance, all levers on: LoRA merged, blocks compiled (in a warm-up of two steps)."""
    dtype, on_gpu = compute_dtype(device), device.type == "cuda"
    small = {} if on_gpu else dict(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2)
    vae = AutoencoderKLCogVideoX(**small).to(device, dtype).eval().requires_grad_(False)
    pictures, clip = (torch.randn(samples, frames, 3, cfg.height, cfg.width, device=device)
                      for samples, frames in ((16, 1), (1, clip_frames(cfg.frames))))
    inputs = random_inputs(replace(cfg, video_micro=1), "video", device, dtype)
    latents = inputs["latents"].to(dtype).transpose(1, 2)
    yield "VAE: 16 pictures, whole", lambda: encode_moments(vae, pictures), 3
    yield "VAE: decoding a clip, whole", lambda: vae.decode(latents), 3
    tile_vae(vae)
    yield "VAE: a clip, tiled", lambda: encode_moments(vae, clip), 3
    vae.disable_tiling()
    ours.requires_grad_(False).eval()
    ours.fuse_lora()
    ours.unload_lora()
    if on_gpu:
        compile_blocks(ours)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=ours, scheduler=scheduler_5b())
    pipe.set_progress_bar_config(disable=True)

    def sample(steps=cfg.steps):
        with attention_order(device):
            pipe(prompt_embeds=inputs["text"], negative_prompt_embeds=-inputs["text"], height=cfg.height,
                 width=cfg.width, guidance_scale=6.0, num_frames=clip_frames(cfg.frames), num_inference_steps=steps,
                 attention_kwargs={"reference": inputs["reference"]})
    sample(2)
    yield f"a sample of {cfg.steps} steps", sample, 1


def measure(cfg):
    """Everything, in parts. What is measured so far stays in --json, whatever happens to the rest."""
    device = use_device(cfg.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, peft)}
    on = {**asdict(cfg), "device": name, **versions}
    print(", ".join(f"{k} {v}" for k, v in on.items()))
    ours, stock, parameters = build(cfg, device, compute_dtype(device))
    steps, rest = measure_steps(cfg, device, ours, stock), {}
    results = {"on": on, "steps": steps, "rest": rest}
    table([{"task": task, "arm": name, **row} for task, arms in steps.items() for name, row in arms.items()])
    save(cfg, results)
    del stock
    for parts in (rest_of_a_step(cfg, device, ours, parameters), sampling(cfg, device, ours)):
        for what, work, calls in parts:
            times = [timed(work, device) for _ in range(calls)]
            rest[what] = summary(times[calls // 2:])  # the first half warms up
            save(cfg, results)
    table([{"what": what, **row} for what, row in rest.items()])


def main(cfg):
    diffusers.utils.logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    if not cfg.count:
        return measure(cfg)
    print("GB and TFLOP per sample:")
    levers = table([{"task": task, "arm": name, **{k: v / samples for k, v in count(cfg, task, ARMS[name]).items()}}
                    for task, (samples, _) in shapes(cfg).items() for name in COUNTED])
    results = {"counted": levers, "fits": count_memory(cfg)}
    count_cost(cfg)
    save(cfg, results)


if __name__ == "__main__":
    command_line(main, Config, __doc__)
