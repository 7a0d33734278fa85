"""Every kind of bad tile, partner and manifest is told in one sentence: before any is opened where that can be known,
else as the reason of a tile that is left out."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile

from ray_pipeline.data.listing import list_tiles
from ray_pipeline.data.rejected import Rejected
from ray_pipeline.data.tile_reader import Request, TileReader
from ray_pipeline.data.tiles import write_tile
from ray_pipeline.errors import UserError
from ray_pipeline.sections import PAIRED_TYPES

ROW = 2  # of the training split: the one that is spoilt
COLUMNS = ("latent", *(f"hint.{hint}" for hint in PAIRED_TYPES))
TRAIN, PARTNERS = "foundation/simulated/manifests/train", "degraded/simulated/manifests/manifest"
Spoil = Callable[[Path], None]


def edit(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame | None], manifest: str = TRAIN) -> None:
    csv = root / f"{manifest}.csv"
    table = pd.read_csv(csv, dtype=str, keep_default_na=False)
    changed = change(table)
    (table if changed is None else changed).to_csv(csv, index=False)


def setting(column: str, value: str, manifest: str = TRAIN) -> Spoil:
    """Writes a value into the spoilt row of a manifest; of a partner's manifest into the row of that tile."""

    def spoil(root: Path) -> None:
        tile = pd.read_csv(root / f"{TRAIN}.csv", dtype=str)["id"][ROW]

        def change(table: pd.DataFrame) -> None:
            key = "id" if manifest.startswith("foundation") else "pair_id"
            table.loc[(table[key] == tile) & (table.get("task") != "super_resolution"), column] = value

        edit(root, change, manifest)

    return spoil


def path_of(root: Path, kind: str) -> Path:
    """File of the spoilt tile, or of its partner of this kind."""
    tile = pd.read_csv(root / f"{TRAIN}.csv", dtype=str)["id"][ROW]
    if kind == "tile":
        return root / "foundation/simulated/images" / f"{tile}.png"
    return root / "degraded/simulated/images" / f"{tile}_{kind}.png"


def file(change: Callable[[Path], object], kind: str = "tile") -> Spoil:
    return lambda root: change(path_of(root, kind))


def other_file(suffix: str, write: Callable[[Path], object]) -> Spoil:
    """The tile's row points to a new file."""

    def spoil(root: Path) -> None:
        write(root / f"foundation/simulated/images/new{suffix}")
        setting("image", f"images/new{suffix}")(root)

    return spoil


def array(values, **more) -> Spoil:
    return other_file(".npz", lambda path: np.savez(path, tile=np.asarray(values), **more))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def with_one(value: float) -> np.ndarray:
    tile = noise(64, 64)
    tile[3, 5] = value
    return tile


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def stack(path: Path) -> None:
    tifffile.imwrite(path, np.zeros((5, 64, 64), np.uint8), metadata={"axes": "ZYX"})


def pickled(path: Path) -> None:
    np.save(path, np.array([{"pixels": 1}], dtype=object), allow_pickle=True)


@pytest.fixture
def root(copy_of_data) -> Path:
    return copy_of_data


