"""One picture of a subject and a sentence -> a video of that subject. The stock CogVideoX pipeline does the sampling.

    python sample.py --ref toy/refs/creature-0.png                                   # the toy, seconds on a CPU
    python sample.py --ref cat.jpg --prompt "a cat surfs a wave" --lora out/subject  # CogVideoX-5B
    python sample.py --ref cat.jpg --prompt "..." --offload model                    # on a small GPU
    torchrun --nproc_per_node=8 sample.py --bench bench.json --images ROOT --out DIR # a benchmark, on all GPUs

Writes OUT.mp4 (H.264) and OUT.png, a contact sheet: the reference, then frames of the video. A benchmark becomes a
folder of ID.mp4 and sampling.json (settings, prompts, seeds); paper/metrics.py scores it.
"""
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from common.args import check, command_line, find_device, knob, refuse_overwriting
from common.base import attention_order, frame_size, load_pipeline, sampling_dtype, tile_vae, warn_of_another_size
from common.find import ROOT, find_lora
from common.jobs import jobs_of_bench, jobs_of_flags, refuse_outputs, report, share_out
from common.media import clip_frames, fit_reference, normalise, resize_center_crop, save_video, to_pixels
from common.run import join_ranks, rank_and_world_size
from model import (PAPER_BASE, REFERENCE_TOKEN, encode_prompt, encode_video, load_lora, lora_header,
                   with_reference_token)


@dataclass
class Config:
    ref: str = knob("", "picture of the subject, any size and mode; empty samples without a reference")
    prompt: str = knob("", "what happens; empty takes the text file beside the picture, if there is one")
    prompts: str = knob("", "text file with one prompt per line: one video each")
    bench: str = knob("", "benchmark to sample, OpenS2V's json {id: {img_paths, prompt, class_label}}: one video an id")
    images: str = knob(".", "folder that the img_paths of --bench start from")
    batch: int = knob(1, "videos of --prompts or --bench that are sampled at once")
    lora: str = knob("", "LoRA file, checkpoint or run; empty takes the newest checkpoint under out/, else toy/lora")
    base: str = knob("", "diffusers CogVideoX folder or hub id; empty takes the one the LoRA was trained on")
    out: str = knob("sample.mp4", "file to write; .png for a single picture (--frames 1); with --bench a folder")
    seed: int = knob(0, "seed of the starting noise; video number i of --bench has seed + i")
    steps: int = knob(50, "denoising steps")
    guidance: float = knob(0.0, "classifier-free guidance scale, on the text only; 1 is off; 0 takes the LoRA's (6)")
    ref_guidance: float = knob(1.0, "guidance scale on the picture: above 1 the subject is more like it, in 1.5 times "
                                    "the time; 1 is off")
    lora_scale: float = knob(1.0, "how much of the LoRA: 0 is the base alone, 1 what was trained")
    frames: int = knob(0, "frames of the video, cut to 8k+1; 1 makes a picture; 0 takes the base's (49)")
    fps: float = knob(0.0, "frames per second of the file; 0 takes the LoRA's training rate (8)")
    height: int = knob(0, "height in pixels; 0 takes the base's (480)")
    width: int = knob(0, "width in pixels; 0 takes the base's (720)")
    fit: str = knob("cover", "the reference fills the frame and is cut, or is shown whole on white", "cover", "pad")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")
    int8: bool = knob(False, "keep the transformer in 8 bits (torchao): half the memory, another picture")
    offload: str = knob("none", "keeps weights in RAM until needed (for a small GPU)", "none", "model", "sequential")

    def __post_init__(self):
        check(self, positive="steps batch")
        suffixes = (".png", ".mp4") if self.frames == 1 else (".mp4", ".mov", ".mkv")
        if self.bench and (self.ref or self.prompt or self.prompts or self.frames == 1):
            raise ValueError("--bench names the pictures and prompts: leave out --ref, --prompt, --prompts, --frames 1")
        if self.bench:
            refuse_overwriting([self.bench], [Path(self.out) / "sampling.json"])
        if self.bench and Path(self.out).suffix in suffixes:
            raise ValueError(f"--bench writes many videos: --out must be a folder, got {self.out!r}")
        if not self.bench and Path(self.out).suffix not in suffixes:
            raise ValueError(f"--out must end in {' or '.join(suffixes)}, got {self.out!r}")
        if self.ref_guidance != 1 and not (self.ref or self.bench):
            raise ValueError("--ref_guidance is guidance on a picture: it needs --ref or --bench")
        if self.prompt and self.prompts:
            raise ValueError("--prompt and --prompts exclude each other: put every prompt into the file")
        if self.prompt and not self.prompt.strip():
            raise ValueError("--prompt is blank")
        if self.fps and not 0.1 <= self.fps <= 1000:
            raise ValueError(f"--fps must be between 0.1 and 1000, got {self.fps:g}")


