"""Ray Data: plan -> batches on this rank. One execution spans all the steps a phase has left, in their order.

Every rank runs its own pipeline: chunks of steps -> gather actors, which ask the plan for ids and read the rows. Order
is the plan's; Ray only moves the rows. A chunk travels as one row of Ray Data, which never cuts a row, and holds whole
steps: what arrives is cut without a copy. The first chunk of stored latents the training process gathers itself, by the
same code, while the actors start.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.mixture import Mixture
from ray_pipeline.data.tile_source import TileSource

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

#: a chunk of stored latents holds about so much: a chunk costs Ray the same 30 ms of two cores whatever its size
_CHUNK_BYTES = 64 * 2**20
#: and at most such a part of a rank's share of Ray's object store: with less than twenty in it a stream stood still
_STORE_PARTS = 24
#: a short phase is cut into so many chunks at least, lest this process gather a large part of it
_MIN_CHUNKS = 8
#: chunks whose numbers one Ray task tells; every chunk is gathered by a task of its own, so that all actors have work
_TASK_CHUNKS = 64

#: shortest and longest rest of Ray Data's loop
_REST_SECONDS = (0.001, 0.05)

#: logical CPUs of an actor that gathers: where workers fill a node it must still find a place. One that runs the
#: autoencoder takes more
GATHER_CPUS = 0.0
ENCODER_CPUS = 1.0


@dataclass(frozen=True)
class StreamSettings:
    """What one rank streams: the mixture's rows of `source`, with these hints, from `workers` actors.

    timeout: seconds that a chunk may let this process wait, or None for ever.
    """

    mixture: Mixture
    source: LatentStore | TileSource
    hints: tuple[str, ...]
    rank: int
    world_size: int
    name: str
    workers: int = 1
    gpus_per_worker: float = 0.0
    timeout: float | None = None

    @property
    def encodes(self) -> bool:
        """Whether the actors run the autoencoder."""
        return isinstance(self.source, TileSource)


@dataclass(frozen=True)
class Chunks:
    """Steps first to last - 1, cut into chunks of `steps` steps each; the last may be shorter."""

    first: int
    last: int
    steps: int

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.steps)

    def __getitem__(self, number: int) -> range:
        start = self.first + number * self.steps
        return range(start, min(start + self.steps, self.last))


class ChunkNumbers(ray.data.Datasource):
    """Numbers of chunks, first to last - 1, told without a CPU; `ray.data.range` waits for one in a full cluster."""

    def __init__(self, first: int, last: int):
        self.numbers = range(first, last)

    def estimate_inmemory_data_size(self) -> int:
        return 8 * len(self.numbers)

    def get_read_tasks(self, parallelism: int, *_args, **_kwargs) -> list[ReadTask]:
        """Tasks that list the numbers in order, one a block."""
        parts = np.array_split(np.array(self.numbers), parallelism)
        meta = [BlockMetadata(len(part), part.nbytes, input_files=None, exec_stats=None) for part in parts]
        return [ReadTask(partial(_single_rows, part), about) for part, about in zip(parts, meta, strict=True)]


def _single_rows(numbers: np.ndarray) -> list[pa.Table]:
    return [pa.table({"id": [number]}) for number in numbers]


class Gather:
    """Ray actor: number of a chunk -> its rows, with their indices in the endless sequence."""

    def __init__(self, settings: StreamSettings, chunks: Chunks):
        self.settings, self.chunks = settings, chunks

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values[None] for name, values in self.chunk(int(batch["id"][0])).items()}

    def chunk(self, number: int) -> dict[str, np.ndarray]:
        """Rows of one chunk, {"index", "latent", "hint.<name>"}."""
        s, plan = self.settings, self.settings.mixture.plan
        index = np.concatenate([plan.positions(step, s.rank, s.world_size) for step in self.chunks[number]])
        rows, simulated = s.mixture.rows(index)
        variants = plan.variants(index, s.source.variants)
        return {"index": index, **s.source.gather(rows, variants, s.hints, simulated)}


class Rest(ExecutionCallback):
    """Lets Ray Data's loop rest after turns that started and read nothing, longer each time. The loop waits for tasks
    that have output, but where the object store's share is used up it does not read that output and would turn without
    a pause: a thread of the training process that takes a whole core and Python's lock."""

    def __init__(self):
        self._done, self._seconds = -1, 0.0

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        metrics = [op.metrics for op in executor._topology]
        done = sum(each.num_tasks_submitted + each.num_task_outputs_generated for each in metrics)
        self._seconds = 0.0 if done != self._done else min(max(_REST_SECONDS[0], 2 * self._seconds), _REST_SECONDS[1])
        self._done = done
        time.sleep(self._seconds)


