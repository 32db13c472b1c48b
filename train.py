"""Trains subject-driven video generation without a single subject-video: Algorithm 1 of the paper, in one loop.
What stands in brackets below is the paper's section; a knob without one is not in the paper.

    torchrun --nproc_per_node=8 train.py      # the paper's run: CogVideoX-5B, Subjects200K, Pexels clips
    python train.py --toy                     # the same code on the toy world, minutes on two CPU cores

Each step flips one coin. With probability p it takes plain clips and learns image-to-video (motion): the reference is
a random frame of the clip with half of its tokens dropped, so that it cannot just be copied. Otherwise it takes pairs
of pictures of one subject and learns to draw one from the other (identity). The same LoRA learns both.

A run writes out/NAME/: config.json, log.jsonl (one line per step), step-000400/ (LoRA weights and training state); and
what --gradcos_every, --val_every and --sample_every ask for: gradcos.jsonl, val.jsonl, samples/.
The same command again goes on from the newest checkpoint, bit for bit. SIGTERM saves one and ends the run.
"""
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

import gradcos
from data import (Cache, Clips, ImagePairs, batches, changed, clip_frames, command_line, knob, load_image, normalise,
                  rng, torch_rng)

if not {"-h", "--help"} & set(sys.argv):  # diffusers takes seconds to import: the knobs are shown without
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
    from diffusers.utils import logging as diffusers_logging

    from model import (add_lora, draw_latents, encode_moments, encode_prompt, find_device, frame_size, load_lora,
                       load_pipeline, newest_checkpoint, read_lora, save_lora, send, tile_vae, v_loss,
                       weight_fingerprint, with_reference_token)
    from sample import contact_sheet, encode_references, generate


