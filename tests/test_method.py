"""The paper's recipe and its authors': what drops, where <cls> stands, the coins of a step, one VAE path."""
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

import data
import model
import sample
import train
from common import base, latents, media, setup
from common.run import torch_rng
from tests.shared import BASE, LORA, REF, TORCHRUN, N, T, command, go_back, large_vae, log_of, run, weights_of


# ---- what drops, and where <cls> stands ------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["image", "video"])
def test_a_dropped_reference_is_not_encoded(knobs, task):
    """With an empty `keep` there is one VAE call less, zeros stand for the reference, and x is the same."""
    cfg, pipe, _ = setup.load_model(train.Config(**knobs), torch.device("cpu"))
    batch, results = next(data.batches(setup.open_data(cfg, pipe)[0], [[(task, 0, 0), (task, 0, 1)]])), []
    encode, calls = pipe.vae.encode, []
    pipe.vae.encode = lambda x: calls.append(len(x)) or encode(x)
    for keep in (None, torch.arange(0)):
        x, ref, _ = train.encode(cfg, pipe, batch, task, keep, torch_rng(0, "noise", 0, 0))
        results.append((x, ref, len(calls)))
    (x, ref, kept), (same, zeros, both) = results
    assert torch.equal(x, same) and (kept, both) == (2, 2 + 1)
    assert zeros.shape == ref.shape and not zeros.any() and ref.any()


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
    """(1-p) g_img + p g_vid (B.3), by hand, for a step whose 8 micro-batches hold exactly 8p = 2 clips."""
    mixed = dict(task_schedule="mixed", image_micro=1, video_micro=1, p=0.25, view_drop=0.0, lora_dropout=0.0, steps=1)
    cfg = train.Config(**{**knobs, **mixed, "init_lora": LORA, "out": str(tmp_path)})
    while [micro.task for micro in train.plan(cfg, 0)].count("video") != 2:
        cfg.seed += 1
    got, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: got.extend(
        p.grad.clone() for p in parameters) or clip(parameters, norm))
    train.train(cfg)

    cfg, pipe, parameters = setup.load_model(cfg, torch.device("cpu"))
    datasets, gradients = setup.open_data(cfg, pipe)[0], {"image": [], "video": []}
    for micro in train.plan(cfg, 0):
        keep = train.tokens_to_keep(cfg, micro, 16) if micro.task == "video" else None
        noise_rng, batch = torch_rng(cfg.seed, "noise", 0, micro.index), next(data.batches(datasets, [micro.keys]))
        x, ref, text = train.encode(cfg, pipe, batch, micro.task, keep, noise_rng)
        t, noise = train.sample_noise(x, pipe.scheduler, noise_rng)
        loss = model.v_loss(pipe.transformer, pipe.scheduler, x, text, t, noise, ref, keep)
        gradients[micro.task].append(torch.autograd.grad(loss.mean(), parameters))
    for i, g in enumerate(got):
        expected = 0.75 * sum(g[i] for g in gradients["image"]) / 6 + 0.25 * sum(g[i] for g in gradients["video"]) / 2
        assert torch.allclose(g, expected, atol=1e-6 + 1e-5 * expected.abs().max().item())


