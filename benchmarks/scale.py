"""Scale on paper and by simulation: what 1 to 1,024 GPUs ask of plan, stream, storage, checkpoints and network.

    python benchmarks/scale.py                                     # Phase 2 of configs/microscopy.yaml, 8 samples a GPU
    python benchmarks/scale.py --phase 0 --network-gbytes 12.5     # Phase 1, 100 Gb/s a node
    python benchmarks/scale.py --global-batch 2048 --json scale.json

Nothing here was run on a GPU or on several machines. Each number says in its header where it comes from:

    measured   on this CPU, in CPU seconds: the plan, the reading of a real store of random rows in the page cache, the
               making of micro-batches, and Ray Data's accounting of streams (its class, without a cluster)
    computed   from the assumptions that are printed first. What is read of the storage is counted while the real plan,
               stream and store read from shards and a cache that hold nothing
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from ray_pipeline.config import Config, load_config
from ray_pipeline.data.encode_job import EncodeJob, encode_job
from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, rows_together
from ray_pipeline.data.mixture import Member, Mixture
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.data.shard_reader import _BLOCK_BYTES, _MAPPED_SHARDS, _REQUESTS, ShardReader
from ray_pipeline.data.shards import write_shard
from ray_pipeline.data.stream import _CHUNK_BYTES, Chunks, Gather, StreamSettings, _chunk_steps
from ray_pipeline.estimate import PhaseEstimate, estimate_phase, sample_flops
from ray_pipeline.phase_sections import PhaseConfig
from ray_pipeline.storage import Folder
from ray_pipeline.training.device_peak import _DATA_SHEETS
from ray_pipeline.training.setup import PhaseData, Start
from ray_pipeline.training.step import micro_batches

ROOT = Path(__file__).resolve().parent.parent
GPUS = tuple(2**power for power in range(11))
#: data sizes that planning is timed with
PLANNED = (10**6, 10**8, 10**9)
#: requests to object storage that opening a shard takes (its size, its header); a record or a block takes one more
OPEN_REQUESTS = 2
#: samples of a rank before those that are counted, whose shards it may have kept open: where it keeps 65536 of a full
#: shuffle, and else
LATELY, JUST_NOW = 72_000, 1_000
MOST_TURNS = 128
GRADIENT_BYTES = 4  # weights are fp32, under autocast too, and DDP reduces gradients as they are
STORED_SHARDS = 64  # of the store that is read here
GB, MB = 1e9, 1e6

Row = dict[str, float]


@dataclass(frozen=True)
class Assumptions:
    """What the computed numbers stand on; printed before them, and in the JSON. Bandwidths in bytes/s, one direction.

    batch: samples a GPU and step, the global batch growing with the GPUs, unless global_batch fixes it.
    samples_per_second: of one GPU that computes only. window: the shuffle window that is compared with the config's.
    chunk_seconds: CPU time that Ray takes for a chunk. request_limit, request_seconds: of object storage.
    """

    batch: int
    global_batch: int | None
    samples_per_second: float
    gpus_a_node: int
    nvlink: float
    network: float
    storage: float
    overlap: float
    samples: int
    window: int
    chunk_seconds: float
    request_limit: float
    request_seconds: float

    def global_batch_of(self, gpus: int) -> int:
        return self.global_batch or self.batch * gpus


@dataclass(frozen=True)
class Job:
    """A phase of a config, and what follows from it alone. stored: how its store is made. sample_bytes: needed of one
    sample, latent and hints."""

    config: Config
    phase: PhaseConfig
    stored: EncodeJob
    estimate: PhaseEstimate
    sample_bytes: int

    @property
    def gradient_bytes(self) -> int:
        return GRADIENT_BYTES * self.estimate.parameters

    def plan(self, samples: int, global_batch: int, window: int | None) -> SamplePlan:
        windowed = {"shard_rows": self.config.data.shard_rows, "window": window} if window else {}
        return SamplePlan(samples, global_batch, self.config.seed, self.phase.name, **windowed)

    def stream(self, plan: SamplePlan, source, rank: int, world_size: int) -> StreamSettings:
        mixture = Mixture((Member("rows", 0, plan.num_samples, None, simulated=False),), plan)
        hints = self.phase.condition_types
        return StreamSettings(mixture, source, hints, rank, world_size, "scale", self.config.train.dataloader_workers)

    @property
    def averages(self) -> int:
        """Averages of the weights that are tracked."""
        ema = self.config.ema
        return 1 + len(ema.more_decays) + len(ema.power_stds) if ema.enabled else 0


@dataclass(frozen=True)
class StreamCost:
    """Measured on this CPU: CPU seconds of gathering and of preparing one sample, of opening a shard; bytes that the
    index holds of a shard."""

    gather: float
    prepare: float
    open: float
    index_entry: int


@dataclass(frozen=True)
class Reads:
    """Of ranks that stream: samples, shards opened for them, and of object storage requests and bytes."""

    samples: int
    opens: int
    requests: int
    bytes: float


def open_job(config: Config, number: int, samples: int) -> Job:
    """The phase of this number."""
    phase, stored = config.phases[number], encode_job(config)
    columns = (2 if stored.posterior == "sample" else 1) + len(phase.condition_types)
    sample_bytes = 2 * int(np.prod(stored.shape)) * columns
    return Job(config, phase, stored, estimate_phase(config, phase, samples), sample_bytes)


def ring_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends, and receives, when a ring sums `size` bytes: a reduce-scatter, then an all-gather."""
    return 2 * (ranks - 1) / ranks * size


