"""The recipe, number by number: against the paper's numbers, closed forms, and what torch, diffusers and peft got."""
import dataclasses
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import model
import sample
import train
from common import latents, log, media, run, setup
from tests.shared import BASE, LORA, REF, log_of


# ---- three golden runs -----------------------------------------------------------------------------------------------

EVERYTHING = dict(seed=3, crop_jitter=0.1, view_drop=0.5, image_batch=4, image_micro=2, video_batch=2, video_micro=1,
                  lr=1e-2, warmup=2, gradcos_every=9, val_every=9, save_every=1)
GOLDEN = {  # name: its flags; the losses of its steps, then the cosine after them
    "paper": ({}, [0.0133405, 0.155601, 0.615567, 0.157574, 0.298528, 0.220551, -0.0253581]),
    "authors": ({**train.AUTHORS, "image_micro": 2},
                [0.21595, 0.463974, 0.245489, 0.0473638, 0.247423, 0.120979, 0.00358773]),
    "ablations": (dict(task_schedule="two_stage", pcgrad=4, cls="item", random_frame=False, lora_scope="reference",
                       view_drop=0.0, lora_alpha=100.0, image_frame="random"),
                  [0.913257, 0.528522, 0.677277, 0.17909, 0.150272, 0.0203048, 0.00516808])}


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request, knobs, tmp_path_factory):
    """A golden run: its name, its folder, and the norms of the gradients that AdamW saw."""
    norms, out = [], tmp_path_factory.mktemp("golden")

    def note_norm(optimizer, *_):
        gradients = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat(gradients).norm().item())
    hook = register_optimizer_step_pre_hook(note_norm)
    with patch.dict(train.HELD_OUT, image=3, video=2):
        flags = {**knobs, **EVERYTHING, **GOLDEN[request.param][0], "name": request.param, "out": str(out)}
        train.train(train.Config(**flags))
    hook.remove()
    return SimpleNamespace(name=request.param, folder=out / request.param, norms=norms)


def test_golden_run(golden):
    """Nothing has moved. After a change that is meant to move the losses, write the new ones into GOLDEN."""
    got = [line["loss"] for line in log_of(golden.folder)] + [log_of(golden.folder, "gradcos.jsonl")[-1]["cosine"]]
    assert got == pytest.approx(GOLDEN[golden.name][1], rel=1e-4, abs=1e-6)  # with the versions of requirements.txt


def test_adamw_steps_with_clipped_gradients_and_the_log_has_the_whole_norm(golden):
    whole = [line["grad_norm"] for line in log_of(golden.folder)]
    assert golden.norms == pytest.approx([min(norm, 1.0) for norm in whole], rel=1e-4)  # A.2
    assert golden.name != "ablations" or max(whole) > 1.0 > min(whole)


def test_three_checkpoints_stay_and_their_header_says_how_to_sample(golden):
    assert sorted(d.name for d in golden.folder.glob("step-*")) == ["step-000004", "step-000005", "step-000006"]
    header = model.lora_header(sample.find_lora(golden.folder))
    cls, scope = ("item", "reference") if golden.name == "ablations" else ("front", "all")
    assert dict(base=BASE, cls=cls, fps="4.0", guidance="2.0", lora_scope=scope).items() <= header.items()
    assert json.loads(header["trained_by"])["token_drop"] == 0.5


# ---- the numbers of the paper, and ours where it is silent -----------------------------------------------------------

PAPER = dict(  # 5.1, A.1, A.2, Algorithm 1 and 3.2 to 3.4
    base="THUDM/CogVideoX-5b", lora_rank=128, lora_alpha=64, lora_dropout=0.1, lora_scope="all", frames=49, fps=8,
    p=0.2, task_schedule="switch", image_frame="first", random_frame=True, token_drop=0.5, drop="tokens", view_drop=0.5,
    cls="front", cls_video=True, steps=4000, image_batch=256, video_batch=32, lr=5e-5, warmup=200,
    save_every=50, pcgrad=0, recipe="paper", toy=False)
SILENT = dict(  # ours, or the authors' code
    crop_jitter=0.1, image_micro=1, video_micro=1, image_checkpointing="none", video_checkpointing="attention", seed=0,
    compile=False, int8=False, guidance=6.0, workers=4, gradcos_every=0, val_every=0, look=0, init_lora="", cache="",
    val_refs="", images="data/subjects200k", videos="data/pexels", out="out", name="subject", device="",
    tensorboard=False)
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


