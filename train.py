"""Trains subject-driven video generation without a single subject-video: Algorithm 1 of the paper, in one loop.
Brackets cite the paper's sections; a knob without brackets is not in the paper.

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
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import gradcos
from data import ImagePairs, Clips, batches, clip_frames, normalise, open_caches
from run import (SIGTERM, Log, check_bounds, check_choices, command_line, join_ranks, knob, listen_for_sigterm,
                 loss_means, newest_checkpoint, print0, rank_and_world_size, records, resume, rng, save_checkpoint,
                 start_log, sum_over_ranks, torch_rng)

if not {"-h", "--help"} & set(sys.argv):  # diffusers takes seconds to import: --help does without
    from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup
    from diffusers.utils import logging as diffusers_logging

    from model import (add_lora, attention_order, encode_moments, encode_prompt, find_device, frame_size, load_lora,
                       load_pipeline, read_lora, sample_latents, save_lora, tile_vae, to_device, v_loss,
                       with_reference_token)
    from sample import write_sample_sheets


@dataclass
class Config:
    toy: bool = knob(False, "take the defaults of the toy world (TOY below); other flags still count")
    # model
    base: str = knob("THUDM/CogVideoX-5b", "diffusers CogVideoX folder or hub id (5.1)")
    int8: bool = knob(False, "keep the frozen transformer in 8 bits (torchao): half the memory, for a 24 GB GPU")
    lora_rank: int = knob(128, "LoRA rank (A.1)")
    lora_alpha: float = knob(64.0, "LoRA alpha; the update is scaled by alpha/rank (A.1)")
    lora_dropout: float = knob(0.1, "LoRA dropout (5.1)")
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
    task_schedule: str = knob("switch", "'switch' flips the coin each step; 'two_stage': all image steps first (D.7)")
    random_frame: bool = knob(True, "reference = a random frame of the clip, not always the first (3.4, Figure 12)")
    token_drop: float = knob(0.5, "share of reference tokens dropped in video steps; 1 is text-to-video (Table 7)")
    view_drop: float = knob(0.5, "probability that an image micro-batch trains without its reference (A.2)")
    cls: bool = knob(True, "prepend <cls> to prompts (3.3, Table 6)")
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
    image_checkpointing: str = knob("none", "what backward recomputes in image steps: 'full' (A.1), 'attention' (all "
                                            "but attention: its output is kept) or 'none'; less takes more memory")
    video_checkpointing: str = knob("attention", "the same in video steps")
    compile: bool = knob(False, "compile the blocks: faster steps, after minutes for each new shape of a micro-batch")
    vae_tiling: bool = knob(True, "encode in tiles, one sample at a time, to save memory (A.2)")
    workers: int = knob(4, "processes per rank that read data")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    guidance: float = knob(6.0, "guidance scale of its samples, here and in sample.py (the authors' code)")
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
        check_bounds(
            self, shares="p token_drop view_drop lora_dropout crop_jitter beta1 beta2",
            positive="lora_rank lora_alpha frames fps steps image_batch video_batch image_micro video_micro lr cycles "
                     "grad_clip save_every keep_checkpoints val_pairs val_clips",
            not_negative="height width seed weight_decay warmup workers guidance gradcos_every val_every sample_every "
                         "pcgrad")
        if self.sample_every and not Path(self.val_refs or "none").is_dir():
            raise ValueError(f"--sample_every needs a folder of pictures and prompts: no --val_refs {self.val_refs!r}")
        if self.pcgrad == 1:
            raise ValueError("--pcgrad 1 only ever holds the step's own task: a buffer needs 2 or more")
        check_choices(self, task_schedule="switch two_stage", image_checkpointing="full attention none",
                      video_checkpointing="full attention none")
        if self.lora_scope == "reference" and (self.view_drop > 0 or self.token_drop == 1):
            raise ValueError("--lora_scope reference has nothing to train in a batch without reference tokens: "
                             "it needs --view_drop 0 and --token_drop below 1")


TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", cache="toy/data/cache",
           name="toy", lora_rank=32, lora_alpha=16.0, lora_dropout=0.0, frames=9, fps=4.0, crop_jitter=0.0,
           view_drop=0.0, steps=500, image_batch=16, image_micro=16, video_batch=8, video_micro=8,
           lr=3e-3, warmup=30, save_every=100, video_checkpointing="none", vae_tiling=False, workers=0, guidance=2.0,
           val_images="toy/data/val_pairs", val_videos="toy/data/val_clips", val_refs="toy/refs", val_every=100,
           sample_every=250)


# ---- what a step is --------------------------------------------------------------------------------------------------
# Every draw below is made from (seed, stream, step, micro-batch): a resumed run and any number of ranks repeat it.

def sample_task(cfg, step):
    """Eq. 1, TaskSelect: "video" with probability p, else "image". One coin per step, the same on every rank."""
    if cfg.task_schedule == "two_stage":
        return "image" if step < image_stage(cfg) else "video"
    u = rng(cfg.seed, "coin", step).random()
    return "video" if u < cfg.p else "image"


def image_stage(cfg):
    """Steps of the first stage of 'two_stage' (D.7): each task gets as many as the coin would give it."""
    return round((1 - cfg.p) * cfg.steps)


def token_drop(cfg, step, micro_index, n):
    """TokenDrop (3.4): the reference tokens that a video micro-batch keeps, a random (1 - token_drop) share of n.

    Sorted indices (K,), or None for all n. K is fixed, so that shapes stay the same from step to step."""
    kept = round((1 - cfg.token_drop) * n)
    if cfg.lora_scope == "reference":
        kept = max(kept, 1)  # LoRA needs a token to act on
    if kept == n:
        return None
    return torch.from_numpy(rng(cfg.seed, "drop", step, micro_index).permutation(n)[:kept]).sort().values


def view_drop(cfg, step, micro_index):
    """View drop (A.2): None keeps the whole reference of an image micro-batch; with probability view_drop an empty
    index keeps nothing of it, so that the model also learns from the caption alone."""
    if rng(cfg.seed, "drop", step, micro_index).random() < cfg.view_drop:
        return torch.empty(0, dtype=torch.long)
    return None


def encode_batch(cfg, pipe, batch, noise_rng):
    """A batch of the loader -> latents x (B,T,C,H,W), reference latents (B,1,C,H,W), text (B,L,D), on the device.

    Pixels (uint8) go through the VAE; a cache holds the VAE's moments instead. Both end in a draw of latents. The
    reference picture is encoded alone: it is no slice of a clip's latents."""
    device = pipe.transformer.device

    def encode(pixels_or_moments):
        moments = to_device(pixels_or_moments, device)
        if moments.dtype == torch.uint8:
            moments = encode_moments(pipe.vae, normalise(moments))
        return sample_latents(pipe.vae, moments, noise_rng)
    x, ref = encode(batch["pixels"]), encode(batch["reference"])
    if "text" in batch:
        text = to_device(batch["text"], device)
    else:
        text = to_device(encode_prompt(pipe, [with_reference_token(t, cfg.cls) for t in batch["prompt"]]), device)
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
    join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    run = Path(cfg.out) / cfg.name

    cfg, grad_accum_steps = divide_batches(cfg, world_size)
    micro_batch_size = {"image": cfg.image_micro, "video": cfg.video_micro}
    cfg, pipe, parameters = load_model(cfg, device)
    datasets, size, frames = open_data(cfg, pipe)
    transformer = pipe.transformer.to(device)
    pipe.vae.to(device)
    if not all(dataset.cache and dataset.cache.prompts for dataset in datasets.values()):
        pipe.text_encoder.to(device)  # else it stays in RAM, for the held-out prompts and the samples
    num_timesteps = pipe.scheduler.config.num_train_timesteps
    n_ref = reference_tokens(pipe, size)  # tokens of the whole reference

    optimizer, lr_schedule = make_optimizer(cfg, parameters)
    state = {"optimizer": optimizer, "lr_schedule": lr_schedule}
    if cfg.pcgrad:
        state["pcgrad"] = gradcos.PCGrad(cfg.pcgrad, cfg.grad_device or device)
    start = resume(run, asdict(cfg), lambda checkpoint: read_lora(transformer, checkpoint), state)
    if start == cfg.steps and already_measured(cfg, run, start):
        return print0(f"{run} is complete ({start} steps); choose another --name for a new run")
    if rank == 0:
        start_log(run, asdict(cfg), start)
    describe(cfg, run, parameters, datasets, size, start, device)

    model = transformer
    if world_size > 1:
        # Every rank made the same LoRA on the same base: nothing to broadcast (8-bit weights could not be).
        model = torch.nn.parallel.DistributedDataParallel(transformer, gradient_as_bucket_view=True, init_sync=False)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
    log = Log(run if rank == 0 else None, start, cfg.steps, device)
    validation = Validation(cfg, pipe, run, size, frames, autocast, log)
    # Micro-batches 0, 1, 2, ... of a step go to the ranks in turn: a random draw belongs to one of them, not to a rank.
    loader = batches(datasets, keys_in_order(cfg, start, grad_accum_steps, micro_batch_size), cfg.workers)

    for step in range(start, cfg.steps + 1):  # one pass more than steps: the last one only saves and measures
        last = step == cfg.steps
        if step > start and (step % cfg.save_every == 0 or last or log.stop):            # once in a while: save
            log.flush()
            if rank == 0:
                save_checkpoint(run, step, cfg.keep_checkpoints, lambda folder: save(transformer, folder, cfg), state)
        if log.stop and not last:
            break
        validation.measure(step)                                     # once in a while; does not affect training
        if last:
            break

        log.start()
        task = sample_task(cfg, step)                                # Eq. 1: u < p ? video : image
        losses = {"loss_sum": torch.zeros(4, device=device), "loss_count": torch.zeros(4, device=device)}
        for micro in range(grad_accum_steps[task]):
            micro_index = micro * world_size + rank                  # counted over all ranks
            batch = next(loader)                                     # pairs, or clips with a random frame (3.4)
            assert batch["keys"][0] == (task, step, micro_index * micro_batch_size[task]), batch["keys"]
            noise_rng = torch_rng(cfg.seed, "noise", step, micro_index)
            x, ref, text = encode_batch(cfg, pipe, batch, noise_rng)    # (B,T,C,H,W), (B,1,C,H,W), (B,L,D)
            if task == "video":
                keep = token_drop(cfg, step, micro_index, n_ref)     # (K,): a random part of the reference's tokens
            else:
                keep = view_drop(cfg, step, micro_index)             # all of them, or none
            keep = None if keep is None else to_device(keep, device)
            t, noise = sample_noise(x, pipe.scheduler, noise_rng)    # (B,), (B,T,C,H,W)

            torch.manual_seed(torch_rng(cfg.seed, "dropout", step, micro_index).initial_seed())  # for LoRA dropout
            last_micro = micro == grad_accum_steps[task] - 1         # ranks average their gradients there
            with nullcontext() if last_micro or world_size == 1 else model.no_sync():
                with autocast:                                       # bfloat16 on a GPU
                    loss = v_loss(model, pipe.scheduler, x, text, t, noise, ref, keep)  # (B,): L_vid or L_img
                (loss.mean() / grad_accum_steps[task]).backward()    # g_vid or g_img
            add_losses(losses, loss, t, num_timesteps)
            log.skipped(batch["skipped"])
        if cfg.pcgrad:
            state["pcgrad"](parameters, task)                        # 4.3: project out the other task's gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()                                             # theta <- theta - eta g
        lr = lr_schedule.get_last_lr()[0]
        lr_schedule.step()
        optimizer.zero_grad(set_to_none=world_size == 1)             # DDP: zeros, so that they stay in its buckets
        stop = torch.full((1,), float(SIGTERM.is_set()), device=device)  # the other ranks learn of it here
        log.step(step, task, lr, {**sum_over_ranks({**losses, "stop": stop}), "grad_norm": grad_norm})

    log.close()
    if log.stop and not last:
        return print0(f"stopped by SIGTERM after {step} steps; the same command goes on")
    print0(f"done: {newest_checkpoint(run)}. Next: python sample.py --lora {run} --ref PICTURE --prompt '...'")


