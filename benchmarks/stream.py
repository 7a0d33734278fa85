"""Rows a second from shuffled latents to batches: our stream beside three others, on the same rows, in one run.

Rows are 4x64x64 fp16 latents, batches hold 128, and each batch is copied into one buffer, as a transfer to a device
would. Every contestant feeds from two processes. They run as alternating child processes:

    ours       the stream of a training worker: plan -> two gather actors of Ray Data -> batches, in a Ray Train worker
    loader     torch DataLoader with two workers on a memory map, shuffle=True
    parquet    ray.data.read_parquet(...).iter_torch_batches(...), an execution an epoch
    mosaic     MosaicML Streaming, local MDS shards, shuffle=True, two workers (pip install -e ".[bench]")

Then the epoch border: the time from the last step of an epoch to the end of the first of the next, over a normal step,
when a step computes for about 50 ms. Then the first batch: seconds from the start of the worker's function, its imports
done.

    python benchmarks/stream.py                      # 8192 rows (256 MB), 3 rounds
    python benchmarks/stream.py --rows 2048 --seconds 3 --rounds 1
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SHAPE = (4, 64, 64)
BATCH = 128
SHARD_ROWS = 1024
KINDS = ("ours", "loader", "parquet", "mosaic")


def main() -> None:
    arguments = _parse()
    if arguments.child:
        _measure(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = folder
        kinds = _write(Path(folder), arguments.rows)
        results: dict[str, list[dict]] = {kind: [] for kind in kinds}
        for number in range(arguments.rounds):
            for kind in kinds if number % 2 == 0 else kinds[::-1]:
                results[kind].append(_run_child(kind, arguments))
                print(f"round {number + 1} {kind:<8} {_words(results[kind][-1])}", flush=True)
    print(f"\n{arguments.rows} rows, median of {arguments.rounds} round(s)")
    ours = statistics.median(result["rate"] for result in results["ours"])
    for kind, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"{kind:<8} {_words(middle)}  ours / this {ours / middle['rate']:.2f}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=8.0, help="of steady reading that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of computing steps for the border")
    parser.add_argument("--folder", help="where to write the rows (default: the temporary folder)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def _words(result: dict) -> str:
    return (
        f"{result['rate']:8.0f} rows/s   first batch {result['first']:6.2f} s   "
        f"epoch border {result['border']:6.1f} normal steps"
    )


def _write(folder: Path, count: int) -> list[str]:
    """The same rows in the format of each contestant; returns those that can run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats
    from ray_pipeline.data.shards import write_shard
    from ray_pipeline.storage import Folder

    rows = np.random.default_rng(0).standard_normal((count, *SHAPE), dtype=np.float32).astype(np.float16)
    np.save(folder / "rows.npy", rows)
    store = Folder(folder / "store")
    parts = [rows[start : start + SHARD_ROWS] for start in range(0, count, SHARD_ROWS)]
    index = {
        "version": FORMAT_VERSION, "fingerprint": "rows", "shape": SHAPE, "hints": [], "simulated": [],
        "posterior": "mode", "variants": 1, "rejected": 0, "autoencoder": {"pretrained": "none", "sha256": "none"},
        "intensity": [],
        "datasets": [{"name": "rows", "start": 0, "count": count, "partners": {}}],
        "shards": [
            write_shard(store.child("train"), f"shard-{number:05d}.npy", part[:, None, None])
            for number, part in enumerate(parts)
        ],
    }  # fmt: skip
    store.child("train").write("index.json", json.dumps(index).encode())
    stats = LatentStats(np.zeros(SHAPE[0]), np.ones(SHAPE[0]), count, "rows")
    store.write("stats.json", json.dumps(stats.as_json()).encode())
    (folder / "parquet").mkdir()
    for number, part in enumerate(parts):
        tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(part)
        table = pa.table({"latent": tensor})
        pq.write_table(table, folder / "parquet" / f"{number:05d}.parquet", compression="none", row_group_size=BATCH)
    try:
        from streaming import MDSWriter
    except ImportError:
        print('mosaic is left out: pip install -e ".[bench]"')
        return [kind for kind in KINDS if kind != "mosaic"]
    columns = {"latent": f"ndarray:float16:{','.join(map(str, SHAPE))}"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for row in rows:
            writer.write({"latent": row})
    return list(KINDS)


def _run_child(kind: str, arguments: argparse.Namespace) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        command = [sys.executable, __file__, "--child", kind, "--result", result.name, "--folder", arguments.folder]
        command += [f"--{name}={getattr(arguments, name)}" for name in ("rows", "seconds", "epochs")]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        )
        if done.returncode:
            raise SystemExit(f"{kind} failed:\n{done.stderr}")
        return json.loads(Path(result.name).read_text())


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.child in ("ours", "parquet"):
        import ray

        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if arguments.child == "ours":
        _in_a_worker(arguments)
        return
    contestant = {"loader": _loader, "parquet": _parquet, "mosaic": _mosaic}[arguments.child]
    result = _times(contestant, arguments, time.perf_counter())
    Path(arguments.result).write_text(json.dumps(result))


