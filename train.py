"""Trains subject-driven video generation without a single subject-video: Algorithm 1 of the paper, in one loop.

    torchrun --nproc_per_node=8 train.py      # the paper's run: CogVideoX-5B, Subjects200K, Pexels clips
    python train.py --toy                     # the same code on the toy world, minutes on two CPU cores

Each step flips one coin. With probability p it takes plain clips and learns image-to-video (motion): the reference is
a random frame of the clip with half of its tokens dropped, so that it cannot just be copied. Otherwise it takes pairs
of pictures of one subject and learns to draw one from the other (identity). The same LoRA learns both.

A run writes out/NAME/: config.json, log.jsonl (one line per step), step-000400/ (LoRA weights and training state).
The same command again goes on from the newest checkpoint.
"""
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm

from data import Clips, ImagePairs, batches, clip_frames, command_line, knob, normalise, rng, torch_rng
from model import (PAPER_BASE, add_lora, encode_prompt, encode_video, frame_size, load_lora, load_pipeline,
                   newest_checkpoint, read_lora, save_lora, v_loss, with_reference_token)


@dataclass
class Config:
    toy: bool = knob(False, "take the defaults of the toy world (TOY below); other flags still count")
    # model
    base: str = knob(PAPER_BASE, "diffusers CogVideoX folder or hub id")
    rank: int = knob(128, "LoRA rank (A.1)")
    alpha: float = knob(64.0, "LoRA alpha; the update is scaled by alpha/rank (A.1)")
    dropout: float = knob(0.1, "LoRA dropout (5.1)")
    lora_scope: str = knob("all", "tokens LoRA acts on: 'all' (the authors' code) or 'reference' (the paper's text)")
    init_lora: str = knob("", "LoRA file or folder to go on from, e.g. the 8 fps model for the 16 fps one (5.1)")
    # data
    images: str = knob("data/subjects200k", "folder of image pairs: D_img")
    videos: str = knob("data/pexels", "folder of clips with captions: D_vid")
    height: int = knob(0, "frame height in pixels; 0 takes the base's (480)")
    width: int = knob(0, "frame width in pixels; 0 takes the base's (720)")
    frames: int = knob(49, "frames of a training clip, cut to 8k+1 (A.2)")
    fps: float = knob(8.0, "frames per second that clips are read at (A.2)")
    crop_jitter: float = knob(0.1, "random zoom and shift of each picture of a pair, as a share of its size (A.2)")
    # the method
    p: float = knob(0.2, "probability of a video step (Eq. 1)")
    schedule: str = knob("switch", "'switch' flips the coin each step; 'two_stage': first all image steps (Table 3)")
    random_frame: bool = knob(True, "reference = a random frame of the clip, not always the first (3.4, Figure 12)")
    token_drop: float = knob(0.5, "share of reference tokens dropped in video steps; 1 is text-to-video (Table 7)")
    view_drop: float = knob(0.5, "probability that an image micro-batch trains without its reference (A.2)")
    cls: bool = knob(True, "prepend <cls> to prompts (3.3, Table 6)")
    # optimisation
    steps: int = knob(4000, "optimiser steps (5.1)")
    image_batch: int = knob(256, "image pairs per image step, all ranks together (5.1)")
    video_batch: int = knob(32, "clips per video step, all ranks together (5.1)")
    image_micro: int = knob(8, "image pairs per forward pass; the rest of the batch is accumulated")
    video_micro: int = knob(1, "clips per forward pass")
    lr: float = knob(5e-5, "peak learning rate of AdamW (5.1)")
    beta1: float = knob(0.9, "AdamW beta1 (A.2)")
    beta2: float = knob(0.95, "AdamW beta2 (A.2)")
    weight_decay: float = knob(1e-4, "AdamW weight decay (the paper is silent)")
    warmup: int = knob(200, "steps of linear warm-up (A.2)")
    cycles: int = knob(1, "cosine restarts over the run (the paper does not say how many; 1 is a plain cosine)")
    grad_clip: float = knob(1.0, "gradient norm clipping (A.2)")
    # the run
    name: str = knob("subject", "the run lives in out/NAME")
    out: str = knob("out", "where runs live")
    seed: int = knob(0, "seed of everything random")
    save_every: int = knob(50, "steps between checkpoints (A.2)")
    keep: int = knob(3, "newest checkpoints that stay on disk")
    gradient_checkpointing: bool = knob(True, "recompute activations in backward to save memory (A.1)")
    vae_tiling: bool = knob(True, "encode in tiles, one sample at a time, to save memory (A.2)")
    workers: int = knob(4, "processes per rank that read data")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")

    def __post_init__(self):
        for name in ("p", "token_drop", "view_drop", "dropout", "crop_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        for name in ("rank", "alpha", "frames", "fps", "steps", "image_batch", "video_batch", "image_micro",
                     "video_micro", "lr", "grad_clip", "save_every", "keep", "cycles"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        if self.schedule not in ("switch", "two_stage"):
            raise ValueError(f"--schedule must be 'switch' or 'two_stage', got {self.schedule!r}")
        if self.lora_scope == "reference" and (self.view_drop > 0 or self.token_drop == 1):
            raise ValueError("--lora_scope reference has nothing to train in a batch without reference tokens: "
                             "it needs --view_drop 0 and --token_drop below 1")


TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", name="toy", rank=32, alpha=16.0,
           dropout=0.0, frames=9, fps=4.0, crop_jitter=0.0, view_drop=0.0, steps=1000, image_batch=32, image_micro=32,
           video_batch=8, video_micro=8, lr=1.5e-3, warmup=50, save_every=250, gradient_checkpointing=False,
           vae_tiling=False, workers=0)


