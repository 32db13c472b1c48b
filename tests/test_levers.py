"""What makes a step cheaper changes neither losses nor gradients, and does what it says: counted, never timed."""
from tests.shared import BASE, ROOT, TORCHRUN, command, randomise_lora, run

from functools import partial
from unittest.mock import patch

import accelerate
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, FirstBlockCacheConfig
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from common import base
import model
import sample
from model import add_lora, v_loss
from paper.bench import Counter
from common.run import records
from train import Config, train

MODES = ["none", "attention", "full"]
KEEPS = [("image", None), ("image", torch.arange(0)), ("video", None), ("video", torch.arange(5))]


@pytest.fixture(name="step")
def step_fixture(tiny, inputs):
    """(transformer, parameters, a function: loss and flat gradient of one micro-batch)."""
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
    step.loss_of = loss_of
    return ours, parameters, step


def both(mode):
    return {"image": mode, "video": mode}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointing_changes_no_bit(step, dropout):
    ours, _, step = step
    for module in ours.modules():
        if isinstance(module, model.LoraLayer) and dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    for task, keep in KEEPS:
        results = []
        for ours.checkpointing in map(both, MODES):
            torch.manual_seed(4)
            results.append(step(task, keep))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_checkpointing_recomputes_and_keeps_what_it_says(step):
    """FLOPs: "full" runs each block's forward again, "attention" the same without its attention. Bytes kept: less."""
    ours, _, step = step
    flops, peak, attention = {}, {}, {}
    for mode in MODES:
        ours.checkpointing = {"image": "none", "video": mode}
        with Counter() as counter:
            step()
        flops[mode], peak[mode] = counter.flops, counter.peak
        with Calls(model.ATTENTION) as calls:
            step()
        attention[mode] = calls.n
        with Calls(model.ATTENTION) as calls:
            step("image")
        assert calls.n == 3  # images keep their own mode
    assert attention == {"none": 3, "attention": 3, "full": 6}  # three blocks
    assert flops["none"] < flops["attention"] <= flops["full"]
    assert peak["none"] > peak["attention"] and peak["none"] > peak["full"]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of some operators."""

    def __init__(self, ops):
        super().__init__()
        self.ops, self.n = ops, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += op in self.ops
        return op(*args, **(kwargs or {}))


def without_code_generation():
    """All of the compiler but its last part, which takes minutes on a CPU."""
    return patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))


def test_compiled_blocks_have_the_same_losses_and_one_graph_per_shape(step):
    ours, _, step = step
    graphs = torch._dynamo.utils.counters["stats"]
    for mode, (task, keep) in [("none", KEEPS[0]), ("attention", KEEPS[1]), ("none", KEEPS[2]), ("full", KEEPS[3])]:
        ours.checkpointing = both(mode)
        ours.__dict__.pop("run_block", None)
        loss, gradient = step(task, keep)
        before = graphs["unique_graphs"]
        with without_code_generation():
            ours.compile_blocks()
        compiled_loss, compiled_gradient = step(task, keep)
        assert abs(compiled_loss - loss) < 1e-5 * loss
        assert (compiled_gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()
        assert 1 <= graphs["unique_graphs"] - before <= 2  # not one per block


def test_compiled_blocks_under_ddp_and_no_sync(step, tmp_path):
    """Two micro-batches, the first without a sync, as in the loop: the sum of their eager gradients."""
    ours, parameters, step = step
    expected = step("image")[1] + step("video", torch.arange(5))[1]
    ours.checkpointing = both("attention")
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0,
                                         world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(ours, gradient_as_bucket_view=True, init_sync=False)
        with without_code_generation():
            ours.compile_blocks()
        with ddp.no_sync():
            step.loss_of(ddp, "image").backward()
        step.loss_of(ddp, "video", torch.arange(5)).backward()
    finally:
        torch.distributed.destroy_process_group()
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_compiled_blocks_under_autocast(tiny, inputs):
    """As on a GPU: bfloat16, with LoRA's inputs rounded once."""
    ours, _ = tiny
    latents, text, timestep, reference = inputs
    add_lora(ours.to(torch.bfloat16).train(), 4, 2)
    randomise_lora(ours)
    losses = []
    for compiled in (False, True):
        if compiled:
            with without_code_generation():
                ours.compile_blocks()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(latents, text, timestep, reference=reference).sample.float().square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_compiled_training_and_sampling(knobs, tmp_path, monkeypatch):
    """Training with LoRA dropout, then a sample."""
    monkeypatch.chdir(tmp_path)
    with without_code_generation():
        train(Config(**{**knobs, "steps": 2, "out": str(tmp_path), "compile": True, "lora_dropout": 0.1}))
        sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(tmp_path / knobs["name"]),
                                  steps=1, compile=True, out=str(tmp_path / "a.mp4")))
    assert len(records(tmp_path / knobs["name"] / "log.jsonl")) == 2 and (tmp_path / "a.mp4").is_file()


