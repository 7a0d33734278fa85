"""The order of samples: every epoch whole, the same for any number of workers, uniform, and planned in O(1)."""

import time

import numpy as np
import pytest
from scipy import stats

from ray_pipeline.data.plan import SamplePlan, permute, round_keys, unpermute

SIZES = (1, 2, 3, 5, 16, 17, 64, 100, 1000)
PLANS = (
    SamplePlan(101, 8, seed=1, phase="p"),
    SamplePlan(101, 8, seed=1, phase="p", shard_rows=10, window=25),
    SamplePlan(100, 7, seed=1, phase="p", shard_rows=10, window=30),  # no short shard, a short last window
    SamplePlan(7, 16, seed=1, phase="p"),  # a batch spans three epochs
    SamplePlan(7, 16, seed=1, phase="p", shard_rows=16, window=64),  # one short shard, one window
)
every_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=lambda p: f"{p.num_samples}-{p.global_batch}-{p.shard_rows}-{p.window}"
)


def sequence(plan: SamplePlan, epochs: int) -> np.ndarray:
    return np.concatenate([plan.batch(step) for step in range(plan.steps(epochs))])


@every_plan
def test_every_epoch_is_a_permutation_of_all_rows(plan):
    ids = sequence(plan, epochs=4)
    assert ids.dtype == np.int64
    for epoch in range(4):
        rows = ids[epoch * plan.num_samples : (epoch + 1) * plan.num_samples]
        np.testing.assert_array_equal(np.sort(rows), np.arange(plan.num_samples))


@every_plan
def test_at_any_step_every_sample_was_seen_equally_often_give_or_take_one(plan):
    seen = np.zeros(plan.num_samples, int)
    for step in range(plan.steps(5)):
        np.add.at(seen, plan.batch(step), 1)
        assert seen.max() - seen.min() <= 1
    assert seen.min() >= 5


@every_plan
def test_epochs_differ_in_their_order(plan):
    ids = sequence(plan, epochs=3)[: 3 * plan.num_samples].reshape(3, -1)
    assert not (ids[0] == ids[1]).all()
    assert not (ids[1] == ids[2]).all()


@pytest.mark.parametrize("other", [{"seed": 2}, {"phase": "q"}])
def test_seed_and_phase_change_the_order(other):
    arguments = {"seed": 1, "phase": "p"}
    one, two = (SamplePlan(1000, 1000, **(arguments | change)).batch(0) for change in ({}, other))
    assert (one == two).mean() < 0.02


@every_plan
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 7])
def test_slices_of_the_ranks_make_up_the_batch_and_differ_by_at_most_one(plan, world_size):
    for step in (0, 3, 40):
        slices = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(slices), plan.batch(step))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_steps_complete_the_epochs_and_no_step_too_many():
    plan = SamplePlan(101, 8, seed=0)
    for epochs in (1, 2, 8, 50):
        assert (plan.steps(epochs) - 1) * 8 < 101 * epochs <= plan.steps(epochs) * 8
    assert SamplePlan(5, 16, seed=0).steps(3) == 1
    assert [plan.epoch(position) for position in (0, 100, 101, 202)] == [1, 1, 2, 3]