# ---- the parts of a run ----------------------------------------------------------------------------------------------

def divide_batches(cfg, world_size):
    """(cfg, {"image": micro-batches per rank and step, "video": ...}). What does not divide is made smaller, and a line
    says so. ValueError for a batch of fewer samples than ranks."""
    grad_accum_steps = {}
    for task in ("image", "video"):
        batch, micro = getattr(cfg, f"{task}_batch"), getattr(cfg, f"{task}_micro")
        if batch < world_size:
            raise ValueError(f"--{task}_batch {batch} is too small for {world_size} ranks")
        if batch % world_size:
            print0(f"--{task}_batch {batch} is now {batch - batch % world_size}: a multiple of {world_size} ranks")
            batch -= batch % world_size
        fits = max(m for m in range(1, micro + 1) if batch % (m * world_size) == 0)
        if fits != micro:
            print0(f"--{task}_micro {micro} is now {fits}: {batch} samples on {world_size} rank(s) divide by it")
        cfg = replace(cfg, **{f"{task}_batch": batch, f"{task}_micro": fits})
        grad_accum_steps[task] = batch // (fits * world_size)
    return cfg, grad_accum_steps


def keys_in_order(cfg, start, grad_accum_steps, micro_batch_size):
    """What this rank's loop will ask the loader for: each micro-batch's keys (task, step, index of the sample)."""
    rank, world_size = rank_and_world_size()
    for step in range(start, cfg.steps):
        task = sample_task(cfg, step)
        for micro in range(grad_accum_steps[task]):
            first = (micro * world_size + rank) * micro_batch_size[task]
            yield [(task, step, first + j) for j in range(micro_batch_size[task])]


