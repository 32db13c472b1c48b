"""The paper's ablations, each from one command, on the toy world.

    python -m paper.ablate                       # trains and scores what is missing, prints every table and finding
    python -m paper.ablate table9                # one of them, beside the paper's numbers
    python -m paper.ablate headline              # a picture from the same results: assets/headline.png
    python -m paper.ablate --write True          # paper/RESULTS.md, from paper/results/ alone

A row is `train.py --toy` with other flags (ROWS), on one thread. It is scored on --n unseen creatures; each (row, seed)
leaves one file in --results, which is reused. Delete a file, and it is made again. `--row NAME --seeds S` makes one of
them: so several can run side by side.

A finding of the paper (FINDINGS) says that one row is higher than another in one column, or as high within a margin;
RESULTS.template.md says when it is reproduced.
"""
import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from matplotlib.figure import Figure

import common.run
import gradcos
import train
from common.args import command_line, knob
from common.run import changed, checkpoints, newest_checkpoint, read_json, records, write
from toy import world

PAPER = read_json(Path(__file__).with_name("tables.json"))  # all that is run, and what the paper says of it
ROWS = PAPER["rows"]          # name: flags of train.py. Data sets are shares of the toy's 2,000 pairs and 400 clips
FIGURES = PAPER["figures"]    # figure: its rows
TABLES = PAPER["tables"]      # table: [row, the paper's name, the paper's numbers in PAPER_COLUMNS or null]
FINDINGS = PAPER["findings"]  # where, the claim, column, higher row, lower row (or a number), perhaps a margin
PICTURE_BY = {"picture-then-video": "image-only", "picture-then-video-long": "image-only"}
SHORT = {"t2v-finetuning", "picture-then-video"}  # a fifth of the steps: Table 11's baseline had 800 of 4,000
CURVES = FIGURES["headline"]  # scored at checkpoints too
PICTURES = (*CURVES, "ours-any-frame", "image-only-any-frame")  # scored on single pictures too
WATCHED = {*FIGURES["figure9"], *FIGURES["figure10"], *FIGURES["cosines"]}  # measured with gradcos

COLUMNS = ("moves", "frozen", "broken", "still", "smoothness", "cells", "identity_16", "direction", "field")
PAPER_COLUMNS = ("Motion Smoothness", "Dynamic Degree", "CLIP-T", "CLIP-I", "DINO-I")
STUDENT_T = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}  # 5 % above, by seeds
GRADIENT_COLUMNS = ("cosine", "norm_img", "norm_vid")  # means over the second half of a run that gradcos watched
COMMANDS = [*dict.fromkeys([*TABLES, *FIGURES])]


@dataclass
class Config:
    what: list[str] = knob([], f"of {', '.join(COMMANDS)}; none means every table")
    seeds: int = knob(3, "seeds 0, 1, ... to train; results of more seeds count where they are")
    steps: int = knob(train.TOY["steps"], "training steps of a row")
    n: int = knob(96, "unseen creatures that score a row")
    sample_steps: int = knob(20, "denoising steps when scoring")
    curve_n: int = knob(32, "unseen creatures that score a checkpoint on the way")
    results: str = knob("paper/results", "folder with one file per row and seed")
    out: str = knob("out/ablate", "where the runs live")
    write: bool = knob(False, "write paper/RESULTS.md from the results and train nothing")
    row: str = knob("", "train and score this one row with seed --seeds")

    def __post_init__(self):
        for what in self.what:
            if what not in COMMANDS:
                raise ValueError(f"no table or figure {what!r}: choose from {', '.join(COMMANDS)}")
        if self.row and self.row not in ROWS:
            raise ValueError(f"no row {self.row!r}: choose from {', '.join(ROWS)}")


def settings(cfg):
    """What all results that are compared must share."""
    return {k: getattr(cfg, k) for k in ("steps", "n", "sample_steps", "curve_n")}


def train_and_score(cfg):
    """One row with one seed, in this process: --results/ROW-SEED.json, from a run of this very code.

    Where the result is there already, only the run is made that a figure needs."""
    name = f"{cfg.row}-{cfg.seeds}"
    run, result = Path(cfg.out, name), Path(cfg.results, f"{name}.json")
    run.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run}.lock"):  # a second process waits, then finds the row done
        if result.is_file() and newest_checkpoint(run):
            return
        if before := ROWS[cfg.row].get("init_lora") or PICTURE_BY.get(cfg.row):  # the run that this one needs
            train_and_score(replace(cfg, row=before))
        shutil.rmtree(run, ignore_errors=True)
        config = train_row(cfg, name)
        if not result.is_file():
            commit = subprocess.run("git describe --always --dirty", shell=True, capture_output=True, text=True).stdout
            record = {"row": cfg.row, "seed": cfg.seeds, "flags": ROWS[cfg.row], **settings(cfg),
                      "commit": commit.strip() or "unknown", **score_row(cfg, run, config)}
            result.parent.mkdir(parents=True, exist_ok=True)
            write(result, json.dumps(record, indent=1) + "\n")


