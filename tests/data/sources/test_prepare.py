"""Images become tiles that are crops of them, in one scale a group, the same on every machine."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import ray
import tifffile

from ray_pipeline.data.manifest import check_tiles, load_manifest
from ray_pipeline.data.tiles import read_tile

REAL_IMAGES = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def write_formats(folder, cells):
    """One image of each format and dtype -> {stem: {plane: pixels}}, plane as in a tile's id."""
    (folder / "well A").mkdir(parents=True)
    flat = {
        "eight.tif": cells((64, 40), "uint8", 255),
        "twelve.tiff": cells((40, 70), "uint16", 4095),
        "sixteen.TIF": cells((33, 64), "uint16", 65535),
        "signed.tif": (cells((32, 32), "int16", 3000) - 1500).astype("int16"),
        "well A/unit.tif": cells((40, 40), "float32", 1),
        "offset.tif": cells((40, 40), "float32", 500) + np.float32(10000),
        "deep.npy": cells((40, 33), "float64", 1),
        "half.npy": cells((40, 33), "float16", 1),
        "wide.npy": cells((40, 33), "uint32", 100000),
        "grey.png": cells((40, 40), "uint8", 255),
        "grey16.PNG": cells((40, 40), "uint16", 65535),
    }
    expected = {name.rsplit(".", 1)[0].replace("/", "__").replace(" ", "-"): {"0": p} for name, p in flat.items()}
    for name, pixels in flat.items():
        if name.endswith(".npy"):
            np.save(folder / name, pixels)
        elif name.lower().endswith(".png"):
            cv2.imwrite(str(folder / name), pixels)
        else:
            tifffile.imwrite(folder / name, pixels)
    colours = cells((40, 40, 3), "uint8", 255)
    cv2.imwrite(str(folder / "rgb.png"), colours[..., ::-1])
    expected["rgb"] = {str(c): colours[..., c] for c in range(3)}
    np.savez(folder / "archive.npz", cells=cells((2, 40, 48)))
    expected["archive"] = {str(c): np.load(folder / "archive.npz")["cells"][c] for c in range(2)}
    ome = cells((2, 2, 3, 32, 50))
    metadata = {"axes": "TCZYX", "PhysicalSizeX": 130, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 130}
    metadata |= {"PhysicalSizeYUnit": "nm", "Channel": {"Name": ["DAPI", "GFP"]}}
    tifffile.imwrite(folder / "plate.ome.tif", ome, metadata=metadata)
    expected["plate.ome"] = {f"{c}_t{t}_z{z}": ome[t, c, z] for t, c, z in np.ndindex(ome.shape[:3])}
    imagej = cells((2, 32, 50))
    tifffile.imwrite(
        folder / "stack.tif", imagej, imagej=True, metadata={"axes": "ZYX", "unit": "um"}, resolution=(4, 4)
    )
    expected["stack"] = {f"0_z{z}": imagej[z] for z in range(2)}
    return expected


def test_every_tile_of_every_format_is_a_crop_and_every_pixel_is_in_one(tmp_path, prepare_folder, read_tiles, cells):
    expected = write_formats(tmp_path / "my plate (1)", cells)
    done = prepare_folder(tmp_path / "my plate (1)", tmp_path / "out", z="all", t="all")
    covered = {}
    for tile in read_tiles(tmp_path / "out").values():
        image = expected[tile.image][tile.plane]
        assert tile.row["dtype"] == image.dtype.name
        assert tile.levels.shape == (32, 32)
        covered.setdefault((tile.image, tile.plane), np.zeros(image.shape, bool))[tile.place] = True
        span = float(tile.row["norm_hi"]) - float(tile.row["norm_lo"])
        # a tile has 65536 levels, so that integers of 16 bit come back exactly
        step = 0 if image.dtype.kind in "iu" and span <= 65535 else max(span / 65535, image.dtype.kind in "iu")
        assert np.abs(tile.pixels.astype(float) - image[tile.place]).max() <= step, tile.id
    assert {stem: {p for s, p in covered if s == stem} for stem in expected} == {s: set(e) for s, e in expected.items()}
    assert all(mask.all() for mask in covered.values())
    assert (done.listed, done.accepted, done.rejected) == (len(expected), len(expected), [])
    check_tiles(load_manifest(tmp_path / "out"), 32)


