"""The preparers against a hostile local server and against files of the real schemas; the cache against no cache."""
from tests.shared import BASE, ROOT, TORCHRUN, log_of, run, start

import http.server
import json
import signal
import threading
import time
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from toy import creatures
import train
from data import Clips, ImagePairs
from common.args import command_line
from common.latents import Cache, Latents, prepare_cache
from common.media import save_video
from paper import prepare
from paper.prepare import Pexels, Subjects200K, prepare_pexels, prepare_subjects


# ---- Subjects200K ----------------------------------------------------------------------------------------------------

def items(folder):
    rows = (row for file in Path(folder).glob("*.parquet") for row in pq.read_table(file).to_pylist())
    return Counter(row["description"]["item"] for row in rows)


def test_subjects_are_filtered_split_by_subject_and_never_made_twice(tmp_path, capsys):
    """Of two files of the real schema: 60 good pairs of 30 items, and one row for each reason to leave it out."""
    hub = tmp_path / "hub"
    creatures.write_pairs(hub, n=60)
    rows = pq.read_table(hub / "pairs.parquet").to_pylist()
    for i, row in enumerate(rows):
        row["description"]["item"] = f"item {i % 30}"
    square = {"bytes": (ROOT / "toy/refs/creature-0.png").read_bytes(), "path": ""}
    bad = [{"quality_assessment": rows[0]["quality_assessment"] | {"objectConsistency": 4}},
           {"description": rows[0]["description"] | {"description_1": " "}}, {"description": None},
           {"image": {"bytes": b"cut", "path": ""}}, {"image": square}]
    pq.write_table(pa.Table.from_pylist(rows[:40]), hub / "pairs.parquet")
    pq.write_table(pa.Table.from_pylist([rows[0] | change for change in bad] + rows[40:]), hub / "rest.parquet")
    cfg = Subjects200K(out=f"{tmp_path}/pairs/", source=str(hub), val=0.2)  # held out beside it, not inside
    prepare_subjects(cfg)
    kept, held_out = items(tmp_path / "pairs"), items(tmp_path / "pairs_val")
    assert len(kept) + len(held_out) == 30 and held_out and not kept.keys() & held_out.keys()
    assert set((kept + held_out).values()) == {2} and len(ImagePairs(cfg.out, (32, 32))) == kept.total()
    said = capsys.readouterr()
    assert "65 pairs read: " in said.out and set(said.out.strip().split(": ")[-1].split(", ")) == {
        f"{kept.total()} train", f"{held_out.total()} val", "1 score", "2 description", "1 unreadable", "1 layout"}
    assert f"skipped: row 3 of {hub}/rest.parquet" in said.err
    assert pq.ParquetFile(tmp_path / "pairs/pairs.parquet").metadata.row_group(0).num_rows == 16
    before = (tmp_path / "pairs/rest.parquet").stat().st_ino
    (tmp_path / "pairs/pairs.parquet").unlink()
    prepare_subjects(cfg)
    assert (tmp_path / "pairs/rest.parquet").stat().st_ino == before and items(tmp_path / "pairs") == kept
    with pytest.raises(ValueError, match="was prepared with other options .*min_score was 5, now 0"):
        prepare_subjects(replace(cfg, min_score=0))
    prepare_subjects(replace(cfg, out=f"{tmp_path}/few", n=10))  # it reads no file too many
    assert items(tmp_path / "few").total() == 10 and not (tmp_path / "few/rest.parquet").exists()


@pytest.mark.parametrize("prepared, Config, flags, message", [
    (prepare_subjects, Subjects200K, "--help", "0"), (prepare_pexels, Pexels, "--help", "0"),
    (prepare_subjects, Subjects200K, "--source .", "a.parquet: the column description holds string"),
    (prepare_subjects, Subjects200K, "--source . --out {}", "a.parquet would be written over a.parquet, which is read"),
    (prepare_pexels, Pexels, "--source .", "a.parquet: the column title holds int64, expected texts"),
    (prepare_pexels, Pexels, "--source /no/body", "no folder /no/body, and the download from the hub failed")])
def test_help_is_printed_and_a_mistake_is_one_line(tmp_path, monkeypatch, prepared, Config, flags, message):
    monkeypatch.chdir(tmp_path)
    table = {"image": [{"bytes": b""}], "description": ["a cat"], "video": ["http://x/y.mp4"], "title": [7]}
    pq.write_table(pa.table(table), "a.parquet")
    with pytest.raises(SystemExit, match=message) as end:
        command_line(prepared, Config, "", flags.format(tmp_path).split())
    assert "\n" not in str(end.value)


