"""Randomness of training as a pure function of (seed, phase, n); n is a sample's index in the endless sequence.

Made on the host by numpy's counter-based Philox (Salmon et al. 2011), one stream a sample, so that neither batch
size, rank, number of workers nor kind of device changes a bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draws:
    """Random numbers of B samples: z (B,) standard normal for sigma, noise (B, ...) standard normal, keep (B,) uniform
    in [0, 1), order (B, K) uniform in [0, 1); all float32. All but `order` are the same for any K."""

    z: np.ndarray
    noise: np.ndarray
    keep: np.ndarray
    order: np.ndarray


def draw(seed: int, phase: str, indices: Sequence[int], shape: Sequence[int], hints: int = 0) -> Draws:
    """Draws of the samples at `indices` for latents of `shape` (C, H, W)."""
    key = stream_key(seed, phase)
    count = len(indices)
    draws = Draws(
        z=np.empty(count, np.float32),
        noise=np.empty((count, *shape), np.float32),
        keep=np.empty(count, np.float32),
        order=np.empty((count, hints), np.float32),
    )
    for row, index in enumerate(indices):
        generator = sample_generator(key, int(index))
        draws.z[row] = generator.standard_normal(dtype=np.float32)
        draws.keep[row] = generator.random(dtype=np.float32)
        generator.standard_normal(dtype=np.float32, out=draws.noise[row])
        draws.order[row] = generator.random(hints, dtype=np.float32)
    return draws


def stream_key(seed: int, phase: str) -> int:
    """128-bit Philox key of a phase."""
    return int.from_bytes(hashlib.blake2b(repr((int(seed), phase)).encode(), digest_size=16).digest(), "little")


def sample_generator(key: int, index: int) -> np.random.Generator:
    """The generator of sample `index`; 2^192 counter values lie between neighbours."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


def kept_hints(draws: Draws, dropout: float) -> np.ndarray:
    """Which hints a sample keeps, (B, K) bool: none with probability `dropout`, else a random non-empty subset.

    The subset's size is uniform in 1..K, so that every hint is often alone.
    """
    count, hints = draws.order.shape
    if not hints:
        return np.zeros((count, 0), dtype=bool)
    kept = np.clip((draws.keep - dropout) / max(1 - dropout, 1e-9), 0, 1 - 1e-7)
    size = np.where(draws.keep < dropout, 0, 1 + np.floor(kept * hints).astype(np.int64))
    rank = draws.order.argsort(axis=1).argsort(axis=1)
    return rank < size[:, None]