def step_row(job: Job, a: Assumptions, gpus: int) -> Row:
    """Computing, then the all-reduce but for the share of it that is hidden. The slowest link of the ring sets its
    pace: where there are several nodes, a node's cards together, since its rings cross them side by side."""
    global_batch, several = a.global_batch_of(gpus), gpus > a.gpus_a_node
    compute = global_batch / gpus / a.samples_per_second
    sent, link = ring_bytes(job.gradient_bytes, gpus), min(a.nvlink, a.network) if several else a.nvlink
    reduce = sent / link
    step = compute + (1 - a.overlap) * reduce
    return {
        "gpus": gpus,
        "nodes": -(-gpus // a.gpus_a_node),
        "batch": global_batch / gpus,
        "global_batch": global_batch,
        "compute_seconds": compute,
        "reduce_bytes": sent,
        "reduce_all_bytes": sent * gpus,
        "link": link,
        "reduce_seconds": reduce,
        "reduce_share": 1 - compute / step,
        "steps_per_second": 1 / step,
        "samples_per_second": global_batch / step,
        "epoch_seconds": a.samples * step / global_batch,
    }


def plan_row(job: Job, row: Row) -> Row:
    """Planning one step of one rank, for stores of several sizes."""
    gpus, found = row["gpus"], {}
    for samples in PLANNED:
        plan = job.plan(samples, row["global_batch"], job.config.data.shuffle_window)
        found[f"plan_seconds_{samples}"] = plan_seconds(plan, gpus)
    return found | {"plan_share": found[f"plan_seconds_{PLANNED[-1]}"] * row["steps_per_second"]}


def plan_seconds(plan: SamplePlan, world_size: int, runs: int = 15) -> float:
    """CPU seconds of `rank_batch`, median of runs of ten steps anywhere, as a worker asks for them."""
    rng, seconds = np.random.default_rng(0), []
    for first in rng.integers(0, 10 * plan.steps(1) + 1, runs).tolist():
        rank = int(rng.integers(world_size))
        started = time.process_time()
        for step in range(first, first + 10):
            plan.rank_batch(step, rank, world_size)
        seconds.append((time.process_time() - started) / 10)
    return statistics.median(seconds)


class EmptyShard:
    """A shard that was opened and holds nothing."""

    def check(self) -> None: ...

    def announce(self, row: int, variant: int, count: int) -> None: ...

    def record(self, row: int, variant: int, count: int) -> np.ndarray:
        return np.zeros((count, 1, 1, 1), np.float16)

    def part(self, first: int, size: int) -> bytes:
        return b""


class EmptyCache:
    """A cache of a node that knows which blocks it holds, those used last, and how many bytes it has fetched."""

    def __init__(self, limit: float):
        self.limit, self.fetched, self.fetches, self._held = limit, 0, 0, OrderedDict()

    def read(
        self, sha256: int, first: int, size: int, spans: Sequence[tuple[int, int]], fetch: Callable
    ) -> list[bytes]:
        if (sha256, first) in self._held:
            self._held.move_to_end((sha256, first))
        else:
            fetch()
            self.fetches, self.fetched = self.fetches + 1, self.fetched + size
            self._held[sha256, first] = size
            if len(self._held) * size > self.limit:
                self._held.popitem(last=False)
        return [bytes(count) for _, count in spans]


class CountingReader(ShardReader):
    """Reads shards that are not there: keeps as many open as a real one, and counts each opening.

    Latents have one element here, so that nothing is moved; a block has as many rows as a real one.
    """

    def __init__(self, job: Job, remote: bool, entries: Sequence[dict], together: int):
        shape = (job.stored.variants, len(job.stored.columns), 1, 1, 1)
        self.scale = job.stored.row_bytes / (2 * math.prod(shape))
        limit = job.config.data.cache_gib * 2**30 / self.scale
        folder = SimpleNamespace(local=None if remote else Path("/no/such/store"))
        super().__init__(folder, entries, shape, EmptyCache(limit) if limit and remote else None, together)
        self.block_rows = max(1, _BLOCK_BYTES // job.stored.row_bytes)
        self.opens = self.taken = 0

    def records(self, places: Sequence) -> list[np.ndarray]:
        """As its base does, without threads: a shard that two of them open at once would count twice."""
        self.taken += len(places)
        if self.cache is not None:
            return self._of_blocks(places, map)
        shards = self._shards({place.shard for place in places}, map)
        return [shards[place.shard].record(*place[1:]) for place in places]

    def _open(self, number: int) -> EmptyShard:
        self.opens += 1
        return EmptyShard()


class Entries(Sequence):
    """Of the index, the shards of a store of `samples` rows; made when they are asked for."""

    def __init__(self, samples: int, rows: int):
        self.samples, self.rows = samples, rows

    def __len__(self) -> int:
        return -(-self.samples // self.rows)

    def __getitem__(self, number: int) -> dict:
        if number >= len(self):
            raise IndexError(number)
        rows = min(self.rows, self.samples - number * self.rows)
        return {"rows": rows, "bytes": 0, "sha256": number}


def empty_store(job: Job, samples: int) -> LatentStore:
    """A store of so many rows of which nothing is there."""
    index = {
        "shape": (1, 1, 1), "hints": job.stored.hints, "simulated": job.stored.simulated, "datasets": [],
        "posterior": job.stored.posterior, "shards": Entries(samples, job.config.data.shard_rows),
        "variants": job.stored.variants,
    }  # fmt: skip
    return LatentStore(Folder("/no/such/store"), index, LatentStats(np.zeros(1), np.ones(1), samples, ""))


def turns(
    job: Job, plan: SamplePlan, stores: dict[int, LatentStore], world_size: int, lately: int = JUST_NOW
) -> list[Callable[[], int]]:
    """The streams of ranks, by their stores, from the middle of a phase on, a chunk each by turns, MOST_TURNS at most:
    functions that gather the chunks of one turn and return how many samples they hold. Shards of the last `lately`
    samples are open before."""
    total, streams = plan.steps(job.phase.epochs), []
    first, a_step = total // 2, max(1, plan.global_batch // world_size)
    for rank, store in stores.items():
        settings = job.stream(plan, store, rank, world_size)
        steps = _chunk_steps(replace(settings, source=SimpleNamespace(shape=job.stored.shape)), total, math.inf)
        before = range(max(0, first - lately // a_step), first)
        ids = plan.ids(np.concatenate([plan.positions(step, rank, world_size) for step in before]))
        store._reader._shards(set((ids // job.config.data.shard_rows).tolist()), map)
        streams.append(Gather(settings, Chunks(first, total, steps)))
    # of several actors each takes its turn, with shards open of its own
    numbers = range(0, len(streams[0].chunks), job.config.train.dataloader_workers)
    return [
        lambda number=number: sum(len(one.chunk(number)["index"]) for one in streams) for number in numbers[:MOST_TURNS]
    ]


def count_reads(job: Job, a: Assumptions, store: LatentStore, plan: SamplePlan, world_size: int, remote: bool) -> Reads:
    """Of object storage, or of a disk, by the ranks of one node; where it keeps nothing, by three ranks anywhere.

    Counted once they have gone through a window, and two chunks, until they have gone through two more, and eight.
    """
    together = rows_together(a.samples, plan.window, 1)
    reader = CountingReader(job, remote, store.index["shards"], together)
    ranks = sorted({0, world_size // 2, world_size - 1})
    if reader.cache is not None:
        ranks = range(min(world_size, a.gpus_a_node))
    readers = [copy.copy(reader) for _ in ranks]  # their cache is one
    stores = {rank: object.__new__(LatentStore) for rank in ranks}  # without summing up its shards once more
    for one, own in zip(stores.values(), readers, strict=True):
        own._opened = {}
        vars(one).update(vars(store), _reader=own)
    chunks = turns(job, plan, stores, world_size, LATELY if remote and plan.window is None else JUST_NOW)
    to_a_window = math.ceil((plan.window or 0) / (chunks[0]() / len(ranks) * world_size))
    warm, counted = min(max(2, to_a_window), len(chunks) // 2), max(8, 2 * to_a_window)
    for turn in chunks[1:warm]:
        turn()
    before = _counted(readers)
    samples = sum(turn() for turn in chunks[warm : warm + counted])
    opens, requests, fetched = (now - then for now, then in zip(_counted(readers), before, strict=True))
    return Reads(samples, opens, requests, fetched if reader.cache is not None else samples * job.sample_bytes)


def _counted(readers: list[CountingReader]) -> tuple[int, int, float]:
    """Until now: opened shards, requests, and bytes of blocks."""
    opens, cache = sum(reader.opens for reader in readers), readers[0].cache
    parts = sum(reader.taken for reader in readers) if cache is None else cache.fetches
    return opens, parts + OPEN_REQUESTS * opens, 0.0 if cache is None else cache.fetched * readers[0].scale


def storage_row(job: Job, a: Assumptions, row: Row, cost: StreamCost, store: LatentStore) -> Row:
    """What all ranks read, from a disk and from object storage, and Ray's object store on one node: a chunk is written
    once, by the actor that gathered it, and read once, where it lies, by the training process of the same node."""
    gpus, rate, found = row["gpus"], row["samples_per_second"], {}
    for name, window in (("", job.config.data.shuffle_window), ("_windowed", a.window)):
        plan = job.plan(a.samples, row["global_batch"], window)
        disk, remote = (count_reads(job, a, store, plan, gpus, remote) for remote in (False, True))
        steps = range(plan.steps(job.phase.epochs) // 2, plan.steps(job.phase.epochs))[:4]
        shards = [len(np.unique(plan.batch(step) // job.config.data.shard_rows)) for step in steps]
        found |= {
            f"batch_shards{name}": statistics.mean(shards),
            f"opens_per_sample{name}": disk.opens / disk.samples,
            f"opens_per_second{name}": disk.opens / disk.samples * rate,
            f"requests_per_sample{name}": remote.requests / remote.samples,
            f"requests_per_second{name}": remote.requests / remote.samples * rate,
            f"remote_bytes_per_second{name}": remote.bytes / remote.samples * rate,
        }
    on_node = min(gpus, a.gpus_a_node)
    each = rate / gpus
    gather = cost.gather + found["opens_per_sample"] * cost.open
    chunks = each * job.sample_bytes / _CHUNK_BYTES
    return found | {
        "needed_bytes_per_second": rate * job.sample_bytes,
        "object_store_written": on_node * each * job.sample_bytes,
        "object_store_read": on_node * each * job.sample_bytes,
        "chunks_per_second": on_node * chunks,
        "read_seconds": cost.gather,
        "open_seconds": cost.open,
        "gather_seconds": gather,
        "prepare_seconds": cost.prepare,
        "gather_cores": each * gather,
        "prepare_cores": each * cost.prepare,
        "ray_cores": chunks * a.chunk_seconds,
        "node_cores": on_node * (each * (gather + cost.prepare) + chunks * a.chunk_seconds),
    }


def checkpoint_row(job: Job, a: Assumptions, row: Row, cost: StreamCost) -> Row:
    """Rank 0 writes all of a checkpoint. To go on, rank 0 reads it to check its hashes, then every rank reads it;
    each rank reads the index of the training store, too."""
    gpus, size, minutes = row["gpus"], job.estimate.checkpoint_bytes, job.config.checkpoint.every_minutes
    index = cost.index_entry * -(-a.samples // job.config.data.shard_rows)
    restart = (gpus + 1) * size + gpus * index
    return {
        "checkpoint_bytes": size,
        "timed_bytes_per_second": size / (60 * minutes) if minutes else 0.0,
        "epoch_bytes_per_second": size / row["epoch_seconds"],
        "index_bytes": index,
        "restart_bytes": restart,
        "restart_seconds": restart / a.storage,
    }


def coordinator_row(gpus: int, gpus_a_node: int) -> Row:
    """CPU seconds in which Ray Data's one actor takes in the streams of all ranks, nan where this Ray has none.

    It shares the nodes out anew at each: a pass over all streams and nodes. Timed with all there; passes before took
    less in proportion, so it is half of as many.
    """
    one_pass = pass_seconds(gpus, gpus_a_node)
    return {"pass_seconds": one_pass, "coordinator_seconds": gpus / 2 * one_pass}


def pass_seconds(gpus: int, gpus_a_node: int) -> float:
    """CPU seconds of one pass of Ray Data's coordinator with the streams of all ranks there."""
    try:
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module
        from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES
    except ImportError:
        return math.nan
    holds = {"CPU": 16.0 * gpus_a_node, "GPU": float(gpus_a_node), "memory": 1e12, "object_store_memory": 2e11}
    nodes = [
        {"Alive": True, "NodeID": f"{number:056x}", "Resources": holds | {f"node:{number}": 1.0}, "Labels": {}}
        for number in range(-(-gpus // gpus_a_node))
    ]
    try:
        coordinator = module._AutoscalingCoordinatorActor(
            send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: nodes
        )
        share_out, coordinator._refresh_resource_reservations = coordinator._refresh_resource_reservations, lambda: None
        for rank in range(gpus):
            coordinator.request_resources(f"data-{rank}", [], 180, request_remaining=list(STANDARD_RESOURCE_TYPES))
        seconds = []
        for _ in range(3):
            started = time.process_time()
            share_out()
            seconds.append(time.process_time() - started)
    except (AttributeError, TypeError):  # another Ray
        return math.nan
    return min(seconds)


def measure_stream(job: Job, folder: Path) -> StreamCost:
    """Write a store of random rows, three chunks of them, and read each once, shuffled, from shards just opened; then
    one row of each shard. One variant is stored: of others lie no bytes between two reads here."""
    chunk_rows, size = _CHUNK_BYTES // job.sample_bytes, 4 * job.config.train.batch_size
    rows, prepared = 3 * chunk_rows, size * min(16, _CHUNK_BYTES // job.sample_bytes // size)
    entry = write_store(job, folder, rows)
    all_rows, one_each, prepare = [], [], []
    for _ in range(3):
        # one step a chunk
        plan = SamplePlan(rows, chunk_rows, job.config.seed, job.phase.name)
        settings = job.stream(plan, LatentStore.open(folder), 0, 1)
        gather, started = Gather(settings, Chunks(0, 3, 1)), time.process_time()
        for number in range(3):
            chunk = gather.chunk(number)
        all_rows.append(time.process_time() - started)
        store = LatentStore.open(folder)
        firsts, started = store._starts[:-1], time.process_time()
        store.gather(firsts, hints=job.phase.condition_types)
        one_each.append(time.process_time() - started)
        data = PhaseData(
            job=None, config=job.config, phase=job.phase, rank=0, world_size=1, device=torch.device("cpu"),
            train_store=store, val_store=None, source=store, mixture=settings.mixture, val_rows=None,
            val_simulated=None, checkpoints=None, start=Start(), newest=None,
        )  # fmt: skip
        started = time.process_time()
        for first in range(0, prepared, size):
            micro_batches(data, {name: values[first : first + size] for name, values in chunk.items()})
        prepare.append((time.process_time() - started) / prepared)
    opened = len(firsts)
    each = (min(all_rows) - min(one_each)) / (rows - opened)
    opening = max(0.0, min(one_each) / opened - each)
    return StreamCost(gather=each, prepare=min(prepare), open=opening, index_entry=entry)


def write_store(job: Job, folder: Path, rows: int) -> int:
    """A store of `rows` random rows; returns the bytes that its index holds of a shard."""
    store, shape, hints = Folder(folder), job.stored.shape, job.phase.condition_types
    rng, shards = np.random.default_rng(0), []
    columns = job.sample_bytes // (2 * int(np.prod(shape)))
    for number, part in enumerate(np.array_split(np.arange(rows), STORED_SHARDS)):
        values = rng.standard_normal((len(part), 1, columns, *shape), dtype=np.float32).astype(np.float16)
        shards.append(write_shard(store.child("train"), f"shard-{number:05d}.npy", values))
    index = {
        "version": FORMAT_VERSION, "fingerprint": "rows", "shape": shape, "hints": hints, "simulated": [],
        "posterior": job.config.vae.posterior, "variants": 1, "rejected": 0,
        "autoencoder": {"pretrained": "none", "sha256": "none"}, "intensity": [], "shards": shards,
        "datasets": [{"name": "rows", "start": 0, "count": rows, "partners": {}}],
    }  # fmt: skip
    store.child("train").write("index.json", json.dumps(index).encode())
    stats = LatentStats(np.zeros(shape[0]), np.ones(shape[0]), rows, "rows")
    store.write("stats.json", json.dumps(stats.as_json()).encode())
    return len(json.dumps(shards)) // len(shards)


#: heading in two lines parted by |; measured or computed; key of the row; what it is shown in; digits behind the point,
#: -1: three digits in all
COMPUTED, MEASURED = "computed", "measured"
_GPUS = ("GPUs", "", "gpus", 1, 0)
TABLES = {
    "A training step": (
        _GPUS,
        ("nodes", COMPUTED, "nodes", 1, 0),
        ("samples|a GPU", COMPUTED, "batch", 1, -1),
        ("global|batch", COMPUTED, "global_batch", 1, 0),
        ("compute|ms", COMPUTED, "compute_seconds", 1e-3, 2),
        ("all-reduce|GB a GPU", COMPUTED, "reduce_bytes", GB, 2),
        ("all-reduce|GB in all", COMPUTED, "reduce_all_bytes", GB, 0),
        ("slowest|link GB/s", COMPUTED, "link", GB, 1),
        ("all-reduce|ms", COMPUTED, "reduce_seconds", 1e-3, 2),
        ("of the|step, %", COMPUTED, "reduce_share", 0.01, 1),
        ("steps/s", COMPUTED, "steps_per_second", 1, -1),
        ("samples/s", COMPUTED, "samples_per_second", 1, 0),
    ),
    "Plan and stream, timed on this CPU": (
        _GPUS,
        *((f"plan, us|{size:,} rows", MEASURED, f"plan_seconds_{size}", 1e-6, 0) for size in PLANNED),
        ("read, us|a sample", MEASURED, "read_seconds", 1e-6, 0),
        ("open, us|a shard", MEASURED, "open_seconds", 1e-6, 0),
        ("prepare, us|a sample", MEASURED, "prepare_seconds", 1e-6, 0),
        ("Ray Data's pass|over streams, ms", MEASURED, "pass_seconds", 1e-3, -1),
    ),
    "Plan and stream on the host": (
        _GPUS,
        ("plan, of|the step, %", COMPUTED, "plan_share", 0.01, 2),
        ("gather, us|a sample", COMPUTED, "gather_seconds", 1e-6, 0),
        ("gather|cores/GPU", COMPUTED, "gather_cores", 1, 2),
        ("prepare|cores/GPU", COMPUTED, "prepare_cores", 1, 2),
        ("Ray|cores/GPU", COMPUTED, "ray_cores", 1, 3),
        ("in all|cores/node", COMPUTED, "node_cores", 1, 1),
        ("Ray Data takes|streams in, s", COMPUTED, "coordinator_seconds", 1, -1),
    ),
    "Storage and Ray's object store": (
        _GPUS,
        ("needed|GB/s", COMPUTED, "needed_bytes_per_second", GB, -1),
        ("shards|a batch", COMPUTED, "batch_shards", 1, 0),
        ("disk|opens/s", COMPUTED, "opens_per_second", 1, 0),
        ("remote|requests/s", COMPUTED, "requests_per_second", 1, 0),
        ("remote|GB/s", COMPUTED, "remote_bytes_per_second", GB, -1),
        ("window:|shards", COMPUTED, "batch_shards_windowed", 1, 0),
        ("window: disk|opens/s", COMPUTED, "opens_per_second_windowed", 1, 0),
        ("window: remote|requests/s", COMPUTED, "requests_per_second_windowed", 1, 0),
        ("window: rem.|GB/s", COMPUTED, "remote_bytes_per_second_windowed", GB, -1),
        ("object store|in, MB/s node", COMPUTED, "object_store_written", MB, 0),
        ("object store|out, MB/s node", COMPUTED, "object_store_read", MB, 0),
        ("chunks/s|a node", COMPUTED, "chunks_per_second", 1, -1),
    ),
    "Checkpoints (written by rank 0 alone) and restarts": (
        _GPUS,
        ("a save|GB", COMPUTED, "checkpoint_bytes", GB, 2),
        ("timed saves|MB/s", COMPUTED, "timed_bytes_per_second", MB, -1),
        ("an epoch|s", COMPUTED, "epoch_seconds", 1, -1),
        ("each epoch the|best, MB/s", COMPUTED, "epoch_bytes_per_second", MB, -1),
        ("index read|MB a rank", COMPUTED, "index_bytes", MB, -1),
        ("restart reads|GB in all", COMPUTED, "restart_bytes", GB, 0),
        ("restart reads|s", COMPUTED, "restart_seconds", 1, -1),
    ),
}


def table(columns: Sequence[tuple[str, str, str, float, int]], rows: list[Row]) -> str:
    """Aligned text: two lines of heading, one that says measured or computed, then the rows."""
    cells = []
    for heading, kind, key, unit, digits in columns:
        values = [_shown(row[key] / unit, digits) for row in rows]
        head = [*heading.split("|"), ""][:2] + [kind]
        width = max(map(len, head + values))
        cells.append([text.rjust(width) for text in [*head, "-" * width, *values]])
    return "\n".join("  ".join(line) for line in zip(*cells, strict=True))


def _shown(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    if digits < 0:
        digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"


def main() -> int:
    arguments = _parse()
    if arguments.global_batch and min(arguments.gpus) > arguments.global_batch:
        raise SystemExit(f"no GPU of {arguments.gpus} has a sample of a global batch of {arguments.global_batch}")
    config = load_config(arguments.config, arguments.set)
    job = open_job(config, arguments.phase, arguments.samples)
    a = assumptions(job, arguments)
    print(assumed_in_words(job, a, arguments), flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cost = measure_stream(job, Path(folder))
    refused = [gpus for gpus in arguments.gpus if gpus > a.global_batch_of(gpus)]
    rows = scale_rows(job, a, cost, [gpus for gpus in arguments.gpus if gpus not in refused])
    for title, columns in TABLES.items():
        print(f"\n{title}\n{table(columns, rows)}")
    if refused:
        print(f"\nrefused: {', '.join(map(str, refused))} GPUs, more than samples of the global batch {a.global_batch}")
    print("\n" + limits(job, a, cost, rows[-1]))
    if arguments.json:
        kinds = {key: kind for columns in TABLES.values() for _, kind, key, *_ in columns if kind}
        values = {"assumptions": vars(a), "stream_cost": vars(cost), "kinds": kinds, "refused": refused, "rows": rows}
        arguments.json.write_text(json.dumps(values, indent=1).replace("NaN", "null"))
    return 0


def scale_rows(job: Job, a: Assumptions, cost: StreamCost, gpus: list[int]) -> list[Row]:
    """A row for each number of GPUs."""
    store, rows = empty_store(job, a.samples), []
    for number in gpus:
        row = step_row(job, a, number)
        row |= plan_row(job, row)
        row |= storage_row(job, a, row, cost, store)
        row |= checkpoint_row(job, a, row, cost)
        rows.append(row | coordinator_row(number, a.gpus_a_node))
    return rows


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "microscopy.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config")
    parser.add_argument("--phase", type=int, default=-1, help="number of the phase, from 0; default: the last")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--samples", type=int, default=10**8, help="tiles of the store")
    parser.add_argument("--batch", type=int, default=8, help="samples a GPU and step; the global batch grows with them")
    parser.add_argument("--global-batch", type=int, help="fixed instead, for any number of GPUs")
    parser.add_argument("--gpu", default="H100", choices=[name for name, *_ in _DATA_SHEETS])
    parser.add_argument("--utilisation", type=float, default=0.4, help="of its data sheet's peak, by passes and update")
    parser.add_argument("--samples-per-second", type=float, help="of one GPU, instead of these two")
    parser.add_argument("--gpus-a-node", type=int, default=8)
    parser.add_argument("--window", type=int, default=10_000, help="shuffle window beside that of the config")
    for name, default, words in (
        ("nvlink-gbytes", 450, "GB/s of a GPU within its node, one direction"),
        ("network-gbytes", 400, "GB/s of all network cards of a node together, one direction"),
        ("storage-gbytes", 100, "GB/s of the shared storage, for restarts"),
        ("overlap", 0, "share of the all-reduce that the backward pass hides"),
        ("chunk-ms", 60, "CPU time that Ray takes for a chunk; ray_pipeline/data/stream.py tells it"),
        ("request-limit", 5500, "requests/s that object storage grants one folder; S3's documentation has it"),
        ("request-ms", 20, "until object storage answers"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=words + " (default: %(default)s)")
    parser.add_argument("--folder", help="where to write the store that is read (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write assumptions and rows here")
    return parser.parse_args()


def assumptions(job: Job, arguments: argparse.Namespace) -> Assumptions:
    """From the command line; a GPU's samples/s from the operations of a sample, unless given."""
    rate = arguments.samples_per_second
    if rate is None:
        rate = arguments.utilisation * _peak(job, arguments.gpu) / sample_flops(job.config, job.phase)
    return Assumptions(
        batch=arguments.batch,
        global_batch=arguments.global_batch,
        samples_per_second=rate,
        gpus_a_node=arguments.gpus_a_node,
        nvlink=GB * arguments.nvlink_gbytes,
        network=GB * arguments.network_gbytes,
        storage=GB * arguments.storage_gbytes,
        overlap=arguments.overlap,
        samples=arguments.samples,
        window=arguments.window,
        chunk_seconds=arguments.chunk_ms / 1e3,
        request_limit=arguments.request_limit,
        request_seconds=arguments.request_ms / 1e3,
    )


def _peak(job: Job, gpu: str) -> float:
    bf16, fp32 = next(peaks for name, *peaks in _DATA_SHEETS if name == gpu)
    return 1e12 * (fp32 if job.config.train.precision == "fp32" else bf16)


def assumed_in_words(job: Job, a: Assumptions, arguments: argparse.Namespace) -> str:
    config, estimate = job.config, job.estimate
    how = "given" if arguments.samples_per_second else (
        f"{arguments.utilisation:.0%} of the {_peak(job, arguments.gpu) / 1e12:.0f} TFLOP/s of a {arguments.gpu}'s "
        f"data sheet, whatever the micro-step; {sample_flops(config, job.phase) / 1e9:.0f} GFLOP a sample"
    )  # fmt: skip
    batch = f"{a.global_batch}, fixed" if a.global_batch else f"{a.batch} a GPU: grows with the GPUs (weak scaling)"
    window, shards = config.data.shuffle_window, -(-a.samples // config.data.shard_rows)
    row = job.stored.row_bytes
    lines = (
        ("network", f"{config.model.architecture}, {job.phase.name}: {estimate.parameters:,} trained parameters"),
        ("a GPU", f"{a.samples_per_second:,.0f} samples/s: {how}"),
        ("global batch", f"{batch}; the config says {config.train.global_batch}"),
        ("a node", f"{a.gpus_a_node} GPUs, {a.nvlink / GB:g} GB/s a GPU within, {a.network / GB:g} GB/s to others"),
        ("all-reduce", f"one a step, ring, fp32 gradients, {a.overlap:.0%} of it hidden by the backward pass"),
        ("a sample", f"{job.sample_bytes:,} bytes: latent and {len(job.phase.condition_types)} hints, fp16"),
        ("store", f"{a.samples:,} tiles of {row:,} bytes, {a.samples * row / 1e12:,.1f} TB in "
                  f"{shards:,} shards of {config.data.shard_rows}; shuffle_window {window or 'null: full shuffle'}"),
        ("window", f"of the columns that say so: {a.window:,} rows, {a.window * row / GB:,.1f} GB"),
        ("disk", f"a shared file system; a gather actor keeps {_MAPPED_SHARDS} shards open"),
        ("remote", f"object storage: {OPEN_REQUESTS} requests to open a shard, 1 a sample, or a block of about "
                   f"{_BLOCK_BYTES / 2**20:g} MiB that the node keeps; data.cache_gib {config.data.cache_gib:g}"),
        ("stream", f"chunks of {_CHUNK_BYTES // 2**20} MiB that cost Ray {1e3 * a.chunk_seconds:g} ms of CPU; "
                   f"{config.train.dataloader_workers} gather actor(s) a rank"),
        ("object store", "a chunk is written once, by a gather actor, and read once, mapped, by the rank on its node"),
        ("checkpoint", f"every {config.checkpoint.every_minutes or math.inf:g} minutes: weights, Adam's two moments, "
                       f"{job.averages} averages, fp32; and "
                       f"{estimate.snapshot_bytes / GB:.0f} GB of snapshots over the phase"),
        ("restart", f"every rank reads the checkpoint; storage gives {a.storage / GB:g} GB/s to all together"),
        ("measured", f"here, on {cpu_model()}; no GPU, no second machine"),
    )  # fmt: skip
    return "Assumptions\n" + "\n".join(f"  {name:<13} {words}" for name, words in lines)


def cpu_model() -> str:
    """Name of this machine's processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "an unknown processor"
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")


def limits(job: Job, a: Assumptions, cost: StreamCost, most: Row) -> str:
    """Where the row of most GPUs says that it stops scaling, and what all rows leave out."""
    gpus, rate = f"{most['gpus']:,} GPUs", a.samples_per_second
    requests = most["requests_per_sample"]
    fed = a.request_limit / (requests * most["samples_per_second"] / most["gpus"])
    actor = min(_REQUESTS / a.request_seconds / requests, 1 / most["gather_seconds"])
    slow = ring_bytes(job.gradient_bytes, most["gpus"]) / 12.5e9
    fetched = most["remote_bytes_per_second_windowed"] / most["needed_bytes_per_second"]
    # a shard on a disk is open twice, and mapped; those of a chunk come to those that are kept
    files = 3 * (_MAPPED_SHARDS + min(_CHUNK_BYTES // job.sample_bytes, -(-a.samples // job.config.data.shard_rows)))
    stops = (
        f"all-reduce on {gpus}: as long as computing at {rate * most['reduce_seconds']:,.0f} samples a GPU and step; "
        f"with 12.5 GB/s a node it takes {slow:.2f} s, and that is at {rate * slow:,.0f} samples",
        f"train.global_batch {job.config.train.global_batch} of the config: more GPUs than that are refused",
        f"one thread a rank prepares {1 / cost.prepare:,.0f} samples/s on this CPU; a GPU computes {rate:,.0f}",
        f"one gather actor gives {1 / most['gather_seconds']:,.0f} samples/s on this CPU from memory, and {actor:,.0f} "
        f"from object storage that answers after {1e3 * a.request_seconds:g} ms ({_REQUESTS} at once)",
        f"a full shuffle of shards on a disk has a gather actor hold up to {files:,} files open",
        f"object storage that grants a folder {a.request_limit:,.0f} requests/s feeds {fed:,.1f} GPUs",
        f"with the window, on {gpus}: {most['opens_per_sample_windowed']:.2f} openings a sample on a disk; of object "
        f"storage {most['requests_per_sample_windowed']:.2f} requests a sample, and {fetched:,.1f} times its bytes",
        f"a restart of {gpus} reads {most['restart_bytes'] / 1e12:,.2f} TB, the whole checkpoint on every rank",
        f"an epoch of {a.samples:,} tiles lasts {most['epoch_seconds']:,.0f} s on {gpus}; each that is best is saved",
        f"Ray Data's one coordinator shares the nodes out anew for every stream that starts: those of {gpus} take it "
        f"{most['coordinator_seconds']:,.1f} s of CPU",
    )
    missing = (
        "overlap of all-reduce and backward pass (--overlap), stragglers, network latency and contention",
        "Ray's controller, GCS and executors but for the above; the disks and caches of the storage",
        "validation, pictures, and rank 0's copy of what it saves: all ranks wait for them; failures",
    )
    sections = {"Where it stops, by these numbers": stops, "Not modelled": missing}
    return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {words}" for words in lines)))


if __name__ == "__main__":
    sys.exit(main())
