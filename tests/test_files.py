"""Files of users: damaged, of another kind, with marks, profiles and types that nobody expects. One clear line each."""
import io
import json
import os
import resource

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

import data
from common import media
from common.run import write

RED = Image.new("RGB", (64, 32), (255, 0, 0))


# ---- colours ---------------------------------------------------------------------------------------------------------

def exchanged():
    """An RGB profile that means green where others mean red: sRGB with these two exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


@pytest.mark.parametrize("name, mode, profile, wanted", [
    ("a.jpg", "RGB", exchanged(), [0, 255, 0]), ("a.png", "P", exchanged(), [0, 255, 0]),
    ("a.png", "RGBA", exchanged(), [127, 255, 127]), ("a.png", "L", exchanged(), [76, 76, 76]),
    ("a.png", "RGB", b"no profile", [255, 0, 0]), ("a.png", "RGB", exchanged()[:200], [255, 0, 0])])
def test_a_colour_profile_that_can_be_used_decides_what_colours_are(tmp_path, name, mode, profile, wanted):
    image = RED.convert(mode)
    if mode == "RGBA":
        image.putalpha(128)  # half of it over white
    image.save(tmp_path / name, icc_profile=profile)
    assert np.abs(np.asarray(media.load_image(tmp_path / name), int) - wanted).max() < 4


# ---- what cannot be read, what cannot be written ---------------------------------------------------------------------

def load_clip(path):
    return media.load_clip(path, 9, 8)


def save_video(path, n=1):
    media.save_video(path, [RED] * n, 8)


@pytest.mark.parametrize("act, name, message", [
    (media.load_image, "empty", "Save it as PNG or JPEG"), (media.load_image, "a.mp4", "of a video save one frame"),
    (media.load_image, "folder", "is a folder"), (media.load_image, "pipe", "a pipe"),
    (media.load_image, "none", "no picture at"), (load_clip, "empty", "cannot read the clip"),
    (load_clip, "a.png", "cannot read the clip"), (load_clip, "folder", "is a folder"),
    (media.load_image, "https://x.org/a.png", "download the picture first"), (load_clip, "none", "no clip at"),
    (media.read_text, "latin-1", "is not a UTF-8 text file"), (data.read_pairs, "cut", "line 1 is not the JSON"),
    (save_video, "none/a.mp4", "cannot write"), (save_video, "empty", "name it .mp4")])
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, act, name, message):
    for file, content in {"empty": b"", "latin-1": b"\xe9", "cut": b'{"image_0": ', "a.png": b"cut"}.items():
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
