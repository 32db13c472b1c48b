"""Every way out of a run ends it, with its error and exit status, and leaves a folder that the next run understands."""
from tests.shared import TORCHRUN, command, log_of, run

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import model
import sample
import train
from common.run import (checkpoints, command_line, newest_checkpoint, read_json, records, resume, save_checkpoint,
                        start_log)

# train.py, but that something happens in step 2 on the last rank, while two processes read ahead.
BREAK = """
import os, runpy, signal, subprocess, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from common import watch
log_step = watch.Log.step
def step(log, number, *rest):
    log_step(log, number, *rest)
    if number == 2 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        {what}
watch.Log.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RAISE = "raise RuntimeError('CUDA error: an illegal memory access')"
KILL_A_WORKER = "os.kill(int(subprocess.check_output(['pgrep', '-P', str(os.getpid())]).split()[0]), signal.SIGKILL)"
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.fixture(scope="module")
def finished(knobs, tmp_path_factory):
    """A run of six steps, with checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    train.train(train.Config(**{**knobs, "out": str(folder), "name": "whole"}))
    return folder / "whole"


# ---- every way out ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, status, said", [
    (RAISE, 1, "CUDA error: an illegal memory access"), (KILL_A_WORKER, 1, "killed by signal"),
    (INTERRUPT, 130, "train.py: interrupted")], ids=["error", "killed worker", "Ctrl-C"])
def test_a_run_with_reading_workers_ends(knobs, tmp_path, what, status, said):
    script = tmp_path / "broken.py"
    script.write_text(BREAK.format(what=what))
    r = run(str(script), *command(knobs, workers=2, steps=60), cwd=tmp_path, timeout=120)
    assert r.returncode == status and said in r.stderr, r.stderr
    assert "Traceback" not in r.stderr or what is not INTERRUPT


@pytest.mark.slow("a torchrun job")
def test_an_error_on_one_of_two_ranks_ends_both(knobs, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BREAK.format(what=RAISE))
    r = run(*TORCHRUN, str(script), *command(knobs, workers=2, steps=60), cwd=tmp_path, timeout=120)
    assert r.returncode == 1 and "CUDA error: an illegal memory access" in r.stderr


def test_a_sigterm_ends_a_process_that_no_longer_trains(knobs, tmp_path, monkeypatch):
    """The handler that asks the loop to stop is gone with the loop."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    train.main(train.Config(**{**knobs, "steps": 1}))
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_in_a_reading_worker_is_one_line(tmp_path):
    """torch wraps it into the worker's traceback."""
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a caption")
    clips = data.Clips(tmp_path, (16, 16), 9, 8)

    def main(cfg):
        list(data.batches({"video": clips}, [[("video", 0, 0)]], workers=1))
    with pytest.raises(SystemExit, match="error: ValueError: 20 video samples in a row could not be used") as end:
        command_line(main, train.Config, "", [])
    assert "\n" not in str(end.value)


# ---- what the next run finds -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["training_state.pt", model.LORA_FILE])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_names_the_one_before(knobs, finished, tmp_path, monkeypatch, file, damage):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/whole")
    damaged = Path("out/whole/step-000006") / file
    if damage == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:1000] if damage == "cut" else b"")
    with pytest.raises(ValueError, match="out/whole/step-000006 is damaged .*: delete it, and the same command goes on "
                                         "from step-000003") as error:
        train.train(train.Config(**{**knobs, "name": "whole"}))
    assert "\n" not in str(error.value)


def test_only_whole_step_folders_are_checkpoints(tmp_path):
    """A copy that somebody made, a note, a half-written save and seven digits: the newest is the largest number."""
    for name in ("step-000004", "step-best", "step-000002", "step-000006.tmp", "step-1000000", "step-999999"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-notes.txt").write_text("")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-999999",
                                                                 "step-1000000"]
    assert newest_checkpoint(tmp_path).name == "step-1000000" and newest_checkpoint(tmp_path / "none") is None


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_whole_ones(tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt
    save_checkpoint(tmp_path, 1, 1, Path.mkdir, {})
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, 1, Path.mkdir, {})
    assert [d.name for d in checkpoints(tmp_path)] == ["step-000002"]


def test_a_run_that_goes_on_removes_what_was_half_saved(tmp_path):
    for name in ("step-000003", "step-000006.tmp"):
        (tmp_path / name).mkdir()
    start_log(tmp_path, {}, 3)
    assert sorted(d.name for d in tmp_path.glob("step-*")) == ["step-000003"]


def test_ranks_that_found_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """The other rank sees the checkpoint of step 3 on its own disk; this one sees none."""
    found = [0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda ends, op: ends.copy_(
        torch.maximum(ends, torch.tensor([found[0], -found[0]]))))
    assert resume(tmp_path, {}, None, {}) == 0
    found[0] = 3
    with pytest.raises(ValueError, match="ranks resume from steps 0 to 3: is .* on a disk that all share"):
        resume(tmp_path, {}, None, {})


def test_a_copied_checkpoint_is_neither_resumed_nor_sampled(knobs, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/whole")
    shutil.copytree("out/whole/step-000003", "out/whole/step-best")
    assert sample.find_lora().parent.name == sample.find_lora("out/whole").parent.name == "step-000006"


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_config_is_named(knobs, finished, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/whole")
    Path("out/whole/config.json").write_text(text)
    with pytest.raises(ValueError, match="out/whole/config.json is damaged"):
        train.train(train.Config(**{**knobs, "name": "whole"}))
    assert Path("out/whole/config.json").read_text() == text


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 0}\n{"loss": 1}\n\xff\xfe\n7\n{"step": 1}\n{"step": 2, "ta')
    assert [record["step"] for record in records(log)] == [0, 1]


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_two_runs_on_one_name_are_kept_apart(knobs, tmp_path, monkeypatch):
    """The lock that a running process holds is taken here by another one."""
    monkeypatch.chdir(tmp_path)
    Path("out/toy").mkdir(parents=True)
    hold = "import fcntl, sys; f = open('out/toy/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); " \
           "print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in out/toy: .* choose another --name"):
            train.train(train.Config(**{**knobs, "name": "toy"}))
    finally:
        other.communicate()
    train.train(train.Config(**{**knobs, "name": "toy", "steps": 1}))
    assert len(log_of("out/toy")) == 1


def test_a_refused_resume_names_init_lora(knobs, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "out/whole")
    for change in (dict(steps=9), dict(lr=1.0)):
        with pytest.raises(ValueError, match="choose another --name .with --init_lora out/whole it starts from"):
            train.train(train.Config(**{**knobs, "name": "whole", **change}))
