"""What only a GPU can show, on one of them: `pytest -m gpu`, eight minutes at most (not verified: none was at hand).

A GPU repeats numbers to its rounding only, so each test states its tolerance. GPU_TESTS_ON=cpu tries the tests
themselves on a CPU, in bfloat16 as on a GPU and with shorter runs; what a CPU has not got is skipped."""
from tests.shared import BASE, ROOT, go_back, log_of, randomise_lora

import importlib.util
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from toy import creatures
from common import media
from common import base
import gradcos
import model
import sample
import train
from paper import bench
from toy import world
from common.watch import sum_over_ranks

ON_CPU = os.environ.get("GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
REF = str(ROOT / "toy/refs/creature-0.png")
needs_cuda = pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(),
                                reason="torch sees no GPU here; on a machine with one: pytest -m gpu")
pytestmark = [pytest.mark.gpu, needs_cuda]
needs_a_gpu = pytest.mark.skipif(ON_CPU, reason="a CPU has no memory of its own to offload from")
needs_torchao = pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="--int8: pip install torchao")


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    if ON_CPU:
        monkeypatch.setattr(base.compute_dtype, "__code__", (lambda device: torch.bfloat16).__code__)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the toy's base and references, where every test below trains."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy").mkdir()
    for name in ("base", "lora", "refs"):
        (folder / "toy" / name).symlink_to(ROOT / "toy" / name)
    with pytest.MonkeyPatch.context() as patch:
        if ON_CPU:
            for name in ("pairs", "clips", "val_pairs", "val_clips"):
                patch.setitem(creatures.DATA, name, partial(creatures.DATA[name], n=8))
        yield folder


def go(toy, monkeypatch, **knobs):
    """A short run of train.py --toy; its losses. Micro-batches and LoRA dropout as in the real run."""
    monkeypatch.chdir(toy)
    small = dict(toy=True, steps=6, save_every=3, val_every=0, sample_every=0, p=0.5, device=DEVICE.type,
                 image_micro=8, video_micro=8, lora_dropout=0.1, view_drop=0.3)
    if ON_CPU:
        small |= dict(image_batch=4, image_micro=4, video_batch=2, video_micro=2)
    cfg = train.Config(**{**small, **knobs})
    train.main(cfg)
    return [line["loss"] for line in log_of(f"out/{cfg.name}")]


def test_the_toy_trains_to_the_scores_of_a_cpu(toy, monkeypatch):
    """README's second command. Five seeds on a CPU: 89.6 +- 6.6 move, cells 93.7 +- 1.2, identity 99.6 +- 0.9; three
    standard deviations are allowed."""
    monkeypatch.chdir(toy)
    short = dict(steps=2, val_every=2, sample_every=0, image_batch=4, video_batch=2)
    train.main(train.Config(toy=True, device=DEVICE.type, **(short if ON_CPU else {})))
    scores, _ = world.score_lora("out/toy", 4 if ON_CPU else 96, steps=2 if ON_CPU else 20)
    print(scores)
    if not ON_CPU:
        assert scores["moves"] > 69 and scores["cells"] > 90 and scores["identity_16"] > 96
        assert Path("out/toy/samples/creature-0-000450.png").is_file()


def test_a_killed_run_goes_on(toy, monkeypatch):
    """Equal losses to 2 %: attention's backward adds up in another order each time."""
    whole = go(toy, monkeypatch, name="whole")
    go_back("out/whole", 3, "out/killed")
    assert go(toy, monkeypatch, name="killed") == pytest.approx(whole, rel=2e-2)


@pytest.mark.parametrize("mode", ["attention", "full"])
def test_checkpointing_changes_no_loss(toy, monkeypatch, mode):
    """Equal losses to 2 %, and the memory that is kept is less."""
    plain = go(toy, monkeypatch, name="none", image_checkpointing="none", video_checkpointing="none")
    again = go(toy, monkeypatch, name=mode, image_checkpointing=mode, video_checkpointing=mode)
    assert again == pytest.approx(plain, rel=2e-2)


@needs_a_gpu
def test_compiled_blocks_have_the_same_losses(toy, monkeypatch):
    """Equal losses to 2 %, without LoRA dropout: its masks come from another stream."""
    flags = dict(steps=3, lora_dropout=0.0)
    plain = go(toy, monkeypatch, name="eager", **flags)
    assert go(toy, monkeypatch, name="compiled", compile=True, **flags) == pytest.approx(plain, rel=2e-2)


