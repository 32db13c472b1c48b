"""The paper's data sets, from the hub to disk (Sec. 5.1, A.2), and cached latents.

    python -m paper.prepare subjects200k --out data/subjects200k     image pairs: filtered, split by subject
    python -m paper.prepare pexels --out data/pexels --n 4000        clips: downloaded, checked, with captions
    python -m paper.prepare cache --videos data/pexels --out data/cache      VAE latents, encoded once

Each can be stopped at any moment: the same command fetches what is missing. Beside OUT lies OUT_val, the held-out part
that training never sees. What was kept, and why the rest was not, is counted in OUT/prepare.json.
"""
import argparse
import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3
from huggingface_hub import HfApi, hf_hub_download
from tqdm import tqdm

from common.args import check, command_line, knob, refuse_overwriting
from common.latents import Latents, prepare_cache
from common.media import load_clip
from common.run import changed, join_ranks, rank_and_world_size, read_json, write
from data import SUBJECTS200K, open_parquet, picture_of, split_views


def share(text):
    """A fixed number in [0, 1) for a text: the same on every machine, whatever else is in the data set."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12


def parquet_files(source):
    """{name: function that returns its path} of a data set's parquet files: a folder's, or a hub id's."""
    def from_hub(get, *name):
        try:
            return get(source, *name, repo_type="dataset")
        except Exception as e:  # its HTTP library has many kinds
            raise FileNotFoundError(f"no folder {source}, and the download from the hub failed ({str(e)[:200]}). "
                                    "Without network: download it elsewhere, then --source FOLDER")
    folder = Path(source)
    if folder.exists():
        found = {str(file.relative_to(folder)): partial(Path, file) for file in sorted(folder.glob("**/*.parquet"))}
    else:
        names = sorted(name for name in from_hub(HfApi().list_repo_files) if name.endswith(".parquet"))
        found = {name: partial(from_hub, hf_hub_download, name) for name in names}
    if not found:
        raise FileNotFoundError(f"{source} is no folder with *.parquet in it")
    return found


def open_out(cfg, *names):
    """({"train": OUT, "val": OUT_val}, OUT/prepare.json, a function that saves it whole). ValueError when one of the
    options of these names has changed. In the json, "done" says what became of each piece of work."""
    out, options = Path(cfg.out), {name: getattr(cfg, name) for name in names}
    folders = {"train": out, "val": out.with_name(f"{out.name}_val")}  # not inside, where training would find it
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    file = out / "prepare.json"
    manifest = read_json(file) if file.is_file() else {"options": options, "done": {}}
    if differ := changed(manifest["options"], options):
        raise ValueError(f"{out} was prepared with other options ({differ}): choose another --out")
    return folders, manifest, lambda: write(file, json.dumps(manifest, indent=1))


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
    folders, manifest, save = open_out(cfg, "source", "n", "min_score", "val")
    done, room = manifest["done"], cfg.n or float("inf")
    for name, fetch in tqdm(parquet_files(cfg.source).items(), desc="files", unit="file"):
        paths = {side: folder / name.replace("/", "-") for side, folder in folders.items()}
        if room > 0 and not (name in done and all(path.is_file() for path in paths.values())):
            done[name] = filter_file(fetch(), paths, cfg, room)
            save()
        room -= done.get(name, {"train": 0})["train"]
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
    source: str = knob("jovianzm/Pexels-400k", "hub id, or a folder of parquet files with the columns video and title")
    n: int = knob(4000, "clips for training (5.1)")
    val: int = knob(64, "clips that are held out")
    frames: int = knob(49, "frames that a clip must have ...")
    fps: float = knob(8.0, "... at this rate")
    seed: int = knob(0, "which clips, out of all")


THREADS = 16  # downloads at a time
TRIES = 5  # of a request that may yet be answered: again at once, then after 4, 8 and 16 s
TIMEOUT, MAX_SECONDS = 30.0, 600.0  # without an answer, and of a whole download: a link that trickles is given up too
STOP = threading.Event()  # Ctrl-C: downloads that are under way end too

# Titles are said to end like this. Left in, it tells the two tasks apart in the text alone.
BOILERPLATE = re.compile(r"([ ·|–-]*(Free Stock (Video|Footage)|[·|–-] ?Pexels( Videos)?))+$", re.IGNORECASE)


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


