"""Cached latents: each pair and clip is encoded once, and training reads the result.

`python -m paper.prepare cache` writes them, and train.py reads them with --cache. A cache records what its
numbers depend on, and it is refused when any of that has changed: training would silently use the wrong latents.
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.args import check, find_device, knob
from common.base import compute_dtype, frame_size, load_pipeline, tile_large_clips
from common.media import clip_frames, load_clip, normalise, resize_center_crop, to_pixels
from common.run import changed, read_json, rng, write
from data import TASKS, Clips, ImagePairs, caption_of, cls_for
from model import PAPER_BASE, VAE_PIXELS, encode_moments, encode_prompt, weight_fingerprint, with_reference_token


# ---- reading ---------------------------------------------------------------------------------------------------------

VERSION = 2  # of a cache's files: raise it when their tensors change


def cache_key(cfg, pipe, task, size, frames, prompts=True):
    """Everything that cached latents (and prompts) depend on: they are refused when any of it has changed."""
    key = {"version": VERSION, "dtype": str(pipe.vae.dtype),
           "vae": weight_fingerprint(pipe.vae.encoder.conv_in.conv.weight),
           "tiling": pipe.vae.use_tiling and task == "video",  # pictures are always whole
           "height": size[0], "width": size[1]}
    if prompts:
        key |= {"text_encoder": weight_fingerprint(pipe.text_encoder.get_input_embeddings().weight[:100]),
                "cls": cls_for(cfg, task)}
    if task == "image":
        return key | {"crop_jitter": cfg.crop_jitter}
    return key | {"frames": frames, "fps": cfg.fps}


def open_caches(cfg, pipe, size, frames):
    """{task: its Cache}: what lies in --cache."""
    caches = {}
    for task in TASKS:
        if cfg.cache and (Path(cfg.cache) / task).is_dir():
            caches[task] = Cache(Path(cfg.cache) / task, cache_key(cfg, pipe, task, size, frames))
    if cfg.cache and not caches:
        raise FileNotFoundError(f"no cache at {cfg.cache}: run python -m paper.prepare cache")
    return caches


class Cache:
    """Reads what `python -m paper.prepare cache` wrote: folder/index.json and a safetensors file per clip or pair.
    ValueError when it is not finished, or was made with another key (see cache_key)."""

    def __init__(self, folder, key):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        made = read_json(index) if index.is_file() else {}
        if not made.get("complete"):
            raise ValueError(f"the cache {folder} is not there or not finished: run python -m paper.prepare cache")
        # A cache without prompts does not name the text encoder; a very old one does not name its version.
        known = {k: v for k, v in key.items() if k in made or k == "version"}
        if differ := changed(made, known):
            raise ValueError(f"the cache {folder} was made with other settings ({differ}): make it again")
        self.cached = made.get("cached", 0)  # how many samples it holds
        self.prompts = "text_encoder" in made  # with the embeddings of their prompts?

    def read(self, name, stamp):
        """({"clip" or "views", perhaps "text_0", ...}, prompts, the subject's name or "") of one sample. ValueError
        when it is not there, is broken, or was made from another file (its stamp differs)."""
        file = self.folder / f"{name}.safetensors"
        if stamp_of(file) != stamp:
            raise ValueError(f"{file} is missing, cut or of another {name}: run python -m paper.prepare cache again")
        with safe_open(file, "pt") as f:
            header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        return tensors, json.loads(header["prompts"]), header["item"]


def stamp_of(file):
    """The stamp in a cached file, None when there is no whole file."""
    try:
        with safe_open(file, "pt") as f:
            return (f.metadata() or {}).get("stamp")
    except (SafetensorError, OSError):
        return None


# ---- writing ---------------------------------------------------------------------------------------------------------

@dataclass
class Latents:
    out: str = knob("data/cache", "folder to write; train.py reads it with --cache")
    base: str = knob(PAPER_BASE, "diffusers CogVideoX folder or hub id whose VAE (and text encoder) encode")
    videos: str = knob("", "folder of clips; empty leaves them out")
    images: str = knob("", "folder of image pairs; empty leaves them out")
    crops: int = knob(1, "random crops of each pair (with --crop_jitter)")
    crop_jitter: float = knob(0.1, "as in train.py")
    prompts: bool = knob(False, "also cache the prompts' embeddings (1.9 MB each for T5-XXL)")
    cls: str = knob("front", "as in train.py", "front", "item", "off")
    cls_video: bool = knob(True, "as in train.py")
    frames: int = knob(49, "as in train.py")
    fps: float = knob(8.0, "as in train.py")
    seed: int = knob(0, "seed of the random crops")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")

    def __post_init__(self):
        check(self, positive="crops frames fps")


def prepare_cache(cfg, rank=0, world_size=1):
    """Encode each clip (and pair) once; this rank's share of the files."""
    if not cfg.videos and not cfg.images:
        raise ValueError("nothing to cache: pass --videos, --images or both")
    device = find_device(cfg.device)
    unused = ["transformer"] if cfg.prompts else ["transformer", "text_encoder"]
    pipe = load_pipeline(cfg.base, compute_dtype(device), without=unused, asked=cfg.device)
    pipe.vae.to(device)
    if cfg.prompts:
        pipe.text_encoder.to(device)
    size, frames = frame_size(pipe), clip_frames(cfg.frames, pipe.vae_scale_factor_temporal)
    tile_large_clips(pipe.vae, *size, frames)
    for task, folder in (("image", cfg.images), ("video", cfg.videos)):
        if folder:
            cache_task(cfg, pipe, task, folder, size, frames, rank, world_size)


def load_item(cfg, task, dataset, item, size):
    """(pixels, prompts, subject's name) of one clip, (1,F,3,H,W), or of all crops of a pair, (crops * 2,1,3,H,W): two
    views a crop."""
    if task == "video":
        return to_pixels(load_clip(item, dataset.frames, dataset.fps, size))[None], [caption_of(item)], ""
    views, prompts, name = dataset.load(item)
    r = rng(cfg.seed, "crops", item)
    crops = [to_pixels([resize_center_crop(view, *size, cfg.crop_jitter, r)])
             for _ in range(cfg.crops) for view in views]
    return torch.stack(crops), prompts, name


def readable(items, read):
    """(item, read(item)) of those that can be read. The others are named."""
    for item in items:
        try:
            yield item, read(item)
        except (ValueError, KeyError, OSError) as e:
            print(f"skipped: {e}", file=sys.stderr)


def cache_task(cfg, pipe, task, folder, size, frames, rank, world_size):
    out = Path(cfg.out) / task
    key = cache_key(cfg, pipe, task, size, frames, cfg.prompts)
    if task == "image":
        key |= {"crops": cfg.crops, "seed": cfg.seed}
    dataset = ImagePairs(folder, size) if task == "image" else Clips(folder, size, frames, cfg.fps)
    items = list(range(len(dataset))) if task == "image" else dataset.files
    index = out / "index.json"
    out.mkdir(parents=True, exist_ok=True)
    if index.is_file():
        made = {k: v for k, v in read_json(index).items() if k not in ("complete", "cached")}
        if differ := changed(made, dict.fromkeys(made) | key):
            raise ValueError(f"{out} was made with other settings ({differ}): choose another --out")
    mine = [(item, out / f"{name}.safetensors", stamp)
            for item, (name, stamp) in readable(items[rank::world_size], dataset.source)]
    todo = [(item, file, stamp) for item, file, stamp in mine if stamp_of(file) != stamp]  # not there, cut, or stale
    cached = torch.tensor(len(mine) - len(todo))
    if rank == 0:
        write(index, json.dumps(key | {"complete": False}, indent=1))
    pictures = 2 * cfg.crops if task == "image" else frames  # in an item
    together = min(8, max(1, VAE_PIXELS // (pictures * size[0] * size[1])))
    for i in tqdm(range(0, len(todo), together), desc=f"caching {task}s", disable=rank > 0):
        group = list(readable(todo[i:i + together], lambda job: load_item(cfg, task, dataset, job[0], size)))
        if not group:
            continue
        pixels = normalise(torch.cat([loaded for _, (loaded, _, _) in group]))
        moments = encode_moments(pipe.vae, pixels).cpu().chunk(len(group))
        for ((_, file, stamp), (_, words, name)), m in zip(group, moments):
            # (T,2C,h,w) of a clip, (crops,2,1,2C,h,w) of a pair
            tensors = {"clip": m[0]} if task == "video" else {"views": m.unflatten(0, (cfg.crops, 2))}
            if cfg.prompts:
                words_with_cls = [with_reference_token(p, cls_for(cfg, task), name) for p in words]
                texts = encode_prompt(pipe, words_with_cls).cpu()
                tensors |= {f"text_{d}": text for d, text in enumerate(texts)}
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({k: v.contiguous().clone() for k, v in tensors.items()}, f"{file}.tmp",
                          metadata={"stamp": stamp, "prompts": json.dumps(words), "item": name})
                os.replace(f"{file}.tmp", file)
            except (SafetensorError, OSError) as e:  # a full disk
                raise OSError(f"cannot write {file}: {e}. The same command goes on where it stopped")
            cached += 1
    if world_size > 1:
        dist.all_reduce(cached)
    if rank == 0:
        write(index, json.dumps(key | {"complete": True, "cached": cached.item()}, indent=1))
        print(f"{out}: {cached} of {len(items)} {task}s cached")
