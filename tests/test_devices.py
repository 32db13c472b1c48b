"""What a machine with a GPU does, emulated on a CPU: its dtype, and modules that lie on different devices."""
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from common import base, latents
from tests.shared import go_back, log_of, weights_of
from toy import world


@pytest.fixture
def bfloat16(monkeypatch):
    """base.compute_dtype says bfloat16, as on a GPU, to everyone who has imported it."""
    monkeypatch.setattr(base.compute_dtype, "__code__", (lambda device: torch.bfloat16).__code__)


def test_the_toys_first_command_in_the_dtype_of_a_gpu(newcomer, bfloat16, monkeypatch):
    """train.py --toy from its data to its samples. A run that was killed goes on as if nothing had happened."""
    monkeypatch.setattr("common.watch.generate", partial(sample.generate, steps=1))  # 50 take long in bfloat16
    short = dict(toy=True, steps=4, save_every=2, image_batch=4, image_micro=4, video_batch=2, video_micro=2, p=0.5,
                 lora_rank=4, lora_alpha=2.0, lora_dropout=0.1, view_drop=0.3)
    train.main(train.Config(**short, val_every=4, gradcos_every=4))
    whole = log_of("out/toy")
    assert [line["step"] for line in whole] == [0, 1, 2, 3] and all(line["loss"] > 0 for line in whole)
    assert [line["step"] for line in log_of("out/toy", "gradcos.jsonl")] == [0, 4]
    assert 0 < log_of("out/toy", "samples.jsonl")[0]["saturation"]["creature-0"] < 1
    saved = load_file("out/toy/step-000004/pytorch_lora_weights.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    go_back("out/toy", 2, "out/killed")
    train.main(train.Config(**short, val_every=0, name="killed"))
    assert log_of("out/killed") == whole and torch.equal(weights_of("out/killed", 4), weights_of("out/toy", 4))


def test_each_dtype_has_its_own_cache_and_other_latents_none(newcomer, request):
    """Both kinds of machine share one folder of data, on a network disk, say."""
    assert world.ensure_data(train.Config(toy=True), train.TOY).cache == "toy/data/cache/pairs+clips-float32"
    request.getfixturevalue("bfloat16")
    cache = Path(world.ensure_data(train.Config(toy=True), train.TOY).cache)
    assert str(cache) == "toy/data/cache/pairs+clips-bfloat16"
    assert '"dtype": "torch.bfloat16"' in (cache / "video/index.json").read_text()
    assert world.ensure_data(train.Config(toy=True, crop_jitter=0.1), train.TOY).cache == ""


def test_cached_prompts_give_the_same_losses_without_the_text_encoder(newcomer, knobs, monkeypatch):
    """diffusers takes the pipeline's device from its first module by name, the text encoder: left in RAM it would
    draw the noise of the samples there."""
    cfg = train.Config(**{**knobs, "cls": "item", "cls_video": False, "val_every": 1, "name": "plain"})
    latents.prepare_cache(latents.Latents(out="cache", prompts=True, device="cpu", **{k: getattr(cfg, k) for k in (
        "base", "images", "videos", "crop_jitter", "frames", "fps", "cls", "cls_video")}))
    pipes = []
    monkeypatch.setattr(train.Validation, "measure", lambda validation, step: pipes.append(validation.pipe))
    for change in ({}, dict(name="cached", cache="cache")):
        train.train(replace(cfg, **change))
    plain, cached = ([line["loss"] for line in log_of(f"out/{name}")] for name in ("plain", "cached"))
    assert len(plain) == 6 and cached == pytest.approx(plain, rel=1e-4)
    assert pipes[0].text_encoder is not None and pipes[-1].text_encoder is None
    pipes[-1].transformer.to("meta")  # the meta device stands in for a GPU, and the VAE is elsewhere
    assert pipes[-1]._execution_device.type == "meta"


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    """Rank 9 of two machines with eight GPUs is the second one's GPU 1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert base.find_device("cuda") == torch.device("cuda", 1) and base.find_device("cuda:7").index == 7
    with pytest.raises(ValueError, match="--device cuda:8: .* sees 8 GPUs"):
        base.find_device("cuda:8")
