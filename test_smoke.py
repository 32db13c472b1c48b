"""Tests of the five scripts. Everything is compared with something we did not write (stock diffusers, closed forms) or
with an answer known beforehand. `pytest` needs no GPU and no download; all of it takes
a few minutes on two CPU cores."""
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # before torch: the tests compare bits

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import gradcos  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from model import SubjectTransformer, add_lora, load_lora, save_lora, v_loss  # noqa: E402

torch.set_num_threads(1)  # as the processes that are started below: the sum's order is part of the bits

ROOT = Path(__file__).parent
BASE = str(ROOT / "toy/base")
T, C, H, W, L, N = 3, 4, 8, 12, 5, 24  # a tiny model on frames that are not square; N tokens per latent frame


@pytest.fixture
def tiny():
    """A random tiny CogVideoX in our class and in the stock one, same weights."""
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=16, in_channels=C, out_channels=C, time_embed_dim=8,
                  text_embed_dim=12, num_layers=3, sample_width=W, sample_height=H, sample_frames=9,
                  max_text_seq_length=L, use_rotary_positional_embeddings=True)
    ours, stock = SubjectTransformer(**config).eval(), CogVideoXTransformer3DModel(**config).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return rand(2, T, C, H, W), rand(2, L, 12), torch.tensor([300, 700]), rand(2, 1, C, H, W)


def randomise_lora(transformer, seed=5):
    """LoRA starts at B = 0, where many mistakes cannot be seen."""
    g = torch.Generator().manual_seed(seed)
    for name, p in transformer.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.2


def rope(stock, frames):
    pipe = CogVideoXPipeline.__new__(CogVideoXPipeline)  # the stock tables, from the stock pipeline's own method
    pipe.vae_scale_factor_spatial = 8
    object.__setattr__(pipe, "transformer", stock)
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, H * 8, W * 8, frames, torch.device("cpu"))


# ---- the transformer against the stock one ---------------------------------------------------------------------------

def test_without_reference_it_is_the_stock_model(tiny, inputs):
    ours, stock = tiny
    x, text, t, _ = inputs
    expected = stock(x, text, t, image_rotary_emb=rope(stock, T)).sample
    assert torch.equal(ours(x, text, t).sample, expected)  # makes its own tables
    assert torch.equal(ours(x, text, t, image_rotary_emb=rope(stock, T)).sample, expected)


@pytest.mark.parametrize("shared", [False, True])
def test_reference_is_frame_zero(tiny, inputs, shared):
    """The stock transformer fed the reference as an extra first frame, its first output frame dropped."""
    ours, stock = tiny
    x, text, t, ref = inputs
    ref = ref[:1] if shared else ref
    whole = torch.cat([ref.expand(2, -1, -1, -1, -1), x], 1)
    expected = stock(whole, text, t, image_rotary_emb=rope(stock, T + 1)).sample[:, 1:]
    for got in (ours(x, text, t, reference=ref),
                ours(x, text, t, attention_kwargs={"reference": ref}, image_rotary_emb=rope(stock, T))):
        assert (got.sample - expected).abs().max() < 1e-6
    keep_all = ours(x, text, t, reference=ref, keep=torch.arange(N)).sample
    assert (keep_all - expected).abs().max() < 1e-6


def test_removing_tokens_equals_masking_them(tiny, inputs, monkeypatch):
    ours, _ = tiny
    x, text, t, ref = inputs
    keep = torch.tensor([0, 3, 4, 11, 20])
    removed = ours(x, text, t, reference=ref, keep=keep).sample
    visible = torch.ones(L + N + T * N, dtype=torch.bool)
    visible[L:L + N] = False
    visible[L + keep] = True
    stock_attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask=None, **kw: stock_attention(q, k, v, attn_mask=visible[None], **kw))
    assert (ours(x, text, t, reference=ref).sample - removed).abs().max() < 1e-6


def test_no_token_kept_is_text_to_video_at_frames_one_to_T(tiny, inputs):
    ours, stock = tiny
    x, text, t, ref = inputs
    shifted = tuple(table[N:] for table in rope(stock, T + 1))
    expected = stock(x, text, t, image_rotary_emb=shifted).sample
    got = ours(x, text, t, reference=ref, keep=torch.empty(0, dtype=torch.long)).sample
    assert (got - expected).abs().max() < 1e-6
    assert (got - ours(x, text, t).sample).abs().max() > 1e-4  # frames 0..T-1 are something else


def test_wrong_reference_shape_is_named(tiny, inputs):
    x, text, t, ref = inputs
    with pytest.raises(ValueError, match=r"reference must be"):
        tiny[0](x, text, t, reference=ref[..., :4])


def test_full_size_counts():
    """CogVideoX-5B on the meta device: the numbers of the design card."""
    with torch.device("meta"):
        transformer = SubjectTransformer(
            num_attention_heads=48, num_layers=42, time_embed_dim=512, text_embed_dim=4096, sample_width=90,
            sample_height=60, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False)
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_283_072
    parameters = add_lora(transformer, 128, 64)
    assert sum(p.numel() for p in parameters) == 502_276_096 and len(parameters) == 2 * 338
    assert model.SubjectTransformer.rotary_tables(transformer, 14, 60, 90, "cpu")[0].shape == (14 * 1350, 64)
    assert frame_size_of(transformer) == (480, 720)
    lengths = []
    transformer.transformer_blocks[-1].attn1.register_forward_pre_hook(
        lambda m, a, kw: lengths.append(kw["encoder_hidden_states"].shape[1] + kw["hidden_states"].shape[1]),
        with_kwargs=True)
    with torch.no_grad():
        for frames, keep in ((1, None), (13, None), (13, torch.arange(675)), (13, torch.arange(0))):
            latents = torch.empty(1, frames, 16, 60, 90, device="meta")  # 1 picture; 49 frames: 13 latent frames
            out = transformer(latents, torch.empty(1, 226, 4096, device="meta"), torch.empty(1, device="meta"),
                              reference=latents[:, :1], keep=keep).sample
            assert out.shape == latents.shape
    assert lengths == [226 + 1350 + 1350, 226 + 1350 + 17550, 226 + 675 + 17550, 226 + 17550]


def frame_size_of(transformer):
    from types import SimpleNamespace
    return model.frame_size(SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8))


