// Draw a creature, and two LoRAs of the toy make a video of it, in the browser. python -m toy.export writes models/.
// Symbols as in the paper: x the noisy video, v the velocity, c the prompt's embedding, alphaBar the noise schedule.

const ORT = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";  // a folder of yours works without a network
const SIZE = 32, CELL = 2, CELLS = 8, TILE = 8;  // px of a frame, px of a cell, cells of a creature, px of a tile
const EYES = {row: 2, values: [1, 2, 1, 1, 2, 1], from: 1};  // given: which way is up can always be seen

const $ = id => document.getElementById(id);
const say = words => { $("status").textContent = words; };
const state = {cells: new Uint8Array(64), first: "orange", second: "white", brush: 1, field: "teal", direction: "right",
  seed: 0, dose: "0.2", left: 0};
let M, ort, encoder, decoder, prompts;      // models.json, the runtime, two sessions, the table of embeddings
const files = {}, transformers = {};        // bytes by name; a session for each p
const shown = {still: null, walks: null};   // {key, predicted, frames} of each column

// ---- loading --------------------------------------------------------------------------------------------------------

async function download(name) {
  let answer;
  try {
    answer = await fetch(`models/${name}`);
  } catch {
    throw Error(`models/${name} did not load: is the network gone? Reload the page to try again.`);
  }
  if (!answer.ok) throw Error(`models/${name} did not load (${answer.status}). Was python -m toy.export run?`);
  const reader = answer.body.getReader(), parts = [];
  for (;;) {
    const {done, value} = await reader.read().catch(() => {
      throw Error(`models/${name} broke off: is the network gone? Reload the page to try again.`);
    });
    if (done) break;
    parts.push(value);
    download.bytes = (download.bytes ?? 0) + value.length;
    say(`Loading the models: ${(download.bytes / 1e6).toFixed(1)} MB`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// The weights of a safetensors file: what follows its header. The graphs' offsets count from here.
async function weights(name) {
  if (!files[name]) {
    const bytes = await download(name), header = Number(new DataView(bytes.buffer).getBigUint64(0, true));
    files[name] = bytes.subarray(8 + header);
  }
  return files[name];
}

// graph: its file; from: {name that the graph has for a file of weights: the file}.
async function session(graph, from) {
  const externalData = [];
  for (const [path, file] of Object.entries(from)) externalData.push({path, data: await weights(file)});
  files[graph] ??= await download(graph);
  say("Starting the models ...");
  return ort.InferenceSession.create(files[graph], {externalData});
}

// The transformer with the LoRA of this p. The graph merges them, once: W + alpha / rank B A.
async function transformer(p) {
  transformers[p] ??= await session("transformer.onnx",
    {"transformer.safetensors": "transformer.safetensors", [M.lora]: M.doses[p]});
  return transformers[p];
}

async function load() {
  if (typeof WebAssembly !== "object") throw Error("This browser has no WebAssembly to run the models: try another.");
  M = JSON.parse(new TextDecoder().decode(await download("models.json")));
  buildControls();
  try {
    ort = await import(`${ORT}ort.wasm.min.mjs`);
    ort.env.wasm.wasmPaths = ORT;
    ort.env.wasm.numThreads = 1;
  } catch {
    throw Error(`onnxruntime-web did not load from ${ORT}: is there a network?`);
  }
  prompts = new Float32Array((await download("prompts.f32")).buffer);
  encoder = await session("encoder.onnx", {"vae.safetensors": "vae.safetensors"});
  decoder = await session("decoder.onnx", {"vae.safetensors": "vae.safetensors"});
  await transformer("0");
}

// ---- the picture, the prompt, the noise -----------------------------------------------------------------------------

// Uniform numbers in 0..1 from a seed (mulberry32).
function uniform(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// n normal numbers (Box-Muller).
function normal(seed, n) {
  const u = uniform(seed);
  return Float32Array.from({length: n}, () => Math.sqrt(-2 * Math.log(1 - u())) * Math.cos(2 * Math.PI * u()));
}

// The reference picture, 32 x 32 RGB: on another field than the prompt's and on the grid, as training shows creatures.
function reference() {
  const fields = Object.keys(M.fields), u = uniform(state.seed);
  const other = fields[(fields.indexOf(state.field) + 1 + Math.floor(u() * (fields.length - 1))) % fields.length];
  const [top, left] = [0, 1].map(() => TILE * Math.floor(3 * u()));
  const palette = [M.fields[other], M.colours[state.first], M.colours[state.second]];
  return Array.from({length: SIZE * SIZE}, (_, i) => {
    const row = Math.floor((Math.floor(i / SIZE) - top) / CELL), column = Math.floor((i % SIZE - left) / CELL);
    const inside = row >= 0 && row < CELLS && column >= 0 && column < CELLS;
    return palette[inside ? state.cells[row * CELLS + column] : 0];
  });
}

// Embeddings (2, L, D) for the two halves of guidance: of no words, and of the prompt.
function text() {
  const [L, D] = M.text, size = L * D, directions = Object.keys(M.directions);
  const row = 1 + Object.keys(M.fields).indexOf(state.field) * directions.length + directions.indexOf(state.direction);
  const both = new Float32Array(2 * size);
  both.set(prompts.subarray(0, size));
  both.set(prompts.subarray(row * size, (row + 1) * size), size);
  return new ort.Tensor("float32", both, [2, L, D]);
}

// ---- the sampler ----------------------------------------------------------------------------------------------------

// DDIM on the predicted velocity, with guidance s on the prompt: diffusers' CogVideoXPipeline and its DDIM scheduler.
// x: noise (T,C,H,W). Returns what each step takes the finished video x0 for, or null when stop() asks to end.
async function denoise(model, x, c, ref, stop) {
  const s = M.guidance, n = x.length, predicted = [];
  for (const [i, t] of M.timesteps.entries()) {
    if (stop()) return null;
    const noisy = new Float32Array(2 * n);
    noisy.set(x);
    noisy.set(x, n);
    const {out} = await model.run({noisy: new ort.Tensor("float32", noisy, [2, ...M.latents]), text: c, reference: ref,
      timestep: new ort.Tensor("int64", BigInt64Array.of(BigInt(t), BigInt(t)), [2])});
    const alphaBar = M.alpha_bar[i], alphaBarNext = M.alpha_bar[i + 1];  // the last is 1: no noise
    const keep = Math.sqrt((1 - alphaBarNext) / (1 - alphaBar));
    const x0 = new Float32Array(n), next = new Float32Array(n);
    for (let k = 0; k < n; k++) {
      const v = out.data[k] + s * (out.data[n + k] - out.data[k]);
      x0[k] = Math.sqrt(alphaBar) * x[k] - Math.sqrt(1 - alphaBar) * v;
      next[k] = keep * x[k] + (Math.sqrt(alphaBarNext) - Math.sqrt(alphaBar) * keep) * x0[k];
    }
    predicted.push(x0);
    x = next;
    await new Promise(resolve => setTimeout(resolve));  // let the page draw, and hear clicks
  }
  return predicted;
}

// Latents (T,C,H,W) -> frames, each 32 x 32 RGB.
async function decode(x0) {
  const {out} = await decoder.run({latents: new ort.Tensor("float32", x0, [1, ...M.latents])});  // (1,3,F,H,W) in -1..1
  const pixels = SIZE * SIZE, value = (c, f, i) => out.data[(c * M.frames + f) * pixels + i];
  return Array.from({length: M.frames}, (_, f) => Array.from({length: pixels}, (_, i) =>
    [0, 1, 2].map(c => Math.round(255 * Math.min(1, Math.max(0, value(c, f, i) / 2 + .5))))));
}

// ---- one thing after another: the newest wish wins ------------------------------------------------------------------

let wish = 0, busy = false;

async function wanted() {
  wish++;
  if (busy || !decoder) return;
  busy = true;
  try {
    let done = -1;
    while (done !== wish) {
      done = wish;
      await make(() => wish !== done);
    }
  } catch (error) {
    say(error.message.includes("Reload") ? error.message : `${error.message}: reload the page to try again.`);
  }
  busy = false;
}

async function make(stop) {
  if (state.cells.filter(Boolean).length <= EYES.values.length) {
    shown.still = shown.walks = null;
    return say("Nothing to see but eyes: draw something around them.");
  }
  const began = performance.now(), picture = reference();
  const planes = Float32Array.from({length: 3 * SIZE * SIZE}, (_, i) =>
    picture[i % (SIZE * SIZE)][Math.floor(i / (SIZE * SIZE))] / 127.5 - 1);
  const ref = (await encoder.run({picture: new ort.Tensor("float32", planes, [1, 1, 3, SIZE, SIZE])})).out;
  for (const [column, p] of [["still", "0"], ["walks", state.dose]]) {
    const {cells, first, second, field, direction, seed} = state;
    const key = JSON.stringify([[...cells], first, second, field, direction, seed, p]);
    const another = Object.values(shown).find(video => video?.key === key);
    let video = another ? {...another} : {key};
    if (!another) {
      say(column === "still" ? "Denoising: pictures alone ..." : "Denoising: with clips ...");
      const noise = normal(state.seed, M.latents.reduce((a, b) => a * b));
      video.predicted = await denoise(await transformer(p), noise, text(), ref, stop);
    }
    if (stop() || !video.predicted) return;
    video.frames = await decode(video.predicted[Math.min(M.timesteps.length - state.left, M.timesteps.length - 1)]);
    shown[column] = video;
  }
  say(`Two videos, made in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
}

// ---- what one sees and touches --------------------------------------------------------------------------------------

function paint(canvas, colours) {
  const image = new ImageData(canvas.width, canvas.height);
  colours.forEach((rgb, i) => image.data.set([...rgb, 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function changed() {
  for (let i = 0; i < EYES.values.length; i++) state.cells[EYES.row * CELLS + EYES.from + i] = EYES.values[i];
  const palette = [M.fields[state.field], M.colours[state.first], M.colours[state.second]];
  paint($("draw"), Array.from(state.cells, (value, i) => {
    const rgb = palette[value];
    return i === cursor ? rgb.map(c => Math.round(.6 * c + .4 * (c > 127 ? 0 : 255))) : rgb;
  }));
  paint($("reference"), reference());
  $("prompt").textContent = `"A creature walks ${state.direction} over a ${state.field} field"`;
  const percent = Math.round(100 * state.dose);
  $("dose-value").textContent = `${percent} % (p = ${state.dose})`;
  $("dose-says").innerHTML = percent ? `<b>and on clips of others</b>, ${percent} % of the steps` : "no clips at all";
  $("left-value").textContent = state.left;
  document.querySelectorAll("fieldset button[data-value]").forEach(button => button.setAttribute("aria-pressed",
    String(state[button.parentElement.id]) === button.dataset.value));
  wanted();
}

function buildControls() {
  const choose = (name, choices) => Object.entries(choices).forEach(([value, look]) => {
    const button = document.createElement("button");
    button.dataset.value = value;
    if (Array.isArray(look) && look.length === 3) button.style.background = `rgb(${look})`;
    else button.textContent = look;
    button.title = button.ariaLabel = `${name}: ${typeof look === "string" ? look : value}`;
    button.onclick = () => {
      state[name] = name === "brush" ? Number(value) : value;
      if (name === "first" || name === "second") state.brush = name === "first" ? 1 : 2;  // who picks a colour wants it
      changed();
    };
    $(name).append(button);
  });
  choose("first", M.colours);
  choose("second", M.colours);
  choose("brush", {1: "body", 2: "spots", 0: "erase"});
  choose("field", M.fields);
  choose("direction", {left: "\u2190", right: "\u2192", up: "\u2191", down: "\u2193"});
  const doses = Object.keys(M.doses).sort((a, b) => a - b);
  if (!doses.includes(state.dose)) state.dose = doses.at(-1);
  Object.assign($("dose"), {max: doses.length - 1, value: doses.indexOf(state.dose)});
  $("dose").oninput = () => { state.dose = doses[$("dose").value]; changed(); };
  Object.assign($("left"), {max: M.timesteps.length, value: 0});
  $("left").oninput = () => { state.left = Number($("left").value); changed(); };
  $("seed").oninput = () => { state.seed = Math.abs(Math.trunc(Number($("seed").value))) || 0; changed(); };
  $("another").onclick = () => { another(Math.random); changed(); };
  $("clear").onclick = () => { state.cells.fill(0); changed(); };
  $("recipe").textContent = M.recipe;
  another(uniform(7));
  changed();
}

// A random creature, as toy/creatures.py draws them: a solid middle and ragged edges, in two colours.
function another(u) {
  M.solid.forEach((row, r) => row.forEach((solid, c) => set(r, c, u() < solid ? (u() < .35 ? 2 : 1) : 0)));
  const names = Object.keys(M.colours), first = Math.floor(u() * names.length);
  state.first = names[first];
  state.second = names[(first + 1 + Math.floor(u() * (names.length - 1))) % names.length];
}

function set(row, column, value) {
  for (const c of [column, CELLS - 1 - column]) state.cells[row * CELLS + c] = value;
}

let cursor = -1;  // the cell that the keyboard is at
const draw = $("draw");
function touch(event) {
  const box = draw.getBoundingClientRect(), at = (p, from, size) => Math.floor(CELLS * (p - from) / size);
  const row = at(event.clientY, box.top, box.height), column = at(event.clientX, box.left, box.width);
  const inside = row >= 0 && row < CELLS && column >= 0 && column < CELLS;
  if (M && event.buttons && inside && state.cells[row * CELLS + column] !== state.brush) {
    set(row, column, state.brush);
    changed();
  }
}
draw.onpointerdown = event => { draw.setPointerCapture(event.pointerId); cursor = -1; touch(event); };
draw.onpointermove = touch;
draw.onblur = () => { cursor = -1; if (M) changed(); };
draw.onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -CELLS, ArrowDown: CELLS}[event.key];
  if (!M || !step && event.key !== " ") return;
  event.preventDefault();
  if (step) cursor = (Math.max(cursor, 0) + step + 64) % 64;
  else if (cursor >= 0) set(Math.floor(cursor / CELLS), cursor % CELLS, state.brush);
  changed();
};

let frame = 0;
setInterval(() => {  // some beats of rest at either end, to see where it begins and where it ends
  frame = (frame + 1) % (M ? M.frames + 6 : 1);
  for (const column of ["still", "walks"]) {
    const frames = shown[column]?.frames;
    if (frames) paint($(column), frames[Math.min(Math.max(frame - 2, 0), M.frames - 1)]);
    else $(column).getContext("2d").clearRect(0, 0, SIZE, SIZE);
  }
}, 250);

window.toy = {state, changed, shown, normal, uniform, another, reference};  // for tests/test_page.py
load().then(() => wanted()).catch(error => say(error.message));