# ---- what a step is --------------------------------------------------------------------------------------------------

def task_of(cfg, step):
    """Eq. 1: "video" with probability p, else "image". One coin per step, the same on every rank."""
    if cfg.schedule == "two_stage":
        return "image" if step < (1 - cfg.p) * cfg.steps else "video"  # as many of each as the coin would give
    u = rng(cfg.seed, "coin", step).random()
    return "video" if u < cfg.p else "image"


def kept_tokens(cfg, task, step, g, n):
    """TokenDrop and view drop (Algorithm 1): which of the n reference tokens a micro-batch keeps, None for all.

    g is the micro-batch's number within its step, counted over all ranks.

    Video: a random (1 - token_drop) share; a fixed count, so that shapes stay the same from step to step.
    Image: all, or with probability view_drop none, so that the model also learns from the caption alone.
    """
    r = rng(cfg.seed, "drop", step, g)
    if task == "video":
        kept = round((1 - cfg.token_drop) * n)
        return None if kept == n else torch.from_numpy(r.permutation(n)[:kept]).sort().values
    no_reference = torch.empty(0, dtype=torch.long)
    return no_reference if r.random() < cfg.view_drop else None


def diffusion_loss(cfg, pipe, model, batch, task, step, g):
    """L_img or L_vid of micro-batch g of a step: loss per sample (B,) and the timesteps (B,) it was taken at."""
    noise_rng = torch_rng(cfg.seed, "noise", step, g)
    latents = encode_video(pipe.vae, normalise(batch["pixels"]), noise_rng)        # (B, T, C, H, W)
    reference = encode_video(pipe.vae, normalise(batch["reference"]), noise_rng)   # (B, 1, C, H, W), encoded alone
    text = encode_prompt(pipe, [with_reference_token(t, cfg.cls) for t in batch["prompt"]])  # (B, L, D_text)

    patch = pipe.transformer.config.patch_size
    n_reference = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)      # tokens of one latent frame
    keep = kept_tokens(cfg, task, step, g, n_reference)

    num_timesteps = pipe.scheduler.config.num_train_timesteps
    timestep = torch.randint(0, num_timesteps, (len(latents),), generator=noise_rng).to(latents.device)
    noise = torch.randn(latents.shape, generator=noise_rng).to(latents.device)
    torch.manual_seed(torch_rng(cfg.seed, "dropout", step, g).initial_seed())  # LoRA dropout draws from here
    return v_loss(model, pipe.scheduler, latents, text, timestep, noise, reference, keep), timestep


# ---- a run on disk ---------------------------------------------------------------------------------------------------

