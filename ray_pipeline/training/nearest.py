"""Which stored tile is nearest to a sample: near ones show that a network has memorised them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.listing import spread

_BATCH = 256


@dataclass(frozen=True)
class Nearest:
    """For each sample the row and the augmentation variant of its nearest tile (N,), and their root-mean-square
    distance (N,), in standard deviations of the latents; of `searched` tiles, every variant being one."""

    rows: np.ndarray
    variants: np.ndarray
    distances: np.ndarray
    searched: int


def nearest(store: LatentStore, latents: np.ndarray, limit: int) -> Nearest:
    """Search at most `limit` tiles, evenly spread over the store and their variants, for latents (N, C, H, W) as the
    autoencoder knows them."""
    tiles = spread(len(store) * store.variants, limit)
    wanted = torch.from_numpy(store.stats.normalise(latents, 1.0)).flatten(1)
    best = torch.full((len(wanted),), torch.inf)
    found = torch.zeros(len(wanted), dtype=torch.int64)
    for start in range(0, len(tiles), _BATCH):
        taken = tiles[start : start + _BATCH]
        latents = store.gather(taken // store.variants, taken % store.variants, hints=())["latent"]
        stored = torch.from_numpy(store.stats.normalise(latents, 1.0)).flatten(1)
        distances, places = torch.cdist(wanted, stored).min(dim=1)
        closer = distances < best
        best = torch.where(closer, distances, best)
        found = torch.where(closer, torch.from_numpy(taken)[places], found)
    rows, variants = np.divmod(found.numpy(), store.variants)
    return Nearest(rows, variants, (best / wanted.shape[1] ** 0.5).numpy(), len(tiles))
