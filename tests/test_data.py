"""The data sets: pictures, pairs and clips of every kind, and what is said about those that cannot be used."""
from tests.common import write_clip  # before torch

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data


@pytest.mark.parametrize("padding", [2, 8, 16])
def test_split_views_with_shared_padding(padding):
    s = 512
    sheet = Image.new("RGB", (2 * s + 3 * padding, s + 2 * padding), "white")
    sheet.paste("red", (padding, padding, padding + s, padding + s))
    sheet.paste("blue", (2 * padding + s, padding, 2 * padding + 2 * s, padding + s))
    left, right = data.split_views(sheet)
    assert left.size == right.size == (s, s)
    assert left.getcolors() == [(s * s, (255, 0, 0))] and right.getcolors() == [(s * s, (0, 0, 255))]


def test_split_views_in_the_middle():
    sheet = Image.new("RGB", (1056, 528), "white")
    sheet.paste("red", (8, 8, 520, 520))
    sheet.paste("blue", (536, 8, 1048, 520))
    left, right = data.split_views(sheet)
    assert left.getcolors()[0][1] == (255, 0, 0) and right.getcolors()[0][1] == (0, 0, 255)
    assert len(left.getcolors()) == len(right.getcolors()) == 1 and left.size == right.size


def test_load_image_modes(tmp_path):
    def saved(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return np.asarray(data.load_image(tmp_path / name))
    deep = Image.fromarray(np.full((4, 6), 0x8080, np.uint16))
    assert saved(deep, "deep.png").tolist()[0][0] == [128, 128, 128]  # convert("RGB") alone would give 255
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    assert saved(clear, "clear.png")[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    assert saved(palette, "palette.png")[0, 0].tolist() == [200, 100, 50]
    assert saved(palette, "alpha.png", transparency=1)[0, 0].tolist() == [255, 255, 255]
    assert saved(Image.new("CMYK", (6, 4)), "cmyk.jpg").shape == (4, 6, 3)
    assert saved(Image.new("L", (6, 4), 77), "grey.png")[0, 0].tolist() == [77] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert saved(Image.new("RGB", (6, 4)), "turned.jpg", exif=exif).shape == (6, 4, 3)


def test_resize_center_crop():
    rows = np.broadcast_to(np.arange(100, dtype=np.uint8)[:, None, None], (100, 60, 3))
    cut = np.asarray(data.resize_center_crop(Image.fromarray(rows.copy()), 30, 60))
    assert cut.shape == (30, 60, 3) and cut[:, 0, 0].tolist() == list(range(35, 65))  # the middle, untouched
    blocks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    big = blocks.resize((256, 256), Image.NEAREST)
    assert np.array_equal(data.resize_center_crop(big, 32, 32), blocks)  # whole-number shrinking is exact
    a, b = (np.asarray(data.resize_center_crop(big, 32, 32, 0.2, np.random.default_rng(s))) for s in (0, 1))
    assert a.shape == b.shape == (32, 32, 3) and not np.array_equal(a, b)


def test_only_the_wanted_frame_becomes_a_picture(tmp_path, monkeypatch):
    """As with cached latents: the reference frame alone is converted and resized."""
    grey = [Image.new("RGB", (64, 64), (20 * k,) * 3) for k in range(9)]
    data.save_video(tmp_path / "a.mp4", grey, 8.0)
    calls, crop = [], data.resize_center_crop
    monkeypatch.setattr(data, "resize_center_crop", lambda *args: calls.append(1) or crop(*args))
    (frame,) = data.load_clip(tmp_path / "a.mp4", 9, 8, (16, 16), first=8)
    assert len(calls) == 1 and abs(np.asarray(frame).mean() - 160) < 6


def test_load_clip_picks_frames_by_time(tmp_path):
    write_clip(tmp_path / "a.mp4", range(0, 240, 8), 24)  # 30 frames at 24 fps; brightness 8n
    at8 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 9, 8)]
    assert np.allclose(at8, [8 * 3 * k for k in range(9)], atol=3)
    at24 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 17, 24)]
    assert np.allclose(at24, [8 * k for k in range(17)], atol=3)
    at48 = [np.asarray(f).mean() for f in data.load_clip(tmp_path / "a.mp4", 9, 48)]  # slower clips repeat frames
    assert np.allclose(at48, [8 * (k // 2) for k in range(9)], atol=3)
    with pytest.raises(ValueError, match="too short: 10 frames at 8 fps, 17 asked"):
        data.load_clip(tmp_path / "a.mp4", 17, 8)


def test_clip_frames():
    assert [data.clip_frames(n) for n in (1, 8, 9, 13, 16, 17, 49, 50)] == [1, 1, 9, 9, 9, 17, 49, 49]
    assert [data.clip_frames(n, 2) for n in (4, 5, 9, 12)] == [1, 5, 9, 9]


def test_corrupt_clip_is_skipped_and_counted(tmp_path):
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", [60 * i + 20] * 9, 8)
    whole = (tmp_path / "1.mp4").read_bytes()
    (tmp_path / "1.mp4").write_bytes(whole[:len(whole) // 3])
    clips = data.Clips(tmp_path, (16, 16), 9, 8)
    items = [clips[step, 0] for step in range(12)]
    skipped = [reason for item in items for reason in item["skipped"]]
    assert skipped and all("1.mp4" in reason for reason in skipped)
    assert {int(item["pixels"].float().mean().round() / 60) for item in items} == {0, 2}
    for f in ("0.mp4", "2.mp4"):
        (tmp_path / f).write_bytes(b"")
    with pytest.raises(ValueError, match="20 video samples in a row"):
        clips[0, 0]


def test_random_reference_frame_and_statelessness(tmp_path):
    write_clip(tmp_path / "a.mp4", range(0, 180, 20), 8)
    clips = data.Clips(tmp_path, (16, 16), 9, 8)
    first = data.Clips(tmp_path, (16, 16), 9, 8, random_frame=False)
    picked = set()
    for step in range(30):
        item = clips[step, 0]
        frame = [i for i in range(9) if torch.equal(item["pixels"][i:i + 1], item["reference"])]
        picked.update(frame)
        assert len(frame) == 1 and torch.equal(clips[step, 0]["reference"], item["reference"])
        assert torch.equal(first[step, 0]["reference"], item["pixels"][:1])
    assert len(picked) > 5


def test_pairs_serve_both_directions(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    record = {"image_0": "a.png", "image_1": "b.png", "description_0": "red one", "description_1": "blue one"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    pairs = data.ImagePairs(tmp_path, (16, 16))
    seen = {}
    for step in range(20):
        item = pairs[step, 0]
        seen[item["prompt"]] = item["pixels"][0, :, 0, 0].tolist(), item["reference"][0, :, 0, 0].tolist()
    assert seen == {"red one": ([255, 0, 0], [0, 0, 255]), "blue one": ([0, 0, 255], [255, 0, 0])}


def test_data_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of clips at"):
        data.Clips(tmp_path / "none", (16, 16), 9, 8)
    with pytest.raises(ValueError, match="no clips in"):
        data.Clips(tmp_path, (16, 16), 9, 8)
    with pytest.raises(ValueError, match="no image pairs in"):
        data.ImagePairs(tmp_path, (16, 16))
    write_clip(tmp_path / "a.mp4", [0] * 9, 8, caption="")
    with pytest.raises(FileNotFoundError, match="a.mp4 has no caption"):
        data.Clips(tmp_path, (16, 16), 9, 8)
