"""The method: what drops, where <cls> stands, the coins of a step, one VAE path, and what makes a step cheaper."""
import dataclasses
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from PIL import Image

import data
import model
import sample
import train
from common import base, latents, media, setup
from common.run import torch_rng
from tests.shared import BASE, LORA, TORCHRUN, N, T, command, log_of, randomise_lora, run


# ---- what drops, and where <cls> stands ------------------------------------------------------------------------------

def test_a_dropped_reference_is_not_encoded(knobs):
    """With an empty `keep` there is one VAE call less, zeros stand for the reference, and x is the same."""
    cfg, pipe, _ = setup.load_model(train.Config(**knobs), torch.device("cpu"))
    batch, calls = next(data.batches(setup.open_data(cfg, pipe)[0], [[("image", 0, 0), ("image", 0, 1)]])), []
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    (x, ref, _), (same, zeros, _) = (train.encode(cfg, pipe, batch, "image", keep, torch_rng(0, "noise", 0, 0))
                                     for keep in (None, torch.arange(0)))
    assert torch.equal(x, same) and zeros.shape == ref.shape and not zeros.any() and ref.any()
    assert len(calls) == 2 + 1


@pytest.mark.parametrize("caption, item, front, item_mode", [
    ("An armchair", "armchair", "<cls> An armchair", "An <cls> armchair"),
    ("Two Tea Cups on it", "tea cup", "<cls> Two Tea Cups on it", "Two <cls> Tea Cups on it"),
    ("Two boxes and a box", "box", "<cls> Two boxes and a box", "Two <cls> boxes and a box"),
    ("A category", "cat", "<cls> A category", "<cls> A category"), ("It rains", "", "<cls> It rains", "<cls> It rains"),
    ("A <CLS> dog runs", "dog", "A <cls> dog runs", "A <cls> dog runs")])  # as in the paper
def test_where_cls_stands(caption, item, front, item_mode):
    assert model.with_reference_token(caption, "front", item) == front
    assert model.with_reference_token(caption, "item", item) == item_mode
    assert model.with_reference_token(caption, "off", item) == caption.replace("<CLS>", "<cls>")


@pytest.mark.parametrize("flags, task, words", [
    ({}, "video", "<cls> a cat runs"), (dict(cls="item"), "image", "a <cls> cat runs"),
    (dict(cls_video=False), "image", "<cls> a cat runs"), (dict(cls_video=False), "video", "a cat runs")])
def test_the_text_encoder_sees_cls_where_the_flags_say(flags, task, words):
    pipe, moments = base.load_pipeline(BASE), torch.zeros(1, 1, 8, 16, 16)
    batch = {"prompt": ["a cat runs"], "item": ["cat"], "target_moments": moments, "reference_moments": moments}
    text = train.encode(train.Config(**flags), pipe, batch, task, None, None)[2]
    assert torch.equal(text, model.encode_prompt(pipe, [words]))


# ---- the coins of a step ---------------------------------------------------------------------------------------------

def test_mixed_tosses_a_coin_for_each_micro_batch():
    cfg = setup.divide_batches(train.Config(task_schedule="mixed", image_micro=8), 8)
    tasks = [[micro.task for micro in train.plan(cfg, step)] for step in range(200)]
    assert len(tasks[0]) == 256 // 8 == 32  # the authors' 32 ranks
    assert np.mean(np.array(tasks) == "video") == pytest.approx(0.2, abs=0.02) and train.sample_task(cfg, 7) == "mixed"
    assert len(set(map(tuple, tasks))) == 200  # no two steps, and no two micro-batches, share their coins


def test_a_mixed_step_is_the_weighted_mean_of_both_tasks(knobs, tmp_path, monkeypatch):
    """(1-p) g_img + p g_vid (B.3), when 2 of 8 micro-batches hold clips and each task's gradient is known: 1 and 10."""
    mixed = dict(task_schedule="mixed", image_micro=1, video_micro=3, p=0.25, steps=1, out=str(tmp_path))
    cfg = train.Config(**{**knobs, **mixed})
    while [micro.task for micro in train.plan(cfg, 0)].count("video") != 2:
        cfg.seed += 1

    def loss(transformer, scheduler, x, *_):
        weight = next(p for p in transformer.parameters() if p.requires_grad).flatten()[0]
        return (10 if x.shape[1] > 1 else 1) * weight.expand(len(x))
    monkeypatch.setattr(train, "v_loss", loss)
    train.train(cfg)
    assert log_of(tmp_path / "toy")[0]["grad_norm"] == pytest.approx(0.75 * 1 + 0.25 * 10)


