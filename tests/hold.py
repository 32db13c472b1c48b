"""train.py, held at a place so that a signal finds it there, however slow the machine or the test is.

    HOLD="step 12"    it does not go past step 12 (the log, a step late, then has the steps up to 11)
    HOLD="save 6"     it stays inside the save of step 6, with half of the training state written

SIGTERM lets it go on, SIGKILL ends it. A job that torchrun has restarted is not held again."""
import os
import runpy
import sys
import time
from pathlib import Path

import torch

from common import run
from common import watch

PLACE, STEP = os.environ["HOLD"].split()
log_step, torch_save = watch.Log.step, torch.save


def hold():
    for _ in range(60_000):  # ten minutes
        if run.SIGTERM.is_set():
            return
        time.sleep(0.01)
    sys.exit("no signal came")


def step_and_hold(log, step, *rest):
    log_step(log, step, *rest)
    if step == int(STEP):
        hold()


def save_half_and_hold(state, file):
    torch_save(state, file)
    if state["step"] == int(STEP):
        whole = file.read_bytes()
        file.write_bytes(whole[:len(whole) // 2])
        hold()
        file.write_bytes(whole)


if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    if PLACE == "step":
        watch.Log.step = step_and_hold
    else:
        torch.save = save_half_and_hold
sys.argv[0] = str(Path(__file__).parents[1] / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
