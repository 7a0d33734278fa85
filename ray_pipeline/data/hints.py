"""Condition hints: images computed from a tile or taken from its degraded partner, aligned with the tile.

A hint goes through the same autoencoder as the tile and carries no label. `HINTS` maps each name to a function
(tile, partner, rng, settings) -> hint; all images are (H, W) float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import cv2
import numpy as np

from ray_pipeline.data import optics
from ray_pipeline.data.encode_job import HintSettings
from ray_pipeline.errors import UserError


def make_hint(
    name: str, tile: np.ndarray, partner: np.ndarray | None, sample_id: str, variant: int, settings: HintSettings
) -> np.ndarray:
    """One hint of one tile; equal arguments give equal pixels. `partner`, if any, is turned like the tile."""
    digest = hashlib.blake2b(repr((name, sample_id, variant)).encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    hint = HINTS[name](tile, partner, rng, settings)
    return np.ascontiguousarray(hint, dtype=np.float32)


def super_resolution(tile, partner, rng, settings) -> np.ndarray:
    """The low-resolution partner, bicubic at the tile's size; without one, PSF blur, point samples and fresh noise."""
    if partner is None:
        scale = settings.super_resolution_scale
        blurred = optics.blur(_unit(tile), 0.5 * scale * float(rng.uniform(0.7, 1.0)))
        shift = tuple(float(s) for s in rng.uniform(-0.5, 0.5, size=2))
        small = optics.point_sample(blurred, scale, shift)
        small = np.clip(optics.poisson_gaussian(small, _log_uniform(rng, 0.002, 0.02), 1e-4, rng), 0, 1)
    else:
        small, scale = _unit(partner), tile.shape[0] // partner.shape[0]
        if scale < 1 or (small.shape[0] * scale, small.shape[1] * scale) != tile.shape:
            raise UserError(
                f"a low-resolution partner of {small.shape[0]}x{small.shape[1]} px does not divide its tile of "
                f"{tile.shape[0]}x{tile.shape[1]} px; check pair_id in the degraded manifest"
            )
    return 2 * optics.upsample(small, scale) - 1


def denoising(tile, partner, rng, settings) -> np.ndarray:
    """The noisy partner; without one, Poisson-Gaussian noise in the range measured on real microscopes."""
    if partner is None:
        a, b = _log_uniform(rng, 0.002, 0.08), float(rng.uniform(0, 0.01))
        return 2 * np.clip(optics.poisson_gaussian(_unit(tile), a, b, rng), 0, 1) - 1
    if partner.shape != tile.shape:
        raise UserError(
            f"a noisy partner of {partner.shape[0]}x{partner.shape[1]} px belongs to a tile of "
            f"{tile.shape[0]}x{tile.shape[1]} px; both must have one size, check pair_id in the degraded manifest"
        )
    return partner


def canny(tile, partner, rng, settings) -> np.ndarray:
    """Canny edges (cv2.Canny on the smoothed, normalised tile): -1 background, 1 edge.

    The upper threshold is the 90th percentile of the gradient, but never below 20 grey levels of 255, so that an
    empty tile gives no edges.
    """
    smooth = np.round(255 * optics.blur(_unit(tile), 1.4)).astype(np.uint8)
    gradient = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    high = max(20.0, float(np.percentile(gradient, 90)))
    return cv2.Canny(smooth, 0.4 * high, high, L2gradient=True).astype(np.float32) / 127.5 - 1


def pseudo_depth(tile, partner, rng, settings) -> np.ndarray:
    """Smoothed relief of brightness on a logarithmic scale. One slice holds no physical depth: this stands in the
    place of depth as a coarse layout, and says so by its name."""
    relief = np.log1p(20 * optics.blur(_unit(tile), tile.shape[0] / 40)) / np.log(21)
    return np.clip(2 * relief - 1, -1, 1)


HINTS: dict[str, Callable[..., np.ndarray]] = {
    "super_resolution": super_resolution,
    "denoising": denoising,
    "canny": canny,
    "depth": pseudo_depth,
}


def dihedral(image: np.ndarray, variant: int) -> np.ndarray:
    """Augmentation variant 0 to 7: quarter turns, mirrored from 4 on. Acts on pixels, tile and partner alike."""
    turned = np.rot90(image, variant % 4)
    return np.ascontiguousarray(turned[:, ::-1] if variant >= 4 else turned)


def _unit(tile: np.ndarray) -> np.ndarray:
    return ((tile + 1) / 2).astype(np.float32)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
