"""The ablation tables: every row is a valid run, and the rule for a verdict has known answers."""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import train
from common.run import command_line
from paper import ablate


def test_every_row_is_a_run():
    used = {row for rows in ablate.TABLES.values() for row, _, _ in rows}
    used |= {row for rows in ablate.FIGURES.values() for row in rows}
    assert used == set(ablate.ROWS)
    for flags in ablate.ROWS.values():
        train.Config(**{**train.TOY, "steps": 10, "val_refs": ".", **flags})
    for _, _, _, high, low, *_ in ablate.FINDINGS:
        assert {high, low} <= used | {name for name in (high, low) if isinstance(name, float)}
    assert len({json.dumps(flags, sort_keys=True) for flags in ablate.ROWS.values()}) == len(ablate.ROWS)


@pytest.mark.parametrize("differences, options, verdict", [
    ([10.0, 12.0, 11.0], {}, "reproduced"), ([-10.0, -12.0, -11.0], {}, "not reproduced"),
    ([10.0, 12.0, -1.0], {}, "not decidable"), ([], {}, "not decidable"), ([5.0], {}, "not decidable"),
    ([1.0, 2.0, 3.0], {}, "reproduced"), ([0.9, 2.0, 3.2], {}, "reproduced"),  # mean 2 against 1.69 sd: 1.69, 1.94
    ([0.8, 2.0, 3.3], {}, "not decidable"),                                      # 2.03 against 2.11
    ([1.0, 2.0, 3.0], {"smallest": 3.1}, "not decidable"),                       # smaller than two videos
    ([1.0, -2.0, 1.5], {"margin": 10}, "reproduced"), ([15.0, 16.0, 17.0], {"margin": 10}, "not reproduced"),
    ([8.0, 9.0, 10.0], {"margin": 10}, "not decidable")])
def test_verdict(differences, options, verdict):
    assert ablate.verdict(differences, **options) == verdict


def test_students_t():
    """Five per cent of the distribution with n - 1 degrees of freedom lie above: its density, integrated."""
    for n, t in ablate.STUDENT_T.items():
        v, x = n - 1, np.linspace(0, t, 100_001)
        scale = math.gamma((v + 1) / 2) / (math.sqrt(v * math.pi) * math.gamma(v / 2))
        above = 0.5 - np.trapezoid(scale * (1 + x**2 / v) ** (-(v + 1) / 2), x)
        assert above == pytest.approx(0.05, abs=5e-4)  # the table has two decimals


def test_findings_are_printed_with_ceiling_and_numbers():
    scores = {"moves": 99.0, "moves_right": 90.0, "frozen": 0.0, "broken": 1.0, "smoothness": 100.0, "cells": 80.0,
              "direction": 90.0, "cosine": 0.01, "norm_vid": 1.0, "norm_img": 1.0}
    lower, nowhere = {**scores, "cells": 50.0}, {**scores, "moves_right": float("nan")}
    results = {row: {seed: {"scores": s} for seed in range(3)}
               for row, s in (("ours", scores), ("p-0.6", lower), ("two-stage", nowhere), ("thaw", scores),
                              ("image-only", scores))}
    said = "\n".join(ablate.finding_lines(set(results), results, ablate.Config()))
    assert "| moves | +0.0, +0.0, +0.0 | not decidable: both at the ceiling |" in said
    assert "| cells | -30.0, -30.0, -30.0 | not reproduced |" in said
    assert "| cosine | +0.010, +0.010, +0.010 | reproduced |" in said
    assert "two-stage's (FVD there) | moves_right | - | not decidable |" in said  # a score that is no number
    assert "freezes (moves in under 5 %) | moves | -94.0, -94.0, -94.0 | not reproduced |" in said


def test_a_row_is_done_once_and_a_lost_run_is_trained_again(tmp_path, monkeypatch):
    """A result comes from a fresh run; with the result there a lost run is made again, and the result stays."""
    trained, scored = [], []

    def train_row(cfg, name, seed):
        (tmp_path / f"out/{name}/step-000001").mkdir(parents=True)
        trained.append(name)

    def score_row(cfg, run, config):
        scored.append(run.name)
        return {"scores": {"cells": 1.0}}
    monkeypatch.setattr(ablate, "train_row", train_row)
    monkeypatch.setattr(ablate, "score_row", score_row)
    (tmp_path / "out/ours-0/step-000009").mkdir(parents=True)  # left by other code: not to be scored as ours
    cfg = ablate.Config(row="ours", seeds=0, out=str(tmp_path / "out"), results=str(tmp_path / "results"))
    ablate.main(cfg)
    written = (tmp_path / "results/ours-0.json").read_text()
    assert trained == scored == ["ours-0"] and not (tmp_path / "out/ours-0/step-000009").exists()
    ablate.main(cfg)
    assert trained == ["ours-0"]
    (tmp_path / "out/ours-0/step-000001").rmdir()
    ablate.main(cfg)
    assert trained == ["ours-0"] * 2 and scored == ["ours-0"]
    assert (tmp_path / "results/ours-0.json").read_text() == written
    ablate.main(dataclasses.replace(cfg, row="thaw", seeds=1))  # goes on from image-only's run, which is made first
    assert trained[2:] == ["image-only-1", "thaw-1"]


def test_results_are_written_from_the_files_alone(monkeypatch, tmp_path):
    """RESULTS.md is what the committed results give: nobody wrote a number by hand."""
    written = Path("paper/RESULTS.md").read_text()
    monkeypatch.setattr(ablate, "write", lambda path, text: (tmp_path / "RESULTS.md").write_text(text))
    ablate.main(ablate.Config(write=True))
    assert (tmp_path / "RESULTS.md").read_text() == written


def test_real_commands_are_valid_flags(capsys):
    ablate.main(ablate.Config(real=True))
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("torchrun")]
    again = [line for line in printed if ": the run " in line]
    toys = [line for line in printed if line.endswith(": the toy only")]
    assert len(lines) + len(again) + len(toys) == sum(map(len, ablate.TABLES.values()))
    assert len({line.split(" ", 5)[5] for line in lines}) == len(lines)  # no run twice under two names
    prepared = {line.split("--out ")[1].split()[0] for line in printed if "paper.prepare" in line}
    assert prepared == {word for line in lines for word in line.split() if word.startswith("data/")}
    assert "python -m paper.prepare subjects200k --out data/subjects200k-4000 --n 4000" in printed
    names = {}
    for line in lines:  # one name, one run: nothing writes to the same place with other flags
        assert names.setdefault(line.split("--name ")[1].split()[0], line) == line
    read = []
    for line in lines:
        command_line(read.append, train.Config, "", line.split("train.py ")[1].split())
        cfg = read.pop()
        if cfg.task_schedule == "mixed":  # 32 coins a step, as the authors' 32 ranks
            cfg = train.divide_batches(cfg, 8)
            assert cfg.image_batch // cfg.image_micro == 32


def test_results_with_other_settings_are_refused(tmp_path):
    record = {"row": "ours", "seed": 0, "steps": 10, "n": 64, "sample_steps": 25, "flags": {},
              "scores": {}}
    (tmp_path / "ours-0.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="steps was 10, now"):
        ablate.load_results(ablate.Config(results=str(tmp_path)))
