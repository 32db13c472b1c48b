"""Watching a run: held-out losses, the gradients' cosine, sample sheets. Training never sees it."""
from pathlib import Path

import torch

import gradcos
from common.base import autocast
from common.log import add_losses, loss_means, no_losses, sum_over_ranks
from common.media import contact_sheet, load_image, read_text
from common.run import rank_and_world_size, records
from data import TASKS
from model import encode_prompt, v_loss, with_reference_token
from sample import encode_references, generate


# ---- held-out measurements -------------------------------------------------------------------------------------------

class Validation:
    """Held-out losses, gradient cosines and sample sheets of the model as it is after `step` steps.

    held_out: this rank's (task, inputs of v_loss), see train.held_out_batches, kept in RAM (11 MB a clip at full size).
    """

    def __init__(self, cfg, pipe, run, size, frames, held_out, log):
        self.cfg, self.pipe, self.run, self.size, self.frames, self.log = cfg, pipe, run, size, frames, log
        self.batches = {task: [] for task in TASKS}
        for task, inputs in held_out:
            self.batches[task].append({k: v.cpu() if torch.is_tensor(v) else v for k, v in inputs.items()})
        mine = {task: sum(len(inputs["timestep"]) for inputs in batches) for task, batches in self.batches.items()}
        self.count = sum_over_ranks({task: torch.tensor([n]) for task, n in mine.items()})  # samples of all ranks
        self.texts = {}
        if cfg.val_every and cfg.val_refs:
            self.texts = sample_texts(pipe, cfg.val_refs, cfg.cls)

    def measure(self, step):
        """Write what is due at this step to gradcos.jsonl, val.jsonl and samples/."""
        cfg, transformer = self.cfg, self.pipe.transformer

        def due(every):
            return every and (step % every == 0 or step == cfg.steps)
        if not (due(cfg.gradcos_every) or due(cfg.val_every)):
            return
        transformer.eval()
        if due(cfg.gradcos_every):
            self.log.doing("gradients' cosine")
            trained = [p for p in transformer.parameters() if p.requires_grad]
            self.log.write("gradcos.jsonl", {"step": step, **gradcos.measure(self.scalars, trained)})
        if due(cfg.val_every):
            self.log.doing("held-out losses")
            self.log.write("val.jsonl", {"step": step, **self.mean_losses()})
        if due(cfg.val_every) and cfg.val_refs and step > 0:
            self.log.doing("samples")
            with autocast(transformer.device):
                write_sample_sheets(self.pipe, self.texts, self.run / "samples", step, self.size, self.frames,
                                    cfg.guidance)
        self.log.doing()
        transformer.train()

    def losses(self, task):
        """(loss per sample, its timestep) of each of this rank's micro-batches; LoRA dropout is off."""
        device = self.pipe.transformer.device
        self.pipe.transformer.checkpointing = getattr(self.cfg, f"{task}_checkpointing")
        for inputs in self.batches[task]:
            inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
            with autocast(device):
                loss = v_loss(self.pipe.transformer, self.pipe.scheduler, **inputs)
            yield loss, inputs["timestep"]

    def scalars(self, task):
        """Losses for the gradient: their sum over micro-batches and ranks is the mean loss of the batch."""
        return (loss.sum() / self.count[task].item() for loss, _ in self.losses(task))

    @torch.no_grad()
    def mean_losses(self):
        """{task: {"loss", "loss_by_timestep": 4 means}} over the whole batch, all ranks together."""
        losses = no_losses(self.pipe.transformer.device)
        for task in self.batches:
            for loss, t in self.losses(task):
                add_losses(losses, task, loss, t, self.pipe.scheduler.config.num_train_timesteps)
        losses = sum_over_ranks(losses)
        return {task: loss_means(*losses[task]) for task in self.batches}


def already_measured(cfg, run, step):
    """Do the logs hold every number of this step that the flags ask for? (Sample sheets are not checked.)"""
    asked = [file for file, every in (("gradcos.jsonl", cfg.gradcos_every), ("val.jsonl", cfg.val_every)) if every]
    return all(any(record["step"] == step for record in records(run / file)) for file in asked)


# ---- sample sheets ---------------------------------------------------------------------------------------------------

def sample_texts(pipe, folder, cls="front"):
    """{picture: embeddings of its prompt and of ""} for the pictures in `folder`, each with its prompt in a .txt file
    of its name. Each rank takes its share of them."""
    rank, world_size = rank_and_world_size()
    pictures = sorted(f for f in Path(folder).glob("*") if f.with_suffix(".txt").is_file() and f.suffix != ".txt")
    texts = {}
    for file in pictures[rank::world_size]:
        prompt = with_reference_token(read_text(file.with_suffix(".txt")), cls)
        texts[file] = [encode_prompt(pipe, [t]).cpu() for t in (prompt, "")]
    return texts


def write_sample_sheets(pipe, texts, out, step, size, frames, guidance=6.0):
    """While training: a contact sheet for each picture of sample_texts, with a fixed seed: out/NAME-000400.png."""
    out.mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for file, text in texts.items():
        picture = load_image(file)
        (video,) = generate(pipe, encode_references(pipe, [picture], *size), [""], [0], guidance=guidance,
                            frames=frames, height=size[0], width=size[1],
                            text=[t.to(pipe.transformer.device) for t in text])
        sheet = contact_sheet(video, picture, max(1, 128 // video[0].height))
        sheet.save(out / f"{file.stem}-{step:06d}.png")