def test_one_rank_of_nccl(tiny, inputs, tmp_path):
    """DDP's gradient is the model's own, to 1e-5 in float32, and the log's sums cross the group."""
    ours, _ = tiny
    x, text, t, ref = (part.to(DEVICE) for part in inputs)
    parameters = model.add_lora(ours.to(DEVICE), 4, 2)
    randomise_lora(ours.cpu())
    ours.to(DEVICE)
    expected = torch.autograd.grad(ours(x, text, t, reference=ref).sample.square().mean(), parameters)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    backend = "gloo" if ON_CPU else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(ours, gradient_as_bucket_view=True, init_sync=False)
        ddp(x, text, t, reference=ref).sample.square().mean().backward()
        sums = sum_over_ranks({"a": torch.ones(2, 4, device=DEVICE), "b": torch.ones(1, device=DEVICE)})
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(parameters, expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    assert sums["a"].shape == (2, 4) and sums["b"].item() == 1


def video_of(tmp_path, **flags):
    out = tmp_path / "a.mp4"
    sample.main(sample.Config(ref=REF, lora=str(ROOT / "toy/lora"), steps=4, device=DEVICE.type, out=str(out), **flags))
    return np.stack([np.asarray(frame) for frame in media.load_clip(out, 9, 4)]).astype(int)


@needs_a_gpu
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_weights_give_the_same_video(tmp_path, offload):
    """Equal to 8 of 255, the mean to 1: the VAE decodes in tiles where they fit."""
    difference = np.abs(video_of(tmp_path, offload=offload) - video_of(tmp_path))
    assert difference.max() <= 8 and difference.mean() <= 1


@needs_a_gpu
@needs_torchao
def test_int8_trains_and_samples(toy, tmp_path, monkeypatch):
    """The first losses equal to 5 %: eight bits are coarser than bfloat16."""
    plain = go(toy, monkeypatch, name="bf16", steps=2)
    assert go(toy, monkeypatch, name="int8", steps=2, int8=True) == pytest.approx(plain, rel=5e-2)
    assert len(video_of(tmp_path, int8=True)) == 9


def test_the_cosine_is_that_of_a_cpu(tiny, inputs):
    """In float32, to 1e-3, on the device and with the flat gradients in RAM."""
    ours, _ = tiny
    model.add_lora(ours, 4, 2)
    randomise_lora(ours)
    measured = []
    for device, flat in (("cpu", "cpu"), (DEVICE, DEVICE), (DEVICE, "cpu")):
        ours.to(device)
        x, text, t, ref = (part.to(device) for part in inputs)

        def losses_of(task):
            frames = x[:, :1] if task == "image" else x
            yield ours(frames, text, t, reference=ref).sample.square().mean()
        named = [(n, p) for n, p in ours.named_parameters() if p.requires_grad]
        measured.append(gradcos.measure(losses_of, named, flat))
    for other in measured[1:]:
        assert other["cosine"] == pytest.approx(measured[0]["cosine"], abs=1e-3)
        assert other["norm_vid"] == pytest.approx(measured[0]["norm_vid"], rel=1e-3)


@pytest.mark.parametrize("where", [DEVICE.type, "cpu"])
def test_pcgrad_projects_on_the_device(where):
    """Two conflicting gradients, known by hand: (1, 0) against (-1, 1) leaves (1/2, 1/2)."""
    parameter = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
    pcgrad = gradcos.PCGrad(4, torch.device(where))
    for task, gradient in (("video", [-1.0, 1.0]), ("image", [1.0, 0.0])):
        parameter.grad = torch.tensor(gradient, device=DEVICE)
        pcgrad([parameter], task)
    assert parameter.grad.device.type == DEVICE.type and pcgrad.buffer[0][1].device.type == where
    assert torch.allclose(parameter.grad.cpu(), torch.tensor([0.5, 0.5]))


def test_pcgrad_and_the_cosine_in_a_run(toy, monkeypatch):
    assert all(np.isfinite(go(toy, monkeypatch, name="watched", pcgrad=4, gradcos_every=3, steps=4)))
    assert all(-1 <= line["cosine"] <= 1 for line in log_of("out/watched", "gradcos.jsonl"))


def test_the_bench_at_two_layers(tmp_path):
    """Of the real width and frame size; on a CPU a small one. Its file is there after each part."""
    small = dict(heads=4, height=32, width=48, frames=9, rank=4) if ON_CPU else {}
    out = tmp_path / "bench.json"
    short = dict(layers=2, warmup=1, repeats=4, pictures=2, steps=2, **small)
    bench.main(bench.Config(**short, device=DEVICE.type, json=str(out)))
    assert out.is_file()


def test_the_base_loads_in_the_devices_dtype():
    pipe = base.load_pipeline(BASE, base.compute_dtype(DEVICE), DEVICE)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe._execution_device.type == DEVICE.type
