"""What makes a step cheaper changes neither losses nor gradients, and does what it says: counted, never timed."""
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from diffusers import CogVideoXPipeline
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode

import model
import sample
from common import base
from common.run import records
from model import add_lora, v_loss
from tests.shared import BASE, LORA, REF, TORCHRUN, T, command, randomise_lora, run


@pytest.fixture
def step(tiny, inputs):
    """A function: the loss of one micro-batch of a model, of step.model for one. step.parameters are trained."""
    ours, scheduler = tiny[0].train(), CogVideoXPipeline.from_pretrained(BASE).scheduler
    latents, text, timestep, reference = inputs
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

    def step(model, frames=T, keep=None):
        return v_loss(model, scheduler, latents[:, :frames], text, timestep, noise[:, :frames], reference, keep).mean()
    step.model, step.parameters = ours, add_lora(ours, 4, 2)
    randomise_lora(ours)
    return step


# ---- recomputing, compiling, dtypes, kernels -------------------------------------------------------------------------

class Calls(TorchDispatchMode):
    """Counts the calls of attention's kernels, of matrix products and of casts."""
    attention = products = casts = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.attention += op in model.ATTENTION
        self.products += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.casts += op is torch.ops.aten._to_copy.default
        return op(*args, **(kwargs or {}))


def test_checkpointing_recomputes_what_it_says(step):
    """"full" runs the forward of each of the three blocks again, "attention" the same without its attention."""
    counts = [Calls() for _ in range(3)]
    for step.model.checkpointing, calls in zip(("none", "attention", "full"), counts):
        with calls:
            torch.autograd.grad(step(step.model), step.parameters)
    none, attention, full = counts
    assert (none.attention, attention.attention, full.attention) == (3, 3, 6)
    assert none.products < attention.products <= full.products


def test_compiled_blocks_under_ddp_have_the_same_gradients_and_one_graph_per_shape(step, tmp_path):
    micros = [("none", 1, None), ("attention", 1, torch.arange(0)), ("none", T, None), ("full", T, torch.arange(5))]
    expected = [step(step.model, *micro) for step.model.checkpointing, *micro in micros]
    whole = torch.autograd.grad(sum(expected), step.parameters)
    graphs, store = torch._dynamo.utils.counters["stats"], torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(step.model, gradient_as_bucket_view=True, init_sync=False)
        # All of the compiler but its last part, which takes minutes on a CPU.
        with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")):
            step.model.compile_blocks()
        for (step.model.checkpointing, *micro), loss in zip(micros, expected):
            before = graphs["unique_graphs"]
            with nullcontext() if loss is expected[-1] else ddp.no_sync():  # as in the loop
                compiled = step(ddp, *micro)
                compiled.backward()
            assert abs(compiled - loss) < 1e-5 * loss
            assert 1 <= graphs["unique_graphs"] - before <= 2  # not one per block
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(step.parameters, whole):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_lora_inputs_are_rounded_once(tiny, inputs):
    """Under autocast, whose norms give float32 on CUDA: the same loss bit for bit, and fewer casts to bfloat16."""
    ours, (latents, text, timestep, reference) = tiny[0].to(torch.bfloat16).train(), inputs
    parameters, norm, results = add_lora(ours, 4, 2), torch.nn.functional.layer_norm, []
    randomise_lora(ours)

    def full_norm(x, shape, weight=None, bias=None, eps=1e-5):  # as autocast does on CUDA
        return norm(x.float(), shape, *(w if w is None else w.float() for w in (weight, bias)), eps)
    for rounded in (True, False):  # ours, then peft's
        for module in ours.modules():
            if isinstance(module, model.LoraLayer):
                module.cast_input_dtype_enabled = not rounded
            elif isinstance(module, model.CogVideoXLayerNormZero) and not rounded:
                module._forward_hooks.clear()
        with patch.object(torch.nn.functional, "layer_norm", full_norm), Calls() as calls:
            with torch.autocast("cpu", torch.bfloat16):
                loss = ours(latents, text, timestep, reference=reference).sample.float().square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        results.append((loss.detach(), torch.cat([g.flatten() for g in gradients]), calls.casts))
    (loss, gradient, casts), (peft_loss, peft_gradient, peft_casts) = results
    assert torch.equal(loss, peft_loss) and (gradient - peft_gradient).norm() < 0.01 * peft_gradient.norm()
    assert casts < 0.9 * peft_casts


