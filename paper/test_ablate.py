"""The ablation tables: every row is a valid run, and the rule for a verdict has known answers."""
import json
from pathlib import Path

import pytest

import train
from paper import ablate


def test_every_row_is_a_run_and_stands_in_a_table():
    used = {row for rows in ablate.TABLES.values() for row, _, _ in rows}
    used |= {row for rows in ablate.FIGURES.values() for row in rows}
    assert used == set(ablate.ROWS)
    for flags in ablate.ROWS.values():
        train.Config(**{**train.TOY, "steps": 10, "val_refs": ".", **flags})
    assert len({json.dumps(flags, sort_keys=True) for flags in ablate.ROWS.values()}) == len(ablate.ROWS)


@pytest.mark.parametrize("differences, options, verdict", [
    ([10.0, 12.0, 11.0], {}, "reproduced"), ([-10.0, -12.0, -11.0], {}, "not reproduced"),
    ([10.0, 12.0, -1.0], {}, "not decidable"), ([], {}, "not decidable"), ([5.0], {}, "not decidable"),
    ([0.9, 2.0, 3.2], {}, "reproduced"), ([0.8, 2.0, 3.3], {}, "not decidable"),  # 2 against 1.69 sd: 1.94, 2.11
    ([1.0, 2.0, 3.0], {"smallest": 3.1}, "not decidable"),                        # smaller than two videos
    ([0.5, 0.2, -0.3], {"smallest": 2.0}, "no difference"), ([0.5, 1.2, -0.3], {"smallest": 1.0}, "not decidable"),
    ([1.0, -2.0, 1.5], {"margin": 10}, "reproduced"), ([15.0, 16.0, 17.0], {"margin": 10}, "not reproduced"),
    ([8.0, 9.0, 10.0], {"margin": 10}, "not decidable")])
def test_verdict(differences, options, verdict):
    assert ablate.verdict(differences, **options) == verdict


def test_students_t_is_the_table_of_every_textbook():
    assert ablate.STUDENT_T == {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}


def test_a_row_is_done_once_and_a_lost_run_is_trained_again(tmp_path, monkeypatch):
    """A result comes from a fresh run. With the result there a lost run is made again when a figure needs it."""
    trained, scored, run = [], [], tmp_path / "out/ours-0"

    def train_row(cfg, name):
        (tmp_path / "out" / name / "step-000001").mkdir(parents=True)
        trained.append(name)
    monkeypatch.setattr(ablate, "train_row", train_row)
    monkeypatch.setattr(ablate, "score_row", lambda cfg, run, config: scored.append(run.name) or {"scores": {}})
    (run / "step-000009").mkdir(parents=True)  # left by other code: not to be scored as ours
    folders = dict(out=str(tmp_path / "out"), results=str(tmp_path / "results"))
    ablate.run_missing(ablate.Config(**folders), ["ours"], 1)
    (run / "step-000001").rmdir()
    ablate.run_missing(ablate.Config(**folders), ["ours"], 1)
    assert trained == scored == ["ours-0"]
    ablate.run_missing(ablate.Config(**folders), ["ours"], 1, runs=True)
    ablate.main(ablate.Config(row="thaw", seeds=1, **folders))  # goes on from image-only's run, which is made first
    assert trained == ["ours-0", *scored] and scored == ["ours-0", "image-only-1", "thaw-1"]


def test_results_are_written_from_the_files_alone(monkeypatch, tmp_path):
    """RESULTS.md is what the committed results give: nobody wrote a number by hand."""
    written = Path("paper/RESULTS.md").read_text()
    monkeypatch.setattr(ablate, "write", lambda path, text: (tmp_path / "RESULTS.md").write_text(text))
    ablate.main(ablate.Config(write=True))
    assert (tmp_path / "RESULTS.md").read_text() == written


def test_results_with_other_settings_are_refused(tmp_path):
    record = {"row": "ours", "seed": 0, "steps": 10, "n": 64, "sample_steps": 25, "flags": {}, "scores": {}}
    (tmp_path / "ours-0.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="steps was 10, now"):
        ablate.load_results(ablate.Config(results=str(tmp_path)))
