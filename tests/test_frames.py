"""Beyond the paper: where the target of an image step stands in time (--image_frame), guidance on the picture."""
from tests.shared import randomise_lora

from collections import Counter

import pytest
import torch

import train
from model import add_lora


def test_the_image_frame_is_drawn_evenly_for_each_micro_batch_of_pictures():
    def drawn(choice, task):
        cfg, micros = train.Config(image_frame=choice), [(task, i // 4, i % 4, []) for i in range(2600)]
        return Counter(train.image_frame(cfg, train.MicroBatch(*micro), 13) for micro in micros)
    counts = drawn("random", "image")
    assert sorted(counts) == list(range(1, 14)) and all(150 < n < 250 for n in counts.values())  # 200 each
    assert set(drawn("random", "video")) == set(drawn("first", "image")) == {1}


def test_a_run_takes_the_drawn_frames(knobs, tmp_path, monkeypatch):
    seen, v_loss = [], train.v_loss
    monkeypatch.setattr(train, "v_loss", lambda *args: seen.append(args[-1]) or v_loss(*args))
    cfg = train.Config(**{**knobs, "image_frame": "random", "out": str(tmp_path)})
    train.train(cfg)
    assert seen == [train.image_frame(cfg, micro, 5) for step in range(6) for micro in train.plan(cfg, step)]
    assert len(set(seen)) > 2


def test_guidance_on_the_picture(tiny, inputs):
    """Two videos, each with both halves of [uncond | cond]: all move by (S - 1) (cond - cond without the picture). A
    LoRA's scale counts once."""
    ours, nothing = tiny[0], torch.arange(0)
    *rows, ref = inputs
    add_lora(ours, 4, 2)
    randomise_lora(ours)

    def call(ref=ref, keep=None, rows=[torch.cat([row, row.flip(0)]) for row in rows], **guided):
        return ours(*rows, attention_kwargs={"reference": ref, "scale": 0.5, **guided}, keep=keep).sample
    plain, none = call(), call(keep=nothing)
    pull = (plain - none)[2:].repeat(2, 1, 1, 1, 1)
    assert torch.equal(call(ref_guidance=1.0), plain) and pull.abs().max() > 1e-3
    assert (call(ref_guidance=2.5) - (plain + 1.5 * pull)).abs().max() < 1e-6
    assert (call(rows=rows, ref_guidance=2.5) - call(keep=nothing, rows=rows)  # without halves
            - 2.5 * (call(rows=rows) - call(keep=nothing, rows=rows))).abs().max() < 1e-6
    for nowhere in (dict(ref=None), dict(keep=nothing)):  # there is nothing to guide
        assert torch.equal(call(**nowhere, ref_guidance=2.5), call(**nowhere))
    with pytest.raises(ValueError, match="ref_guidance needs a reference for each video, got 1 for a batch of 4"):
        call(ref[:1], ref_guidance=2.0)
