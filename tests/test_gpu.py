"""What only a GPU can show, on one of them: `pytest -m gpu`, eight minutes at most (not verified: none was at hand).

A GPU repeats numbers to its rounding only, so each test states its tolerance."""
import importlib.util

import numpy as np
import pytest
import torch

import sample
import train
from common import media
from tests.shared import LORA, REF, log_of
from toy import world

NO_GPU = "torch sees no GPU here; on a machine with one: pytest -m gpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="--int8: pip install torchao")


def go(name, **knobs):
    """A short run of train.py --toy; its losses. Micro-batches and LoRA dropout as in the real run."""
    usual = dict(steps=6, save_every=3, val_every=0, p=0.5, lora_dropout=0.1, view_drop=0.3, image_micro=8,
                 video_micro=8)
    train.main(train.Config(toy=True, name=name, **usual | knobs))
    return [line["loss"] for line in log_of(f"out/{name}")]


def test_the_toy_trains_to_the_scores_of_a_cpu(newcomer):
    """README's second command. Five seeds on a CPU: 89.6 +- 6.6 move, cells 93.7 +- 1.2, identity 99.6 +- 0.9; three
    standard deviations are allowed."""
    train.main(train.Config(toy=True))
    scores, _ = world.score_lora("out/toy", 96, steps=20)
    assert scores["moves"] > 69 and scores["cells"] > 90 and scores["identity_16"] > 96, scores


ALL_NONE = dict(image_checkpointing="none", video_checkpointing="none")


@pytest.mark.parametrize("lever, plain, tolerance", [
    (dict.fromkeys(ALL_NONE, "attention"), ALL_NONE, 2e-2), (dict.fromkeys(ALL_NONE, "full"), ALL_NONE, 2e-2),
    (dict(compile=True, lora_dropout=0.0), dict(lora_dropout=0.0), 2e-2),
    pytest.param(dict(int8=True), {}, 5e-2, marks=needs_torchao)])
def test_what_saves_time_or_memory_changes_no_loss(newcomer, request, lever, plain, tolerance):
    """Equal losses to 2 %, with 8 bits to 5 %. Compiled dropout has masks from another stream: there it is off."""
    name = request.node.callspec.id
    assert go(name, steps=3, **lever) == pytest.approx(go(f"plain-{name}", steps=3, **plain), rel=tolerance)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_weights_give_the_same_video(tmp_path, offload):
    """Equal to 8 of 255, the mean to 1: the VAE decodes in tiles where they fit."""
    videos = []
    for kind in ("none", offload):
        sample.main(sample.Config(ref=REF, lora=LORA, steps=4, ref_guidance=1.5, offload=kind, out=f"{tmp_path}/a.mp4"))
        videos.append(np.stack([np.asarray(frame, int) for frame in media.load_clip(tmp_path / "a.mp4", 9, 4)]))
    assert np.abs(videos[0] - videos[1]).max() <= 8 and np.abs(videos[0] - videos[1]).mean() <= 1
