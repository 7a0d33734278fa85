"""Latents in object storage with a cache: the same rows in few requests, and none for what this node has already."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data import shard_reader
from ray_pipeline.data.block_cache import BlockCache
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder, StorageError

ROWS, SHARD_ROWS, VARIANTS, SHAPE = 96, 24, 2, (4, 8, 8)
ROW_BYTES = VARIANTS * 2 * 2 * 4 * 8 * 8
BATCH = 8


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((ROWS, VARIANTS, 2, *SHAPE)).astype(np.float16)


@pytest.fixture
def root(s3, tmp_path, values, write_latents) -> Folder:
    folder = Folder(s3).child(tmp_path.name)
    write_latents(folder, values, ("canny",), shard_rows=SHARD_ROWS)
    return folder


@pytest.fixture
def small_blocks(monkeypatch) -> int:
    """Blocks of 5 rows, which do not divide a shard; returns how many the store has."""
    monkeypatch.setattr(shard_reader, "_BLOCK_BYTES", 5 * ROW_BYTES + 17)
    return ROWS // SHARD_ROWS * 5


def cache_of(tmp_path: Path, rows: float) -> BlockCache:
    """One that has room for so many rows that are read together."""
    return BlockCache(int(rows * ROW_BYTES / shard_reader.SHARE_USED) + 1, str(tmp_path / "cache"))


def read_epoch(store: LatentStore, values: np.ndarray, epoch: int, **windowed) -> None:
    """One epoch in the order of a plan, compared with what was written."""
    plan = SamplePlan(ROWS, BATCH, 0, "phase", **windowed)
    for step in range(epoch * ROWS // BATCH, (epoch + 1) * ROWS // BATCH):
        positions = plan.positions(step, 0, 1)
        ids, variants = plan.ids(positions), plan.variants(positions, VARIANTS)
        found = store.gather(ids, variants)
        np.testing.assert_array_equal(found["latent"], values[ids, variants, 0])
        np.testing.assert_array_equal(found["hint.canny"], values[ids, variants, 1])


def count(server, since: int) -> dict[str, int]:
    """Requests by method since; of GET, those for blocks or records, not for headers."""
    asked = server.requests[since:]
    parts = [where for method, _, where in asked if method == "GET" and where and not where.startswith("bytes=0-")]
    return {"HEAD": sum(method == "HEAD" for method, *_ in asked), "parts": len(parts), "all": len(asked)}


def test_an_epoch_takes_a_request_a_block_and_the_next_one_none(root, values, tmp_path, s3_server, small_blocks):
    store, before = LatentStore.open(root, cache_of(tmp_path, ROWS)), len(s3_server.requests)
    read_epoch(store, values, 0)
    shards = ROWS // SHARD_ROWS
    assert count(s3_server, before) == {"HEAD": shards, "parts": small_blocks, "all": small_blocks + 2 * shards}
    before = len(s3_server.requests)
    read_epoch(store, values, 1)
    read_epoch(pickle.loads(pickle.dumps(store)), values, 2)  # as a worker gets it
    assert s3_server.requests[before:] == []


def test_without_a_cache_each_sample_is_a_request(root, values, s3_server):
    store, before = LatentStore.open(root), len(s3_server.requests)
    read_epoch(store, values, 0)
    assert count(s3_server, before)["parts"] == ROWS


def test_windows_need_no_more_room_than_theirs(root, values, tmp_path, s3_server, small_blocks):
    """A quarter of the rows fits, and each epoch still takes far fewer requests than samples."""
    window = {"window": SHARD_ROWS, "shard_rows": SHARD_ROWS}
    cache = cache_of(tmp_path, 2 * SHARD_ROWS)
    store = LatentStore.open(root, cache, SHARD_ROWS)
    for epoch in range(3):
        before = len(s3_server.requests)
        read_epoch(store, values, epoch, **window)
        assert count(s3_server, before)["parts"] <= small_blocks + 8
    assert sum(path.stat().st_size for path in cache.place.glob("*-*")) <= cache.limit


@pytest.mark.parametrize("window", [None, SHARD_ROWS])
def test_a_cache_that_does_not_hold_what_is_read_together_is_not_used(root, values, tmp_path, s3_server, window):
    cache = cache_of(tmp_path, (window or ROWS) - 1)
    store, before = LatentStore.open(root, cache, window), len(s3_server.requests)
    read_epoch(store, values, 0)
    assert count(s3_server, before)["parts"] == ROWS
    assert not cache.place.exists()


def test_a_path_is_never_cached(tmp_path, values, write_latents):
    cache = cache_of(tmp_path, ROWS)
    write_latents(tmp_path / "store", values, ("canny",), shard_rows=SHARD_ROWS)
    read_epoch(LatentStore.open(tmp_path / "store", cache), values, 0)
    assert not cache.place.exists()


def test_a_store_that_was_written_anew_in_the_same_place_is_read_anew(root, values, tmp_path, write_latents):
    cache = cache_of(tmp_path, ROWS)
    read_epoch(LatentStore.open(root, cache), values, 0)
    other = -values
    write_latents(root, other, ("canny",), shard_rows=SHARD_ROWS)
    read_epoch(LatentStore.open(root, cache), other, 0)


def test_a_disk_that_takes_nothing_costs_a_request_a_sample_and_no_more(root, values, tmp_path, s3_server):
    (tmp_path / "file").write_text("")
    cache = BlockCache(2**24, str(tmp_path / "file" / "cache"))
    store, before = LatentStore.open(root, cache), len(s3_server.requests)
    with pytest.warns(UserWarning, match="takes no more blocks"):
        read_epoch(store, values, 0)
    assert count(s3_server, before)["parts"] == ROWS


def test_shards_that_are_gone_or_were_cut_are_named_and_those_on_this_node_still_read(root, values, tmp_path):
    store = LatentStore.open(root, cache_of(tmp_path, ROWS))
    store.gather(range(SHARD_ROWS))
    root.child("train").delete()
    root.child("train").write("shard-00002.npy", b"x" * 1000)
    np.testing.assert_array_equal(store.gather([5, 0])["latent"], values[[5, 0], 0, 0])
    for row, reason in ((SHARD_ROWS, "no such file"), (2 * SHARD_ROWS, "found 1000 bytes, expected")):
        with pytest.raises(UserError, match=rf"latent shard s3://tests/.*npy is missing or damaged \({reason}"):
            store.gather([row])


def test_a_bucket_that_refuses_is_no_damage_and_what_this_node_has_is_still_read(root, values, tmp_path, s3_server):
    store = LatentStore.open(root, cache_of(tmp_path, ROWS))
    store.gather([0])
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::refusing/*"]}
    bucket = Folder(s3_server.make_bucket("refusing"))
    bucket.write("shard-00003.npy", b"x")
    s3_server.make_bucket("refusing", {"Version": "2012-10-17", "Statement": [deny]})
    moved = LatentStore(bucket, store.index, store.stats, store.cache)
    np.testing.assert_array_equal(moved.gather([1])["latent"], values[[1], 0, 0])
    with pytest.raises(StorageError, match=r"s3://refusing/shard-00003\.npy cannot be used .*ACCESS_DENIED"):
        moved.gather([ROWS - 1])
