"""The transformer, LoRA, the loss, the coin, the two drops, text, the VAE and the README's commands: everything is
compared with something we did not write (stock diffusers, closed forms) or with an answer known beforehand.

`pytest` needs no GPU and no download. The other tests: tests/, and beside their files in paper/ and toy/."""
from tests.shared import BASE, ROOT, H, L, N, T, W, command, randomise_lora, run

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Tokenizer

from common import media
from common import base
import model
import sample
import train
from model import SubjectTransformer, add_lora, load_lora, save_lora, v_loss
from common.run import command_line


def rope(stock, frames):
    """The stock rotary tables, from the stock pipeline's own method."""
    pipe = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipe.vae_scale_factor_spatial = 8
    object.__setattr__(pipe, "transformer", stock)
    return CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, H * 8, W * 8, frames, torch.device("cpu"))


def fresh(stock):
    """Our class with the stock model's configuration, and random weights of its own."""
    return SubjectTransformer(**{k: v for k, v in stock.config.items() if not k.startswith("_")}).eval()


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

    def masked(q, k, v, attn_mask=None, **kw):
        return stock_attention(q, k, v, attn_mask=visible[None], **kw)
    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    assert (ours(x, text, t, reference=ref).sample - removed).abs().max() < 1e-6


def test_no_token_kept_is_text_to_video_at_frames_one_to_T(tiny, inputs):
    ours, stock = tiny
    x, text, t, ref = inputs
    shifted = tuple(table[N:] for table in rope(stock, T + 1))
    expected = stock(x, text, t, image_rotary_emb=shifted).sample
    got = ours(x, text, t, reference=ref, keep=torch.empty(0, dtype=torch.long)).sample
    assert (got - expected).abs().max() < 1e-6
    assert (got - ours(x, text, t).sample).abs().max() > 1e-4  # frames 0..T-1 are something else


def test_a_model_with_tokens_of_two_frames_is_refused(tiny, inputs):
    ours, _ = tiny
    ours.register_to_config(patch_size_t=2)
    with pytest.raises(ValueError, match="CogVideoX 1.5 .* cannot be frame 0"):
        ours(*inputs[:3], reference=inputs[3])


def test_wrong_reference_shape_is_named(tiny, inputs):
    x, text, t, ref = inputs
    with pytest.raises(ValueError, match=r"reference must be"):
        tiny[0](x, text, t, reference=ref[..., :4])


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
    block = ours.transformer_blocks[0]
    seen = {}  # module: (its inputs, its output)
    for module in (ours.patch_embed, block.norm1, block.ff):
        module.register_forward_hook(lambda module, args, out: seen.update({module: (args, out)}))
    ours(x, text, t, reference=ref)

    def same(a, b):
        return torch.allclose(a, b, atol=1e-6)
    _, tokens = seen[ours.patch_embed]
    assert same(tokens[:, :L], plain[:, :L]) and same(tokens[:, L + N:], plain[:, L + N:])
    assert not same(tokens[:, L:L + N], plain[:, L:L + N])
    args, got = seen[block.norm1]
    base = stock.transformer_blocks[0].norm1(*args)
    assert same(got[0][:, N:], base[0][:, N:]) and not same(got[0][:, :N], base[0][:, :N])  # video, reference
    assert same(got[1], base[1]) and same(got[3], base[3])                                  # text and its gate
    assert same(got[2][:, N:], base[2].expand(-1, T * N, -1))
    args, got = seen[block.ff]
    base = stock.transformer_blocks[0].ff(*args)
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

    again = fresh(stock)
    again.load_state_dict(stock.state_dict())
    load_lora(again, tmp_path)
    assert torch.equal(again(x, text, t, reference=ref).sample, expected)

    state, metadata = CogVideoXPipeline.lora_state_dict(str(tmp_path), return_lora_metadata=True)
    CogVideoXPipeline.load_lora_into_transformer(state, stock, metadata=metadata)
    got = stock(torch.cat([ref, x], 1), text, t, image_rotary_emb=rope(stock, T + 1)).sample[:, 1:]
    assert (got - expected).abs().max() < 1e-6


