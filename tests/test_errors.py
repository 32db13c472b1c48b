"""Mistakes and broken files: each is one line that names what is wrong."""
from tests.shared import BASE, ROOT, large_vae, run

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toy import creatures
from common import latents
from common import base
import data
import gradcos
import model
import sample
import train
from paper import prepare
from common.watch import Log

REF = str(ROOT / "toy/refs/creature-0.png")
LORA = str(ROOT / "toy/lora")


def cut(path, share=2):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:len(whole) // share])


def truncated_parquet(knobs):
    creatures.write_pairs("pairs", n=4)
    cut("pairs/pairs.parquet")
    data.ImagePairs("pairs", (32, 32))


def truncated_source(knobs):
    truncated = Path("source")
    creatures.write_pairs(truncated, n=4)
    cut(truncated / "pairs.parquet")
    prepare.prepare_subjects(prepare.Subjects200K(out="out", source="source"))


def bad_line(line):
    def act(knobs):
        good = {"image_0": "a.png", "image_1": "b.png", "description_0": "a", "description_1": "b"}
        Path("pairs").mkdir()
        Path("pairs/pairs.jsonl").write_text(json.dumps(good) + "\n\n" + line + "\n")
        data.ImagePairs("pairs", (32, 32))
    return act


def prompts_that_are_no_text(knobs):
    shutil.copy(REF, "prompts.txt")
    sample.main(sample.Config(ref=REF, prompts="prompts.txt", lora=LORA))


def caption_that_is_no_text(knobs):
    creatures.write_clips("clips", n=1)
    shutil.copy(REF, "clips/0000.txt")
    data.Clips("clips", (32, 32), 9, 4)[0, 0]


def gradcos_of(text):
    def act(knobs):
        Path("out/x").mkdir(parents=True)
        Path("out/x/config.json").write_text("{}")
        Path("out/x/gradcos.jsonl").write_text(text)
        gradcos.main(gradcos.Config(runs=["out/x"]))
    return act


def lora_without_lora(knobs):
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    sample.main(sample.Config(ref=REF, prompt="x", lora="other.safetensors", base="nobody/nothing"))


def init_without_lora(knobs):
    save_file({"weight": torch.zeros(2)}, "other.safetensors")
    train.train(train.Config(**{**knobs, "init_lora": "other.safetensors", "base": "nobody/nothing"}))


def huge_base(act):
    """Only the config of a base of CogVideoX-5B's size: whoever asked for its weights would fail otherwise."""
    def prepared(knobs):
        shutil.copytree(BASE, "huge")
        config = json.loads(Path("huge/transformer/config.json").read_text())
        config |= dict(num_attention_heads=48, attention_head_dim=64, num_layers=42, text_embed_dim=4096)
        Path("huge/transformer/config.json").write_text(json.dumps(config))
        for weights in Path("huge").glob("**/*.safetensors"):
            weights.unlink()
        act(knobs)
    return prepared


train_huge = huge_base(lambda knobs: train.train(train.Config(**{**knobs, "base": "huge"})))
sample_huge = huge_base(lambda knobs: sample.main(sample.Config(ref=REF, prompt="x", lora=LORA, base="huge")))
cache_huge = huge_base(lambda knobs: latents.prepare_cache(latents.Latents(base="huge", images=knobs["images"])))


@pytest.mark.parametrize("act, message", [
    (truncated_parquet, "cannot read pairs/pairs.parquet: .* Is it a whole parquet file"),
    (truncated_source, "cannot read source/pairs.parquet: .* Is it a whole parquet file"),
    (bad_line('{"image_0": "a.p'), "pairs/pairs.jsonl, line 3 is not the JSON of a pair"),
    (bad_line("7"), "pairs/pairs.jsonl, line 3 is not the JSON of a pair"),
    (bad_line('{"image_0": "a.png"}'), "pairs.jsonl, line 3 lacks description_0, description_1, image_1"),
    (prompts_that_are_no_text, "prompts.txt is not a UTF-8 text file"),
    (caption_that_is_no_text, "0000.txt is not a UTF-8 text file"),
    (gradcos_of(""), "out/x/gradcos.jsonl holds no whole measurement"),
    (gradcos_of('{"step": 0, "cos'), "out/x/gradcos.jsonl holds no whole measurement"),
    (lambda knobs: train.Config(seed=2**64), "--seed must be below 2.63, got 1844"),
    (lambda knobs: sample.Config(seed=2**63), "--seed must be below 2.63, got 922"),
    (lambda knobs: sample.Config(guidance=float("nan")), "--guidance must be a number, got nan"),
    (lambda knobs: sample.Config(guidance=float("inf")), "--guidance must be a number, got inf"),
    (lambda knobs: train.train(train.Config(**{**knobs, "frames": 1})), "--frames 1: video steps need"),
    (lora_without_lora, "other.safetensors holds no LoRA weights"),
    (init_without_lora, "other.safetensors holds no LoRA weights"),
    (train_huge, r"huge has \d\.\d billion parameters, and torch .* sees no GPU .*--device cpu runs it all the same"),
    (sample_huge, "huge has .* billion parameters"), (cache_huge, "huge has .* billion parameters")])