def _in_a_worker(arguments: argparse.Namespace) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from ray_pipeline.training.launch import WORKER_ENVIRONMENT

    def work(values: dict) -> None:
        # a worker of ours imports this before its function is called
        import ray_pipeline.training.phase  # noqa: F401

        started = time.perf_counter()
        arguments = argparse.Namespace(**values)
        result = _times(_ours, arguments, started)
        Path(arguments.result).write_text(json.dumps(result))

    with tempfile.TemporaryDirectory() as runs:
        TorchTrainer(
            work,
            train_loop_config=vars(arguments),
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(
                storage_path=runs, name="stream", worker_runtime_env={"env_vars": WORKER_ENVIRONMENT}
            ),
        ).fit()


def _times(
    batches: Callable[[argparse.Namespace, int], Iterator], arguments: argparse.Namespace, started: float
) -> dict:
    """Seconds to the first batch, rows a second once it runs, and epoch border over a normal step."""
    import torch

    torch.set_num_threads(1)
    buffer = torch.empty((BATCH, *SHAPE), dtype=torch.float16)
    steps = arguments.rows // BATCH
    endless = batches(arguments, 10_000)
    buffer.copy_(next(endless))
    first = time.perf_counter() - started
    for _ in range(2 * steps):  # fill what is read ahead
        buffer.copy_(next(endless))
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < arguments.seconds:
        buffer.copy_(next(endless))
        count += BATCH
    rate = count / (time.perf_counter() - begin)
    endless.close()
    return {"first": first, "rate": rate, "border": _border(batches(arguments, arguments.epochs), buffer, steps)}


def _border(batches: Iterator, buffer, steps: int) -> float:
    """Median over the epochs of the step after an epoch's end, over the median step."""
    import torch

    square = torch.randn(1024, 1024)
    ends = []
    for batch in batches:
        buffer.copy_(batch)
        busy = time.perf_counter() + 0.05
        while time.perf_counter() < busy:
            square @ square
        ends.append(time.perf_counter())
    lengths = np.diff(ends)
    borders = lengths[steps - 1 :: steps]
    return float(np.median(borders) / np.median(lengths))


def _ours(arguments: argparse.Namespace, epochs: int) -> Iterator:
    import torch

    from ray_pipeline.data.latents import LatentStore
    from ray_pipeline.data.mixture import Member, Mixture
    from ray_pipeline.data.plan import SamplePlan
    from ray_pipeline.data.stream import StreamSettings, stream

    store = LatentStore.open(Path(arguments.folder, "store", "train"))
    plan = SamplePlan(len(store), BATCH, seed=0)
    mixture = Mixture((Member("rows", 0, len(store), None, simulated=False),), plan)
    settings = StreamSettings(
        mixture=mixture, source=store, hints=(), rank=0, world_size=1, name="benchmark", workers=2
    )
    for _, batch in stream(settings, 0, plan.steps(epochs)):
        yield torch.from_numpy(batch["latent"])


def _loader(arguments: argparse.Namespace, epochs: int) -> Iterator:
    import torch

    class Rows(torch.utils.data.Dataset):
        values = np.load(Path(arguments.folder, "rows.npy"), mmap_mode="r")

        def __len__(self) -> int:
            return len(self.values)

        def __getitem__(self, row: int) -> np.ndarray:
            return self.values[row]

    loader = torch.utils.data.DataLoader(
        Rows(), BATCH, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=4, drop_last=True
    )
    for _ in range(epochs):
        yield from loader


def _parquet(arguments: argparse.Namespace, epochs: int) -> Iterator:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for _ in range(epochs):
        dataset = ray.data.read_parquet(str(Path(arguments.folder, "parquet")), shuffle="files")
        for batch in dataset.iter_torch_batches(batch_size=BATCH, drop_last=True):
            yield batch["latent"]


def _mosaic(arguments: argparse.Namespace, epochs: int) -> Iterator:
    import torch
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(Path(arguments.folder, "mds")), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(dataset, BATCH, num_workers=2, persistent_workers=True, drop_last=True)
    for _ in range(epochs):
        for batch in loader:
            yield batch["latent"]


if __name__ == "__main__":
    main()
