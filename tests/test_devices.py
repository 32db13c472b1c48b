"""The toy as a newcomer has it: in the dtype of a GPU, which a CPU emulates, with caches, and in the notebook."""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import model
import sample
import train
from common import base, latents
from tests.shared import ROOT, go_back, log_of, run, weights_of
from toy import world

SHORTER = {'"steps": 150': '"steps": 2', '_every": 50': '_every": 2', "test_set(16)": "test_set(3)",
           "folder, 16, steps=20": "folder, 3, steps=1"}


@pytest.fixture
def bfloat16(monkeypatch):
    """base.compute_dtype says bfloat16, as on a GPU, to everyone who has imported it."""
    monkeypatch.setattr(base.compute_dtype, "__code__", (lambda device: torch.bfloat16).__code__)


def test_the_toys_first_command_in_the_dtype_of_a_gpu(newcomer, bfloat16, monkeypatch):
    """train.py --toy from its data to its samples. A run that was killed goes on as if nobody had watched or killed."""
    monkeypatch.setattr("common.watch.generate", partial(sample.generate, steps=1))  # 50 take long in bfloat16
    short = dict(toy=True, steps=4, save_every=2, image_batch=4, image_micro=4, video_batch=2, video_micro=2, p=0.5,
                 lora_rank=4, lora_alpha=2.0, lora_dropout=0.1, view_drop=0.3)
    train.main(train.Config(**short, val_every=2, gradcos_every=2))
    assert [line["step"] for line in log_of("out/toy", "gradcos.jsonl")] == [0, 2, 4]
    assert 0 < log_of("out/toy", "samples.jsonl")[-1]["saturation"]["creature-0"] < 1
    saved = model.load_file(f"out/toy/step-000004/{model.LORA_FILE}")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    go_back("out/toy", 2, "out/killed")
    train.main(train.Config(**short, val_every=0, name="killed"))
    assert log_of("out/killed") == log_of("out/toy")
    assert torch.equal(weights_of("out/killed", 4), weights_of("out/toy", 4))


def test_each_dtype_has_its_own_cache_and_other_latents_none(newcomer, request):
    """Both kinds of machine share one folder of data, on a network disk, say."""
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16":
            request.getfixturevalue("bfloat16")
        cache = world.ensure_data(train.Config(toy=True), train.TOY).cache
        assert cache == f"toy/data/cache/pairs+clips-{dtype}"
        assert f'"dtype": "torch.{dtype}"' in Path(cache, "video/index.json").read_text()
    assert world.ensure_data(train.Config(toy=True, crop_jitter=0.1), train.TOY).cache == ""


def test_cached_prompts_give_the_same_losses_without_the_text_encoder(newcomer, knobs, monkeypatch):
    """It leaves the pipeline, because diffusers would draw the samples' noise where its first module lies."""
    cfg = train.Config(**{**knobs, "cls": "item", "cls_video": False, "val_every": 1, "name": "plain"})
    latents.prepare_cache(latents.Latents(out="cache", prompts=True, device="cpu", **{k: getattr(cfg, k) for k in (
        "base", "images", "videos", "crop_jitter", "frames", "fps", "cls", "cls_video")}))
    encoders, losses = [], []
    monkeypatch.setattr(train.Validation, "measure", lambda self, step: encoders.append(self.pipe.text_encoder))
    for change in ({}, dict(name="cached", cache="cache")):
        train.train(replace(cfg, **change))
        losses.append([line["loss"] for line in log_of(f"out/{change.get('name', 'plain')}")])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert encoders[0] is not None and encoders[-1] is None


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    """Rank 9 of two machines with eight GPUs is the second one's GPU 1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert base.find_device("cuda") == torch.device("cuda", 1) and base.find_device("cuda:7").index == 7
    with pytest.raises(ValueError, match="--device cuda:8: .* sees 8 GPUs"):
        base.find_device("cuda:8")


def test_the_cells_of_the_walkthrough_run(newcomer):
    """With two training steps and three creatures in the place of 150 and 16."""
    cells = json.loads((ROOT / "paper/walkthrough.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    Path("train.py").symlink_to(ROOT / "train.py")  # the first cell looks for the folder of this file
    r = run("-c", code, cwd=newcomer)
    assert r.returncode == 0, r.stderr
    assert "largest difference: 0.0" in r.stdout and "p = 0.2: moves" in r.stdout
