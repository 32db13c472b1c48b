"""The paper's explanation, measured: do the gradients of the two tasks conflict? (Sec. 4, Appendix B)

    python train.py --toy --gradcos_every 25        # measures while it trains: out/RUN/gradcos.jsonl
    python gradcos.py out/RUN [out/RUN ...]         # draws Figure 5: the cosine left, the two norms right

Runs that differ only in their seed are drawn as one line, their mean, in a band from the lowest to the highest.
Also here: PCGrad (Sec. 4.3, B.3), the method that the paper's coin is compared with.
"""
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from common.args import command_line, knob
from common.run import read_json
from common.run import records as read_records


# ---- the measurement (B.1) -------------------------------------------------------------------------------------------

def cosine(g_img, g_vid, eps=1e-12):
    """phi = <g_img, g_vid> / (|g_img| |g_vid| + eps), and the two norms (4.1, B.1).

    A gradient is given as its pieces, one tensor per parameter in a fixed order: the flat vector, never copied. The
    sums are taken in float64: 500 million float32 products would lose digits. Returns (phi, |g_img|, |g_vid|).
    """
    def dot(a, b):
        return sum(x.flatten().double() @ y.flatten().double() for x, y in zip(a, b))
    norm_img, norm_vid = dot(g_img, g_img).sqrt(), dot(g_vid, g_vid).sqrt()
    phi = dot(g_img, g_vid) / (norm_img * norm_vid + eps)
    return phi.item(), norm_img.item(), norm_vid.item()


def flat_gradient(losses, parameters):
    """The gradient of the sum of `losses` over all ranks, as one float32 vector (sum of numel,) in RAM (B.1).

    losses: an iterator of scalars; each graph is freed before the next one is built. autograd.grad leaves `.grad` and
    DDP's hooks alone, so this is B.1's pre-sync gradient, and does not affect training. A parameter without a
    gradient counts as zero.
    """
    flat = torch.zeros(sum(p.numel() for p in parameters))
    pieces = split(flat, parameters)
    for loss in losses:
        for piece, g in zip(pieces, torch.autograd.grad(loss, parameters, allow_unused=True)):
            if g is not None:
                piece += g.flatten().cpu()
    if dist.is_initialized():
        dist.all_reduce(flat)
    return flat


def split(flat, parameters):
    """The flat vector as one view per parameter."""
    return flat.split([p.numel() for p in parameters])


def measure(losses_of, parameters):
    """One measurement: {"cosine", "norm_img", "norm_vid"}.

    losses_of(task) iterates over the scalar losses of the fixed held-out batch of "image" or "video", this rank's
    share. parameters: what is trained. The two flat gradients have 2 GB each at rank 128 on CogVideoX-5B.
    """
    g_img, g_vid = (split(flat_gradient(losses_of(task), parameters), parameters) for task in ("image", "video"))
    phi, norm_img, norm_vid = cosine(g_img, g_vid)
    return {"cosine": phi, "norm_img": norm_img, "norm_vid": norm_vid}


# ---- PCGrad (4.3, B.3) -----------------------------------------------------------------------------------------------

def project(g, other, eps=1e-12):
    """Eq. 5: g without its component against `other`; g itself where they do not conflict. Flat vectors."""
    conflict = torch.dot(g, other).clamp(max=0)  # 0 without a conflict: a branch would wait for the GPU
    return torch.addcmul(g, conflict / (torch.dot(other, other) + eps), other, value=-1)


