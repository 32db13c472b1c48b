"""Time and memory of training at CogVideoX-5B's real size, with random weights: nothing is downloaded.

    python -m paper.bench                            # on one GPU: the defaults of train.py at 480x720, 49 frames
    python -m paper.bench --video_micro 4 --int8 True
    python -m paper.bench --count True               # without a GPU: memory and FLOPs, counted
    python -m paper.bench --layers 1 --height 64 --width 96 --frames 9 --repeats 2 --warmup 1    # anywhere: a try

Measured are whole micro-batches (forward, recomputation, backward of the transformer; LoRA in float32, base in
bfloat16) and the optimiser step; not the VAE, T5 or the loader, which cached latents and prompts take out of the loop.
Printed: the median and the 10th and 90th percentile, peak memory, and the hours that these give for the paper's 4,000
steps on one such device.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data import clip_frames
from model import SubjectTransformer, add_lora, find_device, follow_autocast, v_loss
from run import Moment, command_line, knob, records


@dataclass
class Config:
    layers: int = knob(42, "transformer blocks")
    height: int = knob(480, "frame height in pixels")
    width: int = knob(720, "frame width in pixels")
    frames: int = knob(49, "frames of a clip")
    rank: int = knob(128, "LoRA rank")
    image_micro: int = knob(8, "image pairs per micro-batch")
    video_micro: int = knob(1, "clips per micro-batch")
    token_drop: float = knob(0.5, "share of reference tokens dropped in video steps")
    gradient_checkpointing: bool = knob(True, "recompute activations")
    int8: bool = knob(False, "the frozen base in 8 bits (torchao)")
    warmup: int = knob(5, "micro-batches before the clock starts")
    repeats: int = knob(20, "micro-batches that are timed")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    count: bool = knob(False, "count the memory and the FLOPs of a step instead of measuring")


def shapes(cfg):
    """(task, samples, latent frames, reference tokens kept) of the two micro-batches; and the tokens of a frame."""
    n = (cfg.height // 16) * (cfg.width // 16)
    latent_frames = (clip_frames(cfg.frames) - 1) // 4 + 1
    return [("image", cfg.image_micro, 1, n),
            ("video", cfg.video_micro, latent_frames, round((1 - cfg.token_drop) * n))], n


def transformer_5b(layers):
    """CogVideoX-5B's transformer, or its first layers, on the meta device."""
    with torch.device("meta"):
        return SubjectTransformer(
            num_attention_heads=48, num_layers=layers, time_embed_dim=512, text_embed_dim=4096, sample_width=90,
            sample_height=60, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False)


def count(cfg):
    """What a step holds at its fullest, in GB: when backward recomputes a block whose inputs were kept.

    One block runs on fake tensors (shapes without data) under autocast to bfloat16, as on a GPU: linear layers in
    bfloat16, norms in float32. Not counted: the temporaries of backward, the allocator's waste.
    """
    whole = transformer_5b(cfg.layers)
    frozen = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in add_lora(whole, cfg.rank, cfg.rank / 2))
    fixed = {"base": frozen * (1 if cfg.int8 else 2) / 1e9, "LoRA, its gradients and AdamW": trained * 16 / 1e9}
    print(", ".join(f"{name} {gb:.1f} GB" for name, gb in fixed.items()) + f" (rank {cfg.rank}, int8 {cfg.int8})")
    block = transformer_5b(1).to(torch.bfloat16).to_empty(device="cpu")
    add_lora(block.train(), cfg.rank, cfg.rank / 2, dropout=0.1)
    weights = {tuple(shape) for p in block.parameters() for shape in (p.shape, p.shape[::-1])}
    half_norm = F.layer_norm
    full_norm = lambda x, shape, w=None, b=None, eps=1e-5: half_norm(
        x.float(), shape, w if w is None else w.float(), b if b is None else b.float(), eps)
    layout, n = shapes(cfg)
    for task, samples, frames, kept in layout:
        length, kept_for_backward = kept + frames * n, {}

        def keep(x):
            if tuple(x.shape) not in weights:  # weights are counted above
                kept_for_backward[x.untyped_storage()._cdata] = x.untyped_storage().nbytes(), x
            return x
        with (FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
              torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), patch.object(F, "layer_norm", full_norm)):
            hidden, text = (torch.empty(samples, tokens, 3072, dtype=torch.bfloat16, requires_grad=True)
                            for tokens in (length, 226))
            rope = torch.empty(length, 64), torch.empty(length, 64)
            block.transformer_blocks[0](hidden, text, torch.empty(samples, 512, dtype=torch.bfloat16),
                                        image_rotary_emb=rope)
        inside = sum(size for size, _ in kept_for_backward.values()) / 1e9
        inputs = cfg.layers * samples * (226 + length) * 3072 * 2 / 1e9
        print(f"{task}: micro-batch {samples} of {226 + length} tokens: inputs of {cfg.layers} blocks {inputs:.1f} GB, "
              f"the block being recomputed {inside:.1f} GB, in all {sum(fixed.values()) + inputs + inside:.1f} GB; "
              "T5-XXL on the GPU adds 9.5 GB, the VAE 0.4 GB")


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
    if steps_done := records(Path("out/toy/log.jsonl")):
        times = {t: np.median([r["seconds"] for r in steps_done if r["task"] == t]) for t in ("image", "video")}
        measured = times["video"] / times["image"]
        print(f"| measured on the toy (out/toy): 32 pairs {times['image']:.2f} s, 8 clips {times['video']:.2f} s "
              f"| {measured:.2f} | {1 - p + p * measured:.2f} |")
    peak = 312e12 * 3600
    print(f"\n{steps} steps: {total:.2e} FLOP = {total / peak:.0f} A100-hours at peak, so the paper's 288 A100-hours "
          f"mean {total / peak / 288:.0%} of it.\nWithout the tokens that view drop and token drop leave out (A.2: 0.5 "
          f"and 0.5): {dropped / peak:.0f} hours, {dropped / peak / 288:.0%}.\n"
          f"Table 1's 35 to 730 times: {10_000 / 288:.0f} = 10,000 / 288 (Phantom's lower estimate) to "
          f"{210_000 / 288:.0f} = 210,000 / 288 (VACE's upper\nestimate). The paper estimates VACE's hours from 10 "
          "to 30 s an iteration (F.2): a factor of 3 is open there alone.")


