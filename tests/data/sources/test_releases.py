"""`prepare` of a release as downloaded, and of a folder, from the command line to the tiles."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from ray_pipeline.cli import main
from ray_pipeline.data.manifest import load_manifest, load_pairs

SCALES = {1: "HighRes1024", 2: "LowRes512", 4: "LowRes256", 8: "LowRes128"}
LEVELS = ("raw", "avg2", "avg4", "avg8", "avg16")


def caco2_name(scale, tile, cell):
    corners = "_".join(str(x // scale) for x in (768, 1408, 1280, 1920))
    return f"hr_div_{scale}/tile_{SCALES[scale]}-{tile}_3_{corners}_CELL{cell}.tif"


@pytest.fixture
def caco2(tmp_path, cells):
    """Tiles 1, 2 (train), 7 (val) and 9 (test) of SR-CACO-2, one patch a cell -> the images by name."""
    images = {}
    for tile in (1, 2, 7, 9):
        for cell in range(3):
            high = cells((64, 64), "uint8", 100 + 50 * cell)
            images[caco2_name(1, tile, cell)] = high
            for scale in (2, 4, 8):
                images[caco2_name(scale, tile, cell)] = high[::scale, ::scale]
    for name, pixels in images.items():
        (tmp_path / "caco2" / name).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(tmp_path / "caco2" / name, pixels)
    return images


@pytest.fixture
def fmd(tmp_path, cells):
    """Fields 1, 2 and 19 of two types of FMD, two captures a level -> the images by name."""
    images = {}
    for kind in ("Confocal_FISH", "WideField_BPAE_G"):
        for field in (1, 2, 19):
            images[f"{kind}/gt/{field}/avg50.png"] = cells((64, 64), "uint8", 200)
            for level in LEVELS:
                for n in range(2):
                    images[f"{kind}/{level}/{field}/HV110_P0500510{n:03d}.png"] = cells((64, 64), "uint8", 255)
    for name, pixels in images.items():
        (tmp_path / "fmd" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "fmd" / name), pixels)
    return images


def table_of(text):
    """Lines of the printed counts -> {(data set, split, role, cell or type, degree): count}."""
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("data set  ") and "split" in line)
    starts = [head.index(word) for word in ("data set", "split", "role", "cell or type", "degree")]
    starts.append(head.index("images" if head.endswith("images") else "tiles"))
    rows = lines[lines.index(head) + 1 :]
    rows = rows[: next(i for i, line in enumerate(rows) if line.endswith((" images", " tiles")))]
    cuts = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in rows]
    return {tuple(row[:-1]): int(row[-1]) for row in cuts}


def caco2_counts(patches):
    roles = [("foundation", "")] + [("super_resolution", f"x{scale}") for scale in (2, 4, 8)]
    return {
        ("sr_caco2", split, role, f"CELL{cell}", degree): tiles * patches
        for split, tiles in (("train", 2), ("val", 1), ("test", 1))
        for role, degree in roles
        for cell in range(3)
    }


def test_sr_caco2_is_cut_with_its_published_splits_and_real_low_resolution(
    tmp_path, ray_cluster, caco2, read_tiles, capsys
):
    out = tmp_path / "data"
    words = ["prepare", "sr-caco2", str(tmp_path / "caco2"), "--out", str(out), "--tile-size", "32"]
    assert main([*words, "--percentiles", "0", "100"]) == 0
    printed = capsys.readouterr().out
    assert "images    48 listed = 48 accepted + 0 rejected" in printed
    assert table_of(printed) == caco2_counts(patches=4)
    assert f"data set  {out / 'foundation' / 'sr_caco2'} (what was rejected or left out: rejected.csv)" in printed
    assert printed.splitlines()[-1].startswith("next      ray-pipeline train --config ")
    high, low = read_tiles(out, dataset="sr_caco2"), read_tiles(out, "degraded", "sr_caco2")
    assert (len(high), len(low)) == (4 * 3 * 4, 4 * 3 * 4 * 3)
    names = {name.removesuffix(".tif").replace("/", "__"): name for name in caco2}
    for tile in (*high.values(), *low.values()):
        np.testing.assert_array_equal(
            tile.pixels, np.clip(caco2[names[tile.image]][tile.place], *limits(tile, caco2, names))
        )
        number = int(tile.image.split("-")[1].split("_")[0])
        assert tile.split == {1: "train", 2: "train", 7: "val", 9: "test"}[number]
        assert tile.image.endswith(f"CELL{tile.row['channel_idx']}")
    for tile in low.values():
        pair = high[tile.row["pair_id"]]
        scale = int(tile.row["scale"])
        assert tile.levels.shape == (32 // scale, 32 // scale)
        np.testing.assert_array_equal(tile.pixels, pair.pixels[::scale, ::scale])
        assert (tile.row["task"], tile.row["specimen"]) == ("super_resolution", "Caco-2")
    assert len(load_manifest(out, "train")) == 24
    assert len(load_pairs(out, "sr_caco2")) == len(low)


def limits(tile, images, names):
    """Minimum and maximum of all high-resolution patches of the tile's cell, which are 0 and 1."""
    cell = names[tile.image][-9:]
    pixels = [image for name, image in images.items() if name.startswith("hr_div_1/") and name.endswith(cell)]
    found = (np.min(pixels), np.max(pixels))
    assert found == (float(tile.row["norm_lo"]), float(tile.row["norm_hi"]))
    return found


