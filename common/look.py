"""What goes in: a sheet of the first micro-batches of a run, as the model gets them. Nothing is trained."""
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from common.media import contact_sheet
from data import cls_for
from model import with_reference_token

HEIGHT, WORDS = 128, 30  # pixels: of a picture at least, and of the words above each row


@torch.no_grad()
def pictures_of(pipe, latents):
    """Latents (1,T,C,H,W) -> PIL pictures, through the VAE: so what lies in a cache can be seen, too."""
    frames = pipe.decode_latents(latents.to(pipe.vae.dtype))
    return pipe.video_processor.postprocess_video(frames, output_type="pil")[0]


def grey_out(picture, keep, side):
    """The reference with the tokens that leave the sequence in grey. side: pixels of a token. keep None: all stay."""
    if keep is None:
        return picture
    shown = Image.new("RGB", picture.size, (128, 128, 128))
    for token in keep.tolist():
        row, column = divmod(token, picture.width // side)
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        shown.paste(picture.crop(box), box[:2])
    return shown


def write_sheet(cfg, pipe, seen, path):
    """A row for each micro-batch, its first sample: the reference, then the target or six of its frames.

    seen: (micro-batch of the plan, batch of the loader, latents x, reference latents, keep) of each, as in the loop."""
    side, rows = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size, []
    for micro, batch, x, ref, keep in seen:
        (reference,) = pictures_of(pipe, ref[:1])
        enlarge = max(1, HEIGHT // reference.height)
        size = (reference.width * enlarge, reference.height * enlarge)
        kept = grey_out(reference, keep, side).resize(size, Image.NEAREST)
        row = contact_sheet(pictures_of(pipe, x[:1]), kept, enlarge)
        prompt = with_reference_token(batch["prompt"][0], cls_for(cfg, micro.task), batch["item"][0])
        rows.append((f"step {micro.step}, {micro.task}: {prompt}", row))
    high = rows[0][1].height + WORDS
    sheet = Image.new("RGB", (max(row.width for _, row in rows), high * len(rows)), "white")
    for i, (words, row) in enumerate(rows):
        ImageDraw.Draw(sheet).text((4, i * high + 10), words, "black", font_size=13)
        sheet.paste(row, (0, i * high + WORDS))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"wrote {path}")
