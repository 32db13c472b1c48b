"""What users of such projects run into: each is one clear line, or simply right."""
from tests.shared import BASE, ROOT

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch

from common import base
import model
import sample
import train
from common import watch
from common.run import command_line

LORA = ROOT / "toy/lora"


@pytest.fixture(name="ref")
def ref_fixture(tmp_path, monkeypatch):
    """A user's own picture, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "toy/refs/creature-0.png", "cat.png")
    return Path("cat.png")


# ---- no output is ever an input --------------------------------------------------------------------------------------

def linked(ref):
    Path("link.png").symlink_to(ref)
    return dict(ref=str(ref), out="link.mp4")


@pytest.mark.parametrize("flags", [
    lambda ref: dict(ref=str(ref), out="cat.mp4"), lambda ref: dict(ref=str(ref), out="cat.png", frames=1),
    lambda ref: dict(ref=str(ref), out="./cat.mov", frames=5), lambda ref: dict(ref=str(ref.resolve()), out="cat.mp4"),
    linked], ids=["sheet", "picture", "other spelling", "absolute", "link"])
def test_a_reference_is_never_overwritten(ref, monkeypatch, flags):
    before = ref.read_bytes()
    monkeypatch.setattr(sample, "load", None)  # it is known before anything is loaded
    with pytest.raises(ValueError, match="written over .*cat.png, which is read: choose another --out"):
        sample.main(sample.Config(prompt="x", lora=str(LORA), **flags(ref)))
    assert ref.read_bytes() == before


def test_a_reference_is_not_overwritten_by_one_of_many_prompts(ref, monkeypatch):
    ref.rename("x-1.png")
    Path("prompts.txt").write_text("a creature stands\na creature walks up\n")
    with pytest.raises(ValueError, match="written over x-1.png, which is read"):
        sample.main(sample.Config(ref="x-1.png", prompts="prompts.txt", lora=str(LORA), out="x.mp4"))


def test_a_benchmark_is_not_overwritten_by_its_own_record(ref):
    Path("out").mkdir()
    Path("out/sampling.json").write_text("{}")
    with pytest.raises(ValueError, match="out/sampling.json would be written over out/sampling.json"):
        sample.Config(bench="out/sampling.json", out="out")


def test_an_output_that_cannot_be_written_is_known_before_sampling(ref, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    with pytest.raises(OSError, match="aaa.mp4|aaa.png"):
        sample.main(sample.Config(ref=str(ref), prompt="x", lora=str(LORA), out="a" * 300 + ".mp4"))
    Path("folder.mp4").mkdir()
    with pytest.raises(OSError, match="folder.mp4"):
        sample.main(sample.Config(ref=str(ref), prompt="x", lora=str(LORA), out="folder.mp4"))
    assert sorted(file.name for file in Path().iterdir()) == ["cat.png", "folder.mp4"]


# ---- bases -----------------------------------------------------------------------------------------------------------

def config_only(**changes):
    """A folder with the configs of the toy's base and none of its weights: whoever loads those fails otherwise."""
    shutil.copytree(BASE, "base", ignore=shutil.ignore_patterns("*.safetensors"))
    file = Path("base/transformer/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("changes, message", [
    (dict(in_channels=32, out_channels=16), "base is an image-to-video base .its transformer reads 32 channels and "
                                            "writes 16.: the method needs a text-to-video base such as THUDM/"),
    (dict(patch_size_t=2), "base is a CogVideoX 1.5, .*: use a 1.0 base"),
    (dict(_class_name="WanTransformer3DModel"), "base is no CogVideoX .its transformer is a WanTransformer3DModel")])
def test_another_kind_of_base_is_one_line_before_its_weights(knobs, ref, changes, message):
    config_only(**changes)
    for act in (lambda: train.train(train.Config(**{**knobs, "base": "base"})),
                lambda: sample.main(sample.Config(ref=str(ref), prompt="x", lora=str(LORA), base="base"))):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "SubjectTransformer"])
def test_a_base_may_leave_its_channels_to_diffusers_and_be_saved_by_us(ref, name):
    """diffusers' own 16, in and out."""
    config_only(_class_name=name, in_channels=16)
    file = Path("base/transformer/config.json")
    config = json.loads(file.read_text())
    del config["out_channels"]
    file.write_text(json.dumps(config))
    assert base.read_config("base")["_class_name"] == name


@pytest.mark.parametrize("size, warned", [({}, False), (dict(height=48), True), (dict(frames=5), True),
                                          (dict(frames=1, out="x.png"), False)])
def test_another_size_than_the_bases_is_warned_of(ref, capsys, size, warned):
    flags = {"out": "x.mp4", **size}
    sample.main(sample.Config(ref=str(ref), prompt="a creature stands", lora=str(LORA), steps=1, **flags))
    said = [line for line in capsys.readouterr().err.splitlines() if "was made for 32x32 and 9 frames" in line]
    assert len(said) == warned


def test_training_warns_of_another_size_too(knobs, ref, capsys):
    train.train(train.Config(**{**knobs, "steps": 1, "height": 16}))
    assert "warning: 32x16 and 9 frames, but the base was made for 32x32 and 9" in capsys.readouterr().err