def load(lora="", base="", device="cpu", use_lora=True, int8=False, lora_scale=1.0):
    """(pipeline, header): the base, with the LoRA on it unless use_lora is False. `lora` as for find_lora. device: the
    one that it is for, as in --device.

    The base is the one asked for, else the one named in the LoRA's header, else the paper's."""
    file = find_lora(lora)
    header = lora_header(file)
    base = base or header.get("base", PAPER_BASE)
    if not Path(base).exists() and (ROOT / base).exists():
        base = ROOT / base  # "toy/base" means ours, wherever we are called from
    print(f"base {base}, LoRA {file if use_lora else 'none'}", file=sys.stderr)
    dtype = sampling_dtype(base, find_device(device))
    pipe = load_pipeline(base, dtype, int8=int8, asked=device)  # in RAM: the caller moves or offloads it
    if use_lora:
        load_lora(pipe.transformer, file)
        if pipe.transformer.lora_scope == "all" and not int8:  # fold it into the base: a third fewer calls
            pipe.transformer.fuse_lora(lora_scale=lora_scale)
            pipe.transformer.unload_lora()
        else:
            pipe.transformer.set_adapters("default", lora_scale)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        pipe.transformer.eval().requires_grad_(False)
    pipe.vae.enable_slicing()  # a batch of videos is decoded one by one
    return pipe, header


def cls_of(header):
    """Where this LoRA's training put <cls> (train.py's --cls). A LoRA from elsewhere, like the authors', has it in
    front."""
    return header.get("cls", "front")


def guidance_of(header):
    """The guidance scale that this LoRA's run asks for; the authors' 6 where the file does not say."""
    return float(header.get("guidance", 6.0))


def encode_references(pipe, pictures, height, width, fit="cover"):
    """PIL pictures -> scaled latents (B,1,C,H/8,W/8) on the VAE's device.

    Each picture is resized to cover the frame, or with white beside it to fit in (--fit pad). The VAE encodes it to its
    mean, so that nothing is random but the starting noise."""
    pixels = [to_pixels([fit_reference(picture, height, width, fit)]) for picture in pictures]
    return encode_video(pipe.vae, normalise(torch.stack(pixels)))  # of (B, 1, 3, H, W)


def generate(pipe, references, prompts, seeds, steps=50, guidance=6.0, frames=0, height=0, width=0, cls="front",
             text=None, ref_guidance=1.0):
    """Videos as lists of PIL pictures, one per prompt.

    references: latents from encode_references, one per prompt or one for all, or None (text-to-video). text: embeddings
    (positive, negative) in place of the prompts, when the text encoder is not on the pipeline's device.
    """
    height, width = height or frame_size(pipe)[0], width or frame_size(pipe)[1]
    frames = clip_frames(frames or pipe.transformer.config.sample_frames, pipe.vae_scale_factor_temporal)
    if references is not None:
        references = references.expand(len(prompts), -1, -1, -1, -1)
    words = dict(prompt=[with_reference_token(p, cls) for p in prompts])
    if text is not None:
        words = dict(prompt_embeds=text[0], negative_prompt_embeds=text[1])
    return pipe(
        **words,
        height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        attention_kwargs={"reference": references, "ref_guidance": ref_guidance}).frames


def decode_what_fits(vae):
    """Let the VAE decode in tiles when the whole video does not fit on the GPU."""
    whole = vae.decode

    def decode(*args, **kwargs):
        try:
            return whole(*args, **kwargs)
        except torch.OutOfMemoryError:
            pass  # the error holds what was computed so far: try again when it is gone
        torch.cuda.empty_cache()
        tile_vae(vae)
        return whole(*args, **kwargs)
    vae.decode = decode


def contact_sheet(video, reference=None, enlarge=1, columns=6):
    """One row: the reference, a gap, then `columns` frames evenly spread over the video."""
    picks = sorted({round(i * (len(video) - 1) / max(columns - 1, 1)) for i in range(columns)})
    w, h, gap = video[0].width * enlarge, video[0].height * enlarge, 4
    row = [video[i].resize((w, h), Image.NEAREST) for i in picks]
    if reference is not None:
        row.insert(0, resize_center_crop(reference, h, w))
    sheet = Image.new("RGB", ((w + gap) * len(row) - gap, h), "white")
    for i, picture in enumerate(row):
        sheet.paste(picture, (i * (w + gap), 0))
    return sheet


