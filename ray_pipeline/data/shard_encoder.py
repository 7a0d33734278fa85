"""Ray actor of the encode job: one row of the job is one shard, a file whose bytes depend on its tiles alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import torch

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.shards import shard_is_whole, write_shard
from ray_pipeline.data.tile_encoder import TileEncoder
from ray_pipeline.data.tile_reader import Request
from ray_pipeline.data.tile_table import TileTable
from ray_pipeline.errors import UserError
from ray_pipeline.storage import Folder

#: the table of all tiles of a split while they are encoded, the bad ones among them
LISTED_TILES = "listed_tiles.arrow"


class ShardEncoder:
    """Holds the autoencoder, turns rows of {"split", "shard"} into files."""

    def __init__(self, job: EncodeJob, expected: str, use_gpu: bool):
        torch.set_num_threads(1)
        self.job, self.expected = job, expected
        self.encoder = TileEncoder(job, use_gpu)
        self.tables: dict[str, TileTable] = {}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = list(zip(batch["split"].tolist(), batch["shard"].tolist(), strict=True))
        return {
            "split": batch["split"],
            "record": np.array([self._answer(split, number) for split, number in places], dtype=object),
        }

    def _answer(self, split: str, number: int) -> str:
        """The shard's record, or what is wrong with the job: Ray keeps no cause of an error that a task raises."""
        try:
            return json.dumps(self._encode(split, number))
        except UserError as error:
            return json.dumps({"wrong": str(error)})

    def _encode(self, split: str, number: int) -> dict:
        folder = Folder(self.job.store).child(split)
        if split not in self.tables:
            self.tables[split] = TileTable(folder, LISTED_TILES)
        table = self.tables[split]
        first = number * self.job.shard_rows
        rows = table.rows(np.arange(first, min(first + self.job.shard_rows, len(table))))
        values, bad = self.encoder.encode([Request(row, range(self.job.variants), self.job.columns) for row in rows])
        if bad:
            values = values[[row for row in range(len(rows)) if row not in bad]]
        record = write_shard(folder, shard_file(number), values) | _sums(values, self.job)
        record |= {"rejected": [asdict(wrong) for wrong in bad.values()], "fingerprint": self.expected}
        write_json(folder, record_file(number), record)
        return record


def _sums(values: np.ndarray, job: EncodeJob) -> dict:
    """Count, sum and sum of squares of the tiles' latents by channel, in the order of the rows; with a posterior, the
    squares are those expected of samples."""
    shape = (job.latent_channels,)
    total, square, count = np.zeros(shape), np.zeros(shape), 0
    for row in values:
        latent = row[:, 0]
        count += latent.size // latent.shape[1]
        total += latent.sum(axis=(0, 2, 3), dtype=np.float64)
        square += np.square(latent, dtype=np.float64).sum(axis=(0, 2, 3))
        if job.posterior == "sample":
            square += np.square(row[:, 1], dtype=np.float64).sum(axis=(0, 2, 3))
    return {"count": count, "sum": total.tolist(), "square": square.tolist()}


def stored_record(folder: Folder, number: int, expected: str) -> dict | None:
    """What was recorded of a shard that is there and whole, else None; also None where tiles were left out of it, since
    they may have been repaired."""
    try:
        record = json.loads(folder.read(record_file(number)))
    except (FileNotFoundError, ValueError):
        return None
    same = record.get("fingerprint") == expected and shard_is_whole(folder, record["file"], record["sha256"])
    return record if same and not record["rejected"] else None


def shard_file(number: int) -> str:
    """Name of a shard's file in the folder of its split."""
    return f"shard-{number:05d}.npy"


def record_file(number: int) -> str:
    """Name of what was recorded of a shard."""
    return f"shard-{number:05d}.json"


def shard_number(record: dict) -> int:
    """The number in the name of a record's shard; the sixth digit of the millionth would spoil the order of names."""
    return int(record["file"].removeprefix("shard-").removesuffix(".npy"))


def write_json(folder: Folder, name: str, value: dict) -> None:
    """Write plain values, whole or not at all."""
    folder.write(name, (json.dumps(value) + "\n").encode())