def test_every_default_and_preset_and_what_is_no_knob():
    """No knobs: checkpoints that stay, B.1's held-out batches, 8 full pictures in a VAE call, D.7's image steps."""
    assert vars(train.Config()) == PAPER | SILENT and vars(sample.Config()) == SAMPLING
    assert train.presets(True) == TOY and train.presets(recipe="authors") == AUTHORS
    assert train.presets(True, "authors") == TOY | AUTHORS | dict(image_micro=2, video_micro=2)
    # The knobs that a run may go on with; any other is part of what is trained.
    assert {f.name for f in dataclasses.fields(train.Config) if not f.metadata["trains"]} == set(
        "toy recipe tensorboard name out workers save_every guidance look gradcos_every val_every val_refs "
        "image_checkpointing video_checkpointing".split())
    assert (run.KEPT, train.HELD_OUT, model.VAE_PIXELS) == (3, {"image": 64, "video": 32}, 8 * 480 * 720)
    assert setup.image_stage(train.Config()) == 3200


# ---- LoRA, AdamW and its schedule (5.1, A.1, A.2) --------------------------------------------------------------------

def lora_layers(transformer):
    return {name: m for name, m in transformer.named_modules() if isinstance(m, model.LoraLayer)}


@pytest.fixture(scope="module")
def loaded(knobs):
    """(cfg, pipeline, parameters) of a run that takes A.1's LoRA."""
    cfg = train.Config(**{**knobs, "lora_rank": 128, "lora_alpha": 64.0, "lora_dropout": 0.1, "crop_jitter": 0.1})
    return setup.load_model(cfg, torch.device("cpu"))


def test_lora_is_that_of_A1_and_all_that_is_trained(loaded):
    """Rank 128, alpha 64 and dropout 0.1 on nine names. A is uniform within 1/sqrt(inputs), B is zero."""
    transformer = loaded[1].transformer
    in_block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
                "norm1.linear", "norm2.linear"]
    expected = {f"transformer_blocks.{i}.{name}" for i in range(5) for name in in_block}
    assert lora_layers(transformer).keys() == expected | {"patch_embed.proj", "patch_embed.text_proj"}
    trained = {id(p) for name, p in transformer.named_parameters() if "lora_" in name}
    assert trained == {id(p) for p in transformer.parameters() if p.requires_grad} == set(map(id, loaded[2]))
    for layer in lora_layers(transformer).values():
        assert layer.r == {"default": 128} and layer.scaling == {"default": 0.5}  # alpha / rank
        assert layer.lora_dropout["default"].p == 0.1 and layer.training and not layer.cast_input_dtype_enabled
        A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight
        bound = 1 / math.sqrt(A[0].numel())
        assert A.abs().max() <= bound and A.std() == pytest.approx(bound / math.sqrt(3), rel=0.1) and not B.any()


@pytest.fixture(scope="module")
def held_out(knobs, tmp_path_factory):
    """(cfg, pipeline, held-out batches) of a trained LoRA, with a view drop that would drop everything."""
    cfg = train.Config(**{**knobs, "init_lora": LORA, "view_drop": 1.0, "lora_dropout": 0.25, "crop_jitter": 0.1,
                          "image_frame": "random", "steps": 1, "val_every": 1, "gradcos_every": 1,
                          "out": str(tmp_path_factory.mktemp("held-out"))})
    cfg, pipe, _ = setup.load_model(cfg, torch.device("cpu"))
    return cfg, pipe, train.held_out_batches(cfg, pipe, (32, 32), 9, 16)


def test_init_lora_brings_rank_alpha_and_weights_and_the_flag_its_dropout(held_out):
    cfg, pipe, _ = held_out
    assert (cfg.lora_rank, cfg.lora_alpha, cfg.lora_scope) == (32, 16.0, "all")
    weights = model.load_file(sample.find_lora(LORA))
    for name, layer in lora_layers(pipe.transformer).items():
        assert layer.lora_dropout["default"].p == 0.25
        assert torch.equal(layer.lora_B["default"].weight, weights[f"transformer.{name}.lora_B.weight"])


