"""Pixels survive the way from a file to a tile and back, and damaged files are named, not read."""

import hashlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ray_pipeline.data.images import from_unit, read_image, read_tile, to_unit, write_tile
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_way_to_store_channels_reads_the_same(tmp_path, rng, dtype):
    channels = random_pixels(rng, (2, 20, 30), dtype)
    last = np.moveaxis(channels, 0, -1)
    tifffile.imwrite(tmp_path / "cyx.tif", channels, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "yxc.tif", last, metadata={"axes": "YXC"})
    tifffile.imwrite(tmp_path / "imagej.tif", channels, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "x.ome.tif", channels, ome=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "unnamed.tif", channels)
    tifffile.imwrite(tmp_path / "unnamed_last.tif", last)
    tifffile.imwrite(tmp_path / "zlib.tif", channels, compression="zlib", metadata={"axes": "CYX"})
    for path in sorted(tmp_path.iterdir()):
        pixels = read_image(path).pixels
        assert pixels.dtype == channels.dtype, path.name
        np.testing.assert_array_equal(pixels, channels, err_msg=path.name)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_rgb_png_gives_red_green_blue(tmp_path, rng, dtype):
    rgb = random_pixels(rng, (10, 12, 3), dtype)
    cv2.imwrite(str(tmp_path / "rgb.png"), rgb[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png").pixels, rgb.transpose(2, 0, 1))


def test_alpha_is_no_channel(tmp_path, rng):
    grey = random_pixels(rng, (10, 12), "uint8")
    rgb = random_pixels(rng, (10, 12, 3), "uint8")
    Image.fromarray(np.dstack([grey, grey // 2]), "LA").save(tmp_path / "la.png")
    Image.fromarray(np.dstack([rgb, grey]), "RGBA").save(tmp_path / "rgba.png")
    tifffile.imwrite(tmp_path / "rgba.tif", np.dstack([rgb, grey]), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(tmp_path / "la.png").pixels, grey[None])
    for name in ("rgba.png", "rgba.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name).pixels, rgb.transpose(2, 0, 1))


def test_a_palette_tiff_keeps_its_intensities(tmp_path, rng):
    pixels = random_pixels(rng, (10, 12), "uint8")
    red = np.zeros((3, 256), np.uint16)
    red[0] = np.arange(256) * 257
    tifffile.imwrite(tmp_path / "red.tif", pixels, photometric="palette", colormap=red)
    np.testing.assert_array_equal(read_image(tmp_path / "red.tif").pixels, pixels[None])


@pytest.mark.parametrize(
    ("name", "options", "um_pixel"),
    [
        ("a.ome.tif", {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.25}}, 0.25),
        (
            "b.ome.tif",
            {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 65, "PhysicalSizeXUnit": "nm"}},
            0.065,
        ),
        ("c.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micron"}}, 0.25),
        ("d.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "\\u00B5m"}}, 0.25),
        ("e.tif", {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ("f.tif", {"resolution": (1e5, 1e5), "resolutionunit": "CENTIMETER"}, 0.1),
        ("g.tif", {"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ("h.tif", {}, None),
    ],
)
def test_pixel_size_comes_from_metadata_and_never_from_a_print_resolution(tmp_path, name, options, um_pixel):
    tifffile.imwrite(tmp_path / name, np.arange(256, dtype=np.uint8).reshape(16, 16), **options)
    found = read_image(tmp_path / name).um_pixel
    assert found == (None if um_pixel is None else pytest.approx(um_pixel))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}, {"compression": "zlib"}])
def test_a_truncated_tiff_is_refused_wherever_it_is_cut(tmp_path, rng, keep, options):
    path = tmp_path / "cut.tif"
    pixels = random_pixels(rng, (5, 32, 32), "uint16")
    tifffile.imwrite(path, pixels, metadata={"axes": "CYX"}, **options)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=r"cut\.tif: .*(truncated|unreadable)"):
        read_image(path)


def test_tifffile_is_silent_about_a_refused_file_and_speaks_about_a_good_one(tmp_path, rng, caplog):
    pixels = random_pixels(rng, (20, 30), "uint16")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, software="a microscope")
    with tifffile.TiffFile(path) as tiff:
        offset_field = tiff.pages[0].tags["Software"].offset + 8
    whole = bytearray(path.read_bytes())
    whole[offset_field : offset_field + 4] = b"\xff\xff\xff\x7f"  # the tag's text is lost, the pixels are not
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_image(path).pixels, pixels[None])
    assert {record.name for record in caplog.records} == {"tifffile"}
    caplog.clear()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"a\.tif"):
        read_image(path)
    assert caplog.records == []


def png_bytes(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def damaged(name, tmp_path):
    grey = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    good = png_bytes(grey)
    contents = {
        "half.png": good[: len(good) // 2],
        "tail.png": good[:-4],
        "flipped.png": good[:100] + bytes([good[100] ^ 1]) + good[101:],
        "text.png": b"not an image\n",
        "text.tif": b"not an image\n",
        "empty.png": b"",
        "empty.tif": b"",
        "photo.jpg": b"\xff\xd8",
    }
    path = tmp_path / name
    if name in contents:
        path.write_bytes(contents[name])
    elif name == "nan.tif":
        tifffile.imwrite(path, np.where(grey < 3, np.nan, grey).astype(np.float32))
    elif name == "infinite.tif":
        tifffile.imwrite(path, np.where(grey < 3, np.inf, grey).astype(np.float32))
    elif name == "complex.tif":
        tifffile.imwrite(path, grey.astype(np.complex64))
    elif name == "z.tif":
        tifffile.imwrite(path, np.stack([grey] * 3), imagej=True, metadata={"axes": "ZYX"})
    elif name == "t.ome.tif":
        tifffile.imwrite(path, np.stack([grey] * 3), ome=True, metadata={"axes": "TYX"})
    elif name == "pages.tif":
        tifffile.imwrite(path, np.stack([grey] * 9))
    elif name == "two.tif":
        with tifffile.TiffWriter(path) as writer:
            writer.write(grey)
            writer.write(grey[:32])
    return path


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("half.png", "truncated"),
        ("tail.png", "truncated"),
        ("flipped.png", "damaged"),
        ("text.png", "other content"),
        ("text.tif", "unreadable"),
        ("empty.png", "empty file"),
        ("empty.tif", "empty file"),
        ("photo.jpg", r"expected a TIFF or PNG image, found \.jpg"),
        ("gone.tif", "no such image"),
        ("nan.tif", "3 pixels that are NaN"),
        ("infinite.tif", "3 pixels that are NaN or infinite"),
        ("complex.tif", "complex64"),
        ("z.tif", "Z=3.*split the stack into 2-D files"),
        ("t.ome.tif", "T=3.*split the stack into 2-D files"),
        ("pages.tif", "Q=9.*split the stack into 2-D files"),
        ("two.tif", "2 image series"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(tmp_path, name, found):
    with pytest.raises(UserError, match=rf"{name}.*{found}"):
        read_image(damaged(name, tmp_path))


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
            path.write_bytes(png_bytes(array))
    with pytest.raises(UserError, match=rf"{name}.*{found}"):
        read_tile(path)
