"""What Ray Data hands to each rank is what the plan says, from any step on."""

import json
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import ray

from ray_pipeline.data.latents import FORMAT_VERSION, LatentStats, LatentStore, write_shard
from ray_pipeline.data.plan import SamplePlan
from ray_pipeline.data.stream import StreamSettings, read_ahead, stream
from ray_pipeline.diffusion.noise import variants

SHAPE = (1, 2, 4)
ROWS, SHARD_ROWS, VARIANTS = 37, 10, 3
HINTS = ("denoising", "canny")


def code(row: np.ndarray, variant: np.ndarray, column: int) -> np.ndarray:
    """What element 0 of a stored latent says about where it came from."""
    return row + 100 * variant + 300 * column  # below 2048: exact in fp16


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> LatentStore:
    """Every latent holds its row, variant and column."""
    root = tmp_path_factory.mktemp("stream")
    folder = root / "train"
    folder.mkdir()
    shards = []
    for start in range(0, ROWS, SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, ROWS))
        columns = {
            f"{name}@{variant}": np.broadcast_to(
                code(rows, variant, number).astype(np.float16)[:, None, None, None], (len(rows), *SHAPE)
            )
            for variant in range(VARIANTS)
            for number, name in enumerate(("latent", *(f"hint.{hint}" for hint in HINTS)))
        }
        file = f"shard-{len(shards):05d}.arrow"
        shards.append({"file": file, "rows": len(rows), "sha256": write_shard(folder / file, columns)})
    index = {"version": FORMAT_VERSION, "fingerprint": "f", "shape": SHAPE, "hints": HINTS, "variants": VARIANTS}
    index |= {"datasets": [{"name": "a", "start": 0, "count": ROWS}], "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    stats = LatentStats(np.zeros(1), np.ones(1), ROWS, "f")
    Path(root, "stats.json").write_text(json.dumps(stats.as_json()))
    return LatentStore.open(root)


def settings(store: LatentStore, **changes) -> StreamSettings:
    arguments = {
        "plan": SamplePlan(ROWS, 8, seed=4, phase="p"),
        "store": store,
        "rows": np.arange(ROWS),
        "hints": (),
        "rank": 0,
        "world_size": 1,
        "name": "test",
    }
    return StreamSettings(**(arguments | changes))


def rows_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return batch["latent"][:, 0, 0, 0].astype(int) % 100


@pytest.fixture
def small_blocks(monkeypatch):
    """Ray passes on blocks of a few rows, so that their borders fall inside steps."""
    monkeypatch.setattr("ray_pipeline.data.stream._BLOCK_BYTES", 250)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_slices_of_all_ranks_are_the_planned_batches(ray_cluster, store, world_size):
    plan = settings(store).plan
    steps = plan.steps(2)
    ranks = [list(stream(settings(store, rank=rank, world_size=world_size), 0, steps)) for rank in range(world_size)]
    for step in range(steps):
        assert {slices[step][0] for slices in ranks} == {step}
        index = np.concatenate([slices[step][1]["index"] for slices in ranks])
        np.testing.assert_array_equal(index, np.arange(8 * step, 8 * step + 8))
        np.testing.assert_array_equal(np.concatenate([rows_of(slices[step][1]) for slices in ranks]), plan.batch(step))


def test_each_row_brings_its_own_variant_and_its_own_hints(ray_cluster, store, small_blocks):
    # two actors at once; the phase sees part of the store
    rows = np.arange(5, ROWS)
    plan = SamplePlan(len(rows), 8, seed=4, phase="p")
    s = settings(store, plan=plan, rows=rows, hints=HINTS[::-1], workers=2)
    batches = list(stream(s, 0, 12))
    assert len(batches) == 12
    for step, batch in batches:
        assert set(batch) == {"index", "latent", "hint.denoising", "hint.canny"}
        expected_rows, expected_variants = rows[plan.batch(step)], variants(4, "p", batch["index"], VARIANTS)
        for column, name in enumerate(("latent", "hint.denoising", "hint.canny")):
            assert batch[name].shape == (8, *SHAPE)
            assert batch[name].dtype == np.float16
            expected = code(expected_rows, expected_variants, column)
            np.testing.assert_array_equal(batch[name], np.broadcast_to(expected[:, None, None, None], (8, *SHAPE)))


def test_a_resume_gives_exactly_the_tail(ray_cluster, store):
    s = settings(store)
    with closing(stream(s, 7, 12)) as tail:
        resumed = list(tail)
    assert [step for step, _ in resumed] == list(range(7, 12))
    for step, batch in resumed:
        np.testing.assert_array_equal(rows_of(batch), s.plan.batch(step))
        np.testing.assert_array_equal(batch["index"], s.plan.positions(step))


def test_nothing_left_is_nothing_streamed(store):
    assert list(stream(settings(store), 5, 5)) == []


def test_a_stream_that_is_left_gives_its_actors_back(ray_cluster, store, small_blocks):
    def free(expected) -> bool:
        """Whether that many logical CPUs are free; Ray's view of them lags behind."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if expected(ray.available_resources().get("CPU", 0)):
                return True
            time.sleep(0.05)
        return False

    everything = ray_cluster["CPU"]
    assert free(lambda cpus: cpus == everything)
    with closing(stream(settings(store), 0, 600)) as batches:
        next(batches)
        assert free(lambda cpus: cpus < everything)
    assert free(lambda cpus: cpus == everything)


def test_read_ahead_keeps_order_and_stays_a_few_items_ahead():
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    seen = []
    for item in read_ahead(items(), depth=3):
        seen.append(item)
        assert len(made) <= len(seen) + 5
    assert seen == list(range(50))


def test_an_error_in_the_reader_thread_arrives_at_the_reader():
    def items():
        yield 1
        raise KeyError("broken shard")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="broken shard"):
        next(ahead)


def test_leaving_read_ahead_ends_its_thread_and_closes_what_it_reads():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = read_ahead(items())
    next(ahead)
    ahead.close()
    deadline = time.monotonic() + 10
    while not closed and time.monotonic() < deadline:
        time.sleep(0.05)
    assert closed
