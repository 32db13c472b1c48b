"""Trains subject-driven video generation without a single subject-video: Algorithm 1 of the paper, in one loop.
(5.1) cites a section of the paper; a knob that cites none is ours.

    torchrun --nproc_per_node=8 train.py      # the paper's run: CogVideoX-5B, Subjects200K, Pexels clips
    python train.py --toy                     # the same code on the toy world, minutes on two CPU cores

The model sees one picture of the subject, the reference, as extra tokens. Each step flips one coin. With probability p
it takes plain clips and learns image-to-video (motion): the reference is a random frame of the clip with half of its
tokens dropped, so that it cannot just be copied. Otherwise it takes pairs of pictures of one subject and learns to make
one from the other (identity); half of these steps' micro-batches come without the reference, so that the model also
follows the caption. The same LoRA learns both.

A run writes out/NAME/: config.json, log.jsonl (one line per step), step-000400/ (LoRA weights and training state); and
what --gradcos_every, --val_every and --sample_every ask for: gradcos.jsonl, val.jsonl, samples/.
Run the same command to continue from the newest checkpoint: on a CPU bit for bit, on a GPU
to its rounding. On SIGTERM a run finishes its step, saves a checkpoint and stops.
"""
import argparse
import importlib.util
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from transformers.hf_argparser import string_to_bool

import gradcos
from data import ImagePairs, Clips, batches, clip_frames, cls_for, normalise, open_caches
from run import (SIGTERM, check, claim, command_line, join_ranks, knob, newest_checkpoint, print0, rank_and_world_size,
                 resume, rng, save_checkpoint, sigterm_asks, start_log, torch_rng)

if not {"-h", "--help"} & set(sys.argv):  # diffusers takes seconds to import: --help is fast
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
    from diffusers.utils import logging as diffusers_logging

    from base import (attention_order, autocast, compute_dtype, find_device, frame_size, load_pipeline, tile_vae,
                      warn_of_another_size)
    from model import (add_lora, encode_moments, encode_prompt, load_lora, lora_header, read_lora, sample_latents,
                       save_lora, to_device, v_loss, with_reference_token)
    from watch import Log, Validation, add_losses, already_measured, describe, no_losses, sum_over_ranks


CHECKPOINTING = ("full", "attention", "none")


