"""What users of such projects run into, mistakes and broken files: each is one clear line, or simply right."""
from tests.shared import BASE, LORA, REF, ROOT, large_vae

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gradcos
import model
import sample
import train
from common.args import command_line
from common import base, find, log
from toy import creatures


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's own picture, files that are not what they should be, and no network to ask."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("cat.png", "x-1.png"):
        shutil.copy(REF, name)
    Path("link.png").symlink_to("cat.png")
    Path("broken.png").write_bytes(b"\xff is not a picture")
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    creatures.write_pairs(Path("cut"), n=4)
    os.truncate("cut/pairs.parquet", 1000)
    shutil.copytree(BASE, "huge", ignore=shutil.ignore_patterns("*.safetensors"))  # a config of 2 billion parameters
    config = json.loads(Path("huge/transformer/config.json").read_text()) | dict(num_attention_heads=96, num_layers=42)
    for name in ("run", "folder.mp4", "out"):
        Path(name).mkdir()
    for name, text in {"prompts.txt": "a creature stands\na creature walks up\n", "out/sampling.json": "{}",
                       "run/config.json": "{}", "run/pairs.jsonl": '{"image_0": "a.png"}',
                       "run/gradcos.jsonl": '{"step": 0, "cos', "huge/pairs.jsonl": '{"image_0": "a.p',
                       "huge/transformer/config.json": json.dumps(config)}.items():
        Path(name).write_text(text)


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
    (trains(lora_scope="reference", view_drop=0.0, compile=True), "--compile needs --lora_scope all"),
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
def test_a_mistake_is_one_line(knobs, folder, monkeypatch, act, message):
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
    run = log.Log(tmp_path, 0, tasks, torch.device("cpu"))
    said = [run.estimate(task, 10.0 if task == "video" else 2.0) for task in tasks]
    assert said[3] == "?" and said[4] == "14:42" and said[-1] == "00:00"  # 49 * (4 * 2 + 10) s = 14 min 42 s
    out = capsys.readouterr().out
    assert out.count("to go") == 1 and "about 09:00 to go: 120 image steps of 2.00 s, 30 video steps of 10.00 s" in out


# ---- no output is ever an input, and what cannot be written is known early -------------------------------------------

@pytest.mark.parametrize("flags, error", [
    (dict(out="cat.mp4"), "cat.png would be written over cat.png, which is read: choose another --out"),
    (dict(out="cat.png", frames=1), "written over cat.png"), (dict(out="link.mp4"), "written over cat.png"),
    (dict(ref="x-1.png", prompts="prompts.txt", prompt="", out="x.mp4"), "x-1.png would be written over x-1.png"),
    (dict(ref="", prompt="", bench="out/sampling.json", out="out"), "would be written over out/sampling.json"),
    (dict(out="a" * 300 + ".mp4"), "File name too long"), (dict(out="folder.mp4"), "Is a directory: 'folder.mp4'")])
def test_an_output_is_refused_before_anything_is_loaded(folder, monkeypatch, flags, error):
    monkeypatch.setattr(sample, "load", None)

    def files():
        return {file: file.read_bytes() for file in Path().glob("**/*") if file.is_file()}
    before = files()
    with pytest.raises((ValueError, OSError), match=error):
        sample.main(sample.Config(**{"ref": "cat.png", "prompt": "x", "lora": LORA, **flags}))
    assert files() == before


# ---- bases and LoRAs -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(in_channels=32, out_channels=16), "huge is an image-to-video base .its transformer reads 32 channels and "
                                            "writes 16.: the method needs a text-to-video base such as THUDM/"),
    (dict(patch_size_t=2), "huge is a CogVideoX 1.5, .*: use a 1.0 base"),
    (dict(_class_name="WanTransformer3DModel"), "huge is no CogVideoX .its transformer is a WanTransformer3DModel"),
    (dict(_class_name="SubjectTransformer"), "")])  # one that we saved
def test_another_kind_of_base_is_one_line_before_its_weights(folder, changes, message):
    file = Path("huge/transformer/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if not message:
        find.read_config("huge")
        return
    with pytest.raises(ValueError, match=message):
        sample.main(sample.Config(ref="cat.png", prompt="x", lora=LORA, base="huge"))


@pytest.mark.parametrize("size, warned", [({}, 0), (dict(height=48), 1), (dict(frames=5), 1),
                                          (dict(frames=1, out="x.png"), 0)])
def test_another_size_than_the_bases_is_warned_of(folder, capsys, size, warned):
    sample.main(sample.Config(**{"ref": "cat.png", "prompt": "x", "lora": LORA, "steps": 1, "out": "x.mp4", **size}))
    assert capsys.readouterr().err.count("but the base was made for 32x32 and 9 frames") == warned


def test_a_lora_comes_from_the_hub_and_a_mistyped_path_is_not_looked_for_there(folder, monkeypatch):
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
