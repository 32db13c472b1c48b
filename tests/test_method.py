"""The paper's recipe and its authors': what drops, where <cls> stands, the coins of a step, one VAE path for pictures.
"""
from tests.shared import (BASE, ROOT, TORCHRUN, C, H, L, N, T, W, command, go_back, large_vae, log_of, run,
                          weights_of)

import dataclasses
import io
import json
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from PIL import Image

from toy import creatures
from common import media
from common import latents
from common import base
import data
import model
import sample
import train
from common.run import torch_rng


# ---- what drops ------------------------------------------------------------------------------------------------------

def test_drop_reference_keeps_all_or_nothing():
    """The share of empty `keep` is --token_drop; 1 is text-to-video in both readings, 0 keeps all in both."""
    cfg = train.Config(drop="reference")
    keeps = [train.token_drop(cfg, step, micro, 1350) for step in range(200) for micro in range(2)]
    assert all(keep is None or len(keep) == 0 for keep in keeps)
    assert abs(np.mean([keep is not None for keep in keeps]) - 0.5) < 0.1
    for drop in ("tokens", "reference"):
        assert len(train.token_drop(train.Config(drop=drop, token_drop=1.0), 0, 0, 9)) == 0
        assert train.token_drop(train.Config(drop=drop, token_drop=0.0), 0, 0, 9) is None
    with pytest.raises(ValueError, match="nothing to train .*0 with --drop reference"):
        train.Config(drop="reference", lora_scope="reference", view_drop=0.0)


# ---- <cls> -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("caption, item, front, item_mode", [
    ("An armchair in the living room", "armchair", "<cls> An armchair in the living room",
     "An <cls> armchair in the living room"),
    ("Two Tea Cups on a table", "tea cup", "<cls> Two Tea Cups on a table", "Two <cls> Tea Cups on a table"),
    ("Three boxes and a box", "box", "<cls> Three boxes and a box", "Three <cls> boxes and a box"),
    ("A category of its own", "cat", "<cls> A category of its own", "<cls> A category of its own"),  # no such word
    ("It stands in the rain", "", "<cls> It stands in the rain", "<cls> It stands in the rain"),      # no name given
    ("A <cls> dog runs", "dog", "A <cls> dog runs", "A <cls> dog runs")])
def test_where_cls_stands(caption, item, front, item_mode):
    assert model.with_reference_token(caption, "front", item) == front
    assert model.with_reference_token(caption, "item", item) == item_mode
    assert model.with_reference_token(caption, "off", item) == caption
    assert model.with_reference_token("A <CLS> dog runs", "front") == "A <cls> dog runs"  # as the paper writes it


def prompts_of_a_run(monkeypatch, knobs, **more):
    """The prompts that a run gives to the text encoder, by task."""
    seen, encode = {"creature stands": set(), "creature walks": set()}, train.encode_prompt

    def note(pipe, prompts):
        for prompt in prompts:
            seen[" ".join(prompt.replace("<cls> ", "").split()[1:3])].add(prompt.replace("an ", "a ").split(" over")[0])
        return encode(pipe, prompts)
    monkeypatch.setattr(train, "encode_prompt", note)
    train.train(train.Config(**{**knobs, "steps": 4, **more}))
    return seen


