"""A run: its seeded random streams, its ranks, and its folder on disk (checkpoints, resume)."""
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError


# ---- random streams --------------------------------------------------------------------------------------------------

def rng(seed, stream, *numbers):
    """The numpy generator of one named stream at one place in the run, e.g. rng(seed, "coin", step)."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), *numbers])


def torch_rng(seed, stream, *numbers):
    """The same for torch, on the CPU: a draw is the same whatever device uses it."""
    return torch.Generator().manual_seed(int(rng(seed, stream, *numbers).integers(2**63)))


# ---- ranks -----------------------------------------------------------------------------------------------------------

def rank_and_world_size():
    """What torchrun says of this process; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(backend, **options):
    """Join torchrun's process group, when there is more than one rank.

    Prefix the store's keys by the restart count, or a restarted job waits for dead ranks."""
    if rank_and_world_size()[1] == 1:
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)


def print0(*words):
    """Print on rank 0 only."""
    if rank_and_world_size()[0] == 0:
        print(*words, flush=True)


# ---- the folder ------------------------------------------------------------------------------------------------------

KEPT = 3  # checkpoints of a run that stay on disk
LOCKS = {}  # the open lock file of each run that this process holds
SIGTERM = threading.Event()  # the job is asked to end: it saves first


@contextmanager
def sigterm_asks():
    """Inside, a SIGTERM asks the loop to stop; outside, it ends the process at once, as it always does."""
    SIGTERM.clear()
    before = signal.signal(signal.SIGTERM, lambda *_: SIGTERM.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write(path, text):
    """Write a small file, all or nothing."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path):
    """The dict in a json file. ValueError names a file that holds something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:  # no JSON, or no text
        raise ValueError(f"{path} is damaged, it is not JSON ({e}): delete it or mend it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object: delete it or mend it")
    return content


def records(log):
    """The records of a .jsonl file, each with its step. A line that is none is left out: a kill can cut the last."""
    whole, text = [], log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            whole.append(record)
    return whole


def checkpoints(run):
    """The complete checkpoints of a run (out/NAME), oldest first. A half-written one still has its .tmp name."""
    complete = [d for d in Path(run).glob("step-*") if d.is_dir() and re.fullmatch(r"step-\d+", d.name)]
    return sorted(complete, key=lambda d: int(d.name[5:]))


def newest_checkpoint(run):
    """The newest complete checkpoint of a run (out/NAME), or None."""
    return next(reversed(checkpoints(run)), None)


def remove_half_saved(run):
    for part in run.glob("step-*.tmp"):
        shutil.rmtree(part)


def save_checkpoint(run, step, save_weights, state):
    """Write run/step-000400/: what save_weights(folder) puts there, and training_state.pt. All or nothing.

    It is written under another name, flushed to disk, then renamed: a kill at any moment leaves the old checkpoints and
    at most a .tmp folder. A full disk ends the run with one line. The newest KEPT checkpoints stay. Only rank 0 writes.
    """
    if rank_and_world_size()[0] > 0:
        return
    final, part = run / f"step-{step:06d}", run / f"step-{step:06d}.tmp"
    remove_half_saved(run)
    try:
        save_weights(part)
        torch.save({"step": step, **{k: v.state_dict() for k, v in state.items()}}, part / "training_state.pt")
        for file in [*part.iterdir(), part]:  # a power cut cannot leave an empty file under a good name
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        os.replace(part, final)
    except (OSError, RuntimeError, SafetensorError) as e:  # each library reports a full disk in its own way
        remove_half_saved(run)
        sys.exit(f"cannot save {final}: {e}. Free some space and run the same command: it goes on from "
                 f"{newest_checkpoint(run) or 'the start'}")
    for old in checkpoints(run)[:-KEPT]:
        os.replace(old, f"{old}.tmp")  # a kill while deleting leaves no half checkpoint under its name
        shutil.rmtree(f"{old}.tmp")


def changed(before, now):
    """"height was 480, now 256; ..." for the settings in `now` that were different before, "" when none was."""
    return "; ".join(f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v)


def settings_of(cfg):
    """What config.json holds: the knobs that decide what is trained, and in "not_trained" all others."""
    others = [f.name for f in fields(cfg) if not f.metadata["trains"]]
    settings = {name: value for name, value in asdict(cfg).items() if name not in others}
    return settings | {"not_trained": {name: getattr(cfg, name) for name in others}}


def resume(run, settings, load_weights, state):
    """Restore the newest checkpoint; returns the step to go on from, 0 without one.

    ValueError for other settings, and unless all ranks go on from the same step. Every rank calls it, and has read the
    run when it returns: rank 0 may then write."""
    checkpoint = newest_checkpoint(run)
    start = restore(run, checkpoint, settings, load_weights, state) if checkpoint else 0
    if dist.is_initialized():
        ends = torch.tensor([start, -start])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError(f"ranks resume from steps {-ends[1]} to {ends[0]}: is {run} on a disk that all share?")
    return start


def restore(run, checkpoint, settings, load_weights, state):
    before = read_json(run / "config.json")
    if unknown := before.keys() - settings.keys():
        raise ValueError(f"{run} was started by another version of this code (it has --{min(unknown)}): choose another "
                         "--name")
    if differ := changed(before, {k: v for k, v in settings.items() if k != "not_trained"}):
        raise ValueError(f"{run} was started with other settings ({differ}): choose another --name (with --init_lora "
                         f"{run} it starts from this run's weights)")
    try:
        load_weights(checkpoint)
        saved = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu",
                           mmap=True)  # ranks share the pages: PCGrad's buffers can be 16 GB
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return saved["step"]
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # a file that is cut, empty or missing: each library reports it in its own way
        good = [d.name for d in checkpoints(run) if d != checkpoint]
        raise ValueError(f"{checkpoint} is damaged ({str(e).splitlines()[0]}): delete it, and the same command goes on "
                         f"from {good[-1] if good else 'the start'}")


def claim(run):
    """Hold a run's folder until rank 0 ends. ValueError when another job trains there."""
    if rank_and_world_size()[0] > 0:
        return
    run.mkdir(parents=True, exist_ok=True)
    LOCKS[run] = open(run / ".lock", "w")
    try:
        fcntl.lockf(LOCKS[run], fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the processes that read data
    except BlockingIOError:
        raise ValueError(f"another process trains in {run}: wait for its end or choose another --name")
    except OSError:  # a network disk without locks
        print0(f"no locks on the disk of {run}: do not start two runs there")


def start_log(run, settings, start):
    """Write config.json, and cut from the logs the steps that will be run again. Only rank 0 writes."""
    if rank_and_world_size()[0] > 0:
        return
    remove_half_saved(run)
    write(run / "config.json", json.dumps(settings, indent=1))
    for log in run.glob("*.jsonl"):
        write(log, "".join(json.dumps(record) + "\n" for record in records(log) if record["step"] < start))
