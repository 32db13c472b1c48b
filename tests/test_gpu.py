"""What only a GPU can show, on one of them: `pytest -m gpu`, eight minutes at most (not verified: none was at hand).

A GPU repeats numbers to its rounding: each test has a tolerance. With GPU_TESTS_ON=cpu a CPU tries them, shortened."""
import os

import numpy as np
import pytest
import torch

import model
import sample
import train
from common import base, media
from common.log import sum_over_ranks
from paper import bench
from tests.shared import LORA, REF, go_back, log_of, randomise_lora
from toy import world

ON_CPU = os.environ.get("GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu" and not ON_CPU, reason="torch sees no GPU here")]
FEW = dict(image_batch=4, image_micro=4, video_batch=2, video_micro=2) if ON_CPU else {}
if ON_CPU:  # everyone who asks is told what a GPU computes in
    base.compute_dtype.__code__ = (lambda device: torch.bfloat16).__code__
needs_a_gpu = pytest.mark.skipif(ON_CPU, reason="a CPU has no memory of its own to offload from")
needs_torchao = pytest.mark.skipif(not base.is_torchao_available(), reason="--int8: pip install torchao")


def go(name, **knobs):
    """A short run of train.py --toy; its losses. Micro-batches and LoRA dropout as in the real run."""
    usual = dict(steps=6, save_every=3, val_every=0, p=0.5, lora_dropout=0.1, view_drop=0.3, image_micro=8,
                 video_micro=8)
    train.main(train.Config(toy=True, name=name, **usual | FEW | knobs))
    return [line["loss"] for line in log_of(f"out/{name}")]


def test_the_toy_trains_to_the_scores_of_a_cpu(newcomer):
    """README's second command. Five seeds on a CPU: 89.6 +- 6.6 move, cells 93.7 +- 1.2, identity 99.6 +- 0.9; three
    standard deviations are allowed."""
    train.main(train.Config(toy=True, **(dict(steps=2, val_refs="", val_every=2, **FEW) if ON_CPU else {})))
    scores, _ = world.score_lora("out/toy", 4 if ON_CPU else 96, steps=2 if ON_CPU else 20)
    assert ON_CPU or scores["moves"] > 69 and scores["cells"] > 90 and scores["identity_16"] > 96, scores


def test_a_killed_run_with_pcgrad_goes_on_and_measures_cosines(newcomer):
    """Equal losses to 2 %: attention's backward adds up in another order each time."""
    whole = go("whole", pcgrad=4, gradcos_every=3)
    go_back("out/whole", 3, "out/killed")
    assert go("killed", pcgrad=4, gradcos_every=3) == pytest.approx(whole, rel=2e-2)
    assert all(-1 <= line["cosine"] <= 1 for line in log_of("out/killed", "gradcos.jsonl"))


@pytest.mark.parametrize("lever, plain, tolerance", [
    (dict(image_checkpointing="attention", video_checkpointing="attention"), {}, 2e-2),  # the toy's plain is "none"
    (dict(image_checkpointing="full", video_checkpointing="full"), {}, 2e-2),
    pytest.param(dict(compile=True, lora_dropout=0.0), dict(lora_dropout=0.0), 2e-2, marks=needs_a_gpu),
    pytest.param(dict(int8=True), {}, 5e-2, marks=[needs_a_gpu, needs_torchao])])
def test_what_saves_time_or_memory_changes_no_loss(newcomer, lever, plain, tolerance):
    """Equal losses to 2 %, with 8 bits to 5 %. Compiled dropout has masks from another stream: there it is off."""
    assert go(str(lever), steps=3, **lever) == pytest.approx(go(str(plain), steps=3, **plain), rel=tolerance)


def test_one_rank_of_nccl(tiny, inputs, tmp_path):
    """DDP's gradient is the model's own, to 1e-5 in float32, and the log's sums cross the group."""
    parameters = model.add_lora(tiny[0], 4, 2)
    randomise_lora(tiny[0])
    ours, (x, text, t, ref) = tiny[0].to(DEVICE), (part.to(DEVICE) for part in inputs)
    expected = torch.autograd.grad(ours(x, text, t, reference=ref).sample.square().mean(), parameters)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo" if ON_CPU else "cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(ours, gradient_as_bucket_view=True, init_sync=False)
        ddp(x, text, t, reference=ref).sample.square().mean().backward()
        assert sum_over_ranks({"a": torch.ones(2, 4, device=DEVICE)})["a"].tolist() == [[1] * 4] * 2
        torch.distributed.barrier()  # gloo's threads let go of the sum, for which they need Python's lock: else a hang
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(parameters, expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@needs_a_gpu
def test_offloaded_weights_give_the_same_video(tmp_path):
    """Equal to 8 of 255, the mean to 1: the VAE decodes in tiles where they fit."""
    videos = []
    for offload in ("none", "model", "sequential"):
        out = tmp_path / f"{offload}.mp4"
        sample.main(sample.Config(ref=REF, lora=LORA, steps=4, ref_guidance=1.5, offload=offload, out=str(out)))
        videos.append(np.stack([np.asarray(frame, int) for frame in media.load_clip(out, 9, 4)]))
    for video in videos[1:]:
        assert np.abs(video - videos[0]).max() <= 8 and np.abs(video - videos[0]).mean() <= 1


def test_the_bench_at_two_layers(tmp_path):
    """Of the real width and frame size; on a CPU a small one. Its file is there after each part."""
    small = dict(heads=4, height=32, width=48, frames=9, rank=4) if ON_CPU else {}
    bench.main(bench.Config(layers=2, warmup=1, repeats=4, steps=2, **small, json=str(tmp_path / "bench.json")))
    assert (tmp_path / "bench.json").is_file()