def test_the_text_encoder_sees_cls_where_the_flags_say(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = prompts_of_a_run(monkeypatch, knobs, cls="item", name="item")
    assert seen["creature stands"] - {"<cls> a creature stands"} == {"a <cls> creature stands"}  # pairs name the item
    assert all(prompt.startswith("<cls> a creature walks") for prompt in seen["creature walks"])
    seen = prompts_of_a_run(monkeypatch, knobs, cls_video=False, name="pictures")
    assert seen["creature stands"] >= {"<cls> a creature stands"}  # some clips stand, too
    assert all(prompt.startswith("a creature walks") for prompt in seen["creature walks"]) and seen["creature walks"]
    header = model.lora_header("out/item/step-000004")
    assert header["cls"] == sample.cls_of(header) == "item"
    assert [sample.cls_of(h) for h in ({}, {"cls": "True"}, {"cls": "False"}, {"cls": "off"})] == \
        ["front", "front", "off", "off"]


# ---- the coins of a step ---------------------------------------------------------------------------------------------

def test_mixed_tosses_a_coin_for_each_micro_batch():
    cfg = train.Config(task_schedule="mixed", image_micro=8)
    cfg = train.divide_batches(cfg, 8)
    assert len(train.plan(cfg, 0)) == 256 // 8 == 32  # the authors' 32 ranks
    assert train.sample_task(cfg, 7) == "mixed"
    tasks = [[train.sample_task(cfg, step, micro) for micro in range(32)] for step in range(200)]
    assert abs(np.mean([task == "video" for step in tasks for task in step]) - 0.2) < 0.02
    assert len(set(map(tuple, tasks))) == 200  # no two steps, and no two micro-batches, share their coins
    with pytest.raises(ValueError, match="--pcgrad: a buffer needs 2 or more steps, each of one"):
        train.Config(task_schedule="mixed", pcgrad=4)


MIXED = dict(task_schedule="mixed", image_micro=1, video_micro=1, p=0.25, lora_dropout=0.0)


def test_a_mixed_step_is_the_weighted_mean_of_both_tasks(knobs, tmp_path, monkeypatch):
    """(1-p) g_img + p g_vid (B.3), by hand, for a step whose 8 micro-batches hold exactly 8p = 2 clips."""
    monkeypatch.chdir(tmp_path)
    cfg = train.Config(**{**knobs, **MIXED, "steps": 1, "init_lora": str(ROOT / "toy/lora")})
    for seed in range(100):
        cfg.seed = seed
        tasks = [train.sample_task(cfg, 0, micro) for micro in range(8)]
        if tasks.count("video") == 2:
            break
    got = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: got.extend(
        p.grad.clone() for p in parameters) or clip(parameters, norm))
    train.train(cfg)

    cfg, pipe, parameters = train.load_model(cfg, torch.device("cpu"))
    datasets, size, *_ = train.open_data(cfg, pipe)
    sums, losses = {}, {"image": [], "video": []}
    for micro, task in enumerate(tasks):
        drop = train.token_drop(cfg, 0, micro, 16) if task == "video" else \
            train.view_drop(cfg, 0, micro)
        noise_rng = torch_rng(cfg.seed, "noise", 0, micro)
        batch = next(data.batches(datasets, [[(task, 0, micro)]]))
        x, ref, text = train.encode_batch(cfg, pipe, batch, drop, noise_rng)
        t, noise = train.sample_noise(x, pipe.scheduler, noise_rng)
        loss = model.v_loss(pipe.transformer, pipe.scheduler, x, text, t, noise, ref, drop)
        losses[task].append(loss.item())
        gradient = torch.autograd.grad(loss.mean(), parameters)
        sums[task] = [a + b for a, b in zip(sums.get(task, [0] * len(gradient)), gradient)]
    for g, image, video in zip(got, sums["image"], sums["video"]):
        expected = 0.75 * image / 6 + 0.25 * video / 2
        assert torch.allclose(g, expected, atol=1e-6 + 1e-5 * expected.abs().max().item())
    (line,) = log_of("out/toy")
    assert line["task"] == "mixed" and line["loss"] == pytest.approx(np.mean(losses["image"] + losses["video"]))
    for task in losses:
        assert line[task]["loss"] == pytest.approx(np.mean(losses[task]))


