"""Optics against formulas and libraries of others."""

import numpy as np
import pytest
from scipy import ndimage

from ray_pipeline.data import optics
from ray_pipeline.errors import UserError


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def structure(size=96, seed=1, sigma=3.0):
    image = ndimage.gaussian_filter(philox(seed).standard_normal((size, size)), sigma)
    return ((image - image.min()) / np.ptp(image)).astype(np.float32)


def measured_fwhm_px(image):
    """Width at half maximum of the peak's profile, by linear interpolation."""
    profile = image[image.shape[0] // 2]
    half, peak = profile.max() / 2, int(np.argmax(profile))
    right = peak + int(np.argmax(profile[peak:] < half))
    left = peak - int(np.argmax(profile[peak::-1] < half))
    rise = left + (half - profile[left]) / (profile[left + 1] - profile[left])
    fall = right - (half - profile[right]) / (profile[right - 1] - profile[right])
    return fall - rise


@pytest.mark.parametrize(
    ("modality", "factor"), [("wide-field", 0.51), ("WideField", 0.51), ("confocal", 0.37), ("two-photon", 0.37)]
)
def test_a_point_is_imaged_as_wide_as_the_formula_says(modality, factor):
    NA, wavelength_nm, um_pixel = 1.1, 580, 0.031
    point = np.zeros((129, 129), np.float32)
    point[64, 64] = 1
    sigma = optics.gaussian_psf_sigma_px(optics.fwhm_um(modality, NA, wavelength_nm), um_pixel)
    seen_um = measured_fwhm_px(optics.blur(point, sigma)) * um_pixel
    assert seen_um == pytest.approx(factor * 0.580 / NA, rel=0.02)


@pytest.mark.parametrize("sigma", [0.8, 2.5])
def test_blur_is_the_gaussian_of_scipy_and_keeps_the_light(sigma):
    image = structure()
    expected = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="mirror", truncate=4)
    np.testing.assert_allclose(optics.blur(image, sigma), expected, atol=1e-4)
    assert optics.blur(np.full((32, 32), 0.3, np.float32), sigma) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize(("a", "b"), [(0.07, 0.002), (0.01, 0.009)])
def test_variance_against_mean_is_the_line_a_x_plus_b(a, b):
    levels = np.linspace(0.0, 1.0, 9)
    rng = philox(3)
    captures = [optics.poisson_gaussian(np.full((500, 500), x, np.float32), a, b, rng) for x in levels]
    slope, offset = np.polyfit(levels, [capture.var() for capture in captures], 1)
    assert slope == pytest.approx(a, rel=0.05)
    assert offset == pytest.approx(b, rel=0.05)
    np.testing.assert_allclose([capture.mean() for capture in captures], levels, atol=2e-3)


def test_shot_noise_is_poisson_not_only_in_its_variance():
    capture = optics.poisson_gaussian(np.full((400, 400), 0.1, np.float32), 0.05, 0.0, philox(4))
    electrons = capture / 0.05
    np.testing.assert_allclose(electrons, np.rint(electrons), atol=1e-4)
    assert (electrons < 0.5).mean() == pytest.approx(np.exp(-2.0), rel=0.03)


@pytest.mark.parametrize("averages", [4, 16])
def test_an_average_of_n_captures_has_an_nth_of_the_variance(averages):
    flat = np.full((400, 400), 0.4, np.float32)
    average = optics.poisson_gaussian(flat, 0.05, 0.004, philox(5), averages)
    assert average.var() == pytest.approx((0.05 * 0.4 + 0.004) / averages, rel=0.03)
    assert average.mean() == pytest.approx(0.4, abs=1e-3)


def test_noise_is_not_clipped_and_repeats_with_its_generator():
    dark = np.zeros((64, 64), np.float32)
    first = optics.poisson_gaussian(dark, 0.05, 0.01, philox(6))
    assert (first < 0).any()
    np.testing.assert_array_equal(first, optics.poisson_gaussian(dark, 0.05, 0.01, philox(6)))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_point_sample_is_decimation_of_the_shifted_image(scale):
    image = structure(size=96)
    half = -(scale - 1) / 2
    np.testing.assert_allclose(optics.point_sample(image, scale, (half, half)), image[::scale, ::scale], atol=1e-6)
    shift = (0.25, -0.5)
    moved = ndimage.shift(image.astype(np.float64), (half - shift[0], half - shift[1]), order=3)
    inner = slice(3, -3)
    np.testing.assert_allclose(
        optics.point_sample(image, scale, shift)[inner, inner], moved[::scale, ::scale][inner, inner], atol=0.01
    )


def test_point_sample_does_not_average_over_the_low_resolution_pixel():
    noise = philox(7).standard_normal((128, 128)).astype(np.float32)
    half = -1.5
    sampled = optics.point_sample(noise, 4, (half, half))
    assert sampled.std() == pytest.approx(1.0, rel=0.1)
    assert noise.reshape(32, 4, 32, 4).mean((1, 3)).std() < 0.3


@pytest.mark.parametrize("scale", [2, 4])
def test_upsampled_points_lie_on_the_image_without_a_shift(scale):
    image = structure(sigma=6.0)
    back = optics.upsample(optics.point_sample(image, scale), scale)
    error = {
        (dy, dx): np.abs(np.roll(back, (dy, dx), (0, 1)) - image)[8:-8, 8:-8].mean()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert min(error, key=error.get) == (0, 0)
    assert error[0, 0] < 0.01
    assert back.shape == image.shape
    assert back.min() >= 0
    assert back.max() <= 1


@pytest.mark.parametrize("bits", [1, 8, 12])
def test_quantise_leaves_the_levels_of_its_detector(bits):
    levels = optics.quantise(np.linspace(-0.2, 1.2, 20000, dtype=np.float32), bits)
    assert len(np.unique(levels)) == 2**bits
    assert levels.min() == 0
    assert levels.max() == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: optics.fwhm_um("electron", 1.0, 500), "electron"),
        (lambda: optics.fwhm_um("confocal", 0, 500), "NA 0"),
        (lambda: optics.gaussian_psf_sigma_px(0.3, 0), "um_pixel"),
        (lambda: optics.poisson_gaussian(np.zeros((4, 4)), -1, 0, philox()), "a=-1"),
        (lambda: optics.point_sample(np.zeros((10, 12)), 4), "10 x 12"),
        (lambda: optics.quantise(np.zeros((4, 4)), 32), "bits is 32"),
    ],
)
def test_impossible_optics_are_refused_by_name(call, named):
    with pytest.raises(UserError, match=named):
        call()
