"""A run's log and progress bar, and the losses that they show. The loop never waits for the device to write them."""
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.run import print0, rank_and_world_size
from data import TASKS


# ---- losses, summed on the device and over ranks --------------------------------------------------------------------

def no_losses(device):
    """Per task the sums and the counts of losses in the four quarters of the timesteps; of "mixed" the sum of the
    micro-batches' means and their count."""
    return {task: torch.zeros(2, 4, device=device) for task in TASKS} | {"mixed": torch.zeros(2, device=device)}


def add_losses(losses, task, loss, t, num_timesteps):
    """Add a micro-batch's losses (B,)."""
    quarter, loss = 4 * t // num_timesteps, loss.detach()
    sums, counts = losses[task]
    sums += torch.zeros_like(sums).index_add(0, quarter, loss)
    counts += torch.zeros_like(counts).index_add(0, quarter, torch.ones_like(loss))
    losses["mixed"] += torch.stack([loss.mean(), torch.ones_like(loss[0])])


def sum_over_ranks(metrics):
    """Sum each tensor of a dict over all ranks, in one message."""
    if not dist.is_initialized():
        return metrics
    flat = torch.cat([m.flatten() for m in metrics.values()])
    dist.all_reduce(flat)
    pieces = flat.split([m.numel() for m in metrics.values()])
    return {name: piece.view_as(m) for (name, m), piece in zip(metrics.items(), pieces)}


def step_means(task, losses):
    """What a step's line says of its losses. A mixed step's loss is the mean over its micro-batches, which all weigh
    the same; beside it stand the two tasks' own."""
    if task != "mixed":
        return loss_means(*losses[task])
    total, count = losses["mixed"].tolist()
    means = {"loss": total / count}
    for name in TASKS:
        means[name] = loss_means(*losses[name]) if losses[name][1].any() else None
    return means


def loss_means(loss_sum, loss_count):
    """Four sums and counts, one per quarter of the timesteps -> {"loss": mean, "loss_by_timestep": 4 means or None}."""
    sums, counts = loss_sum.tolist(), loss_count.tolist()
    return {"loss": sum(sums) / sum(counts), "loss_by_timestep": [s / c if c else None for s, c in zip(sums, counts)]}


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


def numbers_in(record, name):
    """("log/image/loss", 0.3), ... for every number in a record of dicts and lists, but its step."""
    if isinstance(record, (dict, list)):
        for key, value in record.items() if isinstance(record, dict) else enumerate(record):
            yield from numbers_in(value, f"{name}/{key}") if key != "step" else ()
    elif isinstance(record, (int, float)):
        yield name, record


def describe(cfg, run, parameters, datasets, size, start, device):
    """Say what a run is, before its first step."""
    print0(f"{run}: {sum(p.numel() for p in parameters):,} trainable parameters in {len(parameters) // 2} LoRA modules,"
           f" {size[1]}x{size[0]}, {', '.join(f'{len(d)} {t}s' for t, d in datasets.items())}, "
           f"{rank_and_world_size()[1]} rank(s) on {device}" + (f", going on from step {start}" if start else ""))


class Log:
    """log.jsonl and the progress bar. The metrics of a step are read one step late, so nothing waits for the GPU.

    run: the run's folder. It goes from step `start` to `steps`. Only rank 0 writes and shows."""

    def __init__(self, run, start, steps, device, tensorboard=False):
        self.run, self.device, self.board = None, device, None
        if rank_and_world_size()[0] == 0:
            self.run = run
        if self.run and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
            self.board = SummaryWriter(run / "tensorboard", purge_step=start)
        # smoothing=0: the time that is left follows from the mean of all steps, because the tasks' steps differ.
        self.bar = tqdm(total=steps, initial=start, mininterval=1, smoothing=0, disable=self.run is None, unit="step")
        self.pending, self.shown, self.unusable = None, {}, set()
        self.stop = False  # some rank got a SIGTERM, and all ranks know

    def write(self, file, record):
        """Append one line to a .jsonl file of the run."""
        if self.run:
            with open(self.run / file, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        if self.board:
            for name, value in numbers_in(record, Path(file).stem):
                self.board.add_scalar(name, value, record["step"])

    def doing(self, words=""):
        """Say on the bar what the run does between two steps, so that a pause does not look like a hang."""
        self.bar.set_description_str(words)

    def start(self):
        self.started = Moment(self.device)

    def step(self, step, task, lr, metrics):
        """metrics: tensors "image" (2,4), "video" (2,4), "mixed" (2,) (see no_losses) and "stop" (1,) over all
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
        by_task = {name: means[name]["loss"] for name in TASKS if means.get(name)}
        for name, value in (by_task or {task: loss}).items():
            self.shown[name] = 0.95 * self.shown.get(name, value) + 0.05 * value
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.shown.items()}, refresh=False)
        self.bar.update()

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
