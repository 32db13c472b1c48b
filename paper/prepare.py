"""The paper's data sets, from the hub to disk (Sec. 5.1, A.2), and cached latents.

    python -m paper.prepare subjects200k --out data/subjects200k     image pairs: filtered, split by subject
    python -m paper.prepare pexels --out data/pexels --n 4000        clips: downloaded, checked, with captions
    python -m paper.prepare cache --videos data/pexels --out data/cache      VAE latents, encoded once

Each can be stopped at any moment; the same command goes on where it was and fetches only what is missing. Beside OUT
there is OUT_val, the held-out part that training never sees. Counts of what was kept and why the rest was not are
printed at the end and kept in OUT/prepare.json.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import torch.distributed as dist
import urllib3
from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from common.args import check, command_line, knob, refuse_overwriting
from common.latents import Latents, prepare_cache
from common.media import CLIP_SUFFIXES, load_clip
from common.run import changed, join_ranks, rank_and_world_size, read_json, write
from data import SUBJECTS200K, open_parquet, picture_of, split_views


def share(text):
    """A fixed number in [0, 1) for a text: the same on every machine, whatever else is in the data set."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def parquet_files(source, folder):
    """{name: function that returns its path} of a data set's parquet files: local, or a hub id's, put in `folder`."""
    def from_hub(get, *name, **options):
        try:
            return get(source, *name, repo_type="dataset", **options)
        except Exception as e:  # its HTTP library has many kinds
            raise FileNotFoundError(f"no folder {source}, and the download from the hub failed ({str(e)[:200]}). "
                                    "Without network: download it elsewhere, then --source FOLDER")
    path = Path(source)
    if path.is_file():
        return {path.name: lambda: path}
    if path.is_dir():
        found = {str(file.relative_to(path)): lambda file=file: file for file in sorted(path.glob("**/*.parquet"))}
    else:
        names = sorted(name for name in from_hub(HfApi().list_repo_files) if name.endswith(".parquet"))
        found = {name: lambda name=name: from_hub(hf_hub_download, name, local_dir=folder) for name in names}
    if not found:
        raise FileNotFoundError(f"no *.parquet in {source}")
    return found


def beside(out, suffix):
    """data/pexels and "_val" -> data/pexels_val: never inside, where training would find it."""
    return Path(out).with_name(Path(out).name + suffix)


def open_manifest(out, options):
    """(OUT/prepare.json as {"options", "done": what became of each piece of work}, a function that saves it whole)."""
    file = Path(out) / "prepare.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    manifest = read_json(file) if file.is_file() else {"options": options, "done": {}}
    if differ := changed(manifest["options"], options):
        raise ValueError(f"{out} was prepared with other options ({differ}): choose another --out")
    return manifest, lambda: write(file, json.dumps(manifest, indent=1))


# ---- Subjects200K ----------------------------------------------------------------------------------------------------

@dataclass
class Subjects200K:
    out: str = knob("data/subjects200k", "folder to write; OUT_val gets the held-out subjects")
    source: str = knob("Yuanshi/Subjects200K", "hub id, or a folder of its parquet files")
    n: int = knob(0, "pairs to keep for training, 0 for all; the paper's small sets have 2000 and 4000 (Table 4)")
    min_score: int = knob(5, "smallest of the three quality scores that is kept (OminiControl's choice); 0 keeps all")
    val: float = knob(0.01, "share of subjects that is held out")


def fate(row, cfg):
    """What becomes of a row: "train", "val", or why it is left out. Any error: it holds what no row should."""
    description, scores = row["description"] or {}, row.get("quality_assessment") or {}
    captions = [(description.get(name) or "").strip() for name in ("description_0", "description_1")]
    if not (all(captions) and description.get("description_valid", True)):
        return "description"
    lowest = min(scores.get(name) or 0 for name in ("compositeStructure", "objectConsistency", "imageQuality"))
    if not lowest >= cfg.min_score:  # nan neither
        return "score"
    a, b = split_views(picture_of(row["image"]))
    if a.size != b.size or not 0.8 < a.width / a.height < 1.25:
        return "layout"  # not two square views side by side: a blind split would cut through a picture
    item = (description.get("item") or captions[0]).strip().lower()  # all its pairs fall on the same side
    return "val" if share(item) < cfg.val else "train"


