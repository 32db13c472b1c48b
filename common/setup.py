"""What a run is made of: each rank's share of a batch, the base with its LoRA, the data sets, the optimiser."""
from dataclasses import replace

import torch
from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup

from common.base import compute_dtype, frame_size, load_pipeline, tile_large_clips, warn_of_another_size
from common.find import find_lora
from common.latents import open_caches
from common.media import clip_frames
from common.run import print0
from data import TASKS, Clips, ImagePairs
from model import add_lora, load_lora, lora_header


def divide_batches(cfg, world_size):
    """cfg with batches and micro-batches that divide by the ranks: others are made smaller, with a message. ValueError
    for a batch of fewer samples than ranks."""
    for task in TASKS:
        if cfg.task_schedule == "mixed" and task != "image":
            continue  # of the others there are as many micro-batches as the coins say
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
    return cfg


def load_model(cfg, device):
    """(cfg, pipeline, LoRA parameters): a frozen base in bfloat16, LoRA in float32; on a CPU everything is float32."""
    lora = None
    if cfg.init_lora:
        lora = find_lora(cfg.init_lora)
        lora_header(lora)  # a bad file fails here, before the base is loaded
    pipe = load_pipeline(cfg.base, compute_dtype(device), int8=cfg.int8, asked=cfg.device)
    transformer = pipe.transformer.train()
    if lora:  # rank, alpha and scope come from the file
        parameters = load_lora(transformer, lora, cfg.lora_dropout)
        config = transformer.peft_config["default"]
        cfg = replace(cfg, lora_rank=config.r, lora_alpha=config.lora_alpha, lora_scope=transformer.lora_scope)
    else:
        torch.manual_seed(cfg.seed)  # every rank starts from the same LoRA
        parameters = add_lora(transformer, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_scope)
    if cfg.compile:
        compile_blocks(transformer)
    for module in (transformer, pipe.vae, pipe.text_encoder):
        module.to(device)
    return cfg, pipe, parameters


def compile_blocks(transformer):
    """Compile the blocks, all with one kernel set per shape: the first step of each shape waits for the compiler.

    The losses stay the same to rounding; with LoRA dropout the masks come from another random stream."""
    if transformer.lora_scope == "reference":
        raise ValueError("--compile needs --lora_scope all: with 'reference' each block would be compiled alone")
    torch._dynamo.config.recompile_limit = 64   # tasks x drops x (training, validation, sampling)
    torch._dynamo.config.optimize_ddp = False   # it cannot split a checkpointed block, and blocks are small enough
    transformer.run_block = torch.compile(transformer.run_block, dynamic=False, fullgraph=True)


def open_data(cfg, pipe):
    """(data sets, (height, width), frames, tokens of a whole reference: 1,350 at 480 x 720). Only what p asks for is
    opened."""
    height, width = size = frame_size(pipe)
    frames = clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    if frames != cfg.frames:
        print0(f"--frames {cfg.frames} cut to {frames}: the VAE takes no other length")
    warn_of_another_size(pipe, height, width, frames)
    if cfg.image_frame == "random" and not pipe.transformer.config.use_rotary_positional_embeddings:
        raise ValueError("--image_frame random chooses rows of the RoPE tables, and this base has no RoPE")
    tile_large_clips(pipe.vae, height, width, frames)
    if frames == 1 and cfg.p > 0:
        raise ValueError(f"--frames {cfg.frames}: video steps need clips of more frames, or --p 0")
    datasets = make_datasets(cfg, size, frames, open_caches(cfg, pipe, size, frames))
    for task, dataset in datasets.items():
        dataset[0, 0]  # read one sample now: bad data fails here, not in a worker
        if dataset.cache and dataset.cache.cached < len(dataset):
            print0(f"{cfg.cache} holds {dataset.cache.cached} of {len(dataset)} {task}s; the others are left out (if "
                   "they are new: run python -m paper.prepare cache again)")
    pixels = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size  # a token's side
    return datasets, size, frames, (height // pixels) * (width // pixels)


def make_datasets(cfg, size, frames, caches, held_out=False):
    """{task: its data set}: those that p asks for, or with held_out all of them, of the folders with _val, in order."""
    suffix, datasets = "_val" if held_out else "", {}
    if cfg.p < 1 or held_out:
        datasets["image"] = ImagePairs(cfg.images + suffix, size, cfg.crop_jitter, cfg.seed, caches.get("image"),
                                       held_out)
    if cfg.p > 0 or held_out:
        datasets["video"] = Clips(cfg.videos + suffix, size, frames, cfg.fps, cfg.random_frame, cfg.seed,
                                  caches.get("video"), held_out)
    return datasets


def image_stage(cfg):
    """Image steps of 'two_stage' (D.7): as many as the coin would give on average."""
    return round((1 - cfg.p) * cfg.steps)


def make_optimizer(cfg, parameters):
    """AdamW and its learning rate: warm-up, then cosine with restarts (A.2)."""
    # The paper is silent on weight decay and on the number of restarts: one cycle is a plain cosine.
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)

    def decay_over(steps):
        return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, cfg.warmup, steps, num_cycles=1)
    first = image_stage(cfg)
    if cfg.task_schedule != "two_stage" or first in (0, cfg.steps):
        return optimizer, decay_over(cfg.steps)
    # Two trainings, one after the other: with one decay over both the second would have a learning rate near zero.
    stages = [decay_over(first), decay_over(cfg.steps - first)]
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, stages, [first])
