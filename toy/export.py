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
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from common.args import command_line, knob, refuse_overwriting
from common.find import find_lora
from model import encode_prompt, encode_video, lora_header, with_reference_token
from sample import load
from toy.creatures import COLOURS, DIRECTIONS, FIELDS, FRAMES, SIZE, SOLID, caption


@dataclass
class Config:
    lora: list[str] = knob(["toy/lora"], "LoRA files, folders or runs of the toy, one for each p")
    steps: int = knob(20, "denoising steps of the page")
    out: str = knob("toy/page/models", "folder to write")


class Graph(torch.nn.Module):
    """A function as the module that torch.onnx.export asks for. parts: the modules whose weights it uses, by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.forward = function
        for name, part in parts.items():
            self.add_module(name, part)


def tensors(file, prefix=""):
    """{prefix + name: (file, begin, length)} of a safetensors file. Bytes are counted from the end of its header, which
    is of another length in each LoRA."""
    raw = file.read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {prefix + name: (file.name, begin, end - begin) for name, (begin, end) in spans.items()}


def write_graph(graph, inputs, names, out, weights):
    """Export to OUT, without weights: each stands in a file beside it, in float16. weights: see `tensors`."""
    with torch.no_grad():  # unoptimised: torch 2.13's optimiser gives wrong numbers here, and onnxruntime does it later
        model = torch.onnx.export(graph.eval(), inputs, input_names=names, output_names=["out"], dynamo=True,
                                  optimize=False, verbose=False).model_proto
    casts = []
    for weight in model.graph.initializer:
        if weight.name not in weights:
            continue
        for key, value in zip(("location", "offset", "length"), weights[weight.name]):
            weight.external_data.add(key=key, value=str(value))
        casts.append(onnx.helper.make_node("Cast", [f"{weight.name}.half"], [weight.name], to=onnx.TensorProto.FLOAT))
        weight.name, weight.data_type = f"{weight.name}.half", onnx.TensorProto.FLOAT16
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
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
    for part in ("transformer", "vae"):
        shutil.copy(Path(header["base"], part, "diffusion_pytorch_model.safetensors"), out / f"{part}.safetensors")
    for file, name in zip(sources, doses.values()):
        lora = {k: v.half().contiguous() for k, v in load_file(file).items()}  # in float16, like the base
        save_file(lora, out / name, lora_header(file))
    first = out / doses[min(doses)]

    names = [key.split(".", 1)[1].removesuffix(".lora_A.weight") for key in lora if key.endswith("lora_A.weight")]
    A, B = (torch.nn.ParameterList([lora[f"transformer.{name}.lora_{letter}.weight"].float() for name in names])
            for letter in "AB")
    scale = runs[0]["lora_alpha"] / runs[0]["lora_rank"]

    def velocity(noisy, text, timestep, reference):
        """noisy (2,T,C,H,W), text (2,L,D), timestep (2,), reference (1,1,C,H,W) -> velocity (2,T,C,H,W). Both halves
        of classifier-free guidance: [without the prompt | with it]. The weights are merged: W + (alpha / rank) B A."""
        merged, base = {}, dict(pipe.transformer.named_parameters())
        for name, a, b in zip(names, A, B):
            W = base[f"{name}.weight"]
            merged[f"{name}.weight"] = W + scale * (b.flatten(1) @ a.flatten(1)).view_as(W)
        return functional_call(pipe.transformer, merged, (noisy, text, timestep),
                               {"reference": reference, "return_dict": False})[0]
    weights, of_lora = tensors(out / "transformer.safetensors", "base."), tensors(first)
    for i, name in enumerate(names):
        weights |= {f"{letter}.{i}": of_lora[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB"}
    noisy, text = torch.randn(2, 5, 4, 16, 16), encode_prompt(pipe, ["", ""], "cpu")
    inputs = (noisy, text, torch.tensor([500, 500]), torch.randn(1, 1, 4, 16, 16))
    write_graph(Graph(velocity, base=pipe.transformer, A=A, B=B), inputs, ["noisy", "text", "timestep", "reference"],
                out / "transformer.onnx", weights)
    # A picture (1,1,3,H,W) in -1..1 -> its scaled latents (1,1,C,h,w); such of a video (1,T,C,h,w) -> (1,3,F,H,W).
    encoder = Graph(lambda x: encode_video(pipe.vae, x), vae=pipe.vae)
    decoder = Graph(lambda x: pipe.decode_latents(x), vae=pipe.vae)
    weights = tensors(out / "vae.safetensors", "vae.")
    write_graph(encoder, (torch.randn(1, 1, 3, SIZE, SIZE),), ["picture"], out / "encoder.onnx", weights)
    write_graph(decoder, (noisy[:1],), ["latents"], out / "decoder.onnx", weights)

    prompts = ["", *(with_reference_token(caption(f, d), "front") for f in range(len(FIELDS))
                     for d in range(len(DIRECTIONS)))]
    encode_prompt(pipe, prompts, "cpu").float().numpy().tofile(out / "prompts.f32")  # (1 + 8 * 4, L, D)
    pipe.scheduler.set_timesteps(cfg.steps)
    timesteps = pipe.scheduler.timesteps
    flags = [f"--{k} {runs[0][k]}" for k in ("image_frame", "steps", "seed") if k in runs[0]]
    (out / "models.json").write_text(json.dumps({
        "doses": doses, "lora": first.name, "guidance": float(header["guidance"]), "frames": FRAMES,
        "recipe": " ".join(["train.py --toy --p P", *flags]),
        "text": list(text.shape[1:]), "latents": list(noisy.shape[1:]), "fields": FIELDS, "colours": COLOURS,
        "directions": DIRECTIONS, "solid": SOLID.tolist(), "timesteps": timesteps.tolist(),
        "alpha_bar": [*pipe.scheduler.alphas_cumprod[timesteps].tolist(), 1.0]}))
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