def test_fmd_is_cut_with_many_captures_a_field_and_its_published_test_field(
    tmp_path, ray_cluster, fmd, read_tiles, capsys
):
    out = tmp_path / "data"
    words = ["prepare", "fmd", str(tmp_path / "fmd"), "--out", str(out), "--tile-size", "64"]
    assert main([*words, "--percentiles", "0", "100", "--val-fraction", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "note      10 of 12 types are missing" in printed
    assert "images    66 listed = 66 accepted + 0 rejected" in printed
    high, low = read_tiles(out, dataset="fmd"), read_tiles(out, "degraded", "fmd")
    assert (len(high), len(low)) == (6, 60)
    counts = table_of(printed)
    assert sum(counts.values()) == 66
    for kind in ("Confocal_FISH", "WideField_BPAE_G"):
        assert counts["fmd", "test", "foundation", kind, "avg50"] == 1
        for n in (1, 2, 4, 8, 16):
            assert counts["fmd", "test", "denoising", kind, f"avg{n}"] == 2
    assert {tile.split for tile in high.values() if "__19__" in tile.image} == {"test"}
    assert {tile.split for tile in high.values() if "__19__" not in tile.image} == {"train", "val"}
    for tile in low.values():
        kind, level, field, _ = tile.image.split("__")
        pair = high[tile.row["pair_id"]]
        assert (pair.image, pair.split) == (f"{kind}__gt__{field}__avg50", tile.split)
        assert tile.row["averages"] == {"raw": "1"}.get(level, level.removeprefix("avg"))
        lo, hi = float(pair.row["norm_lo"]), float(pair.row["norm_hi"])
        np.testing.assert_array_equal(tile.pixels, np.clip(fmd[tile.image.replace("__", "/") + ".png"], lo, hi))
    told = {(tile.image.split("__")[0], tile.row["channel_idx"], tile.row["modality"]) for tile in high.values()}
    assert told == {("Confocal_FISH", "0", "confocal"), ("WideField_BPAE_G", "1", "wide-field")}


@pytest.mark.parametrize("kind", ["sr-caco2", "fmd", "folder"])
def test_a_dry_run_counts_images_and_writes_nothing(tmp_path, caco2, fmd, capsys, tree, kind):
    source = tmp_path / ("fmd" if kind == "fmd" else "caco2")
    (source / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    assert main(["prepare", kind, str(source), "--dry-run", "--out", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    counts = table_of(printed)
    if kind == "sr-caco2":
        assert counts == caco2_counts(patches=1)
    if kind == "fmd":
        assert {key[1] for key, count in counts.items() if key[2] == "foundation"} == {"train", "val", "test"}
    if kind == "folder":
        assert counts == {("caco2", "train", "foundation", "", ""): 43, ("caco2", "val", "foundation", "", ""): 5}
    assert f"{sum(counts.values())} images" in printed.splitlines()
    assert "ignored   1 other files" in printed.splitlines()
    assert tree(tmp_path) == before


def test_a_folder_is_prepared_with_every_option_from_the_command_line(tmp_path, ray_cluster, cells, read_tiles, capsys):
    stack = {"clean": cells((3, 2, 40, 40)), "noisy": cells((3, 2, 40, 40))}
    for name, pixels in stack.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for well in "AB":
            np.save(tmp_path / "in" / name / f"{well}.npy", pixels)
    words = ["prepare", "folder", str(tmp_path / "in"), "--out", str(tmp_path / "data"), "--dataset", "cells"]
    words += ["--tile-size", "32", "--overlap", "16", "--axes", "ZCYX", "--channels", "1", "--z", "max"]
    words += ["--group", "/(.)", "--val-fraction", "0.5", "--seed", "3", "--percentiles", "1", "99"]
    words += ["--partners", "denoising", "noisy/(.*)", r"clean/\1", "--partner-intensity", "fit"]
    words += ["--meta", "marker=actin", "--meta", "um_pixel=0.1"]
    words += ["--min-content", "0.001", "--max-rejected", "1"]
    (tmp_path / "in" / "clean" / "broken.png").write_text("none")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "images    5 listed = 4 accepted + 1 rejected" in printed
    assert "rejected  clean/broken.png: " in printed
    tiles, partners = read_tiles(tmp_path / "data"), read_tiles(tmp_path / "data", "degraded")
    assert len(tiles) == 2 * 4
    assert {tile.split for tile in tiles.values()} == {"train", "val"}
    assert {(tile.plane, tile.row["marker"], tile.row["um_pixel"]) for tile in tiles.values()} == {
        ("1_max", "actin", "0.1")
    }
    assert {(tile.row["task"], tile.plane) for tile in partners.values()} == {
        ("denoising", "1_max"),
        ("depth", "1_max"),
    }
    lo, hi = np.percentile(stack["clean"].max(axis=0)[1], (1, 99))
    for tile in tiles.values():
        assert (float(tile.row["norm_lo"]), float(tile.row["norm_hi"])) == pytest.approx((lo, hi))
        np.testing.assert_array_equal(tile.pixels, np.rint(np.clip(stack["clean"].max(axis=0)[1][tile.place], lo, hi)))
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["fmd", "in", "--out", "data", "--group", "x"], "--group is for `prepare folder` alone; fmd names"),
        (["sr-caco2", "gone", "--out", "data"], "gone: no such folder, expected the release as downloaded"),
        (["folder", "in"], "--out is missing: give the data root to write, or --dry-run"),
        (
            ["folder", "in", "--out", "data", "--z", "0", "0"],
            "--z 0 0: expected numbers from 0, each once, or all, or max",
        ),
        (["folder", "in", "--out", "data", "--t", "max"], "--t max: expected numbers from 0, each once, or all"),
        (["folder", "in", "--out", "data", "--channels", "-1"], "--channels -1: expected numbers from 0"),
        (["folder", "in", "--out", "data", "--meta", "stain=x"], "--meta 'stain=x': expected KEY=VALUE"),
        (["folder", "in", "--out", "data", "--tile-size", "0"], "--tile-size 0: expected at least 1 pixel"),
        (["folder", "in", "--dry-run", "--group", "(w"], "--group '(w' is no regular expression"),
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_ray_starts(tmp_path, monkeypatch, capsys, words, found):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    assert main(["prepare", *words]) == 2
    assert found in capsys.readouterr().err
    assert not Path("data").exists()
