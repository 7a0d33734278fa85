"""What Ray Data hands to each rank is what the plan says, from any step on."""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util import placement_group, remove_placement_group

from ray_pipeline.data.latents import LatentStore
from ray_pipeline.data.mixture import Member, Mixture
from ray_pipeline.data.plan import MixedPlan, SamplePlan
from ray_pipeline.data.stream import Chunks, Gather, ReadAhead, StreamSettings, stream
from ray_pipeline.errors import find_user_error

SHAPE = (1, 2, 4)
ROWS, SHARD_ROWS, VARIANTS = 37, 10, 3
BORDER = 23  # rows of data set "a"; the others are of "b"
HINTS = ("denoising", "canny")
COLUMNS = ("latent", "hint.denoising", "hint.canny", "simulated.denoising")
BATCH = 11  # that no number of ranks divides


def code(row: np.ndarray, variant: np.ndarray, column: np.ndarray | int) -> np.ndarray:
    """What a stored latent says about where it came from."""
    return row + 40 * variant + 120 * column  # below 2048: exact in fp16


@pytest.fixture(scope="module")
def store(write_latents, tmp_path_factory) -> LatentStore:
    """Every latent holds its row, variant and column."""
    places = np.arange(ROWS)[:, None, None], np.arange(VARIANTS)[:, None], np.arange(len(COLUMNS))
    values = np.broadcast_to(code(*places)[..., None, None, None], (ROWS, VARIANTS, len(COLUMNS), *SHAPE))
    ranges = [("a", 0, BORDER), ("b", BORDER, ROWS - BORDER)]
    datasets = [{"name": n, "start": s, "count": c, "partners": {"denoising": c}} for n, s, c in ranges]
    root = tmp_path_factory.mktemp("stream")
    return write_latents(root, values, HINTS, ["denoising"], shard_rows=SHARD_ROWS, datasets=datasets)


def settings(store: LatentStore, **changes) -> StreamSettings:
    plan = SamplePlan(ROWS, BATCH, seed=4, phase="p")
    arguments = {
        "mixture": Mixture(
            (Member("a", 0, BORDER, None, False), Member("b", BORDER, ROWS - BORDER, None, False)), plan
        ),
        "source": store,
        "hints": (),
        "rank": 0,
        "world_size": 1,
        "name": "test",
    }
    return StreamSettings(**(arguments | changes))


def weighted(store: LatentStore, **changes) -> StreamSettings:
    """Of five samples, three are of "b" and take simulated hints."""
    members = (Member("a", 0, BORDER, 2.0, False), Member("b", BORDER, ROWS - BORDER, 3.0, True))
    plans = [SamplePlan(member.count, BATCH, seed=4, phase=member.name) for member in members]
    mixture = Mixture(members, MixedPlan(plans, [2.0, 3.0], BATCH, seed=4, phase="p"))
    return settings(store, mixture=mixture, hints=HINTS, **changes)


def assert_planned(s: StreamSettings, step: int, batch: dict[str, np.ndarray]) -> None:
    """The rows, variants and hints that the members and their plan name for this step, in fp16."""
    plan = s.mixture.plan
    index = plan.positions(step, s.rank, s.world_size)
    np.testing.assert_array_equal(batch["index"], index)
    assert batch["index"].dtype == np.int64
    assert set(batch) == {"index", "latent", *(f"hint.{hint}" for hint in s.hints)}
    if isinstance(plan, MixedPlan):
        member, own = plan.ids(index).T
        rows, simulated = np.where(member == 0, own, BORDER + own), member == 1
    else:
        rows, simulated = plan.ids(index), np.zeros(len(index), bool)
    variants = plan.variants(index, VARIANTS)
    columns = {"latent": 0, "hint.denoising": np.where(simulated, 3, 1), "hint.canny": 2}
    for name in set(batch) - {"index"}:
        expected = code(rows, variants, columns[name])[:, None, None, None]
        assert batch[name].dtype == np.float16
        assert batch[name].shape == (len(index), *SHAPE)
        np.testing.assert_array_equal(batch[name], np.broadcast_to(expected, batch[name].shape), err_msg=name)


