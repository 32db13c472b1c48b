"""Time, memory and FLOPs of training and sampling at CogVideoX-5B's real size, with random weights, against stock
diffusers and peft: nothing is downloaded.

    python -m paper.bench --json bench.json          # on one 80 GB GPU: everything below, measured
    python -m paper.bench --count True               # without a GPU: FLOPs, bytes moved and memory, counted
    python -m paper.bench --layers 1 --heads 4 --height 32 --width 48 --frames 9 --repeats 2     # anywhere: a try

The arms of an experiment take turns, one micro-batch each (forward, recomputation, backward): stock (LoRA in float32
under autocast, everything recomputed), stock once more (what differs there is noise), ours with all levers off, with
each alone, and with all. Then the optimiser step, the VAE, a sample, a checkpoint, one gradcos measurement and one
PCGrad call; --json is written after each part. Hours leave out the loader, T5 and the VAE, as with --cache. MFU counts
the FLOPs without recomputation, HFU those really done, both as a share of a matrix product's speed in the same run.
"""
import json
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import peft
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.utils import logging as diffusers_logging
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import gradcos
import model
from common.args import command_line, knob
from common.base import attention_order, autocast, compute_dtype, find_device, follow_autocast, tile_vae
from common.log import Moment
from common.media import clip_frames
from model import SubjectTransformer, add_lora, encode_moments, save_lora, v_loss
from common.run import records, save_checkpoint, write


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
    int8: bool = knob(False, "the frozen base in 8 bits (torchao); without the stock arms")
    warmup: int = knob(4, "image micro-batches of each arm before the clock starts; of clips a quarter")
    repeats: int = knob(20, "image micro-batches of each arm that are timed; of clips a quarter")
    pictures: int = knob(16, "pictures that the VAE encodes")
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


ARMS = {"stock": Arm(stock=True), "stock again": Arm(stock=True), "no lever": Arm(),
        "checkpointing": Arm(image="none", video="attention"), "LoRA inputs": Arm(rounded=True),
        "attention order": Arm(order=True), "compile": Arm(compile=True),
        "all but compile": Arm(image="none", video="attention", rounded=True, order=True),
        "all": Arm(image="none", video="attention", rounded=True, order=True, compile=True)}
COUNTED = ["stock", "no lever", "checkpointing", "LoRA inputs", "all but compile"]  # the others cannot be counted


# ---- the models ------------------------------------------------------------------------------------------------------

def shapes(cfg):
    """{task: (samples, latent frames)} of the two micro-batches, and the tokens of a frame. No token is dropped."""
    frames = (clip_frames(cfg.frames) - 1) // 4 + 1
    return {"image": (cfg.image_micro, 1), "video": (cfg.video_micro, frames)}, cfg.height // 16 * (cfg.width // 16)


def transformer_5b(layers, kind=SubjectTransformer, heads=48):
    """CogVideoX-5B's transformer, or its first layers, on the meta device."""
    with torch.device("meta"):
        return kind(
            num_attention_heads=heads, num_layers=layers, time_embed_dim=512, text_embed_dim=4096, sample_width=90,
            sample_height=60, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False)


def scheduler_5b(device):
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return scheduler


def build(cfg, layers, device, dtype, random=True):
    """(ours, stock, LoRA parameters): CogVideoX-5B in our class and in the stock one, on the same weights."""
    ours = transformer_5b(layers, heads=cfg.heads).to(dtype).to_empty(device=device)
    for parameter in ours.parameters() if random else []:
        nn.init.normal_(parameter, std=0.02)
    if cfg.int8 and random:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(ours.transformer_blocks, Int8WeightOnlyConfig())
        follow_autocast(ours.transformer_blocks)
    parameters = add_lora(ours.train(), cfg.rank, cfg.rank / 2, dropout=0.1)
    stock = transformer_5b(layers, CogVideoXTransformer3DModel, cfg.heads).train()
    stock.add_adapter(ours.peft_config["default"])
    stock.load_state_dict(ours.state_dict(keep_vars=True), assign=True)
    stock.enable_gradient_checkpointing()
    return ours, stock, parameters


def as_stock(stock, rotary_tables):
    """The stock transformer under our call: the reference is one frame more, and its output is thrown away."""
    def forward(noisy, text, timestep, reference, keep, first_frame, return_dict):
        rope = rotary_tables(noisy.shape[1] + 1, *noisy.shape[-2:], noisy.device)
        frames = torch.cat([reference.to(noisy), noisy], dim=1)
        return (stock(frames, text, timestep, image_rotary_emb=rope, return_dict=False)[0][:, 1:],)
    return forward


