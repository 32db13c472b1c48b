"""CogVideoX with a reference frame and LoRA: everything that is specific to the paper's model.

The idea that keeps this small: the reference picture is frame 0. Its latents are put in front of the noisy video
on the frame axis, so that text, reference and video meet in the transformer's full attention (Sec. 3.3):

    tokens    [ text | reference | video ]        RoPE frame   reference 0, video 1..T

    B  batch            T  latent frames of the video      L  text tokens          C, H, W  latent channels and size
    D  model width      N  tokens of one latent frame      K  reference tokens kept (N, or fewer when some are dropped)
    CogVideoX-5B, 49 frames of 480x720:  T = 13, L = 226, C = 16, H x W = 60 x 90, D = 3072, N = 30 x 45 = 1,350
"""
import hashlib
import json
import logging
import os
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.training_utils import cast_training_params
from diffusers.utils import apply_lora_scale
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

PAPER_BASE = "THUDM/CogVideoX-5b"
REFERENCE_TOKEN = "<cls>"  # Sec. 3.3: "An <CLS> armchair in the living room"
# Sec. A.1. Names match by suffix: "proj" is both ff.net.0.proj and the convolution patch_embed.proj.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "text_proj", "norm1.linear", "norm2.linear", "ff.net.2"]
# At most 8 pictures of 480x720 per VAE call: that fills a GPU, and with more a convolution of diffusers 0.42.1 raises.
VAE_PIXELS = 8 * 480 * 720
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers' own loader looks for
AUTHORS_LORA_FILE = "pytorch_lora_weights_transformer.safetensors"  # the name of the authors' release
logging.getLogger("diffusers.pipelines.cogvideo.pipeline_cogvideox").setLevel("ERROR")  # encode_prompt says it once


# ---- the transformer -------------------------------------------------------------------------------------------------

