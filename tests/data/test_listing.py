"""The list of tiles: every data set and split with its partners, by paths below the root; what is missing is named."""

import itertools
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from ray_pipeline.data.latents import DataSet
from ray_pipeline.data.listing import Listing, list_tiles, spread
from ray_pipeline.data.manifest import SPLITS, load_manifest, load_pairs, write_manifests
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.errors import UserError
from ray_pipeline.models.weights import IntensityRange
from ray_pipeline.sections import PAIRED_TYPES, PARTNER_TYPES

TRAIN, VAL = 24, 8  # tiles of tiny_data


@pytest.fixture
def root(copy_of_data) -> Path:
    return copy_of_data


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


def test_rows_are_those_of_the_manifests_with_their_partners(tiny_data, job_for):
    listing = list_tiles(job_for(tiny_data, *PAIRED_TYPES))
    pairs = load_pairs(tiny_data, "simulated").set_index(["pair_id", "task"])["image"]
    for split, count in zip(SPLITS, (TRAIN, VAL, 0), strict=True):
        rows = listing.rows[split]
        assert len(rows) == count
        assert listing.datasets[split] == [
            DataSet("simulated", 0, count, dict.fromkeys(PARTNER_TYPES, 0) | dict.fromkeys(PAIRED_TYPES, count))
        ]
        if not count:
            continue
        table = load_manifest(tiny_data, split).table
        assert [row.id for row in rows] == [f"simulated/{identifier}" for identifier in table["id"]]
        assert [row.path for row in rows] == [f"foundation/simulated/{image}" for image in table["image"]]
        for row, identifier in zip(rows, table["id"], strict=True):
            assert row.partners == {task: (f"degraded/simulated/{pairs[identifier, task]}",) for task in PAIRED_TYPES}


def test_partners_are_those_of_the_hints_asked_for(tiny_data, job_for):
    rows = list_tiles(job_for(tiny_data, "canny", "denoising")).rows["train"]
    assert {tuple(row.partners) for row in rows} == {("denoising",)}
    assert not any(row.partners for row in list_tiles(job_for(tiny_data, "canny", "depth")).rows["train"])


def test_several_partners_of_a_tile_are_all_listed_in_the_order_of_their_names(root, job_for):
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    before = list_tiles(job_for(root, *PAIRED_TYPES))
    again = table[table["task"] == "denoising"].copy()
    again["id"] += "_again"
    for image in again["image"]:
        shutil.copy(csv.parents[1] / image, csv.parents[1] / image.replace("_denoising", "_a_denoising"))
    again["image"] = again["image"].str.replace("_denoising", "_a_denoising")
    pd.concat([table, again]).to_csv(csv, index=False)
    found = list_tiles(job_for(root, *PAIRED_TYPES))
    assert found.fingerprint != before.fingerprint
    assert found.datasets == before.datasets  # so many tiles have one, however many it has
    for row, old in zip(found.rows["train"], before.rows["train"], strict=True):
        (image,) = old.partners["denoising"]
        assert row.partners["denoising"] == (image.replace("_denoising", "_a_denoising"), image)
        assert row.partners["super_resolution"] == old.partners["super_resolution"]


def test_a_root_that_is_moved_or_a_link_gives_the_same_listing(tiny_data, tmp_path, job_for):
    expected = list_tiles(job_for(tiny_data, *PAIRED_TYPES))
    moved = shutil.copytree(tiny_data, tmp_path / "elsewhere" / "mit Leerzeichen \u00b5 %20")
    linked, partly = tmp_path / "link", tmp_path / "partly"
    linked.symlink_to(moved, target_is_directory=True)
    for kind in ("foundation", "degraded"):  # of each data set a link
        (partly / kind).mkdir(parents=True)
        (partly / kind / "simulated").symlink_to(tiny_data / kind / "simulated", target_is_directory=True)
    for place in (moved, linked, partly, tmp_path / "elsewhere" / ".." / "link"):
        assert list_tiles(job_for(place, *PAIRED_TYPES)) == expected
        row = list_tiles(job_for(place, *PAIRED_TYPES)).rows["val"][3]
        assert all(Path(place, path).is_file() for path in (row.path, *itertools.chain(*row.partners.values())))


