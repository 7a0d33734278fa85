"""Bad tiles are listed and stop the encoding, or are left out of it; none is dropped in silence, and repaired ones come
back."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data.encode import check_store
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.rejected import Rejected, in_words, rejected_csv
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, VAL = 24, 8  # tiles of tiny_data


def test_rejected_tiles_survive_csv_and_are_told_by_path_and_reason():
    rows = [Rejected(f"set/{k}", f"a, \u00b5 {k}.png", 'found "x",\nsomething') for k in range(7)]
    back = list(csv.reader(rejected_csv(rows).decode().splitlines(keepends=True)))
    assert back == [["id", "path", "reason"], *([row.id, row.path, row.reason] for row in rows)]
    assert in_words(rows[:1]) == 'a, \u00b5 0.png: found "x",\nsomething'
    assert in_words(rows).count("found") == 5
    assert in_words(rows).endswith("; ...")


def listed(store: str) -> list[list[str]]:
    with Path(store, "rejected.csv").open(encoding="utf-8", newline="") as lines:
        head, *rows = csv.reader(lines)
    assert head == ["id", "path", "reason"]
    return rows


def contents(store: str) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in Path(store).rglob("*") if path.is_file()}


def spoil(root: Path, rows) -> dict[str, tuple[str, str]]:
    """Spoils four training tiles of two shards, a whole shard of the validation tiles, by path; id -> path, reason."""
    train, val = rows["train"], rows["val"]
    damages: list[tuple[str, str, Callable[[Path], object], str]] = [
        (train[1].id, train[1].path, lambda path: path.write_bytes(path.read_bytes()[:-40]), "found a truncated PNG"),
        (train[3].id, train[3].path, lambda path: write_tile(path, np.full((64, 64), 0.4)), "found a constant tile"),
        (train[6].id, train[6].path, lambda path: write_tile(path, np.eye(32)), "found 32x32 px"),
        (
            train[20].id,
            train[20].partners["denoising"][0],
            lambda path: write_tile(path, np.eye(32)),
            "a noisy partner of 32x32 px",
        ),
        (val[7].id, val[7].path, lambda path: path.write_text("none"), "expected a PNG image, found other content"),
    ]
    for _, path, damage, _ in damages:
        damage(root / path)
    return {name: (path, reason) for name, path, _, reason in damages}


def test_bad_tiles_are_left_out_or_stop_the_job_and_come_back_repaired(encoded, copy_of_data, run_job, fingerprint_of):
    job = replace(encoded, root=str(copy_of_data), store=str(copy_of_data / "latents"), max_rejected=5)
    rows = list_tiles(job).rows
    whole = {row.path: Path(job.root, row.path).read_bytes() for split in rows.values() for row in split}
    whole |= {
        path: Path(job.root, path).read_bytes() for row in rows["train"] for path in sum(row.partners.values(), ())
    }
    bad = spoil(copy_of_data, rows)

    counted = []
    run_job(job, counted.append)
    assert sum(counted) == TRAIN + VAL
    assert [(name, path) for name, path, _ in listed(job.store)] == [(name, bad[name][0]) for name in sorted(bad)]
    for name, _, reason in listed(job.store):
        assert reason.startswith(bad[name][1])
    check_left_out(job, encoded, set(bad))

    assert check_store(job, fingerprint_of(job))
    for allowed in (4, 0):
        with pytest.raises(UserError, match=rf"rejected\.csv lists 5 tiles .* data\.max_rejected {allowed}; repair"):
            check_store(replace(job, max_rejected=allowed), fingerprint_of(job))

    with pytest.raises(UserError, match=r"tiles cannot be used, more than data\.max_rejected 0 \(.*rejected\.csv\);"):
        run_job(replace(job, max_rejected=0))
    assert not check_store(job, fingerprint_of(job))  # not finished
    assert listed(job.store)

    kept = {path: path.stat().st_mtime_ns for path in Path(job.store).rglob("*.npy")}
    for path, data in whole.items():
        Path(job.root, path).write_bytes(data)
    run_job(replace(job, max_rejected=0))
    assert contents(job.store) == contents(encoded.store)  # no rejected.csv either
    again = {str(path.relative_to(job.store)) for path, before in kept.items() if path.stat().st_mtime_ns != before}
    assert again == {"train/shard-00000.npy", "train/shard-00002.npy", "val/shard-00001.npy"}


def check_left_out(job, encoded, bad: set[str]) -> None:
    """The store holds all other tiles, under their rows, as a store of good tiles does."""
    for split, count in (("train", TRAIN), ("val", VAL)):
        stored, full = (LatentStore.open(Path(of.store, split)) for of in (job, encoded))
        tables = [TileTable(of.folder, "tiles.arrow") for of in (stored, full)]
        names, before = ([row.id for row in table.rows(range(len(table)))] for table in tables)
        assert names == [name for name in before if name not in bad]
        assert len(stored) + len(bad & set(before)) == count
        assert stored.datasets[0].count == len(stored) == tables[0].datasets[0].count
        assert stored.index["rejected"] == len(bad)  # of the whole store
        order = np.random.default_rng(0).permutation(len(stored))
        found = stored.gather(order, order % 2)
        expected = full.gather([before.index(names[row]) for row in order], order % 2)
        for name, latents in expected.items():  # in other batches the sums have another order
            np.testing.assert_allclose(found[name].astype(float), latents.astype(float), rtol=2**-10, atol=5e-7)
    stats = json.loads(Path(job.store, "stats.json").read_text())
    assert stats["count"] == TRAIN - 4


def test_tiles_known_to_be_bad_count_beside_those_that_were_opened(encoded, copy_of_data, run_job, fingerprint_of):
    """They are in one list, first of all; and a split of bad tiles alone is no split."""
    job = replace(encoded, root=str(copy_of_data), store=str(copy_of_data / "latents"), hints=("canny",), simulated=())
    job = replace(job, variants=1, max_rejected=9)
    rows = list_tiles(job).rows
    Path(job.root, rows["train"][0].path).unlink()
    Path(job.root, rows["train"][1].path).write_text("none")
    run_job(job)
    assert [name for name, _, _ in listed(job.store)] == [rows["train"][0].id, rows["train"][1].id]
    assert check_store(replace(job, max_rejected=2), fingerprint_of(job))
    with pytest.raises(UserError, match=r"lists 2 tiles that were left out"):
        check_store(replace(job, max_rejected=1), fingerprint_of(job))
    for row in rows["val"]:
        Path(job.root, row.path).write_text("none")
    Path(job.store, "val/shard-00000.json").unlink()
    Path(job.store, "val/shard-00001.json").unlink()
    with pytest.raises(UserError, match=r"no tile of split val can be used; repair those in .*rejected\.csv"):
        run_job(replace(job, max_rejected=10))
    assert not check_store(job, fingerprint_of(job))
