"""The data sets: pictures, pairs and clips of every kind, and what is said about those that cannot be used."""
import gc
import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

import data
from common.media import fingerprint, load_clip, load_image, read_text, save_video
from common.run import read_json, write
from tests.shared import small_disk

pairs_of, clips_of = partial(data.ImagePairs, size=(16, 16)), partial(data.Clips, size=(16, 16), frames=9, fps=8)
FILM, CLOCK = Fraction(24000, 1001), Fraction(1, 90000)
RED = Image.new("RGB", (64, 32), "red")
# sRGB with its red and its green exchanged: what the numbers call red looks green.
EXCHANGED = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXCHANGED = EXCHANGED.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")
PROFILE, TURNED = {"icc_profile": EXCHANGED}, Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees


# ---- pictures --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("picture, name, options, wanted", [
    (RED, "a.jpg", PROFILE, [0, 255, 0]), (RED.convert("P"), "a.png", PROFILE, [0, 255, 0]),
    (Image.new("RGBA", (64, 32), (255, 0, 0, 128)), "a.png", PROFILE, [127, 255, 127]),
    (RED, "a.png", {"icc_profile": EXCHANGED[:200]}, [255, 0, 0]), (RED.convert("CMYK"), "a.jpg", {}, [255, 0, 0]),
    (Image.fromarray(np.full((32, 64), 0x8080, np.uint16)), "deep.png", {}, [128] * 3),  # convert("RGB") would give 255
    (RED.convert("P"), "clear.png", {"transparency": RED.convert("P").getpixel((0, 0))}, [255] * 3),
    (Image.new("RGB", (32, 64)), "turned.jpg", {"exif": TURNED}, [0] * 3)])
def test_a_picture_is_rgb_on_white_and_upright_in_the_colours_of_its_profile(tmp_path, picture, name, options, wanted):
    picture.save(tmp_path / name, **options)
    assert np.abs(np.asarray(load_image(tmp_path / name), int) - np.full((32, 64, 3), wanted)).max() < 4


@pytest.mark.parametrize("padding, between, side", [(2, 2, 512), (16, 16, 512), (8, 16, 496)])  # 512: read off the size
def test_the_views_of_a_pair_lie_between_paddings(padding, between, side):
    sheet = Image.new("RGB", (1024 + 2 * padding + between, 512 + 2 * padding), "white")
    sheet.paste("red", (padding, padding, padding + 512, padding + 512))
    sheet.paste("blue", (padding + 512 + between, padding, padding + 1024 + between, padding + 512))
    red, blue = data.split_views(sheet)
    assert red.getcolors() == [(side**2, (255, 0, 0))] and blue.getcolors() == [(side**2, (0, 0, 255))]


def test_pairs_serve_both_directions(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (40, 30), name).save(tmp_path / f"{name}.png")
    pair = {"image_0": "red.png", "image_1": "blue.png", "description_0": "red one", "description_1": "blue one"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))

    def seen(item):
        return item["prompt"], *(tuple(item[k][0, :, 0, 0].tolist()) for k in ("target", "reference"))
    ways = [("red one", (255, 0, 0), (0, 0, 255)), ("blue one", (0, 0, 255), (255, 0, 0))]
    assert {seen(pairs_of(tmp_path)[step, 0]) for step in range(20)} == set(ways)
    assert [seen(pairs_of(tmp_path, in_order=True)[0, i]) for i in (0, 1)] == ways  # as for held-out batches


# ---- clips -----------------------------------------------------------------------------------------------------------