def test_cls_has_a_row_in_t5_xxl(tmp_path):
    """A tokenizer of T5's size (32,000 pieces and 100 sentinels): <cls> takes id 32100 of 32,128 rows."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer
    spiece = sentencepiece_model_pb2.ModelProto.FromString(Path(BASE, "tokenizer/spiece.model").read_bytes())
    for i in range(32_000 - len(spiece.pieces)):
        spiece.pieces.add(piece=f"\u2581w{i}", score=-20.0)
    (tmp_path / "spiece.model").write_bytes(spiece.SerializeToString())
    tokenizer = T5Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 32_100
    tokenizer.add_tokens([model.REFERENCE_TOKEN], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(model.REFERENCE_TOKEN) == 32_100 < 32_128


# ---- LoRA ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scope", ["all", "reference"])
def test_fresh_lora_is_the_base(tiny, inputs, scope):
    ours, _ = tiny
    x, text, t, ref = inputs
    before = ours(x, text, t, reference=ref).sample
    add_lora(ours, 4, 2, scope=scope)
    assert (ours(x, text, t, reference=ref).sample - before).abs().max() < 1e-6


def test_lora_is_float32_on_a_bfloat16_base(tiny):
    parameters = add_lora(tiny[0].to(torch.bfloat16), 4, 2)
    assert parameters and all(p.dtype == torch.float32 for p in parameters)
    assert not any(p.requires_grad for n, p in tiny[0].named_parameters() if "lora_" not in n)


def test_reference_scope_leaves_text_and_video_alone(tiny, inputs):
    ours, stock = tiny
    x, text, t, ref = inputs
    add_lora(ours, 4, 2, scope="reference")
    randomise_lora(ours)
    assert torch.equal(ours(x, text, t).sample, stock(x, text, t, image_rotary_emb=rope(stock, T)).sample)

    whole = torch.cat([ref, x], 1)
    plain = stock.patch_embed(text, whole)
    seen = {}
    ours.patch_embed.register_forward_hook(lambda m, i, out: seen.update(tokens=out))
    for name in ("norm1", "ff"):
        getattr(ours.transformer_blocks[0], name).register_forward_pre_hook(
            lambda m, i, name=name: seen.update({name + "_in": i}))
        getattr(ours.transformer_blocks[0], name).register_forward_hook(
            lambda m, i, out, name=name: seen.update({name: out}))
    ours(x, text, t, reference=ref)
    same = lambda a, b: torch.allclose(a, b, atol=1e-6)
    assert same(seen["tokens"][:, :L], plain[:, :L]) and same(seen["tokens"][:, L + N:], plain[:, L + N:])
    assert not same(seen["tokens"][:, L:L + N], plain[:, L:L + N])
    got, base = seen["norm1"], stock.transformer_blocks[0].norm1(*seen["norm1_in"])
    assert same(got[0][:, N:], base[0][:, N:]) and not same(got[0][:, :N], base[0][:, :N])  # video, reference
    assert same(got[1], base[1]) and same(got[3], base[3])                                  # text and its gate
    assert same(got[2][:, N:], base[2].expand(-1, T * N, -1))
    got, base = seen["ff"], stock.transformer_blocks[0].ff(*seen["ff_in"])
    rest = torch.ones(L + N + T * N, dtype=torch.bool)
    rest[L:L + N] = False
    assert same(got[:, rest], base[:, rest]) and not same(got[:, ~rest], base[:, ~rest])


@pytest.mark.parametrize("scope", ["all", "reference"])
def test_gradient_checkpointing_changes_nothing(tiny, inputs, scope):
    ours, _ = tiny
    x, text, t, ref = inputs
    parameters = add_lora(ours, 4, 2, scope=scope)
    randomise_lora(ours)
    gradients = []
    for checkpointing in (False, True):
        ours.train()
        ours.enable_gradient_checkpointing() if checkpointing else ours.disable_gradient_checkpointing()
        # Two forwards before one backward, with different spans: recomputation must see the right one.
        loss = sum(ours(x, text, t, reference=ref, keep=keep).sample.square().mean()
                   for keep in (None, torch.arange(5)))
        gradients.append(torch.autograd.grad(loss, parameters))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-7)
        assert a.abs().max() > 0  # nothing that is trained is without a gradient


def test_lora_round_trip_and_stock_loader(tiny, inputs, tmp_path):
    """Our file, loaded by us and by stock diffusers, at the right scale (a lost alpha would double it)."""
    ours, stock = tiny
    x, text, t, ref = inputs
    add_lora(ours, 4, 2)
    randomise_lora(ours)
    save_lora(ours, tmp_path, base="somewhere")
    expected = ours(x, text, t, reference=ref).sample

    again = SubjectTransformer(**{k: v for k, v in stock.config.items() if not k.startswith("_")}).eval()
    again.load_state_dict(stock.state_dict())
    load_lora(again, tmp_path)
    assert torch.equal(again(x, text, t, reference=ref).sample, expected)

    state, metadata = CogVideoXPipeline.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    CogVideoXPipeline.load_lora_into_transformer(state, stock, metadata=metadata)
    got = stock(torch.cat([ref, x], 1), text, t, image_rotary_emb=rope(stock, T + 1)).sample[:, 1:]
    assert (got - expected).abs().max() < 1e-6


def test_lora_of_another_base_and_lora_without_alpha(tiny, tmp_path, capsys):
    ours, stock = tiny
    add_lora(ours, 4, 2)
    randomise_lora(ours)
    save_lora(ours, tmp_path, base="here")
    other = SubjectTransformer(**{k: v for k, v in stock.config.items() if not k.startswith("_")})
    with pytest.raises(ValueError, match="was trained on the base here"):
        load_lora(other, tmp_path)
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        load_lora(other, tmp_path / "nothing")
    # The authors' release: another file name, no metadata.
    weights = model.load_file(tmp_path / model.LORA_FILE)
    (tmp_path / "v1").mkdir()
    model.save_file(weights, tmp_path / "v1" / "pytorch_lora_weights_transformer.safetensors")
    other.load_state_dict(stock.state_dict())
    load_lora(other, tmp_path / "v1")
    assert other.peft_config["default"].lora_alpha / other.peft_config["default"].r == 0.5
    assert "0.5" in capsys.readouterr().out
    weights.pop(next(iter(weights)))
    model.save_file(weights, tmp_path / "v1" / "pytorch_lora_weights_transformer.safetensors")
    fresh = SubjectTransformer(**{k: v for k, v in stock.config.items() if not k.startswith("_")})
    with pytest.raises(ValueError, match="does not fit"):
        load_lora(fresh, tmp_path / "v1")


# ---- loss, text ------------------------------------------------------------------------------------------------------

def test_v_loss_closed_form(tiny, inputs):
    """Against the definition, and against the diffusers example's x0 loss with weight 1/(1-a)."""
    ours, _ = tiny
    x, text, t, ref = inputs
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    got = v_loss(ours, scheduler, x, text, t, noise, ref)
    a = scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    v_pred = ours(noisy, text, t, reference=ref).sample
    v = a.sqrt() * noise - (1 - a).sqrt() * x
    assert torch.allclose(got, (v_pred - v).square().mean((1, 2, 3, 4)), atol=1e-6)
    x0_pred = scheduler.get_velocity(v_pred, noisy, t)  # the example's odd call: sqrt(a) x_t - sqrt(1-a) v_pred
    assert torch.allclose(got, ((x0_pred - x).square() / (1 - a)).mean((1, 2, 3, 4)), rtol=1e-4)