def build(cfg, device, dtype):
    """CogVideoX-5B's transformer with random weights, made on the device, with LoRA; and the 5B scheduler."""
    transformer = transformer_5b(cfg.layers).to(dtype).to_empty(device=device)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.02)
    if cfg.int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        quantize_(transformer.transformer_blocks, Int8WeightOnlyConfig())
        follow_autocast(transformer.transformer_blocks)
    parameters = add_lora(transformer.train(), cfg.rank, cfg.rank / 2)
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return transformer, parameters, scheduler


def timed(work, cfg, device):
    """Seconds of each of cfg.repeats calls, and the peak memory in GB (0 on a CPU)."""
    for _ in range(cfg.warmup):
        work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    moments = [Moment(device)]
    for _ in range(cfg.repeats):
        work()
        moments.append(Moment(device))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return [b.seconds_since(a) for a, b in zip(moments, moments[1:])], peak


def main(cfg):
    diffusers_logging.set_verbosity_error()  # it warns of a cast that changes nothing here
    if cfg.count:
        count(cfg)
        return print_cost()
    device = find_device(cfg.device)
    on_gpu = device.type == "cuda"
    transformer, parameters, scheduler = build(cfg, device, torch.bfloat16 if on_gpu else torch.float32)
    optimizer = torch.optim.AdamW(parameters)
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
    h, w = cfg.height // 8, cfg.width // 8
    layout, tokens = shapes(cfg)
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, {cfg.layers} blocks, LoRA rank {cfg.rank} float32, checkpointing "
          f"{cfg.gradient_checkpointing}, int8 {cfg.int8}, {cfg.width}x{cfg.height}, random weights")
    per_sample = {}
    for task, n, frames, kept in layout:
        latents = torch.randn(n, frames, 16, h, w, device=device)
        reference, noise = torch.randn(n, 1, 16, h, w, device=device), torch.randn_like(latents)
        text = torch.randn(n, 226, 4096, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
        timestep = torch.randint(1000, (n,), device=device)
        keep = torch.randperm(tokens)[:kept].sort().values.to(device) if kept < tokens else None

        def micro_batch():
            with autocast:
                v_loss(transformer, scheduler, latents, text, timestep, noise, reference, keep).mean().backward()
        seconds, peak = timed(micro_batch, cfg, device)
        per_sample[task] = np.median(seconds) / n
        low, high = np.percentile(seconds, [10, 90])
        length = 226 + kept + frames * tokens
        print(f"{task}: micro-batch {n} of {length} tokens, {np.median(seconds):.3f} s ({low:.3f} to {high:.3f}), "
              f"{per_sample[task]:.3f} s a sample" + f", peak {peak:.1f} GB" * on_gpu)
    seconds, peak = timed(lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1.0), optimizer.step()), cfg, device)
    print(f"optimiser step: {np.median(seconds):.3f} s" + f", peak {peak:.1f} GB" * on_gpu)
    hours = 4000 * (0.8 * 256 * per_sample["image"] + 0.2 * 32 * per_sample["video"]) / 3600
    print(f"the paper's 4,000 steps (256 pairs or 32 clips, p = 0.2): {hours:.0f} hours of this device")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
