"""Training data from disk: pairs of pictures of one subject, and plain clips. Any files that Pillow and PyAV read.

    images   a folder of *.parquet with the Subjects200K columns `image` (two views side by side) and `description`
             {description_0, description_1}; or a folder with pairs.jsonl, one line per pair:
             {"image_0": "a.jpg", "image_1": "b.jpg", "description_0": "...", "description_1": "...", "item": "cat"}
    videos   a folder of clips, each with its caption in a .txt file of the same name

Every sample is a function of (seed, step, index): no state to save, any rank can make any sample, and a resumed run
sees the data that an uninterrupted one would have seen. Nothing is dropped here: the reference tokens that a step
leaves out are chosen in train.py, where the loop can see and log it.
"""
import atexit
import io
import json
import os
import signal
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from run import changed, rng

CLIP_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}


# ---- pictures --------------------------------------------------------------------------------------------------------

def load_image(source):
    """Any picture (path or file object) as RGB: EXIF rotation applied, transparency put on white, 16 bits scaled."""
    try:
        image = ImageOps.exif_transpose(Image.open(source))
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert() would clip these at 255
            values = np.asarray(image).astype(np.float64)
            top = 255 if values.max() <= 255 else 65535 if values.max() <= 65535 else values.max()
            image = Image.fromarray((values.clip(0) / top * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no picture at {source}")
    except Exception as e:  # Pillow raises many kinds for a broken file
        raise ValueError(f"cannot read the picture {source}: {e}")


def resize_center_crop(image, height, width, jitter=0.0, rng=None):
    """Resize `image` to cover height x width and cut the middle out.

    jitter > 0 (Sec. A.2, "per-view random-crop jitter"): zoom in by up to this share and move the cut by up to half of
    it, with draws from `rng`. Whole-number shrinking is plain averaging (reducing_gap), so pixel art stays exact.
    """
    zoom, dy, dx = 1.0, 0.0, 0.0
    if jitter:
        zoom = 1 + jitter * rng.random()
        dy, dx = jitter * (rng.random(2) - 0.5)
    scale = max(height / image.height, width / image.width) * zoom
    w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize((w, h), Image.LANCZOS, reducing_gap=1.0)
    top = int(np.clip((h - height) / 2 + dy * h, 0, h - height))
    left = int(np.clip((w - width) / 2 + dx * w, 0, w - width))
    return image.crop((left, top, left + width, top + height))


def pad_to_shape(image, height, width):
    """White beside or above and below the picture, so that nothing of it is lost when it becomes height x width."""
    w = max(image.width, round(image.height * width / height))
    h = max(image.height, round(image.width * height / width))
    padded = Image.new("RGB", (w, h), "white")
    padded.paste(image, ((w - image.width) // 2, (h - image.height) // 2))
    return padded


def fit_reference(image, height, width, fit, jitter=0.0, rng=None):
    """A reference picture at height x width: fit "cover" cuts what stands over, "pad" adds white instead."""
    image = pad_to_shape(image, height, width) if fit == "pad" else image
    return resize_center_crop(image, height, width, jitter, rng)


def to_pixels(images):
    """PIL pictures of one size -> uint8 (F,3,H,W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def normalise(pixels):
    """uint8 pixels -> float in [-1,1], the VAE's range."""
    return pixels.float() / 127.5 - 1


def split_views(image):
    """The two views of a Subjects200K picture. Sources disagree on its padding, so it is read off the size.

    Layout | p | s x s | p | s x s | p | with p above and below: height = s + 2p, width = 2s + 3p, so p = 2h - w.
    Any other shape is cut in the middle and trimmed by 16/544 on all sides.
    """
    w, h = image.size
    p = 2 * h - w
    if 0 < p < h // 8:
        s = h - 2 * p
        return [image.crop((x, p, x + s, p + s)) for x in (p, 2 * p + s)]
    t = round(h * 16 / 544)
    return [image.crop((x + t, t, x + w // 2 - t, h - t)) for x in (0, w // 2)]


def read_text(path):
    """A caption or a list of prompts. ValueError for a file that is not UTF-8 text."""
    try:
        return Path(path).read_text().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file")


def read_pairs(path):
    """The records of a pairs.jsonl. ValueError names the first line that is not one."""
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            pairs.append(json.loads(line))
            missing = {"image_0", "image_1", "description_0", "description_1"} - set(pairs[-1])
        except (json.JSONDecodeError, TypeError) as e:
            raise ValueError(f"{path}, line {number} is not the JSON of a pair: {e}")
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
    return pairs


def open_parquet(path, **options):
    """A pyarrow ParquetFile. ValueError names a file that is cut or no parquet."""
    try:
        return pq.ParquetFile(path, **options)
    except (pa.ArrowInvalid, OSError) as e:
        raise ValueError(f"cannot read {path}: {str(e).splitlines()[0]} Is it a whole parquet file?")


class ImagePairs(Dataset):
    """D_img: (I_ref, I_out, P). Each pair serves in both directions: view d with its own caption, the other as I_ref.

    folder, size (height, width), crop_jitter, seed, fit (of the reference). Item (step, index) -> {"reference" and
    "pixels" (1,3,H,W) uint8, "prompt", "item": the subject's name or "", "skipped": one line for each unreadable pair
    met on the way}. With a `cache` (see Cache) the first two are VAE moments (1,2C,h,w) instead, and "text" may hold
    the prompt's embedding.
    """

    def __init__(self, folder, size, crop_jitter=0.0, seed=0, cache=None, fit="cover"):
        self.folder, self.size, self.crop_jitter, self.seed = Path(folder), size, crop_jitter, seed
        self.cache, self.fit = cache, fit
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of image pairs at {folder}")
        self.rows = []  # (file, row group, row in it) of parquet, or a dict of pairs.jsonl
        if (self.folder / "pairs.jsonl").is_file():
            self.rows = read_pairs(self.folder / "pairs.jsonl")
        for file in sorted(self.folder.glob("**/*.parquet")):
            meta = open_parquet(file).metadata
            missing = {"image", "description"} - set(meta.schema.to_arrow_schema().names)
            if missing:
                raise ValueError(f"{file} lacks the Subjects200K column(s) {', '.join(sorted(missing))}")
            self.rows += [(file, g, r) for g in range(meta.num_row_groups) for r in range(meta.row_group(g).num_rows)]
        if not self.rows:
            raise ValueError(f"no image pairs in {folder}: expected *.parquet (Subjects200K) or pairs.jsonl")

    def __len__(self):
        return len(self.rows)

    def source(self, row):
        """(name, stamp): where the cache keeps this pair, and what changes when the pair's files do."""
        where = self.rows[row]
        if isinstance(where, dict):
            stamp = [f"{where[k]} {_size(self.folder / where[k])}" for k in ("image_0", "image_1")]
            return f"{row:06d}", " ".join([*stamp, where["description_0"], where["description_1"]])
        file, group, i = where
        return f"{file.relative_to(self.folder)}/{group:05d}-{i:03d}", str(_size(file))

    def load(self, row):
        """The two views, the two captions, and the subject's name ("" when nobody gives it) of one pair."""
        if isinstance(self.rows[row], dict):
            record = self.rows[row]
            views, text = [load_image(self.folder / record[f"image_{i}"]) for i in (0, 1)], record
        else:
            file, group, i = self.rows[row]
            record = _row_group(file, group)[i].as_py()
            views, text = split_views(load_image(io.BytesIO(record["image"]["bytes"]))), record["description"]
        captions = [(text or {}).get("description_0"), (text or {}).get("description_1")]
        if not all(captions):
            raise ValueError(f"pair {row} of {self.folder} has no description_0 or description_1")
        return views, captions, text.get("item") or ""

    def __getitem__(self, key):
        def make(r):
            pick = int(r.integers(2 * len(self.rows)))
            d = pick % 2  # direction: view d is the target
            if self.cache:
                cached, prompts, item = self.cache.read(*self.source(pick // 2))
                crop = cached["moments"][int(r.integers(len(cached["moments"])))]  # (2 or 4 with --fit pad,1,2C,h,w)
                return {"reference": crop[-1 - d], "pixels": crop[d], "prompt": prompts[d], "item": item,
                        **_text(cached, d)}
            views, captions, item = self.load(pick // 2)
            target = resize_center_crop(views[d], *self.size, self.crop_jitter, r)
            reference = fit_reference(views[1 - d], *self.size, self.fit, self.crop_jitter, r)
            return {"reference": to_pixels([reference]), "pixels": to_pixels([target]), "prompt": captions[d],
                    "item": item}
        return _first_readable(make, self.seed, "image", key)


@lru_cache(maxsize=8)
def _row_group(file, group):
    """One row group's rows. A random row decodes its whole group, so files with small groups (16 rows) read fastest."""
    table = _parquet(file, os.getpid()).read_row_group(group, columns=["image", "description"])
    return table.to_struct_array()


@lru_cache(maxsize=64)
def _parquet(file, process):
    """An open file, once per process: parsing the footer again for each row would cost more than reading the row."""
    return open_parquet(file, memory_map=True)


# ---- clips -----------------------------------------------------------------------------------------------------------

def clip_frames(wanted, compression=4):
    """The largest 8k+1 up to `wanted`, for the VAE's temporal compression of 4 (2*compression*k + 1 in general).

    The CogVideoX VAE decodes latent frames in twos, and other lengths come back longer: 13 frames in, 16 out."""
    return (wanted - 1) // (2 * compression) * 2 * compression + 1


def load_clip(path, frames, fps, size=None, first=0):
    """Frames first..frames-1 of a clip at `fps`, as PIL pictures. ValueError when it is unreadable or too short.

    With a size (height, width) each frame is cut to cover it while decoding, so 4K clips need no 4K memory."""
    pictures, start = [], None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            for n, frame in enumerate(container.decode(stream)):
                time = frame.time if frame.time is not None else n / rate
                start = time if start is None else start
                # This frame is shown until time + 1/rate: it serves every wanted instant k/fps before that.
                picture = None
                while len(pictures) < frames and len(pictures) / fps < time - start + 1 / rate - 1e-6:
                    if picture is None and len(pictures) >= first:
                        picture = resize_center_crop(frame.to_image(), *size) if size else frame.to_image()
                    pictures.append(picture)
                if len(pictures) == frames:
                    return pictures[first:]
    except Exception as e:  # PyAV raises many kinds for a broken file
        raise ValueError(f"cannot read the clip {path}: {e}")
    raise ValueError(f"the clip {path} is too short: {len(pictures)} frames at {fps} fps, {frames} asked")


def save_video(path, pictures, fps, enlarge=1, format=None):
    """Write PIL pictures as H.264 (yuv420p, which every player takes), enlarged by a whole number, nearest neighbour.

    Small pictures need it: yuv420p keeps one colour per 2x2 pixels. Same input, same file."""
    width, height = pictures[0].width * enlarge, pictures[0].height * enlarge
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "threads": "1"}
        for picture in pictures:
            picture = picture.resize((width, height), Image.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


class Clips(Dataset):
    """D_vid: (T, V), with a reference frame out of the clip itself (Sec. 3.4).

    folder, size (height, width), frames (8k+1), fps, random_frame (False: always the first frame), seed.
    Item (step, index) -> {"reference" (1,3,H,W) uint8, "pixels" (F,3,H,W) uint8, "prompt", "item", "skipped"}. Cached
    "pixels" are VAE moments (T,2C,h,w); the reference is always decoded, because a frame encoded alone is not a slice
    of the clip's latents, and there are as many as frames.
    """

    def __init__(self, folder, size, frames, fps, random_frame=True, seed=0, cache=None):
        self.size, self.frames, self.fps, self.random_frame, self.seed = size, frames, fps, random_frame, seed
        self.folder, self.cache = Path(folder), cache
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder of clips at {folder}")
        self.files = sorted(f for f in Path(folder).glob("**/*") if f.suffix.lower() in CLIP_SUFFIXES)
        if not self.files:
            raise ValueError(f"no clips in {folder}: expected {' '.join(sorted(CLIP_SUFFIXES))}")
        for file in self.files:
            if not file.with_suffix(".txt").is_file():
                raise FileNotFoundError(f"the clip {file} has no caption: expected {file.with_suffix('.txt')}")

    def __len__(self):
        return len(self.files)

    def source(self, file):
        """(name, stamp): where the cache keeps this clip, and what changes when the clip or its caption does."""
        return str(file.relative_to(self.folder)), f"{_size(file)} {read_text(file.with_suffix('.txt'))}"

    def random_frame_select(self, r):
        """RandomFrameSelect (3.4, Algorithm 1): which frame of the clip is the reference picture."""
        return int(r.integers(self.frames)) if self.random_frame else 0

    def __getitem__(self, key):
        def make(r):
            file = self.files[r.integers(len(self.files))]
            i = self.random_frame_select(r)
            if self.cache:
                cached, prompts, _ = self.cache.read(*self.source(file))
                reference = load_clip(file, i + 1, self.fps, self.size, first=i)
                return {"reference": to_pixels(reference), "pixels": cached["moments"], "prompt": prompts[0],
                        "item": "", **_text(cached, 0)}
            pixels = to_pixels(load_clip(file, self.frames, self.fps, self.size))
            return {"reference": pixels[i:i + 1], "pixels": pixels,
                    "prompt": read_text(file.with_suffix(".txt")), "item": ""}
        return _first_readable(make, self.seed, "video", key)


def _first_readable(make, seed, stream, key, tries=20):
    """make(generator), drawn again when the file it chose cannot be used. Also returns why samples were skipped."""
    skipped = []
    for attempt in range(tries):
        try:
            return {**make(rng(seed, stream, *key, attempt)), "skipped": skipped}
        except (ValueError, KeyError, OSError) as e:
            skipped.append(str(e))
    raise ValueError(f"{tries} {stream} samples in a row could not be used, the last: {skipped[-1]}")


# ---- cached latents --------------------------------------------------------------------------------------------------

def cls_for(cfg, task):
    """Where <cls> stands in the prompts of a task: see model.with_reference_token."""
    return cfg.cls if task == "image" or cfg.cls_video else "off"


def cache_key(cfg, pipe, task, size, frames, prompts=True):
    """Everything that cached latents (and prompts) depend on: they are refused when any of it has changed."""
    from model import weight_fingerprint  # here: --help need not wait for diffusers
    key = {"vae": weight_fingerprint(pipe.vae.encoder.conv_in.conv.weight), "dtype": str(pipe.vae.dtype),
           "tiling": cfg.vae_tiling and task == "video",  # pictures are always whole
           "height": size[0], "width": size[1]}
    if prompts:
        key |= {"text_encoder": weight_fingerprint(pipe.text_encoder.get_input_embeddings().weight[:100]),
                "cls": cls_for(cfg, task)}
    if task == "image":
        return key | {"crop_jitter": cfg.crop_jitter, "fit": cfg.fit}
    return key | {"frames": frames, "fps": cfg.fps}


def open_caches(cfg, pipe, size, frames):
    """{"image": Cache or None, "video": Cache or None}: what lies in --cache."""
    caches = {"image": None, "video": None}
    for task in caches:
        if cfg.cache and (Path(cfg.cache) / task).is_dir():
            caches[task] = Cache(Path(cfg.cache) / task, cache_key(cfg, pipe, task, size, frames))
    if cfg.cache and not any(caches.values()):
        raise FileNotFoundError(f"no cache at {cfg.cache}: run python -m paper.prepare cache")
    return caches


class Cache:
    """Reads what `python -m paper.prepare cache` wrote: folder/index.json and a safetensors file per clip or pair.

    key: a dict of everything that the cached numbers depend on. ValueError when the cache is not finished, or was made
    with another key: a stale cache would train silently on the wrong latents.
    """

    def __init__(self, folder, key):
        self.folder = Path(folder)
        index = self.folder / "index.json"
        made = json.loads(index.read_text()) if index.is_file() else {}
        if not made.get("complete"):
            raise ValueError(f"the cache {folder} is not there or not finished: run python -m paper.prepare cache")
        known = {k: v for k, v in key.items() if k in made}  # a cache without prompts does not name the text encoder
        if differ := changed(made, known):
            raise ValueError(f"the cache {folder} was made with other settings ({differ}): make it again")
        self.cached = made.get("cached", 0)  # how many samples it holds
        self.prompts = "text_encoder" in made  # with the embeddings of their prompts?

    def read(self, name, stamp):
        """({"moments", perhaps "text_0", ...}, prompts, the subject's name or "") of one sample.

        ValueError when it is not there, broken, or was made from another file (its stamp differs)."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            raise ValueError(f"{name} is not in the cache {self.folder}: it came after the cache, or could not be read")
        try:
            with safe_open(file, "pt") as f:
                header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"cannot read {file}: {e}; run python -m paper.prepare cache again")
        if header["stamp"] != stamp:
            raise ValueError(f"{file} was made from another {name}: run python -m paper.prepare cache again")
        return tensors, json.loads(header["prompts"]), header.get("item", "")


def _size(file):
    return Path(file).stat().st_size


def _text(cached, d):
    """The embedding of prompt d, where that is cached."""
    return {"text": cached[f"text_{d}"]} if f"text_{d}" in cached else {}


# ---- batches ---------------------------------------------------------------------------------------------------------

class _Tasks(Dataset):
    def __init__(self, datasets):
        self.datasets = datasets

    def __getitem__(self, key):
        task, *place = key
        return self.datasets[task][place] | {"key": key}


def _collate(samples):
    batch = {k: torch.stack([s[k] for s in samples]) for k in ("reference", "pixels", "text") if k in samples[0]}
    batch |= {"prompt": [s["prompt"] for s in samples], "item": [s["item"] for s in samples]}
    batch["keys"] = [s["key"] for s in samples]
    batch["skipped"] = [reason for s in samples for reason in s["skipped"]]
    return batch


def _ignore_signals(worker):
    """A SIGTERM or Ctrl-C to the whole job reaches the main process, which then ends this one. Until then the loop may
    still need data for a step or two."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(datasets, keys, workers=0):
    """The micro-batches of a run, one after the other, made ahead of time by `workers` processes.

    datasets: {"image": ImagePairs, "video": Clips}. keys: for each micro-batch the list of (task, step, index) it
    holds, in the order in which the loop will ask. Yields {"reference" (B,1,3,H,W), "pixels" (B,F,3,H,W) uint8, or the
    moments of a cache, "prompt", "item", "keys", "skipped"}.
    """
    loader = iter(DataLoader(_Tasks(datasets), batch_sampler=keys, num_workers=workers, collate_fn=_collate,
                             prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
                             worker_init_fn=_ignore_signals))

    def end_workers():
        loader._shutdown_workers()
        for process in loader._workers:
            process.kill()  # one that still reads
    if not workers:
        yield from loader
        return
    atexit.register(end_workers)  # an error leaves the loop here: Python's own exit would wait for them for ever
    try:
        yield from loader
    finally:
        end_workers()
        atexit.unregister(end_workers)
