"""What a microscope does to an image: point spread function, sampling and noise, on unit images.

A unit image is float32 in [0, 1]; (..., H, W) is a stack of them, treated alike. Every function is pure: the same
arguments give the same pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from ray_pipeline.errors import UserError

# Emission FWHM in units of lambda / NA.
FWHM_FACTORS = {"wide-field": 0.51, "confocal": 0.37, "two-photon": 0.37}
SIGMA_PER_FWHM = 1.0 / (2.0 * np.sqrt(2.0 * np.log(2.0)))
# Gain and read-noise variance of one capture, over what was fitted on real pairs of confocal, two-photon and wide-field
# microscopes (FMD, Zhang et al. 2019; W2S, Zhou et al. 2020).
GAIN_RANGE = (0.002, 0.08)
READ_NOISE_RANGE = (0.0, 0.01)


@dataclass(frozen=True)
class Degradation:
    """One way to see an expected image: blur, then points `scale` pixels apart, then photon and read noise averaged
    over captures, then the detector's range and bits (None: neither clipped nor quantised)."""

    sigma_px: float = 0.0
    scale: int = 1
    shift: tuple[float, float] = (0.0, 0.0)
    a: float = 0.0
    b: float = 0.0
    averages: int = 1
    bits: int | None = None


def degrade(unit: np.ndarray, how: Degradation, rng: np.random.Generator) -> np.ndarray:
    """(..., H, W) unit images -> (..., H / scale, W / scale) as `how` tells, float32.

    Arguments and errors are those of `blur`, `point_sample`, `poisson_gaussian` and `quantise`.
    """
    seen = point_sample(blur(unit, how.sigma_px), how.scale, how.shift)
    noisy = poisson_gaussian(seen, how.a, how.b, rng, how.averages)
    return noisy if how.bits is None else quantise(noisy, how.bits)


def modality_key(modality: str) -> str:
    """A modality's name without case, spaces and hyphens."""
    return "".join(letter for letter in str(modality).lower() if letter.isalpha())


_FACTOR_OF_KEY = {modality_key(name): factor for name, factor in FWHM_FACTORS.items()}


def fwhm_um(modality: str, NA: float, wavelength_nm: float) -> float:
    """Lateral full width at half maximum of the emission PSF, in micrometres.

    0.51 lambda / NA for wide-field, 0.37 lambda / NA for confocal and two-photon (emission wavelength);
    case, spaces and hyphens in `modality` do not matter. Raises UserError for an unknown modality or
    for values that are not positive.
    """
    factor = _FACTOR_OF_KEY.get(modality_key(modality))
    if factor is None:
        raise UserError(f"modality {modality!r} is not known; expected one of {', '.join(FWHM_FACTORS)}")
    if not (NA > 0 and wavelength_nm > 0):
        raise UserError(f"NA {NA} and lambda {wavelength_nm} nm do not describe an objective; give positive numbers")
    return factor * (wavelength_nm / 1000.0) / NA


def gaussian_psf_sigma_px(fwhm_um: float, um_pixel: float) -> float:
    """Standard deviation in pixels of the Gaussian whose full width at half maximum is `fwhm_um`."""
    if not um_pixel > 0:
        raise UserError(f"um_pixel is {um_pixel}; expected the pixel size in micrometres, a positive number")
    return fwhm_um * SIGMA_PER_FWHM / um_pixel


def blur(unit: np.ndarray, sigma_px: float) -> np.ndarray:
    """(..., H, W) images convolved with a Gaussian of `sigma_px` pixels, mirrored at the border; float32."""
    if sigma_px <= 0:
        return np.array(unit, np.float32)
    # Four sigma to each side: the tail that is cut off holds less than 1e-4 of the light.
    side = 2 * int(np.ceil(4.0 * sigma_px)) + 1
    return _each(lambda i: cv2.GaussianBlur(i, (side, side), float(sigma_px), borderType=cv2.BORDER_REFLECT_101), unit)


