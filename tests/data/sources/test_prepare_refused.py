"""What cannot be used is listed and counted, and a data set appears whole or not at all."""

import csv
import os
import re
import shutil
import socket
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tifffile

from ray_pipeline.data.manifest import load_manifest
from ray_pipeline.data.sources.collection import Collection, SourceImage
from ray_pipeline.data.sources.cut import Cutting
from ray_pipeline.data.sources.prepare import Settings, prepare
from ray_pipeline.data.sources.tiling import safe_name
from ray_pipeline.errors import UserError


@pytest.fixture
def source(tmp_path, cells):
    """Six good images of 40 x 40 pixels, one of them in grey PNG."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(5):
        tifffile.imwrite(folder / f"good{i}.tif", cells((40, 40)))
    cv2.imwrite(str(folder / "grey.png"), cells((40, 40), "uint8", 255))
    return folder


def listed(data_set):
    with (data_set / "rejected.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def spoil(folder, cells):
    """Add images that cannot be used -> {name: a part of the reason}."""
    whole, good = (folder / "good0.tif").read_bytes(), (folder / "grey.png").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.tif").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    nan = cells((40, 40), "float32", 1)
    nan[3, 4] = np.nan
    tifffile.imwrite(folder / "nan.tif", nan)
    tifffile.imwrite(folder / "infinite.tif", np.where(np.isnan(nan), np.float32(np.inf), nan))
    tifffile.imwrite(folder / "small.tif", cells((31, 64)))
    tifffile.imwrite(folder / "flat.tif", np.full((40, 40), 7, np.uint16))
    np.save(folder / "stack.npy", cells((9, 40, 40)))
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "far.tif").write_bytes(whole)
    (folder / "link.tif").symlink_to(outside / "far.tif")
    (folder / "linked").symlink_to(outside)
    return {
        "cut.png": "truncated",
        "cut.tif": "truncated",
        "empty.tif": "empty file",
        "flat.tif": "constant image, every pixel is 7",
        "infinite.tif": "1 pixels that are NaN or infinite",
        "link.tif": "a link to",
        "linked": "a link to",
        "nan.tif": "1 pixels that are NaN or infinite",
        "photo.jpg": "convert it",
        "small.tif": "31 x 64 pixels, smaller than a tile of 32",
        "stack.npy": "pass --axes",
        "text.png": "other content",
    }


def test_unusable_images_stop_the_job_and_every_one_is_listed(tmp_path, source, prepare_folder, read_tiles, cells):
    reasons = spoil(source, cells)
    target = tmp_path / "out" / "foundation" / "cells"
    with pytest.raises(UserError, match=r"12 of 18 images cannot be used.*link\.tif.*--max-rejected 12"):
        prepare_folder(source, tmp_path / "out", max_rejected=11)
    assert [p.name for p in target.iterdir()] == ["rejected.csv"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["foundation"]
    done = prepare_folder(source, tmp_path / "out", max_rejected=12)
    rows = listed(target)
    assert {row["path"]: row["reason"] for row in rows} == {row.path: row.reason for row in done.rejected}
    assert {row["path"] for row in rows} == set(reasons)
    assert len(rows) == len(reasons)
    assert all(reasons[row["path"]] in row["reason"] and not row["id"] for row in rows)
    assert done.accepted + len(done.rejected) == done.listed == 18
    assert sum(done.images.values()) == done.accepted == 6
    assert {tile.image for tile in read_tiles(tmp_path / "out").values()} == {*(f"good{i}" for i in range(5)), "grey"}


def test_partners_that_do_not_belong_are_listed_and_those_that_do_are_kept(tmp_path, prepare_folder, read_tiles, cells):
    root = tmp_path / "in"
    (root / "noisy").mkdir(parents=True)
    for name in ("a", "b", "c"):
        tifffile.imwrite(root / f"{name}.tif", cells((40, 40)))
    tifffile.imwrite(root / "d.tif", cells((2, 40, 40)), imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(root / "bad.tif", np.zeros((40, 40), np.uint16))
    tifffile.imwrite(root / "two.tif", cells((2, 40, 40)), imagej=True, metadata={"axes": "ZYX"})
    shapes = {"a": (40, 40), "b": (40, 39), "c": (20, 20), "d": (40, 40), "bad": (40, 40), "none": (40, 40)}
    for name, shape in shapes.items():
        tifffile.imwrite(root / "noisy" / f"{name}.tif", cells(shape), imagej=True)
    tifffile.imwrite(root / "noisy" / "two.tif", cells((3, 40, 40)), imagej=True, metadata={"axes": "ZYX"})
    rules = [("denoising", "noisy/(.*)", r"\1")]
    done = prepare_folder(root, tmp_path / "out", partners=rules, z="all", t="all", max_rejected=7)
    reasons = {row.path: row.reason for row in done.rejected}
    assert reasons == {
        "bad.tif": "constant image, every pixel is 0",
        "noisy/b.tif": "40 x 39 pixels do not fit those of its foundation image b.tif, 40 x 40",
        "noisy/bad.tif": "its foundation image bad.tif is rejected",
        "noisy/c.tif": "20 x 20 pixels do not fit those of its foundation image c.tif, 40 x 40",
        "noisy/d.tif": "its channels, depths or times are not those of its foundation image d.tif",
        "noisy/none.tif": "its foundation image none.tif is not there",
        "noisy/two.tif": "its channels, depths or times are not those of its foundation image two.tif",
    }
    assert {tile.image for tile in read_tiles(tmp_path / "out", "degraded").values()} == {"noisy__a"}
    assert {tile.image for tile in read_tiles(tmp_path / "out").values()} == {"a", "b", "c", "d", "two"}
    assert (done.listed, done.accepted) == (13, 6)


def test_a_tile_size_that_a_partner_cannot_share_is_said(tmp_path, prepare_folder, cells):
    root = tmp_path / "in"
    (root / "low").mkdir(parents=True)
    tifffile.imwrite(root / "a.tif", cells((64, 64)))
    tifffile.imwrite(root / "low" / "a.tif", cells((16, 16)))
    with pytest.raises(UserError, match=r"low/a\.tif: tiles of 30 pixels do not divide by its scale, 4; choose"):
        prepare_folder(root, tmp_path / "out", tile_size=30, partners=[("super_resolution", "low/(.*)", r"\1")])


def test_constant_channels_and_tiles_are_left_out_and_named(tmp_path, prepare_folder, read_tiles, cells):
    (tmp_path / "in" / "noisy").mkdir(parents=True)
    green = np.zeros((64, 32, 3), np.uint8)
    green[:, :, 1] = cells((64, 32), "uint8", 255)
    green[32:, :, 1] = 200
    cv2.imwrite(str(tmp_path / "in" / "green.png"), green)
    noisy = cells((64, 32, 3), "uint8", 255)
    noisy[..., 0] = 9  # the last channel: OpenCV's order is BGR
    cv2.imwrite(str(tmp_path / "in" / "noisy" / "green.png"), noisy)
    red = green.copy()
    red[..., 2] = cells((64, 32), "uint8", 255)
    cv2.imwrite(str(tmp_path / "in" / "red.png"), red)
    noisy[..., 1] = 4
    cv2.imwrite(str(tmp_path / "in" / "noisy" / "red.png"), noisy)
    done = prepare_folder(tmp_path / "in", tmp_path / "out", partners=[("denoising", "noisy/(.*)", r"\1")])
    tiles = read_tiles(tmp_path / "out")
    assert list(tiles) == [
        "green_c1_y00000_x00000", "red_c0_y00000_x00000", "red_c0_y00032_x00000", "red_c1_y00000_x00000",
    ]  # fmt: skip
    pairs = read_tiles(tmp_path / "out", "degraded")
    assert [tile.row["pair_id"] for tile in pairs.values()] == list(tiles)[:3]
    rows = listed(done.folders["cells"])
    constant = [(row["id"], row["path"], re.split(":|,", row["reason"])[0]) for row in rows]
    assert constant == [
        ("", "green.png", "channel 0 is constant"),
        ("", "green.png", "channel 2 is constant"),
        ("", "noisy/green.png", "channel 2 is constant"),
        ("", "noisy/red.png", "channel 1 is constant"),
        ("", "noisy/red.png", "channel 2 is constant"),
        ("", "red.png", "channel 2 is constant"),
        ("green_c1_y00032_x00000", "green.png", "constant tile"),
        ("red_c1_y00032_x00000", "red.png", "constant tile"),
    ]
    assert (done.left_out, done.rejected) == (2, [])


def test_a_refused_overwrite_leaves_the_prepared_data_as_they_are(tmp_path, source, prepare_folder, tree, cells):
    done = prepare_folder(source, tmp_path / "out")
    before = tree(done.folders["cells"])
    with pytest.raises(UserError, match="found a prepared data set, expected none of that name; pass --overwrite"):
        prepare_folder(source, tmp_path / "out")
    spoil(source, cells)
    with pytest.raises(UserError, match=r"12 of 18.*all in .*\.cells\.rejected\.csv"):
        prepare_folder(source, tmp_path / "out", overwrite=True)
    assert tree(done.folders["cells"]) == before
    assert len((tmp_path / "out" / ".cells.rejected.csv").read_text().splitlines()) == 1 + 12


@pytest.mark.parametrize("old", [False, True])
def test_a_job_that_fails_midway_shows_nothing_and_keeps_the_old(tmp_path, source, prepare_folder, tree, cells, old):
    if old:
        prepare_folder(source, tmp_path / "out", tile_size=16)
    before = tree(tmp_path / "out")
    for i in range(30):
        tifffile.imwrite(source / f"more{i}.tif", cells((64, 64)))

    def lose_an_image(stage, done, total):
        if stage == "writing tiles" and done == 0:
            (source / "more9.tif").unlink()

    with pytest.raises(UserError, match=r"more9\.tif: no such image file"):
        prepare_folder(source, tmp_path / "out", tile_size=16, overwrite=True, report=lose_an_image)
    assert tree(tmp_path / "out") == before
    if not old:
        prepare_folder(source, tmp_path / "out")
        assert len(load_manifest(tmp_path / "out")) > 0


def test_overwriting_replaces_images_and_partners_and_leaves_no_old_tile(tmp_path, prepare_folder, tree, cells):
    for kind in ("clean", "noisy"):
        (tmp_path / "in" / kind).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "in" / kind / "a.tif", cells((64, 64)))
    rules = [("denoising", "noisy/(.*)", r"clean/\1")]
    prepare_folder(tmp_path / "in", tmp_path / "out", partners=rules)
    first = tree(tmp_path / "out")
    prepare_folder(tmp_path / "in", tmp_path / "out", partners=rules, tile_size=64, overwrite=True)
    names = {name for name in tree(tmp_path / "out") if name.endswith(".png")}
    assert names == {
        "foundation/cells/images/clean__a_c0_y00000_x00000.png",
        "degraded/cells/images/noisy__a_c0_y00000_x00000.png",
    }
    prepare_folder(tmp_path / "in", tmp_path / "out", partners=rules, overwrite=True)
    assert tree(tmp_path / "out") == first
    shutil.rmtree(tmp_path / "in" / "noisy")
    prepare_folder(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "degraded" / "cells").exists()


def test_tiles_of_a_killed_run_do_not_come_back(tmp_path, source, prepare_folder, tree):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    name = f".prepare-{safe_name(socket.gethostname())}-{ended.stdout.strip()}"
    left = tmp_path / "out" / name / "foundation" / "cells" / "images" / "old.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a tile")
    prepare_folder(source, tmp_path / "out")
    assert not any("old" in name or ".prepare" in name for name in tree(tmp_path / "out"))


def test_a_data_set_that_another_job_made_meanwhile_is_not_replaced(tmp_path, source, prepare_folder):
    other = tmp_path / "out" / "foundation" / "cells" / "manifests" / "manifest.csv"

    def report(stage, done, total):
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("of another job")

    with pytest.raises(UserError, match="found a prepared data set"):
        prepare_folder(source, tmp_path / "out", report=report)
    assert other.read_text() == "of another job"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["foundation"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"root": "nowhere"}, "nowhere: no such folder"),
        ({"root": "void"}, "void: found no image"),
        ({"out": "in/out"}, "lie in each other"),
        ({"out": "."}, "lie in each other"),
        ({"dataset": "../up"}, r"--dataset '\.\./up'"),
        ({"dataset": ""}, "--dataset ''"),
        ({"dataset": "mine"}, r"mine: found a folder that is no prepared data set.*notes\.txt"),
        ({"tile_size": 0}, "--tile-size 0"),
        ({"overlap": 32}, "--overlap 32: expected 0 to 31"),
        ({"min_content": 1.5}, "--min-content 1.5"),
        ({"percentiles": (99.0, 1.0)}, "--percentiles 99.0 1.0"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"val_fraction": 0.5, "test_fraction": 0.4, "group": "good"}, "nothing in grey"),
        ({"max_rejected": -1}, "--max-rejected -1"),
        ({"channels": (7,)}, "expected also number 7 .from 0.; correct --channels"),
        ({"tile_size": 65, "max_rejected": 99}, "smaller than a tile of 65"),
        ({"min_content": 1.0}, "none of its tiles can be used.*lower --min-content"),
    ],
)
def test_wrong_settings_are_refused_and_write_no_tile(tmp_path, source, prepare_folder, change, found):
    (tmp_path / "void").mkdir()
    mine = tmp_path / "out" / "foundation" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep")
    out = tmp_path / change.pop("out", "out")
    if out == tmp_path:  # <tmp>/foundation is the source of this case
        source = shutil.move(source, tmp_path / "foundation" / "new")
    root = tmp_path / change.pop("root") if "root" in change else source
    with pytest.raises(UserError, match=found):
        prepare_folder(root, out, **({"dataset": "new"} | change))
    assert (mine / "notes.txt").read_text() == "keep"
    assert not list(tmp_path.rglob(".prepare*"))
    assert not list(tmp_path.rglob("*y0*_x0*"))


def test_the_first_data_set_stays_out_when_another_of_the_release_fails(tmp_path, ray_cluster, cells):
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", cells((32, 32)))
    low = np.full((32, 32), 10, np.uint16)
    low[0, 0] = 4000
    tifffile.imwrite(tmp_path / "b.tif", low)
    images = [SourceImage("a.tif", "first", group="a"), SourceImage("b.tif", "second", group="b")]
    settings = Settings(Cutting(32, min_content=0.01), val_fraction=0.0)
    with pytest.raises(UserError, match=re.escape("second: none of its tiles can be used")):
        prepare(Collection(tmp_path, images), tmp_path.with_name(tmp_path.name + "_out"), settings)
    assert not list(tmp_path.with_name(tmp_path.name + "_out").rglob("*"))


def test_a_partner_of_another_type_needs_a_fit(tmp_path, prepare_folder, read_tiles, cells):
    clean = cells((64, 64), "uint16", 4000)
    for name, pixels in (("clean", clean), ("noisy", (clean // 257).astype(np.uint8))):
        (tmp_path / "in" / name).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "in" / name / "a.tif", pixels)
    rules = [("denoising", "noisy/(.*)", r"clean/\1")]
    with pytest.raises(UserError, match=r"uint8 pixels cannot be on the scale.*uint16; pass --partner-intensity fit"):
        prepare_folder(tmp_path / "in", tmp_path / "out", partners=rules)
    prepare_folder(tmp_path / "in", tmp_path / "fitted", partners=rules, fit_partners=True)
    clean, noisy = (read_tiles(tmp_path / "fitted", kind) for kind in ("foundation", "degraded"))
    assert len(noisy) == len(clean) == 4


@pytest.mark.parametrize("which", ["clean", "noisy"])
def test_an_image_that_changes_while_it_is_prepared_stops_the_job(tmp_path, prepare_folder, cells, which):
    for name in ("clean", "noisy"):
        (tmp_path / "in" / name).mkdir(parents=True)
        tifffile.imwrite(tmp_path / "in" / name / "a.tif", cells((64, 64)))

    def report(stage, done, total):
        if stage == "writing tiles" and done == 0:
            tifffile.imwrite(tmp_path / "in" / which / "a.tif", cells((40, 64)))

    rules = [("denoising", "noisy/(.*)", r"clean/\1")]
    with pytest.raises(UserError, match=rf"{which}/a\.tif was written while it was prepared"):
        prepare_folder(tmp_path / "in", tmp_path / "out", partners=rules, report=report)
    assert not (tmp_path / "out" / "foundation" / "cells").exists()


def test_a_name_that_no_text_file_can_hold_is_rejected(tmp_path, source, prepare_folder):
    shutil.copy(source / "good0.tif", os.fsencode(source) + b"/caf\xe9.tif")
    done = prepare_folder(source, tmp_path / "out", max_rejected=1)
    assert [row.reason for row in done.rejected] == ["its name is not UTF-8; rename it"]
    assert done.accepted + len(done.rejected) == done.listed == 7
    assert "caf\\udce9.tif" in (tmp_path / "out" / "foundation" / "cells" / "rejected.csv").read_text()
