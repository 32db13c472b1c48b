"""Runs of train.py: how they go on, on one rank and on two, and what stops them."""
from tests.shared import TORCHRUN, command, go_back, kill_job, log_of, run, small_disk, start, weights_of

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import model
import train
from common.run import checkpoints, newest_checkpoint, records
from common.setup import divide_batches
from common.log import numbers_in


def go(knobs, **more):
    train.train(train.Config(**{**knobs, **more}))


def same_run(a, b, step=6):
    """Are two runs the same, bit for bit?"""
    return log_of(a) == log_of(b) and torch.equal(weights_of(a, step), weights_of(b, step))


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- a run that goes on ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", name="whole")
def whole_fixture(knobs, tmp_path_factory):
    """The folder of a whole run that other tests go back in."""
    go(knobs, name="whole", out=str(out := tmp_path_factory.mktemp("out")))
    return out / "whole"


def test_a_killed_run_goes_on_bit_for_bit(whole, knobs, tmp_path, capsys):
    """A save was half done, a line half written, and somebody has made a copy of a checkpoint."""
    killed = tmp_path / "out/killed"
    go_back(whole, 3, killed)
    (killed / "step-000005.tmp").mkdir()
    (killed / "step-best").mkdir()
    (killed / "log.jsonl").open("a").write('{"step": 6, "ta')
    go(knobs, name="killed")
    assert [line["step"] for line in log_of(whole)] == list(range(6)) and same_run(killed, whole)
    assert sorted(folder.name for folder in killed.glob("step-*")) == ["step-000003", "step-000006", "step-best"]
    go(knobs, name="killed")
    assert "going on from step 3" in (said := capsys.readouterr().out) and "is complete" in said
    go(knobs, name="killed", val_every=9)  # its end is measured now
    assert [line["step"] for line in log_of(killed, "val.jsonl")] == [6]
    said = "steps was 6, now 9; lr was 0.006, now 1.0.: choose another --name .with --init_lora out/killed it starts"
    with pytest.raises(ValueError, match=said):
        go(knobs, name="killed", steps=9, lr=1.0)


def test_two_ranks_go_on_where_one_was(whole, knobs):
    """The real command line: the losses, weights and measurements of one rank, to rounding."""
    watch = dict(gradcos_every=2, val_every=2)
    go_back(whole, 3, "out/two")
    r = run(*TORCHRUN, *command(knobs, name="two", **watch), cwd=".")
    assert r.returncode == 0, r.stderr
    go_back(whole, 3, "out/one")
    go(knobs, name="one", **watch)
    assert torch.allclose(weights_of("out/two"), weights_of("out/one"), rtol=1e-4, atol=1e-5)
    for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"):
        one, two = log_of("out/one", file), log_of("out/two", file)
        assert np.allclose(*([n for _, n in numbers_in(lines, "")] for lines in (one, two)), rtol=1e-4, atol=1e-5)


def test_pcgrad_resumes_exactly_and_measuring_cosines_leaves_no_trace(knobs):
    go(knobs, pcgrad=4, name="whole", val_every=3, gradcos_every=2)
    go_back("out/whole", 3, "out/killed")
    go(knobs, pcgrad=4, name="killed", val_every=3)
    assert same_run("out/killed", "out/whole")
    assert log_of("out/killed", "val.jsonl") == log_of("out/whole", "val.jsonl")


def test_two_stages_have_a_schedule_each_and_resume(knobs):
    """Two steps of warm-up, then a cosine over two."""
    knobs = {**knobs, "task_schedule": "two_stage", "steps": 8, "warmup": 2, "lr": 1.0e-3}
    go(knobs, name="whole")
    lines = log_of("out/whole")
    assert [line["task"] for line in lines] == ["image"] * 4 + ["video"] * 4
    assert [line["lr"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)
    go_back("out/whole", 6, "out/killed")
    go(knobs, name="killed")
    assert same_run("out/killed", "out/whole", 8)


@pytest.mark.parametrize("batch, micro, ranks, expected, said", [
    (33, 4, 1, (33, 3), "--image_micro 4 is now 3"), (16, 4, 3, (15, 1), "--image_batch 16 is now 15")])
def test_batches_are_divided_by_the_ranks(capsys, batch, micro, ranks, expected, said):
    cfg = divide_batches(train.Config(image_batch=batch, image_micro=micro, video_batch=ranks), ranks)
    assert (cfg.image_batch, cfg.image_micro) == expected and said in capsys.readouterr().out


# ---- what stops a run ------------------------------------------------------------------------------------------------

def start_and_wait(words, condition):
    """A job that runs, at the moment when the condition comes true."""
    job = start(words, cwd=".")
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.002)
    return job


