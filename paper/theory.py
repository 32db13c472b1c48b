"""Appendix C, simulated: what the paper's local quadratic model says about the cosine of the two gradients.

    python -m paper.theory --out assets/theory.png
"""
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from common.args import command_line, knob
from gradcos import cosine, project


def descend(H, start, p, eta, steps, optima=(0, 0), rng=None, noise=0.0):
    """Gradient descent in the model of C.2: L_i = 1/2 (theta - o_i)' H_i (theta - o_i), g_i = H_i (theta - o_i).

    H: (H_1, H_2), each (n,n). start (n,). optima: (o_1, o_2), which the paper has both at 0. rng None follows the mean
    update (Eq. 13), else flips the coin of Eq. 7; `noise` is the standard deviation of a mini-batch's error on each
    coordinate of its gradient. Returns g_1 and g_2 (noise-free) at each step, (steps + 1, n) each.
    """
    theta, history = start.astype(float), []
    for _ in range(steps + 1):
        g = [H[i] @ (theta - optima[i]) for i in (0, 1)]
        history.append(g)
        update = (1 - p) * g[0] + p * g[1] if rng is None else g[int(rng.random() < p)]
        theta = theta - eta * (update + (noise * rng.standard_normal(len(start)) if noise else 0))
    return np.stack(history, axis=1)


def cosines(g_1, g_2):
    """The cosine at each step, float64; the gradients shrink to 1e-100 and below, so each is scaled first."""
    unit = [g / np.abs(g).max(1, keepdims=True).clip(1e-300) for g in (g_1, g_2)]
    return (unit[0] * unit[1]).sum(1) / (np.linalg.norm(unit[0], axis=1) * np.linalg.norm(unit[1], axis=1))


def draw_theory():
    """What Appendix C proves, what follows from the same model besides, and where its proof does not reach."""
    rng = np.random.default_rng(0)
    n, steps, p, eta = 12, 300, 0.2, 0.5
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    l_1, l_2, start = rng.uniform(0.05, 1, n), rng.uniform(0, 1, n), rng.standard_normal(n)
    H = np.diag(l_1), np.diag(l_2)

    axis = axes[0, 0]
    g_1, g_2 = descend(H, start, p, eta, steps)
    slowest = ((1 - p) * l_1 + p * l_2).min()
    bound = (l_1 * l_2).max() * (start @ start) * (1 - eta * slowest) ** (2 * np.arange(steps + 1))
    axis.semilogy((g_1 * g_2).sum(1), label=r"$A_t = \langle g_1, g_2\rangle$: never negative")
    axis.semilogy(bound, "--", label="the bound of Eq. 14")
    axis.set(title="C.3.1: the inner product goes to zero ...", xlabel="step")

    axis = axes[1, 0]
    pairs = rng.standard_normal((200, 2, 50))
    pairs[:, 1] -= rng.uniform(0, 2, (200, 1)) * pairs[:, 0]
    pairs = [(a, b) for a, b in torch.from_numpy(pairs) if a @ b < 0]
    change = [((1 - p) * project(a, b) + p * project(b, a) - (mix := (1 - p) * a + p * b)).norm() / mix.norm()
              for a, b in pairs]
    axis.plot([cosine([a], [b])[0] for a, b in pairs], change, ".", label="random conflicting pairs")
    axis.plot([-1, 0], [1, 0], linewidth=0.8, color="black", label="|cosine|")
    axis.set(title="C.5.1: PCGrad changes the update\nby exactly |cosine|", xlabel="cosine")

    def plot_cosine(axis, *model, **look):
        axis.plot(cosines(*descend(*model)), **look)
        axis.set(xlabel="step", ylim=(-1.05, 1.05))

    flat = np.diag([0.1, 0.3]), np.diag([1.0, 0.0])  # flat for the video loss along the mixture's slowest mode
    for q, colour in ((0.2, "tab:blue"), (0.0, "tab:orange")):
        plot_cosine(axes[0, 1], H, start, q, eta, steps, color=colour, label=f"p = {q}")
        plot_cosine(axes[0, 1], flat, np.ones(2), q, eta, steps, color=colour, linestyle="--",
                    label=f"p = {q}, video loss flat in a mode")
    axes[0, 1].set_title("... but the cosine goes to +1, with p or without,\n"
                         "where both losses are curved; else anywhere")

    curved = np.diag([0.2, 0.5, 1.0]), np.diag([1.0, 0.5, 0.0])  # the video loss is flat along the fastest mode
    limit = 2 / (0.2 + 1.0)
    for size in (0.5, 0.9 * limit, 1.1 * limit):
        plot_cosine(axes[0, 2], curved, np.ones(3), 0, size, 120, label=rf"$\eta$ = {size:.2f}")
    axes[0, 2].set(title=rf"C.4.1 says 0 here: true only for $\eta$ > {limit:.2f}" + "\n"
                   r"= 2/($\lambda_{min} + \lambda_{max}$); else the slowest mode wins", xlabel="step, p = 0")

    Q = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in (0, 1)]
    turned = [q @ np.diag(np.geomspace(1e-3, 1, n)) @ q.T for q in Q]
    plot_cosine(axes[1, 1], turned, start, p, eta, 2000, label="mean update", zorder=3)
    for seed in range(3):
        plot_cosine(axes[1, 1], turned, start, p, eta, 2000, (0, 0), np.random.default_rng(seed), linewidth=0.6,
                    label="the coin" if seed == 0 else None, color="tab:orange")
    axes[1, 1].set_title("Hessians that do not commute: outside the\n"
                         "proof; conflict can occur, and the coin stays rough")

    optima = rng.standard_normal((2, n))
    plot_cosine(axes[1, 2], turned, start, p, eta, 2000, optima, label="mean update", zorder=3)
    for noise in (0.0, 1.0):
        plot_cosine(axes[1, 2], turned, start, p, 0.1, 2000, optima, np.random.default_rng(0), noise, linewidth=0.6,
                    label=f"the coin, gradient noise {noise:g}")
    axes[1, 2].set_title("different optima: the mean update ends where\n"
                         r"$g_{img} = -\frac{p}{1-p}\, g_{vid}$, cosine -1")
    for axis in axes.flat:
        axis.axhline(0, color="black", linewidth=0.5)
        axis.legend(fontsize=8, frameon=False)
        axis.title.set_fontsize(10)
    return figure


@dataclass
class Config:
    out: str = knob("theory.png", "picture to write")


def main(cfg):
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw_theory().savefig(cfg.out, dpi=130)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    command_line(main, Config, __doc__)