# ---- Pexels ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def requests(tmp_path, monkeypatch):
    """The requests, (second, name), to a proxy that answers for all hosts. KIND-NUMBER.mp4 disappoints as KIND says."""
    for name, size in (("wide", (128, 72)), ("tall", (72, 128))):
        save_video(tmp_path / f"{name}.mp4", [Image.new("RGB", size)] * 9, 4)
    (wide, tall), requests = [(tmp_path / name).read_bytes() for name in ("wide.mp4", "tall.mp4")], []
    answers = {"tall": (200, {}, tall), "corrupt": (200, {}, wide[:300]), "missing": (404, {}, b""),
               "cut": (200, {"Content-Length": len(wide)}, wide[:300]), "broken": (503, {}, b""),
               "page": (200, {"Content-Type": "text/html"}, b"<html>Come back later"), "forbidden": (403, {}, b"")}

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None

        def do_GET(self):
            path = self.path.removeprefix("http://clips/")
            kind = path.split("-")[0]
            status, headers, body = answers.get(kind, (200, {}, wide))
            if kind == "busy" and path not in [path for _, path in requests]:
                status, headers, body = 429, {"Retry-After": 1}, b""
            requests.append((time.monotonic(), path))
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for byte in body if kind == "slow" else ():
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            self.wfile.write(body)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads, httpd.handle_error = True, lambda *_: None  # the other side may have had enough
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{httpd.server_port}")
    for constant, value in (("TRIES", 2), ("THREADS", 4), ("MAX_SECONDS", 2.0)):
        monkeypatch.setattr(prepare, constant, value)
    yield requests
    httpd.shutdown()


def listing(folder, kinds, others=(), **more):
    """A config that asks for 9 frames at 4 fps of these clips; others: what further rows of the list hold instead."""
    rows = [{"title": f"a thing {kind}", "video": f"http://clips/{kind}.mp4", "duration": "PT00M12S", "sfw": True}
            for kind in kinds]
    (folder / "list").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows + [rows[0] | other for other in others]), folder / "list/all.parquet")
    return replace(Pexels(f"{folder}/p", f"{folder}/list", n=99, val=0, frames=9, fps=4.0), **more)


def test_a_hostile_server_costs_only_the_clips_that_it_spoils(requests, tmp_path, capsys):
    fates = {"good": "kept", "busy": "kept", "tall": "portrait", "missing": "dead HTTP 404",
             "forbidden": "failed RetryError", "broken": "failed RetryError", "page": "failed a web page",
             "cut": "failed ProtocolError", "slow": "failed not done after", "corrupt": "filtered cannot read the clip"}
    links = [f"{kind}-6" for kind in fates] + [f"good-{i}" for i in range(7, 67)]  # busy-6 is among the first
    prepare_pexels(listing(tmp_path, links))
    said = capsys.readouterr()
    counts = set(said.out.splitlines()[-1].split("99 clips wanted: ")[1].split(", "))
    assert counts == {"62 kept", "1 filtered", "1 portrait", "1 dead", "5 failed"}
    for status, why, link in json.loads((tmp_path / "p/prepare.json").read_text())["done"]["train"].values():
        assert f"{status} {why}".startswith(fates[link.split("/")[-1].split("-")[0]]), link
    asked = Counter(path for _, path in requests)
    assert asked["missing-6.mp4"] == 1 and asked["broken-6.mp4"] == 2  # what may pass is tried again
    refused, again = (second for second, path in requests if path == "busy-6.mp4")
    assert again >= refused + 1 and said.err.count("HTTP 429: all downloads wait 1 s") == 1
    assert not [path for second, path in requests if refused + 0.25 < second < refused + 1]
    captions = {clip.with_suffix(".txt").read_text() for clip in tmp_path.glob("p/*.mp4")}
    assert len(captions) == 62 and captions < {f"a thing {link}\n" for link in links}


def test_a_dead_network_ends_the_run_and_old_failures_do_not(requests, tmp_path, capsys):
    cfg = listing(tmp_path, [f"broken-{i}" for i in range(60)])
    with pytest.raises(ValueError, match="50 downloads in a row failed, the last: .*too many 503.*Is the network up"):
        prepare_pexels(cfg)
    prepare_pexels(cfg)  # of the 60 failures now 10 are new
    assert "99 clips wanted: 60 failed" in capsys.readouterr().out


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_ends_at_once_and_the_next_fetches_what_is_missing(requests, tmp_path, sent, code):
    cfg = listing(tmp_path, ["slow-1", "good-1", "good-2", "good-3"])
    flags = [f"--{name}={getattr(cfg, name)}" for name in ("out", "source", "val", "frames", "fps")]
    process = start(["-m", "paper.prepare", "pexels", *flags], cwd=tmp_path)
    while len(list(tmp_path.glob("p/*.mp4"))) < 3 or len(requests) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=20)  # the slow link would take minutes
    assert process.returncode == code and "Traceback" not in out
    next(tmp_path.glob("p/*.mp4")).unlink()  # a clip that was lost is missing too
    prepare_pexels(cfg)
    assert len(Clips(tmp_path / "p", (32, 32), 9, 4)) == 3 and not list(tmp_path.glob("p/*.part"))
    assert Counter(path[:4] for _, path in requests) == {"good": 4, "slow": 2}


