"""The paper's metrics for a folder of videos (Tables 2 and 11), each with its n.

    python -m paper.metrics bench --refs FOLDER --prompts FILE --out bench.json
    torchrun --nproc_per_node=8 sample.py --bench bench.json --images FOLDER --lora out/subject --out out/videos
    python -m paper.metrics out/videos --bench bench.json --images FOLDER     # prints a table, writes results.json
    python -m paper.metrics controls --out out/controls                       # toy videos that fool metrics

The paper calls its five columns VBench metrics. VBench has no CLIP-T, CLIP-I or DINO-I: those follow DreamVideo's
script and are here; paper/motion.py and fvd.py have the others. A metric whose weights or files are missing
is a "-" and a line that says what to get; the others still run.
"""
import dataclasses
import json
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from toy import creatures
from common.args import check, command_line, find_device, knob
from common.media import (CLIP_SUFFIXES, as_shown, fit_reference, load_clip, load_image, open_clip, rate_of,
                          resize_center_crop)
from model import REFERENCE_TOKEN
from paper import benchmarks, fvd, motion
from common.jobs import read_bench
from common.run import write

PAPER = {"Motion Smooth.": 98.45, "Dynamic Degree": 69.64, "CLIP-T": 32.69, "CLIP-I": 77.14, "DINO-I": 62.88}  # Table 2


# ---- CLIP-T, CLIP-I, DINO-I ------------------------------------------------------------------------------------------

def preprocess(pictures, resize, crop, mean, std):
    """Pictures -> (B,3,crop,crop), as torchvision's Resize (short side, bicubic), CenterCrop, ToTensor, Normalize."""
    arrays = []
    for picture in pictures:
        w, h = picture.size
        w, h = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
        left, top = int(round((w - crop) / 2)), int(round((h - crop) / 2))
        picture = picture.resize((w, h), Image.BICUBIC).crop((left, top, left + crop, top + crop))
        arrays.append(np.asarray(picture, np.float32) / 255)
    x = (np.stack(arrays) - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x).permute(0, 3, 1, 2)


class Clip:
    """CLIP (usually ViT-B/32): unit features of pictures (B,D) and of a prompt (D,), in float32. <cls> is no word of
    the prompt and is left out; a prompt is cut at CLIP's 77 tokens."""

    def __init__(self, path, device):
        self.model = CLIPModel.from_pretrained(path).float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(path)

    @torch.no_grad()
    def pictures(self, pictures):
        size = self.model.config.vision_config.image_size
        x = preprocess(pictures, size, size, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        return F.normalize(self.model.get_image_features(x.to(self.model.device)).pooler_output, dim=1)

    @torch.no_grad()
    def prompt(self, prompt):
        prompt = re.sub(rf"\s*{REFERENCE_TOKEN}\s*", " ", prompt, flags=re.IGNORECASE).strip()
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**words).pooler_output, dim=1)[0]


