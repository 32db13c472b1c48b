"""Pictures and clips, read from files and written to them. What Pillow and PyAV read becomes RGB pictures of one size.

Nothing here knows the method. A picture that is turned, mirrored, transparent or in another colour space comes out as a
viewer shows it, and so does a clip.
"""
import hashlib
import io
import os
import warnings
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition
from PIL import Image, ImageCms, ImageOps

CLIP_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif"}
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
    plain = image if image.mode in ("L", "CMYK", "LAB") else image.convert("RGB")  # what profiles are made for
    try:
        if image.mode == "LAB":  # it needs no profile: LAB is what profiles are defined by
            source = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        colours = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
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


def fit_reference(image, height, width, fit):
    """A reference picture at height x width: fit "cover" cuts what stands over, "pad" adds white beside it instead."""
    if fit == "pad":
        w = max(image.width, round(image.height * width / height))
        h = max(image.height, round(image.width * height / width))
        whole, image = image, Image.new("RGB", (w, h), "white")
        image.paste(whole, ((w - whole.width) // 2, (h - whole.height) // 2))
    return resize_center_crop(image, height, width)


def to_pixels(images):
    """PIL pictures of one size -> uint8 (F,3,H,W)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def normalise(pixels):
    """uint8 pixels -> float in [-1,1], the VAE's range."""
    return pixels.float() / 127.5 - 1


def contact_sheet(video, reference=None, enlarge=1, columns=6):
    """One row: the reference, a gap, then `columns` frames evenly spread over the video."""
    picks = sorted({round(i * (len(video) - 1) / max(columns - 1, 1)) for i in range(columns)})
    w, h, gap = video[0].width * enlarge, video[0].height * enlarge, 4
    row = [video[i].resize((w, h), Image.NEAREST) for i in picks]
    if reference is not None:
        row.insert(0, resize_center_crop(reference, h, w))
    sheet = Image.new("RGB", ((w + gap) * len(row) - gap, h), "white")
    for i, picture in enumerate(row):
        sheet.paste(picture, (i * (w + gap), 0))
    return sheet


# ---- clips -----------------------------------------------------------------------------------------------------------

def clip_frames(wanted, compression=4):
    """The largest 8k+1 up to `wanted`, for the VAE's temporal compression of 4 (2*compression*k + 1 in general).

    The CogVideoX VAE decodes latent frames in twos, and other lengths come back longer: 13 frames in, 16 out."""
    return (wanted - 1) // (2 * compression) * 2 * compression + 1


def latent_frames(frames, compression=4):
    """T: how many latent frames the VAE makes of a clip of 8k+1 frames; 13 of 49."""
    return (frames - 1) // compression + 1


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


def save_video(path, pictures, fps, enlarge=1):
    """Write PIL pictures as H.264 (yuv420p, which every player takes), enlarged by a whole number, nearest neighbour.

    Small pictures need it: yuv420p keeps one colour per 2x2 pixels. Same input, same file, whole or not at all."""
    if not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must be from 0.01 to 1000, got {fps:g}")
    path, content = Path(path), io.BytesIO()
    part = path.with_name(f"{path.name}.part")
    width, height = pictures[0].width * enlarge, pictures[0].height * enlarge
    format = {".mkv": "matroska", ".m4v": "mp4"}.get(path.suffix.lower(), path.suffix.lower()[1:])
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
        part.unlink(missing_ok=True)
        raise OSError(e.errno, f"cannot write {path}: {e.strerror}")
