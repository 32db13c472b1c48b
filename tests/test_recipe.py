"""The recipe, number by number: against the paper's own numbers, closed forms, and what torch, diffusers and peft got.

Three golden runs say that nothing else has moved: their losses, norms, learning rates, measurements and some weights
stand in golden.json. After a change that is meant to move them, write it anew and read the diff:

    CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 python -m tests.test_recipe
"""
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import gradcos
import model
import sample
import train
from common import latents, media, run, setup, watch
from tests.shared import BASE, ROOT, log_of, randomise_lora, small_knobs

GOLDEN = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "pillow", "av")


# ---- the golden runs -------------------------------------------------------------------------------------------------

EVERYTHING = dict(steps=6, p=0.5, seed=3, lora_rank=4, lora_alpha=2.0, lora_dropout=0.1, crop_jitter=0.1, view_drop=0.5,
                  token_drop=0.5, image_batch=4, image_micro=2, video_batch=2, video_micro=1, lr=1e-2, warmup=2,
                  gradcos_every=9, val_every=9, val_refs="", save_every=1)
RUNS = {  # name: its flags, and the task whose latents are cached
    "text": (EVERYTHING, "videos"),
    "authors": ({**EVERYTHING, **train.AUTHORS, "image_micro": 2}, "images"),
    "ablations": ({**EVERYTHING, "task_schedule": "two_stage", "pcgrad": 4, "cls": "item", "random_frame": False,
                   "lora_scope": "reference", "view_drop": 0.0, "lora_alpha": 100.0}, None)}


def golden_run(knobs, name, folder):
    """Train one of RUNS in `folder`: (what golden.json holds, the gradients' norms that AdamW saw)."""
    flags, cached = RUNS[name]
    cfg = train.Config(**{**knobs, **flags, "name": name, "out": str(folder)})
    if cached:
        cfg.cache = str(folder / f"cache-{name}")
        latents.prepare_cache(latents.Latents(
            out=cfg.cache, prompts=cached == "images", device="cpu", **{cached: getattr(cfg, cached)},
            **{k: getattr(cfg, k) for k in ("base", "frames", "fps", "crop_jitter", "cls", "cls_video")}))
    norms = []

    def note_norm(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
    hook = register_optimizer_step_pre_hook(note_norm)
    with patch.dict(train.HELD_OUT, image=3, video=2):
        train.train(cfg)
    hook.remove()
    written = {f"{name}/{file}/{line['step']}": line for file in ("log", "gradcos", "val")
               for line in log_of(folder / name, f"{file}.jsonl")}
    weights = model.load_file(sample.find_lora(folder / name))
    for key in [k for k in weights if "blocks.2." in k or "blocks" not in k]:
        written[f"{name}/{key}"] = [weights[key].norm().item(), *weights[key].flatten()[:2].tolist()]
    return written, norms


def versions():
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def rounded(value):
    """The same with six digits of each number, so that a diff of golden.json shows what has moved."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def numbers(value, name=""):
    """("log/3/lr", 0.01), ... for everything in nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(part, f"{name}/{key}")
    else:
        yield name, value


def same(expected, got):
    return got == pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else got == expected


@pytest.fixture(scope="module", params=RUNS)
def golden(request, knobs, tmp_path_factory):
    """A golden run: its name, its folder, what it wrote and the norms that AdamW saw."""
    folder = tmp_path_factory.mktemp("golden")
    written, norms = golden_run(knobs, request.param, folder)
    return SimpleNamespace(name=request.param, folder=folder / request.param, written=written, norms=norms)


def test_golden_run(golden):
    made = json.loads(GOLDEN.read_text())
    expected = dict(numbers({k: v for k, v in made.items() if k.startswith(golden.name)}))
    got = dict(numbers(golden.written))
    assert expected.keys() == got.keys()
    moved = {k: (e, got[k]) for k, e in expected.items() if not same(e, got[k])}
    assert not moved, f"made with {made['made_with']}, here {versions()}"


def test_adamw_steps_with_clipped_gradients_and_the_log_has_the_whole_norm(golden):
    whole = [line["grad_norm"] for line in log_of(golden.folder)]
    assert golden.norms == pytest.approx([min(norm, 1.0) for norm in whole], rel=1e-4)  # A.2
    assert golden.name != "ablations" or max(whole) > 1.0 > min(whole)


def test_a_run_is_measured_before_its_first_step_and_after_its_last(golden):
    for file in ("gradcos.jsonl", "val.jsonl"):
        assert [line["step"] for line in log_of(golden.folder, file)] == [0, 6]


def test_the_newest_checkpoints_stay(golden):
    """A checkpoint every step, three stay."""
    assert sorted(d.name for d in golden.folder.glob("step-*")) == ["step-000004", "step-000005", "step-000006"]


def test_the_header_says_how_to_sample(golden):
    header = model.lora_header(sample.find_lora(golden.folder))
    cls, scope = ("item", "reference") if golden.name == "ablations" else ("front", "all")
    assert {k: header[k] for k in ("base", "cls", "fps", "guidance", "lora_scope")} == dict(
        base=BASE, cls=cls, fps="4.0", guidance="2.0", lora_scope=scope)
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] in (2.0, 100.0)
    assert json.loads(header["trained_by"])["token_drop"] == 0.5