def write_frames(path, pictures, times, rate=8, degrees=0, mirrored=False, aspect=1):
    """A clip of pictures that come up at these times (seconds)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, pix_fmt="yuv420p", time_base=CLOCK)
        stream.width, stream.height = pictures[0].size
        stream.set_display_rotation(degrees, hflip=mirrored)
        stream.codec_context.sample_aspect_ratio = aspect
        for picture, time in zip(pictures, times):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = round(time / CLOCK), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def greys(n):
    return [Image.new("RGB", (64, 64), (4 * i,) * 3) for i in range(n)]  # of the brightness 0, 4, 8, ...


@pytest.mark.parametrize("name, fps, rate, times", [
    ("a-hair-too-slow.mp4", 24, FILM, [n / FILM for n in range(60)]),
    ("pause.mp4", 8, 30, [n / 30 for n in range(90) if n < 20 or n > 50]),
    ("slow-then-fast.mkv", 8, 30, [n / 10 for n in range(10)] + [1 + n / 30 for n in range(50)]),
    ("steady.mkv", float(FILM), FILM, [n / FILM for n in range(60)])])
def test_each_instant_shows_the_frame_that_is_on_screen(tmp_path, name, fps, rate, times):
    """The newest frame whose time has come, although mkv rounds times to milliseconds."""
    write_frames(tmp_path / name, greys(len(times)), times, rate)
    shown = [np.asarray(picture).mean() / 4 for picture in load_clip(tmp_path / name, 21, fps)]
    assert np.round(shown).tolist() == [max(n for n, t in enumerate(times) if t <= k / fps + 1e-6) for k in range(21)]
    (reference,) = load_clip(tmp_path / name, 16, fps, first=15)  # alone, as beside cached latents
    assert np.asarray(reference).mean() / 4 == shown[15]


@pytest.mark.parametrize("degrees, mirrored, aspect", [(90, False, 1), (0, True, 1), (270, True, Fraction(4, 3))])
def test_a_clip_is_turned_mirrored_and_stretched_as_its_file_says(tmp_path, degrees, mirrored, aspect):
    """... and its frames leave the memory at once. Python's search for circles would free them too late: in a forked
    reader that ends in a deadlock of libswscale."""
    ramp = Image.linear_gradient("L")
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp)).resize((96, 64))
    write_frames(tmp_path / "a.mp4", [picture], [0], 8, degrees, mirrored, aspect)
    wanted = picture.resize((round(96 * aspect), 64)).rotate(degrees, expand=True)
    wanted = ImageOps.mirror(wanted) if mirrored else wanted
    gc.collect()
    (shown,) = load_clip(tmp_path / "a.mp4", 1, 8)
    assert gc.collect() == 0 and np.abs(np.asarray(shown, int) - np.asarray(wanted)).max() < 20


def test_the_reference_is_a_random_frame_of_the_clip(tmp_path):
    save_video(tmp_path / "a.mp4", greys(9), 8)
    (tmp_path / "a.txt").write_text("a thing moves")
    items = [clips_of(tmp_path)[step, 0] for step in range(30)]
    picked = [[torch.equal(frame[None], item["reference"]) for frame in item["target"]] for item in items]
    assert np.sum(picked, 1).tolist() == [1] * 30 and np.any(picked, 0).sum() > 5


# ---- what cannot be read, what cannot be written ---------------------------------------------------------------------

def skipped_of(dataset):
    """What 300 samples could not use. Each is said in the same words every time, so it is here once."""
    return sorted({why for step in range(300) for why in dataset[step, 0]["skipped"]})


def test_a_clip_that_cannot_be_used_is_skipped_and_named(tmp_path):
    for name in ("good.mp4", "cut.MP4", "blank.mov"):
        save_video(tmp_path / name, greys(9), 8)
        (tmp_path / name).with_suffix(".txt").write_text("a thing moves")
    (tmp_path / "cut.MP4").write_bytes((tmp_path / "cut.MP4").read_bytes()[:700])
    (tmp_path / "blank.txt").write_text("\ufeff \n", encoding="utf-8")
    cut, blank = skipped_of(clips_of(tmp_path))
    assert f"cannot read the clip {tmp_path}/cut.MP4" in cut and blank == f"the caption {tmp_path}/blank.txt is empty"


def test_bad_rows_of_a_parquet_and_bad_lines_of_pairs_are_skipped_and_named(tmp_path):
    RED.save(tmp_path / "a.png")
    texts = {"description_0": "left\u2028side", "description_1": "right", "item": "cat"}  # json ends no line there
    line = texts | {"image_0": "a.png", "image_1": "a.png"}
    lines = [line | bad for bad in ({"description_0": None}, {"item": 3}, {"image_0": 7}, {"image_1": "b.png"}, {}, {})]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)  # with an empty line between each two
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8-sig")  # sig: with Windows' mark at the start
    row = {"image": {"bytes": (tmp_path / "a.png").read_bytes()}, "description": texts}
    rows = [row | bad for bad in ({"image": None}, {"image": {"bytes": b"no picture"}}, {"description": None},
                                  {"description": texts | {"description_1": " \n"}}, {}, {}, {})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    places = [why.split(": ")[0] for why in skipped_of(pairs_of(tmp_path))]
    assert places == [f"line {i} of {tmp_path}/pairs.jsonl" for i in (1, 3, 5, 7)] + [
        f"row {i} of {tmp_path}/a.parquet" for i in range(4)]


@pytest.mark.parametrize("act, name, message", [
    (load_image, "empty", "Save it as PNG or JPEG"), (load_image, "a.mp4", "of a video save one frame"),
    (load_image, "none", "no picture at"), (load_image, "https://x.org/a.png", "download the picture first"),
    (partial(load_clip, frames=9, fps=8), "a.mp4", "too short: 3 frames at 8 fps, 9 asked"),
    (partial(load_clip, frames=3, fps=9), "a.mp4", "too slow for 9 fps: it has 8 pictures a second"),
    (read_text, "latin-1", "is not a UTF-8 text file"), (read_text, "folder", "is a folder"),
    (read_json, "empty", "is damaged, it is not JSON"), (clips_of, "none", "no folder of clips at"),
    (partial(save_video, pictures=[RED], fps=8), "none/a.mp4", "cannot write"), (clips_of, ".", "a.mp4 has no caption"),
    (partial(save_video, pictures=[RED], fps=8), "empty", "name it .mp4"), (pairs_of, "folder", "no image pairs in"),
    (lambda folder: clips_of(folder)[0, 0], "folder", "20 video samples in a row could not be used")])
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, monkeypatch, act, name, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for file, text in {"empty": "", "latin-1": "\xe9", "folder/a.mp4": "", "folder/a.txt": "a"}.items():
        Path(file).write_text(text, encoding="latin-1")
    save_video("a.mp4", 3 * [RED], 8)
    with pytest.raises((ValueError, OSError), match=f"^.*{message}.*$") as error:
        act(name)
    assert name in str(error.value) and "0x" not in str(error.value)


@pytest.mark.parametrize("save, content", [(partial(save_video, fps=8), [RED]), (write, "{}")], ids=["video", "text"])
def test_a_full_disk_leaves_the_old_file(tmp_path, save, content):
    save(tmp_path / "a.mp4", content)
    before = (tmp_path / "a.mp4").read_bytes()
    with small_disk(100), pytest.raises(OSError):
        save(tmp_path / "a.mp4", 99 * content)
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_the_cache_knows_a_file_by_its_size_and_by_any_large_part_of_it(tmp_path):
    content, known = bytes(6 * 10**6), []
    changed = [content[:start] + b"x" * 400_000 + content[start + 400_000:] for start in (0, 10**6, 55 * 10**5)]
    for i, new in enumerate([content, *changed, content[1:], content]):
        (tmp_path / str(i)).write_bytes(new)
        known.append(fingerprint(tmp_path / str(i)))
    assert len(set(known)) == 5 and known[-1] == known[0]