def sample_in_batches(cfg, pipe, header, latents, batches, device):
    """(job, video) of each job, a batch of them at once; each is what it would be alone, to rounding.

    latents: {picture: its latents}. Each prompt goes through T5 once, and so does the negative one."""
    prompts = {job.prompt: with_reference_token(job.prompt, cls_of(header)) for batch in batches for job in batch}
    text = {prompt: encode_prompt(pipe, [words], device) for prompt, words in prompts.items()}
    negative = encode_prompt(pipe, [""], device)
    for batch in batches:
        if not cfg.bench:
            for job in batch:
                print(f"{job.prompt!r}, seed {job.seed}")
        references = torch.cat([latents[path] for job in batch for path in job.pictures]) if latents else None
        with attention_order(device):
            videos = generate(pipe, references, [""] * len(batch), [job.seed for job in batch], cfg.steps,
                              cfg.guidance or guidance_of(header), cfg.frames, cfg.height, cfg.width,
                              text=(torch.cat([text[job.prompt] for job in batch]),
                                    negative.expand(len(batch), -1, -1)), ref_guidance=cfg.ref_guidance)
        yield from zip(batch, videos)


def write_sample(cfg, job, video, pictures, fps):
    """A video as mp4 with its contact sheet, one of --bench without, a single picture as png. pictures: {path: PIL}."""
    file, enlarge = job.file, max(1, 256 // video[0].height)  # tiny videos are enlarged, so that they can be seen
    if len(video) == 1:
        picture = video[0].resize((video[0].width * enlarge, video[0].height * enlarge), Image.NEAREST)
        picture.save(file.with_suffix(".png"))
        print(f"wrote {file.with_suffix('.png')}")
    elif cfg.bench:  # all or nothing: what is there is done
        save_video(f"{file}.part", video, fps, enlarge, format="mp4")
        os.replace(f"{file}.part", file)
    else:
        save_video(file, video, fps, enlarge)
        reference = pictures[job.pictures[0]] if job.pictures else None
        contact_sheet(video, reference, enlarge).save(file.with_suffix(".png"))
        print(f"wrote {file} and {file.with_suffix('.png')}")


def main(cfg):
    device = find_device(cfg.device)
    if cfg.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {cfg.offload} keeps weights off a GPU until needed, and this run has none")
    if cfg.bench:
        join_ranks("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
        lora = find_lora(cfg.lora)
        every = jobs_of_bench(cfg, lora, cls_of(lora_header(lora)))
    else:
        every = jobs_of_flags(cfg)
    refuse_outputs(cfg, every)
    batches, pictures, skipped = share_out(cfg, every)
    jobs = [job for batch in batches for job in batch]
    if not jobs:  # all is done, or there are more ranks than batches
        return report(cfg.out, every, skipped) if cfg.bench else None

    pipe, header = load(cfg.lora, cfg.base, cfg.device, int8=cfg.int8, lora_scale=cfg.lora_scale)
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size
    if cfg.height % multiple or cfg.width % multiple:
        raise ValueError(f"--height and --width must be multiples of {multiple}, got {cfg.height} x {cfg.width}")
    if cfg.steps > (most := pipe.scheduler.config.num_train_timesteps):
        raise ValueError(f"--steps must be at most {most}, the timesteps of training, got {cfg.steps}")
    height, width = cfg.height or frame_size(pipe)[0], cfg.width or frame_size(pipe)[1]
    frames = clip_frames(cfg.frames or pipe.transformer.config.sample_frames, pipe.vae_scale_factor_temporal)
    if cfg.frames not in (0, frames):
        print(f"--frames {cfg.frames} cut to {frames}, a length that the VAE can make")
    warn_of_another_size(pipe, height, width, frames)
    if cls_of(header) == "item" and not all(REFERENCE_TOKEN in job.prompt.lower() for job in jobs):
        print(f"this LoRA learned {REFERENCE_TOKEN} before the subject's name ('An {REFERENCE_TOKEN} armchair ...'): "
              "without one in the prompt it goes in front")
    # References before any offloading: after it vae.device is not where the VAE runs.
    pipe.vae.to(device)
    latents = {path: encode_references(pipe, [picture], height, width, cfg.fit).to(device)
               for path, picture in pictures.items()}
    if cfg.offload == "none":
        pipe.to(device)
        decode_what_fits(pipe.vae)
    else:
        pipe.vae.to("cpu")
        tile_vae(pipe.vae)
        if cfg.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_sequential_cpu_offload(device=device)

    sampled = sample_in_batches(cfg, pipe, header, latents, batches, device)
    if cfg.bench:
        pipe.set_progress_bar_config(disable=True)
        sampled = tqdm(sampled, "videos of this rank", len(jobs), disable=rank_and_world_size()[0] > 0)
    for job, video in sampled:
        write_sample(cfg, job, video, pictures, cfg.fps or float(header.get("fps", 8)))
    if cfg.bench:
        report(cfg.out, every, skipped)


if __name__ == "__main__":
    command_line(main, Config, __doc__, out_of_memory="--offload model or sequential, --int8 True, fewer --frames")