@dataclass
class Config:
    toy: bool = knob(False, "take the defaults of the toy world (TOY below); other flags still count")
    # model
    base: str = knob("THUDM/CogVideoX-5b", "diffusers CogVideoX folder or hub id (5.1)")
    int8: bool = knob(False, "keep the frozen transformer in 8 bits (torchao): half the memory, for a 24 GB GPU")
    rank: int = knob(128, "LoRA rank (A.1)")
    alpha: float = knob(64.0, "LoRA alpha; the update is scaled by alpha/rank (A.1)")
    dropout: float = knob(0.1, "LoRA dropout (5.1)")
    lora_scope: str = knob("all", "tokens LoRA acts on: 'all' (the authors' code) or 'reference' (3.3, A)")
    init_lora: str = knob("", "LoRA file or folder to go on from, e.g. the 8 fps model for the 16 fps one (5.1)")
    # data
    images: str = knob("data/subjects200k", "folder of image pairs: D_img (5.1)")
    videos: str = knob("data/pexels", "folder of clips with captions: D_vid (5.1)")
    cache: str = knob("", "folder of latents that python -m paper.prepare cache wrote; empty encodes on the fly")
    height: int = knob(0, "frame height in pixels; 0 takes the base's: 480 (Alg. 1)")
    width: int = knob(0, "frame width in pixels; 0 takes the base's: 720 (Alg. 1)")
    frames: int = knob(49, "frames of a training clip, cut to 8k+1 (A.2)")
    fps: float = knob(8.0, "frames per second that clips are read at (A.2)")
    crop_jitter: float = knob(0.1, "random zoom and shift of each picture of a pair, as a share of its size (A.2)")
    # the method
    p: float = knob(0.2, "probability of a video step (Eq. 1, D.5)")
    schedule: str = knob("switch", "'switch' flips the coin each step; 'two_stage': all image steps first (D.7)")
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
    # watching the run: none of this changes what is trained
    gradcos_every: int = knob(0, "steps between measurements of the two gradients' cosine (4.1, B.1); 0 never")
    val_every: int = knob(0, "steps between held-out losses (B.1's batches); 0 never")
    sample_every: int = knob(0, "steps between samples from --val_refs; 0 never")
    val_images: str = knob("data/subjects200k_val", "image pairs of subjects that are not trained on (B.1)")
    val_videos: str = knob("data/pexels_val", "clips that are not trained on (B.1)")
    val_pairs: int = knob(64, "held-out image pairs to measure with")
    val_clips: int = knob(32, "held-out clips to measure with")
    val_refs: str = knob("", "folder of pictures to sample from, each with its prompt in a .txt file of its name")
    # an alternative to the coin alone
    pcgrad: int = knob(0, "PCGrad against the gradients of this many last steps (4.3, B.3; Table 5: 4, 8); 0 is off")
    grad_device: str = knob("", "where flat gradients live (cosine: two, PCGrad: one per buffered step; 2 GB each); "
                                "'cpu' keeps them off the GPU")

    def __post_init__(self):
        for name in ("p", "token_drop", "view_drop", "dropout", "crop_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"--seed must not be negative, got {self.seed}")
        for name in ("rank", "alpha", "frames", "fps", "steps", "image_batch", "video_batch", "image_micro",
                     "video_micro", "lr", "grad_clip", "save_every", "keep", "cycles", "val_pairs", "val_clips"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}")
        for name in ("gradcos_every", "val_every", "sample_every", "pcgrad", "warmup", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.sample_every and not Path(self.val_refs or "none").is_dir():
            raise ValueError(f"--sample_every needs a folder of pictures and prompts: no --val_refs {self.val_refs!r}")
        if self.pcgrad == 1:
            raise ValueError("--pcgrad 1 only ever holds the step's own task: a buffer needs 2 or more")
        if self.schedule not in ("switch", "two_stage"):
            raise ValueError(f"--schedule must be 'switch' or 'two_stage', got {self.schedule!r}")
        if self.lora_scope == "reference" and (self.view_drop > 0 or self.token_drop == 1):
            raise ValueError("--lora_scope reference has nothing to train in a batch without reference tokens: "
                             "it needs --view_drop 0 and --token_drop below 1")


TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", name="toy", rank=32, alpha=16.0,
           dropout=0.0, frames=9, fps=4.0, crop_jitter=0.0, view_drop=0.0, steps=1000, image_batch=32, image_micro=32,
           video_batch=8, video_micro=8, lr=1.5e-3, warmup=50, save_every=250, gradient_checkpointing=False,
           vae_tiling=False, workers=0, val_images="toy/data/val_pairs", val_videos="toy/data/val_clips",
           val_refs="toy/refs", val_every=100, sample_every=500)
SIGTERM = threading.Event()  # the job is asked to end: save a checkpoint first
HELD_OUT_SEED = 2**31 - 1  # what is measured on the held-out data is the same in every run, whatever its seed


# ---- what a step is --------------------------------------------------------------------------------------------------

def task_of(cfg, step):
    """Eq. 1: "video" with probability p, else "image". One coin per step, the same on every rank."""
    if cfg.schedule == "two_stage":
        return "image" if step < image_stage(cfg) else "video"
    u = rng(cfg.seed, "coin", step).random()
    return "video" if u < cfg.p else "image"


def image_stage(cfg):
    """Steps of the first stage of 'two_stage' (D.7): each task gets as many as the coin would give it."""
    return round((1 - cfg.p) * cfg.steps)


def kept_tokens(cfg, task, step, g, n):
    """TokenDrop and view drop (Algorithm 1): which of the n reference tokens a micro-batch keeps, None for all.

    g is the micro-batch's number within its step, counted over all ranks.

    Video: a random (1 - token_drop) share; a fixed count, so that shapes stay the same from step to step.
    Image: all, or with probability view_drop none, so that the model also learns from the caption alone.
    """
    r = rng(cfg.seed, "drop", step, g)
    if task == "video":
        kept = max(round((1 - cfg.token_drop) * n), cfg.lora_scope == "reference")  # that scope needs one to train on
        return None if kept == n else torch.from_numpy(r.permutation(n)[:kept]).sort().values
    no_reference = torch.empty(0, dtype=torch.long)
    return no_reference if r.random() < cfg.view_drop else None


def loss_inputs(cfg, pipe, batch, task, step, g):
    """What v_loss takes for micro-batch g of a step: the encoded batch, the kept reference tokens, timesteps, noise."""
    noise_rng, device = torch_rng(cfg.seed, "noise", step, g), pipe.transformer.device

    def encode(x):  # uint8 pixels; or, from a cache, moments
        x = send(x, device)
        moments = encode_moments(pipe.vae, normalise(x)) if x.dtype == torch.uint8 else x
        return draw_latents(pipe.vae, moments, noise_rng)
    latents = encode(batch["pixels"])        # (B, T, C, H, W)
    reference = encode(batch["reference"])   # (B, 1, C, H, W), encoded alone
    if "text" in batch:
        text = send(batch["text"], device)   # (B, L, D_text)
    else:
        text = send(encode_prompt(pipe, [with_reference_token(t, cfg.cls) for t in batch["prompt"]]), device)

    patch = pipe.transformer.config.patch_size
    n_reference = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)      # tokens of one latent frame
    keep = kept_tokens(cfg, task, step, g, n_reference)
    keep = None if keep is None else send(keep, device)

    num_timesteps = pipe.scheduler.config.num_train_timesteps
    timestep = send(torch.randint(0, num_timesteps, (len(latents),), generator=noise_rng), device)
    noise = send(torch.randn(latents.shape, generator=noise_rng), device)
    return dict(latents=latents, text=text, timestep=timestep, noise=noise, reference=reference, keep=keep)


