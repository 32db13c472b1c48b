"""The paper's ablations, each from one command, on the toy world; the same rows are flags for the real run.

    python -m paper.ablate table9                # trains and scores what is missing, prints it beside the paper's table
    python -m paper.ablate                       # every table and the findings
    python -m paper.ablate figure12              # a picture from the same runs: assets/figure12.png
    python -m paper.ablate table9 --real         # prints the commands for CogVideoX-5B instead

A row is a run of train.py with other flags (ROWS), shorter than `train.py --toy`: --steps steps at --lr on one thread,
on latents that are encoded once for all rows. It is scored on --n unseen creatures; each (row, seed) leaves one file in
--results, which is reused. --jobs rows run side by side.

A finding of the paper (FINDINGS) says that one row is higher than another in one column, or as high within a margin.
With d the difference of the two rows in each seed, Student's t gives an interval for its mean (5 % on either side; for
three seeds mean +- 1.69 standard deviations). The finding is "reproduced" when all of the interval agrees with it, "not
reproduced" when all of it disagrees, and otherwise "not decidable". So is a difference of fewer than two videos, and
one between two rows that are both at the ceiling (98 per cent). With no true difference one finding in ten would still
get a verdict.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import gradcos
import train
from run import changed, command_line, knob, newest_checkpoint, records, write

ROWS = {  # name: flags of train.py. Sizes of data sets are shares of the toy's 4,000 pairs and 400 clips.
    "ours": {},
    "image-only": {"p": 0.0},
    "two-stage": {"task_schedule": "two_stage"},
    "pairs-1pct": {"images": "toy/data/pairs-40"},   # 2,000 of 200K
    "pairs-2pct": {"images": "toy/data/pairs-80"},   # 4,000 of 200K
    "pcgrad-4": {"pcgrad": 4},
    "pcgrad-8": {"pcgrad": 8},
    "no-cls": {"cls": False},
    "text-to-video": {"token_drop": 1.0},
    "clips-25pct": {"videos": "toy/data/clips-100"},  # 1K of 4K
    "clips-50pct": {"videos": "toy/data/clips-200"},
    "clips-75pct": {"videos": "toy/data/clips-300"},
    "p-0.4": {"p": 0.4},
    "p-0.6": {"p": 0.6},
    "first-frame-no-drop": {"random_frame": False, "token_drop": 0.0},
    "random-frame-no-drop": {"token_drop": 0.0},
    "first-frame-drop": {"random_frame": False},
    "t2v-finetuning": {"p": 1.0, "token_drop": 1.0},  # for a fifth of the steps: Table 11's baseline
    "scope-reference": {"lora_scope": "reference"},
    "scope-reference-image-only": {"lora_scope": "reference", "p": 0.0},
}
FIGURES = {  # figure: its rows. The first two are curves of gradcos.py (9 holds 5 as well), the others contact sheets
    "figure9": ("ours", "image-only"), "figure10": ("ours", "pcgrad-4", "pcgrad-8"),
    "figure11": ("ours", "pairs-2pct", "pairs-1pct"),
    "figure12": ("first-frame-no-drop", "random-frame-no-drop", "ours"),
    "figure13": ("image-only", "two-stage", "ours"),
}
WATCHED = {*FIGURES["figure9"], *FIGURES["figure10"]}  # measured with gradcos

PAPER_COLUMNS = ("Motion Smoothness", "Dynamic Degree", "CLIP-T", "CLIP-I", "DINO-I")
TABLES = {  # table: (row, the paper's name, the paper's numbers in PAPER_COLUMNS)
    "table3": [("image-only", "Image-only", (99.60, 0.84, 32.67, 71.15, 43.19)),
               ("two-stage", "Two-stage", (96.04, 81.51, 28.96, 84.73, 76.13)),
               ("ours", "Ours (200K; the image-only row is Table 9's 4K run)", (98.45, 69.64, 32.69, 77.14, 62.88))],
    "table4": [("pairs-1pct", "2,000 pairs", (98.72, 60.71, 33.38, 74.72, 57.03)),
               ("pairs-2pct", "4,000 pairs", (97.99, 78.33, 33.22, 75.87, 58.86)),
               ("ours", "200K pairs", (98.45, 69.64, 32.69, 77.14, 62.88))],
    "table5": [("pcgrad-8", "PCGrad, buffer 8", (98.86, 50.83, 31.28, 82.17, 74.32)),
               ("pcgrad-4", "PCGrad, buffer 4", (97.74, 70.83, 33.44, 74.52, 56.15)),
               ("ours", "without PCGrad", (98.45, 69.64, 32.69, 77.14, 62.88))],
    "table6": [("no-cls", "without `<cls>`", (98.84, 54.55, 32.87, 73.36, 57.51)),
               ("ours", "with `<cls>`", (97.99, 78.33, 33.22, 75.87, 58.86))],
    "table7": [("text-to-video", "T2I + T2V", (98.85, 44.14, 33.41, 72.71, 48.68)),
               ("ours", "Ours", (97.99, 78.33, 33.22, 75.87, 58.86))],
    "table8": [("clips-25pct", "1K clips", (99.03, 59.66, 32.16, 72.69, 56.98)),
               ("clips-50pct", "2K clips", (98.96, 52.25, 32.49, 72.13, 54.42)),
               ("clips-75pct", "3K clips", (98.79, 55.46, 32.04, 72.79, 55.57)),
               ("ours", "4K clips", (97.99, 78.33, 33.22, 75.87, 58.86))],
    "table9": [("image-only", "p = 0.0", (99.60, 0.84, 32.67, 71.15, 43.19)),
               ("ours", "p = 0.2", (97.99, 78.33, 33.22, 75.70, 58.86)),
               ("p-0.4", "p = 0.4", (98.31, 59.12, 31.94, 73.53, 56.60)),
               ("p-0.6", "p = 0.6", (98.33, 60.87, 31.31, 76.71, 62.84))],
    "table11": [("t2v-finetuning", "CogVideoX fine-tuned on clips (FVD 598 / 594 / 574)", None),
                ("image-only", "Image-only (FVD 642 / 636 / 680)", None),
                ("two-stage", "Two-stage (FVD 802 / 872 / 824)", None), ("ours", "Ours (FVD 512 / 512 / 550)", None)],
    "figure12": [("first-frame-no-drop", "first frame, no drop (pictures in the paper)", None),
                 ("random-frame-no-drop", "random frame, no drop", None),
                 ("first-frame-drop", "first frame, drop", None), ("ours", "random frame, drop", None)],
    "scope": [("ours", "LoRA on all tokens (our own row)", None),
              ("scope-reference", "LoRA on reference tokens", None),
              ("image-only", "all tokens, p = 0", None),
              ("scope-reference-image-only", "reference tokens, p = 0", None)],
}
FINDINGS = [  # where, what the paper says, column, the higher row, the lower row (or a number), perhaps a margin
    ("Tables 3, 9", "dual-task moves more than image-only", "dynamic_degree", "ours", "image-only"),
    ("Table 3", "image-only is smoother than dual-task", "smoothness", "image-only", "ours"),
    ("Table 3", "two-stage keeps more identity than dual-task", "identity_16", "two-stage", "ours"),
    ("Table 3", "two-stage moves more than dual-task", "dynamic_degree", "two-stage", "ours"),
    ("Table 3", "two-stage is less smooth than dual-task", "smoothness", "ours", "two-stage"),
    ("Table 3, D.7", "two-stage forgets the text", "direction_if_moving", "ours", "two-stage"),
    ("Table 11", "dual-task's motion is better than two-stage's (FVD there)", "direction", "ours", "two-stage"),
    ("Table 11", "dual-task's motion is better than image-only's", "direction", "ours", "image-only"),
    ("Table 4's numbers", "more pairs, more identity (100 % against 1 %)", "identity_16", "ours", "pairs-1pct"),
    ("Table 4, 5.3", "2 % of the pairs keep as much identity, to 10 points", "identity_16", "pairs-2pct", "ours", 10),
    ("Table 4, 5.3", "1 % of the pairs keep as much identity, to 10 points", "identity_16", "pairs-1pct", "ours", 10),
    ("Table 5's numbers", "PCGrad with buffer 8 raises identity", "identity_16", "pcgrad-8", "ours"),
    ("Table 5's numbers", "PCGrad with buffer 8 lowers motion", "dynamic_degree", "ours", "pcgrad-8"),
    ("B.3's text", "PCGrad changes identity by little (10 points)", "identity_16", "pcgrad-8", "ours", 10),
    ("Figure 10", "PCGrad's cosine is the default's, to 0.05", "cosine", "pcgrad-8", "ours", 0.05),
    ("Table 6", "`<cls>` raises identity", "identity_16", "ours", "no-cls"),
    ("Table 6", "`<cls>` raises motion", "dynamic_degree", "ours", "no-cls"),
    ("Table 7", "text-to-video instead costs identity", "identity_16", "ours", "text-to-video"),
    ("Table 7", "text-to-video instead costs motion", "dynamic_degree", "ours", "text-to-video"),
    ("Table 8", "more clips, more motion (100 % against 25 %)", "dynamic_degree", "ours", "clips-25pct"),
    ("Table 8, D.3", "more clips, more identity (100 % against 25 %)", "identity_16", "ours", "clips-25pct"),
    ("Table 9", "p = 0.2 moves more than p = 0.6", "dynamic_degree", "ours", "p-0.6"),
    ("Table 9", "p = 0.2 keeps more identity than p = 0", "identity_16", "ours", "image-only"),
    ("Table 9", "p = 0.6 keeps more identity than p = 0.2", "identity_16", "p-0.6", "ours"),
    ("Figure 12, D.6", "random frame alone moves more than neither", "dynamic_degree", "random-frame-no-drop",
     "first-frame-no-drop"),
    ("Figure 12, D.6", "with drop it moves more than neither", "dynamic_degree", "ours", "first-frame-no-drop"),
    ("Figure 5", "the cosine at p = 0.2 is zero, to 0.05", "cosine", "ours", 0.0, 0.05),
    ("Figure 9, B.2", "image-only's cosine is above 0.4", "cosine", "image-only", 0.4),
    ("Figure 9, B.2", "image-only's video gradient is larger", "norm_vid", "image-only", "ours"),
    ("Figure 9, B.2", "image-only's image gradient is larger", "norm_img", "image-only", "ours"),
    ("not the paper's", "a random frame keeps more identity than the first", "identity_16", "random-frame-no-drop",
     "first-frame-no-drop"),
    ("not the paper's", "token drop on top of it raises identity", "identity_16", "ours", "random-frame-no-drop"),
    ("not the paper's", "scoping LoRA alone protects motion at p = 0", "dynamic_degree", "scope-reference-image-only",
     "image-only"),
]
STUDENT_T = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}  # 5 % above, by seeds
GRADIENT_COLUMNS = ("cosine", "norm_img", "norm_vid")  # means over the second half of a run that gradcos watched
COMMANDS = [*dict.fromkeys([*TABLES, *FIGURES])]


@dataclass
class Config:
    what: list[str] = knob([], f"of {', '.join(COMMANDS)}; none means every table")
    seeds: int = knob(3, "seeds 0, 1, ...")
    jobs: int = knob(2, "rows side by side, one thread each")
    steps: int = knob(400, "training steps of a row")
    lr: float = knob(4e-3, "peak learning rate of a row: more than the toy's 1.5e-3, for fewer than half of its steps")
    n: int = knob(64, "unseen creatures that score a row")
    sample_steps: int = knob(25, "denoising steps when scoring")
    results: str = knob("paper/results", "folder with one file per row and seed")
    out: str = knob("out/ablate", "where the runs and their cached latents live")
    assets: str = knob("assets", "where the figures go")
    real: bool = knob(False, "print the commands for CogVideoX-5B instead of running anything")
    row: str = knob("", "train and score this one row with seed --seeds (used for the rows side by side)")

    def __post_init__(self):
        for what in self.what:
            if what not in COMMANDS:
                raise ValueError(f"no table or figure {what!r}: choose from {', '.join(COMMANDS)}")
        if self.row and self.row not in ROWS:
            raise ValueError(f"no row {self.row!r}: choose from {', '.join(ROWS)}")


def flags_of(row, steps):
    """The flags of a row, and its number of steps: Table 11's baseline has a fifth (800 of 4,000)."""
    return ROWS[row], steps // 5 if row == "t2v-finetuning" else steps


