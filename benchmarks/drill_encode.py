"""Kill -9 the encode job at random moments: does the finished store equal an undisturbed one, bit for bit?

    python benchmarks/drill_encode.py --kills 10

Every second kill takes an autoencoder actor, and the job must go on by itself; the others take the driver, and the
command is run again. A store is hit by both. Prints a line a kill; exits 1 where a store differs or a job does not end.
All jobs run on one Ray, in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from disturbances import small_cluster
from small_run import descendants

from ray_pipeline.data.sources.simulate import simulate

TIMEOUT_SECONDS = 300
KINDS = ("driver", "actor")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--fields", type=int, default=96, help="of 64 px, a tile each")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder, small_cluster((2,)) as nodes:
        os.environ["RAY_ADDRESS"] = nodes.address
        work = Path(folder)
        simulate(work / "data", fields=arguments.fields, seed=1, field_size=64, tile_size=64)
        config = write_config(work, arguments.actors)
        finish(start(config, work / "undisturbed"))
        expected = contents(work / "undisturbed")
        shards = sum(name.endswith(".npy") for name in expected)
        print(f"undisturbed: {len(expected)} files, {shards} shards", flush=True)
        hits, failures = 0, 0
        while hits < arguments.kills:
            kinds, store = KINDS[: arguments.kills - hits], work / f"killed_{hits}"
            disturb(config, store, kinds, sorted(moments.sample(range(shards - 1), len(kinds))), moments)
            hits += len(kinds)
            differing = differences(expected, contents(store))
            failures += bool(differing)
            print(f"{store.name}: {f'differs: {differing[:3]}' if differing else 'equal'}", flush=True)
            shutil.rmtree(store)
    print(f"{hits} kills: {failures or 'no'} store differs from the undisturbed one")
    return 1 if failures else 0


def write_config(work: Path, actors: int) -> Path:
    """A config with every hint, two variants and shards of two rows."""
    config = work / "config.yaml"
    config.write_text(
        f"data: {{root: {work / 'data'}, tile_size: 64, augment_variants: 2, shard_rows: 2}}\n"
        "model: {architecture: DiT-S/8, latent_size: 8}\n"
        f"vae: {{batch_size: 3, actors: {actors}}}\n"
        "phases: [{name: one, epochs: 1, condition_types: [super_resolution, denoising, canny, depth]}]\n"
    )
    return config


def disturb(config: Path, store: Path, kinds: Sequence[str], places: Sequence[int], moments: random.Random) -> None:
    """Encode, and kill one of each kind when as many shards are stored as `places` say, and up to 0.2 s later."""
    job = start(config, store)
    for kind, after in zip(kinds, places, strict=True):
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while stored_shards(store) < after or not actors():
            if job.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the job ended with {job.returncode} before it could be killed")
            time.sleep(0.002)
        time.sleep(0.2 * moments.random())
        stored, living = stored_shards(store), actors()
        victim = psutil.Process(job.pid) if kind == "driver" else living[0]
        victim.kill()
        if kind == "driver":
            job.wait()
            psutil.wait_procs(living, timeout=60)  # a new job must not compete with what is left of the old one
            job = start(config, store)
        else:
            psutil.wait_procs([victim], timeout=60)
        print(f"kill: {kind} after {stored} shards", flush=True)
    finish(job)


def start(config: Path, store: Path) -> subprocess.Popen:
    """The encode command, writing to `store`."""
    command = [
        sys.executable,
        "-m",
        "ray_pipeline",
        "encode",
        "--config",
        str(config),
        "--set",
        f"data.latents={store}",
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})


def finish(job: subprocess.Popen) -> None:
    """Wait for the end of a job that must succeed."""
    if job.wait(TIMEOUT_SECONDS) != 0:
        raise SystemExit(f"the encode command ended with {job.returncode}")


def actors() -> list[psutil.Process]:
    """Processes that hold an autoencoder actor."""
    return descendants(psutil.Process(), "ShardEncoder")


def stored_shards(store: Path) -> int:
    """Shards whose record is written."""
    return len(list(store.glob("*/shard-*.json")))


def contents(store: Path) -> dict[str, str]:
    """Hash of every file of a store, by its path in it."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that are missing, additional or different."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


if __name__ == "__main__":
    sys.exit(main())
