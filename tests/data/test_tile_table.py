"""A table of tiles gives back the rows that were written, wherever it lies; one that does not open is named."""

import os
import pickle
import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.tile_table import TileRow, TileTable, write_tile_table
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PARTNER_TYPES
from ray_pipeline.storage import Folder

NAME = "tiles.arrow"
ROWS = [
    TileRow(
        id=f"set {k % 2}/007_\u00b5{k}",
        path=f"foundation/set {k % 2}/images/\u00b5m {k}.png",
        partners={
            hint: tuple(f"degraded/{hint} {k} {n}.png" for n in range(1 + k % 4)) for hint in PARTNER_TYPES[: k % 4]
        },
        psf_fwhm_px=0.25 * k,
    )
    for k in range(50)
]
DATASETS = [
    DataSet("Gew\u00e4chs 1", 0, 30, {"super_resolution": 20, "denoising": 10}),
    DataSet("empty", 30, 0, {"super_resolution": 0, "denoising": 0}),
    DataSet("b", 30, 20, {"super_resolution": 13, "denoising": 6}),
]


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> Folder:
    """Below a path with a space and a letter beyond ASCII, which a URI holds in quotes."""
    root = Folder(tmp_path) if request.param == "local" else Folder(request.getfixturevalue("s3")).child(tmp_path.name)
    return root.child("mit Leerzeichen \u00b5")


@pytest.fixture
def table(folder) -> TileTable:
    write_tile_table(folder, NAME, ROWS, DATASETS)
    return TileTable(folder, NAME)


@pytest.mark.parametrize(
    "ids",
    [[], [0], range(50), range(49, -1, -1), [7, 7, 3, 7], np.array([49, 0], np.int64)],
    ids=["none", "one", "all", "backwards", "twice", "array"],
)
def test_rows_come_as_they_were_written_in_the_order_asked_for(table, ids):
    assert len(table) == 50
    assert table.rows(ids) == [ROWS[k] for k in ids]


def test_data_sets_come_as_they_were_written(table):
    assert table.datasets == tuple(DATASETS)


def test_a_split_without_tiles_is_a_table_without_rows(folder):
    write_tile_table(folder, NAME, [], [DataSet("a", 0, 0, {})])
    table = TileTable(folder, NAME)
    assert (len(table), table.rows([]), table.datasets) == (0, [], (DataSet("a", 0, 0, {}),))


@pytest.mark.parametrize("ids", [[-1], [50], [0, 2**40]])
def test_an_id_outside_the_table_is_an_error_and_never_another_row(table, ids):
    with pytest.raises(IndexError):
        table.rows(ids)


def test_a_pickled_table_is_small_and_gives_the_same_rows(table):
    data = pickle.dumps(table)
    assert len(data) < 500  # it is opened where it is read
    opened = pickle.loads(data)
    assert opened.rows(range(50)) == ROWS
    assert opened.datasets == table.datasets


def test_a_local_table_is_mapped_and_not_read(tmp_path):
    rows = [TileRow(id=f"a/{k:090}", path=f"foundation/a/{k:090}.png", partners={}) for k in range(20000)]
    write_tile_table(Folder(tmp_path), NAME, rows, [DataSet("a", 0, len(rows), {})])
    size = os.path.getsize(tmp_path / NAME)
    assert size > 3e6
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        table = TileTable(Folder(tmp_path), NAME)
        assert table.rows([19999, 3]) == [rows[19999], rows[3]]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.05 * size
    assert pa.total_allocated_bytes() - before < 0.05 * size


def test_a_reader_keeps_its_rows_while_the_table_is_written_anew(tmp_path):
    write_tile_table(Folder(tmp_path), NAME, ROWS, DATASETS)
    before = TileTable(Folder(tmp_path), NAME)
    write_tile_table(Folder(tmp_path), NAME, ROWS[::-1], DATASETS)
    assert before.rows(range(50)) == ROWS
    assert TileTable(Folder(tmp_path), NAME).rows(range(50)) == ROWS[::-1]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_equal_rows_make_equal_bytes(folder):
    for name in ("one", "two"):
        write_tile_table(folder, name, ROWS, DATASETS)
    assert folder.read("one") == folder.read("two")


def cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_data_sets(data: bytes) -> bytes:
    table, sink = pa.ipc.open_file(data).read_all(), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata())
    return sink.getvalue().to_pybytes()


def other_data_sets(data: bytes) -> bytes:
    metadata, sink = {b"datasets": b'[{"name": "a", "first": 0}]'}, pa.BufferOutputStream()
    table = pa.ipc.open_file(data).read_all().replace_schema_metadata(metadata)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "damage",
    [
        cut_off,
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"id,path\na,b\n" * 99,
        without_data_sets,
        other_data_sets,
    ],
    ids=["half", "last byte", "empty", "csv", "no data sets", "other data sets"],
)
def test_a_damaged_table_is_named_and_the_remedy_told(table, folder, damage):
    folder.write(NAME, damage(folder.read(NAME)))
    where = re.escape(folder.where(NAME))
    with pytest.raises(UserError, match=rf"table of tiles {where} is missing or damaged \(.+\); run `ray-pipeline enc"):
        TileTable(folder, NAME)


def test_a_missing_table_is_named_and_the_remedy_told(folder):
    where = re.escape(folder.where(NAME))
    with pytest.raises(UserError, match=rf"table of tiles {where} is missing or damaged \(.+\).*encode --overwrite"):
        TileTable(folder, NAME)


def test_a_table_that_must_not_be_read_is_not_called_damaged(s3_server):
    folder = Folder(s3_server.make_bucket("barred"))
    write_tile_table(folder, NAME, ROWS, DATASETS)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": ["arn:aws:s3:::barred/*"]}
    s3_server.make_bucket("barred", {"Version": "2012-10-17", "Statement": [deny]})
    with pytest.raises(UserError, match=r"s3://barred/tiles\.arrow cannot be used .*ACCESS_DENIED.*credentials"):
        TileTable(folder, NAME)
