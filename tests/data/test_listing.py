"""The list of tiles: every data set and split with its partners, by paths below the root; what is missing is named."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ray_pipeline.config import parse_config
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.listing import Listing, list_tiles, spread
from ray_pipeline.data.manifest import SPLITS, load_manifest, load_pairs, write_manifests
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

TRAIN, VAL = 24, 8  # tiles of tiny_data


def job_for(root: Path, *hints: str) -> EncodeJob:
    config = {
        "data": {"root": str(root), "tile_size": 64},
        "model": {"architecture": "DiT-S/8", "latent_size": 8},
        "phases": [{"name": "one", "epochs": 1, "condition_types": hints or PAIRED_TYPES}],
    }
    return encode_job(parse_config(config))


@pytest.fixture
def root(tiny_data, tmp_path) -> Path:
    """A copy of tiny_data."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def add_data_set(root: Path, name: str, split_of=None) -> None:
    """Another data set with the tiles of the first one and no partners; split_of: old split -> new split."""
    source = root / "foundation" / "simulated"
    rows = load_manifest(source).table.to_dict("records")
    splits = {i: split for split in ("train", "val") for i in load_manifest(source, split).table["id"]}
    folder = Path(shutil.copytree(source, root / "foundation" / name))
    write_manifests(folder, rows, {i: (split_of or {}).get(split, split) for i, split in splits.items()})


def keep_partners(root: Path, task: str, tiles: list[str]) -> None:
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table[(table["task"] != task) | table["pair_id"].isin(tiles)].to_csv(csv, index=False)


def test_rows_are_those_of_the_manifests_with_their_partners(tiny_data):
    listing = list_tiles(job_for(tiny_data))
    pairs = load_pairs(tiny_data, "simulated").set_index(["pair_id", "task"])["image"]
    for split, count in zip(SPLITS, (TRAIN, VAL, 0), strict=True):
        rows = listing.rows[split]
        assert len(rows) == count
        assert listing.datasets[split] == [DataSet("simulated", 0, count, dict.fromkeys(PAIRED_TYPES, count))]
        if not count:
            continue
        table = load_manifest(tiny_data, split).table
        assert [row.id for row in rows] == [f"simulated/{identifier}" for identifier in table["id"]]
        assert [row.path for row in rows] == [f"foundation/simulated/{image}" for image in table["image"]]
        for row, identifier in zip(rows, table["id"], strict=True):
            assert row.partners == {task: f"degraded/simulated/{pairs[identifier, task]}" for task in PAIRED_TYPES}


def test_partners_are_those_of_the_hints_asked_for(tiny_data):
    rows = list_tiles(job_for(tiny_data, "canny", "denoising")).rows["train"]
    assert {tuple(row.partners) for row in rows} == {("denoising",)}
    assert not any(row.partners for row in list_tiles(job_for(tiny_data, "canny", "depth")).rows["train"])


def test_of_several_partners_the_first_one_is_taken(root):
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    before = list_tiles(job_for(root)).rows
    table["id"] += "_again"
    table["image"] = table["image"].iat[0]
    table.to_csv(csv, mode="a", header=False, index=False)
    assert list_tiles(job_for(root)).rows == before


def test_a_root_that_is_moved_or_a_link_gives_the_same_listing(tiny_data, tmp_path):
    expected = list_tiles(job_for(tiny_data))
    moved = shutil.copytree(tiny_data, tmp_path / "elsewhere" / "mit Leerzeichen \u00b5 %20")
    linked, partly = tmp_path / "link", tmp_path / "partly"
    linked.symlink_to(moved, target_is_directory=True)
    for kind in ("foundation", "degraded"):  # of each data set a link
        (partly / kind).mkdir(parents=True)
        (partly / kind / "simulated").symlink_to(tiny_data / kind / "simulated", target_is_directory=True)
    for place in (moved, linked, partly, tmp_path / "elsewhere" / ".." / "link"):
        assert list_tiles(job_for(place)) == expected
        row = list_tiles(job_for(place)).rows["val"][3]
        assert all(Path(place, path).is_file() for path in (row.path, *row.partners.values()))


def test_data_sets_follow_each_other_and_one_may_lack_a_split(root):
    add_data_set(root, "another", {"val": "train"})
    listing = list_tiles(job_for(root))
    none, all_of_them = dict.fromkeys(PAIRED_TYPES, 0), dict.fromkeys(PAIRED_TYPES, TRAIN)
    assert listing.datasets["train"] == [
        DataSet("another", 0, TRAIN + VAL, none),
        DataSet("simulated", TRAIN + VAL, TRAIN, all_of_them),
    ]
    assert [entry.count for entry in listing.datasets["val"]] == [0, VAL]
    # the other data set has no degraded partners: its hints are simulated
    assert not any(row.partners for row in listing.rows["train"][: TRAIN + VAL])
    check_ranges(listing)


def check_ranges(listing: Listing) -> None:
    """Every row lies in the range of its own data set, and the ranges tell how many partners there are."""
    for split, entries in listing.datasets.items():
        named = [entry.name for entry in entries for _ in range(entry.count)]
        assert [row.id.split("/")[0] for row in listing.rows[split]] == named
        for entry in entries:
            rows = listing.rows[split][entry.start : entry.start + entry.count]
            assert entry.partners == {hint: sum(hint in row.partners for row in rows) for hint in PAIRED_TYPES}


