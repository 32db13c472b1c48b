"""The cosine and PCGrad against two backward passes and closed forms; Appendix C's model; the figures."""
from tests.shared import BASE, T, randomise_lora

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline

import gradcos
from model import add_lora, v_loss
from paper import theory
from paper.theory import cosines, descend, draw_theory
from common.run import command_line

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# ---- the cosine and PCGrad -------------------------------------------------------------------------------------------

@pytest.fixture
def two_losses(tiny, inputs):
    """A transformer with a random LoRA, and a function that makes an image loss and a video loss on it."""
    ours, _ = tiny
    parameters = add_lora(ours, 2, 1.0)
    randomise_lora(ours)
    x, text, t, reference = inputs
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    frames = {"image": 1, "video": T}

    def losses_of(task):
        n = frames[task]
        for i in range(2):  # two micro-batches of one sample
            s = slice(i, i + 1)
            yield v_loss(ours, scheduler, x[s, :n], text[s], t[s], noise[s, :n], reference[s]).sum() / 2
    return ours, parameters, losses_of


def test_measured_cosine_is_that_of_two_backward_passes(two_losses):
    ours, parameters, losses_of = two_losses
    named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
    measured = gradcos.measure(losses_of, named)
    assert all(p.grad is None for p in parameters)  # training cannot see that somebody measured
    ours.enable_gradient_checkpointing()
    ours.train()
    checkpointed = gradcos.measure(losses_of, named)

    by_hand = {}
    for task in ("image", "video"):
        sum(losses_of(task)).backward()
        by_hand[task] = {n: p.grad.clone().double() for n, p in named}
        ours.zero_grad()
    flat = {task: torch.cat([g.flatten() for g in grads.values()]) for task, grads in by_hand.items()}
    for result in (measured, checkpointed):
        assert np.isclose(result["cosine"], F.cosine_similarity(flat["image"], flat["video"], dim=0), atol=1e-6)
        assert np.allclose([result["norm_img"], result["norm_vid"]], [flat["image"].norm(), flat["video"].norm()])
    block = {task: torch.cat([g.flatten() for n, g in grads.items() if "transformer_blocks.1." in n])
             for task, grads in by_hand.items()}
    assert np.allclose(measured["groups"]["block 1"], [F.cosine_similarity(block["image"], block["video"], dim=0),
                                                       block["image"].norm(), block["video"].norm()], atol=1e-6)


def test_layer_groups_partition(tiny):
    ours, _ = tiny
    add_lora(ours, 2, 1.0)
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    groups = gradcos.layer_groups(names)
    kinds = [i for g in ("attention", "feed-forward", "norms", "embeddings") for i in groups[g]]
    assert sorted(kinds) == list(range(len(names)))
    blocks = sum((g for name, g in groups.items() if name.startswith("block ")), [])
    assert len(blocks) == len(names) - len(groups["embeddings"]) and "block 2" in groups


def test_pcgrad_closed_form():
    """Lemma C.5.1, sharper than the paper has it: |g_PC - g_mix| / |g_mix| is |cos| exactly."""
    g = torch.Generator().manual_seed(0)
    for p in (0.2, 0.5, 0.9):
        g_img, g_vid = torch.randn(2, 1000, generator=g, dtype=torch.float64)
        g_vid -= 0.4 * g_img
        mix = (1 - p) * g_img + p * g_vid
        projected = (1 - p) * gradcos.project(g_img, g_vid) + p * gradcos.project(g_vid, g_img)
        cos = F.cosine_similarity(g_img, g_vid, dim=0)
        assert cos < -0.2 and torch.isclose((projected - mix).norm() / mix.norm(), -cos)
        assert abs(gradcos.project(g_img, g_vid) @ g_vid) < 1e-9
        assert torch.equal(gradcos.project(g_img, -g_vid), g_img)  # no conflict: untouched


def test_pcgrad_buffer():
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    pcgrad = gradcos.PCGrad(3, "cpu")

    def step(task, *gradient):
        weight.grad = torch.tensor([gradient])
        pcgrad([weight], task)
        return weight.grad[0].tolist()
    assert step("image", 1.0, 0.0) == [1.0, 0.0]           # nothing of the other task yet
    assert step("image", 1.0, 2.0) == [1.0, 2.0]
    assert np.allclose(step("video", -3.0, 1.0), [-2.0, 2.0])  # against the mean (1, 1): dot -2, squared norm 2
    assert step("video", -2.0, 1.0) == [-2.0, 1.0]         # (1, 0) has left, (1, 2) does not conflict
    assert np.allclose(step("image", 3.0, 1.0), [3 - 2.5 * 6.5 / 7.25, 1 + 6.5 / 7.25])  # raw (-2.5, 1)
    again = gradcos.PCGrad(3, "cpu")
    again.load_state_dict(pcgrad.state_dict())
    assert [t for t, _ in again.buffer] == ["video", "video", "image"]  # three: the oldest have left
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(again.buffer, pcgrad.buffer))