def test_compile_refuses_scope_reference(tiny):
    add_lora(tiny[0], 4, 2, scope="reference")
    with pytest.raises(ValueError, match="--compile needs --lora_scope all"):
        tiny[0].compile_blocks()


def test_lora_inputs_are_rounded_once(tiny, inputs):
    """Under autocast without dropout: the same loss, bit for bit, with fewer bytes moved. Without peft's cast the
    gradients are the same too. With the norms' outputs rounded once they are added up in bfloat16 where peft adds them
    in float32: equal to that rounding."""
    ours, _ = tiny
    latents, text, timestep, reference = inputs
    ours.to(torch.bfloat16)
    parameters = add_lora(ours.train(), 4, 2)
    randomise_lora(ours)
    norm, results, moved = torch.nn.functional.layer_norm, [], []

    def full_norm(x, shape, weight=None, bias=None, eps=1e-5):  # as autocast does on CUDA
        weight, bias = (w if w is None else w.float() for w in (weight, bias))
        return norm(x.float(), shape, weight, bias, eps)
    for rounded, cast in ((True, False), (False, False), (False, True)):  # ours, without the norms' rounding, peft's
        for module in ours.modules():
            if isinstance(module, model.LoraLayer):
                module.cast_input_dtype_enabled = cast
            elif isinstance(module, model.CogVideoXLayerNormZero) and not rounded:
                module._forward_hooks.clear()
        with patch.object(torch.nn.functional, "layer_norm", full_norm), Counter() as counter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = ours(latents, text, timestep, reference=reference).sample.float().square().mean()
            gradients = torch.autograd.grad(loss, parameters)
        results.append([loss.detach(), torch.cat([g.flatten() for g in gradients])])
        moved.append(counter.moved)
    (loss, gradient), (uncast_loss, uncast_gradient), (plain_loss, plain_gradient) = results
    assert torch.equal(uncast_loss, plain_loss) and torch.equal(uncast_gradient, plain_gradient)
    assert torch.equal(loss, plain_loss) and (gradient - plain_gradient).norm() < 0.01 * plain_gradient.norm()
    assert moved[0] < 0.95 * moved[2]


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
train.command_line(train.main, train.Config, '', **train.TOY)
"""


@pytest.fixture(scope="module", name="two_ranks")
def two_ranks_fixture(knobs, tmp_path_factory):
    """Five steps on two ranks: (what was printed, the log, per rank and step [micro-batches without a sum, the norm of
    the gradients, their storages]). Micro-batches of 8 pairs are cut to 4; a clip at a time makes two on each rank."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "spies.py").write_text(SPIES)
    words = [str(folder / "spies.py") if word.endswith("train.py") else word
             for word in command(knobs, name="x", steps=5, image_micro=8, video_micro=1)]
    r = run(*TORCHRUN, *words, cwd=folder)
    assert r.returncode == 0, r.stderr
    seen = [[line.split(" ", 2) for line in (folder / f"rank-{i}").read_text().splitlines()] for i in (0, 1)]
    return r.stdout, records(folder / "out/x/log.jsonl"), seen


def test_gradients_stay_in_ddps_buckets(two_ranks):
    """From the second step on the gradients' storages are the buckets', step after step."""
    for steps in two_ranks[2]:
        assert len(steps) == 5 and len({owners for *_, owners in steps[2:]}) == 1, steps  # steps 2 to 4


def test_ranks_sum_their_gradients_in_the_last_micro_batch_only(two_ranks):
    tasks = [line["task"] for line in two_ranks[1]]
    assert set(tasks) == {"image", "video"}
    for steps in two_ranks[2]:
        assert [int(alone) for alone, *_ in steps] == [{"image": 0, "video": 1}[task] for task in tasks]
    assert [norm for _, norm, _ in two_ranks[2][0]] == [norm for _, norm, _ in two_ranks[2][1]]


def test_micro_batches_shrink_on_two_ranks(two_ranks):
    """Each rank takes half of a micro-batch of the whole batch, and one line says so."""
    assert two_ranks[0].count("--image_micro 8 is now 4") == 1 and "--video" not in two_ranks[0]
    assert [line["step"] for line in two_ranks[1]] == [0, 1, 2, 3, 4]