def prepare_subjects(cfg):
    """Filter Subjects200K and split it by subject. Each source file becomes one in OUT and one in OUT_val."""
    check(cfg, shares="val")
    manifest, save = open_manifest(cfg.out, {k: v for k, v in asdict(cfg).items() if k != "out"})
    folders, downloads = {"train": Path(cfg.out), "val": beside(cfg.out, "_val")}, beside(cfg.out, "_download")
    folders["val"].mkdir(exist_ok=True)
    paths_of = lambda name: {side: folder / name.replace("/", "-") for side, folder in folders.items()}
    done = manifest["done"]
    for name in [name for name in done if not all(path.is_file() for path in paths_of(name).values())]:
        del done[name]  # an output that was lost is made again
    room = (cfg.n or float("inf")) - sum(counts["train"] for counts in done.values())
    for name, fetch in tqdm(parquet_files(cfg.source, downloads).items(), desc="files", unit="file"):
        if name not in done and room > 0:
            done[name] = filter_file(fetch(), paths_of(name), cfg, room)
            room -= done[name]["train"]
            save()
            if not Path(cfg.source).exists():  # it was downloaded
                shutil.rmtree(downloads, ignore_errors=True)
    total = sum(map(Counter, done.values()), Counter())
    print(f"{cfg.out}: {total.total()} pairs read:", ", ".join(f"{n} {what}" for what, n in total.items()))


def filter_file(source, paths, cfg, room):
    """Write the rows of one source file that are kept to paths["train"], up to `room`, and paths["val"]. Counts."""
    refuse_overwriting([source], paths.values())
    parquet, counts = open_parquet(source, SUBJECTS200K, "Subjects200K"), Counter(train=0, val=0)
    writers = {side: pq.ParquetWriter(f"{path}.tmp", parquet.schema_arrow) for side, path in paths.items()}
    for batch in parquet.iter_batches(batch_size=64):
        fates = []
        for row in batch.to_pylist():
            if counts["train"] == room:
                break
            try:
                fates.append(fate(row, cfg))
            except (ValueError, TypeError, AttributeError) as e:
                fates.append("unreadable")
                tqdm.write(f"skipped: row {counts.total()} of {source}: {e}", file=sys.stderr)
            counts[fates[-1]] += 1
        for side, writer in writers.items():
            if rows := [i for i, where in enumerate(fates) if where == side]:
                writer.write_batch(batch.take(pa.array(rows)), row_group_size=16)
    for side, path in paths.items():
        writers[side].close()
        os.replace(f"{path}.tmp", path)
    return dict(counts)


# ---- Pexels ----------------------------------------------------------------------------------------------------------

@dataclass
class Pexels:
    out: str = knob("data/pexels", "folder to write; OUT_val gets the held-out clips")
    source: str = knob("jovianzm/Pexels-400k", "hub id, parquet file or folder, with the columns video (a URL) and title")
    n: int = knob(4000, "clips for training (5.1)")
    val: int = knob(64, "clips that are held out")
    frames: int = knob(49, "frames that a clip must have ...")
    fps: float = knob(8.0, "... at this rate")
    seed: int = knob(0, "which clips, out of all")


THREADS = 16  # downloads at a time
TRIES, BACKOFF = 5, 2.0  # of a request that may yet be answered: again at once, then after 4, 8 and 16 s
TIMEOUT, MAX_SECONDS = 30.0, 600.0  # without an answer, and of a whole download: a link that trickles is given up too
STOP = threading.Event()  # Ctrl-C: downloads that are under way end too

# Titles are said to end like this. Left in, it tells the two tasks apart in the text alone.
BOILERPLATE = re.compile(r"([ ·|\u2013-]*(Free Stock (Video|Footage)|[·|-] Pexels( Videos)?))+$", re.IGNORECASE)


def rest(seconds):
    """Wait, but not past Ctrl-C."""
    if STOP.wait(max(0, seconds)):
        raise OSError("stopped")


