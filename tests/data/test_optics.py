"""Optics against formulas and libraries of others, and simulated noise against that of real pairs."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy import ndimage, stats

from ray_pipeline.data import optics
from ray_pipeline.data.optics import Degradation
from ray_pipeline.errors import UserError

W2S = Path(__file__).resolve().parents[3] / "shared" / "data" / "w2s_pairs"


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


@pytest.mark.parametrize("averages", [1, 4])
@pytest.mark.parametrize(("a", "b"), [(0.07, 0.002), (0.01, 0.009)])
def test_variance_against_mean_is_the_line_a_x_plus_b(a, b, averages):
    levels = np.linspace(0.0, 1.0, 9)
    fields = np.broadcast_to(levels[:, None, None], (9, 500, 500)).astype(np.float32)
    captures = optics.degrade(fields, Degradation(a=a, b=b, averages=averages), philox(3))
    slope, offset = np.polyfit(levels, captures.var(axis=(1, 2)), 1) * averages
    assert slope == pytest.approx(a, rel=0.05)
    assert offset == pytest.approx(b, rel=0.05)
    np.testing.assert_allclose(captures.mean(axis=(1, 2)), levels, atol=2e-3)


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


@pytest.mark.parametrize(
    ("scale", "a", "averages", "bits"), [(1, 0.02, 1, 12), (1, 0.02, 3, 8), (2, 0, 1, 8), (4, 0, 3, 8)]
)
def test_degrade_is_blur_then_points_then_noise_then_levels(scale, a, averages, bits):
    """Against scipy's filter and spline, numpy's Poisson and normal numbers, drawn in the order of the formula. Where
    the spline's last bits would change how many numbers a Poisson draw takes, there is read noise alone."""
    image, sigma, b = structure(sigma=5.0), 0.45 * scale, 0.001
    how = Degradation(sigma, scale, (0.3, -0.2) if scale > 1 else (0.0, 0.0), a, b, averages, bits)
    found = optics.degrade(image, how, philox(8))
    seen = ndimage.gaussian_filter(image.astype(np.float64), sigma, mode="mirror", truncate=4)
    centres = np.arange(0, 96, scale) + (scale - 1) / 2
    places = np.meshgrid(centres + how.shift[0], centres + how.shift[1], indexing="ij")
    noisy, rng = ndimage.map_coordinates(seen, places, order=3, mode="mirror"), philox(8)
    if a:
        noisy = rng.poisson(noisy.clip(0) * averages / a) * a / averages
    noisy += rng.standard_normal(noisy.shape, np.float32) * np.sqrt(b / averages)
    expected = np.rint(noisy.clip(0, 1) * (2**bits - 1)) / (2**bits - 1)
    assert found.shape == (96 // scale, 96 // scale)
    assert found.dtype == np.float32
    inner = slice(2, -2)
    apart = np.abs(found - expected)[inner, inner]
    assert (apart < 0.01).mean() > 0.99  # a level more or less, an electron more or less
    assert apart.mean() < 0.003


def test_degrade_is_its_parts_one_after_the_other():
    image, how = structure(), Degradation(1.3, 4, (0.3, -0.2), 0.02, 0.001, 2, 10)
    rng = philox(9)
    seen = optics.point_sample(optics.blur(image, 1.3), 4, (0.3, -0.2))
    expected = optics.quantise(optics.poisson_gaussian(seen, 0.02, 0.001, rng, averages=2), 10)
    np.testing.assert_array_equal(optics.degrade(image, how, philox(9)), expected)
    np.testing.assert_array_equal(optics.degrade(image, Degradation(), philox()), image)
    unbound = optics.degrade(image, replace(how, bits=None), philox(9))
    np.testing.assert_array_equal(optics.quantise(unbound, 10), expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), (7, 1)])
@pytest.mark.parametrize(
    "work",
    [
        lambda images: optics.blur(images, 1.7),
        lambda images: optics.point_sample(images, 4, (0.4, -1.1)),
        lambda images: optics.upsample(images, 3),
        lambda images: optics.quantise(images, 6),
        lambda images: optics.degrade(images, Degradation(1.1, 2, (0.2, 0.1), bits=8), philox()),
    ],
    ids=["blur", "point_sample", "upsample", "quantise", "degrade"],
)
def test_a_stack_of_images_is_treated_as_each_image_alone(work, shape):
    count = int(np.prod(shape))
    images = np.stack([structure(48, seed) for seed in range(count)])
    found = work(images.reshape(*shape, 48, 48))
    assert found.dtype == np.float32
    assert found.shape[: len(shape)] == shape
    np.testing.assert_array_equal(found.reshape(count, *found.shape[-2:]), [work(image) for image in images])


