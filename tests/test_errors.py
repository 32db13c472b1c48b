"""Mistakes and broken files: each is one line that names what is wrong."""
from tests.shared import BASE, ROOT, large_vae

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gradcos
import sample
import train
from common.args import command_line
from common import base
from common.log import Log
from toy import creatures

REF, LORA = str(ROOT / "toy/refs/creature-0.png"), str(ROOT / "toy/lora")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A folder with files that are not what they should be, and no network to ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("broken.png").write_bytes(b"\xff is not a picture")
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    creatures.write_pairs(Path("cut"), n=4)
    os.truncate("cut/pairs.parquet", 1000)
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    Path("run/pairs.jsonl").write_text('{"image_0": "a.png"}')
    Path("run/gradcos.jsonl").write_text('{"step": 0, "cos')
    shutil.copytree(BASE, "huge", ignore=shutil.ignore_patterns("*.safetensors"))  # a config of 2 billion parameters
    file = Path("huge/transformer/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(num_attention_heads=96, num_layers=42)))
    Path("huge/pairs.jsonl").write_text('{"image_0": "a.p')


def trains(**change):
    return lambda knobs: train.train(train.Config(**{**knobs, **change}))


def samples(**change):
    return lambda knobs: sample.main(sample.Config(**{"ref": REF, "lora": LORA, **change}))


@pytest.mark.parametrize("act, message", [
    (trains(base="./nowhere"), "no base at ./nowhere"), (trains(int8=True), "--int8 needs torchao: pip install"),
    (samples(base="nobody/nothing"), "no folder nobody/nothing, and the download"),
    (trains(base="huge"), r"huge has \d\.\d billion parameters, and torch .* sees no GPU .*--device cpu runs it all"),
    (trains(images="nowhere"), "no folder of image pairs at nowhere"), (trains(frames=1), "--frames 1: video steps"),
    (trains(images="cut"), "cannot read cut/pairs.parquet: .* Is it a whole parquet file"),
    (trains(images="huge"), "huge/pairs.jsonl, line 1 is not the JSON of a pair"),
    (trains(images="run"), "run/pairs.jsonl, line 1 lacks description_0, description_1, image_1"),
    (lambda knobs: train.Config(toy=True), "no toy/base here: run it from the repository's root"),
    (trains(init_lora="other.safetensors"), "other.safetensors holds no LoRA weights"),
    (samples(lora="broken.png"), "cannot read the LoRA broken.png"), (trains(pcgrad=1), "a buffer needs 2"),
    (trains(lora_scope="some"), "--lora_scope must be one of all, reference, got 'some'"),
    (trains(lora_scope="reference", view_drop=0.1), "it needs --view_drop 0"),
    (trains(pcgrad=4, task_schedule="mixed"), "no --task_schedule mixed"), (trains(p=1.5), "--p must be in .0, 1."),
    (trains(lora_rank=0), "--lora_rank must be positive"), (trains(val_every=-1), "--val_every must not be negative"),
    (trains(val_every=1, val_refs="nowhere"), "no folder of pictures"), (trains(seed=2**64), "--seed must be below"),
    (samples(ref="broken.png"), "cannot read the picture .*broken.png"), (samples(ref="", prompt=""), "no prompt"),
    (samples(prompts="nowhere.txt"), "--prompts: no file nowhere.txt"), (samples(prompt="   "), "--prompt is blank"),
    (samples(prompts="broken.png"), "not a UTF-8 text"), (samples(prompt="x", prompts="a.txt"), "exclude each other"),
    (samples(out="x.gif"), "--out must end in .mp4 or .mov"), (samples(height=30), "must be multiples of 8"),
    (samples(steps=1001), "--steps must be at most 1000, the timesteps of training, got 1001"),
    (samples(fps=1e9), "--fps must be between"), (samples(guidance=float("inf")), "--guidance must be a number"),
    (samples(device="banana"), "--device must be cuda or cpu"), (samples(device="cuda"), "torch .* sees 0 GPUs"),
    (samples(offload="model", device="cpu"), "--offload model keeps weights off a GPU"),
    (lambda knobs: gradcos.main(gradcos.Config(runs=["run"])), "run/gradcos.jsonl holds no whole measurement"),
    (lambda knobs: gradcos.main(gradcos.Config(runs=["cut"])), "no gradcos.jsonl in cut")])
def test_a_mistake_is_one_line(knobs, broken, monkeypatch, act, message):
    monkeypatch.setattr(base, "is_torchao_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        act(knobs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv, message", [
    (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"), (["--p", "nan"], "--p must be in [0, 1]"),
    ([], "error: the GPU's memory is full (CUDA out of memory). Try fewer frames")])
def test_the_command_line_ends_with_two_lines_at_most(capsys, argv, message):
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")
    with pytest.raises(SystemExit) as end:
        command_line(full, train.Config, "", argv, out_of_memory="fewer frames")
    said = f"{capsys.readouterr().err}{end.value}"
    assert message in said and len(said.splitlines()) <= 3  # the usage, the message, the status


def test_a_video_that_does_not_fit_is_decoded_in_tiles():
    """A VAE of the real structure whose decoder takes no more than a tile at once: as diffusers decodes in tiles."""
    vae = large_vae()
    tile = vae.tile_latent_min_height, vae.tile_latent_min_width
    z = torch.randn(1, 4, 1, 2 * tile[0], 2 * tile[1], generator=torch.Generator().manual_seed(0))

    def limit(decoder, args):
        if args[0].shape[3] > tile[0] or args[0].shape[4] > tile[1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    vae.decoder.register_forward_pre_hook(limit)
    sample.decode_what_fits(vae)
    got = vae.decode(z).sample
    vae.enable_tiling()
    assert torch.equal(got, vae.decode(z).sample) and got.shape == (1, 3, 1, 16 * tile[0], 16 * tile[1])


def test_the_time_to_go_counts_both_tasks(tmp_path, capsys):
    """Steps of 2 s and of 10 s: what is left is their sum, said once, when 20 of each are done."""
    tasks = (["image"] * 4 + ["video"]) * 50
    log = Log(tmp_path, 0, tasks, torch.device("cpu"))
    said = [log.estimate(task, 10.0 if task == "video" else 2.0) for task in tasks]
    assert said[3] == "?" and said[4] == "14:42" and said[-1] == "00:00"  # 49 * (4 * 2 + 10) s = 14 min 42 s
    out = capsys.readouterr().out
    assert out.count("to go") == 1 and "about 09:00 to go: 120 image steps of 2.00 s, 30 video steps of 10.00 s" in out