def eventually(condition: Callable[[], bool], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def small_chunks(monkeypatch):
    """A chunk holds two steps of latents with two hints, and a task of Ray's at least two chunks."""
    monkeypatch.setattr("ray_pipeline.data.stream._CHUNK_BYTES", 2 * BATCH * 3 * 2 * int(np.prod(SHAPE)))
    monkeypatch.setattr("ray_pipeline.data.stream._TASK_CHUNKS", 2)


@pytest.fixture
def full_cluster(ray_cluster) -> Iterator[None]:
    """No logical CPU is left, as where workers fill a node."""
    taken = placement_group([{"CPU": ray_cluster["CPU"]}])
    assert taken.wait(60)
    yield
    remove_placement_group(taken)
    assert eventually(lambda: ray.available_resources().get("CPU", 0) == ray_cluster["CPU"])


@pytest.fixture
def executions() -> Iterator[Callable[[str], set[str]]]:
    """Executions by name of the stream, as Ray Data's log tells them."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda name: {
        found for line in records for found in re.findall(rf"Starting execution.* ({name}\S+?)\.? ", line)
    }
    logger.setLevel(level)
    logger.removeHandler(handler)


def context_values() -> tuple:
    context = ray.data.DataContext.get_current()
    return (
        id(context),
        context.use_datasource_v2,
        context.execution_options.preserve_order,
        context.enable_progress_bars,
        context.target_max_block_size,
        context.memory_usage_poll_interval_s,
        tuple(context.custom_execution_callback_classes),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("make", [settings, weighted])
def test_what_the_actors_of_all_ranks_gather_is_the_planned_batches(store, make, world_size):
    ranks = [make(store, rank=rank, world_size=world_size) for rank in range(world_size)]
    plan = ranks[0].mixture.plan
    steps = plan.steps(2)
    assert steps * BATCH > 2 * ROWS  # the last batch reaches into a third epoch
    chunks = Chunks(0, steps, 3)  # the last one is shorter
    actors = [Gather(s, chunks) for s in ranks]
    for number in range(len(chunks)):
        parts = [actor({"id": np.array([number])}) for actor in actors]
        whole = {name: np.concatenate([part[name][0] for part in parts]) for name in parts[0]}
        order = np.argsort(whole["index"])
        for place, step in enumerate(chunks[number]):
            taken = order[place * BATCH : (place + 1) * BATCH]
            assert_planned(make(store), step, {name: values[taken] for name, values in whole.items()})


def test_chunks_cover_the_steps_that_are_left_once_and_in_order():
    for first, last, size in [(0, 7, 3), (5, 9, 4), (2, 3, 8), (0, 6, 2)]:
        chunks = Chunks(first, last, size)
        cut = [chunks[number] for number in range(len(chunks))]
        assert [step for steps in cut for step in steps] == list(range(first, last))
        assert {len(steps) for steps in cut[:-1]} <= {size}


def test_the_slices_that_reach_three_ranks_are_the_planned_batches(ray_cluster, store):
    # by default a chunk may hold all that is left; 4, 3 and 4 samples a step, 7 steps each
    for rank in range(3):
        s = settings(store, rank=rank, world_size=3)
        arrived = list(stream(s, 0, s.mixture.plan.steps(2)))
        assert [step for step, _ in arrived] == list(range(7))
        for step, batch in arrived:
            assert_planned(s, step, batch)


def test_a_resume_in_a_full_cluster_gives_exactly_the_tail_of_a_mixture_in_order(
    full_cluster, store, small_chunks, executions
):
    # steps 7 to 29 in 12 chunks, by 2 actors at once, whose order of arrival must not show
    before = context_values()
    s = weighted(store, workers=2, name="tail")
    arrived = []
    with closing(stream(s, 7, 30)) as tail:
        for item in tail:
            assert context_values() == before  # what else uses Ray Data in this process keeps its settings
            arrived.append(item)
    assert [step for step, _ in arrived] == list(range(7, 30))
    for step, batch in arrived:
        assert_planned(s, step, batch)
    simulated = np.concatenate([s.mixture.rows(batch["index"])[1] for _, batch in arrived])
    assert 0.5 < simulated.mean() < 0.7
    assert len(executions("tail")) == 1
    assert context_values() == before


def test_nothing_left_is_nothing_streamed(store):
    assert list(stream(settings(store), 5, 5)) == []


def test_a_stream_that_is_left_gives_its_actors_back(ray_cluster, store, small_chunks):
    def gathering() -> bool:
        family = {process.pid for process in psutil.Process().children(recursive=True)}
        words = {each.pid: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
        return any("MapWorker(MapBatches(Gather))" in words.get(pid, "") for pid in family)

    assert eventually(lambda: not gathering())
    with closing(stream(settings(store), 0, 600)) as batches:
        next(batches)
        assert eventually(gathering)
    assert eventually(lambda: not gathering())


def test_a_stream_that_gives_nothing_ends_in_words_after_its_time(ray_cluster, store, small_chunks, tmp_path):
    here, stuck = os.getpid(), tmp_path / "stuck"
    stuck.touch()

    class Stuck:
        shape, variants = store.shape, store.variants

        def gather(self, *args):
            while os.getpid() != here and stuck.exists():
                time.sleep(0.05)
            return store.gather(*args)

    s = replace(settings(store, name="stuck"), source=Stuck(), timeout=1.2)
    with (
        pytest.raises(
            RuntimeError, match=r"stuck gave no batch for step \d+ within 0.02 minutes .*ray.timeout_minutes"
        ),
        closing(stream(s, 0, 600)) as batches,
    ):
        list(batches)
    stuck.unlink()


@pytest.fixture
def turns(monkeypatch) -> list[tuple[float, int]]:
    """Turns of Ray Data's loop in this process: when each ended, and how many outputs of tasks were read by then."""
    ended = []

    class Turns(ExecutionCallback):
        def on_execution_step(self, executor) -> None:
            ended.append((time.monotonic(), sum(op.metrics.num_task_outputs_generated for op in executor._topology)))

    classes = [*ray.data.DataContext.get_current().custom_execution_callback_classes, Turns]
    monkeypatch.setattr(ray.data.DataContext.get_current(), "custom_execution_callback_classes", classes)
    return ended


def test_the_loop_of_ray_data_rests_where_output_may_not_be_read(ray_cluster, store, small_chunks, turns, monkeypatch):
    # the share holds few of 1,000 chunks, and those that are gathered and not read would wake the loop without a pause
    monkeypatch.setattr("ray_pipeline.data.stream._TASK_CHUNKS", 500)
    options = ray.data.DataContext.get_current().execution_options
    monkeypatch.setattr(options, "resource_limits", options.resource_limits.copy(object_store_memory=20_000))
    with closing(stream(settings(store), 0, 2000)) as batches:
        for _ in range(10):  # the first chunk is gathered without Ray Data
            next(batches)
        until = time.monotonic() + 120
        while True:  # a busy machine takes its time to fill the share
            time.sleep(4)
            now, (_, read) = time.monotonic(), turns[-1]
            if next(moment for moment, reads in turns if reads == read) < now - 3:
                break
            assert now < until, f"the share was never full: {read} outputs read"
        assert read < 1000
        assert sum(moment > now - 2 for moment, _ in turns) < 100  # about 40; some 3,000 without a rest
        for _ in range(200):
            next(batches)


def test_a_damaged_shard_is_named(ray_cluster, store, tmp_path):
    root = shutil.copytree(store.folder.parent.local, tmp_path / "copy")
    with (root / "train" / "shard-00002.npy").open("r+b") as shard:
        shard.truncate(400)
    s = settings(LatentStore.open(root))
    with pytest.raises(Exception) as caught, closing(stream(s, 0, 4)) as batches:
        list(batches)
    message = str(find_user_error(caught.value))
    assert re.search(r"copy/train/shard-00002\.npy is missing or damaged .*found 400 bytes", message)
    assert "\n" not in message


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """No reader's thread outlives the test."""
    yield
    assert eventually(lambda: not any(thread.name == "read-ahead" for thread in threading.enumerate()))


class Source:
    """0, 1, 2, ... as far as `limit`; knows what it made and whether it was closed; `gate` holds it back."""

    def __init__(self, limit: int = 10**9, gate: threading.Event | None = None):
        self.made, self.closed, self.limit, self.gate = [], threading.Event(), limit, gate

    def items(self) -> Iterator[int]:
        try:
            for number in range(self.limit):
                if self.gate:
                    self.gate.wait()
                self.made.append(number)
                yield number
        finally:
            self.closed.set()


def test_read_ahead_starts_at_once_stays_a_few_items_ahead_and_keeps_order(no_thread_left):
    source = Source(50)
    ahead = ReadAhead(source.items(), depth=3)
    assert eventually(lambda: len(source.made) == 4)  # one more is in its hand
    time.sleep(0.3)
    assert len(source.made) == 4
    for number in range(50):
        assert next(ahead) == number
        assert len(source.made) <= number + 1 + 4
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(ahead)
    assert source.closed.is_set()


def test_read_ahead_iterates_what_cannot_be_closed(no_thread_left):
    ahead = ReadAhead([1, 2, 3])
    assert list(ahead) == [1, 2, 3]
    ahead.close()


def test_an_error_in_the_reader_thread_arrives_at_the_reader_once(no_thread_left):
    def items():
        yield 1
        raise KeyError("broken shard")

    ahead = ReadAhead(items())
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="broken shard"):
        next(ahead)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)


@pytest.mark.parametrize("taken", [0, 1])
def test_leaving_read_ahead_ends_its_thread_and_closes_what_it_reads(no_thread_left, taken):
    source = Source()
    ahead = ReadAhead(source.items())
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert source.closed.wait(10)
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_closing_read_ahead_lets_go_who_waits_for_an_item(no_thread_left):
    # the inner one is read by the thread of the outer one, which waits for a stream that gives nothing
    source = Source(gate=threading.Event())
    inner = ReadAhead(source.items())
    outer = ReadAhead(number for number in inner)
    ended = threading.Event()
    reader = threading.Thread(target=lambda: (list(outer), ended.set()), daemon=True)
    reader.start()
    time.sleep(0.2)
    assert not ended.is_set()
    outer.close()
    assert ended.wait(10)
    inner.close()
    assert eventually(lambda: sum(thread.name == "read-ahead" for thread in threading.enumerate()) == 1)
    source.gate.set()  # a thread inside Ray ends when Ray answers
    assert source.closed.wait(10)
