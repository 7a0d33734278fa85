"""Percentiles of counted pixels are those that numpy finds in the pixels themselves."""

import numpy as np
import pytest

from ray_pipeline.data.intensity import (
    HISTOGRAM_BINS,
    PIXELS_AT_ONCE,
    add_counts,
    count_bins,
    count_values,
    intensity_ranges,
    is_narrow,
    percentile_of_counts,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def whole_range(rng, shape, dtype):
    return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
@pytest.mark.parametrize("q", [0, 0.1, 37.3, 99.9, 100])
def test_percentiles_of_counts_equal_numpy(rng, dtype, q):
    pixels = whole_range(rng, (37, 41), dtype)
    found = percentile_of_counts(count_values(pixels), np.iinfo(dtype).min, 1.0, q)
    assert found == pytest.approx(np.percentile(pixels, q), abs=1e-6)


def test_an_image_larger_than_one_portion_is_counted_in_full(rng):
    pixels = rng.integers(0, 256, PIXELS_AT_ONCE + 1000, np.uint8)
    np.testing.assert_array_equal(count_values(pixels), np.bincount(pixels, minlength=256))


def test_only_integers_up_to_16_bit_are_counted_value_by_value():
    narrow = [name for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16") if is_narrow(name)]
    assert narrow == ["uint8", "int8", "uint16", "int16"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32"])
def test_the_range_of_several_images_is_that_of_all_their_pixels(rng, dtype):
    images = [rng.gamma(2.0, scale, (50, 60)).astype(dtype) for scale in (3.0, 9.0, 20.0)]
    pixels = np.concatenate(images, dtype=np.float64)
    group, limits = (1, dtype), (float(pixels.min()), float(pixels.max()))
    counts = {}
    for image in images:
        add_counts(counts, {group: count_values(image) if is_narrow(dtype) else count_bins(image, *limits)})
    ranges = intensity_ranges(counts, {group: limits}, (0.5, 99.0))
    bin_width = 0.0 if is_narrow(dtype) else np.ptp(pixels) / HISTOGRAM_BINS
    np.testing.assert_allclose(ranges[group], np.percentile(pixels, (0.5, 99.0)), atol=bin_width + 1e-9)


def test_channels_and_dtypes_keep_their_own_ranges(rng):
    planes = {(0, "uint8"): rng.integers(3, 90, 500), (0, "uint16"): rng.integers(300, 9000, 500)}
    planes[1, "uint8"] = rng.integers(100, 200, 500)
    counts = {group: count_values(plane.astype(group[1])) for group, plane in planes.items()}
    limits = {group: (float(plane.min()), float(plane.max())) for group, plane in planes.items()}
    assert intensity_ranges(counts, limits, (0, 100)) == limits


def test_where_both_percentiles_are_equal_minimum_and_maximum_are_the_range():
    dots = np.zeros(1000, np.uint16)
    dots[:3] = 900
    group = (0, "uint16")
    assert intensity_ranges({group: count_values(dots)}, {group: (0.0, 900.0)}, (1, 99)) == {group: (0.0, 900.0)}
