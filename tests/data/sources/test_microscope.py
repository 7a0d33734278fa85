"""Simulated microscopes: the partner's sampling is centred, the camera keeps both sides of its noise."""

import cv2
import numpy as np
import pytest

from ray_pipeline.data.optics import fwhm_um
from ray_pipeline.data.sources.microscope import Optics, capture, expected_image, low_resolution


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def test_a_low_resolution_partner_is_centred_on_average():
    expected = cv2.GaussianBlur(philox(9).standard_normal((128, 128)).astype(np.float32), (0, 0), 6) + 0.2
    optics = Optics("confocal", 1.3, 519, 0.108)
    shifts = []
    for index in range(12):
        small, coarse = low_resolution(philox(index), expected, optics, 4)
        assert small.shape == (32, 32)
        assert coarse.um_pixel == pytest.approx(4 * 0.108)
        assert 0.6 <= fwhm_um("confocal", coarse.NA, 519) / coarse.um_pixel <= 1.1001
        back = cv2.resize(small, (128, 128), interpolation=cv2.INTER_CUBIC)
        shift, _ = cv2.phaseCorrelate(expected[8:-8, 8:-8], back[8:-8, 8:-8])
        shifts.append(shift)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.3


def test_background_noise_keeps_both_its_sides():
    dark = capture(np.full((200, 200), 0.11, np.float32), 0.03, 5e-4, philox(1), 1, 16)
    assert (dark == 0).mean() < 1e-3
    assert dark.mean() == pytest.approx(0.11, abs=1e-3)


def test_a_confocal_section_has_less_haze_than_a_wide_field_image():
    focus, defocus = np.zeros((2, 128, 128), np.float32)
    focus[64, 64], defocus[20:44, 20:44] = 1.0, 0.01
    contrast = {}
    for modality in ("wide-field", "confocal"):
        seen = expected_image(philox(2), focus, defocus, Optics(modality, 1.3, 519, 0.108))
        assert seen.shape == (128, 128)
        contrast[modality] = (seen[64, 64] - seen[100, 100]) / (seen[32, 32] - seen[100, 100])
    assert contrast["confocal"] > 2 * contrast["wide-field"]
