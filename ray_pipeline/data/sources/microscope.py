"""Simulated microscopes: the objective and detector of a field, and what they make of a specimen."""

from dataclasses import dataclass

import numpy as np

from ray_pipeline.data.optics import (
    FWHM_FACTORS,
    blur,
    fwhm_um,
    gaussian_psf_sigma_px,
    point_sample,
    poisson_gaussian,
    quantise,
)
from ray_pipeline.data.sources.specimen_geometry import broad_blur, log_uniform, smooth_noise

EMISSION_NM = {
    "nuclei": (461, 603),
    "membranes": (519, 565),
    "filaments": (519, 565, 603),
    "puncta": (519, 603, 668),
}
# Objective NA and the pixel size it is used with (micrometres in the specimen).
OBJECTIVES = ((0.4, 0.645), (0.75, 0.323), (0.95, 0.1625), (1.3, 0.108), (1.4, 0.08))
OBJECTIVE_ODDS = {
    "nuclei": (0.25, 0.35, 0.2, 0.15, 0.05),
    "membranes": (0.1, 0.35, 0.3, 0.2, 0.05),
    "filaments": (0.0, 0.1, 0.25, 0.35, 0.3),
    "puncta": (0.0, 0.3, 0.3, 0.25, 0.15),
}
# Ranges of (a, b) in var = a x + b, x counted from darkness, fitted on real pairs (FMD, W2S); log-uniform.
NOISE_RANGES = {
    "wide-field": ((0.002, 0.04), (5e-4, 1e-2)),
    "confocal": ((0.03, 0.08), (1e-5, 2e-3)),
    "two-photon": ((0.02, 0.08), (1e-5, 2e-3)),
}
# Camera counts: the dark level, and the counts between unit 0 and unit 1 in each channel. Unit 0 lies below
# the dark level by PEDESTAL, so that the noise of an empty background keeps both its sides.
CAMERA_OFFSET = 400.0
CAMERA_SPAN = {"nuclei": 9600.0, "membranes": 6400.0, "filaments": 8000.0, "puncta": 6400.0}
PEDESTAL = 0.1


@dataclass(frozen=True)
class Optics:
    """How a field was taken: modality, numerical aperture, emission (nm) and pixel size (micrometres)."""

    modality: str
    NA: float
    wavelength_nm: int
    um_pixel: float

    @property
    def sigma_px(self) -> float:
        """Standard deviation of the Gaussian PSF in pixels."""
        return gaussian_psf_sigma_px(fwhm_um(self.modality, self.NA, self.wavelength_nm), self.um_pixel)


def draw_optics(rng: np.random.Generator, stain: str) -> Optics:
    """Microscope of one field."""
    modality = str(rng.choice(list(FWHM_FACTORS), p=(0.5, 0.4, 0.1)))
    NA, um_pixel = OBJECTIVES[rng.choice(len(OBJECTIVES), p=OBJECTIVE_ODDS[stain])]
    return Optics(modality, NA, int(rng.choice(EMISSION_NM[stain])), um_pixel)


def illumination(rng: np.random.Generator, size: int, drop: float) -> np.ndarray:
    """Field of at most 1 that falls by about `drop` from an off-centre maximum to the far corner."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x0, y0 = rng.uniform(-0.5, 0.5, 2)
    return 1.0 - drop * ((axis[None] - x0) ** 2 + (axis[:, None] - y0) ** 2) / 4.5


def expected_image(rng: np.random.Generator, focus: np.ndarray, defocus: np.ndarray, optics: Optics) -> np.ndarray:
    """Noise-free unit image (size, size) of a specimen, given as its label in focus and out of focus."""
    size = focus.shape[0]
    wide = optics.modality == "wide-field"
    # Specimens are rarely matched to the immersion: the real spot is up to half again as wide.
    sigma = optics.sigma_px * rng.uniform(1.0, 1.5)
    seen = blur(focus, sigma)
    seen += blur(defocus, sigma + rng.uniform(0.3, 1.2) / optics.um_pixel) * (1.0 if wide else 0.35)
    seen += broad_blur(focus + defocus, rng.uniform(2, 6) / optics.um_pixel) * (
        rng.uniform(0.1, 0.45) if wide else rng.uniform(0.01, 0.08)
    )
    seen /= max(float(np.quantile(seen, 0.999)), 1e-6)
    seen *= log_uniform(rng, 0.35, 0.85)
    autofluorescence = rng.uniform(0.005, 0.05) if wide else rng.uniform(0.001, 0.015)
    seen += autofluorescence * np.exp(0.3 * smooth_noise(rng, size, size / 4.0))
    seen *= illumination(rng, size, rng.uniform(0.05, 0.4) if wide else rng.uniform(0.0, 0.15))
    return PEDESTAL + seen


def low_resolution(rng: np.random.Generator, expected: np.ndarray, optics: Optics, scale: int):
    """Expected image seen with a smaller aperture and sampled at points `scale` pixels apart; and its Optics.

    The aperture is chosen so that the PSF is 0.6 to 1.1 low-resolution pixels wide.
    """
    um_pixel = optics.um_pixel * scale
    sharp = fwhm_um(optics.modality, optics.NA, optics.wavelength_nm)
    wanted = max(rng.uniform(0.6, 1.1) * um_pixel, 1.1 * sharp)
    coarse = Optics(optics.modality, round(optics.NA * sharp / wanted, 4), optics.wavelength_nm, um_pixel)
    sigma = coarse.sigma_px * scale
    extra = np.sqrt(max(sigma**2 - optics.sigma_px**2, 0.0))
    return point_sample(blur(expected, extra), scale, tuple(rng.normal(0, 0.25, 2))), coarse


def draw_noise(rng: np.random.Generator, modality: str) -> tuple[float, float]:
    """Gain a and read-noise variance b of one detector."""
    (a_range, b_range) = NOISE_RANGES[modality]
    return log_uniform(rng, *a_range), log_uniform(rng, *b_range)


def capture(expected: np.ndarray, a: float, b: float, rng, averages: int, bits: int) -> np.ndarray:
    """Unit image that the camera gives for `expected`: photon noise above the dark level, read noise, bits."""
    return quantise(PEDESTAL + poisson_gaussian(expected - PEDESTAL, a, b, rng, averages), bits)
