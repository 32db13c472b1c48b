"""The toy world's scores have known answers on videos whose truth is known."""
import dataclasses
import functools
import hashlib
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from toy import creatures
from common import media
import data
import train
from toy import world


SHARES = ("moves", "frozen", "broken")


def test_true_clips_score_everything():
    test = creatures.draw_test_set(32)
    scores = creatures.score_videos(creatures.true_clips(test), test)
    assert scores == dict(moves=100, frozen=0, broken=0, still=0, smoothness=100, identity_16=100, cells=100,
                          direction=100, field=100)


def test_what_can_be_wrong_is_seen():
    test = creatures.draw_test_set(32)
    true = creatures.true_clips(test)

    def scores_of(videos, test=test):
        scores = creatures.score_videos(videos, test)
        assert np.isclose(sum(scores[k] for k in SHARES), 100)
        return scores
    still = scores_of(np.repeat(test.references[:, None], creatures.FRAMES, 1))
    assert still["identity_16"] == still["cells"] == still["frozen"] == still["still"] == 100 and still["field"] == 0
    assert np.isnan(still["direction"])  # nothing moves
    backwards = scores_of(true[:, ::-1])
    assert backwards["moves"] == 100 and backwards["direction"] == 0
    others = dataclasses.replace(test, creatures=test.creatures[np.roll(np.arange(32), 1)])
    shuffled = scores_of(true, others)
    assert shuffled["identity_16"] < 20 and shuffled["cells"] < 40
    noise = scores_of(np.random.default_rng(0).integers(0, 256, true.shape).astype(np.uint8))
    assert noise["broken"] == 100 and noise["identity_16"] < 30 and noise["cells"] < 40


@pytest.mark.parametrize("damage", ["half", "double", "gone"])
def test_one_bad_frame_is_broken(damage):
    """The creature's right half is missing, it stands there twice, or it is not there, in one of nine frames."""
    test = creatures.draw_test_set(16)
    videos = creatures.true_clips(test)
    field = creatures.FIELD_RGB[test.fields].astype(np.uint8)
    tiles = creatures.draw_walks(np.random.default_rng([2024, 13]), test.directions)  # as true_clips draws them
    for i in range(16):
        row, column = tiles[i, 2] * creatures.TILE  # latent frame 2 is frames 3 and 4
        if damage == "half":
            videos[i, 4, row:row + 16, column + 8:column + 16] = field[i]
        elif damage == "gone":
            videos[i, 4] = field[i]
        else:
            other = (column + 16) % 32 if column % 16 == 0 else 0
            videos[i, 4, row:row + 16, other:other + 8] = videos[i, 4, row:row + 16, column:column + 8]
    assert creatures.score_videos(videos, test)["broken"] == 100


def test_a_field_that_changes_colour_does_not_break_the_creature():
    test = creatures.draw_test_set(16)
    videos = creatures.true_clips(test)
    other = creatures.FIELD_RGB[(test.fields + 1) % len(creatures.FIELDS)]
    for video, was, now in zip(videos, creatures.FIELD_RGB[test.fields], other):
        last = video[-1]  # a view
        last[(last == was).all(2)] = now
    scores = creatures.score_videos(videos, test)
    assert scores["field"] == 0 and scores["moves"] == scores["cells"] == 100


def test_cells_count_wrong_cells():
    """A quarter of the creature in another colour: that many cells are wrong, wherever it stands."""
    test = creatures.draw_test_set(16)
    bitmap = test.creatures.bitmap.copy()
    bitmap[:, :4, :4] = np.where(bitmap[:, :4, :4] == 1, 2, 1)  # every cell of one quarter is now another
    changed = dataclasses.replace(test, creatures=creatures.Creatures(bitmap, test.creatures.colours))
    scores = creatures.score_videos(creatures.true_clips(changed), test)
    assert scores["cells"] == 75 and scores["moves"] == 100


def test_clips_walk_from_edge_to_edge_and_some_stand_or_jump_anywhere():
    fields, directions, tiles = creatures.draw_clips(np.random.default_rng(0), 20000, 0.2, hardly=0.3, jumping=0.1)
    stands, jumps, walks = directions == creatures.STANDS, directions == creatures.JUMPS, directions < creatures.STANDS
    way = creatures.STEP[directions[walks]]
    walk = ((tiles[walks, -1] - tiles[walks, 0]) * way).sum(1)
    assert abs(stands.mean() - 0.2) < 0.02 and (tiles[stands] == tiles[stands, :1]).all()
    assert abs(jumps.mean() - 0.1) < 0.02 and len(np.unique(tiles[jumps].reshape(-1, 2), axis=0)) == creatures.GRID**2
    assert abs((tiles[jumps, 1:] == tiles[jumps, :-1]).all(2).mean() - 1 / creatures.GRID**2) < 0.02
    assert np.allclose(np.bincount(walk) / len(walk), [0.3, 0, 0.7], atol=0.02)
    end, up = (tiles[walks, -1] * way).sum(1)[walk > 0], way.sum(1)[walk > 0]
    assert set(end[up > 0]) == {creatures.GRID - 1} and set(end[up < 0]) == {0}
    assert tiles.min() == 0 and tiles.max() == creatures.GRID - 1
    assert len(np.unique(tiles[walks, 0][walk == 0], axis=0)) == creatures.GRID**2
    assert not creatures.held_out(fields, directions).any()
    _, directions, tiles = creatures.draw_clips(np.random.default_rng(0), 1000)  # the default: all walk two tiles
    assert creatures.STANDS not in directions and (abs(tiles[:, -1] - tiles[:, 0]).sum(1) == 2).all()