def test_adamw_has_the_numbers_of_A2_and_the_papers_schedule():
    optimizer, schedule = setup.make_optimizer(train.Config(), [torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["initial_lr"] == 5e-5 and group["fused"]
    assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.95), 1e-8, 1e-4, False)
    rates = []  # 200 steps of warm-up, then half a cosine over 3,800
    for _ in range(4000):
        rates.append(group["lr"])
        optimizer.step()
        schedule.step()
    assert [rates[s] for s in (0, 100, 200, 2100, 3999)] == pytest.approx(
        [0, 2.5e-5, 5e-5, 2.5e-5, 2.5e-5 * (1 - math.cos(math.pi / 3800))], abs=1e-12)


# ---- draws, jitter and caches ----------------------------------------------------------------------------------------

def test_timesteps_are_uniform_over_all_thousand_and_noise_is_standard_normal():
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    t, noise = train.sample_noise(torch.zeros(20_000, 3), scheduler, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999
    assert (torch.bincount(t // 100, minlength=10) - 2000).abs().max() < 200  # 42 is the standard deviation
    assert noise.shape == (20_000, 3) and noise.mean().abs() < 0.02 and noise.std() == pytest.approx(1, abs=0.02)


def test_latents_are_draws_from_the_posterior_times_the_scaling_factor():
    """Mean 3, log-variance -2: standard deviation 1/e. CogVideoX-5B's factor is 0.7. A cache may hold bfloat16."""
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=0.7))
    moments = torch.cat([torch.full((1, 1, 4, 60, 60), 3.0), torch.full((1, 1, 4, 60, 60), -2.0)], 2).bfloat16()
    z = model.sample_latents(vae, moments, torch.Generator().manual_seed(0))
    assert z.dtype == torch.float32 and z.shape == (1, 1, 4, 60, 60)
    assert z.mean() == pytest.approx(0.7 * 3, abs=0.01) and z.std() == pytest.approx(0.7 / math.e, rel=0.02)
    assert torch.equal(model.sample_latents(vae, moments), torch.full_like(z, 0.7 * 3))  # sampling takes the mean


def test_jitter_zooms_by_up_to_its_share_and_shifts_by_half_of_it_either_way():
    """Uniform zoom in 1 to 1.2, uniform shift in -0.1 to 0.1 of the picture, along its longer side. The picture's
    values are its own columns in pixels: a cut shows where it is from, and its zoom."""
    picture, found = Image.fromarray(np.tile(np.arange(480, dtype=np.float32) + 0.5, (120, 1))), []
    for seed in range(400):
        cut = np.asarray(media.resize_center_crop(picture, 60, 60, 0.2, np.random.default_rng(seed)))
        line = cut[30, 5:-5]  # the filter bends the ramp at the picture's edges
        found.append((2 * (len(line) - 1) / (line[-1] - line[0]), line.mean() / 480 - 0.5))
    zoom, shift = np.array(found).T
    assert zoom.min() > 0.99 and zoom.max() < 1.21 and zoom.mean() == pytest.approx(1.1, abs=0.01)
    assert np.abs(shift).max() < 0.105 and abs(shift.mean()) < 0.01
    assert shift.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.1) and abs(np.corrcoef(zoom, shift)[0, 1]) < 0.15


def test_each_cached_crop_of_a_pair_is_drawn_in_both_directions(loaded, tmp_path):
    pair = {"image_0": REF, "image_1": REF, "description_0": "a", "description_1": "b"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    asked = dict(images=str(tmp_path), crop_jitter=0.5)
    latents.prepare_cache(latents.Latents(base=BASE, out=f"{tmp_path}/cache", crops=3, **asked))
    cfg = dataclasses.replace(loaded[0], cache=f"{tmp_path}/cache", p=0.0, videos="none", **asked)
    pairs = setup.open_data(cfg, loaded[1])[0]["image"]
    assert len({pairs[step, 0]["target_moments"].sum().item() for step in range(60)}) == 2 * 3


# ---- measuring (B.1) -------------------------------------------------------------------------------------------------

def test_losses_go_to_the_quarter_of_their_timestep_and_a_mixed_step_weighs_micro_batches_alike():
    losses, t = log.no_losses("cpu"), torch.tensor([0, 249, 250, 499, 500, 749, 750, 999])
    log.add_losses(losses, "image", torch.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 5.0, 0.0, 2.0]), t, 1000)  # mean 5.75
    log.add_losses(losses, "image", torch.tensor([5.0]), torch.tensor([100]), 1000)
    image = {"loss": pytest.approx(51 / 9), "loss_by_timestep": [3, 15, 5, 1]}
    assert log.loss_means(*losses["image"]) == image and not losses["video"].any()
    log.add_losses(losses, "video", torch.tensor([10.0]), t[-1:], 1000)
    assert log.step_means("mixed", losses) == {
        "loss": pytest.approx((5.75 + 5 + 10) / 3), "image": image,
        "video": {"loss": 10, "loss_by_timestep": [None, None, None, 10]}}