def poisson_gaussian(unit: np.ndarray, a: float, b: float, rng: np.random.Generator, averages: int = 1) -> np.ndarray:
    """One capture of the expected image `unit`, or the mean of `averages` captures; float32, not clipped.

    The mean is `unit`, the variance (a * unit + b) / averages: `a` is the gain (unit intensity of one
    photo-electron) and `b` the read-noise variance (Foi et al. 2008, eq. 1-3). Negative intensities emit no
    photons. Raises UserError for negative `a` or `b`, or `averages` below 1.
    """
    if not (a >= 0 and b >= 0 and averages >= 1):
        raise UserError(f"noise a={a}, b={b}, averages={averages}: expected a >= 0, b >= 0, averages >= 1")
    noisy = np.array(unit, np.float32)
    if a > 0:
        # The sum of N Poisson captures is itself Poisson, so one draw stands for the whole average.
        electron = a / averages
        noisy = (rng.poisson(np.maximum(noisy, 0) / electron) * electron).astype(np.float32)
    if b > 0:
        noisy += rng.standard_normal(noisy.shape, np.float32) * np.float32(np.sqrt(b / averages))
    return noisy


def point_sample(unit: np.ndarray, scale: int, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(..., H, W) -> (..., H // scale, W // scale): the value at the centre of each low-resolution pixel.

    Points, not areas: a scanning microscope with a coarser grid does not average. `shift` = (dy, dx) in
    high-resolution pixels moves the sampling points (misregistration). Between pixels the value is bicubic;
    with shift = -(scale - 1) / 2 on both axes the result is unit[::scale, ::scale]. `upsample` of the result
    lies on `unit` without a shift. Raises UserError if a side is not a multiple of `scale`.
    """
    height, width = unit.shape[-2:]
    if scale == 1 and tuple(shift) == (0.0, 0.0):
        return np.array(unit, np.float32)
    if scale < 1 or height % scale or width % scale:
        raise UserError(f"an image of {height} x {width} cannot be sampled at scale {scale}; use a divisor")
    centre = (scale - 1) / 2.0
    y = np.arange(height // scale, dtype=np.float32) * scale + np.float32(centre + shift[0])
    x = np.arange(width // scale, dtype=np.float32) * scale + np.float32(centre + shift[1])
    map_x, map_y = np.meshgrid(x, y)
    return _each(lambda i: cv2.remap(i, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101), unit)


def quantise(unit: np.ndarray, bits: int) -> np.ndarray:
    """Unit image as a detector of `bits` bits stores it: clipped to [0, 1], 2**bits levels; float32."""
    if not 1 <= bits <= 16:
        raise UserError(f"bits is {bits}; expected 1 to 16, for example 8, 12 or 16")
    levels = np.float32(2**bits - 1)
    return np.rint(np.clip(unit, 0.0, 1.0).astype(np.float32) * levels) / levels


def upsample(unit: np.ndarray, scale: int) -> np.ndarray:
    """(..., H, W) -> (..., H * scale, W * scale) by bicubic interpolation, clipped to [0, 1]; float32."""
    height, width = unit.shape[-2:]
    size = (width * scale, height * scale)
    return np.clip(_each(lambda i: cv2.resize(i, size, interpolation=cv2.INTER_CUBIC), unit), 0.0, 1.0)


def _each(work: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """`work`, which takes an (H, W) image, on a stack of them; OpenCV's filters take at most four at once."""
    images = np.asarray(images, np.float32)
    if images.ndim == 2:
        return work(images)
    made = np.stack([work(image) for image in images.reshape(-1, *images.shape[-2:])])
    return made.reshape(*images.shape[:-2], *made.shape[1:])


def area_mean(image: np.ndarray, scale: int) -> np.ndarray:
    """(H, W) -> (H // scale, W // scale), the mean of scale x scale pixels, float64; what remains at the far sides is
    left out."""
    height, width = image.shape[0] // scale, image.shape[1] // scale
    blocks = image[: height * scale, : width * scale].reshape(height, scale, width, scale)
    return blocks.mean(axis=(1, 3), dtype=np.float64)