def test_a_kill_while_a_lora_is_written_leaves_the_old_one(tiny, tmp_path, monkeypatch):
    def killed(weights, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt
    add_lora(tiny[0], 4, 2)
    save_lora(tiny[0], tmp_path)
    before = (tmp_path / model.LORA_FILE).read_bytes()
    monkeypatch.setattr(model, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_lora(tiny[0], tmp_path)
    assert (tmp_path / model.LORA_FILE).read_bytes() == before


def test_lora_of_another_base_and_lora_without_alpha(tiny, tmp_path, capsys):
    ours, stock = tiny
    add_lora(ours, 4, 2)
    randomise_lora(ours)
    save_lora(ours, tmp_path, base="here")
    other = fresh(stock)
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
    with pytest.raises(ValueError, match="does not fit"):
        load_lora(fresh(stock), tmp_path / "v1")


# ---- the loss, the coin, the drops -----------------------------------------------------------------------------------

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

    def transformer(noisy, *args, **kwargs):
        seen["noisy"] = noisy
        return (torch.zeros_like(noisy),)
    v_loss(transformer, scheduler, x, None, torch.tensor([1, 1]), noise)
    a = scheduler.alphas_cumprod[1].float()
    assert torch.allclose(seen["noisy"], a.sqrt() * x.float() + (1 - a).sqrt() * noise.float(), atol=1e-6)


def test_v_loss_is_float32_whatever_the_model_answers():
    """bfloat16 would round the target and the squares to three digits."""
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    x, noise = torch.randn(2, 2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500, 500])
    got = v_loss(lambda *args, **kwargs: (x.bfloat16(),), scheduler, x, None, t, noise)
    v = scheduler.get_velocity(x, noise, t)
    assert torch.allclose(got, (x.bfloat16().float() - v).square().mean((1, 2, 3, 4)), rtol=1e-6)


def test_coin():
    cfg = train.Config()
    tasks = [train.sample_task(cfg, s) for s in range(4000)]
    assert abs(tasks.count("video") / 4000 - 0.2) < 0.02
    assert tasks == [train.sample_task(train.Config(lr=1.0), s) for s in range(4000)]
    assert tasks != [train.sample_task(train.Config(seed=1), s) for s in range(4000)]
    assert {train.sample_task(train.Config(p=0.0), s) for s in range(99)} == {"image"}
    assert {train.sample_task(train.Config(p=1.0), s) for s in range(99)} == {"video"}
    two_stage = train.Config(task_schedule="two_stage", steps=100)
    assert [train.sample_task(two_stage, s) for s in range(100)] == ["image"] * 80 + ["video"] * 20


def test_token_drop():
    keeps = [train.token_drop(train.Config(), s, 0, 1350) for s in range(40)]
    assert all(len(k) == 675 and len(k.unique()) == 675 and k.max() < 1350 for k in keeps)
    assert abs(torch.stack(keeps).float().mean() - 674.5) < 15 and not torch.equal(keeps[0], keeps[1])
    assert train.token_drop(train.Config(token_drop=0.0), 0, 0, 1350) is None
    assert len(train.token_drop(train.Config(token_drop=1.0), 0, 0, 1350)) == 0
    scoped = train.Config(lora_scope="reference", view_drop=0.0, token_drop=0.99)
    assert len(train.token_drop(scoped, 0, 0, 9)) == 1  # LoRA needs a token to act on


def test_view_drop():
    keeps = [train.view_drop(train.Config(), s, 0) for s in range(400)]
    dropped = [keep is not None for keep in keeps]
    assert abs(np.mean(dropped) - 0.5) < 0.1 and all(keep is None or len(keep) == 0 for keep in keeps)
    assert all(train.view_drop(train.Config(view_drop=0.0), s, 0) is None for s in range(50))


# ---- text and the VAE ------------------------------------------------------------------------------------------------

@pytest.fixture
def t5_xxl(tmp_path):
    """A base whose tokenizer has T5's size, 32,000 pieces and 100 sentinels; its text encoder has no weights."""
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    spiece = sentencepiece_model_pb2.ModelProto.FromString(Path(BASE, "tokenizer/spiece.model").read_bytes())
    for i in range(32_000 - len(spiece.pieces)):
        spiece.pieces.add(piece=f"\u2581w{i}", score=-20.0)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "spiece").mkdir()
    (tmp_path / "spiece/spiece.model").write_bytes(spiece.SerializeToString())
    T5Tokenizer.from_pretrained(tmp_path / "spiece").save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize("rows, fits", [(32_128, True), (32_100, False)])
