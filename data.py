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
import hashlib
import io
import json
import os
import signal
import warnings
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from statistics import median

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset

from run import changed, read_json, rng

CLIP_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}
SUBJECTS200K = {"image": {"bytes"}, "description": {"description_0", "description_1"}}  # columns, the fields we read
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # 89 to 179 million pixels are no attack


# ---- files -----------------------------------------------------------------------------------------------------------

def check_file(path, what):
    """One clear line for what is no plain file. A pipe under a picture's name would hang whoever opens it."""
    if "http:/" in str(path) or "https:/" in str(path):
        raise ValueError(f"{path} is an address: download the {what} first, and give its file")
    if not Path(path).exists():
        raise FileNotFoundError(f"no {what} at {path}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device: expected a {what}")


def read_text(path):
    """A caption or a list of prompts. ValueError for a file that is not UTF-8 text."""
    check_file(path, "text file")
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()  # sig: Windows' mark at the start is no text
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a UTF-8 text file")


def fingerprint(file):
    """What changes when a file does: a hash of its size and of 1 MB of it, in 16 pieces spread over the file.

    Whole clips would take too long to read, and the time of the last change is another one after a copy. Each process
    reads a file once, and again when its size or its time has changed."""
    check_file(file, "file")
    status = Path(file).stat()
    return _hash(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _hash(file, size, changed_at, piece=2**16):
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as f:
        for start in sorted({max(0, size - piece) * i // 15 for i in range(16)}):
            f.seek(start)
            digest.update(f.read(piece))
    return digest.hexdigest()[:16]


# ---- pictures --------------------------------------------------------------------------------------------------------

def load_image(source):
    """Any picture (path or file object) as RGB: EXIF rotation and colour profile applied, transparency put on white, 16
    bits scaled. ValueError for what is no picture."""
    name = "the picture"
    if not hasattr(source, "read"):
        check_file(source, "picture")
        name += f" {source}"
    try:
        image = Image.open(source)
        profile = image.info.get("icc_profile")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # convert() would clip these at 255
            values = np.asarray(image).astype(np.float64)
            top = 255 if values.max() <= 255 else 65535 if values.max() <= 65535 else values.max()
            image = Image.fromarray((values.clip(0) / top * 255).round().astype(np.uint8))
        if profile or image.mode == "LAB":
            image = to_srgb(image, profile)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Image.UnidentifiedImageError:  # its text has an address in memory, another one each time
        raise ValueError(f"cannot read {name}: it is empty, damaged, or no picture that Pillow reads (HEIC, SVG, PDF, "
                         "a video). Save it as PNG or JPEG; of a video save one frame")
    except Exception as e:  # Pillow raises many kinds for a broken file
        raise ValueError(f"cannot read {name}: {e}")


def to_srgb(image, profile):
    """A picture's colours as its profile means them: most phones write Display P3. A profile that is damaged or meant
    for another kind of picture is left aside."""
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    try:
        source = ImageCms.createProfile("LAB")  # needs no profile: LAB is what profiles are defined by
        if image.mode != "LAB":
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        wanted = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK", "Lab ": "LAB"}[source.profile.xcolor_space]
        mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if image.mode in ("1", "L", "LA") else "RGB"
        if wanted != mode and (wanted, mode) != ("RGB", "L"):
            return image
        colours = ImageCms.profileToProfile(image.convert(wanted), source, ImageCms.createProfile("sRGB"),
                                            outputMode="RGB")
    except Exception:  # ImageCms raises many kinds for a broken profile
        return image
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours


def resize_center_crop(image, height, width, jitter=0.0, rng=None):
    """Resize `image` to cover height x width and cut the middle out.

    jitter > 0 (Sec. A.2, "per-view random-crop jitter"): zoom in by up to this share and move the cut by up to half of
    it, with draws from `rng`. Whole-number shrinking is plain averaging, so pixel art stays exact; all else is Lanczos.
    """
    zoom, dy, dx = 1.0, 0.0, 0.0
    if jitter:
        zoom = 1 + jitter * rng.random()
        dy, dx = jitter * (rng.random(2) - 0.5)
    scale = max(height / image.height, width / image.width) * zoom
    w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    top = int(np.clip((h - height) / 2 + dy * h, 0, h - height))
    left = int(np.clip((w - width) / 2 + dx * w, 0, w - width))
    # Only the part that stays is resized: the whole of a thin strip would fill the memory.
    across, down = image.width / w, image.height / h
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    if across.is_integer() and down.is_integer():
        return image.crop([int(edge) for edge in box]).reduce((int(across), int(down)))
    return image.resize((width, height), Image.LANCZOS, box=box)


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
    if w // 2 <= 2 * t:
        raise ValueError(f"its picture of {w}x{h} pixels is too narrow for two views")
    return [image.crop((x + t, t, x + w // 2 - t, h - t)) for x in (0, w // 2)]


def read_pairs(path):
    """The records of a pairs.jsonl, each with the number of its line. ValueError names the first line that is none."""
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
    """A pyarrow ParquetFile with these columns: {name: the fields that it has, or none for a column of texts}.

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
    """D_img: (I_ref, I_out, P). Each pair serves in both directions: view d with its own caption, the other as I_ref.

    folder, size (height, width), crop_jitter, seed, fit (of the reference). Item (step, index) -> {"reference" and
    "pixels" (1,3,H,W) uint8, "prompt", "item": the subject's name or "", "skipped": one line for each unreadable pair
    met on the way}. With a `cache` (see Cache) the first two are VAE moments (1,2C,h,w) instead, and "text" may hold
    the prompt's embedding. in_order: item (step, index) is pair `index` in direction index % 2, so each comes once.
    """

    def __init__(self, folder, size, crop_jitter=0.0, seed=0, cache=None, fit="cover", in_order=False):
        self.folder, self.size, self.crop_jitter, self.seed = Path(folder), size, crop_jitter, seed
        self.cache, self.fit, self.in_order = cache, fit, in_order
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
        """What is wrong with a pair is a ValueError of one line that says where it stands, rows counted from 0."""
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
    return open_parquet(file, SUBJECTS200K, "Subjects200K", memory_map=True)


# ---- clips -----------------------------------------------------------------------------------------------------------

def clip_frames(wanted, compression=4):
    """The largest 8k+1 up to `wanted`, for the VAE's temporal compression of 4 (2*compression*k + 1 in general).

    The CogVideoX VAE decodes latent frames in twos, and other lengths come back longer: 13 frames in, 16 out."""
    return (wanted - 1) // (2 * compression) * 2 * compression + 1


@contextmanager
def open_clip(path):
    """The video of a clip, a PyAV stream. Whatever goes wrong with it is a ValueError that names the clip."""
    check_file(path, "clip")
    try:
        with av.open(str(path)) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise ValueError("it has no video")
            streams[0].thread_type = "AUTO"
            yield streams[0]
    except Exception as e:  # PyAV raises many kinds; their whole text can be another one each time
        raise ValueError(f"cannot read the clip {path}: {getattr(e, 'strerror', None) or e}")


def rate_of(stream):
    """Frames per second of a video, on average."""
    return float(stream.average_rate or stream.guessed_rate or 24)


def shown_frames(stream):
    """(frame, from, until) for each frame of a video: the seconds during which a player shows it. A frame stays until
    the next one comes, the last one for its own duration; one that comes too late is left out."""
    length, n, steady, held = 1 / rate_of(stream), 0, True, None
    for frame in stream.container.decode(stream):
        if held is None:
            start, begins = frame.time or 0.0, 0.0
        else:
            n += 1
            time = begins + length if frame.time is None else frame.time - start
            if time < begins:
                continue
            # Files round times, mkv to 1 ms and gif to 10. As long as they fit a steady rate, they are meant to be it.
            steady = steady and abs(time - n * length) <= min(1.01 * float(stream.time_base), length / 4)
            time = n * length if steady else time
            yield held, begins, time
            begins = time
        held = frame
    if held is not None:
        yield held, begins, begins + max(length, float((held.duration or 0) * held.time_base))


def as_shown(frame, stream):
    """A frame as the picture that a player shows: its pixels made square, then turned and mirrored as the file says."""
    image = frame.to_image(threads=1)  # the readers are processes already
    aspect = float(stream.sample_aspect_ratio or 1)  # of a pixel: DVDs and DV store 16:9 in 720 columns
    if aspect != 1 and 0.25 <= aspect <= 4:  # else it is a mistake
        image = image.resize((round(image.width * aspect), image.height), Image.LANCZOS)
    # Not frame.side_data: with it a frame refers to itself, and stays in memory until Python looks for such circles.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # x' = a x + c y, y' = b x + d y
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if abs(b) > abs(a):  # a quarter turn: exchange the axes, what is left are mirrors
            image, a, d = image.transpose(Image.Transpose.TRANSPOSE), c, b
        image = ImageOps.mirror(image) if a < 0 else image
        image = ImageOps.flip(image) if d < 0 else image
    return image


def load_clip(path, frames, fps, size=None, first=0):
    """Frames first..frames-1 of a clip at `fps`, as PIL pictures: what a player shows at 0, 1/fps, 2/fps, ... seconds.

    ValueError when it is unreadable, too short, or so slow that pictures would come twice. With a size (height, width)
    each frame is cut to cover it while decoding, so 4K clips need no 4K memory."""
    pictures, lengths = [], []
    with open_clip(path) as stream:
        rate = rate_of(stream)
        for frame, begins, until in shown_frames(stream):
            lengths.append(until - begins)
            picture = None
            while len(pictures) < frames and len(pictures) / fps < until - 1e-6:
                if picture is None and len(pictures) >= first:
                    picture = as_shown(frame, stream)
                    picture = resize_center_crop(picture, *size) if size else picture
                pictures.append(picture)
            if len(pictures) == frames:
                break
    # 5 % are for 23.976 as 24. The median is for clips that pause now and then, and are fast enough when they move.
    usual = median(lengths or [0])
    if first == 0 and frames > 1 and fps > 1.05 * rate and fps * usual > 1.05:
        raise ValueError(f"the clip {path} is too slow for {fps:g} fps: it has {1 / usual:.3g} pictures a second")
    if len(pictures) < frames:
        raise ValueError(f"the clip {path} is too short: {len(pictures)} frames at {fps:g} fps, {frames} asked")
    return pictures[first:]


def save_video(path, pictures, fps, enlarge=1, format=None):
    """Write PIL pictures as H.264 (yuv420p, which every player takes), enlarged by a whole number, nearest neighbour.

    Small pictures need it: yuv420p keeps one colour per 2x2 pixels. Same input, same file, whole or not at all."""
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be from 0.01 to 1000, got {fps:g}")
    path, content = Path(path), io.BytesIO()
    part = path.with_name(f"{path.name}.part")
    width, height = pictures[0].width * enlarge, pictures[0].height * enlarge
    format = format or {".mkv": "matroska", ".m4v": "mp4"}.get(path.suffix.lower(), path.suffix.lower()[1:])
    if format not in av.formats_available:
        raise ValueError(f"{path} has no ending of a video: name it .mp4")
    with av.open(content, "w", format=format) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "threads": "1"}
        for picture in pictures:
            picture = picture.resize((width, height), Image.NEAREST)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise OSError(e.errno, f"cannot write {path}: {e.strerror}")


class Clips(Dataset):
    """D_vid: (T, V), with a reference frame out of the clip itself (Sec. 3.4).

    folder, size (height, width), frames (8k+1), fps, random_frame (False: always the first frame), seed.
    Item (step, index) -> {"reference" (1,3,H,W) uint8, "pixels" (F,3,H,W) uint8, "prompt", "item", "skipped"}. Cached
    "pixels" are VAE moments (T,2C,h,w); the reference is always decoded, because a frame encoded alone is not a slice
    of the clip's latents, and there are as many as frames. in_order: item (step, index) is clip `index`, each once.
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
        if (self.folder / "prepare.json").is_file():
            stored = read_json(self.folder / "prepare.json").get("options", {})
            if stored.get("store") == "training" and fps > 1.05 * stored["fps"]:
                raise ValueError(f"{folder} holds clips of {stored['fps']:g} fps (prepare pexels --store training): "
                                 f"for --fps {fps:g} prepare them again, into another folder")

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
                return {"reference": to_pixels(reference), "pixels": cached["moments"], "prompt": prompts[0],
                        "item": "", **_text(cached, 0)}
            pixels = to_pixels(load_clip(file, self.frames, self.fps, self.size))
            return {"reference": pixels[i:i + 1], "pixels": pixels,
                    "prompt": caption_of(file), "item": ""}
        return _first_readable(make, self.seed, "video", key)


def caption_of(clip):
    """The text beside a clip."""
    caption = read_text(clip.with_suffix(".txt"))
    if not caption:
        raise ValueError(f"the caption {clip.with_suffix('.txt')} is empty")
    return caption


def _first_readable(make, seed, stream, key, tries=20):
    """make(generator, attempt), again when the file it chose cannot be used. Also returns why samples were skipped."""
    skipped = []
    for attempt in range(tries):
        try:
            return {**make(rng(seed, stream, *key, attempt), attempt), "skipped": skipped}
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
        made = read_json(index) if index.is_file() else {}
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
                header, tensors = f.metadata() or {}, {k: f.get_tensor(k) for k in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"cannot read {file}: {e}; run python -m paper.prepare cache again")
        if header.get("stamp") != stamp:
            raise ValueError(f"{file} was made from another {name}: run python -m paper.prepare cache again")
        return tensors, json.loads(header["prompts"]), header.get("item", "")


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