# ---- one VAE path, sampling, watching --------------------------------------------------------------------------------

def test_a_picture_has_the_same_latents_in_training_cache_and_sampling(tmp_path):
    """The latents of the whole picture, though the VAE is set to tiles."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2,
                                 latent_channels=4, sample_height=96, sample_width=240).requires_grad_(False)
    noise, size = np.random.default_rng(1).integers(0, 256, (2, 12, 30, 3), np.uint8), (96, 240)
    pictures = [Image.fromarray(values).resize((240, 96)) for values in noise]
    for name, picture in zip("ab", pictures):
        picture.save(tmp_path / f"{name}.png")
    pair = dict(image_0="a.png", image_1="b.png", description_0="a", description_1="b")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    pixels = media.normalise(torch.stack([media.to_pixels([picture]) for picture in pictures]))
    whole = vae.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
    base.tile_vae(vae)
    pipe = SimpleNamespace(vae=vae, transformer=SimpleNamespace(device=torch.device("cpu")))
    wanted = latents.Latents(images=str(tmp_path), out=str(tmp_path / "out"), crop_jitter=0.0)
    latents.cache_task(wanted, pipe, "image", str(tmp_path), size, 49, 0, 1)
    found = [sample.encode_references(pipe, pictures, *size)]
    for cache in (None, latents.Cache(tmp_path / "out/image", {"version": latents.VERSION, "tiling": False})):
        pairs = data.ImagePairs(tmp_path, size, cache=cache, in_order=True)
        batch = next(data.batches({"image": pairs}, [[("image", 0, 0)]])) | {"text": torch.zeros(1, 1, 1)}
        x, ref, _ = train.encode(train.Config(), pipe, batch, "image", None, None)  # without draws: the mean
        found.append(torch.cat([x, ref]))
    assert all(torch.allclose(latents, whole, atol=1e-5) for latents in found)


def test_fit_pads_with_white():
    """A wide frame shows a square picture whole, between white bars."""
    padded = np.asarray(media.fit_reference(Image.new("RGB", (40, 40), "red"), 24, 36, "pad")).astype(int)
    assert padded.shape == (24, 36, 3) and (padded[:, :5] > 250).all() and (padded[:, -5:] > 250).all()
    assert np.abs(padded[:, 8:28] - (255, 0, 0)).max() < 5


def test_at_most_eight_pictures_of_full_size_a_call():
    calls, posterior = [], SimpleNamespace(parameters=torch.zeros(1, 8, 1, 60, 90))
    vae = SimpleNamespace(device="cpu", dtype=torch.float32, use_tiling=False, use_slicing=False,
                          encode=lambda x: calls.append(len(x)) or SimpleNamespace(latent_dist=posterior))
    for height, width in ((480, 720), (32, 32)):
        model.encode_moments(vae, torch.zeros(20, 1, 3, height, width))
    assert calls == [8, 8, 4, 20]


def test_lora_scale(tmp_path):
    """0 is the base, 2 is twice what was trained. It is merged, unless it acts on some tokens only."""
    stock = base.load_pipeline(BASE).transformer
    merged = [sample.load(LORA, BASE, lora_scale=scale)[0].transformer.state_dict() for scale in (0, 1, 2)]
    for name, weight in stock.state_dict().items():
        zero, one, two = (weights[name] - weight for weights in merged)
        assert zero.abs().max() < 1e-6 and torch.allclose(two, 2 * one, atol=1e-5)
        assert one.any() or "to_q.weight" not in name  # the LoRA is in it
    model.add_lora(stock, 4, 2, scope="reference")
    model.save_lora(stock, tmp_path, base=BASE)
    kept = sample.load(str(tmp_path), lora_scale=2)[0].transformer
    assert {m.scaling["default"] for m in kept.modules() if isinstance(m, model.LoraLayer)} == {2 * 0.5}


def test_look_draws_what_goes_in(knobs, tmp_path):
    """The words, the target, and of a clip's reference the half that stays: the other 8 tokens are grey."""
    train.main(train.Config(**{**knobs, "look": 2, "p": 1.0, "images": "none", "out": str(tmp_path)}))
    sheet = np.asarray(Image.open(tmp_path / "toy/look.png"))
    assert sheet.shape == (2 * (128 + 30), 7 * 128 + 6 * 4, 3) and not (tmp_path / "toy/log.jsonl").exists()
    for row in (30, 158 + 30):
        assert (sheet[row:row + 128, :128] == 128).all(2).sum() == 8 * 32**2