def text_run(golden, knobs, **more):
    """Start that run again, with other flags."""
    flags = {**knobs, **EVERYTHING, "cache": str(golden.folder.with_name("cache-text")), "name": "text"}
    train.train(train.Config(**{**flags, "out": str(golden.folder.parent), **more}))


@pytest.mark.parametrize("golden", ["text"], indirect=True)
@pytest.mark.parametrize("knob, other", [("p", 0.2), ("seed", 4), ("token_drop", 0.4), ("view_drop", 0.4)])
def test_a_run_does_not_go_on_with_another(golden, knobs, knob, other):
    with pytest.raises(ValueError, match=f"{knob} was .*, now {other}"):
        text_run(golden, knobs, **{knob: other})


# ---- the numbers of the paper, and ours where it is silent -----------------------------------------------------------

PAPER = dict(  # 5.1, A.1, A.2, Algorithm 1 and 3.2 to 3.4
    base="THUDM/CogVideoX-5b", lora_rank=128, lora_alpha=64, lora_dropout=0.1, lora_scope="all", frames=49, fps=8,
    p=0.2, task_schedule="switch", image_frame="first", random_frame=True, token_drop=0.5, drop="tokens", view_drop=0.5,
    cls="front", cls_video=True, steps=4000, image_batch=256, video_batch=32, lr=5e-5, warmup=200,
    save_every=50, pcgrad=0, recipe="paper", toy=False)
SILENT = dict(  # ours, or the authors' code
    crop_jitter=0.1, image_micro=1, video_micro=1, seed=0,
    image_checkpointing="none", video_checkpointing="attention", compile=False, int8=False, guidance=6.0, workers=4,
    gradcos_every=0, val_every=0, look=0, init_lora="", cache="", val_refs="", images="data/subjects200k",
    videos="data/pexels", out="out", name="subject", device="", tensorboard=False)
SAMPLING = dict(
    steps=50, guidance=0.0, ref_guidance=1.0, lora_scale=1.0, seed=0, frames=0, fps=0.0, height=0, width=0, fit="cover",
    batch=1, out="sample.mp4", lora="", base="", ref="", prompt="", prompts="", bench="", images=".", device="",
    int8=False, offload="none")
AUTHORS = dict(drop="reference", task_schedule="mixed", view_drop=0, crop_jitter=0, lora_dropout=0, cls="front",
               cls_video=False, image_micro=8, video_micro=1, image_checkpointing="attention")
TOY = dict(base="toy/base", images="toy/data/pairs", videos="toy/data/clips", cache="toy/data/cache", name="toy",
           lora_rank=32, lora_alpha=16, lora_dropout=0, frames=9, fps=4, crop_jitter=0, view_drop=0, steps=450,
           image_batch=16, image_micro=16, video_batch=16, video_micro=16, lr=6e-3, warmup=30, save_every=100,
           video_checkpointing="none", workers=0, guidance=2, val_refs="toy/refs", val_every=150)


@pytest.mark.parametrize("config, expected", [(train.Config, PAPER | SILENT), (sample.Config, SAMPLING)])
def test_every_default(config, expected):
    assert vars(config()) == expected


def test_what_is_no_knob():
    """Three checkpoints stay; B.1's held-out batches; at most eight pictures of full size in a call of the VAE."""
    assert (run.KEPT, train.HELD_OUT, model.VAE_PIXELS) == (3, {"image": 64, "video": 32}, 8 * 480 * 720)


@pytest.mark.parametrize("table, expected", [("AUTHORS", AUTHORS), ("TOY", TOY),
                                             ("TOY_AUTHORS", dict(image_micro=2, video_micro=2))])
def test_every_preset(table, expected):
    assert getattr(train, table) == expected


@pytest.mark.parametrize("name", "p token_drop view_drop lora_dropout crop_jitter".split())
def test_shares_are_from_0_to_1(name):
    with pytest.raises(ValueError, match=f"--{name} must be in"):
        train.Config(**{name: 1.1})


@pytest.mark.parametrize("name", "lora_rank lora_alpha frames fps steps image_batch video_batch image_micro "
                                 "video_micro lr save_every".split())
def test_what_must_be_positive(name):
    with pytest.raises(ValueError, match=f"--{name} must be positive"):
        train.Config(**{name: 0})


# ---- LoRA (A.1, 5.1) -------------------------------------------------------------------------------------------------

def lora_layers(transformer):
    return {name: m for name, m in transformer.named_modules() if isinstance(m, model.LoraLayer)}


@pytest.fixture(scope="module", name="loaded")
def loaded_fixture(knobs):
    """(cfg, pipeline, parameters) of a run that takes A.1's LoRA and the default of checkpointing."""
    cfg = train.Config(**{**knobs, "lora_rank": 128, "lora_alpha": 64.0, "lora_dropout": 0.1,
                          "image_checkpointing": "none", "video_checkpointing": "attention", "crop_jitter": 0.1})
    return setup.load_model(cfg, torch.device("cpu"))


