"""TIFF as microscopes, ImageJ and tifffile write it: planes, axes, names and pixel size are those written."""

import re

import numpy as np
import pytest
import tifffile

from ray_pipeline.data.images import open_image
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_way_to_store_channels_reads_the_same(tmp_path, rng, dtype):
    written = random_pixels(rng, (2, 20, 30), dtype)
    last = np.moveaxis(written, 0, -1)
    tifffile.imwrite(tmp_path / "cyx.tif", written, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "yxc.tif", last, metadata={"axes": "YXC"})
    tifffile.imwrite(tmp_path / "imagej.tif", written, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "x.ome.tif", written, ome=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "unnamed.tif", written)
    tifffile.imwrite(tmp_path / "unnamed_last.tif", last)
    tifffile.imwrite(tmp_path / "zlib.tif", written, compression="zlib", metadata={"axes": "CYX"})
    for path in sorted(tmp_path.iterdir()):
        pixels = channels(path)
        assert pixels.dtype == written.dtype, path.name
        np.testing.assert_array_equal(pixels, written, err_msg=path.name)


def test_a_palette_tiff_keeps_its_intensities(tmp_path, rng):
    pixels = random_pixels(rng, (10, 12), "uint8")
    red = np.zeros((3, 256), np.uint16)
    red[0] = np.arange(256) * 257
    tifffile.imwrite(tmp_path / "red.tif", pixels, photometric="palette", colormap=red)
    np.testing.assert_array_equal(channels(tmp_path / "red.tif"), pixels[None])


@pytest.mark.parametrize(
    ("name", "options", "um_pixel"),
    [
        ("a.ome.tif", {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.25}}, 0.25),
        (
            "b.ome.tif",
            {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 65, "PhysicalSizeXUnit": "nm"}},
            0.065,
        ),
        (
            "mm.ome.tif",
            {"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.00025, "PhysicalSizeXUnit": "mm"}},
            0.25,
        ),
        ("nm.tif", {"imagej": True, "resolution": (0.01, 0.01), "metadata": {"unit": "nm"}}, 0.1),
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
    found = open_image(tmp_path / name).um_pixel
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
        channels(path)


def test_tifffile_is_silent_about_a_refused_file_and_speaks_about_a_good_one(tmp_path, rng, caplog):
    pixels = random_pixels(rng, (20, 30), "uint16")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, software="a microscope")
    with tifffile.TiffFile(path) as tiff:
        offset_field = tiff.pages[0].tags["Software"].offset + 8
    whole = bytearray(path.read_bytes())
    whole[offset_field : offset_field + 4] = b"\xff\xff\xff\x7f"  # the tag's text is lost, the pixels are not
    path.write_bytes(whole)
    np.testing.assert_array_equal(channels(path), pixels[None])
    assert {record.name for record in caplog.records} == {"tifffile"}
    caplog.clear()
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"a\.tif"):
        channels(path)
    assert caplog.records == []


@pytest.fixture
def stack(rng):
    return random_pixels(rng, (2, 5, 3, 12, 16), "uint16")


def assert_tzcyx(image, stack):
    assert image.sizes == {"T": 2, "C": 3, "Z": 5, "Y": 12, "X": 16}
    for t, z, c in np.ndindex(2, 5, 3):
        np.testing.assert_array_equal(image.plane(t, c, z), stack[t, z, c])