def test_pixel_size_and_channel_names_come_from_the_file_and_from_the_user_where_it_is_silent(
    tmp_path, prepare_folder, read_tiles, cells
):
    write_formats(tmp_path / "in", cells)
    meta = ("um_pixel=0.5", "marker=actin", "NA=1.4", "lambda=520", "specimen=HeLa")
    prepare_folder(tmp_path / "in", tmp_path / "out", z="all", t="all", meta=meta)
    told = {}
    for tile in read_tiles(tmp_path / "out").values():
        told[tile.image, tile.row["channel_idx"]] = (float(tile.row["um_pixel"]), tile.row["marker"])
        assert [tile.row[key] for key in ("NA", "lambda", "specimen")] == ["1.4", "520.0", "HeLa"]
    assert told["plate.ome", "0"] == (0.13, "DAPI")
    assert told["plate.ome", "1"] == (0.13, "GFP")
    assert told["stack", "0"] == (0.25, "actin")
    assert told["eight", "0"] == (0.5, "actin")


def test_axes_channels_depths_and_times_are_those_asked_for(tmp_path, prepare_folder, read_tiles, cells):
    (tmp_path / "in").mkdir()
    pixels = cells((3, 2, 5, 32, 32))
    np.save(tmp_path / "in" / "a.npy", pixels)
    prepare_folder(tmp_path / "in", tmp_path / "out", axes="TCZYX", channels=(1,), z=(0, 4), t=(2,))
    tiles = read_tiles(tmp_path / "out")
    assert [tile.plane for tile in tiles.values()] == ["1_t2_z0", "1_t2_z4"]
    for tile, z in zip(tiles.values(), (0, 4), strict=True):
        np.testing.assert_array_equal(tile.pixels, pixels[2, 1, z])


def test_ome_zarr_folders_are_images(tmp_path, prepare_folder, read_tiles, cells):
    zarr = pytest.importorskip("zarr", minversion="3", reason="the optional package zarr is not installed")
    pixels = cells((2, 40, 64))
    group = zarr.open_group(tmp_path / "in" / "plate.ome.zarr", mode="w", zarr_format=2)
    group.create_array("0", data=pixels, chunks=(1, 20, 64))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    scale = [{"type": "scale", "scale": [1, 0.2, 0.2]}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}], "version": "0.4"}
    group.attrs.update({"multiscales": [image]})
    assert prepare_folder(tmp_path / "in", tmp_path / "out").listed == 1
    tiles = read_tiles(tmp_path / "out")
    assert len(tiles) == 2 * 2 * 2
    for tile in tiles.values():
        np.testing.assert_array_equal(tile.pixels, pixels[int(tile.row["channel_idx"])][tile.place])
        assert float(tile.row["um_pixel"]) == 0.2


@pytest.mark.parametrize("percentiles", [(0.5, 99.5), (0.1, 99.9)])
def test_ranges_are_percentiles_of_all_pixels_of_a_channel_and_dtype(
    tmp_path, prepare_folder, read_tiles, cells, percentiles
):
    expected = write_formats(tmp_path / "in", cells)
    prepare_folder(tmp_path / "in", tmp_path / "out", z="all", t="all", percentiles=percentiles)
    pixels, found = {}, {}
    for planes in expected.values():
        for plane, image in planes.items():
            pixels.setdefault((plane.split("_")[0], image.dtype.name), []).append(image.ravel().astype(np.float64))
    for tile in read_tiles(tmp_path / "out").values():
        found.setdefault((tile.row["channel_idx"], tile.row["dtype"]), set()).add(
            (float(tile.row["norm_lo"]), float(tile.row["norm_hi"]))
        )
    assert {group: len(ranges) for group, ranges in found.items()} == dict.fromkeys(pixels, 1)
    for group, ranges in found.items():
        values = np.concatenate(pixels[group])
        bin_width = 0 if group[1] in ("uint8", "int16", "uint16") else np.ptp(values) / 2**20
        np.testing.assert_allclose(ranges.pop(), np.percentile(values, percentiles), atol=bin_width + 1e-9)


def test_an_8_bit_image_beside_16_bit_ones_is_not_crushed(tmp_path, prepare_folder, read_tiles, cells):
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "deep.tif", cells((32, 32), "uint16", 60000))
    tifffile.imwrite(tmp_path / "in" / "flat.tif", cells((32, 32), "uint8", 200))
    prepare_folder(tmp_path / "in", tmp_path / "out")
    assert [tile.levels.max() for tile in read_tiles(tmp_path / "out").values()] == [65535, 65535]


