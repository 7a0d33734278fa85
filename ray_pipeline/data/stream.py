"""Ray Data: plan -> batches on this rank. One execution spans all the steps a phase has left, in their order.

Every rank runs its own pipeline: step numbers -> gather actors, which ask the plan for ids and read the rows. Order is
the plan's; Ray only moves the rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.diffusion.noise import variants

#: a gather task hands on about so much at once
_BLOCK_BYTES = 16 * 2**20
_MAX_BLOCKS = 2000


@dataclass(frozen=True)
class StreamSettings:
    """What one rank streams: `rows` maps the plan's ids to rows of the store."""

    plan: SamplePlan
    store: LatentStore
    rows: np.ndarray
    hints: tuple[str, ...]
    rank: int
    world_size: int
    name: str
    workers: int = 1


class Gather:
    """Ray actor: steps -> the rank's rows of those steps, with their indices in the endless sequence."""

    def __init__(self, settings: StreamSettings):
        self.settings = settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        s = self.settings
        index = np.concatenate([s.plan.positions(int(step), s.rank, s.world_size) for step in batch["id"]])
        chosen = variants(s.plan.seed, s.plan.phase, index, s.store.variants) if s.store.variants > 1 else None
        return {"index": index, **s.store.gather(s.rows[s.plan.ids(index)], chosen, s.hints)}


def stream(settings: StreamSettings, first_step: int, last_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield (step, {"index", "latent", "hint.<name>"}) for steps first_step to last_step - 1, in this order.

    Raises RuntimeError if the rows that arrive are not the planned ones.
    """
    if first_step >= last_step:
        return
    # closed with the stream: its actors would go on reading
    with closing(_blocks(settings, first_step, last_step)) as blocks:
        yield from _rebatch(blocks, settings, first_step, last_step)


def _blocks(settings: StreamSettings, first_step: int, last_step: int) -> Iterator[dict[str, np.ndarray]]:
    row_bytes = 2 * int(np.prod(settings.store.shape)) * (1 + len(settings.hints))
    step_bytes = row_bytes * -(-settings.plan.global_batch // settings.world_size)
    steps = last_step - first_step
    steps_per_block = max(1, min(_BLOCK_BYTES // step_bytes, steps // settings.workers))
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # its first batch takes 4 to 8 s, this one's 0.3 s
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    dataset = ray.data.range(steps, override_num_blocks=min(_MAX_BLOCKS, -(-steps // steps_per_block)))
    dataset.set_name(settings.name)
    gathered = dataset.map_batches(_Shifted(first_step), batch_size=None, num_cpus=0.05).map_batches(
        Gather,
        fn_constructor_args=(settings,),
        batch_size=steps_per_block,
        num_cpus=0.05,
        compute=ray.data.ActorPoolStrategy(size=settings.workers),
    )
    yield from gathered.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)


class _Shifted:
    """Range rows 0, 1, ... -> step numbers from `first`."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"] + self.first}


def _rebatch(
    blocks: Iterator[dict[str, np.ndarray]], settings: StreamSettings, first_step: int, last_step: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Cut blocks of any size at the borders of steps and check them against the plan."""
    held: list[dict[str, np.ndarray]] = []
    for step in range(first_step, last_step):
        planned = settings.plan.positions(step, settings.rank, settings.world_size)
        while sum(len(block["index"]) for block in held) < len(planned):
            block = next(blocks, None)
            if block is None:
                raise RuntimeError(f"the data stream ended before step {step}, expected {last_step - first_step} steps")
            held.append(block)
        joined = {key: _join([block[key] for block in held]) for key in held[0]}
        batch = {key: values[: len(planned)] for key, values in joined.items()}
        held = [{key: values[len(planned) :] for key, values in joined.items()}]
        if not np.array_equal(batch["index"], planned):
            raise RuntimeError(f"the data stream gave other samples than planned at step {step}")
        yield step, batch


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_ahead(items: Iterable[Any], depth: int = 2) -> Iterator[Any]:
    """Iterate `items` in a thread that stays up to `depth` items ahead; its exceptions arrive here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=produce, daemon=True, name="read-ahead")
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