@pytest.mark.parametrize(
    ("spoil", "kind", "reason"),
    [
        (file(Path.unlink), "tile", "no such file"),
        (file(lambda path: path.write_bytes(b"")), "tile", "the file is empty"),
        (setting("width", "128"), "tile", "its width is 128 pixels, expected 64"),
        (setting("height", "32"), "tile", "its height is 32 pixels, expected 64"),
        (file(Path.unlink, "denoising"), "denoising", "the denoising partner is missing"),
        (
            file(lambda path: path.write_bytes(b""), "super_resolution"),
            "super_resolution",
            "the super_resolution partner is empty",
        ),
        (
            setting("height", "32", PARTNERS),
            "denoising",
            "the denoising partner of 32x64 px does not fit a tile of 64 px",
        ),
        (
            setting("width", "0", PARTNERS),
            "denoising",
            "the denoising partner of 64x0 px does not fit a tile of 64 px",
        ),
    ],
)
def test_what_is_known_beforehand_stops_the_listing_or_is_left_out_of_it(root, job_for, spoil, kind, reason):
    before = list_tiles(job_for(root))
    spoil(root)
    path = path_of(root, kind).relative_to(root)
    with pytest.raises(UserError) as error:
        list_tiles(job_for(root))
    assert f"1 of 32 tiles cannot be used, more than data.max_rejected 0 ({path}: {reason})" in str(error.value)
    assert str(error.value).endswith("or set data.max_rejected=1")
    listing = list_tiles(job_for(root, max_rejected=1))
    (found,) = listing.rejected
    assert (found.id, found.path, found.reason) == (before.rows["train"][ROW].id, str(path), reason)
    assert listing.rows["train"] == before.rows["train"][:ROW] + before.rows["train"][ROW + 1 :]
    assert listing.datasets["train"][0].count == 23
    assert listing.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("height", "width", "fits"),
    [(16, 16, True), (64, 64, True), (24, 24, False), (16, 32, False), (0, 0, False), (-8, -8, False)],
)
def test_a_low_resolution_partner_must_divide_its_tile(root, job_for, height, width, fits):
    def change(table: pd.DataFrame) -> None:
        table.loc[table["task"] == "super_resolution", ["height", "width"]] = [str(height), str(width)]

    edit(root, change, PARTNERS)
    if fits:
        assert list_tiles(job_for(root)).rejected == ()
        return
    with pytest.raises(
        UserError, match=rf"32 of 32 tiles.*partner of {height}x{width} px does not fit a tile of 64 px"
    ):
        list_tiles(job_for(root))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (file(cut), "found a truncated PNG"),
        (file(flip), "found a damaged PNG"),
        (file(lambda path: path.write_text("<html>Not Found</html>")), "expected a PNG image, found other content"),
        (
            file(lambda path: cv2.imwrite(str(path), (255 * (noise(64, 64, 3) > 0)).astype(np.uint8))),
            "expected a tile of one channel in 8 or 16 bit, found 3 channel(s) or planes of uint8",
        ),
        (file(lambda path: write_tile(path, (noise(32, 48) + 1) / 2)), "found 32x48 px, but data.tile_size is 64"),
        (file(lambda path: write_tile(path, (noise(128, 128) + 1) / 2)), "found 128x128 px, but data.tile_size is 64"),
        (file(lambda path: write_tile(path, np.zeros((64, 64)))), "found a constant tile, every pixel is -1 of"),
        (file(lambda path: write_tile(path, np.ones((64, 64)))), "found a constant tile, every pixel is 1 of -1 to 1"),
        (
            other_file(".tif", lambda path: tifffile.imwrite(path, noise(64, 64))),
            "expected a tile of one channel in 8 or 16 bit, found 1 channel(s) or planes of float32",
        ),
        (
            other_file(".tif", stack),
            "expected a tile of one channel in 8 or 16 bit, found 5 channel(s)",
        ),
        (other_file(".tif", lambda path: path.write_bytes(b"II*\0" + bytes(20))), ""),
        (other_file(".jpg", lambda path: path.write_bytes(b"\xff\xd8")), "expected a TIFF or PNG image"),
        (array(with_one(np.nan)), "expected tile values in [-1, 1], found NaN or infinite ones"),
        (array(with_one(np.inf)), "expected tile values in [-1, 1], found NaN or infinite ones"),
        (array(with_one(1.5)), "expected tile values in [-1, 1], found -0.9996 to 1.5"),
        (array(np.rint(65535 * np.abs(noise(64, 64)))), "expected tile values in [-1, 1], found"),
        (array(np.zeros((64, 64), np.uint16)), "expected a float tile of shape (H, W), found uint16 (64, 64)"),
        (array(noise(2, 64, 64)), "expected a float tile of shape (H, W), found float32 (2, 64, 64)"),
        (array(noise(64, 32)), "found 64x32 px, but data.tile_size is 64"),
        (array(noise(64, 64), mask=np.zeros(3)), "expected one array in the archive, found 2 (tile, mask); keep one"),
        (other_file(".npy", pickled), "expected a NumPy array, found an unreadable file"),
        (other_file(".npz", lambda path: path.write_bytes(b"PK\x03\x04")), "expected a NumPy array, found an unre"),
        (file(cut, "denoising"), "found a truncated PNG"),
        (
            file(lambda path: write_tile(path, (noise(32, 32) + 1) / 2), "denoising"),
            "a noisy partner of 32x32 px belongs to a tile of 64x64 px; both must have one size, check pair_id",
        ),
        (
            file(lambda path: write_tile(path, (noise(24, 24) + 1) / 2), "super_resolution"),
            "a low-resolution partner of 24x24 px does not divide its tile of 64x64 px; check pair_id",
        ),
    ],
)  # fmt: skip
def test_what_is_found_when_a_tile_is_read_is_the_reason_that_it_is_left_out(root, job_for, spoil, reason):
    spoil(root)
    job = job_for(root, *PAIRED_TYPES)
    rows = list_tiles(job).rows["train"]
    reader = TileReader(job)
    found = reader.images(Request(rows[ROW], (0, 1), COLUMNS))
    assert isinstance(found, Rejected)
    assert found.id == rows[ROW].id
    assert found.reason.startswith(reason)
    assert "\n" not in found.reason
    assert Path(job.root, found.path).is_file()
    assert found.path in (rows[ROW].path, *(path for paths in rows[ROW].partners.values() for path in paths))
    for other in (ROW - 1, ROW + 1):
        assert isinstance(reader.images(Request(rows[other], (0, 1), COLUMNS)), list)


