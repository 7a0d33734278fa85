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
from dataclasses import dataclass

import numpy as np
import ray.data

from ray_pipeline.data.encode_job import EncodeJob
from ray_pipeline.data.hint_registry import hint_fingerprint
from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, read_stats
from ray_pipeline.data.listing import Listing
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.rejected import REJECTED_FILE, Rejected, in_words, rejected_csv
from ray_pipeline.data.shard_encoder import (
    LISTED_TILES,
    ShardEncoder,
    record_file,
    shard_number,
    stored_record,
    write_json,
)
from ray_pipeline.data.tile_table import TileTable, write_tile_table
from ray_pipeline.errors import UserError
from ray_pipeline.models.autoencoder import Autoencoder
from ray_pipeline.models.weights import AutoencoderHeader
from ray_pipeline.storage import Folder

#: tables of tiles in the folder of a split, without rejected ones: of the rows that are stored, and of those that
#: data.mode tiles streams
STORED_TILES, STREAMED_TILES = "tiles.arrow", "streamed_tiles.arrow"


@dataclass(frozen=True)
class Fingerprint:
    """What a store is recognised by: sha256 of manifests, autoencoder and every setting that changes a stored byte; and
    of the autoencoder alone."""

    store: str
    autoencoder: str


def fingerprint(job: EncodeJob, listing: Listing, autoencoder: Autoencoder) -> Fingerprint:
    """The fingerprint of the store that a job makes."""
    skipped = ("root", "store", "autoencoder", "batch_size", "max_rejected")
    settings = {k: v for k, v in dataclasses.asdict(job).items() if k not in skipped}
    settings["hint_settings"] = {name: hint_fingerprint(name, job.hint_settings[name]) for name in job.hints}
    weights = autoencoder.fingerprint()
    parts = [FORMAT_VERSION, settings, listing.fingerprint, weights]
    return Fingerprint(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(), weights)


def check_store(job: EncodeJob, expected: Fingerprint) -> bool:
    """True when a finished store with this fingerprint is there; UserError when it is another one, or when more tiles
    were left out of it than job.max_rejected.

    False also when an index, a table of tiles or a shard of it is gone, or a shard cut short, so that `encode` makes
    them again.
    """
    store = Folder(job.store)
    if store.size("stats.json") < 0:
        return False
    found = read_stats(store).fingerprint
    if found != expected.store:
        raise UserError(
            f"{job.store} was encoded from other tiles, autoencoder or hint settings (fingerprint {found[:12]}, "
            f"expected {expected.store[:12]}); run `ray-pipeline encode --overwrite` or set data.latents to another "
            "folder"
        )
    tables = [(split, STORED_TILES) for split in SPLITS]
    if job.sample_rows is not None:
        tables.append(("train", STREAMED_TILES))
    if any(store.child(split).size(name) < 0 for split, name in tables):
        return False
    try:
        opened = [LatentStore.open(store.child(split)) for split in SPLITS]
    except UserError:
        return False
    left_out = opened[0].index["rejected"]
    if left_out > job.max_rejected:
        raise UserError(
            f"{store.where(REJECTED_FILE)} lists {left_out} tiles that were left out of the store, more than "
            f"data.max_rejected {job.max_rejected}; repair them and run `ray-pipeline encode --overwrite`, or set "
            f"data.max_rejected={left_out}"
        )
    return not any(split.missing() for split in opened)


def stored_tiles(job: EncodeJob, listing: Listing) -> Listing:
    """The tiles whose latents are stored: all of them, or job.sample_rows of each data set and split."""
    return listing if job.sample_rows is None else listing.thinned(job.sample_rows)


