"""A run: its arguments, its seeded random streams, its ranks, and its folder on disk (log, checkpoints, resume).

Nothing here knows the method. train.py, sample.py and the scripts in paper/ and toy/ share it.
"""
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from dataclasses import field
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser


# ---- arguments -------------------------------------------------------------------------------------------------------

def knob(default, text):
    """A field of a script's Config: its default and its line of --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_bounds(cfg, positive="", not_negative="", shares=""):
    """ValueError for the first knob (names in one string) that is outside its bounds. NaN and infinity are outside all
    of them, a seed above 63 bits (torch's limit) too."""
    for name in f"{positive} {not_negative}".split():
        if not abs(getattr(cfg, name)) < float("inf"):
            raise ValueError(f"--{name} must be a number, got {getattr(cfg, name)}")
    if "seed" in not_negative.split() and cfg.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, got {cfg.seed}")
    for name in positive.split():
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name} must be positive, got {getattr(cfg, name)}")
    for name in not_negative.split():
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(cfg, name)}")
    for name in shares.split():
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name} must be in [0, 1], got {getattr(cfg, name)}")


def check_choices(cfg, **choices):
    """ValueError for the first knob that is none of its choices (names in one string)."""
    for name, words in choices.items():
        if getattr(cfg, name) not in words.split():
            raise ValueError(f"--{name} must be one of {', '.join(words.split())}, got {getattr(cfg, name)!r}")


def changed(before, now):
    """"height was 480, now 256; ..." for the settings in `now` that were others before, "" when none was."""
    return "; ".join(f"{k} was {before.get(k)!r}, now {v!r}" for k, v in now.items() if before.get(k) != v)


def command_line(main, Config, description, argv=None, positional=None, out_of_memory="", **defaults):
    """Parse the knobs of dataclass `Config` from the command line and call main(config).

    `defaults` replace the dataclass's own; `positional` names the list knob that leading words without -- fill;
    `out_of_memory` says which flags save memory.
    A user's mistake (bad flag, value or file) is one line and exit status 1 or 2. TRACEBACK=1 in the environment shows
    the whole traceback instead.
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
    except (ValueError, OSError) as e:  # OSError: a missing file, a full disk
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{parser.prog}: error: {e}")
    except torch.OutOfMemoryError as e:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{parser.prog}: error: the GPU's memory is full ({str(e).split('. ')[0]}). Try {out_of_memory}")


# ---- random streams --------------------------------------------------------------------------------------------------

def rng(seed, stream, *numbers):
    """The numpy generator of one named stream at one place in the run, e.g. rng(seed, "coin", step)."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), *numbers])


def torch_rng(seed, stream, *numbers):
    """The same for torch, on the CPU: a draw is the same whatever device uses it."""
    return torch.Generator().manual_seed(int(rng(seed, stream, *numbers).integers(2**63)))


def weight_fingerprint(weight):
    """12 hex digits that tell one weight from another, in whatever dtype it was loaded."""
    weight = weight.detach().to("cpu", torch.bfloat16)
    return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()[:12]


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


def sum_over_ranks(metrics):
    """Sum each tensor of a dict over all ranks, in one message."""
    if not dist.is_initialized():
        return metrics
    flat = torch.cat([m.flatten() for m in metrics.values()])
    dist.all_reduce(flat)
    pieces = flat.split([m.numel() for m in metrics.values()])
    return {name: piece.view_as(m) for (name, m), piece in zip(metrics.items(), pieces)}


# ---- the log ---------------------------------------------------------------------------------------------------------

class Moment:
    """A moment on the device."""

    def __init__(self, device):
        self.time, self.event = time.perf_counter(), None
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def seconds_since(self, earlier):
        """Seconds between two moments. Waits until the device has reached this one."""
        if self.event is None:
            return self.time - earlier.time
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


def step_means(task, losses):
    """What a step's line says of its losses. A mixed step's loss is the mean over its micro-batches, which all weigh
    the same; beside it stand the two tasks' own."""
    if task != "mixed":
        return loss_means(*losses[task])
    total, count = losses["mixed"].tolist()
    return {"loss": total / count,
            **{t: loss_means(*losses[t]) if losses[t][1].any() else None for t in ("image", "video")}}


def loss_means(loss_sum, loss_count):
    """Four sums and counts, one per quarter of the timesteps -> {"loss": mean, "loss_by_timestep": 4 means or None}."""
    sums, counts = loss_sum.tolist(), loss_count.tolist()
    return {"loss": sum(sums) / sum(counts), "loss_by_timestep": [s / c if c else None for s, c in zip(sums, counts)]}


def numbers_in(record, name):
    """("log/image/loss", 0.3), ... for every number in a record of dicts and lists, but its step."""
    if isinstance(record, (dict, list)):
        for key, value in record.items() if isinstance(record, dict) else enumerate(record):
            yield from numbers_in(value, f"{name}/{key}") if key != "step" else ()
    elif isinstance(record, (int, float)):
        yield name, record