@dataclass
class Config:
    toy: bool = knob(False, "take the defaults of the toy world (TOY in train.py); other flags still count")
    recipe: str = knob("paper", "defaults from the paper's text, or the authors' scripts (AUTHORS)", "paper", "authors")
    # model
    base: str = knob("THUDM/CogVideoX-5b", "diffusers CogVideoX folder or hub id (5.1)")
    int8: bool = knob(False, "keep the frozen transformer in 8 bits (torchao): half the memory, for a 24 GB GPU")
    lora_rank: int = knob(128, "LoRA rank (A.1)")
    lora_alpha: float = knob(64.0, "LoRA alpha; the update is scaled by alpha/rank (A.1)")
    lora_dropout: float = knob(0.1, "LoRA dropout (5.1)")
    lora_scope: str = knob("all", "tokens LoRA acts on: 'all' in the authors' code (3.3, A)", "all", "reference")
    init_lora: str = knob("", "LoRA file or folder to continue from, e.g. the 8 fps model for the 16 fps one (5.1)")
    # data
    images: str = knob("data/subjects200k", "folder of image pairs: D_img (5.1)")
    videos: str = knob("data/pexels", "folder of clips with captions: D_vid (5.1)")
    cache: str = knob("", "folder of latents that python -m paper.prepare cache wrote; empty encodes on the fly")
    height: int = knob(0, "frame height in pixels; 0 takes the base's: 480 (Alg. 1)")
    width: int = knob(0, "frame width in pixels; 0 takes the base's: 720 (Alg. 1)")
    frames: int = knob(49, "frames of a training clip, cut to 8k+1 (A.2)")
    fps: float = knob(8.0, "frames per second that clips are read at (A.2)")
    fit: str = knob("cover", "references of pairs: cropped around the centre, or with white borders", "cover", "pad")
    crop_jitter: float = knob(0.1, "random zoom and shift of each picture of a pair, as a share of its size (A.2)")
    # the method
    p: float = knob(0.2, "probability of a video step (Eq. 1, D.5)")
    task_schedule: str = knob("switch", "a coin for each step, or for each of image_batch/image_micro micro-batches "
                                        "(B.3), or all image steps first (D.7)", "switch", "mixed", "two_stage")
    random_frame: bool = knob(True, "reference = a random frame of the clip, not always the first (3.4, Figure 12)")
    token_drop: float = knob(0.5, "share of reference tokens dropped in video steps; 1 is text-to-video (Table 7)")
    drop: str = knob("tokens", "what --token_drop drops: tokens (3.4), or whole references", "tokens", "reference")
    view_drop: float = knob(0.5, "probability that an image micro-batch trains without its reference (A.2)")
    image_frame: str = knob("first", "latent frame at which an image step's target stands: 1 (3.3), or any of a clip's",
                            "first", "random")
    cls: str = knob("front", "where <cls>, the reference's mark, stands (3.3, Table 6)", "front", "item", "off")
    cls_video: bool = knob(True, "video prompts get <cls> too")
    # optimisation
    steps: int = knob(4000, "optimiser steps (5.1)")
    image_batch: int = knob(256, "image pairs per image step, all ranks together (5.1)")
    video_batch: int = knob(32, "clips per video step, all ranks together (5.1)")
    image_micro: int = knob(1, "image pairs per forward pass at most; the rest of the batch is accumulated")
    video_micro: int = knob(1, "clips per forward pass at most")
    lr: float = knob(5e-5, "peak learning rate of AdamW (5.1)")
    beta1: float = knob(0.9, "AdamW beta1 (A.2)")
    beta2: float = knob(0.95, "AdamW beta2 (A.2)")
    weight_decay: float = knob(1e-4, "AdamW weight decay (the paper is silent)")
    warmup: int = knob(200, "steps of linear warm-up (A.2)")
    cycles: int = knob(1, "cosine restarts over the run (the paper gives no number; 1 is a plain cosine)")
    grad_clip: float = knob(1.0, "gradient norm clipping (A.2)")
    # the run
    name: str = knob("subject", "the run lives in out/NAME")
    out: str = knob("out", "where runs live")
    seed: int = knob(0, "seed of everything random")
    save_every: int = knob(50, "steps between checkpoints (A.2)")
    keep_checkpoints: int = knob(3, "newest checkpoints that stay on disk")
    image_checkpointing: str = knob("none", "what backward recomputes: all (A.1), all but attention", *CHECKPOINTING)
    video_checkpointing: str = knob("attention", "the same in video steps", *CHECKPOINTING)
    compile: bool = knob(False, "compile the blocks: faster steps, after minutes for each new shape of a micro-batch")
    vae_tiling: bool = knob(True, "encode in tiles, one sample at a time, to save memory (A.2)")
    workers: int = knob(4, "processes per rank that read data")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    guidance: float = knob(6.0, "guidance scale when sampling, here and in sample.py (the authors' code)")
    # watching the run: none of this changes what is trained
    gradcos_every: int = knob(0, "steps between measurements of the two gradients' cosine (4.1, B.1); 0 never")
    val_every: int = knob(0, "steps between held-out losses (B.1's batches); 0 never")
    sample_every: int = knob(0, "steps between samples from --val_refs; 0 never")
    val_images: str = knob("data/subjects200k_val", "image pairs of subjects that are not trained on (B.1)")
    val_videos: str = knob("data/pexels_val", "clips that are not trained on (B.1)")
    val_pairs: int = knob(64, "held-out image pairs to measure with")
    val_clips: int = knob(32, "held-out clips to measure with")
    val_refs: str = knob("", "folder of pictures to sample from, each with its prompt in a .txt file of its name")
    tensorboard: bool = knob(False, "write losses, norms, the cosine and sample sheets to out/NAME/tensorboard as well")
    # an alternative to the coin alone
    pcgrad: int = knob(0, "PCGrad against the gradients of this many last steps (4.3, B.3; Table 5: 4, 8); 0 is off")
    grad_device: str = knob("", "where flat gradients live (cosine: two, PCGrad: one per buffered step; 2 GB each); "
                                "'cpu' keeps them off the GPU")

    def __init__(self, **given):
        """A knob that is not given has the default of --toy or --recipe, where those set one, else the one above."""
        defaults = {f.name: f.default for f in fields(self)}
        if unknown := given.keys() - defaults.keys():
            raise TypeError(f"there is no knob {min(unknown)!r}")
        self.__dict__ |= defaults | presets(given.get("toy", False), given.get("recipe", "paper")) | given
        check(self, shares="p token_drop view_drop lora_dropout crop_jitter beta1 beta2",
              positive="lora_rank lora_alpha frames fps steps image_batch video_batch image_micro video_micro lr "
                       "cycles grad_clip save_every keep_checkpoints val_pairs val_clips")
        if self.base == TOY["base"] and not Path(self.base).is_dir():
            raise ValueError(f"no {self.base} here: run it from the repository's root")
        if self.sample_every and not Path(self.val_refs or "none").is_dir():
            raise ValueError(f"--sample_every needs a folder of pictures and prompts: no --val_refs {self.val_refs!r}")
        if self.pcgrad == 1 or self.pcgrad and self.task_schedule == "mixed":
            raise ValueError("--pcgrad: a buffer needs 2 or more steps, each of one task (no --task_schedule mixed)")
        if self.lora_scope == "reference" and (self.view_drop > 0 or self.token_drop == 1
                                               or self.token_drop > 0 and self.drop == "reference"):
            raise ValueError("--lora_scope reference has nothing to train in a batch without reference tokens: "
                             "it needs --view_drop 0, and --token_drop below 1 (0 with --drop reference)")


TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", cache="toy/data/cache",
           name="toy", lora_rank=32, lora_alpha=16.0, lora_dropout=0.0, frames=9, fps=4.0, crop_jitter=0.0,
           view_drop=0.0, steps=450, image_batch=16, image_micro=16, video_batch=16, video_micro=16,
           lr=6e-3, warmup=30, save_every=100, video_checkpointing="none", vae_tiling=False, guidance=2.0,
           workers=4 if torch.cuda.is_available() else 0,  # on a CPU they would take the cores that train
           val_images="toy/data/val_pairs", val_videos="toy/data/val_clips", val_refs="toy/refs", val_every=100,
           sample_every=450)
AUTHORS = dict(drop="reference", task_schedule="mixed", view_drop=0.0, crop_jitter=0.0, lora_dropout=0.0, cls="front",
               cls_video=False, vae_tiling=False, image_micro=8, video_micro=1, image_checkpointing="attention")
TOY_AUTHORS = dict(image_micro=2, video_micro=2)  # 8 micro-batches a step: as many pairs and clips as the toy's coin


def presets(toy=False, recipe="paper"):
    """What --toy and --recipe put in the place of Config's defaults, on the command line and from Python."""
    changed = dict(TOY) if toy else {}
    if recipe == "authors":
        changed |= AUTHORS
        if toy:
            changed |= TOY_AUTHORS
    return changed


# ---- what a step is --------------------------------------------------------------------------------------------------
# Every random draw is made from (seed, stream, step, micro-batch), so there is no random state to save. A resumed run
# makes the same draws, and so does a run on another number of ranks with the same micro-batch sizes.

def sample_task(cfg, step, *micro_index):
    """Eq. 1, TaskSelect: "video" with probability p, else "image". One coin per step, the same on every rank. With the
    schedule 'mixed' a step is "mixed", and each micro_index has its coin: on average (1-p) g_img + p g_vid (B.3)."""
    if cfg.task_schedule == "two_stage":
        return "image" if step < image_stage(cfg) else "video"
    if cfg.task_schedule == "mixed" and not micro_index:
        return "mixed"
    u = rng(cfg.seed, "coin", step, *micro_index).random()
    return "video" if u < cfg.p else "image"


class MicroBatch(NamedTuple):
    """One micro-batch of this rank. Everything that is drawn for it follows from the seed, its step and its index."""
    task: str   # "image" or "video"
    step: int
    index: int  # its place among the micro-batches that all ranks have in this step
    keys: list  # (task, step, index of the sample) of each of its samples: what the data sets are asked for


def plan(cfg, step):
    """This rank's micro-batches of a step. The loader reads them ahead and the loop trains on them: the same list."""
    rank, world_size = rank_and_world_size()
    step_task = sample_task(cfg, step)
    if step_task == "video":
        count = cfg.video_batch // cfg.video_micro  # of all ranks together
    else:
        count = cfg.image_batch // cfg.image_micro
    micros = []
    for index in range(rank, count, world_size):  # micro-batches go to the ranks in turn
        task = sample_task(cfg, step, index) if step_task == "mixed" else step_task
        size = cfg.video_micro if task == "video" else cfg.image_micro
        micros.append(MicroBatch(task, step, index, [(task, step, index * size + j) for j in range(size)]))
    return micros


