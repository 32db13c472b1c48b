"""What a machine with a GPU does, emulated on a CPU: its dtype, and modules that lie on different devices."""
from tests.shared import BASE, ROOT, go_back, log_of, weights_of

import gc
import json
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from toy import creatures
from common import latents
from common import base
import sample
import train
from toy import world


@pytest.fixture
def bfloat16(monkeypatch):
    """base.compute_dtype says bfloat16, as on a GPU, to everyone who has imported it."""
    monkeypatch.setattr(base.compute_dtype, "__code__", (lambda device: torch.bfloat16).__code__)


@pytest.fixture
def small_toy(tmp_path, monkeypatch):
    """The repository as a newcomer has it, in a folder of its own, with a toy world of a few pairs and clips."""
    monkeypatch.chdir(tmp_path)
    Path("toy").mkdir()
    Path("toy/base").symlink_to(ROOT / "toy/base")
    Path("toy/refs").mkdir()
    for suffix in (".png", ".txt"):
        shutil.copy(ROOT / f"toy/refs/creature-0{suffix}", "toy/refs")
    monkeypatch.setattr("common.watch.generate", partial(sample.generate, steps=2))  # 50 take long in bfloat16
    for name, write, n in (("pairs", creatures.write_pairs, 4), ("clips", creatures.write_clips, 2),
                           ("pairs_val", creatures.write_pairs, 2), ("clips_val", creatures.write_clips, 1)):
        monkeypatch.setitem(creatures.DATA, name, partial(write, n=n, seed=int("val" in name)))


SHORT = dict(steps=4, save_every=2, image_batch=4, image_micro=4, video_batch=2, video_micro=2, val_every=4, p=0.5,
             gradcos_every=4, lora_rank=4, lora_alpha=2.0, lora_dropout=0.1, view_drop=0.3)


def test_the_toys_first_command_in_the_dtype_of_a_gpu(small_toy, bfloat16):
    """train.py --toy from its data to its samples: latents are cached in the run's own dtype, and a run that was killed
    goes on as if nothing had happened."""
    train.main(train.Config(toy=True, **SHORT))
    cached = Path("toy/data/cache/pairs+clips-bfloat16")
    for task in ("image", "video"):
        assert json.loads((cached / task / "index.json").read_text())["dtype"] == "torch.bfloat16"
    whole = log_of("out/toy")
    assert [line["step"] for line in whole] == [0, 1, 2, 3] and all(line["loss"] > 0 for line in whole)
    assert [line["step"] for line in log_of("out/toy", "gradcos.jsonl")] == [0, 4]
    assert [file.name for file in Path("out/toy/samples").iterdir()] == ["creature-0-000004.png"]
    (sheets,) = log_of("out/toy", "samples.jsonl")
    assert sheets["step"] == 4 and 0 < sheets["saturation"]["creature-0"] < 1
    saved = load_file("out/toy/step-000004/pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    go_back("out/toy", 2, "out/killed")
    train.main(train.Config(toy=True, **{**SHORT, "val_every": 0, "gradcos_every": 0}, name="killed"))
    assert log_of("out/killed") == whole
    assert torch.equal(weights_of("out/killed", 4), weights_of("out/toy", 4))


def test_each_dtype_has_its_own_cache(small_toy, request):
    """Both kinds of machine share one folder of data, on a network disk, say."""
    on_a_cpu = world.ensure_data(train.Config(toy=True), train.TOY).cache
    request.getfixturevalue("bfloat16")
    assert on_a_cpu == "toy/data/cache/pairs+clips-float32"
    assert world.ensure_data(train.Config(toy=True), train.TOY).cache == "toy/data/cache/pairs+clips-bfloat16"


def test_with_cached_prompts_the_text_encoder_is_gone_when_samples_are_made(knobs, small_toy, monkeypatch):
    """diffusers takes the pipeline's device from its first module by name, the text encoder: left in RAM it would
    draw the noise of the samples there. Here RAM is the meta device: whatever is moved to it cannot compute."""
    cfg = train.Config(**{**knobs, "cache": "cache", "steps": 2, "val_every": 2, "val_refs": "toy/refs"})
    latents.prepare_cache(latents.Latents(out="cache", prompts=True, device="cpu", **{
        k: getattr(cfg, k) for k in ("base", "images", "videos", "crop_jitter", "frames", "fps")}))
    load, encoders = base.load_pipeline, []

    def load_and_note(*args, **kwargs):
        pipe = load(*args, **kwargs)
        move = pipe.text_encoder.to
        pipe.text_encoder.to = lambda device: move("meta" if device == "cpu" else device)
        encoders.append(weakref.ref(pipe.text_encoder))
        return pipe
    monkeypatch.setattr("common.setup.load_pipeline", load_and_note)
    write = train.Validation.measure

    def measure(validation, step):
        gc.collect()
        assert encoders[0]() is None, "the text encoder still takes memory"
        pipe = validation.pipe
        assert pipe._execution_device == pipe.transformer.device
        write(validation, step)
    monkeypatch.setattr(train.Validation, "measure", measure)
    train.train(cfg)
    assert Path("out/toy/samples/creature-0-000002.png").is_file()


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    """Rank 9 of two machines with eight GPUs is the second one's GPU 1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert base.find_device("cuda") == torch.device("cuda", 1) and base.find_device("cuda:7").index == 7
    with pytest.raises(ValueError, match="--device cuda:8: .* sees 8 GPUs"):
        base.find_device("cuda:8")


def test_the_pipelines_device_is_the_transformers():
    """Without a text encoder, and with the VAE and the transformer elsewhere: the meta device stands in for a GPU."""
    pipe = base.load_pipeline(BASE)
    pipe.text_encoder = None
    pipe.transformer.to("meta")
    pipe.vae.to("meta")
    assert pipe._execution_device.type == "meta"
