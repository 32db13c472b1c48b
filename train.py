"""Trains subject-driven video generation without a single subject-video: Algorithm 1 of the paper, in one loop.
(5.1) cites a section of the paper; a knob that cites none is ours.

    torchrun --nproc_per_node=8 train.py      # the paper's run: CogVideoX-5B, Subjects200K, Pexels clips
    python train.py --toy                     # the same code on the toy world, minutes on two CPU cores

Each step flips one coin. With probability p it takes plain clips and learns motion: image-to-video from a random frame
of the clip, with half of that frame's tokens dropped. Otherwise it takes pairs of pictures and learns identity: one
picture from the other. The same LoRA learns both.

A run writes out/NAME/: config.json, log.jsonl (one line per step), step-000400/ (LoRA weights and training state); with
--val_every also val.jsonl (and with --val_refs samples/), with --gradcos_every gradcos.jsonl. The same command
continues from the newest checkpoint: on a CPU bit for bit. On SIGTERM a run finishes its step, saves a checkpoint and
stops.
"""
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging

import gradcos
from common.args import check, command_line, find_device, knob, use_device
from common.base import attention_order, autocast
from common.look import write_sheet
from common.log import Log, add_losses, describe, no_losses, sum_over_ranks
from common.media import latent_frames, normalise
from common.run import (SIGTERM, claim, join_ranks, newest_checkpoint, print0, rank_and_world_size, resume, rng,
                        save_checkpoint, settings_of, sigterm_asks, start_log, torch_rng)
from common.setup import divide_batches, image_stage, load_model, make_datasets, make_optimizer, open_data
from common.watch import Validation, already_measured
from data import batches, cls_for
from model import (encode_moments, encode_prompt, read_lora, sample_latents, save_lora, to_device, v_loss,
                   with_reference_token)

HELD_OUT = {"image": 64, "video": 32}  # samples that --val_every and --gradcos_every measure with, at most


