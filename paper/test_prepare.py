"""The preparers against a hostile local server and against files of the real schemas; the cache against no cache."""
from tests.shared import BASE, TORCHRUN, run

import dataclasses
import email.utils
import http.server
import io
import json
import re
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import SafetensorError

from toy import creatures
from common import latents
import train
from data import Clips, ImagePairs
from common.media import load_clip, save_video
from common.latents import Cache
from paper import prepare
from common.run import records


# ---- Subjects200K ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Two parquet files of the real schema: 60 good pairs of 30 items, and one row for each reason to refuse."""
    folder = tmp_path_factory.mktemp("hub")
    creatures.write_pairs(folder, n=60)
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    (folder / "pairs.parquet").unlink()
    for i, row in enumerate(rows):
        row["description"]["item"] = f"item {i % 30}"
    bad = [json.loads(json.dumps({**row, "image": None}, default=str)) | {"image": row["image"]} for row in rows[:6]]
    bad[0]["quality_assessment"]["objectConsistency"] = 4
    bad[1]["description"]["description_1"] = None
    bad[2]["description"]["description_valid"] = False
    bad[3]["image"] = {"bytes": b"not a picture", "path": "x.png"}
    bad[4]["image"] = {"bytes": row_of_one_square(), "path": "y.png"}
    bad[5]["quality_assessment"] = None
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:40]), folder / "data/train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(bad + rows[40:]), folder / "data/train-00001.parquet")
    return folder


def row_of_one_square():
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


def items(folder):
    rows = (row for file in Path(folder).glob("*.parquet") for row in pq.read_table(file).to_pylist())
    return Counter(row["description"]["item"] for row in rows)


def test_subjects_are_filtered_and_split_by_subject(subjects, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "pairs")
    cfg = prepare.Subjects200K(out=out + "/", source=str(subjects), val=0.2)  # held out beside it, not inside
    prepare.prepare_subjects(cfg)
    kept, held_out = items(out), items(out + "_val")
    assert kept.total() + held_out.total() == 60 and held_out and not kept.keys() & held_out.keys()
    assert all(n == 2 for n in (kept + held_out).values())
    said = capsys.readouterr().out
    assert f"{kept.total()} pairs for training, {held_out.total()} held out" in said
    assert "66 pairs read, 62 of them with captions and all three scores at 5 or more" in said
    for part in ("2 for their score", "2 for their description", "1 for their unreadable", "1 for their layout"):
        assert part in said
    assert len(ImagePairs(out, (32, 32))) == kept.total() and ImagePairs(out, (32, 32))[0, 0]["prompt"]

    # A second run does nothing; a lost output is made again, and only that.
    worked = []
    filter_file = prepare.filter_file

    def note_file(file, *rest):
        worked.append(file.name)
        return filter_file(file, *rest)
    monkeypatch.setattr(prepare, "filter_file", note_file)
    prepare.prepare_subjects(cfg)
    assert worked == []
    next(Path(out).glob("*00001.parquet")).unlink()
    prepare.prepare_subjects(cfg)
    assert worked == ["train-00001.parquet"] and items(out) == kept
    with pytest.raises(ValueError, match="min_score was 5, now 0"):
        prepare.prepare_subjects(prepare.Subjects200K(out=out, source=str(subjects), val=0.2, min_score=0))


@pytest.mark.parametrize("column, value, left_out", [
    ("description", {"description_0": 5, "description_1": 6}, "unreadable"),
    ("description", {"description_0": "a", "description_1": "b", "item": 7}, "unreadable"),
    ("description", {"description_0": "a", "description_1": " ", "item": "x"}, "description"),
    ("description", {"description_0": "a", "description_1": "b", "category": [1]}, "unreadable"),
    ("quality_assessment", {"compositeStructure": "5", "objectConsistency": "5", "imageQuality": "5"}, "unreadable"),
    ("quality_assessment", 5, "unreadable"), ("quality_assessment", {"imageQuality": float("nan")}, "score"),
    ("image", {"bytes": None, "path": "x.png"}, "unreadable"), ("image", {"bytes": b"cut", "path": ""}, "unreadable")])
