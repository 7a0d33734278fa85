"""Depth from focus finds the depth that a stack was blurred with."""

import cv2
import numpy as np
import pytest
from scipy import ndimage

from ray_pipeline.data.focus import depth_from_focus, extended_focus, focus_measure

SLICES = 9


def texture(seed=0, size=128):
    """Structure of a few pixels, as of grains or fibres, 0 to 60000."""
    grains = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((size, size)), 1.0)
    return 60000 * (grains - grains.min()) / np.ptp(grains)


def defocused(sharp, depth):
    """A stack of SLICES slices of a surface at `depth` (H, W), in slices: each pixel is blurred by a Gaussian whose
    width grows with the distance of the slice from the surface."""
    widths = np.linspace(0.0, 0.8 * SLICES, 60)
    blurred = np.stack([ndimage.gaussian_filter(sharp, width) for width in widths])
    distance = 0.8 * np.abs(np.arange(SLICES)[:, None, None] - depth)
    index = np.clip(np.rint(distance / widths[1]).astype(int), 0, len(widths) - 1)
    return np.take_along_axis(blurred, index, axis=0)


@pytest.mark.parametrize("dtype", ["uint16", "float32", "uint8"])
def test_a_tilted_plane_is_found_within_a_slice(dtype):
    _, columns = np.mgrid[:128, :128]
    truth = 1 + (SLICES - 3) * columns / 127
    stack = defocused(texture(), truth)
    if dtype == "uint8":
        stack = np.rint(stack / 60000 * 255)
    depth = depth_from_focus(stack.astype(dtype)) * (SLICES - 1)
    error = depth - truth
    assert depth.shape == (128, 128)
    assert np.abs(error).mean() < 0.3
    assert np.quantile(np.abs(error), 0.95) < 1.0
    fitted = np.polyfit(columns.ravel(), depth.ravel(), 1)
    assert fitted[0] == pytest.approx((SLICES - 3) / 127, rel=0.05)


@pytest.mark.parametrize("surface", [0.0, 2.4, 5.7, SLICES - 1])
def test_a_flat_surface_between_two_slices_is_found_between_them(surface):
    depth = depth_from_focus(defocused(texture(), np.full((128, 128), surface))) * (SLICES - 1)
    assert np.median(depth) == pytest.approx(surface, abs=0.25)
    assert depth.dtype == np.float32
    assert depth.min() >= 0
    assert depth.max() <= SLICES - 1


def test_depth_does_not_depend_on_the_unit_of_intensity():
    stack = defocused(texture(), np.full((128, 128), 3.0)).astype(np.float32)
    np.testing.assert_allclose(depth_from_focus(stack), depth_from_focus(stack * 1e-4 + 0.5), atol=0.02)


def test_background_without_structure_takes_the_depth_of_its_surroundings():
    sharp = texture()
    sharp[:, :40] = sharp.mean()
    depth = depth_from_focus(defocused(sharp, np.full((128, 128), 6.0))) * (SLICES - 1)
    assert np.abs(depth[:, :30] - 6).max() < 1


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_stack_without_structure_lies_half_way(dtype):
    np.testing.assert_array_equal(
        depth_from_focus(np.full((4, 16, 20), 700, dtype)), np.full((16, 20), 0.5, np.float32)
    )


def test_two_slices_are_the_first_and_the_last():
    sharp = texture().astype(np.uint16)
    blurred = ndimage.gaussian_filter(sharp, 3)
    assert depth_from_focus(np.stack([sharp, blurred])).max() < 0.05
    assert depth_from_focus(np.stack([blurred, sharp])).min() > 0.95


def test_the_extended_focus_shows_each_place_as_sharp_as_its_surface():
    _, columns = np.mgrid[:128, :128]
    sharp = texture()
    stack = defocused(sharp, (SLICES - 1) * columns / 127).astype(np.uint16)
    found = extended_focus(stack)
    assert found.dtype == np.uint16
    assert all((found == plane).any() for plane in stack)
    assert (found == stack).any(axis=0).all()
    error = np.abs(found - sharp).mean()
    assert error < 0.5 * min(np.abs(plane - sharp).mean() for plane in stack)


def test_the_focus_measure_is_the_sum_modified_laplacian():
    """Nayar and Nakajima 1994, equation 9, by SciPy, over a Gaussian window instead of a square one."""
    stack = np.stack([texture(seed) for seed in (1, 2)]).astype(np.float32)
    for plane, measure in zip(stack.astype(np.float64), focus_measure(stack), strict=True):
        across = np.abs(ndimage.convolve1d(plane, [-1, 2, -1], axis=1, mode="mirror"))
        down = np.abs(ndimage.convolve1d(plane, [-1, 2, -1], axis=0, mode="mirror"))
        window = cv2.getGaussianKernel(25, 3.0).ravel()
        expected = across + down
        for axis in (0, 1):
            expected = ndimage.convolve1d(expected, window, axis=axis, mode="nearest")
        np.testing.assert_allclose(measure, expected, rtol=2e-3)
