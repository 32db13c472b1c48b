"""Runs of train.py: what they write, how they go on after any kind of end, on one rank and on two, and what stops them.
"""
from tests.shared import (BASE, PATIENCE, ROOT, TORCHRUN, children, command, go_back, kill_job, log_lines, log_of, run,
                          start_and_wait, weights_of, write_clip)

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import base
import model
import sample
import train
from model import add_lora, load_lora
from common.run import command_line, settings_of


def go(knobs, **more):
    """Train in this process."""
    train.train(train.Config(**{**knobs, **more}))


# ---- a run that goes on ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", name="whole")
def whole_fixture(knobs, tmp_path_factory):
    """The folder of a whole run, out/whole, that other tests go back in."""
    folder = tmp_path_factory.mktemp("whole")
    go(knobs, name="whole", out=str(folder / "out"))
    return folder / "out/whole"


def test_a_run_has_a_line_a_step_and_its_checkpoints(whole):
    assert [line["step"] for line in log_of(whole)] == list(range(6))
    assert [line["task"] for line in log_of(whole)] == [train.sample_task(train.Config(p=0.5), s) for s in range(6)]
    assert sorted(d.name for d in whole.glob("step-*")) == ["step-000003", "step-000006"]


def test_a_killed_run_goes_on_bit_for_bit(whole, knobs, tmp_path, capsys):
    """A save was half done, and a line half written."""
    out = str(tmp_path)
    go_back(whole, 3, tmp_path / "killed")
    (tmp_path / "killed/step-000005.tmp").mkdir()
    (tmp_path / "killed/log.jsonl").open("a").write('{"step": 6, "ta')
    go(knobs, name="killed", out=out)
    assert "going on from step 3" in capsys.readouterr().out
    assert log_of(tmp_path / "killed") == log_of(whole)
    assert torch.equal(weights_of(tmp_path / "killed"), weights_of(whole))
    assert not list((tmp_path / "killed").glob("*.tmp"))
    go(knobs, name="killed", out=out)
    assert "complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="lr was 0.00.* choose another --name"):
        go(knobs, name="killed", out=out, lr=1.0)


def test_two_ranks_go_on_where_one_was(whole, knobs, tmp_path, monkeypatch):
    """The real command line: the losses, weights and measurements of one rank, to rounding."""
    watch = dict(gradcos_every=2, val_every=2)
    go_back(whole, 3, tmp_path / "out/two")
    r = run(*TORCHRUN, *command(knobs, name="two", **watch), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    go_back(whole, 3, tmp_path / "out/one")
    monkeypatch.chdir(tmp_path)
    go(knobs, name="one", **watch)
    one, two = log_of("out/one"), log_of("out/two")
    assert [line["task"] for line in two] == [line["task"] for line in one]
    assert np.allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=1e-5)
    a, b = weights_of("out/two"), weights_of("out/one")
    assert (a - b).norm() / b.norm() < 1e-5
    for file, keys in (("gradcos.jsonl", ("cosine", "norm_img", "norm_vid")), ("val.jsonl", ())):
        one, two = log_of("out/one", file), log_of("out/two", file)
        assert [line["step"] for line in one] == [line["step"] for line in two] == [4, 6]
        for x, y in zip(one, two):
            pairs = [(x[k], y[k]) for k in keys] or [(x[t]["loss"], y[t]["loss"]) for t in ("image", "video")]
            assert np.allclose(*zip(*pairs), rtol=1e-4)