def stream(settings: StreamSettings, first_step: int, last_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (step, {"index", "latent", "hint.<name>"}) for steps first_step to last_step - 1, in this order.

    Arrays may be views of shared memory: copy before writing. Raises RuntimeError if the rows that arrive are not the
    planned ones, or none arrive within `settings.timeout`.
    """
    if first_step >= last_step:
        return
    room = ray.cluster_resources()["object_store_memory"]
    chunks = Chunks(first_step, last_step, _chunk_steps(settings, last_step - first_step, room))
    # Ray Data needs seconds for its first chunk, so this process gathers one meanwhile
    own = 0 if settings.encodes else 1
    items = _arriving(_dataset(settings, chunks, own)) if own < len(chunks) else iter(())
    # closed with the stream: its actors would go on reading
    with closing(ReadAhead(items, depth=1, timeout=settings.timeout)) as arriving:
        for number in range(len(chunks)):
            try:
                chunk = Gather(settings, chunks).chunk(number) if number < own else next(arriving, None)
            except queue.Empty:
                raise RuntimeError(_starved(settings, chunks[number].start)) from None
            if chunk is None:
                raise RuntimeError(f"the data stream ended before step {chunks[number].start} of {last_step}")
            yield from _cut(chunk, settings, chunks[number])


def _starved(settings: StreamSettings, step: int) -> str:
    have = ray.available_resources()
    need = {"CPU": ENCODER_CPUS if settings.encodes else GATHER_CPUS, "GPU": settings.gpus_per_worker}
    each = " and ".join(f"{amount:g} {name} ({have.get(name, 0):g} free)" for name, amount in need.items())
    return (
        f"the data stream {settings.name} gave no batch for step {step} within {settings.timeout / 60:g} minutes "
        f"(ray.timeout_minutes); its {settings.workers} actor(s) take {each} each: free what is short, see that the "
        "storage that the tiles or latents come from answers, or allow more time"
    )


def _chunk_steps(settings: StreamSettings, steps: int, object_store_bytes: float) -> int:
    """Steps of a chunk. An actor that encodes takes one, so that a step is always encoded in the same batches.

    object_store_bytes: of all nodes of the Ray.
    """
    if settings.encodes:
        return 1
    row_bytes = 2 * int(np.prod(settings.source.shape)) * (1 + len(settings.hints))
    step_bytes = row_bytes * -(-settings.mixture.plan.global_batch // settings.world_size)
    chunk_bytes = min(_CHUNK_BYTES, object_store_bytes / settings.world_size / _STORE_PARTS)
    return max(1, min(int(chunk_bytes // step_bytes), -(-steps // _MIN_CHUNKS)))


def _dataset(settings: StreamSettings, chunks: Chunks, first: int) -> ray.data.Dataset:
    """Chunks from number `first` on, to be gathered in their order once it is iterated."""
    tasks = -(-(len(chunks) - first) // _TASK_CHUNKS)
    with _data_context():
        # one task at a time: those that take no CPU would all start at once, each in a process of its own
        dataset = ray.data.read_datasource(
            ChunkNumbers(first, len(chunks)), num_cpus=0, concurrency=1, override_num_blocks=tasks
        )
        dataset.set_name(settings.name)
        return dataset.map_batches(
            Gather,
            fn_constructor_args=(settings, chunks),
            batch_size=1,
            num_cpus=ENCODER_CPUS if settings.encodes else GATHER_CPUS,
            num_gpus=settings.gpus_per_worker or None,
            # Ray puts what takes no CPU on any node; here the rows have no way to go
            scheduling_strategy="DEFAULT" if settings.encodes else _this_node(),
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
        )


def _this_node() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _arriving(dataset: ray.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """Chunks as they come out of Ray Data."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1):
        yield {name: values[0] for name, values in batch.items()}


def _data_context():
    """Ray Data's settings for the data sets that are made within."""
    context = ray.data.DataContext.get_current().copy()
    context.use_datasource_v2 = False  # its first batch takes 4 to 8 s, this one's 0.3 s
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every row, which is a chunk, is a block of its own
    context.memory_usage_poll_interval_s = None
    context.custom_execution_callback_classes.append(Rest)
    return ray.data.DataContext.current(context)


def _cut(
    chunk: dict[str, np.ndarray], settings: StreamSettings, steps: range
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Cut a chunk at the borders of its steps and check it against the plan."""
    start = 0
    for step in steps:
        planned = settings.mixture.plan.positions(step, settings.rank, settings.world_size)
        batch = {name: values[start : start + len(planned)] for name, values in chunk.items()}
        if not np.array_equal(batch["index"], planned):
            raise RuntimeError(f"the data stream gave other samples than planned at step {step}")
        start += len(planned)
        yield step, batch


class ReadAhead(Iterator[Any]):
    """Iterates `items` in a thread that starts at once and stays up to `depth` items ahead; its exceptions arrive
    here, and queue.Empty where an item is not there after `timeout` seconds."""

    def __init__(self, items: Iterable[Any], depth: int = 2, timeout: float | None = None):
        self._items, self._timeout = items, timeout
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True, name="read-ahead")
        self._thread.start()

    def __next__(self) -> Any:
        if self._stopped.is_set():
            raise StopIteration
        kind, value = self._ready.get(timeout=self._timeout)
        if kind == "item":
            return value
        self._stopped.set()
        raise value

    def close(self) -> None:
        """End the thread, as soon as it has its next item, and close what it reads; who waits in `next` is let go."""
        self._stopped.set()
        with suppress(queue.Full):  # then nobody waits
            self._ready.put_nowait(("end", StopIteration()))

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._put(("item", item)):
                    return
            self._put(("end", StopIteration()))
        except BaseException as error:
            self._put(("end", error))
        finally:
            if hasattr(self._items, "close"):
                self._items.close()

    def _put(self, item: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