def test_the_authors_recipe_resumes_and_two_ranks_follow_it(knobs, tmp_path):
    """Killed after step 3: the same bits; two ranks, on the real command line: the same run."""
    knobs = {k: v for k, v in knobs.items() if train.TOY.get(k) != v and k not in train.AUTHORS}
    cfg = train.Config(**{**knobs, "toy": True, "recipe": "authors", "name": "whole", "out": str(tmp_path / "out")})
    train.train(cfg)
    whole, weights = log_of(tmp_path / "out/whole"), weights_of(tmp_path / "out/whole")
    assert [line["task"] for line in whole] == ["mixed"] * 6
    for name in ("killed", "two"):
        go_back(tmp_path / "out/whole", 3, tmp_path / "out" / name)
    train.train(dataclasses.replace(cfg, name="killed"))
    assert log_of(tmp_path / "out/killed") == whole and torch.equal(weights_of(tmp_path / "out/killed"), weights)
    r = run(*TORCHRUN, *command(knobs, name="two"), "--recipe", "authors", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert (weights_of(tmp_path / "out/two") - weights).norm() / weights.norm() < 1e-5


# ---- one VAE path, sampling, watching --------------------------------------------------------------------------------

def test_a_picture_has_the_same_latents_in_training_cache_and_sampling(tmp_path, monkeypatch):
    """The latents of the whole picture, though the VAE is set to tiles."""
    size, vae = (96, 240), large_vae()
    pixels = torch.rand(2, 12, 30, 3, generator=torch.Generator().manual_seed(1)) * 255
    pictures = {name: Image.fromarray(p).resize((240, 96)) for name, p in zip("ab", pixels.byte().numpy())}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    pair = dict(image_0="a.png", image_1="b.png", description_0="a", description_1="b")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    whole = {name: vae.config.scaling_factor * vae.encode(media.normalise(media.to_pixels([picture])).transpose(0, 1)[
        None]).latent_dist.mode().transpose(1, 2) for name, picture in pictures.items()}
    base.tile_vae(vae)
    pipe = SimpleNamespace(vae=vae, transformer=SimpleNamespace(device=torch.device("cpu")))
    wanted = latents.Latents(images=str(tmp_path), out=str(tmp_path / "out"), crop_jitter=0.0)
    latents.cache_task(wanted, pipe, "image", str(tmp_path), size, 49, 0, 1)
    cached = latents.Cache(tmp_path / "out/image", {"version": latents.VERSION, "tiling": False})
    found = [dict(zip("ab", sample.encode_references(pipe, pictures.values(), *size).split(1)))]
    for cache in (None, cached):
        pairs = data.ImagePairs(tmp_path, size, cache=cache)
        batch = next(data.batches({"image": pairs}, [[("image", 0, 0)]])) | {"text": torch.zeros(1, 1, 1)}
        x, ref, _ = train.encode(train.Config(), pipe, batch, "image", None, None)  # without draws: the mean
        found.append({batch["prompt"][0]: x, "ab".replace(batch["prompt"][0], ""): ref})
    for name in "ab":
        assert all(torch.allclose(pair[name], whole[name], atol=1e-5) for pair in found)


def test_fit_covers_or_pads():
    """A square of one colour with a stripe at the top: cover cuts the stripe, pad shows all between white bars."""
    picture = Image.new("RGB", (40, 40), "red")
    picture.paste("blue", (0, 0, 40, 5))
    cover, pad = (np.asarray(media.fit_reference(picture, 24, 36, fit)).astype(int) for fit in ("cover", "pad"))
    assert cover.shape == pad.shape == (24, 36, 3) and np.abs(cover[2:-2] - (255, 0, 0)).max() < 5
    assert (pad[:, :5] > 250).all() and (pad[:, -5:] > 250).all()
    assert np.abs(pad[8:-2, 8:28] - (255, 0, 0)).max() < 5 and np.abs(pad[0, 8:28] - (0, 0, 255)).max() < 25


def test_at_most_eight_pictures_of_full_size_a_call(monkeypatch):
    calls, vae = [], large_vae()
    monkeypatch.setattr(vae, "encode", lambda x: calls.append(len(x)) or SimpleNamespace(
        latent_dist=SimpleNamespace(parameters=torch.zeros(len(x), 8, 1, x.shape[3] // 8, x.shape[4] // 8))))
    assert model.encode_moments(vae, torch.zeros(20, 1, 3, 480, 720)).shape == (20, 1, 8, 60, 90)
    model.encode_moments(vae, torch.zeros(20, 1, 3, 32, 32))
    assert calls == [8, 8, 4, 20]


def test_lora_scale():
    """0 is the base, 2 the adapters beside the base with B doubled."""
    def video(pipe):
        reference = sample.encode_references(pipe, [media.load_image(REF)], 32, 32)
        return np.array(sample.generate(pipe, reference, ["a creature stands"], [0], steps=2, guidance=2.0), int)
    zero, two = (video(sample.load(LORA, BASE, lora_scale=scale)[0]) for scale in (0, 2))
    pipe = base.load_pipeline(BASE)
    assert np.abs(video(pipe) - zero).max() <= 1 < np.abs(zero - two).max()
    model.load_lora(pipe.transformer.eval(), LORA)
    for name, parameter in pipe.transformer.named_parameters():
        parameter.data *= 2 if "lora_B" in name else 1
    assert np.abs(video(pipe) - two).max() <= 1


def test_look_draws_what_goes_in(knobs, tmp_path):
    """Two micro-batches: the words, the target, and of a clip's reference the tokens that stay; the others are grey."""
    cfg = train.Config(**{**knobs, "look": 2, "seed": 1, "p": 1.0, "out": str(tmp_path)})
    train.look(cfg)
    sheet = np.asarray(Image.open(tmp_path / "toy/look.png"))
    assert sheet.shape == (2 * (128 + 30), 7 * 128 + 6 * 4, 3) and not (tmp_path / "toy/log.jsonl").exists()
    for row, micro in enumerate(train.plan(cfg, 0)):
        tokens = sheet[row * 158 + 30:, :128][:128].reshape(4, 32, 4, 32, 3).swapaxes(1, 2).reshape(16, -1, 3)
        grey = [token for token in range(16) if (tokens[token] == 128).all()]
        assert set(grey) == set(range(16)) - set(train.tokens_to_keep(cfg, micro, 16).tolist())


def test_tensorboard(knobs, tmp_path, monkeypatch):
    told, cfg = [], train.Config(**{**knobs, "steps": 2, "tensorboard": True, "out": str(tmp_path)})
    board = SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar), close=lambda: told.append("closed"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda *_, **__: board))
    train.train(cfg)
    losses = [("log/loss", line["loss"], line["step"]) for line in log_of(tmp_path / "toy")]
    assert losses == [scalar for scalar in told if "log/loss" in scalar] and told[-1] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    with pytest.raises(ValueError, match="--tensorboard needs tensorboard: pip install tensorboard"):
        train.train(dataclasses.replace(cfg, name="other"))


# ---- CogVideoX-2b: positions are sines added to the tokens -----------------------------------------------------------

def test_reference_is_frame_zero_without_rope(tiny, inputs):
    config = {**tiny[1].config, "use_rotary_positional_embeddings": False}
    ours, stock = (kind.from_config(config).eval() for kind in (model.SubjectTransformer, CogVideoXTransformer3DModel))
    stock.load_state_dict(ours.state_dict())
    x, text, t, ref = inputs
    assert torch.equal(ours(x, text, t).sample, stock(x, text, t).sample)
    expected = stock(torch.cat([ref, x], 1), text, t).sample[:, 1:]
    assert (ours(x, text, t, reference=ref, keep=torch.arange(N)).sample - expected).abs().max() < 1e-6
    assert (ours(ref.expand(-1, T, -1, -1, -1), text, t, reference=ref).sample - expected).abs().max() > 1e-4


def test_dtypes_of_sampling(tmp_path):
    """float16 for a base without RoPE, as CogVideoX-2b was trained; else bfloat16; on a CPU float32."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    config = json.loads(Path(BASE, "transformer/config.json").read_text())
    (tmp_path / "transformer/config.json").write_text(json.dumps({**config, "use_rotary_positional_embeddings": False}))
    assert base.sampling_dtype(BASE, cuda) == torch.bfloat16 and base.sampling_dtype(tmp_path, cuda) == torch.float16
    assert base.sampling_dtype(BASE, cpu) == base.sampling_dtype(tmp_path, cpu) == torch.float32


def test_cogvideox_2b_at_its_size():
    """30 layers, no RoPE, on the meta device: the LoRA's modules and parameters."""
    with torch.device("meta"):
        transformer = model.SubjectTransformer(
            num_attention_heads=30, num_layers=30, time_embed_dim=512, text_embed_dim=4096, sample_width=90,
            sample_height=60, use_rotary_positional_embeddings=False)
        assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(1.7e9, rel=0.03)
        assert len(model.add_lora(transformer, 128, 64)) == 2 * (30 * 8 + 2)  # 5B: 2 * 338, 42 blocks