# ---- Appendix C ------------------------------------------------------------------------------------------------------

@pytest.fixture
def quadratic():
    """Commuting Hessians (l_1, l_2 on the diagonal) and a starting point."""
    g = np.random.default_rng(0)
    return g.uniform(0.05, 1, 8), g.uniform(0, 1, 8), g.standard_normal(8)


def test_inner_product_decays_as_C31_says_and_is_never_negative(quadratic):
    l_1, l_2, c = quadratic
    p, eta, t = 0.2, 0.5, np.arange(201)[:, None]
    g_1, g_2 = descend((np.diag(l_1), np.diag(l_2)), c, p, eta, 200)
    mu = (1 - p) * l_1 + p * l_2
    inner = (g_1 * g_2).sum(1)
    assert np.allclose(inner, (l_1 * l_2 * (1 - eta * mu) ** (2 * t) * c**2).sum(1), rtol=1e-9, atol=0)
    assert (inner <= (l_1 * l_2).max() * (c @ c) * (1 - eta * mu.min()) ** (2 * t[:, 0])).all()
    assert (inner >= 0).all()  # so in the paper's own model no conflict occurs, and PCGrad never acts
    coin = descend((np.diag(l_1), np.diag(l_2)), c, p, eta, 200, rng=np.random.default_rng(1))
    assert (np.prod(coin, 0).sum(1) >= 0).all()


def test_cosine_goes_to_one_with_and_without_the_video_loss(quadratic):
    l_1, l_2, c = quadratic
    for p in (0.2, 0.0):
        phi = cosines(*descend((np.diag(l_1), np.diag(l_2)), c, p, 0.5, 5000))
        assert phi[0] < 0.9 and phi[-1] > 1 - 1e-9


def test_a_mode_that_is_flat_for_the_video_loss_decides_the_cosine():
    """Modes (0.1, 1) and (0.3, 0): the mixture's slowest is the second, where g_vid = 0; at p = 0 it is the first."""
    H = np.diag([0.1, 0.3]), np.diag([1.0, 0.0])
    with_p, without = (cosines(*descend(H, np.ones(2), p, 0.5, 1000)) for p in (0.2, 0.0))
    decay = (1 - 0.5 * 0.28) / (1 - 0.5 * 0.24)  # closed form: mode 1 against mode 2
    expected = 0.1 * decay ** 1000 / np.hypot(0.1 * decay ** 1000, 0.3)
    assert with_p[-1] == pytest.approx(expected, rel=1e-6) and with_p[-1] < 1e-9 and without[-1] > 1 - 1e-9


def test_the_slowest_mode_survives_in_C41():
    """C.4.1 has the fastest: that needs a step size above 2/(l_min + l_max)."""
    l_1, l_2 = np.array([0.2, 0.5, 1.0]), np.array([1.0, 0.5, 0.0])
    for eta, limit in ((0.5, 1.0), (1.6, 1.0), (1.8, 0.0)):  # 2 / 1.2 = 1.67; the paper's limit is sign(1.0 * 0.0) = 0
        phi = cosines(*descend((np.diag(l_1), np.diag(l_2)), np.ones(3), 0.0, eta, 600))
        assert abs(phi[-1] - limit) < 1e-6


def test_different_optima_end_in_opposite_gradients(quadratic):
    l_1, l_2, c = quadratic
    g_1, g_2 = descend((np.diag(l_1), np.diag(l_2 + 0.1)), c, 0.2, 0.5, 5000, optima=(c + 1, 2 - c))
    assert np.allclose(g_1[-1], -0.25 * g_2[-1]) and cosines(g_1, g_2)[-1] < -1 + 1e-9
    assert np.linalg.norm(g_1[-1]) > 0.1  # neither vanishes


# ---- the figures -----------------------------------------------------------------------------------------------------

@pytest.fixture
def written(tmp_path, monkeypatch):
    """Two seeds of a run and one with another p, with known measurements at steps 0 and 5."""
    monkeypatch.chdir(tmp_path)
    for name, p, seed, cosine in (("a", 0.5, 0, 0.1), ("b", 0.5, 1, 0.3), ("c", 0.2, 0, -0.2)):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"p": p, "seed": seed, "name": name, "cache": name}))
        for file in ("gradcos", "val"):
            with open(f"{name}/{file}.jsonl", "w") as f:
                for step in (0, 5):
                    numbers = {"cosine": cosine + step, "norm_img": 2.0 + seed, "norm_vid": 6.0 + seed,
                               "groups": {"norms": [cosine, 1, 2], "block 0": [cosine / 2, 1, 2],
                                          "block 1": [0.9, 1, 2]}}
                    if file == "val":
                        numbers = {task: {"loss": loss + seed, "loss_by_timestep": [loss, None, loss + 2, loss + 3]}
                                   for task, loss in (("image", 10.0), ("video", 20.0))}
                    f.write(json.dumps({"step": step, **numbers}) + "\n")
    return ["a", "b", "c"]