def add_losses(losses, loss, t, num_timesteps):
    """Add a micro-batch's losses (B,) to the sums and counts of the four quarters of the timesteps."""
    quarter = 4 * t // num_timesteps
    zeros = torch.zeros(4, device=loss.device)
    losses["loss_sum"] += zeros.index_add(0, quarter, loss.detach())
    losses["loss_count"] += zeros.index_add(0, quarter, torch.ones_like(loss.detach()))


def load_model(cfg, device):
    """(cfg, pipeline, LoRA parameters): a frozen base in bfloat16, LoRA in float32; on a CPU everything is float32."""
    pipe = load_pipeline(cfg.base, torch.bfloat16 if device.type == "cuda" else torch.float32, int8=cfg.int8)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # else copied there in every step
    if cfg.vae_tiling:
        tile_vae(pipe.vae)
    transformer = pipe.transformer.train()
    if cfg.init_lora:  # rank, alpha and scope are the file's
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
    """(data sets, (height, width), frames). Only what this run's coin can ask for is opened, and one sample of each is
    read: a mistake shows here, and not in a worker."""
    height, width = cfg.height or frame_size(pipe)[0], cfg.width or frame_size(pipe)[1]
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    if height % multiple or width % multiple:
        raise ValueError(f"--height and --width must be multiples of {multiple}, got {height} x {width}")
    frames = clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    if frames != cfg.frames:
        print0(f"--frames {cfg.frames} cut to {frames}, a length that the VAE gives back unchanged")
    datasets, caches = {}, open_caches(cfg, pipe, (height, width), frames)
    if cfg.p < 1:
        datasets["image"] = ImagePairs(cfg.images, (height, width), cfg.crop_jitter, cfg.seed, caches["image"])
    if cfg.p > 0:
        datasets["video"] = Clips(cfg.videos, (height, width), frames, cfg.fps, cfg.random_frame, cfg.seed,
                                       caches["video"])
    for task, dataset in datasets.items():
        dataset[0, 0]
        if dataset.cache and dataset.cache.cached < len(dataset):
            print0(f"{cfg.cache} holds {dataset.cache.cached} of {len(dataset)} {task}s; the others are left out (if "
                   "they are new: run python -m paper.prepare cache again)")
    return datasets, (height, width), frames


