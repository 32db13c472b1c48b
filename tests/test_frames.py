"""Where the target of an image step stands in time (--image_frame), and guidance on the picture (--ref_guidance)."""
from tests.shared import ROOT, H, N, T, W, go_back, randomise_lora, weights_of

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from PIL import Image

import sample
import train
from common.base import find_lora, load_pipeline
from common.setup import load_model, open_data
from model import add_lora, load_lora


# ---- where a picture's target stands in time -------------------------------------------------------------------------

@pytest.mark.parametrize("frame", [1, 3])
@pytest.mark.parametrize("keep", [None, [0, 3, 4, 11, 20], []])
def test_a_picture_at_a_latent_frame(tiny, inputs, frame, keep):
    """The stock transformer fed [reference | picture], with rows 0 and `frame` of the tables of frame + 1 frames."""
    ours, stock = tiny
    latents, text, t, ref = inputs
    picture, kept = latents[:, :1], list(range(N)) if keep is None else keep
    rows = torch.cat([torch.arange(N), torch.arange(frame * N, (frame + 1) * N)])
    tables = tuple(table[rows] for table in stock_rope(stock, frame + 1))
    made = ours.rotary_tables(2, H, W, "cpu", skipped=frame - 1)
    assert all(torch.equal(a, b) for a, b in zip(made, tables))
    got = ours(picture, text, t, reference=ref, keep=None if keep is None else torch.tensor(keep, dtype=torch.long),
               first_frame=frame).sample
    if keep is None:
        expected = stock(torch.cat([ref, picture], 1), text, t, image_rotary_emb=tables).sample[:, 1:]
        assert (got - expected).abs().max() < 1e-6
    if keep == []:
        expected = stock(picture, text, t, image_rotary_emb=tuple(table[N:] for table in tables)).sample
        assert (got - expected).abs().max() < 1e-6
    elsewhere = ours(picture, text, t, reference=ref, keep=torch.tensor(kept, dtype=torch.long)).sample
    assert ((got - elsewhere).abs().max() > 1e-5) == (frame > 1)  # frame 1 is the default


