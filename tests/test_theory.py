"""The cosine and PCGrad against closed forms; Appendix C's model; the figures."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gradcos
from paper import theory
from paper.theory import cosines, descend


def test_measured_cosine_is_that_of_the_summed_gradients():
    """Linear losses, whose gradients are their coefficients; two micro-batches of each task. c gets no gradient."""
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    coefficients = {"image": [[3.0, 0, 0, 0], [0, 0, 0, -4.0]], "video": [[0, 0, 0, 5.0], [0, 12.0, 0, 0]]}

    def losses_of(task):
        return (torch.cat([a, b]) @ torch.tensor(row) for row in coefficients[task])
    assert gradcos.measure(losses_of, [a, b, c]) == pytest.approx(dict(cosine=-20 / 65, norm_img=5, norm_vid=13))
    assert gradcos.measure(losses_of, [c]) == dict(cosine=0, norm_img=0, norm_vid=0)  # no division by zero
    assert a.grad is None and b.grad is None  # training cannot see that somebody measured


def test_pcgrad_closed_form():
    """Lemma C.5.1, sharper than the paper has it: |g_PC - g_mix| / |g_mix| is |cos| exactly."""
    g_img, g_vid = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g_vid -= 0.4 * g_img
    mix, cos = 0.8 * g_img + 0.2 * g_vid, F.cosine_similarity(g_img, g_vid, dim=0)
    projected = 0.8 * gradcos.project(g_img, g_vid) + 0.2 * gradcos.project(g_vid, g_img)
    assert cos < -0.2 and torch.isclose((projected - mix).norm() / mix.norm(), -cos)
    assert torch.equal(gradcos.project(g_img, -g_vid), g_img)  # no conflict: untouched


def test_pcgrad_projects_against_the_mean_of_the_other_tasks_last_gradients():
    weight, pcgrad = torch.nn.Parameter(torch.zeros(1, 2)), gradcos.PCGrad(3)
    for task, before, after in (
            ("image", (1, 0), (1, 0)),     # nothing of the other task yet
            ("image", (1, 2), (1, 2)),
            ("video", (-3, 1), (-2, 2)),   # against the mean (1, 1): dot -2, squared norm 2
            ("video", (-2, 1), (-2, 1)),   # (1, 0) has left, (1, 2) does not conflict
            ("image", (3, 1), (3 - 2.5 * 6.5 / 7.25, 1 + 6.5 / 7.25))):  # the raw ones' mean (-2.5, 1)
        weight.grad = torch.tensor([before], dtype=torch.float32)
        pcgrad([weight], task)
        assert weight.grad[0].tolist() == pytest.approx(after)


# ---- Appendix C ------------------------------------------------------------------------------------------------------

def test_inner_product_decays_as_C31_says_and_is_never_negative():
    """... with the mean update, and with the coin: in the paper's own model PCGrad never acts."""
    rng, t = np.random.default_rng(0), np.arange(201)[:, None]
    l_1, l_2, start = rng.uniform(0.05, 1, 8), rng.uniform(0, 1, 8), rng.standard_normal(8)
    mean, coin = (np.prod(descend((np.diag(l_1), np.diag(l_2)), start, 0.2, 0.5, 200, rng=flips), 0).sum(1)
                  for flips in (None, rng))
    decay = (1 - 0.5 * (0.8 * l_1 + 0.2 * l_2)) ** (2 * t)
    assert np.allclose(mean, (l_1 * l_2 * decay * start**2).sum(1), rtol=1e-9, atol=0)
    assert (mean <= (l_1 * l_2).max() * (start @ start) * decay.max(1)).all()  # Eq. 14
    assert (mean >= 0).all() and (coin >= 0).all()


FLAT, C_41 = ([0.1, 0.3], [1.0, 0.0]), ([0.2, 0.5, 1.0], [1.0, 0.5, 0.0])  # each mode's curvature in either loss


@pytest.mark.parametrize("modes, p, eta, optima, limit", [
    (FLAT, 0.2, 0.5, (0, 0), 0), (FLAT, 0.0, 0.5, (0, 0), 1), (C_41, 0.2, 0.5, (0, 0), 1), (C_41, 0.0, 1.6, (0, 0), 1),
    (C_41, 0.0, 1.8, (0, 0), 0), (([0.2, 0.9], [0.7, 0.4]), 0.2, 0.5, (2, -1), -1)])
def test_where_the_cosine_ends(modes, p, eta, optima, limit):
    """The slowest mode decides it. C.4.1 has the fastest: that needs a step size above 2 / (l_min + l_max) = 1.67. At
    p = 0.2 FLAT's slowest is the second, where g_vid = 0. Different optima end in opposite gradients."""
    H = [np.diag(curvatures) for curvatures in modes]
    g_1, g_2 = descend(H, np.ones(len(H[0])), p, eta, 1000, optima)
    assert abs(cosines(g_1, g_2)[-1] - limit) < 1e-6
    assert np.allclose((1 - p) * g_1[-1], -p * g_2[-1], atol=1e-9)


# ---- the figures -----------------------------------------------------------------------------------------------------

def test_figures_show_means_over_seeds_at_the_steps_that_all_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, p, seed, phi in (("a", 0.5, 0, [0.1, 1.1, 2.1]), ("b", 0.5, 1, [0.3, 1.3]), ("c", 0.2, 0, [-0.2])):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"p": p, "seed": seed, "name": name}))
        lines = [dict(step=i, cosine=cosine, norm_img=2.0 + seed, norm_vid=6.0) for i, cosine in enumerate(phi)]
        Path(name, "gradcos.jsonl").write_text("\n".join(map(json.dumps, lines)))
    gradcos.main(gradcos.Config(runs=["a", "b", "c"], out="all.png"))
    theory.main(theory.Config(out="theory.png"))
    assert {"all.png", "theory.png"} <= {file.name for file in Path().iterdir()}
    left, right = gradcos.draw_figure_5(plt, gradcos.read_runs(["a", "b", "c"])).axes
    assert [(line.get_label(), *line.get_xydata().flatten()) for line in left.get_lines()[1:]] == [
        ("p = 0.5 (2 seeds)", 0, pytest.approx(0.2), 1, pytest.approx(1.2)), ("p = 0.2", 0, pytest.approx(-0.2))]
    assert [line.get_ydata()[0] for line in right.get_lines()] == [2.5, 6, 2, 6]