def by_timestep(loss, timestep, num_timesteps):
    """(2, 4): the sum of a micro-batch's losses and their number, in each quarter of the timesteps."""
    quarter = 4 * timestep // num_timesteps
    return torch.stack([torch.zeros(4, device=loss.device).index_add_(0, quarter, values)
                        for values in (loss.detach(), torch.ones_like(loss))])


def mean_and_quarters(bins):
    """by_timestep's (2, 4) as numbers: {"loss": mean, "loss_by_timestep": 4 means, None where there was nothing}."""
    sums, counts = bins.tolist()
    return {"loss": sum(sums) / sum(counts), "loss_by_timestep": [s / c if c else None for s, c in zip(sums, counts)]}


# ---- the model and the data of a run ---------------------------------------------------------------------------------

def cache_key(cfg, pipe, task, size, frames):
    """Everything that cached latents depend on: they are refused when any of it has changed."""
    key = {"vae": weight_fingerprint(pipe.vae.encoder.conv_in.conv.weight), "dtype": str(pipe.vae.dtype),
           "text_encoder": weight_fingerprint(pipe.text_encoder.get_input_embeddings().weight[:100]), "cls": cfg.cls,
           "tiling": cfg.vae_tiling, "height": size[0], "width": size[1]}
    return key | ({"crop_jitter": cfg.crop_jitter} if task == "image" else {"frames": frames, "fps": cfg.fps})


def open_caches(cfg, pipe, size, frames):
    """{"image": Cache or None, "video": Cache or None}: what lies in --cache."""
    caches = {"image": None, "video": None}
    for task in caches:
        if cfg.cache and (Path(cfg.cache) / task).is_dir():
            caches[task] = Cache(Path(cfg.cache) / task, cache_key(cfg, pipe, task, size, frames))
    if cfg.cache and not any(caches.values()):
        raise FileNotFoundError(f"no cache at {cfg.cache}: run python -m paper.prepare cache")
    return caches


def load_model(cfg, device):
    """(cfg, pipeline, LoRA parameters): a frozen base in bfloat16, LoRA in float32; on a CPU everything is float32."""
    pipe = load_pipeline(cfg.base, torch.bfloat16 if device.type == "cuda" else torch.float32, int8=cfg.int8)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # else copied there in every step
    if cfg.vae_tiling:
        tile_vae(pipe.vae)
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
    return cfg, pipe, parameters