def test_attention_order_is_for_hopper(monkeypatch):
    """As torch itself reports the order inside the context."""
    usual = SDPBackend(_cur_sdpa_kernel_backends(with_priority=True)[0])
    for kind, capability, first in (("cpu", None, usual), ("cuda", (8, 0), usual),
                                    ("cuda", (9, 0), SDPBackend.CUDNN_ATTENTION)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        with base.attention_order(torch.device(kind)):
            assert _cur_sdpa_kernel_backends(with_priority=True)[0] == first


def test_merged_lora_gives_the_same_output_with_fewer_products(tiny, inputs):
    ours, _ = tiny
    latents, text, timestep, reference = inputs
    add_lora(ours, 4, 2)
    randomise_lora(ours)
    ours.eval()
    products, outputs = [], []
    for merged in (False, True):
        if merged:
            ours.fuse_lora()
            ours.unload_lora()
        with torch.no_grad(), Counter() as counter:
            outputs.append(ours(latents, text, timestep, reference=reference).sample)
        products.append(counter.flops)
    assert (outputs[1] - outputs[0]).abs().max() < 1e-5 * outputs[0].abs().max()
    assert products[1] < products[0] and not any("lora_" in name for name, _ in ours.named_parameters())


def test_lora_is_merged_in_float32_and_then_rounded(tiny):
    """Into bfloat16 weights. A LoRA of scope "reference" acts on some tokens only, so it stays beside them."""
    ours, _ = tiny
    add_lora(ours.to(torch.bfloat16), 4, 2)
    randomise_lora(ours)
    layer = ours.transformer_blocks[0].attn1.to_q
    update = 0.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / rank = 0.5, float32
    expected = (layer.base_layer.weight.float() + update).bfloat16()
    ours.fuse_lora()
    ours.unload_lora()
    assert torch.equal(ours.transformer_blocks[0].attn1.to_q.weight, expected)


def test_lora_of_scope_reference_is_not_merged(tmp_path):
    for scope in ("all", "reference"):
        transformer = base.load_pipeline(BASE).transformer
        add_lora(transformer, 4, 2, scope=scope)
        (tmp_path / scope).mkdir()
        model.save_lora(transformer, tmp_path / scope, base=BASE)
        loaded = sample.load(lora=str(tmp_path / scope))[0].transformer
        assert any("lora_" in name for name, _ in loaded.named_parameters()) == (scope == "reference")


def test_fit_is_the_flags_or_the_loras(tmp_path, monkeypatch):
    fits, encode = [], sample.encode_references
    monkeypatch.setattr(sample, "encode_references",
                        lambda pipe, pictures, h, w, fit: fits.append(fit) or encode(pipe, pictures, h, w, fit))
    transformer = base.load_pipeline(BASE).transformer
    add_lora(transformer, 4, 2)
    model.save_lora(transformer, tmp_path, base=BASE, fit="pad")
    for fit in ("", "cover"):
        sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(tmp_path), steps=1, fit=fit,
                                  out=str(tmp_path / "a.mp4")))
    assert fits == ["pad", "cover"]


def test_cache_skips_blocks_and_batches_are_the_single_samples():
    """FirstBlockCache with our forward: a high threshold runs the later blocks in the first step only. A batch of two
    prompts is what each is alone, to the rounding of a batch."""
    pipe = base.load_pipeline(BASE)
    reference = torch.zeros(1, 1, 4, 16, 16)
    prompts = ["a creature walks up", "a creature stands"]

    def videos(prompts):
        return sample.generate(pipe, reference, prompts, [0] * len(prompts), steps=4)
    alone, together = [videos([prompt])[0] for prompt in prompts], videos(prompts)
    for a, b in zip(alone, together):
        assert max(np.abs(np.asarray(x, int) - np.asarray(y, int)).max() for x, y in zip(a, b)) <= 1
    runs = []
    pipe.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: runs.append(1))
    videos(prompts[:1])
    assert len(runs) == 4
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    for _ in range(2):  # a new sample starts with an empty cache
        runs.clear()
        videos(prompts[:1])
        assert len(runs) == 1


def test_prompts_and_the_reference_are_encoded_once(tmp_path, monkeypatch):
    """T5 sees each of three prompts and the negative one once, the VAE the picture, whatever --batch is. Videos are
    decoded one by one."""
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
    for batch in (1, 2):
        for seen in (calls, pictures, decoded):
            seen.clear()
        sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), steps=1,
                                  prompts=str(prompts), batch=batch, out=str(tmp_path / f"{batch}.mp4")))
        assert len(calls) == 4 and len(pictures) == 1 and set(decoded) == {1}
        assert len(list(tmp_path.glob(f"{batch}-*.mp4"))) == 3


def test_prompts_are_encoded_with_offloaded_weights():
    """--offload sequential keeps T5's weights on the meta device between calls: the embeddings are the same."""
    pipe, cpu = base.load_pipeline(BASE), torch.device("cpu")
    expected = model.encode_prompt(pipe, ["a creature walks up"])
    accelerate.cpu_offload(pipe.text_encoder, cpu)
    assert pipe.text_encoder.device.type == "meta"
    assert torch.equal(model.encode_prompt(pipe, ["a creature walks up"], cpu), expected)


def test_a_rank_without_prompts_of_its_own_ends(tmp_path, monkeypatch):
    """Two ranks, one prompt: the second has nothing to do."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample.main(sample.Config(ref=str(ROOT / "toy/refs/creature-0.png"), lora=str(ROOT / "toy/lora"), steps=1,
                              out=str(tmp_path / "a.mp4")))
    assert not list(tmp_path.glob("*.mp4"))