def use(arm, task, ours, stock):
    """Switch the levers of this arm on for this task and the others off; returns what to call as the transformer."""
    ours.checkpointing = arm.image if task == "image" else arm.video
    ours.__dict__.pop("run_block", None)
    if arm.compile:
        ours.compile_blocks()
    for module in ours.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = not arm.rounded
        elif isinstance(module, CogVideoXLayerNormZero):
            module._forward_hooks.clear()
            if arm.rounded:
                module.register_forward_hook(model._round_once)
    return as_stock(stock, ours.rotary_tables) if arm.stock else ours


def random_inputs(cfg, samples, frames, device):
    """What v_loss takes, but for the transformer and the scheduler."""
    latents = torch.randn(samples, frames, 16, cfg.height // 8, cfg.width // 8, device=device)
    text = torch.randn(samples, 226, 4096, device=device, dtype=compute_dtype(device))
    return dict(latents=latents, text=text, timestep=torch.randint(1000, (samples,), device=device),
                noise=torch.randn_like(latents), reference=torch.randn_like(latents[:, :1]))


# ---- counting --------------------------------------------------------------------------------------------------------

class Counter(TorchDispatchMode):
    """Counts FLOPs, bytes that operations read and write, and the bytes that are alive at the fullest moment."""

    def __init__(self):
        super().__init__()
        self.flops = self.moved = self.alive = self.kept = self.peak = 0  # kept: set between forward and backward
        self.known, self.attention = {}, set()  # attention: the names of its operations

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        inputs, outputs = ([x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]
                           for tree in ((args, kwargs), out))
        if "scaled_dot_product" in op.name() and "backward" not in op.name():
            self.attention.add(op._overloadpacket.__name__)
        if op._overloadpacket in flop_registry:
            self.flops += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        read = {x.untyped_storage()._cdata for x in inputs}
        view = any(value.alias_info for value in op._schema.returns)  # of a tensor, or the tensor itself
        fresh = [x for x in outputs if not view and x.untyped_storage()._cdata not in read]
        if (fresh or op._schema.is_mutable) and "empty" not in op.name():  # else nothing moves
            self.moved += sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in inputs + outputs)
        for x in fresh:
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                size = self.known[storage._cdata] = storage.nbytes()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.free, storage._cdata, size)
        return out

    def free(self, address, size):
        self.alive -= size
        self.known.pop(address, None)


def as_on_a_gpu(stack):
    """Let fake tensors on a CPU go the way of CUDA under autocast: norms in float32, fused dropout, FlashAttention."""
    norm = F.layer_norm

    def full_norm(x, shape, weight=None, bias=None, eps=1e-5):
        weight, bias = (w if w is None else w.float() for w in (weight, bias))
        return norm(x.float(), shape, weight, bias, eps)

    def flash(q, k, v, **_):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.native_dropout(x, p, True)[0] if training and p else x
    for name, function in (("layer_norm", full_norm), ("scaled_dot_product_attention", flash), ("dropout", dropout)):
        stack.enter_context(patch.object(F, name, function))
    # Checkpointing keeps the state of the random generator: that is no fake tensor.
    stack.enter_context(patch.object(torch, "get_rng_state", lambda: None))
    stack.enter_context(patch.object(torch, "set_rng_state", lambda state: None))


def count_layers(cfg, task, arm, layers):
    """The Counter of one micro-batch of a model of so many blocks; gradients exist already, as in DDP's buckets."""
    samples, frames = shapes(cfg)[0][task]
    counter = Counter()
    with ExitStack() as stack:
        stack.callback(model._rotary_tables.cache_clear)  # fake tables must not stay in the cache
        model._rotary_tables.cache_clear()
        ours, stock, parameters = build(cfg, layers, torch.device("cpu"), torch.bfloat16, random=False)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        transformer = use(arm, task, ours, stock)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        as_on_a_gpu(stack)
        inputs = random_inputs(cfg, samples, frames, torch.device("cpu"))
        inputs["text"] = inputs["text"].bfloat16()
        scheduler = scheduler_5b("cpu")
        with counter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = v_loss(transformer, scheduler, **inputs).mean()
            counter.kept = counter.alive
            loss.backward()
    return counter


