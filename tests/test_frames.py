"""Where the target of an image step stands in time (--image_frame), and guidance on the picture (--ref_guidance)."""
from tests.shared import ROOT, randomise_lora

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from common.setup import load_model, open_data
from model import add_lora


def test_the_image_frame_is_drawn_evenly_for_each_micro_batch_of_pictures():
    def drawn(choice, task):
        cfg, micros = train.Config(image_frame=choice), [(task, i // 4, i % 4, []) for i in range(2600)]
        return Counter(train.image_frame(cfg, train.MicroBatch(*micro), 13) for micro in micros)
    counts = drawn("random", "image")
    assert sorted(counts) == list(range(1, 14)) and all(150 < n < 250 for n in counts.values())  # 200 each
    assert set(drawn("random", "video")) == set(drawn("first", "image")) == {1}


def test_a_run_with_image_frames(knobs, tmp_path, monkeypatch):
    """Its steps and held-out batches take the drawn frames."""
    seen, v_loss = [], train.v_loss
    monkeypatch.setattr(train, "v_loss", lambda *args: seen.append(args[-1]) or v_loss(*args))
    cfg = train.Config(**{**knobs, "image_frame": "random", "out": str(tmp_path)})
    train.train(cfg)
    expected = [train.image_frame(cfg, micro, 5) for step in range(6) for micro in train.plan(cfg, step)]
    assert seen == expected and len(set(expected)) > 2
    cfg, pipe, _ = load_model(dataclasses.replace(cfg, image_micro=1), torch.device("cpu"))
    held_out = train.held_out_batches(cfg, pipe, (32, 32), 9, 16)
    frames = {task: {batch["first_frame"] for name, batch in held_out if name == task} for task in ("image", "video")}
    assert 2 < len(frames["image"]) and frames["image"] <= {1, 2, 3, 4, 5} and frames["video"] == {1}
    pipe.transformer.register_to_config(use_rotary_positional_embeddings=False)
    with pytest.raises(ValueError, match="--image_frame random .* this base has no RoPE"):
        open_data(cfg, pipe)


def test_guidance_on_the_picture(tiny, inputs):
    """Both halves of [uncond | cond] move by (S - 1) (cond - cond without the picture). A LoRA's scale counts once."""
    ours, nothing = tiny[0], torch.arange(0)
    *rows, ref = inputs  # two videos, or the halves of one
    add_lora(ours, 4, 2)
    randomise_lora(ours)

    def call(ref=ref, keep=None, rows=rows, **guided):
        return ours(*rows, attention_kwargs={"reference": ref, "scale": 0.5, **guided}, keep=keep).sample
    plain, none = call(), call(keep=nothing)
    assert torch.equal(call(ref_guidance=1.0), plain) and (plain - none).abs().max() > 1e-3
    assert (call(ref_guidance=2.5) - (none + 2.5 * (plain - none))).abs().max() < 1e-6  # two videos, without halves
    for nowhere in (dict(ref=None), dict(keep=nothing)):  # there is nothing to guide
        assert torch.equal(call(**nowhere, ref_guidance=2.5), call(**nowhere))
    plain, none = call(ref[:1]), call(ref[:1], nothing)
    assert (call(ref[:1], ref_guidance=2.5) - (plain + 1.5 * (plain - none)[1:])).abs().max() < 1e-6
    with pytest.raises(ValueError, match="ref_guidance needs a reference for each video, got 1 for a batch of 4"):
        call(ref[:1], rows=[torch.cat([row, row]) for row in rows], ref_guidance=2.0)


def test_sampling_with_guidance_on_the_picture_alone_or_in_a_batch():
    pipe, files = sample.load(ROOT / "toy/lora")[0], [ROOT / f"toy/refs/creature-{i}.png" for i in range(2)]

    def videos(chosen, S):
        latents = sample.encode_references(pipe, [Image.open(files[i]) for i in chosen], 32, 32)
        prompts = [files[i].with_suffix(".txt").read_text() for i in chosen]
        return np.array(sample.generate(pipe, latents, prompts, chosen, 4, 2.0, ref_guidance=S), int)
    together = videos([0, 1], 1.5)
    assert np.abs(together[1:] - videos([1], 1.5)).max() <= 1 and np.abs(together - videos([0, 1], 1.0)).max() > 20
    with pytest.raises(ValueError, match="--ref_guidance is guidance on a picture"):
        sample.Config(prompt="a creature stands", ref_guidance=2.0)