def test_dim_and_saturated_images_are_reported_and_keep_their_scale(tmp_path, prepare_folder, read_tiles, cells):
    (tmp_path / "in").mkdir()
    bright = cells((32, 32), "uint16", 4000)
    clipped = bright.copy()
    clipped[:2] = 4095
    for name, pixels in (("bright", bright), ("dim", bright // 10), ("clipped", clipped)):
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", pixels)
    done = prepare_folder(tmp_path / "in", tmp_path / "out")
    assert (done.dim, done.saturated) == (["dim.tif"], ["clipped.tif"])
    tiles = read_tiles(tmp_path / "out").values()
    assert len({tile.row["norm_hi"] for tile in tiles}) == 1
    assert {tile.image: float(tile.row["saturated"]) for tile in tiles} == {"bright": 0, "dim": 0, "clipped": 0.0625}


def test_groups_stay_in_one_split_and_partners_follow_their_image(tmp_path, prepare_folder, read_tiles, cells):
    for well in range(10):
        for field in range(2):
            for kind in ("clean", "noisy"):
                path = tmp_path / "in" / kind / f"w{well}_f{field}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, cells((32, 32)))
    pairs = [("denoising", "noisy/(.*)", r"clean/\1")]
    done = prepare_folder(
        tmp_path / "in", tmp_path / "out", group=r"(w\d+)_", partners=pairs, val_fraction=0.3, test_fraction=0.2
    )
    clean = read_tiles(tmp_path / "out")
    splits = {}
    for tile in clean.values():
        splits.setdefault(tile.image.split("_")[2], set()).add(tile.split)
    assert sorted(len(found) for found in splits.values()) == [1] * 10
    assert sorted(found.pop() for found in splits.values()) == ["test"] * 2 + ["train"] * 5 + ["val"] * 3
    noisy = read_tiles(tmp_path / "out", "degraded")
    assert len(noisy) == len(clean) == 20
    assert all(tile.split == clean[tile.row["pair_id"]].split for tile in noisy.values())
    assert done.tiles == done.images
    assert done.images["cells", "test", "denoising", "", ""] == 4


def test_the_same_images_give_the_same_bytes_on_one_cpu_and_on_many(tmp_path, prepare_folder, tree, cells):
    write_formats(tmp_path / "in", cells)
    for i in range(40):
        tifffile.imwrite(tmp_path / "in" / f"more{i}.tif", cells((40, 40)))
    options = {"z": "all", "t": "all", "overlap": 8, "val_fraction": 0.2}
    prepare_folder(tmp_path / "in", tmp_path / "many", **options)

    @ray.remote(num_cpus=5)
    class Busy:
        def ready(self):
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())
    try:
        prepare_folder(tmp_path / "in", tmp_path / "one", **options)
    finally:
        ray.kill(busy)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")
    with (tmp_path / "one" / "foundation" / "cells" / "rejected.csv").open() as file:
        assert list(csv.reader(file)) == [["id", "path", "reason"]]


def test_paths_are_meant_from_the_folder_that_the_user_is_in(tmp_path, prepare_folder, read_tiles, cells, monkeypatch):
    (tmp_path / "in").mkdir()
    pixels = cells((32, 32))
    tifffile.imwrite(tmp_path / "in" / "a.tif", pixels)
    monkeypatch.chdir(tmp_path)  # Ray's workers stay where they were started
    prepare_folder(Path("in"), Path("out"))
    (tile,) = read_tiles(tmp_path / "out").values()
    np.testing.assert_array_equal(tile.pixels, pixels)


def test_progress_counts_every_image_in_both_readings(tmp_path, prepare_folder, cells):
    (tmp_path / "in").mkdir()
    for i in range(9):
        tifffile.imwrite(tmp_path / "in" / f"{i}.tif", cells((32, 32)))
    seen = []
    prepare_folder(tmp_path / "in", tmp_path / "out", report=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "writing tiles"] == [("writing tiles", n, 9) for n in range(10)]
    looking = [done for stage, done, total in seen if (stage, total) == ("looking", 9)]
    assert (looking[0], looking[-1], sorted(set(looking))) == (0, 9, looking)


@pytest.mark.parametrize("name", ["neubias_training", "haesleinhuepf_notebooks"])
def test_real_collections_need_no_special_case(tmp_path, prepare_folder, name):
    if not (REAL_IMAGES / name).is_dir():
        pytest.skip(f"no shared real images at {REAL_IMAGES / name}")
    done = prepare_folder(
        REAL_IMAGES / name, tmp_path / "out", tile_size=512, max_rejected=20, z="max", t=(0,), percentiles=(0.1, 99.9)
    )
    assert done.accepted + len(done.rejected) == done.listed
    assert all("smaller than a tile" in row.reason for row in done.rejected)
    manifest = load_manifest(tmp_path / "out")
    check_tiles(manifest, 512)
    assert any(read_tile(manifest.path(i)).max() == 1.0 for i in range(len(manifest)))