def test_rows_of_other_types_are_left_out_counted_and_named(subjects, tmp_path, capsys, column, value, left_out):
    row = pq.read_table(subjects / "data/train-00000.parquet").slice(0, 1).to_pylist()[0]
    pq.write_table(pa.Table.from_pylist([{**row, column: value}] * 2), tmp_path / "a.parquet")
    prepare.prepare_subjects(prepare.Subjects200K(out=str(tmp_path / "out"), source=str(tmp_path / "a.parquet")))
    said = capsys.readouterr()
    assert "0 pairs for training, 0 held out" in said.out and f"2 for their {left_out}" in said.out
    if left_out == "unreadable":
        assert f"row 0 of {tmp_path / 'a.parquet'}" in said.err and f"row 1 of {tmp_path / 'a.parquet'}" in said.err


@pytest.mark.parametrize("prepared, table, message", [
    (lambda source, out: prepare.prepare_subjects(prepare.Subjects200K(out=out, source=source)),
     {"image": [{"bytes": b""}], "description": ["a cat"]}, "a.parquet: the column description holds string"),
    (lambda source, out: prepare.prepare_pexels(prepare.Pexels(out=out, source=source)),
     {"video": ["http://x/y.mp4"], "title": [7]}, "a.parquet: the column title holds int64, expected texts"),
    (lambda source, out: prepare.prepare_pexels(prepare.Pexels(out=out, source=source)),
     {"video": [["http://x/y.mp4"]], "title": ["a"]}, "a.parquet: the column video holds list")])
def test_a_source_with_a_column_of_another_type_is_one_line(tmp_path, prepared, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message) as error:
        prepared(str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"options": [], "done": {}}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "prepare.json").write_text(content)
    with pytest.raises(ValueError, match="prepare.json is damaged") as error:
        prepare.Manifest(tmp_path, {})
    assert "\n" not in str(error.value)


def test_small_sets_stop_at_n(subjects, tmp_path):
    out = str(tmp_path / "pairs")
    prepare.prepare_subjects(prepare.Subjects200K(out=out, source=str(subjects), val=0.2, n=10))
    assert items(out).total() == 10 and not list(Path(out).glob("*00001*"))
    whole = str(tmp_path / "whole")
    cfg = prepare.Subjects200K(out=whole, source=str(subjects), val=0.2, n=45)
    prepare.prepare_subjects(cfg)
    assert items(whole).total() == 45
    next(Path(whole).glob("*00000*")).unlink()
    prepare.prepare_subjects(cfg)
    assert items(whole).total() == 45
    next(Path(whole).glob("*00000*")).write_bytes(b"cut")  # damaged: made again too
    prepare.prepare_subjects(cfg)
    assert items(whole).total() == 45