def test_data_sets_follow_each_other_and_one_may_lack_a_split(root, job_for):
    add_data_set(root, "another", {"val": "train"})
    listing = list_tiles(job_for(root, *PAIRED_TYPES))
    none = dict.fromkeys(PARTNER_TYPES, 0)
    all_of_them = none | dict.fromkeys(PAIRED_TYPES, TRAIN)
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
            assert entry.partners == {hint: sum(hint in row.partners for row in rows) for hint in PARTNER_TYPES}


def test_partners_are_counted_for_each_data_set_and_split(root, job_for):
    tiles = {split: load_manifest(root / "foundation/simulated", split).table["id"].tolist() for split in SPLITS[:2]}
    keep_partners(root, "denoising", [*tiles["train"][:5], *tiles["val"][2:4]])
    add_data_set(root, "another")
    listing = list_tiles(job_for(root, *PAIRED_TYPES))
    assert [entry.partners["denoising"] for entry in listing.datasets["train"]] == [0, 5]
    assert [entry.partners["denoising"] for entry in listing.datasets["val"]] == [0, 2]
    assert [entry.partners["super_resolution"] for entry in listing.datasets["train"]] == [0, TRAIN]
    check_ranges(listing)


@pytest.fixture(scope="module")
def of_three(tiny_data, tmp_path_factory, job_for) -> Listing:
    """A listing of three data sets; one has noisy partners of every other tile, another lacks a split."""
    root = Path(shutil.copytree(tiny_data, tmp_path_factory.mktemp("three") / "data"))
    tiles = load_manifest(root / "foundation/simulated", "train").table["id"].tolist()
    keep_partners(root, "denoising", tiles[::2])
    add_data_set(root, "another", {"val": "train"})
    add_data_set(root, "third")
    return list_tiles(job_for(root, *PAIRED_TYPES))


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
    taken = spread(total, count)
    assert len(taken) == min(total, count)
    assert ((taken >= 0) & (taken < total)).all()
    steps = np.diff(taken)
    assert (steps > 0).all()
    assert total <= count or steps.max() - steps.min() <= 1
    assert total == 0 or taken[0] == 0
    assert total < 2 or taken[-1] == total - 1


def test_a_root_without_data_sets_or_without_a_split_is_named(root, tmp_path, job_for):
    with pytest.raises(UserError, match=r"data\.root=.*nothing holds no foundation.*ray-pipeline prepare"):
        list_tiles(job_for(tmp_path / "nothing"))
    folder = root / "foundation" / "simulated"
    rows = load_manifest(folder).table.to_dict("records")
    write_manifests(folder, rows, {row["id"]: "train" for row in rows})
    with pytest.raises(UserError, match="no tile in split val"):
        list_tiles(job_for(root, *PAIRED_TYPES))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("pair_id", "nowhere", r"partners of 1 tiles belong to none that is there, first 'nowhere'; correct pair_id"),
        (
            "task",
            "Denoise",
            r"1 rows of task 'Denoise' are no partners, expected .*denoising.*; correct",
        ),
    ],
)
def test_partners_of_nothing_are_not_passed_over_in_silence(root, job_for, column, value, said):
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str)
    table.loc[0, column] = value
    table.to_csv(csv, index=False)
    with pytest.warns(UserWarning, match=said):
        list_tiles(job_for(root, *PAIRED_TYPES))


def test_a_degraded_manifest_without_tasks_is_named(root, job_for):
    csv = root / "degraded/simulated/manifests/manifest.csv"
    pd.read_csv(csv, dtype=str).drop(columns="task").to_csv(csv, index=False)
    with pytest.raises(UserError, match=rf"{re.escape(str(csv))} has no column task; add it with super_resolution or"):
        list_tiles(job_for(root, *PAIRED_TYPES))


@pytest.mark.parametrize("kind", ["foundation", "degraded"])
@pytest.mark.parametrize("column", ["sha256", "image"])
def test_other_pixels_or_files_give_another_fingerprint(root, kind, column, job_for):
    before = list_tiles(job_for(root, *PAIRED_TYPES)).fingerprint
    assert list_tiles(job_for(root, *PAIRED_TYPES)).fingerprint == before
    images = root / kind / "simulated" / "images"
    for csv in (root / kind / "simulated" / "manifests").glob("*.csv"):
        table = pd.read_csv(csv, dtype=str, keep_default_na=False)
        if not table.empty:
            first = Path(table["image"][0]).name
            shutil.copy(images / first, images / f"renamed_{first}")
            table.loc[0, column] = "0" * 64 if column == "sha256" else f"images/renamed_{first}"
        table.to_csv(csv, index=False)
    assert list_tiles(job_for(root, *PAIRED_TYPES)).fingerprint != before


