"""What makes a step cheaper changes neither losses nor gradients, and does what it says: counted, never timed."""
from functools import partial
from unittest.mock import patch

import accelerate
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model
import sample
from common import base
from common.run import records
from model import add_lora, v_loss
from tests.shared import BASE, ROOT, TORCHRUN, command, randomise_lora, run
from train import Config, train

MODES = ["none", "attention", "full"]
KEEPS = [("image", None), ("image", torch.arange(0)), ("video", None), ("video", torch.arange(5))]


@pytest.fixture
def step(tiny, inputs):
    """A function: loss and flat gradient of one micro-batch of `step.model`, whose trainable tensors are
    `step.parameters`; step.loss_of gives the loss alone, of any model."""
    ours, _ = tiny
    parameters = add_lora(ours.train(), 4, 2)
    randomise_lora(ours)
    scheduler = CogVideoXPipeline.from_pretrained(BASE).scheduler
    latents, text, timestep, reference = inputs
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))

    def loss_of(model, task="video", keep=None):
        n = 1 if task == "image" else latents.shape[1]
        return v_loss(model, scheduler, latents[:, :n], text, timestep, noise[:, :n], reference, keep).mean()

    def step(task="video", keep=None):
        loss = loss_of(ours, task, keep)
        gradients = torch.autograd.grad(loss, parameters)
        return loss.detach(), torch.cat([g.flatten() for g in gradients])
    step.model, step.parameters, step.loss_of = ours, parameters, loss_of
    return step


# ---- recomputing and compiling ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_changes_no_bit(step, dropout):
    for module in step.model.modules():
        if isinstance(module, model.LoraLayer) and dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    for task, keep in KEEPS:
        results = []
        for step.model.checkpointing in MODES:
            torch.manual_seed(4)
            results.append(step(task, keep))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