def test_held_out_batches_are_those_of_every_seed(held_out):
    """Pairs keep their reference and stand at any frame, clips keep half of it and begin at frame 1."""
    cfg, pipe, batches = held_out
    drawn = dataclasses.replace(cfg, seed=2**31 - 1)
    frames = [train.image_frame(drawn, train.MicroBatch("image", 0, i, []), 5) for i in range(2)]
    assert [batch["first_frame"] for _, batch in batches] == [*frames, 1, 1] and frames != [1, 1]
    assert [len(batch["latents"]) for _, batch in batches] == [4, 2, 2, 1]
    other_seed = train.held_out_batches(dataclasses.replace(cfg, seed=1), pipe, (32, 32), 9, 16)
    for (task, batch), (_, same) in zip(batches, other_seed):
        assert batch["reference"].abs().amax((1, 2, 3, 4)).min() > 0
        assert batch["keep"] is None if task == "image" else len(batch["keep"]) == 8
        assert all(torch.equal(batch[k], same[k]) for k in batch if torch.is_tensor(batch[k]))


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


# ---- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, asked, rate", [
    (dict(lora=LORA), [2.0, 1.0, 50, 9, 32, 32, [0]], 4),  # what the toy's LoRA and base say
    (dict(lora=LORA, guidance=3.5, ref_guidance=2.0, fps=16.0, seed=7, steps=9, frames=16, height=40, width=48),
     [3.5, 2.0, 9, 13, 40, 48, [7]], 16),  # 4k + 1 frames here
    (dict(lora=".", base=BASE), [6.0, 1.0, 50, 9, 32, 32, [0]], 8)])  # the authors' release has no header
def test_sampling_asks_for_what_lora_and_base_say_and_flags_win(tmp_path, monkeypatch, flags, asked, rate):
    """... with <cls>, an empty negative prompt and the picture's latents. Without a header alpha/rank is 0.5, too."""
    names = "guidance_scale ref_guidance num_inference_steps num_frames height width seeds".split()
    words = {"ref_guidance": 1.0}

    def answer(pipe, **said):
        seeds = [g.initial_seed() for g in said["generator"]]
        words.update(said | said["attention_kwargs"], seeds=seeds, transformer=pipe.transformer)
        return SimpleNamespace(frames=[[Image.new("RGB", (32, 32))] * said["num_frames"]])
    monkeypatch.setattr(CogVideoXPipeline, "__call__", answer)  # the stock pipeline's
    monkeypatch.setattr(sample, "guidance_on_picture", lambda _, S: nullcontext(words.update(ref_guidance=S)))
    monkeypatch.chdir(tmp_path)
    model.save_file(model.load_file(model.lora_path(LORA)), model.AUTHORS_LORA_FILE)
    sample.main(sample.Config(ref=REF, prompt="a creature", out="a.mp4", **flags))
    assert [words[name] for name in names] == asked
    pipe = sample.load(LORA)[0]
    assert all(map(torch.equal, words["transformer"].state_dict().values(), pipe.transformer.state_dict().values()))
    reference = sample.encode_references(pipe, [media.load_image(REF)], words["height"], words["width"])
    assert torch.allclose(words["reference"], reference, atol=1e-5)
    for name, text in (("prompt_embeds", "<cls> a creature"), ("negative_prompt_embeds", "")):
        assert torch.allclose(words[name], model.encode_prompt(pipe, [text]), atol=1e-5)
    with media.av.open("a.mp4") as container:
        assert container.streams.video[0].average_rate == rate


def test_the_newest_checkpoint_is_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, folder in ((3, "a/step-000009"), (1, "b/step-000002"), (2, "c/step-000005"), (0, "d/step-000007.tmp")):
        Path("out", folder).mkdir(parents=True)
        Path("out", folder, model.LORA_FILE).write_bytes(bytes(age))  # the newest is not the largest
        os.utime(Path("out", folder, model.LORA_FILE), (1000 - age, 1000 - age))
    assert sample.find_lora() == Path("out/b/step-000002", model.LORA_FILE)