def token_drop(cfg, step, micro_index, n):
    """TokenDrop (3.4) in a video micro-batch. Returns which of the n reference tokens to KEEP, a random share of
    1 - token_drop, as sorted indices (K,), or None for all. K is fixed, so that shapes stay the same. With --drop
    reference all are kept or none, as in the authors' scripts."""
    if cfg.drop == "reference":
        return all_or_none(cfg, cfg.token_drop, step, micro_index)
    kept = round((1 - cfg.token_drop) * n)
    if cfg.lora_scope == "reference":
        kept = max(kept, 1)  # LoRA needs a token to act on
    if kept == n:
        return None
    return torch.from_numpy(rng(cfg.seed, "drop", step, micro_index).permutation(n)[:kept]).sort().values


def view_drop(cfg, step, micro_index):
    """View drop (A.2) in an image micro-batch, so that the model also learns from the caption alone."""
    return all_or_none(cfg, cfg.view_drop, step, micro_index)


def image_frame(cfg, step, micro_index, latent_frames):
    """The latent frame (of RoPE) at which the target of an image micro-batch stands. The reference is frame 0, and a
    picture is one frame long, so the paper's is always frame 1 (3.3): what image steps teach, they teach at one
    distance from the reference, while a clip has frames 1..T. With --image_frame random it is any of those."""
    if cfg.image_frame == "first":
        return 1
    return int(rng(cfg.seed, "image frame", step, micro_index).integers(1, latent_frames, endpoint=True))


def all_or_none(cfg, drop, step, micro_index):
    """Which reference tokens of a micro-batch to KEEP: None for all; with probability `drop` an empty index: none."""
    if rng(cfg.seed, "drop", step, micro_index).random() < drop:
        return torch.empty(0, dtype=torch.long)
    return None


def encode_batch(cfg, pipe, batch, keep, noise_rng):
    """A batch of the loader -> latents x (B,T,C,H,W), reference latents (B,1,C,H,W), text (B,L,D), on the device.

    Pixels (uint8) go through the VAE; a cache holds the VAE's moments instead. Latents are sampled from the moments
    either way. The reference is encoded on its own, not cut from the clip's latents. When `keep` keeps none of it,
    zeros stand in for it."""
    device = pipe.transformer.device

    def encode(pixels_or_moments):
        moments = to_device(pixels_or_moments, device)
        if moments.dtype == torch.uint8:
            moments = encode_moments(pipe.vae, normalise(moments))
        return sample_latents(pipe.vae, moments, noise_rng)
    x = encode(batch["pixels"])
    if keep is None or len(keep):
        ref = encode(batch["reference"])
    else:
        ref = torch.zeros_like(x[:, :1])
        torch.randn(ref.shape, generator=noise_rng)  # unused: so t and noise are those of a batch with its reference
    if "text" in batch:
        text = to_device(batch["text"], device)
    else:
        cls = cls_for(cfg, batch["keys"][0][0])
        prompts = [with_reference_token(t, cls, item) for t, item in zip(batch["prompt"], batch["item"])]
        text = to_device(encode_prompt(pipe, prompts), device)
    return x, ref, text


def sample_noise(x, scheduler, noise_rng):
    """A uniform timestep (B,) and noise like x."""
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), generator=noise_rng)
    return to_device(t, x.device), to_device(torch.randn(x.shape, generator=noise_rng), x.device)


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------

