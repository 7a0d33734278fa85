"""Condition hints: images computed from a tile or taken from its partner on disk, aligned with the tile.

A hint is one function: a Tile, then its parameters as keyword-only arguments with annotations and defaults, which are
the keys of `data.hints.<name>`; it returns an (H, W) image in [-1, 1]. It goes through the same autoencoder as the tile
and carries no label. Another package adds one through the entry points `ray_pipeline.hints`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import cv2
import numpy as np
from pydantic import AfterValidator, Field

from ray_pipeline.data import optics
from ray_pipeline.errors import UserError
from ray_pipeline.sections import Fraction, Positive


@dataclass(frozen=True)
class Tile:
    """What a hint is made of. pixels, partner: (H, W) float32 in [-1, 1]; partner: the image on disk that pairs with
    the tile, turned like it, or None. rng: keyed by hint, tile and variant. psf_fwhm_px: how wide the tile's own
    microscope sees a point, 0 where the manifest does not tell."""

    pixels: np.ndarray
    partner: np.ndarray | None
    rng: np.random.Generator
    psf_fwhm_px: float = 0.0
    unit: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", _unit(self.pixels))


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= values[0] <= values[1]:
        raise ValueError(f"expected two numbers from 0 up, the smaller one first, found {list(values)}")
    return values


def _some(values: tuple) -> tuple:
    if not values:
        raise ValueError("expected at least one entry")
    return values


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]
Counts = Annotated[tuple[Positive, ...], AfterValidator(_some)]
Bits = Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], AfterValidator(_some)]
Scales = Annotated[tuple[Literal[2, 4, 8], ...], AfterValidator(_some)]


def super_resolution(
    tile: Tile,
    *,
    simulated_share: Fraction = 0.0,
    scales: Scales = (4,),
    psf_fwhm: Range = (0.8, 1.2),
    shift: Annotated[float, Field(ge=0, le=2)] = 0.5,
    a: Range = (optics.GAIN_RANGE[0], 0.02),
    b: Range = (0.0, 2e-4),
    averages: Counts = (1,),
    bits: Bits = (8, 12, 16),
) -> np.ndarray:
    """The low-resolution partner, bicubic at the tile's size; without one, PSF blur, point samples and fresh noise.

    simulated_share: of the tiles with a partner, the share that is simulated all the same. psf_fwhm: of the coarse
    microscope, in low-resolution pixels; what the tile's own PSF blurs already is taken off. shift: misregistration of
    at most so many pixels of the tile.
    """
    if tile.partner is not None and tile.rng.random() >= simulated_share:
        small = _unit(tile.partner)
        scale = tile.pixels.shape[0] // max(1, small.shape[0])
        if scale < 1 or (small.shape[0] * scale, small.shape[1] * scale) != tile.pixels.shape:
            raise UserError(
                f"a low-resolution partner of {_size(small)} px does not divide its tile of {_size(tile.pixels)} px; "
                "check pair_id in the degraded manifest"
            )
        return 2 * optics.upsample(small, scale) - 1
    scale = int(tile.rng.choice(scales))
    wanted = scale * float(tile.rng.uniform(*psf_fwhm))
    extra = np.sqrt(max(wanted**2 - tile.psf_fwhm_px**2, 0.0)) * optics.SIGMA_PER_FWHM
    moved = tuple(float(s) for s in tile.rng.uniform(-shift, shift, size=2))
    how = _noise(tile.rng, a, b, averages, bits, sigma_px=extra, scale=scale, shift=moved)
    small = optics.degrade(tile.unit, how, tile.rng)
    return 2 * optics.upsample(small, scale) - 1


def denoising(
    tile: Tile,
    *,
    simulated_share: Fraction = 0.0,
    a: Range = optics.GAIN_RANGE,
    b: Range = optics.READ_NOISE_RANGE,
    averages: Counts = (1,),
    bits: Bits = (8, 12, 16),
) -> np.ndarray:
    """The noisy partner; without one, Poisson-Gaussian noise in the range measured on real microscopes.

    simulated_share as in super_resolution. Noise variance is (a x + b) / averages, x in [0, 1]; a is drawn
    log-uniformly, b uniformly, averages and bits from their lists.
    """
    if tile.partner is not None and tile.rng.random() >= simulated_share:
        if tile.partner.shape != tile.pixels.shape:
            raise UserError(
                f"a noisy partner of {_size(tile.partner)} px belongs to a tile of {_size(tile.pixels)} px; both must "
                "have one size, check pair_id in the degraded manifest"
            )
        return tile.partner
    return 2 * optics.degrade(tile.unit, _noise(tile.rng, a, b, averages, bits), tile.rng) - 1


def canny(
    tile: Tile,
    *,
    sigma: Annotated[float, Field(ge=0, le=32)] = 1.4,
    percentile: Annotated[float, Field(gt=0, lt=100)] = 90.0,
    floor: Annotated[float, Field(gt=0, le=255)] = 20.0,
    low_ratio: Annotated[float, Field(gt=0, le=1)] = 0.4,
) -> np.ndarray:
    """Canny edges (cv2.Canny on the normalised tile, smoothed by sigma pixels): -1 background, 1 edge.

    The upper threshold is that percentile of the gradient, but never below `floor` grey levels of 255, so that an empty
    tile gives no edges; the lower one is low_ratio of it.
    """
    smooth = np.round(255 * optics.blur(tile.unit, sigma)).astype(np.uint8)
    gradient = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    high = max(floor, float(np.percentile(gradient, percentile)))
    return cv2.Canny(smooth, low_ratio * high, high, L2gradient=True).astype(np.float32) / 127.5 - 1


def depth(tile: Tile, *, model: str | None = None) -> np.ndarray:
    """Depth from focus, where the source was a z-stack (the partner that `prepare` wrote); else a named stand-in.

    model: a Hugging Face depth-estimation model, as a local folder or a hub id (extra `depth`). Without one,
    `pseudo_depth`: one slice holds no physical depth.
    """
    if tile.partner is not None:
        if tile.partner.shape != tile.pixels.shape:
            raise UserError(
                f"a depth map of {_size(tile.partner)} px belongs to a tile of {_size(tile.pixels)} px; both must have "
                "one size, check pair_id in the degraded manifest"
            )
        return tile.partner
    if model is None:
        return pseudo_depth(tile.unit)
    from ray_pipeline.models.depth import load_depth_model  # transformers is an extra, and takes seconds to import

    return 2 * load_depth_model(model).estimate(tile.unit) - 1


def pseudo_depth(unit: np.ndarray) -> np.ndarray:
    """Smoothed relief of brightness on a logarithmic scale, (H, W) in [-1, 1]: it stands in the place of depth as a
    coarse layout, and says so by its name."""
    relief = np.log1p(20 * optics.blur(unit, unit.shape[0] / 40)) / np.log(21)
    return np.clip(2 * relief - 1, -1, 1)


#: those that come with the package, by the names of sections.CONDITION_TYPES
HINTS: dict[str, Callable[..., np.ndarray]] = {
    "super_resolution": super_resolution,
    "denoising": denoising,
    "canny": canny,
    "depth": depth,
}


def hint_generator(name: str, sample_id: str, variant: int) -> np.random.Generator:
    """What a hint of one tile in one augmentation variant may draw from: Philox keyed by the three."""
    digest = hashlib.blake2b(repr((name, sample_id, variant)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def choose_partner(hint: str, sample_id: str, variant: int, count: int) -> int:
    """Which of a tile's `count` partners a variant takes: another one for each variant while there are enough."""
    return int(hint_generator(f"partner.{hint}", sample_id, 0).permutation(count)[variant % count])


def dihedral(image: np.ndarray, variant: int) -> np.ndarray:
    """Augmentation variant 0 to 7: quarter turns, mirrored from 4 on. Acts on pixels, tile and partner alike."""
    turned = np.rot90(image, variant % 4)
    return np.ascontiguousarray(turned[:, ::-1] if variant >= 4 else turned)


def _noise(rng: np.random.Generator, a, b, averages, bits, **optical) -> optics.Degradation:
    low, high = a
    drawn = {"a": float(np.exp(rng.uniform(np.log(low), np.log(high)))) if low > 0 else float(rng.uniform(low, high))}
    drawn |= {"b": float(rng.uniform(*b)), "averages": int(rng.choice(averages)), "bits": int(rng.choice(bits))}
    return optics.Degradation(**optical, **drawn)


def _unit(tile: np.ndarray) -> np.ndarray:
    return ((tile + 1) / 2).astype(np.float32)


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))
