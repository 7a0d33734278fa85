"""The embedded sample data set: exactness, pairing, splits and the look of its files."""

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from ray_pipeline.data.manifest import COLUMNS, check_tiles, load_manifest, load_pairs
from ray_pipeline.data.optics import upsample
from ray_pipeline.data.sources.microscope import CAMERA_OFFSET
from ray_pipeline.data.sources.simulate import DEGRADATIONS, STAINS, simulate
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.errors import UserError

SMALL = {"field_size": 128, "tile_size": 64, "fields": 8, "seed": 11}
ONE_EACH = {**SMALL, "fields": len(STAINS)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def one_each(tmp_path_factory):
    """A smaller data set: one field of each stain."""
    folder = tmp_path_factory.mktemp("one_each")
    simulate(folder, **ONE_EACH)
    return folder


def all_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unit(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.float32) / 65535


def field_of(tile_id: str) -> str:
    return tile_id.rsplit("_y", 1)[0]


def tiles_of(root: Path):
    manifest = load_manifest(root)
    return [(row, manifest.path(i)) for i, row in enumerate(manifest.table.itertuples())]


def test_two_workers_write_the_bytes_that_one_writes(one_each, tmp_path):
    simulate(tmp_path, **ONE_EACH, workers=2)
    assert all_files(tmp_path) == all_files(one_each)


def test_another_seed_writes_other_pixels(one_each, tmp_path):
    simulate(tmp_path, **{**ONE_EACH, "seed": 12})
    theirs = {row.id: row.sha256 for row, _ in tiles_of(one_each)}
    ours = {row.id: row.sha256 for row, _ in tiles_of(tmp_path)}
    assert not set(ours.values()) & set(theirs.values())


def test_a_field_does_not_depend_on_how_many_fields_there_are(root, one_each):
    theirs = {row.id: row.sha256 for row, _ in tiles_of(root)}
    assert all(theirs[row.id] == row.sha256 for row, _ in tiles_of(one_each))


def test_no_two_tiles_are_copies(root):
    hashes = [row.sha256 for row, _ in tiles_of(root)]
    assert len(set(hashes)) == len(hashes) == 8 * 4


def test_the_tiles_of_a_field_stay_in_one_split_with_their_partners(root):
    splits = {split: load_manifest(root, split).table for split in ("train", "val")}
    fields = {split: set(table["id"].map(field_of)) for split, table in splits.items()}
    assert fields["train"]
    assert fields["val"]
    assert not fields["train"] & fields["val"]
    assert all((table["id"].map(field_of).value_counts() == 4).all() for table in splits.values())
    for split, table in splits.items():
        partners = pd.read_csv(root / "degraded" / "simulated" / "manifests" / f"{split}.csv")
        assert set(partners["pair_id"]) == set(table["id"])


def test_tiles_are_the_pieces_of_their_field(one_each, tmp_path):
    simulate(tmp_path, **{**ONE_EACH, "tile_size": 128})
    whole = {field_of(row.id): unit(path) for row, path in tiles_of(tmp_path)}
    for row, path in tiles_of(one_each):
        y, x = int(row.y0), int(row.x0)
        np.testing.assert_array_equal(unit(path), whole[field_of(row.id)][y : y + 64, x : x + 64])


def test_each_stain_is_there_and_every_column_is_filled(root):
    table = load_manifest(root).table
    assert list(table.columns) == list(COLUMNS)
    assert set(table["marker"]) == set(STAINS)
    pairs = load_pairs(root, "simulated")
    filled = [name for name in COLUMNS if name != "pair_id"]
    for frame in (table[filled], pairs[list(COLUMNS)]):
        assert not frame.isna().any().any()
        assert not (frame.astype(str) == "").any().any()
    assert set(table["dtype"]) == {"uint16"}
    check_tiles(load_manifest(root))


def test_the_camera_is_the_same_for_all_fields_of_a_stain(root):
    table = load_manifest(root).table
    cameras = table.groupby("marker")[["norm_lo", "norm_hi"]].nunique()
    assert (cameras == 1).all().all()
    assert (table["norm_lo"].astype(float) < CAMERA_OFFSET).all()


def test_manifest_hashes_are_those_of_the_files(root):
    for row, path in tiles_of(root)[:6]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row.sha256


def test_foundation_tiles_use_the_depth_of_16_bit(root):
    for _, path in tiles_of(root):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert pixels.dtype == np.uint16
        assert len(np.unique(pixels)) > 256
        assert pixels.min() > 0
        assert read_tile(path).shape == (64, 64)


def best_shift(moving, fixed, reach=3):
    """Integer shift (dy, dx) of `moving` with the highest correlation with `fixed`, and that correlation."""
    inner = (slice(reach, -reach),) * 2
    scores = {
        (dy, dx): np.corrcoef(np.roll(moving, (dy, dx), (0, 1))[inner].ravel(), fixed[inner].ravel())[0, 1]
        for dy in range(-reach, reach + 1)
        for dx in range(-reach, reach + 1)
    }
    best = max(scores, key=scores.get)
    return best, scores[best]


def test_partners_lie_on_their_foundation_tile(root):
    paths = {row.id: path for row, path in tiles_of(root)}
    pairs = load_pairs(root, "simulated")
    assert set(pairs["task"]) == set(DEGRADATIONS)
    shifts = {task: [] for task in DEGRADATIONS}
    for row in pairs.to_dict("records"):
        clean = unit(paths[row["pair_id"]])
        partner = unit(root / "degraded" / "simulated" / row["image"])
        scale = int(row["scale"])
        assert partner.shape == (64 // scale, 64 // scale) == (int(row["height"]), int(row["width"]))
        if clean.std() < 0.06:
            continue  # too little structure in the tile for its shift to be measured through the noise
        partner = upsample(partner, scale) if scale > 1 else cv2.GaussianBlur(partner, (0, 0), 1)
        shift, correlation = best_shift(partner, clean)
        # Sixteen noisy points a side do not fix a shift better than to half a low-resolution pixel.
        assert max(np.abs(shift)) <= scale // 2, row["id"]
        assert correlation > 0.4, row["id"]
        shifts[row["task"]].append(shift)
    assert min(len(found) for found in shifts.values()) >= 4
    assert all(tuple(np.median(found, axis=0)) == (0, 0) for found in shifts.values())


def test_the_denoising_partner_is_far_noisier_than_its_foundation_tile(root):
    paths = {row.id: path for row, path in tiles_of(root)}
    pairs = load_pairs(root, "simulated")
    for row in pairs[pairs["task"] == "denoising"].to_dict("records"):
        partner = unit(root / "degraded" / "simulated" / row["image"])
        difference = (partner - unit(paths[row["pair_id"]])).std()
        values = dict(part.split("=") for part in row["degradation"].split() if "=" in part)
        mean = unit(paths[row["pair_id"]]).mean() - float(values["dark"])
        expected = np.sqrt(float(values["a"]) * mean + float(values["b"]))
        assert difference == pytest.approx(expected, rel=0.25)
        assert 0.002 <= float(values["a"]) <= 0.08
        assert 0 <= float(values["b"]) <= 0.01
        assert int(row["averages"]) == 1


def test_the_same_request_again_writes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    again = simulate(root, **SMALL)
    assert again.reused
    assert again.tiles == {"train": 28, "val": 4, "test": 0}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == before


def test_another_request_is_refused_and_changes_nothing(root):
    before = all_files(root)
    with pytest.raises(UserError, match=r"manifest\.csv holds .* another request"):
        simulate(root, **{**SMALL, "seed": 12})
    assert all_files(root) == before


def test_a_foreign_data_set_of_that_name_is_refused(tmp_path):
    manifests = tmp_path / "foundation" / "simulated" / "manifests"
    manifests.mkdir(parents=True)
    (manifests / "manifest.csv").write_text("id,image\nx,images/x.png\n")
    with pytest.raises(UserError, match="another request"):
        simulate(tmp_path, **SMALL)


def test_an_interrupted_run_does_not_look_finished_and_is_completed(one_each, tmp_path):
    class Stopped(Exception):
        pass

    def stop_at_two(done, total):
        assert total == ONE_EACH["fields"]
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        simulate(tmp_path, **ONE_EACH, progress=stop_at_two)
    assert list(tmp_path.rglob("*.png"))
    with pytest.raises(UserError):
        load_manifest(tmp_path)
    assert not simulate(tmp_path, **ONE_EACH).reused
    assert all_files(tmp_path) == all_files(one_each)


def test_partners_of_another_data_set_are_not_overwritten(tmp_path):
    manifests = tmp_path / "degraded" / "simulated" / "manifests"
    manifests.mkdir(parents=True)
    (manifests / "manifest.csv").write_text("id,image\nx,images/x.png\n")
    with pytest.raises(UserError, match="degraded"):
        simulate(tmp_path, **SMALL)
    assert not (tmp_path / "foundation").exists()


def test_an_interrupted_request_does_not_bind_the_next_one(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, **SMALL, progress=stop)
    simulate(tmp_path, **{**SMALL, "seed": 12, "fields": 2})
    assert len(load_manifest(tmp_path)) == 2 * 4


def test_the_request_stands_beside_the_manifests(root):
    record = json.loads((root / "foundation" / "simulated" / "manifests" / "simulate.json").read_text())
    assert record["seed"] == SMALL["seed"]
    assert record["degradations"] == list(DEGRADATIONS)


def test_only_the_wanted_partners_are_written(tmp_path):
    summary = simulate(tmp_path, **{**SMALL, "fields": 2}, degradations=("denoising",), dataset="mine")
    assert summary.partners == {"denoising": {"train": 4, "val": 4, "test": 0}}
    assert set(load_pairs(tmp_path, "mine")["task"]) == {"denoising"}
    simulate(tmp_path / "bare", **{**SMALL, "fields": 1}, degradations=())
    assert not (tmp_path / "bare" / "degraded").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tile_size": 48}, "tile_size 48"),
        ({"scale": 3}, "scale 3"),
        ({"fields": 0}, "fields 0"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
        ({"degradations": ("deblur",)}, "deblur"),
        ({"dataset": "../elsewhere"}, "elsewhere"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        simulate(tmp_path, **{**SMALL, **change})
    assert not list(tmp_path.iterdir())
