"""What sample.py makes: a list of videos, from its flags or from a benchmark's file. The ranks share it out."""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from common.media import load_image, read_text
from common.args import refuse_overwriting
from common.run import changed, rank_and_world_size, read_json, write
from model import with_reference_token


@dataclass
class Job:
    """A video to make: its file, the paths of its reference pictures (the model takes one or none), prompt and seed."""
    file: Path
    pictures: list
    prompt: str
    seed: int


def jobs_of_flags(cfg):
    """The jobs that --ref, --prompt and --prompts ask for."""
    if cfg.ref:
        load_image(cfg.ref)  # a bad picture is said before a missing prompt
    beside = Path(cfg.ref or "none").with_suffix(".txt")
    prompts = [cfg.prompt or (read_text(beside) if beside.is_file() else "")]
    if cfg.prompts:
        if not Path(cfg.prompts).is_file():
            raise FileNotFoundError(f"--prompts: no file {cfg.prompts}; it takes a text file with a prompt per line")
        prompts = [line.strip() for line in read_text(cfg.prompts).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts: no prompts in {cfg.prompts}")
    if not prompts[0]:
        missing = "--prompt '...' (or a .txt file beside the picture)" if cfg.ref else "--ref PICTURE --prompt '...'"
        raise ValueError(f"no prompt: pass {missing}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_stem(f"{out.stem}-{i}") for i in range(len(prompts))] if len(prompts) > 1 else [out]
    return [Job(file, [cfg.ref] if cfg.ref else [], prompt, cfg.seed) for file, prompt in zip(files, prompts)]


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


def jobs_of_bench(cfg, lora, cls):
    """The jobs of --bench, done or not. Writes their settings, prompts and seeds into --out: a folder that holds videos
    of others is refused, since they could not be compared."""
    out, jobs = Path(cfg.out), []
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("bench", "images", "batch", "out", "device")}
    made = {"settings": settings | {"lora": str(lora)}, "videos": {}}
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
        if differ := changed(before, {k: v for k, v in made[part].items() if k in before}):
            raise ValueError(f"{out} was sampled with other {part} ({differ[:200]}): choose another --out")
    if rank_and_world_size()[0] == 0:
        write(record, json.dumps(made, indent=1))
    return jobs


def refuse_outputs(cfg, jobs):
    """An error, before the minutes of sampling, for an output that is also an input or that cannot be written."""
    outputs = {file for job in jobs for file in (job.file, job.file.with_suffix(".png"))}  # video and contact sheet
    refuse_overwriting([cfg.bench, cfg.prompts, *(path for job in jobs for path in job.pictures)], outputs)
    if cfg.bench:  # there a file means a finished video
        return
    for file in outputs:
        new = not file.exists()
        with open(file, "ab"):  # OSError for a read-only folder, a name that is too long, a folder's name
            pass
        if new:
            file.unlink()


def share_out(cfg, jobs):
    """(this rank's batches that are not done, {path: reference picture}, {id: why it cannot be sampled}).

    Whole batches are shared out, and an incomplete one is sampled again: a video's last bits depend on its batch.
    All pictures are read before the first video, so that a bad one is known at once."""
    rank, world_size = rank_and_world_size()
    batches, pictures, skipped = [], {}, {}
    for first in range(rank * cfg.batch, len(jobs), world_size * cfg.batch):
        batch = []
        for job in jobs[first:first + cfg.batch]:
            try:
                if len(job.pictures) > 1:
                    raise ValueError(f"it has {len(job.pictures)} reference pictures, and the model takes one")
                for path in set(job.pictures) - pictures.keys():
                    pictures[path] = load_image(path)
                batch.append(job)
            except (ValueError, OSError) as e:
                if not cfg.bench:
                    raise
                skipped[job.file.stem] = str(e)
        if not cfg.bench or not all(job.file.is_file() for job in batch):
            batches.append(batch)
    return batches, pictures, skipped


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