class AttentionCalls(TorchDispatchMode):
    """Counts the calls of attention's kernels: FlopCounterMode knows none of those of a CPU."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in model.ATTENTION
        return op(*args, **(kwargs or {}))


def test_checkpointing_recomputes_and_keeps_what_it_says(step):
    """"full" runs the forward of each of the three blocks again, "attention" the same without its attention."""
    flops, calls = {}, {}
    for step.model.checkpointing in MODES:
        with FlopCounterMode(display=False) as counter:
            step()
        with AttentionCalls() as attention:
            step()
        flops[step.model.checkpointing], calls[step.model.checkpointing] = counter.get_total_flops(), attention.count
    assert calls == {"none": 3, "attention": 3, "full": 6}
    assert flops["none"] < flops["attention"] <= flops["full"]


def without_code_generation():
    """All of the compiler but its last part, which takes minutes on a CPU."""
    return patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))


def test_compiled_blocks_have_the_same_losses_and_one_graph_per_shape(step):
    graphs = torch._dynamo.utils.counters["stats"]
    for mode, (task, keep) in [("none", KEEPS[0]), ("attention", KEEPS[1]), ("none", KEEPS[2]), ("full", KEEPS[3])]:
        step.model.checkpointing = mode
        step.model.__dict__.pop("run_block", None)
        loss, gradient = step(task, keep)
        before = graphs["unique_graphs"]
        with without_code_generation():
            step.model.compile_blocks()
        compiled_loss, compiled_gradient = step(task, keep)
        assert abs(compiled_loss - loss) < 1e-5 * loss
        assert (compiled_gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()
        assert 1 <= graphs["unique_graphs"] - before <= 2  # not one per block


def test_compiled_blocks_under_ddp_and_no_sync(step, tmp_path):
    """Two micro-batches, the first without a sync, as in the loop: the sum of their eager gradients."""
    expected = step("image")[1] + step("video", torch.arange(5))[1]
    step.model.checkpointing = "attention"
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(step.model, gradient_as_bucket_view=True, init_sync=False)
        with without_code_generation():
            step.model.compile_blocks()
        with ddp.no_sync():
            step.loss_of(ddp, "image").backward()
        step.loss_of(ddp, "video", torch.arange(5)).backward()
    finally:
        torch.distributed.destroy_process_group()
    gradient = torch.cat([p.grad.flatten() for p in step.parameters])
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_compiled_training(knobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with without_code_generation():
        train(Config(**{**knobs, "steps": 2, "compile": True}))
    assert len(records(tmp_path / "out/toy/log.jsonl")) == 2


def test_compile_refuses_scope_reference(tiny):
    add_lora(tiny[0], 4, 2, scope="reference")
    with pytest.raises(ValueError, match="--compile needs --lora_scope all"):
        tiny[0].compile_blocks()


# ---- dtypes and kernels ----------------------------------------------------------------------------------------------

def test_lora_inputs_are_rounded_once(tiny, inputs):
    """Under autocast, whose norms give float32 on CUDA: the same loss bit for bit, and fewer casts to bfloat16."""
    ours, _ = tiny
    latents, text, timestep, reference = inputs
    parameters = add_lora(ours.to(torch.bfloat16).train(), 4, 2)
    randomise_lora(ours)
    norm, results = torch.nn.functional.layer_norm, []

    def full_norm(x, shape, weight=None, bias=None, eps=1e-5):  # as autocast does on CUDA
        weight, bias = (w if w is None else w.float() for w in (weight, bias))
        return norm(x.float(), shape, weight, bias, eps)
    for rounded in (True, False):  # ours, then peft's
        for module in ours.modules():
            if isinstance(module, model.LoraLayer):
                module.cast_input_dtype_enabled = not rounded
            elif isinstance(module, model.CogVideoXLayerNormZero) and not rounded:
                module._forward_hooks.clear()
        with patch.object(torch.nn.functional, "layer_norm", full_norm), torch.profiler.profile() as profile:
            with torch.autocast("cpu", torch.bfloat16):
                loss = ours(latents, text, timestep, reference=reference).sample.float().square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
        results.append((loss.detach(), torch.cat([g.flatten() for g in gradients]), casts))
    (loss, gradient, casts), (peft_loss, peft_gradient, peft_casts) = results
    assert torch.equal(loss, peft_loss) and (gradient - peft_gradient).norm() < 0.01 * peft_gradient.norm()
    assert casts < 0.9 * peft_casts


def test_attention_order_is_for_hopper(monkeypatch):
    """As torch itself reports the order inside the context."""
    usual = SDPBackend(_cur_sdpa_kernel_backends(with_priority=True)[0])
    for kind, capability, first in (("cpu", None, usual), ("cuda", (8, 0), usual),
                                    ("cuda", (9, 0), SDPBackend.CUDNN_ATTENTION)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        with base.attention_order(torch.device(kind)):
            assert _cur_sdpa_kernel_backends(with_priority=True)[0] == first


# ---- ranks -----------------------------------------------------------------------------------------------------------

SPIES = """
import sys, torch, train
step, no_sync = torch.optim.AdamW.step, torch.nn.parallel.DistributedDataParallel.no_sync
alone = []  # micro-batches of this step without a sum over ranks
def spy_on_step(self, *a, **k):
    gradients = [p.grad for g in self.param_groups for p in g['params']]
    owners = sorted({g.untyped_storage().data_ptr() for g in gradients})
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    with open(f'rank-{train.rank_and_world_size()[0]}', 'a') as f:
        print(len(alone), norm, owners, file=f)
    alone.clear()
    return step(self, *a, **k)
def spy_on_no_sync(self):
    alone.append(1)
    return no_sync(self)
