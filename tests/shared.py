"""What test files share: models and runs that take seconds, and how to start a run and read what it wrote."""
import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

import model
import train
from toy import creatures

ROOT = Path(__file__).parents[1]
BASE, LORA, REF = (str(ROOT / "toy" / name) for name in ("base", "lora", "refs/creature-0.png"))
T, C, H, W, L, N = 3, 4, 8, 12, 5, 24  # a tiny model on frames that are not square; N tokens per latent frame
# --standalone finds a free port: torchrun's own 29500 may be taken by another job.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def randomise_lora(transformer):
    """LoRA starts at B = 0, where many mistakes cannot be seen."""
    g = torch.Generator().manual_seed(5)
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2


def small_knobs(folder):
    """The knobs of a run of seconds, and its data in `folder`, written once: no test changes it."""
    if not folder.is_dir():
        for end, pairs, clips, seed in (("", 40, 6, 0), ("_val", 6, 3, 1)):
            creatures.write_pairs(folder / f"pairs{end}", n=pairs, seed=seed)
            creatures.write_clips(folder / f"clips{end}", n=clips, seed=seed)
    return {**train.TOY, "base": BASE, "cache": "", "images": str(folder / "pairs"), "videos": str(folder / "clips"),
            "val_every": 0, "val_refs": "", "image_batch": 8, "image_micro": 4, "video_batch": 4,
            "video_micro": 2, "lora_dropout": 0.1, "view_drop": 0.3, "save_every": 3, "p": 0.5, "steps": 6,
            "lora_rank": 4, "lora_alpha": 2.0}


def command(knobs, script=str(ROOT / "train.py"), **more):
    """These knobs as a command line, for torchrun and for what needs a process of its own."""
    return [script, "--toy", *(f"--{name}={value}" for name, value in {**knobs, **more}.items())]


def start(words, cwd, stderr=subprocess.STDOUT):
    """Start python with these words, in a process group of its own. It ends with the tests."""
    process = subprocess.Popen([sys.executable, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    atexit.register(lambda: process.poll() is None and kill_job(process.pid))
    return process


def kill_job(pid):
    """SIGKILL for a process and its children, the ranks of a torchrun."""
    job = psutil.Process(pid)
    for one in (job, *job.children()):
        with suppress(psutil.NoSuchProcess):  # it is over
            one.kill()


def run(*words, cwd, timeout=600):
    """Run python with these words in a folder, and wait for its end."""
    process = start(words, cwd, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=timeout)  # only something that hangs takes that long
    return subprocess.CompletedProcess(words, process.returncode, out, err)


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
    shutil.copytree(folder, new, ignore=lambda _, names: [n for n in names if n > f"step-{step:06d}" and "step-" in n])


@contextmanager
def small_disk(size):
    """Inside, no file can grow beyond this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
