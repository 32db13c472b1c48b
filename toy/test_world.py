"""The toy world's scores have known answers on videos whose truth is known."""
import tests.common  # noqa: F401, before torch

import dataclasses

import numpy as np
import pyarrow.parquet as pq

from toy import world


def test_true_clips_score_everything():
    test = world.draw_test_set(32)
    scores = world.score_videos(world.true_clips(test), test)
    assert scores == dict(identity_16=100, identity_16_same=100, dynamic_degree=100, smoothness=100, field=100,
                          direction=100)


def test_what_can_be_wrong_is_seen():
    test = world.draw_test_set(32)
    still = np.repeat(test.references[:, None], world.FRAMES, 1)
    scores = world.score_videos(still, test)
    assert scores["identity_16"] == 100 and scores["dynamic_degree"] == scores["direction"] == scores["field"] == 0
    backwards = world.score_videos(world.true_clips(test)[:, ::-1], test)
    assert backwards["dynamic_degree"] == 100 and backwards["direction"] == 0
    others = dataclasses.replace(test, creatures=test.creatures[np.roll(np.arange(32), 1)])
    shuffled = world.score_videos(world.true_clips(test), others)
    assert shuffled["identity_16"] < 20 and shuffled["identity_16_same"] < 20
    noise = np.random.default_rng(0).integers(0, 256, (32, world.FRAMES, 32, 32, 3)).astype(np.uint8)
    assert world.score_videos(noise, test)["identity_16"] < 30


def test_held_out_combinations_never_train(tmp_path):
    fields, directions = world.draw_scenes(np.random.default_rng(0), 20000)
    assert len(set(zip(fields, directions))) == 24 and not world.held_out(fields, directions).any()
    test = world.draw_test_set()
    assert world.held_out(test.fields, test.directions).all()
    world.write_clips(tmp_path, n=30)
    captions = {f.read_text() for f in tmp_path.glob("*.txt")}
    assert captions and not captions & set(test.prompts)
    assert not any(colour in caption for caption in captions for colour in world.COLOURS)


def test_pairs_have_the_columns_of_subjects200k(tmp_path):
    world.write_pairs(tmp_path, n=20)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == ["image", "collection", "quality_assessment", "description"]
    assert set(table["description"][0].as_py()) == {"item", "description_0", "description_1", "category",
                                                    "description_valid"}
    assert pq.ParquetFile(tmp_path / "pairs.parquet").num_row_groups == 2


def test_small_sets_are_the_first_of_the_large_one(tmp_path):
    world.write_clips(tmp_path / "all", n=6)
    world.write_clips(tmp_path / "few", n=6, keep=2)
    world.write_pairs(tmp_path / "all", n=20)
    world.write_pairs(tmp_path / "few", n=20, keep=3)
    assert sorted(f.name for f in (tmp_path / "few").glob("0*")) == ["0000.mp4", "0000.txt", "0001.mp4", "0001.txt"]
    for file in (tmp_path / "few").glob("0*"):
        assert file.read_bytes() == (tmp_path / "all" / file.name).read_bytes()
    few, many = (pq.read_table(tmp_path / d / "pairs.parquet").to_pylist() for d in ("few", "all"))
    assert few == many[:3]


def test_only_the_toys_own_folders_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(world.DATA, "clips", (world.write_clips, 4, 0))
    world.ensure_data("toy/data/clips-2", "toy/data/clip", "toy/data/clips-two", "toy/clips", "clips")
    assert [str(d.relative_to(tmp_path)) for d in tmp_path.glob("**/*clip*")] == ["toy/data/clips-2"]
    assert len(list(tmp_path.glob("toy/data/clips-2/*.mp4"))) == 2


def test_test_creatures_are_not_training_creatures():
    train = world.draw_creatures(np.random.default_rng([0, 10]), 4000).bitmap.reshape(4000, -1)
    clips = world.draw_creatures(np.random.default_rng([0, 11]), 400).bitmap.reshape(400, -1)
    seen = {bytes(b) for b in np.concatenate([train, clips])}
    assert not any(bytes(b) in seen for b in world.draw_test_set().creatures.bitmap.reshape(96, -1))