torch.optim.AdamW.step = spy_on_step
torch.nn.parallel.DistributedDataParallel.no_sync = spy_on_no_sync
train.command_line(train.main, train.Config, '', presets=train.presets)
"""


def test_ranks_sum_gradients_once_a_step_in_ddps_own_memory(knobs, tmp_path):
    """Two ranks, five steps. Micro-batches of 8 pairs are cut to 4; a clip at a time makes two on each rank."""
    (tmp_path / "spies.py").write_text(SPIES)
    words = [str(tmp_path / "spies.py") if word.endswith("train.py") else word
             for word in command(knobs, name="x", steps=5, image_micro=8, video_micro=1)]
    r = run(*TORCHRUN, *words, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("--image_micro 8 is now 4") == 1 and "--video" not in r.stdout
    tasks = [line["task"] for line in records(tmp_path / "out/x/log.jsonl")]
    ranks = [[line.split(" ", 2) for line in (tmp_path / f"rank-{i}").read_text().splitlines()] for i in (0, 1)]
    for steps in ranks:
        assert [int(alone) for alone, *_ in steps] == [{"image": 0, "video": 1}[task] for task in tasks]
        assert len({owners for *_, owners in steps[2:]}) == 1  # the gradients' storages are the buckets'
    assert set(tasks) == {"image", "video"} and [s[1] for s in ranks[0]] == [s[1] for s in ranks[1]]


# ---- sampling --------------------------------------------------------------------------------------------------------

def test_a_lora_is_merged_in_float32_and_then_rounded(tiny):
    ours, _ = tiny
    add_lora(ours.to(torch.bfloat16), 4, 2)
    randomise_lora(ours)
    layer = ours.transformer_blocks[0].attn1.to_q
    update = 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank = 0.5, float32
    expected = (layer.base_layer.weight.float() + update).bfloat16()
    ours.fuse_lora()
    ours.unload_lora()
    assert torch.equal(ours.transformer_blocks[0].attn1.to_q.weight, expected)


def test_a_lora_is_merged_for_sampling_unless_it_acts_on_some_tokens_only(tmp_path):
    for scope in ("all", "reference"):
        transformer = base.load_pipeline(BASE).transformer
        add_lora(transformer, 4, 2, scope=scope)
        model.save_lora(transformer, tmp_path / scope, base=BASE)
        loaded = sample.load(lora=str(tmp_path / scope))[0].transformer
        assert any("lora_" in name for name, _ in loaded.named_parameters()) == (scope == "reference")


def test_a_batch_is_the_single_samples():
    """To the rounding of a batch."""
    pipe, reference = base.load_pipeline(BASE), torch.zeros(1, 1, 4, 16, 16)
    prompts = ["a creature walks up", "a creature stands"]
    alone = [sample.generate(pipe, reference, [prompt], [0], steps=4)[0] for prompt in prompts]
    for a, b in zip(alone, sample.generate(pipe, reference, prompts, [0, 0], steps=4)):
        assert max(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() for x, y in zip(a, b)) <= 1


@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_and_the_reference_are_encoded_once(tmp_path, monkeypatch, batch):
    """T5 sees each of three prompts and the negative one once, the VAE the picture. Videos are decoded one by one."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a creature walks up\na creature stands\na creature walks left\n")
    calls, pictures, decoded, load = [], [], [], sample.load

    def load_and_count(*args, **kwargs):
        pipe, header = load(*args, **kwargs)
        pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        pipe.vae.encoder.register_forward_hook(lambda *_: pictures.append(1))
        pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(len(output[0])))
        return pipe, header
    monkeypatch.setattr(sample, "load", load_and_count)
    sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), steps=1,
                              prompts=str(prompts), batch=batch, out=str(tmp_path / "a.mp4")))
    assert len(calls) == 4 and len(pictures) == 1 and set(decoded) == {1}
    assert len(list(tmp_path.glob("a-*.mp4"))) == 3


def test_prompts_are_encoded_with_offloaded_weights():
    """--offload sequential keeps T5's weights on the meta device between calls: the embeddings are the same."""
    pipe, cpu = base.load_pipeline(BASE), torch.device("cpu")
    expected = model.encode_prompt(pipe, ["a creature walks up"])
    accelerate.cpu_offload(pipe.text_encoder, cpu)
    assert pipe.text_encoder.device.type == "meta"
    assert torch.equal(model.encode_prompt(pipe, ["a creature walks up"], cpu), expected)


def test_a_rank_without_prompts_of_its_own_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), steps=1,
                              out=str(tmp_path / "a.mp4")))
    assert not list(tmp_path.glob("*.mp4"))
