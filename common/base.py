"""Loads a CogVideoX base: dtype, 8-bit weights, VAE tiles, attention kernels. The method is not here."""
import sys
import warnings
from contextlib import nullcontext

import torch
from diffusers import CogVideoXPipeline, TorchAoConfig
from diffusers.utils import is_torchao_available
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.find import download_failed, read_config, refuse_cpu, without_weights
from model import REFERENCE_TOKEN, VAE_PIXELS, SubjectTransformer

warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks`")  # of diffusers' own call


def compute_dtype(device):
    """The dtype that a device computes in: bfloat16 on a GPU, float32 on a CPU. Every script asks here."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device):
    """A context in which the float32 LoRA computes in the device's dtype, as the frozen base does."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def attention_order(device):
    """A context in which attention takes cuDNN's kernel first, then FlashAttention; on GPUs before Hopper nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def tile_vae(vae):
    """Let the VAE work in overlapping tiles, one sample at a time, to save memory (A.2)."""
    vae.enable_slicing()
    vae.enable_tiling()


def tile_large_clips(vae, height, width, frames):
    """Tile where a clip is more than one call of the VAE can take (model.VAE_PIXELS)."""
    if frames * height * width > VAE_PIXELS:
        tile_vae(vae)


def load_pipeline(base, dtype=torch.float32, int8=False, without=(), asked="cpu"):
    """The stock CogVideoXPipeline of a diffusers folder or hub id, with our transformer and a tokenizer that knows
    <cls>. One line of FileNotFoundError when there is no such base.

    int8 (torchao, weight-only): the frozen transformer takes half its memory in bf16, 5.6 GB for CogVideoX-5B.
    without: parts, "transformer" or "text_encoder", whose weights are not read (11 and 9.5 GB): they stay on the meta
    device. asked: the user's --device, for refuse_cpu."""
    read_config(base)  # a base that cannot be used is refused before gigabytes are loaded
    quantization = None
    if int8:
        if not is_torchao_available():  # not in requirements.txt: its mere presence makes diffusers slow and noisy
            raise ValueError("--int8 needs torchao: pip install torchao==0.18.0")
        from torchao.quantization import Int8WeightOnlyConfig
        quantization = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["proj_out"])
    try:
        refuse_cpu(base, asked)
        parts = {part: without_weights(base, part) for part in without}
        if "transformer" not in parts:
            parts["transformer"] = SubjectTransformer.from_pretrained(base, subfolder="transformer", dtype=dtype,
                                                                      quantization_config=quantization)
        pipe = CogVideoXPipeline.from_pretrained(base, **parts, dtype=dtype)
    except OSError as e:
        raise download_failed(base, e)
    if int8:
        follow_autocast(pipe.transformer)
    pipe.tokenizer.add_tokens([REFERENCE_TOKEN], special_tokens=True)
    rows = pipe.text_encoder.get_input_embeddings().num_embeddings
    if len(pipe.tokenizer) > rows:  # T5-XXL has 32128 rows and <cls> takes id 32100: nothing is resized
        raise ValueError(f"{base}: the text encoder has {rows} embedding rows, no spare one for {REFERENCE_TOKEN}")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    return pipe


def follow_autocast(model):
    """torchao's linear layers ignore autocast and return the input's dtype, float32 after each norm: cast the input."""
    def cast(module, args):
        device = args[0].device.type
        return (args[0].to(torch.get_autocast_dtype(device)),) if torch.is_autocast_enabled(device) else None
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(cast)


def warn_of_another_size(pipe, height, width, frames):
    """One line when videos get another size or length than the base was made for: they often fall apart."""
    made_for = (*frame_size(pipe), pipe.transformer.config.sample_frames)
    if (height, width, frames) != made_for and frames > 1:
        print(f"warning: {width}x{height} and {frames} frames, but the base was made for {made_for[1]}x{made_for[0]} "
              f"and {made_for[2]} frames: videos may fall apart", file=sys.stderr)


def frame_size(pipe):
    """(height, width) in pixels that the base was made for: 480 x 720 for CogVideoX-5B."""
    c = pipe.transformer.config
    return c.sample_height * pipe.vae_scale_factor_spatial, c.sample_width * pipe.vae_scale_factor_spatial
