"""PNG and NumPy images are read as they were written, and damaged files of every kind are named, not read."""

import io

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ray_pipeline.data.images import is_zarr, open_image
from ray_pipeline.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def random_pixels(rng, shape, dtype):
    if np.dtype(dtype).kind == "f":
        return rng.normal(500.0, 2000.0, shape).astype(dtype)
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def channels(path):
    """Planes (C, H, W) of an image with one depth and time."""
    image = open_image(path)
    assert image.sizes["T"] == image.sizes["Z"] == 1
    return np.stack([image.plane(0, c, 0) for c in range(image.sizes["C"])])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_rgb_png_gives_red_green_blue(tmp_path, rng, dtype):
    rgb = random_pixels(rng, (10, 12, 3), dtype)
    cv2.imwrite(str(tmp_path / "rgb.png"), rgb[..., ::-1])
    np.testing.assert_array_equal(channels(tmp_path / "rgb.png"), rgb.transpose(2, 0, 1))


def test_alpha_is_no_channel(tmp_path, rng):
    grey = random_pixels(rng, (10, 12), "uint8")
    rgb = random_pixels(rng, (10, 12, 3), "uint8")
    Image.fromarray(np.dstack([grey, grey // 2]), "LA").save(tmp_path / "la.png")
    Image.fromarray(np.dstack([rgb, grey]), "RGBA").save(tmp_path / "rgba.png")
    tifffile.imwrite(tmp_path / "rgba.tif", np.dstack([rgb, grey]), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(channels(tmp_path / "la.png"), grey[None])
    for name in ("rgba.png", "rgba.tif"):
        np.testing.assert_array_equal(channels(tmp_path / name), rgb.transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">u2", "uint32", "float16", "float32", "float64"])
def test_numpy_files_are_read_in_their_own_dtype(tmp_path, rng, dtype):
    pixels = rng.integers(0, 100, (2, 5, 8, 9)).astype(dtype)
    np.save(tmp_path / "a.npy", pixels)
    np.savez_compressed(tmp_path / "a.npz", image=pixels)
    for name in ("a.npy", "a.npz"):
        image = open_image(tmp_path / name, axes="TZYX")
        assert list(image.sizes.items()) == [("T", 2), ("C", 1), ("Z", 5), ("Y", 8), ("X", 9)]
        assert (image.um_pixel, image.channel_names) == (None, ("",))
        plane = image.plane(1, 0, 3)
        assert plane.dtype == image.dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(plane, pixels[1, 3])


def test_without_axes_a_short_axis_of_a_numpy_file_is_channels(tmp_path, rng):
    pixels = rng.integers(0, 99, (4, 8, 9)).astype(np.uint8)
    np.save(tmp_path / "first.npy", pixels)
    np.save(tmp_path / "last.npy", np.moveaxis(pixels, 0, -1))
    np.save(tmp_path / "flat.npy", pixels[0])
    np.testing.assert_array_equal(channels(tmp_path / "first.npy"), pixels)
    np.testing.assert_array_equal(channels(tmp_path / "last.npy"), pixels)
    np.testing.assert_array_equal(channels(tmp_path / "flat.npy"), pixels[:1])


def test_only_the_plane_that_is_asked_for_is_refused_for_its_values(tmp_path):
    stack = np.ones((3, 8, 8), np.float32)
    stack[1, 0, :5] = [np.nan, np.inf, -np.inf, np.nan, 2]
    np.save(tmp_path / "a.npy", stack)
    image = open_image(tmp_path / "a.npy", axes="ZYX")
    assert image.plane(0, 0, 0).sum() == image.plane(0, 0, 2).sum() == 64
    with pytest.raises(UserError, match=r"a\.npy: found 4 pixels that are NaN or infinite in the plane t=0, c=0, z=1"):
        image.plane(0, 0, 1)


@pytest.mark.parametrize("index", [(1, 0, 0), (0, -1, 0), (0, 0, 3)])
def test_a_plane_outside_the_image_is_refused(tmp_path, index):
    np.save(tmp_path / "a.npy", np.ones((3, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"a\.npy: found T=1, C=1, Z=3, expected a plane"):
        open_image(tmp_path / "a.npy", axes="ZYX").plane(*index)


def test_a_png_names_its_own_axes(tmp_path, rng):
    rgb = random_pixels(rng, (10, 12, 3), "uint8")
    cv2.imwrite(str(tmp_path / "rgb.png"), rgb[..., ::-1])
    for axes in ("YXS", "YXC", "yxc"):
        np.testing.assert_array_equal(open_image(tmp_path / "rgb.png", axes=axes).plane(0, 1, 0), rgb[..., 1])
    with pytest.raises(UserError, match=r"rgb\.png: found --axes CYX, expected what the file itself says.*S=3"):
        open_image(tmp_path / "rgb.png", axes="CYX")


def test_only_a_folder_of_that_name_is_a_zarr():
    assert is_zarr("a/b.zarr")
    assert is_zarr("b.ome.ZARR")
    assert not is_zarr("a.zarr/0/c.tif")


def png_bytes(pixels):
    return cv2.imencode(".png", pixels)[1].tobytes()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


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
        "empty.npy": b"",
        "cut.npy": npy_bytes(grey)[:-1],
        "cut.npz": npz_bytes(a=grey)[:-200],
        "two.npy": npy_bytes(grey) + npy_bytes(grey),
        "zip.npy": npz_bytes(a=grey),
        "array.npz": npy_bytes(grey),
        "two.npz": npz_bytes(a=grey, b=grey),
        "pickled.npy": npy_bytes(grey.astype(object)),
        "object.npz": npz_bytes(a=grey.astype(object)),
        "bool.npy": npy_bytes(grey > 7),
        "complex.npy": npy_bytes(grey.astype(np.complex64)),
        "int64.npy": npy_bytes(grey.astype(np.int64)),
        "void.npy": npy_bytes(grey[:0, :4]),
        "row.npy": npy_bytes(grey.ravel()),
        "stack.npy": npy_bytes(np.stack([grey] * 9)),
        "nan.npy": npy_bytes(np.where(grey < 3, np.nan, grey)),
        "photo.jpg": b"\xff\xd8",
        "file.zarr": b"text",
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
        ("photo.jpg", r"expected a TIFF or PNG image, a NumPy array or an OME-Zarr folder, found \.jpg"),
        ("file.zarr", "no such image folder"),
        ("empty.npy", "empty file"),
        ("cut.npy", "unreadable"),
        ("cut.npz", "unreadable"),
        ("two.npy", "other content"),
        ("zip.npy", "other content"),
        ("array.npz", "other content"),
        ("two.npz", r"found 2 \(a, b\); keep one"),
        ("pickled.npy", "unreadable.*allow_pickle=False"),
        ("object.npz", "unreadable.*allow_pickle=False"),
        ("bool.npy", "type bool"),
        ("complex.npy", "type complex64"),
        ("int64.npy", "type int64"),
        ("void.npy", r"shape \(0, 4\)"),
        ("row.npy", r"shape \(4096,\).*pass --axes"),
        ("stack.npy", r"shape \(9, 64, 64\).*pass --axes, such as --axes ZYX"),
        ("nan.npy", "3 pixels that are NaN"),
        ("gone.tif", "no such image"),
        ("nan.tif", "3 pixels that are NaN"),
        ("infinite.tif", "3 pixels that are NaN or infinite"),
        ("complex.tif", "complex64"),
        ("pages.tif", r"shape \(9, 64, 64\).*pass --axes, such as --axes ZYX"),
        ("two.tif", "2 image series"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(tmp_path, name, found):
    with pytest.raises(UserError, match=rf"{name}.*{found}"):
        channels(damaged(name, tmp_path))
