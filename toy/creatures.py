"""Pixel-art creatures: how they are drawn, written as data sets, and how videos of them are scored.

A creature is a random left-right symmetric bitmap of 8x8 cells in two colours. Every identity is new and no caption can
describe it, so a model can only get it right by looking at the reference. Cells are 2 px, a creature is 16x16 px, and
it always stands on the grid of 8-px tiles that the transformer's tokens cover (VAE 2x, patch 4). A clip has 9 frames of
32x32, 5 for the VAE. A creature that walks makes two steps of one tile, from one edge of the field to the other.

Scores are computed from arrays of pixels, and they are exact, because the truth is known.
"""
import io
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from PIL import Image

from common.media import save_video

SIZE, TILE, CELL, CELLS = 32, 8, 2, 8  # px per frame side, per tile, per cell; cells per creature side
FRAMES, FPS, BEATS = 9, 4, (1, 2, 2, 2, 2)     # frames of a clip, and how many the VAE puts into each latent frame
GRID = SIZE // TILE - 1                         # tile positions of a 2x2-tile creature along one axis: 3

FIELDS = {"green": (60, 130, 60), "brown": (120, 75, 40), "grey": (128, 128, 128), "navy": (25, 30, 80),
          "tan": (205, 180, 140), "teal": (20, 110, 115), "plum": (100, 40, 100), "pink": (245, 170, 185)}
COLOURS = {"red": (230, 40, 40), "orange": (250, 140, 20), "yellow": (250, 225, 40), "lime": (120, 240, 60),
           "cyan": (40, 220, 240), "blue": (40, 80, 235), "magenta": (235, 60, 220), "white": (245, 245, 245)}
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (row, column) tiles per step
FIELD_RGB, COLOUR_RGB = np.array(list(FIELDS.values())), np.array(list(COLOURS.values()))
STEP = np.array(list(DIRECTIONS.values()))
STANDS, JUMPS = len(DIRECTIONS), len(DIRECTIONS) + 1  # the directions of those that stand, and that jump about
# How probable a cell of a creature's left half is not empty: (8,4).
SOLID = np.array([[.35, .55, .75, .8], [.5, .8, .95, 1], [.6, .9, 1, 1], [.6, .95, 1, 1],
                  [.6, .95, 1, 1], [.5, .85, .95, 1], [.4, .7, .8, .7], [.4, .6, .5, .3]])
VERBS = [*(f"walks {way}" for way in DIRECTIONS), "stands", "jumps"]


# ---- drawing ---------------------------------------------------------------------------------------------------------

@dataclass
class Creatures:
    """N identities. bitmap (N,8,8): 0 the field shows through, 1 first colour, 2 second; colours (N,2) indices."""
    bitmap: np.ndarray
    colours: np.ndarray

    def __getitem__(self, i):
        return Creatures(self.bitmap[i], self.colours[i])


def draw_creatures(rng, n):
    """n random identities: a solid middle, ragged edges, two eyes in the second colour."""
    half = (rng.random((n, 8, 4)) < SOLID) * (1 + (rng.random((n, 8, 4)) < .35))
    half[:, 2, 1:4] = [1, 2, 1]  # eyes: which way is up can always be seen
    colours = rng.permuted(np.tile(np.arange(len(COLOURS)), (n, 1)), axis=1)[:, :2]
    return Creatures(np.concatenate([half, half[:, :, ::-1]], 2).astype(np.int64), colours)


