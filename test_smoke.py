"""The transformer, LoRA, the loss, the coin, the drops, text, the VAE and the README's commands. Each is compared with
something we did not write (stock diffusers, closed forms) or with an answer known beforehand.

`pytest` needs no GPU and no download. The other tests: tests/, and beside their files in paper/ and toy/."""
from tests.shared import BASE, LORA, REF, ROOT, H, L, N, T, W, randomise_lora, run

import dataclasses
import inspect
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Tokenizer

import model
import sample
import train
from common import base, media
from common.args import command_line
from model import SubjectTransformer, add_lora, load_lora, save_lora, v_loss

README = (ROOT / "README.md").read_text(encoding="utf-8")


def rope(stock, frames):
    """The stock rotary tables, from the stock pipeline's own method."""
    pipe = CogVideoXPipeline(None, None, None, stock, None)
    return pipe._prepare_rotary_positional_embeddings(H * 8, W * 8, frames, torch.device("cpu"))


# ---- the transformer against the stock one ---------------------------------------------------------------------------

def test_without_reference_it_is_the_stock_model(tiny, inputs):
    ours, stock = tiny
    x, text, t, _ = inputs
    expected = stock(x, text, t, image_rotary_emb=rope(stock, T)).sample
    for tables in (None, rope(stock, T)):  # it makes its own, or takes the pipeline's
        assert torch.equal(ours(x, text, t, image_rotary_emb=tables).sample, expected)


@pytest.mark.parametrize("frames, first", [(T, 1), (1, 1), (1, 3)])
def test_reference_is_frame_zero(tiny, inputs, frames, first):
    """The stock transformer, fed it as one more first frame; the video has RoPE rows `first`, `first` + 1, ..."""
    ours, stock = tiny
    x, text, t, every = inputs
    x, where = x[:, :frames], {} if first == 1 else {"first_frame": first}
    rows = [torch.cat([table[:N], table[first * N:]]) for table in rope(stock, first + frames)]
    for ref in (every, every[:1]):  # one for each video, one for both
        fed = torch.cat([ref.expand(2, -1, -1, -1, -1), x], 1)
        expected = stock(fed, text, t, image_rotary_emb=rows).sample[:, 1:]
        for call in (dict(reference=ref),
                     dict(attention_kwargs={"reference": ref}, image_rotary_emb=rope(stock, frames))):  # the pipeline's
            assert (ours(x, text, t, **call, **where).sample - expected).abs().max() < 1e-6
        assert (ours(x, text, t).sample - expected).abs().max() > 1e-4  # frames 0, 1, ... are something else


@pytest.mark.parametrize("keep", [[0, 3, 4, 11, 20], range(N), []], ids=["some", "all", "none"])
def test_removing_tokens_equals_masking_them(tiny, inputs, monkeypatch, keep):
    """Without the reference's tokens the video stays where it is."""
    ours, _ = tiny
    x, text, t, ref = inputs
    keep = torch.tensor(keep, dtype=torch.long)
    removed = ours(x, text, t, reference=ref, keep=keep).sample
    visible = torch.ones(1, L + N + T * N, dtype=torch.bool)
    visible[:, L:L + N] = torch.isin(torch.arange(N), keep)
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask=None, **kw: attention(q, k, v, attn_mask=visible, **kw))
    assert (ours(x, text, t, reference=ref).sample - removed).abs().max() < 1e-6


# ---- LoRA ------------------------------------------------------------------------------------------------------------

def test_reference_scope_changes_the_references_tokens_alone(tiny, inputs):
    """Each layer is compared with the stock one, both on the same inputs."""
    ours, stock = tiny
    x, text, t, ref = inputs
    add_lora(ours, 4, 2, scope="reference")
    expected = stock(torch.cat([ref, x], 1), text, t, image_rotary_emb=rope(stock, T + 1)).sample[:, 1:]
    assert (ours(x, text, t, reference=ref).sample - expected).abs().max() < 1e-6  # a fresh LoRA is the base
    randomise_lora(ours)
    assert torch.equal(ours(x, text, t).sample, stock(x, text, t, image_rotary_emb=rope(stock, T)).sample)
    seen = {}
    for name in ("patch_embed", "transformer_blocks.0.norm1", "transformer_blocks.0.ff"):
        ours.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: (args, out)}))
    ours(x, text, t, reference=ref)

    def by_token(out):  # norm1 gives the tokens, the words and a gate for each token
        return out if torch.is_tensor(out) else torch.cat([out[1], out[0] + out[2]], 1)
    for name, (args, out) in seen.items():
        changed = (by_token(out) - by_token(stock.get_submodule(name)(*args))).abs().amax((0, 2)) > 1e-5
        assert changed.nonzero().flatten().tolist() == list(range(L, L + N)), name