class SubjectTransformer(CogVideoXTransformer3DModel):
    """The stock CogVideoX transformer that also takes a reference picture. Same weights, same config, same call: so the
    unmodified pipeline samples with it, `CogVideoXPipeline(...)(prompt, attention_kwargs={"reference": reference})`."""

    lora_scope = "all"  # or "reference": see add_lora
    checkpointing = "none"  # what backward recomputes: see run_block
    _supports_gradient_checkpointing = False  # the stock switch is refused: set `checkpointing` instead

    @apply_lora_scale("attention_kwargs")
    def forward(self, hidden_states, encoder_hidden_states, timestep, timestep_cond=None, ofs=None,
                image_rotary_emb=None, attention_kwargs=None, return_dict=True, reference=None, keep=None,
                first_frame=1):
        """Velocity of the noisy frames, (B,T,C,H,W).

        hidden_states (B,T,C,H,W): noisy latents. encoder_hidden_states (B,L,D_text). timestep (B,).
        reference (B or 1, 1,C,H,W): clean scaled latents of the reference picture, or None: then this is the stock
            model with frames 0..T-1. Also taken from attention_kwargs["reference"], which is how the stock pipeline
            hands it in; one reference serves both halves of a classifier-free guidance batch.
        keep (K,): indices of the reference tokens that stay (TokenDrop in Algorithm 1); None keeps all N. The others
            leave the sequence. An empty `keep` is text-to-video with the video still at frames 1..T.
        first_frame: the RoPE frame at which the noisy frames begin when there is a reference. Only training uses it, to
            show a single picture at another distance from the reference (train.py's --image_frame).
        image_rotary_emb: the stock T-frame tables, used only without a reference; made from the config when None."""
        if self.config.patch_size_t is not None:
            raise ValueError("CogVideoX 1.5 (patch_size_t) has tokens of two frames, so a reference cannot be frame 0")
        attention_kwargs = dict(attention_kwargs or {})
        reference = attention_kwargs.pop("reference", None) if reference is None else reference
        B, T, _, H, W = hidden_states.shape
        patch = self.config.patch_size
        L, N = encoder_hidden_states.shape[1], (H // patch) * (W // patch)

        temb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype), timestep_cond)  # (B, D_time)

        frames, K = hidden_states, 0  # K: how many of the reference's tokens stay
        if reference is not None:
            if B % len(reference) or reference.shape[1:] != (1, *hidden_states.shape[2:]):
                raise ValueError(f"reference must be (B or 1, 1, C, H, W) like the video {tuple(hidden_states.shape)}, "
                                 f"got {tuple(reference.shape)}")
            # Under classifier-free guidance the batch is [without the prompt | with it]: the same references twice.
            reference = reference.to(hidden_states).repeat(B // len(reference), 1, 1, 1, 1)
            frames = torch.cat([reference, hidden_states], dim=1)  # (B, 1+T, C, H, W)
            K = N if keep is None else len(keep)
        frame_count = frames.shape[1]  # T, or 1 + T
        set_span = None
        if self.lora_scope == "reference":  # tell the LoRA layers which rows are the reference's
            set_span = partial(setattr, self, "span", (L, K, frame_count))
            set_span()

        rope = image_rotary_emb  # a pair (cos, sin), each (frame_count*N, head_dim)
        if self.config.use_rotary_positional_embeddings and (rope is None or reference is not None):
            skipped = 0 if reference is None else first_frame - 1
            rope = self.rotary_tables(frame_count, H, W, hidden_states.device, skipped)

        tokens = self.patch_embed(encoder_hidden_states, frames)  # (B, L + frame_count*N, D)
        text, hidden = tokens[:, :L], tokens[:, L:]
        if reference is not None and keep is not None:
            # TokenDrop: dropped tokens are gone, not zeroed, and each kept one keeps its own row of the RoPE tables.
            rows = torch.cat([keep.to(hidden.device), torch.arange(N, frame_count * N, device=hidden.device)])
            hidden = hidden[:, rows]  # (B, K + T*N, D)
            if rope is not None:
                rope = tuple(table[rows] for table in rope)
        # Contiguous, as every later block's inputs are: else the first block is compiled a second time.
        text, hidden = (self.embedding_dropout(x).contiguous() for x in (text, hidden))

        checkpointing = self.checkpointing if torch.is_grad_enabled() else "none"
        for block in self.transformer_blocks:
            hidden, text = self.run_block(checkpointing, set_span, block, hidden, text, temb, rope, attention_kwargs)

        hidden = hidden[:, K:]  # (B, T*N, D): only the noisy frames are decoded
        hidden = self.norm_out(self.norm_final(hidden), temb=temb)
        hidden = self.proj_out(hidden)  # (B, T*N, C*patch*patch)
        velocity = hidden.reshape(B, T, H // patch, W // patch, -1, patch, patch)  # (B, T, h, w, C, p, q)
        velocity = velocity.permute(0, 1, 4, 2, 5, 3, 6)                           # (B, T, C, h, p, w, q)
        velocity = velocity.flatten(5, 6).flatten(3, 4)                            # (B, T, C, H, W)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @staticmethod
    def run_block(checkpointing, set_span, block, hidden, text, temb, rope, attention_kwargs):
        """One block. checkpointing: what backward recomputes of it, to save memory: "full" (all), "attention" (all but
        attention, whose output is kept: half of a clip's FLOPs for 5 GB), "none"."""
        def call(hidden, text):
            if set_span is not None:  # in here, so that backward's recomputation sees the same span
                set_span()
            return block(hidden, text, temb, image_rotary_emb=rope, attention_kwargs=attention_kwargs)
        if checkpointing == "none":
            return call(hidden, text)
        keep_attention = {"context_fn": partial(create_selective_checkpoint_contexts, ATTENTION)}
        options = keep_attention if checkpointing == "attention" else {}
        return checkpoint(call, hidden, text, use_reentrant=False, **options)

    def rotary_tables(self, frames, height, width, device, skipped=0):
        """RoPE (cos, sin) for `frames` latent frames of height x width latents, by the stock pipeline's own method.
        skipped: how many frames of time are left out after the first one: frames 0, skipped + 1, skipped + 2, ..."""
        made, key = self.__dict__.setdefault("_rotary_tables", {}), (frames, height, width, device, skipped)
        if key not in made:
            pipe = SimpleNamespace(transformer=self, vae_scale_factor_spatial=1)  # sizes are those of latents already
            tables = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames + skipped,
                                                                             device)
            N = height * width // self.config.patch_size**2
            made[key] = tuple(torch.cat([table[:N], table[(1 + skipped) * N:]]) for table in tables)
        return made[key]


ATTENTION = [op.default for op in (
    torch.ops.aten._scaled_dot_product_cudnn_attention, torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)]


# ---- LoRA ------------------------------------------------------------------------------------------------------------

def add_lora(transformer, rank, alpha, dropout=0.0, scope="all"):
    """Attach fresh LoRA adapters (Sec. A.1) in float32 and freeze everything else. Returns the trainable parameters.

    scope "all": LoRA acts on every token, as in the authors' released model. scope "reference": it acts on reference
    tokens only, as the paper's text says ("LoRA-only updates on subject-token pathways", Algorithm 1)."""
    if scope not in ("all", "reference"):
        raise ValueError(f"lora_scope must be 'all' or 'reference', got {scope!r}")
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS))
    for name, parameter in transformer.named_parameters():
        useful = scope == "all" or _reaches_output(name, len(transformer.transformer_blocks))
        parameter.requires_grad_("lora_" in name and useful)
    # peft makes adapters in the base's dtype. bfloat16 has 8 bits: adding 5e-5 to a weight of 0.01 rounds away.
    cast_training_params(transformer)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # peft would cast inputs to float32, and autocast cast them back
        elif isinstance(module, CogVideoXLayerNormZero):
            module.register_forward_hook(_round_once)
    if scope == "reference":
        _restrict_to_reference(transformer)
    return [p for p in transformer.parameters() if p.requires_grad]


