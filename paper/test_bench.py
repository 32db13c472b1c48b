"""The benchmark runs anywhere at a small size (its times are not tested); what it counts has known answers."""
import tests.common  # noqa: F401, before torch

from types import SimpleNamespace

import pytest
import torch

from model import add_lora, frame_size
from paper import bench


def test_bench_runs(capsys):
    bench.main(bench.Config(layers=1, height=32, width=48, frames=9, rank=4, image_micro=2, warmup=0, repeats=2,
                            device="cpu"))
    said = capsys.readouterr().out
    assert "image: micro-batch 2 of 238 tokens" in said and "hours of this device" in said
    assert "video: micro-batch 1 of 247 tokens" in said  # 226 + 3 of 6 reference tokens + 3 latent frames of 6


def test_memory_and_cost_are_counted(tmp_path, monkeypatch, capsys):
    """Two layers at 32x48: 2 bytes a weight, 16 a trained one, and inputs of 2 x 247 tokens of width 3072 in bf16."""
    monkeypatch.chdir(tmp_path)  # no run of the toy here
    bench.main(bench.Config(count=True, layers=2, height=32, width=48, frames=9, rank=4, image_micro=64,
                            video_micro=64))
    said = capsys.readouterr().out
    assert "video: micro-batch 64 of 247 tokens: inputs of 2 blocks 0.2 GB" in said
    counted = [line for line in said.splitlines() if "the block being recomputed" in line]
    inside = {line.split(":")[0]: float(line.split("recomputed ")[1].split()[0]) for line in counted}
    assert 20 < inside["video"] / (64 * 247 * 3072 * 2 / 1e9) < 60  # tensors of the block's width that it keeps
    assert inside["image"] < inside["video"]
    assert "counted per sample: 110.3 and 1440.9 TFLOP" in said and "measured on the toy" not in said


def test_cost_is_that_of_the_counted_model():
    """TFLOP of the card's performance sheet, counted on the meta device: 110.4 for a pair, 1440.9 for a clip."""
    assert bench.train_flops(226 + 2700) == pytest.approx(110.4, rel=2e-3)
    assert bench.train_flops(226 + 1350 * 14) == pytest.approx(1440.9, rel=2e-3)


def test_full_size_counts():
    """CogVideoX-5B on the meta device: the numbers of the design card."""
    transformer = bench.transformer_5b(42)
    assert sum(p.numel() for p in transformer.parameters()) == 5_570_283_072
    parameters = add_lora(transformer, 128, 64)
    assert sum(p.numel() for p in parameters) == 502_276_096 and len(parameters) == 2 * 338
    assert transformer.rotary_tables(14, 60, 90, "cpu")[0].shape == (14 * 1350, 64)
    assert frame_size(SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)) == (480, 720)
    lengths = []

    def note_length(module, args, kw):
        lengths.append(kw["encoder_hidden_states"].shape[1] + kw["hidden_states"].shape[1])
    transformer.transformer_blocks[-1].attn1.register_forward_pre_hook(note_length, with_kwargs=True)
    with torch.no_grad():
        for frames, keep in ((1, None), (13, None), (13, torch.arange(675)), (13, torch.arange(0))):
            latents = torch.empty(1, frames, 16, 60, 90, device="meta")  # 1 picture; 49 frames: 13 latent frames
            out = transformer(latents, torch.empty(1, 226, 4096, device="meta"), torch.empty(1, device="meta"),
                              reference=latents[:, :1], keep=keep).sample
            assert out.shape == latents.shape
    assert lengths == [226 + 1350 + 1350, 226 + 1350 + 17550, 226 + 675 + 17550, 226 + 17550]
