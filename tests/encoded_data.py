"""Latent stores for tests: encoded by a job, or written with latents of the test's own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def job_for(tiny_autoencoder) -> Callable:
    """(data root, *hints, **changes) -> the EncodeJob of 64 px tiles and these hints (all, where none is named), with
    the tiny autoencoder."""
    from ray_pipeline.config import parse_config
    from ray_pipeline.data.encode_job import encode_job
    from ray_pipeline.sections import CONDITION_TYPES

    def make(root: Path | str, *hints: str, **changes):
        config = {
            "data": {"root": str(root), "tile_size": 64},
            "model": {"architecture": "DiT-S/8", "latent_size": 8},
            "vae": {"pretrained": str(tiny_autoencoder), "batch_size": 4},
            "phases": [{"name": "one", "epochs": 1, "condition_types": hints or CONDITION_TYPES}],
        }
        changes = {name: str(value) if name == "store" else value for name, value in changes.items()}
        return replace(encode_job(parse_config(config)), **changes)

    return make


@pytest.fixture(scope="session")
def fingerprint_of() -> Callable:
    """EncodeJob -> what its store is recognised by."""
    from ray_pipeline.data.encode import fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.models.autoencoder import load_autoencoder

    return lambda job: fingerprint(job, list_tiles(job), load_autoencoder(job.autoencoder, posterior=job.posterior))


@pytest.fixture(scope="session")
def run_job(ray_cluster) -> Callable:
    """(EncodeJob, progress, actors) -> the listing that it encoded."""
    from ray_pipeline.data.encode import encode, fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.models.autoencoder import load_autoencoder

    def run(job, progress=lambda tiles: None, actors=1):
        listing = list_tiles(job)
        expected = fingerprint(job, listing, load_autoencoder(job.autoencoder, posterior=job.posterior))
        encode(job, listing, expected, actors=actors, gpus_per_actor=0, progress=progress)
        return listing

    return run


@pytest.fixture(scope="session")
def run_job_here() -> Callable:
    """EncodeJob of good tiles -> the listing that it encoded, with the job's actor in this process: no Ray."""
    from ray_pipeline.data.encode import encode, fingerprint
    from ray_pipeline.data.listing import list_tiles
    from ray_pipeline.data.manifest import SPLITS
    from ray_pipeline.data.shard_encoder import LISTED_TILES, ShardEncoder
    from ray_pipeline.data.tile_table import write_tile_table
    from ray_pipeline.models.autoencoder import load_autoencoder
    from ray_pipeline.storage import Folder

    def run(job):
        listing = list_tiles(job)
        expected = fingerprint(job, listing, load_autoencoder(job.autoencoder, posterior=job.posterior))
        encoder = ShardEncoder(job, expected.store, use_gpu=False)
        for split in SPLITS:
            write_tile_table(Folder(job.store).child(split), LISTED_TILES, listing.rows[split], listing.datasets[split])
            for number in range(-(-len(listing.rows[split]) // job.shard_rows)):
                encoder({"split": np.array([split], dtype=object), "shard": np.array([number])})
        encode(job, listing, expected, actors=1, gpus_per_actor=0, progress=lambda tiles: None)
        return listing

    return run


@pytest.fixture(scope="session")
def encoded(run_job, job_for, tiny_data, tmp_path_factory):
    """A finished store of tiny_data with every hint, denoising also simulated, in two variants and in shards of 7 rows,
    as the job that made it. Not to be changed by a test; copy it."""
    store = tmp_path_factory.mktemp("encoded") / "latents"
    job = job_for(tiny_data, store=store, simulated=("denoising",), variants=2, shard_rows=7)
    run_job(job)
    return job


@pytest.fixture
def copy_of_data(tiny_data, tmp_path) -> Path:
    """A copy of tiny_data that a test may change."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data", ignore=shutil.ignore_patterns("latents")))


@pytest.fixture(scope="session")
def write_latents() -> Callable:
    """(root, values (rows, variants, columns, C, H, W) fp16, hints, simulated, **index) -> the LatentStore of a
    training split with these latents and mean 0, std `std`, in shards of `shard_rows`; all rows are of one data set
    unless `index` tells otherwise."""
    from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore
    from ray_pipeline.data.shards import write_shard
    from ray_pipeline.storage import Folder

    def write(root, values, hints=(), simulated=(), *, shard_rows=None, std=1.0, **index):
        root, rows, channels = Folder(root), len(values), values.shape[3]
        starts = range(0, rows, shard_rows or rows)
        shards = [
            write_shard(root.child("train"), f"shard-{number:05d}.npy", values[start : start + (shard_rows or rows)])
            for number, start in enumerate(starts)
        ]
        index = {
            "version": FORMAT_VERSION,
            "fingerprint": "f",
            "shape": values.shape[3:],
            "posterior": "mode",
            "hints": hints,
            "simulated": simulated,
            "variants": values.shape[1],
            "rejected": 0,
            "datasets": [{"name": "a", "start": 0, "count": rows, "partners": dict.fromkeys(simulated, rows)}],
            "shards": shards,
            "autoencoder": {"pretrained": "embedded", "sha256": "a"},
            "intensity": [],
        } | index
        root.child("train").write("index.json", json.dumps(index).encode())
        stats = LatentStats(np.zeros(channels), np.full(channels, std), rows, "f")
        root.write("stats.json", json.dumps(stats.as_json()).encode())
        return LatentStore.open(root)

    return write