def train(cfg):
    rank, world_size = rank_and_world_size()
    device = find_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 (A.2)
    # Ranks wait for those that measure and sample: two hours are 40 samples of three minutes on the slowest one.
    join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    run = Path(cfg.out) / cfg.name
    cfg = divide_batches(cfg, world_size)
    cfg, pipe, parameters = load_model(cfg, device)
    datasets, size, frames, n_ref = open_data(cfg, pipe)            # n_ref: tokens of a whole reference
    transformer = pipe.transformer.to(device)
    pipe.vae.to(device)
    pipe.text_encoder.to(device)
    num_timesteps = pipe.scheduler.config.num_train_timesteps
    T = latent_frames(pipe, frames)

    optimizer, lr_schedule = make_optimizer(cfg, parameters)
    state = {"optimizer": optimizer, "lr_schedule": lr_schedule}
    if cfg.pcgrad:
        state["pcgrad"] = gradcos.PCGrad(cfg.pcgrad, cfg.grad_device or device)
    if rank == 0:
        claim(run)
    start = resume(run, asdict(cfg), lambda checkpoint: read_lora(transformer, checkpoint), state)
    if start == cfg.steps and already_measured(cfg, run, start):
        return print0(f"{run} is complete ({start} steps); choose another --name for a new run")
    if rank == 0:
        start_log(run, asdict(cfg), start)
    describe(cfg, run, parameters, datasets, size, start, device)

    model = transformer
    if world_size > 1:
        # Every rank builds the same weights, so DDP need not broadcast them (it cannot broadcast 8-bit ones).
        model = torch.nn.parallel.DistributedDataParallel(transformer, gradient_as_bucket_view=True, init_sync=False)
    log = Log(run if rank == 0 else None, start, [sample_task(cfg, s) for s in range(cfg.steps)], device,
              cfg.tensorboard)
    held_out = held_out_batches(cfg, pipe, size, frames, n_ref)
    validation = Validation(cfg, pipe, run, size, frames, held_out, log)
    if all(dataset.cache and dataset.cache.prompts for dataset in datasets.values()):
        pipe.text_encoder = None  # frees its memory: training prompts are cached, and Validation has encoded its own
    ahead = (micro.keys for step in range(start, cfg.steps) for micro in plan(cfg, step))
    loader = batches(datasets, ahead, cfg.workers)

    for step in range(start, cfg.steps + 1):
        # Between two steps, and after the last: once in a while save, stop if asked, measure.
        last = step == cfg.steps
        if step > start and (step % cfg.save_every == 0 or last or log.stop):
            log.flush()
            if rank == 0:
                save_checkpoint(run, step, cfg.keep_checkpoints, lambda folder: save(transformer, folder, cfg), state)
        if log.stop and not last:
            break
        validation.measure(step)                                     # does not affect training
        if last:
            break

        # One step of Algorithm 1.
        log.start()
        task = sample_task(cfg, step)                                # Eq. 1: "video" with probability p
        micros = plan(cfg, step)
        losses = no_losses(device)
        for micro in micros:
            batch = next(loader)                                     # pairs, or clips with a random frame (3.4)
            if micro.task == "video":                                # keep: which of the reference's tokens stay
                keep = token_drop(cfg, step, micro.index, n_ref)     # (K,): a random part of them
                first_frame = 1                                      # frames 1..T, the reference is 0
            else:
                keep = view_drop(cfg, step, micro.index)             # None: all of them; empty: none
                first_frame = image_frame(cfg, step, micro.index, T)  # 1, the paper's, or any of 1..T
            noise_rng = torch_rng(cfg.seed, "noise", step, micro.index)
            x, ref, text = encode_batch(cfg, pipe, batch, keep, noise_rng)      # (B,T,C,H,W), (B,1,C,H,W), (B,L,D)
            keep = None if keep is None else to_device(keep, device)
            t, noise = sample_noise(x, pipe.scheduler, noise_rng)    # (B,), (B,T,C,H,W)

            torch.manual_seed(torch_rng(cfg.seed, "dropout", step, micro.index).initial_seed())  # for LoRA dropout
            sync = micro is micros[-1]                               # ranks average gradients in the last backward
            with nullcontext() if sync or world_size == 1 else model.no_sync():
                with autocast(device):                               # bfloat16 on a GPU
                    loss = v_loss(model, pipe.scheduler, x, text, t, noise, ref, keep,  # (B,): L_vid or L_img
                                  first_frame)
                (loss.mean() / len(micros)).backward()               # g_vid or g_img
            add_losses(losses, micro.task, loss, t, num_timesteps)
            log.skipped(batch["skipped"])                            # unreadable files
        if cfg.pcgrad:
            state["pcgrad"](parameters, task)                        # 4.3: project out the other task's gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()                                             # theta <- theta - eta g
        lr = lr_schedule.get_last_lr()[0]
        lr_schedule.step()
        optimizer.zero_grad(set_to_none=world_size == 1)             # DDP owns them: zeroed, not freed
        # One sum over ranks for the losses and the request to stop: all ranks stop at the same step.
        stop = torch.full((1,), float(SIGTERM.is_set()), device=device)
        sums = sum_over_ranks({**losses, "stop": stop})
        log.step(step, task, lr, {**sums, "grad_norm": grad_norm})

    log.close()
    if log.stop and not last:
        return print0(f"stopped by SIGTERM after {step} steps; run the same command to continue")
    print0(f"done: {newest_checkpoint(run)}. Next: python sample.py --lora {run} --ref PICTURE --prompt '...'")


