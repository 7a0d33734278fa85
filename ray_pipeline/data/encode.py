"""Ray Data job: tiles and their hints -> latent shards. One row of the job is one shard, encoded in an actor.

A shard's bytes depend only on its tiles, the autoencoder and the hint settings, so a job that was cut off goes on
with the shards that are not there yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import ray.data
import torch

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, read_stats
from ray_pipeline.data.listing import Listing
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.shards import shard_is_whole, write_shard
from ray_pipeline.data.tile_encoder import Request, TileEncoder
from ray_pipeline.data.tile_table import TileTable, write_tile_table
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import Autoencoder
from ray_pipeline.storage import Folder

#: tables of tiles in the folder of a split: of the rows that are stored, and of those that data.mode tiles streams
STORED_TILES, STREAMED_TILES = "tiles.arrow", "streamed_tiles.arrow"


def fingerprint(job: EncodeJob, listing: Listing, autoencoder: Autoencoder) -> str:
    """sha256 of manifests, autoencoder weights, and every setting that changes a stored byte."""
    skipped = ("root", "store", "autoencoder", "batch_size")
    settings = {k: v for k, v in dataclasses.asdict(job).items() if k not in skipped}
    parts = [FORMAT_VERSION, settings, listing.fingerprint, autoencoder.fingerprint()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_store(job: EncodeJob, expected: str) -> bool:
    """True when a finished store with this fingerprint is there; UserError when it is another one.

    False also when an index, a table of tiles or a shard of it is gone, or a shard cut short, so that `encode` makes
    them again.
    """
    store = Folder(job.store)
    if store.size("stats.json") < 0:
        return False
    found = read_stats(store).fingerprint
    if found != expected:
        raise UserError(
            f"{job.store} was encoded from other tiles, autoencoder or hint settings (fingerprint {found[:12]}, "
            f"expected {expected[:12]}); run `ray-pipeline encode --overwrite` or set data.latents to another folder"
        )
    tables = [(split, STORED_TILES) for split in SPLITS]
    if job.sample_rows is not None:
        tables.append(("train", STREAMED_TILES))
    if any(store.child(split).size(name) < 0 for split, name in tables):
        return False
    try:
        return not any(LatentStore.open(store.child(split)).missing() for split in SPLITS)
    except UserError:
        return False


def stored_tiles(job: EncodeJob, listing: Listing) -> Listing:
    """The tiles whose latents are stored: all of them, or job.sample_rows of each data set and split."""
    return listing if job.sample_rows is None else listing.thinned(job.sample_rows)


def encode(
    job: EncodeJob,
    listing: Listing,
    expected: str,
    *,
    actors: int,
    gpus_per_actor: float,
    progress: Callable[[int], None],
) -> LatentStats:
    """Encode what is missing with `actors` autoencoder actors on the Ray that is running; returns the statistics.

    progress is called with the number of tiles just stored.
    """
    store, stored = Folder(job.store), stored_tiles(job, listing)
    # the mark of a finished store: from the first new shard on, this is none
    store.remove(["stats.json"])
    for split in SPLITS:
        write_tile_table(store.child(split), STORED_TILES, stored.rows[split], stored.datasets[split])
    if job.sample_rows is not None:
        write_tile_table(store.child("train"), STREAMED_TILES, listing.rows["train"], listing.datasets["train"])
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    counts = {split: len(rows) for split, rows in stored.rows.items()}
    with closing(_shard_records(job, counts, expected, actors, gpus_per_actor)) as made:
        for split, record in made:
            records[split].append(record)
            progress(record["rows"])
    for split, shards in records.items():
        shards.sort(key=_number)  # sums of floats depend on their order, too
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": expected,
            "shape": job.shape,
            "hints": job.hints,
            "simulated": job.simulated,
            "variants": job.variants,
            "datasets": [dataclasses.asdict(entry) for entry in stored.datasets[split]],
            "shards": [{key: shard[key] for key in ("file", "rows", "bytes", "sha256")} for shard in shards],
        }
        _write_json(store.child(split), "index.json", index)
        _remove_strays(store.child(split), shards)
    stats = _statistics(records["train"], expected)
    _write_json(store, "stats.json", stats.as_json())
    return stats


def verify(store: str) -> int:
    """Check every shard of every split against its hash; returns how many there are, UserError names the bad ones.

    A table of tiles that does not open is a UserError as well.
    """
    bad, count = [], 0
    for split in SPLITS:
        opened = LatentStore.open(Folder(store).child(split))
        for name in {STORED_TILES, STREAMED_TILES}.intersection(opened.folder.names()):
            TileTable(opened.folder, name)
        bad += [opened.folder.where(name) for name in opened.verify()]
        count += len(opened.index["shards"])
    if bad:
        raise UserError(
            f"{len(bad)} latent shards are missing or damaged, first {bad[0]}; run `ray-pipeline encode --overwrite`"
        )
    return count


class ShardEncoder:
    """Ray actor: holds the autoencoder, turns rows of {"split", "shard"} into files."""

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
        """The shard's record, or what is wrong with its tiles: Ray keeps no cause of an error that a task raises."""
        try:
            return json.dumps(self._encode(split, number))
        except UserError as error:
            return json.dumps({"wrong": str(error)})

    def _encode(self, split: str, number: int) -> dict:
        folder = Folder(self.job.store).child(split)
        if split not in self.tables:
            self.tables[split] = TileTable(folder, STORED_TILES)
        table = self.tables[split]
        first = number * self.job.shard_rows
        rows = table.rows(np.arange(first, min(first + self.job.shard_rows, len(table))))
        values = self.encoder.encode([Request(row, range(self.job.variants), self.job.columns) for row in rows])
        latents = [values[row, :, 0] for row in range(len(rows))]
        record = write_shard(folder, _shard_file(number), values) | {
            "count": sum(latent.size // latent.shape[1] for latent in latents),
            "sum": sum(latent.sum(axis=(0, 2, 3), dtype=np.float64) for latent in latents).tolist(),
            "square": sum(np.square(latent, dtype=np.float64).sum(axis=(0, 2, 3)) for latent in latents).tolist(),
            "fingerprint": self.expected,
        }
        _write_json(folder, _record_file(number), record)
        return record


def _shard_records(
    job: EncodeJob, counts: dict[str, int], expected: str, actors: int, gpus: float
) -> Iterator[tuple[str, dict]]:
    """Split and record of every shard, those already stored first; one pool of actors encodes all splits."""
    todo = []
    for split in SPLITS:
        for number in range(-(-counts[split] // job.shard_rows)):
            record = _stored_record(Folder(job.store).child(split), number, expected)
            if record:
                yield split, record
            else:
                todo.append({"split": split, "shard": number})
    if not todo:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    encoded = dataset.map_batches(
        ShardEncoder,
        fn_constructor_args=(job, expected, gpus > 0),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(todo)))),
    )
    for row in encoded.iter_rows():
        record = json.loads(row["record"])
        if "wrong" in record:
            raise UserError(record["wrong"])
        yield row["split"], record