def open_data(cfg, pipe, say=print):
    """(data sets, (height, width), frames). Only what this run's coin can ask for is opened, and one sample of each is
    read: a mistake shows here, and not in a worker."""
    height, width = cfg.height or frame_size(pipe)[0], cfg.width or frame_size(pipe)[1]
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    if height % multiple or width % multiple:
        raise ValueError(f"--height and --width must be multiples of {multiple}, got {height} x {width}")
    frames = clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    if frames != cfg.frames:
        say(f"--frames {cfg.frames} cut to {frames}, a length that the VAE gives back unchanged")
    datasets, caches = {}, open_caches(cfg, pipe, (height, width), frames)
    if cfg.p < 1:
        datasets["image"] = ImagePairs(cfg.images, (height, width), cfg.crop_jitter, cfg.seed, caches["image"])
    if cfg.p > 0:
        datasets["video"] = Clips(cfg.videos, (height, width), frames, cfg.fps, cfg.random_frame, cfg.seed,
                                  caches["video"])
    for task, dataset in datasets.items():
        dataset[0, 0]
        if dataset.cache and dataset.cache.cached < len(dataset):
            say(f"{cfg.cache} holds {dataset.cache.cached} of {len(dataset)} {task}s; the others are left out (if they "
                "are new: run python -m paper.prepare cache again)")
    return datasets, (height, width), frames


def join_ranks(backend, **options):
    """torchrun's process group. Its store outlives --max-restarts: a prefix keeps dead ranks' addresses from a new
    attempt, which would wait for them."""
    store, rank, ranks = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, **options)


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------