@lru_cache
def count(cfg, task, arm):
    """{"tflop", "gb_moved", "gb_moved_per_block", "gb_kept_per_block", "gb_peak"} of one micro-batch, extrapolated from
    1 and 2 blocks. Kept: from forward to backward."""
    if arm.order or arm.compile:
        return count(cfg, task, replace(arm, order=False, compile=False))  # these change no count
    one, two = (count_layers(cfg, task, arm, layers) for layers in (1, 2))

    def whole(a, b):
        return a + (cfg.layers - 1) * (b - a)
    return {"tflop": whole(one.flops, two.flops) / 1e12, "gb_moved": whole(one.moved, two.moved) / 1e9,
            "gb_moved_per_block": (two.moved - one.moved) / 1e9, "gb_kept_per_block": (two.kept - one.kept) / 1e9,
            "gb_peak": whole(one.peak, two.peak) / 1e9}


def count_all(cfg):
    """The micro-batches of stock and of ours side by side, per sample; then what fits which GPU."""
    rows = []
    print("| per sample | arm | TFLOP | GB moved in a block | GB kept in a block | activations at the fullest, GB |\n"
          + "|---" * 6 + "|")
    for task, (samples, _) in shapes(cfg)[0].items():
        for name in COUNTED:
            row = {k: v / samples for k, v in count(cfg, task, ARMS[name]).items()}
            rows.append({"task": task, "arm": name, **row})
            print(f"| {task} | {name} | {row['tflop']:,.1f} | {row['gb_moved_per_block']:.1f} "
                  f"| {row['gb_kept_per_block']:.2f} | {row['gb_peak']:.1f} |")
    for task in ("image", "video"):
        stock, *_, ours = (row for row in rows if row["task"] == task)
        print(f"{task}: {1 - ours['tflop'] / stock['tflop']:.0%} fewer FLOPs than stock, "
              f"{1 - ours['gb_moved_per_block'] / stock['gb_moved_per_block']:.0%} fewer bytes moved in a block")
    return {"counted": rows, "fits": count_memory(cfg)}


# Flags of train.py for a GPU: (GB, pairs, image checkpointing, clips, video checkpointing, int8, rank, T5 on the GPU)
FITS = [(80, 1, "none", 1, "attention", False, 128, True), (80, 8, "attention", 2, "attention", False, 128, True),
        (48, 4, "attention", 1, "full", False, 128, True), (24, 1, "full", 1, "full", True, 64, False)]


def count_memory(cfg):
    """GB of a rank of several: base, LoRA with gradients (in DDP's buckets) and AdamW, activations, T5 and the VAE."""
    rows = []
    print("\n| GPU | pairs, checkpointing | clips, checkpointing | int8 | rank | T5 | base | LoRA | image step "
          "| video step | fullest, GB |\n" + "|---" * 11 + "|")
    for gpu, pairs, image, clips, video, int8, rank, t5 in FITS:
        whole = transformer_5b(cfg.layers, heads=cfg.heads)
        base = sum(p.numel() for p in whole.parameters()) * (1 if int8 else 2) / 1e9
        lora = sum(p.numel() for p in add_lora(whole, rank, rank / 2)) * 16 / 1e9
        size = Config(**{**asdict(cfg), "image_micro": pairs, "video_micro": clips, "rank": rank})
        arm = Arm(image=image, video=video, rounded=True)
        step = {task: count(size, task, arm)["gb_peak"] for task in ("image", "video")}
        total = base + lora + 9.9 * t5 + 0.4 * (not t5) + max(step.values())
        rows.append({"gpu": gpu, "image_micro": pairs, "image_checkpointing": image, "video_micro": clips, "int8": int8,
                     "video_checkpointing": video, "rank": rank, "t5": t5, "gb": total, "gb_of_a_step": step})
        print(f"| {gpu} GB | {pairs}, {image} | {clips}, {video} | {int8} | {rank} | {t5} | {base:.1f} | {lora:.1f} "
              f"| {step['image']:.1f} | {step['video']:.1f} | {total:.1f} |")
    print("T5-XXL and the VAE are 9.9 GB. Until the end of the first step DDP holds the gradients twice (2 GB at rank "
          "128). The allocator's waste is not counted.\n")
    return rows


