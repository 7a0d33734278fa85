"""Tiles of partners show the place of the tile that they belong to; overlap, edges, content, fitted intensities."""

import csv

import cv2
import numpy as np
import pytest
import tifffile

from ray_pipeline.data.focus import depth_from_focus
from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.cut import partner_scale
from ray_pipeline.data.sources.survey import Survey


def block_means(image, scale):
    """Means of scale x scale pixels, by OpenCV; what remains at the far sides is left out."""
    height, width = (length // scale for length in image.shape)
    whole = image[: height * scale, : width * scale].astype(np.float64)
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


@pytest.fixture
def pair(tmp_path):
    """pair(clean, {task/name: partner}, ...): TIFF files of a foundation image and its partners -> their folder."""

    def write(clean, **partners):
        root = tmp_path / "in"
        for name, pixels in {"clean": clean, **partners}.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(root / name / "a.tif", pixels)
        return root

    return write


def surveyed(height, width, scale=None, pair=None):
    return Survey(SourceImage("a", "cells", pair=pair, scale=scale), "", "uint16", height, width)


@pytest.mark.parametrize(
    ("size", "of", "listed", "scale"),
    [
        ((128, 96), (64, 48), None, 2),
        ((131, 99), (32, 24), None, 4),
        ((135, 97), (16, 12), 8, 8),
        ((101, 75), (51, 38), None, 2),  # rounded up, as some programs do
        ((101, 75), (52, 38), None, 0),
        ((128, 96), (128, 96), 1, 1),
        ((128, 96), (32, 48), None, 0),
        ((128, 96), (32, 24), 2, 0),
        ((128, 96), (256, 192), None, 0),
        ((128, 96), (33, 24), None, 0),
    ],
)
def test_the_scale_of_a_partner_is_what_both_sides_agree_on(size, of, listed, scale):
    assert partner_scale(surveyed(*size), surveyed(*of, scale=listed, pair="a")) == scale


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (75, 103)])
def test_low_resolution_tiles_are_the_means_of_the_tiles_they_pair_with(
    prepare_folder, read_tiles, cells, pair, tmp_path, scale, size
):
    clean = cells(size, "float32", 1)
    root = pair(clean, low=block_means(clean, scale).astype(np.float32))
    rules = [("super_resolution", "low/(.*)", r"clean/\1")]
    prepare_folder(root, tmp_path / "out", partners=rules, overlap=8)
    foundation, low = read_tiles(tmp_path / "out"), read_tiles(tmp_path / "out", "degraded")
    assert sorted(tile.row["pair_id"] for tile in low.values()) == sorted(foundation)
    for tile in low.values():
        high = foundation[tile.row["pair_id"]]
        assert tile.levels.shape == (32 // scale, 32 // scale)
        np.testing.assert_allclose(tile.pixels, block_means(high.pixels, scale), atol=2 / 65535)
        assert [int(tile.row[k]) * scale for k in ("y0", "x0")] == [int(high.row[k]) for k in ("y0", "x0")]
        assert (tile.row["task"], tile.row["scale"]) == ("super_resolution", str(scale))
    covered = np.zeros(size, bool)
    for tile in foundation.values():
        np.testing.assert_allclose(tile.pixels, clean[tile.place], atol=1 / 65535)
        covered[tile.place] = True
    # the last tile lies on a whole pixel of the partner, less than one such pixel before the border
    assert covered[: size[0] - scale + 1, : size[1] - scale + 1].all()


def test_an_image_has_many_partners_of_several_kinds(prepare_folder, read_tiles, cells, tmp_path):
    root = tmp_path / "in"
    images = {f"clean/{i}.tif": cells((64, 64)) for i in range(2)}
    for i in range(2):
        clean = images[f"clean/{i}.tif"]
        images |= {f"avg{n}/{i}_{k}.tif": clean // 2 + cells((64, 64)) // 2 for n in (1, 4) for k in range(3)}
        images |= {f"low{s}/{i}.tif": block_means(clean, s).astype(np.uint16) for s in (2, 8)}
    for name, pixels in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root / name, pixels)
    rules = [
        ("denoising", r"avg(?P<averages>\d+)/(\d)_.*", r"clean/\2.tif"),
        ("super_resolution", r"low\d/(.*)", r"clean/\1"),
    ]
    done = prepare_folder(root, tmp_path / "out", partners=rules, meta=("um_pixel=0.1",), percentiles=(0, 100))
    foundation, partners = read_tiles(tmp_path / "out"), read_tiles(tmp_path / "out", "degraded")
    assert (len(foundation), len(partners)) == (2 * 4, 2 * 4 * 8)
    for tile in partners.values():
        folder, stem = tile.image.split("__")
        assert tile.row["pair_id"].startswith(f"clean__{stem[0]}_c0_")
        np.testing.assert_array_equal(tile.pixels, images[f"{folder}/{stem}.tif"][tile.place])
        level = ("", folder[3:]) if folder.startswith("low") else (folder[3:], "1")
        assert (tile.row["averages"], tile.row["scale"]) == level
        assert float(tile.row["um_pixel"]) == pytest.approx(0.1 * int(tile.row["scale"]))
    assert done.tiles["cells", "train", "denoising", "", "avg4"] == 2 * 4 * 3
    assert done.tiles["cells", "train", "super_resolution", "", "x8"] == 2 * 4
    assert done.images["cells", "train", "foundation", "", ""] == 2


def test_a_fitted_partner_that_is_a_line_over_the_clean_image_gives_the_same_tiles(
    prepare_folder, read_tiles, cells, pair, tmp_path
):
    # a bright pedestal under a faint image: a fit in few digits would lose the slope
    clean = (cells((256, 256), "uint16", 400) + 20000).astype(np.uint16)
    low = 0.25 * block_means(clean, 2) + 3000
    root = pair(clean, noisy=3 * (clean - 19000), low=low.astype(np.float32))
    rules = [("denoising", "noisy/(.*)", r"clean/\1"), ("super_resolution", "low/(.*)", r"clean/\1")]
    prepare_folder(
        root, tmp_path / "out", tile_size=128, partners=rules, fit_partners=True, percentiles=(1, 99)
    )  # fmt: skip
    foundation, partners = read_tiles(tmp_path / "out"), read_tiles(tmp_path / "out", "degraded")
    assert len(partners) == 2 * len(foundation) == 8
    lo, hi = (float(next(iter(foundation.values())).row[key]) for key in ("norm_lo", "norm_hi"))
    assert (lo, hi) == pytest.approx(np.percentile(clean, (1, 99)))
    for tile in partners.values():
        high = foundation[tile.row["pair_id"]]
        slope, offset = (3, -57000) if tile.row["task"] == "denoising" else (0.25, 3000)
        ends = [float(tile.row["norm_lo"]), float(tile.row["norm_hi"])]
        np.testing.assert_allclose(ends, [slope * lo + offset, slope * hi + offset], rtol=1e-6)
        if tile.row["task"] == "denoising":
            assert np.abs(tile.levels.astype(int) - high.levels).max() <= 1
        else:
            place = tuple(slice(2 * each.start, 2 * each.stop) for each in tile.place)
            wanted = np.clip((block_means(clean[place], 2) - lo) / (hi - lo), 0, 1) * 65535
            np.testing.assert_allclose(tile.levels, wanted, atol=1)


def test_partners_without_a_fit_keep_the_scale_of_their_image(prepare_folder, read_tiles, cells, pair, tmp_path):
    clean = cells((32, 32))
    root = pair(clean, noisy=clean // 2)
    prepare_folder(root, tmp_path / "out", partners=[("denoising", "noisy/(.*)", r"clean/\1")])
    (tile,), (high,) = read_tiles(tmp_path / "out", "degraded").values(), read_tiles(tmp_path / "out").values()
    assert [tile.row[key] for key in ("norm_lo", "norm_hi")] == [high.row[key] for key in ("norm_lo", "norm_hi")]
    np.testing.assert_array_equal(tile.pixels, np.maximum(clean // 2, clean.min()))


def test_a_partner_that_runs_against_its_image_is_left_out_by_name(prepare_folder, cells, pair, tmp_path):
    clean = cells((32, 32))
    root = pair(clean, noisy=5000 - clean)
    rules = [("denoising", "noisy/(.*)", r"clean/\1")]
    done = prepare_folder(root, tmp_path / "out", partners=rules, fit_partners=True)
    assert not (tmp_path / "out" / "degraded").exists()
    with (done.folders["cells"] / "rejected.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["path"], row["reason"][:32]) == ("noisy/a.tif", "it gets darker where clean/a.tif")


def test_tiles_overlap_as_asked_and_end_at_the_border(prepare_folder, read_tiles, cells, pair, tmp_path):
    root = pair(cells((32, 80)))
    prepare_folder(root, tmp_path / "out", overlap=8)
    tiles = read_tiles(tmp_path / "out").values()
    assert [int(tile.row["x0"]) for tile in tiles] == [0, 24, 48]
    prepare_folder(root, tmp_path / "out", overlap=4, overwrite=True)
    assert [int(tile.row["x0"]) for tile in read_tiles(tmp_path / "out").values()] == [0, 28, 48]


def test_tiles_with_too_little_content_are_left_out_with_their_partners(
    prepare_folder, read_tiles, rng, pair, tmp_path
):
    clean = rng.integers(90, 110, (64, 64)).astype(np.uint16)
    clean[:32, :32] += 1000
    clean[40:48, 40:48] += 1000  # 64 of 1024 pixels
    root = pair(clean, noisy=clean + 3)
    rules = [("denoising", "noisy/(.*)", r"clean/\1")]
    done = prepare_folder(root, tmp_path / "out", partners=rules, min_content=0.06)
    kept = ["clean__a_c0_y00000_x00000", "clean__a_c0_y00032_x00032"]
    assert list(read_tiles(tmp_path / "out")) == kept
    assert [tile.row["pair_id"] for tile in read_tiles(tmp_path / "out", "degraded").values()] == kept
    assert done.left_out == 2
    text = (done.folders["cells"] / "rejected.csv").read_text()
    assert text.count("clean/a.tif,0.0000 of the tile lies above the background of ") == 2


@pytest.mark.parametrize("z", ["max", "focus"])
def test_a_projected_stack_has_its_depth_as_a_partner(prepare_folder, read_tiles, cells, tmp_path, z):
    stack = cells((5, 2, 40, 40))
    (tmp_path / "in").mkdir()
    metadata = {"axes": "ZCYX", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "um"}
    metadata |= {"PhysicalSizeY": 0.2, "PhysicalSizeYUnit": "um"}
    tifffile.imwrite(tmp_path / "in" / "a.ome.tif", stack, metadata=metadata)
    tifffile.imwrite(tmp_path / "in" / "flat.tif", cells((40, 40)))
    done = prepare_folder(tmp_path / "in", tmp_path / "out", z=z, overlap=4)
    tiles, depths = read_tiles(tmp_path / "out"), read_tiles(tmp_path / "out", "degraded")
    assert {tile.plane for tile in tiles.values()} == {f"0_{z}", f"1_{z}", "0"}
    assert [tile.row["pair_id"] for tile in depths.values()] == [i for i in tiles if i.startswith("a.ome")]
    assert done.tiles["cells", "train", "depth", "", ""] == len(depths) == 8
    for tile in depths.values():
        c = int(tile.row["channel_idx"])
        high = tiles[tile.row["pair_id"]]
        assert tile.id == high.id + "_depth"
        assert (tile.row["degradation"], tile.row["um_pixel"]) == ("depth from focus", "0.2")
        np.testing.assert_allclose(tile.levels / 65535, depth_from_focus(stack[:, c])[tile.place], atol=1e-5)
        if z == "max":
            np.testing.assert_array_equal(high.pixels, stack[:, c].max(axis=0)[high.place])


def test_partners_on_another_scale_are_named_and_a_fit_brings_them_back(prepare_folder, cells, pair, tmp_path):
    clean = cells((64, 64), "float32", 1)
    root = pair(clean, same=clean, gain=(0.6 * clean).astype(np.float32), dark=(1 - clean).astype(np.float32))
    rules = [("denoising", f"{name}/(.*)", r"clean/\1") for name in ("same", "gain", "dark")]
    done = prepare_folder(root, tmp_path / "out", partners=rules)
    assert done.off_scale == ["dark/a.tif", "gain/a.tif"]
    rules = rules[:2]
    (root / "dark" / "a.tif").unlink()
    assert prepare_folder(root, tmp_path / "fit", partners=rules, fit_partners=True).off_scale == []
