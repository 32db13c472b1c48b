"""Trains the toy's base model: a complete diffusers CogVideoX folder, about 4.5 MB, with the real classes.

    python -m toy.train_base --out toy/base

Three parts. The VAE learns to reconstruct clips and stills. T5 stays at its random initialisation: with two layers
over a vocabulary of some thirty words it only has to keep the words apart. The transformer learns text-to-video on
clips and on some still pictures, with captions that sometimes name the creature's colours, sometimes don't and
sometimes are empty (for classifier-free guidance). It never sees a reference: that is the paper's job.

By default all clips walk. The committed base went on (--init) with clips that stand or jump, and with frames at random
distances in time: without them image-only training breaks instead of freezing. The six runs: paper/TRIALS.md.
"""
import copy
import math
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from sentencepiece import sentencepiece_model_pb2
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from tqdm import tqdm

from toy import creatures
from model import SubjectTransformer, encode_prompt, encode_video, v_loss
from common.args import command_line, find_device, knob
from common.base import autocast


@dataclass
class Config:
    out: str = knob("toy/base", "folder to write")
    vae_steps: int = knob(2500, "steps of VAE training")
    vae_batch: int = knob(4, "clips per VAE step")
    steps: int = knob(9000, "steps of transformer training")
    batch: int = knob(48, "clips per transformer step; three times as many stills")
    lr: float = knob(1.5e-3, "peak learning rate of the transformer")
    standing: float = knob(0.0, "share of clips that stand and say so")
    hardly: float = knob(0.0, "share of the other clips, which say \"walks\", that stand all the same")
    jumping: float = knob(0.0, "share of clips that jump from anywhere to anywhere and say so")
    gaps: float = knob(0.0, "share of steps with random distances in time between the frames")
    stills: float = knob(0.25, "share of steps on still pictures")
    pool: int = knob(12_000, "clips, and as many stills, that are drawn and encoded once")
    init: str = knob("", "start from the transformer of this base, with its text encoder")
    vae: str = knob("", "take the VAE of this base instead of training one")
    seed: int = knob(0, "seed")


# Every caption that the base can see: with each pair of colours, and without; and the empty one of guidance.
CAPTIONS = [creatures.caption(*what) for what in product(
    range(len(creatures.FIELDS)), range(len(creatures.VERBS)), [*product(range(8), range(8)), None])] + [""]
ROW = {caption: row for row, caption in enumerate(CAPTIONS)}