def test_v_loss_keeps_small_timesteps_in_bfloat16():
    """diffusers rounds alpha-bar to the samples' dtype, and in bf16 that is 1.0 for t = 0 and 1: no noise at all."""
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    x, noise = torch.randn(2, 2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = {}

    def model(noisy, *args, **kwargs):
        seen["noisy"] = noisy
        return (torch.zeros_like(noisy),)

    v_loss(model, scheduler, x, None, torch.tensor([1, 1]), noise)
    a = scheduler.alphas_cumprod[1].float()
    assert torch.allclose(seen["noisy"], a.sqrt() * x.float() + (1 - a).sqrt() * noise.float(), atol=1e-6)


@pytest.fixture(scope="module")
def toy():
    return model.load_pipeline(BASE)


def test_cls_token_reaches_the_text_encoder(toy):
    assert model.with_reference_token("a cat") == "<cls> a cat"
    assert model.with_reference_token("a <cls> cat") == "a <cls> cat"
    assert model.with_reference_token("a cat", cls=False) == "a cat"
    ids = toy.tokenizer("<cls> a creature").input_ids
    assert ids[0] == len(toy.tokenizer) - 1 and ids.count(ids[0]) == 1
    with_, without = model.encode_prompt(toy, ["<cls> a creature walks", "a creature walks"])
    assert with_.shape == (toy.transformer.config.max_text_seq_length, toy.text_encoder.config.d_model)
    assert (with_ - without).abs().max() > 0.1


def test_vae_encoding(toy):
    pixels = torch.rand(2, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = model.encode_video(toy.vae, pixels)
    stock = toy.vae.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2) * toy.vae.config.scaling_factor
    assert z.shape == (2, 5, 4, 16, 16) and torch.equal(z, stock)
    draws = [model.encode_video(toy.vae, pixels, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# ---- sampling --------------------------------------------------------------------------------------------------------

def test_tiles_that_do_not_fit_are_not_used(toy, capsys):
    """On the toy's VAE diffusers' own tiling would change the size; at 480x720 the tiles fit."""
    x = torch.zeros(1, 1, 3, 32, 32)
    expected = model.encode_moments(toy.vae, x)
    toy.vae.enable_tiling()
    assert model.encode_moments(toy.vae, x).shape != expected.shape
    model.tile_vae(toy.vae)
    assert torch.equal(model.encode_moments(toy.vae, x), expected)
    toy.vae.disable_slicing()
    assert "do not fit together" in capsys.readouterr().err
    config = dict(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2, latent_channels=4,
                  down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4)
    large = type(toy.vae)(**config)  # sample_height and sample_width are the real ones: 480, 720
    model.tile_vae(large)
    assert large.use_tiling and large.use_slicing
    assert model.encode_moments(large, torch.zeros(1, 1, 3, 480, 720)).shape == (1, 1, 8, 60, 90)


def test_sampler_is_the_stock_pipeline(toy):
    stock = CogVideoXPipeline.from_pretrained(BASE)
    assert type(stock.transformer) is CogVideoXTransformer3DModel
    prompt = "a creature walks up over a tan field"
    (ours,) = sample.generate(toy, None, [prompt], [7], steps=4, cls=False)
    theirs = stock(prompt, num_inference_steps=4, guidance_scale=6.0, height=32, width=32, num_frames=9,
                   max_sequence_length=16, generator=torch.Generator().manual_seed(7)).frames[0]
    assert len(ours) == 9 and all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_saved_lora_in_the_stock_pipeline(tmp_path):
    """The stock pipeline with load_lora_weights gives our output when our transformer is put into it."""
    ours, stock = model.load_pipeline(BASE), model.load_pipeline(BASE)
    add_lora(ours.transformer, 4, 2)
    randomise_lora(ours.transformer)
    save_lora(ours.transformer, tmp_path)
    stock.load_lora_weights(str(tmp_path))
    picture = [Image.new("RGB", (50, 40), "red")]
    latents = sample.encode_references(ours, picture, 32, 32)
    a, b = (sample.generate(p, latents, ["a creature walks"], [0], steps=3, dynamic_cfg=True)[0] for p in (ours, stock))
    difference = max(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() for x, y in zip(a, b))
    assert difference <= 1 and np.asarray(a[0]).std() > 1


def run(*command, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, **{"cwd": ROOT, **kw})


def test_sample_command_line(tmp_path):
    """The README's first command, twice: same seed, same file."""
    ref = str(ROOT / "toy/refs/creature-0.png")
    r = run(str(ROOT / "sample.py"), "--ref", ref, "--lora", str(ROOT / "toy/lora"), "--steps", "8",
            "--out", str(tmp_path / "a.mp4"), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    sample.main(sample.Config(ref=ref, lora=str(ROOT / "toy/lora"), steps=8, out=str(tmp_path / "b.mp4")))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(data.load_clip(tmp_path / "a.mp4", 9, 4)) == 9
    assert Image.open(tmp_path / "a.png").size == (7 * 256 + 6 * 4, 256)


def test_sample_several_prompts_one_frame_no_reference(tmp_path):
    (tmp_path / "prompts.txt").write_text("a creature walks up\n\na creature stands\n")
    sample.main(sample.Config(prompts=str(tmp_path / "prompts.txt"), lora=str(ROOT / "toy/lora"), frames=1, steps=2,
                              guidance=1.0, enlarge=2, device="cpu", out=str(tmp_path / "x.png")))
    assert {f.name: Image.open(f).size for f in tmp_path.glob("*.png")} == {"x-0.png": (64, 64), "x-1.png": (64, 64)}


def test_the_authors_release_on_the_command_line(tmp_path):
    """Their layout (another file name, no header): loads at alpha/rank 0.5, which is also what our file says."""
    (tmp_path / "v1").mkdir()
    weights = model.load_file(model.lora_path(ROOT / "toy/lora"))
    model.save_file(weights, tmp_path / "v1" / "pytorch_lora_weights_transformer.safetensors")
    ref = str(ROOT / "toy/refs/creature-0.png")
    r = run(str(ROOT / "sample.py"), "--ref", ref, "--steps", "4", "--fps", "4", "--out", "v1.mp4", "--lora", "v1",
            "--base", BASE, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    sample.main(sample.Config(ref=ref, lora=str(ROOT / "toy/lora"), steps=4, fps=4.0, out=str(tmp_path / "ours.mp4")))
    assert "v1/pytorch_lora_weights_transformer.safetensors does not say its alpha: using the paper's" in r.stdout
    assert (tmp_path / "v1.mp4").read_bytes() == (tmp_path / "ours.mp4").read_bytes()


def test_sample_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # do not wait for a network
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    ok = dict(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), out=str(tmp_path / "x.mp4"))
    for change, message in [(dict(ref="nowhere.png"), "no picture at nowhere.png"),
                            (dict(ref=str(broken)), "cannot read the picture .*broken.png"),
                            (dict(lora="nowhere"), "no LoRA at nowhere"),
                            (dict(base="./nowhere"), "no base at ./nowhere"),
                            (dict(base="nobody/nothing"), "no folder nobody/nothing, and the hub did not give it"),
                            (dict(lora=str(broken)), "cannot read the LoRA .*broken.png"),
                            (dict(ref="", prompt=""), "what should happen[?] Pass --ref"),
                            (dict(prompts="nowhere.txt"), "--prompts: no file nowhere.txt"),
                            (dict(out="x.gif"), "--out must end in .mp4 or .mov or .mkv, got 'x.gif'"),
                            (dict(height=30), "multiples of 8"),
                            (dict(device="banana"), "--device 'banana' is none"),
                            (dict(device="cuda"), "--device cuda:0: torch .* sees 0 GPUs"),
                            (dict(offload="model", device="cpu"), "--offload model keeps weights off a GPU"),
                            (dict(offload="cpu"), "--offload must be")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sample.main(sample.Config(**{**ok, **change}))


# ---- data ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("padding", [2, 8, 16])
def test_split_views_with_shared_padding(padding):
    s = 512
    sheet = Image.new("RGB", (2 * s + 3 * padding, s + 2 * padding), "white")
    sheet.paste("red", (padding, padding, padding + s, padding + s))
    sheet.paste("blue", (2 * padding + s, padding, 2 * padding + 2 * s, padding + s))
    left, right = data.split_views(sheet)
    assert left.size == right.size == (s, s)
    assert left.getcolors() == [(s * s, (255, 0, 0))] and right.getcolors() == [(s * s, (0, 0, 255))]


def test_split_views_in_the_middle():
    sheet = Image.new("RGB", (1056, 528), "white")
    sheet.paste("red", (8, 8, 520, 520))
    sheet.paste("blue", (536, 8, 1048, 520))
    left, right = data.split_views(sheet)
    assert left.getcolors()[0][1] == (255, 0, 0) and right.getcolors()[0][1] == (0, 0, 255)
    assert len(left.getcolors()) == len(right.getcolors()) == 1 and left.size == right.size


def test_load_image_modes(tmp_path):
    def saved(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return np.asarray(data.load_image(tmp_path / name))
    deep = Image.fromarray(np.full((4, 6), 0x8080, np.uint16))
    assert saved(deep, "deep.png").tolist()[0][0] == [128, 128, 128]  # convert("RGB") alone would give 255
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    assert saved(clear, "clear.png")[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert saved(palette, "palette.png")[0, 0].tolist() == [200, 100, 50]
    assert saved(palette, "alpha.png", transparency=1)[0, 0].tolist() == [255, 255, 255]
    assert saved(Image.new("CMYK", (6, 4)), "cmyk.jpg").shape == (4, 6, 3)
    assert saved(Image.new("L", (6, 4), 77), "grey.png")[0, 0].tolist() == [77] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert saved(Image.new("RGB", (6, 4)), "turned.jpg", exif=exif).shape == (6, 4, 3)


def test_cover():
    rows = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (100, 60, 3))
    cut = np.asarray(data.cover(Image.fromarray(rows.copy()), 30, 60))
    assert cut.shape == (30, 60, 3) and cut[:, 0, 0].tolist() == list(range(35, 65))  # the middle, untouched
    blocks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    big = blocks.resize((256, 256), Image.NEAREST)
    assert np.array_equal(data.cover(big, 32, 32), blocks)  # whole-number shrinking is exact
    a, b = (np.asarray(data.cover(big, 32, 32, 0.2, np.random.default_rng(s))) for s in (0, 1))
    assert a.shape == b.shape == (32, 32, 3) and not np.array_equal(a, b)


def write_clip(path, levels, fps, caption="a thing moves"):
    data.save_video(path, [Image.new("RGB", (64, 64), (v, v, v)) for v in levels], fps)
    if caption:
        path.with_suffix(".txt").write_text(caption)


def test_load_clip_picks_frames_by_time(tmp_path):
    write_clip(tmp_path / "a.mp4", range(0, 240, 8), 24)  # 30 frames at 24 fps; brightness 8n
    at8 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 9, 8)]
    assert np.allclose(at8, [8 * 3 * k for k in range(9)], atol=3)
    at24 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 17, 24)]
    assert np.allclose(at24, [8 * k for k in range(17)], atol=3)
    at48 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 9, 48)]  # slower clips repeat frames
    assert np.allclose(at48, [8 * (k // 2) for k in range(9)], atol=3)
    with pytest.raises(ValueError, match="too short: 10 frames at 8 fps, 17 asked"):
        data.load_clip(tmp_path / "a.mp4", 17, 8)


def test_clip_frames():
    assert [data.clip_frames(n) for n in (1, 8, 9, 13, 16, 17, 49, 50)] == [1, 1, 9, 9, 9, 17, 49, 49]
    assert [data.clip_frames(n, 2) for n in (4, 5, 9, 12)] == [1, 5, 9, 9]


def test_corrupt_clip_is_skipped_and_counted(tmp_path):
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", [60 * i + 20] * 9, 8)
    whole = (tmp_path / "1.mp4").read_bytes()
    (tmp_path / "1.mp4").write_bytes(whole[:len(whole) // 3])
    clips = data.Clips(tmp_path, (16, 16), 9, 8)
    items = [clips[step, 0] for step in range(12)]
    skipped = [reason for item in items for reason in item["skipped"]]
    assert skipped and all("1.mp4" in reason for reason in skipped)
    assert {int(item["pixels"].float().mean().round() / 60) for item in items} == {0, 2}
    for f in ("0.mp4", "2.mp4"):
        (tmp_path / f).write_bytes(b"")
    with pytest.raises(ValueError, match="20 video samples in a row"):
        clips[0, 0]


def test_random_reference_frame_and_statelessness(tmp_path):
    write_clip(tmp_path / "a.mp4", range(0, 180, 20), 8)
    clips = data.Clips(tmp_path, (16, 16), 9, 8)
    first = data.Clips(tmp_path, (16, 16), 9, 8, random_frame=False)
    picked = set()
    for step in range(30):
        item = clips[step, 0]
        frame = [i for i in range(9) if torch.equal(item["pixels"][i:i + 1], item["reference"])]
        picked.update(frame)
        assert len(frame) == 1 and torch.equal(clips[step, 0]["reference"], item["reference"])
        assert torch.equal(first[step, 0]["reference"], item["pixels"][:1])
    assert len(picked) > 5


def test_pairs_serve_both_directions(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    record = {"image_0": "a.png", "image_1": "b.png", "description_0": "red one", "description_1": "blue one"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    pairs = data.ImagePairs(tmp_path, (16, 16))
    seen = {}
    for step in range(20):
        item = pairs[step, 0]
        seen[item["prompt"]] = item["pixels"][0, :, 0, 0].tolist(), item["reference"][0, :, 0, 0].tolist()
    assert seen == {"red one": ([255, 0, 0], [0, 0, 255]), "blue one": ([0, 0, 255], [255, 0, 0])}


def test_data_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of clips at"):
        data.Clips(tmp_path / "none", (16, 16), 9, 8)
    with pytest.raises(ValueError, match="no clips in"):
        data.Clips(tmp_path, (16, 16), 9, 8)
    with pytest.raises(ValueError, match="no image pairs in"):
        data.ImagePairs(tmp_path, (16, 16))
    write_clip(tmp_path / "a.mp4", [0] * 9, 8, caption="")
    with pytest.raises(FileNotFoundError, match="a.mp4 has no caption"):
        data.Clips(tmp_path, (16, 16), 9, 8)


# ---- train -----------------------------------------------------------------------------------------------------------

def test_coin():
    cfg = train.Config()
    tasks = [train.task_of(cfg, s) for s in range(4000)]
    assert abs(tasks.count("video") / 4000 - 0.2) < 0.02
    assert tasks == [train.task_of(train.Config(lr=1.0), s) for s in range(4000)]
    assert tasks != [train.task_of(train.Config(seed=1), s) for s in range(4000)]
    assert {train.task_of(train.Config(p=0.0), s) for s in range(99)} == {"image"}
    assert {train.task_of(train.Config(p=1.0), s) for s in range(99)} == {"video"}
    two = [train.task_of(train.Config(schedule="two_stage", steps=100), s) for s in range(100)]
    assert two == ["image"] * 80 + ["video"] * 20


def test_kept_tokens():
    cfg = train.Config()
    keeps = [train.kept_tokens(cfg, "video", s, 0, 1350) for s in range(40)]
    assert all(len(k) == 675 and len(k.unique()) == 675 and k.max() < 1350 for k in keeps)
    assert abs(torch.stack(keeps).float().mean() - 674.5) < 15 and not torch.equal(keeps[0], keeps[1])
    assert train.kept_tokens(train.Config(token_drop=0.0), "video", 0, 0, 1350) is None
    assert len(train.kept_tokens(train.Config(token_drop=1.0), "video", 0, 0, 1350)) == 0
    dropped = [train.kept_tokens(cfg, "image", s, 0, 1350) is not None for s in range(400)]
    assert abs(np.mean(dropped) - 0.5) < 0.1
    assert all(train.kept_tokens(train.Config(view_drop=0.0), "image", s, 0, 9) is None for s in range(50))


@pytest.fixture(scope="module")
def knobs(tmp_path_factory):
    """The knobs of a run of seconds on a small toy world; every test that trains starts from these."""
    from toy import world
    folder = tmp_path_factory.mktemp("toy")
    world.write_pairs(folder / "pairs", n=40)
    world.write_clips(folder / "clips", n=6)
    world.write_pairs(folder / "val_pairs", n=6, seed=1)
    world.write_clips(folder / "val_clips", n=3, seed=1)
    return {**train.TOY, "base": BASE, "images": str(folder / "pairs"), "videos": str(folder / "clips"),
            "val_images": str(folder / "val_pairs"), "val_videos": str(folder / "val_clips"), "val_pairs": 6,
            "val_clips": 3, "val_every": 0, "sample_every": 0, "image_batch": 8, "image_micro": 4, "video_batch": 4,
            "video_micro": 2, "dropout": 0.1, "view_drop": 0.3, "save_every": 3, "p": 0.5, "steps": 6, "rank": 4,
            "alpha": 2.0}


def command(knobs, **more):
    """The same as a command line, for torchrun and for what needs a process of its own."""
    flags = [str(word) for name, value in {**knobs, **more}.items() if value != "" for word in (f"--{name}", value)]
    return [str(ROOT / "train.py"), "--toy", *flags]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def log_of(run, file="log.jsonl"):
    records = [json.loads(line) for line in (Path(run) / file).read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def log_lines(run):
    return (Path(run) / "log.jsonl").read_text().splitlines()


def weights_of(run, step=6):
    file = Path(run) / f"step-{step:06d}" / model.LORA_FILE
    return torch.cat([v.flatten() for _, v in sorted(model.load_file(file).items())])


def go_back(run, step, new):
    """A copy of `run` as if it had been killed after the checkpoint of `step`: later lines are in the logs."""
    shutil.copytree(run, new)
    for checkpoint in Path(new).glob("step-*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)


def test_training_resume_and_two_ranks(knobs, tmp_path):
    """The real command line: a whole run; one stopped in the middle and gone on with; one on two ranks."""
    r = run(*command(knobs, name="whole"), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    whole = log_of(tmp_path / "out/whole")
    assert [line["step"] for line in whole] == list(range(6))
    assert [line["task"] for line in whole] == [train.task_of(train.Config(p=0.5), s) for s in range(6)]
    assert sorted(d.name for d in (tmp_path / "out/whole").glob("step-*")) == ["step-000003", "step-000006"]
    assert model.lora_header(tmp_path / "out/whole/step-000006")["base"] == BASE

    go_back(tmp_path / "out/whole", 3, tmp_path / "out/killed")
    (tmp_path / "out/killed/step-000005.tmp").mkdir()  # a save was half done
    (tmp_path / "out/killed/log.jsonl").open("a").write('{"step": 6, "ta')  # and a line half written
    r = run(*command(knobs, name="killed"), cwd=tmp_path)
    assert r.returncode == 0 and "going on from step 3" in r.stdout, r.stderr
    assert log_of(tmp_path / "out/killed") == whole  # bit for bit
    assert torch.equal(weights_of(tmp_path / "out/killed"), weights_of(tmp_path / "out/whole"))
    assert not list((tmp_path / "out/killed").glob("*.tmp"))
    assert "complete" in run(*command(knobs, name="killed"), cwd=tmp_path).stdout
    r = run(*command(knobs, name="killed", lr=1.0), cwd=tmp_path)
    assert r.returncode == 1 and "lr was 0.00" in r.stderr and "choose another --name" in r.stderr

    # Two ranks go on where one was; and measure, which one rank below does alike.
    go_back(tmp_path / "out/whole", 3, tmp_path / "out/two")
    r = run(*TORCHRUN, *command(knobs, name="two", gradcos_every=2, val_every=2), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    two = log_of(tmp_path / "out/two")
    assert [line["task"] for line in two] == [line["task"] for line in whole]
    assert np.allclose([line["loss"] for line in two], [line["loss"] for line in whole], rtol=1e-5)
    a, b = weights_of(tmp_path / "out/two"), weights_of(tmp_path / "out/whole")
    assert (a - b).norm() / b.norm() < 1e-5

    go_back(tmp_path / "out/whole", 3, tmp_path / "out/one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train.train(train.Config(**{**knobs, "name": "one", "gradcos_every": 2, "val_every": 2}))
    assert log_of(tmp_path / "out/one") == whole and torch.equal(weights_of(tmp_path / "out/one"), b)
    for file, keys in (("gradcos.jsonl", ("cosine", "norm_img", "norm_vid")), ("val.jsonl", ())):
        one, two = log_of(tmp_path / "out/one", file), log_of(tmp_path / "out/two", file)
        assert [line["step"] for line in one] == [line["step"] for line in two] == [4, 6]
        for x, y in zip(one, two):
            pairs = [(x[k], y[k]) for k in keys] or [(x[t]["loss"], y[t]["loss"]) for t in ("image", "video")]
            assert np.allclose(*zip(*pairs), rtol=1e-4)


def test_help_explains_every_knob_and_does_not_wait_for_diffusers():
    r = run("-X", "importtime", str(ROOT / "train.py"), "--toy", "--help")
    assert r.returncode == 0 and " torch\n" in r.stderr and "diffusers" not in r.stderr
    for knob in dataclasses.fields(train.Config):
        assert f"--{knob.name} " in r.stdout and knob.metadata["help"]
    assert "(default: toy/base)" in " ".join(r.stdout.split())  # --toy shows its own defaults


def test_train_command_line_errors(tmp_path, monkeypatch, capsys):
    r = run(str(ROOT / "train.py"), "--toy", "--no_such_flag", "1", cwd=tmp_path)
    assert r.returncode == 2 and "unrecognized arguments: --no_such_flag" in r.stderr and "Traceback" not in r.stderr
    assert len(r.stderr.splitlines()) == 2  # the usage is one line, not all knobs
    monkeypatch.chdir(tmp_path)
    for flags, message in [(["--steps", "many"], "argument --steps: invalid int value: 'many'"),
                           (["--base", BASE, "--images", "typo"], "no folder of image pairs at typo"),
                           (["--p", "1.5"], "--p must be in [0, 1], got 1.5")]:
        with pytest.raises(SystemExit) as stop:
            data.command_line(train.train, train.Config, "", ["--sample_every", "0", *flags])
        assert message in f"{stop.value} {capsys.readouterr().err}"


def test_train_errors(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    write_clip(tmp_path / "short/a.mp4", [0] * 5, 4)
    for change, message in [(dict(base="./nowhere"), "no base at"), (dict(images="nowhere"), "no folder of image pa"),
                            (dict(videos="empty"), "no clips in empty"), (dict(videos="short"), "too short: 5 frames"),
                            (dict(init_lora="nowhere"), "no LoRA at"), (dict(height=20), "multiples of 8"),
                            (dict(image_batch=33), "--image_batch 33"), (dict(lora_scope="some"), "lora_scope"),
                            (dict(lora_scope="reference", token_drop=1.0), "nothing to train"),
                            (dict(rank=0), "--rank must be positive"), (dict(schedule="x"), "--schedule"),
                            (dict(pcgrad=1), "a buffer needs 2"), (dict(val_every=-1), "--val_every must not be"),
                            (dict(val_every=1, val_images="none"), "no folder of image pairs at none")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(train.Config(**{**knobs, **change}))


def test_reference_scope_and_init_lora_train(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "steps": 3, "view_drop": 0.0}
    train.train(train.Config(**{**knobs, "lora_scope": "reference", "gradient_checkpointing": True, "name": "scoped"}))
    assert model.lora_header("out/scoped/step-000003")["lora_scope"] == "reference"
    train.train(train.Config(**{**knobs, "init_lora": "out/scoped/step-000003", "name": "on", "steps": 1}))
    pipe = model.load_pipeline(BASE)
    load_lora(pipe.transformer, "out/on/step-000001")
    assert pipe.transformer.lora_scope == "reference"


needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="--int8: pip install torchao")


def test_two_stages_have_a_schedule_each_and_resume(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = train.Config(**{**knobs, "name": "whole", "schedule": "two_stage", "p": 0.5, "steps": 8, "warmup": 2,
                          "save_every": 2, "keep": 9, "lr": 1.0e-3})
    train.train(cfg)
    whole = log_of("out/whole")
    assert [line["task"] for line in whole] == ["image"] * 4 + ["video"] * 4
    assert [line["lr"] for line in whole] == pytest.approx([0, 5e-4, 1e-3, 5e-4] * 2)  # warm-up 2, cosine over 2
    go_back("out/whole", 6, "out/killed")
    train.train(dataclasses.replace(cfg, name="killed"))
    assert log_of("out/killed") == whole and torch.equal(weights_of("out/killed", 8), weights_of("out/whole", 8))


def test_int8_without_torchao_says_so(monkeypatch):
    monkeypatch.setattr(model, "is_torchao_available", lambda: False)
    with pytest.raises(ValueError, match="--int8 needs torchao: pip install"):
        model.load_pipeline(BASE, int8=True)


@needs_torchao
def test_int8_layers_follow_autocast():
    transformer = model.load_pipeline(BASE, int8=True).transformer
    add_lora(transformer, 4, 2.0)
    dtypes = set()
    for block in transformer.transformer_blocks:
        block.attn1.to_q.register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
        block.ff.net[2].register_forward_hook(lambda m, args, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        transformer(torch.randn(1, 3, 4, 16, 16), torch.randn(1, 16, 64), torch.tensor([500]))
    assert dtypes == {torch.bfloat16}


@needs_torchao
@pytest.mark.slow("a torchrun job")
def test_int8_on_two_ranks(knobs, tmp_path):
    r = run(*TORCHRUN, *command(knobs, name="x", int8=True), cwd=tmp_path)
    assert r.returncode == 0, r.stderr


@needs_torchao
def test_int8_base_trains_and_its_lora_fits_the_full_one(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = {**knobs, "steps": 2, "gradient_checkpointing": True}
    train.train(train.Config(**{**knobs, "name": "full"}))
    train.train(train.Config(**{**knobs, "name": "int8", "int8": True}))
    full, int8 = log_of("out/full"), log_of("out/int8")
    assert full[0]["loss"] != int8[0]["loss"] and np.isclose(full[0]["loss"], int8[0]["loss"], rtol=0.02)
    assert np.isclose(full[0]["grad_norm"], int8[0]["grad_norm"], rtol=0.1)
    load_lora(model.load_pipeline(BASE).transformer, "out/int8")


def test_nan_stops_the_run(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    true_loss = train.v_loss
    monkeypatch.setattr(train, "v_loss", lambda *a, **k: true_loss(*a, **k) * float("nan"))
    with pytest.raises(SystemExit, match=r"step 0 \(image\): loss nan"):
        train.train(train.Config(**{**knobs, "p": 0.0}))
    assert not list(Path("out/toy").glob("step-*"))


def test_infinite_gradient_stops_the_run(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = torch.nn.utils.clip_grad_norm_

    def overflow(parameters, max_norm):
        parameters[0].grad[0] = float("inf")
        return clip(parameters, max_norm)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(SystemExit, match=r"step 0 \(video\): loss 0\.\d+, gradient norm inf"):
        train.train(train.Config(**{**knobs, "p": 1.0}))


def start_and_wait(args, run, steps, cwd):
    """Start a command and return once the log that it begins (or begins again) holds this many steps."""
    inode = lambda: (run / "log.jsonl").stat().st_ino if (run / "log.jsonl").is_file() else None
    before = inode()
    process = subprocess.Popen([sys.executable, *args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    until = time.time() + 120
    while time.time() < until and process.poll() is None:
        if inode() not in (None, before) and (run / "log.jsonl").read_text().count("\n") >= steps:
            return process
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


def test_sigterm_saves_and_the_run_goes_on(knobs, tmp_path):
    knobs = {**knobs, "steps": 30, "save_every": 100, "workers": 1}
    process = start_and_wait(command(knobs, name="whole"), tmp_path / "out/whole", 4, tmp_path)
    os.killpg(process.pid, signal.SIGTERM)  # the worker gets it too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in output, output
    (checkpoint,) = (tmp_path / "out/whole").glob("step-*")
    assert 4 <= int(checkpoint.name[5:]) < 30
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        train.train(train.Config(**{**knobs, "name": "whole"}))
        train.train(train.Config(**{**knobs, "name": "again"}))
    assert log_of(tmp_path / "out/whole") == log_of(tmp_path / "out/again")
    assert torch.equal(weights_of(tmp_path / "out/whole", 30), weights_of(tmp_path / "out/again", 30))


def test_full_disk_keeps_the_last_checkpoint(knobs, tmp_path):
    """No file may grow past 1 MB: the log fits, a checkpoint of rank 4 fits, one of rank 64 does not."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); " \
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    r = run(*command(knobs, name="full", rank=64, steps=3), cwd=tmp_path)
    go_on = command(knobs, name="full", rank=64, steps=3)
    assert r.returncode == 0
    shutil.copytree(tmp_path / "out/full", tmp_path / "out/good")
    shutil.rmtree(tmp_path / "out/full/step-000003")
    r = run("-c", limited, *go_on, cwd=tmp_path)
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert "cannot save out/full/step-000003" in r.stderr and "goes on from the start" in r.stderr
    assert not list((tmp_path / "out/full").glob("step-*"))
    assert run(*go_on, cwd=tmp_path).returncode == 0
    assert torch.equal(weights_of(tmp_path / "out/full", 3), weights_of(tmp_path / "out/good", 3))


@pytest.mark.slow("20 kills of a two-rank run, each with a start of its own: about 6 minutes")
def test_twenty_kills(knobs, tmp_path):
    """SIGKILL of a whole torchrun job at random moments, five of them during a save: the same final weights."""
    knobs = {**knobs, "steps": 240, "save_every": 2, "keep": 2, "gradcos_every": 10, "out": str(tmp_path / "out")}
    assert run(*TORCHRUN, *command(knobs, name="whole"), cwd=tmp_path).returncode == 0
    random, during_save, folder = np.random.default_rng(0), 0, tmp_path / "out/killed"
    for kill in range(20):
        done = max((int(d.name[5:]) for d in folder.glob("step-*") if d.suffix != ".tmp"), default=0)
        process = start_and_wait([*TORCHRUN, *command(knobs, name="killed")], folder, done + 1, tmp_path)
        if kill % 4 == 0:
            while not list(folder.glob("step-*.tmp")) and process.poll() is None:
                time.sleep(0.0002)
        else:
            time.sleep(random.uniform(0, 0.6))
        assert process.poll() is None, process.communicate()[0]
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "out")])  # torchrun and both workers
        process.wait()
        during_save += bool(list(folder.glob("step-*.tmp")))
        print(f"kill {kill}: went on from {done}, log at {len(log_lines(folder))}, in a save: {during_save}")
    assert during_save >= 5, f"only {during_save} kills hit a save"
    assert run(*TORCHRUN, *command(knobs, name="killed"), cwd=tmp_path).returncode == 0
    assert log_of(folder) == log_of(tmp_path / "out/whole")
    assert log_of(folder, "gradcos.jsonl") == log_of(tmp_path / "out/whole", "gradcos.jsonl")
    assert torch.equal(weights_of(folder, 240), weights_of(tmp_path / "out/whole", 240))
    assert len(list(folder.glob("step-*"))) == 2


@pytest.mark.slow("three torchrun jobs: a minute")
def test_a_lost_rank_restarts_by_itself(knobs, tmp_path):
    """torchrun --max-restarts: one of two ranks is killed, torchrun starts both again, the run ends as if untouched."""
    knobs = {**knobs, "steps": 40, "out": str(tmp_path / "out")}
    assert run(*TORCHRUN, *command(knobs, name="whole"), cwd=tmp_path).returncode == 0
    process = start_and_wait([*TORCHRUN, "--max-restarts=1", *command(knobs, name="lost")], tmp_path / "out/lost", 10,
                             tmp_path)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "going on from step" in output, output
    assert log_of(tmp_path / "out/lost") == log_of(tmp_path / "out/whole")
    assert torch.equal(weights_of(tmp_path / "out/lost", 40), weights_of(tmp_path / "out/whole", 40))


@pytest.mark.slow("a torchrun job")
def test_sigterm_to_torchrun_saves(knobs, tmp_path):
    knobs = {**knobs, "steps": 400, "save_every": 1000, "out": str(tmp_path / "out")}
    process = start_and_wait([*TORCHRUN, *command(knobs, name="x")], tmp_path / "out/x", 5, tmp_path)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers (and itself ends with an error)
    output = process.communicate(timeout=120)[0]
    assert "stopped by SIGTERM" in output and len(list((tmp_path / "out/x").glob("step-*"))) == 1, output


# ---- gradcos ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def two_losses(tiny, inputs):
    """A transformer with a random LoRA, and a function that makes an image loss and a video loss on it."""
    ours, _ = tiny
    parameters = add_lora(ours, 2, 1.0)
    randomise_lora(ours)
    x, text, t, reference = inputs
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    frames = {"image": 1, "video": T}

    def losses_of(task):
        n = frames[task]
        for i in range(2):  # two micro-batches of one sample
            s = slice(i, i + 1)
            yield v_loss(ours, scheduler, x[s, :n], text[s], t[s], noise[s, :n], reference[s]).sum() / 2
    return ours, parameters, losses_of


def test_measured_cosine_is_that_of_two_backward_passes(two_losses):
    ours, parameters, losses_of = two_losses
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    measured = gradcos.measure(losses_of, named)
    assert all(p.grad is None for p in parameters)  # training cannot see that somebody measured
    ours.enable_gradient_checkpointing()
    ours.train()
    checkpointed = gradcos.measure(losses_of, named)

    by_hand = {}
    for task in ("image", "video"):
        sum(losses_of(task)).backward()
        by_hand[task] = {n: p.grad.clone().double() for n, p in named}
        ours.zero_grad()
    flat = {task: torch.cat([g.flatten() for g in grads.values()]) for task, grads in by_hand.items()}
    for result in (measured, checkpointed):
        assert np.isclose(result["cosine"], F.cosine_similarity(flat["image"], flat["video"], dim=0), atol=1e-6)
        assert np.allclose([result["norm_img"], result["norm_vid"]], [flat["image"].norm(), flat["video"].norm()])
    block = {task: torch.cat([g.flatten() for n, g in grads.items() if "transformer_blocks.1." in n])
             for task, grads in by_hand.items()}
    assert np.allclose(measured["groups"]["block 1"], [F.cosine_similarity(block["image"], block["video"], dim=0),
                                                       block["image"].norm(), block["video"].norm()], atol=1e-6)


def test_layer_groups_partition(tiny):
    ours, _ = tiny
    add_lora(ours, 2, 1.0)
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    groups = gradcos.layer_groups(names)
    kinds = [i for g in ("attention", "feed-forward", "norms", "embeddings") for i in groups[g]]
    assert sorted(kinds) == list(range(len(names)))
    blocks = sum((g for name, g in groups.items() if name.startswith("block ")), [])
    assert len(blocks) == len(names) - len(groups["embeddings"]) and "block 2" in groups


def test_pcgrad_closed_form():
    """Lemma C.5.1, sharper than the paper has it: |g_PC - g_mix| / |g_mix| is |cos| exactly."""
    g = torch.Generator().manual_seed(0)
    for p in (0.2, 0.5, 0.9):
        g_img, g_vid = torch.randn(2, 1000, generator=g, dtype=torch.float64)
        g_vid -= 0.4 * g_img
        mix = (1 - p) * g_img + p * g_vid
        projected = (1 - p) * gradcos.project(g_img, g_vid) + p * gradcos.project(g_vid, g_img)
        cos = F.cosine_similarity(g_img, g_vid, dim=0)
        assert cos < -0.2 and torch.isclose((projected - mix).norm() / mix.norm(), -cos)
        assert abs(gradcos.project(g_img, g_vid) @ g_vid) < 1e-9
        assert torch.equal(gradcos.project(g_img, -g_vid), g_img)  # no conflict: untouched


def test_pcgrad_buffer():
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    pcgrad = gradcos.PCGrad(3, "cpu")

    def step(task, *gradient):
        weight.grad = torch.tensor([gradient])
        pcgrad([weight], task)
        return weight.grad[0].tolist()
    assert step("image", 1.0, 0.0) == [1.0, 0.0]           # nothing of the other task yet
    assert step("image", 1.0, 2.0) == [1.0, 2.0]
    assert np.allclose(step("video", -3.0, 1.0), [-2.0, 2.0])  # against the mean (1, 1): dot -2, squared norm 2
    assert step("video", -2.0, 1.0) == [-2.0, 1.0]         # (1, 0) has left, (1, 2) does not conflict
    assert np.allclose(step("image", 3.0, 1.0), [3 - 2.5 * 6.5 / 7.25, 1 + 6.5 / 7.25])  # raw (-2.5, 1)
    again = gradcos.PCGrad(3, "cpu")
    again.load_state_dict(pcgrad.state_dict())
    assert [t for t, _ in again.buffer] == ["video", "video", "image"]  # three: the oldest have left
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.buffer, pcgrad.buffer))


@pytest.fixture
def quadratic():
    """Commuting Hessians (l_1, l_2 on the diagonal) and a starting point."""
    g = np.random.default_rng(0)
    return g.uniform(0.05, 1, 8), g.uniform(0, 1, 8), g.standard_normal(8)


def test_inner_product_decays_as_C31_says_and_is_never_negative(quadratic):
    l_1, l_2, c = quadratic
    p, eta, t = 0.2, 0.5, np.arange(201)[:, None]
    g_1, g_2 = gradcos.descend((np.diag(l_1), np.diag(l_2)), c, p, eta, 200)
    mu = (1 - p) * l_1 + p * l_2
    inner = (g_1 * g_2).sum(1)
    assert np.allclose(inner, (l_1 * l_2 * (1 - eta * mu) ** (2 * t) * c**2).sum(1), rtol=1e-9, atol=0)
    assert (inner <= (l_1 * l_2).max() * (c @ c) * (1 - eta * mu.min()) ** (2 * t[:, 0])).all()
    assert (inner >= 0).all()  # so in the paper's own model no conflict occurs, and PCGrad never acts
    coin = gradcos.descend((np.diag(l_1), np.diag(l_2)), c, p, eta, 200, rng=np.random.default_rng(1))
    assert (np.prod(coin, 0).sum(1) >= 0).all()


def test_cosine_goes_to_one_with_and_without_the_video_loss(quadratic):
    l_1, l_2, c = quadratic
    for p in (0.2, 0.0):
        phi = gradcos.cosines(*gradcos.descend((np.diag(l_1), np.diag(l_2)), c, p, 0.5, 5000))
        assert phi[0] < 0.9 and phi[-1] > 1 - 1e-9


def test_a_mode_that_is_flat_for_the_video_loss_decides_the_cosine():
    """Modes (0.1, 1) and (0.3, 0): the mixture's slowest is the second, where g_vid = 0; at p = 0 it is the first."""
    H = np.diag([0.1, 0.3]), np.diag([1.0, 0.0])
    with_p, without = (gradcos.cosines(*gradcos.descend(H, np.ones(2), p, 0.5, 1000)) for p in (0.2, 0.0))
    decay = (1 - 0.5 * 0.28) / (1 - 0.5 * 0.24)  # closed form: mode 1 against mode 2
    expected = 0.1 * decay ** 1000 / np.hypot(0.1 * decay ** 1000, 0.3)
    assert with_p[-1] == pytest.approx(expected, rel=1e-6) and with_p[-1] < 1e-9 and without[-1] > 1 - 1e-9


def test_the_slowest_mode_survives_in_C41():
    """C.4.1 has the fastest: that needs a step size above 2/(l_min + l_max)."""
    l_1, l_2 = np.array([0.2, 0.5, 1.0]), np.array([1.0, 0.5, 0.0])
    for eta, limit in ((0.5, 1.0), (1.6, 1.0), (1.8, 0.0)):  # 2 / 1.2 = 1.67; the paper's limit is sign(1.0 * 0.0) = 0
        phi = gradcos.cosines(*gradcos.descend((np.diag(l_1), np.diag(l_2)), np.ones(3), 0.0, eta, 600))
        assert abs(phi[-1] - limit) < 1e-6


def test_different_optima_end_in_opposite_gradients(quadratic):
    l_1, l_2, c = quadratic
    g_1, g_2 = gradcos.descend((np.diag(l_1), np.diag(l_2 + 0.1)), c, 0.2, 0.5, 5000, optima=(c + 1, 2 - c))
    assert np.allclose(g_1[-1], -0.25 * g_2[-1]) and gradcos.cosines(g_1, g_2)[-1] < -1 + 1e-9
    assert np.linalg.norm(g_1[-1]) > 0.1  # neither vanishes


def test_pcgrad_run_resumes_exactly_and_figures(knobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs").mkdir()
    shutil.copy(ROOT / "toy/refs/creature-0.png", tmp_path / "refs")
    (tmp_path / "refs/creature-0.txt").write_text("a creature walks left over a green field")
    watch = dict(gradcos_every=2, val_every=3, sample_every=2, val_refs="refs")
    train.train(train.Config(**{**knobs, **watch, "pcgrad": 4, "name": "whole"}))
    train.train(train.Config(**{**knobs, "pcgrad": 4, "name": "unwatched"}))
    assert log_of("out/whole") == log_of("out/unwatched")  # measuring and sampling leave no trace
    train.train(train.Config(**{**knobs, "name": "coin"}))
    assert log_of("out/whole") != log_of("out/coin")
    go_back("out/whole", 3, "out/killed")
    train.train(train.Config(**{**knobs, **watch, "pcgrad": 4, "name": "killed"}))
    for file in ("log.jsonl", "gradcos.jsonl", "val.jsonl"):
        assert log_of("out/killed", file) == log_of("out/whole", file)
    assert [line["step"] for line in log_of("out/whole", "gradcos.jsonl")] == [0, 2, 4, 6]
    assert torch.equal(weights_of("out/killed"), weights_of("out/whole"))
    train.train(train.Config(**{**knobs, "pcgrad": 4, "name": "unwatched", "val_every": 3}))  # complete: only measures
    assert log_of("out/unwatched", "val.jsonl") == log_of("out/whole", "val.jsonl")[-1:]
    assert Image.open("out/whole/samples/creature-0-000006.png").width > 6 * 128

    gradcos.main(gradcos.Config(runs=["out/whole", "out/killed"], out="figures/all.png"))
    assert sorted(f.name for f in Path("figures").iterdir()) == ["all-groups.png", "all-losses.png", "all.png"]
    gradcos.main(gradcos.Config(theory=True, out="figures/theory.png"))
    r = run(str(ROOT / "gradcos.py"), "out/coin", cwd=tmp_path)
    assert r.returncode == 1 and "no gradcos.jsonl in out/coin" in r.stderr and "Traceback" not in r.stderr