def views_of(folder):
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    views = [data.split_views(media.load_image(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    return np.array([[np.asarray(v) for v in pair] for pair in views]), [row["description"] for row in rows]


def test_both_views_show_the_same_place(tmp_path):
    """... unless the counter-trial asks for another. Fields differ; the captions of walking pairs name an action."""
    creatures.write_pairs(tmp_path / "same", n=40)
    creatures.write_pairs(tmp_path / "elsewhere", n=40, same_place=False)
    creatures.write_pairs(tmp_path / "walking", n=40, walking=True)
    share = {}
    for name in ("same", "elsewhere", "walking"):
        views, words = views_of(tmp_path / name)
        field = np.median(views.reshape(40, 2, -1, 3), 2)[:, :, None, None]
        find = creatures.find_creature
        corner = np.array([[find((np.abs(v - f).max(2) > 0)[None])[0][0] for v, f in zip(pair, fields)]
                           for pair, fields in zip(views.astype(float), field)])
        share[name] = (corner[:, 0] == corner[:, 1]).all(1).mean()
        assert ("walks" in words[0]["description_0"]) == (name == "walking")
        assert (field[:, 0] != field[:, 1]).any((1, 2, 3)).all()
    assert share["same"] == share["walking"] == 1 and share["elsewhere"] < 0.5


def test_held_out_combinations_never_train(tmp_path):
    fields, directions = creatures.draw_scenes(np.random.default_rng(0), 20000)
    assert len(set(zip(fields, directions))) == 24 and not creatures.held_out(fields, directions).any()
    test = creatures.draw_test_set()
    assert creatures.held_out(test.fields, test.directions).all()
    creatures.write_clips(tmp_path, n=30)
    captions = {f.read_text() for f in tmp_path.glob("*.txt")}
    assert captions and not captions & set(test.prompts)
    assert not any(colour in caption for caption in captions for colour in creatures.COLOURS)


def test_pairs_have_the_columns_of_subjects200k(tmp_path):
    creatures.write_pairs(tmp_path, n=20)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == ["image", "collection", "quality_assessment", "description"]
    assert set(table["description"][0].as_py()) == {"item", "description_0", "description_1", "category",
                                                    "description_valid"}
    assert pq.ParquetFile(tmp_path / "pairs.parquet").num_row_groups == 2


def test_small_sets_are_the_first_of_the_large_one(tmp_path):
    creatures.write_clips(tmp_path / "all", n=6)
    creatures.write_clips(tmp_path / "few", n=6, keep=2)
    creatures.write_pairs(tmp_path / "all", n=20)
    creatures.write_pairs(tmp_path / "few", n=20, keep=3)
    assert sorted(f.name for f in (tmp_path / "few").glob("0*")) == ["0000.mp4", "0000.txt", "0001.mp4", "0001.txt"]
    for file in (tmp_path / "few").glob("0*"):
        assert file.read_bytes() == (tmp_path / "all" / file.name).read_bytes()
    few, many = (pq.read_table(tmp_path / d / "pairs.parquet").to_pylist() for d in ("few", "all"))
    assert few == many[:3]


def test_only_the_toys_own_folders_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(creatures.DATA, "clips", functools.partial(creatures.write_clips, n=4))
    creatures.write_missing("toy/data/clips-2", "toy/data/clip", "toy/data/clips-two", "toy/clips", "clips")
    assert [str(d.relative_to(tmp_path)) for d in tmp_path.glob("**/*clip*")] == ["toy/data/clips-2"]
    assert len(list(tmp_path.glob("toy/data/clips-2/*.mp4"))) == 2
    creatures.write_missing("toy/data/clips-2")  # it is there, and of this version
    monkeypatch.setattr(creatures, "DATA_VERSION", creatures.DATA_VERSION + 1)
    with pytest.raises(ValueError, match="clips-2 holds another version of the toy's data: delete toy/data"):
        creatures.write_missing("toy/data/clips-2")


def test_what_is_drawn_belongs_to_its_version(tmp_path):
    """When this fails because the toy's data change on purpose, raise DATA_VERSION and take the new digest."""
    creatures.write_pairs(tmp_path, n=8)
    rows = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    fields, directions, tiles = creatures.draw_clips(np.random.default_rng(1), 8)
    eight = creatures.draw_creatures(np.random.default_rng(0), 8)
    drawn = hashlib.sha256(creatures.render(eight, fields, tiles).repeat(creatures.BEATS, 1).tobytes())
    for row in rows:
        drawn.update(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).tobytes())
        drawn.update(json.dumps(row["description"], sort_keys=True).encode())
    drawn.update("".join(map(creatures.caption, fields, directions)).encode())
    assert (creatures.DATA_VERSION, drawn.hexdigest()[:12]) == (2, "a1e7d197edb8")


@pytest.mark.parametrize("change", [{"fit": "pad"}, {"crop_jitter": 0.1}, {"height": 16}, {"base": "elsewhere"}])
def test_other_pictures_are_not_cached(monkeypatch, change):
    monkeypatch.setattr(world, "write_missing", lambda *folders: None)
    assert world.ensure_data(train.Config(**{**train.TOY, **change}), train.TOY).cache == ""


def test_test_creatures_are_not_training_creatures():
    train = creatures.draw_creatures(np.random.default_rng([0, 10]), 2000).bitmap.reshape(2000, -1)
    clips = creatures.draw_creatures(np.random.default_rng([0, 11]), 400).bitmap.reshape(400, -1)
    seen = {bytes(b) for b in np.concatenate([train, clips])}
    assert not any(bytes(b) in seen for b in creatures.draw_test_set().creatures.bitmap.reshape(96, -1))
