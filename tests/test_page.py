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

from common.find import find_lora
from model import encode_video, with_reference_token
from sample import encode_references, generate, guidance_of, load
from toy import creatures
from toy.creatures import COLOURS, DIRECTIONS, FIELDS, Creatures, caption, score_each

pytestmark = pytest.mark.browser
MODELS = Path("toy/page/models")


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log. Files whose names are in `missing` are not found."""
    missing = set()

    def do_GET(self):
        self.send_error(404) if Path(self.path).name in self.missing else super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(address, folder) of the page, served with onnxruntime-web from the folder ORT_WEB in place of the CDN."""
    if not Path(os.environ.get("ORT_WEB", ""), "ort.wasm.min.mjs").is_file():
        pytest.skip("ORT_WEB names no folder with onnxruntime-web's dist: see the head of this file")
    folder = tmp_path_factory.mktemp("site") / "page"
    shutil.copytree("toy/page", folder)
    (folder / "ort").symlink_to(Path(os.environ["ORT_WEB"]).resolve())
    script, found = re.subn('const ORT = "[^"]*"', 'const ORT = new URL("ort/", location).href',
                            (folder / "page.js").read_text())
    assert found == 1
    (folder / "page.js").write_text(script)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.binary_location = shutil.which("chromium") or pytest.skip("no chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    yield driver
    driver.quit()


def status(browser, *starts, seconds=120):
    """The page's status line, when it starts with one of these words."""
    end = time.time() + seconds
    while time.time() < end:
        said = browser.find_element("id", "status").text
        if said.startswith(starts):
            return said
        time.sleep(0.05)
    raise TimeoutError(f"the page says {said!r}; {browser.get_log('browser')}")


def choose(browser, **state):
    """Set what the page's controls set, and wait for both videos: {column: frames (9,32,32,3)}."""
    browser.execute_script("document.getElementById('status').textContent = ''; "
                           "Object.assign(toy.state, arguments[0]); toy.changed()", state)
    status(browser, "Two videos")
    still, walks, dose = browser.execute_script(
        "return [toy.shown.still.frames, toy.shown.walks.frames, toy.state.dose]")
    return {p: np.array(v, np.uint8).reshape(9, 32, 32, 3) for p, v in (("0", still), (dose, walks))}


def sampled(page_says, p, prompt, monkeypatch):
    """The same video by sample.py: frames (9,32,32,3) of generate from the page's picture and noise."""
    picture, noise = page_says
    pipe, header = load(str(MODELS / f"lora-{p}.safetensors"))
    monkeypatch.setattr("diffusers.pipelines.cogvideo.pipeline_cogvideox.randn_tensor",
                        lambda shape, **_: torch.tensor(noise).view(shape))
    reference = encode_references(pipe, [Image.fromarray(picture)], 32, 32)
    video = generate(pipe, reference, [prompt], [0], steps=20, guidance=guidance_of(header))[0]
    return np.stack([np.asarray(frame) for frame in video])


def test_eight_creatures_are_sample_pys_and_walk_only_with_clips(site, browser, monkeypatch):
    """Frames equal sample.py's; image-only stands and dual-task walks, by the toy's own score, in 6 of 8 at least."""
    browser.get(site[0])
    status(browser, "Two videos")
    stands, walks, names = 0, 0, list(COLOURS)
    for i in range(8):
        field, direction = i, i % 4  # of the held-out combinations
        browser.find_element("id", "another").click()
        videos = choose(browser, field=list(FIELDS)[field], direction=list(DIRECTIONS)[direction], seed=i)
        cells, first, second = browser.execute_script("return [[...toy.state.cells], toy.state.first, "
                                                      "toy.state.second]")
        picture, noise = browser.execute_script(f"return [toy.reference(), [...toy.normal({i}, 5 * 4 * 16 * 16)]]")
        picture = np.array(picture, np.uint8).reshape(32, 32, 3)
        creature = Creatures(np.array(cells).reshape(1, 8, 8), np.array([[names.index(first), names.index(second)]]))
        others = Creatures(np.repeat(creature.bitmap, 16, 0), np.repeat(creature.colours, 16, 0))  # not looked at here
        prompt = caption(field, direction)
        test = creatures.TestSet(others, picture[None], np.array([field]), np.array([direction]), [prompt])
        for p, video in videos.items():
            difference = np.abs(video.astype(int) - sampled((picture, noise), p, prompt, monkeypatch))
            assert difference.mean() <= 2 and difference.max() <= 12, (i, p, difference.mean(), difference.max())
        stands += score_each(videos["0"][None], test)["frozen"][0]
        walks += score_each(videos["0.2"][None], test)["moves"][0]
    assert stands >= 6 and walks >= 6, (stands, walks)
    again = choose(browser, field="green", direction="left", seed=3)
    choose(browser, seed=4)
    assert all((v == again[p]).all() for p, v in choose(browser, seed=3).items())  # the same wish, the same video
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_drawing_by_hand_and_clicking_faster_than_it_computes(site, browser):
    """A click paints a cell and its mirror image; the eyes stay; of many wishes the last one is shown."""
    browser.get(site[0])
    status(browser, "Two videos")
    browser.find_element("id", "clear").click()
    assert "draw something" in status(browser, "Nothing to see")
    canvas = browser.find_element("id", "draw")
    actions = pytest.importorskip("selenium.webdriver").ActionChains(browser)
    side = canvas.size["width"] / 8
    for row, column in ((0, 0), (2, 2), (5, 3), (6, 3)):
        actions.move_to_element_with_offset(canvas, (column - 3.5) * side, (row - 3.5) * side).click()
    actions.perform()
    status(browser, "Two videos")
    cells = np.reshape(browser.execute_script("return [...toy.state.cells]"), (8, 8))
    assert (cells == cells[:, ::-1]).all() and cells[2].tolist() == [0, 1, 2, 1, 1, 2, 1, 0]
    assert cells[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 1] and cells[5, 3] == cells[6, 4] == 1
    for field in FIELDS:
        browser.execute_script(f"toy.state.field = {field!r}; toy.changed()")
    last = choose(browser, dose="0.1")
    assert (choose(browser, field="navy")["0"] != last["0"]).any()
    assert all((v == last[p]).all() for p, v in choose(browser, field=list(FIELDS)[-1]).items())
    canvas.send_keys(" ")  # the keyboard: nothing before an arrow chose a cell
    down, space = "\ue015", " "
    canvas.send_keys(down, down, down, space)
    assert browser.execute_script("return toy.state.cells[24]") == 1


def test_the_noise_at_the_start_and_a_narrow_phone(site, browser):
    """With fewer steps left the guess is nearer to the video; nothing is wider than a phone of 360 px."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    browser.get(site[0])
    status(browser, "Two videos")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    end, middle, start = (choose(browser, left=n) for n in (0, 10, 20))
    for p, video in end.items():
        far, near = (np.abs(guess[p].astype(int) - video).mean() for guess in (start, middle))
        assert far > near > 0, (p, far, near)


def test_what_is_wrong_is_said_in_words(site, browser, monkeypatch):
    monkeypatch.setattr(Quiet, "missing", {"lora-0.safetensors"})
    browser.get(site[0])
    assert "404" in status(browser, "models/lora-0.safetensors did not load")
    monkeypatch.setattr(Quiet, "missing", {"ort.wasm.min.mjs"})
    browser.get(site[0])
    assert "network" in status(browser, "onnxruntime-web did not load")
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.WebAssembly"})
    browser.get(site[0])
    status(browser, "This browser has no WebAssembly")


def weights_of(file):
    """What follows a safetensors file's header: the graphs' offsets count from there."""
    raw = file.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little"):]


def test_exported_graphs_equal_the_torch_modules():
    runtime = pytest.importorskip("onnxruntime")
    says = json.loads((MODELS / "models.json").read_text())

    def session(graph, files):
        options = runtime.SessionOptions()
        bytes_of = {name: weights_of(MODELS / file) for name, file in files.items()}
        options.add_external_initializers_from_files_in_memory([*bytes_of], [*bytes_of.values()],
                                                               [len(b) for b in bytes_of.values()])
        return runtime.InferenceSession((MODELS / graph).read_bytes(), options)
    draw = torch.Generator().manual_seed(0)
    noisy, text, reference = (torch.randn(shape, generator=draw)
                              for shape in ((2, 5, 4, 16, 16), (2, 16, 64), (1, 1, 4, 16, 16)))
    timestep = torch.tensor([300, 300])
    for p, file in says["doses"].items():
        pipe, _ = load(str(find_lora(MODELS / file)))
        graph = session("transformer.onnx", {"transformer.safetensors": "transformer.safetensors", says["lora"]: file})
        ours, = graph.run(None, {"noisy": noisy.numpy(), "text": text.numpy(), "timestep": timestep.numpy(),
                                 "reference": reference.numpy()})
        with torch.no_grad():
            torchs = pipe.transformer(noisy, text, timestep, reference=reference, return_dict=False)[0].numpy()
        assert np.abs(ours - torchs).max() < 1e-4, p
    vae = {"vae.safetensors": "vae.safetensors"}
    picture = torch.rand(1, 1, 3, 32, 32, generator=draw) * 2 - 1
    ours, = session("encoder.onnx", vae).run(None, {"picture": picture.numpy()})
    assert np.abs(ours - encode_video(pipe.vae, picture).numpy()).max() < 1e-4
    ours, = session("decoder.onnx", vae).run(None, {"latents": noisy[:1].numpy()})
    with torch.no_grad():
        assert np.abs(ours - pipe.decode_latents(noisy[:1]).numpy()).max() < 1e-4
    table = np.fromfile(MODELS / "prompts.f32", np.float32).reshape(33, 16, 64)
    words = with_reference_token(caption(2, 1), "front")
    ours = pipe.encode_prompt(words, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    assert np.abs(table[1 + 4 * 2 + 1] - ours[0].detach().numpy()).max() < 1e-4


def test_the_export_refuses_what_one_graph_cannot_hold_and_deletes_nothing(tmp_path):
    pytest.importorskip("onnx")
    from toy import export
    for file in MODELS.glob("lora-0*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    first = str(tmp_path / "lora-0.safetensors")
    for loras, message in (([first], "would be written over .*lora-0.safetensors, which is read"),
                           ([first, first], "each needs its own p, and all the same base, lora_rank")):
        with pytest.raises(ValueError, match=message):
            export.main(export.Config(lora=loras, out=str(tmp_path)))
    assert len(list(tmp_path.iterdir())) == 6
