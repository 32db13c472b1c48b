"""The paper's data sets, from the hub to disk (Sec. 5.1, A.2), and cached latents.

    python -m paper.prepare subjects200k --out data/subjects200k     image pairs: filtered, split by subject
    python -m paper.prepare pexels --out data/pexels --n 4000        clips: downloaded, checked, with captions
    python -m paper.prepare cache --videos data/pexels --out data/cache      VAE latents, encoded once

Each can be stopped at any moment; the same command goes on where it was and fetches only what is missing. Beside OUT
there is OUT_val, the held-out part that training never sees. Counts of what was kept and why the rest was not are
printed at the end and kept in OUT/prepare.json.
"""
import sys

if __name__ == "__main__" and not __package__:
    sys.exit("run it from the repository's root as a module: python -m paper.prepare")

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import torch.distributed as dist
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from common.latents import Latents, prepare_cache
from common.media import CLIP_SUFFIXES, load_clip, read_text, save_video
from common.run import (changed, check, command_line, join_ranks, knob, rank_and_world_size, read_json,
                        refuse_overwriting, write)
from data import SUBJECTS200K, open_parquet, picture_of, split_views


def share(text):
    """A fixed number in [0, 1) for a text: the same on every machine, whatever else is in the data set."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def parquet_files(source, folder):
    """Paths of a data set's parquet files, one after the other: local (a file or a folder), or a hub id's downloads.

    Downloads go to `folder` by huggingface_hub, which resumes and verifies them."""
    if Path(source).exists():
        files = sorted(Path(source).glob("**/*.parquet")) if Path(source).is_dir() else [Path(source)]
        if not files:
            raise FileNotFoundError(f"no *.parquet in {source}")
        yield from ((str(f.relative_to(source) if f != Path(source) else f.name), lambda f=f: f) for f in files)
    elif source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import HfApi, hf_hub_download

        def from_hub(get, *args, **kwargs):
            try:
                return get(*args, repo_type="dataset", **kwargs)
            except Exception as e:  # no network: its HTTP library has errors of its own
                raise FileNotFoundError(f"no folder {source}, and the download from the hub failed ({str(e)[:200]}). "
                                        "Without network: download it elsewhere, then --source FOLDER")
        names = sorted(f for f in from_hub(HfApi().list_repo_files, source) if f.endswith(".parquet"))
        if not names:
            raise FileNotFoundError(f"no *.parquet in the hub's data set {source}")
        for name in names:
            yield name, lambda name=name: Path(from_hub(hf_hub_download, source, name, local_dir=folder))
    else:
        raise FileNotFoundError(f"no data at {source}: expected a parquet file, a folder of them, or a hub id")


def beside(out, suffix):
    """data/pexels or data/pexels/ and "_val" -> data/pexels_val: never inside, where training would find it."""
    return Path(out).with_name(Path(out).name + suffix)


class Manifest:
    """OUT/prepare.json: the options, and what became of each piece of work. Written whole after each piece."""

    def __init__(self, out, options):
        self.file = Path(out) / "prepare.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.content = {"options": options, "done": {}}
        if self.file.is_file():
            self.content = read_json(self.file)
            if not all(isinstance(self.content.get(part), dict) for part in ("options", "done")):
                raise ValueError(f"{self.file} is damaged, it lacks what was done: delete it or choose another --out")
            if differ := changed(self.content["options"], options):
                raise ValueError(f"{out} was prepared with other options ({differ}): choose another --out")
        self.done = self.content["done"]

    def save(self):
        write(self.file, json.dumps(self.content, indent=1))


# ---- Subjects200K ----------------------------------------------------------------------------------------------------

@dataclass
class Subjects200K:
    out: str = knob("data/subjects200k", "folder to write; OUT_val gets the held-out subjects")
    source: str = knob("Yuanshi/Subjects200K", "hub id, or a folder of its parquet files")
    n: int = knob(0, "pairs to keep for training, 0 for all; the paper's small sets have 2000 and 4000 (Table 4)")
    min_score: int = knob(5, "smallest of the three quality scores that is kept (OminiControl's choice); 0 keeps all")
    category: str = knob("", "keep only this category of the data set's descriptions")
    val: float = knob(0.01, "share of subjects that is held out")


def refuse(row, cfg):
    """Why a row is not kept ("score", "description", ...), or None. ValueError when it holds what no row should."""
    description, scores = row["description"] or {}, row.get("quality_assessment") or {}
    texts = [description.get(k) or "" for k in ("description_0", "description_1", "item", "category")]
    if not isinstance(scores, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a text or its scores are of another type")
    if not (texts[0].strip() and texts[1].strip() and description.get("description_valid", True)):
        return "description"
    scores = [scores.get(k) or 0 for k in ("compositeStructure", "objectConsistency", "imageQuality")]
    if not all(isinstance(score, (int, float)) for score in scores):
        raise ValueError(f"its scores are no numbers: {scores}")
    if not min(scores) >= cfg.min_score:
        return "score"
    if cfg.category and cfg.category.lower() not in texts[3].lower():
        return "category"
    a, b = split_views(picture_of(row["image"]))
    if a.size != b.size or not 0.8 < a.width / a.height < 1.25:
        return "layout"  # not two square views side by side: a blind split would cut through a picture
    return None


def prepare_subjects(cfg):
    """Filter Subjects200K and split it by subject. Each source file becomes one in OUT and one in OUT_val."""
    manifest = Manifest(cfg.out, {k: v for k, v in asdict(cfg).items() if k != "out"})
    outs, downloads = {"train": Path(cfg.out), "val": beside(cfg.out, "_val")}, beside(cfg.out, "_download")
    for folder in outs.values():
        folder.mkdir(parents=True, exist_ok=True)
    paths_of = lambda name: {side: folder / name.replace("/", "-") for side, folder in outs.items()}
    for name in list(manifest.done):  # an output that was lost is made again
        if not all(whole(path, manifest.done[name][side]) for side, path in paths_of(name).items()):
            del manifest.done[name]
    kept = sum(counts["train"] for counts in manifest.done.values())
    for name, fetch in tqdm(parquet_files(cfg.source, downloads), desc="files", unit="file"):
        if cfg.n and kept >= cfg.n:
            break
        if name in manifest.done:
            continue
        counts = filter_file(fetch(), paths_of(name), cfg, kept)
        kept += counts["train"]
        manifest.done[name] = counts
        manifest.save()
        if not Path(cfg.source).exists():  # it was downloaded
            shutil.rmtree(downloads, ignore_errors=True)
    total = sum((Counter(c) for c in manifest.done.values()), Counter())
    read = total.total()
    print(f"{cfg.source}: {read} pairs read, {read - total['score'] - total['description']} of them with captions and "
          f"all three scores at {cfg.min_score} or more (the paper does not say whether it filtered)")
    print(f"{cfg.out}: {total.pop('train', 0)} pairs for training, {total.pop('val', 0)} held out; left out: "
          + (", ".join(f"{n} for their {why}" for why, n in total.items()) or "none"))


def whole(path, rows):
    """Is this output there with all its rows? A file without rows is not written."""
    try:
        return pq.ParquetFile(path).metadata.num_rows == rows if path.is_file() else rows == 0
    except (pa.ArrowInvalid, OSError):  # damaged
        return False


def filter_file(source, paths, cfg, kept):
    """Write the rows of one source file that are kept to paths["train"] and ["val"], 16 rows a group. Counts."""
    refuse_overwriting([source], paths.values())
    parquet, counts, writers = open_parquet(source, SUBJECTS200K, "Subjects200K"), Counter(train=0, val=0), {}
    columns = [c for c in ("image", "collection", "quality_assessment", "description")
               if c in parquet.schema_arrow.names]
    rows = {"train": [], "val": []}

    def write_rows(side, least):
        if len(rows[side]) >= least:
            if side not in writers:
                writers[side] = pq.ParquetWriter(f"{paths[side]}.tmp", schema)
            writers[side].write_table(pa.Table.from_pylist(rows[side], schema), row_group_size=16)
            rows[side].clear()
    schema = pa.schema([parquet.schema_arrow.field(c) for c in columns])
    number = -1
    for batch in parquet.iter_batches(batch_size=64, columns=columns):
        for row in batch.to_pylist():
            number += 1
            try:
                why = refuse(row, cfg)
            except ValueError as e:
                why = "unreadable"
                tqdm.write(f"skipped: row {number} of {source}: {e}", file=sys.stderr)
            side = "val" if why is None and share(subject(row)) < cfg.val else "train"
            if why is None and side == "train" and cfg.n and kept + counts["train"] >= cfg.n:
                break
            counts[why or side] += 1
            if why is None:
                rows[side].append(row)
        for side in rows:
            write_rows(side, 64)
        if cfg.n and kept + counts["train"] >= cfg.n:
            break
    for side in rows:
        write_rows(side, 1)
        if side in writers:
            writers[side].close()
            os.replace(f"{paths[side]}.tmp", paths[side])
        else:
            paths[side].unlink(missing_ok=True)
    return dict(counts)


def subject(row):
    """What decides whether a pair is held out: all pairs of one item fall on the same side."""
    description = row["description"]
    return (description.get("item") or description["description_0"]).strip().lower()


# ---- Pexels ----------------------------------------------------------------------------------------------------------

@dataclass
class Pexels:
    out: str = knob("data/pexels", "folder to write; OUT_val gets the held-out clips")
    source: str = knob("jovianzm/Pexels-400k", "hub id or parquet file with the columns video (a URL) and title")
    n: int = knob(4000, "clips for training (5.1)")
    val: int = knob(64, "clips that are held out")
    frames: int = knob(49, "frames that a clip must have ...")
    fps: float = knob(8.0, "... at this rate")
    seed: int = knob(0, "which clips, out of all")
    threads: int = knob(16, "downloads at a time")
    timeout: float = knob(30.0, "seconds without an answer after which a try is given up")
    max_seconds: float = knob(600.0, "seconds after which one download is given up")
    tries: int = knob(3, "tries for a download that fails in a way that may pass")
    ids: str = knob("", "text file of video ids (the end of the URL, a line each): train on these alone")
    strip: list[str] = knob([], "ends of titles that are no caption, beside those in BOILERPLATE")
    portrait: bool = knob(False, "keep clips that are higher than wide: 720x480 shows 37.5 % of a 9:16 picture")
    store: str = knob("original", "'training' keeps a clip as it is trained on: --frames at --fps, cut to nothing but "
                                  "480 rows, H.264. The original can still serve another length or rate",
                      "original", "training")

    def __post_init__(self):
        check(self)


# Titles are said to end like this. Left in, it tells the two tasks apart in the text alone. Longest first.
BOILERPLATE = ["· Free Stock Video", "· Free Stock Footage", "- Pexels Videos", "| Pexels Videos", "· Pexels",
               "- Pexels", "| Pexels", "Free Stock Video"]


def strip_title(title, endings):
    """(title without these endings, the endings that were there)"""
    title, found = (title or "").strip(), []
    while ending := next((e for e in endings if title.lower().endswith(e.lower())), None):
        title = title[:len(title) - len(ending)].rstrip(" ·|-\u2013")
        found.append(ending)
    return title, found


def video_ids(url):
    """The names by which --ids may call a video: its file's name, and the number that it begins with."""
    stem = Path((url or "").split("?")[0]).stem
    return {stem, re.match(r"\d*", stem).group()} - {""}