def test_attention_order_is_for_hopper(monkeypatch):
    usual = SDPBackend(_cur_sdpa_kernel_backends(with_priority=True)[0])
    for kind, capability, first in (("cpu", None, usual), ("cuda", (8, 0), usual),
                                    ("cuda", (9, 0), SDPBackend.CUDNN_ATTENTION)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        with base.attention_order(torch.device(kind)):
            assert _cur_sdpa_kernel_backends(with_priority=True)[0] == first


# ---- ranks, sampling -------------------------------------------------------------------------------------------------

SPIES = """
import os, torch, train
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.optimizer import register_optimizer_step_pre_hook
no_sync, alone = DDP.no_sync, []  # micro-batches of this step without a sum over ranks
def spy_on_no_sync(self):
    alone.append(1)
    return no_sync(self)
def spy_on_step(optimizer, *_):
    gradients = [p.grad for group in optimizer.param_groups for p in group['params']]
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    with open('spy-' + os.environ['RANK'], 'a') as file:  # a file each: two ranks' prints can share a line
        print(len(alone), norm, {g.untyped_storage().data_ptr() for g in gradients}, file=file)
    alone.clear()
DDP.no_sync = spy_on_no_sync
register_optimizer_step_pre_hook(spy_on_step)
train.command_line(train.main, train.Config, '', presets=train.presets)
"""


def test_ranks_sum_gradients_once_a_step_in_ddps_own_memory(knobs, tmp_path):
    """Two ranks, five steps. Micro-batches of 8 pairs are cut to 4; a clip at a time makes two on each rank."""
    (tmp_path / "spies.py").write_text(SPIES)
    words = command(knobs, "spies.py", name="x", steps=5, image_micro=8, video_micro=1)
    r = run(*TORCHRUN, *words, cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.count("--image_micro 8 is now 4") == 1, r.stderr
    tasks = [line["task"] for line in records(tmp_path / "out/x/log.jsonl")]
    spied = [[line.split(" ", 2) for line in (tmp_path / f"spy-{rank}").read_text().splitlines()] for rank in (0, 1)]
    for steps in spied:
        assert [int(alone) for alone, _, _ in steps] == [{"image": 0, "video": 1}[task] for task in tasks]
        assert len({storages for _, _, storages in steps[2:]}) == 1  # the gradients' are the buckets'
    assert set(tasks) == {"image", "video"} and [s[1] for s in spied[0]] == [s[1] for s in spied[1]]


def test_a_lora_is_merged_for_sampling_unless_it_acts_on_some_tokens_only(tmp_path):
    for scope in ("all", "reference"):
        transformer = base.load_pipeline(BASE).transformer
        add_lora(transformer, 4, 2, scope=scope)
        model.save_lora(transformer, tmp_path / scope, base=BASE)
        loaded = sample.load(lora=str(tmp_path / scope))[0].transformer
        assert any("lora_" in name for name, _ in loaded.named_parameters()) == (scope == "reference")


def test_prompts_and_the_reference_are_encoded_once_and_a_rank_without_prompts_ends(tmp_path, monkeypatch):
    """T5 sees each of three prompts and the negative one once, the VAE the picture. Videos are decoded one by one."""
    (tmp_path / "prompts.txt").write_text("a creature walks up\na creature stands\na creature walks left\n")
    calls, pictures, decoded, load = [], [], [], sample.load

    def load_and_count(*args, **kwargs):
        pipe, header = load(*args, **kwargs)
        pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        pipe.vae.encoder.register_forward_hook(lambda *_: pictures.append(1))
        pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output[0])))
        return pipe, header
    monkeypatch.setattr(sample, "load", load_and_count)
    options = dict(ref=REF, lora=LORA, steps=1, prompts=str(tmp_path / "prompts.txt"), batch=2)
    sample.main(sample.Config(**options, out=str(tmp_path / "a.mp4")))
    assert len(calls) == 4 and len(pictures) == 1 and set(decoded) == {1}
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    sample.main(sample.Config(**options, out=str(tmp_path / "b.mp4")))  # two batches for three ranks
    assert len(list(tmp_path.glob("a-*.mp4"))) == 3 and not list(tmp_path.glob("b*.mp4"))