def test_pcgrad_run_resumes_exactly_and_watching_leaves_no_trace(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs").mkdir()
    shutil.copy(ROOT / "toy/refs/creature-0.png", tmp_path / "refs")
    (tmp_path / "refs/creature-0.txt").write_text("a creature walks left over a green field")
    monkeypatch.setattr(sample, "generate", partial(sample.generate, steps=2))
    watch = dict(gradcos_every=2, val_every=3, sample_every=2, val_refs="refs")
    go(knobs, **watch, pcgrad=4, name="whole")
    go(knobs, pcgrad=4, name="unwatched")
    assert log_of("out/whole") == log_of("out/unwatched")  # measuring and sampling leave no trace
    go(knobs, name="coin")
    assert log_of("out/whole") != log_of("out/coin")
    go_back("out/whole", 3, "out/killed")
    go(knobs, **watch, pcgrad=4, name="killed")
    for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"):
        assert log_of("out/killed", file) == log_of("out/whole", file)
    assert [line["step"] for line in log_of("out/whole", "gradcos.jsonl")] == [0, 2, 4, 6]
    assert torch.equal(weights_of("out/killed"), weights_of("out/whole"))
    go(knobs, pcgrad=4, name="unwatched", val_every=3)  # it is complete: only measures
    assert log_of("out/unwatched", "val.jsonl") == log_of("out/whole", "val.jsonl")[-1:]
    assert Image.open("out/whole/samples/creature-0-000006.png").width > 6 * 128


def test_two_stages_have_a_schedule_each_and_resume(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "task_schedule": "two_stage", "p": 0.5, "steps": 8, "warmup": 2, "save_every": 2,
             "keep_checkpoints": 9, "lr": 1.0e-3}
    go(knobs, name="whole")
    whole = log_of("out/whole")
    assert [line["task"] for line in whole] == ["image"] * 4 + ["video"] * 4
    assert [line["lr"] for line in whole] == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)  # warm-up 2, cosine over 2
    go_back("out/whole", 6, "out/killed")
    go(knobs, name="killed")
    assert log_of("out/killed") == whole and torch.equal(weights_of("out/killed", 8), weights_of("out/whole", 8))


def test_reference_scope_and_init_lora_train(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "steps": 3, "view_drop": 0.0}
    go(knobs, lora_scope="reference", image_checkpointing="full", video_checkpointing="attention", name="scoped")
    assert model.lora_header("out/scoped/step-000003")["lora_scope"] == "reference"
    go(knobs, init_lora="out/scoped/step-000003", name="on", steps=1)
    pipe = base.load_pipeline(BASE)
    load_lora(pipe.transformer, "out/on/step-000001")
    assert pipe.transformer.lora_scope == "reference"


# ---- micro-batches and ranks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, ranks, expected, lines", [
    ((256, 8), 8, (256, 8, 4), []),  # the paper's
    ((32, 32), 1, (32, 32, 1), []), ((32, 16), 2, (32, 16, 1), []),
    ((32, 32), 2, (32, 16, 1), ["--image_micro 32 is now 16"]),
    ((33, 4), 1, (33, 3, 11), ["--image_micro 4 is now 3"]),
    ((4, 8), 1, (4, 4, 1), ["--image_micro 8 is now 4"]),
    ((16, 5), 3, (15, 5, 1), ["--image_batch 16 is now 15"]),
    ((16, 4), 3, (15, 1, 5), ["--image_batch 16 is now 15", "--image_micro 4 is now 1"])])
def test_divide_batches(capsys, sizes, ranks, expected, lines):
    batch, micro = sizes
    cfg = train.Config(image_batch=batch, image_micro=micro, video_batch=ranks)
    cfg = train.divide_batches(cfg, ranks)
    assert (cfg.image_batch, cfg.image_micro, cfg.image_batch // (cfg.image_micro * ranks)) == expected
    assert (cfg.video_batch, cfg.video_micro) == (ranks, 1)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines) and all(line in text for line, text in zip(lines, said))


def test_a_batch_of_fewer_samples_than_ranks_is_an_error():
    with pytest.raises(ValueError, match="--video_batch 7 is too small for 8 ranks"):
        train.divide_batches(train.Config(video_batch=7), 8)


def test_a_mixed_step_has_no_video_batch_to_divide():
    """Its coins turn image micro-batches into clips: --video_batch counts for nothing."""
    cfg = train.divide_batches(train.Config(task_schedule="mixed", image_batch=16, video_batch=7, video_micro=3), 8)
    assert (cfg.image_batch, cfg.video_batch, cfg.video_micro) == (16, 7, 3)


