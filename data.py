"""Training data from disk: pairs of pictures of one subject, and plain clips. Any files that Pillow and PyAV read.

    images   a folder of *.parquet with the Subjects200K columns `image` (two views side by side) and `description`
             {description_0, description_1}; or a folder with pairs.jsonl, one line per pair:
             {"image_0": "a.jpg", "image_1": "b.jpg", "description_0": "...", "description_1": "...", "item": "cat"}
    videos   a folder of clips, each with its caption in a .txt file of the same name

Every sample is a function of (seed, step, index): no state to save, any rank can make any sample, and a resumed run
sees the data that an uninterrupted one would have seen. Nothing is dropped here: train.py chooses which reference
tokens a step leaves out.
"""
import atexit
import io
import json
import os
import signal
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from common.media import (CLIP_SUFFIXES, check_file, fingerprint, load_clip, load_image, read_text, resize_center_crop,
                          save_video, to_pixels)
from common.run import rng

TASKS = ("image", "video")  # the two data sets, and the two branches of Algorithm 1
SUBJECTS200K = {"image": {"bytes"}, "description": {"description_0", "description_1"}}  # columns, the fields we read
__all__ = ["load_image", "load_clip", "save_video", "ImagePairs", "Clips", "batches"]  # what others call


# ---- pairs of pictures -----------------------------------------------------------------------------------------------

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
    if w // 2 <= 2 * t:
        raise ValueError(f"its picture of {w}x{h} pixels is too narrow for two views")
    return [image.crop((x + t, t, x + w // 2 - t, h - t)) for x in (0, w // 2)]


def read_pairs(path):
    """The records of a pairs.jsonl, each with its line's number. ValueError names the first line that is no pair."""
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            pairs.append({**json.loads(line), "line": number})
            missing = {"image_0", "image_1", "description_0", "description_1"} - set(pairs[-1])
        except (json.JSONDecodeError, RecursionError, TypeError) as e:
            raise ValueError(f"{path}, line {number} is not the JSON of a pair: {e}")
        if missing:
            raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
    return pairs


def open_parquet(path, columns, dataset, **options):
    """Open a parquet file that must have certain columns: {name: the fields of that struct, None for texts}.

    ValueError names a file that is cut, no parquet, or not like `dataset`."""
    check_file(path, "parquet file")
    try:
        parquet = pq.ParquetFile(path, **options)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"cannot read {path}: {str(e).splitlines()[0]} Is it a whole parquet file?")
    missing = columns.keys() - set(parquet.schema_arrow.names)
    if missing:
        raise ValueError(f"{path} lacks the {dataset} column(s) {', '.join(sorted(missing))}")
    for name, fields in columns.items():
        kind = parquet.schema_arrow.field(name).type
        if fields:
            fits = pa.types.is_struct(kind) and fields <= {field.name for field in kind}
        else:
            fits = str(kind).startswith(("string", "large_string", "dictionary<values=string"))
        if not fits:
            expected = f"a struct with {', '.join(sorted(fields))}" if fields else "texts"
            raise ValueError(f"{path}: the column {name} holds {kind}, expected {expected} as in {dataset}")
    return parquet


def text_of(record, key):
    """record[key]. ValueError when that is no text, or a blank one."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {key} is no text but {repr(value)[:60]}")
    return value


def picture_of(image):
    """The picture in a row of Subjects200K, {"bytes", "path"}."""
    content = (image or {}).get("bytes")
    if not isinstance(content, bytes):
        raise ValueError(f"the bytes of its picture are missing, the row holds {repr(image)[:60]}")
    return load_image(io.BytesIO(content))


class ImagePairs(Dataset):
    """D_img: pairs of pictures I_ref and I_out of one subject, with the caption P of I_out. Each pair serves in both
    directions: view d is I_out with its own caption, and the other view is I_ref.

    folder, size (height, width), crop_jitter, seed. Item (step, index) -> {"reference" and "target" (1,3,H,W) uint8,
    "prompt", "item": the subject's name or "", "skipped": one line for each unreadable pair met on the way}. A `cache`
    (see common/latents.py) gives VAE moments (1,2C,h,w) as "reference_moments" and "target_moments" instead, and
    perhaps the prompt's embedding, "text". in_order: item (step, index) is pair `index` in direction index % 2, so each
    comes once.
    """

    def __init__(self, folder, size, crop_jitter=0.0, seed=0, cache=None, in_order=False):
        self.folder, self.size, self.crop_jitter, self.seed = Path(folder), size, crop_jitter, seed
        self.cache, self.in_order = cache, in_order
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder of image pairs at {folder}")
        self.rows = []  # (file, row group, row in it) of parquet, or a dict of pairs.jsonl
        if (self.folder / "pairs.jsonl").is_file():
            self.rows = read_pairs(self.folder / "pairs.jsonl")
        for file in sorted(self.folder.glob("**/*.parquet")):
            meta = open_parquet(file, SUBJECTS200K, "Subjects200K").metadata
            self.rows += [(file, g, r) for g in range(meta.num_row_groups) for r in range(meta.row_group(g).num_rows)]
        if not self.rows:
            raise ValueError(f"no image pairs in {folder}: expected *.parquet (Subjects200K) or pairs.jsonl")

    def __len__(self):
        return len(self.rows)

    @contextmanager
    def named(self, row):
        """Turn what is wrong with a pair into a ValueError of one line that says where it stands (rows from 0)."""
        try:
            yield self.rows[row]
        except (ValueError, OSError, pa.ArrowException) as e:
            if isinstance(self.rows[row], dict):
                place = f"line {self.rows[row]['line']} of {self.folder / 'pairs.jsonl'}"
            else:
                file, group, i = self.rows[row]
                meta = _parquet(file.absolute(), os.getpid()).metadata
                place = f"row {sum(meta.row_group(g).num_rows for g in range(group)) + i} of {file}"
            raise ValueError(f"{place}: {' '.join(str(e).split())}")

    def source(self, row):
        """(name, stamp): where the cache keeps this pair, and what changes when the pair's files do."""
        with self.named(row) as where:
            if isinstance(where, dict):
                names, captions = ([text_of(where, f"{kind}_{i}") for i in (0, 1)] for kind in ("image", "description"))
                pictures = [f"{name} {fingerprint(self.folder / name)}" for name in names]
                return f"{row:06d}", " ".join([*pictures, *captions])
            file, group, i = where
            return f"{file.relative_to(self.folder)}/{group:05d}-{i:03d}", fingerprint(file)

    def load(self, row):
        """The two views, the two captions, and the subject's name ("" when nobody gives it) of one pair."""
        with self.named(row) as where:
            if isinstance(where, dict):
                text = where
                views = [load_image(self.folder / text_of(where, f"image_{i}")) for i in (0, 1)]
            else:
                file, group, i = where
                record = _row_group(file.absolute(), group)[i].as_py()
                text = record["description"] or {}
                views = split_views(picture_of(record["image"]))
            captions, item = [text_of(text, f"description_{i}") for i in (0, 1)], text.get("item") or ""
            if not isinstance(item, str):
                raise ValueError(f"its item is no text but {repr(item)[:60]}")
            return views, captions, item

    def __getitem__(self, key):
        def make(r, attempt):
            pick = int(r.integers(2 * len(self.rows)))
            if self.in_order and attempt == 0:
                pick = 2 * (key[1] % len(self.rows)) + key[1] % 2
            d = pick % 2  # direction: view d is the target
            if self.cache:
                cached, prompts, item = self.cache.read(*self.source(pick // 2))
                views = cached["views"][int(r.integers(len(cached["views"])))]  # of one crop: (2,1,2C,h,w)
                return {"reference_moments": views[1 - d], "target_moments": views[d], "prompt": prompts[d],
                        "item": item, **_text(cached, d)}
            views, captions, item = self.load(pick // 2)
            target = resize_center_crop(views[d], *self.size, self.crop_jitter, r)
            reference = resize_center_crop(views[1 - d], *self.size, self.crop_jitter, r)
            return {"reference": to_pixels([reference]), "target": to_pixels([target]), "prompt": captions[d],
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
    return open_parquet(file, SUBJECTS200K, "Subjects200K", memory_map=True)


# ---- clips -----------------------------------------------------------------------------------------------------------

class Clips(Dataset):
    """D_vid: clips V with their captions T. The reference picture is a frame of the clip itself (Sec. 3.4).

    folder, size (height, width), frames (8k+1), fps, random_frame (False: always the first frame), seed.
    Item (step, index) -> {"reference" (1,3,H,W) uint8, "target" (F,3,H,W) uint8, "prompt", "item", "skipped"}. A cache
    gives "target_moments" (T,2C,h,w); the reference is always decoded, because a frame encoded alone is not a slice of
    the clip's latents, and there are as many as frames. in_order: item (step, index) is clip `index`, each once.
    """

    def __init__(self, folder, size, frames, fps, random_frame=True, seed=0, cache=None, in_order=False):
        self.size, self.frames, self.fps, self.random_frame, self.seed = size, frames, fps, random_frame, seed
        self.folder, self.cache, self.in_order = Path(folder), cache, in_order
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
        return str(file.relative_to(self.folder)), f"{fingerprint(file)} {caption_of(file)}"

    def random_frame_select(self, r):
        """RandomFrameSelect (3.4, Algorithm 1): which frame of the clip is the reference picture."""
        return int(r.integers(self.frames)) if self.random_frame else 0

    def __getitem__(self, key):
        def make(r, attempt):
            file = self.files[r.integers(len(self.files))]
            if self.in_order and attempt == 0:
                file = self.files[key[1] % len(self.files)]
            i = self.random_frame_select(r)
            if self.cache:
                cached, prompts, _ = self.cache.read(*self.source(file))
                reference = load_clip(file, i + 1, self.fps, self.size, first=i)
                return {"reference": to_pixels(reference), "target_moments": cached["clip"], "prompt": prompts[0],
                        "item": "", **_text(cached, 0)}
            pixels = to_pixels(load_clip(file, self.frames, self.fps, self.size))
            return {"reference": pixels[i:i + 1], "target": pixels,
                    "prompt": caption_of(file), "item": ""}
        return _first_readable(make, self.seed, "video", key)


def caption_of(clip):
    """The text beside a clip."""
    caption = read_text(clip.with_suffix(".txt"))
    if not caption:
        raise ValueError(f"the caption {clip.with_suffix('.txt')} is empty")
    return caption


def cls_for(cfg, task):
    """Where <cls> stands in the prompts of a task: see model.with_reference_token."""
    return cfg.cls if task == "image" or cfg.cls_video else "off"


def _first_readable(make, seed, stream, key, tries=20):
    """make(generator, attempt), again when the file it chose cannot be used. Also returns why samples were skipped."""
    skipped = []
    for attempt in range(tries):
        try:
            return {**make(rng(seed, stream, *key, attempt), attempt), "skipped": skipped}
        except (ValueError, KeyError, OSError) as e:
            skipped.append(str(e))
    raise ValueError(f"{tries} {stream} samples in a row could not be used, the last: {skipped[-1]}")


def _text(cached, d):
    """The embedding of prompt d, where that is cached."""
    return {"text": cached[f"text_{d}"]} if f"text_{d}" in cached else {}


# ---- batches ---------------------------------------------------------------------------------------------------------

class _Tasks(Dataset):
    def __init__(self, datasets):
        self.datasets = datasets

    def __getitem__(self, key):
        task, *place = key
        return self.datasets[task][place]


def _collate(samples):
    batch = {name: torch.stack([s[name] for s in samples]) for name, value in samples[0].items()
             if torch.is_tensor(value)}
    batch |= {"prompt": [s["prompt"] for s in samples], "item": [s["item"] for s in samples]}
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
    holds, in the order in which the loop will ask. Yields what the data sets give, stacked: "reference" (B,1,3,H,W) and
    "target" (B,F,3,H,W), or the moments of a cache, "prompt", "item", "skipped".
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
