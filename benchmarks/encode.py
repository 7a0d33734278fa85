"""Encoding on Ray Data beside a bare loop over the same tiles with the same autoencoder, in one run; and its memory.

The bare loop is one process with all cores as threads that reads, encodes and keeps the latents. It runs before and
after the job, so that a machine that gets slower or faster counts for both.

    python benchmarks/encode.py                # 2000 tiles of 256 px, embedded autoencoder
    python benchmarks/encode.py --autoencoder FOLDER --tile-size 512
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from ray_pipeline.config import parse_config
from ray_pipeline.data.encode import encode, fingerprint
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.data.listing import Listing, list_tiles
from ray_pipeline.data.sources.simulate import simulate
from ray_pipeline.data.tiles import read_tile
from ray_pipeline.models.autoencoder import load_autoencoder
from ray_pipeline.ray_session import ray_session
from ray_pipeline.sections import RayConfig

MEGABYTE = 2**20


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), arguments)
        listing = list_tiles(job)
        paths = [Path(job.root, row.path) for row in listing.rows["train"]]
        part = paths[: max(1, len(paths) // 4)]
        before = bare_rate(job, part)
        with ray_session(RayConfig()):
            rates, memory = encode_rate(job, listing)
        after = bare_rate(job, part)
    bare = 2 / (1 / before + 1 / after)
    print(f"bare loop        {before:.2f} and {after:.2f} tiles/s, {torch.get_num_threads()} threads")
    print(f"encode           {rates['all']:.2f} tiles/s with the start of its actors, {rates['steady']:.2f} without")
    print(f"ratio            {rates['all'] / bare:.2f} with the start, {rates['steady'] / bare:.2f} without")
    quarter, end = (memory[int(share * (len(memory) - 1))] for share in (0.25, 1.0))
    print(f"memory           {quarter / MEGABYTE:.0f} MB at a quarter, {end / MEGABYTE:.0f} MB at the end, "
          f"ratio {end / quarter:.2f} (driver and actors)")  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--tile-size", type=int, default=256)
    parser.add_argument("--shard-rows", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--autoencoder", default="embedded")
    return parser.parse_args()


def make_job(folder: Path, arguments: argparse.Namespace) -> EncodeJob:
    """Tiles without hints; a manifest may name an image file more than once, which saves rendering."""
    side = arguments.tile_size
    simulate(folder / "data", fields=32, seed=0, field_size=2 * side, tile_size=side, degradations=(), workers=2)
    manifests = folder / "data/foundation/simulated/manifests"
    table = pd.read_csv(manifests / "train.csv", dtype=str)
    rows = table.iloc[np.arange(arguments.tiles) % len(table)].reset_index(drop=True)
    rows["id"] = [f"{identifier}_{number}" for number, identifier in enumerate(rows["id"])]
    rows.to_csv(manifests / "train.csv", index=False)
    return encode_job(
        parse_config(
            {
                "data": {"root": str(folder / "data"), "tile_size": side, "shard_rows": arguments.shard_rows},
                "model": {"architecture": "DiT-S/4", "latent_size": side // 8},
                "vae": {"pretrained": arguments.autoencoder, "batch_size": arguments.batch_size},
                "phases": [{"name": "one", "epochs": 1}],
            }
        )
    )


def bare_rate(job: EncodeJob, paths: list[Path]) -> float:
    """Tiles/s of the loop that anyone would write first."""
    autoencoder = load_autoencoder(job.autoencoder)
    latents = np.empty((len(paths), *job.shape), np.float16)
    started = time.perf_counter()
    for start in range(0, len(paths), job.batch_size):
        batch = np.stack([read_tile(path) for path in paths[start : start + job.batch_size]])
        latents[start : start + len(batch)] = autoencoder.encode(torch.from_numpy(batch)).numpy()
    return len(paths) / (time.perf_counter() - started)


def encode_rate(job: EncodeJob, listing: Listing) -> tuple[dict[str, float], list[int]]:
    """Tiles/s of the job, all of it and from its first shard on; bytes of driver and actors while it encodes."""
    expected = fingerprint(job, listing, load_autoencoder(job.autoencoder))
    times, done, memory, ended = [], [0], [], threading.Event()

    def progress(count: int) -> None:
        done.append(done[-1] + count)
        times.append(time.perf_counter())

    def watch() -> None:
        while not ended.wait(0.5):
            if times:
                memory.append(_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    encode(job, listing, expected, actors=os.cpu_count() or 1, gpus_per_actor=0.0, progress=progress)
    total = time.perf_counter() - started
    ended.set()
    watcher.join()
    steady = (done[-1] - done[1]) / (times[-1] - times[0])
    return {"all": done[-1] / total, "steady": steady}, memory


def _memory() -> int:
    """Memory of this process and of the actors' that nobody shares with them."""
    total = psutil.Process().memory_full_info().uss
    for process in psutil.Process().children(recursive=True):
        try:
            if "ShardEncoder" in " ".join(process.cmdline()):
                total += process.memory_full_info().uss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


if __name__ == "__main__":
    main()
