"""The data sets: pictures, pairs and clips of every kind, and what is said about those that cannot be used."""
import gc
import json
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import data
from common import media

pairs_of, clips_of = partial(data.ImagePairs, size=(16, 16)), partial(data.Clips, size=(16, 16), frames=9, fps=8)
FILM = Fraction(24000, 1001)


@pytest.mark.parametrize("padding, between, side", [(2, 2, 512), (16, 16, 512), (8, 16, 496)])  # 512: read off the size
def test_the_views_of_a_pair_lie_between_paddings(padding, between, side):
    sheet = Image.new("RGB", (1024 + 2 * padding + between, 512 + 2 * padding), "white")
    sheet.paste("red", (padding, padding, padding + 512, padding + 512))
    sheet.paste("blue", (padding + 512 + between, padding, padding + 1024 + between, padding + 512))
    red, blue = data.split_views(sheet)
    assert red.getcolors() == [(side**2, (255, 0, 0))] and blue.getcolors() == [(side**2, (0, 0, 255))]


def test_a_picture_is_cut_in_the_middle_and_shrunk_exactly_by_whole_numbers_else_by_lanczos():
    noise = Image.fromarray(np.random.default_rng(0).integers(90, 170, (1080, 72, 3)).astype(np.uint8))
    assert np.array_equal(media.resize_center_crop(noise, 30, 72), np.asarray(noise)[525:555])
    assert np.array_equal(media.resize_center_crop(noise.resize((288, 4320), Image.NEAREST), 1080, 72), noise)
    plain = np.asarray(noise.resize((32, 480), Image.LANCZOS), int)
    assert np.abs(np.asarray(media.resize_center_crop(noise, 480, 32), int) - plain).max() <= 2


# ---- clips -----------------------------------------------------------------------------------------------------------

