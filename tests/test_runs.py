"""Runs of train.py: how they go on after any kind of end, on one rank and on two, and what stops them."""
from tests.shared import (PATIENCE, ROOT, TORCHRUN, children, command, go_back, kill_job, log_of, run, start_and_wait,
                          weights_of)

import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch

import model
import sample
import train
from common.run import checkpoints, newest_checkpoint
from common.setup import divide_batches
from common.watch import numbers_in


def go(knobs, **more):
    """Train in this process."""
    train.train(train.Config(**{**knobs, **more}))


def same_run(a, b, step=6, file="log.jsonl"):
    """Are two runs the same, bit for bit?"""
    return log_of(a, file) == log_of(b, file) and torch.equal(weights_of(a, step), weights_of(b, step))


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- a run that goes on ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", name="whole")
def whole_fixture(knobs, tmp_path_factory):
    """The folder of a whole run, out/whole, that other tests go back in."""
    folder = tmp_path_factory.mktemp("whole")
    go(knobs, name="whole", out=str(folder / "out"))
    return folder / "out/whole"


def test_a_killed_run_goes_on_bit_for_bit(whole, knobs, tmp_path, capsys):
    """A save was half done, and a line half written."""
    killed = tmp_path / "out/killed"
    go_back(whole, 3, killed)
    (killed / "step-000005.tmp").mkdir()
    (killed / "log.jsonl").open("a").write('{"step": 6, "ta')
    go(knobs, name="killed")
    assert "going on from step 3" in capsys.readouterr().out
    assert [line["step"] for line in log_of(whole)] == list(range(6)) and same_run(killed, whole)
    assert sorted(folder.name for folder in killed.glob("step-*")) == ["step-000003", "step-000006"]
    go(knobs, name="killed")
    assert "is complete" in capsys.readouterr().out
    for change, said in ((dict(steps=9), "steps was 6, now 9"), (dict(lr=1.0), "lr was 0.006, now 1.0")):
        with pytest.raises(ValueError, match=f"{said}.: choose another --name .with --init_lora out/killed it starts"):
            go(knobs, name="killed", **change)


def test_two_ranks_go_on_where_one_was(whole, knobs):
    """The real command line: the losses, weights and measurements of one rank, to rounding."""
    watch = dict(gradcos_every=2, val_every=2)
    go_back(whole, 3, "out/two")
    r = run(*TORCHRUN, *command(knobs, name="two", **watch), cwd=".")
    assert r.returncode == 0, r.stderr
    go_back(whole, 3, "out/one")
    go(knobs, name="one", **watch)
    a, b = weights_of("out/two"), weights_of("out/one")
    assert (a - b).norm() / b.norm() < 1e-5
    for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"):
        one, two = log_of("out/one", file), log_of("out/two", file)
        assert [line["step"] for line in two] == [line["step"] for line in one]
        assert np.allclose(*([n for _, n in numbers_in(lines, "")] for lines in (one, two)), rtol=1e-4, atol=1e-5)


def test_pcgrad_resumes_exactly_and_watching_leaves_no_trace(knobs, tmp_path, monkeypatch):
    monkeypatch.setattr("common.watch.generate", partial(sample.generate, steps=2))
    (tmp_path / "refs").mkdir()
    for suffix in (".png", ".txt"):
        shutil.copy(ROOT / f"toy/refs/creature-0{suffix}", "refs")
    watch = dict(gradcos_every=2, val_every=3, val_refs="refs")
    go(knobs, pcgrad=4, name="whole", **watch)
    go(knobs, pcgrad=4, name="unwatched")
    assert same_run("out/whole", "out/unwatched")
    go(knobs, name="coin")
    assert not same_run("out/whole", "out/coin")
    go_back("out/whole", 3, "out/killed")
    go(knobs, pcgrad=4, name="killed", **watch)
    assert all(same_run("out/killed", "out/whole", 6, file) for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"))
    assert [line["step"] for line in log_of("out/whole", "gradcos.jsonl")] == [0, 2, 4, 6]
    go(knobs, pcgrad=4, name="unwatched", val_every=3)  # it is complete: only its end is measured
    assert log_of("out/unwatched", "val.jsonl") == log_of("out/whole", "val.jsonl")[-1:]


def test_two_stages_have_a_schedule_each_and_resume(knobs):
    knobs = {**knobs, "task_schedule": "two_stage", "steps": 8, "warmup": 2, "save_every": 2, "lr": 1.0e-3}
    go(knobs, name="whole")
    lines = log_of("out/whole")
    assert [line["task"] for line in lines] == ["image"] * 4 + ["video"] * 4
    assert [line["lr"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)  # warm-up 2, cosine over 2
    go_back("out/whole", 6, "out/killed")
    go(knobs, name="killed")
    assert same_run("out/killed", "out/whole", 8)


def test_init_lora_goes_on_with_its_scope(knobs):
    knobs = {**knobs, "steps": 2, "view_drop": 0.0}
    go(knobs, lora_scope="reference", image_checkpointing="full", video_checkpointing="attention", name="scoped")
    go(knobs, init_lora="out/scoped", name="on")
    assert model.lora_header("out/on/step-000002")["lora_scope"] == "reference"
    assert not torch.equal(weights_of("out/on", 2), weights_of("out/scoped", 2))


# ---- micro-batches and ranks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, ranks, expected, lines", [
    ((256, 8), 8, (256, 8, 4), []),  # the paper's
    ((32, 32), 1, (32, 32, 1), []), ((32, 32), 2, (32, 16, 1), ["--image_micro 32 is now 16"]),
    ((33, 4), 1, (33, 3, 11), ["--image_micro 4 is now 3"]),
    ((16, 4), 3, (15, 1, 5), ["--image_batch 16 is now 15", "--image_micro 4 is now 1"])])