class Dino:
    """DINO (ViT-S/16): unit class tokens of pictures, (B,D). Its preprocessor on the hub is wrong: this is its own."""

    def __init__(self, path, device):
        self.model = ViTModel.from_pretrained(path, add_pooling_layer=False).float().eval().to(device)

    @torch.no_grad()
    def pictures(self, pictures):
        size = self.model.config.image_size
        x = preprocess(pictures, size * 256 // 224, size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return F.normalize(self.model(pixel_values=x.to(self.model.device)).last_hidden_state[:, 0], dim=1)


def similarity(frames, other):
    """CLIP-T, CLIP-I or DINO-I of a video: 100 x cosine of the unit features of each frame (F,D) and of the prompt or
    the whole reference picture (D,), mean over frames. A folder's score is the mean over its videos. Sources:
    DreamVideo's script; for DINO-I DreamBooth (arXiv 2208.12242).

    CLIP-T asks whether the video shows what the prompt says. It is blind to motion ("walks left") and to who the
    subject is. CLIP-I and DINO-I ask whether it shows what the reference shows. They compare whole pictures: a still
    copy of the reference wins, a video that follows the prompt into another scene loses. DINO learned without captions,
    so it keeps what tells two dogs apart, which CLIP may drop.
    """
    return 100 * (frames @ other).mean().item()


# ---- a folder of videos ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    dirs: list[str] = knob([], "folders of ID.mp4 to score (other commands: bench --help, controls --help)")
    bench: str = knob("", "the benchmark they were sampled from (sample.py --bench)")
    images: str = knob(".", "folder that the benchmark's img_paths start from")
    frames: int = knob(16, "centre frames that CLIP and DINO see (the authors' 16)")
    fit: str = knob("pad", "references become the videos' shape: white beside (the authors'), or cut", "pad", "cover")
    clip: str = knob("openai/clip-vit-base-patch32", "CLIP: hub id or folder; 'none' leaves CLIP-T and CLIP-I out")
    dino: str = knob("facebook/dino-vits16", "DINO: hub id or folder; 'none' leaves DINO-I out")
    flow: str = knob("raft", "optical flow: VBench's, or OpenCV's without weights", "raft", "dis", "none")
    real: str = knob("", "folder of real clips: FVD against them. Small, medium, large need clips named ID.mp4")
    masks: str = knob("", "folder of ID.png, white on the foreground of each real clip's first frame; empty: all of it")
    fvd_frames: int = knob(49, "frames of FVD, from the start; shorter videos are left out")
    vbench: str = knob("", "VBench's result file of ONE folder, for motion smoothness")
    toy: bool = knob(False, "also the toy's exact scores, for the ids of python -m toy.world bench")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")

    def __post_init__(self):
        check(self, positive="frames")
        if self.fvd_frames < fvd.I3D_FRAMES:
            raise ValueError(f"--fvd_frames must be at least {fvd.I3D_FRAMES}, what I3D can see, got {self.fvd_frames}")
        if len(self.dirs) > 1 and self.vbench:
            raise ValueError("--vbench is the result of one folder: score one at a time")


@contextmanager
def noting(problems, name, advice=""):
    """What fails in here is noted as problems[name], in one line, and all else is still scored."""
    try:
        yield
    except (ValueError, OSError) as e:
        problems[name] = advice + str(e).partition("\n")[0]


def load_tools(cfg, device):
    """({name: what computes a metric}, {metrics: what to get for them}). Downloads weights where it can."""
    tools, missing = {}, {}
    for name, Model, metrics in (("clip", Clip, "CLIP-T, CLIP-I"), ("dino", Dino, "DINO-I")):
        if (path := getattr(cfg, name)) != "none":
            with noting(missing, metrics, f"no weights: hf download {path}, or pass a folder as --{name}: "):
                tools[name] = Model(path, device)
    if cfg.flow != "none":
        with noting(missing, "Dynamic Degree"):
            tools["flow"] = motion.dis_flow() if cfg.flow == "dis" else motion.raft_flow(device)
    if cfg.real:
        with noting(missing, "FVD"):
            tools["i3d"] = fvd.load_i3d(device)
    return tools, missing


def picture_scores(cfg, tools, frames, prompt, reference):
    """{metric: value} of those that look at single frames. reference: a picture, or None for one that is lost."""
    first = max(0, (len(frames) - cfg.frames) // 2)  # all frames of a shorter video
    frames, scores = [Image.fromarray(f) for f in frames[first:first + cfg.frames]], {}
    if "clip" in tools:
        seen = tools["clip"].pictures(frames)
        scores["CLIP-T"] = similarity(seen, tools["clip"].prompt(prompt))
        if reference:
            scores["CLIP-I"] = similarity(seen, tools["clip"].pictures([reference])[0])
    if "dino" in tools and reference:
        scores["DINO-I"] = similarity(tools["dino"].pictures(frames), tools["dino"].pictures([reference])[0])
    return scores


def real_clips(cfg, tools, fps):
    """({name: I3D features}, {name: flow class}, {name: why not}) of the clips of --real, read at the videos' rate."""
    features, classes, problems = {}, {}, {}
    files = [f for f in sorted(Path(cfg.real).iterdir()) if f.suffix.lower() in CLIP_SUFFIXES]
    for file in tqdm(files, "real clips"):
        with noting(problems, f"real clip {file.name}"):
            frames = load_clip(file, cfg.fvd_frames, fps)
            features[file.stem] = fvd.i3d_features(tools["i3d"], np.stack(frames))
            if "flow" in tools:
                white = Image.new("RGB", (720, 480), "white")
                mask = load_image(Path(cfg.masks, f"{file.stem}.png")) if cfg.masks else white
                *frames, mask = (np.asarray(resize_center_crop(picture, 480, 720)) for picture in (*frames, mask))
                classes[file.stem] = motion.flow_class(frames, tools["flow"], mask[..., 0] > 127)
    return features, classes, problems


def fvd_rows(made, real, classes):
    """{"FVD": its row of the table, "FVD small": ...}: whole, and by flow class over the ids that both have."""
    rows = {"FVD": (made.values(), real.values())} if made and real else {}
    for name in ("small", "medium", "large"):
        if both := [i for i in made if classes.get(i) == name]:
            rows[f"FVD {name}"] = [made[i] for i in both], [real[i] for i in both]
    return {k: {"value": fvd.fvd(list(b), list(a)), "n": len(a), "n_real": len(b)} for k, (a, b) in rows.items()}


def toy_scores(frames):
    """{score: 0 to 1 for each} of the toy's videos {id: frames}. The rules, and what fools them: score_videos."""
    test = creatures.draw_test_set()
    ids = [f"creature-{i}" for i in range(len(test.prompts))]
    if unknown := frames.keys() - set(ids):
        raise ValueError(f"--toy True: {min(unknown)} is no id of python -m toy.world bench")
    which = [ids.index(name) for name in frames]
    test = dataclasses.replace(test, **{k: getattr(test, k)[which] for k in ("creatures", "fields", "directions")})
    small = [np.stack([np.asarray(Image.fromarray(f).resize((creatures.SIZE,) * 2, Image.BOX)) for f in v])
             for v in frames.values()]
    return creatures.score_each(small, test)


def score_folder(cfg, folder, bench, tools):
    """({id: scores}, {id: why not}, {id: I3D features}, frames per second) of a folder."""
    videos, problems, features, toys, fps = {}, {}, {}, {}, None
    for name, entry in tqdm(bench.items(), str(folder)):
        with noting(problems, name):
            with open_clip(Path(folder, f"{name}.mp4")) as stream:
                frames = [np.array(as_shown(frame, stream)) for frame in stream.container.decode(stream)]
                fps = rate_of(stream)
            if len(frames) < 3:
                raise ValueError(f"too short: {len(frames)} frames")
            reference = None
            with noting(problems, f"{name}: its reference"):
                picture = load_image(Path(cfg.images, entry["img_paths"][0]))
                reference = fit_reference(picture, *frames[0].shape[:2], cfg.fit)
            scores = videos[name] = picture_scores(cfg, tools, frames, entry["prompt"], reference)
            if "flow" in tools:
                with noting(problems, f"{name}: Dynamic Degree"):
                    scores["Dynamic Degree"] = 100.0 * motion.dynamic_degree(frames, fps, tools["flow"])
            if "i3d" in tools:
                with noting(problems, f"{name}: FVD"):
                    if len(frames) < cfg.fvd_frames:
                        raise ValueError(f"too short: {len(frames)} frames, --fvd_frames {cfg.fvd_frames}")
                    features[name] = fvd.i3d_features(tools["i3d"], np.stack(frames[:cfg.fvd_frames]))
            if cfg.toy:
                toys[name] = frames
    for metric, values in toy_scores(toys).items() if toys else ():
        for name, value in zip(toys, values):
            if not np.isnan(value):  # the direction of one that does not move
                videos[name][f"toy {metric}"] = 100 * float(value)
    for name, value in motion.vbench_smoothness(cfg.vbench).items() if cfg.vbench else ():
        if name in videos:
            videos[name]["Motion Smooth."] = value
    return videos, problems, features, fps


def mean_scores(videos):
    """{metric: {"value": mean over the videos that have it, "n": how many have}}."""
    values = {}
    for scores in videos.values():
        for metric, value in scores.items():
            values.setdefault(metric, []).append(value)
    return {metric: {"value": float(np.mean(found)), "n": len(found)} for metric, found in values.items()}


def print_table(tables):
    """A row for each metric: the mean of each folder, {folder: table}, with its n, and the paper's."""
    print("\n| metric | " + " | ".join(tables) + " | the paper's (Table 2) |\n|---" + "|---" * (len(tables) + 1) + "|")
    for metric in dict.fromkeys(metric for table in (PAPER, *tables.values()) for metric in table):
        cells = []
        for row in (table.get(metric) for table in tables.values()):
            real = f", {row['n_real']} real" if row and "n_real" in row else ""
            cells.append(f"{row['value']:.2f} (n = {row['n']}{real})" if row else "-")
        print(f"| {metric} | " + " | ".join(cells) + f" | {PAPER.get(metric, '')} |")


def score(cfg):
    """Score folders of videos made from a benchmark: the paper's table, and a results.json in each."""
    if not cfg.dirs or not cfg.bench:
        raise ValueError("nothing to score: pass a folder of videos and --bench FILE")
    for folder in cfg.dirs + [cfg.real] * bool(cfg.real):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder of videos at {folder}")
    bench = read_bench(cfg.bench)
    tools, missing = load_tools(cfg, find_device(cfg.device))
    if not cfg.vbench:
        missing["Motion Smooth."] = "run VBench in its own environment (paper/NOTES.md), pass its result as --vbench"
    tables, real = {}, None
    for folder in cfg.dirs:
        videos, problems, features, fps = score_folder(cfg, folder, bench, tools)
        table = tables[folder] = mean_scores(videos)
        if features:
            real = real or real_clips(cfg, tools, fps)
            table |= fvd_rows(features, *real[:2])
            problems |= real[2]
        record = {"settings": dataclasses.asdict(cfg), "missing": missing, "table": table, "videos": videos,
                  "unusable": problems}
        write(Path(folder, "results.json"), json.dumps(record, indent=1))
        print(f"{folder}: {len(videos)} of {len(bench)} videos scored, {len(problems)} problems; wrote results.json",
              *(f"  {name}: {why}" for name, why in problems.items()), sep="\n")
    print_table(tables)
    for metric, why in missing.items():
        print(f"{metric}: not computed: {why}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        command_line(benchmarks.make_bench, benchmarks.Bench, benchmarks.make_bench.__doc__, sys.argv[2:])
    elif sys.argv[1:2] == ["controls"]:
        command_line(benchmarks.make_controls, benchmarks.Controls, benchmarks.make_controls.__doc__, sys.argv[2:])
    else:
        command_line(score, Config, __doc__, positional="dirs")
