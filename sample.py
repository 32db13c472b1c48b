"""One picture of a subject and a sentence -> a video of that subject. The stock CogVideoX pipeline does the sampling.

    python sample.py --ref toy/refs/creature-0.png                                   # the toy, seconds on a CPU
    python sample.py --ref cat.jpg --prompt "a cat surfs a wave" --lora out/subject  # CogVideoX-5B
    python sample.py --ref cat.jpg --prompt "..." --offload model                    # on a small GPU
    torchrun --nproc_per_node=8 sample.py --bench bench.json --images ROOT --out DIR # a benchmark, on all GPUs

Writes OUT.mp4 (H.264) and OUT.png, a contact sheet: the reference, then frames of the video. A benchmark becomes a
folder of ID.mp4 and sampling.json (settings, prompts, seeds); paper/metrics.py scores it.
"""
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from common.args import check, command_line, find_device, knob, refuse_overwriting
from common.base import (attention_order, compute_dtype, frame_size, load_pipeline, tile_large_clips, tile_vae,
                         warn_of_another_size)
from common.find import ROOT, find_lora
from common.jobs import jobs_of_bench, jobs_of_flags, refuse_outputs, report, share_out
from common.media import clip_frames, contact_sheet, fit_reference, normalise, save_video, to_pixels
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


# What a LoRA from elsewhere, like the authors', does not say in its header: it is made for the paper's base.
HEADER = {"base": PAPER_BASE, "cls": "front", "guidance": "6.0", "fps": "8.0"}


def load(lora="", base="", device="cpu", use_lora=True, int8=False, lora_scale=1.0):
    """(pipeline, header): the base, with the LoRA on it unless use_lora is False. `lora` as for find_lora. device: the
    one that it is for, as in --device. The base is the one asked for, else the one that the LoRA's header names."""
    file = find_lora(lora)
    header = HEADER | lora_header(file)
    base = base or header["base"]
    if not Path(base).exists() and (ROOT / base).exists():
        base = ROOT / base  # "toy/base" means ours, wherever we are called from
    print(f"base {base}, LoRA {file if use_lora else 'none'}", file=sys.stderr)
    dtype = compute_dtype(find_device(device))
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
    guided = references is not None and ref_guidance != 1
    with guidance_on_picture(pipe.transformer, ref_guidance) if guided else nullcontext():
        return pipe(
            **words,
            height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            attention_kwargs={"reference": references}).frames


@contextmanager
def guidance_on_picture(transformer, S):
    """Inside, the pipeline's guidance with scale s on the text is joined by one with scale S on the picture:

        v(no text, ref) + s (v(text, ref) - v(no text, ref)) + (S - 1) (v(text, ref) - v(text, no ref))

    The last term is added to both halves of the batch, [no text | text], so that s does not multiply it: with the
    factor s it tears the toy's creatures at S = 3. The reference must be given for each video."""
    def add_pull(module, args, kwargs, output):
        (velocity,), reference = output, kwargs["attention_kwargs"]["reference"]
        n = len(reference)  # videos: the last n of the batch have their text
        last = {name: kwargs[name][-n:] for name in ("hidden_states", "encoder_hidden_states", "timestep")}
        nothing = torch.empty(0, dtype=torch.long)  # the video stays at frames 1..T, as in training's drops
        (without,) = module.forward(**{**kwargs, **last, "keep": nothing})
        pull = velocity[-n:] - without
        return (velocity + (S - 1) * pull.repeat(len(velocity) // n, 1, 1, 1, 1),)
    hook = transformer.register_forward_hook(add_pull, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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


def sample_in_batches(cfg, pipe, header, latents, batches, device):
    """(job, video) of each job, a batch of them at once; each is what it would be alone, to rounding.

    latents: {picture: its latents}. Each prompt goes through T5 once, and so does the negative one."""
    prompts = {job.prompt: with_reference_token(job.prompt, header["cls"]) for batch in batches for job in batch}
    text = {prompt: encode_prompt(pipe, [words], device) for prompt, words in prompts.items()}
    negative = encode_prompt(pipe, [""], device)
    for batch in batches:
        if not cfg.bench:
            for job in batch:
                print(f"{job.prompt!r}, seed {job.seed}")
        references = torch.cat([latents[path] for job in batch for path in job.pictures]) if latents else None
        with attention_order(device):
            videos = generate(pipe, references, [""] * len(batch), [job.seed for job in batch], cfg.steps,
                              cfg.guidance or float(header["guidance"]), cfg.frames, cfg.height, cfg.width,
                              text=(torch.cat([text[job.prompt] for job in batch]),
                                    negative.expand(len(batch), -1, -1)), ref_guidance=cfg.ref_guidance)
        yield from zip(batch, videos)


def write_sample(cfg, job, video, pictures, fps):
    """A video as mp4 with its contact sheet, one of --bench without, a single picture as png. pictures: {path: PIL}."""
    sheet, enlarge = job.file.with_suffix(".png"), max(1, 256 // video[0].height)  # tiny videos are enlarged to be seen
    if len(video) == 1:
        contact_sheet(video, enlarge=enlarge).save(sheet)
        return print(f"wrote {sheet}")
    save_video(job.file, video, fps, enlarge)
    if not cfg.bench:
        reference = pictures[job.pictures[0]] if job.pictures else None
        contact_sheet(video, reference, enlarge).save(sheet)
        print(f"wrote {job.file} and {sheet}")


def main(cfg):
    device = find_device(cfg.device)
    if cfg.offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {cfg.offload} keeps weights off a GPU until needed, and this run has none")
    if cfg.bench:
        join_ranks("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
        lora = find_lora(cfg.lora)
        every = jobs_of_bench(cfg, lora, (HEADER | lora_header(lora))["cls"])
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
    if header["cls"] == "item" and not all(REFERENCE_TOKEN in job.prompt.lower() for job in jobs):
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
        tile_large_clips(pipe.vae, height, width, frames)
        if cfg.offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.enable_sequential_cpu_offload(device=device)

    sampled = sample_in_batches(cfg, pipe, header, latents, batches, device)
    if cfg.bench:
        pipe.set_progress_bar_config(disable=True)
        sampled = tqdm(sampled, "videos of this rank", len(jobs), disable=rank_and_world_size()[0] > 0)
    for job, video in sampled:
        write_sample(cfg, job, video, pictures, cfg.fps or float(header["fps"]))
    if cfg.bench:
        report(cfg.out, every, skipped)


if __name__ == "__main__":
    command_line(main, Config, __doc__, out_of_memory="--offload model or sequential, --int8 True, fewer --frames")
