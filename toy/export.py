"""The toy's models for a browser: toy/page/models, which toy/page/page.js runs with onnxruntime-web.

    python -m toy.export --lora out/a out/b ...    # runs of train.py --toy, one for each p
    python -m http.server --directory toy/page     # then open http://localhost:8000

There is one graph of the transformer for all LoRAs. It reads the base's weights and a LoRA's from the very files that
sample.py reads (safetensors, float16) and merges them once, when it is loaded: W + (alpha / rank) B A. Extra packages:
pip install -r toy/page/requirements.txt
"""
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from common.args import command_line, knob, refuse_overwriting
from common.find import find_lora
from model import encode_prompt, encode_video, lora_header, with_reference_token
from sample import guidance_of, load
from toy.creatures import COLOURS, DIRECTIONS, FIELDS, FRAMES, SIZE, SOLID, caption


@dataclass
class Config:
    lora: list[str] = knob(["toy/lora"], "LoRA files, folders or runs of the toy, one for each p")
    steps: int = knob(20, "denoising steps of the page")
    out: str = knob("toy/page/models", "folder to write")


class Merged(torch.nn.Module):
    """The transformer with the merged weights W + (alpha / rank) B A. lora: {module: (A, B)}, scale: alpha / rank."""

    def __init__(self, transformer, lora, scale):
        super().__init__()
        self.base, self.names, self.scale = transformer, list(lora), scale
        self.A = torch.nn.ParameterList([A for A, _ in lora.values()])
        self.B = torch.nn.ParameterList([B for _, B in lora.values()])

    def forward(self, noisy, text, timestep, reference):
        """noisy (2,T,C,H,W), text (2,L,D), timestep (2,), reference (1,1,C,H,W) -> velocity (2,T,C,H,W). Both halves
        of classifier-free guidance: [without the prompt | with it]."""
        weights = dict(self.base.named_parameters())
        merged = {}
        for name, A, B in zip(self.names, self.A, self.B):
            W = weights[f"{name}.weight"]
            merged[f"{name}.weight"] = W + self.scale * (B.flatten(1) @ A.flatten(1)).view_as(W)
        return functional_call(self.base, merged, (noisy, text, timestep),
                               {"reference": reference, "return_dict": False})[0]


class Part(torch.nn.Module):
    """A function that uses the VAE, as the module that torch.onnx.export asks for."""

    def __init__(self, vae, function):
        super().__init__()
        self.vae, self.function = vae, function

    def forward(self, x):
        return self.function(x)


def lora_weights(path):
    """({module: (A, B)}, alpha / rank) of a LoRA file."""
    weights, header = load_file(path), lora_header(path)
    modules = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith("lora_A.weight")]
    pairs = {module.removeprefix("transformer."): (weights[f"{module}.lora_A.weight"].float(),
                                                   weights[f"{module}.lora_B.weight"].float()) for module in modules}
    alpha = json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"]
    return pairs, alpha / len(next(iter(pairs.values()))[0])


def write_graph(module, inputs, names, out, files):
    """Export to OUT, without weights: each stands in a file beside it. files: {name: (safetensors file, key)}.

    Offsets count from the end of the safetensors header, which is of another length in each LoRA."""
    with torch.no_grad():  # unoptimised: torch 2.13's optimiser gives wrong numbers here, and onnxruntime does it later
        model = torch.onnx.export(module.eval(), inputs, input_names=names, output_names=["out"], dynamo=True,
                                  optimize=False, verbose=False).model_proto
    headers = {}
    for file in {file for file, _ in files.values()}:
        raw = file.read_bytes()
        headers[file] = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    casts = []
    for weight in model.graph.initializer:
        if weight.name not in files:
            continue
        file, key = files[weight.name]
        begin, end = headers[file][key]["data_offsets"]
        casts.append(onnx.helper.make_node("Cast", [f"{weight.name}.half"], [weight.name], to=onnx.TensorProto.FLOAT))
        weight.name, weight.data_type = f"{weight.name}.half", onnx.TensorProto.FLOAT16
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for k, v in {"location": file.name, "offset": begin, "length": end - begin}.items():
            weight.external_data.add(key=k, value=str(v))
    nodes = [*casts, *model.graph.node]
    for node in nodes:
        node.ClearField("metadata_props")  # the lines of Python that it came from: most of the file
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out)


