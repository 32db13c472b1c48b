"""Finds a base and a LoRA, on disk or on the hub, and says in one line why one cannot be used, before it is loaded."""
import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import T5Config, T5EncoderModel

from common.run import newest_checkpoint
from model import AUTHORS_LORA_FILE, LORA_FILE, PAPER_BASE, SubjectTransformer, lora_path

ROOT = Path(__file__).parents[1]  # of the repository


def find_lora(path=""):
    """The LoRA file of a file, folder or run, or of user/name or user/name/FILE.safetensors on the hub. With no path
    the newest checkpoint under out/, else toy/lora. FileNotFoundError names `path`."""
    if not path:
        newest = [newest_checkpoint(run) for run in Path("out").glob("*")]
        files = [step / LORA_FILE for step in newest if step is not None and (step / LORA_FILE).is_file()]
        return lora_path(max(files, key=lambda file: file.stat().st_mtime, default=ROOT / "toy/lora"))
    user, *rest = str(path).split("/")
    local = Path(path).exists() or user.strip(".~") == "" or Path(user).exists()  # a typing error is no hub id
    if local or not rest or len(rest) > 1 and not rest[-1].endswith(".safetensors"):
        return lora_path(newest_checkpoint(path) or path)
    for name in ["/".join(rest[1:])] if rest[1:] else [LORA_FILE, AUTHORS_LORA_FILE]:
        try:
            return Path(hf_hub_download(f"{user}/{rest[0]}", name))
        except Exception as e:  # no network, no such repository or file: each is an error of its own kind
            why = str(e).strip().splitlines()[0]
    raise FileNotFoundError(f"no LoRA at {path}, and the download of {name} from the hub failed: {why}")


def read_config(base):
    """The config of a base's transformer, without its weights.

    One line of FileNotFoundError when there is no such base, of ValueError when the method cannot use it."""
    base, local = str(base), (Path(base) / "model_index.json").is_file()
    if not local and (base.count("/") != 1 or Path(base).exists() or base.startswith((".", "/"))):
        raise FileNotFoundError(f"no base at {base}: expected a diffusers CogVideoX folder (with model_index.json) "
                                f"or a hub id such as {PAPER_BASE}")
    try:
        config = SubjectTransformer.load_config(base, subfolder="transformer")
    except OSError as e:
        raise download_failed(base, e)
    kind = config.get("_class_name")
    if kind not in ("CogVideoXTransformer3DModel", "SubjectTransformer"):
        raise ValueError(f"{base} is no CogVideoX (its transformer is a {kind}): use a base such as {PAPER_BASE}")
    reads, writes = config.get("in_channels", 16), config.get("out_channels", 16)  # diffusers' own defaults
    if reads != writes:
        raise ValueError(f"{base} is an image-to-video base (its transformer reads {reads} channels and writes "
                         f"{writes}): the method needs a text-to-video base such as {PAPER_BASE}")
    if config.get("patch_size_t") is not None:
        raise ValueError(f"{base} is a CogVideoX 1.5, whose tokens span two frames, so a reference cannot be frame 0: "
                         f"use a 1.0 base such as {PAPER_BASE}")
    return config


def download_failed(base, error):
    """What an OSError means when a base was to be loaded; of a folder it says enough itself."""
    if Path(base).is_dir():
        return error
    return FileNotFoundError(f"no folder {base}, and the download from the hub failed: {str(error).splitlines()[0]} "
                             f"Without network: hf download {base} --local-dir FOLDER elsewhere, then --base FOLDER")


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
