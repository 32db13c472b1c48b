"""The page on which one draws a creature (toy/page), in headless Chromium, against sample.py on the same noise.

    apt-get install chromium chromium-driver && pip install -r toy/page/requirements.txt
    npm pack onnxruntime-web@1.30.0 && tar xzf onnxruntime-web-1.30.0.tgz
    ORT_WEB=package/dist pytest -m browser
"""
import json
import os
import re
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sample import encode_references, generate, load
from toy import creatures
from toy.creatures import COLOURS, DIRECTIONS, FIELDS, Creatures, caption, score_each

pytestmark = pytest.mark.browser
MODELS = Path("toy/page/models")


@pytest.fixture
def browser(tmp_path):
    """Chromium, when the page has made its first two videos: a copy in tmp_path, with the runtime from ORT_WEB."""
    if not Path(os.environ.get("ORT_WEB", ""), "ort.wasm.min.mjs").is_file():
        pytest.skip("ORT_WEB names no folder with onnxruntime-web's dist: see the head of this file")
    from selenium import webdriver
    site = Path(shutil.copytree("toy/page", tmp_path / "page"))
    (site / "ort").symlink_to(Path(os.environ["ORT_WEB"]).resolve())
    here = 'const ORT = new URL("ort/", location).href'
    (site / "page.js").write_text(re.sub('const ORT = "[^"]*"', here, (site / "page.js").read_text()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=800,1500"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    driver.get(f"http://127.0.0.1:{server.server_port}/")
    status(driver, "Two videos")
    yield driver
    driver.quit()
    server.shutdown()


def status(browser, start):
    """The page's status line, when it starts with these words."""
    end = time.time() + 120
    while not (said := browser.find_element("id", "status").text).startswith(start):
        assert time.time() < end, f"the page says {said!r}; {browser.get_log('browser')}"
        time.sleep(0.05)
    return said


def choose(browser, **state):
    """Set what the page's controls set, and wait for both videos: {p: frames (9,32,32,3)}."""
    browser.execute_script("document.getElementById('status').textContent = ''; "
                           "Object.assign(toy.state, arguments[0]); toy.changed()", state)
    status(browser, "Two videos")
    shown = browser.execute_script("return {0: toy.shown.still.frames, [toy.state.dose]: toy.shown.walks.frames}")
    return {p: np.array(frames, np.uint8).reshape(9, 32, 32, 3) for p, frames in shown.items()}


def test_eight_creatures_are_sample_pys_and_walk_only_with_clips(browser, monkeypatch):
    """Frames equal sample.py's; image-only stands and dual-task walks, by the toy's own score, in 6 of 8 at least."""
    stands, walks = 0, 0
    loaded = {p: load(str(MODELS / f"lora-{p}.safetensors")) for p in ("0", "0.2")}
    for field in range(8):
        direction = field % 4  # of the held-out combinations
        browser.find_element("id", "another").click()
        videos = choose(browser, field=list(FIELDS)[field], direction=list(DIRECTIONS)[direction], seed=field)
        cells, colours, picture, noise = browser.execute_script(
            "const s = toy.state, shape = 5 * 4 * 16 * 16;"
            "return [[...s.cells], [s.first, s.second], toy.reference(), [...toy.normal(s.seed, shape)]]")
        picture, prompt = np.array(picture, np.uint8).reshape(32, 32, 3), caption(field, direction)
        monkeypatch.setattr("diffusers.pipelines.cogvideo.pipeline_cogvideox.randn_tensor",
                            lambda shape, **_: torch.tensor(noise).view(shape))
        for p, (pipe, header) in loaded.items():
            reference = encode_references(pipe, [Image.fromarray(picture)], 32, 32)
            ours = generate(pipe, reference, [prompt], [0], steps=20, guidance=float(header["guidance"]))[0]
            difference = np.abs(videos[p].astype(int) - np.stack(ours))
            assert difference.mean() <= 2 and difference.max() <= 12, (field, p, difference.mean(), difference.max())
        creature = Creatures(np.reshape(cells, (1, 8, 8)), np.array([[list(COLOURS).index(name) for name in colours]]))
        test = creatures.TestSet(creature, picture[None], np.array([field]), np.array([direction]), [prompt])
        stands += score_each(videos["0"][None], test)["frozen"][0]
        walks += score_each(videos["0.2"][None], test)["moves"][0]
    assert stands >= 6 and walks >= 6, (stands, walks)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_click_or_a_key_paints_a_cell_and_its_mirror_image_and_the_eyes_stay(browser):
    from selenium.webdriver import ActionChains, Keys
    browser.find_element("id", "clear").click()
    assert "draw something" in status(browser, "Nothing to see")
    canvas, actions = browser.find_element("id", "draw"), ActionChains(browser)
    side = canvas.size["width"] / 8
    for row, column in ((0, 0), (2, 2), (5, 3)):
        actions.move_to_element_with_offset(canvas, (column - 3.5) * side, (row - 3.5) * side).click()
    actions.perform()
    canvas.send_keys(" ", Keys.DOWN, Keys.DOWN, Keys.DOWN, " ")  # nothing before an arrow chose a cell
    cells = np.zeros((8, 8), int)
    cells[[0, 0, 5, 5, 3, 3], [0, 7, 3, 4, 0, 7]] = 1
    cells[2, 1:7] = [1, 2, 1, 1, 2, 1]
    assert np.reshape(browser.execute_script("return [...toy.state.cells]"), (8, 8)).tolist() == cells.tolist()
    status(browser, "Two videos")


def test_of_many_wishes_the_last_is_shown_and_with_fewer_steps_left_it_is_nearer_to_its_video(browser):
    for field in FIELDS:
        browser.execute_script(f"toy.state.field = {field!r}; toy.changed()")
    last, start, middle = choose(browser, dose="0.1"), choose(browser, left=20), choose(browser, left=10)
    assert (choose(browser, field="navy", left=0)["0"] != last["0"]).any()
    for p, video in choose(browser, field=list(FIELDS)[-1]).items():
        far, near = (np.abs(guess[p].astype(int) - video).mean() for guess in (start, middle))
        assert (video == last[p]).all() and far > near > 0, (p, far, near)


def test_what_is_wrong_is_said_in_words(browser, tmp_path):
    for missing, says, why in (("models/lora-0.safetensors", "models/lora-0.safetensors did not load", "404"),
                               ("ort", "onnxruntime-web did not load", "network")):
        (tmp_path / "page" / missing).unlink()
        browser.refresh()
        assert why in status(browser, says)
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.WebAssembly"})
    browser.refresh()
    status(browser, "This browser has no WebAssembly")


def outputs(folder):
    """What a folder's three graphs make of the same random inputs, and its table of prompts."""
    import onnxruntime
    files, draw = ["transformer.safetensors", "lora-0.safetensors", "vae.safetensors"], np.random.default_rng(0)
    raw = [(folder / file).read_bytes() for file in files]
    weights = [content[8 + int.from_bytes(content[:8], "little"):] for content in raw]  # what follows the header
    options = onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory(files, weights, [len(content) for content in weights])
    for graph in ("transformer", "encoder", "decoder"):
        session = onnxruntime.InferenceSession((folder / f"{graph}.onnx").read_bytes(), options)
        yield session.run(None, {x.name: draw.uniform(-1, 1, x.shape).astype(np.float32) if x.name != "timestep"
                                 else np.array([300, 300]) for x in session.get_inputs()})[0]
    yield np.fromfile(folder / "prompts.f32", np.float32)


def test_the_export_writes_the_pages_models_and_refuses_what_one_graph_cannot_hold(tmp_path):
    from toy import export
    export.main(export.Config(lora=sorted(map(str, MODELS.glob("lora-*"))), out=str(tmp_path)))
    assert json.loads((tmp_path / "models.json").read_text()) == json.loads((MODELS / "models.json").read_text())
    for ours, pages in zip(outputs(tmp_path), outputs(MODELS)):
        assert np.abs(ours - pages).max() < 1e-4
    written = str(tmp_path / "lora-0.safetensors")
    for loras, message in (([written], "would be written over .*lora-0.safetensors, which is read"),
                           ([written] * 2, "each needs its own p, and all the same base, lora_rank")):
        with pytest.raises(ValueError, match=message):
            export.main(export.Config(lora=loras, out=str(tmp_path)))
