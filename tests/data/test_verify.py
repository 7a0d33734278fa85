"""Encoding a sample again finds a store whose bytes are whole and wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_pipeline.data.encode import check_shards
from ray_pipeline.data.shards import write_shard
from ray_pipeline.data.tiles import read_tile, write_tile
from ray_pipeline.data.verify import TOLERANCE, compare_sample
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copied(encoded, tmp_path):
    return replace(encoded, store=str(shutil.copytree(encoded.store, tmp_path / "latents")))


def rewrite(store: str, split: str, number: int, change) -> None:
    """Changes the values of a shard and puts the new hash into the index, as a faulty encoder would have."""
    folder, name = Folder(store).child(split), f"shard-{number:05d}.npy"
    values = np.load(Path(store, split, name))
    change(values)
    index = json.loads(folder.read("index.json"))
    index["shards"][number] = write_shard(folder, name, values)
    folder.write("index.json", json.dumps(index).encode())


def test_an_intact_store_differs_in_no_bit(encoded):
    found = compare_sample(encoded)
    assert found.tiles == 4 * 2 + 2 + 1  # two of each shard, of the last validation shard its only one
    assert found.difference == 0


@pytest.mark.parametrize(
    ("split", "number", "place", "column"),
    [
        ("train", 0, (0, 0, 0), "latent"),
        ("train", 2, (1, 1, 2), "hint.denoising"),
        ("val", 1, (0, 1, 5), "simulated.denoising"),
    ],
)
def test_one_altered_latent_of_a_whole_shard_is_found(copied, split, number, place, column):
    assert copied.columns[place[2]] == column

    def change(values: np.ndarray) -> None:
        values[place][1, 3, 4] += 0.5

    rewrite(copied.store, split, number, change)
    assert check_shards(copied.store) == 6  # by their hashes all is well
    with pytest.raises(UserError, match=rf"{split}: {column} of simulated/.* differs .*expected at most {TOLERANCE}"):
        compare_sample(copied)


def test_what_another_processor_rounds_otherwise_is_told_and_no_error(copied):
    def change(values: np.ndarray) -> None:
        values[:] = np.nextafter(values, np.float16(1))

    rewrite(copied.store, "train", 0, change)
    assert 0 < compare_sample(copied).difference < TOLERANCE


def test_a_latent_that_is_not_finite_is_found(copied):
    def change(values: np.ndarray) -> None:
        values[0, 0, 0, 0, 0, 0] = np.nan

    rewrite(copied.store, "train", 1, change)
    with pytest.raises(UserError, match="differs from what is stored by nan"):
        compare_sample(copied)


def test_pixels_that_changed_since_are_found(copied, copy_of_data):
    job = replace(copied, root=str(copy_of_data))
    assert compare_sample(job).difference == 0
    path = sorted((copy_of_data / "foundation/simulated/images").glob("*.png"))
    for image in path:
        write_tile(image, 1 - (read_tile(image) + 1) / 2)
    with pytest.raises(UserError, match=r"of simulated/.* differs from what is stored .*; remove .*"):
        compare_sample(job)
    for image in path:
        image.write_bytes(b"")
    with pytest.raises(UserError, match=r"tiles have become bad since they were encoded .*empty file.*; restore"):
        compare_sample(job)