class PoliteRetry(urllib3.Retry):
    """urllib3's retries. When the server asks for time (Retry-After), all downloads give it: none is started."""
    until = 0.0  # on the clock of time.monotonic

    def sleep(self, response=None):
        asked, now = self.get_retry_after(response) if response else None, time.monotonic()
        if asked:
            if now >= PoliteRetry.until:  # else it is another thread's refusal of the same moment
                tqdm.write(f"the server says HTTP {response.status}: all downloads wait {asked:.0f} s", file=sys.stderr)
            PoliteRetry.until = max(PoliteRetry.until, now + asked)
        rest(max(self.get_backoff_time(), PoliteRetry.until - now))


def open_session():
    """What all downloads share: connections, and how often and when a request is made again."""
    session = requests.Session()
    session.headers.update({"User-Agent": "Mozilla/5.0 (research data preparation)", "Accept-Encoding": "identity"})
    retry = PoliteRetry(TRIES - 1, backoff_factor=BACKOFF, status_forcelist=[403, 408, 429, *range(500, 600)],
                        respect_retry_after_header=True, raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=THREADS, max_retries=retry))
    return session


def download(session, url, path):
    """Fetch url to path. Returns None, or (status, why) of a clip that cannot come. A try that broke off raises."""
    rest(PoliteRetry.until - time.monotonic())
    with session.get(url, stream=True, timeout=TIMEOUT) as answer:
        if status := {403: "refused", 404: "dead", 410: "dead", 429: "refused"}.get(answer.status_code):
            return status, f"HTTP {answer.status_code}"
        answer.raise_for_status()
        if "text/html" in answer.headers.get("Content-Type", ""):
            return "failed", "a web page instead of a clip"
        start = time.monotonic()
        with open(path, "wb") as file:
            while chunk := answer.raw.read1(1 << 18):  # what has arrived: iter_content would wait for a full chunk
                file.write(chunk)
                rest(0)
                if time.monotonic() - start > MAX_SECONDS:
                    return "failed", f"not done after {MAX_SECONDS:g} s"


def fetch_clip(session, folder, name, row, cfg):
    """Download and check one clip. Returns (status, why): "kept", or why it is not."""
    url, part = row["video"], folder / f"{name}.part"
    suffix = Path(url.split("?")[0]).suffix.lower()
    final = folder / f"{name}{suffix if suffix in CLIP_SUFFIXES else '.mp4'}"
    try:
        if not final.is_file():  # it is there after a kill before the manifest, or when its caption was lost
            if refusal := download(session, url, part):
                return refusal
            width, height = load_clip(part, 1, 1.0)[0].size
            if height > width:  # 720x480 would show three eighths of a 9:16 picture
                return "portrait", f"portrait, {width}x{height}"
            load_clip(part, cfg.frames, cfg.fps, (64, 96))  # what training will read
        write(final.with_suffix(".txt"), row["title"] + "\n")  # before the clip: no clip without its caption
        if part.is_file():
            os.replace(part, final)
        return "kept", ""
    except (OSError, urllib3.exceptions.HTTPError) as e:
        return "failed", f"{type(e).__name__}: {e}"
    except ValueError as e:  # too short, or not a video
        return "filtered", str(e).replace(str(part), url)
    finally:
        part.unlink(missing_ok=True)


def candidates(cfg, manifest):
    """Which rows of the list may be downloaded: {"val": [...], "train": [...]}. It prints why the others may not."""
    rows = []
    for fetch in parquet_files(cfg.source, beside(cfg.out, "_download")).values():
        rows += open_parquet(fetch(), {"video": None, "title": None}, "Pexels-400k").read().to_pylist()
    # Held-out clips come from a fixed hundredth of the list (more of a short one), however large n is. The share stays
    # with the folder: were it drawn again for a longer list, held-out clips could end up in training.
    part = manifest.setdefault("part", cfg.val and min(0.5, max(0.01, 4 * cfg.val / max(len(rows), 1))))
    chosen, unfit, stripped = {"val": [], "train": []}, Counter(), 0
    for row in rows:
        row["title"], endings = BOILERPLATE.subn("", (row["title"] or "").strip())
        stripped += endings
        length = re.fullmatch(r"PT(\d+)M(\d+)S", str(row.get("duration")))  # in another form: the clip will tell
        reasons = {"not safe for work": row.get("sfw") is False, "no title": not row["title"],
                   "no link": not str(row["video"]).startswith(("http://", "https://")),
                   "too short": length and 60 * int(length[1]) + int(length[2]) < (cfg.frames - 1) / cfg.fps}
        if why := [why for why, holds in reasons.items() if holds]:
            unfit[why[0]] += 1
        else:
            chosen["val" if share("val" + row["video"]) < part else "train"].append(row)
    print(f"{len(rows)} clips listed; left out: {', '.join(f'{n} {why}' for why, n in unfit.items()) or 'none'}; "
          f"{stripped} titles lost an ending that is no caption")
    return chosen