def test_lora_sits_on_the_nine_names_of_A1_and_nowhere_else(loaded):
    names = ["to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2"]
    in_block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
                "norm1.linear", "norm2.linear"]
    expected = {f"transformer_blocks.{i}.{name}" for i in range(5) for name in in_block}
    assert lora_layers(loaded[1].transformer).keys() == expected | {"patch_embed.proj", "patch_embed.text_proj"}
    assert loaded[1].transformer.peft_config["default"].target_modules == set(names)


def test_peft_got_rank_128_alpha_64_dropout_01(loaded):
    for layer in lora_layers(loaded[1].transformer).values():
        assert layer.r == {"default": 128} and layer.scaling == {"default": 0.5}  # alpha / rank
        assert layer.lora_dropout["default"].p == 0.1 and layer.training and not layer.cast_input_dtype_enabled


def test_lora_starts_as_peft_starts_it(loaded):
    """A is uniform within 1/sqrt(inputs), B is zero: the first update is small and in B alone."""
    for layer in lora_layers(loaded[1].transformer).values():
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight
        bound = 1 / math.sqrt(A[0].numel())
        assert A.abs().max() <= bound and A.std() == pytest.approx(bound / math.sqrt(3), rel=0.1) and not B.any()


def test_only_lora_is_trained(loaded):
    named = dict(loaded[1].transformer.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == {n for n in named if "lora_" in n}
    assert {id(p) for p in loaded[2]} == {id(p) for n, p in named.items() if "lora_" in n}


def test_init_lora_brings_rank_alpha_and_weights_and_the_flag_its_dropout(knobs):
    start = ROOT / "toy/lora"
    cfg, pipe, _ = setup.load_model(train.Config(**{**knobs, "init_lora": str(start), "lora_dropout": 0.25}),
                                    torch.device("cpu"))
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_scope) == (32, 16.0, "all")
    for layer in lora_layers(pipe.transformer).values():
        assert layer.lora_dropout["default"].p == 0.25 and layer.scaling == {"default": 0.5}
    there = model.load_file(sample.find_lora(start))
    got = pipe.transformer.transformer_blocks[0].ff.net[2].lora_B["default"].weight
    assert torch.equal(got, there["transformer.transformer_blocks.0.ff.net.2.lora_B.weight"]) and got.any()


def test_scope_reference_freezes_exactly_what_gets_no_gradient(tiny, inputs):
    ours, _ = tiny
    x, text, t, reference = inputs
    model.add_lora(ours, 4, 2.0, scope="reference")
    randomise_lora(ours)
    named = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    trained = {n for n, p in named.items() if p.requires_grad}
    for p in named.values():
        p.requires_grad_(True)
    ours(x, text, t, reference=reference).sample.square().mean().backward()
    assert trained == {n for n, p in named.items() if p.grad is not None and p.grad.abs().max() > 1e-9}


def test_each_half_of_guidance_gets_the_references_in_order(tiny, inputs):
    """Two prompts with a picture each: [uncond | cond] of four rows."""
    ours, _ = tiny
    x, text, t, reference = inputs
    both = ours(torch.cat([x, x]), torch.cat([0 * text, text]), torch.cat([t, t]), reference=reference).sample
    for half, words in zip(both.chunk(2), (0 * text, text)):
        assert (half - ours(x, words, t, reference=reference).sample).abs().max() < 1e-5


# ---- AdamW, its schedule, clipping (5.1, A.2) ------------------------------------------------------------------------

def learning_rates(steps, **flags):
    """What AdamW gets in each step."""
    cfg = train.Config(steps=steps, **flags)
    optimizer, schedule = setup.make_optimizer(cfg, [torch.nn.Parameter(torch.zeros(1))])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_adamw_has_the_numbers_of_A2():
    optimizer, _ = setup.make_optimizer(train.Config(), [torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["initial_lr"] == 5e-5 and group["fused"]
    assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.95), 1e-8, 1e-4, False)


def test_the_papers_schedule_at_five_steps():
    """200 steps of warm-up, then half a cosine over 3,800."""
    rates = learning_rates(4000)
    assert [rates[s] for s in (0, 100, 200, 2100, 3999)] == pytest.approx(
        [0, 2.5e-5, 5e-5, 2.5e-5, 2.5e-5 * (1 - math.cos(math.pi / 3800))], abs=1e-12)


# ---- draws -----------------------------------------------------------------------------------------------------------

