"""Percentiles of counted pixels are those that numpy finds in the pixels themselves."""

import numpy as np
import pytest

from ray_pipeline.data.intensity import (
    HISTOGRAM_BINS,
    PIXELS_AT_ONCE,
    add_counts,
    background_levels,
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


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float16", "float32", "float64"])
def test_the_range_of_several_images_is_that_of_all_their_pixels(rng, dtype):
    images = [rng.gamma(2.0, scale, (50, 60)).astype(dtype) for scale in (3.0, 9.0, 20.0)]
    pixels = np.concatenate(images, dtype=np.float64)
    group, limits = ("cells", "", 1, dtype), (float(pixels.min()), float(pixels.max()))
    counts = {}
    for image in images:
        add_counts(counts, {group: count_values(image) if is_narrow(dtype) else count_bins(image, *limits)})
    ranges = intensity_ranges(counts, {group: limits}, {group: limits}, (0.5, 99.0))
    bin_width = 0.0 if is_narrow(dtype) else np.ptp(pixels) / HISTOGRAM_BINS
    np.testing.assert_allclose(ranges[group], np.percentile(pixels, (0.5, 99.0)), atol=bin_width + 1e-9)


@pytest.mark.parametrize(("dtype", "lo", "hi"), [("float32", 10000.0, 10001.0), ("float16", 0.25, 0.5)])
def test_bins_are_finer_than_the_steps_of_a_short_float(rng, dtype, lo, hi):
    pixels = rng.uniform(lo, hi, (64, 64)).astype(dtype)
    group, limits = ("cells", "", 0, dtype), (float(pixels.min()), float(pixels.max()))
    counts = count_bins(pixels, *limits)
    assert counts.sum() == pixels.size
    found = intensity_ranges({group: counts}, {group: limits}, {group: limits}, (5, 95))[group]
    np.testing.assert_allclose(
        found, np.percentile(pixels.astype(float), (5, 95)), atol=np.ptp(limits) / HISTOGRAM_BINS
    )


def test_float_images_of_several_portions_are_counted_in_full(rng):
    pixels = rng.random((2, PIXELS_AT_ONCE // 2 + 10), np.float32)
    np.testing.assert_array_equal(
        count_bins(pixels, 0.0, 1.0), np.histogram(pixels.astype(np.float64), HISTOGRAM_BINS, (0, 1))[0]
    )


def test_data_sets_kinds_channels_and_dtypes_keep_their_own_ranges(rng):
    groups = [("cells", "", 0, "uint8"), ("cells", "", 0, "uint16"), ("cells", "", 1, "uint8")]
    groups += [("cells", "FISH", 0, "uint8"), ("tissue", "", 0, "uint8")]
    planes = {group: rng.integers(3 + 20 * i, 90 + 30 * i, 500) for i, group in enumerate(groups)}
    counts = {group: count_values(plane.astype(group[3])) for group, plane in planes.items()}
    limits = {group: (float(plane.min()), float(plane.max())) for group, plane in planes.items()}
    assert intensity_ranges(counts, limits, limits, (0, 100)) == limits


def test_where_both_percentiles_are_equal_minimum_and_maximum_are_the_range():
    dots = np.zeros(1000, np.uint16)
    dots[:3] = 900
    group = ("cells", "", 0, "uint16")
    limits = {group: (0.0, 900.0)}
    assert intensity_ranges({group: count_values(dots)}, limits, limits, (1, 99)) == limits


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_background_lies_between_two_modes(rng, dtype):
    dark, bright = rng.normal(40, 5, 4000), rng.normal(160, 15, 1000)
    pixels = np.concatenate([dark, bright]).astype(dtype)
    group, limits = ("cells", "", 0, dtype), (float(pixels.min()), float(pixels.max()))
    counts = count_values(pixels) if is_narrow(dtype) else count_bins(pixels, *limits)
    level = background_levels({group: counts}, {group: limits})[group]
    assert (pixels > level).sum() == pytest.approx(1000, abs=5)


def test_a_tile_whose_only_content_is_two_values_has_its_background_at_the_lower():
    pixels = np.array([7] * 90 + [900] * 10, np.uint16)
    group = ("cells", "", 0, "uint16")
    level = background_levels({group: count_values(pixels)}, {group: (7.0, 900.0)})[group]
    assert (pixels > level).sum() == 10