def test_the_authors_recipe_resumes_and_two_ranks_follow_it(knobs, tmp_path, monkeypatch):
    """Killed after step 3: the same bits; two ranks, on the real command line: the same run."""
    flags = ["--recipe", "authors"]
    knobs = {k: v for k, v in knobs.items() if train.Config(**train.TOY).__dict__[k] != v and k not in train.AUTHORS}
    monkeypatch.chdir(tmp_path)

    def go(name):
        argv = command(knobs, name=name)[1:] + flags
        train.command_line(train.main, train.Config, "", argv, **train.defaults(argv))
    go("whole")
    whole = log_of(tmp_path / "out/whole")
    assert [line["task"] for line in whole] == ["mixed"] * 6
    cfg = train.Config(**{**knobs, **train.AUTHORS, **train.TOY_AUTHORS})
    for step, line in enumerate(whole):
        tasks = Counter(train.sample_task(cfg, step, micro) for micro in range(4))  # 8 pairs, two at a time
        assert (line["image"] is None) == (tasks["image"] == 0) and (line["video"] is None) == (tasks["video"] == 0)
    go_back(tmp_path / "out/whole", 3, tmp_path / "out/killed")
    go_back(tmp_path / "out/whole", 3, tmp_path / "out/two")
    go("killed")
    assert log_of(tmp_path / "out/killed") == whole
    assert torch.equal(weights_of(tmp_path / "out/killed"), weights_of(tmp_path / "out/whole"))
    r = run(*TORCHRUN, *command(knobs, name="two"), *flags, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    a, b = weights_of(tmp_path / "out/two"), weights_of(tmp_path / "out/whole")
    assert (a - b).norm() / b.norm() < 1e-5
    for x, y in zip(log_of(tmp_path / "out/two"), whole):
        assert np.isclose(x["loss"], y["loss"], rtol=1e-5)


def test_a_flag_by_hand_wins_over_recipe_and_toy():
    assert train.defaults(["train.py"]) == {} and train.defaults(["--toy"]) == train.TOY
    assert train.defaults(["--toy", "False", "--steps", "3"]) == {} and train.defaults(["--toy=true"]) == train.TOY
    authors = train.defaults(["--recipe=authors", "--toy"])
    assert authors["drop"] == "reference" and authors["image_micro"] == 2 and authors["base"] == "toy/base"
    assert train.defaults(["--recipe", "authors", "--view_drop", "0.3"]) == train.AUTHORS
    r = run(str(ROOT / "train.py"), "--recipe", "authors", "--help")
    said = " ".join(r.stdout.split())
    assert "--task_schedule" in said and "(default: mixed)" in said and "(default: reference)" in said
    with pytest.raises(ValueError, match="--recipe must be one of paper, authors, got 'mine'"):
        train.Config(recipe="mine")


def test_what_the_recipe_set_stands_in_config_json(knobs, tmp_path, monkeypatch):
    """The authors' numbers, and a flag by hand that wins over them."""
    monkeypatch.chdir(tmp_path)
    small = [f"--{k}={knobs[k]}" for k in ("base", "images", "videos", "image_batch", "lora_rank")]
    argv = ["--toy", "--recipe", "authors", *small, "--cache=", "--val_every=0", "--sample_every=0",
            "--drop", "tokens", "--steps", "1"]
    train.command_line(train.train, train.Config, "", argv, **train.defaults(argv))
    config = json.loads(Path("out/toy/config.json").read_text())
    expected = dict(recipe="authors", drop="tokens", task_schedule="mixed", view_drop=0, cls_video=False)
    assert {k: (config | config["not_trained"])[k] for k in expected} == expected


# ---- one VAE path ----------------------------------------------------------------------------------------------------

def test_a_picture_has_the_same_latents_in_training_cache_and_sampling(tmp_path, monkeypatch):
    size = (96, 240)
    pixels = torch.rand(2, 12, 30, 3, generator=torch.Generator().manual_seed(1)) * 255
    for name, picture in zip("ab", pixels.byte().numpy()):
        Image.fromarray(picture).resize((240, 96)).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text('{"image_0": "a.png", "image_1": "b.png", "description_0": "a", '
                                          '"description_1": "b"}\n')
    vae = large_vae()
    base.tile_vae(vae)  # --vae_tiling True is for clips
    pipe = SimpleNamespace(vae=vae, transformer=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(train, "sample_latents", lambda vae, moments, noise_rng: model.sample_latents(vae, moments))
    (tmp_path / "out").mkdir()
    wanted = latents.Latents(images=str(tmp_path), out=str(tmp_path / "out"), crop_jitter=0.0)
    latents.cache_task(wanted, pipe, "image", str(tmp_path), size, 49, 0, 1)
    found = {}
    cache = latents.Cache(tmp_path / "out/image", {"tiling": False})
    for name, cache in (("trained", None), ("cached", cache)):
        pairs = data.ImagePairs(tmp_path, size, cache=cache)
        batch = next(data.batches({"image": pairs}, [[("image", 0, 0)]])) | {"text": torch.zeros(1, 1, 1)}
        x, ref, _ = train.encode_batch(train.Config(), pipe, batch, None, None)
        found[name] = dict(zip((batch["prompt"][0], "ab".replace(batch["prompt"][0], "")), (x, ref)))
    pictures = [media.load_image(tmp_path / f"{name}.png") for name in "ab"]
    found["sampled"] = dict(zip("ab", sample.encode_references(pipe, pictures, *size).split(1)))
    for name, picture in zip("ab", pictures):
        stock = media.normalise(media.to_pixels([picture]))[None].transpose(1, 2)  # (1,3,1,H,W)
        tiles = vae.encode(stock).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
        vae.disable_tiling()
        whole = vae.encode(stock).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
        vae.enable_tiling()
        assert (tiles - whole).abs().max() > 1e-3
        for path in found:
            assert torch.allclose(found[path][name], whole, atol=1e-5), (path, name)


def test_fit_covers_or_pads():
    """A white-framed square of one colour: cover cuts its top and bottom, pad shows all of it between white bars."""
    picture = Image.new("RGB", (40, 40), "red")
    picture.paste("blue", (0, 0, 40, 5))  # a stripe at the top, which covering 3:2 loses
    cover, pad = (np.asarray(media.fit_reference(picture, 24, 36, fit)).astype(int) for fit in ("cover", "pad"))
    assert cover.shape == pad.shape == (24, 36, 3) and np.abs(cover[2:-2] - (255, 0, 0)).max() < 5
    assert (pad[:, :5] > 250).all() and (pad[:, -5:] > 250).all()
    assert np.abs(pad[8:-2, 8:28] - (255, 0, 0)).max() < 5 and np.abs(pad[0, 8:28] - (0, 0, 255)).max() < 25
    tall = np.asarray(media.fit_reference(Image.new("RGB", (90, 160), "red"), 24, 36, "pad"))
    assert (tall[12, :, 1] < 128).sum() in (13, 14)  # 24 * 9 / 16


def test_at_most_eight_whole_pictures_a_call(monkeypatch):
    calls, vae = [], large_vae()
    monkeypatch.setattr(vae, "encode", lambda x: calls.append(tuple(x.shape)) or SimpleNamespace(
        latent_dist=SimpleNamespace(parameters=torch.zeros(len(x), 8, 1, x.shape[3] // 8, x.shape[4] // 8))))
    assert model.encode_moments(vae, torch.zeros(20, 1, 3, 480, 720)).shape == (20, 1, 8, 60, 90)
    assert [shape[0] for shape in calls] == [8, 8, 4]
    calls.clear()
    model.encode_moments(vae, torch.zeros(20, 1, 3, 32, 32))
    assert [shape[0] for shape in calls] == [20]


def test_a_dropped_reference_is_not_encoded_and_the_draws_stay(knobs):
    """With an empty `keep` one VAE call less; x, and the noise and timestep after it, are the same."""
    cfg, pipe, _ = train.load_model(train.Config(**knobs), torch.device("cpu"))
    datasets, *_ = train.open_data(cfg, pipe)
    encode, calls, results = pipe.vae.encode, [], []
    pipe.vae.encode = lambda x: calls.append(len(x)) or encode(x)
    for task in ("image", "video"):
        for keep in (None, torch.empty(0, dtype=torch.long)):
            batch = next(data.batches(datasets, [[(task, 0, 0), (task, 0, 1)]]))
            noise_rng = torch_rng(0, "noise", 0, 0)
            calls.clear()
            x, ref, _ = train.encode_batch(cfg, pipe, batch, keep, noise_rng)
            t, noise = train.sample_noise(x, pipe.scheduler, noise_rng)
            results.append((x, t, noise, len(calls), ref.shape))
        (*kept, calls_kept, shape), (*dropped, calls_dropped, other) = results[-2:]
        assert all(torch.equal(a, b) for a, b in zip(kept, dropped)) and shape == other
        assert (calls_kept, calls_dropped) == (2, 1)


@pytest.mark.parametrize("flags", [{}, train.AUTHORS, {"cls": "item", "drop": "reference", "fit": "pad"}],
                         ids=["paper", "authors", "ablations"])
def test_cached_and_uncached_losses_are_equal_under_every_recipe(knobs, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    creatures.write_pairs("pairs", n=8)
    for file in Path("pairs").glob("*.parquet"):  # wider than high: where the two fits differ
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            sheet = Image.open(io.BytesIO(row["image"]["bytes"])).resize((200, 60))
            sheet.save(buffer := io.BytesIO(), "PNG")
            row["image"]["bytes"] = buffer.getvalue()
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=16)
    cfg = train.Config(**{**knobs, "images": "pairs", "steps": 4, "lora_dropout": 0.0, **flags, "image_micro": 4,
                          "video_micro": 2})
    latents.prepare_cache(latents.Latents(out="cache", prompts=True, device="cpu", **{
        k: getattr(cfg, k) for k in ("base", "images", "videos", "crop_jitter", "fit", "cls", "cls_video", "frames",
                                     "fps", "vae_tiling")}))
    for name, cache in (("plain", ""), ("cached", "cache")):
        train.train(dataclasses.replace(cfg, name=name, cache=cache))
    plain, cached = ([line["loss"] for line in log_of(f"out/{name}")] for name in ("plain", "cached"))
    assert len(plain) == 4 and plain == pytest.approx(cached, rel=1e-5)


# ---- sampling and watching -------------------------------------------------------------------------------------------

def test_lora_scale():
    """0 is the base, 1 changes nothing, 2 is a LoRA whose B is doubled."""
    def video(pipe):
        latents = sample.encode_references(pipe, [media.load_image(ROOT / "toy/refs/creature-0.png")], 32, 32)
        (video,) = sample.generate(pipe, latents, ["a creature stands"], [0], steps=2, guidance=2.0)
        return np.stack([np.asarray(frame) for frame in video]).astype(int)

    def loaded(**options):
        return video(sample.load(str(ROOT / "toy/lora"), BASE, **options)[0])
    one, zero, two = loaded(), loaded(lora_scale=0.0), loaded(lora_scale=2.0)
    assert np.abs(zero - loaded(use_lora=False)).max() <= 1 < np.abs(zero - one).max()
    pipe = base.load_pipeline(BASE)
    model.load_lora(pipe.transformer, ROOT / "toy/lora")
    pipe.transformer.eval()
    assert np.abs(video(pipe) - one).max() <= 1
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data *= 2
    assert np.abs(video(pipe) - two).max() <= 1


@pytest.fixture
def board(monkeypatch):
    """What a run tells TensorBoard, installed or not."""
    told = {"scalars": {}, "images": {}}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told["folder"] = folder

        def add_scalar(self, name, value, step):
            told["scalars"].setdefault(name, []).append((step, value))

        def add_image(self, name, picture, step, dataformats):
            told["images"][name, step] = picture.shape

        def close(self):
            told["closed"] = True
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    return told


def test_tensorboard_gets_losses_norms_cosine_and_sheets(knobs, tmp_path, monkeypatch, board):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "generate", partial(sample.generate, steps=2))
    Path("refs").mkdir()
    shutil.copy(ROOT / "toy/refs/creature-0.png", "refs")
    Path("refs/creature-0.txt").write_text("a creature walks left")
    train.train(train.Config(**{**knobs, "steps": 2, "gradcos_every": 2, "val_every": 2, "sample_every": 2,
                                "val_refs": "refs", "tensorboard": True}))
    lines, scalars = log_of("out/toy"), board["scalars"]
    assert scalars["log/loss"] == [(line["step"], line["loss"]) for line in lines]
    assert scalars["log/grad_norm"] == [(line["step"], line["grad_norm"]) for line in lines]
    assert [step for step, _ in scalars["gradcos/cosine"]] == [step for step, _ in scalars["val/image/loss"]] == [0, 2]
    assert list(board["images"]) == [("creature-0", 2)] and board["closed"]
    assert board["folder"] == Path("out/toy/tensorboard") and "log/step" not in scalars


def test_tensorboard_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs tensorboard: pip install tensorboard"):
        train.main(train.Config(tensorboard=True))


# ---- CogVideoX-2b ----------------------------------------------------------------------------------------------------

@pytest.fixture
def without_rope():
    """A tiny CogVideoX-2b, whose positions are sines added to the tokens; in our class and in the stock one."""
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=C, out_channels=C, time_embed_dim=8,
                  text_embed_dim=12, num_layers=3, sample_width=W, sample_height=H, sample_frames=9,
                  max_text_seq_length=L, use_rotary_positional_embeddings=False)
    ours, stock = model.SubjectTransformer(**config).eval(), CogVideoXTransformer3DModel(**config).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def test_reference_is_frame_zero_without_rope(without_rope, inputs):
    ours, stock = without_rope
    x, text, t, ref = inputs
    assert torch.equal(ours(x, text, t).sample, stock(x, text, t).sample)
    expected = stock(torch.cat([ref, x], 1), text, t).sample[:, 1:]
    assert (ours(x, text, t, reference=ref).sample - expected).abs().max() < 1e-6
    assert (ours(x, text, t, attention_kwargs={"reference": ref}).sample - expected).abs().max() < 1e-6
    assert (ours(x, text, t, reference=ref, keep=torch.arange(N)).sample - expected).abs().max() < 1e-6
    assert (ours(ref.expand(-1, T, -1, -1, -1), text, t, reference=ref).sample - expected).abs().max() > 1e-4


def test_a_base_without_rope_trains_and_samples_in_its_dtype(without_rope, inputs):
    """bfloat16 in training, as every base; float16, which CogVideoX-2b was trained in, in sampling."""
    ours, _ = without_rope
    x, text, t, ref = inputs
    dtype = torch.bfloat16
    parameters = model.add_lora(ours.to(dtype).train(), 4, 2)
    assert all(p.dtype == torch.float32 for p in parameters)
    scheduler = base.load_pipeline(BASE).scheduler
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.v_loss(ours, scheduler, x, text.to(dtype), t, torch.randn_like(x), ref, torch.arange(3))
    loss.mean().backward()
    assert torch.isfinite(loss).all() and any(p.grad.abs().max() > 0 for p in parameters)
    dtype = torch.float16
    ours.eval().to(dtype)
    velocity = ours(x.to(dtype), text.to(dtype), t, reference=ref).sample
    assert velocity.dtype == dtype and torch.isfinite(velocity).all()


def test_a_base_without_rope_samples_with_the_stock_pipeline():
    pipe = base.load_pipeline(BASE)
    config = {**pipe.transformer.config, "use_rotary_positional_embeddings": False}
    torch.manual_seed(0)
    pipe.transformer = model.SubjectTransformer.from_config(config).eval()
    (video,) = sample.generate(pipe, torch.zeros(1, 1, 4, 16, 16), ["a creature walks up"], [0], steps=2)
    assert len(video) == 9


def test_dtypes_of_sampling(tmp_path):
    """float16 for a base without RoPE, as CogVideoX-2b was trained; else bfloat16; on a CPU float32."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    (tmp_path / "transformer").mkdir()
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