def lines_of(axis):
    """{label: (steps, values)} of a plot's lines, in order; those without a name by their number."""
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) and line.get_label() != "_child0"]
    return [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def test_seeds_of_a_run_share_a_label(written):
    groups = gradcos.read_runs(written, "gradcos.jsonl")
    assert {label: len(seeds) for label, seeds in groups.items()} == {"p = 0.5": 2, "p = 0.2": 1}


def test_figure_5_shows_cosine_and_norms_as_means_over_seeds(written):
    left, right = gradcos.draw_figure_5(plt, gradcos.read_runs(written, "gradcos.jsonl")).axes[:2]
    assert [(label, steps, pytest.approx(values)) for label, steps, values in lines_of(left)] == [
        ("p = 0.5 (2 seeds)", [0, 5], [0.2, 5.2]), ("p = 0.2", [0, 5], [-0.2, 4.8])]
    assert [values for *_, values in lines_of(right)] == [[2.5] * 2, [6.5] * 2, [2, 2], [6, 6]]
    styles = [line.get_linestyle() for line in right.get_lines()]
    assert styles == ["-", "--"] * 2  # |g_img|, |g_vid|
    (low, high), = {(v[:, 1].min(), v[:, 1].max()) for v in [left.collections[0].get_paths()[0].vertices]}
    assert (low, high) == pytest.approx((0.1, 5.3))  # the band: lowest and highest seed


def test_a_band_covers_the_steps_that_all_seeds_have():
    drawn = {}
    axis = SimpleNamespace(plot=lambda steps, mean, **style: drawn.update(zip(steps, mean.tolist())),
                           fill_between=lambda steps, low, high, **style: None)
    seeds = [[{"step": 0, "v": 1.0}, {"step": 5, "v": 9.0}], [{"step": 0, "v": 3.0}]]
    gradcos.band(axis, seeds, lambda record: record["v"], color="black")
    assert drawn == {0: 2.0}


def test_layer_groups_are_drawn_by_kind_and_by_depth(written):
    axes = gradcos.draw_groups(plt, gradcos.read_runs(written, "gradcos.jsonl")).axes
    assert [(label, pytest.approx(values)) for label, _, values in lines_of(axes[0])] == [("norms", [0.2, 0.2])]
    assert np.allclose(axes[1].images[0].get_array().T, [[0.1, 0.9]] * 2)  # by step: block 0, block 1


def test_losses_are_drawn_whole_and_by_quarter(written):
    image, video = gradcos.draw_losses(plt, gradcos.read_runs(written, "val.jsonl")).axes
    for axis, loss in ((image, 10), (video, 20)):
        drawn = [values[0] for *_, values in lines_of(axis)]
        assert np.array_equal(drawn[:5], [loss + 0.5, loss, np.nan, loss + 2, loss + 3], equal_nan=True)


def test_three_pictures_are_written(written):
    gradcos.main(gradcos.Config(runs=written, out="figures/all.png"))
    assert sorted(f.name for f in Path("figures").iterdir()) == ["all-groups.png", "all-losses.png", "all.png"]


def test_the_figure_of_the_theory_shows_the_closed_forms():
    """The inner product below its bound, the limits of C.4.1, |cosine| of C.5.1, and -1 for different optima."""
    inner, _, restart, pcgrad, _, optima = draw_theory(plt).axes
    (_, _, product), (_, _, bound) = lines_of(inner)[:2]
    assert (np.array(product) >= 0).all() and (np.array(product) <= np.array(bound)).all()
    assert [values[-1] for *_, values in lines_of(restart)[:3]] == pytest.approx([1, 1, 0], abs=0.1)
    _, cosine, change = lines_of(pcgrad)[0]
    assert change == pytest.approx([-c for c in cosine])
    assert lines_of(optima)[0][2][-1] == pytest.approx(-1, abs=0.05)


def test_a_figure_of_the_theory_is_written(tmp_path):
    theory.main(theory.Config(out=str(tmp_path / "figures/theory.png")))
    assert (tmp_path / "figures/theory.png").is_file()


def test_a_run_without_measurements_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "out/coin").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: no gradcos.jsonl in out/coin") as stop:
        command_line(gradcos.main, gradcos.Config, "", ["out/coin"], positional="runs")
    assert "\n" not in str(stop.value)
