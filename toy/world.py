"""The toy world: pixel-art creatures that step over coloured fields. Small data for the real code.

    python -m toy.world data              toy/data: pairs as a parquet, clips as mp4 + txt, as the real data sets
    python -m toy.world refs              toy/refs: reference pictures of creatures that no training step sees
    python -m toy.world bench             toy/data/bench: 96 of them as a benchmark for sample.py and paper/metrics.py
    python -m toy.world score --lora DIR  sample 96 unseen creatures and score the videos exactly
    python -m toy.world noise             assets/noise.png: how noise becomes a video, model by model
    python -m toy.world picture           assets/toy.webp: references and their videos, side by side

toy/creatures.py says what a creature is, how it moves and how a video of it is scored. Both views of a pair show it in
the same place, as the centred subjects of Subjects200K (5.4): with another place in each view an image-only model tears
creatures apart. The base has seen more than the LoRA's clips show, as a real one has: shots in which nothing moves,
other actions, other frame rates (toy/train_base.py).

`score` also prints the control rows (--controls True) that show what each score can be fooled by.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.args import command_line, knob
from common.base import compute_dtype, find_device
from common.latents import Latents, prepare_cache
from common.run import read_json
from model import encode_video, with_reference_token
from sample import cls_of, encode_references, generate, guidance_of, load
from toy.creatures import (BEATS, DATA, FIELD_RGB, FRAMES, SIZE, caption, draw_test_set, one_process, score_videos,
                           true_clips, write_missing)


def ensure_data(cfg, presets):
    """The data of `train.py --toy`, and their latents, encoded once as for a real run. Returns cfg. presets: TOY.

    A --cache in toy/data keeps a folder for each choice of --images, --videos and dtype (a GPU's is bfloat16), encoded
    on the run's own device; any other --cache is left as it is. With other data, another base or random crops nothing
    is cached, and each step encodes its own.
    """
    write_missing(cfg.images, cfg.videos, f"{cfg.images}_val", f"{cfg.videos}_val")
    if Path(cfg.cache).parent != Path("toy/data"):
        return cfg
    usual = {f.name: f.default for f in dataclasses.fields(cfg)} | presets
    encoding = ("base", "frames", "fps", "crop_jitter")
    same = {k: getattr(cfg, k) for k in encoding}
    ours = all(Path(folder).parent == Path("toy/data") for folder in (cfg.images, cfg.videos))
    if not ours or any(same[k] != usual[k] for k in encoding):
        return dataclasses.replace(cfg, cache="")
    dtype = str(compute_dtype(find_device(cfg.device))).removeprefix("torch.")
    cache = Path(cfg.cache) / f"{Path(cfg.images).name}+{Path(cfg.videos).name}-{dtype}"
    with one_process():
        made = [cache / task / "index.json" for task in ("image", "video")]
        if not all(index.is_file() and read_json(index).get("complete") for index in made):
            prepare_cache(Latents(out=str(cache), images=cfg.images, videos=cfg.videos, device=cfg.device, **same))
    return dataclasses.replace(cfg, cache=str(cache))


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
        test = dataclasses.replace(test, prompts=[caption(f) for f in test.fields])
    cls = cls_of(header)
    test = dataclasses.replace(test, prompts=[with_reference_token(p, cls, "creature") for p in test.prompts])
    references = test.references if with_reference else None
    if picture_by:
        references = score_lora(picture_by, n, frames=1, **options)[1][:, 0]
    videos = sample_test_set(pipe, test, references, cls=cls,
                             guidance=guidance or guidance_of(header), frames=frames, **options)
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
    empty = np.broadcast_to(FIELD_RGB[test.fields][:, None, None, None], (n, FRAMES, SIZE, SIZE, 3)).astype(np.uint8)
    another = dataclasses.replace(test, creatures=test.creatures[np.roll(np.arange(n), 1)])
    videos = {"the true clips, through the VAE": through_vae(pipe, true_clips(test)),
              "the reference as a still": np.repeat(test.references[:, None], FRAMES, 1), "an empty field": empty,
              "the base without a reference": sample_test_set(pipe, test, guidance=guidance_of(header), **options)}
    rows = {name: score_videos(v, test) for name, v in videos.items()}
    rows["the true clips of other creatures"] = score_videos(true_clips(test), another)
    return rows


@dataclass
class Score:
    lora: list[str] = knob(["toy/lora"], "LoRA files, folders or runs; several (seeds) are averaged")
    n: int = knob(96, "unseen creatures and prompts")
    steps: int = knob(50, "denoising steps")
    guidance: float = knob(0.0, "classifier-free guidance scale; 0 takes the LoRA's")
    ref_guidance: float = knob(1.0, "guidance scale on the picture, as in sample.py")
    frames: int = knob(0, "1 scores single pictures; 0 takes the base's length")
    controls: bool = knob(False, "also print what the scores can be fooled by")
    out: str = knob("", "also write the rows to this json file")


def score(cfg):
    """Sample the test set with each LoRA and print the exact scores as a table."""
    rows = score_controls(cfg.lora[0], cfg.n, steps=cfg.steps) if cfg.controls else {}
    seeds = []
    for lora in cfg.lora:
        rows[lora], _ = score_lora(lora, cfg.n, guidance=cfg.guidance, frames=cfg.frames, steps=cfg.steps,
                                  ref_guidance=cfg.ref_guidance)
        seeds.append(rows[lora])
    if len(seeds) > 1:
        rows["mean"] = {k: float(np.mean([s[k] for s in seeds])) for k in seeds[0]}
        rows["std"] = {k: float(np.std([s[k] for s in seeds], ddof=1)) for k in seeds[0]}
    names = list(seeds[0])
    print(f"\n| n = {cfg.n}, per cent | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[k]:.1f}" for k in names) + " |")
    if cfg.out:
        Path(cfg.out).write_text(json.dumps({**dataclasses.asdict(cfg), "rows": rows}, indent=1))


def write_refs(folder, n=6):
    """The first n reference pictures of the test set, enlarged so that people can see them, each with its prompt."""
    test = draw_test_set()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture = Image.fromarray(test.references[i])
        picture.resize((SIZE * 8, SIZE * 8), Image.NEAREST).save(Path(folder) / f"creature-{i}.png")
        (Path(folder) / f"creature-{i}.txt").write_text(test.prompts[i] + "\n")


def write_bench(folder, n=96):
    """The test set as a benchmark for sample.py --bench: n pictures and bench.json. Its seeds are those of `score`."""
    write_refs(folder, n)
    bench = {f"creature-{i}": {"img_paths": [f"creature-{i}.png"], "prompt": prompt, "class_label": "creature"}
             for i, prompt in enumerate(draw_test_set(n).prompts)}
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
    shown = [[frame] for frame in range(FRAMES)] if moving else [np.cumsum(BEATS) - 1]  # columns of each sheet
    block = len(shown[0]) * (side + 2)

    def sheet(columns):
        width = side + gap + len(videos) * (block + gap)
        paper = Image.new("RGB", (max(width, 3 * side), top + cfg.n * (words + side)), "white")
        write = ImageDraw.Draw(paper)
        write.text((4, 6), "reference", "black", font_size=14)
        for k, title in enumerate(cfg.titles):
            write.text((side + gap + k * (block + gap) + 4, 6), title, "black", font_size=14)
        for i in range(cfg.n):
            y = top + words + i * (words + side)
            write.text((4, y - words + 3), test.prompts[i], "black", font_size=11)
            paper.paste(Image.fromarray(test.references[i]).resize((side, side), Image.NEAREST), (0, y))
            for k, v in enumerate(videos):
                for j, frame in enumerate(columns):
                    x = side + gap + k * (block + gap) + j * (side + 2)
                    paper.paste(Image.fromarray(v[i, frame]).resize((side, side), Image.NEAREST), (x, y))
        return paper
    sheets = [sheet(columns) for columns in shown]
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    if moving:
        times = [800] + [250] * (len(sheets) - 2) + [1200]  # ms: time to see where it begins and ends
        sheets[0].save(cfg.out, save_all=True, append_images=sheets[1:], duration=times, loop=0, lossless=True)
    else:
        sheets[0].save(cfg.out)
    print(f"wrote {cfg.out}")


@dataclass
class Noise:
    lora: list[str] = knob(["toy/lora"], "LoRAs, a row for each; the base without one comes first")
    titles: list[str] = knob(["dual-task"], "a title for each")
    creature: int = knob(2, "which of the test set")
    steps: int = knob(20, "denoising steps")
    out: str = knob("assets/noise.png", "file to write")


def noise(cfg, scale=3):
    """How noise becomes a video: what each model takes the finished video for, at five moments of its denoising."""
    test, rows = draw_test_set(cfg.creature + 1), []
    left = [cfg.steps - cfg.steps * quarter // 4 for quarter in range(5)]  # 20, 15, 10, 5 and 0 steps
    for lora in ("", *cfg.lora):
        pipe, header = load(lora=lora or cfg.lora[0], use_lora=bool(lora))
        predicted, step = [], pipe.scheduler.step

        def note(*args, **kwargs):
            out = step(*args, **kwargs)
            predicted.append(out[1])  # x0, as this step predicts it
            return out
        pipe.scheduler.step = note
        references = encode_references(pipe, [Image.fromarray(test.references[-1])], SIZE, SIZE) if lora else None
        generate(pipe, references, test.prompts[-1:], [0], steps=cfg.steps, guidance=guidance_of(header))
        with torch.no_grad():
            videos = [pipe.decode_latents(predicted[min(cfg.steps - n, cfg.steps - 1)])[0] for n in left]  # (3,F,H,W)
        frames = [((video[:, [0, 4, 8]] / 2 + 0.5).clamp(0, 1) * 255).byte() for video in videos]
        rows.append([three.permute(2, 1, 3, 0).flatten(1, 2).numpy() for three in frames])  # (H, 3 W, 3)
    side, gap, words = SIZE * scale, 12, 20
    paper = Image.new("RGB", (side + 5 * (3 * side + gap), words + len(rows) * (words + side)), "white")
    write = ImageDraw.Draw(paper)
    write.text((side + gap, 3), f"{test.prompts[-1]}: first, middle and last frame", "black", font_size=13)
    for i, (title, row) in enumerate(zip(("the base, no picture", *cfg.titles), rows)):
        y = words + i * (words + side)
        write.text((side + gap, y + 3), title, "black", font_size=12)
        if i:
            paper.paste(Image.fromarray(test.references[-1]).resize((side, side), Image.NEAREST), (0, y + words))
        for j, three in enumerate(row):
            x = side + gap + j * (3 * side + gap)
            write.text((x + 2 * side, y + 3), f"{left[j]} steps left", "black", font_size=11)
            paper.paste(Image.fromarray(three).resize((3 * side, side), Image.NEAREST), (x, y + words))
    paper.save(cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    command, *words = sys.argv[1:] or [""]
    actions = {"score": (Score, score), "picture": (Picture, picture), "noise": (Noise, noise)}
    writers = {"data": lambda: write_missing(*(f"toy/data/{name}" for name in DATA)),
               "refs": lambda: write_refs("toy/refs"), "bench": lambda: write_bench("toy/data/bench")}
    if command in actions:
        config, action = actions[command]
        command_line(action, config, action.__doc__, words)
    elif command in writers and not words:
        writers[command]()
    else:
        usage = f"usage: python -m toy.world {' | '.join([*writers, *actions])} [--help]"
        sys.exit(print(usage) if command in ("-h", "--help") else usage)