def _round_once(norm, args, out):
    """Autocast runs LayerNorm in float32, and each linear layer after it would cast the result. Cast once, here."""
    device = out[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return out
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in out)


def weight_fingerprint(weight):
    """12 hex digits that tell one weight from another, in whatever dtype it was loaded."""
    weight = weight.detach().to("cpu", torch.bfloat16)
    return hashlib.sha256(weight.view(torch.int16).numpy().tobytes()).hexdigest()[:12]


def save_lora(transformer, path, **extra):
    """Write the adapters to path/pytorch_lora_weights.safetensors in the diffusers format, alpha included.

    `extra` (strings) goes into the file's header beside the base's name and fingerprint: read it with `lora_header`.
    The write is atomic: a kill leaves the old file or the new one."""
    config = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v
              for k, v in transformer.peft_config["default"].to_dict().items()}
    base = weight_fingerprint(transformer.proj_out.weight)  # LoRA never touches proj_out
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config, default=str, sort_keys=True),
              "lora_scope": transformer.lora_scope, "base_fingerprint": base, **extra}
    weights = {f"transformer.{k}": v.detach().cpu().contiguous()
               for k, v in get_peft_model_state_dict(transformer).items()}
    file = Path(path, LORA_FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, f"{file}.tmp", metadata=header)
    os.replace(f"{file}.tmp", file)


def lora_path(path):
    """The safetensors file behind `path`: itself, or the one in this folder. FileNotFoundError names `path`."""
    for file in (Path(path), Path(path, LORA_FILE), Path(path, AUTHORS_LORA_FILE)):
        if file.is_file():
            return file
    raise FileNotFoundError(f"no LoRA at {path}: expected a .safetensors file, a run or checkpoint, or a hub id")


def lora_header(path):
    """What `save_lora` wrote into the file's header, {} for a file from elsewhere. ValueError when it is no LoRA."""
    file = lora_path(path)
    try:
        with safe_open(file, "pt") as f:
            if not any("lora_A" in key for key in f.keys()):
                raise ValueError(f"{file} holds no LoRA weights (no lora_A keys)")
            return f.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"cannot read the LoRA {file}: {e}. Is it a whole .safetensors file?")


def load_lora(transformer, path, dropout=0.0):
    """Attach the adapters saved at `path` (file or folder). Rank, alpha and scope come from the file.

    A file without alpha (the authors' release) gets the paper's alpha/rank = 64/128 = 0.5, and says so.
    ValueError when it was trained on another base or does not fit. The adapters are float32: on a
    bfloat16 base the forward needs torch.autocast, as in training, or a cast to the base's dtype, as in sample.load."""
    file, header = lora_path(path), lora_header(path)
    with safe_open(file, "pt") as f:
        rank = next(f.get_slice(k).get_shape()[0] for k in f.keys() if "lora_A" in k)
    here = weight_fingerprint(transformer.proj_out.weight)
    if header.get("base_fingerprint", here) != here:
        raise ValueError(f"LoRA {file} was trained on the base {header.get('base', '?')} "
                         f"({header['base_fingerprint']}), not on this one ({here}); pass the right --base")
    alpha = json.loads(header.get("lora_adapter_metadata", "{}")).get("transformer.lora_alpha")
    if alpha is None:
        alpha = rank / 2
        print(f"{file} does not say its alpha: using the paper's alpha/rank = 64/128 = 0.5")
    parameters = add_lora(transformer, rank, alpha, dropout, header.get("lora_scope", "all"))
    read_lora(transformer, file)
    return parameters