def test_cls_takes_a_spare_row_of_t5_xxl(t5_xxl, rows, fits):
    """<cls> is id 32100 of 32,128 rows, and nothing is resized; without a spare row the base is refused."""
    config = json.loads((t5_xxl / "text_encoder/config.json").read_text())
    (t5_xxl / "text_encoder/config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    if not fits:
        with pytest.raises(ValueError, match="the text encoder has 32100 embedding rows, no spare one for <cls>"):
            base.load_pipeline(str(t5_xxl), without=("transformer", "text_encoder"))
        return
    pipe = base.load_pipeline(str(t5_xxl), without=("transformer", "text_encoder"))
    assert pipe.tokenizer.convert_tokens_to_ids("<cls>") == 32_100
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == 32_128


@pytest.fixture(scope="module")
def toy():
    return base.load_pipeline(BASE)


def test_cls_token_reaches_the_text_encoder(toy):
    assert model.with_reference_token("a cat") == "<cls> a cat"
    assert model.with_reference_token("a <cls> cat") == "a <cls> cat"
    assert model.with_reference_token("a cat", cls="off") == "a cat"
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


def test_tiles_that_do_not_fit_are_not_used(toy, capsys):
    """On the toy's VAE diffusers' own tiling would change the size; at 480x720 the tiles fit. Pictures stay whole."""
    x = torch.zeros(1, 5, 3, 32, 32)
    expected = model.encode_moments(toy.vae, x)
    toy.vae.enable_tiling()
    assert model.encode_moments(toy.vae, x).shape != expected.shape
    base.tile_vae(toy.vae)
    assert torch.equal(model.encode_moments(toy.vae, x), expected)
    toy.vae.disable_slicing()
    assert "do not fit together" in capsys.readouterr().err
    config = dict(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2, latent_channels=4,
                  down_block_types=["CogVideoXDownBlock3D"] * 4, up_block_types=["CogVideoXUpBlock3D"] * 4)
    large = type(toy.vae)(**config)  # sample_height and sample_width are the real ones: 480, 720
    base.tile_vae(large)
    assert large.use_tiling and large.use_slicing
    assert model.encode_moments(large, torch.zeros(1, 1, 3, 480, 720)).shape == (1, 1, 8, 60, 90)
    assert large.use_tiling and large.use_slicing  # for the clips that follow


# ---- sampling --------------------------------------------------------------------------------------------------------

def test_sampler_is_the_stock_pipeline(toy):
    stock = CogVideoXPipeline.from_pretrained(BASE)
    assert type(stock.transformer) is CogVideoXTransformer3DModel
    prompt = "a creature walks up over a tan field"
    (ours,) = sample.generate(toy, None, [prompt], [7], steps=4, cls="off")
    theirs = stock(prompt, num_inference_steps=4, guidance_scale=6.0, height=32, width=32, num_frames=9,
                   max_sequence_length=16, generator=torch.Generator().manual_seed(7)).frames[0]
    assert len(ours) == 9 and all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_saved_lora_in_the_stock_pipeline(tmp_path):
    """The stock pipeline with load_lora_weights gives our output when our transformer is put into it."""
    ours, stock = base.load_pipeline(BASE), base.load_pipeline(BASE)
    add_lora(ours.transformer, 4, 2)
    randomise_lora(ours.transformer)
    save_lora(ours.transformer, tmp_path)
    stock.load_lora_weights(str(tmp_path))
    picture = [Image.new("RGB", (50, 40), "red")]
    latents = sample.encode_references(ours, picture, 32, 32)
    a, b = (sample.generate(p, latents, ["a creature walks"], [0], steps=3, dynamic_cfg=True)[0] for p in (ours, stock))
    difference = max(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() for x, y in zip(a, b))
    assert difference <= 1 and np.asarray(a[0]).std() > 1


# ---- the README's commands -------------------------------------------------------------------------------------------

def test_sample_command_line(tmp_path):
    """The README's first command, twice: same seed, same file."""
    ref = str(ROOT / "toy/refs/creature-0.png")
    r = run(str(ROOT / "sample.py"), "--ref", ref, "--lora", str(ROOT / "toy/lora"), "--steps", "8",
            "--out", str(tmp_path / "a.mp4"), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    sample.main(sample.Config(ref=ref, lora=str(ROOT / "toy/lora"), steps=8, out=str(tmp_path / "b.mp4")))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(media.load_clip(tmp_path / "a.mp4", 9, 4)) == 9
    assert Image.open(tmp_path / "a.png").size == (7 * 256 + 6 * 4, 256)


def test_sample_several_prompts_one_frame_no_reference(tmp_path):
    (tmp_path / "prompts.txt").write_text("a creature walks up\n\na creature stands\n")
    sample.main(sample.Config(prompts=str(tmp_path / "prompts.txt"), lora=str(ROOT / "toy/lora"), frames=1, steps=2,
                              guidance=1.0, enlarge=2, device="cpu", out=str(tmp_path / "x.png")))
    assert {f.name: Image.open(f).size for f in tmp_path.glob("*.png")} == {"x-0.png": (64, 64), "x-1.png": (64, 64)}


def test_of_two_loras_in_a_folder_ours_is_taken(tmp_path):
    for name in (model.LORA_FILE, model.AUTHORS_LORA_FILE):
        (tmp_path / name).touch()
    assert model.lora_path(tmp_path).name == model.LORA_FILE == "pytorch_lora_weights.safetensors"


def test_the_authors_release(tmp_path, capsys):
    """Their layout (another file name, no header): loads at alpha/rank 0.5, which is also what our file says."""
    (tmp_path / "v1").mkdir()
    weights = model.load_file(model.lora_path(ROOT / "toy/lora"))
    model.save_file(weights, tmp_path / "v1" / "pytorch_lora_weights_transformer.safetensors")
    ref = str(ROOT / "toy/refs/creature-0.png")
    for name, lora in (("v1", tmp_path / "v1"), ("ours", ROOT / "toy/lora")):
        sample.main(sample.Config(ref=ref, lora=str(lora), base=BASE, steps=4, fps=4.0, guidance=2.0,
                                  out=str(tmp_path / f"{name}.mp4")))
    said = capsys.readouterr().out
    assert said.count("v1/pytorch_lora_weights_transformer.safetensors does not say its alpha: using the paper's") == 1
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
                            (dict(base="nobody/nothing"), "no folder nobody/nothing, and the download"),
                            (dict(lora=str(broken)), "cannot read the LoRA .*broken.png"),
                            (dict(ref="", prompt=""), "no prompt: pass --ref"),
                            (dict(prompts="nowhere.txt"), "--prompts: no file nowhere.txt"),
                            (dict(out="x.gif"), "--out must end in .mp4 or .mov or .mkv, got 'x.gif'"),
                            (dict(height=30), "multiples of 8"),
                            (dict(device="banana"), "--device must be cuda or cpu, got 'banana'"),
                            (dict(device="cuda"), "--device cuda:0: torch .* sees 0 GPUs"),
                            (dict(offload="model", device="cpu"), "--offload model keeps weights off a GPU"),
                            (dict(compile=True, cache_threshold=0.1), "--compile True goes with neither"),
                            (dict(offload="cpu"), "--offload must be")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sample.main(sample.Config(**{**ok, **change}))


def test_train_command_line_and_a_sample_of_its_run(knobs, tmp_path):
    """The README's second command, cut short; then sample.py on the run's folder."""
    r = run(*command(knobs, name="short", steps=2), cwd=tmp_path)
    assert r.returncode == 0 and "Next: python sample.py --lora out/short" in r.stdout, r.stderr
    sample.main(sample.Config(lora=str(tmp_path / "out/short"), ref=str(ROOT / "toy/refs/creature-0.png"), steps=2,
                              out=str(tmp_path / "x.mp4")))
    assert len(media.load_clip(tmp_path / "x.mp4", 9, 4)) == 9


def test_help_explains_every_knob():
    r = run(str(ROOT / "train.py"), "--toy", "--help")
    assert r.returncode == 0
    for knob in dataclasses.fields(train.Config):
        assert f"--{knob.name} " in r.stdout and knob.metadata["help"]
    assert "(default: toy/base)" in " ".join(r.stdout.split())  # --toy shows its own defaults


def test_train_command_line_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command_line(train.train, train.Config, "", ["--no_such_flag", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "unrecognized arguments: --no_such_flag" in said
    assert len(said.splitlines()) == 2  # the usage is one line, not all knobs
    for flags, message in [(["--steps", "many"], "argument --steps: invalid int value: 'many'"),
                           (["--base", BASE, "--images", "typo"], "no folder of image pairs at typo"),
                           (["--p", "1.5"], "--p must be in [0, 1], got 1.5")]:
        with pytest.raises(SystemExit) as stop:
            command_line(train.train, train.Config, "", ["--sample_every", "0", *flags])
        assert message in f"{stop.value} {capsys.readouterr().err}"