# ---- Pexels ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves /good*.mp4 and every way in which a link can disappoint. `hits` counts requests per path.

    Its port is another each time, and a clip's link decides whether it is held out: here the link without the port."""
    creatures.write_clips(tmp_path / "clips", n=1)
    clip, hits = (tmp_path / "clips/0000.mp4").read_bytes(), Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.strip("/").rstrip("0123456789").split(".")[0].rstrip("0123456789")
            hits[self.path] += 1
            if kind == "moved":
                self.send_response(302)
                self.send_header("Location", "/target.mp4")
                return self.end_headers()
            if kind in ("missing", "broken") or kind == "flaky" and hits[self.path] == 1:
                self.send_response(404 if kind == "missing" else 503)
                return self.end_headers()
            body = b"<html>come back later</html>" if kind == "page" else clip[:300] if kind == "corrupt" else clip
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if kind == "page" else "video/mp4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for byte in body if kind == "slow" else b"":
                time.sleep(0.05)
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    return  # the other side has had enough
            self.wfile.write(body[:len(body) // 2] if kind == "truncated" else body)

        def log_message(self, *_):
            pass
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    share, port = prepare.share, f":{httpd.server_port}"
    monkeypatch.setattr(prepare, "share", lambda text: share(text.replace(port, "")))
    yield f"http://127.0.0.1{port}", hits
    httpd.shutdown()


def listing(tmp_path, url, kinds, **more):
    rows = [{"thumbnail": "", "title": f"a thing {k}", "video": f"{url}/{k}", "duration": "PT00M12S", "view_count": 1,
             "sfw": True, **more} for k in kinds]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pexels.parquet")
    return str(tmp_path / "pexels.parquet")


def test_pexels_against_a_hostile_server(server, tmp_path, capsys, monkeypatch):
    url, hits = server
    download = prepare.download

    def limited(url, path, cfg, pace):  # only the slow link runs into the limit, however slow this machine is
        download(url, path, dataclasses.replace(cfg, max_seconds=1.0 if "/slow" in url else cfg.max_seconds), pace)
    monkeypatch.setattr(prepare, "download", limited)
    kinds = [f"good{i}.mp4" for i in range(6)] + ["moved1.mp4", "flaky1.mp4", "missing1.mp4", "missing2.mp4",
                                                  "truncated1.mp4", "slow1.mp4", "broken1.mp4", "page1.mp4",
                                                  "corrupt1.mp4"]
    source, out = listing(tmp_path, url, kinds), tmp_path / "pexels"
    cfg = prepare.Pexels(out=str(out), source=source, n=99, val=0, frames=9, fps=4.0, threads=4, tries=2)
    prepare.prepare_pexels(cfg)
    assert "8 of 99 clips kept; 1 filtered, 0 portrait, 2 dead links, 4 failed" in capsys.readouterr().out
    clips = Clips(out, (32, 32), 9, 4)
    assert len(clips) == 8 and clips[0, 0]["prompt"].startswith("a thing") and not list(out.glob("*.part"))
    why = {v[2].split("/")[-1]: v[:2] for v in json.loads((out / "prepare.json").read_text())["done"]["train"].values()}
    assert why["missing1.mp4"] == ["dead", "HTTP 404"] and "not done after" in why["slow1.mp4"][1]
    assert why["corrupt1.mp4"][0] == "filtered" and "web page" in why["page1.mp4"][1]
    assert why["truncated1.mp4"][0] == "failed" and "503" in why["broken1.mp4"][1]

    # The second run asks only for what may still come; a clip that was lost is fetched again, a caption written.
    hits.clear()
    lost, other, *_ = out.glob("*.mp4")
    lost.unlink()
    other.with_suffix(".txt").unlink()
    prepare.prepare_pexels(cfg)
    asked = {p.strip("/") for p in hits} - {"target.mp4"}
    assert asked >= {"truncated1.mp4", "slow1.mp4", "broken1.mp4", "page1.mp4"} and len(asked) == 5 and lost.is_file()
    assert "8 of 99 clips kept" in capsys.readouterr().out and len(Clips(out, (32, 32), 9, 4)) == 8


def test_old_failures_do_not_stop_a_new_run_and_a_bad_link_not_the_others(server, tmp_path, capsys):
    """What refused before and would again comes last and is not counted as a dead network; what is no URL is dead."""
    url, hits = server
    kinds = [f"broken{i}.mp4" for i in range(49)] + [f"good{i}.mp4" for i in range(4)]
    cfg = prepare.Pexels(out=str(tmp_path / "p"), source=listing(tmp_path, url, kinds), n=99, val=0, frames=9, fps=4.0,
                         threads=8, tries=1)
    prepare.prepare_pexels(cfg)
    rows = pq.read_table(listing(tmp_path, url, kinds + [f"broken{i}.mp4" for i in range(49, 65)])).to_pylist()
    prepare.prepare_pexels(cfg)  # more than 50 failures, one after the other
    capsys.readouterr()
    rows += [{**rows[0], "video": link} for link in ("http://[broken", "ftp://x/y.mp4", "nothing")]
    pq.write_table(pa.Table.from_pylist(rows), cfg.source)
    prepare.prepare_pexels(cfg)
    done = json.loads((tmp_path / "p/prepare.json").read_text())["done"]["train"].values()
    assert Counter(status for status, *_ in done)["failed"] > 50
    assert {link.split("/")[0] for status, _, link in done if status == "dead"} == {"http:", "ftp:", "nothing"}
    assert "3 dead links" in capsys.readouterr().out


def test_a_longer_list_never_moves_a_held_out_clip_into_training(server, tmp_path):
    url, hits = server
    cfg = prepare.Pexels(out=str(tmp_path / "p"), n=200, val=5, frames=9, fps=4.0, threads=8,
                         source=listing(tmp_path, url, [f"good{i}.mp4" for i in range(40)]))
    prepare.prepare_pexels(cfg)
    listing(tmp_path, url, [f"good{i}.mp4" for i in range(120)])
    prepare.prepare_pexels(cfg)
    def stems():
        return [{f.stem for f in (tmp_path / folder).glob("*.mp4")} for folder in ("p", "p_val")]
    before = stems()
    assert len(before[1]) == 5 and len(before[0]) > 40 and not before[0] & before[1]
    (tmp_path / "ids.txt").write_text(" ".join(f"good{i}" for i in range(120)))  # the held-out ones too
    prepare.prepare_pexels(dataclasses.replace(cfg, ids=str(tmp_path / "ids.txt")))
    assert stems()[1] == before[1] and not stems()[0] & before[1]


def test_without_network_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder nobody/nothing, and the download from the hub failed"):
        prepare.prepare_pexels(prepare.Pexels(out=str(tmp_path / "p"), source="nobody/nothing"))


def test_pexels_stops_at_n_and_holds_out(server, tmp_path, capsys):
    url, hits = server
    source = listing(tmp_path, url, [f"good{i}.mp4" for i in range(40)])
    cfg = prepare.Pexels(out=str(tmp_path / "p"), source=source, n=5, val=3, frames=9, fps=4.0, threads=8)
    prepare.prepare_pexels(cfg)
    clips = {side: {f.stem for f in (tmp_path / folder).glob("*.mp4")} for side, folder in (("t", "p"), ("v", "p_val"))}
    assert len(clips["t"]) == 5 and len(clips["v"]) == 3 and not clips["t"] & clips["v"] and hits.total() == 8
    prepare.prepare_pexels(prepare.Pexels(**{**vars(cfg), "n": 7}))
    assert hits.total() == 10 and clips["t"] < {f.stem for f in (tmp_path / "p").glob("*.mp4")}


def test_pexels_rows_that_are_not_fetched(server, tmp_path, capsys):
    url, hits = server
    source = listing(tmp_path, url, ["good1.mp4"], sfw=False)
    rows = pq.read_table(source).to_pylist()
    rows += [{**rows[0], "sfw": True, "duration": "PT00M01S"}, {**rows[0], "sfw": True, "title": " "}]
    pq.write_table(pa.Table.from_pylist(rows), source)
    prepare.prepare_pexels(prepare.Pexels(out=str(tmp_path / "p"), source=source, n=1, val=0))
    assert not hits
    said = capsys.readouterr().out
    assert all(part in said for part in ("1 not safe for work", "1 no title", "1 too short", "0 of 1 clips kept"))


@pytest.mark.parametrize("text, value", [(12, 12.0), ("PT1M7S", 67.0), ("PT00H00M15S", 15.0), ("0:12", 12.0),
                                         ("P0DT0H0M9.5S", 9.5), ("1:02:03", 3723.0), ("soon", None), (None, None)])
def test_durations(text, value):
    assert prepare.seconds(text) == value


@pytest.fixture
def shaped_server(tmp_path):
    """/NUMBER-wide.mp4 and /NUMBER-tall.mp4; a path with "busy" is answered 429 with a Retry-After of 1 s the first
    time, one with "forbidden" always 403. `times`: when each path was asked for."""
    for name, size in (("wide", (128, 72)), ("tall", (72, 128))):
        save_video(tmp_path / f"{name}.mp4", [Image.new("RGB", size, (9 * i, 80, 0)) for i in range(30)], 12)
    times = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = times.setdefault(self.path, [])
            asked.append(time.monotonic())
            busy = "busy" in self.path and len(asked) == 1
            if busy or "forbidden" in self.path:
                self.send_response(429 if busy else 403)
                if busy:
                    self.send_header("Retry-After", "1")
                return self.end_headers()
            body = (tmp_path / f"{'tall' if 'tall' in self.path else 'wide'}.mp4").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", times
    httpd.shutdown()


def test_pexels_end_to_end(shaped_server, tmp_path, capsys):
    """Titles with the suffix, portrait clips, 429 with Retry-After, 403, an ids file, clips at training size."""
    url, times = shaped_server
    kinds = ["1-wide.mp4", "2-wide.mp4", "3-tall.mp4", "4-busy-wide.mp4", "5-forbidden.mp4", "6-wide.mp4"]
    source = listing(tmp_path, url, kinds)
    rows = pq.read_table(source).to_pylist()
    suffixes = " · Free Stock Video", " · free stock video", "", " | Pexels · Free Stock Video", "", ""
    for row, suffix in zip(rows, suffixes):
        row["title"] += suffix
    pq.write_table(pa.Table.from_pylist(rows), source)
    (tmp_path / "ids.txt").write_text("1\n2-wide\n3\n4\n5\n77\n")
    cfg = prepare.Pexels(out=str(tmp_path / "p"), source=source, n=9, val=0, frames=9, fps=4.0, threads=4, tries=2,
                         ids=str(tmp_path / "ids.txt"), store="training")
    prepare.prepare_pexels(cfg)
    said = capsys.readouterr()
    assert "stripped from titles: 3 '· Free Stock Video', 1 '| Pexels'" in said.out
    assert "--ids: 5 of 6 are in the list" in said.out
    assert "3 of 9 clips kept; 0 filtered, 1 portrait, 0 dead links, 0 failed, 1 refused" in said.out
    # Two refusals of one moment give one line; either may be the first.
    assert re.search("answered HTTP (429, Retry-After 1|403, Retry-After not given): all downloads wait 1 s", said.err)
    assert "HTTP 403" in (tmp_path / "p/prepare.json").read_text()
    made = json.loads((tmp_path / "p/prepare.json").read_text())
    assert made["stripped"] == {"· Free Stock Video": 3, "| Pexels": 1}
    assert "/6-wide.mp4" not in times and times["/4-busy-wide.mp4"][1] - times["/4-busy-wide.mp4"][0] >= 1
    clips = list((tmp_path / "p").glob("*.mp4"))
    assert {f.with_suffix(".txt").read_text().strip() for f in clips} == \
        {"a thing 1-wide.mp4", "a thing 2-wide.mp4", "a thing 4-busy-wide.mp4"}
    for clip in clips:  # 9 frames at 4 fps of 30 at 12, never enlarged
        assert prepare.shape_of(clip) == (72, 128) and len(load_clip(clip, 9, 4.0)) == 9
        with pytest.raises(ValueError, match="too short: 9 frames"):
            load_clip(clip, 10, 4.0)
        levels = [np.asarray(f)[..., 0].mean() for f in load_clip(clip, 9, 4.0)]
        assert np.allclose(levels, [27 * k for k in range(9)], atol=6)  # every third frame: visually lossless
    with pytest.raises(ValueError, match="portrait was False, now True"):
        prepare.prepare_pexels(dataclasses.replace(cfg, portrait=True))
    prepare.prepare_pexels(dataclasses.replace(cfg, portrait=True, out=str(tmp_path / "q"), store="original"))
    assert "4 of 9 clips kept" in capsys.readouterr().out


@pytest.mark.parametrize("url, ids", [("https://x/video/123456/", {"123456"}),
                                      ("https://x/a/99-hd_1.mp4?x=1", {"99", "99-hd_1"})])
def test_video_ids(url, ids):
    assert prepare.video_ids(url) == ids


def test_pace_doubles_at_a_refusal_and_recovers(monkeypatch):
    """0.1, 0.2, 0.4, ... 30 s between two requests; all wait ten times that, or as long as the server says."""
    now = [0.0]
    monkeypatch.setattr(prepare.time, "monotonic", lambda: now[0])
    pace, refusal = prepare.Pace(), SimpleNamespace(status_code=429, headers={})
    intervals = []
    for _ in range(11):
        assert pace.refused(refusal) == "HTTP 429" and pace.until == pytest.approx(now[0] + 10 * pace.interval)
        pace.refused(refusal)  # another thread's, of the same moment
        intervals.append(pace.interval)
        now[0] = pace.until
    assert intervals == pytest.approx([min(0.1 * 2**k, 30) for k in range(11)])
    pace.refused(SimpleNamespace(status_code=503, headers={"Retry-After": "77"}))
    assert pace.until == now[0] + 77 and pace.interval == 30
    for _ in range(200):
        pace.came()
    assert pace.interval == 0


def test_clips_are_stored_at_training_size(tmp_path):
    save_video(tmp_path / "a.mp4", [Image.new("RGB", (1920, 1080), (20 * k, 0, 0)) for k in range(9)], 4.0)
    prepare.check_clip(tmp_path / "a.mp4", prepare.Pexels(frames=9, fps=4.0, store="training"))
    assert prepare.shape_of(tmp_path / "a.mp4") == (480, 854) and len(load_clip(tmp_path / "a.mp4", 9, 4.0)) == 9


@pytest.mark.parametrize("stored, degrees, shown", [((96, 64), 90, "portrait"), ((64, 96), 90, "landscape"),
                                                    ((64, 96), 0, "portrait"), ((96, 64), 180, "landscape")])
def test_portraits_are_what_a_player_shows_higher_than_wide(tmp_path, stored, degrees, shown):
    """A phone stores all its clips lying and says how to turn them."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = *stored, "yuv420p"
        if degrees:
            stream.set_display_rotation(degrees)
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", stored, "red"))))
        container.mux(stream.encode())
    upright = (64, 96) if shown == "landscape" else (96, 64)
    cfg = prepare.Pexels(frames=9, fps=8.0, store="training")
    if shown == "portrait":
        with pytest.raises(prepare.Portrait, match="portrait, 64x96"):
            prepare.check_clip(tmp_path / "a.mp4", cfg)
        cfg = dataclasses.replace(cfg, portrait=True)
    prepare.check_clip(tmp_path / "a.mp4", cfg)  # stored upright, with nothing left to turn
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).rotation == 0
        assert (container.streams.video[0].height, container.streams.video[0].width) == upright
    assert prepare.shape_of(tmp_path / "a.mp4") == upright


def test_a_clip_slower_than_the_rate_is_filtered(shaped_server, tmp_path, capsys):
    """The served clips have 12 pictures a second."""
    url, _ = shaped_server
    source = listing(tmp_path, url, ["1-wide.mp4"])
    cfg = prepare.Pexels(out=str(tmp_path / "p"), source=source, n=1, val=0, frames=9, fps=16.0)
    prepare.prepare_pexels(cfg)
    assert "0 of 1 clips kept; 1 filtered" in capsys.readouterr().out
    ((_, why, _),) = json.loads((tmp_path / "p/prepare.json").read_text())["done"]["train"].values()
    assert "1-wide.mp4 is too slow for 16 fps: it has 12 pictures a second" in why
    prepare.prepare_pexels(dataclasses.replace(cfg, fps=12.0, out=str(tmp_path / "q")))
    assert "1 of 1 clips kept" in capsys.readouterr().out


def test_retry_after():
    soon = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100))
    assert prepare.retry_after("7") == 7 and 90 < prepare.retry_after(soon) <= 100
    assert prepare.retry_after(None) is None and prepare.retry_after("later") is None
    assert prepare.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


# ---- the cache -------------------------------------------------------------------------------------------------------

def test_cached_training_has_the_same_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    creatures.write_pairs("pairs", n=20)
    creatures.write_clips("clips", n=4)
    Path("clips/9.mp4").write_bytes(b"not a clip")
    Path("clips/9.txt").write_text("nothing")
    knobs = {**train.TOY, "base": BASE, "cache": "", "images": "pairs", "videos": "clips", "image_batch": 4,
             "image_micro": 2, "video_batch": 4, "video_micro": 2, "p": 0.5, "steps": 6, "val_every": 0,
             "sample_every": 0}
    with pytest.raises(ValueError, match="--cls must be one of front, item, off, got 'itme'"):
        latents.Latents(cls="itme")
    cache = latents.Latents(out="cache", base=BASE, videos="clips", images="pairs", crop_jitter=0.0, prompts=True,
                            frames=9, fps=4.0, vae_tiling=False)
    latents.prepare_cache(cache)
    said = capsys.readouterr()
    assert "20 of 20 images cached" in said.out and "4 of 5 videos cached" in said.out and "9.mp4" in said.err
    train.train(train.Config(**{**knobs, "name": "plain"}))
    train.train(train.Config(**{**knobs, "name": "cached", "cache": "cache"}))

    def losses_of(name):
        return [record["loss"] for record in records(Path(f"out/{name}/log.jsonl"))]
    losses = [losses_of("plain"), losses_of("cached")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)

    flags = [f"--{k}={v}" for k, v in {**vars(cache), "out": "cache2"}.items() if v != ""]
    r = run(*TORCHRUN, "-m", "paper.prepare", "cache", *flags, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    train.train(train.Config(**{**knobs, "name": "two", "cache": "cache2"}))
    assert losses[0] == pytest.approx(losses_of("two"), rel=1e-5)  # two ranks made the cache

    made = {f: f.stat().st_mtime_ns for f in Path("cache").glob("**/*.safetensors")}
    next(iter(made)).unlink()
    latents.prepare_cache(cache)  # only what is missing
    again = {f: f.stat().st_mtime_ns for f in Path("cache").glob("**/*.safetensors")}
    assert made.keys() == again.keys() and sum(made[f] != again[f] for f in made) == 1
    for change, message in [(dict(width=24), "width was 32, now 24"), (dict(fps=8.0), "fps was 4.0, now 8.0"),
                            (dict(cls="off"), "cls was 'front', now 'off'"),
                            (dict(vae_tiling=True), "tiling was False, now True"),
                            (dict(cache="no"), "no cache at no")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(train.Config(**{**knobs, "name": "x", "cache": "cache", **change}))
    with pytest.raises(ValueError, match="choose another --out"):
        latents.prepare_cache(latents.Latents(**{**vars(cache), "fps": 8.0}))
    Path("clips/0000.txt").write_text("another caption")  # a changed source is noticed, a broken file too
    next(Path("cache/image").glob("**/*.safetensors")).write_bytes(b"cut")
    train.train(train.Config(**{**knobs, "name": "noticed", "cache": "cache", "steps": 8}))
    said = capsys.readouterr().err
    assert "was made from another 0000.mp4" in said and "paper.prepare cache again" in said
    before = {f: f.stat().st_mtime_ns for f in made}
    latents.prepare_cache(cache)  # both are made again, and nothing else
    assert sum(f.stat().st_mtime_ns != before[f] for f in made) == 2
    assert "4 of 5 videos cached" in capsys.readouterr().out
    train.train(train.Config(**{**knobs, "name": "mended", "cache": "cache", "steps": 8}))
    said = capsys.readouterr()
    assert "was made from" not in said.err and "cache holds 4 of 5 videos" in said.out
    assert "20 images; the others" not in said.out  # none is
    index = Path("cache/video/index.json")
    index.write_text(index.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(ValueError, match="not finished"):
        train.train(train.Config(**{**knobs, "name": "x", "cache": "cache"}))


def cache_of(folder, **more):
    return latents.Latents(**{"out": str(folder / "cache"), "base": BASE, "crop_jitter": 0.0, "frames": 9, "fps": 4.0,
                              "vae_tiling": False, **more})


def pairs_of(folder, *names):
    """A pairs.jsonl of these pictures, each with itself."""
    folder.mkdir(exist_ok=True)
    lines = [{"image_0": name, "image_1": name, "description_0": "a", "description_1": "b"} for name in names]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_the_cache_goes_on_past_what_cannot_be_read(tmp_path, capsys):
    pairs, clips = pairs_of(tmp_path / "pairs", "a.png", "none.png", "c.png", "a.png"), tmp_path / "clips"
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pairs/a.png")
    (tmp_path / "pairs/c.png").write_bytes(b"cut")
    creatures.write_clips(clips, n=4)
    (clips / "0000.txt").write_bytes("cr\u00e9ature".encode("latin-1"))
    (clips / "0001.mp4").unlink()
    (clips / "0001.mp4").symlink_to(clips / "nowhere.mp4")
    (clips / "0002.txt").write_text(" \n")
    latents.prepare_cache(cache_of(tmp_path, images=pairs, videos=str(clips)))
    said = capsys.readouterr()
    assert "2 of 4 images cached" in said.out and "1 of 4 videos cached" in said.out
    for named in ("line 2 of", "none.png", "line 3 of", "c.png", "0000.txt is not a UTF-8", "0001.mp4", "0002.txt is"):
        assert said.err.count(named) == 1, named


def test_a_picture_replaced_by_one_of_the_same_size_is_cached_again(tmp_path, capsys):
    pairs = pairs_of(tmp_path / "pairs", "a.bmp")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pairs/a.bmp")
    latents.prepare_cache(cache_of(tmp_path, images=pairs))
    (made,) = (tmp_path / "cache/image").glob("*.safetensors")
    before, size = made.read_bytes(), (tmp_path / "pairs/a.bmp").stat().st_size
    Image.new("RGB", (64, 64), "lime").save(tmp_path / "pairs/a.bmp")
    assert (tmp_path / "pairs/a.bmp").stat().st_size == size
    cache = Cache(tmp_path / "cache/image", {})
    with pytest.raises(ValueError, match="could not be used, .* was made from another 000000"):
        ImagePairs(pairs, (32, 32), cache=cache)[0, 0]
    latents.prepare_cache(cache_of(tmp_path, images=pairs))
    assert made.read_bytes() != before and ImagePairs(pairs, (32, 32), cache=cache)[0, 0]["skipped"] == []


@pytest.mark.parametrize("content", ["no json", "[]"])
def test_a_damaged_index_is_named(tmp_path, content):
    pairs = pairs_of(tmp_path / "pairs", "a.png")
    (tmp_path / "cache/image").mkdir(parents=True)
    (tmp_path / "cache/image/index.json").write_text(content)
    with pytest.raises(ValueError, match="image/index.json is damaged"):
        latents.prepare_cache(cache_of(tmp_path, images=pairs))


def test_a_full_disk_ends_the_cache_with_one_line(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"cut")
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(latents, "save_file", full)
    pairs = pairs_of(tmp_path / "pairs", "a.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pairs/a.png")
    with pytest.raises(OSError, match="cannot write .*000000.safetensors: .*No space left on device") as error:
        latents.prepare_cache(cache_of(tmp_path, images=pairs))
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").glob("**/*.tmp"))


def test_a_source_is_never_overwritten(tmp_path):
    creatures.write_pairs(tmp_path / "pairs", n=4)
    before = (tmp_path / "pairs/pairs.parquet").read_bytes()
    with pytest.raises(ValueError, match="pairs.parquet would be written over .*pairs.parquet, which is read"):
        prepare.prepare_subjects(prepare.Subjects200K(out=str(tmp_path / "pairs"), source=str(tmp_path / "pairs")))
    assert (tmp_path / "pairs/pairs.parquet").read_bytes() == before