# ---- LoRAs -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch):
    """A hub that holds one LoRA as we write it and one as the authors do."""
    asked = []
    there = {"me/cat": model.LORA_FILE, "carpedkm/v1": model.AUTHORS_LORA_FILE, "me/many": "b/two.safetensors"}

    def download(repository, name):
        asked.append((repository, name))
        if there.get(repository) != name:
            raise OSError(f"404: no {name}\nin {repository}")
        return str(model.lora_path(LORA))
    monkeypatch.setattr(model, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("name", ["me/cat", "carpedkm/v1", "me/many/b/two.safetensors"])
def test_lora_takes_a_hub_id(ref, hub, name):
    assert sample.find_lora(name) == model.lora_path(LORA)


def test_a_lora_that_is_nowhere_is_one_line(ref, hub):
    with pytest.raises(FileNotFoundError, match="no LoRA at me/dog, and the download of .* failed: 404: no") as error:
        model.lora_path("me/dog")
    assert "\n" not in str(error.value)
    hub.clear()
    Path("out").mkdir()
    for path in ("out/dog", "nowhere", "./me/cat", "/me/cat", "me/cat/step-000400", "~/me/cat"):
        with pytest.raises(FileNotFoundError, match=f"no LoRA at {path}: expected"):
            model.lora_path(path)
    assert not hub  # a mistyped path is not looked for on the hub


# ---- text ------------------------------------------------------------------------------------------------------------

def test_captions_beyond_the_text_length_are_said_once_and_counted(capsys, caplog, monkeypatch):
    """diffusers' own warning repeats the captions of each micro-batch."""
    monkeypatch.setattr(model, "TOO_LONG", set())
    pipe = base.load_pipeline(BASE)
    long = [f"a creature walks {way} " + "over a green field " * 9 for way in ("up", "down")]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.encode_prompt(pipe, ["a creature stands", *long])
    said = capsys.readouterr().err
    assert said.count("more than 16 tokens") == 1 and not caplog.records and model.TOO_LONG == set(long)


def test_another_rank_says_nothing_of_long_captions(capsys, monkeypatch):
    monkeypatch.setattr(model, "TOO_LONG", set())
    monkeypatch.setenv("RANK", "1")
    model.encode_prompt(base.load_pipeline(BASE), ["over a green field " * 9])
    assert len(model.TOO_LONG) == 1 and "tokens" not in capsys.readouterr().err


def test_the_end_of_a_run_counts_long_captions(capsys, monkeypatch):
    monkeypatch.setattr(watch, "TOO_LONG", {"one", "two", "three"})
    watch.Log(None, 0, [], torch.device("cpu")).close()
    assert capsys.readouterr().out == "3 caption(s) were longer than the text encoder reads\n"


def test_a_prompt_of_as_many_tokens_as_fit_is_not_too_long(monkeypatch):
    monkeypatch.setattr(model, "TOO_LONG", set())
    pipe = base.load_pipeline(BASE)
    words = "creature " * 20
    fits = next(words[:n] for n in range(len(words), 0, -1) if len(pipe.tokenizer(words[:n]).input_ids) == 16)
    model.encode_prompt(pipe, [fits])
    assert not model.TOO_LONG
    model.encode_prompt(pipe, [fits + " creature"])
    assert model.TOO_LONG


def test_cls_is_known_in_any_spelling():
    assert model.with_reference_token("A <Cls> dog") == "A <cls> dog" == model.with_reference_token("A <CLS> dog")


@pytest.mark.parametrize("flags, message", [
    (dict(prompt="   "), "--prompt is blank"), (dict(prompt="x", prompts="a.txt"), "--prompt and --prompts exclude"),
    (dict(fps=0.0001), "--fps must be between 0.1 and 1000"), (dict(fps=1e9), "--fps must be between")])
def test_flags_of_sample_that_make_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        sample.Config(**flags)


def test_more_denoising_steps_than_timesteps_names_the_flag(ref):
    with pytest.raises(ValueError, match="--steps must be at most 1000, the timesteps of training, got 1001"):
        sample.main(sample.Config(ref=str(ref), prompt="x", lora=str(LORA), steps=1001))


# ---- the command line ------------------------------------------------------------------------------------------------

def ends(error):
    """What command_line says and returns when main raises this."""
    def main(cfg):
        raise error
    with pytest.raises(SystemExit) as end:
        command_line(main, train.Config, "", [])
    return end.value.code


def test_ctrl_c_is_one_line(capsys):
    assert ends(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


def test_a_terminal_that_cannot_show_a_prompt_gets_its_code(monkeypatch, tmp_path):
    with open(tmp_path / "said", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        command_line(lambda cfg: print("a \N{CAT}"), train.Config, "", [])
    assert (tmp_path / "said").read_text() == "a \\U0001f408\n"


@pytest.mark.parametrize("asked, expected", [
    ({}, {}), (dict(toy=True), train.TOY), (dict(recipe="authors"), train.AUTHORS),
    (dict(toy=True, recipe="authors"), {**train.TOY, **train.AUTHORS, **train.TOY_AUTHORS})])
def test_presets_are_the_same_from_python_and_on_the_command_line(asked, expected):
    from_python, parsed = train.Config(**asked), []
    argv = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    command_line(parsed.append, train.Config, "", argv, **train.defaults(argv))
    plain = dataclasses.asdict(train.Config())
    assert parsed == [from_python] and dataclasses.asdict(from_python) == {**plain, **expected, **asked}


def test_a_knob_that_is_given_wins_over_a_preset():
    cfg = train.Config(toy=True, recipe="authors", steps=3, drop="tokens")
    assert (cfg.steps, cfg.drop, cfg.task_schedule, cfg.base) == (3, "tokens", "mixed", "toy/base")
    assert dataclasses.replace(cfg, seed=1) == train.Config(toy=True, recipe="authors", steps=3, drop="tokens", seed=1)
    with pytest.raises(TypeError, match="there is no knob 'step'"):
        train.Config(step=3)


def test_the_toy_is_run_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no toy/base here: run it from the repository's root"):
        train.main(train.Config(toy=True))
    assert not list(tmp_path.iterdir())
