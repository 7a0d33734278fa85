"""Rows a second that three file formats give to the latent store, side by side in one run.

The same latents, a tile and four hints of 4 x 64 x 64 fp16 a row, are written as
    npy         our shards, (rows, 1, 5, 4, 64, 64), read by LatentStore.gather
    arrow       Arrow IPC, a fixed-size binary column a latent, one record batch a shard; memory-mapped on a disk
    arrow-8     the same in record batches of 8 rows, of which only those needed are read
    parquet-8   uncompressed Parquet in row groups of 8 rows, of which only those needed are read
    parquet-64  the same with 64 rows
    mapped      our shards through numpy.load(mmap_mode="r")
and gathered in random batches: "hints" is what Phase 2 reads, "latent" what Phase 1 reads. "cold" drops the files from
the page cache and opens them anew before each batch; "in order" reads whole shards, one after the other, cold. A real
store holds far more rows than this one, so a row group then serves fewer rows of a batch than it does here.

With moto installed (the dev extras have it) the formats are then read from an S3 server on the loopback interface, in a
process of its own, each with as many requests at once as it can make. There the requests and bytes a row matter, which
is what a real service takes time for; the server is written in Python and slow.

    python benchmarks/latent_formats.py --folder /data/scratch     # 1 GB there while it runs
    python benchmarks/latent_formats.py --rows 256 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, column_names
from ray_pipeline.data.shards import write_shard
from ray_pipeline.storage import Folder

SHAPE = (4, 64, 64)
WIDTH = 2 * 4 * 64 * 64
HINTS = ("super_resolution", "denoising", "canny", "depth")
COLUMNS = column_names(HINTS, ())
S3_SHARDS, S3_SHARD_ROWS, S3_BATCH, S3_BATCHES = 4, 128, 32, 3
SEED = 0

#: (ids, columns) -> (B, C, H, W) fp16 of each of the first columns
Gather = Callable[[np.ndarray, int], list[np.ndarray]]


class Npy:
    """Our shards and index."""

    name = "npy"

    def write(self, folder: Folder, shards: Iterable[np.ndarray]) -> None:
        train = folder.child("train")
        entries = [write_shard(train, f"{number}.npy", values[:, None]) for number, values in enumerate(shards)]
        index = {
            "version": FORMAT_VERSION, "fingerprint": "benchmark", "shape": SHAPE, "hints": HINTS, "simulated": [],
            "posterior": "mode", "variants": 1, "rejected": 0, "datasets": [], "shards": entries,
            "autoencoder": {"pretrained": "none", "sha256": "none"}, "intensity": [],
        }  # fmt: skip
        train.write("index.json", json.dumps(index).encode())
        stats = LatentStats(np.zeros(4), np.ones(4), 0, "benchmark")
        folder.write("stats.json", json.dumps(stats.as_json()).encode())

    def open(self, folder: Folder, shard_rows: int) -> Gather:
        store = LatentStore.open(folder)
        return lambda ids, columns: list(store.gather(ids, hints=HINTS[: columns - 1]).values())


class Mapped(Npy):
    """Our shards, memory-mapped by numpy."""

    name = "mapped"

    def open(self, folder: Folder, shard_rows: int) -> Gather:
        train, opened = folder.child("train").local, {}

        def gather(ids: np.ndarray, columns: int) -> list[np.ndarray]:
            for number in set((ids // shard_rows).tolist()) - opened.keys():
                opened[number] = np.load(train / f"{number}.npy", mmap_mode="r").view(np.ndarray)
            out = [np.empty((len(ids), *SHAPE), np.float16) for _ in range(columns)]
            for place, (number, row) in enumerate(
                zip(*(part.tolist() for part in np.divmod(ids, shard_rows)), strict=True)
            ):
                for column, values in enumerate(out):
                    values[place] = opened[number][row, 0, column]
            return out

        return gather


class Blocks:
    """Arrow IPC or Parquet: columns in blocks of rows (record batches, row groups), which are read one by one."""

    def __init__(self, kind: str, block_rows: int | None):
        self.name = kind if block_rows is None else f"{kind}-{block_rows}"
        self.kind, self.block_rows = kind, block_rows

    def write(self, folder: Folder, shards: Iterable[np.ndarray]) -> None:
        for number, values in enumerate(shards):
            buffers = [pa.py_buffer(np.ascontiguousarray(values[:, k])) for k in range(len(COLUMNS))]
            kind = pa.binary(WIDTH)
            arrays = [pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, buffer]) for buffer in buffers]
            table, sink = pa.table(arrays, names=COLUMNS), pa.BufferOutputStream()
            rows = self.block_rows or len(values)
            if self.kind == "arrow":
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=rows)
            else:
                plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
                pq.write_table(table, sink, row_group_size=rows, **plain)
            folder.write(f"{number}.{self.kind}", memoryview(sink.getvalue()))

    def open(self, folder: Folder, shard_rows: int) -> Gather:
        block_rows, opened = self.block_rows or shard_rows, {}

        def fetch(place: tuple[int, list[int]], columns: int) -> pa.Table:
            number, blocks = place
            if (number, columns) not in opened:
                opened[number, columns] = self._reader(folder, f"{number}.{self.kind}", columns)
            return opened[number, columns](blocks)

        def gather(ids: np.ndarray, columns: int) -> list[np.ndarray]:
            blocks, position = np.unique(ids // block_rows, return_inverse=True)
            shards, inside = np.divmod(blocks, shard_rows // block_rows)
            wanted = [(int(number), inside[shards == number].tolist()) for number in np.unique(shards)]
            with ThreadPoolExecutor(4 if folder.local is not None else 32) as pool:
                tables = list(pool.map(lambda place: fetch(place, columns), wanted))
            rows = position * block_rows + ids % block_rows
            return [_take(pa.concat_tables(tables).column(k).chunks, rows) for k in range(columns)]

        return gather

    def _reader(self, folder: Folder, name: str, columns: int) -> Callable[[list[int]], pa.Table]:
        """Blocks of one file by their numbers."""
        mapped = folder.local is not None and self.block_rows is None
        file = pa.memory_map(str(folder.local / name)) if mapped else folder.open(name)
        if self.kind == "arrow":
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=list(range(columns))))
            if mapped:
                whole = [reader.get_batch(block) for block in range(reader.num_record_batches)]
                return lambda blocks: pa.Table.from_batches([whole[block] for block in blocks])
            return lambda blocks: pa.Table.from_batches([reader.get_batch(block) for block in blocks])
        parquet = pq.ParquetFile(file, pre_buffer=folder.local is None)
        names = list(COLUMNS[:columns])
        return lambda blocks: parquet.read_row_groups(blocks, columns=names, use_threads=False)


REMOTE = (Npy(), Blocks("arrow", None), Blocks("arrow", 8), Blocks("parquet", 8), Blocks("parquet", 64))
FORMATS = (*REMOTE, Mapped())


def _take(chunks: list[pa.FixedSizeBinaryArray], rows: np.ndarray) -> np.ndarray:
    """Rows of a chunked column, (B, C, H, W), each copied once."""
    views = []
    for chunk in chunks:
        values = np.frombuffer(chunk.buffers()[1], np.float16)[chunk.offset * WIDTH // 2 :]
        views.append(values[: len(chunk) * WIDTH // 2].reshape(-1, *SHAPE))
    starts = np.cumsum([0] + [len(view) for view in views])
    which = np.searchsorted(starts, rows, side="right") - 1
    out = np.empty((len(rows), *SHAPE), np.float16)
    for place, (view, row) in enumerate(zip(which.tolist(), (rows - starts[which]).tolist(), strict=True)):
        out[place] = views[view][row]
    return out


def main() -> None:
    arguments = _parse()
    if arguments.serve:
        _serve()
        return
    with tempfile.TemporaryDirectory(prefix="latent_formats_", dir=arguments.folder) as place:
        _on_disk(arguments, Path(place))
    print(flush=True)
    if find_spec("moto") is None:
        print("S3 left out: moto is not installed")
        return
    _on_s3()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write, on the disk to be measured (default: the temporary folder)")
    parser.add_argument("--rows", type=int, default=1024, help="160 KiB each, in each of the six folders")
    parser.add_argument("--shard-rows", type=int, default=128, help="a multiple of 64 that divides --rows")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="batches of each kind")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shard_rows % 64 or arguments.rows % arguments.shard_rows:
        parser.error("--shard-rows must be a multiple of 64 that divides --rows")
    return arguments


def _shards(count: int, rows: int) -> Iterator[np.ndarray]:
    """(rows, columns, C, H, W) fp16 of each shard, the same for every format."""
    for number in range(count):
        values = np.random.default_rng((SEED, number)).standard_normal((rows, len(COLUMNS), *SHAPE), np.float32)
        yield values.astype(np.float16)


def _on_disk(arguments: argparse.Namespace, place: Path) -> None:
    rows, shard_rows, rng = arguments.rows, arguments.shard_rows, np.random.default_rng(SEED)
    folders = {kind.name: Folder(place / kind.name) for kind in FORMATS}
    for kind in FORMATS:
        kind.write(folders[kind.name], _shards(rows // shard_rows, shard_rows))
    _check_equal(folders, rng.integers(rows, size=20), shard_rows)
    seconds: dict[str, dict[str, list[float]]] = {kind.name: {} for kind in FORMATS}
    for number in range(arguments.rounds):
        random = rng.choice(rows, size=arguments.batch, replace=arguments.batch > rows)
        ordered = np.arange(shard_rows) + shard_rows * (number % (rows // shard_rows))
        # whichever comes later may find a warmer or slower machine, so the order turns
        for kind in FORMATS if number % 2 == 0 else FORMATS[::-1]:
            folder, times = folders[kind.name], seconds[kind.name]
            for what, ids, columns, cold in (
                ("hints cold", random, len(COLUMNS), True),
                ("latent cold", random, 1, True),
                ("in order", ordered, len(COLUMNS), True),
                ("hints warm", random, len(COLUMNS), False),
                ("latent warm", random, 1, False),
            ):
                if cold:
                    _drop_cache(place / kind.name)
                    gather, again = kind.open(folder, shard_rows), 1
                else:
                    gather, again = kind.open(folder, shard_rows), 4
                    gather(ids, columns)
                started = time.perf_counter()
                for _ in range(again):
                    gather(ids, columns)
                times.setdefault(what, []).append((time.perf_counter() - started) / again / len(ids))
                del gather  # pages that are mapped stay in the cache
    print(f"{rows} rows of {len(COLUMNS)} x 32 KiB in shards of {shard_rows}, batches of {arguments.batch}: rows/s")
    rates = {name: {what: 1 / statistics.median(s) for what, s in times.items()} for name, times in seconds.items()}
    for name in rates:
        files = [path.stat().st_size for path in (place / name).rglob("*") if path.is_file()]
        rates[name]["MB on disk"] = sum(files) / 1e6
    _print(rates)


def _check_equal(folders: dict[str, Folder], ids: np.ndarray, shard_rows: int) -> None:
    expected = None
    for kind in FORMATS:
        values = np.stack(kind.open(folders[kind.name], shard_rows)(ids, len(COLUMNS)))
        expected = values if expected is None else expected
        if not np.array_equal(values, expected):
            raise SystemExit(f"{kind.name} gave other values than {FORMATS[0].name}")


def _drop_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _on_s3() -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_EC2_METADATA_DISABLED": "true"}
    child = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            rates = _measure_s3(f"http://127.0.0.1:{server.stdout.readline().strip()}")
        finally:
            server.stdin.close()  # it ends with that
    rows = S3_SHARDS * S3_SHARD_ROWS
    print(
        f"S3 on the loopback interface, {rows} rows, batches of {S3_BATCH}, files open: rows/s, requests and KiB a row"
    )
    _print(rates)


def _measure_s3(endpoint: str) -> dict[str, dict[str, float]]:
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    root, rng = Folder(f"s3://bucket?endpoint_override={quote(endpoint, safe='')}"), np.random.default_rng(SEED)
    shard_rows = S3_SHARD_ROWS
    batches = [rng.choice(S3_SHARDS * shard_rows, size=S3_BATCH, replace=False) for _ in range(S3_BATCHES)]
    rates: dict[str, dict[str, float]] = {}
    for kind in REMOTE:
        kind.write(root.child(kind.name), _shards(S3_SHARDS, shard_rows))
        rates[kind.name] = {}
        for what, columns in (("hints", len(COLUMNS)), ("latent", 1)):
            gather = kind.open(root.child(kind.name), shard_rows)
            gather(np.arange(S3_SHARDS) * shard_rows, columns)  # opens the files
            before, seconds = _counts(endpoint), []
            for ids in batches:
                started = time.perf_counter()
                gather(ids, columns)
                seconds.append(time.perf_counter() - started)
            requests, size = (now - then for now, then in zip(_counts(endpoint), before, strict=True))
            rates[kind.name] |= {
                what: S3_BATCH / statistics.median(seconds),
                f"{what} requests": requests / (S3_BATCH * S3_BATCHES),
                f"{what} KiB": size / 1024 / (S3_BATCH * S3_BATCHES),
            }
    return rates


def _counts(endpoint: str) -> tuple[int, int]:
    with urllib.request.urlopen(f"{endpoint}/-/counts") as answer:
        return tuple(json.load(answer))


def _serve() -> None:
    """moto's S3 on a free port, which is printed; /-/counts answers requests and bytes so far. Ends with its stdin."""
    import logging
    import threading

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application, requests, sizes = DomainDispatcherApplication(create_backend_app), [], []

    def counted(environ, start_response):
        if environ["PATH_INFO"] == "/-/counts":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps([len(requests), sum(sizes)]).encode()]
        requests.append(environ["REQUEST_METHOD"])

        def start(status, headers, *more):
            sizes.append(int(dict(headers).get("Content-Length", 0)) if environ["REQUEST_METHOD"] == "GET" else 0)
            return start_response(status, headers, *more)

        return application(environ, start)

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


def _print(rates: dict[str, dict[str, float]]) -> None:
    """A line a format; behind each figure its ratio to ours."""
    ours = rates[FORMATS[0].name]
    print(f"{'':<11}" + "".join(f"{what:>22}" for what in ours))
    for name, values in rates.items():
        cells = (f"{value:,.1f} ({value / ours[what]:.2f})" for what, value in values.items())
        print(f"{name:<11}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
