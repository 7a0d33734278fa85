"""The actor's answer for a shard: its file and record, or what is wrong, in words that survive Ray."""

import json
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.shard_encoder import (
    LISTED_TILES,
    ShardEncoder,
    record_file,
    shard_file,
    shard_number,
    stored_record,
)
from ray_pipeline.data.tile_table import write_tile_table
from ray_pipeline.storage import Folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(job_for, copy_of_data, tmp_path):
    return job_for(copy_of_data, store=tmp_path / "latents", shard_rows=5, variants=2)


def answers(job, encoder: ShardEncoder, *numbers: int) -> list[dict]:
    """What the job's actor answers for shards of the training split's first 12 tiles."""
    write_tile_table(Folder(job.store).child("train"), LISTED_TILES, list_tiles(job).rows["train"][:12], [])
    splits = np.array(["train"] * len(numbers), dtype=object)
    answer = encoder({"split": splits, "shard": np.array(numbers)})
    assert answer["split"].tolist() == splits.tolist()
    return [json.loads(record) for record in answer["record"]]


def test_a_record_tells_rows_sums_and_hash_of_the_file_beside_it(job):
    folder = Folder(job.store).child("train")
    for number, record in zip((0, 2), answers(job, ShardEncoder(job, "f", use_gpu=False), 0, 2), strict=True):
        values = np.load(Path(job.store, "train", shard_file(number)))
        assert values.shape == ({0: 5, 2: 2}[number], 2, 5, 4, 8, 8)
        assert (record["rows"], record["rejected"], record["fingerprint"]) == (len(values), [], "f")
        latents = values[:, :, 0].astype(np.float64)
        assert record["count"] == latents.size // 4
        np.testing.assert_allclose(record["sum"], latents.sum(axis=(0, 1, 3, 4)), rtol=1e-9)
        np.testing.assert_allclose(record["square"], (latents**2).sum(axis=(0, 1, 3, 4)), rtol=1e-9)
        assert json.loads(Path(job.store, "train", record_file(number)).read_text()) == record
        assert stored_record(folder, number, "f") == record
        assert stored_record(folder, number, "another") is None
    assert stored_record(folder, 1, "f") is None


def test_bad_tiles_are_in_the_record_and_their_shard_is_made_again(job):
    rows, folder = list_tiles(job).rows["train"], Folder(job.store).child("train")
    encoder = ShardEncoder(job, "f", use_gpu=False)
    (whole,) = answers(job, encoder, 0)
    before = np.load(Path(job.store, "train", shard_file(0)))
    Path(job.root, rows[3].path).write_text("none")
    (record,) = answers(job, encoder, 0)
    assert record["rows"] == 4
    assert [(bad["id"], bad["path"]) for bad in record["rejected"]] == [(rows[3].id, rows[3].path)]
    assert stored_record(folder, 0, "f") is None  # whole, but the tile may have been repaired
    np.testing.assert_allclose(
        np.load(Path(job.store, "train", shard_file(0))), before[[0, 1, 2, 4]], rtol=2**-10, atol=5e-7
    )
    for row in rows[:5]:
        Path(job.root, row.path).write_text("none")
    (record,) = answers(job, encoder, 0)
    assert (record["rows"], len(record["rejected"]), record["count"]) == (0, 5, 0)
    assert np.load(Path(job.store, "train", shard_file(0))).shape == (0, 2, 5, 4, 8, 8)
    assert whole["rows"] == 5


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("name", [shard_file(0), record_file(0)])
def test_a_shard_without_its_whole_file_and_record_is_not_stored(job, damage, name):
    answers(job, ShardEncoder(job, "f", use_gpu=False), 0)
    assert stored_record(Folder(job.store).child("train"), 0, "f")
    if name == record_file(0) and damage is not Path.unlink:
        Path(job.store, "train", name).write_text("{")
    else:
        damage(Path(job.store, "train", name))
    assert stored_record(Folder(job.store).child("train"), 0, "f") is None


@pytest.mark.parametrize("scale", [float("nan"), 1e9])
def test_latents_that_fp16_cannot_hold_are_never_stored(job, scale):
    encoder = ShardEncoder(job, "f", use_gpu=False)
    encoder.encoder.autoencoder.network.encoder.layers[-1].weight *= scale
    (answer,) = answers(job, encoder, 0)
    assert list(answer) == ["wrong"]
    assert "fp16 cannot hold" in answer["wrong"]
    assert [path.name for path in Path(job.store, "train").iterdir()] == [LISTED_TILES]


def test_names_and_numbers_of_shards_belong_together():
    assert (shard_file(12), record_file(12)) == ("shard-00012.npy", "shard-00012.json")
    for number in (0, 99999, 100000, 1234567):
        assert shard_number({"file": shard_file(number)}) == number