def train_flops(tokens):
    """TFLOP of one sample's training step of CogVideoX-5B with LoRA of rank 128 and full checkpointing.

    42 blocks of width D = 3072. Forward: two per weight and token in the 12 D^2 weights of a block's linear layers and
    in the LoRA beside them, 4 tokens^2 D in attention. Backward: the linear layers' inputs once (their weights are
    frozen), LoRA twice, attention 2.5 times; and the forward again for the recomputation.
    """
    D, rank, blocks = 3072, 128, 42
    linear = 2 * 12 * D**2 * tokens
    lora = 2 * rank * (4 * 2 * D + 2 * 5 * D) * tokens  # q, k, v, out: D to D; ff: D to 4D and back
    attention = 4 * tokens**2 * D
    forward = linear + lora + attention
    return blocks * (2 * forward + linear + 2 * lora + 2.5 * attention) / 1e12


def print_cost(p=0.2, steps=4000):
    """Eq. 3 and the hours of Table 1, with what we count."""
    image, video = train_flops(226 + 2 * 1350), train_flops(226 + 14 * 1350)
    ratio, per_step = video / image, 32 * video / (256 * image)
    total = steps * ((1 - p) * 256 * image + p * 32 * video) * 1e12
    dropped_image, dropped_video = (image + train_flops(226 + 1350)) / 2, train_flops(226 + 13.5 * 1350)
    dropped = steps * ((1 - p) * 256 * dropped_image + p * 32 * dropped_video) * 1e12
    print("| | C_vid / C_img | E[C] / C_img at p = 0.2 (Eq. 3) |\n|---|---|---|")
    print(f"| the paper: 13 latent frames, attention among video tokens only, 13^2 | 169 | {1 - p + p * 169:.1f} |")
    print(f"| counted per sample: {image:.1f} and {video:.1f} TFLOP | {ratio:.2f} | {1 - p + p * ratio:.2f} |")
    print(f"| counted per step: 256 pairs, 32 clips | {per_step:.2f} | {1 - p + p * per_step:.2f} |")
    steps_done = records(Path("out/toy/log.jsonl"))
    if {"image", "video"} <= {r["task"] for r in steps_done}:
        times = {t: np.median([r["seconds"] for r in steps_done if r["task"] == t]) for t in ("image", "video")}
        measured = times["video"] / times["image"]
        print(f"| measured on the toy (out/toy): an image step {times['image']:.2f} s, 8 clips {times['video']:.2f} s "
              f"| {measured:.2f} | {1 - p + p * measured:.2f} |")
    peak = 312e12 * 3600
    print(f"\n{steps} steps: {total:.2e} FLOP = {total / peak:.0f} A100-hours at peak, so the paper's 288 A100-hours "
          f"mean {total / peak / 288:.0%} of it.\nWithout the tokens that view drop and token drop leave out (A.2: 0.5 "
          f"and 0.5): {dropped / peak:.0f} hours, {dropped / peak / 288:.0%}.\n"
          f"Table 1's 35 to 730 times: {10_000 / 288:.0f} = 10,000 / 288 (Phantom's lower estimate) to "
          f"{210_000 / 288:.0f} = 210,000 / 288 (VACE's upper\nestimate). The paper estimates VACE's hours from 10 "
          "to 30 s an iteration (F.2): a factor of 3 is open there alone.")


# ---- measuring -------------------------------------------------------------------------------------------------------

def timed(work, device):
    """(seconds of one call, its peak memory in GB: 0 on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = Moment(device)
    work()
    seconds = Moment(device).seconds_since(started)
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def summary(times):
    """Of [(seconds, GB), ...]: the median, the 10th and 90th percentile, and the peak."""
    low, median, high = np.percentile([seconds for seconds, _ in times], [10, 50, 90])
    return {"seconds": median, "p10": low, "p90": high, "peak_gb": max(gb for _, gb in times)}


def matmul_ceiling(device):
    """FLOP/s of a large matrix product of random numbers: what a share of the peak is measured by."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / summary([timed(lambda: a @ b, device) for _ in range(20)][5:])["seconds"]


