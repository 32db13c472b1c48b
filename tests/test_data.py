"""The data sets: pictures, pairs and clips of every kind, damaged, with marks, profiles and types that nobody expects,
and what is said about those that cannot be used."""
import gc
import io
import json
import os
import resource
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

import data
from common import media
from common.run import write

pairs_of, clips_of = partial(data.ImagePairs, size=(16, 16)), partial(data.Clips, size=(16, 16), frames=9, fps=8)
FILM = Fraction(24000, 1001)
RED = Image.new("RGB", (64, 32), (255, 0, 0))
# sRGB with its red and its green exchanged: what the numbers call red looks green.
EXCHANGED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXCHANGED = EXCHANGED.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
PROFILE, TURNED = {"icc_profile": EXCHANGED}, Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees


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
    (pairs_of, ["a.mp4"], "no image pairs in"), (clips_of, [], "no clips in"), (clips_of, ["a.mp4"], "has no caption")])
def test_a_folder_that_holds_no_data_for_this_run_is_named(tmp_path, data_of, files, message):
    for name in files:
        (tmp_path / name).write_text("no clip")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data_of(tmp_path)


@pytest.mark.parametrize("picture, name, options, wanted", [
    (RED, "a.jpg", PROFILE, [0, 255, 0]), (RED.convert("P"), "a.png", PROFILE, [0, 255, 0]),
    (Image.new("RGBA", (64, 32), (255, 0, 0, 128)), "a.png", PROFILE, [127, 255, 127]),
    (RED.convert("L"), "a.png", PROFILE, [76, 76, 76]), (RED, "a.png", {"icc_profile": b"no profile"}, [255, 0, 0]),
    (RED, "a.png", {"icc_profile": EXCHANGED[:200]}, [255, 0, 0]), (RED.convert("CMYK"), "a.jpg", {}, [255, 0, 0]),
    (Image.fromarray(np.full((32, 64), 0x8080, np.uint16)), "deep.png", {}, [128] * 3),  # convert("RGB") would give 255
    (Image.fromarray(np.full((32, 64), -50, np.float32)), "below.tif", {}, [0] * 3),  # darker than black
    (RED.convert("P"), "clear.png", {"transparency": RED.convert("P").getpixel((0, 0))}, [255] * 3),
    (Image.new("RGB", (32, 64)), "turned.jpg", {"exif": TURNED}, [0] * 3)])
def test_a_picture_is_rgb_on_white_and_upright_in_the_colours_of_its_profile(tmp_path, picture, name, options, wanted):
    picture.save(tmp_path / name, **options)
    assert np.abs(np.asarray(media.load_image(tmp_path / name), int) - np.full((32, 64, 3), wanted)).max() < 4


# ---- what cannot be read, what cannot be written ---------------------------------------------------------------------

def load_clip(path):
    return media.load_clip(path, 9, 8)


def save_video(path, n=1):
    media.save_video(path, [RED] * n, 8)


@pytest.mark.parametrize("act, name, message", [
    (media.load_image, "empty", "Save it as PNG or JPEG"), (media.load_image, "a.mp4", "of a video save one frame"),
    (media.load_image, "folder", "is a folder"), (media.load_image, "pipe", "a pipe"),
    (media.load_image, "none", "no picture at"), (load_clip, "empty", "cannot read the clip"),
    (load_clip, "a.mp4", "too short: 1 frames at 8 fps, 9 asked"), (load_clip, "folder", "is a folder"),
    (media.load_image, "https://x.org/a.png", "download the picture first"), (load_clip, "none", "no clip at"),
    (media.read_text, "latin-1", "is not a UTF-8 text file"), (data.read_pairs, "cut", "line 1 is not the JSON"),
    (save_video, "none/a.mp4", "cannot write"), (save_video, "empty", "name it .mp4")])
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, act, name, message):
    for file, content in {"empty": b"", "latin-1": b"\xe9", "cut": b'{"image_0": '}.items():
        (tmp_path / file).write_bytes(content)
    save_video(tmp_path / "a.mp4")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = name if "://" in name else tmp_path / name
    with pytest.raises((ValueError, OSError)) as error:
        act(path)
    line = str(error.value)
    assert message in line and str(path) in line and "\n" not in line and "0x" not in line