def test_timesteps_are_uniform_over_all_thousand():
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    t, _ = train.sample_noise(torch.zeros(20_000, 1), scheduler, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999
    counts = torch.bincount(t // 100, minlength=10)
    assert (counts - 2000).abs().max() < 200  # 42 is the standard deviation


def test_noise_is_standard_normal_and_each_samples_own():
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    x = torch.zeros(2, 3, 4, 50, 50)
    t, noise = train.sample_noise(x, scheduler, torch.Generator().manual_seed(0))
    assert t.shape == (2,) and t[0] != t[1] and noise.shape == x.shape
    assert noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(noise.flatten(1))[0, 1].abs() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_draws_from_the_posterior_times_the_scaling_factor(dtype):
    """Mean 3, log-variance -2: standard deviation 1/e. CogVideoX-5B's factor is 0.7."""
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.7))
    moments = torch.cat([torch.full((1, 1, 4, 60, 60), 3.0), torch.full((1, 1, 4, 60, 60), -2.0)], 2).to(dtype)
    z = model.sample_latents(vae, moments, torch.Generator().manual_seed(0))
    assert z.dtype == torch.float32 and z.shape == (1, 1, 4, 60, 60)
    assert z.mean() == pytest.approx(0.7 * 3, abs=0.01) and z.std() == pytest.approx(0.7 / math.e, rel=0.02)
    assert torch.equal(model.sample_latents(vae, moments), torch.full_like(z, 0.7 * 3))  # sampling takes the mean


def test_training_draws_target_and_reference_each_from_its_posterior(loaded):
    """Two encodings of the same batch differ, and the same generator gives the same."""
    cfg, pipe, _ = loaded
    moments = torch.cat([torch.zeros(1, 1, 4, 16, 16), torch.zeros(1, 1, 4, 16, 16)], 2)  # mean 0, variance 1
    batch = {"target_moments": moments, "reference_moments": moments, "text": torch.zeros(1, 16, 64)}
    x, reference, _ = train.encode(cfg, pipe, batch, "image", None, torch.Generator().manual_seed(0))
    again, *_ = train.encode(cfg, pipe, batch, "image", None, torch.Generator().manual_seed(0))
    for z in (x, reference):
        assert z.std() == pytest.approx(pipe.vae.config.scaling_factor, rel=0.1)
    assert torch.equal(x, again) and torch.corrcoef(torch.stack([x.flatten(), reference.flatten()]))[0, 1].abs() < 0.1


def micros(*steps_and_indices):
    return [train.MicroBatch("video", step, index, []) for step, index in steps_and_indices]


def test_token_drop_keeps_a_sorted_share_of_every_micro_batchs_own():
    """Half of 1,350 tokens; with LoRA on reference tokens one at least."""
    keeps = [train.tokens_to_keep(train.Config(), micro, 1350) for micro in micros((7, 0), (7, 1), (8, 0))]
    assert all(len(keep) == 675 and torch.equal(keep, keep.sort().values) for keep in keeps)
    assert len({tuple(keep.tolist()) for keep in keeps}) == 3
    (micro,) = micros((7, 0))
    assert len(train.tokens_to_keep(train.Config(token_drop=0.9), micro, 1350)) == 135
    few = train.Config(token_drop=0.99, lora_scope="reference", view_drop=0.0)
    assert len(train.tokens_to_keep(few, micro, 16)) == 1 and len(train.tokens_to_keep(few, micro, 1350)) == 14


def test_view_drop_has_a_coin_for_each_micro_batch():
    drops = [[train.all_or_none(train.Config(), micro, 0.25) is not None for micro in
              micros(*((step, index) for index in range(50)))] for step in range(40)]
    assert np.mean(drops) == pytest.approx(0.25, abs=0.03) and np.std(np.mean(drops, 1)) < 0.15


def test_the_reference_may_be_any_frame_alike():
    """49 frames (A.2), 9,800 draws: each frame about 200 times."""
    clips = data.Clips.__new__(data.Clips)
    clips.frames, clips.random_frame = 49, True
    draws = np.random.default_rng(0)
    counts = np.bincount([clips.random_frame_select(draws) for _ in range(9800)], minlength=49)
    assert len(counts) == 49 and counts.min() > 140 and counts.max() < 260
    clips.random_frame = False
    assert {clips.random_frame_select(draws) for _ in range(9)} == {0}


def test_two_stages_share_the_steps_as_the_coin_would():
    assert setup.image_stage(train.Config()) == 3200 and setup.image_stage(train.Config(p=0.5, steps=7)) in (3, 4)


# ---- pictures --------------------------------------------------------------------------------------------------------

def ramp(height, width, across):
    """A picture whose values are its own columns (or rows) in pixels: a cut shows where it is from, and its zoom."""
    line = np.arange(width if across else height, dtype=np.float32) + 0.5
    values = np.broadcast_to(line if across else line[:, None], (height, width))
    return Image.fromarray(np.ascontiguousarray(values))


def cuts(height, width, across, jitter, n=400):
    """(zoom, shift of the middle as a share of the picture) of n random cuts of 60 x 60."""
    found = []
    for seed in range(n):
        cut = np.asarray(media.resize_center_crop(ramp(height, width, across), 60, 60, jitter,
                                                 np.random.default_rng(seed)))
        line = (cut[30] if across else cut[:, 30])[5:-5]  # the filter bends the ramp at the picture's edges
        slope = (line[-1] - line[0]) / (len(line) - 1)    # pixels of the picture per pixel of the cut
        whole = width if across else height
        found.append((min(height, width) / 60 / slope, line.mean() / whole - 0.5))
    return np.array(found).T