def read_lora(transformer, path):
    """Fill the adapters that are already attached with the weights at `path`; ValueError when they do not fit."""
    file = lora_path(path)
    weights = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    here = {k: v.shape for k, v in get_peft_model_state_dict(transformer).items()}
    wrong = [k for k in weights.keys() | here.keys() if k not in weights or here.get(k) != weights[k].shape]
    if wrong:
        raise ValueError(f"LoRA {file} does not fit this base: {len(wrong)} tensors differ, the first is {min(wrong)}")
    set_peft_model_state_dict(transformer, weights)


# ---- LoRA on reference tokens only: lora_scope "reference" ----------------------------------------------------------

def _reaches_output(name, blocks):
    """Under scope "reference": does this adapter get a gradient? Not the text projection, and in the last block not
    what comes after the keys and values: the reference's own output is thrown away there."""
    last = f"transformer_blocks.{blocks - 1}."
    dead_end = [last + s for s in ("attn1.to_q.", "attn1.to_out.", "norm2.", "ff.")]
    return "text_proj." not in name and not any(s in name for s in dead_end)


def _restrict_to_reference(transformer):
    """Make every LoRA layer add its update to the reference rows only: rows L to L + K of [text | reference | video],
    or the first of the frames. `transformer.span` is (L, K, frames)."""
    transformer.lora_scope = "reference"
    for name, module in transformer.named_modules():
        if isinstance(module, CogVideoXLayerNormZero):
            module.forward = _reference_only_norm(module, transformer)
        elif isinstance(module, LoraLayer) and "norm" not in name:
            module.forward = _reference_only_linear(module, module.forward, transformer, name == "patch_embed.proj")


def _reference_only_linear(layer, with_lora, transformer, is_patch):
    def forward(x):
        L, K, frames = transformer.span
        if K == 0 or x.shape[1] == L and not is_patch:  # no reference, or the text projection
            return layer.base_layer(x)
        if is_patch:  # (B*F, C, H, W): the frames are folded into the batch, and frame 0 is the reference
            x = x.unflatten(0, (-1, frames))
            video = layer.base_layer(x[:, 1:].flatten(0, 1)).unflatten(0, (-1, frames - 1))
            return torch.cat([with_lora(x[:, 0])[:, None], video], dim=1).flatten(0, 1)
        text, reference, video = x.split([L, K, x.shape[1] - L - K], dim=1)
        return torch.cat([layer.base_layer(text), with_lora(reference), layer.base_layer(video)], dim=1)
    return forward


def _reference_only_norm(norm, transformer):
    """The adaptive norm reads the timestep, not tokens: the stock forward with LoRA for the reference's rows, and with
    the frozen weight for all others."""
    stock = CogVideoXLayerNormZero.forward
    frozen = SimpleNamespace(silu=norm.silu, linear=norm.linear.base_layer, norm=norm.norm)

    def forward(hidden, text, temb):  # hidden (B, K + T*N, D)
        reference, video = hidden.tensor_split([transformer.span[1]], dim=1)
        video, new_text, gate, text_gate = stock(frozen, video, text, temb)
        if reference.shape[1] > 0:
            reference, _, reference_gate, _ = stock(norm, reference, text[:, :0], temb)
            gate = torch.cat([reference_gate.expand_as(reference), gate.expand_as(video)], dim=1)
        return torch.cat([reference, video], dim=1), new_text, gate, text_gate
    return forward


# ---- the loss --------------------------------------------------------------------------------------------------------