@pytest.mark.parametrize("axes", ["TZCYX", "CTZYX", "ZCTYX", "TCZYX"])
def test_an_ome_tiff_gives_its_planes_names_and_pixel_size(tmp_path, stack, axes):
    order = ["TZCYX".index(axis) for axis in axes]
    metadata = {"axes": axes, "PhysicalSizeX": 65, "PhysicalSizeXUnit": "nm", "Channel": {"Name": ["DAPI", "", "RFP"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", stack.transpose(order), ome=True, metadata=metadata)
    image = open_image(tmp_path / "a.ome.tif")
    assert_tzcyx(image, stack)
    assert image.um_pixel == pytest.approx(0.065)
    assert image.channel_names == ("DAPI", "", "RFP")


def test_an_imagej_hyperstack_gives_its_planes_and_the_labels_of_its_channels(tmp_path, stack):
    for name, labels, expected in [
        ("same.tif", ["DAPI", "GFP", "RFP"] * 10, ("DAPI", "GFP", "RFP")),
        ("by_plane.tif", [f"plane {i}" for i in range(30)], ("", "", "")),
        ("none.tif", None, ("", "", "")),
    ]:
        metadata = {"axes": "TZCYX"} | ({"Labels": labels} if labels else {})
        tifffile.imwrite(tmp_path / name, stack, imagej=True, metadata=metadata)
        image = open_image(tmp_path / name)
        assert_tzcyx(image, stack)
        assert image.channel_names == expected, name


def test_one_label_of_an_imagej_file_is_no_list_of_channels(tmp_path, stack):
    metadata = {"axes": "CYX", "Labels": ["Red"]}
    tifffile.imwrite(tmp_path / "a.tif", stack[0, 0], imagej=True, metadata=metadata)
    assert open_image(tmp_path / "a.tif").channel_names == ("", "", "")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32", "int32", "float16", "float32", "float64"])
def test_every_dtype_is_kept(tmp_path, rng, dtype):
    pixels = rng.integers(0, 100, (6, 7)).astype(dtype)
    for order in "<>":
        tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=order)
        plane = open_image(tmp_path / "a.tif").plane(0, 0, 0)
        assert plane.dtype == dtype
        np.testing.assert_array_equal(plane, pixels)


def test_colour_samples_are_channels_in_a_stack(tmp_path, rng):
    rgb = random_pixels(rng, (5, 12, 16, 3), "uint8")
    tifffile.imwrite(tmp_path / "a.ome.tif", rgb, ome=True, photometric="rgb", metadata={"axes": "ZYXS"})
    image = open_image(tmp_path / "a.ome.tif")
    assert (image.sizes["Z"], image.sizes["C"], image.channel_names) == (5, 3, ("", "", ""))
    np.testing.assert_array_equal(image.plane(0, 2, 4), rgb[4, :, :, 2])


def write_pages(path, pages, description=None):
    with tifffile.TiffWriter(path) as writer:
        for i, page in enumerate(pages):
            text = description.encode() if description and i == 0 else None
            writer.write(page, description=text, metadata=None, contiguous=False)


def test_the_user_names_the_pages_of_a_plain_tiff(tmp_path, stack):
    path = tmp_path / "pages.tif"
    write_pages(path, stack[0, :, 0])
    with pytest.raises(UserError, match=r"pages\.tif: found shape \(5, 12, 16\).*pass --axes, such as --axes ZYX"):
        open_image(path)
    for axis in "TCZ":
        image = open_image(path, axes=f"{axis}YX")
        assert image.sizes[axis] == 5
        index = {"T": 0, "C": 0, "Z": 0} | {axis: 3}
        np.testing.assert_array_equal(image.plane(*index.values()), stack[0, 3, 0])
    with pytest.raises(UserError, match=r"pages\.tif: found --axes YXZ, expected what the file itself says"):
        open_image(path, axes="YXZ")


def test_the_user_names_axes_that_have_no_letter_of_ours(tmp_path, stack):
    path = tmp_path / "tiles.tif"
    tifffile.imwrite(path, stack[0, 0], metadata={"axes": "RYX"})
    with pytest.raises(UserError, match=r"tiles\.tif: found shape .*R=3.*pass --axes"):
        open_image(path)
    np.testing.assert_array_equal(open_image(path, axes="CYX").plane(0, 2, 0), stack[0, 0, 2])


@pytest.mark.parametrize("axes", ["CYX", "ZTCYX", "YX"])
def test_axes_that_an_ome_tiff_contradicts_are_refused(tmp_path, stack, axes):
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, ome=True, metadata={"axes": "TZCYX"})
    with pytest.raises(UserError, match=rf"a\.ome\.tif: found --axes {axes}.*T=2, Z=5, C=3, Y=12, X=16"):
        open_image(tmp_path / "a.ome.tif", axes=axes)


def test_axes_may_leave_out_or_name_dimensions_of_size_1(tmp_path, stack):
    tifffile.imwrite(tmp_path / "a.ome.tif", stack[:1, :, :1], ome=True, metadata={"axes": "TZCYX"})
    for axes in (None, "ZYX", "TZCYX", "ZCYX"):
        image = open_image(tmp_path / "a.ome.tif", axes=axes)
        assert image.sizes == {"T": 1, "C": 1, "Z": 5, "Y": 12, "X": 16}
        np.testing.assert_array_equal(image.plane(0, 0, 4), stack[0, 4, 0])


def test_an_ome_tiff_that_lacks_planes_is_refused_and_not_filled_with_zeros(tmp_path, stack):
    tifffile.imwrite(tmp_path / "whole.ome.tif", stack, ome=True, metadata={"axes": "TZCYX"})
    description = tifffile.tiffcomment(tmp_path / "whole.ome.tif")
    write_pages(tmp_path / "stopped.ome.tif", stack.reshape(30, 12, 16)[:20], description)
    with pytest.raises(UserError, match=r"stopped\.ome\.tif: found 20 of the 30 planes"):
        open_image(tmp_path / "stopped.ome.tif")


@pytest.mark.parametrize("root_uuid", [True, False])
def test_a_part_of_an_image_in_several_files_is_refused(tmp_path, stack, root_uuid):
    tifffile.imwrite(tmp_path / "whole.ome.tif", stack[0, :2, 0], ome=True, metadata={"axes": "ZYX"})
    description = tifffile.tiffcomment(tmp_path / "whole.ome.tif")
    parts = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for z, name in enumerate(["part0.ome.tif", "part1.ome.tif"])
    )
    description = re.sub(r"<TiffData[^>]*/>", parts, description)
    description = re.sub(r' UUID="[^"]*"', ' UUID="urn:uuid:part0.ome.tif"' if root_uuid else "", description)
    write_pages(tmp_path / "part0.ome.tif", stack[0, :1, 0], description)
    with pytest.raises(UserError, match=r"part0\.ome\.tif: .*refers to other files \(part1\.ome\.tif\)"):
        open_image(tmp_path / "part0.ome.tif")