def _stored_record(folder: Folder, number: int, expected: str) -> dict | None:
    """What was recorded of a shard that is there and whole, else None."""
    try:
        record = json.loads(folder.read(_record_file(number)))
    except (FileNotFoundError, ValueError):
        return None
    same = record.get("fingerprint") == expected and shard_is_whole(folder, record["file"], record["sha256"])
    return record if same else None


def _shard_file(number: int) -> str:
    return f"shard-{number:05d}.npy"


def _record_file(number: int) -> str:
    return f"shard-{number:05d}.json"


def _statistics(shards: Sequence[dict], expected: str) -> LatentStats:
    tiles, count = (sum(shard[key] for shard in shards) for key in ("rows", "count"))
    mean = np.sum([shard["sum"] for shard in shards], axis=0) / count
    variance = np.sum([shard["square"] for shard in shards], axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    if (std < 1e-6).any():
        dead = np.flatnonzero(std < 1e-6).tolist()
        raise UserError(
            f"latent channels {dead} are constant over all training tiles; check the tiles and vae.pretrained"
        )
    return LatentStats(mean=mean, std=std, count=tiles, fingerprint=expected)


def _write_json(folder: Folder, name: str, value: dict) -> None:
    folder.write(name, (json.dumps(value) + "\n").encode())


def _number(record: dict) -> int:
    # by number: the sixth digit of the millionth shard would spoil the order of names
    return int(record["file"].removeprefix("shard-").removesuffix(".npy"))


def _remove_strays(folder: Folder, shards: Sequence[dict]) -> None:
    """Delete shards and records that the index does not name, left by another shard size, and the pieces of a kill."""
    kept = {name for shard in shards for name in (shard["file"], _record_file(_number(shard)))}
    folder.remove(
        name
        for name in folder.names()
        if (name.startswith("shard-") and name not in kept) or (name.startswith(".") and name.endswith(".tmp"))
    )