def test_a_mistake_is_one_line(knobs, tmp_path, monkeypatch, act, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        act(knobs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cuda, devices, why", [
    (None, "0", "this torch is built for CPUs"), ("12.8", "", "CUDA_VISIBLE_DEVICES is ''"),
    ("12.8", None, "does nvidia-smi show the driver")])
def test_why_torch_sees_no_gpu(tmp_path, monkeypatch, cuda, devices, why):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with pytest.raises(ValueError, match=why):
        huge_base(lambda knobs: base.refuse_cpu("huge", ""))({})


def test_device_cpu_runs_a_large_base_all_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    huge_base(lambda knobs: base.refuse_cpu("huge", "cpu"))({})


def test_prepare_is_run_as_a_module(tmp_path):
    r = run("paper/prepare.py", "pexels")
    assert r.returncode == 1 and r.stderr == "run it from the repository's root as a module: python -m paper.prepare\n"


@pytest.mark.parametrize("script, place, advice", [
    ("train.py", "v_loss", "Try a smaller --image_micro"), ("sample.py", "load_lora", "Try --offload model")])
def test_a_full_gpu_is_one_line(knobs, tmp_path, monkeypatch, script, place, advice):
    """The script as it is, with an error raised where the work is."""
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")
    flags = {"train.py": [f"--{k}={v}" for k, v in knobs.items() if v != ""] + ["--cache="],
             "sample.py": ["--ref", REF, "--lora", LORA]}[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, place, full)
    monkeypatch.setattr("sys.argv", [script, *flags])
    with pytest.raises(SystemExit, match=f"error: the GPU's memory is full .CUDA out of memory.. {advice}"):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_a_video_that_does_not_fit_is_decoded_in_tiles():
    """A VAE of the real structure whose decoder takes no more than a tile at once: as diffusers decodes in tiles."""
    vae = large_vae()
    tile = vae.tile_latent_min_height, vae.tile_latent_min_width
    z = torch.randn(1, 4, 1, 2 * tile[0], 2 * tile[1], generator=torch.Generator().manual_seed(0))

    def limit(decoder, args):
        if args[0].shape[3] > tile[0] or args[0].shape[4] > tile[1]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    vae.decoder.register_forward_pre_hook(limit)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        vae.decode(z)
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


def test_an_unusable_file_is_said_once_and_counted(capsys):
    log = Log(None, 0, [], torch.device("cpu"))
    for reasons in (["a.mp4 is cut", "b.mp4 is cut"], ["b.mp4 is cut", "b.mp4 is cut"]):
        log.skipped(reasons)
    log.close()
    said = capsys.readouterr()
    assert said.err.count("a.mp4 is cut") == said.err.count("b.mp4 is cut") == 1
    assert "2 unusable file(s) were skipped" in said.out


def test_the_cache_needs_no_transformer_and_no_text_encoder(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BASE, "base")
    for part in ("transformer", "text_encoder"):
        for weights in Path("base", part).glob("*.safetensors"):
            weights.unlink()
    cfg = dict(base="base", images=knobs["images"], frames=9, fps=4.0, crop_jitter=0.0)
    latents.prepare_cache(latents.Latents(out="cache", **cfg))
    assert json.loads(Path("cache/image/index.json").read_text())["cached"] == 40
    with pytest.raises(OSError):
        latents.prepare_cache(latents.Latents(out="prompts", prompts=True, **cfg))


def test_a_cut_log_of_gradients_still_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    line = {"cosine": 0.1, "norm_img": 1.0, "norm_vid": 2.0, "groups": {"norms": [0.1, 1, 2], "block 0": [0.1, 1, 2]}}
    Path("x").mkdir()
    Path("x/config.json").write_text("{}")
    Path("x/gradcos.jsonl").write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in (0, 2, 4))[:-20])
    gradcos.main(gradcos.Config(runs=["x"]))
    assert Path("gradcos.png").is_file()