class AttentionCalls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in model.ATTENTION
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["all", "reference"])
def test_checkpointing_changes_no_bit_and_recomputes_what_it_says(tiny, inputs, scope):
    """"full" runs each of the three blocks' attention again, "attention" does not."""
    ours, _ = tiny
    x, text, t, ref = inputs
    parameters, results, counts = add_lora(ours.train(), 4, 2, dropout=0.1, scope=scope), [], []
    randomise_lora(ours)
    for ours.checkpointing in ("none", "attention", "full"):
        torch.manual_seed(4)  # the same dropout
        with AttentionCalls() as calls:
            # Several forwards before one backward, with different spans: recomputation must see the right one.
            loss = sum(ours(x[:, :frames], text, t, reference=ref, keep=keep).sample.square().mean()
                       for frames in (1, T) for keep in (None, torch.arange(5), torch.arange(0)))
            results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
        counts.append(calls.count)
    for none, attention, full in zip(*results):
        assert torch.equal(attention, none) and torch.equal(full, none)
        assert none.abs().max() > 0  # nothing that is trained lacks a gradient
    again = {"all": 6, "reference": 4}[scope]  # without the reference's tokens that scope has nothing to train
    assert counts == [6 * 3, 6 * 3, (6 + again) * 3]


def test_lora_round_trip_and_stock_loader(tiny, inputs, tmp_path):
    """Our file, loaded by us and by stock diffusers, at its scale of 3/4 (a file without alpha gets 1/2)."""
    ours, stock = tiny
    x, text, t, ref = inputs
    add_lora(ours, 4, 3)
    randomise_lora(ours)
    save_lora(ours, tmp_path, base="here")
    expected = ours(x, text, t, reference=ref).sample
    again = SubjectTransformer.from_config(stock.config).eval()
    with pytest.raises(ValueError, match="was trained on the base here"):  # its weights are others
        load_lora(again, tmp_path)
    again.load_state_dict(stock.state_dict())
    load_lora(again, tmp_path)
    assert torch.equal(again(x, text, t, reference=ref).sample, expected)
    CogVideoXPipeline(None, None, None, stock, None).load_lora_weights(str(tmp_path))
    got = stock(torch.cat([ref, x], 1), text, t, image_rotary_emb=rope(stock, T + 1)).sample[:, 1:]
    assert (got - expected).abs().max() < 1e-6


# ---- the loss, the coin, the drops -----------------------------------------------------------------------------------

def test_v_loss_closed_form(tiny, inputs):
    """Against the definition, and against the diffusers example's x0 loss with weight 1/(1-a). It is computed in
    float32: bfloat16 would round a, alpha-bar, to 1.0 for t = 0 and 1, which is no noise at all."""
    (ours, _), (x, text, _, ref), t = tiny, inputs, torch.tensor([1, 700])
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    x, noise = x.bfloat16(), torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    got = v_loss(ours, scheduler, x, text, t, noise, ref)
    x, noise, a = x.float(), noise.float(), scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1, 1)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    v_pred = ours(noisy, text, t, reference=ref).sample
    v = a.sqrt() * noise - (1 - a).sqrt() * x
    assert torch.allclose(got, (v_pred - v).square().mean((1, 2, 3, 4)), atol=1e-6)
    x0_pred = scheduler.get_velocity(v_pred, noisy, t)  # the example's odd call: sqrt(a) x_t - sqrt(1-a) v_pred
    assert torch.allclose(got, ((x0_pred - x).square() / (1 - a)).mean((1, 2, 3, 4)), rtol=1e-4)


def test_coin():
    def tasks(steps=4000, **knobs):
        return [train.sample_task(train.Config(**knobs), step) for step in range(steps)]
    assert abs(tasks().count("video") / 4000 - 0.2) < 0.02
    assert tasks(99) == tasks(99, lr=1.0) and tasks(99) != tasks(99, seed=1)
    assert set(tasks(99, p=0.0)) == {"image"} and set(tasks(99, p=1.0)) == {"video"}


