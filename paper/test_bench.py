"""The benchmark runs anywhere at a small size (its times are not tested); what it counts has known answers."""
import json

import pytest
import torch

from model import add_lora
from paper import bench


def test_bench_runs(tmp_path, monkeypatch):
    few = ["stock", "no lever", "all but compile"]  # counting takes seconds an arm
    monkeypatch.setattr(bench, "ARMS", {name: bench.ARMS[name] for name in few})
    bench.main(bench.Config(layers=1, heads=4, height=32, width=48, frames=9, rank=4, device="cpu", image_micro=2,
                            warmup=0, repeats=2, steps=2, json=str(tmp_path / "bench.json")))
    written = json.loads((tmp_path / "bench.json").read_text())
    for task, micro_batches in (("image", 3200 * 128), ("video", 800 * 32)):  # 256 pairs, two at a time here; 32 clips
        arms = written["steps"][task]
        assert list(arms) == few
        assert all(0 < row["p10"] <= row["seconds"] <= row["p90"] for row in arms.values())
        assert arms["stock"]["hours"] == pytest.approx(micro_batches * arms["stock"]["seconds"] / 3600)
        assert all(row["mfu"] <= row["hfu"] for row in arms.values())
        stock, ours, less = (row["tflop_per_s"] * row["seconds"] for row in arms.values())
        # Stock also projects the reference frame out, 2e-4 of these tiny frames' products.
        assert less < ours == pytest.approx(stock, 1e-3)
    assert list(written["rest"]) == [
        "optimiser step, fused", "PCGrad, two calls", "a checkpoint", "gradcos, a pair and a clip",
        "VAE: 16 pictures, whole", "VAE: decoding a clip, whole",
        "VAE: a clip, tiled", "a sample of 2 steps"]


def test_counts_at_full_size_are_those_of_the_documents(tmp_path, monkeypatch, capsys):
    """README, NOTES and TRIALS: TFLOP, bytes moved in a block, activations, memory, Eq. 3, A100-hours."""
    monkeypatch.setattr(bench, "COUNTED", ["stock", "all but compile"])
    monkeypatch.setattr(bench, "FITS", [bench.FITS[0], bench.FITS[-1]])
    bench.main(bench.Config(count=True, json=str(tmp_path / "count.json")))
    said, written = capsys.readouterr().out, json.loads((tmp_path / "count.json").read_text())
    numbers = [[row[k] for k in ("tflop", "gb_moved_per_block", "gb_peak")] for row in written["counted"]]
    assert numbers == [pytest.approx(row, abs=0.05) for row in (
        [110.4, 20.0, 1.9], [76.4, 11.4, 29.0], [1440.9, 125.5, 12.0], [1252.1, 98.7, 15.2])]
    assert [fit["gb"] for fit in written["fits"]] == pytest.approx([58.1, 20.2], abs=0.05)
    for line in ("| 169 | 34.600 |", "| 13.056 | 3.411 |", "| 1.632 | 1.126 |",
                 "1.27e+20 FLOP = 113 A100-hours at peak, so the paper's 288 mean 39%",
                 "= 91 A100-hours at peak, so the paper's 288 mean 32%"):
        assert line in said
    # Stock by hand. Forward: two per weight and token in a block's 12 D^2 weights and in the LoRA beside them (q, k, v,
    # out: D to D; ff: D to 4D and back), 4 tokens^2 D in attention. Backward: the linear layers' inputs once, LoRA
    # twice, attention 2.5 times; and the forward again for the recomputation.
    for tokens, (tflop, *_) in ((2926, numbers[0]), (19_126, numbers[2])):
        linear, lora, attention = 24 * 3072**2 * tokens, 2 * 128 * 18 * 3072 * tokens, 4 * tokens**2 * 3072
        by_hand = 42 * (2 * (linear + lora + attention) + linear + 2 * lora + 2.5 * attention) / 1e12
        assert tflop == pytest.approx(by_hand, rel=2e-3)


def test_counter_knows_a_small_product():
    """x w: two per product; bytes of two inputs and the output; the result alone is alive at the end."""
    x, w = torch.randn(4, 8), torch.randn(8, 16)
    with bench.Counter() as counter:
        y = x @ w
        z = y.t()  # a view: nothing moves
        del z
    assert counter.flops == 2 * 4 * 8 * 16 and counter.moved == 4 * (4 * 8 + 8 * 16 + 4 * 16)
    assert counter.peak == sum(counter.storages.values()) == 4 * y.numel()
    del y
    assert not counter.storages


def test_full_size_counts():
    """CogVideoX-5B on the meta device: the numbers of NOTES."""
    transformer = bench.transformer_5b()
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_283_072
    parameters = add_lora(transformer, 128, 64)
    assert sum(p.numel() for p in parameters) == 502_276_096 and len(parameters) == 2 * 338
    lengths = []

    def note_length(module, args, kw):
        lengths.append(kw["encoder_hidden_states"].shape[1] + kw["hidden_states"].shape[1])
    transformer.transformer_blocks[-1].attn1.register_forward_pre_hook(note_length, with_kwargs=True)
    with torch.no_grad():
        for frames, keep in ((1, None), (13, None), (13, torch.arange(675)), (13, torch.arange(0))):
            latents = torch.empty(1, frames, 16, 60, 90, device="meta")  # 1 picture; 49 frames: 13 latent frames
            transformer(latents, torch.empty(1, 226, 4096, device="meta"), torch.empty(1, device="meta"),
                        reference=latents[:, :1], keep=keep)
    assert lengths == [226 + 1350 + 1350, 226 + 1350 + 17550, 226 + 675 + 17550, 226 + 17550]