def save_checkpoint(run, step, cfg, transformer, optimizer, schedule):
    """LoRA weights and training state, all or nothing: written under another name, then renamed."""
    final, part = run / f"step-{step:06d}", run / f"step-{step:06d}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    save_lora(transformer, part, base=cfg.base, cls=str(cfg.cls), fps=str(cfg.fps), trained_by=json.dumps(asdict(cfg)))
    torch.save({"step": step, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
               part / "training_state.pt")
    os.replace(part, final)
    for old in sorted(d for d in run.glob("step-*") if d.suffix != ".tmp")[:-cfg.keep]:
        shutil.rmtree(old)


def resume(run, cfg, transformer, optimizer, schedule):
    """Restore the newest checkpoint; returns the step to go on from. ValueError when the run had other settings."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return 0
    before, now = json.loads((run / "config.json").read_text()), asdict(cfg)
    free = {"workers", "save_every", "keep", "out"}  # these do not change what is computed
    changed = [f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v and k not in free]
    if changed:
        raise ValueError(f"{run} was started with other settings ({'; '.join(changed)}): choose another --name")
    read_lora(transformer, checkpoint)
    state = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------

def train(cfg):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(cfg.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 (A.2)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *_: None
    run = Path(cfg.out) / cfg.name

    # Micro-batches: g = 0, 1, 2, ... of a step go to ranks in turn, so that every draw belongs to g and not to a rank.
    batch = {"image": cfg.image_batch, "video": cfg.video_batch}  # samples per step
    size = {"image": cfg.image_micro, "video": cfg.video_micro}   # samples per micro-batch
    for task in batch:
        if batch[task] % (size[task] * ranks):
            raise ValueError(f"--{task}_batch {batch[task]} is not a whole number of micro-batches of "
                             f"--{task}_micro {size[task]} on {ranks} rank(s)")
    accumulate = {task: batch[task] // (size[task] * ranks) for task in batch}

    # The model: a frozen base in bfloat16, LoRA in float32. On CPU everything is float32.
    pipe = load_pipeline(cfg.base, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # else copied there in every step
    if cfg.vae_tiling:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    transformer = pipe.transformer.train()
    if cfg.init_lora:  # rank, alpha and scope are the file's
        parameters = load_lora(transformer, cfg.init_lora, cfg.dropout)
        config = transformer.peft_config["default"]
        cfg = replace(cfg, rank=config.r, alpha=config.lora_alpha, lora_scope=transformer.lora_scope)
    else:
        torch.manual_seed(cfg.seed)  # every rank starts from the same LoRA
        parameters = add_lora(transformer, cfg.rank, cfg.alpha, cfg.dropout, cfg.lora_scope)
    if cfg.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    # The data: only what this run's coin can ask for is opened.
    height, width = cfg.height or frame_size(pipe)[0], cfg.width or frame_size(pipe)[1]
    multiple = pipe.vae_scale_factor_spatial * transformer.config.patch_size
    if height % multiple or width % multiple:
        raise ValueError(f"--height and --width must be multiples of {multiple}, got {height} x {width}")
    frames = clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    if frames != cfg.frames:
        say(f"--frames {cfg.frames} cut to {frames}, a length that the VAE gives back unchanged")
    datasets = {}
    if cfg.p < 1:
        datasets["image"] = ImagePairs(cfg.images, (height, width), cfg.crop_jitter, cfg.seed)
    if cfg.p > 0:
        datasets["video"] = Clips(cfg.videos, (height, width), frames, cfg.fps, cfg.random_frame, cfg.seed)
    for dataset in datasets.values():
        dataset[0, 0]  # a folder with nothing readable in it should fail here, not in a worker

    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, cfg.warmup, cfg.steps, cfg.cycles)
    start = resume(run, cfg, transformer, optimizer, schedule)
    if ranks > 1:
        dist.barrier()  # every rank has read the run before rank 0 writes to it
    if start >= cfg.steps:
        return say(f"{run} is complete ({start} steps); choose another --name for a new run")
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
        lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").is_file() else []
        lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]  # a kill can cut one
        (run / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    say(f"{run}: {sum(p.numel() for p in parameters):,} trainable parameters in {len(parameters) // 2} LoRA modules, "
        f"{width}x{height}, {', '.join(f'{len(d)} {t}s' for t, d in datasets.items())}, {ranks} rank(s) on {device}"
        + (f", going on from step {start}" if start else ""))

    model = transformer
    if ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(transformer, gradient_as_bucket_view=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def micro_batches():  # what this rank will ask for, in order: lists of (task, step, index of the sample)
        for step in range(start, cfg.steps):
            task = task_of(cfg, step)
            for micro in range(accumulate[task]):
                g = micro * ranks + rank
                yield [(task, step, g * size[task] + j) for j in range(size[task])]

    stream = batches(datasets, micro_batches(), cfg.workers)
    log = Log(run if rank == 0 else None, cfg.steps, start)
    for step in range(start, cfg.steps):
        clock = time.perf_counter()
        task = task_of(cfg, step)                                      # u < p ? video : image
        bins = torch.zeros(2, 4, device=device)                        # loss sums, counts; per quarter of the timesteps
        for micro in range(accumulate[task]):
            micro_batch = next(stream)                                 # clips or pairs, with captions
            last = micro == accumulate[task] - 1
            with autocast, (nullcontext() if last or ranks == 1 else model.no_sync()):
                loss, t = diffusion_loss(cfg, pipe, model, micro_batch, task, step, micro * ranks + rank)
                (loss.mean() / accumulate[task]).backward()            # g_vid or g_img
            quarter = 4 * t // pipe.scheduler.config.num_train_timesteps
            bins += torch.stack([torch.zeros_like(bins[0]).index_add_(0, quarter, v)
                                 for v in (loss.detach(), torch.ones_like(loss))])
            log.skipped(micro_batch["skipped"])
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()                                               # theta <- theta - eta g
        lr = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ranks > 1:
            dist.all_reduce(bins)
        log.step(step, task, bins, norm, lr, time.perf_counter() - clock)

        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:  # once in a while: save
            log.flush()
            if rank == 0:
                save_checkpoint(run, step + 1, cfg, transformer, optimizer, schedule)
    log.close()
    say(f"done: {newest_checkpoint(run)}. Next: python sample.py --ref PICTURE --prompt '...'")


class Log:
    """log.jsonl and the progress bar. A step's numbers are read one step late: nothing waits for the GPU."""

    def __init__(self, run, steps, start):
        self.file = open(run / "log.jsonl", "a") if run else None
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1, disable=run is None)
        self.pending, self.shown, self.unusable = None, {}, set()

    def step(self, *values):
        self.flush()
        self.pending = values

    def flush(self):
        if self.pending is None:
            return
        (step, task, bins, norm, lr, seconds), self.pending = self.pending, None
        sums, counts = bins.tolist()
        loss, norm = sum(sums) / sum(counts), norm.item()
        if not (abs(loss) < float("inf") and norm < float("inf")):  # NaN fails both
            sys.exit(f"step {step} ({task}): loss {loss}, gradient norm {norm}. Stopped; the last checkpoint is good")
        if self.file:
            per_bin = [s / c if c else None for s, c in zip(sums, counts)]
            self.file.write(json.dumps({"step": step, "task": task, "loss": loss, "lr": lr, "grad_norm": norm,
                                        "seconds": round(seconds, 4), "loss_by_timestep": per_bin}) + "\n")
            self.file.flush()
        mean = self.shown.get(task, loss)
        self.shown[task] = 0.95 * mean + 0.05 * loss
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.shown.items()}, refresh=False)
        self.bar.update()

    def skipped(self, reasons):
        for reason in set(reasons) - self.unusable:
            self.unusable.add(reason)
            self.bar.write(f"skipped ({len(self.unusable)} so far): {reason}", file=sys.stderr)

    def close(self):
        self.flush()
        self.bar.close()
        if self.unusable:
            print(f"{len(self.unusable)} unusable file(s) were skipped")


def main(cfg):
    diffusers_logging.disable_progress_bar()
    if cfg.toy:
        from toy import world
        world.ensure_data(cfg.images, cfg.videos)
    train(cfg)
    if dist.is_initialized():  # after train() has returned: its DDP model must go before the group does
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main, Config, __doc__, **(TOY if "--toy" in sys.argv else {}))