def write_frames(path, pictures, times, rate=8, before=lambda stream: None):
    """A clip of pictures that come up at these times (seconds). before(stream) sets what its file says of them."""
    clock = Fraction(1, 1000 if path.suffix == ".mkv" else 90000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", clock
        before(stream)
        for picture, time in zip(pictures, times):
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def greys(n):
    """Pictures of the brightness 0, 4, 8, ..."""
    return [Image.new("RGB", (64, 64), (4 * i,) * 3) for i in range(n)]


@pytest.mark.parametrize("name, fps, rate, times", [
    ("pause.mp4", 8, 30, [n / 30 for n in range(90) if n < 20 or n > 50]),
    ("still-start.mp4", 8, 30, [0] + [1 + n / 10 for n in range(50)]),
    ("slow-then-fast.mkv", 8, 30, [n / 10 for n in range(10)] + [1 + n / 30 for n in range(50)]),
    ("steady.mkv", float(FILM), FILM, [n / FILM for n in range(60)]),
    ("slower.mkv", 10, FILM, [n / FILM for n in range(60)])])
def test_each_instant_shows_the_frame_that_is_on_screen(tmp_path, name, fps, rate, times):
    """The newest frame whose time has come, although mkv rounds times to milliseconds."""
    write_frames(tmp_path / name, greys(len(times)), times, rate)
    shown = [np.asarray(picture).mean() / 4 for picture in media.load_clip(tmp_path / name, 21, fps)]
    assert np.round(shown).tolist() == [max(n for n, t in enumerate(times) if t <= k / fps + 1e-6) for k in range(21)]
    for k in (2, 15):  # alone, as beside cached latents
        (reference,) = media.load_clip(tmp_path / name, k + 1, fps, first=k)
        assert np.asarray(reference).mean() / 4 == shown[k]


def test_a_clip_that_is_too_slow_is_refused_and_a_hair_slower_is_not(tmp_path):
    write_frames(tmp_path / "a.mp4", greys(40), [n / FILM for n in range(40)], FILM)
    assert len(media.load_clip(tmp_path / "a.mp4", 40, 24)) == 40
    with pytest.raises(ValueError, match="a.mp4 is too slow for 30 fps: it has 24 pictures a second"):
        media.load_clip(tmp_path / "a.mp4", 33, 30)


@pytest.mark.parametrize("degrees, mirrored, aspect", [
    (0, True, 1), (90, False, 1), (180, False, 1), (270, True, 1), (0, False, Fraction(4, 3))])
def test_a_clip_is_turned_mirrored_and_stretched_as_its_file_says(tmp_path, degrees, mirrored, aspect):
    """... and its frames leave the memory at once. Python's search for circles would free them too late: in a forked
    reader that ends in a deadlock of libswscale."""
    def before(stream):
        stream.set_display_rotation(degrees, hflip=mirrored)
        stream.codec_context.sample_aspect_ratio = aspect
    corners = Image.new("RGB", (96, 64))
    for colour, place in (("red", (0, 0)), ("lime", (48, 0)), ("blue", (0, 32))):
        corners.paste(colour, (*place, place[0] + 48, place[1] + 32))
    write_frames(tmp_path / "a.mp4", [corners], [0], 8, before)
    wanted = corners.resize((round(96 * aspect), 64)).rotate(degrees, expand=True)
    wanted = ImageOps.mirror(wanted) if mirrored else wanted
    gc.collect()
    gc.disable()
    (shown,) = media.load_clip(tmp_path / "a.mp4", 1, 8)
    left = [one for one in gc.get_objects() if type(one) is av.VideoFrame]
    gc.enable()
    assert shown.size == wanted.size and not left
    assert (np.abs(np.asarray(shown, int) - np.asarray(wanted)) > 60).mean() < 0.05


def test_the_vae_takes_lengths_of_8k_plus_1():
    assert [media.clip_frames(n) for n in (1, 8, 9, 13, 16, 17, 49, 50)] == [1, 1, 9, 9, 9, 17, 49, 49]


# ---- samples ---------------------------------------------------------------------------------------------------------

def test_the_reference_is_a_random_frame_of_the_clip_and_the_same_each_time(tmp_path):
    media.save_video(tmp_path / "a.mp4", greys(9), 8)
    (tmp_path / "a.txt").write_text("a thing moves")
    items = [clips_of(tmp_path)[step, 0] for step in range(30)]
    picked = [[torch.equal(frame[None], item["reference"]) for frame in item["target"]] for item in items]
    assert np.sum(picked, 1).tolist() == [1] * 30 and np.any(picked, 0).sum() > 5
    assert torch.equal(clips_of(tmp_path)[29, 0]["reference"], items[29]["reference"])
    assert torch.equal(clips_of(tmp_path, random_frame=False)[29, 0]["reference"], items[29]["target"][:1])


def test_pairs_serve_both_directions(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    pair = {"image_0": "a.png", "image_1": "b.png", "description_0": "red one", "description_1": "blue one"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))

    def seen(item):
        return item["prompt"], *(tuple(item[k][0, :, 0, 0].tolist()) for k in ("target", "reference"))
    ways = [("red one", (255, 0, 0), (0, 0, 255)), ("blue one", (0, 0, 255), (255, 0, 0))]
    assert {seen(pairs_of(tmp_path)[step, 0]) for step in range(20)} == set(ways)
    assert [seen(pairs_of(tmp_path, in_order=True)[0, i]) for i in (0, 1)] == ways  # as for held-out batches


def test_a_clip_that_cannot_be_used_is_skipped_and_named(tmp_path):
    folder = tmp_path / "a/b"  # folders of folders are looked through
    folder.mkdir(parents=True)
    for name in ("good.mp4", "cut.MP4", "blank.Mov"):
        media.save_video(folder / name, greys(9), 8)
        (folder / name).with_suffix(".txt").write_text("a thing moves")
    (folder / "cut.MP4").write_bytes((folder / "cut.MP4").read_bytes()[:700])
    (folder / "blank.txt").write_text("\ufeff \n", encoding="utf-8")
    items = [clips_of(tmp_path, in_order=True)[0, i] for i in range(3)]  # others stand in for two of them
    cut, blank = sorted({why for item in items for why in item["skipped"]})
    assert str(folder / "cut.MP4") in cut and blank == f"the caption {folder / 'blank.txt'} is empty"
    (folder / "good.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match="20 video samples in a row"):
        clips_of(tmp_path)[0, 0]


@pytest.mark.parametrize("data_of, files, message", [
    (pairs_of, ["a.mp4"], "no image pairs in"), (clips_of, [], "no clips in"), (clips_of, ["a.mp4"], "has no caption"),
    (clips_of, ["a.mp4", "a.txt", "prepare.json"], "holds clips of 4 fps .*: for --fps 8 prepare them again")])
def test_a_folder_that_holds_no_data_for_this_run_is_named(tmp_path, data_of, files, message):
    for name in files:
        (tmp_path / name).write_text(json.dumps({"options": {"store": "training", "fps": 4.0}}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data_of(tmp_path)