# ---- the parts of a run ----------------------------------------------------------------------------------------------

def image_stage(cfg):
    """Image steps of 'two_stage' (D.7): as many as the coin would give on average."""
    return round((1 - cfg.p) * cfg.steps)


def divide_batches(cfg, world_size):
    """cfg with batches and micro-batches that divide by the ranks: others are made smaller, with a message. ValueError
    for a batch of fewer samples than ranks."""
    for task in ("image",) if cfg.task_schedule == "mixed" else ("image", "video"):
        batch, micro = getattr(cfg, f"{task}_batch"), getattr(cfg, f"{task}_micro")
        if batch < world_size:
            raise ValueError(f"--{task}_batch {batch} is too small for {world_size} ranks")
        if batch % world_size:
            print0(f"--{task}_batch {batch} is now {batch - batch % world_size}: a multiple of {world_size} ranks")
            batch -= batch % world_size
        fits = max(m for m in range(1, micro + 1) if batch % (m * world_size) == 0)
        if fits != micro:
            print0(f"--{task}_micro {micro} is now {fits}: it must divide {batch} samples on {world_size} rank(s)")
        cfg = replace(cfg, **{f"{task}_batch": batch, f"{task}_micro": fits})
    if cfg.task_schedule == "mixed":
        print0(f"--task_schedule mixed: {cfg.image_batch // cfg.image_micro} coins a step, each for {cfg.image_micro} "
               f"pairs or {cfg.video_micro} clips (--image_micro, --video_micro)")
    return cfg


def load_model(cfg, device):
    """(cfg, pipeline, LoRA parameters): a frozen base in bfloat16, LoRA in float32; on a CPU everything is float32."""
    if cfg.init_lora:
        lora_header(cfg.init_lora)  # a bad file fails here, before the base is loaded
    pipe = load_pipeline(cfg.base, compute_dtype(device), int8=cfg.int8, asked=cfg.device)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # else copied there in every step
    if cfg.vae_tiling:
        tile_vae(pipe.vae)
    transformer = pipe.transformer.train()
    if cfg.init_lora:  # rank, alpha and scope come from the file
        parameters = load_lora(transformer, cfg.init_lora, cfg.lora_dropout)
        config = transformer.peft_config["default"]
        cfg = replace(cfg, lora_rank=config.r, lora_alpha=config.lora_alpha, lora_scope=transformer.lora_scope)
    else:
        torch.manual_seed(cfg.seed)  # every rank starts from the same LoRA
        parameters = add_lora(transformer, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_scope)
    transformer.checkpointing = {"image": cfg.image_checkpointing, "video": cfg.video_checkpointing}
    if cfg.compile:
        transformer.compile_blocks()
    return cfg, pipe, parameters


