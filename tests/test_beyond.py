"""Beyond the paper: --image_frame, where an image step's target stands in time, and guidance on the picture. Beyond a
CPU: a GPU's dtype and number. And the toy as a newcomer has it: its first command, the notebook."""
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch

import model
import sample
import train
from common import base, media
from common.args import find_device
from tests.shared import LORA, ROOT, go_back, log_of, randomise_lora, run, weights_of


def test_the_image_frame_is_drawn_evenly_for_each_micro_batch_of_pictures():
    def drawn(choice, task):
        cfg, micros = train.Config(image_frame=choice), [(task, i // 4, i % 4, []) for i in range(2600)]
        return Counter(train.image_frame(cfg, train.MicroBatch(*micro), 13) for micro in micros)
    counts = drawn("random", "image")
    assert sorted(counts) == list(range(1, 14)) and all(150 < n < 250 for n in counts.values())  # 200 each
    assert set(drawn("random", "video")) == set(drawn("first", "image")) == {1}


def test_guidance_on_the_picture(tiny, inputs):
    """Two videos, each with both halves of [uncond | cond]: all move by (S - 1) (cond - cond without the picture). A
    LoRA's scale counts once, and afterwards nothing is left of it."""
    ours, (*rows, ref) = tiny[0], inputs
    model.add_lora(ours, 4, 2)
    randomise_lora(ours)
    names = "hidden_states", "encoder_hidden_states", "timestep"
    batch = {name: torch.cat([row, row.flip(0)]) for name, row in zip(names, rows)}

    def call(keep=None):
        return ours(**batch, attention_kwargs={"reference": ref, "scale": 0.5}, keep=keep, return_dict=False)[0]
    plain = call()
    pull = (plain - call(torch.arange(0)))[2:].repeat(2, 1, 1, 1, 1)
    with sample.guidance_on_picture(ours, 2.5):
        assert pull.abs().max() > 1e-3 and (call() - (plain + 1.5 * pull)).abs().max() < 1e-6
    assert torch.equal(call(), plain)


def test_guidance_on_the_picture_is_the_same_alone_and_in_a_batch():
    """With a merged LoRA, to a rounding of one of 255."""
    pipe, files = sample.load(LORA)[0], [ROOT / f"toy/refs/creature-{i}.png" for i in range(2)]

    def videos(chosen, S):
        references = sample.encode_references(pipe, [media.load_image(files[i]) for i in chosen], 32, 32)
        prompts = [files[i].with_suffix(".txt").read_text() for i in chosen]
        return np.array(sample.generate(pipe, references, prompts, chosen, 4, 2.0, ref_guidance=S), int)
    together = videos([0, 1], 1.5)
    assert np.abs(together[1:] - videos([1], 1.5)).max() <= 1 and np.abs(together - videos([0, 1], 1.0)).max() > 20


def test_the_toys_first_command_in_the_dtype_of_a_gpu(newcomer, monkeypatch):
    """train.py --toy from its data to its samples. A run that was killed goes on as if nobody had watched or killed."""
    monkeypatch.setattr(base.compute_dtype, "__code__", (lambda device: torch.bfloat16).__code__)  # for all importers
    monkeypatch.setattr("common.watch.generate", partial(sample.generate, steps=1))  # 50 take long in bfloat16
    short = dict(toy=True, steps=4, save_every=2, image_batch=4, image_micro=4, video_batch=2, video_micro=2, p=0.5,
                 lora_rank=4, lora_alpha=2.0, lora_dropout=0.1, view_drop=0.3)
    train.main(train.Config(**short, val_every=2, gradcos_every=2))
    assert [line["step"] for line in log_of("out/toy", "gradcos.jsonl")] == [0, 2, 4]
    assert Path("out/toy/samples/creature-0-000004.png").is_file()
    saved = model.load_file(f"out/toy/step-000004/{model.LORA_FILE}")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert '"dtype": "torch.bfloat16"' in Path("toy/data/cache/pairs+clips-bfloat16/video/index.json").read_text()
    go_back("out/toy", 2, "out/killed")
    train.main(train.Config(**short, val_every=0, name="killed"))
    assert log_of("out/killed") == log_of("out/toy")
    assert torch.equal(weights_of("out/killed", 4), weights_of("out/toy", 4))


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    """Rank 9 of two machines with eight GPUs is the second one's GPU 1."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda") == torch.device("cuda", 1) and find_device("cuda:7").index == 7


def test_the_cells_of_the_walkthrough_run(newcomer):
    """With two training steps and three creatures in the place of 150 and 16."""
    cells = json.loads((ROOT / "paper/walkthrough.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in (('"steps": 150', '"steps": 2'), ('_every": 50', '_every": 2'), ("test_set(16)", "test_set(3)"),
                        ("folder, 16, steps=20", "folder, 3, steps=1")):
        assert long in code
        code = code.replace(long, short)
    Path("train.py").symlink_to(ROOT / "train.py")  # the first cell looks for the folder of this file
    r = run("-c", code, cwd=newcomer)
    assert r.returncode == 0, r.stderr
    assert "largest difference: 0.0" in r.stdout and "p = 0.2: moves" in r.stdout