def encode(
    job: EncodeJob,
    listing: Listing,
    expected: Fingerprint,
    *,
    actors: int,
    gpus_per_actor: float,
    progress: Callable[[int], None],
) -> LatentStats:
    """Encode what is missing with `actors` autoencoder actors on the Ray that is running; returns the statistics.

    Tiles that cannot be used are listed in <store>/rejected.csv; more than job.max_rejected of them are a UserError.
    progress is called with the number of tiles just looked at.
    """
    store, stored = Folder(job.store), stored_tiles(job, listing)
    # the mark of a finished store: from the first new shard on, this is none
    store.remove(["stats.json"])
    for split in SPLITS:
        write_tile_table(store.child(split), LISTED_TILES, stored.rows[split], stored.datasets[split])
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    counts = {split: len(rows) for split, rows in stored.rows.items()}
    with closing(_shard_records(job, counts, expected.store, actors, gpus_per_actor)) as made:
        for split, record in made:
            records[split].append(record)
            progress(record["rows"] + len(record["rejected"]))
            if record["rejected"]:
                _list_rejected(job, listing, records)
    _list_rejected(job, listing, records)
    bad = {split: [row["id"] for record in shards for row in record["rejected"]] for split, shards in records.items()}
    stored = stored.without(bad)
    for split in ("train", "val"):
        if not stored.rows[split]:
            raise UserError(f"no tile of split {split} can be used; repair those in {store.where(REJECTED_FILE)}")
    if job.sample_rows is not None:
        streamed = listing.without(bad)
        write_tile_table(store.child("train"), STREAMED_TILES, streamed.rows["train"], streamed.datasets["train"])
    for split, shards in records.items():
        write_tile_table(store.child(split), STORED_TILES, stored.rows[split], stored.datasets[split])
        shards.sort(key=shard_number)  # sums of floats depend on their order, too
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": expected.store,
            "autoencoder": AutoencoderHeader(pretrained=job.autoencoder, sha256=expected.autoencoder).model_dump(),
            "shape": job.shape,
            "posterior": job.posterior,
            "hints": job.hints,
            "simulated": job.simulated,
            "variants": job.variants,
            "rejected": len(listing.rejected) + sum(map(len, bad.values())),  # of the whole store
            "datasets": [dataclasses.asdict(entry) for entry in stored.datasets[split]],
            "intensity": [entry.model_dump() for entry in listing.intensity],
            "shards": [{key: shard[key] for key in ("file", "rows", "bytes", "sha256")} for shard in shards],
        }
        write_json(store.child(split), "index.json", index)
        _remove_strays(store.child(split), shards)
    stats = _statistics(records["train"], expected.store)
    write_json(store, "stats.json", stats.as_json())
    return stats


def _list_rejected(job: EncodeJob, listing: Listing, records: dict[str, list[dict]]) -> None:
    """Write the list of all tiles that cannot be used, and stop where they are too many."""
    found = [Rejected(**row) for split in SPLITS for record in records[split] for row in record["rejected"]]
    rows = [*listing.rejected, *sorted(found, key=lambda row: row.id)]
    store = Folder(job.store)
    if not rows:
        store.remove([REJECTED_FILE])
        return
    store.write(REJECTED_FILE, rejected_csv(rows))
    if len(rows) > job.max_rejected:
        raise UserError(
            f"{len(rows)} tiles cannot be used, more than data.max_rejected {job.max_rejected} ({in_words(rows)}; "
            f"all in {store.where(REJECTED_FILE)}); repair them or set data.max_rejected higher"
        )


def check_shards(store: str) -> int:
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


def _shard_records(
    job: EncodeJob, counts: dict[str, int], expected: str, actors: int, gpus: float
) -> Iterator[tuple[str, dict]]:
    """Split and record of every shard, those already stored first; one pool of actors encodes all splits."""
    todo = []
    for split in SPLITS:
        for number in range(-(-counts[split] // job.shard_rows)):
            record = stored_record(Folder(job.store).child(split), number, expected)
            if record:
                yield split, record
            else:
                todo.append({"split": split, "shard": number})
    if not todo:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo))
    dataset.set_name("encode")
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


def _remove_strays(folder: Folder, shards: Sequence[dict]) -> None:
    """Delete shards and records that the index does not name, left by another shard size, and the pieces of a kill."""
    kept = {name for shard in shards for name in (shard["file"], record_file(shard_number(shard)))}
    folder.remove(
        name
        for name in folder.names()
        if name == LISTED_TILES
        or (name.startswith("shard-") and name not in kept)
        or (name.startswith(".") and name.endswith(".tmp"))
    )