def train(cfg):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 (A.2)
    if ranks > 1:
        join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
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

    cfg, pipe, parameters = load_model(cfg, device)
    datasets, (height, width), frames = open_data(cfg, pipe, say)
    transformer = pipe.transformer.to(device)
    pipe.vae.to(device)
    if not all(dataset.cache and dataset.cache.prompts for dataset in datasets.values()):
        pipe.text_encoder.to(device)  # else it stays in RAM, for the held-out prompts and the samples

    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    decay_over = lambda steps: get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, cfg.warmup, steps, cfg.cycles)
    lr_schedule = decay_over(cfg.steps)
    if cfg.schedule == "two_stage" and 0 < (switch := image_stage(cfg)) < cfg.steps:
        # Two trainings, one after the other: with one decay over both the second would have hardly any learning rate.
        lr_schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer, [decay_over(switch), decay_over(cfg.steps - switch)], [switch])
    state = {"optimizer": optimizer, "lr_schedule": lr_schedule}
    if cfg.pcgrad:
        state["pcgrad"] = gradcos.PCGrad(cfg.pcgrad, cfg.grad_device or device)
    start = resume(run, cfg, transformer, **state)
    if ranks > 1:  # every rank has read the run before rank 0 writes to it, and all have read the same
        ends = torch.tensor([start, -start])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError(f"ranks resume from steps {-ends[1]} to {ends[0]}: is {run} on a disk that all share?")
    watched = [file for file, every in (("gradcos.jsonl", cfg.gradcos_every), ("val.jsonl", cfg.val_every)) if every]
    if start >= cfg.steps and all(any(r["step"] == start for r in records(run / file)) for file in watched):
        return say(f"{run} is complete ({start} steps); choose another --name for a new run")
    if rank == 0:
        start_log(run, cfg, start)
    say(f"{run}: {sum(p.numel() for p in parameters):,} trainable parameters in {len(parameters) // 2} LoRA modules, "
        f"{width}x{height}, {', '.join(f'{len(d)} {t}s' for t, d in datasets.items())}, {ranks} rank(s) on {device}"
        + (f", going on from step {start}" if start else ""))
    if start >= cfg.steps:
        say("the run is complete: only its end is measured; for a whole curve start another --name")

    model = transformer
    if ranks > 1:
        # Every rank made the same LoRA on the same base: nothing to broadcast (8-bit weights could not be).
        model = torch.nn.parallel.DistributedDataParallel(transformer, gradient_as_bucket_view=True, init_sync=False)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def micro_batches():  # what this rank will ask for, in order: lists of (task, step, index of the sample)
        for step in range(start, cfg.steps):
            task = task_of(cfg, step)
            for micro in range(accumulate[task]):
                g = micro * ranks + rank
                yield [(task, step, g * size[task] + j) for j in range(size[task])]

    held_out = None
    if cfg.gradcos_every or cfg.val_every:
        held_out = HeldOut(cfg, pipe, (height, width), frames, autocast, rank, ranks)

    def watch(step):  # looks at the model as it is after `step` steps, and leaves no trace in it
        due = lambda every: every and (step % every == 0 or step == cfg.steps)
        if due(cfg.gradcos_every):
            named = [(n, q) for n, q in transformer.named_parameters() if q.requires_grad]
            log.write("gradcos.jsonl", {"step": step, **gradcos.measure(held_out.scalars, named, cfg.grad_device)})
        if due(cfg.val_every):
            log.write("val.jsonl", {"step": step, **held_out.mean_losses()})
        if due(cfg.sample_every) and step:
            with autocast:
                sample_references(cfg, pipe, run, step, (height, width), frames, rank, ranks)

    stream = batches(datasets, micro_batches(), cfg.workers)
    log = Log(run if rank == 0 else None, cfg.steps, start, device)
    for step in range(start, cfg.steps):
        watch(step)
        log.start()
        task = task_of(cfg, step)                                      # u < p ? video : image
        numbers = torch.zeros(9, device=device)                        # loss sums and counts per bin; requests to stop
        bins = numbers[:8].view(2, 4)
        for micro in range(accumulate[task]):
            micro_batch = next(stream)                                 # clips or pairs, with captions
            g, last = micro * ranks + rank, micro == accumulate[task] - 1
            inputs = loss_inputs(cfg, pipe, micro_batch, task, step, g)
            torch.manual_seed(torch_rng(cfg.seed, "dropout", step, g).initial_seed())  # LoRA dropout draws here
            with (nullcontext() if last or ranks == 1 else model.no_sync()):
                with autocast:
                    loss = v_loss(model, pipe.scheduler, **inputs)     # L_vid or L_img, per sample
                (loss.mean() / accumulate[task]).backward()            # g_vid or g_img
            bins += by_timestep(loss, inputs["timestep"], pipe.scheduler.config.num_train_timesteps)
            log.skipped(micro_batch["skipped"])
        if cfg.pcgrad:
            state["pcgrad"](parameters, task)
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()                                               # theta <- theta - eta g
        lr = lr_schedule.get_last_lr()[0]
        lr_schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if SIGTERM.is_set():
            numbers[8] = 1  # the others learn of it with the losses, one step later
        if ranks > 1:
            dist.all_reduce(numbers)
        log.step(step, task, torch.cat([numbers, norm[None]]), lr)

        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or log.stop:  # once in a while: save
            log.flush()
            if rank == 0:
                save_checkpoint(run, step + 1, cfg, transformer, **state)
        if log.stop and step + 1 < cfg.steps:
            log.close()
            return say(f"stopped by SIGTERM after {step + 1} steps; the same command goes on")
    watch(cfg.steps)  # after the last save: whatever happens here costs no training
    log.close()
    say(f"done: {newest_checkpoint(run)}. Next: python sample.py --lora {run} --ref PICTURE --prompt '...'")


# ---- watching a run --------------------------------------------------------------------------------------------------