def train_and_score(cfg):
    """One row with one seed, in this process: --results/ROW-SEED.json, from a run of this very code.

    Where the result is there already, only the run is made that a figure needs."""
    name, seed = f"{cfg.row}-{cfg.seeds}", cfg.seeds
    run, result = Path(cfg.out) / name, Path(cfg.results) / f"{name}.json"
    with open(Path(cfg.out) / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second suite waits here, and finds the row done
        if result.is_file() and newest_checkpoint(run):
            return
        shutil.rmtree(run, ignore_errors=True)
        scores = train_row(cfg, name, seed, scored=not result.is_file())
        if scores:
            record = {"row": cfg.row, "seed": seed, "flags": ROWS[cfg.row], **settings(cfg), "commit": commit(),
                      "scores": scores}
            result.parent.mkdir(parents=True, exist_ok=True)
            write(result, json.dumps(record, indent=1) + "\n")


def train_row(cfg, name, seed, scored=True):
    """Train the row into out/NAME; its scores on unseen creatures, with gradcos's means where it watched."""
    from sample import load, trained_with_cls
    from toy import world
    flags, steps = flags_of(cfg.row, cfg.steps)
    watched = {"gradcos_every": 25} if cfg.row in WATCHED else {}
    config = train.Config(**{**train.TOY, "toy": True, "seed": seed, "steps": steps, "lr": cfg.lr, "name": name,
                             "out": cfg.out, "cache": cache_of(cfg, cfg.row), "save_every": steps, "val_every": 0,
                             "sample_every": 0, **watched, **flags})
    world.ensure_data(config.images, config.videos, config.val_images, config.val_videos)
    train.train(config)
    if not scored:
        return None
    pipe, header = load(lora=str(Path(cfg.out) / name))
    test = world.draw_test_set(cfg.n)
    seen = config.p < 1 or config.token_drop < 1  # did this row ever see a reference?
    videos = world.sample_test_set(pipe, test, test.references if seen else None, steps=cfg.sample_steps,
                                   cls=trained_with_cls(header))
    scores = world.score_videos(videos, test)
    if watched:
        late = [r for r in records(Path(cfg.out) / name / "gradcos.jsonl") if r["step"] >= steps / 2]
        scores |= {column: float(np.mean([r[column] for r in late])) for column in GRADIENT_COLUMNS}
    return scores


def commit():
    """The commit of this code, with -dirty when files differ from it."""
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        return said.stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def settings(cfg):
    """What all results that are compared must share."""
    return {k: getattr(cfg, k) for k in ("steps", "lr", "n", "sample_steps")}


def cache_of(cfg, row):
    """Where the latents of a row lie. A small set of clips is the first of the large one: it needs no cache of its own.
    """
    return str(Path(cfg.out) / f"cache-{Path(ROWS[row].get('images', train.TOY['images'])).name}")


def encode_once(cfg, rows):
    """Cached latents for the rows, as `python -m paper.prepare cache` makes them."""
    from paper import prepare
    from toy import world
    same = {k: train.TOY[k] for k in ("base", "videos", "crop_jitter", "frames", "fps", "vae_tiling")}
    for cache, row in {cache_of(cfg, row): row for row in rows}.items():
        images = ROWS[row].get("images", train.TOY["images"])
        world.ensure_data(images, train.TOY["videos"])
        prepare.prepare_cache(prepare.Latents(out=cache, images=images, **same))


def run_missing(cfg, rows, seeds, runs=False):
    """Train and score each (row, seed) that has no result yet, cfg.jobs at a time, each in a process of one thread.

    With runs=True also those whose run is gone: a figure needs its weights. Returns how many failed."""
    todo = [(row, seed) for seed in range(seeds) for row in rows
            if not (Path(cfg.results) / f"{row}-{seed}.json").is_file()
            or runs and newest_checkpoint(Path(cfg.out) / f"{row}-{seed}") is None]
    if not todo:
        return 0
    logs = Path(cfg.out)
    logs.mkdir(parents=True, exist_ok=True)
    encode_once(cfg, dict(todo))

    def run(job):
        row, seed = job
        own = [f"--{k}={v}" for k, v in {**settings(cfg), "results": cfg.results, "out": cfg.out}.items()]
        with open(logs / f"{row}-{seed}.log", "w") as log:
            code = subprocess.run([sys.executable, "-m", "paper.ablate", "--row", row, "--seeds", str(seed), *own],
                                  stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        return job, code
    failed = 0
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for (row, seed), code in tqdm(pool.map(run, todo), total=len(todo), desc="rows", unit="row"):
            if code:
                failed += 1
                print(f"{row}, seed {seed} failed: see {logs}/{row}-{seed}.log", file=sys.stderr)
    return failed


def load_results(cfg):
    """{row: {seed: scores}} of what there is. ValueError for results with another number of steps or creatures."""
    results = {}
    for file in sorted(Path(cfg.results).glob("*.json")):
        record = json.loads(file.read_text())
        if differ := changed(record, {**settings(cfg), "flags": ROWS.get(record["row"])}):
            raise ValueError(f"{file} was made with other settings ({differ}): choose another --results")
        scores = record["scores"]
        scores["direction_if_moving"] = 100 * scores["direction"] / max(scores["dynamic_degree"], 1e-9)
        if record["seed"] < cfg.seeds:
            results.setdefault(record["row"], {})[record["seed"]] = scores
    return results


def print_table(table, results):
    columns = ("smoothness", "dynamic_degree", "field", "direction", "identity_16", "identity_16_same")
    print(f"\n### {table}\n\n| row | seeds | {' | '.join(columns)} | paper: {' / '.join(PAPER_COLUMNS)} |")
    print("|---" * (len(columns) + 3) + "|")
    for row, name, paper in TABLES[table]:
        scores = list(results.get(row, {}).values())
        cells = ["-"] * len(columns)
        if scores:
            values = [[s[c] for s in scores] for c in columns]
            cells = [f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1):.1f}" if len(v) > 1 else "") for v in values]
        print(f"| {name} | {len(scores)} | {' | '.join(cells)} | {' / '.join(map(str, paper)) if paper else '-'} |")


def verdict(differences, margin=None, smallest=0.0):
    """The rule of this file's first lines. margin: the finding is that the difference is within it."""
    d = np.array(differences)
    if len(d) < 2:
        return "not decidable"
    half = STUDENT_T[min(len(d), 10)] * d.std(ddof=1) / np.sqrt(len(d))
    low, high = d.mean() - half, d.mean() + half
    if margin is not None:
        if -margin < low and high < margin:
            return "reproduced"
        return "not reproduced" if low > margin or high < -margin else "not decidable"
    if abs(d.mean()) < smallest or low <= 0 <= high:
        return "not decidable"
    return "reproduced" if low > 0 else "not reproduced"


def print_findings(rows, results, cfg):
    print("\n### Findings\n\n| where | the paper says | column | difference per seed | verdict |\n" + "|---" * 5 + "|")
    for where, claim, column, high, low, *margin in FINDINGS:
        if not {name for name in (high, low) if isinstance(name, str)} <= rows:
            continue
        ours = results.get(high, {})
        other = results.get(low, {}) if isinstance(low, str) else {seed: {column: low} for seed in ours}
        seeds = sorted(ours.keys() & other.keys())
        a, b = ([scores[seed][column] for seed in seeds] for scores in (ours, other))
        gradient = column in GRADIENT_COLUMNS
        smallest = 0.0 if gradient else 200 / cfg.n  # per cent: two videos of n
        ruling = verdict(np.subtract(a, b), *margin, smallest=smallest)
        if seeds and not gradient and not margin and min(np.mean(a), np.mean(b)) >= 98:
            ruling = "not decidable: both at the ceiling"
        shown = ", ".join(f"{x - y:+.{3 if gradient else 1}f}" for x, y in zip(a, b)) or "-"
        print(f"| {where} | {claim} | {column} | {shown} | {ruling} |")


PAIRS_4K = ("table6", "table7", "table8", "table9", "figure12", "figure13")  # Section D's runs: 4,000 pairs


def print_real(whats):
    """The rows of tables and figures for CogVideoX-5B, and what prepares their data. The same run is named once."""
    full = {"pairs": "subjects200k", "pairs-40": "subjects200k-2000", "pairs-80": "subjects200k-4000",
            "clips": "pexels", "clips-100": "pexels-1000", "clips-200": "pexels-2000", "clips-300": "pexels-3000"}
    commands, names, needed = [], {}, set()
    for what in whats:
        commands.append(f"# {what}")
        for row in [row for row, _, _ in TABLES[what]] if what in TABLES else FIGURES[what]:
            small = what in PAIRS_4K or (what, row) == ("table3", "image-only")  # that row is Table 9's
            flags, steps = flags_of(row, 4000)
            flags = {"images": "toy/data/pairs-80" if small else "toy/data/pairs", "videos": "toy/data/clips", **flags}
            flags |= {k: f"data/{full[Path(flags[k]).name]}" for k in ("images", "videos")}
            needed |= {flags["images"], flags["videos"]}
            words = [f"--{k} {v}" for k, v in flags.items()]
            words += [f"--steps {steps}"] * (steps != 4000) + ["--view_drop 0"] * (what == "scope")
            line, watch = " ".join(words), " --gradcos_every 50" * (what in ("figure9", "figure10"))
            if line in names:
                commands.append(f"# {row}: the run {names[line]} above{watch and ', with' + watch}")
            else:
                names[line] = row + "-4k" * small + "-scope" * (what == "scope")
                commands.append(f"torchrun --nproc_per_node=8 train.py --name {names[line]} {line}{watch}")
    print("# the data; python -m paper.bench says how long a run takes on your GPU")
    for folder in sorted(needed):
        source, _, n = Path(folder).name.partition("-")
        print(f"python -m paper.prepare {source} --out {folder} {f'--n {n}' * bool(n)}".rstrip())
    print("\n".join(commands))


def draw_figure(cfg, figure):
    """assets/FIGURE.png from the runs: curves over all seeds, or contact sheets of the first one."""
    from toy import world
    rows, out = FIGURES[figure], f"{cfg.assets}/{figure}.png"
    if set(rows) <= WATCHED:
        runs = [f"{cfg.out}/{row}-{seed}" for row in rows for seed in range(cfg.seeds)]
        gradcos.main(gradcos.Config(runs=runs, out=out))
    else:
        world.picture(world.Picture(lora=[f"{cfg.out}/{row}-0" for row in rows], titles=rows, n=5, out=out), scale=3)


def main(cfg):
    if cfg.row:
        return train_and_score(cfg)
    tables = [what for what in cfg.what if what in TABLES] or ([] if cfg.what else list(TABLES))
    figures = [what for what in cfg.what if what in FIGURES]
    if cfg.real:
        return print_real(cfg.what or tables)
    load_results(cfg)  # results that cannot be compared stop here, not after hours
    failed = 0
    if tables:
        rows = list(dict.fromkeys(row for table in tables for row, _, _ in TABLES[table]))
        failed = run_missing(cfg, rows, cfg.seeds)
        results = load_results(cfg)
        for table in tables:
            print_table(table, results)
        print_findings(set(rows), results, cfg)
    for figure in figures:
        failed += run_missing(cfg, FIGURES[figure], cfg.seeds if set(FIGURES[figure]) <= WATCHED else 1, runs=True)
        draw_figure(cfg, figure)
    if failed:
        sys.exit(f"{failed} rows failed; the same command tries them again")


if __name__ == "__main__":
    command_line(main, Config, __doc__, positional="what")