def v_loss(transformer, scheduler, latents, text, timestep, noise, reference=None, keep=None, first_frame=1):
    """The diffusion loss of both tasks, one value per sample (B,), float32.

    latents (B,T,C,H,W) clean and scaled; text (B,L,D_text); timestep (B,); noise like latents; reference, keep,
    first_frame: see SubjectTransformer.forward. With a = alpha-bar at the timestep:

        x_t = sqrt(a) x + sqrt(1-a) e       v = sqrt(a) e - sqrt(1-a) x       loss = |v_pred - v|^2

    `scheduler.get_velocity` is called on the clean latents to make the target v; it is never called on the model's
    output. (diffusers' CogVideoX example does that to get x0_pred and weights |x0_pred - x0|^2 by 1/(1-a). It is the
    same number: x0_pred - x0 = -sqrt(1-a) (v_pred - v).)"""
    latents, noise = latents.float(), noise.float()  # diffusers rounds alpha-bar to their dtype: bf16 loses small t
    noisy = scheduler.add_noise(latents, noise, timestep)
    v = scheduler.get_velocity(latents, noise, timestep)
    v_pred = transformer(noisy, text, timestep, reference=reference, keep=keep, first_frame=first_frame,
                         return_dict=False)[0]
    return F.mse_loss(v_pred.float(), v.float(), reduction="none").mean(dim=(1, 2, 3, 4))


# ---- text and pixels -------------------------------------------------------------------------------------------------

def with_reference_token(prompt, cls="front", item=""):
    """Put <cls> into a prompt that holds none: in front (the authors' scripts), or with cls "item" before the subject's
    name, "An <cls> armchair" (3.3), where the prompt holds it as a word. "off" is Table 6's row without it."""
    prompt = re.sub(REFERENCE_TOKEN, REFERENCE_TOKEN, prompt, flags=re.IGNORECASE)  # the paper writes <CLS>
    if cls == "off" or REFERENCE_TOKEN in prompt:
        return prompt
    word = rf"(?<!\w){re.escape(item)}(?:e?s)?(?!\w)" if item and cls == "item" else ""  # "" matches at the front
    found = re.search(word, prompt, re.IGNORECASE)
    at = found.start() if found else 0
    return f"{prompt[:at]}{REFERENCE_TOKEN} {prompt[at:]}"


@torch.no_grad()
def encode_prompt(pipe, prompts, device=None):
    """T5 embeddings (B,L,D_text) of a list of prompts, padded to the base's text length as the stock sampler does.
    device: where T5 computes, when its weights are offloaded and so lie elsewhere."""
    length = pipe.transformer.config.max_text_seq_length
    if any(len(ids) > length for ids in pipe.tokenizer(prompts, verbose=False).input_ids):
        warnings.warn(f"a prompt has more than {length} tokens, and the text encoder does not read the rest of it")
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=device or pipe.text_encoder.device,
                              max_sequence_length=length)[0]


@torch.no_grad()
def encode_moments(vae, pixels):
    """Pixels (B,F,3,height,width) in [-1,1] -> the VAE posterior's mean and log-variance (B,T,2C,H,W), as in a cache.

    F = 1 for pictures, 8k+1 for clips. Pictures go whole, at most 8 of 480x720 a call: so they get the same latents in
    training, in a cache and in sampling. Clips follow tile_vae."""
    pixels = pixels.to(vae.device, vae.dtype).transpose(1, 2)  # the VAE takes (B,3,F,H,W)
    if pixels.shape[2] > 1:
        return vae.encode(pixels).latent_dist.parameters.transpose(1, 2)
    tiling, slicing = vae.use_tiling, vae.use_slicing
    vae.use_tiling = vae.use_slicing = False
    together = max(1, VAE_PIXELS // pixels[0, 0].numel())
    moments = [vae.encode(few).latent_dist.parameters for few in pixels.split(together)]
    vae.use_tiling, vae.use_slicing = tiling, slicing
    return torch.cat(moments).transpose(1, 2)


def to_device(x, device):
    """Asynchronous copy to the device, through pinned memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def sample_latents(vae, moments, generator=None):
    """Moments (B,T,2C,H,W) -> scaled latents (B,T,C,H,W), float32: a draw from the posterior, as in CogVideoX's
    training; with generator=None its mean."""
    posterior = DiagonalGaussianDistribution(moments.float().transpose(1, 2))
    z = posterior.mode()
    if generator is not None:  # drawn on the CPU, so that a seed means the same everywhere
        z = posterior.mean + posterior.std * to_device(torch.randn(z.shape, generator=generator), z.device)
    return z.transpose(1, 2) * vae.config.scaling_factor


def encode_video(vae, pixels, generator=None):
    """Pixels (B,F,3,height,width) in [-1,1] -> scaled latents (B,T,C,H,W): a draw, or without a generator the mean."""
    return sample_latents(vae, encode_moments(vae, pixels), generator)