def test_the_order_of_partners_in_their_manifest_does_not_matter(root, job_for):
    before = list_tiles(job_for(root, *PAIRED_TYPES))
    csv = root / "degraded/simulated/manifests/manifest.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table.sample(frac=1, random_state=0).to_csv(csv, index=False)
    assert list_tiles(job_for(root, *PAIRED_TYPES)) == before


def test_a_tile_without_the_ids_given_is_left_out_of_rows_and_ranges(of_three):
    gone = {"train": {of_three.rows["train"][k].id for k in (0, 30, 31)}, "val": set()}
    left = of_three.without(gone)
    check_ranges(left)
    assert [row.id for row in left.rows["train"]] == [r.id for r in of_three.rows["train"] if r.id not in gone["train"]]
    assert left.rows["val"] == of_three.rows["val"]
    assert sum(entry.count for entry in left.datasets["train"]) == len(of_three.rows["train"]) - 3


@pytest.mark.parametrize(
    ("modality", "NA", "wavelength", "um_pixel", "width"),
    [
        ("confocal", 1.4, 600, 0.05, 0.37 * 0.600 / 1.4 / 0.05),
        ("Wide Field", 0.8, 520, 0.2, 0.51 * 0.520 / 0.8 / 0.2),
        ("TwoPhoton", 1.0, 700, 0.1, 0.37 * 0.700 / 1.0 / 0.1),
        ("electron", 1.4, 600, 0.05, 0),
        ("", 1.4, 600, 0.05, 0),
        ("confocal", "", 600, 0.05, 0),
        ("confocal", 1.4, 0, 0.05, 0),
        ("confocal", 1.4, 600, -1, 0),
    ],
)
def test_the_psf_of_a_tile_comes_from_its_metadata_where_they_say_enough(
    root, job_for, modality, NA, wavelength, um_pixel, width
):
    csv = root / "foundation/simulated/manifests/train.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    table.loc[2, ["modality", "NA", "lambda", "um_pixel"]] = [modality, str(NA), str(wavelength), str(um_pixel)]
    table.to_csv(csv, index=False)
    rows = list_tiles(job_for(root)).rows["train"]
    assert rows[2].psf_fwhm_px == pytest.approx(width, rel=1e-6)
    table.drop(columns="um_pixel").to_csv(csv, index=False)
    assert {row.psf_fwhm_px for row in list_tiles(job_for(root)).rows["train"]} == {0}


OLD_COLUMNS = (
    "id", "image", "dataset", "task", "channel_idx", "norm_lo", "norm_hi", "x0", "y0", "modality", "specimen", "NA",
    "lambda", "um_pixel", "marker",
)  # fmt: skip


def old_rows(task: str, suffix: str, count: int) -> list[list]:
    names = [f"tile{k}{'.npz' if k % 2 else '.png'}" for k in range(count)]
    common = [0, 100.0, 4000.0, 0, 0, "Confocal", "HeLa", 1.4, 600, 0.05, "actin"]
    return [[f"{k:03d}", f"{suffix}/{name}", "old", task, *common] for k, name in enumerate(names)]


def test_manifests_of_the_earlier_preprocessing_load_and_pair_by_equal_ids(tmp_path, job_for):
    """npz in [-1, 1] and 16-bit PNG, columns as they were then; ids are text, such as 007."""
    rng = np.random.default_rng(0)
    for kind, task, count in (("foundation", "foundation", 6), ("degraded", "denoising", 4)):
        folder = tmp_path / kind / "old"
        (folder / "manifests").mkdir(parents=True)
        (folder / "tiles").mkdir()
        rows = old_rows(task, "tiles", count)
        for row in rows:
            pixels = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
            if row[1].endswith(".npz"):
                np.savez_compressed(folder / row[1], pixels)
            else:
                cv2.imwrite(str(folder / row[1]), np.rint((pixels + 1) / 2 * 65535).astype(np.uint16))
        table = pd.DataFrame(rows, columns=OLD_COLUMNS)
        for name, part in (("manifest", table), ("train", table[:4]), ("val", table[4:])):
            part.to_csv(folder / "manifests" / f"{name}.csv", index=False)
    listing = list_tiles(job_for(tmp_path, "denoising", "canny"))
    assert [row.id for row in listing.rows["train"]] == [f"old/00{k}" for k in range(4)]
    assert [row.partners for row in listing.rows["train"]] == [
        {"denoising": (f"degraded/old/tiles/tile{k}{'.npz' if k % 2 else '.png'}",)} for k in range(4)
    ]
    assert not any(row.partners for row in listing.rows["val"])
    assert listing.rows["val"][0].psf_fwhm_px == pytest.approx(0.37 * 0.6 / 1.4 / 0.05)
    reader = TileReader(job_for(tmp_path, "denoising", "canny"))
    for row in listing.rows["train"]:
        images = reader.images(Request(row, (0,), ("latent", "hint.denoising", "hint.canny")))
        assert [image.shape for _, image in images] == [(64, 64)] * 3