def seconds(duration):
    """A duration as a number of seconds: numbers, "PT1M7S", "1:07"; None when it is something else."""
    if isinstance(duration, (int, float)):
        return float(duration)
    match = re.fullmatch(r"(?:P\d*D?T)(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?", str(duration))
    parts = match.groups() if match else re.fullmatch(r"(?:(\d+):)?(\d+):([\d.]+)", str(duration) or "")
    parts = parts if match or parts is None else parts.groups()
    return None if parts is None else sum(float(x or 0) * f for x, f in zip(parts, (3600, 60, 1)))


class Dead(Exception):
    """A permanent failure (404, 410, a bad URL): not tried again."""


class Refused(OSError):
    """The server says to slow down (403, 429), or when to come back (Retry-After)."""


STOP = threading.Event()  # Ctrl-C: downloads that are under way end too


class Pace:
    """How fast all threads together may ask. After a refusal all wait, as long as the server says, and from then on ask
    one after the other, at an interval that each refusal doubles and each success shortens."""

    def __init__(self):
        self.lock, self.until, self.next, self.interval = threading.Lock(), 0.0, 0.0, 0.0

    def wait(self):
        with self.lock:
            start = max(self.next, self.until, time.monotonic())
            self.next = start + self.interval
        while not STOP.is_set() and (left := max(start, self.until) - time.monotonic()) > 0:
            STOP.wait(left)

    def refused(self, answer):
        """Slow down. Returns what the server answered, in a line."""
        said = f"HTTP {answer.status_code}"
        after = retry_after(answer.headers.get("Retry-After"))
        with self.lock:
            new = time.monotonic() >= self.until  # the other threads' refusals of the same moment count once
            if new:
                self.interval = min(max(0.1, 2 * self.interval), 30)
            pause = min(10 * self.interval if after is None else after, 3600)
            self.until = max(self.until, time.monotonic() + pause)
        if new:
            tqdm.write(f"the server answered {said}, Retry-After {answer.headers.get('Retry-After', 'not given')}: all "
                       f"downloads wait {pause:.0f} s", file=sys.stderr)
        return said

    def came(self):
        with self.lock:
            self.interval = self.interval * 0.95 if self.interval > 0.05 else 0.0