@pytest.mark.parametrize("size, across", [((120, 480), True), ((480, 120), False)])
def test_jitter_zooms_by_up_to_its_share_and_shifts_by_half_of_it_either_way(size, across):
    """Uniform zoom in 1 to 1.2, uniform shift in -0.1 to 0.1 of the picture, across and down."""
    zoom, shift = cuts(*size, across, 0.2)
    assert zoom.min() > 0.99 and zoom.max() < 1.21 and zoom.mean() == pytest.approx(1.1, abs=0.01)
    assert np.abs(shift).max() < 0.105 and abs(shift.mean()) < 0.01
    assert shift.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.1) and abs(np.corrcoef(zoom, shift)[0, 1]) < 0.15


@pytest.fixture
def wide_pair(tmp_path):
    """One pair of the same noise, twice as wide as high: "a" and "b" are its captions."""
    noise = np.random.default_rng(0).integers(0, 200, (64, 128, 3)).astype(np.uint8)  # nothing is white
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image_0": "a.png", "image_1": "a.png", "description_0": "a",
                                                      "description_1": "b", "item": "cat"}) + "\n")
    return tmp_path


def test_each_picture_of_a_pair_has_its_own_jitter(wide_pair):
    plain = data.ImagePairs(wide_pair, (32, 32))[0, 0]
    assert torch.equal(plain["target"], plain["reference"])
    item = data.ImagePairs(wide_pair, (32, 32), crop_jitter=0.1)[0, 0]
    assert not torch.equal(item["target"], item["reference"])
    assert not any(torch.equal(item[k], plain[k]) for k in ("target", "reference"))


def test_half_of_the_pairs_go_each_way(wide_pair):
    prompts = [data.ImagePairs(wide_pair, (8, 8))[0, i]["prompt"] for i in range(200)]
    assert prompts.count("a") == pytest.approx(100, abs=30)


@pytest.fixture(scope="module", name="cached")
def cached_fixture(knobs, loaded, tmp_path_factory):
    """A run's data without a cache, and with one that holds prompts (the pairs three crops)."""
    cfg, pipe, _ = loaded
    plain = dataclasses.replace(cfg, crop_jitter=0.0, cls_video=False)
    cached = dataclasses.replace(plain, cache=str(tmp_path_factory.mktemp("cache")))
    latents.prepare_cache(latents.Latents(
        out=cached.cache, images=cfg.images, videos=cfg.videos, prompts=True, crops=3, device="cpu",
        **{k: getattr(cached, k) for k in ("base", "frames", "fps", "crop_jitter", "cls_video")}))
    return pipe, setup.open_data(plain, pipe)[0], setup.open_data(cached, pipe)[0]


@pytest.mark.parametrize("task, cls", [("image", "<cls> "), ("video", "")])
def test_a_cached_sample_is_the_uncached_one(cached, task, cls):
    """The same target, reference, caption and embedding, in both directions of a pair."""
    pipe, plain, kept = cached
    for step in range(6):
        a, b = plain[task][step, 0], kept[task][step, 0]
        assert a["prompt"] == b["prompt"] and a["item"] == b["item"]
        moments = {k: model.encode_moments(pipe.vae, media.normalise(a[k])[None])[0] for k in ("target", "reference")}
        if task == "video":
            assert torch.equal(a["reference"], b["reference"])  # it is decoded either way
        else:
            assert torch.allclose(moments["reference"], b["reference_moments"], atol=1e-5)
        assert torch.allclose(moments["target"], b["target_moments"], atol=1e-5)
        assert torch.allclose(b["text"], model.encode_prompt(pipe, [cls + a["prompt"]])[0], atol=1e-5)


def test_each_crop_of_a_cached_pair_is_drawn(loaded, wide_pair, tmp_path):
    cfg = dataclasses.replace(loaded[0], images=str(wide_pair), p=0.0, cache=str(tmp_path / "cache"))
    latents.prepare_cache(latents.Latents(out=cfg.cache, images=cfg.images, base=BASE, crops=3, device="cpu"))
    pairs = setup.open_data(cfg, loaded[1])[0]["image"]
    sums = {pairs[step, 0]["target_moments"].sum().item() for step in range(60)}
    assert len(sums) == 6  # three crops, two directions


@pytest.mark.parametrize("task, change", [
    ("image", dict(crop_jitter=0.2)), ("image", dict(cls="item")), ("video", dict(fps=2.0)),
    ("video", dict(cls_video=False))])
def test_a_cache_of_other_settings_is_another(loaded, task, change):
    cfg, pipe, _ = loaded
    key = latents.cache_key(cfg, pipe, task, (32, 48), 9)
    assert key != latents.cache_key(dataclasses.replace(cfg, **change), pipe, task, (32, 48), 9)