def test_token_drop():
    """Each micro-batch keeps a sorted random half of its own of a reference's 1,350 tokens."""
    cfg, micros = train.Config(), [train.MicroBatch("video", i // 4, i % 4, []) for i in range(400)]
    keeps = torch.stack([train.tokens_to_keep(cfg, micro, 1350) for micro in micros])
    assert keeps.shape == (400, 675) and (keeps.diff() > 0).all() and keeps.min() == 0 and keeps.max() == 1349
    assert abs(keeps.float().mean() - 674.5) < 5 and len(keeps.unique(dim=0)) == 400
    for n, kept, flags in ((1350, 135, {}), (4, 1, dict(lora_scope="reference", view_drop=0.0))):  # LoRA needs a token
        assert len(train.tokens_to_keep(train.Config(token_drop=0.9, **flags), micros[0], n)) == kept


def test_whole_drops():
    """The view drop, and --drop reference, leave all tokens or none; all of them stay at a drop of 0, none at 1."""
    micros = [train.MicroBatch("image", i // 4, i % 4, []) for i in range(400)]
    authors = train.Config(drop="reference", token_drop=0.25)
    for keeps in ([train.all_or_none(train.Config(), micro, 0.25) for micro in micros],
                  [train.tokens_to_keep(authors, micro, 1350) for micro in micros]):
        assert all(keep is None or len(keep) == 0 for keep in keeps)
        assert np.mean([keep is None for keep in keeps]) == pytest.approx(0.75, abs=0.07)  # 0.02 is the deviation
    for drop in ("tokens", "reference"):
        assert len(train.tokens_to_keep(train.Config(drop=drop, token_drop=1.0), micros[0], 9)) == 0
        assert train.tokens_to_keep(train.Config(drop=drop, token_drop=0.0), micros[0], 9) is None


# ---- text, sampling --------------------------------------------------------------------------------------------------

def test_cls_takes_a_spare_row_of_t5_xxl(tmp_path):
    """T5's 32,000 pieces and 100 sentinels: <cls> is id 32100 of 32,128 rows, and nothing is resized."""
    shutil.copytree(BASE, tmp_path, dirs_exist_ok=True)
    words = [(f"\u2581w{i}", -20.0) for i in range(32_000 - 3)]
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]).save_pretrained(tmp_path / "tokenizer")
    config = tmp_path / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 32_128}))
    pipe = base.load_pipeline(str(tmp_path), without=("transformer", "text_encoder"))
    assert pipe.tokenizer("<cls> w1 w2").input_ids[0] == 32_100
    assert pipe.text_encoder.get_input_embeddings().num_embeddings == 32_128


def test_sampler_is_the_stock_pipeline():
    """Where nothing is said: 50 steps, guidance 6 and <cls> in front, as the authors do."""
    pipe, stock, prompt = base.load_pipeline(BASE), CogVideoXPipeline.from_pretrained(BASE), "a creature walks up"
    stock.tokenizer = pipe.tokenizer  # knows <cls>
    (ours,) = sample.generate(pipe, None, [prompt], [7])
    theirs = stock(f"<cls> {prompt}", num_inference_steps=50, guidance_scale=6.0, height=32, width=32, num_frames=9,
                   max_sequence_length=16, generator=torch.Generator().manual_seed(7)).frames[0]
    assert len(ours) == 9 and all(np.array_equal(a, b) for a, b in zip(ours, theirs))


# ---- the README ------------------------------------------------------------------------------------------------------

def test_the_readmes_first_command_twice_is_the_same_file(tmp_path):
    r = run(str(ROOT / "sample.py"), "--ref", REF, "--lora", LORA, "--steps", "8", "--out", "a.mp4", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    sample.main(sample.Config(ref=REF, lora=LORA, steps=8, out=str(tmp_path / "b.mp4")))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len(media.load_clip(tmp_path / "a.mp4", 9, 4)) == 9
    assert Image.open(tmp_path / "a.png").size == (7 * 256 + 6 * 4, 256)


def test_the_readmes_commands_have_flags_that_exist():
    parsed = []
    for line in re.findall(r"^(?:python|torchrun) .*", README, re.MULTILINE):
        words = shlex.split(line, comments=True)
        for script in (train, sample):
            if script.__name__ + ".py" in words:
                argv = words[words.index(script.__name__ + ".py") + 1:]
                command_line(parsed.append, script.Config, "", argv, presets=getattr(script, "presets", None))
    assert {type(cfg) for cfg in parsed} == {train.Config, sample.Config}


def test_the_readmes_loop_is_the_loop_of_train():
    """Each line of code that the README prints stands in train.train, in the same order; it only leaves lines out."""
    def code_of(text):
        return list(filter(None, (" ".join(line.split("#")[0].split()) for line in text.splitlines())))
    (loop,) = re.findall(r"```python\n(for step in range\(.*?)```", README, re.DOTALL)
    rest = iter(code_of(inspect.getsource(train.train)))
    assert not [line for line in code_of(loop) if line not in rest]  # `in` moves on to the line that it finds


@pytest.mark.parametrize("script", [train, sample])
def test_help_explains_every_knob(script, capsys):
    with pytest.raises(SystemExit):
        command_line(None, script.Config, script.__doc__, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{knob.name} " in said for knob in dataclasses.fields(script.Config))