def retry_after(text):
    """Seconds to wait by a Retry-After header, a number or a date; None without one that can be read."""
    try:
        return max(0.0, float(text) if str(text).strip().isdigit() else
                   (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


def download(url, path, cfg, pace):
    """Fetch url to path. Dead for 404, 410 and what is no URL; Refused for 403, 429 and a Retry-After; OSError,
    requests' or urllib3's errors for what a retry may mend."""
    pace.wait()
    start = time.monotonic()
    headers = {"User-Agent": "Mozilla/5.0 (research data preparation)", "Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=cfg.timeout, headers=headers) as answer:
        if answer.status_code in (404, 410):
            raise Dead(f"HTTP {answer.status_code}")
        if answer.status_code in (403, 429) or answer.status_code >= 400 and "Retry-After" in answer.headers:
            raise Refused(pace.refused(answer))
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise OSError("a web page instead of a clip")
        expected = answer.headers.get("Content-Length")
        size = 0
        with open(path, "wb") as file:
            while chunk := answer.raw.read1(1 << 18):  # what has arrived: iter_content would wait for a full chunk
                size += file.write(chunk)
                if STOP.is_set() or time.monotonic() - start > cfg.max_seconds:
                    raise OSError("stopped" if STOP.is_set() else f"not done after {cfg.max_seconds:g} s")
        if expected is not None and size != int(expected):
            raise OSError(f"{size} of {expected} bytes")
    pace.came()


def shape_of(path):
    """(height, width) of a clip as a player shows it."""
    (picture,) = load_clip(path, 1, 1.0)
    return picture.height, picture.width


def check_clip(path, cfg):
    """Decode what training will read of a clip; with --store training put that in its place. ValueError: unfit."""
    height, width = shape_of(path)
    if height > width and not cfg.portrait:
        raise Portrait(f"portrait, {width}x{height}")
    scale = min(1.0, max(480 / height, 720 / width)) if cfg.store == "training" else 64 / height
    pictures = load_clip(path, cfg.frames, cfg.fps, [2 * round(side * scale / 2) for side in (height, width)])
    if cfg.store == "training":
        save_video(path, pictures, cfg.fps, format="mp4")


class Portrait(ValueError):
    """The clip is higher than wide."""


def fetch_clip(folder, name, url, title, cfg, pace):
    """Download and check one clip. Returns (status, why): kept, portrait, filtered, dead, refused, or failed; the last
    two are worth another run."""
    suffix = Path(url.split("?")[0]).suffix.lower() if cfg.store == "original" else ".mp4"
    final = folder / f"{name}{suffix if suffix in CLIP_SUFFIXES else '.mp4'}"
    part, status, error = folder / f"{name}.part", "failed", "stopped"
    for attempt in range(cfg.tries):
        if STOP.is_set():
            break
        try:
            if not final.is_file():  # it is there after a kill before the manifest, or when its caption was lost
                download(url, part, cfg, pace)
                check_clip(part, cfg)
            write(final.with_suffix(".txt"), title + "\n")  # before the clip: no clip without its caption
            if part.is_file():
                os.replace(part, final)
            return "kept", ""
        except (Dead, requests.exceptions.InvalidURL, requests.exceptions.MissingSchema,
                requests.exceptions.InvalidSchema) as e:
            return "dead", str(e)
        except Portrait as e:
            return "portrait", str(e)
        except ValueError as e:  # too short, or not a video
            return "filtered", str(e).replace(str(part), url)
        except Refused as e:  # the pace waits
            status, error = "refused", str(e)
        except (OSError, requests.RequestException, HTTPError) as e:
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # a full disk is not the link's fault
            status, error = "failed", f"{type(e).__name__}: {e}"
            STOP.wait(min(2**attempt, cfg.timeout) * (attempt + 1 < cfg.tries))
        finally:
            part.unlink(missing_ok=True)
    return status, error


def prepare_pexels(cfg):
    """Download clips until there are n for training and val held out, drawn at random from the whole list."""
    options = {k: getattr(cfg, k) for k in ("frames", "fps", "seed", "val", "strip", "portrait", "store")}
    manifest = Manifest(cfg.out, options)
    ids = set(read_text(cfg.ids).split()) if cfg.ids else set()
    rows, endings = [], [*cfg.strip, *BOILERPLATE]
    for _, fetch in parquet_files(cfg.source, beside(cfg.out, "_download")):
        table = open_parquet(fetch(), {"video": None, "title": None}, "Pexels-400k").read()
        columns = [c for c in ("video", "title", "duration", "sfw") if c in table.column_names]
        rows += table.select(columns).to_pylist()
    unfit, stripped, found = Counter(), Counter(), set()
    candidates = {"train": [], "val": []}
    # Held-out clips come from a fixed hundredth of the list (more of a short one), however large n is. The share stays
    # with the folder: were it drawn again for a longer list, held-out clips could end up in training.
    part = manifest.content.setdefault("part", min(0.5, max(0.01, 4 * cfg.val / max(len(rows), 1))))
    for row in rows:
        length, mine = seconds(row.get("duration")), ids & video_ids(row["video"])
        row["title"], ends = strip_title(row["title"], endings)
        stripped.update(ends)
        found |= mine
        why = ("not safe for work" if row.get("sfw") is False else "no title" if not row["title"]
               else "no link" if not row["video"]
               else "too short" if length and length < (cfg.frames - 1) / cfg.fps else None)
        if why:
            unfit[why] += 1
        elif not mine and share("val" + row["video"]) < part:
            candidates["val"].append(row)
        elif mine or not ids:
            candidates["train"].append(row)
    manifest.content["stripped"] = dict(stripped)
    print(f"{len(rows)} clips listed; left out: {', '.join(f'{n} {why}' for why, n in unfit.items()) or 'none'}; "
          f"stripped from titles: {', '.join(f'{n} {ending!r}' for ending, n in stripped.items()) or 'nothing'}")
    if ids:
        print(f"--ids: {len(found)} of {len(ids)} are in the list")
    for side, wanted, folder in (("val", cfg.val, beside(cfg.out, "_val")), ("train", cfg.n, Path(cfg.out))):
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):
            part.unlink()
        # With other --ids a clip can change sides: it stays where an earlier run put it.
        other = manifest.done.get("train" if side == "val" else "val", {})
        taken = {url for status, _, url in other.values() if status == "kept"}
        queue = sorted((row for row in candidates[side] if row["video"] not in taken),
                       key=lambda row: share(f"{cfg.seed} {row['video']}"))
        done = manifest.done.setdefault(side, {})
        counts = fetch_all(queue, wanted, folder, done, manifest, cfg)
        print(f"{folder}: {counts['kept']} of {wanted} clips kept; {counts['filtered']} filtered, "
              f"{counts['portrait']} portrait, {counts['dead']} dead links, {counts['failed']} failed, "
              f"{counts['refused']} refused (run again to retry)")
        if counts["kept"] < wanted:
            print(f"{folder}: the list has no more candidates", file=sys.stderr)


def fetch_all(queue, wanted, folder, done, manifest, cfg):
    """Work down the queue until `wanted` clips are kept. `done`: {name: [status, why, url]}, saved as it grows."""
    def there(name):
        files = {f.suffix for f in folder.glob(f"{name}.*")} if done.get(name, [""])[0] == "kept" else set()
        return bool(files & CLIP_SUFFIXES) and ".txt" in files

    named = {hashlib.sha256(row["video"].encode()).hexdigest()[:16]: row for row in queue}
    kept = sum(map(there, named))
    tried = set(done)
    todo = [n for n in named if not there(n) and done.get(n, [""])[0] not in ("filtered", "portrait", "dead")]
    todo = iter(sorted(todo, key=lambda n: n in tried))  # what failed before comes last
    STOP.clear()
    pending, saved, failed_in_a_row, pace = {}, time.monotonic(), 0, Pace()
    bar = tqdm(total=wanted, initial=min(kept, wanted), desc=str(folder), unit="clip")
    with ThreadPoolExecutor(cfg.threads) as pool:
        try:
            while True:
                room = min(cfg.threads, wanted - kept) - len(pending)  # never more than can still be needed
                for name in islice(todo, max(room, 0)):
                    title = named[name]["title"].strip()
                    pending[pool.submit(fetch_clip, folder, name, named[name]["video"], title, cfg, pace)] = name
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED)[0]:
                    name = pending.pop(future)
                    done[name] = [*future.result(), named[name]["video"]]
                    if name not in tried or done[name][0] != "failed":
                        failed_in_a_row = failed_in_a_row + 1 if done[name][0] == "failed" else 0
                    if failed_in_a_row == 50:
                        raise ValueError(f"50 downloads in a row failed, the last: {done[name][1]} ({done[name][2]}). "
                                         "Is the network up? The same command goes on")
                    if done[name][0] == "kept":
                        kept += 1
                        bar.update()
                if time.monotonic() - saved > 5:
                    manifest.save()
                    saved = time.monotonic()
        finally:  # Ctrl-C too
            STOP.set()
            manifest.save()
    bar.close()
    return Counter(done[n][0] for n in named if n in done)  # what is not in it counts 0


# ---- cached latents --------------------------------------------------------------------------------------------------


def prepare_cache_on_all_ranks(cfg):
    """Encode each clip (and pair) once. Under torchrun each rank takes its share of the files."""
    join_ranks("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
    prepare_cache(cfg, *rank_and_world_size())


if __name__ == "__main__":
    commands = {"subjects200k": (Subjects200K, prepare_subjects), "pexels": (Pexels, prepare_pexels),
                "cache": (Latents, prepare_cache_on_all_ranks)}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        usage = "usage: python -m paper.prepare subjects200k | pexels | cache [--help]"
        if sys.argv[1:] in (["-h"], ["--help"]):
            print(usage)
            sys.exit()
        sys.exit(usage)
    config, action = commands[sys.argv[1]]
    command_line(action, config, action.__doc__, sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
