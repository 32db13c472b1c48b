"""train.py, to which something happens: the code in DO is run at the place AT.

    AT="step 12"    after step 12 (the log, a step late, then has the steps up to 11)
    AT="save 6"     inside the save of step 6, with half of the training state written

Nothing happens to a job that torchrun has restarted."""
import os
import runpy
import signal  # for the code in DO
import threading  # for the code in DO
from pathlib import Path

import psutil
import torch

from common import log

rank, log_step, torch_save = int(os.environ.get("RANK", 0)), log.Log.step, torch.save


def happen(place):
    if place == os.environ["AT"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        exec(os.environ["DO"], globals())


def kill_job():
    """SIGKILL for torchrun and its ranks, this one last."""
    me, job = psutil.Process(), psutil.Process().parent()
    for process in [one for one in (job, *job.children()) if one != me] + [me]:
        process.kill()


def step(log, step, *rest):
    log_step(log, step, *rest)
    happen(f"step {step}")


def save(state, file):
    torch_save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    happen(f"save {state['step']}")
    file.write_bytes(whole)


log.Log.step, torch.save = step, save
runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