def test_a_window_reads_few_shards():
    plan = SamplePlan(100_000, 1000, seed=3, shard_rows=500, window=4000)
    shards = [len(np.unique(plan.ids(np.arange(4000) + 4000 * window) // 500)) for window in range(25)]
    assert max(shards) <= 4000 // 500 + 1
    # and yet the windows hold shards from all over the data set
    assert np.ptp(plan.ids(np.arange(4000))) > 50_000


@pytest.mark.parametrize("size", SIZES)
def test_the_inverse_permutation_leads_back(size):
    keys = round_keys("any", size)
    values = np.arange(size)
    np.testing.assert_array_equal(unpermute(permute(values, size, keys), size, keys), values)
    np.testing.assert_array_equal(permute(unpermute(values, size, keys), size, keys), values)


@pytest.mark.parametrize("size", [6, 16, 100])
def test_positions_and_neighbours_are_uniform(size):
    epochs = 300
    plan = SamplePlan(size, size, seed=5)
    orders = np.stack([plan.batch(epoch) for epoch in range(epochs)])
    # where a row comes: the row and column sums are given, so (size - 1)^2 degrees of freedom
    table = np.zeros((size, size))
    np.add.at(table, (orders, np.broadcast_to(np.arange(size), orders.shape)), 1)
    squares = ((table - epochs / size) ** 2 / (epochs / size)).sum()
    assert 1e-3 < stats.chi2.sf(squares, (size - 1) ** 2) < 1 - 1e-3
    # who follows whom: differences of neighbours, modulo size, are uniform over 1 .. size - 1
    steps = np.bincount((np.diff(orders, axis=1) % size).ravel(), minlength=size)[1:]
    assert 1e-3 < stats.chisquare(steps).pvalue < 1 - 1e-3


def test_shards_and_rows_of_windows_come_in_uniform_order():
    plan = SamplePlan(120, 120, seed=5, shard_rows=10, window=40)
    orders = np.stack([plan.batch(epoch) for epoch in range(100)])
    places = orders.argsort(axis=1)
    # each row's mean place over the epochs is that of a uniform draw from 0 .. 119
    deviation = (places.mean(axis=0) - 59.5) / np.sqrt((120**2 - 1) / 12 / 100)
    assert np.abs(deviation).max() < 4
    # and inside a window the rows of a shard are not left in their order
    rising = (np.diff(places.reshape(100, 12, 10), axis=2) > 0).mean()
    assert abs(rising - 0.5) < 4 * 0.5 / np.sqrt(100 * 12 * 9)


@pytest.mark.parametrize("windowed", [{}, {"shard_rows": 1024, "window": 100_000}])
def test_a_billion_rows_are_planned_in_milliseconds(windowed):
    plan = SamplePlan(10**9, 256, seed=0, phase="p", **windowed)
    started = time.process_time()
    ids = plan.batch(plan.steps(50) - 1)
    assert time.process_time() - started < 0.05
    assert len(np.unique(ids)) == 256
    assert ids.min() >= 0
    assert ids.max() < 10**9


def test_numpy_integers_plan_as_integers_do():
    one, two = SamplePlan(100, 8, seed=3), SamplePlan(np.int64(100), np.int32(8), seed=np.int64(3))
    np.testing.assert_array_equal(one.batch(7), two.batch(np.int64(7)))


def test_the_order_is_the_recorded_one():
    # a run that is resumed with another order repeats some samples and skips others
    assert SamplePlan(20, 20, seed=0, phase="phase1").batch(0).tolist() == GOLDEN_FULL
    assert SamplePlan(20, 20, seed=0, phase="phase1", shard_rows=6, window=8).batch(1).tolist() == GOLDEN_WINDOWED
    assert SamplePlan(10**9, 4, seed=0, phase="phase1").batch(10**6).tolist() == GOLDEN_LARGE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"window": 4}, "window and shard_rows go together"),
        ({"window": 0, "shard_rows": 4}, "window is 0"),
    ],
)
def test_impossible_plans_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SamplePlan(**({"num_samples": 10, "global_batch": 4, "seed": 0} | arguments))


@pytest.mark.parametrize(("step", "rank", "world_size"), [(-1, 0, 1), (0, 2, 2), (0, -1, 2), (0, 0, 5)])
def test_slices_that_do_not_exist_are_refused(step, rank, world_size):
    with pytest.raises(ValueError, match=r"step|no slice"):
        SamplePlan(10, 4, seed=0).rank_batch(step, rank, world_size)


GOLDEN_FULL = [13, 7, 4, 5, 10, 14, 8, 15, 12, 0, 17, 16, 19, 6, 3, 18, 11, 1, 2, 9]
GOLDEN_WINDOWED = [1, 8, 0, 9, 11, 7, 6, 10, 2, 18, 19, 13, 3, 12, 5, 4, 15, 17, 16, 14]
GOLDEN_LARGE = [644958426, 824083740, 319036649, 588423464]
