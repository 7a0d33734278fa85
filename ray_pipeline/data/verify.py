"""Does a latent store hold what the autoencoder makes of its tiles? Encodes a sample again and compares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_pipeline.data.encode import STORED_TILES
from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.rejected import in_words
from ray_pipeline.data.tile_encoder import TileEncoder
from ray_pipeline.data.tile_reader import Request
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

#: rows that are encoded again, beginning at the start of a shard so that the autoencoder gets the same batches
SAMPLE_SHARDS, SAMPLE_ROWS = 4, 2
#: another device or thread count rounds otherwise, by less than this share of a channel's std
TOLERANCE = 0.02


@dataclass(frozen=True)
class Comparison:
    """tiles: how many were encoded again. difference: the largest, as a share of its channel's std."""

    tiles: int
    difference: float


def compare_sample(job: EncodeJob, use_gpu: bool = False) -> Comparison:
    """Encode the first tiles of some shards of each split again; UserError where the store holds something else."""
    encoder = TileEncoder(job, use_gpu)
    largest, count = 0.0, 0
    for split in SPLITS:
        store = LatentStore.open(Folder(job.store).child(split))
        table = TileTable(store.folder, STORED_TILES)
        for first in _sampled_rows(store):
            rows = np.arange(first, min(first + SAMPLE_ROWS, len(store)))
            tiles = table.rows(rows)
            made, bad = encoder.encode([Request(tile, range(job.variants), job.columns) for tile in tiles])
            if bad:
                raise UserError(
                    f"{job.store}: tiles have become bad since they were encoded ({in_words([*bad.values()])}); "
                    "restore them, or remove the store and encode again"
                )
            stored = store.records(rows).astype(np.float32)
            apart = np.abs(stored - made.astype(np.float32)) / store.stats.std[:, None, None]
            worst = np.unravel_index(np.argmax(apart), apart.shape)
            if not apart[worst] <= TOLERANCE:
                raise UserError(
                    f"{store.folder}: {job.columns[worst[2]]} of {tiles[worst[0]].id} differs from what is stored by "
                    f"{apart[worst]:.3g} of the latents' std, expected at most {TOLERANCE}; remove "
                    f"{job.store} and run `ray-pipeline encode`, since --overwrite keeps what is whole by its hash"
                )
            largest, count = max(largest, float(apart[worst])), count + len(rows)
    return Comparison(count, largest)


def _sampled_rows(store: LatentStore) -> list[int]:
    """First rows of some shards, evenly spaced, that have rows."""
    starts = np.cumsum([0] + [shard["rows"] for shard in store.index["shards"]])
    filled = [int(start) for start, shard in zip(starts, store.index["shards"], strict=False) if shard["rows"]]
    chosen = np.linspace(0, len(filled) - 1, min(SAMPLE_SHARDS, len(filled))).round().astype(int)
    return [filled[index] for index in chosen]