@dataclass
class Config:
    toy: bool = knob(False, "take the defaults of the toy world (TOY); other flags still count", trains=False)
    recipe: str = knob("paper", "defaults from the paper's text, or the authors' scripts (AUTHORS)",
                       "paper", "authors", trains=False)
    # model
    base: str = knob("THUDM/CogVideoX-5b", "diffusers CogVideoX folder or hub id (5.1)")
    int8: bool = knob(False, "keep the frozen transformer in 8 bits (torchao): half the memory, for a 24 GB GPU")
    lora_rank: int = knob(128, "LoRA rank (A.1)")
    lora_alpha: float = knob(64.0, "LoRA alpha; the update is scaled by alpha/rank (A.1)")
    lora_dropout: float = knob(0.1, "LoRA dropout (5.1)")
    lora_scope: str = knob("all", "tokens LoRA acts on: 'all' in the authors' code (3.3, A)", "all", "reference")
    init_lora: str = knob("", "LoRA to continue from (file, folder or run), e.g. the 8 fps model for 16 fps (5.1)")
    # data
    images: str = knob("data/subjects200k", "folder of image pairs: D_img (5.1); IMAGES_val has the held-out ones")
    videos: str = knob("data/pexels", "folder of clips with captions: D_vid (5.1); VIDEOS_val has the held-out ones")
    cache: str = knob("", "folder of latents that python -m paper.prepare cache wrote; empty encodes on the fly")
    frames: int = knob(49, "frames of a training clip, cut to 8k+1 (A.2)")
    fps: float = knob(8.0, "frames per second that clips are read at (A.2)")
    crop_jitter: float = knob(0.1, "random zoom and shift of each picture of a pair, as a share of its size (A.2)")
    # the method
    p: float = knob(0.2, "probability of a video step (Eq. 1, D.5)")
    task_schedule: str = knob("switch", "switch: one coin per step (Eq. 1). two_stage: all image steps, then all video "
                                        "steps (D.7). mixed: one coin per micro-batch, image_batch/image_micro of "
                                        "them in a step (B.3)", "switch", "mixed", "two_stage")
    random_frame: bool = knob(True, "reference = a random frame of the clip, not always the first (3.4, Figure 12)")
    token_drop: float = knob(0.5, "share of reference tokens dropped in video steps; 1 is text-to-video (Table 7)")
    drop: str = knob("tokens", "what --token_drop drops: tokens (3.4), or whole references", "tokens", "reference")
    view_drop: float = knob(0.5, "probability that an image micro-batch trains without its reference (A.2)")
    image_frame: str = knob("first", "latent frame of an image step's target: 1 (3.3), or any that a clip has",
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
    warmup: int = knob(200, "steps of linear warm-up (A.2)")
    pcgrad: int = knob(0, "PCGrad against the gradients of this many last steps (4.3, B.3; Table 5: 4, 8); 0 is off")
    # the run
    name: str = knob("subject", "the run lives in out/NAME", trains=False)
    out: str = knob("out", "where runs live", trains=False)
    seed: int = knob(0, "seed of everything random")
    save_every: int = knob(50, "steps between checkpoints (A.2)", trains=False)
    image_checkpointing: str = knob("none", "memory against time in image steps. none: keep all activations. attention:"
                                            " keep attention's outputs. full: keep blocks' inputs (A.1)",
                                    "none", "attention", "full", trains=False)
    video_checkpointing: str = knob("attention", "the same in video steps", "none", "attention", "full", trains=False)
    compile: bool = knob(False, "compile the blocks: faster steps, after minutes for each new shape of a micro-batch")
    workers: int = knob(4, "processes per rank that read data", trains=False)
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    # watching the run
    look: int = knob(0, "train nothing: draw this many micro-batches as the model gets them, out/NAME/look.png",
                     trains=False)
    gradcos_every: int = knob(0, "steps between measurements of the two gradients' cosine (4.1, B.1); 0 never",
                              trains=False)
    val_every: int = knob(0, "steps between held-out losses (B.1's batches), and samples of --val_refs; 0 never",
                          trains=False)
    val_refs: str = knob("", "folder of pictures to sample from, each with its prompt in a .txt file of its name",
                         trains=False)
    guidance: float = knob(6.0, "guidance scale when sampling, here and in sample.py (the authors' code)", trains=False)
    tensorboard: bool = knob(False, "write all numbers to out/NAME/tensorboard as well", trains=False)

    def __init__(self, **given):
        """A knob that is not given has the default of --toy or --recipe, where those set one, else the one above."""
        defaults = {f.name: f.default for f in fields(self)}
        if unknown := given.keys() - defaults.keys():
            raise TypeError(f"there is no knob {min(unknown)!r}")
        self.__dict__ |= defaults | presets(given.get("toy", False), given.get("recipe", "paper")) | given
        check(self, shares="p token_drop view_drop lora_dropout crop_jitter",
              positive="lora_rank lora_alpha frames fps steps image_batch video_batch image_micro video_micro lr "
                       "save_every")
        if self.base == TOY["base"] and not Path(self.base).is_dir():
            raise ValueError(f"no {self.base} here: run it from the repository's root")
        if self.val_every and self.val_refs and not Path(self.val_refs).is_dir():
            raise ValueError(f"--val_refs: no folder of pictures and prompts at {self.val_refs}")
        if self.pcgrad == 1 or self.pcgrad and self.task_schedule == "mixed":
            raise ValueError("--pcgrad: a buffer needs 2 or more steps, each of one task (no --task_schedule mixed)")
        if self.lora_scope == "reference" and (self.view_drop > 0 or self.token_drop == 1
                                               or self.token_drop > 0 and self.drop == "reference"):
            raise ValueError("--lora_scope reference has nothing to train in a batch without reference tokens: "
                             "it needs --view_drop 0, and --token_drop below 1 (0 with --drop reference)")


TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", cache="toy/data/cache",
           name="toy", lora_rank=32, lora_alpha=16.0, lora_dropout=0.0, frames=9, fps=4.0, crop_jitter=0.0,
           view_drop=0.0, steps=450, image_batch=16, image_micro=16, video_batch=16, video_micro=16,
           lr=6e-3, warmup=30, save_every=100, video_checkpointing="none", guidance=2.0,
           workers=4 if torch.cuda.is_available() else 0,  # on a CPU they would take the cores that train
           val_refs="toy/refs", val_every=150)
AUTHORS = dict(drop="reference", task_schedule="mixed", view_drop=0.0, crop_jitter=0.0, lora_dropout=0.0, cls="front",
               cls_video=False, image_micro=8, video_micro=1, image_checkpointing="attention")
