"""Benchmark files for sample.py --bench, and the toy's controls, which fool the metrics."""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from toy.creatures import FPS, FRAMES, draw_test_set, true_clips
from common.args import check, knob
from common.media import read_text, save_video
from common.run import write


@dataclass
class Bench:
    refs: str = knob("refs", "folder of reference pictures; a name without its number is the subject's: toy_cat-2.jpg")
    prompts: str = knob("prompts.txt", "a line each; {} is the subject; 'toy_cat-2: a sentence' is for that picture")
    out: str = knob("bench.json", "file to write, for sample.py --bench with --images the folder of pictures")


def make_bench(cfg):
    """Pictures and prompts -> a benchmark file: every picture with each of its prompts (the paper: 30 with 4 each)."""
    kinds = Image.registered_extensions()
    pictures = {f.stem: f.name for f in sorted(Path(cfg.refs).iterdir()) if f.suffix.lower() in kinds}
    if not pictures:
        raise ValueError(f"--refs: no pictures in {cfg.refs}")
    lines, bench = [line.strip() for line in read_text(cfg.prompts).splitlines() if line.strip()], {}
    for stem, file in pictures.items():
        subject = re.sub(r"[\W_]+", " ", re.sub(r"[\W_]*\d+$", "", stem)).strip() or stem
        others = pictures.keys() - {stem}
        own = [line.removeprefix(f"{stem}: ") for line in lines if line.partition(": ")[0] not in others]
        for i, prompt in enumerate(own):
            prompt = prompt.replace("{}", subject)
            bench[f"{stem}-{i}"] = {"img_paths": [file], "prompt": prompt, "class_label": subject}
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write(Path(cfg.out), json.dumps(bench, indent=1))
    print(f"wrote {cfg.out}: {len(pictures)} pictures, {len(bench)} videos")


# OpenS2V's weights for ids of all kinds (arXiv 2505.20292; people alone have others).
OPENS2V = {"v1.0": dict(aesthetics=.12, motion=.12, face=.20, gme=.12, nexus=.20, natural=.24),
           "v1.1": dict(aesthetics=.16, smoothness=.06, amplitude=.02, face=.20, gme=.12, nexus=.20, natural=.24)}


def opens2v_total(scores, version):
    """OpenS2V's total (Table 12) from the scores of its own scorers, {name: per cent}. KeyError when one is missing:
    OpenS2V would count it as 0. Totals of v1.0 and v1.1 cannot be compared."""
    return sum(weight * scores[name] for name, weight in OPENS2V[version].items())


@dataclass
class Controls:
    out: str = knob("out/controls", "folder to write: the benchmark, and a folder of videos for each control")
    n: int = knob(96, "creatures, 96 at most")


def make_controls(cfg):
    """Videos of the toy that show what a metric can and cannot see: the true clips, the reference as a still, another
    creature's clips, the true clips with their frames in random order; and other true clips, for FVD."""
    from toy import world
    check(cfg, positive="n")
    out, rng = Path(cfg.out), np.random.default_rng(0)
    world.write_bench(out / "refs", cfg.n)
    test = draw_test_set(cfg.n)
    true = true_clips(test)
    order = [rng.permutation(FRAMES) for _ in true]
    sets = {"true": true, "still": np.repeat(test.references[:, None], FRAMES, 1), "other": np.roll(true, 1, 0),
            "frames-shuffled": np.stack([v[o] for v, o in zip(true, order)]), "real": true_clips(test, seed=1)}
    for name, videos in sets.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for i, video in enumerate(tqdm(videos, name)):
            save_video(out / name / f"creature-{i}.mp4", [Image.fromarray(f) for f in video], FPS, enlarge=8)
    print(f"wrote {out}: {', '.join(sets)}; score with --bench {out}/refs/bench.json --images {out}/refs --toy True")