def prepare_pexels(cfg):
    """Download clips until there are n for training and val held out, drawn at random from the whole list."""
    check(cfg)
    manifest, save = open_manifest(cfg.out, {k: getattr(cfg, k) for k in ("frames", "fps", "seed", "val")})
    rows, done = candidates(cfg, manifest), manifest["done"]
    for side, wanted, folder in (("val", cfg.val, beside(cfg.out, "_val")), ("train", cfg.n, Path(cfg.out))):
        folder.mkdir(parents=True, exist_ok=True)
        queue = sorted(rows[side], key=lambda row: share(f"{cfg.seed} {row['video']}"))
        counts = fetch_all(queue, wanted, folder, done.setdefault(side, {}), save, cfg)
        others = ", ".join(f"{counts[why]} {why}" for why in ("filtered", "portrait", "dead", "failed", "refused"))
        print(f"{folder}: {counts['kept']} of {wanted} clips kept; {others} (run again to retry the last two)")


def fetch_all(queue, wanted, folder, done, save, cfg):
    """Work down the queue until `wanted` clips are kept. `done`: {name: [status, why, url]}, saved as it grows."""
    named = {hashlib.sha256(row["video"].encode()).hexdigest()[:16]: row for row in queue}
    whole = {f.stem for f in folder.iterdir() if f.suffix in CLIP_SUFFIXES and f.with_suffix(".txt").is_file()}
    # A clip that was lost is fetched again. What failed before comes last.
    before = {name: status for name, (status, *_) in done.items() if status != "kept" or name in whole}
    kept = sum(before.get(name) == "kept" for name in named)
    todo = iter(sorted((n for n in named if before.get(n) in (None, "failed", "refused")), key=lambda n: n in before))
    lost_in_a_row, session = 0, open_session()
    STOP.clear()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while names := list(islice(todo, max(0, wanted - kept))):  # never more than can still be needed
                started = {pool.submit(fetch_clip, session, folder, name, named[name], cfg): name for name in names}
                for future in tqdm(as_completed(started), desc=str(folder), total=len(names), unit="clip"):
                    name, (status, why) = started[future], future.result()
                    done[name] = [status, why, named[name]["video"]]
                    kept += status == "kept"
                    lost = status in ("failed", "refused")  # an old failure that fails again is no news
                    lost_in_a_row = lost_in_a_row + (name not in before) if lost else 0
                    if lost_in_a_row == 50:
                        raise ValueError(f"50 downloads in a row failed, the last: {why} ({done[name][2]}). Is the "
                                         "network up, does the server let you in? The same command goes on")
                    if len(done) % 100 == 0:
                        save()
        finally:  # Ctrl-C too
            STOP.set()
            save()
    return Counter(done[name][0] for name in named if name in done)  # what is not in it counts 0


# ---- cached latents --------------------------------------------------------------------------------------------------

def prepare_cache_on_all_ranks(cfg):
    """Encode each clip (and pair) once. Under torchrun each rank takes its share of the files."""
    join_ranks("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
    prepare_cache(cfg, *rank_and_world_size())


if __name__ == "__main__":
    commands = {"subjects200k": (Subjects200K, prepare_subjects), "pexels": (Pexels, prepare_pexels),
                "cache": (Latents, prepare_cache_on_all_ranks)}
    parser = argparse.ArgumentParser("python -m paper.prepare", "%(prog)s subjects200k | pexels | cache [--help]")
    parser.add_argument("command", choices=commands, help="each says with --help what it takes")
    config, action = commands[parser.parse_args(sys.argv[1:2]).command]
    command_line(action, config, action.__doc__, sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
