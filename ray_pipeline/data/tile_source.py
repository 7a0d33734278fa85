"""Latents of tiles that are encoded when they are asked for: what data.mode tiles reads in the place of a store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import column_names
from ray_pipeline.data.rejected import in_words
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.errors import UserError


class TileSource:
    """Rows of a table of tiles, encoded as `LatentStore` would have stored them. Cheap to pickle: the autoencoder is
    loaded where it is used."""

    def __init__(self, job: EncodeJob, table: TileTable, use_gpu: bool = False):
        self.job, self.table, self.use_gpu = job, table, use_gpu
        self._encoder = None

    def __reduce__(self):
        return TileSource, (self.job, self.table, self.use_gpu)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        return self.job.shape

    @property
    def variants(self) -> int:
        """Augmentation variants of every row."""
        return self.job.variants

    def gather(
        self, ids: Sequence[int], variants: Sequence[int], hints: Sequence[str], simulated: Sequence[bool]
    ) -> dict[str, np.ndarray]:
        """Rows `ids` -> {"latent": (B, C, H, W) fp16, "hint.<name>": same}; arguments as in `LatentStore.gather`.

        Equal calls give equal bits; another batch around a row may change its last bit of fp16.
        """
        # torch and the autoencoder take seconds to import, which actors that only gather stored rows can spare
        import torch

        from ray_pipeline.data.tile_encoder import TileEncoder
        from ray_pipeline.data.tile_reader import Request

        if self._encoder is None:
            torch.set_num_threads(1)
            self._encoder = TileEncoder(self.job, self.use_gpu)
        tile = column_names((), (), self.job.posterior)
        requests = [
            Request(row, (int(variant),), [*tile, *(self._column(hint, made) for hint in hints)])
            for row, variant, made in zip(self.table.rows(ids), variants, simulated, strict=True)
        ]
        values, bad = self._encoder.encode(requests)
        if bad:
            raise UserError(
                f"{len(bad)} of {len(requests)} tiles of a batch cannot be used ({in_words([*bad.values()])}); repair "
                "them, or use data.mode=latents, which leaves out as many as data.max_rejected before training"
            )
        names = (*tile, *(f"hint.{hint}" for hint in hints))
        return {name: np.ascontiguousarray(values[:, 0, column]) for column, name in enumerate(names)}

    def _column(self, hint: str, simulated: bool) -> str:
        return f"simulated.{hint}" if simulated and hint in self.job.simulated else f"hint.{hint}"
