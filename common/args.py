"""A script's arguments: its knobs, their bounds, the device, and the command line that sets them."""
import os
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser


def knob(default, text, *choices, trains=True):
    """A field of a script's Config: its default, its line of --help, and the values it can take, where it is a name.

    trains=False: what is trained does not depend on it, so a run goes on when it has changed."""
    metadata = {"help": text, "trains": trains} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(cfg, positive="", shares=""):
    """ValueError for the first knob of a Config that is not one of its choices or out of its bounds.

    positive, shares: names in one string. Shares are in [0, 1]. No other number may be negative, infinite or nan, and a
    seed stays below torch's limit of 63 bits."""
    for f in fields(cfg):
        name, value, choices = f.name, getattr(cfg, f.name), f.metadata.get("choices", ())
        if choices and value not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, got {value!r}")
        if f.type not in (int, float):
            continue
        for wrong, rule in ((name in shares.split() and not 0 <= value <= 1, "be in [0, 1]"),
                            (not abs(value) < float("inf"), "be a number"),
                            (name in positive.split() and value <= 0, "be positive"),
                            (value < 0, "not be negative"),
                            (name == "seed" and value >= 2**63, "be below 2^63")):
            if wrong:
                raise ValueError(f"--{name} must {rule}, got {value}")


def refuse_overwriting(inputs, outputs):
    """ValueError when a file that will be written is one that is read, under whatever name or link."""
    inputs = [Path(path) for path in inputs if path and Path(path).is_file()]
    for file in map(Path, outputs):
        for path in inputs:
            if file.exists() and file.samefile(path):
                raise ValueError(f"--out: {file} would be written over {path}, which is read: choose another --out")


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


def use_device(name=""):
    """The same, as this process's own: its GPU is chosen, and float32 products take TF32 (A.2)."""
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def command_line(main, Config, description, argv=None, positional=None, out_of_memory="", presets=None):
    """Parse the knobs of dataclass `Config` from the command line and call main(config).

    `presets(toy, recipe)` gives the defaults that these two knobs put in the place of others; `positional` names the
    list knob that leading words without -- fill; `out_of_memory` says which flags save memory. A user's mistake (bad
    flag, value or file) is one line and exit status 1 or 2, Ctrl-C is one line and 130; with TRACEBACK=1 in the
    environment each is a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may hold what the terminal cannot show
    words = f"[{positional} ...] " if positional else ""
    # HfArgumentParser hands all metadata to argparse, which does not know "trains".
    known = [(f.name, f.type, field(default=f.default, default_factory=f.default_factory,
                                    metadata={k: v for k, v in f.metadata.items() if k != "trains"}))
             for f in fields(Config)]
    parser = HfArgumentParser(make_dataclass(Config.__name__, known), allow_abbrev=False,
                              description=description.split("\n\n")[0],
                              usage=f"%(prog)s {words}[--knob value ...]      (--help explains the knobs)")
    argv = sys.argv[1:] if argv is None else argv
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    if presets:  # a flag given by hand wins over them, and --help shows them
        asked, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
        parser.set_defaults(**presets(asked.toy, asked.recipe))
    try:
        main(Config(**vars(parser.parse_args(argv))))
    except BrokenPipeError:  # "| head" has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as e:  # OSError: no such file, a full disk
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(e, KeyboardInterrupt):
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            sys.exit(130)
        if isinstance(e, torch.OutOfMemoryError):
            advice = f". Try {out_of_memory}" if out_of_memory else ""
            e = f"the GPU's memory is full ({str(e).split('. ')[0]}){advice}"
        lines = str(e).strip().splitlines()
        if "Original Traceback" in str(e):  # it comes from a process that reads data: its last line says what is wrong
            lines = lines[-1:]
        sys.exit(f"{parser.prog}: error: {' '.join(lines)}")