def reference_tokens(pipe, size):
    """Tokens of one reference picture of size (height, width) in pixels: 1,350 at 480 x 720."""
    pixels_per_token = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    return (size[0] // pixels_per_token) * (size[1] // pixels_per_token)


def make_optimizer(cfg, parameters):
    """AdamW and its learning rate: warm-up, then cosine with restarts (A.2)."""
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                                  fused=parameters[0].is_cuda or None)  # one kernel for all parameters

    def decay_over(steps):
        return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, cfg.warmup, steps, cfg.cycles)
    lr_schedule = decay_over(cfg.steps)
    if cfg.task_schedule == "two_stage" and 0 < (switch := image_stage(cfg)) < cfg.steps:
        # Two trainings, one after the other: with one decay over both the second would have hardly any learning rate.
        stages = [decay_over(switch), decay_over(cfg.steps - switch)]
        lr_schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, stages, [switch])
    return optimizer, lr_schedule


def already_measured(cfg, run, step):
    """Do the logs hold every measurement of this step that the flags ask for?"""
    asked = [file for file, every in (("gradcos.jsonl", cfg.gradcos_every), ("val.jsonl", cfg.val_every)) if every]
    return all(any(record["step"] == step for record in records(run / file)) for file in asked)


def describe(cfg, run, parameters, datasets, size, start, device):
    print0(f"{run}: {sum(p.numel() for p in parameters):,} trainable parameters in {len(parameters) // 2} LoRA modules,"
           f" {size[1]}x{size[0]}, {', '.join(f'{len(d)} {t}s' for t, d in datasets.items())}, "
           f"{rank_and_world_size()[1]} rank(s) on {device}" + (f", going on from step {start}" if start else ""))
    if start == cfg.steps:
        print0("the run is complete: only its end is measured; for a whole curve start another --name")


def save(transformer, folder, cfg):
    """The LoRA with what sample.py needs to know of its training in the file's header."""
    save_lora(transformer, folder, base=cfg.base, cls=str(cfg.cls), fps=str(cfg.fps), guidance=str(cfg.guidance),
              trained_by=json.dumps(asdict(cfg)))


# ---- watching a run --------------------------------------------------------------------------------------------------

