"""A run: its arguments, its seeded random streams, its ranks, and its folder on disk (checkpoints, resume).

Nothing here knows the method. train.py, sample.py and the scripts in paper/ and toy/ share it.
"""
import json
import os
import shutil
import signal
import sys
import threading
import zlib
from dataclasses import field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import HfArgumentParser


# ---- arguments -------------------------------------------------------------------------------------------------------

def knob(default, text, *choices):
    """A field of a script's Config: its default, its line of --help, and the values it can take, where it is a name."""
    metadata = {"help": text, "choices": choices} if choices else {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(cfg, positive="", shares=""):
    """ValueError for the first knob of a Config that is not one of its choices or out of its bounds.

    positive, shares: names in one string. Shares are in [0, 1]. No other number may be negative, infinite or nan, and a
    seed stays below torch's limit of 63 bits."""
    for f in fields(cfg):
        name, value, choices = f.name, getattr(cfg, f.name), f.metadata.get("choices", ())
        if choices and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {value!r}")
        if f.type not in (int, float):
            continue
        for wrong, rule in ((name in shares.split() and not 0 <= value <= 1, "be in [0, 1]"),
                            (not abs(value) < float("inf"), "be a number"),
                            (name in positive.split() and value <= 0, "be positive"),
                            (value < 0, "not be negative"),
                            (name == "seed" and value >= 2**63, "be below 2^63")):
            if wrong:
                raise ValueError(f"--{name} must {rule}, got {value}")


def changed(before, now):
    """"height was 480, now 256; ..." for the settings in `now` that were different before, "" when none was."""
    return "; ".join(f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v)


def command_line(main, Config, description, argv=None, positional=None, out_of_memory="", **defaults):
    """Parse the knobs of dataclass `Config` from the command line and call main(config).

    `defaults` replace the dataclass's own; `positional` names the list knob that leading words without -- fill;
    `out_of_memory` says which flags save memory. A user's mistake (bad flag, value or file) is one line and exit status
    1 or 2; with TRACEBACK=1 in the environment it is a traceback.
    """
    words = f"[{positional} ...] " if positional else ""
    parser = HfArgumentParser(Config, description=description.split("\n\n")[0], allow_abbrev=False,
                              usage=f"%(prog)s {words}[--knob value ...]      (--help explains the knobs)")
    parser.set_defaults(**defaults)
    argv = sys.argv[1:] if argv is None else argv
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    try:
        main(Config(**vars(parser.parse_args(argv))))
    except (ValueError, OSError, torch.OutOfMemoryError) as e:  # OSError: a missing file, a full disk
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(e, torch.OutOfMemoryError):
            e = f"the GPU's memory is full ({str(e).split('. ')[0]}). Try {out_of_memory}"
        sys.exit(f"{parser.prog}: error: {e}")


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

# Knobs of train.py that leave what is trained as it is: runs that differ only in these are the same run.
NOT_TRAINED = {"toy", "recipe", "tensorboard", "name", "out", "workers", "save_every", "keep_checkpoints", "guidance",
               "grad_device", "gradcos_every", "val_every", "sample_every", "val_images", "val_videos", "val_pairs",
               "val_clips", "val_refs", "image_checkpointing", "video_checkpointing"}
SIGTERM = threading.Event()  # the job is asked to end: it saves first


def listen_for_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM.set())


def write(path, text):
    """Write a small file, all or nothing."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    os.replace(part, path)


def records(log):
    """The records of a .jsonl file that are whole: a kill can cut the last line."""
    whole = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole


def newest_checkpoint(run):
    """The newest complete step-* folder of a run (out/NAME), or None. A half-written one still has its .tmp name."""
    return max((d for d in Path(run).glob("step-*") if d.suffix != ".tmp"), default=None)


def remove_half_saved(run):
    for part in run.glob("step-*.tmp"):
        shutil.rmtree(part)


def save_checkpoint(run, step, keep, save_weights, state):
    """Write run/step-000400/: what save_weights(folder) puts there, and training_state.pt. All or nothing.

    It is written under another name, flushed to disk, then renamed: a kill at any moment leaves the old checkpoints and
    at most a .tmp folder. A full disk ends the run with one line. The newest `keep` checkpoints stay.
    """
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
    for old in sorted(d for d in run.glob("step-*") if d.suffix != ".tmp")[:-keep]:
        os.replace(old, f"{old}.tmp")  # a kill while deleting leaves no half checkpoint under its name
        shutil.rmtree(f"{old}.tmp")


def resume(run, settings, load_weights, state):
    """Restore the newest checkpoint; returns the step to go on from, 0 without one.

    ValueError for other settings, and unless all ranks go on from the same step. Every rank calls it, and has read the
    run when it returns: rank 0 may then write."""
    start, checkpoint = 0, newest_checkpoint(run)
    if checkpoint is not None:
        start = restore(run, checkpoint, settings, load_weights, state)
    if dist.is_initialized():
        ends = torch.tensor([start, -start])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError(f"ranks resume from steps {-ends[1]} to {ends[0]}: is {run} on a disk that all share?")
    return start


def restore(run, checkpoint, settings, load_weights, state):
    before = json.loads((run / "config.json").read_text())
    if unknown := before.keys() - settings.keys():
        raise ValueError(f"{run} was started by another version of this code (it has --{min(unknown)}): choose another "
                         "--name")
    if differ := changed(before, {k: v for k, v in settings.items() if k not in NOT_TRAINED}):
        raise ValueError(f"{run} was started with other settings ({differ}): choose another --name")
    load_weights(checkpoint)
    saved = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu",
                       mmap=True)  # ranks share the pages: PCGrad's buffers can be 16 GB
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def start_log(run, settings, start):
    """Write config.json, and cut from the logs the steps that will be run again."""
    run.mkdir(parents=True, exist_ok=True)
    remove_half_saved(run)
    write(run / "config.json", json.dumps(settings, indent=1))
    for log in run.glob("*.jsonl"):
        write(log, "".join(json.dumps(record) + "\n" for record in records(log) if record["step"] < start))