def test_noise_of_a_stack_is_fresh_in_every_image():
    images = np.full((3, 64, 64), 0.5, np.float32)
    noise = optics.degrade(images, Degradation(a=0.02, b=0.001), philox()) - 0.5
    correlations = np.corrcoef(noise.reshape(3, -1))[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.06


@dataclass(frozen=True)
class Residuals:
    """Noise of one capture by classes of equal clean intensity, clipped classes left out.

    z: residuals over their class's standard deviation, nan where left out. curve: variance of each class.
    """

    z: np.ndarray
    curve: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        return self.z[np.isfinite(self.z)]

    def neighbours(self, axis: int) -> float:
        """Correlation of a residual with the next one along an axis."""
        here, there = self.z.take(range(511), axis), self.z.take(range(1, 512), axis)
        both = np.isfinite(here) & np.isfinite(there)
        return np.corrcoef(here[both], there[both])[0, 1]


def residuals_of(noisy, expected, classes, numbers) -> Residuals:
    residual, z, curve = noisy - expected, np.full(noisy.shape, np.nan), []
    for number in numbers:
        inside = residual[classes == number]
        curve.append(inside.var())
        z[classes == number] = (inside - inside.mean()) / inside.std()
    return Residuals(z, np.array(curve))


def real_and_simulated(name: str) -> tuple[Residuals, Residuals] | None:
    """One real pair: a line brings the clean image (mean of 400 captures) onto the noisy one, another fits variance
    against mean; then the clean image is degraded with these. None where too few classes are free of clipping."""
    clean, noisy = (tifffile.imread(W2S / kind / name) / 255 for kind in ("clean_avg400", "noisy_avg1"))
    classes = np.digitize(clean, np.quantile(clean, np.linspace(0, 1, 17))[1:-1])
    clipped = (noisy <= 0) | (noisy >= 1)
    numbers = [n for n in range(16) if (classes == n).sum() > 5000 and clipped[classes == n].mean() < 0.002]
    if len(numbers) < 6:
        return None
    means = np.array([[image[classes == n].mean() for n in numbers] for image in (clean, noisy)])
    expected = np.polyval(np.polyfit(*means, 1), clean)
    real = residuals_of(noisy, expected, classes, numbers)
    a, b = np.polyfit([expected[classes == n].mean() for n in numbers], real.curve, 1)
    black = max(0.0, -b / a)  # the grey level without a photon: the files were stretched, each to its own range
    how = Degradation(a=a, b=max(b, 0.0))
    simulated = optics.quantise(optics.degrade((expected - black).astype(np.float32), how, philox(1)) + black, 8)
    return real, residuals_of(simulated, expected, classes, numbers)


@pytest.mark.skipif(not W2S.is_dir(), reason=f"no shared real images at {W2S}")
def test_simulated_noise_is_that_of_real_pairs_up_to_its_third_moment():
    """W2S (Zhou et al. 2020), one wide-field capture against the mean of 400.

    What holds: the variance-mean curve, the independence of neighbours, and nearly the distribution. What does not: the
    real residuals have 1.4 times the skewness and 2.7 times the excess kurtosis of a Poisson variable with their
    variance. The gain of an electron-multiplying camera is random (nearly exponential) and makes about 1.5 and 3 of
    them; our one gain of equal electrons does not.
    """
    pairs = [real_and_simulated(path.name) for path in sorted((W2S / "noisy_avg1").glob("*.tif"))[::2]]
    pairs = [pair for pair in pairs if pair is not None]
    assert len(pairs) >= 6
    distances, skews, tails = [], [], []
    for real, simulated in pairs:
        np.testing.assert_allclose(simulated.curve, real.curve, rtol=0.15)
        for axis in (0, 1):
            assert abs(real.neighbours(axis)) < 0.02
            assert abs(simulated.neighbours(axis)) < 0.02
        distances.append(stats.ks_2samp(real.kept, simulated.kept).statistic)
        skews.append(stats.skew(real.kept) / stats.skew(simulated.kept))
        tails.append(stats.kurtosis(real.kept) / stats.kurtosis(simulated.kept))
    assert np.median(distances) < 0.08
    assert np.median(skews) == pytest.approx(1.4, abs=0.2)
    assert np.median(tails) == pytest.approx(2.7, abs=0.5)