def test_an_ome_tiff_whose_metadata_lie_in_another_file_is_refused(tmp_path, stack):
    description = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:b">'
        '<BinaryOnly MetadataFile="master.ome.tif" UUID="urn:uuid:a"/></OME>'
    )
    write_pages(tmp_path / "b.ome.tif", stack[0, :1, 0], description)
    with pytest.raises(UserError, match=r"b\.ome\.tif: .*refers to other files \(master\.ome\.tif\)"):
        open_image(tmp_path / "b.ome.tif")


def test_a_renamed_ome_tiff_of_one_file_is_read(tmp_path, stack):
    tifffile.imwrite(tmp_path / "whole.ome.tif", stack[0, :2, 0], ome=True, metadata={"axes": "ZYX"})
    description = tifffile.tiffcomment(tmp_path / "whole.ome.tif")
    uuid = re.search(r' UUID="([^"]*)"', description)[1]
    own = f'<TiffData IFD="0" PlaneCount="2"><UUID FileName="former.ome.tif">{uuid}</UUID></TiffData>'
    write_pages(tmp_path / "new.ome.tif", stack[0, :2, 0], re.sub(r"<TiffData[^>]*/>", own, description))
    np.testing.assert_array_equal(open_image(tmp_path / "new.ome.tif").plane(0, 0, 1), stack[0, 1, 0])
