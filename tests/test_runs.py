"""Runs of train.py: how they go on, on one rank and on two, and what stops them. Every way out of a run ends it, with
its error and exit status, and leaves a folder that the next run understands."""
from tests.shared import BROKEN, TORCHRUN, command, go_back, log_of, run, small_disk, start, weights_of

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import train
from common.run import checkpoints, newest_checkpoint, save_checkpoint, start_log
from common.setup import divide_batches
from common.log import numbers_in


def go(knobs, **more):
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
    """The folder of a whole run that other tests go back in."""
    go(knobs, name="whole", out=str(out := tmp_path_factory.mktemp("out")))
    return out / "whole"


def test_a_killed_run_goes_on_bit_for_bit(whole, knobs, tmp_path, capsys):
    """A save was half done, and a line half written."""
    killed = tmp_path / "out/killed"
    go_back(whole, 3, killed)
    (killed / "step-000005.tmp").mkdir()
    (killed / "log.jsonl").open("a").write('{"step": 6, "ta')
    go(knobs, name="killed")
    assert [line["step"] for line in log_of(whole)] == list(range(6)) and same_run(killed, whole)
    assert sorted(folder.name for folder in killed.glob("step-*")) == ["step-000003", "step-000006"]
    go(knobs, name="killed")
    assert "going on from step 3" in (said := capsys.readouterr().out) and "is complete" in said
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
    assert torch.allclose(weights_of("out/two"), weights_of("out/one"), rtol=1e-4, atol=1e-5)
    for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"):
        one, two = log_of("out/one", file), log_of("out/two", file)
        assert np.allclose(*([n for _, n in numbers_in(lines, "")] for lines in (one, two)), rtol=1e-4, atol=1e-5)


def test_pcgrad_and_two_stages_resume_exactly_and_watching_leaves_no_trace(knobs):
    """Each stage has a schedule of its own: two steps of warm-up, then a cosine over two."""
    knobs = {**knobs, "task_schedule": "two_stage", "steps": 8, "warmup": 2, "lr": 1.0e-3, "pcgrad": 4}
    watch = dict(gradcos_every=2, val_every=3)
    go(knobs, name="whole", **watch)
    lines = log_of("out/whole")
    assert [line["task"] for line in lines] == ["image"] * 4 + ["video"] * 4
    assert [line["lr"] for line in lines] == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)
    go_back("out/whole", 6, "out/killed")
    go(knobs, name="killed", **watch)
    assert all(same_run("out/killed", "out/whole", 8, file) for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"))
    go(knobs, name="unwatched")
    go(knobs, name="unwatched", val_every=3)  # it is complete: only its end is measured
    assert same_run("out/whole", "out/unwatched", 8)
    assert log_of("out/unwatched", "val.jsonl") == log_of("out/whole", "val.jsonl")[-1:]


# ---- micro-batches and ranks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch, micro, ranks, expected, said", [
    (256, 8, 8, (256, 8), ""),  # the paper's
    (33, 4, 1, (33, 3), "--image_micro 4 is now 3"), (16, 4, 3, (15, 1), "--image_batch 16 is now 15")])
def test_batches_are_divided_by_the_ranks(capsys, batch, micro, ranks, expected, said):
    cfg = divide_batches(train.Config(image_batch=batch, image_micro=micro, video_batch=ranks), ranks)
    assert (cfg.image_batch, cfg.image_micro) == expected and said in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["switch", "mixed"])
def test_ranks_share_the_micro_batches_of_one(monkeypatch, schedule):
    """Four ranks have together the micro-batches of one rank, and as many each; every sample comes once."""
    cfg = train.Config(task_schedule=schedule, p=0.5, image_batch=16, image_micro=2, video_batch=8)

    def plan(step, rank, ranks):
        monkeypatch.setattr(train, "rank_and_world_size", lambda: (rank, ranks))
        return train.plan(cfg, step)
    for step in range(20):
        alone, shares = plan(step, 0, 1), [plan(step, rank, 4) for rank in range(4)]
        samples = [key for micro in alone for key in micro.keys]
        assert len(set(samples)) == len(samples)
        assert {len(share) for share in shares} == {len(alone) // 4}
        assert sorted(sum(shares, []), key=lambda micro: micro.index) == alone


# ---- what stops a run ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what, status, said", [
    ("os.kill(os.getpid(), signal.SIGINT)", 130, "train.py: interrupted"),
    ("raise RuntimeError('it broke')", 1, "it broke")])
def test_a_run_with_reading_workers_ends(knobs, tmp_path, what, status, said):
    """Ctrl-C or an error in step 2, while two processes read ahead."""
    r = run(*command(knobs, BROKEN, workers=2, steps=60), cwd=tmp_path, AT="step 2", DO=what)
    assert r.returncode == status and said in r.stderr and ("Traceback" in r.stderr) == (status == 1), r.stderr


DAMAGED = "damaged/step-000006 is damaged .*: delete it, and the same command goes on from step-000003"


