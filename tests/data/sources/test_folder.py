"""A folder of images becomes tiles that are crops of it, in one scale, with nothing lost in silence."""

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from ray_pipeline.data.images import from_unit
from ray_pipeline.data.manifest import check_tiles, load_manifest
from ray_pipeline.data.sources.folder import prepare_folder, split_images, tile_stems
from ray_pipeline.data.sources.folder_survey import read_channels
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.errors import UserError

REAL_IMAGES = Path(__file__).resolve().parents[3].parent / "shared" / "data"


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def pixels_of(rng, shape, dtype="uint16", scale=400.0):
    return np.clip(rng.gamma(2.0, scale / 4, shape), 0, 255 if dtype == "uint8" else 65535).astype(dtype)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Nine images of three dtypes, with one and several channels, in sub-folders, beside other files."""
    rng = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("source") / "my plate (1)"
    (folder / "well A").mkdir(parents=True)
    for i in range(4):
        tifffile.imwrite(folder / "well A" / f"f{i}.tif", pixels_of(rng, (80, 64 + 9 * i)))
    for i in range(2):
        stack = pixels_of(rng, (2, 64, 70), "float32", 9000.0)
        tifffile.imwrite(folder / f"stack{i}.tif", stack, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(folder / "last.tiff", pixels_of(rng, (64, 70, 2)), metadata={"axes": "YXC"})
    cv2.imwrite(str(folder / "rgb.png"), pixels_of(rng, (66, 64, 3), "uint8", 100.0))
    cv2.imwrite(str(folder / "grey.PNG"), pixels_of(rng, (64, 64), "uint8", 100.0))
    (folder / "README.md").write_text("notes")
    (folder / ".hidden.tif").write_text("not listed")
    return folder


@pytest.fixture
def own_source(source, tmp_path):
    """A copy of `source` that a test may spoil."""
    return shutil.copytree(source, tmp_path / source.name)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def images_of_rows(source, table):
    """Each row's source image, found through the id's stem alone (`stems` is tested on its own)."""
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix.lower()[1:3] in ("ti", "pn")]
    stems = {stem: name for name, stem in tile_stems(sorted(names)).items()}
    return [stems[identifier.rsplit("_c", 1)[0]] for identifier in table["id"]]


def test_every_tile_is_a_crop_of_its_image_and_every_pixel_is_in_a_tile(source, tmp_path):
    done = prepare_folder(source, tmp_path / "out", tile_size=32, percentiles=(0, 100))
    manifest = load_manifest(tmp_path / "out")
    check_tiles(manifest, 32)
    assert manifest.dataset == "my-plate-1" == done.dataset
    names = images_of_rows(source, manifest.table)
    images = {name: read_channels(source / name)[0] for name in set(names)}
    covered = {}
    for i, (name, row) in enumerate(zip(names, manifest.table.itertuples(), strict=True)):
        image = images[name][row.channel_idx]
        mask = covered.setdefault((name, row.channel_idx), np.zeros(image.shape, bool))
        place = np.s_[row.y0 : row.y0 + 32, row.x0 : row.x0 + 32]
        mask[place] = True
        assert row.dtype == image.dtype.name
        back = from_unit((read_tile(manifest.path(i)) + 1) / 2, row.norm_lo, row.norm_hi, row.dtype)
        step = (row.norm_hi - row.norm_lo) / 65535 if row.dtype == "float32" else 0
        assert np.abs(back.astype(float) - image[place]).max() <= step, row.id
    assert all(mask.all() for mask in covered.values())
    assert len(covered) == 4 + 2 * 2 + 2 + 3 + 1
    assert (done.listed, done.ignored, done.rejected) == (9, 2, [])
    assert sum(done.images.values()) == 9
    assert sum(done.tiles.values()) == len(manifest)


def test_intensities_are_percentiles_of_all_pixels_of_a_channel_and_dtype(source, tmp_path):
    done = prepare_folder(source, tmp_path / "out", tile_size=64, percentiles=(0.5, 99.5))
    pixels = {}
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in (".tif", ".tiff", ".png") and not path.name.startswith("."):
            for c, plane in enumerate(read_channels(path)[0]):
                pixels.setdefault((c, plane.dtype.name), []).append(plane.ravel())
    assert done.ranges.keys() == pixels.keys()
    for group, planes in pixels.items():
        values = np.concatenate(planes).astype(np.float64)
        bin_width = np.ptp(values) / 2**20 if group[1] == "float32" else 1e-6
        np.testing.assert_allclose(done.ranges[group], np.percentile(values, (0.5, 99.5)), atol=bin_width)
    table = load_manifest(tmp_path / "out").table
    found = {(c, d): (lo, hi) for c, d, lo, hi in table[["channel_idx", "dtype", "norm_lo", "norm_hi"]].values}
    assert found == done.ranges


def test_an_8_bit_image_beside_16_bit_ones_is_not_crushed(tmp_path, rng):
    folder = tmp_path / "mixed"
    folder.mkdir()
    tifffile.imwrite(folder / "deep.tif", pixels_of(rng, (64, 64), "uint16", 30000.0))
    tifffile.imwrite(folder / "flat.tif", pixels_of(rng, (64, 64), "uint8", 200.0))
    prepare_folder(folder, tmp_path / "out", tile_size=64)
    manifest = load_manifest(tmp_path / "out")
    assert [read_tile(manifest.path(i)).max() for i in range(2)] == [1.0, 1.0]


def test_a_dim_image_is_reported_and_keeps_its_scale(tmp_path, rng):
    folder = tmp_path / "dim"
    folder.mkdir()
    tifffile.imwrite(folder / "bright.tif", pixels_of(rng, (64, 64), "uint16", 30000.0))
    tifffile.imwrite(folder / "dim.tif", pixels_of(rng, (64, 64), "uint16", 300.0))
    assert prepare_folder(folder, tmp_path / "out", tile_size=64).dim == ["dim.tif"]
    assert load_manifest(tmp_path / "out").table["norm_hi"].nunique() == 1


def test_sparse_images_use_minimum_and_maximum(tmp_path):
    folder = tmp_path / "sparse"
    folder.mkdir()
    dots = np.zeros((64, 64), np.uint16)
    dots[5, 5] = 900
    tifffile.imwrite(folder / "dots.tif", dots)
    assert prepare_folder(folder, tmp_path / "out", tile_size=64).ranges == {(0, "uint16"): (0.0, 900.0)}


def test_all_tiles_and_channels_of_an_image_are_in_one_split(source, tmp_path):
    prepare_folder(source, tmp_path / "out", tile_size=60, val_fraction=0.3, test_fraction=0.2)
    splits = {}
    for split in ("train", "val", "test"):
        table = load_manifest(tmp_path / "out", split).table
        for name in images_of_rows(source, table):
            splits.setdefault(name, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert [sum(found == {s} for found in splits.values()) for s in ("train", "val", "test")] == [4, 3, 2]


def test_the_split_depends_on_seed_and_path_alone():
    names = [f"a/{i}.tif" for i in range(100)]
    split = split_images(names, 0.1, 0.05, seed=0)
    assert split == split_images(names[::-1], 0.1, 0.05, seed=0)
    assert split != split_images(names, 0.1, 0.05, seed=1)
    assert [list(split.values()).count(s) for s in ("train", "val", "test")] == [85, 10, 5]
    assert set(split_images(names[:1], 0.1, 0.1, seed=0).values()) == {"train"}
    assert sorted(split_images(names[:2], 0.1, 0.0, seed=0).values()) == ["train", "val"]
    assert set(split_images(names, 0.0, 0.0, seed=0).values()) == {"train"}
    with pytest.raises(UserError, match="--val-fraction"):
        split_images(names[:3], 0.6, 0.3, seed=0)


def test_tile_names_are_unique_and_safe():
    names = [
        "a b.tif",
        "a-b.tif",
        "A-b.tif",
        "x/y.tif",
        "x__y.tif",
        "a.png",
        "\u00e9.tif",
        "n" * 300 + ".tif",
        "c.d.tif",
    ]
    stems = tile_stems(names)
    assert len({stem.lower() for stem in stems.values()}) == len(names)
    assert all(stem.isascii() and len(stem) < 200 and not set(stem) & set("/ ") for stem in stems.values())
    assert (stems["a.png"], stems["c.d.tif"]) == ("a", "c.d")


def test_a_second_run_writes_the_same_bytes_and_leaves_no_old_tile(source, tmp_path):
    first = prepare_folder(source, tmp_path / "out", tile_size=64)
    before = tree(first.folder)
    assert before == tree(prepare_folder(source, tmp_path / "other", tile_size=64).folder)
    prepare_folder(source, tmp_path / "out", tile_size=32, overwrite=True)
    assert len(list((first.folder / "images").iterdir())) == len(load_manifest(tmp_path / "out")) > first.tiles["train"]
    prepare_folder(source, tmp_path / "out", tile_size=64, overwrite=True)
    assert tree(first.folder) == before
    assert [p.name for p in (tmp_path / "out" / "foundation").iterdir()] == ["my-plate-1"]


def test_tiles_of_a_killed_run_do_not_come_back(source, tmp_path):
    left = tmp_path / "out" / "foundation" / ".my-plate-1.partial" / "images" / "old.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a tile")
    done = prepare_folder(source, tmp_path / "out", tile_size=64)
    assert len(list((done.folder / "images").iterdir())) == len(load_manifest(tmp_path / "out"))
    assert not left.exists()


def test_only_the_channels_asked_for_are_cut(source, tmp_path):
    done = prepare_folder(source, tmp_path / "out", tile_size=32, channels=(1,), max_rejected=5)
    assert set(load_manifest(tmp_path / "out").table["channel_idx"]) == {1}
    assert len(done.rejected) == 5
    assert all("none of those asked for" in reason for _, reason in done.rejected)


def spoil(folder):
    good = (folder / "grey.PNG").read_bytes()
    whole = (folder / "last.tiff").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.tif").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    tifffile.imwrite(folder / "nan.tif", np.full((64, 64), np.nan, np.float32))
    tifffile.imwrite(folder / "small.tif", np.arange(31 * 64, dtype=np.uint16).reshape(31, 64))
    tifffile.imwrite(folder / "flat.tif", np.full((64, 64), 7, np.uint16))
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "far.tif").write_bytes(whole)
    (folder / "link.tif").symlink_to(outside / "far.tif")
    (folder / "linked").symlink_to(outside)


SPOILT = {
    "cut.png": "truncated",
    "cut.tif": "truncated",
    "empty.tif": "empty file",
    "flat.tif": "every pixel is 7",
    "link.tif": "a link to",
    "linked": "a link to",
    "nan.tif": "NaN",
    "photo.jpg": "convert it",
    "small.tif": "31 x 64 pixels, smaller than a tile of 32",
    "text.png": "other content",
}


def test_unusable_images_stop_the_job_and_every_one_is_listed(own_source, tmp_path):
    spoil(own_source)
    target = tmp_path / "out" / "foundation" / "my-plate-1"
    with pytest.raises(UserError, match=r"10 of 19 images cannot be used.*link\.tif.*--max-rejected 10"):
        prepare_folder(own_source, tmp_path / "out", tile_size=32, max_rejected=9)
    assert [p.name for p in target.iterdir()] == ["rejected.csv"]
    done = prepare_folder(own_source, tmp_path / "out", tile_size=32, max_rejected=10)
    listed = dict(list(csv.reader((target / "rejected.csv").open(newline="")))[1:])
    assert listed == dict(done.rejected)
    assert listed.keys() == SPOILT.keys()
    assert all(SPOILT[name] in reason for name, reason in listed.items())
    assert sum(done.images.values()) + len(done.rejected) == done.listed == 19


def test_a_refused_overwrite_leaves_the_prepared_data_as_they_are(own_source, tmp_path):
    done = prepare_folder(own_source, tmp_path / "out", tile_size=32)
    before = tree(done.folder)
    spoil(own_source)
    with pytest.raises(UserError, match="10 of 19"):
        prepare_folder(own_source, tmp_path / "out", tile_size=32, overwrite=True)
    assert tree(done.folder) == before
    assert load_manifest(tmp_path / "out").folder == done.folder


def test_a_constant_channel_is_left_out_and_named(tmp_path, rng):
    folder = tmp_path / "green"
    folder.mkdir()
    green = np.zeros((64, 64, 3), np.uint8)
    green[..., 1] = pixels_of(rng, (64, 64), "uint8", 100.0)
    cv2.imwrite(str(folder / "green.png"), green)
    done = prepare_folder(folder, tmp_path / "out", tile_size=64)
    assert load_manifest(tmp_path / "out").table["channel_idx"].tolist() == [1]
    assert [reason[:9] for _, reason in done.empty_channels] == ["channel 0", "channel 2"]
    assert (done.folder / "rejected.csv").read_text().count("green.png") == 2


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"source": "nowhere"}, "nowhere: no such folder"),
        ({"source": "void"}, "void: found no image"),
        ({"out": "my plate (1)/out"}, "lie in each other"),
        ({"dataset": "../up"}, "--dataset '../up'"),
        ({"dataset": ""}, "--dataset ''"),
        ({"dataset": "mine"}, "mine: found a folder that is no prepared data set.*notes.txt"),
        ({"dataset": "done"}, "done: found a prepared data set.*--overwrite"),
        ({"tile_size": 0}, "--tile-size 0"),
        ({"percentiles": (99.0, 1.0)}, "--percentiles 99.0 1.0"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"channels": (-1,)}, "--channels"),
        ({"tile_size": 65, "max_rejected": 99}, "smaller than a tile of 65"),
    ],
)
def test_wrong_settings_are_refused_before_any_tile_is_written(tmp_path, rng, change, found):
    (tmp_path / "my plate (1)").mkdir()
    (tmp_path / "void").mkdir()
    tifffile.imwrite(tmp_path / "my plate (1)" / "a.tif", pixels_of(rng, (64, 64)))
    mine = tmp_path / "out" / "foundation" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep")
    prepare_folder(tmp_path / "my plate (1)", tmp_path / "out", dataset="done", tile_size=32)
    settings = {"source": "my plate (1)", "out": "out", "dataset": "new", "tile_size": 32} | change
    source, out = tmp_path / settings.pop("source"), tmp_path / settings.pop("out")
    with pytest.raises(UserError, match=found):
        prepare_folder(source, out, **settings)
    assert (mine / "notes.txt").read_text() == "keep"
    assert not list(tmp_path.rglob("*.partial"))


def test_progress_counts_every_image_in_both_readings(source, tmp_path):
    seen = []
    prepare_folder(source, tmp_path / "out", tile_size=64, progress=lambda *step: seen.append(step))
    assert seen == [(stage, i, 9) for stage in ("reading intensities", "writing tiles") for i in range(1, 10)]


@pytest.mark.parametrize("name", ["neubias_training", "haesleinhuepf_notebooks"])
def test_real_collections_need_no_special_case(tmp_path, name):
    if not (REAL_IMAGES / name).is_dir():
        pytest.skip(f"no shared real images at {REAL_IMAGES / name}")
    done = prepare_folder(REAL_IMAGES / name, tmp_path / "out", tile_size=512, max_rejected=7)
    assert sum(done.images.values()) + len(done.rejected) == done.listed
    assert all("smaller than a tile" in reason for _, reason in done.rejected)
    manifest = load_manifest(tmp_path / "out")
    check_tiles(manifest, 512)
    assert any(read_tile(manifest.path(i)).max() == 1.0 for i in range(len(manifest)))