@pytest.mark.parametrize("size, frames", [((48, 48), 9), ((32, 32), 9), ((32, 48), 17)])
def test_a_cache_of_other_shapes_is_another(loaded, size, frames):
    cfg, pipe, _ = loaded
    assert latents.cache_key(cfg, pipe, "video", (32, 48), 9) != latents.cache_key(cfg, pipe, "video", size, frames)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_cache_of_another_base_is_another(loaded, part):
    cfg, pipe, _ = loaded
    layer = pipe.vae.encoder.conv_in.conv if part == "vae" else pipe.text_encoder.get_input_embeddings()
    weight = layer.weight
    key = latents.cache_key(cfg, pipe, "image", (32, 48), 9)
    weight.data.mul_(2)
    other = latents.cache_key(cfg, pipe, "image", (32, 48), 9)
    weight.data.div_(2)  # exact: the other tests see what was there
    assert {k for k in key if key[k] != other[k]} == {part}


def test_the_flags_of_the_data_reach_the_data(loaded):
    cfg, pipe, _ = loaded
    cfg = dataclasses.replace(cfg, seed=5, random_frame=False, fps=2.0, frames=7)
    datasets, size, frames, n_ref = setup.open_data(cfg, pipe)
    pairs, clips = datasets["image"], datasets["video"]
    assert (pairs.crop_jitter, pairs.seed, size, n_ref) == (0.1, 5, (32, 32), 16)
    assert (clips.frames, clips.fps, clips.random_frame, clips.seed, frames) == (5, 2.0, False, 5, 5)  # 4k + 1 here


@pytest.mark.parametrize("p, opened", [(0.0, ["image"]), (1.0, ["video"])])
def test_only_the_data_that_p_asks_for_is_opened(loaded, p, opened):
    cfg, pipe, _ = loaded
    assert list(setup.open_data(dataclasses.replace(cfg, p=p), pipe)[0]) == opened


# ---- measuring (B.1) -------------------------------------------------------------------------------------------------

def test_losses_go_to_the_quarter_of_their_timestep():
    losses = watch.no_losses("cpu")
    t = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    watch.add_losses(losses, "image", torch.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 5.0, 0.0, 2.0]), t, 1000)
    watch.add_losses(losses, "image", torch.tensor([5.0]), torch.tensor([100]), 1000)
    assert watch.loss_means(*losses["image"]) == {"loss": pytest.approx(51 / 9), "loss_by_timestep": [3, 15, 5, 1]}
    assert not losses["video"].any()


def test_a_mixed_steps_loss_weighs_micro_batches_alike():
    losses, t = watch.no_losses("cpu"), torch.tensor([0, 0, 900])
    watch.add_losses(losses, "image", torch.tensor([1.0, 2.0, 3.0]), t, 1000)
    watch.add_losses(losses, "video", torch.tensor([10.0]), t[:1], 1000)
    means = watch.step_means("mixed", losses)
    assert means["loss"] == 6 and means["image"]["loss"] == 2 and means["video"]["loss"] == 10
    assert means["image"]["loss_by_timestep"] == [1.5, None, None, 3]


@pytest.fixture(scope="module", name="held_out")
def held_out_fixture(knobs, tmp_path_factory):
    """(cfg, pipeline, held-out batches) of a trained LoRA, with a view drop that would drop everything."""
    cfg = train.Config(**{**knobs, "init_lora": str(ROOT / "toy/lora"), "view_drop": 1.0, "lora_dropout": 0.5,
                          "image_micro": 4, "video_micro": 2, "steps": 1, "val_every": 1, "gradcos_every": 1,
                          "crop_jitter": 0.1, "out": str(tmp_path_factory.mktemp("held-out"))})
    cfg, pipe, _ = setup.load_model(cfg, torch.device("cpu"))
    return cfg, pipe, train.held_out_batches(cfg, pipe, (32, 32), 9, 16)


def test_held_out_pairs_keep_their_reference_and_clips_half_of_it(held_out):
    _, _, batches = held_out
    sizes = [(task, len(batch["latents"])) for task, batch in batches]
    assert sizes == [("image", 4), ("image", 2), ("video", 2), ("video", 1)]
    for task, batch in batches:
        assert batch["reference"].abs().amax((1, 2, 3, 4)).min() > 0
        assert batch["keep"] is None if task == "image" else len(batch["keep"]) == 8


def test_held_out_samples_are_as_many_as_asked(held_out):
    cfg, pipe, _ = held_out
    with patch.dict(train.HELD_OUT, image=5, video=1):
        few = train.held_out_batches(cfg, pipe, (32, 32), 9, 16)
    assert [len(batch["latents"]) for _, batch in few] == [4, 1, 1]


def test_a_held_out_pair_that_cannot_be_read_is_said(held_out, wide_pair, capsys):
    cfg, pipe, _ = held_out
    (wide_pair.parent / "x_val").symlink_to(wide_pair)
    line = (wide_pair / "pairs.jsonl").read_text()
    (wide_pair / "pairs.jsonl").write_text(line.replace("a.png", "none.png") + line)
    train.held_out_batches(dataclasses.replace(cfg, images=str(wide_pair.parent / "x")), pipe, (32, 32), 9, 16)
    assert "skipped, held out: line 1 of " in capsys.readouterr().err