def fetch_clip(session, folder, name, row, cfg):
    """Download and check one clip. Returns (status, why): "kept", or why it is not."""
    url, part, final = row["video"], folder / f"{name}.part", folder / f"{name}.mp4"
    try:
        rest(PoliteRetry.until - time.monotonic())
        with session.get(url, stream=True, timeout=TIMEOUT) as answer, open(part, "wb") as file:
            if answer.status_code in (404, 410):
                return "dead", f"HTTP {answer.status_code}"
            answer.raise_for_status()
            if "text/html" in answer.headers.get("Content-Type", ""):
                return "failed", "a web page instead of a clip"
            start = time.monotonic()
            while chunk := answer.raw.read1(1 << 18):  # what has arrived: iter_content would wait for a full chunk
                file.write(chunk)
                rest(0)
                if time.monotonic() - start > MAX_SECONDS:
                    return "failed", f"not done after {MAX_SECONDS:g} s"
        width, height = load_clip(part, 1, 1.0)[0].size
        if height > width:  # 720x480 would show three eighths of a 9:16 picture
            return "portrait", f"portrait, {width}x{height}"
        load_clip(part, cfg.frames, cfg.fps, (64, 96))  # what training will read
        write(final.with_suffix(".txt"), row["title"] + "\n")  # before the clip: no clip without its caption
        os.replace(part, final)
        return "kept", ""
    except (OSError, urllib3.exceptions.HTTPError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk is not the link's fault
        return "failed", f"{type(e).__name__}: {e}"
    except ValueError as e:  # too short, or not a video
        return "filtered", str(e).replace(str(part), url)
    finally:
        part.unlink(missing_ok=True)


def candidates(cfg, manifest):
    """The rows of the list in the order of --seed: {"val": [...], "train": [...], and why not: [...]}."""
    rows, found = [], defaultdict(list)
    for fetch in parquet_files(cfg.source).values():
        rows += open_parquet(fetch(), {"video": None, "title": None}, "Pexels-400k").read().to_pylist()
    # Held-out clips come from a fixed hundredth of the list (more of a short one), however large n is. The share stays
    # with the folder: were it drawn again for a longer list, held-out clips could end up in training.
    part = manifest.setdefault("part", cfg.val and min(0.5, max(0.01, 4 * cfg.val / max(len(rows), 1))))
    for row in sorted(rows, key=lambda row: share(f"{cfg.seed} {row['video']}")):
        row["title"], shorter = BOILERPLATE.subn("", (row["title"] or "").strip())
        length = re.fullmatch(r"PT(\d+)M(\d+)S", str(row.get("duration")))  # in another form: the clip will tell
        reasons = {"not safe for work": row.get("sfw") is False, "no title": not row["title"],
                   "no link": not str(row["video"]).startswith(("http://", "https://")),
                   "too short": length and 60 * int(length[1]) + int(length[2]) < (cfg.frames - 1) / cfg.fps,
                   "val": share(f"val{row['video']}") < part, "train": True}
        found[next(what for what, holds in reasons.items() if holds)].append(row)
        if shorter:
            found["whose title lost an ending that is no caption"].append(row)
    print(f"{len(rows)} clips listed:", ", ".join(f"{len(some)} {what}" for what, some in found.items() if some))
    return found


def prepare_pexels(cfg):
    """Download clips until there are n for training and val held out, drawn at random from the whole list."""
    check(cfg)
    folders, manifest, save = open_out(cfg, "frames", "fps", "seed", "val")
    rows = candidates(cfg, manifest)
    for side, wanted in (("val", cfg.val), ("train", cfg.n)):
        fetch_all(rows[side], wanted, folders[side], manifest["done"].setdefault(side, {}), save, cfg)


def fetch_all(queue, wanted, folder, done, save, cfg):
    """Work down the queue until `wanted` clips are kept. `done`: {name: [status, why, url]}, saved as it grows."""
    named = {hashlib.sha256(row["video"].encode()).hexdigest()[:16]: row for row in queue}
    # What lies on disk counts, also after a kill. A clip that was lost is fetched again; what failed before comes last.
    whole = {clip.stem for clip in folder.glob("*.mp4") if clip.with_suffix(".txt").is_file()} & named.keys()
    done |= {name: ["kept", "", named[name]["video"]] for name in whole}
    failed_before = {name for name, (status, *_) in done.items() if status == "failed"}
    todo = [name for name in named if name not in whole and done.get(name, ["kept"])[0] in ("kept", "failed")]
    todo = iter(sorted(todo, key=lambda name: name in failed_before))
    kept, lost_in_a_row = len(whole), 0
    session = requests.Session()  # the connections that all downloads share
    session.headers.update({"User-Agent": "Mozilla/5.0 (research data preparation)", "Accept-Encoding": "identity"})
    retry = PoliteRetry(TRIES - 1, status_forcelist=[403, 408, 429, *range(500, 600)], backoff_factor=2.0)
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=THREADS, max_retries=retry))
    STOP.clear()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while names := list(islice(todo, max(0, wanted - kept))):  # never more than can still be needed
                started = {pool.submit(fetch_clip, session, folder, name, named[name], cfg): name for name in names}
                for future in tqdm(as_completed(started), desc=str(folder), total=len(names), unit="clip"):
                    name, (status, why) = started[future], future.result()
                    done[name] = [status, why, named[name]["video"]]
                    kept += status == "kept"
                    lost_in_a_row = lost_in_a_row + (name not in failed_before) if status == "failed" else 0
                    if lost_in_a_row == 50:
                        raise ValueError(f"50 downloads in a row failed, the last: {why}. Is the network up?")
                    if len(done) % 100 == 0:
                        save()
        finally:  # Ctrl-C too
            STOP.set()
            save()
    counts = Counter(done[name][0] for name in named if name in done)
    print(f"{folder}, {wanted} clips wanted:", ", ".join(f"{n} {status}" for status, n in counts.items()))


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
