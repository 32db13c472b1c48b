"""What users of such projects run into: each is one clear line, or simply right."""
from tests.shared import BASE, ROOT

import dataclasses
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

LORA = str(ROOT / "toy/lora")


@pytest.fixture(name="ref", autouse=True)
def ref_fixture(tmp_path, monkeypatch):
    """A user's own picture, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "toy/refs/creature-0.png", "cat.png")
    Path("link.png").symlink_to("cat.png")
    Path("prompts.txt").write_text("a creature stands\na creature walks up\n")
    shutil.copy("cat.png", "x-1.png")
    Path("folder.mp4").mkdir()
    Path("out").mkdir()
    Path("out/sampling.json").write_text("{}")


# ---- no output is ever an input, and what cannot be written is known early -------------------------------------------

@pytest.mark.parametrize("flags, error", [
    (dict(out="cat.mp4"), "cat.png would be written over cat.png, which is read: choose another --out"),
    (dict(out="cat.png", frames=1), "written over cat.png"), (dict(out="link.mp4"), "written over cat.png"),
    (dict(ref="x-1.png", prompts="prompts.txt", prompt="", out="x.mp4"), "x-1.png would be written over x-1.png"),
    (dict(ref="", prompt="", bench="out/sampling.json", out="out"), "would be written over out/sampling.json"),
    (dict(out="a" * 300 + ".mp4"), "File name too long"), (dict(out="folder.mp4"), "Is a directory: 'folder.mp4'")])
def test_an_output_is_refused_before_anything_is_loaded(monkeypatch, flags, error):
    monkeypatch.setattr(sample, "load", None)

    def files():
        return {file: file.read_bytes() for file in Path().glob("**/*") if file.is_file()}
    before = files()
    with pytest.raises((ValueError, OSError), match=error):
        sample.main(sample.Config(**{"ref": "cat.png", "prompt": "x", "lora": LORA, **flags}))
    assert files() == before


# ---- bases and LoRAs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(in_channels=32, out_channels=16), "base is an image-to-video base .its transformer reads 32 channels and "
                                            "writes 16.: the method needs a text-to-video base such as THUDM/"),
    (dict(patch_size_t=2), "base is a CogVideoX 1.5, .*: use a 1.0 base"),
    (dict(_class_name="WanTransformer3DModel"), "base is no CogVideoX .its transformer is a WanTransformer3DModel"),
    (dict(_class_name="SubjectTransformer"), "")])  # one that we saved
def test_another_kind_of_base_is_one_line_before_its_weights(changes, message):
    shutil.copytree(BASE, "base", ignore=shutil.ignore_patterns("*.safetensors"))
    file = Path("base/transformer/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if not message:
        return find.read_config("base")
    with pytest.raises(ValueError, match=message):
        sample.main(sample.Config(ref="cat.png", prompt="x", lora=LORA, base="base"))


@pytest.mark.parametrize("size, warned", [({}, 0), (dict(height=48), 1), (dict(frames=5), 1),
                                          (dict(frames=1, out="x.png"), 0)])
def test_another_size_than_the_bases_is_warned_of(capsys, size, warned):
    sample.main(sample.Config(**{"ref": "cat.png", "prompt": "x", "lora": LORA, "steps": 1, "out": "x.mp4", **size}))
    assert capsys.readouterr().err.count("but the base was made for 32x32 and 9 frames") == warned


def test_a_lora_comes_from_the_hub_and_a_mistyped_path_is_not_looked_for_there(monkeypatch):
    """The hub holds LoRAs as we write them and as the authors do."""
    asked, there = [], ["me/many/b/two.safetensors", f"me/cat/{model.LORA_FILE}",
                        f"carpedkm/v1/{model.AUTHORS_LORA_FILE}"]

    def download(repository, name):
        asked.append(repository)
        if f"{repository}/{name}" not in there:
            raise OSError(f"404: no {name}\nin {repository}")
        return f"{LORA}/{model.LORA_FILE}"
    monkeypatch.setattr(find, "hf_hub_download", download)
    for name in ("me/cat", "carpedkm/v1", "me/many/b/two.safetensors"):
        assert find.find_lora(name) == model.lora_path(LORA)
    with pytest.raises(FileNotFoundError, match="no LoRA at me/dog, and the download of .* failed: 404: no .*s$"):
        find.find_lora("me/dog")
    asked.clear()
    for path in ("out/dog", "nowhere", "./me/cat", "/me/cat", "me/cat/step-000400", "~/me/cat"):
        with pytest.raises(FileNotFoundError, match=f"no LoRA at {path}: expected"):
            find.find_lora(path)
    assert not asked


def test_long_captions_are_said_once_and_counted(capsys, caplog, monkeypatch):
    """diffusers' own warning repeats the captions of each micro-batch."""
    too_long = set()
    monkeypatch.setattr(model, "TOO_LONG", too_long)
    monkeypatch.setattr(log, "TOO_LONG", too_long)
    pipe = base.load_pipeline(BASE)
    fits = {len(pipe.tokenizer("creature " * n).input_ids): "creature " * n for n in range(20)}[16]
    long = [f"{fits} walks {way}" for way in ("up", "down")]
    for _ in range(3):
        model.encode_prompt(pipe, [fits, *long])
    assert capsys.readouterr().err.count("more than 16 tokens") == 1 and not caplog.records and too_long == set(long)
    log.Log(None, 0, [], torch.device("cpu")).close()
    assert capsys.readouterr().out == "2 caption(s) were longer than the text encoder reads\n"


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, expected", [
    ({}, {}), (dict(toy=True), train.TOY), (dict(recipe="authors"), train.AUTHORS),
    (dict(toy=True, recipe="authors", steps=3), {**train.TOY, **train.AUTHORS, **train.TOY_AUTHORS})])
def test_presets_are_the_same_from_python_and_on_the_command_line(monkeypatch, asked, expected):
    """A knob that is given wins over them."""
    monkeypatch.chdir(ROOT)
    parsed = []
    argv = [f"--{name}={value}" for name, value in asked.items()]
    command_line(parsed.append, train.Config, "", argv, presets=train.presets)
    assert parsed == [train.Config(**asked)]
    assert dataclasses.asdict(parsed[0]) == {**dataclasses.asdict(train.Config()), **expected, **asked}
    assert dataclasses.replace(parsed[0], seed=1) == train.Config(**asked, seed=1)
    with pytest.raises(TypeError, match="there is no knob 'step'"):
        train.Config(**asked, step=3)