@pytest.mark.parametrize("file, message", [
    ("config.json", "damaged/config.json is damaged"), ("step-000006/training_state.pt", DAMAGED),
    (f"step-000006/{model.LORA_FILE}", DAMAGED)])
def test_a_file_that_is_cut_is_named_in_one_line(whole, knobs, file, message):
    go_back(whole, 6, "out/damaged")
    os.truncate(f"out/damaged/{file}", 100)
    with pytest.raises(ValueError, match=message) as error:
        go(knobs, name="damaged")
    assert "\n" not in str(error.value)


def test_only_whole_step_folders_are_checkpoints(tmp_path):
    """A copy that somebody made, a half-written save and seven digits: the newest is the largest number."""
    for name in ("step-000004", "step-best", "step-000006.tmp", "step-999999", "step-1000000"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000004", "step-999999", "step-1000000"]
    start_log(tmp_path, {}, 4)  # a run that goes on removes what was half saved
    assert not list(tmp_path.glob("*.tmp"))
    save_checkpoint(tmp_path, 1000008, Path.mkdir, {})
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-999999", "step-1000000", "step-1000008"]


def test_two_runs_on_one_name_are_kept_apart(knobs):
    """The lock that a running process holds is taken here by another one."""
    hold = "import fcntl, time; f = open('.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=1); time.sleep(99)"
    Path("out/toy").mkdir(parents=True)
    other = start(["-c", hold], cwd="out/toy")
    other.stdout.readline()
    with pytest.raises(ValueError, match="another process trains in .*toy: .* choose another --name"):
        go(knobs, steps=1)
    other.kill()
    other.wait()
    go(knobs, steps=1)
    assert len(log_of("out/toy")) == 1


@pytest.mark.parametrize("module, name, factor", [(train, "v_loss", "nan"), (torch.nn.utils, "clip_grad_norm_", "inf")])
def test_a_number_that_is_not_finite_stops_the_run(knobs, monkeypatch, module, name, factor):
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: true(*args, **kwargs) * float(factor))
    with pytest.raises(SystemExit, match=r"step 0 \(image\): loss (nan|0\.\d+, gradient norm inf)"):
        go(knobs, p=0.0)
    assert not checkpoints("out/toy")


def test_a_full_disk_keeps_the_last_checkpoint(whole, knobs):
    """The log fits on it, a checkpoint does not."""
    go_back(whole, 3, "out/full")
    said = "cannot save out/full/step-000006: .* it goes on from out/full/step-000003"
    with small_disk(50_000), pytest.raises(SystemExit, match=said):
        go(knobs, name="full")
    assert [folder.name for folder in checkpoints("out/full")] == ["step-000003"]
    go(knobs, name="full")
    assert same_run("out/full", whole)


def test_sigterm_saves_and_the_run_goes_on(knobs):
    """The process that reads data gets it too. After the loop it ends a process at once, as it always does."""
    knobs, before = {**knobs, "steps": 12, "save_every": 100, "workers": 1}, signal.getsignal(signal.SIGTERM)
    r = run(*command(knobs, BROKEN, name="ended"), cwd=".", AT="step 8", DO="os.killpg(0, signal.SIGTERM)")
    assert r.returncode == 0 and "stopped by SIGTERM" in r.stdout, r.stderr
    assert 8 <= int(newest_checkpoint("out/ended").name[5:]) < 12
    for name in ("ended", "whole"):
        train.main(train.Config(**{**knobs, "name": name}))
    assert same_run("out/ended", "out/whole", 12) and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow("20 ends of a two-rank run, each with a start of its own: about 6 minutes")
def test_twenty_ends(knobs):
    """A whole torchrun job gets a SIGKILL in a save or at a random moment, or a SIGTERM; at last one rank is lost, and
    --max-restarts starts both again: the same final weights."""
    words = [*TORCHRUN, "--max-restarts=1", *command(knobs, BROKEN, steps=240, save_every=2)]
    random = np.random.default_rng(0)
    assert run(*words, "--name=whole", cwd=".", AT="never").returncode == 0
    for number in range(20):
        done = max([0, *(int(folder.name[5:]) for folder in checkpoints("out/ended"))])
        place, end = f"save {done + 2 - done % 2}", "kill_job(os.getppid())"
        if number % 4:  # 1: torchrun hands a SIGTERM to both ranks, which stop after the same step
            what = "os.kill(os.getppid(), signal.SIGTERM)" if number % 4 == 1 else end
            place = f"step {done + random.integers(1, 8)}"
            end = f"threading.Timer({random.uniform(0, 0.1)}, lambda: {what}).start()"
        r = run(*words, "--name=ended", cwd=".", AT=place, DO=f"rank or {end}")
        assert "stopped by SIGTERM" in r.stdout if number % 4 == 1 else r.returncode == -9, r.stderr
    place = f"step {int(newest_checkpoint('out/ended').name[5:]) + 3}"
    r = run(*words, "--name=ended", cwd=".", AT=place, DO="if rank == 1: os.kill(os.getpid(), signal.SIGKILL)")
    assert r.returncode == 0 and r.stdout.count("going on from step") == 2, r.stderr
    assert same_run("out/ended", "out/whole", 240)
