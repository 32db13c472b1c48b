"""The notebook for a lecture: its cells run, with two training steps and two creatures in the place of 150 and 16."""
import json
import shutil

from tests.shared import ROOT, run

SHORTER = {'"steps": 150': '"steps": 2', '"val_every": 50': '"val_every": 2',
           '"gradcos_every": 50': '"gradcos_every": 2', "draw_test_set(16)": "draw_test_set(3)",
           "score_lora(folder, 16, steps=20)": "score_lora(folder, 3, steps=1)"}


def test_the_cells_of_the_walkthrough_run(tmp_path):
    cells = json.loads((ROOT / "paper/walkthrough.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    for name in ("toy/base", "toy/lora", "toy/refs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")  # the first cell looks for the folder of this file
    (tmp_path / "cells.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + code)
    r = run("cells.py", cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert "largest difference: 0.0" in r.stdout and "p = 0.2: moves" in r.stdout