def test_tensorboard(knobs, tmp_path, monkeypatch):
    told, cfg = [], train.Config(**{**knobs, "steps": 2, "tensorboard": True, "out": str(tmp_path)})
    board = SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar), close=lambda: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda *_, **__: board))
    train.train(cfg)
    losses = [("log/loss", line["loss"], line["step"]) for line in log_of(tmp_path / "toy")]
    assert losses == [scalar for scalar in told if "log/loss" in scalar]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with pytest.raises(ValueError, match="--tensorboard needs tensorboard: pip install tensorboard"):
        train.train(dataclasses.replace(cfg, name="other"))


def test_reference_is_frame_zero_without_rope(tiny, inputs):
    """As in CogVideoX-2b, where positions are sines that are added to the tokens."""
    config = {**tiny[1].config, "use_rotary_positional_embeddings": False}
    ours, stock = (kind.from_config(config).eval() for kind in (model.SubjectTransformer, CogVideoXTransformer3DModel))
    stock.load_state_dict(ours.state_dict())
    x, text, t, ref = inputs
    assert torch.equal(ours(x, text, t).sample, stock(x, text, t).sample)
    expected = stock(torch.cat([ref, x], 1), text, t).sample[:, 1:]
    assert (ours(x, text, t, reference=ref, keep=torch.arange(N)).sample - expected).abs().max() < 1e-6


# ---- what makes a step cheaper changes neither losses nor gradients: it is counted, never timed ----------------------

def test_compiled_blocks_have_the_same_gradients_and_one_graph_per_shape(tiny, inputs, monkeypatch):
    ours, (x, text, t, ref) = tiny[0].train(), inputs
    parameters, graphs = model.add_lora(ours, 4, 2), torch._dynamo.utils.counters["stats"]
    randomise_lora(ours)

    def loss_and_gradients(checkpointing, frames, keep):
        ours.checkpointing = checkpointing
        loss = ours(x[:, :frames], text, t, reference=ref, keep=keep).sample.square().mean()
        return torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, parameters))])
    micros = [("none", 1, None), ("attention", 1, torch.arange(0)), ("none", T, None), ("full", T, torch.arange(5))]
    expected = [loss_and_gradients(*micro) for micro in micros]
    # All of the compiler but its last part, which takes minutes on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    setup.compile_blocks(ours)
    for micro, numbers in zip(micros, expected):
        before = graphs["unique_graphs"]
        assert torch.allclose(loss_and_gradients(*micro), numbers, rtol=1e-4, atol=1e-5 * numbers.abs().max().item())
        assert 1 <= graphs["unique_graphs"] - before <= 2  # not one per block


COUNT = """
import os, train
from torch.nn.parallel import DistributedDataParallel as DDP
no_sync, alone = DDP.no_sync, []
DDP.no_sync = lambda self: alone.append(1) or no_sync(self)
train.command_line(train.main, train.Config, '', presets=train.presets)
open('alone-' + os.environ['RANK'], 'w').write(str(len(alone)))
"""


def test_ranks_sum_gradients_once_a_step(knobs, tmp_path):
    """Two ranks, five steps. Pairs take one micro-batch on each rank; a clip at a time makes two, the first alone."""
    (tmp_path / "count.py").write_text(COUNT)
    r = run(*TORCHRUN, *command(knobs, "count.py", name="x", steps=5, video_micro=1), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    tasks = [line["task"] for line in log_of(tmp_path / "out/x")]
    assert set(tasks) == {"image", "video"}
    assert [(tmp_path / f"alone-{rank}").read_text() for rank in (0, 1)] == [str(tasks.count("video"))] * 2
