"""A finished store is known from an unfinished, a damaged and another one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ray_pipeline.data.encode import check_shards, check_store, fingerprint
from ray_pipeline.data.hint_registry import resolve_hints
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import list_tiles
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.sections import CONDITION_TYPES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copied(encoded, tmp_path):
    """A copy of the store, as its job."""
    return replace(encoded, store=str(shutil.copytree(encoded.store, tmp_path / "latents")))


def test_a_finished_store_is_recognised_and_whole(encoded, fingerprint_of):
    assert check_store(encoded, fingerprint_of(encoded))
    assert check_shards(encoded.store) == 4 + 2  # of 7 rows: 24 and 8 tiles
    assert len(LatentStore.open(Path(encoded.store, "test"))) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"variants": 1},
        {"hints": ("canny",)},
        {"simulated": ()},
        {"sample_rows": 5},
        {"shard_rows": 8},
        {"hint_settings": resolve_hints({"canny": {"sigma": 1.5}}, CONDITION_TYPES)},
        {"precision": "bf16"},
        {"posterior": "other"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_store_of_other_settings_is_refused(encoded, change):
    job = replace(encoded, **change)
    found = fingerprint(job, list_tiles(job), load_autoencoder(job.autoencoder))
    with pytest.raises(UserError, match=r"encoded from other tiles, .*encode --overwrite"):
        check_store(job, found)


def test_where_things_lie_and_what_may_be_left_out_does_not_make_another_store(
    encoded, copy_of_data, tmp_path, fingerprint_of
):
    autoencoder = shutil.copytree(encoded.autoencoder, tmp_path / "autoencoder")
    moved = replace(encoded, root=str(copy_of_data), autoencoder=str(autoencoder), batch_size=1, max_rejected=3)
    assert check_store(moved, fingerprint_of(moved))


def test_settings_of_hints_that_no_phase_uses_do_not_make_another_store(job_for, tiny_data, fingerprint_of):
    one, other = (job_for(tiny_data, "canny") for _ in range(2))
    other = replace(other, hint_settings=resolve_hints({"denoising": {"bits": [8]}}, ["canny"]))
    assert fingerprint_of(one) == fingerprint_of(other)


def test_other_pixels_of_a_tile_or_of_a_partner_make_another_store(encoded, copy_of_data, fingerprint_of):
    job = replace(encoded, root=str(copy_of_data))
    for kind in ("foundation", "degraded"):
        before = fingerprint_of(job)
        for csv in (copy_of_data / kind / "simulated" / "manifests").glob("*.csv"):
            table = pd.read_csv(csv, dtype=str, keep_default_na=False)
            table["sha256"] = ["0" * 64, *table["sha256"][1:]][: len(table)]
            table.to_csv(csv, index=False)
        assert fingerprint_of(job) != before


def test_other_weights_make_another_store(encoded):
    autoencoder = load_autoencoder(encoded.autoencoder)
    next(iter(autoencoder.network.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match="other tiles, autoencoder"):
        check_store(encoded, fingerprint(encoded, list_tiles(encoded), autoencoder))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda path: path.write_bytes(path.read_bytes()[:-100])])
def test_a_damaged_shard_is_named(copied, damage):
    damage(Path(copied.store, "val", "shard-00001.npy"))
    with pytest.raises(UserError, match=rf"1 latent shards.*first {copied.store}/val/shard-00001\.npy.*--overwrite"):
        check_shards(copied.store)


@pytest.mark.parametrize("name", ["train/shard-00001.npy", "val/index.json", "train/tiles.arrow"])
def test_a_store_that_lost_a_file_is_not_taken_for_a_finished_one(copied, fingerprint_of, name):
    assert check_store(copied, fingerprint_of(copied))
    Path(copied.store, name).unlink()
    assert not check_store(copied, fingerprint_of(copied))


def test_damaged_statistics_are_named(copied, fingerprint_of):
    Path(copied.store, "stats.json").write_text('{"mean": [0.1')
    with pytest.raises(UserError, match=r"stats\.json is not valid JSON.*--overwrite"):
        check_store(copied, fingerprint_of(copied))