TOY_AUTHORS = dict(image_micro=2, video_micro=2)  # 8 micro-batches a step: as many pairs and clips as the toy's coin


def presets(toy=False, recipe="paper"):
    """What --toy and --recipe put in the place of Config's defaults, on the command line and from Python."""
    authors = recipe == "authors"
    return {**(TOY if toy else {}), **(AUTHORS if authors else {}), **(TOY_AUTHORS if toy and authors else {})}


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------

def train(cfg):
    """The run out/NAME, from its newest checkpoint on."""
    world_size = rank_and_world_size()[1]
    device = use_device(cfg.device)
    # Ranks wait for those that measure and sample: two hours are 40 samples of three minutes.
    join_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    folder = Path(cfg.out) / cfg.name
    cfg = divide_batches(cfg, world_size)
    cfg, pipe, parameters = load_model(cfg, device)
    transformer, scheduler = pipe.transformer, pipe.scheduler
    datasets, size, frames, n_ref = open_data(cfg, pipe)            # n_ref: tokens of a whole reference
    T = latent_frames(frames, pipe.vae_scale_factor_temporal)       # latent frames of a clip: 13
    optimizer, lr_schedule = make_optimizer(cfg, parameters)
    state = {"optimizer": optimizer, "lr_schedule": lr_schedule}
    if cfg.pcgrad:
        state["pcgrad"] = gradcos.PCGrad(cfg.pcgrad)

    claim(folder)
    start = resume(folder, settings_of(cfg), lambda checkpoint: read_lora(transformer, checkpoint), state)
    if start == cfg.steps and already_measured(cfg, folder, start):
        return print0(f"{folder} is complete ({start} steps); choose another --name for a new run")
    start_log(folder, settings_of(cfg), start)
    describe(cfg, folder, parameters, datasets, size, start, device)
    log = Log(folder, start, cfg.steps, device, cfg.tensorboard)
    held_out = held_out_batches(cfg, pipe, size, frames, n_ref) if cfg.gradcos_every or cfg.val_every else []
    validation = Validation(cfg, pipe, folder, size, frames, held_out, log)
    if all(dataset.cache and dataset.cache.prompts for dataset in datasets.values()):
        pipe.text_encoder = None  # frees its memory: all prompts that are still to come are cached
    model = transformer
    if world_size > 1:  # every rank has built the same weights, so DDP need not send them round
        model = torch.nn.parallel.DistributedDataParallel(transformer, gradient_as_bucket_view=True, init_sync=False)
    loader = batches(datasets, (micro.keys for s in range(start, cfg.steps) for micro in plan(cfg, s)), cfg.workers)

    # One pass more than there are steps: the last one trains nothing, it saves and measures the finished model.
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if step > start and (step % cfg.save_every == 0 or last or log.stop):
            log.flush()
            save_checkpoint(folder, step, lambda part: save(transformer, part, cfg), state)
        if log.stop and not last:
            break
        validation.measure(step)                                     # does not affect training
        if last:
            break

        log.start()
        task = sample_task(cfg, step)                                # Eq. 1: "video" with probability p
        micros, losses = plan(cfg, step), no_losses(device)
        for micro in micros:
            batch = next(loader)                                     # pairs, or clips with a random frame (3.4)
            if micro.task == "video":
                keep = tokens_to_keep(cfg, micro, n_ref)             # TokenDrop (3.4): (K,) of the reference's tokens
            else:
                keep = all_or_none(cfg, micro, cfg.view_drop)        # view drop (A.2): None keeps all
            first_frame = image_frame(cfg, micro, T)                 # where x begins in time; the reference is frame 0
            noise_rng = torch_rng(cfg.seed, "noise", step, micro.index)
            x, ref, text = encode(cfg, pipe, batch, micro.task, keep, noise_rng)  # (B,T,C,H,W), (B,1,C,H,W), (B,L,D)
            t, noise = sample_noise(x, scheduler, noise_rng)         # (B,), (B,T,C,H,W)
            keep = None if keep is None else to_device(keep, device)

            torch.manual_seed(torch_rng(cfg.seed, "dropout", step, micro.index).initial_seed())  # for LoRA dropout
            transformer.checkpointing = getattr(cfg, f"{micro.task}_checkpointing")
            wait = world_size > 1 and micro is not micros[-1]        # ranks average gradients in the last backward
            with model.no_sync() if wait else nullcontext():
                with autocast(device):                               # bfloat16 on a GPU
                    loss = v_loss(model, scheduler, x, text, t, noise, ref, keep, first_frame)  # (B,): L_vid or L_img
                (loss.mean() / len(micros)).backward()               # g_vid or g_img
            add_losses(losses, micro.task, loss, t, scheduler.config.num_train_timesteps)
            log.skipped(batch["skipped"])                            # unreadable files
        if cfg.pcgrad:
            state["pcgrad"](parameters, task)                        # 4.3: take out what conflicts with the other task
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)  # A.2
        optimizer.step()                                             # theta <- theta - eta g
        lr = lr_schedule.get_last_lr()[0]
        lr_schedule.step()
        # Under DDP gradients are views into its communication buckets: they are filled with zeros, not freed.
        optimizer.zero_grad(set_to_none=world_size == 1)
        # One sum over ranks for the losses and the request to stop: all ranks stop at the same step.
        stop = torch.full((1,), float(SIGTERM.is_set()), device=device)
        log.step(step, task, lr, {**sum_over_ranks({**losses, "stop": stop}), "grad_norm": grad_norm})

    log.close()
    if log.stop and not last:
        return print0(f"stopped by SIGTERM after {step} steps; run the same command to continue")
    print0(f"done: {newest_checkpoint(folder)}. Next: python sample.py --lora {folder} --ref PICTURE --prompt '...'")


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
    task = sample_task(cfg, step)
    sized = "image" if task == "mixed" else task  # a mixed step has as many micro-batches as an image step
    count = getattr(cfg, f"{sized}_batch") // getattr(cfg, f"{sized}_micro")  # of all ranks together
    micros = []
    for index in range(rank, count, world_size):  # micro-batches go to the ranks in turn
        own_task = sample_task(cfg, step, index) if task == "mixed" else task
        size = getattr(cfg, f"{own_task}_micro")
        keys = [(own_task, step, index * size + j) for j in range(size)]
        micros.append(MicroBatch(own_task, step, index, keys))
    return micros


