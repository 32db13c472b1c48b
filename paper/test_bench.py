"""The benchmark runs anywhere at a small size; its numbers are not tested."""
from paper import bench


def test_bench_runs(capsys):
    bench.main(bench.Config(layers=1, height=32, width=48, frames=9, rank=4, image_micro=2, warmup=0, repeats=2,
                            device="cpu"))
    said = capsys.readouterr().out
    assert "image: micro-batch 2 of 238 tokens" in said and "hours of this device" in said
    assert "video: micro-batch 1 of 247 tokens" in said  # 226 + 3 of 6 reference tokens + 3 latent frames of 6
