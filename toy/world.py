"""The toy world: pixel-art creatures that step over coloured fields. Small data for the real code.

    python -m toy.world data              toy/data: pairs as a parquet, clips as mp4 + txt, as the real data sets
    python -m toy.world bench             toy/data/bench: 96 unseen creatures for sample.py --bench and paper/metrics.py
    python -m toy.world score --lora DIR  sample these and score the videos exactly; toy/refs are the first six
    python -m toy.world picture           assets/toy.webp: references and their videos, side by side

toy/creatures.py says what a creature is, how it moves and how a video of it is scored. The base has seen more than the
LoRA's clips show, as a real one has: shots in which nothing moves, other actions and frame rates (toy/train_base.py).
"""
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.args import command_line, find_device, knob
from common.base import compute_dtype
from common.latents import Latents, prepare_cache
from common.run import read_json
from model import encode_video, with_reference_token
from sample import encode_references, generate, load
from toy.creatures import (BEATS, DATA, FIELD_RGB, FRAMES, ONE_PROCESS, SIZE, caption, draw_test_set, score_videos,
                           true_clips, write_missing)


def ensure_data(cfg, presets):
    """The data of `train.py --toy`, and their latents, encoded once as for a real run. Returns cfg. presets: TOY.

    A --cache in toy/data keeps a folder for each choice of --images, --videos and dtype (a GPU's is bfloat16); any
    other --cache is left as it is. With other data, another base or random crops each step encodes its own."""
    write_missing(cfg.images, cfg.videos, f"{cfg.images}_val", f"{cfg.videos}_val")
    if Path(cfg.cache).parent != Path("toy/data"):
        return cfg
    same = {k: getattr(cfg, k) for k in ("base", "frames", "fps", "crop_jitter")}
    ours = all(Path(folder).parent == Path("toy/data") for folder in (cfg.images, cfg.videos))
    if not ours or any(value != presets[k] for k, value in same.items()):
        return replace(cfg, cache="")
    dtype = str(compute_dtype(find_device(cfg.device))).removeprefix("torch.")
    cache = Path(cfg.cache) / f"{Path(cfg.images).name}+{Path(cfg.videos).name}-{dtype}"
    with ONE_PROCESS:
        made = [cache / task / "index.json" for task in ("image", "video")]
        if not all(index.is_file() and read_json(index).get("complete") for index in made):
            prepare_cache(Latents(out=str(cache), images=cfg.images, videos=cfg.videos, device=cfg.device, **same))
    return replace(cfg, cache=str(cache))


def sample_test_set(pipe, test, references=None, seed=0, batch=16, **options):
    """Videos uint8 (n,F,32,32,3) for the test set's prompts and references (None: without any)."""
    videos, seeds = [], range(seed, seed + len(test.prompts))
    for i in tqdm(range(0, len(seeds), batch), f"batches of {batch} videos"):
        chunk, latents = slice(i, i + batch), None
        if references is not None:
            latents = encode_references(pipe, [Image.fromarray(r) for r in references[chunk]], SIZE, SIZE)
        pictures = generate(pipe, latents, test.prompts[chunk], seeds[chunk], **options)
        videos += [np.stack([np.asarray(p) for p in video]) for video in pictures]
    return np.stack(videos)


def score_lora(lora, n, with_reference=True, guidance=0.0, frames=0, picture_by=None, **options):
    """(scores, videos) of the LoRA at `lora` on the first n of the test set. guidance 0 takes the LoRA's own.

    frames=1 samples single pictures instead, of a creature that stands: what image steps train. picture_by: a LoRA that
    first makes such pictures on the prompts' fields; they are then the references."""
    pipe, header = load(lora=str(lora))
    test = draw_test_set(n)
    if frames == 1:
        test = replace(test, prompts=[caption(f) for f in test.fields])
    words = [with_reference_token(p, header["cls"], "creature") for p in test.prompts]
    test = replace(test, prompts=words)
    references = test.references if with_reference else None
    if picture_by:
        references = score_lora(picture_by, n, frames=1, **options)[1][:, 0]
    videos = sample_test_set(pipe, test, references, cls=header["cls"],
                             guidance=guidance or float(header["guidance"]), frames=frames, **options)
    return score_videos(videos, test), videos


