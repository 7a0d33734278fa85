"""A shard is one .npy file that numpy reads; it is written whole or not at all, and damage to it is named."""

import hashlib
import io
import os
import resource

import numpy as np
import pytest

from ray_pipeline.data.shards import Shard, shard_is_whole, write_shard
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

SHAPE = (6, 2, 3, 4, 8, 8)  # rows, variants, columns, C, H, W


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> Folder:
    return Folder(tmp_path) if request.param == "local" else Folder(request.getfixturevalue("s3")).child(tmp_path.name)


def values(shape: tuple[int, ...] = SHAPE, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def opened(folder: Folder, entry: dict) -> Shard:
    return Shard(folder, entry, SHAPE)


def test_numpy_reads_a_shard_and_its_entry_is_of_the_file(folder):
    entry = write_shard(folder, "shard-00000.npy", values())
    data = folder.read("shard-00000.npy")
    assert entry == {
        "file": "shard-00000.npy",
        "rows": 6,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    assert loaded.dtype == np.float16
    np.testing.assert_array_equal(loaded, values())


def test_equal_values_make_equal_bytes_however_they_lie_in_memory(tmp_path):
    folder, plain = Folder(tmp_path), values()
    turned = np.asfortranarray(plain)
    strided = np.repeat(plain, 2, axis=0)[::2]
    hashes = {write_shard(folder, "a.npy", array)["sha256"] for array in (plain, turned, strided, plain.astype(">f2"))}
    assert len(hashes) == 1
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), plain)


def test_every_record_is_the_columns_asked_for(folder):
    shard = opened(folder, write_shard(folder, "a.npy", values()))
    for row in range(6):
        for variant in range(2):
            for count in (1, 2, 3):
                np.testing.assert_array_equal(shard.record(row, variant, count), values()[row, variant, :count])


def test_a_shard_is_whole_with_its_own_hash_alone(folder):
    entry = write_shard(folder, "a.npy", values())
    assert shard_is_whole(folder, "a.npy", entry["sha256"])
    assert not shard_is_whole(folder, "a.npy", "0" * 64)
    assert not shard_is_whole(folder, "b.npy", entry["sha256"])
    folder.write("a.npy", folder.read("a.npy") + b"\0")
    assert not shard_is_whole(folder, "a.npy", entry["sha256"])


def test_hashing_a_remote_shard_takes_few_requests(s3, s3_server, tmp_path):
    folder = Folder(s3).child(tmp_path.name)
    entry = write_shard(folder, "a.npy", values((40, 1, 1, 4, 128, 128)))
    assert entry["bytes"] > 5e6
    before = len(s3_server.requests)
    assert shard_is_whole(folder, "a.npy", entry["sha256"])
    assert len(s3_server.requests) - before <= 2


def test_a_write_that_the_disk_refuses_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.npy cannot be used"):
            write_shard(Folder(tmp_path), "a.npy", values())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "found 0 bytes, expected"),
        (saved(values())[:-1], "found .* bytes, expected"),
        (saved(values()) + b"\0", "found .* bytes, expected"),
        (saved(values((6, 2, 3, 4, 4, 16))), r"found \(6, 2, 3, 4, 4, 16\) float16, expected \(6, 2, 3, 4, 8, 8\)"),
        (saved(values().astype("int16")), "found .* int16, expected .* float16"),
        (saved(values().astype(">f2")), "found .* >f2, expected .* float16"),
        (saved(np.asfortranarray(values())), "found columns last"),
        (saved(np.array([{"an": "object"}], dtype=object)), "found .* bytes, expected"),
        (b"PK\x03\x04".ljust(18560, b"\0"), "not a .npy file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': (((".ljust(18560, b"\0"), "not a .npy file"),
    ],
    ids=["gone", "empty", "short", "long", "shape", "dtype", "order of bytes", "order", "object", "zip", "header"],
)
def test_a_foreign_or_damaged_shard_is_named_and_the_remedy_told(folder, content, said):
    entry = write_shard(folder, "a.npy", values())
    if content is None:
        folder.remove(["a.npy"])
    else:
        folder.write("a.npy", content)
    with pytest.raises(UserError, match=rf"{folder.where('a.npy')} is missing or damaged \({said}.*encode --overwrite"):
        opened(folder, entry)


def test_a_pickle_of_the_right_size_is_never_loaded(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    entry = write_shard(folder, "a.npy", values())
    data = saved(np.array([Trap()], dtype=object))
    folder.write("a.npy", data + bytes(entry["bytes"] - len(data)))
    with pytest.raises(UserError, match=r"a\.npy.*damaged .*found \(1,\) object"):
        opened(folder, entry)
    assert not (tmp_path / "sprung").exists()


def test_a_reader_keeps_its_rows_while_a_local_shard_is_replaced(tmp_path):
    folder = Folder(tmp_path)
    shard = opened(folder, write_shard(folder, "a.npy", values()))
    write_shard(folder, "a.npy", np.zeros(SHAPE))
    np.testing.assert_array_equal(shard.record(5, 1, 3), values()[5, 1])


def test_a_local_shard_that_is_cut_short_while_it_is_open_is_named(tmp_path):
    folder = Folder(tmp_path)
    shard = opened(folder, write_shard(folder, "a.npy", values()))
    shard.check()
    os.truncate(tmp_path / "a.npy", 10_000)
    with pytest.raises(UserError, match=r"a\.npy is .*damaged \(it was cut to less than .*encode"):
        shard.check()


def test_what_is_refused_is_not_called_damage(s3_server):
    """A bucket that is closed is no reason to encode again."""
    uri = s3_server.make_bucket("shut")
    entry = write_shard(Folder(uri), "a.npy", values())
    shard = opened(Folder(uri), entry)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::shut/*"]}
    s3_server.make_bucket("shut", {"Version": "2012-10-17", "Statement": [deny]})
    for read in (
        lambda: shard.record(0, 0, 1),
        lambda: opened(Folder(uri), entry),
        lambda: shard_is_whole(Folder(uri), "a.npy", entry["sha256"]),
    ):
        with pytest.raises(UserError, match=r"s3://shut/a\.npy cannot be used .*credentials"):
            read()