def render(creatures, fields, tiles):
    """Creature n on field n at tile positions tiles (N,F,2) (row, column) -> uint8 (N,F,32,32,3)."""
    frames = np.empty((*tiles.shape[:2], SIZE // CELL, SIZE // CELL, 3), np.uint8)
    for n, f in np.ndindex(frames.shape[:2]):
        cells = np.zeros(frames.shape[2:4], int)
        row, column = tiles[n, f] * (TILE // CELL)
        cells[row:row + CELLS, column:column + CELLS] = creatures.bitmap[n]
        frames[n, f] = np.array([FIELD_RGB[fields[n]], *COLOUR_RGB[creatures.colours[n]]])[cells]
    return frames.repeat(CELL, 2).repeat(CELL, 3)


def draw_walks(rng, directions):
    """Tile positions (N,5,2), one per latent frame: wait, step, wait, step, from one edge to the other."""
    n = len(directions)
    way, axis = STEP[directions], np.abs(STEP[directions]).argmax(1)
    start = rng.integers(0, GRID, (n, 2))
    start[np.arange(n), axis] = np.where(way.sum(1) > 0, 0, GRID - 1)
    return start[:, None] + np.array([0, 0, 1, 1, 2])[:, None] * way[:, None]


def draw_clips(rng, n, standing=0.0, hardly=0.0, jumping=0.0):
    """n scenes of moving pictures: field and direction indices, tile positions (N,5,2).

    The shares are the base's (toy/train_base.py): `standing` clips stand, anywhere, and say so (direction STANDS). Of
    those that say "walks", `hardly` stand as well. In `jumping` clips, which say so (JUMPS), the creature is somewhere
    else in each latent frame.
    """
    fields, turn = rng.integers(0, len(FIELDS), n), rng.integers(1, 4, n)
    directions = (fields + turn) % 4  # never field % 4: that is what the test set asks for
    tiles = draw_walks(rng, directions)
    if standing or hardly or jumping:
        u = rng.random(n)
        directions = np.where(u < standing, STANDS, np.where(u > 1 - jumping, JUMPS, directions))
        still = (directions == STANDS) | (directions < STANDS) & (rng.random(n) < hardly)
        tiles[still] = rng.integers(0, GRID, (still.sum(), 1, 2))
        jumps = directions == JUMPS
        tiles[jumps] = rng.integers(0, GRID, (jumps.sum(), tiles.shape[1], 2))
    return fields, directions, tiles


def caption(field_index, direction=STANDS, colours=None):
    """What a clip or a still picture (which stands) shows. Only the base model ever sees colours named."""
    what = "creature" if colours is None else "{} and {} creature".format(*(list(COLOURS)[c] for c in colours))
    return f"a{'n' if what[0] in 'aeiou' else ''} {what} {VERBS[direction]} over a {list(FIELDS)[field_index]} field"


# ---- data sets on disk -----------------------------------------------------------------------------------------------

def write_pairs(folder, n=2000, seed=0, keep=None, same_place=True, walking=False):
    """n pairs, or the first `keep` of them, as one parquet with the Subjects200K columns: two views side by side.

    The subjects of Subjects200K are centred in both views (5.4), so the creature stands at the same place in both. Its
    captions name a scene, not an action: "stands". Counter-trials: same_place=False, and walking=True ("walks left").
    """
    rng = np.random.default_rng([seed, 10])
    creatures = draw_creatures(rng, n)
    field, shift = rng.integers(0, len(FIELDS), n), rng.integers(1, len(FIELDS), n)
    fields = np.stack([field, (field + shift) % len(FIELDS)])  # each view stands on another field
    places = [rng.integers(0, GRID, (n, 1, 2)) for _ in fields]
    directions = (fields + rng.integers(1, 4, fields.shape)) % 4 if walking else np.full(fields.shape, STANDS)
    left = render(creatures, fields[0], places[0])[:, 0]
    right = render(creatures, fields[1], places[0 if same_place else 1])[:, 0]
    pad, rows = 2, []
    for i in range(keep or n):
        sheet = np.full((SIZE + 2 * pad, 2 * SIZE + 3 * pad, 3), 255, np.uint8)
        sheet[pad:-pad, pad:pad + SIZE], sheet[pad:-pad, 2 * pad + SIZE:-pad] = left[i], right[i]
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, "PNG")
        rows.append({
            "image": {"bytes": file.getvalue(), "path": f"{i:06d}.png"}, "collection": "collection_2",
            "quality_assessment": {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5},
            "description": {"item": "creature", "category": "creature", "description_valid": True,
                            "description_0": caption(fields[0, i], directions[0, i]),
                            "description_1": caption(fields[1, i], directions[1, i])}})
    Path(folder).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), Path(folder) / "pairs.parquet", row_group_size=16)