def test_partners_are_counted_for_each_data_set_and_split(root):
    tiles = {split: load_manifest(root / "foundation/simulated", split).table["id"].tolist() for split in SPLITS[:2]}
    keep_partners(root, "denoising", [*tiles["train"][:5], *tiles["val"][2:4]])
    add_data_set(root, "another")
    listing = list_tiles(job_for(root))
    assert [entry.partners["denoising"] for entry in listing.datasets["train"]] == [0, 5]
    assert [entry.partners["denoising"] for entry in listing.datasets["val"]] == [0, 2]
    assert [entry.partners["super_resolution"] for entry in listing.datasets["train"]] == [0, TRAIN]
    check_ranges(listing)


@pytest.fixture(scope="module")
def of_three(tiny_data, tmp_path_factory) -> Listing:
    """A listing of three data sets; one has noisy partners of every other tile, another lacks a split."""
    root = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("three") / "data"))
    tiles = load_manifest(root / "foundation/simulated", "train").table["id"].tolist()
    keep_partners(root, "denoising", tiles[::2])
    add_data_set(root, "another", {"val": "train"})
    add_data_set(root, "third")
    return list_tiles(job_for(root))


@pytest.mark.parametrize("limit", [1, 2, 7, TRAIN, 10**6])
def test_a_thinned_listing_is_an_even_sample_of_each_data_set_and_split(of_three, limit):
    listing, thinned = of_three, of_three.thinned(limit)
    assert thinned.fingerprint == listing.fingerprint
    check_ranges(thinned)
    for split, entries in thinned.datasets.items():
        before = {entry.name: entry for entry in listing.datasets[split]}
        assert [entry.name for entry in entries] == list(before)
        assert [entry.count for entry in entries] == [min(limit, entry.count) for entry in before.values()]
        for entry in entries:
            start, count = before[entry.name].start, before[entry.name].count
            # by the definition of evenly spaced; the first and, from two on, the last tile belong to it
            expected = [start + round(k * (count - 1) / max(1, entry.count - 1)) for k in range(entry.count)]
            rows = thinned.rows[split][entry.start : entry.start + entry.count]
            assert rows == [listing.rows[split][row] for row in expected]


@pytest.mark.parametrize(("total", "count"), [(0, 5), (1, 1), (5, 5), (6, 5), (1000, 999), (10**6, 4096), (12345, 2)])
def test_spread_takes_rows_once_in_their_order_and_evenly(total, count):
    rows = 7 + 3 * np.arange(total)
    taken = spread(rows, count)
    assert len(taken) == min(total, count)
    assert np.isin(taken, rows).all()
    steps = np.diff(taken) // 3
    assert (steps > 0).all()
    assert total <= count or steps.max() - steps.min() <= 1
    assert total == 0 or taken[0] == rows[0]
    assert total < 2 or taken[-1] == rows[-1]


@pytest.mark.parametrize("kind", ["foundation", "degraded"])
def test_a_missing_image_is_named_before_work_starts(root, kind):
    tile = load_manifest(root, "train").table["id"].iat[5]
    lost = root / kind / "simulated/images" / (tile + ("_denoising.png" if kind == "degraded" else ".png"))
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost}.*missing|missing.*{lost}"):
        list_tiles(job_for(root))
    if kind == "degraded":  # a partner that no hint asks for is not missed
        list_tiles(job_for(root, "canny", "super_resolution"))


def test_tiles_of_another_size_than_asked_for_are_named_before_work_starts(root):
    csv = root / "foundation/simulated/manifests/train.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table.loc[3, "width"] = "128"
    table.to_csv(csv, index=False)
    with pytest.raises(UserError, match=rf"1 of {TRAIN} tiles have another width than 64 pixels.*{table['id'][3]}"):
        list_tiles(job_for(root))


def test_a_root_without_data_sets_or_without_a_split_is_named(root, tmp_path):
    with pytest.raises(UserError, match=r"data\.root=.*nothing holds no foundation.*ray-pipeline prepare"):
        list_tiles(job_for(tmp_path / "nothing"))
    folder = root / "foundation" / "simulated"
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    with pytest.raises(UserError, match="no tile in split val"):
        list_tiles(job_for(root))


def test_a_degraded_manifest_without_tasks_is_named(root):
    csv = root / "degraded/simulated/manifests/manifest.csv"
    pd.read_csv(csv, dtype=str).drop(columns="task").to_csv(csv, index=False)
    with pytest.raises(UserError, match=rf"{re.escape(str(csv))} has no column task; add it with super_resolution or"):
        list_tiles(job_for(root))


@pytest.mark.parametrize("kind", ["foundation", "degraded"])
@pytest.mark.parametrize("column", ["sha256", "image"])
def test_other_pixels_or_files_give_another_fingerprint(root, kind, column):
    before = list_tiles(job_for(root)).fingerprint
    assert list_tiles(job_for(root)).fingerprint == before
    images = root / kind / "simulated" / "images"
    for csv in (root / kind / "simulated" / "manifests").glob("*.csv"):
        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
        if not table.empty:
            first = Path(table["image"][0]).name
            shutil.copy(images / first, images / f"renamed_{first}")
            table.loc[0, column] = "0" * 64 if column == "sha256" else f"images/renamed_{first}"
        table.to_csv(csv, index=False)
    assert list_tiles(job_for(root)).fingerprint != before


def test_the_order_of_partners_in_their_manifest_does_not_matter(root):
    before = list_tiles(job_for(root))
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table.sample(frac=1, random_state=0).to_csv(csv, index=False)
    assert list_tiles(job_for(root)) == before