def test_held_out_clips_never_move_into_training(requests, tmp_path):
    """Not with a longer list, not with a larger n."""
    def stems():
        return [{file.stem for file in (tmp_path / folder).glob("*.mp4")} for folder in ("p", "p_val")]
    prepare_pexels(listing(tmp_path, [f"good-{i}" for i in range(40)], n=5, val=5))
    before = stems()
    assert [len(side) for side in before] == [5, 5] and len(requests) == 10
    prepare_pexels(listing(tmp_path, [f"good-{i}" for i in range(120)], n=200, val=5))
    assert stems()[1] == before[1] and before[0] < stems()[0] and len(stems()[0]) > 40 and not stems()[0] & before[1]


def test_rows_are_chosen_by_what_the_list_says_and_titles_lose_their_endings(tmp_path, capsys):
    others = [{"sfw": False}, {"title": " "}, {"duration": "PT00M01S"}, {"video": "nothing"},
              {"title": "b · free stock video"}, {"title": "c | Pexels · Free Stock Video"}]
    cfg = listing(tmp_path, ["1"], others)
    assert {row["title"] for row in prepare.candidates(cfg, {})["train"]} == {"a thing 1", "b", "c"}
    counts = set(capsys.readouterr().out.strip().split("listed: ")[1].split(", "))
    assert counts == {"3 train", "1 not safe for work", "1 no title", "1 too short", "1 no link",
                      "2 whose title lost an ending that is no caption"}


# ---- the cache -------------------------------------------------------------------------------------------------------

def test_training_on_a_cache_with_prompts_that_two_ranks_made_has_the_same_losses(knobs, tmp_path, monkeypatch):
    """The text encoder leaves the pipeline, because diffusers would draw the samples' noise where it lies."""
    monkeypatch.chdir(tmp_path)
    cfg = train.Config(**{**knobs, "cls": "item", "cls_video": False, "val_every": 1, "name": "plain"})
    encoding = {f.name: getattr(cfg, f.name) for f in fields(Latents) if hasattr(cfg, f.name)}
    encoding |= {"out": "cache", "prompts": True}
    flags = [f"--{name}={value}" for name, value in encoding.items() if value != ""]
    made = run(*TORCHRUN, "-m", "paper.prepare", "cache", *flags, cwd=tmp_path)
    assert "40 of 40 images cached" in made.stdout and "6 of 6 videos cached" in made.stdout, made.stderr
    encoders, cached = [], replace(cfg, name="cached", cache="cache")
    monkeypatch.setattr(train.Validation, "measure", lambda self, step: encoders.append(self.pipe.text_encoder))
    for each in (cfg, cached):
        train.train(each)
    plain, other = ([line["loss"] for line in log_of(f"out/{name}")] for name in ("plain", "cached"))
    assert len(plain) == 6 and plain == pytest.approx(other, rel=1e-5)
    assert encoders[0] is not None and encoders[-1] is None
    with pytest.raises(ValueError, match="fps was 4.0, now 8.0.*choose another --out"):
        prepare_cache(Latents(**{**encoding, "fps": 8.0}))
    for name, value, task in (("fps", 8.0, "video"), ("crop_jitter", 0.1, "image"), ("cls", "front", "image"),
                              ("cls_video", True, "video")):
        with pytest.raises(ValueError, match=f"the cache cache/{task} was made with other settings"):
            train.train(replace(cached, name="x", **{name: value}))


def test_what_cannot_be_read_is_not_cached_and_what_has_changed_is_noticed(tmp_path, capsys):
    cfg = Latents(out=str(tmp_path / "cache"), base=BASE, frames=9, fps=4.0, videos=str(tmp_path / "clips"))
    creatures.write_clips(tmp_path / "clips", n=4)
    (tmp_path / "clips/0000.txt").write_text(" \n")
    (tmp_path / "clips/0001.mp4").write_bytes(b"cut")
    prepare_cache(cfg)
    said = capsys.readouterr()
    assert "2 of 4 videos cached" in said.out
    assert said.err.count("skipped: the caption") == said.err.count("skipped: cannot read the clip") == 1
    before = {file: file.stat().st_ino for file in tmp_path.glob("cache/video/*.safetensors")}
    (tmp_path / "clips/0002.txt").write_text("another caption")
    clips = Clips(tmp_path / "clips", (32, 32), 9, 4.0, cache=Cache(tmp_path / "cache/video", {}), in_order=True)
    reasons = ["the caption", "cut or of another 0001.mp4", "cut or of another 0002.mp4"]
    assert all(reason in clips[0, i]["skipped"][0] for i, reason in enumerate(reasons)) and not clips[0, 3]["skipped"]
    prepare_cache(cfg)
    assert not clips[0, 2]["skipped"] and sum(file.stat().st_ino == before[file] for file in before) == 1