class Validation:
    """Held-out losses, gradient cosines and sample sheets of the model as it is after `step` steps.

    The held-out batches are B.1's: fixed samples, noise, timesteps and kept tokens, without view drop. They are the
    same in every run, whatever its seed. Encoded once and kept in RAM (6 MB a clip at full size). Each rank has a
    share."""

    SEED = 2**31 - 1

    def __init__(self, cfg, pipe, run, size, frames, autocast, log):
        self.cfg, self.pipe, self.run, self.size, self.frames = cfg, pipe, run, size, frames
        self.autocast, self.log = autocast, log
        self.count = {"image": cfg.val_pairs, "video": cfg.val_clips}
        self.share = {"image": [], "video": []}  # this rank's micro-batches, as arguments of v_loss
        if cfg.gradcos_every or cfg.val_every:
            self.encode(replace(cfg, seed=self.SEED))

    def encode(self, cfg):
        rank, world_size = rank_and_world_size()
        datasets = {"image": ImagePairs(cfg.val_images, self.size, cfg.crop_jitter, cfg.seed),
                    "video": Clips(cfg.val_videos, self.size, self.frames, cfg.fps, cfg.random_frame, cfg.seed)}
        for task, micro in (("image", cfg.image_micro), ("video", cfg.video_micro)):
            n = self.count[task]
            for micro_index in range(rank, -(-n // micro), world_size):
                keys = [(task, 0, i) for i in range(micro_index * micro, min(n, (micro_index + 1) * micro))]
                noise_rng = torch_rng(cfg.seed, "noise", 0, micro_index)
                x, ref, text = encode_batch(cfg, self.pipe, next(batches(datasets, [keys])), noise_rng)
                keep = None
                if task == "video":
                    keep = token_drop(cfg, 0, micro_index, reference_tokens(self.pipe, self.size))
                t, noise = sample_noise(x, self.pipe.scheduler, noise_rng)
                inputs = dict(latents=x, text=text, timestep=t, noise=noise, reference=ref, keep=keep)
                self.share[task].append({k: None if v is None else v.cpu() for k, v in inputs.items()})

    def measure(self, step):
        """Write what is due at this step to gradcos.jsonl, val.jsonl and samples/."""
        cfg, transformer = self.cfg, self.pipe.transformer

        def due(every):
            return every and (step % every == 0 or step == cfg.steps)
        transformer.eval()
        if due(cfg.gradcos_every):
            named = [(n, p) for n, p in transformer.named_parameters() if p.requires_grad]
            self.log.write("gradcos.jsonl", {"step": step, **gradcos.measure(self.scalars, named, cfg.grad_device)})
        if due(cfg.val_every):
            self.log.write("val.jsonl", {"step": step, **self.mean_losses()})
        if due(cfg.sample_every) and step:
            with self.autocast:
                write_sample_sheets(self.pipe, cfg.val_refs, self.run / "samples", step, self.size, self.frames,
                                    cfg.cls, cfg.guidance)
        transformer.train()

    def losses(self, task):
        """(loss per sample, its timestep) of each micro-batch in this rank's share; LoRA dropout is off."""
        device = self.pipe.transformer.device
        for inputs in self.share[task]:
            inputs = {k: None if v is None else v.to(device) for k, v in inputs.items()}
            with self.autocast:
                loss = v_loss(self.pipe.transformer, self.pipe.scheduler, **inputs)
            yield loss, inputs["timestep"]

    def scalars(self, task):
        """The same as scalars that sum to the mean over the whole batch, all ranks together: for the gradient."""
        return (loss.sum() / self.count[task] for loss, _ in self.losses(task))

    @torch.no_grad()
    def mean_losses(self):
        """{task: {"loss", "loss_by_timestep": 4 means}} over the whole batch, all ranks together."""
        means = {}
        for task in self.share:
            device = self.pipe.transformer.device
            losses = {"loss_sum": torch.zeros(4, device=device), "loss_count": torch.zeros(4, device=device)}
            for loss, t in self.losses(task):
                add_losses(losses, loss, t, self.pipe.scheduler.config.num_train_timesteps)
            means[task] = loss_means(**sum_over_ranks(losses))
        return means


def main(cfg):
    listen_for_sigterm()
    diffusers_logging.disable_progress_bar()
    if cfg.toy:
        from toy import world
        cfg = world.ensure_data(cfg)
    with attention_order(find_device(cfg.device)):
        train(cfg)
    if dist.is_initialized():  # after train() has returned: its DDP model must go before the group does
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main, Config, __doc__, **(TOY if any(a.split("=")[0] == "--toy" for a in sys.argv) else {}))