def tokens_to_keep(cfg, micro, n):
    """TokenDrop (3.4) in a video micro-batch: which of the reference's n tokens stay, a random share of 1 - token_drop.
    Sorted indices (K,), None for all. K is fixed, so that shapes stay the same. With --drop reference all stay or none,
    as in the authors' scripts."""
    if cfg.drop == "reference":
        return all_or_none(cfg, micro, cfg.token_drop)
    kept = round((1 - cfg.token_drop) * n)
    if cfg.lora_scope == "reference":
        kept = max(kept, 1)  # LoRA needs a token to act on
    if kept == n:
        return None
    return torch.from_numpy(rng(cfg.seed, "drop", micro.step, micro.index).permutation(n)[:kept]).sort().values


def all_or_none(cfg, micro, drop):
    """Which of the reference's tokens stay: with probability `drop` none, an empty index; else all, None."""
    if rng(cfg.seed, "drop", micro.step, micro.index).random() < drop:
        return torch.empty(0, dtype=torch.long)
    return None


def image_frame(cfg, micro, T):
    """The latent frame (of RoPE) at which the target of a micro-batch begins; the reference is frame 0. A clip
    has frames 1..T. A picture is, in the paper, always frame 1 (3.3): what image steps teach, they teach at one
    distance from the reference. With --image_frame random it is any of 1..T."""
    if micro.task == "video" or cfg.image_frame == "first":
        return 1
    return int(rng(cfg.seed, "image frame", micro.step, micro.index).integers(1, T, endpoint=True))


def encode(cfg, pipe, batch, task, keep, noise_rng):
    """A batch of the loader -> latents x (B,T,C,H,W), reference latents (B,1,C,H,W), text (B,L,D), on the device.

    The VAE encodes pixels; a cache holds the moments of its posterior instead. Latents are a draw from these either
    way. The reference is encoded on its own; zeros stand in for one that is dropped whole."""
    device = pipe.transformer.device

    def latents_of(picture):
        if f"{picture}_moments" in batch:
            moments = to_device(batch[f"{picture}_moments"], device)
        else:
            moments = encode_moments(pipe.vae, normalise(to_device(batch[picture], device)))
        return sample_latents(pipe.vae, moments, noise_rng)
    x = latents_of("target")
    if keep is None or len(keep) > 0:
        ref = latents_of("reference")
    else:
        ref = torch.zeros_like(x[:, :1])
    if "text" in batch:
        return x, ref, to_device(batch["text"], device)
    cls = cls_for(cfg, task)
    prompts = [with_reference_token(t, cls, item) for t, item in zip(batch["prompt"], batch["item"])]
    return x, ref, to_device(encode_prompt(pipe, prompts), device)


