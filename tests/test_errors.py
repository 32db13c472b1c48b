"""What users of such projects run into, mistakes and broken files: each is one clear line, or simply right."""
from tests.shared import BASE, LORA, REF, ROOT

import json
import shutil
from pathlib import Path

import pytest
import torch

import model
import sample
import train
from common.args import command_line
from common import base, find, log


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's own picture, files that are not what they should be, and no network to ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(base, "is_torchao_available", lambda: False)
    shutil.copy(REF, "cat.png")
    Path("link.png").symlink_to("cat.png")
    Path("broken.png").write_bytes(b"\xff is not a picture")
    model.save_file({"weight": torch.zeros(2)}, "other.safetensors")
    Path("cut.parquet").write_bytes(b"PAR1")
    Path("pairs").mkdir()
    Path("pairs/pairs.jsonl").write_text('{"image_0": "a.png"}')


def trains(**change):
    return lambda knobs: train.train(train.Config(**{**knobs, **change}))


def samples(**change):
    return lambda knobs: sample.main(sample.Config(**{"ref": REF, "lora": LORA, **change}))


def samples_from(**config):
    """The base is the folder "other", the toy's without weights and with this config."""
    def act(knobs):
        shutil.copytree(BASE, "other", ignore=shutil.ignore_patterns("*.safetensors"))
        file = Path("other/transformer/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        samples(base="other")(knobs)
    return act


@pytest.mark.parametrize("act, message", [
    (trains(base="./nowhere"), "no base at ./nowhere"), (trains(int8=True), "--int8 needs torchao: pip install"),
    (samples(base="nobody/nothing"), "no folder nobody/nothing, and the download"),
    (samples_from(num_layers=42, num_attention_heads=96), r"other has \d\.\d billion parameters, and torch .* no GPU"),
    (samples_from(in_channels=32), "image-to-video base .its transformer reads 32 channels and writes 4"),
    (samples_from(patch_size_t=2), "other is a CogVideoX 1.5, .*: use a 1.0 base"),
    (samples_from(_class_name="WanTransformer3DModel"), "other is no CogVideoX .its transformer is a Wan"),
    (trains(images="nowhere"), "no folder of image pairs at nowhere"), (trains(frames=1), "--frames 1: video steps"),
    (trains(images="."), "cannot read cut.parquet: .* Is it a whole parquet file"),
    (trains(images="pairs"), "pairs/pairs.jsonl, line 1 lacks description_0, description_1, image_1"),
    (lambda knobs: train.Config(toy=True), "no toy/base here: run it from the repository's root"),
    (trains(init_lora="other.safetensors"), "other.safetensors holds no LoRA weights"),
    (samples(lora="broken.png"), "cannot read the LoRA broken.png"), (trains(pcgrad=1), "a buffer needs 2"),
    (trains(lora_scope="some"), "--lora_scope must be one of all, reference, got 'some'"),
    (trains(lora_scope="reference", view_drop=0.1), "it needs --view_drop 0"), (trains(step=3), "no knob 'step'"),
    (trains(lora_rank=0), "--lora_rank must be positive"), (trains(seed=2**64), "--seed must be below"),
    (trains(val_every=-1), "--val_every must not be negative"), (samples(ref="", prompt=""), "no prompt"),
    (trains(val_every=1, val_refs="nowhere"), "no folder of pictures"), (samples(prompt="   "), "--prompt is blank"),
    (samples(prompts="nowhere.txt"), "--prompts: no file nowhere.txt"), (samples(out="x.gif"), "must end in .mp4"),
    (samples(ref="cat.png", prompt="x", out="link.mp4"), "link.png would be written over cat.png, which is read"),
    (samples(ref="", prompt="x", ref_guidance=2.0), "--ref_guidance is guidance on a picture"),
    (samples(height=30), "must be multiples of 8"), (samples(steps=1001), "--steps must be at most 1000"),
    (samples(device="banana"), "--device must be cuda or cpu"), (samples(device="cuda"), "torch .* sees 0 GPUs")])
def test_a_mistake_is_one_line(knobs, folder, act, message):
    with pytest.raises((ValueError, OSError, TypeError), match=message) as error:
        act(knobs)
    assert "\n" not in str(error.value) and Path("cat.png").read_bytes() == Path(REF).read_bytes()


@pytest.mark.parametrize("argv, message", [
    (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag"), (["--step", "1"], "unrecognized arguments"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"), (["--p", "nan"], "--p must be in [0, 1]"),
    ([], "error: the GPU's memory is full (CUDA out of memory). Try fewer frames")])
def test_the_command_line_ends_with_two_lines_at_most(capsys, argv, message):
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")
    with pytest.raises(SystemExit) as end:
        command_line(full, train.Config, "", argv, out_of_memory="fewer frames")
    said = f"{capsys.readouterr().err}{end.value}"
    assert message in said and len(said.splitlines()) <= 3  # the usage, the message, the status


def test_presets_are_the_same_from_python_and_on_the_command_line(monkeypatch):
    """A knob that is given wins over them."""
    monkeypatch.chdir(ROOT)
    parsed, asked = [], dict(toy=True, recipe="authors", steps=3)
    command_line(parsed.append, train.Config, "", [f"--{k}={v}" for k, v in asked.items()], presets=train.presets)
    assert vars(parsed[0]) == vars(train.Config(**asked))
    assert vars(parsed[0]) == vars(train.Config()) | train.presets(True, "authors") | asked


def test_the_log_counts_unusable_files_and_names_each_once(tmp_path, capsys):
    run = log.Log(tmp_path, 0, 0, torch.device("cpu"))
    for reasons in (["a is cut", "b is empty"], ["a is cut"]):
        run.skipped(reasons)
    run.close()
    out, err = capsys.readouterr()
    assert err.count("a is cut") == 1 and "skipped (2 so far)" in err and "2 unusable file(s) were skipped" in out


def test_a_lora_comes_from_the_hub_and_a_mistyped_path_is_not_looked_for_there(monkeypatch):
    there = ["me/many/b/two.safetensors", f"me/cat/{model.LORA_FILE}", f"carpedkm/v1/{model.AUTHORS_LORA_FILE}"]

    def download(repository, name):
        if f"{repository}/{name}" not in there:
            raise OSError(f"404: no {name}\nin {repository}")
        return f"{LORA}/{model.LORA_FILE}"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(find, "hf_hub_download", download)
    for name in ("me/cat", "carpedkm/v1", "me/many/b/two.safetensors"):
        assert find.find_lora(name) == model.lora_path(LORA)
    with pytest.raises(FileNotFoundError, match="no LoRA at me/dog, and the download of .* failed: 404: no .*s$"):
        find.find_lora("me/dog")
    for path in ("toy/dog", "nowhere", "./me/cat", "me/cat/step-000400"):
        with pytest.raises(FileNotFoundError, match=f"no LoRA at {path}: expected"):
            find.find_lora(path)