def test_a_running_job_keeps_others_out_and_ctrl_c_ends_it_with_one_line(knobs):
    job = start_and_wait(command(knobs, workers=2, steps=999), lambda: records(Path("out/toy/log.jsonl")))
    with pytest.raises(ValueError, match="another process trains in .*toy: .* choose another --name"):
        go(knobs)
    job.send_signal(signal.SIGINT)
    out = job.communicate(timeout=100)[0]
    assert job.returncode == 130 and "train.py: interrupted" in out and "Traceback" not in out, out


def test_an_error_in_the_loop_ends_the_processes_that_read_ahead(knobs):
    words = "import train; train.add_losses = None; train.command_line(train.main, train.Config, '')"
    r = run("-c", words, *command(knobs, workers=2)[2:], cwd=".", timeout=100)
    assert r.returncode == 1 and "TypeError: 'NoneType' object is not callable" in r.stderr


@pytest.mark.parametrize("file", ["training_state.pt", model.LORA_FILE])
def test_a_checkpoint_that_is_cut_is_named_in_one_line(whole, knobs, file):
    go_back(whole, 6, "out/cut")
    os.truncate(f"out/cut/step-000006/{file}", 100)
    said = "^out/cut/step-000006 is damaged .*: delete it, and the same command goes on from step-000003$"  # one line
    with pytest.raises(ValueError, match=said):
        go(knobs, name="cut")


@pytest.mark.parametrize("module, name, factor", [(train, "v_loss", "nan"), (torch.nn.utils, "clip_grad_norm_", "inf")])
def test_a_number_that_is_not_finite_stops_the_run(knobs, monkeypatch, module, name, factor):
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: true(*args, **kwargs) * float(factor))
    with pytest.raises(SystemExit, match=r"step 0 \(image\): loss (nan|0\.\d+, gradient norm inf)"):
        go(knobs, p=0.0)
    assert not checkpoints("out/toy")


def test_a_full_disk_keeps_the_last_checkpoint(whole, knobs):
    go_back(whole, 3, "out/full")
    said = "cannot save out/full/step-000006: .* it goes on from out/full/step-000003"
    with small_disk(50_000), pytest.raises(SystemExit, match=said):  # the log is smaller, a checkpoint is not
        go(knobs, name="full")
    go(knobs, name="full")
    assert same_run("out/full", whole)


def test_sigterm_saves_and_the_run_goes_on(knobs):
    """The process that reads data gets it too. After the loop it ends a process at once, as it always does."""
    knobs, before = {**knobs, "steps": 15, "save_every": 100, "workers": 1}, signal.getsignal(signal.SIGTERM)
    job = start_and_wait(command(knobs, name="ended"), lambda: records(Path("out/ended/log.jsonl")))
    os.killpg(job.pid, signal.SIGTERM)
    out = job.communicate()[0]
    assert job.returncode == 0 and "stopped by SIGTERM" in out, out
    assert 0 < int(newest_checkpoint("out/ended").name[5:]) < 15
    for name in ("ended", "whole"):
        train.main(train.Config(**{**knobs, "name": name}))
    assert same_run("out/ended", "out/whole", 15) and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow("20 ends of a two-rank run, each with a start of its own: about 6 minutes")
def test_twenty_ends(knobs):
    """A whole torchrun job gets a SIGKILL in a save or at a random moment, or a SIGTERM; at last one rank is lost, and
    --max-restarts starts both again: the same final weights."""
    words, folder = [*TORCHRUN, "--max-restarts=1", *command(knobs, steps=240, save_every=2)], Path("out/ended")
    assert run(*words, "--name=whole", cwd=".").returncode == 0
    for number in range(21):
        newest, saving = newest_checkpoint(folder), "step-*.tmp/training_state.pt" if number % 4 == 0 else "log.jsonl"
        job = start_and_wait([*words, "--name=ended"],
                             lambda: newest_checkpoint(folder) != newest and any(folder.glob(saving)))
        time.sleep(np.random.uniform(0, 0.2) * (number % 4 > 0))
        if number == 20:
            psutil.Process(job.pid).children()[1].kill()
        elif number % 4 == 1:
            job.terminate()  # torchrun hands it to both ranks, which stop after the same step
            assert "stopped by SIGTERM" in job.communicate()[0]
        else:
            kill_job(job.pid)
    out = job.communicate()[0]
    assert job.returncode == 0 and out.count("going on from step") == 2, out
    assert same_run(folder, "out/whole", 240)