def write_clips(folder, n=400, seed=0, keep=None):
    """n clips, or the first `keep` of them, as H.264 files with captions that never name the creature's colours."""
    rng = np.random.default_rng([seed, 11])
    creatures, (fields, directions, tiles) = draw_creatures(rng, n), draw_clips(rng, n)
    clips = render(creatures, fields, tiles).repeat(BEATS, 1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i in range(keep or n):
        frames = [Image.fromarray(frame) for frame in clips[i]]
        save_video(Path(folder) / f"{i:04d}.mp4", frames, FPS, enlarge=4)  # yuv420p would mix 2-px cells
        (Path(folder) / f"{i:04d}.txt").write_text(caption(fields[i], directions[i]))


DATA_VERSION = 3  # of what is drawn, and of how the cache names it: raise it when either changes
DATA = {  # folder in toy/data: what writes it
    "pairs": partial(write_pairs, n=2000), "clips": partial(write_clips, n=400),
    "pairs_elsewhere": partial(write_pairs, n=2000, same_place=False),
    "pairs_walking": partial(write_pairs, n=2000, walking=True),
    "pairs_val": partial(write_pairs, n=200, seed=1), "clips_val": partial(write_clips, n=60, seed=1),
}
ONE_PROCESS = FileLock("toy/data/.lock")  # "with ONE_PROCESS": the others wait


def write_missing(*folders):
    """Write those of the toy's data sets that are missing: NAME of DATA, NAME-N, its first N, and the held-out data,
    NAME_val or NAME-N_val, which are the same whatever is trained on. Any other folder is the user's own.

    A folder is renamed when it is whole, so a killed run leaves no half. ValueError for one of another version."""
    for folder in map(Path, folders):
        name, _, keep = folder.name.removesuffix("_val").partition("-")
        if folder.parent != Path("toy/data") or name not in DATA or not (keep or "1").isdigit():
            continue
        if folder.name.endswith("_val"):
            name, keep = f"{name[:5]}_val", ""  # pairs_val or clips_val
        with ONE_PROCESS:
            if not folder.exists():
                print(f"writing {folder}", flush=True)
                part = folder.with_name(f"{folder.name}.tmp")
                shutil.rmtree(part, ignore_errors=True)
                DATA[name](part, keep=int(keep) if keep else None)
                (part / "version.txt").write_text(str(DATA_VERSION))
                os.replace(part, folder)
        note = folder / "version.txt"
        if not note.is_file() or note.read_text() != str(DATA_VERSION):
            raise ValueError(f"{folder} holds another version of the toy's data: delete toy/data, run again")


# ---- the test set and the scores -------------------------------------------------------------------------------------

@dataclass
class TestSet:
    """n unseen creatures, a picture (n,32,32,3) of each on another field, and a prompt whose (field, direction) no
    training caption holds."""
    creatures: Creatures
    references: np.ndarray
    fields: np.ndarray
    directions: np.ndarray
    prompts: list


def draw_test_set(n=96):
    """The first n of the test set: the same 96 creatures, whatever n is (more are drawn for a larger one)."""
    rng, drawn = np.random.default_rng([2024, 12]), max(n, 96)
    creatures = draw_creatures(rng, drawn)
    fields = np.arange(drawn) % len(FIELDS)
    directions = fields % 4
    elsewhere = (fields + rng.integers(1, len(FIELDS), drawn)) % len(FIELDS)
    references = render(creatures, elsewhere, rng.integers(0, GRID, (drawn, 1, 2)))[:, 0]
    prompts = [caption(f, d) for f, d in zip(fields, directions)]
    return TestSet(creatures[:n], references[:n], fields[:n], directions[:n], prompts[:n])


def true_clips(test, seed=2024):
    """What the prompts ask for, drawn by the renderer: uint8 (n,9,32,32,3)."""
    tiles = draw_walks(np.random.default_rng([seed, 13]), test.directions)
    return render(test.creatures, test.fields, tiles).repeat(BEATS, 1)


def best_cells(video, bitmaps, colours, field_rgb):
    """How many of the 64 cells are right, per frame and creature, (F,K) in 0..1, at the best placement in each frame.

    video float (F,3,H,W) in 0..255; bitmaps (K,8,8) with colours (K,2); field_rgb (F,3). A cell is right when the
    nearest of the eight creature colours and the frame's own field colour is what the creature has there.
    """
    palette = torch.from_numpy(np.array([[*COLOUR_RGB, field] for field in field_rgb])).float()  # (F,9,3): field is 8
    cells = torch.nn.functional.avg_pool2d(video, CELL, stride=1)                            # (F,3,31,31)
    nearest = (cells[:, None] - palette[..., None, None]).square().sum(2).argmin(1)          # (F,31,31)
    has = torch.nn.functional.one_hot(nearest, 9).permute(0, 3, 1, 2).float()                # (F,9,31,31)
    look = np.concatenate([np.full((len(bitmaps), 1), 8), colours], 1)                       # cell value -> colour
    wanted = torch.from_numpy(look[np.arange(len(bitmaps))[:, None, None], bitmaps])         # (K,8,8)
    kernels = torch.nn.functional.one_hot(wanted, 9).permute(0, 3, 1, 2).float()             # (K,9,8,8)
    right = torch.nn.functional.conv2d(has, kernels, dilation=CELL)                          # (F,K,17,17)
    return right.flatten(2).amax(2) / CELLS**2


def find_creature(shown):
    """Where is the creature, and is it in one piece? For each frame of shown (F,32,32), the pixels that are not field.

    Returns the corner (F,2) of the 16x16 window that holds most of them, and whether the frame shows one whole
    creature: at least 128 pixels inside (half the window; the leanest of 20,000 creatures covers 120, one in a hundred
    fewer than 152), no less than 85 % of the video's usual number, and outside no more than an eighth of it.
    """
    inside = np.lib.stride_tricks.sliding_window_view(shown, (2 * TILE, 2 * TILE), (1, 2)).sum((3, 4))  # (F,17,17)
    places = inside.reshape(len(shown), -1)
    corner = np.stack(np.unravel_index(places.argmax(1), inside.shape[1:]), 1)
    best = places.max(1)
    outside = shown.sum((1, 2)) - best
    return corner, (best >= 128) & (best >= 0.85 * np.median(best)) & (outside <= best / 8)


def score_videos(videos, test):
    """The exact scores of videos uint8 (n,F,32,32,3) made from `test`: a dict of per cent over the n videos.

    moves        whole in every frame, and ends at least a tile (8 px) from where it began
    frozen       whole in every frame, and ends nearer than that
    broken       not whole in some frame (find_creature); these three add up to 100
    still        frozen to the pixel: frames differ from the next by less than 3 of 255 in the mean
    smoothness   share of frame transitions in which the creature's window moves at most a tile
    identity_16  more cells are those of its own reference than of 15 other creatures
    cells        share of the 64 cells that are right, mean over frames (best_cells)
    direction    of those that move: mostly along the named direction
    field        the field has the named colour in every frame

    What fools them: a still picture is whole, smooth and has all its cells; an empty field's cells are right where the
    creature has none (a quarter); a wrong creature can move well, and so can one on a field that changes colour.
    """
    means = {k: np.array(v, float) for k, v in score_each(videos, test).items()}
    return {k: 100 * float(v[~np.isnan(v)].mean()) if not np.isnan(v).all() else float("nan") for k, v in means.items()}


def score_each(videos, test):
    """The same for each video, 0 to 1: {score: a list}. The direction of one that does not move is NaN."""
    rng, rows = np.random.default_rng([2024, 14]), []
    for i, video in enumerate(videos):
        video = video.astype(np.float32)
        field_rgb = np.median(video.reshape(len(video), -1, 3), 1)  # (F,3): a creature is a quarter of it at most
        others = rng.permutation(np.delete(np.arange(len(test.creatures.bitmap)), i))[:15]
        candidates = test.creatures[np.array([i, *others])]
        cells = best_cells(torch.from_numpy(video).permute(0, 3, 1, 2), candidates.bitmap, candidates.colours,
                           field_rgb).mean(0)
        corner, whole = find_creature(np.abs(video - field_rgb[:, None, None]).max(3) > 48)
        move, whole = corner[-1] - corner[0], whole.all()
        moved = np.abs(move).max() >= TILE
        steady = np.abs(np.diff(corner, axis=0)).max(1) <= TILE + 1
        nearest = np.abs(FIELD_RGB - field_rgb[:, None]).sum(2).argmin(1)  # (F,)
        turned = (STEP @ move).argmax() == test.directions[i]
        rows.append({"moves": whole and moved, "frozen": whole and not moved, "broken": not whole,
                     "still": np.abs(np.diff(video, axis=0)).mean((1, 2, 3)).max(initial=0) < 3,
                     "smoothness": steady.mean() if len(video) > 1 else 1,
                     "identity_16": (cells[0] > cells[1:]).all().item(), "cells": cells[0].item(),
                     "direction": float(turned) if moved and whole else np.nan,
                     "field": (nearest == test.fields[i]).all()})
    return {score: [row[score] for row in rows] for score in rows[0]}
