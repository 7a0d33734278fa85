"""What decides the bytes of a latent store, as plain values that travel to Ray's actors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_pipeline.config import Config
from ray_pipeline.data.hint_registry import resolve_hints
from ray_pipeline.data.latents import column_names
from ray_pipeline.models.architectures import DOWNSCALE
from ray_pipeline.storage import Folder

#: tiles of each data set and split that data.mode tiles encodes beforehand: for statistics, validation and pictures
SAMPLE_ROWS = 4096


@dataclass(frozen=True)
class EncodeJob:
    """One data root, autoencoder and set of hints. root, store: paths or URIs.

    simulated: hints that are also made from the tile where it has a degraded partner. hint_settings: every parameter of
    every hint. posterior: `sample` stores the std of the tiles' latents beside their mean. sample_rows: so many tiles
    of each data set and split are stored, evenly spaced; None stores all. max_rejected: so many bad tiles may be left
    out.
    """

    root: str
    store: str
    tile_size: int
    hints: tuple[str, ...]
    simulated: tuple[str, ...]
    hint_settings: dict[str, dict[str, Any]]
    variants: int
    shard_rows: int
    sample_rows: int | None
    autoencoder: str
    precision: str
    posterior: str
    latent_channels: int
    batch_size: int
    max_rejected: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        side = self.tile_size // DOWNSCALE
        return (self.latent_channels, side, side)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the latents that are stored for every row and variant."""
        return column_names(self.hints, self.simulated, self.posterior)

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row: every variant of the tile and of each hint, fp16."""
        return int(np.prod(self.shape)) * 2 * self.variants * len(self.columns)


def encode_job(config: Config) -> EncodeJob:
    """The encode job that a config asks for."""
    pretrained = config.vae.pretrained
    folder = Path(pretrained).expanduser()
    sampled = config.data.mode == "tiles"
    root = Folder(config.data.root)
    beside = root.child("latents_sample" if sampled else "latents")
    store = Folder(config.data.latents) if config.data.latents else beside
    return EncodeJob(
        root=root.location,
        store=store.location,
        tile_size=config.data.tile_size,
        hints=config.hint_names,
        simulated=config.simulated_names,
        hint_settings=resolve_hints(config.data.hints, config.hint_names),
        variants=config.data.augment_variants,
        shard_rows=config.data.shard_rows,
        sample_rows=SAMPLE_ROWS if sampled else None,
        autoencoder=str(folder.absolute()) if folder.is_dir() else pretrained,  # workers change directory
        precision=config.vae.precision,
        posterior=config.vae.posterior,
        latent_channels=config.model.latent_channels,
        batch_size=config.vae.batch_size,
        max_rejected=config.data.max_rejected,
    )
