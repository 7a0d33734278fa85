"""What is known of an image before it is cut: limits, constant channels, saturation, and why it is rejected."""

import numpy as np
import pytest
import tifffile

from ray_pipeline.data.sources.collection import SourceImage
from ray_pipeline.data.sources.folder import list_folder
from ray_pipeline.data.sources.planes import PlaneChoice
from ray_pipeline.data.sources.survey import is_dim, ranges_of_surveys, survey_image, survey_images


def survey(root, name="a.tif", pixels=None, choice=None, pair=None, **metadata):
    if pixels is not None:
        tifffile.imwrite(root / name, pixels, metadata=metadata or None)
    return survey_image(root, SourceImage(name, "cells", "nuclei", pair=pair, channel=5), 16, choice or PlaneChoice())


def test_limits_are_those_of_all_planes_of_a_channel(tmp_path, cells):
    pixels = cells((3, 2, 20, 24))
    found, counts = survey(tmp_path, "a.ome.tif", pixels, PlaneChoice(z=(0, 2)), axes="ZCYX")
    chosen = pixels[[0, 2]]
    assert (found.reason, found.dtype, found.height, found.width) == ("", "uint16", 20, 24)
    assert found.limits == {c: (chosen[:, c].min(), chosen[:, c].max()) for c in range(2)}
    assert found.places == ((0, 0, 0), (0, 0, 2), (1, 0, 0), (1, 0, 2))
    for c in range(2):
        group = ("cells", "nuclei", 5 + c, "uint16")
        assert found.group(c) == group
        np.testing.assert_array_equal(counts[group], np.bincount(chosen[:, c].ravel(), minlength=65536))


def test_constant_channels_are_named_and_not_counted(tmp_path, cells):
    pixels = cells((3, 20, 24), "uint8", 200)
    pixels[1] = 8
    found, counts = survey(tmp_path, "a.ome.tif", pixels, axes="CYX")
    assert (found.reason, found.empty, set(found.limits)) == ("", (1,), {0, 2})
    assert {group[2] for group in counts} == {5, 7}


@pytest.mark.parametrize(
    ("dtype", "top", "saturated"),
    [
        ("uint8", 255, 0.25),
        ("uint16", 4095, 0.25),
        ("uint16", 16383, 0.25),
        ("uint16", 65535, 0.25),
        ("uint16", 60000, 0),
    ],
)
def test_pixels_at_the_top_of_a_detector_are_counted(tmp_path, cells, dtype, top, saturated):
    pixels = cells((16, 16), dtype, top // 2)
    pixels[:4] = top
    assert survey(tmp_path, pixels=pixels)[0].saturated == saturated


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((16, 16), 300, np.uint16), "constant image, every pixel is 300"),
        (np.zeros((15, 40), np.uint8), "15 x 40 pixels, smaller than a tile of 16"),
        (np.full((16, 16), np.inf, np.float32), "found 256 pixels that are NaN or infinite"),
        (np.zeros((16, 16), np.complex64), "found pixels of type complex64"),
        (np.zeros((9, 16, 16), np.uint8), "found shape"),
    ],
)
def test_the_reason_of_a_rejection_does_not_repeat_the_path(tmp_path, pixels, reason):
    found, counts = survey(tmp_path, pixels=pixels)
    assert found.reason.startswith(reason)
    assert str(tmp_path) not in found.reason
    assert counts == {}


def test_partners_may_be_smaller_than_a_tile_and_count_for_no_range(tmp_path, cells):
    found, counts = survey(tmp_path, pixels=cells((4, 4)), pair="b.tif")
    assert (found.reason, counts) == ("", {})


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "uint32"])
def test_ranges_and_background_are_of_all_images_of_a_group(tmp_path, ray_cluster, cells, dtype):
    images, pixels = [], []
    for i in range(20):
        array = cells((20, 20), dtype, 10 * (i + 1))
        array[:5] = array[:5] / 10 + 200 if i % 2 else array[:5] / 10
        np.save(tmp_path / f"{i}.npy", array)
        images.append(SourceImage(f"{i}.npy", "cells"))
        pixels.append(array.astype(np.float64))
    seen = []
    choice = PlaneChoice()
    surveys, counts = survey_images(tmp_path, images, 16, choice, seen.append)
    assert [found.image for found in surveys] == images
    assert seen[-1] == 20
    found = ranges_of_surveys(tmp_path, surveys, counts, (2, 97), choice)
    group = ("cells", "", 0, dtype)
    values = np.stack(pixels)
    bin_width = np.ptp(values) / 2**20 if dtype[0] == "f" or dtype == "uint32" else 0
    np.testing.assert_allclose(found.ranges[group], np.percentile(values, (2, 97)), atol=bin_width + 1e-9)
    # Otsu: the threshold that makes the variance between the two classes largest
    levels = np.unique(values)
    between = [
        (values <= t).mean() * (values > t).mean() * (values[values <= t].mean() - values[values > t].mean()) ** 2
        for t in levels[:-1][:: max(1, len(levels) // 300)]
    ]
    low, high = values[values <= found.background[group]], values[values > found.background[group]]
    reached = len(low) * len(high) / values.size**2 * (low.mean() - high.mean()) ** 2
    assert reached >= 0.999 * max(between)


def test_an_image_is_dim_only_when_every_channel_is(tmp_path, cells):
    pixels = cells((2, 16, 16), "uint16", 100)
    found, _ = survey(tmp_path, "a.ome.tif", pixels, axes="CYX")
    groups = [found.group(c) for c in range(2)]
    assert is_dim(found, dict.fromkeys(groups, (0.0, 400.0)))
    assert not is_dim(found, {groups[0]: (0.0, 400.0), groups[1]: (0.0, 100.0)})


@pytest.mark.parametrize("hot", [1e7, -3e4])
def test_a_hot_pixel_does_not_take_the_bins_of_all_others(tmp_path, ray_cluster, hot):
    rng = np.random.default_rng(0)
    images = rng.gamma(2.0, 0.2, (3, 96, 96)).astype(np.float32)
    images[1, 5, 6] = hot
    for number, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{number}.tif", image)
    collection = list_folder(tmp_path, dataset="cells")
    surveys, counts = survey_images(tmp_path, collection.images, 64, PlaneChoice(), lambda done: None)
    found = ranges_of_surveys(tmp_path, surveys, counts, (0.1, 99.9), PlaneChoice())
    (lo, hi), (background,) = *found.ranges.values(), found.background.values()
    expected = np.percentile(images, (0.1, 99.9))
    np.testing.assert_allclose((lo, hi), expected, atol=1e-3 * np.ptp(expected))
    assert lo < background < hi
