"""OME-Zarr folders of both versions: planes, names and pixel size are those written; anything else is named."""

import json
import sys

import numpy as np
import pytest

from ray_pipeline.data.images import open_image
from ray_pipeline.errors import UserError

zarr = pytest.importorskip("zarr", minversion="3", reason="the optional package zarr is not installed")

SHAPE = (2, 3, 5, 24, 32)  # T C Z Y X


@pytest.fixture
def pixels():
    return np.random.default_rng(5).integers(1, 4096, SHAPE).astype(np.uint16)


def axes_of(letters, unit):
    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": letter, "type": kinds.get(letter, "space")} for letter in letters]
    return [axis | ({"unit": unit} if unit and axis["type"] == "space" else {}) for axis in axes]


def write_image(path, levels, axes, version="0.5", scale=None, whole=None, labels=()):
    """An OME-Zarr image as the specification has it: `scale` of the first level, `whole` of all levels."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    for i, level in enumerate(levels):
        chunks = (1,) * (level.ndim - 2) + level.shape[-2:]
        group.create_array(f"s{i}", data=level, chunks=chunks)
    datasets = [{"path": f"s{i}"} for i in range(len(levels))]
    if scale:
        datasets[0]["coordinateTransformations"] = [{"type": "scale", "scale": scale}]
    image = {"axes": axes, "datasets": datasets}
    if whole:
        image["coordinateTransformations"] = [{"type": "scale", "scale": whole}]
    metadata = {"multiscales": [image]}
    if labels:
        metadata["omero"] = {"channels": [{"label": label} for label in labels]}
    group.attrs.update({"ome": metadata | {"version": "0.5"}} if version == "0.5" else metadata)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("unit", "x", "um_pixel"),
    [("nanometer", 65, 0.065), ("micrometer", 0.25, 0.25), ("millimeter", 0.00025, 0.25), (None, 0.25, None)],
)
def test_planes_names_and_pixel_size_are_those_written(tmp_path, pixels, version, unit, x, um_pixel):
    levels = [pixels, pixels[..., ::2, ::2]]
    axes, scale = axes_of("tczyx", unit), [1, 1, 2, 9, x]
    labels = ["DAPI", "GFP", "RFP"]
    image = open_image(write_image(tmp_path / "a.ome.zarr", levels, axes, version, scale, labels=labels))
    assert list(image.sizes.items()) == list(zip("TCZYX", SHAPE, strict=True))
    assert image.dtype == np.uint16
    assert image.um_pixel == (None if um_pixel is None else pytest.approx(um_pixel))
    assert image.channel_names == ("DAPI", "GFP", "RFP")
    for t, c, z in np.ndindex(SHAPE[:3]):
        np.testing.assert_array_equal(image.plane(t, c, z), pixels[t, c, z])


def test_the_scale_of_all_levels_multiplies_that_of_one(tmp_path, pixels):
    path = write_image(
        tmp_path / "a.zarr", [pixels[0, 0, 0]], axes_of("yx", "micrometer"), scale=[1, 2], whole=[1, 0.1]
    )
    assert open_image(path).um_pixel == pytest.approx(0.2)


def test_any_order_and_any_name_of_axes_is_understood(tmp_path, pixels):
    axes = [{"name": "x", "type": "space"}, {"name": "marker", "type": "channel"}, {"name": "y", "type": "space"}]
    image = open_image(write_image(tmp_path / "a.zarr", [pixels[0, :, 0].transpose(2, 0, 1)], axes))
    assert (image.sizes["C"], image.channel_names) == (3, ("", "", ""))
    np.testing.assert_array_equal(image.plane(0, 1, 0), pixels[0, 1, 0])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plane_reads_no_other_plane(tmp_path, pixels, version):
    path = write_image(tmp_path / "a.zarr", [pixels], axes_of("tczyx", None), version)
    image = open_image(path)
    chunks = [file for file in (path / "s0").rglob("*") if file.is_file() and not file.name.startswith((".", "zarr"))]
    assert len(chunks) == np.prod(SHAPE[:3])
    spared = {"0.4": path / "s0" / "1.2.4.0.0", "0.5": path / "s0" / "c" / "1" / "2" / "4" / "0" / "0"}[version]
    for chunk in set(chunks) - {spared}:
        chunk.write_bytes(chunk.read_bytes()[:9])
    np.testing.assert_array_equal(image.plane(1, 2, 4), pixels[1, 2, 4])
    with pytest.raises(UserError, match=r"a\.zarr: the plane t=0, c=0, z=0 cannot be read"):
        image.plane(0, 0, 0)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_bare_array_takes_its_axes_from_the_user(tmp_path, pixels, zarr_format):
    path = tmp_path / "a.zarr"
    zarr.create_array(path, data=pixels[0, 0], chunks=(2, 24, 32), zarr_format=zarr_format)
    with pytest.raises(UserError, match=r"a\.zarr: found shape \(5, 24, 32\).*pass --axes"):
        open_image(path)
    np.testing.assert_array_equal(open_image(path, axes="ZYX").plane(0, 0, 3), pixels[0, 0, 3])


def test_a_bare_array_may_name_its_dimensions(tmp_path, pixels):
    zarr.create_array(tmp_path / "a.zarr", data=pixels[0, 0], dimension_names=["z", "y", "x"])
    assert open_image(tmp_path / "a.zarr").sizes["Z"] == 5


def test_axes_that_the_metadata_contradict_are_refused(tmp_path, pixels):
    path = write_image(tmp_path / "a.zarr", [pixels[0, 0]], axes_of("zyx", None))
    with pytest.raises(UserError, match=r"a\.zarr: found --axes TYX, expected what the file itself says.*Z=5"):
        open_image(path, axes="TYX")


@pytest.mark.parametrize("images", [1, 2])
def test_the_layout_of_bioformats2raw_is_read_where_it_holds_one_image(tmp_path, pixels, images):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    root.attrs["bioformats2raw.layout"] = 3
    root.create_group("OME")
    for i in range(images):
        write_image(tmp_path / "a.zarr" / str(i), [pixels[0, 0]], axes_of("zyx", None), "0.4")
    if images == 1:
        np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").plane(0, 0, 2), pixels[0, 0, 2])
    else:
        with pytest.raises(UserError, match=r"a\.zarr: expected one image, found 2 \(0, 1\)"):
            open_image(tmp_path / "a.zarr")


def spoilt(name, path, pixels):
    if name == "text":
        path.mkdir()
        (path / "notes.txt").write_text("none")
    elif name in ("plate", "empty"):
        group = zarr.open_group(path, mode="w", zarr_format=2)
        group.attrs.update({"plate": {"wells": []}} if name == "plate" else {})
    elif name == "bool":
        zarr.create_array(path, data=pixels[0, 0, 0] > 7)
    else:
        write_image(path, [pixels[0, 0]], axes_of("yx" if name == "axes" else "zyx", None), "0.4")
    attributes = path / ".zattrs"
    if name == "two":
        metadata = json.loads(attributes.read_text())
        attributes.write_text(json.dumps({"multiscales": metadata["multiscales"] * 2}))
    elif name == "lost":
        attributes.write_text(attributes.read_text().replace("s0", "s7"))
    elif name == "broken":
        attributes.write_text(attributes.read_text()[:-9])
    elif name == "bare_metadata":
        for chunk in (path / "s0").glob("[0-9]*"):
            chunk.unlink()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gone", "no such image folder"),
        ("text", "cannot be read"),
        ("plate", "a well plate"),
        ("empty", "found 0 images and 0 bare arrays"),
        ("two", "found 2 images"),
        ("lost", r"cannot be read \(.*s7"),
        ("broken", "cannot be read"),
        ("axes", r"2 named axes for an array of shape \(5, 24, 32\)"),
        ("bool", "type bool"),
        ("bare_metadata", "metadata and no pixels"),
    ],
)
def test_a_folder_that_is_no_image_is_named(tmp_path, pixels, name, found):
    path = tmp_path / f"{name}.zarr"
    if name != "gone":
        spoilt(name, path, pixels)
    with pytest.raises(UserError, match=rf"{name}\.zarr: .*{found}"):
        open_image(path)


def test_nan_is_refused_in_the_plane_that_has_it(tmp_path):
    planes = np.ones((2, 8, 8), np.float32)
    planes[1, 0, 0] = np.nan
    image = open_image(write_image(tmp_path / "a.zarr", [planes], axes_of("cyx", None)))
    assert image.plane(0, 0, 0).sum() == 64
    with pytest.raises(UserError, match=r"a\.zarr: found 1 pixels that are NaN"):
        image.plane(0, 1, 0)


def test_a_missing_zarr_package_is_asked_for(tmp_path, pixels, monkeypatch):
    path = write_image(tmp_path / "a.zarr", [pixels[0, 0, 0]], axes_of("yx", None))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UserError, match=r"a\.zarr: .*pip install 'ray-pipeline\[zarr\]'"):
        open_image(path)