class HeldOut:
    """The fixed held-out batches of B.1: fixed samples, noise, timesteps and kept tokens, without view drop.

    Encoded once and kept in RAM (6 MB a clip at full size). Each rank has a share, whatever the number of ranks.
    """

    def __init__(self, cfg, pipe, size, frames, autocast, rank, ranks):
        self.transformer, self.scheduler, self.autocast = pipe.transformer, pipe.scheduler, autocast
        self.count = {"image": cfg.val_pairs, "video": cfg.val_clips}
        self.share = {"image": [], "video": []}
        cfg = replace(cfg, seed=HELD_OUT_SEED, view_drop=0.0)
        datasets = {"image": ImagePairs(cfg.val_images, size, cfg.crop_jitter, cfg.seed),
                    "video": Clips(cfg.val_videos, size, frames, cfg.fps, cfg.random_frame, cfg.seed)}
        for task, micro in (("image", cfg.image_micro), ("video", cfg.video_micro)):
            n = self.count[task]
            for g in range(rank, -(-n // micro), ranks):
                keys = [(task, 0, i) for i in range(g * micro, min(n, (g + 1) * micro))]
                inputs = loss_inputs(cfg, pipe, next(batches(datasets, [keys])), task, 0, g)
                self.share[task].append({k: None if v is None else v.cpu() for k, v in inputs.items()})

    def losses(self, task):
        """(loss per sample, its timestep) of each micro-batch in this rank's share; LoRA dropout is off."""
        device = self.transformer.device
        self.transformer.eval()
        for inputs in self.share[task]:
            inputs = {k: None if v is None else v.to(device) for k, v in inputs.items()}
            with self.autocast:
                loss = v_loss(self.transformer, self.scheduler, **inputs)
            yield loss, inputs["timestep"]
        self.transformer.train()

    def scalars(self, task):
        """The same as scalars that sum to the mean over the whole batch, all ranks together: for the gradient."""
        return (loss.sum() / self.count[task] for loss, _ in self.losses(task))

    @torch.no_grad()
    def mean_losses(self):
        """{task: {"loss", "loss_by_timestep": 4 means}} over the whole batch, all ranks together."""
        means = {}
        for task in self.share:
            bins = torch.zeros(2, 4, device=self.transformer.device)
            for loss, timestep in self.losses(task):
                bins += by_timestep(loss, timestep, self.scheduler.config.num_train_timesteps)
            if dist.is_initialized():
                dist.all_reduce(bins)
            means[task] = mean_and_quarters(bins)
        return means


def sample_references(cfg, pipe, run, step, size, frames, rank, ranks):
    """A contact sheet for each picture in --val_refs, with a fixed seed: run/samples/NAME-000400.png."""
    pictures = sorted(f for f in Path(cfg.val_refs).glob("*") if f.with_suffix(".txt").is_file() and f.suffix != ".txt")
    (run / "samples").mkdir(exist_ok=True)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    for file in pictures[rank::ranks]:
        picture = load_image(file)
        prompt = file.with_suffix(".txt").read_text().strip()
        text = [encode_prompt(pipe, [t]).to(pipe.transformer.device)  # the text encoder may be in RAM
                for t in (with_reference_token(prompt, cfg.cls), "")]
        (video,) = generate(pipe, encode_references(pipe, [picture], *size), [prompt], [0],
                            frames=frames, height=size[0], width=size[1], text=text)
        contact_sheet(video, picture, max(1, 128 // video[0].height)).save(run / f"samples/{file.stem}-{step:06d}.png")
    pipe.transformer.train()


class Clock:
    """A moment on the device: `later - earlier` is seconds, and only asking for them waits."""

    def __init__(self, device):
        self.time, self.event = time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def __sub__(self, earlier):
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


class Log:
    """log.jsonl and the progress bar. A step's numbers are read one step late: nothing waits for the GPU."""

    def __init__(self, run, steps, start, device):
        self.run, self.device = run, device
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1, disable=run is None)
        self.pending, self.shown, self.unusable = None, {}, set()
        self.stop = False  # some rank got a SIGTERM, and all ranks know

    def write(self, file, record):
        if self.run:
            with open(self.run / file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def start(self):
        self.started = Clock(self.device)

    def step(self, step, task, numbers, lr):
        """numbers (10,): by_timestep's 8, requests to stop, the gradient norm."""
        numbers = numbers.to("cpu", non_blocking=True)  # sent now, behind this step's work, and read one step later
        ended = Clock(self.device)
        self.flush()
        self.pending = step, task, numbers, lr, self.started, ended

    def flush(self):
        if self.pending is None:
            return
        (step, task, numbers, lr, started, ended), self.pending = self.pending, None
        seconds = ended - started  # waits for the end of that step
        means, norm = mean_and_quarters(numbers[:8].view(2, 4)), numbers[9].item()
        self.stop |= numbers[8].item() > 0
        loss = means["loss"]
        if not (abs(loss) < float("inf") and norm < float("inf")):  # NaN fails both
            sys.exit(f"step {step} ({task}): loss {loss}, gradient norm {norm}. Stopped; the last checkpoint is good")
        self.write("log.jsonl", {"step": step, "task": task, **means, "lr": lr, "grad_norm": norm,
                                 "seconds": round(seconds, 4)})
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


# ---- a run on disk ---------------------------------------------------------------------------------------------------

def write(path, text):
    """Write a small file, all or nothing."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    os.replace(part, path)


def save_checkpoint(run, step, cfg, transformer, **state):
    """LoRA weights and training state, all or nothing: written under another name, flushed to disk, then renamed.

    A kill at any moment leaves the old checkpoints and at most a .tmp folder. A full disk ends the run with one line.
    """
    final, part = run / f"step-{step:06d}", run / f"step-{step:06d}.tmp"
    clear(run)
    try:
        save_lora(transformer, part, base=cfg.base, cls=str(cfg.cls), fps=str(cfg.fps),
                  trained_by=json.dumps(asdict(cfg)))
        torch.save({"step": step, **{k: v.state_dict() for k, v in state.items()}}, part / "training_state.pt")
        for file in [*part.iterdir(), part]:  # on the disk before it gets its name: a power cut cannot leave it empty
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.replace(part, final)
    except (OSError, RuntimeError, SafetensorError) as e:  # each library reports a full disk in its own way
        clear(run)
        sys.exit(f"cannot save {final}: {e}. Free some space and run the same command: it goes on from "
                 f"{newest_checkpoint(run) or 'the start'}")
    for old in sorted(d for d in run.glob("step-*") if d.suffix != ".tmp")[:-cfg.keep]:
        os.replace(old, f"{old}.tmp")  # never half a checkpoint under a good name
        shutil.rmtree(f"{old}.tmp")


def clear(run):
    """Remove what a killed save left."""
    for part in run.glob("step-*.tmp"):
        shutil.rmtree(part)


def resume(run, cfg, transformer, **state):
    """Restore the newest checkpoint; returns the step to go on from. ValueError when the run had other settings."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return 0
    before, now = json.loads((run / "config.json").read_text()), asdict(cfg)
    if differ := changed(before, {k: v for k, v in now.items() if k not in gradcos.NOT_TRAINED}):
        raise ValueError(f"{run} was started with other settings ({differ}): choose another --name")
    read_lora(transformer, checkpoint)
    saved = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu")
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def start_log(run, cfg, start):
    """config.json, and the logs without what they say of steps that will be run again."""
    run.mkdir(parents=True, exist_ok=True)
    clear(run)
    write(run / "config.json", json.dumps(asdict(cfg), indent=1))
    for log in run.glob("*.jsonl"):
        write(log, "".join(json.dumps(record) + "\n" for record in records(log) if record["step"] < start))


def records(log):
    """The records of a .jsonl file that are whole: a kill can cut the last line."""
    whole = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole


def main(cfg):
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM.set())
    diffusers_logging.disable_progress_bar()
    if cfg.toy:
        from toy import world
        world.ensure_data(cfg.images, cfg.videos, cfg.val_images, cfg.val_videos)
    train(cfg)
    if dist.is_initialized():  # after train() has returned: its DDP model must go before the group does
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main, Config, __doc__, **(TOY if any(a.split("=")[0] == "--toy" for a in sys.argv) else {}))
