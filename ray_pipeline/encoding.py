"""Data before training: tiles are looked at, encoded, verified and shown."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_pipeline import estimate
from ray_pipeline.config import Config
from ray_pipeline.data import encode as encode_store
from ray_pipeline.data.data_root import dataset_folders
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.data.hint_preview import preview, with_hints
from ray_pipeline.data.latents import LatentStore, rows_together
from ray_pipeline.data.listing import Listing, list_tiles
from ray_pipeline.data.manifest import SPLITS
from ray_pipeline.data.reachable import check_reachable, naming
from ray_pipeline.data.rejected import REJECTED_FILE
from ray_pipeline.data.shard_reader import SHARE_USED
from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.data.sources.upload import upload_data
from ray_pipeline.data.verify import Comparison, compare_sample
from ray_pipeline.errors import UserError
from ray_pipeline.job_paths import check_paths_under_job
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.monitoring.progress import Progress, format_bytes
from ray_pipeline.monitoring.tile_grid import Window, sample_grid
from ray_pipeline.sections import PARTNER_TYPES
from ray_pipeline.storage import Folder, is_uri
from ray_pipeline.training.placement import encode_actors, uses_gpu


@dataclass(frozen=True)
class Prepared:
    """Tiles and the encode job that fits the config."""

    job: EncodeJob
    listing: Listing
    fingerprint: encode_store.Fingerprint
    stored: bool

    @property
    def tiles(self) -> dict[str, int]:
        """Tiles of each split whose latents are stored."""
        return {split: len(rows) for split, rows in encode_store.stored_tiles(self.job, self.listing).rows.items()}


def prepare_data(config: Config) -> None:
    """Write the embedded sample data set when the config asks for it and data.root holds no data set."""
    check_paths_under_job(config, data_alone=True)
    settings = config.data.simulate
    if settings is None or has_data(config):
        return
    root = Folder(config.data.root)
    if root.local is not None:
        _simulate(config, root.local)
        return
    with tempfile.TemporaryDirectory(prefix="ray_pipeline_") as made:
        _simulate(config, Path(made))
        with naming("data.root", root.location):
            upload_data(Path(made), root)


def _simulate(config: Config, root: Path) -> None:
    settings = config.data.simulate
    progress = Progress(settings.fields, "simulate", unit="field")
    summary = simulate(
        root,
        fields=settings.fields,
        seed=settings.seed,
        field_size=settings.field_size,
        tile_size=config.data.tile_size,
        val_fraction=settings.val_fraction,
        scale=settings.scale,
        workers=os.cpu_count() or 1,
        progress=lambda done, _: progress.update(done),
    )
    progress.close(f"{summary.tiles['train']} training and {summary.tiles['val']} validation tiles")


def has_data(config: Config) -> bool:
    """Whether data.root holds a whole data set; manifest.csv is written last."""
    check_locations(config)
    return any(folder.child("manifests").size("manifest.csv") >= 0 for folder in dataset_folders(config.data.root))


def check_locations(config: Config) -> None:
    """UserError that names data.root or data.latents, where it is a URI that cannot be reached."""
    for key, location in remote_locations(config).items():
        check_reachable(key, location)


def remote_locations(config: Config) -> dict[str, str]:
    """Of data.root and data.latents those that are URIs."""
    given = {"data.root": config.data.root, "data.latents": config.data.latents}
    return {key: location for key, location in given.items() if location and is_uri(location)}


def look(config: Config, *, overwrite: bool = False) -> Prepared:
    """Check tiles and autoencoder and compare with the store; writes nothing.

    UserError: storage that cannot be reached, missing manifests or images, wrong autoencoder, a store of other tiles or
    settings (unless `overwrite`).
    """
    check_locations(config)
    check_paths_under_job(config, data_alone=True)
    job = encode_job(config)
    autoencoder = load_autoencoder(
        job.autoencoder,
        precision=job.precision,
        latent_channels=config.model.latent_channels,
        posterior=job.posterior,
    )
    with naming("data.root", job.root):
        listing = list_tiles(job)
    fingerprint = encode_store.fingerprint(job, listing, autoencoder)
    with naming("data.latents", job.store):
        stored = False if overwrite else encode_store.check_store(job, fingerprint)
    prepared = Prepared(job=job, listing=listing, fingerprint=fingerprint, stored=stored)
    _warn_of_small_cache(config, prepared)
    return prepared


def _warn_of_small_cache(config: Config, prepared: Prepared) -> None:
    """A cache that does not hold the rows that are shuffled together is not used."""
    data, row_bytes, sets = config.data, prepared.job.row_bytes, len(prepared.listing.datasets["train"])
    if not data.cache_gib or data.mode == "tiles" or not is_uri(prepared.job.store):
        return
    together = row_bytes * rows_together(prepared.tiles["train"], data.shuffle_window, sets)
    room = int(SHARE_USED * data.cache_gib * 2**30)
    if together > room:
        warnings.warn(
            f"data.cache_gib={data.cache_gib:g} is too little for the {format_bytes(together)} of latents that are "
            "shuffled together, so nothing is cached and each sample is a request of object storage; set it to "
            f"{math.ceil(together / SHARE_USED / 2**30)}, or data.shuffle_window={max(1, room // row_bytes // sets)}",
            stacklevel=2,
        )


def preview_hints(config: Config, names: Sequence[str], count: int, path: Path) -> None:
    """Draw tiles of data.root with these hints (all, where none is named) as a PNG; UserError for an unknown name."""
    if count < 1:
        raise UserError(f"--tiles {count}: expected at least 1; change it")
    check_locations(config)
    prepare_data(config)
    heads, rows = preview(with_hints(encode_job(config), names, config.data.hints), count)
    shown = [[Window.of(images[0]).of_hint(*pair) for pair in zip(heads, images, strict=True)] for images in rows]
    columns = [(head, np.stack([row[number] for row in shown])) for number, head in enumerate(heads)]
    sample_grid(columns, path, title="hints, a tile in each row")


def verify(config: Config) -> tuple[str, int, Comparison]:
    """The latent store, how many of its shards are whole, and a sample of it encoded again; UserError for a damaged
    store, or one of other tiles or settings."""
    check_locations(config)
    store = encode_job(config).store
    shards = encode_store.check_shards(store)
    prepared = look(config)
    if not prepared.stored:
        raise UserError(f"{store} is not finished, so there is nothing to compare; run `ray-pipeline encode` first")
    return store, shards, compare_sample(prepared.job, torch.cuda.is_available())


def encode(config: Config, prepared: Prepared) -> None:
    """Encode on the Ray that is running, unless the store is there."""
    if prepared.stored:
        return
    tiles = sum(prepared.tiles.values())
    need = estimate.latents_bytes(prepared.job, tiles) - estimate.bytes_in(prepared.job.store)
    estimate.check_disk(prepared.job.store, need, "data.latents")
    gpu = uses_gpu(config)
    progress = Progress(tiles, "encode", unit="tile")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    with naming("data.latents", prepared.job.store):
        stats = encode_store.encode(
            prepared.job,
            prepared.listing,
            prepared.fingerprint,
            actors=encode_actors(config),
            gpus_per_actor=(config.vae.gpus_per_actor or 1.0) if gpu else 0.0,
            progress=advance,
        )
    progress.close("latent std " + " ".join(f"{value:.3f}" for value in stats.std))
    left_out = LatentStore.open(prepared.job.store).index["rejected"]
    if left_out:
        listing = Folder(prepared.job.store).where(REJECTED_FILE)
        warnings.warn(f"{left_out} tiles cannot be used and were left out, see {listing}", stacklevel=2)


def stored_tiles(store: str) -> tuple[dict[str, int], int, dict[str, int]]:
    """Of a finished latent store: tiles of each split, how many were left out, and, of each hint that may have one, the
    tiles with a partner on disk."""
    splits = {split: LatentStore.open(Folder(store).child(split)) for split in SPLITS}
    hints = [name for name in splits["train"].hint_names if name in PARTNER_TYPES]
    partners = {
        hint: sum(entry.partners[hint] for split in splits.values() for entry in split.datasets) for hint in hints
    }
    return {name: len(split) for name, split in splits.items()}, splits["train"].index["rejected"], partners
