"""The benchmark runs anywhere at a small size; its numbers are not tested."""
from paper import bench


def test_bench_runs(capsys):
    bench.main(bench.Config(layers=1, height=32, width=48, frames=9, rank=4, image_micro=2, warmup=0, repeats=2,
                            device="cpu"))
    said = capsys.readouterr().out
    assert "image: micro-batch 2 of 238 tokens" in said and "hours of this device" in said
    assert "video: micro-batch 1 of 247 tokens" in said  # 226 + 3 of 6 reference tokens + 3 latent frames of 6


def test_memory_is_counted(capsys):
    """Two layers at 32x48: 2 bytes a weight, 16 a trained one, and inputs of 2 x 247 tokens of width 3072 in bf16."""
    bench.main(bench.Config(count=True, layers=2, height=32, width=48, frames=9, rank=4, image_micro=64,
                            video_micro=64))
    said = capsys.readouterr().out
    assert "video: micro-batch 64 of 247 tokens: inputs of 2 blocks 0.2 GB" in said
    inside = {line.split(":")[0]: float(line.split("recomputed ")[1].split()[0]) for line in said.splitlines()[1:]}
    assert 20 < inside["video"] / (64 * 247 * 3072 * 2 / 1e9) < 60  # tensors of the block's width that it keeps
    assert inside["image"] < inside["video"]