def test_batches_are_divided_by_the_ranks(capsys, sizes, ranks, expected, lines):
    cfg = divide_batches(train.Config(image_batch=sizes[0], image_micro=sizes[1], video_batch=ranks), ranks)
    assert (cfg.image_batch, cfg.image_micro, cfg.image_batch // (cfg.image_micro * ranks)) == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said))


@pytest.mark.parametrize("schedule", ["switch", "mixed", "two_stage"])
def test_ranks_share_the_micro_batches_of_one(monkeypatch, schedule):
    """Four ranks have together the micro-batches of one rank, and as many each; every sample comes once."""
    cfg = train.Config(task_schedule=schedule, p=0.5, steps=20, image_batch=16, image_micro=2, video_batch=8)
    for step in range(20):
        alone, shares = train.plan(cfg, step), []
        samples = [key for micro in alone for key in micro.keys]
        assert len(set(samples)) == len(samples)
        for rank in "0123":
            with monkeypatch.context() as patch:
                patch.setenv("WORLD_SIZE", "4")
                patch.setenv("RANK", rank)
                shares.append(train.plan(cfg, step))
        assert {len(share) for share in shares} == {len(alone) // 4}
        assert sorted(sum(shares, []), key=lambda micro: micro.index) == alone


# ---- what stops a run ------------------------------------------------------------------------------------------------
# A held run (hold.py) cannot be over before the signal comes, however late that is.

@pytest.mark.parametrize("place, message", [("loss", "loss nan"), ("gradient", r"loss 0\.\d+, gradient norm nan")])
def test_a_number_that_is_not_finite_stops_the_run(knobs, monkeypatch, place, message):
    true_loss = train.v_loss

    def broken(*args, **kwargs):
        loss = true_loss(*args, **kwargs)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss if place == "gradient" else loss * float("nan")
    monkeypatch.setattr(train, "v_loss", broken)
    with pytest.raises(SystemExit, match=rf"step 0 \(image\): {message}"):
        go(knobs, p=0.0)
    assert not checkpoints("out/toy")


def test_full_disk_keeps_the_last_checkpoint(whole, knobs):
    """No file may grow past 50 kB: the log fits, a checkpoint does not."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); " \
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    go_back(whole, 3, "out/full")
    r = run("-c", limited, *command(knobs, name="full"), cwd=".")
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert "cannot save out/full/step-000006" in r.stderr and "goes on from out/full/step-000003" in r.stderr
    assert [folder.name for folder in checkpoints("out/full")] == ["step-000003"]
    go(knobs, name="full")
    assert same_run("out/full", whole)


def test_sigterm_saves_and_the_run_goes_on(knobs, tmp_path):
    knobs = {**knobs, "steps": 12, "save_every": 100, "workers": 1}
    process = start_and_wait(command(knobs, name="ended"), tmp_path / "out/ended", 4, tmp_path, hold="step 8")
    os.killpg(process.pid, signal.SIGTERM)  # the worker gets it too
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in output, output
    assert 4 <= int(newest_checkpoint("out/ended").name[5:]) < 12
    go(knobs, name="ended")
    go(knobs, name="whole")
    assert same_run("out/ended", "out/whole", 12)


@pytest.mark.slow("six torchrun jobs: two minutes")
@pytest.mark.parametrize("end, said", [("a lost rank", "going on from step"), ("SIGTERM", "stopped by SIGTERM")])
def test_two_ranks_end_together_and_go_on(knobs, tmp_path, end, said):
    """torchrun --max-restarts starts both again when one is killed; on a SIGTERM both stop after the same step."""
    words = [*TORCHRUN, "--max-restarts=1", *command(knobs, steps=40)]
    assert run(*words, "--name=whole", cwd=".").returncode == 0
    process = start_and_wait([*words, "--name=ended"], tmp_path / "out/ended", 10, tmp_path, hold="step 30")
    if end == "SIGTERM":
        process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers
    else:
        os.kill(children(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert said in output, output
    run(*words, "--name=ended", cwd=".")
    assert same_run("out/ended", "out/whole", 40)


@pytest.mark.slow("20 kills of a two-rank run, each with a start of its own: about 6 minutes")
def test_twenty_kills(knobs, tmp_path):
    """SIGKILL of a whole torchrun job at random moments, every fourth during a save: the same final weights."""
    words, random = [*TORCHRUN, *command(knobs, steps=240, save_every=2)], np.random.default_rng(0)
    assert run(*words, "--name=whole", cwd=".").returncode == 0
    killed = tmp_path / "out/killed"
    for kill in range(20):
        done = max([0, *(int(folder.name[5:]) for folder in checkpoints(killed))])
        hold = f"save {done + 2}" if kill % 4 == 0 else f"step {done + 11}"  # 20 times 12 are 240 steps: never the end
        process = start_and_wait([*words, "--name=killed"], killed, done + 1, tmp_path, hold)
        while kill % 4 == 0 and process.poll() is None and not list(killed.glob("step-*.tmp/training_state.pt")):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.6))
        assert process.poll() is None, process.communicate()[0]
        kill_job(process)  # torchrun and both workers
        process.wait()
    assert run(*words, "--name=killed", cwd=".").returncode == 0
    assert same_run(killed, "out/whole", 240)