def link_outside(root: Path) -> None:
    path = path_of(root, "tile")
    os.replace(path, root.parent / "elsewhere.png")
    path.symlink_to(root.parent / "elsewhere.png")


def twice(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table[ROW : ROW + 1]])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: edit(root, twice), "train.csv: found 1 ids more than once ("),
        (setting("image", "/images/a.png"), "found image path /images/a.png, expected a path below"),
        (setting("image", "images/../../a.png"), "found image path images/../../a.png, expected a path below"),
        (setting("image", "C:\\images\\a.png"), "found image path C:\\images\\a.png, expected a path below"),
        (setting("image", ""), "train.csv: found no image in line 4, expected one in each row; fill it in"),
        (setting("id", " "), "train.csv: found no id in line 4, expected one in each row; fill it in"),
        (link_outside, ".png, a link to"),
        (lambda root: edit(root, lambda table: table.drop(columns="id")), "expected also id; add them"),
        (lambda root: edit(root, lambda table: table.drop(columns="image")), "expected also image; add them"),
        (setting("um_pixel", "0,05 um"), "train.csv: column um_pixel expects numbers, found: Unable to parse string"),
        (setting("width", "64 px"), "train.csv: column width expects numbers"),
        (
            lambda root: (root / f"{TRAIN}.csv").write_bytes(b"\xff\xfe\x00id\n\x00\x01\n"),
            "train.csv: expected a CSV manifest, found: ",
        ),
        (lambda root: (root / f"{TRAIN}.csv").unlink(), "train.csv: no such manifest"),
        (
            lambda root: (root / f"{TRAIN}.csv").write_bytes(b""),
            "train.csv: expected a CSV manifest, found: No columns to parse from file",
        ),
        (lambda root: edit(root, lambda table: table[:0]), "has no tile in split train; prepare the data with both"),
        (setting("pair_id", "", PARTNERS), "found rows without pair_id, expected the id of the foundation tile"),
        (
            lambda root: edit(root, lambda table: table.drop(columns="task"), PARTNERS),
            "has no column task; add it with super_resolution or denoising or depth in each row",
        ),
        (setting("image", "../images/a.png", PARTNERS), "found image path ../images/a.png, expected a path below"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_meant_stops_the_listing_whatever_may_be_left_out(root, job_for, spoil, said):
    spoil(root)
    with pytest.raises(UserError) as error:
        list_tiles(job_for(root, max_rejected=1000))
    assert said in str(error.value)
    assert "\n" not in str(error.value)
