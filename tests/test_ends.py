"""Every way out of a run ends it, with its error and exit status, and leaves a folder that the next run understands."""
from tests.shared import BROKEN, TORCHRUN, command, log_of, run

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import model
import train
from common.run import checkpoints, claim, newest_checkpoint, save_checkpoint, start_log

RAISE = "raise RuntimeError('CUDA error: an illegal memory access')"
RAISE_ON_RANK_1 = f"if rank == 1: {RAISE}"
KILL_A_WORKER = "psutil.Process().children()[0].kill()"
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"


@pytest.fixture(scope="module")
def finished(knobs, tmp_path_factory):
    """A run of six steps, with checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    train.train(train.Config(**{**knobs, "out": str(folder), "name": "whole"}))
    return folder / "whole"


@pytest.mark.parametrize("ranks, what, status, said", [
    ([], KILL_A_WORKER, 1, "killed by signal"), ([], INTERRUPT, 130, "train.py: interrupted"),
    ([], RAISE, 1, "CUDA error: an illegal memory access"),
    pytest.param(TORCHRUN, RAISE_ON_RANK_1, 1, "CUDA error: an illegal memory access",
                 marks=pytest.mark.slow("a torchrun job"))],
    ids=["killed worker", "Ctrl-C", "error", "error on one of two ranks"])
def test_a_run_with_reading_workers_ends(knobs, tmp_path, ranks, what, status, said):
    """Something happens in step 2, while two processes read ahead."""
    r = run(*ranks, *command(knobs, BROKEN, workers=2, steps=60), cwd=tmp_path, AT="step 2", DO=what)
    assert r.returncode == status and said in r.stderr, r.stderr
    assert "Traceback" not in r.stderr or what is not INTERRUPT


def test_a_sigterm_ends_a_process_that_no_longer_trains(knobs, tmp_path):
    """The handler that asks the loop to stop is gone with the loop."""
    before = signal.getsignal(signal.SIGTERM)
    train.main(train.Config(**{**knobs, "steps": 1, "out": str(tmp_path)}))
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("file, kept, message", [
    ("config.json", 1, "whole/config.json is damaged")] + [
    (file, kept, "whole/step-000006 is damaged .*: delete it, and the same command goes on from step-000003")
    for file in ("step-000006/training_state.pt", f"step-000006/{model.LORA_FILE}") for kept in (1000, None)])
def test_what_is_damaged_is_named(knobs, finished, tmp_path, file, kept, message):
    """The file is cut, or gone."""
    shutil.copytree(finished, tmp_path / "whole")
    damaged = tmp_path / "whole" / file
    content = damaged.read_bytes()
    damaged.unlink()
    if kept:
        damaged.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=message) as error:
        train.train(train.Config(**{**knobs, "name": "whole", "out": str(tmp_path)}))
    assert "\n" not in str(error.value)


def test_only_whole_step_folders_are_checkpoints_and_rank_0_alone_writes(tmp_path, monkeypatch):
    """A copy that somebody made, a note, a half-written save and seven digits: the newest is the largest number."""
    for name in ("step-000004", "step-best", "step-000002", "step-000006.tmp", "step-1000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000009").write_text("")
    there = sorted(tmp_path.iterdir())
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-1000000"]
    assert newest_checkpoint(tmp_path / "none") is None
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        claim(tmp_path)
        start_log(tmp_path, {}, 4)
        save_checkpoint(tmp_path, 8, Path.mkdir, {})
    assert sorted(tmp_path.iterdir()) == there
    start_log(tmp_path, {}, 4)  # a run that goes on removes what was half saved
    save_checkpoint(tmp_path, 1000008, Path.mkdir, {})
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000004", "step-1000000", "step-1000008"]
    assert not list(tmp_path.glob("*.tmp"))


def test_two_runs_on_one_name_are_kept_apart(knobs, tmp_path):
    """The lock that a running process holds is taken here by another one."""
    cfg = train.Config(**{**knobs, "steps": 1, "out": str(tmp_path)})
    hold = "import fcntl, sys; f = open('.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    (tmp_path / "toy").mkdir()
    with subprocess.Popen([sys.executable, "-uc", hold], cwd=tmp_path / "toy", stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in .*toy: .* choose another --name"):
            train.train(cfg)
        other.stdin.close()
    train.train(cfg)
    assert len(log_of(tmp_path / "toy")) == 1