def measure_steps(cfg, device, ours, stock, scheduler, ceiling):
    """{task: {arm: its times, memory and shares of the ceiling}}: the arms take turns."""
    results = {}
    names = [name for name, arm in ARMS.items() if not (cfg.int8 and arm.stock)
             and not (device.type == "cpu" and (arm.compile or arm.order))]  # the compiler takes minutes on a CPU
    for task, (samples, frames) in shapes(cfg)[0].items():
        inputs = random_inputs(cfg, samples, frames, device)
        part = 1 if task == "image" else 4
        times, kernels = {name: [] for name in names}, {}
        for turn in range(-(cfg.warmup // part), max(1, cfg.repeats // part)):
            for name in names:
                arm = ARMS[name]
                transformer = use(arm, task, ours, stock)

                def micro_batch():
                    with autocast(device):
                        loss = v_loss(transformer, scheduler, **inputs).mean()
                    loss.backward()
                with attention_order(device) if arm.order else nullcontext():
                    seconds = timed(micro_batch, device)
                    if name not in kernels and not arm.compile:
                        with Counter() as counter:  # a compiled block hides its operations
                            micro_batch()
                        kernels[name] = ", ".join(sorted(counter.attention))
                if turn >= 0:
                    times[name].append(seconds)
        useful = count(cfg, task, Arm(image="none", video="none"))["tflop"] * 1e12
        results[task] = {}
        for name in names:
            done = count(cfg, task, ARMS[name])["tflop"] * 1e12
            row = summary(times[name])
            results[task][name] = {**row, "samples": samples, "tflop": done / 1e12, "attention": kernels.get(name, "-"),
                                   "mfu": useful / row["seconds"] / ceiling, "hfu": done / row["seconds"] / ceiling}
    return results


def measure_vae(cfg, device, dtype):
    """Pictures tiled and whole, 8 a call; a clip tiled and whole; its decoding."""
    small = dict(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2)
    small = {} if device.type == "cuda" else small
    kinds = dict(down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4)
    vae = AutoencoderKLCogVideoX(**kinds, latent_channels=16, **small).to(device, dtype).requires_grad_(False).eval()
    pictures = torch.randn(cfg.pictures, 1, 3, cfg.height, cfg.width, device=device)
    clip = torch.randn(1, clip_frames(cfg.frames), 3, cfg.height, cfg.width, device=device)
    latents = torch.randn(1, 16, shapes(cfg)[0]["video"][1], cfg.height // 8, cfg.width // 8).to(device, dtype)

    def encode_pictures():
        for eight in pictures.split(8):
            if vae.use_tiling:  # as stock does; encode_moments takes pictures whole
                vae.encode(eight.to(dtype).transpose(1, 2))
            else:
                encode_moments(vae, eight)
    decode = torch.no_grad()(lambda: vae.decode(latents))
    results = {}
    for way, name in ((None, "whole"), (tile_vae, "tiled")):
        if way:
            way(vae)
        for what, work in ((f"{cfg.pictures} pictures", encode_pictures), ("a clip", lambda: encode_moments(vae, clip)),
                           ("decoding a clip", decode)):
            results[f"VAE: {what}, {name}"] = summary([timed(work, device) for _ in range(3)][1:])
    return vae, results


def measure_rest(cfg, device, ours, parameters, scheduler):
    """The optimiser step, a checkpoint, one gradcos measurement and one PCGrad call."""
    results = {}
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    use(ARMS["all but compile"], "video", ours, None)
    for name, fused in (("optimiser step", None), ("optimiser step, fused", True)):
        optimizer = torch.optim.AdamW(parameters, fused=fused)

        def step():
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        results[name] = summary([timed(step, device) for _ in range(5)][1:])
    pcgrad = gradcos.PCGrad(4)
    results["PCGrad, a call"] = summary([timed(lambda: pcgrad(parameters, task), device)
                                         for task in ("image", "video", "image")][1:])
    with tempfile.TemporaryDirectory() as folder:
        results["a checkpoint"] = summary([timed(lambda: save_checkpoint(
            Path(folder), 1, lambda part: save_lora(ours, part), {"optimizer": optimizer}), device)])
    for parameter in parameters:
        parameter.grad = None

    def losses_of(task):
        inputs = random_inputs(cfg, 1, shapes(cfg)[0][task][1], device)
        with autocast(device):
            yield v_loss(ours, scheduler, **inputs).sum()
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    results["gradcos, a pair and a clip"] = summary([timed(lambda: gradcos.measure(losses_of, named), device)])
    return results


def measure_sample(cfg, device, dtype, ours, vae, scheduler):
    """A video with guidance, all levers on: LoRA merged, blocks compiled (in a warm-up of two steps)."""
    ours.requires_grad_(False).eval()
    ours.fuse_lora()
    ours.unload_lora()
    if device.type == "cuda":
        ours.compile_blocks()
    vae.disable_tiling()
    vae.enable_slicing()
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=ours, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 1, 226, 4096, device=device, dtype=dtype)
    reference = random_inputs(cfg, 1, 1, device)["reference"].to(dtype)

    def sample(steps):
        pipe(prompt_embeds=text[0], negative_prompt_embeds=text[1], height=cfg.height, width=cfg.width,
             guidance_scale=6.0, num_frames=clip_frames(cfg.frames), num_inference_steps=steps,
             attention_kwargs={"reference": reference})
    with attention_order(device):
        sample(2)
        return {f"a sample of {cfg.steps} steps": summary([timed(lambda: sample(cfg.steps), device)])}


def header(cfg, device, dtype):
    """What this runs on."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    n = cfg.height // 16 * (cfg.width // 16)
    tokens = {task: 226 + (1 + frames) * n for task, (_, frames) in shapes(cfg)[0].items()}
    return {**asdict(cfg), "device": where, "python": sys.version.split()[0], "torch": torch.__version__,
            "cuda": torch.version.cuda, "diffusers": diffusers.__version__, "peft": peft.__version__,
            "base": str(dtype), "LoRA": "torch.float32", "tokens": tokens}


def print_results(results):
    print("\n| micro-batch | arm | s | p10 to p90 | stock / this | peak GB | TFLOP | MFU | HFU | attention |\n"
          + "|---" * 10 + "|")
    for task, arms in results["steps"].items():
        first = next(iter(arms.values()))["seconds"]
        for name, r in arms.items():
            print(f"| {r['samples']} {task} | {name} | {r['seconds']:.3f} | {r['p10']:.3f} to {r['p90']:.3f} "
                  f"| {first / r['seconds']:.2f} | {r['peak_gb']:.1f} | {r['tflop']:,.1f} | {r['mfu']:.0%} "
                  f"| {r['hfu']:.0%} | {r['attention']} |")
    print("\n| what | s | p10 to p90 | peak GB |\n|---|---|---|---|")
    for name, r in results["rest"].items():
        print(f"| {name} | {r['seconds']:.3f} | {r['p10']:.3f} to {r['p90']:.3f} | {r['peak_gb']:.1f} |")
    for name, hours in results["hours"].items():
        print(f"{name}: {hours:,.1f} hours of this device for the paper's 4,000 steps (256 pairs or 32 clips, p = 0.2)")


def measure(cfg):
    device = find_device(cfg.device)
    dtype = compute_dtype(device)
    torch.set_float32_matmul_precision("high")
    results, started = {"on": header(cfg, device, dtype), "rest": {}}, time.monotonic()

    def done(part):
        """What is measured so far stays, whatever happens to the rest."""
        print(f"{part}: done after {time.monotonic() - started:.0f} s", file=sys.stderr)
        if cfg.json:
            write(Path(cfg.json), json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{k} {v}" for k, v in results["on"].items()))
    ceiling = matmul_ceiling(device)
    results["ceiling_tflops"] = ceiling / 1e12
    print(f"matrix product: {ceiling / 1e12:.1f} TFLOP/s")
    ours, stock, parameters = build(cfg, cfg.layers, device, dtype)
    scheduler = scheduler_5b(device)
    results["steps"] = measure_steps(cfg, device, ours, stock, scheduler, ceiling)
    done("micro-batches")
    results["rest"] |= measure_rest(cfg, device, ours, parameters, scheduler)
    done("the optimiser and the gradients' tools")
    del stock
    vae, times = measure_vae(cfg, device, dtype)
    results["rest"] |= times
    done("the VAE")
    results["rest"] |= measure_sample(cfg, device, dtype, ours, vae, scheduler_5b("cpu"))
    results["hours"] = {}
    for name in results["steps"]["image"]:
        image, video = (results["steps"][task][name] for task in ("image", "video"))
        seconds = 0.8 * 256 * image["seconds"] / image["samples"] + 0.2 * 32 * video["seconds"] / video["samples"]
        step = results["rest"]["optimiser step" if ARMS[name].stock else "optimiser step, fused"]["seconds"]
        results["hours"][name] = 4000 * (seconds + step) / 3600
    done("a sample")
    print_results(results)


def main(cfg):
    diffusers_logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    if not cfg.count:
        return measure(cfg)
    results = count_all(cfg)
    print_cost()
    if cfg.json:
        write(Path(cfg.json), json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