class Log:
    """log.jsonl and the progress bar. The metrics of a step are read one step late, so nothing waits for the GPU.

    run: the run's folder, None on all ranks but the first. tasks: the task of every step; the run begins at `start`."""

    def __init__(self, run, start, tasks, device, tensorboard=False):
        self.run, self.device, self.board = run, device, None
        if run and tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run / "tensorboard", purge_step=start)
        self.bar = tqdm(total=len(tasks), initial=start, mininterval=1, disable=run is None,
                        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]")
        self.to_come = Counter(tasks[start:])
        self.seconds = {task: deque(maxlen=20) for task in self.to_come}  # of each task's last 20 steps
        self.estimated = False
        self.pending, self.shown, self.unusable = None, {}, set()
        self.stop = False  # some rank got a SIGTERM, and all ranks know

    def write(self, file, record):
        """Append one line to a .jsonl file of the run."""
        if self.run:
            with open(self.run / file, "a") as f:
                f.write(json.dumps(record) + "\n")
        for name, value in numbers_in(record, Path(file).stem) if self.board else []:
            self.board.add_scalar(name, value, record["step"])

    def pictures(self, folder, step):
        """Show the sample sheets of this step, of all ranks, in TensorBoard."""
        if dist.is_initialized():
            dist.barrier()
        for file in sorted(Path(folder).glob(f"*-{step:06d}.png")) if self.board else []:
            self.board.add_image(file.stem[:-7], np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")

    def start(self):
        self.started = Moment(self.device)

    def step(self, step, task, lr, metrics):
        """metrics: tensors "image" (2,4), "video" (2,4), "mixed" (2,) (see train.no_losses) and "stop" (1,) over all
        ranks, and "grad_norm" (1,)."""
        metrics = {k: v.to("cpu", non_blocking=True) for k, v in metrics.items()}
        ended = Moment(self.device)  # once this moment is reached, the copies above are complete
        self.flush()
        self.pending = step, task, lr, metrics, self.started, ended

    def flush(self):
        """Write the step that is pending. Stops the run when its loss or gradient is not finite."""
        if self.pending is None:
            return
        (step, task, lr, metrics, started, ended), self.pending = self.pending, None
        seconds = ended.seconds_since(started)  # before any metric is read: this waits for the copies
        means, norm = step_means(task, metrics), metrics["grad_norm"].item()
        self.stop = self.stop or metrics["stop"].item() > 0
        loss = means["loss"]
        if not (abs(loss) < float("inf") and norm < float("inf")):  # NaN fails both
            sys.exit(f"step {step} ({task}): loss {loss}, gradient norm {norm}. Stopped; the last checkpoint is good")
        self.write("log.jsonl", {"step": step, "task": task, **means, "lr": lr, "grad_norm": norm,
                                 "seconds": round(seconds, 4)})
        for t, new in {t: means[t]["loss"] for t in ("image", "video") if means.get(t)}.items() or [(task, loss)]:
            self.shown[t] = 0.95 * self.shown.get(t, new) + 0.05 * new
        left = self.estimate(task, seconds)
        self.bar.set_postfix({"left": left, **{k: f"{v:.4f}" for k, v in self.shown.items()}}, refresh=False)
        self.bar.update()

    def estimate(self, task, seconds):
        """The time that the steps to come will take, each as long as the median of its task's last ones; "?" before
        every task was seen. A line says it once, after 20 steps of each. Saving and measuring come on top."""
        self.to_come[task] -= 1
        self.seconds[task].append(seconds)
        if not all(self.seconds.values()):
            return "?"
        pace = {t: median(times) for t, times in self.seconds.items()}
        left = self.bar.format_interval(sum(pace[t] * n for t, n in self.to_come.items()))
        if self.run and not self.estimated and all(len(times) == 20 for times in self.seconds.values()):
            self.estimated = True
            steps = ", ".join(f"{n} {t} steps of {pace[t]:.2f} s" for t, n in self.to_come.items())
            self.bar.write(f"about {left} to go: {steps}, and saving and measuring")
        return left

    def skipped(self, reasons):
        """Report each unusable file once."""
        for reason in set(reasons) - self.unusable:
            self.unusable.add(reason)
            self.bar.write(f"skipped ({len(self.unusable)} so far): {reason}", file=sys.stderr)

    def close(self):
        self.flush()
        self.bar.close()
        if self.board:
            self.board.close()
        if self.unusable:
            print(f"{len(self.unusable)} unusable file(s) were skipped")


# ---- the folder ------------------------------------------------------------------------------------------------------

# Knobs of train.py that leave what is trained as it is: runs that differ only in these are the same run.
NOT_TRAINED = {"toy", "recipe", "tensorboard", "name", "out", "workers", "save_every", "keep_checkpoints", "guidance",
               "grad_device",
               "gradcos_every", "val_every", "sample_every", "val_images", "val_videos", "val_pairs", "val_clips",
               "val_refs", "image_checkpointing", "video_checkpointing"}
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
        os.replace(old, f"{old}.tmp")  # never half a checkpoint under a good name
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
