"""train.py, held at a place so that a signal finds it there, however slow the machine or the test is.

    HOLD="step 12"    it does not go past step 12 (the log, a step late, then has the steps up to 11)
    HOLD="save 6"     it stays inside the save of step 6, with half of the training state written

SIGTERM lets it go on, SIGKILL ends it. A job that torchrun has restarted is not held again."""
import os
import runpy
import sys
from pathlib import Path

import torch

from common import log, run

PLACE, STEP = os.environ["HOLD"].split()
log_step, torch_save = log.Log.step, torch.save


def hold(place, step):
    if (place, step) == (PLACE, int(STEP)) and not run.SIGTERM.wait(timeout=600):
        sys.exit("no signal came")


def step_and_hold(log, step, *rest):
    log_step(log, step, *rest)
    hold("step", step)


def save_half_and_hold(state, file):
    torch_save(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    hold("save", state["step"])
    file.write_bytes(whole)


if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    log.Log.step, torch.save = step_and_hold, save_half_and_hold
runpy.run_path(str(Path(__file__).parents[1] / "train.py"), run_name="__main__")