class PCGrad:
    """PCGrad with a buffer (B.3): a step has one task's gradient, the other's comes from earlier steps.

    Called between backward and clipping, it projects this step's gradient against the mean of the other task's
    gradients in the buffer (the last `size` steps, this one included), once there are any. Both tasks are projected
    (Eq. 5, C.5); as the coin takes an image step with probability 1-p, the mean update is near C.5's
    (1-p) g~_img + p g~_vid: the other task's gradient is some steps old, and often there is none yet. The buffer holds
    gradients as they came, in float32, averaged over ranks: `size` x 2 GB at full size, on their device.
    """

    def __init__(self, size):
        self.buffer = deque(maxlen=size)

    def __call__(self, parameters, task):
        flat = torch.cat([p.grad.flatten() for p in parameters])
        self.buffer.append((task, flat))
        others = [g.to(flat.device) for name, g in self.buffer if name != task]
        if others:
            mean = torch.zeros_like(flat)
            for g in others:
                mean.add_(g, alpha=1 / len(others))
            flat = project(flat, mean)
            for p, piece in zip(parameters, split(flat, parameters)):
                p.grad.copy_(piece.view_as(p))

    def state_dict(self):
        return [(task, g.cpu()) for task, g in self.buffer]

    def load_state_dict(self, state):
        self.buffer.extend(state)


# ---- the figures -----------------------------------------------------------------------------------------------------

@dataclass
class Config:
    runs: list[str] = knob([], "runs (out/NAME) trained with --gradcos_every")
    out: str = knob("gradcos.png", "picture to write")


COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f"]  # for colour-blind eyes too


def read_runs(folders):
    """{label: one list of records per seed}. Runs whose settings differ only in the seed share a label."""
    configs, records = [], []
    for folder in folders:
        file = Path(folder, "gradcos.jsonl")
        if not file.is_file():
            raise FileNotFoundError(f"no gradcos.jsonl in {folder}: was it trained with --gradcos_every?")
        config = read_json(Path(folder) / "config.json")
        # The cache of latents follows from the data sets, which are compared themselves.
        configs.append({k: v for k, v in config.items() if k not in ("seed", "cache", "name", "not_trained")})
        records.append(read_records(file))
        if not records[-1]:
            raise ValueError(f"{file} holds no whole measurement")
    differ = [k for k in configs[0] if any(c.get(k) != configs[0][k] for c in configs)]
    groups = {}
    for folder, config, record in zip(folders, configs, records):
        label = ", ".join(f"{k} = {config.get(k)}" for k in differ) or Path(folders[0]).name
        groups.setdefault(label, []).append(record)
    return groups


def band(axis, seeds, value, **style):
    """Mean over seeds of value(record), against the step, in a band from the lowest to the highest."""
    steps = sorted(set.intersection(*({r["step"] for r in records} for records in seeds)))
    table = torch.tensor([[value(r) for r in records if r["step"] in steps] for records in seeds])
    axis.fill_between(steps, table.amin(0).numpy(), table.amax(0).numpy(), color=style["color"], alpha=0.2, linewidth=0)
    axis.plot(steps, table.mean(0).numpy(), **style)


def draw_figure_5(plt, groups):
    """Cosine left, norms right, as in Figure 5 (and 9 and 10)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.axhline(0, color="black", linewidth=0.6)
    for (label, seeds), colour in zip(groups.items(), COLOURS * 9):
        n = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
        band(left, seeds, lambda r: r["cosine"], color=colour, label=label + n)
        image, video = (r"$\|g_{img}\|$", r"$\|g_{vid}\|$") if colour == COLOURS[0] else (None, None)  # named once
        band(right, seeds, lambda r: r["norm_img"], color=colour, label=image)
        band(right, seeds, lambda r: r["norm_vid"], color=colour, linestyle="--", label=video)
    largest = max(abs(r["cosine"]) for seeds in groups.values() for records in seeds for r in records)
    left.set(xlabel="step", ylabel=r"cosine of $g_{img}$ and $g_{vid}$", ylim=(-1.1 * largest, 1.1 * largest))
    right.set(xlabel="step", ylabel="gradient norm", yscale="log")
    for axis in (left, right):
        axis.legend(fontsize=8, frameon=False)
    return figure


def main(cfg):
    if not cfg.runs:
        raise ValueError("no runs: pass out/RUN [out/RUN ...]")
    import matplotlib.pyplot as plt  # only here: training does not need it
    plt.switch_backend("agg")  # no window
    groups = read_runs(cfg.runs)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw_figure_5(plt, groups).savefig(cfg.out, dpi=130)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    command_line(main, Config, __doc__, positional="runs")
