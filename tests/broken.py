"""train.py, to which something happens: the code in DO is run at the place AT.

    AT="step 12"    after step 12 (the log, a step late, then has the steps up to 11)
    AT="save 6"     inside the save of step 6, with half of the training state written

Nothing happens to a job that torchrun has restarted."""
import os
import runpy
import signal  # for the code in DO
import threading  # for the code in DO

import torch

from common import log
from tests.shared import TRAIN, kill_job  # kill_job is for the code in DO

rank, log_step, torch_save = int(os.environ.get("RANK", 0)), log.Log.step, torch.save


def happen(place):
    if place == os.environ["AT"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        exec(os.environ["DO"], globals())


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
runpy.run_path(TRAIN, run_name="__main__")
