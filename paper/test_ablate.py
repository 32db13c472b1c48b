"""The ablation tables: every row is a valid run, and the rule for a verdict has known answers."""
import json

import pytest
from transformers import HfArgumentParser

import train
from paper import ablate


def test_every_row_is_a_run():
    used = {row for rows in ablate.TABLES.values() for row, _, _ in rows}
    assert used == set(ablate.ROWS)
    for flags in ablate.ROWS.values():
        train.Config(**{**train.TOY, "steps": 10, "val_refs": ".", **flags})
    for where, _, _, high, low in ablate.FINDINGS:
        assert {high, low} <= used
    assert len({json.dumps(flags, sort_keys=True) for flags in ablate.ROWS.values()}) == len(ablate.ROWS)


@pytest.mark.parametrize("differences, verdict", [
    ([10.0, 12.0, 11.0], "reproduced"), ([-10.0, -12.0, -11.0], "not reproduced"),
    ([10.0, 12.0, -1.0], "not decidable"),
    ([1.0, 30.0, 0.5], "not decidable"), ([], "not decidable"), ([5.0], "not decidable")])
def test_verdict(differences, verdict):
    assert ablate.verdict(differences) == verdict


def test_real_commands_are_valid_flags(capsys):
    ablate.main(ablate.Config(real=True))
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("torchrun")]
    assert len(lines) == sum(map(len, ablate.TABLES.values()))
    prepared = {line.split("--out ")[1].split()[0] for line in printed if "paper.prepare" in line}
    assert prepared == {word for line in lines for word in line.split() if word.startswith("data/")}
    assert "python -m paper.prepare subjects200k --out data/subjects200k-4000 --n 4000" in printed
    names = {}
    for line in lines:  # one name, one run: nothing writes to the same place with other flags
        assert names.setdefault(line.split("--name ")[1].split()[0], line) == line
    parser = HfArgumentParser(train.Config)
    for line in lines:
        train.Config(**vars(parser.parse_args(line.split("train.py ")[1].split())))


def test_results_with_other_settings_are_refused(tmp_path):
    record = {"row": "ours", "seed": 0, "steps": 10, "n": 64, "lr": 4e-3, "sample_steps": 25, "flags": {},
              "scores": {}}
    (tmp_path / "ours-0.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="steps was 10, now"):
        ablate.load_results(ablate.Config(results=str(tmp_path)))


def test_cost_is_that_of_the_counted_model():
    """TFLOP of the card's performance sheet, counted on the meta device: 110.4 for a pair, 1440.9 for a clip."""
    assert ablate.train_flops(226 + 2700) == pytest.approx(110.4, rel=2e-3)
    assert ablate.train_flops(226 + 1350 * 14) == pytest.approx(1440.9, rel=2e-3)