@pytest.mark.parametrize("save", [save_video, lambda path, n: write(path, "{}" * n)], ids=["video", "json"])
def test_a_full_disk_leaves_the_old_file(tmp_path, save):
    save(tmp_path / "a.mp4", 1)
    before, limits = (tmp_path / "a.mp4").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a file cannot grow beyond 100 bytes
    try:
        with pytest.raises(OSError):
            save(tmp_path / "a.mp4", 99)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_rate_is_written_as_asked_or_refused(tmp_path):
    for fps in (0.01, 23.976, 1000):
        media.save_video(tmp_path / "a.mp4", [RED] * 3, fps)
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)
    for fps in (0, 1e9, -8, float("nan")):
        with pytest.raises(ValueError, match="fps must be from 0.01 to 1000"):
            media.save_video(tmp_path / "a.mp4", [RED], fps)


def test_the_cache_knows_a_file_by_its_size_and_by_any_large_part_of_it(tmp_path):
    content = bytes(6 * 10**6)
    changed = [content[:start] + b"x" * 400_000 + content[start + 400_000:] for start in (0, 10**6, 55 * 10**5)]
    files = [tmp_path / str(i) for i in range(6)]
    for file, new in zip(files, [content, *changed, content[1:], content]):
        file.write_bytes(new)
    *known, copy = map(media.fingerprint, files)
    assert len(set(known)) == 5 and copy == known[0]


# ---- rows of pairs ---------------------------------------------------------------------------------------------------

GOOD = {"description_0": "left\u2028side", "description_1": "right", "item": "cat"}  # a line end that is not JSON's
BAD = [{"description_0": None}, {"description_1": " \n"}, {"item": 3}]


def skipped_of(folder):
    """Where the pairs stand that 300 samples could not use, each once, however often it was met."""
    pairs = data.ImagePairs(folder, (16, 16))
    said = {why for step in range(300) for why in pairs[step, 0]["skipped"]}
    assert not any("0x" in why or "\n" in why for why in said)
    return sorted(why.split(":")[0] for why in said)


def test_bad_rows_of_a_parquet_are_skipped_and_named(tmp_path):
    png, strip = io.BytesIO(), io.BytesIO()
    RED.save(png, "PNG")
    RED.resize((1, 40)).save(strip, "PNG")
    good = {"image": {"bytes": png.getvalue(), "path": "a.png"}, "description": GOOD}
    contents = [None, b"", b"no picture", strip.getvalue()]
    bad = [{"image": None}, *({"image": {"bytes": content, "path": "x.png"}} for content in contents),
           {"description": None}, *({"description": GOOD | text} for text in BAD[:2])]
    (tmp_path / "data").mkdir()  # where the hub's download puts it
    file = tmp_path / "data/a.parquet"
    pq.write_table(pa.Table.from_pylist([good | row for row in [{}, *bad, {}, {}, {}]]), file, row_group_size=4)
    assert skipped_of(tmp_path) == [f"row {i} of {file}" for i in range(1, 9)]


def test_bad_lines_of_pairs_are_skipped_and_named(tmp_path):
    RED.save(tmp_path / "a.png")
    bad = [*BAD, {"image_0": None}, {"image_1": 7}, {"image_0": "none.png"}, {"image_1": "."}, {"description_1": {}}]
    pairs = [{"image_0": "a.png", "image_1": "a.png"} | GOOD | change for change in [*bad, {}, {}, {}, {}]]
    lines = "\n\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)  # with an empty line between each two
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8-sig")  # sig: with Windows' mark at the start
    assert skipped_of(tmp_path) == sorted(f"line {i} of {tmp_path / 'pairs.jsonl'}" for i in range(1, 17, 2))