def test_held_out_batches_are_those_of_every_seed(held_out):
    cfg, pipe, batches = held_out
    again = train.held_out_batches(dataclasses.replace(cfg, seed=1), pipe, (32, 32), 9, 16)
    assert all(torch.equal(a[k], b[k]) for (_, a), (_, b) in zip(batches, again) for k in a if torch.is_tensor(a[k]))


def test_ranks_share_the_held_out_batches(held_out, monkeypatch):
    cfg, pipe, batches = held_out
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        mine = train.held_out_batches(cfg, pipe, (32, 32), 9, 16)
        assert [task for task, _ in mine] == ["image", "video"]
        for (_, a), (_, b) in zip(mine, batches[int(rank)::2]):
            assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["timestep"], b["timestep"])


def test_measured_losses_and_norms_are_those_of_the_mean_over_samples(held_out):
    """By hand, without dropout: 6 pairs in batches of 4 and 2, each pair weighs the same; and so does its gradient."""
    cfg, pipe, batches = held_out
    train.train(cfg)
    val, gradients = (log_of(f"{cfg.out}/{cfg.name}", file)[0] for file in ("val.jsonl", "gradcos.jsonl"))
    transformer = pipe.transformer.eval()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for task, norm in (("image", "norm_img"), ("video", "norm_vid")):
        losses = torch.cat([model.v_loss(transformer, pipe.scheduler, **b) for name, b in batches if name == task])
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), parameters)])
        assert val[task]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
        assert gradients[norm] == pytest.approx(flat.norm().item(), rel=1e-4)


def test_cosine_is_signed_and_guarded_by_a_tiny_eps():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, -3.0])
    assert gradcos.cosine([a], [b]) == pytest.approx((-24 / 25, 5, 5))
    assert gradcos.cosine([a], [0 * b]) == (0, 5, 0)
    assert gradcos.cosine([a * 2e-7], [a * 2e-7])[0] == pytest.approx(0.5)  # |a| |b| = 1e-12 = eps


def test_a_parameter_without_a_gradient_counts_as_zero():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    losses = ((k * a).sum() for k in (1.0, 2.0))
    assert gradcos.flat_gradient(losses, [a, b]).tolist() == [3, 3, 0, 0, 0]


# ---- sampling --------------------------------------------------------------------------------------------------------

@pytest.fixture
def calls(monkeypatch):
    """What the stock pipeline is asked for, call by call; it answers with grey pictures."""
    asked = []

    def answer(pipe, **words):
        asked.append(words)
        grey = [Image.new("RGB", (32, 32), "grey")] * words["num_frames"]
        return SimpleNamespace(frames=[grey] * len(words["generator"]))
    monkeypatch.setattr(CogVideoXPipeline, "__call__", answer)
    return asked


REF = str(ROOT / "toy/refs/creature-0.png")


def rate_of(file):
    with media.av.open(str(file)) as container:
        return container.streams.video[0].average_rate


def test_sampling_takes_guidance_rate_and_cls_from_the_lora(tmp_path, calls):
    """The toy's LoRA says 2, 4 fps and front; 50 steps, the base's 9 frames, seed 0."""
    sample.main(sample.Config(ref=REF, lora=str(ROOT / "toy/lora"), prompt="a creature", out=str(tmp_path / "a.mp4")))
    (words,) = calls
    assert (words["guidance_scale"], words["num_inference_steps"], words["num_frames"]) == (2.0, 50, 9)
    assert (words["height"], words["width"]) == (32, 32)
    assert [g.initial_seed() for g in words["generator"]] == [0] and rate_of(tmp_path / "a.mp4") == 4
    pipe = sample.load(str(ROOT / "toy/lora"))[0]
    assert torch.allclose(words["prompt_embeds"], model.encode_prompt(pipe, ["<cls> a creature"]), atol=1e-5)
    assert torch.allclose(words["negative_prompt_embeds"], model.encode_prompt(pipe, [""]), atol=1e-5)
    picture = media.to_pixels([media.resize_center_crop(media.load_image(REF), 32, 32)])
    stock = pipe.vae.encode(media.normalise(picture)[:, :, None]).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert torch.allclose(words["attention_kwargs"]["reference"], stock.transpose(1, 2), atol=1e-5)


def test_flags_of_sampling_win_over_the_lora(tmp_path, calls):
    sample.main(sample.Config(ref=REF, lora=str(ROOT / "toy/lora"), prompt="x", guidance=3.5, fps=16.0, seed=7, steps=9,
                              frames=16, height=40, width=48, out=str(tmp_path / "a.mp4")))
    (words,) = calls
    assert (words["guidance_scale"], words["num_inference_steps"], words["num_frames"]) == (3.5, 9, 13)  # 4k + 1 here
    assert (words["height"], words["width"]) == (40, 48)
    assert words["attention_kwargs"]["reference"].shape[-2:] == (20, 24)
    assert [g.initial_seed() for g in words["generator"]] == [7] and rate_of(tmp_path / "a.mp4") == 16