def stock_rope(stock, frames):
    """The tables of `frames` latent frames, by diffusers' function."""
    crop = get_resize_crop_region_for_grid((H // 2, W // 2), W // 2, H // 2)
    return get_3d_rotary_pos_embed(stock.config.attention_head_dim, crop, (H // 2, W // 2), frames)


def test_frame_one_changes_no_bit(tiny, inputs):
    ours, _ = tiny
    x, text, t, ref = inputs
    for keep in (None, torch.arange(5)):
        today = ours(x, text, t, reference=ref, keep=keep).sample
        assert torch.equal(ours(x, text, t, reference=ref, keep=keep, first_frame=1).sample, today)
    assert all(torch.equal(a, b) for a, b in zip(ours.rotary_tables(T, H, W, "cpu"), stock_rope(ours, T)))


def test_the_image_frame_is_drawn_evenly_and_alike_on_all_ranks(monkeypatch):
    first, random = train.Config(), train.Config(image_frame="random")

    def frame_of(cfg, step, index, task="image"):
        return train.image_frame(cfg, train.MicroBatch(task, step, index, []), 13)
    assert {frame_of(first, step, 0) for step in range(50)} == {1}  # the default is the paper's
    assert {frame_of(random, step, 0, "video") for step in range(50)} == {1}
    drawn = Counter(frame_of(random, step, index) for step in range(1300) for index in range(2))
    assert sorted(drawn) == list(range(1, 14)) and all(150 < n < 250 for n in drawn.values())  # 200 each
    cfg, frames = dataclasses.replace(random, image_micro=8, p=0.0), {}
    for world_size in (1, 2, 8):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            for micro in train.plan(cfg, 3):
                frame = train.image_frame(cfg, micro, 13)
                assert frames.setdefault(micro.index, frame) == frame
    assert len(frames) == 32 and len(set(frames.values())) > 5  # one for each micro-batch


def test_a_run_with_image_frames(knobs, tmp_path, monkeypatch):
    """Image steps take the drawn frame, video steps 1, held-out batches too; the run resumes bit for bit."""
    monkeypatch.chdir(tmp_path)
    seen, v_loss = [], train.v_loss
    monkeypatch.setattr(train, "v_loss", lambda *args: seen.append(args[-1]) or v_loss(*args))
    cfg = train.Config(**{**knobs, "image_frame": "random", "val_every": 6, "gradcos_every": 6, "val_refs": "",
                          "name": "whole"})
    train.train(cfg)
    expected = [train.image_frame(cfg, micro, 5) for step in range(6) for micro in train.plan(cfg, step)]
    assert seen == expected and len(set(expected)) > 2
    go_back(tmp_path / "out/whole", 3, tmp_path / "out/killed")
    train.train(dataclasses.replace(cfg, name="killed"))
    assert torch.equal(weights_of("out/killed"), weights_of("out/whole"))
    _, pipe, _ = load_model(cfg, torch.device("cpu"))
    for choice, frames in (("first", {1}), ("random", {1, 2, 3, 4, 5})):
        small = dataclasses.replace(cfg, image_frame=choice, image_micro=1)
        batches = list(train.held_out_batches(small, pipe, (32, 32), 9, 16))
        assert {b["first_frame"] for task, b in batches if task == "image"} <= frames
        assert {b["first_frame"] for task, b in batches if task == "video"} == {1}
        if choice == "random":
            assert len({b["first_frame"] for task, b in batches}) > 2
    with pytest.raises(ValueError, match="--image_frame random .* this base has no RoPE"):
        pipe.transformer.register_to_config(use_rotary_positional_embeddings=False)
        open_data(cfg, pipe)


# ---- guidance on the picture -----------------------------------------------------------------------------------------

def test_guidance_on_the_picture(tiny, inputs):
    """Both halves of [uncond | cond] move by (S - 1) (cond - cond without the picture), which is computed once; S = 1
    is off, bit for bit; a scale of the LoRA counts once."""
    ours, _ = tiny
    x, text, t, ref = inputs  # two videos, or the halves of one
    add_lora(ours, 4, 2)
    randomise_lora(ours)
    for scale in (1.0, 0.5):
        def call(S=None, ref=ref, **more):
            kwargs = {"reference": ref, "scale": scale} | ({} if S is None else {"ref_guidance": S})
            return ours(x, text, t, attention_kwargs=kwargs, **more).sample
        nothing = torch.empty(0, dtype=torch.long)
        plain, none = call(), call(keep=nothing)
        assert torch.equal(call(1.0), plain)
        assert (call(2.5) - (none + 2.5 * (plain - none))).abs().max() < 1e-6  # two videos, without halves
        assert torch.equal(call(2.5, ref=None), call(ref=None))  # without a picture there is nothing to guide
        assert torch.equal(call(2.5, keep=nothing), none)
        plain, none = call(ref=ref[:1]), call(ref=ref[:1], keep=nothing)
        assert (call(2.5, ref=ref[:1]) - (plain + 1.5 * (plain - none)[1:])).abs().max() < 1e-6
        assert (plain - none).abs().max() > 1e-3
    with pytest.raises(ValueError, match="ref_guidance needs a reference for each video, got 1 for a batch of 4"):
        ours(x.repeat(2, 1, 1, 1, 1), text.repeat(2, 1, 1), t.repeat(2),
             attention_kwargs={"reference": ref[:1], "ref_guidance": 2.0})


def test_sampling_with_guidance_on_the_picture(tmp_path):
    """The stock pipeline, the LoRA merged or not, alone or in a batch; one scale more in the command line."""
    pictures = [Image.open(ROOT / f"toy/refs/creature-{i}.png") for i in range(2)]
    prompts = [(ROOT / f"toy/refs/creature-{i}.txt").read_text().strip() for i in range(2)]

    def videos(pipe, chosen, S):
        latents = sample.encode_references(pipe, [pictures[i] for i in chosen], 32, 32)
        made = sample.generate(pipe, latents, [prompts[i] for i in chosen], chosen, steps=4, guidance=2.0,
                               ref_guidance=S)
        return np.stack([[np.asarray(frame, int) for frame in video] for video in made])
    merged, _ = sample.load(ROOT / "toy/lora")
    together = videos(merged, [0, 1], 1.5)
    assert np.abs(together[1:] - videos(merged, [1], 1.5)).max() <= 1
    assert np.abs(together - videos(merged, [0, 1], 1.0)).max() > 20
    separate = load_pipeline(str(ROOT / "toy/base"))
    load_lora(separate.transformer, find_lora(ROOT / "toy/lora"))
    separate.transformer.eval()
    assert np.abs(together - videos(separate, [0, 1], 1.5)).max() <= 2
    with pytest.raises(ValueError, match="--ref_guidance is guidance on a picture"):
        sample.Config(prompt="a creature stands", ref_guidance=2.0)

    options = dict(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), steps=2)
    for name, more in (("off", {}), ("one", {"ref_guidance": 1.0}), ("two", {"ref_guidance": 2.0})):
        sample.main(sample.Config(**options, **more, out=str(tmp_path / f"{name}.mp4")))
    off, one, two = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("off", "one", "two"))
    assert off == one and one != two
