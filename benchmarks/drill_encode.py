"""Kill -9 the encode job at random moments: does the finished store equal an undisturbed one, bit for bit?

    python benchmarks/drill_encode.py --kills 10

Every second kill takes an autoencoder actor, and the job must end by itself; the others take the driver, and the
command is run again. Prints a line a kill; exits 1 where a store differs or a job does not end.
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
from pathlib import Path

import psutil
from small_run import descendants

from ray_pipeline.data.sources.simulate import simulate

TIMEOUT_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--fields", type=int, default=96, help="of 64 px, a tile each")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        simulate(work / "data", fields=arguments.fields, seed=1, field_size=64, tile_size=64)
        config = write_config(work, arguments.actors)
        finish(start(config, work / "undisturbed"))
        expected = contents(work / "undisturbed")
        shards = sum(name.endswith(".npy") for name in expected)
        print(f"undisturbed: {len(expected)} files, {shards} shards", flush=True)
        failures = 0
        for number in range(arguments.kills):
            kind = ("driver", "actor")[number % 2]
            after = moments.randrange(0, shards - 1)
            store = work / f"killed_{number}"
            stored, restarts = drill(config, store, kind, after, moments.random())
            differing = differences(expected, contents(store))
            failures += bool(differing)
            words = f"differs: {', '.join(differing[:3])}" if differing else "equal"
            print(f"kill {number + 1}: {kind} after {stored} shards, {restarts} restart(s): {words}", flush=True)
            shutil.rmtree(store)
    print(f"{arguments.kills - failures} of {arguments.kills} stores equal the undisturbed one")
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


def drill(config: Path, store: Path, kind: str, after: int, part: float) -> tuple[int, int]:
    """Kill once, when `after` shards are stored and up to 0.2 s later, then let the job end -> shards stored at the
    kill, restarts by hand."""
    job = start(config, store)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while stored_shards(store) < after or not actors_of(job.pid):
        if job.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the job ended with {job.returncode} before it could be killed")
        time.sleep(0.002)
    time.sleep(0.2 * part)
    stored = stored_shards(store)
    victims = [psutil.Process(job.pid)] if kind == "driver" else actors_of(job.pid)[:1]
    # its agents, which encode nothing, look only now and then whether their Ray is still there
    family = [p for p in psutil.Process(job.pid).children(recursive=True) if not p.name().endswith("Agent")]
    for victim in victims:
        victim.kill()
    if kind == "actor":
        finish(job)
        return stored, 0
    job.wait()
    # Ray's processes end with their driver; a new job must not compete with what is left of the old one
    psutil.wait_procs(family, timeout=60)
    finish(start(config, store))
    return stored, 1


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


def actors_of(pid: int) -> list[psutil.Process]:
    """Processes of the driver's Ray that hold an autoencoder actor."""
    return descendants(psutil.Process(pid), "ShardEncoder")


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
