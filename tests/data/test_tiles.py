"""A unit image survives the way to a tile file and back; what breaks the tiles' convention is named, not read."""

import hashlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ray_pipeline.data.images import from_unit, to_unit
from ray_pipeline.data.tiles import read_tile, write_tile
from ray_pipeline.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def random_pixels(rng, shape, dtype):
    if np.dtype(dtype).kind == "f":
        return rng.normal(500.0, 2000.0, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_tile_gives_back_the_source_within_one_quantisation_step(tmp_path, rng, dtype):
    source = random_pixels(rng, (40, 48), dtype)
    lo, hi = float(source.min()), float(source.max())
    write_tile(tmp_path / "tile.png", to_unit(source, lo, hi))
    back = from_unit((read_tile(tmp_path / "tile.png") + 1) / 2, lo, hi, dtype)
    assert back.dtype == source.dtype
    step = max((hi - lo) / 65535, 1.0 if source.dtype.kind in "iu" else 0.0)
    assert np.abs(back.astype(np.float64) - source).max() <= step
    if dtype == "uint8":
        np.testing.assert_array_equal(back, source)


def test_the_tile_file_holds_the_unit_image_in_16_bit_and_its_hash_is_returned(tmp_path, rng):
    unit = rng.random((16, 24)).astype(np.float32) * 1.4 - 0.2
    digest = write_tile(tmp_path / "sub" / "a.png", unit)
    stored = np.asarray(Image.open(tmp_path / "sub" / "a.png"))
    np.testing.assert_array_equal(stored, np.rint(np.clip(unit, 0, 1).astype(np.float64) * 65535))
    assert digest == hashlib.sha256((tmp_path / "sub" / "a.png").read_bytes()).hexdigest()
    assert digest == write_tile(tmp_path / "b.png", unit)
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["a.png"]


def test_a_tile_with_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        write_tile(tmp_path / "a.png", np.full((4, 4), np.nan))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "top"), [("uint8", 255), ("uint16", 65535)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_and_16_bit_tiles_span_minus_one_to_one(tmp_path, dtype, top, suffix):
    ramp = np.linspace(0, top, 64).astype(dtype).reshape(8, 8)
    path = tmp_path / f"ramp.{suffix}"
    cv2.imwrite(str(path), ramp) if suffix == "png" else tifffile.imwrite(path, ramp)
    tile = read_tile(path)
    assert tile.dtype == np.float32
    np.testing.assert_allclose(tile, ramp.astype(np.float64) / top * 2 - 1, atol=1e-6)
    assert abs(tile).max() <= 1.0


def test_array_tiles_are_read_as_they_are(tmp_path, rng):
    tile = rng.uniform(-1, 1, (8, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", tile)
    np.savez(tmp_path / "b.npz", tile=tile[None])
    np.testing.assert_array_equal(read_tile(tmp_path / "a.npy"), tile)
    np.testing.assert_array_equal(read_tile(tmp_path / "b.npz"), tile)


@pytest.mark.parametrize(
    ("name", "array", "found"),
    [
        ("range.npy", np.full((4, 4), 1.5, np.float32), "expected tile values in"),
        ("nan.npy", np.full((4, 4), np.nan, np.float32), "expected tile values in"),
        ("integer.npy", np.zeros((4, 4), np.int32), "expected a float tile"),
        ("channels.npy", np.zeros((3, 4, 4), np.float32), "expected a float tile"),
        ("float.tif", np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), "8 or 16 bit"),
        ("rgb.png", np.zeros((4, 4, 3), np.uint8), r"3 channel\(s\)"),
        ("broken.npz", None, "unreadable"),
        ("gone.npy", None, "unreadable"),
        ("gone.png", None, "no such image"),
    ],
)
def test_a_tile_that_breaks_the_convention_is_named(tmp_path, name, array, found):
    path = tmp_path / name
    if name == "broken.npz":
        path.write_bytes(b"PK\x03\x04 broken")
    elif array is not None:
        if path.suffix == ".npy":
            np.save(path, array)
        elif path.suffix == ".tif":
            tifffile.imwrite(path, array)
        else:
            cv2.imwrite(str(path), array)
    with pytest.raises(UserError, match=rf"{name}.*{found}"):
        read_tile(path)
