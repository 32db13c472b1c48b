"""The data sets: pictures, pairs and clips of every kind, and what is said about those that cannot be used."""
from tests.shared import write_clip

import gc
import json
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import media
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


@pytest.mark.parametrize("padding, view", [(65, (398, 398)), (66, (463, 496))])
def test_a_padding_of_an_eighth_of_the_height_is_none(padding, view):
    """Then 16 of the 528 pixels are cut from each side of either half."""
    sheet = Image.new("RGB", (2 * 528 - padding, 528))
    assert [image.size for image in data.split_views(sheet)] == [view, view]


def test_load_image_modes(tmp_path):
    def saved(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return np.asarray(media.load_image(tmp_path / name))
    deep = Image.fromarray(np.full((4, 6), 0x8080, np.uint16))
    assert saved(deep, "deep.png").tolist()[0][0] == [128, 128, 128]  # convert("RGB") alone would give 255
    below = Image.fromarray(np.full((4, 6), -50, np.float32))  # darker than black
    assert saved(below, "below.tif")[0, 0].tolist() == [0, 0, 0]
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
    cut = np.asarray(media.resize_center_crop(Image.fromarray(rows.copy()), 30, 60))
    assert cut.shape == (30, 60, 3) and cut[:, 0, 0].tolist() == list(range(35, 65))  # the middle, untouched
    blocks = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    big = blocks.resize((256, 256), Image.NEAREST)
    assert np.array_equal(media.resize_center_crop(big, 32, 32), blocks)  # whole-number shrinking is exact
    assert media.resize_center_crop(Image.new("RGB", (64, 33)), 16, 32).size == (32, 16)  # a whole number across alone
    a, b = (np.asarray(media.resize_center_crop(big, 32, 32, 0.2, np.random.default_rng(s))) for s in (0, 1))
    assert a.shape == b.shape == (32, 32, 3) and not np.array_equal(a, b)


def test_only_the_wanted_frame_becomes_a_picture(tmp_path, monkeypatch):
    """As with cached latents: the reference frame alone is converted and resized."""
    grey = [Image.new("RGB", (64, 64), (20 * k,) * 3) for k in range(9)]
    media.save_video(tmp_path / "a.mp4", grey, 8.0)
    calls, crop = [], media.resize_center_crop
    monkeypatch.setattr(media, "resize_center_crop", lambda *args: calls.append(1) or crop(*args))
    (frame,) = media.load_clip(tmp_path / "a.mp4", 9, 8, (16, 16), first=8)
    assert len(calls) == 1 and abs(np.asarray(frame).mean() - 160) < 6


def test_load_clip_picks_frames_by_time(tmp_path):
    write_clip(tmp_path / "a.mp4", range(0, 240, 8), 24)  # 30 frames at 24 fps; brightness 8n
    at8 = [np.asarray(f).mean() for f in media.load_clip(tmp_path / "a.mp4", 9, 8)]
    assert np.allclose(at8, [8 * 3 * k for k in range(9)], atol=3)
    at24 = [np.asarray(f).mean() for f in media.load_clip(tmp_path / "a.mp4", 17, 24)]
    assert np.allclose(at24, [8 * k for k in range(17)], atol=3)
    with pytest.raises(ValueError, match="too short: 10 frames at 8 fps, 17 asked"):
        media.load_clip(tmp_path / "a.mp4", 17, 8)


def write_frames(path, pictures, times=None, rate=8, clock=Fraction(1, 90000), before=None):
    """A clip of pictures that come up at these times (seconds). before(stream) sets what its file says of them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif" if path.suffix == ".gif" else "libx264", rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        stream.codec_context.time_base = clock
        if before:
            before(stream)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round((times[n] if times else n / rate) / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbered(n):
    """A picture that shows the number n < 256 as eight black or white bars."""
    bars = [255 * (n >> i & 1) for i in range(8)]
    return Image.fromarray(np.broadcast_to(np.repeat(bars, 8)[None, :, None], (16, 64, 3)).astype(np.uint8))


def number_in(picture):
    bars = np.asarray(picture.convert("L"), float).reshape(16, 8, 8).mean((0, 2))
    return sum(int(bar > 128) << i for i, bar in enumerate(bars))


PAUSES = {  # times at which the frames come up
    "a pause": [n / 30 for n in range(200) if n < 30 or n >= 90],
    "a still start": [0] + [2 + n / 10 for n in range(50)],
    "a still end": [n / 30 for n in range(90)] + [5.0, 6.5],
    "slow, then fast": [n / 10 for n in range(30)] + [3 + n / 50 for n in range(160)],
    "uneven": np.cumsum([(0.02, 0.03, 0.11, 0.09)[n * n % 7 % 4] for n in range(200)]).round(2).tolist()}


@pytest.mark.parametrize("suffix, clock", [(".mp4", 90000), (".mkv", 1000), (".gif", 100)])
@pytest.mark.parametrize("times", PAUSES.values(), ids=PAUSES)
def test_each_instant_shows_the_frame_that_is_on_screen(tmp_path, suffix, clock, times):
    """The newest frame whose time has come: not the next one, however long that takes."""
    path, times = tmp_path / f"a{suffix}", [time - times[0] for time in times]
    write_frames(path, [numbered(n) for n in range(len(times))], times, 30, Fraction(1, clock))
    shown = [number_in(picture) for picture in media.load_clip(path, 41, 8)]
    rounded = [round(time * clock) / clock for time in times]
    assert shown == [max(n for n, time in enumerate(rounded) if time <= k / 8) for k in range(41)]


def test_a_reference_of_a_still_start_is_the_frame_of_the_whole_clip(tmp_path):
    """It alone is decoded, where latents are cached: the frames up to it do not say how fast the clip is."""
    write_frames(tmp_path / "a.mp4", [numbered(n) for n in range(51)], PAUSES["a still start"], 30)
    whole = media.load_clip(tmp_path / "a.mp4", 41, 8)
    for i in (2, 20, 40):
        (reference,) = media.load_clip(tmp_path / "a.mp4", i + 1, 8, first=i)
        assert reference == whole[i]


@pytest.mark.parametrize("suffix, clock", [(".mp4", 90000), (".mkv", 1000), (".gif", 100)])
def test_the_last_frame_stays_for_its_own_duration(tmp_path, suffix, clock):
    write_frames(tmp_path / f"a{suffix}", [numbered(n) for n in range(9)], None, 10, Fraction(1, clock))
    assert [number_in(p) for p in media.load_clip(tmp_path / f"a{suffix}", 9, 10)] == list(range(9))
    with pytest.raises(ValueError, match="too short: 9 frames at 10 fps, 10 asked"):
        media.load_clip(tmp_path / f"a{suffix}", 10, 10)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(30)])
def test_a_steady_rate_is_exact_although_mkv_rounds_times_to_milliseconds(tmp_path, rate):
    write_frames(tmp_path / "a.mkv", [numbered(n) for n in range(49)], None, rate, 1 / rate)
    for fps in (float(rate), 10.0):
        count = int(48 / rate * Fraction(fps)) + 1
        shown = [number_in(picture) for picture in media.load_clip(tmp_path / "a.mkv", count, fps)]
        assert shown == [int(k / fps * float(rate) + 1e-6) for k in range(count)]


class Stream:
    """A video of a frame a second on average, with frames at these times and of this duration, in seconds."""
    average_rate, time_base = Fraction(1), Fraction(1, 1000)

    def __init__(self, *times, duration=1):
        self.frames = [SimpleNamespace(time=time, duration=duration, time_base=Fraction(1)) for time in times]
        self.container = self

    def decode(self, stream):
        return iter(self.frames)


def test_a_frame_that_comes_too_late_is_left_out():
    """Times 0, 2, 1, none: the third is late, the last comes a frame's time after the second."""
    stream = Stream(-5.0, -3.0, -4.0, None)
    first, second, _, last = stream.frames
    assert list(media.shown_frames(stream)) == [(first, 0.0, 2.0), (second, 2.0, 3.0), (last, 3.0, 4.0)]


def test_of_two_frames_with_one_time_the_second_stays():
    stream = Stream(0.0, 1.0, 1.0, 2.0)
    a, b, c, d = stream.frames
    assert list(media.shown_frames(stream)) == [(a, 0.0, 1.0), (b, 1.0, 1.0), (c, 1.0, 2.0), (d, 2.0, 3.0)]


def test_a_last_frame_of_four_seconds_stays_four_seconds():
    stream = Stream(0.0, 1.0, duration=4)
    assert [times for _, *times in media.shown_frames(stream)] == [[0.0, 1.0], [1.0, 5.0]]


def test_a_clip_slower_than_asked_is_refused_and_a_hair_slower_is_not(tmp_path):
    for name, rate in (("film", Fraction(24000, 1001)), ("tv", Fraction(30000, 1001)), ("slow", Fraction(8))):
        write_frames(tmp_path / f"{name}.mp4", [numbered(n) for n in range(40)], None, rate, 1 / rate)
    for name, fps in (("film", 24), ("tv", 30)):
        assert len(media.load_clip(tmp_path / f"{name}.mp4", 33, fps)) == 33
    for name, fps, rate in (("slow", 16, "8"), ("film", 30, "24"), ("tv", 1000, "30")):
        with pytest.raises(ValueError, match=f"{name}.mp4 is too slow for {fps} fps: it has {rate} pictures a second"):
            media.load_clip(tmp_path / f"{name}.mp4", 33, fps)
    uneven = [n / 10 for n in range(60)] + [6 + n / 100 for n in range(60)]  # most frames are slow, the average is not
    write_frames(tmp_path / "uneven.mp4", [numbered(n) for n in range(120)], uneven, 18)
    assert len(media.load_clip(tmp_path / "uneven.mp4", 65, 12)) == 65
    (tmp_path / "uneven.mp4").unlink()
    (tmp_path / "slow.txt").write_text("a thing moves")
    for name in ("film", "tv"):
        (tmp_path / f"{name}.txt").write_text("a thing moves")
    clips = data.Clips(tmp_path, (16, 16), 17, 20)
    skipped = {reason for step in range(12) for reason in clips[step, 0]["skipped"]}
    assert len(skipped) == 1 and "slow.mp4" in skipped.pop()


def test_clips_stored_for_training_say_which_rate_they_have(tmp_path):
    write_clip(tmp_path / "a.mp4", [0] * 9, 8)
    (tmp_path / "prepare.json").write_text(json.dumps({"options": {"store": "training", "fps": 8.0}, "done": {}}))
    assert len(data.Clips(tmp_path, (16, 16), 9, 8)) == 1
    with pytest.raises(ValueError, match="holds clips of 8 fps .*--store training.*: for --fps 16 prepare them again"):
        data.Clips(tmp_path, (16, 16), 9, 16)


def corners():
    """Red, green, blue and black quarters, 96x64."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48, 0] = picture[:32, 48:, 1] = picture[32:, :48, 2] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_clip_is_turned_and_mirrored_as_its_file_says(tmp_path, degrees, mirrored):
    def before(stream):
        stream.set_display_rotation(degrees, hflip=mirrored)
    write_frames(tmp_path / "a.mp4", [corners()] * 3, before=before if degrees or mirrored else None)
    wanted = corners().rotate(degrees, expand=True)
    wanted = ImageOps.mirror(wanted) if mirrored else wanted
    (shown,) = media.load_clip(tmp_path / "a.mp4", 1, 8)
    assert shown.size == wanted.size
    assert (np.abs(np.asarray(shown, int) - np.asarray(wanted)) > 60).mean() < 0.05
    assert media.load_clip(tmp_path / "a.mp4", 1, 8, (16, 32))[0].size == (32, 16)


def test_frames_leave_the_memory_at_once(tmp_path):
    """Without waiting for Python to look for circles: in a forked reader that would end in a deadlock of libswscale."""
    write_frames(tmp_path / "a.mp4", [corners()] * 3, before=lambda stream: stream.set_display_rotation(90))
    gc.collect()
    gc.disable()
    try:
        media.load_clip(tmp_path / "a.mp4", 2, 8)
        assert not [one for one in gc.get_objects() if type(one) is av.VideoFrame]
    finally:
        gc.enable()


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    def before(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
    write_frames(tmp_path / "a.mp4", [corners()] * 3, before=before)
    (shown,) = media.load_clip(tmp_path / "a.mp4", 1, 8)
    assert shown.size == (128, 64)  # 96 * 4 / 3
    assert shown.getpixel((60, 5))[0] > 150 and shown.getpixel((68, 5))[1] > 150


@pytest.mark.parametrize("aspect, width", [(Fraction(4), 384), (Fraction(5), 96), (Fraction(1, 4), 24),
                                           (Fraction(1, 5), 96)])
def test_pixels_more_than_four_times_as_wide_or_high_are_a_mistake(tmp_path, aspect, width):
    def before(stream):
        stream.codec_context.sample_aspect_ratio = aspect
    write_frames(tmp_path / "a.mp4", [corners()] * 3, before=before)
    assert media.load_clip(tmp_path / "a.mp4", 1, 8)[0].size == (width, 64)


@pytest.mark.parametrize("rows", [1080, 2160])
def test_shrinking_by_no_whole_number_is_plain_lanczos(rows):
    """A first shrink by boxes would cost detail: this noise would be 20 levels off, and a ninth flatter."""
    noise = Image.fromarray(np.random.default_rng(0).integers(90, 170, (rows, rows // 3, 3)).astype(np.uint8))
    plain = np.asarray(noise.resize((160, 480), Image.LANCZOS), int)
    assert np.abs(np.asarray(media.resize_center_crop(noise, 480, 160), int) - plain).max() <= 2


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_of_a_thin_strip_only_the_part_that_stays_is_resized(monkeypatch, size):
    """Resized whole it would be 480 times larger in both directions: 20 GB."""
    resize = Image.Image.resize

    def small(image, size, *args, **kwargs):
        assert size[0] * size[1] <= 480 * 720
        return resize(image, size, *args, **kwargs)
    monkeypatch.setattr(Image.Image, "resize", small)
    strip = Image.new("RGB", size, (9, 80, 200))
    assert media.resize_center_crop(strip, 480, 720).getcolors() == [(480 * 720, (9, 80, 200))]


@pytest.mark.parametrize("box, jitter", [((70, 101), 0.0), ((333, 97), 0.0), ((64, 64), 0.2)])
def test_the_cut_is_that_of_the_whole_picture_resized(box, jitter):
    noise = Image.fromarray(np.random.default_rng(1).integers(90, 170, (*box, 3)).astype(np.uint8))  # nothing clips
    r, again = np.random.default_rng(2), np.random.default_rng(2)
    cut = np.asarray(media.resize_center_crop(noise, 48, 72, jitter, r), int)
    zoom, (dy, dx) = 1 + jitter * again.random() if jitter else 1, jitter * (again.random(2) - 0.5)
    scale = max(48 / noise.height, 72 / noise.width) * zoom
    w, h = max(72, round(noise.width * scale)), max(48, round(noise.height * scale))
    left, top = (int(min(max((n - m) / 2 + d * n, 0), n - m)) for n, m, d in ((w, 72, dx), (h, 48, dy)))
    whole = noise.resize((w, h), Image.LANCZOS).crop((left, top, left + 72, top + 48))
    assert np.abs(cut - np.asarray(whole, int)).max() <= 2  # roundings between the two directions


def test_clip_frames():
    assert [media.clip_frames(n) for n in (1, 8, 9, 13, 16, 17, 49, 50)] == [1, 1, 9, 9, 9, 17, 49, 49]
    assert [media.clip_frames(n, 2) for n in (4, 5, 9, 12)] == [1, 5, 9, 9]


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


def test_clips_are_found_in_folders_of_folders_and_with_capital_endings(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("one.MP4", "a/two.Mov", "a/b/three.mp4"):
        write_clip(tmp_path / name, [0] * 9, 8)
    assert len(data.Clips(tmp_path, (16, 16), 9, 8)) == 3


def test_in_order_each_sample_comes_once(tmp_path):
    """Held-out batches: pair i in direction i % 2, clip i; random draws only stand in for what cannot be read."""
    lines = []
    for i in range(4):
        for view in (0, 1):
            Image.new("RGB", (32, 32), (50 * i, 100 * view, 0)).save(tmp_path / f"{i}-{view}.png")
        lines.append(json.dumps({"image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "description_0": f"{i} left",
                                 "description_1": f"{i} right"}))
        write_clip(tmp_path / f"{i}.mp4", [60 * i + 20] * 9, 8, caption=f"clip {i}")
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = data.ImagePairs(tmp_path, (16, 16), in_order=True)
    clips = data.Clips(tmp_path, (16, 16), 9, 8, in_order=True)
    assert [pairs[0, i]["prompt"] for i in range(5)] == ["0 left", "1 right", "2 left", "3 right", "0 left"]
    assert [pairs[0, i]["pixels"][0, :, 0, 0].tolist() for i in (1, 2)] == [[50, 100, 0], [100, 0, 0]]
    assert [clips[0, i]["prompt"] for i in range(5)] == ["clip 0", "clip 1", "clip 2", "clip 3", "clip 0"]
    assert not any(data[0, i]["skipped"] for data in (pairs, clips) for i in range(4))
    (tmp_path / "2-0.png").write_bytes(b"cut")
    (tmp_path / "2.mp4").write_bytes(b"cut")
    for samples, name in ((pairs, "2-0.png"), (clips, "2.mp4")):
        item = samples[0, 2]
        assert name in item["skipped"][0] and not item["prompt"].startswith(("2", "clip 2"))