def train_row(cfg, name):
    """Train the row into out/NAME. Returns the config."""
    steps = cfg.steps // 5 if cfg.row in SHORT else cfg.steps
    cache = "toy/data/cache_one_thread"  # not train.py's: more threads would change the last bits of its latents
    flags = {**train.TOY, "toy": True, "seed": cfg.seeds, "name": name, "out": cfg.out, "cache": cache, "val_every": 0,
             "steps": steps, "save_every": cfg.steps, **ROWS[cfg.row]}
    if "init_lora" in flags:
        flags["init_lora"] = f"{cfg.out}/{flags['init_lora']}-{cfg.seeds}"
    if cfg.row in CURVES:
        flags["save_every"] = max(1, flags["steps"] // 5)
        common.run.KEPT = 99  # each of them is scored
    if cfg.row in WATCHED:
        flags["gradcos_every"] = max(1, cfg.steps // 20)
    config = train.Config(**flags)
    train.train(world.ensure_data(config, train.TOY))
    return config


def score_row(cfg, run, config):
    """{"scores", perhaps "pictures" and "curve"}: the run on unseen creatures, its single pictures, its checkpoints."""
    seen = config.p < 1 or config.token_drop < 1 or config.init_lora  # did this row ever see a reference?
    options = {"with_reference": bool(seen), "steps": cfg.sample_steps}
    if cfg.row in PICTURE_BY:
        options["picture_by"] = f"{cfg.out}/{PICTURE_BY[cfg.row]}-{cfg.seeds}"
    scored = {"scores": world.score_lora(run, cfg.n, **options)[0]}
    if cfg.row in WATCHED:
        late = [r for r in records(run / "gradcos.jsonl") if r["step"] >= config.steps / 2]
        scored["scores"] |= {column: float(np.mean([r[column] for r in late])) for column in GRADIENT_COLUMNS}
    if cfg.row in PICTURES:
        scored["pictures"] = world.score_lora(run, cfg.n, frames=1, **options)[0]
    if cfg.row in CURVES:
        scored["curve"] = [{"step": int(d.name[5:]), **world.score_lora(d, cfg.curve_n, **options)[0]}
                           for d in checkpoints(run)]
    return scored


def run_missing(cfg, rows, seeds, runs=False):
    """Train and score each (row, seed) that has no result yet; with runs=True also those whose run is gone, because a
    figure needs its weights."""
    for seed in range(seeds):
        for row in rows:
            if runs or not Path(cfg.results, f"{row}-{seed}.json").is_file():
                train_and_score(replace(cfg, row=row, seeds=seed))


def load_results(cfg):
    """{row: {seed: record}} of what there is. ValueError for results with another number of steps or creatures."""
    results = {}
    for file in sorted(Path(cfg.results).glob("*-[0-9].json")):
        record = read_json(file)
        if differ := changed(record, {**settings(cfg), "flags": ROWS.get(record["row"])}):
            raise ValueError(f"{file} was made with other settings ({differ}): choose another --results")
        scores = record["scores"]
        scores["moves_right"] = scores["moves"] * scores["direction"] / 100 if scores["moves"] else 0.0
        results.setdefault(record["row"], {})[record["seed"]] = record
    return results


def mean_and_std(values):
    """"81.2 ± 1.3" over the seeds; a direction of videos that never move is no number and is left out."""
    values = [v for v in values if not np.isnan(v)]
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}" if values else "-"


def markdown(head, rows):
    """A table: its column names, and a list of cells for each row."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])


def paper_table(table, results):
    """A table of the paper: our scores beside its numbers."""
    gradients = GRADIENT_COLUMNS if table == "world" else ()
    rows = []
    for row, name, paper in TABLES[table]:
        scores = [record["scores"] for record in results.get(row, {}).values()]
        cells = [mean_and_std([s[c] for s in scores if c in s]) for c in COLUMNS]
        for column in gradients:
            watched = [s[column] for s in scores if column in s]
            cells.append(f"{np.mean(watched):.3f}" if watched else "-")
        rows.append([name, len(scores), *cells, " / ".join(map(str, paper)) if paper else "-"])
    return markdown([table, "seeds", *COLUMNS, *gradients, f"paper: {' / '.join(PAPER_COLUMNS)}"], rows)


def single_picture_table(results):
    """What some rows make of single pictures (--frames 1)."""
    rows = []
    for row in PICTURES:
        scores = [record["pictures"] for record in results.get(row, {}).values()]
        cells = [mean_and_std([s[c] for s in scores]) for c in ("cells", "identity_16", "field")]
        rows.append([row, len(scores), mean_and_std([100 - s["broken"] for s in scores]), *cells])
    return markdown(["single pictures", "seeds", "whole", "cells", "identity_16", "field"], rows)


def control_table(cfg, name):
    """The rows of results/controls.json or guidance.json."""
    rows = read_json(Path(cfg.results, f"{name}.json"))["rows"].items()
    return markdown([name, *COLUMNS], [[row, *(mean_and_std([scores[c]]) for c in COLUMNS)] for row, scores in rows])


def verdict(differences, margin=None, smallest=0.0):
    """The rule of RESULTS.template.md, but for its ceiling. margin: the finding is that the difference is within it."""
    d = np.array(differences)
    if len(d) < 2:
        return "not decidable"
    half = STUDENT_T[min(len(d), 10)] * d.std(ddof=1) / np.sqrt(len(d))
    low, high = d.mean() - half, d.mean() + half
    if margin is not None:
        if -margin < low and high < margin:
            return "reproduced"
        return "not reproduced" if low > margin or high < -margin else "not decidable"
    if -smallest < low and high < smallest:
        return "no difference"
    if abs(d.mean()) < smallest or low <= 0 <= high:
        return "not decidable"
    return "reproduced" if low > 0 else "not reproduced"


def finding_table(wanted, results, cfg):
    """Each finding on the rows that are wanted, with its difference per seed and its verdict."""
    rows = []
    for where, claim, column, high, low, *margin in FINDINGS:
        if not {name for name in (high, low) if isinstance(name, str)} <= wanted:
            continue
        # A number stands for every seed there can be: their files have one digit.
        a, b = ({seed: record["scores"][column] for seed, record in results.get(name, {}).items()}
                if isinstance(name, str) else dict.fromkeys(range(10), name) for name in (high, low))
        pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys()) if not np.isnan(a[seed] - b[seed])]
        differences = [x - y for x, y in pairs]
        gradient = column in GRADIENT_COLUMNS
        ruling = verdict(differences, *margin, smallest=0.0 if gradient else 200 / cfg.n)  # two videos of n
        if pairs and not gradient and not margin and np.mean(pairs, axis=0).min() >= 98:
            ruling = "not decidable: both at the ceiling"
        if not (a and b):
            ruling = "not run yet"
        shown = ", ".join(f"{d:+.{3 if gradient else 1}f}" for d in differences) or "-"
        rows.append([where, claim, column, shown, ruling])
    return markdown(["where", "the paper says", "column", "difference per seed", "verdict"], rows)


def write_results(cfg):
    """paper/RESULTS.md, from the files in --results alone. The words around the tables stand in RESULTS.template.md."""
    results = load_results(cfg)
    tables = [*(paper_table(table, results) for table in TABLES), single_picture_table(results)]
    figures = [f"![{figure}](../assets/{figure}.png)\n\n`python -m paper.ablate {figure}`" for figure in FIGURES]
    template = Path(__file__).with_name("RESULTS.template.md").read_text(encoding="utf-8")
    write(Path("paper/RESULTS.md"), template.format(
        n=cfg.n, sample_steps=cfg.sample_steps, findings=finding_table(set(ROWS), results, cfg),
        controls=control_table(cfg, "controls"), guidance=control_table(cfg, "guidance"),
        default_guidance=f"{train.TOY['guidance']:g}", tables="\n\n".join(tables), figures="\n\n".join(figures)))
    print("wrote paper/RESULTS.md")


def draw_figure(cfg, figure):
    """assets/FIGURE.png: from the results, from gradcos.jsonl of the runs, or contact sheets of the first seed."""
    rows, out = FIGURES[figure], f"assets/{figure}.png"
    if figure in FROM_RESULTS:
        FROM_RESULTS[figure](cfg, load_results(cfg)).savefig(out, dpi=130)
        print(f"wrote {out}")
    elif set(rows) <= WATCHED:
        runs = [f"{cfg.out}/{row}-{seed}" for row in rows for seed in range(cfg.seeds)]
        gradcos.main(gradcos.Config(runs=runs, out=out))
    else:
        runs = [f"{cfg.out}/{row}-0" for row in rows]
        world.picture(world.Picture(lora=runs, titles=list(rows), n=5, out=out), scale=3)


def draw_headline(cfg, results):
    """Motion and identity against the training step: p = 0.2, p = 0, and an image-only LoRA that goes on with clips."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, controls = figure.subplots(1, 2), read_json(Path(cfg.results) / "controls.json")["rows"]
    for axis, column, title in zip(axes, ("moves", "cells"), ("videos that move", "cells that are right")):
        for row, label, colour in zip(CURVES, ("dual-task, p = 0.2", "image-only, p = 0", "image-only, then clips"),
                                      gradcos.COLOURS):
            curves = [[{**r, "step": r["step"] + (record["steps"] if row == "thaw" else 0)} for r in record["curve"]]
                      for record in results[row].values()]
            gradcos.band(axis, curves, lambda r: r[column], color=colour, label=f"{label} ({len(curves)} seeds)")
        for name, style in (("the base without a reference", ":"), ("the reference as a still", "-."),
                            ("the true clips, through the VAE", "--")):
            axis.axhline(controls[name][column], color="grey", linewidth=0.9, linestyle=style, label=name)
        axis.set(title=title, xlabel="training step", ylabel="per cent", ylim=(-2, 102))
    axes[1].legend(fontsize=8, frameon=False)
    return figure


def draw_dose(cfg, results):
    """Motion and identity against p: with a picture's target at latent frame 1, as in the paper, and at any frame."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = {"moves": "videos that move", "still": "videos still to the pixel", "cells": "cells that are right"}
    for axis, (column, title) in zip(axes, panels.items()):
        for suffix, label, colour in (("", "at latent frame 1 (the paper)", gradcos.COLOURS[0]),
                                      ("-any-frame", "at any latent frame", gradcos.COLOURS[1])):
            doses = {ROWS[row].get("p", 0.2): [r["scores"][column] for r in results[row].values()]
                     for row in FIGURES["dose"] if row.endswith("-any-frame") == bool(suffix)}
            lowest, mean, highest = ([f(v) for v in doses.values()] for f in (min, np.mean, max))
            axis.fill_between(list(doses), lowest, highest, color=colour, alpha=0.2)
            axis.plot(list(doses), mean, "o-", color=colour, label=label)
        axis.set(title=title, xlabel="p, the share of video steps", ylim=(-2, 102))
    axes[0].set(ylabel="per cent")
    axes[2].legend(frameon=False, title="the target of an image step")
    return figure


FROM_RESULTS = {"headline": draw_headline, "dose": draw_dose}  # the other figures need the runs


def make_controls(cfg):
    """results/controls.json and guidance.json, where they are missing. They need the run of `ours`, seed 0."""
    files = [Path(cfg.results) / name for name in ("controls.json", "guidance.json")]
    if all(file.is_file() for file in files):
        return
    run_missing(cfg, ["ours"], 1, runs=True)
    run, options = f"{cfg.out}/ours-0", {"steps": cfg.sample_steps}
    controls = world.score_controls(run, cfg.n, **options)
    scan = {g: world.score_lora(run, cfg.n, guidance=float(g), **options)[0] for g in ("1", "1.5", "2", "3", "4", "6")}
    for file, rows in zip(files, (controls, scan)):
        write(file, json.dumps({**settings(cfg), "rows": rows}, indent=1) + "\n")


def main(cfg):
    torch.set_num_threads(1)  # as many as made the results: others would change their last bits
    if cfg.row:
        return train_and_score(cfg)
    if cfg.write:
        return write_results(cfg)
    tables = [what for what in cfg.what or TABLES if what in TABLES]
    figures = [what for what in cfg.what if what in FIGURES]
    load_results(cfg)  # results that cannot be compared stop here, not after hours
    if not cfg.what or "headline" in cfg.what:
        make_controls(cfg)
    rows = list(dict.fromkeys(row for table in tables for row, _, _ in TABLES[table]))
    run_missing(cfg, rows, cfg.seeds)
    if tables:
        results = load_results(cfg)
        for table in tables:
            print(f"\n### {table}\n\n{paper_table(table, results)}")
        print(f"\n### Findings\n\n{finding_table(set(rows), results, cfg)}")
    for figure in figures:
        seeds = cfg.seeds if figure in FROM_RESULTS or set(FIGURES[figure]) <= WATCHED else 1
        run_missing(cfg, FIGURES[figure], seeds, runs=figure not in FROM_RESULTS)
        draw_figure(cfg, figure)


if __name__ == "__main__":
    command_line(main, Config, __doc__, positional="what")
