"""The toy world's scores have known answers on videos whose truth is known."""
import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import pytest

import data
from common.base import load_pipeline
from toy import creatures, train_base, world

TEST = creatures.draw_test_set(32)
TRUE = creatures.true_clips(TEST)
FIELD, OTHER = (creatures.FIELD_RGB[(TEST.fields + i) % 8].astype(np.uint8)[:, None, None, None] for i in (0, 1))
SHOWN = (TRUE != FIELD).any(-1, keepdims=True)  # where the creature is
FRAME = np.arange(9)[:, None, None, None]
RECOLOURED = (TEST.creatures.bitmap + np.pad(np.ones((4, 4), int), (0, 4))) % 3  # each cell of a quarter is another
RECOLOURED = dataclasses.replace(TEST, creatures=creatures.Creatures(RECOLOURED, TEST.creatures.colours))
ALL, LOW = dict.fromkeys("moves smoothness identity_16 cells direction field".split(), 100), pytest.approx(20, abs=20)


@pytest.mark.parametrize("videos, expected", [
    (TRUE, ALL | dict(frozen=0, broken=0, still=0)), (TRUE[:, ::-1], dict(moves=100, direction=0)),
    (np.repeat(TEST.references[:, None], 9, 1), dict(frozen=100, still=100, identity_16=100, cells=100, field=0)),
    (np.roll(TRUE, 1, 0), dict(moves=100, identity_16=LOW, cells=LOW)),
    (np.random.default_rng(0).integers(0, 256, TRUE.shape), dict(broken=100, identity_16=LOW, cells=LOW)),
    (creatures.true_clips(RECOLOURED), dict(moves=100, cells=75)),
    (np.where(SHOWN | (FRAME < 8), TRUE, OTHER), dict(moves=100, cells=100, field=0)),
    (np.where(SHOWN | (FRAME != 4), TRUE, np.roll(TRUE, 16, 3)), dict(broken=100)),
    (np.where((SHOWN.cumsum(3) % 16 < 10) | (FRAME != 4), TRUE, FIELD), dict(broken=100)),
    (np.broadcast_to(FIELD, TRUE.shape), dict(broken=100, still=100, field=100))],
    ids=["true", "backwards", "still", "others", "noise", "recoloured", "another field", "twice", "torn", "empty"])
def test_scores_of_videos_whose_truth_is_known(videos, expected):
    scores = creatures.score_videos(videos, TEST)
    assert {name: scores[name] for name in expected} == expected
    assert scores["moves"] + scores["frozen"] + scores["broken"] == pytest.approx(100)


def test_clips_walk_from_edge_to_edge_and_some_stand_or_jump_anywhere():
    fields, directions, tiles = creatures.draw_clips(np.random.default_rng(0), 20000, 0.2, hardly=0.3, jumping=0.1)
    stands, jumps, walks = directions == creatures.STANDS, directions == creatures.JUMPS, directions < creatures.STANDS
    assert stands.mean() == pytest.approx(0.2, abs=0.02) and jumps.mean() == pytest.approx(0.1, abs=0.02)
    assert (tiles[stands] == tiles[stands, :1]).all()
    assert (tiles[jumps, 1:] == tiles[jumps, :-1]).all(2).mean() == pytest.approx(1 / 9, abs=0.02)  # of 3 x 3 places
    way = ((tiles[walks, -1] - tiles[walks, 0]) * creatures.STEP[directions[walks]]).sum(1)
    assert np.bincount(way) / len(way) == pytest.approx([0.3, 0, 0.7], abs=0.02)  # from edge to edge
    assert len(set(zip(fields[walks], directions[walks]))) == 24
    assert not set(map(creatures.caption, fields, directions)) & set(TEST.prompts)  # what is asked for is never trained


def test_test_creatures_are_never_trained():
    drawn = [creatures.draw_creatures(np.random.default_rng([0, k]), n).bitmap for k, n in ((10, 2000), (11, 400))]
    test = creatures.draw_test_set().creatures.bitmap
    assert not {b.tobytes() for b in np.concatenate(drawn)} & {b.tobytes() for b in test}


@pytest.mark.parametrize("options, share", [({}, 1), ({"walking": True}, 1), ({"same_place": False}, 0.1)])
def test_both_views_of_a_pair_show_one_place_unless_asked(tmp_path, options, share):
    creatures.write_pairs(tmp_path, n=40, **options)
    pairs = data.ImagePairs(tmp_path, (32, 32))
    views, captions, _ = zip(*map(pairs.load, range(40)))
    assert all(("walks" in caption) == ("walking" in options) for caption in captions[0])
    fields = np.median(np.array(views), (2, 3), keepdims=True)
    shown = (np.array(views) != fields).any(-1)
    assert (shown[:, 0] == shown[:, 1]).all((1, 2)).mean() == pytest.approx(share, abs=0.2)


def test_only_the_toys_own_folders_are_written_and_small_sets_are_the_first_of_the_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(creatures.DATA, "clips", functools.partial(creatures.write_clips, n=4))
    creatures.write_missing(*(f"toy/data/clip{end}" for end in ("s", "s-2", "s-two", "")), "toy/clips", "clips")
    assert sorted(map(str, Path().glob("**/clip*"))) == ["toy/data/clips", "toy/data/clips-2"]
    few = sorted(Path().glob("toy/data/clips-2/*.mp4"))
    assert len(few) == 2 and all(f.read_bytes() == Path("toy/data/clips", f.name).read_bytes() for f in few)
    assert not any(colour in f.with_suffix(".txt").read_text() for colour in creatures.COLOURS for f in few)
    monkeypatch.setattr(creatures, "DATA_VERSION", creatures.DATA_VERSION + 1)
    with pytest.raises(ValueError, match="clips-2 holds another version of the toy's data: delete toy/data"):
        creatures.write_missing("toy/data/clips-2")


def test_what_is_drawn_belongs_to_its_version(tmp_path):
    """When this fails because the toy's data change on purpose, raise DATA_VERSION and take the new digest."""
    fields, directions, tiles = creatures.draw_clips(np.random.default_rng(1), 8)
    drawn = TRUE.tobytes() + tiles.tobytes() + " ".join(map(creatures.caption, fields, directions)).encode()
    creatures.write_pairs(tmp_path, n=8)
    for views, captions, item in map(data.ImagePairs(tmp_path, (32, 32)).load, range(8)):
        drawn += np.array(views).tobytes() + " ".join([*captions, item]).encode()
    assert (creatures.DATA_VERSION, hashlib.sha256(drawn).hexdigest()[:12]) == (3, "7303f2ce12ba")


def test_the_base_is_trained_and_sampled(tmp_path):
    """Two steps of each part leave a base that the pipeline loads, with a VAE that has learned its scale."""
    train_base.main(train_base.Config(out=str(tmp_path / "base"), vae_steps=2, vae_batch=1, steps=2, batch=2, pool=4))
    pipe = load_pipeline(tmp_path / "base")
    videos = world.sample_test_set(pipe, creatures.draw_test_set(1), steps=2)
    assert videos.shape == (1, 9, 32, 32, 3) and pipe.vae.config.scaling_factor != 1