def edit(csv: Path, **columns) -> None:
    """Write columns of a manifest; a function gets the table."""
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    for name, values in columns.items():
        table[name] = values(table) if callable(values) else values
    table.to_csv(csv, index=False)


def test_the_ranges_of_a_group_are_those_that_all_its_training_tiles_agree_on(root, job_for):
    """Recomputed with pandas: groups by data set, role, channel and dtype, of the training tiles and their partners."""
    add_data_set(root, "another")
    for csv in (root / "foundation/another/manifests").glob("*.csv"):
        edit(csv, dtype="float32", channel_idx="0", norm_lo="-0.5", norm_hi="2.25")
    partners = root / "degraded/simulated/manifests/manifest.csv"
    edit(partners, norm_lo=lambda table: [str(i) for i in range(len(table))], norm_hi="70000")
    denoising = pd.read_csv(partners)["task"] == "denoising"
    edit(partners, norm_lo=lambda table: table["norm_lo"].where(~denoising, "7"))
    found = list_tiles(job_for(root, *PAIRED_TYPES)).intensity
    expected = {("another", "tile", 0, "float32", -0.5, 2.25): TRAIN}
    train = load_manifest(root / "foundation/simulated", "train").table
    for (channel, dtype), rows in train.groupby(["channel_idx", "dtype"]):
        assert rows["norm_lo"].nunique() == rows["norm_hi"].nunique() == 1
        first = rows.iloc[0]
        expected["simulated", "tile", channel, dtype, first["norm_lo"], first["norm_hi"]] = len(rows)
        pairs = load_pairs(root, "simulated")
        mine = pairs[pairs["pair_id"].isin(rows["id"]) & (pairs["task"] == "denoising")]
        for partner_channel, some in mine.groupby("channel_idx"):
            key = ("simulated", "denoising", partner_channel, dtype, 7.0, 70000.0)
            expected[key] = expected.get(key, 0) + len(some)
    assert {(e.dataset, e.role, e.channel, e.dtype, e.low, e.high): e.tiles for e in found} == expected
    assert not any(entry.role == "super_resolution" for entry in found)  # fitted pair by pair
    assert list(found) == sorted(found, key=lambda e: (e.dataset, e.role, e.channel, e.dtype))


@pytest.mark.parametrize("value", ["", "inf", "1e9"])
def test_one_tile_of_another_or_no_range_leaves_its_group_out_and_bad_tiles_do_not_count(root, job_for, value):
    csv = root / "foundation/simulated/manifests/train.csv"
    edit(csv, channel_idx="2", norm_lo="100", norm_hi="4000")
    assert list_tiles(job_for(root, "canny")).intensity == (
        IntensityRange(dataset="simulated", role="tile", channel=2, dtype="uint16", low=100, high=4000, tiles=TRAIN),
    )
    edit(csv, norm_hi="inf")
    assert list_tiles(job_for(root, "canny")).intensity == ()
    edit(csv, norm_hi="4000", norm_lo=lambda table: [value, *table["norm_lo"][1:]])
    assert list_tiles(job_for(root, "canny")).intensity == ()
    (root / "foundation/simulated" / load_manifest(csv).table["image"][0]).unlink()
    (only,) = list_tiles(job_for(root, "canny", max_rejected=1)).intensity
    assert (only.low, only.tiles) == (100, TRAIN - 1)


@pytest.mark.parametrize("column", ["channel_idx", "norm_lo", "norm_hi", "dtype"])
def test_manifests_that_do_not_tell_intensities_give_no_range(root, job_for, column):
    for csv in root.glob("*/simulated/manifests/*.csv"):
        pd.read_csv(csv, dtype=str, keep_default_na=False).drop(columns=column).to_csv(csv, index=False)
    assert list_tiles(job_for(root, *PAIRED_TYPES)).intensity == ()