SHARED = ("base", "lora_rank", "lora_alpha", "lora_scope")  # what all LoRAs of one graph have in common


def main(cfg):
    out, sources = Path(cfg.out), [find_lora(lora) for lora in cfg.lora]
    runs = [json.loads(lora_header(file)["trained_by"]) for file in sources]
    doses = {f"{run['p']:g}": f"lora-{run['p']:g}.safetensors" for run in runs}
    if len(doses) < len(runs) or len({tuple(run[name] for name in SHARED) for run in runs}) > 1:
        raise ValueError(f"--lora: each needs its own p, and all the same {', '.join(SHARED)}: they share one graph")
    if runs[0]["lora_scope"] != "all":
        raise ValueError("--lora: LoRA on reference tokens only cannot be merged into the weights")
    refuse_overwriting(sources, [out / file for file in doses.values()])
    out.mkdir(parents=True, exist_ok=True)
    pipe, header = load(str(sources[0]), use_lora=False)
    base = Path(header["base"])
    transformer, vae = out / "transformer.safetensors", out / "vae.safetensors"
    shutil.copy(base / "transformer/diffusion_pytorch_model.safetensors", transformer)
    shutil.copy(base / "vae/diffusion_pytorch_model.safetensors", vae)
    for file, name in zip(sources, doses.values()):
        weights = {k: v.half().contiguous() for k, v in load_file(file).items()}  # in float16, like the base
        save_file(weights, out / name, lora_header(file))
    first = out / doses[min(doses)]
    lora, scale = lora_weights(first)

    merged = Merged(pipe.transformer, lora, scale)
    with safe_open(transformer, "pt") as f:
        files = {f"base.{key}": (transformer, key) for key in f.keys()}
    for i, name in enumerate(lora):
        files |= {f"{letter}.{i}": (first, f"transformer.{name}.lora_{letter}.weight") for letter in "AB"}
    noisy, text = torch.randn(2, 5, 4, 16, 16), encode_prompt(pipe, ["", ""], "cpu")
    inputs = (noisy, text, torch.tensor([500, 500]), torch.randn(1, 1, 4, 16, 16))
    write_graph(merged, inputs, ["noisy", "text", "timestep", "reference"], out / "transformer.onnx", files)
    with safe_open(vae, "pt") as f:
        files = {f"vae.{key}": (vae, key) for key in f.keys()}
    # A picture (1,1,3,H,W) in -1..1 -> its scaled latents (1,1,C,h,w); such of a video (1,T,C,h,w) -> (1,3,F,H,W).
    encoder = Part(pipe.vae, lambda picture: encode_video(pipe.vae, picture))
    write_graph(encoder, (torch.randn(1, 1, 3, SIZE, SIZE),), ["picture"], out / "encoder.onnx", files)
    write_graph(Part(pipe.vae, pipe.decode_latents), (noisy[:1],), ["latents"], out / "decoder.onnx", files)

    prompts = ["", *(with_reference_token(caption(f, d), "front") for f in range(len(FIELDS))
                     for d in range(len(DIRECTIONS)))]
    encode_prompt(pipe, prompts, "cpu").float().numpy().tofile(out / "prompts.f32")  # (1 + 8 * 4, L, D)
    pipe.scheduler.set_timesteps(cfg.steps)
    timesteps = pipe.scheduler.timesteps
    flags = [f"--{k} {runs[0][k]}" for k in ("image_frame", "steps", "seed") if k in runs[0]]
    (out / "models.json").write_text(json.dumps({
        "doses": doses, "lora": first.name, "guidance": guidance_of(header), "frames": FRAMES,
        "recipe": " ".join(["train.py --toy --p P", *flags]),
        "text": list(text.shape[1:]), "latents": list(noisy.shape[1:]), "fields": FIELDS, "colours": COLOURS,
        "directions": DIRECTIONS, "solid": SOLID.tolist(), "timesteps": timesteps.tolist(),
        "alpha_bar": [*pipe.scheduler.alphas_cumprod[timesteps].tolist(), 1.0]}))
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