def test_ranks_wait_two_hours_for_samples_and_a_week_for_a_benchmark(knobs, tmp_path, monkeypatch):
    def asked(backend, timeout):
        raise SystemExit(timeout)
    for script, cfg, hours in ((train, train.Config(**knobs), 2),
                               (sample, sample.Config(bench="bench.json", out=str(tmp_path / "videos")), 7 * 24)):
        monkeypatch.setattr(script, "join_ranks", asked)
        with pytest.raises(SystemExit) as end:
            (train.train if script is train else sample.main)(cfg)
        assert end.value.code.total_seconds() == hours * 3600


@pytest.mark.parametrize("schedule", ["switch", "mixed", "two_stage"])
def test_ranks_share_the_micro_batches_of_one(monkeypatch, schedule):
    """Four ranks: together the micro-batches that one rank has, each once, and as many each; every sample once."""
    cfg = train.Config(task_schedule=schedule, p=0.5, steps=20, image_batch=16, image_micro=2, video_batch=8)
    for step in range(20):
        alone = train.plan(cfg, step)
        samples = [key for micro in alone for key in micro.keys]
        assert len(set(samples)) == len(samples) and {micro.step for micro in alone} == {step}
        if schedule != "mixed":
            assert len(samples) == {"image": 16, "video": 8}[train.sample_task(cfg, step)]
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "4")
            shares = []
            for rank in range(4):
                patch.setenv("RANK", str(rank))
                shares.append(train.plan(cfg, step))
        assert {len(share) for share in shares} == {len(alone) // 4}
        assert sorted(sum(shares, []), key=lambda micro: micro.index) == alone


# ---- mistakes --------------------------------------------------------------------------------------------------------

def test_train_errors(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    write_clip(tmp_path / "short/a.mp4", [0] * 5, 4)
    for change, message in [(dict(base="./nowhere"), "no base at"), (dict(images="nowhere"), "no folder of image pa"),
                            (dict(videos="empty"), "no clips in empty"), (dict(videos="short"), "too short: 5 frames"),
                            (dict(init_lora="nowhere"), "no LoRA at"), (dict(height=20), "multiples of 8"),
                            (dict(width=20), "multiples of 8"), (dict(lora_scope="some"), "lora_scope"),
                            (dict(lora_scope="reference", view_drop=0.1), "nothing to train"),
                            (dict(lora_scope="reference", view_drop=0.0, token_drop=1.0), "nothing to train"),
                            (dict(lora_scope="reference", view_drop=0.0, drop="reference"), "nothing to train"),
                            (dict(pcgrad=4, task_schedule="mixed"), "no --task_schedule mixed"),
                            (dict(lora_rank=0), "--lora_rank must be positive"), (dict(task_schedule="x"), "--task_sc"),
                            (dict(pcgrad=1), "a buffer needs 2"), (dict(val_every=-1), "--val_every must not be"),
                            (dict(val_every=1, val_images="none"), "no folder of image pairs at none")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            go(knobs, **change)


def test_nan_is_outside_all_bounds():
    names = [field.name for field in dataclasses.fields(train.Config) if field.type is float]
    assert {"lr", "p", "weight_decay", "fps"} <= set(names)
    for name in names:
        with pytest.raises(ValueError, match=f"--{name} must .* got nan"):
            train.Config(**{name: float("nan")})
    with pytest.raises(SystemExit, match="error: --p must be in .0, 1., got nan"):
        command_line(train.train, train.Config, "", ["--p", "nan"])


def test_a_run_of_other_code_is_refused(knobs, tmp_path, monkeypatch):
    """Its config.json has a knob that is no longer there."""
    monkeypatch.chdir(tmp_path)
    Path("out/old/step-000003").mkdir(parents=True)
    config = settings_of(train.Config(**{**knobs, "name": "old"}))
    config["rank"] = config.pop("lora_rank")
    Path("out/old/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        go(knobs, name="old")
    assert str(error.value) == ("out/old was started by another version of this code (it has --rank): choose another "
                                "--name")
    assert json.loads(Path("out/old/config.json").read_text()) == config  # it is as it was


def test_nan_stops_the_run(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    true_loss = train.v_loss
    monkeypatch.setattr(train, "v_loss", lambda *a, **k: true_loss(*a, **k) * float("nan"))
    with pytest.raises(SystemExit, match=r"step 0 \(image\): loss nan"):
        go(knobs, p=0.0)
    assert not list(Path("out/toy").glob("step-*"))


def test_infinite_gradient_stops_the_run(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = torch.nn.utils.clip_grad_norm_

    def overflow(parameters, max_norm):
        parameters[0].grad[0] = float("inf")
        return clip(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(SystemExit, match=r"step 0 \(video\): loss 0\.\d+, gradient norm inf"):
        go(knobs, p=1.0)


def test_a_sigterm_in_the_last_step_leaves_a_whole_run(knobs, tmp_path, monkeypatch, capsys):
    """Nothing is left to stop: its end is measured."""
    monkeypatch.chdir(tmp_path)
    train.SIGTERM.set()
    try:
        go(knobs, steps=1, val_every=1)
    finally:
        train.SIGTERM.clear()
    assert [line["step"] for line in log_of("out/toy", "val.jsonl")] == [0, 1]
    assert "done: out/toy/step-000001" in capsys.readouterr().out


# ---- int8 ------------------------------------------------------------------------------------------------------------

needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="--int8: pip install torchao")


def test_int8_without_torchao_says_so(monkeypatch):
    monkeypatch.setattr(base, "is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match="--int8 needs torchao: pip install"):
        base.load_pipeline(BASE, int8=True)


@needs_torchao
def test_int8_layers_follow_autocast():
    transformer = base.load_pipeline(BASE, int8=True).transformer
    add_lora(transformer, 4, 2.0)
    dtypes = set()

    def note_dtype(module, args, out):
        dtypes.add(out.dtype)
    for block in transformer.transformer_blocks:
        block.attn1.to_q.register_forward_hook(note_dtype)
        block.ff.net[2].register_forward_hook(note_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        transformer(torch.randn(1, 3, 4, 16, 16), torch.randn(1, 16, 64), torch.tensor([500]))
    assert dtypes == {torch.bfloat16}


@needs_torchao
@pytest.mark.slow("a torchrun job")
def test_int8_on_two_ranks(knobs, tmp_path):
    r = run(*TORCHRUN, *command(knobs, name="x", int8=True), cwd=tmp_path)
    assert r.returncode == 0, r.stderr


@needs_torchao
def test_int8_base_trains_and_its_lora_fits_the_full_one(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "steps": 2, "image_checkpointing": "full"}
    go(knobs, name="full")
    go(knobs, name="int8", int8=True)
    full, int8 = log_of("out/full"), log_of("out/int8")
    assert full[0]["loss"] != int8[0]["loss"] and np.isclose(full[0]["loss"], int8[0]["loss"], rtol=0.02)
    assert np.isclose(full[0]["grad_norm"], int8[0]["grad_norm"], rtol=0.1)
    load_lora(base.load_pipeline(BASE).transformer, "out/int8")


# ---- kills and signals -----------------------------------------------------------------------------------------------
# A held run (hold.py) cannot be over before the signal comes, however late that is.

def test_sigterm_saves_and_the_run_goes_on(knobs, tmp_path):
    knobs = {**knobs, "steps": 12, "save_every": 100, "workers": 1}
    process = start_and_wait(command(knobs, name="whole"), tmp_path / "out/whole", 4, tmp_path, hold="step 8")
    os.killpg(process.pid, signal.SIGTERM)  # the worker gets it too
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in output, output
    (checkpoint,) = (tmp_path / "out/whole").glob("step-*")
    assert 4 <= int(checkpoint.name[5:]) < 12
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        go(knobs, name="whole")
        go(knobs, name="again")
    assert log_of(tmp_path / "out/whole") == log_of(tmp_path / "out/again")
    assert torch.equal(weights_of(tmp_path / "out/whole", 12), weights_of(tmp_path / "out/again", 12))


def test_full_disk_keeps_the_last_checkpoint(knobs, tmp_path, monkeypatch):
    """No file may grow past 1 MB: the log fits, a checkpoint of rank 4 fits, one of rank 64 does not."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); " \
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "name": "full", "lora_rank": 64, "steps": 3}
    go(knobs)
    shutil.copytree(tmp_path / "out/full", tmp_path / "out/good")
    shutil.rmtree(tmp_path / "out/full/step-000003")
    r = run("-c", limited, *command(knobs), cwd=tmp_path)
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert "cannot save out/full/step-000003" in r.stderr and "goes on from the start" in r.stderr
    assert not list((tmp_path / "out/full").glob("step-*"))
    go(knobs)
    assert torch.equal(weights_of(tmp_path / "out/full", 3), weights_of(tmp_path / "out/good", 3))


@pytest.mark.slow("20 kills of a two-rank run, each with a start of its own: about 6 minutes")
def test_twenty_kills(knobs, tmp_path):
    """SIGKILL of a whole torchrun job at random moments, five of them during a save: the same final weights."""
    knobs = {**knobs, "steps": 240, "save_every": 2, "keep_checkpoints": 2, "gradcos_every": 10,
             "out": str(tmp_path / "out")}
    assert run(*TORCHRUN, *command(knobs, name="whole"), cwd=tmp_path).returncode == 0
    random, during_save, folder = np.random.default_rng(0), 0, tmp_path / "out/killed"
    for kill in range(20):
        done = max((int(d.name[5:]) for d in folder.glob("step-*") if d.suffix != ".tmp"), default=0)
        in_a_save = kill % 4 == 0
        hold = f"save {done + 2}" if in_a_save else f"step {done + 11}"  # 20 times 12 are 240 steps: never the end
        process = start_and_wait([*TORCHRUN, *command(knobs, name="killed")], folder, done + 1, tmp_path, hold)
        while in_a_save and process.poll() is None and not list(folder.glob("step-*.tmp/training_state.pt")):
            time.sleep(0.01)
        if not in_a_save:
            time.sleep(random.uniform(0, 0.6))
        assert process.poll() is None, process.communicate()[0]
        kill_job(process)  # torchrun and both workers
        process.wait()
        during_save += bool(list(folder.glob("step-*.tmp")))
        print(f"kill {kill}: went on from {done}, log at {len(log_lines(folder))}, in a save: {during_save}")
    assert during_save >= 5, f"only {during_save} kills hit a save"
    assert run(*TORCHRUN, *command(knobs, name="killed"), cwd=tmp_path).returncode == 0
    assert log_of(folder) == log_of(tmp_path / "out/whole")
    assert log_of(folder, "gradcos.jsonl") == log_of(tmp_path / "out/whole", "gradcos.jsonl")
    assert torch.equal(weights_of(folder, 240), weights_of(tmp_path / "out/whole", 240))
    assert len(list(folder.glob("step-*"))) == 2


@pytest.mark.slow("three torchrun jobs: a minute")
def test_a_lost_rank_restarts_by_itself(knobs, tmp_path):
    """torchrun --max-restarts: one of two ranks is killed, torchrun starts both again, the run ends as if untouched."""
    knobs = {**knobs, "steps": 40, "out": str(tmp_path / "out")}
    assert run(*TORCHRUN, *command(knobs, name="whole"), cwd=tmp_path).returncode == 0
    process = start_and_wait([*TORCHRUN, "--max-restarts=1", *command(knobs, name="lost")], tmp_path / "out/lost", 10,
                             tmp_path, hold="step 30")
    os.kill(children(process)[-1], signal.SIGKILL)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "going on from step" in output, output
    assert log_of(tmp_path / "out/lost") == log_of(tmp_path / "out/whole")
    assert torch.equal(weights_of(tmp_path / "out/lost", 40), weights_of(tmp_path / "out/whole", 40))


@pytest.mark.slow("a torchrun job")
def test_sigterm_to_torchrun_saves(knobs, tmp_path):
    knobs = {**knobs, "steps": 400, "save_every": 1000, "out": str(tmp_path / "out")}
    process = start_and_wait([*TORCHRUN, *command(knobs, name="x")], tmp_path / "out/x", 5, tmp_path, hold="step 40")
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers (and itself ends with an error)
    output = process.communicate(timeout=PATIENCE)[0]
    assert "stopped by SIGTERM" in output and len(list((tmp_path / "out/x").glob("step-*"))) == 1, output