def through_vae(pipe, clips):
    """What is left of true clips after the VAE: the ceiling of every score."""
    latents = encode_video(pipe.vae, torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1)
    with torch.no_grad():
        frames = pipe.decode_latents(latents)  # (n,3,F,H,W)
    return ((frames / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()


def score_controls(lora, n, **options):
    """{name: scores} of what the scores can be fooled by, and of what bounds them."""
    pipe, header = load(lora=str(lora), use_lora=False)
    test = draw_test_set(n)
    true = true_clips(test)
    empty = np.broadcast_to(FIELD_RGB[test.fields][:, None, None, None], true.shape).astype(np.uint8)
    another = replace(test, creatures=test.creatures[np.roll(np.arange(n), 1)])
    options["guidance"] = float(header["guidance"])
    videos = {"the true clips, through the VAE": through_vae(pipe, true),
              "the reference as a still": np.repeat(test.references[:, None], FRAMES, 1), "an empty field": empty,
              "the base without a reference": sample_test_set(pipe, test, **options)}
    rows = {name: score_videos(v, test) for name, v in videos.items()}
    rows["the true clips of other creatures"] = score_videos(true, another)
    return rows


@dataclass
class Score:
    lora: list[str] = knob(["toy/lora"], "LoRA files, folders or runs; several (seeds) are averaged")
    n: int = knob(96, "unseen creatures and prompts")
    steps: int = knob(50, "denoising steps")
    guidance: float = knob(0.0, "classifier-free guidance scale; 0 takes the LoRA's")
    ref_guidance: float = knob(1.0, "guidance scale on the picture, as in sample.py")
    frames: int = knob(0, "1 scores single pictures; 0 takes the base's length")
    out: str = knob("", "also write the rows to this json file")


def score(cfg):
    """Sample the test set with each LoRA and print the exact scores as a table."""
    seeds = [score_lora(lora, cfg.n, steps=cfg.steps, guidance=cfg.guidance, frames=cfg.frames,
                        ref_guidance=cfg.ref_guidance)[0] for lora in cfg.lora]
    rows = dict(zip(cfg.lora, seeds))
    if len(seeds) > 1:
        rows["mean"] = {k: float(np.mean([s[k] for s in seeds])) for k in seeds[0]}
        rows["std"] = {k: float(np.std([s[k] for s in seeds], ddof=1)) for k in seeds[0]}
    names = list(seeds[0])
    print(f"\n| n = {cfg.n}, per cent | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[k]:.1f}" for k in names) + " |")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps({**asdict(cfg), "rows": rows}, indent=1))


def enlarged(pixels, scale):
    """Pixels (H,W,3) as a picture that people can see."""
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def write_bench(folder, n=96):
    """The test set as a benchmark for sample.py --bench: n pictures with their prompts, and bench.json. Its seeds are
    those of `score`."""
    test, bench = draw_test_set(n), {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(test.prompts):
        name = f"creature-{i}"
        enlarged(test.references[i], 8).save(Path(folder) / f"{name}.png")
        (Path(folder) / f"{name}.txt").write_text(prompt + "\n")
        bench[name] = {"img_paths": [f"{name}.png"], "prompt": prompt, "class_label": "creature"}
    (Path(folder) / "bench.json").write_text(json.dumps(bench, indent=1))


@dataclass
class Picture:
    lora: list[str] = knob(["toy/lora"], "LoRAs to show side by side")
    titles: list[str] = knob(["ours"], "a title for each")
    n: int = knob(6, "creatures: the first of the test set")
    steps: int = knob(50, "denoising steps")
    out: str = knob("assets/toy.webp", "file to write: .webp or .gif moves, .png shows the latent frames in a row")


def picture(cfg, scale=4):
    """Reference pictures in the first column; beside them each LoRA's videos, moving or as a row of frames. Above each
    row its prompt."""
    test = draw_test_set(cfg.n)
    videos = [score_lora(lora, cfg.n, steps=cfg.steps)[1] for lora in cfg.lora]
    side, gap, top, words = SIZE * scale, 12, 28, 20
    moving = Path(cfg.out).suffix != ".png"
    shown, sheets = [[frame] for frame in range(FRAMES)] if moving else [np.cumsum(BEATS) - 1], []  # of each sheet
    lefts = [side + gap + k * (len(shown[0]) * (side + 2) + gap) for k in range(len(videos) + 1)]  # the last: the end
    for frames in shown:
        sheet = Image.new("RGB", (max(lefts[-1], 3 * side), top + cfg.n * (words + side)), "white")
        write = ImageDraw.Draw(sheet)
        write.text((4, 6), "reference", "black", font_size=14)
        for left, title in zip(lefts, cfg.titles):
            write.text((left + 4, 6), title, "black", font_size=14)
        for i in range(cfg.n):
            y = top + words + i * (words + side)
            write.text((4, y - words + 3), test.prompts[i], "black", font_size=11)
            sheet.paste(enlarged(test.references[i], scale), (0, y))
            for left, video in zip(lefts, videos):
                for j, frame in enumerate(frames):
                    sheet.paste(enlarged(video[i, frame], scale), (left + j * (side + 2), y))
        sheets.append(sheet)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    times = [800] + [250] * (FRAMES - 2) + [1200]  # ms: time to see where it begins and ends
    how = dict(save_all=True, append_images=sheets[1:], duration=times, loop=0, lossless=True) if moving else {}
    sheets[0].save(cfg.out, **how)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    command, *words = sys.argv[1:] or [""]
    actions = {"score": (Score, score), "picture": (Picture, picture)}
    writers = {"data": lambda: write_missing(*(f"toy/data/{name}" for name in DATA)),
               "bench": lambda: write_bench("toy/data/bench")}
    if command in actions:
        config, action = actions[command]
        command_line(action, config, action.__doc__, words)
    elif command in writers and not words:
        writers[command]()
    else:
        usage = f"usage: python -m toy.world {' | '.join([*writers, *(f'{name} [--help]' for name in actions)])}"
        sys.exit(print(usage) if command in ("-h", "--help") else usage)