def sample_noise(x, scheduler, noise_rng):
    """A uniform timestep (B,) and noise like x."""
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), generator=noise_rng)
    return to_device(t, x.device), to_device(torch.randn(x.shape, generator=noise_rng), x.device)


# ---- the parts of a run ----------------------------------------------------------------------------------------------

def held_out_batches(cfg, pipe, size, frames, n_ref):
    """This rank's held-out micro-batches, (task, inputs of v_loss), as in B.1: fixed samples and draws, no view drop.
    They do not depend on --seed, but on all flags of data and drops: compare losses of runs that share them."""
    cfg = replace(cfg, seed=2**31 - 1)
    rank, world_size = rank_and_world_size()
    datasets = make_datasets(cfg, size, frames, {}, held_out=True)
    held_out, T = [], latent_frames(frames, pipe.vae_scale_factor_temporal)
    for task, dataset in datasets.items():
        count, step_size = min(HELD_OUT[task], len(dataset)), getattr(cfg, f"{task}_micro")  # each sample once
        for first in range(rank * step_size, count, world_size * step_size):
            keys = [(task, 0, i) for i in range(first, min(count, first + step_size))]
            micro = MicroBatch(task, 0, first // step_size, keys)
            noise_rng = torch_rng(cfg.seed, "noise", 0, micro.index)
            keep = tokens_to_keep(cfg, micro, n_ref) if task == "video" else None
            batch = next(batches(datasets, [keys]))
            for reason in batch["skipped"]:
                print(f"skipped, held out: {reason}", file=sys.stderr)
            x, ref, text = encode(cfg, pipe, batch, task, keep, noise_rng)
            t, noise = sample_noise(x, pipe.scheduler, noise_rng)
            held_out.append((task, dict(latents=x, text=text, timestep=t, noise=noise, reference=ref, keep=keep,
                                        first_frame=image_frame(cfg, micro, T))))
    return held_out


def look(cfg):
    """--look: the real loader and the real drops of the first micro-batches, drawn."""
    cfg, pipe, _ = load_model(divide_batches(cfg, 1), use_device(cfg.device))
    datasets, _, _, n_ref = open_data(cfg, pipe)
    micros = list(islice((micro for s in range(cfg.steps) for micro in plan(cfg, s)), cfg.look))
    seen = []
    for micro, batch in zip(micros, batches(datasets, [micro.keys for micro in micros])):
        keep = all_or_none(cfg, micro, cfg.view_drop) if micro.task == "image" else tokens_to_keep(cfg, micro, n_ref)
        x, ref, _ = encode(cfg, pipe, batch, micro.task, keep, torch_rng(cfg.seed, "noise", micro.step, micro.index))
        seen.append((micro, batch, x, ref, keep))
    write_sheet(cfg, pipe, seen, Path(cfg.out) / cfg.name / "look.png")


def save(transformer, folder, cfg):
    """The LoRA, and in its header what sample.py needs to know of its training."""
    save_lora(transformer, folder, base=cfg.base, cls=cfg.cls, fps=str(cfg.fps), guidance=str(cfg.guidance),
              trained_by=json.dumps(asdict(cfg)))


def main(cfg):
    diffusers_logging.disable_progress_bar()
    with sigterm_asks(), attention_order(find_device(cfg.device)):
        if cfg.toy:
            from toy import world
            cfg = world.ensure_data(cfg, TOY)
        look(cfg) if cfg.look else train(cfg)
    if dist.is_initialized():  # train() must return first: its DDP model uses the group
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    command_line(main, Config, __doc__, presets=presets,
                 out_of_memory="a smaller --image_micro or --video_micro, --image_checkpointing full, "
                               "--video_checkpointing full, --int8 True")
