"""What test files share: models and runs that take seconds, and how to start them and read what they wrote."""
import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKLCogVideoX

from toy import creatures
import model
import train

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "toy/base")
TRAIN = str(ROOT / "train.py")
PATIENCE = 600  # seconds until a test gives up waiting: only something that hangs takes that long
T, C, H, W, L, N = 3, 4, 8, 12, 5, 24  # a tiny model on frames that are not square; N tokens per latent frame
# --standalone finds a free port: torchrun's own 29500 may be taken by another job.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def large_vae():
    """A small VAE of the real structure, for pictures of 96 x 240: they would take tiles."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2,
                                 latent_channels=4, sample_height=96, sample_width=240)
    return vae.eval().requires_grad_(False)


def randomise_lora(transformer, seed=5):
    """LoRA starts at B = 0, where many mistakes cannot be seen."""
    g = torch.Generator().manual_seed(seed)
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2


def small_knobs(folder):
    """The knobs of a run of seconds, and its data in `folder`, written once: no test changes it."""
    if not folder.is_dir():
        creatures.write_pairs(folder / "pairs", n=40)
        creatures.write_clips(folder / "clips", n=6)
        creatures.write_pairs(folder / "pairs_val", n=6, seed=1)
        creatures.write_clips(folder / "clips_val", n=3, seed=1)
    return {**train.TOY, "base": BASE, "cache": "", "images": str(folder / "pairs"), "videos": str(folder / "clips"),
            "val_every": 0, "val_refs": "", "image_batch": 8, "image_micro": 4, "video_batch": 4,
            "video_micro": 2, "lora_dropout": 0.1, "view_drop": 0.3, "save_every": 3, "p": 0.5, "steps": 6,
            "lora_rank": 4, "lora_alpha": 2.0}


def command(knobs, **more):
    """These knobs as a command line, for torchrun and for what needs a process of its own."""
    return [TRAIN, "--toy", *(f"--{name}={value}" for name, value in {**knobs, **more}.items())]


def start(words, cwd, stderr=subprocess.STDOUT, **environment):
    """Start python with these words, in a process group of its own. It ends with the tests."""
    process = subprocess.Popen([sys.executable, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    atexit.register(kill_job, process)
    return process


def run(*words, cwd=ROOT, timeout=PATIENCE):
    """Run python with these words and wait for its end; in the repository, unless cwd says otherwise."""
    process = start(words, cwd, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def start_and_wait(words, folder, steps, cwd, hold):
    """Start a command of train.py and return once the log that it begins (or begins again) holds this many steps.

    The run gets no further than `hold` says (see hold.py) before a signal comes: it cannot be over too early."""
    log = folder / "log.jsonl"
    before = log.stat().st_ino if log.is_file() else None  # a run that goes on replaces the log by another file
    process = start([str(ROOT / "tests/hold.py") if word == TRAIN else word for word in words], cwd, HOLD=hold)
    until = time.time() + PATIENCE
    while time.time() < until and process.poll() is None:
        if log.is_file() and log.stat().st_ino != before and len(log.read_text().splitlines()) >= steps:
            return process
        time.sleep(0.01)
    kill_job(process)
    raise AssertionError(process.communicate()[0])


def children(process):
    """The ids of the processes that this one started: the ranks of a torchrun."""
    return [child.pid for child in psutil.Process(process.pid).children()]


def kill_job(process):
    """SIGKILL for a process that still runs and for its children, all at once."""
    if process.poll() is None:
        for pid in (process.pid, *children(process)):
            with suppress(ProcessLookupError):  # it is over
                os.kill(pid, signal.SIGKILL)


def log_of(folder, file="log.jsonl"):
    """The records of a run's log, without the times."""
    records = [json.loads(line) for line in (Path(folder) / file).read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def weights_of(folder, step=6):
    """All LoRA weights of a checkpoint as one vector."""
    file = Path(folder) / f"step-{step:06d}" / model.LORA_FILE
    return torch.cat([v.flatten() for _, v in sorted(model.load_file(file).items())])


def go_back(folder, step, new):
    """A copy of a run as if it had been killed after the checkpoint of `step`: later lines are in the logs."""
    shutil.copytree(folder, new)
    for checkpoint in Path(new).glob("step-*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