def build_tokenizer(folder):
    """A sentencepiece model for T5 in CogVideoX-5b's layout: the toy's words, and single characters for any other."""
    # "jumps" is spelled in characters: as a word it would renumber the tokens of bases that do not know it.
    words = {word for caption in CAPTIONS for word in caption.split()} - {"jumps"}
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.unk_id = model.trainer_spec.UNIGRAM, 2
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.bos_id = 0, 1, -1
    model.trainer_spec.pad_piece, model.trainer_spec.eos_piece, model.trainer_spec.unk_piece = "<pad>", "</s>", "<unk>"
    model.normalizer_spec.name = "identity"
    kinds = model.SentencePiece
    for piece, kind in (("<pad>", kinds.CONTROL), ("</s>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for word in sorted(words):
        model.pieces.add(piece="\u2581" + word, score=-2.0)
    for character in ["\u2581", *map(chr, range(33, 127))]:
        model.pieces.add(piece=character, score=-12.0)
    (Path(folder) / "spiece.model").write_bytes(model.SerializeToString())
    return T5Tokenizer.from_pretrained(folder)


def build(seed):
    """The untrained pipeline: CogVideoX-5B's classes and options at toy sizes."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(folder)
    text_encoder = T5EncoderModel(T5Config(vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                                           feed_forward_proj="gated-gelu", dropout_rate=0.0))
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(16, 32), latent_channels=4, layers_per_block=1, norm_num_groups=8,
        temporal_compression_ratio=2, sample_height=creatures.SIZE, sample_width=creatures.SIZE, scaling_factor=1.0)
    for block in vae.modules():
        if isinstance(block, CogVideoXResnetBlock3D):  # start as a linear map: learns twice as fast
            torch.nn.init.zeros_(block.conv2.conv.weight)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=5, in_channels=4, out_channels=4, patch_size=4,
        time_embed_dim=64, text_embed_dim=64, temporal_compression_ratio=2, sample_frames=creatures.FRAMES,
        sample_width=creatures.SIZE // 2, sample_height=creatures.SIZE // 2, max_text_seq_length=16,
        use_rotary_positional_embeddings=True)
    scheduler = CogVideoXDDIMScheduler(  # CogVideoX-5b's
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def draw(rng, n, still, device, **shares):
    """n scenes: pixels (n, 9 or 1, 3, 32, 32) in [-1,1], and what is in them: field, direction, colours."""
    drawn = creatures.draw_creatures(rng, n)
    fields, directions, tiles = creatures.draw_clips(rng, n, **shares)
    if still:
        directions, tiles = np.full(n, creatures.STANDS), rng.integers(0, creatures.GRID, (n, 1, 2))
    frames = creatures.render(drawn, fields, tiles)
    if not still:
        frames = frames.repeat(creatures.BEATS, 1)
    pixels = torch.from_numpy(frames).to(device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    return pixels, (fields, directions, drawn.colours)


def encode_pool(pipe, rng, n, still, device, cfg):
    """n scenes as latents (n, 5 or 1, 4, 16, 16), with the rows of their captions (n, 2): without and with colours."""
    latents, rows = [], []
    for _ in range(0, n, 250):
        pixels, what = draw(rng, 250, still, device, standing=cfg.standing, hardly=cfg.hardly, jumping=cfg.jumping)
        latents.append(encode_video(pipe.vae, pixels).half())
        rows += [(ROW[creatures.caption(f, d)], ROW[creatures.caption(f, d, colours)]) for f, d, colours in zip(*what)]
    return torch.cat(latents), torch.tensor(rows, device=device)


def count_steps(name, steps, optimizer, peak):
    """(step, progress bar). Each step has its learning rate: linear warm-up over the first 3 %, then a cosine to 2 % of
    the peak."""
    for step in (bar := tqdm(range(steps), desc=name, mininterval=10)):
        progress = (step + 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = peak * min(progress / 0.03, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        yield step, bar


def update(module, optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def train_vae(vae, cfg, device):
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=0.0)
    rng = np.random.default_rng([cfg.seed, 1])
    vae.train()
    for step, bar in count_steps("vae", cfg.vae_steps, optimizer, peak=3e-3):
        still = step % 3 > 0  # pictures are clips of one frame: the reference and the image task are encoded so
        pixels, _ = draw(rng, cfg.vae_batch * (4 if still else 1), still, device)
        pixels = pixels.transpose(1, 2)  # (B, 3, F, H, W)
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            pixels_out = vae.decode(posterior.sample()).sample
        reconstruction = F.l1_loss(pixels_out.float(), pixels)
        update(vae, optimizer, reconstruction + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel())
        if step % 50 == 0:
            bar.set_postfix_str(f"L1 {reconstruction.item() * 127.5:.2f}/255")
    vae.eval().requires_grad_(False)
    pixels, _ = draw(rng, 64, False, device)
    vae.register_to_config(scaling_factor=1 / encode_video(vae, pixels).std().item())


def train_transformer(pipe, cfg, device):
    transformer = pipe.transformer.train()
    ema = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=device.type == "cuda")
    rng = np.random.default_rng([cfg.seed, 2])
    pools = {still: encode_pool(pipe, rng, cfg.pool, still, device, cfg) for still in (True, False)}
    texts = torch.cat([encode_prompt(pipe, CAPTIONS[i:i + 256]) for i in range(0, len(CAPTIONS), 256)])  # (3121,16,64)
    side = transformer.config.sample_height
    beats = len(creatures.BEATS)
    rope = [table.unflatten(0, (2 * beats, -1))  # cos and sin, each (10 times, 16 patches, head_dim)
            for table in SubjectTransformer.rotary_tables(transformer, 2 * beats, side, side, device)]

    def call(noisy, *args, reference, keep, first_frame, **kwargs):  # the stock model: T frames at this step's `times`
        at = times[:noisy.shape[1]]
        return transformer(noisy, *args, image_rotary_emb=tuple(table[at].flatten(0, 1) for table in rope), **kwargs)
    torch.manual_seed(cfg.seed + 1)
    for step, bar in count_steps("transformer", cfg.steps, optimizer, cfg.lr):
        still = rng.random() < cfg.stills
        latents, rows = pools[still]
        times = np.arange(beats)
        if rng.random() < cfg.gaps:
            times = np.sort(rng.permutation(2 * beats)[:beats])
        n = cfg.batch * (3 if still else 1)  # about the same number of tokens
        pick = torch.randint(len(latents), (n,), device=device)
        u = torch.rand(n, device=device)
        caption = torch.where(u < 0.1, ROW[""], torch.where(u < 0.5, rows[pick, 1], rows[pick, 0]))
        x, text = latents[pick].float(), texts[caption]
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, (n,), device=device)
        with autocast(device):
            loss = v_loss(call, pipe.scheduler, x, text, t, torch.randn_like(x)).mean()
        update(transformer, optimizer, loss)
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in transformer.parameters()],
                             1 - min(0.999, (step + 1) / (step + 10)))
        if step % 100 == 99:  # new creatures all the time: the pool turns over slowly
            for still, (latents, rows) in pools.items():
                new = torch.randperm(len(latents), device=device)[:250]
                latents[new], rows[new] = encode_pool(pipe, rng, 250, still, device, cfg)
        if step % 250 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    pipe.transformer = ema


def save(pipe, out):
    """float16 weights (the folder has a limit of 10 MB) but for T5, which transformers loads in the dtype it finds."""
    pipe.to("cpu")
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(out, safe_serialization=True)
    build_tokenizer(Path(out) / "tokenizer")  # CogVideoX-5b ships spiece.model, not tokenizer.json
    (Path(out) / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)


def main(cfg):
    device = find_device()
    pipe = build(cfg.seed).to(device)
    if cfg.init:
        pipe.transformer = CogVideoXTransformer3DModel.from_pretrained(cfg.init, subfolder="transformer").to(device)
        pipe.text_encoder = T5EncoderModel.from_pretrained(cfg.init, subfolder="text_encoder").to(device)
    if cfg.vae:
        pipe.vae = AutoencoderKLCogVideoX.from_pretrained(cfg.vae, subfolder="vae").to(device).requires_grad_(False)
    else:
        train_vae(pipe.vae, cfg, device)
    train_transformer(pipe, cfg, device)
    save(pipe, cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