def open_data(cfg, pipe):
    """(data sets, (height, width), frames, tokens of a whole reference: 1,350 at 480 x 720). Only what p asks for is
    opened."""
    height, width = cfg.height or frame_size(pipe)[0], cfg.width or frame_size(pipe)[1]
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    if height % multiple or width % multiple:
        raise ValueError(f"--height and --width must be multiples of {multiple}, got {height} x {width}")
    frames = clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    if frames != cfg.frames:
        print0(f"--frames {cfg.frames} cut to {frames}: the VAE takes no other length")
    warn_of_another_size(pipe, height, width, frames)
    if cfg.image_frame == "random" and not pipe.transformer.config.use_rotary_positional_embeddings:
        raise ValueError("--image_frame random chooses rows of the RoPE tables, and this base has no RoPE")
    datasets, caches = {}, open_caches(cfg, pipe, (height, width), frames)
    if cfg.p < 1:
        datasets["image"] = ImagePairs(cfg.images, (height, width), cfg.crop_jitter, cfg.seed, caches["image"], cfg.fit)
    if cfg.p > 0:
        if frames == 1:
            raise ValueError(f"--frames {cfg.frames}: video steps need clips of more frames, or --p 0")
        datasets["video"] = Clips(cfg.videos, (height, width), frames, cfg.fps, cfg.random_frame, cfg.seed,
                                  caches["video"])
    for task, dataset in datasets.items():
        dataset[0, 0]  # read one sample now: bad data fails here, not in a worker
        if dataset.cache and dataset.cache.cached < len(dataset):
            print0(f"{cfg.cache} holds {dataset.cache.cached} of {len(dataset)} {task}s; the others are left out (if "
                   "they are new: run python -m paper.prepare cache again)")
    return datasets, (height, width), frames, (height // multiple) * (width // multiple)


def latent_frames(pipe, frames):
    """T: how many latent frames the VAE makes of a clip of 8k+1 frames (13 of 49)."""
    return (frames - 1) // pipe.vae_scale_factor_temporal + 1


def held_out_batches(cfg, pipe, size, frames, n_ref):
    """This rank's held-out micro-batches, (task, inputs of v_loss), as in B.1: fixed samples, noise, timesteps, kept
    tokens and image frames, without view drop. They depend on the flags of data, prompts, token drop, image frame and
    micro-batch sizes, not on --seed: compare held-out losses of runs that share these."""
    cfg = replace(cfg, seed=2**31 - 1)
    rank, world_size = rank_and_world_size()
    datasets = {"image": ImagePairs(cfg.val_images, size, cfg.crop_jitter, cfg.seed, fit=cfg.fit, in_order=True),
                "video": Clips(cfg.val_videos, size, frames, cfg.fps, cfg.random_frame, cfg.seed, in_order=True)}
    for task, micro, n in (("image", cfg.image_micro, cfg.val_pairs), ("video", cfg.video_micro, cfg.val_clips)):
        n = min(n, len(datasets[task]))  # each pair or clip once
        for first in range(rank * micro, n, world_size * micro):
            micro_index, keys = first // micro, [(task, 0, i) for i in range(first, min(n, first + micro))]
            noise_rng = torch_rng(cfg.seed, "noise", 0, micro_index)
            keep = token_drop(cfg, 0, micro_index, n_ref) if task == "video" else None
            first_frame = image_frame(cfg, 0, micro_index, latent_frames(pipe, frames)) if task == "image" else 1
            batch = next(batches(datasets, [keys]))
            for reason in batch["skipped"]:
                print(f"skipped, held out: {reason}", file=sys.stderr)
            x, ref, text = encode_batch(cfg, pipe, batch, keep, noise_rng)
            t, noise = sample_noise(x, pipe.scheduler, noise_rng)
            yield task, dict(latents=x, text=text, timestep=t, noise=noise, reference=ref, keep=keep,
                             first_frame=first_frame)


def make_optimizer(cfg, parameters):
    """AdamW and its learning rate: warm-up, then cosine with restarts (A.2)."""
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=True)  # one kernel for all parameters

    def decay_over(steps):
        return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, cfg.warmup, steps, cfg.cycles)
    first = image_stage(cfg)
    if cfg.task_schedule != "two_stage" or first in (0, cfg.steps):
        return optimizer, decay_over(cfg.steps)
    # Two trainings, one after the other: with one decay over both the second would have a learning rate near zero.
    stages = [decay_over(first), decay_over(cfg.steps - first)]
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, stages, [first])


def save(transformer, folder, cfg):
    """The LoRA with what sample.py needs to know of its training in the file's header."""
    save_lora(transformer, folder, base=cfg.base, cls=cfg.cls, fit=cfg.fit, fps=str(cfg.fps),
              guidance=str(cfg.guidance), trained_by=json.dumps(asdict(cfg)))


def main(cfg):
    if cfg.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
    diffusers_logging.disable_progress_bar()
    with sigterm_asks():
        if cfg.toy:
            from toy import world
            cfg = world.ensure_data(cfg)
        with attention_order(find_device(cfg.device)):
            train(cfg)
    if dist.is_initialized():  # train() must return first: its DDP model uses the group
        dist.barrier()
        dist.destroy_process_group()


def defaults(argv):
    """The presets that a command line asks for, so that --help shows them. A flag given by hand wins over them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--toy", type=string_to_bool, nargs="?", const=True, default=False)
    parser.add_argument("--recipe", default="paper")
    asked, _ = parser.parse_known_args(argv)
    return presets(asked.toy, asked.recipe)


if __name__ == "__main__":
    command_line(main, Config, __doc__, **defaults(sys.argv),
                 out_of_memory="a smaller --image_micro or --video_micro, --image_checkpointing full, "
                               "--video_checkpointing full, --vae_tiling True, --int8 True")
