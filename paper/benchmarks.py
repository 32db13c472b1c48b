"""Benchmarks: their files, what sample.py --bench makes of them, and the toy's controls, which fool the metrics."""
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import read_text, save_video
from model import lora_header, with_reference_token
from run import changed, knob, rank_and_world_size, read_json, refuse_overwriting, write


def read_bench(path):
    """OpenS2V's benchmark format: {id: {"img_paths": [a picture], "prompt": ..., "class_label": ...}}."""
    try:
        bench = json.loads(read_text(path))
        for name, entry in bench.items():
            if "/" in name or not isinstance(entry["prompt"], str) or not isinstance(entry["img_paths"][0], str):
                raise ValueError(name)
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise ValueError(f"--bench {path} must be a json of ids, each with img_paths and a prompt: {e!r}")
    return bench


def jobs_of_bench(cfg):
    """The jobs of --bench, done or not. Writes their settings, prompts and seeds into --out: a folder that holds videos
    of others is refused, since they could not be compared."""
    from sample import Job, cls_of, find_lora
    lora, out, jobs = find_lora(cfg.lora), Path(cfg.out), []
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("bench", "images", "batch", "out", "device")}
    made, cls = {"settings": settings | {"lora": str(lora)}, "videos": {}}, cls_of(lora_header(lora))
    for i, (name, entry) in enumerate(read_bench(cfg.bench).items()):
        label = entry.get("class_label") or ""  # a word or, in OpenS2V's own files, a list of them
        label = label if isinstance(label, str) else label[0]
        prompt = with_reference_token(entry["prompt"], cls, label)
        pictures = [str(Path(cfg.images, path)) for path in entry["img_paths"]]
        jobs.append(Job(out / f"{name}.mp4", pictures, prompt, cfg.seed + i))
        made["videos"][name] = {"prompt": prompt, "seed": cfg.seed + i, "img_paths": entry["img_paths"]}
    out.mkdir(parents=True, exist_ok=True)
    record = out / "sampling.json"
    for part, before in read_json(record).items() if record.is_file() else ():
        if not isinstance(before, dict) or part not in made:
            raise ValueError(f"{record} is damaged: delete it, or choose another --out")
        if differ := changed(before, {k: v for k, v in made[part].items() if k in before}):
            raise ValueError(f"{out} was sampled with other {part} ({differ[:200]}): choose another --out")
    if rank_and_world_size()[0] == 0:
        write(record, json.dumps(made, indent=1))
    return jobs


def report(out, jobs, skipped):
    """Say how many videos of --bench there are now, and which were skipped and why, by all ranks together."""
    every = [skipped]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, skipped)
        dist.destroy_process_group()
    if rank_and_world_size()[0] == 0:
        skipped = {name: why for part in every for name, why in part.items()}
        print(f"{out}: {sum(job.file.is_file() for job in jobs)} of {len(jobs)} videos; {len(skipped)} skipped",
              *(f"  {name}: {why}" for name, why in skipped.items()), sep="\n")


@dataclass
class Bench:
    refs: str = knob("", "folder of reference pictures; a name without its number is the subject's: toy_cat-2.jpg")
    prompts: str = knob("", "file, a prompt a line; {} is the subject; 'toy_cat-2: a sentence' is for that picture")
    out: str = knob("bench.json", "file to write, for sample.py --bench with --images the folder of pictures")


def make_bench(cfg):
    """Pictures and prompts -> a benchmark file: every picture with each of its prompts (the paper: 30 with 4 each)."""
    if not Path(cfg.refs).is_dir():
        raise FileNotFoundError(f"--refs: no folder of pictures at {cfg.refs or '(not given)'}")
    if not Path(cfg.prompts).is_file():
        raise FileNotFoundError(f"--prompts: no file {cfg.prompts or '(not given)'}; it has a prompt per line")
    Image.init()
    pictures = {f.stem: f for f in sorted(Path(cfg.refs).iterdir()) if f.suffix.lower() in Image.EXTENSION}
    if not pictures:
        raise ValueError(f"--refs: no pictures in {cfg.refs}")
    prompts = {stem: [] for stem in pictures}
    for line in filter(None, map(str.strip, read_text(cfg.prompts).splitlines())):
        stem, colon, sentence = line.partition(": ")
        for owner in [stem] if colon and stem in pictures else pictures:
            prompts[owner].append(sentence if colon and stem in pictures else line)
    bench = {}
    for stem, file in pictures.items():
        subject = re.sub(r"[\W_]+", " ", re.sub(r"[\W_]*\d+$", "", stem)).strip() or stem
        for i, prompt in enumerate(prompts[stem]):
            bench[f"{stem}-{i}"] = {"img_paths": [file.name], "prompt": prompt.replace("{}", subject),
                                    "class_label": subject}
    refuse_overwriting([cfg.prompts, *pictures.values()], [cfg.out])
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write(Path(cfg.out), json.dumps(bench, indent=1))
    print(f"wrote {cfg.out}: {len(pictures)} pictures, {len(bench)} videos")
    if lost := [stem for stem in pictures if not prompts[stem]]:
        print(f"no prompt for {len(lost)} of the pictures: {', '.join(lost)}")


@dataclass
class Controls:
    out: str = knob("out/controls", "folder to write: the benchmark, and a folder of videos for each control")
    n: int = knob(96, "creatures, 96 at most")

    def __post_init__(self):
        if not 1 < self.n <= 96:
            raise ValueError(f"--n must be 2 to 96, got {self.n}")


def make_controls(cfg):
    """Videos of the toy that show what a metric can and cannot see: the true clips, the reference as a still, another
    creature's clips, the true clips with their frames in random order; and other true clips, for FVD."""
    from toy import world
    out, rng = Path(cfg.out), np.random.default_rng(0)
    world.write_bench(out / "refs", cfg.n)
    test = world.draw_test_set(cfg.n)
    true = world.true_clips(test)
    order = [rng.permutation(world.FRAMES) for _ in true]
    sets = {"true": true, "still": np.repeat(test.references[:, None], world.FRAMES, 1), "other": np.roll(true, 1, 0),
            "frames-shuffled": np.stack([v[o] for v, o in zip(true, order)]), "real": world.true_clips(test, seed=1)}
    for name, videos in sets.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for i, video in enumerate(tqdm(videos, name)):
            save_video(out / name / f"creature-{i}.mp4", [Image.fromarray(f) for f in video], world.FPS, enlarge=8)
    print(f"wrote {out}: {', '.join(sets)}; score with --bench {out}/refs/bench.json --images {out}/refs --toy True")