def test_a_lora_without_a_header_is_sampled_as_the_authors_do(tmp_path, calls):
    """Guidance 6, 8 fps, <cls> in front, covered."""
    model.save_file(model.load_file(model.lora_path(ROOT / "toy/lora")), tmp_path / model.LORA_FILE)
    sample.main(sample.Config(ref=REF, lora=str(tmp_path), base=BASE, prompt="x", out=str(tmp_path / "a.mp4")))
    assert calls[0]["guidance_scale"] == 6.0 and rate_of(tmp_path / "a.mp4") == 8


def test_cls_of_older_and_newer_files():
    """Once it was True or False."""
    said = {None: "front", "True": "front", "False": "off", "front": "front", "item": "item", "off": "off"}
    assert {cls: sample.cls_of({"cls": cls} if cls else {}) for cls in said} == said


def test_generates_own_defaults(calls):
    """50 steps, guidance 6 (the authors' code), <cls> in front."""
    sample.generate(sample.load_pipeline(BASE), None, ["x", "y"], [3, 4])
    (words,) = calls
    assert (words["num_inference_steps"], words["guidance_scale"]) == (50, 6.0)
    assert (words["num_frames"], words["height"], words["width"]) == (9, 32, 32)  # the base's
    assert words["prompt"] == ["<cls> x", "<cls> y"]
    assert [g.initial_seed() for g in words["generator"]] == [3, 4] and words["max_sequence_length"] == 16


def test_every_line_of_prompts_has_the_seed_of_the_flag(tmp_path, calls):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    sample.main(sample.Config(prompts=str(tmp_path / "p.txt"), lora=str(ROOT / "toy/lora"), seed=7, batch=2,
                              out=str(tmp_path / "a.mp4")))
    assert [[g.initial_seed() for g in words["generator"]] for words in calls] == [[7, 7], [7]]
    assert all(words["attention_kwargs"] == {"reference": None, "ref_guidance": 1.0} for words in calls)


def test_a_contact_sheet_has_the_reference_and_six_frames_evenly_spread():
    video = [Image.new("RGB", (8, 8), (20 * i,) * 3) for i in range(9)]
    sheet = np.asarray(sample.contact_sheet(video, Image.new("RGB", (8, 8), (7, 7, 7))))
    assert sheet.shape == (8, 7 * 8 + 6 * 4, 3) and sheet[0, ::12, 0].tolist() == [7, 0, 40, 60, 100, 120, 160]


def test_samples_while_training_have_the_runs_guidance_and_cls_and_seed_0(tmp_path, knobs, calls):
    (tmp_path / "a.txt").write_text("a creature")
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    train.train(train.Config(**{**knobs, "steps": 1, "guidance": 3.0, "cls": "off", "val_every": 1,
                                "val_refs": str(tmp_path), "out": str(tmp_path)}))
    (words,) = calls  # after the step, not before it
    assert (words["guidance_scale"], words["num_inference_steps"], words["num_frames"]) == (3.0, 50, 9)
    assert [g.initial_seed() for g in words["generator"]] == [0]
    pipe = sample.load_pipeline(BASE)
    assert torch.allclose(words["prompt_embeds"], model.encode_prompt(pipe, ["a creature"]), atol=1e-5)
    assert torch.allclose(words["negative_prompt_embeds"], model.encode_prompt(pipe, [""]), atol=1e-5)
    reference = sample.encode_references(pipe, [Image.open(tmp_path / "a.png")], 32, 32)
    assert torch.allclose(words["attention_kwargs"]["reference"], reference, atol=1e-5)
    sheet = Image.open(tmp_path / knobs["name"] / "samples/a-000001.png")
    assert sheet.size == (7 * 128 + 6 * 4, 128)  # 32 pixels are enlarged to 128
    assert log_of(tmp_path / knobs["name"], "samples.jsonl") == [{"step": 1, "saturation": {"a": 0.0}}]  # grey


def test_the_newest_checkpoint_is_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, folder in ((3, "a/step-000009"), (1, "b/step-000002"), (2, "c/step-000005"), (0, "d/step-000007.tmp")):
        Path("out", folder).mkdir(parents=True)
        Path("out", folder, model.LORA_FILE).touch()
        os.utime(Path("out", folder, model.LORA_FILE), (1000 - age, 1000 - age))
    assert sample.find_lora() == Path("out/b/step-000002", model.LORA_FILE)


# ---- a run's folder --------------------------------------------------------------------------------------------------

def test_knobs_that_a_run_may_go_on_with():
    """Any other is part of what is trained."""
    assert {f.name for f in dataclasses.fields(train.Config) if not f.metadata["trains"]} == {
        "toy", "recipe", "tensorboard", "name", "out", "workers", "save_every", "guidance", "look", "gradcos_every",
        "val_every", "val_refs", "image_checkpointing", "video_checkpointing"}


if __name__ == "__main__":
    made = {"made_with": versions()}
    with tempfile.TemporaryDirectory() as temporary:
        for run_name in RUNS:
            made |= golden_run(small_knobs(Path(temporary, "toy")), run_name, Path(temporary))[0]
    lines = [f" {json.dumps(k)}: {json.dumps(rounded(v))}" for k, v in made.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {GOLDEN}")
