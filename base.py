"""Loads a CogVideoX base: device, dtype, 8-bit weights, VAE tiles, attention kernels. Nothing here is the paper's."""
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, TorchAoConfig
from diffusers.utils import is_torchao_available
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel

from model import PAPER_BASE, REFERENCE_TOKEN, SubjectTransformer


def find_device(name=""):
    """The torch.device of --device: empty takes cuda when there is one. Under torchrun each rank has its own GPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cuda or cpu, got {name!r}")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here")
    return device


def attention_order(device):
    """A context in which attention takes cuDNN's kernel first, then FlashAttention; on GPUs before Hopper nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def tile_vae(vae):
    """Let the VAE work in overlapping tiles, one sample at a time, to save memory (A.2).

    Where the tiles' stride is not a whole number of latent pixels (tiny VAEs) diffusers would return another size: then
    it goes on with whole frames, and a line says so."""
    vae.enable_slicing()
    vae.enable_tiling()
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    for axis in ("height", "width"):
        pixels, latents, overlap = (getattr(vae, f"tile_{name}_{axis}")
                                    for name in ("sample_min", "latent_min", "overlap_factor"))
        if (int(pixels * (1 - overlap)) != shrink * (latents - int(latents * overlap))       # tiled_encode's step, and
                or pixels - int(pixels * overlap) != shrink * int(latents * (1 - overlap))):  # tiled_decode's
            print(f"this VAE's tiles of {pixels} pixels do not fit together: no tiling", file=sys.stderr)
            return vae.disable_tiling()


def without_weights(base, part):
    """The transformer or text encoder of a base on the meta device: its shapes alone. Only its config is read."""
    with torch.device("meta"):
        if part == "transformer":
            return SubjectTransformer.from_config(SubjectTransformer.load_config(base, subfolder=part))
        return T5EncoderModel(T5Config.from_pretrained(base, subfolder=part))


def refuse_cpu(base, asked):
    """ValueError when billions of parameters would run on a CPU because torch sees no GPU. `asked`: the --device."""
    if asked or torch.cuda.is_available():
        return
    size = sum(p.numel() for p in without_weights(base, "transformer").parameters())
    if size > 1e9:
        why = ("this torch is built for CPUs" if torch.version.cuda is None else
               f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}" if "CUDA_VISIBLE_DEVICES" in os.environ
               else "does nvidia-smi show the driver?")
        raise ValueError(f"{base} has {size / 1e9:.1f} billion parameters, and torch {torch.__version__} sees no GPU "
                         f"({why}). --device cpu runs it all the same, slowly")


def sampling_dtype(base, device):
    """float32 on a CPU; on a GPU bfloat16, or float16 for CogVideoX-2b (no RoPE), which was trained in it."""
    if device.type != "cuda":
        return torch.float32
    try:
        config = SubjectTransformer.load_config(base, subfolder="transformer")
    except OSError:  # load_pipeline says it better
        return torch.bfloat16
    return torch.bfloat16 if config.get("use_rotary_positional_embeddings") else torch.float16


def load_pipeline(base, dtype=torch.float32, device="cpu", int8=False, without=(), asked="cpu"):
    """The stock CogVideoXPipeline of a diffusers folder or hub id, with our transformer and a tokenizer that knows
    <cls>. One line of FileNotFoundError when there is no such base.

    int8 (torchao, weight-only): the frozen transformer takes half its memory in bf16, 5.6 GB for CogVideoX-5B.
    without: parts, "transformer" or "text_encoder", whose weights are not read (11 and 9.5 GB): they stay on the meta
    device. asked: the user's --device, for refuse_cpu."""
    local = (Path(base) / "model_index.json").is_file()
    if not local and (str(base).count("/") != 1 or Path(base).exists() or str(base).startswith((".", "/"))):
        raise FileNotFoundError(f"no base at {base}: expected a diffusers CogVideoX folder (with model_index.json) "
                                f"or a hub id such as {PAPER_BASE}")
    quantization = {}
    if int8:
        if not is_torchao_available():  # not in requirements.txt: its mere presence makes diffusers slow and noisy
            raise ValueError("--int8 needs torchao: pip install torchao==0.18.0")
        from torchao.quantization import Int8WeightOnlyConfig
        quantization["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["proj_out"])
    try:
        refuse_cpu(base, asked)
        parts = {part: without_weights(base, part) for part in without}
        if "transformer" not in parts:
            parts["transformer"] = SubjectTransformer.from_pretrained(base, subfolder="transformer", dtype=dtype,
                                                                      **quantization)
        pipe = CogVideoXPipeline.from_pretrained(base, **parts, dtype=dtype)
    except OSError as e:
        if local:
            raise
        raise FileNotFoundError(f"no folder {base}, and the download from the hub failed: {str(e).splitlines()[0]} "
                                f"Without network: hf download {base} --local-dir FOLDER elsewhere, then --base FOLDER")
    if int8:
        follow_autocast(pipe.transformer)
    pipe.tokenizer.add_tokens([REFERENCE_TOKEN], special_tokens=True)
    rows = pipe.text_encoder.get_input_embeddings().num_embeddings
    if len(pipe.tokenizer) > rows:  # T5-XXL has 32128 rows and <cls> takes id 32100: nothing is resized
        raise ValueError(f"{base}: the text encoder has {rows} embedding rows, no spare one for {REFERENCE_TOKEN}")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    return pipe if without else pipe.to(device)


def follow_autocast(model):
    """torchao's linear layers ignore autocast and return the input's dtype, float32 after each norm: cast the input."""
    def cast(module, args):
        device = args[0].device.type
        return (args[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else None
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(cast)


def frame_size(pipe):
    """(height, width) in pixels that the base was made for: 480 x 720 for CogVideoX-5B."""
    c = pipe.transformer.config
    return c.sample_height * pipe.vae_scale_factor_spatial, c.sample_width * pipe.vae_scale_factor_spatial
