"""Files of users: damaged, of another kind, with marks, profiles and types that nobody expects. One clear line each."""
from tests.shared import ROOT, write_clip

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms

from common import media
from common import latents
from common import jobs
import data
from common.run import read_json, write

RED = Image.new("RGB", (64, 32), (255, 0, 0))


def bytes_of(image, suffix="PNG", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def error_of(act, *args):
    """What it says, which must be one line and the same each time."""
    said = set()
    for _ in range(2):
        with pytest.raises((ValueError, OSError)) as error:
            act(*args)
        said.add(str(error.value))
    (line,) = said
    assert "\n" not in line and "0x" not in line
    return line


# ---- colours ---------------------------------------------------------------------------------------------------------

def exchanged():
    """An RGB profile that means green where others mean red: sRGB with these two exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_a_colour_profile_decides_what_colours_are(tmp_path, suffix):
    options = {"quality": 100, "lossless": True} if suffix == ".webp" else {}
    RED.save(tmp_path / f"a{suffix}", icc_profile=exchanged(), **options)
    assert np.abs(np.asarray(media.load_image(tmp_path / f"a{suffix}"), int) - [0, 255, 0]).max() < 4


@pytest.mark.parametrize("mode, wanted", [("RGBA", [127, 255, 127]), ("P", [0, 255, 0]), ("L", [76, 76, 76])])
def test_profiles_of_pictures_with_alpha_a_palette_or_greys(tmp_path, mode, wanted):
    image = RED.convert(mode)
    if mode == "RGBA":
        image.putalpha(128)  # half of it over white
    image.save(tmp_path / "a.png", icc_profile=exchanged())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = media.load_image(tmp_path / "a.png")
    assert np.abs(np.asarray(image, int) - wanted).max() < 3


def test_a_profile_of_colours_decides_what_greys_are(tmp_path):
    """sRGB with another curve: a picture of greys alone looks as its RGB copy does."""
    lighter = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lighter = lighter.replace(b"\x00\x02\x66\x66", b"\x00\x01\x00\x00")  # the exponent: 1 in place of 2.4
    seen = []
    for mode in ("L", "RGB"):
        Image.new("L", (6, 4), 100).convert(mode).save(tmp_path / "a.png", icc_profile=lighter)
        seen.append(media.load_image(tmp_path / "a.png").getpixel((0, 0)))
    assert seen[0] == seen[1] and min(seen[0]) > 130


def test_lab_colours_need_no_profile(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(RED, srgb, lab, outputMode="LAB")
    del image.info["icc_profile"]
    image.save(tmp_path / "a.tif")
    assert np.abs(np.asarray(media.load_image(tmp_path / "a.tif"), int) - [255, 0, 0]).max() < 8


def test_a_palette_with_shades_of_transparency_and_a_profile(tmp_path):
    RED.convert("P").save(tmp_path / "a.png", icc_profile=exchanged(), transparency=bytes([0] * 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert media.load_image(tmp_path / "a.png").getcolors() == [(64 * 32, (255, 255, 255))]


@pytest.mark.parametrize("profile", [b"no profile", exchanged()[:200], None])
def test_without_a_profile_that_can_be_used_a_picture_stays_as_it_is(tmp_path, profile):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8))
    picture.save(tmp_path / "a.png", **({"icc_profile": profile} if profile else {}))
    assert np.array_equal(media.load_image(tmp_path / "a.png"), picture)
    picture.convert("CMYK").save(tmp_path / "b.tif", icc_profile=exchanged())  # a profile of other pictures
    assert np.array_equal(media.load_image(tmp_path / "b.tif"), picture)


# ---- what is no picture, no clip, no text ----------------------------------------------------------------------------

@pytest.fixture
def odd(tmp_path):
    """A folder with a file of every kind that may stand where a picture or a clip is expected."""
    for name, content in {"empty": b"", "heic": b"\0\0\0\x18ftypheic" + bytes(99), "svg": b"<svg/>",
                          "pdf": b"%PDF-1.4"}.items():
        (tmp_path / name).write_bytes(content)
    write_clip(tmp_path / "video.mp4", [0] * 9, 8)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "cover.mp4"), "w") as container:  # a song's cover is no video
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt, stream.disposition = 64, 32, "rgb24", Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_image(RED)))
        container.mux(stream.encode())
    return tmp_path


@pytest.mark.parametrize("name, message", [
    ("empty", "Save it as PNG or JPEG"), ("heic", "Save it as PNG or JPEG"), ("svg", "Save it as PNG"),
    ("pdf", "Save it as PNG"), ("video.mp4", "of a video save one frame"), ("folder", "is a folder"),
    ("pipe", "a pipe"), ("none", "no picture at")])
def test_what_is_no_picture_is_named(odd, name, message):
    line = error_of(media.load_image, odd / name)
    assert message in line and str(odd / name) in line


@pytest.mark.parametrize("address", ["https://x.org/cat.png", Path("http://x.org/cat.png")])
def test_an_address_must_be_downloaded_first(address):
    assert "download the picture first" in error_of(media.load_image, address)


@pytest.mark.parametrize("name, message", [
    ("empty", "cannot read the clip"), ("audio.mp4", "has no video"), ("cover.mp4", "has no video"),
    ("folder", "is a folder"), ("pipe", "a pipe"), ("none", "no clip at")])
def test_what_is_no_clip_is_named(odd, name, message):
    line = error_of(media.load_clip, odd / name, 9, 8)
    assert message in line and str(odd / name) in line


def test_large_pictures_give_no_warning_and_huge_ones_one_line(tmp_path, monkeypatch):
    RED.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # it has 2048
    code = "import sys; from common import media; from PIL import Image; Image.MAX_IMAGE_PIXELS = 1500; media.load_image(sys.argv[1])"
    r = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, cwd=ROOT)
    assert (r.returncode, r.stderr) == (0, "")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "a.png: Image size (2048 pixels) exceeds" in error_of(media.load_image, tmp_path / "a.png")


# ---- text ------------------------------------------------------------------------------------------------------------

def test_texts_are_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "a.txt").write_text("une créature", encoding="utf-8")
    code = "import sys; from common import media; sys.stdout.buffer.write(media.read_text(sys.argv[1]).encode())"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    r = subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], capture_output=True, cwd=ROOT, env=env)
    assert r.stdout.decode() == "une créature", r.stderr


def test_the_mark_at_the_start_of_a_windows_file_is_no_text(tmp_path):
    for name in "ab":
        RED.save(tmp_path / f"{name}.png")
    pair = {"image_0": "a.png", "image_1": "b.png", "description_0": "left", "description_1": "right"}
    bench = {"a-0": {"img_paths": ["a.png"], "prompt": "a cat"}}
    for name, text in {"x.txt": "a caption", "pairs.jsonl": json.dumps(pair), "bench.json": json.dumps(bench)}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert media.read_text(tmp_path / "x.txt") == "a caption"
    assert data.ImagePairs(tmp_path, (16, 16))[0, 0]["prompt"] in ("left", "right")
    assert jobs.read_bench(tmp_path / "bench.json") == bench


def test_a_line_of_pairs_may_hold_unicode_line_ends(tmp_path):
    pair = {"image_0": "a", "image_1": "b", "description_0": "one\u2028two", "description_1": "x"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair, ensure_ascii=False), encoding="utf-8")
    assert data.read_pairs(tmp_path / "pairs.jsonl")[0]["description_0"] == "one\u2028two"


@pytest.mark.parametrize("caption", ["", " \n\t\n", "\ufeff"])
def test_a_clip_with_a_blank_caption_is_skipped_and_named(tmp_path, caption):
    for name in ("good", "blank"):
        write_clip(tmp_path / f"{name}.mp4", [80] * 9, 8, caption="a thing moves")
    (tmp_path / "blank.txt").write_text(caption, encoding="utf-8")
    clips = data.Clips(tmp_path, (16, 16), 9, 8)
    items = [clips[step, 0] for step in range(12)]
    assert {item["prompt"] for item in items} == {"a thing moves"}
    assert {why for item in items for why in item["skipped"]} == {f"the caption {tmp_path / 'blank.txt'} is empty"}


# ---- rows of pairs ---------------------------------------------------------------------------------------------------

def skipped_of(folder):
    """What 300 samples of these pairs say of those that cannot be used: each once, however often it was met."""
    pairs = data.ImagePairs(folder, (16, 16))
    return {why for step in range(300) for why in pairs[step, 0]["skipped"]}


def test_bad_rows_of_a_parquet_are_counted_once_and_named(tmp_path):
    good = {"image": {"bytes": bytes_of(RED), "path": "a.png"},
            "description": {"description_0": "left", "description_1": "right", "item": "cat"}}
    bad = {3: {"image": None}, 5: {"image": {"bytes": None, "path": "x.png"}}, 8: {"image": {"bytes": b"no picture"}},
           9: {"image": {"bytes": b""}}, 11: {"image": {"bytes": bytes_of(RED.resize((1, 40)))}},
           20: {"description": None}, 21: {"description": {"description_0": "left", "description_1": " \n"}},
           22: {"description": {"description_0": None, "description_1": "right"}}}
    rows = [{**good, **bad.get(i, {})} for i in range(24)]
    (tmp_path / "data").mkdir()  # where the hub's download puts it
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/a.parquet", row_group_size=4)
    skipped = skipped_of(tmp_path)
    places = {why.split(":")[0] for why in skipped}
    assert places == {f"row {i} of {tmp_path / 'data/a.parquet'}" for i in bad} and len(skipped) == len(bad)
    assert not any("0x" in why or "\n" in why for why in skipped)
    assert any("row 5 " in why and "bytes of its picture are missing" in why and "x.png" in why for why in skipped)


def test_bad_lines_of_pairs_are_counted_once_and_named(tmp_path):
    RED.save(tmp_path / "a.png")
    good = {"image_0": "a.png", "image_1": "a.png", "description_0": "left", "description_1": "right", "item": None}
    bad = [{"image_0": None}, {"image_1": 7}, {"image_0": ["a.png"]}, {"image_0": "none.png"}, {"image_1": "."},
           {"description_0": 5}, {"description_1": {}}, {"description_0": "  "}, {"item": 3}, {"item": ["cat"]},
           {"image_0": "https://x.org/a.png"}]
    lines = [json.dumps(good | change) for change in [{}, *bad, {}, {}, {}, {}]]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(lines))
    skipped = skipped_of(tmp_path)
    assert len(skipped) == len(bad)  # with an empty line between each two
    assert {why.split(":")[0] for why in skipped} == \
        {f"line {2 * i + 3} of {tmp_path / 'pairs.jsonl'}" for i in range(len(bad))}


@pytest.mark.parametrize("column, values, message", [
    ("image", [b"abc"], "the column image holds binary, expected a struct with bytes"),
    ("image", ["a.png"], "the column image holds string"), ("image", [None], "the column image holds null"),
    ("image", [[1, 2]], "the column image holds list"), ("image", [{"path": "a.png"}], "the column image holds struct"),
    ("description", ["a cat"], "description holds string, expected a struct with description_0, description_1"),
    ("description", [{"description_0": "a"}], "expected a struct with description_0, description_1"),
    (None, None, "lacks the Subjects200K column.s. description")])
def test_a_column_of_another_type_is_an_error_at_once(tmp_path, column, values, message):
    table = {"image": [{"bytes": b"abc", "path": ""}], "description": [{"description_0": "a", "description_1": "b"}]}
    if column:
        table[column] = values
    else:
        del table["description"]
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=f"a.parquet.*{message}") as error:
        data.ImagePairs(tmp_path, (16, 16))
    assert "\n" not in str(error.value)


# ---- what the cache knows a file by ----------------------------------------------------------------------------------

def test_a_file_of_the_same_size_with_other_content_is_another(tmp_path):
    file = tmp_path / "a"
    known = set()
    for start in (None, 0, 10**6, 3 * 10**6, 55 * 10**5):  # of 6 MB, 400 kB are changed from here on
        content = bytearray(6 * 10**6)
        if start is not None:
            content[start:start + 400_000] = b"x" * 400_000
        file.write_bytes(content)
        known.add(media.fingerprint(file))
    assert len(known) == 5


def test_a_longer_file_of_the_same_bytes_is_another(tmp_path):
    for name, size in (("a", 3 * 10**6), ("b", 4 * 10**6)):
        (tmp_path / name).write_bytes(bytes(size))
    assert media.fingerprint(tmp_path / "a") != media.fingerprint(tmp_path / "b")


def test_a_copy_is_the_same_file(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"content" * 1000)
        os.utime(tmp_path / name, (1, ord(name)))
    assert media.fingerprint(tmp_path / "a") == media.fingerprint(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]", "7", "\ufffe"])
def test_a_damaged_json_is_named(tmp_path, text):
    (tmp_path / "index.json").write_text(text, encoding="utf-8")
    assert "index.json is damaged" in error_of(read_json, tmp_path / "index.json")
    assert "index.json is damaged" in error_of(latents.Cache, tmp_path, {})


# ---- writing videos --------------------------------------------------------------------------------------------------

def test_a_kill_leaves_the_old_json(tmp_path, monkeypatch):
    def killed(*files):
        raise KeyboardInterrupt
    write(tmp_path / "a.json", "{}")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.json", '{"cut"')
    assert read_json(tmp_path / "a.json") == {}


@pytest.mark.parametrize("fps", [0, 0.0001, 1e9, -8, float("nan"), float("inf")])
def test_a_rate_that_no_file_can_hold_is_refused(tmp_path, fps):
    with pytest.raises(ValueError, match="fps must be from 0.01 to 1000"):
        media.save_video(tmp_path / "a.mp4", [RED], fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0.01, 23.976, 240, 1000])
def test_other_rates_are_written_as_asked(tmp_path, fps):
    media.save_video(tmp_path / "a.mp4", [RED] * 3, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)


def test_a_full_disk_leaves_the_old_video_and_no_cut_one(tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")
    media.save_video(tmp_path / "a.mp4", [RED], 8)
    before = (tmp_path / "a.mp4").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=f"cannot write {tmp_path / 'a.mp4'}: No space left on device") as error:
        media.save_video(tmp_path / "a.mp4", [RED] * 9, 8)
    assert error.value.errno == errno.ENOSPC
    assert [f.name for f in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before


def test_a_video_without_a_folder_or_an_ending_is_named(tmp_path):
    assert f"cannot write {tmp_path / 'none/a.mp4'}" in error_of(media.save_video, tmp_path / "none/a.mp4", [RED], 8)
    assert "name it .mp4" in error_of(media.save_video, tmp_path / "a", [RED], 8)
